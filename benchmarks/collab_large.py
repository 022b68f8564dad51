"""Lists from many items: what a sample of them saves and costs, and iALS beside that of implicit, on one thread.

Times are of a synthetic table, whose quality says nothing. Quality is of real ratings: MovieLens-100k, and with
`--books` Book-Crossing (readers and books with three and more ratings), which `make data-extra` fetches. `--peer` names
a Python that has implicit, such as the one that `make leaderboard` makes.
"""
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from collab_deep.data.loaders import RatingsDataLoaders
from collab_deep.data.movielens import movielens_100k
from collab_deep.data.splits import split_rows
from collab_deep.lists.evaluate import evaluate_ranking
from collab_deep.models.ials import iALS
from collab_deep.models.liking import Interactions
from collab_deep.train.learner import collab_deep_learner
from collab_deep.train.sampled import SampledSoftmaxLoss
from fastai.torch_core import set_seed

FACTORS, TURNS = 32, (2, 6)

def synthetic(n_users, n_items, n_rows, seed=0):
    "Numbers of users and items: each at least once, the rest by chance, items by popularity"
    rng = np.random.default_rng(seed)
    chance = 1/(np.arange(n_items) + 20.)
    users = np.concatenate([np.arange(n_users), rng.integers(0, n_users, n_rows - n_users)])
    items = np.concatenate([np.arange(n_items), rng.choice(n_items, n_rows - n_items, p=chance/chance.sum())])
    return users, items

def loaders(df, splits, bs, **kwargs):
    return RatingsDataLoaders.from_df(df, user_name='user', item_name='item', splits=splits, duplicates='keep', bs=bs,
                                      device='cpu', **kwargs)

# --- an epoch -------------------------------------------------------------------------------------------------------
def by_rows(n):
    loss = SampledSoftmaxLoss(n)
    loss.large = 0
    return loss

def all_rows(n):
    loss = SampledSoftmaxLoss(n)
    loss.large = float('inf')
    return loss

def epoch_seconds(dls, loss):
    "Seconds of the processor, in the second epoch of two where it is short"
    learn = collab_deep_learner(dls, loss=loss)
    for _ in range(1 if loss == 'softmax' else 2):
        start = time.process_time()
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        seconds = time.process_time() - start
    return seconds

def epochs(n_users, n_items, n_rows):
    df = pd.DataFrame(dict(zip(('user', 'item'), synthetic(n_users, n_items, n_rows))))
    dls = loaders(df, (np.arange(len(df)), []), 8192, implicit=True)
    ways = {'softmax': 'softmax', 'sampled softmax, all rows a step': all_rows(1024),
            'sampled softmax, rows of the batch': by_rows(1024)}
    rows = []
    for way, loss in ways.items():
        rows.append(dict(asked='epoch', way=way, seconds=round(epoch_seconds(dls, loss), 2)))
        print('  ', rows[-1], flush=True)
    return rows

# --- quality --------------------------------------------------------------------------------------------------------
def books():
    sys.path.insert(0, str(Path(__file__).parent/'leaderboard'))
    import sets
    all_of_them = sets.at_least
    sets.at_least = lambda df, n: all_of_them(df, 3)
    return sets.book_crossing()

def quality(name, df, liked, bs, seeds):
    dls = loaders(df, split_rows(df, seed=42), bs)
    rows = []
    for way, loss in {'softmax': lambda: 'softmax', 'sampled, 1,024': lambda: by_rows(1024)}.items():
        values, seconds = [], []
        for seed in range(seeds):
            set_seed(seed)
            learn = collab_deep_learner(dls, loss=loss())
            start = time.process_time()
            with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(10)
            seconds.append(time.process_time() - start)
            values.append(evaluate_ranking(learn, 10, liked).value['ndcg'])
        rows.append(dict(asked='quality', ratings=name, items=dls.n_items - 1, way=way,
                         ndcg=round(float(np.mean(values)), 4),
                         of_seeds=[round(float(o), 4) for o in values], seconds=round(float(np.median(seconds)), 1)))
        print('  ', rows[-1], flush=True)
    return rows

# --- least squares --------------------------------------------------------------------------------------------------
PEER = """
import json, sys, time
import numpy as np
from scipy.sparse import csr_matrix
from implicit.als import AlternatingLeastSquares
data = np.load(sys.argv[1])
x = csr_matrix((np.ones(len(data['users']), np.float32), (data['users'], data['items'])))
x.data[:] = 1
for name, use_cg in (('conjugate gradients', True), ('Cholesky', False)):
    for turns in json.loads(sys.argv[3]):
        model = AlternatingLeastSquares(int(sys.argv[2]), iterations=turns, num_threads=1, use_cg=use_cg,
                                        random_state=0)
        start = time.process_time()
        model.fit(x, show_progress=False)
        print(json.dumps([name, turns, time.process_time() - start]))
"""

def per_turn(seconds):
    "Seconds of a turn, from those of few and of more turns"
    few, more = TURNS
    return round((seconds[more] - seconds[few])/(more - few), 3)

def ours_per_turn(users, items):
    pairs = torch.unique(torch.from_numpy(np.stack([users, items], 1)) + 1, dim=0)
    shape = int(users.max()) + 2, int(items.max()) + 2
    data, model = Interactions(pairs, torch.ones(len(pairs)), *shape), iALS(*shape, FACTORS)
    seconds, start = {}, time.process_time()
    for turn in range(max(TURNS)):
        model.solve(data, turn)
        seconds[turn + 1] = time.process_time() - start
    return per_turn(seconds)

def peers_per_turn(python, users, items, folder):
    file = folder/'pairs.npz'
    np.savez(file, users=users, items=items)
    env = dict(OPENBLAS_NUM_THREADS='1', OMP_NUM_THREADS='1', MKL_NUM_THREADS='1')
    done = subprocess.run([python, '-c', PEER, file, str(FACTORS), json.dumps(TURNS)], capture_output=True, text=True,
                          env=env, check=True)
    found = {}
    for line in done.stdout.splitlines():
        name, turns, seconds = json.loads(line)
        found.setdefault(name, {})[turns] = seconds
    return {name: per_turn(o) for name, o in found.items()}

def least_squares(shape, python, folder):
    users, items = synthetic(*shape)
    seconds = dict(iALS=ours_per_turn(users, items))
    if python is not None:
        seconds |= {f'implicit, {o}': s for o, s in peers_per_turn(python, users, items, folder).items()}
        seconds['iALS again'] = ours_per_turn(users, items)
    rows = [dict(asked='turn', way=o, seconds=s) for o, s in seconds.items()]
    for o in rows: print('  ', o, flush=True)
    return rows

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--quick', action='store_true',
                   help='a small table, to see that it runs; writes to build/benchmarks')
    p.add_argument('--books', action='store_true', help='measure on Book-Crossing, too')
    p.add_argument('--peer', type=Path, help='a Python that has implicit')
    p.add_argument('--out', type=Path, help='folder for the JSON')
    args = p.parse_args()
    import tempfile
    from harness import about, save_table
    torch.set_num_threads(1)
    began = about('collab_large', 42, 1, 'processor', args.quick)
    shape = (500, 300, 5000) if args.quick else (100_000, 50_000, 1_000_000)
    with tempfile.TemporaryDirectory() as folder: solved = least_squares(shape, args.peer, Path(folder))
    found = epochs(*shape)
    films = movielens_100k()[['user', 'title', 'rating']].rename(columns=dict(title='item'))
    real = quality('MovieLens-100k', films.head(3000) if args.quick else films, 4, 1024, 1 if args.quick else 3)
    if args.books: real += quality('Book-Crossing', books(), 8, 2048, 3)
    shape = dict(zip(('users', 'items', 'rows'), shape))
    save_table(dict(name='collab_large', title='Many items', about=began, shape=shape,
                    factors=FACTORS, rows=solved + found + real,
                    question='What do a sample of the items and a turn of least squares save and cost?'), args.out)

if __name__ == '__main__': main()
