"Models of which each process keeps a part: the updates of one, checkpoints for any number, failures that end all"
import signal

import pytest
import torch

import sharded
import spread
import spread_calls
from test_distributed import CALLS, alike, holds, results
from paddy_multi.core.checks import test_close as close
from paddy_multi.distributed.checkpoints import load_sharded, read_facts
from paddy_multi.distributed.launch import in_processes


# --- the same updates, calls and checkpoints ------------------------------------------------------------------------
MORE = [o for o in (*sharded.CASES, *spread.TABLES) if o not in sharded.FEW]


def run_all(folder):
    return dict(updates=sharded.run_updates(sharded.FEW), calls=sharded.run_calls(folder/'calls'),
                kept=sharded.run_kept(folder/'run'), others=sharded.run_others(folder/'run'),
                no_space=sharded.run_without_space(folder/'run'))


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('parts')


@pytest.fixture(scope='module')
def two(folder): return results(run_all, limit=300, folder=folder)


@pytest.fixture(scope='module')
def more(): return results(sharded.run_updates, limit=300, names=MORE)


@pytest.mark.parametrize('name', sharded.FEW)
def test_updates_of_two_processes_are_those_of_one(two, name): holds(name, [o['updates'][name] for o in two])


@pytest.mark.slow
@pytest.mark.parametrize('name', MORE)
def test_more_updates_of_two_processes_are_those_of_one(more, name): holds(name, [o[name] for o in more])


def test_no_gradient_is_averaged_twice(two):
    "fully_shard averages those of the parts; the learned weights of targets stay whole"
    calls = {name: o['calls'].get('gradients', 0) for name, o in two[0]['updates'].items()}
    assert {name for name, n in calls.items() if n} == {'learned_weights'}
    assert calls['learned_weights'] == two[0]['updates']['learned_weights']['updates']


def test_gradients_are_exchanged_once_an_update(two):
    "For each of two parts, also where a batch is run in chunks"
    for name in ('plain', 'chunks', 'chunks_clip'):
        found = two[0]['updates'][name]
        assert found['reduced'] == 2*found['updates'], name


def test_calls_of_fastai_give_what_one_process_gives(two):
    for o in two:
        found = o['calls']
        assert found['frozen'] == [False, False, True, True]
        for name in ('fine_tune', 'predictions', 'best', 'loaded'): assert found[name] < 1e-10, name
        assert found['rates'] < 1e-5  # the recorder has them in float32


def test_a_process_holds_its_part_alone(two):
    (weights, state), whole = zip(*(o['calls']['held'] for o in two)), two[0]['calls']['whole']
    assert (sum(weights), sum(state)) == tuple(whole) and whole[1] == 2*whole[0]
    assert max(weights) < .6*whole[0] and max(state) < .6*whole[1]


def test_what_parts_cannot_do_is_refused_in_all(two):
    first, second = (o['calls']['refused'] for o in two)
    assert first == second
    export, again, whole_head, auto, keep = first
    assert export.startswith("ValueError: a learner in parts cannot be exported: after learn.save('whole')")
    assert again.startswith('ValueError: the model is in parts already')
    for text, name in ((whole_head, 'whole_head'), (auto, 'auto')):
        assert f'MicroBatch found a model of fully_shard, and {name}=True' in text
    assert 'cannot train with KeepEpochs: it writes whole models: use KeepSharded' in keep


def test_a_checkpoint_goes_on_in_one_process_and_in_two(two, folder):
    for o in two:
        after_two, uninterrupted = o['kept']
        close(after_two, uninterrupted, eps=1e-10)
    close(sharded.resumed(folder/'run'), uninterrupted, eps=1e-10)
    assert read_facts(folder/'run')['epochs'] == 2


def test_a_checkpoint_of_another_model_is_refused_in_all(two):
    model, opt, wrapped, nowhere = two[0]['others']
    assert two[0]['others'] == two[1]['others']
    assert "holds another model: model.0.weight is None there, and [[5, 20], 'torch.float64'] in this learner" in model
    assert 'holds another optimizer: the settings of group 0 is [' in opt
    assert 'holds another optimizer: the settings of group 0 is [' in wrapped
    assert nowhere == 'FileNotFoundError: no checkpoint in nowhere: begin with fit, and KeepSharded'


def test_all_learn_of_a_checkpoint_that_one_could_not_write_and_the_one_before_stays(two, folder):
    first, second = (o['no_space'] for o in two)
    assert first == 'OSError: [Errno 28] No space left on device'
    assert second == f'ProcessFailed: process 0 stopped: {first}'
    assert read_facts(folder/'run')['epochs'] == 2


# --- failures -------------------------------------------------------------------------------------------------------
def ended(limit=100, **kwargs): return in_processes(sharded.run_failing, 2, limit, **kwargs)


@pytest.mark.slow
def test_an_error_in_one_process_ends_both():
    first, second = ended(f=spread_calls.an_error)
    assert second.error.startswith('ValueError: ') and 'the picture 17 is broken' in second.error and second.code == 1
    assert 'process 1 stopped: ValueError: ' in second.output
    assert first.code == 1 and first.error.startswith('ProcessFailed: process 0 has lost the others at')
    assert abs(first.seconds-second.seconds) < 15


# --- more processes -------------------------------------------------------------------------------------------------
def run_few(folder):
    return dict(updates=sharded.run_updates(sharded.FEW), resumed=sharded.resumed(folder/'run'),
                calls=sharded.run_calls(folder/'calls3'), kept=sharded.run_kept(folder/'three'))


@pytest.mark.slow
def test_three_processes_do_what_two_do(two, folder):
    uninterrupted, three = two[0]['kept'][1], results(run_few, 3, limit=400, folder=folder)
    for name in sharded.FEW: holds(name, [o['updates'][name] for o in three])
    for o in three:
        for numbers in (o['resumed'], *o['kept']): close(numbers, uninterrupted, eps=1e-10)
        assert o['calls']['best'] < 1e-10 and o['calls']['loaded'] < 1e-10
    close(sharded.resumed(folder/'three'), uninterrupted, eps=1e-10)
    for o in results(sharded.resumed, folder=folder/'three'): close(o, uninterrupted, eps=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize('n, copies', [(2, 2), (4, 2)])
def test_copies_of_parts_have_the_same_updates(n, copies):
    found = results(sharded.run_updates, n, names=sharded.FEW, copies=copies)
    for name in sharded.FEW: holds(name, [o[name] for o in found])


@pytest.mark.slow
def test_pictures_are_predicted_as_one_process_does(folder):
    digits = folder/'digits'
    digits.mkdir()
    spread_calls.write_digits(digits)
    for given, one in results(sharded.run_predictions, folder=digits):
        for name in CALLS: alike(given[name], one[name])


@pytest.mark.slow
def test_a_kill_while_all_write_leaves_the_checkpoint_before(two, folder):
    first, second = in_processes(sharded.run_killed, 2, 60, folder=folder/'run')
    assert second.code == -signal.SIGKILL and first.seconds-second.seconds < 15
    assert first.error.startswith('ProcessFailed: process 0 has lost the others at')
    close(sharded.resumed(folder/'run'), two[0]['kept'][1], eps=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize('f, event', [(spread_calls.sent(signal.SIGKILL), 'before_batch'),
                                      (spread_calls.an_error, 'after_pred'), (spread_calls.no_memory, 'after_loss')])
def test_what_fails_in_one_process_ends_both(f, event):
    first, second = ended(f=f, event=event)
    assert 'ProcessFailed: process 0 has lost the others' in first.error and abs(first.seconds-second.seconds) < 15
