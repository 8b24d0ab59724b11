"""Fuse and Select in plain torch, two engines that compute them faster, and the gate that chooses.

A layer's ``forward`` says what it computes, by ``fuse`` and ``select`` of :mod:`.reference`. It always works. An engine
computes the same numbers in fewer passes over the maps:

- ``cpu`` (plain torch, called 'recompute'): a training step keeps M maps a unit for the backward pass, not 2 M;
- ``gpu`` (``gpu_kernels``, called 'triton'): training and inference, once :mod:`.trial` has found it right and faster.

When a layer is called, :mod:`.gate` asks whether one may be used. It is not where there are hooks, a tracer, a tensor
subclass or a replaced module: then ``forward`` runs. Where it may, the layer's ``fuse_forward`` runs, written with
:mod:`.fused`, whose steps :mod:`.functions` makes nodes of autograd's graph. A compiler fuses the plain modules itself;
where 'triton' is asked for by name it sees :mod:`.operators`. :mod:`.private` holds torch's private names.
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
