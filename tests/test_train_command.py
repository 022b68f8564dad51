"`paddy-multi train` as a user runs it: real processes, Ctrl-C, files that others read"
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from paddy_multi.data.paddy import sample_paddy
from paddy_multi.train.checkpoint import read_checkpoint

COMMAND = Path(sys.executable).with_name('paddy-multi')
SMALL = ['--arch', 'test_resnet', '--no-pretrained', '--size', '32']  # timm's smallest, made for tests
SHORT = ['--epochs', '1', '--bs', '16']


def train(*args): return subprocess.run([COMMAND, 'train', *map(str, args)], capture_output=True, text=True)

def rows_of(out): return read_checkpoint(out/'checkpoint.pth')['rows']


def interrupt_once_there(file, *args):
    "Exit code and output of `paddy-multi train` that gets Ctrl-C as soon as `file` exists"
    # A shell's background jobs ignore Ctrl-C, and pass that on
    def heed_ctrl_c(): signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([COMMAND, 'train', *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, preexec_fn=heed_ctrl_c)
    end = time.monotonic() + 120
    while not file.exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(.005)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=60)[0]
    return process.returncode, printed


@pytest.fixture(scope='module')
def kaggle(tmp_path_factory):
    "Synthetic pictures in the layout of the competition, with an age and a variety missing here and there"
    return sample_paddy(tmp_path_factory.mktemp('kaggle'), n=60, missing=.2)

@pytest.fixture(scope='module')
def stopped(kaggle, tmp_path_factory):
    "A run of twelve epochs that got Ctrl-C after its first: its folder, exit code and what it printed"
    out = tmp_path_factory.mktemp('stopped')/'run'
    return out, *interrupt_once_there(out/'checkpoint.pth', '--out', out, '--data', kaggle, *SMALL, '--epochs', 12)


# --- Ctrl-C and --resume ----------------------------------------------------------------------------------------------
def test_ctrl_c_keeps_the_finished_epochs_and_says_how_to_go_on(stopped):
    out, code, printed = stopped
    assert code == 130 and f'go on with paddy-multi train --resume --out {out}' in printed
    assert 'Traceback' not in printed
    assert 1 <= len(rows_of(out)) < 12
    assert [o.name for o in out.iterdir()] == ['checkpoint.pth']

def test_resume_finishes_what_was_begun(stopped):
    out, _, _ = stopped
    before = rows_of(out)
    done = train('--resume', '--out', out)
    assert done.returncode == 0, done.stderr
    rows = rows_of(out)
    assert rows[:len(before)] == before and [o['epoch'] for o in rows] == [*range(12)]
    assert rows[-1]['train_loss'] < rows[0]['train_loss']
    assert {'report.html', 'predictions.csv', 'model.pkl'} <= {o.name for o in out.iterdir()}

def test_a_folder_with_results_is_refused_and_left_alone(stopped, kaggle):
    out, _, _ = stopped
    before = {o: o.stat().st_mtime_ns for o in out.rglob('*')}
    done = train('--out', out, '--data', kaggle, *SMALL)
    assert done.returncode == 2 and 'add --overwrite, or --resume to go on with a run' in ' '.join(done.stderr.split())
    assert {o: o.stat().st_mtime_ns for o in out.rglob('*')} == before


# --- a folder of the user's own -------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def results(kaggle, tmp_path_factory):
    out = tmp_path_factory.mktemp('results')/'run'
    done = train('--data', kaggle, '--out', out, *SMALL, *SHORT)
    assert done.returncode == 0, done.stderr
    return out, done.stdout

def test_predictions_name_files_and_speak_in_units(results, kaggle):
    out, printed = results
    table = pd.read_csv(out/'predictions.csv', index_col='file')
    labels = pd.read_csv(kaggle/'train.csv').set_index('image_id')
    assert list(table.columns) == ['label_label', 'variety_label', 'age_label', 'label', 'label_prob', 'variety',
                                   'variety_prob', 'age', 'error']
    assert len(table) == 12
    mine = labels.loc[table.index]
    for name in ('label', 'variety', 'age'): assert (table[f'{name}_label'].isna() == mine[name].isna()).all()
    assert (table.label_label == mine.label).all() and set(table.label) <= set(labels.label)
    assert table.error.isna().all()
    known = table.age_label.notna()
    assert table.age_label[known].to_numpy() == pytest.approx(mine.age[known].to_numpy(dtype=float), abs=1e-3)
    said = float(re.search(r'age_mean_absolute_error ([\d.]+) \(always', printed)[1])
    assert (table.age-table.age_label).abs().mean() == pytest.approx(said, rel=.01)

def test_the_model_predicts_in_a_process_that_only_has_fastai(results, kaggle):
    out, _ = results
    table = pd.read_csv(out/'predictions.csv', index_col='file')
    file = next(kaggle.rglob(table.index[0]))
    code = f'''
import json
from fastai.vision.all import *
learn = load_learner({str(out/"model.pkl")!r})
print(json.dumps(learn.predict({str(file)!r})[0]))'''
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, expected = json.loads(done.stdout.splitlines()[-1]), table.iloc[0]
    assert (said['label'], said['variety']) == (expected.label, expected.variety)
    assert said['age'] == pytest.approx(expected.age, rel=1e-3)

def test_the_report_needs_no_other_file(results):
    text = (results[0]/'report.html').read_text()
    assert not re.search(r'(?:src|href)="(?!data:|#)', text) and '<script src' not in text
    for part in ('label', 'variety', 'age', 'data:image/png;base64,'): assert part in text


# --- faults ---------------------------------------------------------------------------------------------------------
def files_in(folder): return {o.relative_to(folder): o.stat().st_mtime_ns for o in sorted(folder.rglob('*'))}

def test_the_folder_of_the_data_is_left_as_it_is(kaggle, tmp_path):
    before = files_in(kaggle)
    assert train('--data', kaggle, '--out', tmp_path/'run', *SMALL, *SHORT).returncode == 0
    assert files_in(kaggle) == before

def test_ctrl_c_before_an_epoch_is_finished_leaves_the_way_free(kaggle, tmp_path):
    out = tmp_path/'run'
    code, printed = interrupt_once_there(out/'.lock', '--out', out, '--data', kaggle, '--arch', 'test_vit',
                                         '--no-pretrained', '--size', 160, '--epochs', 2)
    assert code == 130 and 'No epoch was finished, so nothing is kept.' in printed and '--resume' not in printed
    done = train('--resume', '--out', out)
    assert done.returncode == 2 and 'holds no checkpoint to go on from' in ' '.join(done.stderr.split())
    assert train('--data', kaggle, '--out', out, *SMALL, *SHORT).returncode == 0

def test_overwrite_with_a_mistake_loses_nothing(stopped, tmp_path):
    out = shutil.copytree(stopped[0], tmp_path/'run')
    before = files_in(out)
    done = train('--overwrite', '--data', tmp_path/'nowhere', '--out', out)
    assert done.returncode == 1 and 'no such folder' in done.stderr and files_in(out) == before

def small_copy(kaggle, tmp_path, n=40):
    "A folder with `n` of the pictures and their table"
    table = pd.read_csv(kaggle/'train.csv')[:n]
    for o in table.itertuples():
        folder = tmp_path/'data'/'train_images'/o.label
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(kaggle/'train_images'/o.label/o.image_id, folder)
    return tmp_path/'data', table

def no_rows(table): return table[:0]
def three_rows(table):
    rows = table.groupby('label').head(2)[:3]
    return rows.assign(label=['a', 'b', 'a'], variety=['p', 'q', 'p'], age=[50, 60, 70])
def clash(table): return table.assign(label_label=table.label)
def as_it_is(table): return table

@pytest.mark.parametrize('change, args, text', [
    (no_rows, [], 'expected a row a picture, found a table without rows'),
    (three_rows, [], '3 pictures are too few to hold any out for validation'),
    (clash, ['--targets', 'label,label_label'],
     'label_label is what the label of label is called in predictions.csv: rename the column'),
    (as_it_is, ['--bs', '500'],
     'training items give no whole batch of 500, so nothing would be trained: use --bs 32 or less'),
], ids=['empty', 'three', 'clash', 'batch'])
def test_data_that_cannot_be_learned_from_is_refused_before_training(kaggle, tmp_path, change, args, text):
    data, table = small_copy(kaggle, tmp_path)
    change(table).to_csv(data/'train.csv', index=False)
    done = train('--data', data, '--out', tmp_path/'run', *SMALL, *args)
    assert done.returncode == 1 and text in done.stderr and 'Traceback' not in done.stderr
    assert not [o for o in (tmp_path/'run').iterdir()]

def test_a_picture_that_cannot_be_read_is_named(kaggle, tmp_path):
    data, table = small_copy(kaggle, tmp_path)
    table.to_csv(data/'train.csv', index=False)
    file = data/'train_images'/table.label[3]/table.image_id[3]
    file.write_bytes(b'')
    done = train('--data', data, '--out', tmp_path/'run', *SMALL, *SHORT)
    assert done.returncode == 1 and f'Error: 1 of 40 pictures cannot be read ({file.name}: ' in done.stderr
    assert done.stderr.endswith(': mend them, remove them and their rows, or add --skip-unreadable\n')
    done = train('--data', data, '--out', tmp_path/'run', *SMALL, *SHORT, '--skip-unreadable')
    assert done.returncode == 0 and f'Left out: 1 of 40 pictures cannot be read ({file.name}' in done.stderr
    assert '1 that cannot be read are left out.' in (tmp_path/'run'/'report.html').read_text()

def test_each_target_has_its_own_line(kaggle, tmp_path):
    data, table = small_copy(kaggle, tmp_path)
    table.assign(age_group=[*'ab']*20, age=table.age.fillna(60)).to_csv(data/'train.csv', index=False)
    done = train('--data', data, '--out', tmp_path/'run', *SMALL, *SHORT, '--targets', 'age_group,age:regression')
    assert done.returncode == 0, done.stderr
    assert re.search(r'age_group: age_group_error_rate [\d.]+ \(always saying the commonest', done.stdout)
    assert re.search(r'age: age_mean_absolute_error [\d.]+ \(always saying the mean', done.stdout)


# --- a kill -----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.usefixtures('on_cpu')  # a GPU adds up in another order each time
def test_a_run_that_was_killed_in_its_second_epoch_ends_as_one_that_was_not(kaggle, tmp_path):
    "SIGKILL from outside: predictions and weights are those of a run that nothing stopped"
    args = ['--data', kaggle, *SMALL, '--bs', 8, '--epochs', 3]
    whole, out = tmp_path/'whole', tmp_path/'out'
    assert train('--out', whole, *args).returncode == 0
    process = subprocess.Popen([COMMAND, 'train', '--out', out, *map(str, args)], stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (out/'checkpoint.pth').exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL and len(rows_of(out)) < 3 and not (out/'model.pkl').exists()
    again = train('--resume', '--out', out)
    assert again.returncode == 0, again.stderr
    assert (out/'predictions.csv').read_bytes() == (whole/'predictions.csv').read_bytes()
    kept, expected = (read_checkpoint(o/'checkpoint.pth') for o in (out, whole))
    assert kept['rows'] == expected['rows'] and kept['model'].keys() == expected['model'].keys()
    assert all(o.equal(expected['model'][name]) for name, o in kept['model'].items())
