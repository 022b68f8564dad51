# /// script
# dependencies = ["myfm==0.4.0", "numpy==2.4.6", "scipy==1.17.1", "pandas==3.1.1"]
# ///
"myFM: Bayesian factorization machines by Gibbs sampling, for ratings"
import common
import myfm
import numpy as np
from scipy.sparse import csr_matrix, hstack

def one_hot(ids, n): return csr_matrix((np.ones(len(ids)), (np.arange(len(ids)), ids)), (len(ids), n))

def taken(rows):
    "What each user has rated, each row of length 1 (the implicit terms of SVD++)"
    x = rows.matrix('ones')
    n = np.maximum(np.diff(x.indptr), 1)
    return csr_matrix((x.data/np.repeat(np.sqrt(n), np.diff(x.indptr)), x.indices, x.indptr), x.shape)

def bayesian_fm(rows, rank, implicit):
    n_users,n_items = rows.shape
    lists = taken(rows) if implicit else None
    def coded(users, items):
        parts = [one_hot(users, n_users), one_hot(items, n_items)] + ([lists[users]] if implicit else [])
        return hstack(parts, format='csr')
    sizes = [n_users, n_items] + ([n_items] if implicit else [])
    model = myfm.MyFMRegressor(rank=rank, random_seed=0)
    model.fit(coded(rows.users, rows.items), rows.values, n_iter=100, group_shapes=sizes)
    return lambda users,items: model.predict(coded(users, items))

ratings = {'Bayesian FM (myFM)': (bayesian_fm, dict(rank=[10], implicit=[False, True]))}
if __name__ == '__main__': common.main(['myfm'], ratings=ratings)
