"""How far two results of the same arithmetic may lie apart, from what rounding does and not from what one CPU printed.

The model. Every operation rounds its result by up to half of the dtype's epsilon, relative to the values it handles.
Which way it rounds is as good as random, and differs between machines: they sum in other orders, and with or without
fused multiply-adds. A value that has gone through sums of n terms in all has been rounded n times, and a random walk of
n such steps ends about sqrt(n) of them away. So two computations of it may differ by ::

    SAFETY * gain * epsilon * sqrt(length) * scale

with ``length`` = n, the terms of all sums on the way to a value, one after another (a convolution of C / groups
channels by a k x k kernel sums k * k * C / groups; :func:`sum_length` counts a module's); ``scale`` the largest
magnitude of the expected values, since rounding errors of large terms stay where these cancel to small ones; ``gain``
by how much the arithmetic between makes an error larger than itself, 1 but where a test says why; and ``SAFETY`` = 4
for the tail of a walk over millions of values, for two computations and not one, and for intermediate values
that are larger than the last ones.

A mistake (a branch swapped, an epsilon left out, a sum that stops early) is larger than that by orders of magnitude in
float64; where float32 leaves too little between the two, a test compares in float64.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

SAFETY = 4


def tolerance(dtype: torch.dtype, length: int = 1, gain: float = 1.0) -> float:
    """The difference that rounding explains, relative to the largest value: see above."""
    return SAFETY * gain * torch.finfo(dtype).eps * math.sqrt(length)


def bounds(dtype: torch.dtype, length: int = 1, gain: float = 1.0) -> dict[str, float]:
    """``rtol`` and ``atol`` of ``torch.testing.assert_close`` for values of about one, by :func:`tolerance`."""
    allowed = tolerance(dtype, length, gain)
    return dict(rtol=allowed, atol=allowed)


def sum_length(module: nn.Module, pixels: int = 0) -> int:
    """Terms of all sums of ``module``, as if all its layers stood one after another.

    Each convolution and linear layer adds its fan-in, each norm four operations, each attention or pooling over the
    map ``pixels`` (H * W of the largest map that is pooled as a whole; it may be 0 beside long sums).
    """
    length = pixels
    for part in module.modules():
        weight = getattr(part, 'weight', None)
        if not isinstance(weight, Tensor):
            continue
        # (out, in / groups, k, k) of a convolution, (out, in) of a linear layer; else a norm's scale.
        length += weight[0].numel() if weight.ndim > 1 else 4
    return max(length, 1)


def assert_close(
    actual: Any,
    expected: Any,
    *,
    length: int | nn.Module = 1,
    dtype: torch.dtype | None = None,
    gain: float = 1.0,
    scale: float | None = None,
    msg: str | None = None,
) -> None:
    """Asserts that two results differ by no more than rounding (see the model above).

    Args:
        actual, expected: tensors of one dtype and shape, numbers or arrays, or sequences or mappings of these.
        length: terms of all sums on the way to a value, or the module that was called, whose sums are counted.
        dtype: what was computed in, where that is coarser than the results' own dtype.
        gain: by how much an error grows on its way; a test that sets it says why.
        scale: the largest magnitude on the way, where it is not that of ``expected`` itself (for each tensor).
        msg: said before the difference.
    """
    if isinstance(expected, Mapping):
        assert actual.keys() == expected.keys(), f'keys differ: {actual.keys() ^ expected.keys()}'
        for key, value in expected.items():
            said = f'{msg}: {key}' if msg else str(key)
            assert_close(actual[key], value, length=length, dtype=dtype, gain=gain, scale=scale, msg=said)
        return
    if isinstance(expected, Sequence):
        assert len(actual) == len(expected), f'{len(actual)} results, not {len(expected)}'
        for index, (one, value) in enumerate(zip(actual, expected)):
            said = f'{msg}: {index}' if msg else f'result {index}'
            assert_close(one, value, length=length, dtype=dtype, gain=gain, scale=scale, msg=said)
        return
    if not isinstance(expected, Tensor):
        actual, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (actual, expected))
    if not expected.dtype.is_floating_point:
        assert torch.equal(actual, expected), msg
        return
    if isinstance(length, nn.Module):
        length = sum_length(length)
    if scale is None:
        scale = expected.detach().abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        actual,
        expected,
        rtol=0,
        atol=tolerance(dtype or expected.dtype, length, gain) * scale,
        msg=None if msg is None else lambda said: f'{msg}: {said}',
    )
