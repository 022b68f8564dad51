"Learners that are trained in several processes and in one, in float64, and how far apart they end"
import os
import random
from contextlib import contextmanager
from functools import partial

import fastai.callback.schedule  # fit_one_cycle and lr_find
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from fastai.basics import Adam, Callback, DataLoaders, Learner, SGD, TfmdDL
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.all import DataBlock, IndexSplitter, TransformBlock
from fastai.metrics import (AvgMetric, DiceMulti, F1Score, JaccardCoeffMulti, Perplexity, accuracy, foreground_acc,
                            top_k_accuracy)
from torch import nn

from paddy_multi.distributed.across import across_processes
from paddy_multi.distributed.ranks import join_processes
from paddy_multi.kinds.category import CategoryTarget
from paddy_multi.kinds.ordinal import OrdinalTarget
from paddy_multi.kinds.regression import RegressionTarget
from paddy_multi.targets.declare import Targets
from paddy_multi.train.learner import multi_target_learner


class Rows:
    "Items that a loader reads from memory"
    def __init__(self, x, y): self.x, self.y, self.items = x, y, [*range(len(x))]
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i], self.y[i]


def data(n, seed=0):
    "Synthetic items of five classes, which a linear model would tell apart but for noise"
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(n, 20, generator=g, dtype=torch.float64), torch.randn(20, 5, generator=g, dtype=torch.float64)
    return x, (x@w + torch.randn(n, 5, generator=g, dtype=torch.float64)).argmax(1)


def pictures(side):
    "A function that makes synthetic pictures of `side` by `side` pixels, each of one of 21 classes"
    def make(n, seed=0):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(n, 3, side, side, generator=g, dtype=torch.float64)
        w = torch.randn(21, 3, generator=g, dtype=torch.float64)
        return x, torch.einsum('nchw,kc->nkhw', x, w).argmax(1)
    return make


def ignored(y):
    "Pixels without most of those of the first third of the pictures, and without all of some pictures"
    g, y = torch.Generator().manual_seed(2), y.clone()
    third = len(y)//3
    y[:third][torch.rand(y[:third].shape, generator=g) < .9] = -100
    y[::7] = -100
    return y


def missing(y):
    "Labels without most of the first third, and half of the rest"
    g, y = torch.Generator().manual_seed(2), y.clone()
    y[torch.rand(len(y), generator=g) < .5] = -100
    third = len(y)//3
    y[:third] = torch.where(torch.rand(third, generator=g) < .8, -100, y[:third])
    return y


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Sequential(nn.Linear(20, 32), nn.Tanh()), nn.Sequential(nn.Linear(32, 5))).double()


def pixels():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 21, 1)).double()


def numbers_of(model): return torch.cat([p.detach().flatten() for p in model.parameters()])


def seed(s):
    random.seed(s)
    np.random.seed(s)
    torch.manual_seed(s)


@contextmanager
def alone():
    "fastai finds one process"
    kept = {k: os.environ.pop(k) for k in ('WORLD_SIZE', 'RANK') if k in os.environ}
    try: yield
    finally: os.environ.update(kept)


class SeenLosses(Callback):
    "The losses of all batches; the recorder takes those of training in float32"
    order, reads_outputs = 49, False
    def before_fit(self): self.seen = []
    def after_batch(self):
        self.learn.loss = self.learn.loss.detach()
        if not self.training: return
        self.seen.append(float(self.learn.loss))
        self.learn.loss = self.learn.loss.float()


def learner(bs, loss, n=81, y=None, model=mlp, cbs=(), opt=partial(SGD, mom=.9), metrics=(), drop_last=False, path='.',
            items=data, n_valid=37):
    seed(3)
    (x, labels), (xv, yv) = items(n), items(n_valid, seed=5)
    if y: labels, yv = y(labels), y(yv)
    dls = DataLoaders(TfmdDL(Rows(x, labels), bs=bs, num_workers=0, shuffle=True, drop_last=drop_last),
                      TfmdDL(Rows(xv, yv), bs=bs, num_workers=0), device='cpu')
    dls.n_inp, dls.train.rng = 1, random.Random(1)
    return Learner(dls, model(), loss_func=loss(), opt_func=opt, lr=.05, metrics=list(metrics), path=path,
                   cbs=[SeenLosses(), *cbs])


def quietly(learn, f):
    with learn.no_bar(), learn.no_logging(): return f(learn)


def compare(ours, one, fit):
    "How far apart weights, losses and metrics of two learners are, one of them trained in all processes"
    start = numbers_of(one.model)
    with alone(): quietly(one, fit)
    with across_processes(ours) as learn:
        ranks = learn.across_processes.ranks
        before = ranks.calls.copy(), ranks.bytes.copy()
        quietly(learn, fit)
        calls, sent = (now-b for now, b in zip((ranks.calls, ranks.bytes), before))
    a, b = numbers_of(ours.model), numbers_of(one.model)
    rows = [(float(u), float(v)) for p, q in zip(ours.recorder.values, one.recorder.values) for u, v in zip(p, q)]
    assert len(ours.recorder.values) == len(one.recorder.values)
    assert len(ours.seen_losses.seen) == len(one.seen_losses.seen)
    return dict(weights=float((a-b).norm()/(b-start).norm()), moved=float((b-start).norm()),
                losses=max(abs(u-v) for u, v in zip(ours.seen_losses.seen, one.seen_losses.seen)),
                metrics=max(abs(u-v) for u, v in rows if v == v), nan=all((u == u) == (v == v) for u, v in rows),
                schedule=max(map(abs, np.subtract(ours.recorder.lrs, one.recorder.lrs))),
                updates=len(ours.seen_losses.seen), calls=calls, bytes=sent, numbers=a.sum().item())


class DrawnMixUp(MixUp):
    "MixUp of each process's own rows, with draws that one process can repeat; `cut` has one proportion as CutMix"
    reads_outputs = False
    def __init__(self, ranks, cut=False):
        super().__init__(.4)
        self.drawn, self.cut = {r: torch.Generator().manual_seed(100+r) for r in ranks}, cut

    def before_batch(self):
        n, k = len(self.y), len(self.drawn)
        lams, orders, at = [], [], 0
        for r, g in enumerate(self.drawn.values()):
            m = n//k + (r < n%k)
            lam = torch.rand(1 if self.cut else max(m, 1), generator=g, dtype=torch.float64)
            lams.append(lam.expand(m) if self.cut else lam[:m])
            orders.append(torch.randperm(m, generator=g)+at)
            at += m
        self.lam, order = torch.cat(lams), torch.cat(orders)
        self.yb1, self.learn.xb = (self.y[order],), (torch.lerp(self.x[order], self.x, self.lam[:, None]),)
        if self.cut and k == 1: self.lam = self.lam[:1].view(())
        if not self.stack_y: self.learn.yb = (torch.lerp(self.yb1[0], self.y, self.lam[:, None]),)


class MixedCrossEntropy(nn.CrossEntropyLoss): y_int = True


def one_hot(y): return F.one_hot(y, 5).double()


def pairs(preds, targs):
    "A loss of all pairs of the batch"
    return F.cross_entropy(preds, targs) + F.cross_entropy(preds@preds.T/5, torch.arange(len(preds)))


class PartlyUsed(nn.Sequential):
    "Has a part that no item uses, and a frozen one"
    def forward(self, x): return self[1](self[0](x))


def partly_used():
    model = PartlyUsed(*mlp(), nn.Linear(3, 3).double())
    model[0][0].weight.requires_grad_(False)
    return model


class Sometimes(nn.Sequential):
    "Has a part that only some batches use"
    def forward(self, x):
        h = self[0](x)
        return self[1](h) + (self[2](h) if (x[:, 0] > 2.2).any() else 0.)


def cross_entropy(): return F.cross_entropy


weights = torch.tensor([.1, 5, 1, 2, .5]).double()
macro_f1 = lambda: [accuracy, F1Score(average='macro')]
of_pixels = lambda: [partial(accuracy, axis=1), DiceMulti(), JaccardCoeffMulti()]
# 49 in validation leave one for the last batch, of 2 processes and of 3
dense = dict(items=pictures(8), model=pixels, y=ignored, n=41, n_valid=49, metrics=of_pixels)

# What each case changes; `mixed` is DrawnMixUp
CASES = dict(
    plain=dict(n=81), by_gathering=dict(n=83, metrics=macro_f1),
    one_item_last=dict(n=33), one_item_gathered=dict(n=33, metrics=macro_f1, loss=lambda: pairs),
    whole_batches=dict(n=81, drop_last=True),
    missing=dict(y=missing), missing_gathered=dict(y=missing, metrics=macro_f1),
    summed=dict(y=missing, n_valid=49, metrics=lambda: [accuracy, partial(top_k_accuracy, k=2)]),
    dense=dense, dense_larger={**dense, 'items': pictures(16)},
    dense_weights={**dense, 'opt': Adam, 'loss': lambda: nn.CrossEntropyLoss(
        weight=torch.linspace(.1, 3, 21).double(), label_smoothing=.1)},
    dense_gathered={**dense, 'metrics': lambda: [partial(foreground_acc, bkg_idx=-100)]},
    adam_weights_clip=dict(y=missing, loss=lambda: nn.CrossEntropyLoss(weight=weights, label_smoothing=.1), opt=Adam,
                           cbs=lambda: [GradientClip(.1)]),
    unknown_loss=dict(loss=lambda: F.mse_loss, y=one_hot), pairs=dict(loss=lambda: pairs),
    mixup=dict(loss=MixedCrossEntropy, mixed=dict()), cutmix=dict(loss=MixedCrossEntropy, mixed=dict(cut=True)),
    mixup_gathered=dict(loss=MixedCrossEntropy, mixed=dict(), train_metrics=True, metrics=lambda: [accuracy]),
    mixup_numbers=dict(loss=lambda: F.mse_loss, y=one_hot, mixed=dict()),
    unused_parts=dict(model=partly_used, opt=partial(Adam, wd=.1)), accumulated=dict(n=96, accumulate=2),
    clips_early=dict(cbs=lambda: [ClipsEarly()]),
    one_validated=dict(n_valid=1, metrics=lambda: [accuracy, Perplexity(), AvgMetric(accuracy)]))


class ClipsEarly(Callback):
    "Changes gradients before the callbacks that fastai has for it"
    order, reads_outputs = 0, False
    def before_step(self): nn.utils.clip_grad_norm_(self.model.parameters(), .1)


def run_case(n=81, loss=cross_entropy, mixed=None, metrics=lambda: [], cbs=lambda: [], accumulate=0,
             train_metrics=False, **changed):
    "Train one case in all processes and in one, for 20 updates or some more"
    ranks, made = join_processes(60), []
    for bs, drawn in ((8, [ranks.rank]), (8*ranks.world_size, range(ranks.world_size))):
        more = [DrawnMixUp(drawn, **mixed)] if mixed is not None else []
        if accumulate: more.append(GradientAccumulation(8*ranks.world_size*accumulate))
        made.append(learner(bs, loss, n, cbs=[*cbs(), *more], metrics=metrics(), **changed))
        made[-1].recorder.train_metrics = train_metrics
    updates = n//(8*ranks.world_size*max(1, accumulate))
    return compare(*made, lambda l: l.fit_one_cycle(-(-20//updates), .05))


# --- declared targets -----------------------------------------------------------------------------------------------
def table_learner(bs, weighting):
    "Targets of a synthetic table, whose labels are missing unevenly; the last batch of validation has one item"
    seed(3)
    g, n = np.random.default_rng(0), 60+49
    df = pd.DataFrame(dict(a=g.choice([*'xyz'], n), b=g.normal(size=n), c=g.integers(0, 5, n)))
    df['more'], df['off'] = g.choice([*'xyz'], n), g.normal(size=n)
    df.loc[g.random(n) < .5, 'a'], df.loc[g.random(n) < .3, 'b'] = None, np.nan
    df.loc[:50, 'a'], df.loc[20:26, 'b'] = None, np.nan
    targets = Targets(a=CategoryTarget(lambda r: r['a']), b=RegressionTarget(lambda r: r['b']),
                      c=OrdinalTarget(lambda r: r['c'], vocab=[*range(5)]), more=CategoryTarget(lambda r: r['more']),
                      off=RegressionTarget(lambda r: r['off'], loss=nn.L1Loss()))
    inputs = torch.randn(n, 20, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    block = DataBlock(blocks=(TransformBlock(item_tfms=[]), targets.block), get_x=lambda r: inputs[int(r.name)],
                      get_y=targets.get_y, splitter=IndexSplitter(range(60, n)))
    dls = block.dataloaders(df, bs=bs, num_workers=0, device='cpu', drop_last=False)
    body, head = mlp()[0], nn.Linear(32, dls.targets.n_out)
    learn = multi_target_learner(dls, body, head=head, weighting=weighting, opt_func=Adam, cbs=SeenLosses())
    learn.model.double()
    dls.train.rng = random.Random(1)
    return learn


def run_table(weighting):
    n = join_processes(60).world_size
    epochs = -(-20//-(-60//(8*n)))  # 20 updates or some more, of 60 items
    return compare(table_learner(8, weighting), table_learner(8*n, weighting), lambda l: l.fit_one_cycle(epochs, .05))


def run_sometimes():
    "A part of the model that only one process may have used, with BatchNorm: no process drifts"
    def model():
        torch.manual_seed(2)
        return Sometimes(*mlp(), nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 5)).double())
    learn = learner(8, cross_entropy, model=model, opt=partial(Adam, wd=.1), drop_last=True)
    with across_processes(learn) as l: quietly(l, lambda l: l.fit(4))
    numbers = numbers_of(learn.model)
    return dict(numbers=numbers.sum().item(), moved=float((numbers-numbers_of(model())).norm()),
                buffers=[b.double().sum().item() for b in learn.model.buffers()])


TABLES = dict(declared='fixed', learned_weights='uncertainty')


def run_cases(names):
    "What `compare` finds, by name of the case"
    found = {name: run_table(TABLES[name]) if name in TABLES else run_case(**CASES[name]) for name in names}
    return {**found, 'sometimes': run_sometimes(), 'begun': run_begun()}


# --- what differs between processes at the start --------------------------------------------------------------------
class OwnWeights(nn.Module):
    "A loss with a weight of each class that is trained, and that each process draws for itself"
    def __init__(self):
        super().__init__()
        torch.manual_seed(join_processes().rank)
        self.w = nn.Parameter(torch.randn(5).double())
    def forward(self, pred, targ): return F.cross_entropy(pred*self.w.exp(), targ)


def dropping(): return nn.Sequential(*mlp(), nn.Dropout(.5))


def drawn_in_blocks():
    "A number that follows three fits with dropout, each in a block of its own; and one after a block in another"
    learn, other, drawn = (*(learner(8, cross_entropy, model=dropping) for _ in range(2)), [])
    for _ in range(3):
        with across_processes(learn) as l:
            quietly(l, lambda l: l.fit(1))
            drawn.append(torch.rand(1).item())
    with across_processes(learn):
        with across_processes(other): pass
        drawn.append(torch.rand(1).item())
    return drawn


def trained_alone_before(epochs=1, lr=.05):
    "What is left of a fit of each process by itself, in an order of its own, after one together; or what it says"
    learn = learner(8, cross_entropy, opt=Adam)
    learn.dls.train.rng, learn.lr = random.Random(join_processes().rank), lr
    with alone(): quietly(learn, lambda l: l.fit(epochs))
    try:
        with across_processes(learn) as l: quietly(l, lambda l: l.fit(1))
    except ValueError as e: return str(e)
    return numbers_of(learn.model).sum().item()


def run_begun():
    rank = join_processes().rank
    learn = learner(8, OwnWeights)
    learn.splitter = lambda model: [[*model.parameters(), learn.loss_func.w]]
    with across_processes(learn) as l: quietly(l, lambda l: l.fit(2))
    return dict(drawn=drawn_in_blocks(), alone=trained_alone_before(), loss=learn.loss_func.w.tolist(),
                lr=trained_alone_before(lr=.01*(rank+1)), epochs=trained_alone_before(epochs=rank+1))
