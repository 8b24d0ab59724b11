"""All that is private to mmengine and mmpretrain and is used here, each with what the public way lacks."""

import inspect
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any

from mmengine.hooks import CheckpointHook
from mmengine.logging import HistoryBuffer
from mmengine.registry import build_from_cfg
from mmengine.runner import Runner
from torch import Tensor

from ..weights.files import Inert
from ..weights.names import is_timm_format, to_mmpretrain

__all__ = ['CheckpointSteps', 'History', 'TimmNames', 'find_built', 'get_start', 'set_start']


# A runner is told what to start from when it is made, and neither says it again nor takes another word.


def get_start(runner: Runner) -> tuple[bool, str | None]:
    """Whether a runner is to resume, and the checkpoint that it starts from."""
    return runner._resume, runner._load_from


def set_start(runner: Runner, resume: bool, load_from: str | None) -> None:
    runner._resume, runner._load_from = resume, load_from


class CheckpointSteps(CheckpointHook):
    """mmengine's hook, whose two methods that write and remove files can be replaced.

    Its public methods, which say when, do the writing too.
    """

    def write_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        """Save a checkpoint of this step, and remove what is outdated."""
        super()._save_checkpoint_with_step(runner, step, meta)

    def write_best(self, runner: Runner, metrics: dict[str, Any]) -> None:
        """Save the best checkpoint, if this is one, and remove the one before."""
        super()._save_best_checkpoint(runner, metrics)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        self.write_step(runner, step, meta)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict[str, Any]) -> None:
        self.write_best(runner, metrics)


class History(Inert):
    """Stands in for a ``HistoryBuffer`` of a pickle: unpickled itself, it changes what all of its class can do."""

    NAME = 'mmengine.logging.history_buffer.HistoryBuffer'

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def build(self) -> HistoryBuffer:
        """The buffer with what was logged.

        Raises:
            KeyError, TypeError, AssertionError: it holds something else.
        """
        return HistoryBuffer(*(self.state[name] for name in ('_log_history', '_count_history', 'max_length')))


class TimmNames:
    """For backbones: a whole classifier's checkpoint may have timm's names.

    ``ImageClassifier`` asks its backbone for this one method, before it loads; there is no registry of such.
    """

    def _checkpoint_filter(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        if is_timm_format(state_dict):
            renamed = to_mmpretrain(state_dict)
            state_dict.clear()
            state_dict.update(renamed)


# When a registry or a runner fails to build a part, its error names neither the config nor the place in it; only the
# stack frames hold these.

_BUILDER, _RUNNER = inspect.getfile(build_from_cfg), inspect.getfile(Runner)


def find_built(traceback: TracebackType | None, readers: Mapping[str, str]) -> tuple[str, dict[str, Any]] | None:
    """The function of mmengine's that was building the part that failed, and its variables; None where there is none.

    A registry's build (with ``cfg``, ``obj_cls`` and ``registry``) says more than the runner's methods, which are those
    that build and the ``readers``.
    """
    found: FrameType | None = None
    while traceback is not None:
        code = traceback.tb_frame.f_code
        by_registry = code.co_filename == _BUILDER and 'registry' in traceback.tb_frame.f_locals
        by_runner = code.co_name in readers or code.co_name.lstrip('_').startswith('build_')
        if by_registry or (code.co_filename == _RUNNER and by_runner):
            found = traceback.tb_frame
        traceback = traceback.tb_next
    return None if found is None else (found.f_code.co_name.lstrip('_'), dict(found.f_locals))
