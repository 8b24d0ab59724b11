"""Triton kernels of BatchNorm, ReLU, pooling and selection over all branches, and their launchers.

Each pass goes over all M branches, and none writes a map that is only normalised or rectified:

- :func:`statistics` reads y_m for the batch's mean and variance, and updates the running ones;
- :func:`moments` reads y_m (and the gradient of V) for sums over a map;
- :func:`select` reads y_m and writes V;
- :func:`input_grads` reads y_m and the gradient of V and writes the gradients of y_m;
- :func:`norm_act`, :func:`norm_act_moments` and :func:`norm_act_grads` do as much for a norm (or two whose results are
  added), a shortcut and a ReLU;
- :func:`norm_relu_rows` and :func:`norm_relu_rows_grads` are BatchNorm and ReLU of the attention's (B, d).

``gpu`` says what they compute. The maps are dense, of one shape, dtype and memory format, and not empty.

A program owns a tile of one image: BLOCK_HW positions by BLOCK_C channels. In channels_last the channels are next to
each other in memory and tiles are wide, in contiguous tensors the positions are and tiles are tall: the kernels are
the same, told by the strides. Sums are float32; where an image's map is split among programs, each writes its own
partial sum and a second step adds them in a fixed order, so that results are the same from run to run.

Parameters come as they lie, one pointer a branch: to stack them would be a launch. ``NORM`` says what a norm is:
'batch', whose statistics lie in one (M, C) tensor each; 'running', whose statistics lie by branch, a variance in the
place of 1 / sqrt(variance + eps); or 'folded' into the convolution, whose bias is the shift.

This module imports triton: import it only where triton is installed and its kernels are to run.
"""

# ruff: noqa: N803 - constants of a kernel and sizes of a tensor are capitals, as everywhere in Triton
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from operator import attrgetter, or_
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    'Norms',
    'input_grads',
    'moments',
    'norm_act',
    'norm_act_grads',
    'norm_act_moments',
    'norm_relu_rows',
    'norm_relu_rows_grads',
    'select',
    'statistics',
    'weigh_moments',
]

# Programs to spread a reduction over: about eight of four warps for every multiprocessor of an H100. Reductions of
# more programs than that gain nothing from splitting an image's map.
_PROGRAMS = 1024
# Elements of a tile; half of them for more than two branches, for want of registers: a reduction keeps two float32
# accumulators per branch and element there.
_REDUCTION_TILE = 2048
_ELEMENTWISE_TILE = 4096
# 64 channels of two bytes are one 128-byte line.
_CHANNELS_LAST_BLOCK_C = 64
_CONTIGUOUS_BLOCK_HW = 256
# Elements of an image from which on places in it take 64 bits.
_WIDE = 2**31
_ROWS_BLOCK_B = 64
_ROWS_BLOCK_D = 16


# The norms of M branches as kernels take them, a plain tuple since a class costs a call:
# - scales, shifts, means and spreads, as many of each as the kernel has pointers for; those beyond M are never read.
#   The first mean and spread are (M, C) statistics where the norm is 'batch', a spread being 1 / sqrt(variance + eps);
#   else all are (C,), running means and variances;
# - eps, added to running variances;
# - NORM: 'batch', 'running' or 'folded'.
Norms = tuple[Sequence[Tensor], float, str]


@triton.jit
def _pick(p0, p1, p2, p3, m: tl.constexpr):
    p = p0
    if m == 1:
        p = p1
    if m == 2:
        p = p2
    if m == 3:
        p = p3
    return p


@triton.jit
def _place(C, HW, rows, splits, BLOCK_C: tl.constexpr, WIDE: tl.constexpr):
    """This program's image, split, channels, their mask, and the range of its positions; int64 where WIDE."""
    pid = tl.program_id(0)
    c_blocks = tl.cdiv(C, BLOCK_C)
    channels = (pid % c_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = (pid // c_blocks) % splits
    image = (pid // (c_blocks * splits)).to(tl.int64)
    start = split * rows
    if WIDE:
        channels = channels.to(tl.int64)
        start = split.to(tl.int64) * rows
    return image, split, channels, channels < C, start, tl.minimum(start + rows, HW)


@triton.jit
def _tile(
    C, HW, stride_hw, stride_c, splits, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """A program's one tile: its image, where that starts, channels, their mask, the tile's offsets, and their mask."""
    image, _, channels, c_mask, start, end = _place(C, HW, BLOCK_HW, splits, BLOCK_C, WIDE)
    hw = start + tl.arange(0, BLOCK_HW)
    offsets = hw[:, None] * stride_hw + channels[None, :] * stride_c
    return image, image * C * HW, channels, c_mask, offsets, (hw < end)[:, None] & c_mask[None, :]


@triton.jit
def _affine(
    w0, w1, w2, w3, b0, b1, b2, b3, mean0, mean1, mean2, mean3, spread0, spread1, spread2, spread3,
    m: tl.constexpr, eps, C, channels, c_mask, NORM: tl.constexpr,
):  # fmt: skip
    """mean, w * invstd, b and invstd of branch m: z = (y - mean) * (w * invstd) + b."""
    b = tl.load(_pick(b0, b1, b2, b3, m) + channels, mask=c_mask, other=0.0).to(tl.float32)
    if NORM == 'folded':
        return tl.zeros_like(b), tl.full(b.shape, 1.0, tl.float32), b, tl.full(b.shape, 1.0, tl.float32)
    w = tl.load(_pick(w0, w1, w2, w3, m) + channels, mask=c_mask, other=0.0).to(tl.float32)
    if NORM == 'batch':
        mu = tl.load(mean0 + m * C + channels, mask=c_mask, other=0.0).to(tl.float32)
        inv = tl.load(spread0 + m * C + channels, mask=c_mask, other=0.0).to(tl.float32)
    else:
        mu = tl.load(_pick(mean0, mean1, mean2, mean3, m) + channels, mask=c_mask, other=0.0).to(tl.float32)
        var = tl.load(_pick(spread0, spread1, spread2, spread3, m) + channels, mask=c_mask, other=0.0).to(tl.float32)
        inv = 1.0 / tl.sqrt(var + eps)
    return mu, w * inv, b, inv


@triton.jit(do_not_specialize=['HW', 'rows', 'splits'])
def _statistics_kernel(
    y0, y1, y2, y3, partials, C, HW, stride_hw, stride_c, rows, splits,
    M: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """partials (B * splits, 2, M, C): the mean over this program's positions, and the squared deviations from it.

    Sums are of differences from the first value: squares of the values themselves would cancel where a mean is
    large beside its standard deviation.
    """
    image, split, channels, c_mask, start, end = _place(C, HW, rows, splits, BLOCK_C, WIDE)
    for m in tl.static_range(M):
        y = _pick(y0, y1, y2, y3, m) + image * C * HW + channels * stride_c
        shift = tl.load(y + start * stride_hw, mask=c_mask, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
        squares = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
        for i in range(start, end, BLOCK_HW):
            hw = i + tl.arange(0, BLOCK_HW)
            mask = (hw < end)[:, None] & c_mask[None, :]
            value = tl.load(y[None, :] + hw[:, None] * stride_hw, mask=mask, other=0.0).to(tl.float32)
            value = tl.where(mask, value - shift[None, :], 0.0)
            total += value
            squares += value * value
        difference = tl.sum(total, 0) / (end - start)
        deviations = tl.maximum(tl.sum(squares, 0) - tl.sum(total, 0) * difference, 0.0)
        partial = partials + (image * splits + split) * (2 * M * C) + m * C + channels
        tl.store(partial, shift + difference, mask=c_mask)
        tl.store(partial + M * C, deviations, mask=c_mask)


@triton.jit(do_not_specialize=['HW', 'rows', 'splits', 'num_partials', 'count', 'momentum'])
def _merge_statistics_kernel(
    partials, mean, invstd, mean0, mean1, mean2, mean3, var0, var1, var2, var3,
    C, HW, rows, splits, num_partials, count, eps, momentum,
    HAS_RUNNING: tl.constexpr, M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merge :func:`_statistics_kernel`'s partials (Chan, Golub and LeVeque 1983) into (M, C) statistics."""
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = channels < C
    for m in tl.static_range(M):
        at = m * C + channels
        shift = tl.load(partials + at, mask=c_mask, other=0.0)[None, :]
        total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for i in range(0, num_partials, BLOCK_P):
            p = i + tl.arange(0, BLOCK_P)
            mask = (p < num_partials)[:, None] & c_mask[None, :]
            weight = tl.minimum(rows, HW - (p % splits) * rows).to(tl.float32)[:, None]
            at_p = partials + p.to(tl.int64)[:, None] * (2 * M * C) + at[None, :]
            total += tl.where(mask, weight * (tl.load(at_p, mask=mask, other=0.0) - shift), 0.0)
        centre = shift + (tl.sum(total, 0) / count)[None, :]
        deviations = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for i in range(0, num_partials, BLOCK_P):
            p = i + tl.arange(0, BLOCK_P)
            mask = (p < num_partials)[:, None] & c_mask[None, :]
            weight = tl.minimum(rows, HW - (p % splits) * rows).to(tl.float32)[:, None]
            at_p = partials + p.to(tl.int64)[:, None] * (2 * M * C) + at[None, :]
            difference = tl.load(at_p, mask=mask, other=0.0) - centre
            within = tl.load(at_p + M * C, mask=mask, other=0.0)
            deviations += tl.where(mask, within + weight * difference * difference, 0.0)
        variance = tl.sum(deviations, 0) / count
        found = tl.sum(centre, 0)
        tl.store(mean + at, found, mask=c_mask)
        tl.store(invstd + at, 1.0 / tl.sqrt(variance + eps), mask=c_mask)
        if HAS_RUNNING:
            unbiased = variance * (count / (count - 1.0))
            _update(_pick(mean0, mean1, mean2, mean3, m) + channels, found, momentum, c_mask)
            _update(_pick(var0, var1, var2, var3, m) + channels, unbiased, momentum, c_mask)


@triton.jit
def _update(running, value, momentum, mask):
    old = tl.load(running, mask=mask, other=0.0).to(tl.float32)
    tl.store(running, (old + momentum * (value - old)).to(running.dtype.element_ty), mask=mask)


@triton.jit
def _add_moments(p, q, y, offsets, mask, g, mu, scale, b):
    deviation = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32) - mu[None, :]
    live = tl.where(mask, tl.where(deviation * scale[None, :] + b[None, :] <= 0, 0.0, g), 0.0)
    return p + live, q + live * deviation


@triton.jit
def _store_moments(
    partials, p, q, scale, b, inv, m: tl.constexpr, image, split, images, channels, c_mask, C, M: tl.constexpr
):
    """Write branch m's two moments; returns the sum of g * u_m that they make."""
    p = tl.sum(p, 0)
    q = tl.sum(q, 0)
    at = partials + ((split.to(tl.int64) * 2 * images + image) * M + m) * C + channels
    tl.store(at, p, mask=c_mask)
    tl.store(at + images.to(tl.int64) * M * C, q * inv, mask=c_mask)
    return scale * q + b * p


@triton.jit(do_not_specialize=['images', 'HW', 'rows', 'splits'])
def _moments_kernel(
    y0, y1, y2, y3, w0, w1, w2, w3, bias0, bias1, bias2, bias3, mean0, mean1, mean2, mean3,
    spread0, spread1, spread2, spread3, grad, partials, values, eps,
    images, C, HW, stride_hw, stride_c, rows, splits,
    HAS_GRAD: tl.constexpr, NORM: tl.constexpr, M: tl.constexpr,
    BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """partials (splits, 2, B, M, C) and values: (splits, B, M, C) with a gradient, (splits, B, C) without."""
    image, split, channels, c_mask, start, end = _place(C, HW, rows, splits, BLOCK_C, WIDE)
    base = image * C * HW
    # Accumulators by name: a loop cannot carry a list. Those that M leaves unused cost nothing.
    zero = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    p0, p1, p2, p3 = zero, zero, zero, zero
    q0, q1, q2, q3 = zero, zero, zero, zero
    mu0, scale0, b0, inv0 = _affine(
        w0, w1, w2, w3, bias0, bias1, bias2, bias3, mean0, mean1, mean2, mean3, spread0, spread1, spread2, spread3,
        0, eps, C, channels, c_mask, NORM,
    )  # fmt: skip
    mu1, scale1, b1, inv1 = _affine(
        w0, w1, w2, w3, bias0, bias1, bias2, bias3, mean0, mean1, mean2, mean3, spread0, spread1, spread2, spread3,
        1 if M > 1 else 0, eps, C, channels, c_mask, NORM,
    )  # fmt: skip
    mu2, scale2, b2, inv2 = _affine(
        w0, w1, w2, w3, bias0, bias1, bias2, bias3, mean0, mean1, mean2, mean3, spread0, spread1, spread2, spread3,
        2 if M > 2 else 0, eps, C, channels, c_mask, NORM,
    )  # fmt: skip
    mu3, scale3, b3, inv3 = _affine(
        w0, w1, w2, w3, bias0, bias1, bias2, bias3, mean0, mean1, mean2, mean3, spread0, spread1, spread2, spread3,
        3 if M > 3 else 0, eps, C, channels, c_mask, NORM,
    )  # fmt: skip
    for i in range(start, end, BLOCK_HW):
        hw = i + tl.arange(0, BLOCK_HW)
        mask = (hw < end)[:, None] & c_mask[None, :]
        offsets = hw[:, None] * stride_hw + channels[None, :] * stride_c
        if HAS_GRAD:
            g = tl.load(grad + base + offsets, mask=mask, other=0.0).to(tl.float32)
        else:
            g = tl.full([BLOCK_HW, BLOCK_C], 1.0, tl.float32)
        p0, q0 = _add_moments(p0, q0, y0 + base, offsets, mask, g, mu0, scale0, b0)
        if M > 1:
            p1, q1 = _add_moments(p1, q1, y1 + base, offsets, mask, g, mu1, scale1, b1)
        if M > 2:
            p2, q2 = _add_moments(p2, q2, y2 + base, offsets, mask, g, mu2, scale2, b2)
        if M > 3:
            p3, q3 = _add_moments(p3, q3, y3 + base, offsets, mask, g, mu3, scale3, b3)

    pooled = tl.zeros([BLOCK_C], tl.float32)
    at = values + (split.to(tl.int64) * images + image) * C + channels
    at_m = values + (split.to(tl.int64) * images + image) * M * C + channels
    for m in tl.static_range(M):
        p = _pick(p0, p1, p2, p3, m)
        q = _pick(q0, q1, q2, q3, m)
        scale = _pick(scale0, scale1, scale2, scale3, m)
        b = _pick(b0, b1, b2, b3, m)
        inv = _pick(inv0, inv1, inv2, inv3, m)
        value = _store_moments(partials, p, q, scale, b, inv, m, image, split, images, channels, c_mask, C, M)
        pooled += value
        if HAS_GRAD:
            tl.store(at_m + m * C, value, mask=c_mask)
    if not HAS_GRAD:
        tl.store(at, pooled / HW, mask=c_mask)


@triton.jit(do_not_specialize=['HW', 'splits'])
def _select_kernel(
    y0, y1, y2, y3, w0, w1, w2, w3, b0, b1, b2, b3, mean0, mean1, mean2, mean3, spread0, spread1, spread2, spread3,
    out, attention, attention_b, attention_m, attention_c, eps, C, HW, stride_hw, stride_c, splits,
    ATTENDS: tl.constexpr, NORM: tl.constexpr, M: tl.constexpr,
    BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    image, base, channels, c_mask, offsets, mask = _tile(C, HW, stride_hw, stride_c, splits, BLOCK_HW, BLOCK_C, WIDE)
    total = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    for m in tl.static_range(M):
        mu, scale, b, _ = _affine(
            w0, w1, w2, w3, b0, b1, b2, b3, mean0, mean1, mean2, mean3, spread0, spread1, spread2, spread3,
            m, eps, C, channels, c_mask, NORM,
        )  # fmt: skip
        y = tl.load(_pick(y0, y1, y2, y3, m) + base + offsets, mask=mask, other=0.0).to(tl.float32)
        z = (y - mu[None, :]) * scale[None, :] + b[None, :]
        u = tl.where(z <= 0, 0.0, z)
        if ATTENDS:
            a = attention + image * attention_b + m * attention_m + channels * attention_c
            u = u * tl.load(a, mask=c_mask, other=0.0).to(tl.float32)[None, :]
        total += u
    tl.store(out + base + offsets, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['HW', 'splits', 'count'])
def _input_grads_kernel(
    y0, y1, y2, y3, w0, w1, w2, w3, b0, b1, b2, b3, mean0, mean1, mean2, mean3, spread0, spread1, spread2, spread3,
    x0, x1, x2, x3, grad, slope, level, sums, slope_b, slope_m, slope_c, eps, count,
    C, HW, stride_hw, stride_c, splits,
    ATTENDS: tl.constexpr, NORM: tl.constexpr, M: tl.constexpr,
    BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    image, base, channels, c_mask, offsets, mask = _tile(C, HW, stride_hw, stride_c, splits, BLOCK_HW, BLOCK_C, WIDE)
    g = tl.load(grad + base + offsets, mask=mask, other=0.0).to(tl.float32)
    if ATTENDS:
        constant = tl.load(level + image * C + channels, mask=c_mask, other=0.0).to(tl.float32)[None, :]
    for m in tl.static_range(M):
        mu, scale, b, inv = _affine(
            w0, w1, w2, w3, b0, b1, b2, b3, mean0, mean1, mean2, mean3, spread0, spread1, spread2, spread3,
            m, eps, C, channels, c_mask, NORM,
        )  # fmt: skip
        y = tl.load(_pick(y0, y1, y2, y3, m) + base + offsets, mask=mask, other=0.0).to(tl.float32)
        deviation = y - mu[None, :]
        g_z = g
        if ATTENDS:
            a = slope + image * slope_b + m * slope_m + channels * slope_c
            g_z = constant + g * tl.load(a, mask=c_mask, other=0.0).to(tl.float32)[None, :]
        g_z = tl.where(deviation * scale[None, :] + b[None, :] <= 0, 0.0, g_z)
        if NORM == 'batch':
            p = tl.load(sums + m * C + channels, mask=c_mask, other=0.0).to(tl.float32) / count
            q = tl.load(sums + (M + m) * C + channels, mask=c_mask, other=0.0).to(tl.float32) / count
            g_z -= p[None, :] + deviation * (q * inv)[None, :]
        x = _pick(x0, x1, x2, x3, m)
        tl.store(x + base + offsets, (g_z * scale[None, :]).to(x.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['images'])
def _weigh_moments_kernel(
    attention, given, level, pooled, sums, attention_b, attention_m, attention_c, images, C,
    ATTENDS: tl.constexpr, M: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sums (2, M, C) over the images of a * given + level * pooled, both (2, B, M, C)."""
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = tl.program_id(1) % M
    which = tl.program_id(1) // M
    c_mask = channels < C
    total = tl.zeros([BLOCK_B, BLOCK_C], tl.float32)
    for i in range(0, images, BLOCK_B):
        image = (i + tl.arange(0, BLOCK_B)).to(tl.int64)
        mask = (image < images)[:, None] & c_mask[None, :]
        at = ((which * images + image) * M + m)[:, None] * C + channels[None, :]
        value = tl.load(given + at, mask=mask, other=0.0)
        if ATTENDS:
            a = attention + image[:, None] * attention_b + m * attention_m + channels[None, :] * attention_c
            value = value * tl.load(a, mask=mask, other=0.0).to(tl.float32)
            constant = tl.load(level + image[:, None] * C + channels[None, :], mask=mask, other=0.0).to(tl.float32)
            value += constant * tl.load(pooled + at, mask=mask, other=0.0)
        total += value
    tl.store(sums + (which * M + m) * C + channels, tl.sum(total, 0), mask=c_mask)


@triton.jit(do_not_specialize=['HW', 'splits'])
def _norm_act_kernel(
    y0, y1, w0, w1, b0, b1, mean0, mean1, spread0, spread1, shortcut, out, eps, C, HW, stride_hw, stride_c, splits,
    RELU: tl.constexpr, HAS_SHORTCUT: tl.constexpr, NORM: tl.constexpr, M: tl.constexpr,
    BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    _, base, channels, c_mask, offsets, mask = _tile(C, HW, stride_hw, stride_c, splits, BLOCK_HW, BLOCK_C, WIDE)
    total = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    for m in tl.static_range(M):
        mu, scale, b, _ = _affine(
            w0, w1, w0, w0, b0, b1, b0, b0, mean0, mean1, mean0, mean0, spread0, spread1, spread0, spread0,
            m, eps, C, channels, c_mask, NORM,
        )  # fmt: skip
        y = tl.load(_pick(y0, y1, y0, y0, m) + base + offsets, mask=mask, other=0.0).to(tl.float32)
        total += (y - mu[None, :]) * scale[None, :] + b[None, :]
    if HAS_SHORTCUT:
        total += tl.load(shortcut + base + offsets, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        total = tl.where(total <= 0, 0.0, total)
    tl.store(out + base + offsets, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _live(grad, out, y, offsets, mask, mu, scale, b, RELU: tl.constexpr, HAS_OUT: tl.constexpr):
    """The gradient where the ReLU was open: by its output, or by the only norm's result, computed again."""
    g = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        if HAS_OUT:
            g = tl.where(tl.load(out + offsets, mask=mask, other=0.0) <= 0, 0.0, g)
        else:
            deviation = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32) - mu[None, :]
            g = tl.where(mask, tl.where(deviation * scale[None, :] + b[None, :] <= 0, 0.0, g), 0.0)
    return g


@triton.jit(do_not_specialize=['HW', 'rows', 'splits'])
def _norm_act_moments_kernel(
    y0, y1, w0, w1, b0, b1, mean0, mean1, spread0, spread1, grad, out, partials, eps,
    C, HW, stride_hw, stride_c, rows, splits,
    RELU: tl.constexpr, HAS_OUT: tl.constexpr, NORM: tl.constexpr, M: tl.constexpr,
    BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """partials (B * splits, 1 + M, C): sums of the live gradient, and of it times xhat_m."""
    image, split, channels, c_mask, start, end = _place(C, HW, rows, splits, BLOCK_C, WIDE)
    base = image * C * HW
    p = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    q0, q1 = p, p
    mu0, scale, b, inv0 = _affine(
        w0, w1, w0, w0, b0, b1, b0, b0, mean0, mean1, mean0, mean0, spread0, spread1, spread0, spread0,
        0, eps, C, channels, c_mask, NORM,
    )  # fmt: skip
    mu1, _, _, inv1 = _affine(
        w0, w1, w0, w0, b0, b1, b0, b0, mean0, mean1, mean0, mean0, spread0, spread1, spread0, spread0,
        1 if M > 1 else 0, eps, C, channels, c_mask, NORM,
    )  # fmt: skip
    for i in range(start, end, BLOCK_HW):
        hw = i + tl.arange(0, BLOCK_HW)
        mask = (hw < end)[:, None] & c_mask[None, :]
        offsets = base + hw[:, None] * stride_hw + channels[None, :] * stride_c
        g = _live(grad, out, y0, offsets, mask, mu0, scale, b, RELU, HAS_OUT)
        p += g
        q0 += g * (tl.load(y0 + offsets, mask=mask, other=0.0).to(tl.float32) - mu0[None, :])
        if M > 1:
            q1 += g * (tl.load(y1 + offsets, mask=mask, other=0.0).to(tl.float32) - mu1[None, :])
    at = partials + (image * splits + split) * ((1 + M) * C) + channels
    tl.store(at, tl.sum(p, 0), mask=c_mask)
    tl.store(at + C, tl.sum(q0, 0) * inv0, mask=c_mask)
    if M > 1:
        tl.store(at + 2 * C, tl.sum(q1, 0) * inv1, mask=c_mask)


@triton.jit(do_not_specialize=['HW', 'splits', 'count'])
def _norm_act_grads_kernel(
    y0, y1, w0, w1, b0, b1, mean0, mean1, spread0, spread1, grad, out, x0, x1, grad_shortcut, sums, eps, count,
    C, HW, stride_hw, stride_c, splits,
    RELU: tl.constexpr, HAS_OUT: tl.constexpr, HAS_SHORTCUT: tl.constexpr, NORM: tl.constexpr, M: tl.constexpr,
    BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    _, base, channels, c_mask, offsets, mask = _tile(C, HW, stride_hw, stride_c, splits, BLOCK_HW, BLOCK_C, WIDE)
    mu, scale, b, inv = _affine(
        w0, w1, w0, w0, b0, b1, b0, b0, mean0, mean1, mean0, mean0, spread0, spread1, spread0, spread0,
        0, eps, C, channels, c_mask, NORM,
    )  # fmt: skip
    g = _live(grad + base, out + base, y0 + base, offsets, mask, mu, scale, b, RELU, HAS_OUT)
    if HAS_SHORTCUT:
        tl.store(grad_shortcut + base + offsets, g.to(grad_shortcut.dtype.element_ty), mask=mask)
    p = tl.zeros([BLOCK_C], tl.float32)
    if NORM == 'batch':
        p = tl.load(sums + channels, mask=c_mask, other=0.0) / count
    for m in tl.static_range(M):
        mu, scale, b, inv = _affine(
            w0, w1, w0, w0, b0, b1, b0, b0, mean0, mean1, mean0, mean0, spread0, spread1, spread0, spread0,
            m, eps, C, channels, c_mask, NORM,
        )  # fmt: skip
        g_z = g
        if NORM == 'batch':
            y = tl.load(_pick(y0, y1, y0, y0, m) + base + offsets, mask=mask, other=0.0).to(tl.float32)
            q = tl.load(sums + (1 + m) * C + channels, mask=c_mask, other=0.0) / count
            g_z = g - p[None, :] - (y - mu[None, :]) * (q * inv)[None, :]
        x = _pick(x0, x1, x0, x0, m)
        tl.store(x + base + offsets, (g_z * scale[None, :]).to(x.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['rows', 'momentum'])
def _norm_relu_rows_kernel(
    r, weight, bias, running_mean, running_var, z, mean, invstd, rows, D, eps, momentum,
    BATCH: tl.constexpr, HAS_RUNNING: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """ReLU(BN(r)) of (rows, D): by the statistics of the rows, or by running ones."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_mask = d < D
    if BATCH:
        total = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
        for i in range(0, rows, BLOCK_B):
            row = (i + tl.arange(0, BLOCK_B)).to(tl.int64)
            mask = (row < rows)[:, None] & d_mask[None, :]
            total += tl.load(r + row[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        mu = tl.sum(total, 0) / rows
        squares = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
        for i in range(0, rows, BLOCK_B):
            row = (i + tl.arange(0, BLOCK_B)).to(tl.int64)
            mask = (row < rows)[:, None] & d_mask[None, :]
            value = tl.load(r + row[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
            value = tl.where(mask, value - mu[None, :], 0.0)
            squares += value * value
        variance = tl.sum(squares, 0) / rows
        inv = 1.0 / tl.sqrt(variance + eps)
        tl.store(mean + d, mu, mask=d_mask)
        tl.store(invstd + d, inv, mask=d_mask)
        if HAS_RUNNING:
            _update(running_mean + d, mu, momentum, d_mask)
            _update(running_var + d, variance * (rows / (rows - 1.0)), momentum, d_mask)
    else:
        mu = tl.load(running_mean + d, mask=d_mask, other=0.0).to(tl.float32)
        inv = 1.0 / tl.sqrt(tl.load(running_var + d, mask=d_mask, other=0.0).to(tl.float32) + eps)
        tl.store(mean + d, mu, mask=d_mask)
        tl.store(invstd + d, inv, mask=d_mask)
    scale = inv * tl.load(weight + d, mask=d_mask, other=0.0).to(tl.float32)
    b = tl.load(bias + d, mask=d_mask, other=0.0).to(tl.float32)
    for i in range(0, rows, BLOCK_B):
        row = (i + tl.arange(0, BLOCK_B)).to(tl.int64)
        mask = (row < rows)[:, None] & d_mask[None, :]
        at = row[:, None] * D + d[None, :]
        value = (tl.load(r + at, mask=mask, other=0.0).to(tl.float32) - mu[None, :]) * scale[None, :] + b[None, :]
        tl.store(z + at, tl.where(value <= 0, 0.0, value), mask=mask)


@triton.jit(do_not_specialize=['rows'])
def _norm_relu_rows_grads_kernel(
    grad, z, r, weight, mean, invstd, grad_r, grad_weight, grad_bias, rows, D,
    BATCH: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_mask = d < D
    mu = tl.load(mean + d, mask=d_mask, other=0.0)[None, :]
    inv = tl.load(invstd + d, mask=d_mask, other=0.0)[None, :]
    scale = inv * tl.load(weight + d, mask=d_mask, other=0.0).to(tl.float32)[None, :]
    p = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    q = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for i in range(0, rows, BLOCK_B):
        row = (i + tl.arange(0, BLOCK_B)).to(tl.int64)
        mask = (row < rows)[:, None] & d_mask[None, :]
        at = row[:, None] * D + d[None, :]
        g = tl.where(tl.load(z + at, mask=mask, other=0.0) <= 0, 0.0, tl.load(grad + at, mask=mask, other=0.0))
        p += g
        q += g * (tl.load(r + at, mask=mask, other=0.0).to(tl.float32) - mu) * inv
    sum_p = tl.sum(p, 0)
    sum_q = tl.sum(q, 0)
    tl.store(grad_bias + d, sum_p, mask=d_mask)
    tl.store(grad_weight + d, sum_q, mask=d_mask)
    for i in range(0, rows, BLOCK_B):
        row = (i + tl.arange(0, BLOCK_B)).to(tl.int64)
        mask = (row < rows)[:, None] & d_mask[None, :]
        at = row[:, None] * D + d[None, :]
        g = tl.where(tl.load(z + at, mask=mask, other=0.0) <= 0, 0.0, tl.load(grad + at, mask=mask, other=0.0))
        if BATCH:
            xhat = (tl.load(r + at, mask=mask, other=0.0).to(tl.float32) - mu) * inv
            g = g - (sum_p / rows)[None, :] - xhat * (sum_q / rows)[None, :]
        tl.store(grad_r + at, g * scale, mask=mask)


# By all that a launch consists of but addresses: Triton's launcher, with what it takes before and after them.
_launchers: dict[tuple, tuple] = {}
_MOST_LAUNCHERS = 10_000  # as sizes of images change, so do launches
_address, _dtype = Tensor.data_ptr, attrgetter('dtype')


def launch(
    kernel: Any, grid: tuple[int, ...], tensors: Sequence[Tensor], numbers: Sequence[float], **constants: Any
) -> None:
    """The one place from which kernels start.

    At every launch Triton looks at each argument's type, alignment and divisibility to find the compiled kernel, which
    takes the host longer than all else that a unit does. What it found is kept here for launches of the same kind.
    """
    addresses = list(map(_address, tensors))
    device = tensors[0].get_device()
    if device < 0 or reduce(or_, addresses) % 16:  # not on a GPU; or beside what kernels are compiled for
        launched = getattr(_collecting, 'launched', None)
        if launched is None:
            kernel[grid](*tensors, *numbers, **constants)
        else:
            launched.append((kernel, grid, tensors, numbers, constants))
        return
    key = kernel.fn, device, grid, *numbers, *constants.values(), *map(_dtype, tensors)
    launcher = _launchers.get(key)
    if launcher is None:
        launcher = _launchers[key] = _prepare(kernel, grid, tensors, numbers, constants)
    if not launcher:
        kernel[grid](*tensors, *numbers, **constants)
        return
    run, x, y, stream, function, packed, rest, _ = launcher
    run(x, y, 1, stream(device), function, packed, None, None, None, *addresses, *rest)


_collecting = threading.local()  # a thread's launches, while they are collected


def compile_launched(function: Callable[[], object], device: torch.device) -> None:
    """Compile for ``device``, in parallel, what ``function`` launches on CPU tensors, for which nothing is computed.

    Most of a compilation is outside Python.
    """
    _collecting.launched = []
    try:
        function()
    finally:
        launched = _collecting.__dict__.pop('launched')
    kinds = {(launch[0].fn, *map(_dtype, launch[2]), *launch[4].values()): launch for launch in launched}

    def compile_one(launch: tuple) -> None:
        kernel, grid, tensors, numbers, constants = launch
        with torch.cuda.device(device):
            kernel.warmup(*tensors, *numbers, grid=grid, **constants)

    with ThreadPoolExecutor(8) as executor:
        list(executor.map(compile_one, kinds.values()))


def _prepare(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[Tensor],
    numbers: Sequence[float],
    constants: dict[str, Any],
) -> tuple:
    """A launcher; empty where Triton is not as it is known, or the GPU of another kind: its own launch is taken."""
    if len(_launchers) >= _MOST_LAUNCHERS:
        _launchers.clear()
    driver = triton.runtime.driver.active
    try:
        if driver.get_current_target().backend != 'cuda':
            return ()
        compiled = kernel.warmup(*tensors, *numbers, grid=grid, **constants)
        launcher = compiled.run, *grid, *[1] * (2 - len(grid)), driver.get_current_stream
        names = kernel.arg_names[len(tensors) + len(numbers) :]
        launcher += compiled.function, compiled.packed_metadata, (*numbers, *map(constants.__getitem__, names))
    except (AttributeError, KeyError):
        return ()
    return *launcher, compiled  # which is unloaded once nobody has it


def statistics(
    ys: Sequence[Tensor], eps: float, momentum: float, running: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of every channel of every branch, each (M, C) float32.

    ``running`` means and variances, a pair for every branch or none at all, are updated.
    """
    y, num = ys[0], len(ys)
    layout = (y.shape, y.stride(), _REDUCTION_TILE, True)
    grid, place, blocks = _layouts.get(layout) or _lay_out(y, layout)
    channels, positions, _, _, rows, splits = place
    batch = y.shape[0]
    partials = y.new_empty((batch * splits, 2, num, channels), dtype=torch.float32)
    mean = y.new_empty((num, channels), dtype=torch.float32)
    invstd = torch.empty_like(mean)
    ys = [*ys, *[y] * (4 - num)]
    launch(_statistics_kernel, grid, [*ys, partials], place, M=num, **blocks, num_warps=4)
    means, variances = zip(*running) if running else ((mean,), (mean,))
    pads = 4 - len(means)
    # Eight channels are a 32-byte sector, and few enough to spread the merge over many programs.
    launch(
        _merge_statistics_kernel, (-(-channels // 8),),
        [partials, mean, invstd, *means, *means[:1] * pads, *variances, *variances[:1] * pads],
        [channels, positions, rows, splits, batch * splits, float(batch * positions), eps, momentum],
        HAS_RUNNING=bool(running), M=num, BLOCK_P=128, BLOCK_C=8, num_warps=4,
    )  # fmt: skip
    return mean, invstd


def moments(ys: Sequence[Tensor], norms: Norms, grad: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sums over each map of [z > 0] g and [z > 0] g xhat (2, B, M, C), and what they make of u, in one pass.

    With a gradient g (B, C, H, W) that is the sum of g u_m, (B, M, C); without, g is 1 and it is s, (B, C).
    """
    y, num = ys[0], len(ys)
    layout = (y.shape, y.stride(), _REDUCTION_TILE if num <= 2 else _REDUCTION_TILE // 2, True)
    grid, place, blocks = _layouts.get(layout) or _lay_out(y, layout)
    pointers, eps, norm = norms
    batch, channels, splits = y.shape[0], place[0], place[-1]
    partials = y.new_empty((splits, 2, batch, num, channels), dtype=torch.float32)
    of_maps = (splits, batch, channels) if grad is None else (splits, batch, num, channels)
    values = y.new_empty(of_maps, dtype=torch.float32)
    launch(
        _moments_kernel, grid,
        [*ys, *[y] * (4 - num), *pointers, y if grad is None else grad, partials, values], [eps, batch, *place],
        HAS_GRAD=grad is not None, NORM=norm, M=num, **blocks, num_warps=4,
    )  # fmt: skip
    return (partials[0], values[0]) if splits == 1 else (partials.sum(0), values.sum(0))


def select(ys: Sequence[Tensor], norms: Norms, attention: Tensor | None) -> Tensor:
    """V (B, C, H, W), the sum of relu(z_m), weighted where there is an attention (B, M, C or 1)."""
    y, num = ys[0], len(ys)
    layout = (y.shape, y.stride(), _ELEMENTWISE_TILE if num <= 2 else _ELEMENTWISE_TILE // 2, False)
    grid, place, blocks = _layouts.get(layout) or _lay_out(y, layout)
    pointers, eps, norm = norms
    out = torch.empty_like(y)
    given, strides = _strides(attention, y)
    launch(
        _select_kernel, grid, [*ys, *[y] * (4 - num), *pointers, out, given], [*strides, eps, *place],
        ATTENDS=attention is not None, NORM=norm, M=num, **blocks, num_warps=8,
    )  # fmt: skip
    return out


def weigh_moments(given: Tensor, attention: Tensor | None, level: Tensor | None, pooled: Tensor | None) -> Tensor:
    """Sums over the images of attention * given + level * pooled, (2, B, M, C) both: (2, M, C).

    They are the gradients of the norms' shifts and scales. Without attention they are the sums of ``given``.
    """
    _, images, num, channels = given.shape
    sums = given.new_empty((2, num, channels))
    weights, strides = _strides(attention, given)
    attends = attention is not None
    launch(
        _weigh_moments_kernel, (-(-channels // 64), 2 * num),
        [weights, given, level if attends else given, pooled if attends else given, sums], [*strides, images, channels],
        ATTENDS=attends, M=num, BLOCK_B=32, BLOCK_C=64, num_warps=4,
    )  # fmt: skip
    return sums


def input_grads(
    ys: Sequence[Tensor], norms: Norms, grad: Tensor, attention: Tensor | None, level: Tensor | None, sums: Tensor
) -> list[Tensor]:
    """w invstd ([z > 0] (attention grad + level) - sums[0] / N - sums[1] xhat / N) for every branch, in ``ys``' dtype.

    The terms with ``sums`` (2, M, C) are for statistics of the batch alone.
    """
    y, num = ys[0], len(ys)
    layout = (y.shape, y.stride(), _ELEMENTWISE_TILE if num <= 2 else _ELEMENTWISE_TILE // 2, False)
    grid, place, blocks = _layouts.get(layout) or _lay_out(y, layout)
    pointers, eps, norm = norms
    grads = list(map(torch.empty_like, ys))
    given, strides = _strides(attention, y)
    pads = 4 - num
    launch(
        _input_grads_kernel, grid,
        [*ys, *[y] * pads, *pointers, *grads, *grads[:1] * pads, grad, given, y if level is None else level, sums],
        [*strides, eps, float(y.shape[0] * place[1]), *place],
        ATTENDS=attention is not None, NORM=norm, M=num, **blocks, num_warps=8,
    )  # fmt: skip
    return grads


def norm_act(ys: Sequence[Tensor], norms: Norms, shortcut: Tensor | None, relu: bool) -> Tensor:
    """act(sum_m BN_m(y_m) + shortcut), (B, C, H, W), of one norm or of two."""
    y = ys[0]
    layout = (y.shape, y.stride(), _ELEMENTWISE_TILE, False)
    grid, place, blocks = _layouts.get(layout) or _lay_out(y, layout)
    pointers, eps, norm = norms
    out = torch.empty_like(y)
    launch(
        _norm_act_kernel, grid, [y, ys[-1], *pointers, y if shortcut is None else shortcut, out], [eps, *place],
        RELU=relu, HAS_SHORTCUT=shortcut is not None, NORM=norm, M=len(ys), **blocks, num_warps=8,
    )  # fmt: skip
    return out


def norm_act_moments(ys: Sequence[Tensor], norms: Norms, grad: Tensor, out: Tensor | None, relu: bool) -> Tensor:
    """Sums of the gradient where the ReLU was open, and of it times xhat_m: (1 + M, C).

    Where ``out``, the ReLU's output, is None, the only norm's result says where it was open.
    """
    y, num = ys[0], len(ys)
    layout = (y.shape, y.stride(), _REDUCTION_TILE, True)
    grid, place, blocks = _layouts.get(layout) or _lay_out(y, layout)
    pointers, eps, norm = norms
    partials = y.new_empty((y.shape[0] * place[-1], 1 + num, place[0]), dtype=torch.float32)
    launch(
        _norm_act_moments_kernel, grid,
        [y, ys[-1], *pointers, grad, y if out is None else out, partials], [eps, *place],
        RELU=relu, HAS_OUT=out is not None, NORM=norm, M=num, **blocks, num_warps=4,
    )  # fmt: skip
    return partials.sum(0)


def norm_act_grads(
    ys: Sequence[Tensor],
    norms: Norms,
    grad: Tensor,
    out: Tensor | None,
    shortcut: Tensor | None,
    sums: Tensor,
    relu: bool,
) -> tuple[list[Tensor], Tensor | None]:
    """The gradients of y_m, and of the shortcut where it is given, all (B, C, H, W)."""
    y = ys[0]
    layout = (y.shape, y.stride(), _ELEMENTWISE_TILE, False)
    grid, place, blocks = _layouts.get(layout) or _lay_out(y, layout)
    pointers, eps, norm = norms
    grads = list(map(torch.empty_like, ys))
    grad_shortcut = None if shortcut is None else torch.empty_like(y, dtype=shortcut.dtype)
    launch(
        _norm_act_grads_kernel, grid,
        [y, ys[-1], *pointers, grad, y if out is None else out, grads[0], grads[-1],
         y if shortcut is None else grad_shortcut, sums],
        [eps, float(y.shape[0] * place[1]), *place],
        RELU=relu, HAS_OUT=out is not None, HAS_SHORTCUT=shortcut is not None, NORM=norm, M=len(ys),
        **blocks, num_warps=8,
    )  # fmt: skip
    return grads, grad_shortcut


def norm_relu_rows(
    r: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: tuple[Tensor, Tensor] | None,
    batch: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """z = ReLU(BN(r)), (B, d) float32, and the mean and 1 / sqrt(variance + eps) it took, (d,).

    ``running`` statistics are updated where ``batch``, else they are what is taken.
    """
    rows, dim = r.shape
    z = torch.empty_like(r)
    mean, invstd = r.new_empty(dim), r.new_empty(dim)
    launch(
        _norm_relu_rows_kernel, (-(-dim // _ROWS_BLOCK_D),),
        [r, weight, bias, *(running or (mean, invstd)), z, mean, invstd], [rows, dim, eps, momentum],
        BATCH=batch, HAS_RUNNING=running is not None, BLOCK_B=_ROWS_BLOCK_B, BLOCK_D=_ROWS_BLOCK_D, num_warps=4,
    )  # fmt: skip
    return z, mean, invstd


def norm_relu_rows_grads(
    grad: Tensor, z: Tensor, r: Tensor, weight: Tensor, mean: Tensor, invstd: Tensor, batch: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of r (B, d), of the scale and of the shift (d,), in float32."""
    rows, dim = r.shape
    grad_r = torch.empty_like(r)
    grad_weight, grad_bias = r.new_empty(dim), r.new_empty(dim)
    launch(
        _norm_relu_rows_grads_kernel, (-(-dim // _ROWS_BLOCK_D),),
        [grad, z, r, weight, mean, invstd, grad_r, grad_weight, grad_bias], [rows, dim],
        BATCH=batch, BLOCK_B=_ROWS_BLOCK_B, BLOCK_D=_ROWS_BLOCK_D, num_warps=4,
    )  # fmt: skip
    return grad_r, grad_weight, grad_bias


# By a map's shape and strides, a tile's elements and whether the kernel sums: its grid, the numbers that place a
# program in the map, and its blocks. Looked up without a call, since there are some twenty launches a unit.
_layouts: dict[tuple, tuple[tuple[int], tuple[int, ...], dict[str, int]]] = {}


def _lay_out(y: Tensor, layout: tuple) -> tuple[tuple[int], tuple[int, ...], dict[str, int]]:
    """``_layouts[layout]``, made. A 1x1 map is dense in both formats, and wide tiles are the better ones for it."""
    _, _, elements, reduces = layout
    batch, channels, height, width = y.shape
    positions = height * width
    if y.is_contiguous(memory_format=torch.channels_last):
        block_c = min(_CHANNELS_LAST_BLOCK_C, _power_of_2(channels))
        block_hw, strides = min(elements // block_c, _power_of_2(positions)), (channels, 1)
    else:
        block_hw = min(_CONTIGUOUS_BLOCK_HW, _power_of_2(positions))
        block_c, strides = min(elements // block_hw, _power_of_2(channels)), (1, positions)
    tiles = -(-positions // block_hw)
    columns = -(-channels // block_c)
    splits = min(tiles, -(-_PROGRAMS // (batch * columns))) if reduces else tiles
    rows = -(-tiles // splits) * block_hw  # positions that a program takes
    splits = -(-positions // rows)
    place = (channels, positions, *strides, rows, splits) if reduces else (channels, positions, *strides, splits)
    blocks = dict(BLOCK_HW=block_hw, BLOCK_C=block_c, WIDE=channels * positions >= _WIDE)
    made = (batch * splits * columns,), place, blocks
    _layouts[layout] = made
    return made


def _power_of_2(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def _strides(attention: Tensor | None, otherwise: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """A pointer and the strides of an image, a branch and a channel of an attention (B, M, C or 1), or of none."""
    if attention is None:
        return otherwise, (0, 0, 0)
    batch, branch, channel = attention.stride()
    return attention, (batch, branch, 0 if attention.shape[2] == 1 else channel)
