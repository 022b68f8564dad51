"Loaders that draw, sort or count by themselves in two processes: the updates of one; and those that are refused"
import os
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.basics import DataLoaders, Learner, SGD, TfmdDL
from fastai.callback.data import PartialDL, WeightedDL
from fastai.data.core import Datasets
from fastai.tabular.core import TabularPandas
from fastai.text.data import LMDataLoader, SortedDL
from torch import nn

from paddy_multi.distributed.launch import in_processes
from paddy_multi.distributed.preconditions import check_items
from paddy_multi.distributed.ranks import join_processes
from paddy_multi.distributed.shares import ShareDL
from spread import Rows, SeenLosses, compare, cross_entropy, data, learner


class Texts:
    "Synthetic texts of several lengths, of two classes"
    def __init__(self, n):
        g = np.random.default_rng(0)
        self.items = [torch.tensor(g.integers(2, 50, k)) for k in g.integers(3, 20, n)]
    def __len__(self): return len(self.items)
    def __getitem__(self, i): return self.items[i], (self.items[i] > 25).double().mean().gt(.5).long()


def padded(rows):
    longest = max(len(x) for x, _ in rows)
    return [(F.pad(x, (0, longest-len(x)), value=1), y) for x, y in rows]


class Words(nn.Module):
    "The mean of the words of a text that are no padding"
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.out = nn.Embedding(50, 8).double(), nn.Linear(8, 2).double()

    def forward(self, x):
        there = (x != 1)[..., None]
        return self.out((self.embed(x)*there).sum(1)/there.sum(1))


def text_learner(bs):
    dl = partial(SortedDL, Texts(101), bs=bs, num_workers=0, before_batch=padded)
    dls = DataLoaders(dl(shuffle=True, drop_last=True), dl(), device='cpu')
    dls.n_inp = 1
    return Learner(dls, Words(), loss_func=F.cross_entropy, opt_func=SGD, lr=.05, cbs=SeenLosses())


class OwnGenerator(TfmdDL):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.drawn = np.random.default_rng(0)
    def get_idxs(self): return iter(self.drawn.permutation(self.n))


class Curriculum(TfmdDL):
    "20 items more each epoch"
    asked = 0
    def get_idxs(self):
        self.asked += 1
        return [*range(min(self.n, 20*self.asked))]


LOADERS = dict(own_generator=OwnGenerator, curriculum=Curriculum, part=partial(PartialDL, partial_n=41),
               weighted=partial(WeightedDL, wgts=np.arange(1., 82), shuffle=True))


def made(name, bs):
    if name == 'text': return text_learner(bs)
    learn = learner(bs, cross_entropy)
    learn.dls.loaders[0] = LOADERS[name](Rows(*data(81)), bs=bs, num_workers=0, device='cpu')
    return learn


def fit(learn):
    np.random.seed(7 + int(os.environ.get('RANK', 0)))  # the order is that of process 0
    learn.fit_one_cycle(4, .05)


# --- what is refused ------------------------------------------------------------------------------------------------
class Half(TfmdDL):
    def sample(self): return iter(range(0, self.n, 2))


class Streams(LMDataLoader): pass


class Backwards(TfmdDL):
    def create_batches(self, samps): return super().create_batches([*samps][::-1])


def tables(rank):
    "Loaders of this process, of which the first alone is that of the others"
    cells = [[[1], [2]], [[1], [2+rank]]]
    frames = [pd.DataFrame(dict(a=[1., 2.], b=[{'x', 'y', 'z'}]*2)), pd.DataFrame(dict(a=[1., 2.+rank])),
              *(pd.DataFrame(dict(a=o)) for o in cells[1:])]
    res = [Datasets(o) for o in frames]
    res.append(TabularPandas(frames[1], cont_names='a', y_names=[]))
    return [TfmdDL(o, bs=1, num_workers=0) for o in res]


def said(f):
    try: return f()
    except ValueError as e: return str(e)


def run(names):
    ranks = join_processes(60)
    found = {name: compare(made(name, 8), made(name, 16), fit) for name in names}
    rows = [*range(12)]
    loaders = [Half(rows, bs=2), Backwards(rows, bs=2), TfmdDL(rows, bs=2, sample=lambda: iter(rows)),
               Streams([(torch.arange(50),)], lens=[50], bs=2, seq_len=5)]
    refused = [said(lambda: ShareDL(o, ranks)) for o in loaders]
    return dict(found=found, refused=refused, items=[said(lambda: check_items(o, ranks)) for o in tables(ranks.rank)])


# --- tests ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def two(): return [o.result for o in in_processes(run, 2, 100, names=['text', *LOADERS])]


@pytest.mark.parametrize('name', ['text', *LOADERS])
def test_updates_of_two_processes_are_those_of_one(two, name):
    first, second = (o['found'][name] for o in two)
    assert first['numbers'] == second['numbers'] and first['moved'] > .01 and first['nan']
    assert first['weights'] < 1e-10 and first['losses'] < 1e-10 and first['schedule'] == 0.
    assert first['metrics'] < 1e-6
    # 4 epochs of 101 texts in whole batches of 16; of 81 rows; of 20, 40, 60 and 80; of 41
    assert first['updates'] == dict(text=4*6, own_generator=4*6, curriculum=2+3+4+5, part=4*3, weighted=4*6)[name]


def test_loaders_that_take_their_items_elsewhere_are_refused(two):
    own = ('expected a loader whose get_idxs alone says what is in its batches, found {} with its own {}, which '
           'several processes cannot share: give the order by get_idxs, or add batch_sizes(n, bs) and '
           'batches_of(numbers), or train in one process')
    streams = ('Streams cuts a text into bs streams, and each process would read others: train language models in one '
               'process, or give rows of one length to a TfmdDL')
    for o in two:
        assert o['refused'] == [own.format('Half', 'sample'), own.format('Backwards', 'create_batches'),
                                own.format('TfmdDL', 'sample'), streams]


def test_tables_with_other_values_are_refused_in_all_processes(two):
    for o in two:
        alike, *differ = o['items']
        assert alike is None and len(differ) == 3
        for text in differ:
            assert text.startswith('the processes differ in the items of a loader: process 0 ')
            assert text.endswith('Build the data alike in all of them, with a fixed seed for a random split')
    assert two[0]['items'] == two[1]['items']
