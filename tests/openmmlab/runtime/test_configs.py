"""What is said of a config that cannot be built: one line with the place in it."""

import ast
import re
from pathlib import Path

import pytest

pytest.importorskip('mmpretrain')

import mmpretrain
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, LOOPS, METRICS, PARAM_SCHEDULERS, DefaultScope
from mmengine.runner import Runner
from mmpretrain.registry import MODELS
from torch import nn
from torch.optim import SGD

import sk_plugins.mmpretrain_models  # noqa: F401
from sk_plugins._resources import find_config
from sk_plugins.openmmlab.runtime import configs
from sk_plugins.openmmlab.runtime.configs import (
    ConfigError,
    check_keys,
    check_sections,
    explain_config,
    explain_parsing,
)
from sk_plugins.weights import CheckpointError

LINEAR = nn.Linear(2, 2)

BUILD = {
    'model': MODELS.build,
    'train_dataloader': lambda cfg: Runner.build_dataloader(cfg, seed=0),
    'val_dataloader': lambda cfg: Runner.build_dataloader(cfg, seed=0),
    'default_hooks': lambda cfg: [HOOKS.build(hook) for name, hook in cfg.items() if name != 'visualization'],
    'optim_wrapper': lambda cfg: build_optim_wrapper(LINEAR, cfg),
    'param_scheduler': lambda cfg: PARAM_SCHEDULERS.build(
        cfg[0], default_args=dict(optimizer=SGD(LINEAR.parameters()), epoch_length=3)
    ),
    'val_evaluator': METRICS.build,
    'val_cfg': lambda cfg: LOOPS.build(
        cfg, default_args=dict(type='ValLoop', runner=None, dataloader={}, evaluator={})
    ),
}


def said_of(*options, config='sknet_digits'):
    cfg = Config.fromfile(find_config(config))
    for option in options:
        key, _, value = option.partition('=')
        cfg.merge_from_dict({key: value})
    section = options[0].partition('.')[0]
    with DefaultScope.overwrite_default_scope('mmpretrain'), pytest.raises(ConfigError) as caught, explain_config(cfg):
        BUILD[section](cfg[section])
    message = str(caught.value)
    assert '\n' not in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize(
    ('option', 'said'),
    [
        ('model.backbone.dept=26', 'model.backbone.dept: TypeError: SKNet has no argument .*; near it is depth'),
        ('model.backbone.depth=27', "model.backbone: depth='27' is unknown: choose one of 26, 29, 50, 101"),
        ('model.backbone.type=SKNett', "model.backbone.type='SKNett': mmengine knows no model of this name; .* SKNet,"),
        (
            'model.bakbone.depth=26',
            "model.bakbone: TypeError: ImageClassifier.* argument 'bakbone'; near it is backbone",
        ),
        (
            'model.head.num_clases=3',
            "model.head.num_clases: TypeError: .* argument 'num_clases'; near it is num_classes",
        ),
        (
            'model.head.loss.type=Loss',
            "model.head.loss.type='Loss': mmengine knows no model of this name; near it are .*",
        ),
        ('train_dataloader.dataset.type=Digit', "train_dataloader.dataset.type='Digit': .* no dataset .* is Digits"),
        ('train_dataloader.dataset.splt=x', 'train_dataloader.dataset.splt: TypeError: .*; near it is split'),
        (
            'train_dataloader.dataset.split=x',
            "train_dataloader.dataset: split='x' is unknown: choose 'train' or 'test'",
        ),
        (
            'train_dataloader.dataset.pipeline.0.type=Resise',
            "train_dataloader.dataset.pipeline.0.type='Resise': mmengine knows no transform .* Resize.*",
        ),
        ('val_dataloader.dataset.pipeline.0.scal=3', r'val_dataloader.dataset.pipeline.0.scal: .*; near it is scale'),
        ('train_dataloader.datset.x=1', "train_dataloader.datset: TypeError: DataLoader.* keyword argument 'datset'"),
        ('train_dataloader.batch_size=x', 'train_dataloader: batch_size should be a positive integer value, but .*=x'),
        ('val_dataloader.num_workers=two', "val_dataloader: TypeError: '<' not supported between"),
        ('train_dataloader.sampler.type=Sampel', "train_dataloader.sampler.type='Sampel': .* no data sampler .*"),
        ('default_hooks.chekpoint.interval=1', "default_hooks.chekpoint: {'interval': '1'} has no type, which says .*"),
        ('default_hooks.timer.type=Timr', "default_hooks.timer.type='Timr': mmengine knows no hook of this name.*"),
        ('optim_wrapper.optimizer.momentm=1', 'optim_wrapper.optimizer.momentm: TypeError: SGD.*; near it is momentum'),
        ('optim_wrapper.optimiser.lr=1', "optim_wrapper.optimiser: TypeError: OptimWrapper.* argument 'optimiser'"),
        (
            'param_scheduler.0.type=LinearLRR',
            "param_scheduler.0.type='LinearLRR': .* scheduler .*; near it is LinearLR",
        ),
        ('val_evaluator.topq=1', 'val_evaluator.topq: TypeError: Accuracy.* argument .topq.; near it is topk'),
        ('val_cfg.max_epoch=3', "val_cfg.max_epoch: TypeError: ValLoop.* argument 'max_epoch'"),
    ],
)
def test_place_and_cause(option, said):
    message = said_of(option)
    assert re.match(said, message), message


def test_missing_data_root():
    option = 'train_dataloader.dataset.data_root=/nowhere'
    message = said_of(option, config='sknet50_in1k')
    assert message == (
        "train_dataloader.dataset: [Errno 2] No such file or directory: '/nowhere/train'; expected: "
        '/nowhere/train/CLASS/*.jpg, a folder for each class (`sk-plugins finetune FOLDER` takes it as it is)'
    )


@pytest.mark.parametrize(
    ('dataset', 'said'),
    [
        (dict(type='CocoDataset', data_root='data/coco', ann_file='a/train.json', data_prefix=dict(img='train/')), 'c'),
        (dict(type='CocoDataset', data_root='data/scenes', ann_file='train.json', data_prefix=dict(img='')), 's'),
        (dict(type='ADE20KDataset', data_root='ade', data_prefix=dict(img_path='images', seg_map_path='maps')), 'a'),
        (dict(type='ScaledFashionMNIST', data_root='data/fm'), 'f'),
    ],
)
def test_layout_of_missing_data(dataset, said):
    expected = dict(
        c='data/coco/a/train.json and data/coco/train',
        s='data/scenes/train.json, which `sk-plugins prepare_scenes` writes',
        a='ade/images and ade/maps',
        f='data/fm/train-images-idx3-ubyte.gz and three more, which `sk-plugins prepare_fashion_mnist` writes',
    )
    assert configs._say_layout(dataset) == f'; expected: {expected[said]}'


def test_other_errors_stay_what_they_are():
    cfg = Config.fromfile(find_config('sknet_digits'))
    with pytest.raises(TypeError), explain_config(cfg):  # of training, not of building
        len(3)
    for error in (CheckpointError('x.pth: broken'), ModuleNotFoundError('albumentations')):
        with pytest.raises(type(error)) as caught, explain_config(cfg, constructing=True):
            raise error
        assert caught.value is error
    with pytest.raises(ConfigError, match=r'^KeyError: model$'), explain_config(cfg, constructing=True):
        {}['model']


@pytest.mark.parametrize(
    ('name', 'near'),
    [
        ('train_dataloder', 'train_dataloader'),
        ('optim_wraper', 'optim_wrapper'),
        ('param_schedulers', 'param_scheduler'),
        ('custom_hook', 'custom_hooks'),
        ('modl', 'model'),
        ('default_hook', 'default_hooks'),
        ('custom_import', 'custom_imports'),
    ],
)
def test_misspelt_section(name, near):
    with pytest.raises(ConfigError, match=rf': {name} is no section of a config; near it is {near} '):
        check_sections(Config({'data_root': '', name: {}}))


SECTIONS = dict(model=dict(type='x'), resume=False, default_hooks={}, train_cfg={})


@pytest.mark.parametrize(
    ('name', 'value', 'near'),
    [('model1', dict(a=1), 'model'), ('resum', True, 'resume'), ('launch', 'pytorch', 'launcher')],
)
def test_misspelt_beside_the_section(name, value, near):
    with pytest.raises(ConfigError, match=rf': {name} is no section of a config; near it is {near} \(_{name} would be'):
        check_sections(Config(dict(SECTIONS, **{name: value})))
    check_sections(Config(dict(SECTIONS, **{f'_{name}': value})))


def test_variables_of_a_files_own():
    check_sections(Config(dict(SECTIONS, mode='train', near=3, default_hook='timer', train_cfgs=[{}])))


def test_misspelt_option():
    cfg = Config(dict(model={}, data_root='here'))
    check_sections(cfg, ['model.backbone.depth', 'data_root', 'compile.backend', 'sync_bn', 'experiment_name'])
    with pytest.raises(ConfigError, match=r'^rezume: the config has no rezume; near it is resume$'):
        check_sections(cfg, ['model.backbone.depth', 'rezume'])
    with pytest.raises(ConfigError, match=r'^data_rot: the config has no data_rot; near it is data_root$'):
        check_sections(cfg, ['data_rot'])


def test_names_of_shipped_configs_are_not_taken_for_misspelt():
    """Every name at the top of every config that OpenMMLab's packages bring, and of ours."""
    folders = [Path(mmpretrain.__file__).parent / '.mim' / 'configs', find_config('sknet_digits').parent]
    for package in ('mmseg', 'mmdet'):
        try:
            folders.append(Path(__import__(package).__file__).parent / '.mim' / 'configs')
        except ImportError:
            continue
    paths = [path for folder in folders for path in folder.rglob('*.py')]
    names = set()
    for path in paths:
        for node in ast.parse(path.read_text(encoding='utf-8')).body:
            if isinstance(node, ast.Assign):
                names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    names = {name for name in names if not name.startswith('_')}
    assert len(paths) > 500
    assert len(names) > 100
    for name in names:
        check_sections(Config({name: {}}))


@pytest.mark.parametrize(
    ('option', 'said'),
    [
        ('env_cfg.cudnn_benchmrk', 'there are only cudnn_benchmark, dist_cfg, mp_cfg, resource_limit'),
        ('auto_scale_lr.base_batch', 'there are only base_batch_size, enable'),
        ('env_cfg.dist_cfg.bakend', 'there are only backend, .*timeout'),
        ('optim_wrapper.paramwise_cfg.norm_decay_mul', 'there are only .*norm_decay_mult$'),
        ('optim_wrapper.clip_grad.max_nrm', 'there are only .*max_norm, norm_type, type$'),
        ('compile.mod', 'there are only backend, .*mode'),
    ],
)
def test_keys_that_are_not_looked_at(option, said):
    cfg = Config.fromfile(find_config('sknet50_in1k'))
    check_keys(cfg)
    cfg.merge_from_dict({option: 1})
    with pytest.raises(ConfigError, match=f'^{option}: {said}'):
        check_keys(cfg)


def test_keys_that_are_looked_at():
    cfg = Config.fromfile(find_config('sknet50_in1k'))
    cfg.merge_from_dict({'optim_wrapper.clip_grad': dict(type='value', clip_value=1.0), 'compile': True})
    cfg.merge_from_dict({'optim_wrapper.paramwise_cfg': dict(custom_keys={'x': dict(lr_mult=0.1)}, _delete=True)})
    check_keys(cfg)
    cfg.merge_from_dict({'optim_wrapper.constructor': 'Another', 'optim_wrapper.paramwise_cfg.num_layers': 12})
    check_keys(cfg)
    cfg.merge_from_dict({'compile': 3})
    with pytest.raises(ConfigError, match=r'^compile=3 is neither True, False nor a dict'):
        check_keys(cfg)


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        ({'train_cfg.by_epoch': False}, 'train_cfg.max_epochs: TypeError: '),
        ({'randomness.seed': 'abc'}, 'randomness: TypeError: '),
        ({'log_level': 'INFOO'}, 'log_level: .*INFOO'),
    ],
    ids=str,
)
def test_place_of_what_the_runner_reads(tmp_path, options, said):
    cfg = Config.fromfile(find_config('sknet_digits'))
    cfg.merge_from_dict({'work_dir': str(tmp_path), 'experiment_name': tmp_path.name, **options})
    cfg.model = LINEAR
    with pytest.raises(ConfigError) as caught, explain_config(cfg, constructing=True):
        Runner.from_cfg(cfg).build_train_loop(cfg.train_cfg)
    assert re.match(said, str(caught.value)), str(caught.value)


@pytest.mark.parametrize(
    ('text', 'said'),
    [
        ('x = = 3', 'SyntaxError: invalid syntax'),
        ('x = foo', "NameError: name 'foo' is not defined"),
        ("_base_ = ['gone.py']", r'\[Errno 2\] No such file or directory: .*gone\.py'),
    ],
)
def test_file_that_cannot_be_run(tmp_path, text, said):
    path = tmp_path / 'mine.py'
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf'mine\.py: {said}') as caught, explain_parsing(path):
        Config.fromfile(path)
    assert '\n' not in str(caught.value)
