"Plans of training against real tensors on a CPU: bytes of all combinations, FLOPs, what is set up and what is refused"
import math
import weakref
from copy import deepcopy
from functools import partial

import pytest
import timm
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam, OptimWrapper, SGD
from fastai.torch_core import set_seed
from fastai.vision.learner import vision_learner
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paddy_multi.accumulate.checkpointing import checkpoint_activations
from paddy_multi.accumulate.costs import Costs
from paddy_multi.accumulate.fused import FusedAdam
from paddy_multi.accumulate.memory import find_accumulation
from paddy_multi.accumulate.microbatch import MicroBatch
from paddy_multi.accumulate.plan import plan_training

pytestmark = pytest.mark.filterwarnings(
    'ignore:.*CUDA is not available', 'ignore:.*BatchNorm takes', 'ignore:.*torch.jit.script')
adamw = partial(OptimWrapper, opt=torch.optim.AdamW, eps=1e-5)


def loaders(px, bs, n=None):
    generator = torch.Generator().manual_seed(0)
    items = [(torch.randn(3, px, px, generator=generator), torch.tensor(i%10)) for i in range(n or bs)]
    dls = DataLoaders(*[DataLoader(items, bs=bs, num_workers=0)]*2)
    dls.c = 10
    return dls


def timm_learner(arch, px=64, bs=8, n=None, **kwargs):
    set_seed(0)
    model = timm.create_model(arch, num_classes=10)
    return Learner(loaders(px, bs, n), model, loss_func=CrossEntropyLossFlat(), **kwargs)


def body_and_head(arch='resnet10t', px=32, bs=8, n=None, **kwargs):
    set_seed(0)
    return vision_learner(loaders(px, bs, n), arch, n_out=10, pretrained=False, normalize=False,
                          loss_func=CrossEntropyLossFlat(), **kwargs)


class Count(TorchDispatchMode):
    "Most bytes of storages that live at the same time, in blocks of 512, by their ids: written apart from the package"
    def __init__(self):
        super().__init__()
        self.now, self.peak, self.sizes = 0, 0, {}

    def see(self, t):
        storage = t.untyped_storage()
        if storage._cdata in self.sizes: return
        self.sizes[storage._cdata] = (storage.nbytes()+511)//512*512
        self.now += self.sizes[storage._cdata]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.gone, storage._cdata)

    def gone(self, key): self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor): self.see(t)
        return out


class FromSecond(Callback):
    def __init__(self, count): self.count = count

    def before_batch(self):
        if self.iter == 1: self.count.peak = self.count.now


def counted(learn, cb):
    "Most bytes of real tensors in the second batch of a fit: in the first, `MicroBatch` looks at loss and layers"
    if learn.opt is None: learn.create_opt()
    for p in learn.model.parameters():
        if p.requires_grad: p.grad = torch.zeros_like(p)
    learn.opt.step()
    learn.opt.zero_grad()
    batch = learn.dls.one_batch()
    learn.dls = DataLoaders([batch, batch], [])
    opt = getattr(learn.opt, 'opt', learn.opt)
    with Count() as count, learn.no_bar(), learn.no_logging():
        there = [*learn.model.parameters(), *learn.model.buffers(), *batch]
        there += [p.grad for p in learn.model.parameters() if p.grad is not None]
        there += [o for state in opt.state.values() for o in state.values() if isinstance(o, torch.Tensor)]
        for t in there: count.see(t.detach())
        learn.fit(1, cbs=[FromSecond(count), *([cb] if cb else [])])
    return count.peak


# --- bytes ----------------------------------------------------------------------------------------------------------
slow = partial(pytest.param, marks=pytest.mark.slow)
vit = partial(timm_learner, 'test_vit', 96)
head = partial(body_and_head, px=64)


@pytest.mark.parametrize('make, accums', [
    (vit, [2]), slow(vit, (1, 2, 4)), slow(partial(timm_learner, 'test_convnext', 96, opt_func=adamw), (1, 2, 4)),
    slow(head, (1, 2, 4))], ids=['vit', 'vit, all', 'convnext, AdamW', 'resnet10t with a head'])
def test_every_combination_takes_what_real_tensors_take(make, accums):
    plans = plan_training(make(), '1GB', accums=accums, device='cpu', valid=False).plans
    ways = {(o.accum, o.checkpointing, o.optimizer, o.frozen) for o in plans}
    assert len(ways) == len(plans) == len(accums)*2*3*(2 if make is head else 1)
    off = {}
    for plan in plans:
        learn = make()
        real = counted(learn, plan.apply(learn))
        if abs(plan.total/real-1) > .01: off[str(plan)] = round(plan.total/real-1, 4)
    assert off == {}


# --- arithmetic -----------------------------------------------------------------------------------------------------
def test_arithmetic_is_that_of_a_hand_worked_net():
    "Two layers: forward, both gradients of the second, one of the first; once more forward where checkpointed"
    n, a, b, c = 6, 8, 32, 10
    model = nn.Sequential(nn.Sequential(nn.Linear(a, b), nn.ReLU()), nn.Sequential(nn.Linear(b, c), nn.Identity()))
    items = [(torch.randn(a), torch.tensor(1))]*n
    dls = DataLoaders(*[DataLoader(items, bs=n, num_workers=0)]*2)
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat())
    df = plan_training(learn, '1GB', device='cpu', optimizers=['as is']).df.set_index('checkpointing')
    once, first, second = n*2, a*b, b*c
    assert df.flops[False] == once*(2*first + 3*second) and df.extra[False] == 0
    again = df.flops[True]-df.flops[False]
    assert once*first <= again <= once*(first+second)


@pytest.mark.slow
@pytest.mark.parametrize('arch, px', [('test_vit', 96), ('test_convnext', 96), ('resnet10t', 64)])
def test_checkpointing_runs_forward_about_once_more(arch, px):
    df = plan_training(timm_learner(arch, px), '1GB', device='cpu', optimizers=['as is']).df.set_index('checkpointing')
    assert df.extra[False] == 0 and .1 < df.extra[True] < .34


def test_a_depthwise_convolution_counts_its_own_channels():
    conv, x = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), torch.randn(1, 16, 4, 4, requires_grad=True)
    with Costs() as count: conv(x).sum().backward()
    assert count.flops == 3 * 2*16*4*4*9


# --- ranking --------------------------------------------------------------------------------------------------------
def test_what_changes_least_comes_first_then_what_is_fastest():
    plans = plan_training(body_and_head(), '1GB', accums=(1, 2), device='cpu').plans
    order = [(o.level, o.changes.count(', '), o.seconds) for o in plans]
    assert order == sorted(order)
    for o in plans:
        assert ('BatchNorm' in o.changes) == (o.accum > 1)
        assert (o.level == 0) == (o.changes == '') == (o.accum == 1 and o.optimizer != 'sgd' and not o.frozen)


def test_precisions_of_cuda_differ_in_rounding_from_the_learners():
    df = plan_training(timm_learner('test_vit', 96).to_fp16(), '4GB', accums=[1], optimizers=['as is']).df
    assert set(df.precision) == {'fp16', 'bf16', 'fp32'}
    assert (df.exact == (df.precision == 'fp16')).all()
    halves = [df[df.precision == o].sort_values('checkpointing').total.tolist() for o in ('fp16', 'bf16')]
    assert halves[0] == halves[1]


@pytest.mark.parametrize('make, budget', [(vit, '25MB'), slow(vit, '12MB'), slow(head, '25MB'), slow(head, '12MB')])
def test_the_plan_of_a_learner_as_it_is_is_what_find_accumulation_finds(make, budget):
    own = dict(optimizers=['as is'], checkpointing=[False], frozen=[False], device='cpu')
    found, plan = find_accumulation(make(), budget, device='cpu'), plan_training(make(), budget, **own).plans[0]
    assert plan.fits == (found.accum is not None) and plan.total == found.total
    if plan.fits: assert (plan.accum, plan.bs) == (found.accum, found.bs)


def test_a_reserve_is_what_is_asked_for():
    learn, own = timm_learner('test_vit'), dict(optimizers=['as is'], checkpointing=[False], accums=[1], device='cpu')
    plain, held = (plan_training(learn, '1GB', reserve=o, **own).plans[0] for o in (0, '100MB'))
    assert plain.needs == plain.total == held.needs-10**8


def test_planning_leaves_the_learner_alone():
    learn = body_and_head()
    before = deepcopy(learn.model.state_dict()), learn.opt_func, learn.opt, len(learn.cbs)
    trains = [p.requires_grad for p in learn.model.parameters()]
    plan_training(learn, '1GB', device='cpu')
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), learn.model.state_dict().values()))
    assert before[1:] == (learn.opt_func, learn.opt, len(learn.cbs))
    assert trains == [p.requires_grad for p in learn.model.parameters()]
    assert not any('forward' in vars(m) for m in learn.model.modules())


def test_nothing_is_set_in_the_learner_while_it_is_planned():
    written = []

    class Watched(Learner):
        def __setattr__(self, name, value):
            written.append(id(self))
            super().__setattr__(name, value)
    model = nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU()), nn.Linear(8, 10))
    learn = Watched(loaders(8, 8), model, loss_func=CrossEntropyLossFlat())
    written.clear()
    plan_training(learn, '1GB')
    assert written and id(learn) not in written


def test_a_frozen_learner_is_planned_as_it_trains_once_it_is_unfrozen():
    own = dict(optimizers=['as is'], checkpointing=[False], device='cpu')
    learn, whole = body_and_head(), body_and_head()
    learn.freeze()
    plans, unfrozen = plan_training(learn, '1GB', **own), plan_training(whole, '1GB', **own)
    assert [(o.frozen, o.total, o.changes) for o in plans] == [(o.frozen, o.total, o.changes) for o in unfrozen]
    assert [o.changes for o in plans] == ['', 'body frozen'] and plans[0].total > plans[1].total
    assert repr(plans).endswith('as they do in fine_tune or after unfreeze().') and 'frozen now' not in repr(unfrozen)
    heads = plan_training(learn, '1GB', **own, frozen=[True])
    assert heads.df.exact.all() and heads[0].total == plans[1].total and 'frozen now' not in repr(heads)
    assert (heads.df.extra == 0).all() and plans[1].extra < -.3  # against a whole batch of what trains
    assert not plan_training(whole, '1GB', **own, frozen=[True]).df.exact.any()


# --- set up ---------------------------------------------------------------------------------------------------------
def trained(make, plan=None):
    "A model after an epoch of three updates, as planned"
    learn = make(n=24)
    learn.dls.train.rng.seed(0)
    cb = plan.apply(learn) if plan else None
    set_seed(1)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=cb)
    return learn


@pytest.mark.parametrize('make, accums', [(vit, [2]), slow(vit, [1]), slow(head, (1, 2))])
def test_each_plan_trains_and_those_that_change_nothing_give_the_same_weights(make, accums):
    whole = [p.detach() for p in trained(make).model.parameters()]
    for plan in plan_training(make(), '1GB', accums=accums, device='cpu').plans:
        learn = trained(make, plan)
        weights = [p.detach() for p in learn.model.parameters()]
        assert isinstance(learn.opt, FusedAdam) == (plan.optimizer == 'fused')
        assert all(p.isfinite().all() for p in weights)
        off = max(float((a-b).abs().max()) for a, b in zip(whole, weights, strict=True))
        if plan.level == 0: assert off < 1e-4, str(plan)
        if plan.level == 0 and plan.accum == 1 and plan.optimizer == 'as is': assert off == 0, str(plan)
        if plan.level == 3: assert off > 1e-4, str(plan)


@pytest.mark.parametrize('make', [body_and_head, slow(partial(timm_learner, 'test_resnet'))], ids=['head', 'timm'])
def test_checkpointing_gives_the_same_bits_in_statistics_too(make):
    plans = plan_training(make(), '1GB', accums=[1], optimizers=['as is'], frozen=[False], device='cpu').plans
    one, two = (trained(make, plan).model.state_dict() for plan in plans)
    assert len(plans) == 2 and all(torch.equal(one[k], two[k]) for k in one)


def forwards_of_their_own():
    "A model with a block and a BatchNorm whose `forward` someone has replaced, and these forwards"
    set_seed(0)
    model = nn.Sequential(nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2)]),
                          nn.Linear(4, 2))
    block, bn = model[0][0], model[0][1][1]
    first, second = block.forward, bn.forward
    block.forward, bn.forward = lambda x: 10*first(x), lambda x: second(x)+1
    return model, {'0.0': block.forward, '0.1.1': bn.forward}


def test_a_forward_that_a_module_was_given_stays():
    results, x = [], torch.randn(5, 4)
    for times in (0, 2):
        model, given = forwards_of_their_own()
        for _ in range(times): assert checkpoint_activations(model) == 2
        out = model(x)
        out.square().sum().backward()
        results.append([out, *[p.grad for p in model.parameters()], *model.buffers()])
        for _ in range(2): checkpoint_activations(model, False)
        assert {n: m.forward for n, m in model.named_modules() if 'forward' in vars(m)} == given
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.slow
def test_a_second_plan_takes_the_place_of_the_first():
    learn = body_and_head()
    plans = {(o.accum, o.checkpointing, o.precision, o.optimizer, o.frozen): o
             for o in plan_training(learn, '1GB', accums=(1, 2)).plans}
    assert plans[2, True, 'bf16', 'fused', True].apply(learn).bs == 4
    assert learn.mixed_precision.amp_mode.value == 'bf16' and learn.model[0].model.grad_checkpointing
    assert not next(learn.model[0].parameters()).requires_grad
    assert plans[1, False, 'fp32', 'as is', False].apply(learn) is None
    assert not learn._grab_cbs(MixedPrecision) and not learn.model[0].model.grad_checkpointing
    assert learn.opt_func is Adam and not any('forward' in vars(m) for m in learn.model.modules())
    assert not next(learn.model[0].parameters()).requires_grad  # a body is never unfrozen
    assert plans[1, False, 'fp16', 'as is', False].apply(learn) is None
    assert learn.mixed_precision.amp_mode.value == 'fp16' and len(learn._grab_cbs(MixedPrecision)) == 1


@pytest.mark.slow
def test_a_checkpointed_learner_is_planned_with_and_without():
    plain, again = timm_learner('test_vit', 96), timm_learner('test_vit', 96)
    checkpoint_activations(again.model)
    dfs = [plan_training(o, '1GB', optimizers=['as is'], device='cpu').df for o in (plain, again)]
    assert dfs[0].equals(dfs[1])


@pytest.mark.slow
def test_microbatch_in_a_plan_sees_every_item():
    learn = timm_learner('test_vit', 96, bs=10)
    plan = plan_training(learn, '1GB', accums=[3], optimizers=['as is'], checkpointing=[True], device='cpu').best
    assert plan.bs == math.ceil(10/3) == 4
    assert isinstance(plan.apply(learn), MicroBatch)


# --- refused --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('budget, asked, text', [
    ('plenty', {}, "expected a size such as '16GB'"),
    ('1GB', dict(accums=[1.5]), 'list of positive ints; found 1.5'),
    ('1GB', dict(accums=2), 'list of positive ints; found 2'),
    ('1GB', dict(accums=[]), 'list of positive ints; found []'),
    ('1GB', dict(accums=[9], device='cpu'), 'a batch of 8 cannot be run in 9 chunks'),
    ('1GB', dict(precisions='fp16'), "expected precisions of ('fp32', 'fp16', 'bf16'), as a list, found 'fp16'"),
    ('1GB', dict(optimizers=['adam']), "as a list, found ['adam']"),
    ('1GB', dict(checkpointing=[]), 'as a list, found []'),
    ('1GB', dict(checkpointing=True), 'as a list, found True'),
    ('1GB', dict(optimizers=Adam), 'as a list, found <function Adam'),
    ('1GB', dict(precisions='fp16', device='cpu'), "as a list, found 'fp16'"),
    ('1GB', dict(precisions=['fp16'], device='cpu'), 'mixed precision does nothing on a CPU'),
    ('1GB', dict(frozen=[True]), 'no body to freeze'),
    ('1GB', dict(device='tpu'), "expected device 'cuda' or 'cpu', found 'tpu'"),
    ('1GB', dict(reserve='some'), "expected a size such as '16GB'"),
    ('1GB', dict(reserve='2GB'), 'less than the budget of 1GB, found 2GB')])
def test_what_cannot_be_planned_is_said(budget, asked, text):
    with pytest.raises(ValueError) as e: plan_training(timm_learner('test_vit'), budget, **asked)
    assert text in str(e.value)


def test_a_model_without_blocks_is_planned_without_checkpointing():
    items = [(torch.randn(4), torch.tensor(1))]*8
    dls = DataLoaders(*[DataLoader(items, bs=8, num_workers=0)]*2)
    learn = Learner(dls, nn.Linear(4, 2), loss_func=CrossEntropyLossFlat())
    assert not plan_training(learn, '1GB', device='cpu').df.checkpointing.any()
    with pytest.raises(ValueError, match='Linear has no blocks to checkpoint'):
        plan_training(learn, '1GB', device='cpu', checkpointing=[True])


def test_a_model_that_cannot_take_one_item_is_planned_where_the_batch_fits():
    class Squeezes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x): return torch.stack([o.squeeze() for o in self.layer(x).split(1, 1)], 1)
    items = [(torch.randn(4), torch.tensor(1))]*8
    dls = DataLoaders(*[DataLoader(items, bs=8, num_workers=0)]*2)
    learn = Learner(dls, Squeezes(), loss_func=CrossEntropyLossFlat())
    assert plan_training(learn, '1GB', device='cpu', checkpointing=[False]).best.accum == 1


def test_a_learner_with_nothing_trained_is_planned_or_refused_in_words():
    learn, whole = timm_learner('test_vit'), timm_learner('test_vit')
    for p in learn.model.parameters(): p.requires_grad_(False)
    own = dict(optimizers=['as is'], checkpointing=[False], device='cpu')
    assert plan_training(learn, '1GB', **own)[0].total == plan_training(whole, '1GB', **own)[0].total
    with pytest.raises(ValueError, match='no body to freeze'): plan_training(learn, '1GB', **own, frozen=[True])


@pytest.mark.parametrize('opt_func', [SGD, slow(partial(OptimWrapper, opt=torch.optim.SGD))])
def test_what_is_the_same_optimizer_already_is_not_another_training(opt_func):
    learn = timm_learner('test_vit', opt_func=opt_func)
    df = plan_training(learn, '1GB', checkpointing=[False], device='cpu').df
    assert 'sgd' not in set(df.optimizer) and df.exact.all()
    with pytest.raises(ValueError, match='is SGD without momentum already: expected optimizers with "as is"'):
        plan_training(learn, '1GB', checkpointing=[False], device='cpu', optimizers=['sgd'])


def test_plans_are_shown_in_lines_that_fit_a_page():
    learn = body_and_head()
    learn.freeze()
    plans = plan_training(learn, '1GB', accums=(1, 2), device='cpu')
    lines = repr(plans).splitlines()
    assert max(map(len, lines)) <= 88 and lines[1].split()[:3] == ['updates', 'accum', 'bs']
    assert {' '.join(o.split()[1:3]) for o in lines[2:-3]} >= {'the same', 'another training'}


def test_where_nothing_fits_the_least_is_named():
    plans = plan_training(timm_learner('test_vit', 96), '2MB', device='cpu', checkpointing=[False])
    assert plans.best is None and repr(plans).startswith('0 of 3 plans fit 2 MB. The one that needs the least:\n')
    _, row = repr(plans).splitlines()[1:]
    assert plans[int(row.split()[0])] is plans.least and 'another training' in row and 'sgd' in row
    with pytest.raises(ValueError, match='no plan fits 2 MB: the one that needs the least is .* SGD'):
        plans.apply(timm_learner('test_vit'))
