"""What ``fuse_forward`` is written in: convolutions, and by an engine's passes what follows them.

A convolution's norm is None where BatchNorm was folded into it. Its bias is then added in the engine's pass, which
reads the map for other reasons; on a GPU torch adds a bias in a pass of its own.
"""

from collections.abc import Sequence
from itertools import repeat
from types import ModuleType

import torch
from torch import Tensor, nn

from . import operators
from .functions import BranchSpec, NormAct, NormPoolRelu, NormReluSelect, NormSpec
from .reference import Attention, Branches

__all__ = ['norm_act', 'norm_act_pool', 'norm_relu_select']


def norm_act(
    engine: ModuleType,
    layers: Sequence[tuple[Tensor, nn.Conv2d, nn.BatchNorm2d | None]],
    relu: bool = True,
    shortcut: Tensor | None = None,
) -> Tensor:
    """act(sum_m norm_m(conv_m(x_m)) + shortcut), (B, C, H, W); the norms are updated as ``nn.BatchNorm2d`` does.

    Args:
        engine: ``gpu``.
        layers: x, (B, C', H', W'), its convolution and its norm, once or twice.
        relu: whether act is ReLU; else there is none.
        shortcut: (B, C, H, W), or what is broadcast to that.
    """
    first = layers[0][2]
    folded = first is None
    batch = not folded and first.training
    tensors: list[Tensor | None] = [shortcut]
    norms = []
    for x, conv, norm in layers:
        tensors.append(_convolve(conv, x, not folded))
        if folded:
            tensors += [None, conv._parameters['bias'], None, None]
            continue
        norms.append(norm)
        parameters, buffers = norm._parameters, norm._buffers
        tensors += [parameters['weight'], parameters['bias']]
        tensors += [None, None] if batch else [buffers['running_mean'], buffers['running_var']]
    if shortcut is not None and shortcut.shape != tensors[1].shape:
        tensors[0] = shortcut.expand_as(tensors[1])
    if folded:
        return engine.norm_act(NormSpec(engine, relu, False, 0.0, 0.0, ()), *tensors)[0]
    spec = NormSpec(engine, relu, batch, first.momentum, first.eps, *(_updated(norms) if batch else ((), ())))
    return NormAct.apply(spec, *tensors) if torch.is_grad_enabled() else engine.norm_act(spec, *tensors)[0]


def norm_act_pool(
    engine: ModuleType, x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, pool: nn.MaxPool2d
) -> Tensor:
    """The maximum over windows of ReLU(norm(conv(x))), (B, C, H', W'), by ``cpu`` or ``gpu``: a stem."""
    if not torch.is_grad_enabled():
        return pool(norm_act(engine, ((x, conv, norm),)))
    parameters, buffers, batch = norm._parameters, norm._buffers, norm.training
    spec = NormSpec(engine, False, batch, norm.momentum, norm.eps, *(_updated([norm]) if batch else ((), ())))
    tensors = [_convolve(conv, x, True), parameters['weight'], parameters['bias']]
    tensors += [None, None] if batch else [buffers['running_mean'], buffers['running_var']]
    window = pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode
    return NormPoolRelu.apply(spec, window, *tensors)


def norm_relu_select(
    engine: ModuleType,
    xs: Sequence[Tensor],
    convs: Sequence[nn.Conv2d],
    norms: Sequence[nn.BatchNorm2d | None],
    attention: tuple[nn.Conv2d, nn.BatchNorm2d | None, nn.Conv2d] | None,
) -> Tensor:
    """From the branches' inputs to V (Eq. 1 to 6), (B, C, H, W).

    Args:
        engine: ``cpu``, ``gpu`` or ``operators``.
        xs: every branch's input, M times (B, C', H', W').
        convs: every branch's convolution.
        norms: every branch's norm; they are updated as ``nn.BatchNorm2d`` does.
        attention: W of Eq. 3, its norm, and A of Eq. 5; None for the branches' plain sum.
    """
    first, num = norms[0], len(norms)
    ys = list(map(_convolve, convs, xs, repeat(first is not None)))
    if first is None:
        spec = BranchSpec(engine, num, attention is not None, False, 0.0, 0.0, ())
        return engine.forward(spec, _folded(ys, convs, attention))[0]
    batch = first.training
    of_attention, every = None, norms
    if attention is not None:
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
    updated = _updated(every) if batch else ((), ())
    spec = BranchSpec(engine, num, attention is not None, batch, first.momentum, first.eps, *updated)
    branches = Branches(ys, weights, biases, means, variances, of_attention)
    if engine is operators:
        return operators.apply(spec, branches)
    if torch.is_grad_enabled():
        return NormReluSelect.apply(spec, *spec.flatten(branches))
    return engine.forward(spec, branches)[0]


def _convolve(conv: nn.Conv2d, x: Tensor, biased: bool) -> Tensor:
    """conv(x), or that without its bias, for a convolution without hooks: one call where a module's are four."""
    parameters = conv._parameters
    bias = parameters['bias'] if biased else None
    return torch.conv2d(x, parameters['weight'], bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _folded(ys: list[Tensor], convs: Sequence[nn.Conv2d], attention: tuple | None) -> Branches:
    """What leads to V where every BatchNorm was folded into the convolution before it."""
    none = [None] * len(ys)
    of_attention = None
    if attention is not None:
        reduce, select = attention[0]._parameters, attention[2]._parameters
        of_attention = Attention(reduce['weight'], None, reduce['bias'], select['weight'], select['bias'], None, None)
    return Branches(ys, none, [conv._parameters['bias'] for conv in convs], none, none, of_attention)


def _updated(norms: Sequence[nn.BatchNorm2d]) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """What a training step updates: running means and variances, and the numbers of batches that they have seen."""
    running, batches = [], []
    for norm in norms:
        buffers = norm._buffers
        running.append((buffers['running_mean'], buffers['running_var']))
        batches.append(buffers['num_batches_tracked'])
    return running, batches
