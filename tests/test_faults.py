"An error of the disk, or a kill, at every operation: what was there before stays, or what is new is there, whole"
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.learner import load_learner
from typer.testing import CliRunner

from collab_deep.cli.app import app as collab_deep
from collab_deep.use.save import load_recommender, save_recommender
from faults import HOW, Disk, contents, killed, operations, unlike
from paddy_multi.cli.app import app as paddy_multi
from paddy_multi.core.files import locked, write_file, written_together, written_whole
from paddy_multi.data.paddy import sample_paddy
from small_recommender import recommender

OLD = {'a.csv': b'old', 'b.pth': b'old weights', 'mine.txt': b'kept'}


@pytest.fixture
def folder(tmp_path): return tmp_path/'out'


def begin(folder):
    "A new folder with old results"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in OLD.items(): (folder/name).write_bytes(data)


def fails(save, folder, at, how):
    "The text of the error of `save`, whose operation `at` fails; where its process is killed, True"
    if how == 'kill': return killed(lambda: save(folder), folder.parent, at) or pytest.fail('it was not killed')
    with pytest.raises(OSError) as e, Disk(folder.parent, at, how): save(folder)
    return str(e.value)


# --- one file -------------------------------------------------------------------------------------------------------
def save_text(folder): write_file(folder/'a.csv', 'new')

def save_lines(folder):
    with written_whole(folder/'a.csv') as part, part.open('w', encoding='utf-8') as f:
        f.write('ne')
        f.flush()
        f.write('w')

def save_tensors(folder):
    with written_whole(folder/'b.pth') as part: torch.save(dict(a=torch.ones(3)), part)


@pytest.mark.parametrize('how', HOW)
@pytest.mark.parametrize('save, name, n', [(save_text, 'a.csv', 5), (save_lines, 'a.csv', 6),
                                           (save_tensors, 'b.pth', 9)])
def test_a_file_is_old_or_new_after_a_fault_at_any_operation(folder, save, name, n, how):
    begin(folder)
    done = operations(lambda: save(folder), folder.parent)
    moved = next(i for i, o in enumerate(done) if o.startswith('replace'))
    assert len(done) >= n, done

    def is_new():
        if (folder/name).read_bytes() == OLD[name]: return False
        assert torch.load(folder/name)['a'].sum() == 3 if save is save_tensors else (folder/name).read_text() == 'new'
        return True
    assert is_new()
    for at, operation in enumerate(done):
        begin(folder)
        said = fails(save, folder, at, how)
        if how != 'kill':
            assert said.endswith(f": '{folder/name}'"), (operation, said)
            assert {*contents(folder)} == {*OLD}, 'nothing else is left'
        assert is_new() == (at > moved), operation
        save(folder)
        assert is_new() and {*contents(folder)} == {*OLD}, operation


# --- several together -----------------------------------------------------------------------------------------------
NEW = {'a.csv': b'new', 'b.pth': b'new weights', 'c.html': b'new page'}

def save_together(folder):
    with locked(folder), written_together(folder, list(NEW)) as new:
        for name, data in NEW.items(): (new/name).write_bytes(data)


@pytest.mark.parametrize('link', [True, False], ids=['links', 'copies'])
@pytest.mark.parametrize('how', HOW)
def test_several_files_are_old_or_new_together(folder, how, link, monkeypatch):
    if not link: monkeypatch.setattr('os.link', no_links)
    begin(folder)
    done = operations(lambda: save_together(folder), folder.parent)
    assert contents(folder) == OLD | NEW and len(done) >= 25, done
    for at, operation in enumerate(done):
        begin(folder)
        if how == 'once' and operation.startswith('link'):  # then it is copied
            with Disk(folder.parent, at): save_together(folder)
            assert contents(folder) == OLD | NEW
            continue
        said = fails(save_together, folder, at, how)
        if how == 'once':  # nothing needs to be mended, and nothing else is left
            assert f"'{folder}" in said, (operation, said)
            assert contents(folder) in (OLD, OLD | NEW), operation
        with locked(folder): after = contents(folder)
        after.pop('.lock')
        if how != 'once': after = {k: v for k, v in after.items() if '.part' not in k}
        assert after in (OLD, OLD | NEW), (operation, after)
        save_together(folder)
        assert contents(folder) == OLD | NEW, operation

def no_links(file, new): raise OSError('this disk has no links')


# --- a size limit, which is real ------------------------------------------------------------------------------------
LIMITED = '''
import os, resource, signal, sys, torch
from paddy_multi.core.files import locked, write_file, written_together, written_whole
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = sys.argv[1]
def limited(size, save):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try: save()
    except Exception as e: return type(e).__name__ + ' ' + str(e)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
def weights():
    with written_whole(f'{folder}/b.pth') as part: torch.save(torch.zeros(10000), part)
def together():
    with locked(folder), written_together(folder, ['a.csv', 'b.pth']) as new:
        (new/'a.csv').write_text('new')
        torch.save(torch.zeros(10000), new/'b.pth')
print(limited(1000, lambda: write_file(f'{folder}/a.csv', b'x'*1001)))
for size in (0, 100, 1000, 40000, 41000): print(limited(size, weights), limited(size, together), sep='\\n')
'''

def test_a_limit_of_file_sizes_leaves_what_was_there(folder):
    begin(folder)
    done = subprocess.run([sys.executable, '-c', LIMITED, folder], capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert len(said) == 11 and done.stderr == '', done
    assert said[0] == f"OSError [Errno 27] File too large: '{folder/'a.csv'}'"
    assert all(o.startswith('OSError [Errno ') and f"'{folder}" in o for o in said), said
    assert contents(folder) == OLD


# --- a recommender --------------------------------------------------------------------------------------------------
def recommender_of(seed):
    pairs = [(1, 1), (1, 2), (2, 3), (3, 1)]
    return recommender(pairs, users=['ann', 'ben', 'eva'], items=['x', 'y', 'z'], seed=seed)

def weights(folder): return sum(o.sum().item() for o in load_recommender(folder).model.state_dict().values())


@pytest.mark.parametrize('how', HOW)
def test_a_saved_recommender_is_old_or_new(folder, how):
    def save(seed): return lambda folder: save_recommender(recommender_of(seed), folder)
    known = []
    for seed in (0, 1):
        save(seed)(folder)
        known.append(weights(folder))
    for first in (True, False):  # into a folder that is made, and over an older one
        def start():
            shutil.rmtree(folder, ignore_errors=True)
            if not first: save(0)(folder)
        start()
        for at, operation in enumerate(operations(lambda: save(1)(folder), folder.parent)):
            start()
            if operation.startswith('mkdir') and not first: continue  # it is there, and no error
            fails(save(1), folder, at, how)
            if first and not (folder/'recommender.json').exists(): continue
            assert weights(folder) in known[first:], operation
            save(1)(folder)
            assert weights(folder) == known[1] and len(contents(folder)) == 2, operation


# --- the commands ---------------------------------------------------------------------------------------------------
def run(app, *args): return CliRunner().invoke(app, [*map(str, args)])

def said_in_a_line(done):
    "The error of a command that could not write"
    assert type(done.exception) is SystemExit and done.exit_code in (1, 2), (done.exception, done.output)
    assert 'Traceback' not in done.output
    if done.exit_code == 1: assert re.fullmatch('(Warning: .*\n)*Error: .*\n', done.stderr), done.stderr
    return ' '.join(done.stderr.split())


@pytest.fixture(scope='module')
def ratings(tmp_path_factory):
    "Synthetic ratings"
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp('ratings')/'ratings.csv'
    columns = dict(user=rng.integers(1, 13, 150), item=rng.integers(1, 16, 150), rating=rng.integers(1, 6, 150))
    pd.DataFrame(columns).drop_duplicates(['user', 'item']).to_csv(file, index=False)
    return file

def train_recommender(ratings, out, *more):
    return run(collab_deep, 'train', '--ratings', ratings, '--out', out, '--factors', 2, '--epochs', 1, '--bs', 64,
               *more)

@pytest.fixture(scope='module')
def pictures(tmp_path_factory): return sample_paddy(tmp_path_factory.mktemp('pictures'), n=20, missing=.2)

def train_pictures(pictures, out, *more):
    return run(paddy_multi, 'train', '--data', pictures, '--out', out, '--arch', 'test_resnet', '--no-pretrained',
               '--size', 32, '--bs', 8, '--targets', 'label', '--epochs', 1, *more)


class Command:
    "One of the commands, with the old results of a run of it"
    def __init__(self, train, data, load, results, tmp_path):
        self.train, self.data, self.load, self.results = train, data, load, results
        self.tmp_path, self.out = tmp_path, tmp_path/'out'
        assert train(data, self.out).exit_code == 0
        shutil.copytree(self.out, tmp_path/'old')
        self.old = self.now()

    def start(self):
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.copytree(self.tmp_path/'old', self.out)

    def again(self, *more): return self.train(self.data, self.out, '--overwrite', '--seed', 1, *more)

    def now(self): return {o: data for o, data in contents(self.out).items() if o in self.results}

    def check(self, operation):
        "All results are the old ones, or none is"
        now = self.now()
        assert len(now) == len(self.old), (operation, [*now], [*self.old])
        self.load(self.out)
        same = [self.old[o] == now[o] for o in now]
        assert all(same) or not any(same), (operation, [*zip(now, same)])
        return all(same)


COMMANDS = [(train_recommender, 'ratings', load_recommender, ['recommender.json', 'report.html']),
            (train_pictures, 'pictures', lambda out: load_learner(out/'model.pkl'),
             ['model.pkl', 'predictions.csv', 'report.html'])]

@pytest.mark.parametrize('train, data, load, results', COMMANDS, ids=['collab-deep', 'paddy-multi'])
@pytest.mark.parametrize('how, every', [
    ('once', 13), *(pytest.param(how, 1, marks=pytest.mark.slow) for how in ('once', 'stays'))])
def test_old_results_stay_until_the_new_are_there(train, data, load, results, how, every, tmp_path, request):
    command = Command(train, request.getfixturevalue(data), load, results, tmp_path)
    with Disk(tmp_path) as disk: assert command.again().exit_code == 0
    assert not command.check('none') and len(disk.done) > 15
    for at in unlike(disk.done)[::every]:
        command.start()
        with Disk(tmp_path, at, how): done = command.again()
        if done.exit_code == 0 and how == 'once': assert not command.check(disk.done[at])
        else:
            assert str(command.out) in said_in_a_line(done), done.output
            if how == 'stays': tidy(command.out)
            command.check(disk.done[at])

def tidy(out):
    "What the next run of a command begins with"
    with locked(out): pass

KILL = """
import sys
import torch
from faults import Disk
from {module} import app
with Disk({folder!r}, {at}, 'kill'): app({args})
"""

@pytest.mark.slow
@pytest.mark.parametrize('train, data, load, results', COMMANDS, ids=['collab-deep', 'paddy-multi'])
def test_a_kill_leaves_old_results_or_new_ones(train, data, load, results, tmp_path, request, monkeypatch):
    command = Command(train, request.getfixturevalue(data), load, results, tmp_path)
    with Disk(tmp_path) as disk: assert command.again().exit_code == 0
    def run_and_kill(app, *args):
        module = 'collab_deep.cli.app' if app is collab_deep else 'paddy_multi.cli.app'
        code = KILL.format(module=module, folder=str(tmp_path), at=at, args=[*map(str, args)])
        return subprocess.run([sys.executable, '-c', code], cwd=Path(__file__).parent, capture_output=True, text=True)
    monkeypatch.setattr(sys.modules[__name__], 'run', run_and_kill)
    for at in unlike(disk.done)[::5]:
        command.start()
        done = command.again()
        assert done.returncode == 9, done.stderr
        tidy(command.out)
        command.check(disk.done[at])


@pytest.mark.parametrize('how, every', [
    ('once', 17), *(pytest.param(how, 1, marks=pytest.mark.slow) for how in ('once', 'stays'))])
def test_a_run_that_cannot_go_on_goes_on_later(pictures, how, every, tmp_path):
    "Stopped by a full disk before its last checkpoint, and again at each operation of going on: nothing is lost"
    out, stopped, whole = tmp_path/'out', tmp_path/'stopped', tmp_path/'whole'
    def go_on(): return run(paddy_multi, 'train', '--resume', '--out', out)
    with Disk(tmp_path) as disk: assert train_pictures(pictures, out, '--epochs', 2).exit_code == 0
    out.rename(whole)
    last = [i for i, o in enumerate(disk.done) if o.startswith('replace') and o.endswith('checkpoint.pth')][-1]
    with Disk(tmp_path, last): said_in_a_line(train_pictures(pictures, out, '--epochs', 2))
    out.rename(stopped)
    for at in unlike(operations_of_going_on(go_on, stopped, out, tmp_path))[::every]:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(stopped, out)
        with Disk(tmp_path, at, how) as disk: done = go_on()
        if done.exit_code: said_in_a_line(done)
        again = go_on()
        assert again.exit_code == 0, (disk.done[at], again.output)
        assert (out/'predictions.csv').read_text() == (whole/'predictions.csv').read_text(), disk.done[at]

def operations_of_going_on(go_on, stopped, out, folder):
    shutil.copytree(stopped, out)
    def succeed(): assert go_on().exit_code == 0
    return operations(succeed, folder)
