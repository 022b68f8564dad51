"The scripts that measure other packages beside ours: what they count, worked out by hand, and a small run of them"
import json
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT/'benchmarks'/'leaderboard'), str(ROOT/'benchmarks'/'leaderboard'/'peers')]
import common
import in_order
import measure
import report
import sets

# --- what is counted ------------------------------------------------------------------------------------------------
def test_lists_by_hand():
    seen = csr_matrix(np.array([[1, 0, 0, 0], [0, 0, 1, 1]]))
    lists = common.best([[9., 1., 3., 3.], [1., 2., 8., 9.]], seen)
    assert lists.tolist() == [[2, 3, 1, -1], [1, 0, -1, -1]]  # equal scores in the order of the items
    relevant = csr_matrix(np.array([[0, 1, 1, 0], [1, 0, 0, 0]]))
    d = 1/np.log2([2, 3, 4])
    by_hand = [(d[0] + d[2])/(d[0] + d[1]), d[1]/d[0]]
    assert np.allclose(common.ndcg(lists, relevant, np.array([2, 1])), by_hand)

def test_an_item_that_counts_and_cannot_be_listed_lowers_the_value():
    lists,relevant = np.array([[0, 1]]),csr_matrix(np.array([[1, 0, 1]]))
    assert np.allclose(common.ndcg(lists, relevant, np.array([2])), 1/(1 + 1/np.log2(3)))

def test_intervals_by_hand():
    got = measure.interval(np.array([.1, .3, .2]))
    half = 4.302653*np.std([.1, .3, .2], ddof=1)/np.sqrt(3)  # t for 2 degrees of freedom
    assert np.allclose([got['mean'], got['low'], got['high']], [.2, .2 - half, .2 + half], atol=1e-4)

def test_values_of_a_pair_that_comes_twice():
    rows = common.Rows(np.array([0, 0, 1]), np.array([1, 1, 0]), np.array([2., 4., 5.]), (2, 2))
    assert rows.matrix().toarray().tolist() == [[0, 3], [5, 0]]
    assert rows.matrix('ones').toarray().tolist() == [[0, 1], [1, 0]]
    assert rows.matrix('above').toarray().tolist() == [[0, 1], [3, 0]]

# --- settings -------------------------------------------------------------------------------------------------------
def test_a_setting_that_cannot_be_fitted_loses(capsys):
    def measured(fit, task, setting):
        if setting['a'] == 3: raise ZeroDivisionError('no')
        return setting['a']
    best,value,n,_ = common.tuned(None, dict(a=[1, 2, 3]), None, measured)
    assert (best, value, n) == (dict(a=2), 2., 3)
    assert "{'a': 3} failed: ZeroDivisionError: no" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match='none of 1 settings could be fitted'):
        common.tuned(None, dict(a=[3]), None, measured)

@pytest.mark.parametrize('script', measure.PEERS, ids=lambda o: o.stem)
def test_every_peer_names_the_versions_it_needs(script):
    assert all('==' in o for o in measure.requirements(script))

# --- splits ---------------------------------------------------------------------------------------------------------
def small_set(**kwargs):
    "Synthetic stars: 30 users, 12 items, two tastes"
    rng = np.random.default_rng(0)
    df = pd.DataFrame([(f'u{u}', f'i{i}', int(np.clip((4 if u%2 == i%2 else 2) + rng.integers(-1, 2), 1, 5)))
                       for u in range(30) for i in range(12) if rng.random() < .7], columns=['user', 'item', 'rating'])
    return sets.RatingSet('small', 'here', lambda: df, 4, **kwargs)

def test_what_counts_is_what_was_liked_and_held_out():
    measured = measure.Measured(small_set())
    df = measured.df
    held = df.iloc[measured.test].query('rating >= 4')
    assert measured.relevant.sum() == len(held.drop_duplicates(['user', 'item']))
    names = sorted(df.user.unique())
    assert {names[u] for u in measured.list_users} == set(held.user) & set(df.iloc[measured.train].user)

def test_the_inner_split_is_of_training_rows_alone(tmp_path):
    measured = measure.Measured(small_set())
    measured.write_task(tmp_path)
    task = common.Task(tmp_path)
    train,held = task.inner()
    assert len(train.users) + len(held.users) == len(measured.train) and len(held.users)
    stars = measured.df.rating.to_numpy()[measured.train]
    assert np.array_equal(np.r_[train.values, held.values].cumsum()[-1], stars.sum())
    assert np.array_equal(task.liked, stars >= 4)

# --- the page -------------------------------------------------------------------------------------------------------
def row(model, value, beside=None):
    beside = beside and dict(zip(('peer', 'mean', 'low', 'high'), beside))
    return dict(model=model, ours='ours' in model, seconds=1.234, setting=None if 'ours' in model else dict(a=1, b='x'),
                tried=6, beside=beside, **{'ndcg@10': value})

def test_a_board_as_a_table():
    board = dict(measure='ndcg@10', rows=[row('auto (ours)', .31239, ('EASE', .0123, .001, .02)), row('EASE', .3)])
    table = report.board_table(board)
    assert table.loc['auto (ours)'].tolist() == ['0.3124', '+0.0123 [+0.0010, +0.0200]', '1.23']
    assert table.loc['EASE', 'beside the best peer'] == 'best peer' == report.difference_text(None)
    intervals = dict(better=(.001, .02), level=(-.01, .02), worse=(-.02, -.001))
    for said,(low,high) in intervals.items(): assert report.standing(dict(low=low, high=high)) == said
    settings = report.peer_settings({'one': board})
    assert settings.reset_index().values.tolist() == [['EASE', 'one', 'a=1, b=x', 6]]
    line = report.plot_boards({'one': board}, 'auto (ours)').axes[0].lines[0]
    assert np.allclose(line.get_xdata(), [.1/.3, 2/.3])                          # percent of the best peer's value

def test_every_committed_board_is_of_a_whole_run():
    board = report.leaderboards()['leaderboard']
    assert not board['about']['quick'] and [o['set'] for o in board['sets']] == [o.name for o in sets.SETS]
    for o in board['sets']:
        for found in o['boards']: assert {row['tried'] for row in found['rows'] if row['ours']} == {0}

# --- a whole run ----------------------------------------------------------------------------------------------------
def test_a_small_run(monkeypatch, tmp_path):
    "One peer, which needs no other packages than ours; the board checks our NDCG by its own lines"
    monkeypatch.setattr(measure, 'SETS', [small_set()])
    monkeypatch.setattr(measure, 'PEERS', [o for o in measure.PEERS if o.stem == 'numpy_ease'])
    monkeypatch.setattr(measure, 'python_of', lambda script: sys.executable)
    monkeypatch.setattr(measure, 'ratings_board', lambda measured: dict(asked='ratings', measure='mse', rows=[]))
    measure.main(['--out', str(tmp_path)])
    board = json.loads((tmp_path/'leaderboard.json').read_text())['sets'][0]['boards'][0]
    rows = {o['model']: o for o in board['rows']}
    assert rows.keys() == {'popularity', 'EASE (numpy)', *measure.ours.LISTS}
    assert rows['EASE (numpy)']['beside'] is None and rows['EASE (numpy)']['tried'] == 18
    assert all(o['beside']['peer'] == 'EASE (numpy)' for name,o in rows.items() if name != 'EASE (numpy)')
    values = [o['ndcg@10'] for o in board['rows']]
    assert values == sorted(values, reverse=True) and values[0] > rows['popularity']['ndcg@10']

# --- what comes next ------------------------------------------------------------------------------------------------
PEER = '''"Lists the items that most rows have, for the tests of the board"
import numpy as np
import common
import in_order

def popular(rows, users, seed, listed):
    counts = np.repeat(np.asarray(rows.matrix('ones').sum(0)).reshape(1, -1), len(users), 0)
    lists = common.best(counts, rows.matrix('ones')[users])
    return np.where(np.arange(lists.shape[1]) < listed, lists, -1)

common.main([], in_order={'popular (peer)': (popular, dict(listed=[0, 10, 1]))})
'''

def timed_set():
    "Synthetic stars with times that go against the order of the table"
    df = small_set().read()
    df['timestamp'] = np.arange(len(df))[::-1]*10
    return sets.RatingSet('small', 'here', lambda: df, split=sets.last_of_each)

def test_rows_of_a_task_are_in_order_and_its_inner_split_holds_out_what_came_last(tmp_path):
    measured = measure.Measured(timed_set())
    in_order.write_task(measured, tmp_path, [0])
    task = common.OrderedTask(tmp_path)
    numbers = measured.numbers(measured.train)[::-1]         # the last row of the table came first
    assert np.array_equal(np.stack([task.rows.users, task.rows.items], 1), numbers)
    last = {u: i for i,u in enumerate(task.rows.users)}      # place of each user's last row
    assert set(np.flatnonzero(task.held)) == set(last.values())

def test_a_small_board_of_what_comes_next(monkeypatch, tmp_path):
    "A peer that lists what is popular chooses the best of three settings, and has the value of popularity"
    script = tmp_path/'peer.py'
    script.write_text(PEER)
    paths = str(Path(common.__file__).parent),os.environ.get('PYTHONPATH', '')
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(paths))
    monkeypatch.setattr(measure, 'python_of', lambda script: sys.executable)
    monkeypatch.setattr(in_order, 'PEER', script)
    monkeypatch.setattr(in_order, 'SETS', [timed_set()])
    in_order.main(['--out', str(tmp_path)])
    board = json.loads((tmp_path/'in_order.json').read_text())['sets'][0]
    rows = {o['model']: o for o in board['rows']}
    peer = rows['popular (peer)']
    assert peer['setting'] == dict(listed=10) and peer['tried'] == 3 and peer['beside'] is None
    assert peer['ndcg@10'] == rows['popularity']['ndcg@10'] and len(peer['ndcg@10 of seeds']) == 3
    sasrec = rows['SASRec (ours)']
    assert sasrec['ndcg@10'] == pytest.approx(np.mean(sasrec['ndcg@10 of seeds']), abs=1e-5)
    assert len(set(sasrec['ndcg@10 of seeds'])) > 1 and sasrec['beside']['peer'] == 'popular (peer)'
