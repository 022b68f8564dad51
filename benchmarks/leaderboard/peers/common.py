"""What each peer's script needs to take its task and to hand in its answer; numpy and scipy only.

A task is a folder with task.npz. A script chooses the settings of each of its models on the inner split (a tenth of
the training rows), fits the best ones on all training rows, and writes lists or predictions as <model>.npz and what it
did as <model>.json.
"""
import itertools
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

K = 10

# --- the task -------------------------------------------------------------------------------------------------------
class Rows:
    "Users, items and values of some rows"
    def __init__(self, users, items, values, shape):
        self.users,self.items,self.values,self.shape = users,items,values,shape

    def where(self, kept): return Rows(self.users[kept], self.items[kept], self.values[kept], self.shape)

    def matrix(self, values='given'):
        "Sparse [users, items]: values as 'given', the mean where a pair comes twice; 'above' the lowest; or 'ones'"
        count = csr_matrix((np.ones(len(self.users)), (self.users, self.items)), self.shape)
        if values == 'ones': return csr_matrix((np.ones(len(count.data)), count.indices, count.indptr), self.shape)
        total = csr_matrix((self.values, (self.users, self.items)), self.shape)
        total.data = total.data/count.data
        if values == 'above': total.data -= self.values.min()
        return total

class Task:
    "Training rows, which of them the inner split holds out, and what is asked for"
    def __init__(self, folder):
        data = np.load(Path(folder)/'task.npz')
        shape = tuple(int(o) for o in data['shape'])
        self.rows = Rows(data['users'], data['items'], data['values'].astype(float), shape)
        self.held,self.liked = data['held'],data['liked']
        self.users,self.pairs = data['list_users'],data['pairs']

    def inner(self):
        "Training rows of the inner split, and those that it holds out"
        return self.rows.where(~self.held),self.rows.where(self.held)

# --- lists ----------------------------------------------------------------------------------------------------------
def best(scores, seen):
    "The best items of each row, without those seen; -1 where there are no more"
    scores = np.array(scores, dtype=np.float64)
    scores[seen.nonzero()] = -np.inf
    listed = np.argsort(-scores, axis=1, kind='stable')[:, :K]
    return np.where(np.isfinite(np.take_along_axis(scores, listed, 1)), listed, -1)

def ndcg(lists, relevant, n_relevant):
    "Normalised discounted cumulative gain of each row; `relevant` is sparse [rows, items]"
    hits = np.zeros(lists.shape)
    for i,row in enumerate(lists): hits[i] = relevant[i].toarray()[0][row]*(row >= 0)
    discount = 1/np.log2(np.arange(2, K+2))
    return hits @ discount[:lists.shape[1]]/np.cumsum(discount)[np.minimum(n_relevant, K) - 1]

def inner_ndcg(fit, task, setting):
    "Mean NDCG of a setting on the inner split"
    train,_ = task.inner()
    wanted = task.rows.where(task.held & task.liked).matrix('ones')
    known = np.diff(train.matrix('ones').indptr) > 0
    users = np.flatnonzero((np.diff(wanted.indptr) > 0) & known)
    lists = best(fit(train, **setting)(users), train.matrix('ones')[users])
    wanted = wanted[users]
    return ndcg(lists, wanted, np.diff(wanted.indptr)).mean()

def lists_of(fit, task, setting):
    return best(fit(task.rows, **setting)(task.users), task.rows.matrix('ones')[task.users])

# --- ratings --------------------------------------------------------------------------------------------------------
def inner_mse(fit, task, setting):
    "Minus the mean squared error of a setting on the inner split: more is better"
    train,held = task.inner()
    predicted = fit(train, **setting)(held.users, held.items)
    return -np.square(np.clip(predicted, train.values.min(), train.values.max()) - held.values).mean()

def predictions_of(fit, task, setting):
    predicted = fit(task.rows, **setting)(*task.pairs.T)
    return np.clip(predicted, task.rows.values.min(), task.rows.values.max())

# --- what comes next ------------------------------------------------------------------------------------------------
class OrderedTask:
    "Training rows in order, which of them the inner split holds out, and whose lists are asked for"
    def __init__(self, folder):
        data = np.load(Path(folder)/'task.npz')
        shape = tuple(int(o) for o in data['shape'])
        self.rows = Rows(data['users'], data['items'], np.ones(len(data['users'])), shape)
        self.held,self.users,self.seeds = data['held'],data['list_users'],data['seeds'].tolist()

def inner_ndcg_in_order(fit, task, setting):
    "Mean NDCG of a setting on the inner split, with one seed"
    train,held = task.rows.where(~task.held),task.rows.where(task.held)
    seen = train.matrix('ones')
    wanted = (held.matrix('ones') - held.matrix('ones').multiply(seen)).tocsr()
    wanted.eliminate_zeros()
    users = np.flatnonzero((np.diff(wanted.indptr) > 0) & (np.diff(seen.indptr) > 0))
    lists = fit(train, users, task.seeds[0], **setting)
    return ndcg(lists, wanted[users], np.diff(wanted.indptr)[users]).mean()

def lists_in_order(fit, task, setting):
    "Lists of each seed, [n_seeds, n_users, K]"
    return np.stack([fit(task.rows, task.users, seed, **setting) for seed in task.seeds])

# --- the script -----------------------------------------------------------------------------------------------------
def settings_of(grid): return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]

def value_of(measure, fit, task, setting):
    "What a setting is worth, and the worst where the package cannot fit it; panics of Rust are no `Exception`"
    try: return measure(fit, task, setting)
    except (KeyboardInterrupt, SystemExit): raise
    except BaseException as e:
        print(f'  {setting} failed: {type(e).__name__}: {e}', flush=True)
        return -np.inf

def tuned(fit, grid, task, measure):
    "The best setting of the grid, its value, how many were tried, and the processor seconds of that"
    start,tried = time.process_time(),settings_of(grid)
    values = [value_of(measure, fit, task, o) for o in tried]
    at = int(np.argmax(values))
    if values[at] == -np.inf: raise RuntimeError(f'none of {len(tried)} settings could be fitted')
    return tried[at],float(values[at]),len(tried),time.process_time() - start

def main(packages, lists=None, ratings=None, in_order=None):
    "Answer the task in the folder that the command line names, with models as {name: (fit, grid)}"
    folder,kind = Path(sys.argv[1]),sys.argv[2]
    task = OrderedTask(folder) if kind == 'in order' else Task(folder)
    models,measure,answer = {'lists': (lists, inner_ndcg, lists_of), 'ratings': (ratings, inner_mse, predictions_of),
                             'in order': (in_order, inner_ndcg_in_order, lists_in_order)}[kind]
    for name,(fit,grid) in (models or {}).items():
        setting,inner,n,tuning = tuned(fit, grid, task, measure)
        start = time.process_time()
        result = answer(fit, task, setting)
        seconds = time.process_time() - start
        np.savez(folder/f'{kind} {name}.npz', answer=result)
        about = dict(setting=setting, inner=inner, tried=n, tuning_seconds=tuning, seconds=seconds,
                     versions={o: version(o) for o in packages})
        (folder/f'{kind} {name}.json').write_text(json.dumps(about), encoding='utf-8')
        print(f'  {name}: {setting}, inner {inner:.4f}', flush=True)
