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
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu_launch import Launch, compile_launched, launch

__all__ = [
    'Norms',
    'compile_launched',
    'input_grads',
    'launch',
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
_MOST_LAYOUTS = 10_000
_ROWS = dict(BLOCK_B=64, BLOCK_D=16, num_warps=4)


# The norms of M branches as kernels take them, a plain tuple since a class costs a call:
# - the tensors: M scales (C,), M shifts, then one (M, C) mean and one 1 / sqrt(variance + eps) where the norm is
#   'batch', or M running means (C,) and M variances; of a 'folded' norm the M shifts alone;
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
    partials, mean, invstd, mean0, mean1, mean2, mean3, var0, var1, var2, var3, batches0, batches1, batches2, batches3,
    C, HW, rows, splits, num_partials, count, eps, momentum,
    HAS_RUNNING: tl.constexpr, COUNTS: tl.constexpr, M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
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
        if COUNTS:
            _count(_pick(batches0, batches1, batches2, batches3, m))


@triton.jit
def _update(running, value, momentum, mask):
    old = tl.load(running, mask=mask, other=0.0).to(tl.float32)
    tl.store(running, (old + momentum * (value - old)).to(running.dtype.element_ty), mask=mask)


@triton.jit
def _count(batches):
    if tl.program_id(0) == 0:
        tl.store(batches, tl.load(batches) + 1)


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
    r, weight, bias, running_mean, running_var, batches, z, mean, invstd, rows, D, eps, momentum,
    BATCH: tl.constexpr, HAS_RUNNING: tl.constexpr, COUNTS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
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
        if COUNTS:
            _count(batches)
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


def statistics(
    ys: Sequence[Tensor],
    eps: float,
    momentum: float,
    running: Sequence[tuple[Tensor, Tensor]],
    batches: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of every channel of every branch, each (M, C) float32.

    ``running`` means and variances, a pair for every branch or none at all, are updated, and so are the numbers of
    ``batches`` that they have seen.
    """
    y, num = ys[0], len(ys)
    laid = y.shape, y.stride(), _REDUCTION_TILE, True
    layout = _layouts.get(laid) or _lay_out(y, laid)
    partials = y.new_empty((layout.images * layout.splits, 2, num, layout.channels), dtype=torch.float32)
    mean = y.new_empty((num, layout.channels), dtype=torch.float32)
    invstd = torch.empty_like(mean)
    has_running, counts = bool(running), bool(batches)

    def describe() -> Launch:
        return layout.grid, [*_first(0, num), num], layout.place, dict(M=num, **layout.blocks, num_warps=4)

    def describe_merge() -> Launch:
        channels, positions, _, _, rows, splits = layout.place
        images = layout.images
        pointers = [0, 1, 2, *_first(3, num, 2), *_first(4, num, 2)] if has_running else [0, 1, 2, *[1] * 8]
        pointers += _first(3 + 2 * num, num) if counts else [1] * 4
        numbers = [channels, positions, rows, splits, images * splits, float(images * positions), eps, momentum]
        constants = dict(HAS_RUNNING=has_running, COUNTS=counts, M=num, BLOCK_P=128, BLOCK_C=8, num_warps=4)
        # Eight channels are a 32-byte sector, and few enough to spread the merge over many programs.
        return (-(-channels // 8),), pointers, numbers, constants

    launch(_statistics_kernel, [*ys, partials], (layout, num), describe)
    updated = [partials, mean, invstd, *chain.from_iterable(running), *batches]
    launch(_merge_statistics_kernel, updated, (layout, num, eps, momentum, has_running, counts), describe_merge)
    return mean, invstd


def moments(ys: Sequence[Tensor], norms: Norms, grad: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sums over each map of [z > 0] g and [z > 0] g xhat (2, B, M, C), and what they make of u, in one pass.

    With a gradient g (B, C, H, W) that is the sum of g u_m, (B, M, C); without, g is 1 and it is s, (B, C).
    """
    y, num = ys[0], len(ys)
    laid = y.shape, y.stride(), _REDUCTION_TILE if num <= 2 else _REDUCTION_TILE // 2, True
    layout = _layouts.get(laid) or _lay_out(y, laid)
    given, eps, norm = norms
    images, channels, splits = layout.images, layout.channels, layout.splits
    partials = y.new_empty((splits, 2, images, num, channels), dtype=torch.float32)
    tensors = [*ys, *given, partials]
    if grad is None:
        values = y.new_empty((splits, images, channels), dtype=torch.float32)
        tensors.append(values)
    else:
        values = y.new_empty((splits, images, num, channels), dtype=torch.float32)
        tensors += values, grad

    def describe() -> Launch:
        pointers, end = _point(num, norm, 4)
        pointers += [0 if grad is None else end + 2, end, end + 1]
        constants = dict(HAS_GRAD=grad is not None, NORM=norm, M=num, **layout.blocks, num_warps=4)
        return layout.grid, pointers, [eps, images, *layout.place], constants

    launch(_moments_kernel, tensors, (layout, num, norm, eps, grad is None), describe)
    return (partials[0], values[0]) if splits == 1 else (partials.sum(0), values.sum(0))


def select(ys: Sequence[Tensor], norms: Norms, attention: Tensor | None) -> Tensor:
    """V (B, C, H, W), the sum of relu(z_m), weighted where there is an attention (B, M, C or 1)."""
    y, num = ys[0], len(ys)
    laid = y.shape, y.stride(), _ELEMENTWISE_TILE if num <= 2 else _ELEMENTWISE_TILE // 2, False
    layout = _layouts.get(laid) or _lay_out(y, laid)
    given, eps, norm = norms
    out = torch.empty_like(y)
    strides = _strides(attention)

    def describe() -> Launch:
        pointers, end = _point(num, norm, 4)
        pointers += [end, 0 if attention is None else end + 1]
        constants = dict(ATTENDS=attention is not None, NORM=norm, M=num, **layout.blocks, num_warps=8)
        return layout.grid, pointers, [*strides, eps, *layout.place], constants

    tensors = [*ys, *given, out] if attention is None else [*ys, *given, out, attention]
    launch(_select_kernel, tensors, (layout, num, norm, eps, attention is None, strides), describe)
    return out


def weigh_moments(given: Tensor, attention: Tensor | None, level: Tensor | None, pooled: Tensor | None) -> Tensor:
    """Sums over the images of attention * given + level * pooled, (2, B, M, C) both: (2, M, C).

    They are the gradients of the norms' shifts and scales. Without attention they are the sums of ``given``.
    """
    _, images, num, channels = shape = given.shape
    sums = given.new_empty((2, num, channels))
    strides = _strides(attention)

    def describe() -> Launch:
        pointers = [0, 0, 0, 0, 1] if attention is None else [2, 0, 3, 4, 1]
        constants = dict(ATTENDS=attention is not None, M=num, BLOCK_B=32, BLOCK_C=64, num_warps=4)
        return (-(-channels // 64), 2 * num), pointers, [*strides, images, channels], constants

    tensors = [given, sums] if attention is None else [given, sums, attention, level, pooled]
    launch(_weigh_moments_kernel, tensors, (shape, attention is None, strides), describe)
    return sums


def input_grads(
    ys: Sequence[Tensor], norms: Norms, grad: Tensor, attention: Tensor | None, level: Tensor | None, sums: Tensor
) -> list[Tensor]:
    """w invstd ([z > 0] (attention grad + level) - sums[0] / N - sums[1] xhat / N) for every branch, in ``ys``' dtype.

    The terms with ``sums`` (2, M, C) are for statistics of the batch alone.
    """
    y, num = ys[0], len(ys)
    laid = y.shape, y.stride(), _ELEMENTWISE_TILE if num <= 2 else _ELEMENTWISE_TILE // 2, False
    layout = _layouts.get(laid) or _lay_out(y, laid)
    given, eps, norm = norms
    grads = list(map(torch.empty_like, ys))
    strides = _strides(attention)

    def describe() -> Launch:
        pointers, end = _point(num, norm, 4)
        last = end + num
        pointers += [*_first(end, num), last, *([0, 0] if attention is None else [last + 2, last + 3]), last + 1]
        numbers = [*strides, eps, float(layout.images * layout.place[1]), *layout.place]
        constants = dict(ATTENDS=attention is not None, NORM=norm, M=num, **layout.blocks, num_warps=8)
        return layout.grid, pointers, numbers, constants

    tensors = [*ys, *given, *grads, grad, sums]
    if attention is not None:
        tensors += attention, level
    launch(_input_grads_kernel, tensors, (layout, num, norm, eps, attention is None, strides), describe)
    return grads


def norm_act(ys: Sequence[Tensor], norms: Norms, shortcut: Tensor | None, relu: bool) -> Tensor:
    """act(sum_m BN_m(y_m) + shortcut), (B, C, H, W), of one norm or of two."""
    y, num = ys[0], len(ys)
    laid = y.shape, y.stride(), _ELEMENTWISE_TILE, False
    layout = _layouts.get(laid) or _lay_out(y, laid)
    given, eps, norm = norms
    out = torch.empty_like(y)

    def describe() -> Launch:
        pointers, end = _point(num, norm, 2)
        pointers += [0 if shortcut is None else end + 1, end]
        constants = dict(RELU=relu, HAS_SHORTCUT=shortcut is not None, NORM=norm, M=num, **layout.blocks, num_warps=8)
        return layout.grid, pointers, [eps, *layout.place], constants

    tensors = [*ys, *given, out] if shortcut is None else [*ys, *given, out, shortcut]
    launch(_norm_act_kernel, tensors, (layout, num, norm, eps, relu, shortcut is None), describe)
    return out


def norm_act_moments(ys: Sequence[Tensor], norms: Norms, grad: Tensor, out: Tensor | None, relu: bool) -> Tensor:
    """Sums of the gradient where the ReLU was open, and of it times xhat_m: (1 + M, C).

    Where ``out``, the ReLU's output, is None, the only norm's result says where it was open.
    """
    y, num = ys[0], len(ys)
    laid = y.shape, y.stride(), _REDUCTION_TILE, True
    layout = _layouts.get(laid) or _lay_out(y, laid)
    given, eps, norm = norms
    partials = y.new_empty((layout.images * layout.splits, 1 + num, layout.channels), dtype=torch.float32)

    def describe() -> Launch:
        pointers, end = _point(num, norm, 2)
        pointers += [end, 0 if out is None else end + 2, end + 1]
        constants = dict(RELU=relu, HAS_OUT=out is not None, NORM=norm, M=num, **layout.blocks, num_warps=4)
        return layout.grid, pointers, [eps, *layout.place], constants

    tensors = [*ys, *given, grad, partials] if out is None else [*ys, *given, grad, partials, out]
    launch(_norm_act_moments_kernel, tensors, (layout, num, norm, eps, relu, out is None), describe)
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
    y, num = ys[0], len(ys)
    laid = y.shape, y.stride(), _ELEMENTWISE_TILE, False
    layout = _layouts.get(laid) or _lay_out(y, laid)
    given, eps, norm = norms
    grads = list(map(torch.empty_like, ys))
    tensors = [*ys, *given, grad, *grads, sums]
    if out is not None:
        tensors.append(out)
    grad_shortcut = None
    if shortcut is not None:
        grad_shortcut = torch.empty_like(y, dtype=shortcut.dtype)
        tensors.append(grad_shortcut)

    def describe() -> Launch:
        pointers, end = _point(num, norm, 2)
        sums_at = end + 1 + num
        pointers += [end, 0 if out is None else sums_at + 1, *_first(end + 1, num, 1, 2)]
        pointers += [0 if shortcut is None else len(tensors) - 1, sums_at]
        numbers = [eps, float(layout.images * layout.place[1]), *layout.place]
        constants = dict(RELU=relu, HAS_OUT=out is not None, HAS_SHORTCUT=shortcut is not None)
        return layout.grid, pointers, numbers, dict(**constants, NORM=norm, M=num, **layout.blocks, num_warps=8)

    kind = layout, num, norm, eps, relu, out is None, shortcut is None
    launch(_norm_act_grads_kernel, tensors, kind, describe)
    return grads, grad_shortcut


def norm_relu_rows(
    r: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: tuple[Tensor, Tensor] | None,
    batch: bool,
    momentum: float,
    eps: float,
    batches: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """z = ReLU(BN(r)), (B, d) float32, and the mean and 1 / sqrt(variance + eps) it took, (d,).

    ``running`` statistics, and the number of ``batches`` that they have seen, are updated where ``batch``, else they
    are what is taken.
    """
    rows, dim = shape = r.shape
    z = torch.empty_like(r)
    mean, invstd = r.new_empty(dim), r.new_empty(dim)
    tensors = [r, weight, bias, z, mean, invstd]
    if running is not None:
        tensors += running
    if batches is not None:
        tensors.append(batches)
    kind = shape, batch, running is None, batches is None, eps, momentum

    def describe() -> Launch:
        pointers = [0, 1, 2, *([4, 5] if running is None else [6, 7]), 4 if batches is None else 8, 3, 4, 5]
        constants = dict(BATCH=batch, HAS_RUNNING=running is not None, COUNTS=batches is not None, **_ROWS)
        return (-(-dim // _ROWS['BLOCK_D']),), pointers, [rows, dim, eps, momentum], constants

    launch(_norm_relu_rows_kernel, tensors, kind, describe)
    return z, mean, invstd


def norm_relu_rows_grads(
    grad: Tensor, z: Tensor, r: Tensor, weight: Tensor, mean: Tensor, invstd: Tensor, batch: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of r (B, d), of the scale and of the shift (d,), in float32."""
    rows, dim = shape = r.shape
    grad_r = torch.empty_like(r)
    grad_weight, grad_bias = r.new_empty(dim), r.new_empty(dim)

    def describe() -> Launch:
        return (-(-dim // _ROWS['BLOCK_D']),), range(9), [rows, dim], dict(BATCH=batch, **_ROWS)

    tensors = [grad, z, r, weight, mean, invstd, grad_r, grad_weight, grad_bias]
    launch(_norm_relu_rows_grads_kernel, tensors, (shape, batch), describe)
    return grad_r, grad_weight, grad_bias


def _first(start: int, count: int, step: int = 1, most: int = 4) -> list[int]:
    """Where ``count`` tensors are among those of a launch, for ``most`` pointers; those left over are never read."""
    return [start + step * (m if m < count else 0) for m in range(most)]


def _point(num: int, norm: str, most: int) -> tuple[list[int], int]:
    """Where a kernel's pointers to the maps and to ``Norms`` are among [*ys, *norms], and how many those are."""
    pointers = _first(0, num, most=most)
    if norm == 'folded':
        return pointers + 4 * _first(num, num, most=most), 2 * num
    count = 1 if norm == 'batch' else num
    for start, given in ((num, num), (2 * num, num), (3 * num, count), (3 * num + count, count)):
        pointers += _first(start, given, most=most)
    return pointers, 3 * num + 2 * count


@dataclass(eq=False)  # told apart by which it is: hashing its numbers at every launch would take time
class _Layout:
    """How a kernel's programs are laid over a map.

    Attributes:
        grid: the number of programs.
        place: the numbers by which a program finds its part of the map.
        blocks: the sizes of its tiles.
        images: B.
        channels: C.
        splits: among how many programs an image's positions are split.
    """

    grid: tuple[int]
    place: tuple[int, ...]
    blocks: dict[str, int]
    images: int
    channels: int
    splits: int


# By a map's shape and strides, a tile's elements and whether the kernel sums. Looked up without a call, since there are
# some twenty launches a unit.
_layouts: dict[tuple, _Layout] = {}


def _lay_out(y: Tensor, laid: tuple) -> _Layout:
    """``_layouts[laid]``, made. A 1x1 map is dense in both formats, and wide tiles are the better ones for it."""
    _, _, elements, reduces = laid
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
    if len(_layouts) >= _MOST_LAYOUTS:
        _layouts.clear()
    made = _layouts[laid] = _Layout((batch * splits * columns,), place, blocks, batch, channels, splits)
    return made


def _power_of_2(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def _strides(attention: Tensor | None) -> tuple[int, int, int]:
    """The strides of an image, a branch and a channel of an attention (B, M, C or 1), or of none."""
    if attention is None:
        return 0, 0, 0
    batch, branch, channel = attention.stride()
    return batch, branch, 0 if attention.shape[2] == 1 else channel
