"Pictures as folders hold them: deep, turned, cut short, no pictures at all, and folders that link to themselves"
import io
import os
import signal
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import PILImage, PILImageBW, Resize, get_image_files, load_learner, parent_label, set_seed
from PIL import Image

import paddy_multi.data.pictures as pictures
from paddy_multi.all import (CategoryTarget, MultiTargetDataLoaders, PictureBlock, RegressionTarget, Targets,
                             check_pictures, match_files, multi_target_learner, picture_files, predict_named,
                             read_picture)


@pytest.fixture(autouse=True)
def no_hang():
    "Whatever waits for a pipe is stopped"
    def stop(*args): raise TimeoutError('still waiting after 20 s')
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)

def grey(values): return np.asarray(values, np.uint16)

DEEP = grey([[0, 1, 128, 129], [257, 25700, 32767, 32768], [40000, 65000, 65406, 65407], [65534, 65535, 0, 65535]])
FLAT = np.array([[0, 0, 0, 1], [1, 100, 127, 128], [156, 253, 254, 255], [255, 255, 0, 255]], np.uint8)  # DEEP/257

def png16(pixels):
    "A PNG of 16 bits, written by hand: Pillow writes grey ones alone"
    pixels = pixels[...,None] if pixels.ndim == 2 else pixels
    height, width, n = pixels.shape
    def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind+data))
    header = struct.pack('>IIBBBBB', width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[n], 0, 0, 0)
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in pixels)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')

def loaders(folder, **kwargs):
    "Loaders of the pictures in `folder`, whose labels are made up"
    targets = Targets(place=CategoryTarget(lambda o: 'ab'[int(Path(o).stem) % 2]),
                      number=RegressionTarget(lambda o: float(Path(o).stem)))
    kwargs = dict(splitter=lambda files: ([*range(2, len(files))], [0, 1]), bs=2, num_workers=0) | kwargs
    return MultiTargetDataLoaders.from_folder(folder, targets, **kwargs)

def pixels_of(dls, file):
    "What reaches the model of `file`, before it is normalised"
    return dls.test_dl([file]).one_batch()[0][0].cpu().numpy()*255


# --- 16 bits ----------------------------------------------------------------------------------
@pytest.fixture
def six(tmp_path):
    folder = tmp_path/'six'
    folder.mkdir()
    for i in range(6): Image.fromarray(FLAT+i).save(folder/f'{i}.png')
    return folder

def write_deep(file):
    if file.suffix == '.pgm': file.write_bytes(b'P5 4 4 65535\n' + DEEP.astype('>u2').tobytes())
    else: Image.fromarray(DEEP).save(file)
    return file

@pytest.mark.parametrize('suffix', ['.png', '.tiff', '.pgm'])
@pytest.mark.parametrize('img_cls', [PILImage, PILImageBW])
def test_grey_pictures_of_16_bits_reach_the_model_as_they_are(six, tmp_path, suffix, img_cls):
    file = write_deep(tmp_path/f'7{suffix}')
    found = pixels_of(loaders(six, img_cls=img_cls), file)
    assert found.shape == ((3, 4, 4) if img_cls is PILImage else (1, 4, 4))
    for channel in found: assert np.abs(channel-FLAT).max() < .01
    assert (np.asarray(PILImage.create(file))[...,0] == 255).sum() == 11  # as fastai reads it

@pytest.mark.parametrize('n', [2, 3, 4])
def test_pictures_of_16_bits_with_colours_or_transparency(tmp_path, n):
    (tmp_path/'x.png').write_bytes(png16(np.repeat(DEEP[...,None], n, 2)))
    found = np.asarray(read_picture(tmp_path/'x.png'))
    assert found.shape == (4, 4, 3) and np.abs(found[...,1]-DEEP/257.).max() <= 1  # Pillow cuts, and does not round

@pytest.mark.parametrize('order', ['<', '>'])
def test_either_order_of_bytes(tmp_path, order):
    header = b'II*\0' if order == '<' else b'MM\0*'
    tags = [(256, 4), (257, 4), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, 4), (279, 32)]
    entries = b''.join(struct.pack(f'{order}HHIHH', tag, 3, 1, value, 0) for tag, value in tags)
    ifd = struct.pack(f'{order}H', len(tags)) + entries + struct.pack(f'{order}I', 0)
    (tmp_path/'x.tif').write_bytes(header + struct.pack(f'{order}I', 40) + DEEP.astype(f'{order}u2').tobytes() + ifd)
    assert np.array_equal(read_picture(tmp_path/'x.tif', 'L'), FLAT)

@pytest.mark.parametrize('pixels, text', [
    (DEEP.astype(np.int32), 'whole numbers of 32 bits'), (DEEP.astype(np.float32), 'decimal numbers'),
    (DEEP/np.float32(65535), 'decimal numbers')])
def test_numbers_without_a_white_are_refused_by_name(six, pixels, text):
    file = six/'9.tiff'
    Image.fromarray(pixels).save(file)
    said = f"cannot read '.*9.tiff' .*its pixels are {text}, of which none is known to be white: save it with 8 or 16"
    with pytest.raises(OSError, match=said): read_picture(file)
    with pytest.raises(OSError, match=said): loaders(six).test_dl([file]).one_batch()
    found = check_pictures(picture_files(six), progress=False)
    assert list(found.file) == [file] and text in found.error[0]

def test_deep_pictures_are_predicted_as_flat_ones(six, tmp_path):
    set_seed(1)
    learn = multi_target_learner(loaders(six), 'test_resnet', pretrained=False)
    deep,flat = write_deep(tmp_path/'1.png'),tmp_path/'2.png'
    Image.fromarray(FLAT).save(flat)
    learn.export(tmp_path/'model.pkl')
    for one in (learn, load_learner(tmp_path/'model.pkl')):
        with one.no_bar(): found = predict_named(one, [deep, str(flat), Image.open(deep), DEEP, Image.open(flat)])
        assert found.error.isna().all() and np.ptp(found.number) < 1e-6 and np.ptp(found.place_prob) < 1e-6

def test_pictures_in_memory_of_any_mode_are_predicted_and_left_alone(six):
    learn = multi_target_learner(loaders(six), 'test_resnet', pretrained=False)
    modes = ['1', 'L', 'P', 'RGB', 'RGBA', 'LA', 'CMYK', 'YCbCr']
    given = [Image.fromarray(FLAT).convert('RGB').convert(mode) if mode not in ('1', 'L', 'LA')
             else Image.fromarray(FLAT).convert(mode) for mode in modes]
    with learn.no_bar(): found = predict_named(learn, given)
    assert found.error.isna().all()
    assert [o.mode for o in given] == modes and {type(o) for o in given} == {Image.Image}


# --- turned photos ----------------------------------------------------------------------------
UPRIGHT = np.kron(np.array([[0, 60, 120], [180, 240, 30]], np.uint8), np.ones((16, 16), np.uint8))
STORED = {1: UPRIGHT, 2: UPRIGHT[:,::-1], 3: UPRIGHT[::-1,::-1], 4: UPRIGHT[::-1], 5: UPRIGHT.T,
          6: np.rot90(UPRIGHT), 7: UPRIGHT[::-1,::-1].T, 8: np.rot90(UPRIGHT, -1)}  # what is turned to UPRIGHT

def photo(file, orientation):
    img = Image.fromarray(np.ascontiguousarray(STORED[orientation])).convert('RGB')
    exif = img.getexif()
    exif[0x0112] = orientation
    options = dict(quality=100, subsampling=0) if file.suffix == '.jpg' else dict(lossless=True)
    img.save(file, exif=exif, **({} if file.suffix == '.png' else options))
    return file

@pytest.mark.parametrize('suffix', ['.jpg', '.webp', '.png'])
@pytest.mark.parametrize('orientation', STORED)
def test_every_orientation(tmp_path, orientation, suffix):
    file = photo(tmp_path/f'x{suffix}', orientation)
    for orient, expected in ((True, UPRIGHT), (False, STORED[orientation])):
        found = np.asarray(read_picture(file, 'L', orient=orient)).astype(int)
        assert found.shape == expected.shape and np.abs(found-expected).max() <= 4

@pytest.fixture
def phone(tmp_path):
    "Photos 0 to 7, those from 1 on stored turned"
    folder = tmp_path/'phone'
    folder.mkdir()
    for i in range(8): photo(folder/f'{i}.jpg', i+1)
    return folder

def test_turned_photos_are_warned_of_with_their_number(phone):
    with pytest.warns(UserWarning, match="7 of 8 pictures looked at are stored turned.* such as '1.jpg', '2.jpg', "
                                         "'3.jpg' and 4 more: orient=True turns them upright, orient=False reads"):
        dls = loaders(phone)
    with pytest.warns(UserWarning, match='1 of 1 pictures looked at'): dls.test_dl([phone/'5.jpg'])

@pytest.mark.parametrize('orient, expected', [(False, STORED[6]), (True, UPRIGHT)])
def test_an_answer_to_the_question_is_kept_without_a_warning(phone, tmp_path, orient, expected):
    df = pd.DataFrame(dict(image=[f'{i}.jpg' for i in range(8)], label=[*'abcd']*2))
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*stored turned')
        dls = MultiTargetDataLoaders.from_df(df, phone, targets=['label'], orient=orient, bs=2, num_workers=0,
                                             seed=1, item_tfms=Resize((32, 48), method='squish'))
        learn = multi_target_learner(dls, 'test_resnet', pretrained=False)
        learn.export(tmp_path/'model.pkl')
        for one in (dls, load_learner(tmp_path/'model.pkl').dls):
            for item in (phone/'5.jpg', str(phone/'5.jpg')):
                x = one.test_dl([item]).dataset[0][0]
                assert np.abs(np.asarray(x)[...,0].astype(int)-expected).max() <= 4

def test_of_many_some_that_are_spread_evenly_are_looked_at(phone, monkeypatch):
    seen = []
    monkeypatch.setattr(pictures, 'is_turned', lambda o: seen.append(o) or o == 900)
    monkeypatch.setattr(pictures, 'Path', lambda o: Path(f'{o}.jpg'))
    with pytest.warns(UserWarning, match="1 of 10 pictures looked at .* '900.jpg'"):
        pictures.warn_of_turned(range(1000), most=10)
    assert seen == [*range(0, 1000, 100)]

def test_a_type_that_reads_pictures_itself_is_not_turned():
    class Own(PILImage):
        @classmethod
        def create(cls, fn, **kwargs): return cls(Image.open(fn).convert('RGB'))
    PictureBlock(Own)
    with pytest.raises(ValueError, match='Own reads its pictures itself: leave orient out'): PictureBlock(Own, True)


# --- broken files -----------------------------------------------------------------------------
NOISE = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
FORMATS = dict(jpg='JPEG', png='PNG', gif='GIF', bmp='BMP', webp='WEBP', tiff='TIFF')

def encoded(suffix):
    buffer = io.BytesIO()
    Image.fromarray(NOISE).save(buffer, FORMATS[suffix])
    return buffer.getvalue()

def opens(data):
    "Does Pillow, asked without this package, decode `data`?"
    try: Image.open(io.BytesIO(data)).convert('RGB')
    except Exception: return False
    return True

@pytest.mark.filterwarnings('ignore:Truncated File Read')
@pytest.mark.parametrize('n_workers', [0, 3])
def test_what_is_cut_short_is_found_in_any_format(tmp_path, n_workers):
    expected, files = [], []
    for suffix in FORMATS:
        data = encoded(suffix)
        for cut in (0, 3, 40, len(data)//3, len(data)*2//3, len(data)-40, len(data)):
            files.append(tmp_path/f'{cut}.{suffix}')
            files[-1].write_bytes(data[:cut])
            if not opens(data[:cut]): expected.append(files[-1])
    assert 30 < len(expected) < len(files)
    found = check_pictures(files, n_workers=n_workers, progress=False)
    assert list(found.file) == expected and list(found.columns) == ['file', 'error']
    for file, error in zip(found.file, found.error): assert str(file) in error and '\n' not in error

def test_random_damage_never_ends_in_anything_but_a_row(tmp_path):
    rng, files = np.random.default_rng(0), []
    for i in range(120):
        suffix = [*FORMATS][i % len(FORMATS)]
        data = bytearray(encoded(suffix))
        for at in rng.integers(0, min(len(data), 200 if i % 2 else len(data)), 4): data[at] = rng.integers(256)
        files.append(tmp_path/f'{i}.{suffix}')
        files[-1].write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        found = check_pictures(files, n_workers=2, progress=False)
        assert list(found.file) == [o for o in files if not opens(o.read_bytes())]
    assert 10 < len(found) < 120

def test_a_bomb_is_named_and_not_decoded(tmp_path):
    Image.new('1', (20_000, 20_000)).save(tmp_path/'bomb.png')
    found = check_pictures([tmp_path/'bomb.png'], progress=False)
    assert 'bomb.png' in found.error[0] and 'DecompressionBombError' in found.error[0]
    with pytest.raises(OSError, match='bomb.png'): read_picture(tmp_path/'bomb.png')

def odd_entries(folder):
    "Entries with the names of pictures that are none"
    os.mkfifo(folder/'pipe.png')
    (folder/'nothing.png').symlink_to('nowhere.png')
    (folder/'itself.png').symlink_to('itself.png')
    (folder/'device.png').symlink_to('/dev/zero')
    return [folder/f'{o}.png' for o in ('pipe', 'nothing', 'itself', 'device')]

def test_what_is_no_file_is_named_and_never_waited_for(tmp_path):
    odd = [*odd_entries(tmp_path), tmp_path, tmp_path/'none.png', tmp_path/'nul\0.png']
    found = check_pictures(odd, n_workers=2, progress=False)
    assert list(found.file) == odd
    said = ['a named pipe', 'No such file', 'Too many levels', 'a device', 'a folder', 'No such file', 'null byte']
    for text, error in zip(said, found.error): assert text in error

@pytest.mark.parametrize('n_workers', [0, 1])
def test_a_broken_picture_is_named_by_the_batch_that_meets_it(six, n_workers):
    (six/'3.png').write_bytes(encoded('png')[:500])
    dls = loaders(six, num_workers=n_workers)
    with pytest.raises(OSError, match=r"cannot read '.*3.png' .*check_pictures\(files\) finds all files like it"):
        for _ in dls.test_dl(picture_files(six)): pass

def test_a_name_with_a_line_break_stays_in_one_line(six):
    file = six/'3\n.png'
    file.write_bytes(encoded('png')[:500])
    found = check_pictures([file], progress=False)
    assert found.file[0] == file and '\\n' in found.error[0] and '\n' not in found.error[0]
    with pytest.raises(OSError, match=r'3\\n.png'): read_picture(file)

def test_a_short_name_is_named_too(six, monkeypatch):
    monkeypatch.chdir(six)
    Path('e').write_bytes(encoded('png')[:500])
    with pytest.raises(OSError, match="cannot read 'e' "): read_picture('e')

def test_a_file_that_goes_meanwhile_is_a_row(six, monkeypatch):
    files = picture_files(six)
    read, gone = read_picture, files[3]
    def slow(file):
        if file == gone: file.unlink()
        return read(file)
    monkeypatch.setattr(pictures, 'read_picture', slow)
    found = check_pictures(files, progress=False)
    assert list(found.file) == [gone] and found.error[0].startswith('FileNotFoundError')

def test_workers_read_at_once_and_keep_the_order(tmp_path, monkeypatch):
    names, together = [str(i) for i in range(400)], threading.Barrier(3)
    def read(file):
        if int(file) in (0, 32, 64): together.wait(10)   # the first of three parts
        if int(file) % 7 == 0: raise OSError(f'bad {file}')
    monkeypatch.setattr(pictures, 'read_picture', read)
    found = check_pictures(iter(names), n_workers=3, progress=False)
    assert list(found.file) == names[::7] and list(found.error) == [f'OSError: bad {o}' for o in names[::7]]

def test_a_bar_shows_how_far_it_is(six, capsys):
    assert check_pictures(picture_files(six)).empty
    assert '1/1' in capsys.readouterr().out
    assert check_pictures([]).empty and list(check_pictures([]).columns) == ['file', 'error']

@pytest.mark.parametrize('files', ['x.png', Path('x.png'), b'x.png'])
def test_one_file_is_no_list(files):
    with pytest.raises(TypeError, match='expected a list of files, found .*: write'): check_pictures(files)


# --- folders ----------------------------------------------------------------------------------
def touch(folder, *names):
    for name in names:
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (4, 4)).save(folder/name)

def below(folder, files): return sorted(o.relative_to(folder).as_posix() for o in files)

@pytest.mark.parametrize('links', [0, 1, 2, 5])
def test_a_folder_that_links_to_itself_is_listed_once(tmp_path, links):
    touch(tmp_path, 'a/1.png', 'a/b/2.png', '3.png')
    for i in range(links): (tmp_path/'a'/f'link{i}').symlink_to(['..', '.', '../a/b', '../..', '/'][i])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        assert below(tmp_path, picture_files(tmp_path)) == ['3.png', 'a/1.png', 'a/b/2.png']
        assert len(match_files(['1.png', '2.png', '3.png'], tmp_path)) == 3
    said = [f'{links} links lead to folders that are listed already or hold this one']*2 if links else []
    assert [str(o.message).split(',')[0] for o in seen] == said

def test_folders_that_link_to_each_other(tmp_path):
    for i in range(9):
        touch(tmp_path, f'{i}/{i}.png')
        for k in range(9):
            if k != i: (tmp_path/str(i)/f'to{k}').symlink_to(f'../{k}')  # 9! paths and more
    with pytest.warns(UserWarning, match='72 links'): files = picture_files(tmp_path)
    assert below(tmp_path, files) == [f'{i}/{i}.png' for i in range(9)]

def test_links_to_other_places_are_followed(tmp_path):
    touch(tmp_path, 'store/1.png', 'store/deep/2.png', 'hidden/.cache/3.png', 'data/0.png')
    (tmp_path/'data'/'linked').symlink_to(tmp_path/'store')
    (tmp_path/'data'/'cached').symlink_to(tmp_path/'hidden'/'.cache')
    (tmp_path/'data'/'4.png').symlink_to(tmp_path/'store'/'1.png')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        found = picture_files(tmp_path/'data')
    assert below(tmp_path/'data', found) == ['0.png', '4.png', 'cached/3.png', 'linked/1.png', 'linked/deep/2.png']
    assert len(picture_files((tmp_path/'data'/'linked'))) == 2

def test_without_links_the_list_is_that_of_fastai(tmp_path):
    touch(tmp_path, *(f'{a}/{b}/{i}.{s}' for a in 'xyz' for b in 'pq' for i in range(3) for s in ('png', 'JPG')),
          '.hidden/1.png', 'x/.2.png', '0.png')
    (tmp_path/'x'/'notes.txt').touch()
    assert picture_files(tmp_path) == list(get_image_files(tmp_path))
    assert picture_files(tmp_path, ['x', 'z']) == list(get_image_files(tmp_path, folders=['x', 'z']))

def test_odd_entries_are_left_out_and_named(six):
    odd_entries(six)
    said = "4 entries with the name of a picture are no files and are left out, such as '.*device.png'"
    with pytest.warns(UserWarning, match=said): files = picture_files(six)
    assert len(files) == 6
    with pytest.warns(UserWarning, match=said): loaders(six).one_batch()
    df = pd.DataFrame(dict(image=['0.png', 'pipe.png'], label=['a', 'b']))
    with (pytest.warns(UserWarning, match='no files and are left out'),
          pytest.raises(FileNotFoundError, match="1 rows have no picture, such as 'pipe.png'")):
        MultiTargetDataLoaders.from_df(df, six, targets=['label'])

def test_a_folder_without_rights_is_named(tmp_path, monkeypatch):
    touch(tmp_path, 'shut/1.png', '2.png')
    scandir = os.scandir
    def refuse(place):
        if Path(place).name == 'shut': raise PermissionError(13, 'Permission denied', str(place))
        return scandir(place)
    monkeypatch.setattr(os, 'scandir', refuse)              # root may read any folder
    with pytest.warns(UserWarning, match="shut' may not be read, so its pictures are left out"):
        assert below(tmp_path, picture_files(tmp_path)) == ['2.png']
    with pytest.raises(PermissionError, match='shut'): picture_files(tmp_path/'shut')

def test_a_class_of_a_linked_folder_keeps_its_name(tmp_path):
    touch(tmp_path, *(f'store/{i}.png' for i in range(6)), *(f'data/b/{i}.png' for i in range(6)))
    (tmp_path/'data'/'a').symlink_to(tmp_path/'store')
    dls = MultiTargetDataLoaders.from_folder(tmp_path/'data', Targets(label=CategoryTarget(parent_label)), seed=1,
                                             bs=2, num_workers=0)
    assert dls.targets.vocabs == dict(label=['a', 'b']) and len(dls.train_ds)+len(dls.valid_ds) == 12


# --- names in a table -------------------------------------------------------------------------
def test_one_name_given_twice_is_found_in_no_time(tmp_path):
    names = [f'{i}.png' for i in range(200_000)]
    with pytest.raises(ValueError, match="the table names '5.png' more than once: keep one row a picture; rows of a "
                                         "class that are to count more often are drawn so by balance='column'"):
        match_files([*names, '5.png'], tmp_path)

def test_rows_without_a_name_are_refused(six):
    df = pd.DataFrame(dict(image=['0.png', None, ' '], label=[*'aba']), index=[7, 8, 9])
    with pytest.raises(ValueError, match="2 rows have no name in column 'image', such as row 8: drop them"):
        MultiTargetDataLoaders.from_df(df, six, targets=['label'])

@pytest.mark.parametrize('name', ['{folder}/1.png', '{folder}/../six/1.png', './1.png', '1.png'])
def test_a_picture_by_any_name(six, name, monkeypatch):
    monkeypatch.chdir(six.parent)
    names = [name.format(folder=six), '2.png']
    with pytest.warns(UserWarning, match='4 pictures have no row'): found = match_files(names, 'six')
    assert [os.path.realpath(o) for o in found] == [str(six/'1.png'), str(six/'2.png')]

def test_a_table_of_whole_paths_needs_no_folder(six, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    df = pd.DataFrame(dict(image=[str(six/f'{i}.png') for i in range(6)], label=[*'ab']*3))
    dls = MultiTargetDataLoaders.from_df(df, targets=['label'], seed=1, bs=2, num_workers=0)
    for f, (_, y) in zip(dls.train_ds.items, dls.train_ds): assert int(y) == int(f.stem) % 2
    assert torch.equal(dls.test_dl(df, with_labels=True).one_batch()[1][:,0].cpu(), torch.tensor([0., 1.]))
