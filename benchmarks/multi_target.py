"""What declared targets cost beside functions written by hand: two targets in a real step, forty or a hundred alike.

Labels and images are random numbers: only time is measured. By hand means what Road to the Top, part 4 does: a tuple
of blocks, a loss that adds up slices, and an error rate and a loss for each target among the metrics. Both sides must
give the same numbers first.
"""
from operator import itemgetter

import timm
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import fa_collate
from fastai.learner import AvgMetric, Learner
from fastai.optimizer import Adam
from fastai.torch_core import TensorCategory, TensorImage
from harness import Case, digits, keep_freed_memory, main
from sliced import ARCH, loss_by_hand, metrics_by_hand, same, seen
from torch import nn
from torch.nn import functional as F

from paddy_multi.kinds.category import CategoryTarget
from paddy_multi.targets.declare import Targets
from paddy_multi.targets.encoded import TensorTargets
from paddy_multi.targets.metrics import TotalLoss
from paddy_multi.train.learner import CheckTargets

COUNTS, WIDTH = (2, 40, 100), 10
PARTS = 'loss', 'metrics', 'collation'
TOGETHER = 'loss, metrics and collation'

# --- both sides -----------------------------------------------------------------------------------------------------
def declared(n):
    "A fitted table of `n` targets with `WIDTH` classes each"
    names = [f'target{i}' for i in range(n)]
    rows = [dict.fromkeys(names, k) for k in range(WIDTH)]
    return Targets({o: CategoryTarget(itemgetter(o)) for o in names}).fit(rows)

def all_by_hand(n):
    "An error rate and a loss for each target, as functions of all targets"
    def loss_of(i): return lambda preds, *targs: F.cross_entropy(preds[:,i*WIDTH:(i+1)*WIDTH], targs[i])
    return metrics_by_hand((WIDTH,)*n) + [AvgMetric(loss_of(i)) for i in range(n)]

def batch(n, bs, seed=0):
    "Output `[bs, n*WIDTH]`, and labels as a tuple of class numbers and as one row an item"
    rng = torch.Generator().manual_seed(seed)
    targs = torch.randint(WIDTH, (bs, n), generator=rng)
    preds = torch.randn(bs, n*WIDTH, generator=rng).requires_grad_()
    return preds, [o.contiguous() for o in targs.unbind(1)], targs.float()

# --- each part ------------------------------------------------------------------------------------------------------
def loss_runs(n, bs):
    preds, by_hand, rows = batch(n, bs)
    def run(loss, *targs):
        value = loss(preds, *targs)
        value.backward()
        grad, preds.grad = preds.grad, None
        return value, grad
    hand, ours = loss_by_hand((WIDTH,)*n), declared(n).loss()
    return lambda: run(hand, *by_hand), lambda: run(ours, rows)

def metric_runs(n, bs):
    preds, by_hand, rows = batch(n, bs)
    hand, ours = all_by_hand(n), declared(n).metrics()
    for o in (*hand, *ours): o.reset()
    # A fresh tensor for each batch, as from a model
    def run(metrics, learn):
        learn.pred = preds.detach()
        for o in metrics: o.accumulate(learn)
        return torch.tensor([float(o.value) for o in metrics]) if learn.values else None
    a, b = seen(preds, by_hand), seen(preds, [rows])
    b.y = rows
    a.values = b.values = True
    if not torch.allclose(run(hand, a), run(ours, b), rtol=1e-5): raise ValueError('metrics by hand and ours differ')
    a.values = b.values = False
    return lambda: run(hand, a), lambda: run(ours, b)

def collate_runs(n, bs, size):
    _, by_hand, rows = batch(n, bs)
    images = [TensorImage(torch.rand(3, size, size)) for _ in range(bs)]
    tuples = [(x, *(TensorCategory(y[i]) for y in by_hand)) for i, x in enumerate(images)]
    packed = [(x, TensorTargets(row)) for x, row in zip(images, rows)]
    return lambda: fa_collate(tuples), lambda: fa_collate(packed)

def sides(hand, ours): return {'by hand': hand, 'declared targets': ours}

def loss_variants(n, bs, size):
    hand, ours = loss_runs(n, bs)
    for a, b in zip(hand(), ours()):
        if torch.allclose(a, b, rtol=1e-5, atol=1e-8): continue
        raise ValueError('losses or gradients by hand and ours differ')
    return sides(hand, ours)

def metric_variants(n, bs, size): return sides(*metric_runs(n, bs))
def collate_variants(n, bs, size): return sides(*collate_runs(n, bs, size))

def all_variants(n, bs, size):
    runs = loss_runs(n, bs), metric_runs(n, bs), collate_runs(n, bs, size)
    def all_of(i):
        def run():
            for pair in runs: pair[i]()
        return run
    return sides(all_of(0), all_of(1))

# --- inside a learner, and inside a real step -------------------------------------------------------------------------
class Batches(list):
    "A loader that says which targets its batches have"
    targets = None

def loop_variants(n, bs, size):
    "An epoch of four batches to train on and one to validate on, with a model that does next to nothing"
    _, by_hand, rows = batch(n, bs)
    x, table = torch.randn(bs, 4), declared(n)
    def learner(targs, **kwargs):
        b = (x, *targs)
        loaders = Batches([b]*4), Batches([b])
        for o in loaders: o.targets = table
        learn = Learner(DataLoaders(*loaders), nn.Linear(4, n*WIDTH), opt_func=Adam, lr=1e-6, **kwargs)
        learn.dls.n_inp = 1
        return learn
    hand = learner(by_hand, loss_func=loss_by_hand((WIDTH,)*n), metrics=all_by_hand(n))
    ours = learner([TensorTargets(rows)], loss_func=table.loss(), metrics=table.metrics(), cbs=CheckTargets())
    ours.recorder.loss = TotalLoss(ours.loss_func)
    def fit(learn):
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return sides(lambda: fit(hand), lambda: fit(ours))

def step(n, bs, size, loss, targs):
    "A training step of a real model as a function"
    model, x = timm.create_model(ARCH, num_classes=n*WIDTH), torch.randn(bs, 3, size, size)
    opt = Adam(model.parameters(), lr=1e-6)
    def run():
        loss(model(x), *targs).backward()
        opt.step()
        opt.zero_grad()
    return run

def step_by_hand(n, bs, size): return step(n, bs, size, loss_by_hand((WIDTH,)*n), batch(n, bs)[1])
def our_step(n, bs, size): return step(n, bs, size, declared(n).loss(), [batch(n, bs)[2]])

def step_variants(n, bs, size): return sides(step_by_hand(n, bs, size), our_step(n, bs, size))
def width_variants(n, bs, size): return {'2 targets': our_step(2, bs, size), f'{n} targets': our_step(n, bs, size)}

def cases(quick):
    bs, size, counts = (4, 32, (2, 5)) if quick else (64, 64, COUNTS)
    def case(name, make, n, **kw): return Case(name, lambda: make(n, bs, size), dict(targets=n, bs=bs), **kw)
    parts = {**dict(zip(PARTS, (loss_variants, metric_variants, collate_variants))), TOGETHER: all_variants}
    return [*(case(name, make, n) for name, make in parts.items() for n in counts),
            case('epoch of a linear model', loop_variants, 2),
            case('training step', step_variants, 2, rounds=24),
            case('training step, ours', width_variants, counts[-1], rounds=24)]

# --- what follows ---------------------------------------------------------------------------------------------------
def findings(result):
    "The share of a step that two targets cost, and how much faster many are"
    counts = sorted({o['params']['targets'] for o in result['cases']})
    cases = {(o['name'], o['params']['targets']): o['variants'] for o in result['cases']}
    whole = cases['training step', 2][0]['seconds']['median']
    def share(name, which, batches):
        added = cases[name, 2][which]['added']
        return {k: digits(100*added[k]/whole/batches, 3) for k in ('median', 'low', 'high')}
    def costs(what, name, batches=1):
        return dict(name=f'2 targets, {what}: time added, % of a step', where=f'{ARCH}, 64 px, batches of 64, CPU',
                    **share(name, 2, batches), control=share(name, 1, batches))
    def faster(n, which):
        hand = [cases[part, n][0]['seconds'] for part in PARTS]
        ours = [cases[part, n][which]['seconds'] for part in PARTS]
        def ratio(above, below): return digits(sum(o[above] for o in hand)/sum(o[below] for o in ours), 3)
        return dict(median=ratio('median', 'median'), low=ratio('low', 'high'), high=ratio('high', 'low'))
    def saves(n):
        return dict(name=f'{n} targets, {TOGETHER}, each alone: times faster',
                    where=f'{WIDTH} classes each, batches of 64, CPU', **faster(n, 2), control=faster(n, 1))
    return [costs(TOGETHER, TOGETHER), costs('everything in the loop, a batch of five', 'epoch of a linear model', 5),
            *(saves(n) for n in counts[1:])]

if __name__ == '__main__':
    keep_freed_memory()
    main('multi_target', 'Declared targets',
         'What do declared targets cost, and what do they save when there are many?',
         cases, findings=findings, clock='processor')
