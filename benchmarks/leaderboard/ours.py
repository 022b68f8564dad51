"Our models as a user gets them: by name, with the settings that they choose from the training rows by themselves"
import time

import torch

from collab_deep.data.loaders import RatingsDataLoaders
from collab_deep.lists.evaluate import evaluate_ranking
from collab_deep.lists.held_out import ranking_task
from collab_deep.train.ensemble import collab_ensemble
from collab_deep.train.fit import fit_model

LISTS = {'auto (ours)': 'auto', 'EASE (ours)': 'ease', 'iALS (ours)': 'ials', 'softmax (ours)': 'softmax'}
RATINGS = {'DotProductBias (ours)': 'dot', 'FactorModel (ours)': 'factor'}

def loaders(df, splits, **more):
    rated = dict(rating_name='rating') if 'rating' in df else dict(weight_name='weight')
    return RatingsDataLoaders.from_df(df, user_name='user', item_name='item', **rated, splits=splits,
                                      duplicates='keep', device='cpu', **more)

def fitted(dls, name):
    start = time.process_time()
    learn = fit_model(dls, name)
    return learn,time.process_time() - start

def list_answers(dls, liked, k, users, items):
    "Lists of our models with popularity, by the numbers `users` and `items` of the whole table; and seconds of each"
    for name,model in LISTS.items():
        learn,seconds = fitted(dls, model)
        task = ranking_task(learn, k, liked)
        value = evaluate_ranking(learn, k, liked).value['ndcg']
        yield name,numbered(task, task.lists(), users, items),seconds,dict(ndcg=value)

def numbered(task, lists, users, items):
    "Lists by the number of each user, items by their numbers and -1 where a list has ended"
    number = torch.tensor([-1, *(items[o] for o in task.rec.items[1:])])
    return {users[task.rec.users[u]]: row.tolist() for u,row in zip(task.users.tolist(), number[lists])}

def rating_answers(dls):
    "Predictions for the held-out rows, in their order, and seconds of each model"
    for name,model in RATINGS.items():
        learn,seconds = fitted(dls, model)
        yield name,predicted(learn, dls),seconds

def predicted(learn, dls):
    x,_ = dls.ratings_of('valid')
    with torch.no_grad(): return learn.model.eval()(x).clamp(dls.y_min, dls.y_max).double().numpy()
