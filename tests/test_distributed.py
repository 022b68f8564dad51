"Learners in several processes: the updates, metrics and predictions of one, and failures that end all of them"
import math
import signal

import pandas as pd
import pytest
import torch

import spread
import spread_calls
from paddy_multi.core.checks import test_close as close
from paddy_multi.distributed.launch import in_processes


def results(run, n=2, limit=150, **kwargs): return [o.result for o in in_processes(run, n, limit, **kwargs)]


# --- the same updates -----------------------------------------------------------------------------------------------
THREE = 'one_item_last', 'missing', 'mixup', 'mixup_gathered', 'adam_weights_clip', 'pairs'


@pytest.fixture(scope='module')
def two(): return results(spread.run_cases, names=list(spread.CASES))


def holds(found):
    "All processes end with the weights, losses, metrics and schedule of one process"
    assert len({o['numbers'] for o in found}) == 1
    first = found[0]
    assert first['updates'] >= 8 and first['moved'] > .1 and first['nan']
    assert first['weights'] < 1e-10 and first['losses'] < 1e-10 and first['metrics'] < 1e-10
    assert first['schedule'] == 0.


@pytest.mark.parametrize('name', spread.CASES)
def test_updates_of_two_processes_are_those_of_one(two, name): holds([o[name] for o in two])


@pytest.mark.slow
def test_updates_of_three_processes_are_those_of_one():
    three = results(spread.run_cases, 3, names=THREE)
    for name in THREE: holds([o[name] for o in three])


def test_one_gradient_exchange_an_update(two):
    calls = {name: o['calls'] for name, o in two[0].items()}
    assert {name: o['gradients'] for name, o in calls.items()} == {
        name: 12 if name == 'accumulated' else o['updates'] for name, o in two[0].items()} | {'accumulated': 12}
    # By parts: the targets of a batch and one number; of 24 training batches and 12 of validation, and 4 sums of metrics
    assert calls['plain']['gather'] == 36 and calls['plain']['sum'] == 40
    assert calls['unknown_loss']['gather'] == 72 and calls['unknown_loss']['sum'] == 0


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


CALLS = ('validate get_preds of_training with_all shuffled predict without_labels tta named named_tta losses confusion '
         'top shown').split()


@pytest.mark.parametrize('name', CALLS)
def test_every_process_predicts_what_one_does(called, name):
    for given, one, _ in called:
        assert set(given) == set(CALLS)
        alike(given[name], one[name])


def test_a_file_that_cannot_be_read_is_named_in_every_process(called):
    for given, *_ in called:
        errors = given['named'].error
        assert errors.notna().tolist() == [i == 5 for i in range(38)] and 'UnidentifiedImageError' in errors.iloc[5]


def test_rates_trackers_and_files(called, digits):
    (_, _, first), (_, _, second) = called
    assert {k: v for k, v in first.items() if k != 'shows'} == {k: v for k, v in second.items() if k != 'shows'}
    assert 1e-7 < first['rate'][0] < 10 and first['rate'][1] == 30 and first['restored']
    assert first['epochs'] == 2 and math.isclose(first['reduced'], .0001)  # 0.01, and two epochs without improvement
    close(*first['fetched'], eps=1e-4)
    assert first['loaded'] and first['left'] == [] and first['world'] == '2' and first['shows'] and second['shows']
    assert sorted(o.name for o in (digits/'models').iterdir()) == ['best.pth', 'kept.pth']  # nothing of lr_find
    assert len((digits/'history.csv').read_text().splitlines()) == 3


# --- failures -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def failed(digits): return in_processes(spread_calls.run_failures, limit=150, folder=digits)


STOPPED = dict(
    error_in_a_batch=(1, 'ValueError: the picture 17 is broken'), error_in_backward=(0, 'ValueError: the picture 17'),
    error_after_an_epoch=(1, 'ValueError: the picture 17 is broken'), out_of_memory=(1, 'OutOfMemoryError: CUDA out of'),
    out_of_memory_in_the_loss=(0, 'OutOfMemoryError: CUDA out of memory'))


@pytest.mark.parametrize('name', STOPPED)
def test_what_fails_in_one_process_ends_all_with_its_message(failed, name): pass
