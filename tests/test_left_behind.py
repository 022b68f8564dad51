"What an error in a batch leaves behind in a learner of ours: no autocast, no lock, nothing in its export"
import warnings

import pytest
import torch
from fastai.callback.core import Callback, CancelBatchException
from fastai.callback.fp16 import MixedPrecision
from fastai.learner import Learner
from torch import nn

from collab_deep.all import KeepBest, RatingsDataLoaders, collab_deep_learner
from paddy_multi.all import (
    MultiTargetDataLoaders, free_memory, multi_target_learner)
from paddy_multi.core.autocast import autocast_depth


class HalfOnCPU(MixedPrecision):
    "fastai's mixed precision, with the autocast of a CPU, since that of CUDA does nothing without a GPU"
    name = 'mixed_precision'
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', dtype=torch.bfloat16)


class Fails(Callback):
    "Raises `error` at an event"
    order = 20  # after mixed precision is entered
    def __init__(self, event, error): setattr(self, event, self._fail); self.error = error
    def _fail(self): raise self.error


def is_left():
    "Is any autocast still entered?"
    return torch.is_autocast_enabled('cpu') or torch.is_autocast_enabled('cuda') or autocast_depth() > 0


@pytest.fixture(autouse=True)
def clean():
    assert not is_left()
    yield
    free_memory()


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    import pandas as pd
    from paddy_multi.all import sample_digits
    path = sample_digits(tmp_path_factory.mktemp('digits'))
    df = pd.read_csv(path/'labels.csv', dtype=dict(digit=str)).head(40)
    return MultiTargetDataLoaders.from_df(df, path, folder='images', targets=['digit', 'ink'], seed=1, bs=16,
                                          num_workers=0, device='cpu')


@pytest.fixture(scope='module')
def ratings():
    import pandas as pd
    df = pd.DataFrame([(f'u{u}', f't{i}', 1.+(u*i)%5) for u in range(12) for i in range(8)],
                      columns=['user', 'item', 'rating'])
    return RatingsDataLoaders.from_df(df, seed=0, bs=16, device='cpu')


def body(): return nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU())
MADE = {'body': lambda pictures, ratings: multi_target_learner(pictures, body()),
        'architecture': lambda pictures, ratings: multi_target_learner(pictures, 'test_resnet', pretrained=False),
        'recommender': lambda pictures, ratings: collab_deep_learner(ratings, 4)}


@pytest.fixture(params=['body', 'recommender'])
def learn(request, pictures, ratings): return MADE[request.param](pictures, ratings)


def fit(learn, *cbs):
    with learn.no_bar(), learn.no_logging(), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of mixed precision on a CPU
        learn.fit(1, cbs=cbs)


def test_stock_fastai_leaves_autocast_entered(pictures):
    "The fault that is mended: else these tests would show nothing"
    learn = multi_target_learner(pictures, body())
    learn.__class__ = Learner
    with pytest.raises(torch.OutOfMemoryError):
        fit(learn, HalfOnCPU('bf16'), Fails('after_pred', torch.OutOfMemoryError('full')))
    assert is_left()
    freed = free_memory()
    assert freed.autocast and 'left mixed precision' in repr(freed) and not is_left()
    assert not free_memory().autocast and 'mixed' not in repr(free_memory())


@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'before_backward', 'after_batch'])
def test_an_error_anywhere_in_a_batch(learn, event):
    with pytest.raises(KeyboardInterrupt): fit(learn, HalfOnCPU('bf16'), Fails(event, KeyboardInterrupt()))
    assert not is_left()


def test_an_error_with_an_architecture_by_name(pictures, ratings):
    learn = MADE['architecture'](pictures, ratings)
    with pytest.raises(torch.OutOfMemoryError):
        fit(learn, HalfOnCPU('bf16'), Fails('after_pred', torch.OutOfMemoryError('full')))
    assert not is_left()


@pytest.mark.parametrize('place', ['model', 'loss'])
def test_an_error_of_the_model_and_of_the_loss(learn, place):
    def full(*args, **kwargs): raise torch.OutOfMemoryError('full')
    if place == 'model': learn.model.forward = full
    else: learn.loss_func = full
    with pytest.raises(torch.OutOfMemoryError): fit(learn, HalfOnCPU('bf16'))
    assert not is_left()
    with pytest.raises(torch.OutOfMemoryError), learn.no_bar():
        learn.add_cb(HalfOnCPU('bf16')).validate()
    assert not is_left()


def test_a_batch_that_is_cancelled(learn):
    fit(learn, HalfOnCPU('bf16'), Fails('after_pred', CancelBatchException()))
    assert not is_left()


def test_training_goes_on_in_full_precision_after_an_error(learn):
    with pytest.raises(torch.OutOfMemoryError):
        fit(learn, HalfOnCPU('bf16'), Fails('after_pred', torch.OutOfMemoryError('full')))
    seen = []
    class Types(Callback):
        def after_pred(self): seen.append(self.pred.dtype)
    fit(learn, Types())
    assert set(seen) == {torch.float32}


def test_an_autocast_of_the_users_own_stays(learn):
    with torch.autocast('cpu', dtype=torch.bfloat16):
        with pytest.raises(ValueError): fit(learn, Fails('after_pred', ValueError('stop')))
        assert torch.is_autocast_enabled('cpu') and autocast_depth() == 1
    assert not is_left()


def test_what_an_error_left_on_cuda_is_left_by_free_memory():
    torch.set_autocast_enabled('cuda', True)  # which needs no GPU
    torch.autocast_increment_nesting()
    assert free_memory().autocast and not is_left()


def test_an_export_is_as_ever(learn, tmp_path):
    from fastai.learner import load_learner
    with pytest.raises(ValueError): fit(learn, HalfOnCPU('bf16'), Fails('after_pred', ValueError('stop')))
    learn.path = tmp_path
    learn.export('model.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'model.pkl')
    assert type(loaded) is type(learn) and isinstance(loaded, Learner)
    for a, b in zip(learn.model.parameters(), loaded.model.parameters()): assert torch.equal(a, b)


# --- the lock of validation -----------------------------------------------------------------------------------------
def test_a_column_that_is_missing_leaves_no_lock(ratings):
    learn = collab_deep_learner(ratings, 4, cbs=KeepBest('ndcg_at_10'))
    for _ in range(2):
        with learn.no_bar(): assert len(learn.validate()) == 1
        assert not learn.lock.locked()
    with pytest.raises(ValueError, match="no column 'ndcg_at_10' to watch"): fit(learn)
    assert not learn.lock.locked()
