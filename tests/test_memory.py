"Predicted memory against real tensors and PyTorch's own tracker; budgets, bad input, what a prediction leaves alone"
import math
import random
from functools import partial

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
from fastai.callback.fp16 import MixedPrecision
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, DiceLoss
from fastai.optimizer import Adam, OptimWrapper, SGD
from fastai.vision.learner import vision_learner
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from paddy_multi.accumulate.memory import find_accumulation, parse_bytes, plot_memory, predict_memory
from paddy_multi.accumulate.microbatch import MicroBatch
from paddy_multi.accumulate.steps import StepMemory, step_memory
from paddy_multi.accumulate.tracing import CountTensors
from paddy_multi.kinds.category import CategoryTarget
from paddy_multi.kinds.regression import RegressionTarget
from paddy_multi.all import Targets

pytestmark = pytest.mark.filterwarnings(
    'ignore:.*CUDA is not available', 'ignore:.*BatchNorm takes', 'ignore:.*torch.jit.script')
adamw = partial(OptimWrapper, opt=torch.optim.AdamW)


def loaders(size, bs, label=torch.tensor(0)):
    items = [(torch.zeros(3, size, size), label)]*bs
    return DataLoaders(*[DataLoader(items, bs=bs, num_workers=0)]*2)


def timm_learner(arch, size, bs, opt=Adam, **kwargs):
    model = timm.create_model(arch, num_classes=10)
    return Learner(loaders(size, bs), model, loss_func=CrossEntropyLossFlat(), opt_func=opt, **kwargs)


def counted(learn, accum, whole_head=False):
    "Most bytes of real tensors in one batch of a fit, the optimizer's state in place"
    learn.create_opt()
    for p in learn.model.parameters():
        if p.requires_grad: p.grad = torch.zeros_like(p)
    learn.opt.step()
    learn.opt.zero_grad()
    batch = learn.dls.one_batch()
    learn.dls = DataLoaders([batch], [])
    with CountTensors() as count, learn.no_bar(), learn.no_logging():
        opt = learn.opt.opt if hasattr(learn.opt, 'opt') else learn.opt
        count.add([*learn.model.parameters(), *learn.model.buffers(), *batch])
        count.add([p.grad for p in learn.model.parameters() if p.grad is not None])
        count.add([o for s in opt.state.values() for o in s.values()])
        learn.fit(1, cbs=MicroBatch(math.ceil(len(batch[0])/accum), whole_head) if accum > 1 else None)
    return count.peak


def compare(make, accums, tol=.01):
    predicted = predict_memory(make(), accums, device='cpu').total
    for a in accums: assert float(predicted[a]) == pytest.approx(counted(make(), a), rel=tol), f'accum {a}'


# --- against real tensors -------------------------------------------------------------------------------------------
class Small(nn.Module):
    "Branches, an in-place operation, a tied weight and a buffer"
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 32, 3), nn.Linear(32, 32)
        self.again = self.out
        self.register_buffer('scale', torch.ones(1000, 100))
    def forward(self, x):
        x = F.relu(self.conv(x), inplace=True)
        x = F.dropout(x + x.sigmoid(), .1, self.training).mean((2, 3))
        return self.again(self.out(x))


@pytest.mark.parametrize('opt', [Adam, SGD, partial(SGD, mom=.9), adamw, partial(OptimWrapper, opt=torch.optim.SGD)],
                         ids=['Adam', 'SGD', 'momentum', 'AdamW', 'torch SGD'])
def test_own_model_with_any_optimizer(opt):
    compare(lambda: Learner(loaders(32, 24), Small(), loss_func=CrossEntropyLossFlat(), opt_func=opt), (1, 2, 5, 24))


@pytest.mark.parametrize('arch, size', [('resnet18', 64), ('vit_tiny_patch16_224', 224), ('convnext_atto', 64)])
def test_timm_models(arch, size):
    compare(lambda: timm_learner(arch, size, 6), (1, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize('arch, size', [('convnext_small', 128), ('resnet50', 224), ('vit_small_patch16_224', 224)])
def test_the_models_of_the_tables_in_batches_of_64(arch, size):
    compare(lambda: timm_learner(arch, size, 64, adamw), (1, 2, 4, 8))


@pytest.mark.slow
def test_pytorchs_own_tracker_counts_the_same():
    from torch.distributed._tools.mem_tracker import MemTracker
    learn = timm_learner('resnet18', 64, 16)
    model, opt = learn.model.train(), torch.optim.SGD(learn.model.parameters(), 0.)
    x, y = torch.zeros(16, 3, 64, 64), torch.zeros(16, dtype=torch.long)
    with MemTracker() as tracker:
        tracker.track_external(model, opt, x, y)
        F.cross_entropy(model(x), y).backward()
    peak = sum(v for k, v in tracker.get_tracker_snapshot('peak')[torch.device('cpu')].items() if k != 'Total')
    sgd = partial(OptimWrapper, opt=torch.optim.SGD)
    found = predict_memory(timm_learner('resnet18', 64, 16, sgd), [1], device='cpu')
    assert float(found.total[1]) == pytest.approx(peak, rel=.02)


def test_frozen_and_unfrozen():
    def make():
        learn = vision_learner(loaders(64, 8), 'resnet18', pretrained=False, normalize=False, n_out=10,
                               loss_func=CrossEntropyLossFlat())
        learn.freeze()
        return learn
    whole, frozen = (predict_memory(make(), [1, 2], device='cpu', frozen=f).total for f in (False, True))
    assert frozen[1] < .6*whole[1]
    for a in (1, 2): assert float(frozen[a]) == pytest.approx(counted(make(), a), rel=.01)


def test_mixed_precision_takes_less_on_a_gpu_and_is_nothing_on_a_cpu():
    plain, half = timm_learner('convnext_atto', 64, 16), timm_learner('convnext_atto', 64, 16, cbs=MixedPrecision())
    activations = [float(predict_memory(o, [1]).activations[1]) for o in (plain, half)]
    assert .4 < activations[1]/activations[0] < .8
    assert predict_memory(plain, device='cpu').equals(predict_memory(half, device='cpu'))


def test_several_targets_take_what_their_outputs_take():
    rows = [dict(kind='abc'[i % 3], size=float(i)) for i in range(6)]
    t = Targets(kind=CategoryTarget(), size=RegressionTarget()).fit(rows)
    def predicted(n_labels, loss):
        model = nn.Sequential(Small(), nn.Linear(32, t.n_out))
        return predict_memory(Learner(loaders(32, 8, torch.zeros(n_labels)), model, loss_func=loss), [1, 2])
    many, one = predicted(t.n_cols, t.loss()), predicted(t.n_out, BCEWithLogitsLossFlat())
    assert np.allclose(many.total, one.total, rtol=.01)


def test_a_loss_that_cannot_be_traced_has_a_stand_in_and_a_warning():
    def make(loss): return Learner(loaders(32, 8), nn.Sequential(Small(), nn.Linear(32, 4)), loss_func=loss)
    said = 'DiceLoss cannot be run without real tensors .*: a log-softmax of the output is counted in its place'
    with pytest.warns(UserWarning, match=said):
        found = predict_memory(make(DiceLoss()), [1, 2])
    assert np.allclose(found.total, predict_memory(make(CrossEntropyLossFlat()), [1, 2]).total, rtol=.01)


# --- what a row means -----------------------------------------------------------------------------------------------
def test_categories_add_up_and_follow_the_batch():
    memory = predict_memory(timm_learner('resnet18', 64, 48, adamw), (1, 2, 4, 48))
    assert (memory.drop(columns=['items', 'total']).sum(axis=1) == memory.total).all() and (memory >= 0).all(axis=None)
    assert list(memory['items']) == [48, 24, 12, 1] and list(memory.index) == [1, 2, 4, 48]
    assert (memory.inputs == 48*(3*64*64*4+8)).all()
    assert memory.activations[2] == pytest.approx(memory.activations[1]/2, rel=.02)


def step(lines, state=0, update=0, item=0):
    return StepMemory(n=64, parameters=1000, gradients=500, state=state, update=update, item=item, output=0,
                      lines=lines, first=lines, forward=(0, 1), keeps_gradients=True)


def test_the_closed_form_is_the_highest_line():
    m = step((np.array([0., 100, 10]), np.array([1., 0, 8])), item=2)
    assert [m.at(a)['total'] for a in (1, 8, 64)] == [1000+500+128+o for o in (522, 100, 100)]


def test_the_update_is_a_floor():
    m = step((np.array([0.]), np.array([1.])), state=700, update=300)
    assert [m.at(a)['total'] for a in (1, 2, 64)] == [2500]*3
    assert m.at(1)['temporaries'] == 300 and m.at(1)['activations'] == 0


def test_a_prediction_leaves_the_learner_alone():
    learn = timm_learner('resnet18', 64, 8)
    learn.model.eval()
    learn.freeze_to(-1)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    flags, modes = [p.requires_grad for p in learn.model.parameters()], [m.training for m in learn.model.modules()]
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    drawn = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    opt, names = learn.opt, set(vars(learn))
    predict_memory(learn)
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == drawn
    assert flags == [p.requires_grad for p in learn.model.parameters()]
    assert modes == [m.training for m in learn.model.modules()]
    assert learn.opt is opt and set(vars(learn)) - names <= {'xb', 'yb'} and learn.xb == (None,)
    assert all(torch.equal(before[k], v) and type(v) is torch.Tensor for k, v in learn.model.state_dict().items())
    assert all(p.grad is None for p in learn.model.parameters())


# --- budgets --------------------------------------------------------------------------------------------------------
@given(n=st.integers(1, 10**6), space=st.sampled_from(['', ' ']),
       unit=st.sampled_from(['B', 'kB', 'MB', 'GB', 'TB', 'KiB', 'MiB', 'GiB', 'TiB']))
def test_sizes(n, unit, space):
    power = 'bkmgt'.index(unit[0].lower())
    assert parse_bytes(f'{n}{space}{unit}') == n*(1024 if 'i' in unit else 1000)**power


@pytest.mark.parametrize('size', ['16', 'GB', 'sixteen GB', '-3GB', '1,6GB', '16XB', '', '0GB', '1e3e3GB',
                                  None, 0, -5, True, math.nan, math.inf, []])
def test_sizes_that_cannot_be_read(size):
    said = "expected a size such as '16GB', '15.5GiB' or bytes as a number, at least 1, found"
    with pytest.raises(ValueError, match=said): parse_bytes(size)


@pytest.mark.parametrize('size, n', [(np.int64(16*10**9), 16*10**9), (np.float32(2), 2), (2.5e9, 2_500_000_000)])
def test_numbers_of_any_type(size, n): assert parse_bytes(size) == n


def test_nothing_may_be_held_in_reserve():
    learn = Learner(loaders(32, 30), Small(), loss_func=F.cross_entropy)
    assert {find_accumulation(learn, '1GB', reserve=o).reserve for o in (0, '0GB', '0 MiB')} == {0}
    with pytest.raises(ValueError, match='bytes as a number, at least 0, found -1'):
        find_accumulation(learn, '1GB', reserve=-1)


def test_nothing_to_train():
    learn = Learner(loaders(32, 8), Small().requires_grad_(False), loss_func=F.cross_entropy)
    with pytest.raises(ValueError, match='no parameter of Small is trained: unfreeze it'):
        predict_memory(learn, frozen=True)
    assert predict_memory(learn, [1]).gradients[1] > 0


def test_the_fewest_chunks_that_fit_are_found():
    learn = Learner(loaders(32, 30), Small(), loss_func=F.cross_entropy)
    table = predict_memory(learn, range(1, 31)).total
    for budget in np.linspace(float(table.min()), float(table[1]), 5).astype(int):
        found = find_accumulation(learn, int(budget), reserve=0)
        fits = [a for a in table.index if table[a] <= budget]
        assert found.total == table[fits[0]] and found.bs == math.ceil(30/found.accum) and found.total <= budget
    assert find_accumulation(learn, int(table.min())-1, reserve=0).accum is None


def test_when_nothing_fits_other_ways_are_named():
    found = find_accumulation(timm_learner('resnet18', 64, 16), '100MB', reserve=0)
    assert found.accum is found.bs is None and found.floor > 100e6
    for way in ('checkpointing', 'SGD without momentum', 'fused optimizer'): assert any(way in k for k in found.advice)
    assert 'no accumulation fits 100 MB' in repr(found) and f'needs {found.floor/1e6:.0f} MB' in repr(found)


@pytest.mark.slow
@pytest.mark.parametrize('arch, size', [
    ('convnext_large', (224, 224)), ('convnext_large', (320, 240)), ('vit_large_patch16_224', (224, 224)),
    ('swinv2_large_window12_192', (192, 192)), ('swin_large_patch4_window7_224', (224, 224))])
def test_the_large_models_of_part_3_need_two_chunks_on_16_gb(arch, size):
    dl = DataLoader([(torch.zeros(3, *size), torch.tensor(0))], bs=1, num_workers=0)
    dl.bs = 64
    model = timm.create_model(arch, num_classes=10)
    learn = Learner(DataLoaders(dl, dl), model, loss_func=CrossEntropyLossFlat(), cbs=MixedPrecision())
    assert find_accumulation(learn, '16GB').accum == 2


# --- bad input ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('accum', [0, -1, 1.5, '2', True, None])
def test_numbers_of_chunks(accum):
    with pytest.raises(ValueError, match='accums are numbers of chunks, positive ints; found'):
        predict_memory(timm_learner('resnet18', 64, 4), [accum])


def test_devices():
    with pytest.raises(ValueError, match="expected device 'cuda' or 'cpu', found 'mps'"):
        step_memory(timm_learner('resnet18', 64, 4), 'mps')


class ReadsValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 2)
    def forward(self, x):
        x = x.mean((2, 3))
        return self.lin(x) if x.sum().item() > 0 else self.lin(-x)


class OtherOperations(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 2)
    def forward(self, x):
        x = x.mean((2, 3))
        for _ in range(len(x)): x = x + 1
        return self.lin(x)


@pytest.mark.parametrize('model', [ReadsValues, OtherOperations])
def test_a_model_that_cannot_be_traced(model):
    said = (rf'{model.__name__} cannot be run without real tensors \(.*\): '
            r'measure it instead, with benchmark_accumulation\(make_learner\)')
    with pytest.raises(RuntimeError, match=said):
        predict_memory(Learner(loaders(8, 4), model(), loss_func=F.cross_entropy))


def test_the_picture_shows_every_category_and_the_budget():
    ax = plot_memory(predict_memory(timm_learner('resnet18', 64, 4), (1, 2)), '1GB')
    categories = ['parameters', 'gradients', 'optimizer', 'inputs', 'activations', 'temporaries']
    assert [o.get_text() for o in ax.get_legend().get_texts()] == ['budget 1GB', *categories]
    assert isinstance(predict_memory(timm_learner('resnet18', 64, 4), (1,)), pd.DataFrame)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('accum', [1, 2, 4])
def test_within_a_tenth_of_what_a_gpu_allocates(accum):
    learn = timm_learner('resnet18', 128, 32, adamw)
    predicted = float(predict_memory(learn, [accum]).total[accum])
    learn.model.cuda()
    batch = [o.cuda() for o in learn.dls.one_batch()]
    learn.dls = DataLoaders([batch]*3, [])
    torch.cuda.reset_peak_memory_stats()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=MicroBatch(32//accum))
    assert torch.cuda.max_memory_allocated() == pytest.approx(predicted, rel=.1)
