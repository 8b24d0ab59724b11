"""The engine of Triton kernels, for a GPU, where a pass over a map costs its memory and every launch costs the host.

Branch m's convolution gives y_m (B, C, H, W). With its BatchNorm's statistics and affine parameters,

    xhat_m = (y_m - mean_m) * invstd_m,   z_m = w_m * xhat_m + b_m,   u_m = relu(z_m),
    s = sum_m mean_hw(u_m)  (Eq. 1, 2),   V = sum_m a_m * u_m  (Eq. 6).

No z_m or u_m is ever written to memory: pooling and selection each make them again from y_m, and y_m is all that the
backward pass keeps of the size of a map.

**The backward pass** reads the maps twice, which is the least there can be: a's gradient needs a sum over each map
before anything can flow back through s, and only then is the gradient of any element of y_m known. The first pass
takes the sums R_m = sum_hw [z_m > 0] gV and Q_m = sum_hw [z_m > 0] gV xhat_m, from which the rest of the tiny
tensors follow:

    ga_m = w_m Q_m + b_m R_m,   gb_m = sum_b (a_m R_m + gs / HW * P_m),   gw_m = sum_b (a_m Q_m + gs / HW * X_m),

with P_m = sum_hw [z_m > 0] and X_m = sum_hw [z_m > 0] xhat_m, which the forward pass left behind. The second pass
writes the whole gradient, with N = B H W and the last two terms only for statistics of the batch:

    gy_m = w_m invstd_m ([z_m > 0] (a_m gV + gs / HW) - gb_m / N - xhat_m gw_m / N).

A norm with what follows it, act(BN(y) + shortcut), goes the same way: three passes over the map forward (two reads and
a write), and backward two, with the ReLU's mask from y again, or from the output where a shortcut was added.

The attention is two products by the library's own and one kernel for BatchNorm and ReLU, all in float32.
"""

import importlib
import importlib.util
import os
from collections.abc import Sequence
from itertools import chain
from types import ModuleType

import torch
from torch import Tensor

from . import private
from .reference import Attention, Branches, refuse_single_values, strided_like

__all__ = ['NAME', 'backward', 'forward', 'norm_act', 'norm_act_backward', 'saved_like', 'statistics', 'why_not']

NAME = 'triton'
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_BRANCHES = 4  # as many pointers as the kernels take
HAS_TRITON = importlib.util.find_spec('triton') is not None
# Triton's interpreter runs the kernels on the CPU, slowly: for tests and debugging.
INTERPRETS = os.environ.get('TRITON_INTERPRET') == '1'
kernels: ModuleType | None = None  # gpu_kernels, once load() was called


def why_not(x: Tensor) -> str | None:
    """Why the kernels cannot serve a unit whose input is ``x`` (B, C, H, W); None where they can."""
    if not HAS_TRITON:
        return 'triton is not installed'
    if x.dtype not in DTYPES:
        return f'{x.dtype}: the kernels take float32, bfloat16 and float16'
    return None


def load() -> None:
    """Import the kernels, and with them triton, which takes a second."""
    global kernels
    if kernels is None:
        kernels = importlib.import_module('.gpu_kernels', __package__)


def forward(spec, branches: Branches) -> tuple[Tensor, list[Tensor]]:
    """V, (B, C, H, W), and what the backward pass needs beside the branches."""
    ys, weights, biases, means, variances, attention = branches
    ys = _dense(ys)
    given = biases if weights[0] is None else [*weights, *biases, *means, *variances, *chain(*spec.running[: len(ys)])]
    _check_norms(ys[0], given, spec.batches)
    saved: list[Tensor] = []
    if spec.batch:
        if ys[0].numel() == ys[0].shape[1]:
            refuse_single_values(ys[0])
        saved += kernels.statistics(ys, spec.eps, spec.momentum, spec.running[: len(ys)], spec.batches[: len(ys)])
        means, variances = saved[:1], saved[1:]
    norms = _norms(weights, biases, means, variances, spec)
    if attention is None:
        return kernels.select(ys, norms, None), saved
    pooled, s = kernels.moments(ys, norms)
    r, z, mean, invstd, a = _attend(spec, attention, s, len(ys))
    return kernels.select(ys, norms, a), [*saved, pooled, s, r, z, mean, invstd, a]


def backward(spec, branches: Branches, saved, grad: Tensor, needs_maps: bool) -> list[Tensor | None]:
    """Gradients of ys, weights and biases, then of the attention's tensors (None for statistics), in this order."""
    ys, weights, biases, means, variances, attention = branches
    ys = _dense(ys)
    y, num = ys[0], len(ys)
    if grad.stride() != y.stride():
        (grad,) = _dense([grad], y)
    statistics = (saved[:1], saved[1:2]) if spec.batch else (means, variances)
    norms = _norms(weights, biases, *statistics, spec)
    given, grad_a = kernels.moments(ys, norms, grad)
    a = level = pooled = None
    grads: list[Tensor | None] = []
    if attention is not None:
        pooled, a = saved[-7], saved[-1]
        level, *grads = _attend_backward(spec, attention, saved[-6:], grad_a, y.shape[2] * y.shape[3])
    sums = kernels.weigh_moments(given, a, level, pooled)
    grad_ys = kernels.input_grads(ys, norms, grad, a, level, sums) if needs_maps else [None] * num
    grad_biases, grad_weights = sums.to(weights[0].dtype).unbind(0)
    return [*grad_ys, *grad_weights.unbind(0), *grad_biases.unbind(0), *[None] * (len(means) + len(variances)), *grads]


def saved_like(spec, branches: Branches) -> list[Tensor]:
    """Empty tensors of the shapes that :func:`forward` keeps."""
    y, attention, num = branches.ys[0], branches.attention, len(branches.ys)
    batch, channels = y.shape[:2]
    shapes = [(num, channels), (num, channels)] if spec.batch else []
    if attention is not None:
        dim = attention.reduce.shape[0]
        shapes += [(2, batch, num, channels), (batch, channels), (batch, dim), (batch, dim), (dim,), (dim,)]
        shapes += [(batch, num, attention.select.shape[0] // num)]
    return [y.new_empty(shape, dtype=torch.float32) for shape in shapes]


def statistics(spec, saved: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Mean and 1 / sqrt(variance + eps) of the batch, of every branch and of the attention, from what is kept."""
    return [*zip(saved[0].unbind(0), saved[1].unbind(0)), *([(saved[6], saved[7])] if spec.attends else [])]


def norm_act(spec, shortcut: Tensor | None, *norms: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """act(sum_m BN_m(y_m) + shortcut), (B, C, H, W), and what the backward pass needs.

    ``norms`` are y, weight, bias, running mean and running variance of one norm, or of two.
    """
    ys, weights, biases, means, variances = _dense(norms[::5]), norms[1::5], norms[2::5], norms[3::5], norms[4::5]
    running = spec.running if spec.batch else (means, variances)
    _check_norms(ys[0], biases if weights[0] is None else [*weights, *biases, *chain(*running)], spec.batches)
    if shortcut is not None and shortcut.stride() != ys[0].stride():
        (shortcut,) = _dense([shortcut], ys[0])
    saved: list[Tensor] = []
    if spec.batch:
        if ys[0].numel() == ys[0].shape[1]:
            refuse_single_values(ys[0])
        saved += kernels.statistics(ys, spec.eps, spec.momentum, spec.running, spec.batches)
        means, variances = saved[:1], saved[1:]
    out = kernels.norm_act(ys, _norms(weights, biases, means, variances, spec), shortcut, spec.relu)
    # The output, which the next convolution keeps too, tells where the ReLU was open; without a shortcut y does.
    if spec.relu and (shortcut is not None or len(ys) > 1):
        saved.append(out)
    return out, saved


def norm_act_backward(
    spec, shortcut: Tensor | None, saved, grad: Tensor, needs_maps: bool, *norms: Tensor | None
) -> list[Tensor | None]:
    """Gradients of the shortcut (None where it is), and of y, weight and bias (and two None) of every norm."""
    ys, weights, biases = _dense(norms[::5]), norms[1::5], norms[2::5]
    if grad.stride() != ys[0].stride():
        (grad,) = _dense([grad], ys[0])
    statistics = (saved[:1], saved[1:2]) if spec.batch else (norms[3::5], norms[4::5])
    pointers = _norms(weights, biases, *statistics, spec)
    out = saved[-1] if len(saved) == (3 if spec.batch else 1) else None
    if out is not None and out.stride() != ys[0].stride():  # hooks on saved tensors may change it
        (out,) = _dense([out], ys[0])
    sums = kernels.norm_act_moments(ys, pointers, grad, out, spec.relu)
    grad_ys, grad_shortcut = [None] * len(ys), None
    if needs_maps or shortcut is not None:
        grad_ys, grad_shortcut = kernels.norm_act_grads(ys, pointers, grad, out, shortcut, sums, spec.relu)
    grad_bias, *grad_weights = sums.to(weights[0].dtype).unbind(0)
    grads: list[Tensor | None] = [grad_shortcut]
    for grad_y, grad_weight in zip(grad_ys, grad_weights):
        grads += [grad_y, grad_weight, grad_bias, None, None]
    if len(ys) > 1:
        grads[8] = grad_bias.clone()  # equal, and another tensor: callers may scale gradients in place
    return grads


def _norms(weights, biases, means, spreads, spec):
    """The kernels' view of norms."""
    if weights[0] is None:
        return biases, 0.0, 'folded'
    return [*weights, *biases, *means, *spreads], spec.eps, 'batch' if spec.batch else 'running'


def _check_norms(y: Tensor, tensors: Sequence[Tensor], batches: Sequence[Tensor] = ()) -> None:
    """Raise RuntimeError for what a kernel would read, or with running statistics write, beyond a tensor's end."""
    channels, device = y.shape[1], y.get_device()
    if any(map(channels.__ne__, map(Tensor.numel, tensors))):
        raise RuntimeError(f'a BatchNorm of another number of channels than its maps, which have {channels}')
    if not all(map(Tensor.is_contiguous, tensors)):
        raise RuntimeError('a BatchNorm with a tensor whose values do not lie one after another: call contiguous()')
    if any(map(device.__ne__, map(Tensor.get_device, chain(tensors, batches)))):
        devices = ', '.join(sorted({str(tensor.device) for tensor in chain(tensors, batches)}))
        raise RuntimeError(f'a BatchNorm with tensors on {devices}, and maps on {y.device}: they must be on one device')


def _attend(spec, attention: Attention, s: Tensor, num_branches: int) -> tuple[Tensor | None, ...]:
    """r, z, mean and invstd of Eq. 3, and the attention (B, M, C or 1) of Eq. 5, from s (B, C), all in float32."""
    running = (spec.running[-1] if spec.running else None) if spec.batch else (attention.mean, attention.var)
    device = s.device.type
    lowers = torch.is_autocast_enabled(device)
    if lowers:
        torch.set_autocast_enabled(device, False)
    try:
        reduce, select = attention.reduce.flatten(1).float(), attention.select.flatten(1).float()
        if attention.weight is None:  # BatchNorm was folded, and there is no backward pass
            r = mean = invstd = None
            z = attention.bias.float().addmm(s, reduce.t()).relu_()
        else:
            r = s.mm(reduce.t())
            affine = attention.weight, attention.bias
            _check_norms(r, [*affine, *(running or ())])
            batches = spec.batches[-1] if spec.batches else None
            z, mean, invstd = kernels.norm_relu_rows(r, *affine, running, spec.batch, spec.momentum, spec.eps, batches)
        bias = attention.select_bias
        logits = z.mm(select.t()) if bias is None else bias.float().addmm(z, select.t())
    finally:
        if lowers:
            torch.set_autocast_enabled(device, True)
    a = logits.view(s.shape[0], num_branches, -1).softmax(1)
    if a.shape[2] not in (1, s.shape[1]):
        raise RuntimeError(f'an attention of {a.shape[2]} channels for maps of {s.shape[1]}')
    return r, z, mean, invstd, a


def _attend_backward(spec, attention: Attention, kept, grad_a: Tensor, positions: int) -> list[Tensor | None]:
    """gs / HW, (B, C), and the gradients of the attention's tensors, in their order."""
    s, r, z, mean, invstd, a = kept
    if a.shape[2] == 1:
        grad_a = grad_a.sum(2, keepdim=True)
    device = s.device.type
    lowers = torch.is_autocast_enabled(device)
    if lowers:
        torch.set_autocast_enabled(device, False)
    try:
        reduce, select = attention.reduce, attention.select
        grad_logits = private.softmax_backward(grad_a, a, 1).flatten(1)
        grad_z = grad_logits.mm(select.flatten(1).float())
        grad_select = strided_like(grad_logits.t().mm(z), select)
        norm = z, r, attention.weight, mean, invstd, spec.batch
        grad_r, grad_weight, grad_bias = kernels.norm_relu_rows_grads(grad_z, *norm)
        grad_reduce = strided_like(grad_r.t().mm(s), reduce)
        level = torch.addmm(s, grad_r, reduce.flatten(1).float(), beta=0, alpha=1 / positions)
        grad_select_bias = None if attention.select_bias is None else grad_logits.sum(0)
    finally:
        if lowers:
            torch.set_autocast_enabled(device, True)
    grads = [grad_reduce, grad_weight, grad_bias, grad_select, grad_select_bias]
    if reduce.dtype != torch.float32:
        grads = [grad if grad is None else grad.to(reduce.dtype) for grad in grads]
    return [level, *grads, None, None]


def _dense(maps: Sequence[Tensor], like: Tensor | None = None) -> Sequence[Tensor]:
    """The maps in one memory format, that of ``like`` or of the first; convolutions' outputs are so already."""
    first = maps[0] if like is None else like
    strides = first.stride()
    channels_last = strides[1] < strides[3]
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for y in maps:
        if y.shape != first.shape:
            raise RuntimeError(f'maps of shapes {tuple(y.shape)} and {tuple(first.shape)}: they must be the same')
        if y.stride() != strides or not y.is_contiguous(memory_format=memory_format):
            return [y.contiguous(memory_format=memory_format) for y in maps]
    return maps
