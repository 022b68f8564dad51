"Loaders and splits: every rating once, names change nothing, and what fastai's own loaders let pass"
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.collab import CollabDataLoaders, EmbeddingDotBias
from fastai.data.transforms import RandomSplitter
from fastai.learner import Learner
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from collab_deep.data.loaders import RatingsDataLoaders, RatingsDL
from collab_deep.data.splits import GroupSplitter, LeaveLastSplitter, TimeSplitter, split_rows


@st.composite
def frames(draw):
    "Ratings of at least two users and two items, in any order, some pairs twice"
    n = draw(st.integers(6, 40))
    users, items = (draw(st.lists(st.integers(1, 6), min_size=n, max_size=n)) for _ in range(2))
    users[:2], items[:2] = [1, 2], [1, 2]
    stars = draw(st.lists(st.integers(1, 5), min_size=n, max_size=n))
    times = draw(st.permutations(range(n)))
    return pd.DataFrame(dict(user=users, item=items, rating=np.array(stars, float), timestamp=times))


def loaders(df, **kwargs): return RatingsDataLoaders.from_df(df, device='cpu', **{'duplicates': 'keep', **kwargs})

def enough(df, **kwargs):
    "Leave out splits whose training rows have a single user or item, which are refused"
    part = df.iloc[split_rows(df, **kwargs)[0]]
    assume(part.user.nunique() > 1 and part.item.nunique() > 1)

def triples(x, y): return sorted((*pair, star) for pair, star in zip(x.tolist(), y.tolist()))

def named(dls, split):
    "Ratings of a split with their names"
    x, y = dls.ratings_of(split)
    users,items = dls.classes['user'],dls.classes['item']
    return sorted(((users[u], items[i], r) for (u, i), r in zip(x.tolist(), y.tolist())), key=str)


# --- an epoch --------------------------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=12)
@given(frames(), st.integers(1, 50), st.integers(0, 2**31))
def test_every_rating_once_an_epoch(df, bs, seed):
    dls = loaders(df, valid_pct=0, bs=bs)
    torch.manual_seed(seed)
    batches = list(dls.train)
    assert triples(*map(torch.cat, zip(*batches))) == triples(*dls.ratings_of('train'))
    sizes = [len(y) for _, y in batches]
    assert max(sizes) <= bs and max(sizes)-min(sizes) <= 1 and len(batches) == len(dls.train)
    for x,y in batches:
        assert x.dtype == torch.int64 and x.shape == (len(y), 2)
        assert y.dtype == torch.float32 and y.ndim == 1


def test_an_epoch_of_fastai_misses_a_third():
    "Its default loader draws with replacement: this is why ours exists"
    n = 2000
    df = pd.DataFrame(dict(user=np.arange(n) % 40, item=np.arange(n) // 40, rating=1.+np.arange(n) % 5))
    def seen(dls): return len(torch.unique(torch.cat([b[0] for b in dls.train]), dim=0))
    assert seen(CollabDataLoaders.from_df(df, valid_pct=.1, bs=64)) < .75*1800
    assert seen(loaders(df, valid_pct=.1)) == 1800


def test_epochs_differ_and_a_seed_repeats_them():
    dls = loaders(pd.DataFrame(dict(user=[1, 2]*20, item=list(range(20))*2, rating=1.)), valid_pct=0)
    def order(seed): torch.manual_seed(seed); return [next(iter(dls.train))[0].tolist() for _ in range(2)]
    assert order(0) == order(0) and order(0)[0] != order(0)[1]


def test_drop_last_has_whole_batches_only():
    dl = loaders(pd.DataFrame(dict(user=[1, 2]*5, item=list(range(10)), rating=1.)), valid_pct=0, bs=4).train
    assert [len(y) for _, y in dl.new(drop_last=True)] == [4, 4]


# --- names and order -------------------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=12)
@given(frames(), st.randoms())
def test_order_of_rows_changes_nothing(df, random):
    enough(df, splits=TimeSplitter(.2))
    order = random.sample(range(len(df)), len(df))
    dls,other = (loaders(rows, splits=TimeSplitter(.2)) for rows in (df, df.iloc[order]))
    assert named(dls, 'valid') == named(other, 'valid')


@settings(deadline=None, max_examples=12)
@given(frames())
def test_renaming_changes_names_only(df):
    enough(df, valid_pct=.2, seed=1)
    other = df.assign(user='u' + df.user.astype(str), item='i' + df.item.astype(str))  # one digit each: the same order
    mine, theirs = loaders(df, valid_pct=.2, seed=1), loaders(other, valid_pct=.2, seed=1)
    for split in ('train', 'valid'):
        for a, b in zip(mine.ratings_of(split), theirs.ratings_of(split)): assert torch.equal(a, b)
    assert [f'u{o}' for o in mine.classes['user'][1:]] == list(theirs.classes['user'][1:])


def test_the_caller_keeps_the_frame():
    df = pd.DataFrame(dict(user=[1, 2, 1], item=[3, 3, 4], rating=[1., 2, 3]), index=[7, 7, 7])
    before = df.copy()
    dls = loaders(df, splits=([0, 1, 2], []))
    dls.train.dataset.y[0] = 9
    pd.testing.assert_frame_equal(df, before)


# --- vocabularies ----------------------------------------------------------------------------------------------------
def test_ids_of_validation_alone_are_unknown():
    df = pd.DataFrame(dict(user=[1, 2, 3], item=['a', 'b', 'c'], rating=[1., 2, 5]))
    dls = loaders(df, splits=([0, 1], [2]))
    assert list(dls.classes['item']) == ['#na#', 'a', 'b'] and dls.ratings_of('valid')[0].tolist() == [[0, 0]]
    assert (dls.mean, dls.y_max) == (1.5, 2)             # nor do their ratings count


@settings(deadline=None, max_examples=12)
@given(frames())
def test_seen_is_what_training_has(df):
    enough(df, valid_pct=.3, seed=0)
    dls = loaders(df, valid_pct=.3, seed=0)
    ptr, items = dls.seen
    x, _ = dls.ratings_of('train')
    for u in range(dls.n_users): assert items[ptr[u]:ptr[u+1]].tolist() == sorted(set(x[x[:,0] == u, 1].tolist()))
    assert dls.item_counts.sum() == dls.user_counts.sum() == len(x)


def test_classes_are_as_fastais():
    df = pd.DataFrame(dict(user=[3, 1, 2, 1], item=['b', 'a', 'c', 'c'], rating=[1., 2, 3, 4]))
    theirs = CollabDataLoaders.from_df(df, valid_pct=0., bs=2)
    ours = loaders(df, valid_pct=0)
    assert {k: list(v) for k, v in ours.classes.items()} == {k: list(v) for k, v in theirs.classes.items()}


def test_a_nan_in_an_id_is_refused_where_fastai_makes_floats_of_all():
    df = pd.DataFrame(dict(user=[1, None, 2], item=[1, 2, 3], rating=[1., 2, 3]))
    with pytest.raises(ValueError, match='1 rows have no user, the first is row 1: leave them out'): loaders(df)


# --- splits ----------------------------------------------------------------------------------------------------------
def test_splits_are_heeded_where_fastai_passes_them_over():
    df = pd.DataFrame(dict(user=[1, 2, 1, 2], item=[1, 1, 2, 2], rating=[1., 2, 3, 4]))
    assert loaders(df, splits=([0, 1, 2], [3])).ratings_of('valid')[1].tolist() == [4.]


@settings(deadline=None, max_examples=12)
@given(st.integers(5, 500), st.floats(0, .9), st.integers(0, 100))
def test_random_is_fastais(n, pct, seed):
    df = pd.DataFrame(dict(user=np.arange(n)))
    ours,theirs = split_rows(df, valid_pct=pct, seed=seed),RandomSplitter(pct, seed=seed)(range(n))
    for a,b in zip(ours, theirs, strict=True): assert a.tolist() == list(b)


@settings(deadline=None, max_examples=12)
@given(frames(), st.integers(1, 3))
def test_last_of_each_user(df, n):
    train, valid = LeaveLastSplitter(n=n)(df)
    assert sorted([*train, *valid]) == list(range(len(df)))
    for _, rows in df.reset_index(drop=True).groupby('user'):
        expected = rows.sort_values('timestamp').index[-n:] if len(rows) > n else []
        assert set(expected) == set(rows.index) & set(valid)


@settings(deadline=None, max_examples=12)
@given(frames(), st.floats(0, .9))
def test_the_past_comes_before_the_future(df, pct):
    train, valid = TimeSplitter(pct)(df)
    assert len(valid) == int(pct*len(df))
    if len(valid): assert df.timestamp.iloc[train].max() <= df.timestamp.iloc[valid].min()


@settings(deadline=None, max_examples=12)
@given(frames(), st.integers(0, 99))
def test_groups_stay_together(df, seed):
    train,valid = GroupSplitter('item', .5, seed)(df)
    assert df.item.iloc[valid].nunique() == -(-df.item.nunique()//2)  # half of the items, rounded up
    assert not set(df.item.iloc[train]) & set(df.item.iloc[valid]) and len(train) + len(valid) == len(df)


# --- with fastai -----------------------------------------------------------------------------------------------------
@pytest.fixture
def df(): return pd.DataFrame(dict(user=np.arange(60) % 6, item=np.arange(60) // 6, rating=1.+np.arange(60) % 5))


def test_fastais_own_learner_trains_on_them(df):
    dls = loaders(df, seed=0, bs=8)
    learn = Learner(dls, EmbeddingDotBias.from_classes(5, dls.classes, y_range=(0, 5.5)))
    learn.fit(1, 1e-2)
    preds, targs = learn.get_preds()
    assert torch.equal(targs, dls.ratings_of('valid')[1])
    assert learn.validate()[0] == pytest.approx(F.mse_loss(preds, targs).item(), rel=1e-5)


def test_pickles_and_ships_no_ratings(df, tmp_path):
    dls = loaders(df, seed=0)
    empty = dls.new_empty()
    assert len(empty.train.dataset) == 0 and list(empty.classes['user']) == list(dls.classes['user'])


def test_test_dl_keeps_order_and_reads_labels(df):
    dls = loaders(df, seed=0)
    dl = dls.test_dl(df[::-1], with_labels=True, bs=7)
    assert isinstance(dl, RatingsDL) and torch.cat([y for _, y in dl]).tolist() == df.rating[::-1].tolist()
    with pytest.raises(ValueError, match=r"expected columns \['rating'\], found \['user', 'item'\]"):
        dls.test_dl(df[['user', 'item']], with_labels=True)


def test_csv(df, tmp_path):
    df.to_csv(tmp_path/'r.csv', index=False)
    assert named(RatingsDataLoaders.from_csv(tmp_path/'r.csv', seed=3), 'valid') == named(loaders(df, seed=3), 'valid')


@pytest.mark.parametrize('change,error,text', [
    (lambda df: df.assign(rating=np.nan), ValueError, '60 values of rating are not finite, the first is nan in row 0'),
    (lambda df: df.assign(user=1), ValueError,
     'at least 2 different values of user in the training rows, found only 1'),
    (lambda df: df.assign(item='x'), ValueError,
     "at least 2 different values of item in the training rows, found only 'x'"),
    (lambda df: df[:0], ValueError, 'found an empty frame'),
    (lambda df: df.assign(user=[1, 'a']*30), TypeError, r"user holds ids of mixed types, \['int', 'str'\]"),
    (lambda df: df.assign(rating='five'), TypeError, "rating should hold numbers"),
])
def test_refused(df, change, error, text):
    with pytest.raises(error, match=text): loaders(change(df))


@pytest.mark.parametrize('shift, is_refused', [(0, False), (1e4, False), (2e7, True), (-1e8, True), (-1.7e9, True)])
def test_ratings_that_float32_cannot_tell_apart(shift, is_refused):
    from decimal import Decimal
    stars = np.tile([1., 2, 3, 4, 5], 8) + shift
    rows = pd.DataFrame(dict(user=np.arange(40) % 7, item=np.arange(40) % 9, rating=stars))
    for df in (rows, rows.assign(rating=[Decimal(o) for o in stars])):
        if is_refused:
            with pytest.raises(ValueError, match='have a spread of 1.41, .*: subtract a constant'):
                RatingsDataLoaders.from_df(df)
        else: assert RatingsDataLoaders.from_df(df, valid_pct=0).mean == stars.mean()
