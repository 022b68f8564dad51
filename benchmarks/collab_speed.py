"""How fast an epoch of `DotProductBias` is through fastai's Learner, beside fastai's own `collab_learner`.

Both train 80,000 ratings of MovieLens-100k and validate on 20,000, on one thread. fastai is given `TabDataLoader`,
since its default loader draws with replacement and shows an epoch only 63% of the ratings. Our learner takes batches of
512 with rate and decay scaled, which end at the same error (collab_quality.py); with batches of 64 it takes the same
steps as fastai.
"""
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.tabular.core import TabDataLoader
from harness import Case, Variant, main

from collab_deep.data.movielens import movielens_100k
from collab_deep.train.learner import collab_deep_learner
from collab_deep.data.loaders import RatingsDataLoaders

STARS = (0, 5.5)

def epoch(learn):
    "One epoch of training and validation"
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1)
    return learn

def error(learn): return dict(valid_mse=float(learn.recorder.values[-1][1]))

def variants(ratings):
    def fastai():
        dls = CollabDataLoaders.from_df(ratings, item_name='title', rating_name='rating', bs=64, seed=42,
                                        dl_type=TabDataLoader)
        return collab_learner(dls, n_factors=50, y_range=STARS, lr=5e-3, wd=.1)
    def ours(bs):
        dls = RatingsDataLoaders.from_df(ratings, item_name='title', duplicates='keep',
                                         bs=bs, seed=42)
        return collab_deep_learner(dls, n_factors=50, y_range=STARS)
    return {'fastai, TabDataLoader': Variant(epoch, fastai, error),
            'ours, batches of 64': Variant(epoch, lambda: ours(64), error),
            'ours, batches of 512': Variant(epoch, lambda: ours(512), error)}

def cases(quick):
    ratings = movielens_100k()
    if quick: ratings = ratings.sample(1500, random_state=0)
    return [Case('epoch of MovieLens-100k', lambda: variants(ratings), rounds=8)]

if __name__ == '__main__':
    main('collab_speed', 'Training on ratings', 'How long is an epoch, beside collab_learner of fastai?', cases,
         clock='processor')
