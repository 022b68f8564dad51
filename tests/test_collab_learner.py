"The learner: steps and losses against plain PyTorch, sampling, stopping, and the faults of fastai's own learner"
import math
import os
import re
import subprocess
import sys
from importlib import import_module

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from collab_deep.data.loaders import RatingsDataLoaders
from collab_deep.data.splits import GroupSplitter
from collab_deep.lists.evaluate import evaluate_ranking, evaluate_ratings
from collab_deep.lists.recommend import predict_pairs, recommend
from collab_deep.lists.recommender import as_recommender
from collab_deep.models.dot import DotProduct, DotProductBias
from collab_deep.models.nn import EmbeddingNN
from collab_deep.train.ensemble import collab_ensemble
from collab_deep.train.fit import fit_model
from collab_deep.train.learner import collab_deep_learner
from collab_deep.train.losses import BPRLoss, CollabLoss, NegativeSampler, RankingLoss, bpr_loss
from collab_deep.train.optimizer import FusedAdamW, lr_wd_for
from collab_deep.train.stopping import KeepBest, RankingMetric
from collab_deep.use.save import load_recommender, save_recommender

STARS = (0, 5.5)


@pytest.fixture(scope='module')
def df():
    "Ratings of 30 users and 20 items that follow from two factors each: synthetic"
    rng = np.random.default_rng(0)
    users, items = np.divmod(rng.permutation(600)[:400], 20)
    p, q = rng.normal(size=(30, 2)), rng.normal(size=(20, 2))
    return pd.DataFrame(dict(user=users, item=items, rating=np.clip(3 + (p[users]*q[items]).sum(1), 1, 5)))

@pytest.fixture
def dls(df): return RatingsDataLoaders.from_df(df, seed=0, bs=32, device='cpu')

@pytest.fixture
def clicks(df): return RatingsDataLoaders.from_df(df[df.rating > 3], implicit=True, seed=0, bs=32, device='cpu')

def fit(learn, epochs=1, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, **kwargs)
    return learn

def weights(model): return torch.cat([p.detach().flatten() for p in model.parameters()])


# --- the same as by hand --------------------------------------------------------------------------------------------
def squares(pred, y): return ((pred-y)**2).mean()
def absolutes(pred, y): return (pred-y).abs().mean()
def huber(pred, y):
    off = (pred-y).abs()
    return torch.where(off < .5, off**2/2, .5*off - .125).mean()


def by_hand(model, batches, loss):
    "An epoch of plain PyTorch; `loss(model, x, y)`"
    opt = torch.optim.AdamW(model.parameters(), lr=.01, betas=(.9, .99), eps=1e-5, weight_decay=.3)
    set_seed(2)
    for x,y in batches:
        opt.zero_grad()
        loss(model, x, y).backward()
        opt.step()
    model.fill_unknown()
    return weights(model)


def by_learner(dls, *args, **kwargs):
    "The same by the learner, with its weights and itself"
    set_seed(1)
    learn = collab_deep_learner(dls, *args, lr=.01, wd=.3, **kwargs)
    set_seed(2)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return weights(learn.model),learn


@pytest.mark.parametrize('loss, formula', [('mse', squares), (F.l1_loss, absolutes), (nn.HuberLoss(delta=.5), huber)],
                         ids=['mse', 'l1_loss', 'HuberLoss'])
def test_an_epoch_is_the_loop_by_hand(dls, loss, formula):
    "Plain PyTorch on the same batches, a steady rate: the same weights"
    set_seed(1)
    model = DotProductBias(dls.n_users, dls.n_items, 5, STARS)
    expected = by_hand(model, dls.train, lambda model, x, y: formula(model(x), y))
    mine,learn = by_learner(dls, 5, y_range=STARS, loss=loss)
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)
    x,y = dls.ratings_of('valid')
    with torch.no_grad(): assert learn.validate()[0] == pytest.approx(formula(model(x), y).item(), rel=1e-4)
    assert not learn.ranks and learn.get_preds(with_loss=True)[2].shape == y.shape


def test_validation_loss_is_the_mean_over_ratings(dls):
    learn = fit(collab_deep_learner(dls, 5, y_range=STARS))
    x, y = dls.ratings_of('valid')
    with torch.no_grad(): expected = ((learn.model(x)-y)**2).mean().item()
    assert learn.validate()[0] == pytest.approx(expected, rel=1e-5)


def test_defaults_fit_the_batch(df):
    for bs in (64, 512):
        learn = collab_deep_learner(RatingsDataLoaders.from_df(df, bs=bs, device='cpu'), y_range=STARS)
        assert (learn.lr, learn.wd) == lr_wd_for(bs)
    assert collab_deep_learner(learn.dls, lr=.1, wd=0.).wd == 0


def test_an_optimizer_of_your_own(dls):
    "SGD for one epoch: what a plain Learner of fastai does"
    def trained(make):
        set_seed(1)
        model = DotProductBias(dls.n_users, dls.n_items, 5, STARS)
        learn = make(model)
        set_seed(2)
        learn.fit(1)
        return learn.model.user_factors[1:]
    theirs = trained(lambda model: Learner(dls, model, loss_func=MSELossFlat(), opt_func=SGD, lr=.5, wd=.01))
    ours = trained(lambda model: collab_deep_learner(dls, model=model, opt_func=SGD, lr=.5, wd=.01))
    torch.testing.assert_close(ours, theirs)


def test_biases_of_layers_do_not_decay(dls):
    learn = collab_deep_learner(dls, use_nn=True, layers=[4])
    learn.create_opt()
    learn.opt.set_hypers(wd=.5)
    decay = {id(p): group['weight_decay'] for group in learn.opt.opt.param_groups for p in group['params']}
    assert all(decay[id(p)] == (0 if p.ndim < 2 else .5) for p in learn.model.parameters())
    assert len(decay) == len(list(learn.model.parameters()))


def test_schedules_reach_every_group():
    opt = FusedAdamW({1.: [torch.nn.Parameter(torch.ones(2))], .5: [torch.nn.Parameter(torch.ones(2))]})
    opt.set_hypers(lr=.3, wd=.2, mom=.8)
    assert [(o['lr'], o['wd'], o['mom']) for o in opt.hypers] == [(.3, .2, .8), (.3, .1, .8)]


# --- faults of fastai's learner -------------------------------------------------------------------------------------
def test_one_row(dls, df):
    "fastai 2.8.12: IndexError in get_preds, TypeError in predict"
    learn = fit(collab_deep_learner(dls, 5, y_range=STARS))
    preds, _ = learn.get_preds(dl=dls.test_dl(df[:1]))
    assert preds.shape == (1,) and learn.predict(df.iloc[0])[2].item() == pytest.approx(preds.item(), rel=1e-5)


def test_unknown_ids_get_the_average_not_a_random_row(dls, df):
    "fastai 2.8.12 leaves its row for unknown ids as it was drawn"
    learn = fit(collab_deep_learner(dls, 5, y_range=STARS), 5)
    pair = pd.DataFrame(dict(user=[999], item=[888]))
    assert learn.get_preds(dl=dls.test_dl(pair))[0].item() == pytest.approx(dls.mean, abs=.6)
    torch.testing.assert_close(learn.model.user_factors[0], learn.model.user_factors[1:].mean(0))


def test_the_callers_config_stays_as_it_was(dls):
    "fastai 2.8.12 writes y_range into it"
    config = dict(embed_p=.1)
    collab_deep_learner(dls, use_nn=True, config=config, y_range=STARS)
    assert config == dict(embed_p=.1)


def test_plain_mse_compares_each_with_its_own(dls):
    "fastai's loaders give [64, 1] beside predictions of [64], which F.mse_loss blows up to [64, 64]"
    model = DotProduct(dls.n_users, dls.n_items, 3)
    x, y = next(iter(dls.train))
    assert F.mse_loss(model(x), y) == MSELossFlat()(model(x), y)


@pytest.mark.parametrize('kwargs,kind', [({}, DotProductBias), (dict(use_nn=True, layers=[8, 4]), EmbeddingNN)])
def test_chapter_arguments(dls, kwargs, kind):
    learn = fit(collab_deep_learner(dls, 6, y_range=STARS, **kwargs))
    assert type(learn.model) is kind and learn.model.y_range == STARS and isinstance(learn, Learner)


def test_widths_by_column(dls):
    learn = collab_deep_learner(dls, use_nn=True, emb_szs={'item': 3, 'user': 2})
    assert (learn.model.user_factors.shape[1], learn.model.item_factors.shape[1]) == (2, 3)


# --- rankings -------------------------------------------------------------------------------------------------------
some_pairs = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=12, unique=True)


@settings(deadline=None, max_examples=30)
@given(some_pairs, st.integers(0, 999))
def test_negatives_were_not_seen(pairs, seed):
    x = torch.tensor(sorted(pairs))
    ptr = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(x[:,0], minlength=5).cumsum(0)])
    sample, users = NegativeSampler((ptr, x[:,1]), 7, tries=200), torch.tensor([1, 2, 3, 4]*20)
    torch.manual_seed(seed)
    source = torch.stack([torch.full((80,), seed), torch.arange(80)], 1)
    items = torch.cat([sample(users), sample(users, source)])
    users = users.repeat(2)
    full = {u for u in range(1, 5) if sum(a == u for a, _ in pairs) == 6}
    assert all((u, i) not in pairs or u in full for u, i in zip(users.tolist(), items.tolist()))
    assert items.min() >= 1 and items.max() <= 6


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 999))
def test_bpr_by_formula(n_taken, n, seed):
    torch.manual_seed(seed)
    pred = torch.randn(n_taken*(1+n), dtype=torch.float64)
    targ = torch.cat([torch.ones(n_taken), torch.zeros(n_taken*n)])
    ahead = [pred[i] - pred[n_taken + j*n_taken + i] for i in range(n_taken) for j in range(n)]
    expected = np.mean([-math.log(1/(1+math.exp(-o))) for o in ahead])
    assert bpr_loss(pred, targ).item() == pytest.approx(expected)
    assert bpr_loss(pred, targ, 'none').mean().item() == pytest.approx(expected)


@pytest.mark.parametrize('loss', ['bpr', 'softmax'])
def test_ranking_losses_learn_to_rank(clicks, loss):
    learn = collab_deep_learner(clicks, 4, loss=loss, lr=.05, wd=.01)
    before = evaluate_ranking(learn, 5).value.ndcg
    fit(learn, 8)
    assert evaluate_ranking(learn, 5).value.ndcg > before
    assert learn.recorder.values[-1][1] < learn.recorder.values[0][1]
    assert learn.validate()[0] == learn.validate()[0]              # the same negatives each time
    assert learn.get_preds()[0].shape == (len(clicks.valid_ds),)   # predictions are of the pairs asked for


def test_softmax_is_cross_entropy_over_all_items(clicks):
    learn = collab_deep_learner(clicks, 4, loss='softmax', lr=.01, wd=0.)
    fit(learn)
    x, _ = clicks.ratings_of('valid')
    x = x[x[:,1] > 0]
    with torch.no_grad(): scores = learn.model.scores(x[:,0])[:,1:]
    assert learn.validate()[0] == pytest.approx(F.cross_entropy(scores, x[:,1]-1).item(), rel=1e-4)


@pytest.mark.parametrize('kwargs', [{}, dict(use_nn=True), dict(use_nn=True, config=dict(use_bn=False)),
                                    dict(model='factor')])
def test_no_share_of_softmax_is_above_one(clicks, kwargs):
    "Batch norm over the pairs of a batch would give what was taken a score that its sum does not hold"
    class Shares(Callback):
        order, highest = 6, -math.inf
        def after_pred(self): self.highest = max(self.highest, self.pred.max().item())
    learn = fit(collab_deep_learner(clicks, 8, loss='softmax', lr=.3, cbs=Shares(), **kwargs), 6)
    assert -math.inf < learn.shares.highest <= 0 and learn.recorder.values[-1][0] > 0


def test_softmax_warns_that_new_items_have_no_share(df):
    new_items = GroupSplitter('item', .3, seed=0)
    clicks = RatingsDataLoaders.from_df(df, implicit=True, splits=new_items, bs=32, device='cpu')
    text = f'of {len(clicks.valid_ds)} validation rows none counts, since training has none of their items'
    with pytest.warns(UserWarning, match=text): learn = fit(collab_deep_learner(clicks, 4, loss='softmax'))
    assert math.isnan(learn.recorder.values[-1][1]) and weights(learn.model).isfinite().all()


@pytest.mark.parametrize('loss', ['bpr', 'softmax'])
def test_scores_of_a_ranking_pass_for_no_ratings(dls, df, loss, tmp_path):
    learn = collab_deep_learner(dls, 4, loss=loss)
    for rec in (learn, as_recommender(learn), load_recommender(save_recommender(learn, tmp_path))):
        with pytest.raises(ValueError, match='trained for the order of lists, so it predicts no ratings'):
            evaluate_ratings(rec, df)
        with pytest.raises(ValueError, match=r'give the items that were taken alone, as in \{3\}; found \{3: 5.0\}'):
            recommend(rec, {3: 5.})
        assert predict_pairs(rec, df[:2]).name == 'score' and len(recommend(rec, {3})) == 10
        assert evaluate_ranking(rec, 10, 4, df).value.recall >= 0  # held-out ratings still say what is relevant
    of_stars = load_recommender(save_recommender(collab_deep_learner(dls, 4), tmp_path))
    assert predict_pairs(of_stars, df[:2]).name == 'rating'
    assert collab_ensemble(dls, 1, 2, loss=loss).ranks


def test_metric_is_evaluate_rankings(clicks):
    learn = fit(collab_deep_learner(clicks, 4, loss='bpr', metrics=[RankingMetric(), RankingMetric('recall', 5)]), 2)
    assert learn.recorder.metric_names[3:5] == ['ndcg_at_10', 'recall_at_5']
    expected = [evaluate_ranking(learn, 10).value.ndcg, evaluate_ranking(learn, 5).value.recall]
    assert learn.recorder.values[-1][2:] == expected


# --- losses of one's own --------------------------------------------------------------------------------------------
@pytest.fixture
def registry(monkeypatch):
    "Losses that a test declares are known to it alone"
    monkeypatch.setattr(CollabLoss, 'registry', dict(CollabLoss.registry))
    return CollabLoss.registry


MY_LOSSES = """
from collab_deep.train.losses import BPRCallback, NegativeSampler, RankingLoss

class MarginLoss(RankingLoss):
    "What was taken lies ahead of what was left by a margin"
    name = 'margin'
    def __init__(self, margin=.5): self.margin = margin

    def loss_func(self, pred, targ, reduction='mean'):
        taken,left = pred[targ == 1],pred[targ == 0]
        loss = (self.margin - taken + left.view(-1, len(taken))).clamp(min=0).mean(0)
        return loss if reduction == 'none' else getattr(loss, reduction)()

    def callbacks(self, dls): return [BPRCallback(NegativeSampler(dls.seen, dls.n_items))]
"""

READ = """
import sys, warnings
warnings.filterwarnings('ignore')
from fastai.learner import load_learner
learn = load_learner(sys.argv[1])
print(learn.ranks, learn.collab_loss, learn.collab_loss.margin, learn.loss_func.__self__ is learn.collab_loss)
print(learn.model(learn.dls.vocab.encode([3, 4], [5, 6])).tolist())
"""


@pytest.fixture
def my_losses(tmp_path, monkeypatch, registry):
    "A user's file, imported"
    (tmp_path/'my_losses.py').write_text(MY_LOSSES)
    monkeypatch.syspath_prepend(tmp_path)
    yield import_module('my_losses')
    del sys.modules['my_losses']


@pytest.mark.parametrize('as_what', ['name', 'class', 'instance'])
def test_a_loss_of_ones_own_is_the_loop_by_hand(clicks, my_losses, as_what):
    loss,margin = 'margin',.5
    if as_what == 'class': loss = my_losses.MarginLoss
    if as_what == 'instance': loss,margin = my_losses.MarginLoss(.25),.25
    sampler = NegativeSampler(clicks.seen, clicks.n_items)
    def formula(model, x, y):
        left = torch.stack([x[:,0], sampler(x[:,0])], 1)
        return F.relu(margin - (model(x) - model(left))).mean()
    set_seed(1)
    model = DotProductBias(clicks.n_users, clicks.n_items, 4, std=.05)  # .1/4**.5, as a ranking starts
    expected = by_hand(model, clicks.train, formula)
    mine,learn = by_learner(clicks, 4, loss=loss)
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    assert learn.ranks and learn.validate()[0] == learn.validate()[0]
    assert learn.get_preds()[0].shape == (len(clicks.valid_ds),)


def test_a_loss_of_ones_own_is_exported(clicks, my_losses, tmp_path):
    "Another process, in which nobody named the loss, reads the learner and predicts the same"
    learn = fit(collab_deep_learner(clicks, 4, loss=my_losses.MarginLoss(.25), path=tmp_path))
    learn.export('learner.pkl')
    env = os.environ | dict(PYTHONPATH=str(tmp_path))
    done = subprocess.run([sys.executable, '-c', READ, tmp_path/'learner.pkl'], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said,scores = done.stdout.splitlines()
    assert said == "True 'margin' 0.25 True"
    with torch.no_grad(): expected = learn.model(clicks.encode([3, 4], [5, 6])).tolist()
    assert eval(scores) == pytest.approx(expected, rel=1e-5)


def test_a_plain_function_is_exported(dls, tmp_path):
    learn = fit(collab_deep_learner(dls, 4, y_range=STARS, loss=nn.HuberLoss(delta=.5), path=tmp_path))
    learn.export('learner.pkl')
    read = torch.load(tmp_path/'learner.pkl', weights_only=False)
    assert not read.ranks and repr(read.collab_loss) == 'HuberLoss()' and read.loss_func.delta == .5
    torch.testing.assert_close(weights(read.model), weights(learn.model))


def test_a_setting_of_a_loss_reaches_its_callback(clicks):
    assert collab_deep_learner(clicks, 4, loss=BPRLoss(n=3)).bpr.n == 3


def test_an_ensemble_of_a_loss_of_ones_own(clicks, my_losses):
    learn = collab_ensemble(clicks, 1, 2, loss='margin', n_factors=4)
    assert learn.ranks and as_recommender(learn).ranks


def test_a_name_is_given_once(registry):
    with pytest.raises(ValueError, match="Mine: the name 'bpr' belongs to BPRLoss: choose another one"):
        class Mine(RankingLoss): name = 'bpr'
    assert registry['bpr'] is BPRLoss
    for _ in range(2):                                                               # as by running a cell twice
        class Again(CollabLoss): name,loss_func = 'again',nn.L1Loss()
        assert registry['again'] is Again
    class Unnamed(BPRLoss): pass
    assert [o for o in registry if o != 'next_item'] == ['mse', 'bpr', 'softmax', 'sampled_softmax', 'again']


def test_a_ranking_of_ones_own_is_offered_to_interactions(clicks, my_losses):
    rankings = r"'bpr' or 'softmax'( or '\w+'){1,2} or 'margin'"
    with pytest.raises(ValueError, match=f"choose loss={rankings}, found 'mse'"):
        collab_deep_learner(clicks, loss='mse')
    assert collab_deep_learner(clicks).collab_loss.name == 'softmax'  # what is not said follows from the data


def test_everything_alone_trains_and_shows_it():
    "In a new process, without fastai.vision.all"
    code = """if True:
        from collab_deep.all import *
        import pandas as pd
        rows = pd.DataFrame(dict(user=[1, 1, 2, 2], item=[1, 2, 2, 3], rating=[1., 2, 3, 4]))
        learn = collab_deep_learner(RatingsDataLoaders.from_df(rows, valid_pct=0, device='cpu'))
        print(hasattr(learn, 'fit_one_cycle'), [type(o).__name__ for o in learn.cbs])"""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    chosen,shown = done.stdout.splitlines()
    assert chosen == "2 users, 3 items, 4 ratings from 1 to 4: DotProductBias(50 factors), loss 'mse'"
    assert shown.startswith('True') and 'ProgressCallback' in shown


# --- stopping and averaging -----------------------------------------------------------------------------------------
class Script(Callback):
    "Weights and metric of each epoch as written down"
    order = 40
    def __init__(self, values): self.values = values
    def after_epoch(self):
        with torch.no_grad(): self.model.users.weight.fill_(self.epoch)
        self.recorder.log[-1] = self.values[self.epoch]


@pytest.mark.parametrize('monitor,values,stops_after,best', [
    ('valid_loss', [3., 2, 2.5, 2.4, 1], 4, 1), ('valid_loss', [3., 2, 1, 0, -1], 5, 4),
    ('valid_loss', [1., math.nan, math.nan], 3, 0)])
def test_keep_best(dls, monitor, values, stops_after, best):
    learn = collab_deep_learner(dls, 3, cbs=[KeepBest(monitor, patience=2), Script(values)])
    with learn.no_bar(), learn.no_logging(): learn.fit(len(values))
    assert (len(learn.recorder.values), learn.keep_best.best_epoch) == (stops_after, best)
    assert learn.model.users.weight[1:].unique().item() == best
    learn.validate()  # which is no training
    assert learn.keep_best.best_epoch == best


def test_ensemble_is_the_mean_of_its_seeds(dls):
    learn = collab_ensemble(dls, 1, n=2, seed=3, n_factors=4, y_range=STARS)
    x, _ = dls.ratings_of('valid')
    def alone(seed):
        set_seed(seed)
        return fit(collab_deep_learner(dls, 4, y_range=STARS)).model.eval()(x)
    torch.testing.assert_close(learn.get_preds()[0], ((alone(3)+alone(4))/2).detach(), rtol=1e-5, atol=1e-6)


# --- refusals -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('kwargs,text', [
    (dict(loss='hinge'), r"is one of \['mse', 'bpr', 'softmax'(, '\w+'){1,2}\], found 'hinge'"),
    (dict(loss=5), r"is one of \['mse', 'bpr', 'softmax'(, '\w+'){1,2}\], found 5"),
    (dict(loss=F.l1_loss, y_range=(2, 5.5)), r'y_range \(2, 5.5\) leaves some of them out'),
    (dict(y_range=(2, 5.5)), r'ratings go from 1 to 5, and y_range \(2, 5.5\) leaves some of them out'),
    (dict(loss='softmax', y_range=STARS), "leave y_range out with loss='softmax'"),
])
def test_refused(dls, kwargs, text):
    with pytest.raises(ValueError, match=text): collab_deep_learner(dls, **kwargs)


@pytest.mark.parametrize('loss, said', [('mse', "'mse'"), (nn.HuberLoss(), r'HuberLoss\(\)'), (F.l1_loss, 'l1_loss')],
                         ids=['mse', 'HuberLoss', 'l1_loss'])
def test_interactions_have_no_ratings_to_be_off(clicks, loss, said):
    text = "interactions without ratings have nothing to compare with: choose loss='bpr' or 'softmax'"
    text += rf"( or '\w+'){{1,2}}, found {said}"
    with pytest.raises(ValueError, match=text): collab_deep_learner(clicks, loss=loss)


@pytest.mark.parametrize('loss, text', [
    (nn.HuberLoss, r'found the class HuberLoss: write HuberLoss\(\)'),
    (RankingLoss, 'RankingLoss has no loss_func, found None: give it a function'),
])
def test_what_is_no_loss_yet(dls, loss, text):
    with pytest.raises(TypeError, match=text): collab_deep_learner(dls, loss=loss)


def test_a_loss_is_given_as_loss(dls):
    with pytest.raises(TypeError, match='give your own function as loss; found <function l1_loss'):
        collab_deep_learner(dls, loss_func=F.l1_loss)


@pytest.mark.parametrize('given', [dict(weights=None), dict(alpha=40., reg=1.), dict(bs=64), dict(metric=[])])
@pytest.mark.parametrize('make', [collab_deep_learner, fit_model])
def test_an_argument_that_nothing_takes_is_refused_with_its_place(dls, make, given):
    with pytest.raises(TypeError, match=re.escape(f'{sorted(given)} are no arguments of collab_deep_learner')):
        make(dls, **given)


def test_an_ensemble_has_members(dls):
    with pytest.raises(ValueError, match='at least 1; found 0'): collab_ensemble(dls, 1, n=0)
