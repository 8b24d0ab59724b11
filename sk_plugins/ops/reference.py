"""The arithmetic of Fuse and Select (Li et al., CVPR 2019, Sec. 3.1) in plain torch.

``fuse`` and ``select`` are what the layers call. They keep the M branch outputs as a list, so that no
(B, M, C, H, W) tensor is ever built and the maps are read as few times as can be.
``fuse_reference`` and ``select_reference`` say the same thing in the paper's own words, for tests.
:func:`norm_relu_select` is what an engine computes, and every engine is compared with it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    'Attention',
    'Branches',
    'batch_norm',
    'fuse',
    'fuse_reference',
    'norm_relu_select',
    'refuse_single_values',
    'select',
    'select_reference',
    'strided_like',
    'update_running',
]


def fuse(branches: list[Tensor]) -> Tensor:
    """Global average of the branches' sum (Eq. 1 and 2), without building the sum.

    Args:
        branches: the M branch outputs U_m, each (B, C, H, W).

    Returns:
        s, (B, C, 1, 1): by linearity the sum of the branches' means.
    """
    pooled = branches[0].mean((2, 3), keepdim=True)
    for branch in branches[1:]:
        pooled = pooled + branch.mean((2, 3), keepdim=True)
    return pooled


def select(branches: list[Tensor], attention: Tensor) -> Tensor:
    """Attention-weighted sum of the branches (Eq. 6), one pass over the maps per branch but the first.

    Args:
        branches: the M branch outputs U_m, each (B, C, H, W).
        attention: (B, M, C, 1, 1), or (B, M, 1, 1, 1) where all channels share it; sums to 1 over M.

    Returns:
        V, (B, C, H, W), of the branches' dtype.
    """
    attention = attention.to(branches[0].dtype)
    # Not attention[:, 0]: torch 2.7 exports that ':' as a bound on the batch.
    if len(branches) == 1:
        return branches[0] * attention.select(1, 0)
    if len(branches) == 2:
        # The weights sum to 1, so one interpolation does what two products and a sum would.
        return torch.lerp(branches[1], branches[0], attention.select(1, 0))
    selected = branches[0] * attention.select(1, 0)
    for m, branch in enumerate(branches[1:], 1):
        selected = torch.addcmul(selected, branch, attention.select(1, m))
    return selected


def fuse_reference(branches: list[Tensor]) -> Tensor:
    """Eq. 1 and 2 as written: pool the sum of the branches. Shapes as in :func:`fuse`."""
    return torch.stack(branches).sum(0).mean((2, 3), keepdim=True)


def select_reference(branches: list[Tensor], attention: Tensor) -> Tensor:
    """Eq. 6 as written: weigh a stack of the branches and sum. Shapes as in :func:`select`."""
    return (torch.stack(branches, dim=1) * attention).sum(1)


def strided_like(grad: Tensor, weight: Tensor) -> Tensor:
    """A 1x1 convolution's gradient, (O, I), with its weight's shape and strides, which DistributedDataParallel wants.

    channels_last gives a weight (O, I, 1, 1) strides of its own, over the same memory.
    """
    if weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last):
        return grad.contiguous().as_strided(weight.shape, weight.stride())
    return grad.view(weight.shape)


class Attention(NamedTuple):
    """The tensors of z = ReLU(BN(W s)) (Eq. 3) and of the logits A z (Eq. 5).

    Attributes:
        reduce: W, (d, C, 1, 1).
        weight: BatchNorm's scale, (d,); None where BatchNorm was folded into W and the bias.
        bias: BatchNorm's shift, (d,).
        select: A, (M * C, d, 1, 1), or (M, d, 1, 1) where all channels share the attention.
        select_bias: (M * C,) or (M,), or None.
        mean: running mean, (d,); None where the batch's own statistics are to be used.
        var: running variance, (d,); None likewise.
    """

    reduce: Tensor
    weight: Tensor | None
    bias: Tensor
    select: Tensor
    select_bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None


class Branches(NamedTuple):
    """What leads from the branches' convolutions to V.

    Attributes:
        ys: the convolutions' outputs, M times (B, C, H, W), without biases where BatchNorm was folded into them.
        weights: BatchNorm's scales, M times (C,); None each where BatchNorm was folded, and so are the statistics.
        biases: BatchNorm's shifts, M times (C,); the convolutions' biases where BatchNorm was folded into them.
        means: running means, M times (C,); empty where the batch's own statistics are to be used.
        variances: running variances, M times (C,); empty likewise.
        attention: None where V is the branches' plain sum.
    """

    ys: list[Tensor]
    weights: list[Tensor | None]
    biases: list[Tensor]
    means: list[Tensor | None]
    variances: list[Tensor | None]
    attention: Attention | None


def batch_norm(
    y: Tensor, weight: Tensor | None, bias: Tensor, mean: Tensor | None, var: Tensor | None, eps: float
) -> Tensor:
    """BN(y) by the given statistics, by the batch's where these are None; y + bias where BatchNorm was folded."""
    if weight is None:
        return y + bias.to(y.dtype)[:, None, None]
    return F.batch_norm(y, mean, var, weight, bias, mean is None, 0.0, eps)


def norm_relu_select(branches: Branches, eps: float, norm: Callable[..., Tensor] = batch_norm) -> Tensor:
    """BatchNorm and ReLU of every branch, Fuse, and Select (Eq. 1 to 6): V, (B, C, H, W).

    ``norm`` is called as :func:`batch_norm`, for the branches in their order and then for the attention.
    """
    ys, weights, biases, means, variances, attention = branches
    us = []
    for m, y in enumerate(ys):
        mean, var = (means[m], variances[m]) if means else (None, None)
        us.append(F.relu(norm(y, weights[m], biases[m], mean, var, eps)))
    if attention is None:
        total = us[0]
        for u in us[1:]:
            total = total + u
        return total
    reduce, weight, bias, select_weight, select_bias, mean, var = attention
    dtype = ys[0].dtype  # lower than the parameters' where autocast was on
    z = F.conv2d(fuse(us), reduce.to(dtype))
    z = F.relu(norm(z, weight, bias, mean, var, eps))
    logits = F.conv2d(z, select_weight.to(dtype), None if select_bias is None else select_bias.to(dtype))
    return select(us, logits.unflatten(1, (len(ys), -1)).softmax(1))


def update_running(
    mean: Tensor, var: Tensor, batch_mean: Tensor, batch_var: Tensor, count: float, momentum: float
) -> None:
    """Update BatchNorm's running statistics by a batch's mean and biased variance, (C,), over so many values each."""
    mean.lerp_(batch_mean.to(mean.dtype), momentum)
    var.lerp_((batch_var * (count / (count - 1))).to(var.dtype), momentum)


def refuse_single_values(y: Tensor) -> None:
    """Raise torch's error for a batch (B, C, H, W) in training with one value per channel."""
    raise ValueError(f'Expected more than 1 value per channel when training, got input size {tuple(y.shape)}')
