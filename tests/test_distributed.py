"Learners in several processes: the updates, metrics and predictions of one, and failures that end all of them"
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

import launched
import spread
import spread_calls
from paddy_multi.core.checks import test_close as close
from paddy_multi.distributed.launch import in_processes


def results(run, n=2, limit=150, **kwargs): return [o.result for o in in_processes(run, n, limit, **kwargs)]


# --- the same updates -----------------------------------------------------------------------------------------------
THREE = ('one_item_last missing summed dense mixup mixup_gathered adam_weights_clip pairs declared '
         'learned_weights').split()
ROUNDED = {'summed', 'dense', 'dense_larger', 'dense_weights'}  # metrics that are float32 in a batch


@pytest.fixture(scope='module')
def two(): return results(spread.run_cases, names=[*spread.CASES, *spread.TABLES])


def holds(name, found):
    "All processes end with the weights, losses, metrics and schedule of one process"
    assert len({o['numbers'] for o in found}) == 1
    first = found[0]
    assert first['updates'] >= 20 and first['moved'] > .1 and first['nan']
    assert first['weights'] < 1e-10 and first['losses'] < 1e-10
    assert first['metrics'] < (1e-6 if name in ROUNDED else 1e-10) and first['schedule'] == 0.


@pytest.mark.parametrize('name', [*spread.CASES, *spread.TABLES])
def test_updates_of_two_processes_are_those_of_one(two, name): holds(name, [o[name] for o in two])


@pytest.mark.slow
def test_updates_of_three_processes_are_those_of_one():
    three = results(spread.run_cases, 3, names=THREE)
    for name in THREE: holds(name, [o[name] for o in three])


def test_a_part_that_one_process_has_used_moves_alike_in_all(two):
    first, second = (o['sometimes'] for o in two)
    assert first == second and first['moved'] > .1 and first['buffers'][0] != 0  # running means


def test_what_differs_at_the_start_does_not_last(two):
    first, second = (o['begun'] for o in two)
    for name in 'alone', 'loss': assert first[name] == second[name]
    drawn = first['drawn'] + second['drawn']
    assert len({*drawn}) == len(drawn) == 8
    for o in (first, second):
        assert o['lr'].startswith('the processes differ in the settings of the optimizer: process 0 ')
        assert o['epochs'].startswith('the processes differ in the state of the optimizer: process 0 ')
        assert o['epochs'].endswith('or make it anew in all of them: learn.create_opt()')


def test_one_gradient_exchange_an_update(two):
    calls = {name: two[0][name]['calls'] for name in [*spread.CASES, *spread.TABLES]}
    updates = {name: two[0][name]['updates'] for name in calls} | dict(accumulated=21)
    assert {name: o['gradients'] for name, o in calls.items()} == updates
    # By parts: counts and loss for each of 24 training batches and 12 of validation; and 4 sums of metrics
    assert calls['plain']['gather'] == 0 and calls['plain']['sum'] == 76
    assert calls['unknown_loss']['gather'] == 72 and calls['unknown_loss']['sum'] == 0


def test_what_is_exchanged_of_pictures_does_not_grow_with_their_pixels(two):
    "A count and a loss a batch, whatever the pictures; targets and outputs only for a metric that is no sum of items"
    small, large, gathered = (two[0][name]['bytes'] for name in ('dense', 'dense_larger', 'dense_gathered'))
    assert small == large and 'gather' not in small
    epochs, batches, sums = 10, 3 + 4, 2 + 2*2*21 + 2  # accuracy, two metrics of 21 classes, and the loss
    assert small['sum'] == 8*epochs*(2*batches + sums)
    assert gathered['gather'] == 8*epochs*(3*8+1)*(21+1)*8*8


# --- the same calls -------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp('digits')
    spread_calls.write_digits(folder)
    return folder


@pytest.fixture(scope='module')
def called(digits): return results(spread_calls.run_calls, folder=digits)


def alike(ours, one):
    "Numbers to 1e-5, tables and all else exactly"
    if isinstance(one, (tuple, list)):
        assert len(ours) == len(one)
        for o in zip(ours, one): alike(*o)
    elif isinstance(one, pd.DataFrame): pd.testing.assert_frame_equal(ours, one, rtol=1e-4, atol=1e-5)
    elif isinstance(one, torch.Tensor): close(ours.double().nan_to_num(7.), one.double().nan_to_num(7.), eps=1e-4)
    else: assert ours == one


CALLS = ('validate get_preds of_training with_all saved shuffled predict without_labels tta named named_tta losses '
         'confusion top shown').split()


@pytest.mark.parametrize('name', CALLS)
def test_every_process_predicts_what_one_does(called, name):
    for given, one, _ in called:
        assert set(given) == set(CALLS)
        alike(given[name], one[name])


def test_a_file_that_cannot_be_read_is_named_in_every_process(called):
    for given, *_ in called:
        errors = given['named'].error
        assert errors.notna().tolist() == [i == 5 for i in range(38)] and 'UnidentifiedImageError' in errors.iloc[5]


def test_process_0_alone_tells_what_it_does(called):
    (*_, first), (*_, second) = called
    assert 'Better model found at epoch 0' in first['said'] and second['said'] == ''


def test_rates_trackers_and_files(called, digits):
    (_, _, first), (_, _, second) = called
    assert {k: v for k, v in first.items() if k != 'said'} == {k: v for k, v in second.items() if k != 'said'}
    assert 1e-7 < first['rate'][0] < 10 and first['rate'][1] > 10 and first['restored']
    assert first['epochs'] == 2 and math.isclose(first['reduced'], .0001)  # 0.01, and two epochs without improvement
    close(*first['fetched'], eps=1e-4)
    assert any(o.startswith('each of 2 processes trains by itself') for o in first['by_itself'])
    assert first['loaded'] and first['left'] == [] and first['world'] == '2' and first['shows'] and second['shows']
    assert sorted(o.name for o in (digits/'models').iterdir()) == ['best.pth', 'kept.pth']  # nothing of lr_find
    assert len((digits/'history.csv').read_text().splitlines()) == 3


# --- failures -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def failed(digits):
    "What each process said of each failure; the second was killed in the end, and has left it in a file"
    first, second = in_processes(spread_calls.run_failures, limit=150, folder=digits)
    assert (first.code, second.code) == (0, -signal.SIGKILL)
    return [json.loads((digits/f'said_{i}.json').read_text()) for i in range(2)]


STOPPED = dict(
    error_in_a_batch=(1, 'ValueError: the picture 17 is broken'), error_in_backward=(0, 'ValueError: the picture 17'),
    error_after_an_epoch=(1, 'ValueError: the picture 17 is broken'), error_in_validation=(1, 'ValueError: the pict'),
    out_of_memory=(1, 'OutOfMemoryError: CUDA out of memory'), out_of_memory_in_the_loss=(0, 'OutOfMemoryError: CUDA'))


@pytest.mark.parametrize('name', STOPPED)
def test_what_fails_in_one_process_ends_all_with_its_message(failed, name):
    rank, text = STOPPED[name]
    kind, _, why = text.partition(': ')
    for i, o in enumerate(failed):
        said, seconds = o[name]
        assert said.startswith(kind if i == rank else f'ProcessFailed: process {rank} stopped: {kind}'), said
        assert why in said and seconds < 15


def test_one_that_leaves_the_others_is_told(failed):
    for o in failed:
        assert o['one_cancels'][0].startswith('ProcessFailed: the processes do different things: process 0 at ')


@pytest.mark.parametrize('name, said', [('sigint', 'KeyboardInterrupt: process 0 was told to stop by SIGINT'),
                                        ('sigterm', 'SystemExit: 143')])
def test_a_signal_ends_all(failed, name, said):
    for o in failed: assert o[name][0] == said and o[name][1] < 15


def test_one_that_is_killed_is_named(failed):
    said, seconds = failed[0]['sigkill']
    assert seconds < 15 and said.endswith('process 1 was killed, or ended without a message')
    assert said.startswith('ProcessFailed: process 0 has lost the others at ')


@pytest.fixture(scope='module')
def refused(tmp_path_factory):
    folder = tmp_path_factory.mktemp('refused')
    spread_calls.write_digits(folder)
    return results(spread_calls.run_refused, folder=folder)


@pytest.mark.slow
def test_what_differs_or_cannot_be_shared_is_refused_in_all(refused):
    first, second = refused
    assert {k: v for k, v in first.items() if k != 'worker'} == {k: v for k, v in second.items() if k != 'worker'}
    assert first['batch size'].startswith('ValueError: the processes differ in the batch size of training: process 0 '
                                          '8, process 1 4. Build model and data alike')
    assert first['items'].startswith('ValueError: the processes differ in the items of training: process 0 (163, ')
    assert first['parameters'].startswith('ValueError: the processes differ in parameters: process 0 [')
    assert first['one predicts'].startswith("ProcessFailed: the processes do different things: process 0 at 'order of "
                                            "items', process 1 at 'random numbers'")


@pytest.mark.slow
def test_loaders_have_workers_and_what_fails_in_one_of_them_ends_all(refused):
    assert all('FileNotFoundError' in o['worker'] for o in refused)
    assert sorted('ProcessFailed: process' in o['worker'] for o in refused) == [False, True]


# --- launchers ------------------------------------------------------------------------------------------------------
SCRIPT = """
import os, sys, torch
sys.path.insert(0, {tests!r})
from spread import learner, cross_entropy, across_processes, quietly, numbers_of
learn = learner(8, cross_entropy)
def fit(l):
    if {fails} and os.environ['RANK'] == '1': raise OSError('cannot read the labels')
    os.write(1, f'pid {{os.getpid()}}\\n'.encode())
    l.fit({epochs})
with across_processes(learn) as l: quietly(l, fit)
rank, total = os.environ['RANK'], numbers_of(learn.model).sum().item()
os.write(1, f"rank {{rank}} of {{os.environ['WORLD_SIZE']}} {{total}}\\n".encode())
"""


def started(folder, script, n=2):
    "A script under `torchrun`, and the file that it writes to"
    (folder/'train.py').write_text(script)
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={n}', 'train.py']
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(o for o in sys.path if o)}
    with open(folder/'out', 'wb') as out:
        return subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=subprocess.STDOUT), folder/'out'


def waited_for(out, process, n=2):
    "The numbers of the `n` processes, once all of them train"
    until = time.monotonic()+90
    while len(found := re.findall(r'^pid (\d+)$', out.read_text(), re.M)) < n:
        assert process.poll() is None and time.monotonic() < until, out.read_text()
        time.sleep(.2)
    time.sleep(1)
    return [*map(int, found)]


def torchrun(folder, fails):
    "Output and exit status of a script under `torchrun`; whatever it started is gone afterwards"
    process, out = started(folder, SCRIPT.format(tests=str(Path(__file__).parent), fails=fails, epochs=1))
    try: process.wait(120)
    except subprocess.TimeoutExpired:
        process.terminate()  # at which it ends what it has started
        process.wait(40)
        raise
    return out.read_text(), process.returncode


@pytest.mark.slow
def test_torchrun_starts_the_same_script(tmp_path):
    out, code = torchrun(tmp_path, fails=False)
    rows = sorted(o for o in out.splitlines() if o.startswith('rank'))
    assert code == 0 and [o[:11] for o in rows] == ['rank 0 of 2', 'rank 1 of 2'], out
    assert rows[0].split()[4] == rows[1].split()[4]


@pytest.mark.slow
def test_torchrun_shows_what_failed(tmp_path):
    out, code = torchrun(tmp_path, fails=True)
    assert code == 1 and 'OSError: cannot read the labels' in out
    assert 'ProcessFailed: process 1 stopped: OSError: cannot read the labels' in out


@pytest.mark.slow
@pytest.mark.parametrize('number, to, said', [
    (signal.SIGTERM, 'torchrun', 'was told to stop by SIGTERM'), (signal.SIGINT, 'all', 'was told to stop by SIGINT'),
    (signal.SIGKILL, 'process 0', 'has lost the others at')])
def test_a_signal_ends_what_torchrun_has_started(tmp_path, number, to, said):
    "As a scheduler sends it, a terminal, and a kernel without memory"
    process, out = started(tmp_path, SCRIPT.format(tests=str(Path(__file__).parent), fails=False, epochs=10**6))
    try:
        pids = waited_for(out, process)
        began = time.monotonic()
        for pid in dict(torchrun=[process.pid], all=[process.pid, *pids]).get(to, pids[:1]): os.kill(pid, number)
        process.wait(30)
        assert time.monotonic()-began < 15 and said in out.read_text()
        assert not launched.left(pids)
    finally: process.kill()
