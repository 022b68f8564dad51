"`MultiTargetInterpretation` on random outputs and labels, beside pandas and scikit-learn"
import io
import re
import warnings
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as skm
import torch
import torch.nn.functional as F
from fastai.vision.all import DataBlock, ImageBlock, IndexSplitter, Learner, MSELossFlat, Resize
from hypothesis import given, settings, strategies as st
from torch import nn

from paddy_multi.all import (CategoryTarget, MultiCategoryTarget, MultiTargetInterpretation, OrdinalTarget,
                             RegressionTarget, Targets, TensorTargets, sample_digits, write_report)
from paddy_multi.use.report import curves_of

matplotlib.use('agg')
DISEASES,SPOTS,STAGES = ['blast', 'hispa', 'normal', 'tungro'],['leaf', 'stem'],['young', 'old', 'dead']


def random_labels(n, seed):
    "Labels of four kinds; in each column a quarter is missing, and the last row has none at all"
    rng = np.random.default_rng(seed)
    df = pd.DataFrame(dict(disease=rng.choice(DISEASES, n), age=rng.normal(60, 10, n), stage=rng.choice(STAGES, n)))
    df['spots'] = [[o for o in SPOTS if rng.random() < .5] for _ in range(n)]
    df = df.astype(object)
    for col in df: df.loc[rng.random(n) < .25, col] = None
    df.iloc[-1] = None
    df.iloc[:4,0],df.iloc[:4,2] = DISEASES,[*STAGES, 'old']   # enough to learn from
    df.iloc[0,1],df.iloc[1,1] = 50.,70.
    df.at[0, 'spots'],df.at[1, 'spots'] = ['leaf'],['stem']
    return df

def interpretation(n=40, seed=0, loss=None, weight=1.):
    "An interpretation of random outputs, the labels, and what the outputs stand for"
    df = random_labels(n, seed)
    rows = df.to_dict('records')
    targets = Targets(disease=CategoryTarget(loss=loss, weight=weight), age=RegressionTarget(),
                      stage=OrdinalTarget(vocab=STAGES), spots=MultiCategoryTarget())
    table = targets.fit(rows)
    torch.manual_seed(seed)
    preds,targs = torch.randn(n, table.n_out),TensorTargets(torch.stack([table.encode(o) for o in rows]))
    learn = SimpleNamespace(loss_func=table.loss(), dls=SimpleNamespace(targets=table, device='cpu'))
    interp = MultiTargetInterpretation(learn, SimpleNamespace(items=[f'{i}.jpg' for i in range(n)]), preds, targs)
    decoded = pd.DataFrame([table.decode(o) for o in learn.loss_func.decodes(learn.loss_func.activation(preds))])
    return interp, df, decoded, preds

seeds = given(st.integers(0, 10**6))
some = settings(deadline=None, max_examples=15)


@seeds
@some
def test_confusion_and_report_leave_missing_labels_out(seed):
    interp,df,decoded,_ = interpretation(seed=seed)
    for name, vocab in (('disease', DISEASES), ('stage', STAGES)):
        have = df[name].notna()
        cm = interp.confusion_matrix(name)
        expected = pd.crosstab(df[name][have], decoded[name][have]).reindex(index=vocab, columns=vocab, fill_value=0)
        assert (cm == expected.values).all() and cm.sum() == have.sum()
        pairs = {(a, b): int(expected.loc[a, b]) for a in vocab for b in vocab if a != b and expected.loc[a, b] >= 2}
        found = interp.most_confused(name, min_val=2)
        assert {o[:2]: o[2] for o in found} == pairs and [o[2] for o in found] == sorted(pairs.values(), reverse=True)
        report = interp.classification_report(name)
        true,pred = (d[name][have].tolist() for d in (df, decoded))
        expected = skm.precision_recall_fscore_support(true, pred, labels=vocab, zero_division=0)
        np.testing.assert_allclose(report.loc[vocab].values, np.stack(expected, 1))

@seeds
@some
def test_report_of_several_labels(seed):
    interp,df,decoded,_ = interpretation(seed=seed)
    have = df.spots.notna()
    report = interp.classification_report('spots')
    for spot in SPOTS:
        true,pred = ([spot in o for o in d.spots[have]] for d in (df, decoded))
        expected = skm.precision_recall_fscore_support(true, pred, average='binary', zero_division=0)[:3]
        np.testing.assert_allclose(report.loc[spot, ['precision', 'recall', 'f1-score']].astype(float), expected)
        assert report.support[spot] == sum(true)

@seeds
@some
def test_joint_errors_are_shares_of_items_with_both_labels(seed):
    interp,df,decoded,_ = interpretation(seed=seed)
    def wrong(name):
        both = zip(df[name], decoded[name])
        if name == 'age': return [a is not None and a == a and abs(a-b) > 12 for a, b in both]
        return [a != b for a, b in both]
    joint = interp.joint_errors(off_by=dict(age=12)).set_index(['target', 'given'])
    assert len(joint) == 12
    for (a, b), row in joint.iterrows():
        both = df[a].notna() & df[b].notna()
        wa,wb = np.array(wrong(a))[both],np.array(wrong(b))[both]
        for part, name in ((wa[wb], 'wrong'), (wa[~wb], 'right')):
            assert row[f'n_{name}'] == len(part)
            np.testing.assert_allclose(row[f'wrong_if_{name}'], part.mean() if len(part) else np.nan)
    gap = (joint.wrong_if_wrong-joint.wrong_if_right).dropna()
    assert gap.is_monotonic_decreasing

def test_a_number_is_wrong_from_its_standard_deviation_on():
    interp,df,decoded,_ = interpretation()
    std = interp.targets['age'].std
    pd.testing.assert_frame_equal(interp.joint_errors(), interp.joint_errors(off_by=dict(age=std)))
    row = interp.joint_errors().set_index(['target', 'given']).loc['disease', 'age']
    have = df.age.notna() & df.disease.notna()
    assert row.n_wrong == sum((df.age[have].astype(float)-decoded.age[have]).abs() > std)

@seeds
@some
def test_top_losses_are_among_labelled_items(seed):
    interp,df,_,preds = interpretation(seed=seed)
    have = df.disease.notna().values
    numbers = torch.tensor([DISEASES.index(o) if isinstance(o, str) else 0 for o in df.disease])
    each = F.cross_entropy(preds[:,:4], numbers, reduction='none')
    losses,idx,items = interp.top_losses(6, target='disease', items=True)
    expected = sorted(each[torch.tensor(have)].tolist(), reverse=True)[:6]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert have[idx].all() and items == [f'{i}.jpg' for i in idx]
    np.testing.assert_allclose(each[idx], losses, rtol=1e-5)
    smallest = interp.top_losses(3, largest=False, target='disease')[0]
    np.testing.assert_allclose(smallest, sorted(each[torch.tensor(have)].tolist())[:3], rtol=1e-5)
    assert len(interp.top_losses(target='disease')[0]) == have.sum()
    total = interp.top_losses()
    assert len(total[0]) == df.notna().any(axis=1).sum() and len(df)-1 not in total[1]
    np.testing.assert_allclose(total[0][0], interp.by_target.nansum(1).max(), rtol=1e-5)

def test_weights_of_targets_and_classes_count_in_the_total():
    w = torch.tensor([1., 2., 3., 4.])
    interp,df,_,preds = interpretation(loss=nn.CrossEntropyLoss(weight=w), weight=.5)
    i = 2
    assert df.disease[i] == 'normal'
    own = w[2]*F.cross_entropy(preds[i:i+1,:4], torch.tensor([2]))
    torch.testing.assert_close(interp.by_target[i,0], own)
    rest = interp.by_target[i,1:].nansum()
    torch.testing.assert_close(interp.losses[i], .5*own + rest)

def test_regression_plot_is_in_units():
    interp,df,decoded,_ = interpretation()
    ax = interp.plot_regression('age', color='green')
    have = df.age.notna()
    points = ax.collections[0].get_offsets().data
    expected = np.stack([o.age[have].astype(float) for o in (df, decoded)], 1)
    np.testing.assert_allclose(points, expected, rtol=1e-4)
    mae,r2 = skm.mean_absolute_error(*points.T),skm.r2_score(*points.T)
    assert ax.get_title() == f'mean absolute error {mae:.3g}, R2 {r2:.3f}'
    plt.close('all')

def test_confusion_plot_writes_every_count():
    interp,*_ = interpretation()
    interp.plot_confusion_matrix(target='stage', title='growth')
    ax = plt.gcf().axes[0]
    assert [int(o.get_text()) for o in ax.texts] == interp.confusion_matrix('stage').ravel().tolist()
    assert ax.get_title() == 'growth' and [o.get_text() for o in ax.get_yticklabels()] == STAGES
    interp.plot_confusion_matrix('disease', normalize=True)
    plt.close('all')

@pytest.mark.parametrize('call', [
    'confusion_matrix', 'plot_confusion_matrix', 'most_confused', 'classification_report', 'plot_regression'])
def test_a_target_that_is_not_there(call):
    with pytest.raises(KeyError) as e: getattr(interpretation()[0], call)('dissease')
    assert "no target 'dissease': choose one of ['disease', 'age', 'stage', 'spots']" in str(e.value)

@pytest.mark.parametrize('ask,error,text', [
    (lambda i: i.top_losses(3, target='dissease'), KeyError, "no target 'dissease'"),
    (lambda i: i.plot_top_losses(3, target='dissease'), KeyError, "no target 'dissease'"),
    (lambda i: i.joint_errors(off_by=dict(dissease=1)), KeyError, "no target 'dissease'"),
    (lambda i: i.joint_errors(off_by=dict(stage=1)), ValueError,
     'stage is of the kind ordinal, expected count or regression: use off_by for numbers only'),
    (lambda i: i.confusion_matrix('age'), ValueError,
     'age is of the kind regression, expected category or ordinal: use plot_regression for numbers'),
    (lambda i: i.plot_confusion_matrix('spots'), ValueError,
     'spots is of the kind multicategory, expected category or ordinal: '
     'use plot_regression for numbers, classification_report for several labels'),
    (lambda i: i.most_confused('age'), ValueError, 'age is of the kind regression, expected category or ordinal'),
    (lambda i: i.classification_report('age'), ValueError,
     'age is of the kind regression, expected category or multicategory or ordinal: use plot_regression'),
    (lambda i: i.plot_regression('disease'), ValueError,
     'disease is of the kind category, expected count or regression: '
     'use plot_confusion_matrix or classification_report'),
])
def test_what_is_refused(ask, error, text):
    with pytest.raises(error) as e: ask(interpretation()[0])
    assert text in str(e.value)

def test_from_learner_takes_a_split_or_a_loader_and_a_table_of_items(tmp_path):
    path = sample_digits(tmp_path)
    df = pd.read_csv(path/'labels.csv', dtype=dict(digit=str))[:40]
    df['image'] = [str(path/'images'/o) for o in df.image]
    targets = Targets.from_df(df, ['digit', 'slant', 'lean'])
    block = DataBlock((ImageBlock, targets.block), get_x=lambda o: o.image, get_y=targets.get_y,
                      splitter=IndexSplitter(range(30, 40)), item_tfms=Resize(16))
    dls = block.dataloaders(df, bs=8, num_workers=0)
    learn = Learner(dls, nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, dls.c)))
    learn.remove_cb(learn.progress)
    train,valid = (MultiTargetInterpretation.from_learner(learn, ds_idx=i) for i in (0, 1))
    assert train.targs.shape == (30, 3) and valid.targs.shape == (10, 3)
    own = MultiTargetInterpretation.from_learner(learn, dl=dls.test_dl(df[30:35], with_labels=True, bs=2))
    torch.testing.assert_close(own.by_target, valid.by_target[:5])
    losses,idx,items = valid.top_losses(3, items=True, target='slant')
    assert items.image.tolist() == df.image[30:].iloc[idx.tolist()].tolist()
    valid.plot_top_losses(3, target='slant')
    assert [ax.texts[0].get_text() for ax in plt.gcf().axes if ax.texts] == [f'loss {o:.2f}' for o in losses]
    plt.close('all')
    with pytest.raises(ValueError, match='the loader holds no labels'):
        MultiTargetInterpretation.from_learner(learn, dl=dls.test_dl(df[30:35]))

def test_a_learner_without_targets_is_refused(tmp_path):
    files = sorted((sample_digits(tmp_path)/'images').iterdir())[:4]
    block = DataBlock((ImageBlock, ImageBlock), splitter=IndexSplitter([0]), item_tfms=Resize(16))
    learn = Learner(block.dataloaders(files, bs=2, num_workers=0), nn.Flatten(), loss_func=MSELossFlat())
    with pytest.raises(TypeError, match='the learner has no declared targets: use ClassificationInterpretation'):
        MultiTargetInterpretation.from_learner(learn)


# --- names of others in plots ---------------------------------------------------------------------------------------
ODD = ['$100% ($50%)', 'f: {$a} ({$b})', r'\$5 \$', 'one $ only', 'two\nlines', '\x1b[2Jcleared', 'x'*300,
       'US$ #1_a^b & ~']

def texts(fig):
    "What a figure shows, as it is drawn"
    found = fig.findobj(matplotlib.text.Text)
    assert not any(matplotlib.cbook.is_math_text(o.get_text()) for o in found)
    return {o.get_text().replace(r'\$', '$') for o in found}

@pytest.fixture
def drawn_without_a_word():
    "No warning, such as for a character that no font has or a plot without room"
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        yield
    plt.close('all')

def odd_interpretation():
    rows = [{'$a ($b%)': o, 'n {$c} ({$d})': float(i)} for i, o in enumerate(ODD*3)]
    table = Targets(**{'$a ($b%)': CategoryTarget(), 'n {$c} ({$d})': RegressionTarget()}).fit(rows)
    torch.manual_seed(0)
    preds, targs = torch.randn(len(rows), table.n_out), TensorTargets(torch.stack([table.encode(o) for o in rows]))
    learn = SimpleNamespace(loss_func=table.loss(), dls=SimpleNamespace(targets=table, device='cpu'))
    return MultiTargetInterpretation(learn, SimpleNamespace(items=[*range(len(rows))]), preds, targs)

def test_a_confusion_matrix_shows_names_as_they_are(drawn_without_a_word):
    odd_interpretation().plot_confusion_matrix('$a ($b%)')
    plt.gcf().savefig(io.BytesIO(), format='png', bbox_inches='tight')
    short = [o for o in ODD if len(o) < 30 and o.isprintable()]
    assert {*short, '$a ($b%)', r'two\nlines', r'\x1b[2Jcleared', 'x'*20 + '…' + 'x'*9} <= texts(plt.gcf())

def test_a_regression_plot_shows_names_as_they_are(drawn_without_a_word):
    fig = odd_interpretation().plot_regression('n {$c} ({$d})').figure
    fig.savefig(io.BytesIO(), format='png', bbox_inches='tight')
    assert {'true n {$c} ({$d})', 'predicted n {$c} ({$d})'} <= texts(fig)

def test_large_numbers_are_written_out(drawn_without_a_word):
    "Seconds since 1970 within a minute, whose axes would say 0 to 60 beside '+1.7e9'"
    rows = [dict(at=1.7e9 + o) for o in range(60)]
    table = Targets(at=RegressionTarget()).fit(rows)
    learn = SimpleNamespace(loss_func=table.loss(), dls=SimpleNamespace(targets=table, device='cpu'))
    targs = TensorTargets(torch.stack([table.encode(o) for o in rows]))
    preds = torch.linspace(-1, 1, 60)[:,None]
    ax = MultiTargetInterpretation(learn, SimpleNamespace(items=[*range(60)]), preds, targs).plot_regression('at')
    ax.figure.savefig(io.BytesIO(), format='png')
    for axis in (ax.xaxis, ax.yaxis):
        assert axis.get_offset_text().get_text() == ''
        assert all(o.get_text().startswith(('17000000', '1699999')) for o in axis.get_ticklabels())
    true = np.array([o['at'] for o in rows])
    predicted = np.linspace(-1, 1, 60)*table['at'].std + true.mean()
    mae, r2 = np.abs(predicted-true).mean(), skm.r2_score(true, predicted)
    assert ax.get_title() == f'mean absolute error {mae:.3g}, R2 {r2:.3f}'

def test_a_report_of_odd_names(tmp_path, drawn_without_a_word):
    "Of classes, targets and files; the page holds no control character, and shows what is HTML as it is"
    path = sample_digits(tmp_path)
    names = [*ODD[:-1], '<script>alert(1)</script>']
    files = sorted((path/'images').iterdir())[:40]
    targets = Targets(**{'<b> $1 ($2%)': CategoryTarget(lambda o: names[files.index(o) % len(names)]),
                         '_n $3% ($4)': RegressionTarget(lambda o: float(files.index(o)))})
    block = DataBlock((ImageBlock, targets.block), get_y=targets.get_y, splitter=IndexSplitter(range(24, 40)),
                      item_tfms=Resize(16))
    dls = block.dataloaders(files, bs=8, num_workers=0)
    learn = Learner(dls, nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, dls.c)),
                    metrics=dls.targets.metrics())
    rows = pd.DataFrame({'epoch': [0, 1], 'train_loss': [2., 1.], '_n $3% ($4)_loss': [2., 1.], 'a $5% ($6)': [.5, .6]})
    text = write_report(learn, tmp_path/'report.html', rows, '$7% ($8) \x1b[2J').read_text(encoding='utf-8')
    assert len(re.findall('<img ', text)) == 2 + 2*2
    assert '<b> $1' not in text and '<h2>&lt;b&gt; $1 ($2%)</h2>' in text and '<script>' not in text
    assert all(o.isprintable() or o == '\n' for o in text) and r'\x1b[2J' in text

def test_a_legend_leaves_no_name_out():
    rows = pd.DataFrame({'epoch': [0, 1], 'train_loss': [2., 1.], '_n $3% ($4)_loss': [2., 1.]})
    fig = curves_of(rows)
    fig.savefig(io.BytesIO(), format='png')
    assert {'train_loss', '_n $3% ($4)_loss'} <= texts(fig)
    plt.close('all')
