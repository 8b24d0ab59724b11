"""Triton kernels of BatchNorm, ReLU, pooling and selection over all branches, and their launchers.

Four passes, each over all M branches at once, none of which writes a normalised or rectified map:

- :func:`batch_statistics` reads y_m for the batch's mean and variance;
- :func:`moments` reads y_m (and the gradient of V) for sums over a map;
- :func:`select` reads y_m and writes V;
- :func:`input_grads` reads y_m and the gradient of V and writes the gradients of y_m.

``custom_ops`` says what they compute and holds the same functions in plain torch. Here the maps are dense, of one
shape, dtype and memory format, and not empty.

A program owns a tile of one image: BLOCK_HW positions by BLOCK_C channels. In channels_last the channels are next to
each other in memory and tiles are wide, in contiguous tensors the positions are and tiles are tall: the kernels are
the same, told by the strides. Sums are float32; where an image's map is split among programs, each writes its own
partial sum and a second step adds them in a fixed order, so that results are the same from run to run.

This module imports triton: import it only where triton is installed and its kernels are to run.
"""

# ruff: noqa: N803 - constants of a kernel and sizes of a tensor are capitals, as everywhere in Triton
import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ['batch_statistics', 'input_grads', 'moments', 'select']

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
def _place(C, HW, rows, splits, BLOCK_C: tl.constexpr):
    """This program's image, split, channels, their mask, and the range of its positions."""
    pid = tl.program_id(0)
    c_blocks = tl.cdiv(C, BLOCK_C)
    channels = (pid % c_blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = (pid // c_blocks) % splits
    image = pid // (c_blocks * splits)
    start = split * rows
    return image, split, channels, channels < C, start, tl.minimum(start + rows, HW)


@triton.jit
def _affine(weight, bias, mean, invstd, m: tl.constexpr, C, channels, c_mask):
    """mean, w * invstd, b and invstd of branch m: z = (y - mean) * (w * invstd) + b."""
    at = m * C + channels
    mu = tl.load(mean + at, mask=c_mask, other=0.0).to(tl.float32)
    inv = tl.load(invstd + at, mask=c_mask, other=0.0).to(tl.float32)
    w = tl.load(weight + at, mask=c_mask, other=0.0).to(tl.float32)
    b = tl.load(bias + at, mask=c_mask, other=0.0).to(tl.float32)
    return mu, w * inv, b, inv


@triton.jit(do_not_specialize=['splits'])
def _statistics_kernel(
    y0, y1, y2, y3, partials, C, HW, stride_hw, stride_c, rows, splits,
    M: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partials (B * splits, 2, M, C): the mean over this program's positions, and the squared deviations from it.

    Sums are of differences from the first value: squares of the values themselves would cancel where a mean is
    large beside its standard deviation.
    """
    image, split, channels, c_mask, start, end = _place(C, HW, rows, splits, BLOCK_C)
    for m in tl.static_range(M):
        y = _pick(y0, y1, y2, y3, m) + image.to(tl.int64) * (C * HW) + channels * stride_c
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
        partial = partials + (image * splits + split).to(tl.int64) * (2 * M * C) + m * C + channels
        tl.store(partial, shift + difference, mask=c_mask)
        tl.store(partial + M * C, deviations, mask=c_mask)


@triton.jit(do_not_specialize=['splits', 'num_partials', 'count'])
def _merge_statistics_kernel(
    partials, mean, var, invstd, C, HW, rows, splits, num_partials, count, eps,
    M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Merge :func:`_statistics_kernel`'s partials (Chan, Golub and LeVeque 1983) into (M, C) statistics."""
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_mask = channels < C
    at = tl.program_id(1) * C + channels
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
    tl.store(mean + at, tl.sum(centre, 0), mask=c_mask)
    tl.store(var + at, variance, mask=c_mask)
    tl.store(invstd + at, 1.0 / tl.sqrt(variance + eps), mask=c_mask)


@triton.jit
def _add_moments(p, q, y, offsets, mask, g, mu, scale, b):
    deviation = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32) - mu[None, :]
    live = tl.where(mask & (deviation * scale[None, :] + b[None, :] > 0), g, 0.0)
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
    tl.store(at + images * M * C, q * inv, mask=c_mask)
    return scale * q + b * p


@triton.jit(do_not_specialize=['images', 'splits'])
def _moments_kernel(
    y0, y1, y2, y3, grad, weight, bias, mean, invstd, partials, values,
    images, C, HW, stride_hw, stride_c, rows, splits,
    HAS_GRAD: tl.constexpr, M: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partials (splits, 2, B, M, C) and values: (splits, B, M, C) with a gradient, (splits, B, C) without."""
    image, split, channels, c_mask, start, end = _place(C, HW, rows, splits, BLOCK_C)
    base = image.to(tl.int64) * (C * HW)
    # Accumulators by name: a loop cannot carry a list. Those that M leaves unused cost nothing.
    zero = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    p0, p1, p2, p3 = zero, zero, zero, zero
    q0, q1, q2, q3 = zero, zero, zero, zero
    mu0, scale0, b0, inv0 = _affine(weight, bias, mean, invstd, 0, C, channels, c_mask)
    mu1, scale1, b1, inv1 = _affine(weight, bias, mean, invstd, 1 if M > 1 else 0, C, channels, c_mask)
    mu2, scale2, b2, inv2 = _affine(weight, bias, mean, invstd, 2 if M > 2 else 0, C, channels, c_mask)
    mu3, scale3, b3, inv3 = _affine(weight, bias, mean, invstd, 3 if M > 3 else 0, C, channels, c_mask)
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


@triton.jit(do_not_specialize=['splits'])
def _select_kernel(
    y0, y1, y2, y3, out, weight, bias, mean, invstd, attention, attention_b, attention_m, attention_c,
    C, HW, stride_hw, stride_c, splits,
    M: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, _, channels, c_mask, start, end = _place(C, HW, BLOCK_HW, splits, BLOCK_C)
    base = image.to(tl.int64) * (C * HW)
    hw = start + tl.arange(0, BLOCK_HW)
    mask = (hw < end)[:, None] & c_mask[None, :]
    offsets = hw[:, None] * stride_hw + channels[None, :] * stride_c
    total = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    for m in tl.static_range(M):
        mu, scale, b, _ = _affine(weight, bias, mean, invstd, m, C, channels, c_mask)
        a = attention + image.to(tl.int64) * attention_b + m * attention_m + channels * attention_c
        a = tl.load(a, mask=c_mask, other=0.0).to(tl.float32)[None, :]
        y = tl.load(_pick(y0, y1, y2, y3, m) + base + offsets, mask=mask, other=0.0).to(tl.float32)
        z = (y - mu[None, :]) * scale[None, :] + b[None, :]
        total += a * tl.where(z > 0, z, 0.0)
    tl.store(out + base + offsets, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['splits'])
def _input_grads_kernel(
    y0, y1, y2, y3, x0, x1, x2, x3, grad, weight, bias, mean, invstd,
    slope, slope_b, slope_m, slope_c, level, means, C, HW, stride_hw, stride_c, splits,
    HAS_GRAD: tl.constexpr, HAS_MEANS: tl.constexpr,
    M: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    image, _, channels, c_mask, start, end = _place(C, HW, BLOCK_HW, splits, BLOCK_C)
    base = image.to(tl.int64) * (C * HW)
    hw = start + tl.arange(0, BLOCK_HW)
    mask = (hw < end)[:, None] & c_mask[None, :]
    offsets = hw[:, None] * stride_hw + channels[None, :] * stride_c
    constant = tl.load(level + image.to(tl.int64) * C + channels, mask=c_mask, other=0.0).to(tl.float32)[None, :]
    g = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    if HAS_GRAD:
        g = tl.load(grad + base + offsets, mask=mask, other=0.0).to(tl.float32)
    for m in tl.static_range(M):
        mu, scale, b, inv = _affine(weight, bias, mean, invstd, m, C, channels, c_mask)
        y = tl.load(_pick(y0, y1, y2, y3, m) + base + offsets, mask=mask, other=0.0).to(tl.float32)
        deviation = y - mu[None, :]
        g_z = constant + g
        if HAS_GRAD:
            a = slope + image.to(tl.int64) * slope_b + m * slope_m + channels * slope_c
            g_z = constant + g * tl.load(a, mask=c_mask, other=0.0).to(tl.float32)[None, :]
        g_z = tl.where(deviation * scale[None, :] + b[None, :] > 0, g_z, 0.0)
        if HAS_MEANS:
            p = tl.load(means + m * C + channels, mask=c_mask, other=0.0).to(tl.float32)
            q = tl.load(means + (M + m) * C + channels, mask=c_mask, other=0.0).to(tl.float32)
            g_z -= p[None, :] + deviation * (q * inv)[None, :]
        x = _pick(x0, x1, x2, x3, m)
        tl.store(x + base + offsets, (g_z * scale[None, :]).to(x.dtype.element_ty), mask=mask)


def batch_statistics(ys: list[Tensor], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and 1 / sqrt(variance + eps) of every channel of every branch, each (M, C) float32."""
    num_branches, (batch, channels, height, width) = len(ys), ys[0].shape
    block_hw, block_c, strides = _tile(ys[0], _REDUCTION_TILE)
    rows, splits = _split(batch, channels, height * width, block_hw, block_c)
    partials = _empty(ys, batch * splits, 2, num_branches, channels)
    mean, var, invstd = (_empty(ys, num_branches, channels) for _ in range(3))
    with _device(ys):
        _statistics_kernel[(batch * splits * triton.cdiv(channels, block_c),)](
            *_pad(ys), partials, channels, height * width, *strides, rows, splits,
            M=num_branches, BLOCK_HW=block_hw, BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip
        # Eight channels are a 32-byte sector, and few enough to spread the merge over many programs.
        _merge_statistics_kernel[(triton.cdiv(channels, 8), num_branches)](
            partials, mean, var, invstd, channels, height * width, rows, splits, batch * splits,
            batch * height * width, eps, M=num_branches, BLOCK_P=128, BLOCK_C=8, num_warps=4,
        )  # fmt: skip
    return mean, var, invstd


def moments(
    ys: list[Tensor], weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, grad: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sums over each map of [z > 0] g and [z > 0] g xhat (2, B, M, C), and what they make of u, in one pass.

    With a gradient g (B, C, H, W) that is the sum of g u_m, (B, M, C); without, g is 1 and it is s, (B, C).
    """
    num_branches, (batch, channels, height, width) = len(ys), ys[0].shape
    block_hw, block_c, strides = _tile(ys[0], _REDUCTION_TILE // (1 if num_branches <= 2 else 2))
    rows, splits = _split(batch, channels, height * width, block_hw, block_c)
    partials = _empty(ys, splits, 2, batch, num_branches, channels)
    values = _empty(ys, *((splits, batch, channels) if grad is None else (splits, batch, num_branches, channels)))
    with _device(ys):
        _moments_kernel[(batch * splits * triton.cdiv(channels, block_c),)](
            *_pad(ys), ys[0] if grad is None else grad, weight, bias, mean, invstd, partials, values,
            batch, channels, height * width, *strides, rows, splits,
            HAS_GRAD=grad is not None, M=num_branches, BLOCK_HW=block_hw, BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip
    return (partials[0], values[0]) if splits == 1 else (partials.sum(0), values.sum(0))


def select(ys: list[Tensor], weight: Tensor, bias: Tensor, mean: Tensor, invstd: Tensor, attention: Tensor) -> Tensor:
    """V (B, C, H, W), the attention-weighted sum of relu(z_m), in the maps' dtype and memory format."""
    batch, channels, height, width = ys[0].shape
    block_hw, block_c, strides = _tile(ys[0], _ELEMENTWISE_TILE // (1 if len(ys) <= 2 else 2))
    splits = triton.cdiv(height * width, block_hw)
    out = torch.empty_like(ys[0])
    with _device(ys):
        _select_kernel[(batch * splits * triton.cdiv(channels, block_c),)](
            *_pad(ys), out, weight, bias, mean, invstd, attention, *attention.expand(-1, -1, channels).stride(),
            channels, height * width, *strides, splits,
            M=len(ys), BLOCK_HW=block_hw, BLOCK_C=block_c, num_warps=8,
        )  # fmt: skip
    return out


def input_grads(
    ys: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    invstd: Tensor,
    grad: Tensor | None,
    slope: Tensor | None,
    level: Tensor,
    means: Tensor | None,
) -> list[Tensor]:
    """w invstd ([z > 0] (slope grad + level) - means[0] - means[1] xhat) for every branch, in ``ys``' dtype."""
    batch, channels, height, width = ys[0].shape
    block_hw, block_c, strides = _tile(ys[0], _ELEMENTWISE_TILE // (1 if len(ys) <= 2 else 2))
    splits = triton.cdiv(height * width, block_hw)
    outs = [torch.empty_like(y) for y in ys]
    slope_strides = (0, 0, 0) if slope is None else slope.expand(-1, -1, channels).stride()
    with _device(ys):
        _input_grads_kernel[(batch * splits * triton.cdiv(channels, block_c),)](
            *_pad(ys), *_pad(outs), ys[0] if grad is None else grad, weight, bias, mean, invstd,
            level if slope is None else slope, *slope_strides, level, level if means is None else means,
            channels, height * width, *strides, splits,
            HAS_GRAD=grad is not None, HAS_MEANS=means is not None,
            M=len(ys), BLOCK_HW=block_hw, BLOCK_C=block_c, num_warps=8,
        )  # fmt: skip
    return outs


def _tile(y: Tensor, elements: int) -> tuple[int, int, tuple[int, int]]:
    """BLOCK_HW, BLOCK_C and the strides of a position and of a channel.

    A 1x1 map is dense in both formats, and wide tiles are the better ones for it.
    """
    _, channels, height, width = y.shape
    if y.is_contiguous(memory_format=torch.channels_last):
        block_c = min(_CHANNELS_LAST_BLOCK_C, triton.next_power_of_2(channels))
        return min(elements // block_c, triton.next_power_of_2(height * width)), block_c, (channels, 1)
    block_hw = min(_CONTIGUOUS_BLOCK_HW, triton.next_power_of_2(height * width))
    return block_hw, min(elements // block_hw, triton.next_power_of_2(channels)), (1, height * width)


def _split(batch: int, channels: int, positions: int, block_hw: int, block_c: int) -> tuple[int, int]:
    """Positions that a program of a reduction takes, a multiple of its tile, and the programs that make an image."""
    blocks = triton.cdiv(positions, block_hw)
    splits = min(blocks, triton.cdiv(_PROGRAMS, batch * triton.cdiv(channels, block_c)))
    rows = triton.cdiv(blocks, splits) * block_hw
    return rows, triton.cdiv(positions, rows)


def _pad(tensors: list[Tensor]) -> list[Tensor]:
    """Four tensors for a kernel's four pointers; those beyond M are never read."""
    return [*tensors, *[tensors[0]] * (4 - len(tensors))]


def _empty(ys: list[Tensor], *shape: int) -> Tensor:
    return torch.empty(shape, device=ys[0].device, dtype=torch.float32)


def _device(ys: list[Tensor]):
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device_of(ys[0])
