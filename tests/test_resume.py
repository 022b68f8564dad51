"A run that goes on: the same to the last bit, or refused; damaged checkpoints, changed tables, folders in use"
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.vision.all import Resize, aug_transforms, load_learner, set_seed
from typer.testing import CliRunner

import paddy_multi.data.weights  # registers its architecture with timm
from paddy_multi.cli.app import app
from paddy_multi.core.files import locked
from paddy_multi.data.paddy import sample_paddy
from paddy_multi.train.checkpoint import read_checkpoint, write_checkpoint
from paddy_multi.train.learner import multi_target_learner
from paddy_multi.train.run import fine_tune_kept, folder_dls


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    "Synthetic pictures in the layout of the competition, with gaps"
    return sample_paddy(tmp_path_factory.mktemp('pictures'), n=40, missing=.2)

@pytest.fixture
def copy(pictures, tmp_path): return shutil.copytree(pictures, tmp_path/'copy')

def train(out, *args):
    return CliRunner().invoke(app, ['train', '--out', str(out), *map(str, args)])

SMALL = ['--arch', 'test_resnet', '--no-pretrained', '--size', 32, '--bs', 8, '--epochs', 2]

@pytest.fixture(scope='module')
def finished(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp('finished')/'run'
    done = train(out, '--data', pictures, *SMALL)
    assert done.exit_code == 0, done.output
    return out

@pytest.fixture
def run(finished, tmp_path): return shutil.copytree(finished, tmp_path/'run')

def contents(folder): return {o.name: o.read_bytes() for o in folder.iterdir() if o.is_file()}

def refused(out, *texts, code=1, data=None, more=()):
    "What `--resume` says, in one line; the folder stays as it is"
    before = contents(out)
    done = train(out, '--resume', *(['--data', data] if data else []), *more)
    assert done.exit_code == code, done.output
    said = done.stderr.splitlines()[-1] if code == 1 else ' '.join(done.stderr.split())
    for text in texts: assert text in said, done.stderr
    assert contents(out) == before
    return said


# --- to the last bit --------------------------------------------------------------------------------------------------
class Stop(Callback):
    "Ctrl-C in the middle of an epoch, counted from the first of the run"
    def __init__(self, at): self.at, self.n = at, -1
    def before_epoch(self): self.n += 1
    def after_batch(self):
        if self.n == self.at and self.training and self.iter == 1: raise KeyboardInterrupt

def learner(folder, arch='test_resnet', pretrained=False, **kwargs):
    set_seed(7)
    dls = folder_dls(folder, seed=7, bs=8, num_workers=0, item_tfms=Resize(32), batch_tfms=aug_transforms(), **kwargs)
    return multi_target_learner(dls, arch, pretrained=pretrained)

def fit(learn, folder, resume=False):
    with learn.no_bar(), learn.no_logging(): return fine_tune_kept(learn, 3, 1e-2, folder, resume)

def in_new_process(folder, out, arch, pretrained, kwargs, stop=None):
    code = f'''
import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
import torch; from test_resume import *
learn = learner({str(folder)!r}, {arch!r}, {pretrained}, **{kwargs})
try:
    if {stop} is not None: learn.add_cb(Stop({stop}))
    fit(learn, {str(out)!r}, {stop} is None)
except KeyboardInterrupt: pass
torch.save(learn.model.state_dict(), {str(out)!r}+'/weights.pth')'''
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(out/'weights.pth', weights_only=True)

def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[o].double()-b[o].double()).abs().max().item() for o in a)

@pytest.mark.usefixtures('on_cpu')  # a GPU adds up in another order each time
@pytest.mark.parametrize('stop, kwargs', [(1, {}), (2, dict(balance='label'))], ids=['first', 'balanced'])
def test_a_run_that_goes_on_ends_as_one_that_was_not_stopped(pictures, tmp_path, stop, kwargs):
    whole = learner(pictures, **kwargs)
    rows = fit(whole, tmp_path)
    (tmp_path/'out').mkdir()
    stopped = learner(pictures, **kwargs)
    with pytest.raises(KeyboardInterrupt):
        stopped.add_cb(Stop(stop))
        fit(stopped, tmp_path/'out')
    again = learner(pictures, **kwargs)
    set_seed(99)
    went_on = fit(again, tmp_path/'out', resume=True)
    assert largest_difference(again.model.state_dict(), whole.model.state_dict()) == 0
    pd.testing.assert_frame_equal(went_on, rows, check_exact=True)

@pytest.mark.slow
@pytest.mark.usefixtures('on_cpu')
@pytest.mark.parametrize('stop', [1, 2, 3])
@pytest.mark.parametrize('arch, pretrained', [('efficientnet_lite0_packaged', True)])
def test_so_does_a_new_process_with_pretrained_weights(pictures, tmp_path, arch, pretrained, stop):
    "Stopped after the frozen epoch and after each of the others"
    whole = learner(pictures, arch, pretrained)
    rows = fit(whole, tmp_path)
    (tmp_path/'out').mkdir()
    in_new_process(pictures, tmp_path/'out', arch, pretrained, {}, stop)
    assert read_checkpoint(tmp_path/'out'/'checkpoint.pth')['done'] == stop
    weights = in_new_process(pictures, tmp_path/'out', arch, pretrained, {})
    assert largest_difference(weights, whole.model.state_dict()) == 0
    kept = read_checkpoint(tmp_path/'out'/'checkpoint.pth')
    assert kept['rows'] == rows.to_dict('records') and kept['done'] == 4


# --- what has changed since -------------------------------------------------------------------------------------------
def relabelled(table): return table.replace(dict(label={table.label[0]: table.label[0].title()}))
def longer(table):
    return pd.concat([table, table[:1].assign(image_id='200000.jpg')])
def shuffled(table): return table.sample(frac=1, random_state=3)
def scaled(table): return table.assign(age=table.age*10)
def one_label(table): return table.assign(age=table.age.where(table.index != 5, 61))
def one_less(table): return table[:-1]

@pytest.mark.parametrize('change, texts', [
    (relabelled, ['is no class any more', 'is a new class', 'changed, such as that of']),
    (longer, ['1 picture new', '200000.jpg', 'pictures moved from training to validation']),
    (one_less, ['1 picture gone', 'pictures moved from']),
    (shuffled, ['pictures moved from training to validation']),
    (scaled, ['age: 32 labels changed, such as that of']),
    (one_label, ['age: 1 label changed, such as that of'])])
def test_a_table_that_has_changed_is_refused_and_named(run, copy, change, texts):
    table = pd.read_csv(copy/'train.csv', dtype=dict(image_id=str))
    first = copy/'train_images'/table.label[0]/table.image_id[0]
    if change is longer: shutil.copy(first, first.with_name('200000.jpg'))
    change(table).to_csv(copy/'train.csv', index=False)
    refused(run, *texts, 'put back what was there, or start again with --overwrite', data=copy)

def test_a_folder_that_has_moved_is_no_change(run, copy):
    before = contents(run)['predictions.csv']
    assert train(run, '--resume', '--data', copy).exit_code == 0
    assert contents(run)['predictions.csv'] == before

@pytest.mark.parametrize('option, value', [('--epochs', 9), ('--lr', .5), ('--seed', 1), ('--arch', 'resnet18'),
                                           ('--bs', 16), ('--augment', 'flips'), ('--targets', 'label')])
def test_other_settings_are_refused(run, option, value):
    said = refused(run, 'the run began with', 'leave the option out', code=2, more=[option, value])
    assert option in said


# --- damaged checkpoints ----------------------------------------------------------------------------------------------
class Evil:
    def __init__(self, file): self.file = file
    def __reduce__(self): return open, (str(self.file), 'w')

def packed(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()

def damaged(whole, state, evil):
    "Files that are no whole checkpoint"
    rng = random.Random(0)
    yield from (whole[:rng.randrange(len(whole))] for _ in range(30))
    for _ in range(30):
        at = rng.randrange(len(whole))
        yield whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at+1:]
    yield from (b'', b'\n', b'{}', whole[::-1], whole+b' ', pickle.dumps(Evil(evil)), packed(Evil(evil)), packed(state),
                pickle.dumps(dict(done=1)), packed(state['model']))

def altered(state):
    "States that no run has written, by what is wrong"
    for part in state:
        yield f'without {part}', {o: value for o, value in state.items() if o != part}
        for value in (None, -5, [], {}, torch.zeros(2)):
            if type(value) is type(state[part]) and value == state[part]: continue
            yield f'{part} is {value!r}', dict(state, **{part: value})
    for done in (-5, 0, 2, 4, 10**12, 3., True): yield f'done is {done}', dict(state, done=done)
    names = list(state['model'])
    yield 'another weight', dict(state, model=dict(state['model'], more=torch.zeros(1)))
    yield 'a weight less', dict(state, model={o: state['model'][o] for o in names[1:]})
    yield 'another shape', dict(state, model=dict(state['model'], **{names[0]: torch.zeros(3)}))
    yield 'weights that are text', dict(state, model=dict.fromkeys(names, 'x'))
    for part in state['random'].keys() - {'cuda'}:  # which is read where there is a GPU
        yield f'random {part}', dict(state, random=dict(state['random'], **{part: 'x'}))
    for part in state['seen']:
        yield f'seen without {part}', dict(state, seen={o: v for o, v in state['seen'].items() if o != part})
        yield f'seen {part}', dict(state, seen=dict(state['seen'], **{part: 3}))

@pytest.mark.parametrize('every', [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_is_one_line_and_runs_nothing(pictures, tmp_path, every):
    file, evil = tmp_path/'checkpoint.pth', tmp_path/'was here'
    learn = learner(pictures)
    fit(learn, tmp_path)
    whole, state = file.read_bytes(), read_checkpoint(file)
    tried = 0
    for data in damaged(whole, state, evil):
        file.write_bytes(data)
        with pytest.raises(ValueError, match='start without resume') as e: read_checkpoint(file)
        assert '\n' not in str(e.value) and not evil.exists()
        tried += 1
    for what, wrong in [*altered(state)][::every]:
        write_checkpoint(file, wrong)
        try: fit(learner(pictures), tmp_path, resume=True)
        except ValueError as e: assert 'start without resume' in str(e) and '\n' not in str(e), what
        else: pytest.fail(what)
        tried += 1
    assert tried > (100 if every == 1 else 75)

def test_a_checkpoint_of_version_0_2_is_refused(run):
    (run/'checkpoint.json').write_text(json.dumps(dict(done=2, rows=[])))
    torch.save(dict(model={}, opt=np.float64(1)), run/'checkpoint.pth')
    refused(run, 'is of paddy-multi 0.2, which kept neither classes nor split: start again with --overwrite')


# --- folders ----------------------------------------------------------------------------------------------------------
def test_a_folder_in_use_is_refused(run, pictures):
    with locked(run):
        for more in (['--resume'], ['--overwrite', '--data', pictures, *SMALL]):
            done = train(run, *more)
            assert done.exit_code == 1 and f'{run} is in use by process {os.getpid()}' in done.stderr, done.output

def test_what_is_there_stays_until_the_new_run_is_finished(run, pictures, monkeypatch):
    "Ctrl-C in the second epoch of a run with --overwrite: results and checkpoint are the old ones; --resume goes on"
    before = contents(run)
    import paddy_multi.train.run as module
    real = module.KeepEpochs.after_epoch
    def after_epoch(self):
        real(self)
        raise KeyboardInterrupt
    with monkeypatch.context() as patched:
        patched.setattr(module.KeepEpochs, 'after_epoch', after_epoch)
        done = train(run, '--overwrite', '--data', pictures, *SMALL, '--seed', 5)
    assert done.exit_code == 130 and 'Finished epochs are kept' in done.stderr, done.output
    after = contents(run)
    assert read_checkpoint(run/'checkpoint.new.pth')['done'] == 1
    assert {o: after[o] for o in before} == before and after.keys()-before.keys() == {'checkpoint.new.pth'}
    assert train(run, '--resume').exit_code == 0
    assert contents(run).keys() == before.keys() and json.loads((run/'settings.json').read_text())['seed'] == 5
    assert read_checkpoint(run/'checkpoint.pth')['done'] == 2 and load_learner(run/'model.pkl')

def test_a_loss_that_is_no_number_is_one_line_and_keeps_the_good_epochs(tmp_path, pictures):
    out = tmp_path/'run'
    done = train(out, '--data', pictures, *SMALL, '--lr', 1e30)
    assert done.exit_code == 1 and 'start again with a lower --lr and --overwrite' in done.stderr, done.output
    assert not (out/'model.pkl').exists()

def test_epochs_before_a_loss_that_is_no_number_are_kept(pictures, tmp_path):
    class Break(Callback):
        def after_step(self):
            if self.epoch == 1: next(self.model.parameters()).data.fill_(np.nan)
    learn = learner(pictures)
    learn.add_cb(Break())
    with pytest.raises(FloatingPointError, match='in epoch 1, batch 1'): fit(learn, tmp_path)
    kept = read_checkpoint(tmp_path/'checkpoint.pth')
    assert kept['done'] == 1 and all(o.isfinite().all() for o in kept['model'].values())
    assert len(fit(learner(pictures), tmp_path, resume=True)) == 3


# --- options ----------------------------------------------------------------------------------------------------------
def table_with(copy, **columns):
    table = pd.read_csv(copy/'train.csv', dtype=dict(image_id=str))
    table.assign(**{name: values*(len(table)//len(values)) for name, values in columns.items()}
                 ).to_csv(copy/'train.csv', index=False)

@pytest.mark.parametrize('columns, args, text', [
    (dict(n=[1, 2]), ['n'], 'write --targets n:category or n:regression'),
    (dict(t=['a b', 'b']), ['t:multicategory'], 'give --tag-delimiter, or write the kind category in --targets'),
    (dict(t=['1.5', '2.5', '3.5', 'NA']), ['t'],
     "write --missing 'NA' for a missing label, or t:category in --targets"),
    (dict(t=['a', 'b']), ['t:colour'], "expected a kind of ['category', 'count'"),
    (dict(t=['low', 'high']), ['t:ordinal'], 'number the ranks in their order'),
    (dict(t=['a', 'b']), ['t', '--tag-delimiter', ';'], '--tag-delimiter and --empty-tags say how tags are written'),
    (dict(t=['a', 'b']), ['age:regression', '--balance', 'age'], '--balance'),
    (dict(t=['a', 'b']), ['t', '--arch', 'test_vit'], 'test_vit takes pictures of 160 pixels: add --size 160'),
], ids=['whole', 'tags', 'words', 'kind', 'ranks', 'no tags', 'balance', 'size'])
def test_errors_speak_options(copy, tmp_path, columns, args, text):
    table_with(copy, **columns)
    done = train(tmp_path/'out', '--data', copy, *SMALL, '--targets', *args)
    assert done.exit_code == 1 and text in done.stderr, done.output
    assert not [o for o in ('kinds=', 'delim=', 'Target(', 'vocab=', 'bs=', 'targets=') if o in done.stderr]

@pytest.mark.parametrize('arch, text', [
    (['--arch', 'resnet_18'], "timm knows no architecture 'resnet_18'; similar: resnet18"),
    (['--arch', 'resnet18.mine'], "timm knows no architecture 'resnet18.mine'; similar: resnet18.a1_in1k"),
    (['--arch', 'botnet50ts_256', '--pretrained'], 'timm has no weights for botnet50ts_256: add --no-pretrained')])
def test_architectures_that_cannot_be_had_are_one_line(pictures, tmp_path, arch, text):
    done = train(tmp_path/'out', '--data', pictures, *SMALL, *arch)
    assert done.exit_code == 1 and text in done.stderr and done.stderr.count('\n') == 1, done.output

def test_a_fault_of_ours_keeps_its_traceback(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr('paddy_multi.train.run.fine_tune_kept', lambda *args: torch.zeros(2) @ torch.zeros(3))
    done = train(tmp_path/'out', '--data', pictures, *SMALL)
    assert type(done.exception) is RuntimeError and 'Error:' not in done.stderr

def test_cells_that_a_spreadsheet_would_run_are_quoted(copy, tmp_path):
    table_with(copy, t=['=1+1', 'plain'])
    args = ['--data', copy, *SMALL[:-1], 1, '--targets', 't']
    for raw, expected in ((['--raw'], {'=1+1', 'plain'}), (['--overwrite'], {"'=1+1", 'plain'})):
        done = train(tmp_path/'out', *args, *raw)
        assert done.exit_code == 0, done.output
        assert set(pd.read_csv(tmp_path/'out'/'predictions.csv').t_label) <= expected
