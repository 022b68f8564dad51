"Thousands of damaged and edited folders of recommenders: each is refused in one way, or answers what can be answered"
import copy
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys

import pandas as pd
import pytest
import torch
from safetensors import torch as safetensors

from collab_deep.lists.recommend import predict_pairs, recommend
from collab_deep.models.ensemble import Ensemble
from collab_deep.models.factor import FactorModel
from collab_deep.use.explain import explain, similar_items
from collab_deep.use.save import load_recommender, save_recommender
from small_recommender import MODELS, recommender

USERS, ITEMS = [f'u{i}' for i in range(8)], ['a<b', 'b', 'c,"d"', 'é', 'e', 'f', 'g', 'h', 'i']
PAIRS = [(u, i) for u in range(1, 9) for i in range(1, 10) if (u*7 + i*3) % 4 == 0]
JSON = 'recommender.json'


def cold(n_users, n_items):
    "Knows two films by their features alone"
    model = FactorModel(n_users, n_items, 3, (0, 5.5), 3., n_item_features=2, cold_items=['new1', 'new2'], std=1)
    model.item_features.copy_(torch.randn(n_items, 2))
    model.cold_item_features.copy_(torch.randn(2, 2))
    return model


def listed(n_users, n_items):
    "Sums over lists of what was rated"
    model = FactorModel(n_users, n_items, 3, mean=3., n_seen=2, std=1)
    model.seen_ptr[2:], model.seen[:] = 2, torch.tensor([1, 3])
    model.seers_ptr[2:4], model.seers_ptr[4:], model.seers[:] = 1, 2, torch.tensor([1, 1])
    return model


def pair(n_users, n_items): return Ensemble.of([MODELS[1](n_users, n_items), MODELS[1](n_users, n_items)])

MAKE = dict(dot=MODELS[0], bias=MODELS[1], nn=MODELS[2], factor=MODELS[3], pair=pair, cold=cold, listed=listed)


def signed(said):
    "What anyone can do who knows the format"
    said = {key: value for key, value in said.items() if key != 'checksum'}
    try: text = json.dumps(said, sort_keys=True, ensure_ascii=False).encode()
    except (ValueError, TypeError): text = b''
    return said | dict(checksum=hashlib.sha256(text).hexdigest())


def as_bytes(said): return json.dumps(said, ensure_ascii=False).encode('utf-8', 'surrogatepass')


def with_weights(said, data):
    "The files of a folder whose checksums fit"
    digest = hashlib.sha256(data).hexdigest()
    return {JSON: as_bytes(signed(said | dict(weights=digest))), f'weights-{digest[:16]}.safetensors': data}


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "Files of each kind of recommender, and what it answers"
    res = {}
    for name, make in MAKE.items():
        folder = save_recommender(recommender(PAIRS, USERS, ITEMS, make, 3), tmp_path_factory.mktemp(name))
        files = {o.name: o.read_bytes() for o in folder.iterdir()}
        res[name] = files, recommend(load_recommender(folder), USERS, 9)
    return res


# --- bytes, without a fitting checksum ------------------------------------------------------------------------------
def spoil(r, data):
    "Bytes that are no longer what they were"
    data, at = bytearray(data), r.randrange(len(data))
    how = r.choice(['flip', 'cut', 'insert', 'delete', 'zero', 'twice', 'noise', 'mark', 'utf16', 'deep', 'length'])
    if how == 'flip': data[at] ^= 1 << r.randrange(8)
    elif how == 'cut': del data[at:]
    elif how == 'insert': data[at:at] = r.randbytes(r.choice([1, 2, 100]))
    elif how == 'delete': del data[at:at + r.choice([1, 2, 50])]
    elif how == 'zero': data[at:at + 8] = bytes(len(data[at:at + 8]))
    elif how == 'twice': data = data*2
    elif how == 'noise': data = r.randbytes(r.choice([0, 1, 8, 1000]))
    elif how == 'mark': data = b'\xef\xbb\xbf' + data
    elif how == 'utf16': data = bytes(data).decode('latin1').encode('utf-16')
    elif how == 'deep': data = b'['*r.choice([500, 5000, 100_000])
    elif how == 'length': data[:8] = struct.pack('<Q', r.choice([0, 1, 2**31, 2**63, 2**64 - 1]))
    return bytes(data)


def damaged(r, saved, name):
    files, other = dict(saved[name][0]), saved[r.choice([*MAKE])][0]
    target = r.choice([*files])
    how = r.random()
    if how < .8: files[target] = spoil(r, files[target])
    elif how < .85: del files[target]
    elif how < .9: files[JSON] = other[JSON]
    else: files[target] = r.choice([*other.values()])
    return files


# --- JSON with a fitting checksum ------------------------------------------------------------------------------------
def places(o, at=()):
    if at: yield at
    inside = o.items() if isinstance(o, dict) else enumerate(o[:12]) if isinstance(o, list) else ()
    for key, value in inside: yield from places(value, (*at, key))


def inner(o, at):
    for key in at: o = o[key]
    return o


ODD = [None, True, False, 0, -1, 1, 2, 3.5, 2**31, 2**63, 2**64, 10**6, 10**9, 10**12, -2**63, 1e308, float('nan'),
       float('inf'), '', 'x', 'u1', '../../../etc/passwd', '\x00', '\x1b[31m', '\u202e', '\ud800', 'a'*10**4, [], [1],
       [None], {}, {'a': 1}, [[]]*3, '__class__', 'DotProduct', 'EmbeddingNN', 'FactorModel', 'Ensemble', 'CollabModel']
SIZES = ['n_factors', 'n_users', 'n_items', 'n_seen', 'n_user_features', 'n_item_features', 'layers']


def edited(r, saved, name):
    files = dict(saved[name][0])
    said = json.loads(files[JSON])
    settings = said['model']['settings']
    if 'members' in settings: settings = settings['members'][0]['settings']
    ids = said[r.choice(['user', 'item'])]['ids']
    how = r.choice(['value']*5 + ['remove']*2 + ['add', 'twice', 'fewer', 'more', 'others', 'setting', 'setting',
                                                 'huge', 'members', 'swap'])
    at = r.choice([*places(said)])
    if how == 'value': inner(said, at[:-1])[at[-1]] = copy.deepcopy(r.choice(ODD))
    elif how == 'remove': del inner(said, at[:-1])[at[-1]]
    elif how == 'add':
        place = r.choice([said, said['model'], settings, said['user']])
        place[r.choice(['x', 'self', 'std'])] = r.choice(ODD)
    elif how == 'twice': ids[r.randrange(1, len(ids))] = ids[r.randrange(1, len(ids))]
    elif how == 'fewer': del ids[r.randrange(len(ids)):]
    elif how == 'more': ids += [f'z{i}' for i in range(r.choice([1, 5, 1000]))]
    elif how == 'others': ids[1:] = r.choice([[*range(len(ids)-1)], [True]*(len(ids)-1), [None]*(len(ids)-1)])
    elif how == 'setting': settings[r.choice([*settings])] = r.choice(ODD)
    elif how == 'huge':
        size = r.choice([o for o in SIZES if o in settings])
        large = r.choice([10**5, 10**7, 10**9, 10**10, 2**40])
        settings[size] = [large] if isinstance(settings[size], list) else large
    elif how == 'members':
        members = r.choice([[], [copy.deepcopy(said['model'])]*1000, [dict(kind='os')]])
        said['model']['settings']['members'] = members
    elif how == 'swap': said['user'], said['item'] = said['item'], said['user']
    files[JSON] = as_bytes(signed(said))
    return files


# --- weights with a fitting checksum ---------------------------------------------------------------------------------
def header_changed(r, data):
    size = struct.unpack('<Q', data[:8])[0]
    header = json.loads(data[8:8 + size])
    one = header[r.choice([o for o in header if o != '__metadata__'])]
    key, value = r.choice([('data_offsets', [0, 2**50]), ('data_offsets', [-8, 8]), ('data_offsets', [0, 4]),
                           ('shape', [2**40]), ('shape', [-1]), ('shape', [2**63, 2]), ('shape', [0]*50),
                           ('shape', ['x']), ('dtype', 'F8_E5M2'), ('dtype', 'XX'), ('dtype', 3), ('dtype', 'BF16')])
    one[key] = value
    text = json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + data[8 + size:]


def other_numbers(r, saved, name):
    files = saved[name][0]
    said, [data] = json.loads(files[JSON]), [o for key, o in files.items() if key != JSON]
    tensors = {key: o.clone() for key, o in safetensors.load(data).items()}
    key = r.choice([*tensors])
    how = r.choice(['number', 'number', 'larger', 'turned', 'type', 'drop', 'extra', 'entry', 'entry', 'start',
                    'counts', 'header', 'header', 'bytes'])
    if how == 'number':
        key = r.choice([o for o in tensors if tensors[o].is_floating_point() and tensors[o].numel()])
        tensors[key].view(-1)[r.randrange(tensors[key].numel())] = r.choice([float('nan'), float('inf'), 3e38])
    elif how == 'larger': tensors[key] = torch.cat([tensors[key]]*2) if tensors[key].ndim else tensors[key].repeat(2)
    elif how == 'turned': tensors[key] = tensors[key].T.contiguous() if tensors[key].ndim == 2 else tensors[key][None]
    elif how == 'type':
        tensors[key] = tensors[key].to(r.choice([torch.float64, torch.float16, torch.int32, torch.bool]))
    elif how == 'drop': del tensors[key]
    elif how == 'extra': tensors[r.choice(['model.x', 'data.x', 'x', '', 'model.', '../x'])] = torch.zeros(3)
    elif how in ('entry', 'start'):
        lists = [o for o in tensors if ('seen' in o or 'seers' in o) and tensors[o].numel()]
        key = r.choice([o for o in lists if ('start' in o or 'ptr' in o) == (how == 'start')])
        tensors[key][r.randrange(len(tensors[key]))] = r.choice([-1, 0, 1, 3, 10, 10**6, 2**31 - 1])
    elif how == 'counts': tensors[r.choice(['data.item_counts', 'data.user_counts'])].neg_()
    data = safetensors.save(tensors)
    if how == 'header': data = header_changed(r, data)
    if how == 'bytes': data = bytes(o ^ (r.random() < .002) for o in data)
    return with_weights(said, data)


# --- what becomes of them --------------------------------------------------------------------------------------------
def answers_or_refuses(folder):
    "Whether the folder is read; what is read answers with finite numbers, or says why not"
    try: rec = load_recommender(folder)
    except (ValueError, FileNotFoundError) as e:
        assert type(e) in (ValueError, FileNotFoundError) and 0 < len(str(e)) < 2000, e
        return None
    users, items = rec.users[1:], rec.items[1:]
    frame = pd.DataFrame({rec.user: users, rec.item: (items*9)[:len(users)]}, dtype=object)
    asked = [lambda: recommend(rec, users, 9), lambda: predict_pairs(rec, frame), lambda: similar_items(rec, items[0]),
             lambda: explain(rec, users[0], items[0])]
    for ask in asked:
        try: found = ask()
        except ValueError as e: assert 'did training diverge' in str(e), e
        except TypeError as e: assert 'has no factors' in str(e) or 'no sum of parts' in str(e), e
        else: assert pd.DataFrame(found).select_dtypes('number').map(lambda o: abs(o) < float('inf')).all(axis=None)
    return rec


def refused(saved, folder, how, n, seed):
    "How many of `n` folders that were changed in one way are refused"
    r, count = random.Random(seed), 0
    for _ in range(n):
        name = r.choice([*MAKE])
        files = how(r, saved, name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for file, data in files.items(): (folder/file).write_bytes(data)
        rec = answers_or_refuses(folder)
        count += rec is None
        if rec is not None and how is damaged and files[JSON] == saved[name][0][JSON]:
            pd.testing.assert_frame_equal(recommend(rec, USERS, 9), saved[name][1])
    return count


@pytest.mark.parametrize('how', [damaged, edited, other_numbers])
def test_some_changed_folders(saved, tmp_path, how): assert refused(saved, tmp_path/'case', how, 70, 0) > 30


@pytest.mark.slow
@pytest.mark.parametrize('how', [damaged, edited, other_numbers])
def test_thousands_of_changed_folders(saved, tmp_path, how):
    assert refused(saved, tmp_path/'case', how, 1100, 1) > 550


@pytest.mark.parametrize('name', MAKE)
def test_keys_in_another_order(saved, tmp_path, name):
    files, wanted = saved[name]
    for file, data in files.items(): (tmp_path/file).write_bytes(data)
    said = json.loads(files[JSON])
    for text in (json.dumps(said, sort_keys=True, indent=1), json.dumps(dict(reversed(said.items())))):
        (tmp_path/JSON).write_text(text)
        pd.testing.assert_frame_equal(recommend(load_recommender(tmp_path), USERS, 9), wanted)


def test_version_1(saved, tmp_path):
    files, wanted = saved['bias']
    said = json.loads(files[JSON])
    for file, data in files.items(): (tmp_path/file).write_bytes(data)
    sides = {said[o]['column']: said[o]['ids'] for o in ('user', 'item')}
    rest = {key: value for key, value in said.items() if key not in ('user', 'item')} | dict(version=1)
    for classes in (sides, dict(reversed(sides.items()))):
        (tmp_path/JSON).write_bytes(as_bytes(signed(rest | dict(classes=classes))))
        pd.testing.assert_frame_equal(recommend(load_recommender(tmp_path), USERS, 9), wanted)


HUGE = """
import resource, sys
from collab_deep.use.save import load_recommender
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try: load_recommender(sys.argv[1])
except ValueError: print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)//1024)
"""


@pytest.mark.parametrize('size', ['n_factors', pytest.param('n_users', marks=pytest.mark.slow)])
def test_a_small_file_asks_for_no_memory(saved, tmp_path, size):
    files = dict(saved['bias'][0])
    said = json.loads(files[JSON])
    said['model']['settings'][size] = 10**9
    files[JSON] = as_bytes(signed(said))
    for file, data in files.items(): (tmp_path/file).write_bytes(data)
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', HUGE, tmp_path], capture_output=True, text=True)
    assert int(done.stdout) < 50, done.stderr  # MB
    with pytest.raises(ValueError, match=f'{JSON}: the weights do not fit the settings'): load_recommender(tmp_path)


# --- several at once -------------------------------------------------------------------------------------------------
WRITER = """
import sys
sys.path.insert(0, sys.argv[3])
from small_recommender import recommender
from collab_deep.use.save import save_recommender
recs = [recommender([(1, 1), (2, 3)], ['a', 'b'], ['x', 'y', 'z'], seed=s) for s in range(3)]
for i in range(15): save_recommender(recs[(i + int(sys.argv[2])) % 3], sys.argv[1])
"""


@pytest.mark.slow
def test_three_processes_save_and_one_reads(tmp_path):
    recs = [recommender([(1, 1), (2, 3)], ['a', 'b'], ['x', 'y', 'z'], seed=s) for s in range(3)]
    wanted = [predict_pairs(o, 'a', 'y') for o in recs]
    save_recommender(recs[0], tmp_path)
    command = [sys.executable, '-W', 'ignore', '-c', WRITER, tmp_path]
    here = os.path.dirname(__file__)
    writers = [subprocess.Popen([*command, str(i), here], stderr=subprocess.PIPE) for i in range(3)]
    n = 0
    while any(o.poll() is None for o in writers):
        assert predict_pairs(load_recommender(tmp_path), 'a', 'y') in wanted
        n += 1
    assert [o.wait() for o in writers] == [0]*3, [o.stderr.read() for o in writers]
    assert n > 10 and len(list(tmp_path.iterdir())) == 2
    assert predict_pairs(load_recommender(tmp_path), 'a', 'y') in wanted
