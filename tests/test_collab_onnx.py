"Recommenders as ONNX: equal to the library in a process without torch, in the same order, or refused"
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from collab_deep.lists.recommend import predict_pairs, recommend
from collab_deep.models.base import CollabModel
from collab_deep.models.blend import Blend
from collab_deep.models.dot import DotProduct, DotProductBias
from collab_deep.models.ease import EASE
from collab_deep.models.ensemble import Ensemble
from collab_deep.models.factor import FactorModel
from collab_deep.models.ials import iALS
from collab_deep.models.liking import Interactions
from collab_deep.models.nn import EmbeddingNN
from collab_deep.models.sequence import SASRec
from collab_deep.use.onnx import check_equal, to_onnx
from collab_deep.use.save import load_recommender, save_recommender
from small_recommender import recommender

USERS, ITEMS = [f'u{i}' for i in range(1, 10)], [f'i{i}' for i in range(1, 30)]
SEEN = sorted({(u, 1 + (7*u + 3*j + j*j) % 29) for u in range(1, 9) for j in range(2*u)})  # the last user has none
STARS = {pair: float(1 + sum(pair) % 5) for pair in SEEN}
NEWCOMERS = [{'i3': 5., 'i9': 1., 'i20': 3.}, {'i1': 4.}]

# What a server is: all it may import are the standard library, NumPy and onnxruntime
SERVER = '''
import sys
for name in ('torch', 'fastai', 'collab_deep', 'paddy_multi', 'pandas', 'onnx', 'scipy'): sys.modules[name] = None
import json
from pathlib import Path
import numpy as np, onnxruntime
folder,asked = Path(sys.argv[1]),json.load(sys.stdin)
said = json.loads((folder/'ids.json').read_text(encoding='utf-8'))
ids,users = said['item']['ids'],{o: i for i,o in enumerate(said['user']['ids'])}
def session(name): return onnxruntime.InferenceSession(folder/name, providers=['CPUExecutionProvider'])
def named(scores, rows): return [(ids[i], float(s)) for s,i in zip(scores, rows) if s > -np.inf]
rows = [users.get(o, 0) for o in asked['users']]
together = session('lists.onnx').run(None, dict(users=np.array(rows)))
alone = [session('lists.onnx').run(None, dict(users=np.array([o]))) for o in rows]
pairs = np.array([(users.get(u, 0), ids.index(i) if i in ids else 0) for u,i in asked['pairs']])
res = dict(lists=[named(*o) for o in zip(*together)], alone=[named(o[0][0], o[1][0]) for o in alone],
           pairs=session('pairs.onnx').run(None, dict(users=pairs[:,0], items=pairs[:,1]))[0].tolist())
if said['newcomers']:
    def newcomer(o):
        inputs = dict(taken=np.array([ids.index(i) for i in o]), ratings=np.array([*o.values()], 'float32'))
        return named(*session('newcomers.onnx').run(None, {name: inputs[name] for name in said['newcomers']}))
    res['newcomers'] = [newcomer(o) for o in asked['newcomers']]
print(json.dumps(res))
'''


def served(folder, **asked):
    env = {name: o for name, o in os.environ.items() if name != 'PYTHONPATH'}
    ran = subprocess.run([sys.executable, '-c', SERVER, str(folder)], input=json.dumps(asked), env=env,
                         capture_output=True, text=True)
    assert not ran.returncode, ran.stderr
    return json.loads(ran.stdout)


def solved(cls, u, i, *args, **kwargs):
    model = cls(u, i, *args, **kwargs)
    model.solve(Interactions(torch.tensor(SEEN), torch.tensor([*STARS.values()]), u, i))
    return model


def filled(model):
    "The lists and features of a `FactorModel`, as `factor_model` gives them"
    n_users, n_items = model.n_users, model.n_items
    if model.has_lists:
        for ptr, ids, side, n in (('seen_ptr', 'seen', 0, n_users), ('seers_ptr', 'seers', 1, n_items)):
            pairs = sorted(SEEN, key=lambda o: (o[side], o[1-side]))
            getattr(model, ptr).copy_(torch.tensor([sum(o[side] < row for o in pairs) for row in range(n+1)]))
            getattr(model, ids).copy_(torch.tensor([o[1-side] for o in pairs]))
    for name, o in model.named_buffers():
        if name.endswith('features'): o.copy_(torch.rand(o.shape))
    return model


def factor(u, i, **kwargs): return filled(FactorModel(u, i, 3, std=1, **kwargs))
def ordered(u, i, max_len=5):
    model = SASRec(u, i, 4, max_len=max_len)
    starts = torch.tensor([sum(o[0] < row for o in SEEN) for row in range(u+1)])
    model.keep_sequences(starts, torch.tensor([o[1] for o in sorted(SEEN)]))
    return model
def both(u, i): return [solved(EASE, u, i, 5.), solved(iALS, u, i, 4)]

RANGE = dict(y_range=(0, 5.5))
QUICK = dict(
    dot_bias=lambda u, i: DotProductBias(u, i, 3, std=1, **RANGE),
    blend=lambda u, i: Blend.of(both(u, i), shares=[1, 2]))
MODELS = dict(
    dot=lambda u, i: DotProduct(u, i, 3, std=1), dot_range=lambda u, i: DotProduct(u, i, 3, std=1, **RANGE),
    bias=lambda u, i: DotProductBias(u, i, 3, std=1),
    bias_scaled=lambda u, i: DotProductBias(u, i, 3, std=1, y_scale=(50, 20)),
    nn=lambda u, i: EmbeddingNN(u, i, 3, layers=[4], std=1), nn_deep=lambda u, i: EmbeddingNN(
        u, i, (3, 5), layers=[6, 4], embed_p=.3, ps=.2, use_bn=False, std=1, **RANGE),
    factor=lambda u, i: factor(u, i, mean=3.), factor_lists=lambda u, i: factor(u, i, n_seen=len(SEEN), **RANGE),
    factor_features=lambda u, i: factor(u, i, n_seen=len(SEEN), n_user_features=2, n_item_features=4, mean=3.),
    factor_cold=lambda u, i: factor(u, i, n_user_features=2, n_item_features=4, cold_users=['cold'],
                                    cold_items=['new', 'newer'], **RANGE),
    ease=lambda u, i: solved(EASE, u, i, 5.), ease_taken=lambda u, i: solved(EASE, u, i, 5., strength=0),
    ials=lambda u, i: solved(iALS, u, i, 4), ials_wide=lambda u, i: solved(iALS, u, i, 40),
    ordered=ordered, ordered_long=lambda u, i: ordered(u, i, 50),
    blend_ordered=lambda u, i: Blend.of([ordered(u, i), solved(EASE, u, i, 5.)]),
    ensemble=lambda u, i: Ensemble.of([DotProduct(u, i, 3, std=1), EmbeddingNN(u, i, 3, layers=[4], std=1)]),
    ensemble_solved=lambda u, i: Ensemble.of(both(u, i)),
    ensemble_cold=lambda u, i: Ensemble.of([factor(u, i, n_item_features=2, cold_items=['new'], **RANGE)]*2),
    blend_mixed=lambda u, i: Blend.of([solved(EASE, u, i, 5.), DotProductBias(u, i, 3, std=1, **RANGE)]),
    blend_of_blend=lambda u, i: Blend.of([Blend.of(both(u, i)), solved(EASE, u, i, 50.)]))


def close(found, expected):
    assert len(found) == len(expected)
    np.testing.assert_allclose(found, expected, 0, 1e-5*max(1, np.abs(expected).max(initial=0)))


def same_lists(found, expected):
    "The same items and scores; in another order only where two scores are apart by rounding"
    for mine, theirs in zip(found, expected, strict=True):
        close([o for _, o in mine], theirs.score.to_numpy())
        scores = dict(zip(theirs['item'], theirs.score))
        for (item, _), other, score in zip(mine, theirs['item'], theirs.score, strict=True):
            assert item == other or abs(scores[item] - score) <= 1e-6*max(1, abs(score))


def check(rec, folder, k=25):
    rec.model.fill_unknown()
    rec.model.eval()
    to_onnx(rec, folder, k)
    users = [*USERS, *rec.model.cold[0]]
    pairs = [(u, i) for u in [*users, 'nobody'] for i in [*ITEMS[:7], *rec.model.cold[1], 'nothing']]
    found = served(folder, users=users, pairs=pairs, newcomers=NEWCOMERS)
    lists = [recommend(rec, o, k) for o in users]
    same_lists(found['lists'], lists)
    same_lists(found['alone'], lists)
    close(found['pairs'], [predict_pairs(rec, *o) for o in pairs])
    if 'newcomers' in found: same_lists(found['newcomers'], [recommend(rec, o, k) for o in NEWCOMERS])
    return found


@pytest.mark.filterwarnings('ignore:all ratings are')
@pytest.mark.parametrize('name', QUICK)
def test_served_without_torch(tmp_path, name):
    found = check(recommender(SEEN, USERS, ITEMS, QUICK[name]), tmp_path)
    assert ('newcomers' in found) == (name == 'blend')
    assert {len(o) for o in found['lists']} > {25}, 'some users have fewer than 25 items left'


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:all ratings are')
@pytest.mark.parametrize('name', MODELS)
def test_every_model_is_served_without_torch(tmp_path, name):
    found = check(recommender(SEEN, USERS, ITEMS, MODELS[name]), tmp_path)
    assert ('newcomers' in found) == name.startswith(('ease', 'ials', 'ensemble_solved', 'blend_of_blend'))


def test_every_model_of_the_registry_is_tried():
    ours = {name for name, o in CollabModel.registry.items() if o.__module__.startswith('collab_deep.')}
    tried = {type(make(len(USERS) + 1, len(ITEMS) + 1)).__name__ for make in [*QUICK.values(), *MODELS.values()]}
    assert ours - {'Histories', 'KeepsSequences'} == tried, 'these are bases without scores'


class Equal(DotProduct):
    "All items score the same"
    def scores_of(self, rows): return super().scores_of(rows)*0


@pytest.mark.slow
def test_equal_scores_have_the_same_order_and_what_was_there_is_replaced(tmp_path):
    check(recommender(SEEN, USERS, ITEMS, MODELS['ease']), tmp_path)
    assert (tmp_path/'newcomers.onnx').exists()
    rec = recommender(SEEN, USERS, ITEMS, lambda u, i: Equal(u, i, 3))
    to_onnx(rec, tmp_path, 50)
    left = [o for i, o in enumerate(ITEMS, 1) if (3, i) not in SEEN]
    [found] = served(tmp_path, users=['u3'], pairs=[('u3', 'i1')], newcomers=[])['lists']
    assert [o for o, _ in found] == left == recommend(rec, 'u3', 50)['item'].tolist()
    assert sorted(o.name for o in tmp_path.iterdir()) == ['ids.json', 'lists.onnx', 'pairs.onnx']


@pytest.mark.slow
def test_a_saved_recommender_is_written_like_the_one_that_was_saved(tmp_path):
    rec = recommender(SEEN, USERS, ITEMS, MODELS['factor_lists'])
    rec.model.fill_unknown()
    again = load_recommender(save_recommender(rec, tmp_path/'saved'))
    check(again, tmp_path/'onnx')
    asked = dict(users=USERS, pairs=[('u1', 'i1')], newcomers=[])
    same_lists(served(tmp_path/'onnx', **asked)['lists'], [recommend(rec, o, 25) for o in USERS])


class ByNumbers(DotProduct):
    def scores_of(self, rows):
        scores = super().scores_of(rows)
        return scores if scores.mean() > 0 else -scores


class Remembers(DotProduct):
    "Scores by a number that tracing freezes"
    calls = 0
    def scores_of(self, rows):
        Remembers.calls += 1
        return super().scores_of(rows) + Remembers.calls


@pytest.mark.parametrize('cls, error, words', [
    (ByNumbers, TypeError, 'ByNumbers cannot be written as ONNX, since its steps cannot be followed: '),
    (Remembers, ValueError, 'lists.onnx gives other scores than the recommender, off by 1')])
def test_a_model_that_cannot_be_followed_is_refused_and_nothing_is_written(tmp_path, cls, error, words):
    rec = recommender(SEEN, USERS, ITEMS, lambda u, i: cls(u, i, 3, std=1))
    with pytest.raises(error, match=words): to_onnx(rec, tmp_path/'new')
    assert not (tmp_path/'new').exists()


def test_numbers_that_are_not_finite_and_odd_ids_are_refused(tmp_path):
    rec = recommender(SEEN, USERS, ITEMS, MODELS['bias'])
    with torch.no_grad(): rec.model.items.weight[3] = np.nan
    with pytest.raises(ValueError, match='holds 3 numbers that are not finite'): to_onnx(rec, tmp_path)
    with pytest.raises(TypeError, match='user holds the id'):
        to_onnx(recommender(SEEN, [*USERS[:-1], (1, 2)], ITEMS, MODELS['bias']), tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize('found', [[1., 2.1], [1., -np.inf], [1., np.nan]])
def test_what_onnxruntime_gives_is_compared(found):
    with pytest.raises(ValueError, match='lists.onnx gives other scores'):
        check_equal('lists.onnx', np.array(found), torch.tensor([1., 2.]))
