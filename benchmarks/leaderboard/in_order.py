"""Does the order of what users took help? SASRec beside RecTools' SASRec, and beside models that read no order.

MovieLens-100k by title, asked two ways: the last film of each user, and the latest fifth of all ratings. All held-out
films are relevant, whatever their stars. `make leaderboard` runs it after the other boards.
"""
import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from fastai.torch_core import set_seed

import measure # which makes the folders of these scripts known
import ours
from collab_deep.data.splits import TimeSplitter
from collab_deep.lists.held_out import ranking_task
from collab_deep.models.blend import Blend
from collab_deep.train.fit import fit_model
from collab_deep.train.learner import collab_deep_learner
from harness import digits, save_table
from sets import RatingSet, last_of_each, movielens

PEER = Path(__file__).resolve().parent/'peers'/'in_order'/'rectools_models.py'
SETS = [RatingSet('the last film of each user', 'recbole', movielens, split=last_of_each),
        RatingSet('the latest fifth of all ratings', 'recbole', movielens, split=TimeSplitter())]

# --- the task -------------------------------------------------------------------------------------------------------
def write_task(measured, folder, seeds):
    "Training rows in order, and those of them that the same kind of split holds out"
    df = measured.df.iloc[measured.train].reset_index(drop=True)
    held = np.zeros(len(df), bool)
    held[measured.set.split(df)[1]] = True
    order = np.argsort(df.timestamp.to_numpy(), kind='stable')
    rows = measured.training.where(order)
    np.savez(folder/'task.npz', users=rows.users, items=rows.items, shape=rows.shape, held=held[order],
             list_users=measured.list_users, seeds=seeds)

def of_peer(measured, seeds):
    "Lists of each seed, and what RecTools says of them"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_task(measured, folder, seeds)
        return next(measure.answers_in(folder, [PEER], 'in order'))

# --- ours -----------------------------------------------------------------------------------------------------------
def timed(dls, name, seeds):
    "Learners by seed, and the mean of their processor seconds"
    start = time.process_time()
    learners = [fit_model(dls, name, seed=seed) for seed in seeds]
    return learners,(time.process_time() - start)/len(learners)

def blended(learn, others):
    "A learner of a blend in which all models count the same"
    set_seed(0)
    return collab_deep_learner(learn.dls, model=Blend.of([learn.model, *others]))

def of_ours(measured, seeds):
    "Names, lists of each seed, and seconds"
    dls = ours.loaders(measured.df, (measured.train, measured.test), time_name='timestamp')
    def lists(learn):
        task = ranking_task(learn, measure.common.K, None)
        found = ours.numbered(task, task.lists(), measured.users, measured.items)
        return np.array([found[u] for u in measured.list_users])
    solved = {}
    for name,model in {'EASE (ours)': 'ease', 'auto (ours)': 'auto'}.items():
        solved[model],seconds = timed(dls, model, seeds[:1])
        yield name,[lists(o) for o in solved[model]],seconds
    learners,seconds = timed(dls, 'sasrec', seeds)
    yield 'SASRec (ours)',[lists(o) for o in learners],seconds
    members = solved['auto'][0].model.members
    yield 'SASRec + EASE + iALS (ours)',[lists(blended(o, members)) for o in learners],seconds

# --- the board ------------------------------------------------------------------------------------------------------
def board(chosen, seeds, n_rows):
    measured = measure.Measured(chosen, n_rows)
    rows,values = [],{}
    def add(name, lists, seconds, is_ours, **more):
        of_seeds = [measure.list_values(measured, o) for o in lists]
        values[name] = np.mean([o['ndcg'] for o in of_seeds], 0)
        means = {f'{o}@10': digits(np.mean([v[o] for v in of_seeds])) for o in of_seeds[0]}
        each = {'ndcg@10 of seeds': [digits(v['ndcg'].mean()) for v in of_seeds]}
        rows.append(measure.row_of(name, seconds, is_ours, **means, **each, **more))
    add('popularity', [measure.popular(measured)], 0., False)
    for name,lists,seconds in of_ours(measured, seeds): add(name, lists, seconds, True)
    name,lists,said = of_peer(measured, seeds)
    add(name, lists, said['seconds']/len(seeds), False, **measure.of_peer(said))
    return dict(set=chosen.name, source=chosen.source, users=len(measured.list_users), measure='ndcg@10',
                training_rows=len(measured.train), held_out_rows=len(measured.test),
                rows=measure.compared(rows, values, True))

def main(argv=None):
    p = argparse.ArgumentParser(prog='in_order.py', description='Does the order of what users took help?')
    p.add_argument('--quick', action='store_true', help='few rows, to see that it runs; writes to build/benchmarks')
    p.add_argument('--out', type=Path, help='folder for the JSON')
    args = p.parse_args(argv)
    seeds = list(range(1 if args.quick else 3))
    began = measure.about('in_order', seeds, 1, 'processor', args.quick) | dict(command='make leaderboard')
    found = []
    for chosen in SETS:
        print(chosen.name, flush=True)
        found.append(board(chosen, seeds, 3000 if args.quick else None))
        measure.show(found[-1])
    save_table(dict(name='in_order', title='What comes next', about=began, sets=found,
                    question='Does the order of what users took help?'), measure.out_of(args))

if __name__ == '__main__': main()
