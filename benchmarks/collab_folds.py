"""The five folds of MovieLens-100k that its authors published (u1 to u5), beside results published for the first.

The folds are files of the original archive, so this asks for them: --folds FOLDER with u1.test to u5.test. Settings are
those of collab_quality, chosen on training rows of another split, some of which are test rows of these folds. Each fold
is trained from five seeds; their mean is the sixth model.
"""
import argparse
import math
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from collab_quality import FACTOR, features, fit
from fastai.data.external import URLs, untar_data
from harness import about, digits, save_table

from collab_deep.data.movielens import movielens_100k
from collab_deep.models.ensemble import Ensemble

FOLDS,SEEDS = range(1, 6),range(5)
PUBLISHED = [dict(name='GHRS (Darban and Valipour 2022)', rmse=.887),
             dict(name='GLocal-K (Han et al. 2021)', rmse=.889)]

def fold(ratings, folder, n):
    "Rows of training and of test in fold `n`"
    test = pd.read_csv(folder/f'u{n}.test', sep='\t', header=None, names=['user', 'item', 'rating', 'timestamp'])
    held = pd.MultiIndex.from_frame(ratings[['user', 'item']]).isin(pd.MultiIndex.from_frame(test[['user', 'item']]))
    if held.sum() != len(test): raise ValueError(f'fold {n} has {len(test)} rows, {held.sum()} are in the ratings')
    return np.flatnonzero(~held),np.flatnonzero(held)

def rmse(model, dls, low=1, high=5):
    "Root mean squared error; a prediction beyond the scale is taken for its end"
    x,y = dls.ratings_of('valid')
    with torch.no_grad(): return math.sqrt((model.eval()(x).clamp(low, high).double() - y).square().mean())

def measured(ratings, folder, n, seeds):
    "RMSE of a fold: of each seed, and of the mean of all"
    splits,models,singles,start = fold(ratings, folder, n),[],[],time.process_time()
    for seed in seeds:
        learn,_ = fit(ratings, splits, seed, **FACTOR, config=features())
        models.append(learn.model)
        singles.append(rmse(learn.model, learn.dls))
    together = rmse(Ensemble.of(models), learn.dls)
    print(f'u{n}: {np.mean(singles):.4f}, of {len(models)} together {together:.4f}', flush=True)
    return dict(fold=f'u{n}', test_users=int(ratings.user.iloc[splits[1]].nunique()),
                single=digits(float(np.mean(singles))), singles=[digits(o) for o in singles],
                ensemble=digits(together), seconds=digits(time.process_time() - start, 3))

def main(argv=None):
    p = argparse.ArgumentParser(prog='collab_folds.py', description='How far are we off on the published folds?')
    p.add_argument('--folds', type=Path, help='folder with u1.test to u5.test; downloaded if not given')
    p.add_argument('--quick', action='store_true', help='one seed, one epoch, one fold; writes to build/benchmarks')
    p.add_argument('--out', type=Path, help='folder for the JSON')
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    folder = args.folds or untar_data(URLs.ML_100k)
    began = about('collab_folds', 0, 1, 'processor', args.quick)
    seeds,folds = (range(1), [1]) if args.quick else (SEEDS, FOLDS)
    if args.quick: FACTOR['epochs'] = 1
    began['seeds'] = dict(training=', '.join(map(str, seeds)))
    rows = [measured(movielens_100k(), folder, n, seeds) for n in folds]
    mean = {o: digits(float(np.mean([row[o] for row in rows]))) for o in ('single', 'ensemble')}
    save_table(dict(name='collab_folds', title='Published folds of MovieLens-100k', about=began, goal=dict(u1=.88),
                    published=PUBLISHED, rows=rows, mean=mean,
                    question='How far are predictions off on the published folds?'), args.out)
    print('mean of the folds', mean)

if __name__ == '__main__': main()
