"The command `collab-deep` as a user meets it: installed, in processes of its own"
import os
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pytest

from collab_deep.data.movielens import movielens_100k

COMMAND = Path(sys.executable).with_name('collab-deep')
# as where recbole is not installed
NO_DATA = "import sys; sys.modules['recbole'] = None; from collab_deep.cli.app import app; app()"


def run(*args, **kwargs):
    return subprocess.run([str(o) for o in args], capture_output=True, text=True, **kwargs)


def movielens(*args, **kwargs): return run(COMMAND, 'movielens', *args, **kwargs)


def test_version(): assert run(COMMAND, '--version').stdout == f'collab-deep {version("paddy-multi")}\n'


def test_help():
    for done in (run(COMMAND, '--help'), run(COMMAND)):
        assert 'movielens  Write MovieLens-100k' in done.stdout + done.stderr
    assert all(o in movielens('--help').stdout for o in ('--out FILE', '--part', 'ratings|items|users', '--overwrite'))


def test_writes_in_any_folder(tmp_path):
    done = movielens('--out', 'r.csv', cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ''
    counts, source, licence = done.stdout.splitlines()
    assert counts == 'r.csv: 100,000 ratings of 1,682 items (1,664 titles) by 943 users'
    assert source.startswith('source: ') and source.endswith('ml-100k')
    assert 'Harper and Konstan (2015)' in licence and 'no redistribution' in licence
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path/'r.csv'), movielens_100k())


def refused(done, message):
    assert done.returncode == 2 and message in done.stderr and 'Traceback' not in done.stderr


def fails(done, message):
    assert done.returncode == 1 and message in done.stderr and 'Traceback' not in done.stderr, done.stderr


def test_refuses_and_leaves_files_alone(tmp_path):
    mine = tmp_path/'mine.csv'
    mine.write_text('mine')
    refused(movielens('--out', mine), 'mine.csv exists: choose another name, or add --overwrite')
    refused(movielens('--out', tmp_path), 'is a folder: name a file in it')
    refused(movielens('--out', tmp_path, '--overwrite'), 'is a folder: name a file in it')
    refused(movielens('--out', tmp_path/'none'/'r.csv'), 'does not exist: make it first')
    refused(movielens('--out', tmp_path/'r.csv', '--part', 'films'),
            "'films' is not one of 'ratings', 'items', 'users'")
    refused(movielens(), "Missing option '--out'")
    assert mine.read_text() == 'mine' and os.listdir(tmp_path) == ['mine.csv']


def test_no_room_leaves_the_old_file(tmp_path):
    old = tmp_path/'r.csv'
    old.write_text('old')
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    done = movielens('--out', old, '--overwrite', preexec_fn=limit)
    assert done.returncode == 1 and done.stderr == f"Error: [Errno 27] File too large: '{old}'\n" and done.stdout == ''
    assert old.read_text() == 'old' and os.listdir(tmp_path) == ['r.csv']


def test_no_data_says_how_to_get_it(tmp_path):
    env = dict(os.environ, FASTAI_HOME=str(tmp_path/'fastai'), https_proxy='http://127.0.0.1:9')
    done = run(sys.executable, '-W', 'ignore', '-c', NO_DATA, 'movielens', '--out', tmp_path/'r.csv', env=env)
    assert done.returncode == 1 and 'Traceback' not in done.stderr and not (tmp_path/'r.csv').exists()
    assert 'Error: MovieLens-100k is neither here nor to be downloaded' in done.stderr
    assert 'pip install --no-deps recbole' in done.stderr


@pytest.mark.parametrize('args', [['--help'], ['--version'], ['movielens', '--help']])
def test_help_loads_nothing_heavy(args):
    code = ("import sys; from collab_deep.cli.app import app\n"
            f"try: app({args!r})\n"
            "except SystemExit: print([o for o in ('torch', 'fastai', 'pandas', 'numpy') if o in sys.modules])")
    assert run(sys.executable, '-c', code).stdout.endswith('[]\n')


# --- train and recommend ---------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "What `train` prints, and the folder it wrote, for 30 users"
    folder = tmp_path_factory.mktemp('trained')
    movielens_100k().query('user <= 30').to_csv(folder/'r.csv', index=False)
    done = run(COMMAND, 'train', '--ratings', 'r.csv', '--out', 'model', '--epochs', 1, '--factors', 4, '--relevant', 4,
               cwd=folder)
    assert done.returncode == 0, done.stderr
    return done, folder


def test_train_writes_a_folder_and_says_how_good_it_is(trained):
    done, folder = trained
    for text in ('training has 30 of user', 'popularity', 'ndcg', 'coverage',
                 'model: recommender.json, weights, report.html'): assert text in done.stdout
    assert sorted(o.suffix for o in (folder/'model').iterdir()) == ['.html', '.json', '.safetensors']
    page = (folder/'model'/'report.html').read_text(encoding='utf-8')
    assert page.count('src="data:image/png;base64,') == 2 and 'http' not in page.split('<style>')[0]
    assert page.count('<tr') == 1 + 1 + 5 + 1 + 10


def test_recommend_without_fastai(trained):
    _, folder = trained
    code = "import sys; from collab_deep.cli.app import app\ntry: app()\nfinally: print('fastai' in sys.modules)"
    done = run(sys.executable, '-c', code, 'recommend', '--model', folder/'model', '--user', 7, '--k', 3)
    *lines, loaded = done.stdout.splitlines()
    assert len(lines) == 4 and lines[0].split() == ['item', 'score'] and loaded == 'False' and done.stderr == ''
    again = run(COMMAND, 'recommend', '--model', folder/'model', '--user', '7.0')
    assert again.returncode == 1
    assert again.stderr.startswith("Error: user '7.0' is not among the 30 in training; the nearest are 7")


def test_train_refuses(trained, tmp_path):
    _, folder = trained
    before = {o.name: o.read_bytes() for o in (folder/'model').iterdir()}
    def train(ratings, out, *args): return run(COMMAND, 'train', '--ratings', ratings, '--out', out, *args)
    refused(train(folder/'r.csv', folder/'model'), 'model holds results: choose another folder, or add --overwrite')
    assert {o.name: o.read_bytes() for o in (folder/'model').iterdir()} == before
    refused(train(folder/'r.csv', tmp_path, '--loss', 'hinge'), "'hinge' is not one of 'softmax', 'bpr', 'mse'")
    (tmp_path/'bad.csv').write_text('user,title,rating\n1,a,5\n2,b,\n')
    done = train(tmp_path/'bad.csv', tmp_path/'new')
    fails(done, 'Error: 1 values of rating are not finite')
    done = train(folder/'r.csv', tmp_path/'new', '--relevant', 'nan')
    fails(done, 'Error: --relevant is a finite number on the scale of the ratings, found nan')
    (tmp_path/'none.csv').write_text('user,title,rating\n1,a,5\n2,,3\n')
    fails(train(tmp_path/'none.csv', tmp_path/'new'), 'the first is row 1: leave them out\n')
    assert not (tmp_path/'new').exists()


def test_train_refuses_before_it_trains(trained, tmp_path):
    _, folder = trained
    pd.DataFrame(dict(user=[1, 2, 3], item=[1, 2, 3], rating=[1, 2, 3])).to_csv(tmp_path/'tiny.csv', index=False)
    pd.read_csv(folder/'r.csv')[['user', 'item']].to_csv(tmp_path/'taken.csv', index=False)
    def train(ratings, out, *args):
        return run(COMMAND, 'train', '--ratings', ratings, '--out', tmp_path/out, '--epochs', 99999, *args, timeout=60)
    fails(train(tmp_path/'taken.csv', 'new', '--relevant', 3), 'interactions without ratings have no threshold')
    fails(train(tmp_path/'tiny.csv', 'new'), 'found 0 held-out rows')
    refused(train(folder/'r.csv', 'tiny.csv/new'), 'tiny.csv is a file: name a folder')
    assert not (tmp_path/'new').exists()


def test_train_refuses_ids_that_cannot_be_saved(trained, tmp_path):
    pytest.importorskip('pyarrow')
    df = pd.read_csv(trained[1]/'r.csv')
    df.assign(user=pd.Timestamp('2026-01-01') + pd.to_timedelta(df.user, 'D')).to_parquet(tmp_path/'r.parquet')
    done = run(COMMAND, 'train', '--ratings', tmp_path/'r.parquet', '--out', tmp_path/'new', '--epochs', 99999,
               timeout=60)
    fails(done, 'JSON keeps numbers and text, so convert the column in the file')
    assert not (tmp_path/'new').exists()


def test_recommend_to_a_number_that_is_unknown(trained):
    done = run(COMMAND, 'recommend', '--model', trained[1]/'model', '--user', 9999)
    fails(done, "Error: user '9999' is not among the 30 in training; the nearest are 9\n")
