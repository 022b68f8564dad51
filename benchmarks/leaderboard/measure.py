"""Models of this project beside those of other packages, on ratings that packages carry: `make leaderboard`.

Every set is split once. Peers choose their settings on an inner split of the training rows, each in its own
environment; ours are taken as they come. All lists and predictions are measured by the same few lines below.
"""
import argparse
import json
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from scipy.stats import t as student

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE/'peers')]
import common
import ours
from harness import RESULTS, about, digits, save_table
from sets import SETS

PEERS = sorted(o for o in (HERE/'peers').glob('*.py') if o.stem != 'common')
ENVIRONMENTS = HERE.parents[1]/'build'/'peers'

# --- environments of the peers --------------------------------------------------------------------------------------
def requirements(script):
    "What the first lines of a script say it needs (PEP 723)"
    block = re.search(r'^# /// script\n(.+?)^# ///$', script.read_text(encoding='utf-8'), re.M | re.S)[1]
    return tomllib.loads(re.sub(r'^# ?', '', block, flags=re.M))['dependencies']

def python_of(script):
    "The Python of a peer's environment, made if it is not there or needs other packages"
    folder,needs = ENVIRONMENTS/script.stem,requirements(script)
    made = folder/'requirements.json'
    if not made.exists() or json.loads(made.read_text()) != needs:
        print(f'environment of {script.stem}: {", ".join(needs)}', flush=True)
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run([folder/'bin'/'python', '-m', 'pip', 'install', '-q', *needs], check=True)
        made.write_text(json.dumps(needs))
    return folder/'bin'/'python'

def run_peer(script, folder, kind):
    "Run a peer on the task in `folder`; bars and warnings are shown only if it fails"
    done = subprocess.run([python_of(script), script, folder, kind], stderr=subprocess.PIPE, text=True)
    if done.returncode: raise RuntimeError(f'{script.name} failed on {kind}:\n{done.stderr[-3000:]}')

# --- a set and its split --------------------------------------------------------------------------------------------
class Measured:
    "A set, split, with all that is to be measured on it"
    def __init__(self, chosen, n_rows=None):
        self.set = chosen
        self.df = chosen.read() if n_rows is None else chosen.read().head(n_rows)
        self.value = 'rating' if 'rating' in self.df else 'weight'
        self.train,self.test = (np.asarray(o) for o in chosen.split(self.df))
        self.users,self.items = ({id_: i for i,id_ in enumerate(sorted(self.df[o].unique()))} for o in ('user', 'item'))
        self.shape = len(self.users),len(self.items)
        rows,held = self.numbers(self.train),self.numbers(self.test)
        self.training = common.Rows(*rows.T, self.df[self.value].to_numpy()[self.train], self.shape)
        self.y = self.df[self.value].to_numpy(dtype=float)[self.test]
        self.pairs = held
        self.relevant = self.relevant_in(held[self.liked(self.test)])
        known = np.bincount(rows[:, 0], minlength=self.shape[0]) > 0
        self.list_users = np.flatnonzero((np.diff(self.relevant.indptr) > 0) & known)

    def numbers(self, rows):
        df = self.df.iloc[rows]
        return np.stack([df.user.map(self.users), df.item.map(self.items)], 1)

    def liked(self, rows):
        if self.set.liked is None: return np.ones(len(rows), bool)
        return self.df.rating.to_numpy()[rows] >= self.set.liked

    def relevant_in(self, pairs):
        "Held-out pairs that count, sparse; those that training has, too, do not"
        ones = csr_matrix((np.ones(len(pairs)), tuple(pairs.T)), self.shape)
        ones.data[:] = 1
        left = ones - ones.multiply(self.training.matrix('ones'))
        left.eliminate_zeros()
        return left.tocsr()

    def write_task(self, folder):
        "The task for peers: training rows, an inner split of them, and what is asked for"
        rows = self.training
        held = np.random.default_rng(0).random(len(rows.users)) < .1
        np.savez(folder/'task.npz', users=rows.users, items=rows.items, values=rows.values, shape=self.shape,
                 held=held, liked=self.liked(self.train), list_users=self.list_users, pairs=self.pairs)

# --- measures -------------------------------------------------------------------------------------------------------
def list_values(measured, lists):
    "NDCG and recall of each user"
    relevant = measured.relevant[measured.list_users]
    n = np.diff(relevant.indptr)
    hits = np.array([relevant[i].toarray()[0][row]*(row >= 0) for i,row in enumerate(lists)])
    return dict(ndcg=common.ndcg(lists, relevant, n), recall=hits.sum(1)/n)

def interval(differences):
    "Mean with its 95 % t interval"
    n,mean = len(differences),differences.mean()
    half = student.ppf(.975, n - 1)*differences.std(ddof=1)/np.sqrt(n)
    return dict(mean=digits(mean, 4), low=digits(mean - half, 4), high=digits(mean + half, 4))

def compared(rows, values, more_is_better):
    "Each row with its difference to the best peer, over the same users or ratings; the best row first"
    sign = 1 if more_is_better else -1
    peers = [o['model'] for o in rows if not o['ours'] and o['tried']]
    best = max(peers, key=lambda name: sign*values[name].mean())
    for row in rows:
        own = values[row['model']]
        row['beside'] = None if row['model'] == best else dict(peer=best, **interval(own - values[best]))
    return sorted(rows, key=lambda row: -sign*values[row['model']].mean())

def answers_in(folder, peers, kind):
    "What each of `peers` hands in for the task in `folder`, with what it says of it"
    for script in peers: run_peer(script, folder, kind)
    for path in sorted(folder.glob(f'{kind} *.npz')):
        said = json.loads(path.with_suffix('.json').read_text(encoding='utf-8'))
        yield path.stem.removeprefix(f'{kind} '),np.load(path)['answer'],said

def answers_of_peers(measured, kind):
    with tempfile.TemporaryDirectory() as folder:
        measured.write_task(Path(folder))
        yield from answers_in(Path(folder), PEERS, kind)

def row_of(name, seconds, is_ours, **more):
    return dict(model=name, ours=is_ours, seconds=digits(seconds, 3), setting=None, tried=0, tuning_seconds=None,
                versions=None) | more

def of_peer(said):
    kept = {o: said[o] for o in ('setting', 'tried', 'versions')}
    return dict(kept, tuning_seconds=digits(said['tuning_seconds'], 3), inner=digits(said['inner']))

def popular(measured):
    "The items that most users have, without those seen"
    counts = np.asarray(measured.training.matrix('ones').sum(0))
    users = measured.list_users
    return common.best(np.repeat(counts, len(users), 0), measured.training.matrix('ones')[users])

# --- boards ---------------------------------------------------------------------------------------------------------
def lists_board(measured):
    rows,values = [],{}
    def add(name, lists, seconds, is_ours, **more):
        values_of = list_values(measured, lists)
        values[name] = values_of['ndcg']
        means = {f'{o}@10': digits(v.mean()) for o,v in values_of.items()}
        rows.append(row_of(name, seconds, is_ours, **means, **more))
    add('popularity', popular(measured), 0., False)
    dls = ours.loaders(measured.df, (measured.train, measured.test))
    for name,lists,seconds,said in ours.list_answers(dls, measured.set.liked, common.K, measured.users, measured.items):
        add(name, np.array([lists[u] for u in measured.list_users]), seconds, True)
        if abs(rows[-1]['ndcg@10'] - said['ndcg']) > 1e-4:
            raise AssertionError(f'{name}: NDCG {rows[-1]["ndcg@10"]} here, {said["ndcg"]} by evaluate_ranking')
    for name,lists,said in answers_of_peers(measured, 'lists'):
        add(name, lists, said['seconds'], False, **of_peer(said))
    return dict(asked='lists', measure='ndcg@10', users=len(measured.list_users), rows=compared(rows, values, True))

def ratings_board(measured):
    rows,values = [],{}
    def add(name, predicted, seconds, is_ours, **more):
        values[name] = np.square(predicted - measured.y)
        rows.append(row_of(name, seconds, is_ours, mse=digits(values[name].mean()), **more))
    add('constant mean', np.full(len(measured.y), measured.training.values.mean()), 0., False)
    dls = ours.loaders(measured.df, (measured.train, measured.test))
    for name,predicted,seconds in ours.rating_answers(dls): add(name, predicted, seconds, True)
    for name,predicted,said in answers_of_peers(measured, 'ratings'):
        add(name, predicted, said['seconds'], False, **of_peer(said))
    return dict(asked='ratings', measure='mse', rows=compared(rows, values, False))

def boards(chosen, n_rows):
    measured = Measured(chosen, n_rows)
    data = dict(set=chosen.name, source=chosen.source, liked=chosen.liked, users=measured.shape[0],
                items=measured.shape[1], training_rows=len(measured.train), held_out_rows=len(measured.test))
    found = [lists_board(measured)] + ([ratings_board(measured)] if chosen.ratings else [])
    return dict(data, boards=found)

def show(board):
    for o in board['rows']:
        beside = o['beside']
        gap = '' if beside is None else f'{beside["mean"]:+.4f} [{beside["low"]:+.4f}, {beside["high"]:+.4f}]'
        print(f'    {o["model"]:28} {o[board["measure"]]:.4f} {o["seconds"]:8.2f} s  {gap}', flush=True)

def out_of(args):
    "The folder for the JSON: beside the results of other benchmarks, whose tables have another form"
    return args.out or (None if args.quick else RESULTS/'leaderboard')

def main(argv=None):
    p = argparse.ArgumentParser(prog='measure.py', description='Who makes the better lists, and who foresees ratings?')
    p.add_argument('names', nargs='*', help=f'sets to measure, all if not given: {[o.name for o in SETS]}')
    p.add_argument('--quick', action='store_true', help='few rows, to see that it runs; writes to build/benchmarks')
    p.add_argument('--out', type=Path, help='folder for the JSON')
    args = p.parse_args(argv)
    if unknown := set(args.names) - {o.name for o in SETS}: p.error(f'no sets {sorted(unknown)}')
    began = about('leaderboard', 42, 1, 'processor', args.quick) | dict(command='make leaderboard')
    found = []
    for chosen in SETS:
        if args.names and chosen.name not in args.names: continue
        print(chosen.name, flush=True)
        found.append(boards(chosen, 3000 if args.quick else None))
        for board in found[-1]['boards']:
            print(f'  {board["asked"]}', flush=True)
            show(board)
    save_table(dict(name='leaderboard', title='Lists and ratings beside other packages', about=began, sets=found,
                    question='Who makes the better lists, and who foresees ratings?'), out_of(args))

if __name__ == '__main__': main()
