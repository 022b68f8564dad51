"Many items: sampled softmax, updates of the rows of a batch, short lists of iALS; by hand, against AdamW and NumPy"
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.torch_core import set_seed
from hypothesis import given, settings, strategies as st

from collab_deep.data.loaders import RatingsDataLoaders
from collab_deep.models.ials import Side
from collab_deep.train.ensemble import collab_ensemble
from collab_deep.train.fit import fit_ials, fit_model
from collab_deep.train.learner import collab_deep_learner
from collab_deep.train.optimizer import FusedAdamW, RowAdamW
from collab_deep.train.sampled import SampledSoftmaxLoss, SharedSample, sampled_shares, stood_for
from paddy_multi.accumulate.microbatch import MicroBatch


def synthetic(n_users=60, n_items=40, n=600, seed=0):
    rng = np.random.default_rng(seed)
    df = pd.DataFrame(dict(user=rng.integers(0, n_users, n), item=rng.integers(0, n_items, n))).drop_duplicates()
    return df.assign(rating=rng.integers(1, 6, len(df)).astype(float))


def loaders(df, bs=64, valid_pct=.2, **kwargs):
    return RatingsDataLoaders.from_df(df, seed=0, bs=bs, valid_pct=valid_pct, device='cpu', **kwargs)


def by_rows(n=16):
    loss = SampledSoftmaxLoss(n)
    loss.large = 0
    return loss


def silent(learn, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(*args, **kwargs)
    return learn


def is_up_to_date(learn):
    return all(missed.now == 0 and not last.any() for missed, last in learn.opt.opt.late.values())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), rates=st.lists(st.floats(1e-4, .3), min_size=1, max_size=8), wd=st.floats(0, 2))
def test_with_all_rows_in_each_gradient_it_is_adamw(seed, rates, wd):
    gen = torch.Generator().manual_seed(seed)
    start = torch.randn(5, 3, generator=gen)
    pair = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    opts = [FusedAdamW({1.: pair[:1]}), RowAdamW({1.: pair[1:]})]
    order = torch.randperm(5, generator=gen)
    for i, lr in enumerate(rates):
        grad = torch.randn(5, 3, generator=gen)
        pair[0].grad = grad
        pair[1].grad = torch.sparse_coo_tensor(order[None], grad[order], (5, 3))
        for opt in opts:
            opt.set_hypers(lr=lr, wd=wd, mom=.85 + .01*i)
            opt.step()
    opts[1].finish()
    torch.testing.assert_close(pair[1], pair[0], atol=1e-6, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), n=st.integers(1, 60), wd=st.floats(0, 1), mom=st.floats(.5, .95))
def test_rows_that_come_and_go_are_those_of_adamw(seed, n, wd, mom):
    "PyTorch's AdamW has zero gradients for rows that are absent; a constant size of gradients leaves nothing to guess"
    gen = torch.Generator().manual_seed(seed)
    start = torch.randn(6, 2, generator=gen)
    dense, late = (torch.nn.Parameter(start.clone()) for _ in range(2))
    opts = torch.optim.AdamW([dense], betas=(mom, .99), eps=1e-5), RowAdamW({1.: [late]})
    for i in range(n):
        rate = .01*(1 + i % 3)
        rows = torch.randperm(6, generator=gen)[:2]
        grad = torch.randn(2, 2, generator=gen).sign()
        dense.grad = torch.zeros(6, 2).index_put((rows,), grad)
        late.grad = torch.sparse_coo_tensor(rows[None], grad, (6, 2))
        for group in opts[0].param_groups: group.update(lr=rate, weight_decay=wd)
        opts[1].set_hypers(lr=rate, wd=wd, mom=mom)
        for opt in opts: opt.step()
    opts[1].finish()
    moved = (dense - start).norm().item()
    assert (late - dense).norm().item() <= .01*moved
    for name in ('exp_avg', 'exp_avg_sq'):
        torch.testing.assert_close(opts[1].opt.state[late][name], opts[0].state[dense][name], atol=1e-6, rtol=1e-4)


def test_an_absent_row_has_what_it_missed_by_hand():
    table = torch.nn.Parameter(torch.ones(2, 1))
    opt = RowAdamW({1.: [table]})
    rates, wd = (.1, .2, .3), .5
    for i, lr in enumerate(rates):
        opt.set_hypers(lr=lr, wd=wd, mom=.9)
        rows = [0, 1] if i == 0 else [0]
        table.grad = torch.sparse_coo_tensor([rows], torch.ones(len(rows), 1), (2, 1))
        opt.step()
    opt.finish()
    x, m, v = 1., 0., 0.
    for i, lr in enumerate(rates, 1): # algorithm 2 of Loshchilov and Hutter, with a gradient in the first step alone
        g = float(i == 1)
        m, v = .9*m + .1*g, .99*v + .01*g*g
        x = x*(1 - lr*wd) - lr*m/(1 - .9**i)/((v/(1 - .99**i))**.5 + 1e-5)
    assert table[1].item() == pytest.approx(x, rel=1e-3)


def test_optimizers_read_the_state_of_each_other():
    torch.manual_seed(0)
    grads = torch.randn(8, 3, 2)
    def taken(opt, table, some):
        for grad in some:
            table.grad = grad.clone()
            opt.step()
    tables = [torch.nn.Parameter(torch.ones(3, 2)) for _ in range(3)]
    first, whole = (FusedAdamW({1.: [o]}, .1) for o in (tables[0], tables[2]))
    second = RowAdamW({1.: [tables[1]]}, .1)
    taken(first, tables[0], grads[:4])
    second.load_state_dict(first.state_dict())
    tables[1].data = tables[0].data.clone()
    taken(second, tables[1], grads[4:6])
    first.load_state_dict(second.state_dict())
    tables[0].data = tables[1].data.clone()
    taken(first, tables[0], grads[6:])
    taken(whole, tables[2], grads)
    torch.testing.assert_close(tables[0], tables[2])


@pytest.mark.parametrize('n_items', [200, 2000])
def test_a_step_writes_the_rows_of_its_batch_alone(n_items):
    df = pd.concat([synthetic(), pd.DataFrame(dict(user=0, item=range(40, n_items), rating=3.))])
    learn = collab_deep_learner(loaders(df, valid_pct=0, bs=32), n_factors=4, loss=by_rows(16))
    written = []

    class Watch(Callback):
        def before_step(self): self.before = learn.model.items.weight.detach().clone()
        def after_step(self):
            written.append((int((self.before != learn.model.items.weight).any(1).sum()), self.x.shape[0]))
    silent(learn, 1, cbs=Watch())
    assert all(0 < rows <= bs + 16 for rows, bs in written)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), by=st.sampled_from(['uniform', 'popularity']), extra=st.integers(0, 5))
def test_with_all_items_the_loss_is_the_full_softmax(seed, by, extra):
    dls = loaders(synthetic(n=200, seed=seed), valid_pct=0)
    set_seed(seed)
    loss = SampledSoftmaxLoss(dls.n_items - 1 + extra, by)
    learn = collab_deep_learner(dls, n_factors=4, loss=loss, config=dict(std=1.))
    pairs = dls.train.dataset.x.long()
    learn.sampled_softmax.learn = learn
    got = learn.sampled_softmax.shares(pairs)
    want = F.cross_entropy(learn.model.scores(pairs[:, 0])[:, 1:], pairs[:, 1] - 1, reduction='none')
    torch.testing.assert_close(-got, want)


@pytest.mark.parametrize('by', ['uniform', 'popularity'])
def test_the_sum_over_all_items_is_estimated_without_bias(by):
    "The item taken stands for itself, others for as many as they are drawn seldom: hits and misses of it included"
    torch.manual_seed(3)
    scores, item, n = torch.randn(12).double(), 4, 6000
    sample = SharedSample(torch.tensor([0, *range(1, 12)]), 5, by)
    found, hits = [], 0
    for _ in range(n):
        drawn, log_n = sample()
        sums = (scores[drawn] + log_n).logsumexp(0)[None]
        counted = stood_for(torch.tensor([item]), drawn, log_n)
        hits += int(counted > 0)
        found.append((scores[item] - sampled_shares(scores[[item]], sums, counted)).exp().item())
    found = np.array(found)
    assert 500 < hits < n - 500
    assert abs(found.mean() - scores[1:].exp().sum().item()) < 4*found.std()/n**.5


def test_no_share_or_gradient_is_nan_where_what_was_taken_is_all_that_was_drawn():
    taken = torch.tensor([0., 90., -90.], requires_grad=True)
    sums = taken + math.log(7)
    shares = sampled_shares(taken, sums, torch.tensor([7., 7, 7]))
    shares.sum().backward()
    torch.testing.assert_close(shares, torch.zeros(3), atol=2e-5, rtol=0)
    assert taken.grad.isfinite().all()


def test_a_row_without_weight_leaves_factors_of_its_user_without_gradient():
    df = synthetic()
    dls = loaders(df)
    learn = collab_deep_learner(dls, n_factors=4, loss=SampledSoftmaxLoss(8, weights=lambda r: (r > 4).float()))
    rows, ratings = dls.ratings_of('train')
    never = set(rows[:, 0].tolist()) - set(rows[ratings > 4][:, 0].tolist())
    if not never: pytest.fail('choose another seed: every user has a rating of 5')
    learn.opt_func = lambda params, lr: FusedAdamW({0.: list(params)}, lr) # nothing decays
    before = learn.model.users.weight.detach().clone()
    silent(learn, 1)
    for user in never: torch.testing.assert_close(learn.model.users.weight[user], before[user])


def test_it_learns_and_what_was_chosen_is_said(capsys):
    learn = collab_deep_learner(loaders(synthetic()), n_factors=8, loss=by_rows())
    assert 'trained by RowAdamW' in capsys.readouterr().out
    assert isinstance(learn.collab_loss, SampledSoftmaxLoss)
    before = learn.validate()[0]
    silent(learn, 5)
    assert is_up_to_date(learn) and isinstance(learn.opt, RowAdamW)
    train = learn.recorder.values[-1][0], learn.recorder.values[0][0]
    assert train[0] < train[1]
    assert learn.validate()[0] == learn.validate()[0] != before
    small = collab_deep_learner(loaders(synthetic()), n_factors=8, loss='sampled_softmax')
    silent(small, 1)
    assert type(small.opt) is FusedAdamW


def test_an_interrupted_fit_leaves_rows_up_to_date():
    class Interrupt(Callback):
        def after_batch(self):
            if self.iter == 3: raise KeyboardInterrupt
    learn = collab_deep_learner(loaders(synthetic()), n_factors=8, loss=by_rows())
    with pytest.raises(KeyboardInterrupt): silent(learn, 1, cbs=Interrupt())
    assert learn.opt.opt.state and is_up_to_date(learn)
    assert all(p.isfinite().all() for p in learn.model.parameters())


def test_saved_in_the_midst_of_an_epoch_and_loaded_it_goes_on_as_it_would_have(tmp_path):
    def learner():
        set_seed(0)
        learn = collab_deep_learner(loaders(synthetic(), path=tmp_path), n_factors=8, loss=by_rows())
        return learn
    one = silent(learner(), 2)
    one.save('two')
    other = learner()
    other.create_opt()
    other.load('two')
    state, loaded = ([o for o in learn.opt.opt.state.values()] for learn in (one, other))
    assert [o['step'] for o in state] == [o['step'] for o in loaded]
    for learn in (one, other):
        set_seed(1)
        silent(learn, 1)
    for a, b in zip(one.model.parameters(), other.model.parameters()): torch.testing.assert_close(a, b)


def test_lr_find_leaves_the_model_as_it_was(tmp_path):
    learn = collab_deep_learner(loaders(synthetic(), path=tmp_path), n_factors=8, loss=by_rows())
    before = [p.detach().clone() for p in learn.model.parameters()]
    with learn.no_bar(), learn.no_logging(): learn.lr_find(show_plot=False, num_it=20)
    for a, b in zip(learn.model.parameters(), before): torch.testing.assert_close(a.detach(), b)


def test_a_loss_that_is_not_finite_ends_training():
    learn = collab_deep_learner(loaders(synthetic()), n_factors=8, loss=by_rows())
    with torch.no_grad(): learn.model.items.weight[1:] = math.inf
    with pytest.raises(FloatingPointError): silent(learn, 1)


@pytest.mark.parametrize('n', [0, -3, 1.5, True, None, '8'])
def test_n_is_a_positive_integer(n):
    with pytest.raises(ValueError, match='n is how many items a batch draws, a positive integer; found'):
        SampledSoftmaxLoss(n)


@pytest.mark.parametrize('model', ['nn', 'factor'])
def test_models_without_rows_are_refused_before_training(model):
    with pytest.raises(ValueError, match="sampled softmax reads single rows of factors.*use loss='softmax'"):
        collab_deep_learner(loaders(synthetic()), model=model, loss='sampled_softmax')


def test_tables_in_parts_and_several_processes_are_refused(monkeypatch):
    learn = collab_deep_learner(loaders(synthetic()), loss='sampled_softmax')
    learn.model.shards = 'elsewhere'
    with pytest.raises(ValueError, match='sampled softmax'): learn.sampled_softmax.before_fit()
    learn.model.shards = None
    across = type('Across', (), dict(ranks=[0, 1]))()
    monkeypatch.setattr(type(learn), 'across_processes', across, raising=False)
    with pytest.raises(ValueError, match="use loss='softmax' across several"): learn.sampled_softmax.before_fit()


def test_microbatch_is_refused():
    learn = collab_deep_learner(loaders(synthetic()), loss='sampled_softmax')
    with pytest.raises(ValueError, match='each of which would draw other items.*use a smaller bs'):
        silent(learn, 1, cbs=MicroBatch(8))


def test_an_ensemble_of_models_trained_so_is_validated_on_all_items():
    dls = loaders(synthetic())
    learn = collab_ensemble(dls, 1, n=2, loss='sampled_softmax', n_factors=4)
    pairs, ratings = dls.ratings_of('valid')
    shares = learn.model.scores(pairs[:, 0])[:, 1:].log_softmax(1)
    weights = (ratings - dls.y_min)*(pairs[:, 1] > 0)
    own = -(shares.gather(1, (pairs[:, 1:] - 1).clamp(min=0))[:, 0]*weights).sum()/weights.sum()
    with learn.no_bar(): assert learn.validate()[0] == pytest.approx(own.item(), rel=1e-5)


def test_many_items_without_ratings_are_learned_from_a_sample(capsys):
    df = pd.DataFrame(dict(user=np.arange(20_500) % 50, item=np.arange(20_500)))
    learn = collab_deep_learner(loaders(df, valid_pct=.01, implicit=True), n_factors=2)
    assert isinstance(learn.collab_loss, SampledSoftmaxLoss)
    few = collab_deep_learner(loaders(df.head(500), valid_pct=.01, implicit=True), n_factors=2)
    assert few.collab_loss.name == 'softmax'


# --- iALS -----------------------------------------------------------------------------------------------------------
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), n_factors=st.integers(1, 12), least=st.sampled_from([.05, .2, .6]),
       unseen=st.sampled_from([.05, .3]))
def test_a_side_is_solved_as_by_numpy_row_by_row(seed, n_factors, least, unseen):
    "Lists shorter and longer than the factors are many, and weights above and below that of what was not taken"
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 20, 9)
    starts = torch.tensor([0, *lengths.cumsum()])
    others = torch.cat([torch.from_numpy(rng.permutation(19)[:n] + 1) for n in lengths] or [torch.zeros(0)]).long()
    weights = torch.from_numpy(least + rng.random(len(others))).float()
    targets, other = torch.randn(len(others)), torch.randn(20, n_factors)
    got = Side(starts, others, weights, targets).solve(other, .05, unseen)
    q = other[1:].double().numpy()
    for row, (a, b) in enumerate(zip(starts, starts[1:])):
        if a == b:
            assert got[row].tolist() == [0]*n_factors
            continue
        w, t = np.full(19, unseen), np.zeros(19)
        w[others[a:b] - 1], t[others[a:b] - 1] = weights[a:b], targets[a:b]
        penalty = .05*(weights[a:b].double().sum().item() + unseen*19)
        want = np.linalg.solve(q.T @ np.diag(w) @ q + penalty*np.eye(n_factors), q.T @ (w*t))
        np.testing.assert_allclose(got[row], want, atol=2e-3*(1 + abs(want).max()))


def test_what_only_solving_needs_is_let_go():
    learn = fit_ials(loaders(synthetic()), epochs=2, n_factors=4)
    assert learn.model.sides is None
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.model.sides is None
    both = fit_model(loaders(synthetic()), 'blend', 2)
    assert [o.sides for o in both.model.members if hasattr(o, 'sides')] == [None]


def test_batches_that_nobody_asked_for_are_larger_than_those_of_all_items():
    dls = RatingsDataLoaders.from_df(synthetic(), seed=0, device='cpu')
    sizes = [collab_deep_learner(dls, loss=o).dls.train.bs for o in ('softmax', 'sampled_softmax')]
    assert sizes == [2048, 8192] and dls.train.bs == 64
    assert collab_deep_learner(loaders(synthetic(), bs=32), loss='sampled_softmax').dls.train.bs == 32
