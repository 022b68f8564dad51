"Batches of any structure in pieces: what is cut, joined, split by a function of the user's, and what is refused"
import math
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.hook import ActivationStats
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.rnn import ModelResetter, RNNCallback, RNNRegularizer
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.torch_core import TensorCategory, TensorImage
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from paddy_multi.accumulate.batches import (batch_size, check_learner, check_output, cut, even_chunks,
                                            is_out_of_memory, joined, same_parts, split_items)
from paddy_multi.accumulate.passes import Shown
from paddy_multi.core.nested import made_of, tensors_in

D, C = 6, 5
Pair = namedtuple('Pair', 'logits aux')


class Output(OrderedDict):
    "A dict with attributes"
    def __getattr__(self, name):
        try: return self[name]
        except KeyError: raise AttributeError(name) from None


@dataclass
class ModelOutput(OrderedDict):
    "As those of Hugging Face's transformers: a dataclass that is a dict of the fields that are not None"
    logits: object = None
    hidden: object = None

    def __post_init__(self):
        for k in ('logits', 'hidden'):
            if getattr(self, k) is not None: super().__setitem__(k, getattr(self, k))

    def __setitem__(self, k, v):
        super().__setitem__(k, v)
        super().__setattr__(k, v)


@dataclass(frozen=True)
class Frozen:
    logits: object
    name: str = 'frozen'


def same(a, b):
    "Structures of one type with equal tensors"
    assert type(a) is type(b), (type(a), type(b))
    if isinstance(a, torch.Tensor): return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray): return np.array_equal(a, b)
    if isinstance(a, dict): return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, Frozen): return a.name == b.name and same(a.logits, b.logits)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


# --- pieces ---------------------------------------------------------------------------------------------------------
@given(st.integers(0, 300), st.integers(1, 100))
def test_chunks_are_few_and_even(n, bs):
    chunks = even_chunks(n, bs)
    sizes = [o.stop-o.start for o in chunks]
    assert [i for o in chunks for i in range(o.start, o.stop)] == list(range(n))
    assert len(chunks) == max(math.ceil(n/bs), 1) and max(sizes) <= bs and max(sizes)-min(sizes) <= 1


# Widths, lengths of lists and shapes of shared constants are no number of items or of a chunk
ITEMS, WIDTHS = st.integers(2, 9), (10, 11, 12)


def leaf(n):
    rows = [torch.arange(n*w, dtype=torch.float64).view(n, w) for w in WIDTHS]
    return st.sampled_from([*rows, TensorImage(rows[0]+1), TensorCategory(torch.arange(n)), rows[1].long(), None,
                            torch.tensor(2.), 3, 'a', torch.ones(13, 17), [torch.ones(i+20, 3)*i for i in range(n)],
                            list('abcdefghi'[:n])])


def nested(n):
    def deeper(inside):
        return st.one_of(inside.map(lambda o: [o, *[None]*13]), st.tuples(inside, inside).map(lambda o: Pair(*o)),
                         inside.map(lambda o: {'one': o, 2: None}), inside.map(lambda o: Output(logits=o)),
                         inside.map(lambda o: Frozen(o)), inside.map(lambda o: ModelOutput(logits=o)))
    return st.recursive(leaf(n), deeper, max_leaves=6)


@settings(deadline=None, max_examples=40)
@given(st.data(), ITEMS, st.integers(1, 4))
def test_pieces_joined_are_the_whole(data, n, bs):
    whole = torch.arange(n), data.draw(nested(n)), data.draw(nested(n))
    chunks = even_chunks(n, bs)
    sizes = [o.stop-o.start for o in chunks]
    assert batch_size((whole[1], torch.ones(n)), (whole[0],)) == n
    assert same(joined([cut(whole, o, n) for o in chunks], sizes), whole)
    backwards = torch.arange(n).flip(0)
    assert same(cut(cut(whole, backwards, n), backwards, n), whole)


@pytest.mark.parametrize('whole', [Output(logits=torch.arange(6.)), ModelOutput(logits=torch.arange(6.)),
                                   Frozen(torch.arange(6.)), Pair(torch.arange(6.), None)],
                         ids=lambda o: type(o).__name__)
def test_types_are_kept(whole):
    part = cut(whole, slice(2, 4), 6)
    assert type(part) is type(whole) and part.logits.tolist() == [2, 3]
    again = joined([cut(whole, o, 6) for o in even_chunks(6, 4)], [3, 3])
    assert type(again) is type(whole) and again.logits.tolist() == [0, 1, 2, 3, 4, 5]
    assert whole.logits.tolist() == [0, 1, 2, 3, 4, 5]  # as it was


def test_other_mappings_and_arrays():
    held = UserDict(ids=torch.arange(6), table=np.arange(12).reshape(6, 2))
    part = cut((held,), slice(4, 6), 6)[0]
    assert type(part) is UserDict and part['ids'].tolist() == [4, 5] and part['table'].tolist() == [[8, 9], [10, 11]]
    assert cut((held,), torch.tensor([0, 5]), 6)[0]['table'].tolist() == [[0, 1], [10, 11]]


def test_a_whole_batch_is_not_touched():
    "Nothing can be mistaken where nothing is cut"
    both = [torch.ones(2, 3), torch.zeros(2)]
    assert cut((both,), slice(0, 2), 2)[0] is both
    for n in (1, 0): assert batch_size((torch.ones(n, 3),), (torch.ones(n),)) == n


def test_empty_containers_belong_to_all():
    x = torch.ones(6, 3)
    assert batch_size((x, [], {}), (x, ())) == 6
    assert cut((x, [], {}, ()), slice(0, 2), 6)[1:] == ([], {}, ())


# --- models that fastai trains --------------------------------------------------------------------------------------
X = torch.randn(13, D, generator=torch.Generator().manual_seed(1)).double()
Y = torch.randint(0, C, (13,), generator=torch.Generator().manual_seed(2))
PICTURES = [torch.randn(2+i % 3, D, generator=torch.Generator().manual_seed(i)).double() for i in range(13)]
CASES = dict(
    scalar_aux=(lambda m, x: (m(x), m(x).pow(2).mean()), lambda p, y: F.cross_entropy(p[0], y)+p[1], (X,), (Y,)),
    namedtuple=(lambda m, x: Pair(m(x), m(x)*2), lambda p, y: F.cross_entropy(p.logits, y), (X,), (Y,)),
    mapping=(lambda m, x: Output(logits=m(x)), lambda p, y: F.cross_entropy(p.logits, y), (X,), (Y,)),
    model_output=(lambda m, x: ModelOutput(logits=m(x)), lambda p, y: F.cross_entropy(p.logits, y), (X,), (Y,)),
    dataclass=(lambda m, x: Frozen(m(x)), lambda p, y: F.cross_entropy(p.logits, y), (X,), (Y,)),
    none=(lambda m, x: (m(x), None), lambda p, y: F.cross_entropy(p[0], y), (X,), (Y,)),
    own_loss=(lambda m, x: m(x).pow(2).mean(), lambda p, y: p, (X,), (Y,)),
    own_loss_without_targets=(lambda m, x: m(x).pow(2).mean(), lambda p, y: p, (X,), (None,)),
    shared=(lambda m, a, c: m(a)+c.sum(), F.cross_entropy, (X, torch.ones(7, 2).double()), (Y,)),
    shared_in_dict=(lambda m, o: m(o['x'])+o['c'].sum(), F.cross_entropy, ({'x': X, 'c': torch.ones(7, 2)},), (Y,)),
    scalar=(lambda m, a, c: m(a)*c, F.cross_entropy, (X, torch.tensor(2.).double()), (Y,)),
    nothing=(lambda m, a, c: m(a), F.cross_entropy, (X, None), (Y,)),
    number=(lambda m, a, c: m(a)*c, F.cross_entropy, (X, 2), (Y,)),
    pictures=(lambda m, xs: torch.stack([m(o.mean(0)) for o in xs]), F.cross_entropy, (PICTURES,), (Y,)),
    captions=(lambda m, x, s: m(x)*torch.tensor([len(o) for o in s])[:, None], F.cross_entropy,
              (X, ['ab'*(i % 3+1) for i in range(13)]), (Y,)),
    dict_targets=(lambda m, x: m(x), lambda p, t: F.cross_entropy(p, t['a']), (X,), ({'a': Y},)),
    nested_targets=(lambda m, x: m(x), lambda p, t: F.cross_entropy(p, t['a'][0])+F.mse_loss(p, t['b']), (X,),
                    ({'a': (Y, None), 'b': X[:, :C]},)),
    list_targets=(lambda m, x: m(x), lambda p, t: torch.stack([(o*t.mean()).sum() for o, t in zip(p, t)]).mean(), (X,),
                  (PICTURES,)))


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, C)).double()


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('bs', [1, 4, 5, 13])
def test_gradients_of_pieces_are_those_of_the_whole(name, bs):
    forward, loss, xb, yb = CASES[name]
    whole, pieces = mlp(), mlp()
    out = forward(whole, *xb)
    loss(out, *yb).backward()
    n, outs = batch_size(xb, yb), []
    assert n == 13
    for items in even_chunks(n, bs):
        outs.append(forward(pieces, *cut(xb, items, n)))
        (loss(outs[-1], *cut(yb, items, n))*((items.stop-items.start)/n)).backward()
    for p, q in zip(whole.parameters(), pieces.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-12, atol=1e-15)
    again = joined(outs, [o.stop-o.start for o in even_chunks(n, bs)])
    assert type(again) is type(out)
    for a, b in zip(tensors_in(again), tensors_in(out)): assert torch.allclose(a, b, rtol=1e-12, atol=1e-15)


# --- what is refused ------------------------------------------------------------------------------------------------
ASK = r'Say how to split it, with MicroBatch\(bs, split=function\): function\(xb, yb, items\) gives \(xb, yb\)'
x, y = torch.ones(6, 3), torch.ones(6)


@pytest.mark.parametrize('xb, yb, found', [
    ((x, x), (y, y[:5]), r'how many items the targets have, found tuple\(Tensor\[6\], Tensor\[5\]\)'),
    ((x,), ({'a': y, 'b': [y[:4]]},), r'found tuple\(dict\(a=Tensor\[6\], b=list\(Tensor\[4\]\)\)\)'),
    ((torch.ones(5, 6, 3),), (y,), r'which inputs belong to the items .* found tuple\(Tensor\[5, 6, 3\]'),
    ((x[:4],), (y,), r'which inputs belong to the items .*Tensor\[6\]\)\), found tuple\(Tensor\[4, 3\]'),
    ((None, 3), (y,), r'found tuple\(None, 3\)'),
    ((pack_sequence([x]),), (y,), 'found tuple\\(PackedSequence'),
    ((x, torch.ones(7, 2)), (None,), r'found tuple\(Tensor\[6, 3\], Tensor\[7, 2\]\)'),
    ((pd.DataFrame(index=range(6)),), (y,), r'found tuple\(DataFrame'),
    ((x,), (pd.DataFrame(index=range(6)),), 'what belongs to which item, found DataFrame'),
    ((x,), (torch.eye(6).to_sparse(),), r'where the items of such a tensor are, found sparse Tensor\[6, 6\]')])
def test_batches_whose_items_cannot_be_counted(xb, yb, found):
    with pytest.raises(ValueError, match=f'MicroBatch cannot tell .*{found}.*{ASK}|{found}.*{ASK}'): batch_size(xb, yb)


@pytest.mark.parametrize('batch, found', [
    ((torch.ones(5, 6, 3),), r'whether dimension 1 holds the 6 items, found Tensor\[5, 6, 3\]'),
    (([x]*6,), r'whether a list of 6 holds the items or tensors of all items, found list\(Tensor\[6, 3\]'),
    (([{'a': y, 'b': x}]*6,), 'whether a list of 6 holds the items or tensors of all items, found list'),
    ((torch.eye(6).to_sparse(),), 'where the items of such a tensor are, found sparse Tensor'),
    ((torch.nested.nested_tensor([x[0], y], layout=torch.jagged),),
     'where the items of such a tensor are, found nested NestedTensor'),
    ((pack_sequence([x, x]),), 'where the items of such a tensor are, found PackedSequence'),
    (({'graph': object()},), 'what belongs to which item, found object')])
def test_what_cannot_be_cut(batch, found):
    with pytest.raises(ValueError, match=f'MicroBatch cannot tell {found}.*{ASK}'): cut(batch, slice(0, 2), 6)


@pytest.mark.parametrize('parts, found', [
    ([x[:2].mean(0), x[2:].mean(0)*2], r'cannot tell the items in the output of the model, found Tensor\[3\] for 2'),
    ([x[:2].mean(0, True), x[2:].mean(0, True)*2], r'found Tensor\[1, 3\] for 2 items. Put them along the first'),
    ([(x[:2], x[:2].sum(0)), (x[2:], x[2:].sum(0))], r'belongs to which item .* found Tensor\[3\] and Tensor\[3\]'),
    ([(x[:2], torch.tensor(2)), (x[2:], torch.tensor(4))], 'what belongs to which item in the outputs of its chunks'),
    ([(x[:2], 2), (x[2:], 4)], 'what belongs to which item in the outputs of its chunks, found 2 and 4'),
    ([(x[:2], None), (x[2:], y)], r'what belongs together .* found None and Tensor\[6\]'),
    ([{'a': x[:2]}, {'b': x[2:]}], r'what belongs together .* found dict\(a=Tensor\[2, 3\]\) and dict\(b='),
    ([(x[:2], [y]), (x[2:], [y, y])], 'what belongs together'),
    ([x[:2, :2], x[2:]], r'what belongs to which item .* found Tensor\[2, 2\] and Tensor\[4, 3\]. Let the model give'),
    ([torch.eye(2).to_sparse(), torch.eye(4).to_sparse()], 'what belongs to which item')])
def test_outputs_that_cannot_be_joined(parts, found):
    with pytest.raises(ValueError, match=found): joined(parts, [2, 4])


def test_lists_in_outputs():
    "Of items where the lengths say so, of tensors of all items where these say so, and else refused"
    images = [torch.ones(i+7, 3) for i in range(6)]
    assert same(joined([images[:2], images[2:]], [2, 4]), images)
    assert same(joined([[x[:2], y[:2]], [x[2:], y[2:]]], [2, 4]), [x, y])
    with pytest.raises(ValueError, match='whether a list holds the items or tensors of all items'):
        joined([[x[:2], y[:2]], [x[2:4], y[2:4]]], [2, 2])
    assert same(joined([(x[:2], y[:2]), (x[2:4], y[2:4])], [2, 2]), (x[:4], y[:4]))  # a model's tuple holds parts


def test_scalars_are_means_over_items():
    values = torch.arange(6, dtype=torch.float64)
    assert float(joined([values[:2].mean(), values[2:].mean()], [2, 4])) == pytest.approx(2.5, rel=1e-15)
    assert joined([1., 4.], [2, 4]) == pytest.approx(3.)
    check_output(torch.tensor(1.), 6)
    check_output(None, 6)


# --- a split of the user's ------------------------------------------------------------------------------------------
SPLITS = dict(
    steps_first=((torch.arange(30.).view(5, 6),), (torch.arange(30).view(5, 6),),
                 lambda xb, yb, items: ((xb[0][:, items],), (yb[0][:, items],))),
    flat_targets=((x,), (torch.arange(30),),
                  lambda xb, yb, items: ((xb[0][items],), (yb[0][items.start*5:items.stop*5],))),
    lists=(([x]*6,), (y,), lambda xb, yb, items: ((xb[0][items],), (yb[0][items],))),
    no_targets=((torch.ones(5, 6),), (None,), lambda xb, yb, items: ((xb[0][:, items],), (None,))))


@pytest.mark.parametrize('name', SPLITS)
def test_items_are_counted_as_the_split_says(name):
    xb, yb, split = SPLITS[name]
    assert batch_size(xb, yb, split) == 6
    for items in even_chunks(6, 4): assert same(split_items(split, xb, yb, items), split(xb, yb, items))


def test_a_batch_of_one_item_with_a_split():
    steps_first = SPLITS['steps_first'][2]
    assert batch_size((torch.ones(5, 1),), (torch.ones(5, 1),), steps_first) == 1


@pytest.mark.parametrize('split, error', [
    (lambda xb, yb, items: (xb, yb), r'asked for 1 item and gave all: targets tuple\(Tensor\[6\]\), inputs'),
    (lambda xb, yb, items: (xb[0][items],), r'must give \(xb, yb\), tuples of 1 and 1; found tuple\(Tensor\[1, 3\]\)'),
    (lambda xb, yb, items: [(xb[0][items],), (yb[0][items],)], 'must give .* found list'),
    (lambda xb, yb, items: None, 'must give .* found None'),
    (lambda xb, yb, items: ((xb[0][items],), (yb[0][:items.stop],)), 'asked for 2 items and gave 4')])
def test_splits_that_are_wrong(split, error):
    with pytest.raises(ValueError, match=error): split_items(split, (x,), (y,), slice(2, 4))


# --- the learner ----------------------------------------------------------------------------------------------------
def holding(xb, yb, *cbs):
    learn = Learner(DataLoaders([], []), nn.Linear(3, 1), loss_func=F.mse_loss, cbs=cbs)
    learn.create_opt()
    learn.xb, learn.yb, learn.training = xb, yb, True
    return learn


@pytest.mark.parametrize('split', [None, lambda xb, yb, items: ((xb[0][items],), ({'a': yb[0]['a'][items]},))])
def test_mixed_labels_may_be_nested(split):
    mix = MixUp()
    learn = holding((x,), ({'a': y},), mix)
    mix.yb1, mix.lam = ({'a': -y},), torch.arange(6.)
    with Shown(learn, 6, split) as shown:
        shown.show(slice(2, 5))
        assert mix.yb1[0]['a'].tolist() == [-1, -1, -1] and mix.lam.tolist() == [2, 3, 4]
        assert learn.yb[0]['a'].tolist() == [1, 1, 1] and learn.xb[0].shape == (3, 3)
    assert mix.lam.shape == (6,) and mix.yb1[0]['a'].shape == (6,) and learn.xb[0] is x


@pytest.mark.parametrize('lam', [.3, torch.tensor(.3), torch.tensor([.3])], ids=str)
def test_one_proportion_for_all(lam):
    mix = CutMix()
    learn = holding((x,), (y,), mix)
    mix.yb1, mix.lam = (y,), lam
    with Shown(learn, 6) as shown:
        shown.show(slice(2, 4))
        assert float(mix.lam) == pytest.approx(.3)


def test_mixing_that_has_not_begun():
    learn = holding((x,), (y,), MixUp())
    with Shown(learn, 6) as shown: shown.show(slice(2, 4))
    assert learn.yb[0] is y


def test_a_batch_is_whole_again_after_an_error():
    learn = holding((x,), (y,))
    with pytest.raises(KeyError), Shown(learn, 6) as shown:
        shown.show(slice(2, 4))
        raise KeyError
    assert learn.xb[0] is x and learn.yb[0] is y


def test_a_split_is_asked_once_a_chunk_and_once_for_its_places():
    calls = []
    def split(xb, yb, items):
        calls.append(items)
        return (xb[0][items],), (yb[0][items],)
    with Shown(holding((x,), (y,)), 6, split) as shown:
        for i in range(0, 6, 2): shown.show(slice(i, i+2))
    assert calls == [slice(0, 1), slice(0, 2), slice(2, 4), slice(4, 6)]


# --- parts that all items share -------------------------------------------------------------------------------------
@pytest.mark.parametrize('shared', [torch.ones(3, 2), [torch.ones(4)]*3, {'a': [torch.ones(3)]}, np.ones(3)], ids=type)
def test_what_items_share_is_not_cut_in_a_batch_of_as_many(shared):
    def batch(n): return (x[:n], shared), (y[:n],)
    seen = same_parts(batch(6), 6, same_parts(batch(5), 5, {}))
    said = 'which parts of a batch belong to its items, as this one does by its length in a batch of 3.*split=function'
    with pytest.raises(ValueError, match=said): same_parts(batch(3), 3, seen)
    first = same_parts(batch(3), 3, {})
    with pytest.raises(ValueError, match='this one does not by its length in a batch of 5, and did in a batch before'):
        same_parts(batch(5), 5, first)


def test_pictures_of_any_size_are_those_of_the_items():
    def batch(*sizes): return ([torch.ones(3, k, k) for k in sizes],), (torch.ones(len(sizes)), [None]*len(sizes))
    seen = {}
    for sizes in (4, 5, 6, 7), (3, 3, 3), (2, 9): seen = same_parts(batch(*sizes), len(sizes), seen)


# --- memory ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('text', [
    'CUDA error: out of memory', 'cuDNN error: CUDNN_STATUS_ALLOC_FAILED',
    'cusolver error: CUSOLVER_STATUS_ALLOC_FAILED',
    'CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling', 'MPS backend out of memory (MPS allocated: 1 GB)',
    'HIP out of memory. Tried to allocate 1 GB', "DefaultCPUAllocator: can't allocate memory"])
def test_errors_of_memory_are_known_by_their_words(text):
    assert is_out_of_memory(RuntimeError(text)) and not is_out_of_memory(ValueError(text))


# --- what is refused ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('register', ['register_full_backward_hook', 'register_full_backward_pre_hook',
                                      'register_backward_hook'])
def test_hooks_on_gradients_of_modules_are_refused(register):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    handle = getattr(model[1], register)(lambda *_: None)
    with pytest.raises(ValueError, match=r"gradients of '1' \(Linear\), .* do its work in before_step"):
        check_learner(SimpleNamespace(cbs=[], model=model), None)
    handle.remove()
    check_learner(SimpleNamespace(cbs=[], model=model), None)


def test_callbacks_of_recurrent_models_are_welcome():
    me = Callback()
    cbs = [me, ModelResetter(), RNNCallback(), RNNRegularizer(1, 1)]
    check_learner(SimpleNamespace(cbs=cbs, model=nn.Linear(1, 1)), me)
    with pytest.raises(ValueError, match='ActivationStats: it keeps what one forward pass'):
        check_learner(SimpleNamespace(cbs=[me, ActivationStats()], model=nn.Linear(1, 1)), me)


@pytest.mark.parametrize('register', ['register_hook', 'register_post_accumulate_grad_hook'])
def test_hooks_on_gradients_are_refused(register):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    handle = getattr(model[1].bias, register)(lambda *_: None)
    learn = SimpleNamespace(cbs=[], model=model)
    with pytest.raises(ValueError, match="gradient of the parameter '1.bias', .* do its work in before_step"):
        check_learner(learn, None)
    handle.remove()
    check_learner(learn, None)


def test_containers_are_known_by_what_they_hold():
    assert made_of(torch.Size([2, 3])) == (None, None) and made_of('ab') == (None, None)
    assert made_of(ModelOutput(logits=1))[0] == [1]
