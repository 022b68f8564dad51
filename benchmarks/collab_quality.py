"""How well the models of collab_deep foresee and rank MovieLens-100k, beside the targets set before they were written.

Settings were chosen on an inner split: a tenth of the training rows, the validation rows never looked at. Then every
model is trained from five seeds on all training rows. A target that is missed is reported as missed.
"""
import argparse
import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from fastai.torch_core import set_seed
from harness import about, digits, save_table
from sklearn.model_selection import KFold

from collab_deep.data.movielens import movielens_100k
from collab_deep.models.ensemble import Ensemble
from collab_deep.lists.evaluate import evaluate_ranking
from collab_deep.train.learner import collab_deep_learner
from collab_deep.data.loaders import RatingsDataLoaders
from collab_deep.data.splits import LeaveLastSplitter, split_rows

STARS = (0, 5.5)
SEEDS = range(5)
# chosen on the inner split
FACTOR = dict(bs=1024, epochs=10, model='factor', n_factors=50, y_range=STARS, lr=1.5e-2, wd=2.)
RANKING = dict(bs=4096, epochs=20, loss='softmax', n_factors=64, lr=1.5e-2, wd=1.)

# --- data -----------------------------------------------------------------------------------------------------------
def features():
    "What is known of users and films"
    users = movielens_100k('users').set_index('user')[['age', 'gender', 'occupation']]
    films = movielens_100k('items').drop_duplicates('title').set_index('title')[['year', 'genres']]
    return dict(user_features=users, item_features=films)

def last_of_each(ratings):
    "The last rating of each user, without that title in the user's training rows (two films can share one)"
    train,last = LeaveLastSplitter()(ratings)
    pair = pd.MultiIndex.from_frame(ratings[['user', 'title']])
    return train[~pair[train].isin(pair[last])],last

# --- training -------------------------------------------------------------------------------------------------------
def fit(ratings, splits, seed, bs, epochs, **kwargs):
    "A trained learner, and the processor seconds of its training"
    dls = RatingsDataLoaders.from_df(ratings, item_name='title', duplicates='keep',
                                     splits=splits, bs=bs, device='cpu')
    start = time.process_time()
    set_seed(seed)
    learn = collab_deep_learner(dls, **kwargs)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs)
    return learn,time.process_time() - start

def mse(model, dls):
    "Mean squared error on the validation ratings, ids that training lacks included"
    x,y = dls.ratings_of('valid')
    with torch.no_grad(): return F.mse_loss(model.eval()(x), y).item()

def several(ratings, splits, seeds, measure, **kwargs):
    "`measure(learner)` and seconds for each seed, and the models"
    rows,models = [],[]
    for seed in seeds:
        learn,seconds = fit(ratings, splits, seed, **kwargs)
        rows.append(dict(measure(learn), seconds=seconds))
        models.append(learn)
        print(f'  seed {seed}', {k: round(v, 4) for k,v in rows[-1].items()}, flush=True)
    return rows,models

# --- rows of the table ----------------------------------------------------------------------------------------------
def row(name, measure, values, target, at_most=True, **more):
    "One line of the result: the mean over seeds against its target"
    mean = float(np.mean(values))
    sd = digits(float(np.std(values, ddof=1))) if len(values) > 1 else None
    met = mean <= target if at_most else mean >= target
    return dict(name=name, measure=measure, mean=digits(mean), sd=sd, target=target, at_most=at_most, met=bool(met),
                values=[digits(v) for v in values], **more)

def rating_rows(ratings, seeds):
    splits = partial(split_rows, seed=42)
    def score(learn): return dict(mse=mse(learn.model, learn.dls))
    models = {'DotProductBias': (dict(bs=512, epochs=5, n_factors=50, y_range=STARS), .812),
              'EmbeddingNN': (dict(bs=512, epochs=5, use_nn=True, layers=[100, 50], y_range=STARS), .850),
              'FactorModel': (dict(FACTOR, config=features()), .762)}
    for name,(kwargs,target) in models.items():
        print(name, flush=True)
        rows,learners = several(ratings, splits, seeds, score, **kwargs)
        yield row(name, 'MSE', [o['mse'] for o in rows], target)
        if name == 'FactorModel': yield row(name, 'processor seconds', [o['seconds'] for o in rows], 15)
    ensemble = Ensemble.of([o.model for o in learners])
    yield row(f'{len(learners)} of FactorModel', 'MSE', [mse(ensemble, learners[0].dls)], .757)

def fold_row(ratings, n=5):
    "5-fold RMSE of the single model; squared errors of all folds, then the root"
    print('5 folds', flush=True)
    def score(learn): return dict(mse=mse(learn.model, learn.dls))
    errors = []
    for fold in list(KFold(5, shuffle=True, random_state=0).split(ratings))[:n]:
        rows,_ = several(ratings, fold, [0], score, **FACTOR, config=features())
        errors.append(math.sqrt(rows[0]['mse']))
    return row('FactorModel', f'RMSE, {n} folds', errors, .876)

def ranking_rows(ratings, seeds):
    ways = {'A': (partial(split_rows, seed=42), 4, dict(recall=.27, ndcg=.34)),
            'B': (last_of_each, None, dict(recall=.14))}
    for way,(splits,threshold,targets) in ways.items():
        print(f'ranking {way}', flush=True)
        def score(learn): return evaluate_ranking(learn, 10, threshold).value[['recall', 'ndcg']].to_dict()
        rows,learners = several(ratings, splits, seeds, score, **RANKING)
        popular = evaluate_ranking(learners[0], 10, threshold).popularity
        for measure,target in targets.items():
            values = [o[measure] for o in rows]
            yield row('DotProductBias, softmax', f'{measure}@10, {way}', values, target, at_most=False,
                      popularity=digits(popular[measure]))

def main(argv=None):
    p = argparse.ArgumentParser(prog='collab_quality.py', description='Are the models as good as they should be?')
    p.add_argument('--quick', action='store_true',
                   help='one seed and few ratings, to see that it runs; writes to build/benchmarks')
    p.add_argument('--out', type=Path, help='folder for the JSON')
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    began = about('collab_quality', 0, 1, 'processor', args.quick)
    ratings,seeds = movielens_100k(),SEEDS
    if args.quick:
        ratings,seeds = ratings.sample(2000, random_state=0),range(1)
        FACTOR['epochs'] = RANKING['epochs'] = 1
    began['seeds'] = dict(training=', '.join(map(str, seeds)), split=42)
    rows = [*rating_rows(ratings, seeds), fold_row(ratings, 1 if args.quick else 5), *ranking_rows(ratings, seeds)]
    save_table(dict(name='collab_quality', title='Quality of recommendations', about=began, rows=rows,
                    question='Are the models as good as they should be?'), args.out)
    for o in rows:
        verdict = 'met   ' if o['met'] else 'MISSED'
        print(f'{verdict} {o["name"]}, {o["measure"]}: {o["mean"]} (target {o["target"]})')

if __name__ == '__main__': main()
