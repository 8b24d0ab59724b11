"""A config that names the runtime and its runner, with mmpretrain's own tools/train.py."""

import pickle
from pathlib import Path

import pytest

pytest.importorskip('mmpretrain')

import mmpretrain
import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.registry import RUNNERS

import sk_plugins.mmpretrain_models
from sk_plugins._resources import find_config
from sk_plugins.openmmlab.runtime.configs import ConfigError
from sk_plugins.openmmlab.runtime.loading import CheckpointFitHook
from sk_plugins.openmmlab.runtime.losses import InvalidLossHook
from sk_plugins.openmmlab.runtime.resuming import ResumableCheckpointHook
from sk_plugins.openmmlab.runtime.runner import SurvivingRunner, build_runner

CONFIG = """
_base_ = {base!r}
custom_imports = dict(imports=['sk_plugins.mmpretrain_models', 'sk_plugins.openmmlab.runtime'])
runner_type = 'SurvivingRunner'
model = dict(backbone=dict(layers=(1, 1, 1, 1)))
train_dataloader = dict(num_workers=0, persistent_workers=False, batch_size=8, dataset=dict(indices=16))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(indices=16))
train_cfg = dict(max_epochs=1)
default_hooks = dict(checkpoint=dict(interval=1))
randomness = dict(seed=0)
"""
PACKAGE = Path(sk_plugins.__file__).parents[1]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(CONFIG.format(base=str(find_config('sknet_digits').resolve())))
    return path


@pytest.fixture
def own_tool(run_python, config):
    tool = Path(mmpretrain.__file__).parent / '.mim' / 'tools' / 'train.py'
    env = {'PYTHONPATH': str(PACKAGE), 'PATH': '', 'HOME': str(config.parent), 'OMP_NUM_THREADS': '1'}
    return lambda *words: run_python(
        tool, config, '--work-dir', config.parent / 'run', *words, cwd=config.parent, env=env
    )


class Code:
    def __reduce__(self):
        return exec, ("open('marker', 'w')",)


@pytest.mark.slow
def test_mmpretrains_tool(own_tool, config):
    """It runs nothing that a checkpoint holds, passes a damaged one over, and goes on from the whole one."""
    run = config.parent / 'run'
    cfg = Config.fromfile(config)
    cfg.work_dir = str(run)
    RUNNERS.build(cfg).train()
    assert torch.load(run / 'epoch_1.pth', weights_only=False)['resuming']['validated'] == 2
    (run / 'epoch_2.pth').write_bytes(pickle.dumps(Code()))
    (run / 'last_checkpoint').write_text(str(run / 'epoch_2.pth'))
    done = own_tool('--resume', '--cfg-options', 'train_cfg.max_epochs=2')
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (config.parent / 'marker').exists()
    assert 'epoch_2.pth cannot be read' in done.stdout + done.stderr
    assert torch.load(run / 'epoch_2.pth', weights_only=False)['meta']['epoch'] == 2


def test_what_the_runner_has(config, tmp_path):
    cfg = Config.fromfile(config)
    cfg.work_dir = str(tmp_path / 'run')
    before = cfg.to_dict()
    runner = RUNNERS.build(cfg)
    assert cfg.to_dict() == before
    assert type(runner) is SurvivingRunner
    kinds = [type(hook) for hook in runner.hooks]
    assert {CheckpointFitHook, InvalidLossHook, ResumableCheckpointHook} <= set(kinds)
    assert CheckpointHook not in kinds
    assert Config.fromfile(tmp_path / 'run' / 'config.py').default_hooks.checkpoint.type == 'CheckpointHook'


def test_by_the_projects_tools(config, tmp_path):
    """Whose hooks and the runner's are the same ones."""
    cfg = Config.fromfile(config)
    cfg.update(work_dir=str(tmp_path / 'run'), launcher='none', experiment_name=f'{tmp_path.name}_tools')
    runner = build_runner(cfg, leave_out=('head.',))
    (hook,) = (hook for hook in runner.hooks if isinstance(hook, CheckpointFitHook))
    assert hook.leave_out == ('head.',)


def test_a_wrong_config(config, tmp_path):
    cfg = Config.fromfile(config)
    changes = {'work_dir': str(tmp_path / 'run'), 'experiment_name': tmp_path.name, 'model.backbone.depth': 51}
    cfg.merge_from_dict(changes)
    with pytest.raises(ConfigError, match=r'^model\.backbone: depth=51 is unknown: choose one of 26, 29, 50, 101$'):
        RUNNERS.build(cfg)
