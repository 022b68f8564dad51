"Many threads read one learner, whatever its mode, and while another thread trains it"
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch

from collab_deep.data.loaders import RatingsDataLoaders
from collab_deep.lists.recommend import predict_pairs, recommend
from collab_deep.train.learner import collab_deep_learner
from collab_deep.use.explain import similar_items

KINDS = dict(nn=dict(use_nn=True, config=dict(ps=.5)), factor=dict(model='factor'), dot={})


@pytest.fixture
def many_switches():
    "Threads take turns often, as they do on a machine with many cores"
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def learner(kind, n=3000):
    r = np.random.default_rng(0)
    df = pd.DataFrame(dict(user=r.integers(1, 60, n), item=r.integers(1, 200, n), rating=r.integers(1, 6, n) + 0.))
    dls = RatingsDataLoaders.from_df(df.drop_duplicates(['user', 'item']), seed=0, bs=512, device='cpu')
    learn = collab_deep_learner(dls, 8, y_range=(0, 5.5), **KINDS[kind])
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1)
    return learn


def answers(learn, user):
    return recommend(learn, user, 5), recommend(learn, {3: 5., 9: 1.}, 3), predict_pairs(learn, user, 3), \
        similar_items(learn, 3, 4)


def equal(a, b): return all(x.equals(y) if isinstance(x, pd.DataFrame) else x == y for x,y in zip(a, b, strict=True))


@pytest.mark.parametrize('kind', KINDS)
def test_lists_of_a_learner_in_training_mode(kind, many_switches):
    learn = learner(kind)
    learn.model.train()
    users = learn.dls.classes['user'][1:9]
    wanted = {user: answers(learn, user) for user in users}
    before = {name: o.clone() for name,o in learn.model.state_dict().items()}
    with ThreadPoolExecutor(16) as pool: found = list(pool.map(lambda user: answers(learn, user), [*users]*4))
    assert all(equal(o, wanted[user]) for o,user in zip(found, [*users]*4, strict=True))
    assert learn.model.training and all(m.training for m in learn.model.modules())
    assert all(torch.equal(o, before[name]) for name,o in learn.model.state_dict().items())


@pytest.mark.parametrize('kind', KINDS)
def test_reading_while_another_thread_trains_changes_nothing(kind, many_switches):
    def trained(readers):
        torch.manual_seed(0)
        learn, errors, done = learner(kind), [], threading.Event()
        def read():
            while not done.is_set():
                try: answers(learn, 5)
                except Exception as e: errors.append(e)
        threads = [threading.Thread(target=read) for _ in range(readers)]
        for o in threads: o.start()
        try:
            torch.manual_seed(1)
            with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2)
        finally:
            done.set()
            for o in threads: o.join()
        return learn.model.state_dict(), errors
    alone, _ = trained(0)
    beside, errors = trained(3)
    assert not errors and all(torch.equal(o, beside[name]) for name,o in alone.items())
