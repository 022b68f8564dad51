"Runs of several processes that are stopped, killed and taken up again, in as many processes or in others"
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from fastai.callback.tracker import SaveModelCallback
from fastai.vision.all import Adam, Callback, Resize, TensorImage, Transform, nn
from typer.testing import CliRunner

import paddy_multi.train.run as run_module
from paddy_multi.cli.app import app
from paddy_multi.core.files import locked
from paddy_multi.core.tensors import replaced
from paddy_multi.data.loaders import MultiTargetDataLoaders
from paddy_multi.distributed.across import across_processes
from paddy_multi.distributed.launch import in_processes
from paddy_multi.distributed.ranks import join_processes
from paddy_multi.train.checkpoint import read_checkpoint
from paddy_multi.train.learner import multi_target_learner
from paddy_multi.train.run import KeepEpochs, fine_tune_kept
from spread import SeenLosses, alone, numbers_of, seed
from spread_calls import write_digits

COMMAND = Path(sys.executable).with_name('paddy-multi')
WHOLE = 24  # items an update, for 1, 2 and 3 processes


def limit(): return 15*max(1, os.getloadavg()[0]/os.cpu_count())  # 15 seconds of a machine that does nothing else


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    "Real digits, of which some have no slant"
    folder = tmp_path_factory.mktemp('digits')
    write_digits(folder)
    return folder


# --- a learner of one's own -----------------------------------------------------------------------------------------
class ToDouble(Transform):
    order = 20
    def encodes(self, x:TensorImage): return x.double()


class Stop(Callback):
    "Ctrl-C in the middle of the second epoch"
    def after_batch(self):
        if self.training and self.epoch == 1 and self.iter == 3: raise KeyboardInterrupt


def learner(folder, bs, dropout=0.):
    seed(3)
    dls = MultiTargetDataLoaders.from_csv(folder, targets=['digit', 'slant', 'ink'], kinds=dict(digit='category'),
                                          folder='images', seed=1, bs=bs, num_workers=0, item_tfms=Resize(16),
                                          batch_tfms=ToDouble(), device='cpu')
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.ReLU())
    head = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(8*64, dls.targets.n_out))
    learn = multi_target_learner(dls, body, head=head, opt_func=partial(Adam, eps=1e-2), cbs=[SeenLosses()],
                                 path=folder)
    learn.model.double()
    return learn


def kept(learn, out, resume=False):
    with learn.no_bar(), learn.no_logging(): return fine_tune_kept(learn, 3, 1e-2, out, resume)


def stop_in_the_second_epoch(learn, out):
    learn.add_cb(Stop())
    try: kept(learn, out)
    except KeyboardInterrupt: return True


def saved_and_begun_again(learn):
    "fastai's own way: files of every epoch, of which one is loaded, and a fit that begins there"
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(2, 1e-2, cbs=SaveModelCallback(every_epoch=True, with_opt=True, fname='epoch'))
        learn.load('epoch_0', with_opt=True)
        learn.fit_one_cycle(3, 1e-2, start_epoch=1)


def in_all(learn, f, *args, **kwargs):
    with across_processes(learn, timeout=60): return f(learn, *args, **kwargs)


def far(a, b): return float((numbers_of(a.model)-numbers_of(b.model)).norm()/numbers_of(b.model).norm())


def run_kept(folder, out):
    "How far weights end from those of one process that was not stopped"
    ranks = join_processes(60)
    n, rank, own = ranks.world_size, ranks.rank, Path(out)/f'own_{ranks.rank}'
    part, found, wrote = partial(learner, folder, WHOLE//n), {}, []
    for name in ('one', 'one_stopped'): (own/name).mkdir(parents=True)
    with alone():
        one, first, fastai = (learner(folder, WHOLE) for _ in range(3))
        rows = kept(one, own/'one')
        stop_in_the_second_epoch(first, own/'one_stopped')
        fastai.path = own
        saved_and_begun_again(fastai)
    write = run_module.write_checkpoint
    with replaced(run_module, 'write_checkpoint', lambda *args: wrote.append(args[0]) or write(*args)):
        first = part()
        stopped = in_all(first, stop_in_the_second_epoch, out)
        found['stopped'] = stopped, read_checkpoint(out/'checkpoint.pth')['done']
        shutil.copytree(out, own/'stopped', ignore=shutil.ignore_patterns('own*'))
        ranks.everyone('copied')
        again = part()
        seed(99)
        found['rows'] = in_all(again, kept, out, resume=True).equals(pd.DataFrame(read_checkpoint(
            out/'checkpoint.pth')['rows']))
    found |= dict(wrote=len(wrote), moved=float(numbers_of(learner(folder, WHOLE).model).sub(
        numbers_of(one.model)).norm()), resumed=far(again, one), columns=list(rows))
    with alone():
        by_one = learner(folder, WHOLE)
        kept(by_one, own/'stopped', resume=True)
    more = part()
    begun_by_one = Path(out)/'own_0'/'one_stopped'
    in_all(more, kept, begun_by_one, resume=True)
    ours = part()
    ours.path = Path(out)
    in_all(ours, saved_and_begun_again)
    found |= dict(by_one=far(by_one, one), begun_by_one=far(more, one), fastai=far(ours, fastai),
                  files=sorted(o.name for o in out.iterdir() if not o.name.startswith('own')),
                  saved=sorted(o.name for o in (out/'models').iterdir()))
    return found | drawn(ranks, partial(part, .5), out) | failing(ranks, part(), out)


def drawn(ranks, make, out):
    "With dropout, a run that goes on in as many processes draws the same in each of them"
    ours, folder = make(), out/'drawn'
    if ranks.rank == 0: folder.mkdir()
    in_all(ours, kept, folder)
    in_all(make(), stop_in_the_second_epoch, folder)
    again = make()
    in_all(again, kept, folder, resume=True)
    states = read_checkpoint(folder/'checkpoint.pth')['random']
    return dict(drawn=far(again, ours) < 1e-10,  # a gradient may differ in its last bit, by where it lies in memory
                states=len({str(o['torch'].tolist()) for o in [states, *states['others']]}))


def failing(ranks, learn, out):
    "A disk that is full in process 0, which alone writes"
    def full(*args): raise OSError(28, 'No space left on device')
    before = (out/'checkpoint.pth').read_bytes()
    with replaced(run_module, 'write_checkpoint', full):
        try: in_all(learn, lambda learn: learn.fit(1, cbs=KeepEpochs(out)))
        except Exception as e: said = f'{type(e).__name__}: {e}'
    return dict(full=said, left=(out/'checkpoint.pth').read_bytes() == before)


def check_kept(found):
    n = len(found)
    for i, o in enumerate(found):
        assert o['stopped'] == (True, 1) and o['rows'] and o['moved'] > .1
        assert max(o['resumed'], o['by_one'], o['begun_by_one'], o['fastai']) < 1e-10, o
        assert o['wrote'] == (3 if i == 0 else 0)
        assert o['files'] == ['checkpoint.pth', 'models'] and o['saved'] == ['epoch_0.pth', 'epoch_1.pth']
        assert o['drawn'] and o['states'] == n and o['left']
        disk = 'OSError: [Errno 28] No space left on device'
        assert o['full'] == (disk if i == 0 else f'ProcessFailed: process 0 stopped: {disk}')


def test_a_run_of_two_processes_goes_on_in_two_or_one(digits, tmp_path):
    check_kept([o.result for o in in_processes(run_kept, 2, 200, folder=digits, out=tmp_path)])


@pytest.mark.slow
def test_a_run_of_three_processes_goes_on_in_three_or_one(digits, tmp_path):
    check_kept([o.result for o in in_processes(run_kept, 3, 300, folder=digits, out=tmp_path)])


# --- the command ----------------------------------------------------------------------------------------------------
SMALL = ['--targets', 'digit:category,slant,ink', '--arch', 'test_resnet', '--no-pretrained', '--size', '32',
         '--bs', '24']


def command(*args): return [COMMAND, 'train', *map(str, args)]


def train(*args): return subprocess.run(command(*args), capture_output=True, text=True, timeout=200)


def members(pid):
    "Numbers of the processes that a command has started, by their number in the group"
    found = {}
    for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split():
        try: rank = re.search(rb'(?:^|\0)RANK=(\d+)', Path(f'/proc/{child}/environ').read_bytes())
        except OSError: continue
        if rank: found[int(rank[1])] = int(child)
    return found


def in_second_epoch(out): return (out/'checkpoint.pth').exists()


def while_writing(out): return in_second_epoch(out) and any(out.glob('checkpoint.pth.*.part'))


def hit(out, *args, to=1, number=signal.SIGKILL, when=in_second_epoch, n=2):
    "Exit code and messages of a command of which a process gets a signal; all have ended in time"
    process = subprocess.Popen(command('--out', out, '--processes', n, *args), stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        end = time.monotonic()+150
        while not when(out): assert process.poll() is None and time.monotonic() < end
        group, began = members(process.pid), time.monotonic()
        for pid in dict(agent=[process.pid]).get(to, [group.get(to)]): os.kill(pid, number)
        said = process.communicate(timeout=120)[1]
        while any(Path(f'/proc/{o}').exists() for o in group.values()) and time.monotonic()-began < limit():
            time.sleep(.1)
        assert time.monotonic()-began < limit() and len(group) == n
        return process.returncode, said
    finally: os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None


def finish(out, n=1):
    "Go on with what is left, and the results"
    before = read_checkpoint(out/'checkpoint.pth')['rows']
    if n == 1:
        done = CliRunner().invoke(app, ['train', '--resume', '--out', str(out)])
        assert done.exit_code == 0, done.output
    else:
        done = train('--resume', '--out', out, '--processes', n)
        assert done.returncode == 0, done.stderr
    rows = read_checkpoint(out/'checkpoint.pth')['rows']
    assert rows[:len(before)] == before and len(rows) == 4
    assert sorted(o.name for o in out.iterdir()) == ['checkpoint.pth', 'model.pkl', 'predictions.csv', 'report.html',
                                                     'settings.json']
    return rows


@pytest.mark.slow
def test_a_process_that_is_killed_is_named_and_the_run_goes_on_in_one(digits, tmp_path):
    out = tmp_path/'run'
    code, said = hit(out, '--data', digits, *SMALL, '--epochs', 4)
    errors = [o for o in said.splitlines() if o.startswith('Error')]
    assert code == 1 and errors == ['Error: process 1 was killed by SIGKILL, as by a system that runs out of memory']
    assert 'Traceback' not in said and len(re.findall('Warning: BatchNorm', said)) == 1
    finish(out)


@pytest.mark.slow
@pytest.mark.parametrize('when', [in_second_epoch, while_writing])
@pytest.mark.parametrize('to', [0, 1, 'agent'])
def test_after_a_kill_nothing_is_left_behind_and_the_run_goes_on(digits, tmp_path, to, when):
    out = tmp_path/'run'
    code, said = hit(out, '--data', digits, *SMALL, '--epochs', 4, to=to, when=when)
    assert code == (-signal.SIGKILL if to == 'agent' else 1) and 'Traceback' not in said
    if to != 'agent': assert f'Error: process {to} was killed by SIGKILL' in said
    with locked(out): pass
    finish(out, 2)
    assert not [*tmp_path.rglob('*.part')]


@pytest.mark.slow
@pytest.mark.parametrize('to, number, code', [('agent', signal.SIGINT, 130), ('agent', signal.SIGTERM, 143),
                                              (1, signal.SIGINT, 130), (1, signal.SIGTERM, 143)])
def test_a_wish_to_stop_is_told_by_the_exit_code(digits, tmp_path, to, number, code):
    out = tmp_path/'run'
    found, said = hit(out, '--data', digits, *SMALL, '--epochs', 40, to=to, number=number)
    assert found == code and 'Traceback' not in said and 'Error' not in said, said
    if code == 130: assert f'epochs are kept: go on with paddy-multi train --resume --out {out}' in said
    assert sorted(o.name for o in out.iterdir()) == ['checkpoint.pth']


@pytest.mark.slow
@pytest.mark.usefixtures('on_cpu')
def test_a_run_that_was_killed_ends_in_as_many_processes_as_one_that_was_not(digits, tmp_path):
    "Dropout and BatchNorm included, to the last bit"
    args = ['--data', digits, *SMALL, '--epochs', 4]
    whole, out = tmp_path/'whole', tmp_path/'out'
    done = train('--out', whole, *args, '--processes', 2)
    assert done.returncode == 0 and done.stdout.count('pictures to train on') == 1, done.stderr
    hit(out, *args, to=0)
    rows = finish(out, 2)
    assert (out/'predictions.csv').read_bytes() == (whole/'predictions.csv').read_bytes()
    assert rows == read_checkpoint(whole/'checkpoint.pth')['rows'] and rows[-1]['train_loss'] < rows[0]['train_loss']
    third = shutil.copytree(out, tmp_path/'third')
    shutil.copy(whole/'checkpoint.pth', third)
    finish(third, 3)


@pytest.mark.slow
def test_a_run_of_one_process_goes_on_in_three(digits, tmp_path):
    out = tmp_path/'run'
    args = command('--out', out, '--data', digits, *SMALL, '--epochs', 4)
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL)
    while not in_second_epoch(out): assert process.poll() is None
    process.kill()
    process.wait()
    finish(out, 3)


@pytest.mark.slow
def test_an_error_of_one_process_is_a_line_with_its_number(digits, tmp_path):
    data, out = shutil.copytree(digits, tmp_path/'data'), tmp_path/'run'
    def pictures_vanish(out):
        if not in_second_epoch(out): return False
        for o in (data/'images').iterdir(): o.unlink()
        return True
    code, said = hit(out, '--data', data, *SMALL, '--epochs', 400, when=pictures_vanish, number=0)  # nothing is sent
    errors = [o for o in said.splitlines() if o.startswith('Error')]
    assert code == 1 and len(errors) == 1 and 'Traceback' not in said, said
    assert re.match(r'Error: process [01]: .*\.png', errors[0])


@pytest.mark.slow
def test_what_is_wrong_before_training_is_said_as_in_one_process(digits, tmp_path):
    out = tmp_path/'run'
    args = ['--out', out, '--data', digits, *SMALL]
    for more in (['--targets', 'digit:category,weight'], ['--data', tmp_path/'nowhere'], ['--arch', 'no_such']):
        one, two = train(*args, *more), train(*args, *more, '--processes', 2)
        assert (one.returncode, two.returncode) == (1, 1) and one.stderr == two.stderr
    odd = train(*args, '--processes', 5)
    assert odd.returncode == 1 and odd.stderr.splitlines()[-1] == (
        'Error: 5 processes cannot share the 24 pictures of an update evenly: choose another --processes, or --bs 20 '
        'or 25')
    none = train(*args, '--processes', 0)
    assert none.returncode == 2 and '--processes' in none.stderr
