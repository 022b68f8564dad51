"Recommenders of a few ids with random models, which no test needs to train"
import numpy as np
import torch

from collab_deep.lists.recommender import Recommender
from collab_deep.models.dot import DotProduct, DotProductBias
from collab_deep.models.factor import FactorModel
from collab_deep.models.nn import EmbeddingNN

MODELS = [lambda u, i: DotProduct(u, i, 3, std=1),
          lambda u, i: DotProductBias(u, i, 3, y_range=(0, 5.5), std=1),
          lambda u, i: EmbeddingNN(u, i, 3, layers=[4], y_range=(0, 5.5), std=1),
          lambda u, i: FactorModel(u, i, 3, mean=3., std=1)]


def table(pairs, n_users):
    "Sorted distinct pairs of indices as (starts, columns)"
    pairs = sorted(set(pairs))
    starts = np.searchsorted([u for u, _ in pairs], np.arange(n_users + 1)) if pairs else np.zeros(n_users + 1)
    return torch.tensor(starts).long(), torch.tensor([i for _, i in pairs], dtype=torch.int64)


def recommender(pairs, users, items, make=MODELS[1], seed=0):
    "A random model of these ids, in which the `pairs` of indices were rated"
    torch.manual_seed(seed)
    u, i = (torch.tensor([p[side] for p in pairs], dtype=torch.int64) for side in (0, 1))
    n_users, n_items = len(users) + 1, len(items) + 1
    classes = dict(user=['#na#', *users], title=['#na#', *items])
    counts = i.bincount(minlength=n_items), u.bincount(minlength=n_users)
    return Recommender(make(n_users, n_items), classes, 'rating', table(pairs, n_users), *counts, 3.)
