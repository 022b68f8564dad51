"Layers that look at other items, models that remember, and hidden state by row; nothing is left behind"
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_clas_config
from fastai.text.models.core import get_language_model, get_text_classifier
from torch import nn
from torch.nn.utils import parametrizations

from paddy_multi.accumulate.batches import even_chunks, joined
from paddy_multi.accumulate.coupling import (coupling_text, is_known, mixing_layers, rows_of_state, scalar_adds_up,
                                             state_keepers, watch_state)
from paddy_multi.core.nested import copied, tensors_in

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
PICTURES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(2))


class Of(nn.Module):
    "A layer with a forward pass of its own"
    def __init__(self, f, **parts):
        super().__init__()
        self.f = f
        for name, part in parts.items(): setattr(self, name, part)

    def forward(self, *args, **kwargs): return self.f(self, *args, **kwargs)


class MinibatchStd(nn.Module):
    "As in the discriminator of StyleGAN, over groups of 4"
    def forward(self, x):
        spread = x.reshape(4, -1, *x.shape[1:]).var(0, unbiased=False).add(1e-8).sqrt().mean()
        return torch.cat([x, spread.expand(len(x), 1)], 1)


class Codebook(nn.Module):
    "Vectors that follow the inputs by a moving average, changed behind autograd's back as such code does"
    def __init__(self):
        super().__init__()
        self.register_buffer('codes', torch.randn(5, 3))

    def forward(self, x):
        nearest = torch.cdist(x, self.codes).argmin(1)
        chosen = self.codes[nearest]
        if self.training: self.codes.data.index_add_(0, nearest, .1*(x-chosen).detach())
        return x + (chosen-x).detach()


def state_of(model):
    held = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m))) for m in model.modules()]
    return held, flags, torch.get_rng_state()


def assert_untouched(model, before):
    after = state_of(model)
    assert after[0].keys() == before[0].keys() and all(torch.equal(after[0][k], v) for k, v in before[0].items())
    assert after[1] == before[1] and torch.equal(after[2], before[2])
    assert all(p.grad is None for p in model.parameters())


# --- layers that mix ------------------------------------------------------------------------------------------------
def attention_over_batch(): return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.)  # given [n, 4], it takes n for time


MIX = dict(
    evonorm=(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), timm.layers.EvoNorm2dB0(4)), PICTURES, ['1 (EvoNorm2dB0)']),
    functional_batch_norm=(
        lambda: nn.Sequential(nn.Linear(3, 4), Of(lambda m, x: F.batch_norm(x, None, None, training=True))), X,
        ['1 (Of)']),
    minibatch_std=(lambda: nn.Sequential(nn.Linear(3, 4), MinibatchStd()), X, ['1 (MinibatchStd)']),
    detached_mean=(lambda: nn.Sequential(Of(lambda m, x: x-x.detach().mean(0)), nn.Linear(3, 4)), X, ['0 (Of)']),
    largest_of_batch=(lambda: nn.Sequential(nn.Linear(3, 4), Of(lambda m, x: x/x.abs().max())), X, ['1 (Of)']),
    attention=(lambda: nn.Sequential(nn.Linear(3, 4), attention_over_batch()), X[:, None],
               None),
    words=(lambda: nn.Sequential(nn.Embedding(9, 4), Of(lambda m, x: x-x.mean(0))), torch.arange(6)[:, None],
           ['1 (Of)']),
    behind_a_zero=(lambda: nn.Sequential(Of(lambda m, x: m.lin(x)+0*m.norm(x), lin=nn.Linear(3, 3),
                                            norm=Of(lambda m, x: x-x.mean(0)))), X, None),
    in_the_model=(lambda: Of(lambda m, x: m.lin(x).softmax(0), lin=nn.Linear(3, 4)), X, ['model (Of)']),
    twice=(lambda: nn.Sequential(MinibatchStd(), nn.Linear(4, 4), nn.ReLU(inplace=True), MinibatchStd()), X,
           ['0 (MinibatchStd)', '3 (MinibatchStd)']),
    those_before=(lambda: nn.Sequential(nn.Linear(3, 4), Of(lambda m, x: x + torch.cat([x[:1]*0, x[:-1]]))), X,
                  ['1 (Of)']),
    those_behind=(lambda: nn.Sequential(nn.Linear(3, 4), Of(lambda m, x: x + torch.cat([x[1:], x[:1]*0]))), X,
                  ['1 (Of)']),
    running_sum=(lambda: Of(lambda m, x: m.lin(x.cumsum(0)), lin=nn.Linear(3, 5)), X[:, None], ['model (Of)']),
    mixed_with_a_random_other=(lambda: Of(lambda m, x: x + x[torch.randperm(len(x))]), X, ['model (Of)']),
    gru_along_time=(lambda: nn.Sequential(nn.Linear(3, 4), Of(lambda m, x: m.rnn(x)[0], rnn=nn.GRU(4, 4))),
                    torch.randn(7, 5, 3), ['1.rnn (GRU)']),
    lstm_along_time=(lambda: Of(lambda m, x: m.rnn(x)[0], rnn=nn.LSTM(3, 4, 2, bidirectional=True)),
                     torch.randn(20, 8, 3), ['rnn (LSTM)']),
    attention_along_time=(lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.), torch.randn(7, 3, 4),
                          ['self_attn (MultiheadAttention)']))


@pytest.mark.parametrize('name', MIX)
def test_layers_that_mix_are_named(name):
    make, x, expected = MIX[name]
    model = make()
    before = state_of(model)
    found = mixing_layers(model, (x,), len(x))
    assert found == expected if expected else found
    assert_untouched(model, before)


class Experts(nn.Module):
    "Each takes as many items as it has room for, those that want it most"
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(12, 2), nn.ModuleList([nn.Linear(12, 5) for _ in range(2)])

    def forward(self, x):
        wants, out = self.gate(x).softmax(1), x.new_zeros(len(x), 5)
        for k, expert in enumerate(self.experts):
            taken = wants[:, k].topk(max(1, len(x)//2))[1]
            out = out.index_add(0, taken, wants[taken, k:k+1]*expert(x[taken]))
        return out


@pytest.mark.parametrize('bs', [2, 4, 6, 8])
def test_experts_with_room_for_some_are_named(bs):
    "But for the few whose choice among the items tried is the same by chance"
    named = 0
    for seed in range(20):
        torch.manual_seed(seed)
        named += mixing_layers(Experts(), (torch.randn(16, 12),), 16, bs) == ['model (Experts)']
    assert named >= 17


@pytest.mark.parametrize('bs', [1, 2, 3, 4, 7, 8, 50])
@pytest.mark.parametrize('n', [2, 3, 4, 5, 8, 9, 12, 16, 17])
def test_a_batch_of_any_size_is_tried(n, bs):
    x = torch.randn(n, 5, 3)
    for f in lambda m, x: x-x.mean(0), lambda m, x: x.cumsum(0), lambda m, x: x.flip(0).cumsum(0).flip(0):
        assert mixing_layers(Of(f), (x,), n, bs) == ['model (Of)']
    assert mixing_layers(Of(lambda m, x: x-x.mean(1, keepdim=True)), (x,), n, bs) == []


def packed(m, x, lengths):
    rows = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    out, h = m.rnn(rows)
    return m.lin(nn.utils.rnn.pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])[0]), h[-1]


def last_state(m, x): return tensors_in(m.rnn(x)[1])[0][-1]
def its_own_time_first(m, x): return m.rnn(x.transpose(0, 1))[0].transpose(0, 1)


@pytest.mark.parametrize('bs', [1, 2, 4, 6, 8])
@pytest.mark.parametrize('kind', [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers_that_take_items_first_do_not_mix(kind, bs):
    "With as many steps, layers and directions as items are tried, too; the first steps are padding"
    for time, layers, both in (2, 1, True), (4, 2, True), (8, 4, True), (8, 8, False), (5, 2, False):
        x = torch.randn(16, time, 3)
        x[:, :time//2] = 0
        options = dict(num_layers=layers, bidirectional=both)
        first, second = kind(3, 4, batch_first=True, **options), kind(3, 4, **options)
        lengths = torch.arange(16) % time + 1
        assert mixing_layers(Of(packed, rnn=first, lin=nn.Linear(4+4*both, 2)), (x, lengths), 16, bs) == []
        models = [Of(f, rnn=first) for f in (lambda m, x: m.rnn(x)[0], last_state)]
        for model in *models, Of(its_own_time_first, rnn=second):
            assert mixing_layers(model, (x,), 16, bs) == []


def lstm(layers=1): return Of(lambda m, x: m.rnn(x)[0], rnn=nn.LSTM(3, 4, layers, bidirectional=True, batch_first=True))


ALONE = dict(
    batch_norm=(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(.5)), (X,)),
    batch_norm_without_statistics=(lambda: nn.BatchNorm1d(3, track_running_stats=False), (X,)),
    other_norms=(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.ReLU(True)),
                 (PICTURES,)),
    two_directions=(lambda: lstm(), (X[:, None],)), eight_of_layers_and_directions=(lambda: lstm(4), (X[:, None],)),
    attention=(lambda: nn.TransformerEncoderLayer(3, 1, 8, batch_first=True), (X[:, None],)),
    time_first_inside=(lambda: Of(lambda m, x: m.t(x.transpose(0, 1)).transpose(0, 1),
                                  t=nn.TransformerEncoderLayer(3, 1, 8)), (X[:, None].repeat(1, 8, 1),)),
    shared=(lambda: Of(lambda m, x, c: x*c.sum()), (X, torch.ones(7, 2))),
    dropout_in_forward=(lambda: Of(lambda m, x: F.dropout(x, .5)), (X,)),
    embedding=(lambda: nn.Embedding(9, 4), (torch.arange(6),)),
    dicts=(lambda: Of(lambda m, o: m.lin(o['x']), lin=nn.Linear(3, 4)), ({'x': X, 'c': torch.ones(7)},)),
    lists=(lambda: Of(lambda m, xs: m.lin(torch.stack([o.mean(0) for o in xs])), lin=nn.Linear(3, 4)),
           ([torch.randn(i+2, 3) for i in range(6)],)),
    resnet=(lambda: timm.create_model('test_resnet', pretrained=False), (PICTURES,)),
    vit=(lambda: timm.create_model('test_vit', pretrained=False, img_size=32), (PICTURES,)))


@pytest.mark.parametrize('name', ALONE)
def test_layers_that_do_not_mix_are_not(name):
    make, xb = ALONE[name]
    model = make()
    before = state_of(model)
    assert mixing_layers(model, xb, 6) == []
    assert_untouched(model, before)


def test_texts_of_other_lengths_do_not_mix():
    config = {**awd_lstm_clas_config, 'emb_sz': 6, 'n_hid': 8, 'n_layers': 2}
    model = get_text_classifier(AWD_LSTM, 20, 2, seq_len=4, config=config)
    model.reset()
    texts = torch.randint(2, 20, (6, 10))
    for i in range(6): texts[i, 10-i:] = 1  # padding
    assert mixing_layers(model, (texts,), 6) == []


def test_where_nothing_can_be_tried_the_known_are_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), timm.layers.EvoNorm2dB0(4))
    assert mixing_layers(model, (PICTURES[:2],), 2) == ['1 (EvoNorm2dB0)']
    assert mixing_layers(model, (PICTURES[:1].repeat(6, 1, 1, 1),), 6) == ['1 (EvoNorm2dB0)']  # all items are one
    assert mixing_layers(model.eval(), (PICTURES[:2],), 2) == []  # with statistics that stand still

    def fails(m, x): raise KeyError
    assert mixing_layers(Of(fails), (X,), 6) == []


@pytest.mark.filterwarnings('ignore:.*torch.jit')
def test_a_script_is_not_tried():
    model = torch.jit.script(nn.Linear(3, 2))
    before = model(X)
    assert mixing_layers(model, (X,), 6) == []
    assert torch.equal(model(X), before)


def test_a_compiled_model_is_tried_as_it_was():
    model = torch.compile(nn.Sequential(nn.Linear(3, 4), Of(lambda m, x: x-x.mean(0))), backend='eager')
    assert mixing_layers(model, (X,), 6) == ['1 (Of)']
    assert [*model.state_dict()] == ['_orig_mod.0.weight', '_orig_mod.0.bias']


def test_a_trial_inside_of_autocast_leaves_no_weights_without_a_graph():
    model = nn.Linear(3, 4)
    with torch.autocast('cpu', torch.bfloat16):
        assert mixing_layers(model, (X,), 6) == [] and scalar_adds_up(model, (X,), 6)
        model(X).float().sum().backward()
    assert model.weight.grad.any()


# --- models that remember -------------------------------------------------------------------------------------------
def recurrent(keep):
    def forward(m, x):
        out, h = m.rnn(x, m.h.detach() if m.h is not None else None)
        m.h = keep(h)
        return out
    return Of(forward, rnn=nn.GRU(3, 4, batch_first=True), h=None)


def counting(m, x):
    m.calls += 1
    return x


def noting(m, x):
    m.seen, m.maps, m.size = x.detach(), [x], x.shape[0]
    return x


def spectral():
    "With weights that the power iteration has not met yet"
    layer = parametrizations.spectral_norm(nn.Linear(3, 4))
    nn.init.normal_(layer.parametrizations.weight.original)
    return layer


STATE = dict(
    recurrent=(lambda: recurrent(torch.Tensor.detach), X[:, None], ['h']),
    recurrent_with_its_graph=(lambda: recurrent(lambda h: h), X[:, None], ['h']),
    codebook=(Codebook, X, ['codes']),
    spectral_norm=(spectral, X,
                   ['parametrizations.weight.0._u', 'parametrizations.weight.0._v']),
    old_spectral_norm=(lambda: nn.utils.spectral_norm(nn.Linear(3, 4)), X, ['weight_u', 'weight_v']),
    steps=(lambda: nn.Sequential(nn.Linear(3, 4), Of(counting, calls=nn.Buffer(torch.tensor(0)))), X, ['1.calls']),
    steps_in_python=(lambda: nn.Sequential(nn.Linear(3, 4), Of(counting, calls=0)), X, ['1.calls']),
    running_statistics=(lambda: nn.InstanceNorm1d(3, track_running_stats=True), X[..., None].repeat(1, 1, 4),
                        ['running_mean', 'running_var']),
    notes=(lambda: Of(noting, seen=None, maps=[], size=0), X, []),
    batch_norm=(lambda: nn.BatchNorm1d(3), X, []),
    weight_norm=(lambda: parametrizations.weight_norm(nn.Linear(3, 4)), X, []),
    language_model=(lambda: get_language_model(AWD_LSTM, 20).train(), torch.randint(2, 20, (4, 3)), []))


@pytest.mark.filterwarnings('ignore:.*spectral_norm', 'ignore:.*weight_norm')
@pytest.mark.parametrize('name', STATE)
def test_what_a_model_remembers_is_named(name):
    make, x, expected = STATE[name]
    model = make()
    if hasattr(model, 'reset'): model.reset()
    torch.manual_seed(0)
    with watch_state(model, (x,)) as state:
        model(x)
        before = state_of(model)
        attributes = copied(vars(model).get('h'))
    assert state.changed == expected
    assert_untouched(model, before)
    assert all(map(torch.equal, tensors_in(attributes), tensors_in(vars(model).get('h'))))


def test_a_chunk_of_another_size_is_no_trial():
    "Then all attributes that may be read again are named"
    model = recurrent(torch.Tensor.detach)
    with watch_state(model, (X[:, None],)) as state: model(X[:4, None])
    assert state.changed == ['h']


def test_names_of_a_compiled_model_are_its_own():
    model = torch.compile(nn.Sequential(nn.Linear(3, 3), Codebook()), backend='eager')
    with watch_state(model, (X,)) as state: model(X)
    assert state.changed == ['1.codes']


# --- a loss of the model's own --------------------------------------------------------------------------------------
@pytest.mark.parametrize('scalar, adds_up', [
    (lambda x: x.square().mean(), True), (lambda x: x.mean()+1., True), (lambda x: x.sum(), False),
    (lambda x: x.std(0).mean(), False), (lambda x: x.pow(3).sum()/x.square().sum(), False)],
    ids=['mean', 'mean and a constant', 'sum', 'spread', 'weighted mean'])
def test_scalars_that_are_means_over_items(scalar, adds_up):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(.5), Of(lambda m, x: (x, {'loss': scalar(x)})))
    before = state_of(model)
    assert scalar_adds_up(model, (X,), 6) is adds_up
    assert_untouched(model, before)


def test_scalars_in_half_precision():
    model = nn.Sequential(nn.Linear(3, 4), Of(lambda m, x: x.square().mean())).bfloat16()
    assert scalar_adds_up(model, (X.bfloat16(),), 6)


def test_texts():
    assert coupling_text([], []) == coupling_text([], [], True) == ''
    text = coupling_text([f'{i} (A)' for i in range(6)], ['h'], False)
    assert text.startswith(
        'Updates in chunks are not those of whole batches. Layers that look at other items see those of a chunk only: '
        '0 (A), 1 (A), 2 (A), 3 (A) and 2 more. Buffers and attributes that the model keeps change once a chunk: h. '
        'A scalar that the model gives, such as its own loss, is not the mean over the items. Ways out: ')


def test_ways_out_fit_what_was_found():
    own = "whole batches, or a loss of the outputs instead of the model's own"
    assert coupling_text([], [], False).endswith(f'Ways out: {own}')
    assert 'GroupNorm' in coupling_text(['a'], [], False) and own in coupling_text(['a'], [], False)
    assert 'GroupNorm' not in coupling_text([], ['h']) and 'no state' in coupling_text([], ['h'])
    assert 'time' in coupling_text(['rnn (GRU)'], []) and 'no state' not in coupling_text(['rnn (GRU)'], [])


@pytest.mark.parametrize('bs', [1, 2, 8])
def test_trials_of_a_single_item_do_not_warn(bs):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model = Of(lambda m, x: (x, x.std(0).mean()))
        assert not scalar_adds_up(model, (X,), 6, bs)
        mixing_layers(model, (X,), 6, bs)


# --- layers that are known ------------------------------------------------------------------------------------------
class Own(nn.Linear): "A class of one's own"


def with_forward(m):
    m.forward = lambda x: x-x.mean(0)
    return m


def hooked(m, register='register_forward_hook'):
    getattr(m, register)(lambda *_: None)
    return m


UNKNOWN = dict(
    own_class=lambda: Own(3, 4), own_forward=lambda: with_forward(nn.Linear(3, 4)),
    hook=lambda: hooked(nn.Linear(3, 4)),
    pre_hook=lambda: hooked(nn.ReLU(), 'register_forward_pre_hook'), flat_items=lambda: nn.Flatten(0),
    items_apart=lambda: nn.Unflatten(0, (2, 3)), recurrent=lambda: nn.GRU(3, 4),
    attention=lambda: nn.MultiheadAttention(4, 2), softmax=lambda: nn.Softmax(0),
    own_container=lambda: Of(lambda m, x: x-x.mean(0), lin=nn.Linear(3, 4)),
    spectral=lambda: nn.utils.spectral_norm(nn.Linear(3, 4)),
    parametrized=lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)))


@pytest.mark.parametrize('name', UNKNOWN)
def test_a_stack_with_one_layer_that_is_not_known_is_tried(name):
    assert not is_known(nn.Sequential(nn.Linear(6, 3), UNKNOWN[name]()))


def test_a_stack_of_known_layers_is_not_tried():
    runs = []
    class Stack(nn.Sequential): pass
    model = Stack(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
                  nn.Flatten(), Stack(nn.Dropout(.5), nn.LayerNorm(36), nn.Linear(36, 2)))
    assert is_known(model) and is_known(torch.compile(model)._orig_mod)
    known, conv = [], model[1]
    conv._conv_forward = lambda *args: runs.append(1) or type(conv)._conv_forward(conv, *args)
    assert mixing_layers(model, (torch.randn(6, 64),), 6) == known and not runs
    Stack.forward = lambda self, x: nn.Sequential.forward(self, x)
    assert not is_known(model) and mixing_layers(model, (torch.randn(6, 64),), 6) == [] and runs


# --- hidden state by row --------------------------------------------------------------------------------------------
@pytest.mark.parametrize('bidir', [False, True])
@pytest.mark.parametrize('bs', [1, 3, 8])
def test_chunks_read_on_where_their_rows_stopped(bs, bidir):
    def make():
        torch.manual_seed(0)
        model = AWD_LSTM(20, 6, 8, 2, hidden_p=0., input_p=0., embed_p=0., weight_p=1e-15, bidir=bidir).double()
        model.reset()
        return model
    whole, chunked = make(), make()
    for n in (8, 8, 5, 7, 8):
        text, outs, rows = torch.randint(2, 20, (n, 4)), [], rows_of_state(state_keepers(chunked), n)
        for items in even_chunks(n, bs):
            rows.show(items)
            outs.append(chunked(text[items]))
            rows.keep(items)
        rows.whole()
        expected = whole(text)
        again = joined(outs, [o.stop-o.start for o in even_chunks(n, bs)])
        assert torch.allclose(again, expected, rtol=1e-12, atol=1e-15)
        assert whole.bs == chunked.bs == n
        for a, b in zip(tensors_in(whole.hidden), tensors_in(chunked.hidden)):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-15)


def test_models_without_rows_are_left_alone():
    model = recurrent(torch.Tensor.detach)
    before = state_of(model)
    rows = rows_of_state(state_keepers(model), 6)
    rows.show(slice(0, 3))
    rows.keep(slice(0, 3))
    rows.whole()
    assert_untouched(model, before)


def test_nothing_here_warns():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        mixing_layers(nn.Linear(3, 4), (X,), 6)
