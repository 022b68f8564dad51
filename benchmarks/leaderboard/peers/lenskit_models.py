# /// script
# dependencies = ["lenskit==2025.8.1", "numpy==2.4.6", "scipy==1.17.1", "pandas==2.3.3"]
# ///
"LensKit: implicit and biased matrix factorization, and item neighbours"
import logging

import common
import numpy as np
import pandas as pd
from lenskit import predict, recommend
from lenskit.als import BiasedMFScorer, ImplicitMFScorer
from lenskit.data import ItemList, from_interactions_df
from lenskit.knn import ItemKNNScorer
from lenskit.pipeline import predict_pipeline, topn_pipeline

logging.disable(logging.WARNING)

def dataset(rows, rated):
    x = rows.matrix().tocoo()
    df = pd.DataFrame(dict(user_id=x.row, item_id=x.col))
    if rated: df['rating'] = x.data
    return from_interactions_df(df)

def listed(pipeline, users, n_items):
    "Lists as scores: places from the top, so that the same lines measure all; LensKit leaves out what was seen"
    scores = np.full((len(users), n_items), -np.inf)
    for i,user in enumerate(users):
        items = recommend(pipeline, int(user), common.K).ids()
        scores[i, items] = -np.arange(len(items))
    return scores

def for_lists(scorer, rows, rated, **config):
    pipeline = topn_pipeline(scorer(**config), n=common.K)
    pipeline.train(dataset(rows, rated))
    return lambda users: listed(pipeline, users, rows.shape[1])

def implicit_mf(rows, size, reg, weight, use_ratings):
    return for_lists(ImplicitMFScorer, rows, use_ratings, embedding_size=size, regularization=reg, weight=weight,
                     use_ratings=use_ratings)

def item_knn(rows, k): return for_lists(ItemKNNScorer, rows, False, max_nbrs=k, feedback='implicit')

def biased_mf(rows, size, reg, damping):
    pipeline = predict_pipeline(BiasedMFScorer(embedding_size=size, regularization=reg, damping=damping))
    pipeline.train(dataset(rows, True))
    mean = rows.values.mean()
    def predicted(users, items):
        res = np.full(len(users), mean)
        for user in np.unique(users):
            at = np.flatnonzero(users == user)
            each,where = np.unique(items[at], return_inverse=True)
            found = predict(pipeline, int(user), ItemList(item_ids=each)).scores()[where]
            res[at] = np.where(np.isfinite(found), found, mean)
        return res
    return predicted

lists = {'iALS (LensKit)': (implicit_mf, dict(size=[32, 64], reg=[.1, 1.], weight=[10, 40],
                                              use_ratings=[False, True])),
         'item neighbours (LensKit)': (item_knn, dict(k=[20, 100]))}
ratings = {'BiasedMF (LensKit)': (biased_mf, dict(size=[20, 50], reg=[.1, .3], damping=[5, 20]))}
if __name__ == '__main__': common.main(['lenskit'], lists=lists, ratings=ratings)
