"Data, ids and weights of others than those a learner was made for are refused wherever it takes batches"
import pandas as pd
import pytest
import torch
from fastai.vision.all import DataLoaders, Learner, Resize, load_learner

from collab_deep.data.loaders import RatingsDataLoaders
from collab_deep.train.learner import collab_deep_learner
from paddy_multi.data.digits import sample_digits
from paddy_multi.data.loaders import MultiTargetDataLoaders
from paddy_multi.train.learner import multi_target_learner
from paddy_multi.train.watch import CheckTargets


# --- targets --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def path(tmp_path_factory): return sample_digits(tmp_path_factory.mktemp('digits'))

@pytest.fixture(scope='module')
def df(path):
    return pd.read_csv(path/'labels.csv', dtype=dict(digit=str)).sample(96, random_state=0)[['image', 'slant', 'ink']]

def loaders(df, path, size=16, targets=('slant', 'ink'), **kwargs):
    return MultiTargetDataLoaders.from_df(df, path, folder='images', targets=targets, seed=1, bs=16, num_workers=0,
                                          item_tfms=Resize(size), **kwargs)

def learner(dls, **kwargs): return multi_target_learner(dls, 'test_resnet', pretrained=False, **kwargs)

def quietly(learn, do):
    with learn.no_bar(), learn.no_logging(): return do(learn)

TAKES = [lambda o: o.fit(1), lambda o: o.validate(), lambda o: o.get_preds(),
         lambda o: o.predict(o.dls.valid_ds.items[0])]

@pytest.mark.parametrize('change, text', [
    (lambda df: df.assign(ink=df.ink*10), 'ink: mean'),
    (lambda df: df.assign(slant=df.slant.where(df.index % 5 > 0, 'zebra')), "slant: classes 'zebra' only in the data"),
    (lambda df: df.assign(slant=df.slant.str.title()), "slant: classes 'Left', 'Right', 'Upright' only in the data|"
                                                      "slant: classes 'left'.*only in the learner and 'Left'")],
    ids=['scale', 'a class more', 'other names'])
def test_other_targets_are_refused(df, path, change, text):
    learn = learner(loaders(df, path))
    learn.dls = loaders(change(df), path)
    for take in TAKES:
        with pytest.raises(ValueError, match=text): quietly(learn, take)
    other, learn.dls = learn.dls, loaders(df, path, 24)      # the same labels, larger pictures
    for take in TAKES: quietly(learn, take)
    with pytest.raises(ValueError, match=text): quietly(learn, lambda o: o.validate(dl=other.valid))


def test_new_loaders_with_the_old_targets_are_measured_right(df, path):
    "Labels ten times as large: the error reported is that of the predictions, worked out by hand"
    learn = learner(loaders(df, path))
    quietly(learn, lambda o: o.fit(1))
    learn.dls = loaders(df.assign(ink=df.ink*10), path, targets=learn.dls.targets)
    found = dict(zip(learn.recorder.metric_names[2:-1], quietly(learn, lambda o: o.validate())))
    preds, _ = quietly(learn, lambda o: o.get_preds())
    ink = learn.dls.targets['ink']
    said = preds[:,ink.out][:,0].double()*ink.std + ink.mean
    true = df.set_index('image').ink[[o.name for o in map(type(path), learn.dls.valid_ds.items)]].to_numpy()*10
    assert found['ink_mean_absolute_error'] == pytest.approx(abs(said.numpy()-true).mean(), rel=1e-4)


def test_weights_know_their_classes_through_every_file(df, path, tmp_path):
    dls = loaders(df, path)
    learn = learner(dls, path=tmp_path)
    learn.save('weights')
    swapped = df.assign(slant=df.slant.replace(dict(left='a', right='b', upright='c')))
    other = learner(loaders(swapped, path), path=tmp_path)
    with pytest.raises(ValueError, match="slant: classes 'a', 'b', 'c' only in the model and 'left'"):
        other.load('weights')
    other.export(tmp_path/'other.pkl')
    with pytest.raises(ValueError, match="slant: classes 'a', 'b', 'c' only"):
        load_learner(tmp_path/'other.pkl').model.load_state_dict(learn.model.state_dict())
    learner(dls, path=tmp_path).load('weights')
    torch.save(dict(learn.model.state_dict()), tmp_path/'models'/'before.pth')     # a file of before has no names
    other.load('before', with_opt=False)


def test_a_body_may_serve_other_classes(df, path):
    "Weights without a head, taken with strict=False; a whole model of other classes is refused so, too"
    learn, other = learner(loaders(df, path)), learner(loaders(df.assign(slant=df.slant.str.title()), path))
    state = learn.model.state_dict()
    with pytest.raises(ValueError, match='trained for something else'): other.model.load_state_dict(state, strict=False)
    other.model[0].load_state_dict(learn.model[0].state_dict())
    for name in [o for o in state if o.startswith('1.')]: del state[name]
    head = {name: o.clone() for name, o in other.model[1].state_dict().items()}
    other.model.load_state_dict(state, strict=False)
    assert all(torch.equal(o, state[f'0.{name}']) for name, o in other.model[0].state_dict().items())
    assert all(torch.equal(o, head[name]) for name, o in other.model[1].state_dict().items())


@pytest.mark.parametrize('names', [('ink_mean_absolute_error',), ('slant_error_rate',), ('slant_loss', 'ink_loss')])
def test_metrics_of_other_targets_are_refused_before_the_first_batch(df, path, names):
    dls, other = loaders(df, path), loaders(df.assign(ink=df.ink*10, slant=df.slant.str.title()), path).targets
    metrics = [o for o in other.metrics() if o.name in names]
    assert len(metrics) == len(names), [o.name for o in other.metrics()]
    learn = learner(dls, metrics=metrics)
    with pytest.raises(ValueError, match='a metric was made for other targets than'):
        quietly(learn, lambda o: o.fit(1))
    assert not hasattr(learn, 'iter')
    for _ in range(2):  # a refusal leaves nothing locked behind
        with pytest.raises(ValueError, match='a metric was made for other'): quietly(learn, lambda o: o.validate())


def test_data_without_targets_is_refused_again_and_again(df, path):
    "An error before validation must not leave the learner locked: the second call would wait for ever"
    plain = Learner(DataLoaders(*([(torch.zeros(4, 3), torch.zeros(4, 1))] for _ in 'ab')), torch.nn.Linear(3, 1),
                    torch.nn.MSELoss(), cbs=CheckTargets())
    for take in [lambda o: o.fit(1), lambda o: o.validate()]*2:
        with pytest.raises(TypeError, match='the data has no declared targets'): quietly(plain, take)
    assert not plain.lock.locked()


# --- recommenders ---------------------------------------------------------------------------------------------------
@pytest.fixture
def ratings():
    pairs = [(u, i) for u in range(1, 11) for i in range(8) if (u+i) % 3]
    return pd.DataFrame([dict(user=u, item=i, rating=1 + (u*i) % 5) for u, i in pairs])

def recommender(df, **kwargs):
    return collab_deep_learner(RatingsDataLoaders.from_df(df, valid_pct=0, bs=16, device='cpu'), 4, **kwargs)

def test_a_model_of_yesterday_on_ids_of_today(ratings, tmp_path):
    "One user left and one came: as many rows, each of another user"
    first, second = ratings[ratings.user != 10], ratings[ratings.user != 1]
    old, new = recommender(first, path=tmp_path), recommender(second, path=tmp_path)
    assert old.dls.n_users == new.dls.n_users
    with pytest.raises(ValueError, match='the model was made for other ids: users: ids 9 with digest'):
        collab_deep_learner(new.dls, model=old.model)
    old.save('old')
    with pytest.raises(ValueError, match='trained for something else: users: ids 9 with digest'): new.load('old')
    old.dls = new.dls
    for take in (lambda o: o.fit(1), lambda o: o.validate(0)):
        with pytest.raises(ValueError, match='users: ids 1 only in the learner and 10 only in the data'):
            quietly(old, take)
    again = collab_deep_learner(RatingsDataLoaders.from_df(first, valid_pct=0, bs=8, device='cpu'), model=old.model)
    quietly(again, lambda o: o.fit(1))


def test_ids_as_text_are_others(ratings):
    old = recommender(ratings)
    text = RatingsDataLoaders.from_df(ratings.astype(dict(user=str)), valid_pct=0, device='cpu')
    with pytest.raises(ValueError, match='the model was made for other ids'): collab_deep_learner(text, model=old.model)
