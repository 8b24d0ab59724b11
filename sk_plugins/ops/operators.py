"""The engines as operators of ``torch.library``: what compilers and exporters see of ``backend='triton'``.

An operator costs some 0.4 ms a call in eager mode, which therefore does without; a compiled graph calls it for little.
On a GPU the operators run the Triton kernels (:mod:`.gpu`), elsewhere plain torch (:mod:`.cpu`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import cpu, gpu, private
from .functions import BranchSpec
from .reference import Attention, Branches, norm_relu_select, update_running

__all__ = ['NAME', 'apply']

NAME = 'operators'
_BRANCHES = (
    'Tensor[] ys, Tensor[] weights, Tensor[] biases, Tensor[] means, Tensor[] variances, Tensor? reduce, '
    'Tensor? weight, Tensor? bias, Tensor? select, Tensor? select_bias, Tensor? mean, Tensor? var, '
    'bool batch, float eps'
)


def apply(spec: BranchSpec, branches: Branches) -> Tensor:
    """V, (B, C, H, W), as an operator; running statistics are updated by operations of the graph."""
    ys, weights, biases, means, variances, of_attention = branches
    if ys[0].numel() == 0:
        return norm_relu_select(branches, spec.eps)
    attention = [None] * 7 if of_attention is None else list(of_attention)
    tensors = [ys, weights, biases, means, variances, *attention]
    v, saved = torch.ops.sk_plugins.norm_relu_select(*tensors, spec.batch, spec.eps)
    if spec.running:
        private.add_one(spec.batches)
        y = ys[0]
        counts = [y.shape[0] * y.shape[2] * y.shape[3]] * spec.num_branches + [y.shape[0]]
        engine = _spec(ys, attention[0], spec.batch, spec.eps).engine
        found = engine.statistics(spec, saved)
        for (mean, var), (batch_mean, invstd), count in zip(spec.running, found, counts):
            batch_var = invstd.detach().pow(-2) - spec.eps
            update_running(mean, var, batch_mean.detach(), batch_var, count, spec.momentum)
    return v


def _spec(ys: Sequence[Tensor], reduce: Tensor | None, batch: bool, eps: float) -> BranchSpec:
    on_gpu = (ys[0].is_cuda or gpu.INTERPRETS) and gpu.why_not(ys[0]) is None and len(ys) <= gpu.MAX_BRANCHES
    if on_gpu:
        gpu.load()
    return BranchSpec(gpu if on_gpu else cpu, len(ys), reduce is not None, batch, 0.0, eps, [])


def _branches(ys, weights, biases, means, variances, reduce, *attention) -> Branches:
    # Kernels read a norm's values one after another.
    norms = ([t.contiguous() for t in tensors] for tensors in (weights, biases, means, variances))
    attention = [t if t is None or t.ndim > 1 else t.contiguous() for t in attention]
    return Branches(ys, *norms, None if reduce is None else Attention(reduce, *attention))


@torch.library.custom_op('sk_plugins::norm_relu_select', mutates_args=(), schema=f'({_BRANCHES}) -> (Tensor, Tensor[])')
def _norm_relu_select(*args):
    """V, and what the engine keeps for the backward pass."""
    *tensors, batch, eps = args
    branches = _branches(*tensors)
    spec = _spec(branches.ys, tensors[5], batch, eps)
    return spec.engine.forward(spec, branches)


@_norm_relu_select.register_fake
def _(*args):
    *tensors, batch, eps = args
    branches = _branches(*tensors)
    spec = _spec(branches.ys, tensors[5], batch, eps)
    return torch.empty_like(branches.ys[0]), spec.engine.saved_like(spec, branches)


@torch.library.custom_op(
    'sk_plugins::norm_relu_select_backward',
    mutates_args=(),
    schema=f'(Tensor grad, Tensor[] saved, {_BRANCHES}) -> Tensor[]',
)
def _norm_relu_select_backward(grad, saved, *args):
    """The gradients of ys, weights, biases and of the attention's tensors, those that there are."""
    *tensors, batch, eps = args
    branches = _branches(*tensors)
    spec = _spec(branches.ys, tensors[5], batch, eps)
    grads = spec.engine.backward(spec, branches, saved, grad, True)
    num = len(branches.ys)
    # Those of the norms are views of one tensor, which an operator may not return.
    of_norms = [g.clone() if g.storage_offset() or not g.is_contiguous() else g for g in grads[num : 3 * num]]
    return [*grads[:num], *of_norms, *(g for g in grads[3 * num :] if g is not None)]


@_norm_relu_select_backward.register_fake
def _(grad, saved, *args):
    branches = _branches(*args[:-2])
    tensors = [*branches.ys, *branches.weights, *branches.biases]
    if branches.attention is not None:
        tensors += [t for t in branches.attention[:5] if t is not None]
    return [torch.empty_like(t) for t in tensors]


def _setup_context(ctx, inputs, output):
    ys, weights, biases, means, variances, *attention, batch, eps = inputs
    lists = (ys, weights, biases, means, variances, output[1])
    ctx.lengths, ctx.settings = [len(tensors) for tensors in lists], (batch, eps)
    ctx.save_for_backward(*attention, *(t for tensors in lists for t in tensors))


def _backward(ctx, grad, _):
    kept = ctx.saved_tensors  # once: under checkpointing a second access raises
    attention, rest = kept[:7], list(kept[7:])
    lists = []
    for length in ctx.lengths:
        lists.append(rest[:length])
        rest = rest[length:]
    *branches, saved = lists
    grads = torch.ops.sk_plugins.norm_relu_select_backward(grad, saved, *branches, *attention, *ctx.settings)
    num = len(branches[0])
    given = iter(grads[3 * num :])
    of_attention = [None if tensor is None else next(given) for tensor in attention[:5]]
    none = [[None] * len(tensors) for tensors in branches[3:]]
    return grads[:num], grads[num : 2 * num], grads[2 * num : 3 * num], *none, *of_attention, None, None, None, None


_norm_relu_select.register_autograd(_backward, setup_context=_setup_context)
