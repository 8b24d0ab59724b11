"""Layers of other projects: equal outputs in ours."""

import re

import pytest
import torch
from helpers import third_party_networks
from helpers.third_party_networks import LucidKernel, SKConv
from helpers.third_party_weights import TRUE, make_input, randomise
from helpers.tolerances import assert_close
from torch import nn

import sk_plugins  # noqa: F401 - registers the models
from sk_plugins.layers import SelectiveKernel
from sk_plugins.weights import CheckpointError, load_third_party, recognise_third_party

LAYERS = {
    'conv': (dict(), dict(groups=4, min_dim=8, select_bias=True)),
    'pppLang': (
        dict(**TRUE, conv_bias=True, reduce='linear', select='linear'),
        dict(groups=4, min_dim=8, select_bias=True, dilated=False, reduce_norm=False, reduce_act=False),
    ),
    'SKAttention': (
        dict(
            kernels=(1, 3, 5, 7), dilations=(1, 1, 1, 1), groups=1, named=True, conv_bias=True, reduce='linear',
            select='linear',
        ),
        dict(
            groups=1, min_dim=8, kernel_sizes=(1, 3, 5, 7), dilated=False, select_bias=True, reduce_norm=False,
            reduce_act=False,
        ),
    ),
    '32 groups': (dict(groups=16), dict(groups=16, min_dim=8, select_bias=True)),
}  # fmt: skip


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize(('kwargs', 'arguments'), LAYERS.values(), ids=LAYERS.keys())
def test_layers(kwargs, arguments, stride):
    torch.manual_seed(0)
    layer = randomise(SKConv(16, 8, stride=stride, **kwargs))
    found = recognise_third_party(layer.state_dict(), stride=stride)
    assert found.arguments == dict(in_channels=16, **arguments, **({'stride': 2} if stride == 2 else {}))
    model = found.build()
    assert type(model) is SelectiveKernel
    x = make_input(16, size=9)
    assert_close(model(x), layer(x), length=layer)


@pytest.mark.parametrize(('stride', 'groups'), [(1, 1), (2, 4)])
def test_lucids_layer(stride, groups):
    layer = randomise(LucidKernel(64, stride, groups))
    found = recognise_third_party(layer.state_dict(), stride=stride)
    assert found.origin == "lucid's SelectiveKernel layer"
    model = found.build()
    assert isinstance(model, SelectiveKernel)
    x = make_input(64, size=9)
    assert_close(model(x), layer(x), length=model)


@pytest.mark.parametrize(('reduce', 'reduce_act'), [('relu', False), ('linear', True), ('norm', False)])
def test_reduce_act_is_taken_as_told(reduce, reduce_act):
    torch.manual_seed(0)
    layer = randomise(SKConv(16, 8, **TRUE, reduce=reduce))
    x = make_input(16, size=9)
    told = load_third_party(layer.state_dict(), reduce_act=reduce_act)
    assert (told(x) - layer(x)).abs().max() > 1e-3
    if reduce == 'linear':
        layer.fc.register_forward_hook(lambda module, args, output: output.relu())
    else:
        layer.fc[-1] = nn.Identity()
    assert_close(told(x), layer(x), length=layer)


@pytest.mark.parametrize('dilations', [(1, 1), (1, 3)])
def test_dilations_are_taken_as_told(dilations):
    torch.manual_seed(0)
    layer = randomise(SKConv(16, 8, kernels=(3, 3), dilations=dilations))
    x = make_input(16, size=9)
    told = load_third_party(layer.state_dict(), dilations=dilations)
    assert_close(told(x), layer(x), length=layer)


def test_layer_with_other_input_channels():
    """No lineage has such a layer; its weights are ours, under theirs names."""
    torch.manual_seed(0)
    layer = randomise(SelectiveKernel(8, 16, groups=4, select_bias=True))
    weights = {}
    for name, tensor in layer.state_dict().items():
        name = re.sub(r'paths\.(\d)\.', r'convs.\1.', name)
        name = name.replace('attn.fc_reduce', 'fc.0').replace('attn.bn', 'fc.1')
        for m, part in enumerate(tensor.chunk(2)) if 'fc_select' in name else [(0, tensor)]:
            weights[name.replace('attn.fc_select', f'fcs.{m}')] = part
    x = make_input(8, size=9)
    assert_close(load_third_party(weights, in_channels=8)(x), layer(x), length=layer)
    with pytest.raises(CheckpointError, match='branch 0 has groups of 2 input channels, which do not divide in_chan'):
        load_third_party(weights, in_channels=9)


class PppLangUnit(nn.Module):
    """Its ``feas``: no ReLU after the first 1x1, and a BatchNorm after the SK convolution."""

    def __init__(self):
        super().__init__()
        layer = SKConv(16, 8, **TRUE, conv_bias=True, reduce='linear', select='linear')
        self.feas = nn.Sequential(
            nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), layer, nn.BatchNorm2d(16), nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32)
        )


def test_layers_of_a_network_that_does_not_fit():
    torch.manual_seed(0)
    network = randomise(nn.ModuleDict({'stage_1': nn.Sequential(PppLangUnit(), nn.ReLU(), PppLangUnit())}))
    weights = network.state_dict()
    with pytest.raises(CheckpointError, match=r"pppLang.*no ReLU after the first 1x1.*prefix='stage_1\.0\.feas\.2'"):
        load_third_party(weights)
    x = make_input(16, size=9)
    for unit in (0, 2):
        layer = load_third_party(weights, prefix=f'stage_1.{unit}.feas.2')
        assert_close(layer(x), network['stage_1'][unit].feas[2](x), length=layer)


def test_layer_has_no_name_in_a_registry():
    with pytest.raises(ValueError, match='a layer on its own has no name in a registry'):
        recognise_third_party(third_party_networks.SKConv(16, 8).state_dict()).timm_model()
