"""tools/train.py killed again and again, anywhere, and resumed: its end is that of a run that nothing killed."""

import os
import random
import time
import zipfile
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip('mmpretrain')

from helpers.resumed_runs import Training, assert_equal, end_of, files_of

from sk_plugins._resources import find_config

KILLS = int(os.environ.get('SK_PLUGINS_KILLS', 24))
SEED = int(os.environ.get('SK_PLUGINS_KILLS_SEED', 0))
EPOCHS = 3 * KILLS // 2

# Augmentation, drop path, workers that persist, averages, momentum, a schedule by iteration, checkpoints within epochs.
CONFIG = f"""
_base_ = [{str(find_config('sknet_digits'))!r}]
custom_imports = dict(imports=['sk_plugins.mmpretrain_models', 'helpers.resumed_runs'])
model = dict(
    backbone=dict(
        layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), drop_path_rate=0.3, norm_cfg=dict(type='BN', momentum=0.5)
    ),
    head=dict(in_channels=256),
)
train_dataloader = dict(batch_size=16, num_workers=2, persistent_workers=True, dataset=dict(indices=60))
val_dataloader = dict(batch_size=10, dataset=dict(indices=40))
optim_wrapper = dict(optimizer=dict(lr=0.05))
param_scheduler = [dict(type='CosineAnnealingLR', by_epoch=False, T_max={4 * EPOCHS})]
train_cfg = dict(max_epochs={EPOCHS})
default_hooks = dict(checkpoint=dict(interval=3, by_epoch=False, max_keep_ckpts=2), logger=dict(interval=1))
custom_hooks = [dict(type='EMAHook', momentum=0.05), dict(type='PhaseHook')]
"""


@pytest.fixture
def start(tmp_path):
    """``start(folder, command)``: a training with ``--resume`` in ``folder / 'run'``."""
    config = tmp_path / 'killed.py'
    config.write_text(CONFIG)
    trainings = []

    def start(folder, command):
        folder.mkdir(exist_ok=True)
        trainings.append(Training([config, '--work-dir', folder / 'run', '--resume'], folder, command))
        return trainings[-1]

    yield start
    for training in trainings:
        training.kill()


def partial(folder):
    return list(Path(folder, 'run').glob('.*.part'))


def assert_whole(work_dir):
    """Every checkpoint is whole, and ``last_checkpoint`` names one of them."""
    for path in work_dir.glob('*.pth'):
        with zipfile.ZipFile(path) as file:
            assert file.testzip() is None, path
    pointer = work_dir / 'last_checkpoint'
    if pointer.exists():
        assert Path(pointer.read_text()).is_file()


def aim_and_kill(training, aim, numbers):
    """The exit status. The aim is ``file``, half-written; ``start``, the first two seconds; a phase; ``any`` moment."""

    def here():
        return bool(partial(training.folder)) if aim == 'file' else training.phase == aim

    if aim == 'any':
        training.wait_for(lambda: training.phase != 'start')
    elif aim != 'start':
        for _ in range(numbers.randint(1, 3)):
            training.wait_for(lambda: not here())
            training.wait_for(here)
    if aim != 'file':
        time.sleep(numbers.uniform(0, {'any': 1, 'start': 2}.get(aim, 0.02)))
    return training.kill()


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_killed_anywhere(start, tmp_path, capsys):
    numbers = random.Random(SEED)
    killed, whole = tmp_path / 'killed', tmp_path / 'whole'
    assert start(whole, command=True).wait() == 0, (whole / 'log').read_text()[-3000:]
    landed = Counter()
    for kill in range(KILLS):
        training = start(killed, command=kill % 8 == 0)
        aim = ('any', 'step', 'file', 'validation', 'data', 'start')[kill % 6]
        status = aim_and_kill(training, aim, numbers)
        assert status == -9, f'kill {kill}: ended with {status}\n' + (killed / 'log').read_text()[-3000:]
        landed['half-written file' if partial(killed) else training.phase] += 1
        if (killed / 'run').exists():
            assert_whole(killed / 'run')
    assert start(killed, command=True).wait() == 0, (killed / 'log').read_text()[-3000:]
    assert_equal(end_of(killed / 'run'), end_of(whole / 'run'))
    assert files_of(killed / 'run') == files_of(whole / 'run')
    log = (killed / 'log').read_text()
    steps = log.count('Epoch(train)')
    with capsys.disabled():
        print(f'\n{KILLS} kills: {dict(landed)}; {4 * EPOCHS} steps, {steps} with those done again; bit-identical')
    assert sum(landed.values()) == KILLS >= 20
    assert {'step', 'validation', 'half-written file'} <= set(landed)
