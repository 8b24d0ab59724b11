"""The engine of plain torch, for training on a CPU: it keeps M maps a unit for the backward pass in place of 2 M.

Autograd keeps, for every branch, the convolution's output y (for BatchNorm) and the ReLU's output u (for the ReLU and
for the selection). Here y alone is kept, and the backward pass computes u again, once. On a CPU that costs no time: a
pass over a map that is at hand takes less than memory that is new. In inference nothing is kept, and the plain modules
are as fast.

It gives the plain modules' numbers bit for bit in the forward pass, and works on any device.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import private
from .reference import Attention, Branches, fuse, refuse_single_values, strided_like

__all__ = ['NAME', 'backward', 'forward', 'norm_act', 'norm_act_backward', 'pays', 'saved_like', 'statistics']

NAME = 'recompute'


def pays() -> bool:
    """Whether there is anything to keep: in inference the plain modules are as fast."""
    return torch.is_grad_enabled()


def forward(spec, branches: Branches) -> tuple[Tensor, list[Tensor | None]]:
    """V, (B, C, H, W), and what the backward pass needs beside the branches."""
    ys, weights, biases, means, variances, attention = branches
    if spec.batch and ys[0].numel() == ys[0].shape[1]:
        refuse_single_values(ys[0])
    private.add_one(spec.batches)
    us, saved = [], []
    for m, y in enumerate(ys):
        running = (means[m], variances[m]) if means else spec.running[m] if spec.running else (None, None)
        u, mean, invstd = torch.native_batch_norm(
            y, weights[m], biases[m], *running, spec.batch, spec.momentum, spec.eps
        )
        us.append(u.relu_())
        saved += [mean, invstd]
    if attention is None:
        total = us[0]
        for u in us[1:]:
            total = total.add_(u)
        return total, saved
    s = fuse(us)
    r = F.conv2d(s, attention.reduce.to(s.dtype))  # as autocast does, which does not reach into an operator
    running = (attention.mean, attention.var) if means else spec.running[-1] if spec.running else (None, None)
    z, mean, invstd = torch.native_batch_norm(
        r, attention.weight, attention.bias, *running, spec.batch, spec.momentum, spec.eps
    )
    z = z.relu_()
    bias = None if attention.select_bias is None else attention.select_bias.to(z.dtype)
    logits = F.conv2d(z, attention.select.to(z.dtype), bias)
    a = logits.unflatten(1, (len(ys), -1)).softmax(1)
    return _select_(us, a), [*saved, mean, invstd, s, r, z, a]


def norm_act(spec, shortcut: None, *norm: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """BN(y), (B, C, H, W), and what the backward pass needs, for one norm without a shortcut and without ReLU.

    ``norm`` is y, weight, bias, running mean and running variance.
    """
    y, weight, bias, *running = norm
    if spec.batch:
        if y.numel() == y.shape[1]:
            refuse_single_values(y)
        private.add_one(spec.batches)
        running = spec.running[0]
    z, *saved = torch.native_batch_norm(y, weight, bias, *running, spec.batch, spec.momentum, spec.eps)
    return z, saved


def norm_act_backward(
    spec, shortcut: None, saved, grad: Tensor, needs_maps: bool, *norm: Tensor | None
) -> list[Tensor | None]:
    """None for the shortcut, the gradients of y, weight and bias, and two None."""
    y, weight, _, *running = norm
    used = (None, None, *saved) if spec.batch else (*running, None, None)
    grads = torch.ops.aten.native_batch_norm_backward(
        grad, y, weight, *used, spec.batch, spec.eps, [needs_maps, True, True]
    )
    return [None, *grads, None, None]


def saved_like(spec, branches: Branches) -> list[Tensor]:
    """Empty tensors of the shapes that :func:`forward` keeps."""
    y, attention, num = branches.ys[0], branches.attention, len(branches.ys)
    batch, channels = y.shape[:2]

    def norm(size: int) -> list[Tensor]:
        return [branches.weights[0].new_empty(size if spec.batch else 0) for _ in range(2)]

    saved = [tensor for _ in range(num) for tensor in norm(channels)]
    if attention is None:
        return saved
    dim = attention.reduce.shape[0]
    maps = [(batch, channels, 1, 1), (batch, dim, 1, 1), (batch, dim, 1, 1)]
    a = (batch, num, attention.select.shape[0] // num, 1, 1)
    return [*saved, *norm(dim), *(y.new_empty(shape) for shape in (*maps, a))]


def statistics(spec, saved: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Mean and 1 / sqrt(variance + eps) of the batch, of every branch and of the attention, from what is kept."""
    return [(saved[2 * m], saved[2 * m + 1]) for m in range(spec.num_branches + spec.attends)]


def _select_(us: list[Tensor], attention: Tensor) -> Tensor:
    """:func:`~.reference.select` in the last branch's memory, which is faster to write than new memory is to get."""
    weights = attention.to(us[0].dtype)
    *others, selected = us
    if len(others) == 1:
        return selected.lerp_(others[0], weights[:, 0])
    if not others:
        return selected.mul_(weights[:, 0])
    total = us[0].mul_(weights[:, 0])
    for m, u in enumerate(us[1:], 1):
        total.addcmul_(u, weights[:, m])
    return total


def backward(spec, branches: Branches, saved, grad: Tensor, needs_maps: bool) -> list[Tensor | None]:
    """Gradients of ys, weights and biases, then of the attention's tensors (None for statistics), in this order."""
    ys, weights, biases, means, variances, attention = branches
    num = len(ys)
    statistics = [(saved[2 * m], saved[2 * m + 1]) for m in range(num)]
    us = []
    for m, y in enumerate(ys):
        if means:
            mean, var = means[m], variances[m]
        else:
            mean, invstd = statistics[m]
            var = (invstd.pow(-2) - spec.eps).clamp_(min=0)
        us.append(F.batch_norm(y, mean, var, weights[m], biases[m], False, 0.0, spec.eps).relu_())
    if attention is None:
        constant, factors, grads = None, [None] * num, []
        product = torch.empty_like(us[0])
    else:
        product, grad_attention = _attention_gradient(us, grad, saved[-1])
        grad_s, *grads = _attend_backward(spec, attention, saved[2 * num :], grad_attention)
        constant = (grad_s / (ys[0].shape[2] * ys[0].shape[3])).to(grad.dtype)
        factors = saved[-1].to(grad.dtype).unbind(1)
        if num == 2:  # as in lerp
            factors = factors[0], 1 - factors[0]
    found = []
    for m, (y, u) in enumerate(zip(ys, us)):
        if constant is None:
            product.copy_(grad)
        else:
            torch.addcmul(constant, grad, factors[m], out=product)
        torch.ops.aten.threshold_backward(product, u, 0, grad_input=product)
        used = (means[m], variances[m], None, None) if means else (None, None, *statistics[m])
        found.append(
            torch.ops.aten.native_batch_norm_backward(
                product, y, weights[m], *used, spec.batch, spec.eps, [needs_maps, True, True]
            )
        )
    grad_ys, grad_weights, grad_biases = zip(*found)
    return [*grad_ys, *grad_weights, *grad_biases, *[None] * (len(means) + len(variances)), *grads]


def _attention_gradient(us: list[Tensor], grad: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
    """A map of scratch memory, and the gradient of the attention, (B, M, C or 1)."""
    dims = (1, 2, 3) if attention.shape[2] == 1 else (2, 3)
    dtype = torch.promote_types(attention.dtype, torch.float32)
    product = torch.empty_like(us[0])
    found = torch.zeros(attention.shape, dtype=dtype, device=grad.device)
    if len(us) == 2:
        # V = u_1 + a_0 (u_0 - u_1)
        torch.sub(*us, out=product).mul_(grad)
        found[:, 0] = product.sum(dims, keepdim=True, dtype=dtype)
    else:
        for m, u in enumerate(us):
            torch.mul(u, grad, out=product)
            found[:, m] = product.sum(dims, keepdim=True, dtype=dtype)
    return product, found.flatten(2)


def _attend_backward(spec, attention: Attention, saved, grad: Tensor) -> list[Tensor | None]:
    """Gradients of s, (B, C, 1, 1), and of the attention's tensors, in their order."""
    mean, invstd, s, r, z, a = saved
    dtype = attention.reduce.dtype
    a = a.flatten(2).to(grad.dtype)
    grad_logits = (a * (grad - (a * grad).sum(1, keepdim=True))).flatten(1).to(dtype)
    reduce, select = attention.reduce.flatten(1), attention.select.flatten(1)
    grad_select = grad_logits.t() @ z.flatten(1).to(dtype)
    grad_z = torch.ops.aten.threshold_backward((grad_logits @ select).to(z.dtype)[:, :, None, None], z, 0)
    used = (None, None, mean, invstd) if attention.mean is None else (attention.mean, attention.var, None, None)
    grad_r, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
        grad_z, r, attention.weight, *used, spec.batch, spec.eps, [True, True, True]
    )
    grad_r = grad_r.flatten(1).to(dtype)
    grad_reduce = grad_r.t() @ s.flatten(1).to(dtype)
    grad_s = (grad_r @ reduce)[:, :, None, None]
    bias = None if attention.select_bias is None else grad_logits.sum(0)
    return [
        grad_s, strided_like(grad_reduce, attention.reduce), grad_weight, grad_bias,
        strided_like(grad_select, attention.select), bias, None, None,
    ]  # fmt: skip
