"The command `collab-deep` as a user meets it: installed, in processes of its own"
import gzip
import json
import os
import re
import resource
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from collab_deep.cli.app import app
from collab_deep.cli.options import in_options, read_file
from collab_deep.cli.ratings import loaders_of
from collab_deep.data.loaders import RatingsDataLoaders
from collab_deep.data.movielens import movielens_100k
from collab_deep.lists.recommend import recommend as lists
from collab_deep.train.fit import fit_model
from collab_deep.train.learner import collab_deep_learner
from collab_deep.use.save import load_recommender, save_recommender

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
    assert 'src="data:image/png;base64,' in page and 'http' not in page.split('<style>')[0]
    rec = load_recommender(folder/'model')
    for text in ('popularity', 'ndcg', 'Recommendations from', f'For {rec.users[rec.user_counts.argmax()]}'):
        assert text in page, text
    chosen = r'30 users, [\d,]+ items, [\d,]+ ratings from 1 to 5: EASE\(reg=\d+\) \+ iALS\(4 factors\)\n'
    assert re.search(chosen, done.stdout)


def test_recommend_without_fastai(trained):
    _, folder = trained
    code = "import sys; from collab_deep.cli.app import app\ntry: app()\nfinally: print('fastai' in sys.modules)"
    done = run(sys.executable, '-c', code, 'recommend', '--model', folder/'model', '--user', 7, '--k', 3)
    *lines, loaded = done.stdout.splitlines()
    assert len(lines) == 4 and lines[0].split() == ['item', 'score'] and loaded == 'False' and done.stderr == ''
    again = run(COMMAND, 'recommend', '--model', folder/'model', '--user', '7.0', '--k', 3)
    assert again.stdout.splitlines() == lines                                      # as a spreadsheet writes 7
    other = run(COMMAND, 'recommend', '--model', folder/'model', '--user', '7.5')
    assert other.returncode == 1
    assert other.stderr.startswith("Error: user '7.5' is not among the 30 in training; the nearest are 7")


def test_train_refuses(trained, tmp_path):
    _, folder = trained
    before = {o.name: o.read_bytes() for o in (folder/'model').iterdir()}
    def train(ratings, out, *args): return run(COMMAND, 'train', '--ratings', ratings, '--out', out, *args)
    refused(train(folder/'r.csv', folder/'model'), 'model holds results: choose another folder, or add --overwrite')
    assert {o.name: o.read_bytes() for o in (folder/'model').iterdir()} == before
    known = "'softmax', 'sampled_softmax', 'bpr', 'mse'"
    refused(train(folder/'r.csv', tmp_path, '--loss', 'hinge'), f"'hinge' is not one of {known}")
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


# --- in this process, which is quicker ------------------------------------------------------------------------------
def here(*args):
    "What a command does: its exit code, stdout and stderr"
    done = CliRunner().invoke(app, [str(o) for o in args], prog_name='collab-deep', terminal_width=200)
    assert done.exception is None or type(done.exception) is SystemExit, repr(done.exception)
    return done.exit_code, done.stdout, ' '.join(done.stderr.split())


NO_NAMES = dict.fromkeys(['user', 'item', 'rating', 'weight', 'time'])


@pytest.fixture(scope='module')
def rows():
    "The first 3,000 rows of MovieLens-100k in the order of the file"
    return movielens_100k()[:3000].drop(columns='title').rename(columns=dict(timestamp='time'))


def written(df, names, sep, end='\n', quote=''):
    "A text file as others write it: names, if there are some, and rows"
    lines = [names] if names else []
    lines += [sep.join(f'{quote}{o}{quote}' for o in row) for row in df.itertuples(index=False)]
    return (end.join(lines) + end).encode()


PACKED = 'user,item,rating,time'
FORMS = {  # as MovieLens, RecBole, shops and spreadsheets write them: text, and what is to be said of it
    'u.data': (lambda df: written(df, '', '\t'), {}),
    'u1.base': (lambda df: written(df, '', '\t'), {}),
    'u.data.gz': (lambda df: gzip.compress(written(df, '', '\t')), {}),
    'ratings.dat': (lambda df: written(df, '', '::'), {}),
    'named.dat': (lambda df: written(df, 'UserID::MovieID::Rating::Timestamp', '::'), {}),
    'ratings.csv': (lambda df: written(df, 'userId,movieId,rating,timestamp', ',', '\r\n'), {}),
    'ratings.csv.gz': (lambda df: gzip.compress(written(df, PACKED, ',')), {}),
    'ml-100k.inter': (lambda df: written(df, 'user_id:token\titem_id:token\trating:float\ttimestamp:float', '\t'), {}),
    'books.csv': (lambda df: written(df, '"User-ID";"ISBN";"Book-Rating";"Date"', ';', quote='"'), {}),
    'upper.csv': (lambda df: written(df, 'USER_ID,ITEM_ID,RATING,TIMESTAMP', ','), {}),
    'order.tsv': (lambda df: written(df[['time', 'rating', 'item', 'user']], 'ts\tstars\tasin\treviewerID', '\t'), {}),
    'pipes.txt': (lambda df: written(df, 'user|item|rating|time', '|'), dict(sep='|')),
    'tabs.txt': (lambda df: written(df, PACKED.replace(',', '\t'), '\t'), dict(sep=r'\t')),
    'utf16.csv': (lambda df: written(df, PACKED, ',').decode().encode('utf-16'), {}),
    'no-names.csv': (lambda df: written(df, '', ','), dict(header=PACKED)),
    'r.parquet': (None, {})}


def table_of(folder, form, rows):
    "What `train` reads of a file in one of the `FORMS`"
    text,options = FORMS[form]
    if text: (folder/form).write_bytes(text(rows))
    else: rows.to_parquet(folder/form)
    return read_file(folder/form, **options)


def in_order(df):
    "Sorted rows of users, items and ratings"
    return sorted((user, item, float(r)) for user,item,r in df.iloc[:,:3].itertuples(index=False))


def triples(dls, part):
    "Sorted ids of users and items, with ratings"
    pairs,y = dls.ratings_of(part)
    users,items = dls.classes[dls.user], dls.classes[dls.item]
    return sorted((users[u], items[i], float(r)) for (u, i), r in zip(pairs.tolist(), y))


@pytest.mark.parametrize('form', FORMS)
def test_the_same_ratings_in_any_form(form, rows, tmp_path):
    if form.endswith('parquet'): pytest.importorskip('pyarrow')
    dls = loaders_of(table_of(tmp_path, form, rows), NO_NAMES, 'time')
    early = rows.sort_values('time', kind='stable')[:2400]
    assert triples(dls, 'train') == in_order(early)
    assert dls.valid.n == 600


def test_columns_with_names_of_their_own(rows):
    df = rows.set_axis(['who', 'what', 'liked', 'at'], axis=1).assign(plays=np.arange(3000) % 4)
    names = dict(user='who', item='what', rating='liked', weight='plays', time='at')
    dls = loaders_of(df, names, 'time')
    early = df.sort_values('at', kind='stable')[:2400]
    assert triples(dls, 'train') == in_order(early)
    assert dls.weights_of('train').double().sum() == early.plays.sum()


def test_a_title_of_a_review_is_no_item():
    df = pd.DataFrame(dict(user_id=['a', 'a', 'b', 'b'], asin=['x', 'y', 'x', 'y'], rating=[1, 2, 3, 4],
                           title=['good', 'bad', 'fine', 'good']))
    assert loaders_of(df, NO_NAMES, valid_pct=0).item == 'asin'
    films = df.assign(title=df.asin.str.upper())
    assert loaders_of(films, NO_NAMES, valid_pct=0).item == 'title'
    assert loaders_of(films, NO_NAMES | dict(item='asin'), valid_pct=0).item == 'asin'
    assert loaders_of(films.drop(columns='rating'), NO_NAMES, valid_pct=0).rating is None


def test_latin_1(tmp_path):
    df = pd.DataFrame(dict(user=[1, 1, 2, 2, 3, 3], title=['Am\xe9lie', 'Fargo']*3, rating=[5, 4, 3, 2, 1, 5]))
    df.to_csv(tmp_path/'r.csv', index=False, encoding='latin-1')
    assert set(read_file(tmp_path/'r.csv', encoding='latin-1').title) == {'Am\xe9lie', 'Fargo'}
    code,_,said = here('train', tmp_path/'r.csv', '--out', tmp_path/'new')
    assert code == 1 and said.endswith('if it is Latin-1, say --encoding latin-1')


def test_splits(rows):
    last = loaders_of(rows, NO_NAMES, 'last')
    by_time = rows.sort_values('time', kind='stable')
    alone = by_time.groupby('user').user.transform('size') == 1
    held = by_time[~alone].groupby('user').tail(1)
    assert last.valid.n == len(held) and {u for u,_,_ in triples(last, 'valid')} == set(held.user)
    days = rows.assign(time=pd.to_datetime(rows.time, unit='s').astype(str))
    assert triples(loaders_of(days, NO_NAMES, 'time'), 'train') == triples(loaders_of(rows, NO_NAMES, 'time'), 'train')
    zoned = rows.assign(time=pd.to_datetime(rows.time, unit='s', utc=True))
    by_second = triples(loaders_of(rows, NO_NAMES, 'time'), 'train')
    assert triples(loaders_of(zoned, NO_NAMES, 'time'), 'train') == by_second
    date = rows.assign(time=pd.to_datetime(rows.time, unit='s').dt.date)  # as Parquet has dates
    by_day = rows.assign(time=rows.time//86400)
    a,b = (triples(loaders_of(o, NO_NAMES, 'time'), 'train') for o in (date, by_day))
    assert a == b
    other = rows.assign(bought=-rows.time)  # the other way round
    early = rows.sort_values('time', ascending=False, kind='stable')[:2400]
    dls = loaders_of(other, NO_NAMES | dict(time='bought'), 'time')
    assert {o[:2] for o in triples(dls, 'train')} == {*early[['user', 'item']].itertuples(index=False, name=None)}
    a,b,c = (loaders_of(rows, NO_NAMES, seed=seed).ratings_of('train')[0] for seed in (1, 1, 2))
    assert a.equal(b) and not a.equal(c)


def test_pairs_that_come_twice():
    df = pd.DataFrame(dict(user=[1, 2, 1, 2], item=[1, 1, 1, 2], rating=[5, 2, 1, 4], time=[9, 1, 2, 3]))
    def ratings(duplicates, **names):
        return triples(loaders_of(df, NO_NAMES | names, duplicates=duplicates, valid_pct=0), 'train')
    with pytest.warns(UserWarning, match="by the column 'time'"):
        assert ratings('last') == [(1, 1, 5), (2, 1, 2), (2, 2, 4)]
    assert ratings('mean') == [(1, 1, 3), (2, 1, 2), (2, 2, 4)]
    assert ratings('keep') == [(1, 1, 1), (1, 1, 5), (2, 1, 2), (2, 2, 4)]
    df['entered'] = [1, 2, 3, 4]
    with pytest.warns(UserWarning, match="later one"): assert ratings('last', time='entered')[0] == (1, 1, 1)
    with pytest.warns(UserWarning) as said: ratings(None)
    assert in_options(said[0].message).endswith(
        '1 rows hold a user and item that came before, the first is (1, 1) in row 2: all of them count. Say '
        '--duplicates last for the latest row of each, mean for their mean, or keep for all of them without this '
        'warning')


# --- which model ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def few(tmp_path_factory):
    "Ratings of 30 users in a file"
    file = tmp_path_factory.mktemp('few')/'r.csv'
    movielens_100k().query('user <= 30').drop(columns='title').to_csv(file, index=False)
    return file


MODELS = [  # options, what is said to be chosen, model in the file, and whether its scores are an order alone
    ('', r'EASE\(reg=\d+\) \+ iALS\(32 factors\)', 'Blend', True),
    ('--model blend --factors 4', r'EASE\(reg=\d+\) \+ iALS\(4 factors\)', 'Blend', True),
    ('--model ease', r'EASE\(reg=\d+\)', 'EASE', True),
    ('--model ials --factors 4 --epochs 2', r'iALS\(4 factors\)', 'iALS', True),
    ('--model factor --factors 4 --epochs 1', r"FactorModel\(4 factors\), loss 'mse'", 'FactorModel', False),
    ('--model dot --factors 4 --epochs 1', r"DotProductBias\(4 factors\), loss 'mse'", 'DotProductBias', False),
    ('--model nn --factors 4 --epochs 1', r"EmbeddingNN\(.*\), loss 'mse'", 'EmbeddingNN', False),
    ('--model nn --loss bpr --epochs 1', r"EmbeddingNN\(.*\), loss 'bpr'", 'EmbeddingNN', True),
    ('--model factor --loss softmax --epochs 1', r"FactorModel\(50 .*, loss 'softmax'", 'FactorModel', True),
    ('--loss softmax --epochs 1', r"DotProductBias\(50 factors\), loss 'softmax'", 'DotProductBias', True),
    ('--loss mse --epochs 1', r"DotProductBias\(50 factors\), loss 'mse'", 'DotProductBias', False)]

@pytest.mark.parametrize('options, said, model, ranks', MODELS, ids=[o[0] for o in MODELS])
def test_models(options, said, model, ranks, few, tmp_path):
    code,text,err = here('train', few, '--out', tmp_path/'m', *options.split())
    assert code == 0 and re.search(rf'from 1 to 5: {said}\n', text) and err == '', (text, err)
    found = json.loads((tmp_path/'m'/'recommender.json').read_text())
    assert (found['model']['name'], found['ranks']) == (model, ranks)
    assert ('rmse' in text) == (not ranks)
    y_range = found['model']['settings'].get('y_range')
    assert (y_range is None) if ranks else (list(y_range) == [.5, 5.5])


def test_a_seed_says_it_all(few, tmp_path):
    def weights(seed, out):
        assert here('train', few, '--out', tmp_path/out, '--model', 'ials', '--epochs', 1, '--seed', seed)[0] == 0
        return [o.name for o in (tmp_path/out).glob('weights-*')]
    assert weights(1, 'a') == weights(1, 'b') != weights(2, 'c')


@pytest.mark.parametrize('options, said', [
    (['--model', 'ease', '--loss', 'bpr'], "ease is solved, and has no loss: leave --loss out, or train --model dot"),
    (['--model', 'auto', '--loss', 'softmax'], 'auto is solved, and has no loss'),
    (['--model', 'ease', '--factors', 8], 'ease has no factors: leave --factors out, or choose --model ials'),
    (['--model', 'ease', '--epochs', 3], 'ease is solved in one turn: leave --epochs out'),
    (['--model', 'svd'], "'svd' is not one of 'auto', 'blend', 'ease', 'ials', 'sasrec', 'factor', 'dot', 'nn'"),
    (['--split', 'first'], "'first' is not one of 'random', 'last', 'time'"),
    (['--duplicates', 'raise'], "'raise' is not one of 'last', 'mean', 'keep'"),
    (['--ratings', 'other.csv'], 'name one file with ratings')])
def test_options_that_contradict(options, said, few, tmp_path):
    code,_,err = here('train', few, '--out', tmp_path/'new', *options)
    assert code == 2 and said in err.replace('│ ', ''), err
    assert not (tmp_path/'new').exists()


def test_options_that_change_nothing_are_warned_of(few, tmp_path):
    code,_,err = here('train', few, '--out', tmp_path/'m', '--model', 'ials', '--epochs', 1, '--bs', 64, '--time',
                      'timestamp')
    assert code == 0
    assert err == ('Warning: --bs changes nothing: ials is solved for all rows at once Warning: --time changes nothing '
                   'beside --split random: add --split last or time, or --duplicates last')


@pytest.mark.parametrize('options, n', [([], 3941 - 30), (['--split', 'time'], 3153), (['--split', 'random'], 3153)])
def test_a_model_that_reads_the_order_is_measured_on_what_came_last(options, n, few, tmp_path):
    code,out,err = here('train', few, '--out', tmp_path/'m', '--model', 'sasrec', '--epochs', 1, '--factors', 4,
                        '--duplicates', 'keep', *options)
    assert code == 0, err
    warned = 'come before training rows of the same user, which the model reads: use --split last or time' in err
    assert warned == ('random' in options), err
    assert f' items, {n:,} ratings from 1 to 5: SASRec' in out, out


# --- what is refused, in the words of a shell -----------------------------------------------------------------------
FULL = 'user,item,rating\n' + ''.join(f'{u},{i},{(u*i)%5+1}\n' for u in range(1, 9) for i in range(1, 9))
TAKEN = ''.join(line.rpartition(',')[0] + '\n' for line in FULL.splitlines())
REFUSED = [  # text of a file, options, what is said
    ('who,what,stars\n1,2,3\n', [], "name them with --user, --item, --rating; found ['who', 'what', 'stars']"),
    ('user,sku,asin,rating\n1,2,3,4\n', [], "could be any of ['sku', 'asin']: name them with --user, --item, --rating"),
    ('user,item,liked\n1,2,3\n', [], 'Then add --implicit, else name them with --rating; found'),
    (FULL, ['--user', 'who'], "expected a column 'who' for the users, found ['user', 'item', 'rating']"),
    (FULL, ['--rating', 'stars'], "expected a column 'stars' for the ratings"),
    (FULL, ['--item', 'user'], 'name them with --user, --item, --rating'),
    (FULL, ['--weight', 'plays'], "expected a column 'plays' of weights"),
    (FULL, ['--rating', 'rating', '--weight', 'rating'],
     "weights are a column of their own, found 'rating' for two things"),
    (FULL, ['--split', 'last'], "expected a column of times, found ['user', 'item', 'rating']: name one with --time"),
    (FULL, ['--split', 'time', '--time', 'when'], "expected a column 'when' of times, found"),
    ('user,item,rating,day\n' + '1,2,3,noon\n'*3, ['--split', 'last', '--time', 'day'],
     "day should hold times as numbers or such as 2026-01-31 12:00, found 'noon' in row 0: write them so in the file"),
    ('user,item,rating,time\n1,2,3,5\n1,3,3,\n', ['--split', 'last'],
     '1 rows have no time, the first is row 1: leave them out'),
    ('1,2,3\n4,5,6\n', [], 'Then name its 3 columns, as with --header user,item,rating; found'),
    (FULL, ['--header', 'user,item,rating'],
     "the first line names columns, ['user', 'item', 'rating']: leave --header out"),
    ('1,2,3\n', ['--header', 'user,item'], '--header names 2 columns, and the first line has 3 cells'),
    ('user;item,rating\n1;2,3\n', [], "may be separated by ',' or ';': say which, with --sep"),
    (FULL, ['--sep', ';'], "expected ';' between the columns, found 'user,item,rating'"),
    (FULL, ['--sep', ''], '--sep is the text between columns, found none: leave it out to have it found'),
    (FULL, ['--encoding', 'utf-99'], "--encoding utf-99 is not known; 'utf-8', 'latin-1'"),
    ('user,item,rating\n1,2,"3,5"\n4,5,"2,5"\n', [], "such as '3,5': write them with a point"),
    ('user,item,rating\n1,2,3\n,5,2\n', [], '1 rows have no user, the first is row 1: leave them out'),
    ('user,item,rating\n1,2,good\n4,5,bad\n', [], "rating should hold numbers, found 'good' in row 0"),
    ('user,item,rating\n1.5,2,3\n4,5,2\n', [], 'is it the right column? If so, convert it'),
    ('user,item,rating\nann,2,3\n"ann ",5,2\n'.replace('"ann "', 'a\u0301nn').replace('\nann', '\n\xe1nn'), [],
     'which would be two: write them in one form'),
    ('user,item,rating\n1,2,3\n1,5,2\n', [], 'at least 2 different values of user'),
    (TAKEN, ['--relevant', 3],
     'interactions without ratings have no threshold: leave --relevant out, and all are relevant'),
    ('user,item,rating,weight\n1,2,3,-1\n2,2,3,1\n', ['--weight', 'weight'],
     '1 values of weight are no weights, the first is -1'),
    ('', [], 'is empty; expected a line of names, and rows'),
    ('user,item,rating\n1,2\n', [], 'line 2 has 2 cells, and the first line names 3')]
PYTHON = re.compile(r'\w+=|_name\b|ratings\.|\.astype|\.str\.|pd\.|dropna|fold_in|None\b')

@pytest.mark.parametrize('text, options, said', REFUSED, ids=[f'{i}' for i in range(len(REFUSED))])
def test_refusals_speak_of_options(text, options, said, tmp_path):
    file = tmp_path/'r.csv'
    file.write_text(text, encoding='utf-8')
    code,out,err = here('train', file, '--out', tmp_path/'new', '--model', 'ease', *options)
    assert code == 1 and said in err, err
    assert not PYTHON.search(err), err
    assert not (tmp_path/'new').exists()


def test_parquet_takes_no_options_of_text(tmp_path):
    pytest.importorskip('pyarrow')
    pd.DataFrame(dict(user=[1, 2], item=[1, 2], rating=[1, 2])).to_parquet(tmp_path/'r.parquet')
    for options,said in ((['--sep', ','], 'neither: leave --sep and --encoding out'),
                         (['--header', 'user,item,rating'], 'which has names: leave --header out')):
        code,_,err = here('train', tmp_path/'r.parquet', '--out', tmp_path/'new', *options)
        assert code == 1 and said in err, err


def test_interactions_need_a_loss_on_lists(tmp_path):
    file = tmp_path/'taken.csv'
    file.write_text(TAKEN)
    code,_,err = here('train', file, '--out', tmp_path/'new', '--loss', 'mse')
    assert code == 1 and 'have nothing to compare with: choose --loss bpr or softmax' in err, err
    code,text,_ = here('train', file, '--out', tmp_path/'m', '--model', 'factor', '--epochs', 1, '--factors', 2)
    assert code == 0 and "8 users, 8 items, 52 interactions: FactorModel(2 factors), loss 'softmax'" in text, text


# --- lists of many users --------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "A folder with a recommender of 30 users"
    folder = tmp_path_factory.mktemp('model')/'m'
    df = movielens_100k().query('user <= 30')
    dls = RatingsDataLoaders.from_df(df, 'user', 'title', duplicates='keep', seed=1)
    save_recommender(fit_model(dls, 'ials', 2), folder)
    return folder


def same(file, right):
    "Does a file hold these lists?"
    read = pd.read_csv(file) if file.suffix == '.csv' else pd.read_parquet(file)
    assert [*read] == ['user', 'item', 'score']
    assert read.user.tolist() == right.user.tolist() and read['item'].tolist() == right['item'].tolist()
    assert np.allclose(read.score, right.score, rtol=1e-6)


@pytest.mark.parametrize('suffix', ['.csv', '.parquet'])
def test_lists_of_all_are_those_of_python(suffix, model, tmp_path):
    out = tmp_path/f'lists{suffix}'
    if suffix == '.parquet': pytest.importorskip('pyarrow')
    code,text,err = here('recommend', '--model', model, '--all', '--k', 3, '--out', out)
    assert (code, text, err) == (0, f'{out}: lists of 3 for 30 of 30 users\n', '')
    rec = load_recommender(model)
    same(out, lists(rec, rec.users[1:], 3))
    before = out.read_bytes()
    code,_,err = here('recommend', '--model', model, '--all', '--k', 4, '--out', out)
    assert code == 2 and 'exists: choose another name, or add --overwrite' in err and out.read_bytes() == before
    assert here('recommend', '--model', model, '--all', '--k', 4, '--seen', '--out', out, '--overwrite')[0] == 0
    same(out, lists(rec, rec.users[1:], 4, exclude_seen=False))
    assert os.listdir(tmp_path) == [out.name]


@pytest.mark.parametrize('text', [
    '9\n7\n', '9\r\n7', '\ufeff9\n\n 7 \n9\n', 'user\n9\n7\n', 'age,userId\n3,9\n4,7\n5,9\n',
    'user_id:token\tage:float\n9\t1\n7\t2\n', '9\t1\t5\t881250949\n7\t1\t5\t881250949\n'])
def test_users_in_a_file(text, model, tmp_path):
    file = tmp_path/'u.data'
    file.write_text(text, encoding='utf-8', newline='')
    out = tmp_path/'lists.csv'
    code,_,err = here('recommend', '--model', model, '--users', file, '--k', 2, '--out', out)
    assert (code, err) == (0, ''), err
    same(out, lists(load_recommender(model), [9, 7], 2))


def test_users_that_are_not_known(model, tmp_path):
    file,out = tmp_path/'u.txt', tmp_path/'lists.parquet'
    file.write_text('9\n31\nnobody\n7\n')
    said = "Warning: 2 of 4 users are not known: '31', 'nobody'; each has a row without item and score"
    code,text,err = here('recommend', '--model', model, '--users', file, '--k', 2, '--out', out)
    assert (code, err) == (0, said) and 'lists of 2 for 2 of 4 users' in text
    read = pd.read_parquet(out)
    assert read.user.tolist() == ['9', '9', '31', 'nobody', '7', '7']
    assert read['item'].isna().tolist() == read.score.isna().tolist() == [False, False, True, True, False, False]
    code,text,err = here('recommend', '--model', model, '--users', file, '--k', 1)
    assert (code, err) == (0, said) and [o.split()[0] for o in text.splitlines()] == ['user', '9', '31', 'nobody', '7']
    file.write_text('31\nnobody\n')
    code,_,err = here('recommend', '--model', model, '--users', file, '--out', tmp_path/'new.csv')
    assert code == 1 and err == "Error: none of the 2 users is among the 30 in training: '31', 'nobody'"
    assert not (tmp_path/'new.csv').exists()


def test_who_has_rated_everything_has_a_row_too(tmp_path):
    df = pd.DataFrame(dict(user=[1, 1, 1, 2, 2, 3], item=[1, 2, 3, 1, 2, 3], rating=[1, 2, 3, 4, 5, 1]))
    save_recommender(fit_model(RatingsDataLoaders.from_df(df, valid_pct=0), 'ials', 1, n_factors=2), tmp_path/'m')
    code,_,err = here('recommend', '--model', tmp_path/'m', '--all', '--out', tmp_path/'l.csv')
    assert code == 0 and "Warning: 1 of 3 users are without an item that they have not rated: '1'; each has" in err
    read = pd.read_csv(tmp_path/'l.csv')
    assert read.user.tolist() == [1, 2, 3, 3] and read['item'].fillna(0).tolist()[:2] == [0, 3]
    assert (tmp_path/'l.csv').read_text().splitlines()[1] == '1,,'


@pytest.mark.parametrize('options, code, said', [
    ([], 2, 'name one of --user ID, --users FILE and --all'), (['--all', '--user', 7], 2, 'name one of --user'),
    (['--all', '--out', 'lists.txt'], 2, 'lists.txt is to end with .csv or .parquet'),
    (['--user', 7, '--sep', ';'], 2, 'it is for --users FILE: leave it out'),
    (['--all', '--overwrite'], 2, 'it is for a file: name one with --out, or leave it out'),
    (['--all', '--raw', '--out', 'lists.parquet'], 2, 'it is for .csv: leave it out'),
    (['--users', 'none.txt'], 1, 'none.txt: no such file'),
    (['--user', 'x', '--out', 'l.csv'], 1, "user 'x' is not among the 30")])
def test_recommend_refuses(options, code, said, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found,_,err = here('recommend', '--model', model, *options)
    assert found == code and said in err, err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('text, said', [
    ('', 'is empty'), (' \n\n', 'holds no user'),
    ('a,b\n1,2\n', "expected one column 'user', or with another name of users, found ['a', 'b']"),
    ('user,n\n7,1\n,2\n', 'row 1 has no user')])
def test_files_of_users_that_hold_none(text, said, model, tmp_path):
    (tmp_path/'u.csv').write_text(text)
    code,_,err = here('recommend', '--model', model, '--users', tmp_path/'u.csv')
    assert code == 1 and said in err and not PYTHON.search(err), err


def test_a_file_of_users_in_latin_1(tmp_path):
    df = pd.DataFrame(dict(user=['Zo\xeb', 'Ann', 'Bob']*4, item=[*range(1, 13)], rating=[1, 2, 3, 4]*3))
    dls = RatingsDataLoaders.from_df(df, valid_pct=0)
    save_recommender(fit_model(dls, 'ials', 1, n_factors=2), tmp_path/'m')
    (tmp_path/'u.txt').write_bytes('Zo\xeb\n'.encode('latin-1'))
    code,_,err = here('recommend', '--model', tmp_path/'m', '--users', tmp_path/'u.txt')
    assert code == 1 and err.endswith('say --encoding latin-1')
    code,text,_ = here('recommend', '--model', tmp_path/'m', '--users', tmp_path/'u.txt', '--encoding', 'latin-1',
                       '--k', 1)
    assert code == 0 and text.splitlines()[1].split()[0] == 'Zo\xeb'


def test_ids_stay_what_they_are_and_cells_run_nothing(tmp_path):
    df = pd.DataFrame(dict(user=['007', '7', '=1+1']*4, item=['-1', '@x', 'c', 'd']*3, rating=[1, 2, 3, 4, 5, 1]*2))
    dls = RatingsDataLoaders.from_df(df, valid_pct=0)
    save_recommender(fit_model(dls, 'ials', 1, n_factors=2), tmp_path/'m')
    args = ['recommend', '--model', tmp_path/'m', '--all', '--seen', '--k', 4]
    assert here(*args, '--out', tmp_path/'safe.csv')[0] == here(*args, '--raw', '--out', tmp_path/'raw.csv')[0] == 0
    safe,raw = (pd.read_csv(tmp_path/o, dtype=str) for o in ('safe.csv', 'raw.csv'))
    assert set(raw.user) == {'007', '7', '=1+1'} and set(raw['item']) == {'-1', '@x', 'c', 'd'}
    assert set(safe.user) == {'007', '7', "'=1+1"} and set(safe['item']) == {"'-1", "'@x", 'c', 'd'}
    (tmp_path/'u.txt').write_text('007\n')
    code,text,_ = here('recommend', '--model', tmp_path/'m', '--users', tmp_path/'u.txt', '--seen', '--k', 4)
    assert code == 0 and [o.split()[0] for o in text.splitlines()] == ['user', *['007']*4]


def test_users_known_by_features_alone(few, tmp_path):
    df = pd.read_csv(few)
    ages = pd.DataFrame(dict(age=np.linspace(0, 1, 31)), index=pd.Index(range(1, 32), name='user'))
    dls = RatingsDataLoaders.from_df(df, seed=1)
    learn = collab_deep_learner(dls, 4, model='factor', config=dict(user_features=ages))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    save_recommender(learn, tmp_path/'m')
    code,text,_ = here('recommend', '--model', tmp_path/'m', '--user', 31, '--k', 2)
    assert code == 0 and len(text.splitlines()) == 3
    code,text,_ = here('recommend', '--model', tmp_path/'m', '--all', '--k', 2, '--out', tmp_path/'all.csv')
    assert code == 0 and 'for 31 of 31 users' in text


@pytest.mark.parametrize('suffix', ['.csv', '.parquet'])
def test_no_room_leaves_the_old_lists(suffix, model, tmp_path):
    if suffix == '.parquet': pytest.importorskip('pyarrow')
    old = tmp_path/f'l{suffix}'
    old.write_text('old')
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    args = [COMMAND, 'recommend', '--model', model, '--all', '--k', 300, '--out', old, '--overwrite']
    done = run(*args, preexec_fn=limit)
    fails(done, 'File too large')
    assert str(old) in done.stderr and '.part' not in done.stderr, done.stderr
    assert old.read_text() == 'old' and os.listdir(tmp_path) == [old.name]


# --- stopped in between ---------------------------------------------------------------------------------------------
def test_an_interrupt_leaves_nothing(few, tmp_path):
    args = [COMMAND, 'train', few, '--out', tmp_path/'new', '--loss', 'softmax', '--epochs', '99999']
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=dict(os.environ, PYTHONUNBUFFERED='1'))
    for line in process.stdout:
        if line.startswith('1 '): break
    process.send_signal(signal.SIGINT)
    _,err = process.communicate(timeout=60)
    assert process.returncode in (1, 130) and 'Traceback' not in err, err
    assert os.listdir(tmp_path/'new') == []


def test_a_pipe_that_is_closed(model):
    command = f'{COMMAND} recommend --model {model} --all --k 1000 | head -1'
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.split() == ['user', 'item', 'score'] and done.stderr == ''
