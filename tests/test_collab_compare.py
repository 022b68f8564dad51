"Models beside each other: intervals as SciPy's, refusals that come before any fit, and what differs said"
import math
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.tabular.all import TabDataLoader
from hypothesis import given, settings, strategies as st
from matplotlib import pyplot as plt
from scipy.stats import ttest_rel

from collab_deep.data.loaders import RatingsDataLoaders
from collab_deep.lists.evaluate import evaluate_ranking, user_metrics
from collab_deep.lists.paired import compare_rankings, paired_measures
from collab_deep.lists.recommender import as_recommender
from collab_deep.train.fit import fit_model, names_of_models
from collab_deep.train.learner import collab_deep_learner
from collab_deep.use import compare
from collab_deep.use.compare import compare_models, plot_comparison
from small_recommender import recommender

NAMES = ['value', 'difference', 'low', 'high', 'users', 'verdict']


def frame(n_users=30, n_items=20, seed=0, rated=8):
    rng = np.random.default_rng(seed)
    rows = [(u, i, r) for u in range(n_users)
            for i, r in zip(rng.choice(n_items, rated, replace=False), rng.integers(1, 6, rated))]
    return pd.DataFrame(rows, columns=['user', 'item', 'rating'])


def loaders(df=None, **kwargs):
    kwargs = dict(seed=0, bs=64, device='cpu') | kwargs
    return RatingsDataLoaders.from_df(frame() if df is None else df, **kwargs)


def learner(dls, seed=0):
    "Not trained, which makes lists too"
    torch.manual_seed(seed)
    return collab_deep_learner(dls, n_factors=4, loss='mse', config=dict(std=1.))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.integers(3, 8), st.integers(1, 5), st.sampled_from(paired_measures), st.integers(0, 99))
def test_the_interval_is_that_of_scipy(n_users, n_items, k, measure, seed):
    rng = np.random.default_rng(seed)
    users, items = [f'u{i}' for i in range(n_users)], [f't{i}' for i in range(n_items)]
    pairs = [(u, i) for u in range(1, n_users + 1) for i in rng.choice(n_items - 2, 1) + 1]
    recs = {o: recommender(pairs, users, items, seed=o) for o in range(3)}
    held = pd.DataFrame([(u, i) for u in users for i in items[-2:]], columns=['user', 'title'])
    values = pd.DataFrame({o: user_metrics(rec, k, ratings=held)[measure] for o, rec in recs.items()}).dropna()
    if len(values) < 2:
        with pytest.raises(ValueError, match='needs two users or more .*, found 0'):
            compare_rankings(recs, k, ratings=held, measure=measure)
        return
    for beside in (None, 1):
        found = compare_rankings(recs, k, ratings=held, measure=measure, beside=beside)
        assert found.columns.tolist() == NAMES and found.users.eq(len(values)).all()
        assert found['value'].is_monotonic_decreasing and found.index.name == f'{measure} at {k}'
        base = found.index[0] if beside is None else 1
        assert found.attrs == dict(measure=measure, k=k, beside=base, level=.95, threshold=None)
        assert found.verdict[base] == ('best' if beside is None else 'baseline')
        for name, row in found.drop(index=base).iterrows():
            d = values[name] - values[base]
            assert row['value'] == pytest.approx(values[name].mean()) and row.difference == pytest.approx(d.mean())
            low, high = row.low, row.high
            if d.std() > 1e-12:
                theirs = ttest_rel(values[name], values[base]).confidence_interval(.95)
                assert [low, high] == pytest.approx([theirs.low, theirs.high])
                assert row.verdict == ('better' if theirs.low > 0 else 'worse' if theirs.high < 0 else 'level')
            else: assert [low, high] == pytest.approx([d.mean()]*2, abs=1e-9)


def test_a_model_beside_itself_is_level():
    learn = learner(loaders())
    found = compare_rankings(dict(a=learn, b=learn), 3)
    assert found.index.tolist() == ['a', 'b'] and found.verdict.tolist() == ['best', 'level']
    assert found.loc['b', ['difference', 'low', 'high']].tolist() == [0, 0, 0]
    assert found['value'].a == pytest.approx(evaluate_ranking(learn, 3).value.ndcg)


def test_a_fastai_learner_stands_beside_ours():
    df = frame().astype({'user': str, 'item': str})
    theirs = CollabDataLoaders.from_df(df, valid_pct=.2, seed=0, bs=32, dl_type=TabDataLoader)
    learn = collab_learner(theirs, n_factors=4, y_range=(0, 6))
    valid = theirs.valid.items.index.tolist()
    splits = [i for i in range(len(df)) if i not in set(valid)], valid
    ours = learner(loaders(df, splits=splits))
    found = compare_rankings(dict(ours=ours, theirs=learn), 3, 3)
    assert found['value'].ours == pytest.approx(evaluate_ranking(ours, 3, 3).value.ndcg)
    assert found['value'].theirs == pytest.approx(evaluate_ranking(learn, 3, 3).value.ndcg)


def test_what_sets_models_apart_is_said():
    df = frame()
    rows = list(range(len(df)))
    base = learner(loaders(splits=(rows[::2], rows[1::2])))
    def refused(other, message):
        with pytest.raises(ValueError, match=f"^'a' and 'b' cannot be compared, for they differ in {message}"):
            compare_rankings(dict(a=base, b=other), 3)
    refused(learner(loaders(splits=(rows[::2] + [1], rows[3::2]))), "pairs in training: 0 only in 'a' and 1 only in "
            rf"'b', such as user {df.user[1]} with item {df.item[1]} in 'b'")
    refused(learner(loaders(splits=(rows[::2], rows[1:-2:2]))), "relevant held-out pairs: 1 only in 'a' and 0 only")
    refused(learner(loaders(df.rename(columns=dict(item='film')), splits=(rows[::2], rows[1::2]))),
            r"ids: columns \['user', 'item'\] in 'a' and \['user', 'film'\] in 'b'")
    refused(learner(loaders(df[df.user != 3].reset_index(drop=True))), "ids: user: ids 3 only in 'a'")
    new = pd.concat([df, df[-2:].assign(item=99)])
    splits = rows[::2], [*rows[1::2], len(df)]
    refused(learner(loaders(new, splits=splits)), 'held-out items that training did not have')


def test_rows_that_training_has_are_told_once():
    df = frame()
    learners = {o: learner(loaders(), o) for o in (1, 2, 3)}
    with pytest.warns(UserWarning, match='training has .* of the 240 held-out rows, too') as caught:
        compare_rankings(learners, 3, ratings=df)
    assert [o.filename for o in caught] == [__file__]


@pytest.mark.parametrize('kwargs, error, message', [
    (dict(measure='coverage'), ValueError, r"measure is one that each user has, of \['precision', .*found 'coverage'"),
    (dict(measure=['ndcg']), ValueError, r"found \['ndcg'\]"),
    (dict(beside='c'), ValueError, r"beside is the name of one of the models, of \['a'\]; found 'c'"),
    (dict(beside=['a']), ValueError, r"beside is the name of one of the models, .*; found \['a'\]"),
    (dict(k=0), ValueError, 'k is the length of a list'), (dict(threshold='4'), ValueError, 'threshold is a finite'),
    (dict(learners={}), ValueError, 'expected a model or more to compare, found none'),
    (dict(learners=[1]), TypeError, 'expected learners by name, as a dict; found list')])
def test_arguments_that_mean_nothing(kwargs, error, message):
    args = dict(learners=dict(a=learner(loaders()))) | kwargs
    with pytest.raises(error, match=message): compare_rankings(**args)


def test_one_user_has_no_interval():
    rec = recommender([(1, 1)], ['a', 'b'], ['x', 'y'])
    held = pd.DataFrame(dict(user=['a'], title=['y']))
    with pytest.raises(ValueError, match='two users or more whose lists can be measured, found 1'):
        compare_rankings(dict(a=rec, b=rec), 1, ratings=held)


def test_scores_that_are_no_numbers_name_their_model():
    rec = recommender([(1, 1)], ['a', 'b'], ['x', 'y', 'z'])
    bad = recommender([(1, 1)], ['a', 'b'], ['x', 'y', 'z'])
    with torch.no_grad():
        for p in bad.model.parameters(): p.fill_(math.nan)
    held = pd.DataFrame(dict(user=['a', 'b'], title=['y', 'y']))
    with pytest.raises(ValueError, match='a score is NaN') as e: compare_rankings(dict(a=rec, b=bad), 1, ratings=held)
    assert e.value.__notes__ == ["while measuring 'b'"]


# --- fits -----------------------------------------------------------------------------------------------------------
@pytest.fixture
def by_name(monkeypatch):
    "Names are fitted by a stand-in, which keeps what it was asked for and the first random numbers that it saw"
    asked = []
    def fit_model(dls, name, seed):
        drawn = seed, torch.rand(1).item(), np.random.rand()
        asked.append((name, drawn))
        return collab_deep_learner(dls, n_factors=4, loss='mse', config=dict(std=1.))
    monkeypatch.setattr(compare, 'fit_model', fit_model)
    return asked


def test_names_are_fitted_one_after_the_other_from_the_same_seed(by_name):
    dls = loaders()
    found = compare_models(dls, ['ease', 'bpr', 'auto'], k=3, threshold=3, seed=7)
    names, drawn = zip(*by_name)
    assert names == ('ease', 'bpr', 'auto') and len(set(drawn)) == 1 and drawn[0][0] == 7
    assert found.columns.tolist() == [*NAMES, 'seconds'] and sorted(found.index) == ['auto', 'bpr', 'ease']
    assert found['value'].nunique() == 1 and (found.seconds >= 0).all()  # the same seed, the same model
    assert found.attrs == dict(measure='ndcg', k=3, beside='ease', level=.95, threshold=3, seed=7)
    assert compare_models(dls, ['ease'], k=3, threshold=3, seed=8)['value'].ease != found['value'].ease
    pd.testing.assert_frame_equal(pickle.loads(pickle.dumps(found)), found)


def test_every_name_is_known(by_name):
    names = names_of_models()
    assert sorted(compare_models(loaders(), names, k=3).index) == sorted(names)
    assert {'ease', 'ials', 'blend', 'auto', 'dot', 'nn', 'factor', 'bpr', 'softmax'} <= {*names}
    assert compare_models(loaders(), dict(mine='ease'), k=3).index.tolist() == ['mine']


@pytest.mark.parametrize('models, error, message', [
    (['ease', 'svd'], ValueError, r"a model is one of \['ease', .*\], or give a function .*; found 'svd'"),
    (dict(a='svd'), ValueError, "found 'svd'"), (['ease', 'bpr', 'ease'], ValueError, 'a model is named twice'),
    ([], ValueError, 'expected a model or more'), ({}, ValueError, 'expected a model or more'),
    ('ease', TypeError, "models is a list of names, .*, or a dict; found 'ease'"), (None, TypeError, 'found None'),
    ([1], TypeError, r'found \[1\]'), (dict(a=1), TypeError, "'a': expected the name of a model, .*; found int: 1"),
    (dict(a=dict), TypeError, "'a': expected the name of a model"),
    (dict(a='ease', b=lambda dls: 3), TypeError, "'b': expected a function .*; it returned int")])
def test_models_that_are_none(by_name, models, error, message):
    with pytest.raises(error, match=message): compare_models(loaders(), models)
    assert [name for name, _ in by_name] == (['ease'] if 'returned' in message else [])


@pytest.mark.parametrize('kwargs, message', [
    (dict(measure='gini'), "measure is one that each user has, .*found 'gini'"), (dict(k=2.), 'k is the length of'),
    (dict(threshold=math.nan), 'threshold is a finite number'), (dict(threshold=6), 'no user who is known from train'),
    (dict(dls=loaders(valid_pct=0)), 'no user who is known from training .* found 0 held-out rows'),
    (dict(dls=loaders(frame().drop(columns='rating')), threshold=4), 'interactions without ratings have no threshold')])
def test_what_cannot_be_measured_is_refused_before_fits(by_name, kwargs, message):
    with pytest.raises(ValueError, match=message): compare_models(**(dict(dls=loaders(), models=['ease']) | kwargs))
    assert by_name == []


def test_fitted_models_of_other_rows_are_refused_before_fits(by_name):
    dls = loaders()
    old = learner(loaders(seed=1))
    for o in (old, as_recommender(old)):
        with pytest.raises(ValueError, match="the loaders and 'old' cannot be compared, for they differ in pairs"):
            compare_models(dls, dict(ease='ease', old=o))
    assert by_name == []
    with pytest.raises(TypeError, match='expected RatingsDataLoaders to fit models on, found DataFrame'):
        compare_models(frame(), ['ease'])


def test_fitted_models_are_measured_on_the_held_out_rows_of_the_loaders():
    "Also a recommender, which holds none, and a learner with other validation rows"
    df = frame()
    rows = list(range(len(df)))
    dls = loaders(splits=(rows[::2], rows[1::2]))
    old = learner(loaders(splits=(rows[::2], rows[1:60:2])))
    found = compare_models(dls, dict(old=old, rec=as_recommender(old), name=dls and learner(dls)), k=3)
    expected = evaluate_ranking(as_recommender(old), 3, ratings=df.iloc[1::2]).value.ndcg
    assert found['value'].old == found['value'].rec == pytest.approx(expected) and found.seconds.isna().all()


def test_a_fault_of_a_fit_names_the_model():
    def fails(dls): raise RuntimeError('out of memory')
    with pytest.raises(RuntimeError, match='out of memory') as e: compare_models(loaders(), dict(big=fails))
    assert e.value.__notes__ == ["while fitting 'big'"]


def test_a_picture_of_odd_names():
    dls = loaders()
    models = {'cost $x^2$': learner(dls, 1), 'a\nb': learner(dls, 2), 3: learner(dls, 3)}
    found = compare_models(dls, models, k=3)
    ax = plot_comparison(found)
    ax.figure.savefig('/dev/null', format='png')
    assert sorted(o.get_text() for o in ax.get_yticklabels()) == sorted([r'cost \$x^2\$', r'a\nb', '3'])
    assert plot_comparison(compare_rankings(models, 3), ax) is ax
    plt.close(ax.figure)


def test_models_are_fitted_by_name():
    "With no stand-in: names as `fit_model` takes them, from the seed that is given"
    dls = loaders(frame(60, 20, rated=10))
    found = compare_models(dls, ['ease', 'bpr'], k=5, seed=3)
    for name in ('ease', 'bpr'):
        assert found['value'][name] == pytest.approx(evaluate_ranking(fit_model(dls, name, seed=3), 5).value.ndcg)
