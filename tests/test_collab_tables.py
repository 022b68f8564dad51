"Tables of others: columns by name, weights, frames of other libraries, pairs that come twice, and files of ratings"
import gzip
import uuid
import warnings

import duckdb
import numpy as np
import pandas as pd
import polars
import pyarrow as pa
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collab_deep.data.dataset import RatingsDataset
from collab_deep.data.files import read_ratings
from collab_deep.data.loaders import RatingsDataLoaders, RatingsDL
from collab_deep.data.movielens import movielens_100k, movielens_path
from collab_deep.data.splits import LeaveLastSplitter, TimeSplitter
from collab_deep.train.learner import collab_deep_learner
from paddy_multi.distributed.shares import ShareDL


def all_in_order(df): return range(len(df)), []


def loaders(df, **kwargs):
    "Loaders that train on all rows, in their order"
    return RatingsDataLoaders.from_df(df, **{'device': 'cpu', 'splits': all_in_order, **kwargs})


def named(dls, split='train'):
    "Rows of a split with their ids"
    x, y = dls.ratings_of(split)
    users, items = dls.classes[dls.user], dls.classes[dls.item]
    return [(users[u], items[i], r) for (u, i), r in zip(x.tolist(), y.tolist())]


def said(call):
    "What `call` gives, and the warnings of it"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        return call(), [str(o.message) for o in caught]


@pytest.fixture
def df(): return pd.DataFrame(dict(user=[1, 1, 2, 3], item=[5, 6, 5, 7], rating=[4., 3, 5, 1], timestamp=[3, 4, 2, 1]))


# --- columns ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('names', [
    'userId movieId rating timestamp', 'User-ID ISBN Book-Rating when', 'USER ITEM RATING TS', 'uid iid score time',
    'reviewerID asin overall unixReviewTime', 'user_id:token item_id:token rating:float timestamp:float',
    'customer_id product_id stars date', ' user_id,business_id ,stars,date'])
@settings(deadline=None, max_examples=5)
@given(st.permutations(range(6)))
def test_names_count_and_places_do_not(names, order):
    rows = pd.DataFrame(dict(user=[1, 1, 2, 3], item=[5, 6, 5, 7], rating=[4., 3, 5, 1], timestamp=[3, 4, 2, 1]))
    rows = rows.set_axis(names.split(',' if ',' in names else ' '), axis=1)
    rows = rows.assign(rownames=range(4), order_id=[9, 8, 7, 6])
    assert named(loaders(rows.iloc[:,list(order)])) == [(1, 5, 4), (1, 6, 3), (2, 5, 5), (3, 7, 1)]


@pytest.mark.parametrize('first', ['rownames', 'Unnamed: 0', 'order_id', 'index', 'review_id', 'id'])
def test_numbers_of_rows_are_no_users(df, first):
    rows = df.rename(columns=dict(user='who'))
    rows.insert(0, first, range(4))
    with pytest.raises(ValueError, match='the column of users has no name that is known') as e: loaders(rows)
    assert str(list(rows)) in str(e.value) and 'user_name=, item_name=, rating_name=' in str(e.value)
    assert named(loaders(rows, user_name='who')) == named(loaders(df))


@pytest.mark.parametrize('more, what', [('reviewer', 'users'), ('ASIN', 'items'), ('stars', 'ratings')])
def test_two_of_a_kind_are_refused_and_a_name_decides(df, more, what):
    rows = df.assign(**{more: 1})
    with pytest.raises(ValueError, match=f"the column of {what} could be any of .*{more}"): loaders(rows)
    decided = dict(users=dict(user_name='user'), items=dict(item_name='item'), ratings=dict(rating_name='rating'))
    assert named(loaders(rows, **decided[what])) == named(loaders(df))


def test_an_id_goes_before_a_title(df):
    titled = df.assign(title=list('abac'), user_name=list('xxyz'))
    assert named(loaders(titled)) == named(loaders(df))
    assert [o[1] for o in named(loaders(titled, item_name='title'))] == list('abac')
    names_alone = titled.drop(columns=['user', 'item']).rename(columns=dict(user_name='username'))
    assert [o[:2] for o in named(loaders(names_alone))] == [('x', 'a'), ('x', 'b'), ('y', 'a'), ('z', 'c')]


def test_the_columns_of_movielens_are_as_before():
    dls = loaders(movielens_100k()[:2000])
    assert (dls.user, dls.item, dls.rating) == ('user', 'item', 'rating')


@pytest.mark.parametrize('columns, is_fine', [
    (['user', 'item'], True), (['user', 'item', 'timestamp'], True), (['user', 'item', 'plays'], False),
    (['user', 'item', 'timestamp', 'weight'], False), (['user', 'item', 'title'], False)])
def test_tables_without_ratings(df, columns, is_fine):
    rows = df.assign(plays=1, weight=2, title=list('abac'))[columns]
    assert loaders(rows, implicit=True).rating is None
    if is_fine: assert loaders(rows).ratings_of('train')[1].tolist() == [1.]*4
    else:
        with pytest.raises(ValueError, match='is the table without ratings. Then say implicit=True'): loaders(rows)


@pytest.mark.parametrize('index', [['user'], ['user', 'item']])
def test_names_in_the_index_are_pointed_to(df, index):
    with pytest.raises(ValueError, match=r"The index is called 'user': make it a column with ratings.reset_index\(\)"):
        loaders(df.set_index(index))


def test_one_name_of_two_columns(df):
    with pytest.raises(ValueError, match='could be any of'): loaders(pd.concat([df, df.user], axis=1))
    with pytest.raises(ValueError, match="2 columns are called 'user': rename all but one"):
        loaders(pd.concat([df, df.user], axis=1), user_name='user')


def test_splitters_know_the_same_names(df):
    other = df.set_axis(['customerId', 'sku', 'Stars', 'Date'], axis=1)
    for splitter in (LeaveLastSplitter, TimeSplitter):
        for mine, theirs in zip(splitter()(other), splitter()(df)): assert list(mine) == list(theirs)
    with pytest.raises(ValueError, match='with time_name='): TimeSplitter()(df.drop(columns='timestamp'))


# --- weights ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('value, error, text', [
    (-1, ValueError, 'the first is -1.0 in row 2'), (np.nan, ValueError, 'the first is nan in row 2'),
    (np.inf, ValueError, 'the first is inf in row 2'), (1e16, ValueError, r'the first is 1e\+16 in row 2'),
    (1e-20, ValueError, 'between 1e-15 and 1e\\+15'), ('3', TypeError, "found text, as in '3'"),
    ('many', TypeError, "found 'many' in row 2"), (None, ValueError, 'no weights, the first is .* in row 2')])
def test_weights_that_are_refused(df, value, error, text):
    rows = df.assign(n=pd.Series([1., 2, value, 0], dtype=None if not isinstance(value, str) else object))
    with pytest.raises(error, match=text): loaders(rows, weight_name='n')


def test_a_side_without_weight_is_refused(df):
    rows = df.assign(n=[1, 1, 0, 0])
    for splits, side in ((([2, 3], [0, 1]), 'training'), (([0, 1, 2], [3]), 'validation')):
        with pytest.raises(ValueError, match=f'found 0 in all . {side} rows: none would count'):
            loaders(rows, weight_name='n', splits=splits)
    assert loaders(rows, weight_name='n', splits=([0, 1, 2, 3], [])).weights_of('valid').tolist() == []


@settings(deadline=None, max_examples=12)
@given(st.lists(st.sampled_from([0, 1, 2.5, 1e-10, 1e14]), min_size=12, max_size=12), st.integers(1, 5), st.booleans())
def test_weights_go_with_their_rows(weights, bs, by_user):
    rows = pd.DataFrame(dict(user=np.arange(12) % 4, item=np.arange(12), rating=np.arange(12.), n=weights))
    rows.loc[[0, 1], 'n'] = 1
    dls = loaders(rows, weight_name='n', bs=bs, splits=([0, 1, *range(3, 12)], [2]) if weights[2] else all_in_order)
    if by_user: dls = dls.by_user()
    for x, y, w in dls.train:
        assert w.dtype == torch.float32 and w.tolist() == pytest.approx(rows.n[y.tolist()].tolist())
    assert dls.weights_of('train').tolist() == pytest.approx(rows.n[dls.ratings_of('train')[1].tolist()].tolist())


def test_a_column_called_weight_is_not_taken(df):
    for name in ('weight', 'count', 'confidence'):
        dls = loaders(df.assign(**{name: 2}))
        assert dls.weights_of('train') is None and len(dls.train.one_batch()) == 2
    weighed = loaders(df.assign(weight=[1, 2, 3, 4]), weight_name='weight')
    assert weighed.train_ds.digest != loaders(df).train_ds.digest
    assert weighed.new_empty().weights_of('train').tolist() == []
    assert weighed.test_dl(df[['user', 'item']]).dataset.w is None


def test_counts_of_plays_without_ratings(df):
    plays = df[['user', 'item']].assign(plays=[9, 1, 0, 2])
    dls = loaders(plays, weight_name='plays')
    assert dls.rating is None and dls.weights_of('train').tolist() == [9, 1, 0, 2]
    again = loaders(df, implicit=True, weight_name='rating')
    assert again.rating is None and again.weights_of('train').tolist() == [4, 3, 5, 1]


def test_datasets_saved_before_there_were_weights(df):
    old = loaders(df).train_ds
    del old.__dict__['w']
    assert old.w is None and len(old[0]) == 2 and len(old.new_empty()) == 0 and isinstance(old.digest, int)


# --- users together ---------------------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=12)
@given(st.lists(st.integers(1, 6), min_size=8, max_size=40), st.integers(1, 50), st.integers(0, 2**31))
def test_rows_of_a_user_stand_together(users, bs, seed):
    users[:2] = [1, 2]
    rows = pd.DataFrame(dict(user=users, item=range(len(users)), rating=1.*np.arange(len(users))))
    plain = loaders(rows, bs=bs)
    dls = plain.by_user()
    torch.manual_seed(seed)
    batches = list(dls.train)
    x, y = map(torch.cat, zip(*batches))
    assert sorted(y.tolist()) == list(range(len(users)))                            # each row once
    assert len(x[:,0].unique_consecutive()) == len(set(users))                      # each user at one place
    for u in set(users): assert (y[x[:,0] == u].diff() > 0).all()                   # its rows in order
    assert [len(o[1]) for o in batches] == plain.train.batch_sizes(len(users), bs)  # cut as without
    assert not plain.train.by_user and dls.train_ds is plain.train_ds and dls.valid_ds is plain.valid_ds


def test_users_together_keeps_the_rest(df, tmp_path):
    plain = loaders(df, path=tmp_path, bs=3)
    dls = plain.by_user()
    assert (dls.path, str(dls.device), dls.train.bs, dls.valid.bs) == (tmp_path, 'cpu', 3, plain.valid.bs)
    assert type(dls) is RatingsDataLoaders and dls.by_user().train.by_user and dls.new_empty().train.by_user
    assert dls.valid is not plain.valid and not dls.valid.by_user and not dls.valid.shuffle
    orders = {tuple(dls.train.get_idxs().tolist()) for _ in range(60)}
    assert len(orders) == 6                                                         # all orders of three users


def test_users_together_without_validation_says_nothing(df, capsys):
    assert len(loaders(df).by_user().valid_ds) == 0 and capsys.readouterr().out == ''


def test_processes_share_a_loader_by_user(df):
    class Ranks:
        world_size = 2
        def __init__(self, rank): self.rank = rank
        def broadcast(self, what, order): return torch.tensor([3, 2, 0, 1])        # that of process 0
        def same(self, *args): pass
    dl = loaders(df, bs=1).by_user().train
    mine, other = ([b[1].tolist() for b in ShareDL(dl, Ranks(rank))] for rank in (0, 1))
    assert (mine, other) == ([[1.], [4.]], [[5.], [3.]])
    assert dl.bs == 1 and 'get_idxs' not in vars(dl)


# --- other libraries --------------------------------------------------------------------------------------------------
def test_one_table_of_five_libraries(df):
    rows = df.assign(item=list('abac'))
    theirs = polars.from_pandas(rows)
    tables = [theirs, theirs.lazy(), pa.table(rows), duckdb.sql('select * from rows'), pa.RecordBatch.from_pandas(rows),
              theirs.with_columns(polars.col('item').cast(polars.Categorical)), rows.astype(dict(item='category')),
              rows.convert_dtypes(), rows.convert_dtypes(dtype_backend='pyarrow')]
    for table in tables: assert named(loaders(table)) == named(loaders(rows)), type(table)
    for table in tables[:4]: assert named(loaders(table, splits=TimeSplitter(.25)), 'valid') == [(1, '#na#', 3)]


@pytest.mark.parametrize('make', [scipy.sparse.coo_array, scipy.sparse.csr_array, scipy.sparse.csc_array,
                                  scipy.sparse.lil_array, scipy.sparse.coo_matrix, scipy.sparse.dok_matrix])
def test_sparse_matrices(make):
    matrix = np.array([[0, 5, 0], [0, 0, 0], [4, 3, 0]])
    dls = loaders(make(matrix))
    assert named(dls) == [(0, 1, 5), (2, 0, 4), (2, 1, 3)]
    assert list(dls.classes['user']) == ['#na#', 0, 2]                              # who rated nothing is not known


def test_zeros_and_repeated_entries_of_a_sparse_matrix():
    places = ([0, 0, 1, 1], [0, 0, 1, 0])
    matrix = scipy.sparse.coo_array(([1, 2, 0, 5], places))
    assert named(loaders(matrix)) == [(0, 0, 3), (1, 0, 5), (1, 1, 0)]
    with pytest.raises(ValueError, match=r'1 stored entries of the matrix are 0, the first at \(1, 1\)'):
        loaders(matrix, implicit=True)
    assert loaders(scipy.sparse.coo_array(([True]*3, ([0, 1, 1], [0, 0, 1])))).rating is None


@pytest.mark.parametrize('odd', [[1, 2], dict(user=[1], item=[2]), np.ones((3, 3)), 'ratings.csv', None,
                                 pd.Series([1]), torch.ones(3, 3), polars.Series([1])])
def test_what_is_no_table(odd):
    with pytest.raises(TypeError, match='make a pd.DataFrame of it'): loaders(odd)


def test_unique_ids_become_text(df):
    ids = [uuid.UUID(int=o) for o in df.user]
    text = [str(o) for o in ids]
    rows = df.assign(user=ids)
    dls = loaders(rows)
    assert [o[0] for o in named(dls)] == text and rows.user.tolist() == ids
    assert named(loaders(duckdb.sql('select user::varchar::uuid as user, item, rating from rows'))) == named(dls)
    assert torch.equal(dls.test_dl(rows).dataset.x, dls.test_dl(df.assign(user=text)).dataset.x)
    assert dls.test_dl(rows).dataset.x[:,0].min() > 0


def test_blank_ids_are_refused(df):
    with pytest.raises(ValueError, match="item holds '', which is no id"): loaders(df.assign(item=['a', '', 'b', 'c']))


def test_pairs_to_predict_may_be_of_another_library(df):
    dls = loaders(df)
    expected = dls.test_dl(df).dataset.x
    for pairs in (polars.from_pandas(df), pa.table(df), df.to_dict('list'), [df.iloc[i] for i in range(len(df))]):
        assert torch.equal(dls.test_dl(pairs).dataset.x, expected)
    assert dls.test_dl(polars.from_pandas(df), with_labels=True).dataset.y.tolist() == df.rating.tolist()


# --- pairs that come twice --------------------------------------------------------------------------------------------
repeated = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(0, 4),
                              st.integers(0, 3)), min_size=4, max_size=30)

def frame(rows):
    rows[:2] = [(1, 1, 3, 0, 1), (2, 2, 4, 0, 2)]
    return pd.DataFrame(rows, columns=['user', 'item', 'rating', 'timestamp', 'n'])


@settings(deadline=None, max_examples=20)
@given(repeated)
def test_last_is_what_sorting_gives(rows):
    df = frame(rows)
    dls, text = said(lambda: loaders(df, duplicates='last'))
    expected = df.sort_values('timestamp', kind='stable').drop_duplicates(['user', 'item'], keep='last').sort_index()
    assert named(dls) == [tuple(o) for o in expected[['user', 'item', 'rating']].values.tolist()]
    assert text == [f"{len(df)-len(expected)} rows are left out for a later one of the same pair, by the column "
                    "'timestamp'"]*(len(expected) < len(df))
    plain = df.drop(columns='timestamp')
    dls, text = said(lambda: loaders(plain, duplicates='last', rating_name='rating'))
    expected = plain.drop_duplicates(['user', 'item'], keep='last')
    assert named(dls) == [tuple(o) for o in expected[['user', 'item', 'rating']].values.tolist()]
    assert all('by the order of rows, since no column has a known name for times' in o for o in text)


@settings(deadline=None, max_examples=20)
@given(repeated)
def test_means_keep_the_gradient_of_the_rows(rows):
    df = frame(rows)
    merged = loaders(df, duplicates='mean', weight_name='n')
    of_pair = df.groupby(['user', 'item'])
    assert len(merged.train_ds) == of_pair.ngroups
    for (user, item, rating), w in zip(named(merged), merged.weights_of('train').tolist()):
        part = of_pair.get_group((user, item))
        assert w == part.n.sum()
        if w: assert w*(2.2 - rating) == pytest.approx((part.n*(2.2 - part.rating)).sum(), abs=1e-4)
        else: assert rating == pytest.approx(part.rating.mean())
    plain = loaders(df, duplicates='mean')
    for *pair, rating in named(plain): assert rating == pytest.approx(of_pair.get_group(tuple(pair)).rating.mean())


def test_the_default_keeps_all_and_says_so(df):
    rows = pd.concat([df, df[1:3]])
    dls, text = said(lambda: loaders(rows))
    assert len(dls.train_ds) == 6 and len(text) == 1
    assert text[0].startswith('2 rows hold a user and item that came before, the first is (1, 6) in row 4: all of them')
    for way in ("duplicates='last'", "'mean'", "'keep'"): assert way in text[0]
    for how in (dict(duplicates='keep'), dict(implicit=True)): assert said(lambda: loaders(rows, **how))[1] == []
    assert said(lambda: loaders(df))[1] == []
    with pytest.raises(ValueError, match=r'2 rows hold .* \(1, 6\) in row 4: say'): loaders(rows, duplicates='raise')
    with pytest.raises(ValueError, match="'keep', 'last', 'mean' or 'raise', found 'first'"):
        loaders(df, duplicates='first')


def test_the_warning_names_the_line_of_the_caller(df):
    with pytest.warns(UserWarning, match='came before') as caught: loaders(pd.concat([df, df]))
    assert caught[0].filename == __file__


def test_what_is_bought_each_month_counts_each_month(df):
    bought = pd.concat([df]*3)[['user', 'item', 'timestamp']]
    dls, text = said(lambda: loaders(bought))
    assert (len(dls.train_ds), text) == (12, [])
    assert len(said(lambda: loaders(bought, duplicates='last'))[0].train_ds) == 4
    counted = loaders(bought.assign(n=2), duplicates='mean', weight_name='n')
    assert counted.weights_of('train').tolist() == [6]*4


def test_splits_are_of_the_rows_that_are_left(df):
    rows = pd.concat([df, df[:1].assign(rating=1., timestamp=9)], ignore_index=True)
    seen = []
    def split(left): seen.append(left); return [0, 1, 2], [3]
    dls = said(lambda: loaders(rows, duplicates='last', splits=split))[0]
    assert seen[0].rating.tolist() == [3, 5, 1, 1] and named(dls, 'valid') == [(1, 5, 1)]
    with pytest.raises(ValueError, match='numbers of the 5 rows that were given, of which 4 are left .* a splitter'):
        said(lambda: loaders(rows, duplicates='last', splits=([0, 1, 2], [3])))
    assert len(said(lambda: loaders(rows, splits=([0, 1, 2, 3], [4])))[0].train_ds) == 4
    assert len(loaders(df, duplicates='mean', splits=([0, 1, 2], [3])).train_ds) == 3   # nothing was merged


def test_the_caller_keeps_the_frame_that_was_merged(df):
    rows = pd.concat([df, df[:2].assign(rating=1)])
    before = rows.copy()
    said(lambda: loaders(rows, duplicates='mean')), said(lambda: loaders(rows, duplicates='last'))
    pd.testing.assert_frame_equal(rows, before)


# --- files ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def ml(): return movielens_100k()[['user', 'item', 'rating', 'timestamp']]


def text_of(df, sep, header):
    "`df` as a file, with any text between columns"
    text = df.to_csv(sep='\t', index=False, header=header)
    return text.replace('\t', sep)


@pytest.mark.parametrize('name, sep, header, pack', [
    ('u.data', '\t', False, False), ('u1.base', '\t', False, False), ('u.data.gz', '\t', False, True),
    ('ratings.dat', '::', False, False), ('ratings.dat.gz', '::', False, True), ('any.txt', '::', False, False),
    ('ratings.csv', ',', ['userId', 'movieId', 'rating', 'timestamp'], False),
    ('ratings.csv.gz', ',', ['userId', 'movieId', 'rating', 'timestamp'], True),
    ('ratings.tsv', '\t', ['USER', 'ITEM', 'RATING', 'TIMESTAMP'], False),
    ('my.inter', '\t', ['user_id:token', 'item_id:token', 'rating:float', 'timestamp:float'], False),
    ('semi.csv', ';', ['User-ID', 'ISBN', 'Book-Rating', 'Date'], False),
    ('colons.csv', '::', ['user', 'item', 'rating', 'timestamp'], False)])
def test_movielens_in_all_its_forms(ml, tmp_path, name, sep, header, pack):
    data = text_of(ml[:3000], sep, header).encode()
    (tmp_path/name).write_bytes(gzip.compress(data) if pack else data)
    found = read_ratings(tmp_path/name)
    assert (found.to_numpy() == ml[:3000].to_numpy()).all()
    if not header: assert list(found) == ['user', 'item', 'rating', 'timestamp']
    dls = RatingsDataLoaders.from_csv(tmp_path/name, splits=all_in_order, device='cpu')
    assert named(dls) == named(loaders(ml[:3000]))


def test_recbole_s_own_file_is_movielens(ml):
    path = movielens_path()/'ml-100k.inter'
    if not path.exists(): pytest.skip('this MovieLens is not that of recbole')
    found = read_ratings(path)
    assert list(found) == ['user_id', 'item_id', 'rating', 'timestamp']
    assert (found.to_numpy() == ml.to_numpy()).all()


def test_parquet(ml, tmp_path):
    ml[:100].to_parquet(tmp_path/'r.parquet')
    pd.testing.assert_frame_equal(read_ratings(tmp_path/'r.parquet'), ml[:100].reset_index(drop=True))
    for more in (dict(sep=','), dict(header=['a']), dict(encoding='latin-1')):
        with pytest.raises(ValueError, match='is Parquet, which has'): read_ratings(tmp_path/'r.parquet', **more)


@pytest.mark.parametrize('text, said', [
    ('1\t31\t2.5\t1260759144\n', "the first line holds '1', a number: is it a row"),     # not called u.data
    ('A3AF,0078,5.0,1092182400\n', r"header=\['user', 'item', 'rating', 'timestamp'\], or say header=True"),
    ('1::F::1::10::48067\n', 'Then name its 5 columns'), ('"7";"8"\n', 'Then name its 2 columns')])
def test_files_without_names_ask_for_them(tmp_path, text, said):
    (tmp_path/'r.txt').write_text(text*3)
    with pytest.raises(ValueError, match=said): read_ratings(tmp_path/'r.txt')


@pytest.mark.parametrize('text, header, rows', [
    ('A3AF,0078,5.0\nB2,0079,1\n', ['user', 'item', 'rating'], [['A3AF', '0078', 5], ['B2', '0079', 1]]),
    ('1::2::3\n1::3::4', ['item', 'user', 'rating'], [[1, 2, 3], [1, 3, 4]]),
    ('"x, y";7\nz;8\n', ['user', 'item'], [['x, y', 7], ['z', 8]])])
def test_names_that_are_given(tmp_path, text, header, rows):
    (tmp_path/'r.txt').write_text(text)
    found = read_ratings(tmp_path/'r.txt', header=header)
    assert list(found) == header and found.values.tolist() == rows
    with pytest.raises(ValueError, match='header names 9 columns'):
        read_ratings(tmp_path/'r.txt', header=list('abcdefghi'))


def test_errors_speak_of_the_file_and_its_lines(tmp_path):
    (tmp_path/'ratings.dat').write_text('1::2::3::978300760\n'*5 + '1::2::3\n')
    with pytest.raises(ValueError) as e: read_ratings(tmp_path/'ratings.dat')
    assert str(e.value) == (f"{tmp_path/'ratings.dat'}: line 6 has 3 cells, and the first line names 4: '1::2::3'. "
                            'Each row needs a cell for each name')
    with pytest.raises(FileNotFoundError, match='no.csv: no such file'): read_ratings(tmp_path/'no.csv')
    with pytest.raises(ValueError, match='is a folder'): read_ratings(tmp_path)
    (tmp_path/'empty.csv').write_text('')
    with pytest.raises(ValueError, match='is empty'): read_ratings(tmp_path/'empty.csv')
    (tmp_path/'blank.csv').write_text(' \n\n')
    with pytest.raises(ValueError, match='holds no text'): read_ratings(tmp_path/'blank.csv')


def test_book_crossing(tmp_path):
    "Semicolons, quotes, latin-1, ids with leading zeros, zeros for books that were only looked at"
    text = '"User-ID";"ISBN";"Book-Rating";"Book-Title"\n"276725";"034545104X";"0";"Flesh Tones"\n' \
           '"276726";"0155061224";"5";"Amélie à Paris"\n'
    (tmp_path/'b.csv').write_bytes(text.encode('latin-1'))
    with pytest.raises(ValueError, match="if it is Latin-1, say encoding='latin-1'"): read_ratings(tmp_path/'b.csv')
    found = read_ratings(tmp_path/'b.csv', encoding='latin-1')
    assert found.ISBN.tolist() == ['034545104X', '0155061224'] and found['Book-Title'][1] == 'Amélie à Paris'
    dls = RatingsDataLoaders.from_csv(tmp_path/'b.csv', encoding='latin-1', splits=all_in_order, device='cpu')
    assert named(dls) == [(276725, '034545104X', 0), (276726, '0155061224', 5)]


@pytest.mark.parametrize('sep, names', [(',', True), ('::', True), ('::', False)])
def test_an_id_may_be_called_na(tmp_path, sep, names):
    rows = ['user,item,rating']*names + ['NA,005,1', 'ann,006,2', 'bob,NA,3']
    (tmp_path/'r.csv').write_text('\n'.join(rows).replace(',', sep))
    found = read_ratings(tmp_path/'r.csv', header=None if names else ['user', 'item', 'rating'])
    assert found.values.tolist() == [['NA', '005', 1], ['ann', '006', 2], ['bob', 'NA', 3]]
    (tmp_path/'r.csv').write_text('user,item,rating\n1,5,1\nNA,6,2\n2,5,3\n')
    with pytest.raises(ValueError, match='1 rows have no user, the first is row 1'):
        RatingsDataLoaders.from_csv(tmp_path/'r.csv')


def test_no_copy_is_left_behind(tmp_path, monkeypatch):
    import tempfile
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path/'tmp'))
    (tmp_path/'tmp').mkdir()
    (tmp_path/'ratings.dat').write_text('1::2::3::978300760\n1::3::4::978300761\n')
    assert len(read_ratings(tmp_path/'ratings.dat')) == 2
    (tmp_path/'ratings.dat').write_text('1::2::3::978300760\n1::3\n')
    with pytest.raises(ValueError): read_ratings(tmp_path/'ratings.dat')
    assert list((tmp_path/'tmp').iterdir()) == []


# --- what is no rating ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize('times', [[874965758, 876893171, 878542960], [874965758000, 876893171000, 878542960001],
                                   pd.to_datetime(['1997-09-22', '1997-10-15', '1997-11-03'])])
def test_times_are_no_ratings(times):
    df = pd.DataFrame(dict(user=[1, 1, 2], item=[5, 6, 5], when=times))
    with pytest.raises((TypeError, ValueError), match='times.*name the column of ratings with rating_name='):
        loaders(df, rating_name='when')


def test_a_heavy_tail_is_said_of_a_squared_error_alone():
    df = pd.DataFrame(dict(user=[1, 1, 2, 2, 3], item=[5, 6, 5, 6, 6], rating=[1., 2, 3, 2, 5000]))
    def warned(**kwargs):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter('always')
            collab_deep_learner(loaders(df), 2, **kwargs)
        return [str(o.message) for o in found if 'few rows make up a squared error' in str(o.message)]
    [text] = warned(loss='mse')
    assert text.startswith('rating has a median of 2 and goes up to 5000') and "weight_name='rating'" in text
    assert warned(loss='softmax') == warned(model='ials') == []
