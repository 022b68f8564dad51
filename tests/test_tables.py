"Tables of others: what `read_table` reads, and what it refuses; what `csv_safe` quotes"
import bz2
import gzip
import os
import threading
import zipfile

import numpy as np
import pandas as pd
import pytest

from paddy_multi.core.tables import csv_safe, read_table


@pytest.fixture
def written(tmp_path):
    "A function that writes text or bytes to a file"
    def write(data, name='t.csv'):
        path = tmp_path/name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path
    return write


FILMS = dict(user=['ann', 'bob'], film=['Amélie', 'Heat'], note=[4.5, 3.])
TEXT = 'user,film,note\nann,Amélie,4.5\nbob,Heat,3.0\n'
ZIPPED = gzip.compress(TEXT.encode(), mtime=0)  # the time would name a test anew


def columns(file, **kwargs): return read_table(file, **kwargs).to_dict('list')


# --- read ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('data', [
    TEXT, TEXT.replace(',', ';'), TEXT.replace(',', '\t'), TEXT.replace(',', '|'),
    TEXT.replace('\n', '\r\n'), TEXT.replace('\n', '\r'), TEXT.rstrip('\n'), TEXT.replace('\n', '\n\n'),
    TEXT.encode('utf-8-sig'), TEXT.encode('utf-16'), TEXT.encode('utf-32'),
    b'\xfe\xff' + TEXT.encode('utf-16-be'), ZIPPED, gzip.compress(TEXT.encode('utf-16'), mtime=0),
    TEXT.replace(',', ' , '), '  ' + TEXT.replace('\n', '  \n '), TEXT.replace('ann', '" ann "'),
    TEXT.replace('user', '"user"').encode('utf-8-sig'), TEXT.replace('note', '"note"').replace('Heat', '"Heat"'),
    ',user,film,note\n0,ann,Amélie,4.5\n7,bob,Heat,3.0\n', 'user,film,note,\nann,Amélie,4.5,\nbob,Heat,3.0, \n',
    'user,film,note,,\nann,Amélie,4.5,,\nbob,Heat,3.0,,\n'])
def test_one_table_written_in_many_ways(written, data):
    assert columns(written(data)) == FILMS
    pd.testing.assert_index_equal(read_table(written(data)).index, pd.RangeIndex(2))


def test_names_of_files_say_nothing(written):
    assert columns(written(TEXT, 'films.parquet')) == columns(written(ZIPPED)) == FILMS


@pytest.mark.parametrize('encoding', ['latin-1', 'cp1252', 'utf-16-le'])
def test_an_encoding_that_is_named(written, encoding):
    assert columns(written(TEXT.encode(encoding)), encoding=encoding) == FILMS


def test_cells_of_quotes_newlines_and_delimiters(written):
    text = 'a,b\n"x,\n""y""\r\n z",1\n5" disk,2\nit\'s,3\n'
    assert columns(written(text)) == dict(a=['x,\n"y"\r\n z', '5" disk', "it's"], b=[1, 2, 3])


def test_gaps_stay_gaps(written):
    df = read_table(written('a,b,c\n1,,x\n2, ,\n3,5," "\n'))
    assert df.isna().values.tolist() == [[False, True, False], [False, True, True], [False, False, True]]
    assert columns(written('a,b\nNA,1\n,2\n'), keep_default_na=False) == dict(a=['NA', ''], b=[1, 2])


@pytest.mark.parametrize('cells, held', [
    (['007', '8'], ['007', '8']), (['7', '8'], [7, 8]), (['0', '0.5'], [0., .5]), (['00', '1'], ['00', '1']),
    (['9007199254740993', '1'], [9007199254740993, 1]), (['9223372036854775808', '1'], ['9223372036854775808', '1']),
    (['123456789012345678901', '2'], ['123456789012345678901', '2']), (['1e300', '2'], [1e300, 2.]),
    (['1', 'two'], ['1', 'two']), (['True', 'no'], ['True', 'no']), (['True', 'False'], [True, False]),
    (['1+2j', '3'], ['1+2j', '3']), (['0x1F', '1_000'], ['0x1F', '1_000']), (['2020-01-05', ''], ['2020-01-05', ''])])
def test_numbers_that_would_lose_something_stay_text(written, cells, held):
    found = read_table(written('\n'.join(['x,i', *(f'{o},1' for o in cells)])))['x']
    assert found.fillna('').tolist() == held and [type(o) for o in found.fillna('')] == [type(o) for o in held]


@pytest.mark.parametrize('cells', [['9007199254740993', ''], ['007', '']])
def test_long_numbers_beside_a_gap_stay_text(written, cells):
    found = read_table(written(f'x,i\n{cells[0]},1\n,2\n'))['x']
    assert found[0] == cells[0] and pd.isna(found[1])


def test_text_far_below_numbers_makes_a_column_of_text(written):
    "pandas reads in pieces, and makes numbers of some of them"
    n = 600_000
    found = read_table(written('x,y\n' + '12,a\n'*n + 'z,b\n'))['x']
    assert found.map(type).unique().tolist() == [str] and found.iloc[-1] == 'z' and found.iloc[0] == '12'


def test_floats_keep_every_digit(written):
    x = np.random.default_rng(0).normal(size=2000)*10.**np.random.default_rng(1).integers(-300, 300, 2000)
    assert (read_table(written('x,y\n' + ''.join(f'{float(o)!r},1\n' for o in x)))['x'].to_numpy() == x).all()


def test_what_is_asked_for_is_done(written):
    assert columns(written('u,x\n07,"1,5"\n'), dtype=dict(u=int), decimal=',') == dict(u=[7], x=[1.5])
    assert columns(written('u;x\n07;1,5\n'), dtype=str) == dict(u=['07'], x=['1,5'])
    assert columns(written('u;x\n07;1,500\n'), thousands=',') == dict(u=['07'], x=[1500])
    assert columns(written('a;b,c\n1;2,3\n'), delimiter=';', dtype=str) == {'a': ['1'], 'b,c': ['2,3']}


# --- refused ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('data, text', [
    ('user,item,rating\n1,2,3,4\n', "line 2 has 4 cells, and the first line names 3: '1,2,3,4'"),
    ('user,item\n1,2\n1,2,3\n', 'line 3 has 3 cells, and the first line names 2'),
    ('user,item\n' + '1,2\n'*500 + '1\n' + '1,2\n'*500, 'line 502 has 1 cells'),
    ('user,item\n1,2,\n', 'line 2 has 3 cells'),
    ('a,b\n"x\ny",1\n2\n', 'line 4 has 1 cells'),
    ('a,b\n"1,2\n3,4\n', 'unexpected end of data. Is a quote open?'),
    ('a,b\n"1,2\n3,4\n"5,6\n', "the row after line 1 cannot be read: ',' expected after '\"'. Is a quote open?"),
    ('a,b,a\n1,2,3\n', "columns have the same name: 'a'"), ('a, a\n1,2\n', "columns have the same name: 'a'"),
    ('196\t242\t3\n186\t302\t3\n', 'the first line holds numbers, 196, 242, 3'),
    ('a,b;c\n1,2;3\n', "separated by ',' or ';': say which, with delimiter="),
    ('', 't.csv is empty'), (' \n \n', 'holds no text'), (b'\xef\xbb\xbf', 'holds no text'),
    (',item\na,1\nb,2\n', "column 1 has no name in the first line, and holds 'a'"),
    (',item\n1,1\n1,2\n', "column 1 has no name in the first line, and holds '1'"),
    ('a,,b\n1,2,3\n', "column 2 has no name in the first line, and holds '2'"),
    ('a;b\n1,5;2\n', "column 'a' holds numbers with a comma, such as '1,5': say decimal=',' or thousands=','"),
    ('a,b\n"1,234",2\n"12",3\n', "column 'a' holds numbers with a comma, such as '1,234'"),
    (TEXT.encode('latin-1'), "line 2 is not utf-8, found b'ann,Am\\xe9lie,4.5\\n': if it is Latin-1"),
    (('a,b\n' + '1,2\n'*50_000 + 'é,1\n').encode('latin-1'), "line 50002 is not utf-8, found b'\\xe9,1\\n'"),
    (TEXT.encode('utf-16-le'), "if it is UTF-16, say encoding='utf-16-le'"),
    (TEXT.replace('é', 'e').encode('utf-16-le'), 'holds NUL bytes'), ('a,b\n1,x\0y\n', 'holds NUL bytes'),
    (ZIPPED[:-9], 'is damaged'), (ZIPPED[:20]+b'x'*30, 'is damaged'),
    (bz2.compress(TEXT.encode()), 'is packed by bzip2'), (b'PAR1' + b'x'*50, 'is a damaged Parquet file')])
def test_refused(written, data, text):
    with pytest.raises(ValueError) as e: read_table(written(data))
    assert text in str(e.value) and 't.csv' in str(e.value)


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no\.csv: no such file'): read_table(tmp_path/'no.csv')
    with pytest.raises(ValueError, match='is a folder; expected'): read_table(tmp_path)
    with zipfile.ZipFile(tmp_path/'t.xlsx', 'w') as f: f.writestr('a', 'b')
    with pytest.raises(ValueError, match='is a zip archive or an Excel file'): read_table(tmp_path/'t.xlsx')


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no pipes with a name')
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path/'pipe.csv')
    found = []
    def read():
        try: read_table(tmp_path/'pipe.csv')
        except ValueError as e: found.append(str(e))
    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(10)
    assert found and 'is no regular file; expected a CSV or Parquet file' in found[0]


@pytest.mark.parametrize('kwargs, error, text', [
    (dict(delimiter='::'), ValueError, r"delimiter is one character, such as ',' or '\\t'; found '::'"),
    (dict(encoding='klingon'), ValueError, "encoding='klingon' is not known"),
    (dict(nrows=5), TypeError, 'found nrows'), (dict(header=None, names=['a']), TypeError, 'found header, names')])
def test_arguments(written, kwargs, error, text):
    with pytest.raises(error, match=text): read_table(written(TEXT), **kwargs)


def test_a_mark_and_another_encoding(written):
    with pytest.raises(ValueError, match="begins with the mark of utf-8, and encoding is 'latin-1'"):
        read_table(written(TEXT.encode('utf-8-sig')), encoding='latin-1')


# --- Parquet ------------------------------------------------------------------------------------------------------
def test_parquet(tmp_path):
    df = pd.DataFrame(FILMS).assign(n=[1, 2], gap=[1., None], kind=pd.Categorical(['a', None]))
    df.to_parquet(tmp_path/'t')
    found = read_table(tmp_path/'t')
    pd.testing.assert_frame_equal(found, df.astype(dict(kind=found['kind'].dtype)))
    df.set_index('user').to_parquet(tmp_path/'t')
    assert list(read_table(tmp_path/'t')) == list(df)
    df.set_axis([5, 9]).to_parquet(tmp_path/'t')
    assert read_table(tmp_path/'t').index.tolist() == [0, 1]
    assert read_table(tmp_path/'t', dtype=dict(n=str))['n'].tolist() == ['1', '2']
    with pytest.raises(ValueError, match='is Parquet, which has no delimiter'): read_table(tmp_path/'t', ',')


def test_parquet_numbers_that_floats_do_not_hold(tmp_path):
    pa, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    from decimal import Decimal
    big = 2**53+1
    columns = dict(gap=pa.array([big, None]), small=pa.array([3, None]), unsigned=pa.array([2**64-1, 1], pa.uint64()),
                   money=pa.array([Decimal('1.50'), None]), whole=pa.array([big, 1]))
    parquet.write_table(pa.table(columns), tmp_path/'t')
    df = read_table(tmp_path/'t')
    assert df.gap[0] == str(big) and pd.isna(df.gap[1]) and df.small[0] == 3. and df.whole.tolist() == [big, 1]
    assert df.unsigned.tolist() == [str(2**64-1), '1'] and df.money.dtype == float and df.money[0] == 1.5
    parquet.write_table(pa.table([pa.array([1]), pa.array([2])], names=['a', 'a']), tmp_path/'t')
    with pytest.raises(ValueError, match="columns have the same name: 'a'"): read_table(tmp_path/'t')


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    pd.DataFrame(FILMS).to_parquet(tmp_path/'t')
    monkeypatch.setitem(__import__('sys').modules, 'pyarrow', None)
    with pytest.raises(ValueError, match=r'which needs pyarrow: run `pip install "paddy-multi\[parquet\]"`'):
        read_table(tmp_path/'t')


# --- csv_safe -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('text', ['=1+1', '+1', '-3', '@SUM(A1)', '\t=1', '\r=1', '\n=1', ' =1', '＝1',
                                  "=cmd|' /C calc'!A0"])
def test_text_that_a_spreadsheet_would_run(text):
    df = pd.DataFrame({text: [text, 'a'], 'n': [-3.5, 2]}, index=pd.Index([text, 'b'], name=text))
    safe = csv_safe(df)
    quoted = f"'{text}"
    assert list(safe) == [quoted, 'n'] and safe[quoted].tolist() == [quoted, 'a'] and safe.n.tolist() == [-3.5, 2]
    assert safe.index.tolist() == [quoted, 'b'] and safe.index.name == quoted
    assert list(df) == [text, 'n'] and df[text].tolist() == [text, 'a']


@pytest.mark.parametrize('value', ['a-b', 'a=1', "'=1", '1-2', '', 'é', None, -3, -3.5, np.float32(-1), True, np.nan,
                                   pd.Timestamp('2020-01-01')])
def test_what_is_no_formula_stays(value):
    found = csv_safe(pd.DataFrame(dict(x=pd.Series([value], dtype=object)))).x[0]
    assert found is value or found == value or pd.isna(value) and pd.isna(found)


def test_safe_tables_of_all_shapes():
    twice = pd.DataFrame([['=1', 2]], columns=['x', 'x'])
    assert csv_safe(twice).values.tolist() == [["'=1", 2]] and list(csv_safe(twice)) == ['x', 'x']
    names = pd.MultiIndex.from_tuples([('=a', 'b'), ('c', '-d')], names=['@l', None])
    safe = csv_safe(pd.DataFrame([['=1', 2]], columns=names)).columns
    assert list(safe) == [("'=a", 'b'), ('c', "'-d")] and list(safe.names) == ["'@l", None]
    assert csv_safe(pd.DataFrame()).empty and csv_safe(pd.DataFrame(index=['=1'])).index.tolist() == ["'=1"]
    assert csv_safe(pd.DataFrame(dict(x=pd.Categorical(['=1'])))).x.tolist() == ["'=1"]
    numbers = pd.DataFrame(dict(n=[1, -2]), index=[-1, 4])
    pd.testing.assert_frame_equal(csv_safe(numbers), numbers)
