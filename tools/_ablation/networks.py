"""The networks that differ in one thing only, in two sizes, and what they cost."""

import functools

import torch
from timm.layers import SEModule
from torch.utils.flop_counter import FlopCounterMode

from sk_plugins.networks import SKResNet

# Three stages of two units at strides 4, 8 and 16: SK_2_1 to SK_4_2.
BASE = dict(layers=(2, 2, 2), cardinality=2, base_width=32, stem_type='deep', in_chans=1, num_classes=10)
SIZES = {'narrow': dict(channels=(8, 16, 32), stem_width=4), 'wide': dict(channels=(16, 32, 64), stem_width=8)}


def _sk(*kernel_sizes: int, **kwargs) -> dict:
    return dict(sk_kwargs=dict(kernel_sizes=kernel_sizes, **kwargs))


def _table6(kernel_size: int, groups: int) -> dict:
    """A 3x3 beside a true kernel, whose groups make it nearly as costly: a larger one has 6 to 8 % more of both."""
    return dict(sk_kwargs=dict(branches=((3, 1, 2), (kernel_size, 1, groups))))


NETWORKS = {
    'k3_k5_selected': _sk(3, 5),
    'k3_k5_summed': _sk(3, 5, select='sum'),
    'k3_k5_k7_selected': _sk(3, 5, 7),
    'k3_k5_k7_summed': _sk(3, 5, 7, select='sum'),
    'k3': _sk(3, select='sum'),
    'k5': _sk(5, select='sum'),
    'k7': _sk(7, select='sum'),
    'k3_k5_shared': _sk(3, 5, select='shared'),
    'wider': dict(unit='plain'),
    'deeper': dict(unit='plain'),
    'se': dict(unit='se'),
    'k3_k7_selected': _sk(3, 7),
    'k3_k7_summed': _sk(3, 7, select='sum'),
    'k5_k7_selected': _sk(5, 7),
    'k5_k7_summed': _sk(5, 7, select='sum'),
    'k3_k3_selected': _table6(3, 2),
    'k3_true5_selected': _table6(5, 4),
    'k3_true7_selected': _table6(7, 8),
}
SELECTED, SUMMED = 'k3_k5_selected', 'k3_k5_summed'
# The size where every network is trained has all of them; elsewhere these show whether the answers go on.
CORE = ('k3_k5_selected', 'k3_k5_summed', 'k3_k5_k7_selected', 'k3_k5_k7_summed', 'k3', 'k3_k5_shared', 'wider', 'se')
# As many parameters and as many multiply-adds as SELECTED, each to 2 %, and to 5 % for the deeper ones.
_MATCHED = {
    ('narrow', 'wider'): dict(channels=(8, 18, 42)),
    ('narrow', 'deeper'): dict(layers=(2, 2, 4)),
    ('narrow', 'se'): dict(channels=(10, 17, 36), rd_ratio=0.12),
    ('wide', 'wider'): dict(channels=(17, 36, 78)),
    ('wide', 'deeper'): dict(layers=(2, 3, 3)),
    ('wide', 'se'): dict(channels=(19, 36, 70), rd_ratio=0.08),
}


def build(name: str, size: str = 'narrow') -> SKResNet:
    """The network ``name`` of NETWORKS: (B, 1, 64, 64) to (B, 10)."""
    matched = dict(_MATCHED.get((size, name), {}))
    if 'rd_ratio' in matched:
        squeeze = functools.partial(SEModule, rd_ratio=matched.pop('rd_ratio'), rd_divisor=1)
        matched['block_args'] = dict(attn_layer=squeeze)
    return SKResNet(**{**BASE, **SIZES[size], **NETWORKS[name], **matched})


def initialise(name: str, size: str, seed: int) -> SKResNet:
    """:func:`build` with the weights of a seed: what tensors it shares with the others have the same values in them.

    Those are of the same name and shape as one of the network with three selected kernels, or else with two.
    """
    model = _seeded(name, size, seed)
    state = model.state_dict()
    for common in (SELECTED, 'k3_k5_k7_selected'):  # the last one's where both have it
        for key, value in _seeded(common, size, seed).state_dict().items():
            if key in state and state[key].shape == value.shape:
                state[key] = value
    model.load_state_dict(state)
    return model


def _seeded(name: str, size: str, seed: int) -> SKResNet:
    torch.manual_seed(seed)
    return build(name, size)


@functools.cache
def cost(name: str, size: str = 'narrow') -> tuple[int, float]:
    """Parameters, and millions of multiply-adds for one image."""
    with torch.device('meta'), FlopCounterMode(display=False) as counter, torch.no_grad():
        model = build(name, size).eval()
        model(torch.empty(1, 1, 64, 64))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() / 2e6
