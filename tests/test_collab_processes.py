"Recommenders in several processes: the updates, predictions and lists of one"
import math

import pytest
import torch

import collab_spread
from paddy_multi.core.checks import test_close as close
from paddy_multi.distributed.launch import in_processes


def results(run, n=2, limit=400, **kwargs): return [o.result for o in in_processes(run, n, limit, **kwargs)]


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


def test_what_is_solved_is_the_same_in_two_processes():
    for found in results(collab_spread.run_solved):
        for (losses,scores),(losses_alone,scores_alone) in found.values():
            close(losses, losses_alone, eps=1e-6)
            close(scores, scores_alone, eps=1e-6)


@pytest.mark.slow
def test_updates_of_three_processes_are_those_of_one():
    three = results(collab_spread.run_cases, 3, names=[*collab_spread.MAKE])
    for name in collab_spread.MAKE: holds([o['cases'][name] for o in three])


@pytest.mark.slow
def test_a_process_without_rows_in_a_batch_counts_for_nothing():
    for o in results(collab_spread.validate_few, 3, 120): close(o['found'], o['expected'], 1e-6)


def test_calls_give_what_they_give_in_one_process(two):
    first, second = (o['calls']['found'] for o in two)
    assert first == second
    expected = two[0]['calls']['expected']
    assert first.keys() == expected.keys()
    for name in ('preds', 'targs', 'validated', 'one', 'pairs', 'measured'): close(first[name], expected[name], 1e-6)
    assert first['lists'] == expected['lists'] and first['new'] == expected['new']


def test_ratings_that_differ_by_process_are_refused(two):
    for o in two:
        assert o['calls']['refused'].startswith('the processes differ in the items of training: process 0 ')
        assert o['calls']['refused'].endswith('with a fixed seed for a random split')


# --- tables in parts ------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    return results(collab_spread.run_parts, names=['bias', 'nn', 'softmax'], folder=tmp_path_factory.mktemp('parts'))


def in_parts(found):
    "Tables in parts end as whole ones do, and no process keeps more than its share of rows"
    first, n = found[0], len(found)
    assert len({o['numbers'] for o in found}) == 1 and all(o['same_names'] for o in found)
    assert first['apart'] < 1e-10 and first['losses'] < 1e-10 and first['metrics'] < 1e-10
    for kind in 'rows', 'states':
        assert all(own <= math.ceil(rows/n) for o in found for rows, own in o[kind])
        assert [rows for rows, _ in first[kind]] == [sum(o) for o in zip(*([own for _, own in o[kind]] for o in found))]


@pytest.mark.parametrize('name', ['bias', 'nn', 'softmax'])
def test_tables_in_parts_are_trained_as_whole_ones(parts, name): in_parts([o['cases'][name] for o in parts])


@pytest.mark.slow
def test_tables_in_three_parts(tmp_path):
    three = results(collab_spread.run_parts, 3, 500, names=collab_spread.IN_PARTS, folder=tmp_path)
    for name in collab_spread.IN_PARTS: in_parts([o['cases'][name] for o in three])
    used_alike(three)


def used_alike(found):
    assert all(o['got'] == found[0]['got'] for o in found)
    got, expected = found[0]['got'], found[0]['expected']
    assert got['lists'] == expected['lists'] and got['some'] == expected['some']
    for name in ('scores', 'pairs', 'measured'): close(got[name], expected[name], 1e-6)
    assert got['saved'].keys() == expected['saved'].keys()
    for name, numbers in expected['saved'].items():
        close(torch.tensor(got['saved'][name]).flatten(), torch.tensor(numbers).flatten(), 1e-6)
    for ours, one in (o['ties'] for o in found): assert ours == one


def test_lists_scores_and_the_saved_folder_are_those_of_one_process(parts): used_alike(parts)


def test_training_of_parts_is_kept(parts):
    for o in parts:
        tables, moments = o['resumed']
        assert all(tables) and all(moments) and len(tables) == 4 and len(moments) == 8


@pytest.mark.parametrize('call, text', [
    ('explain', 'explain reads whole tables, and those of this DotProductBias are in parts: save it with save_recomm'),
    ('similar', 'what compares factors of items reads whole tables'), ('bias', 'item_bias reads whole tables'),
    ('new', 'fold_in reads whole tables'), ('save', 'learn.save reads whole tables'),
    ('load', 'learn.load reads whole tables'), ('export', 'learn.export reads whole tables'),
    ('find', 'learn.save reads whole tables'), ('others', 'the processes ask for lists of other users'),
    ('twice', 'the tables of this model are in parts already')])
def test_what_needs_whole_tables_is_refused_in_all_processes(parts, call, text):
    for o in parts: assert text in o['refused'][call]


@pytest.mark.slow
@pytest.mark.parametrize('where', ['before_batch', 'after_batch'])
def test_a_process_that_fails_ends_all(where):
    ended = in_processes(collab_spread.fail_in_parts, 2, 120, where=where)
    assert all(o.code for o in ended)
    assert 'no more of this' in ended[1].output
    assert 'process 1 was killed, or ended' in ended[0].output and ended[0].seconds - ended[1].seconds < 15
