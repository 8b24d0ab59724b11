"""mmengine's hooks of this project."""

from collections.abc import Sequence
from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..analysis import Recording, attention_scalars, record

__all__ = ['SKAttentionHook']


@HOOKS.register_module()
class SKAttentionHook(Hook):
    """Each SK unit's mean attention and its entropy in training, to the visualizer: to TensorBoard, files, ...

    ``custom_hooks = [dict(type='SKAttentionHook', interval=100)]`` writes
    :func:`~sk_plugins.analysis.attention_scalars` of the training batch, that of the first process where there are
    several; between, nothing is recorded.

    Args:
        interval: iterations from one record to the next.
        units: names of the units (``('SK_2_3', 'SK_5_3')``); all where None.

    Raises:
        ValueError: an ``interval`` below 1; and before training, a model without SK units or an unknown unit.
    """

    priority = 'LOW'

    def __init__(self, interval: int = 50, units: Sequence[str] | None = None) -> None:
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f'interval={interval!r} must be an integer of at least 1')
        self.interval = interval
        self.units = units
        self._recording: Recording | None = None

    def before_train(self, runner: Runner) -> None:
        record(runner.model, self.units)  # its errors, now

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if self.every_n_train_iters(runner, self.interval):
            self._recording = record(runner.model, self.units).__enter__()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        recording, self._recording = self._recording, None
        if recording is not None:
            recording.__exit__()
            scalars = attention_scalars(recording)
            if scalars:
                runner.visualizer.add_scalars(scalars, step=runner.iter + 1)
