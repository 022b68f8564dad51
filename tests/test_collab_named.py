"What someone new says by name, and what is chosen where nothing was: epochs and the size of batches"
import json
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from collab_deep.data.loaders import RatingsDataLoaders
from collab_deep.data.movielens import movielens_100k
from collab_deep.lists.fold_in import fold_in
from collab_deep.lists.recommend import recommend
from collab_deep.lists.recommender import as_recommender
from collab_deep.models.ensemble import Ensemble
from collab_deep.models.factor import FactorModel, factor_model
from collab_deep.models.features import encode_features, features_and_columns, named_features
from collab_deep.train.continued import partial_fit
from collab_deep.train.fit import fit_model
from collab_deep.train.learner import collab_deep_learner
from collab_deep.train.optimizer import lr_wd_for
from collab_deep.use.save import load_recommender, save_recommender

FEW = movielens_100k().query('user <= 30')
PEOPLE = movielens_100k('users').set_index('user')[['age', 'gender', 'occupation']]


def loaders(df=FEW, **kwargs):
    return RatingsDataLoaders.from_df(df, **{'seed': 1, 'device': 'cpu', 'duplicates': 'keep', **kwargs})


# --- features by name -------------------------------------------------------------------------------------------------
cells = st.tuples(st.one_of(st.none(), st.floats(-1e6, 1e6)),
                  st.one_of(st.none(), st.sampled_from(['a', 'b|c', 'a|b'])),
                  st.one_of(st.none(), st.sampled_from([1, 2, 3])), st.booleans())

@settings(max_examples=60, deadline=None)
@given(st.lists(cells, min_size=1, max_size=30), st.integers(1, 4))
def test_a_row_by_name_is_the_row_of_training(rows, bins):
    "Whatever the order of names, alone or in a frame: numbers are those that `encode_features` gave these users"
    df = pd.DataFrame(rows, columns=['size', 'tags', 'class', 'vip'])
    coded, columns = features_and_columns(df, ['#na#', *df.index], bins)
    assert torch.equal(coded, encode_features(df, ['#na#', *df.index], bins))
    columns = json.loads(json.dumps(columns))                                      # as a saved recommender has them
    assert torch.equal(named_features(columns, df[['vip', 'class', 'tags', 'size']]), coded[1:])
    for i in df.index: assert torch.equal(named_features(columns, dict(df.loc[i])), coded[i + 1:i + 2])


def test_numbers_fall_into_the_bins_of_training():
    df = pd.DataFrame(dict(x=np.arange(100.)))                                     # bins of ten, edges 9.9, 19.8, ...
    columns = features_and_columns(df, df.index)[1]
    for x, expected in ((-5, 0), (9.9, 0), (9.91, 1), (50, 5), (98, 9), (1e9, 9)):
        assert named_features(columns, dict(x=x)).argmax() == expected, x
    assert named_features(columns, dict(x=math.nan)).sum() == 0


def knows_people(seed=0, dls=None):
    dls = dls or loaders()
    torch.manual_seed(seed)
    model = factor_model(dls, 4, user_features=PEOPLE.query('user <= 30'))
    for p in model.parameters(): torch.nn.init.normal_(p)
    model.fill_unknown()
    return as_recommender(collab_deep_learner(dls, model=model))


def test_a_newcomer_by_name_is_the_newcomer_by_numbers(tmp_path):
    rec = knows_people()
    numbers = encode_features(PEOPLE.query('user <= 30'), rec.users)
    for user in (1, 7, 30):
        by_name, taken = dict(PEOPLE.loc[user]), {rec.items[3]: 5., rec.items[4]: 1.}
        for o in (by_name, PEOPLE.loc[user], dict(reversed(by_name.items()))):
            assert torch.equal(fold_in(rec, taken, o), fold_in(rec, taken, numbers[user]))
        assert recommend(rec, taken, features=by_name).equals(recommend(rec, taken, features=numbers[user]))
    save_recommender(rec, tmp_path/'m')
    again = load_recommender(tmp_path/'m')
    assert recommend(again, {}, features=by_name).equals(recommend(rec, {}, features=by_name))
    for odd, kind, text in [
        (dict(age=3), ValueError, "are ['age', 'gender', 'occupation'], found ['age']"),
        ({**by_name, 'job': 1}, ValueError, "found ['age', 'gender', 'occupation', 'job']"),
        ({**by_name, 'age': '24'}, TypeError, "the feature 'age' is a number, found '24'"),
        ({**by_name, 'age': math.inf}, ValueError, 'age holds inf'),
        ({**by_name, 'gender': 'X'}, ValueError, "the feature 'gender' is one of 'F', 'M' in training, found 'X'"),
        ({**by_name, 'gender': 1}, ValueError, "found '1'"), (PEOPLE.loc[[31]], TypeError, 'as df.iloc[0]')]:
        with pytest.raises(kind, match=re.escape(text)): fold_in(again, {}, odd)


def test_a_frame_of_newcomers_gives_a_list_for_each(tmp_path):
    rec, new = knows_people(), PEOPLE.query('user <= 30').iloc[[5, 0, 5]].set_axis(['x', 'y', 'z'])
    lists = recommend(rec, {}, 4, features=new)
    assert lists.user.tolist() == ['x']*4 + ['y']*4 + ['z']*4 and list(lists) == ['user', 'item', 'score']
    for name in new.index:
        alone = recommend(rec, {}, 4, features=dict(new.loc[name]))
        mine = lists[lists.user == name].reset_index(drop=True)
        assert mine['item'].tolist() == alone['item'].tolist()
        assert mine.score.tolist() == pytest.approx(alone.score.tolist(), rel=1e-5)
    one = recommend(rec, set(), 4, features=new[1:2], filter=rec.items[1:4])
    assert one.user.tolist() == ['y']*3 and set(one['item']) == set(rec.items[1:4])
    for odd, text in ((new[:0], 'found none'), (new[['age']], "found ['age']")):
        with pytest.raises(ValueError, match=re.escape(text)): recommend(rec, {}, features=odd)
    with pytest.raises(TypeError, match=re.escape('go with {}, nothing taken, found 1')):
        recommend(rec, {rec.items[1]}, features=new)
    with pytest.raises(ValueError, match='features are for someone new'): recommend(rec, 1, features=new)


def test_members_with_other_columns_take_no_names():
    rec = knows_people()
    same = Ensemble.of([rec.model, knows_people(1).model])
    new = dict(PEOPLE.loc[3])
    rec.model = same
    assert len(fold_in(rec, {}, new)) == 2*5
    other = FactorModel(rec.model.n_users, rec.model.n_items, 4, n_user_features=same.members[0].user_features.shape[1])
    rec.model = Ensemble.of([same.members[0], other])
    with pytest.raises(TypeError, match='was not told the names of columns'): fold_in(rec, {}, new)


def test_names_stay_when_training_goes_on(capsys):
    old = collab_deep_learner(loaders(), model=knows_people().model, loss='mse')
    new = partial_fit(old, movielens_100k().query('user == 31'), epochs=1)
    assert new.model.settings['user_columns'] == old.model.settings['user_columns'] != []
    assert len(fold_in(new, {}, dict(PEOPLE.loc[3]))) == 5


# --- epochs -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name, more, n', [
    ('softmax', {}, 10), ('bpr', {}, 10), ('dot', {}, 5), ('nn', {}, 5), ('factor', {}, 5), ('ials', {}, 12),
    ('ease', {}, 1), ('blend', {}, 12), ('dot', dict(loss='softmax'), 10), ('factor', dict(loss='bpr'), 10)])
def test_epochs_follow_from_what_is_trained(name, more, n, capsys):
    df = FEW[FEW.user <= 8]
    learn = fit_model(loaders(df, bs=256), name, n_factors=None if name == 'ease' else 2, **more)
    assert len(learn.recorder.values) == n
    assert len(fit_model(loaders(df, bs=256), name, 2, **more).recorder.values) == 2


def test_interactions_are_trained_for_lists(capsys):
    taken = FEW.query('user <= 8')[['user', 'item']]
    assert len(fit_model(loaders(taken), 'dot', n_factors=2).recorder.values) == 10


# --- batches of whole users -------------------------------------------------------------------------------------------
def test_a_loss_on_whole_lists_has_large_batches_where_none_were_asked_for(capsys):
    dls = loaders()
    learn = collab_deep_learner(dls, loss='softmax')
    assert (dls.train.bs, learn.dls.train.bs) == (64, 2048)
    assert (learn.lr, learn.wd) == lr_wd_for(2048, 8e-3, .04)
    assert re.search(r"30 users, .* loss 'softmax', batches of 2,048\n", capsys.readouterr().out)
    assert sum(len(y) for _, y, *_ in learn.dls.train) == len(dls.train_ds)
    for bs in (64, 100, 2048):
        given_bs = collab_deep_learner(loaders(bs=bs), loss='softmax')
        assert given_bs.dls.train.bs == bs and given_bs.lr == lr_wd_for(bs, 8e-3)[0]
    for loss in ('mse', 'bpr'): assert collab_deep_learner(dls, loss=loss).dls.train.bs == 64
    assert capsys.readouterr().out == ''
    weighed = collab_deep_learner(loaders(FEW.assign(n=2.), weight_name='n'), loss='softmax')
    assert weighed.dls.train.bs == 2048


def test_batches_that_nobody_asked_for_stay_so():
    dl = loaders().train
    assert (dl.asked_bs, dl.new().asked_bs, dl.new(shuffle=False).bs) == (None, None, 64)
    whole = dl.new(by_user=True)
    assert (whole.bs, whole.new().bs, whole.new(by_user=False).bs, whole.new(bs=5).new().bs) == (2048, 2048, 64, 5)
    dl.bs = 7                                                                      # as fastai's users do
    assert (dl.new().bs, dl.new(by_user=True).bs) == (7, 7)
    for odd in (0, -1, 1.5, '64', True):
        with pytest.raises(ValueError, match='a positive integer'): loaders(bs=odd)


def test_training_that_goes_on_keeps_its_batches(capsys):
    new = movielens_100k().query('user == 31')
    for bs, of_lists, of_ratings in ((None, 2048, 64), (100, 100, 100)):
        for loss, n in (('softmax', of_lists), ('mse', of_ratings)):
            old = collab_deep_learner(loaders(bs=bs), 2, loss=loss)
            assert partial_fit(old, new, epochs=1).dls.train.bs == n


def test_a_model_of_an_earlier_version_is_saved(tmp_path):
    "A pickle brings the settings of its day: the arguments that came later are not among them"
    rec = as_recommender(collab_deep_learner(loaders(), 4, model='factor'))
    for later in ('y_scale', 'user_columns'): rec.model.settings.pop(later)
    rec.model.y_scale = None                                                       # as it was without that setting
    read = load_recommender(save_recommender(rec, tmp_path))
    assert read.model.settings == rec.model.settings | dict(user_columns=[])
    pd.testing.assert_frame_equal(recommend(read, 3), recommend(rec, 3))
