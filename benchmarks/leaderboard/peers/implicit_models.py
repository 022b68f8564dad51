# /// script
# dependencies = ["implicit==0.7.3", "numpy==2.4.6", "scipy==1.17.1"]
# ///
"implicit: alternating least squares, BPR and item neighbours"
import common
import numpy as np
from implicit.als import AlternatingLeastSquares
from implicit.bpr import BayesianPersonalizedRanking
from implicit.nearest_neighbours import BM25Recommender, CosineRecommender

def by_factors(model, x):
    model.fit(x, show_progress=False)
    return lambda users: model.user_factors[users] @ model.item_factors.T

def als(rows, factors, reg, alpha, values):
    model = AlternatingLeastSquares(factors, regularization=reg, alpha=alpha, iterations=15, num_threads=1,
                                    random_state=0, use_gpu=False)
    return by_factors(model, rows.matrix(values).astype(np.float32))

def bpr(rows, factors, rate):
    model = BayesianPersonalizedRanking(factors, learning_rate=rate, iterations=100, num_threads=1, random_state=0,
                                        use_gpu=False)
    return by_factors(model, rows.matrix('ones').astype(np.float32))

def neighbours(rows, kind, k, values):
    x = rows.matrix(values)
    model = dict(cosine=CosineRecommender, bm25=BM25Recommender)[kind](K=k, num_threads=1)
    model.fit(x, show_progress=False)
    return lambda users: (x[users] @ model.similarity).toarray()

models = {
    'ALS (implicit)': (als, dict(factors=[32, 64], reg=[.01, .1, 1, 10], alpha=[1, 4, 16],
                                  values=['ones', 'given', 'above'])),
    'BPR (implicit)': (bpr, dict(factors=[32, 64], rate=[.01, .03])),
    'item neighbours (implicit)': (neighbours, dict(kind=['cosine', 'bm25'], k=[20, 100, 500],
                                                    values=['ones', 'given', 'above']))}
if __name__ == '__main__': common.main(['implicit'], lists=models)
