"""How many of the best items an index finds, and how long a list takes, beside scoring all items.

Factors of MovieLens-100k are real, those of the large table are random numbers, in which nothing is near anything: the
hardest case for an index. `hnswlib`, another library for the same kind of index, is measured where it is installed.
"""
import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from collab_deep.data.loaders import RatingsDataLoaders
from collab_deep.data.movielens import movielens_100k
from collab_deep.lists.recommend import recommend
from collab_deep.lists.recommender import Recommender, as_recommender
from collab_deep.models.dot import DotProductBias
from collab_deep.train.fit import fit_model
from collab_deep.use.index import item_vectors, search, to_index, user_vectors

EFS, K = (64, 128, 256, 512), 10

def synthetic(n_items, n_users=201, n_factors=64):
    "A recommender of random factors, in which nobody has seen anything"
    torch.manual_seed(0)
    model = DotProductBias(n_users, n_items, n_factors, std=1.).eval()
    model.fill_unknown()
    classes = dict(user=['#na#', *range(1, n_users)], item=['#na#', *range(1, n_items)])
    none = torch.zeros(0, dtype=torch.int64)
    counts = torch.zeros(n_items, dtype=torch.int64), torch.zeros(n_users, dtype=torch.int64)
    return Recommender(model, classes, 'rating', (torch.zeros(n_users + 1, dtype=torch.int64), none), *counts, 0.)

def movielens():
    "A factor model of MovieLens-100k, without its sums over lists"
    dls = RatingsDataLoaders.from_df(movielens_100k(), item_name='title', duplicates='keep', seed=0, device='cpu')
    return as_recommender(fit_model(dls, 'dot', seed=0))

def lists_and_ms(give, users):
    "What `give` gives for each user, and the median milliseconds of the processor"
    lists, ms = [], []
    for o in users:
        start = time.process_time()
        lists.append(give(o))
        ms.append(1000*(time.process_time() - start))
    return lists, statistics.median(ms)

def recall(found, exact): return float(np.mean([len({*a} & {*b})/len(b) for a, b in zip(found, exact)]))

def hnswlib_rows(name, vectors, queries, threads):
    "The same with hnswlib, items alone: no list is made of what it finds"
    try: import hnswlib
    except ImportError: return []
    exact = [np.argsort(-(vectors[1:] @ q))[:K] + 1 for q in queries]
    peer = hnswlib.Index('ip', vectors.shape[1])
    peer.init_index(len(vectors), M=16, ef_construction=128, random_seed=0)
    start = time.process_time()
    peer.add_items(vectors[1:], np.arange(1, len(vectors)), num_threads=threads)
    built, rows = time.process_time() - start, []
    for ef in EFS:
        peer.set_ef(ef)
        found, ms = lists_and_ms(lambda q: peer.knn_query(q, K, num_threads=1)[0][0], queries)
        rows.append(dict(factors=name, engine='hnswlib, search alone', ef=ef, recall=round(recall(found, exact), 4),
                         ms=round(ms, 3), build_seconds=round(built, 1)))
    return rows

def measured(name, rec, threads=2, n_users=200):
    users = list(rec.users[1:n_users+1])
    exact, exact_ms = lists_and_ms(lambda o: recommend(rec, o, K)['item'].tolist(), users)
    rows = [dict(factors=name, engine='recommend, all items', ef=None, recall=1., ms=round(exact_ms, 3),
                 build_seconds=0.)]
    start = time.process_time()
    index = to_index(rec, threads=threads)
    built = time.process_time() - start
    for ef in EFS:
        index.index.expansion_search = ef
        found, ms = lists_and_ms(lambda o: search(index, o, K)['item'].tolist(), users)
        rows.append(dict(factors=name, engine='search', ef=ef, recall=round(recall(found, exact), 4), ms=round(ms, 3),
                         build_seconds=round(built, 1)))
    with rec.model.scoring() as model:
        vectors = item_vectors(model).numpy()
        queries = user_vectors(model, torch.arange(1, len(users) + 1)).numpy()
    rows += hnswlib_rows(name, vectors, queries, threads)
    for o in rows: print('  ', o, flush=True)
    return rows

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--quick', action='store_true',
                   help='a small table, to see that it runs; writes to build/benchmarks')
    p.add_argument('--items', type=int, default=200_000, help='items of the synthetic table')
    p.add_argument('--out', type=Path, help='folder for the JSON')
    args = p.parse_args()
    from harness import about, save_table
    torch.set_num_threads(1)
    n = 2000 if args.quick else args.items
    began = about('collab_index', 0, 1, 'processor', args.quick)
    rows = measured(f'synthetic, {n:,} items x 64', synthetic(n + 1))
    if not args.quick: rows = measured('MovieLens-100k, 50 factors', movielens()) + rows
    save_table(dict(name='collab_index', title='Search among many items', about=began, rows=rows,
                    question='How many of the 10 best items does an index find, in which time?'), args.out)

if __name__ == '__main__': main()
