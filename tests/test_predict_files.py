"Predictions of many files in parts: the rows of `predict_named`, in one process or several, and after any stop"
import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from fastai.vision.all import Callback, Resize, get_image_files, load_learner, nn, set_seed

import paddy_multi.use.csv_parts as csv_parts
from paddy_multi.all import (MultiTargetDataLoaders, across_processes, multi_target_learner, predict_files,
                             predict_named, sample_digits)
from paddy_multi.core.checks import test_close as close
from paddy_multi.core.files import locked
from paddy_multi.distributed.launch import in_processes
from paddy_multi.distributed.ranks import join_processes

COMMAND = Path(sys.executable).with_name('paddy-multi')


def digits_learner(folder, seed=0):
    "Random weights: nothing here depends on a good model"
    dls = MultiTargetDataLoaders.from_csv(folder, targets=['digit', 'slant', 'ink'], kinds=dict(digit='category'),
                                          folder='images', seed=1, bs=8, num_workers=0, item_tfms=Resize(16),
                                          device='cpu')
    set_seed(seed)
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
    learn = multi_target_learner(dls, body, path=folder)
    learn.remove_cb(learn.progress)
    return learn


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return sample_digits(tmp_path_factory.mktemp('digits'))

@pytest.fixture(scope='module')
def learn(folder): return digits_learner(folder)

@pytest.fixture(scope='module')
def files(folder):
    "37 pictures and two files that are none, which are the first of a batch and the last of all"
    res = get_image_files(folder/'images').sorted()[:37]
    (folder/'broken.png').write_text('not a picture')
    return [*res[:8], folder/'broken.png', *res[8:], folder/'lost.png']

@pytest.fixture(scope='module')
def expected(learn, files): return predict_named(learn, files).to_csv()


class Batches(Callback):
    "Counts batches, and fails in that of number `fails`, or waits for the file `left` that one that fails leaves"
    def __init__(self, fails=None, left=None): self.n, self.fails, self.left = 0, fails, left
    def before_batch(self):
        if self.n == self.fails:
            if self.left: self.left.touch()
            raise RuntimeError('stopped')
        end = time.monotonic()+60
        while self.left and not self.left.exists() and time.monotonic() < end: time.sleep(.02)
        if self.left: time.sleep(2)  # so that the other is sure to have left when this batch ends
        self.n += 1


def predicted(learn, files, out, fails=None, left=None, **kwargs):
    "How many batches were predicted"
    batches = Batches(fails, left)
    with learn.added_cbs(batches): predict_files(learn, files, out, progress=False, **kwargs)
    return batches.n


def names(folder): return sorted(o.name for o in folder.iterdir())


# --- the rows ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('part, bs', [(1, None), (16, None), (20, 8), (39, None), (10**6, None)])
def test_rows_are_those_of_one_table(learn, files, expected, tmp_path, part, bs):
    assert predict_files(learn, files, tmp_path/'p.csv', part=part, bs=bs, progress=False) == tmp_path/'p.csv'
    assert (tmp_path/'p.csv').read_text() == expected
    assert names(tmp_path) == ['p.csv']


def test_classes_that_are_numbers_stay_whole_beside_an_error(learn, files, tmp_path):
    out = predict_files(learn, [str(o) for o in files], tmp_path/'p.csv', progress=False)
    rows = pd.read_csv(out, dtype=str, index_col='file')
    assert [*rows.index] == [o.name for o in files]
    assert set(rows.digit.dropna()) <= {*'0123456789'} and rows.digit.isna().sum() == 2
    assert rows.error['broken.png'].startswith('UnidentifiedImageError')
    assert rows.error['lost.png'].startswith('FileNotFoundError')


def test_a_part_of_unreadable_files_has_errors_alone(learn, files, tmp_path):
    broken = [files[8]]*8
    out = predict_files(learn, [*files[:8], *broken], tmp_path/'p.csv', part=8, progress=False)
    rows = pd.read_csv(out)
    assert rows.error.notna().tolist() == [False]*8+[True]*8 and rows.iloc[8:, 1:-1].isna().all(axis=None)


def test_a_name_in_two_parts_means_paths_in_all(learn, files, tmp_path):
    for o in 'ab':
        (tmp_path/o).mkdir()
        shutil.copy(files[0], tmp_path/o)
    twice = [tmp_path/o/files[0].name for o in 'ab']
    out = predict_files(learn, [twice[0], *files[1:8], twice[1]], tmp_path/'p.csv', part=8, progress=False)
    assert pd.read_csv(out).file.tolist() == [str(o) for o in (twice[0], *files[1:8], twice[1])]


def test_formulas_are_written_as_text(learn, files, tmp_path):
    shutil.copy(files[0], tmp_path/'=1+1.png')
    def first(raw):
        out = predict_files(learn, [tmp_path/'=1+1.png'], tmp_path/'p.csv', raw=raw, overwrite=True, progress=False)
        return pd.read_csv(out).file[0]
    assert first(False) == "'=1+1.png" and first(True) == '=1+1.png'


def test_other_arguments_reach_predict_named(learn, files, tmp_path):
    torch.manual_seed(0)
    out = predict_files(learn, files, tmp_path/'p.csv', progress=False, tta=1)
    torch.manual_seed(0)
    assert out.read_text() == predict_named(learn, files, tta=1).to_csv()


# --- stopped ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('fails', range(5))
def test_a_run_goes_on_where_it_was_stopped(learn, files, expected, tmp_path, fails):
    out = tmp_path/'p.csv'
    with pytest.raises(RuntimeError, match='stopped'): predicted(learn, files, out, fails, part=8)
    assert names(tmp_path) == ['p.csv.parts']
    assert predicted(learn, files, out, part=8) == 5-fails
    assert out.read_text() == expected and names(tmp_path) == ['p.csv']


def test_a_disk_that_is_full_keeps_the_parts_before(learn, files, expected, tmp_path, monkeypatch):
    write = csv_parts.write_file
    def full(file, text):
        if file.name == '00002.csv': raise OSError(errno.ENOSPC, 'No space left on device', str(file))
        return write(file, text)
    monkeypatch.setattr(csv_parts, 'write_file', full)
    with pytest.raises(OSError, match='No space left'): predicted(learn, files, tmp_path/'p.csv', part=8)
    monkeypatch.undo()
    assert predicted(learn, files, tmp_path/'p.csv', part=8) == 3
    assert (tmp_path/'p.csv').read_text() == expected


def test_parts_of_something_else_are_refused_and_overwritten_if_asked_for(learn, folder, files, tmp_path):
    out, copied = tmp_path/'p.csv', [*files]
    copied[0] = Path(shutil.copy(files[0], tmp_path))
    with pytest.raises(RuntimeError): predicted(learn, copied, out, 3, part=8)
    def refused(says, learn=learn, files=copied, **kwargs):
        with pytest.raises(ValueError) as e: predicted(learn, files, out, **{'part': 8, **kwargs})
        assert str(e.value) == (f'{out}.parts holds a part of other predictions: {says}. '
                                'Name another file, or overwrite what is there')
    content = 'the content of the files, by size and time, is another'
    refused('bs was 8 and is 4', bs=4)
    refused('part was 8 and is 16', part=16)
    refused('tta was None and is 1', tta=1)
    refused('tta was None and is 1', tta=1, num_workers=1)  # which changes nothing
    refused('raw was False and is True', raw=True)
    refused('the model is another', learn=digits_learner(folder, seed=1))
    refused(f'the list of files is another; {content}', files=copied[:-1])
    os.utime(copied[0], (1, 1))
    refused(content)
    out.write_text('old')
    with pytest.raises(FileExistsError, match='p.csv exists: name another file, or overwrite it'):
        predicted(learn, copied, out, part=8)
    with pytest.raises(RuntimeError): predicted(learn, copied, out, 1, part=8, overwrite=True)
    assert out.read_text() == 'old'
    assert predicted(learn, copied, out, part=8, overwrite=True) == 4  # one part was made
    assert out.read_text() == predict_named(learn, copied).to_csv()


def test_what_cannot_be_written_is_refused_before_any_work(learn, files, tmp_path):
    (tmp_path/'p.csv.parts').mkdir()
    (tmp_path/'p.csv.parts'/'mine.txt').touch()
    for name, says in {'no/p.csv': 'does not exist: make it first', '.': 'is a folder: name a file in it',
                       'p.csv': 'is there and holds no predictions, but mine.txt'}.items():
        with pytest.raises(OSError, match=says): predicted(learn, files, tmp_path/name, 0)
    (tmp_path/'q.csv.parts').mkdir()
    with locked(tmp_path/'q.csv.parts'), pytest.raises(BlockingIOError, match='is in use by process'):
        predicted(learn, files, tmp_path/'q.csv', 0)
    with pytest.raises(TypeError, match='expected paths of files'): predict_files(learn, [torch.zeros(3)], tmp_path/'r')


# --- several processes ------------------------------------------------------------------------------------------------
def attempt(f):
    try: return f()
    except BaseException as e: return f'{type(e).__name__}: {e}'


def in_each(folder, files, out, model):
    "What each process finds in turn; the learner is the one of the file that was exported"
    torch.set_num_threads(1)
    ranks, learn, found, rank = join_processes(60), load_learner(model), {}, int(os.environ['RANK'])
    def predict(name, files=files, **kwargs):
        with across_processes(learn): return predicted(learn, files, out/name, part=8, **kwargs)
    found['batches'] = predict('all.csv')
    found['few'] = predict('few.csv', files[:3])
    with across_processes(learn):
        predict_files(learn, files, out/'inside.csv', progress=False)
        found['named'] = predict_named(learn, files, bs=4).to_csv()
    (out/f'there{rank}.csv').touch()
    ranks.meet('files are there')
    found['exists'] = attempt(lambda: predict('there1.csv'))
    found['differ'] = attempt(lambda: predict('differ.csv', files[rank:]))
    found['fails'] = attempt(lambda: predict('fails.csv', fails=0 if rank else None, left=out/'failed'))
    found['left'] = names(out)
    ranks.meet('all have looked')
    found['again'] = predict('fails.csv')
    found['cbs'] = [o.name for o in learn.cbs]
    return found


@pytest.fixture(scope='module')
def two(learn, folder, files, tmp_path_factory):
    "What two processes find, and the folder that they have written to"
    learn.export(folder/'model.pkl')
    out = tmp_path_factory.mktemp('out')
    ended = in_processes(in_each, 2, 240, folder=folder, files=files, out=out, model=folder/'model.pkl')
    return [o.result for o in ended], out


def one_thread(learn, files):
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    try: return predict_named(learn, files)
    finally: torch.set_num_threads(n)


def test_two_processes_write_the_rows_of_one(two, learn, files):
    found, out = two
    rows = one_thread(learn, files)
    assert (out/'all.csv').read_text() == rows.to_csv()
    assert sum(o['batches'] for o in found) == 5
    assert (out/'few.csv').read_text() == one_thread(learn, files[:3]).to_csv()
    assert sum(o['few'] for o in found) == 1
    assert (out/'inside.csv').read_text() == rows.to_csv()
    assert not [o for o in names(out) if o.endswith('.parts')]


def test_batches_are_shared_again_afterwards(two, learn, files):
    found, _ = two
    assert found[0]['named'] == found[1]['named']
    ink = pd.read_csv(io.StringIO(found[0]['named'])).ink
    close(ink.dropna(), predict_named(learn, files).ink.dropna(), 1e-6)
    assert not {'heed_signals', '_across'} & {*found[0]['cbs'], *found[1]['cbs']}


def test_what_is_refused_is_refused_in_all_processes(two):
    found, out = two
    assert {o['exists'] for o in found} == {f'FileExistsError: {out}/there1.csv exists: name another file, '
                                            'or overwrite it'}
    for o in found: assert o['differ'].startswith('ValueError: the processes differ in what they predict: process 0')
    assert not (out/'differ.csv').exists()


def test_a_failure_ends_all_and_the_next_run_goes_on(two, learn, files):
    found, out = two
    assert found[1]['fails'].startswith('RuntimeError: ') and found[1]['fails'].endswith('stopped')
    assert found[0]['fails'] == f'ProcessFailed: process 1 stopped: {found[1]["fails"]}'
    assert 'fails.csv.parts' in found[0]['left'] and 'fails.csv' not in found[0]['left']
    assert found[0]['again']+found[1]['again'] == 5  # process 0 has left after its batch
    assert (out/'fails.csv').read_text() == one_thread(learn, files).to_csv()


# --- the command ------------------------------------------------------------------------------------------------------
def start(*args, **kwargs):
    return subprocess.Popen([COMMAND, 'predict', *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, start_new_session=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}, **kwargs)


def children_of(pid):
    "Numbers of processes that `pid` has started"
    res = []
    for o in Path('/proc').glob('[0-9]*/stat'):
        try: ppid = o.read_text().rpartition(')')[2].split()[1]
        except OSError: continue
        if int(ppid) == pid: res.append(int(o.parent.name))
    return sorted(res)


@pytest.fixture
def pictures(folder, learn, tmp_path):
    "A folder with a model and one with 60 pictures"
    learn.export(tmp_path/'model.pkl')
    (tmp_path/'pictures').mkdir()
    for o in get_image_files(folder/'images').sorted()[:60]: os.link(o, tmp_path/'pictures'/o.name)
    return tmp_path


def options(place): return '--model', place, '--files', place/'pictures', '--out', place/'p.csv', '--bs', 1, '--part', 1


def parts_of(place):
    "Parts that are there, with the times when they were made"
    try: return {o: o.stat().st_mtime_ns for o in (place/'p.csv.parts').glob('*.csv')}
    except FileNotFoundError: return {}  # they have just been put together


def stopped(place, processes, stop):
    "What a command prints that is stopped by `stop`, a function of it, as soon as it has made three parts; its code"
    process, end = start(*options(place), '--processes', processes), time.monotonic()+240
    try:
        while len(parts_of(place)) < 3:
            assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
            time.sleep(.005)
        stop(process)
        printed = process.communicate(timeout=90)[0]
    finally:
        try: os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError: pass
    return printed, process.returncode


def kill_all(process): os.killpg(process.pid, signal.SIGKILL)
def kill_parent(process): process.kill()
def kill_second(process): os.kill(children_of(process.pid)[-1], signal.SIGKILL)
def ctrl_c(process): os.killpg(process.pid, signal.SIGINT)
def terminate(process): process.terminate()


@pytest.mark.slow
@pytest.mark.parametrize('before, stop, after', [
    (1, kill_all, 2), (2, kill_all, 1), (2, kill_parent, 2), (2, kill_second, 3), (1, ctrl_c, 1), (2, ctrl_c, 2),
    (2, terminate, 1)], ids=lambda o: getattr(o, '__name__', o))
def test_the_command_goes_on_after_any_stop(pictures, learn, before, stop, after):
    printed, code = stopped(pictures, before, stop)
    assert code != 0 and not (pictures/'p.csv').exists() and 'Traceback' not in printed, printed
    if stop is ctrl_c: assert code == 130
    if stop is kill_second: assert code == 1 and 'Error: process' in printed and 'was killed by SIGKILL' in printed
    if stop in (ctrl_c, kill_second): assert 'the same command goes on with the rest' in printed
    kept = parts_of(pictures)
    assert 3 <= len(kept) < 60
    process = start(*options(pictures), '--processes', after)
    end = time.monotonic()+240
    while process.poll() is None and time.monotonic() < end:
        now = parts_of(pictures)
        assert not now or all(now.get(o, t) == t for o, t in kept.items())
        time.sleep(.1)
    assert process.communicate(timeout=90)[0] == f'{pictures}/p.csv: 60 rows\n' and process.returncode == 0
    assert (pictures/'p.csv').read_text() == one_by_one(learn, pictures)
    assert not (pictures/'p.csv.parts').exists()


def one_by_one(learn, place):
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    try: return predict_named(learn, sorted((place/'pictures').iterdir()), bs=1).to_csv()
    finally: torch.set_num_threads(n)


@pytest.mark.slow
def test_an_error_in_several_processes_is_said_once(pictures):
    (pictures/'model.pkl').write_text('no model')
    printed = start(*options(pictures), '--processes', 2).communicate(timeout=60)[0]
    assert printed.startswith(f'Error: {pictures}/model.pkl cannot be loaded') and printed.count('\n') == 1


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_files(folder, learn, tmp_path):
    "Peak of a process with 16 and with 128 parts of the same size"
    learn.export(tmp_path/'model.pkl')
    code = ('import resource, sys; from fastai.learner import load_learner; from pathlib import Path\n'
            'from paddy_multi.use.many_files import predict_files\n'
            'model, images, out, times = sys.argv[1:]\n'
            'files = sorted(Path(images).iterdir())[:512]*int(times)\n'
            'predict_files(load_learner(model), files, out, part=32, progress=False)\n'
            'print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024)')
    def peak(times):
        args = tmp_path/'model.pkl', folder/'images', tmp_path/f'{times}.csv', times
        return float(subprocess.run([sys.executable, '-W', 'ignore', '-c', code, *map(str, args)], check=True,
                                    capture_output=True, text=True).stdout)
    assert peak(8)-peak(1) < 20
