"""SelectiveKernel in all its variants, as training could leave it."""

from functools import partial

import pytest
import timm.layers
import torch
from torch import nn

from sk_plugins.layers import SelectiveKernel

GROUP_NORM = partial(nn.GroupNorm, 8)

VARIANTS = {
    'plain': dict(),
    'one branch': dict(kernel_sizes=(3,)),
    'three branches': dict(kernel_sizes=(3, 5, 7)),
    'with 1x1': dict(kernel_sizes=(1, 3)),
    'true kernels': dict(dilated=False),
    'strided': dict(stride=2, out_channels=128),
    'dilated': dict(dilation=2),
    'shared': dict(select='shared'),
    'sum': dict(select='sum'),
    'split': dict(split_input=True, groups=8),
    'in full': dict(branches=[(3, 1, 32), (5, 1, 64), (1, 1, 2)]),
    'anti-aliased': dict(stride=2, aa_layer=timm.layers.BlurPool2d),
    'drop block': dict(drop_layer=timm.layers.DropBlock2d),
    'group norm': dict(norm_layer=GROUP_NORM),
    'select bias': dict(select_bias=True),
    'linear z': dict(reduce_norm=False, reduce_act=False, select_bias=True),
    'norm at the output': dict(norm_position='output', select='shared', conv_bias=True),
}

each_variant = pytest.mark.parametrize('kwargs', VARIANTS.values(), ids=VARIANTS.keys())
# What only changes the arguments of the convolutions leaves the graph what it is.
_OF_CONVOLUTIONS = {'with 1x1', 'true kernels', 'strided', 'dilated', 'in full'}
WAYS = {name: kwargs for name, kwargs in VARIANTS.items() if name not in _OF_CONVOLUTIONS}
each_way = pytest.mark.parametrize('kwargs', WAYS.values(), ids=WAYS.keys())
# Where a compiler takes a second for each: those whose graphs have least in common.
_UNLIKE = ('plain', 'one branch', 'group norm', 'norm at the output')
each_compiled_way = pytest.mark.parametrize(
    'kwargs',
    [pytest.param(kwargs, id=name, marks=() if name in _UNLIKE else pytest.mark.slow) for name, kwargs in WAYS.items()],
)


def make_layer(in_channels=64, train=False, **kwargs):
    """A layer whose norms are no identity and whose attention is not all but uniform, as it is right after init."""
    torch.manual_seed(0)
    layer = SelectiveKernel(in_channels, **kwargs)
    for module in layer.modules():
        if getattr(module, 'running_mean', None) is not None:
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    if layer.attn is not None:
        nn.init.normal_(layer.attn.fc_select.weight, std=0.5)
    return layer.train(train)


def make_input(batch=2, channels=64, size=9):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def make_branches(layer, x):
    inputs = x.chunk(len(layer.paths), 1) if layer.split_input else [x] * len(layer.paths)
    return [path(piece) for path, piece in zip(layer.paths, inputs)]
