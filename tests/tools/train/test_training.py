"""What tools/train.py trains: the recipes, precision, compilation, resuming, other data."""

import functools
import shutil
import struct

import numpy as np
import pytest

pytest.importorskip('mmpretrain')

import torch
from helpers.tolerances import assert_close
from helpers.training_runs import assert_sane, log_of
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmpretrain.datasets import FashionMNIST
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sk_plugins._resources import find_config
from sk_plugins.openmmlab.datasets import Digits
from sk_plugins.weights import load_checkpoint


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


@pytest.mark.parametrize('depth', [50, pytest.param(101, marks=pytest.mark.slow)])
def test_imagenet_step(train, imagenet, tmp_path, depth):
    small = ['train_dataloader.dataset.pipeline.1.scale=64', 'train_dataloader.batch_size=2']
    small += ['train_dataloader.dataset.indices=2', 'train_cfg.max_epochs=1']
    no_file = ['default_hooks.checkpoint.interval=-1', 'default_hooks.checkpoint.save_last=False']
    options = [*imagenet.options, *small, *no_file, 'default_hooks.logger.interval=1']
    train(f'sknet{depth}_in1k', tmp_path, *options, arguments=['--no-validate'])
    (entry,), validations = log_of(tmp_path)
    assert entry['loss'] == pytest.approx(np.log(1000), abs=1)
    assert validations == []


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
    samples = [Digits('train', pipeline=runner.cfg.train_dataloader.dataset.pipeline)[i] for i in range(4)]
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


@pytest.mark.slow
def test_compile_trains(losses_of, monkeypatch):
    """Traced, but not handed to a compiler, which takes minutes on a CPU; nor is the optimizer, for each group."""
    calls, torch_compile = [], torch.compile

    @functools.wraps(torch_compile)  # whose arguments are those that a config may have
    def compile_(function, **kwargs):
        calls.append((function.__name__, kwargs))
        return torch_compile(function, **kwargs)

    monkeypatch.setattr(torch, 'compile', compile_)
    options = ['model.backbone.layers=1,1,1,1', 'optim_wrapper.paramwise_cfg=None']
    compiled = losses_of('compiled', *options, 'compile.backend=eager', arguments=['--compile'])
    assert calls == [('train_step', dict(backend='eager'))]
    # A step makes the difference of the weights larger.
    assert_close(compiled, losses_of('plain', *options), length=1000, dtype=torch.float32, gain=10)


@pytest.mark.slow
def test_compile_trains_with_inductor(losses_of):
    assert losses_of('compiled', arguments=['--compile']) == pytest.approx(losses_of('plain'), rel=1e-2)


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


@pytest.mark.parametrize('how', ['auto', pytest.param('path', marks=pytest.mark.slow)])
def test_resume(train, short_digits, digits_run, tmp_path, how):
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


def test_resume_of_a_finished_run_says_so(train, short_digits, digits_run, tmp_path):
    shutil.copytree(digits_run, tmp_path / 'run')
    train('sknet_digits', tmp_path / 'run', *short_digits, 'train_cfg.max_epochs=2', arguments=['--resume'])
    log = sorted((tmp_path / 'run').glob('*/*.log'))[-1].read_text()
    said = 'All 2 epochs of this run are over: there is nothing to go on with. train_cfg.max_epochs makes it longer.'
    assert log.count(said) == 1
    assert 'Epoch(train)' not in log


def test_resume_where_nothing_was_saved_starts_anew(train, short_digits, tmp_path):
    train('sknet_digits', tmp_path, *short_digits, 'train_cfg.max_epochs=1', arguments=['--resume', '--no-validate'])
    assert_sane(tmp_path, epoch=1, iteration=3)


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
