"""Losses that are NaN or infinite: the run stops, or the step is skipped, before they reach the weights."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import all_gather_object, all_reduce, all_reduce_params, get_world_size
from mmengine.hooks import EMAHook, Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor, nn

from ..._arguments import check_choice, is_integer
from .configs import ConfigError
from .distributed import unwrap

__all__ = ['InvalidLossError', 'InvalidLossHook', 'watch_losses']

# Where message_hub, and with it every checkpoint, keeps the number of skipped steps.
SKIPPED = 'skipped_steps'


class InvalidLossError(ValueError):
    """A loss was NaN or infinite."""


@HOOKS.register_module()
class InvalidLossHook(Hook):
    """Looks at every loss before its backward pass; one that is NaN or infinite stops the run, or its step is skipped.

    The message has the losses that went wrong, the iteration, the epoch where there are epochs, the learning rate and
    the images of the batch. Of several processes each waits for the others' word: where one has such a loss, all
    stop, or all skip. A skipped step leaves weights, optimiser, gradient scaler, the model's buffers (BatchNorm's
    statistics) and ``EMAHook``'s average as they were, and its losses out of the log; with gradient accumulation, the
    batches beside it count.
    A gradient that overflows under a finite loss is not seen; ``AmpOptimWrapper`` skips its step itself.

    Args:
        action: ``'stop'`` or ``'skip'``.
        limit: how many steps may be skipped, those before a checkpoint that was resumed from included; one more stops
            the run.

    Raises:
        ValueError: an unknown ``action`` or a ``limit`` below 1.
        InvalidLossError: in training.
    """

    # Before RuntimeInfoHook, which hands the losses to the log.
    priority = 'HIGHEST'

    def __init__(self, action: str = 'stop', limit: int = 10) -> None:
        check_choice('action', action, ('stop', 'skip'))
        if not is_integer(limit, 1):
            raise ValueError(f'limit={limit!r} must be an integer of at least 1')
        self.action = action
        self.limit = limit
        self._forward_hook = None
        self._losses: dict[str, Any] = {}
        self._batch: Any = None
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._skipped = self._counted = False

    def before_train(self, runner: Runner) -> None:
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):  # made its model in before_run, also that of a second train()
                # EMAHook calls this after every step, and asks no hook whether the step was taken.
                hook.ema_model.update_parameters = partial(self._average, hook.ema_model.update_parameters)
        if self._forward_hook is not None:  # train() for the second time
            return
        self._forward_hook = unwrap(runner.model).register_forward_hook(self._keep_losses)
        several = isinstance(runner.optim_wrapper, OptimWrapperDict)
        for wrapper in runner.optim_wrapper.values() if several else [runner.optim_wrapper]:
            # Models call this with their loss between forward and backward pass. mmengine has no hook there.
            wrapper.update_params = partial(self._update, runner, wrapper, wrapper.update_params, _Accumulated())

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self._batch = data_batch
        self._skipped = self._counted = False
        if self.action == 'skip':
            self._buffers = [(b, b.detach().clone()) for b in unwrap(runner.model).buffers()]

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        if self._skipped and outputs is not None:
            outputs.clear()
        self._batch, self._losses, self._buffers = None, {}, []

    def _keep_losses(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._losses = output if isinstance(output, dict) else {}

    def _average(self, update_parameters: Any, model: nn.Module) -> None:
        if self._counted or not self._skipped:
            update_parameters(model)

    @torch.compiler.disable
    def _update(
        self,
        runner: Runner,
        wrapper: OptimWrapper,
        update_params: Any,
        accumulated: '_Accumulated',
        loss: Tensor,
        step_kwargs: dict | None = None,
        zero_kwargs: dict | None = None,
    ) -> None:
        losses, self._losses = self._losses, {}
        own = (~torch.as_tensor(loss).detach().isfinite().all()).float()
        any_process = own.clone()
        if get_world_size() > 1:
            all_reduce(any_process, 'max')
        if not any_process:
            update_params(loss, step_kwargs, zero_kwargs)
            accumulated.batches = 0 if wrapper.should_update() else accumulated.batches + 1
            self._counted = True
            return
        self._count_or_stop(runner, self._message(runner, wrapper, losses, loss, bool(own)))
        self._skipped = True
        with torch.no_grad():
            for buffer, before in self._buffers:
                buffer.copy_(before)
        # A backward pass through nothing: the wrapper counts it.
        wrapper.backward(torch.zeros((), device=own.device, requires_grad=True))
        if wrapper.should_update():
            if accumulated.batches:
                # That backward pass would have averaged what the processes have accumulated.
                parameters = [p for group in wrapper.optimizer.param_groups for p in group['params']]
                all_reduce_params([p.grad for p in parameters if p.grad is not None], op='mean')
                wrapper.step(**(step_kwargs or {}))
                self._counted = True
            wrapper.zero_grad(**(zero_kwargs or {}))
            accumulated.batches = 0

    def _count_or_stop(self, runner: Runner, message: str) -> None:
        """Raise, or log the message with the number of skipped steps."""
        if self.action == 'stop':
            raise InvalidLossError(message)
        hub = runner.message_hub
        count = (hub.get_info(SKIPPED) if SKIPPED in hub.runtime_info else 0) + 1
        if count > self.limit:
            raise InvalidLossError(f'{message}: as limit={self.limit} steps are skipped already, the run stops')
        hub.update_info(SKIPPED, count)
        runner.logger.warning(f'{message}: step skipped, {count} of at most {self.limit}')

    def _message(self, runner: Runner, wrapper: OptimWrapper, losses: dict, loss: Tensor, own: bool) -> str:
        """What went wrong, where and with what; the same in all processes."""
        said = None
        if own:
            said = f'{_name_losses(losses, loss)}, images: {name_images(self._batch)}'
        if get_world_size() > 1:
            everyone = enumerate(all_gather_object(said))
            said = '; '.join(f'process {rank}: {words}' for rank, words in everyone if words is not None)
        where = f'iteration {runner.iter + 1}'
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            where += f' (epoch {runner.epoch + 1})'
        rates = sorted(set(wrapper.get_lr()['lr']))
        return f'{where}, learning rate {" and ".join(f"{rate:.4g}" for rate in rates)}: {said}'


def watch_losses(cfg: Config) -> None:
    """Put :class:`InvalidLossHook` into a config, as ``default_hooks.invalid_loss``, unless that is None there.

    Raises:
        ConfigError: something else than the hook's arguments is there.
    """
    if cfg.get('default_hooks') is None:
        cfg.default_hooks = {}
    hook = cfg.default_hooks.setdefault('invalid_loss', {})
    if hook is None:
        cfg.default_hooks.pop('invalid_loss')  # mmengine takes None for its own default hooks alone
    elif isinstance(hook, Mapping):
        cfg.default_hooks.invalid_loss.setdefault('type', 'InvalidLossHook')
    elif not isinstance(hook, Hook):
        raise ConfigError(
            f"default_hooks.invalid_loss={hook!r} must be a dict of InvalidLossHook's arguments or None; "
            "default_hooks.invalid_loss.action is 'stop' or 'skip'"
        )


class _Accumulated:
    """How many batches of the present accumulation have gone into the gradients."""

    batches = 0


def _name_losses(losses: dict[str, Any], loss: Tensor) -> str:
    """'loss_cls is NaN and loss_bbox is infinite': the terms, or their sum where no single one is wrong."""
    said = []
    for name, value in losses.items():
        parts = [part for part in (value if isinstance(value, list | tuple) else [value]) if isinstance(part, Tensor)]
        if 'loss' in name and not all(part.isfinite().all() for part in parts):
            said.append(f'{name} is {"NaN" if any(part.isnan().any() for part in parts) else "infinite"}')
    return ' and '.join(said) or f'loss is {"NaN" if torch.as_tensor(loss).isnan().any() else "infinite"}'


def name_images(batch: Any) -> str:
    """The files of a batch's images, or their numbers in the data set where they have no files."""
    samples = batch.get('data_samples') if isinstance(batch, Mapping) else None
    names = []
    for sample in samples if isinstance(samples, list | tuple) else []:
        get = getattr(sample, 'get', lambda key: None)
        path, index = get('img_path'), get('sample_idx')
        if path is not None or index is not None:
            names.append(str(path) if path is not None else f'number {index} of the data set')
    return ', '.join(names) or 'not known to the batch'
