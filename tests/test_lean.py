"""sk_plugins.simplify: the form for export gives the network's outputs with few operations."""

import copy
import pickle

import pytest
import timm
import torch
from helpers.kinds import quick
from helpers.narrow_models import KINDS, make_input, make_model
from helpers.randomised import randomise
from helpers.tolerances import assert_close

import sk_plugins
from sk_plugins import SelectiveKernel, simplify
from sk_plugins.lean import LeanSelectiveKernel, LeanStage

CHOICES = [
    *(dict(kernel_sizes=(3, 5, 7, 9)[:m], select=select) for m in (1, 2, 3, 4) for select in ('channel', 'shared')),
    dict(select='sum'),
    dict(split_input=True, select_bias=True),
    dict(reduce_norm=False, reduce_act=False, kernel_sizes=(3, 5, 7)),
    dict(norm_position='output'),
    dict(norm_position='none', conv_bias=True),
    dict(norm_layer=torch.nn.Identity),
]


@pytest.mark.parametrize('kwargs', CHOICES, ids=str)
@torch.no_grad()
def test_layer(kwargs):
    torch.manual_seed(0)
    layer = torch.nn.Sequential(randomise(SelectiveKernel(32, 64, stride=2, groups=4, **kwargs))).eval()
    lean = simplify(layer)
    assert type(lean[0]) is LeanSelectiveKernel
    assert type(layer[0]) is SelectiveKernel
    x = torch.randn(2, 32, 17, 16)
    assert_close(lean(x), layer(x), length=layer)


@torch.no_grad()
def test_blend_of_products():
    torch.manual_seed(0)
    layer = torch.nn.Sequential(randomise(SelectiveKernel(32, groups=4))).eval()
    lean = simplify(layer)
    lean[0].products = True
    x = torch.randn(2, 32, 17, 16)
    assert_close(lean(x), layer(x), length=layer)


@pytest.mark.parametrize('name', quick(KINDS, ['sknet26', 'seshufflenetv2_x0_5', 'skshufflenetv2_x0_5']))
@torch.no_grad()
def test_network(name):
    model = make_model(name)
    lean = simplify(model)
    x = make_input()
    expected = model(x)
    assert expected.std() > 0.01
    assert_close(lean(x), expected, length=model)
    assert torch.equal(pickle.loads(pickle.dumps(lean))(x), lean(x))
    assert torch.equal(copy.deepcopy(lean)(x), lean(x))


@pytest.mark.parametrize('layers', [(1, 1, 1), (2, 3, 6)])
@torch.no_grad()
def test_shuffles_of_any_depth(layers):
    """Halves that are odd numbers too: (24, 50, 36)."""
    model = make_model('skshufflenetv2_x0_5', layers=layers, channels=(24, 50, 36))
    lean = simplify(model)
    assert [type(getattr(lean, name)) for name in ('stage2', 'stage3', 'stage4')] == [LeanStage] * 3
    x = make_input()
    assert_close(lean(x), model(x), length=model)


@torch.no_grad()
def test_features():
    model = make_model('skshufflenetv2_x0_5')
    x = make_input()
    lean = simplify(model, features=True)
    for found, expected in zip(
        lean.forward_intermediates(x, intermediates_only=True), model.forward_intermediates(x, intermediates_only=True)
    ):
        assert_close(found, expected, length=model)
    with pytest.raises(RuntimeError, match=r'in another order: simplify\(model, features=True\)'):
        simplify(model).forward_intermediates(x)


@torch.no_grad()
def test_of_timm():
    torch.manual_seed(0)
    model = randomise(timm.create_model('skresnet18', channels=(16, 32, 64, 128), num_classes=10)).eval()
    lean = simplify(model)
    assert sum(type(module) is LeanSelectiveKernel for module in lean.modules()) == 8
    x = make_input()
    assert_close(lean(x), model(x), length=model)


@torch.no_grad()
def test_hooks_keep_a_layer():
    model = make_model('sknet26')
    seen = []
    model.layer1[0].conv2.attn.register_forward_hook(lambda *args: seen.append(1))
    lean = simplify(model)
    assert type(lean.layer1[0].conv2) is SelectiveKernel
    assert type(lean.layer2[0].conv2) is LeanSelectiveKernel
    lean(make_input())
    assert seen == [1]


def test_what_it_refuses():
    with pytest.raises(ValueError, match='model is in training mode'):
        simplify(make_model('sknet26', train=True))
    with pytest.raises(TypeError, match=r'must be an nn\.Module'):
        simplify('sknet26')
    assert 'simplify' in sk_plugins.__all__
