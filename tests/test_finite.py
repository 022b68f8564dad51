"A loss or weight that is NaN or infinite ends training: in both learners, in chunks, half precision, before saving"
import math
import re
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import LRFinder
from fastai.callback.tracker import SaveModelCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, Recorder
from torch import nn
from torch.utils.data import TensorDataset

from collab_deep.data.loaders import RatingsDataLoaders
from collab_deep.train.learner import collab_deep_learner
from collab_deep.train.stopping import KeepBest
from paddy_multi.accumulate.microbatch import MicroBatch
from paddy_multi.core import finite
from paddy_multi.core.finite import CheckFinite, broken_weights


def line(bad=None, at=21, n=40, bs=8, cbs=()):
    "A learner of y = 3x on `n` points, in order; label `at` may be `bad`"
    x = torch.linspace(-1, 1, n)[:,None]
    y = 3*x
    if bad is not None: y[at] = bad
    dls = DataLoaders(*(DataLoader(TensorDataset(x, o), bs=bs) for o in (y, 3*x)))
    torch.manual_seed(0)
    return Learner(dls, nn.Linear(1, 1), nn.MSELoss(), lr=.1, cbs=[CheckFinite(), *cbs])

def quiet_fit(learn, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(*args, **kwargs)

class SetWeight(Callback):
    "Put `value` into the bias after a step"
    def __init__(self, value, epoch, at): self.value, self.at = value, (epoch, at)
    def after_step(self):
        if (self.epoch, self.iter) == self.at: self.model.bias.data.fill_(self.value)


@pytest.mark.usefixtures('on_cpu')  # where the same bits can be asked for
@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_the_step_of_a_bad_batch_is_not_taken(bad):
    "The weights are those of the good batches alone, bit by bit"
    learn = line(bad)
    with pytest.raises(FloatingPointError, match='in epoch 0, batch 2 of 5; look at the labels'): quiet_fit(learn, 1)
    good = line(n=40)
    good.dls.train = DataLoader(TensorDataset(*(o[:16] for o in good.dls.train.dataset.tensors)), bs=8)
    good.dls.loaders[0] = good.dls.train
    quiet_fit(good, 1)
    assert all(map(torch.equal, learn.model.parameters(), good.model.parameters()))


def test_training_goes_on_after_a_refusal():
    learn = line(math.nan)
    with pytest.raises(FloatingPointError): quiet_fit(learn, 1)
    learn.dls.train.dataset.tensors[1][21] = 0.
    quiet_fit(learn, 1)
    assert broken_weights(learn.model) == []


def test_chunks_are_looked_at_before_the_step():
    "In the second of two chunks; the gradient of the first is not left behind"
    learn = line(math.nan, at=22, cbs=[MicroBatch(4)])
    with pytest.raises(FloatingPointError, match='batch 2 of 5'): quiet_fit(learn, 1)
    assert broken_weights(learn.model) == []
    assert all(p.grad is None or not p.grad.any() for p in learn.model.parameters())


def heights(pred, y): return dict(height=(pred-y)[:, 0]**2, sign=(pred.sign()-1)[:, 0])


@pytest.mark.parametrize('waits, keep, of', [
    (False, None, 'height (1 of 4 items)'), (True, True, 'height (1 of 8 items)'),
    (True, None, 'a target that MicroBatch(bs, keep=True) would name')], ids=['CPU', 'GPU, kept', 'GPU'])
def test_chunks_name_the_target(waits, keep, of, monkeypatch):
    "Of the chunk on a CPU; on a GPU of the batch, where its output is kept"
    if waits: monkeypatch.setattr(finite, 'is_at_hand', lambda loss: False)
    learn = line(math.nan, at=22, cbs=[MicroBatch(4, keep=keep)])
    learn.check_finite.item_losses = heights
    with pytest.raises(FloatingPointError, match=re.escape(f'the loss of {of} is nan in epoch 0, batch 2 of 5; ')):
        quiet_fit(learn, 1)


def test_where_asking_waits_the_recorders_copy_is_read(monkeypatch):
    "As on a GPU: nothing is read of the loss before the recorder has fetched it; the same batch is named"
    monkeypatch.setattr(finite, 'is_at_hand', lambda loss: False)
    learn = line(math.nan)
    with pytest.raises(FloatingPointError, match='the loss is nan in epoch 0, batch 2 of 5'): quiet_fit(learn, 1)
    learn = line(math.inf)
    learn.remove_cb(Recorder)
    with pytest.raises(FloatingPointError, match='the loss is inf in epoch 0, batch 2 of 5'): quiet_fit(learn, 1)


def test_no_value_is_asked_of_a_device():
    "A loss that lies elsewhere is not touched: a tensor without data would fail"
    learn = line()
    learn.loss, learn.training = torch.empty((), device='meta'), True
    learn.recorder.smooth_loss.val = torch.tensor(1.)
    for event in ('after_loss', 'after_batch'): learn.check_finite(event)


@pytest.mark.parametrize('keep', [lambda: SaveModelCallback(every_epoch=1), lambda: SaveModelCallback(at_end=True),
                                  lambda: SaveModelCallback('train_loss')])
def test_nothing_is_saved_over_a_good_model(keep, tmp_path):
    "A weight that breaks in the last step of the last epoch"
    learn = line()
    learn.path = tmp_path
    quiet_fit(learn, 1, cbs=keep())
    before = {p.name: p.read_bytes() for p in (tmp_path/'models').iterdir()}
    with pytest.raises(FloatingPointError, match='bias of the weights hold NaN or an infinity after epoch 0, batch 4'):
        quiet_fit(learn, 1, cbs=[SetWeight(math.nan, 0, 4), keep()])
    assert before and before == {p.name: p.read_bytes() for p in (tmp_path/'models').iterdir()}


def test_a_fit_that_is_cancelled_saves_no_broken_weights(tmp_path):
    class Stop(Callback):
        def after_batch(self):
            if self.training and self.iter == 3: raise CancelFitException()
    learn = line()
    learn.path = tmp_path
    with pytest.raises(FloatingPointError, match='bias of the weights'):
        quiet_fit(learn, 1, cbs=[SetWeight(math.inf, 0, 3), Stop(), SaveModelCallback(at_end=True)])
    assert not (tmp_path/'models').exists()


def test_running_statistics_count_as_weights():
    learn = line()
    learn.model = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1))
    class Break(Callback):
        def after_step(self): self.model[0].running_var.fill_(math.nan)
    with pytest.raises(FloatingPointError, match='0.running_var of the weights'): quiet_fit(learn, 1, cbs=Break())


def test_an_infinite_gradient_is_no_fault():
    "A step that a gradient scaler skips: the loss is finite, the gradient is not, and the weights stay"
    class Overflow(Callback):
        def after_backward(self): self.model.bias.grad.fill_(math.inf)
        def before_step(self): self.opt.zero_grad()
    quiet_fit(line(cbs=[Overflow()]), 1)


@pytest.mark.filterwarnings('ignore')
def test_mixed_precision_on_a_cpu():
    with pytest.raises(FloatingPointError, match='batch 2 of 5'): quiet_fit(line(math.nan, cbs=[MixedPrecision()]), 1)
    quiet_fit(line(cbs=[MixedPrecision()]), 1)


@pytest.mark.parametrize('end_lr', [10, 1e30])
def test_a_search_for_a_rate_may_diverge(end_lr):
    learn = line()
    before = learn.model.weight.detach().clone()
    quiet_fit(learn, 20, cbs=LRFinder(end_lr=end_lr, num_it=100, stop_div=False))
    assert len(learn.recorder.losses) == 100 and torch.equal(learn.model.weight, before)
    assert line().lr_find(show_plot=False).valley > 0


def test_a_validation_loss_of_nan_is_warned_of_and_never_the_best(tmp_path):
    learn = line()
    learn.path = tmp_path
    learn.dls.valid.dataset.tensors[1][3] = math.nan
    with pytest.warns(UserWarning, match='the validation loss is nan, which no tracker takes'):
        with pytest.raises(FileNotFoundError): quiet_fit(learn, 2, cbs=SaveModelCallback())  # none was saved
    assert not (tmp_path/'models'/'model.pth').exists() and broken_weights(learn.model) == []


def test_validation_and_predictions_are_left_alone():
    learn = line()
    learn.model.bias.data.fill_(math.nan)
    with warnings.catch_warnings(), learn.no_bar():
        warnings.simplefilter('ignore')
        assert math.isnan(learn.validate()[0]) and learn.get_preds()[0].isnan().all()


# --- recommenders ---------------------------------------------------------------------------------------------------
@pytest.fixture
def dls():
    rng = np.random.default_rng(0)
    users, items = np.divmod(rng.permutation(600)[:400], 20)
    df = pd.DataFrame(dict(user=users, item=items, rating=rng.uniform(1, 5, 400)))
    return RatingsDataLoaders.from_df(df, seed=0, bs=32, device='cpu')

@pytest.mark.parametrize('loss', ['mse', 'bpr', 'softmax'])
def test_a_recommender_stops_at_weights_that_are_no_numbers(dls, loss):
    class Break(Callback):
        def after_step(self):
            if self.iter == 4: next(self.model.parameters()).data[1:] = math.nan
    learn = collab_deep_learner(dls, 4, loss=loss, cbs=[KeepBest(), Break()])
    with pytest.raises(FloatingPointError, match=r'loss is nan in epoch 0, batch \d+ of 10; weights such as .* were '
                       'not finite before it: use a lower learning rate'): quiet_fit(learn, 1)


def test_a_recommender_stops_at_the_end_of_an_epoch(dls):
    class Break(Callback):
        def after_step(self):
            if self.iter == 9: next(self.model.parameters()).data[3] = math.inf
    learn = collab_deep_learner(dls, 4, cbs=Break())
    with pytest.raises(FloatingPointError, match='of the weights hold NaN or an infinity after epoch 0, batch 9 of 10'):
        quiet_fit(learn, 2)
