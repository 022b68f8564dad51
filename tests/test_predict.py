"`predict_named` and `ensemble` on files that cannot be read, in data loading processes, and on learners that differ"
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.vision.all import (ColReader, DataBlock, ImageBlock, IndexSplitter, Learner, MSELossFlat, PILImageBW,
                               RandomSplitter, Resize, Transform, set_seed)
from hypothesis import given, settings, strategies as st
from torch import nn

from paddy_multi.all import (CategoryTarget, MultiCategoryTarget, OrdinalTarget, RegressionTarget, Targets, by_name,
                             ensemble, predict_named, sample_digits)

PARTS = ['loop', 'line']


@pytest.fixture(scope='module')
def path(tmp_path_factory): return sample_digits(tmp_path_factory.mktemp('digits'))

@pytest.fixture(scope='module')
def labels(path):
    df = pd.read_csv(path/'labels.csv')[:60]
    size = np.where(df.ink > .32, 'L', np.where(df.ink > .28, 'M', 'S'))
    return df.assign(size=size, parts=[['loop'] if digit in (0, 6, 8, 9) else ['line'] for digit in df.digit])

@pytest.fixture(scope='module')
def files(path, labels): return [path/'images'/o for o in labels.image]

def declare(df, order=('digit', 'lean', 'size', 'parts'), **vocabs):
    make = dict(digit=lambda get: CategoryTarget(get, vocab=vocabs.get('digit')),
                lean=lambda get: RegressionTarget(get),
                size=lambda get: OrdinalTarget(get, vocab=vocabs.get('size', ['S', 'M', 'L'])),
                parts=lambda get: MultiCategoryTarget(get, vocab=vocabs.get('parts')))
    return Targets({o: make[o](by_name(df, 'image', o)) for o in order})

def tiny(n_out):
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, n_out))

def learner(files, targets, seed=0, **kwargs):
    "Random weights: nothing here depends on a good model"
    block = DataBlock((ImageBlock(PILImageBW), targets.block), get_y=targets.get_y,
                      splitter=RandomSplitter(.3, seed=seed), item_tfms=Resize(16))
    dls = block.dataloaders(files, bs=16, num_workers=0)
    set_seed(seed)
    learn = Learner(dls, tiny(dls.c), **kwargs)
    learn.remove_cb(learn.progress)
    return learn

@pytest.fixture(scope='module')
def learn(files, labels): return learner(files, declare(labels))

@pytest.fixture
def broken(tmp_path, files):
    "Files that fail to open, to decode and to be found"
    (tmp_path/'text.png').write_text('not a picture')
    (tmp_path/'cut.png').write_bytes(files[0].read_bytes()[:60])
    (tmp_path/'empty.png').touch()
    return [tmp_path/o for o in ('text.png', 'cut.png', 'empty.png', 'lost.png')]

def same(a, b): pd.testing.assert_frame_equal(a, b, rtol=1e-5)


# --- files that cannot be read ----------------------------------------------------------------
@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('places', [(0, 1, 2, 3), (0, 4, 5, 12), (9, 10, 11, 12)])
def test_broken_files_leave_all_others_as_they_are(learn, files, broken, num_workers, places):
    mixed = list(files[:9])
    for i, o in zip(places, broken): mixed.insert(i, o)
    res = predict_named(learn, mixed, bs=4, num_workers=num_workers)
    assert res.index.tolist() == [o.name for o in mixed]
    good = res.error.isna()
    assert [i for i, o in enumerate(good) if not o] == list(places)
    same(res[good], predict_named(learn, files[:9]))
    assert res[~good].drop(columns='error').isna().all(axis=None)
    text,cut,empty,lost = res.error[~good]
    assert text.startswith('UnidentifiedImageError:') and empty.startswith('UnidentifiedImageError:')
    assert ':' in cut   # whichever type Pillow raises
    assert lost.startswith('FileNotFoundError:') and 'lost.png' in lost

@pytest.mark.parametrize('num_workers', [0, 1])
def test_when_nothing_can_be_read_the_table_says_why(learn, broken, num_workers):
    res = predict_named(learn, broken, num_workers=num_workers)
    assert res.error.notna().all() and res.drop(columns='error').isna().all(axis=None)
    assert list(res.columns) == ['digit', 'digit_prob', 'lean', 'size', 'size_prob', 'parts', 'error']
    same(predict_named(learn, broken, tta=2).drop(columns='error'), res.drop(columns='error'))

def test_augmented_passes_keep_the_notes(learn, files, broken):
    plain,augmented = (predict_named(learn, [broken[0], *files[:5]], tta=n) for n in (0, 2))
    same(plain, augmented)   # nothing is augmented here

def test_a_fault_of_the_model_is_not_taken_for_a_broken_file(files, labels):
    learn = learner(files, declare(labels))
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
        def forward(self, x): raise RuntimeError('out of memory')
    learn.model = Fails()
    loss = learn.loss_func
    with pytest.raises(RuntimeError, match='out of memory'): predict_named(learn, files[:3])
    assert learn.loss_func is loss

def test_an_output_that_is_not_finite_is_no_prediction(files, labels, learn):
    "A model whose training diverged answers nothing, and an ensemble with it says so"
    lost = learner(files, declare(labels))
    with torch.no_grad(): next(lost.model.parameters()).fill_(float('nan'))
    for found in (predict_named(lost, files[:3]), ensemble([learn, lost], files[:3])):
        assert found.drop(columns="error").isna().all(axis=None)
        assert found.error.str.contains('the output holds NaN or an infinity').all()
    assert predict_named(learn, files[:3]).error.isna().all()


def test_stopping_by_hand_is_not_taken_for_a_broken_file(files, labels):
    class Stop(Transform):
        def encodes(self, o:PILImageBW): raise KeyboardInterrupt
    learn = learner(files, declare(labels))
    learn.dls.valid.after_item.fs.insert(0, Stop())
    with pytest.raises(KeyboardInterrupt): predict_named(learn, files[:3])


# --- what is asked for ------------------------------------------------------------------------
def test_strings_paths_and_pictures_give_the_same(learn, files):
    paths = predict_named(learn, files[:5])
    same(paths, predict_named(learn, [str(o) for o in files[:5]]))
    pictures = predict_named(learn, [PILImageBW.create(o) for o in files[:5]])
    assert pictures.index.tolist() == [0, 1, 2, 3, 4]
    same(paths.reset_index(drop=True), pictures.reset_index(drop=True))
    same(paths, predict_named(learn, (o for o in files[:5])))

@given(order=st.permutations(range(12)), bs=st.integers(1, 13))
@settings(deadline=None, max_examples=12)
def test_order_is_kept_whatever_the_batch_size(learn, files, order, bs):
    same(predict_named(learn, [files[i] for i in order], bs=bs), predict_named(learn, files[:12]).iloc[list(order)])

def test_values_have_the_types_of_the_labels(learn, files, broken):
    res = predict_named(learn, [*files[:20], broken[0]])
    assert all(isinstance(o, (int, np.integer)) for o in res.digit[:20])   # 3, not 3.0
    assert res.digit.iloc[20] is None
    assert all(isinstance(o, list) and {*o} <= {*PARTS} for o in res.parts[:20])
    assert set(res['size'][:20]) <= {'S', 'M', 'L'} and res.lean.dtype == float
    for o in ('digit_prob', 'size_prob'): assert res[o][:20].between(0, 1).all()

def test_probability_of_a_rank_is_that_of_the_predicted_one(learn, files):
    res = predict_named(learn, files[:10])
    acts = learn.get_preds(dl=learn.dls.test_dl(files[:10]))[0][:,learn.dls.targets.slices['size']]
    above = torch.cat([torch.ones(10, 1), acts, torch.zeros(10, 1)], 1)
    probs = above[:,:-1]-above[:,1:]
    np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-5)
    expected = [probs[i,['S', 'M', 'L'].index(o)] for i, o in enumerate(res['size'])]
    np.testing.assert_allclose(res.size_prob, expected, rtol=1e-5)

def test_rows_of_a_table(path, labels, files):
    df = labels.assign(image=[str(o) for o in files])
    targets = Targets.from_df(df, ['digit', 'lean'], kinds=dict(digit='category'))
    block = DataBlock((ImageBlock(PILImageBW), targets.block), get_x=ColReader('image'), get_y=targets.get_y,
                      splitter=IndexSplitter(range(10)), item_tfms=Resize(16))
    dls = block.dataloaders(df, bs=8, num_workers=0)
    learn = Learner(dls, tiny(dls.c))
    learn.remove_cb(learn.progress)
    test = pd.DataFrame(dict(image=[files[3], 'lost.png', files[1]]), index=['x', 'y', 'z'])
    res = predict_named(learn, test)
    assert res.index.tolist() == ['x', 'y', 'z'] and res.error['y'].startswith('FileNotFoundError')
    same(res.loc[['z', 'x']], predict_named(learn, test.loc[['z', 'x']]))

def test_same_names_in_two_folders_are_told_apart(learn, files, tmp_path):
    (tmp_path/files[0].name).write_bytes(files[1].read_bytes())
    res = predict_named(learn, [files[0], tmp_path/files[0].name])
    assert res.index.tolist() == [str(files[0]), str(tmp_path/files[0].name)]

def test_a_loss_without_activation_does_not_turn_probabilities_into_logits(files, labels, learn):
    own = learner(files, declare(labels), loss_func=lambda p, y: p.sum())
    same(predict_named(own, files[:5]), predict_named(learn, files[:5]))   # the same weights

@pytest.mark.parametrize('ask,error,text', [
    (lambda l, f: predict_named(l, 'a.png'), TypeError,
     "expected a list of files or a DataFrame, found 'a.png': write [file]"),
    (lambda l, f: predict_named(l, f[0]), TypeError, 'write [file], or get_image_files(folder)'),
    (lambda l, f: predict_named(l, []), ValueError, 'expected at least one file, found none'),
    (lambda l, f: predict_named(l, pd.DataFrame()), ValueError, 'expected at least one file, found none'),
    (lambda l, f: ensemble([], f), ValueError, 'expected at least one learner, found none'),
    (lambda l, f: ensemble([l], []), ValueError, 'expected at least one file, found none'),
    (lambda l, f: ensemble([l, l], f, weights=[1]), ValueError, '1 weights for 2 learners: give one each'),
    (lambda l, f: ensemble([l, l], f, weights=[1, -1]), ValueError, 'a weight is a finite number, 0 or more; found -1'),
    (lambda l, f: ensemble([l, l], f, weights=[1, float('nan')]), ValueError,
     'a weight is a finite number, 0 or more; found nan'),
    (lambda l, f: ensemble([l, l], f, weights=[0, 0]), ValueError, 'the weights of 2 learners are all 0')])
def test_what_is_refused(learn, files, ask, error, text):
    with pytest.raises(error) as e: ask(learn, files)
    assert text in str(e.value)

def test_learner_without_targets_is_refused(path, files):
    grey = ImageBlock(PILImageBW)
    block = DataBlock((grey, grey), splitter=IndexSplitter([0]), item_tfms=Resize(16))
    learn = Learner(block.dataloaders(files[:4], bs=2, num_workers=0), tiny(3), loss_func=MSELossFlat())
    with pytest.raises(TypeError, match='the learner has no declared targets'): predict_named(learn, files[:2])

def test_a_target_named_as_another_ones_probability_is_refused(files, labels):
    df = labels.assign(digit_prob=labels.lean)
    digit,number = (by_name(df, 'image', o) for o in ('digit', 'digit_prob'))
    text = 'digit_prob is what the probability of digit is called in predictions: rename one of the two'
    with pytest.raises(ValueError, match=text):
        Targets(digit=CategoryTarget(digit), digit_prob=RegressionTarget(number))


# --- several learners -------------------------------------------------------------------------
def test_an_ensemble_of_one_is_that_one(learn, files, broken):
    mixed = [*files[:5], broken[0]]
    same(ensemble([learn, learn], mixed, weights=[2, 5]), predict_named(learn, mixed))

def test_learners_with_other_scales_orders_and_vocabularies(learn, files, labels):
    turned = declare(labels, order=('parts', 'size', 'digit', 'lean'), digit=[*range(9, -1, -1)], parts=PARTS)
    other = learner(files, turned, seed=1)
    a,b = learn.dls.targets,other.dls.targets
    assert a['parts'].vocab == b['parts'].vocab[::-1]
    res = ensemble([learn, other], files[:8], weights=[1, 3])
    pa,pb = (o.get_preds(dl=o.dls.test_dl(files[:8]))[0] for o in (learn, other))
    def part(table, acts, name): return acts[:,table.slices[name]]
    digit = .25*part(a, pa, 'digit') + .75*part(b, pb, 'digit').flip(1)
    assert res.digit.tolist() == digit.argmax(1).tolist()
    np.testing.assert_allclose(res.digit_prob, digit.max(1)[0], rtol=1e-5)
    leans = [part(t, p, 'lean')[:,0].double()*t['lean'].std + t['lean'].mean for t, p in ((a, pa), (b, pb))]
    assert a['lean'].mean != b['lean'].mean
    np.testing.assert_allclose(res.lean, .25*leans[0] + .75*leans[1], rtol=1e-4)
    def prob(table, acts, label): return part(table, acts, 'parts')[:,table['parts'].vocab.index(label)]
    on = {o: .25*prob(a, pa, o) + .75*prob(b, pb, o) for o in PARTS}
    assert [sorted(o) for o in res.parts] == [sorted(o for o in PARTS if on[o][i] > .5) for i in range(8)]
    above = .25*part(a, pa, 'size') + .75*part(b, pb, 'size')
    assert res['size'].tolist() == [['S', 'M', 'L'][i] for i in (above > .5).sum(1)]

def test_a_file_that_one_learner_cannot_read_is_an_error_of_all(learn, files, labels):
    picky = learner(files, declare(labels), seed=1)
    class Picky(Transform):
        def encodes(self, o:PILImageBW):
            if o.getpixel((0, 0)) == dark: raise ValueError('too dark')
            return o
    dark = PILImageBW.create(files[2]).getpixel((0, 0))
    picky.dls.valid.after_item.fs.insert(0, Picky())
    expected = [PILImageBW.create(o).getpixel((0, 0)) == dark for o in files[:6]]
    assert ensemble([learn, picky], files[:6]).error.notna().tolist() == expected

@pytest.mark.parametrize('change,text', [
    (dict(order=('digit', 'lean')),
     "learner 1 has the targets ['digit', 'lean'], the first has ['digit', 'lean', 'size', 'parts']"),
    (dict(digit=[*range(11)]),
     'digit: learner 1 knows 0, 1, 10, 2, 3 and 6 more, the first 0, 1, 2, 3, 4 and 5 more: give both the same vocab'),
    (dict(size=['L', 'M', 'S']), 'ranks in one order')])
def test_learners_of_other_targets_are_refused_before_anything_runs(learn, files, labels, change, text):
    with pytest.raises(ValueError) as e: ensemble([learn, learner(files, declare(labels, **change))], ['lost.png'])
    assert text in str(e.value)
