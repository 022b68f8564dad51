"Recommenders in several processes: the updates, predictions and lists of one"
import pytest

import collab_spread
from paddy_multi.core.checks import test_close as close
from paddy_multi.distributed.launch import in_processes


def results(run, n=2, limit=200, **kwargs): return [o.result for o in in_processes(run, n, limit, **kwargs)]


@pytest.fixture(scope='module')
def two(): return results(collab_spread.run_cases, names=[*collab_spread.MAKE])


def holds(found):
    "All processes end with the weights, losses, metrics and schedule of one process"
    assert len({o['numbers'] for o in found}) == 1
    first = found[0]
    assert first['updates'] >= 12 and first['moved'] > .1 and first['nan']
    assert first['weights'] < 1e-10 and first['losses'] < 1e-10 and first['metrics'] < 1e-10 and first['schedule'] == 0.


@pytest.mark.parametrize('name', [*collab_spread.MAKE])
def test_updates_of_two_processes_are_those_of_one(two, name): holds([o['cases'][name] for o in two])


@pytest.mark.slow
def test_updates_of_three_processes_are_those_of_one():
    three = results(collab_spread.run_cases, 3, names=[*collab_spread.MAKE])
    for name in collab_spread.MAKE: holds([o['cases'][name] for o in three])


def test_calls_give_what_they_give_in_one_process(two):
    first, second = (o['calls']['found'] for o in two)
    assert first == second
    expected = two[0]['calls']['expected']
    assert first.keys() == expected.keys()
    for name in ('preds', 'targs', 'validated', 'one', 'pairs', 'measured'): close(first[name], expected[name], 1e-6)
    assert first['lists'] == expected['lists'] and first['new'] == expected['new']


def test_ratings_that_differ_by_process_are_refused(two):
    for o in two:
        assert o['calls']['refused'].startswith('the processes differ in the items of a loader: process 0 ')
        assert o['calls']['refused'].endswith('with a fixed seed for a random split')
