"A fitted table encodes other data: nothing is learned anew, what it does not know is refused, its counts are true"
import math
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import (DataBlock, ImageBlock, Learner, PILImageBW, RandomSplitter, Resize, get_image_files,
                               load_learner, parent_label)
from PIL import Image
from torch import nn

from paddy_multi.all import (CategoryTarget, CountTarget, MultiCategoryTarget, MultiTargetDataLoaders, OrdinalTarget,
                             RegressionTarget, Targets, by_name, multi_target_learner, predict_named)

COLOURS = dict(red=(255, 0, 0), green=(0, 255, 0), blue=(0, 0, 255))


def pictures(folder, n=12):
    "A folder of `n` coloured squares, and a table with five kinds of labels of different widths"
    names = [*COLOURS]
    df = pd.DataFrame(dict(
        image=[f'{i:02d}.png' for i in range(n)], colour=[names[i % 3] for i in range(n)],
        age=[20. + i*i for i in range(n)], tags=[[], ['dry'], ['dry', 'old']]*(n//3),
        size=['S', 'M', 'L', 'XL']*(n//4), spots=[i % 5 for i in range(n)]))
    (folder/'images').mkdir(parents=True)
    for row in df.itertuples(): Image.new('RGB', (8, 8), COLOURS[row.colour]).save(folder/'images'/row.image)
    return df

KINDS = dict(size=OrdinalTarget(vocab=['S', 'M', 'L', 'XL']), spots='count')
COLUMNS = ['colour', 'age', 'tags', 'size', 'spots']

def load(path, df, targets, **kwargs):
    kwargs = dict(folder='images', seed=1, valid_pct=.25, bs=2, num_workers=0) | kwargs
    return MultiTargetDataLoaders.from_df(df, path, targets=targets, **kwargs)

@pytest.fixture
def path(tmp_path): return tmp_path/'data'

@pytest.fixture
def df(path): return pictures(path)

@pytest.fixture
def old(path, df): return load(path, df, COLUMNS, kinds=KINDS)


def expected_row(row, train):
    "The label columns of a row, worked out by hand from the rows that the table was fitted to"
    return [float('bgr'.index(row.colour[0])), (row.age-train.age.mean())/train.age.std(ddof=0),
            float('dry' in row.tags), float('old' in row.tags), float(['S', 'M', 'L', 'XL'].index(row['size'])),
            row.spots/train.spots.mean()]

def test_rows_of_other_data_are_those_of_the_old_table(path, df, old, tmp_path):
    other = pictures(tmp_path/'other').assign(age=[500.]*11+[np.nan], spots=9, size=['S', 'XL']*6)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        new = load(tmp_path/'other', other, old.targets, splitter=lambda df: ([*range(8)], [*range(8, 12)]))
    train = df.loc[[int(f.stem) for f in old.train_ds.items]]
    for ds in (new.train_ds, new.valid_ds):
        for f, (_, y) in zip(ds.items, ds):
            expected = expected_row(other.iloc[int(f.stem)], train)
            assert y.tolist() == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert new.c == old.c == 3 + 1 + 2 + 3 + 1
    assert new.targets.slices == old.targets.slices and new.targets.vocabs == old.targets.vocabs
    assert (new.targets['age'].mean, new.targets['age'].std) == pytest.approx(
        (train.age.mean(), train.age.std(ddof=0)))

def test_counts_are_those_of_the_new_training_split_and_the_old_ones_stay(path, df, old):
    gaps = df.assign(age=df.age.where(df.index < 3), colour=df.colour.where(df.index != 1))
    new = load(path, gaps, old.targets, splitter=lambda df: ([0, 1, 2, 3, 4, 5], [6, 7]))
    assert {t.name: (t.n_labels, t.n_train) for t in new.targets} == dict(
        colour=(5, 6), age=(3, 6), tags=(6, 6), size=(6, 6), spots=(6, 6))
    assert {(t.n_labels, t.n_train) for t in old.targets} == {(9, 9)}
    assert list(new.targets.to_frame().labelled) == ['5 of 6', '3 of 6', *['6 of 6']*3]

@pytest.mark.parametrize('change, text', [
    (dict(colour='pink'), "colour: unknown label 'pink': it is none of 'blue', 'green', 'red'; 1 different labels"),
    (dict(tags=[['new']]*12), "tags: unknown label 'new'"), (dict(size=[*'ABCDEF']*2), "size: .*6 different labels"),
    (dict(age='old'), "age: expected a number, found 'old'"), (dict(age=math.inf), 'age: expected a finite number'),
    (dict(colour=[['red']]*12), r"colour: \['red'\] is no label of a category")])
def test_labels_that_the_table_does_not_know_are_refused(path, df, old, change, text):
    with pytest.raises(ValueError, match=f'{text}.*do not fit the targets that were fitted before: leave their rows'):
        load(path, df.assign(**change), old.targets)

def test_a_column_that_is_not_there_is_refused(path, df, old):
    with pytest.raises(KeyError, match=r"no column \['age'\] in the table: it holds \['image', 'colour'"):
        load(path, df.drop(columns='age'), old.targets)

def test_kinds_beside_a_table_are_refused(path, df, old):
    with pytest.raises(ValueError, match='kinds=.* would change nothing, as the targets are declared'):
        load(path, df, old.targets, kinds=dict(age='count'))

def test_a_validation_split_without_labels_is_warned_of(path, df, old):
    with pytest.warns(UserWarning, match='age: no item outside the training split has a label'):
        load(path, df.assign(age=df.age.where(df.index < 8)), old.targets, splitter=lambda df: ([*range(8)], [8, 9]))

def test_from_csv(path, df, old):
    table = load(path, df, ['colour', 'spots'], kinds=dict(spots='count')).targets
    df[:6][['image', 'colour', 'spots']].to_csv(path/'labels.csv', index=False)
    with pytest.warns(UserWarning, match='6 pictures have no row'):
        new = MultiTargetDataLoaders.from_csv(path, targets=table, folder='images', seed=1, bs=2, num_workers=0)
    assert new.targets.vocabs == table.vocabs and new.targets['colour'].n_train == 5

def test_after_export_the_table_still_encodes(path, df, old, tmp_path):
    multi_target_learner(old, 'test_resnet', pretrained=False).export(tmp_path/'model.pkl')
    assert b'00.png' not in (tmp_path/'model.pkl').read_bytes()
    table = load_learner(tmp_path/'model.pkl').dls.targets
    again = load(path, df, table)
    assert torch.equal(again.valid_ds[0][1], old.valid_ds[0][1])
    with pytest.raises(RuntimeError, match='colour: an exported or pickled learner holds no labels: give'):
        MultiTargetDataLoaders.from_folder(path, table)

def test_a_table_goes_through_a_second_and_a_third_pair_of_loaders(path, df, old):
    third = load(path, df, load(path, df[:4], old.targets).targets, item_tfms=Resize(16))
    assert torch.equal(third.valid_ds[0][1], old.valid_ds[0][1])
    assert third.one_batch()[0].shape == (2, 3, 16, 16)


# --- from folders, and in a DataBlock ---------------------------------------------------------
def third(f): return float(f.stem)/3

@pytest.fixture
def tree(tmp_path):
    for i in range(12):
        file = tmp_path/'tree'/'xyz'[i % 3]/f'{i}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8)).save(file)
    return tmp_path/'tree'

def test_from_folder(tree, tmp_path):
    targets = Targets(place=CategoryTarget(parent_label), third=RegressionTarget(third))
    kwargs = dict(seed=1, bs=2, num_workers=0)
    old = MultiTargetDataLoaders.from_folder(tree, targets, **kwargs)
    new = MultiTargetDataLoaders.from_folder(tree, old.targets, valid_pct=.5, **kwargs)
    numbers = np.array([third(f) for f in old.train_ds.items])
    for f, (_, y) in zip(new.train_ds.items, new.train_ds):
        expected = ['xyz'.index(f.parent.name), (third(f)-numbers.mean())/numbers.std()]
        assert y.tolist() == pytest.approx(expected, rel=1e-5)
    (tree/'z').rename(tree/'w')
    with pytest.raises(ValueError, match="place: unknown label 'w': it is none of 'x', 'y', 'z'"):
        MultiTargetDataLoaders.from_folder(tree, old.targets, **kwargs)
    multi_target_learner(new, 'test_resnet', pretrained=False).export(tmp_path/'model.pkl')
    (tree/'w').rename(tree/'z')
    loaded = load_learner(tmp_path/'model.pkl').dls.targets
    again = MultiTargetDataLoaders.from_folder(tree, loaded, **kwargs)
    assert torch.equal(again.valid_ds[0][1], old.valid_ds[0][1])

def test_a_block_of_a_table_and_labels_of_another(path, df):
    def declared(df): return Targets(colour=CategoryTarget(by_name(df, 'image', 'colour')),
                                     spots=CountTarget(by_name(df, 'image', 'spots')),
                                     age=RegressionTarget(by_name(df, 'image', 'age')))
    def block(targets, get_y): return DataBlock(blocks=(ImageBlock(PILImageBW), targets.block), get_y=get_y,
                                                get_items=get_image_files, splitter=RandomSplitter(.25, seed=1))
    targets = declared(df)
    old = block(targets, targets.get_y).dataloaders(path/'images', bs=2, num_workers=0)
    twice = block(old.targets, old.targets.get_y).dataloaders(path/'images', bs=2, num_workers=0)
    assert torch.equal(twice.valid_ds[1][1], old.valid_ds[1][1])
    later = declared(df.assign(age=df.age+100, colour='red'))
    new = block(old.targets, later.get_y).dataloaders(path/'images', bs=2, num_workers=0)
    train = df.loc[[int(f.stem) for f in old.train_ds.items]]
    for f, (_, y) in zip(new.train_ds.items, new.train_ds):
        age,spots = df.age[int(f.stem)]+100,df.spots[int(f.stem)]
        expected = [2, spots/train.spots.mean(), (age-train.age.mean())/train.age.std(ddof=0)]
        assert y.tolist() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(KeyError, match='colour: 11 items have no row in column'):
        block(old.targets, declared(df[:1]).get_y).dataloaders(path/'images')

def test_tags_given_as_one_text_are_read_as_before(path, df):
    df = df.assign(tags=df.tags.map(';'.join).replace('', 'none'))
    old = load(path, df, ['tags', 'colour'], kinds=dict(tags=MultiCategoryTarget(delim=';')))
    new = load(path, df[::-1], old.targets, splitter=lambda df: ([0, 1, 2, 3], [4]))
    f, (_, y) = new.train_ds.items[0], new.train_ds[0]
    assert f.name == '11.png' and y.tolist() == [1, 0, 1, 0]  # dry and old; blue


# --- tables that come later -------------------------------------------------------------------
def shifted(df, n=7):
    "A table of the first `n` pictures with other labels than in training, in the order of their ages from the last"
    return df[:n][::-1].assign(age=df.age[:n]*3+1, colour='green', spots=4, tags=[['old']]*n, size='XL')

@pytest.fixture
def elsewhere(path, tmp_path):
    "The same pictures in another folder, upside down in their colours so that they are told apart"
    for f in (path/'images').iterdir():
        (tmp_path/'other'/'test').mkdir(parents=True, exist_ok=True)
        Image.fromarray(255-np.asarray(Image.open(f))).save(tmp_path/'other'/'test'/f.name)
    return tmp_path/'other'/'test'

def ways(df, path, elsewhere):
    "Tables of the same rows, arguments of `test_dl` to find their pictures, and the folder where they are"
    def named(folder): return df.assign(image=[str(folder/o) for o in df.image])
    return [(df, dict(), path/'images'), (named(path/'images'), dict(), path/'images'),
            (named(elsewhere), dict(), elsewhere), (df, dict(folder=elsewhere), elsewhere),
            (df, dict(path=elsewhere.parent, folder='test'), elsewhere),
            (named(elsewhere), dict(path='nowhere'), elsewhere)]

@pytest.mark.parametrize('way', range(6))
@pytest.mark.parametrize('exported', [False, True])
def test_a_labelled_table_is_scored_as_by_hand(path, df, old, tmp_path, elsewhere, way, exported):
    train = df.loc[[int(f.stem) for f in old.train_ds.items]]
    learn = multi_target_learner(old, 'test_resnet', pretrained=False)
    if exported:
        learn.export(tmp_path/'model.pkl')
        learn = load_learner(tmp_path/'model.pkl')
    later, where, folder = ways(shifted(df), path, elsewhere)[way]
    dl = learn.dls.test_dl(later, with_labels=True, bs=3, **where)
    x, y = (torch.cat([b[i] for b in dl]).cpu() for i in (0, 1))
    for i, row in enumerate(later.itertuples()):
        pixel = np.asarray(Image.open(folder/f'{int(row.image[-6:-4]):02d}.png'))[0,0]/255
        assert x[i,:,0,0].numpy() == pytest.approx(pixel, abs=1e-6)
        assert y[i].tolist() == pytest.approx(expected_row(later.iloc[i], train), rel=1e-4)
    with learn.no_bar(), learn.no_logging():
        found = dict(zip(['loss', *(m.name for m in learn.metrics)], learn.validate(dl=dl)))
        files = [folder/Path(o).name for o in later.image]
        ours = predict_named(learn, files)
    assert found['age_mean_absolute_error'] == pytest.approx(np.abs(ours.age.values-later.age.values).mean(), rel=1e-4)
    assert found['colour_error_rate'] == pytest.approx((ours.colour.values != 'green').mean())
    assert torch.equal(learn.dls.test_dl(later.drop(columns=COLUMNS), bs=7, **where).one_batch()[0].cpu(), x)
    with learn.no_bar(): assert predict_named(learn, later, **where).age.tolist() == ours.age.tolist()
    assert learn.dls.targets['age'].mean == pytest.approx(train.age.mean())  # as it was

def test_rows_without_some_labels_and_rows_given_twice(df, old):
    gaps = df[:6].assign(age=[1., np.nan]*3, colour=[None, 'red']*3)
    y = old.test_dl(gaps, with_labels=True, bs=6).one_batch()[1]
    assert y[:,1].isnan().tolist() == [False, True]*3 and y[:,0].isnan().tolist() == [True, False]*3
    twice = df.iloc[[3, 3, 5]]
    assert len(old.test_dl(twice, bs=3).one_batch()[0]) == 3
    with pytest.raises(ValueError, match='more than once: keep one row a file'): old.test_dl(twice, with_labels=True)

@pytest.mark.parametrize('change, error, text', [
    (dict(colour='pink'), ValueError, "colour: unknown label 'pink'.*were fitted before"),
    (dict(image='none.png'), FileNotFoundError, "1 rows have no picture, such as 'none.png'"),
    (dict(image=None), ValueError, "12 rows have no name in column 'image'")])
def test_rows_that_do_not_fit_are_refused(df, old, change, error, text):
    with pytest.raises(error, match=text): old.test_dl(df.assign(**change), with_labels=True)

def test_columns_that_are_not_there_are_refused(df, old):
    with pytest.raises(KeyError, match="no column 'image', which names the pictures: it holds"):
        old.test_dl(df.drop(columns='image'))
    with pytest.raises(KeyError, match="no column 'age' in the table"):
        old.test_dl(df.drop(columns='age'), with_labels=True)
    with pytest.raises(ValueError, match='found a table without rows'): old.test_dl(df[:0])

def test_files_find_the_labels_of_training(df, old, tmp_path, elsewhere, monkeypatch):
    files, labels = old.valid_ds.items, [y for _, y in old.valid_ds]
    monkeypatch.chdir(files[0].parent)
    for given in (files, [str(f) for f in files], [f.name for f in files], [Path(f.name) for f in files]):
        y = old.test_dl(given, with_labels=True, bs=8).one_batch()[1].cpu()
        assert torch.equal(y, torch.stack(labels).as_subclass(type(y)))
        assert len(old.test_dl(given, bs=8).one_batch()) == 1
    text = r'colour: 12 files have no label, such as .* and 9 more: give a table .* test_dl\(df, with_labels=True\)'
    with pytest.raises(KeyError, match=text): old.test_dl(sorted(elsewhere.iterdir()), with_labels=True)
    with pytest.raises(TypeError, match='labels are looked up by the path of a picture: give files, or a table'):
        old.test_dl([Image.open(files[0])], with_labels=True)
    multi_target_learner(old, 'test_resnet', pretrained=False).export(tmp_path/'model.pkl')
    loaded = load_learner(tmp_path/'model.pkl').dls
    assert len(loaded.test_dl(files, bs=8).one_batch()[0]) == len(files)
    with pytest.raises(KeyError, match='colour: 3 files have no label'): loaded.test_dl(files, with_labels=True)

def test_loaders_of_folders_and_tables(tree, df):
    targets = Targets(place=CategoryTarget(parent_label), third=RegressionTarget(third))
    dls = MultiTargetDataLoaders.from_folder(tree, targets, seed=1, bs=2, num_workers=0)
    with pytest.raises(TypeError, match='made from folders: expected a list of files, found a table'): dls.test_dl(df)
    y = dls.test_dl([str(tree/'z'/'2.png')], with_labels=True).one_batch()[1]
    t = dls.targets['third']
    assert y[0].tolist() == pytest.approx([2, (2/3-t.mean)/t.std])
    with pytest.raises(TypeError, match='path and folder are for a table'): dls.test_dl([tree/'z'/'2.png'], path=tree)

def test_a_suffix_that_is_added_to_names(path, df):
    short = df.assign(image=[o[:-4] for o in df.image])
    dls = load(path, short, ['colour'], suff='.png')
    assert dls.test_dl(short[:3], with_labels=True, bs=3).one_batch()[1][:,0].tolist() == [2, 1, 0]


# --- fastai's own learner ------------------------------------------------------------------------------------------
def test_a_plain_learner_refuses_data_that_another_table_encodes(path, df, old):
    "Labels a thousand times as large would have the errors and predictions of the old ones, times nothing or 1000"
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, old.targets.n_out))
    learn = Learner(old, model, metrics=old.targets.metrics())
    files = get_image_files(path/'images')
    with learn.no_bar(), learn.no_logging():
        learn.validate()
        predict_named(learn, files)
        learn.dls = load(path, df.assign(age=df.age*1000), COLUMNS, kinds=KINDS)
        with pytest.raises(ValueError, match='age: a metric was made for other targets than the data: mean'):
            learn.validate()
        with pytest.raises(ValueError, match='its data have other targets: age: mean'): predict_named(learn, files)
        learn.dls = load(path, df.assign(age=df.age*1000), old.targets)
        errors = dict(zip(learn.recorder.metric_names[2:-1], learn.validate()))
        said = predict_named(learn, learn.dls.valid_ds.items).age
    true = df.set_index('image').age[said.index]*1000
    assert errors['age_mean_absolute_error'] == pytest.approx((said-true).abs().mean(), rel=1e-5)
