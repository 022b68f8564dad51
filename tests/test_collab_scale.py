"Ratings in any unit and without a range: the same model, better than the constant mean, through all that a model lives"
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from collab_deep.all import *
from collab_deep.models.base import CollabModel
from collab_deep.train.fit import fit_model

UNITS = {'stars': (1, 0), 'times 20': (20, 0), 'plus 1000': (1, 1000), 'a tenth, below 0': (.1, -7)}

def stars():
    "Synthetic stars of 60 users for 25 items: generous users, good items, two tastes, and chance"
    rng = np.random.default_rng(0)
    u,i = (o.ravel() for o in np.meshgrid(np.arange(60), np.arange(25), indexing='ij'))
    kept = rng.random(len(u)) < .5
    u,i = u[kept],i[kept]
    taste = np.where(u%2 == i%2, .6, -.6)
    y = 3 + rng.normal(0, .5, 60)[u] + rng.normal(0, .5, 25)[i] + taste + rng.normal(0, .3, len(u))
    return pd.DataFrame(dict(user=u, item=i, rating=y.clip(1, 5).round(2)))

def loaders(unit='stars', **kwargs):
    by,plus = UNITS[unit]
    df = stars()
    df['rating'] = df.rating*by + plus
    return RatingsDataLoaders.from_df(df, seed=1, bs=64, device='cpu', **kwargs)

def predicted(learn, dls=None):
    x,y = (dls or learn.dls).ratings_of('valid')
    with torch.no_grad():
        return learn.model.eval()(x.to(next(learn.model.parameters()).device)).double().cpu(),y.double()

def mse(learn):
    p,y = predicted(learn)
    return ((p - y)**2).mean().item()

# --- the unit -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('model', ['dot', 'nn', 'factor'])
def test_better_than_the_mean_in_any_unit_and_the_same_in_all(model):
    found = {}
    for unit,(by,plus) in UNITS.items():
        dls = loaders(unit)
        learn = fit_model(dls, model, epochs=8)
        p,y = predicted(learn)
        assert mse(learn) < .8*((y - dls.mean)**2).mean(), (model, unit, mse(learn))
        found[unit] = (p - plus)/by
        assert learn.model.y_range is None
        y = dls.ratings_of('train')[1].double()
        assert np.allclose(learn.model.y_scale, (y.mean(), y.std(correction=0)))
    for unit,p in found.items():
        assert (p - found['stars']).abs().max() < (.05 if model == 'nn' else .02), (model, unit)  # ReLU has corners

def test_the_steps_are_those_of_standard_ratings():
    "Three steps of the optimizer on ratings times 20, against the same on ratings of mean 0 and deviation 1"
    def weights(unit):
        dls = loaders(unit)
        torch.manual_seed(0)
        learn = collab_deep_learner(dls, 4, wd=.1)
        opt = learn.opt_func(learn.model.parameters(), lr=.01)
        for _ in range(3):
            x,y = dls.ratings_of('train')
            F.mse_loss(learn.model(x[:64]), y[:64]).backward()
            opt.step()
            opt.zero_grad()
        return torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    assert torch.allclose(weights('stars'), weights('times 20'), atol=1e-6)

def test_reported_losses_are_in_the_unit_of_the_ratings():
    learn = fit_model(loaders('times 20'), 'dot', epochs=2)
    with learn.no_bar(), learn.no_logging(): valid = learn.validate()[0]
    assert np.isclose(valid, mse(learn), rtol=1e-5)
    value = evaluate_ratings(learn).value
    assert np.isclose(value['mse'], mse(learn), rtol=1e-5)

def test_ratings_that_are_all_equal():
    df = stars().assign(rating=70)
    learn = collab_deep_learner(RatingsDataLoaders.from_df(df, seed=1, device='cpu'), loss='mse')
    assert learn.model.y_scale == (70., 1.)

# --- who has a scale ------------------------------------------------------------------------------------------------
def test_a_range_is_what_it_was():
    dls = loaders()
    assert collab_deep_learner(dls, y_range=(0, 5.5)).model.y_scale is None
    assert collab_deep_learner(dls, loss='softmax').model.y_scale is None
    assert collab_deep_learner(dls, loss='bpr').model.y_scale is None
    assert DotProductBias(4, 5, 3).y_scale is None
    x = torch.tensor([[1, 2], [3, 4]])
    torch.manual_seed(0)
    ranged = DotProductBias(4, 5, 3, (0, 5.5), 1.)
    torch.manual_seed(0)
    bare = DotProductBias(4, 5, 3, std=1.)
    assert torch.equal(ranged(x), torch.sigmoid(bare(x))*5.5)
    torch.manual_seed(0)
    assert torch.equal(DotProductBias(4, 5, 3, std=1., y_scale=(3, 2))(x), bare(x)*2 + 3)

@pytest.mark.parametrize('make', [DotProduct, DotProductBias, EmbeddingNN, FactorModel])
def test_a_scale_that_makes_no_sense_is_refused(make):
    for bad in ((3, 0), (3, -1), (float('nan'), 1), (3,), 'ab'):
        with pytest.raises(ValueError, match='y_scale is the mean and the standard deviation of the ratings'):
            make(4, 5, y_scale=bad)
    with pytest.raises(ValueError, match=r'give one of them, found \(0.0, 5.0\) and \(3.0, 1.0\)'):
        make(4, 5, y_range=(0, 5), y_scale=(3, 1))

def test_a_model_of_ones_own_without_a_scale_trains_as_before():
    class Plain(CollabModel):
        def __init__(self, n_users, n_items, y_range=None):
            super().__init__(n_users, n_items, y_range)
            self.of_items = torch.nn.Embedding(n_items, 1)
        def forward(self, x): return self.in_units(self.of_items(x[:,1])[:,0])
        def user_rows(self, users): return torch.zeros(len(users), 0)
        def scores_of(self, rows): return self.in_units(self.of_items.weight[:,0]).expand(len(rows), -1)
    try:
        dls = loaders()
        learn = collab_deep_learner(dls, model=Plain(dls.n_users, dls.n_items))
        assert learn.model.y_scale is None and 'y_scale' not in learn.model.settings
        learn.model.check_settings()
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1)
    finally: del CollabModel.registry['Plain']

# --- what a model lives through -------------------------------------------------------------------------------------
@pytest.mark.parametrize('model', ['dot', 'nn', 'factor'])
def test_saved_and_loaded(model, tmp_path):
    learn = fit_model(loaders('times 20'), model, epochs=1)
    save_recommender(learn, tmp_path/'rec')
    rec = load_recommender(tmp_path/'rec')
    assert rec.model.y_scale == learn.model.y_scale
    pd.testing.assert_frame_equal(recommend(rec, 3), recommend(learn, 3))

def test_a_saved_recommender_of_before_has_none(tmp_path):
    "Settings without the new argument build the model that they built"
    settings = dict(n_users=4, n_items=5, y_range=None, n_factors=3, std=.01)
    assert DotProductBias(**settings).y_scale is None

def test_newcomers_do_not_depend_on_the_unit():
    found = {}
    for unit in ('stars', 'times 20'):
        by,plus = UNITS[unit]
        learn = fit_model(loaders(unit), 'dot', epochs=8)
        likes = {i: (5. if i%2 else 1.)*by + plus for i in range(10)}
        found[unit] = recommend(learn, likes, k=5)
    assert found['stars'].item.tolist() == found['times 20'].item.tolist()
    assert np.allclose(found['stars'].score*20, found['times 20'].score, rtol=1e-2)

def test_parts_of_a_score_are_in_the_unit_of_the_ratings():
    learn = fit_model(loaders('times 20'), 'dot', epochs=3)
    value = explain(learn, 3, 4).value
    assert list(value.index) == ['mean', 'user bias', 'item bias', 'match', 'sum', 'score']
    assert np.isclose(value['mean'], learn.dls.mean) and np.isclose(value['score'], predict_pairs(learn, 3, 4),
                                                                    rtol=1e-5)
    assert np.isclose(value[['mean', 'user bias', 'item bias', 'match']].sum(), value['score'], rtol=1e-5)
    bias = item_bias(learn).set_index('item').bias
    assert np.isclose(bias[4], value['item bias'], rtol=1e-5)

def test_an_ensemble_has_the_scale_of_its_members():
    learn = collab_ensemble(loaders('times 20'), 2, n=2)
    assert learn.model.y_scale == learn.model.members[0].y_scale
    p,_ = predicted(learn)
    with torch.no_grad(): each = [m.eval()(learn.dls.ratings_of('valid')[0]).double() for m in learn.model.members]
    assert torch.allclose(p, torch.stack(each).mean(0), rtol=1e-5)

def test_a_model_that_goes_on_keeps_its_scale():
    learn = fit_model(loaders(), 'dot', epochs=3)
    new = pd.DataFrame(dict(user=[1, 200], item=[1, 2], rating=[5., 4.]))
    later = partial_fit(learn, new)
    assert later.model.y_scale == learn.model.y_scale
    start = collab_deep_learner(loaders('stars', valid_pct=.3), model=learn)
    assert start.model.y_scale == learn.model.y_scale
