"Measures of ratings and lists against plain code, on catalogues drawn at random"
import re

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.metrics import ndcg_score

from collab_deep.lists.evaluate import evaluate_ranking, evaluate_ratings, ranking_metrics
from collab_deep.models.factor import FactorModel
from collab_deep.lists.recommend import predict_pairs
from collab_deep.lists.recommender import Recommender
from small_recommender import recommender

K = st.integers(1, 12)


def by_loop(rec, held, k, scores, threshold):
    "Mean measures and the share of items listed, from ids alone; `held` has rows (user, item, rating)"
    seen = {u: {rec.items[i] for i in rec.seen[1][rec.seen[0][n]:rec.seen[0][n + 1]]} for n, u in enumerate(rec.users)}
    rows, listed = [], set()
    for n, u in enumerate(rec.users[1:], 1):
        wanted = {i for v, i, r in held if v == u and (threshold is None or r >= threshold)} - seen[u]
        if not wanted: continue
        row = {i: rec.items.index(i) for i in rec.items[1:]}
        unseen = [i for i in row if i not in seen[u]]
        ranked = sorted(unseen, key=lambda i: (-scores[n][row[i]], row[i]))[:k]
        listed |= set(ranked)
        hits = [p for p, i in enumerate(ranked, 1) if i in wanted]
        best = min(k, len(wanted))
        gain, ideal = (sum(1/np.log2(p + 1) for p in places) for places in (hits, range(1, best + 1)))
        average_precision = sum((j + 1)/p for j, p in enumerate(hits))/best
        rows.append([len(hits)/k, len(hits)/len(wanted), gain/ideal, average_precision])
    return len(rows), [*np.mean(rows, 0), len(listed)/(len(rec.items) - 1)] if rows else None


def pairs_of(n_users, n_items): return st.tuples(st.integers(1, n_users), st.integers(1, n_items))

ratings = st.tuples(st.integers(1, 6), st.integers(2, 10)).flatmap(lambda n: st.tuples(
    st.just(n), st.sets(pairs_of(*n)),
    st.dictionaries(pairs_of(n[0] + 1, n[1] + 2), st.integers(1, 5), min_size=1), st.integers(0, 99)))


@settings(max_examples=80, deadline=None)
@given(ratings, K, st.sampled_from([None, 3, 5]))
def test_lists_measure_as_a_plain_loop_does(drawn, k, threshold):
    (n_users, n_items), train, held, seed = drawn  # held has a user and two items that training did not have
    users, items = [f'u{i}' for i in range(1, n_users + 1)], [f't{i}' for i in range(1, n_items + 1)]
    rec = recommender(train, users, items, seed=seed)
    rows = [(f'u{u}', f't{i}', r) for (u, i), r in held.items()]
    frame = pd.DataFrame(rows, columns=['user', 'title', 'rating'])
    with torch.no_grad(): scores = rec.model.scores(torch.arange(1, n_users + 1)).numpy()
    scores = np.vstack([np.zeros(n_items + 1), scores])
    n_measured, expected = by_loop(rec, rows, k, scores, threshold)
    if not n_measured:
        message = 'no user who is known from training has a relevant item held out'
        with pytest.raises(ValueError, match=message): evaluate_ranking(rec, k, threshold, frame)
        return
    found = evaluate_ranking(rec, k, threshold, frame)
    assert found.attrs['users'] == n_measured and found.value.tolist() == pytest.approx(expected)
    popularity = np.tile(rec.item_counts.numpy(), (n_users + 1, 1))
    assert found.popularity.tolist() == pytest.approx(by_loop(rec, rows, k, popularity, threshold)[1])
    shuffled = frame.sample(frac=1, random_state=seed)
    known_twice = pd.concat([shuffled, shuffled[shuffled.title.isin(rec.items)]])
    pd.testing.assert_frame_equal(evaluate_ranking(rec, k, threshold, known_twice), found)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(2, 15), K, st.integers(0, 99))
def test_ndcg_is_that_of_scikit_learn(n, m, k, seed):
    rng = np.random.default_rng(seed)
    wanted, scores = rng.random((n, m)) < .4, rng.random((n, m))
    wanted[:, 0] = True
    order = np.argsort(-scores, 1)[:, :k]
    hits = np.pad(np.take_along_axis(wanted, order, 1), ((0, 0), (0, k - order.shape[1])))
    ours = ranking_metrics(torch.from_numpy(hits), torch.from_numpy(wanted.sum(1)))['ndcg'].mean().item()
    assert ours == pytest.approx(ndcg_score(wanted, scores, k=k, ignore_ties=True))


def test_a_perfect_and_a_useless_list():
    n = torch.tensor([2, 9])
    best = ranking_metrics(torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool(), n)
    assert best['ndcg'].tolist() == best['map'].tolist() == [1, 1]
    assert best['recall'].tolist() == [1, 4/9] and best['precision'].tolist() == [.5, 1]
    assert all(o.tolist() == [0, 0] for o in ranking_metrics(torch.zeros(2, 4).bool(), n).values())


@settings(max_examples=40, deadline=None)
@given(ratings)
def test_ratings_measure_as_the_formula_does(drawn):
    (n_users, n_items), train, held, seed = drawn
    rec = recommender(train, range(1, n_users + 1), range(1, n_items + 1), seed=seed)
    frame = pd.DataFrame([(u, i, float(r)) for (u, i), r in held.items()], columns=['user', 'title', 'rating'])
    e = predict_pairs(rec, frame).to_numpy().astype(float) - frame.rating.to_numpy()
    found = evaluate_ratings(rec, frame)
    assert found.value.tolist() == pytest.approx([np.mean(e**2), np.mean(e**2)**.5, np.mean(abs(e))])
    assert found.training_mean.mae == pytest.approx(np.mean(abs(frame.rating - 3)))
    if len(e) == 1: return
    mse_error, mae_error = (np.std(o, ddof=1)/len(e)**.5 for o in (e**2, abs(e)))
    assert found.std_error.tolist() == pytest.approx([mse_error, mse_error/2/np.mean(e**2)**.5, mae_error])


def test_ids_known_by_features_alone_count_as_new():
    "Their rows lie after those of training, where they must not run into the next user's"
    cold = dict(n_user_features=1, n_item_features=1, cold_users=['d'], cold_items=['w', 'v'])
    def make(u, i): return FactorModel(u, i, 3, **cold)
    rec = recommender([(1, 1)], ['a', 'b', 'c'], ['x', 'y', 'z'], make)
    held = pd.DataFrame(dict(user=['a', 'a', 'b', 'd', 'd'], title=['w', 'v', 'x', 'y', 'nowhere']))
    found = evaluate_ranking(rec, 3, ratings=held)
    strangers = held.replace(dict(w='other', v='another', d='nobody'))
    pd.testing.assert_frame_equal(found, evaluate_ranking(rec, 3, ratings=strangers))
    assert found.attrs['users'] == 2 and found.value.recall == .5


def test_interactions_have_no_ratings():
    rec = recommender([(1, 1)], ['a', 'b'], ['x', 'y'])
    rec = Recommender(rec.model, rec.classes, None, rec.seen, rec.item_counts, rec.user_counts, 1.)
    held = pd.DataFrame(dict(user=['a', 'b'], title=['y', 'x']))
    message = 'trained on interactions without ratings, so it predicts none: see evaluate_ranking'
    with pytest.raises(ValueError, match=message): evaluate_ratings(rec, held)
    message = 'interactions without ratings have no threshold'
    with pytest.raises(ValueError, match=message): evaluate_ranking(rec, 1, 4, held.assign(rating=5))
    assert evaluate_ranking(rec, 2, ratings=held).value.recall == 1


@pytest.mark.parametrize('odd', [float('nan'), float('inf'), '4'])
def test_a_threshold_is_a_number(odd):
    rec = recommender([(1, 1)], ['a', 'b'], ['x', 'y'])
    held = pd.DataFrame(dict(user=['a', 'b'], title=['y', 'x'], rating=[4, 5]))
    with pytest.raises(ValueError, match=f'threshold is a finite number .*, found {odd!r}'):
        evaluate_ranking(rec, 1, odd, held)


def test_columns_that_are_missing():
    rec = recommender([(1, 1)], ['a', 'b'], ['x', 'y'])
    for f in (evaluate_ranking, evaluate_ratings):
        message = re.escape("expected columns ['user', 'title'")
        with pytest.raises(ValueError, match=message): f(rec, ratings=pd.DataFrame(dict(film=['x'])))
        with pytest.raises(TypeError, match='a Recommender holds no ratings to evaluate it on'): f(rec)


def test_a_large_mean_loses_no_digit():
    rec = recommender([(1, 1)], ['a', 'b'], ['x', 'y'])
    stars = np.array([1., 2, 5, 4])
    for shift in (0, 1e8, 1.7e9):
        shifted = Recommender(rec.model, rec.classes, 'rating', rec.seen, rec.item_counts, rec.user_counts, shift + 3.)
        held = pd.DataFrame(dict(user=list('abab'), title=list('xxyy'), rating=stars + shift))
        found = evaluate_ratings(shifted, held).training_mean
        assert found.rmse == np.mean((stars - 3)**2)**.5 and found.mae == np.mean(abs(stars - 3))
