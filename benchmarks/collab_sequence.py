"""Does the order of what users took help on MovieLens-100k? SASRec beside RecTools' SASRec, EASE, a blend, popularity.

Two questions: the last film of each user, and the latest fifth of all ratings. Every held-out film is relevant,
whatever its stars. Settings of our SASRec were chosen on an inner split of the training rows, never on what is measured
here. RecTools runs in an environment of its own, by `--peer <its python>`; without it, its rows are kept as they are.
"""
import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from harness import HERE, TABLES, about, digits, save_table
from scipy.stats import t as student

from collab_deep.data.loaders import RatingsDataLoaders
from collab_deep.data.movielens import movielens_100k
from collab_deep.data.splits import LeaveLastSplitter, TimeSplitter
from collab_deep.lists.held_out import ranking_task
from collab_deep.train.fit import blend, fit_model

SPLITS = dict(last=LeaveLastSplitter, time=TimeSplitter)
PEER = 'SASRec of RecTools'

# --- measuring ------------------------------------------------------------------------------------------------------
def measured(task, lists):
    "NDCG and recall of each user"
    res = task.each(lists, ())
    return np.stack([res[o].numpy() for o in ('ndcg', 'recall')])

def interval(difference):
    "Mean and 95% interval of a difference over the same users"
    mean,n = difference.mean(),len(difference)
    half = student.ppf(.975, n - 1)*difference.std(ddof=1)/n**.5
    return [digits(float(o)) for o in (mean, mean - half, mean + half)]

def row(split, name, values, seconds, beside=None):
    "One line: the mean over users and seeds, its spread over seeds, and the difference to SASRec"
    means = np.mean(values, 2)
    res = dict(split=split, name=name, users=values[0].shape[1])
    for i,measure in enumerate(('ndcg', 'recall')):
        res |= {measure: digits(float(means[:,i].mean())),
                f'{measure} of seeds': [digits(float(o)) for o in means[:,i]]}
        if len(values) > 1: res[f'{measure}, sd'] = digits(float(means[:,i].std(ddof=1)))
    res['seconds'] = digits(float(np.mean(seconds)))
    if beside is not None: res['ndcg beside SASRec'] = interval(np.mean(values, 0)[0] - np.mean(beside, 0)[0])
    return res

# --- models ---------------------------------------------------------------------------------------------------------
def timed(make, seeds):
    "Learners by seed, and the processor seconds of each"
    learners,seconds = [],[]
    for seed in seeds:
        start = time.process_time()
        learners.append(make(seed))
        seconds.append(time.process_time() - start)
        print(f'  seed {seed}: {seconds[-1]:.0f} s', flush=True)
    return learners,seconds

def popular(task):
    counts = task.rec.item_counts.float()
    return task.lists(lambda model, rows: counts.repeat(len(rows), 1))

def ours(dls, split, seeds, config):
    "Rows of our models, and what SASRec measured"
    sequences,seconds = timed(lambda seed: fit_model(dls, 'sasrec', seed=seed, **config), seeds)
    task = ranking_task(sequences[0], 10)
    first = [measured(task, ranking_task(o, 10).lists()) for o in sequences]
    yield row(split, 'SASRec', first, seconds),first,task
    taken = dict(config=dict(strength=0))
    for name in ('ease', 'auto'):
        learners,seconds = timed(lambda seed: fit_model(dls, name, seed=seed, **taken), seeds[:1])
        found = [measured(task, ranking_task(o, 10).lists()) for o in learners]
        yield row(split, dict(ease='EASE', auto='EASE + iALS')[name], found, seconds, first),first,task
    members = learners[0].model.members
    for o in sequences: o.blended = blend_of(o, members)
    found = [measured(task, ranking_task(o.blended, 10).lists()) for o in sequences]
    yield row(split, 'SASRec + EASE + iALS', found, [0.], first),first,task
    yield row(split, 'popularity', [measured(task, popular(task))], [0.], first),first,task

def blend_of(learn, members):
    "A learner of a blend of three models, each counting the same"
    from collab_deep.models.blend import Blend
    from collab_deep.train.learner import collab_deep_learner
    return collab_deep_learner(learn.dls, model=Blend.of([learn.model, *members]))

def theirs(python, dls, task, seeds, epochs):
    "What RecTools measured by seed, and seconds of the wall clock"
    starts,rows = dls.train.dataset.in_order()
    pairs,values,seconds = dls.ratings_of('train')[0][rows].numpy(),[],[]
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            np.savez(Path(folder)/'rows.npz', users=pairs[:,0], items=pairs[:,1], asked=task.users.numpy())
            start = time.perf_counter()
            subprocess.run([python, str(HERE/'peers'/'rectools_sasrec.py'), folder, str(seed), str(epochs),
                            *map(str, SIZES)], check=True)
            seconds.append(time.perf_counter() - start)
            values.append(measured(task, torch.from_numpy(np.load(Path(folder)/'lists.npy'))))
        print(f'  {PEER}, seed {seed}: {values[-1].mean(1)}, {seconds[-1]:.0f} s', flush=True)
    return values,seconds

SIZES = 32,64,200,.4 # users in a batch, factors, longest history and dropout: those of fit_model(dls, 'sasrec')

# --- everything -----------------------------------------------------------------------------------------------------
def kept(split):
    "Rows of RecTools that are committed"
    file = TABLES/'collab_sequence.json'
    if not file.exists(): return []
    return [o for o in json.loads(file.read_text())['rows'] if o['name'] == PEER and o['split'] == split]

def main(argv=None):
    p = argparse.ArgumentParser(prog='collab_sequence.py', description='Does the order of what users took help?')
    p.add_argument('--quick', action='store_true',
                   help='one seed and few ratings, to see that it runs; writes to build/benchmarks')
    p.add_argument('--peer', help='python of an environment with what benchmarks/peers/rectools_sasrec.py names')
    p.add_argument('--split', choices=list(SPLITS), help='this question alone; the other one keeps its rows')
    p.add_argument('--seeds', type=int, default=3, help='how many')
    p.add_argument('--out', type=Path, help='folder for the JSON')
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    began = about('collab_sequence', 0, 1, 'processor', args.quick)
    ratings,seeds,epochs = movielens_100k(),range(args.seeds),20
    if args.quick: ratings,seeds,epochs = ratings[ratings.user < 100],range(1),1
    began['seeds'] = dict(training=', '.join(map(str, seeds)))
    rows = []
    for split,splitter in SPLITS.items():
        if args.split not in (None, split):
            rows += [o for o in json.loads((TABLES/'collab_sequence.json').read_text())['rows'] if o['split'] == split]
            continue
        print(split, flush=True)
        dls = RatingsDataLoaders.from_df(ratings, splits=splitter(), time_name='timestamp', device='cpu')
        for line,first,task in ours(dls, split, seeds, dict(epochs=epochs)):
            print(line, flush=True)
            rows.append(line)
        if args.peer: rows.append(row(split, PEER, *theirs(args.peer, dls, task, seeds, epochs), first))
        else: rows += [] if args.quick else kept(split)
    save_table(dict(name='collab_sequence', title='The order of what users took', about=began, rows=rows,
                    question='Does the order of what users took help?'), args.out)

if __name__ == '__main__': main()
