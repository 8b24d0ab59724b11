"""The arithmetic of Fuse and Select, the engines that compute it, and the gate that chooses one.

A layer's ``forward`` says what it computes, with ``fuse`` and ``select`` of :mod:`.reference`, and is what runs in
doubt. Two engines compute the same faster or on less memory, and :mod:`.gate` asks once a call whether one may:

- ``cpu``: training in plain torch that keeps M maps a unit for the backward pass, in place of 2 M;
- ``gpu``: Triton kernels (``gpu_kernels``), in training and inference, where :mod:`.trial` found them right and faster.

:mod:`.functions` makes autograd's nodes of them, and :mod:`.operators` ``torch.library``'s, for compilers.
:mod:`.fused` is what a layer's ``fuse_forward`` is written in. :mod:`.private` holds torch's private names.
"""

from .fused import norm_act, norm_act_pool, norm_relu_select
from .gate import BACKENDS, Fusable, has_hooks, has_parts, register, stubbed_launches, ways
from .reference import fuse, fuse_reference, select, select_reference

__all__ = [
    'BACKENDS',
    'Fusable',
    'fuse',
    'fuse_reference',
    'has_hooks',
    'has_parts',
    'norm_act',
    'norm_act_pool',
    'norm_relu_select',
    'register',
    'select',
    'select_reference',
    'stubbed_launches',
    'ways',
]
