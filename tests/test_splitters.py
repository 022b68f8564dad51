"Splits of random tables: nothing lost, shares kept, groups whole, the same in every process; inside a DataBlock"
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fastai.data.block import DataBlock, TransformBlock
from fastai.torch_core import set_seed
from hypothesis import given, settings, strategies as st

from paddy_multi.data.splitters import GroupSplitter, StratifiedSplitter


def first(o): return o[0]
def second(o): return o[1]
def third(o): return o[2]


# --- stratified -----------------------------------------------------------------------------------------------------
values = st.one_of(st.none(), st.just(float('nan')), st.just(''), st.sampled_from('abcde'), st.integers(-3, 3),
                   st.floats(allow_nan=False), st.booleans(), st.lists(st.sampled_from('xyz'), max_size=3))

@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(values, st.sampled_from('pq')), min_size=6, max_size=60), st.floats(.1, .9),
       st.integers(0, 99), st.integers(2, 6))
def test_any_labels_are_split_without_loss_and_the_same_again(items, share, seed, bins):
    splitter = StratifiedSplitter(first, second, valid_pct=share, seed=seed, bins=bins)
    try: train, valid = splitter(items)
    except ValueError as e:
        assert 'the same in all' in str(e) or 'on both sides' in str(e)
        return
    assert sorted([*train, *valid]) == list(range(len(items))) and train and valid
    assert all(type(i) is int for i in [*train, *valid])
    assert splitter(items) == (train, valid)

@settings(max_examples=60, deadline=None)
@given(st.integers(60, 300), st.integers(2, 6), st.integers(2, 4), st.floats(0, .4), st.integers(0, 999))
def test_shares_are_kept_in_every_column(n, k1, k2, missing, seed):
    "The rarest classes, which are handed out first, to within two items; the others gather what is left over"
    rng = np.random.default_rng(seed)
    shares = np.arange(1, k1+1)
    df = pd.DataFrame(dict(a=rng.choice([*'abcdef'[:k1]], n, p=shares/shares.sum()),
                           b=rng.choice([*'pqrs'[:k2]], n), c=rng.normal(size=n)))
    df.loc[rng.uniform(size=n) < missing, 'b'] = None
    train, valid = StratifiedSplitter('a', 'b', 'c', valid_pct=.25, seed=seed)(df)
    assert abs(len(valid) - n/4) <= .04*n + 2
    rarest = df.a.value_counts().idxmin()
    for name in 'ab':
        counts = df[name].fillna('gap').value_counts()
        found = df[name].fillna('gap').iloc[list(valid)].value_counts().reindex(counts.index, fill_value=0)
        assert (found - counts/4).abs().max() <= .05*n + 2
    if df.a.value_counts().min() < df.b.fillna('gap').value_counts().min() < n/4-5:
        assert abs((df.a.iloc[list(valid)] == rarest).sum() - (df.a == rarest).sum()/4) <= 2

@pytest.mark.parametrize('seed', range(5))
def test_nearer_to_the_shares_than_a_random_split(seed):
    rng = np.random.default_rng(seed)
    df = pd.DataFrame({name: rng.choice(10, 500, p=np.arange(1, 11)/55).astype(str) for name in 'abc'})
    tags = pd.get_dummies(df).to_numpy()
    def distance(valid): return np.abs(tags[valid].mean(0) - tags.mean(0)).mean()
    _, valid = StratifiedSplitter(*'abc', seed=seed)(df)
    assert distance(valid) < .5*np.mean([distance(rng.permutation(500)[:100]) for _ in range(20)])

def test_only_order_and_not_the_index_of_a_table_counts():
    rng = np.random.default_rng(1)
    df = pd.DataFrame(dict(a=rng.choice([*'abc'], 50), b=rng.choice([*'pq'], 50)))
    shown = df.set_index(rng.permutation(50)*10)
    split = StratifiedSplitter('a', 'b', seed=1)
    of_lists = StratifiedSplitter(first, second, seed=1)(df.values.tolist())
    of_rows = StratifiedSplitter(lambda o: o.a, lambda o: o.b, seed=1)(df)
    assert split(df) == split(shown) == of_lists == of_rows

@pytest.mark.parametrize('dtype', ['category', 'string', object])
def test_the_kind_of_column_does_not_count(dtype):
    a = [*'abcab']*10 + [None]*5
    plain = StratifiedSplitter(first, seed=1)([(o,) for o in a])
    assert StratifiedSplitter('a', seed=1)(pd.DataFrame(dict(a=pd.Series(a, dtype=dtype)))) == plain

def test_gaps_in_a_number_are_spread():
    df = pd.DataFrame(dict(age=pd.array([*range(45, 85)]*4 + [pd.NA]*40, dtype='Int64')))
    train, valid = StratifiedSplitter('age', seed=1)(df)
    assert 7 <= df.age.isna().iloc[list(valid)].sum() <= 9
    assert abs(df.age.iloc[list(valid)].dropna().astype(float).median() - 64.5) < 5

@pytest.mark.parametrize('labels', ['list', 'set'])
def test_every_process_splits_alike(labels):
    "Hashes of text, and so the order of a set, differ from process to process"
    code = f'''
import numpy as np
from paddy_multi.data.splitters import StratifiedSplitter
rng = np.random.default_rng(1)
items = [{labels}(str(o) for o in rng.choice([*"abcdefgh"], 3, replace=False)) for _ in range(60)]
print(StratifiedSplitter(lambda o: o, seed=1)(items)[1])'''
    def printed(hash_seed):
        env = os.environ | dict(PYTHONHASHSEED=str(hash_seed))
        return subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, check=True).stdout
    assert printed(0) == printed(1) and printed(0).startswith('[')

def test_without_a_seed_fastai_s_set_seed_governs():
    items = [(c,) for c in 'abab'*10]
    splits = []
    for seed in (1, 1, 2):
        set_seed(seed)
        splits.append(StratifiedSplitter(first)(items))
    assert splits[0] == splits[1] != splits[2]

def test_thousands_of_items_take_seconds():
    rng = np.random.default_rng(0)
    n = 10_407
    df = pd.DataFrame(dict(label=rng.choice(10, n).astype(str), variety=rng.choice(10, n).astype(str),
                           age=rng.integers(45, 83, n)))
    train, valid = StratifiedSplitter('label', 'variety', 'age', seed=1)(df)
    assert abs(len(valid) - .2*n) <= 5

def test_a_label_that_fails_fails_as_itself():
    with pytest.raises(KeyError, match='nobody'): StratifiedSplitter(lambda o: {}[o])(['nobody', 'b'])


# --- groups ---------------------------------------------------------------------------------------------------------
group_names = st.one_of(st.integers(0, 5), st.sampled_from('abc'), st.tuples(st.integers(0, 2)))

@settings(max_examples=100, deadline=None)
@given(st.lists(group_names, min_size=4, max_size=60).filter(lambda o: len({*o}) > 1), st.floats(.05, .95),
       st.integers(0, 99))
def test_no_group_stands_on_both_sides(groups, share, seed):
    splitter = GroupSplitter(lambda i: groups[i], valid_pct=share, seed=seed)
    try: train, valid = splitter(range(len(groups)))
    except ValueError as e: return assert_says_why(e)
    assert sorted([*train, *valid]) == list(range(len(groups)))
    held = {groups[i] for i in valid}
    assert held and held < {*groups} and not held & {groups[i] for i in train}
    assert len(held) == int(np.ceil(share*len({*groups}))) and splitter(range(len(groups))) == (train, valid)

def assert_says_why(e): assert 'expected groups on both sides of the split' in str(e)

@pytest.mark.parametrize('gap', [None, np.nan, '', pd.NA, pd.NaT])
def test_an_item_without_a_group_is_named(gap):
    said = ('expected a group for each item, found 1 without, item 2 first: '
            'give each a group of its own, or leave them out')
    with pytest.raises(ValueError, match=said): GroupSplitter(second)([(0, 'a'), (1, 'b'), (2, gap)])


# --- refusals, and the place where splitters are used ---------------------------------------------------------------
@pytest.mark.parametrize('make', [StratifiedSplitter, GroupSplitter])
@pytest.mark.parametrize('share', [0, 1, -1, 1.5, float('nan')])
def test_a_share_that_is_none_is_refused_when_the_splitter_is_made(make, share):
    with pytest.raises(ValueError, match='valid_pct is the share of validation, between 0 and 1; found'):
        make('a', valid_pct=share)

@pytest.mark.parametrize('make', [StratifiedSplitter, GroupSplitter])
def test_what_is_no_label_is_refused_when_the_splitter_is_made(make):
    with pytest.raises(TypeError, match='expects the name of a column or a function of the item, found 7'): make(7)

@pytest.mark.parametrize('make', [StratifiedSplitter, GroupSplitter])
def test_a_column_of_files_is_refused(make):
    said = "'variety' names a column, and the items are no rows of a DataFrame but list: give a function"
    with pytest.raises(TypeError, match=said): make('variety')([Path('a')])
    with pytest.raises(ValueError, match=r"expected a column 'variety', found \['a'\]"):
        make('variety')(pd.DataFrame(dict(a=[1, 2])))

@pytest.mark.parametrize('splitter', [StratifiedSplitter('a', 'b', seed=1), GroupSplitter('g', seed=1)])
def test_a_data_block_takes_its_rows(splitter):
    rng = np.random.default_rng(1)
    df = pd.DataFrame(dict(a=rng.choice([*'abc'], 50), b=rng.choice([*'pq'], 50), g=np.repeat(np.arange(10), 5)))
    block = DataBlock((TransformBlock,), get_x=lambda o: o.a, splitter=splitter)
    dsets = block.datasets(df)
    train, valid = splitter(df)
    assert (dsets.train.items.index.tolist(), dsets.valid.items.index.tolist()) == (train, valid)
