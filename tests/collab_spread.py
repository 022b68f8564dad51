"Recommenders that are trained in several processes and in one, in float64, and how far apart they end"
from functools import partial

import numpy as np
import pandas as pd
import torch
from fastai.basics import Adam, Learner, SGD
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.metrics import mae
from fastai.tabular.core import TabDataLoader
from torch import nn

from collab_deep.data.loaders import RatingsDataLoaders
from collab_deep.lists.evaluate import evaluate_ranking
from collab_deep.lists.recommend import predict_pairs, recommend
from collab_deep.models.dot import DotProduct, DotProductBias
from collab_deep.models.ensemble import Ensemble
from collab_deep.models.factor import factor_model
from collab_deep.models.nn import EmbeddingNN
from collab_deep.train.learner import collab_deep_learner
from collab_deep.train.losses import BPRLoss
from collab_deep.train.stopping import RankingMetric
from paddy_multi.distributed.across import across_processes
from paddy_multi.distributed.ranks import join_processes
from spread import SeenLosses, alone, compare, quietly, seed


def ratings(n=300, seed=0):
    "Synthetic ratings of 23 users and 31 items, some pairs twice"
    g = np.random.default_rng(seed)
    return pd.DataFrame(dict(user=g.integers(0, 23, n), item=g.integers(100, 131, n), rating=g.integers(1, 6, n)*1.))


def features(n, first=0):
    g = np.random.default_rng(n)
    return pd.DataFrame(dict(age=g.normal(size=n), genre=g.choice(['a', 'b', 'a|b'], n)), index=range(first, first+n))


def loaders(bs, n=300, implicit=False):
    df = ratings(n)
    dls = RatingsDataLoaders.from_df(df, seed=1, bs=bs, val_bs=bs, implicit=implicit, device='cpu')
    for dl in dls.loaders: dl.dataset.y = dl.dataset.y.double()
    return dls


class Even(BPRLoss):
    "BPR whose negatives follow from the pair taken, so that several processes and one have the same"
    name = None
    def callbacks(self, dls):
        def draw(users, gen): return (users*7 + torch.arange(len(users))//(len(users)//self.n)*5) % (dls.n_items-1) + 1
        bpr, first = super().callbacks(dls)
        bpr.sampler = draw
        return [bpr, first]


STARS = (0, 5.5)
MODELS = dict(
    dot=lambda d: DotProduct(d.n_users, d.n_items, 4, STARS, std=.3),
    bias=lambda d: DotProductBias(d.n_users, d.n_items, 4, STARS, std=.3),
    free=lambda d: DotProductBias(d.n_users, d.n_items, 4, std=.3),
    nn=lambda d: EmbeddingNN(d.n_users, d.n_items, 4, [6], STARS, use_bn=False, std=.3),
    factor=lambda d: factor_model(d, 4, STARS),
    features=lambda d: factor_model(d, 4, STARS, user_features=features(23), item_features=features(31, 100)),
    ensemble=lambda d: Ensemble.of([MODELS['bias'](d), MODELS['nn'](d)]))

# What each case changes: by default squared error with the usual optimizer, and batches that differ in size
CASES = dict(
    dot=dict(model='dot'), bias=dict(model='bias'), nn=dict(model='nn'), factor=dict(model='factor'),
    features=dict(model='features'), ensemble=dict(model='ensemble'),
    uneven=dict(model='bias', n=81), huber=dict(model='bias', loss=lambda: nn.HuberLoss(delta=.5)),
    sgd=dict(model='nn', opt_func=partial(SGD, mom=.9)), adam=dict(model='bias', opt_func=Adam),
    bpr=dict(model='free', loss=Even, implicit=True), bpr3=dict(model='free', loss=partial(Even, n=3), implicit=True),
    softmax=dict(model='free', loss=lambda: 'softmax', implicit=True))


def learner(bs, model='bias', n=300, loss=lambda: 'mse', implicit=False, prepare=lambda model: model, **kwargs):
    "A learner of synthetic ratings in float64"
    seed(3)
    dls = loaders(bs, n, implicit)
    made = MODELS[model](dls).double()
    learn = collab_deep_learner(dls, model=made, loss=loss(), lr=.05, wd=.01, cbs=SeenLosses(), **kwargs)
    prepare(learn.model)
    seed(4)
    return learn


def fastais(bs, weighted):
    "fastai's own learner, whose loader draws rows with replacement unless it is given another"
    seed(3)
    more = {} if weighted else dict(dl_type=TabDataLoader)
    dls = CollabDataLoaders.from_df(ratings(), seed=1, bs=bs, device='cpu', **more)
    learn = collab_learner(dls, n_factors=4, y_range=STARS, cbs=SeenLosses())
    learn.model.double()
    seed(4)
    return learn


def fit(learn): learn.fit_one_cycle(3, .05)


def one_and_all(make):
    "Learners with the same batches: of this process among all, and alone"
    n = join_processes(60).world_size
    ours, one = make(8), make(8*n)
    seed(5)
    return ours, one


MAKE = {name: partial(learner, **case) for name, case in CASES.items()}
MAKE |= dict(fastais=partial(fastais, weighted=False), fastais_weighted=partial(fastais, weighted=True))


def run_cases(names):
    "What `compare` finds, by name of the case, and what calls give"
    return dict(cases={name: compare_seeded(MAKE[name]) for name in names}, calls=run_calls())


def compare_seeded(make):
    "What `compare` finds where both draw the same numbers"
    ours, one = one_and_all(make)
    def seeded(learn):
        seed(6)
        fit(learn)
    return compare(ours, one, seeded)


# --- the same calls -------------------------------------------------------------------------------------------------
def calls_of(learn):
    "What a learner gives, as plain values"
    seed(7)
    df = ratings(40, seed=8)
    preds, targs = learn.get_preds()
    values = [float(o) for o in learn.validate()]
    return dict(preds=preds.tolist(), targs=targs.tolist(), validated=values,
                one=float(learn.get_preds(dl=learn.dls.test_dl(df[:1]))[0]),
                pairs=predict_pairs(learn, df).tolist(), lists=recommend(learn, [3, 4], 5).to_dict('list'),
                measured=evaluate_ranking(learn, 5).value.tolist(), new=recommend(learn, {101: 5., 104: 2.}).item.tolist())


def run_calls():
    "Calls beside training, in all processes and in one; and an order that each process makes for itself"
    make = partial(learner, model='bias', metrics=[RankingMetric('ndcg', 5), mae])
    ours, one = one_and_all(make)
    with alone(): expected = calls_of(one)
    with across_processes(ours) as learn: found = quietly(learn, calls_of)
    other = learner(8)
    other.dls.train.dataset.y = other.dls.train.dataset.y + join_processes(60).rank
    try:
        with across_processes(other) as learn: quietly(learn, fit)
    except ValueError as e: return dict(found=found, expected=expected, refused=str(e))
