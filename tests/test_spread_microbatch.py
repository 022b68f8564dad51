"MicroBatch in several processes: the updates, losses, metrics and predictions of one, and what all of them refuse"
import pytest
import torch

import spread_microbatch as spread
from paddy_multi.core.checks import test_close as close
from paddy_multi.distributed.launch import in_processes


def results(run, n=2, limit=280, **kwargs): return [o.result for o in in_processes(run, n, limit, **kwargs)]


# --- the same updates -----------------------------------------------------------------------------------------------
QUICK = '''one_item_last adam_weights_clip kept_by_one_item mixup whole_head_of_few memory_of_the_second
    memory_of_a_backward_pass'''.split()
SLOW = [o for o in (*spread.CASES, *spread.TABLES) if o not in QUICK]
THREE = '''one_item_last adam_weights_clip kept_by_one_item parts mixup mixup_numbers whole_head_of_few
    memory_of_the_first declared'''.split()
HALVED = [o for o in spread.CASES if o.startswith('memory')]


@pytest.fixture(scope='module')
def quick(): return results(spread.run_quick, names=QUICK)


@pytest.fixture(scope='module')
def slow(): return results(spread.run_all, limit=290, names=SLOW)


def holds(name, found):
    "All processes end with the weights, losses, metrics and schedule of one process, after one exchange an update"
    assert len({o['numbers'] for o in found}) == 1
    first = found[0]
    assert first['updates'] >= 20 and first['moved'] > .1 and first['nan']
    assert first['weights'] < 1e-10 and first['losses'] < 1e-10
    assert first['metrics'] < (1e-6 if name in spread.TABLES else 1e-10) and first['schedule'] == 0.
    assert first['calls']['gradients'] == first['updates']


@pytest.mark.parametrize('name', QUICK)
def test_updates_of_two_processes_in_chunks_are_those_of_one(quick, name): holds(name, [o[0][name] for o in quick])


@pytest.mark.slow
@pytest.mark.parametrize('name', SLOW)
def test_more_updates_of_two_processes_in_chunks_are_those_of_one(slow, name): holds(name, [o[name] for o in slow])


@pytest.mark.slow
@pytest.mark.parametrize('name', [o for o in spread.IN_CHUNKS if o in SLOW])
def test_so_are_they_where_one_process_runs_chunks_too(slow, name):
    holds(name, [o[f'{name}_in_chunks'] for o in slow])


@pytest.mark.slow
def test_updates_of_three_processes_in_chunks_are_those_of_one():
    three = results(spread.run_all, 3, limit=290, names=THREE)
    for name in THREE: holds(name, [o[name] for o in three])


def halved(name, found):
    "All processes have halved as often"
    assert {o['bs'] for o in found} == {2}
    text = 'MicroBatch ran out of memory with 8 items at a time and goes on with 2 in all processes'
    assert all(o['said'] == [text] for o in found)


@pytest.mark.parametrize('name', [o for o in HALVED if o in QUICK])
def test_memory_of_one_process_halves_the_chunks_of_all(quick, name): halved(name, [o[0][name] for o in quick])


@pytest.mark.slow
@pytest.mark.parametrize('name', [o for o in HALVED if o in SLOW])
def test_so_it_does_wherever_it_runs_out(slow, name): halved(name, [o[name] for o in slow])


def test_outputs_are_exchanged_where_somebody_reads_them(quick):
    found = quick[0][0]
    assert 'gather' not in found['one_item_last']['calls'] and found['kept_by_one_item']['calls']['gather'] > 0


# --- what is refused ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name, said', [
    ('pairs', 'ValueError: pairs does not add up over chunks: they would train another model'),
    ('seen_by_one', 'ValueError: pairs does not add up over chunks: '),
    ('of_few_labels', 'ValueError: masked does not add up over chunks: '),
    ('seen_by_none', 'ValueError: MicroBatch cannot see whether the loss adds up, as no process has more than 1 item: '
                     'use a larger bs in the loaders, or MicroBatch(1, whole_head=True)'),
    ('other_sizes', "ValueError: the processes differ in MicroBatch: process 0 [{'bs': 3, ")])
def test_what_one_refuses_all_refuse_before_any_update(quick, name, said):
    (first, moved), (second, also) = (o[1][name] for o in quick)
    assert first == second and first.startswith(said) and not moved and not also


# --- predictions ----------------------------------------------------------------------------------------------------
def test_every_process_predicts_in_chunks_what_one_does(quick):
    for _, _, (found, _) in quick:
        for (valid, preds, training), (one_valid, one_preds, one_training) in found:
            for ours, one in (valid, one_valid), (training, one_training): close([*ours], [*one], eps=1e-6)
            assert len(preds) == len(one_preds) == 4 and torch.equal(preds[0], one_preds[0])
            for i in 1, 2, 3: close(preds[i], one_preds[i], eps=1e-12)


def test_layers_that_mix_rows_are_left_to_fastai_in_all_processes(quick):
    (*_, (_, first)), (*_, (_, second)) = quick
    assert first == second
