"Ratings count in every model of lists, and models that are solved do all that trained ones do"
import copy
import math
import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.learner import load_learner
from fastai.losses import MSELossFlat
from fastai.torch_core import set_seed
from hypothesis import given, settings, strategies as st
from torch.nn.functional import cross_entropy

from collab_deep.data.loaders import RatingsDataLoaders
from collab_deep.lists.evaluate import evaluate_ranking
from collab_deep.lists.fold_in import fold_in
from collab_deep.lists.recommend import frozen_recommender, predict_pairs, recommend
from collab_deep.lists.recommender import as_recommender
from collab_deep.models.blend import Blend
from collab_deep.models.ease import EASE
from collab_deep.models.ials import iALS
from collab_deep.models.liking import Interactions, liking_of
from collab_deep.train.choose import InnerSplit, chosen_reg
from collab_deep.train.ensemble import collab_ensemble
from collab_deep.train.fit import blend, fit_ease, fit_ials, fit_model
from collab_deep.train.learner import collab_deep_learner
from collab_deep.train.losses import BPRLoss, SoftmaxLoss
from collab_deep.train.solved import interactions_of
from collab_deep.train.stopping import KeepBest, RankingMetric
from collab_deep.use.explain import explain, nearest_seen, similar_items
from collab_deep.use.save import load_recommender, save_recommender

SOLVED = ['ease', 'ials', 'blend', 'auto']


def loaders(df, **kwargs):
    kwargs = dict(splits=(range(len(df)), [])) | kwargs if 'valid_pct' not in kwargs else kwargs
    return RatingsDataLoaders.from_df(df, 'user', 'item', bs=256, device='cpu', duplicates='keep', **kwargs)


def quiet(learn, epochs):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs)
    return learn


@pytest.fixture(scope='module')
def table():
    "40 users of two tastes and 24 items, made up: half of them liked by each taste, with some noise"
    rng = np.random.default_rng(0)
    rows = [(u, i, float(np.clip((4 if (u % 2) == (i % 2) else 2) + rng.integers(-1, 2), 1, 5)))
            for u in range(40) for i in rng.choice(24, 12, replace=False)]
    return pd.DataFrame(rows, columns=['user', 'item', 'rating'])


# --- ratings count --------------------------------------------------------------------------------------------------
def hated(n_good, n_seers=240):
    "One item that all of 240 saw and hated, and good ones that each of 300 loved 12 of; made up"
    rng = np.random.default_rng(0)
    rows = [(u, 'hated', 1.) for u in range(n_seers)]
    rows += [(u, f'good{i}', 5.) for u in range(300) for i in rng.choice(n_good, 12, replace=False)]
    return pd.DataFrame(rows, columns=['user', 'item', 'rating'])


def first_of_others(learn):
    return recommend(learn, list(range(240, 300)), 1)['item']


@pytest.mark.parametrize('n_good', [40, 400])
@pytest.mark.parametrize('name', [*SOLVED, 'softmax', 'bpr'])
def test_what_everybody_hated_never_leads(name, n_good):
    learn = fit_model(loaders(hated(n_good)), name, **({} if name in SOLVED else dict(epochs=10, n_factors=8)))
    assert not (first_of_others(learn) == 'hated').any()


@pytest.mark.parametrize('loss', [SoftmaxLoss(weights=None), BPRLoss(weights=None)])
def test_without_weights_it_leads(loss):
    "So that the test above can fail"
    set_seed(0)
    learn = quiet(collab_deep_learner(loaders(hated(400)), 8, loss=loss), 10)
    assert (first_of_others(learn) == 'hated').mean() > .2


def test_without_stars_it_leads_in_what_is_solved():
    assert (first_of_others(fit_ease(loaders(hated(400)), 50., strength=0)) == 'hated').mean() > .5


def lists_of(learn): return recommend(learn, list(range(5)), 4)['item'].tolist()


@pytest.mark.parametrize('name', ['ease', 'ials', 'blend', 'softmax', 'bpr'])
@pytest.mark.parametrize('change', [lambda r: 20*r, lambda r: r - 10, lambda r: .01*r + 3])
def test_lists_do_not_depend_on_the_scale_of_ratings(table, name, change):
    learns = [fit_model(loaders(table.assign(rating=f(table.rating))), name, 2) for f in (lambda r: r, change)]
    a,b = (as_recommender(o).model.scores(torch.arange(1, 6)).detach() for o in learns)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5), st.floats(-9, 9)), min_size=2, max_size=30),
       st.floats(.1, 50), st.floats(-50, 50))
@settings(deadline=None, max_examples=60)
def test_liking_does_not_depend_on_the_scale(rows, factor, shift):
    users,ratings = torch.tensor([o[0] for o in rows]),torch.tensor([o[2] for o in rows], dtype=torch.float64)
    if ratings.std() < .01: return
    def values(ratings):
        data = Interactions(torch.stack([users, torch.tensor([o[1] for o in rows])], 1), ratings, 5, 6)
        if not data.scale.spread: return torch.ones(len(data))
        return data.scale.values(data.ratings, data.levels[data.users])
    torch.testing.assert_close(values(ratings), values(ratings*factor + shift), rtol=1e-3, atol=1e-3)


def test_ratings_that_are_all_the_same_are_interactions(table):
    same,clicks = loaders(table.assign(rating=3.)),loaders(table, implicit=True)
    for name in ('ease', 'ials', 'softmax', 'bpr'):
        a,b = (fit_model(dls, name, 1).model for dls in (same, clicks))
        for one,other in zip(a.parameters(), b.parameters()): assert torch.equal(one, other), name
    assert liking_of(torch.tensor([1, 1]), torch.tensor([3., 3])).spread == 0


# --- weights of losses, against plain formulas ----------------------------------------------------------------------
def gradients_of(learn, seed=0):
    "The loss of one training batch of all rows, and its gradients"
    set_seed(seed)
    learn.dls.train.bs = 10_000
    losses = []
    def step(): losses.append(learn.loss_grad.item())
    with learn.no_bar(), learn.no_logging():
        learn.create_opt()
        learn.opt.step = step
        learn.opt.zero_grad = lambda: None
        learn.fit(1)
    return losses[0],[p.grad.clone() for p in learn.model.parameters()]


@pytest.mark.parametrize('column', [False, True])
def test_softmax_is_weighted_cross_entropy(table, column):
    df = table.assign(times=np.random.default_rng(1).integers(0, 4, len(table)).astype(float))
    dls = loaders(df, **(dict(weight_name='times') if column else {}))
    learn = collab_deep_learner(dls, 5, loss='softmax')
    model = copy.deepcopy(learn.model)
    loss,grads = gradients_of(learn)
    pairs,ratings = dls.ratings_of('train')
    weights = (ratings - 1)*(dls.weights_of('train') if column else 1)
    each = cross_entropy(model.scores(pairs[:,0])[:,1:], pairs[:,1]-1, reduction='none')
    plain = (each*weights/weights.mean()).mean()
    plain.backward()
    assert loss == pytest.approx(plain.item(), rel=1e-5)
    for mine,theirs in zip(grads, model.parameters()):
        torch.testing.assert_close(mine, theirs.grad, atol=1e-6, rtol=1e-4)


def test_a_weight_of_2_is_a_row_that_comes_twice(table):
    twice = pd.concat([table, table[:50]])
    heavy = table.assign(times=[2.]*50 + [1.]*(len(table) - 50))
    losses = []
    for dls in loaders(twice), loaders(heavy, weight_name='times'):
        set_seed(0)
        losses.append(gradients_of(collab_deep_learner(dls, 5, loss='softmax'))[1])
    for a,b in zip(*losses): torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_squared_error_is_weighted_in_training_and_not_in_validation(table):
    df = table.assign(times=np.random.default_rng(1).integers(0, 4, len(table)).astype(float))
    rows = np.arange(len(df))
    dls = loaders(df, splits=(rows[50:], rows[:50]), weight_name='times')
    learn = collab_deep_learner(dls, 5, y_range=(0, 6))
    model = copy.deepcopy(learn.model)
    loss,_ = gradients_of(learn)
    pairs,ratings = dls.ratings_of('train')
    w = dls.weights_of('train')
    assert loss == pytest.approx((((model(pairs) - ratings)**2)*w/w.mean()).mean().item(), rel=1e-5)
    preds,targets = learn.get_preds()
    assert preds.shape == targets.shape == (50,)


def test_bpr_weighs_the_pairs_taken(table):
    learn = collab_deep_learner(loaders(table), 5, loss=BPRLoss(weights=lambda r: (r == 5).float()))
    before = copy.deepcopy(learn.model)
    set_seed(1)
    quiet(learn, 1)
    moved = (learn.model.users.weight - before.users.weight).abs().sum(1) > 1e-3
    with_fives = torch.zeros(41, dtype=torch.bool)
    with_fives[as_recommender(learn).known('user', table.user[table.rating == 5].unique().tolist())] = True
    assert torch.equal(moved[1:], with_fives[1:])


@pytest.mark.parametrize('bad,kind,text', [
    ('stars', ValueError, "weights is 'above lowest', None, or a function of ratings; found 'stars'"),
    (lambda r: r.tolist(), TypeError, 'gives a tensor, found list'),
    (lambda r: r[:3], ValueError, r'gives \[3\] numbers for \d+ ratings'),
    (lambda r: -r, ValueError, 'finite numbers from 0 on, found -'),
    (lambda r: r*math.nan, ValueError, 'found nan for rating 0'),
    (lambda r: r*0, ValueError, 'all training rows have weight 0'),
])
def test_weights_that_mean_nothing_are_refused(table, bad, kind, text):
    for loss in SoftmaxLoss, BPRLoss:
        with pytest.raises(kind, match=text): collab_deep_learner(loaders(table), loss=loss(weights=bad))


def test_a_users_rows_stand_together_and_each_comes_once(table):
    dls = loaders(table)
    learn = collab_deep_learner(dls, loss='softmax')
    pairs = torch.cat([x for x,*_ in learn.dls.train])
    changes = (pairs[1:,0] != pairs[:-1,0]).sum() + 1
    assert changes == len(pairs[:,0].unique()) == 40
    assert sorted(map(tuple, pairs.tolist())) == sorted(map(tuple, dls.ratings_of('train')[0].tolist()))
    assert learn.dls is not dls and not dls.train.by_user


# --- closed forms, against plain formulas ---------------------------------------------------------------------------
def dense(dls, strength=.4):
    "Values and who took what, [n_users, n_items], by plain loops"
    pairs,ratings = dls.ratings_of('train')
    x,r = np.zeros((dls.n_users, dls.n_items)),ratings.double().numpy()
    level = {u: (r[pairs[:,0] == u].sum() + 5*r.mean())/((pairs[:,0] == u).sum().item() + 5)
             for u in pairs[:,0].unique().tolist()}
    away = np.array([o - level[u] for o,u in zip(r, pairs[:,0].tolist())])
    for (u, i),a in zip(pairs.tolist(), away): x[u,i] = 1 + strength*a/away.std()
    return x[1:,1:],(x != 0)[1:,1:]


@pytest.mark.parametrize('few_users', [False, True])
def test_ease_is_what_numpy_says(table, few_users):
    df = table[table.user < 8] if few_users else table
    dls = loaders(df)
    x,_ = dense(dls)
    p = np.linalg.inv(x.T @ x + 7*np.eye(x.shape[1]))
    b = -p/p.diagonal()
    np.fill_diagonal(b, 0)
    scores = fit_ease(dls, 7.).model.scores(torch.arange(1, dls.n_users))[:,1:]
    np.testing.assert_allclose(scores.numpy(), x @ b, atol=2e-5)


def test_a_turn_of_ials_is_what_numpy_says(table):
    dls = loaders(table)
    x,taken = dense(dls)
    model = iALS(dls.n_users, dls.n_items, 3, reg=.05, unseen=.2)
    q = model.items.weight[1:].double().numpy()
    def solved(other, x, taken):
        rows = []
        for values,mask in zip(x, taken):
            w = np.where(mask, 1, .2)
            penalty = .05*(mask.sum() + .2*len(mask))
            rows.append(np.linalg.solve((other.T*w) @ other + penalty*np.eye(3), other.T @ (mask*values)))
        return np.array(rows)
    p = solved(q, x, taken)
    q = solved(p, x.T, taken.T)
    p = solved(q, x, taken)
    model.solve(interactions_of(dls))
    np.testing.assert_allclose(model.items.weight[1:].numpy(), q, atol=1e-4)
    np.testing.assert_allclose(model.users.weight[1:].numpy(), p, atol=1e-4)


def test_a_column_of_weights_counts_in_what_is_solved(table):
    df = table.assign(times=np.random.default_rng(1).integers(1, 4, len(table)).astype(float))
    dls = loaders(df, implicit=True, weight_name='times')
    pairs,w = dls.ratings_of('train')[0],dls.weights_of('train').double().numpy()
    x = np.zeros((dls.n_users, dls.n_items))
    x[tuple(pairs.T.numpy())] = np.sqrt(w/w.mean())
    x = x[1:,1:]
    p = np.linalg.inv(x.T @ x + 7*np.eye(x.shape[1]))
    b = (1 - np.eye(len(p)))*-p/p.diagonal()
    scores = fit_ease(dls, 7.).model.scores(torch.arange(1, dls.n_users))[:,1:]
    np.testing.assert_allclose(scores.numpy(), x @ b, atol=2e-5)
    plain,heavy = (fit_ials(o).model.users.weight for o in (loaders(df, implicit=True), dls))
    assert not torch.allclose(plain, heavy, atol=1e-3)


def test_a_pair_that_comes_twice_counts_once_with_its_mean():
    rows = pd.DataFrame([(1, 1, 5.), (1, 1, 1.), (1, 2, 3.), (2, 2, 2.)], columns=['user', 'item', 'rating'])
    data = interactions_of(loaders(rows))
    assert data.ratings.tolist() == [3, 3, 2] and len(data) == 3


def test_the_usual_penalty_stays_where_little_is_known(table):
    assert chosen_reg(interactions_of(loaders(table))) in (45, 90, 180, 350)
    rows = pd.DataFrame([(1, 1, 5.), (1, 2, 1.), (2, 2, 3.)], columns=['user', 'item', 'rating'])
    assert chosen_reg(interactions_of(loaders(rows))) == 350


# --- all that learners do -------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def held(table): return loaders(table, valid_pct=.2, seed=1)


@pytest.mark.parametrize('name', SOLVED)
def test_a_solved_learner_does_what_trained_ones_do(held, name, tmp_path):
    set_seed(0)
    learn = collab_deep_learner(held, model=name, metrics=RankingMetric('ndcg'), path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(3)
        assert len(learn.recorder.values) == 3
        assert learn.recorder.values[-1][-1] == pytest.approx(evaluate_ranking(learn).value.ndcg)
        valid = learn.validate()[0]
        assert 0 < valid < 1
        preds,targets = learn.get_preds()
    pairs,ratings = held.ratings_of('valid')
    torch.testing.assert_close(targets, ratings)
    scores = learn.model.scores(pairs[:,0])[range(len(pairs)),pairs[:,1]]
    torch.testing.assert_close(preds, scores, atol=1e-5, rtol=1e-4)
    one = as_recommender(learn).encode([3], [5])
    assert predict_pairs(learn, 3, 5) == pytest.approx(learn.model(one).item(), abs=1e-5)

    learn.save('kept')
    other = collab_deep_learner(held, model=name, path=tmp_path)
    with other.no_bar(), other.no_logging(): other.fit(1)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        other.load('kept', with_opt=False)
    assert lists_of(other) == lists_of(learn)
    learn.export('learner.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        exported = load_learner(tmp_path/'learner.pkl')
    with pytest.raises(ValueError, match='exported without its training rows'): recommend(exported, 1)
    with pytest.raises(ValueError, match='exported without'): save_recommender(exported, tmp_path/'empty')
    pd.testing.assert_frame_equal(*(recommend(o, 1, exclude_seen=False) for o in (exported, learn)))
    save_recommender(learn, tmp_path/'saved')
    pd.testing.assert_frame_equal(recommend(load_recommender(tmp_path/'saved'), [1, 2, 7]), recommend(learn, [1, 2, 7]))
    pickle.loads(pickle.dumps(learn.model))


@pytest.mark.parametrize('name', SOLVED)
def test_someone_new_who_rated_as_a_known_user_gets_the_same_list(held, name):
    learn = fit_model(held, name)
    rec = as_recommender(learn)
    pairs,ratings = held.ratings_of('train')
    for user in (2, 9):
        own = pairs[:,0] == user
        rated = {rec.items[i]: r for i,r in zip(pairs[own,1].tolist(), ratings[own].tolist())}
        new,known = recommend(learn, rated, 5),recommend(learn, rec.users[user], 5)
        assert new['item'].tolist() == known['item'].tolist()
        np.testing.assert_allclose(new.score, known.score, atol=1e-4)
        assert len(recommend(learn, set(rated), 5)) == 5


@pytest.mark.parametrize('name', SOLVED)
def test_reasons_add_up(held, name):
    learn = fit_model(held, name)
    item = recommend(learn, 3, 1)['item'][0]
    parts = explain(learn, 3, item).value
    assert parts['score'] == pytest.approx(predict_pairs(learn, 3, item), abs=1e-5)
    assert parts.iloc[:-2].sum() == pytest.approx(parts['sum'], abs=1e-5)
    assert len(similar_items(learn, item, 5)) == 5 and len(nearest_seen(learn, 3, item, 2)) == 2


def test_the_best_turn_is_kept_and_fits_go_on(held):
    learn = collab_deep_learner(held, model='ials', n_factors=4, metrics=RankingMetric('ndcg'))
    with learn.no_bar(), learn.no_logging(): learn.fit(6, cbs=KeepBest('ndcg_at_10'))
    best = max(o[-1] for o in learn.recorder.values)
    assert evaluate_ranking(learn).value.ndcg == pytest.approx(best)
    once,twice = (collab_deep_learner(held, model='ials', n_factors=4) for _ in range(2))
    twice.model.load_state_dict(once.model.state_dict())
    with once.no_bar(), once.no_logging(), twice.no_bar(), twice.no_logging():
        once.fit(4)
        for _ in range(2): twice.fit(2)
    assert torch.equal(once.model.users.weight, twice.model.users.weight)


def test_a_blend_of_what_was_trained(held, table):
    parts = fit_ease(held),fit_model(held, 'softmax', 2),fit_model(held, 'bpr', 2)
    both = blend(parts, shares=[2, 1, 1])
    assert both.ranks and not both.model.solves
    users = torch.arange(1, held.n_users)
    def z(s): return (s - s[:,1:].mean(1, keepdim=True))/s[:,1:].std(1, correction=0, keepdim=True)
    plain = sum(share*z(o.model.scores(users)) for share,o in zip((.5, .25, .25), parts))
    torch.testing.assert_close(both.model.scores(users), plain, atol=1e-5, rtol=1e-4)
    with both.no_bar(): assert 0 < both.validate()[0] < 1
    with pytest.raises(ValueError, match='other users, items or training rows'):
        blend([parts[0], fit_ease(loaders(pd.DataFrame(dict(user=[1, 2, 3], item=[1, 2, 1], rating=[1., 2, 3]))))])
    with pytest.raises(ValueError, match='shares has a number for each of the 3 members'): blend(parts, [1, 2])
    with pytest.raises(ValueError, match='other users, items or training rows'):
        blend([parts[0], fit_ease(loaders(table.assign(user=table.user + 1)))])


def test_several_starts_are_averaged(held):
    learn = collab_ensemble(held, 2, n=2, model='ials', n_factors=4)
    assert learn.ranks and len(lists_of(learn)) == 20


@pytest.mark.parametrize('kwargs,text', [
    (dict(model='ease', loss='mse'), "['loss'] would change nothing, since model='ease' has none"),
    (dict(model='ease', n_factors=3), "['n_factors'] would change nothing, since model='ease' has none"),
    (dict(model='ials', y_range=(0, 5), lr=.1), "['lr', 'y_range'] would change nothing"),
    (dict(model='auto', use_nn=True), "['use_nn'] would change nothing"),
    (dict(model=EASE(3, 3), loss='softmax'), "['loss'] would change nothing, since this EASE is made already"),
    (dict(model='ease', config=dict(reg=-1)), 'reg, the penalty for large weights, is a finite number'),
    (dict(model='ials', config=dict(unseen=0)), 'unseen is more than 0'),
    (dict(model='blend', config=dict(shares=[1])), 'shares has a number for each of the 2 members'),
])
def test_what_would_be_passed_over_is_refused(held, kwargs, text):
    with pytest.raises(ValueError) as e: collab_deep_learner(held, **kwargs)
    assert text in str(e.value)


def test_damaged_lists_are_not_read(held):
    model = fit_ease(held).model
    model.taken[0] = held.n_items
    with pytest.raises(ValueError, match='the lists in the model do not fit its tables'): model.check_numbers()


def test_what_was_chosen_is_said_in_a_line(held, table, capsys):
    collab_deep_learner(held)
    said = "40 users, 24 items, 384 ratings from 1 to 5: DotProductBias(50 factors), loss 'mse'\n"
    assert capsys.readouterr().out == said
    collab_deep_learner(held, model='auto')
    assert capsys.readouterr().out.count('\n') == 1
    collab_deep_learner(loaders(table, implicit=True))
    assert capsys.readouterr().out.endswith("480 interactions: DotProductBias(50 factors), loss 'softmax'\n")
    collab_deep_learner(held, y_range=(0, 6))
    assert capsys.readouterr().out == ''


# --- faults that were found, each with its right value --------------------------------------------------------------
def validated(learn):
    with learn.no_bar(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return learn.validate()[0]


@pytest.mark.parametrize('column', [False, True])
def test_the_validation_loss_of_softmax_is_a_weighted_mean(table, column):
    "Of held-out rows by their stars; a column of weights is of training"
    df = table.assign(times=np.random.default_rng(1).integers(1, 4, len(table)).astype(float))
    rows = np.arange(len(df))
    dls = loaders(df, splits=(rows[:400], rows[400:]), **(dict(weight_name='times') if column else {}))
    learn = collab_deep_learner(dls, 5, loss='softmax')
    found = validated(learn)  # unknown users are average ones from now on
    pairs,ratings = dls.ratings_of('valid')
    with torch.no_grad(): each = cross_entropy(learn.model.scores(pairs[:,0])[:,1:], pairs[:,1]-1, reduction='none')
    right = ((ratings-1)*each).sum()/(ratings-1).sum()
    assert found == pytest.approx(right.item(), rel=1e-5)
    with learn.no_bar(): again = learn.validate(dl=dls.test_dl(df[400:], with_labels=True))[0]
    assert again == pytest.approx(right.item(), rel=1e-5)


@pytest.mark.parametrize('name', ['ease', 'blend', 'softmax'])
def test_held_out_rows_of_new_items_have_no_part_in_the_loss(table, name):
    new = table[:40].assign(item=99, rating=5.)
    df = pd.concat([table, new], ignore_index=True)
    rows,n = np.arange(len(df)),len(table)
    def fitted(held): return fit_model(loaders(df, splits=(rows[:400], held)), name, 2)
    with_new,without = map(fitted, (rows[400:], rows[400:n]))
    assert validated(with_new) == pytest.approx(validated(without), rel=1e-5)
    assert math.isnan(validated(fitted(rows[n:])))


def test_loaders_of_a_learner_do_not_carry_its_weights(held):
    softmax = collab_deep_learner(held, 5, loss='softmax')
    assert torch.equal(fit_ease(softmax.dls).model.weights, fit_ease(held).model.weights)
    again = collab_deep_learner(softmax.dls, 5, loss='softmax')
    assert torch.equal(again.dls.weights_of('train'), softmax.dls.weights_of('train'))
    assert collab_deep_learner(softmax.dls, 5, loss='mse').dls.weights_of('train') is None


@pytest.mark.parametrize('name', SOLVED)
def test_load_brings_back_all_that_newcomers_need(held, name, tmp_path):
    learn = fit_model(held, name, path=tmp_path)
    learn.save('kept')
    fresh = collab_deep_learner(held, model=name, path=tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        fresh.load('kept', with_opt=False)
    rated = {0: 5., 1: 1., 2: 1.}
    pd.testing.assert_frame_equal(recommend(fresh, rated, 4), recommend(learn, rated, 4))
    assert recommend(learn, rated, 4)['item'].tolist() != recommend(learn, set(rated), 4)['item'].tolist()
    folder = save_recommender(fresh, tmp_path/'saved')
    pd.testing.assert_frame_equal(recommend(load_recommender(folder), rated, 4), recommend(learn, rated, 4))


def test_each_fit_solves_anew(held):
    learn = fit_ease(held, 50.)
    learn.model.reg = 5.
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert torch.equal(learn.model.weights, fit_ease(held, 5.).model.weights)


def test_rows_of_weight_0_are_none(table):
    df = table.assign(times=(np.random.default_rng(1).random(len(table)) < .7).astype(float))
    pairs = [interactions_of(loaders(df, weight_name='times')),interactions_of(loaders(df[df.times > 0]))]
    for name in ('ratings', 'users', 'items'): assert torch.equal(*(getattr(o, name) for o in pairs))
    assert pairs[0].scale == pairs[1].scale
    a,b = (fit_ease(o, 50.).model.scores(torch.arange(1, 41)) for o in
           (loaders(df, weight_name='times'), loaders(df[df.times > 0])))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('name', ['ease', 'ials', 'blend'])
def test_someone_whose_rows_count_for_nothing_is_average(table, name):
    learn = fit_model(loaders(table.assign(times=(table.user != 7)*1.), weight_name='times'), name)
    rec = as_recommender(learn)
    scores = rec.model.scores(torch.tensor([0, rec.index['user'][7]]))
    torch.testing.assert_close(scores[0], scores[1])


def test_a_like_of_little_weight_is_a_like(table):
    df = table.assign(times=np.where(table.rating == 1, 16., 1.))
    inner = InnerSplit(interactions_of(loaders(df, weight_name='times')), .4)
    plain = InnerSplit(interactions_of(loaders(df)), .4)
    assert [o.tolist() for o in inner.wanted] == [o.tolist() for o in plain.wanted]


def test_what_was_not_taken_weighs_by_the_data_at_hand(table):
    model = iALS(41, 25, 4)
    for n in (480, 200):
        rows = table.groupby('user').head(n//40)
        dls = loaders(rows)
        if (dls.n_users, dls.n_items) != (41, 25): pytest.skip('an item is gone')
        model.solve(interactions_of(dls))
        assert model.alpha.item() == pytest.approx(2*n/(40*24)) and model.settings['unseen'] is None


def test_what_was_frozen_stays(held, table):
    learn = fit_model(held)
    frozen = frozen_recommender(learn)
    before = copy.deepcopy(frozen.model.settings)
    rated = {0: 5., 1: 1.}
    list_before = recommend(frozen, rated, 5)
    learn.model.solve(interactions_of(loaders(table.assign(rating=6 - table.rating), valid_pct=.2, seed=1)))
    assert frozen.model.settings == before
    pd.testing.assert_frame_equal(recommend(frozen, rated, 5), list_before)


def test_a_ranking_has_no_loss_of_a_pair(held):
    for learn in fit_ease(held), collab_deep_learner(held, loss='softmax'):
        with pytest.raises(ValueError, match='ask without with_loss'): learn.get_preds(with_loss=True)


def test_an_item_given_twice_is_taken_once(held):
    for name in ('ease', 'ials'):
        rec = as_recommender(fit_model(held, name))
        assert torch.equal(fold_in(rec, [0, 0, 3]), fold_in(rec, [0, 3]))


def test_learners_of_other_rows_are_not_blended(held, table):
    with pytest.raises(ValueError, match='other users, items or training rows'):
        blend([fit_ease(held), fit_ials(loaders(table))])


def test_cold_items_of_a_blend_are_predicted_as_they_are_listed(table):
    features = pd.DataFrame(dict(kind=['a', 'b']*13), index=range(26))  # two more than were rated
    dls = loaders(table)
    two = [fit_model(dls, 'factor', 1, seed=s, config=dict(item_features=features)) for s in range(2)]
    both = blend(two)
    listed = recommend(both, 3, 30)
    assert {24, 25} <= set(listed['item'])
    each = [predict_pairs(both, 3, o) for o in listed['item']]
    np.testing.assert_allclose(listed.score, each, atol=1e-4)


@pytest.mark.parametrize('call,kind,text', [
    (lambda d: fit_model(d, 'dot', n_factors=0), ValueError, 'n_factors is the number of columns, a positive integer'),
    (lambda d: fit_ials(d, n_factors=0), ValueError, 'n_factors is the number of columns, a positive integer'),
    (lambda d: fit_ials(d, n_factors=200, reg=1e-12), ValueError, 'reg is too small for float32'),
    (lambda d: fit_ials(d, alpha=40), ValueError, "config of 'ials' is of"),
    (lambda d: fit_model(d, reg=3), TypeError, 'go into config=dict'),
    (lambda d: fit_model(d, epochs=0), ValueError, 'a positive integer; found 0'),
    (lambda d: fit_model(pd.DataFrame()), TypeError, 'as RatingsDataLoaders.from_df'),
    (lambda d: recommend(collab_deep_learner(d, model='ease'), 1), ValueError, 'is not solved yet'),
])
def test_refused_with_what_to_do(held, call, kind, text):
    with pytest.raises(kind, match=text): call(held)


def test_scores_in_float64(held):
    learn = fit_model(held)
    whole = learn.model.scores(torch.arange(5))
    double = copy.deepcopy(learn.model).double()
    torch.testing.assert_close(double.scores(torch.arange(5)), whole.double(), atol=1e-4, rtol=1e-4)
    double.solve(interactions_of(held))
    double.solve(interactions_of(held), 1)


def test_weights_with_fastais_losses(table):
    dls = loaders(table.assign(times=1. + table.user % 3), weight_name='times')
    def loss_of(loss):
        set_seed(0)
        return gradients_of(collab_deep_learner(dls, 5, y_range=(0, 6), loss=loss))
    plain,flat = map(loss_of, ('mse', MSELossFlat()))
    assert plain[0] == pytest.approx(flat[0], rel=1e-5)


def plain_rank_share(scores, dls):
    "Per held-out row of an item that training has: how far down its user's list it stands, by a loop"
    (x,_),(held,y) = (dls.ratings_of(o) for o in ('train', 'valid'))
    taken = {u: set(x[x[:,0] == u,1].tolist()) for u in range(dls.n_users)}
    found = []
    for (u, i),stars in zip(held.tolist(), y.tolist()):
        if not i: continue
        others = [j for j in range(1, dls.n_items) if j not in taken[u] and j != i]
        above = sum((scores[u][j] > scores[u][i]) + (scores[u][j] == scores[u][i])/2 for j in others)
        found.append((above/len(others), stars - dls.y_min))
    shares,weights = np.array(found).T
    return (shares*weights).sum()/weights.sum()


def standardised_by_hand(s):
    known = s[:,1:]
    return (s - known.mean(1)[:,None])/known.std(1)[:,None]


@pytest.mark.parametrize('shares', [None, [3, 1], [0, 1]])
def test_the_validation_of_a_blend_and_of_its_members(held, shares):
    "Scores of the members by their factors in numpy, put together and ranked by loops"
    ease,ials = fit_ease(held, 20.),fit_ials(held, 3, n_factors=4)
    both = blend([ease, ials], shares=shares)
    users = torch.arange(held.n_users)
    rows,weights = ease.model.user_rows(users).numpy(),ease.model.weights.detach().numpy()
    factors = [o.weight.detach().double().numpy() for o in (ials.model.users, ials.model.items)]
    by_hand = rows.astype(float) @ weights,factors[0] @ factors[1].T
    one,two = (.5, .5) if shares is None else np.array(shares)/sum(shares)
    put_together = one*standardised_by_hand(by_hand[0]) + two*standardised_by_hand(by_hand[1])
    for learn,scores in ((ease, by_hand[0]), (ials, by_hand[1]), (both, put_together)):
        with learn.no_bar(), learn.no_logging(): found = learn.validate()[0]
        assert found == pytest.approx(plain_rank_share(scores.tolist(), held), abs=2e-4), type(learn.model).__name__
