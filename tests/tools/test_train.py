"""tools/train.py: its options, the recipes, resuming, two processes, and mmpretrain's own script on our configs."""

import json
import os
import shutil
import struct
import sys
from copy import deepcopy
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest

pytest.importorskip('mmpretrain')

import mmpretrain
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.runner import Runner
from mmpretrain.datasets import FashionMNIST
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sk_plugins.__main__ import main as sk_plugins_main
from sk_plugins._resources import ROOT, find_config
from sk_plugins.openmmlab.datasets import Digits
from sk_plugins.openmmlab.runtime.sync_batchnorm import SyncBatchNorm
from sk_plugins.weights import CheckpointError, load_checkpoint


@pytest.fixture
def merged(load_tool):
    """``merged(*words)``: the config as the runner gets it."""
    tool = load_tool('train')

    def merge(*words):
        args = tool.parse_args(list(words))
        return tool.merge_args(tool.load_config(args), args)

    return merge


def log_of(work_dir, run=-1):
    """The entries of a run's scalars.json, the newest by default: (of training, of validation)."""
    scalars = sorted(Path(work_dir).glob('*/vis_data/scalars.json'))[run]
    entries = [json.loads(line) for line in scalars.read_text().splitlines()]
    return [e for e in entries if 'loss' in e], [e for e in entries if 'accuracy/top1' in e]


def assert_sane(work_dir, epoch, iteration):
    state_dict, meta = load_checkpoint(Path(work_dir) / f'epoch_{epoch}.pth')
    assert (meta['epoch'], meta['iter']) == (epoch, iteration)
    assert all(tensor.isfinite().all() for tensor in state_dict.values())


# Options


def test_defaults(merged):
    cfg, untouched = merged('sknet50_in1k'), Config.fromfile(find_config('sknet50_in1k'))
    assert (cfg.pop('work_dir'), cfg.pop('launcher')) == ('work_dirs/sknet50_in1k', 'none')
    assert cfg.to_dict() == untouched.to_dict()


@pytest.mark.parametrize('name', ['sknet_digits', 'sknet_digits.py', 'configs/sknet_digits.py'])
def test_config_by_name(merged, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert merged(name).work_dir == 'work_dirs/sknet_digits'


def test_config_by_path(merged, tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text(f'_base_ = [{str(find_config("sknet_digits"))!r}]\nmodel = dict(backbone=dict(depth=50))\n')
    cfg = merged(str(path))
    assert cfg.model.backbone.depth == 50
    assert cfg.work_dir == 'work_dirs/mine'
    path.write_text(f'_base_ = [{str(find_config("sknet_digits"))!r}]\nwork_dir = "elsewhere"\n')
    assert merged(str(path)).work_dir == 'elsewhere'
    assert merged(str(path), '--work-dir', 'here').work_dir == 'here'


@pytest.mark.parametrize(
    ('words', 'resume', 'load_from'),
    [
        ([], False, None),
        (['--resume'], True, None),
        (['--resume', 'auto'], True, None),
        (['--resume', 'epoch_3.pth'], True, 'epoch_3.pth'),
    ],
)
def test_resume_option(merged, words, resume, load_from):
    cfg = merged('sknet_digits', *words)
    assert (cfg.resume, cfg.load_from) == (resume, load_from)


def test_amp_option(merged):
    wrapper = merged('sknet_digits', '--amp').optim_wrapper
    assert (wrapper.type, wrapper.loss_scale) == ('AmpOptimWrapper', 'dynamic')
    assert wrapper.optimizer == merged('sknet_digits').optim_wrapper.optimizer
    assert (
        merged('sknet_digits', '--amp', '--cfg-options', 'optim_wrapper.loss_scale=512.').optim_wrapper.loss_scale
        == 512
    )


def test_no_validate_option(merged):
    cfg = merged('sknet_digits', '--no-validate')
    assert cfg.val_cfg is cfg.val_dataloader is cfg.val_evaluator is None
    assert 'save_best' not in cfg.default_hooks.checkpoint
    assert merged('sknet_digits').default_hooks.checkpoint.save_best == 'auto'


def test_auto_scale_lr_option(merged, tmp_path):
    assert not merged('sknet50_in1k').auto_scale_lr.get('enable', False)
    assert merged('sknet50_in1k', '--auto-scale-lr').auto_scale_lr == dict(base_batch_size=256, enable=True)
    path = tmp_path / 'mine.py'
    path.write_text(f'_base_ = [{str(find_config("sknet_digits"))!r}]\nauto_scale_lr = dict(_delete_=True)\n')
    with pytest.raises(ValueError, match=r'--auto-scale-lr: .*mine\.py does not say auto_scale_lr\.base_batch_size'):
        merged(str(path), '--auto-scale-lr')


def test_compile_option(merged):
    assert not merged('sknet_digits').get('compile', False)
    assert merged('sknet_digits', '--compile').compile is True
    cfg = merged('sknet_digits', '--compile', '--cfg-options', 'compile.backend=eager')
    assert cfg.compile == dict(backend='eager')


def test_cfg_options(merged):
    options = ['train_dataloader.batch_size=8', 'sync_bn=torch', 'train_dataloader.dataset.pipeline.0.scale=32']
    cfg = merged('sknet_digits', '--cfg-options', *options)
    assert cfg.train_dataloader.batch_size == 8
    assert cfg.sync_bn == 'torch'
    assert cfg.train_dataloader.dataset.pipeline[0].scale == 32


@pytest.mark.parametrize(
    ('word', 'said'),
    [
        ('train_dataloader', "'train_dataloader' must be KEY=VALUE"),
        ('=8', "'=8' must be KEY=VALUE"),
        ('model.out_indices=[(0,1]', "'model.out_indices=[(0,1]': Imbalanced brackets exist in (0,1"),
    ],
)
def test_malformed_cfg_options(merged, capsys, word, said):
    with pytest.raises(SystemExit):
        merged('sknet_digits', '--cfg-options', 'sync_bn=torch', word)
    assert capsys.readouterr().err.splitlines()[-1].endswith(f'error: argument --cfg-options: {said}')


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module that has not been imported yet."""
    name = 'imported_by_a_config'
    (tmp_path / f'{name}.py').touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


@pytest.mark.parametrize('text', ['', "custom_imports = dict(imports=['gone'], allow_failed_imports=False)\n"])
def test_custom_imports_by_option(merged, module, tmp_path, text):
    (tmp_path / 'mine.py').write_text(text)
    merged(str(tmp_path / 'mine.py'), '--cfg-options', f'custom_imports.imports=[{module}]')
    assert module in sys.modules


def test_custom_imports_of_the_config(merged, module, tmp_path):
    (tmp_path / 'mine.py').write_text(f'custom_imports = dict(imports=[{module!r}])\n')
    with pytest.raises(ImportError, match=r"^custom_imports: Failed to import gone: No module named 'gone'$"):
        merged(str(tmp_path / 'mine.py'), '--cfg-options', 'custom_imports.imports=[gone]')
    assert module not in sys.modules
    merged(str(tmp_path / 'mine.py'))
    assert module in sys.modules


@pytest.mark.parametrize('launcher', ['none', 'pytorch', 'slurm', 'mpi'])
def test_launcher_option(merged, launcher):
    assert merged('sknet_digits', '--launcher', launcher).launcher == launcher


def test_unknown_launcher(merged, capsys):
    with pytest.raises(SystemExit):
        merged('sknet_digits', '--launcher', 'ssh')
    assert "invalid choice: 'ssh'" in capsys.readouterr().err


@pytest.mark.parametrize(
    'name', ['sknet50_in1k', 'fcn_sknet50-d8_4xb4-80k_ade20k-512x512', 'retinanet_sknet50_fpn_1x_coco']
)
def test_losses_and_images_are_watched(load_tool, monkeypatch, tmp_path, name):
    framework = {'fcn': 'mmseg', 'ret': 'mmdet'}.get(name[:3])
    if framework:
        pytest.importorskip(framework)
    configs, runner = [], MagicMock(hooks=[])
    monkeypatch.setattr(Runner, 'from_cfg', lambda cfg: configs.append(deepcopy(cfg)) or runner)
    path = next((ROOT / 'configs').rglob(f'{name}.py'))
    options = ['default_hooks.invalid_loss.action=skip', 'unreadable_images.limit=3']
    for words in ([], ['--cfg-options', *options]):
        load_tool('train').main([str(path), '--work-dir', str(tmp_path), *words])
    plain = Config.fromfile(path)
    for cfg, limit, action in zip(configs, (None, 3), (None, 'skip')):
        assert cfg.default_hooks.invalid_loss.type == 'InvalidLossHook'
        assert cfg.default_hooks.invalid_loss.get('action') == action
        for split, most in (('train', limit), ('val', 0), ('test', 0)):
            data = cfg[f'{split}_dataloader'].dataset
            assert (data.type, data.get('limit')) == ('SkipUnreadable', most)
            assert data.dataset == plain[f'{split}_dataloader'].dataset
    # What is dumped is the config as it was.
    assert runner.dump_config.call_count == 2
    for split in ('train', 'val', 'test'):
        assert runner.cfg[f'{split}_dataloader'] == plain[f'{split}_dataloader']


# What the user can put right


def assert_one_line(done, *said):
    """The last two lines of stderr are the error and how to see more; no traceback."""
    *_, error, hint = done.stderr.strip().splitlines()
    assert hint == '(set SK_PLUGINS_TRACEBACK=1 for the traceback)'
    assert 'Traceback' not in done.stderr
    for words in said:
        assert words in error


def test_unknown_config(python_tool, tmp_path):
    done = python_tool('train', 'sknet49_in1k', status=1, cwd=tmp_path)
    assert_one_line(
        done, "train.py: error: config 'sknet49_in1k' is neither a file nor", 'sknet50_in1k', 'sknet101_in1k'
    )
    assert done.stdout == ''
    assert list(tmp_path.iterdir()) == []


def test_traceback_where_asked_for(load_tool, monkeypatch, capsys):
    tool = load_tool('train')
    monkeypatch.setattr(sys, 'argv', ['train.py', 'nonsense'])
    with pytest.raises(SystemExit) as caught:
        tool.run(tool.main)
    assert caught.value.code == 1
    assert "train.py: error: config 'nonsense' is neither a file" in capsys.readouterr().err
    monkeypatch.setenv('SK_PLUGINS_TRACEBACK', '1')
    with pytest.raises(FileNotFoundError, match='nonsense'):
        tool.run(tool.main)


@pytest.mark.parametrize('launcher', ['pytorch', 'slurm', 'mpi'])
@pytest.mark.skipif(torch.cuda.is_available(), reason='what is said where there is no GPU')
def test_launcher_without_what_it_needs(train, short_digits, tmp_path, monkeypatch, launcher):
    for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)
    said = (
        'needs torchrun, which sets RANK, WORLD_SIZE' if launcher == 'pytorch' else 'needs GPUs; on CPUs use torchrun'
    )
    with pytest.raises(ValueError, match=said):
        train('sknet_digits', tmp_path, *short_digits, arguments=['--launcher', launcher])


def test_resume_of_a_missing_checkpoint(train, short_digits, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'gone\.pth'):
        train('sknet_digits', tmp_path, *short_digits, arguments=['--resume', str(tmp_path / 'gone.pth')])


# The recipe


@pytest.mark.parametrize('depth', [26, 50, 101])
def test_recipe_is_the_papers(depth):
    cfg = Config.fromfile(find_config(f'sknet{depth}_in1k'))
    assert cfg.model.backbone == dict(type='SKNet', depth=depth, out_indices=(3,))
    assert cfg.model.head.num_classes == cfg.data_preprocessor.num_classes == 1000
    assert cfg.model.head.loss == dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')
    assert cfg.optim_wrapper.optimizer == dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4)
    assert cfg.param_scheduler == dict(type='MultiStepLR', by_epoch=True, milestones=[30, 60, 90], gamma=0.1)
    assert (cfg.train_cfg.by_epoch, cfg.train_cfg.max_epochs) == (True, 100)
    # Eight GPUs.
    assert 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == 256
    train, test = cfg.train_dataloader.dataset, cfg.val_dataloader.dataset
    assert (train.type, train.data_root, train.split) == ('ImageNet', 'data/imagenet', 'train')
    assert (test.type, test.data_root, test.split) == ('ImageNet', 'data/imagenet', 'val')
    assert [t.type for t in train.pipeline] == ['LoadImageFromFile', 'RandomResizedCrop', 'RandomFlip', 'PackInputs']
    assert train.pipeline[1].scale == 224
    assert [t.type for t in test.pipeline] == ['LoadImageFromFile', 'ResizeEdge', 'CenterCrop', 'PackInputs']
    assert (test.pipeline[1].scale, test.pipeline[1].edge, test.pipeline[2].crop_size) == (256, 'short', 224)
    assert cfg.test_dataloader == cfg.val_dataloader


@pytest.fixture(scope='module')
def build(load_tool, tmp_path_factory):
    """``build(config, *words)``: the runner of tools/train.py, with its optimizer."""
    tool = load_tool('train')

    def build_runner(config, *words):
        args = tool.parse_args([config, '--work-dir', str(tmp_path_factory.mktemp('build')), *words])
        cfg = tool.merge_args(tool.load_config(args), args)
        cfg.experiment_name = cfg.work_dir
        runner = tool.build_runner(cfg)
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
        return runner

    return build_runner


def test_no_decay_on_norms_and_biases(build):
    runner = build('sknet26_in1k')
    assert isinstance(runner.optim_wrapper.optimizer, torch.optim.SGD)
    decay = {}
    for group in runner.optim_wrapper.optimizer.param_groups:
        assert (group['lr'], group['momentum'], group['nesterov']) == (0.1, 0.9, False)
        decay.update(dict.fromkeys(group['params'], group['weight_decay']))
    seen = set()
    for module in runner.model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            plain = isinstance(module, (nn.Conv2d, nn.Linear)) and name == 'weight'
            assert decay.pop(parameter) == (1e-4 if plain else 0)
            seen.add((type(module).__name__, name))
    assert not decay
    assert seen == {
        ('Conv2d', 'weight'),
        ('BatchNorm2d', 'weight'),
        ('BatchNorm2d', 'bias'),
        ('Linear', 'weight'),
        ('Linear', 'bias'),
    }


def test_auto_scale_lr_scales(build):
    words = ['--auto-scale-lr', '--cfg-options', 'train_dataloader.batch_size=64']
    rates = build('sknet26_in1k', *words).optim_wrapper.get_lr()['lr']
    assert rates == pytest.approx([0.1 * 64 / 256] * len(rates))


def test_lr_falls_after_30_60_and_90_epochs(build, imagenet):
    runner = build('sknet26_in1k', '--cfg-options', *imagenet.options)
    scheduler = runner.build_param_scheduler(runner.cfg.param_scheduler)[0]
    rates = []
    for _ in range(100):
        rates.append(runner.optim_wrapper.get_lr()['lr'][0])
        runner.optim_wrapper.optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.1] * 30 + [0.01] * 30 + [0.001] * 30 + [0.0001] * 10)


def test_imagenet_epoch(imagenet_run, imagenet):
    assert_sane(imagenet_run, epoch=1, iteration=2)
    training, (validation,) = log_of(imagenet_run)
    # Label smoothing over a thousand classes, before anything is learnt.
    assert training[0]['loss'] == pytest.approx(np.log(1000), abs=0.5)
    assert training[0]['lr'] == 0.1
    # Six images: whole numbers of them are right, and a thousand classes are all there are to the head.
    assert validation['accuracy/top1'] * 6 / 100 == pytest.approx(round(validation['accuracy/top1'] * 6 / 100))
    assert validation['accuracy/top5'] >= validation['accuracy/top1']
    _, meta = load_checkpoint(imagenet_run / 'epoch_1.pth')
    assert tuple(meta['dataset_meta']['classes']) == imagenet.classes
    assert len(list(imagenet_run.glob('best_accuracy_top1_epoch_*.pth'))) == 1


@pytest.mark.parametrize('depth', [50, 101])
def test_imagenet_step(train, imagenet, tmp_path, depth):
    small = ['train_dataloader.dataset.pipeline.1.scale=64', 'train_dataloader.batch_size=2']
    small += ['train_dataloader.dataset.indices=2', 'train_cfg.max_epochs=1']
    no_file = ['default_hooks.checkpoint.interval=-1', 'default_hooks.checkpoint.save_last=False']
    options = [*imagenet.options, *small, *no_file, 'default_hooks.logger.interval=1']
    train(f'sknet{depth}_in1k', tmp_path, *options, arguments=['--no-validate'])
    (entry,), validations = log_of(tmp_path)
    assert entry['loss'] == pytest.approx(np.log(1000), abs=1)
    assert validations == []


# Precision, compilation, channels_last


@pytest.mark.skipif(torch.cuda.is_available(), reason='what is said where there is no GPU')
@pytest.mark.parametrize(
    ('arguments', 'options', 'said'),
    [
        (['--amp'], [], '--amp'),
        ([], ['optim_wrapper.type=AmpOptimWrapper'], "sknet_digits: optim_wrapper.type='AmpOptimWrapper'"),
    ],
)
def test_amp_on_a_cpu(train, short_digits, tmp_path, arguments, options, said):
    with pytest.raises(ValueError, match=f'^{said}: mmengine trains with mixed precision on GPUs and the like, not on'):
        train('sknet_digits', tmp_path, *short_digits, *options, arguments=arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="mmengine's AmpOptimWrapper needs a GPU")
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_amp_trains(train, short_digits, tmp_path, dtype):
    seen = set()

    def look(module, args, output):
        if isinstance(module, nn.Conv2d):
            seen.add(output.dtype)

    handle = register_module_forward_hook(look)
    try:
        options = [*short_digits, 'train_cfg.max_epochs=1', f'optim_wrapper.dtype={dtype}']
        train('sknet_digits', tmp_path, *options, arguments=['--amp', '--no-validate'])
    finally:
        handle.remove()
    assert seen == {getattr(torch, dtype)}
    assert_sane(tmp_path, epoch=1, iteration=3)


def test_autocast_step(build):
    """What --amp asks of the network, on any device: a bfloat16 step leaves finite float32 gradients."""
    runner = build('sknet_digits')
    model, device = runner.model.train(), next(runner.model.parameters()).device.type
    samples = [Digits('train', pipeline=runner.cfg.train_dataloader.dataset.pipeline)[i] for i in range(8)]
    data = model.data_preprocessor(pseudo_collate(samples), training=True)
    with torch.autocast(device, torch.bfloat16):
        loss = model(**data, mode='loss')['loss']
    loss.backward()
    with torch.no_grad():
        expected = model(**data, mode='loss')['loss']
    assert loss.item() != expected.item()
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


def test_channels_last(train, short_digits, tmp_path):
    options = [*short_digits, 'train_cfg.max_epochs=1', 'model.backbone.channels_last=True']
    train('sknet_digits', tmp_path, *options, arguments=['--no-validate'])
    assert_sane(tmp_path, epoch=1, iteration=3)


@pytest.fixture
def losses_of(train, short_digits, tmp_path):
    """``losses_of(name, *options, arguments=())``: of two iterations."""

    def run(name, *options, arguments=()):
        options = [*short_digits, 'train_cfg.max_epochs=1', 'train_dataloader.dataset.indices=32', *options]
        train('sknet_digits', tmp_path / name, *options, arguments=['--no-validate', *arguments])
        assert_sane(tmp_path / name, epoch=1, iteration=2)
        return [entry['loss'] for entry in log_of(tmp_path / name)[0]]

    yield run
    torch.compiler.reset()


def test_compile_trains(losses_of, monkeypatch):
    """Traced, but not handed to a compiler, which takes minutes on a CPU; nor is the optimizer, for each group."""
    calls, torch_compile = [], torch.compile

    def compile_(function, **kwargs):
        calls.append((function.__name__, kwargs))
        return torch_compile(function, **kwargs)

    monkeypatch.setattr(torch, 'compile', compile_)
    options = ['model.backbone.layers=1,1,1,1', 'optim_wrapper.paramwise_cfg=None']
    compiled = losses_of('compiled', *options, 'compile.backend=eager', arguments=['--compile'])
    assert calls == [('train_step', dict(backend='eager'))]
    assert compiled == pytest.approx(losses_of('plain', *options), rel=1e-4)


@pytest.mark.slow
def test_compile_trains_with_inductor(losses_of):
    assert losses_of('compiled', arguments=['--compile']) == pytest.approx(losses_of('plain'), rel=1e-2)


# Resuming


def copy_run(run, folder):
    """``run`` moved to a new work dir, as a user would move it."""
    shutil.copytree(run, folder)
    (folder / 'last_checkpoint').write_text(str(folder / 'epoch_2.pth'))
    return folder


def test_two_epochs(digits_run):
    assert_sane(digits_run, epoch=2, iteration=6)
    training, validations = log_of(digits_run)
    assert [(e['epoch'], e['iter']) for e in training] == [(1, 1), (1, 2), (1, 3), (2, 4), (2, 5), (2, 6)]
    assert [e['step'] for e in validations] == [1, 2]
    assert not (digits_run / 'epoch_1.pth').exists()  # max_keep_ckpts=1


@pytest.mark.parametrize('how', ['auto', 'path'])
def test_resume(reads_checkpoints, train, short_digits, digits_run, tmp_path, how):
    if how == 'auto':
        work_dir = copy_run(digits_run, tmp_path / 'run')
        arguments = ['--resume']
    else:
        work_dir = tmp_path / 'new'
        arguments = ['--resume', str(digits_run / 'epoch_2.pth')]
    momentum = []

    def look(optimizer, args, kwargs):
        momentum.append(next(iter(optimizer.state.values()))['momentum_buffer'].clone())

    handle = register_optimizer_step_pre_hook(look)
    try:
        train('sknet_digits', work_dir, *short_digits, 'train_cfg.max_epochs=3', arguments=arguments)
    finally:
        handle.remove()
    assert_sane(work_dir, epoch=3, iteration=9)
    training, validations = log_of(work_dir)
    assert [(e['epoch'], e['iter']) for e in training] == [(3, 7), (3, 8), (3, 9)]
    assert [e['step'] for e in validations] == [3]
    # The warm-up of two epochs is over: the schedule went on where it was.
    before, _ = log_of(digits_run)
    assert before[0]['lr'] == pytest.approx(0.002)
    assert training[0]['lr'] == pytest.approx(0.02, rel=0.02)
    # So did the optimizer.
    saved = torch.load(digits_run / 'epoch_2.pth', weights_only=False)['optimizer']['state'][0]['momentum_buffer']
    assert len(momentum) == 3
    assert torch.equal(momentum[0], saved)
    assert saved.any()


def test_resume_where_nothing_was_saved_starts_anew(train, short_digits, tmp_path):
    train('sknet_digits', tmp_path, *short_digits, 'train_cfg.max_epochs=1', arguments=['--resume', '--no-validate'])
    assert_sane(tmp_path, epoch=1, iteration=3)


# Many processes


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


def test_two_processes_resume(reads_checkpoints, dist_train, distributed_run, tmp_path):
    path = distributed_run / 'epoch_1.pth'
    dist_train(tmp_path, 2, '--resume', path)
    assert_sane(tmp_path, epoch=2, iteration=6)
    training, _ = log_of(tmp_path)
    assert [(e['epoch'], e['iter']) for e in training] == [(2, 4), (2, 5), (2, 6)]


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


# Other ways in


def test_mmpretrains_own_script(command, short_digits, tmp_path):
    script = Path(mmpretrain.__file__).parent / '.mim' / 'tools' / 'train.py'
    words = [find_config('sknet_digits'), '--work-dir', tmp_path, '--cfg-options', *short_digits]
    command(sys.executable, script, *words, 'train_cfg.max_epochs=1', cwd=tmp_path)
    assert_sane(tmp_path, epoch=1, iteration=3)


def test_python_m(command, short_digits, tmp_path):
    """As from an installed wheel: `python -m sk_plugins train`, anywhere."""
    words = ['train', 'sknet_digits', '--no-validate', '--cfg-options', *short_digits, 'train_cfg.max_epochs=1']
    command(sys.executable, '-m', 'sk_plugins', *words, cwd=tmp_path)
    work_dir = tmp_path / 'work_dirs' / 'sknet_digits'
    assert_sane(work_dir, epoch=1, iteration=3)
    assert log_of(work_dir)[1] == []


@pytest.mark.parametrize('words', [[], ['nonsense'], ['_common']], ids=str)
def test_python_m_without_a_tool(monkeypatch, words):
    monkeypatch.setattr(sys, 'argv', ['sk_plugins', *words])
    with pytest.raises(
        SystemExit, match=r'^usage: python -m sk_plugins \{analyze_attention,benchmark,benchmark_detection,\w'
    ) as caught:
        sk_plugins_main()
    assert '_common' not in str(caught.value)


def test_python_m_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['sk_plugins', '--help'])
    sk_plugins_main()
    assert capsys.readouterr().out.startswith('usage: python -m sk_plugins {analyze_attention,benchmark,')


def write_idx(folder, images, labels, split):
    """Images and labels as the two files of an MNIST-like set."""
    (folder / f'{split}-images-idx3-ubyte').write_bytes(struct.pack('>4I', 0x803, *images.shape) + images.tobytes())
    (folder / f'{split}-labels-idx1-ubyte').write_bytes(struct.pack('>2I', 0x801, len(labels)) + labels.tobytes())


@pytest.mark.filterwarnings('ignore::DeprecationWarning:mmpretrain')
def test_fashion_mnist(train, tmp_path):
    """On digits in the four files' format: the real files are not everywhere."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.zeros((80, 28, 28), np.uint8)
    images[:, 2:26, 2:26] = np.kron(digits.images[:80], np.ones((3, 3))) * 15
    labels = digits.target[:80].astype(np.uint8)
    data = tmp_path / 'data'
    data.mkdir()
    write_idx(data, images[:60], labels[:60], 'train')
    write_idx(data, images[60:], labels[60:], 't10k')
    quick = (f'dataset.data_root={data}', 'num_workers=0', 'persistent_workers=False', 'batch_size=20')
    options = [f'{split}_dataloader.{option}' for split in ('train', 'val') for option in quick]
    train(
        'sknet_fashion_mnist', tmp_path / 'run', *options, 'train_cfg.max_epochs=1', 'default_hooks.logger.interval=1'
    )
    assert_sane(tmp_path / 'run', epoch=1, iteration=3)
    training, (validation,) = log_of(tmp_path / 'run')
    assert training[0]['loss'] == pytest.approx(np.log(10), abs=0.5)
    # 20 images in one batch, so the other files were read.
    assert validation['accuracy/top1'] % 5 == pytest.approx(0)
    (log,) = (tmp_path / 'run').glob('*/*.log')
    assert 'Epoch(val) [1][1/1]' in log.read_text()
    _, meta = load_checkpoint(tmp_path / 'run' / 'epoch_1.pth')
    assert tuple(meta['dataset_meta']['classes']) == tuple(FashionMNIST.METAINFO['classes'])


def test_resume_from_weights_alone_is_refused(load_tool, tmp_path):
    torch.save({'state_dict': {'backbone.conv1.weight': torch.zeros(1)}}, tmp_path / 'weights.pth')
    for path, message in (
        ('weights.pth', 'holds weights but no training state'),
        ('gone.pth', 'there is no such file'),
    ):
        with pytest.raises((CheckpointError, FileNotFoundError), match=f'--resume .*{path}: {message}'):
            load_tool('train').main(['sknet_digits', '--resume', str(tmp_path / path)])
