"""Every name that timm has from here, and narrow networks of each, as training could leave them."""

import pytest
import timm
import torch

import sk_plugins as sk_plugins
from helpers.randomised import randomise
from helpers.tolerances import assert_close

NAMES = timm.list_models(module='timm_models')

# A name of every kind of network: what differs between the others is depth and width.
KINDS = [
    'sknet26',
    'resnext29_16x32d',
    'seresnext29_16x32d',
    'sknet29_16x32d',
    'shufflenetv2_x0_5',
    'seshufflenetv2_x0_5',
    'skshufflenetv2_x0_5',
]

each_model = pytest.mark.parametrize('name', NAMES)

each_kind = pytest.mark.parametrize('name', KINDS)
# For tools whose time goes by the size of the graph: each branch of the networks' code once.
BRANCHES_OF_CODE = ['sknet26', 'seresnext29_16x32d', 'shufflenetv2_x0_5', 'skshufflenetv2_x0_5']

# A network in which what is tested does not depend on the width takes a tenth of the time.
NARROW = dict(channels=(16, 32, 64, 128), cardinality=8, base_width=16, num_classes=10)

SHUFFLE_CHANNELS = {'0_5': (48, 96, 192), '1_0': (116, 232, 464), '1_5': (176, 352, 704), '2_0': (244, 488, 976)}

_NARROW_CHANNELS = {'0_5': (12, 24, 48), '1_0': (28, 58, 116), '1_5': (44, 88, 176), '2_0': (60, 122, 244)}


def is_shuffle(name):
    return 'shufflenet' in name


def is_small(name):
    return '29_16x32d' in name


def feature_shapes(name, narrow=False):
    """Channels and reductions of the features, and the channels of what is pooled, written down from the papers."""
    if is_shuffle(name):
        channels = [24, 24, *(_NARROW_CHANNELS if narrow else SHUFFLE_CHANNELS)[name[-3:]]]
        return channels, [2, 4, 8, 16, 32], 64 if narrow else 2048 if name.endswith('2_0') else 1024
    channels = [64, 64, 128, 256, 512] if narrow else [64, 256, 512, 1024, 2048]
    if is_small(name):
        return channels[:4], [1, 1, 2, 4], channels[3]
    return channels, [2, 4, 8, 16, 32], channels[4]


def narrow(name):
    """Arguments that leave the network's kind and its proportions, and take a hundredth of the time."""
    if is_shuffle(name):
        return dict(channels=_NARROW_CHANNELS[name[-3:]], layers=(2, 2, 2), head_channels=64, num_classes=10)
    if is_small(name):
        return dict(channels=(16, 32, 64), layers=(1, 2, 1), cardinality=4, base_width=32, num_classes=10)
    if name == 'sknet26':
        return NARROW
    if name.startswith('sknet'):
        return dict(NARROW, layers=(1, 2, 1, 1))
    groups, width = name.rpartition('_')[2][:-1].split('x')
    return dict(NARROW, layers=(1, 1, 2, 1), cardinality=int(groups) // 4, base_width=4 * int(width))


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


def shallow(name):
    """Units per stage for tools whose time goes by the size of the graph."""
    return (2, 1, 1) if is_shuffle(name) else (1, 1, 1) if is_small(name) else (1, 1, 1, 1)
