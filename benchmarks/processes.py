"""What several processes cost and bring: the same updates by one process, and by two that share each batch.

One group of two processes runs it all. Process 0 measures, and tells the other what to do, so that variants take turns
in one run; where one process trains, the other sleeps. Data are scikit-learn's real digits. An epoch includes entering
and leaving `across_processes`, which sends the weights. Both sides must arrive at the same weights first. Predictions
are of digits as PNG files with a ResNet-18 of random weights: a CSV of them, which both sides must write alike.
"""
import os
import sys
import tempfile
import traceback
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from fastai.basics import Adam, DataLoaders, Learner, TfmdDL
from fastai.vision.all import Resize, get_image_files
from harness import Case, Variant, keep_freed_memory, main
from sklearn.datasets import load_digits
from timm.layers import GroupNorm
from torch import nn
from torch.nn import functional as F

from paddy_multi.accumulate.microbatch import MicroBatch
from paddy_multi.data.digits import sample_digits
from paddy_multi.data.loaders import MultiTargetDataLoaders
from paddy_multi.distributed.across import across_processes
from paddy_multi.distributed.launch import in_processes
from paddy_multi.distributed.ranks import join_processes
from paddy_multi.kinds.category import CategoryTarget
from paddy_multi.kinds.regression import RegressionTarget
from paddy_multi.targets.declare import Targets
from paddy_multi.train.learner import multi_target_learner
from paddy_multi.use.many_files import predict_files

BS, MEETINGS = 64, 100


# --- an epoch -------------------------------------------------------------------------------------------------------
@contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try: yield
    finally: torch.set_num_threads(before)

@contextmanager
def alone():
    "fastai finds one process"
    kept = {k: os.environ.pop(k) for k in ('WORLD_SIZE', 'RANK') if k in os.environ}
    try: yield
    finally: os.environ.update(kept)

def fit(learn):
    with learn.no_bar(), learn.no_logging(): learn.fit(1)

def fit_alone(learn, n_threads=1):
    "An epoch of process 0; the others have nothing to do"
    if dist.get_rank(): return
    with alone(), threads(n_threads): fit(learn)

def fit_together(learn, **how):
    "An epoch of all processes; what each gave away in it, an update: calls and MB by kind"
    ranks, updates = join_processes(), len(learn.dls.train)//2
    ranks.calls.clear(), ranks.bytes.clear()
    before = ranks.meetings
    with across_processes(learn, **how):
        fit(learn)
        if how.get('engine') == 'ddp': count_buckets(learn.across_processes.ddp, ranks, updates)
    found = {f'{kind}, calls': n/updates for kind, n in ranks.calls.items()}
    found |= {f'{kind}, MB': n/updates/1e6 for kind, n in ranks.bytes.items()}
    return {'meetings': (ranks.meetings-before)/updates, **found}

def count_buckets(ddp, ranks, updates):
    "What DistributedDataParallel exchanges by itself in every backward pass"
    told = ddp._get_ddp_logging_data()
    sizes = [*map(int, (told.get('rebuilt_bucket_sizes') or told['bucket_sizes']).split(','))]
    ranks.calls['gradients'] += len(sizes)*updates
    ranks.bytes['gradients'] += sum(sizes)*updates

# --- models and data ------------------------------------------------------------------------------------------------
def digits(n):
    "`n` real digits of 8 x 8 pixels"
    found = load_digits()
    return torch.tensor(found.data[:n]/16).float(), torch.tensor(found.target[:n])

def resnet(quick):
    "A ResNet with GroupNorm, whose updates do not depend on who computes them; digits enlarged to 32 px"
    x, y = digits(BS if quick else 4*BS)
    x = F.interpolate(x.view(-1, 1, 8, 8), size=32).expand(-1, 3, -1, -1).contiguous()
    arch = 'test_resnet' if quick else 'resnet10t'
    def model(): return timm.create_model(arch, num_classes=10, norm_layer=partial(GroupNorm, num_groups=8))
    return (x, y), model, F.cross_entropy

def targets_mlp(quick):
    "Three declared targets of an MLP: digit, ink, and how much more of it is above, which a third does not tell"
    x, y = digits(BS if quick else 28*BS)
    rows = [dict(digit=int(k), ink=float(o.mean()), above=float(o[:32].mean()-o[32:].mean())) for o, k in zip(x, y)]
    for row in rows[::3]: row['above'] = None
    targets = Targets(digit=CategoryTarget(), ink=RegressionTarget(), above=RegressionTarget()).fit(rows)
    def model(): return nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(),
                                      nn.Linear(512, targets.n_out))
    return (x, torch.stack([targets.encode(o) for o in rows])), model, targets.loss()

def learner(task, bs, chunk=None):
    data, model, loss = task
    torch.manual_seed(0)
    dls = DataLoaders(TfmdDL([*zip(*data)], bs=bs, num_workers=0), [])
    dls.n_inp = 1
    cbs = [MicroBatch(chunk)] if chunk else []
    return Learner(dls, model(), loss, opt_func=Adam, lr=1e-3, cbs=cbs)

# --- cases ----------------------------------------------------------------------------------------------------------
def weights(learn): return torch.cat([o.detach().flatten() for o in learn.model.parameters()])

def same(task, chunk, how):
    "`ValueError` unless an epoch of one process and of two take the weights to the same place"
    one, two = learner(task, BS, chunk), learner(task, BS//2, chunk)
    start = weights(one)
    fit_alone(one)
    fit_together(two, **how)
    if dist.get_rank(): return
    moved, found = weights(one)-start, weights(two)-start
    off = float((found-moved).norm()/moved.norm())
    if not (moved.norm() > 0 and off < .02): raise ValueError(f'weights of one and of two differ by {off:.2g}')

def epochs(task, chunk, ways):
    "An epoch of one process with a core, with both, and of two processes in each of `ways`"
    for how in ways.values(): same(task, chunk, how)
    one = learner(task, BS, chunk)
    twos = {name: Variant(partial(fit_together, learner(task, BS//2, chunk), **how), measure=dict)
            for name, how in ways.items()}
    return {'one process': lambda: fit_alone(one), 'one process, two threads': lambda: fit_alone(one, 2), **twos}

def predict(learn, files, out, bs):
    with learn.no_logging(): predict_files(learn, files, out, bs=bs, part=bs, overwrite=True, progress=False)
    return out.read_text()

def predict_alone(learn, *args):
    if dist.get_rank() == 0:
        with alone(): return predict(learn, *args)

def predict_together(learn, *args):
    with across_processes(learn): return predict(learn, *args)

def predictions(n, folder):
    "A CSV of `n` files, in parts of a batch: of one process, and of two that share the parts"
    if dist.get_rank() == 0: sample_digits(folder)
    dist.barrier(group=join_processes().control)
    dls = MultiTargetDataLoaders.from_csv(folder, targets=['digit', 'ink'], kinds=dict(digit='category'),
                                          folder='images', seed=1, bs=BS, num_workers=0, item_tfms=Resize(64))
    torch.manual_seed(0)
    learn = multi_target_learner(dls, 'resnet18', pretrained=False)
    args = learn, get_image_files(folder/'images').sorted()[:n], folder/'predictions.csv', BS//2
    found = predict_alone(*args), predict_together(*args)
    if dist.get_rank() == 0 and found[0] != found[1]: raise ValueError('predictions of one and of two differ')
    return {'one process': lambda: predict_alone(*args), 'two processes': lambda: predict_together(*args)}

def meetings():
    "Meetings beside the barrier of torch.distributed"
    ranks = join_processes()
    def of(wait):
        def run():
            for _ in range(MEETINGS): wait()
        return run
    return {'barrier': of(lambda: dist.barrier(group=ranks.control)), 'meeting': of(lambda: ranks.meet('here')),
            'sum of one number': of(lambda: ranks.sum('here', torch.ones(1)))}

def cases(quick, folder):
    n = BS if quick else 8*BS
    ways = {'two processes': dict(engine='meeting'), 'two processes, DDP': dict(engine='ddp')}
    def case(name, make, chunk=None, rounds=6):
        task = make(quick)
        return Case(f'{name}, MicroBatch({chunk})' if chunk else name,
                    lambda: epochs(task, chunk, ways if chunk is None else {'two processes': {}}),
                    dict(items=len(task[0][0]), bs=BS), rounds)
    return [case('MLP', targets_mlp, rounds=12), case('MLP', targets_mlp, BS//4, 12),
            case('ResNet', resnet), case('ResNet', resnet, BS//4),
            Case('Files predicted', partial(predictions, n, folder), dict(items=n, bs=BS//2), 6),
            Case(f'{MEETINGS} meetings', meetings)]

# --- two processes --------------------------------------------------------------------------------------------------
NEXT, END = -1, -2  # what process 0 says beside the number of a variant

def told(number=END):
    "What process 0 says"
    box = torch.tensor(number)
    dist.broadcast(box, 0, group=join_processes().control)
    return int(box)

def announced(case):
    "A case as process 0 measures it: the other hears of each call"
    def calling(i, o):
        o = o if isinstance(o, Variant) else Variant(o)
        return Variant(lambda: (told(i), o.run())[1], measure=o.measure)
    def make():
        told(NEXT)
        return {name: calling(i, o) for i, (name, o) in enumerate(case.make().items())}
    return Case(case.name, make, case.params, case.rounds)

def follow(cases):
    "What the other process does"
    cases, runs = iter(cases), []
    while (i := told()) != END:
        try:
            if i == NEXT: runs = [o.run if isinstance(o, Variant) else o for o in next(cases).make().values()]
            else: runs[i]()
        except Exception: traceback.print_exc()  # which process 0 has met too

def one_of_two(argv, folder):
    "Process 0 measures"
    keep_freed_memory()
    torch.set_num_threads(1)
    if join_processes(600).rank: return follow(cases('--quick' in argv, folder))
    main('processes', 'Several processes', 'What do two processes bring, and what do they exchange?',
         lambda quick: [announced(o) for o in cases(quick, folder)], argv=argv)
    told(END)

if __name__ == '__main__':
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')  # else threads spin while others have the cores
    with tempfile.TemporaryDirectory() as place:
        ended = in_processes(one_of_two, 2, 580, argv=sys.argv[1:], folder=Path(place))
    for o in ended: print(o.output)
    sys.exit(max(abs(o.code) for o in ended))
