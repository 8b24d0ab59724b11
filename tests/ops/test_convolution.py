import copy

import pytest
import torch
from randomised import randomise
from torch import nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import sk_plugins
from sk_plugins.networks.resnet import SKBasicBlock, SKBottleneck
from sk_plugins.ops import convolve, convolves_at_once

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='needs a torch with oneDNN')
CONVOLUTIONS = [
    dict(kernel_size=1),
    dict(kernel_size=1, bias=True),
    dict(kernel_size=3, padding=2, dilation=2, groups=8),
    dict(kernel_size=3, padding=1, stride=2, groups=16, bias=True),
]


def make(norm=True, **kwargs):
    torch.manual_seed(0)
    conv = nn.Conv2d(32, 32, **kwargs)
    return conv, randomise(nn.BatchNorm2d(32)).eval() if norm else nn.Identity()


def make_input(*shape, seed=1):
    return torch.randn(*(shape or (3, 32, 9, 9)), generator=torch.Generator().manual_seed(seed))


def operators(call):
    """How often each operator of torch runs within a call. A dispatch mode would not do: oneDNN stands aside for it."""
    with torch.autograd.profiler.profile() as profile:
        call()
    return {event.key: event.count for event in profile.key_averages()}


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['NCHW', 'NHWC'])
@pytest.mark.parametrize('norm', [True, False], ids=['norm', 'no norm'])
@pytest.mark.parametrize('kwargs', CONVOLUTIONS, ids=str)
@torch.no_grad()
def test_equals_one_after_the_other(kwargs, norm, memory_format):
    conv, norm = make(norm, **kwargs)
    x = make_input().to(memory_format=memory_format)
    y = norm(conv(x))
    shortcut = make_input(*y.shape, seed=2).to(memory_format=memory_format)
    before = shortcut.clone()
    for relu in (False, True):
        for other in (None, shortcut):
            expected = y if other is None else y + other
            expected = expected.relu() if relu else expected
            result = convolve(conv, norm, x, relu, other)
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
            assert result.is_contiguous(memory_format=memory_format)
    assert torch.equal(shortcut, before)


@torch.no_grad()
def test_sum_and_relu_are_the_convolutions():
    conv, norm = make(norm=False, kernel_size=1)
    x = make_input(3, 32, 32, 32).to(memory_format=torch.channels_last)
    passes = {'aten::relu', 'aten::relu_', 'aten::add', 'aten::add_'}
    ran = operators(lambda: convolve(conv, norm, x, relu=True, shortcut=x))
    assert sum(count for name, count in ran.items() if 'mkldnn::_convolution_pointwise' in name) == 1
    assert not passes & ran.keys()


def test_stands_aside():
    conv, _ = make(kernel_size=1)
    x = make_input()
    assert not convolves_at_once(conv, x)  # autograd is on
    with torch.no_grad():
        assert convolves_at_once(conv, x)
        for other in (x.double(), x[:0], x.to('meta'), nn.Parameter(x)):
            assert not convolves_at_once(conv, other)
        assert not convolves_at_once(copy.deepcopy(conv).double(), x.double())
        for kwargs in (dict(padding='same'), dict(padding=1, padding_mode='reflect')):
            assert not convolves_at_once(nn.Conv2d(32, 32, 3, **kwargs), x)
        modes = (FlopCounterMode(display=False), torch.autocast('cpu'), torch.backends.mkldnn.flags(enabled=False))
        for mode in modes:
            with mode:
                assert not convolves_at_once(conv, x), mode
        assert torch.func.vmap(lambda x: x + convolves_at_once(conv, x))(x[None]).equal(x[None])
        with forward_ad.dual_level():
            assert not convolves_at_once(conv, x)
        assert convolves_at_once(conv, x)


def make_unit(kind, **kwargs):
    torch.manual_seed(0)
    if kind is SKBottleneck:
        kwargs = dict(cardinality=4, base_width=16, **kwargs)
    unit = kind(32, 32 // kind.expansion, sk_kwargs=dict(min_dim=8), **kwargs)
    return randomise(unit).eval()


@pytest.mark.parametrize('folded', [False, True], ids=['as trained', 'folded'])
@pytest.mark.parametrize(('kind', 'convolutions'), [(SKBottleneck, 4), (SKBasicBlock, 3)])
def test_units_leave_no_pass_for_sum_and_relu(kind, convolutions, folded):
    unit = make_unit(kind)
    x = make_input(3, 32, 32, 32).to(memory_format=torch.channels_last)
    expected, before = unit(x).detach(), x.clone()
    unit = sk_plugins.fuse(unit) if folded else unit
    with torch.inference_mode():
        ran = operators(lambda: unit(x))
        torch.testing.assert_close(unit(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)  # the shortcut
    assert sum(count for name, count in ran.items() if 'mkldnn::_convolution_pointwise' in name) == convolutions
    assert ran.get('aten::relu_', 0) <= 1  # the attention's, of one pixel


@pytest.mark.parametrize('kind', [SKBottleneck, SKBasicBlock])
@pytest.mark.parametrize('name', ['act', 'conv3', 'conv3.conv', 'conv1'])
@torch.no_grad()
def test_modules_that_are_watched_are_called(kind, name):
    unit = make_unit(kind)
    name = name.replace('conv3', 'conv2') if kind is SKBasicBlock else name
    expected = unit(make_input(3, 32, 32, 32))
    seen = []
    unit.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    torch.testing.assert_close(unit(make_input(3, 32, 32, 32)), expected, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1
