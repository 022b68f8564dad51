"Recommenders that are trained in several processes and in one, in float64, and how far apart they end"
from functools import partial

import numpy as np
import pandas as pd
import torch
from fastai.basics import Adam, Callback, SGD
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
from collab_deep.models.sharded import shard_tables
from collab_deep.train.learner import collab_deep_learner
from collab_deep.train.losses import BPRLoss
from collab_deep.train.stopping import RankingMetric
from collab_deep.use.explain import explain, item_bias, similar_items
from collab_deep.use.save import load_recommender, save_recommender
from paddy_multi.distributed.across import across_processes
from paddy_multi.distributed.checkpoints import load_sharded, save_sharded
from paddy_multi.distributed.ranks import join_processes
from spread import SeenLosses, alone, compare, quietly, seed


def ratings(n=300, seed=0):
    "Synthetic ratings of 23 users and 31 items, some pairs twice"
    g = np.random.default_rng(seed)
    return pd.DataFrame(dict(user=g.integers(0, 23, n), item=g.integers(100, 131, n), rating=g.integers(1, 6, n)*1.))


def features(n, first=0):
    g = np.random.default_rng(n)
    return pd.DataFrame(dict(age=g.normal(size=n), genre=g.choice(['a', 'b', 'a|b'], n)), index=range(first, first+n))


def loaders(bs, n=300, implicit=False, weight_name=None):
    df = ratings(n)
    if weight_name: df[weight_name] = np.random.default_rng(7).integers(0, 4, n)*1.
    splits = None if n > 100 else lambda df: (range(n-1), [n-1])  # a process has no row to validate
    dls = RatingsDataLoaders.from_df(df, seed=1, splits=splits, bs=bs, val_bs=bs, implicit=implicit, device='cpu',
                                     weight_name=weight_name)
    for dl in dls.loaders: dl.dataset.y = dl.dataset.y.double()
    return dls


class Even(BPRLoss):
    "BPR whose negatives of training too follow from the pair taken, so that several processes and one have the same"
    name = None
    def callbacks(self, dls):
        bpr, first = super().callbacks(dls)
        def draw(users, source):
            if source is not None: return fixed(users, source)
            return (users*7 + torch.arange(len(users))//(len(users)//self.n)*5) % (dls.n_items-1) + 1
        fixed,bpr.sampler = bpr.sampler,draw
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
    softmax=dict(model='free', loss=lambda: 'softmax', implicit=True),
    softmax_stars=dict(model='free', loss=lambda: 'softmax'),
    bpr_stars=dict(model='free', loss=partial(Even, n=2)), counted=dict(model='bias', weight_name='times'))


def learner(bs, model='bias', n=300, loss=lambda: 'mse', implicit=False, weight_name=None,
            prepare=lambda model: model, **kwargs):
    "A learner of synthetic ratings in float64"
    seed(3)
    dls = loaders(bs, n, implicit, weight_name)
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
                measured=evaluate_ranking(learn, 5).value.tolist(),
                new=recommend(learn, {101: 5., 104: 2.}).item.tolist())


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


def validate_few():
    "Four rows to validate, one in each of three processes: the last has none in both batches, of two rows each"
    def make(bs):
        splits = lambda df: (range(80), range(80, 84))
        dls = RatingsDataLoaders.from_df(ratings(84), seed=1, splits=splits, bs=bs, val_bs=bs, device='cpu')
        return collab_deep_learner(dls, model=MODELS['bias'](dls), lr=.05, metrics=mae)
    seed(3)
    ours, one = make(1), make(3)
    one.model.load_state_dict(ours.model.state_dict())
    with across_processes(ours) as learn: found = [*learn.validate()]
    with alone(): return dict(found=found, expected=[*one.validate()])


# --- tables in parts ------------------------------------------------------------------------------------------------
IN_PARTS = 'bias dot nn uneven sgd adam bpr softmax'.split()


def whole(model):
    "All numbers of a model, in every process"
    return {name: o.full_tensor() if hasattr(o, 'full_tensor') else o for name, o in model.state_dict().items()}


def compare_parts(name):
    "How far apart a learner with tables in parts and one in one process end, and what each process keeps"
    ours, one = one_and_all(MAKE[name])
    start = {k: o.clone() for k, o in one.model.state_dict().items()}
    seed(6)
    with alone(): quietly(one, fit)
    shard_tables(ours)
    with across_processes(ours) as learn:
        seed(6)
        quietly(learn, fit)
        expected, found = one.model.state_dict(), whole(ours.model)
    rows = [(float(u), float(v)) for p, q in zip(ours.recorder.values, one.recorder.values) for u, v in zip(p, q)]
    tables = [p for p in ours.model.parameters() if hasattr(p, 'device_mesh')]
    states = [o for p in tables for o in state_of(ours, p) if o.numel() > 1]
    return ours, one, dict(
        apart=max(float((found[k]-o).norm()/(o-start[k]).norm()) for k, o in expected.items()),
        same_names=[*found] == [*expected], numbers=sum(o.sum().item() for o in found.values()),
        losses=max(abs(u-v) for u, v in zip(ours.seen_losses.seen, one.seen_losses.seen)),
        metrics=max(abs(u-v) for u, v in rows), rows=[(len(p), len(p.to_local())) for p in tables],
        states=[(o.shape[0], o.to_local().shape[0]) for o in states],
        bytes=sum(o.to_local().nbytes for o in [*tables, *states]))


def state_of(learn, p):
    "What the optimizer keeps of a parameter"
    opt = getattr(learn.opt, 'opt', learn.opt)
    return [o for o in opt.state[p].values() if torch.is_tensor(o)]


def refusals(learn):
    "What a learner with tables in parts says to what it cannot do"
    def said(f):
        try: f()
        except (ValueError, TypeError) as e: return str(e)
    return dict(explain=said(lambda: explain(learn, 3, 104)), similar=said(lambda: similar_items(learn, 104)),
                bias=said(lambda: item_bias(learn)), new=said(lambda: recommend(learn, {104: 5.})),
                save=said(lambda: learn.save('x')), load=said(lambda: learn.load('x')),
                export=said(lambda: learn.export()),
                find=said(lambda: learn.lr_find()),
                others=said(lambda: recommend(learn, [3+join_processes(60).rank])),
                twice=said(lambda: shard_tables(learn)))


def uses(learn, folder):
    "What is made of a trained learner"
    df = ratings(40, seed=8)
    lists = recommend(learn, [3, 4, 5], 7)
    some = recommend(learn, 6, 40, exclude_seen=False, filter=lambda item: item % 2)
    return dict(lists=lists.item.tolist(), scores=lists.score.tolist(), some=some.item.tolist(),
                pairs=predict_pairs(learn, df).tolist(), measured=evaluate_ranking(learn, 5).value.tolist(),
                saved=read(save_recommender(learn, folder)))


def read(folder): return {k: o.tolist() for k, o in load_recommender(folder).model.state_dict().items()}


def ties(learn):
    "Lists of a model in which many items have one score"
    with torch.no_grad():
        for name, p in learn.model.named_parameters():
            p = p.to_local() if hasattr(p, 'to_local') else p
            p.fill_(0. if name.startswith('items') else 1.)
    return recommend(learn, [3, 4], 9).item.tolist()


def run_parts(names, folder):
    "Learners with tables in parts beside those of one process"
    rank, found = join_processes(60).rank, {}
    for name in names[::-1]: ours, one, found[name] = compare_parts(name)
    with alone(): expected = uses(one, folder/f'one_{rank}')
    with across_processes(ours) as learn:
        got, refused = uses(learn, folder/'parts'), refusals(learn)
        kept = resumed(learn, folder/'training')
    return dict(cases=found, got=got, expected=expected, refused=refused, resumed=kept,
                ties=(ties(ours), ties(one)))


def resumed(learn, folder):
    "Is training that was kept taken up by another learner in parts?"
    save_sharded(learn, folder)
    other = shard_tables(learner(8, prepare=lambda model: nn.init.zeros_(model.users.weight)))
    load_sharded(other, folder)
    same = [torch.equal(a.to_local(), b.to_local()) for a, b in zip(other.model.parameters(), learn.model.parameters())]
    moments = [torch.equal(a.to_local(), b.to_local())
               for p, q in zip(other.model.parameters(), learn.model.parameters())
               for a, b in zip(state_of(other, p), state_of(learn, q)) if a.numel() > 1]
    return same, moments


class FailsInOne(Callback):
    "Raises in process 1, in the second epoch"
    order = 40
    def __init__(self, where): setattr(self, where, self.fail)
    def fail(self):
        if self.training and self.epoch == 1 and join_processes(60).rank == 1: raise OSError('no more of this')


def fail_in_parts(where):
    learn = shard_tables(learner(8))
    learn.add_cb(FailsInOne(where))
    with across_processes(learn, timeout=60): quietly(learn, fit)


def run_solved():
    "Losses of each epoch and scores of learners that are solved, in this process among all and alone"
    def solved(name, among_all):
        seed(3)
        bs = 16 if among_all else 16*join_processes(60).world_size
        learn = collab_deep_learner(loaders(bs), model=name, metrics=RankingMetric('ndcg'))
        with across_processes(learn) if among_all else alone(), learn.no_bar(), learn.no_logging(): learn.fit(2)
        return learn.recorder.values[-1][1:],learn.model.scores(torch.arange(5)).tolist()
    return {name: [solved(name, among_all) for among_all in (True, False)] for name in ('ease', 'ials', 'blend')}
