# /// script
# dependencies = ["scikit-surprise==1.1.5", "numpy==2.4.6", "scipy==1.17.1", "pandas==2.3.3"]
# ///
"Surprise: SVD and item neighbours with baselines, for ratings"
import common
import numpy as np
import pandas as pd
from surprise import SVD, Dataset, KNNBaseline, Reader

def trained(model, rows):
    df = pd.DataFrame(dict(user=rows.users, item=rows.items, rating=rows.values))
    reader = Reader(rating_scale=(rows.values.min(), rows.values.max()))
    model.fit(Dataset.load_from_df(df, reader).build_full_trainset())
    return lambda users,items: np.array([model.predict(u, i).est for u,i in zip(users, items)])

def svd(rows, n_factors, n_epochs, reg_all, lr_all):
    return trained(SVD(n_factors=n_factors, n_epochs=n_epochs, reg_all=reg_all, lr_all=lr_all, random_state=0), rows)

def knn(rows, k):
    similarity = dict(name='pearson_baseline', user_based=False)
    return trained(KNNBaseline(k=k, sim_options=similarity, verbose=False), rows)

ratings = {'SVD (Surprise)': (svd, dict(n_factors=[50, 100], n_epochs=[20, 60], reg_all=[.02, .1],
                                        lr_all=[.005, .01])),
           'item neighbours (Surprise)': (knn, dict(k=[20, 60]))}
if __name__ == '__main__': common.main(['scikit-surprise'], ratings=ratings)
