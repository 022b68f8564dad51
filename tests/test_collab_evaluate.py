"Measures of ratings and lists against plain code, on catalogues drawn at random"
import math
import re
import warnings
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.metrics import ndcg_score

from collab_deep.lists.evaluate import evaluate_ranking, evaluate_ratings, ranking_metrics, user_metrics
from collab_deep.lists.measures import gini_index, list_diversity, list_novelty
from collab_deep.models.factor import FactorModel
from collab_deep.lists.recommend import predict_pairs
from collab_deep.lists.recommender import Recommender
from small_recommender import recommender

K = st.integers(1, 12)


def quietly(f, *args):
    "What `f` gives; a warning of rows that training has is left out"
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'training has .* held-out rows, too')
        return f(*args)


def nan_mean(values): return np.mean([o for o in values if not math.isnan(o)] or [math.nan])


def gini(counts):
    "Half the mean difference of two different items, in units of the mean"
    if not sum(counts): return math.nan
    return np.mean([abs(a - b) for a, b in combinations(counts, 2)] or [0])/np.mean(counts)/2


def by_loop(rec, held, k, scores, threshold):
    "Mean measures and those of all lists, from ids alone; `held` has rows (user, item, rating)"
    seen = {u: {rec.items[i] for i in rec.seen[1][rec.seen[0][n]:rec.seen[0][n + 1]]} for n, u in enumerate(rec.users)}
    fans = {i: {u for u in seen if i in seen[u]} for i in rec.items[1:]}
    rows, listed = [], dict.fromkeys(rec.items[1:], 0)
    for n, u in enumerate(rec.users[1:], 1):
        wanted = {i for v, i, r in held if v == u and (threshold is None or r >= threshold)} - seen[u]
        if not wanted: continue
        row = {i: rec.items.index(i) for i in rec.items[1:]}
        unseen = [i for i in row if i not in seen[u]]
        ranked = sorted(unseen, key=lambda i: (-scores[n][row[i]], row[i]))[:k]
        for i in ranked: listed[i] += 1
        hits = [p for p, i in enumerate(ranked, 1) if i in wanted]
        best = min(k, len(wanted))
        gain, ideal = (sum(1/np.log2(p + 1) for p in places) for places in (hits, range(1, best + 1)))
        average_precision = sum((j + 1)/p for j, p in enumerate(hits))/best
        bits = [np.log2(max(1, sum(map(bool, seen.values())))/max(1, len(fans[i]))) for i in ranked]
        alike = [len(fans[i] & fans[j])/max(1, len(fans[i])*len(fans[j]))**.5 for i, j in combinations(ranked, 2)]
        rows.append([len(hits)/k, len(hits)/len(wanted), gain/ideal, average_precision, bool(hits),
                     1/hits[0] if hits else 0, nan_mean(bits), 1 - nan_mean(alike)])
    if not rows: return 0, None
    means = [nan_mean(o) for o in zip(*rows)]
    coverage = sum(n > 0 for n in listed.values())/len(listed)
    return len(rows), [*means[:4], coverage, *means[4:], gini(list(listed.values()))]


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
        for f in (evaluate_ranking, user_metrics):
            with pytest.raises(ValueError, match=message): f(rec, k, threshold, frame)
        return
    found = quietly(evaluate_ranking, rec, k, threshold, frame)
    assert found.attrs['users'] == n_measured
    assert found.value.tolist() == pytest.approx(expected, nan_ok=True, abs=1e-12)
    of_all = ['coverage', 'gini']
    each = quietly(user_metrics, rec, k, threshold, frame)
    assert len(each) == n_measured and each.index.name == 'user' and each.index.is_unique
    assert each.columns.tolist() == ['relevant', 'training', *(o for o in found.index if o not in of_all)]
    pd.testing.assert_series_equal(each.mean()[2:], found.value.drop(of_all), check_names=False)
    assert each.training.tolist() == [sum(p[0] == int(u[1:]) for p in train) for u in each.index]
    popularity = np.tile(rec.item_counts.numpy(), (n_users + 1, 1))
    expected = by_loop(rec, rows, k, popularity, threshold)[1]
    assert found.popularity.tolist() == pytest.approx(expected, nan_ok=True, abs=1e-12)
    shuffled = frame.sample(frac=1, random_state=seed)
    known_twice = pd.concat([shuffled, shuffled[shuffled.title.isin(rec.items)]])
    pd.testing.assert_frame_equal(quietly(evaluate_ranking, rec, k, threshold, known_twice), found)


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


def some(**columns): return recommender([(1, 1)], ['a', 'b'], ['x', 'y', 'z']), pd.DataFrame(columns)


@pytest.mark.parametrize('odd, said', [
    (float('nan'), 'nan'), (float('inf'), 'inf'), (float('-inf'), '-inf'), (1e16, r'1e\+16')])
def test_a_rating_that_is_no_finite_number_is_refused_with_its_row(odd, said):
    rec, held = some(user=list('abb'), title=list('yxz'), rating=[4, odd, odd])
    message = rf'ratings to evaluate on lie within 1e\+15, found {said} in row 1 of 3: leave such rows out'
    with pytest.raises(ValueError, match=message): evaluate_ratings(rec, held)
    for f in (evaluate_ranking, user_metrics):
        with pytest.raises(ValueError, match=message): f(rec, 2, 4, held)
    assert evaluate_ranking(rec, 2, ratings=held).attrs['users'] == 2  # without a threshold ratings are not read


@pytest.mark.parametrize('column', ['user', 'title'])
@pytest.mark.parametrize('gap', [None, float('nan'), pd.NA])
def test_a_row_without_an_id_is_refused(column, gap):
    rec, held = some(user=list('abb'), title=list('yxz'), rating=[4, 3, 5])
    held[column] = held[column].astype(object)
    held.loc[2, column] = gap
    message = rf"row 2 of 3 has no {column}, found .*: leave such rows out, as with dropna\(subset=\['{column}'\]\)"
    for f in (evaluate_ranking, evaluate_ratings, user_metrics):
        with pytest.raises(ValueError, match=message): f(rec, ratings=held)
    numbers = recommender([(1, 1)], [1, 2], [7, 8])
    held = pd.DataFrame(dict(user=[1, 2, 2], title=[8, 7, 8], rating=[4, 3, 5]))
    held[column] = held[column].astype(float)
    held.loc[0, column] = np.nan
    message = f'row 0 of 3 has no {column}, found'
    with pytest.raises(ValueError, match=f'{message} nan'): evaluate_ranking(numbers, ratings=held)
    held[column] = held[column].astype('Int64')
    with pytest.raises(ValueError, match=f'{message} <NA>'): evaluate_ratings(numbers, held)


def test_rows_that_training_has_are_counted_and_refused_where_there_are_no_others():
    rec, held = some(user=list('aab'), title=list('xyz'), rating=[4, 3, 5])
    message = ('training has 1 of the 3 held-out rows, too: no list holds these, '
               'and they count as neither found nor missed')
    for f in (evaluate_ranking, user_metrics):
        with pytest.warns(UserWarning, match=message) as caught: f(rec, 2, ratings=held)
        assert [o.filename for o in caught] == [__file__]
    with pytest.warns(UserWarning): with_it = evaluate_ranking(rec, 2, ratings=held)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        pd.testing.assert_frame_equal(evaluate_ranking(rec, 2, ratings=held[1:]), with_it)
        assert evaluate_ranking(rec, 2, ratings=held[1:]).attrs == dict(users=2, left_out=0)
        assert evaluate_ranking(rec, 2, 5, held).attrs == dict(users=1, left_out=0)  # it is not relevant
    assert with_it.attrs == dict(users=2, left_out=1)
    twice = pd.concat([held[:1]]*3)
    message = 'found 3 held-out rows; training has 3 of them, too: hold out rows that it does not have'
    with pytest.raises(ValueError, match=message): evaluate_ranking(rec, 2, ratings=twice)


def test_who_has_seen_all_has_no_list_and_still_counts():
    "A miss for accuracy, and nothing to say of novelty or diversity"
    rec = recommender([(1, 1), (1, 2), (2, 1)], ['a', 'b'], ['x', 'y'])
    held = pd.DataFrame(dict(user=['a', 'b'], title=['new', 'y']))
    each = user_metrics(rec, 3, ratings=held)
    assert each.loc['a', ['recall', 'ndcg', 'hit_rate', 'mrr']].tolist() == [0]*4
    assert each.loc['a', ['novelty', 'diversity']].isna().all()
    assert each.loc['b', ['recall', 'hit_rate', 'mrr', 'novelty']].tolist() == [1]*4 and each.diversity.isna().all()
    found = evaluate_ranking(rec, 3, ratings=held)
    assert found.value[['recall', 'novelty', 'gini', 'coverage']].tolist() == [.5, 1, 1, .5]
    assert math.isnan(found.value.diversity) and math.isnan(found.std_error.novelty)
    alone = evaluate_ranking(rec, 3, ratings=held[:1])
    assert alone.value[['novelty', 'diversity', 'gini']].isna().all() and alone.value.coverage == 0


def test_a_list_of_one_has_no_diversity():
    "Whatever rounding makes of the length of a column"
    for n in range(1, 40):
        rec = recommender([(u, 1) for u in range(1, n + 1)], range(n), ['x', 'y'])
        assert list_diversity(torch.tensor([[1], [2]]), rec.seen, 3).isnan().all()


def test_lists_as_RecTools_measures_them():
    "The examples of the documentation of RecTools 0.19"
    hits = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 0, 1], [1, 1, 1]]).bool()
    n = torch.tensor([2, 1, 3, 3])
    assert ranking_metrics(hits, n)['map'].tolist() == pytest.approx([0, 1, .55555556, 1])  # MAP(k=3): n <= k
    assert (ranking_metrics(hits[:, :1], n)['map']/n).tolist() == pytest.approx([0, 1, .33333333, .33333333])
    first = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 1], [0, 0, 1]]).bool()
    assert ranking_metrics(first, n)['mrr'].tolist() == pytest.approx([0, 1, .5, .33333333])
    seen = torch.tensor([0, 0, 2, 3, 4]), torch.tensor([1, 2, 1, 1])
    novelty = list_novelty(torch.tensor([[3, 0], [2, 3], [1, 2]]), seen, 4)  # item 3 counts as having one user
    assert novelty.tolist() == pytest.approx([1.5849625, 1.5849625, .79248125])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=20), st.integers(2, 5))
def test_gini_does_not_depend_on_order_or_scale(counts, times):
    found = gini_index(torch.tensor(counts))
    assert found == pytest.approx(gini(counts), nan_ok=True, abs=1e-12)
    assert found == pytest.approx(gini_index(torch.tensor(counts[::-1])*times), nan_ok=True)
    assert math.isnan(found) or 0 <= found <= 1 + 1e-12


@settings(max_examples=50, deadline=None)
@given(st.sets(pairs_of(12, 8), max_size=60),
       st.lists(st.permutations(range(1, 9)), min_size=1, max_size=6), st.integers(1, 8))
def test_diversity_is_that_of_a_loop_over_pairs(pairs, orders, k):
    rec = recommender(pairs, range(12), range(8))
    lists = torch.tensor([o[:k] + [0]*2 for o in orders])
    fans = {i: {u for u, j in pairs if j == i} for i in range(1, 9)}
    expected = [1 - np.mean([len(fans[i] & fans[j])/max(1, len(fans[i])*len(fans[j]))**.5
                             for i, j in combinations(o[:k], 2)]) if k > 1 else math.nan for o in orders]
    assert list_diversity(lists, rec.seen, 9).tolist() == pytest.approx(expected, nan_ok=True, abs=1e-12)
    assert list_diversity(lists.flip(1), rec.seen, 9).tolist() == pytest.approx(expected, nan_ok=True, abs=1e-12)


@pytest.mark.parametrize('odd, found', [(['ndcg', 'auc'], r"\['auc'\]"), ([], 'none'), ('NDCG', r"\['NDCG'\]")])
def test_measures_have_names(odd, found):
    rec, held = some(user=['a', 'b'], title=['y', 'z'])
    with pytest.raises(ValueError, match=rf"measures are some of \['precision', .*'gini'\], found {found}"):
        evaluate_ranking(rec, 2, ratings=held, measures=odd)
    everything = evaluate_ranking(rec, 2, ratings=held)
    pd.testing.assert_frame_equal(evaluate_ranking(rec, 2, ratings=held, measures=('mrr', 'coverage')),
                                  everything.loc[['mrr', 'coverage']])
    assert evaluate_ranking(rec, 2, ratings=held, measures='diversity').index.tolist() == ['diversity']
