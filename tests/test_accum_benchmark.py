"benchmark_accumulation under attack: known values, learners that break or hang, Ctrl-C; what budgets and clean-up do"
import gc
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import SGD
from torch import nn

from paddy_multi.accumulate import benchmark, processes
from paddy_multi.accumulate.benchmark import AccumulationBenchmark, benchmark_accumulation
from paddy_multi.accumulate.case import run_case
from paddy_multi.accumulate.memory import find_accumulation, predict_memory
from paddy_multi.accumulate.microbatch import MicroBatch
from paddy_multi.accumulate.processes import FreedMemory, free_memory, how_it_ended, process_bytes

linux = pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='needs /proc, as Linux has it')
WIDTH, ITEMS = 100_000, 32
FLOATS = ITEMS*WIDTH*4   # bytes of one activation of the whole batch
WEIGHTS = (8*WIDTH + WIDTH + WIDTH*3 + 3)*4

# What a notebook's cell would hold: names of `__main__`, one of them used by another
CELL = """
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import SGD
from torch import nn

class Wide(nn.Module):
    "Keeps four activations of a known size"
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, width), nn.Linear(width, 3)
    def forward(self, x):
        x = self.first(x)
        for _ in range(4): x = x.tanh()
        return self.last(x)

def make_learner():
    items = [(torch.randn(8), torch.tensor(i % 3)) for i in range(n)]
    dls = DataLoaders(*[DataLoader(items, bs=n, num_workers=0)]*2)
    return Learner(dls, Wide(), loss_func=nn.CrossEntropyLoss(), opt_func=SGD, lr=1e-3)
"""


def from_a_notebook():
    cell = dict(__name__='__main__', width=WIDTH, n=ITEMS)
    exec(CELL, cell)
    return cell['make_learner']


def small(*layers, n=12, bs=None, loss=None):
    "A learner of random numbers with `layers` between its two matrices"
    items = [(torch.randn(8), torch.tensor(i % 3)) for i in range(n)]
    dls = DataLoaders(*[DataLoader(items, bs=bs or n, num_workers=0)]*2)
    model = nn.Sequential(nn.Linear(8, 16), nn.Sequential(*layers, nn.Linear(16, 3)))
    return Learner(dls, model, loss_func=loss or nn.CrossEntropyLoss(), opt_func=SGD, lr=.01)


# --- what a run must leave as it was --------------------------------------------------------------------------------
def children():
    "Ids of the processes that this one has started and not ended"
    return {int(o) for t in Path('/proc/self/task').iterdir() for o in (t/'children').read_text().split()}


def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError: return False


def state():
    "What others could notice: environment, paths, random numbers, threads, figures"
    return dict(
        env=dict(os.environ), path=list(sys.path), cwd=os.getcwd(),
        torch=torch.get_rng_state().tolist(), numpy=np.random.get_state()[1].tolist(), python=random.getstate(),
        threads=torch.get_num_threads(), running=threading.active_count(), grad=torch.is_grad_enabled(),
        figures=plt.get_fignums(), filters=list(warnings.filters), collects=gc.isenabled(),
        handlers=[signal.getsignal(o) for o in (signal.SIGINT, signal.SIGALRM, signal.SIGTERM)],
        children=children(), open=len(os.listdir('/proc/self/fd')), temporary=sorted(os.listdir(tempfile.gettempdir())))


@pytest.fixture(scope='module')
def temp(tmp_path_factory):
    "Temporary files of this process go to a folder of their own"
    before, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp('temp'))
    yield
    tempfile.tempdir = before


@pytest.fixture(scope='module')
def real(temp):
    "One real run with a learner of a notebook, and the state before and after it"
    with pytest.MonkeyPatch.context() as m:
        # glibc gives freed tensors back at once, so that the process is as large as its tensors
        m.setenv('MALLOC_MMAP_THRESHOLD_', '1000000')
        before = state()
        bench = benchmark_accumulation(from_a_notebook(), accums=(1, 4), updates=3, warmup=1, limit=120, progress=False)
        return bench, before, state()


# --- what is measured -----------------------------------------------------------------------------------------------
@linux
def test_rows_of_a_learner_that_lives_in_a_notebook(real):
    bench, df = real[0], real[0].df
    assert list(df.index) == [1, 4] and list(df.status) == ['ok', 'ok']
    assert list(df['items']) == [ITEMS, ITEMS//4] and list(df.updates) == [3, 3]
    assert (0 < df.low).all() and (df.low <= df.speed).all() and (df.speed <= df.high).all()
    assert df.update_error[1] == 0 and 0 < df.update_error[4] < 1e-5
    about = bench.about
    assert {k: about[k] for k in ('updates', 'warmup', 'whole_head')} == dict(updates=3, warmup=1, whole_head=False)
    assert about['torch'] == torch.__version__.partition('+')[0]
    assert about['threads'] == torch.get_num_threads() and about['cores'] == os.cpu_count()


@linux
def test_memory_is_that_of_the_tensors(real):
    df = real[0].df
    kept = 2*WEIGHTS  # with their gradients
    assert kept + 4*FLOATS < df.memory[1] < kept + 7*FLOATS + 30e6
    assert kept + FLOATS < df.memory[4] < kept + 7*FLOATS/4 + 30e6
    assert 2*FLOATS < df.memory[1] - df.memory[4] < 5*FLOATS


def test_the_prediction_stands_beside_it(real):
    expected = predict_memory(from_a_notebook()(), [1, 4], device='cpu').total
    assert list(real[0].df.predicted) == list(expected)


@linux
def test_nothing_is_left_behind(real):
    _, before, after = real
    assert {k: (before[k], after[k]) for k in before if before[k] != after[k]} == {}


def exactness(make, accum, whole_head=False):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return run_case(make, accum, 1, 0, whole_head, True)['update_error']


@pytest.mark.parametrize('accum', [2, 5, 12])
def test_exact_without_batchnorm(accum):
    assert exactness(lambda: small(nn.LayerNorm(16)), accum) < 1e-6


@pytest.mark.parametrize('accum', [2, 5])
def test_batchnorm_shows_unless_the_head_is_whole(accum):
    make = lambda: small(nn.BatchNorm1d(16))
    assert exactness(make, accum) > .05
    assert exactness(make, accum, whole_head=True) < 1e-5


def test_dropout_is_off_while_gradients_are_compared():
    assert exactness(lambda: small(nn.Dropout(.5)), 3) < 1e-6


def test_a_batch_that_cannot_be_split_evenly():
    found = run_case(lambda: small(n=11), 3, 4, 2, False, False)
    assert (found['items'], found['updates'], found['update_error']) == (4, 4, None)


def test_more_chunks_than_items_are_one_item_each():
    assert run_case(lambda: small(n=5), 9, 1, 0, False, True)['items'] == 1


def test_the_whole_batch_of_a_loader_is_what_it_yields():
    assert run_case(lambda: small(n=40, bs=10), 2, 1, 0, False, False)['items'] == 5


def test_where_the_whole_batch_does_not_fit_the_error_is_unknown():
    class Full(nn.Module):
        def forward(self, x):
            if len(x) > 6: raise torch.OutOfMemoryError('simulated')
            return x
    assert run_case(lambda: small(Full()), 2, 1, 0, False, True)['update_error'] is None


# --- learners that break --------------------------------------------------------------------------------------------
@linux
def test_every_way_to_break_is_a_row(temp, tmp_path, capsys):
    calls, before = tmp_path/'calls', state()
    calls.touch()
    def make_learner():
        call = len(calls.read_bytes())
        with calls.open('ab') as f: f.write(b'.')
        if call == 0: raise KeyError('no such column')      # of the prediction
        if call == 1: os._exit(3)
        if call == 2: os.kill(os.getpid(), signal.SIGSEGV)
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB')
    bench = benchmark_accumulation(make_learner, accums=(1, 2, 4), limit=120)
    statuses = ['failed: the process ended with exit status 3', 'failed: the process was ended by SIGSEGV',
                'out of memory']
    assert list(bench.df.status) == statuses
    assert bench.df.predicted.isna().all()
    assert capsys.readouterr().out.splitlines() == [
        "no prediction: failed: KeyError: 'no such column'",
        *(f'[{i}/3] accum {accum}: {status}' for i, accum, status in zip((1, 2, 3), (1, 2, 4), statuses))]
    assert AccumulationBenchmark.from_json(bench.to_json()) == bench
    plt.close(bench.plot())
    assert state() == before


@linux
def test_a_case_ends_at_its_own_limit_and_is_no_failure(temp):
    start, before = time.perf_counter(), state()
    bench = benchmark_accumulation(from_a_notebook(), accums=(1, 2), limit=.3, progress=False)
    assert list(bench.df.status) == ['over 0.3 s']*2 and time.perf_counter()-start < 10
    assert state() == before


def answers(monkeypatch, *found):
    "Processes that give these answers, a prediction first"
    given = iter(found)
    monkeypatch.setattr(benchmark, 'in_process', lambda *args, **kwargs: next(given))


def test_where_every_case_fails_the_first_reason_is_told(monkeypatch):
    answers(monkeypatch, *[(None, 'failed: ZeroDivisionError: division by zero')]*3)
    said = r'no case could be measured\. accum=1 failed: ZeroDivisionError: division by zero'
    with pytest.raises(RuntimeError, match=said):
        benchmark_accumulation(small, accums=(1, 2), progress=False)


def test_a_killed_process_is_a_row_that_says_why(monkeypatch):
    assert how_it_ended(-signal.SIGKILL) == 'killed, probably out of memory'
    answers(monkeypatch, (None, 'over 1 s'), (None, how_it_ended(-signal.SIGKILL)))
    bench = benchmark_accumulation(small, accums=(1,), progress=False)
    assert list(bench.df.status) == ['killed, probably out of memory']


# --- a run that is stopped -----------------------------------------------------------------------------------------
def stopped(folder, started, busy):
    "In a process of its own: a run whose learner hangs, with a process of its own beside it; exits with 7 on Ctrl-C"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tempfile.tempdir = str(folder)
    def make_learner():
        import subprocess
        import time
        other = subprocess.Popen(['sleep', '300'])
        started.write_text(f'{os.getpid()} {other.pid} .')
        if busy: 7**10**9  # in C, for hours, and no other thread can run
        time.sleep(300)
    before = state()
    try: benchmark_accumulation(make_learner, accums=(1,), limit=200, progress=False)
    except KeyboardInterrupt: os._exit(7 if state() == before else 8)
    os._exit(9)


@linux
@pytest.mark.parametrize('sent, exits, busy', [
    (signal.SIGINT, 7, False), (signal.SIGTERM, -signal.SIGTERM, False), (signal.SIGKILL, -signal.SIGKILL, True)],
    ids=['Ctrl-C', 'terminated', 'killed while busy'])
def test_a_run_that_is_stopped_leaves_no_process_and_no_file(tmp_path, sent, exits, busy):
    folder, started = tmp_path/'temp', tmp_path/'started'
    folder.mkdir()
    process = multiprocessing.get_context('fork').Process(target=stopped, args=(folder, started, busy))
    process.start()
    try:
        end = time.monotonic() + 90
        def hangs(): return started.exists() and started.read_text().endswith('.')
        while not hangs() and time.monotonic() < end: time.sleep(.05)
        case, other, _ = started.read_text().split()
        assert alive(case) and alive(other)
        os.kill(process.pid, sent)
        process.join(20)
        assert process.exitcode == exits
        end = time.monotonic() + 1
        while (alive(case) or alive(other)) and time.monotonic() < end: time.sleep(.01)
        assert not alive(case) and not alive(other) and list(folder.iterdir()) == []
    finally:
        if process.is_alive(): process.kill()


@linux
def test_a_run_that_is_killed_while_its_process_starts(tmp_path):
    "Before the first line of the package is imported, too"
    def run(started):
        real = processes.subprocess.Popen
        def popen(*args, **kwargs):
            process = real(*args, **kwargs)
            started.write_text(f'{process.pid} .')
            return process
        processes.subprocess.Popen = popen
        benchmark_accumulation(small, accums=(1,), progress=False)
    started = tmp_path/'started'
    process = multiprocessing.get_context('fork').Process(target=run, args=(started,))
    process.start()
    end = time.monotonic() + 60
    while not (started.exists() and started.read_text().endswith('.')) and time.monotonic() < end: time.sleep(.005)
    process.kill()
    process.join()
    case, end = started.read_text().split()[0], time.monotonic() + 1
    while alive(case) and time.monotonic() < end: time.sleep(.01)
    assert not alive(case)


@linux
def test_a_process_that_prints_or_leaves_others_behind_answers_all_the_same():
    def job():
        import subprocess
        subprocess.Popen(['sleep', '300'])
        os.system('echo printed')
        print('printed')
        return [1, 'é']
    start = time.monotonic()
    assert processes.in_process(job, 60) == ([1, 'é'], 'ok') and time.monotonic()-start < 50


# --- the result -----------------------------------------------------------------------------------------------------
def test_json_there_and_back(real, tmp_path):
    bench, path = real[0], tmp_path/'bench.json'
    bench.to_json(path)
    for source in (path, str(path), bench.to_json(), '\n '+bench.to_json()):
        again = AccumulationBenchmark.from_json(source)
        assert again == bench and again.df.equals(bench.df)
    assert json.loads(path.read_text(encoding='utf-8'))['rows'][0]['accum'] == 1


def bars(ax, label): return [o for c in ax.containers if c.get_label() == label for o in c]
def heights(found): return [o.get_height() for o in found]


def test_the_picture_has_predicted_beside_measured():
    def row(accum, memory, predicted, speed):
        return dict(accum=accum, status='ok', memory=memory, predicted=predicted,
                    speed=speed, low=speed-2, high=speed+5)
    gap = dict(accum=4, status='out of memory', predicted=3e9)
    fig = AccumulationBenchmark([row(1, 9e9, 8e9, 20.), row(2, 5e9, 4e9, 18.), gap], {}).plot()
    mem, speed = fig.axes
    measured, predicted = bars(mem, 'measured'), bars(mem, 'predicted')
    assert heights(predicted) == [8, 4, 3] and heights(measured)[:2] == [9, 5] and math.isnan(heights(measured)[2])
    assert all(math.isclose(a.get_x()+a.get_width(), b.get_x(), abs_tol=1e-9) for a, b in zip(measured, predicted))
    assert list(speed.lines[0].get_ydata()[:2]) == [20, 18]
    assert [o.get_text() for o in mem.get_xticklabels()] == ['1', '2', '4']
    quartiles = [[round(float(y)) for y in o[:,1]] for o in speed.collections[0].get_segments()[:2]]
    assert quartiles == [[18, 25], [16, 23]]
    for ax in fig.axes: assert [o.get_text().strip() for o in ax.texts] == ['out of memory']
    plt.close(fig)


def test_a_result_without_any_measurement_is_still_drawn():
    fig = AccumulationBenchmark([dict(accum=1, status='over 5 s', predicted=None)], {}).plot()
    assert [o.get_text() for o in fig.axes[1].texts] == [' over 5 s']
    plt.close(fig)


# --- settings -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('kwargs, error, text', [
    (dict(make_learner='resnet18'), TypeError,
     'make_learner is a function that gives a Learner, found str: a fresh process cannot use one that is made'),
    (dict(make_learner=None), TypeError, 'make_learner is a function that gives a Learner, found NoneType'),
    (dict(accums=4), TypeError, 'accums is a list of numbers of chunks, found 4'),
    (dict(accums='12'), TypeError, "accums is a list of numbers of chunks, found '12'"),
    (dict(accums=(1, 2.)), ValueError, r'accums: expected an int of 1 or more, found 2\.0'),
    (dict(accums=[True]), ValueError, 'accums: expected an int of 1 or more, found True'),
    (dict(updates=2.5), ValueError, r'updates: expected an int of 1 or more, found 2\.5'),
    (dict(warmup=-1), ValueError, 'warmup: expected an int of 0 or more, found -1'),
    (dict(limit=-5), ValueError, 'limit: expected seconds above 0, found -5'),
    (dict(limit=math.nan), ValueError, 'limit: expected seconds above 0, found nan'),
    (dict(limit='60'), ValueError, "limit: expected seconds above 0, found '60'")])
def test_settings_are_checked_before_any_process_starts(kwargs, error, text, monkeypatch):
    answers(monkeypatch)
    with pytest.raises(error, match=text): benchmark_accumulation(**{'make_learner': small, **kwargs})


# --- budgets --------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures('on_cpu')
def test_the_budget_is_kept_to_the_byte_with_the_reserve():
    learn = from_a_notebook()()
    need = int(predict_memory(learn, [4]).total[4])
    assert find_accumulation(learn, need+10**8, reserve='100MB').accum == 4
    tighter = find_accumulation(learn, need+10**8-1, reserve='100MB')
    assert (tighter.accum, tighter.bs) == (5, 7) and tighter.total <= tighter.budget - tighter.reserve < need
    assert find_accumulation(learn, need, reserve=0).accum == 4


@pytest.mark.usefixtures('on_cpu')
def test_what_was_found_is_what_microbatch_runs():
    learn = from_a_notebook()()
    found, sizes = find_accumulation(learn, int(predict_memory(learn, [3]).total[3]), reserve=0), []
    def note(m, args):
        if torch.is_grad_enabled(): sizes.append(len(args[0]))  # not what is only tried
    learn.model.register_forward_pre_hook(note)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=MicroBatch(found.bs))
    assert found.accum == 3 and sizes[:3] == [11, 11, 10]


@pytest.mark.parametrize('kwargs, text', [
    (dict(budget='a lot'), "found 'a lot'"),
    (dict(budget='16GB', reserve='little'), "found 'little'"),
    (dict(budget='16GB', device='tpu'), "found 'tpu'")])
def test_a_budget_that_cannot_be_read(kwargs, text):
    with pytest.raises(ValueError, match=text): find_accumulation(small(), **kwargs)


# --- clean-up -------------------------------------------------------------------------------------------------------
def keep_an_error_and_free():
    "Bytes that the process holds while the last error has a tensor, what is freed, and what it holds then"
    free_memory()
    def fails():
        big = torch.ones(25_000_000)  # 100 MB
        raise ValueError(len(big))
    try: fails()
    except ValueError as e: sys.last_exc = sys.last_value = e.with_traceback(e.__traceback__)
    sys.last_type, sys.last_traceback = ValueError, sys.last_value.__traceback__
    held = process_bytes('VmRSS')
    freed = free_memory()
    left = [o for o in ('last_exc', 'last_value', 'last_type', 'last_traceback') if hasattr(sys, o)]
    return dict(host=freed.host, fell=held-process_bytes('VmRSS'), left=left)


@linux
def test_the_last_error_no_longer_holds_its_tensors():  # in a process whose allocator no other test has used
    found, status = processes.in_process(keep_an_error_and_free, 120)
    assert status == 'ok' and 90e6 < found['host'] < 130e6 and found['fell'] > 90e6 and found['left'] == []


def test_what_is_in_use_stays_and_the_collector_is_as_it_was():
    kept = [torch.ones(10)]
    kept.append(kept)
    free_memory()
    gc.disable()
    try:
        free_memory()
        assert not gc.isenabled() and kept[1] is kept and kept[0].sum() == 10
    finally: gc.enable()


def test_a_system_that_tells_nothing(monkeypatch):
    monkeypatch.setattr(processes, 'process_bytes', lambda key: None)
    assert free_memory().host == 0
    assert repr(FreedMemory(3, 2_000_000, 0)) == 'freed 3 objects, 2 MB of main memory, 0 MB of GPU memory'
