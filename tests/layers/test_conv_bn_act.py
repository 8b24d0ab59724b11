"""ConvBNAct: what it computes, however it computes it."""

import copy

import pytest
import torch
from norm_calls import count_norms
from randomised import randomise
from timm.models.resnet import downsample_avg, downsample_conv
from tolerances import assert_close
from torch import nn

from sk_plugins.layers import ConvBNAct
from sk_plugins.layers.conv_bn_act import shorten


def make(**kwargs):
    torch.manual_seed(0)
    return randomise(ConvBNAct(8, 12, **kwargs).double()).eval()


def make_input(size=32):
    return torch.randn(3, 8, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


VARIANTS = [
    dict(),
    dict(kernel_size=3, stride=2, groups=4),
    dict(bias=True),
    dict(apply_act=False),
    dict(apply_norm=False),
]


@pytest.mark.parametrize('kwargs', VARIANTS, ids=str)
def test_inference_folds_the_norm_on_the_fly(kwargs):
    layer, x = make(**kwargs), make_input()
    expected = layer.act(layer.bn(layer.conv(x)))
    assert count_norms(layer, x) == (type(layer.bn) is nn.BatchNorm2d)  # autograd is on
    before = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        assert_close(layer(x), expected, length=layer)
        assert count_norms(layer, x) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


@pytest.mark.parametrize(
    'change',
    [
        lambda layer: layer.train(),
        lambda layer: layer.bn.register_forward_hook(lambda module, inputs, output: None),
        lambda layer: layer.conv.register_forward_hook(lambda module, inputs, output: None),
        lambda layer: setattr(layer.bn, 'forward', layer.bn.forward),
    ],
    ids=['training', 'norm watched', 'convolution watched', 'forward replaced'],
)
@torch.no_grad()
def test_the_norm_is_called_where_it_must_be(change):
    layer = make()
    change(layer)
    assert count_norms(layer, make_input()) == 1


@torch.no_grad()
def test_a_weight_larger_than_the_map_is_left_alone():
    assert count_norms(make(), make_input(1)) == 1


@torch.no_grad()
def test_a_norm_of_float32_after_a_convolution_of_bfloat16():
    layer = make(kernel_size=3).bfloat16()
    layer.bn.float()
    x = make_input().bfloat16()
    with torch.enable_grad():
        expected = layer(x)
    result = layer(x)
    assert result.dtype == torch.bfloat16
    assert_close(result, expected, length=layer)
    downsample = nn.Sequential(layer.conv, layer.bn)
    assert_close(shorten(downsample, x), downsample(x), length=downsample)


SHORTCUTS = [
    lambda: downsample_conv(8, 12, kernel_size=1, stride=2),
    lambda: downsample_conv(8, 12, kernel_size=3, dilation=2),
    lambda: downsample_avg(8, 12, kernel_size=1, stride=2),
    lambda: downsample_avg(8, 12, kernel_size=1),
]


class Shortened(nn.Module):
    def __init__(self, downsample):
        super().__init__()
        self.downsample = downsample

    def forward(self, x):
        return shorten(self.downsample, x)


@pytest.mark.parametrize('make_downsample', SHORTCUTS, ids=['strided', 'dilated', 'pooled and strided', 'pooled'])
def test_shortcuts_fold_the_norm_on_the_fly(make_downsample):
    torch.manual_seed(0)
    layer, x = Shortened(randomise(make_downsample().double()).eval()), make_input()
    expected = layer.downsample(x)
    assert count_norms(layer, x) == 1  # autograd is on
    with torch.no_grad():
        assert_close(layer(x), expected, length=layer)
        assert count_norms(layer, x) == 0
        assert count_norms(layer, make_input(1)) == 1
        assert count_norms(layer.train(), x) == 1


def test_shortcuts_are_shown_to_exporters():
    layer = Shortened(downsample_conv(8, 12, kernel_size=1).double()).eval()
    with torch.no_grad():
        called = str(torch.export.export(layer, (make_input(),)).graph)
    assert 'conv2d' in called
    assert 'batch_norm' in called


@pytest.mark.parametrize('name', ['', '0', '1', '2'])
@torch.no_grad()
def test_shortcuts_that_are_watched_are_called(name):
    layer, x, seen = Shortened(downsample_avg(8, 12, kernel_size=1, stride=2).double()).eval(), make_input(), []
    expected = layer(x)
    layer.downsample.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(module))
    assert_close(layer(x), expected, length=layer)
    assert len(seen) == 1


@pytest.mark.parametrize('downsample', [nn.Identity(), nn.Sequential(), nn.Sequential(nn.Conv2d(8, 12, 1)), nn.ReLU()])
@torch.no_grad()
def test_other_shortcuts_are_called(downsample):
    x = make_input()
    downsample = downsample.double()
    assert torch.equal(shorten(downsample, x), downsample(x))
