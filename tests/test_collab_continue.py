"Going on from a trained model on other days: rows go with ids, and what cannot be told apart is refused"
import contextlib
import io
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.learner import Learner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from collab_deep.data.loaders import RatingsDataLoaders
from collab_deep.lists.recommend import predict
from collab_deep.lists.recommender import as_recommender
from collab_deep.models.base import CollabModel
from collab_deep.models.blend import Blend
from collab_deep.models.by_id import KnownRows, by_shape, check_known
from collab_deep.models.carried import carried_over
from collab_deep.models.dot import DotProduct, DotProductBias
from collab_deep.models.ease import EASE, Histories
from collab_deep.models.embedding import Embedding
from collab_deep.models.ensemble import Ensemble
from collab_deep.models.factor import FactorModel, factor_model
from collab_deep.models.ials import iALS
from collab_deep.models.nn import EmbeddingNN
from collab_deep.train.continued import partial_fit, training_rows
from collab_deep.train.fit import fit_model
from collab_deep.train.learner import collab_deep_learner
from collab_deep.use.save import load_recommender, save_recommender

STARS = (0, 5.5)


@pytest.fixture
def ratings():
    pairs = [(u, i) for u in range(1, 13) for i in range(9) if (u+i) % 3]
    return pd.DataFrame([dict(user=u, item=i, rating=1. + (u*i + u) % 5) for u, i in pairs])


def loaders(df, bs=16, **kwargs): return RatingsDataLoaders.from_df(df, valid_pct=0, bs=bs, device='cpu', **kwargs)


def randomised(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, .7)
    model.fill_unknown()
    return model.eval()


def silently(take, *args, **kwargs):
    "What `take` gives, and what it prints"
    with contextlib.redirect_stdout(io.StringIO()) as out: return take(*args, **kwargs), out.getvalue()


def days(ratings):
    "User 1 leaves and 12 arrives, item 0 leaves and 8 arrives: as many of both"
    first = ratings[(ratings.user < 12) & (ratings['item'] < 8)]
    return first, ratings[(ratings.user > 1) & (ratings['item'] > 0)]


def in_both(first, second): return second[second.user.isin(first.user) & second['item'].isin(first['item'])]


class ThreeWidths(CollabModel):
    "Tables of three widths under names of its own, one without `Embedding`, and a layer"
    def __init__(self, n_users, n_items, y_range=None, width=3):
        super().__init__(n_users, n_items, y_range, width=width)
        self.people, self.things = Embedding(n_users, width), nn.Embedding(n_items, 5)
        self.moods = Embedding(n_users, 1)
        self.fame = nn.Parameter(torch.randn(n_items))
        self.layer = nn.Linear(width, 5)

    def user_rows(self, users): return torch.cat([self.layer(self.people(users)), self.moods(users)], 1)
    def scores_of(self, rows): return rows[:, :-1] @ self.things.weight.T + rows[:, -1:] + self.fame
    def forward(self, x): return self.scores_of(self.user_rows(x[:, 0])).gather(1, x[:, 1:])[:, 0]


SIMPLE = dict(
    dot=lambda d: DotProduct(d.n_users, d.n_items, 3), bias=lambda d: DotProductBias(d.n_users, d.n_items, 3, STARS),
    nn=lambda d: EmbeddingNN(d.n_users, d.n_items, (2, 4), [6], STARS),
    by_rule=lambda d: EmbeddingNN(d.n_users, d.n_items, None, [6], use_bn=False),
    ials=lambda d: iALS(d.n_users, d.n_items, 3), own=lambda d: ThreeWidths(d.n_users, d.n_items),
    factor=lambda d: factor_model(d, 3, STARS, implicit=False),
    mean=lambda d: Ensemble.of([randomised(DotProductBias(d.n_users, d.n_items, 2), 1),
                                randomised(EmbeddingNN(d.n_users, d.n_items, 2, [3]), 2)]))


# --- rows go with ids -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', SIMPLE)
def test_who_is_known_is_predicted_as_before(ratings, name):
    "As many users and items on both days, every row another's; the figures are those of the first day, by id"
    first, second = days(ratings)
    old = collab_deep_learner(loaders(first), model=randomised(SIMPLE[name](loaders(first))))
    new, said = silently(collab_deep_learner, loaders(second), model=old)
    assert (new.dls.n_users, new.dls.n_items) == (old.dls.n_users, old.dls.n_items)
    assert said.startswith('10 of 11 users and 7 of 8 items known from before; ')
    both = in_both(first, second)
    np.testing.assert_allclose(predict(new, both), predict(old, both), atol=1e-6)
    assert type(new.model) is type(old.model)
    mse = [float(((predict(o, both) - both.rating)**2).mean()) for o in (old, new)]
    assert mse[0] == pytest.approx(mse[1], abs=1e-6)


@pytest.mark.parametrize('name', ['dot', 'bias', 'own', 'factor'])
def test_someone_new_is_the_average_one(ratings, name):
    "Worked out from the old tables: the row of user 12 is the mean of the old ones"
    first, second = days(ratings)
    old = collab_deep_learner(loaders(first), model=randomised(SIMPLE[name](loaders(first))))
    before = {n: o.clone() for n, o in old.model.state_dict().items()}
    new, _ = silently(collab_deep_learner, loaders(second), model=old)
    for n, table in new.model.state_dict().items():
        was = before[n]
        if was.ndim == 0 or len(was) not in (9, 12): assert torch.equal(table, was); continue
        torch.testing.assert_close(table[-1], was[1:].mean(0))  # user 12, item 8
        torch.testing.assert_close(table[1:-1], was[2:])  # users 2 to 11, items 1 to 7
    for n, o in old.model.state_dict().items(): assert torch.equal(o, before[n])


def test_it_trains_on_from_a_copy(ratings):
    first, second = days(ratings)
    old, _ = silently(fit_model, loaders(first), 'dot', 2)
    before = old.model.users.weight.clone()
    for source in (old, as_recommender(old)):
        new, said = silently(collab_deep_learner, loaders(second), model=source)
        assert said == '10 of 11 users and 7 of 8 items known from before; the optimizer starts anew\n'
        start = new.model.users.weight.clone()
        assert all(p.requires_grad for p in new.model.parameters())
        with new.no_bar(), new.no_logging(): new.fit(1)
        assert not torch.equal(start, new.model.users.weight) and torch.equal(before, old.model.users.weight)


def test_a_table_in_another_order(ratings):
    "Items renamed so that the order of all is turned round; their ids say who is who"
    first = ratings.assign(item='i' + ratings['item'].astype(str))
    second = pd.concat([first.query('item == "i3"').assign(item='a3'), first.query('item != "i3"')])
    old = collab_deep_learner(loaders(first), model=randomised(SIMPLE['bias'](loaders(first))))
    new, _ = silently(collab_deep_learner, loaders(second), model=old)
    assert list(new.dls.classes['item'])[1] == 'a3'
    both = in_both(first, second)
    np.testing.assert_allclose(predict(new, both), predict(old, both), atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_days(data):
    "Of any ids before and today with one in common, each row is that of its id, and the mean of the old where new"
    ids = st.lists(st.integers(-50, 50) | st.integers(10**9, 10**9+5), min_size=1, max_size=12, unique=True)
    sides = []
    for name in ('user', 'item'):
        shared = data.draw(ids)
        before, now = (['#na#', *dict.fromkeys([*data.draw(ids), *shared])] for _ in 'ab')
        sides.append(KnownRows(name, before, now))
    model = randomised(DotProductBias(len(sides[0].before), len(sides[1].before), 2), data.draw(st.integers(0, 9)))
    new = by_shape(model, *sides)
    for side, tables in zip(sides, (('users', 'users_bias'), ('items', 'items_bias'))):
        for name in tables:
            was, now = (getattr(o, name).weight.detach() for o in (model, new))
            rows = [was[side.before.index(o)] if o in side.before else was[1:].mean(0) for o in side.now[1:]]
            torch.testing.assert_close(now[1:], torch.stack(rows))
            torch.testing.assert_close(now[0], now[1:].mean(0))


# --- every kind of model --------------------------------------------------------------------------------------------
def test_every_model_is_carried_over_or_refused(ratings):
    "A class that joins the registry has to be thought of: here, or by its shapes"
    own = {name for name, o in CollabModel.registry.items() if o.__module__.startswith('collab_deep.')}
    assert own == {'DotProduct', 'DotProductBias', 'EmbeddingNN', 'FactorModel', 'Histories', 'EASE', 'iALS',
                   'Ensemble', 'Blend', 'KeepsSequences', 'SASRec'}
    with pytest.raises(NotImplementedError): by_shape(Histories(4, 5), *known(4, 5))


def known(n_users, n_items):
    return [KnownRows(name, list(range(n)), list(range(n))) for name, n in (('user', n_users), ('item', n_items))]


def test_ease_is_solved_anew_with_its_settings(ratings):
    first, second = days(ratings)
    old, _ = silently(fit_model, loaders(first), 'ease', config=dict(reg=7., strength=.2))
    new, said = silently(collab_deep_learner, loaders(second), model=old)
    assert said.endswith('; fit solves EASE anew\n') and (new.model.reg, new.model.strength) == (7., .2)
    with new.no_bar(), new.no_logging(): new.fit(1)
    fresh, _ = silently(fit_model, loaders(second), 'ease', config=dict(reg=7., strength=.2))
    torch.testing.assert_close(new.model.weights, fresh.model.weights)


def test_blends_of_solved_models(ratings):
    first, second = days(ratings)
    old, _ = silently(fit_model, loaders(first), 'blend', 3, n_factors=3, config=dict(shares=[1, 3]))
    new, _ = silently(collab_deep_learner, loaders(second), model=old)
    ials = [o.model.members[1] for o in (old, new)]
    torch.testing.assert_close(ials[1].users.weight[1:-1], ials[0].users.weight[2:])
    assert ials[1].unseen == ials[0].unseen and new.model.shares == [.25, .75]
    with new.no_bar(), new.no_logging(): new.fit(1)
    assert new.model.members[0].weights.abs().max() > 0


def test_blends_of_trained_models(ratings):
    "EASE in a blend that fit cannot solve would score 0 for ever"
    first, second = days(ratings)
    d = loaders(first)
    ease, _ = silently(fit_model, d, 'ease')
    dot, _ = silently(fit_model, d, 'bpr', 1)
    mixed = collab_deep_learner(d, model=Blend.of([ease.model, dot.model]))
    with pytest.raises(TypeError, match='has members that are trained'):
        collab_deep_learner(loaders(second), model=mixed)
    with pytest.raises(TypeError, match='partial_fit each of their learners'): partial_fit(mixed, second)


def test_lists_are_those_of_the_data(ratings):
    "By hand: own row + sum of what the lists hold today, through the old tables, over the root of their length"
    first, second = days(ratings)
    d1, d2 = loaders(first), loaders(second)
    old = collab_deep_learner(d1, model=randomised(factor_model(d1, 3, STARS)))
    new, _ = silently(collab_deep_learner, d2, model=old)
    m, users, items = old.model, list(d1.classes['user']), list(d1.classes['item'])
    def row(side, o, ids, tables, other):
        own = torch.cat([getattr(m, f'{side}').weight[ids.index(o)], getattr(m, f'{side}_bias').weight[ids.index(o)]])
        column, by = ('user', 'item') if side == 'users' else ('item', 'user')
        listed = second[second[column] == o][by]
        rows = [tables[other.index(x)] if x in other else tables[1:].mean(0) for x in listed]
        return own + sum(rows)/len(rows)**.5
    with torch.no_grad():
        u, i = row('users', 5, users, m.items_of.weight, items), row('items', 3, items, m.users_of.weight, users)
        score = (u[:-1]*i[:-1]).sum() + u[-1] + i[-1] + m.mean
    assert predict(new, 5, 3) == pytest.approx(float(torch.sigmoid(score)*5.5), abs=1e-5)


def test_the_same_lists_give_the_same_predictions(ratings):
    d = loaders(ratings)
    old = collab_deep_learner(d, model=randomised(factor_model(d, 3, STARS)))
    new, _ = silently(collab_deep_learner, loaders(ratings.sample(frac=1, random_state=0)), model=old)
    np.testing.assert_allclose(predict(new, ratings), predict(old, ratings), atol=1e-6)


def test_features_go_by_id(ratings, tmp_path):
    "Item 8 was known by its features alone and is rated now; item 9 still is; item 10 is new and has average ones"
    first = ratings[(ratings.user < 12) & (ratings['item'] < 8)]
    second = pd.concat([ratings[ratings.user > 1], pd.DataFrame(dict(user=[2, 3], item=[10, 10], rating=[1., 5]))])
    films = pd.DataFrame(dict(genre=list('abcabcabac')), index=range(10))
    d1 = loaders(first)
    old = collab_deep_learner(d1, model=randomised(factor_model(d1, 3, STARS, False, item_features=films)))
    new, _ = silently(collab_deep_learner, loaders(second), model=old)
    both = in_both(first, second)
    np.testing.assert_allclose(predict(new, both), predict(old, both), atol=1e-6)
    assert old.model.cold == ([], [8, 9]) and new.model.cold == ([], [9])
    for item in (8, 9): assert predict(new, 4, item) == pytest.approx(predict(old, 4, item), abs=.02)
    torch.testing.assert_close(new.model.item_features[-1], old.model.item_features[0])  # item 10
    assert predict(load_recommender(save_recommender(new, tmp_path)), 4, 9) == pytest.approx(predict(new, 4, 9))


# --- refused, not copied wrongly ------------------------------------------------------------------------------------
class Remembers(DotProduct):
    "Adds a number for each user that no parameter shows"
    def __init__(self, n_users, n_items, n_factors=2, y_range=None, std=1.):
        super().__init__(n_users, n_items, n_factors, y_range, std)
        self.extra = torch.arange(n_users)**2.
    def forward(self, x): return super().forward(x) + self.extra[x[:, 0]]

class Hashed(DotProduct):
    def forward(self, x): return super().forward(torch.stack([x[:, 0] % 3, x[:, 1]], 1))

class HalfAsMany(DotProduct):
    def __init__(self, n_users, n_items, n_factors=2, y_range=None, std=1.):
        super().__init__(n_users, n_items, n_factors, y_range, std)
        self.pairs_of = nn.Embedding(n_users//2 + 1, n_factors)
    def forward(self, x): return super().forward(x) + self.pairs_of(x[:, 0]//2).sum(1)

class Counts(DotProduct):
    def __init__(self, n_users, n_items, n_factors=2, y_range=None, std=1.):
        super().__init__(n_users, n_items, n_factors, y_range, std)
        self.register_buffer('counts', torch.zeros(n_items))

class Square(DotProduct):
    def __init__(self, n_users, n_items, n_factors=2, y_range=None, std=1.):
        super().__init__(n_users, n_items, n_factors, y_range, std)
        self.both = nn.Parameter(torch.zeros(n_users, n_items))

class Stricter(EASE): "Has settings that nobody here knows of"

class Weighed(Ensemble): "Has weights of its own"


@pytest.mark.parametrize('make, text', [
    (Remembers, 'keeps more of its users'), (Hashed, 'keeps more of its users'), (Counts, 'counts of Counts depends'),
    (Square, 'both of Square depends'), (Stricter, 'cannot be carried over'), (HalfAsMany, 'HalfAsMany'),
    (lambda u, i: Weighed.of([DotProduct(u, i, 2)]), 'Weighed cannot be')], ids=lambda o: getattr(o, '__name__', None))
@pytest.mark.parametrize('gone', [1, 2])
def test_a_model_that_nobody_knows_is_refused(make, text, gone):
    "One that gives its numbers to other ids than the copy would is found out by what it says"
    users = KnownRows('user', list(range(13)), [0, *range(1+gone, 13)])
    items = KnownRows('item', list(range(9)), [0, *range(1+gone, 9)])
    model = make(13, 9)
    before = dict(user=users.before, item=items.before)
    dls = type('Loaders', (), dict(user='user', item='item', classes=dict(user=users.now, item=items.now)))
    with pytest.raises(TypeError, match=text): carried_over(model, before, dls)


@pytest.mark.parametrize('change, kind', [(str, 'text'), (float, None)])
def test_ids_of_another_type(ratings, change, kind):
    "Text is refused with both types; floats that are whole are the same ids"
    old = collab_deep_learner(loaders(ratings), model=SIMPLE['dot'](loaders(ratings)))
    for column in ('user', 'item'):
        second = loaders(ratings.astype({column: change}))
        if kind is None:
            assert silently(collab_deep_learner, second, model=old)[1].startswith('12 of 12 users and 9 of 9 items')
            continue
        with pytest.raises(TypeError, match=f'{column} .* is text, and those in training are a number: convert it'):
            collab_deep_learner(second, model=old)


def test_no_id_in_common(ratings):
    old = collab_deep_learner(loaders(ratings), model=SIMPLE['dot'](loaders(ratings)))
    for column, such in (('user', '1001'), ('item', '1000')):
        other = loaders(ratings.assign(**{column: ratings[column] + 1000}))
        with pytest.raises(ValueError, match=rf'none of the \d+ ids of {column} is known .* found {such}.*\(int\)'):
            collab_deep_learner(other, model=old)
    with pytest.raises(TypeError, match='user False is a bool'):
        check_known(KnownRows('user', ['#na#', 0, 1], ['#na#', False, True]))


def test_a_bare_model_is_refused_and_says_what_to_give(ratings):
    first, second = days(ratings)
    old = collab_deep_learner(loaders(first), model=SIMPLE['dot'](loaders(first)))
    with pytest.raises(ValueError, match='made for other ids.*give its learner or a Recommender, whose rows are found'):
        collab_deep_learner(loaders(second), model=old.model)
    old.dls = loaders(second)  # ids that are not those of the model
    with pytest.raises(ValueError, match='the model was made for other ids'):
        collab_deep_learner(loaders(second), model=old)


def test_contradictions(ratings):
    first, second = days(ratings)
    old = collab_deep_learner(loaders(first), model=SIMPLE['bias'](loaders(first)), loss=nn.HuberLoss())
    new, _ = silently(collab_deep_learner, loaders(second), model=old)
    assert new.collab_loss is old.collab_loss and isinstance(new.loss_func, nn.HuberLoss)
    assert silently(collab_deep_learner, loaders(second), model=old, loss='mse')[0].collab_loss.name == 'mse'
    for given, text in [(dict(loss='bpr'), "'bpr' is a loss on the order of lists"),
                        (dict(n_factors=7), 'made already'),
                        (dict(y_range=(0, 9)), r'y_range=\(0.0, 9.0\) beside a model whose own is \(0.0, 5.5\)')]:
        with pytest.raises(ValueError, match=text): collab_deep_learner(loaders(second), model=old, **given)
    with pytest.raises(ValueError, match='ratings go from 1 to 9, and y_range .* leaves some of them out'):
        collab_deep_learner(loaders(second.replace(dict(rating={5.: 9.}))), model=old)
    clicks = loaders(second[['user', 'item']])
    with pytest.raises(ValueError, match='choose loss='): collab_deep_learner(clicks, model=old)
    with pytest.raises(ValueError, match="'softmax' is a loss on the order of lists"):
        collab_deep_learner(clicks, model=as_recommender(old))


def test_tables_in_parts_are_refused(ratings):
    d = loaders(ratings)
    old = collab_deep_learner(d, model=SIMPLE['dot'](d))
    old.model.shards = 'elsewhere'
    with pytest.raises(ValueError, match='to start from a model reads whole tables'): collab_deep_learner(d, model=old)


# --- other sources --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', SIMPLE)
def test_a_loaded_recommender(ratings, name, tmp_path):
    first, second = days(ratings)
    old = collab_deep_learner(loaders(first), model=randomised(SIMPLE[name](loaders(first))))
    rec = load_recommender(save_recommender(old, tmp_path))
    new, _ = silently(collab_deep_learner, loaders(second), model=rec)
    both = in_both(first, second)
    np.testing.assert_allclose(predict(new, both), predict(old, both), atol=1e-6)
    if name == 'ials': return
    with new.no_bar(), new.no_logging(): new.fit(1)


def test_a_loaded_recommender_of_lists(ratings, tmp_path):
    first, second = days(ratings)
    old, _ = silently(fit_model, loaders(first), 'softmax', 1)
    rec = load_recommender(save_recommender(old, tmp_path))
    with pytest.raises(ValueError, match="keeps no loss.*say which loss, as in loss='softmax' or 'bpr'"):
        collab_deep_learner(loaders(second), model=rec)
    new, _ = silently(collab_deep_learner, loaders(second), model=rec, loss='softmax')
    assert new.ranks
    again, _ = silently(collab_deep_learner, loaders(second), model=old)
    assert again.collab_loss.name == 'softmax'


def test_learners_of_fastai(ratings):
    first, second = days(ratings)
    dls = CollabDataLoaders.from_df(first, valid_pct=0, bs=16, device='cpu')
    old = collab_learner(dls, n_factors=3, y_range=STARS)
    new, said = silently(collab_deep_learner, loaders(second), model=old)
    assert said.startswith('10 of 11 users') and new.model.y_range == STARS
    assert predict(new, 5, 3) == pytest.approx(predict(old, 5, 3), abs=1e-6)
    model = randomised(DotProduct(12, 9, 2))
    plain = Learner(loaders(first), model, nn.L1Loss())
    assert isinstance(silently(collab_deep_learner, loaders(second), model=plain)[0].loss_func, nn.L1Loss)
    assert not hasattr(model, 'facts')  # looking at it leaves nothing behind


# --- partial_fit ----------------------------------------------------------------------------------------------------
KINDS = ['dot', 'nn', 'factor', 'bpr', 'softmax', 'ease', 'ials', 'blend']

@pytest.mark.parametrize('kind', KINDS)
def test_partial_fit_of_each_kind(ratings, kind, tmp_path):
    first, arrived = ratings[(ratings.user < 12) & (ratings['item'] < 8)], ratings[ratings.user == 12]
    old, _ = silently(fit_model, loaders(first), kind, 2)
    state = {n: o.clone() for n, o in old.model.state_dict().items()}
    new, said = silently(partial_fit, old, arrived)
    assert said.startswith('6 new rows. 11 of 12 users and 8 of 9 items known from before; ')
    assert list(new.dls.classes['user']) == ['#na#', *range(1, 13)] and new.ranks == old.ranks
    assert all(torch.equal(o, state[n]) for n, o in old.model.state_dict().items())
    assert type(new.model) is type(old.model) and np.isfinite(predict(new, ratings)).all()
    found = training_rows(new.dls).sort_values(['user', 'item'], ignore_index=True)
    pd.testing.assert_frame_equal(found, pd.concat([first, arrived], ignore_index=True), check_dtype=False)
    load_recommender(save_recommender(new, tmp_path))
    again, _ = silently(partial_fit, new, arrived.assign(user=77))
    assert again.dls.n_users == 14


def test_partial_fit_of_ease_is_exact(ratings):
    old, _ = silently(fit_model, loaders(ratings[ratings.user < 12]), 'ease', config=dict(reg=3.))
    new, _ = silently(partial_fit, old, ratings[ratings.user == 12])
    fresh, _ = silently(fit_model, loaders(ratings), 'ease', config=dict(reg=3.))
    torch.testing.assert_close(new.model.weights, fresh.model.weights)


def test_weights_of_a_loss_are_not_taken_for_a_column(ratings):
    "A ranking weighs rows by their stars: twice so after a second look, and 0 for the lowest for ever, if they stuck"
    first, arrived = ratings[ratings.user < 12], ratings[ratings.user == 12]
    new, _ = silently(partial_fit, silently(fit_model, loaders(first), 'bpr', 1)[0], arrived)
    fresh, _ = silently(fit_model, loaders(ratings), 'bpr', 1)
    def weights(learn): return training_rows(learn.dls, 'w').sort_values(['user', 'item'], ignore_index=True)
    pd.testing.assert_frame_equal(weights(new), weights(fresh), check_dtype=False)


@pytest.mark.parametrize('kind', ['dot', 'softmax', 'ease'])
def test_a_column_of_weights_is_followed(ratings, kind):
    ratings = ratings.assign(times=1. + ratings.index % 4)
    first, arrived = ratings[ratings.user < 12], ratings[ratings.user == 12]
    old, _ = silently(fit_model, loaders(first, weight_name='times'), kind, 1)
    new, _ = silently(partial_fit, old, arrived, weight_name='times')
    fresh, _ = silently(fit_model, loaders(ratings, weight_name='times'), kind, 1)
    def weights(learn): return training_rows(learn.dls, 'w').sort_values(['user', 'item'], ignore_index=True)
    pd.testing.assert_frame_equal(weights(new), weights(fresh), check_dtype=False)
    with pytest.raises(ValueError, match='new ones need some'): partial_fit(old, arrived)
    bare, _ = silently(fit_model, loaders(first), kind, 1)
    with pytest.raises(ValueError, match='rows have no weights'): partial_fit(bare, arrived, weight_name='times')


def test_pairs_that_come_again(ratings):
    old, _ = silently(fit_model, loaders(ratings), 'dot', 1)
    again = pd.DataFrame(dict(user=[1, 12], item=[0, 1], rating=[2., 2]))  # both are there
    new, said = silently(partial_fit, old, again, epochs=0)
    assert said.startswith('2 new rows, in place of 2 old ones of the same pairs. ')
    found = training_rows(new.dls).merge(again[['user', 'item']])
    assert len(found) == 2 and set(found.rating) == {2.} and len(new.dls.train.dataset) == len(ratings)
    kept, _ = silently(partial_fit, old, again, epochs=0, duplicates='keep')
    assert len(kept.dls.train.dataset) == len(ratings) + 2
    with pytest.raises(ValueError, match="duplicates is 'last'"): partial_fit(old, again, duplicates='mean')


def test_new_rows_that_say_a_pair_twice(ratings):
    "The later one counts, by time where a column says so, and the rows may be of categories"
    old, _ = silently(fit_model, loaders(ratings), 'dot', 1)
    twice = pd.DataFrame(dict(user=[1, 1], item=[0, 0], rating=[4., 3], timestamp=[9, 2]))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        new, _ = silently(partial_fit, old, twice.astype(dict(user='category')), epochs=0)
    assert any("1 rows are left out for a later one of the same pair, by the column 'timestamp'" in str(o.message)
               for o in said)
    found = training_rows(new.dls)
    assert found[(found.user == 1) & (found['item'] == 0)].rating.tolist() == [4.]


def test_a_loss_that_was_replaced(ratings):
    first, second = days(ratings)
    old = collab_deep_learner(loaders(first), model=SIMPLE['dot'](loaders(first)))
    old.loss_func = nn.L1Loss()
    assert isinstance(silently(collab_deep_learner, loaders(second), model=old)[0].loss_func, nn.L1Loss)


def test_validation_stays_and_is_not_given_away(ratings):
    n, valid = len(ratings), range(0, 70, 7)
    dls = RatingsDataLoaders.from_df(ratings, splits=(sorted({*range(n)} - {*valid}), valid), bs=16, device='cpu')
    old, _ = silently(fit_model, dls, 'dot', 1)
    held = ratings.iloc[[0, 7]]
    new, said = silently(partial_fit, old, pd.concat([held, ratings.tail(3).assign(user=0)]), epochs=1)
    assert said.startswith('3 new rows; 2 more left out, whose pairs are held out for validation. ')
    x, y = new.dls.ratings_of('valid')
    ids = [[list(new.dls.classes[name])[row] for name, row in zip(('user', 'item'), pair)] for pair in x.tolist()]
    assert ids == ratings.iloc[valid][['user', 'item']].values.tolist() and y.tolist() == list(ratings.rating[valid])
    assert 0 in list(new.dls.classes['user'])
    with new.no_bar(), new.no_logging(): assert np.isfinite(new.validate()[0])


def test_interactions_add_up(ratings):
    clicks = ratings[['user', 'item']]
    old, _ = silently(fit_model, loaders(clicks), 'ials', 1, n_factors=2)
    new, said = silently(partial_fit, old, clicks[:5])
    assert said.startswith('5 new rows. ') and len(new.dls.train.dataset) == len(clicks) + 5


def test_new_rows_that_do_not_fit(ratings):
    old, _ = silently(fit_model, loaders(ratings), 'dot', 1, y_range=STARS)
    for change, exc, text in [
            (lambda o: o.drop(columns='rating'), ValueError, r"new rows lack \['rating'\]"),
            (lambda o: o.assign(user=o.user.astype(str)), TypeError, 'is text, and those in training are a number'),
            (lambda o: o.assign(rating=np.nan), ValueError, 'not finite'),
            (lambda o: o.assign(rating=o.rating*10), ValueError, 'widen it'), (lambda o: o[:0], ValueError, 'empty'),
            (lambda o: 'rows.csv', TypeError, 'expected ratings in a DataFrame')]:
        with pytest.raises(exc, match=text): silently(partial_fit, old, change(ratings[:5]))
    with pytest.raises(TypeError, match='goes on with a learner of collab_deep'): partial_fit(old.model, ratings)
    with pytest.raises(TypeError, match='found Recommender. Start from a Recommender'):
        partial_fit(as_recommender(old), ratings)


def test_members_of_an_ensemble_train_apart(ratings):
    first, arrived = ratings[ratings.user < 12], ratings[ratings.user == 12]
    d = loaders(first)
    parts = [silently(fit_model, d, 'dot', 1, seed=seed)[0] for seed in (0, 1)]
    old = collab_deep_learner(d, model=Ensemble.of([o.model for o in parts]), loss='mse')
    new, _ = silently(partial_fit, old, arrived)
    for i, m in enumerate(new.model.members):
        assert not torch.equal(m.users.weight[1:12], parts[i].model.users.weight[1:])
    assert not torch.equal(*(m.users.weight for m in new.model.members))
    np.testing.assert_allclose(predict(new, arrived), sum(
        np.asarray(predict(collab_deep_learner(new.dls, model=m), arrived)) for m in new.model.members)/2, rtol=1e-5)


def test_an_exported_learner_holds_no_rows(ratings, tmp_path):
    from fastai.learner import load_learner
    old, _ = silently(fit_model, loaders(ratings, path=tmp_path), 'dot', 1)
    old.export('x.pkl')
    with pytest.raises(ValueError, match='holds no training rows'): partial_fit(load_learner(tmp_path/'x.pkl'), ratings)


def test_metrics_rates_and_settings_go_along(ratings):
    def off(preds, targs): return (preds - targs).abs().mean()
    first, arrived = ratings[ratings.user < 12], ratings[ratings.user == 12]
    old = collab_deep_learner(loaders(first, 8), model=SIMPLE['bias'](loaders(first)), lr=.003, wd=.7, metrics=off)
    new, _ = silently(partial_fit, old, arrived)
    assert (new.lr, new.wd, new.dls.train.bs) == (.003, .7, 8) and [o.name for o in new.metrics] == ['off']
    assert silently(partial_fit, old, arrived, lr=.1)[0].lr == .1
