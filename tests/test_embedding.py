"`Embedding` against `torch.nn.Embedding` and the one-hot product on random shapes and ids, and what it must refuse"
import math
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from collab_deep.models.embedding import Embedding

id_types = st.sampled_from([torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
float_types = st.sampled_from([torch.float32, torch.float64])


@st.composite
def lookups(draw):
    "A table's size, ids of any shape that are in it (often repeated), and a seed"
    n, n_factors = draw(st.integers(1, 40)), draw(st.integers(1, 9))
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    ids = draw(st.lists(st.integers(0, n-1), min_size=math.prod(shape), max_size=math.prod(shape)))
    return n, n_factors, torch.tensor(ids, dtype=draw(id_types)).view(shape), draw(st.integers(0, 2**32))


def gradient(out, weight, upstream):
    return torch.autograd.grad(out, weight, upstream)[0]


@settings(deadline=None)
@given(lookups(), float_types)
def test_equals_torch(lookup, dtype):
    n, n_factors, ids, seed = lookup
    torch.manual_seed(seed)
    ours, theirs = Embedding(n, n_factors).to(dtype), nn.Embedding(n, n_factors, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    out, expected = ours(ids), theirs(ids.long())
    assert out.shape == (*ids.shape, n_factors) and out.dtype == dtype and torch.equal(out, expected)
    upstream = torch.randn_like(out)
    assert torch.equal(gradient(out, ours.weight, upstream), gradient(expected, theirs.weight, upstream))


@settings(deadline=None)
@given(lookups(), float_types)
def test_equals_one_hot_product(lookup, dtype):
    n, n_factors, ids, seed = lookup
    torch.manual_seed(seed)
    emb = Embedding(n, n_factors).to(dtype)
    out, expected = emb(ids), F.one_hot(ids.long(), n).to(dtype) @ emb.weight
    upstream = torch.randint(-64, 65, out.shape).to(dtype)/16      # sums without rounding, in any order
    assert torch.equal(out, expected)
    assert torch.equal(gradient(out, emb.weight, upstream), gradient(expected, emb.weight, upstream))


@settings(deadline=None)
@given(lookups(), st.one_of(st.integers(-2**63, -1), st.integers(0, 2**62)), st.data())
def test_names_the_id_that_is_not_in_the_table(lookup, beyond, data):
    n, n_factors, ids, _ = lookup
    bad = beyond if beyond < 0 else n + beyond
    ids = ids.long().flatten().tolist()
    ids.insert(data.draw(st.integers(0, len(ids))), bad)
    with pytest.raises(IndexError, match=rf'^id {bad} is not in a table of {n} rows, which holds 0 to {n-1}: '):
        Embedding(n, n_factors)(torch.tensor(ids))


def test_reads_no_id_before_the_lookup():
    "On a GPU a look at the values would wait for the device: a lookup is one operation"
    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen, emb, ids = [], Embedding(5, 2), torch.tensor([[0, 4], [4, 1]])
    with Ops(): emb(ids)
    assert seen == [torch.ops.aten.embedding.default]


def test_without_values_and_in_one_graph():
    emb, ids = Embedding(5, 2), torch.tensor([0, 4, 4])
    assert emb.to('meta')(ids.to('meta')).shape == (3, 2)
    emb = Embedding(5, 2)
    whole = torch.compile(emb, backend='eager', fullgraph=True)
    assert torch.equal(whole(ids), emb(ids))


@pytest.mark.parametrize('bad', [0, -1, True, 1.5, '3', None, math.nan])
def test_sizes(bad):
    with pytest.raises(ValueError) as rows: Embedding(bad, 4)
    assert str(rows.value) == f'n is the number of rows, a positive integer; found {bad!r}'
    with pytest.raises(ValueError) as columns: Embedding(4, bad)
    assert str(columns.value) == f'n_factors is the number of columns, a positive integer; found {bad!r}'


@pytest.mark.parametrize('bad', [-.01, 1e16, math.nan, math.inf])
def test_std(bad):
    with pytest.raises(ValueError, match=re.escape(f'std is a standard deviation, from 0 to 1e+15; found {bad}')):
        Embedding(4, 2, bad)


@pytest.mark.parametrize('dtype', [torch.bool, torch.float16, torch.float64, torch.complex64])
def test_tensors_that_are_no_ids(dtype):
    expected = f'ids come as a tensor of integers; found {dtype}. If the values are ids, convert them'
    with pytest.raises(TypeError, match=expected):
        Embedding(4, 2)(torch.ones(3).to(dtype))


@pytest.mark.parametrize('bad', [1, (1, 2), None])
def test_ids_that_are_no_tensor(bad):
    with pytest.raises(TypeError, match=f'found {type(bad).__name__}: .*Wrap them in torch.tensor'):
        Embedding(4, 2)(bad)


def test_takes_the_place_of_fastais():
    code = 'from fastai.collab import *\nfrom collab_deep.all import *\nprint(Embedding.__module__, Embedding(3, 2))'
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout == 'collab_deep.models.embedding Embedding(3, 2)\n'
