"""What the layer computes: the paper's equations, timm's layer, and the designs of other projects."""

import copy

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from helpers.selective_kernels import (
    GROUP_NORM,
    make_branches,
    make_input,
    make_layer,
)
from helpers.tolerances import assert_close
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('dilated', [True, False])
@pytest.mark.parametrize(
    'kwargs', [{}, dict(stride=2), dict(dilation=2), dict(out_channels=128), dict(split_input=True)], ids=str
)
def test_equals_timm(kwargs, dilated, train):
    layer = make_layer(dilated=dilated, train=train, **kwargs)
    reference = timm.layers.SelectiveKernel(
        64, groups=32, rd_ratio=1 / 16, rd_divisor=32, keep_3x3=dilated, **{'split_input': False, **kwargs}
    ).train(train)
    assert list(layer.state_dict()) == list(reference.state_dict())
    reference.load_state_dict(layer.state_dict(), strict=True)
    x = make_input(4)
    if train:
        # In float32 the variance of four pooled values amplifies the rounding of the order in which they were summed.
        layer, reference, x = layer.double(), reference.double(), x.double()
    # So it does in float64, from far below.
    gain = 1e3 if train else 1
    assert_close(layer(x), reference(x), length=layer, gain=gain)
    for (name, buffer), expected in zip(layer.named_buffers(), reference.buffers()):
        assert_close(buffer, expected, length=layer, gain=gain, msg=name)


def test_split_input_gives_each_branch_its_share():
    layer = make_layer(split_input=True, groups=8)
    assert [path.conv.in_channels for path in layer.paths] == [32, 32]
    x = make_input()
    changed = x.clone()
    changed[:, 32:] += 1
    before, after = make_branches(layer, x), make_branches(layer, changed)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])
    branches = [layer.paths[0](x[:, :32]), layer.paths[1](x[:, 32:])]
    expected = (torch.stack(branches, 1) * layer.attn(branches)).sum(1)
    assert_close(layer(x), expected, length=layer)


@pytest.mark.parametrize('kernel_sizes', [(3,), (3, 5), (3, 5, 7)])
@pytest.mark.parametrize('shared', [False, True])
def test_attention_sums_to_one(kernel_sizes, shared):
    layer = make_layer(kernel_sizes=kernel_sizes, select='shared' if shared else 'channel')
    attention = layer.attn(make_branches(layer, make_input(3)))
    assert attention.shape == (3, len(kernel_sizes), 1 if shared else 64, 1, 1)
    assert_close(attention.sum(1), torch.ones(3, 1 if shared else 64, 1, 1), length=layer)
    if len(kernel_sizes) > 1:
        assert attention.std() > 0.05, 'an attention that depends on nothing'


def test_select_shared_has_one_weight_per_branch():
    layer = make_layer(select='shared')
    assert layer.attn.fc_select.weight.shape == (2, 32, 1, 1)
    x = make_input()
    branches = make_branches(layer, x)
    first, second = layer.attn(branches).unbind(1)
    assert_close(layer(x), first * branches[0] + second * branches[1], length=layer)


def test_select_sum_has_no_attention():
    layer = make_layer(select='sum', kernel_sizes=(3, 5, 7))
    assert layer.attn is None
    assert not [key for key in layer.state_dict() if 'attn' in key]
    x = make_input()
    assert_close(layer(x), sum(make_branches(layer, x)), length=layer)
    # Nor does it share the attention's BatchNorm's trouble with a batch of one.
    assert layer.train()(make_input(1)).shape == (1, 64, 9, 9)


def paper(x, weights, strides, dilations, groups):
    """Eq. 1 to 6 for evaluation, from the weights alone, with indices where the paper has them."""

    def batch_norm(x, name):
        shape = [1, -1] + [1] * (x.ndim - 2)
        mean, var, scale, shift = (
            weights[f'{name}.{part}'].view(shape) for part in ('running_mean', 'running_var', 'weight', 'bias')
        )
        return (x - mean) / torch.sqrt(var + 1e-5) * scale + shift

    u = []
    for m, dilation in enumerate(dilations):
        kernel = weights[f'paths.{m}.conv.weight']
        conv = F.conv2d(x, kernel, None, strides, dilation * (kernel.shape[-1] // 2), dilation, groups)
        u.append(F.relu(batch_norm(conv, f'paths.{m}.bn')))
    total = sum(u)  # Eq. 1
    s = total.flatten(2).sum(2) / (total.shape[2] * total.shape[3])  # Eq. 2
    z = F.relu(batch_norm(s @ weights['attn.fc_reduce.weight'].flatten(1).T, 'attn.bn'))  # Eq. 3
    channels = u[0].shape[1]
    matrices = weights['attn.fc_select.weight'].flatten(1).split(channels)  # A, B, ...: (C, d) each
    exponentials = [torch.exp(z @ matrix.T) for matrix in matrices]
    attention = [e / sum(exponentials) for e in exponentials]  # Eq. 5
    return sum(a[:, :, None, None] * branch for a, branch in zip(attention, u))  # Eq. 6


@pytest.mark.parametrize('kernel_sizes', [(3, 5), (5, 7), (3, 5, 7)])
@pytest.mark.parametrize('stride', [1, 2])
def test_equals_the_papers_equations(kernel_sizes, stride):
    layer = make_layer(kernel_sizes=kernel_sizes, stride=stride).double()
    x = make_input().double()
    expected = paper(x, layer.state_dict(), stride, [(k - 1) // 2 for k in kernel_sizes], groups=32)
    assert_close(layer(x), expected, length=layer)


def test_group_norm_of_the_attention_sees_the_input():
    # One group a channel, as an 8-group norm of 8 channels on a 1x1 map has, would norm every z to the same value.
    layer = make_layer(norm_layer=GROUP_NORM, min_dim=8)
    z_norm = layer.attn.bn
    assert (z_norm.num_groups, z_norm.num_channels) == (1, 8)
    attention = layer.attn(make_branches(layer, make_input(2)))
    assert (attention[0] - attention[1]).abs().max() > 1e-3


class RecordShapes(TorchDispatchMode):
    """Notes the shape of every tensor that an operator returns, in forward and backward."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.shapes += [(str(func), tuple(t.shape)) for t in tree_leaves(output) if isinstance(t, torch.Tensor)]
        return output


def largest_tensors(layer, x):
    """Numbers of elements of the largest 5-D tensor, and of the largest of all, in one training step."""
    with RecordShapes() as record:
        layer(x).square().mean().backward()
    assert any('convolution_backward' in name for name, _ in record.shapes), 'the backward pass was not seen'
    sizes = [torch.Size(shape) for _, shape in record.shapes]
    return max((s.numel() for s in sizes if len(s) == 5), default=0), max(s.numel() for s in sizes)


@pytest.mark.parametrize('num_branches', [2, 3])
@pytest.mark.parametrize('select', ['channel', 'shared'])
def test_no_tensor_holds_all_branches(num_branches, select):
    layer = make_layer(train=True, select=select, kernel_sizes=(3, 5, 7)[:num_branches])
    x = make_input(2, size=16).requires_grad_()
    largest_5d, largest = largest_tensors(layer, x)
    assert 0 < largest_5d <= 2 * num_branches * 64
    assert largest == x.numel(), 'branches side by side in fewer than five dimensions'


def test_a_tensor_of_all_branches_would_be_seen():
    layer = timm.layers.SelectiveKernel(64, groups=32, split_input=False)
    largest_5d, _ = largest_tensors(layer, make_input(2, size=16))
    assert largest_5d == 2 * 2 * 64 * 16 * 16


def test_autocast():
    layer = make_layer(train=True)
    with torch.autocast('cpu', torch.bfloat16):
        output = layer(make_input(4))
    assert output.dtype == torch.bfloat16
    expected = make_layer(train=True)(make_input(4))
    assert (output - expected).norm() < 0.02 * expected.norm()
    output.float().square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters())


def test_channels_last():
    layer = make_layer(train=True).double()
    x = make_input().double()
    expected = copy.deepcopy(layer)(x)
    output = layer.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert_close(output, expected, length=layer)


def restate(x, weights, kernels, groups, conv_bias, norms, norm_position, shared, reduce_norm, reduce_act, select_bias):
    """The design that the arguments name, for evaluation, from the weights alone."""

    def batch_norm(x, name):
        mean, var, scale, shift = (
            weights[f'{name}.{part}'].view(1, -1, 1, 1) for part in ('running_mean', 'running_var', 'weight', 'bias')
        )
        return (x - mean) / torch.sqrt(var + 1e-5) * scale + shift

    maps = []
    for m, kernel in enumerate(kernels):
        bias = weights[f'paths.{m}.conv.bias'] if conv_bias else None
        u = F.conv2d(x, weights[f'paths.{m}.conv.weight'], bias, padding=kernel // 2, groups=groups)
        maps.append(F.relu(batch_norm(u, f'paths.{m}.bn')) if norms and norm_position == 'branch' else u)
    s = sum(u.mean((2, 3), keepdim=True) for u in maps)
    z = F.conv2d(s, weights['attn.fc_reduce.weight'], weights.get('attn.fc_reduce.bias'))
    z = batch_norm(z, 'attn.bn') if reduce_norm else z
    z = F.relu(z) if reduce_act else z
    rows = 1 if shared else maps[0].shape[1]
    logits = []
    for m in range(len(kernels)):
        part = slice(m * rows, (m + 1) * rows)
        bias = weights['attn.fc_select.bias'][part] if select_bias else None
        logits.append(F.conv2d(z, weights['attn.fc_select.weight'][part], bias).exp())
    v = sum(logit / sum(logits) * u for logit, u in zip(logits, maps))
    return F.relu(batch_norm(v, 'bn')) if norms and norm_position == 'output' else v


DESIGNS = {
    'select bias': dict(select_bias=True),
    'z without a norm': dict(reduce_norm=False),
    'z without an activation': dict(reduce_act=False),
    'pppLang': dict(conv_bias=True, reduce_norm=False, reduce_act=False, select_bias=True),
    'lucid': dict(norm_position='output', shared=True),
    'norm at the output, one softmax per channel': dict(norm_position='output', conv_bias=True),
    'Keras': dict(norms=False, conv_bias=True, reduce_norm=False, reduce_act=False, select_bias=True),
}


@pytest.mark.parametrize('kernels', [(3, 5), (1, 3, 5)])
@pytest.mark.parametrize('design', DESIGNS.values(), ids=DESIGNS.keys())
def test_designs_of_other_projects(design, kernels):
    plain = dict(
        conv_bias=False, norms=True, norm_position='branch', shared=False, reduce_norm=True, reduce_act=True,
        select_bias=False,
    )  # fmt: skip
    design = {**plain, **design}
    arguments = {k: v for k, v in design.items() if k not in ('norms', 'shared')}
    if not design['norms']:  # bare convolutions, with nothing after the selection either
        arguments.update(norm_layer=nn.Identity, act_layer=nn.Identity)
    select = 'shared' if design['shared'] else 'channel'
    layer = make_layer(16, kernel_sizes=kernels, dilated=False, groups=4, min_dim=8, select=select, **arguments)
    for name, parameter in layer.named_parameters():
        if name in ('attn.fc_reduce.bias', 'attn.fc_select.bias') or name.endswith('conv.bias'):
            nn.init.normal_(parameter)
    layer.double()
    weights = layer.state_dict()
    x = make_input(channels=16).double()
    output = layer(x)
    assert_close(output, restate(x, weights, kernels, 4, **design), length=layer)
    for name in ('reduce_act', 'conv_bias', 'select_bias'):
        if design[name] != plain[name]:
            without = restate(x, weights, kernels, 4, **{**design, name: plain[name]})
            assert (output - without).abs().max() > 1e-3, name
