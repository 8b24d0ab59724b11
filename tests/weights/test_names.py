"""Names and networks between timm and mmpretrain."""

import json
import re

import pytest

pytest.importorskip('mmpretrain')

import timm
import torch
from helpers.randomised import randomise
from helpers.weight_files import TINY, assert_identical
from mmengine.config import Config
from mmpretrain.registry import MODELS
from mmpretrain.utils import register_all_modules

from sk_plugins import mmpretrain_models, zoo
from sk_plugins._resources import ROOT, find_config
from sk_plugins.weights import (
    CheckpointError,
    save_hub_folder,
    timm_arguments,
    to_mmpretrain,
    to_timm,
)
from sk_plugins.weights.names import is_timm_format

CONFIGS = sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))


@pytest.fixture(scope='module')
def model():
    """A small network whose BatchNorm statistics are no longer what they are right after init."""
    torch.manual_seed(0)
    model = timm.create_model('sknet26', num_classes=10, **TINY)
    with torch.no_grad():
        model.train()(torch.randn(8, 1, 16, 16))
    return model.eval()


def test_round_trip_of_names(model):
    timm_names = model.state_dict()
    mm_names = to_mmpretrain(timm_names)
    assert is_timm_format(timm_names)
    assert not is_timm_format(mm_names)
    assert {name.split('.')[0] for name in mm_names} == {'backbone', 'head'}
    assert mm_names['head.fc.weight'] is timm_names['fc.weight']
    assert_identical(to_timm(mm_names), timm_names)
    assert_identical(to_timm(timm_names), timm_names)
    assert_identical(to_mmpretrain(mm_names), mm_names)


def test_to_timm_leaves_a_neck_out(model):
    mm_names = to_mmpretrain(model.state_dict())
    mm_names['neck.convs.0.weight'] = mm_names['head.mlp.weight'] = torch.zeros(1)
    assert_identical(to_timm(mm_names), model.state_dict())


@pytest.mark.parametrize('rename', [to_timm, to_mmpretrain])
@pytest.mark.parametrize('prefix', ['', 'backbone.'])
@pytest.mark.parametrize('name', ['vgg11', 'mobilenetv3_small_050', 'resnetv2_18'])
def test_third_party_names(rename, prefix, name):
    with torch.device('meta'):
        others = {prefix + k: v for k, v in timm.create_model(name, num_classes=2).state_dict().items()}
    assert not is_timm_format(others)
    with pytest.raises(CheckpointError) as caught:
        rename(others)
    assert str(caught.value) == (
        "no 'layer1.0.conv2.paths.0.conv.weight' and no 'stage2.0.branch1.0.weight', with 'backbone.' before them or "
        f'without, among its {len(others)} names ({", ".join(list(others)[:3])}, ...): expected the names of timm or '
        'of mmpretrain'
    )


# Configs in timm's terms


@pytest.mark.parametrize('name', CONFIGS)
def test_timm_arguments_of_each_config(name):
    register_all_modules()
    cfg = Config.fromfile(find_config(name))
    architecture, args, data = timm_arguments(cfg)
    json.dumps([args, data])
    assert args['num_classes'] == cfg.data_preprocessor.num_classes
    # That a row's network is the same at both doors mmpretrain_models/test_registry.py shows.
    if args != dict(in_chans=3, num_classes=args['num_classes']):
        with torch.device('meta'):
            model = timm.create_model(architecture, **args)
            classifier = MODELS.build(cfg.model)
        expected = to_timm(classifier.state_dict())
        assert len(expected) == len(classifier.state_dict())
        assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in expected.items()}
    assert [255 * v for v in data['mean']] == pytest.approx(cfg.data_preprocessor.mean)
    assert [255 * v for v in data['std']] == pytest.approx(cfg.data_preprocessor.std)


def test_preprocessing_of_the_recipe():
    _, args, data = timm_arguments(Config.fromfile(find_config('sknet50_in1k')))
    assert args == dict(in_chans=3, num_classes=1000)
    cfg = timm.get_pretrained_cfg('sknet50')
    assert data['input_size'] == cfg.input_size
    assert data['crop_pct'] == cfg.crop_pct
    assert data['interpolation'] == cfg.interpolation
    assert data['mean'] == pytest.approx(cfg.mean)
    assert data['std'] == pytest.approx(cfg.std)


def test_preprocessing_of_simclr():
    architecture, args, data = timm_arguments(Config.fromfile(find_config('skresnet101x2_simclr_in1k')))
    assert (architecture, args) == ('skresnet101x2_simclr', dict(in_chans=3, num_classes=1000))
    cfg = timm.get_pretrained_cfg(architecture)
    assert data == {name: getattr(cfg, name) for name in ('mean', 'std', 'input_size', 'crop_pct', 'interpolation')}


def test_timm_arguments_drop_what_only_openmmlab_has():
    backbone = dict(type='mmpretrain.SKNet', depth=101, frozen_stages=1, norm_eval=True, with_cp=True, in_channels=4)
    backbone.update(out_indices=(0, 3), init_cfg=dict(type='Pretrained', checkpoint='x'), drop_path_rate=0.1)
    with torch.device('meta'):
        assert isinstance(MODELS.build({**backbone, 'init_cfg': None}), mmpretrain_models.SKNet)
    architecture, args, data = timm_arguments(dict(model=dict(backbone=backbone)))
    assert architecture == 'sknet101'
    assert args == dict(in_chans=4, num_classes=0, drop_path_rate=0.1)
    assert data == {}


@pytest.mark.parametrize('scope', ['', 'mmpretrain.'])
@pytest.mark.parametrize('spec', zoo.MODELS.values(), ids=zoo.MODELS.keys())
def test_timm_arguments_of_every_network(spec, scope):
    kind, args = spec.openmmlab
    model = dict(backbone=dict(type=scope + kind, **args), head=dict(num_classes=spec.num_classes))
    assert timm_arguments(dict(model=model)) == (
        spec.name,
        dict(in_chans=3, num_classes=spec.num_classes),
        {},
    )


@pytest.mark.parametrize(
    ('backbone', 'architecture', 'args'),
    [
        (dict(type='SKNet', depth=50, unit='se'), 'sknet50', dict(unit='se')),
        (dict(type='SKNet', depth=29, unit='sk'), 'sknet29_16x32d', dict(unit='sk')),
        (dict(type='SKNet', depth=29, unit='se', drop_path_rate=0.1), 'seresnext29_16x32d', dict(drop_path_rate=0.1)),
        (dict(type='SKResNeXt', depth=101), 'skresnext101_32x4d', {}),
        (dict(type='SKResNeXt', depth=101, groups=64), 'skresnext101_64x4d', {}),
        (dict(type='SKResNeXt', depth=101, width_per_group=8), 'skresnext101_32x8d', {}),
        (
            dict(type='SKResNeXt', depth=101, groups=16, width_per_group=4),
            'sknet50',
            dict(layers=[3, 4, 23, 3], cardinality=16, base_width=4),
        ),
        (dict(type='SKResNeXt', depth=152), 'sknet50', dict(layers=[3, 8, 36, 3])),
        (dict(type='SKResNeXt', depth=50, unit='plain'), 'sknet50', dict(layers=[3, 4, 6, 3], unit='plain')),
        (dict(type='SKResNet', depth=18, split_input=True), 'skresnet18', {}),
        (dict(type='SKResNet', depth='50d', drop_path_rate=0.1), 'skresnet50d', dict(drop_path_rate=0.1)),
        (dict(type='SKResNetSimCLR', depth=101, width_factor=2), 'skresnet101x2_simclr', {}),
        (dict(type='SKResNetSimCLR', depth=50, norm_eval=True), 'skresnet50x1_simclr', {}),
        (dict(type='SKShuffleNetV2'), 'skshufflenetv2_x1_0', {}),
        (dict(type='SKShuffleNetV2', widen_factor=2, unit='se'), 'seshufflenetv2_x2_0', {}),
        (
            dict(type='SKShuffleNetV2', widen_factor=0.5, unit='sk', sk_kwargs=dict(kernel_sizes=(3, 5, 7))),
            'skshufflenetv2_x0_5',
            dict(sk_kwargs=dict(kernel_sizes=[3, 5, 7])),
        ),
    ],
    ids=str,
)
def test_timm_arguments(backbone, architecture, args):
    """And timm's model with them takes the backbone's weights, strictly."""
    got = timm_arguments(dict(model=dict(backbone=backbone)))
    assert got == (architecture, dict(in_chans=3, num_classes=0, **args), {})
    with torch.device('meta'):
        model = timm.create_model(got[0], **got[1])
        expected = MODELS.build(backbone)
    assert [(k, v.shape) for k, v in model.state_dict().items()] == [
        (k, v.shape) for k, v in expected.state_dict().items()
    ]


SHUFFLE = dict(channels=(16, 32, 64), head_channels=64, layers=(2, 2, 2))
SMALL = dict(channels=(16, 32, 64), cardinality=8, base_width=16)


@pytest.mark.parametrize(
    ('backbone', 'features'),
    [
        (dict(type='SKNet', depth=29, in_channels=1, **SMALL), 256),
        (dict(type='SKNet', depth=29, unit='plain', **SMALL), 256),
        (dict(type='SKResNeXt', depth=26, groups=8, width_per_group=16, channels=(16, 32, 64, 128)), 512),
        (dict(type='SKResNet', depth=18, channels=(16, 32, 64, 128)), 128),
        (dict(type='SKResNetSimCLR', depth=50, layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8), 256),
        (dict(type='SKShuffleNetV2', norm_cfg=dict(type='SyncBN'), **SHUFFLE), 64),
        (dict(type='SKShuffleNetV2', widen_factor=0.5, unit='plain', **SHUFFLE), 64),
    ],
    ids=str,
)
def test_hub_folder_of_every_class(tmp_path, backbone, features):
    """From a classifier of mmpretrain's to a Hub folder, and by timm from there."""
    head = dict(type='LinearClsHead', num_classes=10, in_channels=features, topk=(1,))
    model = dict(type='ImageClassifier', backbone=backbone, neck=dict(type='GlobalAveragePooling'), head=head)
    classifier = randomise(MODELS.build(model))
    architecture, args, data_config = timm_arguments(dict(model=model))
    save_hub_folder(classifier.state_dict(), tmp_path / 'hub', architecture, args, data_config)
    restored = timm.create_model(f'local-dir:{tmp_path / "hub"}', pretrained=True).eval()
    assert_identical(to_mmpretrain(restored.state_dict()), classifier.state_dict())
    images = torch.randn(2, args['in_chans'], 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        expected, got = classifier.double()(images), restored.double()(images)
    assert expected.shape == got.shape == (2, 10)
    assert expected.std() > 1e-3
    assert (expected - got).abs().max() < 1e-9


@pytest.mark.parametrize(
    'backbone',
    [
        dict(type='VGG', depth=11),
        dict(type='ResNet', depth=50),
        dict(type='mmpretrain.ShuffleNetV2', widen_factor=1.0),
        dict(type='SKNet', depth=34),
        dict(type='SKNet'),
        dict(type='SKResNeXt', depth=29),
        dict(type='SKResNet', depth=101),
        dict(type='SKShuffleNetV2', widen_factor=3.0),
        dict(type='SKShuffleNetV2', unit='cbam'),
        dict(depth=50),
    ],
    ids=str,
)
def test_timm_arguments_of_another_network(backbone):
    args = {k: v for k, v in backbone.items() if k != 'type'}
    kind = str(backbone.get('type')).removeprefix('mmpretrain.')
    message = f'model.backbone={args} of type {kind!r} is not a network of this project'
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
        timm_arguments(dict(model=dict(backbone=backbone)))


@pytest.mark.parametrize(
    'args',
    [
        dict(split_input=False),
        dict(sk_kwargs=dict(kernel_sizes=(3, 7))),
        dict(small_stem=True),
        dict(unit='plain'),
        dict(block='bottleneck'),
    ],
    ids=str,
)
def test_what_timms_own_networks_cannot_be_is_refused(args):
    backbone = dict(type='SKResNet', depth=18, **args)
    message = f'model.backbone={backbone} is not what timm calls skresnet18'
    with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
        timm_arguments(dict(model=dict(backbone=backbone)))


@pytest.mark.parametrize('norm_cfg', [dict(type='GN', num_groups=4), dict(type='BN', eps=0.1)])
def test_norms_that_timm_arguments_cannot_say_are_refused(norm_cfg):
    model = dict(backbone=dict(type='SKNet', depth=26, norm_cfg=norm_cfg))
    with pytest.raises(ValueError, match=r'norm_cfg=.* is not plain BatchNorm'):
        timm_arguments(dict(model=model))
