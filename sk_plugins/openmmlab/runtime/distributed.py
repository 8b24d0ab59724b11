"""Training in several processes: on CPUs too, resumed by another number of them, and stopped where one is lost."""

import datetime
import os
import time

import torch
import torch.distributed as dist
from mmengine.config import Config, ConfigDict
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel, is_model_wrapper
from mmengine.registry import HOOKS, MODEL_WRAPPERS
from mmengine.runner import Runner
from torch import nn

from .sync_batchnorm import synchronise

__all__ = [
    'CPUDistributedDataParallel',
    'TotalBatchHook',
    'is_lost_peer',
    'unwrap',
    'use_gloo',
    'wait_for_agent',
]


@MODEL_WRAPPERS.register_module()
class CPUDistributedDataParallel(MMDistributedDataParallel):
    """mmengine's wrapper for processes on CPUs, where ``nn.SyncBatchNorm`` cannot train and ours takes its place.

    That holds for ``sync_bn='torch'`` and for ``norm_cfg=dict(type='SyncBN')``.
    """

    def __init__(self, module: nn.Module, **kwargs) -> None:
        super().__init__(module=synchronise(module), **kwargs)


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, of one that a wrapper trains in several processes."""
    return model.module if is_model_wrapper(model) else model


@HOOKS.register_module()
class TotalBatchHook(Hook):
    """Writes into every checkpoint how many images a step took, and warns where that is another number than it was for.

    A run that starts is compared with ``auto_scale_lr.base_batch_size``, where the learning rate is not scaled by it; a
    difference of less than half is passed over.

    The optimizer, and schedules and counts by iteration, go on from where they were: that fits where the number of
    processes times ``train_dataloader.batch_size`` stays what it was.
    """

    def __init__(self) -> None:
        self._saved: dict[str, int] | None = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self._saved = checkpoint.get('meta', {}).get('batch')

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint['meta']['batch'] = _batch(runner)

    def before_train(self, runner: Runner) -> None:
        saved, self._saved = self._saved, None
        if runner.iter == 0:
            _warn_of_rate(runner)
        if not saved or runner.iter == 0:  # the weights alone were loaded
            return
        old, new = saved['processes'] * saved['size'], _batch(runner)
        if old == new['processes'] * new['size']:
            return
        size, rest = divmod(old, new['processes'])
        fitting = 'another number of processes, which divides it' if rest else f'train_dataloader.batch_size={size}'
        runner.logger.warning(
            f'The checkpoint is of {saved["processes"]} processes with {saved["size"]} images each, {old} a step, and '
            f'goes on with {new["processes"]} of {new["size"]}, {new["processes"] * new["size"]} a step: its learning '
            f'rate was for {old}, and what counts iterations goes on from {runner.iter}. For {old} a step again: '
            f'{fitting}.'
        )


def _warn_of_rate(runner: Runner) -> None:
    base = (runner.auto_scale_lr or {}).get('base_batch_size')
    if not base or runner.auto_scale_lr.get('enable'):
        return
    batch, wrapper = _batch(runner), runner.optim_wrapper
    size = batch['processes'] * batch['size'] * getattr(wrapper, '_accumulative_counts', 1)
    if 2 / 3 < size / base < 3 / 2 or not isinstance(getattr(wrapper, 'defaults', {}).get('lr'), float):
        return
    rate = wrapper.defaults['lr']
    runner.logger.warning(
        f'The learning rate, {rate:g}, is for {base} images a step, and this run takes {size}: '
        f'auto_scale_lr.enable=True (--auto-scale-lr) makes it {rate * size / base:g}, '
        f'auto_scale_lr.base_batch_size={size} says that it is meant.'
    )


def _batch(runner: Runner) -> dict[str, int]:
    loader = runner.train_dataloader
    size = loader.batch_size or getattr(loader.batch_sampler, 'batch_size', 1)
    return dict(processes=get_world_size(), size=size)


def init_gloo(timeout: float | None = None) -> None:
    """The process group of torchrun's processes, over gloo; ``timeout`` in seconds, torch's own (1800) where None."""
    limit = dist.default_pg_timeout if timeout is None else datetime.timedelta(seconds=timeout)
    store, rank, world_size = next(dist.rendezvous('env://', timeout=limit))
    if os.environ.get('GROUP_WORLD_SIZE') == '1':
        # Unless it is told of a rendezvous backend, torchrun keeps its store over a restart, and the dead processes'
        # addresses in it. On several nodes the numbers of restarts may differ, so that they are no common name.
        store = dist.PrefixStore(f'restart_{os.environ["TORCHELASTIC_RESTART_COUNT"]}', store)
    dist.init_process_group('gloo', store=store, rank=rank, world_size=world_size, timeout=limit)


def use_gloo(cfg: Config) -> None:
    """Where a config has a launcher and there is no GPU, make the process group and name the wrapper for CPUs.

    mmengine's own launcher calls CUDA whatever the backend, so on CPUs the group is made before the runner.

    Raises:
        ValueError: a launcher other than torchrun's, or no torchrun.
    """
    launcher = cfg.get('launcher', 'none')
    if launcher == 'none' or torch.cuda.is_available():
        return
    if launcher != 'pytorch':
        raise ValueError(f'launcher={launcher!r} needs GPUs; on CPUs use torchrun and --launcher pytorch')
    missing = [name for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT') if name not in os.environ]
    if missing:
        raise ValueError(f"launcher='pytorch' needs torchrun, which sets {', '.join(missing)}: see tools/dist_train.sh")
    if not dist.is_initialized():
        init_gloo(cfg.get('env_cfg', {}).get('dist_cfg', {}).get('timeout'))
    if cfg.get('model_wrapper_cfg') is None:
        cfg.model_wrapper_cfg = ConfigDict(
            type='CPUDistributedDataParallel',
            device_ids=None,
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        )


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process of the group is gone or silent, by gloo's or torch's own word."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and 'gloo' in str(error))


def wait_for_agent(seconds: float) -> None:
    """Under torchrun, give it time to end this process, as it does, in silence, where another one failed first."""
    if 'TORCHELASTIC_RUN_ID' in os.environ:
        time.sleep(seconds)
