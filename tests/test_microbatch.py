"MicroBatch against plain PyTorch loops over whole batches, case by case; what is refused; what interruptions leave"
import math
import threading
import warnings
import weakref
from collections import OrderedDict, namedtuple
from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelBackwardException, CancelBatchException, CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.schedule import combined_cos
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.vision.learner import create_head
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD, Adam
from fastcore.foundation import L
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from alive import Alive
from paddy_multi.accumulate.microbatch import MicroBatch
from paddy_multi.accumulate.passes import autocast_depth
from paddy_multi.kinds.category import CategoryTarget
from paddy_multi.kinds.multicategory import MultiCategoryTarget
from paddy_multi.kinds.regression import RegressionTarget
from paddy_multi.all import Targets
from paddy_multi.targets.loss import learn_weights
from paddy_multi.targets.slices import combined_loss

pytestmark = pytest.mark.filterwarnings('ignore:.*CUDA is not available', 'ignore:Converting a tensor')
D, C, LR = 12, 5, .1


# --- data, models, learners -----------------------------------------------------------------------------------------
def rng(seed=0): return torch.Generator().manual_seed(seed)


def data(n, seed=0):
    g = rng(seed)
    x = torch.randn(n, D, generator=g, dtype=torch.float64)
    return x, (x@torch.randn(D, C, generator=g, dtype=torch.float64) + torch.randn(n, C, generator=g)).argmax(1)


def mlp(n_out=C):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(D, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, n_out)).double()


def vec(model): return torch.cat([p.detach().flatten() for p in model.parameters()])


def error(model, expected, start):
    "Distance of two models, relative to how far training moved the expected one"
    return float((vec(model)-vec(expected)).norm()/(vec(expected)-vec(start)).norm())


class Float32Loss(Callback):
    "fastai's recorder cannot take a float64 loss"
    order = -50
    def after_loss(self): self.learn.loss = self.learn.loss.float()


def learner(*parts, bs=64, model=None, loss=F.cross_entropy, opt=SGD, cbs=(), drop_last=False, n_inp=1, lr=LR,
            **kwargs):
    dls = DataLoaders(DataLoader(list(zip(*parts)), bs=bs, num_workers=0, drop_last=drop_last), [])
    dls.n_inp = n_inp
    return Learner(dls, model or mlp(), loss_func=loss, opt_func=opt, lr=lr, cbs=[Float32Loss()]+L(cbs), **kwargs)


def unread(learn):
    "`learn`, none of whose callbacks reads outputs"
    class NotRead(Float32Loss): reads_outputs = False
    learn.remove_cb(Float32Loss)
    learn.add_cb(NotRead())
    return learn


def quiet(learn, fit=lambda o: o.fit(1)):
    with learn.no_bar(), learn.no_logging(): fit(learn)
    return learn


def chunked(bs, *parts, whole_head=False, **kwargs):
    "The model of a fit with `MicroBatch`"
    return quiet(learner(*parts, cbs=MicroBatch(bs, whole_head), **kwargs)).model


def loop(parts, model, bs=64, epochs=1, opt=None, loss=F.cross_entropy, before_step=lambda model, opt, i, n: None,
         drop_last=False):
    "Plain PyTorch over whole batches"
    opt = opt or torch.optim.SGD(model.parameters(), LR)
    starts = [i for i in range(0, len(parts[0]), bs) if not drop_last or i+bs <= len(parts[0])]
    for k, i in enumerate(starts*epochs):
        x, *y = (o[i:i+bs] for o in parts)
        value = loss(model(x), *y)
        value.backward()
        before_step(model, opt, k, len(starts)*epochs)
        opt.step()
        opt.zero_grad()
    return model


# --- the table of exactness: name, tolerance, what fastai trains with MicroBatch, what plain PyTorch trains ---------
CASES = {}


def case(name, tol=1e-12, chunks=(1, 7, 16, 64)):
    def add(f):
        CASES[name] = SimpleNamespace(make=f, tol=tol, chunks=chunks)
        return f
    return add


def same(n=200, epochs=1, fits=1, y=None, cbs=(), loss=F.cross_entropy, by_hand=None, **kwargs):
    "Both sides of a case that differs in what both take"
    x, labels = data(n)
    parts = x, labels if y is None else y(labels)
    by_hand = by_hand or {}
    def ours(bs):
        def fit(learn):
            for _ in range(fits): learn.fit(epochs)
        return quiet(learner(*parts, cbs=[MicroBatch(bs), *cbs], loss=loss, **kwargs), fit).model
    def plain():
        opt = by_hand['opt']() if 'opt' in by_hand else None
        return loop(parts, mlp(), epochs=epochs*fits, **{'loss': loss, **by_hand, 'opt': opt})
    return ours, plain, mlp()


@case('full batches')
def _(): return same(192)


@case('a remainder')
def _(): return same(200)


@case('a batch that is smaller than the chunk', chunks=(64, 100, 1000))
def _(): return same(40)


@case('a last batch of one item')
def _(): return same(193)


@case('drop_last')
def _(): return same(200, drop_last=True, by_hand=dict(drop_last=True))


@case('three epochs with a remainder')
def _(): return same(200, epochs=3)


@case('three fits with a remainder')
def _(): return same(200, fits=3)


def with_params(make):
    "An optimizer of plain PyTorch for the model that `loop` trains"
    def opt():
        model = mlp()
        opt.model = model
        return make(model.parameters())
    return opt


def own_optimizer(n, make, epochs=1, before_step=lambda *args: None, loss=F.cross_entropy, cbs=(), fit=None, **kwargs):
    "A case whose optimizer has to be made from the model"
    x, y = data(n)
    def ours(bs):
        learn = learner(x, y, cbs=[MicroBatch(bs), *cbs], loss=loss, **kwargs)
        return quiet(learn, fit or (lambda o: o.fit(epochs))).model
    def plain():
        model = mlp()
        return loop((x, y), model, epochs=epochs, opt=make(model), before_step=before_step, loss=loss)
    return ours, plain, mlp()


@case('SGD with momentum')
def _():
    return own_optimizer(200, lambda m: torch.optim.SGD(m.parameters(), LR, momentum=.9), epochs=2,
                         opt=lambda p, **kw: SGD(p, mom=.9, **kw))


@case('weight decay')
def _():
    def decay(model, opt, k, n):
        with torch.no_grad():
            for name, p in model.named_parameters(): p.mul_(1-LR*.3)
    return own_optimizer(200, lambda m: torch.optim.SGD(m.parameters(), LR), before_step=decay, wd=.3, wd_bn_bias=True)


@case('Adam')
def _():
    def adamw(m): return torch.optim.AdamW(m.parameters(), 1e-2, betas=(.9, .99), eps=1e-5, weight_decay=.01)
    return own_optimizer(200, adamw, epochs=2, opt=Adam, lr=1e-2, wd=.01, wd_bn_bias=True)


@case('gradient clipping')
def _():
    def clip(model, opt, k, n): assert nn.utils.clip_grad_norm_(model.parameters(), .1) > .1  # it does clip
    return own_optimizer(200, lambda m: torch.optim.SGD(m.parameters(), LR), before_step=clip, cbs=[GradientClip(.1)])


@case('one-cycle')
def _():
    lr, mom = combined_cos(.25, 1e-2/25, 1e-2, 1e-2/1e5), combined_cos(.25, .95, .85, .95)
    def schedule(model, opt, k, n): opt.param_groups[0].update(lr=lr(k/n), betas=(mom(k/n), .99))
    def adamw(m): return torch.optim.AdamW(m.parameters(), 1e-2, eps=1e-5, weight_decay=0)
    return own_optimizer(200, adamw, epochs=3, before_step=schedule, opt=Adam,
                         fit=lambda o: o.fit_one_cycle(3, 1e-2, wd=0.))


@case('a summed loss')
def _(): return same(200, loss=nn.CrossEntropyLoss(reduction='sum'))


def gaps(labels):
    "Labels that become rarer and rarer within every batch of 64; the last 8 of a batch have none"
    where = torch.arange(len(labels)) % 64
    return labels.where(torch.rand(len(labels), generator=rng(3)) > where/56, -100)


@case('missing labels')
def _(): return same(200, y=gaps)


@case('missing labels, summed')
def _(): return same(200, y=gaps, loss=nn.CrossEntropyLoss(reduction='sum'))


@case('class weights and missing labels')
def _(): return same(200, y=gaps, loss=nn.CrossEntropyLoss(torch.tensor([1., 5, .1, 2, 9]).double()))


@case('class weights and label smoothing')
def _(): return same(200, loss=nn.CrossEntropyLoss(torch.tensor([1., 5, .1, 2, 9]).double(), label_smoothing=.2))


@case('a mean over items and columns')
def _():
    x, y = data(200)
    parts = x, F.one_hot(y, C).double()
    def ours(bs): return chunked(bs, *parts, loss=nn.MSELoss())
    return ours, lambda: loop(parts, mlp(), loss=F.mse_loss), mlp()


@case('a hand-written loss over items')
def _():
    def cube(preds, y): return ((preds.gather(1, y[:, None])-1).abs()**3).mean()
    return same(200, loss=cube)


@case('targets by slice, one with missing labels')
def _():
    x, y = data(200)
    parts = x, gaps(y.clamp(max=2)), x[:, 0].clone()
    loss = combined_loss(kind=(F.cross_entropy, 3), size=(F.mse_loss, 2-1, .5))
    def plain(preds, kind, size): return F.cross_entropy(preds[:, :3], kind) + .5*F.mse_loss(preds[:, 3], size)
    def ours(bs): return chunked(bs, *parts, model=mlp(4), loss=loss)
    return ours, lambda: loop(parts, mlp(4), loss=plain), mlp(4)


def table():
    "Three kinds of targets of unequal widths, and rows with a third of the labels missing, one in first chunks only"
    rows = [dict(kind='abcd'[i % 4], size=float(i % 7), tags=['r', 's'][:1+i % 2]) for i in range(200)]
    t = Targets(kind=CategoryTarget(), size=RegressionTarget(weight=.5), tags=MultiCategoryTarget()).fit(rows)
    hidden = torch.rand(200, 3, generator=rng(5)) < .33
    hidden[:, 1] |= torch.arange(200) % 64 > 9
    def with_gaps(i): return {k: None if hidden[i, j] else v for j, (k, v) in enumerate(rows[i].items())}
    encoded = torch.stack([t.encode(with_gaps(i)) for i in range(200)])
    return t, encoded.as_subclass(torch.Tensor).double()


def one_target(i, p, labels):
    if i == 0: return F.cross_entropy(p, labels[:, 0].long())
    if i == 1: return F.mse_loss(p, labels)
    return F.binary_cross_entropy_with_logits(p, labels)


def three_targets(t, log_vars=None):
    "The loss of `table` written out, with the weights of Kendall et al. (2018) for given log-variances"
    def loss(preds, y):
        total = 0.
        for i, target in enumerate(t):
            p, labels = preds[:, target.out], y[:, target.cols]
            have = ~labels.isnan().any(1)
            if not have.any(): continue
            one = one_target(i, p[have], labels[have])
            if log_vars is not None: one = one*torch.exp(-log_vars()[i])*(.5 if i == 1 else 1)
            total = total + target.weight*one
        return total if log_vars is None else total + (torch.tensor([target.weight for target in t])*log_vars()/2).sum()
    return loss


@case('several targets with missing labels')
def _():
    t, y = table()
    x = data(200)[0]
    ours = lambda bs: quiet(learner(x, y, model=mlp(t.n_out), loss=t.loss(), cbs=MicroBatch(bs))).model
    return ours, lambda: loop((x, y), mlp(t.n_out), loss=three_targets(t)), mlp(t.n_out)


@case('several targets with learned weights')
def _():
    t, y = table()
    x = data(200)[0]
    def model(loss=None):
        m = mlp(t.n_out)
        learn_weights(m, loss or t.loss())
        m.log_vars.data = m.log_vars.data.double()
        return m
    def ours(bs):
        loss = t.loss()
        return quiet(learner(x, y, model=model(loss), loss=loss, cbs=MicroBatch(bs))).model
    def plain():
        m = model()
        return loop((x, y), m, loss=three_targets(t, lambda: m.log_vars))
    return ours, plain, model()


def double_mix(cls, alpha):
    mix = cls(alpha)
    mix.distrib = torch.distributions.Beta(*torch.full((2,), alpha, dtype=torch.float64))
    return mix


def mixing(loss, plain_items, y, n_out=C):
    "MixUp by hand: `plain_items(preds, y)` gives the items' losses, so that their mean is the loss"
    x = data(len(y))[0]
    def ours(bs):
        model = mlp(n_out)
        torch.manual_seed(7)
        return quiet(learner(x, y, model=model, loss=loss(), cbs=[double_mix(MixUp, .4), MicroBatch(bs)])).model
    def plain():
        model = mlp(n_out)
        opt = torch.optim.SGD(model.parameters(), LR)
        torch.manual_seed(7)
        beta = torch.distributions.Beta(*torch.full((2,), .4, dtype=torch.float64))
        loader_seed()
        for i in range(0, len(y), 64):
            xb, yb = x[i:i+64], y[i:i+64]
            lam = beta.sample((len(xb),))
            lam = torch.maximum(lam, 1-lam)
            other = torch.randperm(len(xb))
            preds = model(torch.lerp(xb[other], xb, lam[:, None]))
            ((1-lam)*plain_items(preds, yb[other]) + lam*plain_items(preds, yb)).mean().backward()
            opt.step()
            opt.zero_grad()
        return model
    return ours, plain, mlp(n_out)


def loader_seed():
    "PyTorch's loader draws a seed for its workers at the start of an epoch, even without any"
    torch.empty((), dtype=torch.int64).random_()


def y_int(loss):
    loss.y_int = True
    return loss


@case('MixUp')
def _():
    def items(p, y): return F.cross_entropy(p, y, reduction='none')
    return mixing(lambda: y_int(nn.CrossEntropyLoss()), items, data(200)[1])


@case('MixUp with class weights and missing labels')
def _():
    w = torch.tensor([1., 5, .1, 2, 9]).double()
    def items(p, y): return F.cross_entropy(p, y, w, reduction='none')
    return mixing(lambda: y_int(nn.CrossEntropyLoss(w)), items, gaps(data(200)[1]))


@case('MixUp of several targets with missing labels')
def _():
    t, y = table()
    def one_each(i, p, labels):
        if i == 0: return F.cross_entropy(p, labels[:, 0].long(), reduction='none')
        if i == 1: return ((p-labels)**2).mean(1)
        return F.binary_cross_entropy_with_logits(p, labels, reduction='none').mean(1)
    def items(preds, y):
        "Items' losses times n over the number of labels, so that their mean is the loss"
        total = 0.
        for i, target in enumerate(t):
            have = ~y[:, target.cols].isnan().any(1)
            if not have.any(): continue
            one = one_each(i, preds[:, target.out], y[:, target.cols].nan_to_num())
            total = total + target.weight*one*have*len(y)/have.sum()
        return total
    return mixing(t.loss, items, y, t.n_out)


@case('CutMix')
def _():
    x, y = data(200)
    pictures = x.repeat(1, 12).reshape(200, 1, 12, 12)
    def net(): return nn.Sequential(nn.Flatten(), nn.Linear(144, 16, dtype=torch.float64), *mlp()[1:])
    def model():
        torch.manual_seed(4)
        return net()
    def ours(bs):
        m = model()
        torch.manual_seed(7)
        torch.set_default_dtype(torch.float64)  # fastai's proportions are of the default type
        try:
            cbs = [double_mix(CutMix, 1.), MicroBatch(bs)]
            return quiet(learner(pictures.clone(), y, model=m, loss=y_int(nn.CrossEntropyLoss()), cbs=cbs)).model
        finally: torch.set_default_dtype(torch.float32)
    def plain():
        m = model()
        opt = torch.optim.SGD(m.parameters(), LR)
        torch.manual_seed(7)
        beta = torch.distributions.Beta(*torch.ones(2, dtype=torch.float64))
        loader_seed()
        for i in range(0, 200, 64):
            xb, yb = pictures[i:i+64].clone(), y[i:i+64]
            side = (1-beta.sample((1,))).sqrt()
            other = torch.randperm(len(xb))
            cut = torch.round(12*side).long()
            cx, cy = torch.randint(0, 12, (1,)), torch.randint(0, 12, (1,))
            (x1, x2), (y1, y2) = [((c-cut//2).clamp(0, 12), (c+cut//2).clamp(0, 12)) for c in (cx, cy)]
            patch = xb[other][..., y1:y2, x1:x2]
            xb[..., y1:y2, x1:x2] = patch
            lam = 1-((x2-x1)*(y2-y1)).double()/144
            preds = m(xb)
            theirs, own = (F.cross_entropy(preds, t, reduction='none') for t in (yb[other], yb))
            ((1-lam)*theirs + lam*own).mean().backward()
            opt.step()
            opt.zero_grad()
        return m
    return ours, plain, model()


class AddsUp(Callback):
    "Three batches an update, as the documentation of fastai's events suggests"
    def before_backward(self): self.learn.loss_grad = self.learn.loss_grad/3
    def before_step(self):
        if (self.iter+1)%3: raise CancelBatchException


@case('several batches an update, by a callback of one\'s own')
def _():
    x, y = data(384)
    def plain():
        model = mlp()
        opt = torch.optim.SGD(model.parameters(), LR)
        for i in range(0, 384, 192):
            sum(F.cross_entropy(model(x[j:j+64]), y[j:j+64]) for j in range(i, i+192, 64)).div(3).backward()
            opt.step()
            opt.zero_grad()
        return model
    return lambda bs: quiet(learner(x, y, cbs=[AddsUp(), MicroBatch(bs)])).model, plain, mlp()


@case("loaders of PyTorch, which give lists")
def _():
    x, y = data(200)
    from torch.utils.data import DataLoader as TorchLoader, TensorDataset
    def ours(bs):
        learn = learner(x, y, loss=partial(F.cross_entropy, label_smoothing=.1), cbs=[Reads(), MicroBatch(bs)])
        learn.dls = DataLoaders(TorchLoader(TensorDataset(x, y), 64), TorchLoader(TensorDataset(x, y), 90))
        learn.dls._device = torch.device('cpu')  # where these batches are
        return quiet(learn).model
    return ours, lambda: loop((x, y), mlp(), loss=partial(F.cross_entropy, label_smoothing=.1)), mlp()


class Reads(Callback):
    "An output of every batch"
    def after_batch(self): assert len(self.pred) == len(self.y) == len(self.x)


@case('two inputs')
def _():
    x, y = data(200)
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = mlp(), nn.Linear(D, C, dtype=torch.float64)
        def forward(self, x, z): return self.a(x) + self.b(z)
    def model():
        torch.manual_seed(2)
        return Two()
    def plain():
        m = model()
        return loop((torch.cat([x, x.flip(1)], 1), y), Wide(m)).m
    class Wide(nn.Module):
        def __init__(self, m):
            super().__init__()
            self.m = m
        def forward(self, x): return self.m(x[:, :D], x[:, D:])
    return lambda bs: chunked(bs, x, x.flip(1), y, model=model(), n_inp=2), plain, model()


@case('what a callback adds to the loss')
def _():
    x, y = data(200)
    class Ridge(Callback):
        def after_loss(self):
            self.learn.loss_grad = self.learn.loss_grad + .01*sum((p**2).sum() for p in self.model.parameters())
    def plain():
        m = mlp()
        return loop((x, y), m, loss=lambda p, t: F.cross_entropy(p, t) + .01*sum((o**2).sum() for o in m.parameters()))
    return (lambda bs: quiet(learner(x, y, cbs=[Ridge(), MicroBatch(bs)])).model), plain, mlp()


def headed(p=.5):
    "A body with LayerNorm, under fastai's default head: pooling, two BatchNorms, dropout"
    torch.manual_seed(1)
    body = nn.Sequential(nn.Conv2d(1, 6, 3), nn.GroupNorm(1, 6), nn.GELU())
    return nn.Sequential(body, create_head(6, C, ps=p)).double()


def pictures(n=200):
    x, y = data(n)
    return x[:, :, None].expand(n, D, D).reshape(n, 1, D, D).contiguous(), y


@case("whole head: fastai's default head, dropout included", chunks=(7, 16, 64))
def _():
    x, y = pictures()
    def ours(bs):
        m = headed()
        torch.manual_seed(9)
        return quiet(learner(x, y, model=m, cbs=MicroBatch(bs, whole_head=True))).model
    def plain():
        m = headed()
        torch.manual_seed(9)
        loader_seed()
        return loop((x, y), m)
    return ours, plain, headed()


@case('whole head: a loss over the whole batch', chunks=(7, 16, 64))
def _():
    def loss(preds, y): return F.cross_entropy(preds, y) + (preds@preds.T).logsumexp(1).mean()
    x, y = data(200)
    def ours(bs): return chunked(bs, x, y, loss=loss, whole_head=True)
    return ours, lambda: loop((x, y), mlp(), loss=loss), mlp()


# --- work on gradients and losses in callbacks
class ClipAfterBackward(Callback):
    def after_backward(self): nn.utils.clip_grad_norm_(self.model.parameters(), .1)


class PenaltyBefore(Callback):
    def before_backward(self): self.learn.loss_grad = self.learn.loss_grad + ridge(self.model)


class PenaltyOnGradient(Callback):
    def after_backward(self):
        for p in self.model.parameters(): p.grad.add_(p.detach()*p.grad.norm())


def ridge(model): return .01*sum((p**2).sum() for p in model.parameters())


def clip(model, *args): assert nn.utils.clip_grad_norm_(model.parameters(), .1) > .1


def add_to_gradient(model, *args):
    for p in model.parameters(): p.grad.add_(p.detach()*p.grad.norm())


def with_callback(cb, whole_head, before_step=None, penalty=False):
    x, y = data(200)
    def ours(bs): return quiet(learner(x, y, cbs=[cb(), MicroBatch(bs, whole_head)])).model
    def plain():
        model = mlp()
        loss = (lambda p, t: F.cross_entropy(p, t) + ridge(model)) if penalty else F.cross_entropy
        return loop((x, y), model, loss=loss, **(dict(before_step=before_step) if before_step else {}))
    return ours, plain, mlp()


for cb, how in ((ClipAfterBackward, dict(before_step=clip)), (PenaltyOnGradient, dict(before_step=add_to_gradient)),
                (PenaltyBefore, dict(penalty=True))):
    for whole_head in (False, True):
        name = f'{cb.__name__}{", whole head" if whole_head else ""}'
        case(name, chunks=(1, 7, 16, 64))(partial(with_callback, cb, whole_head, **how))


# --- batches and outputs of any form
class Form(nn.Module):
    "The small model, with `form(model, *inputs)` for its output"
    def __init__(self, form):
        super().__init__()
        self.m, self.form = mlp(), form
    def forward(self, *xb): return self.form(self.m, *xb)


Logits = namedtuple('Logits', 'logits aux')


class ModelOutput(OrderedDict):
    "As those of Hugging Face's models"
    def __getattr__(self, name): return self[name]


def cross(get): return lambda p, y: F.cross_entropy(get(p), y)


X, Y = data(64)
def boxes_apart(p, boxes): return torch.stack([(a-b).abs().mean() for a, b in zip(p, boxes)]).mean()


FORMS = {  # form of the output, loss, batch, number of inputs, keywords of MicroBatch
    '(logits, scalar)': (lambda m, x: (m(x), m(x).pow(2).mean()), lambda p, y: F.cross_entropy(p[0], y)+p[1], (X, Y)),
    'namedtuple': (lambda m, x: Logits(m(x), m(x)*2), cross(lambda p: p.logits), (X, Y)),
    'ModelOutput': (lambda m, x: ModelOutput(logits=m(x)), cross(lambda p: p.logits), (X, Y)),
    'dict': (lambda m, x: dict(logits=m(x), width=C), cross(lambda p: p['logits']), (X, Y)),
    'None in the output': (lambda m, x: (m(x), None), cross(lambda p: p[0]), (X, Y)),
    'a loss of its own': (lambda m, x: m(x).pow(2).mean(), lambda p, y: p, (X, Y)),
    'a shared constant': (lambda m, x, c: m(x)*c.sum(0), F.cross_entropy, (X, torch.ones(7, C).double(), Y), 2),
    'a scalar tensor': (lambda m, x, c: m(x)*c, F.cross_entropy, (X, torch.tensor(2.).double(), Y), 2),
    'None': (lambda m, x, c: m(x), F.cross_entropy, (X, None, Y), 2),
    'a number': (lambda m, x, c: m(x)*c, F.cross_entropy, (X, 2, Y), 2),
    'a dict of inputs': (lambda m, d: m(d['a'])+d['b'], F.cross_entropy, (dict(a=X, b=X[:, :C]), Y)),
    'a list of pictures': (lambda m, xs: torch.stack([m(o.mean(0)) for o in xs]), F.cross_entropy,
                           ([X[i:i+1].repeat(2+i%3, 1) for i in range(64)], Y)),
    'dict of targets': (lambda m, x: m(x), lambda p, t: F.cross_entropy(p, t['a']), (X, dict(a=Y))),
    'nested targets': (lambda m, x: m(x), lambda p, t: F.cross_entropy(p, t[0]) + F.mse_loss(p, t[1]['b']),
                       (X, (Y, dict(b=X[:, :C])))),
    'boxes, as many an item as there are': (lambda m, x: m(x), boxes_apart, (X, [X[:1+i%3, :C] for i in range(64)])),
    'one box an item': (lambda m, x: m(x), boxes_apart, (X, [X[i:i+1, :C] for i in range(64)])),
    'three boxes an item': (lambda m, x: m(x), boxes_apart, (X, [X[i%60:i%60+3, :C] for i in range(64)])),
    'split': (lambda m, x: m(x.T), F.cross_entropy, (X.T.contiguous(), Y), 1,
              dict(split=lambda xb, yb, items: ((xb[0][:, items],), (yb[0][items],)))),
}


def formed(form, loss, batch, n_inp=1, kwargs={}):
    def ours(bs):
        learn = learner(X, Y, model=Form(form), loss=loss, cbs=MicroBatch(bs, **kwargs))
        learn.dls = DataLoaders([batch]*3, [])
        learn.dls.n_inp, learn.dls._device = n_inp, torch.device('cpu')  # where these batches are
        return quiet(learn).model
    def plain():
        model = Form(form)
        opt = torch.optim.SGD(model.parameters(), LR)
        for _ in range(3):
            loss(model(*batch[:n_inp]), *batch[n_inp:]).backward()
            opt.step()
            opt.zero_grad()
        return model
    return ours, plain, Form(form)


for name, form in FORMS.items(): case(f'form: {name}', chunks=(1, 7, 16, 64))(partial(formed, *form))


@pytest.mark.parametrize('name', CASES)
def test_equal_to_a_plain_loop(name):
    one = CASES[name]
    ours, plain, start = one.make()
    expected = plain()
    for bs in one.chunks: assert error(ours(bs), expected, start) <= one.tol, f'{name}, {bs} items at a time'


def test_running_statistics_of_a_whole_head_are_those_of_whole_batches():
    x, y = pictures()
    ours = chunked(16, x, y, model=headed(0.), whole_head=True)
    whole = quiet(learner(x, y, model=headed(0.))).model
    for (name, a), b in zip(ours.named_buffers(), whole.buffers()):
        assert torch.allclose(a.double(), b.double(), atol=1e-12), name


def test_a_frozen_body_runs_once_under_a_whole_head():
    x, y = pictures(64)
    model = headed()
    model[0].requires_grad_(False)
    runs = []
    model[0].register_forward_hook(lambda *args: runs.append(torch.is_grad_enabled()))
    quiet(learner(x, y, model=model, cbs=MicroBatch(16, whole_head=True)))
    assert runs[-4:] == [False]*4 and not any(runs)  # and before them those that look for layers which mix


def test_dropout_in_the_body_is_the_same_in_both_runs_of_a_whole_head():
    x, y = data(64)
    seen = []
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(D, 16, dtype=torch.float64)
        def forward(self, x):
            out = F.dropout(self.lin(x), .5)
            seen.append(out.detach().clone())
            return out
    chunked(16, x, y, model=nn.Sequential(Body(), nn.Linear(16, C, dtype=torch.float64)), whole_head=True)
    seen = seen[-8:]  # before them stand those that look for layers which mix
    assert all(torch.equal(a, b) for a, b in zip(seen[:4], seen[4:]))
    assert not torch.equal(seen[0], seen[1])


# --- what the rest of fastai sees -----------------------------------------------------------------------------------
def test_updates_schedule_and_recorder_are_those_of_whole_batches():
    x, y = data(200)
    class Updates(Callback):
        def before_fit(self): self.n, self.events = 0, []
        def after_step(self): self.n += 1
        def after_batch(self): self.events.append((self.iter, round(self.pct_train, 9)))
    def run(*cbs): return quiet(learner(x, y, opt=Adam, cbs=[Updates(), *cbs]), lambda o: o.fit_one_cycle(2, 1e-2))
    ours, whole = run(MicroBatch(16)), run()
    assert ours.updates.n == whole.updates.n == 8 and ours.updates.events == whole.updates.events
    assert ours.recorder.lrs == whole.recorder.lrs and dict(ours.recorder.hps) == dict(whole.recorder.hps)
    assert torch.allclose(torch.stack(ours.recorder.losses), torch.stack(whole.recorder.losses), atol=1e-6)


def test_training_metrics_see_the_whole_batch():
    x, y = data(200)
    from fastai.metrics import accuracy
    def run(cbs):
        learn = learner(x, y, metrics=accuracy, cbs=cbs)
        learn.recorder.train_metrics = True
        return quiet(learn, lambda o: o.fit(2)).recorder.values[-1]
    assert list(run([MicroBatch(7)])[:2]) == pytest.approx(list(run([])[:2]), abs=1e-6)


def test_lr_find(tmp_path):
    x, y = data(200)
    def run(*cbs): return quiet(learner(x, y, cbs=cbs, path=tmp_path), lambda o: o.lr_find(num_it=30, show_plot=False))
    ours, whole = run(MicroBatch(16)), run()
    assert ours.recorder.lrs == whole.recorder.lrs and len(ours.recorder.lrs) > 10
    assert torch.allclose(torch.stack(ours.recorder.losses), torch.stack(whole.recorder.losses), rtol=1e-5)
    assert torch.equal(vec(ours.model), vec(mlp()))


def test_validation_and_predictions_are_left_alone_if_asked():
    x, y = data(100)
    learn = learner(x, y, cbs=MicroBatch(7, valid=False))
    learn.dls = DataLoaders(learn.dls.train, DataLoader(list(zip(x, y)), bs=50, num_workers=0))
    sizes = []
    learn.model.register_forward_hook(lambda m, inp, out: sizes.append(len(out)))
    with learn.no_bar(), learn.no_logging(): learn.validate(), learn.get_preds()
    assert sizes == [50, 50, 50, 50]


def test_batches_without_targets_are_left_alone():
    x, _ = data(100)
    learn = learner(x, cbs=MicroBatch(7))
    sizes = []
    learn.model.register_forward_hook(lambda m, inp, out: sizes.append(len(out)))
    quiet(learn)
    assert sizes == [64, 36] and torch.equal(vec(learn.model), vec(mlp()))


# --- properties -----------------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 40), bs=st.integers(1, 45), batch=st.integers(1, 30), p=st.floats(0, .95),
       seed=st.integers(0, 999))
def test_any_sizes_and_masks(n, bs, batch, p, seed):
    x, y = data(n, seed)
    y = y.where(torch.rand(n, generator=rng(seed)) >= p, -100)
    y[::batch] = y[::batch].clamp(min=0)  # at least one label in every batch: the loss of none is not a number
    ours = quiet(learner(x, y, bs=batch, cbs=MicroBatch(bs))).model
    assert error(ours, loop((x, y), mlp(), bs=batch), mlp()) < 1e-12


@settings(max_examples=25, deadline=None)
@given(bs=st.integers(1, 70), p=st.floats(0, 1), seed=st.integers(0, 999))
def test_any_masks_of_several_targets(bs, p, seed):
    t, y = table()
    y = y.clone()
    for target in t: y[(torch.rand(200, generator=rng(seed+target.cols.start)) < p), target.cols] = math.nan
    x = data(200)[0]
    expected = loop((x, y), mlp(t.n_out), loss=lambda p, y: three_targets(t)(p, y) + 0*p.sum())
    ours = quiet(learner(x, y, model=mlp(t.n_out), loss=t.loss(), cbs=MicroBatch(bs))).model
    moved = float((vec(expected)-vec(mlp(t.n_out))).norm())
    assert float((vec(ours)-vec(expected)).norm()) <= 1e-12*max(moved, 1e-3)


# --- what is refused ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('bs', [0, -1, 2.5, '16', None, True, [4]])
def test_chunk_size(bs):
    with pytest.raises(ValueError, match='the number of items that are run at a time, a positive int; found'):
        MicroBatch(bs)


class GANTrainer(Callback): "By its name"
class DistributedTrainer(Callback): "By its name"
class ParallelTrainer(Callback): "By its name"
class BPRCallback(Callback): "By its name"
class SoftmaxCallback(Callback): "By its name"
class NonNativeMixedPrecision(Callback): "By its name"


@pytest.mark.parametrize('cb, why', [
    (GradientAccumulation(8), 'it splits the update too'), (MicroBatch(4), 'it splits the update too'),
    (ActivationStats(), 'it keeps what one forward pass'),
    (GANTrainer(), 'two models in turns'), (NonNativeMixedPrecision(), 'use to_fp16'),
    (DistributedTrainer(), 'use across_processes'), (ParallelTrainer(), 'for several processes'),
    (BPRCallback(), 'for the whole batch'), (SoftmaxCallback(), 'for the whole batch')],
    ids=lambda o: type(o).__name__)
def test_refused_by_name(cb, why):
    said = f'cannot be combined with {type(cb).__name__}: .*{why}.*Remove one of the two'
    with pytest.raises(ValueError, match=said):
        quiet(learner(*data(64), cbs=[MicroBatch(8), cb]))


def masked_mse(preds, targs):
    "A mean over the labels that are there: chunks of it do not add up"
    have = ~targs.isnan()
    return F.mse_loss(preds[have].view(-1), targs[have])

def test_a_loss_inside_a_combined_loss_is_looked_at_when_its_labels_begin_to_miss():
    x, y = data(128)
    size = x[:, 0].clone()
    size[70:80] = math.nan  # the first batch is complete
    loss = combined_loss(kind=(F.cross_entropy, C), size=(masked_mse, 1))
    with pytest.raises(ValueError, match='CombinedLoss does not add up over chunks'):
        chunked(8, x, y, size, model=mlp(C+1), loss=loss)


class Sizes(nn.Sequential):
    "A model that notes how many items it is given"
    seen = ()
    def forward(self, x):
        if self.training: self.seen += len(x),
        return super().forward(x)

@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 70), bs=st.integers(1, 80))
def test_chunks_are_few_even_and_never_larger_than_asked(n, bs):
    model = Sizes(*mlp())
    quiet(learner(*data(n), bs=n, model=model, cbs=MicroBatch(bs)))
    assert sum(model.seen) == n and len(model.seen) == math.ceil(n/bs)
    assert max(model.seen) <= bs and max(model.seen) - min(model.seen) <= 1

@pytest.mark.filterwarnings('ignore:BatchNorm takes its statistics')
@pytest.mark.parametrize('bs', [7, 21, 9])
def test_batchnorm_is_never_left_with_one_item(bs):
    model = nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.Linear(8, C)).double()
    quiet(learner(*data(64), model=model, cbs=MicroBatch(bs)))  # 64 is 9*7+1, 3*21+1 and 7*9+1
    assert torch.isfinite(vec(model)).all()


def test_a_distributed_model_is_refused():
    said = r'a model in DataParallel: use across_processes\(learn\) for several processes'
    with pytest.raises(ValueError, match=said):
        quiet(learner(*data(64), model=nn.DataParallel(mlp()), cbs=MicroBatch(8)))


def test_parts_of_unequal_length():
    x, y = data(64)
    learn = learner(x, y, cbs=MicroBatch(8))
    learn.dls = DataLoaders([(x, y[:60])], [])
    said = r'cannot tell which inputs belong to the items of the targets \(tuple\(Tensor\[60\]\)\)'
    with pytest.raises(ValueError, match=said): quiet(learn)


def test_a_loss_that_does_not_add_up_is_refused_before_any_update():
    def contrast(preds, y): return (preds@preds.T).logsumexp(1).mean()
    learn = learner(*data(64), loss=contrast, cbs=MicroBatch(16))
    said = (r'contrast does not add up over chunks: they would train another model than whole batches\. Compared were '
            r'the gradients of 64 items as one batch and as chunks of 21 and 43: they differ by up to .* % of the '
            r'largest.*MicroBatch\(16, whole_head=True\), or give it a method')
    with pytest.raises(ValueError, match=said): quiet(learn)
    assert torch.equal(vec(learn.model), vec(mlp()))
    assert not any(p.grad is not None and p.grad.any() for p in learn.model.parameters())


def test_a_mask_of_ones_own_is_refused_when_it_begins_to_bite():
    x, y = data(128)
    y[64:72] = -1
    def masked(preds, y): return F.cross_entropy(preds, y, ignore_index=-1)
    with pytest.raises(ValueError, match='masked does not add up over chunks'): chunked(16, x, y, loss=masked)


def test_whole_head_needs_parts_and_one_input():
    x, y = data(64)
    parts = r'whole_head needs a model nn.Sequential\(body, head\), as vision_learner makes it, found Linear'
    with pytest.raises(ValueError, match=parts):
        chunked(8, x, y, model=nn.Linear(D, C, dtype=torch.float64), whole_head=True)
    inputs = r'one input, a tensor, found tuple\(.*\): make it one tensor, or use MicroBatch\(8\)'
    with pytest.raises(ValueError, match=inputs): chunked(8, x, x, y, n_inp=2, whole_head=True)


class Centred(nn.Module):
    def forward(self, x): return x - x.mean(0)


# --- BatchNorm ------------------------------------------------------------------------------------------------------
def batchnorm_warnings(model, cb, cbs=(), fits=1):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        learn = learner(*data(128), model=model, cbs=[cb, *cbs])
        for _ in range(fits): quiet(learn)
    return [str(o.message) for o in seen if 'BatchNorm takes' in str(o.message)]


def with_bn(n=2):
    return nn.Sequential(nn.Linear(D, 8), *[nn.BatchNorm1d(8) for _ in range(n)], nn.Linear(8, C)).double()


def test_batchnorm_is_named():
    found, = batchnorm_warnings(with_bn(6), MicroBatch(16))
    assert 'from 16 items, not from the batch of 64' in found and 'Layers: 1, 2, 3, 4 and 2 more.' in found
    for out in ('BnFreeze', 'GroupNorm'): assert out in found
    assert len(batchnorm_warnings(with_bn(), MicroBatch(16), fits=2)) == 2  # once a fit, not once a batch


@pytest.mark.parametrize('norm, said', [(partial(nn.BatchNorm1d, 8), 'BatchNorm takes'), (Centred, 'Layers that look')])
def test_a_whole_head_is_offered_where_the_head_has_what_it_is_for(norm, said):
    def texts(*layers, wrap=nn.Sequential):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            quiet(learner(*data(64), model=wrap(*layers).double(), cbs=MicroBatch(16)))
        text, = [str(o.message) for o in seen if said in str(o.message)]
        return 'whole_head' in text
    class Other(nn.Module):
        "Not a body and a head"
        def __init__(self, *layers):
            super().__init__()
            self.layers = nn.Sequential(*layers)
        def forward(self, x): return self.layers(x)
    body, head = nn.Linear(D, 8), nn.Linear(8, C)
    assert texts(body, nn.Sequential(norm(), head))
    assert not texts(body, norm(), head) and not texts(body, nn.Sequential(norm(), head), wrap=Other)


def test_batchnorm_that_uses_no_batch_statistics_is_not():
    class Still(Callback):
        def before_train(self): self.model[1].eval()
    assert not batchnorm_warnings(with_bn(1), MicroBatch(16), [Still()])
    assert not batchnorm_warnings(with_bn(), MicroBatch(64)) and not batchnorm_warnings(mlp(), MicroBatch(16))


def test_batchnorm_in_a_body_is_named_under_a_whole_head_too():
    model = nn.Sequential(with_bn(1)[:2], nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, C))).double()
    body_only, = batchnorm_warnings(model, MicroBatch(16, whole_head=True))
    assert 'Layers: 0.1.' in body_only and 'whole_head=True)' not in body_only


def test_batchnorm_in_a_body_counts_once_under_a_whole_head():
    model = nn.Sequential(with_bn(1)[:2], nn.Linear(8, C)).double()
    with pytest.warns(UserWarning, match='BatchNorm'): chunked(16, *data(64), model=model, whole_head=True)
    assert int(model[0][1].num_batches_tracked) == 4


# --- interruptions --------------------------------------------------------------------------------------------------
EVENTS = ['before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step', 'after_step',
          'after_batch']
ERRORS = KeyboardInterrupt(), RuntimeError('broken'), CancelFitException(), CancelBatchException()


class Raise(Callback):
    "`error` at the third call of `event`"
    def __init__(self, event, error):
        self.count = 0
        setattr(self, event, lambda: self.tick(error))
    def tick(self, error):
        self.count += 1
        if self.count == 3: raise error


@pytest.mark.parametrize('whole_head', [False, True])
@pytest.mark.parametrize('error_', ERRORS, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize('event', EVENTS)
def test_an_interruption_leaves_nothing(event, error_, whole_head):
    x, y = data(256)
    mix = double_mix(MixUp, .4)
    learn = learner(x, y, loss=y_int(nn.CrossEntropyLoss()), cbs=mix)
    own = {k for k, v in vars(learn).items() if callable(v)}
    try: quiet(learn, lambda o: o.fit(1, cbs=[MicroBatch(16, whole_head), Raise(event, error_)]))
    except (KeyboardInterrupt, RuntimeError): assert type(error_) in (KeyboardInterrupt, RuntimeError)
    except CancelBatchException: assert event == 'after_batch'  # where fastai does not catch it
    assert not [cb for cb in learn.cbs if isinstance(cb, (MicroBatch, Raise))]
    assert {k for k, v in vars(learn).items() if callable(v)} == own  # no method of the learner is replaced
    if learn.xb[0] is not None: assert len(learn.xb[0]) == len(learn.yb[0]) == len(mix.yb1[0]) == len(mix.lam) == 64
    # Who cancels a batch that has its gradient adds up several, as fastai's own accumulation does
    added_up = isinstance(error_, CancelBatchException) and event in ('after_backward', 'before_step', 'after_step')
    if not added_up: assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())
    learn.opt.zero_grad()
    learn.remove_cb(mix)
    learn.loss_func = F.cross_entropy
    learn.model.load_state_dict(mlp().state_dict())
    learn.create_opt()
    assert error(quiet(learn).model, loop((x, y), mlp()), mlp()) < 1e-12


def test_an_error_of_the_model_stays_its_own():
    class Own(Exception): pass
    class Broken(nn.Sequential):
        def forward(self, x): raise Own
    with pytest.raises(Own) as e: quiet(learner(*data(64), model=Broken(*mlp()), cbs=MicroBatch(16)))
    assert e.value.args == ()


# --- out of memory --------------------------------------------------------------------------------------------------
class Card(nn.Sequential):
    "A card that holds `room` items, and uses random numbers and a buffer before it finds out"
    room = 10
    def __init__(self, *layers):
        super().__init__(*layers)
        self.register_buffer('calls', torch.zeros(()))
    def forward(self, x):
        self.calls += 1
        x = F.dropout(x, .3)
        if len(x) > self.room: raise self.error('simulated')
        return super().forward(x)
    error = torch.OutOfMemoryError


def card(room=10, error=torch.OutOfMemoryError):
    m = Card(*mlp())
    m.room, m.error = room, error
    return m


@pytest.mark.parametrize('begin, room, settled', [
    (64, 10, 8), (64, 63, 32), (48, 11, 12), (1000, 10, 8), (64, 1, 1), (7, 6, 4)])
def test_a_run_that_halves_equals_one_that_began_there(begin, room, settled):
    x, y = data(200)
    def run(bs, auto):
        model, cb = card(room), MicroBatch(bs, auto=auto)
        torch.manual_seed(3)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            quiet(learner(x, y, model=model, cbs=cb), lambda o: o.fit(2))
        return model, cb.bs, [str(o.message) for o in seen if 'ran out' in str(o.message)]
    (ours, bs, said), (there, *_) = run(begin, True), run(settled, False)
    assert bs == settled
    assert said == [f'MicroBatch ran out of memory with {begin} items at a time and goes on with {settled}']
    assert torch.equal(vec(ours), vec(there)) and ours.calls == there.calls


def test_memory_errors_of_a_cpu_count_too():
    def cpu_error(_): return RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
    cb = MicroBatch(64, auto=True)
    with pytest.warns(UserWarning, match='goes on with 8'):
        quiet(learner(*data(64), model=card(error=cpu_error), cbs=cb))
    assert cb.bs == 8


def test_when_even_one_item_does_not_fit_the_error_comes_through():
    def run(model, cb): return quiet(learner(*data(64), model=model, cbs=cb))
    with pytest.raises(torch.OutOfMemoryError): run(card(0), MicroBatch(64, auto=True))
    with pytest.raises(torch.OutOfMemoryError): run(card(), MicroBatch(64))
    another = card(error=lambda _: RuntimeError('another'))
    with pytest.raises(RuntimeError, match='another'): run(another, MicroBatch(64, auto=True))


# --- mixed precision ------------------------------------------------------------------------------------------------
class BF16(MixedPrecision):
    "fastai's mixed precision, on a CPU, with a count of how often autocast is on"
    def before_fit(self):
        super().before_fit()
        self.autocast, self.depth, self.entered = torch.autocast('cpu', torch.bfloat16), 0, 0
    def before_batch(self):
        super().before_batch()
        self.depth += 1
        self.entered += 1
    def after_loss(self):
        super().after_loss()
        self.depth -= 1


def bf16_run(*cbs):
    x, y = data(192)
    m = mlp().float()
    learn = quiet(learner(x.float(), y, model=m, cbs=[BF16(amp_mode='bf16'), *cbs]))
    assert next(o for o in learn.cbs if isinstance(o, BF16)).depth == 0
    return m.double()


@pytest.mark.parametrize('cb', [MicroBatch(16), MicroBatch(16, whole_head=True)], ids=['chunks', 'whole head'])
def test_bfloat16_is_as_near_to_float64_as_whole_batches(cb):
    truth, start = quiet(learner(*data(192))).model, mlp()
    whole = error(bf16_run(), truth, start)
    assert whole > 1e-4  # in bfloat16
    assert error(bf16_run(cb), truth, start) <= 1.5*whole


def test_autocast_is_on_in_every_chunk_and_left_after_an_error():
    x, y = data(64)
    learn = learner(x.float(), y, model=mlp().float(), cbs=[BF16(amp_mode='bf16'), MicroBatch(16)])
    on = []
    learn.model.register_forward_hook(lambda *args: on.append(torch.is_autocast_enabled('cpu')))
    quiet(learn)
    assert on[-4:] == [True]*4 and not torch.is_autocast_enabled('cpu')
    with pytest.raises(KeyboardInterrupt):
        quiet(learn, lambda o: o.fit(1, cbs=Raise('after_pred', KeyboardInterrupt())))
    assert not torch.is_autocast_enabled('cpu')


class Scaled(BF16):
    "Mixed precision with a loss scaler that works on a CPU"
    def before_fit(self):
        super().before_fit()
        self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=2.**10, growth_interval=2)


def test_loss_scaler_skips_like_a_whole_batch():
    x, y = data(256)
    x = x.float()
    x[70] = math.inf  # in the second chunk of the second batch
    runs = []
    for cbs in ([], [MicroBatch(4)], [MicroBatch(64, whole_head=True)]):
        learn = quiet(learner(x, y, model=mlp().float(), cbs=[Scaled(amp_mode='bf16'), *cbs]), lambda o: None)
        cb = next(o for o in learn.cbs if isinstance(o, Scaled))
        scales = []
        class Keep(Callback):
            def after_batch(self): scales.append(self.learn.scaler.get_scale())
        quiet(learn, lambda o: o.fit(1, cbs=Keep()))
        runs.append((scales, vec(learn.model)))
    assert runs[0][0] == runs[1][0] == runs[2][0] == [1024., 512., 512., 1024.]
    for _, weights in runs: assert weights.isfinite().all() and torch.allclose(weights, runs[0][1], atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize('cb', [MicroBatch(16), MicroBatch(16, whole_head=True)], ids=['chunks', 'whole head'])
def test_cuda_fp16_is_as_near_to_float64_as_whole_batches(cb):
    "The truth is a plain loop in float64; the loss scale is low enough for every step"
    def run(x, y, *cbs):
        mixed = MixedPrecision(init_scale=2.**10)
        return quiet(learner(x.float().cuda(), y.cuda(), model=mlp().float().cuda(), cbs=[mixed, *cbs])).model
    chunks, whole = [], []
    for seed in range(4):
        x, y = data(640, seed)
        truth = loop((x, y), mlp())
        for errors, cbs in ((whole, []), (chunks, [cb])):
            errors.append(error(run(x, y, *cbs).cpu().double(), truth, mlp()))
    assert 0 < sum(chunks) <= 1.1*sum(whole)


@pytest.mark.gpu
def test_a_full_gpu_is_met_by_halving():
    class Hungry(nn.Sequential):
        "Takes a fortieth of the card for every item"
        def forward(self, x):
            total = torch.cuda.mem_get_info()[1]
            return super().forward(x) + 0*torch.empty(len(x)*total//40, dtype=torch.uint8, device='cuda').sum()
    x, y = (o.cuda() for o in data(64))
    learn = learner(x.float(), y, model=Hungry(*mlp().float()).cuda(), cbs=(cb := MicroBatch(64, auto=True)))
    with pytest.warns(UserWarning, match='ran out of memory'): quiet(learn)
    assert 1 < cb.bs < 64


def test_the_callback_copies_and_pickles():
    import pickle
    cb = pickle.loads(pickle.dumps(deepcopy(MicroBatch(16, whole_head=True, auto=True))))
    assert (cb.bs, cb.whole_head, cb.auto) == (16, True, True)


# --- outputs --------------------------------------------------------------------------------------------------------
class Peek(Callback):
    reads_outputs = False
    def after_batch(self): self.seen = self.learn.pred.shape


def test_an_output_that_is_read_though_not_kept_is_refused():
    with pytest.raises(RuntimeError, match=r'did not keep the output of this batch.*MicroBatch\(bs, keep=True\)'):
        quiet(learner(*data(64), cbs=[Peek(), MicroBatch(16, keep=False)]))
    assert quiet(learner(*data(64), cbs=[Peek(), MicroBatch(16, keep=True)])).peek.seen == (64, C)


def test_nothing_of_a_chunk_is_alive_when_the_next_one_begins():
    alive = []
    class Notes(nn.Module):
        def __init__(self):
            super().__init__()
            self.m, self.last = mlp(), []
        def forward(self, x):
            alive.append(sum(o() is not None for o in self.last))
            out = self.m(x)
            self.last.append(weakref.ref(out))
            return out
    class NotRead(Float32Loss): reads_outputs = False
    for keep in (False, True):
        learn = learner(*data(64), model=Notes(), cbs=MicroBatch(16, keep=keep))
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            quiet(learn)
    assert not any(alive)


class Peaks(Callback):
    "The most bytes that were alive in each batch"
    order, reads_outputs = -1000, False
    def __init__(self, alive): self.alive, self.seen = alive, []
    def before_batch(self): self.alive.most = self.alive.now
    def after_cancel_batch(self): self.seen.append(self.alive.most)


def convolutions(n_out, *head):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, n_out, 1), *head)


def own_cross_entropy(preds, targ): return F.cross_entropy(preds, targ)


@pytest.mark.usefixtures('on_cpu')
@pytest.mark.parametrize('accum', [2, 4, 8])
@pytest.mark.parametrize('model, target, loss', [
    (convolutions(21), torch.randint(21, (16, 96, 96)), CrossEntropyLossFlat(axis=1)),
    (convolutions(3), torch.rand(16, 3, 96, 96), lambda p, t: (p-t).square().mean()),
    (convolutions(16, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)), torch.arange(16)%5, own_cross_entropy)],
    ids=['segmentation', 'pictures', 'classes'])
def test_the_first_batch_with_its_checks_takes_no_more_memory_than_the_next(accum, model, target, loss):
    x = torch.rand(16, 3, 96, 96)
    learn = learner([0], model=deepcopy(model), loss=loss)
    learn.dls = DataLoaders([(x, target)]*3, [])
    learn.remove_cb(Float32Loss)
    with Alive(x, target, *learn.model.parameters()) as alive:
        peaks = Peaks(alive)
        quiet(learn, lambda o: o.fit(1, cbs=[MicroBatch(16//accum), peaks]))
    first, second, third = peaks.seen
    assert second == pytest.approx(third, rel=.01) and first <= 1.03*second


class Overwriting(nn.Module):
    "As CUDA graphs: every output and every new gradient is spoiled when the next chunk begins"
    def __init__(self):
        super().__init__()
        self.m, self.last = mlp(), []
    def forward(self, x):
        for o in self.last: o.fill_(math.nan)
        out = self.m(x)
        self.last = [out.data]
        return out


def test_what_is_kept_survives_memory_that_is_used_again(monkeypatch):
    from paddy_multi.accumulate import microbatch
    monkeypatch.setattr(microbatch, 'reuses_memory', lambda model: True)
    begun = []
    monkeypatch.setattr(torch.compiler, 'cudagraph_mark_step_begin', lambda: begun.append(1))
    x, y = data(64)
    valid = DataLoader(list(zip(x, y)), bs=64, num_workers=0)
    class Spoil(Callback):
        "The first gradients too"
        order, grads = 99, ()
        def before_backward(self):
            for o in self.grads: o.fill_(math.nan)
            self.grads = []
            for p in self.model.parameters():
                if p.grad is None: p.register_hook(lambda g: self.grads.append(g))
    class Keep(Callback):
        def after_batch(self): self.out = self.learn.pred.clone()
    learn = learner(x, y, model=Overwriting(), cbs=[Keep(), MicroBatch(16)])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        quiet(learn)
    assert error(learn.model, loop((x, y), mlp()), mlp()) < 1e-12
    assert torch.allclose(learn.keep.out, mlp()(x).detach(), atol=1e-12)
    assert len(begun) == 4
    with learn.no_bar(): preds, _ = learn.get_preds(dl=valid)
    assert torch.allclose(preds, learn.model(x).detach(), atol=1e-12) and len(begun) == 8


# --- validation -----------------------------------------------------------------------------------------------------
def contrast(preds, y, reduction='mean'):
    loss = F.cross_entropy(preds, y, reduction='none') + (preds@preds.T).logsumexp(1)
    return loss if reduction == 'none' else loss.mean()


@pytest.mark.parametrize('whole_head', [False, True])
@pytest.mark.parametrize('loss', [F.cross_entropy, CrossEntropyLossFlat(), contrast, nn.CrossEntropyLoss()],
                         ids=['function', 'fastai', 'does not add up', 'module'])
def test_validation_and_predictions_in_chunks_are_those_without(loss, whole_head):
    from fastai.metrics import accuracy
    x, y = data(100)
    def run(cbs, sizes):
        learn = learner(x, y, loss=loss, metrics=accuracy, cbs=cbs)
        learn.dls.loaders.pop()
        learn.dls.loaders.append(DataLoader(list(zip(x, y)), bs=60, num_workers=0))
        learn.model.register_forward_hook(lambda m, inp, out: sizes.append(len(out)))
        with learn.no_bar():
            values = learn.validate()
            preds = learn.get_preds(with_loss=True, with_input=True)
        assert not learn.lock.locked()
        return [*values, *preds]
    sizes = []
    for a, b in zip(run([], []), run([MicroBatch(16, whole_head)], sizes)):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b)) or \
            torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=1e-12)
    assert whole_head or max(sizes) == 15


def test_predictions_without_targets_in_chunks():
    x, y = data(100)
    learn, sizes = learner(x, y, cbs=MicroBatch(7)), []
    learn.model.register_forward_hook(lambda m, inp, out: sizes.append(len(out)))
    with learn.no_bar(): preds, targs = learn.get_preds(dl=[(x[:64],), (x[64:],)], reorder=False)
    assert torch.allclose(preds, learn.model(x).detach(), atol=1e-12) and max(sizes[2:-1]) == 7


@pytest.mark.parametrize('event', ['model', 'after_pred', 'after_loss'])
@pytest.mark.parametrize('cls', [KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_error_in_validation_leaves_nothing(event, cls):
    x, y = data(64)
    learn = learner(x.float(), y, model=mlp().float(), cbs=[BF16(amp_mode='bf16'), MicroBatch(16)])
    calls = []
    def fail(*args):
        calls.append(1)
        if len(calls) >= (3 if event == 'model' else 1): raise cls('stopped')
    cb = Callback() if event == 'model' else Callback(**{event: fail})
    if event == 'model': learn.model.register_forward_hook(fail)
    cb.order = -60  # before mixed precision leaves
    for cb_ in learn._grab_cbs(BF16): cb_.before_fit()
    with learn.no_bar(), pytest.raises(cls): learn.validate(dl=[(x.float(), y)], cbs=cb)
    assert not learn.lock.locked() and not torch.is_autocast_enabled('cpu') and len(learn.xb[0]) == 64
    assert autocast_depth() == 0


@pytest.mark.parametrize('event', ['after_pred', 'after_loss', 'before_backward', 'after_backward'])
@pytest.mark.parametrize('whole_head', [False, True])
def test_autocast_is_left_after_an_error_anywhere(event, whole_head):
    x, y = data(64)
    stop = Raise(event, KeyboardInterrupt())
    stop.order, stop.count = -60, 2
    learn = learner(x.float(), y, model=mlp().float(), cbs=[BF16(amp_mode='bf16'), MicroBatch(16, whole_head)])
    with pytest.raises(KeyboardInterrupt): quiet(learn, lambda o: o.fit(1, cbs=stop))
    assert autocast_depth() == 0 and not torch.is_autocast_enabled('cpu')
    assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())


def test_auto_halves_in_validation():
    x, y = data(64)
    class Small(nn.Sequential):
        def forward(self, x):
            if len(x) > 10: raise torch.OutOfMemoryError('simulated')
            return super().forward(x)
    learn = learner(x, y, model=Small(*mlp()), cbs=(cb := MicroBatch(32, auto=True)))
    with learn.no_bar(), pytest.warns(UserWarning, match='goes on with 8'):
        preds, _ = learn.get_preds(dl=[(x, y)], reorder=False)
    assert cb.bs == 8 and torch.allclose(preds, mlp()(x).detach(), atol=1e-12)


@pytest.mark.parametrize('bs', [1, 7, 16])
def test_validation_before_any_fit(bs):
    "Of a loss that is not known, whose outputs nobody reads"
    x, y = data(100)
    def values(*cbs):
        learn = unread(learner(x, y, loss=lambda p, t: F.cross_entropy(p, t), cbs=cbs))
        with learn.no_bar(): return learn.validate(dl=[(x[:64], y[:64]), (x[64:], y[64:])])
    assert list(values(MicroBatch(bs))) == pytest.approx(list(values()), abs=1e-12)


def test_whether_items_are_mixed_is_asked_of_the_model_that_is_there():
    x, y = data(64)
    learn, largest = learner(x, y, cbs=MicroBatch(16)), []
    for model in (mlp(), nn.Sequential(Centred(), *mlp())):
        sizes, learn.model = [], model
        model.register_forward_hook(lambda m, inp, out: sizes.append(len(out)))
        with learn.no_bar(): learn.validate(dl=[(x, y)])
        largest.append(max(sizes))
    assert largest == [16, 64]


@pytest.mark.usefixtures('on_cpu')
@pytest.mark.parametrize('bs', [4, 8])
def test_the_first_batch_of_validation_takes_no_more_memory_than_the_next(bs):
    x, y = torch.rand(16, 3, 48, 48), torch.arange(16)%5
    model = convolutions(16, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    learn = learner([0], model=model, loss=F.cross_entropy)
    learn.remove_cb(Float32Loss)
    with Alive(x, y, *model.parameters()) as alive, learn.no_bar():
        peaks = Peaks(alive)
        learn.validate(dl=[(x, y)]*2, cbs=[MicroBatch(bs), peaks])
    assert peaks.seen[0] <= 1.01*peaks.seen[1]


# --- batches with time first ----------------------------------------------------------------------------------------
class TimeFirst(nn.Module):
    def __init__(self, last=True):
        super().__init__()
        torch.manual_seed(1)
        self.rnn, self.out, self.last = nn.GRU(3, 8), nn.Linear(8, C), last
        self.double()
    def forward(self, x):
        out = self.out(self.rnn(x)[0])
        return out if self.last else out.transpose(1, 2)


def times(n=20):
    g = rng(4)
    labels = torch.randint(C, (9, n), generator=g)
    labels[4:, :n//2] = -100
    return torch.randn(9, n, 3, generator=g, dtype=torch.float64), labels


def second(xb, yb, items): return (xb[0][:, items],), (yb[0][:, items],)


def timed(bs, loss, last=False, **kwargs):
    x, y = times()
    learn = unread(learner(x, y, model=TimeFirst(last), loss=loss, cbs=MicroBatch(bs, split=second, **kwargs)))
    learn.dls = DataLoaders([(x, y)]*3, [(x, y)])
    learn.dls.n_inp, learn.dls._device = 1, torch.device('cpu')
    return learn


@pytest.mark.parametrize('bs', [1, 7, 9, 10, 20])
@pytest.mark.parametrize('loss', [F.cross_entropy, nn.CrossEntropyLoss(torch.tensor([1., 5, .1, 2, 9]).double()),
                                  nn.CrossEntropyLoss(reduction='sum')], ids=['mean', 'weights', 'sum'])
def test_a_cross_entropy_with_time_first(bs, loss):
    x, y = times()
    model = TimeFirst(False)
    opt = torch.optim.SGD(model.parameters(), 1e-2)
    for _ in range(3):
        loss(model(x), y).backward()
        opt.step()
        opt.zero_grad()
    learn = timed(bs, loss)
    assert error(quiet(learn, lambda o: o.fit(1, 1e-2)).model, model, TimeFirst(False)) < 1e-12
    assert learn.recorder.values[-1][-1] == pytest.approx(float(loss(model(x), y)), rel=1e-6)


def test_what_time_first_cannot_do_is_refused():
    def steps(p, t): return F.cross_entropy(p.reshape(-1, C), t.reshape(-1))
    with pytest.raises(ValueError, match='needs the output of a chunk with its items along the first dimension'):
        quiet(timed(7, steps, last=True))
    with pytest.raises(ValueError, match='cannot tell the items in the output of the model'):
        quiet(timed(7, F.cross_entropy, keep=True))


# --- losses whose values hide what is wrong -------------------------------------------------------------------------
def test_advantages_normalised_over_the_batch_are_refused():
    x, y = data(64)
    adv = torch.randn(64, generator=rng(5)).double()*3+1
    def policy(p, a, adv):
        lp = p.log_softmax(1).gather(1, a[:, None])[:, 0]
        return -((adv-adv.mean())/adv.std()*(lp-lp.detach()).exp()).mean()
    with pytest.raises(ValueError, match='policy does not add up'): chunked(16, x, y, adv, loss=policy)


def test_padding_inside_a_function_beside_a_price_is_refused():
    x, y = data(64)
    price = 200_000+50_000*torch.randn(64, generator=rng(5)).double()
    def both(p, y, t): return F.cross_entropy(p[:, :C], y, ignore_index=0) + F.mse_loss(p[:, C], t)
    with pytest.raises(ValueError, match='both does not add up'): chunked(16, x, y, price, model=mlp(C+1), loss=both)


def test_two_learners_in_two_threads_share_a_loss():
    x, y = data(200)
    loss = nn.CrossEntropyLoss(torch.tensor([1., 5, .1, 2, 9]).double())
    models = [mlp(), mlp()]
    expected = loop((x, y), mlp(), epochs=10, loss=deepcopy(loss))
    learns = [learner(x, y, model=m, loss=loss, cbs=MicroBatch(7)) for m in models]
    for learn in learns:
        for cb in [o for o in learn.cbs if type(o).__name__ == 'ProgressCallback']: learn.remove_cb(cb)
        learn.logger = lambda *args: None
    threads = [threading.Thread(target=o.fit, args=(10,)) for o in learns]
    for o in threads: o.start()
    for o in threads: o.join()
    for m in models: assert error(m, expected, mlp()) < 1e-12
    assert loss.reduction == 'mean'


def test_layers_that_mix_and_buffers_that_change_are_warned_of_once_a_fit():
    class Stats(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('seen', torch.zeros(D).double())
        def forward(self, x):
            self.seen.add_(x.detach().mean(0))
            return x - x.mean(0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        quiet(learner(*data(128), model=nn.Sequential(Stats(), *mlp()), cbs=MicroBatch(16)))
        quiet(learner(*data(128), cbs=MicroBatch(16)))
    said, = [str(o.message) for o in seen if 'Updates in chunks' in str(o.message)]
    assert '0 (Stats)' in said and '0.seen' in said


def test_cancelling_backward_is_that_of_the_batch():
    x, y = data(128)
    class Skip(Callback):
        "The second batch, at its third chunk"
        def before_fit(self): self.count, self.cancelled = 0, 0
        def before_backward(self):
            self.count += 1
            if self.count == 7: raise CancelBackwardException
        def after_cancel_backward(self): self.cancelled += 1
    learn = quiet(learner(x, y, cbs=[Skip(), MicroBatch(16)]))
    assert learn.skip.cancelled == 1 and learn.skip.count == 8
    assert error(learn.model, loop((x[:64], y[:64]), mlp()), mlp()) < 1e-12
