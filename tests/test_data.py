"`sample_digits` interrupted, crowded and refused; `lean_of` on random images"
import resource
import multiprocessing
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from sklearn.datasets import load_digits

from paddy_multi.data.digits import lean_of, sample_digits

SCANS = (load_digits().images*255/16).round()


def assert_complete(path):
    "Every scan is there, whole, and the table tells of each once"
    names = [f'{i:04d}.png' for i in range(len(SCANS))]
    assert sorted(o.name for o in (path/'images').iterdir()) == names
    assert np.array_equal([np.array(Image.open(path/'images'/o)) for o in names], SCANS)
    df = pd.read_csv(path/'labels.csv')
    assert list(df.columns) == ['image', 'digit', 'slant', 'lean', 'ink'] and list(df.image) == names
    assert sorted(o.name for o in path.iterdir()) == ['images', 'labels.csv']      # nothing else is left behind


# --- the angle ------------------------------------------------------------------------------------------------------
shapes = st.tuples(st.integers(2, 9), st.integers(1, 9))
images = arrays(float, shapes, elements=st.integers(0, 16)).filter(lambda o: (o.sum(1) > 0).sum() > 1)

@settings(deadline=None)
@given(images, st.floats(.01, 100), st.tuples(*[st.integers(0, 4)]*4))
def test_brightness_and_place_do_not_matter_and_the_mirror_image_leans_the_other_way(img, bright, margins):
    lean, (top, bottom, left, right) = lean_of(img), margins
    assert -90 < lean < 90
    assert lean_of(img*bright) == pytest.approx(lean, abs=1e-9)
    assert lean_of(np.pad(img, ((top, bottom), (left, right)))) == pytest.approx(lean, abs=1e-9)
    assert lean_of(img[:, ::-1]) == pytest.approx(-lean, abs=1e-9)
    assert lean_of(img[::-1]) == pytest.approx(-lean, abs=1e-9)

@settings(deadline=None)
@given(images, st.integers(1, 3))
def test_moving_each_row_by_k_more_than_the_one_below_adds_k_to_the_slope(img, k):
    height, width = img.shape
    sheared = np.zeros((height, width + k*height))
    for y, row in enumerate(img): sheared[y, k*(height-1-y):][:width] = row
    assert np.tan(np.radians(lean_of(sheared))) == pytest.approx(np.tan(np.radians(lean_of(img))) + k)

@pytest.mark.parametrize('kind', [np.uint8, np.int64, np.float32])
def test_the_kind_of_number_does_not_matter(kind):
    for img in SCANS[:20]:
        assert lean_of(img.astype(kind)) == pytest.approx(lean_of(img), abs=1e-4)  # float32 has 7 digits


# --- the folder -----------------------------------------------------------------------------------------------------
def test_a_path_as_text_into_folders_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sample_digits('new/folder') == Path('new/folder')
    assert_complete(tmp_path/'new'/'folder')

def test_an_interrupted_folder_is_completed(tmp_path, monkeypatch):
    save, calls = Image.Image.save, iter(range(100))
    def interrupted(img, file, *args, **kw):
        save(img, file, *args, **kw)
        if next(calls) == 60: raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Image.Image, 'save', interrupted)
        sample_digits(tmp_path)
    assert not (tmp_path/'labels.csv').exists()         # so nobody takes it for complete
    broken = tmp_path/'images'/'0007.png'
    broken.write_bytes(broken.read_bytes()[:30])        # as a process that is killed while it writes
    sample_digits(tmp_path)
    assert_complete(tmp_path)

def test_a_complete_folder_is_not_written_to(tmp_path, monkeypatch):
    sample_digits(tmp_path)
    monkeypatch.setattr(Image.Image, 'save', lambda *a, **k: pytest.fail('wrote a picture again'))
    assert sample_digits(tmp_path) == tmp_path

def write_together(path, barrier):
    barrier.wait()
    sample_digits(path)

@pytest.mark.parametrize('again', range(2))
def test_processes_at_once(tmp_path, again):
    fork = multiprocessing.get_context('fork')          # what is imported stays imported
    barrier = fork.Barrier(3)
    writers = [fork.Process(target=write_together, args=(tmp_path, barrier)) for _ in range(3)]
    for o in writers: o.start()
    for o in writers: o.join(60)
    assert [o.exitcode for o in writers] == [0, 0, 0]
    assert_complete(tmp_path)

@pytest.mark.parametrize('table', ['', 'image,digit\n', 'image,digit,slant,lean,ink\n0000.png,0,upright,1.0,0.2\n'])
def test_a_folder_with_other_labels_is_refused_and_not_touched(tmp_path, table):
    (tmp_path/'labels.csv').write_text(table)
    said = 'labels.csv holds other labels than these digits: choose an empty folder'
    with pytest.raises(FileExistsError, match=said): sample_digits(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path/'labels.csv'] and (tmp_path/'labels.csv').read_text() == table

def test_other_files_of_the_folder_are_kept(tmp_path):
    (tmp_path/'images').mkdir()
    (tmp_path/'images'/'mine.png').write_text('mine')
    (tmp_path/'notes.txt').write_text('mine too')
    sample_digits(tmp_path)
    assert (tmp_path/'images'/'mine.png').read_text() == 'mine' and (tmp_path/'notes.txt').read_text() == 'mine too'

@pytest.fixture
def no_rights():
    "A folder that may be read and not written to"
    with TemporaryDirectory() as folder:
        path, root = Path(folder), os.geteuid() == 0
        path.chmod(0o555)
        if root: os.seteuid(65534)                      # root may write anywhere
        yield path
        if root: os.seteuid(0)
        path.chmod(0o755)

def test_a_folder_without_rights_is_an_error_that_names_it(no_rights):
    with pytest.raises(PermissionError, match='digits'): sample_digits(no_rights/'digits')

def test_a_file_in_the_way_is_an_error_and_is_kept(tmp_path):
    file = tmp_path/'digits'
    file.write_text('mine')
    with pytest.raises(OSError, match='digits'): sample_digits(file)
    with pytest.raises(OSError, match='digits'): sample_digits(file/'below')
    assert file.read_text() == 'mine'

def fill_the_disk(path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))     # a picture fits, the table does not
    sample_digits(path)

def test_a_table_cut_short_does_not_lock_the_folder(tmp_path):
    writer = multiprocessing.get_context('fork').Process(target=fill_the_disk, args=(tmp_path,))
    writer.start()
    writer.join(60)
    assert writer.exitcode != 0 and not (tmp_path/'labels.csv').exists()
    assert sample_digits(tmp_path) == tmp_path
    assert pd.read_csv(tmp_path/'labels.csv').shape == (1797, 5)

def test_no_angle_is_minus_nought(tmp_path):
    assert '-0.0,' not in (sample_digits(tmp_path)/'labels.csv').read_text()
