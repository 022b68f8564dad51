"Predicted memory against real tensors, PyTorch's own tracker and a card; budgets, bad input, what is left alone"
import json
import math
import random
import re
import threading
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import Adam, OptimWrapper, SGD
from fastai.vision.learner import create_unet_model, vision_learner
from fastai.vision.models import resnet18
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from alive import Alive
from paddy_multi.accumulate.memory import find_accumulation, parse_bytes, plot_memory, predict_memory
from paddy_multi.accumulate.microbatch import MicroBatch
from paddy_multi.accumulate.processes import free_memory
from paddy_multi.accumulate.steps import step_memory
from paddy_multi.kinds.category import CategoryTarget
from paddy_multi.kinds.regression import RegressionTarget
from paddy_multi.all import Targets

pytestmark = [pytest.mark.usefixtures('on_cpu'), pytest.mark.filterwarnings(
    'ignore:.*CUDA is not available', 'ignore:.*BatchNorm takes', 'ignore:.*torch.jit.script',
    'ignore:.*lr_scheduler.step', 'ignore:.*mix')]
adamw = partial(OptimWrapper, opt=torch.optim.AdamW)
H200 = json.loads((Path(__file__).parent/'h200_memory.json').read_text())


def loaders(size, bs, label=torch.tensor(0)):
    items = [(torch.zeros(3, size, size), label)]*bs
    return DataLoaders(*[DataLoader(items, bs=bs, num_workers=0)]*2)


def loaders_of(item, bs):
    return DataLoaders(*[DataLoader([item]*bs, bs=bs, num_workers=0)]*2)


def timm_learner(arch, size, bs, opt=Adam, **kwargs):
    model = timm.create_model(arch, num_classes=10)
    return Learner(loaders(size, bs), model, loss_func=CrossEntropyLossFlat(), opt_func=opt, **kwargs)


class Fresh(list):
    "A loader whose batches are made when they are wanted"
    def __iter__(self): return (tree_map(torch.zeros_like, o) for o in list.__iter__(self))


def counted(learn, accum, whole_head=False, new=False, validates=True):
    "Most bytes of real tensors in a fit: one batch twice, or `new` ones, and validation; the state is there"
    learn.create_opt()
    for p in learn.model.parameters():
        if p.requires_grad: p.grad = torch.zeros_like(p)
    learn.opt.step()
    learn.opt.zero_grad()
    batch, n_inp = learn.dls.one_batch(), getattr(learn.dls, 'n_inp', 1)
    valid = learn.dls.valid.one_batch()
    same = not new and len(tree_leaves(valid)[0]) == len(tree_leaves(batch)[0])
    if same: learn.dls = DataLoaders([batch]*2, [batch]*(2 if validates else 0))
    else: learn.dls = DataLoaders(Fresh([batch]*(3 if new else 1)), Fresh([valid]*(2 if new else 1)))
    learn.dls.n_inp = n_inp
    with Alive(block=512) as alive, learn.no_bar(), learn.no_logging():
        opt = learn.opt.opt if hasattr(learn.opt, 'opt') else learn.opt
        alive.add([*learn.model.parameters(), *learn.model.buffers(), *([batch] if same else [])])
        alive.add([p.grad for p in learn.model.parameters() if p.grad is not None])
        alive.add([o for s in opt.state.values() for o in s.values()])
        n = len(tree_leaves(batch)[0])
        learn.fit(1, cbs=MicroBatch(math.ceil(n/accum), whole_head) if accum > 1 else None)
    return alive.most


def compare(make, accums, tol=.01, whole_head=False, valid=True):
    predicted = predict_memory(make(), accums, device='cpu', whole_head=whole_head, valid=valid).total
    found = {a: counted(make(), a, whole_head, validates=valid) for a in accums}
    assert {a: float(predicted[a])/found[a] for a in accums} == pytest.approx({a: 1 for a in accums}, abs=tol)


# --- against real tensors -------------------------------------------------------------------------------------------
class Small(nn.Module):
    "Branches, an in-place operation, a tied weight and a buffer"
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 32, 3), nn.Linear(32, 32)
        self.again = self.out
        self.register_buffer('scale', torch.ones(10, 10))
    def forward(self, x):
        x = F.relu(self.conv(x), inplace=True)
        x = F.dropout(x + x.sigmoid(), .1, self.training).mean((2, 3))
        return self.again(self.out(x))


@pytest.mark.parametrize('opt', [Adam, SGD, partial(SGD, mom=.9), adamw, partial(OptimWrapper, opt=torch.optim.SGD)],
                         ids=['Adam', 'SGD', 'momentum', 'AdamW', 'torch SGD'])
def test_own_model_with_any_optimizer(opt):
    compare(lambda: Learner(loaders(32, 24), Small(), loss_func=CrossEntropyLossFlat(), opt_func=opt), (1, 2, 3))


slow = pytest.mark.slow
QUICK = [('convnext_atto', 64), ('resnet10t', 64), ('test_efficientnet', 64), ('mobilenetv3_small_050', 64),
         ('regnety_002', 64), ('test_vit', 160), ('test_nfnet', 64), ('test_mambaout', 64)]


@pytest.mark.parametrize('arch, size', QUICK)
def test_timm_models(arch, size):
    compare(lambda: timm_learner(arch, size, 4), (1, 2))


# one or two of a family; those of one size of pictures at that size
MANY = {96: '''densenet121 mobilenetv2_035 mnasnet_small tinynet_e lcnet_035 mobilevit_xxs mobilevitv2_050 fastvit_t8
        repvgg_a0 hardcorenas_a fbnetc_100 dla46_c hrnet_w18_small cs3darknet_focus_s poolformer_s12 pvt_v2_b0
        efficientvit_b0 inception_next_atto mambaout_femto starnet_s1 hgnetv2_b0 selecsls42 skresnet18 resnest14d
        ese_vovnet19b_dw mobileone_s0 eca_nfnet_l0 mobilenetv4_conv_small shvit_s1 regnetx_002
        ghostnet_050 edgenext_xx_small
        efficientnet_lite0''',
        224: '''vit_tiny_patch16_224 deit_tiny_patch16_224 cait_xxs24_224 xcit_nano_12_p16_224 levit_128s pit_ti_224
        convit_tiny
        mixer_s32_224 resmlp_12_224 gmlp_ti16_224 efficientformer_l1 visformer_tiny
        eva02_tiny_patch14_224 coat_lite_tiny'''}


@pytest.mark.slow
@pytest.mark.parametrize('arch, size', [(arch, size) for size, archs in MANY.items() for arch in archs.split()])
def test_forty_architectures_of_timm(arch, size):
    compare(lambda: timm_learner(arch, size, 6, adamw), (1, 2, 3))


@pytest.mark.slow
@pytest.mark.parametrize('arch, size', [('convnext_small', 128), ('resnet50', 224), ('vit_small_patch16_224', 224)])
def test_the_models_of_the_tables_in_batches_of_64(arch, size):
    compare(lambda: timm_learner(arch, size, 64, adamw), (1, 2, 4, 8))


def dense_learner(px=96, **kwargs):
    "21 classes for each of px x px pixels"
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
                        nn.Conv2d(16, 21, 1))
    dls = loaders(px, 16, torch.zeros(px, px, dtype=torch.long))
    return Learner(dls, net, loss_func=CrossEntropyLossFlat(axis=1), opt_func=SGD, **kwargs)


def pixel_accuracy(preds, targs): return (preds.argmax(1) == targs).float().mean()


def test_memory_of_dense_outputs_falls_with_every_chunk():
    accums = (1, 2, 4, 8, 16)
    compare(dense_learner, (1, 2, 4), tol=.03, valid=False)  # below, the first batch's look at the loss takes most
    total = predict_memory(dense_learner(), accums, device='cpu', valid=False).total
    assert (total.diff().dropna() < 0).all()


def reads_training(make):
    learn = make(metrics=pixel_accuracy)
    learn.recorder.train_metrics = True
    return learn


def test_outputs_that_a_metric_reads_are_counted():
    def make(): return reads_training(dense_learner)
    outputs = 16*21*96*96*4
    totals = [predict_memory(o(), [16], device='cpu', valid=False).total[16] for o in (dense_learner, make)]
    assert totals[1] >= 2*outputs > totals[0]
    compare(make, (1, 4, 16), tol=.05, valid=False)


@pytest.mark.parametrize('read', [False, True])
def test_outputs_of_the_batch_before_are_counted(read):
    "A frozen body takes most in its middle, where they are still there"
    def make(**kwargs):
        learn = dense_learner(48, **kwargs)
        learn.model[2] = nn.Conv2d(16, 128, 3, padding=1)
        learn.model[4] = nn.Sequential(nn.Conv2d(128, 16, 1), nn.ReLU(), nn.Conv2d(16, 21, 1))
        learn.model[:4].requires_grad_(False)
        learn.model[4][0].requires_grad_(False)
        return learn
    make_one = partial(reads_training, make) if read else make
    predicted = predict_memory(make_one(), (1, 2, 4), device='cpu', frozen=True, valid=False).total
    for accum in (1, 2, 4):
        assert float(predicted[accum]) == pytest.approx(counted(make_one(), accum, validates=False), rel=.03)


def test_a_loss_over_pairs_of_a_batch_grows_with_its_square():
    def info_nce(preds, _):
        z = F.normalize(preds, dim=1)
        return F.cross_entropy(z@z.T/.1, torch.arange(len(z), device=z.device))
    def make():
        net = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 32))
        return Learner(loaders_of((torch.zeros(16), torch.tensor(0)), 1024), net, loss_func=info_nce, opt_func=SGD)
    compare(make, (1,))
    assert find_accumulation(make(), '10MB', 0, device='cpu').accum > 1


class OverTheBatch(nn.Module):
    "Attention between the items"
    def __init__(self):
        super().__init__()
        self.lin, self.out = nn.Linear(8, 24), nn.Linear(8, 2)
    def forward(self, x):
        q, k, v = self.lin(x).chunk(3, -1)
        return self.out((q@k.T).softmax(-1)@v)


class LastStep(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.out = kind(16, 64, batch_first=True), nn.Linear(64, 10)
    def forward(self, x): return self.out(self.rnn(x)[0][:, -1])


def rows(net, item, n, loss=None):
    return Learner(loaders_of(item, n), net, loss_func=loss or CrossEntropyLossFlat(), opt_func=SGD)


LABEL = torch.tensor(1)
FIELD = {
    'attention over the batch': lambda: rows(OverTheBatch(), (torch.zeros(8), LABEL), 512),
    'small rows': lambda: rows(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
                               (torch.zeros(4), LABEL), 4096),
    'ids': lambda: rows(nn.Sequential(nn.Embedding(50, 8), nn.Flatten(), nn.Linear(16, 5)),
                        (torch.zeros(2).long(), LABEL), 4096),
    'GRU': lambda: rows(LastStep(nn.GRU), (torch.zeros(20, 16), LABEL), 16),
    'U-Net': lambda: rows(create_unet_model(resnet18, 6, (64, 64), pretrained=False),
                          (torch.zeros(3, 64, 64), torch.zeros(64, 64).long()), 2, CrossEntropyLossFlat(axis=1)),
}


@pytest.mark.parametrize('name', [pytest.param(o, marks=slow if o == 'U-Net' else ()) for o in FIELD])
def test_what_a_line_through_two_sizes_missed(name):
    "Off by -99 % to +25 % when memory was taken from a line through 4 and 8 items"
    compare(FIELD[name], (1, 2) if name != 'attention over the batch' else (1,), tol=.03)


def test_mixed_pictures_are_counted():
    def make(): return timm_learner('test_resnet', 64, 8, SGD, cbs=MixUp())
    compare(make, (1, 4), tol=.03)
    plain = predict_memory(timm_learner('test_resnet', 64, 8, SGD), [4], device='cpu')
    assert predict_memory(make(), [4], device='cpu').inputs[4]-plain.inputs[4] >= 8*3*64*64*4


@pytest.mark.slow
def test_a_whole_head_is_counted():
    def make():
        return vision_learner(loaders(64, 16), 'resnet18', pretrained=False, normalize=False, n_out=10,
                              loss_func=CrossEntropyLossFlat(), opt_func=SGD)
    compare(make, (1, 2, 4), tol=.03, whole_head=True)
    fewer, more = (predict_memory(make(), [8], device='cpu', whole_head=o).total[8] for o in (False, True))
    assert fewer < more


# --- a whole fit, with validation -----------------------------------------------------------------------------------
def valid_of(learn, bs):
    "The same learner with batches of `bs` for validation"
    items = [learn.dls.train.dataset[0]]*bs
    learn.dls = DataLoaders(learn.dls.train, DataLoader(items, bs=bs, num_workers=0))
    return learn


SCALARS = 16*512  # losses that fastai's recorder keeps, on the CPU
FITS = {
    'classifier': lambda: timm_learner('convnext_atto', 64, 16, SGD),
    'BatchNorm': lambda: timm_learner('resnet10t', 64, 16, adamw, metrics=accuracy),
    'larger batches for validation': lambda: valid_of(timm_learner('efficientnet_lite0', 64, 16, SGD), 48),
    'every pixel': dense_learner,
    'every pixel, read by a metric': lambda: dense_learner(metrics=pixel_accuracy),
}


@pytest.mark.parametrize('name', [pytest.param(o, marks=() if o.startswith('every pixel') else slow) for o in FITS])
def test_a_budget_holds_through_a_fit_with_validation(name):
    make = FITS[name]
    table = predict_memory(make(), (1, 2, 16), device='cpu')
    assert table.total[16] < table.total[1]
    for budget in (.5*(table.reserved[1]+table.reserved[2]), 1.02*table.reserved[16]):
        found = find_accumulation(make(), int(budget), 0, device='cpu')
        assert .95*found.total <= counted(make(), found.accum) <= budget+SCALARS, found
        found = find_accumulation(make(), int(budget), device='cpu')
        assert .9*found.total <= counted(make(), found.accum, new=True) <= budget+SCALARS, found
    assert 'validation in batches of' in repr(found)


def test_batches_for_validation_are_part_of_the_prediction():
    def make(): return valid_of(timm_learner('resnet10t', 64, 8, SGD), 256)
    with_valid, without = (predict_memory(make(), [1, 8], device='cpu', valid=o) for o in (True, False))
    assert with_valid.attrs['moments'] == {1: 'validation', 8: 'validation'}
    assert with_valid.total[1] > with_valid.total[8] > without.total[8]
    for accum in (1, 8): assert float(with_valid.total[accum]) == pytest.approx(counted(make(), accum), rel=.03)


# --- against a card, on its kernels ---------------------------------------------------------------------------------
def on_a_card(row):
    "The row of the H200, and what is predicted for it"
    shape, optimizer = (3, row['size'], row['size']), dict(adam=Adam, adamw=adamw)[row['optimizer']]
    dl = DataLoader([(torch.zeros(shape), torch.tensor(0))], bs=1, num_workers=0)
    dl.bs = row['bs']
    model = timm.create_model(row['arch'], num_classes=10, **row.get('options', {}))
    learn = Learner(DataLoaders(dl, dl), model, loss_func=CrossEntropyLossFlat(), opt_func=optimizer)
    if row['precision'] != 'fp32': learn.add_cb(MixedPrecision(amp_mode=row['precision']))
    return predict_memory(learn, [row['accum']], valid=False).loc[row['accum']]


def within_a_card(row):
    found = on_a_card(row)
    allocated, reserved = row['allocated'], row['reserved']
    assert abs(found.total+found.workspace-allocated) <= max(.03*allocated, 30e6)
    held = found.total+found.workspace  # fits of the card saw one batch again and again, so none before it was held
    if reserved: assert .87 < found.reserved/reserved*(held/(held+found.inputs)) < 1.1


needs_kernels = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason='this PyTorch has no kernels of CUDA')


@needs_kernels
@pytest.mark.parametrize('place', [12, 44, 57])
def test_within_three_percent_of_an_h200(place): within_a_card(H200['rows'][place])


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize('row', H200['rows'], ids=lambda o: f'{o["arch"]} {o["precision"]} accum {o["accum"]}')
def test_all_rows_of_an_h200(row): within_a_card(row)


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
        learn = vision_learner(loaders(64, 8), 'test_resnet', pretrained=False, normalize=False, n_out=10,
                               loss_func=CrossEntropyLossFlat())
        learn.freeze()
        return learn
    whole, frozen = (predict_memory(make(), [1, 2], device='cpu', frozen=f).total for f in (False, True))
    assert frozen[1] < whole[1]
    for a in (1, 2): assert float(frozen[a]) == pytest.approx(counted(make(), a), rel=.01)


@pytest.mark.slow
def test_mixed_precision_takes_less_on_a_gpu_and_is_nothing_on_a_cpu():
    plain, half = timm_learner('test_vit', 160, 16), timm_learner('test_vit', 160, 16, cbs=MixedPrecision())
    activations = [float(predict_memory(o, [1]).activations[1]) for o in (plain, half)]
    assert .4 < activations[1]/activations[0] < .8
    assert predict_memory(plain, [2], device='cpu').equals(predict_memory(half, [2], device='cpu'))


def test_several_targets_take_what_their_outputs_take():
    rows = [dict(kind='abc'[i % 3], size=float(i)) for i in range(6)]
    t = Targets(kind=CategoryTarget(), size=RegressionTarget()).fit(rows)
    def predicted(n_labels, loss):
        model = nn.Sequential(Small(), nn.Linear(32, t.n_out))
        return predict_memory(Learner(loaders(32, 8, torch.zeros(n_labels)), model, loss_func=loss), [1, 2])
    many, one = predicted(t.n_cols, t.loss()), predicted(t.n_out, BCEWithLogitsLossFlat())
    assert np.allclose(many.total, one.total, rtol=.01)


# --- what a row means -----------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_categories_add_up_and_follow_the_batch():
    memory = predict_memory(timm_learner('test_resnet', 64, 48, adamw), (1, 2, 4, 48))
    categories = memory.loc[:, 'parameters':'temporaries']
    assert (categories.sum(axis=1) == memory.total).all() and (memory >= 0).all(axis=None)
    assert list(memory.columns[-3:]) == ['total', 'workspace', 'reserved']
    assert (memory.workspace == 10**8).all() and (memory.reserved > memory.total+memory.workspace).all()
    assert list(memory['items']) == [48, 24, 12, 1] and list(memory.index) == [1, 2, 4, 48]
    assert (memory.inputs == 48*3*64*64*4 + 512).all()  # labels are 384 bytes, in blocks of 512
    assert memory.activations[2] == pytest.approx(memory.activations[1]/2, rel=.02)


def test_a_cpu_takes_nothing_but_tensors():
    memory = predict_memory(timm_learner('test_resnet', 64, 8), device='cpu')
    assert (memory.workspace == 0).all() and (memory.reserved == memory.total+memory.inputs).all()
    assert memory.attrs['kernels'] == 'cpu' and list(memory.index) == [1, 2, 4, 8]


@pytest.mark.slow
def test_activations_by_module_add_up():
    learn = timm_learner('test_convnext', 64, 8)
    memory, found = predict_memory(learn, [1, 4]), predict_memory(learn, [1, 4], per_module=True)
    assert {'stem', 'stages', 'head', 'loss'} <= set(predict_memory(learn, [1], per_module=1).index)
    assert 'stages.2' in found.index and (found[1].diff().dropna() <= 0).all()
    assert list(found.columns) == [1, 4]
    for accum in (1, 4): assert found[accum].sum() == pytest.approx(memory.activations[accum], rel=1e-3)


def test_a_prediction_leaves_the_learner_alone():
    learn = timm_learner('test_resnet', 64, 8)
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
    assert learn.opt is opt and set(vars(learn)) == names
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


@pytest.mark.parametrize('size, n', [(np.int64(16*10**9), 16*10**9), (np.float32(2), 2), (2.5e9, 2_500_000_000),
                                     (1e16, 10**16), ('.5GB', 500_000_000), ('1e3 kB', 10**6)])
def test_numbers_of_any_type(size, n): assert parse_bytes(size) == n


def test_nothing_may_be_held_in_reserve():
    learn = Learner(loaders(32, 30), Small(), loss_func=F.cross_entropy)
    assert {find_accumulation(learn, '1GB', reserve=o).reserve for o in (0, '0', '0GB', '0 MiB')} == {0}
    with pytest.raises(ValueError, match='bytes as a number, at least 0, found -1'):
        find_accumulation(learn, '1GB', reserve=-1)
    with pytest.raises(ValueError, match='expected a reserve that is less than the budget of 1MB, found 1000kB'):
        find_accumulation(learn, '1MB', reserve='1000kB')


def test_what_is_predicted_besides_tensors_is_part_of_what_must_fit():
    learn = timm_learner('test_resnet', 64, 32)
    table = predict_memory(learn, [1, 2])
    found = [find_accumulation(learn, int(o)) for o in (table.reserved[1], table.reserved[1]-1)]
    assert found[0].accum == 1 and found[0].reserve == table.reserved[1]-table.total[1]
    assert found[1].accum == 2 and found[1].total == table.total[2]
    assert find_accumulation(learn, int(table.total[1]), 0).accum == 1


def test_the_smallest_chunk_is_one_that_batchnorm_takes():
    net = nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64), nn.Linear(64, 2))
    learn = rows(net, (torch.zeros(4), LABEL), 8)
    found = find_accumulation(learn, 1000, 0, device='cpu')
    assert found.smallest == 2 and '2 items at a time need' in repr(found)
    assert found.floor == predict_memory(learn, [4], device='cpu').total[4]
    with pytest.raises(ValueError, match='Sequential cannot train on one item at a time, since BatchNorm takes'):
        predict_memory(learn, [8])


class NotOne(nn.Module):
    "Drops the dimension of the items where there is one"
    def __init__(self):
        super().__init__()
        self.lin, self.out = nn.Linear(4, 8), nn.Linear(8, 2)
    def forward(self, x):
        x = self.lin(x).squeeze()
        return self.out(torch.cat([x[:, :4], x[:, 4:]], 1))


def test_a_model_that_refuses_one_item_is_split_as_far_as_it_goes():
    learn = rows(NotOne(), (torch.zeros(4), LABEL), 8)
    found = find_accumulation(learn, '1GB')
    assert found.accum == 1 and found.smallest == 2 and found.floor == predict_memory(learn, [4]).total[4]
    memory = step_memory(learn)
    with pytest.raises(RuntimeError, match='NotOne cannot be run without real tensors .IndexError: too many'):
        memory.at(8)
    assert len(memory.step.model._forward_pre_hooks) == 0


def test_a_model_that_takes_no_number_of_items_says_why_of_the_whole_batch():
    learn = rows(nn.Linear(5, 2), (torch.zeros(4), LABEL), 8)
    with pytest.raises(RuntimeError, match=r'Linear cannot be run without real tensors .*\[8, 4\] X \[5, 2\]'):
        find_accumulation(learn, '1GB')


class Locks(Callback):
    def __init__(self): self.lock = threading.Lock()
    def after_loss(self): pass


def test_a_callback_that_cannot_be_copied_is_left_out():
    def predicted(*cbs):
        return predict_memory(Learner(loaders(32, 8), Small(), loss_func=F.cross_entropy, cbs=cbs), [1])
    with pytest.warns(UserWarning, match='Locks cannot be copied .TypeError: .*: what it takes is not counted'):
        assert predicted(Locks()).equals(predicted())


class Positions(nn.Module):
    "Makes a buffer when it sees how large its inputs are, as timm's ConViT does"
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(64, 64)
        self.register_buffer('table', torch.zeros(1))
    def forward(self, x):
        if len(self.table) != x.shape[-1]: self.table = torch.zeros(x.shape[-1], 4096)
        return self.lin(x)+self.table.sum(1)


def test_a_buffer_that_a_model_makes_in_forward_is_in_every_prediction():
    learn = rows(Positions(), (torch.zeros(64), LABEL), 64)
    together = predict_memory(learn, [1, 2, 4], device='cpu').total
    alone = [predict_memory(learn, [o], device='cpu').total[o] for o in (1, 2, 4)]
    assert together.tolist() == alone and min(alone) > 64*4096*4


def test_nothing_to_train():
    learn = Learner(loaders(32, 8), Small().requires_grad_(False), loss_func=F.cross_entropy)
    with pytest.raises(ValueError, match='no parameter of Small is trained: unfreeze it'):
        predict_memory(learn, frozen=True)
    assert predict_memory(learn, [1]).gradients[1] > 0
    found = find_accumulation(learn, '1MB')
    assert found.accum is None and 'a frozen body, with freeze()' not in found.advice
    for device in ('cuda', 'cpu'):
        said = repr(find_accumulation(learn, 1000, device=device))
        assert max(map(len, said.splitlines())) <= 92 and 'needs 0 MB' not in said and 'fits 0 MB' not in said
    with pytest.raises(ValueError, match='no parameter of Flatten is trained'):
        predict_memory(Learner(loaders(32, 8), nn.Flatten(), loss_func=F.cross_entropy))


def test_the_fewest_chunks_that_fit_are_found():
    learn = Learner(loaders(32, 30), Small(), loss_func=F.cross_entropy)
    table = predict_memory(learn, range(1, 31)).total
    for budget in np.linspace(float(table.min()), float(table[1]), 5).astype(int):
        found = find_accumulation(learn, int(budget), reserve=0)
        fits = [a for a in table.index if table[a] <= budget]
        assert found.total == table[fits[0]] and found.bs == math.ceil(30/found.accum) and found.total <= budget
    assert find_accumulation(learn, int(table.min())-1, reserve=0).accum is None


def body_and_head(model):
    return [[p for k, p in model.named_parameters() if ('fc' in k) == last] for last in (False, True)]


def test_when_nothing_fits_what_does_is_named_with_what_it_takes_of_the_budget():
    learn = timm_learner('test_resnet', 64, 16, splitter=body_and_head)
    learn.freeze()
    frozen = find_accumulation(learn, '1GB', frozen=True)
    learn.unfreeze()
    whole = predict_memory(learn, [16])
    sgd = predict_memory(timm_learner('test_resnet', 64, 16, SGD), [16]).reserved[16]
    of_frozen = predict_memory(frozen_again(learn), [16], frozen=True).reserved[16]
    found = find_accumulation(learn, int(whole.reserved[16])-1)
    assert found.accum is found.bs is None and found.floor == whole.total[16]
    assert found.floor+found.reserve == whole.reserved[16]
    assert found.advice['a frozen body, with freeze()'] == of_frozen and found.advice['SGD without momentum'] == sgd
    assert max(found.advice.values()) <= found.budget and 'What fits, one item at a time' in repr(found)
    near = find_accumulation(learn, '1MB')
    assert len(near.advice) == 1 and min(near.advice.values()) == min(found.advice.values()) > near.budget
    assert 'What comes nearest' in repr(near) and 'plan_training tries checkpointing, too' in repr(near)
    assert frozen.floor < found.floor and not find_accumulation(frozen_again(learn), '1MB', 0, 'cpu', True).advice.get(
        'a frozen body, with freeze()')


def frozen_again(learn):
    learn.freeze()
    return learn


def test_of_a_frozen_learner_is_said_what_is_counted():
    learn = timm_learner('test_resnet', 64, 4, splitter=body_and_head)
    assert 'frozen' not in repr(find_accumulation(learn, '1GB', device='cpu'))
    learn.freeze()
    with pytest.warns(UserWarning, match='for the whole model, though some of it is frozen now .frozen=True for what'):
        whole = predict_memory(learn, [1], device='cpu').total[1]
    found = find_accumulation(learn, '1GB', device='cpu')
    assert found.total == whole and 'training of the whole model, though some of it is frozen now' in repr(found)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert predict_memory(learn, [1], device='cpu', frozen=False).total[1] == whole
        assert predict_memory(learn, [1], device='cpu', frozen=True).total[1] < whole
    assert 'frozen' not in repr(find_accumulation(learn, '1GB', device='cpu', frozen=True))


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
@pytest.mark.parametrize('accums, wrong', [([o], o) for o in (0, -1, 1.5, '2', True, None)] + [(4, 4), ([], []), (
    '12', '1')])
def test_numbers_of_chunks(accums, wrong):
    said = f'accums are numbers of chunks, a list of positive ints; found {wrong!r}'
    with pytest.raises(ValueError, match=re.escape(said)):
        predict_memory(timm_learner('test_resnet', 64, 4), accums)


@pytest.mark.parametrize('depth', [-1, 0, .5, '2'])
def test_how_deep_in_the_names_of_modules(depth):
    with pytest.raises(ValueError, match=f'or how deep in the names of modules, from 1; found {depth!r}'):
        predict_memory(timm_learner('test_resnet', 64, 4), per_module=depth)


def test_numbers_of_chunks_may_be_numpys():
    learn = Learner(loaders(32, 8), Small(), loss_func=F.cross_entropy)
    assert predict_memory(learn, np.array([1, 2])).equals(predict_memory(learn, (1, 2)))


@pytest.mark.parametrize('accums', [[5], [1, 64]])
def test_more_chunks_than_items(accums):
    with pytest.raises(ValueError, match=f'accums: a batch of 4 cannot be run in {accums[-1]} chunks'):
        predict_memory(timm_learner('test_resnet', 64, 4), accums)
    assert list(predict_memory(timm_learner('test_resnet', 64, 4), device='cpu').index) == [1, 2, 4]


def test_devices():
    with pytest.raises(ValueError, match="expected device 'cuda' or 'cpu', found 'mps'"):
        step_memory(timm_learner('test_resnet', 64, 4), 'mps')


def test_the_picture_shows_every_category_and_the_budget():
    ax = plot_memory(predict_memory(timm_learner('test_resnet', 64, 4), (1, 2)), '1GB')
    categories = ['parameters', 'gradients', 'optimizer', 'inputs', 'activations', 'temporaries', 'workspace',
                  'allocator']
    assert [o.get_text() for o in ax.get_legend().get_texts()] == ['budget 1GB', *categories]
    assert isinstance(predict_memory(timm_learner('test_resnet', 64, 4), (1,)), pd.DataFrame)


@pytest.mark.gpu
@pytest.mark.parametrize('accum', [1, 2, 4])
def test_within_a_tenth_of_what_a_gpu_allocates(accum):
    learn = timm_learner('resnet18', 128, 32, adamw)
    found = predict_memory(learn, [accum], valid=False).loc[accum]
    free_memory()
    before = torch.cuda.memory_allocated()
    learn.model.cuda()
    batch = [o.cuda() for o in learn.dls.one_batch()]
    learn.dls = DataLoaders([batch]*3, [])
    torch.cuda.reset_peak_memory_stats()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=MicroBatch(32//accum) if accum > 1 else None)
    allocated = torch.cuda.max_memory_allocated()-before
    assert found.total < allocated < 1.1*(found.total+found.workspace)
