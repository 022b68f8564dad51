"MicroBatch in the learners that fastai makes, text, pictures, tables and ratings, and with compiled models"
import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.rnn import RNNRegularizer
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.data.block import CategoryBlock
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat, MSELossFlat
from fastai.optimizer import SGD
from fastai.tabular.data import TabularDataLoaders
from fastai.tabular.core import Categorify, Normalize
from fastai.tabular.learner import tabular_learner
from fastai.text.learner import language_model_learner, text_classifier_learner
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config, awd_lstm_lm_config
from fastai.vision.learner import create_unet_model
from fastcore.foundation import L
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import resnet18

from paddy_multi.accumulate.microbatch import MicroBatch

pytestmark = pytest.mark.filterwarnings('ignore:.*CUDA is not available', 'ignore:.*RNN module weights',
                                        'ignore:BatchNorm takes')


class Float32Loss(Callback):
    "fastai's recorder cannot take a float64 loss"
    order = -50
    def after_loss(self): self.learn.loss = self.learn.loss.float()


def vec(model): return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def still(model, dtype=torch.float64):
    "Without dropout, and with statistics of BatchNorm that stay as they are"
    for m in model.modules():
        for p in ('p', 'embed_p'):
            if isinstance(getattr(m, p, None), float): setattr(m, p, 0.)
        if hasattr(m, 'weight_p'): m.weight_p = 1e-12  # fastai cannot do without
        if isinstance(m, _BatchNorm):
            m.eval()
            m.train = lambda mode=True, m=m: m
    return model.to(dtype)


def batches_of(batches, n_inp=1):
    dls = DataLoaders(batches, batches[:1])
    dls.n_inp = n_inp
    return dls


def trained(make, cbs, epochs=1, lr=.1):
    "Learner after training on its batches, and what its weights were before"
    torch.manual_seed(1)
    learn = make()
    start = vec(learn.model)
    learn.add_cbs([Float32Loss(), *cbs])
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='.*(RNN module weights|BatchNorm takes|non-contiguous)')
        learn.fit(epochs, lr)
        return learn, start, learn.validate()


def same_as_whole(make, bs=(1, 3, 5), tol=1e-12, **kw):
    whole, start, valid = trained(make, [], **kw)
    moved = (vec(whole.model)-start).norm()
    assert moved > 0
    for b in bs:
        ours, _, ours_valid = trained(make, [MicroBatch(b)], **kw)
        assert float((vec(ours.model)-vec(whole.model)).norm()/moved) <= tol, b
        assert list(ours_valid) == pytest.approx(list(valid), rel=max(tol, 1e-12))


# --- text -----------------------------------------------------------------------------------------------------------
VOCAB = ['xxunk', 'xxpad', *map(str, range(30))]


def text_batches(labelled, n=3, bs=8, length=24):
    "Synthetic token ids; those to classify are padded at the end and sorted by length, as fastai does"
    g = torch.Generator().manual_seed(0)
    stream = torch.randint(2, len(VOCAB), (bs, n*length+1), generator=g)
    if not labelled: return [(stream[:, i*length:(i+1)*length], stream[:, i*length+1:(i+1)*length+1]) for i in range(n)]
    made = []
    for i in range(n):
        x = stream[:, i*length:(i+1)*length].clone()
        for row, size in enumerate(range(length, length-2*bs, -2)): x[row, size:] = 1
        made.append((x, torch.randint(2, (bs,), generator=g)))
    return made


def small(config): return {**config, 'emb_sz': 12, 'n_hid': 16, 'n_layers': 2}


def loaders_with(batches, vocab):
    dls = batches_of(batches)
    object.__setattr__(dls, 'vocab', vocab)
    return dls


def text_classifier(tmp_path, dtype=torch.float64):
    dls = loaders_with(text_batches(True), L([VOCAB, ['no', 'yes']]))
    learn = text_classifier_learner(dls, AWD_LSTM, config=small(awd_lstm_clas_config), pretrained=False, n_out=2,
                                    seq_len=10, loss_func=CrossEntropyLossFlat(), opt_func=SGD, path=tmp_path,
                                    alpha=2., beta=1.)
    still(learn.model, dtype)
    return learn


def language_model(tmp_path, dtype=torch.float64):
    dls = loaders_with(text_batches(False), VOCAB)
    learn = language_model_learner(dls, AWD_LSTM, config=small(awd_lstm_lm_config), pretrained=False,
                                   opt_func=SGD, path=tmp_path, alpha=2., beta=1.)
    still(learn.model, dtype)
    return learn


@pytest.mark.parametrize('make', [text_classifier, language_model])
def test_text(make, tmp_path):
    assert any(isinstance(cb, RNNRegularizer) for cb in make(tmp_path).cbs)
    same_as_whole(partial(make, tmp_path), bs=[3, 5], epochs=2)
    same_as_whole(partial(make, tmp_path, torch.float32), tol=1e-5, bs=[3])


def test_chunks_of_one_text_are_refused_where_fastai_would_not_regularize_them(tmp_path):
    with pytest.raises(ValueError, match=r'use MicroBatch\(3\) or more, found 1 for a batch of 8'):
        trained(partial(language_model, tmp_path), [MicroBatch(1)])


def test_hidden_state_goes_on_from_batch_to_batch(tmp_path):
    "Were it lost, a language model would train otherwise"
    def forgetful():
        learn = language_model(tmp_path)
        learn.add_cb(Callback(before_batch=lambda self: self.model.reset()))
        return learn
    kept, start, _ = trained(partial(language_model, tmp_path), [MicroBatch(3)])
    lost, *_ = trained(forgetful, [MicroBatch(3)])
    assert float((vec(kept.model)-vec(lost.model)).norm()/(vec(kept.model)-start).norm()) > 1e-4


# --- pictures, tables, ratings --------------------------------------------------------------------------------------
def test_unet():
    g = torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, 3, 32, 32, generator=g, dtype=torch.float64),
                torch.randint(0, 3, (4, 32, 32), generator=g))]
    def make():
        model = still(create_unet_model(resnet18, 3, (32, 32), pretrained=False))
        return Learner(batches_of(batches), model, loss_func=CrossEntropyLossFlat(axis=1), opt_func=SGD)
    same_as_whole(make, bs=[3], lr=.01)


def test_tabular(tmp_path):
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=rng.choice(list('xyz'), 40), b=rng.normal(size=40), c=rng.normal(size=40),
                           t=rng.choice(['u', 'v'], 40)))
    dls = TabularDataLoaders.from_df(df, path=tmp_path, y_names='t', cat_names=['a'], cont_names=['b', 'c'], bs=10,
                                     procs=[Categorify, Normalize], y_block=CategoryBlock(), valid_idx=list(range(10)))
    batches = [(a.cpu(), b.cpu().double(), c.cpu()) for a, b, c in dls.train]
    def make():
        learn = tabular_learner(dls, layers=[8, 4], opt_func=SGD, loss_func=CrossEntropyLossFlat())
        learn.dls = batches_of([(a, b, c.view(-1)) for a, b, c in batches], 2)
        still(learn.model)
        return learn
    same_as_whole(make)


def test_collab(tmp_path):
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(user=rng.integers(0, 9, 60), item=rng.integers(0, 7, 60), rating=rng.random(60)*5))
    dls = CollabDataLoaders.from_df(df, bs=12, seed=1, path=tmp_path)
    batches = [(x.cpu(), y.cpu().double()) for x, y in dls.train]
    def make():
        learn = collab_learner(dls, n_factors=5, y_range=(0, 5.5), opt_func=SGD, loss_func=MSELossFlat())
        learn.dls = batches_of(batches)
        still(learn.model)
        return learn
    same_as_whole(make)


# --- compiled models ------------------------------------------------------------------------------------------------
def mlp(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))


def conv(): return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, 10))


def by_call(mode, model):
    model.compile(mode=mode)
    return model


MODES = 'default', 'reduce-overhead', 'max-autotune-no-cudagraphs', 'max-autotune'
WAYS = [(f'{mode} {net.__name__}', partial(torch.compile, mode=mode), net) for net in (mlp, conv) for mode in MODES]
WAYS.append(('model.compile', partial(by_call, 'default'), mlp))


@pytest.mark.parametrize('way, net', [pytest.param(way, net, id=name, marks=[] if i == 0 else pytest.mark.slow)
                                      for i, (name, way, net) in enumerate(WAYS)])
def test_compiled_models_train_as_eager_ones(way, net):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 1, 8, 8, generator=g), torch.randint(0, 10, (24,), generator=g)
    def run(make, cbs):
        torch._dynamo.reset()
        torch.manual_seed(1)
        model = net()
        start = vec(model)
        learn = Learner(batches_of([(x[:12], y[:12]), (x[12:], y[12:])]), make(model), opt_func=SGD,
                        loss_func=CrossEntropyLossFlat(), cbs=cbs)
        with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            learn.fit(1, .1)
            return vec(learn.model), start, learn.get_preds(dl=[(x, y)], reorder=False)[0]
    (weights, start, preds), (ours, _, out) = run(lambda o: o, []), run(way, [MicroBatch(5)])
    assert float((ours-weights).norm()/(weights-start).norm()) < 1e-5
    assert float((ours-weights).norm()/weights.norm()) < 1e-6 and torch.allclose(out, preds, atol=1e-6)
