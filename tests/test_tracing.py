"A step on fake tensors: every kind of learner, exact against counted real tensors, near what an H200 allocated"
import json
import string
import tempfile
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.tabular.all import Categorify, CategoryBlock, Normalize, TabularDataLoaders, tabular_learner
from fastai.text.all import (AWD_LSTM, Categorize, ColReader, Datasets, LMDataLoader, Numericalize, RandomSplitter,
                             language_model_learner, pad_input_chunk, text_classifier_learner)
from fastai.vision.all import (CrossEntropyLossFlat, CutMix, DataLoader, DataLoaders, DiceLoss, FocalLossFlat, L, Lamb,
                               Larc, Learner, MixUp, OptimWrapper, QHAdam, RMSProp, SGD, create_unet_model, ranger,
                               resnet18)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint_sequential

from alive import Alive
from paddy_multi.accumulate import copied
from paddy_multi.accumulate.copied import one_item
from paddy_multi.accumulate.tracing import TracedStep
from paddy_multi.core.fake_tensors import FakeMode
from paddy_multi.core.tensors import replaced
from paddy_multi.data.digits import sample_digits
from paddy_multi.data.loaders import MultiTargetDataLoaders
from paddy_multi.targets.declare import Targets
from paddy_multi.train.learner import MultiTargetLearner, multi_target_learner

warnings.filterwarnings('ignore', message='.*(torch.jit.script|CUDA is not available).*')
ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures('on_cpu')


# --- learners -------------------------------------------------------------------------------------------------------
def loaders(items, n_inp=None):
    dl = DataLoader(items, bs=len(items), num_workers=0)
    dls = DataLoaders(dl, dl)
    if n_inp: dls.n_inp = n_inp
    return dls


def of_pictures(model, n=8, px=64, **kw):
    items = [(torch.randn(3, px, px), torch.tensor(1))]*n
    return Learner(loaders(items), model, **{'loss_func': CrossEntropyLossFlat(), **kw})


def of_numbers(model=None, n=64, loss=None, **kw):
    items = [(torch.randn(16), torch.tensor(i%10)) for i in range(n)]
    return Learner(loaders(items), model or nn.Linear(16, 10), loss_func=loss or CrossEntropyLossFlat(), **kw)


def convnet():
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2),
                         nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(32, 10))


def timm_model(arch, **kw): return timm.create_model(arch, num_classes=10, **kw)


def vit(**kw): return timm_model('vit_tiny_patch16_224', img_size=64, patch_size=8, depth=4, **kw)


class Last(nn.Module):
    "The last step of a recurrent layer"
    def forward(self, o): return o[0][:, -1]


def recurrent(layer):
    items = [(torch.randn(50, 64), torch.tensor(1))]*8
    width = layer.hidden_size*(2 if layer.bidirectional else 1)
    return Learner(loaders(items), nn.Sequential(layer, Last(), nn.Linear(width, 10)), loss_func=CrossEntropyLossFlat())


def unet(loss=None, **kw):
    items = [(torch.randn(3, 64, 64), torch.randint(6, (64, 64)))]*4
    model = create_unet_model(resnet18, 6, (64, 64), pretrained=False)
    return Learner(loaders(items), model, loss_func=loss or CrossEntropyLossFlat(axis=1), **kw)


def texts(language_model=False):
    rng = np.random.default_rng(0)
    words = [''.join(rng.choice(list(string.ascii_lowercase), 4)) for _ in range(200)]
    df = pd.DataFrame(dict(text=[' '.join(rng.choice(words, 60)) for _ in range(80)], label=rng.choice(['a', 'b'], 80)))
    tokens = [ColReader('text'), lambda o: L(o.split()), Numericalize(vocab=['xxunk', 'xxpad', *words])]
    tfms = [tokens] if language_model else [tokens, [ColReader('label'), Categorize()]]
    kw = dict(dl_type=LMDataLoader) if language_model else {}
    sets = Datasets(df, tfms, splits=RandomSplitter(seed=1)(df), **kw)
    kw = dict(seq_len=40) if language_model else dict(before_batch=pad_input_chunk)
    return sets.dataloaders(bs=8, num_workers=0, device='cpu', **kw)


def text_classifier(): return text_classifier_learner(texts(), AWD_LSTM, pretrained=False, n_out=2, seq_len=20)


def language_model(): return language_model_learner(texts(True), AWD_LSTM, pretrained=False)


def tabular():
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=rng.choice(list('xyz'), 500), b=rng.normal(size=500), c=rng.normal(size=500),
                           t=rng.choice(['u', 'v'], 500)))
    dls = TabularDataLoaders.from_df(df, y_names='t', cat_names=['a'], cont_names=['b', 'c'], bs=64, device='cpu',
                                     procs=[Categorify, Normalize], y_block=CategoryBlock(), valid_idx=list(range(50)))
    return tabular_learner(dls, layers=[200, 100])


def collab():
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(user=rng.integers(0, 50, 2000), item=rng.integers(0, 80, 2000),
                           rating=rng.integers(1, 6, 2000)))
    return collab_learner(CollabDataLoaders.from_df(df, bs=64, seed=1, device='cpu'), n_factors=50, y_range=(0, 5.5))


def traced(learn, device='cuda', trainable='all', **kw):
    if device == 'cuda' and torch._C._get_accelerator().type not in ('cpu', 'cuda'):
        pytest.skip('kernels of CUDA are traced where PyTorch knows no other accelerator')
    return TracedStep(learn, one_item(learn)[0], device, trainable, **kw)


def total(step, n):
    "Most bytes of a batch in one piece: forward, backward and update"
    step.run(n)
    return max(step.peak, step.base+step.after+step.update)


# --- against real tensors -------------------------------------------------------------------------------------------
class Batches(list):
    "A loader of batches that are there"


def counted(learn):
    "Most bytes of real tensors in a batch of a fit, with the optimizer's state there before, and the batch's size"
    learn.model.requires_grad_(True)
    learn.create_opt()
    for p in learn.model.parameters(): p.grad = torch.zeros_like(p)
    learn.opt.step()
    learn.opt.zero_grad()
    batch = learn.dls.one_batch()
    loader = Batches([batch])
    dls = DataLoaders(loader, [])
    dls.n_inp = getattr(learn.dls, 'n_inp', 1)
    dls.targets = loader.targets = getattr(learn.dls, 'targets', None)
    learn.dls = dls
    inner = getattr(learn.opt, 'opt', learn.opt)
    with Alive(block=512) as count, learn.no_bar(), learn.no_logging():
        count.add([*learn.model.parameters(), *learn.model.buffers()])
        count.add([p.grad for p in learn.model.parameters() if p.grad is not None])
        count.add([*batch])
        count.add([dict(o) for o in inner.state.values()])
        learn.fit(1)
    return count.most, len(tree_leaves([*batch])[0])


class Mixing(nn.Module):
    "Attention over the batch"
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(16, 8)

    def forward(self, x):
        x = self.lin(x)
        return (x@x.T).softmax(1)@x


def info_nce(preds, targ):
    z = F.normalize(preds, dim=1)
    return F.cross_entropy(z@z.T/.1, torch.arange(len(z), device=preds.device))


adamw = partial(OptimWrapper, opt=torch.optim.AdamW)
EXACT = {
    'convnet': lambda: of_pictures(convnet()),
    'resnet10t': lambda: of_pictures(timm_model('resnet10t')),
    'vit': lambda: of_pictures(vit(), opt_func=adamw),
    'test_convnext': lambda: of_pictures(timm_model('test_convnext')),
    'LSTM': lambda: recurrent(nn.LSTM(64, 128, batch_first=True)),
    'GRU': lambda: recurrent(nn.GRU(64, 128, 2, batch_first=True, bidirectional=True)),
    'tabular': tabular, 'collab': collab, 'unet': unet, 'text classifier': text_classifier,
    'language model': language_model,
    'MixUp': lambda: of_pictures(convnet(), cbs=MixUp()), 'CutMix': lambda: of_pictures(convnet(), cbs=CutMix()),
    'checkpointed vit': lambda: of_pictures(checkpointed(vit())),
    'checkpointed test_convnext': lambda: of_pictures(checkpointed(timm_model('test_convnext'))),
    'InfoNCE': lambda: of_numbers(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 32)), 2048, info_nce, opt_func=SGD),
    'attention over the batch': lambda: of_numbers(Mixing(), 1024, lambda p, y: F.cross_entropy(p, y%8), opt_func=SGD)}


def checkpointed(model):
    model.set_grad_checkpointing(True)
    return model


RECURRENT = 'LSTM', 'GRU', 'text classifier', 'language model'


def quick(names, *shown):
    "All `names`, of which those that are not `shown` are tried by `make test-all` alone"
    return [o if o in shown else pytest.param(o, marks=pytest.mark.slow) for o in names]


@pytest.mark.parametrize('name', quick(EXACT, 'convnet', 'vit', 'LSTM', 'tabular', 'collab', 'MixUp', 'unet',
                                       'checkpointed vit', 'InfoNCE', 'attention over the batch'))
def test_a_step_takes_what_real_tensors_take(name):
    torch.manual_seed(0)
    real, n = counted(EXACT[name]())
    assert abs(total(traced(EXACT[name](), 'cpu'), n)/real-1) < .01


@pytest.mark.parametrize('name', quick([o for o in EXACT if o not in RECURRENT], 'convnet', 'collab', 'InfoNCE',
                                       'attention over the batch'))
def test_a_step_takes_as_much_on_the_kernels_of_cuda(name):
    "Where both have the same kernels; cuDNN's recurrent layers, and attention, keep other things than a CPU's"
    cpu, cuda = (total(traced(EXACT[name](), device), 8) for device in ('cpu', 'cuda'))
    assert abs(cuda-cpu) <= max(.01*cpu, 2048)


@pytest.mark.parametrize('name', ['convnet', 'vit', 'GRU', 'tabular', 'InfoNCE'])
def test_what_is_worked_out_once_is_what_pytorch_works_out_every_time(name):
    def lines(mode):
        with replaced(copied, 'FakeMode', mode): step = traced(EXACT[name](), trainable='all')
        return [step.run(n).tolist() for n in (8, 5, 8)], [step.peak, step.state, step.update, step.validate(5)]
    assert lines(FakeMode) == lines(FakeMode) == lines(partial(FakeTensorMode, allow_non_fake_inputs=True))


def segmentation(frozen):
    "21 classes of every pixel, by a body that is four times as wide in its middle"
    items = [(torch.randn(3, 32, 32), torch.randint(21, (32, 32)))]*8
    body = nn.Sequential(nn.Conv2d(3, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(),
                         nn.Conv2d(128, 16, 1)).requires_grad_(not frozen)
    return Learner(loaders(items), nn.Sequential(body, nn.ReLU(), nn.Conv2d(16, 21, 1)), opt_func=SGD,
                   loss_func=CrossEntropyLossFlat(axis=1))


@pytest.mark.parametrize('frozen', [False, True])
def test_the_output_of_the_batch_before_is_held_through_the_next(frozen):
    def fitted(n):
        learn = segmentation(frozen)
        learn.dls = DataLoaders([batch]*n, [])
        learn.create_opt()
        with Alive(block=512) as count, learn.no_bar(), learn.no_logging():
            count.add([*learn.model.parameters(), *batch])
            learn.fit(1)
        return count.most
    batch = segmentation(frozen).dls.one_batch()
    real = [fitted(n) for n in (1, 2, 3)]
    step = traced(segmentation(frozen), 'cpu', 'as is')
    step.run(8, gradients=False)
    found = [step.peak]
    step.run(8, gradients=True)
    found.append(max(step.peak, step.base+step.through+step.outputs))
    assert real[1]-real[0] == pytest.approx(step.gradients+step.outputs*frozen, rel=.02)  # the first has no gradients
    assert found == pytest.approx([real[0], real[1]], rel=.01) and real[2] == pytest.approx(real[1], rel=.01)


# --- every kind of learner ------------------------------------------------------------------------------------------
class Of(nn.Module):
    "A layer on what `take` makes of the inputs, whose output `give` makes into something else"
    def __init__(self, take=lambda x: x, give=lambda x: x):
        super().__init__()
        self.lin, self.take, self.give = nn.Linear(16, 10), take, give

    def forward(self, *xs): return self.give(self.lin(self.take(*xs)))


def of_dicts(): return Learner(loaders([({'a': torch.randn(16)}, torch.tensor(1))]*8), Of(lambda d: d['a']),
                               loss_func=CrossEntropyLossFlat())


def of_tuples(): return Learner(loaders([((torch.randn(16), torch.randn(16)), torch.tensor(1))]*8),
                                Of(lambda d: d[0]+d[1]), loss_func=CrossEntropyLossFlat())


def of_two_inputs(): return Learner(loaders([(torch.randn(16), torch.randn(16), torch.tensor(1))]*8, 2), Of(torch.add),
                                    loss_func=CrossEntropyLossFlat())


def tied():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 10))
    model[1].weight = model[0].weight
    return of_numbers(model)


def masked(preds, targ): return F.cross_entropy(preds[targ != 0], targ[targ != 0])


def decided(preds, targ): return F.cross_entropy(preds, targ)*(2 if targ.float().mean() > 0 else 1)


def weighted(): return of_numbers(loss=CrossEntropyLossFlat(weight=torch.rand(10)))


def weighted_by_closure():
    weights = torch.rand(10)
    return of_numbers(loss=lambda p, y: F.cross_entropy(p, y, weights))


class Packed(nn.Module):
    "A recurrent layer over texts of different lengths"
    def __init__(self):
        super().__init__()
        self.rnn, self.lin = nn.LSTM(16, 8, batch_first=True), nn.Linear(8, 10)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return self.lin(nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0][:, -1])


def packed():
    items = [(torch.randn(20, 16), torch.tensor(20-i), torch.tensor(1)) for i in range(8)]
    return Learner(loaders(items, 2), Packed(), loss_func=CrossEntropyLossFlat())


class Pieces(nn.Module):
    "Checkpointed in three pieces, in PyTorch's older or newer way"
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant, self.head = reentrant, nn.Linear(8, 10)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), *[nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GELU())
                                                       for _ in range(5)])

    def forward(self, x):
        x.requires_grad_(self.reentrant)
        return self.head(checkpoint_sequential(self.body, 3, x, use_reentrant=self.reentrant).mean((2, 3)))


def multi_target(*cbs):
    rows = pd.DataFrame(dict(kind=list('abcd')*2, size=np.linspace(1, 2, 8))).to_dict('records')
    targets = Targets.from_df(pd.DataFrame(rows), ['kind', 'size']).fit(rows)
    dls = loaders([(torch.randn(3, 64, 64), torch.Tensor(targets.encode(o))) for o in rows])
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(16, targets.n_out))
    return Learner(dls, model, loss_func=targets.loss(), cbs=cbs)


def of_digits():
    folder = tempfile.TemporaryDirectory()
    path = sample_digits(folder.name)
    df = pd.read_csv(path/'labels.csv', dtype=dict(digit=str))[:40]
    dls = MultiTargetDataLoaders.from_df(df, path, folder='images', targets=['digit', 'slant', 'ink'], seed=1, bs=8,
                                         num_workers=0)
    learn = multi_target_learner(dls, nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU()), weighting='uncertainty')
    learn.folder = folder  # which goes with the learner
    return learn


def test_a_multi_target_learner_takes_what_real_tensors_take():
    learn = of_digits()
    step = traced(learn, 'cpu')
    assert isinstance(learn, MultiTargetLearner) and type(step.learn) is MultiTargetLearner
    real, n = counted(learn)
    assert total(step, n) == pytest.approx(real, rel=.01)


LEARNERS = {
    'multi_target_learner': of_digits,
    'unet, Dice': lambda: unet(DiceLoss()), 'unet, focal': lambda: unet(FocalLossFlat(axis=1)),
    'dict input': of_dicts, 'tuple input': of_tuples, 'two inputs': of_two_inputs,
    'dict output': lambda: of_numbers(Of(give=lambda o: {'logits': o}),
                                      loss=lambda p, y: F.cross_entropy(p['logits'], y)),
    'class weights': weighted, 'weights of a closure': weighted_by_closure,
    'mask in the loss': lambda: of_numbers(loss=masked), 'value decides': lambda: of_numbers(loss=decided),
    'tied weights': tied, 'packed': packed, 'reentrant': lambda: of_pictures(Pieces(True)),
    'targets': multi_target, 'targets, MixUp': lambda: multi_target(MixUp()),
    'targets, CutMix': lambda: multi_target(CutMix()), 'not reentrant': lambda: of_pictures(Pieces(False)),
    'two LSTMs': lambda: recurrent(nn.LSTM(64, 32, 2, dropout=.1, batch_first=True, bidirectional=True)),
    'RNN': lambda: recurrent(nn.RNN(64, 32, batch_first=True))}


NAMES = [*LEARNERS, 'text classifier', 'language model', 'tabular', 'collab', 'unet', 'checkpointed vit',
         'checkpointed test_convnext']


SHOWN = 'fp16, tabular', 'fp16, text classifier', 'fp16, checkpointed vit', 'fp16, dict input', 'fp16, two LSTMs', \
        'fp16, reentrant', 'fp16, not reentrant', 'fp16, targets, MixUp', 'float32, packed', 'float32, tied weights', \
        'float32, tuple input', 'float32, two inputs', 'float32, dict output', 'float32, mask in the loss', \
        'float32, value decides', 'float32, weights of a closure', 'float32, multi_target_learner', 'float32, collab'


@pytest.mark.parametrize('case', quick([f'{p}, {o}' for p in ('float32', 'fp16') for o in NAMES], *SHOWN))
def test_every_learner_traces_on_cuda(case):
    precision, _, name = case.partition(', ')
    step = traced((LEARNERS | EXACT)[name](), dtype=dict(float32=None, fp16=torch.float16)[precision])
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*cannot be run without real tensors')
        step.run(8)
    base = step.parameters+step.gradients*step.keeps_gradients+step.state+step.inputs
    assert step.kernels == 'cuda' and base == step.base and 0 < step.forward <= step.peak-step.base
    assert 0 < step.validate(8) <= step.peak
    assert 0 < sum(step.by_module(8).values()) <= step.forward+1024  # less what callbacks made before the model


TORCHS = ['SGD', 'Adam', 'AdamW', 'RAdam', 'RMSprop', 'NAdam', 'Adagrad', 'Adadelta', 'Adamax', 'ASGD', 'Adafactor',
          'Rprop']


@pytest.mark.parametrize('opt', [SGD, RMSProp, Lamb, QHAdam, Larc, ranger, *TORCHS, 'fused'],
                         ids=lambda o: getattr(o, '__name__', o))
def test_an_optimizer_keeps_what_it_keeps(opt):
    if opt == 'fused': opt = partial(OptimWrapper, opt=partial(torch.optim.AdamW, fused=True))
    if isinstance(opt, str): opt = partial(OptimWrapper, opt=getattr(torch.optim, opt))
    learn = of_numbers(nn.Linear(16, 1000), opt_func=opt)
    step = traced(learn)
    learn.create_opt()
    for p in learn.model.parameters(): p.grad = torch.zeros_like(p)
    learn.opt.step()
    real = Alive([dict(o) for o in getattr(learn.opt, 'opt', learn.opt).state.values()],
                 [[*o] for o in getattr(learn.opt, 'slow_weights', [])], block=512)
    if opt is ranger: assert real.now >= 3*step.parameters  # two averages, and the slow weights
    assert abs(step.state-real.now) <= 512*4 and step.update >= 0


# --- nothing stays --------------------------------------------------------------------------------------------------
def snapshot(learn):
    "What a trace must leave alone"
    tensors = [*learn.model.parameters(), *learn.model.buffers()]
    return ([(id(t), t._version, t.requires_grad, t.grad is None) for t in tensors],
            [m.training for m in learn.model.modules()],
            torch.get_rng_state().tolist(), {k: id(v) for k, v in vars(learn).items()}, learn.loss_func.reduction,
            [dict(vars(cb)) for cb in learn.cbs], torch.is_autocast_enabled('cuda'), torch.is_autocast_enabled('cpu'),
            torch.autograd.backward, torch.as_subclass)


@pytest.mark.parametrize('device', ['cuda', 'cpu'])
def test_a_trace_leaves_the_learner_as_it_is(device):
    learn = of_pictures(convnet(), cbs=MixUp())
    learn.model[1].eval()
    learn.model[0].weight.requires_grad_(False)
    before = snapshot(learn)
    step = traced(learn, device, dtype=torch.float16)
    step.run(8)
    step.validate(8)
    step.by_module(8)
    assert snapshot(learn) == before


def test_an_error_leaves_nothing_behind():
    class Fails(nn.Linear):
        def forward(self, x): raise ZeroDivisionError
    learn = of_numbers(Fails(16, 10))
    before = snapshot(learn)
    with pytest.raises(ZeroDivisionError): traced(learn, dtype=torch.float16).run(8)
    assert snapshot(learn) == before


def test_runs_do_not_change_each_other():
    step = traced(of_pictures(convnet(), cbs=MixUp()), dtype=torch.float16)
    def figures(m): return step.run(m).tolist(), step.peak, step.forward, step.inputs, step.outputs
    figures(8)  # tensors of loss and callbacks are counted from their first use on
    first = figures(8)
    figures(5), step.validate(8), step.by_module(3)
    assert figures(8) == first


def test_an_autocast_that_was_left_entered_changes_nothing():
    def figures(): return total(traced(of_pictures(vit())), 8)
    first = figures()
    torch.set_autocast_enabled('cuda', True)
    try:
        assert figures() == first and torch.is_autocast_enabled('cuda')
    finally: torch.set_autocast_enabled('cuda', False)


def test_copies_take_no_memory():
    learn = of_numbers(nn.Sequential(nn.Linear(16, 400_000), nn.Linear(400_000, 10)))
    item, seen, own = one_item(learn)[0], [], {o.data_ptr() for o in learn.model.parameters()}

    class Real(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for o in tree_leaves(out):
                if type(o) is torch.Tensor and o.device.type == 'cpu' and o.data_ptr() not in own: seen.append(o.nbytes)
            return out
    with Real(): TracedStep(learn, item, 'cuda', 'all')
    assert max(seen, default=0) < 1e5


def test_two_threads_trace_at_once():
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(2) as pool:
        totals = list(pool.map(lambda _: total(traced(of_pictures(checkpointed(vit()))), 8), range(2)))
    assert len(set(totals)) == 1


def test_a_torch_without_cuda_traces_formulas():
    with replaced(torch.backends.cuda, 'is_built', lambda: False):
        step = traced(of_pictures(vit()), dtype=torch.float16)
        step.run(8)
    assert step.kernels == 'formula' and step.peak > 0 and step.validate(8) <= step.peak


def test_a_card_without_flash_attention_keeps_more():
    "bfloat16 has no fused attention on a T4: the formula keeps a number for each pair of tokens"
    def bytes_of(sm): return total(traced(of_pictures(vit()), dtype=torch.bfloat16, sm=sm), 8)
    assert bytes_of(75) > bytes_of(80)


def test_modules_by_name():
    found = traced(of_pictures(convnet())).by_module(8)
    assert found['0'] == 8*16*64*64*4 and found['2'] == found['0'] and {'3', 'loss'} <= set(found)


# --- against a card -------------------------------------------------------------------------------------------------
ROWS = [o for o in json.loads((ROOT/'tests/h200_memory.json').read_text())['rows'] if o['accum'] == 1]
QUICK = ('vit_small_patch16_224', 'fp16', 32), ('sequencer2d_s', 'fp16', 32), \
        ('resnet50', 'fp16', 64), ('mixer_s32_224', 'fp16', 64)


def row_name(o): return f"{o['arch']}-{o['precision']}-{o['optimizer']}-{o['bs']}"


@pytest.mark.parametrize('row', [
    pytest.param(o, id=row_name(o), marks=() if (o['arch'], o['precision'], o['bs']) in QUICK else pytest.mark.slow)
    for o in ROWS])
def test_near_what_an_h200_allocated(row):
    "With 100 MB for workspaces, within 3 % or 30 MB"
    n, size = row['bs'], row['size']
    dl = DataLoader([(torch.zeros(3, size, size), torch.tensor(0))], bs=1, num_workers=0)
    model = timm_model(row['arch'], **row.get('options', {}))
    learn = Learner(DataLoaders(dl, dl), model, loss_func=CrossEntropyLossFlat(),
                    **(dict(opt_func=adamw) if row['optimizer'] == 'adamw' else {}))
    dtype = dict(fp32=None, fp16=torch.float16, bf16=torch.bfloat16)[row['precision']]
    found = total(traced(learn, dtype=dtype), n)+100e6
    assert abs(found-row['allocated']) <= max(.03*row['allocated'], 30e6)
