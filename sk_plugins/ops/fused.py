"""What ``fuse_forward`` is written in: a convolution, and by an engine's passes what follows it."""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from . import operators, private
from .functions import BranchSpec, NormAct, NormReluSelect, NormSpec
from .reference import Attention, Branches

__all__ = ['convolve', 'norm_act', 'norm_relu_select']


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(x), for a convolution that nobody watches: one call where a module's are four."""
    parameters = conv._parameters
    return torch.conv2d(
        x, parameters['weight'], parameters['bias'], conv.stride, conv.padding, conv.dilation, conv.groups
    )


def norm_act(
    engine: ModuleType,
    ys: Sequence[Tensor],
    norms: Sequence[nn.BatchNorm2d],
    relu: bool = True,
    shortcut: Tensor | None = None,
) -> Tensor:
    """act(sum_m BN_m(y_m) + shortcut), (B, C, H, W), of one norm or two, updated as ``nn.BatchNorm2d`` does."""
    if shortcut is not None and shortcut.shape != ys[0].shape:
        shortcut = shortcut.expand_as(ys[0])
    first = norms[0]
    batch = first.training
    spec = NormSpec(engine, relu, batch, first.momentum, first.eps, _running(norms) if batch else ())
    tensors: list[Tensor | None] = [shortcut]
    for y, norm in zip(ys, norms):
        parameters, buffers = norm._parameters, norm._buffers
        tensors += [y, parameters['weight'], parameters['bias']]
        tensors += [None, None] if batch else [buffers['running_mean'], buffers['running_var']]
    return NormAct.apply(spec, *tensors) if torch.is_grad_enabled() else engine.norm_act(spec, *tensors)[0]


def norm_relu_select(
    engine: ModuleType,
    ys: list[Tensor],
    norms: list[nn.BatchNorm2d],
    attention: tuple[nn.Conv2d, nn.BatchNorm2d, nn.Conv2d] | None,
) -> Tensor:
    """From the branches' convolutions to V (Eq. 1 to 6), (B, C, H, W).

    Args:
        engine: ``cpu``, ``gpu`` or ``operators``.
        ys: M times (B, C, H, W).
        norms: the BatchNorm of every branch, updated as ``nn.BatchNorm2d`` does.
        attention: W of Eq. 3, its BatchNorm, and A of Eq. 5; None for the branches' plain sum.
    """
    first = norms[0]
    batch = first.training
    of_attention, attends, every = None, attention is not None, norms
    if attends:
        reduce, of_norm, select = attention
        every = [*norms, of_norm]
        reduce, norm, buffers, select = reduce._parameters, of_norm._parameters, of_norm._buffers, select._parameters
        running = (None, None) if batch else (buffers['running_mean'], buffers['running_var'])
        affine = norm['weight'], norm['bias']
        of_attention = Attention(reduce['weight'], *affine, select['weight'], select['bias'], *running)
    weights, biases, means, variances = [], [], [], []
    for norm in norms:
        parameters, buffers = norm._parameters, norm._buffers
        weights.append(parameters['weight'])
        biases.append(parameters['bias'])
        if not batch:
            means.append(buffers['running_mean'])
            variances.append(buffers['running_var'])
    updated = _running(every) if batch else ()
    spec = BranchSpec(engine, len(ys), attends, batch, first.momentum, first.eps, updated)
    branches = Branches(ys, weights, biases, means, variances, of_attention)
    if engine is operators:
        return operators.apply(spec, branches)
    if torch.is_grad_enabled():
        return NormReluSelect.apply(
            spec, *ys, *weights, *biases, *means, *variances, *(of_attention if attends else ())
        )
    return engine.forward(spec, branches)[0]


def _running(norms: Sequence[nn.BatchNorm2d]) -> list[tuple[Tensor, Tensor]]:
    """The running statistics to update, after the count of batches, as ``nn.BatchNorm2d`` has it."""
    counts, running = [], []
    for norm in norms:
        buffers = norm._buffers
        counts.append(buffers['num_batches_tracked'])
        running.append((buffers['running_mean'], buffers['running_var']))
    private.add_one(counts)
    return running
