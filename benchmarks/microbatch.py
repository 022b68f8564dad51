"""What `MicroBatch` costs beside a plain loop over the same chunks: around an empty model, and in a real step; and what
its checks cost in fits to real digits, for two small models and a loss that it does not know.

Elsewhere labels and images are random numbers: only time is measured. There, before timing, both sides must arrive at
the same weights: those of the plain loop over chunks, and with `whole_head=True`, where the head has BatchNorm, those
of a plain loop over whole batches.
"""
import warnings
from contextlib import nullcontext
from functools import partial

import timm
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import Adam
from fastai.vision.learner import create_head
from harness import Case, digits, keep_freed_memory, main
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from paddy_multi.accumulate.microbatch import MicroBatch

ARCH, SIZE, BS, CHUNKS, BATCHES, EPOCHS = 'convnext_atto', 64, 64, 4, 8, 20
warnings.filterwarnings('ignore', '.*BatchNorm takes its statistics')  # it is known here
warnings.filterwarnings('ignore', '.*torch.jit.script')

# --- models and data ------------------------------------------------------------------------------------------------
def nothing(): return nn.Linear(4, 10)
def plain_head(arch): return timm.create_model(arch, num_classes=10)
def batchnorm_head(arch):
    body = timm.create_model(arch, num_classes=0, global_pool='')
    return nn.Sequential(body, create_head(body.num_features, 10, ps=0.))

def batch(bs, *shape): return torch.randn(bs, *shape), torch.randint(10, (bs,))
def chunk_of(b): return len(b[0])//CHUNKS

# --- both sides: an epoch of `n` batches ------------------------------------------------------------------------------
def seeded(make):
    torch.manual_seed(0)
    return make()

def by_hand(make, b, n, chunk, lr=1e-6):
    "The plain loop over chunks of every batch, each weighed by its share, then one update; and its model"
    model = seeded(make)
    opt = Adam(model.parameters(), lr=lr)
    def run():
        model.train()
        for x, y in [b]*n:
            for xb, yb in zip(x.split(chunk), y.split(chunk)):
                loss = F.cross_entropy(model(xb), yb)*(len(xb)/len(x))
                loss.backward()
            opt.step()
            opt.zero_grad()
    return run, model

def in_learner(make, b, n, *cbs, lr=1e-6):
    "fastai's loop over the same batches, and its model"
    learn = Learner(DataLoaders([b]*n, []), seeded(make), loss_func=F.cross_entropy, opt_func=Adam, lr=lr, cbs=cbs)
    learn.dls.n_inp = 1
    def run():
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return run, learn.model

def weights(model): return torch.cat([o.detach().flatten() for o in model.parameters()])

def same(make, a, b, what):
    "`ValueError` unless an update takes `a` and `b` from the same place to the same place"
    start = weights(seeded(make))
    for run, _ in (a, b): run()
    moved, found = (weights(model)-start for _, model in (a, b))
    off = (found-moved).norm()/moved.norm()
    if not (moved.norm() > 0 and off < .02):
        raise ValueError(f'{what}: updates by hand and ours differ by {float(off):.2g}')

# --- cases ----------------------------------------------------------------------------------------------------------
def variants(make, b, n):
    chunk = chunk_of(b)
    same(make, by_hand(make, b, 1, chunk, lr=1e-3), in_learner(make, b, 1, MicroBatch(chunk), lr=1e-3), 'MicroBatch')
    return {'plain loop over chunks': by_hand(make, b, n, chunk)[0],
            'MicroBatch': in_learner(make, b, n, MicroBatch(chunk))[0]}

def nothing_variants(bs):
    "Beside them fastai's loop without the callback"
    b = batch(bs, 4)
    return {**variants(nothing, b, BATCHES), 'Learner, whole batches': in_learner(nothing, b, BATCHES)[0]}

def step_variants(bs, size, arch): return variants(partial(plain_head, arch), batch(bs, 3, size, size), 1)

def head_variants(bs, size, arch):
    "Beside them the head on whole batches, which takes the body's forward twice"
    make, b = partial(batchnorm_head, arch), batch(bs, 3, size, size)
    def ours(**kwargs): return in_learner(make, b, 1, MicroBatch(chunk_of(b), whole_head=True), **kwargs)
    same(make, by_hand(make, b, 1, bs, lr=1e-3), ours(lr=1e-3), 'whole_head')
    return {**variants(make, b, 1), 'MicroBatch, whole_head=True': ours()[0]}

# --- checks -----------------------------------------------------------------------------------------------------------
class LossUnchecked(MicroBatch):
    def _looks_at_loss(self, known): return False

class Unchecked(LossUnchecked):
    def _warning(self): return nullcontext()

def mlp(): return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
def convnet():
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
                         nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))

def unknown(preds, labels): return F.cross_entropy(preds, labels)  # a function of the user's own is checked

def check_variants(bs, model, epochs):
    "Fits to scikit-learn's real digits without checks, without that of the loss, and with all"
    found = load_digits()
    pieces = (torch.from_numpy(o).split(bs) for o in ((found.data/16).astype('float32'), found.target))
    batches = list(zip(*pieces))
    def fit(kind):
        learn = Learner(DataLoaders(batches, []), seeded(model), loss_func=unknown, opt_func=Adam, lr=1e-3,
                        cbs=kind(bs//CHUNKS))
        learn.dls.n_inp = 1
        def run():
            with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
        return run
    kinds = {'no check': Unchecked, 'layers checked': LossUnchecked, 'layers and loss checked': MicroBatch}
    return {name: fit(kind) for name, kind in kinds.items()}

def cases(quick):
    bs, size, arch = (8, 32, 'test_convnext') if quick else (BS, SIZE, ARCH)
    def case(name, make, *args, **kw):
        return Case(name, lambda: make(bs, *args), dict(bs=bs, chunk=bs//CHUNKS), **kw)
    return [case(f'epoch of {BATCHES} batches, a linear model', nothing_variants),
            case('training step', step_variants, size, arch, rounds=24),
            case('training step, head with BatchNorm', head_variants, size, arch, rounds=24),
            *(case(f'{name}, {epochs} epoch{"s"*(epochs > 1)} of digits', check_variants, model, epochs,
                   rounds=24 if epochs == 1 else 6)
              for name, model in (('MLP', mlp), ('convnet', convnet)) for epochs in (1, 1 if quick else EPOCHS))]

# --- what follows ---------------------------------------------------------------------------------------------------
def findings(result):
    "The share of a step that callback and learner take, measured apart and in the step; and what a whole head takes"
    alone, step, head = (o['variants'] for o in result['cases'][:3])
    whole = step[0]['seconds']['median']*BATCHES
    def percent(values, of): return {k: digits(of(values[k]), 3) for k in ('median', 'low', 'high')}
    def share(o): return percent(o['added'], lambda seconds: 100*seconds/whole)
    def more(o): return percent(o['ratio'], lambda ratio: 100*(ratio-1))
    def finding(name, where, measure, o, control):
        return dict(name=name, where=where, **measure(o), control=measure(control))
    where = f'{ARCH}, {SIZE} px, batches of {BS} in {BS//CHUNKS}s, CPU'
    return [finding('MicroBatch and its Learner: time added, % of a step (apart)', where, share, alone[2], alone[1]),
            finding('a Learner without MicroBatch: time added, % of a step (apart)', where, share, alone[3], alone[1]),
            finding('MicroBatch and its Learner: time added, % of a step (in it)', where, more, step[2], step[1]),
            finding('whole_head=True: time added, % of a step', where+', head with BatchNorm', more, head[3], head[1]),
            *(finding(f'checks of {what}: time added, % of a fit',
                      f'{o["name"]}, batches of {BS} in {BS//CHUNKS}s, CPU', more, o['variants'][i], o['variants'][1])
              for o in result['cases'][3:] for what, i in (('layers', 2), ('layers and loss', 3)))]

if __name__ == '__main__':
    keep_freed_memory()
    question = "How much time does MicroBatch add to the chunks' own forward and backward?"
    main('microbatch', 'Whole batches in chunks', question, cases, findings=findings,
         clock='processor')  # one thread that never waits
