"""The same updates on GPUs, a process for each, NCCL between them and gloo for what is on the CPU; and AMP's scaler.

A single GPU has a group of one process: NCCL sends, and every exchange and its place in training are the same.
"""
import os
import time
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from fastai.basics import Adam, Callback
from fastai.callback.fp16 import MixedPrecision
from torch import nn

import spread
from paddy_multi.accumulate.microbatch import MicroBatch
from paddy_multi.core.checks import test_close as close
from paddy_multi.core.tensors import replaced
from paddy_multi.distributed.across import across_processes
from paddy_multi.distributed.callback import AcrossProcesses
from paddy_multi.distributed.launch import in_processes
from paddy_multi.distributed.ranks import Ranks

pytestmark = pytest.mark.gpu


# --- a group --------------------------------------------------------------------------------------------------------
def device(): return torch.device('cuda', int(os.environ['LOCAL_RANK'])) if torch.cuda.is_available() else 'cpu'


def join():
    "The group as `across_processes` makes it, also of one process"
    if dist.is_initialized(): return
    if torch.cuda.is_available(): torch.cuda.set_device(device())
    dist.init_process_group('cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo')


@contextmanager
def block(learn):
    "`across_processes`, with its callback in a group of one process too"
    if dist.get_world_size() > 1:
        with across_processes(learn, timeout=60): yield learn
        return
    ranks = Ranks(60)
    with ranks.together():
        learn.add_cb(AcrossProcesses(ranks))
        yield learn


def there(learn):
    "`learn` on the GPU of this process"
    learn.dls.to(device())
    learn.model.to(device())
    if hasattr(learn.loss_func, 'to'): learn.loss_func.to(device())
    return learn


def in_group(run, **kwargs):
    "What each process gives, as many as there are GPUs"
    n = max(1, torch.cuda.device_count())
    return [o.result for o in in_processes(run, n, 300, **kwargs)]


# --- the same updates -----------------------------------------------------------------------------------------------
# Others of `spread.CASES` have tensors of their own on the CPU
NAMES = ('plain by_gathering one_item_last one_item_gathered whole_batches missing missing_gathered adam_weights_clip '
         'unknown_loss unused_parts summed dense dense_weights declared learned_weights').split()


def run_cases(names):
    join()
    make, table = spread.learner, spread.table_learner
    ranks = SimpleNamespace(rank=dist.get_rank(), world_size=dist.get_world_size())
    larger = 1 + (ranks.world_size == 1)  # else a batch may have no label, and no loss
    with (replaced(spread, 'across_processes', block), replaced(spread, 'join_processes', lambda *args: ranks),
          replaced(spread, 'learner', lambda bs, *args, **kwargs: there(make(larger*bs, *args, **kwargs))),
          replaced(spread, 'table_learner', lambda bs, *args: there(table(larger*bs, *args)))):
        return {name: spread.run_table(spread.TABLES[name]) if name in spread.TABLES else
                spread.run_case(**spread.CASES[name]) for name in names}


@pytest.fixture(scope='module')
def trained(): return in_group(run_cases, names=NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_updates_are_those_of_one_process(trained, name):
    found = [o[name] for o in trained]
    assert len({o['numbers'] for o in found}) == 1
    first = found[0]
    assert first['updates'] >= 4 and first['moved'] > .1 and first['nan'] and first['schedule'] == 0.
    assert first['weights'] < 1e-10 and first['losses'] < 1e-10
    assert first['metrics'] < 1e-6  # some are computed in float32
    assert first['calls']['gradients'] == first['updates']  # by NCCL


def run_micro():
    join()
    with replaced(spread, 'across_processes', block):
        n = dist.get_world_size()
        ours, one = (there(spread.learner(bs, spread.cross_entropy, cbs=[MicroBatch(3)])) for bs in (8, 8*n))
        return spread.compare(ours, one, lambda l: l.fit_one_cycle(4, .05))


def test_chunks_too():
    for o in in_group(run_micro): assert o['weights'] < 1e-10 and o['calls']['gradients'] == o['updates']


# --- predictions ----------------------------------------------------------------------------------------------------
def predict():
    join()
    learn = there(spread.learner(8, spread.cross_entropy))
    with spread.alone(), learn.no_bar(): one = learn.get_preds()[0], torch.tensor(learn.validate())
    with block(learn), learn.no_bar(): return one, (learn.get_preds()[0], torch.tensor(learn.validate()))


def test_every_process_predicts_what_one_does():
    for one, ours in in_group(predict):
        for o in zip(one, ours): close(*o, eps=1e-6)


# --- half precision and its scaler ----------------------------------------------------------------------------------
class OneOverflows(Callback):
    "A gradient of the last process is infinite in the third update"
    order = MixedPrecision.order-5  # before the gradients are averaged
    def before_step(self):
        if self.learn.train_iter == 2 and dist.get_rank() == dist.get_world_size()-1:
            next(self.model.parameters()).grad.fill_(float('inf'))


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 5))


def run_scaled(overflow, chunk=None):
    "In float16: weights, scales, and how far one process ends from them"
    join()
    def learner(bs):
        x, y = spread.data(81)
        learn = spread.learner(bs, spread.cross_entropy, model=mlp, opt=partial(Adam, wd=.01))
        for dl in learn.dls.loaders: dl.dataset.x = dl.dataset.x.float()
        return there(learn).to_fp16()
    more = [OneOverflows()]*overflow + ([MicroBatch(chunk)] if chunk else [])
    ours, one = learner(8), learner(8*dist.get_world_size())
    start = spread.numbers_of(one.model)
    with spread.alone(): spread.quietly(one, lambda l: l.fit(3, .01, cbs=[MicroBatch(chunk)] if chunk else []))
    with block(ours) as learn: spread.quietly(learn, lambda l: l.fit(3, .01, cbs=more))
    a, b = spread.numbers_of(ours.model), spread.numbers_of(one.model)
    return dict(numbers=a.sum().item(), scales=ours.mixed_precision.scales, one=one.mixed_precision.scales,
                off=float((a-b).norm()/(b-start).norm()), updates=len(ours.recorder.losses))


@pytest.mark.parametrize('chunk', [None, 3])
def test_half_precision_ends_where_one_process_does(chunk):
    found = in_group(run_scaled, overflow=False, chunk=chunk)
    assert len({o['numbers'] for o in found}) == 1
    for o in found: assert o['off'] < .05 and o['scales'] == o['one'] and len(o['scales']) == o['updates']


def test_an_overflow_in_one_process_skips_the_update_in_all():
    found = in_group(run_scaled, overflow=True)
    assert len({o['numbers'] for o in found}) == 1 and len({tuple(o['scales']) for o in found}) == 1
    for o in found:
        assert len(o['scales']) == o['updates']-1 and o['scales'][-1] < o['one'][-1]
        assert o['numbers'] == o['numbers']  # no weight is NaN


# --- failures -------------------------------------------------------------------------------------------------------
class Breaks(Callback):
    def before_batch(self):
        if dist.get_rank() == dist.get_world_size()-1 and self.iter == 2: raise OSError('cannot read the labels')


def fails():
    join()
    learn, began = there(spread.learner(8, spread.cross_entropy, cbs=[Breaks()])), time.monotonic()
    try:
        with block(learn): spread.quietly(learn, lambda l: l.fit(2))
    except Exception as e: return f'{type(e).__name__}: {e}', time.monotonic()-began


def test_what_fails_in_one_process_ends_all():
    *others, (last, _) = found = in_group(fails)
    assert 'cannot read the labels' in last and all(seconds < 15 for _, seconds in found)
    for said, _ in others: assert said.startswith('ProcessFailed: process') and 'cannot read the labels' in said
