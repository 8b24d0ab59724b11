"""The layer's parts, its batch, what converters make of it, and its errors."""

import copy

import pytest
import timm.layers
import torch
from helpers.selective_kernels import (
    GROUP_NORM,
    each_variant,
    make_input,
    make_layer,
)
from helpers.tolerances import assert_close
from torch import nn
from torch.fx.experimental.optimization import fuse as fold_batch_norms
from torchvision.ops.misc import FrozenBatchNorm2d

from sk_plugins.layers import SelectiveKernel, SelectiveKernelAttention
from sk_plugins.networks import SKResNet


@pytest.mark.parametrize('size', [1, 7, 8])
@each_variant
def test_output_shape(kwargs, size):
    if 'aa_layer' in kwargs and size == 1:
        pytest.skip('a blur reflects its border, and a 1x1 map has none')
    layer = make_layer(**kwargs)
    stride = kwargs.get('stride', 1)
    output = layer(make_input(size=size))
    assert output.shape == (2, kwargs.get('out_channels', 64), -(-size // stride), -(-size // stride))


@each_variant
def test_every_parameter_gets_a_gradient(kwargs):
    layer = make_layer(train=True, **kwargs)
    layer(make_input(4)).square().mean().backward()
    for name, parameter in layer.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        # With a single branch the softmax is 1 whatever the logits.
        if not (len(layer.paths) == 1 and name.startswith('attn')):
            assert parameter.grad.any(), name


@pytest.mark.parametrize(
    ('channels', 'reduction', 'min_dim', 'dim'),
    [
        (128, 16, 32, 32),
        (512, 16, 32, 32),
        (1024, 16, 32, 64),
        # L is a floor: a rounding up to a multiple of it would give 64.
        (768, 16, 32, 48),
        (64, 4, 8, 16),
        (64, 16, 1, 4),
    ],
)
def test_attention_width(channels, reduction, min_dim, dim):
    layer = SelectiveKernel(channels, reduction=reduction, min_dim=min_dim)
    assert layer.attn.fc_reduce.weight.shape == (dim, channels, 1, 1)
    assert layer.attn.fc_select.weight.shape == (2 * channels, dim, 1, 1)
    assert layer.attn.fc_reduce.bias is None
    assert layer.attn.fc_select.bias is None


def test_attention_width_follows_the_output():
    assert SelectiveKernel(64, 1024).attn.fc_reduce.weight.shape == (64, 1024, 1, 1)


@pytest.mark.parametrize(
    ('kwargs', 'convolutions'),
    [
        (dict(kernel_sizes=(3, 5, 7)), [(3, 1, 32), (3, 2, 32), (3, 3, 32)]),
        (dict(kernel_sizes=[1, 3, 11]), [(1, 1, 32), (3, 1, 32), (3, 5, 32)]),
        (dict(kernel_sizes=(1, 3, 5, 7), dilated=False), [(1, 1, 32), (3, 1, 32), (5, 1, 32), (7, 1, 32)]),
        (dict(dilation=2), [(3, 2, 32), (3, 4, 32)]),
        (dict(dilation=4, kernel_sizes=(1, 3, 7)), [(1, 4, 32), (3, 4, 32), (3, 12, 32)]),
        (dict(dilation=2, dilated=False), [(3, 2, 32), (5, 2, 32)]),
        (dict(branches=[(3, 1, 32), (3, 3, 32)]), [(3, 1, 32), (3, 3, 32)]),
        (dict(branches=((3, 1, 32), [5, 1, 64], (7, 2, 16)), dilation=2), [(3, 2, 32), (5, 2, 64), (7, 4, 16)]),
        (dict(branches=[(5, 1, 1)], kernel_sizes=(3, 7), groups=4), [(5, 1, 1)]),
    ],
    ids=str,
)
def test_convolutions(kwargs, convolutions):
    layer = SelectiveKernel(64, **kwargs)
    assert [(p.conv.kernel_size, p.conv.dilation, p.conv.groups) for p in layer.paths] == [
        ((k, k), (d, d), g) for k, d, g in convolutions
    ]
    for path, (kernel_size, _, groups) in zip(layer.paths, convolutions):
        assert path.conv.weight.shape == (64, 64 // groups, kernel_size, kernel_size)
        assert path.conv.bias is None


@pytest.mark.parametrize(
    ('second', 'parameters'),
    [
        ((3, 3, 32), 27_479_784),
        ((3, 2, 32), 27_479_784),
        ((3, 1, 32), 27_479_784),
        ((5, 1, 64), 28.03e6),
        ((7, 1, 128), 27.99e6),
    ],
)
def test_branches_of_table_6(second, parameters):
    branches = [(3, 1, 32), second]
    network = SKResNet((3, 4, 6, 3), block_args=dict(sk_kwargs=dict(branches=branches)), device='meta')
    count = sum(p.numel() for p in network.parameters())
    # The paper prints 28.1M for the last two.
    assert count == parameters if isinstance(parameters, int) else abs(count - parameters) < 5e3
    for module in network.modules():
        if isinstance(module, SelectiveKernel):
            assert [(p.conv.kernel_size[0], p.conv.dilation[0], p.conv.groups) for p in module.paths] == branches


@pytest.mark.parametrize(
    ('sk_kwargs', 'parameters', 'attention'),
    [(dict(select='sum'), 26_458_664, False), (dict(kernel_sizes=(3, 5, 7)), 29_249_512, True)],
    ids=str,
)
def test_networks_of_table_7(sk_kwargs, parameters, attention):
    network = SKResNet((3, 4, 6, 3), block_args=dict(sk_kwargs=sk_kwargs), device='meta')
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert any('attn' in key for key in network.state_dict()) == attention


def test_batch_of_one_in_training_is_refused():
    layer = make_layer(train=True)
    with pytest.raises(ValueError, match='batch of 1'):
        layer(make_input(1))
    with pytest.raises(ValueError, match='batch of 1'):
        layer.attn([make_input(1, size=1)] * 2)
    assert layer(make_input(2)).shape == (2, 64, 9, 9)


def test_batch_of_one_where_nothing_needs_a_batch():
    x = make_input(1)
    assert make_layer().eval()(x).shape == x.shape
    assert make_layer(train=True, norm_layer=GROUP_NORM)(x).shape == x.shape

    frozen = make_layer(train=True)
    for module in frozen.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    expected = copy.deepcopy(frozen).eval()(x)
    torch.testing.assert_close(frozen(x), expected, rtol=0, atol=0)

    frozen = timm.layers.freeze_batch_norm_2d(make_layer(train=True))
    assert_close(frozen(x), expected, length=frozen)


@pytest.mark.parametrize(
    ('kwargs', 'match'),
    [
        (dict(in_channels=0), 'in_channels=0 '),
        (dict(in_channels=64.0), 'in_channels=64.0 '),
        (dict(out_channels=-64), 'out_channels=-64 '),
        (dict(stride=0), 'stride=0 '),
        (dict(dilation=0), 'dilation=0 '),
        (dict(groups=0), 'groups=0 '),
        (dict(reduction=0), 'reduction=0 '),
        (dict(reduction=0.5), 'reduction=0.5 '),
        (dict(min_dim=0), 'min_dim=0 '),
        (dict(stride=True), 'stride=True '),
        (dict(stride=2**63), f'stride={2**63} must be an integer of at most 1048576'),
        (dict(in_channels=10**30), 'in_channels=1.* at most'),
        (dict(kernel_sizes=(3, 1025)), '1025.* 1023 at most'),
        (dict(dilated='no'), "dilated='no' must be True or False"),
        (dict(split_input=1), 'split_input=1 must be True or False'),
        (dict(conv_bias=None), 'conv_bias=None must be True or False'),
        (dict(act_layer='relu'), "act_layer='relu' must be a class"),
        (dict(norm_layer=None), 'norm_layer=None must be a class'),
        (dict(dtype=torch.int32), 'dtype=torch.int32 must be one of torch.float16'),
        (dict(backend=['plain']), r"backend=\['plain'\] is unknown"),
        (dict(select='best'), "select='best' .*'channel', 'shared', 'sum'"),
        (dict(select=None), 'select=None '),
        (dict(norm_position='input'), "norm_position='input' .*'branch', 'output', 'none'"),
        (dict(norm_position=None), 'norm_position=None '),
        (dict(kernel_sizes=()), r'kernel_sizes=\(\) .*at least one branch'),
        (dict(branches=[]), r'branches=\[\] .*at least one branch'),
        (dict(kernel_sizes=3), 'kernel_sizes=3 .*sequence'),
        (dict(kernel_sizes='35'), "kernel_sizes='35' must be a sequence"),
        (dict(kernel_sizes=(3, 4)), 'kernel_sizes .*4.* odd'),
        (dict(kernel_sizes=(3, 4), dilated=False), 'kernel_sizes .*4.* odd'),
        (dict(kernel_sizes=(3, 0)), 'kernel_sizes .*0.* positive'),
        (dict(kernel_sizes=(-3, 3)), 'kernel_sizes .*-3.* positive'),
        (dict(kernel_sizes=(3, 5.0)), r'kernel_sizes .*5\.0'),
        (dict(branches=[(3, 1, 32), (6, 1, 32)]), 'branches .*6.* odd'),
        (dict(branches=[(3, 1, 32), (5, 1)]), r'branches=.*\(5, 1\).*kernel_size, dilation, groups'),
        (dict(branches=[3, 5]), r'branches=\[3, 5\].*kernel_size, dilation, groups'),
        (dict(branches=[(3, 0, 32)]), 'dilation=0 '),
        (dict(branches=[(3, 1, -2)]), 'groups=-2 '),
        (dict(branches=[(3, 1, 32), (5, 1, 48)]), r'groups=48 .*\(64\).*out_channels \(64\)'),
        (dict(in_channels=48), r'groups=32 .*\(48\)'),
        (dict(out_channels=100), r'groups=32 .*out_channels \(100\)'),
        (dict(groups=64, split_input=True), r'groups=64 .*\(32\)'),
        (dict(kernel_sizes=(3, 5, 7), split_input=True), 'split_input=True .*3 branches.*in_channels=64'),
    ],
    ids=str,
)
def test_value_errors(kwargs, match):
    with pytest.raises(ValueError, match=match):
        SelectiveKernel(**{'in_channels': 64, **kwargs})


def count(layer, kind):
    return sum(isinstance(module, kind) for module in layer.modules())


@pytest.mark.parametrize(
    ('convert', 'kind'),
    [
        (nn.SyncBatchNorm.convert_sync_batchnorm, nn.SyncBatchNorm),
        (timm.layers.convert_sync_batchnorm, nn.SyncBatchNorm),
        (timm.layers.freeze_batch_norm_2d, FrozenBatchNorm2d),
    ],
)
@pytest.mark.parametrize('kwargs', [{}, dict(select='sum'), dict(kernel_sizes=(3, 5, 7), split_input=False)], ids=str)
def test_converters_leave_outputs_unchanged(convert, kind, kwargs):
    layer = make_layer(**kwargs)
    norms = count(layer, nn.BatchNorm2d)
    x = make_input()
    expected = layer(x)
    converted = convert(copy.deepcopy(layer)).eval()
    assert count(converted, kind) == norms == len(layer.paths) + (layer.attn is not None)
    assert count(converted, nn.BatchNorm2d) == 0
    assert_close(converted(x), expected, length=layer)


def test_folding_batch_norms_leaves_outputs_unchanged():
    layer = make_layer()
    folded = fold_batch_norms(layer)
    assert count(folded, nn.BatchNorm2d) == 0
    assert_close(folded(make_input()), layer(make_input()), length=layer)


def test_activation_is_a_module_of_its_own():
    layer = SelectiveKernel(64, act_layer=timm.layers.get_act_layer('gelu'))
    assert count(layer, nn.ReLU) == 0
    assert [type(path.act) for path in layer.paths] == [timm.layers.get_act_layer('gelu')] * 2
    assert type(layer.paths[0].bn) is nn.BatchNorm2d


@pytest.mark.parametrize('kwargs', [{}, dict(norm_layer=GROUP_NORM)], ids=['batch norm', 'group norm'])
def test_device_and_dtype(kwargs):
    layer = SelectiveKernel(64, device='meta', dtype=torch.float64, **kwargs)
    for name, tensor in layer.state_dict().items():
        assert tensor.device.type == 'meta', name
        assert tensor.dtype == (torch.int64 if name.endswith('num_batches_tracked') else torch.float64), name


def test_init_weights_of_the_attention():
    attention = SelectiveKernelAttention(512, num_branches=2, dim=32)
    attention.init_weights()
    for layer in (attention.fc_reduce, attention.fc_select):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert layer.weight.mean().item() == pytest.approx(0, abs=5e-4)


def test_split_input_refuses_other_channels():
    with pytest.raises(RuntimeError, match='channels'):
        SelectiveKernel(64, split_input=True)(torch.randn(2, 128, 8, 8))


def test_init_weights_zeroes_the_biases_of_the_attention():
    attention = SelectiveKernelAttention(64, num_branches=2, dim=16, select_bias=True, reduce_norm=False)
    attention.init_weights()
    assert attention.fc_reduce.bias.shape == (16,)
    assert attention.fc_select.bias.shape == (128,)
    assert not attention.fc_reduce.bias.any()
    assert not attention.fc_select.bias.any()


def test_without_a_norm_in_z_a_batch_of_one_trains():
    layer = SelectiveKernel(64, reduce_norm=False).train()
    layer(make_input(1)).square().mean().backward()
    assert layer.attn.fc_reduce.weight.grad.any()
