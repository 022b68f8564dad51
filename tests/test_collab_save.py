"Files of a recommender: equal scores after reading, whole files after a kill, and refusal of what was not written by save"
import json
import os
import re
import resource
import signal
import subprocess
import sys

import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from collab_deep.models.chapter import DotProductBias
from collab_deep.lists.recommend import predict, recommend
from collab_deep.use.save import load, save
from small_recommender import MODELS, recommender

PAIRS = [(1, 1), (1, 2), (2, 2), (2, 3)]
small = lambda **kwargs: recommender(PAIRS, ['a', 'b'], ['x', 'y', 'z'], **kwargs)
ids = st.one_of(st.lists(st.integers(-2**60, 2**60), min_size=3, max_size=3, unique=True), st.lists(st.text(st.characters(exclude_categories=['Cs']), min_size=1), min_size=3, max_size=3, unique=True),
                st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=3, max_size=3, unique=True), st.just([1, '1', 2.5]))


@settings(max_examples=40, deadline=None)
@given(ids, ids, st.sampled_from(MODELS), st.integers(0, 99))
def test_scores_and_ids_are_equal_after_reading(tmp_path_factory, users, items, make, seed):
    if '#na#' in users + items: return
    rec = recommender(PAIRS, users, items, make, seed)
    random = torch.random.get_rng_state()
    again = load(save(rec, tmp_path_factory.mktemp('saved')))
    assert torch.equal(torch.random.get_rng_state(), random), 'reading draws from the random numbers of others'
    assert again.classes == rec.classes and [type(o) for o in again.items] == [type(o) for o in rec.items]
    pd.testing.assert_frame_equal(recommend(again, users, 9), recommend(rec, users, 9), check_exact=True)
    pairs = pd.DataFrame(dict(user=users, title=items), dtype=object)
    pd.testing.assert_series_equal(predict(again, pairs), predict(rec, pairs), check_exact=True)
    assert all(torch.equal(a, b) for a, b in zip((*again.seen, again.item_counts, again.user_counts), (*rec.seen, rec.item_counts, rec.user_counts)))


def test_nothing_is_pickled_or_run(tmp_path):
    folder = save(small(), tmp_path/'a'/'b')
    assert sorted(o.suffix for o in folder.iterdir()) == ['.json', '.safetensors']
    assert json.loads((folder/'recommender.json').read_text())['classes']['user'] == ['#na#', 'a', 'b']


@pytest.mark.parametrize('odd', [(1, 2), pd.Timestamp('2020-01-01'), None])
def test_ids_that_json_cannot_hold(tmp_path, odd):
    with pytest.raises(TypeError, match=r'user holds the id .*, a .*: JSON keeps numbers and text, so convert the column before training'):
        save(recommender(PAIRS, ['a', odd], ['x', 'y', 'z']), tmp_path/'new')
    assert not (tmp_path/'new').exists()


def test_a_model_of_ones_own(tmp_path):
    class Mine(DotProductBias): pass
    folder = save(small(make=lambda u, i: Mine(u, i, 2)), tmp_path)
    with pytest.raises(ValueError, match=re.escape('give its class, as in load(folder, models=[Mine])')): load(folder)
    assert isinstance(load(folder, models=[Mine]).model, Mine)


# --- what was not written by save ---------------------------------------------------------------------------------------
def test_every_byte_counts(tmp_path):
    folder = save(small(), tmp_path)
    weights = next(folder.glob('*.safetensors'))
    for file in (weights, folder/'recommender.json'):
        good = file.read_bytes()
        for at in range(0, len(good), max(1, len(good)//25)):
            file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1:])
            with pytest.raises((ValueError, FileNotFoundError)): load(folder)
        for at in (0, 1, len(good)//2, len(good) - 1):
            file.write_bytes(good[:at])
            with pytest.raises(ValueError, match='is damaged'): load(folder)
        file.write_bytes(good)
    assert len(recommend(load(folder), 'a')) == 1


@pytest.mark.parametrize('text', ['[]', '3', '{}', '{"format": "other"}', 'null'])
def test_json_of_others(tmp_path, text):
    (tmp_path/'recommender.json').write_text(text)
    with pytest.raises(ValueError, match="was not written by collab_deep: it does not say 'collab_deep recommender'"): load(tmp_path)


def test_binary_in_place_of_json(tmp_path):
    (tmp_path/'recommender.json').write_bytes(b'\x80\x04\x95pickle\xff')
    with pytest.raises(ValueError, match='recommender.json is damaged'): load(tmp_path)


def test_no_folder_and_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match='holds no recommender.json: name a folder that'): load(tmp_path/'none')
    next(save(small(), tmp_path).glob('*.safetensors')).unlink()
    with pytest.raises(FileNotFoundError, match='is missing beside recommender.json'): load(tmp_path)


# --- interruptions ------------------------------------------------------------------------------------------------------
KILLED = """
import os, pathlib, signal, sys
sys.path.insert(0, {tests!r})
from small_recommender import recommender
from collab_deep import save
replace, left = pathlib.Path.replace, {left}
def killed(*args):
    global left
    if not left: os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return replace(*args)
pathlib.Path.replace = killed
save.save(recommender({pairs}, ['a', 'b'], ['x', 'y', 'z'], seed=1), {folder!r})
"""


@pytest.mark.parametrize('left', [0, 1])  # renamed: nothing, then the weights alone
def test_killed_while_writing(tmp_path, left):
    before = predict(load(save(small(), tmp_path)), 'a', 'x')
    code = KILLED.format(tests=os.path.dirname(__file__), left=left, pairs=PAIRS, folder=str(tmp_path))
    assert subprocess.run([sys.executable, '-W', 'ignore', '-c', code]).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) > 2 and predict(load(tmp_path), 'a', 'x') == before
    after = predict(small(seed=2), 'a', 'x')
    assert after != before and predict(load(save(small(seed=2), tmp_path)), 'a', 'x') == after
    assert len([o for o in tmp_path.iterdir()]) == 2, 'what the kill left behind is gone'


def test_no_room(tmp_path):
    before = predict(load(save(small(), tmp_path)), 'a', 'x')
    files = sorted(tmp_path.iterdir())
    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(OSError): save(small(seed=1), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert sorted(tmp_path.iterdir()) == files and predict(load(tmp_path), 'a', 'x') == before
