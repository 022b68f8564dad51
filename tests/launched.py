"What the tests of launchers and engines run, in processes that a launcher or `in_processes` has started"
import json
import os
import signal
import socket
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from unittest.mock import patch

import spread
from paddy_multi.distributed.across import across_processes


def run_by_ddp(names):
    "What `spread.run_cases` finds where gradients are averaged in the backward pass"
    with patch.object(spread, 'across_processes', partial(across_processes, engine='ddp')):
        return spread.run_cases(names)


def train(folder, engine='meeting', bs=8):
    "A short fit, of which each process notes in a file what it found"
    rank, learn = int(os.environ.get('RANK', 0)), spread.learner(bs, spread.cross_entropy)
    with across_processes(learn, engine=engine) as l:
        spread.quietly(l, lambda l: l.fit_one_cycle(2, .05))
        engine = l.across_processes.engine if hasattr(l, 'across_processes') else None
    noted = dict(numbers=spread.numbers_of(learn.model).tolist(), metrics=list(learn.recorder.values[-1]),
                 engine=engine, names=[*learn.model.state_dict()])
    (Path(folder)/f'{rank}.json').write_text(json.dumps(noted))


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def in_a_notebook(folder):
    from accelerate import notebook_launcher
    notebook_launcher(train, (folder,), num_processes=2, use_port=str(free_port()))


def end(process, limit=40):
    "End a launcher and all that it has started"
    process.terminate()  # at which it ends them
    try: process.wait(limit)
    finally:
        with suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)


def main(folder, how='train', engine='meeting'):
    "A script that a launcher starts"
    if how == 'accelerator':
        from accelerate import Accelerator
        assert Accelerator(cpu=True).num_processes == 2
    if how == 'notebook': in_a_notebook(folder)
    else: train(folder, engine)


if __name__ == '__main__': main(*sys.argv[1:])
