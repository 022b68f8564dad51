"Columns, folders, learners and metrics as users give them: what is guessed or refused; nothing is trained by mistake"
import gzip
import math
import shutil
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as skm
import torch
from fastai.vision.all import (BalancedAccuracy, Callback, CohenKappa, DataBlock, F1Score, ImageBlock, Perplexity,
                               RandomSplitter, Resize, TfmdDL, accuracy, accuracy_multi, error_rate, load_learner, mae,
                               parent_label, set_seed, trainable_params)
from scipy.stats import chisquare
from torch import nn

from paddy_multi.all import (CategoryTarget, MicroBatch, MultiCategoryTarget, MultiTargetDataLoaders,
                             MultiTargetInterpretation, OrdinalTarget, RegressionTarget, StratifiedSplitter, Targets,
                             by_name, multi_target_learner, sample_digits, target_metrics, write_report)


@pytest.fixture(scope='module')
def path(tmp_path_factory): return sample_digits(tmp_path_factory.mktemp('digits'))

@pytest.fixture(scope='module')
def labels(path):
    df = pd.read_csv(path/'labels.csv', dtype=dict(digit=str))
    return df.sample(80, random_state=0).reset_index(drop=True)

def load(path, df, targets=('digit', 'slant', 'ink'), **kwargs):
    kwargs = dict(seed=1, bs=16, num_workers=0) | kwargs
    return MultiTargetDataLoaders.from_df(df, path, folder='images', targets=list(targets), **kwargs)

def body(): return nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU())
def learner(dls, arch=None, **kwargs):
    set_seed(1)
    return multi_target_learner(dls, arch or body(), **kwargs)

def fit(learn, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(*args, **kwargs)


# --- what the type of a column tells ----------------------------------------------------------
def table(col, **kinds):
    df = pd.DataFrame(dict(x=col))
    return Targets.from_df(df, ['x'], kinds).fit(df.to_dict('records'))['x']

@pytest.mark.parametrize('col', [
    [1, 2, 3], [1, 2, None], pd.array([1, 2, None], dtype='Int64'), np.array([1, 2, 3], dtype=object), [1., np.nan, 3.],
], ids=['int', 'gap', 'Int64', 'object', 'float'])
def test_whole_numbers_are_never_guessed(col):
    text = r"x: whole numbers such as 1 may be classes or amounts: write kinds=dict\(x='category'\)"
    with pytest.raises(ValueError, match=text): table(col)
    assert table(col, x='regression').kind == 'regression'
    classes = table(col, x='category').vocab
    assert classes == [1, int(classes[1]), 3][:len(classes)] and all(isinstance(o, (int, np.integer)) for o in classes)

@pytest.mark.parametrize('col, kind', [
    ([1., 2.], 'regression'), ([1.5, 2., None], 'regression'),
    ([True, None, False], 'category'), ([True, False], 'category')])
def test_what_is_told_by_its_type(col, kind): assert table(col).kind == kind

def test_dates_are_refused():
    text = 'x: expected labels, found dates: make them text for classes, or numbers such as days'
    with pytest.raises(ValueError, match=text): table(pd.to_datetime(['2020-01-01', '2021-01-01']))

def test_ranks_are_those_of_an_ordered_column_and_never_of_the_alphabet():
    col = ['low', 'high', 'mid']
    order = ['low', 'mid', 'high']
    for kind in ('ordinal', OrdinalTarget(weight=2)):
        with pytest.raises(ValueError, match='the order of .* is unknown: give vocab'):
            table(pd.Categorical(col), x=kind)
        assert table(pd.Categorical(col, order, ordered=True), x=kind).vocab == order
    assert table(pd.Categorical(col, order), x=CategoryTarget(weight=2)).vocab == order
    assert table(pd.Categorical(col, order), x=CategoryTarget(vocab=sorted(col))).vocab == sorted(col)

def test_a_target_given_for_two_tables_is_left_alone():
    given = CategoryTarget(weight=2)
    assert [table(pd.Categorical(o), x=given).vocab for o in (['a', 'b'], ['c', 'd'])] == [['a', 'b'], ['c', 'd']]
    assert given.vocab is None

@pytest.mark.parametrize('labels', [[1.6e9, 1.6e9+60, 1.6e9+7], [1e-6, 3e-6, 2.5e-6], [45., 50., 60.], [0.1, 0.2, 0.7]])
def test_numbers_come_back_whatever_their_mean_and_spread(labels):
    t = RegressionTarget().fit('x', labels)
    rows = torch.tensor([t.encode(o) for o in labels])
    assert [t.decode(o) for o in rows] == pytest.approx(labels, rel=1e-12)


# --- pictures and their rows ------------------------------------------------------------------
def test_a_class_that_reads_like_a_gap_is_warned_of(path, labels, tmp_path):
    shutil.copytree(path/'images', tmp_path/'images')
    words = labels.assign(disease=['None', 'blast', 'NA', 'rust']*20)
    words.to_csv(tmp_path/'labels.csv', index=False)
    text = "disease: 'NA', 'None' read as a missing label: if it is a class, read the table with keep_default_na"
    with pytest.warns(UserWarning, match=text):
        dls = MultiTargetDataLoaders.from_csv(tmp_path, folder='images', targets=['disease'], seed=1, bs=8)
    assert dls.targets.vocabs == dict(disease=['blast', 'rust'])
    dls = MultiTargetDataLoaders.from_csv(tmp_path, folder='images', targets=['disease'], seed=1, bs=8,
                                          keep_default_na=False, na_values=[''])
    assert dls.targets.vocabs == dict(disease=['NA', 'None', 'blast', 'rust'])
    gaps = labels.assign(disease=['', 'blast', np.nan, 'rust']*20, remark='NA')  # no label column
    gaps.to_csv(tmp_path/'labels.csv', index=False)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*read as a missing')
        MultiTargetDataLoaders.from_csv(tmp_path, folder='images', targets=['disease'], seed=1, bs=8)

def test_two_pictures_of_one_name_do_not_share_a_label(path, labels, tmp_path):
    for place in 'ab':
        (tmp_path/place).mkdir()
        for name in labels.image[:20]: shutil.copy(path/'images'/name, tmp_path/place/name)
    targets = Targets(slant=CategoryTarget(by_name(labels[:20], 'image', 'slant')))
    text = ("slant: .* is the name of several items, whose labels would be the same: "
            "give each a name of its own in column 'image'")
    with pytest.raises(ValueError, match=text): MultiTargetDataLoaders.from_folder(tmp_path, targets, seed=1)
    MultiTargetDataLoaders.from_folder(tmp_path/'a', targets, seed=1, bs=4)

@pytest.mark.parametrize('values', [[True, False], [1, 0], [True, False, np.bool_(True)]])
def test_a_column_of_true_and_false_splits(path, labels, values):
    late = (values*80)[:80]
    dls = load(path, labels.assign(late=pd.Series(late, dtype=object)), valid_col='late')
    assert [o.name for o in dls.valid_ds.items] == labels.image[[bool(o) for o in late]].tolist()

@pytest.mark.parametrize('values', [[True, None], ['True', 'False'], ['train', 'valid'], [0., np.nan], [0, 2]])
def test_any_other_column_does_not_split(path, labels, values):
    odd = labels.assign(late=(values*80)[:80])
    with pytest.raises(ValueError, match='late: expected True or False in every row, found'):
        load(path, odd, valid_col='late')

def test_a_splitter_reads_columns(path, labels):
    split = StratifiedSplitter('digit', 'slant', seed=3)
    dls = load(path, labels, splitter=split)
    assert [o.name for o in dls.valid_ds.items] == labels.image[split(labels)[1]].tolist()

def test_a_table_without_rows(path, labels):
    with pytest.raises(ValueError, match='expected a row a picture, found a table without rows'):
        load(path, labels[:0])

def folders(path, tmp_path, *places):
    files = sorted((path/'images').iterdir())
    for k, place in enumerate(places):
        (tmp_path/place).mkdir(parents=True)
        for f in files[k*8:k*8+8]: shutil.copy(f, tmp_path/place/f.name)
    return tmp_path

@pytest.mark.parametrize('places', [
    ('train/a', 'train/b', 'valid/a', 'valid/b'), ('train', 'valid'), ('train/x/a', 'train/x/b', 'valid/x/a')])
def test_folders_may_be_as_deep_as_they_like(path, tmp_path, places):
    top = folders(path, tmp_path, *places)
    targets = Targets(odd=CategoryTarget(lambda o: 'ab'[sum(o.name.encode()) % 2]))
    dls = MultiTargetDataLoaders.from_folder(top, targets, train='train', valid='valid', bs=4, num_workers=0)
    for side, items in (('train', dls.train_ds.items), ('valid', dls.valid_ds.items)):
        assert len(items) == 8*sum(o.startswith(side) for o in places)
        assert {o.relative_to(top).parts[0] for o in items} == {side}

@pytest.mark.parametrize('sides, lost', [(('trian', 'valid'), 'trian'), (('train', 'vaild'), 'vaild')])
def test_a_folder_that_is_not_there_is_named(path, tmp_path, sides, lost):
    top = folders(path, tmp_path, 'train/a', 'train/b', 'valid/a')
    targets = Targets(kind=CategoryTarget(parent_label))
    with pytest.raises(FileNotFoundError, match=f'no pictures in .*{lost}'):
        MultiTargetDataLoaders.from_folder(top, targets, train=sides[0], valid=sides[1])


# --- tables as others write them --------------------------------------------------------------
def as_text(labels, sep=',', quote=''):
    rows = [labels.columns, *labels.astype(str).to_numpy()]
    return ''.join(sep.join(f'{quote}{o}{quote}' for o in row) + '\n' for row in rows)

@pytest.mark.parametrize('name, write', [
    ('labels.csv', lambda t, f: f.write_text(as_text(t, ';'))),
    ('labels.tsv', lambda t, f: f.write_text(as_text(t, '\t'))),
    ('labels.csv', lambda t, f: f.write_bytes(b'\xef\xbb\xbf' + as_text(t).encode())),
    ('labels.csv.gz', lambda t, f: f.write_bytes(gzip.compress(as_text(t).encode()))),
    ('labels.csv', lambda t, f: f.write_text(as_text(t, ', '))),
    ('labels.csv', lambda t, f: f.write_text(as_text(t, quote='"').replace('\n', '\r\n'))),
    ('labels.parquet', lambda t, f: t.to_parquet(f))],
    ids=['semicolons', 'tabs', 'mark', 'gzip', 'spaces', 'quotes', 'parquet'])
def test_tables_as_others_write_them(path, labels, tmp_path, name, write):
    if name.endswith('parquet'): pytest.importorskip('pyarrow')
    (tmp_path/'images').symlink_to(path/'images')
    write(labels, tmp_path/name)
    dls = MultiTargetDataLoaders.from_csv(tmp_path, name, folder='images', targets=['slant', 'ink'], seed=1, bs=8,
                                          num_workers=0)
    expected = load(path, labels, ['slant', 'ink'], bs=8)
    assert [o.name for o in dls.train_ds.items] == [o.name for o in expected.train_ds.items]
    assert dls.targets.vocabs == expected.targets.vocabs
    assert dls.targets['ink'].mean == pytest.approx(expected.targets['ink'].mean, rel=1e-9)

def test_other_text_and_rows_that_are_too_long(path, labels, tmp_path):
    (tmp_path/'images').symlink_to(path/'images')
    other = labels.assign(slant=labels.slant.replace('left', 'gauche, à'))
    other.to_csv(tmp_path/'labels.csv', index=False, encoding='latin-1')
    def read(**kwargs): return MultiTargetDataLoaders.from_csv(tmp_path, folder='images', targets=['slant'], seed=1,
                                                               bs=8, num_workers=0, **kwargs)
    assert 'gauche, à' in read(encoding='latin-1').targets.vocabs['slant']
    with pytest.raises(ValueError, match='labels.csv'): read()
    text = as_text(labels).replace('image,', '')             # one name less than the rows
    (tmp_path/'labels.csv').write_text(text)
    with pytest.raises(ValueError, match='labels.csv'): read()

def test_names_of_pictures_keep_their_zeros(path, labels, tmp_path):
    (tmp_path/'images').symlink_to(path/'images')
    labels.assign(image=labels.image.str[:-4]).to_csv(tmp_path/'labels.csv', index=False)
    dls = MultiTargetDataLoaders.from_csv(tmp_path, folder='images', targets=['slant'], suff='.png', seed=1, bs=8)
    assert {o.name for o in [*dls.train_ds.items, *dls.valid_ds.items]} == set(labels.image)

@pytest.mark.parametrize('tags, vocab', [(['1,2', '2', '3', '1'], ['1', '2', '3']), (['1', '2', '', '2'], ['1', '2'])])
def test_tags_may_be_numbers_and_columns_of_any_text_stand_beside(path, labels, tmp_path, tags, vocab):
    (tmp_path/'images').symlink_to(path/'images')
    labels.assign(spots=tags*20, note=['1,000', '2', '3', '4']*20).to_csv(tmp_path/'labels.csv', index=False)
    kind = MultiCategoryTarget(delim=',', empty='none')
    for how in (dict(targets=pd.Index(['spots']), kinds=dict(spots=kind)),
                dict(targets=Targets(spots=kind))):
        with pytest.raises(ValueError, match="'note' holds numbers with a comma"):
            MultiTargetDataLoaders.from_csv(tmp_path, folder='images', seed=1, bs=8, **how)
        dls = MultiTargetDataLoaders.from_csv(tmp_path, folder='images', seed=1, bs=8, dtype={'note': str}, **how)
        assert dls.targets.vocabs['spots'] == vocab


# --- classes in balance -----------------------------------------------------------------------
@pytest.fixture
def rare(labels):
    "40 rows of one class, 12 of another, 4 of a third and 8 without one, each with a number of its own"
    kinds = ['common']*40 + ['some']*12 + ['rare']*4 + [None]*8
    return labels[:64].assign(kind=kinds, row=np.arange(64.)+.5)

def drawn_rows(dls, epochs):
    "How often each row is in the batches of some epochs"
    t = dls.targets['row']
    y = torch.cat([y for _ in range(epochs) for _, y in dls.train]).cpu()
    return np.bincount((y[:,t.cols.start].double()*t.std + t.mean - .5).round().int().numpy(), minlength=64)

def everything(df): return [*range(len(df))], [3, 50, 60]
EXPECTED = np.repeat([56/3/40, 56/3/12, 56/3/4, 1.], [40, 12, 4, 8])  # times an epoch

@pytest.mark.parametrize('bs, num_workers', [(64, 0), (8, 0), (16, 1)])
def test_rows_are_drawn_as_often_as_they_should(path, rare, bs, num_workers):
    dls = load(path, rare, ['kind', 'row'], kinds=dict(row='regression'), balance='kind', splitter=everything, bs=bs,
               num_workers=num_workers)
    np.random.seed(3)
    epochs = 60 if num_workers == 0 else 20
    drawn = drawn_rows(dls, epochs)
    assert drawn.sum() == 64*epochs
    assert chisquare(drawn, EXPECTED*epochs).pvalue > .001
    classes = [drawn[a:b].sum() for a, b in ((0, 40), (40, 52), (52, 56), (56, 64))]
    assert chisquare(classes, np.array([56/3]*3 + [8])*epochs).pvalue > .001
    plain = load(path, rare, ['kind', 'row'], kinds=dict(row='regression'), splitter=everything, bs=bs)
    assert (drawn_rows(plain, 2) == 2).all()                   # without balance each row comes once an epoch

def test_validation_and_passes_in_order_hold_every_row_once(path, rare):
    dls = load(path, rare, ['kind', 'row'], kinds=dict(row='regression'), balance='kind', splitter=everything)
    assert [o.name for o in dls.valid_ds.items] == rare.image[[3, 50, 60]].tolist()
    y = torch.cat([y for _, y in dls.valid]).cpu()
    t = dls.targets['row']
    assert (y[:,t.cols.start]*t.std + t.mean).tolist() == pytest.approx([3.5, 50.5, 60.5], abs=1e-4)
    learn = learner(dls, 'test_resnet', pretrained=False)
    with learn.no_bar(): _, y = learn.get_preds(ds_idx=0)
    assert (y[:,t.cols.start]*t.std + t.mean).tolist() == pytest.approx([*(np.arange(64)+.5)], abs=1e-4)

def test_the_same_seed_draws_the_same_rows_and_a_copy_of_a_loader_balances_too(path, rare):
    dls = load(path, rare, ['kind', 'row'], kinds=dict(row='regression'), balance='kind', splitter=everything)
    def rows(dl):
        np.random.seed(5)
        return list(dl.get_idxs())
    assert rows(dls.train) == rows(dls.train.new()) == rows(dls.train.new(bs=4)) != [*range(64)]
    assert not hasattr(dls.train.new(cls=TfmdDL), 'wgts')

class CountLabels(Callback):
    "Counts the encoded labels of the first column in training"
    def __init__(self): self.seen = []
    def before_batch(self):
        if self.training: self.seen += self.yb[0][:,0].tolist()

def test_training_in_chunks_and_after_export(path, rare, tmp_path):
    dls = load(path, rare, ['kind', 'ink'], balance='kind', splitter=everything, bs=16)
    count = CountLabels()
    learn = learner(dls, 'test_resnet', pretrained=False, cbs=[count, MicroBatch(4)])
    set_seed(1)
    fit(learn, 4)
    seen = pd.Series(count.seen).value_counts(dropna=False)
    assert seen.sum() == 4*64 and chisquare(seen.reindex([0, 1, 2, np.nan]), [4*56/3]*3 + [32]).pvalue > .001
    learn.export(tmp_path/'model.pkl')
    loaded = load_learner(tmp_path/'model.pkl')
    assert len(loaded.dls.test_dl(rare[:5], bs=5).one_batch()[0]) == 5

def test_ranks_folders_and_fitted_tables_are_balanced_too(path, rare, tmp_path):
    ranks = load(path, rare, ['kind'], kinds=dict(kind=OrdinalTarget(vocab=['rare', 'some', 'common'])),
                 balance='kind', splitter=everything)
    again = MultiTargetDataLoaders.from_df(rare, path, ranks.targets, folder='images', balance='kind',
                                           splitter=everything)
    for dls in (ranks, again): assert dls.train.wgts*64 == pytest.approx(EXPECTED)
    for i, kind in enumerate(rare.kind[:56]):
        (tmp_path/kind).mkdir(exist_ok=True)
        shutil.copy(path/'images'/rare.image[i], tmp_path/kind/f'{i}.png')
    dls = MultiTargetDataLoaders.from_folder(
        tmp_path, Targets(kind=CategoryTarget(parent_label)), balance='kind', bs=8, num_workers=0,
        splitter=lambda files: ([*range(len(files))], [0, 1, 2]))
    for f, w in zip(dls.train_ds.items, dls.train.wgts): assert w*56 == pytest.approx(EXPECTED[int(f.stem)])

def only_ages(df): return df.assign(age=df.ink*100, tags=[['a'], ['b']]*32, spots=[0, 1]*32)

@pytest.mark.parametrize('balance, error, text', [
    ('age', ValueError, "balance='age': expected a target with one class a row, found a regression: name one with"),
    ('spots', ValueError, 'found a count'), ('tags', ValueError, 'found a multicategory'),
    ('digit', KeyError, r"balance='digit': no target of that name: choose one of \['kind', 'age', 'tags', 'spots'\]"),
    (['kind', 'age'], TypeError, r"balance=\['kind', 'age'\]: expected the name of one target")])
def test_what_cannot_be_balanced_is_refused(path, rare, balance, error, text):
    with pytest.raises(error, match=text):
        load(path, only_ages(rare), ['kind', 'age', 'tags', 'spots'], kinds=dict(spots='count'), balance=balance)

@pytest.mark.parametrize('kwargs', [dict(shuffle=False), dict(dl_type=TfmdDL), dict(n=10), dict(shuffle_train=False)])
def test_loaders_that_do_not_draw_are_refused(path, rare, kwargs):
    with pytest.raises(ValueError, match=f"balance='kind' draws the rows of an epoch at random: leave {[*kwargs][0]}"):
        load(path, rare, ['kind'], balance='kind', **kwargs)


# --- learners ---------------------------------------------------------------------------------
def test_a_batch_that_is_never_full_is_refused(path, labels):
    text = '64 training items give no whole batch of 65, so nothing would be trained: use bs=64 or less'
    with pytest.raises(ValueError, match=text): learner(load(path, labels, bs=65))
    learner(load(path, labels, bs=64))

class TwoEyes(nn.Module):
    "A body of two inputs"
    def __init__(self):
        super().__init__()
        self.a,self.b = body(),body()
    def forward(self, a, b): return torch.cat([self.a(a), self.b(b)], 1)

def test_a_body_of_two_inputs(path, labels, tmp_path):
    targets = Targets.from_df(labels, ['digit', 'slant', 'ink'])
    files = {o: path/'images'/o for o in labels.image}
    def picture(o): return files[o.image]
    block = DataBlock((ImageBlock, ImageBlock, targets.block), n_inp=2, getters=[picture, picture, targets.get_y],
                      splitter=RandomSplitter(.25, seed=0))
    dls = block.dataloaders(labels, bs=16, num_workers=0)
    learn = learner(dls, arch=TwoEyes())
    a,b = (o.cpu() for o in dls.one_batch()[:2])
    model = learn.model.cpu().eval()
    with torch.no_grad(): assert torch.equal(model(a, b), model[1](model[0](a, b)))
    learn.path = tmp_path
    fit(learn, 1)
    assert torch.isfinite(learn.get_preds()[0]).all()
    assert set(learn.predict(labels.iloc[0])[0]) == {'digit', 'slant', 'ink'}

def body_and_head(m): return [list(m[0].parameters()), list(m[1].parameters())]

@pytest.mark.parametrize('splitter', [trainable_params, body_and_head], ids=['flat', 'groups'])
def test_learned_weights_with_any_splitter(path, labels, splitter):
    learn = learner(load(path, labels), weighting='uncertainty', splitter=splitter)
    before = learn.model.log_vars.detach().cpu().clone()
    fit(learn, 1, lr=.1)
    assert (learn.model.log_vars.detach().cpu() != before).all()

@pytest.mark.parametrize('arch', ['swin_tiny_patch4_window7_224', 'mambaout_femto'])
def test_channels_last_are_turned(path, labels, arch):
    learn = learner(load(path, labels[:20], bs=2, item_tfms=Resize(224)), arch=arch, pretrained=False)
    x = torch.rand(2, 3, 224, 224)
    learn.model.cpu().eval()
    with torch.no_grad(): feats,out = learn.model[0](x),learn.model(x)
    n = learn.model[0].model.num_features
    assert feats.shape[-1] == n != feats.shape[1] and out.shape == (2, learn.dls.c)
    pooled = torch.cat([feats.amax((1, 2)), feats.mean((1, 2))], 1)  # fastai's head takes maxima, then means
    with torch.no_grad(): assert torch.allclose(learn.model[1][2:](pooled), out, atol=1e-4)

def test_an_architecture_without_feature_maps_is_refused(path, labels):
    from torchvision.models import vit_b_16
    with pytest.raises(TypeError, match='fastai finds no features to pool in vit_b_16: give its body as nn.Module'):
        learner(load(path, labels), arch=vit_b_16, pretrained=False)

class Elsewhere(nn.CrossEntropyLoss):
    "Class weights that a run left on another device (pretended: none is at hand)"
    here = True
    def to(self, device):
        self.here = True
        return super().to(device)

    def forward(self, p, y):
        assert self.here, 'weights and output on different devices'
        return super().forward(p, y)

def test_class_weights_that_a_gpu_has_kept_come_back_for_the_next_table(path, labels):
    loss = Elsewhere(weight=torch.tensor([1., 2., 3.]))
    rows = labels[['slant']].to_dict('records')
    targets = Targets(slant=CategoryTarget(loss=loss))
    targets.fit(rows)
    loss.here = False
    targets.fit(rows)


# --- metrics ----------------------------------------------------------------------------------
def run(metric, preds, y):
    learn = SimpleNamespace(pred=preds, y=y, yb=(y,), to_detach=lambda o: o)
    metric.reset()
    for a in range(0, len(y), 7):
        learn.pred,learn.y,learn.yb = preds[a:a+7],y[a:a+7],(y[a:a+7],)
        metric.accumulate(learn)
    return metric.value

@pytest.mark.parametrize('make, peer', [
    (lambda: CohenKappa(weights='quadratic'), lambda y, p: skm.cohen_kappa_score(y, p, weights='quadratic')),
    (lambda: F1Score(average='macro'), lambda y, p: skm.f1_score(y, p, average='macro')),
    (BalancedAccuracy, skm.balanced_accuracy_score), (lambda: accuracy, skm.accuracy_score),
    (lambda: error_rate, lambda y, p: 1-skm.accuracy_score(y, p)), (lambda: mae, lambda y, p: np.abs(y-p).mean())])
def test_metrics_of_classes_on_ranks(make, peer):
    rows = [dict(size=o) for o in 'smlsmlxx']
    table = Targets(size=OrdinalTarget(vocab=[*'smlx'])).fit(rows)
    rng = torch.Generator().manual_seed(0)
    preds,y = torch.randn(40, 3, generator=rng),torch.randint(4, (40, 1), generator=rng).float()
    y[::5] = math.nan
    ranks = (preds.sigmoid().cumprod(1) > .5).sum(1).numpy()
    have = ~y[:,0].isnan().numpy()
    metric = target_metrics(table, dict(size=make()))[0]
    expected = peer(y[have,0].numpy().astype(int), ranks[have])
    assert float(run(metric, preds, y)) == pytest.approx(expected, abs=1e-6)

def test_the_default_metric_of_several_labels_has_their_threshold():
    rows = [dict(low=['a'], high=['a', 'b']), dict(low=['b', 'c'], high=['c'])]
    table = Targets(low=MultiCategoryTarget(thresh=.1), high=MultiCategoryTarget(thresh=.8)).fit(rows)
    rng = torch.Generator().manual_seed(0)
    preds,y = torch.randn(30, 6, generator=rng),torch.randint(2, (30, 6), generator=rng).float()
    metrics,loss = target_metrics(table),table.loss()
    decoded = loss.decodes(loss.activation(preds))
    for i, (thresh, part) in enumerate([(.1, slice(0, 3)), (.8, slice(3, 6))]):
        expected = pytest.approx(float(accuracy_multi(preds[:,part], y[:,part], thresh=thresh)), abs=1e-6)
        assert float(run(metrics[i], preds, y)) == expected
        assert (decoded[:,part] == y[:,part]).float().mean() == expected

@pytest.mark.parametrize('metrics, text', [
    (error_rate, 'error_rate fails on the output of all targets .*: name the target it is for, '
                 r'as in metrics=dict\(digit=error_rate\)'),
    (dict(slant=F1Score), r'slant: F1Score makes a metric: write F1Score\(\)'),
    (dict(slant=accuracy_multi), 'slant: accuracy_multi fails for an output .* choose a metric for category'),
    (dict(ink=Perplexity), 'ink: expected a metric or a function'),
    (dict(ink='mae'), "ink: expected a metric or a function .*, found 'mae'")])
def test_a_metric_that_does_not_fit_is_refused_before_training(path, labels, metrics, text):
    with pytest.raises(TypeError, match=text): learner(load(path, labels), metrics=metrics)

def test_a_function_of_all_targets_stays(path, labels):
    def spread(preds, targs): return preds.std()
    assert learner(load(path, labels), metrics=spread).metrics[-1].name == 'spread'

def test_trackers_minimise_perplexity():
    table = Targets(a=CategoryTarget()).fit([dict(a=o) for o in 'xy'])
    assert target_metrics(table, dict(a=Perplexity()))[0].name == 'a_perplexity_loss'


# --- a split in which one target has no label -------------------------------------------------
def test_a_target_without_labels_in_validation(path, labels, tmp_path):
    late = [i % 4 == 0 for i in range(80)]
    gaps = labels.assign(late=late, slant=labels.slant.mask(late), ink=labels.ink.mask(late))
    with pytest.warns(UserWarning, match='no item outside the training split has a label'):
        dls = load(path, gaps, valid_col='late')
    learn = learner(dls)
    interp = MultiTargetInterpretation.from_learner(learn)
    assert [interp.has_labels(o) for o in dls.targets.names] == [True, False, False]
    of_classes = ('confusion_matrix', 'plot_confusion_matrix', 'most_confused', 'classification_report')
    for ask, target in [*((o, 'slant') for o in of_classes), ('plot_regression', 'ink')]:
        with pytest.raises(ValueError, match=f'{target}: no item of this split has a label'):
            getattr(interp, ask)(target)
    with pytest.raises(ValueError, match='ink: no item of this split has a label, so none has a loss'):
        interp.plot_top_losses(3, target='ink')
    assert len(interp.joint_errors()) == 6
    epochs = pd.DataFrame([dict(epoch=0, train_loss=1., valid_loss=2.)])
    text = write_report(learn, tmp_path/'report.html', epochs).read_text()
    assert text.count('No validation item has a label.') == 2
