"Engines and launchers: whatever starts the processes and averages their gradients, the updates are those of one"
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import launched
import spread
from paddy_multi.core.checks import test_close as close
from paddy_multi.distributed.launch import in_processes

SCRIPT = Path(__file__).with_name('launched.py')


# --- the engine -----------------------------------------------------------------------------------------------------
# Cases whose processes differ most in what they exchange; all of them where it may take long
QUICK = 'plain one_item_last missing unused_parts accumulated learned_weights'.split()
OTHERS = [o for o in [*spread.CASES, *spread.TABLES] if o not in QUICK]


def check_updates(name, found):
    first, second = found
    assert first['numbers'] == second['numbers'] and first['updates'] >= 8 and first['moved'] > .1
    assert first['weights'] < 1e-10 and first['losses'] < 1e-10
    # What the loss trains is not in the model's forward, and is averaged before the step
    assert first['calls'].get('gradients', 0) == (first['updates'] if name == 'learned_weights' else 0)


@pytest.fixture(scope='module')
def by_ddp(): return [o.result for o in in_processes(launched.run_by_ddp, limit=150, names=QUICK)]


@pytest.mark.parametrize('name', QUICK)
def test_updates_of_ddp_are_those_of_one_process(by_ddp, name): check_updates(name, [o[name] for o in by_ddp])


def test_a_part_that_one_process_has_used_moves_alike_by_ddp(by_ddp):
    first, second = (o['sometimes'] for o in by_ddp)
    assert first == second and first['moved'] > .1


@pytest.mark.slow
def test_other_updates_of_ddp_are_those_of_one_process():
    found = [o.result for o in in_processes(launched.run_by_ddp, limit=300, names=OTHERS)]
    for name in OTHERS: check_updates(name, [o[name] for o in found])


# --- launchers ------------------------------------------------------------------------------------------------------
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2']
ACCELERATE = [sys.executable, '-m', 'accelerate.commands.launch', '--num_machines=1', '--mixed_precision=no',
              '--dynamo_backend=no', '--num_processes=2']


def environment():
    "Of a shell: the project's path, and nothing of a launcher"
    env = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR')}
    return {**env, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join([str(SCRIPT.parent), *filter(None, sys.path)])}


def ran(folder, command, *args, limit=120):
    "Exit status and output of a script; whatever it has started is gone afterwards"
    process = subprocess.Popen([*command, str(SCRIPT), str(folder), *args], cwd=folder, env=environment(), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try: out, _ = process.communicate(timeout=limit)
    finally: launched.end(process)
    return process.returncode, out


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp('alone')
    launched.train(folder, bs=16)
    return json.loads((folder/'0.json').read_text())


LAUNCHES = dict(
    torchrun=(TORCHRUN, 'train', 'ddp'), accelerate=([*ACCELERATE, '--multi_gpu', '--main_process_port=0'], 'train'),
    accelerator_made_before=([*ACCELERATE, '--multi_gpu', '--main_process_port=0'], 'accelerator', 'ddp'),
    notebook_launcher=([sys.executable], 'notebook'))


@pytest.mark.parametrize('name', [o if o == 'accelerator_made_before' else pytest.param(o, marks=pytest.mark.slow)
                                  for o in LAUNCHES])
def test_a_script_gives_the_numbers_of_one_process(tmp_path, alone, name):
    command, *args = LAUNCHES[name]
    code, out = ran(tmp_path, command, *args)
    assert code == 0, out
    for rank in range(2):
        found = json.loads((tmp_path/f'{rank}.json').read_text())
        assert found['engine'] == (args[1:] or ['meeting'])[0] and found['names'] == alone['names']
        close(found['numbers'], alone['numbers'], eps=1e-10)
        close(found['metrics'], alone['metrics'], eps=1e-6)  # float32 in the recorder


@pytest.mark.slow
def test_accelerate_that_has_started_one_is_told(tmp_path):
    code, out = ran(tmp_path, [*ACCELERATE, '--cpu'])
    assert code == 0 and 'this process trains alone: accelerate was asked for several and has started one' in out
    assert [o.name for o in tmp_path.iterdir()] == ['0.json']
