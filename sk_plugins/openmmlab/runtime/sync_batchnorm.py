"""BatchNorm over the batches of all processes, on CPUs: torch's own ``nn.SyncBatchNorm`` trains on GPUs only."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...ops.private import BatchNorm
from ...ops.reference import update_running

__all__ = ['SyncBatchNorm', 'synchronise']


class SyncBatchNorm(BatchNorm):
    """``nn.SyncBatchNorm`` for any backend that gathers and sums, gloo on CPUs among them: (B, C, ...) to the same.

    In training, the mean and the variance are those of all processes' values, whose number may differ from one to
    another; otherwise, and outside a process group, this is BatchNorm. Parameters and buffers have BatchNorm's names.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: of the running statistics; None for their plain average.
        affine: whether there are a weight and a bias.
        track_running_stats: whether there are running statistics.
        process_group: the processes; all where None.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: in training, an input below two dimensions, or a single value per channel in all processes.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.process_group = process_group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f'SyncBatchNorm takes (B, C, ...), got an input of the shape {tuple(input.shape)}')

    def forward(self, input: Tensor) -> Tensor:
        alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(self.process_group) == 1
        if not self.training or alone:
            return super().forward(input)
        self._check_input_dim(input)
        return self._synchronised(input)

    @torch.compiler.disable
    def _synchronised(self, x: Tensor) -> Tensor:
        mean, var, count = _statistics(x.detach(), self.process_group)
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                update_running(self.running_mean, self.running_var, mean, var, count, momentum)
        return _Normalise.apply(x, self.weight, self.bias, mean, var, count, self.eps, self.process_group)


def synchronise(module: nn.Module) -> nn.Module:
    """The module with a :class:`SyncBatchNorm` of this file in the place of every ``nn.SyncBatchNorm``, in place."""
    if type(module) is nn.SyncBatchNorm:
        return _converted(module)
    for name, child in module.named_children():
        replacement = synchronise(child)
        if replacement is not child:
            setattr(module, name, replacement)
    return module


def _converted(norm: nn.SyncBatchNorm) -> SyncBatchNorm:
    converted = SyncBatchNorm(
        norm.num_features,
        norm.eps,
        norm.momentum,
        norm.affine,
        norm.track_running_stats,
        norm.process_group,
        device='meta',
    )
    # The tensors themselves: an optimizer may hold them.
    for name, parameter in norm.named_parameters():
        converted.register_parameter(name, parameter)
    for name, buffer in norm.named_buffers():
        converted.register_buffer(name, buffer)
    return converted.train(norm.training)


def _statistics(x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, float]:
    """Mean and biased variance, (C,) each, and number of values per channel in all processes: the same in each.

    Chan's way of merging: every process's mean and squared deviations from it, so that no large squares cancel.
    """
    channels, count = x.shape[1], x.numel() // x.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    own = torch.zeros(2 * channels + 1, dtype=dtype, device=x.device)
    if count:
        var, mean = torch.var_mean(x.to(dtype), [d for d in range(x.dim()) if d != 1], correction=0)
        own[:channels], own[channels:-1], own[-1] = mean, var * count, count
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, own, group)
    stacked = torch.stack(gathered)
    means, deviations, counts = stacked[:, :channels], stacked[:, channels:-1], stacked[:, -1:]
    total = float(counts.sum(dtype=torch.float64))
    if total < 2:
        raise ValueError(f'SyncBatchNorm: in training, {total:.0f} values per channel in all processes are too few')
    mean = (means * counts).sum(0) / total
    # Means about the merged one, since their rounded average is off by as much as they are large.
    mean = mean + ((means - mean) * counts).sum(0) / total
    var = (deviations + counts * (means - mean).square()).sum(0) / total
    return mean, var, total


class _Normalise(torch.autograd.Function):
    """x -> (x - mean) / sqrt(var + eps) * weight + bias, where mean and var depend on every process's x."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, count, eps, group):
        ctx.save_for_backward(x, weight, mean, var)
        ctx.count, ctx.eps, ctx.group = count, eps, group
        return _affine(x, mean, var, weight, bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, mean, var = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight
        if x.numel():
            # As if mean and var were constants ...
            grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
                grad, x, scale, mean, var, None, None, False, ctx.eps, (ctx.needs_input_grad[0], True, True)
            )
        else:
            grad_x, grad_weight, grad_bias = torch.zeros_like(x), torch.zeros_like(scale), torch.zeros_like(scale)
        if ctx.needs_input_grad[0]:
            # ... and what comes through them.
            sums = torch.cat([grad_weight, grad_bias])
            dist.all_reduce(sums, group=ctx.group)
            through_var, through_mean = (sums / ctx.count).chunk(2)
            scale = scale * torch.rsqrt(var + ctx.eps)
            grad_x -= _affine(x, mean, var, scale * through_var, scale * through_mean, ctx.eps)
        if weight is None:
            grad_weight = grad_bias = None
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


def _affine(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    # torch's CPU kernels divide by the number of values.
    return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps) if x.numel() else torch.empty_like(x)
