"""Recommenders where fastai puts them: on a GPU if there is one, else on the CPU

Other tests of recommenders stay on the CPU. Here everything that is asked of one is asked on the device, and again of
the same weights on the CPU. `pytest --second-device tests/test_devices.py` asks without a GPU.
"""
import copy

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.torch_core import default_device

from collab_deep.data.loaders import RatingsDataLoaders
from collab_deep.lists.evaluate import evaluate_ranking, evaluate_ratings
from collab_deep.lists.fold_in import fold_in
from collab_deep.lists.recommend import predict_pairs, recommend
from collab_deep.lists.recommender import as_recommender
from collab_deep.train.ensemble import collab_ensemble
from collab_deep.train.learner import collab_deep_learner
from collab_deep.train.stopping import KeepBest
from collab_deep.use.explain import explain, item_bias, nearest_seen, similar_items
from collab_deep.use.save import load_recommender, save_recommender


@pytest.fixture(scope='module')
def df():
    "Ratings of 30 users and 20 items: synthetic"
    rng = np.random.default_rng(0)
    users, items = np.divmod(rng.permutation(600)[:400], 20)
    p, q = rng.normal(size=(30, 2)), rng.normal(size=(20, 2))
    return pd.DataFrame(dict(user=users, item=items, rating=np.clip(3 + (p[users]*q[items]).sum(1), 1, 5)))


def quietly(learn, epochs=2):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs)
    return learn


def loaders(df, **kwargs): return RatingsDataLoaders.from_df(df, seed=0, bs=32, **kwargs)


LEARNERS = {'dot': lambda df: collab_deep_learner(loaders(df), y_range=(0, 5.5)),
            'nn': lambda df: collab_deep_learner(loaders(df), use_nn=True, y_range=(0, 5.5)),
            'factor': lambda df: collab_deep_learner(loaders(df), model='factor'),
            'softmax': lambda df: collab_deep_learner(loaders(df[df.rating > 3], implicit=True), loss='softmax'),
            'bpr': lambda df: collab_deep_learner(loaders(df[df.rating > 3], implicit=True), loss='bpr')}


def on_the_cpu(rec):
    "The same recommender with its model on the CPU"
    res = copy.copy(rec)
    res.model = copy.deepcopy(rec.model).cpu()
    return res


def alike(a, b):
    "Tables of the same ids, with numbers that differ by rounding"
    pd.testing.assert_frame_equal(a.reset_index(drop=True), b.reset_index(drop=True), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('kind', LEARNERS)
def test_what_is_asked_of_a_recommender_is_the_same_on_both(df, kind, tmp_path):
    learn = quietly(LEARNERS[kind](df))
    assert {p.device.type for p in learn.model.parameters()} == {default_device().type} == {learn.dls.device.type}
    rec = as_recommender(learn)
    cpu, users = on_the_cpu(rec), list(rec.users[1:6])
    assert rec.device.type == default_device().type and cpu.device.type == 'cpu'
    ask = [lambda o: recommend(o, users, 5), lambda o: recommend(o, set(rec.items[1:4]), 5),
           lambda o: evaluate_ranking(o, 5, ratings=df[:50]), lambda o: nearest_seen(o, users[0], rec.items[3]),
           lambda o: similar_items(o, rec.items[2], k=4)]
    if not rec.ranks:
        ask += [lambda o: predict_pairs(o, df[:20]).to_frame(), lambda o: evaluate_ratings(o, df[:50]),
                lambda o: recommend(o, {rec.items[1]: 5., rec.items[2]: 1.}, 5)]
    if kind in ('dot', 'factor'): ask += [item_bias, lambda o: explain(o, users[0], rec.items[3])]
    for question in ask: alike(question(rec), question(cpu))
    torch.testing.assert_close(fold_in(rec, list(rec.items[1:4])).cpu(), fold_in(cpu, list(rec.items[1:4])))
    loaded = load_recommender(save_recommender(learn, tmp_path))
    alike(recommend(loaded, users, 5), recommend(cpu, users, 5))


def test_best_weights_and_ensembles_stay_on_the_device(df):
    learn = collab_deep_learner(loaders(df), y_range=(0, 5.5), cbs=KeepBest())
    quietly(learn)
    both = collab_ensemble(loaders(df), 1, n=2, y_range=(0, 5.5))
    for o in (learn, both):
        assert {p.device.type for p in o.model.parameters()} == {default_device().type}
        assert len(recommend(o, 3, 5)) == 5
        with o.no_bar(): assert torch.isfinite(o.get_preds()[0]).all()
