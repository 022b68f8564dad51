"The check of a loss by gradients: losses that do not add up are refused, others pass, against gradients in float64"
import copy
import math
import random
import re
import subprocess
import sys
from collections import namedtuple
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.losses import (BCEWithLogitsLossFlat, CrossEntropyLossFlat, DiceLoss, FocalLossFlat, L1LossFlat,
                           LabelSmoothingCrossEntropyFlat)
from torch import nn

from paddy_multi.accumulate.chunks import chunk_loss
from paddy_multi.accumulate.loss_check import check_adds_up, items_to_check
from paddy_multi.core.nested import map_tensors

# --- data: 52 items, five classes, 8 by 8 pixels ----------------------------------------------------------------------
N, C = 52, 5
G = torch.Generator().manual_seed(1)
Y = torch.randint(0, C, (N,), generator=G)
Y[torch.rand(N, generator=G) < .3] = 0
ADVANTAGE = torch.randn(N, generator=G)*3 + 1
PRICE = 200_000 + 50_000*torch.randn(N, generator=G)
P, R = torch.randn(N, C, generator=G), torch.randn(N, generator=G)
WEIGHT = torch.rand(C, generator=G)
MASK, DENSE = torch.randint(0, C, (N, 8, 8), generator=G), torch.randn(N, C, 8, 8, generator=G)
MASK[:20] = 0


def check(loss, preds, targs, bs=13):
    "As `MicroBatch` calls it: for the outputs and targets of some items"
    width = sum(o[0].numel() for o in leaves(preds) if o.ndim)
    items, split = items_to_check(targs, N, width)
    preds, targs = (map_tensors(lambda o: o[items] if o.ndim else o, o) for o in (preds, targs))
    check_adds_up(loss, partial(chunk_loss, loss), preds, targs, split, bs)


def leaves(o):
    found = []
    map_tensors(found.append, o)
    return found


def true_difference(loss, preds, targs, k=4):
    "Largest difference of the whole batch's gradient from that of `k` chunks, relative to its column, in float64"
    wanted = []
    def exact(o):
        if o.is_floating_point() or o.is_complex():
            o = o.to(torch.promote_types(o.dtype, torch.float64)).requires_grad_()
        if o.requires_grad: wanted.append(o)
        return o
    preds, targs = map_tensors(exact, preds), map_tensors(lambda o: o.double() if o.is_floating_point() else o, targs)
    def grads(total): return [torch.zeros_like(o) if g is None else g for o, g in
                              zip(wanted, torch.autograd.grad(total, wanted, allow_unused=True))]
    chunked, size = 0., N//k
    for i in range(0, N, size):
        p, t = (map_tensors(lambda o: o[i:i+size] if o.ndim else o, o) for o in (preds, targs))
        chunked = chunked + loss(p, *t)/k
    far = 0.
    for a, b in zip(grads(loss(preds, *targs)), grads(chunked)):
        a, b = (o.transpose(0, 1).flatten(1) if o.ndim > 1 else o.reshape(1, -1) for o in (a, b))
        far = max(far, float(((a-b).abs().amax(1)/a.abs().amax(1).clamp(min=1e-12)).max()))
    return far


# --- losses that do not add up ----------------------------------------------------------------------------------------
def ppo(p, a, advantage):
    logs = p.log_softmax(1).gather(1, a[:, None])[:, 0]
    return -(((advantage-advantage.mean())/advantage.std())*(logs-logs.detach()).exp()).mean()


def two_heads(p, y, t): return F.cross_entropy(p[0], y, ignore_index=0) + F.mse_loss(p[1], t)


def elbo(p, y): return F.cross_entropy(p, y, ignore_index=0) + 784*.5*math.log(2*math.pi)*100


def selfnorm(p, y):
    losses = F.cross_entropy(p, y, reduction='none')
    weights = losses.detach()/losses.detach().sum()*len(losses)
    return (weights*(losses-losses.detach())).mean() + losses.detach().mean()


def info_nce(p, y):
    z = F.normalize(p, dim=1)
    return F.cross_entropy(z@z.T/.1, torch.arange(len(z)))


def vicreg(p, y):
    q = p-p.mean(0)
    return F.cross_entropy(p, y) + (q.T@q/len(q)).pow(2).mean()


def one_tensor_price(p, y, t):
    return F.cross_entropy(p[:, :4], y.clamp(max=3), ignore_index=0) + F.mse_loss(p[:, 4], t)


def batch_pos_weight(p, t):
    yes = t > 0
    return F.binary_cross_entropy_with_logits(p, yes.to(p), pos_weight=(~yes).sum()/yes.sum().clamp(min=1))


def shuffled(p, y): return F.cross_entropy(p, y) + (p[torch.randperm(len(p))]-p).pow(2).mean()


def hardest(p, y): return F.cross_entropy(p, y, reduction='none').topk(max(1, len(y)//2))[0].mean()


def correlation(p, t): return -((p-p.mean())*(t-t.mean())).mean()/p.std()/t.std()


def ranking(p, t): return F.relu(1-(p[:, None]-p[None])*(t[:, None]-t[None]).sign()).mean()


def padded_half(p, y): return F.cross_entropy(p, y, ignore_index=0).bfloat16()


def weighted(p, y): return F.cross_entropy(p, y, weight=WEIGHT.to(p.dtype))


def masked_numbers(p, t):
    valid = ~t.isnan()
    return ((p-t.nan_to_num())**2*valid).sum()/valid.sum()


def dice(p, t):
    p, t = p.softmax(1)[:, 1], t == 1
    return 1 - 2*(p*t).sum()/(p.sum()+t.sum())


def by_spread(p, t): return ((p.abs().sum(1)-p.abs().sum(1).mean())/p.abs().sum(1).std()*t).mean()


Two = namedtuple('Two', 'logits number')
GAPS = ADVANTAGE.clone()
GAPS[[3, 30]] = math.nan
BAD = {
    'ppo': (ppo, P, (Y, ADVANTAGE)), 'two_heads': (two_heads, (P, R), (Y, PRICE)), 'elbo': (elbo, P, (Y,)),
    'selfnorm': (selfnorm, P, (Y,)), 'ignore_index': (lambda p, y: F.cross_entropy(p, y, ignore_index=0), P, (Y,)),
    'weighted': (weighted, P, (Y,)), 'info_nce': (info_nce, P, (Y,)),
    'rmse': (lambda p, t: F.mse_loss(p, t).sqrt(), R, (ADVANTAGE,)), 'correlation': (correlation, R, (ADVANTAGE,)),
    'ranking': (ranking, R, (ADVANTAGE,)), 'hardest half': (hardest, P, (Y,)),
    'logits by their spread': (lambda p, y: F.cross_entropy(p/p.std(), y), P, (Y,)), 'vicreg': (vicreg, P, (Y,)),
    'one_tensor_price': (one_tensor_price, P, (Y, PRICE)),
    'a sum that is not said': (lambda p, y: F.cross_entropy(p, y, reduction='sum'), P, (Y,)),
    'batch_pos_weight': (batch_pos_weight, R, (ADVANTAGE,)), 'dice of the batch': (dice, DENSE, (MASK,)),
    'a hidden sum': (lambda p, t: DiceLoss()(p, t), DENSE, (MASK,)),
    'shuffled': (shuffled, P, (Y,)), 'two numbers of 52 missing': (masked_numbers, R, (GAPS,)),
    'in a dict': (lambda p, t: elbo(p['out'], t['y']), dict(none=None, out=P), (dict(y=Y),)),
    'in a named tuple': (lambda p, y, t: two_heads(p, y, t), Two(P, R), (Y, PRICE)),
    'beside a model\'s own loss': (lambda p, y: p[0] + elbo(p[1], y), (torch.tensor(2.), P), (Y,)),
    'complex outputs': (by_spread, torch.complex(P, P.roll(1, 0)), (ADVANTAGE,)),
    'in bfloat16': (padded_half, P, (Y,)), 'of float16 outputs': (lambda p, y: elbo(p.float(), y), P.half(), (Y,))}


@pytest.mark.parametrize('name', BAD)
def test_refused(name):
    loss, preds, targs = BAD[name]
    if name not in ('shuffled', 'in bfloat16'): assert true_difference(loss, preds, targs) > 5e-3
    with pytest.raises(ValueError, match='does not add up over chunks'): check(loss, preds, targs)


# --- losses that do ---------------------------------------------------------------------------------------------------
def item_dice(p, t):
    p, t = p.softmax(1)[:, 1], t == 1
    return (1-(2*(p*t).sum((1, 2))+1)/(p.sum((1, 2))+t.sum((1, 2))+1)).mean()


def bf16_inside(p, y): return F.cross_entropy((p.bfloat16()@torch.eye(C).bfloat16()), y).float()


def in_place(p, y):
    p[:, 0] = 0
    y[y == 1] = 0
    return F.cross_entropy(p, y)*1


def gumbel(p, y): return (F.gumbel_softmax(p)*F.one_hot(y, C)).sum(1).neg().mean()


def noise(p, t): return F.mse_loss(p + .1*torch.randn_like(p), t)


def numpy_noise(p, y): return F.cross_entropy(p*np.random.beta(.4, .4)*random.random(), y)*1


def own_generator(p, y): return (F.cross_entropy(p, y, reduction='none')*torch.rand(len(p), generator=G)).mean()


ONE = torch.tensor(3.)
GOOD = {
    'ce': (lambda p, y: F.cross_entropy(p, y), P, (Y,)), 'ce_flat': (CrossEntropyLossFlat(), P, (Y,)),
    'smooth': (LabelSmoothingCrossEntropyFlat(), P, (Y,)), 'focal': (FocalLossFlat(), P, (Y,)),
    'mse': (F.mse_loss, R, (ADVANTAGE,)), 'l1': (L1LossFlat(), R, (ADVANTAGE,)), 'huber': (F.huber_loss, R, (PRICE,)),
    'mse_price': (F.mse_loss, R, (PRICE,)), 'bce': (BCEWithLogitsLossFlat(), R, ((ADVANTAGE > 0).float(),)),
    'seg': (lambda p, y: F.cross_entropy(p, y), DENSE, (MASK,)), 'seg_focal': (FocalLossFlat(axis=1), DENSE, (MASK,)),
    'bf16': (lambda p, y: F.cross_entropy(p, y)*1, P.bfloat16(), (Y,)),
    'bf16_mse': (F.mse_loss, R.bfloat16(), (ADVANTAGE.bfloat16(),)),
    'fp16': (lambda p, y: F.cross_entropy(p.float(), y), P.half(), (Y,)),
    'dict': (lambda p, y: F.cross_entropy(p['a'], y), dict(a=P, none=None), (Y,)),
    'named tuple': (lambda p, y, t: F.cross_entropy(p.logits, y) + F.mse_loss(p.number, t), Two(P, R), (Y, PRICE)),
    'complex': (lambda p, t: (p.abs().sum(1)-t).square().mean(), torch.complex(P, P.roll(1, 0)), (ADVANTAGE,)),
    'two_ok': (lambda p, y, t: F.cross_entropy(p[0], y) + F.mse_loss(p[1], t), (P, R), (Y, PRICE)),
    'nested targets': (lambda p, t: F.cross_entropy(p, t['y'][0]), P, (dict(y=(Y, 'all')),)),
    'per_item_dice': (item_dice, DENSE, (MASK,)), 'int_out': (lambda p, y: F.cross_entropy(p[0], y), (P, Y), (Y,)),
    'saturated': (F.cross_entropy, P*1000, (Y,)), 'tiny': (F.mse_loss, R*1e-8, (ADVANTAGE*1e-8,)),
    'const': (lambda p, y: F.cross_entropy(p, y) + 1e6, P, (Y,)), 'no gradient': (lambda p, y: (p*0).mean(), P, (Y,)),
    'value alone': (lambda p, y: F.cross_entropy(p, y) + p.detach().std(), P, (Y,)),
    'spread of logits, 1e-5': (lambda p, y: F.cross_entropy(p, y) + 1e-5*p.std(), P, (Y,)),
    "the model's own loss": (lambda p, y: p*1, ONE, (Y,)),
    "the model's own loss beside logits": (lambda p, y: p['loss'] + 0*p['out'].sum(), dict(loss=ONE, out=P), (Y,))}


@pytest.mark.parametrize('name', GOOD)
def test_passes(name):
    loss, preds, targs = GOOD[name]
    assert true_difference(loss, preds, targs) < (1e-5 if name.startswith('spread') else 1e-6)
    check(loss, preds, targs)


KNOWN = {'weights': CrossEntropyLossFlat(weight=WEIGHT), 'ignored': CrossEntropyLossFlat(ignore_index=0),
         'sum': nn.CrossEntropyLoss(reduction='sum'),
         'weights, smoothing': nn.CrossEntropyLoss(WEIGHT, label_smoothing=.1)}


@pytest.mark.parametrize('name', KNOWN)
def test_losses_whose_parts_are_known_pass(name): check(KNOWN[name], P, (Y,))


def test_fastais_smoothing_with_weights_is_refused():
    "Its one part divides by the weights of the labels, its other by the items; PyTorch's own adds up"
    loss = LabelSmoothingCrossEntropyFlat(weight=WEIGHT)
    with pytest.raises(ValueError, match='LabelSmoothingCrossEntropyFlat does not add up over chunks.*'
                                         r'MicroBatch\(13, whole_head=True\)'): check(loss, P, (Y,))
    loss.reduction = 'sum'
    check(loss, P, (Y,))


def test_a_sum_that_is_said_passes(): check(DiceLoss(), DENSE, (MASK,))


RANDOM = {'dropout': lambda p, y: F.cross_entropy(F.dropout(p, .3), y)*1, 'gumbel': gumbel, 'numpy': numpy_noise,
          'generator': own_generator, 'in place': in_place, 'bf16_inside': bf16_inside,
          'bernoulli': lambda p, y: F.cross_entropy(p*torch.bernoulli(torch.full_like(p, .5)), y)*1,
          'a random class': lambda p, y: F.cross_entropy(p, torch.randint(0, C, y.shape))*1,
          'compiled': torch.compile(lambda p, y: F.cross_entropy(p, y)*1, backend='eager')}


@pytest.mark.parametrize('name', RANDOM)
def test_random_losses_pass_and_leave_no_trace(name):
    "Targets, outputs and the states of random numbers are as before"
    preds, labels = P.clone(), Y.clone()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    expected = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    with torch.no_grad(): check(RANDOM[name], preds, (labels,))
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == expected
    assert torch.equal(preds, P) and torch.equal(labels, Y) and preds.grad is None


def test_noise_on_numbers_passes(): check(noise, R, (ADVANTAGE,))


def test_autocast_allows_what_half_precision_rounds():
    proto = torch.randn(C, C, generator=torch.Generator().manual_seed(2))
    def loss(p, y): return F.cross_entropy(10*(p@proto), y)*1
    def padded(p, y): return F.cross_entropy(10*(p@proto), y, ignore_index=0)
    with torch.autocast('cpu', torch.bfloat16):
        check(loss, P, (Y,))
        with pytest.raises(ValueError, match='does not add up'): check(padded, P, (Y,))


# --- what users read, and what is kept --------------------------------------------------------------------------------
def test_text():
    with pytest.raises(ValueError) as e: check(partial(elbo), P, (Y,), bs=7)
    assert re.fullmatch(
        'elbo does not add up over chunks: they would train another model than whole batches. Compared were the '
        r'gradients of 52 items as one batch and as chunks of 17 and 35: they differ by up to \d{1,3}(\.\d+)? % of the '
        'largest, and a mean over items gives equal ones. The loss may compare items, or divide by something they '
        r'share, such as the number of valid labels. Run it on whole batches: MicroBatch\(7, whole_head=True\), or '
        r'give it a method `parts\(preds, targs\)` that returns its sums and what they are divided by, as '
        'MultiTargetLoss has', str(e.value))


SUMS = {'cross-entropy': (lambda p, y: F.cross_entropy(p, y, reduction='sum'), P, (Y,)),
        'squares': (lambda p, t: (p-t).pow(2).sum(), R, (ADVANTAGE,)),
        'dice': (lambda p, t: DiceLoss()(p, t), DENSE, (MASK,)),
        'in bfloat16': (lambda p, y: F.cross_entropy(p, y, reduction='sum'), P.bfloat16(), (Y,))}


@pytest.mark.parametrize('name', SUMS)
def test_a_sum_is_told_so_and_passes_where_it_says_so(name):
    loss, preds, targs = SUMS[name]
    n, split = 52, 17
    with pytest.raises(ValueError) as e: check(loss, preds, targs)
    assert str(e.value) == (
        f'<lambda> does not add up over chunks as a mean does: it is a sum. That of {n} items is those of chunks of '
        f"{split} and {n-split} together. Divide it by the number of items, or say what it is: set `reduction = 'sum'` "
        'on the loss, whose chunks are then added as they are')
    def said(*args): return loss(*args)
    said.reduction = 'sum'
    check(said, preds, targs)
    check(lambda *args: loss(*args)/len(args[1]), preds, targs)


@pytest.mark.parametrize('loss', [elbo, lambda p, y: elbo(p, y)*len(y), selfnorm, vicreg, hardest])
def test_what_is_no_sum_is_not_taken_for_one(loss):
    "Of `elbo` all labels that count are in the second chunk, whose gradient is that of the batch"
    with pytest.raises(ValueError) as e: check(loss, P, (Y,))
    assert 'it is a sum' not in str(e.value)


def test_a_loss_that_leaves_items_out_by_value_is_refused_where_it_leaves_some_out():
    def above(least, p, y):
        losses = F.cross_entropy(p, y, reduction='none')
        return losses[losses > least].mean()
    check(partial(above, 0.), P, (Y,))
    with pytest.raises(ValueError, match='above does not add up over chunks'): check(partial(above, 1.2), P, (Y,))


def test_an_error_of_the_loss_says_where_it_came_from():
    def hardest_20(p, y): return F.cross_entropy(p, y, reduction='none').topk(20)[0].mean()
    with pytest.raises(RuntimeError, match='out of range') as e: check(hardest_20, P, (Y,))
    assert e.value.__notes__ == ['while hardest_20 was looked at for 52 items of a batch, to see whether it adds up '
                                 'over chunks']


def test_a_gradient_in_chunks_alone_is_refused():
    def loss(p, y): return (p if len(p) < N else p.detach()).mean()
    with pytest.raises(ValueError, match='they differ by up to 100 % of the largest'): check(loss, P, (Y,))


def test_nan_in_one_alone():
    with pytest.raises(ValueError, match='they are NaN in one of the two'):
        check_adds_up(rmse_of_spread, partial(chunk_loss, rmse_of_spread), R[:4], (ADVANTAGE[:4],), 1, 2)


def rmse_of_spread(p, t): return F.mse_loss(p/p.std(), t)


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer('center', torch.zeros(C))
    def forward(self, p, y):
        self.center.lerp_(p.detach().mean(0), .1)
        return F.cross_entropy(p-self.center, y)


def test_a_loss_that_changes_its_buffers_is_refused_and_gets_them_back():
    loss = Centred()
    state = copy.deepcopy(loss.state_dict())
    with pytest.raises(ValueError, match='Centred changes center whenever it is called, which is more often in chunks'):
        check(loss, P, (Y,))
    assert torch.equal(loss.center, state['center'])


def test_a_loss_that_another_thread_uses_is_not_touched():
    loss = nn.CrossEntropyLoss(WEIGHT)
    version = loss.weight._version
    check(loss, P, (Y,))
    assert loss.weight._version == version


def test_items_are_picked_from_end_to_end_missing_ones_first():
    gaps = torch.randn(500, generator=torch.Generator().manual_seed(0))
    gaps[77] = math.nan
    items, split = items_to_check((gaps,), 500, 5)
    assert items[0] == 77 and len(set(items.tolist())) == 64 and split == 21
    values = gaps[items][1:]
    assert torch.equal(values, values.sort().values) and values[-1] == gaps.nan_to_num(-math.inf).max()


LAYOUTS = {'targets of their own': lambda r, m: (r, m), 'columns': lambda r, m: (torch.stack([r, m], 1),),
           'in a dict': lambda r, m: (dict(y=P[:5], m=m, r=r[:, None]),)}


@pytest.mark.parametrize('value, name', [(0., 'mask'), (5., 'rating')])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_label_of_one_item_of_a_thousand_is_picked_whichever_target_it_is_of(layout, value, name):
    "The zero of a mask, or a code between the others"
    ratings, mask = torch.randint(0, 5, (1000,)) + 6.*torch.randint(0, 2, (1000,)), torch.ones(1000)
    dict(mask=mask, rating=ratings)[name][321] = value
    items, split = items_to_check(LAYOUTS[layout](ratings, mask), 1000, 5)
    assert 321 in items.tolist() and len(set(items.tolist())) == 64 and split == 21


def test_the_first_look_loads_no_compiler():
    code = """if True:
        import sys, torch
        from functools import partial
        from paddy_multi.accumulate.chunks import chunk_loss
        from paddy_multi.accumulate.loss_check import check_adds_up
        def loss(p, y): return (p-y).abs().mean()
        check_adds_up(loss, partial(chunk_loss, loss), torch.randn(8), (torch.randn(8),), 3, 4)
        assert 'torch._dynamo' not in sys.modules
    """
    subprocess.run([sys.executable, '-W', 'ignore', '-c', code], check=True)


@pytest.mark.parametrize('width, k', [(1, N), (2**11, N), (2**13, 16), (2**15, 4), (10**7, 2)])
def test_few_items_of_a_large_output(width, k):
    items, split = items_to_check((Y,), N, width)
    assert len(set(items.tolist())) == k and split == {N: 17, 16: 5}.get(k, 1)


def test_a_large_output_is_looked_at_in_the_chunk_whose_targets_differ_most():
    "Missing labels beside others differ most; a chunk of one item has nobody to differ from"
    chunks = [slice(0, 1), slice(1, 4), slice(4, 7)]
    for targ, expected in (([0, 5, 5, 5, 1, 1, 2], [4, 6]), ([9, 1, 3, 2, 7, 7, math.nan], [6, 4]),
                           ([1.]*7, [1, 3])):
        items, split = items_to_check((torch.tensor(targ),), 7, 10**7, chunks)
        assert items.tolist() == expected and split == 1


@pytest.mark.parametrize('targs', [(Y[:3],), (dict(a=1, y=Y[:3]),), (['a', 'b', 'c'],), (), (MASK[:3],)])
def test_small_batches(targs):
    items, split = items_to_check(targs, 3, 5)
    assert sorted(items.tolist()) == [0, 1, 2] and split == 1
