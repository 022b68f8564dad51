"Odd input to public functions: each gives the right result, or is refused with what was expected, found, and to do"
import math
import re
import warnings
from decimal import Decimal

import numpy as np
import pandas as pd
import polars
import pyarrow as pa
import pytest
import torch

from collab_deep.data.duplicates import merge_pairs
from collab_deep.data.files import read_ratings
from collab_deep.data.loaders import RatingsDataLoaders
from collab_deep.data.splits import TimeSplitter, split_rows
from collab_deep.lists.evaluate import evaluate_ranking
from collab_deep.lists.fold_in import fold_in
from collab_deep.lists.recommend import predict_pairs, recommend
from collab_deep.train.continued import partial_fit
from collab_deep.train.fit import fit_model
from collab_deep.use.explain import cosines, similar_items

rng = np.random.default_rng(0)
BASE = pd.DataFrame([(u, i, float(rng.integers(1, 6)), 1000 + 10*u + i) for u in range(1, 21)
                     for i in rng.choice(15, 8, replace=False) + 1], columns=['user', 'item', 'rating', 'timestamp'])
ROWS = list(zip(BASE.user, BASE['item'], BASE.rating))
TEXT = BASE.astype(dict(user=str))


def loaders(df, **kwargs):
    return RatingsDataLoaders.from_df(df, **{'seed': 0, 'device': 'cpu', 'valid_pct': 0, **kwargs})


def named(dls):
    "All rows with their ids, in order"
    x, y = dls.ratings_of('train')
    users, items = dls.classes[dls.user], dls.classes[dls.item]
    return [(users[u], items[i], r) for (u, i), r in zip(x.tolist(), y.tolist())]


def same_rows(df, user=lambda o: o, rating=lambda o: o):
    "Do loaders of `df` hold the rows of `BASE`, with ids and ratings that became others?"
    return sorted(named(loaders(df)), key=str) == sorted(((user(u), i, rating(r)) for u, i, r in ROWS), key=str)


@pytest.fixture(scope='module')
def learn(): return fit_model(loaders(BASE), 'ials', 2, n_factors=4)


# --- tables -----------------------------------------------------------------------------------------------------------
def read_only():
    columns = {name: BASE[name].to_numpy(copy=True) for name in BASE}
    for o in columns.values(): o.flags.writeable = False
    return pd.DataFrame(columns, copy=False)


@pytest.mark.parametrize('df', [
    BASE.set_axis([0]*len(BASE)), read_only(), BASE.astype(object), BASE.astype(dict(user=float)),
    BASE.astype(dict(user='Int64', rating='Int64')),
    BASE.astype(dict(user='int64[pyarrow]', rating='float64[pyarrow]')),
    BASE.assign(user=pd.Categorical(BASE.user, categories=range(99))), BASE.assign(rating=pd.Categorical(BASE.rating)),
    BASE.assign(rating=[Decimal(int(o)) for o in BASE.rating]), polars.from_pandas(BASE), pa.Table.from_pandas(BASE),
    BASE.sample(frac=1, random_state=0)], ids=range(12))
def test_the_same_table_in_other_shapes(df): assert same_rows(df)


@pytest.mark.parametrize('change, user', [
    (lambda u: u + 2**62, lambda u: u + 2**62), (lambda u: -u, lambda u: -u), (lambda u: u - 1, lambda u: u - 1),
    (lambda u: (u + 2**62).astype('uint64') + np.uint64(2**62), lambda u: u + 2**63),
    (lambda u: pd.Series([2**70 + int(o) for o in u]), lambda u: u + 2**70),
    (lambda u: u.astype(str).astype('string[pyarrow]'), str),
    (lambda u: ' ' + u.astype(str) + ' ', lambda u: f' {u} ')])
def test_ids_stay_what_they_are(change, user):
    df = BASE.assign(user=change(BASE.user))
    assert same_rows(df, user)
    learn = fit_model(loaders(df), 'ease', config=dict(reg=50.))
    plain = fit_model(loaders(BASE), 'ease', config=dict(reg=50.))
    assert recommend(learn, user(3), 4)['item'].tolist() == recommend(plain, 3, 4)['item'].tolist()


def test_booleans_are_ones_and_zeros():
    thumbs = BASE.assign(rating=BASE.rating > 3)
    with pytest.warns(UserWarning, match='values of rating are 0'): dls = loaders(thumbs)
    assert sorted(dls.ratings_of('train')[1].tolist()) == sorted((BASE.rating > 3).astype(float))
    assert (dls.y_min, dls.y_max) == (0, 1)


@pytest.mark.parametrize('change, kind, said', [
    (dict(rating=math.nan), ValueError, 'values of rating are not finite'),
    (dict(rating=math.inf), ValueError, 'values of rating are not finite'),
    (dict(rating=1e308), ValueError, 'too large for float32 .* so scale them'),
    (dict(rating='4'), TypeError, "found text, as in '4': convert it"), (dict(rating='4,5'), TypeError, "found '4,5'"),
    (dict(rating=4 + 0j), TypeError, 'should hold numbers'), (dict(user=None), ValueError, 'rows have no user'),
    (dict(user=1.5), TypeError, 'an id is text or a whole number'), (dict(user=2.**60), TypeError, r'below 2\*\*53'),
    (dict(user='#na#'), ValueError, 'stands for ids that are not known'), (dict(user=' '), ValueError, 'is no id')])
def test_columns_that_mean_nothing(change, kind, said):
    with pytest.raises(kind, match=said): loaders(BASE.assign(**change))


@pytest.mark.parametrize('users, said', [
    (['e\u0301', 'é'], r'write them in one form'), (['u', 'u '], 'take the spaces off'),
    (['u', 'u\xa0'], 'take the spaces'),
    (['\ufeffu', 'u'], 'take out what has no width'), (['u\u200b', 'u'], 'take out what has no width')])
def test_ids_that_look_the_same(users, said):
    df = BASE.assign(user=[users[i % 2] if u == 1 else f'v{u}' for i, u in enumerate(BASE.user)])
    with pytest.raises(ValueError, match='which would be two: .*' + said) as e: loaders(df)
    [mended] = re.findall(r"as with ratings\['user'\](.*)", str(e.value))
    df['user'] = eval('users' + mended, dict(users=df.user))                     # what is advised, done
    assert loaders(df).n_users == 21


def test_a_user_in_another_spelling_is_none_of_training():
    learn = fit_model(loaders(TEXT), 'ease')
    with pytest.raises(KeyError, match='no width'): recommend(learn, '\ufeff3')
    for odd in (3, 3., True, '3 ', None, math.nan, b'3'):
        with pytest.raises((KeyError, TypeError), match='3|True|None|nan'): recommend(learn, odd)


@pytest.mark.parametrize('users, said', [
    ([1, '1'], r"mixed types, \['int', 'str'\]"), ([1, 1.], r"mixed types, \['float', 'int'\]"),
    ([1, True], r"mixed types, \['bool', 'int'\]"), ([(1, 0), (2, 0)], 'holds ids of type tuple: convert'),
    ([[1], [2]], 'holds ids of type list: convert')])
def test_ids_of_other_types(users, said):
    df = BASE.assign(user=pd.Series([users[i % 2] for i in range(len(BASE))], dtype=object))
    with pytest.raises(TypeError, match=said): loaders(df)


@pytest.mark.parametrize('df, said', [
    (BASE[:0], 'at least one rating, found an empty frame'), (BASE[:1], 'at least 2 different values of user'),
    (BASE[BASE.user == 1], 'at least 2 different values of user'),
    (BASE[BASE['item'] == 3], 'at least 2 different values of item')])
def test_too_little_to_compare(df, said):
    with pytest.raises(ValueError, match=said): loaders(df)


@pytest.mark.parametrize('name', ['auto', 'softmax', 'bpr', 'dot'])
def test_ratings_that_are_all_equal_are_interactions(name, capsys):
    equal, taken = BASE.assign(rating=3.), BASE[['user', 'item']]
    lists = [recommend(fit_model(loaders(o), name, 1), [1, 2], 5) for o in (equal, taken)]
    pd.testing.assert_frame_equal(*lists)


# --- times ------------------------------------------------------------------------------------------------------------
def test_times_of_a_zone_are_in_order():
    when = pd.to_datetime(BASE.timestamp, unit='D', utc=True)
    plain, *zones = (loaders(BASE.assign(timestamp=o), splits=TimeSplitter())
                     for o in (BASE.timestamp, when, when.dt.tz_convert('Asia/Tokyo')))
    for o in zones: assert o.valid_ds.x.tolist() == plain.valid_ds.x.tolist()
    with pytest.raises(TypeError, match='convert it, as with pd.to_datetime'):
        loaders(BASE.assign(timestamp=when.astype(str)), splits=TimeSplitter())
    with pytest.raises(ValueError, match='1 rows have no timestamp, the first is row 2'):
        loaders(BASE.assign(timestamp=when.where(BASE.index != 2)), splits=TimeSplitter())


def test_the_last_of_a_pair_by_a_time_that_is_named():
    df = pd.DataFrame(dict(user=[1, 1, 1, 2], item=[5, 5, 5, 5], rating=[1., 2, 3, 4], timestamp=[1, 2, 3, 4],
                           seen=[7, 9, 8, 1]))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        last = [merge_pairs(df, 'user', 'item', 'rating', 'last', time=o).rating.tolist() for o in ('seen', None)]
    assert last == [[2, 4], [3, 4]]
    assert "by the column 'seen'" in str(said[0].message) and "by the column 'timestamp'" in str(said[1].message)
    with pytest.raises(ValueError, match="'when'"): merge_pairs(df, 'user', 'item', 'rating', 'last', time='when')
    with pytest.raises(ValueError, match='have no seen'):
        merge_pairs(df.assign(seen=[7, None, 8, 1]), 'user', 'item', 'rating', 'last', time='seen')


# --- numbers that choose ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize('odd', [-1, 0, 2., True, '3', None, math.nan])
def test_a_list_has_a_length(learn, odd):
    for f in (lambda: recommend(learn, 1, odd), lambda: evaluate_ranking(learn, odd)):
        with pytest.raises(ValueError, match=f'a positive integer; found {odd!r}'): f()


def test_more_than_the_catalogue(learn):
    seen = set(BASE['item'][BASE.user == 1])
    assert set(recommend(learn, 1, 999)['item']) == set(range(1, 16)) - seen
    assert len(recommend(learn, 1, 10**9, exclude_seen=False)) == 15


@pytest.mark.parametrize('odd', ['a', 1.5, True, 2**64, -2**63 - 1])
def test_seeds(learn, odd):
    for f in (lambda: loaders(BASE, seed=odd, valid_pct=.2), lambda: fit_model(learn.dls, 'ials', 1, seed=odd),
              lambda: partial_fit(learn, BASE[:2], seed=odd)):
        with pytest.raises(ValueError, match=re.escape(f'of up to 64 bits, or None; found {odd!r}')): f()


def test_seeds_that_are_fine():
    for seed in (-1, 2**40, np.int64(7), None): assert len(loaders(BASE, seed=seed, valid_pct=.2).valid_ds) == 32


@pytest.mark.parametrize('odd', [-1, 1.5, '2', True])
def test_epochs_after_new_rows(learn, odd):
    with pytest.raises(ValueError, match='an integer of 0 or more; found'): partial_fit(learn, BASE[:2], epochs=odd)


@pytest.mark.parametrize('odd', ['1', None, math.nan])
def test_how_many_ratings_an_item_needs(learn, odd):
    with pytest.raises(ValueError, match='min_ratings is how many'): similar_items(learn, 1, min_ratings=odd)


def test_row_numbers_of_a_split():
    mask = np.arange(len(BASE)) < 100
    for odd in (mask, list(mask), np.arange(4) + .5, ['1', '2'], np.array([1, .5], dtype=object)):
        with pytest.raises(TypeError, match='splits gives row numbers, integers'): split_rows(BASE, (odd, [150]))
    for fine in (np.flatnonzero(mask), range(100), torch.arange(100), np.arange(100, dtype=object),
                 pd.Index(range(100))):
        train, valid = split_rows(BASE, (fine, []))
        assert train.tolist() == list(range(100)) and valid.tolist() == []


# --- users, items and what someone took -------------------------------------------------------------------------------
def test_users_in_any_list(learn):
    right = recommend(learn, [1, 2], 3)
    fixed = np.array([1, 2])
    fixed.flags.writeable = False
    for users in ((1, 2), fixed, torch.tensor([1, 2]), pd.Index([1, 2]), pd.Categorical([1, 2]), range(1, 3),
                  iter([1, 2]), {1: 0, 2: 0}.keys(), polars.Series([1, 2]), pd.Series([1, 2])):
        pd.testing.assert_frame_equal(recommend(learn, users, 3), right)
    floats = recommend(learn, np.array([1., 2.]), 3)
    assert floats['item'].tolist() == right['item'].tolist()
    for nobody in ([], (), np.array([])): assert len(recommend(learn, nobody)) == 0
    for gap in (None, math.nan, pd.NA):
        with pytest.raises(KeyError, match='a row has no user'): recommend(learn, [1, gap])
    with pytest.warns(UserWarning, match='1 of 2 users are not known, 999'): one = recommend(learn, [999, 1], 2)
    assert one.user.tolist() == [999, 1, 1] and one['item'].isna().tolist() == [True, False, False]


def test_items_that_were_taken_in_any_list(learn):
    right = fold_in(learn, [1, 2])
    for taken in ((1, 2), np.array([1, 2]), torch.tensor([1, 2]), {1, 2}, pd.Series([1, 2]), pd.Index([1, 2]),
                  polars.Series([1, 2]), [1, 2, 1], iter([1, 2])):
        torch.testing.assert_close(fold_in(learn, taken), right)
    for odd in (1, None, 1.5, torch.tensor(1), np.int64(1), 'x', BASE):
        with pytest.raises(TypeError, match='expected a list of item'): fold_in(learn, odd)
    for odd, kind in (([(1, 5.)], TypeError), ({math.nan: 5.}, ValueError), ({99: 5.}, KeyError), (['1'], TypeError),
                      ([[1, 2]], TypeError)):
        with pytest.raises(kind): fold_in(learn, odd)


def test_true_is_no_number_of_stars(learn):
    with pytest.raises(ValueError, match='from 1 to 5, found True for 3, which would be 1'): fold_in(learn, {3: True})
    for column in (True, pd.Series([True, False], dtype=object)):
        with pytest.raises(ValueError, match='new ones are True or False'):
            partial_fit(learn, BASE[:2].assign(rating=column))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        thumbs = fit_model(loaders(BASE.assign(rating=BASE.rating > 3)), 'ials', 1, n_factors=2)
        torch.testing.assert_close(fold_in(thumbs, {3: True, 4: False}), fold_in(thumbs, {3: 1, 4: 0}))
        assert partial_fit(thumbs, BASE[:2].assign(rating=True), epochs=0).dls.y_max == 1


def test_pairs_of_a_table(learn):
    assert len(predict_pairs(learn, BASE[:0])) == 0
    twice = predict_pairs(learn, BASE.set_axis([0]*len(BASE)))
    assert twice.tolist() == predict_pairs(learn, BASE).tolist() and set(twice.index) == {0}
    with pytest.raises(TypeError, match='give a DataFrame'): predict_pairs(learn, BASE.user, BASE['item'])


# --- files ------------------------------------------------------------------------------------------------------------
def test_names_of_a_file_in_all_forms(tmp_path):
    (tmp_path/'bare.csv').write_text('1,31,2.5\n1,1029,3\n')
    for header in (['user', 'item', 'rating'], ('user', 'item', 'rating'), 'user,item,rating', ' user, item ,rating'):
        found = read_ratings(tmp_path/'bare.csv', header=header)
        assert list(found) == ['user', 'item', 'rating'] and found.values.tolist() == [[1, 31, 2.5], [1, 1029, 3]]
    (tmp_path/'year.csv').write_text('who,what,2020\n1,31,2.5\n')
    assert read_ratings(tmp_path/'year.csv', header=True).to_dict('list') == {'who': [1], 'what': [31], '2020': [2.5]}
    with pytest.raises(ValueError, match='or say header=True if these are names'): read_ratings(tmp_path/'year.csv')
    for odd in (False, 0, 1, ['user', 1]):
        with pytest.raises(TypeError, match='header is a list of names'): read_ratings(tmp_path/'bare.csv', header=odd)
    for odd in ('', [], 'user,user,rating', 'user,,rating'):
        with pytest.raises(ValueError, match='a name of its own'): read_ratings(tmp_path/'bare.csv', header=odd)
    with pytest.raises(ValueError, match='names 2 columns, and the first line has 3'):
        read_ratings(tmp_path/'bare.csv', header='user,item')


# --- cosines, a block at a time ---------------------------------------------------------------------------------------
@pytest.mark.parametrize('n, width, size', [(7, 3, 1.), (50, 2**16, 1e30), (9, 2**17 + 1, 1e-30), (1, 1, 1.)])
def test_cosines_in_blocks(n, width, size):
    factors = torch.randn(n, width, generator=torch.Generator().manual_seed(n))*size
    if n > 5: factors[5] = 0
    found, x = cosines(factors, 0), factors.double().numpy()
    norms = np.sqrt((x**2).sum(1))
    right = [0 if not o else (x[0]*row).sum()/norms[0]/o for row, o in zip(x, norms)]
    np.testing.assert_allclose(found.numpy(), right, atol=1e-6)
    assert cosines(factors.T.contiguous().T, 0).tolist() == pytest.approx(found.tolist())
