"Numbers in float64, in bounds, in their own unit; what is not finite and what does not fit are refused"
import math
import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as skm
import torch
import torch.nn.functional as F
from fastai.callback.mixup import MixUp
from fastai.data.block import CategoryBlock, DataBlock
from fastai.data.transforms import ColReader, RandomSplitter
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat
from fastai.metrics import R2Score, accuracy, error_rate, mae, mse, rmse, skm_to_fastai
from fastai.optimizer import SGD
from fastai.torch_core import flatten_check, set_seed
from fastai.vision.all import ImageBlock, PILImageBW, Resize, vision_learner
from matplotlib import pyplot as plt
from torch import nn, tensor

from paddy_multi.all import (CategoryTarget, CountTarget, MicroBatch, MultiCategoryTarget, MultiTargetDataLoaders,
                             MultiTargetInterpretation, RegressionTarget, Targets, combined_loss, ensemble,
                             multi_target_learner, predict_named, sample_digits, sliced_metrics, target_metrics)
from paddy_multi.kinds.groups import groups_of

START = 1_700_000_000.  # a time in seconds since 1970, where float32 knows multiples of 128


@pytest.fixture(scope='module')
def path(tmp_path_factory): return sample_digits(tmp_path_factory.mktemp('digits'))

@pytest.fixture(scope='module')
def labels(path):
    df = pd.read_csv(path/'labels.csv', dtype=dict(digit=str))[:90]
    ink = (df.ink-df.ink.min())/(df.ink.max()-df.ink.min())
    return df.assign(taken=START + (60*ink).round(3), share=ink, percent=(100*ink).round(1), dots=(9*ink).round())

def loaders(path, labels, seed=1, targets=('slant',), **kinds):
    return MultiTargetDataLoaders.from_df(labels, path, folder='images', targets=[*targets, *kinds], kinds=kinds,
                                          seed=seed, bs=16, num_workers=0, item_tfms=Resize(8), img_cls=PILImageBW)

def trained(dls, epochs=2, **kwargs):
    set_seed(1)
    learn = multi_target_learner(dls, nn.Flatten(), head=nn.Linear(64, dls.targets.n_out), **kwargs)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, 1e-2)
    learn.remove_cb(learn.progress)
    return learn

def reported(learn):
    "What the learner says of its validation split"
    with learn.no_bar(), learn.no_logging(): values = learn.validate()
    return dict(zip(learn.recorder.metric_names[2:-1], map(float, values)))

def predicted(learn, col, labels):
    "Predictions and labels of the validation split, float64"
    files = learn.dls.valid_ds.items
    found = predict_named(learn, files)[col].values
    return found,labels.set_index('image').loc[[o.name for o in files], col].values.astype(float)


# --- large means ------------------------------------------------------------------------------
def relative(preds, targs):
    "A user's own metric, which flattens as fastai's do"
    preds,targs = flatten_check(preds, targs)
    return (((preds-targs)/(targs-START+1)).abs()).mean()

@pytest.fixture(scope='module')
def seconds(path, labels):
    kind = RegressionTarget(metrics=[mae, rmse, mse, R2Score(), relative,
                                     skm_to_fastai(skm.max_error, is_class=False)])
    return trained(loaders(path, labels, taken=kind))

def test_metrics_of_seconds_are_those_of_numpy_and_sklearn(seconds, labels):
    found,true = predicted(seconds, 'taken', labels)
    off,squared = np.abs(found-true),((found-true)**2).mean()
    expected = dict(mean_absolute_error=off.mean(), root_mean_squared_error=np.sqrt(squared),
                    mean_squared_error=squared, max_error=off.max(), r2_score=skm.r2_score(true, found),
                    relative=(off/(true-START+1)).mean())
    assert expected['root_mean_squared_error'] > 5  # far from the 0 that float32 shows
    values = reported(seconds)
    for name, value in expected.items():
        assert values[f'taken_{name}'] == pytest.approx(value, rel=1e-5, abs=1e-5), name

def test_many_numbers_are_measured_at_once_as_exactly(labels):
    names = [f't{i}' for i in range(5)]
    rows = [{name: START*10.**i + o for i, name in enumerate(names)} for o in (0, 13, 44, 60.)]
    table = Targets({name: RegressionTarget() for name in names}).fit(rows)
    y,preds = torch.stack([table.encode(o) for o in rows]),torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    learn = type('Learn', (), dict(pred=preds, y=y, yb=(y,)))
    for name, metric in zip(names, target_metrics(table)):
        t = table[name]
        said = t.mean + preds[:,t.out.start].double().numpy()*t.std
        metric.reset()
        metric.accumulate(learn)
        assert metric.value == pytest.approx(np.abs(said-[o[name] for o in rows]).mean(), rel=1e-5)

def test_an_average_of_one_learner_is_that_learner(seconds):
    files = seconds.dls.valid_ds.items
    one = predict_named(seconds, files).taken
    for learners in ([seconds]*2, [seconds]*3):
        both = ensemble(learners, files).taken
        assert both.nunique() == one.nunique() > 10
        assert np.abs(both-one).max() <= 1e-4
    assert np.abs(predict_named(seconds, files, tta=1).taken-one).max() < 60

def test_learners_of_other_means_are_averaged_in_seconds(path, labels, seconds):
    files = seconds.dls.valid_ds.items
    other = trained(loaders(path, labels, seed=2, taken=RegressionTarget()))
    assert seconds.dls.targets['taken'].mean != other.dls.targets['taken'].mean
    a,b = (predict_named(o, files).taken.values for o in (seconds, other))
    found = ensemble([seconds, other], files, weights=[3, 1]).taken.values
    assert np.abs(found-(.75*(a-START)+.25*(b-START)+START)).max() < 1e-4

def test_units_are_float64_in_plots_and_errors(seconds, labels):
    found,true = predicted(seconds, 'taken', labels)
    interp = MultiTargetInterpretation.from_learner(seconds)
    shown = np.asarray(interp.plot_regression('taken').collections[0].get_offsets())
    plt.close('all')
    assert np.abs(shown[:,0]-true).max() < 1e-3 and np.abs(shown[:,1]-found).max() < 1e-3
    t,off = seconds.dls.targets['taken'],np.median(np.abs(found-true))
    wrong = t.wrong(interp.targs[:,t.cols], t.to_rows(interp.acts[:,t.out]), off)
    assert int(wrong.sum()) == int((np.abs(found-true) > off).sum())
    for make in (RegressionTarget(), RegressionTarget(scale='none'), CountTarget()):
        assert make.fit('x', [1, 2]).to_units(tensor([1.])).dtype == torch.float64


# --- finite in the type that is used ----------------------------------------------------------
ce = nn.CrossEntropyLoss
@pytest.mark.parametrize('make, text', [
    (lambda: RegressionTarget(weight=1e300), 'between 1e-15 and 1e.15, .*; found 1e.300'),
    (lambda: CategoryTarget(weight=1e-300), 'between 1e-15 and 1e.15, .*; found 1e-300'),
    (lambda: CountTarget(weight=10**400), 'between 1e-15 and 1e.15'),
    (lambda: combined_loss(a=(F.mse_loss, 1, 1e39)), 'a: the weight is 0, or between'),
    (lambda: combined_loss(a=(ce(weight=tensor([1., 1e39])), 2)), 'a: a class weight .*found inf'),
    (lambda: combined_loss(a=(nn.BCEWithLogitsLoss(pos_weight=tensor([math.nan])), 1)), 'a class weight .*found nan'),
    (lambda: CategoryTarget(loss=CrossEntropyLossFlat(weight=tensor([1., 1e30]))).fit('x', 'ab'), '1e.15, .*found 1'),
    (lambda: CategoryTarget(loss=partial(F.cross_entropy, weight=tensor([0., 0]))).fit('x', 'ab'), 'every class'),
    (lambda: RegressionTarget().fit('x', [1., 1e200, 3.]), r'x: expected a number up to 3.402823e\+38, found 1e\+200'),
    (lambda: RegressionTarget().fit('x', [1., 3.], [-1e39]), r'up to 3.402823e\+38, found -1e\+39'),
    (lambda: RegressionTarget().fit('x', [1., np.float64(1e308)]), r'up to 3.402823e\+38, found .*1e\+308'),
    (lambda: RegressionTarget().fit('x', [1e-30, 2e-30], [1.]), r'x: 1.0 is encoded as .* numbers up to 1e\+15'),
    (lambda: RegressionTarget(scale='none').fit('x', [1., 1e16]), r'x: 1e\+16 is encoded as .* numbers up to 1e\+15'),
    (lambda: RegressionTarget().fit('x', [1e-200, 2e-200]), 'x: training labels from 1e-200 to 2e-200 have'),
    (lambda: RegressionTarget().fit('x', [START*1e9, START*1e9+512]), 'rounding drowns what is below'),
    (lambda: CountTarget().fit('x', [1, 10**39]), 'x: expected a count up to 1,000,000, found 1000'),
    (lambda: CountTarget().fit('x', [1, 2], [1e39]), r'x: expected a count up to 1,000,000, found 1e\+39')])
def test_what_is_not_finite_in_float32_is_refused(make, text):
    with pytest.raises(ValueError, match=text): make()

def test_the_largest_numbers_that_are_taken_train_finite():
    rows = [dict(x=o, n=n) for o, n in ((3e38, 0), (-3e38, 10**6), (1e38, 5))]
    table = Targets(x=RegressionTarget(weight=1e15), n=CountTarget()).fit(rows)
    y = torch.stack([table.encode(o) for o in rows])
    assert y.isfinite().all() and table.loss()(torch.zeros(3, 2), y).isfinite()
    for row, encoded in zip(rows, y):
        decoded = table.decode(encoded)
        assert decoded['x'] == pytest.approx(row['x'], rel=1e-6) and decoded['n'] == row['n']

def test_an_average_takes_no_infinite_weights(seconds):
    for weights in ([1e300, 1e300], [1, 1e-200]):
        with pytest.raises(ValueError, match='a weight is 0, or between 1e-15 and 1e'):
            ensemble([seconds]*2, seconds.dls.valid_ds.items[:2], weights=weights)


# --- bounds and units -------------------------------------------------------------------------
class ByHand(nn.Module):
    "The loss of a class and of a percentage in 0 to 100, written out"
    def __init__(self, table):
        super().__init__()
        self.mean,self.std = table['percent'].mean,table['percent'].std

    def forward(self, preds, targs):
        y = targs[:,1]*self.std + self.mean
        off = (100*preds[:,3].sigmoid() - y)/self.std
        return F.cross_entropy(preds[:,:3], targs[:,0].long()) + (off**2).mean()

def test_a_range_trains_as_written_by_hand_alone_mixed_and_in_chunks(path, labels):
    dls = loaders(path, labels, percent=RegressionTarget(range=(0, 100)))
    x,y = (o.cpu().as_subclass(torch.Tensor) for o in dls.one_batch())
    def grads(loss):
        weight = torch.full((64, 4), .01, requires_grad=True)
        loss(x.flatten(1) @ weight, y).backward()
        return weight.grad
    assert torch.allclose(grads(dls.targets.loss()), grads(ByHand(dls.targets)), atol=1e-6)
    states = []
    for cbs in ([], [MicroBatch(5)]):
        set_seed(0)  # which the order of the items follows
        states.append(trained(loaders(path, labels, percent=RegressionTarget(range=(0, 100))), cbs=cbs, opt_func=SGD))
    for a, b in zip(*(o.model.parameters() for o in states)): assert torch.allclose(a, b, atol=1e-5)
    for kwargs in (dict(cbs=MixUp()), dict(weighting='uncertainty')):
        assert np.isfinite(list(reported(trained(dls, 1, **kwargs)).values())).all()

def test_predictions_stay_in_their_range_and_other_columns_are_left_alone(path, labels):
    percent = RegressionTarget(range=(0, 100), metrics=[mae, rmse])
    learn = trained(loaders(path, labels, targets=('slant', 'ink'), percent=percent))
    files,table = learn.dls.valid_ds.items,learn.dls.targets
    raw,_ = learn.get_preds(act=lambda o: o)
    acts,_ = learn.get_preds()
    assert torch.equal(acts[:,table['ink'].out], raw[:,table['ink'].out])
    assert torch.allclose(acts[:,:3], raw[:,:3].softmax(1))
    found,true = predicted(learn, 'percent', labels)
    by_hand = 100/(1+np.exp(-raw[:,table['percent'].out].double().numpy()[:,0]))
    assert np.abs(found-by_hand).max() < 1e-3
    values = reported(learn)
    assert values['percent_mean_absolute_error'] == pytest.approx(np.abs(found-true).mean(), rel=1e-4)
    assert values['percent_root_mean_squared_error'] == pytest.approx(np.sqrt(((found-true)**2).mean()), rel=1e-4)
    shown = MultiTargetInterpretation.from_learner(learn).plot_regression('percent').collections[0].get_offsets()
    plt.close('all')
    assert np.abs(np.asarray(shown)[:,1]-found).max() < 1e-3
    assert np.abs(ensemble([learn]*2, files).percent-found).max() < 1e-4
    with torch.no_grad(): learn.model[1].bias.fill_(1e4)
    assert predict_named(learn, files).percent.eq(100).all()
    with pytest.raises(ValueError, match=r'percent: range=None in learner 1, range=\(0.0, 100.0\) in the first'):
        ensemble([learn, trained(loaders(path, labels, targets=('slant', 'ink', 'percent')), 0)], files)

def test_targets_of_one_range_are_computed_together_and_others_not():
    def within(high): return RegressionTarget(range=(0, high), scale='none')
    kinds = dict(a=within(1), b=within(1), c=within(2), d=RegressionTarget(), e=RegressionTarget(loss=nn.MSELoss()))
    rows = [dict.fromkeys(kinds, o) for o in (0., .3, 1.)]
    table = Targets(kinds).fit(rows)
    assert [g.index for g in groups_of(table)] == [[0, 1], [2], [3], [4]]
    preds = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    y = torch.stack([table.encode(o) for o in rows])
    u = tensor([0., .3, 1.])
    z = (u-u.mean())/u.std(correction=0)
    p = preds.sigmoid()
    by_hand = [((o-t)**2).sum() for o, t in ((p[:,0], u), (p[:,1], u), (2*p[:,2], u), (preds[:,3], z), (preds[:,4], z))]
    assert torch.allclose(table.loss().parts(preds, y).sums, torch.stack(by_hand), atol=1e-5)

@pytest.mark.parametrize('loss, kwargs', [
    (BCEWithLogitsLossFlat(), {}), (nn.BCEWithLogitsLoss(), {}), (F.binary_cross_entropy_with_logits, {}),
    (nn.BCELoss(), dict(range=(0, 1)))], ids=['fastai', 'torch', 'function', 'probabilities'])
def test_shares_are_learned_with_binary_cross_entropy(path, labels, loss, kwargs):
    kind = RegressionTarget(loss=loss, scale='none', metrics=[mae, rmse], **kwargs)
    learn = trained(loaders(path, labels, share=kind))
    raw,y = learn.get_preds(act=lambda o: o)
    found,true = predicted(learn, 'share', labels)
    p = 1/(1+np.exp(-raw[:,3].double().numpy()))
    values = reported(learn)
    assert np.abs(found-p).max() < 1e-6 and ((0 <= found) & (found <= 1)).all()
    assert values['share_loss'] == pytest.approx(np.mean(-true*np.log(p)-(1-true)*np.log(1-p)), abs=1e-6)
    assert values['share_mean_absolute_error'] == pytest.approx(np.abs(p-true).mean(), abs=1e-6)
    assert values['share_root_mean_squared_error'] == pytest.approx(np.sqrt(((p-true)**2).mean()), abs=1e-6)
    files,plain = learn.dls.valid_ds.items,trained(loaders(path, labels, share=RegressionTarget(**kwargs)))
    both = ensemble([learn, plain], files).share
    assert np.abs(both-(found+predict_named(plain, files).share)/2).max() < 1e-6

def test_rates_are_learned_with_poisson(path, labels):
    learn = trained(loaders(path, labels, dots=RegressionTarget(loss=nn.PoissonNLLLoss(), scale='none')))
    raw,_ = learn.get_preds(act=lambda o: o)
    found,true = predicted(learn, 'dots', labels)
    z,values = raw[:,3].double().numpy(),reported(learn)
    assert np.allclose(found, np.exp(z), rtol=1e-6)
    assert values['dots_loss'] == pytest.approx(np.mean(np.exp(z)-true*z), rel=1e-5)
    assert values['dots_mean_absolute_error'] == pytest.approx(np.abs(np.exp(z)-true).mean(), rel=1e-5)

shares = [.1, .5, .9]
@pytest.mark.parametrize('kwargs, labels, text', [
    (dict(loss=BCEWithLogitsLossFlat()), shares, "BCEWithLogitsLoss takes labels from 0 to 1, .* write scale='none'$"),
    (dict(loss=nn.BCELoss()), shares, "BCELoss takes labels from 0 to 1, .* write scale='none'"),
    (dict(loss=nn.PoissonNLLLoss()), [1., 2.], "write scale='none', or CountTarget for counts"),
    (dict(loss=partial(F.poisson_nll_loss, full=True)), [1., 2.], "write scale='none', or CountTarget"),
    (dict(loss=nn.PoissonNLLLoss(log_input=False), scale='none'), [1., 2.], 'takes predictions from 0 to inf'),
    (dict(loss=nn.BCELoss(), scale='none'), shares, r'found an output that may be anything: write range=\(0, 1\)'),
    (dict(loss=BCEWithLogitsLossFlat(), scale='none'), [.1, 2.], 'expected a number from 0 to 1, found 2.0'),
    (dict(loss=nn.PoissonNLLLoss(), scale='none'), [1., -2.], 'expected a number from 0 to inf, found -2.0'),
    (dict(range=(0, 1)), [.1, 1.5], 'expected a number from 0 to 1, found 1.5: mend that label'),
    (dict(loss=nn.KLDivLoss()), shares, 'KLDivLoss does not fit a regression'),
    (dict(loss=nn.SoftMarginLoss()), shares, 'SoftMarginLoss does not fit a regression')])
def test_a_loss_that_does_not_fit_its_labels_is_refused(kwargs, labels, text):
    with pytest.raises(ValueError, match=f'x: .*{text}'): RegressionTarget(**kwargs).fit('x', labels)

def test_a_label_outside_the_range_is_refused_in_validation_too(path, labels):
    with pytest.raises(ValueError, match='percent: expected a number from 0 to 99, found 100.0'):
        loaders(path, labels, percent=RegressionTarget(range=(0, 99)))

def test_a_loss_of_the_users_own_gets_standardised_numbers():
    def log_cosh(preds, targs, reduction='mean'):
        loss = (preds-targs).cosh().log()
        return loss.mean() if reduction == 'mean' else loss
    t = RegressionTarget(loss=log_cosh).fit('x', [1., 3.])
    assert t.losses(tensor([[.5]]), tensor([[-1.]])).item() == pytest.approx(math.log(math.cosh(1.5)))


# --- one order of names -----------------------------------------------------------------------
@pytest.fixture(scope='module')
def two_blocks(path, labels):
    block = DataBlock((ImageBlock(PILImageBW), CategoryBlock, CategoryBlock), n_inp=1, splitter=RandomSplitter(seed=1),
                      get_x=ColReader('image', pref=path/'images'), get_y=[ColReader('slant'), ColReader('side')],
                      item_tfms=Resize(32))
    side = np.where(labels.lean > labels.lean.median(), 'l', np.where(labels.ink > labels.ink.median(), 'm', 'r'))
    return block.dataloaders(labels.assign(side=side), bs=16, num_workers=0)

@pytest.mark.parametrize('make', [
    lambda: sliced_metrics(error_rate, side=3, slant=3), lambda: sliced_metrics(error_rate, slant=3, sides=3),
    lambda: combined_loss(side=(F.cross_entropy, 3), slant=(F.cross_entropy, 3)).metrics()],
    ids=['order', 'name', 'loss'])
def test_metrics_in_another_order_than_the_loss_are_refused(two_blocks, make):
    loss = combined_loss(slant=(F.cross_entropy, 3), side=(F.cross_entropy, 3))
    def learner(metrics):
        return vision_learner(two_blocks, 'test_resnet', pretrained=False, n_in=1, n_out=loss.n_out, loss_func=loss,
                              metrics=metrics)
    learn = learner(make())
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match='where the loss has .*in the same order'):
        learn.validate()
    learn = learner(sliced_metrics(error_rate, slant=3, side=3) + loss.metrics())
    with learn.no_bar(), learn.no_logging(): assert len(learn.validate()) == 5

def test_metrics_of_another_table_are_refused(path, labels):
    one,other = (loaders(path, labels, targets=targets, percent=RegressionTarget(metrics=rmse))
                 for targets in (['slant', 'ink'], ['ink', 'slant']))
    for metrics in (other.targets.metrics(), target_metrics(other.targets, dict(slant=accuracy))[:2]):
        learn = vision_learner(one, 'test_resnet', pretrained=False, n_in=1, n_out=5, metrics=metrics)
        with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match='for other targets than the loss'):
            learn.validate()


# --- empty cells of tags ----------------------------------------------------------------------
@pytest.fixture
def tags(labels): return labels.assign(tags=['a b', '', 'c']*30)

def tagged(path, df, **kwargs):
    kind = MultiCategoryTarget(delim=' ', **kwargs)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        dls = loaders(path, df, tags=kind)
    return dls.targets['tags'],[str(o.message) for o in seen if 'empty' in str(o.message)]

@pytest.mark.parametrize('gap', ['', ' ', None, math.nan], ids=repr)
def test_an_empty_cell_means_what_empty_says(path, tags, gap):
    df = tags.assign(tags=[gap if o == '' else o for o in tags.tags])
    none,said = tagged(path, df, empty='none')
    assert none.n_labels == none.n_train == 72 and none.encode(gap) == [0, 0, 0] and not said
    missing,said = tagged(path, df, empty='missing')
    assert missing.n_labels < 60 and np.isnan(missing.encode(gap)).all() and not said
    unsaid,said = tagged(path, df)
    assert unsaid.n_labels == missing.n_labels and len(said) == 1
    assert said[0].startswith('tags: 30 of 90 cells are empty, and count as missing: '
                              "write MultiCategoryTarget(empty='none')")

def test_nothing_is_said_where_nothing_is_empty(path, tags):
    assert not tagged(path, tags.assign(tags=['a b', 'c', 'a']*30))[1]
    lists = tags.assign(tags=[['a'], [], ['b', 'c']]*30)  # an empty list says that there is none
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*empty')
        assert loaders(path, lists, tags='multicategory').targets['tags'].n_labels == 72
