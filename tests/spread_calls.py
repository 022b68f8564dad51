"The calls that a user of fastai makes, in several processes and in one"
import contextlib
import io
import json
import os
import signal
import time
import warnings
from pathlib import Path

import pandas as pd
import torch
from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.vision.all import (Callback, CSVLogger, FetchPredsCallback, Resize, get_image_files, load_learner, nn)

from paddy_multi.data.digits import sample_digits
from paddy_multi.data.loaders import MultiTargetDataLoaders
from paddy_multi.distributed.across import across_processes
from paddy_multi.distributed.ranks import join_processes
from paddy_multi.train.learner import multi_target_learner
from paddy_multi.use.interpret import MultiTargetInterpretation
from paddy_multi.use.predict import predict_named
from spread import numbers_of, seed


def write_digits(folder):
    "Real digits, of which some have no slant"
    sample_digits(folder)
    table = pd.read_csv(Path(folder)/'labels.csv').iloc[:203]
    table.loc[:40, 'slant'] = None
    table.to_csv(Path(folder)/'labels.csv', index=False)


def digits_learner(folder, bs, cbs=(), num_workers=0):
    seed(3)
    dls = MultiTargetDataLoaders.from_csv(folder, targets=['digit', 'slant', 'ink'], kinds=dict(digit='category'),
                                          folder='images', seed=1, bs=bs, num_workers=num_workers,
                                          item_tfms=Resize(16), device='cpu')
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.ReLU())
    return multi_target_learner(dls, body, head_norm='layer', cbs=list(cbs), path=folder)


def saved_preds(learn, folder):
    "What `get_preds` saves by batch, and returns"
    whose = 'all' if hasattr(learn, 'across_processes') else join_processes().rank
    (folder := Path(folder)/f'by_batch_of_{whose}').mkdir(exist_ok=True)
    preds, _ = learn.get_preds(save_preds=folder)
    files = sorted(folder.iterdir(), key=lambda o: int(o.name))
    return torch.cat([torch.load(o) for o in files]), preds


def predictions(learn, folder):
    "What comes out of a trained learner, by the name of the call"
    files = get_image_files(Path(folder)/'images').sorted()[:37]
    files.insert(5, Path(folder)/'labels.csv')  # no picture
    seed(5)
    interp = MultiTargetInterpretation.from_learner(learn)
    shuffled = learn.dls.valid.new(shuffle=True)
    return dict(
        validate=torch.tensor(learn.validate()), get_preds=learn.get_preds(), of_training=learn.get_preds(ds_idx=0),
        with_all=learn.get_preds(with_input=True, with_decoded=True, with_loss=True),
        saved=saved_preds(learn, folder), shuffled=learn.get_preds(dl=shuffled), predict=learn.predict(files[0])[2],
        without_labels=learn.get_preds(dl=learn.dls.test_dl(files[:3]))[0],
        tta=learn.tta(n=2), named=predict_named(learn, files, bs=8), named_tta=predict_named(learn, files, bs=8, tta=1),
        losses=interp.losses, confusion=torch.tensor(interp.confusion_matrix('digit')),
        top=interp.top_losses(5)[1], shown=interp[[0, 3]][1])


def run_calls(folder):
    "In all processes: train, predict, look for a rate, track, save; then predict by itself, with the same weights"
    ranks, learn = join_processes(60), digits_learner(folder, 8)
    found = {}
    with across_processes(learn), learn.no_bar():
        learn.fit_one_cycle(1, .01)
        learn.fine_tune(1, .01)
        given = predictions(learn, folder)
        trained = {k: v.clone() for k, v in learn.model.state_dict().items()}
        learn.fit(1, .001, cbs=FetchPredsCallback())
        again = learn.recorder.values[-1][1:], learn.fetch_preds.preds[0] if hasattr(learn, 'fetch_preds') else None
        found['fetched'] = list(again[0]), list(learn.validate())
        before, opt = numbers_of(learn.model), repr(learn.opt.state_dict())
        found['rate'] = learn.lr_find(num_it=30, show_plot=False).valley, len(learn.recorder.lrs)
        found['restored'] = torch.equal(before, numbers_of(learn.model)) and opt == repr(learn.opt.state_dict())
        trackers = [SaveModelCallback(fname='best', with_opt=True), CSVLogger('history.csv'),
                    EarlyStoppingCallback(patience=1, min_delta=1e9)]
        with contextlib.redirect_stdout(io.StringIO()) as said: learn.fit_one_cycle(4, .01, cbs=trackers)
        found['said'] = said.getvalue()
        found['epochs'] = len(learn.recorder.values)
        learn.fit(3, .01, cbs=ReduceLROnPlateau(patience=1, min_delta=1e9))
        found['reduced'] = learn.opt.hypers[-1]['lr']
        learn.save('kept')
        learn.load('kept')
        learn.export('exported.pkl')
    found['numbers'], found['random'] = numbers_of(learn.model).sum().item(), torch.rand(1).item()
    found['world'] = os.environ['WORLD_SIZE']
    loaded = load_learner(Path(folder)/'exported.pkl')
    found['loaded'] = torch.equal(numbers_of(loaded.model), numbers_of(learn.model))
    found['left'] = [type(cb).__name__ for cb in learn.cbs if 'Across' in type(cb).__name__]
    found['shows'] = hasattr(learn, 'progress')
    one = digits_learner(folder, 8*ranks.world_size)
    if ranks.rank == 0: one.load('kept')  # by itself, and without waiting for others
    with warnings.catch_warnings(record=True, action='always') as said, one.no_bar(), one.no_logging(): one.fit(0)
    found['by_itself'] = [str(o.message) for o in said]
    one.model.load_state_dict(trained)
    with one.no_bar(), one.no_logging(): return given, predictions(one, folder), found


# --- failures -------------------------------------------------------------------------------------------------------
class Once(Callback):
    "Something happens in one process, in the second batch"
    def __init__(self, f, rank, event='before_batch'):
        self.f, self.rank = f, rank
        setattr(self, event, self.happen)

    def happen(self):
        if int(os.environ['RANK']) == self.rank and self.learn.train_iter >= 1: self.f()


def an_error(): raise ValueError('the picture 17 is broken')


def no_memory(): raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')


def sent(number): return lambda: os.kill(os.getpid(), number)


def cancels():
    from fastai.callback.core import CancelEpochException
    raise CancelEpochException()


FAILURES = dict(
    error_in_a_batch=(an_error, 1, 'before_batch'), error_in_backward=(an_error, 0, 'after_backward'),
    error_after_an_epoch=(an_error, 1, 'after_epoch'), error_in_validation=(an_error, 1, 'before_validate'),
    out_of_memory=(no_memory, 1, 'after_pred'),
    out_of_memory_in_the_loss=(no_memory, 0, 'after_loss'), one_cancels=(cancels, 1, 'before_batch'),
    sigint=(sent(signal.SIGINT), 0, 'after_step'), sigterm=(sent(signal.SIGTERM), 1, 'after_step'),
    sigkill=(sent(signal.SIGKILL), 1, 'after_step'))


def run_failures(folder):
    "What each process raises, and after how many seconds, one failure after the other"
    said = {}
    for name, happens in FAILURES.items():
        (Path(folder)/f'said_{os.environ["RANK"]}.json').write_text(json.dumps(said))
        learn, began = digits_learner(folder, 8, [Once(*happens)]), time.monotonic()
        try:
            with across_processes(learn, timeout=30), learn.no_bar(), learn.no_logging(): learn.fit(2, .01)
            said[name] = 'nothing', 0.
        except BaseException as e: said[name] = f'{type(e).__name__}: {e}', time.monotonic()-began
    (Path(folder)/f'said_{os.environ["RANK"]}.json').write_text(json.dumps(said))


def run_refused(folder):
    "What all processes raise for what cannot be spread, or differs between them"
    said, rank = {}, join_processes(30).rank
    def attempt(name, f):
        try: f()
        except Exception as e: said[name] = f'{type(e).__name__}: {e}'

    def fit(learn):
        with across_processes(learn), learn.no_bar(), learn.no_logging(): learn.fit(1)

    def one_predicts(learn):
        with across_processes(learn), learn.no_bar(), learn.no_logging():
            if rank == 0: learn.get_preds()

    def other(change):
        learn = digits_learner(folder, 8)
        if rank: change(learn)
        return learn

    attempt('batch size', lambda: fit(other(lambda l: setattr(l.dls.train, 'bs', 4))))
    attempt('items', lambda: fit(other(lambda l: l.dls.train_ds.items.reverse())))
    attempt('parameters', lambda: fit(other(lambda l: l.freeze())))
    attempt('one predicts', lambda: one_predicts(digits_learner(folder, 8)))
    learn = digits_learner(folder, 8)
    learn.dls.loaders[0] = torch.utils.data.DataLoader(learn.dls.train_ds, batch_size=8)
    attempt('loader', lambda: fit(learn))
    learn = digits_learner(folder, 8, num_workers=2)
    fit(learn)
    said['with workers'] = numbers_of(learn.model).sum().item()
    if rank: (Path(folder)/'images'/learn.dls.valid_ds.items[-1].name).rename(Path(folder)/'images'/'moved')
    attempt('worker', lambda: fit(learn))
    return said
