"Parts of losses over chunks add up to the loss and gradient of the whole batch; what is refused; no object changes"
import copy
import math
import sys
import threading
from collections import namedtuple
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.mixup import CutMix, MixUp
from fastai.losses import (BaseLoss, BCEWithLogitsLossFlat, CrossEntropyLossFlat, FocalLoss, L1LossFlat,
                           LabelSmoothingCrossEntropyFlat, MSELossFlat)
from torch import nn

from paddy_multi.accumulate.chunks import chunk_loss, item_counter, label_count, learner_chunk_loss
from paddy_multi.core.checks import test_close
from paddy_multi.kinds.losses import NamedLoss
from paddy_multi.targets.slices import CombinedLoss, combined_loss

N, C = 11, 4


# --- data -----------------------------------------------------------------------------------------------------------
def rng(seed=0): return torch.Generator().manual_seed(seed)


def normal(*size, seed=0): return torch.randn(*size, generator=rng(seed), dtype=torch.float64)


def labels(*size, gaps=None, seed=1):
    y = torch.randint(C, (N, *size), generator=rng(seed))
    return y if gaps is None else y.where(torch.rand(y.shape, generator=rng(2)) > .4, gaps)


WEIGHT = torch.tensor([1., 2., 5., .5], dtype=torch.float64)
ITEM, DENSE = normal(N, C), normal(N, C, 3, 5)
NUMBER, YES = normal(N, C, seed=3), (normal(N, C, seed=4) > 0).double()


def ce(**kwargs): return partial(F.cross_entropy, **kwargs)


def close(found, expected, eps):
    "Equal to `eps` of the largest number"
    test_close(found, expected, eps*max(1., float(torch.as_tensor(expected).abs().max())))


def gradient(loss, preds):
    preds = preds.detach().requires_grad_()
    value = loss(preds)
    return value.detach(), torch.autograd.grad(value, preds)[0]


def in_chunks(loss, preds, targs, bs):
    part = chunk_loss(loss, *targs)
    return sum(part(p, *t) for p, *t in zip(preds.split(bs), *(o.split(bs) for o in targs)))


# --- each loss over chunks is that of the whole batch ---------------------------------------------------------------
CASES = {
    'labels': (ce(), ITEM, labels()),
    'gaps': (ce(), ITEM, labels(gaps=-100)),
    'weights': (ce(weight=WEIGHT), ITEM, labels()),
    'weights, gaps': (nn.CrossEntropyLoss(WEIGHT), ITEM, labels(gaps=-100)),
    'smoothing, gaps': (ce(label_smoothing=.3), ITEM, labels(gaps=-100)),
    'smoothing, ignored class': (ce(label_smoothing=.3, ignore_index=0), ITEM, labels()),
    'weights, smoothing, gaps': (nn.CrossEntropyLoss(WEIGHT, label_smoothing=.3), ITEM, labels(gaps=-100)),
    'weights, smoothing, ignored class': (ce(weight=WEIGHT, label_smoothing=.3, ignore_index=2), ITEM, labels()),
    'probabilities': (ce(), ITEM, NUMBER.softmax(1)),
    'probabilities, weights': (ce(weight=WEIGHT), ITEM, NUMBER.softmax(1)),
    'probabilities, weights, smoothing': (ce(weight=WEIGHT, label_smoothing=.3), ITEM, NUMBER.softmax(1)),
    'pixels': (ce(), DENSE, labels(3, 5)),
    'pixels, weights, smoothing, gaps': (ce(weight=WEIGHT, label_smoothing=.3), DENSE, labels(3, 5, gaps=-100)),
    'pixels, probabilities': (ce(), DENSE, normal(N, C, 3, 5, seed=5).softmax(1)),
    'pixels, probabilities, weights': (nn.CrossEntropyLoss(WEIGHT), DENSE, normal(N, C, 3, 5, seed=5).softmax(1)),
    'log probabilities': (nn.NLLLoss(WEIGHT), ITEM.log_softmax(1), labels(gaps=-100)),
    'log probabilities of pixels': (partial(F.nll_loss, ignore_index=1), DENSE.log_softmax(1), labels(3, 5)),
    'sum': (nn.CrossEntropyLoss(WEIGHT, reduction='sum'), ITEM, labels()),
    'sum, smoothing, in a partial': (partial(nn.CrossEntropyLoss(reduction='sum')), ITEM, labels(gaps=-100)),
    'mean that a partial names': (ce(weight=WEIGHT, reduction='mean'), ITEM, labels(gaps=-100)),
    'partials in partials': (partial(ce(weight=WEIGHT), label_smoothing=.1), ITEM, labels(gaps=-100)),
    'unsigned labels': (ce(ignore_index=255), ITEM, labels(gaps=255).to(torch.uint8)),
    'divergence, batchmean': (nn.KLDivLoss(reduction='batchmean'), ITEM.log_softmax(1), NUMBER.softmax(1)),
    'squares': (F.mse_loss, ITEM, NUMBER),
    'tags': (nn.BCEWithLogitsLoss(), ITEM, YES),
    'tags, weights': (nn.BCEWithLogitsLoss(WEIGHT), ITEM, YES),
    'tags, weights of positives': (nn.BCEWithLogitsLoss(pos_weight=WEIGHT), ITEM, YES),
    'tags, sum': (nn.BCEWithLogitsLoss(WEIGHT, pos_weight=WEIGHT, reduction='sum'), ITEM, YES),
    'focal, weights': (FocalLoss(weight=WEIGHT), ITEM, labels())}


@pytest.mark.parametrize('bs', [1, 4, 10, N, 50])
@pytest.mark.parametrize('name', CASES)
def test_parts_add_up(name, bs):
    loss, preds, targ = CASES[name]
    value, grad = gradient(lambda o: loss(o, targ), preds)
    total, summed = gradient(lambda o: in_chunks(loss, o, [targ], bs), preds)
    close(total, value, 1e-12)
    close(summed, grad, 1e-13)


FASTAI = {'labels': (CrossEntropyLossFlat(weight=WEIGHT.float()), ITEM, labels(gaps=-100)),
          'pixels': (CrossEntropyLossFlat(axis=1, ignore_index=0), DENSE, labels(3, 5)),
          'pixels, weights': (CrossEntropyLossFlat(axis=1, weight=WEIGHT.float()), DENSE, labels(3, 5, gaps=-100)),
          'probabilities': (CrossEntropyLossFlat(flatten=False), ITEM, NUMBER.softmax(1).float()),
          'bytes': (CrossEntropyLossFlat(), ITEM, labels().to(torch.int8)),
          'smoothing': (LabelSmoothingCrossEntropyFlat(), ITEM, labels()),
          'tags': (BCEWithLogitsLossFlat(pos_weight=WEIGHT.float()), ITEM, YES.float()),
          'squares': (MSELossFlat(), ITEM, NUMBER.float()),
          'distances': (L1LossFlat(reduction='sum'), ITEM, NUMBER.float())}


@pytest.mark.parametrize('bs', [1, 4, N])
@pytest.mark.parametrize('name', FASTAI)
def test_parts_of_fastais_losses_add_up(name, bs):
    loss, preds, targ = FASTAI[name]
    value, grad = gradient(lambda o: loss(o, targ), preds.float())
    total, summed = gradient(lambda o: in_chunks(loss, o, [targ], bs), preds.float())
    close(total, value, 1e-6)
    close(summed, grad, 1e-6)


def test_weighted_smoothed_mean_by_hand():
    "Smoothing spreads a part of a label over the classes by their weights; labels weigh what their classes do"
    eps, y = .3, labels(gaps=-100)
    logs, total, count = ITEM.log_softmax(1), 0., 0.
    for row, label in zip(logs.tolist(), y.tolist()):
        if label == -100: continue
        total -= (1-eps)*float(WEIGHT[label])*row[label] + eps/C*sum(float(w)*o for w, o in zip(WEIGHT, row))
        count += float(WEIGHT[label])
    loss = ce(weight=WEIGHT, label_smoothing=eps)
    test_close(in_chunks(loss, ITEM, [y], 4), total/count, 1e-12)
    test_close(label_count(loss, y), count, 1e-12)


@pytest.mark.parametrize('kwargs', [{}, dict(weight=WEIGHT), dict(label_smoothing=.2),
                                    dict(weight=WEIGHT, label_smoothing=.2)], ids=str)
def test_no_valid_label(kwargs):
    "NaN and no gradient, as PyTorch gives for the whole batch"
    y = torch.full((N,), -100)
    value, grad = gradient(lambda o: F.cross_entropy(o, y, **kwargs), ITEM)
    total, summed = gradient(lambda o: in_chunks(ce(**kwargs), o, [y], 4), ITEM)
    assert math.isnan(value) and math.isnan(total)
    assert torch.equal(grad, summed)


def test_a_chunk_without_a_valid_label():
    y = labels()
    y[:4] = -100
    value, grad = gradient(lambda o: F.cross_entropy(o, y), ITEM)
    total, summed = gradient(lambda o: in_chunks(ce(), o, [y], 4), ITEM)
    close(total, value, 1e-12)
    close(summed, grad, 1e-13)


# --- several targets ------------------------------------------------------------------------------------------------
def four_targets():
    "One loss for columns 0 to 3, 4 and 5, 6, 7 and 8: all that a target's loss can be"
    return combined_loss(
        kind=(nn.CrossEntropyLoss(WEIGHT[:3], label_smoothing=.1), 3),
        tags=(nn.BCEWithLogitsLoss(pos_weight=WEIGHT[:2]), 2, 3.), ignored=None, age=(F.mse_loss, 1, .01),
        total=(nn.L1Loss(reduction='sum'), 1), soft=(ce(weight=WEIGHT[:2]), 2, 0.5))


def their_targets():
    kind = labels(gaps=-100).clamp(max=2)
    return kind, YES[:, :2], labels(), 1000*NUMBER[:, 0], NUMBER[:, 1], NUMBER[:, 2:].softmax(1)


@pytest.mark.parametrize('bs', [1, 4, N])
def test_combined_loss(bs):
    preds, y = normal(N, 9, seed=6), their_targets()
    def by_hand(p):
        return (F.cross_entropy(p[:, :3], y[0], WEIGHT[:3], label_smoothing=.1)
                + 3*F.binary_cross_entropy_with_logits(p[:, 3:5], y[1], pos_weight=WEIGHT[:2])
                + .01*F.mse_loss(p[:, 5], y[3]) + (p[:, 6]-y[4]).abs().sum()
                + .5*F.cross_entropy(p[:, 7:], y[5], WEIGHT[:2]))
    value, grad = gradient(by_hand, preds)
    total, summed = gradient(lambda o: in_chunks(four_targets(), o, y, bs), preds)
    close(total, value, 1e-12)
    close(summed, grad, 1e-12)


def test_combined_loss_refuses_in_chunks_what_it_refuses_whole():
    y, loss = their_targets(), four_targets()
    with pytest.raises(ValueError, match=r'need an output \[bs, 9\], the model gives \[4, 8\]'):
        in_chunks(loss, normal(N, 8), y, 4)
    wrong = *y[:3], y[3][:, None].expand(N, 2), *y[4:]
    with pytest.raises(ValueError, match=r'age: expected targets of the shape of their output'):
        in_chunks(loss, normal(N, 9), wrong, 4)


def known(loss, *targs):
    learn = SimpleNamespace(cbs=[], loss_func=loss, xb=(ITEM,), yb=targs)
    return learner_chunk_loss(learn)[1]


class Penalised(CrossEntropyLossFlat):
    def __call__(self, pred, targ): return super().__call__(pred, targ) + pred.pow(2).mean()


class PenalisedCombined(CombinedLoss):
    def forward(self, preds, *targs): return super().forward(preds, *targs) + preds.pow(2).mean()


class OwnCrossEntropy(nn.CrossEntropyLoss):
    def forward(self, pred, targ): return super().forward(pred, targ) + pred.pow(2).mean()


@pytest.mark.filterwarnings('ignore:size_average and reduce')
@pytest.mark.parametrize('loss', [Penalised(), PenalisedCombined(dict(a=(ce(), C))), OwnCrossEntropy(),
                                  F.mse_loss, partial(F.cross_entropy, size_average=False)],
                         ids=['fastai', 'combined', 'module', 'function', 'old names'])
def test_what_computes_its_own_is_not_taken_for_granted(loss):
    "It goes by items, and is left to the check"
    assert not known(loss, labels())
    p, y = ITEM.float(), labels()
    if loss is F.mse_loss: y = NUMBER.float()
    part = chunk_loss(loss, y)
    test_close(part(p[:4], y[:4]), loss(p[:4], y[:4])*4/N, 1e-6*N)


def test_what_is_known_to_add_up():
    y = labels()
    assert known(ce(weight=WEIGHT), y) and known(CrossEntropyLossFlat(), y) and known(nn.NLLLoss(), y)
    assert known(combined_loss(a=(ce(), 2), b=(nn.CrossEntropyLoss(), 2)), y, y)
    assert not known(combined_loss(a=(ce(), 2), b=(F.mse_loss, 2)), y, y)


@pytest.mark.parametrize('loss', [nn.CrossEntropyLoss(reduction='none'), ce(reduction='none'),
                                  nn.MSELoss(reduction='none'), CrossEntropyLossFlat(reduction='none')])
def test_a_loss_for_each_item_is_refused(loss):
    with pytest.raises(ValueError, match="has reduction='none', and training needs one number a batch: set it to"):
        chunk_loss(loss, labels())


# --- losses with `parts` --------------------------------------------------------------------------------------------
class Masked:
    "Cross-entropy of every column of labels, without those that are missing, and a penalty that belongs to no item"
    reduction = 'mean'
    rows = 0
    def parts(self, preds, targs):
        self.rows = max(self.rows, len(preds['out']))
        valid = targs['y'] != -100
        return (F.cross_entropy(preds['out'], targs['y'], reduction='none')*valid).sum(), valid.sum()
    def penalty(self): return torch.tensor(.25, dtype=torch.float64)


def test_parts_of_nested_outputs_and_targets():
    "Also where `parts` alone says what labels count; a whole batch of outputs is needed at no time"
    y, loss = labels(3, 5, gaps=-100), Masked()
    part = chunk_loss(loss, dict(y=y))
    total = sum(part(dict(out=DENSE[i:i+4], more=None), dict(y=y[i:i+4])) for i in range(0, N, 4))
    test_close(total, F.cross_entropy(DENSE, y) + .25, 1e-12)


class MaskedTensor(Masked):
    def parts(self, preds, targs): return super().parts(dict(out=preds), dict(y=targs))


def test_counting_takes_no_more_rows_than_a_chunk():
    y, loss = labels(3, 5, gaps=-100), MaskedTensor()
    test_close(in_chunks(loss, DENSE, [y], 4), F.cross_entropy(DENSE, y) + .25, 1e-12)
    assert loss.rows == 4
    loss.reduction = 'sum'
    test_close(in_chunks(loss, DENSE, [y], 4), F.cross_entropy(DENSE, y, reduction='sum') + .25, 1e-10)


# --- nested targets -------------------------------------------------------------------------------------------------
Pair = namedtuple('Pair', 'y t')
Y, T = labels(), NUMBER[:, 0]


def of_dict(p, o): return F.cross_entropy(p, o['y']) + F.mse_loss(p[:, 0], o['t'])


def of_items(p, o): return of_dict(p, {k: torch.stack([torch.as_tensor(each[k]) for each in o]) for k in ('y', 't')})


def of_means(p, o): return torch.stack([F.mse_loss(q[0], t.mean()) for q, t in zip(p, o)]).mean()


def of_parts(p, y, o): return of_dict(p, dict(y=y, t=o['t']))


NESTED = {'a dict': (of_dict, lambda i: (dict(y=Y[i], t=T[i]),)),
          'a dict after a tensor': (of_parts, lambda i: (Y[i], dict(t=T[i], name='all', none=None))),
          'a dict that begins with a number': (of_dict, lambda i: (dict(scale=torch.tensor(2.), y=Y[i], t=T[i]),)),
          'a named tuple': (lambda p, o: of_dict(p, o._asdict()), lambda i: (Pair(Y[i], T[i]),)),
          'dicts in a dict': (lambda p, o: of_dict(p, o['a']), lambda i: (dict(a=dict(y=Y[i], t=T[i])),)),
          'two targets in a list': (lambda p, o: of_dict(p, dict(y=o[0], t=o[1])), lambda i: ([Y[i], T[i]],)),
          'a list of items': (of_items, lambda i: ([dict(y=int(y), t=t) for y, t in zip(Y[i], T[i])],)),
          'a list of unequal tensors': (of_means, lambda i: ([T[:k+1] for k in range(N)][i],))}


@pytest.mark.parametrize('bs', [1, 3, 4, N])
@pytest.mark.parametrize('name', NESTED)
def test_nested_targets(name, bs):
    loss, targets = NESTED[name]
    part = chunk_loss(loss, *targets(slice(0, N)))
    def chunked(p): return sum(part(p[i:i+bs], *targets(slice(i, i+bs))) for i in range(0, N, bs))
    value, grad = gradient(lambda p: loss(p, *targets(slice(0, N))), ITEM)
    total, summed = gradient(chunked, ITEM)
    close(total, value, 1e-12)
    close(summed, grad, 1e-13)


def test_the_inputs_count_items_where_targets_are_a_list():
    "Images of equal size in a list look like as many targets; the input of the learner says what they are"
    masks = [NUMBER for _ in range(N)]
    def loss(p, y): return F.mse_loss(p, torch.stack(y).mean((1, 2)))
    learn = SimpleNamespace(cbs=[], loss_func=loss, xb=(T,), yb=(masks,))
    part, total = learner_chunk_loss(learn)[0], 0.
    for i in range(0, N, 4):
        learn.xb = T[i:i+4],
        total = total + part(T[i:i+4], masks[i:i+4])
    test_close(total, ((T-NUMBER.mean())**2).mean(), 1e-12)


def test_counting_can_be_told():
    sizes = iter([6, 2, 4])
    part = chunk_loss(F.mse_loss, T[:6], count=lambda *targs: next(sizes))
    test_close(part(T[:2], T[1:3]) + part(T[2:6], T[3:7]), ((T[:6]-T[1:7])**2).mean(), 1e-12)


def test_targets_without_items_are_refused():
    with pytest.raises(TypeError, match='expected a tensor or a list among the targets, to count items; found'):
        item_counter(dict(a=1), None)


# --- mixed labels ---------------------------------------------------------------------------------------------------
def mixing(mix, loss, lam):
    "A learner in the middle of training with `mix`, whose batch is shuffled into `mix.yb1`"
    learn = SimpleNamespace(loss_func=mix.lf, xb=(ITEM,), yb=(Y,), cbs=[mix], training=True)
    mix.learn, mix.stack_y, mix.old_lf = learn, True, loss
    mix.yb1, mix.lam = (Y.flip(0),), lam
    return learn


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
@pytest.mark.parametrize('mix, lam', [(MixUp(), torch.linspace(.5, 1, N, dtype=torch.float64)),
                                      (CutMix(), torch.tensor(.7, dtype=torch.float64))], ids=['MixUp', 'CutMix'])
def test_mixed_labels(mix, lam, reduction):
    loss = nn.CrossEntropyLoss(WEIGHT, reduction=reduction)
    learn = mixing(mix, loss, lam)
    theirs, own = (F.cross_entropy(ITEM, y, WEIGHT, reduction='none') for y in (Y.flip(0), Y))
    expected = getattr((1-lam)*theirs + lam*own, reduction)()
    test_close(mix.lf(ITEM, Y), expected, 1e-12)  # as fastai mixes the whole batch
    part, total = learner_chunk_loss(learn)[0], 0.
    for i in range(0, N, 4):
        items = slice(i, i+4)
        mix.yb1, mix.lam = (Y.flip(0)[items],), lam[items] if lam.ndim else lam
        total = total + part(ITEM[items], Y[items])
    test_close(total, expected, 1e-12)
    assert mix.old_lf is loss and loss.reduction == reduction


# --- no object that others hold is changed --------------------------------------------------------------------------
PREDS, HALF = ITEM.float(), WEIGHT.float()


def shared_losses():
    flat = CrossEntropyLossFlat(weight=HALF)
    return {'module': nn.CrossEntropyLoss(HALF), 'fastai': flat, 'partial': partial(flat)}


def total_of(name, loss):
    "Of two chunks; with labels that are mixed all into themselves where the name says so"
    if 'mixed' not in name: return in_chunks(loss, PREDS, [Y], 6)
    learn, total = mixing(mix := MixUp(), loss, torch.tensor(1.)), 0.
    part = learner_chunk_loss(learn)[0]
    for p, y in zip(PREDS.split(6), Y.split(6)):
        mix.yb1 = y,
        total = total + part(p, y)
    return total


EXPECTED = {'': float(F.cross_entropy(PREDS, Y, HALF)),
            ', mixed': float(F.cross_entropy(PREDS, Y, HALF, reduction='none').mean())}


@pytest.mark.parametrize('name, mixed', [*product(['module', 'fastai'], EXPECTED), ('partial', '')])
def test_a_loss_is_as_it_was_while_its_parts_are_computed(name, mixed, monkeypatch):
    loss, seen, real = shared_losses()[name], [], F.cross_entropy
    inner = loss
    while hasattr(inner, 'func'): inner = inner.func
    before = copy.copy(vars(inner))
    def watching(*args, **kwargs):
        seen.append(vars(inner) == before and inner.weight is HALF)
        return real(*args, **kwargs)
    monkeypatch.setattr(nn.modules.loss.F, 'cross_entropy', watching)
    test_close(total_of(mixed, loss), EXPECTED[mixed], 1e-6)
    assert seen and all(seen)


@pytest.mark.parametrize('mixed', EXPECTED)
@pytest.mark.parametrize('name', ['module', 'fastai'])
def test_two_threads_share_a_loss(name, mixed):
    "One runs chunks, the other whole batches, a thousand times each: neither ever sees the other"
    loss, wrong, interval = shared_losses()[name], [], sys.getswitchinterval()
    def run(compute, expected):
        for _ in range(1000):
            try: test_close(compute(), expected, 1e-6)
            except Exception as e: wrong.append(e)
    threads = [threading.Thread(target=run, args=(lambda: loss(PREDS, Y), EXPECTED[''])),
               threading.Thread(target=run, args=(lambda: total_of(mixed, loss), EXPECTED[mixed]))]
    sys.setswitchinterval(1e-6)
    try:
        for o in threads: o.start()
        for o in threads: o.join()
    finally: sys.setswitchinterval(interval)
    assert not wrong, wrong[0]


class Watched(nn.CrossEntropyLoss):
    "Notes, whenever any copy of it runs, how `original` reduces"
    original, seen = None, []
    def forward(self, preds, targ):
        self.seen.append((self.reduction, self.original.reduction))
        return super().forward(preds, targ)


@pytest.mark.parametrize('reduction', ['sum', 'none'])
@pytest.mark.parametrize('wrap', [lambda o: o, partial, lambda o: BaseLoss(lambda: o)],
                         ids=['module', 'partial', 'fastai'])
def test_a_target_never_switches_the_reduction_of_its_loss(wrap, reduction):
    "Nor of what fastai wraps, which other learners and threads may be calling"
    loss = Watched()
    Watched.original, Watched.seen = loss, []
    NamedLoss('disease', wrap(loss), C)(PREDS, Y, reduction)
    assert Watched.seen == [(reduction, 'mean')]


def test_two_threads_share_a_loss_by_target():
    "One asks for sums, the other for means, a thousand times each"
    loss, wrong, interval = nn.CrossEntropyLoss(HALF), [], sys.getswitchinterval()
    named = NamedLoss('disease', loss, C)
    expected = {o: F.cross_entropy(PREDS, Y, HALF, reduction=o) for o in ('sum', 'mean')}
    def run(reduction):
        for _ in range(1000):
            found = named(PREDS, Y, reduction)
            if abs(found-expected[reduction]) > 1e-5: wrong.append((reduction, found))
    threads = [threading.Thread(target=run, args=(o,)) for o in expected]
    sys.setswitchinterval(1e-6)
    try:
        for o in threads: o.start()
        for o in threads: o.join()
    finally: sys.setswitchinterval(interval)
    assert not wrong, wrong[0]
