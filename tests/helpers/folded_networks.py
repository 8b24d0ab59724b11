"""Small networks of the zoo's rows, as they are and folded."""

import pytest
import torch
from torch import nn

import sk_plugins
from helpers.randomised import randomise
from helpers.tolerances import assert_close
from sk_plugins import fold_batch_norm, zoo

RESNET = dict(channels=(16, 32, 64, 128), layers=(1, 2, 1, 1), num_classes=10)

NARROW = dict(**RESNET, cardinality=4, base_width=16)

SMALL = dict(channels=(16, 32, 64), layers=(1, 2, 1), cardinality=4, base_width=16, num_classes=10)

SHUFFLE = dict(channels=(16, 32, 64), layers=(1, 2, 1), head_channels=32, num_classes=10)

# By how much batch statistics of small maps amplify rounding.
BATCH_STATISTICS = 1e4

# The kinds of network, each with all that is its own: blocks, stems, shortcuts, units.
FAMILIES = (
    'sknet50',
    'skresnet18',
    'skresnet50d',
    'skresnet50x1_simclr',
    'seshufflenetv2_x1_0',
    'skshufflenetv2_x1_0',
    'sknet29_16x32d',
)

each_family = pytest.mark.parametrize('name', FAMILIES)

# One row of every network, block, stem and unit: what differs between the others is depth and width.
KINDS = (*FAMILIES, 'skresnet50', 'shufflenetv2_x1_0', 'resnext29_16x32d', 'seresnext29_16x32d')
each_state = pytest.mark.parametrize('folded', [False, True], ids=['as it is', 'folded'])


def narrow(spec):
    """The arguments for a small network of a row of the zoo, in every other respect like it."""
    if spec.network is sk_plugins.networks.SKShuffleNetV2:
        return SHUFFLE
    if len(spec.args['layers']) == 3:
        return SMALL
    if spec.network is sk_plugins.networks.SKResNetSimCLR:
        return dict(RESNET, stem_width=8)
    return RESNET if spec.args.get('cardinality') == 1 else NARROW


def make_model(name='sknet50', folded=False, dtype=torch.float32, **kwargs):
    spec = zoo.MODELS[name]
    model = randomise(spec.build(**{**narrow(spec), **kwargs})).to(dtype)
    return fold_batch_norm(model) if folded else model


def make_input(batch=2, size=64, dtype=torch.float32, channels=3):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def norms(model):
    return [k for k, m in model.named_modules() if hasattr(m, 'running_mean') or isinstance(m, nn.GroupNorm)]


def assert_equal(model, reference, x):
    outputs, expected = model(x), reference(x)
    assert expected.std() > 0.01
    assert_close(outputs, expected, length=reference)
