"""Runs of finetune: what it prints and writes, what starts where, and what goes on after Ctrl-C."""

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip('mmpretrain')

import torch
from _finetune import settings, training
from helpers.randomised import randomise
from mmengine.config import Config
from mmengine.runner import Runner
from PIL import Image
from safetensors.torch import save

from sk_plugins.openmmlab.runtime.resuming import ResumableCheckpointHook
from sk_plugins.weights import CheckpointError, load_checkpoint

TINY = dict(layers=(1, 1, 1, 1), channels=(16, 32, 64, 128), cardinality=8, base_width=16)


def rows_of(path):
    with path.open(newline='', encoding='utf-8') as file:
        return list(csv.reader(file))


def test_what_is_printed(finetune, colours, small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    metrics = finetune([str(colours), *small, '--from-scratch', '--export'])
    lines = capsys.readouterr().out.splitlines()
    said = [
        r'images    30 to train on, 6 held out; 3 classes, 10 images each$',
        r'model     \S+narrow\.py, 0\.7M parameters; from nothing: random weights$',
        r'input     32 x 32 pixels \(the images: 24\), mirrored at random, mean \d+/\d+/\d+, std \d+/\d+/\d+$',
        r'recipe    AdamW, learning rate 0\.\d+, batch 8, weight decay 0\.05$',
        r'length    2 epochs of 4 steps, about (\d+ min )?\d+ s for all of them; the best top-1 .* is kept$',
        r'machine   (CPU, \d+ threads?, float32|.*), no other process to read images$',
        r'epoch 1 of 2, loss \d\.\d+, top-1 \d+\.\d % \(best \d+\.\d %\), (\d+ min )?\d+ s to go$',
        r'epoch 2 of 2, loss \d\.\d+, top-1 \d+\.\d % \(best \d+\.\d %\), 0 s to go$',
        r'best: top-1 \d+\.\d % \(epoch [12] of 2\), \d of 6 images right, in (\d+ min )?\d+ s$',
        r'report: work_dirs/colours/report: classes, confusion_matrix, mistakes \(\.csv, \.png\); log: ',
        r'exported: work_dirs/colours/hub$',
        r'next: sk-plugins predict work_dirs/colours IMAGES$',
        r'      sk-plugins export work_dirs/colours hub colours_hub$',
        r'      sk-plugins push work_dirs/colours OWNER/NAME$',
    ]
    assert len(lines) == len(said), lines
    for line, expected in zip(lines, said):
        assert re.match(expected, line), line
    assert metrics == json.loads((tmp_path / 'work_dirs/colours/report/metrics.json').read_text())


@pytest.mark.slow
def test_nothing_else_is_printed(command, colours, small, tmp_path):
    """In a process of its own, with all that its imports say."""
    tools = [sys.executable, '-m', 'sk_plugins']
    done = command(*tools, 'finetune', colours, *small, '--epochs', '1', '--from-scratch', cwd=tmp_path)
    assert done.stdout.splitlines()[0].startswith('images    30 to train on')
    assert done.stderr == ''
    done = command(*tools, 'predict', 'work_dirs/colours', colours / 'red' / '0.png', cwd=tmp_path)
    assert done.stdout.startswith(f'{colours}/red/0.png  ')
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ''


def test_report(colours_run):
    report = colours_run / 'report'
    metrics = json.loads((report / 'metrics.json').read_text())
    assert metrics['images'] == 6
    header, *matrix = rows_of(report / 'confusion_matrix.csv')
    assert header == ['true \\ predicted', 'blue', 'green', 'red']
    counts = [[int(cell) for cell in row[1:]] for row in matrix]
    assert [sum(row) for row in counts] == [2, 2, 2]
    right = sum(counts[i][i] for i in range(3))
    assert metrics['top1'] == pytest.approx(100 * right / 6, abs=0.01)
    classes = rows_of(report / 'classes.csv')
    assert classes[0] == ['class', 'images', 'predicted', 'right', 'precision', 'recall', 'f1']
    assert [int(row[3]) for row in classes[1:]] == [counts[i][i] for i in range(3)]
    assert [int(row[2]) for row in classes[1:]] == [sum(row[i] for row in counts) for i in range(3)]
    mistakes = rows_of(report / 'mistakes.csv')
    assert len(mistakes) - 1 == metrics['mistakes'] == 6 - right
    assert (report / 'mistakes.png').is_file() is (right < 6)
    for name in ('confusion_matrix.png', 'classes.png'):
        assert min(Image.open(report / name).size) > 80


def test_it_learns(colours_run):
    metrics = json.loads((colours_run / 'report' / 'metrics.json').read_text())
    assert metrics['top1'] > 60  # by chance: 33


def test_of_equal_scores_the_later_is_the_best(colours_run):
    settings = dict(Config.fromfile(colours_run / 'config.py').default_hooks.checkpoint)
    hook = ResumableCheckpointHook(**{key: value for key, value in settings.items() if key != 'type'})
    is_better = hook.is_better_than['accuracy/top1']
    assert [is_better(score, 90.0) for score in (89.0, 90.0, 91.0)] == [False, True, True]
    plain = ResumableCheckpointHook(save_best='accuracy/top1', rule='greater')
    assert not plain.is_better_than['accuracy/top1'](90.0, 90.0)


def test_the_config_is_an_ordinary_one(colours_run, colours, load_tool, tmp_path):
    """tools/train.py makes the same weights of it, and tools/test.py the same score."""
    cfg = Config.fromfile(colours_run / 'config.py')
    assert cfg.model.head.num_classes == 3
    assert cfg.val_evaluator[0].topk == (1,)
    assert cfg.train_dataloader.dataset.data_root == str(colours)
    config = str(colours_run / 'config.py')
    load_tool('train').main([config, '--work-dir', str(tmp_path), '--cfg-options', f'experiment_name={tmp_path}'])
    (own,), (again,) = (list(folder.glob('epoch_*.pth')) for folder in (colours_run, tmp_path))
    assert own.name == again.name == 'epoch_2.pth'
    weights, same = load_checkpoint(own)[0], load_checkpoint(again)[0]
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    (best,) = colours_run.glob('best_*.pth')
    found = load_tool('test').main(
        [config, str(best), '--work-dir', str(tmp_path / 'test'), '--cfg-options', f'experiment_name={tmp_path}_test']
    )
    metrics = json.loads((colours_run / 'report' / 'metrics.json').read_text())
    assert found['accuracy/top1'] == pytest.approx(metrics['top1'], abs=0.01)


def test_stopped_and_resumed(colours_run, finetune, colours, small, tmp_path, monkeypatch, capsys):
    """Ctrl-C after the first epoch: one line says how to go on, and the end is that of a run that was not stopped."""
    run = ['--work-dir', str(tmp_path / 'run')]
    words = [str(colours), *small, *run, '--from-scratch', '--lr', '0.01']

    def stop(hook, runner):
        if runner.epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.ProgressHook, 'before_train_epoch', stop)
        with pytest.raises(SystemExit) as caught:
            finetune(words)
    assert caught.value.code == 130
    last = capsys.readouterr().out.splitlines()[-1]
    again = ' '.join(['sk-plugins finetune', str(colours), *run, '--resume'])
    assert last == f'stopped after 1 of 2 epochs: {again} goes on'
    finetune([str(colours), *run, '--resume'])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(',')[0] for line in lines if line.startswith('epoch')] == ['epoch 2 of 2']
    weights, same = (load_checkpoint(folder / 'epoch_2.pth')[0] for folder in (colours_run, tmp_path / 'run'))
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    # A run that is over says so, and takes the options that it was begun with, and no others.
    finetune([*words, '--resume'])
    assert 'all 2 epochs are over' in capsys.readouterr().out
    with pytest.raises(ValueError, match=r'^--epochs 9: --resume goes on with the run as it was begun'):
        finetune([str(colours), *run, '--epochs', '9', '--resume'])
    with pytest.raises(ValueError, match=r'holds a run on .*, not on other: --work-dir names another$'):
        finetune(['other', *run, '--resume'])


def test_a_resumed_run_knows_its_best_score(capsys):
    hub = SimpleNamespace(runtime_info=dict(best_score=94.4, best_ckpt='run/best_accuracy_top1_epoch_34.pth'))
    runner = SimpleNamespace(message_hub=hub, train_dataloader=[0] * 6, max_epochs=60, epoch=42)
    hook = training.ProgressHook('accuracy/top1', 'top-1')
    hook.before_train(runner)
    runner.epoch = 43
    hook.after_val_epoch(runner, {'accuracy/top1': 88.9})
    hook.stop()
    assert 'epoch 43 of 60, top-1 88.9 % (best 94.4 %), ' in capsys.readouterr().out
    assert (hook.best.score, hook.best.epoch) == (94.4, 34)


def test_a_gpu_among_those_that_are_left(load_tool, monkeypatch):
    tool = load_tool('finetune')
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '2,5')
    with pytest.raises(ValueError, match=r'^--device cuda:2: CUDA_VISIBLE_DEVICES=2,5 leaves 2, from cuda:0$'):
        tool.set_device('cuda:2', None)
    with pytest.raises(ValueError, match=r'^--device cuda:1: torch \S+ finds no such GPU'):
        tool.set_device('cuda:1', None)
    assert os.environ['CUDA_VISIBLE_DEVICES'] == '5'


@pytest.mark.parametrize('where', ['check_images', 'try_step'])
def test_stopped_before_training(finetune, colours, small, tmp_path, monkeypatch, capsys, where):
    from _finetune import checking

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checking, where, stop)
    with pytest.raises(SystemExit) as caught:
        finetune([str(colours), *small, '--from-scratch', '--work-dir', str(tmp_path / 'run')])
    assert caught.value.code == 130
    assert capsys.readouterr().out == 'stopped: no epoch is over, so the same command begins again\n'


def test_stopped_in_the_report(colours_run, finetune, colours, tmp_path, monkeypatch, capsys):
    from _finetune import reporting

    def stop(*args):
        raise KeyboardInterrupt

    ignore = shutil.ignore_patterns('report', 'hub')
    words = [str(colours), '--work-dir', str(shutil.copytree(colours_run, tmp_path / 'run', ignore=ignore))]
    with monkeypatch.context() as patch:
        patch.setattr(reporting, 'write', stop)
        with pytest.raises(SystemExit) as caught:
            finetune([*words, '--resume'])
    assert caught.value.code == 130
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f'stopped: the epochs so far are kept: sk-plugins finetune {" ".join(words)} --resume goes on'
    finetune([*words, '--resume'])
    assert (tmp_path / 'run' / 'report' / 'metrics.json').is_file()


@pytest.fixture
def before_training(monkeypatch):
    """``before_training()``: the model as it was before the first step of the run that follows."""
    seen = {}

    def stop(runner):
        runner._train_loop = runner.build_train_loop(runner._train_loop)
        runner._init_model_weights()
        seen.update({name: tensor.clone() for name, tensor in runner.model.state_dict().items()})
        raise ValueError('enough')

    monkeypatch.setattr(Runner, 'train', stop)
    return seen


def test_weights_of_the_hub(hub, finetune, colours, small, tmp_path, before_training, capsys):
    import timm

    network = randomise(timm.create_model('sknet26', **TINY, num_classes=7))
    hub.add('me/tiny', {'model.safetensors': save(network.state_dict())})
    with pytest.raises(ValueError, match='enough'):
        finetune([str(colours), *small, '--weights', 'hf-hub:me/tiny', '--work-dir', str(tmp_path / 'run')])
    model = capsys.readouterr().out.splitlines()[1]
    number = sum(not name.endswith('tracked') and not name.startswith('fc.') for name in network.state_dict())
    assert f'; {number} of {number} tensors from hf-hub:me/tiny, the classifier new' in model
    own = network.state_dict()
    own = {name: tensor for name, tensor in own.items() if not name.startswith('fc.')}
    assert all(torch.equal(before_training[f'backbone.{name}'], tensor) for name, tensor in own.items())
    assert before_training['head.fc.weight'].shape == (3, 512)


@pytest.mark.parametrize('kind', ['hub folder', 'hub', 'mmengine', 'plain'])
def test_preprocessing_of_the_weights(hub, colours_run, load_tool, tmp_path, kind):
    """Weights that say with what mean and deviation they were trained keep them."""
    (checkpoint,) = colours_run.glob('best_*.pth')
    cfg = Config.fromfile(colours_run / 'config.py')
    source = str(checkpoint)
    if kind == 'plain':
        source = str(tmp_path / 'x.pth')
        torch.save(load_checkpoint(checkpoint)[0], source)
    elif kind != 'mmengine':
        folder = load_tool('export').main([str(colours_run), 'hub', str(tmp_path / 'colours')])
        source = str(folder / 'model.safetensors')
        if kind == 'hub':
            hub.add('me/colours', {path.name: path.read_bytes() for path in folder.iterdir()})
            source = 'hf-hub:me/colours'
    network = settings.choose_network('sknet26', source)
    found = settings.with_preprocessing(network).preprocessing
    if kind == 'plain':
        assert found == {}
        return
    assert [255 * value for value in found['mean']] == pytest.approx(cfg.data_preprocessor['mean'])
    assert [255 * value for value in found['std']] == pytest.approx(cfg.data_preprocessor['std'])
    assert found['mean'][0] != pytest.approx(settings.MEAN[0] / 255, abs=1e-3)
    assert found['input_size'][-1] == 32


def test_a_config_in_a_checkpoint_is_not_run(tmp_path):
    text = f'x = open({str(tmp_path / "marker")!r}, "w")\nmodel = dict()\n'
    torch.save(dict(state_dict={'a': torch.ones(1)}, meta=dict(cfg=text)), tmp_path / 'x.pth')
    assert settings._read_preprocessing(str(tmp_path / 'x.pth')) == {}
    assert not (tmp_path / 'marker').exists()


def test_two_starts_at_once(finetune, colours, small, tmp_path, before_training):
    from _lock import lock

    work_dir = tmp_path / 'a' / 'run'
    file = work_dir / 'finetune.lock'
    words = [str(colours), *small, '--from-scratch', '--work-dir', str(work_dir)]
    held = 'import os, sys; from pathlib import Path; from _lock import lock; lock = lock(Path(sys.argv[1]), "--"); '
    held += 'lock.__enter__(); print(os.getpid(), flush=True); sys.stdin.read()'
    tools = {**os.environ, 'PYTHONPATH': str(Path(settings.__file__).parents[1])}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, '-c', held, str(file)], env=tools, **pipes) as other:
        pid = other.stdout.readline().strip()
        with pytest.raises(
            FileExistsError, match=rf'run: a run is at work there, process {pid} on .*finetune\.lock\): wait'
        ):
            finetune(words)
        assert list(work_dir.iterdir()) == [file]
        other.kill()  # which leaves its lock behind
    assert file.is_file()
    with lock(file, '--work-dir'), pytest.raises(FileExistsError, match=f'process {os.getpid()} '):
        finetune(words)
    file.write_text('1\nanother-machine\n')
    with pytest.raises(FileExistsError, match='process 1 on another-machine'):
        finetune(words)
    file.unlink()
    with pytest.raises(ValueError, match='enough'):
        finetune(words)
    assert (work_dir / 'config.py').is_file()
    assert not file.exists()


def test_the_lock_leaves_no_folders(tmp_path):
    from _lock import lock

    with lock(tmp_path / 'a' / 'b' / 'run.lock', '--work-dir'):
        assert (tmp_path / 'a' / 'b').is_dir()
    assert list(tmp_path.iterdir()) == []


def test_weights_of_another_network(finetune, colours, small, tmp_path):
    import timm

    torch.save(timm.create_model('sknet26', **{**TINY, 'base_width': 8}).state_dict(), tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match=r'other\.pth: its weights do not fit this SKNet of depth 26: '):
        finetune([str(colours), *small, '--weights', str(tmp_path / 'other.pth'), '--work-dir', str(tmp_path / 'run')])


def test_corrected_after_a_failed_start(finetune, colours, small, tmp_path, before_training):
    """A run that failed before its first epoch was over is written over, and one that has a checkpoint is not."""
    work_dir = tmp_path / 'run'
    words = [str(colours), *small, '--from-scratch', '--work-dir', str(work_dir)]
    with pytest.raises(ValueError, match='enough'):
        finetune(words)
    with pytest.raises(ValueError, match='enough'):
        finetune([*words, '--lr', '0.25'])
    assert Config.fromfile(work_dir / 'config.py').optim_wrapper.optimizer.lr == 0.25
    assert '--lr 0.25' in json.loads((work_dir / 'finetune.json').read_text())['command']
    (work_dir / 'epoch_1.pth').write_bytes(b'')
    with pytest.raises(FileExistsError, match='holds a run already'):
        finetune([*words, '--lr', '0.5'])
    assert Config.fromfile(work_dir / 'config.py').optim_wrapper.optimizer.lr == 0.25


def test_the_config_is_written_last(finetune, colours, small, tmp_path, monkeypatch):
    def fail(cfg, file):
        Path(file).write_text('model = dict(')
        raise OSError('of a test')

    monkeypatch.setattr(Config, 'dump', fail)
    with pytest.raises(OSError, match='of a test'):
        finetune([str(colours), *small, '--from-scratch', '--work-dir', str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ['finetune.json', 'train.txt', 'val.txt']


def test_frozen_stages(hub, finetune, colours, small, tmp_path):
    import timm

    network = randomise(timm.create_model('sknet26', **TINY))
    hub.add('me/tiny', {'model.safetensors': save(network.state_dict())})
    words = ['--weights', 'hf-hub:me/tiny', '--freeze', '1', '--epochs', '1', '--work-dir', str(tmp_path / 'run')]
    words += ['--layer-decay', '0.7']
    finetune([str(colours), *small, *words])
    weights, _ = load_checkpoint(tmp_path / 'run' / 'epoch_1.pth')
    own = network.state_dict()
    same = {name for name in own if torch.equal(weights.get(f'backbone.{name}', torch.empty(0)), own[name])}
    assert {name for name in own if name.startswith(('conv1.', 'bn1.', 'layer1.'))} <= same
    assert not {name for name in same if name.startswith('layer4.') and name.endswith('conv.weight')}
    cfg = Config.fromfile(tmp_path / 'run' / 'config.py')
    assert cfg.optim_wrapper.constructor == 'LearningRateDecayOptimWrapperConstructor'


def test_several_labels(labels_run):
    metrics = json.loads((labels_run / 'report' / 'metrics.json').read_text())
    assert {'mAP', 'f1_macro', 'images', 'mistakes'} == metrics.keys()
    assert 0 < metrics['mAP'] <= 100
    header, *rows = rows_of(labels_run / 'report' / 'confusion_matrix.csv')
    assert header == ['class', 'true positives', 'false positives', 'false negatives', 'true negatives']
    assert {sum(map(int, row[1:])) for row in rows} == {metrics['images']}
    cfg = Config.fromfile(labels_run / 'config.py')
    assert cfg.model.head.type == 'MultiLabelLinearClsHead'
    listed = json.loads((labels_run / 'train.json').read_text())
    assert listed['metainfo']['classes'] == ['blue', 'green', 'red']


def test_no_memory_for_a_batch(finetune, colours, small, tmp_path, monkeypatch, before_training, capsys):
    from _finetune import checking

    def step(cfg, batch, *args):
        if batch > 4:
            raise checking.TooLargeError('of a test')
        return 0.1

    monkeypatch.setattr(checking, 'try_step', step)
    with pytest.raises(
        ValueError, match=r'^a batch of 8 images of 32 x 32 does not fit .* --batch-size or --size make'
    ):
        finetune([str(colours), *small, '--from-scratch', '--work-dir', str(tmp_path / 'a')])
    words = [word for word in small if word not in ('--batch-size', '8')]
    with pytest.raises(ValueError, match='enough'):
        finetune([str(colours), *words, '--from-scratch', '--work-dir', str(tmp_path / 'b')])
    assert Config.fromfile(tmp_path / 'b' / 'config.py').train_dataloader.batch_size == 4


def test_full_disk(tmp_path, monkeypatch):
    import shutil

    from _finetune import checking

    monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**8, 10**8))
    with pytest.raises(OSError, match=r'run: 95 MB are free, and the checkpoints take 393 MB'):
        checking.check_disk(tmp_path / 'run', 10_000_000, 3)
    checking.check_disk(tmp_path / 'run', 1_000_000, 3)


@pytest.mark.parametrize(
    ('images', 'side', 'batch', 'size', 'epochs'),
    [(48, 8, 8, 64, 30), (1_437, 28, 32, 64, 14), (1_437, 100, 32, 224, 14), (50_000, 600, 32, 224, 10)],
)
def test_what_is_chosen(tmp_path, images, side, batch, size, epochs):
    from _finetune import checking, data

    items = tuple(data.Item(f'{i}.png', ('ab'[i % 2],)) for i in range(images))
    found = data.ImageSet(tmp_path, tmp_path, ('a', 'b'), items, items[:10])
    facts = checking.Facts(side, False, (1.0, 2.0, 3.0), (1.0, 1.0, 1.0))
    network = settings.choose_network('sknet50')
    assert (network.source, network.license) == ('hf-hub:timm/skresnext50_32x4d.ra_in1k', 'apache-2.0')
    recipe = settings.choose_recipe(found, facts, network, 'cpu', {})
    assert (recipe.batch, recipe.size, recipe.epochs, recipe.topk) == (batch, size, epochs, (1,))
    assert recipe.mean == pytest.approx(settings.MEAN)
    assert recipe.resize == round(size / 0.875)
    assert recipe.patience * math.ceil(images / batch) >= 200  # and so none in 30 epochs of 6 steps
    scratch = settings.choose_recipe(found, facts, settings.choose_network('sknet50', from_scratch=True), 'cpu', {})
    assert scratch.mean == (1.0, 2.0, 3.0)
    assert scratch.epochs > recipe.epochs
    assert scratch.lr == 2 * recipe.lr
    assert scratch.size == max(64, min(224, 128 if side == 100 else 2 * side))
    given = settings.choose_recipe(found, facts, network, 'cpu', dict(size=96, lr=0.5, batch_size=4, flip=False))
    assert (given.size, given.lr, given.batch, given.flip) == (96, 0.5, 4, False)


@pytest.mark.parametrize(('side', 'size'), [(8, 16), (28, 32), (100, 104), (600, 224)])
def test_a_stem_for_small_images_takes_them_as_they_are(tmp_path, side, size):
    from _finetune import checking, data

    found = data.ImageSet(tmp_path, tmp_path, ('a', 'b'), (data.Item('0.png', ('a',)), data.Item('1.png', ('b',))))
    facts = checking.Facts(side, True, (1.0, 2.0, 3.0), (1.0, 1.0, 1.0))
    network = settings.choose_network('sknet_digits', from_scratch=True)
    assert settings.choose_recipe(found, facts, network, 'cpu', {}).size == size


def test_warm_start_of_shufflenet():
    network = settings.choose_network('skshufflenetv2_x0_5', warm_start=True)
    assert network.source == 'https://download.pytorch.org/models/shufflenetv2_x0.5-f707e7126e.pth'
    assert network.license == 'bsd-3-clause'
