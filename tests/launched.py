"What the tests of launchers and engines run, in processes that a launcher or `in_processes` has started"
import json
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from torch import nn

import spread
import spread_microbatch
from paddy_multi.accumulate.microbatch import MicroBatch
from paddy_multi.distributed.across import across_processes
from paddy_multi.distributed.ranks import join_processes
from paddy_multi.distributed.sharded import shard_learner


def rank(): return int(os.environ.get('RANK', 0))


# --- engines --------------------------------------------------------------------------------------------------------
def run_by_ddp(names):
    "What `spread.run_cases` finds where gradients are averaged in the backward pass"
    with patch.object(spread, 'across_processes', partial(across_processes, engine='ddp')):
        return spread.run_cases(names)


def run_chunks_by_ddp(names):
    "The same for `MicroBatch`"
    with patch.object(spread, 'across_processes', partial(across_processes, engine='ddp')):
        return {f'{o}_in_chunks': spread_microbatch.run_case(**spread_microbatch.CASES[o]) for o in names}


def sometimes_in_chunks(engine):
    "Weights of a model with a part that few chunks use, in the first of them or in the last"
    def model():
        torch.manual_seed(2)
        return spread.Sometimes(*spread.mlp(), nn.Linear(32, 5).double())
    learn = spread.learner(8, spread.cross_entropy, model=model, cbs=[MicroBatch(3)])
    with across_processes(learn, engine=engine) as l: spread.quietly(l, lambda l: l.fit(4))
    return spread.numbers_of(learn.model).tolist()


class ScaledOnCPU(MixedPrecision):
    "fastai's, with a scaler that works without a GPU, and without a cast"
    def before_fit(self):
        self.autocast, self.scales = torch.autocast('cpu', enabled=False), []
        self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=2.**8, growth_interval=100)
        self.learn.seen_scales = []

    def after_step(self):
        super().after_step()
        self.learn.seen_scales.append((self.skipped, self.learn.scaler.get_scale()))


class Overflows(Callback):
    "The gradients of one process are infinite in its second batch"
    order, reads_outputs = 60, False
    def after_pred(self):
        if self.training and self.learn.iter == 1 and rank() == 1:
            self.learn.pred.register_hook(lambda g: g*float('inf'))


def overflow(engine):
    "Which updates were skipped, the scales after them, and the weights"
    learn = spread.learner(8, spread.cross_entropy, cbs=[ScaledOnCPU(), Overflows()])
    with across_processes(learn, engine=engine) as l: spread.quietly(l, lambda l: l.fit(1))
    numbers = spread.numbers_of(learn.model)
    return learn.seen_scales, numbers.sum().item(), numbers.isfinite().all().item()


class Exports(Callback):
    "Another callback finds the model that the user has made"
    order, reads_outputs = 61, False
    def after_batch(self):
        self.learn.names = [*self.model.state_dict()], type(self.model).__name__, 'forward' in vars(self.model)


def run_engine(folder, names, chunked):
    "Updates, overflows, and what callbacks find; then one process fails, and leaves the other in the backward pass"
    found = dict(run_by_ddp(names), **run_chunks_by_ddp(chunked))
    for f in overflow, sometimes_in_chunks: found[f.__name__] = {o: f(o) for o in ('meeting', 'ddp')}
    learn = spread.learner(8, spread.cross_entropy, cbs=[Exports()])
    with across_processes(learn, engine='ddp') as l: spread.quietly(l, lambda l: l.fit(1))
    found['callbacks'] = learn.names
    (Path(folder)/f'{rank()}.json').write_text(json.dumps(found, default=float))
    happens(folder, 'forward', 'error', 'ddp')


# --- failures -------------------------------------------------------------------------------------------------------
def an_error(): raise OSError('cannot read picture 17')


def no_memory(): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')


def ctrl_c():
    "As a terminal sends it: to the launcher, which sends it on, and to all processes"
    for pid in [os.getppid(), *map(int, PIDS.read_text().split())]: os.kill(pid, signal.SIGINT)


def sent(number): return lambda: os.kill(os.getpid(), number)


WHAT = dict(error=an_error, memory=no_memory, ctrl_c=ctrl_c, sigterm=sent(signal.SIGTERM),
            sigint=sent(signal.SIGINT), sigkill=sent(signal.SIGKILL))
PIDS = Path()  # a file with the numbers of all processes


class At(Callback):
    "Something happens at a place of the program, in the second batch or the first epoch"
    order, reads_outputs = 62, False
    def __init__(self, where, f): self.where, self.f = where, f

    def __call__(self, event_name):
        "As any callback, but errors stay as they are"
        if hasattr(type(self), event_name): getattr(self, event_name)()

    def before_batch(self):
        predicts = hasattr(self.learn, 'gather_preds')
        if self.where == ('predictions' if predicts else 'validation') and not self.training: self.f()
        if self.where == 'forward' and self.training and self.learn.iter == 1: self.f()

    def after_pred(self):
        if self.where != 'backward' or not self.training or self.learn.iter != 1: return
        self.learn.pred.register_hook(lambda g: self.f())

    def after_epoch(self):
        if self.where == 'after_epoch': self.f()


class Kept(spread.Rows):
    "A dataset that can be exported"
    def new_empty(self): return Kept(self.x[:0], self.y[:0])


class Unreadable(Kept):
    "A dataset with items at which something happens"
    happen = staticmethod(an_error)
    def __getitem__(self, i):
        if i%8 == 7: self.happen()
        return super().__getitem__(i)


def happens(folder, where, what, engine='meeting', in_rank=1):
    "Train, validate, predict and export, while something happens in one process"
    global PIDS
    PIDS, learn, here = Path(folder)/'pids', spread.learner(8, spread.cross_entropy), rank() == in_rank
    if engine == 'parts': engine, learn = 'meeting', shard_learner(learn)
    def f():
        (Path(folder)/'began').write_text(repr(time.time()))
        WHAT[what]()
    for dl in learn.dls: dl.dataset.__class__ = Kept
    if here and where in ('loading', 'worker'):
        learn.dls.train.dataset.__class__, Unreadable.happen = Unreadable, staticmethod(f)
    if where == 'worker': learn.dls.loaders[0] = learn.dls.train.new(num_workers=1)
    if here: learn.add_cb(At(where, f))
    with across_processes(learn, timeout=60, engine=engine) as l, l.no_bar(), l.no_logging():
        ranks = join_processes()
        pids = ranks.everyone(os.getpid())
        if rank() == 0: PIDS.write_text(' '.join(map(str, pids)))
        l.fit(2)
        l.get_preds()
        if here and where == 'export': f()
        l.export(Path(folder).absolute()/'exported.pkl')


FAILURES = [(where, what) for where in ('loading', 'forward', 'backward', 'after_epoch', 'validation', 'predictions')
            for what in ('error', 'memory')] + [('worker', 'error'), ('worker', 'sigkill'), ('export', 'error'),
            ('loading', 'sigterm'), ('predictions', 'sigterm'), ('validation', 'sigint'), ('backward', 'sigint')]


def run_failures(folder, failures):
    "What each process says of each failure, and after how many seconds"
    said = {}
    for name in failures:
        began = time.monotonic()
        try:
            happens(folder, *name)
            text = 'nothing'
        except BaseException as e: text = f'{type(e).__name__}: {e}'
        said[name] = text, time.monotonic()-began
    return said


# --- launchers ------------------------------------------------------------------------------------------------------
def train(folder, engine='meeting', bs=8):
    "A short fit, of which each process notes in a file what it found"
    learn = spread.learner(bs, spread.cross_entropy)
    with across_processes(learn, engine=engine) as l:
        spread.quietly(l, lambda l: l.fit_one_cycle(2, .05))
        engine = l.across_processes.engine if hasattr(l, 'across_processes') else None
    noted = dict(numbers=spread.numbers_of(learn.model).tolist(), metrics=list(learn.recorder.values[-1]),
                 engine=engine, names=[*learn.model.state_dict()])
    (Path(folder)/f'{rank()}.json').write_text(json.dumps(noted))


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def in_a_notebook(run, *args):
    from accelerate import notebook_launcher
    notebook_launcher(run, args, num_processes=2, use_port=str(free_port()))


def main(folder, how='train', *args):
    "A script that a launcher starts"
    if how == 'accelerator':
        from accelerate import Accelerator
        assert Accelerator(cpu=True).num_processes == 2
    if how == 'notebook': in_a_notebook(train, folder)
    elif how == 'happens': happens(folder, *args)
    else: train(folder, *args)


def left(pids, limit=5):
    "Those of the processes that are still there after a moment: a signal is sent, not waited for"
    until = time.monotonic()+limit
    while (there := [o for o in pids if Path(f'/proc/{o}').exists()]) and time.monotonic() < until: time.sleep(.01)
    return there


def end(process, limit=40):
    "End a launcher and all that it has started"
    process.terminate()  # at which it ends them
    try: process.wait(limit)
    finally:
        with suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)


if __name__ == '__main__': main(*sys.argv[1:])
