"""tools/train.py's options and what the config becomes by them, its errors, and `python -m sk_plugins`."""

import sys
from copy import deepcopy
from unittest.mock import MagicMock

import pytest

pytest.importorskip('mmpretrain')

import torch
from helpers.training_runs import assert_sane, log_of
from mmengine.config import Config
from mmengine.runner import Runner

from sk_plugins.__main__ import main as sk_plugins_main
from sk_plugins._resources import ROOT, find_config
from sk_plugins.openmmlab.runtime.configs import ConfigError
from sk_plugins.weights import CheckpointError


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


def test_options_of_validation_reach_the_test(merged, tmp_path):
    options = ['val_dataloader.dataset.indices=20', 'val_evaluator.topk=(1,2)']
    cfg = merged('sknet_digits', '--cfg-options', *options)
    assert [cfg[f'{name}_dataloader'].dataset.indices for name in ('val', 'test')] == [20, 20]
    assert cfg.val_evaluator.topk == cfg.test_evaluator.topk == (1, 2)
    cfg = merged('sknet_digits', '--cfg-options', *options, 'test_dataloader.dataset.indices=30')
    assert [cfg[f'{name}_dataloader'].dataset.indices for name in ('val', 'test')] == [20, 30]
    path = tmp_path / 'mine.py'
    base = str(find_config('sknet_digits'))
    path.write_text(f'_base_ = [{base!r}]\ntest_dataloader = dict(batch_size=7)\n')
    cfg = merged(str(path), '--cfg-options', *options)
    assert 'indices' not in cfg.test_dataloader.dataset
    assert cfg.test_evaluator.topk == (1, 2)


@pytest.mark.parametrize('name', ['notes.txt', 'weights.pth', 'picture.png'])
def test_file_that_is_no_config(merged, tmp_path, name):
    (tmp_path / name).write_bytes(b'x')
    with pytest.raises(ConfigError, match=rf'{name}: is no config, which ends in \.py, \.json, \.yml or \.yaml$'):
        merged(str(tmp_path / name))


@pytest.mark.parametrize(
    ('word', 'said'),
    [
        ('--epochs', 'the config has them, --cfg-options'),
        ('--epohcs', 'near it is --epochs (the config has them, --cfg-options train_cfg.max_epochs=N)'),
        ('--batch_size', 'near it is --batch-size (the config has it, '),
        ('--work_dir', 'near it is --work-dir\n'),
    ],
)
def test_mistyped_option(merged, capsys, word, said):
    with pytest.raises(SystemExit):
        merged('sknet_digits', word, '3')
    assert said in capsys.readouterr().err


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


def test_python_m(short_digits, tmp_path, monkeypatch):
    """As from an installed wheel: `python -m sk_plugins train`, anywhere."""
    words = ['train', 'sknet_digits', '--no-validate', '--cfg-options', *short_digits, 'train_cfg.max_epochs=1']
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    monkeypatch.setattr(sys, 'argv', ['sk_plugins', *words, f'experiment_name={tmp_path.name}'])
    sk_plugins_main()
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
    assert '_common' not in str(caught.value).partition('\n')[0]


def test_python_m_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['sk_plugins', '--help'])
    sk_plugins_main()
    assert capsys.readouterr().out.startswith('usage: python -m sk_plugins {analyze_attention,benchmark,')


def test_resume_from_weights_alone_is_refused(load_tool, tmp_path):
    torch.save({'state_dict': {'backbone.conv1.weight': torch.zeros(1)}}, tmp_path / 'weights.pth')
    for path, message in (
        ('weights.pth', 'holds weights but no training state'),
        ('gone.pth', 'there is no such file'),
    ):
        with pytest.raises((CheckpointError, FileNotFoundError), match=f'--resume .*{path}: {message}'):
            load_tool('train').main(['sknet_digits', '--resume', str(tmp_path / path)])
