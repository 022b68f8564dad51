"""What `combined_loss` and `sliced_metrics` cost beside functions written by hand: alone, and as a share of a step.

Labels and images are random numbers: only time is measured. Before timing, both sides must give the same numbers on
the same tensors: plain ones, which is what fastai's learner hands to a loss and a metric.
"""
from functools import reduce
from itertools import pairwise, accumulate
from operator import add
from types import SimpleNamespace

import timm
import torch
import torch.nn.functional as F
from fastai.learner import AvgMetric
from fastai.metrics import error_rate
from fastai.optimizer import Adam
from fastai.torch_core import to_detach
from harness import Case, digits, main

from paddy_multi.targets.sliced_metrics import sliced_metrics
from paddy_multi.targets.slices import combined_loss

WIDTHS = (10, 3), (10, 10), (10,)*10, (10,)*40
ARCH = 'convnext_atto'

# --- both sides -----------------------------------------------------------------------------------------------------
def loss_by_hand(widths):
    "Cross-entropy of each slice, added up"
    bounds = list(pairwise(accumulate(widths, initial=0)))
    return lambda preds, *targs: reduce(add, [F.cross_entropy(preds[:,a:b], t) for (a, b), t in zip(bounds, targs)])

def metrics_by_hand(widths):
    "One function per target that takes all targets and looks at its own"
    def error_of(i, a, b): return lambda preds, *targs: error_rate(preds[:,a:b], targs[i])
    return [AvgMetric(error_of(i, a, b)) for i, (a, b) in enumerate(pairwise(accumulate(widths, initial=0)))]

def our_loss(widths): return combined_loss({f'target {i}': (F.cross_entropy, w) for i, w in enumerate(widths)})
def our_metrics(widths): return sliced_metrics(error_rate, {f'target {i}': w for i, w in enumerate(widths)})

def batch(widths, bs):
    "Random output and labels"
    return torch.randn(bs, sum(widths), requires_grad=True), [torch.randint(w, (bs,)) for w in widths]

def same(a, b, what):
    if not torch.equal(a, b): raise ValueError(f'{what} differ: {a} by hand, {b} ours')

# --- each part alone ------------------------------------------------------------------------------------------------
def loss_variants(widths, bs):
    preds, targs = batch(widths, bs)
    def run(loss):
        value = loss(preds, *targs)
        value.backward()
        grad, preds.grad = preds.grad, None
        return value, grad
    hand, ours = loss_by_hand(widths), our_loss(widths)
    for a, b, what in zip(run(hand), run(ours), ('losses', 'gradients')): same(a, b, what)
    return {'by hand': lambda: run(hand), 'combined_loss': lambda: run(ours)}

def seen(preds, targs):
    "What a metric asks of a learner"
    return SimpleNamespace(pred=preds.detach(), yb=tuple(targs), y=tuple(targs), to_detach=to_detach)

def metric_variants(widths, bs):
    learn = seen(*batch(widths, bs))
    def run(metrics):
        for o in metrics: o.accumulate(learn)
    hand, ours = metrics_by_hand(widths), our_metrics(widths)
    for metrics in (hand, ours):
        for o in metrics: o.reset()
        run(metrics)
    same(torch.stack([o.value for o in hand]), torch.stack([o.value for o in ours]), 'metrics')
    return {'by hand': lambda: run(hand), 'sliced_metrics': lambda: run(ours)}

# --- inside a real step ---------------------------------------------------------------------------------------------
def model_and_images(widths, bs, size):
    return timm.create_model(ARCH, num_classes=sum(widths)), torch.randn(bs, 3, size, size)

def training_variants(widths, bs, size):
    model, images = model_and_images(widths, bs, size)
    targs, opt = batch(widths, bs)[1], Adam(model.parameters(), lr=1e-6)
    def run(loss):
        loss(model(images), *targs).backward()
        opt.step()
        opt.zero_grad()
    hand, ours = loss_by_hand(widths), our_loss(widths)
    return {'by hand': lambda: run(hand), 'ours': lambda: run(ours)}

def validation_variants(widths, bs, size):
    model, images = model_and_images(widths, bs, size)
    targs = batch(widths, bs)[1]
    def run(loss, metrics):
        with torch.no_grad(): preds = model(images)
        loss(preds, *targs)
        learn = seen(preds, targs)
        for o in metrics: o.accumulate(learn)
    sides = {'by hand': (loss_by_hand(widths), metrics_by_hand(widths)),
             'ours': (our_loss(widths), our_metrics(widths))}
    model.eval()
    for _, metrics in sides.values():
        for o in metrics: o.reset()
    return {name: lambda side=side: run(*side) for name, side in sides.items()}

def cases(quick):
    bs, size = (4, 32) if quick else (64, 64)
    def case(name, make, widths, *args, **kw):
        return Case(name, lambda: make(widths, bs, *args), dict(targets=len(widths), outputs=sum(widths), bs=bs), **kw)
    losses = [case('loss', loss_variants, w) for w in WIDTHS]
    metrics = [case('metrics', metric_variants, w) for w in WIDTHS]
    return [*losses, *metrics, case('training step', training_variants, WIDTHS[0], size, rounds=24),
            case('validation batch', validation_variants, WIDTHS[0], size, rounds=24)]

def findings(result):
    "Time added by a part, measured alone, over the time of the whole step written by hand"
    narrow = {o['name']: o['variants'] for o in result['cases'] if o['params']['outputs'] == sum(WIDTHS[0])}
    def share(part, step, which):
        whole, added = narrow[step][0]['seconds']['median'], narrow[part][which]['added']
        return {k: digits(100*added[k]/whole, 3) for k in ('median', 'low', 'high')}
    def finding(part, step):
        return dict(name=f'{part}: time added, % of a {step}', where=f'{ARCH}, 64 px, batches of 64, CPU',
                    **share(part, step, 2), control=share(part, step, 1))
    return [finding('loss', 'training step'), finding('metrics', 'validation batch')]

if __name__ == '__main__':
    main('sliced', 'Loss and metrics by slice',
         'How much time do combined_loss and sliced_metrics add to functions written by hand?',
         cases, findings=findings, clock='processor')  # one thread that never waits
