"""The arithmetic of Fuse and Select (Li et al., CVPR 2019, Sec. 3.1) as functions of tensors.

``fuse`` and ``select`` are what the layers call. They keep the M branch outputs as a list, so that no
(B, M, C, H, W) tensor is ever built and the maps are read as few times as can be.
``fuse_reference`` and ``select_reference`` say the same thing in the paper's own words, for tests.
"""

import torch
from torch import Tensor

__all__ = ['fuse', 'fuse_reference', 'select', 'select_', 'select_reference']


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
    if len(branches) == 1:
        return branches[0] * attention[:, 0]
    if len(branches) == 2:
        # The weights sum to 1, so one interpolation does what two products and a sum would.
        return torch.lerp(branches[1], branches[0], attention[:, 0])
    selected = branches[0] * attention[:, 0]
    for m, branch in enumerate(branches[1:], 1):
        selected = torch.addcmul(selected, branch, attention[:, m])
    return selected


def select_(branches: list[Tensor], attention: Tensor) -> Tensor:
    """:func:`select` in the last branch's memory, which is faster to write than new memory is to get."""
    weights = attention.to(branches[0].dtype)
    *others, selected = branches
    if len(others) == 1:
        return selected.lerp_(others[0], weights[:, 0])
    selected.mul_(weights[:, -1])
    for m, branch in enumerate(others):
        selected.addcmul_(branch, weights[:, m])
    return selected


def fuse_reference(branches: list[Tensor]) -> Tensor:
    """Eq. 1 and 2 as written: pool the sum of the branches. Shapes as in :func:`fuse`."""
    return torch.stack(branches).sum(0).mean((2, 3), keepdim=True)


def select_reference(branches: list[Tensor], attention: Tensor) -> Tensor:
    """Eq. 6 as written: weigh a stack of the branches and sum. Shapes as in :func:`select`."""
    return (torch.stack(branches, dim=1) * attention).sum(1)
