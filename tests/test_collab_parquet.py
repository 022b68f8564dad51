"Parquet, piece by piece: the loaders of `from_df` for the same rows, and files that are not what they should be"
import subprocess
import sys
import uuid
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collab_deep.all import *
from collab_deep.data import out_of_core, parquet

pa = pytest.importorskip('pyarrow')
ROOT = Path(__file__).parents[1]

@contextmanager
def pieces_of(n):
    "Read `n` rows at a time, so that small tables come in many pieces"
    whole = parquet.pieces
    def small(table, columns): return whole(table, columns, n)
    old = parquet.pieces,out_of_core.pieces
    parquet.pieces = out_of_core.pieces = small
    try: yield
    finally: parquet.pieces,out_of_core.pieces = old

def write(df, folder, n_files=1):
    for i,rows in enumerate(np.array_split(np.arange(len(df)), n_files)):
        df.iloc[rows].to_parquet(folder/f'{i}.parquet', index=False)
    return folder

def both(df, folder, n_files=1, piece=4, **kwargs):
    "Loaders from files and from the frame"
    with pieces_of(piece):
        ours = RatingsDataLoaders.from_parquet(write(df, folder, n_files), device='cpu', **kwargs)
    return ours,RatingsDataLoaders.from_df(df, device='cpu', **kwargs)

def rows_of(dls, split):
    "Rows of a split in an order of their own"
    x,y = dls.ratings_of(split)
    w = dls.weights_of(split)
    return sorted(zip(*x.T.tolist(), y.tolist(), ([0.]*len(y) if w is None else w.tolist())))

def assert_same(ours, theirs):
    assert [ours.user, ours.item, ours.rating] == [theirs.user, theirs.item, theirs.rating]
    for name in (ours.user, ours.item):
        mine,other = list(ours.classes[name]),list(theirs.classes[name])
        assert mine == other and [*map(type, mine)] == [*map(type, other)]
    assert np.isclose(ours.mean, theirs.mean, rtol=1e-12, atol=1e-12)
    assert (ours.y_min, ours.y_max) == (theirs.y_min, theirs.y_max)
    for split in ('train', 'valid'): assert rows_of(ours, split) == rows_of(theirs, split)
    assert all(map(torch.equal, ours.seen, theirs.seen))
    assert torch.equal(ours.user_counts, theirs.user_counts) and torch.equal(ours.item_counts, theirs.item_counts)

# --- the same as from_df --------------------------------------------------------------------------------------------
ids = {'numbers': st.integers(-5, 40),
       'text': st.text('abcé"\';, x', min_size=1, max_size=3).map(lambda o: f'n{o}'.strip()),
       'leading zeros': st.integers(0, 30).map('{:04}'.format),
       'uuids': st.integers(0, 9).map(lambda o: str(uuid.UUID(int=o)))}

@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_small_table(tmp_path_factory, data):
    users,items = (data.draw(st.sampled_from([*ids.values()])) for _ in range(2))
    n = data.draw(st.integers(4, 40))
    def column(values): return data.draw(st.lists(values, min_size=n, max_size=n))
    df = pd.DataFrame(dict(user=column(users), item=column(items), rating=column(st.integers(1, 5)),
                           w=column(st.sampled_from([0., .5, 2.]))))
    kwargs = dict(seed=data.draw(st.integers(0, 3)), valid_pct=data.draw(st.sampled_from([0, .2, .5])),
                  duplicates='keep',
                  weight_name=data.draw(st.sampled_from([None, 'w'])), implicit=data.draw(st.booleans()))
    try: theirs = RatingsDataLoaders.from_df(df, device='cpu', **kwargs)
    except (TypeError, ValueError) as e:
        with pytest.raises(type(e)):
            both(df, tmp_path_factory.mktemp('bad'), **kwargs)
        return
    ours,_ = both(df, tmp_path_factory.mktemp('good'), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9)),
                  **kwargs)
    assert_same(ours, theirs)

@pytest.fixture(scope='module')
def films(): return movielens_100k()[['user', 'title', 'rating']]

def test_real_ratings_train_and_recommend_the_same(films, tmp_path):
    ours,theirs = both(films, tmp_path, 3, 30_000, item_name='title', seed=42, bs=4096, duplicates='keep')
    assert_same(ours, theirs)
    lists = [recommend(fit_ease(dls, reg=200.), [196, 22, 900], k=5) for dls in (ours, theirs)]
    assert lists[0]['item'].tolist() == lists[1]['item'].tolist()
    assert np.allclose(lists[0].score, lists[1].score, atol=1e-5)
    errors = [evaluate_ratings(fit_model(dls, 'dot', epochs=3)).value['mse'] for dls in (ours, theirs)]
    assert abs(errors[0] - errors[1]) < .01  # the rows of an epoch come in another order
    learn = fit_model(ours, 'softmax', epochs=1)
    save_recommender(learn, tmp_path/'rec')
    pd.testing.assert_frame_equal(recommend(load_recommender(tmp_path/'rec'), 196), recommend(learn, 196))

def test_rows_that_are_named(tmp_path):
    df = pd.DataFrame(dict(user=[1, 1, 2, 2, 3], item=list('abcab'), rating=[1., 2, 3, 4, 5]))
    splits = [4, 0, 1],[2]
    ours,theirs = both(df, tmp_path, 2, 2, splits=splits)
    assert_same(ours, theirs)
    assert len(ours.train.dataset) == 3 and len(ours.valid.dataset) == 1

def test_every_row_comes_once_an_epoch(films, tmp_path):
    ours,_ = both(films[:5000], tmp_path, 2, 700, item_name='title', seed=0, bs=512, duplicates='keep')
    first,second = ([torch.cat([x, y[:,None].long()], 1) for x,y in ours.train] for _ in range(2))
    first,second = torch.cat(first),torch.cat(second)
    assert not torch.equal(first, second)
    assert sorted(first.tolist()) == sorted(second.tolist()) == sorted(
        torch.cat([o if o.ndim > 1 else o[:,None].long() for o in ours.ratings_of('train')], 1).tolist())

def test_what_is_written_to_a_batch_stays_out_of_the_files(films, tmp_path):
    ours,_ = both(films[:500], tmp_path, item_name='title', seed=0, duplicates='keep')
    before = (tmp_path/'0.parquet').read_bytes()
    ours.train.dataset.y.zero_()
    assert (tmp_path/'0.parquet').read_bytes() == before

# --- what is refused ------------------------------------------------------------------------------------------------
def bad(df, folder, exc=ValueError, **kwargs):
    with pieces_of(4), pytest.raises(exc) as found: RatingsDataLoaders.from_parquet(write(df, folder), **kwargs)
    return str(found.value) + '\n' + '\n'.join(getattr(found.value, '__notes__', []))

def ten(**columns):
    return pd.DataFrame(dict(user=[1, 2]*5, item=list('ab')*5, rating=np.arange(10.) + 1) | columns)

def test_rows_that_cannot_be_learned_from(tmp_path):
    missing = bad(ten(user=[1, 2, 3, 4, 5, 6, None, 8, 9, 10]), tmp_path)
    assert '1 rows have no user, the first is row 2' in missing
    assert 'in 0.parquet, rows counted from its row 4' in missing
    assert '1 values of rating are not finite' in bad(ten(rating=[1, 2, 3, np.inf, *range(6)]), tmp_path)
    assert "holds ' ', which is no id" in bad(ten(item=[*'abcdefghi', ' ']), tmp_path)
    assert 'found only' in bad(ten(user=1), tmp_path)
    assert 'a weight is 0, or a number between' in bad(ten(w=[1.]*9 + [-1]), tmp_path, weight_name='w')
    assert 'found 0 in all' in bad(ten(w=[0.]*10), tmp_path, weight_name='w')
    assert 'found none in' in bad(ten()[:0], tmp_path)

def test_ids_that_look_the_same_in_different_pieces(tmp_path):
    text = bad(ten(item=['Amélie', *'bcdefgh', 'Ame\u0301lie', 'i']), tmp_path, valid_pct=0)
    assert 'which would be two' in text

def test_a_spread_that_is_small_in_one_piece_alone(tmp_path):
    near = [1e6, 1e6 + .06, 1e6, 1e6 + .06]
    with pieces_of(4):
        dls = RatingsDataLoaders.from_parquet(write(ten(rating=[*near, *range(6)]), tmp_path), valid_pct=0,
                                              duplicates='keep')
    assert len(dls.train.dataset) == 10
    assert 'have a spread of' in bad(ten(rating=1e6 + .01*np.arange(10)), tmp_path, valid_pct=0)

def test_columns_are_recognised_or_refused(tmp_path):
    df = ten().rename(columns=dict(user='uid', item='asin', rating='stars'))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        dls = RatingsDataLoaders.from_parquet(write(df, tmp_path))
    assert [dls.user, dls.item, dls.rating] == ['uid', 'asin', 'stars']
    assert 'user_name' in bad(df.rename(columns=dict(uid='who')), tmp_path)
    assert "expected a column 'x'" in bad(df, tmp_path, user_name='x')

def test_splits_and_duplicates_that_need_all_rows(tmp_path):
    assert 'two lists of row numbers' in bad(ten(), tmp_path, TypeError, splits=TimeSplitter())
    assert 'select user, item, avg(rating)' in bad(ten(), tmp_path, duplicates='mean', valid_pct=0)
    assert '8 rows hold a user and item that came before, as (1, \'a\')' in bad(ten(), tmp_path, duplicates='raise',
                                                                                valid_pct=0)
    with pytest.warns(UserWarning, match='8 rows hold a user and item that came before'):
        RatingsDataLoaders.from_parquet(write(ten(), tmp_path), valid_pct=0)

def test_mostly_zeros_are_said(tmp_path):
    with pieces_of(3), pytest.warns(UserWarning, match='7 of 10 values of rating are 0'):
        RatingsDataLoaders.from_parquet(write(ten(rating=[0.]*7 + [1, 2, 3]), tmp_path), valid_pct=0, duplicates='keep')

# --- files ----------------------------------------------------------------------------------------------------------
def test_files_that_differ(tmp_path):
    write(ten(), tmp_path)
    ten(user=list('abababcdcd')).to_parquet(tmp_path/'1.parquet', index=False)
    with pytest.raises(ValueError, match='has other columns or types than .*0.parquet'):
        RatingsDataLoaders.from_parquet(tmp_path)

def test_damaged_and_missing_files(tmp_path):
    (tmp_path/'a.parquet').write_bytes(b'PAR1 no')
    with pytest.raises(ValueError, match='a.parquet is no Parquet file, or damaged'):
        RatingsDataLoaders.from_parquet(tmp_path)
    with pytest.raises(FileNotFoundError, match='b.parquet is not there'):
        RatingsDataLoaders.from_parquet(tmp_path/'b.parquet')
    (tmp_path/'empty').mkdir()
    with pytest.raises(ValueError, match='found none in'): RatingsDataLoaders.from_parquet(tmp_path/'empty')

def test_a_file_that_changes_between_the_passes(tmp_path, monkeypatch):
    write(ten(), tmp_path)
    class Changing(parquet.RowsSeen):
        def __init__(self, *args):
            super().__init__(*args)
            write(ten()[:8], tmp_path)
    monkeypatch.setattr(out_of_core, 'RowsSeen', Changing)
    with pytest.raises(ValueError, match='holds other files than when they were opened'):
        RatingsDataLoaders.from_parquet(tmp_path, valid_pct=0)

def test_a_disk_without_room(tmp_path, monkeypatch):
    monkeypatch.setattr(out_of_core.shutil, 'disk_usage', lambda folder: SimpleNamespace(free=100))
    with pytest.raises(OSError, match='name a folder with more room, as folder='):
        RatingsDataLoaders.from_parquet(write(ten(), tmp_path))

def test_nothing_is_left_in_the_folder(tmp_path):
    (tmp_path/'kept').mkdir()
    dls = RatingsDataLoaders.from_parquet(write(ten(), tmp_path), folder=tmp_path/'kept', valid_pct=0,
                                          duplicates='keep')
    assert not [*(tmp_path/'kept').iterdir()] and len(dls.train.dataset) == 10

def test_without_pyarrow(tmp_path):
    write(ten(), tmp_path)
    code = ('import sys; sys.modules["pyarrow"] = None; from collab_deep.all import *\n'
            f'RatingsDataLoaders.from_parquet({str(tmp_path)!r})')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert 'pip install "paddy-multi[parquet]"' in done.stderr

@pytest.mark.slow
def test_twenty_million_rows_within_a_gigabyte(tmp_path):
    sys.path.insert(0, str(ROOT/'benchmarks'))
    import collab_parquet
    collab_parquet.write(tmp_path/'r.parquet', 20_000_000)
    assert collab_parquet.in_process(str(tmp_path/'r.parquet'), 'from_parquet')['epoch_mb'] < 1000
