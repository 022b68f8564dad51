"""How long `DotProductBias` takes for the quality of five epochs: fastai's learner, ours, and `fit_fast`, in turn.

fastai's default loader draws rows with replacement since March 2024; `dl_type=TabDataLoader` gives it every row once an
epoch, and with that the quality it was published with.
"""
import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.tabular.data import TabDataLoader
from fastai.torch_core import set_seed
from harness import about, digits, save_table

from collab_deep.data.loaders import RatingsDataLoaders
from collab_deep.data.movielens import movielens_100k
from collab_deep.train.fast import fit_fast
from collab_deep.train.learner import collab_deep_learner

STARS,SPLIT = (0, 5.5),42

def ratings_and_split(quick):
    "Ratings, and loaders of ours whose split fastai's are given, too"
    ratings = movielens_100k()[['user', 'title', 'rating']]
    if quick: ratings = ratings.sample(3000, random_state=0)
    return ratings,RatingsDataLoaders.from_df(ratings, item_name='title', duplicates='keep', seed=SPLIT, bs=512,
                                              device='cpu')

def by_fastai(ratings, seed, epochs):
    dls = CollabDataLoaders.from_df(ratings, item_name='title', seed=SPLIT, bs=64, dl_type=TabDataLoader, device='cpu')
    set_seed(seed)
    learn = collab_learner(dls, n_factors=50, y_range=STARS)
    with learn.no_bar(), learn.no_logging():
        start = time.process_time()
        learn.fit_one_cycle(epochs, 5e-3, wd=.1)
        return time.process_time() - start,learn.recorder.values[-1][1]

def by_learner(dls, seed, epochs):
    set_seed(seed)
    learn = collab_deep_learner(dls, y_range=STARS)
    with learn.no_bar(), learn.no_logging():
        start = time.process_time()
        learn.fit_one_cycle(epochs)
        return time.process_time() - start,learn.recorder.values[-1][1]

def by_hand(dls, seed, epochs):
    start = time.process_time()
    learn = fit_fast(dls, y_range=STARS, epochs=epochs, seed=seed)
    seconds = time.process_time() - start
    x,y = dls.ratings_of('valid')
    with torch.no_grad(): return seconds,F.mse_loss(learn.model.eval()(x), y).item()

def main(argv=None):
    p = argparse.ArgumentParser(prog='collab_fast.py', description='How fast is the quality of five epochs reached?')
    p.add_argument('--quick', action='store_true', help='one seed, one epoch, few rows; writes to build/benchmarks')
    p.add_argument('--out', type=Path, help='folder for the JSON')
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    began = about('collab_fast', 0, 1, 'processor', args.quick)
    ratings,dls = ratings_and_split(args.quick)
    seeds,epochs = (range(1), 1) if args.quick else (range(3), 5)
    began['seeds'] = dict(training=', '.join(map(str, seeds)), split=SPLIT)
    fit_fast(dls, epochs=1)  # what the first call loads is not measured
    found = {name: [] for name in ('fastai', 'learner', 'fit_fast')}
    for seed in seeds:
        found['fastai'].append(by_fastai(ratings, seed, epochs))
        found['learner'].append(by_learner(dls, seed, epochs))
        fast = [by_hand(dls, seed, epochs) for _ in range(3)]  # beside a run a hundred times as long
        found['fit_fast'].append((float(np.median([o[0] for o in fast])), fast[0][1]))
        print({name: [round(o, 4) for o in runs[-1]] for name,runs in found.items()}, flush=True)
    rows = [dict(name=name, mse=digits(float(np.mean([o[1] for o in runs]))), mses=[digits(o[1]) for o in runs],
                 seconds=[digits(o[0], 3) for o in runs],
                 times_faster=[digits(first[0]/o[0], 3) for first,o in zip(found['fastai'], runs)])
            for name,runs in found.items()]
    save_table(dict(name='collab_fast', title='Quality of five epochs', about=began, goal=dict(times_faster=80),
                    rows=rows,
                    question='How fast is the quality of five epochs reached?'), args.out)
    for o in rows: print(o['name'], 'MSE', o['mse'], 'seconds', o['seconds'], 'times faster', o['times_faster'])

if __name__ == '__main__': main()
