"""Training on little memory: BatchNorm, ReLU and selection that keep the convolutions' outputs and recompute the rest.

Autograd keeps, for every branch, the convolution's output (for BatchNorm) and the ReLU's output (for ReLU and for the
selection): 2 M maps a unit. Here it keeps the former alone, and the backward pass computes the latter again, once, in
two passes over memory. Autograd functions, for eager mode; a compiler decides for itself what to compute twice.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .selective_kernel import select_

__all__ = ['norm_relu_pool', 'select_recomputed']


class _NormReluPool(torch.autograd.Function):
    """y -> u = ReLU(BatchNorm(y)) and its global average; keeps y."""

    @staticmethod
    def forward(ctx, y, weight, bias, running_mean, running_var, batch_statistics, momentum, eps):
        u, mean, invstd = torch.native_batch_norm(
            y, weight, bias, running_mean, running_var, batch_statistics, momentum, eps
        )
        statistics = (mean, invstd) if batch_statistics else (running_mean, running_var)
        ctx.save_for_backward(y, weight, bias, *statistics)
        ctx.batch_statistics, ctx.eps = batch_statistics, eps
        ctx.saved = ctx.u = ctx.selected = ctx.buffers = None
        ctx.set_materialize_grads(False)
        u = u.relu_()
        return u, u.mean((2, 3), keepdim=True)

    @staticmethod
    def backward(ctx, grad_u, grad_pooled):
        _refuse_a_second_derivative()
        u = _recompute(ctx)
        y, weight, _, mean, spread = ctx.saved
        constant = None if grad_pooled is None else grad_pooled / (y.shape[2] * y.shape[3])
        if ctx.selected is None:
            grad = torch.zeros_like(y) if grad_u is None else grad_u
            grad = torch.ops.aten.threshold_backward(grad if constant is None else grad + constant, u, 0)
        else:
            grad = ctx.buffers.pop() if ctx.buffers else torch.empty_like(u)
            if constant is None:
                torch.mul(*ctx.selected, out=grad)
            else:
                torch.addcmul(constant, *ctx.selected, out=grad)
            torch.ops.aten.threshold_backward(grad, u, 0, grad_input=grad)
            ctx.buffers.append(u)
        ctx.saved = ctx.u = ctx.selected = ctx.buffers = None
        statistics = (None, None, mean, spread) if ctx.batch_statistics else (mean, spread, None, None)
        grads = torch.ops.aten.native_batch_norm_backward(
            grad, y, weight, *statistics, ctx.batch_statistics, ctx.eps, ctx.needs_input_grad[:3]
        )
        return (*grads, None, None, None, None, None)


def _refuse_a_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            'create_graph=True asks for a second derivative, which SelectiveKernel gives with its plain backend only: '
            "set backend='plain' (sk_kwargs=dict(backend='plain') in a network)"
        )


def _recompute(ctx) -> Tensor:
    """A branch's u. It is computed once, and the saved tensors are asked for once, as checkpointing wants it."""
    if ctx.u is None:
        ctx.saved = y, weight, bias, mean, spread = ctx.saved_tensors
        if ctx.batch_statistics:
            u = F.batch_norm(y, mean, spread.pow(-2), weight, bias, training=False, eps=0.0)
        else:
            u = F.batch_norm(y, mean, spread, weight, bias, training=False, eps=ctx.eps)
        ctx.u = u.relu_()
    return ctx.u


class _Select(torch.autograd.Function):
    """The branches and their attention -> V; keeps the attention, and the branches' nodes for the rest.

    The gradient a_m * dV of a branch is not returned but left at the branch's node, which runs later, since the
    attention depends on it, and adds what came through the pooling in the same pass, into memory that is free by then.
    """

    @staticmethod
    def forward(ctx, attention, nodes, *branches):
        ctx.save_for_backward(attention)
        ctx.nodes = nodes
        ctx.mark_dirty(branches[-1])
        return select_(branches, attention)

    @staticmethod
    def backward(ctx, grad):
        _refuse_a_second_derivative()
        (attention,) = ctx.saved_tensors
        dims = (1, 2, 3) if attention.shape[2] == 1 else (2, 3)
        branches = [_recompute(node) for node in ctx.nodes]
        grad_attention = torch.zeros_like(attention)
        product = torch.empty_like(branches[0])
        if len(branches) == 2:
            # V = u_1 + a_0 (u_0 - u_1)
            torch.sub(*branches, out=product).mul_(grad)
            grad_attention[:, 0] = product.sum(dims, keepdim=True, dtype=attention.dtype)
        else:
            for m, branch in enumerate(branches):
                torch.mul(branch, grad, out=product)
                grad_attention[:, m] = product.sum(dims, keepdim=True, dtype=attention.dtype)
        weights = attention.to(grad.dtype)
        if len(branches) == 2:
            weights = torch.stack((weights[:, 0], 1 - weights[:, 0]), dim=1)
        buffers = [product]
        for m, node in enumerate(ctx.nodes):
            node.selected, node.buffers = (grad, weights[:, m]), buffers
        return grad_attention, None, *(None for _ in branches)


def norm_relu_pool(y: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """A branch from its convolution on: u = ReLU(norm(y)), (B, C, H, W), and its global average, (B, C, 1, 1).

    ``u`` may go into sums or into one :func:`select_recomputed`, whose attention comes from the average.
    """
    # As nn.BatchNorm2d.forward does.
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.training and norm.track_running_stats:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    batch_statistics = norm.training or norm.running_mean is None
    running = (norm.running_mean, norm.running_var)
    if norm.training and not norm.track_running_stats:
        running = (None, None)
    return _NormReluPool.apply(y, norm.weight, norm.bias, *running, batch_statistics, momentum, norm.eps)


def select_recomputed(branches: list[Tensor], attention: Tensor) -> Tensor:
    """:func:`~sk_plugins.ops.select` for branches that :func:`norm_relu_pool` made."""
    return _Select.apply(attention, [branch.grad_fn for branch in branches], *branches)
