"Every call of fastai on three targets of unequal widths with missing labels, beside the same worked out by hand"
import json
import random
import re
import subprocess
import sys

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as skm
import torch
import torch.nn.functional as F
from fastai.vision.all import (Callback, CategoryBlock, ClassificationInterpretation, ColReader, CutMix,
                               DataBlock, EarlyStoppingCallback, F1Score, ImageBlock, IndexSplitter,
                               Interpretation, Learner, MixUp, PILImageBW, RandomSplitter, ReduceLROnPlateau,
                               RegressionBlock, Resize, RocAuc, SaveModelCallback, TransformBlock, accuracy,
                               load_learner, noop, resnet18, set_seed, vision_learner)
from hypothesis import given, settings, strategies as st
from torch import nn

from paddy_multi.data.digits import sample_digits
from paddy_multi.kinds.category import CategoryTarget
from paddy_multi.kinds.multicategory import MultiCategoryTarget
from paddy_multi.kinds.ordinal import OrdinalTarget
from paddy_multi.kinds.regression import RegressionTarget
from paddy_multi.targets.declare import Targets
from paddy_multi.targets.encoded import TensorTargets, by_name
from paddy_multi.targets.table import TargetRow
from paddy_multi.train.learner import multi_target_learner
from paddy_multi.use.interpret import MultiTargetInterpretation

matplotlib.use('agg')
fast = settings(deadline=None, max_examples=30)
SLANTS = ['left', 'right', 'upright']  # as sorted for the vocabulary


# --- pictures and labels: digit takes output columns 0:4, lean 4:5, slant 5:8 -----------------------------------------
@pytest.fixture(scope='module')
def path(tmp_path_factory): return sample_digits(tmp_path_factory.mktemp('digits'))

@pytest.fixture(scope='module')
def labels(path):
    "120 digits 0 to 3 by file name; a third of the slants and a fifth of the leans are missing"
    df = pd.read_csv(path/'labels.csv', dtype=dict(digit=str))
    df = df[df.digit < '4'].sample(120, random_state=0).reset_index(drop=True)
    df.loc[df.sample(frac=1/3, random_state=1).index, 'slant'] = None
    df.loc[df.sample(frac=1/5, random_state=2).index, 'lean'] = None
    return df

def declare(labels, **slant):
    return Targets(digit=CategoryTarget(by_name(labels, 'image', 'digit')),
                   lean=RegressionTarget(by_name(labels, 'image', 'lean')),
                   slant=CategoryTarget(by_name(labels, 'image', 'slant'), **slant))

def files_of(path, labels): return [path/'images'/o for o in labels.image]

def block(targets, seed=0, **kwargs):
    defaults = dict(blocks=(ImageBlock(PILImageBW), targets.block), get_y=targets.get_y,
                    splitter=RandomSplitter(.25, seed=seed), item_tfms=Resize(16))
    return DataBlock(**{**defaults, **kwargs})

def load(path, labels, targets=None, bs=16, **kwargs):
    set_seed(0)
    return block(targets or declare(labels), **kwargs).dataloaders(files_of(path, labels), bs=bs, num_workers=0)

def tiny(n_out):
    return nn.Sequential(nn.Conv2d(1, 6, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(54, n_out))

def learner(dls, path=None, **kwargs):
    set_seed(1)
    return Learner(dls, tiny(dls.c), **{**dict(metrics=dls.targets.metrics(), path=path, lr=.01), **kwargs})

@pytest.fixture(scope='module')
def dls(path, labels): return load(path, labels)

@pytest.fixture(scope='module')
def learn(dls, tmp_path_factory):
    "Trained once; tests that train make their own"
    learn = learner(dls, tmp_path_factory.mktemp('learner'))
    fit(learn, 2)
    return learn

def fit(learn, *args, **kwargs):
    with learn.no_logging(), learn.no_bar(): learn.fit(*args, **kwargs)


# --- the same by hand -------------------------------------------------------------------------------------------------
def rows_by_hand(items, labels, mean, std):
    "Class numbers and standardised leans of `items` `[n, 3]`, NaN where missing"
    df = labels.set_index('image').loc[[o.name for o in items]]
    slant = df.slant.map({o: float(i) for i, o in enumerate(SLANTS)})
    return torch.tensor(np.stack([df.digit.astype(float), (df.lean-mean)/std, slant], 1).astype(float)).float()

def losses_by_hand(p, y):
    "The three targets' losses of each item, and which have a label"
    valid,y = ~y.isnan(),y.nan_to_num(0)
    digit = F.cross_entropy(p[:,0:4], y[:,0].long(), reduction='none')
    lean = (p[:,4]-y[:,1])**2
    slant = F.cross_entropy(p[:,5:8], y[:,2].long(), reduction='none')
    return torch.stack([digit, lean, slant], 1), valid

def loss_by_hand(p, y):
    p,y = torch.Tensor(p),torch.Tensor(y)
    losses,valid = losses_by_hand(p, y)
    return sum(losses[valid[:,i],i].mean() for i in range(3) if valid[:,i].any())

@pytest.fixture(scope='module')
def by_hand(dls, labels, learn):
    "Output of `learn` for the validation split, and its labels, both without the package"
    train = labels.set_index('image').lean[[o.name for o in dls.train_ds.items]]
    y = rows_by_hand(dls.valid_ds.items, labels, train.mean(), train.std(ddof=0))
    x = torch.cat([b[0] for b in dls.valid.new(shuffle=False)])
    with torch.no_grad(): return torch.Tensor(learn.model.eval().cpu()(x.cpu())), y

def close(a, b, rtol=1e-5, atol=1e-6):
    np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=rtol, atol=atol)


# --- data -------------------------------------------------------------------------------------------------------------
def test_table_and_batches(dls, by_hand):
    assert dls.targets.slices == dict(digit=slice(0, 4), lean=slice(4, 5), slant=slice(5, 8))
    assert dls.c == 8 and dls.n_inp == 1
    y = torch.cat([b[1] for b in dls.valid])
    assert isinstance(y, TensorTargets)
    close(y.cpu(), by_hand[1], atol=1e-5)

def test_a_datablock_used_twice_fits_two_tables(path, labels):
    b = block(declare(labels), splitter=RandomSplitter(.25, seed=0))
    one = b.dataloaders(files_of(path, labels), num_workers=0)
    mean = one.targets['lean'].mean
    fewer = labels[labels.digit != '2']
    with pytest.warns(UserWarning, match="33 rows of column 'image' have no item, such as '0022.png'"):
        two = b.dataloaders(files_of(path, fewer), num_workers=0)
    assert (one.targets.vocabs['digit'], two.targets.vocabs['digit']) == (list('0123'), list('013'))
    assert (one.c, two.c) == (8, 7) and one.targets['lean'].mean == mean != two.targets['lean'].mean

def test_class_found_only_in_validation_is_named_kept_and_an_error(path, labels):
    only = labels.index[labels.digit == '3'].tolist()
    message = "digit: '3' found outside the training split only: never trained, and counted as an error"
    with pytest.warns(UserWarning, match=message):
        dls = load(path, labels, splitter=IndexSplitter([*only, *labels.index[labels.digit == '0'][:5]]))
    assert dls.targets.vocabs['digit'] == list('0123')
    learn = learner(dls)
    fit(learn, 1)
    with torch.no_grad(): learn.model[-1].bias[3] = -1e4   # as a class without a training item tends to be
    p,y = learn.get_preds()
    assert (p[:,:4].argmax(1) != y[:,0]).float().mean() >= len(only)/(len(only)+5)
    assert learn.validate()[1] == pytest.approx(float((p[:,:4].argmax(1) != y[:,0]).float().mean()))

def test_show_batch(dls):
    plt.close('all')
    dls.show_batch(max_n=4)
    axes = plt.gcf().axes
    assert [len(o.texts) for o in axes] == [3]*4
    names = {o.get_text().split(':')[0] for ax in axes for o in ax.texts}
    assert names == {'digit', 'lean', 'slant'}
    plt.close('all')

def test_test_dl_with_and_without_labels(dls, learn, labels):
    items = dls.valid_ds.items[:5]
    with_labels = dls.test_dl(items, with_labels=True)
    x,y = with_labels.one_batch()
    assert with_labels.n_inp == 1 and y.shape == (5, 3)
    close(y.cpu(), torch.stack([dls.valid_ds[i][1] for i in range(5)]))
    assert len(dls.test_dl(items).one_batch()) == 1
    assert learn.get_preds(dl=dls.test_dl(items))[1] is None


# --- training ---------------------------------------------------------------------------------------------------------
def test_lr_find_fit_fine_tune_leave_finite_weights(dls, tmp_path):
    learn = learner(dls, tmp_path)
    with learn.no_logging(), learn.no_bar():
        assert 0 < learn.lr_find(num_it=8, show_plot=False).valley < 10
        learn.fine_tune(1, .01)
        learn.fit_one_cycle(1, .01)
    assert all(o.isfinite().all() for o in learn.model.parameters())
    assert learn.recorder.metric_names[1:-1] == [
        'train_loss', 'valid_loss', 'digit_error_rate', 'lean_mean_absolute_error', 'slant_error_rate',
        'digit_loss', 'lean_loss', 'slant_loss']

def test_validate_is_the_split_as_one_batch_however_it_is_cut(learn, dls, by_hand):
    p,y = by_hand
    losses,valid = losses_by_hand(p, y)
    std = dls.targets['lean'].std
    wrong = [(p[:,0:4].argmax(1) != y[:,0]).float(), (p[:,4]-y[:,1]).abs()*std, (p[:,5:8].argmax(1) != y[:,2]).float()]
    hand = [o[valid[:,i]].mean() for i, o in enumerate([*wrong])] + [losses[valid[:,i],i].mean() for i in range(3)]
    assert not valid[:,1].all() and not valid[:,2].all()
    for bs in (4, 7, 64):
        with learn.no_bar(): close(learn.validate(dl=dls.valid.new(bs=bs))[1:], hand)
    whole = multi_target_learner(dls, learn.model[:-1], head=learn.model[-1])
    for bs in (4, 64):
        with whole.no_logging(), whole.no_bar(): close(whole.validate(dl=dls.valid.new(bs=bs))[0], loss_by_hand(p, y))

def test_vision_learner_needs_neither_n_out_nor_loss(dls):
    learn = vision_learner(dls, resnet18, pretrained=False, n_in=1, metrics=dls.targets.metrics())
    with learn.no_bar(): assert learn.get_preds(dl=dls.test_dl(dls.valid_ds.items[:2]))[0].shape == (2, 8)
    x,y = dls.one_batch()
    assert learn.loss_func(learn.model(x), y).isfinite()

def test_too_wide_an_output_is_refused(dls):
    learn = learner(dls)
    learn.model[-1] = nn.Linear(54, 9)
    message = "the targets ['digit', 'lean', 'slant'] need an output [bs, 8], the model gives [16, 9]: set n_out=8"
    with pytest.raises(ValueError, match=re.escape(message)): fit(learn, 1)

def train_by_hand(dls, loss, n_out=8):
    set_seed(1)
    learn = Learner(dls, tiny(n_out), loss_func=loss)
    set_seed(2)
    fit(learn, 1, .01)
    return torch.cat([o.detach().flatten() for o in learn.model.parameters()]).cpu()

def test_weights_after_an_epoch_equal_the_hand_written_ones_with_missing_labels(path, labels):
    ours = train_by_hand(load(path, labels), None)
    close(ours, train_by_hand(load(path, labels), loss_by_hand), rtol=1e-4, atol=1e-6)

def test_weights_after_an_epoch_equal_those_of_a_tuple_of_blocks(path, labels):
    full = pd.read_csv(path/'labels.csv', dtype=dict(digit=str)).set_index('image').loc[labels.image].reset_index()
    packed = load(path, full)
    mean,std = packed.targets['lean'].mean,packed.targets['lean'].std
    get = full.set_index('image')
    set_seed(0)
    get_y = [lambda o: get.digit[o.name], lambda o: (get.lean[o.name]-mean)/std, lambda o: get.slant[o.name]]
    blocks = (ImageBlock(PILImageBW), CategoryBlock, RegressionBlock, CategoryBlock)
    tuples = DataBlock(blocks, n_inp=1, get_y=get_y, splitter=RandomSplitter(.25, seed=0), item_tfms=Resize(16))
    tuples = tuples.dataloaders(files_of(path, full), bs=16, num_workers=0)
    def loss(p, digit, lean, slant):
        return F.cross_entropy(p[:,:4], digit) + F.mse_loss(p[:,4], lean) + F.cross_entropy(p[:,5:], slant)
    a,b = train_by_hand(packed, None),train_by_hand(tuples, loss)
    print('largest difference', float((a-b).abs().max()))
    close(a, b, rtol=1e-4, atol=1e-6)

class Spy(Callback):
    "Keeps what the mixing callback saw in its first batch"
    order = 100
    def __init__(self, mix): self.mix,self.seen = mix,None
    def after_loss(self):
        if not self.training or self.seen is not None: return
        seen = self.pred,self.yb[0],self.mix.yb1[0],self.learn.loss_grad,self.mix.lam
        self.seen = [o.detach().clone() for o in seen]

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixed_batches_with_missing_labels_are_mixed_as_by_hand(dls, mix):
    learn,mix = learner(dls),mix()
    spy = Spy(mix)
    fit(learn, 1, cbs=[mix, spy])
    p,y,y1,loss,lam = (torch.Tensor(o.cpu()) for o in spy.seen)
    hand = 0.
    for share, labels in ((lam, y), (1-lam, y1)):
        losses,valid = losses_by_hand(p, labels)
        share = share.expand(len(p))
        hand += sum((share*losses[:,i])[valid[:,i]].sum()/valid[:,i].sum() for i in range(3))
    assert y.isnan().any() and (lam < 1).any()
    close(loss, hand)
    assert learn.loss_func.table is dls.targets and learn.loss_func.reduction == 'mean'
    assert all(o.isfinite().all() for o in learn.model.parameters())

def test_a_number_missing_everywhere_in_a_batch_leaves_its_column_alone(dls):
    learn = learner(dls)
    x,y = (o.cpu() for o in dls.one_batch())
    y[:,1] = float('nan')
    learn.loss_func(learn.model.cpu()(x), y).backward()
    assert learn.model[-1].weight.grad[4].eq(0).all() and learn.model[-1].weight.grad[:4].ne(0).any()

@pytest.mark.parametrize('name,least', [
    ('digit_error_rate', True), ('slant_accuracy', False), ('lean_mean_absolute_error', True),
    ('lean_loss', True), ('digit_f1_score', False), ('slant_roc_auc_score', False)])
def test_trackers_go_the_right_way(dls, tmp_path, name, least):
    own = dict(digit=[wrong_share_error, F1Score(average='macro')], slant=[accuracy, RocAuc()])
    metrics = dls.targets.metrics(**({} if name == 'digit_error_rate' else own))
    learn = learner(dls, tmp_path, metrics=metrics)
    save = SaveModelCallback(monitor=name, fname='best')
    stop = EarlyStoppingCallback(monitor=name, patience=9)
    reduce = ReduceLROnPlateau(monitor=name, patience=9)
    fit(learn, 3, cbs=[save, stop, reduce])
    names = learn.recorder.metric_names[1:-1]
    values = [o[names.index(name)] for o in learn.recorder.values]
    best = min(values) if least else max(values)
    assert [o.best for o in (save, stop, reduce)] == [best]*3
    assert {o.comp for o in (save, stop, reduce)} == {np.less if least else np.greater}
    with learn.no_bar(): again = learn.validate()[names.index(name)-1]
    assert again == pytest.approx(best)                      # SaveModelCallback loads the best at the end

def wrong_share_error(preds, targs): return (preds.argmax(1) != targs).float().mean()

def test_metrics_of_scikit_learn_are_exact_over_labelled_items(path, labels, learn, by_hand):
    p,y = by_hand
    dls = learn.dls
    metrics = dls.targets.metrics(digit=F1Score(average='macro'), slant=[F1Score(average='macro'), RocAuc()])
    own = learner(dls, metrics=metrics)
    own.model = learn.model
    with own.no_bar(): got = dict(zip([o.name for o in own.metrics], own.validate(dl=dls.valid.new(bs=5))[1:]))
    m = ~y[:,2].isnan()
    close(got['digit_f1_score'], skm.f1_score(y[:,0], p[:,:4].argmax(1), average='macro'))
    close(got['slant_f1_score'], skm.f1_score(y[m,2], p[m,5:].argmax(1), average='macro'))
    close(got['slant_roc_auc_score'], skm.roc_auc_score(y[m,2], p[m,5:].softmax(1), multi_class='ovr'))

def test_metric_without_a_name_is_refused(dls):
    with pytest.raises(ValueError, match='digit: a metric is known by its name and a lambda has none'):
        dls.targets.metrics(digit=lambda p, t: 0.)

def test_learned_weights_are_trained_saved_and_exported(dls, tmp_path):
    learn = multi_target_learner(dls, tiny(8)[:-1], head=nn.Linear(54, 8), weighting='uncertainty', path=tmp_path)
    before = learn.model.log_vars.detach().cpu().clone()
    fit(learn, 1, .1)
    after = learn.model.log_vars.detach().cpu()
    assert (after != before).all()
    saved = torch.load(learn.save('learned'), weights_only=False, map_location='cpu')
    assert after.equal(saved['model']['log_vars'])
    learn.export('learned.pkl')
    loaded = load_learner(tmp_path/'learned.pkl')
    assert loaded.model.log_vars.equal(after) and loaded.loss_func.log_vars is loaded.model.log_vars
    # Half for a number: Kendall et al., equation 10
    expected = np.exp(-after.numpy())*[1, .5, 1]
    close(loaded.loss_func.weights.detach(), expected)


# --- predictions ------------------------------------------------------------------------------------------------------
def acts_by_hand(p): return torch.cat([p[:,:4].softmax(1), p[:,4:5], p[:,5:].softmax(1)], 1)

def test_get_preds_with_all_it_can_give(learn, dls, by_hand):
    p,y = by_hand
    with learn.no_bar():
        x,acts,targs,decoded,losses = learn.get_preds(with_input=True, with_decoded=True, with_loss=True)
    assert x.shape[0] == len(y)
    close(acts, acts_by_hand(p))
    close(targs, y, atol=1e-5)
    close(decoded, torch.stack([p[:,:4].argmax(1), p[:,4], p[:,5:].argmax(1)], 1))
    each,valid = losses_by_hand(p, y)
    close(losses, (each*valid).sum(1))

def test_predict_gives_names_and_units(learn, dls, by_hand):
    with learn.no_bar(): row,encoded,acts = learn.predict(dls.valid_ds.items[3])
    p = by_hand[0][3]
    assert isinstance(row, TargetRow) and list(row) == ['digit', 'lean', 'slant']
    assert (row['digit'], row['slant']) == (list('0123')[p[:4].argmax()], SLANTS[p[5:].argmax()])
    assert row['lean'] == pytest.approx(float(p[4])*dls.targets['lean'].std + dls.targets['lean'].mean, abs=1e-4)
    close(acts, acts_by_hand(p[None])[0])
    assert encoded.shape == (3,)
    with learn.no_bar(): assert learn.predict(PILImageBW.create(dls.valid_ds.items[3]), with_input=True)[1] == row

def test_tta_averages_probabilities(learn, dls, by_hand):
    with learn.no_bar(), learn.no_logging(): acts,y = learn.tta(n=2)
    close(acts, acts_by_hand(by_hand[0]))   # nothing is augmented here, so all passes agree
    assert torch.equal(y.isnan(), by_hand[1].isnan())

def test_show_results_and_top_losses(learn):
    plt.close('all')
    with learn.no_bar():
        learn.show_results(max_n=4)
        assert [len(o.texts) for o in plt.gcf().axes] == [3]*4
        for interp in (Interpretation.from_learner(learn), MultiTargetInterpretation.from_learner(learn)):
            interp.plot_top_losses(3)
            shown = [ax.texts[0].get_text() for ax in plt.gcf().axes if ax.texts]
            assert shown == [f'loss {o:.2f}' for o in interp.top_losses(3)[0]]
            interp.show_results([0, 1])
    plt.close('all')

def test_fastai_classification_interpretation_does_not_mix_targets_up(learn):
    "It knows one vocabulary; without one on the data it stops instead of comparing all columns with it"
    with learn.no_bar(), pytest.raises(AttributeError): ClassificationInterpretation.from_learner(learn)

NEW_PROCESS = """
import json, sys
import torch
from fastai.learner import load_learner
from paddy_multi.use.predict import predict_named
out = {}
for file in sys.argv[2:]:
    learn = load_learner(file)
    items = json.loads(sys.argv[1])
    if 'frame' in file:
        import pandas as pd
        items = pd.DataFrame(dict(image=items))
    with learn.no_bar():
        row = learn.predict(items[0] if isinstance(items, list) else items.iloc[0])[0]
        acts = learn.get_preds(dl=learn.dls.test_dl(items))[0]
        named = predict_named(learn, items)
    out[file] = [dict(row), acts.tolist(), named.digit_prob.tolist()]
print('RESULT'+json.dumps(out))
"""

def test_exported_learners_in_a_new_process(path, labels, learn, tmp_path):
    "One made from files, one from a table: the same predictions, without the tables that labels were read from"
    targets = Targets.from_df(labels, ['digit', 'lean', 'slant'])
    set_seed(0)
    with_paths = labels.assign(image=[str(o) for o in files_of(path, labels)])
    frame = block(targets, get_x=ColReader('image')).dataloaders(with_paths, bs=16, num_workers=0)
    from_frame = learner(frame)
    fit(from_frame, 1)
    items = [str(o) for o in learn.dls.valid_ds.items[:4]]
    expected = {}
    for name, one, test in (('files', learn, items), ('frame', from_frame, pd.DataFrame(dict(image=items)))):
        file = tmp_path/f'{name}.pkl'
        one.export(file)
        content = file.read_bytes()
        found = [o for o in labels.image if o.encode() in content]
        assert not found, 'names of training files are in the exported learner'
        with one.no_bar():
            acts = one.get_preds(dl=one.dls.test_dl(test))[0]
            row = one.predict(test[0] if name == 'files' else test.iloc[0])[0]
        expected[str(file)] = acts,row
    command = [sys.executable, '-W', 'ignore', '-c', NEW_PROCESS, json.dumps(items), *expected]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for file, (row, acts, prob) in json.loads(done.stdout.split('RESULT')[1]).items():
        close(acts, expected[file][0], rtol=1e-4, atol=1e-5)  # there a CPU, here what fastai chose
        close(prob, expected[file][0][:,:4].max(1)[0], rtol=1e-4)
        assert [row[o] for o in ('digit', 'slant')] == [expected[file][1][o] for o in ('digit', 'slant')]
        assert row['lean'] == pytest.approx(expected[file][1]['lean'], rel=1e-4)

class TwoInputs(nn.Module):
    def __init__(self, n_out):
        super().__init__()
        self.body,self.head = tiny(8),nn.Linear(16, n_out)
    def forward(self, a, b): return self.head(torch.cat([self.body(a), self.body(b)], 1))

def test_a_table_without_pictures_keeps_every_vocabulary_and_number_apart():
    "Where TabularPandas gives two categories the vocabulary of the first, and turns a number beside them into -1"
    df = pd.DataFrame(dict(a=np.arange(24.), b=np.arange(24.)%7, colour=['red','green','blue']*8,
                           shape=['cube','ball','cone','rod']*6, mass=np.arange(24.)*3))
    targets = Targets.from_df(df, ['colour', 'shape', 'mass'])
    def get_x(row): return torch.tensor([row.a, row.b], dtype=torch.float32)
    rows = DataBlock(blocks=(TransformBlock, targets.block), get_x=get_x, get_y=targets.get_y,
                     splitter=IndexSplitter(range(18, 24)))
    dls = rows.dataloaders([row for _, row in df.iterrows()], bs=6, num_workers=0)
    assert dls.targets.vocabs == dict(colour=['blue','green','red'], shape=['ball','cone','cube','rod'], mass=None)
    assert dls.targets['mass'].mean == pytest.approx(25.5)                    # of 0, 3, ..., 51
    learn = Learner(dls, nn.Linear(2, dls.c), metrics=dls.targets.metrics())
    fit(learn, 1)
    second = dict(learn.dls.targets.decode(dls.valid_ds[1][1]))
    assert second == dict(colour='green', shape='rod', mass=pytest.approx(57, rel=1e-5))
    assert set(learn.predict(df.iloc[3])[0]) == {'colour', 'shape', 'mass'}


def test_two_inputs(path, labels):
    targets = declare(labels)
    set_seed(0)
    blocks = (ImageBlock(PILImageBW), ImageBlock(PILImageBW), targets.block)
    two = block(targets, blocks=blocks, n_inp=2, get_x=[noop, noop])
    dls = two.dataloaders(files_of(path, labels), bs=16, num_workers=0)
    learn = Learner(dls, TwoInputs(dls.c), metrics=dls.targets.metrics())
    fit(learn, 1)
    with learn.no_bar():
        acts,y = learn.get_preds()
        row,_,one = learn.predict(dls.valid_ds.items[0])
        learn.show_results(max_n=2)
        dls.show_batch(max_n=2)
    plt.close('all')
    close(one, acts[0])
    assert row['digit'] == list('0123')[acts[0,:4].argmax()] and y.shape[1] == 3


# --- random tables of targets: kinds, widths, missing labels ----------------------------------------------------------
KINDS = dict(category=CategoryTarget, multicategory=MultiCategoryTarget, regression=RegressionTarget,
             ordinal=OrdinalTarget)

def label_of(kind, vocab, rng):
    if kind == 'regression': return rng.uniform(-50, 50)
    if kind == 'multicategory': return [o for o in vocab if rng.random() < .5]
    return rng.choice(vocab)

def first_two(kind, vocab):
    "Enough to learn from"
    if kind == 'regression': return [1., 2.]
    return [vocab[:1], vocab[1:]] if kind == 'multicategory' else vocab[:2]

@st.composite
def one_target(draw, n):
    "A target, and its column of `n` labels"
    kind = draw(st.sampled_from([*KINDS]))
    width,missing = draw(st.integers(2, 5)),draw(st.sampled_from([0., .3, .8]))
    rng = random.Random(draw(st.integers(0, 999)))
    vocab,weight = [f'c{j}' for j in range(width)],draw(st.sampled_from([1., .5, 2.]))
    more = {} if kind == 'regression' else dict(vocab=vocab)
    none = [None, float('nan')]
    column = [label_of(kind, vocab, rng) if rng.random() >= missing else rng.choice(none) for _ in range(n)]
    column[:2] = first_two(kind, vocab)
    return KINDS[kind](weight=weight, **more), column

@st.composite
def tables(draw):
    "Targets by name, and 4 to 12 rows of labels"
    n = draw(st.integers(4, 12))
    drawn = draw(st.lists(one_target(n), min_size=1, max_size=5))
    names = [f't{i}' for i in range(len(drawn))]
    declared = {name: target for name, (target, _) in zip(names, drawn)}
    return declared, [dict(zip(names, row)) for row in zip(*(column for _, column in drawn))]

def same(label, back):
    if label is None or label != label: return back is None
    return back == (pytest.approx(label, abs=1e-3) if isinstance(label, float) else label)

@given(tables())
@fast
def test_encode_decode_round_trip_and_slices_that_tile(made):
    declared,rows = made
    table = Targets(declared).fit(rows)
    for row in rows:
        back = table.decode(table.encode(row))
        assert list(back) == list(declared) and all(same(row[name], back[name]) for name in declared)
    for slices, n in ((table.slices.values(), table.n_out), ([t.cols for t in table], table.n_cols)):
        assert [i for s in slices for i in range(s.start, s.stop)] == list(range(n))
    assert [s.stop-s.start for s in table.slices.values()] == list(table.widths.values())

def encoded(table, rows): return torch.stack([torch.Tensor(table.encode(o)) for o in rows]).double()

@given(tables(), st.randoms())
@fast
def test_order_of_targets_does_not_change_the_total_loss(made, rnd):
    declared,rows = made
    table = Targets(declared).fit(rows)
    names = list(declared)
    rnd.shuffle(names)
    other = Targets({o: declared[o] for o in names}).fit(rows)
    torch.manual_seed(0)
    p = torch.randn(len(rows), table.n_out, dtype=torch.float64)
    moved = torch.cat([p[:,table[o].out] for o in names], 1)
    a,b = table.loss()(p, encoded(table, rows)),other.loss()(moved, encoded(other, rows))
    close(a, b, rtol=1e-12)
    for o in ('sums', 'counts'):
        ours,theirs = (getattr(t.loss().parts(x, encoded(t, rows)), o) for t, x in ((table, p), (other, moved)))
        close(ours, theirs[[names.index(n) for n in declared]], rtol=1e-12)

@given(tables())
@fast
def test_loss_is_that_of_a_loop_over_labelled_items_and_missing_labels_have_no_gradient(made):
    declared,rows = made
    table = Targets(declared).fit(rows)
    torch.manual_seed(0)
    p = torch.randn(len(rows), table.n_out, dtype=torch.float64, requires_grad=True)
    y = encoded(table, rows)
    hand = 0.
    for t in table:
        have = [i for i, o in enumerate(rows) if t.decode(y[i,t.cols]) is not None]
        q,v = p[have][:,t.out],y[have][:,t.cols]
        if t.kind == 'category': one = F.cross_entropy(q, v[:,0].long())
        elif t.kind == 'multicategory': one = F.binary_cross_entropy_with_logits(q, v)
        elif t.kind == 'regression': one = F.mse_loss(q, v)
        else:   # CORN: the mean over all pairs of a rank and an item that reaches it
            reached = [(i, j) for i in range(len(have)) for j in range(t.width) if v[i,0] >= j]
            terms = [F.binary_cross_entropy_with_logits(q[i,j], (v[i,0] > j).double()) for i, j in reached]
            one = sum(terms)/len(terms)
        hand = hand + t.weight*one
    loss = table.loss()(p, y)
    close(loss.detach(), hand.detach(), rtol=1e-10)
    loss.backward()
    for t in table: assert p.grad[~t.valid(y[:,t.cols])][:,t.out].eq(0).all()
