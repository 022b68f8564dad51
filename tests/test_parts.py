"The parts of a loss over the rows of several processes add up to the loss of the whole batch, whatever the rows are"
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.mixup import MixUp
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from paddy_multi.core.checks import test_close as close
from paddy_multi.distributed.launch import in_processes
from paddy_multi.distributed.parts import part_of_loss, part_over
from paddy_multi.distributed.ranks import join_processes
from paddy_multi.kinds.category import CategoryTarget
from paddy_multi.kinds.count import CountTarget
from paddy_multi.kinds.multicategory import MultiCategoryTarget
from paddy_multi.kinds.ordinal import OrdinalTarget
from paddy_multi.kinds.regression import RegressionTarget
from paddy_multi.targets.declare import Targets
from paddy_multi.targets.loss import learn_weights
from paddy_multi.targets.metrics import TotalLoss
from paddy_multi.targets.slices import combined_loss

WEIGHT = torch.tensor([1., 2., 5., .5], dtype=torch.float64)


# --- losses and their batches -----------------------------------------------------------------------------------------
def with_gaps(y, rng, share, gap=-100): return y.where(torch.rand(y.shape, generator=rng) >= share, gap)


def of_labels(loss, *side, gap=-100):
    def batch(n, rng, gaps):
        y = torch.randint(4, (n, *side), generator=rng)
        return loss, torch.randn(n, 4, *side, generator=rng, dtype=torch.float64), (with_gaps(y, rng, gaps, gap),)
    return batch


def of_probabilities(n, rng, gaps):
    y = torch.randn(n, 4, generator=rng, dtype=torch.float64).softmax(1)
    return nn.CrossEntropyLoss(WEIGHT), torch.randn(n, 4, generator=rng, dtype=torch.float64), (y,)


def of_numbers(n, rng, gaps):
    x, y = torch.randn(2, n, 4, generator=rng, dtype=torch.float64)
    return F.mse_loss, x, (y,)


def of_two_targets(n, rng, gaps):
    loss = combined_loss(kind=(nn.CrossEntropyLoss(WEIGHT, label_smoothing=.1), 4), ignored=None,
                         age=(F.mse_loss, 1, .5), more=(nn.CrossEntropyLoss(reduction='sum'), 4))
    kind, more = with_gaps(torch.randint(4, (2, n), generator=rng), rng, gaps)
    age = torch.randn(n, generator=rng, dtype=torch.float64)
    return loss, torch.randn(n, 9, generator=rng, dtype=torch.float64), (kind, kind, age, more)


def of_table(learned):
    items = [dict(a='xyz'[i%3], b=float(i), c=i%4) for i in range(12)]
    table = Targets(a=CategoryTarget(loss=nn.CrossEntropyLoss(WEIGHT[1:].float())), b=RegressionTarget(weight=.5),
                    c=OrdinalTarget(vocab=[*range(4)])).fit(items)
    table['a'].loss.double()
    encoded = torch.stack([table.encode(o) for o in items]).double()
    def batch(n, rng, gaps):
        rows = encoded[torch.arange(n)%12]
        missing = torch.rand(n, 3, generator=rng) < gaps
        for i, t in enumerate(table): rows[:, t.cols] = rows[:, t.cols].where(~missing[:, i:i+1], float('nan'))
        loss = table.loss()
        if learned:
            learn_weights(model := nn.Linear(1, 1), loss)
            model.double().log_vars.data.copy_(torch.tensor([.3, -.2, .5]))
        return loss, torch.randn(n, table.n_out, generator=rng, dtype=torch.float64), (rows,)
    return batch


class ByOutput:
    "A mean over labels, which an output is needed to count, and a penalty"
    reduction = 'mean'
    def parts(self, preds, targs):
        return F.cross_entropy(preds, targs, reduction='sum'), (targs != -100).sum()
    def penalty(self): return torch.tensor(.25, dtype=torch.float64)
    def __call__(self, preds, targs): return F.cross_entropy(preds, targs).nan_to_num() + .25


smoothed = nn.CrossEntropyLoss(WEIGHT, label_smoothing=.2)
BATCHES = dict(labels=of_labels(F.cross_entropy), weights=of_labels(smoothed), pixels=of_labels(smoothed, 3, 2),
               summed=of_labels(nn.CrossEntropyLoss(reduction='sum')), log_likelihood=of_labels(partial(F.nll_loss)),
               ignoring=of_labels(partial(F.cross_entropy, ignore_index=1), 5, gap=1),
               by_output=of_labels(ByOutput(), 2), probabilities=of_probabilities, numbers=of_numbers,
               targets=of_two_targets, table=of_table(False),
               learned_weights=of_table(True))
MIXED = ['labels', 'weights', 'summed', 'table', 'learned_weights']


# --- processes ------------------------------------------------------------------------------------------------------
class Process:
    "Process `rank`, which notes what it gives to a sum, and gets `total`; `whole` is what it gets of targets"
    def __init__(self, rank, whole, total=None): self.rank, self.whole, self.total, self.given = rank, whole, total, []
    def sum(self, what, t):
        self.given.append(t)
        return t if self.total is None else self.total
    def gather(self, what, o, sizes): return self.whole


def learner_of(loss, targs, rows, mix=None):
    "A learner that holds some `rows` of a batch, mixed where `mix` is the order and proportions of the others"
    learn = SimpleNamespace(loss_func=loss, yb=tuple(y[rows] for y in targs), xb=(), cbs=[], training=True)
    if mix is None: return learn
    cb, (others, lam) = MixUp(), mix
    cb.learn, cb.stack_y, cb.old_lf = learn, True, loss
    cb.yb1, cb.lam = tuple(y[others[rows]] for y in targs), lam[rows]
    learn.cbs, learn.loss_func = [cb], cb.lf
    return learn


def shown(learn, yb, mix, rows, targs):
    "Let the learner, and its mixing, show some rows of the batch"
    learn.yb = yb
    if mix is not None: learn.cbs[0].yb1, learn.cbs[0].lam = tuple(y[mix[0][rows]] for y in targs), mix[1][rows]


def added_up(loss, preds, targs, sizes, bs, mix):
    "Value and gradient of all parts of all processes"
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    own = [torch.arange(a, a+n) if n else torch.arange(1) for a, n in zip(starts, sizes)]
    def parts_of(rank, total):
        process, learn = Process(rank, targs, total), learner_of(loss, targs, own[rank], mix)
        return process, learn, part_over(learn, process, sizes)[0]
    given = [parts_of(rank, None)[0].given for rank in range(len(sizes))]
    leaf, value = preds.clone().requires_grad_(), 0.
    for rank in range(len(sizes)):
        process, learn, part = parts_of(rank, sum(o[0] for o in given) if given[0] else None)
        for rows in own[rank].split(bs):
            shown(learn, tuple(y[rows] for y in targs), mix, rows, targs)
            value = value + part(leaf[rows], *learn.yb)
    value.backward()
    return value.detach(), leaf.grad


def of_one(loss, preds, targs, mix):
    leaf = preds.clone().requires_grad_()
    value = learner_of(loss, targs, slice(None), mix).loss_func(leaf, *targs)
    value.backward()
    return value.detach(), leaf.grad


def mixed_with(sizes, rng):
    "The rows that MixUp mixes with those of each process, its own, and the proportions"
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    others = torch.cat([torch.randperm(n, generator=rng)+a for a, n in zip(starts, sizes)])
    return others, torch.rand(sum(sizes), generator=rng, dtype=torch.float64)/2 + .5


cases = dict(seed=st.integers(0, 9999), sizes=st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any),
             bs=st.integers(1, 6), gaps=st.sampled_from([0., .3, .8, 1.]))


def holds(name, seed, sizes, bs, gaps, mixed):
    rng = torch.Generator().manual_seed(seed)
    loss, preds, targs = BATCHES[name](sum(sizes), rng, gaps)
    mix = mixed_with(sizes, rng) if mixed else None
    value, grad = added_up(loss, preds, targs, sizes, bs, mix)
    expected, whole = of_one(loss, preds, targs, mix)
    if expected.isnan(): assert value.isnan() and gaps > 0  # as PyTorch has it where there is no label at all
    else: close(value, expected, 1e-12)
    close(grad, whole, 1e-12)


@pytest.mark.parametrize('name', BATCHES)
@settings(max_examples=40, deadline=None)
@given(**cases)
@example(seed=0, sizes=[3, 2, 0], bs=2, gaps=1.)
@example(seed=0, sizes=[0, 1], bs=1, gaps=0.)
def test_parts_of_all_processes_are_the_loss(name, seed, sizes, bs, gaps): holds(name, seed, sizes, bs, gaps, False)


@pytest.mark.parametrize('name', MIXED)
@settings(max_examples=40, deadline=None)
@given(**cases)
def test_parts_of_mixed_labels_are_the_loss(name, seed, sizes, bs, gaps): holds(name, seed, sizes, bs, gaps, True)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_labels_in_half_precision_are_counted(dtype):
    loss, preds, (rows,) = of_table(False)(9000, torch.Generator().manual_seed(0), .2)
    rows = rows.to(dtype)
    value, grad = added_up(loss, preds, (rows,), [5000, 4000], 4500, None)
    expected, whole = of_one(loss, preds, (rows.double(),), None)
    close(value, expected, 1e-6)
    close(grad*9000, whole*9000, 1e-6)


# --- batches of declared targets without rows -------------------------------------------------------------------------
def weighted(): return CategoryTarget(loss=nn.CrossEntropyLoss(torch.tensor([1., 2., 5.])))
def in_units(loss): return RegressionTarget(loss=loss, scale='none')


KINDS = dict(category=CategoryTarget, weighted=weighted, ordinal=lambda: OrdinalTarget(vocab=[*'xyz']),
             regression=RegressionTarget, in_a_range=lambda: RegressionTarget(range=(-1, 20)),
             absolute=lambda: RegressionTarget(loss=nn.L1Loss()), share=lambda: in_units(nn.BCEWithLogitsLoss()),
             count=CountTarget, rate=lambda: CountTarget(loss=nn.PoissonNLLLoss()), tags=MultiCategoryTarget,
             margins=lambda: MultiCategoryTarget(loss=nn.MultiLabelSoftMarginLoss()))


def labels_of(kind):
    if kind in ('category', 'weighted', 'ordinal'): return [*'xyzxxyzx']
    if kind in ('tags', 'margins'): return [['p'], ['q', 'r'], [], ['p', 'q'], ['r'], ['p'], [], ['q']]
    return [.1, .2, .9, .4, .5, .8, .3, .7] if kind == 'share' else [0, 1, 2, 5, 3, 1, 0, 7]


def declared(kinds):
    "A fitted table with two targets of each kind, encoded labels of which some are missing, and an output"
    names = [f'{kind}{i}' for kind in kinds for i in range(2)]
    items = [{name: labels_of(name[:-1])[(i+int(name[-1]))%8] for name in names} for i in range(8)]
    table, rng = Targets({name: KINDS[name[:-1]]() for name in names}).fit(items), torch.Generator().manual_seed(0)
    rows = torch.stack([table.encode(o) for o in items])
    for t in table: rows[torch.rand(8, generator=rng) < .3, t.cols] = float('nan')
    return table, rows, torch.randn(8, table.n_out, generator=rng)


def measured(table, rows, preds, cuts):
    "All metrics over batches from cut to cut"
    metrics, loss = [*table.metrics(), TotalLoss(table.loss())], table.loss()
    for m in metrics: m.reset()
    for a, b in zip(cuts, cuts[1:]):
        learn = SimpleNamespace(pred=preds[a:b], y=rows[a:b], yb=(rows[a:b],), loss_func=loss, to_detach=lambda o: o)
        for m in metrics: m.accumulate(learn)
    return {m.name: m.value for m in metrics}


@pytest.mark.parametrize('kinds', [*([o] for o in KINDS), [*KINDS]], ids='-'.join)
@pytest.mark.parametrize('learned', [False, True])
def test_a_batch_without_rows_costs_and_adds_nothing(kinds, learned):
    table, rows, preds = declared(kinds)
    loss, none = table.loss(), preds[:0].requires_grad_()
    penalty = 0.
    if learned:
        learn_weights(model := nn.Linear(1, 1), loss)
        model.log_vars.data.fill_(.3)
        penalty = .15*len(table)
    for reduction in 'mean', 'sum':
        value = loss(none, rows[:0], reduction=reduction)
        close(value.detach(), torch.tensor(penalty if reduction == 'mean' or learned else 0.), 1e-6)
    value.backward()
    assert none.grad.shape == none.shape
    with torch.no_grad(): assert loss(none, rows[:0], reduction='none').shape == (0,)
    for o in (loss.counts(rows[:0]), *loss.parts(none, rows[:0])): close(o.detach(), torch.zeros(len(table)), 0.)
    found, expected = (measured(table, rows, preds, cuts) for cuts in ((0, 0, 5, 8, 8), (0, 5, 8)))
    assert found == expected and len(found) > 2*len(table)


def run_losses(seeds):
    "In every process: the largest difference of loss and own gradient from those of one process, by kind of batch"
    ranks, found = join_processes(60), {}
    for name, seed in ((name, seed) for name in BATCHES for seed in range(seeds)):
        rng = torch.Generator().manual_seed(seed)
        sizes = [seed%4, *torch.randint(1, 5, (ranks.world_size-1,), generator=rng).tolist()]
        loss, preds, targs = BATCHES[name](sum(sizes), rng, .4)
        expected, whole = of_one(loss, preds, targs, None)
        start, own = sum(sizes[:ranks.rank]), sizes[ranks.rank]
        rows = slice(start, start+own) if own else slice(0, 1)
        leaf, learn = preds[rows].clone().requires_grad_(), learner_of(loss, targs, rows)
        value = part_of_loss(learn, ranks, sizes)(leaf, *learn.yb)
        value.backward()
        apart = torch.cat([(value.detach()-expected).view(1), (leaf.grad/ranks.world_size-whole[rows])[:own].flatten()])
        found[name] = max(found.get(name, 0.), float(apart.nan_to_num().abs().max()))
    return found


@pytest.mark.slow
def test_two_processes_have_the_loss_of_one():
    for o in in_processes(run_losses, 2, 120, seeds=12): assert max(o.result.values()) < 1e-10, o.result
