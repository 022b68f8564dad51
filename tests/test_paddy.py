"`sample_paddy` over many settings, interrupted, crowded, from another process; what its pictures show"
import multiprocessing
import subprocess
import sys
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from paddy_multi.data.paddy import _diseases, _labels, _Leaf, _looks, _picture, _signs, _size, _varieties, sample_paddy


def files_of(path): return {o.relative_to(path).as_posix(): o.read_bytes() for o in path.rglob('*') if o.is_file()}


def table_of(path): return pd.read_csv(path/'train.csv')


def assert_complete(path):
    "The table and the folder tell of the same pictures, each whole and in the folder of its disease"
    df = table_of(path)
    assert list(df.columns) == ['image_id', 'label', 'variety', 'age'] and df.image_id.is_unique
    assert {f'train_images/{o.label}/{o.image_id}' for o in df.itertuples()} | {'train.csv'} == set(files_of(path))
    for o in df.itertuples(): Image.open(path/'train_images'/o.label/o.image_id).load()


# --- the labels -----------------------------------------------------------------------------------------------------
def test_the_tables_agree():
    assert sum(_diseases.values()) == sum(_varieties.values()) == 100
    assert list(_looks) == list(_varieties) and set(_signs) < set(_diseases)
    assert len(set(_looks.values())) == len(_looks)

@settings(max_examples=8, deadline=None)
@given(st.integers(1, 8), st.floats(0, .99), st.integers(0, 2**32))
def test_any_setting_gives_a_complete_folder_with_that_share_of_gaps(n, missing, seed):
    with TemporaryDirectory() as folder:
        path = sample_paddy(folder, n=n, missing=missing, seed=seed)
        assert_complete(path)
        df = table_of(path)
        assert len(df) == n and df.isna().sum().tolist() == [0, 0, round(missing*n), round(missing*n)]
        assert set(df.label) <= set(_diseases) and set(df.variety.dropna()) <= set(_varieties)
        assert df.age.dropna().between(45, 82).all()

@settings(deadline=None)
@given(st.integers(1, 500), st.integers(0, 2**32))
def test_labels_stand_as_in_the_competition(n, seed):
    df = _labels(n, seed)
    assert df.equals(df.sort_values(['label', 'image_id'], ignore_index=True)) and df.equals(_labels(n, seed))
    assert df.image_id.str.fullmatch(r'1\d{5}\.jpg').all()

def test_gaps_of_the_two_columns_have_nothing_to_do_with_each_other(tmp_path):
    df = table_of(sample_paddy(tmp_path, n=80, missing=.5))
    assert 8 <= (df.variety.isna() & df.age.isna()).sum() <= 32  # 20 expected

def test_ages_are_written_as_whole_numbers_beside_gaps(tmp_path):
    sample_paddy(tmp_path, n=10, missing=.3)
    assert '.0' not in (tmp_path/'train.csv').read_text()


# --- the pictures ---------------------------------------------------------------------------------------------------
def picture(disease, variety, age, *seed):
    return np.asarray(_picture(disease, variety, age, np.random.default_rng(seed)), float)

def mean_picture(disease, variety, age, n=24):
    return np.mean([picture(disease, variety, age, 5, i) for i in range(n)], 0)

@pytest.fixture(scope='module')
def healthy(): return mean_picture('normal', 'ADT45', 60)

@pytest.mark.parametrize('disease', [o for o in _diseases if o != 'normal'])
def test_a_disease_is_seen(healthy, disease):
    "Seeds give the same light and ground until the first leaf is drawn: pictures differ where the plant is"
    sick = mean_picture(disease, 'ADT45', 60)
    assert np.abs(sick-healthy).max() > 12

def test_age_is_seen_in_size():
    "Green stands out from the ground in more of the picture"
    def green(age, i):
        red, green, blue = np.moveaxis(picture('normal', 'ADT45', age, 9, i), -1, 0)
        return ((green > 1.35*red) & (green > 1.35*blue)).mean()
    def mean_green(age): return np.mean([green(age, i) for i in range(30)])
    assert mean_green(48) < mean_green(60) < mean_green(69)

@pytest.mark.parametrize('disease', _diseases)
@pytest.mark.parametrize('variety', ['ADT45', 'Surya'])
def test_every_picture_is_drawn_with_contrast(disease, variety):
    for age in (45, 82):
        img = _picture(disease, variety, age, np.random.default_rng(age))
        assert img.size == _size and img.mode == 'RGB' and np.asarray(img).std() > 8

@given(st.floats(-3, 3), st.floats(10, 300), st.floats(.5, 40), st.floats(-1.5, 1.5))
def test_a_leaf_is_as_long_as_it_says_and_its_edges_mirror_each_other(angle, length, width, bend):
    leaf, t = _Leaf((50, 60), angle, length, width, bend), np.linspace(0, 1, 400)
    mid, left, right = (leaf.at(t, s) for s in (0, -1, 1))
    assert mid[0] == pytest.approx([50, 60])
    assert np.linalg.norm(np.diff(mid, axis=0), axis=1).sum() == pytest.approx(length, rel=1e-3)
    assert (left+right)/2 == pytest.approx(mid)
    assert 0 < np.linalg.norm(left-right, axis=1).max() <= 1.2*width
    assert left[-1] == pytest.approx(right[-1])


# --- the folder -----------------------------------------------------------------------------------------------------
def test_another_process_writes_the_same_bytes(tmp_path):
    sample_paddy(tmp_path/'here', n=12, missing=.2, seed=7)
    code = ('from paddy_multi.data.paddy import sample_paddy\n'
            f'sample_paddy({str(tmp_path/"there")!r}, n=12, missing=.2, seed=7)')
    subprocess.run([sys.executable, '-c', code], check=True)
    assert files_of(tmp_path/'here') == files_of(tmp_path/'there')

def test_an_interrupted_folder_is_completed_with_the_same_bytes(tmp_path, monkeypatch):
    save, calls = Image.Image.save, iter(range(100))
    def interrupted(img, file, *args, **kw):
        save(img, file, *args, **kw)
        if next(calls) == 5: raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Image.Image, 'save', interrupted)
        sample_paddy(tmp_path/'a', n=12)
    assert not (tmp_path/'a/train.csv').exists()
    broken = next((tmp_path/'a').rglob('*.jpg'))
    broken.write_bytes(broken.read_bytes()[:30])  # as a process that is killed while it writes
    with pytest.raises(FileExistsError, match='files that are not of this sample'):
        sample_paddy(tmp_path/'a', n=12, seed=1)
    assert files_of(sample_paddy(tmp_path/'a', n=12)) == files_of(sample_paddy(tmp_path/'b', n=12))

def write_together(path, barrier):
    barrier.wait()
    sample_paddy(path, n=20)

def test_processes_at_once(tmp_path):
    fork = multiprocessing.get_context('fork')
    barrier = fork.Barrier(3)
    writers = [fork.Process(target=write_together, args=(tmp_path, barrier)) for _ in range(3)]
    for o in writers: o.start()
    for o in writers: o.join(60)
    assert [o.exitcode for o in writers] == [0, 0, 0]
    assert_complete(tmp_path)

def test_pictures_of_others_are_neither_mixed_in_nor_touched(tmp_path):
    mine = tmp_path/'train_images'/'blast'/'mine.jpg'
    mine.parent.mkdir(parents=True)
    mine.write_text('mine')
    said = 'train_images holds 1 files that are not of this sample, mine.jpg first: choose an empty folder'
    with pytest.raises(FileExistsError, match=said): sample_paddy(tmp_path, n=5)
    assert files_of(tmp_path) == {'train_images/blast/mine.jpg': b'mine'}

@pytest.mark.parametrize('table', ['', 'image_id,label,variety,age\n'])
def test_a_table_of_others_is_not_touched(tmp_path, table):
    (tmp_path/'train.csv').write_text(table)
    with pytest.raises(FileExistsError, match='train.csv holds other labels than this sample: choose an empty folder'):
        sample_paddy(tmp_path, n=5)
    assert files_of(tmp_path) == {'train.csv': table.encode()}

def test_files_beside_the_set_are_kept(tmp_path):
    (tmp_path/'sample_submission.csv').write_text('image_id,label\n')
    sample_paddy(tmp_path, n=3)
    assert (tmp_path/'sample_submission.csv').read_text() == 'image_id,label\n'

@pytest.mark.parametrize('kw,text', [(dict(n=0), 'found 0'), (dict(n='5'), "found '5'"),
                                     (dict(missing=1.), 'found 1.0'), (dict(missing=-.2), 'found -0.2')])
def test_a_refused_setting_leaves_nothing_behind(tmp_path, kw, text):
    with pytest.raises(ValueError, match=text): sample_paddy(tmp_path/'new', **kw)
    assert not (tmp_path/'new').exists()
