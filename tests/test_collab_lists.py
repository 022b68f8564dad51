"Lists from learners and recommenders under attack: cold ids, newcomers, unknown users, odd filters, and what is kept"
import gc
import math
import re
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from collab_deep.data.loaders import RatingsDataLoaders
from collab_deep.lists.check import check_recommender
from collab_deep.lists.evaluate import evaluate_ranking
from collab_deep.lists.fold_in import fold_in
from collab_deep.lists.recommend import frozen_recommender, predict_pairs, recommend
from collab_deep.lists.recommender import as_recommender
from collab_deep.models.dot import DotProduct, DotProductBias
from collab_deep.models.factor import FactorModel
from collab_deep.train.learner import collab_deep_learner
from collab_deep.use.save import load_recommender, save_recommender
from fastai.learner import load_learner
from small_recommender import MODELS, recommender

PAIRS = [(1, 1), (1, 2), (1, 3), (2, 2)]  # the first user has rated everything


def small(make=MODELS[1], items=('x', 'y', 'z')): return recommender(PAIRS, ['a', 'b'], items, make)

def quietly(f, *args, **kwargs):
    "What `f` gives, and the messages of its warnings"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        res = f(*args, **kwargs)
    return res, [str(o.message) for o in said]


# --- ids known by features alone --------------------------------------------------------------------------------------
def with_cold(n_users, n_items, seed=0, y_range=None, cold_users=('new',), cold_items=('v', 'w')):
    "A recommender of users a0, a1... and items i0, i1..., each side with two features and cold ids"
    torch.manual_seed(seed)
    def make(u, i):
        model = FactorModel(u, i, 3, y_range, 3., n_user_features=2, n_item_features=2, cold_users=list(cold_users),
                            cold_items=list(cold_items), std=1.)
        for name, o in model.named_buffers(): o.copy_(torch.randn(o.shape))
        model.fill_unknown()
        return model.eval()
    pairs = {(1 + n % n_users, 1 + n*7 % n_items) for n in range(n_users)}
    return recommender(pairs, [f'a{n}' for n in range(n_users)], [f'i{n}' for n in range(n_items)], make, seed), pairs


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 99), st.sampled_from([None, (0, 5.5)]), st.booleans())
def test_lists_hold_all_items_by_score(n_users, n_items, seed, y_range, exclude_seen):
    "For every user, known or cold: each list is all items in the order of `predict_pairs`, which scores pair by pair"
    rec, pairs = with_cold(n_users, n_items, seed, y_range)
    everything = [*rec.items[1:], 'v', 'w']
    for u, user in enumerate([*rec.users[1:], 'new'], 1):
        found = recommend(rec, user, 99, exclude_seen=exclude_seen)
        seen = {rec.items[i] for v, i in pairs if v == u} if exclude_seen else set()
        assert sorted(found['item']) == sorted(set(everything) - seen)
        alone = [predict_pairs(rec, user, o) for o in found['item']]
        assert found.score.tolist() == pytest.approx(alone, abs=1e-4)
        assert found.score.is_monotonic_decreasing


def test_cold_items_pass_filters_and_blocks(monkeypatch):
    rec, _ = with_cold(4, 6)
    users = [*rec.users[1:], 'new']
    assert set(recommend(rec, users, filter={'w', 'i2', 'nobody knows this'})['item']) == {'w', 'i2'}
    assert recommend(rec, 'new', filter=lambda o: o == 'v')['item'].tolist() == ['v']
    asked = []
    recommend(rec, 'a0', filter=lambda o: asked.append(o) is None)
    assert asked == [*rec.items[1:], 'v', 'w'], 'each item is asked about once, the place of unknown ones is none'
    for o in (users, users[::-1], ['new', 'a0', 'new']):  # wherever those who have seen nothing stand
        found = recommend(rec, o, 99)
        assert [(u, i) for u, i in zip(found.user, found['item'])] == [
            (u, i) for u in o for i in recommend(rec, u, 99)['item']]
    whole = recommend(rec, users, 5)
    monkeypatch.setattr('collab_deep.lists.top._scores_in_a_block', 5)
    pd.testing.assert_frame_equal(recommend(rec, users, 5), whole, check_exact=False, rtol=1e-5)
    assert whole.user.drop_duplicates().tolist() == users


def test_newcomers_are_shown_cold_items():
    rec, _ = with_cold(4, 6)
    for taken, features in (({'i1': 5., 'i2': 1.}, None), ({'i1'}, None), (frozenset({'i1'}), None), ({}, [1., 2]),
                            ({'i3': 2.}, np.array([0, 1]))):
        found = recommend(rec, taken, 99, features=features)
        assert set(found['item']) == {*rec.items[1:], 'v', 'w'} - set(taken)
        row = fold_in(rec, taken, features)
        with torch.no_grad():
            v = rec.model.rows_with_cold('item')
            by_hand = row[:-1] @ v[:, :-1].T + row[-1] + v[:, -1] + rec.model.mean
        scores = dict(zip([*rec.items, 'v', 'w'], by_hand.tolist()))
        assert found.score.tolist() == pytest.approx([scores[o] for o in found['item']], abs=1e-4)
    one, other = (recommend(rec, {}, 99, features=o).score for o in ([1., 2], [5., 2]))
    assert (one - other).abs().max() > .01
    with pytest.raises(ValueError, match='features are for someone new'): recommend(rec, 'a0', features=[1., 2])


def test_cold_ids_are_saved(tmp_path):
    rec, _ = with_cold(4, 6)
    save_recommender(rec, tmp_path)
    again = load_recommender(tmp_path)
    for users in (['a0', 'new'], {'i1': 4.}):
        pd.testing.assert_frame_equal(recommend(again, users, 99), recommend(rec, users, 99))
    check_recommender(again)
    save_recommender(frozen_recommender(rec), tmp_path)
    pd.testing.assert_frame_equal(recommend(load_recommender(tmp_path), 'new', 99), recommend(rec, 'new', 99))


def test_measures_are_those_without_cold_ids():
    rec, _ = with_cold(4, 6)
    held = pd.DataFrame(dict(user=['a0', 'a1', 'a2'], title=['i3', 'i4', 'i5'], rating=[5., 4, 3]))
    bare, _ = with_cold(4, 6, cold_users=(), cold_items=())
    own = {name: o for name, o in rec.model.state_dict().items() if not name.startswith('cold_')}
    bare.model.load_state_dict(own, strict=False)
    pd.testing.assert_frame_equal(evaluate_ranking(rec, 3, ratings=held), evaluate_ranking(bare, 3, ratings=held))


def test_an_own_model_with_cold_ids_lists_those_of_training():
    class Announces(DotProduct):
        "Scores pairs with an id that has no row for lists"
        cold = (), ['w']

    rec = small(lambda u, i: Announces(u, i, 3))
    for stock in (None, {'x', 'z', 'w'}): assert set(recommend(rec, 'b', 9, filter=stock)['item']) == {'x', 'z'}


# --- what is kept of a learner ----------------------------------------------------------------------------------------
ROWS = pd.DataFrame(dict(user=np.arange(60) % 6, item=np.arange(60)*7 % 11, rating=1. + np.arange(60) % 5))

def learner(rows=ROWS, **kwargs):
    dls = RatingsDataLoaders.from_df(rows, valid_pct=0., bs=16, device='cpu')
    torch.manual_seed(0)
    return collab_deep_learner(dls, 3, **kwargs)

def train(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .05)

def as_from_nothing(learn, users=(3, 5), **kwargs):
    "`recommend` with a recommender that shares nothing with the one before"
    rec = as_recommender(type('Fresh', (), dict(model=learn.model, dls=learn.dls, ranks=learn.ranks))())
    return recommend(rec, users, 99, **kwargs)

def is_as_from_nothing(learn, **kwargs):
    pd.testing.assert_frame_equal(recommend(learn, (3, 5), 99, **kwargs), as_from_nothing(learn, **kwargs))


@pytest.mark.parametrize('model', [None, 'factor'])
def test_lists_follow_training_and_what_is_replaced(model):
    learn = learner(model=model)
    before = recommend(learn, 0, 99)
    is_as_from_nothing(learn)
    train(learn)
    after = recommend(learn, 0, 99)
    assert not np.allclose(before.score.sort_values(), after.score.sort_values()), 'training changes the scores'
    is_as_from_nothing(learn)
    learn.model.load_state_dict({name: torch.zeros_like(o) if o.is_floating_point() else o
                                 for name, o in learn.model.state_dict().items()})
    is_as_from_nothing(learn)
    assert recommend(learn, 0, 99).score.nunique() == 1
    learn.model = DotProductBias(learn.dls.n_users, learn.dls.n_items, 2, std=1.)
    is_as_from_nothing(learn)
    other = ROWS.assign(user=ROWS.user + 3, item=ROWS.item*2)
    learn.dls = RatingsDataLoaders.from_df(other, valid_pct=0., bs=16, device='cpu')
    is_as_from_nothing(learn)
    assert set(recommend(learn, 8, exclude_seen=False)['item']) <= set(other['item'])
    with pytest.raises(KeyError): recommend(learn, 0)


def test_a_model_with_cold_ids_replaces_one_without():
    learn = learner()
    assert set(recommend(learn, 0, 99, exclude_seen=False)['item']) == set(ROWS['item'])
    learn.model = FactorModel(learn.dls.n_users, learn.dls.n_items, 2, n_item_features=1, cold_items=[99])
    assert set(recommend(learn, 0, 99, exclude_seen=False)['item']) == {*ROWS['item'], 99}
    learn.model = DotProduct(learn.dls.n_users, learn.dls.n_items, 2)
    assert set(recommend(learn, 0, 99, exclude_seen=False)['item']) == set(ROWS['item'])


def test_counts_follow_tensors_that_are_written_to():
    learn = learner()
    counts = as_recommender(learn).item_counts
    assert as_recommender(learn).item_counts is counts, 'ratings are counted once'
    data = learn.dls.train.dataset
    data.x[:, 1] = 1
    assert as_recommender(learn).item_counts[1] == len(ROWS)
    data.x = data.x.clone()
    data.x[0, 1] = 2
    assert as_recommender(learn).item_counts[:3].tolist() == [0, len(ROWS) - 1, 1]


def test_what_one_is_told_another_is_not():
    learn = learner()
    one, other = as_recommender(learn), as_recommender(learn)
    one.ranks, one.rating, one.mean = 'changed', 'changed', 'changed'
    for o in (other, as_recommender(learn)): assert (o.ranks, o.rating, o.mean) == (False, 'rating', ROWS.rating.mean())


def test_a_learner_that_was_read_is_exported_and_forgotten(tmp_path):
    learn = learner()
    learn.path = tmp_path
    expected = recommend(learn, [0, 3])
    learn.export('learn.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        again = load_learner(tmp_path/'learn.pkl')
    gone = [weakref.ref(o) for o in (learn, learn.model, learn.dls)]
    del learn
    gc.collect()
    assert [o() for o in gone] == [None]*3
    assert len(expected) and again.dls is not None


def test_threads_read_one_learner():
    learn = learner(model='factor')
    users = [*range(6)]*20
    expected = {u: recommend(as_recommender(learn), u, 5) for u in range(6)}
    fresh = learner(model='factor')
    with ThreadPoolExecutor(8) as pool:
        for u, found in zip(users, pool.map(lambda u: recommend(fresh, u, 5), users)):
            pd.testing.assert_frame_equal(found, expected[u])


@pytest.mark.parametrize('make', MODELS + [lambda u, i: FactorModel(u, i, 3, n_item_features=1, cold_items=[99])])
def test_a_frozen_recommender_stays_as_it_was(make, monkeypatch):
    learn = learner()
    learn.model = make(learn.dls.n_users, learn.dls.n_items)
    learn.model.fill_unknown()
    asked = [lambda o: recommend(o, [0, 3], 99), lambda o: recommend(o, {0: 4.}, 99), lambda o: recommend(o, {0}, 99),
             lambda o: predict_pairs(o, ROWS[:9]), lambda o: pd.Series(fold_in(o, {}).numpy())]
    frozen, expected = frozen_recommender(learn), [f(learn) for f in asked]
    with torch.no_grad():
        for o in learn.model.parameters(): o.add_(1.)
    work_out = FactorModel.work_out_table
    monkeypatch.setattr(FactorModel, 'work_out_table', lambda *_: pytest.fail('tables are worked out again'))
    for f, was in zip(asked, expected): assert f(frozen).equals(was)
    monkeypatch.setattr(FactorModel, 'work_out_table', work_out)
    assert not np.allclose(asked[3](learn), expected[3])


def test_who_has_no_weak_reference_is_read_all_the_same():
    class Slots:
        "A learner of another kind"
        __slots__ = 'model', 'dls'

    learn, slots = learner(), Slots()
    slots.model, slots.dls = learn.model, learn.dls
    pd.testing.assert_frame_equal(recommend(slots, [0, 3]), recommend(learn, [0, 3]))


def test_rows_for_unknown_ids_are_average_where_they_are_read():
    "Lists of known users leave the model as it is; newcomers and strangers see the average rows"
    learn = learner()
    with torch.no_grad(): learn.model.users.weight[0] = learn.model.items.weight[0] = 50.
    plain = recommend(learn, 0, 99)
    filled = as_recommender(learn)
    assert filled.model is not learn.model
    pd.testing.assert_frame_equal(plain, recommend(filled, 0, 99))
    pd.testing.assert_frame_equal(recommend(learn, {0: 4.}), recommend(filled, {0: 4.}))
    assert predict_pairs(learn, 999, 0) == predict_pairs(filled, 999, 0)
    found, _ = quietly(recommend, learn, [0, 999], 99)
    assert found['item'].isna().sum() == 1


# --- who it is for ----------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(['a', 'b', 'c', 'nobody', 'neither']), max_size=8), st.integers(1, 4))
def test_unknown_users_among_others(users, k):
    "Every list is that of the user alone, in the order asked for; who is not known has one row of missing values"
    known = 'a', 'b', 'c'
    rec = recommender([(1, 1), (2, 2), (2, 3)], known, ['x', 'y', 'z'])
    if users and not set(users) & set(known):
        with pytest.raises(KeyError, match='is not among the 3 in training'): recommend(rec, users, k)
        return
    found, said = quietly(recommend, rec, users, k)
    expected = [(u, o) for u in users for o in (recommend(rec, u, k)['item'] if u in known else [None])]
    assert [(u, None if pd.isna(o) else o) for u, o in zip(found.user, found['item'])] == expected
    assert (found.score.isna() == found['item'].isna()).all()
    strangers = {*users} - {*known}
    assert len(said) == bool(strangers) and all(repr(o) in said[0] for o in strangers)
    if strangers: assert said[0].startswith(f'{len(strangers)} of {len(users)} users are not known')


def test_ids_stay_what_they_were_beside_a_stranger():
    rec = recommender([(1, 1)], [1, 2], [10, 20, 30])
    found, _ = quietly(recommend, rec, [2, 7, 1], 2)
    assert found['item'].dropna().map(type).eq(int).all() and found.user.tolist() == [2, 2, 7, 1, 1]


def test_a_warning_stands_where_lists_were_asked_for():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        recommend(small(), ['b', 'c'])
    assert [o.filename for o in said] == [__file__]


@pytest.mark.parametrize('odd, error', [
    ('1', KeyError), (None, KeyError), (math.nan, KeyError), (pd.NA, KeyError), (pd.NaT, KeyError), (True, TypeError),
    ([1], TypeError), ({1: 5}, TypeError), ({1}, TypeError)])
@pytest.mark.parametrize('beside', [[], [1], [7], [1, 7]])
def test_an_id_in_another_shape_is_no_stranger(odd, error, beside):
    rec = recommender([(1, 1)], [1, 2], [10, 20, 30])
    with pytest.raises(error): recommend(rec, [*beside, odd])
    with pytest.raises(error): recommend(rec, [odd, *beside])


@pytest.mark.parametrize('users', [
    pd.Series({50: 5, 172: 4}), pd.Series({50: 5, 172: 4, 9: 3}), pd.Series([5., 4], index=['x', 'y']),
    pd.Series([1, 2], index=[3, 1]), pd.Series([1, 2], index=[1, 2], name='rating'),
    pd.Series([1, 2], dtype=object, index=[3, 7]), pd.Series([1, 2], dtype='Int64', index=[3, 7])], ids=str)
def test_a_series_that_may_be_ratings_is_refused(users):
    rec = recommender([(1, 1)], [1, 2, 4, 5], [50, 172, 9])
    with pytest.raises(TypeError, match=re.escape('dict(series) for the second')): recommend(rec, users)
    with pytest.raises(TypeError, match=re.escape('dict(series) for the second')): fold_in(rec, users)
    ratings = dict(pd.Series({50: 5, 172: 4}))
    pd.testing.assert_frame_equal(recommend(rec, ratings), recommend(rec, {50: 5, 172: 4}))


def test_columns_are_lists_of_users():
    rec = recommender([(1, 1)], [1, 2], [10, 20, 30])
    df = pd.DataFrame(dict(user=[1, 2, 1, 2], score=[1, 5, 5, 1]))
    expected = recommend(rec, [2, 1])
    for users in (df[df.score > 4].user, df[df.score > 4].user.reset_index(drop=True).rename(None),
                  df[df.score > 4].user.to_numpy(), torch.tensor([2, 1]), pd.Index([2, 1]), (2, 1), {2: 0, 1: 0}.keys(),
                  pd.Series([2, 1]), pd.Series([2, 1], dtype='Int64'), pd.Series([2, 1]).astype('category')):
        pd.testing.assert_frame_equal(recommend(rec, users), expected)
    for one in (2, np.int64(2), np.array(2), torch.tensor(2), 2.): assert list(recommend(rec, one)) == ['item', 'score']
    for frame in (df, df[['user']]):
        with pytest.raises(TypeError, match=re.escape("give one of them, as in df['user']")): recommend(rec, frame)


# --- filters ----------------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(1, 9)), st.sets(st.integers(20, 29), max_size=3), st.sampled_from(
    [list, set, tuple, np.array, pd.Series, pd.Index, torch.tensor, frozenset, dict.fromkeys]))
def test_a_filter_lets_what_it_holds_through(stock, unknown, kind):
    rec = recommender([(1, 1), (1, 2)], ['a', 'b'], range(1, 10))
    given_as = kind(sorted(stock | unknown)) if stock | unknown else []
    if not stock:
        said = 'filter lets none of the 9 of title through|filter holds no item that is known'
        with pytest.raises(ValueError, match=said): recommend(rec, 'a', filter=given_as)
        return
    assert set(recommend(rec, 'a', filter=given_as)['item']) == stock - {1, 2}
    by_function = recommend(rec, 'a', filter=lambda o: o in stock)
    pd.testing.assert_frame_equal(recommend(rec, 'a', filter=given_as), by_function)


ITEMS = pd.Series(range(1, 4))

@pytest.mark.parametrize('filter, error, said', [
    (ITEMS % 2 == 0, TypeError, 'this one holds True or False: give the items that are meant, as in items[mask]'),
    ((ITEMS % 2 == 0).to_numpy(), TypeError, 'True or False'), ([True, False, True], TypeError, 'True or False'),
    (pd.Series([True, None, False], dtype='boolean'), TypeError, 'True or False'),
    (torch.tensor([True, False, True]), TypeError, 'True or False'), ({1: True, 2: False}, TypeError, 'True or False'),
    (['1', '2'], TypeError, "title '1' is text, and those in training are a number"),
    ([1, '2'], TypeError, "title '2' is text"), ([1, math.nan], ValueError, 'a row has no title'),
    ([1, None], ValueError, 'a row has no title'), ([[1]], TypeError, 'expected an id of title, found list'),
    ([4, 5], ValueError, 'filter holds no item that is known: title 4 is not among the 3 in training'),
    ([], ValueError, 'filter lets none of the 3 of title through'), (set(), ValueError, 'none of the 3 of title'),
    (lambda o: False, ValueError, 'none of the 3 of title'), ('1', TypeError, "found str: '1'"),
    (b'1', TypeError, 'found bytes'), (1, TypeError, 'found int: 1'), (ITEMS.to_frame(), TypeError, 'found DataFrame'),
    (iter([1]), TypeError, 'found list_iterator'), (lambda o: None, TypeError, 'of 1 it said None'),
    (lambda o: 'yes', TypeError, "says True or False of an item; of 1 it said 'yes'"),
    (lambda o: o, TypeError, 'of 2 it said 2'), (lambda o: 1., TypeError, 'it said 1.0'),
    ({1: 5}.get, TypeError, 'it said 5'), (lambda o: pd.NA, TypeError, 'it said <NA>'),
    (np.array([[1, 2]]), TypeError, 'expected an id of title, found list')])
def test_a_filter_that_means_nothing_is_refused(filter, error, said):
    rec = recommender(PAIRS, ['a', 'b'], [1, 2, 3])
    for users in ('b', ['a', 'b'], {1: 5.}):
        with pytest.raises(error, match=re.escape(said)): recommend(rec, users, filter=filter)


def test_items_that_are_bools_have_no_masks():
    rec = recommender([(1, 1)], ['a', 'b'], [False, True])
    assert recommend(rec, 'b', filter=[True])['item'].tolist() == [True]


# --- newcomers --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('features, error, said', [
    (pd.Series(dict(age=3, job=4)), TypeError, 'a tensor [2], as a row of encode_features'),
    (dict(age=3), TypeError, 'found dict'), (pd.DataFrame(dict(age=[3])), TypeError, 'found DataFrame'),
    ('cook', TypeError, 'found str'), (['cook', 'baker'], TypeError, 'are numbers'), ([1.], ValueError, 'found [1]'),
    ([1., 2, 3], ValueError, 'are 2 finite numbers, found [3]'), ([[1., 2]], ValueError, 'found [1, 2]'),
    ([1., math.nan], ValueError, 'finite'), (torch.tensor(1.), ValueError, 'found []'), (3., TypeError, 'found float')])
@pytest.mark.parametrize('taken', [{}, {'i1': 4.}, {'i1'}])
def test_features_that_fit_no_column_are_refused(features, error, said, taken):
    rec, _ = with_cold(3, 4)
    for f in (lambda: fold_in(rec, taken, features), lambda: recommend(rec, taken, features=features)):
        with pytest.raises(error, match=re.escape(said)): f()


@pytest.mark.parametrize('make', MODELS)
def test_models_without_features_of_users_take_none(make):
    with pytest.raises(ValueError, match='reads no features of users: leave them out'):
        fold_in(small(make), {'x': 4.}, torch.ones(2))


def test_a_model_that_is_solved_reads_no_features():
    class Solved(DotProduct):
        "Starts from what a newcomer took"
        solves = True
        def new_user(self, items=None, features=None): return self.users.weight[0]

    rec = small(lambda u, i: Solved(u, i, 3))
    with pytest.raises(ValueError, match='this Solved reads no features'): fold_in(rec, {}, [1.])


def test_features_come_as_any_numbers():
    rec, _ = with_cold(3, 4)
    expected = fold_in(rec, {}, torch.tensor([1., 2]))
    for o in ([1, 2], (1., 2), np.array([1, 2]), torch.tensor([1, 2]), torch.tensor([1, 2]).double()):
        assert torch.equal(fold_in(rec, {}, o), expected)


class Formula(DotProduct):
    "A newcomer is the mean of what they took, weighted by the ratings; it ranks, and reads ratings"
    reads_ratings = True
    def solved_row(self, items, ratings=None, weights=None):
        assert items.dtype == torch.int64 and (ratings is None or ratings.is_floating_point())
        return (torch.ones(len(items)) if ratings is None else ratings) @ self.items.weight[items]


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.sampled_from('xyz'), st.floats(-5, 5, width=16), min_size=1), st.booleans())
def test_a_row_that_follows_from_a_formula(ratings, ranks):
    rec = small(lambda u, i: Formula(u, i, 3, std=1.))
    rec.ranks = ranks
    q = rec.model.items.weight.detach()
    rows = [rec.index['title'][o] for o in ratings]
    by_hand = sum(stars*q[row] for stars, row in zip(ratings.values(), rows))
    torch.testing.assert_close(fold_in(rec, ratings), by_hand, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fold_in(rec, list(ratings)), q[rows].sum(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fold_in(rec, {}), rec.model.new_user())
    found = recommend(rec, ratings, 9)
    assert set(found['item']) == {*'xyz'} - {*ratings}
    scores = dict(zip(rec.items, (q @ by_hand).tolist()))
    assert found.score.tolist() == pytest.approx([scores[o] for o in found['item']], abs=1e-4)


def test_a_formula_has_no_decay_and_gives_finite_rows():
    rec = small(lambda u, i: Formula(u, i, 3, std=1.))
    with pytest.raises(ValueError, match='decay=3.0 would change nothing'): fold_in(rec, {'x': 4.}, decay=3.)
    with torch.no_grad(): rec.model.items.weight[1] = math.nan
    with pytest.raises(ValueError, match='no finite row fits'): fold_in(rec, {'x': 4.})


@pytest.mark.parametrize('make', MODELS)
def test_other_models_that_rank_refuse_ratings(make):
    rec = small(make)
    rec.ranks = True
    with pytest.raises(ValueError, match='trained for the order of lists and has no ratings'): fold_in(rec, {'x': 4.})
    assert torch.equal(fold_in(rec, {'x'}), fold_in(rec, {'x'}, decay=10.))


@pytest.mark.parametrize('taken, error', [
    ('x', TypeError), (pd.DataFrame(dict(x=[1])), TypeError), ({'x': math.nan}, ValueError), ({'x': '5'}, ValueError),
    ({'x': None}, ValueError), ({'w': 5.}, KeyError), ({math.nan: 5.}, ValueError), ({None: 5.}, ValueError),
    ([['x']], TypeError), ({'x ': 5.}, ValueError), ({1: 5.}, TypeError)])
def test_odd_tastes(taken, error):
    with pytest.raises(error): fold_in(small(), taken)
