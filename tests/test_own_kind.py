"Kinds of target: one of a user's own through all that is public, and the fifth one of ours through the command"
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.mixup import MixUp
from fastai.learner import load_learner
from fastai.metrics import rmse
from fastai.optimizer import SGD
from fastai.torch_core import set_seed, to_detach
from fastai.vision.augment import Resize
from hypothesis import given, settings, strategies as st
from matplotlib import pyplot as plt
from PIL import Image
from sklearn.metrics import mean_poisson_deviance
from torch import nn

from own_kind import DirectionTarget, angular_error
from paddy_multi.all import *
from paddy_multi.kinds.target import registry

TESTS = Path(__file__).parent
del registry['direction']  # tests of other files, which run in the same process, know our own kinds alone


@pytest.fixture(scope='module', autouse=True)
def declared():
    "The kind of `own_kind` is known while the tests of this file run"
    registry['direction'] = DirectionTarget
    yield
    del registry['direction']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Synthetic pictures with a bright corner towards a direction, as many dots as `spots`, and gaps in both labels"
    path = tmp_path_factory.mktemp('kinds')
    (path/'images').mkdir()
    rng, rows = np.random.default_rng(0), []
    for i in range(60):
        angle, spots = int(rng.integers(0, 360)), int(rng.poisson(3))
        pixels = np.zeros((16, 16, 3), np.uint8)
        x, y = 8 + 6*math.cos(math.radians(angle)), 8 - 6*math.sin(math.radians(angle))
        pixels[max(int(y) - 1, 0):int(y) + 2, max(int(x) - 1, 0):int(x) + 2] = 255
        for _ in range(spots): pixels[rng.integers(16), rng.integers(16), 0] = 255
        Image.fromarray(pixels).save(path/f'images/{i:02}.png')
        side = 'left' if 90 < angle < 270 else 'right'
        rows.append(dict(image=f'{i:02}.png', side=side, angle=float(angle), spots=spots))
    df = pd.DataFrame(rows)
    df.loc[::7, 'angle'] = None
    df.loc[3::9, 'spots'] = None
    df.to_csv(path/'labels.csv', index=False)
    return path


def loaders(folder, seed=1, targets=('side', 'angle', 'spots'), **kinds):
    kinds = dict(angle='direction', spots='count') | kinds
    return MultiTargetDataLoaders.from_csv(folder, targets=list(targets), kinds=kinds, folder='images', seed=seed,
                                           bs=16, num_workers=0, item_tfms=Resize(16))


def trained(dls, epochs=2, **kwargs):
    set_seed(1)
    learn = multi_target_learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3*16*16, 8), nn.Tanh()),
                                 head=nn.Linear(8, dls.targets.n_out), **kwargs)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-2)
    # Copied, since fastai shortens the last row when the learner validates again
    learn.model.rows_kept = [list(o) for o in learn.recorder.values]
    return learn


@pytest.fixture(scope='module')
def learn(folder): return trained(loaders(folder))


# --- declaration, loss and metrics ----------------------------------------------------------------------------------
def test_a_kind_is_known_by_its_name_as_soon_as_it_is_declared(folder):
    table = loaders(folder).targets
    assert [(t.kind, t.width, t.n_cols) for t in table] == [('category', 2, 1), ('direction', 2, 1), ('count', 1, 1)]
    assert registry['direction'] is DirectionTarget
    assert table.slices == dict(side=slice(0, 2), angle=slice(2, 4), spots=slice(4, 5))
    assert table.decode(table.encode(dict(angle=270, spots=4))) == dict(side=None, angle=270., spots=4.)
    assert 'degrees' in str(table)
    with pytest.raises(ValueError, match='angle: expected degrees from 0 to 360, found 400'):
        table.encode(dict(angle=400))


def test_loss_and_metrics_are_those_worked_out_by_hand(folder, learn):
    dls, table = learn.dls, learn.dls.targets
    preds, targs = learn.get_preds(act=lambda x: x)
    truth = pd.read_csv(folder/'labels.csv').set_index('image').loc[[o.name for o in dls.valid_ds.items]]
    values = dict(zip(learn.recorder.metric_names[1:-1], learn.model.rows_kept[-1]))

    angle = torch.tensor(truth.angle.values)
    have = ~angle.isnan()
    said = torch.rad2deg(torch.atan2(preds[:, 3], preds[:, 2])).double()
    off = ((said - angle + 180) % 360 - 180).abs()[have]
    assert values['angle_angular_error'] == pytest.approx(off.mean().item(), abs=1e-3)
    assert values['angle_loss'] == pytest.approx((1 - torch.deg2rad(off).cos()).mean().item(), abs=1e-5)

    spots, train = torch.tensor(truth.spots.values), pd.read_csv(folder/'labels.csv').set_index('image').spots
    mean = train[[o.name for o in dls.train_ds.items]].mean()
    have = ~spots.isnan()
    rate, count = (mean*preds[:, 4].double().exp())[have], spots[have]
    assert table['spots'].mean == pytest.approx(mean)
    assert values['spots_mean_absolute_error'] == pytest.approx((rate - count).abs().mean().item(), abs=1e-4)
    assert values['spots_poisson_deviance_error'] == pytest.approx(mean_poisson_deviance(count, rate), abs=1e-4)
    loss = F.poisson_nll_loss(preds[:, 4].double()[have], count/mean, log_input=True)
    assert values['spots_loss'] == pytest.approx(loss.item(), abs=1e-5)
    total = values['side_loss'] + values['angle_loss'] + values['spots_loss']
    assert values['valid_loss'] == pytest.approx(total, abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.permutations(['plain', 'huber', 'also_huber', 'wide', 'focal', 'classes']), st.integers(0, 9))
def test_a_subclass_is_never_computed_as_its_base_whatever_the_order(order, seed):
    class Huber(RegressionTarget):
        def __init__(self, delta, **kwargs):
            super().__init__(**kwargs)
            self.delta = delta
        def _losses(self, preds, y): return F.huber_loss(preds, y, reduction='none', delta=self.delta)[:, 0]
    class Focal(CategoryTarget):
        def _losses(self, preds, y):
            ce = F.cross_entropy(preds, y[:, 0].long(), reduction='none')
            return (1 - (-ce).exp())**2*ce
    kinds = dict(plain=RegressionTarget(), huber=Huber(1.), also_huber=Huber(1.), wide=Huber(3.), focal=Focal(),
                 classes=CategoryTarget())
    def labels(i):
        numbers = {name: float(i*k % 7) for k, name in enumerate(['plain', 'huber', 'also_huber', 'wide'], 1)}
        return numbers | dict(focal='xyz'[i % 3], classes='xyz'[i//2 % 3])
    items = [labels(i) for i in range(12)]
    table = Targets({name: kinds[name] for name in order}).fit(items)
    preds = torch.randn(12, table.n_out, generator=torch.Generator().manual_seed(seed))*3
    targs = torch.stack([table.encode(o) for o in items])
    sums = dict(zip(table.names, table.loss().parts(preds, targs).sums.tolist()))
    for t in table:
        p, y = preds[:, t.out], targs[:, t.cols]
        ce = F.cross_entropy(p, y[:, 0].long(), reduction='none') if t.vocab else None
        def huber(delta): return F.huber_loss(p, y, reduction='sum', delta=delta)
        if t.name == 'plain': expected = F.mse_loss(p, y, reduction='sum')
        elif t.name == 'focal': expected = ((1 - (-ce).exp())**2*ce).sum()
        elif t.name == 'classes': expected = ce.sum()
        else: expected = huber(3. if t.name == 'wide' else 1.)
        assert sums[t.name] == pytest.approx(expected.item(), rel=1e-5), (t.name, order)


def test_another_class_of_one_kind_is_warned_of():
    before = dict(registry)
    try:
        text = "the kind 'direction' is .*Other from now on, and was own_kind.DirectionTarget"
        with pytest.warns(UserWarning, match=text):
            class Other(Target): kind = 'direction'
        assert registry['direction'] is Other
    finally:
        registry.clear()
        registry.update(before)


class Elapsed(Target):
    "Seconds since 1970 as a user writes them: in units by a plain sum, which float32 would lose"
    width, reads, start = 1, (), 1_700_000_000.
    def _fit(self, train, valid): pass
    def _encode(self, label): return [(label - self.start)/60]
    def _decode(self, row): return float(row[0])*60 + self.start
    def _losses(self, preds, y): return (preds - y)[:, 0]**2
    def to_units(self, column): return column*60 + self.start
    def for_metric(self, preds, y): return self.to_units(preds[:, 0]), self.to_units(y[:, 0])
    def aligned(self, acts, ref): return acts


def test_metrics_of_an_own_kind_are_called_with_float64():
    rows = [dict(taken=Elapsed.start + o) for o in (0., 20., 60.)]
    table = Targets(taken=Elapsed()).fit(rows)
    y, preds = torch.stack([table.encode(o) for o in rows]), torch.tensor([[.5], [.5], [.25]])
    def spread(preds, targs): return (preds - targs).abs().max()
    metrics = target_metrics(table, dict(taken=[spread, rmse]))
    for metric, expected in zip(metrics, (45., math.sqrt((30**2 + 10**2 + 45**2)/3))):
        metric.reset()
        metric.accumulate(SimpleNamespace(pred=preds, y=y, yb=(y,), to_detach=to_detach))
        assert float(metric.value) == pytest.approx(expected, abs=1e-4)
    wrong = table['taken'].wrong(y, preds, off_by=29)
    assert wrong.tolist() == [True, False, True]


def test_what_an_own_kind_makes_infinite_is_refused_when_it_is_fitted():
    with pytest.raises(ValueError, match=r'taken: 1e\+39 is encoded as .* numbers up to 1e\+15'):
        Elapsed().fit('taken', [Elapsed.start], [1e39])


# --- training -------------------------------------------------------------------------------------------------------
def test_micro_batches_make_the_update_of_the_whole_batch(folder):
    states = []
    for cbs in ([], [MicroBatch(5)]):
        set_seed(0)  # which the order of the items follows
        states.append(trained(loaders(folder), 2, cbs=cbs, opt_func=SGD).model.state_dict())
    for name, whole in states[0].items(): assert torch.allclose(states[1][name], whole, atol=1e-5), name


@pytest.mark.parametrize('kwargs', [dict(cbs=MixUp()), dict(weighting='uncertainty')], ids=['mixup', 'uncertainty'])
def test_it_trains_with(folder, kwargs):
    learn = trained(loaders(folder), 2, **kwargs)
    assert np.isfinite(learn.model.rows_kept[-1]).all()
    if 'weighting' in kwargs: assert (learn.model.log_vars.detach().abs() > 1e-4).all()


# --- predictions ----------------------------------------------------------------------------------------------------
def test_predictions_are_in_the_units_of_the_label(folder, learn):
    files = learn.dls.valid_ds.items[:5]
    res, acts = predict_named(learn, files), learn.get_preds(dl=learn.dls.test_dl(files))[0]
    assert list(res.columns) == ['side', 'side_prob', 'angle', 'spots', 'error']
    assert res.angle.dtype == res.spots.dtype == float
    assert np.allclose(res.angle, np.degrees(np.arctan2(acts[:, 3], acts[:, 2])) % 360, atol=1e-2)
    assert np.allclose(res.spots, acts[:, 4]*learn.dls.targets['spots'].mean, atol=1e-4)
    named = learn.predict(files[0])[0]
    assert named['angle'] == pytest.approx(res.angle.iloc[0], abs=1e-3)
    assert named['spots'] == pytest.approx(res.spots.iloc[0], abs=1e-4)
    assert predict_named(learn, files, tta=2).angle.between(0, 360).all()


def test_two_learners_are_averaged(folder, learn):
    files, other = learn.dls.valid_ds.items[:5], trained(loaders(folder, seed=2))
    both = ensemble([learn, other], files)
    rates = [predict_named(o, files).spots for o in (learn, other)]
    assert learn.dls.targets['spots'].mean != other.dls.targets['spots'].mean
    assert np.allclose(both.spots, sum(rates)/2, atol=1e-4)
    assert np.allclose(ensemble([learn, learn], files).angle, predict_named(learn, files).angle, atol=1e-2)
    plain = trained(loaders(folder, angle='regression'), 0)
    with pytest.raises(ValueError, match='angle: a regression in learner 1, a direction in the first'):
        ensemble([learn, plain], files)


def test_an_exported_learner_works_where_the_kind_can_be_imported(folder, learn, tmp_path):
    files = [str(o) for o in learn.dls.valid_ds.items[:3]]
    learn.export(tmp_path/'model.pkl')
    here = predict_named(load_learner(tmp_path/'model.pkl'), files)
    code = ('import json, sys, warnings; warnings.filterwarnings("ignore")\n'
            'from fastai.vision.all import *; from paddy_multi.all import predict_named\n'
            'res = predict_named(load_learner(sys.argv[1]), json.loads(sys.argv[2]))\n'
            'print(json.dumps([res.angle.tolist(), res.spots.tolist()]))')
    done = subprocess.run([sys.executable, '-c', code, tmp_path/'model.pkl', json.dumps(files)],
                          capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(TESTS)))
    assert done.returncode == 0, done.stderr
    angles, spots = json.loads(done.stdout.strip().splitlines()[-1])
    assert np.allclose(angles, here.angle, atol=1e-4) and np.allclose(spots, here.spots, atol=1e-5)


# --- tables, plots and reports --------------------------------------------------------------------------------------
def test_interpretation_asks_the_kind(folder, learn):
    interp = MultiTargetInterpretation.from_learner(learn)
    table, rows = learn.dls.targets, interp.acts[:, 2:4]
    ax = interp.plot_regression('angle')
    shown = np.asarray(ax.collections[0].get_offsets())
    have = ~interp.targs[:, 1].isnan()
    assert np.allclose(shown[:, 1], (torch.rad2deg(torch.atan2(rows[:, 1], rows[:, 0])) % 360)[have], atol=1e-2)
    plt.close('all')
    text = 'angle is of the kind direction, expected category or ordinal: use plot_regression'
    with pytest.raises(ValueError, match=text):
        interp.confusion_matrix('angle')
    with pytest.raises(ValueError, match='side is of the kind category, expected count or direction or regression'):
        interp.plot_regression('side')
    off = interp.joint_errors(off_by=dict(angle=10, spots=1)).set_index(['target', 'given']).loc[('side', 'angle')]
    wrong = table['angle'].wrong(interp.targs[:, 1:2], table['angle'].to_rows(rows), 10)[have]
    assert off.n_wrong == int(wrong.sum()) and off.n_right == int((~wrong).sum())
    losses, _ = interp.top_losses(3, target='angle')
    assert torch.equal(losses, interp.by_target[:, 1][have].sort(descending=True)[0][:3])


def test_a_report_shows_it(learn, tmp_path):
    names = learn.recorder.metric_names[:-1]
    rows = pd.DataFrame([[i, *map(float, o)] for i, o in enumerate(learn.model.rows_kept)], columns=names)
    text = write_report(learn, tmp_path/'report.html', rows).read_text()
    pictures = 'directions of angle', 'predicted against true spots', 'confusion matrix of side'
    for shown in (*(f'alt="{o}"' for o in pictures), 'degrees'): assert shown in text
    plt.close('all')


def test_the_command_trains_on_counts(folder, tmp_path):
    kind = ['--targets', 'side,spots:count', '--bs', '8']
    options = ['--arch', 'test_resnet', '--no-pretrained', '--epochs', '1', '--size', '32']
    command = [Path(sys.executable).parent/'paddy-multi', 'train', '--data', folder, '--out', tmp_path, *kind, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '  spots: spots_mean_absolute_error ' in done.stdout and '(always saying the mean: ' in done.stdout
    table = pd.read_csv(tmp_path/'predictions.csv')
    assert {'spots', 'spots_label'} <= {*table.columns} and (table.spots > 0).all()


# --- without fastai -------------------------------------------------------------------------------------------------
def test_kinds_encode_and_decode_without_fastai():
    code = '''
import sys
class NoFastai:
    def find_spec(self, name, path=None, target=None):
        blocked = 'fastai', 'fastcore', 'timm', 'matplotlib', 'sklearn'
        if name.partition('.')[0] in blocked: raise ImportError(f'{name} is blocked')
sys.meta_path.insert(0, NoFastai())
import torch
from paddy_multi.kinds.columns import all_kinds
from paddy_multi.targets.table import TargetTable
labels = dict(category=['a','b'], count=[0,3], multicategory=[['x'],['y']], ordinal=[1,2], regression=[1.,4.])
table = TargetTable({name: cls().fit(name, labels[name]) for name, cls in all_kinds().items()})
for i in range(2):
    row = {name: o[i] for name, o in labels.items()}
    assert table.decode(table.encode(row)) == row
acts = table.activation(torch.zeros(1, table.n_out))
assert list(table.decode(table.to_rows(acts)[0])) == list(labels)
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
