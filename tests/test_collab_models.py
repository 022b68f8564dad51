"Models against plain formulas and fastai's own, what they refuse, and what renaming must not change"
import json
import math

import pandas as pd
import pytest
import torch
from fastai.collab import EmbeddingDotBias
from fastai.collab import EmbeddingNN as FastaiNN
from hypothesis import given, settings
from hypothesis import strategies as st

from collab_deep.data.loaders import RatingsDataLoaders
from collab_deep.lists.fold_in import fold_in, fold_row
from collab_deep.models.base import CollabModel
from collab_deep.models.dot import DotProduct, DotProductBias
from collab_deep.models.ensemble import Ensemble
from collab_deep.models.factor import FactorModel, factor_model
from collab_deep.models.features import encode_features
from collab_deep.models.nn import EmbeddingNN

STARS = (0, 5.5)
ratings = pd.DataFrame(dict(user=[1, 1, 2, 3, 3, 4], item=list('abacdb'), rating=[4., 3, 5, 1, 2, 3]))
films = pd.DataFrame(dict(genre=['x|y', 'x', None, 'z'], year=[1, 2, 3, 9]), index=list('abcd'))


def all_pairs(model): return torch.cartesian_prod(torch.arange(model.n_users), torch.arange(model.n_items))

def randomised(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, .7)
    return model.eval()

def a_factor_model(y_range=STARS, **kwargs):
    dls = RatingsDataLoaders.from_df(ratings, valid_pct=0, device='cpu')
    return factor_model(dls, 3, y_range, item_features=films, **kwargs)

def a_pair(): return Ensemble.of([randomised(DotProductBias(5, 5, 3, STARS)), randomised(a_factor_model())])

MODELS = {'dot': lambda: DotProduct(5, 7, 3),
          'dot, range': lambda: DotProduct(5, 7, 3, STARS),
          'bias': lambda: DotProductBias(5, 7, 3, STARS),
          'net': lambda: EmbeddingNN(5, 7, (2, 4), [6, 3], STARS),
          'net, plain': lambda: EmbeddingNN(5, 7, 2, [], use_bn=False),
          'factor': a_factor_model,
          'factor, bare': lambda: FactorModel(5, 7, 3),
          'factor, no lists': lambda: a_factor_model(None, implicit=False),
          'ensemble': a_pair}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request): return randomised(request.param())


# --- what every model promises --------------------------------------------------------------------------------------
def test_scores_are_forward_of_all_pairs(model):
    expected = model(all_pairs(model)).view(model.n_users, -1)
    torch.testing.assert_close(model.scores(torch.arange(model.n_users)), expected, rtol=1e-4, atol=1e-5)
    some = torch.tensor([3, 0, 3])
    torch.testing.assert_close(model.scores(some), expected[some], rtol=1e-4, atol=1e-5)


def test_one_number_a_pair(model):
    assert model(torch.tensor([[1, 2]])).shape == (1,)  # fastai's dot model gives shape [] here


def test_settings_are_json_and_build_it_again(model):
    again = type(model)(**json.loads(json.dumps(model.settings))).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(all_pairs(model)), model(all_pairs(model)))


def test_predictions_stay_in_range(model):
    with torch.no_grad():
        for p in model.parameters(): p.mul_(100)
    preds = model(all_pairs(model))
    assert model.y_range is None or (preds.min() >= 0 and preds.max() <= 5.5)


def test_every_table_learns(model):
    model(all_pairs(model)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.numel())


def test_decay_groups_hold_every_parameter_once(model):
    ids = [id(p) for group in model.decay_groups().values() for p in group]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())


def test_an_unknown_user_is_the_average(model):
    model.fill_unknown()
    rows = model.user_rows(torch.arange(model.n_users))
    torch.testing.assert_close(rows[0], rows[1:].mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.new_user(), rows[0], rtol=1e-4, atol=1e-5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.fill_unknown()                                            # twice is once
    for k, v in model.state_dict().items(): torch.testing.assert_close(v, before[k], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('x,found', [(torch.tensor([1, 2]), r'\[2\]'),
                                     (torch.zeros(3, 3, dtype=torch.long), r'\[3, 3\]'),
                                     ([[1, 2]], 'list')])
def test_what_is_no_batch_of_pairs_is_refused(x, found):
    with pytest.raises(ValueError, match=rf'as a tensor \[bs, 2\]; found {found}'): DotProductBias(5, 7, 3)(x)


def test_ids_outside_the_tables_are_refused():
    with pytest.raises(IndexError, match='id 7 is not in a table of 7 rows'):
        DotProductBias(5, 7, 3)(torch.tensor([[1, 7]]))


# --- scoring ----------------------------------------------------------------------------------------------------------
def test_scoring_changes_no_score_and_leaves_no_trace(model):
    users = torch.arange(model.n_users)
    expected = model.scores(users)
    model.train()
    with model.scoring(): pass
    attributes = [set(vars(m)) for m in model.modules()]
    with model.scoring() as read:
        assert model.training and not any(m.training for m in read.modules()) and not read.scores(users).requires_grad
        for _ in range(2): assert torch.equal(read.scores(users), expected)
        torch.testing.assert_close(read(all_pairs(model)).view(model.n_users, -1), expected, rtol=1e-4, atol=1e-5)
    assert model.training and torch.is_grad_enabled()
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert all(m.kept_tables is None for m in model.modules() if isinstance(m, CollabModel))
    randomised(model, seed=1)
    assert not torch.equal(model.scores(users), expected)


def test_scoring_ends_with_an_error_too(model):
    last = list(model.modules())[-1].train()                # modes may differ within a model
    with pytest.raises(ZeroDivisionError), model.scoring(): 1/0
    assert last.training and torch.is_grad_enabled()
    assert [m for m in model.modules() if m.training] == [last]
    assert all(m.kept_tables is None for m in model.modules() if isinstance(m, CollabModel))


@pytest.mark.parametrize('make', [a_factor_model, a_pair])
def test_tables_are_worked_out_once_a_block(make, monkeypatch):
    model, calls = randomised(make()), []
    worked_out = FactorModel.work_out_table
    monkeypatch.setattr(FactorModel, 'work_out_table', lambda self, side: calls.append(side) or worked_out(self, side))
    with model.scoring() as read, read.scoring() as read:
        for _ in range(3): read.scores(torch.arange(5)), read(all_pairs(model))
    assert sorted(calls) == ['item', 'user']
    with torch.enable_grad():                               # which blocks that are not nested do not restore
        first, second = model.scoring(), model.scoring()    # two lists read in turn, the first one ending first
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        second.__exit__(None, None, None)
    assert all(m.kept_tables is None for m in model.modules() if isinstance(m, CollabModel))


# --- the registry -----------------------------------------------------------------------------------------------------
def test_models_register_themselves():
    ours = {o.__name__: o for o in (DotProduct, DotProductBias, EmbeddingNN, FactorModel, Ensemble)}
    assert ours.items() <= CollabModel.registry.items()
    first = type('Twice', (DotProduct,), {})
    assert CollabModel.registry['Twice'] is first
    second = type('Twice', (DotProductBias,), {})
    assert CollabModel.registry.pop('Twice') is second and Ensemble.of([DotProduct(5, 7, 3)]).members[0].n_items == 7


def test_a_class_of_ones_own_joins_an_ensemble():
    class Mine(DotProduct): pass
    mine = randomised(Mine(5, 7, 3))
    both = Ensemble.of([mine, randomised(DotProduct(5, 7, 3), seed=1)])
    assert type(both.members[0]) is Mine and torch.equal(both.members[0].items.weight, mine.items.weight)
    del CollabModel.registry['Mine']
    with pytest.raises(ValueError, match=r"members are of \['DotProduct', .*\], found \['Mine'\]"): Ensemble.of([mine])


# --- against fastai -------------------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=25)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 6), st.sampled_from([None, STARS, (1, 5)]),
       st.integers(0, 999))
def test_dot_model_is_fastais(n_users, n_items, k, y_range, seed):
    ours = randomised(DotProductBias(n_users, n_items, k, y_range), seed)
    theirs = EmbeddingDotBias(k, n_users, n_items, y_range)
    tables = dict(u_weight=ours.users, i_weight=ours.items, u_bias=ours.users_bias, i_bias=ours.items_bias)
    for name, mine in tables.items(): getattr(theirs, name).weight.data.copy_(mine.weight)
    x = all_pairs(ours)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize('layers,ps', [([6], 0), ([6, 3], 0), ([6, 3], [.2, .1])])
def test_net_is_fastais(layers, ps):
    ours = randomised(EmbeddingNN(5, 7, (2, 4), layers, STARS, ps=ps))
    theirs = FastaiNN([(5, 2), (7, 4)], layers, y_range=STARS, ps=list(ps) if ps else None, bn_cont=False).eval()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.shape == other.shape
        other.data.copy_(mine)
    torch.testing.assert_close(ours(all_pairs(ours)), theirs(all_pairs(ours))[:,0])


# --- the factor model -----------------------------------------------------------------------------------------------
def test_lists_are_the_training_rows():
    model = a_factor_model()
    assert model.settings['n_seen'] == len(ratings)
    assert model.seen[model.seen_ptr[3]:model.seen_ptr[4]].tolist() == [3, 4]      # user 3 rated c and d
    assert model.seers[model.seers_ptr[1]:model.seers_ptr[2]].tolist() == [1, 2]   # a was rated by 1 and 2


def test_gradient_of_lists_and_features_is_right():
    model = randomised(a_factor_model()).double()
    params = dict(model.named_parameters())
    pairs = torch.tensor([[1, 1], [3, 4], [4, 2], [0, 3]])
    def f(*values): return torch.func.functional_call(model, dict(zip(params, values)), (pairs,))
    assert torch.autograd.gradcheck(f, [p.detach().requires_grad_() for p in params.values()])


def test_starts_at_the_mean():
    dls = RatingsDataLoaders.from_df(ratings, valid_pct=0, device='cpu')
    for y_range in (None, STARS):
        first = factor_model(dls, 4, y_range)(torch.tensor([[1, 1]])).item()
        assert first == pytest.approx(dls.mean, abs=.1)


def test_features_of_a_film_without_any_are_the_mean():
    coded = encode_features(pd.DataFrame(dict(g=['x', 'y']), index=['a', 'b']), ['#na#', 'a', 'b', 'c'])
    assert coded.tolist() == [[.5, .5], [1, 0], [0, 1], [.5, .5]]


# --- folding in -----------------------------------------------------------------------------------------------------
class Holder:
    "What `fold_in` asks of a learner"
    def __init__(self, model):
        self.model, self.dls = model, RatingsDataLoaders.from_df(ratings, valid_pct=0, device='cpu')


def test_more_trust_fits_the_ratings_better():
    model = randomised(a_factor_model())
    items, stars = torch.tensor([1, 3]), torch.tensor([5., 1])
    def error(decay):
        row = fold_row(model, items, stars, decay=decay)
        return ((model.scores_of(row[None])[0, items] - stars)**2).sum().item()
    assert error(.01) < error(1.) < error(100.)


def test_folding_in_leaves_the_model_alone(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fold_row(model, torch.tensor([1, 2]), torch.tensor([5., 1]))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_fold_in_by_name():
    learn = Holder(randomised(a_factor_model()))
    row = fold_in(learn, {'a': 5, 'c': 1})
    assert torch.allclose(row, fold_row(learn.model, torch.tensor([1, 3]), torch.tensor([5., 1])), atol=1e-4)
    with pytest.raises(KeyError, match="'z' was not in training"): fold_in(learn, {'a': 5, 'z': 1})
    with pytest.raises(ValueError, match='ratings are finite numbers'): fold_in(learn, {'a': math.nan})


# --- refusals -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('make,text', [
    (lambda: DotProduct(5, 7, 3, (5, 0)), r'as in \(0, 5.5\); found \(5, 0\)'),
    (lambda: DotProduct(5, 7, 0), 'n_factors is the number of columns, a positive integer; found 0'),
    (lambda: DotProduct(0, 7, 3), 'n is the number of rows, a positive integer; found 0'),
    (lambda: EmbeddingNN(5, 7, (1, 2, 3)), r'users first; found \(1, 2, 3\)'),
    (lambda: EmbeddingNN(5, 7, 3, [4], ps=[.1, .2]), 'one for each of the 1 layers'),
    (lambda: Ensemble([]), 'at least one member'),
])
def test_refused(make, text):
    with pytest.raises(ValueError, match=text): make()
