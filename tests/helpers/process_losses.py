"""A hook for configs of tests: mmengine logs the first process's loss alone."""

from pathlib import Path

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class ProcessLossHook(Hook):
    """Writes a line with every step's number and loss of this process into ``losses_RANK`` in the work dir."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        with open(Path(runner.work_dir) / f'losses_{get_rank()}', 'a') as file:
            file.write(f'{runner.iter + 1} {float(outputs["loss"]):.9f}\n')
