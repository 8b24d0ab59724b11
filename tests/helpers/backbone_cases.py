"""A row for every kind of backbone of OpenMMLab's door, and the same network at timm's."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import timm
import torch
from safetensors.torch import save

import sk_plugins as sk_plugins
from helpers.randomised import randomise

# A network in which what is tested does not depend on the width takes a tenth of the time.
NARROW = dict(channels=(16, 32, 64, 128), cardinality=8, base_width=16)

CHANNELS = [64, 128, 256, 512]

SMALL = dict(layers=(1, 1, 1), channels=(16, 32, 64), cardinality=8, base_width=16)

SHUFFLE = dict(channels=(16, 32, 64), head_channels=64, layers=(2, 2, 2))

REPO = 'me/tiny'

PUBLISHED = 'timm/skresnext50_32x4d.ra_in1k'

RESNET_PARTS = (('conv1.', 'bn1.'), ('layer1.',), ('layer2.',), ('layer3.',), ('layer4.',))

SHUFFLE_PARTS = (('conv1.',), ('stage2.',), ('stage3.',), ('stage4.',), ('conv5.',))


class Case(NamedTuple):
    """A backbone of few channels, and the same network at timm's door."""

    cfg: Mapping[str, Any]
    timm_name: str
    timm_args: Mapping[str, Any]
    channels: list[int]
    strides: list[int]
    parts: tuple[tuple[str, ...], ...] = RESNET_PARTS  # how the stem's and each stage's names begin

    @property
    def size(self):
        return 2 * self.strides[-1] if self.strides[-1] == 32 else 16

    @property
    def every(self):
        return tuple(range(len(self.channels)))


def _shuffle(unit, prefix):
    cfg = dict(type='SKShuffleNetV2', widen_factor=0.5, unit=unit, **SHUFFLE)
    return Case(cfg, f'{prefix}shufflenetv2_x0_5', SHUFFLE, [16, 32, 64, 64], [8, 16, 32, 32], SHUFFLE_PARTS)


def _cifar(unit, name):
    cfg = dict(type='SKNet', depth=29, unit=unit, **SMALL)
    return Case(cfg, name, SMALL, [64, 128, 256], [1, 2, 4], RESNET_PARTS[:4])


_WIDTHS = dict(channels=NARROW['channels'])

_FLAT = dict(layers=(1, 1, 1, 1), **_WIDTHS)

_STRIDES = [4, 8, 16, 32]

_SIMCLR = dict(stem_width=8, **_FLAT)

# One of each class, and of SKNet one with four stages and one with three.
CASES = {
    'SKNet': Case(dict(type='SKNet', depth=26, **NARROW), 'sknet26', NARROW, CHANNELS, _STRIDES),
    'SKNet-29': _cifar('sk', 'sknet29_16x32d'),
    'SKResNeXt': Case(
        dict(type='SKResNeXt', depth=26, groups=8, width_per_group=16, **_FLAT),
        'sknet26',
        dict(cardinality=8, base_width=16, **_FLAT),
        CHANNELS,
        _STRIDES,
    ),
    'SKResNet-18': Case(dict(type='SKResNet', depth=18, **_WIDTHS), 'skresnet18', _WIDTHS, [16, 32, 64, 128], _STRIDES),
    'SKResNetSimCLR': Case(
        dict(type='SKResNetSimCLR', depth=50, **_SIMCLR),
        'skresnet50x1_simclr',
        _SIMCLR,
        CHANNELS,
        _STRIDES,
    ),
    'SKShuffleNetV2': _shuffle('sk', 'sk'),
}

# And the networks whose units are others.
ALL_CASES = {
    **CASES,
    'SKNet-29-plain': _cifar('plain', 'resnext29_16x32d'),
    'SKNet-29-se': _cifar('se', 'seresnext29_16x32d'),
    'SKResNet-50d': Case(dict(type='SKResNet', depth='50d', **_WIDTHS), 'skresnet50d', _WIDTHS, CHANNELS, _STRIDES),
    'SKShuffleNetV2-plain': _shuffle('plain', ''),
    'SKShuffleNetV2-se': _shuffle('se', 'se'),
}


def make_timm(seed=0, case=CASES['SKNet'], **kwargs):
    torch.manual_seed(seed)
    return randomise(timm.create_model(case.timm_name, **{**case.timm_args, 'num_classes': 10, **kwargs}), seed)


def make_input(batch=2, channels=3, size=64):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def weights(model):
    return {'model.safetensors': save(model.state_dict())}
