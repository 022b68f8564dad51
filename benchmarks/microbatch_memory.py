"""Peak memory with and without chunks, measured and predicted: each case in a process of its own, without a GPU.

The learner is the one that fastai makes: a ConvNeXt body and a head with BatchNorm, unfrozen, Adam. Images are random
numbers. What a process grew by holds more than tensors: what the allocator keeps, and a library's working memory.
"""
import argparse
from pathlib import Path

import torch
from harness import about, digits, save_table

from paddy_multi.accumulate.benchmark import benchmark_accumulation

TARGET = .15  # of the measured ratio of memory, how far the predicted one may be off

def maker(arch, size, bs):
    "A function for a fresh process, which makes the learner there"
    def make_learner():
        import warnings
        import torch
        from fastai.data.core import DataLoaders
        from fastai.data.load import DataLoader
        from fastai.losses import CrossEntropyLossFlat
        from fastai.vision.learner import vision_learner
        warnings.simplefilter('ignore')
        items = [(torch.randn(3, size, size), torch.tensor(i % 10)) for i in range(bs)]
        dls = DataLoaders(*[DataLoader(items, bs=bs, num_workers=0)]*2)
        learn = vision_learner(dls, arch, pretrained=False, normalize=False, n_out=10, loss_func=CrossEntropyLossFlat())
        learn.unfreeze()
        return learn
    return make_learner

def measured(make_learner, accums, **kwargs):
    "Memory and speed of each number of chunks, `ValueError` for a case without them"
    bench = benchmark_accumulation(make_learner, accums, warmup=1, exact=False, **kwargs)
    failed = [o for o in bench.rows if o['status'] != 'ok']
    if failed: raise ValueError(f'no measurement: {failed}')
    return bench.rows

def row(o, whole, whole_head):
    "Megabytes of a case, and what part of the whole batch's they are"
    ours, expected = o['memory']/whole['memory'], o['predicted']/whole['predicted']
    return dict(accum=o['accum'], whole_head=whole_head, items=o['items'],
                measured_mb=round(o['memory']/1e6), predicted_mb=round(o['predicted']/1e6),
                measured_ratio=digits(ours, 3), predicted_ratio=digits(expected, 3),
                predicted_over_measured=digits(expected/ours, 3), items_per_second=digits(o['speed'], 3),
                met=None if o is whole or whole_head else abs(expected/ours-1) <= TARGET)

def main(argv=None):
    question = 'Does accumulation save as much memory as predicted?'
    p = argparse.ArgumentParser(prog='microbatch_memory.py', description=question)
    p.add_argument('--quick', action='store_true',
                   help='a small model in small batches, to see that it runs; writes to build/benchmarks')
    p.add_argument('--out', type=Path, help='folder for the JSON')
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    arch, size, bs, accums, updates = 'convnext_small', 128, 64, (1, 4), 2
    if args.quick: arch, size, bs, accums, updates = 'test_convnext', 32, 8, (1,), 1
    began = about('microbatch_memory', 0, 1, 'wall', args.quick)
    make_learner = maker(arch, size, bs)
    rows = measured(make_learner, accums, updates=updates)
    heads = [] if args.quick else measured(make_learner, accums[1:], updates=updates, whole_head=True)
    table = [*(row(o, rows[0], False) for o in rows), *(row(o, rows[0], True) for o in heads)]
    save_table(dict(name='microbatch_memory', title='Memory of whole batches in chunks',
                    question=question, about=began,
                    model=f'{arch}, {size} px, batches of {bs}', target=TARGET, rows=table), args.out)
    for o in table:
        head = ', whole head' if o['whole_head'] else ''
        print(f'accum {o["accum"]}{head}: {o["measured_mb"]} MB, ratio {o["measured_ratio"]} '
              f'(predicted {o["predicted_ratio"]})')

if __name__ == '__main__': main()
