"Files of a recommender: equal scores after reading, whole files after a kill, and refusal of what others wrote"
import json
import os
import re
import resource
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from collab_deep.models.dot import DotProductBias
from collab_deep.models.nn import EmbeddingNN
from collab_deep.lists.recommend import predict_pairs, recommend
from collab_deep.use.save import load_recommender, save_recommender
from small_recommender import MODELS, recommender

PAIRS = [(1, 1), (1, 2), (2, 2), (2, 3)]

def small(**kwargs): return recommender(PAIRS, ['a', 'b'], ['x', 'y', 'z'], **kwargs)
def three(values): return st.lists(values, min_size=3, max_size=3, unique=True)

ids = st.one_of(three(st.integers(-2**60, 2**60)), three(st.text(st.characters(exclude_categories=['Cs']), min_size=1)),
                three(st.floats(allow_nan=False, allow_infinity=False)), st.just([1, '1', 2.5]))


@settings(max_examples=40, deadline=None)
@given(ids, ids, st.sampled_from(MODELS), st.integers(0, 99))
def test_scores_and_ids_are_equal_after_reading(tmp_path_factory, users, items, make, seed):
    if '#na#' in users + items: return
    rec = recommender(PAIRS, users, items, make, seed)
    random = torch.random.get_rng_state()
    again = load_recommender(save_recommender(rec, tmp_path_factory.mktemp('saved')))
    assert torch.equal(torch.random.get_rng_state(), random), 'reading draws from the random numbers of others'
    assert again.classes == rec.classes and [type(o) for o in again.items] == [type(o) for o in rec.items]
    pd.testing.assert_frame_equal(recommend(again, users, 9), recommend(rec, users, 9), check_exact=True)
    pairs = pd.DataFrame(dict(user=users, title=items), dtype=object)
    pd.testing.assert_series_equal(predict_pairs(again, pairs), predict_pairs(rec, pairs), check_exact=True)
    for a,b in zip(again.seen, rec.seen, strict=True): assert torch.equal(a, b)
    for counts in ('item_counts', 'user_counts'): assert torch.equal(getattr(again, counts), getattr(rec, counts))


def test_sizes_of_numpy_are_saved(tmp_path):
    def make(n_users, n_items):
        widths = np.int64(3), np.int8(2)
        return EmbeddingNN(np.int64(n_users), np.int32(n_items), widths, layers=[np.uint8(4)], std=np.float32(1))
    rec = small(make=make)
    again = load_recommender(save_recommender(rec, tmp_path))
    assert [tuple(o.weight.shape) for o in (again.model.users, again.model.items)] == [(3, 3), (4, 2)]
    pd.testing.assert_frame_equal(recommend(again, 'a', 9), recommend(rec, 'a', 9), check_exact=True)


def test_nothing_is_pickled_or_run(tmp_path):
    folder = save_recommender(small(), tmp_path/'a'/'b')
    assert sorted(o.suffix for o in folder.iterdir()) == ['.json', '.safetensors']
    assert json.loads((folder/'recommender.json').read_text())['user'] == dict(column='user', ids=['#na#', 'a', 'b'])


@pytest.mark.parametrize('odd', [(1, 2), pd.Timestamp('2020-01-01'), None])
def test_ids_that_json_cannot_hold(tmp_path, odd):
    text = r'user holds the id .*, a .*: JSON keeps numbers and text, so convert the column before training'
    with pytest.raises(TypeError, match=text):
        save_recommender(recommender(PAIRS, ['a', odd], ['x', 'y', 'z']), tmp_path/'new')
    assert not (tmp_path/'new').exists()


def test_a_model_of_ones_own(tmp_path, monkeypatch):
    class Mine(DotProductBias): pass
    folder = save_recommender(small(make=lambda u, i: Mine(u, i, 2)), tmp_path)
    assert isinstance(load_recommender(folder).model, Mine)
    monkeypatch.delitem(DotProductBias.registry, 'Mine')  # as in a process that has not defined it
    text = 'give its class, as in load_recommender(folder, models=[Mine])'
    with pytest.raises(ValueError, match=re.escape(text)): load_recommender(folder)
    assert isinstance(load_recommender(folder, models=[Mine]).model, Mine)


# --- what was not written by save ------------------------------------------------------------------------------------
def test_every_byte_counts(tmp_path):
    folder = save_recommender(small(), tmp_path)
    weights = next(folder.glob('*.safetensors'))
    for file in (weights, folder/'recommender.json'):
        good = file.read_bytes()
        for at in range(0, len(good), max(1, len(good)//25)):
            file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1:])
            with pytest.raises((ValueError, FileNotFoundError)): load_recommender(folder)
        for at in (0, 1, len(good)//2, len(good) - 1):
            file.write_bytes(good[:at])
            with pytest.raises(ValueError, match='is damaged'): load_recommender(folder)
        file.write_bytes(good)
    assert len(recommend(load_recommender(folder), 'a')) == 1


@pytest.mark.parametrize('text', ['[]', '3', '{}', '{"format": "other"}', 'null'])
def test_json_of_others(tmp_path, text):
    (tmp_path/'recommender.json').write_text(text)
    with pytest.raises(ValueError, match="was not written by collab_deep: it does not say 'collab_deep recommender'"):
        load_recommender(tmp_path)


def test_binary_in_place_of_json(tmp_path):
    (tmp_path/'recommender.json').write_bytes(b'\x80\x04\x95pickle\xff')
    with pytest.raises(ValueError, match='recommender.json is damaged'): load_recommender(tmp_path)


def test_no_folder_and_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match='holds no recommender.json: name a folder that'):
        load_recommender(tmp_path/'none')
    next(save_recommender(small(), tmp_path).glob('*.safetensors')).unlink()
    with pytest.raises(FileNotFoundError, match='is missing beside recommender.json'): load_recommender(tmp_path)


# --- interruptions ---------------------------------------------------------------------------------------------------
KILLED = """
import os, pathlib, signal, sys
sys.path.insert(0, {tests!r})
from small_recommender import recommender
from collab_deep.use.save import save_recommender
replace, left = pathlib.Path.replace, {left}
def killed(*args):
    global left
    if not left: os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return replace(*args)
pathlib.Path.replace = killed
save_recommender(recommender({pairs}, ['a', 'b'], ['x', 'y', 'z'], seed=1), {folder!r})
"""


@pytest.mark.parametrize('left', [0, 1])  # renamed: nothing, then the weights alone
def test_killed_while_writing(tmp_path, left):
    before = predict_pairs(load_recommender(save_recommender(small(), tmp_path)), 'a', 'x')
    code = KILLED.format(tests=os.path.dirname(__file__), left=left, pairs=PAIRS, folder=str(tmp_path))
    assert subprocess.run([sys.executable, '-W', 'ignore', '-c', code]).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) > 2 and predict_pairs(load_recommender(tmp_path), 'a', 'x') == before
    assert list(tmp_path.glob('*.part')), 'the kill left nothing unfinished'
    after = predict_pairs(small(seed=2), 'a', 'x')
    assert after != before
    assert predict_pairs(load_recommender(save_recommender(small(seed=2), tmp_path)), 'a', 'x') == after
    assert len(list(tmp_path.iterdir())) == 2, 'what the kill left behind is gone'


def test_no_room(tmp_path):
    before = predict_pairs(load_recommender(save_recommender(small(), tmp_path)), 'a', 'x')
    files = sorted(tmp_path.iterdir())
    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(OSError): save_recommender(small(seed=1), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert sorted(tmp_path.iterdir()) == files and predict_pairs(load_recommender(tmp_path), 'a', 'x') == before
