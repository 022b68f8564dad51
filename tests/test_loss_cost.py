"What the loss of declared targets asks of a device: how many operations, none that waits for it, none for every target"
import math
from collections import Counter
from operator import itemgetter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from paddy_multi.all import (
    CategoryTarget, CountTarget, MultiCategoryTarget, MultiTargetLoss, OrdinalTarget, RegressionTarget, Targets)

BS, WIDTH = 16, 5
VIEWS = '_unsafe_view', 'detach'  # no work for a device, though not called views


class Operations(TorchDispatchMode):
    "Counts what a device is asked to do, and notes what is copied to another"
    def __init__(self):
        super().__init__()
        self.found, self.copied = Counter(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        res, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        if not func.is_view and name not in VIEWS: self.found[name] += 1
        devices = {o.device.type for o in (*args, res) if isinstance(o, torch.Tensor) and o.ndim}
        if len(devices) > 1: self.copied.append(name)
        return res

    @property
    def n(self): return self.found.total()


# --- labels, and what users write by hand ---------------------------------------------------------------------------
def category(**kw): return CategoryTarget(vocab=list(range(WIDTH)), **kw)
def weighted(): return category(loss=nn.CrossEntropyLoss(weight=torch.arange(1., WIDTH+1)))
def ranks(): return OrdinalTarget(vocab=list(range(4)))
def tags(): return MultiCategoryTarget(vocab=list('abc'))
MAKE = dict(category=category, weighted=weighted, regression=RegressionTarget, ordinal=ranks, tags=tags,
            count=CountTarget)
LABELS = dict(category=[0, 1, 2, 3, 4], weighted=[0, 1, 2, 3, 4], regression=[.5, 1.5, 2., 4., 7.],
              ordinal=[0, 1, 2, 3, 0], tags=[['a'], ['b', 'c'], [], ['a', 'c'], ['b']], count=[0, 3, 1, 1, 2])


def table_of(kinds):
    "A fitted table with a target for each name of a kind"
    names = [f'{kind}{i}' for i, kind in enumerate(kinds)]
    rows = [{name: LABELS[kind][k] for name, kind in zip(names, kinds)} for k in range(5)]
    return Targets({name: MAKE[kind]().reading(itemgetter(name)) for name, kind in zip(names, kinds)}).fit(rows)


def batch(table, missing=0.):
    "Output, and encoded labels of which some are missing"
    rng = torch.Generator().manual_seed(0)
    targs = torch.cat([t.random_rows(BS, rng) for t in table], 1)
    for t in table: targs[torch.rand(BS, generator=rng) < missing, t.cols] = math.nan
    return torch.randn(BS, table.n_out, generator=rng).requires_grad_(), targs


def corn(p, y):
    "CORN as its authors write it: a question after the other"
    losses = [F.binary_cross_entropy_with_logits(p[y >= j, j], (y[y >= j] > j).float(), reduction='sum')
              for j in range(p.shape[1])]
    return sum(losses)/sum((y >= j).sum() for j in range(p.shape[1]))


def mean_by_hand(target, p, y):
    if isinstance(target, OrdinalTarget): return corn(p, y[:,0])
    if isinstance(target, CategoryTarget): return (target.loss or F.cross_entropy)(p, y[:,0].long())
    if isinstance(target, RegressionTarget): return F.mse_loss(p, y)
    if isinstance(target, CountTarget): return F.poisson_nll_loss(p, y)
    return F.binary_cross_entropy_with_logits(p, y)


def by_hand(table, preds, targs):
    "The loop over slices that users write, who leave missing labels out with a mask"
    losses = []
    for t in table:
        valid = ~targs[:,t.cols].isnan().any(1)
        losses.append(mean_by_hand(t, preds[:,t.out][valid], targs[:,t.cols][valid]))
    return sum(losses)


def plain_loop(n):
    "Output and labels of `n` categories as a tuple, and the loop that knows no missing label"
    rng = torch.Generator().manual_seed(0)
    preds = torch.randn(BS, n*WIDTH, generator=rng).requires_grad_()
    labels = [torch.randint(WIDTH, (BS,), generator=rng) for _ in range(n)]
    def run():
        losses = [F.cross_entropy(preds[:,i*WIDTH:(i+1)*WIDTH], y) for i, y in enumerate(labels)]
        torch.autograd.grad(sum(losses), preds)
    return run


def counted(run):
    "Operations of the second run: the first may copy constants"
    run()
    with Operations() as found: run()
    return found


def cost_by_hand(table, missing=.4):
    preds, targs = batch(table, missing)
    return counted(lambda: torch.autograd.grad(by_hand(table, preds, targs), preds)).n


def cost(kinds, missing=0.):
    table = table_of(kinds)
    loss, (preds, targs) = table.loss(), batch(table, missing)
    return counted(lambda: torch.autograd.grad(loss(preds, targs), preds))


# --- how many -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('missing', [0., .4])
def test_equal_targets_cost_what_two_cost_by_hand_however_many(missing):
    found = {n: cost(['category']*n, missing).n for n in (2, 3, 10, 40)}
    assert set(found.values()) == {found[2]} and found[2] <= counted(plain_loop(2)).n


@pytest.mark.parametrize('kind', ['regression', 'ordinal', 'tags', 'count'])
def test_equal_targets_of_any_kind(kind):
    found = {n: cost([kind]*n, .4).n for n in (2, 3, 10, 40)}
    assert set(found.values()) == {found[2]} and found[2] <= cost_by_hand(table_of([kind]*2))


@pytest.mark.parametrize('kinds', [
    ['weighted']*2, ['weighted']*5, ['category', 'regression'], ['category', 'weighted'],
    ['category', 'ordinal', 'regression'], ['category', 'tags', 'category', 'count'], [*MAKE]])
def test_mixed_kinds_cost_no_more_than_by_hand(kinds):
    table = table_of(kinds)
    preds, targs = batch(table, .4)
    loss, (hand, ours) = table.loss(), ([], [])
    for total, found in ((by_hand(table, preds, targs), hand), (loss(preds, targs), ours)):
        grad, = torch.autograd.grad(total, preds)
        found += [total.detach(), grad]
    for a, b in zip(hand, ours): torch.testing.assert_close(a, b)
    assert cost(kinds, .4).n <= cost_by_hand(table)


def test_more_targets_of_mixed_kinds_cost_the_same():
    few, many = cost(['category', 'regression']*2, .4).n, cost(['category', 'regression']*15, .4).n
    assert few == many


# --- none that waits ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('kinds', [['category']*3, ['category', 'regression']*2, [*MAKE]])
@pytest.mark.parametrize('uncertainty', [False, True])
def test_a_step_copies_nothing_to_the_device_and_asks_it_for_no_number(kinds, uncertainty):
    table = table_of(kinds)
    preds, targs = batch(table, .4)
    preds, targs = preds.detach().to('meta').requires_grad_(), targs.to('meta')  # which has no numbers to give
    log_vars = nn.Parameter(torch.zeros(len(table), device='meta')) if uncertainty else None
    loss = MultiTargetLoss(table, log_vars)
    def run(): loss(preds, targs).backward()
    assert counted(run).copied == []
    for read in (loss.parts, loss.item_parts):
        assert counted(lambda read=read: read(preds, targs)).copied == []


def test_metrics_of_a_batch_copy_nothing_and_ask_for_no_number():
    table = table_of(['category', 'regression', 'category', 'tags', 'count', 'ordinal', 'regression'])
    _, targs = batch(table, .4)
    metrics = table.metrics()
    for m in metrics: m.reset()
    learn = SimpleNamespace(y=targs.to('meta'), loss_func=table.loss())
    def run():
        learn.pred = torch.empty(BS, table.n_out, device='meta')
        for m in metrics: m.accumulate(learn)
    assert counted(run).copied == []


def test_metrics_of_equal_targets_are_one_computation():
    def operations(n):
        table = table_of(['category']*n)
        preds, targs = batch(table, .4)
        metrics = table.metrics()
        for m in metrics: m.reset()
        learn = SimpleNamespace(y=targs, loss_func=table.loss())
        def run():
            learn.pred = preds.detach()
            for m in metrics: m.accumulate(learn)
        return counted(run).n
    assert operations(2) == operations(40)


def test_constants_stay_out_of_an_export():
    import pickle
    table = table_of(['category', 'regression', 'category'])
    loss, (preds, targs) = table.loss(), batch(table, .4)
    before = pickle.dumps(loss)
    total = loss(preds, targs)
    assert len(pickle.dumps(loss)) == len(before)
    assert pickle.loads(before)(preds, targs) == total


# --- values ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_output_of_any_precision(dtype):
    table = table_of(['category', 'regression', 'category', 'tags'])
    preds, targs = batch(table, .4)
    preds = preds.detach().to(dtype).requires_grad_()
    total = table.loss()(preds, targs)
    grad, = torch.autograd.grad(total, preds)
    exact = preds.detach().double().requires_grad_()
    right = by_hand(table, exact, targs.double())
    expected, = torch.autograd.grad(right, exact)
    torch.testing.assert_close(total.double(), right, rtol=1e-2 if dtype.itemsize == 2 else 1e-6, atol=0)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad.double(), expected, rtol=2e-2 if dtype.itemsize == 2 else 1e-6, atol=1e-3)


@pytest.mark.parametrize('value', [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize('kind', [*MAKE])
def test_an_output_beside_a_missing_label_moves_nothing(kind, value):
    table = table_of([kind, 'regression', kind])
    preds, targs = batch(table, .4)
    wild = preds.detach().clone()
    for t in table: wild[targs[:,t.cols].isnan().any(1), t.out] = value
    wild.requires_grad_()
    loss = table.loss()
    a, b = loss(preds, targs), loss(wild, targs)
    ga, gb = torch.autograd.grad(a, preds)[0], torch.autograd.grad(b, wild)[0]
    assert a == b and torch.equal(ga, gb)
    for t in table: assert (gb[targs[:,t.cols].isnan().any(1), t.out] == 0).all()


def test_gradients_of_gradients():
    table = table_of(['category', 'regression', 'category'])
    preds, targs = batch(table, .4)
    loss = table.loss()
    assert torch.autograd.gradgradcheck(lambda p: loss(p, targs.double()), preds.detach().double().requires_grad_())


def test_gradients_of_each_item_at_once():
    table = table_of(['category', 'regression', 'category'])
    preds, targs = batch(table, .4)
    loss = table.loss()
    def one(p, y): return loss(p[None], y[None])
    found = torch.func.vmap(torch.func.grad(one))(preds.detach(), targs)
    for i in range(BS):
        p = preds[i:i+1].detach().requires_grad_()
        torch.testing.assert_close(found[i:i+1], torch.autograd.grad(loss(p, targs[i:i+1]), p)[0])


def test_weights_of_classes_that_count_nothing():
    weight = torch.tensor([0., 1., 2., 0., 0.])
    targets = Targets(a=category(loss=nn.CrossEntropyLoss(weight=weight)).reading(itemgetter('a')), b=category())
    table = targets.fit([dict(a=k, b=k) for k in range(WIDTH)])
    preds = torch.randn(4, table.n_out, requires_grad=True)
    targs = torch.tensor([[0., 1.], [3., math.nan], [0., 2.], [4., 0.]])  # no label of `a` counts
    total = table.loss()(preds, targs)
    have = [0, 2, 3]
    torch.testing.assert_close(total, F.cross_entropy(preds[have,WIDTH:], targs[have,1].long()))
    total.backward()
    assert (preds.grad[:,:WIDTH] == 0).all() and preds.grad.isfinite().all()
