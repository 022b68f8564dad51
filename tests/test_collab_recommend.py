"Lists from a model: properties over many small catalogues, without training"
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from hypothesis import given, settings, strategies as st

from collab_deep.lists.evaluate import evaluate_ratings
from collab_deep.use.explain import explain, item_bias, nearest_seen, plot_factors, similar_items, similar_users
from collab_deep.models.factor import FactorModel
from collab_deep.lists.fold_in import fold_in
from collab_deep.data.loaders import RatingsDataLoaders
from collab_deep.models.dot import DotProduct, DotProductBias
from collab_deep.lists.recommend import predict_pairs, recommend
from collab_deep.lists.recommender import as_recommender, scoring
from collab_deep.lists.top import top_k
from collab_deep.use.save import load_recommender, save_recommender
from small_recommender import MODELS, recommender

def pairs_of(n_users, n_items): return st.sets(st.tuples(st.integers(1, n_users), st.integers(1, n_items)))

catalogues = st.tuples(st.integers(1, 8), st.integers(1, 12)).flatmap(
    lambda n: st.tuples(st.just(n), pairs_of(*n), st.sampled_from(MODELS), st.integers(0, 99)))


@settings(max_examples=60, deadline=None)
@given(catalogues, st.integers(1, 20))
def test_never_what_was_seen_and_all_the_rest(catalogue, k):
    (n_users, n_items), pairs, make, seed = catalogue
    rec = recommender(pairs, range(100, 100 + n_users), [f't{i}' for i in range(1, n_items + 1)], make, seed)
    lists = recommend(rec, range(100, 100 + n_users), k)
    everyone = torch.arange(1, n_users + 1)  # as many as there, since rounding depends on it
    with scoring(rec.model) as model: scores = model.scores(everyone)
    for u in range(1, n_users + 1):
        unseen = [i for i in range(1, n_items + 1) if (u, i) not in pairs]
        by_hand = sorted(unseen, key=lambda i: (-scores[u - 1, i].item(), i))[:k]
        mine = lists[lists.user == 99 + u]
        assert mine['item'].tolist() == [f't{i}' for i in by_hand]
        assert mine.score.tolist() == [scores[u - 1, i].item() for i in by_hand]
    assert len(recommend(rec, 100, k, exclude_seen=False)) == min(k, n_items)


@settings(max_examples=30, deadline=None)
@given(catalogues, st.randoms(use_true_random=False))
def test_new_names_change_nothing_but_names(catalogue, random):
    (n_users, n_items), pairs, make, seed = catalogue
    names = [f'n{i}' for i in range(n_items)]
    random.shuffle(names)
    one = recommender(pairs, range(n_users), range(n_items), make, seed)
    other = recommender(pairs, [str(u) for u in range(n_users)], names, make, seed)
    a, b = recommend(one, list(range(n_users)), 5), recommend(other, [str(u) for u in range(n_users)], 5)
    assert [names[o] for o in a['item']] == b['item'].tolist() and a.score.tolist() == b.score.tolist()
    assert a.user.astype(str).tolist() == b.user.tolist()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(1, 15), st.integers(1, 20), st.integers(0, 999))
def test_top_k_is_a_stable_sort(n, m, k, seed):
    rng = np.random.default_rng(seed)
    scores = rng.choice([-np.inf, 0., 1., 2., np.inf], (n, m)).astype('float32')
    values, cols = top_k(torch.from_numpy(scores.copy()), k)
    expected = np.argsort(-scores, axis=1, kind='stable')[:, :k]
    assert cols.tolist() == expected.tolist() and values.tolist() == np.take_along_axis(scores, expected, 1).tolist()


PAIRS = [(1, 1), (1, 2), (1, 3), (2, 2)]  # the first user has rated everything


def test_who_saw_everything_has_an_empty_list():
    rec = recommender(PAIRS, ['a', 'b'], ['x', 'y', 'z'])
    assert recommend(rec, 'a').shape == (0, 2) and list(recommend(rec, 'a')) == ['item', 'score']
    both = recommend(rec, ['a', 'b', 'a'])
    assert both.user.tolist() == ['b', 'b'] and set(both['item']) == {'x', 'z'}
    assert len(recommend(rec, [])) == 0
    assert len(recommend(rec, pd.Series(['b']))) == len(recommend(rec, np.array(['b']))) == 2


def test_blocks_of_one_user_give_the_same(monkeypatch):
    rec = recommender([(u, 1 + u % 7) for u in range(1, 30)], range(29), range(9))
    whole = recommend(rec, range(29), 4)
    monkeypatch.setattr('collab_deep.lists.top._scores_in_a_block', 5)
    pd.testing.assert_frame_equal(recommend(rec, range(29), 4), whole, check_exact=False, rtol=1e-5)


def test_a_model_is_left_as_it_was():
    for make in MODELS:
        rec = recommender(PAIRS, ['a', 'b'], ['x', 'y', 'z'], make)
        rec.model.train()
        before = {k: v.clone() for k, v in rec.model.state_dict().items()}
        recommend(rec, 'b')
        recommend(rec, {'x': 5.})
        predict_pairs(rec, 'a', 'x')
        assert rec.model.training and all(torch.equal(v, before[k]) for k, v in rec.model.state_dict().items())
        assert no_tables_are_kept(rec.model), 'tables of a FactorModel are still those of before'


def no_tables_are_kept(model): return model.kept_tables is None and not {'user_table', 'item_table'} & set(vars(model))


def test_an_error_leaves_a_model_as_it_was():
    rec = recommender(PAIRS, ['a', 'b'], ['x', 'y', 'z'], MODELS[3])
    rec.model.train()
    with torch.no_grad(): rec.model.items.weight[1] = torch.nan
    with pytest.raises(ValueError, match='a score is NaN'): recommend(rec, 'b')
    assert rec.model.training and no_tables_are_kept(rec.model)


@pytest.mark.parametrize('user, near', [('196', '; the nearest are 196'), (1960, '; the nearest are 196'),
                                        ('zebra', '.'), (None, '.')])
def test_an_unknown_user_and_the_nearest(user, near):
    rec = recommender([(1, 1)], [196, 22], ['x', 'y'])
    message = f'user {user!r} is not among the 2 in training{near}'
    with pytest.raises(KeyError, match=re.escape(message)): recommend(rec, user)
    beside = [user, user] if user == 1960 else [22, user]  # who is simply new has a row beside known users
    with pytest.raises(KeyError, match=re.escape(message)): recommend(rec, beside)
    with pytest.raises(KeyError): similar_users(rec, user)


def test_the_place_of_unknown_ids_is_nobody():
    rec = recommender(PAIRS, ['a', 'b'], ['x', 'y', 'z'])
    with pytest.raises(KeyError): recommend(rec, '#na#')
    with torch.no_grad(): rec.model.items_bias.weight[0] = 99
    for table in (recommend(rec, 'b', 9, exclude_seen=False), similar_items(rec, 'x'), item_bias(rec)):
        assert '#na#' not in set(table['item'])
    assert predict_pairs(rec, 'nobody', 'x') == pytest.approx(rec.model(torch.tensor([[0, 1]])).item())


def by_plain_learner(make):
    "fastai's Learner knows nothing of row 0, which stays as it was drawn; the last of six users is held out"
    rows = pd.DataFrame(dict(user=np.arange(60) % 6, item=np.arange(60) // 6, rating=1. + np.arange(60) % 5))
    splits = np.flatnonzero(rows.user < 5), np.flatnonzero(rows.user == 5)
    dls = RatingsDataLoaders.from_df(rows, splits=splits, bs=8, device='cpu')
    learn = Learner(dls, make(dls.n_users, dls.n_items), loss_func=MSELossFlat())
    learn.fit(3, .05)
    return rows, learn


def test_unknown_ids_are_average_after_a_plain_learner():
    rows, learn = by_plain_learner(lambda u, i: DotProductBias(u, i, 3, std=1.))
    model = learn.model
    with torch.no_grad():
        match = (model.users.weight[1:].mean(0)*model.items.weight[1]).sum()
        average = match + model.user_bias[1:].mean() + model.item_bias[1]
    assert predict_pairs(learn, 5000, 0) == pytest.approx(average.item(), rel=1e-4)
    held = rows[rows.user == 5].assign(user=5000)
    assert evaluate_ratings(learn).value.mse == pytest.approx(((predict_pairs(learn, held) - held.rating)**2).mean())


@pytest.mark.parametrize('make', MODELS)
def test_reading_a_plain_learner_writes_nothing(make):
    rows, learn = by_plain_learner(make)
    before = {name: o.clone() for name, o in learn.model.state_dict().items()}
    rec = as_recommender(learn)
    evaluate_ratings(learn)
    recommend(learn, {0: 5.})
    fold_in(learn, {0: 5.})
    strangers = rows[['user', 'item']][:5].assign(user=5000)
    assert predict_pairs(learn, strangers).tolist() == predict_pairs(rec, strangers).tolist()
    assert all(torch.equal(o, before[name]) for name, o in learn.model.state_dict().items())
    for mine, theirs in ((rec.model.user_factors, learn.model.user_factors),
                         (rec.model.item_factors, learn.model.item_factors)):
        assert torch.equal(mine[1:], theirs[1:])
        torch.testing.assert_close(mine[0], theirs[1:].mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('make', MODELS)
def test_a_model_with_average_rows_is_not_copied(make):
    _, learn = by_plain_learner(make)
    assert as_recommender(learn).model is not learn.model
    learn.model.fill_unknown()
    assert as_recommender(learn).model is learn.model


def test_the_names_of_0_1_hide_nothing():
    import collab_deep.all
    from collab_deep.lists import recommend as module
    assert (module.predict, module.entries) == (module.predict_pairs, module.csr_entries)
    assert not {'predict', 'entries'} & {*vars(collab_deep.all), *module.__all__}


@pytest.mark.parametrize('k', [0, -1, 2.5, '10', True, None])
def test_a_length_that_is_none(k):
    rec = recommender(PAIRS, ['a', 'b'], ['x', 'y', 'z'])
    for f in (recommend, similar_users, nearest_seen):
        args = ('b', 'x') if f is nearest_seen else ('b',)
        message = f'k is the length of a list, a positive integer; found {k!r}'
        with pytest.raises(ValueError, match=re.escape(message)): f(rec, *args, k=k)


def test_an_item_known_by_features_alone_says_nothing_of_a_newcomer():
    def make(u, i): return FactorModel(u, i, 3, n_item_features=1, cold_items=['w'])
    rec = recommender(PAIRS, ['a', 'b'], ['x', 'y', 'z'], make)
    for f in (fold_in, recommend):
        with pytest.raises(KeyError, match="'w' (was not|is not among the 3) in training"): f(rec, {'x': 4., 'w': 5.})


def test_filters():
    rec = recommender([(2, 2)], ['a', 'b'], [1, 2, 3])
    assert set(recommend(rec, 'b', filter=lambda o: o != 3)['item']) == {1}
    for allowed in ({2, 3}, pd.Index([3]).tolist()): assert set(recommend(rec, 'b', filter=allowed)['item']) == {3}
    message = 'filter is a function of an item or a collection of items; found int: 3'
    with pytest.raises(TypeError, match=message): recommend(rec, 'b', filter=3)
    assert recommend(rec, {1: 5.}, k=9, filter={1, 2})['item'].tolist() == [2]


# --- explanations -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('make', MODELS[:2] + MODELS[3:])
def test_parts_add_up_to_the_score(make):
    rec = recommender(PAIRS, ['a', 'b'], ['x', 'y', 'z'], make)
    value = explain(rec, 'b', 'x').value
    parts = value.drop(['sum', 'score'])
    assert parts.sum() == pytest.approx(value['sum'], abs=1e-5)
    assert value.score == pytest.approx(predict_pairs(rec, 'b', 'x'), abs=1e-5)
    if not isinstance(rec.model, DotProductBias): assert value.score == pytest.approx(value['sum'], abs=1e-5)


def test_cosines_by_hand():
    rec = recommender(PAIRS, ['a', 'b'], ['x', 'y', 'z', 'still'], lambda u, i: DotProductBias(u, i, 2))
    with torch.no_grad(): rec.model.items.weight[1:] = torch.tensor([[3., 4], [6, 8], [4, -2], [0, 0]])
    alike = similar_items(rec, 'x', min_ratings=0)
    assert alike['item'].tolist() == ['y', 'z', 'still']
    assert alike.similarity.tolist() == pytest.approx([1, .8**.5/5, 0], abs=1e-6)  # 4/(5*20**.5)
    assert alike.ratings.tolist() == [2, 1, 0] and similar_items(rec, 'x', min_ratings=2)['item'].tolist() == ['y']
    assert nearest_seen(rec, 'b', 'x')['item'].tolist() == ['y']
    assert len(nearest_seen(rec, 'b', 'y')) == 0  # not like itself


def test_a_plane_takes_two():
    import matplotlib
    matplotlib.use('agg')
    rec = recommender([(1, 1)], ['a'], ['x', 'y'], lambda u, i: DotProduct(u, i, 1))
    message = 'a plane takes two items and two factors; found 2 items with 1 factors'
    with pytest.raises(ValueError, match=message): plot_factors(rec)
    assert plot_factors(recommender(PAIRS, ['a', 'b'], ['x', 'y', 'z']), top=99)['item'].tolist() == ['y', 'x', 'z']


def test_no_name_in_the_plane_covers_another():
    import matplotlib
    matplotlib.use('agg')
    from matplotlib import pyplot as plt
    rec = recommender([], ['a'], [f'a rather long name {i}' for i in range(40)])
    with torch.no_grad(): rec.model.items.weight[1:21] /= 100  # half of them nearly at one point
    figure, ax = plt.subplots(figsize=(6, 6))
    plot_factors(rec, top=40, ax=ax)
    figure.canvas.draw()
    boxes = [o.get_window_extent().padded(-1) for o in ax.texts]
    assert len(boxes) == 40 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_without_fastai():
    modules = 'lists.recommend', 'lists.evaluate', 'use.explain', 'use.save'
    code = (f"import sys, {', '.join(f'collab_deep.{o}' for o in modules)}; "
            "print([o for o in ('fastai', 'matplotlib', 'sklearn') if o in sys.modules])")
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert done.stdout == '[]\n', done.stderr


@pytest.mark.parametrize('rating', [0, 5.5, -1, 80])
def test_a_newcomers_rating_off_the_scale_of_training(rating, tmp_path):
    "Stars of five are not points of a hundred, for what is trained and for what is loaded"
    rec = replace(recommender([(1, 1), (2, 2)], ['a', 'b'], ['x', 'y', 'z']), scale=(1., 5.))
    loaded = load_recommender(save_recommender(rec, tmp_path))
    assert loaded.scale == (1, 5)
    for o in (rec, loaded):
        with pytest.raises(ValueError, match=rf'from 1 to 5, found {rating} for .x.: is it on another scale'):
            fold_in(o, dict(x=rating))
        assert fold_in(o, dict(x=5)).isfinite().all()
    before = load_recommender(save_recommender(replace(rec, scale=None), tmp_path))
    assert before.scale is None and fold_in(before, dict(x=rating)).isfinite().all()
