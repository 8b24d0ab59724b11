"""Which way the branches of a unit go from their convolutions to the selected map.

- ``'plain'``: module after module, what compilers and exporters trace.
- ``'recompute'``: in eager training, keep the convolutions' outputs alone (:mod:`~sk_plugins.ops.recompute`).
- ``'triton'``: on a GPU, two passes forward and two backward (:mod:`~sk_plugins.ops.custom_ops`); elsewhere the same
  operators in plain torch.
- ``'auto'``: ``'triton'`` on a GPU in eager mode where the kernels serve and have passed a check against plain torch,
  else ``'recompute'`` where autograd is at work, else ``'plain'``.

``'recompute'`` and ``'triton'`` give first derivatives in reverse mode: within ``torch.func``'s transforms and forward
mode the plain way is taken, and a second derivative is refused with a word about ``'plain'``.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

from . import custom_ops
from .convolution import as_matrix
from .recompute import norm_relu_pool, select_recomputed
from .selective_kernel import fuse, select, select_

__all__ = ['BACKENDS', 'norm_relu_select', 'project', 'select_in_inference']

BACKENDS = ('auto', 'plain', 'recompute', 'triton')
logger = logging.getLogger('sk_plugins')


def norm_relu_select(
    outputs: list[Tensor],
    norms: Sequence[nn.BatchNorm2d],
    attend: Callable[[Tensor], Tensor] | None,
    backend: str = 'auto',
) -> Tensor:
    """From the branches' convolutions to V: BatchNorm and ReLU of each, Fuse, and Select (Eq. 1 to 6).

    Args:
        outputs: y_m, each (B, C, H, W).
        norms: BatchNorm of each branch, updated as ``nn.BatchNorm2d`` does in training.
        attend: from the pooled sum, (B, C, 1, 1), to the attention, (B, M, C, 1, 1) or (B, M, 1, 1, 1); None for the
            branches' plain sum.
        backend: one of ``BACKENDS``; where it cannot serve, ``'plain'``.

    Returns:
        V, (B, C, H, W).
    """
    backend = _resolve(backend, outputs, norms, attend is not None)
    if backend == 'triton':
        return _through_custom_ops(outputs, norms, attend)
    if backend == 'recompute':
        branches, pooled = map(list, zip(*(norm_relu_pool(y, norm) for y, norm in zip(outputs, norms))))
        return _sum(branches) if attend is None else select_recomputed(branches, attend(_sum(pooled)))
    branches = [torch.relu_(norm(y)) for y, norm in zip(outputs, norms)]
    if not torch.is_grad_enabled():
        return select_in_inference(branches, attend)
    return _sum(branches) if attend is None else select(branches, attend(fuse(branches)))


def select_in_inference(branches: list[Tensor], attend: Callable[[Tensor], Tensor] | None) -> Tensor:
    """V from the branches u_m, in inference: it takes the last one's memory. ``attend`` as above."""
    if attend is None:
        return _sum(branches)
    if torch.compiler.is_compiling():
        # Inductor sums a map down its columns in one stride of the whole row, unless told to take the rows in turn.
        return select(branches, attend(_sum([u.mean(3, keepdim=True).mean(2, keepdim=True) for u in branches])))
    return select_(branches, attend(fuse(branches)))


def project(conv: nn.Conv2d, s: Tensor) -> Tensor:
    """A 1x1 convolution of a 1x1 map, (B, C, 1, 1), as the matrix product that it is: a third of the time on CPUs."""
    return F.linear(s.flatten(1), as_matrix(conv.weight), conv.bias)[:, :, None, None]


def _resolve(backend: str, outputs: list[Tensor], norms: Sequence[nn.BatchNorm2d], attends: bool) -> str:
    compiling = torch.compiler.is_compiling()
    # A single value per channel has no variance: the norm itself says so.
    enough = all(y.numel() > y.shape[1] for y in outputs)
    one_kind = len({(norm.training, norm.running_mean is None, norm.eps) for norm in norms}) == 1
    if not compiling and (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0):
        return 'plain'
    if backend == 'auto' and not compiling and outputs[0].is_cuda and not isinstance(outputs[0], FakeTensor):
        checked = custom_ops.serves(outputs) and _passes_check(outputs[0].device, outputs[0].dtype)
        backend = 'triton' if checked else 'recompute'
    if backend == 'triton' and attends and one_kind and enough:
        return 'triton'
    recomputes = torch.is_grad_enabled() and all(y.requires_grad for y in outputs)
    if backend != 'plain' and enough and recomputes and not compiling:
        return 'recompute'
    return 'plain'


def _through_custom_ops(outputs: list[Tensor], norms: Sequence[nn.BatchNorm2d], attend) -> Tensor:
    weight = torch.stack([norm.weight for norm in norms])
    bias = torch.stack([norm.bias for norm in norms])
    mean = var = None
    batch_statistics = norms[0].training or norms[0].running_mean is None
    if not batch_statistics:
        mean = torch.stack([norm.running_mean for norm in norms])
        var = torch.stack([norm.running_var for norm in norms])
    pooled = custom_ops.pool(outputs, weight, bias, mean, var, norms[0].eps)
    if norms[0].training:
        y = outputs[0]
        count = y.shape[0] * y.shape[2] * y.shape[3]
        for m, norm in enumerate(norms):
            _update_running_statistics(norm, pooled.mean[m], pooled.var[m] * (count / (count - 1)))
    attention = attend(pooled.s[:, :, None, None].to(weight.dtype))
    return custom_ops.select(outputs, weight, bias, pooled, attention[..., 0, 0])


@torch.no_grad()
def _update_running_statistics(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor) -> None:
    if not norm.track_running_stats or norm.running_mean is None:
        return
    norm.num_batches_tracked.add_(1)
    momentum = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_(var.to(norm.running_var.dtype), momentum)


@functools.cache
def _passes_check(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels give plain torch's numbers on this device, forward and backward; looked at once."""
    # In a thread of its own, where none of the caller's modes hold: inference, saved tensor hooks, default device.
    with ThreadPoolExecutor(1) as executor:
        error = executor.submit(_error, device, dtype).result()
    passes = error < (1e-4 if dtype == torch.float32 else 5e-2)  # not so a NaN
    if not passes:
        logger.warning(
            'The Triton kernels differ from plain torch by %.1e on %s in %s: they are not used.', error, device, dtype
        )
    return passes and custom_ops.failure() is None


def _error(device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative difference of the outputs and gradients of the two."""
    generator = torch.Generator().manual_seed(0)
    outputs, weight, bias = (torch.randn(shape, generator=generator) for shape in ((2, 3, 40, 9, 9), (2, 40), (2, 40)))
    attention = torch.rand(3, 2, 40, generator=generator).softmax(1)
    results = []
    for where in (torch.device('cpu'), device):
        # Both see the values that the low precision leaves.
        ys = [y.to(dtype).to(where, torch.float32 if where.type == 'cpu' else dtype) for y in outputs]
        ys = [y.to(memory_format=torch.channels_last).requires_grad_() for y in ys]
        parameters = [p.to(where, copy=True).requires_grad_() for p in (weight, bias, attention)]
        pooled = custom_ops.pool(ys, *parameters[:2])
        selected = custom_ops.select(ys, *parameters[:2], pooled, parameters[2] + pooled.s[:, None])
        selected.float().square().sum().backward()
        results.append([selected, *(tensor.grad for tensor in (*ys, *parameters))])
    errors = [
        (got.detach().float().cpu() - expected.detach()).norm() / expected.detach().norm()
        for expected, got in zip(*results)
    ]
    return float(torch.stack(errors).max())


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total
