"""Runners with all of this package: for the project's tools, and by a config for mmengine's and its frameworks' own."""

from collections.abc import Sequence
from copy import deepcopy

from mmengine.config import Config
from mmengine.registry import RUNNERS, DefaultScope
from mmengine.runner import Runner

from .classes import ClassCountHook
from .configs import check_hooks, check_keys, explain_config
from .distributed import TotalBatchHook, use_gloo
from .images import skip_unreadable
from .loading import CheckpointFitHook
from .losses import watch_losses
from .resuming import make_resumable

__all__ = ['SurvivingRunner', 'build_runner']


@RUNNERS.register_module()
class SurvivingRunner(Runner):
    """mmengine's ``Runner`` that does for any config what ``tools/train.py`` does.

    With ``runner_type='SurvivingRunner'`` in a config, and this package among its ``custom_imports``, a run that is
    killed goes on as if it had not been, by ``resume=True``. ``default_hooks.invalid_loss`` and ``unreadable_images``
    say what happens at a loss that is NaN and at a broken image. Several processes train on CPUs, too.

    Raises:
        ConfigError: the config cannot be built; the message names the place in it.
    """

    @classmethod
    def from_cfg(cls, cfg: Config) -> 'SurvivingRunner':
        """A runner for a config, which stays as it is."""
        cfg = deepcopy(cfg) if isinstance(cfg, Config) else Config(deepcopy(dict(cfg)))
        use_gloo(cfg)
        check_keys(cfg)
        own = deepcopy(cfg)
        watch_losses(make_resumable(cfg))
        skip_unreadable(cfg)
        with explain_config(own, constructing=True):
            runner = super().from_cfg(cfg)
        _complete(runner, own)
        return runner


def build_runner(cfg: Config, leave_out: Sequence[str] = ()) -> Runner:
    """mmengine's runner for a config; with a launcher, in a process group that also works without a GPU.

    Its data sets of image files skip, or stop at, those that cannot be read: ``unreadable_images`` in the config.
    What it loads must fit the model, but for the tensors whose names begin as ``leave_out`` says.

    Raises:
        ConfigError: the config cannot be built.
    """
    use_gloo(cfg)
    check_keys(cfg)
    own = deepcopy(cfg)
    skip_unreadable(cfg)
    with explain_config(own, constructing=True):
        if 'runner_type' in cfg:
            with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
                runner = RUNNERS.build(cfg)
        else:
            runner = Runner.from_cfg(cfg)
    _complete(runner, own, leave_out)
    return runner


def _complete(runner: Runner, cfg: Config, leave_out: Sequence[str] = ()) -> None:
    # What is written into the work dir and into checkpoints can be read as the config that it comes from.
    runner.cfg = cfg
    runner.dump_config()
    check_hooks(runner)
    for hook in (CheckpointFitHook(leave_out), ClassCountHook(), TotalBatchHook()):
        same = [one for one in runner.hooks if type(one) is type(hook)]
        if not same:
            runner.register_hook(hook)
        elif leave_out and isinstance(hook, CheckpointFitHook):
            same[0].leave_out = hook.leave_out
