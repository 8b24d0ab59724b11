"""The run itself: mmengine's runner, with one line on the terminal and the rest in its log file."""

import contextlib
import io
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from sk_plugins.openmmlab.runtime.configs import explain_config
from sk_plugins.openmmlab.runtime.losses import watch_losses
from sk_plugins.openmmlab.runtime.resuming import make_resumable
from sk_plugins.openmmlab.runtime.runner import build_runner

from .settings import say_time

__all__ = ['ProgressHook', 'Stopped', 'build', 'train']


class Stopped(KeyboardInterrupt):
    """The user stopped the run; ``epochs`` are behind it."""

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.epochs = epochs


@dataclass
class Best:
    """The best score so far, and its epoch."""

    score: float | None = None
    epoch: int = 0


class ProgressHook(Hook):
    """One line for the run on a terminal, and one for each epoch in a file: epoch, loss, score, time to go.

    Attributes:
        best: the best score that it saw.
        trained: whether there was a step.

    Args:
        monitor: the score's name among the metrics.
        title: what the line calls it.
    """

    priority = 'LOWEST'

    def __init__(self, monitor: str, title: str) -> None:
        self.monitor, self.title = monitor, title
        self.best = Best()
        self.trained = False
        self._console = Console(file=sys.stdout)
        self._progress: Progress | None = None
        self._loss, self._score, self._start, self._behind = '', '', 0.0, 0

    def before_train(self, runner: Runner) -> None:
        self.best = _best_of(runner) or self.best  # of a run that is resumed
        steps = len(runner.train_dataloader)
        self._start, self._behind = time.perf_counter(), runner.epoch
        self._progress = Progress(
            TextColumn('{task.description}'),
            BarColumn(bar_width=20),
            TextColumn('{task.percentage:>3.0f} %, to go'),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task('', total=runner.max_epochs * steps, completed=runner.epoch * steps)
        self._progress.start()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        self.trained = True
        if outputs and 'loss' in outputs:
            self._loss = f'loss {float(outputs["loss"]):.3f}'
        self._progress.update(self._task, advance=1, description=self._line(runner.epoch + 1, runner.max_epochs))

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        score = (metrics or {}).get(self.monitor)
        if self._progress is None or score is None:
            return
        if self.best.score is None or score >= self.best.score:
            self.best = Best(score, runner.epoch)
        self._score = f'{self.title} {score:.1f} % (best {self.best.score:.1f} %)'
        if not self._console.is_terminal:
            done = runner.epoch - self._behind
            left = (time.perf_counter() - self._start) / max(1, done) * (runner.max_epochs - runner.epoch)
            print(f'{self._line(runner.epoch, runner.max_epochs)}, {say_time(left)} to go', flush=True)

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()

    def print(self, text: str) -> None:
        """A line above the progress line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _line(self, epoch: int, epochs: int) -> str:
        return ', '.join(filter(None, [f'epoch {epoch} of {epochs}', self._loss, self._score]))


class _Warnings(logging.Handler):
    """Warnings, a line each, above the progress line."""

    def __init__(self, hook: ProgressHook) -> None:
        super().__init__(logging.WARNING)
        self.hook = hook

    def emit(self, record: logging.LogRecord) -> None:
        said = ' '.join(record.getMessage().split())
        if 'deprecated' not in said:  # mmengine's, of its own
            self.hook.print(f'warning: {said}')


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within it, loggers that are made write to no terminal: mmengine's take ``sys.stdout`` as it is then."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def build(cfg: Config, resume: bool, monitor: str, title: str) -> tuple[Runner, ProgressHook]:
    """The runner of a config, as ``tools/train.py`` makes it, with the progress line.

    Raises:
        ConfigError, CheckpointError, HubError: as ``tools/train.py`` does.
    """
    cfg.launcher = 'none'
    cfg.resume = resume
    cfg = make_resumable(cfg)
    watch_losses(cfg)
    hook = ProgressHook(monitor, title)
    with _quiet():
        runner = build_runner(cfg)
    for handler in runner.logger.handlers:
        if type(handler) is logging.StreamHandler:
            handler.setLevel(logging.CRITICAL + 1)
    runner.register_hook(hook)
    return runner, hook


def train(runner: Runner, hook: ProgressHook) -> Best:
    """Train to the end, and say the best score; it is the best of the whole run where that was resumed.

    Raises:
        Stopped: by Ctrl-C.
    """
    warned = _Warnings(hook)
    runner.logger.addHandler(warned)
    try:
        with explain_config(runner.cfg), _quiet_warnings():
            runner.train()
    except KeyboardInterrupt:
        raise Stopped(runner.epoch) from None
    finally:
        runner.logger.removeHandler(warned)  # mmengine's loggers outlive their runners, and are asked by the next
        hook.stop()
    return _best_of(runner) or hook.best


def _best_of(runner: Runner) -> Best | None:
    """The best score that mmengine knows of, and that checkpoint's epoch; it comes back when a run is resumed."""
    hub = runner.message_hub.runtime_info
    epoch = Path(hub.get('best_ckpt', '')).stem.rpartition('_')[2]
    return Best(float(hub['best_score']), int(epoch)) if 'best_score' in hub and epoch.isdigit() else None


@contextlib.contextmanager
def _quiet_warnings() -> Iterator[None]:
    """mmengine's and torch's warnings of their own defaults stay off the terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


def find_best(work_dir: Path) -> Path:
    """The best checkpoint of a run, or its last.

    Raises:
        FileNotFoundError: there is none.
    """
    best = sorted(work_dir.glob('best_*.pth'), key=lambda path: path.stat().st_mtime)
    if best:
        return best[-1]
    pointer = work_dir / 'last_checkpoint'
    last = work_dir / Path(pointer.read_text().strip()).name if pointer.is_file() else None
    if last is None or not last.is_file():
        raise FileNotFoundError(f'{work_dir}: holds no checkpoint: no epoch of the run is over yet')
    return last
