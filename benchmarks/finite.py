"""What `CheckFinite`, which both learners have by default, adds to a step of training, and to an epoch.

Measured alone: all events of a batch that has been computed, with the callback and without it, and the look at the
weights that comes once an epoch. Beside them stand whole steps, so that the share can be worked out.
"""
from functools import partial

import timm
import torch
import torch.nn.functional as F
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from harness import Case, digits, main
from torch.utils.data import TensorDataset

from collab_deep.models.dot import DotProductBias
from paddy_multi.core.finite import CheckFinite, broken_weights

EVENTS = ['before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward', 'before_step', 'after_step',
          'after_batch']
ARCH = 'convnext_atto'

# --- learners on random numbers -------------------------------------------------------------------------------------
def learner(model, x, y, loss):
    "A learner in the middle of training on one batch"
    dl = DataLoader(TensorDataset(x, y), bs=len(x))
    learn = Learner(DataLoaders(dl, dl), model, loss).remove_cb(ProgressCallback)
    learn.create_opt()
    learn.model.train()
    learn.training, learn.dl, learn.n_iter, learn.iter, learn.epoch = True, dl, 100, 3, 0
    learn.train_iter, learn.pct_train, learn.n_epoch = 3, .03, 1
    learn._split((x, y))
    learn.pred = learn.model(x)
    learn.loss_grad = loss(learn.pred, y)
    learn.loss = learn.loss_grad.clone()
    return learn

def pictures(bs, size):
    "An image model of 13 outputs, with as many of its pixels and labels as a batch has"
    return learner(timm.create_model(ARCH, num_classes=13), torch.randn(bs, 3, size, size), torch.randint(13, (bs,)),
                   F.cross_entropy)

def ratings(bs):
    "Dot products of 50 factors for the users and films of MovieLens 100k"
    pairs = torch.stack([torch.randint(1, 944, (bs,)), torch.randint(1, 1683, (bs,))], 1)
    return learner(DotProductBias(944, 1683, 50), pairs, torch.rand(bs)*4+1, F.mse_loss)

def step(learn):
    "A whole step, as fastai takes it"
    learn.recorder.losses, learn.recorder.lrs = [], []
    learn.one_batch(3, (*learn.xb, *learn.yb))

# --- what is timed --------------------------------------------------------------------------------------------------
def event_variants(make):
    without, with_it = make(), make().add_cb(CheckFinite())
    def all_events(learn):
        learn.recorder.losses, learn.recorder.lrs = [], []
        for o in EVENTS: learn(o)
    return {'without': lambda: all_events(without), 'CheckFinite': lambda: all_events(with_it)}

def weights_variants(make):
    "A look at all weights, which comes once an epoch, beside a whole step"
    learn = make()
    return {'one step': lambda: step(learn), 'all weights': lambda: broken_weights(learn.model)}

def step_variants(make):
    without, with_it = make(), make().add_cb(CheckFinite())
    return {'without': lambda: step(without), 'CheckFinite': lambda: step(with_it)}

def cases(quick):
    bs, size = (4, 32) if quick else (64, 64)
    makes = {f'{ARCH}, {size} px, batches of {bs}': (partial(pictures, bs, size), 8),
             'ratings, batches of 64': (partial(ratings, 64), 96),
             'ratings, batches of 512': (partial(ratings, 512), 96)}
    parts = dict(events=event_variants, weights=weights_variants, step=step_variants)
    return [Case(name, partial(variants, make), dict(learner=what), rounds=rounds if name == 'step' else 48)
            for what, (make, rounds) in makes.items() for name, variants in parts.items()]

def findings(result):
    "Time added to the events of a batch, measured alone, over the time of the whole step without it"
    found = {(o['name'], o['params']['learner']): o['variants'] for o in result['cases']}
    def share(added, whole): return {k: digits(100*added[k]/whole, 3) for k in ('median', 'low', 'high')}
    return [dict(name='CheckFinite: time added, % of a training step', where=f'{what}, CPU',
                 **share(variants[2]['added'], (whole := found['step', what][0]['seconds']['median'])),
                 control=share(variants[1]['added'], whole))
            for (name, what), variants in found.items() if name == 'events']

if __name__ == '__main__':
    main('finite', 'A look at every loss', 'How much time does CheckFinite add to a step of training?',
         cases, findings=findings, clock='processor')  # one thread that never waits
