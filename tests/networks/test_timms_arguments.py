"""timm's own arguments: what its ResNet takes ours takes, to the same effect, and what it refuses ours refuses."""

import functools
import re

import numpy as np
import pytest
import torch
from timm.layers import BlurPool2d, DropBlock2d, DropPath
from timm.models.resnet import ResNet
from timm.models.sknet import SelectiveKernelBottleneck
from torch import nn

from sk_plugins.networks import SKResNet

SHAPE = dict(layers=(1, 1, 1, 1), channels=(16, 32, 64, 128), cardinality=8, base_width=16, zero_init_last=False)
TAKEN = [
    dict(num_classes=0),
    dict(num_classes=7),
    dict(num_classes=np.int64(7)),
    dict(in_chans=1),
    dict(in_chans=5),
    *(dict(output_stride=stride) for stride in (32, 16, 8, 16.0)),
    *(dict(global_pool=kind) for kind in ('avg', 'max', 'avgmax', 'catavgmax', 'fast', 'fastavg', 'fastmax')),
    dict(global_pool='fastcatavgmax'),
    dict(global_pool='', num_classes=0),
    dict(stem_type='deep', stem_width=8),
    dict(stem_type='deep_tiered', stem_width=8),
    dict(stem_type='deeper', stem_width=8),
    dict(stem_type='wide'),
    dict(stem_width=0),
    dict(replace_stem_pool=True),
    dict(replace_stem_pool=1),
    dict(replace_stem_pool=True, aa_layer=BlurPool2d),
    dict(block_reduce_first=2),
    dict(down_kernel_size=3),
    dict(down_kernel_size=2),
    dict(avg_down=True),
    dict(avg_down=1),
    dict(avg_down=True, down_kernel_size=3),
    *(dict(act_layer=act) for act in (nn.SiLU, nn.LeakyReLU, 'silu', 'gelu_tanh', 'hard_swish')),
    dict(act_layer=functools.partial(nn.LeakyReLU, 0.2)),
    *(dict(norm_layer=norm) for norm in (nn.BatchNorm2d, 'batchnorm2d')),
    dict(aa_layer=BlurPool2d),
    dict(aa_layer=nn.AvgPool2d),
    *(dict(drop_rate=rate) for rate in (0, 0.5, 1.0, 2, np.float32(0.5), True)),
    *(dict(drop_path_rate=rate) for rate in (0.2, 1, np.float64(0.2))),
    *(dict(drop_block_rate=rate) for rate in (0.2, np.float64(0.2))),
    *(dict(base_width=width) for width in (16.0, 6.5, np.float32(6.5))),
    dict(zero_init_last=True),
    dict(zero_init_last=1),
    dict(block_args=None),
    dict(block_args={}),
    dict(block_args=dict(attn_layer='se')),
    dict(dtype=torch.float16),
    dict(dtype=torch.bfloat16),
]
REFUSED = [
    dict(num_classes='10'),
    dict(in_chans=3.0),
    dict(output_stride=4),
    dict(output_stride=None),
    dict(global_pool='median'),
    dict(stem_type=None),
    dict(stem_type='deep', stem_width='64'),
    dict(block_reduce_first=0),
    dict(act_layer='rele'),
    dict(act_layer=nn.functional.relu),
    dict(norm_layer='batchnorn'),
    dict(norm_layer=7),
    dict(drop_path_rate='0.1'),
    dict(block_args=[1]),
    dict(block_args=dict(nothing=1)),
    dict(dtype='float32'),
    dict(nothing=1),
]


def build(network, **kwargs):
    with torch.device('meta'):
        return network(**{**SHAPE, **kwargs}).eval()


def timms(block_args=None, **kwargs):
    """SKNet by timm's ``skresnext50_32x4d``."""
    sk_kwargs = dict(rd_ratio=1 / 16, rd_divisor=32, split_input=False)
    block_args = {'sk_kwargs': sk_kwargs, **block_args} if isinstance(block_args, dict) else block_args
    return ResNet(SelectiveKernelBottleneck, block_args=block_args or dict(sk_kwargs=sk_kwargs), **kwargs)


def name_of(kwargs):
    """The same in every process of a run: no addresses."""
    return re.sub(r' at 0x\w+', '', str(kwargs))


@pytest.mark.parametrize('kwargs', TAKEN, ids=name_of)
def test_what_timm_takes(kwargs):
    expected, ours = build(timms, **kwargs), build(SKResNet, **kwargs)
    assert ours.num_classes == expected.num_classes
    assert ours.drop_rate == expected.drop_rate
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in expected.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in ours.state_dict().items()} == shapes
    assert [f['num_chs'] for f in ours.feature_info] == [f['num_chs'] for f in expected.feature_info]
    assert ours.global_pool.pool_type == expected.global_pool.pool_type
    assert (type(ours.act1), type(ours.bn1)) == (type(expected.act1), type(expected.bn1))
    for kind in (DropPath, DropBlock2d, BlurPool2d, nn.AvgPool2d, nn.Sigmoid):
        assert sum(isinstance(m, kind) for m in ours.modules()) == sum(isinstance(m, kind) for m in expected.modules())


@pytest.mark.parametrize('kwargs', REFUSED, ids=name_of)
def test_what_timm_refuses(kwargs):
    with pytest.raises(Exception) as theirs:  # noqa: PT011 - whichever it is
        build(timms, **kwargs)
    with pytest.raises(theirs.type):
        build(SKResNet, **kwargs)
