"""What a GPU gives: memory beside what was predicted, models under a cap, precision, what an error leaves, and speed.

`python benchmarks/run.py gpu` measures all sections; `python benchmarks/gpu.py memory large` those named. Each writes
a file to results/gpu as soon as it is done. Images, labels and ratings are random numbers. Without a GPU only `--quick`
runs: small models on the CPU, where nothing is measured but that the script works.
"""
import argparse
import gc
import json
import math
import re
import subprocess
import sys
import time
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import timm
import torch
from fastai.callback.core import Callback, CancelEpochException
from fastai.callback.progress import ProgressCallback
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam, OptimWrapper, SGD
from fastcore.basics import noop
from harness import QUICK, RESULTS, Case, about, digits, dumps, failures, measure, save
from multi_target import WIDTH, all_by_hand, batch, declared
from sliced import loss_by_hand, seen
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from paddy_multi.accumulate.memory import predict_memory
from paddy_multi.accumulate.microbatch import MicroBatch
from paddy_multi.accumulate.processes import free_memory

GPU = RESULTS/'gpu'
CAP = 15e9  # bytes of a card with 16 GB that tensors can have
AdamW = partial(OptimWrapper, opt=torch.optim.AdamW)
OPTIMIZERS = dict(adam=Adam, adamw=AdamW)

def on_gpu(): return torch.cuda.is_available()
def device(): return torch.device('cuda' if on_gpu() else 'cpu')

# --- learners -------------------------------------------------------------------------------------------------------
def pixels(size): return size if isinstance(size, tuple) else (size, size)
def images(bs, size): return torch.randn(bs, 3, *pixels(size), device=device()), labels(bs)
def labels(*shape, classes=10): return torch.randint(classes, shape, device=device())

def loaders(batches, valid=()):
    "The same batches every epoch, on the device already"
    res = DataLoaders(list(batches), list(valid))
    res.n_inp = 1
    return res

def precise(learn, precision):
    "`learn` in 'fp32', 'fp16' or 'bf16'"
    return learn if precision == 'fp32' else getattr(learn, f'to_{precision}')()

def fit(learn, cbs=()):
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=cbs)

def described(item, model, bs, loss=None, precision='fp32', optimizer='adam'):
    "A learner whose loaders say what a batch looks like, as `predict_memory` wants it, and hold one item"
    dl = DataLoader([item], bs=1, num_workers=0)
    dl.bs = bs
    loss, opt = loss or CrossEntropyLossFlat(), OPTIMIZERS[optimizer]
    return precise(Learner(DataLoaders(dl, dl), model, loss_func=loss, opt_func=opt), precision)

def classifier(arch, size, bs=64, precision='fp32', optimizer='adam', **kwargs):
    item = torch.zeros(3, *pixels(size)), torch.tensor(0)
    model = timm.create_model(arch, num_classes=10, **kwargs)
    return described(item, model, bs, precision=precision, optimizer=optimizer)

# --- memory ---------------------------------------------------------------------------------------------------------
def predicted(learn, accum):
    "All that `predict_memory` says of one number of chunks, and how long it took"
    start = time.perf_counter()
    row = predict_memory(learn, [accum]).loc[accum]
    return dict(predicted={k: int(v) for k, v in row.items() if isinstance(v, (int, float)) and not math.isnan(v)},
                predict_seconds=digits(time.perf_counter()-start, 3))

def allocated(learn, batch, accum, valid=False, n=3):
    "Most bytes that tensors took of the card in `n` updates, and that PyTorch reserved for them; None without a GPU"
    learn.model.to(device())
    learn.dls = loaders([batch]*n, [batch]*valid)
    fresh()
    fit(learn, [MicroBatch(math.ceil(len(batch[0])/accum))] if accum > 1 else [])
    if not on_gpu(): return dict(measured=None, reserved=None)
    torch.cuda.synchronize()
    return dict(measured=torch.cuda.max_memory_allocated(), reserved=torch.cuda.max_memory_reserved())

def fresh():
    "Nothing left of what ran before: neither tensors nor workspaces"
    free_memory()
    if not on_gpu(): return
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()

def attempt(params, run):
    "A row of a table: `params` and what `run` gave, or its error"
    try: row = dict(**params, error=None, **run())
    except Exception as e:
        traceback.print_exc()
        row = dict(**params, error=f'{type(e).__name__}: {e}'[:300])
    print('  ', row, flush=True)
    return row

def memory_row(arch, size, precision='fp32', optimizer='adam', accum=1, bs=64, **kwargs):
    def run():
        learn = classifier(arch, size, bs, precision, optimizer, **kwargs)
        return {**predicted(learn, accum), **allocated(learn, images(bs, size), accum)}
    shown = dict(arch=arch, options=str(kwargs) if kwargs else '', size=size, precision=precision, optimizer=optimizer)
    return attempt(dict(**shown, bs=bs, accum=accum), run)

COMMON = [('convnext_small', 128, 'fp32', 'adam'), ('convnext_small', 128, 'fp16', 'adam'),
          ('convnext_small', 128, 'bf16', 'adamw'),
          ('resnet50', 224, 'fp32', 'adam'), ('resnet50', 224, 'fp16', 'adam'),
          ('vit_small_patch16_224', 224, 'fp32', 'adam'), ('vit_small_patch16_224', 224, 'fp16', 'adam'),
          ('vit_small_patch16_224', 224, 'fp32', 'adamw')]
OTHERS = [('swin_tiny_patch4_window7_224', 'fp16'), ('efficientnet_b0', 'fp32'), ('efficientnet_b0', 'fp16'),
          ('mobilenetv3_large_100', 'fp32'), ('maxvit_tiny_tf_224', 'fp16'), ('densenet121', 'fp32'),
          ('mixer_s32_224', 'fp16'), ('regnety_016', 'fp16'), ('eva02_tiny_patch14_224', 'fp16'),
          ('coatnet_0_224', 'fp32'), ('convnextv2_nano', 'fp16'), ('beit_base_patch16_224', 'fp16')]
# Attention with a bias, a mask or dropout, and recurrent layers: kernels of their own on a GPU
KERNELS = ['beit_base_patch16_224', 'coatnet_0_224', 'eva02_tiny_patch14_224', 'maxvit_tiny_tf_224', 'sequencer2d_s']

def memory(quick):
    "Predicted and allocated bytes by architecture, precision, optimizer and number of chunks"
    if quick: return [memory_row('test_convnext', 32, precision, accum=2, bs=8) for precision in ('fp32', 'bf16')]
    rows = [memory_row(*o, accum=accum) for o in COMMON for accum in (1, 2, 4, 8)]
    rows += [memory_row(arch, 224, precision, accum=accum) for arch, precision in OTHERS for accum in (1, 4)]
    rows += [memory_row(arch, 224, precision, bs=32) for arch in KERNELS for precision in ('fp32', 'fp16')]
    return rows + [memory_row('vit_small_patch16_224', 224, precision, bs=32, attn_drop_rate=.1)
                   for precision in ('fp32', 'fp16')]

class Segmenter(nn.Sequential):
    "A class for each pixel: the output is larger than the input"
    def __init__(self, classes=21):
        super().__init__(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
                         nn.Conv2d(16, classes, 1))

def dense_row(accum, size=256, bs=16, classes=21):
    def run():
        item = torch.zeros(3, size, size), torch.zeros(size, size, dtype=torch.long)
        learn = described(item, Segmenter(classes), bs, CrossEntropyLossFlat(axis=1))
        batch = images(bs, size)[0], labels(bs, size, size, classes=classes)
        return {**predicted(learn, accum), **allocated(learn, batch, accum)}
    return attempt(dict(model='three convolutions, 21 classes', size=size, bs=bs, accum=accum), run)

def dense(quick): return [dense_row(2, 32, 4)] if quick else [dense_row(o) for o in (1, 4, 16)]

def validation_row(arch, valid, size=128, bs=64, accum=16, precision='fp16'):
    def run():
        learn = classifier(arch, size, bs, precision)
        return {**predicted(learn, accum), **allocated(learn, images(bs, size), accum, valid)}
    return attempt(dict(arch=arch, size=size, precision=precision, bs=bs, accum=accum, validation=valid), run)

def validation(quick):
    "Does a batch of validation take more than training in small chunks?"
    if quick: return [validation_row('test_convnext', o, 32, 8, 2, 'fp32') for o in (False, True)]
    return [validation_row(*o) for o in product(('convnext_small', 'resnet50'), (False, True))]

# --- under a cap, each in a process of its own ----------------------------------------------------------------------
def apart(run, *args):
    "What `run` returns in a fresh process"
    with ProcessPoolExecutor(1, get_context('spawn')) as pool: return pool.submit(run, *args).result()

def capped(cap):
    if on_gpu(): torch.cuda.set_per_process_memory_fraction(min(1., cap/torch.cuda.mem_get_info()[1]))

def under_a_cap(arch, size, bs, accum, cap, precision):
    "One of the large models: does it fit, with so many chunks or with what `auto` settles on?"
    learn = classifier(arch, size, bs, precision)
    said = {o: predicted(learn, o)['predicted'] for o in (1, 2)}
    capped(cap)
    try:
        if accum != 'auto': return dict(predicted=said, fits=True, **allocated(learn, images(bs, size), accum, n=2))
        learn.model.to(device())
        learn.dls = loaders([images(bs, size)]*2)
        fit(learn, cb := MicroBatch(bs, auto=True))
        return dict(predicted=said, fits=True, settled_on=cb.bs)
    except torch.OutOfMemoryError: return dict(predicted=said, fits=False)

# The models of Road to the Top, part 3
LARGE = [('convnext_large', 224), ('convnext_large', (320, 240)), ('vit_large_patch16_224', 224),
         ('swinv2_large_window12_192', 192), ('swin_large_patch4_window7_224', 224)]

def large(quick):
    "Five large models on a card with 16 GB: with one chunk, with two, and with `auto`"
    models, bs, precision = ([('test_convnext', 32)], 8, 'fp32') if quick else (LARGE, 64, 'fp16')
    def row(arch, size, accum):
        run = partial(apart, under_a_cap, arch, size, bs, accum, CAP, precision)
        return attempt(dict(arch=arch, size=size, precision=precision, bs=bs, cap=CAP, accum=accum), run)
    return [row(*o, accum) for o in models for accum in ([2] if quick else (1, 2, 'auto'))]

# --- what an out-of-memory error leaves -----------------------------------------------------------------------------
def left_behind(arch, size, bs, cap):
    "Rows of fits that run out in mixed precision, one after the other in one process, and of what stays"
    capped(cap)
    def one(way, cbs):
        learn = precise(classifier(arch, size, bs), 'fp16')
        learn.model.to(device())
        learn.dls = loaders([images(bs, size)]*2)
        try:
            fit(learn, cbs)
            fits = True
        except torch.OutOfMemoryError: fits = False
        entered = torch.is_autocast_enabled('cuda')
        del learn
        said = str(free_memory())
        return dict(way=way, fits=fits, autocast_entered=entered, freed=said,
                    autocast_after_free_memory=torch.is_autocast_enabled('cuda'),
                    left=torch.cuda.memory_allocated() if on_gpu() else None)
    ways = {'fastai': [], 'fastai, again': [], 'MicroBatch': [MicroBatch(bs)],
            'MicroBatch, auto=True': [MicroBatch(bs, auto=True)], 'fastai, after all of them': []}
    return [one(*o) for o in ways.items()]

def after_oom(quick):
    return apart(left_behind, *(('test_convnext', 32, 8, CAP) if quick else ('convnext_small', 224, 64, 3e9)))

# --- precision ------------------------------------------------------------------------------------------------------
def flat(model): return torch.cat([o.detach().double().flatten() for o in model.parameters()])

class FloatLoss(Callback):
    "fastai's average of losses cannot take float64"
    order = -50
    def after_loss(self): self.learn.loss = self.learn.loss.float()

def updated(arch, size, n, precision, bs, cbs=(), shuffled=False):
    "Weights before and after an epoch of `n` items in batches of 64, always the same ones, from the same start"
    torch.manual_seed(0)
    x, y = torch.randn(n, 3, *pixels(size)), torch.randint(10, (n,))
    model = timm.create_model(arch, num_classes=10, drop_path_rate=0., drop_rate=0.)
    if precision == 'fp64': x, model, cbs = x.double(), model.double(), [FloatLoss(), *cbs]
    def order(k): return torch.randperm(k) if shuffled else torch.arange(k)
    whole = [(a[i], b[i]) for a, b in zip(x.split(64), y.split(64)) for i in [order(len(a))]]
    batches = [(a.to(device()), b.to(device())) for x, y in whole for a, b in zip(x.split(bs), y.split(bs))]
    learn = Learner(loaders(batches), model.to(device()), loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=.05,
                    cbs=cbs)
    start = flat(model)
    fit(learn if precision == 'fp64' else precise(learn, precision))
    return start, flat(model)

def precision(quick):
    "How far an epoch in each precision is from float64: whole batches, in another order, in chunks"
    models = [('test_convnext', 32)] if quick else [('convnext_atto', 64), ('vit_tiny_patch16_224', 224)]
    rows, n = [], 128 if quick else 256
    for arch, size in models:
        start, truth = updated(arch, size, n, 'fp64', 64)
        def off(*args, **kwargs):
            return float((updated(arch, size, n, *args, **kwargs)[1]-truth).norm()/(truth-start).norm())
        def run(kind):
            return dict(whole=off(kind, 64), in_another_order=off(kind, 64, shuffled=True),
                        chunks_of_16=off(kind, 64, [MicroBatch(16)]), chunks_of_5=off(kind, 64, [MicroBatch(5)]),
                        fastai_16=off(kind, 16, [GradientAccumulation(64)]))
        rows += [attempt(dict(arch=arch, size=size, precision=o), partial(run, o))
                 for o in (('fp32', 'bf16') if quick else ('fp32', 'fp16', 'bf16'))]
    return rows

# --- kernel launches ------------------------------------------------------------------------------------------------
class Operations(TorchDispatchMode):
    "Counts the operations that reach the device, views left out"
    def __init__(self):
        super().__init__()
        self.n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += not func.is_view
        return func(*args, **(kwargs or {}))

def operations(run):
    with Operations() as seen: run()
    return seen.n

def launches(run):
    "Kernels that `run` has the GPU start, None without one"
    from torch.profiler import ProfilerActivity, profile
    if not on_gpu(): return None
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as prof:
        run()
        torch.cuda.synchronize()
    return sum('LaunchKernel' in o.name for o in prof.events())

def moved(n, bs=64):
    "Output, and labels as a tuple of class numbers and as one row an item, on the device"
    preds, by_hand, rows = batch(n, bs)
    return preds.detach().to(device()).requires_grad_(), [o.to(device()) for o in by_hand], rows.to(device())

def loss_runs(n):
    "The loss of `n` targets, forward and backward"
    preds, by_hand, rows = moved(n)
    def run(loss, *targs):
        loss(preds, *targs).backward()
        preds.grad = None
    return {'by hand': partial(run, loss_by_hand((WIDTH,)*n), *by_hand),
            'declared targets': partial(run, declared(n).loss(), rows)}

def metric_runs(n):
    "Error rates and losses of `n` targets as a learner accumulates them"
    preds, by_hand, rows = moved(n)
    hand, ours = all_by_hand(n), declared(n).metrics()
    a, b = seen(preds, by_hand), seen(preds, [rows])
    b.y = rows
    def run(metrics, learn):
        learn.pred = preds.detach()  # a fresh tensor for each batch, as from a model
        for o in metrics: o.accumulate(learn)
    for o in (*hand, *ours): o.reset()
    return {'by hand': partial(run, hand, a), 'declared targets': partial(run, ours, b)}

def loss_launches(quick):
    "Operations and kernels of the loss of several targets, forward and backward"
    def row(n):
        def run():
            sides = dict(zip(('by_hand', 'declared'), loss_runs(n).values()))
            for o in sides.values(): o()
            return {f'{what.__name__}_{k}': what(o) for what in (operations, launches) for k, o in sides.items()}
        return attempt(dict(targets=n), run)
    return [row(n) for n in ((2, 4) if quick else (2, 10, 40, 100))]

# --- speed: variants take turns, as in all benchmarks ---------------------------------------------------------------
def plain_loop(model, batch, chunk, n, precision):
    "By hand: `n` batches in chunks, each weighed by its share, then one update"
    kind = dict(fp16=torch.float16, bf16=torch.bfloat16).get(precision)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-6)
    scaler = torch.amp.GradScaler(device().type, enabled=precision == 'fp16')
    def run():
        model.train()
        for x, y in [batch]*n:
            for xb, yb in zip(x.split(chunk), y.split(chunk)):
                with torch.autocast(device().type, kind, enabled=kind is not None): out = model(xb)
                scaler.scale(F.cross_entropy(out.float(), yb)*(len(xb)/len(x))).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
    return run

def in_learner(model, batches, precision, *cbs):
    "At each call one more epoch of a fit that goes on, so that what is looked at once in a fit is not timed"
    learn = Learner(loaders(batches), model, loss_func=CrossEntropyLossFlat(), opt_func=AdamW, lr=1e-6, cbs=cbs)
    precise(learn, precision)
    learn.remove_cb(ProgressCallback)
    learn.create_opt()
    learn.n_epoch, learn.logger = 1, noop
    learn('before_fit')
    return partial(learn._with_events, learn._do_epoch_train, 'epoch', CancelEpochException)

def loops(arch, size, bs, chunk, precision, n):
    def model(): return timm.create_model(arch, num_classes=10).to(device())
    batch = images(bs, size)
    small = list(zip(*(o.split(chunk) for o in batch)))
    return {'plain loop over chunks': plain_loop(model(), batch, chunk, n, precision),
            'MicroBatch': in_learner(model(), [batch]*n, precision, MicroBatch(chunk)),
            'GradientAccumulation': in_learner(model(), small*n, precision, GradientAccumulation(bs)),
            'whole batches': in_learner(model(), [batch]*n, precision)}

def compiled(arch, size, bs, chunk, modes, precision, n):
    "Eager and compiled, whole and in chunks"
    batch = images(bs, size)
    def variant(mode, *cbs):
        model = timm.create_model(arch, num_classes=10, drop_path_rate=0.).to(device())
        return in_learner(torch.compile(model, mode=mode) if mode else model, [batch]*n, precision, *cbs)
    return {f'{mode or "eager"}, {way}': variant(mode, *cbs) for mode in (None, *modes)
            for way, cbs in (('whole', []), ('chunks', [MicroBatch(chunk)]))}

def speed_cases(quick):
    "Each variant runs so many batches a round that a round takes a tenth of a second and more"
    steps = [('convnext_small', 128, 64, 16, 'fp16', 6), ('convnext_small', 128, 64, 16, 'fp32', 6),
             ('convnext_atto', 64, 64, 16, 'fp32', 12), ('vit_small_patch16_224', 224, 256, 64, 'fp16', 4)]
    whole, modes = ('convnext_nano', 128, 64, 16, 'bf16', 8), ['default', 'reduce-overhead']
    if quick: steps, whole, modes = [('test_convnext', 32, 8, 4, 'fp32', 1)], ('test_convnext', 32, 8, 4, 'fp32', 1), []
    def case(name, make, arch, size, bs, chunk, kind, n, **kwargs):
        params = dict(arch=arch, size=size, bs=bs, chunk=chunk, precision=kind, batches=n)
        return Case(name, partial(make, arch, size, bs, chunk, precision=kind, n=n, **kwargs), params, rounds=12)
    def targets(name, runs, n): return Case(name, partial(runs, n), dict(targets=n), rounds=24)
    counts = (2,) if quick else (2, 10, 40, 100)
    return [*(case('whole batches in chunks', loops, *o) for o in steps),
            *(targets('loss', loss_runs, n) for n in counts),
            *(targets('metrics and losses', metric_runs, n) for n in counts),
            case('torch.compile', compiled, *whole, modes=modes)]

# --- what was imported ------------------------------------------------------------------------------------------------
IMPORTED = GPU/'imported_h200.json'

def options(text):
    "Arguments of a model, as 'attn_drop_rate=0.1' says them"
    return {k: float(v) for k, v in (o.split('=') for o in text.split(',') if o)}

def predict_now(rows, log=print):
    "Today's prediction of allocated and reserved memory for each of `rows`, in place; runs without a GPU"
    def learner(o):
        return tuple(o[k] for k in ('arch', 'size', 'bs', 'precision', 'optimizer', 'options'))
    for key in dict.fromkeys(map(learner, rows)):
        same, (*args, text) = [o for o in rows if learner(o) == key], key
        found = predict_memory(classifier(*args, **options(text)), [o['accum'] for o in same], valid=False)
        for o in same:
            now = found.loc[o['accum']]
            o['predicted_now'], o['reserved_now'] = int(now.total+now.workspace), int(now.reserved)
        log(f'   {same[-1]}', flush=True)

def row_a_line(result):
    "JSON as imported results keep it"
    return re.sub(r'(?<=\n  )\{[^{}]*\}', lambda o: '{'+' '.join(o[0][1:-1].split())+'}', dumps(result))

def predict_imported():
    "Put today's predictions beside what an earlier version measured on a GPU, and say which version made them"
    result = json.loads(IMPORTED.read_text())
    predict_now(result['memory'])
    today = about('gpu', None, 1, 'processor', False)
    result['about']['predicted_now'] = dict(versions=today['versions'], date=today['date'],
                                            command='python benchmarks/gpu.py --imported')
    IMPORTED.write_text(row_a_line(result), encoding='utf-8')

# --- keeping it -----------------------------------------------------------------------------------------------------
TABLES = dict(memory=memory, dense=dense, validation=validation, large=large, after_oom=after_oom, precision=precision,
              loss_launches=loss_launches)
SECTIONS = (*TABLES, 'speed')
TITLE, QUESTION = 'On a GPU', 'Does a GPU take the memory that was predicted, and what do chunks cost there?'

def driver():
    command = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
    try: return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError): return None

def card():
    "The GPU, None without one"
    if not on_gpu(): return None
    o = torch.cuda.get_device_properties(0)
    return dict(name=o.name, memory_gib=round(o.total_memory/2**30, 1), capability=f'{o.major}.{o.minor}',
                cuda=torch.version.cuda, driver=driver())

def run_section(name, quick, log=print):
    "A section as the other benchmarks keep theirs: turns for speed, rows for all else"
    if name == 'speed': res = measure('gpu', TITLE, QUESTION, speed_cases(quick), quick=quick, log=log)
    else:
        torch.set_num_threads(1)
        began = about('gpu', 0, 1, 'wall', quick)
        torch.manual_seed(0)
        res = dict(title=TITLE, question=QUESTION, about=began, rows=TABLES[name](quick))
    return {**res, 'name': name, 'about': {**res['about'], 'gpu': card()}}

def errors(result):
    if 'cases' in result: return failures(result)
    return [f'{result["name"]}: {o["error"]}' for o in result['rows'] if o.get('error')]

def main(argv=None):
    p = argparse.ArgumentParser(prog='gpu.py', description=QUESTION)
    p.add_argument('sections', nargs='*', help=f'one or more of: {", ".join(SECTIONS)}; none runs all')
    p.add_argument('--quick', action='store_true', help='small models, on the CPU where there is no GPU')
    p.add_argument('--out', type=Path, help='folder for the JSON; otherwise benchmarks/results/gpu')
    p.add_argument('--imported', action='store_true', help="predict what was imported anew; runs without a GPU")
    args = p.parse_args(argv)
    if args.imported: return predict_imported()
    if unknown := [o for o in args.sections if o not in SECTIONS]:
        p.error(f'expected sections of {list(SECTIONS)}, found {unknown}')
    if not (on_gpu() or args.quick):
        sys.exit('no GPU here: expected one that torch.cuda finds; --quick tries the script with small models')
    warnings.filterwarnings('ignore', '.*BatchNorm takes its statistics')
    failed, names = [], args.sections or SECTIONS
    for i, name in enumerate(names, 1):
        print(f'  [{i}/{len(names)}] {name}', flush=True)
        result = run_section(name, args.quick)
        save(result, args.out or (QUICK/'gpu' if args.quick else GPU))
        failed += errors(result)
    if failed: sys.exit('\n'.join(['failed:', *failed]))

if __name__ == '__main__': main()
