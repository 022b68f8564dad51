"Learners of which each process keeps a part, beside learners of one process"
import contextlib
import io
import os
import signal
from functools import partial
from pathlib import Path

import fastai.callback.schedule  # fit_one_cycle and lr_find
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from fastai.basics import Adam, Callback, OptimWrapper, QHAdam, RAdam, RMSProp, SGD, params
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.callback.training import GradientClip
from fastai.optimizer import Lamb, Larc
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import spread
import spread_calls
from paddy_multi.accumulate.microbatch import MicroBatch
from paddy_multi.core.tensors import replaced
from paddy_multi.distributed import checkpoints
from paddy_multi.distributed.across import across_processes
from paddy_multi.distributed.checkpoints import KeepSharded, load_sharded, save_sharded
from paddy_multi.distributed.launch import in_processes
from paddy_multi.distributed.ranks import is_shard, join_processes
from paddy_multi.distributed.sharded import shard_learner
from spread import alone, quietly


def numbers_of(model):
    "All weights, in every process"
    return torch.cat([(p.full_tensor() if is_shard(p) else p).detach().flatten() for p in model.parameters()])


def local(t): return t.to_local() if is_shard(t) else t


# --- the same updates -----------------------------------------------------------------------------------------------
@contextlib.contextmanager
def in_parts(**kwargs):
    "The learners of `spread` with a batch size of 8 are in parts inside the block"
    def of(make):
        def made(bs, *args, **settings):
            learn = make(bs, *args, **settings)
            if bs == 8: return shard_learner(learn, **kwargs)
            return learn.remove_cbs(MicroBatch)
        return made
    with (replaced(spread, 'learner', of(spread.learner)), replaced(spread, 'numbers_of', numbers_of),
          replaced(spread, 'table_learner', of(spread.table_learner))): yield


CASES = spread.CASES | dict(
    decay=dict(opt=partial(Adam, wd=.1)), l2=dict(opt=partial(SGD, mom=.9, wd=.1, decouple_wd=False)),
    rms=dict(opt=partial(RMSProp, mom=.9)), radam=dict(opt=RAdam), qhadam=dict(opt=QHAdam), larc=dict(opt=Larc),
    lamb=dict(opt=Lamb), adamw=dict(opt=partial(OptimWrapper, opt=torch.optim.AdamW)),
    chunks=dict(cbs=lambda: [MicroBatch(3)]), one_at_a_time=dict(n=33, cbs=lambda: [MicroBatch(1)]),
    chunks_clip=dict(y=spread.missing, opt=Adam, loss=lambda: nn.CrossEntropyLoss(weight=spread.weights),
                     cbs=lambda: [MicroBatch(3), GradientClip(.1)]))
# Three processes, and copies of parts
FEW = 'plain one_item_last missing adam_weights_clip pairs mixup chunks chunks_clip learned_weights adamw'.split()


def run_updates(names, copies=0):
    "What `spread.compare` finds, by name of the case; with `copies`, a mesh of so many copies of all parts"
    n = join_processes(60).world_size
    mesh = None
    if copies: mesh = init_device_mesh('cpu', (copies, n//copies), mesh_dim_names=('copies', 'parts'))
    with in_parts(mesh=mesh):
        return {name: counted(spread.run_table, spread.TABLES[name]) if name in spread.TABLES else
                counted(spread.run_case, **CASES[name]) for name in names}


def counted(f, *args, **kwargs):
    "What `f` gives, and how often `fully_shard` has exchanged gradients"
    times = []
    def counting(exchange):
        def counted(*args, **kwargs):
            times.append(1)
            return exchange(*args, **kwargs)
        return counted
    name = next(o for o in ('reduce_scatter_single', 'reduce_scatter_tensor') if hasattr(dist, o))  # newer and older
    with replaced(dist, name, counting(getattr(dist, name))): return {**f(*args, **kwargs), 'reduced': len(times)}


# --- the same calls -------------------------------------------------------------------------------------------------
def two_groups(model): return [params(model[0]), params(model[1])]


def learner(bs, **kwargs):
    learn = spread.learner(bs, spread.cross_entropy, **{'opt': Adam, **kwargs})
    learn.splitter = two_groups
    return learn


def differ(ours, one): return float((numbers_of(ours.model)-numbers_of(one.model)).abs().max())


def said(f):
    try: f()
    except Exception as e: return f'{type(e).__name__}: {e}'


class KeepEpochs(Callback): "Named as one that writes whole models"


def run_calls(folder):
    "What fastai's calls do, in parts and in one process, and how far apart they are"
    n = join_processes(60).world_size
    ours, one = (learner(bs, path=Path(folder)/name) for bs, name in ((8, 'parts'), (8*n, f'one{os.environ["RANK"]}')))
    for o in (ours, one): o.freeze()
    shard_learner(ours)
    found = dict(frozen=[p.requires_grad for p in ours.model.parameters()])
    f = lambda l: (l.fine_tune(2, .05), l.lr_find(num_it=12, show_plot=False), torch.tensor(l.recorder.losses))[2]
    with alone(): rates_of_one = quietly(one, f)
    with across_processes(ours): rates = quietly(ours, f)
    found['fine_tune'], found['rates'] = differ(ours, one), float((rates-rates_of_one).abs().max())
    state = [t for o in ours.opt.state.values() for t in o.values() if torch.is_tensor(t)]
    found['held'] = [sum(local(t).numel() for t in ts) for ts in (ours.model.parameters(), state)]
    found['whole'] = [sum(t.numel() for t in ts) for ts in (ours.model.parameters(), state)]
    f = lambda l: (torch.tensor(l.validate(), dtype=torch.float64), *l.get_preds(), *l.get_preds(ds_idx=0))
    with alone(): of_one = quietly(one, f)
    with across_processes(ours): given = quietly(ours, f)
    found['predictions'] = max(float((a.double()-b.double()).abs().max()) for a, b in zip(given, of_one))
    f = lambda l: l.fit(3, .3, cbs=[SaveModelCallback(fname='best', with_opt=True), EarlyStoppingCallback(patience=1)])
    with contextlib.redirect_stdout(io.StringIO()):
        with alone(): quietly(one, f)
        with across_processes(ours): quietly(ours, f)
    found['best'] = differ(ours, one)
    ours.save('kept')
    join_processes().meet('kept')
    with alone(): one.load(Path(folder).resolve()/'parts/models/kept')
    with across_processes(ours): quietly(ours, lambda l: l.load('kept').fit(1, .05))
    with alone(): quietly(one, lambda l: l.fit(1, .05))
    found['loaded'] = differ(ours, one)
    found['refused'] = [said(lambda: ours.export()), said(lambda: shard_learner(ours))]
    with across_processes(ours):
        for cb in (MicroBatch(3, whole_head=True), MicroBatch(3, auto=True), KeepEpochs()):
            found['refused'].append(said(lambda: ours.fit(1, cbs=cb)))
            ours.remove_cb(cb)
    return found


def run_predictions(folder):
    "Declared targets of pictures: what `spread_calls` calls, in parts and in one process"
    ranks, learn = join_processes(60), shard_learner(spread_calls.digits_learner(folder, 8))
    with across_processes(learn), learn.no_bar(), learn.no_logging():
        learn.fine_tune(1, .01)
        given = spread_calls.predictions(learn, folder)
        file = learn.save('trained', with_opt=False)
        ranks.meet('trained')
    with alone():
        one = spread_calls.digits_learner(folder, 8*ranks.world_size)
        one.load(file.with_suffix(''), with_opt=False)
        with one.no_bar(), one.no_logging(): return given, spread_calls.predictions(one, folder)


# --- checkpoints ----------------------------------------------------------------------------------------------------
class Stop(Callback):
    order = KeepSharded.order+1
    def after_epoch(self):
        if self.epoch == 1: raise KeyboardInterrupt


def four_epochs(learn, **kwargs):
    "Weights after a fit of four epochs; where it is stopped, after two"
    with contextlib.suppress(KeyboardInterrupt), across_processes(learn):
        quietly(learn, lambda l: l.fit_one_cycle(4, .05, **kwargs))
    return numbers_of(learn.model)


def fresh(**kwargs):
    "A learner with batches of 24 items, in all processes together"
    ranks = join_processes(60)
    return shard_learner(learner(24//(ranks.world_size if ranks else 1), **kwargs))


def run_kept(folder):
    "Stop in the second epoch of four; what comes of going on, and of not having stopped"
    four_epochs(fresh(), cbs=[KeepSharded(folder), Stop()])
    return resumed(folder), four_epochs(fresh())


def resumed(folder, **kwargs):
    learn = fresh(**kwargs)
    return four_epochs(learn, start_epoch=load_sharded(learn, folder))


def run_others(folder):
    "What comes of the checkpoints of other models"
    wide = lambda: nn.Sequential(nn.Linear(20, 5), nn.Linear(5, 5)).double()
    learns = [fresh(model=wide), fresh(opt=SGD), fresh(opt=partial(OptimWrapper, opt=torch.optim.AdamW))]
    return [said(lambda: load_sharded(o, folder)) for o in learns] + [said(lambda: load_sharded(learns[0], 'nowhere'))]


def no_space(*args): raise OSError(28, 'No space left on device')


def run_without_space(folder):
    "What is said of a checkpoint whose last file process 0 cannot write"
    learn = fresh()
    with replaced(checkpoints, 'write_file', no_space): return said(lambda: save_sharded(learn, folder, 9))


def run_killed(folder):
    "One process is killed while all of them write"
    learn, save = fresh(), dcp.save
    def killed(*args, **kwargs):
        if os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)
        return save(*args, **kwargs)
    with replaced(dcp, 'save', killed): save_sharded(learn, folder, 9)


# --- failures -------------------------------------------------------------------------------------------------------
def run_failing(f, event='before_batch'):
    learn = shard_learner(learner(8))
    learn.add_cb(spread_calls.Once(f, 1, event))
    with across_processes(learn, timeout=60): quietly(learn, lambda l: l.fit(2))
