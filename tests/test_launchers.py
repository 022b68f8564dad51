"Engines and launchers: whatever starts the processes and averages their gradients, the updates are those of one"
import json
import os
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
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
IN_CHUNKS = 'plain one_item_last missing mixup'.split()
OTHERS = [o for o in [*spread.CASES, *spread.TABLES] if o not in QUICK]


def check_updates(name, found):
    first, second = found
    assert first['numbers'] == second['numbers'] and first['updates'] >= 20 and first['moved'] > .1
    assert first['weights'] < 1e-10 and first['losses'] < 1e-10
    # What the loss trains is not in the model's forward, and is averaged before the step
    assert first['calls'].get('gradients', 0) == (first['updates'] if name == 'learned_weights' else 0)


@pytest.fixture(scope='module')
def by_ddp(tmp_path_factory):
    "What two processes found, and how they ended"
    folder = tmp_path_factory.mktemp('ddp')
    ended = in_processes(launched.run_engine, limit=300, folder=folder, names=QUICK, chunked=IN_CHUNKS)
    files = [folder/f'{rank}.json' for rank in range(2)]
    assert all(o.exists() for o in files), ended[0].output + ended[1].output
    return [json.loads(o.read_text()) for o in files], ended, float((folder/'began').read_text())


@pytest.mark.parametrize('name', [*QUICK, *[f'{o}_in_chunks' for o in IN_CHUNKS]])
def test_updates_of_ddp_are_those_of_one_process(by_ddp, name): check_updates(name, [o[name] for o in by_ddp[0]])


def test_a_part_that_one_process_has_used_moves_alike_by_ddp(by_ddp):
    first, second = (o['sometimes'] for o in by_ddp[0])
    assert first == second and first['moved'] > .1
    first, second = (o['sometimes_in_chunks'] for o in by_ddp[0])
    assert first == second
    close(first['ddp'], first['meeting'], eps=1e-10)


@pytest.mark.parametrize('engine', ['meeting', 'ddp'])
def test_an_overflow_in_one_process_skips_the_update_in_all(by_ddp, engine):
    "Six updates of 81 items, of which the second is skipped and halves the scale"
    first, second = (o['overflow'][engine] for o in by_ddp[0])
    assert first == second and first[0] == [[False, 256.], [True, 128.], *4*[[False, 128.]]] and first[2]


def test_callbacks_find_the_model_itself(by_ddp):
    names = ['0.0.weight', '0.0.bias', '1.0.weight', '1.0.bias']
    assert all(o['callbacks'] == [names, 'Sequential', False] for o in by_ddp[0])


def test_one_that_fails_beside_ddp_says_so_and_leaves(by_ddp):
    _, (first, second), _ = by_ddp
    assert second.error == 'OSError: cannot read picture 17' and abs(first.seconds-second.seconds) < 15
    assert 'process 1 stopped: OSError: cannot read picture 17' in second.output
    assert first.error.startswith('ProcessFailed: process 0 has lost the others at ')


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


def ran(folder, command, *args, limit=300):
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
    check_numbers(tmp_path, alone, (args[1:] or ['meeting'])[0])


def check_numbers(folder, alone, engine):
    for rank in range(2):
        found = json.loads((folder/f'{rank}.json').read_text())
        assert found['engine'] == engine and found['names'] == alone['names']
        close(found['numbers'], alone['numbers'], eps=1e-10)
        close(found['metrics'], alone['metrics'], eps=1e-6)  # float32 in the recorder


def ran_on_two_nodes(folder, *args):
    "The same, where `torchrun` is started for two nodes (both of them here), with a process on each"
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    nodes = [[sys.executable, '-m', 'torch.distributed.run', '--nnodes=2', f'--node-rank={rank}', '--nproc-per-node=1',
              '--rdzv-backend=c10d', f'--rdzv-endpoint=localhost:{port}'] for rank in range(2)]
    with ThreadPoolExecutor(2) as pool: return [*pool.map(lambda node: ran(folder, node, *args), nodes)]


@pytest.mark.slow
@pytest.mark.parametrize('engine', ['meeting', 'ddp'])
def test_processes_on_two_nodes_have_the_numbers_of_one(tmp_path, alone, engine):
    assert all(code == 0 for code, _ in ran_on_two_nodes(tmp_path, 'train', engine))
    check_numbers(tmp_path, alone, engine)


@pytest.mark.slow
@pytest.mark.parametrize('what, says', [('error', 'process 1 stopped: OSError: cannot read'),
                                        ('sigkill', 'process 1 was killed, or ended')])
def test_what_happens_on_one_node_is_said_on_both(tmp_path, what, says):
    ended = ran_on_two_nodes(tmp_path, 'happens', 'forward', what)
    assert time.time()-float((tmp_path/'began').read_text()) < 15 and all(code for code, _ in ended)
    assert any(re.search(f'ProcessFailed: .*{says}', out) for _, out in ended), ended


# --- failures -------------------------------------------------------------------------------------------------------
SAYS = dict(error='OSError: cannot read picture 17', memory='OutOfMemoryError: CUDA out of memory',
            sigterm='SystemExit: 143', sigint='KeyboardInterrupt: process 1 was told to stop by SIGINT')


@pytest.fixture(scope='module')
def failed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('failed')
    return [o.result for o in in_processes(launched.run_failures, limit=400, folder=folder, failures=launched.FAILURES)]


@pytest.mark.slow
@pytest.mark.parametrize('where, what', launched.FAILURES)
def test_what_happens_in_one_process_ends_both(failed, where, what):
    (first, _), (second, seconds) = (o[where, what] for o in failed)
    assert seconds < 15
    if what.startswith('sig') and where != 'worker': assert first == second == SAYS[what]
    else:
        says = 'DataLoader worker' if (where, what) == ('worker', 'sigkill') else SAYS[what]
        assert says in second and first.startswith('ProcessFailed: process 1 stopped: ') and says in first


UNDER = [('torchrun', 'ddp', 'forward', 'error', 'process 1 stopped: OSError: cannot read picture 17'),
         ('torchrun', 'ddp', 'backward', 'error', 'process 1 stopped: OSError: cannot read picture 17'),
         ('torchrun', 'ddp', 'loading', 'memory', 'process 1 stopped: OutOfMemoryError: CUDA out of memory'),
         ('torchrun', 'ddp', 'backward', 'sigkill', 'Signal 9 (SIGKILL) received'),
         ('torchrun', 'ddp', 'forward', 'sigterm', 'Signal 15 (SIGTERM) received'),
         ('torchrun', 'ddp', 'forward', 'ctrl_c', 'KeyboardInterrupt'),
         ('torchrun', 'meeting', 'forward', 'ctrl_c', 'was told to stop by SIGINT'),
         ('torchrun', 'meeting', 'loading', 'sigkill', 'Signal 9 (SIGKILL) received'),
         ('torchrun', 'meeting', 'worker', 'sigkill', 'process 1 stopped: RuntimeError: DataLoader worker'),
         ('torchrun', 'parts', 'forward', 'error', 'process 1 stopped: OSError: cannot read picture 17'),
         ('torchrun', 'parts', 'backward', 'sigkill', 'Signal 9 (SIGKILL) received'),
         ('torchrun', 'parts', 'loading', 'sigterm', 'Signal 15 (SIGTERM) received'),
         ('torchrun', 'parts', 'forward', 'ctrl_c', 'KeyboardInterrupt'),
         ('accelerate', 'ddp', 'forward', 'error', 'process 1 stopped: OSError: cannot read picture 17'),
         ('accelerate', 'ddp', 'backward', 'sigkill', 'Signal 9 (SIGKILL) received'),
         ('accelerate', 'meeting', 'predictions', 'error', 'ProcessFailed: process 1 stopped: OSError: cannot read')]


@pytest.mark.slow
@pytest.mark.parametrize('launcher, engine, where, what, says', UNDER)
def test_what_happens_in_one_process_ends_what_a_launcher_has_started(tmp_path, launcher, engine, where, what, says):
    code, out = ran(tmp_path, LAUNCHES[launcher][0], 'happens', where, what, engine)
    seconds = time.time()-float((tmp_path/'began').read_text())
    assert code and says in out and seconds < 15, (seconds, out)
    assert not launched.left((tmp_path/'pids').read_text().split())


# --- what is told ---------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_accelerate_that_has_started_one_is_told(tmp_path):
    code, out = ran(tmp_path, [*ACCELERATE, '--cpu'])
    assert code == 0 and 'this process trains alone: accelerate was asked for several and has started one' in out
    assert [o.name for o in tmp_path.iterdir()] == ['0.json']
