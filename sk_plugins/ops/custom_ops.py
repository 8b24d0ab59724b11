"""BatchNorm, ReLU, Fuse and Select of all branches as operators that torch.compile and torch.export see.

Branch m's convolution gives y_m (B, C, H, W). With its BatchNorm's statistics and affine parameters,

    xhat_m = (y_m - mean_m) * invstd_m,   z_m = w_m * xhat_m + b_m,   u_m = relu(z_m),
    s = sum_m mean_hw(u_m)  (Eq. 1, 2),   V = sum_m a_m * u_m  (Eq. 6),

where the attention a = a(s) is ordinary torch on tiny tensors. No z_m or u_m is ever written to memory: pooling and
selection each make them again from y_m, and y_m is all that the backward pass keeps of the size of a map.

**The backward pass** reads the maps twice, which is the least there can be: a's gradient needs a sum over each map
before anything can flow back through s, and only then is the gradient of any element of y_m known. The first pass
takes the sums R_m = sum_hw [z_m > 0] gV and Q_m = sum_hw [z_m > 0] gV xhat_m, from which the rest of the tiny
tensors follow:

    ga_m = w_m Q_m + b_m R_m,   gb_m = sum_b (a_m R_m + gs / HW * P_m),   gw_m = sum_b (a_m Q_m + gs / HW * X_m),

with P_m = sum_hw [z_m > 0] and X_m = sum_hw [z_m > 0] xhat_m, which the forward pass left behind. The second pass
writes the whole gradient, with N = B H W and the last two terms only for statistics of the batch:

    gy_m = w_m invstd_m ([z_m > 0] (a_m gV + gs / HW) - gb_m / N - xhat_m gw_m / N).

Autograd alone would have selection and pooling each write a gradient of every y_m and then add them up: for two
branches 15 maps read or written where 8 do. So selection's formula returns no gradient of y_m, w_m and b_m. It hands
(gV, a, a R, a Q) to pooling's formula, as the "gradients" of outputs of ``pool_branches`` that ``select_branches``
takes as inputs: the moments, and two carriers of one element each, expanded. That is functional, so compilers trace
it, and sound as long as one ``select_branches`` takes the outputs of one ``pool_branches``, as in
:func:`pool` and :func:`select`.

On a GPU the passes are Triton kernels (``triton_kernels``), elsewhere, and where :func:`why_not` gives a reason,
plain torch.
"""

import importlib.util
import logging
import os
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ['Pooled', 'available', 'failure', 'pool', 'select', 'serves', 'why_not']

logger = logging.getLogger('sk_plugins')

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_BRANCHES = 4  # as many pointers as the kernels take
_HAS_TRITON = importlib.util.find_spec('triton') is not None
# Triton's interpreter runs the kernels on the CPU, slowly: for tests and debugging.
_INTERPRET = os.environ.get('TRITON_INTERPRET') == '1'
_failure: str | None = None
_logged: set[str] = set()


class Pooled(NamedTuple):
    """What :func:`pool` gives.

    Attributes:
        s: (B, C), the global average of the branches' sum.
        mean: (M, C), the mean that BatchNorm took away.
        var: (M, C), the biased variance that it divided by. A running variance wants it times N / (N - 1), N = B H W.
        invstd: (M, C), 1 / sqrt(var + eps).
        moments: (2, B, M, C), sums over each map of [z > 0] and of [z > 0] xhat.
        map_carrier: (B, C, H, W) and
        slope_carrier: (B, M, C), zeros of one element's storage, through which :func:`select` tells the backward pass
            of pooling what it needs.

    ``s`` is of ``branches``' dtype or float32, whichever is wider, and so is all else but ``map_carrier``. Only ``s``
    is to be differentiated. An empty batch has the mean and variance 0, which no running statistics should take in.
    """

    s: Tensor
    mean: Tensor
    var: Tensor
    invstd: Tensor
    moments: Tensor
    map_carrier: Tensor
    slope_carrier: Tensor


def why_not(branches: list[Tensor]) -> str | None:
    """Why the Triton kernels cannot serve these (B, C, H, W) tensors; None where they can."""
    if _failure is not None:
        return _failure
    if not _HAS_TRITON:
        return 'triton is not installed'
    y = branches[0]
    if not (y.is_cuda or _INTERPRET):
        return f'tensors on {y.device.type!r}: the kernels run on a GPU'
    if y.dtype not in DTYPES:
        return f'{y.dtype}: the kernels take float32, bfloat16 and float16'
    if len(branches) > MAX_BRANCHES:
        return f'{len(branches)} branches: the kernels take at most {MAX_BRANCHES}'
    if y.shape[1] * y.shape[2] * y.shape[3] >= 2**31:
        return f'{tuple(y.shape)}: the kernels take fewer than 2**31 elements per image'
    return None


def available(branches: list[Tensor]) -> bool:
    """Whether the Triton kernels can serve these (B, C, H, W) tensors."""
    return why_not(branches) is None


def serves(branches: list[Tensor]) -> bool:
    """:func:`available`, which says once in the log why not, on a GPU."""
    reason = why_not(branches)
    if reason is not None and branches[0].is_cuda:
        _say_once(reason)
    return reason is None


def failure() -> str | None:
    """How a kernel failed in this process; None where none has."""
    return _failure


def _say_once(reason: str) -> None:
    if reason not in _logged:
        _logged.add(reason)
        logger.warning('sk_plugins runs Fuse and Select in plain torch, which is slower: %s', reason)


def pool(
    branches: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    eps: float = 1e-5,
) -> Pooled:
    """BatchNorm, ReLU and the global average of the branches' sum, s (B, C), without writing a normalised map.

    Args:
        branches: y_m, the M convolutions' outputs before BatchNorm, each (B, C, H, W), of one dtype and device.
        weight: w, (M, C), BatchNorm's scales.
        bias: b, (M, C), BatchNorm's shifts.
        mean: (M, C), statistics to normalise with (running ones); those of the batch where None, as in training.
        var: (M, C), biased variance; given where ``mean`` is.
        eps: added to the variance.

    Returns:
        s and the statistics, as a :class:`Pooled` that :func:`select` takes.

    Raises:
        ValueError: no branches or branches of different shapes, dtypes or devices; ``weight``, ``bias``, ``mean`` or
            ``var`` not (M, C); one of ``mean`` and ``var`` without the other; statistics of a batch of a single value
            per channel.
    """
    _check(branches, weight=weight, bias=bias, mean=mean, var=var)
    if (mean is None) != (var is None):
        raise ValueError('mean and var go together: give both (running statistics) or neither (those of the batch)')
    training = mean is None
    if training:
        batch, _, height, width = branches[0].shape
        if batch * height * width == 1:
            raise ValueError(
                f'branches of shape {tuple(branches[0].shape)} have a single value per channel, which has no '
                'variance: training needs a larger batch or map'
            )
        with torch.no_grad():  # pooling's formula differentiates through the statistics
            mean, var, invstd = torch.ops.sk_plugins.batch_statistics(branches, eps)
    else:
        dtype = _wide(branches[0])
        mean, var = mean.to(dtype), var.to(dtype)
        invstd = torch.rsqrt(var + eps)
    s, *rest = torch.ops.sk_plugins.pool_branches(branches, weight, bias, mean, invstd, training)
    return Pooled(s, mean, var, invstd, *rest)


def select(branches: list[Tensor], weight: Tensor, bias: Tensor, pooled: Pooled, attention: Tensor) -> Tensor:
    """BatchNorm, ReLU and the attention-weighted sum of the branches (Eq. 6), in one pass.

    Args:
        branches: as given to :func:`pool`; so are ``weight`` and ``bias``.
        weight: w, (M, C).
        bias: b, (M, C).
        pooled: :func:`pool`'s answer for these branches. It serves one call of this function.
        attention: (B, M, C), or (B, M, 1) where all channels share it, of any float dtype.

    Returns:
        V, (B, C, H, W), of the branches' dtype and memory format.

    Raises:
        ValueError: as :func:`pool`, or an attention of another shape.
    """
    _check(branches, weight=weight, bias=bias)
    batch, channels = branches[0].shape[:2]
    if attention.ndim != 3 or attention.shape[1] != len(branches) or attention.shape[2] not in (1, channels):
        raise ValueError(
            f'attention of shape {tuple(attention.shape)} must be (B, M, C) or (B, M, 1), here '
            f'({batch}, {len(branches)}, {channels}) or ({batch}, {len(branches)}, 1)'
        )
    return torch.ops.sk_plugins.select_branches(
        branches, weight, bias, pooled.mean, pooled.invstd, attention,
        pooled.moments, pooled.map_carrier, pooled.slope_carrier,
    )  # fmt: skip


def _check(branches: list[Tensor], **parameters: Tensor | None) -> None:
    if not branches:
        raise ValueError('branches=[] must hold at least one (B, C, H, W) tensor')
    first = branches[0]
    for branch in branches:
        if branch.ndim != 4 or branch.shape != first.shape or branch.dtype != first.dtype:
            raise ValueError(
                'branches must be (B, C, H, W) tensors of one shape and dtype, got '
                + ', '.join(f'{tuple(b.shape)} {b.dtype}' for b in branches)
            )
        if branch.device != first.device:
            raise ValueError(f'branches must be on one device, got {", ".join(str(b.device) for b in branches)}')
    expected = (len(branches), first.shape[1])
    for name, parameter in parameters.items():
        if parameter is not None and tuple(parameter.shape) != expected:
            raise ValueError(f'{name} of shape {tuple(parameter.shape)} must be (M, C) = {expected}')


# The four passes in plain torch: what runs where Triton does not, and the reference of its kernels.


def _wide(y: Tensor) -> torch.dtype:
    """The dtype that sums are taken in and that small tensors are of."""
    return torch.float64 if y.dtype == torch.float64 else torch.float32


def _per_channel(rows: Tensor, y: Tensor) -> Tensor:
    """(..., C) to (..., C, 1, 1) in the dtype of the sums."""
    return rows.to(_wide(y))[..., None, None]


def _normalise(y, weight, bias, mean, invstd) -> tuple[Tensor, Tensor]:
    """xhat and z of one branch, its parameters (C,) each."""
    xhat = (y.to(_wide(y)) - _per_channel(mean, y)) * _per_channel(invstd, y)
    return xhat, xhat * _per_channel(weight, y) + _per_channel(bias, y)


def _plain_batch_statistics(ys: list[Tensor], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    statistics = [torch.var_mean(y.to(_wide(y)), (0, 2, 3), correction=0) for y in ys]
    var = torch.stack([var for var, _ in statistics])
    return torch.stack([mean for _, mean in statistics]), var, torch.rsqrt(var + eps)


def _plain_moments(ys, weight, bias, mean, invstd, grad) -> tuple[Tensor, Tensor]:
    counts, sums, values = [], [], []
    for y, *parameters in zip(ys, weight, bias, mean, invstd):
        xhat, z = _normalise(y, *parameters)
        live = (z > 0).to(z.dtype)
        if grad is not None:
            live = live * grad
        counts.append(live.sum((2, 3)))
        sums.append((live * xhat).sum((2, 3)))
        values.append((live * z).sum((2, 3)))
    values = torch.stack(values, 1)
    if grad is None:
        values = values.sum(1) / (ys[0].shape[2] * ys[0].shape[3])
    return torch.stack([torch.stack(counts, 1), torch.stack(sums, 1)]), values


def _plain_select(ys, weight, bias, mean, invstd, attention) -> Tensor:
    total = torch.zeros((), dtype=_wide(ys[0]), device=ys[0].device)
    for m, (y, *parameters) in enumerate(zip(ys, weight, bias, mean, invstd)):
        total = torch.addcmul(total, _normalise(y, *parameters)[1].relu_(), _per_channel(attention[:, m], y))
    return _like(ys[0]).copy_(total)


def _plain_input_grads(ys, weight, bias, mean, invstd, grad, slope, level, means) -> list[Tensor]:
    grads = []
    for m, (y, *parameters) in enumerate(zip(ys, weight, bias, mean, invstd)):
        xhat, z = _normalise(y, *parameters)
        g = _per_channel(level, y)
        if grad is not None:
            g = g + _per_channel(slope[:, m], y) * grad
        g = g * (z > 0)
        if means is not None:
            g = g - _per_channel(means[0, m], y) - xhat * _per_channel(means[1, m], y)
        grads.append(_like(y).copy_(g * _per_channel(weight[m].to(_wide(y)) * invstd[m], y)))
    return grads


_PLAIN = {
    'batch_statistics': _plain_batch_statistics,
    'moments': _plain_moments,
    'select': _plain_select,
    'input_grads': _plain_input_grads,
}


def _run(name: str, ys: list[Tensor], *args):
    """One of the four passes, by Triton where it can and by plain torch where it cannot."""
    global _failure
    reason = why_not(ys)
    if reason is None:
        try:
            from . import triton_kernels

            return getattr(triton_kernels, name)(ys, *args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers fail in many ways, and the plain path serves all the same
            _failure = reason = f'a Triton kernel failed ({name}: {type(error).__name__}: {error})'
    if ys[0].is_cuda or _failure is not None:
        _say_once(reason)
    return _PLAIN[name](ys, *args)


def _memory_format(y: Tensor) -> torch.memory_format:
    """The format whose order of strides ``y`` follows, dense or not."""
    return torch.channels_last if y.stride(1) < y.stride(3) else torch.contiguous_format


def _like(y: Tensor) -> Tensor:
    return torch.empty(y.shape, dtype=y.dtype, device=y.device, memory_format=_memory_format(y))


def _dense(tensors: list[Tensor], memory_format: torch.memory_format) -> list[Tensor]:
    return [tensor.contiguous(memory_format=memory_format) for tensor in tensors]


def _small(y: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=_wide(y), device=y.device)


def _carriers(y: Tensor, num_branches: int) -> tuple[Tensor, Tensor]:
    batch, channels = y.shape[:2]
    slope = torch.zeros(1, dtype=_wide(y), device=y.device).expand(batch, num_branches, channels)
    return torch.zeros(1, dtype=y.dtype, device=y.device).expand(y.shape), slope


@torch.library.custom_op(
    'sk_plugins::batch_statistics', mutates_args=(), schema='(Tensor[] ys, float eps) -> (Tensor, Tensor, Tensor)'
)
def _batch_statistics(ys, eps):
    """mean, biased variance and invstd of every channel of every branch, (M, C) each."""
    if ys[0].numel() == 0:
        mean = torch.zeros(len(ys), ys[0].shape[1], dtype=_wide(ys[0]), device=ys[0].device)
        return mean, mean.clone(), torch.full_like(mean, eps**-0.5)
    return _run('batch_statistics', _dense(ys, _memory_format(ys[0])), eps)


@_batch_statistics.register_fake
def _(ys, eps):
    return tuple(_small(ys[0], len(ys), ys[0].shape[1]) for _ in range(3))


@torch.library.custom_op(
    'sk_plugins::pool_branches',
    mutates_args=(),
    schema='(Tensor[] ys, Tensor weight, Tensor bias, Tensor mean, Tensor invstd, bool training)'
    ' -> (Tensor, Tensor, Tensor, Tensor)',
)
def _pool_branches(ys, weight, bias, mean, invstd, training):
    """s (B, C), the moments (2, B, M, C), and the carriers of the map's gradient and of the attention."""
    y = ys[0]
    if y.numel() == 0:
        moments, s = _small(y, 2, y.shape[0], len(ys), y.shape[1]).zero_(), _small(y, *y.shape[:2]).zero_()
    else:
        moments, s = _run('moments', _dense(ys, _memory_format(y)), *_rows(weight, bias, mean, invstd), None)
    return s, moments, *_carriers(y, len(ys))


@_pool_branches.register_fake
def _(ys, weight, bias, mean, invstd, training):
    batch, channels = ys[0].shape[:2]
    moments = _small(ys[0], 2, batch, len(ys), channels)
    return _small(ys[0], batch, channels), moments, *_carriers(ys[0], len(ys))


@torch.library.custom_op(
    'sk_plugins::select_branches',
    mutates_args=(),
    schema='(Tensor[] ys, Tensor weight, Tensor bias, Tensor mean, Tensor invstd, Tensor attention,'
    ' Tensor moments, Tensor map_carrier, Tensor slope_carrier) -> Tensor',
)
def _select_branches(ys, weight, bias, mean, invstd, attention, moments, map_carrier, slope_carrier):
    """V (B, C, H, W). The last three arguments have no part in it: they connect the backward passes."""
    if ys[0].numel() == 0:
        return _like(ys[0])
    return _run('select', _dense(ys, _memory_format(ys[0])), *_rows(weight, bias, mean, invstd), attention)


@_select_branches.register_fake
def _(ys, weight, bias, mean, invstd, attention, moments, map_carrier, slope_carrier):
    return _like(ys[0])


@torch.library.custom_op(
    'sk_plugins::select_moments',
    mutates_args=(),
    schema='(Tensor[] ys, Tensor weight, Tensor bias, Tensor mean, Tensor invstd, Tensor grad) -> (Tensor, Tensor)',
)
def _select_moments(ys, weight, bias, mean, invstd, grad):
    """Sums over each map of [z > 0] grad and [z > 0] grad xhat, (2, B, M, C), and of grad u_m, (B, M, C)."""
    y = ys[0]
    if y.numel() == 0:
        moments = _small(y, 2, y.shape[0], len(ys), y.shape[1]).zero_()
        return moments, moments[0].clone()
    memory_format = _memory_format(y)
    (grad,) = _dense([grad], memory_format)
    return _run('moments', _dense(ys, memory_format), *_rows(weight, bias, mean, invstd), grad)


@_select_moments.register_fake
def _(ys, weight, bias, mean, invstd, grad):
    shape = ys[0].shape[0], len(ys), ys[0].shape[1]
    return _small(ys[0], 2, *shape), _small(ys[0], *shape)


@torch.library.custom_op(
    'sk_plugins::input_grads',
    mutates_args=(),
    schema='(Tensor[] ys, Tensor weight, Tensor bias, Tensor mean, Tensor invstd, Tensor? grad, Tensor? slope,'
    ' Tensor level, Tensor? means) -> Tensor[]',
)
def _input_grads(ys, weight, bias, mean, invstd, grad, slope, level, means):
    """w invstd ([z > 0] (slope grad + level) - means[0] - means[1] xhat) for every branch, (B, C, H, W) each.

    ``grad`` (B, C, H, W) and ``slope`` (B, M, C) come together or not at all; ``level`` is (B, C), ``means`` (2, M, C).
    """
    memory_format = _memory_format(ys[0])
    if ys[0].numel() == 0:
        return [torch.empty(y.shape, dtype=y.dtype, device=y.device, memory_format=memory_format) for y in ys]
    if grad is not None:
        (grad,) = _dense([grad], memory_format)
    means = means if means is None else means.contiguous()
    rows = _rows(weight, bias, mean, invstd)
    return _run('input_grads', _dense(ys, memory_format), *rows, grad, slope, level.contiguous(), means)


@_input_grads.register_fake
def _(ys, weight, bias, mean, invstd, grad, slope, level, means):
    memory_format = _memory_format(ys[0])
    return [torch.empty(y.shape, dtype=y.dtype, device=y.device, memory_format=memory_format) for y in ys]


def _rows(*parameters: Tensor) -> list[Tensor]:
    return [parameter.contiguous() for parameter in parameters]


def _save_for_select(ctx, inputs, output):
    ys, weight, bias, mean, invstd, attention, *_ = inputs
    ctx.save_for_backward(weight, bias, mean, invstd, attention, *ys)
    ctx.set_materialize_grads(False)


def _select_backward(ctx, grad):
    weight, bias, mean, invstd, attention, *ys = ctx.saved_tensors
    none = [None] * len(ys)
    if grad is None:
        return none, *[None] * 8
    moments, grad_attention = torch.ops.sk_plugins.select_moments(ys, weight, bias, mean, invstd, grad)
    if attention.shape[2] != grad_attention.shape[2]:
        grad_attention = grad_attention.sum(2, keepdim=True)
    slope = attention.to(moments.dtype)
    carried = slope * moments, grad, slope.expand(moments.shape[1:])
    return none, None, None, None, None, grad_attention.to(attention.dtype), *carried


def _save_for_pool(ctx, inputs, output):
    ys, weight, bias, mean, invstd, training = inputs
    ctx.save_for_backward(weight, bias, mean, invstd, output[1], *ys)
    ctx.training = training
    ctx.set_materialize_grads(False)


def _pool_backward(ctx, grad_s, weighted, grad, slope):
    weight, bias, mean, invstd, moments, *ys = ctx.saved_tensors
    batch, _, height, width = ys[0].shape
    none = [None] * len(ys)
    if grad_s is None and weighted is None:
        return none, *[None] * 5
    if grad_s is None:
        level = moments.new_zeros(moments.shape[1], moments.shape[3])
        sums = weighted
    else:
        level = grad_s / (height * width)
        sums = level[:, None] * moments
        sums = sums if weighted is None else sums + weighted
    sums = sums.sum(1)
    grads = none
    if any(ctx.needs_input_grad[0]):
        means = sums / (batch * height * width) if ctx.training else None
        grads = torch.ops.sk_plugins.input_grads(ys, weight, bias, mean, invstd, grad, slope, level, means)
    return list(grads), sums[1].to(weight.dtype), sums[0].to(bias.dtype), None, None, None


_select_branches.register_autograd(_select_backward, setup_context=_save_for_select)
_pool_branches.register_autograd(_pool_backward, setup_context=_save_for_pool)
