"""SelectiveKernel's arguments, drawn: a layer that does what the paper says, or a ValueError that says why."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.fuzzing import ANYTHING, assert_named, count_parameters, fuzz, resolved, tally
from helpers.tolerances import bounds
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import GroupNorm1
from torch import nn

from sk_plugins import SelectiveKernel

# Norms of two values that nearly agree magnify an error, by at most one over the root of their epsilon each.
CLOSE = bounds(torch.float64, length=10_000, gain=1e6)


@st.composite
def arguments(draw):
    """Arguments of a layer that can be built."""
    num_branches = draw(st.integers(1, 4))
    split_input = draw(st.booleans())
    groups = draw(st.sampled_from([1, 2, 4]))
    shares = num_branches if split_input else 1
    args = dict(
        in_channels=shares * groups * draw(st.integers(1, 3)),
        stride=draw(st.integers(1, 3)),
        dilation=draw(st.integers(1, 3)),
        reduction=draw(st.integers(1, 20)),
        min_dim=draw(st.integers(1, 9)),
        select=draw(st.sampled_from(['channel', 'shared', 'sum'])),
        split_input=split_input,
        select_bias=draw(st.booleans()),
        reduce_norm=draw(st.booleans()),
        reduce_act=draw(st.booleans()),
        conv_bias=draw(st.booleans()),
        norm_position=draw(st.sampled_from(['branch', 'output', 'none'])),
        backend=draw(st.sampled_from(['auto', 'plain', 'recompute', 'triton'])),
        act_layer=draw(st.sampled_from([nn.ReLU, nn.SiLU])),
        norm_layer=draw(st.sampled_from([nn.BatchNorm2d, GroupNorm1])),
    )
    args['out_channels'] = draw(st.sampled_from([groups, 2 * groups, 5 * groups]))
    if args['in_channels'] % groups == 0 and draw(st.booleans()):
        args['out_channels'] = None
    kernels = st.lists(st.sampled_from([1, 3, 5, 7]), min_size=num_branches, max_size=num_branches)
    if draw(st.booleans()):
        dilations, shares_of = st.integers(1, 3), st.sampled_from([g for g in (1, 2, 4) if groups % g == 0])
        args['branches'] = [(k, draw(dilations), draw(shares_of)) for k in draw(kernels)]
    else:
        args.update(kernel_sizes=draw(kernels), dilated=draw(st.booleans()), groups=groups)
    return args


INPUTS = st.fixed_dictionaries(
    dict(
        batch=st.integers(0, 3),
        height=st.integers(1, 7),
        width=st.integers(1, 7),
        channels_last=st.booleans(),
        training=st.booleans(),
        seed=st.integers(0, 9),
    )
)


def normed(x, norm, training, one_group=False):
    if isinstance(norm, nn.BatchNorm2d):
        mean, var = norm.running_mean, norm.running_var
        if training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        mean, var = mean[None, :, None, None], var[None, :, None, None]
    else:
        mean = x.mean((1, 2, 3), keepdim=True)
        var = (x - mean).square().mean((1, 2, 3), keepdim=True)
    x = (x - mean) / (var + norm.eps).sqrt()
    return x * norm.weight[None, :, None, None] + norm.bias[None, :, None, None]


def paper(layer, args, x):
    """The layer's weights in the paper's equations, with one ungrouped, undilated convolution for every group."""
    branches, _ = resolved(args)
    position = args['norm_position']
    act = F.relu if args['act_layer'] is nn.ReLU else F.silu
    inputs = x.chunk(len(branches), dim=1) if args['split_input'] else [x] * len(branches)
    maps = []
    for path, part, (kernel, dilation, groups) in zip(layer.paths, inputs, branches):
        side = (kernel - 1) * dilation + 1
        weight = x.new_zeros(*path.conv.weight.shape[:2], side, side)
        weight[:, :, ::dilation, ::dilation] = path.conv.weight
        pairs = zip(part.chunk(groups, 1), weight.chunk(groups, 0))
        u = torch.cat([F.conv2d(p, w, padding=side // 2, stride=args['stride']) for p, w in pairs], dim=1)
        if path.conv.bias is not None:
            u = u + path.conv.bias[None, :, None, None]
        maps.append(act(normed(u, path.bn, layer.training)) if position == 'branch' else u)
    v = sum(maps)  # Eq. 1
    if args['select'] != 'sum':
        s = v.mean((2, 3), keepdim=True)  # Eq. 2
        z = torch.einsum('dc,bcij->bdij', layer.attn.fc_reduce.weight[:, :, 0, 0], s)  # Eq. 3
        if args['reduce_norm']:
            z = normed(z, layer.attn.bn, layer.training)
        else:
            z = z + layer.attn.fc_reduce.bias[None, :, None, None]
        z = act(z) if args['reduce_act'] else z
        logits = torch.einsum('cd,bdij->bcij', layer.attn.fc_select.weight[:, :, 0, 0], z)
        if layer.attn.fc_select.bias is not None:
            logits = logits + layer.attn.fc_select.bias[None, :, None, None]
        weights = logits.unflatten(1, (len(branches), -1)).exp()
        weights = weights / weights.sum(1, keepdim=True)  # Eq. 5
        v = sum(weights[:, m] * u for m, u in enumerate(maps))  # Eq. 6
    return act(normed(v, layer.bn, layer.training)) if position == 'output' else v


def build(args, seed):
    torch.manual_seed(seed)
    layer = SelectiveKernel(**args, dtype=torch.float64)
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if name.endswith('var') or tensor.ndim == 1 else tensor.normal_(std=0.4)
    return layer


def output_shape(args, batch, height, width):
    stride = args.get('stride', 1)
    return batch, resolved(args)[1], math.ceil(height / stride), math.ceil(width / stride)


def refuses(args, inputs):
    """Whether a norm would have to take the variance of one value, which torch and the layer refuse."""
    if inputs['batch'] != 1:
        return False
    _, channels, height, width = output_shape(args, 1, inputs['height'], inputs['width'])
    on_maps = args['norm_position'] != 'none'
    on_attention = args['select'] != 'sum' and args['reduce_norm']
    if args['norm_layer'] is nn.BatchNorm2d:
        return inputs['training'] and ((on_maps and height * width == 1) or on_attention)
    if issubclass(args['norm_layer'], nn.GroupNorm):  # of one group, also in evaluation
        dim = max(channels // args.get('reduction', 16), args.get('min_dim', 32))
        return (on_maps and channels * height * width == 1) or (on_attention and dim == 1)
    return False


@fuzz(quick=30, share=2)
@given(arguments(), INPUTS)
def test_layer_is_the_papers(args, inputs):
    layer = build(args, inputs['seed']).train(inputs['training'])
    assert sum(p.numel() for p in layer.parameters()) == count_parameters(args)
    x = torch.randn(inputs['batch'], args['in_channels'], inputs['height'], inputs['width'], dtype=torch.float64)
    if inputs['channels_last']:
        x = x.to(memory_format=torch.channels_last)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with torch.no_grad():
        expected_shape = output_shape(args, *(inputs[k] for k in ('batch', 'height', 'width')))
    if refuses(args, inputs):
        with pytest.raises(ValueError, match=r'batch of 1|more than 1 value per channel'):
            layer(x)
        tally('layer: one value a channel, refused')
        return
    x.requires_grad_()
    y = layer(x)
    assert y.shape == expected_shape
    assert y.dtype == torch.float64
    y.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, f'{name} has no gradient'
        assert torch.isfinite(parameter.grad).all(), f'{name} has a gradient that is not finite'
    for name, buffer in layer.named_buffers():
        assert torch.isfinite(buffer).all(), f'{name} is not finite after a step'
    tally('layer: built')
    if not inputs['batch']:
        return
    got = [y.detach(), x.grad, *(p.grad for p in layer.parameters())]
    x.grad = None
    layer.zero_grad()
    with torch.no_grad():
        for name, buffer in layer.named_buffers():
            buffer.copy_(before[name])
    naive = paper(layer, args, x)
    naive.square().sum().backward()
    zero = [torch.zeros_like(p) if p.grad is None else p.grad for p in layer.parameters()]
    for value, expected in zip(got, [naive.detach(), x.grad, *zero]):
        torch.testing.assert_close(value, expected, **CLOSE)
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), paper(layer, args, x), **CLOSE)


@fuzz(quick=5, share=0.2)
@given(arguments(), st.integers(0, 9))
def test_gradcheck(args, seed):
    args.update(act_layer=nn.SiLU, in_channels=args['in_channels'], stride=1)  # smooth, for differences
    layer = build(args, seed).train()
    x = torch.randn(2, args['in_channels'], 2, 3, dtype=torch.float64, requires_grad=True)
    parameters = dict(layer.named_parameters())

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values)), (x,))

    values = [parameter.detach().requires_grad_() for parameter in parameters.values()]
    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


@fuzz(quick=60, share=4)
@given(arguments(), st.data())
def test_wrong_arguments(args, data):
    args['out_channels'] = args['in_channels'] if args['out_channels'] is None else args['out_channels']
    for name in data.draw(st.lists(st.sampled_from(sorted(args)), min_size=1, max_size=2, unique=True), label='names'):
        args[name] = data.draw(ANYTHING, label=name)
    try:
        layer = SelectiveKernel(**args, device='meta')
    except ValueError as error:
        assert_named(error, args)
        tally('layer: ValueError')
        return
    tally('layer: built, arguments drawn from anything')
    assert sum(p.numel() for p in layer.parameters()) == count_parameters(args)
    x = torch.empty(2, args['in_channels'], 4, 5, device='meta')
    assert layer.eval()(x).shape == output_shape(args, 2, 4, 5)


@fuzz(quick=20, share=0.5)
@given(arguments(), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), INPUTS)
def test_dtypes(args, dtype, inputs):
    layer = SelectiveKernel(**args, dtype=dtype).train(inputs['training'])
    x = torch.randn(2, args['in_channels'], inputs['height'], inputs['width']).to(dtype).requires_grad_()
    y = layer(x)
    assert (y.dtype, y.shape) == (dtype, output_shape(args, 2, inputs['height'], inputs['width']))
    y.float().mean().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == dtype for p in layer.parameters())
    tally(f'layer: built in {dtype}')


@pytest.mark.parametrize('dtype', [torch.int64, torch.complex64, torch.float8_e4m3fn, 'float32', 32])
def test_dtype_without_a_layer(dtype):
    with pytest.raises(ValueError, match=r'dtype=.* must be one of torch.float16'):
        SelectiveKernel(8, groups=1, dtype=dtype)
