"""What it takes to load ratings from Parquet and to train an epoch, each size in a process of its own.

The ratings are synthetic: users and items drawn at random, popular ones more often, five stars. Files are written
before, a part at a time, into a folder for temporary files. Memory is what a process had at its peak beyond its
imports, with glibc's threshold for memory that is given back fixed at a megabyte: by default it grows, and what a step
frees of its gradients, which are as large as the model's tables, piles up beside the rows that are measured here.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from harness import about, digits, save_table

SIZES = 2_000_000,5_000_000,20_000_000,100_000_000
BY_FRAME = 2_000_000,20_000_000  # sizes that are also loaded by from_df

# --- the file -------------------------------------------------------------------------------------------------------
def write(path, n, part=1_000_000):
    "Synthetic ratings: users grow with the rows, 30,000 items"
    rng,n_users = np.random.default_rng(0),max(1000, n//150)
    schema = pa.schema([('user', pa.int64()), ('item', pa.int32()), ('rating', pa.float32())])
    with pq.ParquetWriter(path, schema) as out:
        for start in range(0, n, part):
            m = min(part, n - start)
            columns = [(n_users*rng.random(m)**1.5).astype(np.int64), (30_000*rng.random(m)**3).astype(np.int32),
                       rng.integers(1, 6, m).astype(np.float32)]
            out.write_table(pa.table(columns, schema=schema))

# --- one process ----------------------------------------------------------------------------------------------------
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024

def measured(path, way):
    "Load and train one epoch of `DotProductBias` with 16 factors in this process"
    import pandas as pd
    import torch

    from collab_deep.data import out_of_core  # noqa: F401, which gives the loaders from_parquet
    from collab_deep.data.loaders import RatingsDataLoaders
    from collab_deep.train.learner import collab_deep_learner
    torch.set_num_threads(1)
    args = dict(valid_pct=.05, seed=0, bs=8192, duplicates='keep', device='cpu')
    before,start = peak(),time.process_time()
    if way == 'from_parquet': dls = RatingsDataLoaders.from_parquet(path, **args)
    else: dls = RatingsDataLoaders.from_df(pd.read_parquet(path), **args)
    loaded,load = peak(),time.process_time() - start
    learn = collab_deep_learner(dls, 16)
    start = time.process_time()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1)
    return dict(load_seconds=digits(load, 3), epoch_seconds=digits(time.process_time() - start, 3),
                before_mb=round(before/1e6), load_mb=round((loaded - before)/1e6),
                epoch_mb=round((peak() - before)/1e6))

def in_process(path, way):
    env = os.environ | dict(MALLOC_MMAP_THRESHOLD_='1000000')
    done = subprocess.run([sys.executable, __file__, '--one', path, way], stdout=subprocess.PIPE, text=True, check=True,
                          env=env)
    return json.loads(done.stdout.strip().splitlines()[-1])

def main(argv=None):
    p = argparse.ArgumentParser(prog='collab_parquet.py', description='What do ratings from Parquet take?')
    p.add_argument('--quick', action='store_true', help='few rows, to see that it runs; writes to build/benchmarks')
    p.add_argument('--out', type=Path, help='folder for the JSON')
    p.add_argument('--one', nargs=2, help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.one: return print(json.dumps(measured(*args.one)))
    began,rows = about('collab_parquet', 0, 1, 'processor', args.quick),[]
    for n in [20_000] if args.quick else SIZES:
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder)/'ratings.parquet')
            write(path, n)
            for way in ['from_parquet'] + ['from_df']*(args.quick or n in BY_FRAME):
                rows.append(dict(rows=n, way=way, file_mb=round(Path(path).stat().st_size/1e6),
                                 **in_process(path, way)))
                print(rows[-1], flush=True)
    save_table(dict(name='collab_parquet', title='Ratings from Parquet', about=began, rows=rows,
                    goal=dict(rows=20_000_000, epoch_mb=1000), question='What do ratings from Parquet take?'), args.out)

if __name__ == '__main__': main()
