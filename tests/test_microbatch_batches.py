"MicroBatch from batch to batch of a fit: what it looks at, what it gathers, what it compares; against whole batches"
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import (Callback, CancelBackwardException, CancelBatchException, CancelEpochException,
                                  CancelTrainException)
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD
from torch import nn

from paddy_multi.accumulate.microbatch import MicroBatch

pytestmark = pytest.mark.filterwarnings('ignore:.*CUDA is not available', 'ignore:.*ran out of memory')
D, C = 6, 4


class Float32Loss(Callback):
    "fastai's recorder cannot take a float64 loss"
    order, reads_outputs = -50, False
    def after_loss(self): self.learn.loss = self.learn.loss.float()


class Count(Callback):
    "Batches that were begun"
    order, reads_outputs, n = -60, False, 0
    def before_batch(self): self.n += 1


def data(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=g, dtype=torch.float64)
    return x, (x@torch.randn(D, C, generator=g, dtype=torch.float64)).argmax(1)


def batches(n, bs=64): return list(zip(*(o.split(bs) for o in data(n))))


def mlp(n_out=C, *first):
    torch.manual_seed(1)
    return nn.Sequential(*first, nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, n_out)).double()


def learner(batches, model, *cbs, loss=F.cross_entropy, n_inp=1, valid=()):
    dls = DataLoaders(batches, list(valid))
    dls.n_inp, dls._device = n_inp, torch.device('cpu')
    learn = Learner(dls, model, loss_func=loss, opt_func=SGD, lr=.1, cbs=[Float32Loss(), *cbs])
    learn.remove_cb(learn.progress)
    learn.logger = lambda *args: None
    return learn


def fitted(*args, epochs=1, **kwargs):
    learn = learner(*args, **kwargs)
    learn.fit(epochs)
    return learn


def vec(model): return torch.cat([p.detach().flatten() for p in model.parameters()])


def error(make, batches, *cbs, microbatch, epochs=1, **kwargs):
    "Distance to a fit of whole batches, relative to how far that moved"
    whole = fitted(deepcopy(batches), make(), *deepcopy(cbs), epochs=epochs, **kwargs)
    ours = fitted(deepcopy(batches), make(), *cbs, microbatch, epochs=epochs, **kwargs)
    return float((vec(ours.model)-vec(whole.model)).norm()/(vec(whole.model)-vec(make())).norm())


class Small(nn.Sequential):
    "A card that holds `room` items"
    room = 9
    def forward(self, x):
        out = super().forward(x)
        if self.training and len(x) > self.room: raise torch.OutOfMemoryError('simulated')
        return out


# --- what is looked at ----------------------------------------------------------------------------------------------
def balanced(preds, y):
    "As much weight for the positives of a batch as for the others"
    y = (y == 0).double()
    each = F.binary_cross_entropy_with_logits(preds.squeeze(-1), y, reduction='none')
    return (each*y).sum()/y.sum().clamp(min=1) + (each*(1-y)).sum()/(1-y).sum().clamp(min=1)


@pytest.mark.parametrize('room', [9, 99])
def test_the_loss_is_looked_at_in_a_batch_that_ran_out_of_memory_too(room):
    model, count = Small(*mlp(1)), Count()
    model.room = room
    with pytest.raises(ValueError, match='balanced does not add up'):
        fitted(batches(640), model, count, MicroBatch(16, auto=True), loss=balanced)
    assert count.n == 1 and torch.equal(vec(model), vec(mlp(1)))


def hinge(preds, y):
    "Mean over the items that are not yet right by a margin"
    each = F.relu(1-preds.squeeze(-1)*y)
    return each.sum()/(each > 0).sum().clamp(min=1)


def test_a_loss_that_begins_to_leave_out_items_is_refused_soon():
    x = torch.randn(64*40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = (x@torch.tensor([2., -1, .5]).double()).sign()
    model, count = nn.Linear(3, 1).double(), Count()
    for p in model.parameters(): nn.init.zeros_(p)
    with pytest.raises(ValueError, match='hinge does not add up'):
        fitted(list(zip(x.split(64), y.split(64))), model, count, MicroBatch(16), loss=hinge)
    assert 1 < count.n <= 16


def test_that_a_loss_adds_up_is_known_of_that_loss_alone():
    def contrast(preds, y): return (preds@preds.T).logsumexp(1).mean()
    def own(preds, y): return F.cross_entropy(preds, y)
    mb, valid = MicroBatch(16), batches(64)
    first, second = learner(batches(64), mlp(), mb, loss=own), learner(batches(64), mlp(), loss=contrast, valid=valid)
    first.fit(1)
    first.remove_cb(mb)
    assert mb._adds_up is own
    expected, ours = second.validate(), second.validate(cbs=[mb])
    assert list(ours) == pytest.approx(list(expected), rel=1e-12)


def test_a_distribution_is_to_be_made_in_the_loss():
    class Dist(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = mlp(2)
        def forward(self, x):
            mean, scale = self.lin(x).unbind(1)
            return torch.distributions.Normal(mean, F.softplus(scale)+.1)
    def nll(dist, y): return -dist.log_prob(y).mean()
    said = r'found Normal for 8 items\. Let the model give tensors, as \(mean, scale\), and the loss make the distrib'
    with pytest.raises(ValueError, match=said): fitted(batches(64), Dist(), MicroBatch(8), loss=nll)


# --- inputs ---------------------------------------------------------------------------------------------------------
class Shared(nn.Module):
    "Scales its outputs by what all items share"
    def __init__(self):
        super().__init__()
        self.body = mlp()
    def forward(self, x, shared): return self.body(x)*shared.sum(0)


def shared_batches(*sizes):
    shared = torch.rand(8, C, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x, y = (o.split(sizes) for o in data(sum(sizes)))
    return [(a, shared, b) for a, b in zip(x, y)]


def test_what_all_items_share_may_not_be_as_long_as_a_later_batch():
    def run(*sizes, **kwargs):
        return error(Shared, shared_batches(*sizes), microbatch=MicroBatch(4, **kwargs), n_inp=2)
    assert run(64, 64, 9) < 1e-12
    said = r'which parts of a batch belong to its items, as this one does by its length in a batch of 8.*Tensor\[8, 4\]'
    with pytest.raises(ValueError, match=said): run(64, 64, 8)
    def split(xb, yb, items): return (xb[0][items], xb[1]), (yb[0][items],)
    assert run(64, 64, 8, split=split) < 1e-12


def test_validation_is_compared_with_training():
    *train, last = shared_batches(64, 64, 8)
    said = 'as this one does by its length in a batch of 8'
    with pytest.raises(ValueError, match=said):
        fitted(train, Shared(), MicroBatch(4), n_inp=2, valid=[last])


class Doubles(nn.Module):
    def forward(self, x): return x.mul_(2)


@pytest.mark.parametrize('first', [Doubles(), nn.ReLU(inplace=True)], ids=lambda o: type(o).__name__)
def test_a_body_may_change_its_input_in_place_under_a_whole_head(first):
    head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, C)).double()
    def make(): return nn.Sequential(mlp(8, first), deepcopy(head))
    assert error(make, batches(128), microbatch=MicroBatch(16, whole_head=True)) < 1e-12


def test_a_batch_that_was_changed_in_place_is_not_run_again():
    with pytest.raises(torch.OutOfMemoryError) as e:
        fitted(batches(64), Small(*mlp(C, Doubles())), MicroBatch(16, auto=True))
    assert 'as the model has changed its input in place: let it leave its input alone' in e.value.__notes__[0]
    assert error(lambda: mlp(C, Doubles()), batches(64), microbatch=MicroBatch(16, auto=True)) < 1e-12


def test_a_split_is_called_little_more_than_once_a_chunk():
    calls = []
    def split(xb, yb, items):
        calls.append(items)
        return (xb[0][items],), (yb[0][items],)
    fitted(batches(64), mlp(), MicroBatch(8, split=split))
    assert len(calls) == 8+2  # how many items there are, and where


def test_a_hook_on_the_gradients_of_a_module_is_refused():
    model = mlp()
    model[0].register_full_backward_hook(lambda m, got, gave: tuple(o and o/o.norm() for o in got))
    with pytest.raises(ValueError, match=r"a hook on the gradients of '0' \(Linear\), which would run once a chunk"):
        fitted(batches(64), model, MicroBatch(8))


# --- gradients of the batches before --------------------------------------------------------------------------------
class AddsUp(Callback):
    "Three batches an update"
    def before_step(self):
        if (self.iter+1)%3: raise CancelBatchException


class CancelsBackward(Callback):
    "That of every batch but the first of three"
    def before_backward(self):
        if self.iter%3: raise CancelBackwardException


def test_batches_that_are_added_up_survive_a_cancelled_backward():
    assert error(mlp, batches(64*6), AddsUp(), CancelsBackward(), microbatch=MicroBatch(16)) < 1e-12


class Once(Callback):
    "Memory runs out in chunk `k` of the second batch of a fit, once"
    def __init__(self, k): self.k, self.count = k, 0
    def after_loss(self):
        self.count += 1
        if self.count == 4+self.k: raise torch.OutOfMemoryError('simulated')


@pytest.mark.parametrize('k', [1, 3])
def test_batches_that_are_added_up_survive_a_batch_that_is_run_again(k):
    whole = fitted(batches(64*6), mlp(), AddsUp()).model
    ours = fitted(batches(64*6), mlp(), AddsUp(), Once(k), mb := MicroBatch(16, auto=True)).model
    assert mb.bs == 8
    assert float((vec(ours)-vec(whole)).norm()/(vec(whole)-vec(mlp())).norm()) < 1e-12


def test_an_error_leaves_the_gradient_that_it_found():
    class Breaks(Callback):
        def after_pred(self):
            if self.iter == 2: raise KeyboardInterrupt
    left = []
    for cbs in ([], [MicroBatch(16)]):
        learn = learner(batches(64*3), mlp(), AddsUp(), Breaks(), *cbs)
        with pytest.raises(KeyboardInterrupt): learn.fit(1)
        left.append(torch.cat([p.grad.flatten() for p in learn.model.parameters()]))
    assert left[0].any() and torch.allclose(*left, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize('event', ['after_pred', 'after_backward', 'before_step', 'after_step'])
@pytest.mark.parametrize('kind', [CancelBatchException, CancelTrainException, CancelEpochException])
def test_what_a_cancelled_batch_leaves_is_that_of_whole_batches(kind, event):
    class Cancels(Callback):
        "The second batch of the first epoch"
        order = 100
        def __init__(self): self.done = False
        def at(self):
            if self.iter != 1 or self.done: return
            self.done = True
            raise kind
    setattr(Cancels, event, Cancels.at)
    assert error(mlp, batches(64*3), Cancels(), microbatch=MicroBatch(16), epochs=2) < 1e-12


# --- models that are made of known layers ---------------------------------------------------------------------------
def test_a_stack_of_known_layers_is_run_for_its_chunks_alone():
    sizes = []
    class Own(nn.Sequential):
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x)
    known, tried = (fitted(batches(128), make(*mlp()), MicroBatch(16)).model for make in (nn.Sequential, Own))
    assert len(sizes) > 8 and sizes[-4:] == [16]*4  # one of one's own is tried
    assert torch.equal(vec(known), vec(tried))
