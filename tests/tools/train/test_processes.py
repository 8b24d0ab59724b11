"""Two processes, the scripts that start them, and mmpretrain's own script on our configs."""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip('mmpretrain')

import mmpretrain
import torch
import torch.distributed as dist
from helpers.training_runs import assert_sane, log_of
from torch.nn.modules.batchnorm import _BatchNorm

from sk_plugins._resources import ROOT, find_config
from sk_plugins.openmmlab.runtime.sync_batchnorm import SyncBatchNorm


@pytest.mark.skipif(torch.cuda.is_available(), reason='gloo is for CPUs')
def test_sync_bn_is_one_option(build, monkeypatch, free_port):
    """In a process group of one."""
    for name, value in dict(RANK='0', WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port()).items():
        monkeypatch.setenv(name, value)
    try:
        words = ['sknet_digits', '--launcher', 'pytorch', '--cfg-options', 'sync_bn=torch']
        norms = [type(m) for m in build(*words).model.modules() if isinstance(m, _BatchNorm)]
    finally:
        dist.destroy_process_group()
    plain = [m for m in build('sknet_digits').model.modules() if isinstance(m, _BatchNorm)]
    assert set(norms) == {SyncBatchNorm}
    assert len(norms) == len(plain) > 30


def on_cpus(free_port):
    return {'PORT': free_port(), 'CUDA_VISIBLE_DEVICES': ''}


@pytest.fixture(scope='module')
def dist_train(command, short_digits, free_port):
    """``dist_train(work_dir, epochs, *words)``: sknet_digits in two processes, through tools/dist_train.sh."""

    def run(work_dir, epochs, *words):
        words = ['sknet_digits', '2', '--work-dir', work_dir, *words, '--cfg-options', *short_digits]
        words += ['train_dataloader.batch_size=8', 'val_dataloader.batch_size=5', f'train_cfg.max_epochs={epochs}']
        return command('bash', ROOT / 'tools' / 'dist_train.sh', *words, env=on_cpus(free_port), cwd=work_dir)

    return run


@pytest.fixture(scope='module')
def distributed_run(dist_train, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('distributed')
    dist_train(work_dir, 1)
    return work_dir


@pytest.mark.slow
def test_two_processes(distributed_run):
    # 48 images, 8 at a time: six iterations for one process, three where each has half of them.
    assert_sane(distributed_run, epoch=1, iteration=3)
    training, (validation,) = log_of(distributed_run)
    assert [(e['epoch'], e['iter']) for e in training] == [(1, 1), (1, 2), (1, 3)]
    (log,) = distributed_run.glob('*/*.log')  # the first process's alone
    text = log.read_text()
    # 20 images, 5 at a time, in steps of 5 %.
    assert 'Epoch(val) [1][2/2]' in text
    assert validation['accuracy/top1'] % 5 == pytest.approx(0)
    assert 'Distributed training: True' in text
    assert 'GPU number: 2' in text


@pytest.mark.slow
def test_two_processes_resume(dist_train, distributed_run, tmp_path):
    path = distributed_run / 'epoch_1.pth'
    dist_train(tmp_path, 2, '--resume', path)
    assert_sane(tmp_path, epoch=2, iteration=6)
    training, _ = log_of(tmp_path)
    assert [(e['epoch'], e['iter']) for e in training] == [(2, 4), (2, 5), (2, 6)]


@pytest.mark.slow
def test_two_processes_test(command, load_tool, distributed_run, short_digits, free_port, tmp_path):
    words = ['sknet_digits', str(distributed_run / 'epoch_1.pth')]
    options = ['--work-dir', str(tmp_path), '--cfg-options', *short_digits]
    out = ['--out', tmp_path / 'metrics.json']
    command('bash', ROOT / 'tools' / 'dist_test.sh', *words, '2', *out, *options, env=on_cpus(free_port), cwd=tmp_path)
    expected = load_tool('test').main([*words, *options])
    assert json.loads((tmp_path / 'metrics.json').read_text()) == expected


@pytest.mark.parametrize(('script', 'words'), [('dist_train', 1), ('dist_test', 2), ('slurm_train', 3)])
def test_scripts_usage(command, script, words):
    done = command('bash', ROOT / 'tools' / f'{script}.sh', *['x'] * words, status=2)
    usage, *more = done.stderr.splitlines()
    assert usage.startswith(f'# tools/{script}.sh ')
    assert more
    assert all(line.startswith('# ') for line in more)


def test_slurm_train_calls_srun(command, tmp_path):
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    env = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'GPUS': '16', 'SRUN_ARGS': '--qos normal'}
    words = ['gpu', 'job', 'sknet50_in1k', 'work', '--amp']
    lines = command('bash', ROOT / 'tools' / 'slurm_train.sh', *words, env=env).stdout.splitlines()
    assert lines[:3] == ['-p', 'gpu', '--job-name=job']
    assert {'--ntasks=16', '--ntasks-per-node=8', '--gres=gpu:8', '--cpus-per-task=5'} <= set(lines)
    assert lines[lines.index('--qos') + 1] == 'normal'
    script, *rest = lines[lines.index('python') + 2 :]
    assert script.endswith('tools/train.py')
    assert rest == ['sknet50_in1k', '--work-dir', 'work', '--launcher', 'slurm', '--amp']


@pytest.mark.slow
def test_mmpretrains_own_script(run_python, short_digits, tmp_path):
    script = Path(mmpretrain.__file__).parent / '.mim' / 'tools' / 'train.py'
    words = [find_config('sknet_digits'), '--work-dir', tmp_path, '--cfg-options', *short_digits]
    done = run_python(script, *words, 'train_cfg.max_epochs=1', cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_sane(tmp_path, epoch=1, iteration=3)
