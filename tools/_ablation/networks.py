"""The networks that differ in one thing only, what they cost, and the claims that compare them."""

import functools

import torch
from timm.layers import SEModule
from torch.utils.flop_counter import FlopCounterMode

from sk_plugins.networks import SKResNet

# Three stages of two units at strides 4, 8 and 16: SK_2_1 to SK_4_2.
BASE = dict(
    layers=(2, 2, 2),
    channels=(8, 16, 32),
    cardinality=2,
    base_width=32,
    stem_type='deep',
    stem_width=4,
    in_chans=1,
    num_classes=10,
)
NETWORKS = {
    'k3': dict(sk_kwargs=dict(kernel_sizes=(3,), select='sum')),
    'k5': dict(sk_kwargs=dict(kernel_sizes=(5,), select='sum')),
    'k7': dict(sk_kwargs=dict(kernel_sizes=(7,), select='sum')),
    'k3_k5_summed': dict(sk_kwargs=dict(kernel_sizes=(3, 5), select='sum')),
    'k3_k5_selected': dict(sk_kwargs=dict(kernel_sizes=(3, 5))),
    'k3_k5_k7_summed': dict(sk_kwargs=dict(kernel_sizes=(3, 5, 7), select='sum')),
    'k3_k5_k7_selected': dict(sk_kwargs=dict(kernel_sizes=(3, 5, 7))),
    'k3_k5_shared': dict(sk_kwargs=dict(kernel_sizes=(3, 5), select='shared')),
    # As many parameters as k3_k5_selected, to 1 %.
    'se': dict(unit='se', block_args=dict(attn_layer=functools.partial(SEModule, rd_ratio=0.27, rd_divisor=1))),
    # As many multiply-adds, to 1 %.
    'k3_wider': dict(unit='plain', channels=(9, 19, 38)),
}
SELECTED = 'k3_k5_selected'
CLAIMS = {
    '(a) selection beats the sum, M = 2': (SELECTED, 'k3_k5_summed'),
    '(a) selection beats the sum, M = 3': ('k3_k5_k7_selected', 'k3_k5_k7_summed'),
    '(b) two kernels beat K3': (SELECTED, 'k3'),
    '(b) two kernels beat K5': (SELECTED, 'k5'),
    '(b) two kernels beat K7': (SELECTED, 'k7'),
    '(b) two kernels, summed, beat K3': ('k3_k5_summed', 'k3'),
    '(b) a third kernel adds little': ('k3_k5_k7_selected', SELECTED),
    '(c) SK beats widening at equal cost': (SELECTED, 'k3_wider'),
    '(c) SK beats SE at equal size': (SELECTED, 'se'),
    '(d) a softmax per channel beats a shared one': (SELECTED, 'k3_k5_shared'),
}


def build(name: str) -> SKResNet:
    """The network ``name`` of NETWORKS: (B, 1, 64, 64) to (B, 10)."""
    return SKResNet(**{**BASE, **NETWORKS[name]})


def cost(name: str) -> tuple[int, float]:
    """Parameters, and millions of multiply-adds for one image."""
    with torch.device('meta'), FlopCounterMode(display=False) as counter, torch.no_grad():
        model = build(name).eval()
        model(torch.empty(1, 1, 64, 64))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() / 2e6
