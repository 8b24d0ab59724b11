"""The attention in numbers, step by step, while a network trains."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..ops import private
from .recording import Recording, record

__all__ = ['attention_scalars', 'log_attention']


def attention_scalars(attention: Recording, prefix: str = 'attention/') -> dict[str, float]:
    """Means over all that was recorded, units without a forward left out.

    Returns:
        Two kinds of numbers for every unit. 'attention/SK_2_3/5x5', and so on for each branch, is its share of the
        attention, mean over images and channels. 'attention/SK_2_3/entropy' is that of the softmax over the branches,
        in nats, from 0 (one branch takes all) to ln M (all branches alike).
    """
    names, values = [], []
    for name, unit in attention.units.items():
        a = attention[name]
        if len(a):
            names += [f'{prefix}{name}/{label}' for label in (*unit.labels, 'entropy')]
            values += [a.mean((0, 2)), torch.special.entr(a).sum(1).mean()[None]]
    return dict(zip(names, torch.cat(values).tolist())) if values else {}


class _Log:
    """What :func:`log_attention` gives: ``remove()`` ends it."""

    def __init__(self, model: nn.Module, write: Callable[[dict[str, float], int], Any], interval: int, units) -> None:
        self.step = 0
        self._write, self._interval = write, interval
        self._units = units
        self._recording: Recording | None = None
        self._handles = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end, always_call=True),
        ]

    def _begin(self, model: nn.Module, _) -> None:
        if model.training and torch.is_grad_enabled():
            self.step += 1
            if self.step % self._interval == 0:
                self._recording = record(model, self._units).__enter__()

    def _end(self, *_) -> None:
        recording, self._recording = self._recording, None
        if recording is not None:
            recording.__exit__()
            scalars = attention_scalars(recording)
            if scalars:
                self._write(scalars, self.step)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._end()


def log_attention(
    model: nn.Module, out: Any, interval: int = 50, units: Sequence[str] | None = None, start: int = 0
) -> _Log:
    """From here on, write :func:`attention_scalars` of every ``interval``-th training step.

    ::

        log_attention(model, SummaryWriter('runs/sknet50'), interval=100)
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            ...

    A step is a forward of the model in training mode with gradients on. Between the steps that are written nothing is
    recorded. The same in mmengine is :class:`~sk_plugins.openmmlab.hooks.SKAttentionHook`.

    Args:
        model: what the loop calls; where it is compiled or distributed, what ``torch.compile`` or the wrapper gave.
        out: a TensorBoard ``SummaryWriter`` (or what has its ``add_scalar``), a file that gets a line of JSON for each
            step, or a function of (scalars, step).
        interval: steps from one record to the next.
        units: names of the units; all where None.
        start: steps that were done before, where training resumes.

    Returns:
        An object whose ``remove()`` ends the logging and whose ``step`` counts.

    Raises:
        ValueError: an ``interval`` below 1, a model without SK units, an unknown unit, a model compiled in place
            (``model.compile()``), or an ``out`` of no such kind.
    """
    if not isinstance(interval, int) or interval < 1:
        raise ValueError(f'interval={interval!r} must be an integer of at least 1')
    record(model, units)  # its errors, now
    if private.is_compiled(model):
        raise ValueError('model was compiled in place by model.compile(), around which there are no hooks: give what '
                         'torch.compile(model) returns, in both places')  # fmt: skip
    if isinstance(out, (str, os.PathLike)):
        path = Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

        def write(scalars: dict[str, float], step: int) -> None:
            with path.open('a', encoding='utf-8') as file:
                file.write(json.dumps({'step': step, **scalars}) + '\n')

    elif hasattr(out, 'add_scalar'):

        def write(scalars: dict[str, float], step: int) -> None:
            for name, value in scalars.items():
                out.add_scalar(name, value, step)

    elif callable(out):
        write = out
    else:
        raise ValueError(f'out={out!r} must be a SummaryWriter, the path of a file, or a function of (scalars, step)')
    log = _Log(model, write, interval, units)
    log.step = start
    return log
