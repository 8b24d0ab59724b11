"""What an engine computes as autograd functions: from the branches' convolutions to V, and a norm with what follows it.

An engine is a module with ``forward`` and ``backward`` as plain functions of tensors (:mod:`.cpu`, :mod:`.gpu`). Here
they become nodes of autograd's graph. Whatever the backward pass needs goes through ``save_for_backward``, and whatever
it finds is returned, so that autograd may run any part of the graph, in any order, any number of times.

Where a backward pass is asked for in a way that an engine does not serve (a second derivative, batched gradients, a
mode or a tensor subclass), the plain arithmetic of :mod:`.reference` is differentiated in its place.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import private
from .reference import Attention, Branches, batch_norm, norm_relu_select

__all__ = ['BranchSpec', 'NormAct', 'NormPoolRelu', 'NormReluSelect', 'NormSpec']


class BranchSpec(NamedTuple):
    """What is not a tensor of saved ones: how :class:`NormReluSelect`'s arguments are laid out, and the norms' numbers.

    Attributes:
        engine: the module that computes.
        num_branches: M.
        attends: whether there is an attention.
        batch: whether the norms take the batch's statistics, else the running ones.
        momentum: of the running statistics.
        eps: added to the variances.
        running: running mean and variance of every branch and of the attention, to update; empty where none are.
        batches: the number of batches that each of those has seen, to count; empty where there are none.
    """

    engine: ModuleType
    num_branches: int
    attends: bool
    batch: bool
    momentum: float
    eps: float
    running: Sequence[tuple[Tensor, Tensor]]
    batches: Sequence[Tensor] = ()

    def flatten(self, branches: Branches) -> list[Tensor | None]:
        tensors = [*branches.ys, *branches.weights, *branches.biases, *branches.means, *branches.variances]
        return tensors if branches.attention is None else [*tensors, *branches.attention]

    def unflatten(self, tensors: Sequence[Tensor | None]) -> Branches:
        m = self.num_branches
        ys, weights, biases = tensors[:m], tensors[m : 2 * m], tensors[2 * m : 3 * m]
        at = 3 * m if self.batch else 5 * m
        means, variances = tensors[3 * m : at][:m], tensors[3 * m : at][m:]
        attention = Attention(*tensors[at:]) if self.attends else None
        return Branches(ys, weights, biases, means, variances, attention)


class NormReluSelect(torch.autograd.Function):
    """BatchNorm and ReLU of every branch, Fuse and Select: ``spec.flatten(branches)`` to V, (B, C, H, W)."""

    @staticmethod
    def forward(ctx, spec: BranchSpec, *tensors: Tensor | None) -> Tensor:
        v, saved = spec.engine.forward(spec, spec.unflatten(tensors))
        ctx.save_for_backward(*tensors, *saved)
        ctx.spec, ctx.count = spec, len(tensors)
        return v

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        spec, kept = ctx.spec, ctx.saved_tensors  # once: under checkpointing a second access raises
        tensors, saved = kept[: ctx.count], kept[ctx.count :]
        if not _can_fuse_backward(grad):
            grads = _differentiate(lambda *t: norm_relu_select(spec.unflatten(t), spec.eps), tensors, ctx, grad)
        else:
            needs_maps = any(ctx.needs_input_grad[1 : 1 + spec.num_branches])
            grads = spec.engine.backward(spec, spec.unflatten(tensors), saved, grad, needs_maps)
        return None, *grads, *[None] * (len(tensors) - len(grads))


class NormSpec(NamedTuple):
    """What :class:`NormAct` takes beside tensors; as :class:`BranchSpec`, whose fields mean the same."""

    engine: ModuleType
    relu: bool
    batch: bool
    momentum: float
    eps: float
    running: Sequence[tuple[Tensor, Tensor]]
    batches: Sequence[Tensor] = ()


class NormAct(torch.autograd.Function):
    """act(BN(y) + shortcut), (B, C, H, W): the end of a convolution or of a unit.

    Its tensors are the shortcut, or None, then y, weight, bias, running mean and variance (None where the batch's
    statistics are taken) of one norm, or of two whose results are added (a unit's last convolution and its shortcut's).
    """

    @staticmethod
    def forward(ctx, spec: NormSpec, *tensors: Tensor | None) -> Tensor:
        out, saved = spec.engine.norm_act(spec, *tensors)
        ctx.save_for_backward(*tensors, *saved)
        ctx.spec, ctx.count = spec, len(tensors)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        spec, kept = ctx.spec, ctx.saved_tensors  # once: under checkpointing a second access raises
        tensors, saved = kept[: ctx.count], kept[ctx.count :]
        if not _can_fuse_backward(grad):
            grads = _differentiate(lambda *t: _norm_act(spec, *t), tensors, ctx, grad)
        else:
            shortcut = tensors[0] if ctx.needs_input_grad[1] else None
            needs_maps = any(ctx.needs_input_grad[2::5])
            grads = spec.engine.norm_act_backward(spec, shortcut, saved, grad, needs_maps, *tensors[1:])
        return None, *grads


class NormPoolRelu(torch.autograd.Function):
    """ReLU(max pooling of BN(y)), (B, C, H', W'): the end of a stem, which keeps y, its output and the pool's indices.

    ReLU and the maximum commute: the pooled map, a quarter of y, is rectified, and BN(y) is not kept. ``pool`` is what
    ``F.max_pool2d`` takes after its input; the tensors are y, weight, bias, running mean and variance, as in
    :class:`NormAct`.
    """

    @staticmethod
    def forward(ctx, spec: NormSpec, pool: tuple, *tensors: Tensor | None) -> Tensor:
        z, saved = spec.engine.norm_act(spec, None, *tensors)
        out, indices = torch.ops.aten.max_pool2d_with_indices(z, *pool)
        out.relu_()
        ctx.save_for_backward(*tensors, out, indices, *saved)
        ctx.spec, ctx.pool = spec, pool
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        spec, pool = ctx.spec, ctx.pool
        *tensors, out, indices = (kept := ctx.saved_tensors)[:7]
        if not _can_fuse_backward(grad):
            return None, None, *_differentiate(lambda *t: _norm_pool_relu(spec, pool, *t), tensors, ctx, grad)
        grad = torch.ops.aten.threshold_backward(grad, out, 0)
        # y stands for BN(y), of which the sizes alone are asked.
        grad = torch.ops.aten.max_pool2d_with_indices_backward(grad, tensors[0], *pool, indices)
        grads = spec.engine.norm_act_backward(spec, None, kept[7:], grad, ctx.needs_input_grad[2], *tensors)
        return None, *grads


def _norm_pool_relu(spec: NormSpec, pool: tuple, *tensors: Tensor | None) -> Tensor:
    """:class:`NormPoolRelu` in plain torch."""
    return F.relu(F.max_pool2d(batch_norm(*tensors, spec.eps), *pool))


def _norm_act(spec: NormSpec, *tensors: Tensor | None) -> Tensor:
    """:class:`NormAct` in plain torch."""
    total = tensors[0]
    for i in range(1, len(tensors), 5):
        y, weight, bias, mean, var = tensors[i : i + 5]
        z = batch_norm(y, weight, bias, mean, var, spec.eps)
        total = z if total is None else z + total
    return F.relu(total) if spec.relu else total


def _can_fuse_backward(grad: Tensor) -> bool:
    """Whether the gradient is an ordinary tensor, and neither a mode nor a second derivative is active."""
    if torch.is_grad_enabled() or type(grad) is not Tensor or not private.is_ordinary():
        return False
    try:
        grad.data_ptr()  # batched gradients have none
    except RuntimeError:
        return False
    return True


def _differentiate(function: Callable[..., Tensor], tensors: Sequence[Tensor | None], ctx: Any, grad: Tensor):
    """The gradients of ``function`` for its tensors, by autograd; themselves differentiable where that is wanted."""
    again = torch.is_grad_enabled()
    wanted = ctx.needs_input_grad[-len(tensors) :]
    if again:
        # Views, each a tensor of its own: the saved ones may lead to one another, as a shortcut does to y, or be one.
        tensors = [t.view_as(t) if need else t for t, need in zip(tensors, wanted)]
    else:
        tensors = [t.detach().requires_grad_(need) if t is not None else None for t, need in zip(tensors, wanted)]
    with torch.enable_grad():
        output = function(*tensors)
        inputs = [t for t, need in zip(tensors, wanted) if need]
        found = iter(torch.autograd.grad(output, inputs, grad, create_graph=again, allow_unused=True))
    return [next(found) if need else None for need in wanted]
