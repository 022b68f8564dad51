"An index gives the lists of `recommend`, leaves out what was seen, and is refused beside another model"
import json

import numpy as np
import pandas as pd
import pytest
import torch

from collab_deep.lists.recommend import recommend
from collab_deep.models.blend import Blend
from collab_deep.models.dot import DotProduct, DotProductBias
from collab_deep.models.ease import EASE
from collab_deep.models.ensemble import Ensemble
from collab_deep.models.factor import FactorModel
from collab_deep.models.ials import iALS
from collab_deep.models.nn import EmbeddingNN
from collab_deep.use.index import load_index, save_index, search, to_index
from collab_deep.use.save import load_recommender, save_recommender
from small_recommender import recommender

USERS, ITEMS = [f'u{i}' for i in range(1, 5)], [f'i{i}' for i in range(1, 121)]
# The first has nothing, the second all but three, the last has most of the first half
SEEN = [(2, i) for i in range(1, 118)] + [(3, i) for i in range(5, 9)] + [(4, i) for i in range(1, 61) if i % 7]
RANGE = dict(y_range=(0, 5.5))
MODELS = dict(dot=lambda u, i: DotProduct(u, i, 8, std=1), dot_range=lambda u, i: DotProduct(u, i, 8, std=.4, **RANGE),
              bias=lambda u, i: DotProductBias(u, i, 8, std=.4, **RANGE), ials=lambda u, i: iALS(u, i, 8),
              factor=lambda u, i: with_biases(FactorModel(u, i, 8, mean=3., std=.4, **RANGE)),
              cold=lambda u, i: with_biases(FactorModel(u, i, 8, n_item_features=3, n_user_features=2, std=1,
                                                        cold_items=['new', 'newer'], cold_users=['cold'])))


def with_biases(model):
    for o in (model.users_bias, model.items_bias): torch.nn.init.normal_(o.weight)
    for name, o in model.named_buffers():
        if name.endswith('features'): o.copy_(torch.randn(o.shape))
    return model


def made(make, seed=0):
    rec = recommender(SEEN, USERS, ITEMS, make, seed)
    rec.model.fill_unknown()
    return rec


def same(found, expected):
    assert found['item'].tolist() == expected['item'].tolist()
    np.testing.assert_allclose(found.score, expected.score, 0, 1e-5*max(1, expected.score.abs().max()))


@pytest.mark.parametrize('name', MODELS)
def test_lists_are_those_of_recommend_where_the_index_sees_all(name):
    rec = made(MODELS[name])
    index = to_index(rec, ef=len(ITEMS))
    assert len(index) == len(ITEMS) + 2*(name == 'cold')
    for user in [*USERS, *rec.model.cold[0]]:
        for k in (1, 10, 500):
            for exclude_seen in (True, False):
                same(search(index, user, k, exclude_seen), recommend(rec, user, k, exclude_seen))


def test_a_small_ef_still_fills_lists_and_leaves_out_what_was_seen():
    rec = made(MODELS['bias'])
    index = to_index(rec, ef=1, links=2)
    for row, user in enumerate(USERS, 1):
        found = search(index, user, 10)
        left = set(ITEMS) - {f'i{i}' for u, i in SEEN if u == row}
        assert len(found) == min(10, len(left)) == len(set(found['item'])) and set(found['item']) <= left
        assert found.score.is_monotonic_decreasing


def test_equal_scores_are_in_the_order_of_the_items():
    rec = made(lambda u, i: DotProductBias(u, i, 4, std=0))
    same(search(to_index(rec, ef=200), 'u1', 120), recommend(rec, 'u1', 120))


class Mine(DotProduct):
    def scores_of(self, rows): return -super().scores_of(rows)


class Named(DotProduct): pass


@pytest.mark.parametrize('make', [
    lambda u, i: EmbeddingNN(u, i, 3, layers=[4]), lambda u, i: EASE(u, i, 5.), lambda u, i: Mine(u, i, 3),
    lambda u, i: Blend.of([DotProduct(u, i, 3)]), lambda u, i: Ensemble.of([DotProduct(u, i, 3)])])
def test_scores_that_are_no_products_are_refused(make):
    rec = made(make)
    words = f'an index finds .* scores of {type(rec.model).__name__} are none: use recommend'
    with pytest.raises(TypeError, match=words): to_index(rec)


def test_a_subclass_that_scores_alike_is_indexed():
    rec = made(lambda u, i: Named(u, i, 3, std=1))
    same(search(to_index(rec), 'u1'), recommend(rec, 'u1'))


def test_it_keeps_what_the_model_knew():
    rec = made(MODELS['factor'])
    index, expected = to_index(rec), recommend(rec, 'u3')
    with torch.no_grad():
        for o in rec.model.parameters(): o.neg_()
    same(search(index, 'u3'), expected)
    assert recommend(rec, 'u3')['item'].tolist() != expected['item'].tolist()


def test_it_is_read_beside_its_own_recommender_alone(tmp_path):
    rec = made(MODELS['bias'])
    index = to_index(rec)
    save_index(index, tmp_path/'index')
    again = load_index(tmp_path/'index', load_recommender(save_recommender(rec, tmp_path/'saved')))
    for user in USERS: pd.testing.assert_frame_equal(search(again, user), search(index, user), check_exact=True)
    others = made(MODELS['bias'], seed=1), made(MODELS['dot']), recommender(SEEN, USERS, ITEMS[::-1], MODELS['bias'])
    for other in others:
        with pytest.raises(ValueError, match='holds the index of other items or other factors'):
            load_index(tmp_path/'index', other)
    with torch.no_grad(): rec.model.items_bias.weight[7] += 1e-3
    with pytest.raises(ValueError, match='make it again with to_index'): load_index(tmp_path/'index', rec)


@pytest.mark.parametrize('file, text, words', [
    ('items.usearch', b'', 'items.usearch is damaged'), ('items.usearch', None, 'holds no items.usearch'),
    ('index.json', b'{', 'index.json is damaged'), ('index.json', b'[]', 'was not written by save_index'),
    ('index.json', None, 'holds no index.json'), ('index.json', b'{"format": 1}', 'was not written by save_index')])
def test_files_that_are_damaged_or_missing(tmp_path, file, text, words):
    rec = made(MODELS['dot'])
    save_index(to_index(rec), tmp_path)
    (tmp_path/file).unlink() if text is None else (tmp_path/file).write_bytes(text)
    with pytest.raises((ValueError, FileNotFoundError), match=words): load_index(tmp_path, rec)


def test_another_version_and_one_changed_byte(tmp_path):
    rec = made(MODELS['dot'])
    save_index(to_index(rec), tmp_path)
    data = bytearray((tmp_path/'items.usearch').read_bytes())
    data[len(data)//2] ^= 1
    (tmp_path/'items.usearch').write_bytes(data)
    with pytest.raises(ValueError, match='is damaged'): load_index(tmp_path, rec)
    said = json.loads((tmp_path/'index.json').read_text())
    (tmp_path/'index.json').write_text(json.dumps(said | dict(version=2)))
    with pytest.raises(ValueError, match='has version 2, and this reads 1'): load_index(tmp_path, rec)


@pytest.mark.parametrize('ef', [0, -1, 1.5, True, 'many', None])
def test_odd_ef(ef):
    with pytest.raises(ValueError, match='ef is how many items a search keeps in view, a positive integer; found'):
        to_index(made(MODELS['dot']), ef=ef)


def test_users_that_are_not_known_and_odd_lengths():
    index = to_index(made(MODELS['dot']))
    with pytest.raises(KeyError, match="user 'nobody' is not among the 4 in training"): search(index, 'nobody')
    with pytest.raises(ValueError, match='k is the length of a list'): search(index, 'u1', 0)


def test_numbers_that_are_not_finite_are_refused():
    rec = made(MODELS['dot'])
    with torch.no_grad(): rec.model.items.weight[3] = np.inf
    with pytest.raises(ValueError, match='numbers that are not finite'): to_index(rec)
