"Models that read the order: what they see and what not, against code by hand, and what is refused"
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, tensor

from collab_deep.data.dataset import later_in_training
from collab_deep.data.loaders import RatingsDataLoaders, RatingsDL
from collab_deep.data.splits import LeaveLastSplitter
from collab_deep.lists.evaluate import evaluate_ranking
from collab_deep.lists.fold_in import fold_in
from collab_deep.lists.recommend import predict_pairs, recommend
from collab_deep.lists.recommender import as_recommender
from collab_deep.models.sequence import Block, SASRec, last_items
from collab_deep.models.sharded import shard_tables
from collab_deep.train.continued import partial_fit
from collab_deep.train.ensemble import collab_ensemble
from collab_deep.train.fit import blend, fit_model
from collab_deep.train.learner import collab_deep_learner
from collab_deep.train.sequence import NextItemLoss, windows_before
from collab_deep.use.save import load_recommender, save_recommender

SMALL = dict(n_factors=8, config=dict(max_len=6, dropout=0.))

@pytest.fixture(scope='module')
def rows():
    "Synthetic: everybody walks round a ring of 12 items from where they begin, so that the last item says the next"
    gen = np.random.default_rng(0)
    walks = [(u, (start + i) % 12 + 1, 100*u + i) for u in range(40) for start in [gen.integers(12)]
             for i in range(gen.integers(3, 10))]
    df = pd.DataFrame(walks, columns=['user', 'item', 'timestamp']).assign(rating=gen.integers(1, 6, len(walks)))
    return df.sample(frac=1, random_state=0).reset_index(drop=True)

def loaders(df, **kwargs):
    kwargs = dict(splits=LeaveLastSplitter(), time_name='timestamp', device='cpu') | kwargs
    return RatingsDataLoaders.from_df(df, **kwargs)

@pytest.fixture(scope='module')
def learn(rows): return fit_model(loaders(rows), 'sasrec', epochs=40, lr=1e-2, **SMALL)

def untrained(n_users=5, n_items=9, **kwargs):
    torch.manual_seed(0)
    return SASRec(n_users, n_items, **dict(n_factors=8, max_len=6) | kwargs).eval()

# --- what it sees ---------------------------------------------------------------------------------------------------
def test_it_learns_the_order(learn):
    "The next item of a ring follows from the last one alone, and a bag of what was taken hides which that is"
    assert evaluate_ranking(learn, k=1).value.recall > .95
    bag = fit_model(learn.dls, 'ease')
    assert evaluate_ranking(bag, k=1).value.recall < .8

def test_the_order_decides(learn):
    found = [recommend(learn, dict.fromkeys(o), k=1)['item'].item() for o in ([9, 6, 3], [3, 9, 6], [6, 3, 9])]
    assert found == [4, 7, 10]

@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=6), st.integers(0, 5), st.integers(1, 8))
def test_what_comes_later_changes_nothing_before(items, place, other):
    model, place = untrained(n_blocks=3), place % len(items)
    changed = [*items[:place], other, *items[place+1:]]
    with torch.no_grad(): a, b = model.states(tensor([items])), model.states(tensor([changed]))
    torch.testing.assert_close(a[:, :place+1], b[:, :place+1])          # place 0 is the start
    assert items == changed or not torch.equal(a[:, place+1], b[:, place+1])

@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(1, 8), max_size=6), min_size=1, max_size=5))
def test_neighbours_in_a_rectangle_change_nothing(histories):
    model, lengths = untrained(), tensor([len(o) for o in histories])
    longest = max(map(len, histories))
    windows = tensor([o + [0]*(longest - len(o)) for o in histories], dtype=torch.long).view(len(histories), -1)
    where = torch.arange(len(histories)), lengths
    with torch.no_grad():
        alone = torch.stack([model.solved_row(tensor(o, dtype=torch.long)) for o in histories])
        torch.testing.assert_close(model.last_states(windows, lengths), alone)
        torch.testing.assert_close(model.states_at(windows, lengths, where, together=2), alone)

def test_a_block_is_the_layer_of_pytorch_in_training_too():
    torch.manual_seed(0)
    block, theirs = Block(8, 2, 5, 0.), nn.TransformerEncoderLayer(8, 2, 8, 0., batch_first=True, norm_first=True)
    for mine, other in zip([block.attention.query_key_value, block.attention.out, block.first, block.second,
                            block.norm_1, block.norm_2],
                           [None, theirs.self_attn.out_proj, theirs.linear1, theirs.linear2, theirs.norm1,
                            theirs.norm2]):
        if other is not None: other.load_state_dict(mine.state_dict())
    theirs.self_attn.in_proj_weight.data.copy_(block.attention.query_key_value.weight)
    theirs.self_attn.in_proj_bias.data.copy_(block.attention.query_key_value.bias)
    x = torch.randn(3, 5, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    a, b = block(x), theirs(x, src_mask=mask, is_causal=True)
    torch.testing.assert_close(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    torch.testing.assert_close(block.first.weight.grad, theirs.linear1.weight.grad)

@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(1, 5))
def test_each_row_is_foretold_once_from_the_rows_before(counts, max_len):
    items = torch.arange(1, sum(counts) + 1)
    users = torch.repeat_interleave(torch.arange(len(counts)), tensor(counts))
    windows, lengths, (window, place) = windows_before(torch.stack([users, items], 1), max_len)
    assert len(window) == len(items) and lengths.max() <= max_len and (place <= lengths[window]).all()
    assert len(set(zip(window.tolist(), place.tolist()))) == len(items)
    first = 0
    for n in counts:
        for i in range(n):
            read = windows[window[first+i], :place[first+i]].tolist()
            before = items[first:first+i].tolist()
            assert read == before[len(before) - len(read):] and (read or not before)
        first += n

@settings(max_examples=50, deadline=None)
@given(st.data())
def test_histories_are_kept_in_order_of_time(data):
    n = data.draw(st.integers(2, 30))
    users, times = (data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)) for _ in 'ab')
    df = pd.DataFrame(dict(user=[9, 8, *users], item=[100, 101, *range(n)], t=[0, 0, *times]))
    dls = RatingsDataLoaders.from_df(df, time_name='t', device='cpu', seed=data.draw(st.integers(0, 5)),
                                     valid_pct=data.draw(st.sampled_from([0., .3])), implicit=True)
    kept = {dls.classes['item'][i] for i in dls.ratings_of('train')[0][:, 1]}
    starts, items = dls.sequences
    for row, user in enumerate(dls.classes['user']):
        own = df[(df.user == user) & df.item.isin(kept)].sort_values('t', kind='stable').item.tolist()
        assert [dls.classes['item'][i] for i in items[starts[row]:starts[row+1]]] == own

# --- the loss -------------------------------------------------------------------------------------------------------
def test_weights_say_how_much_a_row_is_foretold(rows):
    "By hand: two users, one row without weight, which is read and not foretold"
    df = pd.DataFrame(dict(user=[1, 1, 1, 2], item=[1, 2, 3, 2], timestamp=[1, 2, 3, 4], plays=[1., 0, 2, 5]))
    dls = loaders(df, splits=None, valid_pct=0, weight_name='plays', implicit=True)
    learn = collab_deep_learner(dls, model='sasrec', lr=0., **SMALL)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    model, losses = learn.model.eval(), []
    for items, taken, weight in (([], 1, 1.), ([1, 2], 3, 2.), ([], 2, 5.)):
        scores = model.scores_of(model.solved_row(tensor(items, dtype=torch.long))[None])[0, 1:]
        losses.append(-weight/2*scores.log_softmax(0)[taken-1])     # weights have a mean of 1, over all four rows
    assert learn.recorder.losses[0].item() == pytest.approx(sum(losses).item()/4, rel=1e-5)

def test_all_items_drawn_are_the_whole_softmax(rows):
    both = [fit_model(loaders(rows), 'sasrec', epochs=1, loss=NextItemLoss(sampled=o), **SMALL) for o in (None, 50)]
    for a, b in zip(*(o.model.parameters() for o in both)): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    drawn = fit_model(loaders(rows), 'sasrec', epochs=40, lr=1e-2, loss=NextItemLoss(sampled=4), **SMALL)
    assert evaluate_ranking(drawn, k=1).value.recall > .8

def test_other_models_are_as_without_times(rows):
    for name in ('softmax', 'dot', 'ease'):
        a, b = (fit_model(loaders(rows, time_name=o), name, epochs=1) for o in (None, 'timestamp'))
        for x, y in zip(a.model.parameters(), b.model.parameters()): assert torch.equal(x, y)

def test_the_same_seed_gives_the_same_bits(rows, learn):
    again = fit_model(loaders(rows), 'sasrec', epochs=40, lr=1e-2, **SMALL)
    for a, b in zip(learn.model.parameters(), again.model.parameters()): assert torch.equal(a, b)

# --- as any other model ---------------------------------------------------------------------------------------------
def test_saved_and_loaded_it_says_the_same_bits(learn, tmp_path):
    rec = load_recommender(save_recommender(learn, tmp_path))
    for user in (1, 7): pd.testing.assert_frame_equal(recommend(learn, user), recommend(rec, user))
    assert torch.equal(fold_in(learn, [3, 4]), fold_in(rec, [3, 4]))
    assert predict_pairs(learn, 1, 5) == predict_pairs(rec, 1, 5)

def test_exported_it_recommends(learn, tmp_path):
    from fastai.learner import load_learner
    learn.export(tmp_path/'learn.pkl')
    again = load_learner(tmp_path/'learn.pkl')
    pd.testing.assert_frame_equal(recommend(learn, 3, exclude_seen=False), recommend(again, 3, exclude_seen=False))

def test_someone_new_who_took_the_same_has_the_same_list(learn, rows):
    train = learn.dls.ratings_of('train')[0]
    starts, items = learn.dls.sequences
    taken = [learn.dls.classes['item'][i] for i in items[starts[3]:starts[4]]]
    mine = recommend(learn, learn.dls.classes['user'][3], k=5)
    new = recommend(learn, dict.fromkeys(taken), k=5)
    assert mine['item'].tolist() == new['item'].tolist() and np.allclose(mine.score, new.score, atol=1e-5)
    assert len(train) == len(items)

def test_without_a_history_it_is_what_comes_first(learn):
    rec = as_recommender(learn)
    with rec.model.scoring() as model: nobody = model.scores(tensor([0]))[0]
    torch.testing.assert_close(learn.model.scores_of(fold_in(learn, [])[None])[0].detach(), nobody)
    assert recommend(learn, {}, k=3)['item'].nunique() == 3

def test_more_training_reads_what_there_is_now(learn, rows):
    more = pd.DataFrame(dict(user=[1, 1, 99, 99], item=[11, 12, 5, 6], timestamp=[9000, 9001, 1, 2], rating=[3]*4))
    before = recommend(learn, 1, k=3)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        new = partial_fit(learn, more, epochs=1, duplicates='keep')
    pd.testing.assert_frame_equal(recommend(learn, 1, k=3), before)
    starts, items = new.dls.sequences
    row = list(new.dls.classes['user']).index(1)
    assert [new.dls.classes['item'][i] for i in items[starts[row]:starts[row+1]]][-2:] == [11, 12]
    assert recommend(new, 99, k=1)['item'].item() == 7
    with pytest.raises(ValueError, match=r"new rows lack \['timestamp'\]"):
        partial_fit(learn, more.drop(columns='timestamp'))

def test_it_starts_from_another_day(learn, rows):
    later = collab_deep_learner(loaders(rows[rows.user > 5]), model=learn)
    assert torch.equal(later.model.items.weight[1:], learn.model.items.weight[1:])
    assert evaluate_ranking(later, k=1).value.recall > .95
    rec = collab_deep_learner(loaders(rows), model=as_recommender(learn))
    assert rec.collab_loss.name == 'next_item'
    with pytest.raises(ValueError, match='have no times'):
        collab_deep_learner(loaders(rows, time_name=None), model=learn)

def test_in_blends_and_ensembles(learn, rows, tmp_path):
    both = blend([learn, fit_model(learn.dls, 'ease')])
    rec = load_recommender(save_recommender(both, tmp_path))
    pd.testing.assert_frame_equal(recommend(both, 2), recommend(rec, 2))
    assert fold_in(both, [1, 2, 3]).shape == fold_in(rec, [1, 2, 3]).shape
    with pytest.raises(TypeError, match='Blend reads the order'): recommend(both, {1, 2})
    two = collab_ensemble(loaders(rows), 2, n=2, model='sasrec', **SMALL)
    expected = torch.stack([m.scores(tensor([1, 2])) for m in two.model.members]).mean(0)
    torch.testing.assert_close(two.model.scores(tensor([1, 2])), expected)
    with pytest.raises(ValueError, match='of models that were trained apart'), two.no_bar(): two.fit(1)

# --- what is refused ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('times, error, words', [
    ([1, None, 3], ValueError, '1 rows have no timestamp, the first is row 1'),
    (['1', '2', '3'], TypeError, 'timestamp should hold numbers or times'),
    ([float('nan')]*3, ValueError, '3 rows have no timestamp')])
def test_times_without_an_order_are_refused(times, error, words):
    df = pd.DataFrame(dict(user=[1, 1, 2], item=[1, 2, 1], timestamp=times))
    with pytest.raises(error, match=words): RatingsDataLoaders.from_df(df, implicit=True, time_name='timestamp')

@pytest.mark.parametrize('kwargs, words', [
    (dict(n_factors=7), 'the 2 heads share the factors evenly, found 7'), (dict(max_len=0), 'max_len is a positive'),
    (dict(n_blocks=1.5), 'n_blocks is a positive integer, found 1.5'), (dict(dropout=1.), 'found 1.0')])
def test_sizes(kwargs, words):
    with pytest.raises(ValueError, match=words): untrained(**kwargs)

def test_what_does_not_go_together(rows, learn):
    dls = loaders(rows)
    with pytest.raises(ValueError, match='would let it see what it is to foretell'):
        collab_deep_learner(dls, model=untrained(dls.n_users, dls.n_items), loss='bpr')
    with pytest.raises(ValueError, match='for models that read the order of rows'):
        collab_deep_learner(dls, model='dot', loss=NextItemLoss())
    with pytest.raises(ValueError, match='the rows have no times'): fit_model(loaders(rows, time_name=None), 'sasrec')
    with pytest.raises(ValueError, match='a ranking has no range'): fit_model(dls, 'sasrec', y_range=(0, 6))
    with pytest.raises(ValueError, match="'layers'"): fit_model(dls, 'sasrec', layers=[3])
    with pytest.raises(TypeError, match='a set has none'): fold_in(learn, {1, 2})
    with pytest.raises(ValueError, match='has no ratings to compare with'): fold_in(learn, {1: 5., 2: 3.})
    with pytest.raises(TypeError, match='train it in one process'): shard_tables(untrained())

def test_a_loader_that_cuts_users_is_refused(rows):
    learn = collab_deep_learner(loaders(rows), model='sasrec', **SMALL)
    with pytest.raises(ValueError, match='train this model in one process'): learn.dls.train.batch_sizes(10, 2)
    learn.dls.loaders[0] = RatingsDL(learn.dls.train.dataset, bs=7, device='cpu')
    with pytest.raises(ValueError, match='a batch should hold all rows of each of its users'), learn.no_bar():
        learn.fit(1)

def test_two_items_and_long_histories():
    df = pd.DataFrame(dict(user=[1]*9 + [2]*2, item=[1, 2]*4 + [1, 1, 2], timestamp=range(11)))
    learn = fit_model(loaders(df, splits=None, valid_pct=0, implicit=True, duplicates='keep'), 'sasrec', epochs=2,
                      n_factors=4, config=dict(max_len=3))
    assert learn.model.starts.tolist() == [0, 0, 3, 5]
    assert recommend(learn, 1, exclude_seen=False, k=5)['item'].nunique() == 2
    assert last_items(learn.model.starts, learn.model.taken, tensor([1]), 2)[0].tolist() == [[2, 1]]

@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 6), st.booleans()), min_size=1, max_size=20), st.booleans())
def test_held_out_rows_that_came_earlier_are_counted(drawn, with_zone):
    "Times are nanoseconds apart, which no float would tell"
    drawn = [(1, 0, False), (2, 0, False)] + drawn
    held = [i for i,o in enumerate(drawn) if o[2]]
    kept = [i for i,o in enumerate(drawn) if not o[2]]
    when = pd.to_datetime([1_700_000_000_000_000_000 + o[1] for o in drawn], utc=with_zone)
    df = pd.DataFrame(dict(user=[o[0] for o in drawn], item=[i % 3 for i in range(len(drawn))], when=when))
    dls = loaders(df, time_name='when', implicit=True, duplicates='keep', splits=(kept, held))
    expected = sum(any(drawn[j][0] == drawn[i][0] and drawn[j][1] > drawn[i][1] for j in kept) for i in held)
    assert later_in_training(dls.train.dataset, dls.valid.dataset) == expected

def test_a_split_that_shows_what_came_later_is_warned_of(rows):
    at_random = loaders(rows, splits=None, seed=0)
    with pytest.warns(UserWarning, match=r'of 50 validation rows \d+ come before training rows of the same user'):
        collab_deep_learner(at_random, model='sasrec', **SMALL)
    with warnings.catch_warnings(action='error'): collab_deep_learner(loaders(rows), model='sasrec', **SMALL)

def test_a_learner_needs_no_import_but_its_own():
    code = ('from collab_deep.train.learner import collab_deep_learner\n'
            'from collab_deep.train.losses import as_loss\nprint(as_loss("next_item"), as_loss("sampled_softmax"))')
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert done.stdout.split() == ["'next_item'", "'sampled_softmax'"]
