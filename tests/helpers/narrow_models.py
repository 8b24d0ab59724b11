"""Every name that timm has from here, and narrow networks of each, as training could leave them."""

import re
from typing import Any, NamedTuple

import pytest
import timm
import torch

from helpers.kinds import one_of_each, quick
from helpers.randomised import randomise
from helpers.tolerances import assert_close
from sk_plugins import zoo

NAMES = timm.list_models(module='timm_models')
# 140 million parameters and more: only without memory, or narrow.
LARGE = [name for name in NAMES if zoo.MODELS[name].args.get('width_factor', 1) > 1]

# A name of every kind of network: what differs between the others is depth and width.
KINDS = [
    'sknet26',
    'resnext29_16x32d',
    'seresnext29_16x32d',
    'sknet29_16x32d',
    'skresnet50x1_simclr',
    'shufflenetv2_x0_5',
    'seshufflenetv2_x0_5',
    'skshufflenetv2_x0_5',
]

# Each branch of the networks' code once; the other kinds put the same parts together anew.
BRANCHES_OF_CODE = ['sknet26', 'seresnext29_16x32d', 'skresnet50x1_simclr', 'shufflenetv2_x0_5', 'skshufflenetv2_x0_5']
each_kind = pytest.mark.parametrize('name', quick(KINDS, BRANCHES_OF_CODE))
# Where a kind takes seconds: one of either class by default.
each_slow_kind = pytest.mark.parametrize('name', quick(KINDS, ['sknet26', 'skshufflenetv2_x0_5']))
each_model = pytest.mark.parametrize('name', one_of_each(NAMES))
# Narrow, the names of one kind are one network.
each_narrow_model = pytest.mark.parametrize('name', quick(NAMES, BRANCHES_OF_CODE))

# A network in which what is tested does not depend on the width takes a tenth of the time.
NARROW = dict(channels=(16, 32, 64, 128), cardinality=8, base_width=16, num_classes=10)


class Row(NamedTuple):
    """What the tests know of a network by its paper, and a narrow one of its kind."""

    names: str  # a pattern
    channels: list[int]  # of the features
    reductions: list[int]
    pooled: int  # channels before the classifier
    narrow: dict[str, Any]  # arguments that leave its proportions, and take a hundredth of the time
    narrow_channels: list[int]
    narrow_pooled: int
    shallow: tuple[int, ...]  # units per stage for tools whose time goes by the size of the graph


_STRIDES = [2, 4, 8, 16, 32]
SHUFFLE_CHANNELS = {'0_5': (48, 96, 192), '1_0': (116, 232, 464), '1_5': (176, 352, 704), '2_0': (244, 488, 976)}


def _resnet(names, **narrow):
    channels, narrow_channels = [64, 256, 512, 1024, 2048], [64, 64, 128, 256, 512]
    return Row(names, channels, _STRIDES, 2048, dict(NARROW, **narrow), narrow_channels, 512, (1, 1, 1, 1))


def _simclr(width):
    channels = [64 * width, *(planes * width for planes in (256, 512, 1024, 2048))]
    few = dict(channels=(16, 32, 64, 128), stem_width=8, layers=(1, 2, 1, 1), num_classes=10)
    return Row(rf'x{width}_simclr', channels, _STRIDES, 2048 * width, few, [16, 64, 128, 256, 512], 512, (1, 1, 1, 1))


def _shufflenet(factor):
    channels = SHUFFLE_CHANNELS[factor]
    few = tuple(2 * (count // 8) for count in channels)
    narrow = dict(channels=few, layers=(2, 2, 2), head_channels=64, num_classes=10)
    pooled = 2048 if factor == '2_0' else 1024
    return Row(f'shufflenetv2_x{factor}', [24, 24, *channels], _STRIDES, pooled, narrow, [24, 24, *few], 64, (2, 1, 1))


_SMALL = dict(channels=(16, 32, 64), layers=(1, 2, 1), cardinality=4, base_width=32, num_classes=10)
ROWS = [
    Row('29_16x32d', [64, 256, 512, 1024], [1, 1, 2, 4], 1024, _SMALL, [64, 64, 128, 256], 256, (1, 1, 1)),
    _resnet('sknet26'),
    _resnet('sknet', layers=(1, 2, 1, 1)),
    _resnet('101_32x4d', layers=(1, 1, 2, 1), cardinality=8, base_width=16),
    _resnet('101_32x8d', layers=(1, 1, 2, 1), cardinality=8, base_width=32),
    _resnet('101_64x4d', layers=(1, 1, 2, 1), cardinality=16, base_width=16),
    *map(_simclr, (1, 2, 3)),
    *map(_shufflenet, SHUFFLE_CHANNELS),
]


def row(name):
    return next(row for row in ROWS if re.search(row.names, name))


def is_shuffle(name):
    return 'shufflenet' in name


def is_small(name):
    return '29_16x32d' in name


def feature_shapes(name, narrow=False):
    """Channels and reductions of the features, and the channels of what is pooled."""
    found = row(name)
    if narrow:
        return found.narrow_channels, found.reductions, found.narrow_pooled
    return found.channels, found.reductions, found.pooled


def narrow(name):
    return dict(row(name).narrow)


def shallow(name):
    return row(name).shallow


def make_model(name='sknet26', train=False, **kwargs):
    """A narrow model as training could leave it."""
    torch.manual_seed(0)
    return randomise(timm.create_model(name, **{**narrow(name), **kwargs})).train(train)


def make_input(batch=2, channels=3, size=64):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def assert_same_state(model, expected):
    """Bit for bit, and in one order."""
    expected = expected if isinstance(expected, dict) else expected.state_dict()
    state_dict = model.state_dict()
    assert list(state_dict) == list(expected)
    for key, tensor in expected.items():
        assert state_dict[key].dtype == tensor.dtype, key
        assert torch.equal(state_dict[key], tensor), key


def assert_same_gradients(model, expected, headless=False):
    wanted = dict(expected.named_parameters())
    assert set(wanted) == {name for name, _ in model.named_parameters()}
    largest = max(parameter.grad.abs().max().item() for parameter in wanted.values() if parameter.grad is not None)
    for name, parameter in model.named_parameters():
        if headless and name.startswith('fc.'):
            continue
        assert parameter.grad is not None, name
        # Some gradients are zero but for the rounding of others; batch statistics of small maps amplify it.
        assert_close(parameter.grad, wanted[name].grad, length=model, gain=1e4, scale=largest, msg=name)


def make_model_as_loaded(name, cfg, **kwargs):
    return timm.create_model(name, **{**narrow(name), **kwargs}, pretrained=True, pretrained_cfg_overlay=cfg)
