"Seconds and memory as ratings grow from 100 thousand to 10 million: synthetic, each size in a process of its own"
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

# users, items, batch; as in MovieLens
SIZES = {100_000: (943, 1_682, 512), 1_000_000: (6_040, 3_706, 2048), 10_000_000: (69_878, 10_677, 8192)}
QUICK_SIZES = {1_000: (50, 40, 128)}

def peak_mb():
    "Largest resident memory of this process so far, in 10^6 bytes"
    return int(next(o for o in open('/proc/self/status') if o.startswith('VmHWM')).split()[1])*1024/1e6

def synthetic(n, n_users, n_items):
    "Ratings of random factors, users and items drawn with a long tail"
    import numpy as np, pandas as pd
    rng = np.random.default_rng(0)
    users,items = ((rng.random(n, dtype=np.float32)**1.7*m).astype(np.int32) for m in (n_users, n_items))
    p,q = (rng.normal(0, .7, (m, 4)).astype(np.float32) for m in (n_users, n_items))
    stars = np.full(n, 3.5, np.float32)
    for f in range(4): stars += p[users, f]*q[items, f]
    return pd.DataFrame(dict(user=users, item=items, rating=np.clip(np.round(stars), 1, 5)))

def one(n, n_users, n_items, bs):
    "Processor seconds to load and for an epoch, and peak memory, of `n` ratings"
    import torch
    torch.set_num_threads(1)
    from collab_deep.train.learner import collab_deep_learner
    from collab_deep.data.loaders import RatingsDataLoaders
    torch.optim.AdamW([torch.zeros(1)])  # the first optimizer imports what takes 150 MB
    imports = peak_mb()
    ratings = synthetic(n, n_users, n_items)
    made,start = peak_mb(),time.process_time()
    dls = RatingsDataLoaders.from_df(ratings, seed=0, bs=bs, device='cpu', duplicates='keep')
    del ratings
    loaded = time.process_time()
    learn = collab_deep_learner(dls, n_factors=50, y_range=(0, 5.5))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1)
    trained,valid_mse = time.process_time(),float(learn.recorder.values[-1][1])
    return dict(ratings=n, users=n_users, items=n_items, bs=bs,
                load_seconds=round(loaded-start, 3), epoch_seconds=round(trained-loaded, 2),
                peak_mb=round(peak_mb()), before_any_rating_mb=round(imports), with_the_frame_mb=round(made),
                valid_mse=round(valid_mse, 4))

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--one', type=int, nargs=4, metavar=('RATINGS', 'USERS', 'ITEMS', 'BATCH'),
                   help='measure one size in this process and print it')
    p.add_argument('--quick', action='store_true', help='a small size, to see that it runs; writes to build/benchmarks')
    p.add_argument('--out', type=Path, help='folder for the JSON')
    args = p.parse_args()
    if args.one: return print(json.dumps(one(*args.one)))
    from harness import about, save_table
    began,rows = about('collab_growth', 0, 1, 'processor', args.quick),[]
    for n,rest in (QUICK_SIZES if args.quick else SIZES).items():
        command = [sys.executable, '-W', 'ignore', __file__, '--one', *map(str, (n, *rest))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print('  ', {k: rows[-1][k] for k in ('ratings', 'load_seconds', 'epoch_seconds', 'peak_mb')}, flush=True)
    save_table(dict(name='collab_growth', title='Growth with ratings', about=began, rows=rows,
                    question='Do time and memory grow in proportion to the ratings?'), args.out)

if __name__ == '__main__': main()
