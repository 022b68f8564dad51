"""Seconds and bytes of which the cost of a billion interactions can be worked out: an update by ratings and by rows of
its tables and reading ratings, in processor time, and what two processes of this machine exchange, in wall time.
Ratings and ids are random numbers.
"""
import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from harness import about, digits, save_table
from torch.nn import functional as F

from collab_deep.data.loaders import RatingsDataLoaders
from collab_deep.models.dot import DotProductBias
from collab_deep.train.optimizer import fused_adamw
from paddy_multi.distributed.launch import in_processes

FACTORS = 50
UPDATES = [(rows, bs) for rows in (100_000, 1_000_000, 2_500_000) for bs in (8_192, 65_536)]
SIZES = 4, 64, 256  # MB that are exchanged at a time
REPEATS = 7


def seconds(run, repeats, clock=time.process_time):
    "Seconds of each call, after one that does not count"
    run()
    found = []
    for _ in range(repeats):
        start = clock()
        run()
        found.append(clock()-start)
    return found

def row(what, found, **sizes):
    return dict(what=what, **sizes, seconds=digits(statistics.median(found), 4), low=digits(min(found), 4),
                high=digits(max(found), 4), repeats=len(found))

def update(rows, bs, repeats):
    "An update of a model with `rows` rows of users and items"
    n_items = rows//11
    model = DotProductBias(rows-n_items, n_items, FACTORS, (0, 5.5))
    params = [*model.parameters()]
    opt = fused_adamw(model, params, lr=1e-3)
    pairs = torch.stack([torch.randint(1, n, (bs,)) for n in (rows-n_items, n_items)], 1)
    stars = torch.randint(1, 6, (bs,)).float()
    def run():
        opt.zero_grad()
        F.mse_loss(model(pairs), stars).backward()
        opt.step()
    found = seconds(run, repeats)
    state = sum(o.nbytes for s in opt.opt.state.values() for o in s.values() if o.ndim)
    return row('update', found, rows=rows, bs=bs, weight_bytes=sum(o.nbytes for o in params),
               gradient_bytes=sum(o.grad.nbytes for o in params), state_bytes=state)

def reading(n, bs, repeats):
    "An epoch's batches of `n` ratings, without training"
    g = np.random.default_rng(0)
    df = pd.DataFrame(dict(user=g.integers(0, n//50, n), item=g.integers(0, n//500, n),
                           rating=g.integers(1, 6, n).astype(np.float32)))
    dl = RatingsDataLoaders.from_df(df, valid_pct=.01, seed=0, bs=bs, device='cpu', duplicates='keep').train
    held = sum(o.nbytes for o in vars(dl.dataset).values() if isinstance(o, torch.Tensor))
    return row('reading', seconds(lambda: [None for _ in dl], repeats), ratings=len(dl.dataset), bs=bs,
               rating_bytes=digits(held/len(dl.dataset), 3))

def exchanges(sizes, repeats):
    "Seconds of sums over both processes, and of rows that go to the other and back; bytes are those of one way"
    torch.set_num_threads(1)
    dist.init_process_group('gloo')
    found = []
    for mb in sizes:
        t = torch.ones(mb*250_000)
        got = torch.empty_like(t)
        def there_and_back():
            for _ in range(2): dist.all_to_all_single(got, t)
        found += [row('sum', seconds(lambda: dist.all_reduce(t), repeats, time.perf_counter), bytes=t.nbytes),
                  row('rows there and back', seconds(there_and_back, repeats, time.perf_counter), bytes=t.nbytes//2)]
    dist.destroy_process_group()
    return found

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--quick', action='store_true', help='small sizes, to see that it runs; writes to build/benchmarks')
    p.add_argument('--out', type=Path, help='folder for the JSON')
    args = p.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    began, repeats, rows = about('collab_billion', 0, 1, 'processor', args.quick), 2 if args.quick else REPEATS, []
    def add(found):
        rows.append(found)
        print('  ', found, flush=True)
    for n, bs in [(1000, 64)] if args.quick else UPDATES: add(update(n, bs, repeats))
    add(reading(*(10_000, 64) if args.quick else (5_000_000, 65_536), repeats))
    for o in in_processes(exchanges, 2, 240, sizes=[1] if args.quick else SIZES, repeats=repeats)[0].result: add(o)
    save_table(dict(name='collab_billion', title='What a billion interactions are made of', about=began, rows=rows,
                    question='How long is an update, by ratings and by rows?'), args.out)

if __name__ == '__main__': main()
