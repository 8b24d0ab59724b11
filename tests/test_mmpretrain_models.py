"""The backbones of OpenMMLab's door: mmpretrain's own backbone tests and, against timm, what only ours can show."""

import copy
import logging
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip('mmpretrain')

import mmpretrain
import timm
import torch
import torch.distributed as dist
import torchvision
from helpers.hub_server import FAULTS
from helpers.randomised import randomise
from helpers.tolerances import assert_close
from mmengine.logging import MMLogger
from mmengine.model import convert_sync_batchnorm, revert_sync_batchnorm
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import DefaultScope
from mmengine.runner import load_checkpoint
from mmpretrain.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from PIL import Image
from safetensors.torch import save, save_file
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import sk_plugins
from sk_plugins import zoo
from sk_plugins.mmpretrain_models import SKNet, SKResNet, SKResNeXt, SKShuffleNetV2
from sk_plugins.weights import CheckpointError, HubError, save_mmengine_checkpoint, to_mmpretrain, to_timm
from sk_plugins.weights.names import is_timm_format

# A network in which what is tested does not depend on the width takes a tenth of the time.
NARROW = dict(channels=(16, 32, 64, 128), cardinality=8, base_width=16)
CHANNELS = [64, 128, 256, 512]
SMALL = dict(layers=(1, 1, 1), channels=(16, 32, 64), cardinality=8, base_width=16)
SHUFFLE = dict(channels=(16, 32, 64), head_channels=64, layers=(2, 2, 2))
REPO = 'me/tiny'
PUBLISHED = 'timm/skresnext50_32x4d.ra_in1k'


RESNET_PARTS = (('conv1.', 'bn1.'), ('layer1.',), ('layer2.',), ('layer3.',), ('layer4.',))
SHUFFLE_PARTS = (('conv1.',), ('stage2.',), ('stage3.',), ('stage4.',), ('conv5.',))


class Case(NamedTuple):
    """A backbone of few channels, and the same network at timm's door."""

    cfg: Mapping[str, Any]
    timm_name: str
    timm_args: Mapping[str, Any]
    channels: list[int]
    strides: list[int]
    parts: tuple[tuple[str, ...], ...] = RESNET_PARTS  # how the stem's and each stage's names begin

    @property
    def size(self):
        return 2 * self.strides[-1] if self.strides[-1] == 32 else 16

    @property
    def every(self):
        return tuple(range(len(self.channels)))


def _shuffle(unit, prefix):
    cfg = dict(type='SKShuffleNetV2', widen_factor=0.5, unit=unit, **SHUFFLE)
    return Case(cfg, f'{prefix}shufflenetv2_x0_5', SHUFFLE, [16, 32, 64, 64], [8, 16, 32, 32], SHUFFLE_PARTS)


def _cifar(unit, name):
    cfg = dict(type='SKNet', depth=29, unit=unit, **SMALL)
    return Case(cfg, name, SMALL, [64, 128, 256], [1, 2, 4], RESNET_PARTS[:4])


_WIDTHS = dict(channels=NARROW['channels'])
_FLAT = dict(layers=(1, 1, 1, 1), **_WIDTHS)
_STRIDES = [4, 8, 16, 32]
# One of each class, and of SKNet one with four stages and one with three.
CASES = {
    'SKNet': Case(dict(type='SKNet', depth=26, **NARROW), 'sknet26', NARROW, CHANNELS, _STRIDES),
    'SKNet-29': _cifar('sk', 'sknet29_16x32d'),
    'SKResNeXt': Case(
        dict(type='SKResNeXt', depth=26, groups=8, width_per_group=16, **_FLAT),
        'sknet26',
        dict(cardinality=8, base_width=16, **_FLAT),
        CHANNELS,
        _STRIDES,
    ),
    'SKResNet-18': Case(dict(type='SKResNet', depth=18, **_WIDTHS), 'skresnet18', _WIDTHS, [16, 32, 64, 128], _STRIDES),
    'SKShuffleNetV2': _shuffle('sk', 'sk'),
}
# And the networks whose units are others.
ALL_CASES = {
    **CASES,
    'SKNet-29-plain': _cifar('plain', 'resnext29_16x32d'),
    'SKNet-29-se': _cifar('se', 'seresnext29_16x32d'),
    'SKResNet-50d': Case(dict(type='SKResNet', depth='50d', **_WIDTHS), 'skresnet50d', _WIDTHS, CHANNELS, _STRIDES),
    'SKShuffleNetV2-plain': _shuffle('plain', ''),
    'SKShuffleNetV2-se': _shuffle('se', 'se'),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


@pytest.fixture(params=ALL_CASES.values(), ids=ALL_CASES.keys())
def any_case(request):
    return request.param


def make_backbone(seed=0, case=CASES['SKNet'], **kwargs):
    torch.manual_seed(seed)
    return randomise(MODELS.build({**case.cfg, **kwargs}), seed)


def make_timm(seed=0, case=CASES['SKNet'], **kwargs):
    torch.manual_seed(seed)
    return randomise(timm.create_model(case.timm_name, **{**case.timm_args, 'num_classes': 10, **kwargs}), seed)


def make_classifier(case, num_classes=10, **backbone):
    return MODELS.build(
        dict(
            type='ImageClassifier',
            backbone={**case.cfg, **backbone},
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=num_classes, in_channels=case.channels[-1], topk=(1,)),
        )
    ).eval()


def get_classifier(pretrained=False, **backbone):
    """The narrow network where a named model's config says SKNet-50, through mmpretrain's API."""
    return mmpretrain.get_model(
        'sknet50_in1k',
        pretrained=pretrained,
        backbone=dict(depth=26, **{**NARROW, **backbone}),
        head=dict(in_channels=512, num_classes=10, topk=(1, 5)),
    )


def make_input(batch=2, channels=3, size=64):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def same_state(backbone, timm_model):
    """Bit for bit, whatever ``timm_model`` has beside a backbone."""
    wanted = {k: v for k, v in timm_model.state_dict().items() if not k.startswith('fc.')}
    state_dict = backbone.state_dict()
    return list(state_dict) == list(wanted) and all(torch.equal(state_dict[k], wanted[k]) for k in wanted)


def assert_equal(outputs, expected, length=None, **model):
    """Bit for bit, or but for rounding in sums of ``length``."""
    if length is not None:
        assert_close(list(outputs), list(expected), length=length, **model)
        return
    assert len(outputs) == len(expected)
    assert all(torch.equal(output, wanted) for output, wanted in zip(outputs, expected))


def weights(model):
    return {'model.safetensors': save(model.state_dict())}


@pytest.fixture(autouse=True)
def logger():
    """mmengine's current logger, without the lines that it prints for every parameter that is initialised."""
    logger = MMLogger.get_instance('sknet-tests')
    logger.handlers.clear()
    yield logger
    MMLogger._instance_dict.pop('sknet-tests')


@pytest.fixture
def warned(logger, caplog, capsys):
    """What mmengine has logged as a warning or, where it is given no logger, printed."""
    logger.addHandler(caplog.handler)

    def warned():
        logged = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        printed = capsys.readouterr().out.splitlines()
        return logged + [line for line in printed if line.strip() and not line.startswith('Loads checkpoint by ')]

    return warned


@pytest.fixture(scope='module')
def tiny():
    return make_timm()


@pytest.fixture(scope='module')
def sknet50():
    torch.manual_seed(0)
    return randomise(timm.create_model('sknet50'))


@pytest.fixture(scope='module')
def published(sknet50):
    return weights(sknet50)


class TestRegistry:
    def test_models(self):
        assert {'sknet101_in1k', 'sknet26_in1k', 'sknet50_in1k'} <= set(mmpretrain.list_models('sknet*'))
        assert mmpretrain.list_models('sknet50_in1k', task='Image Classification') == ['sknet50_in1k']
        for backbone in (SKNet, SKResNet, SKResNeXt, SKShuffleNetV2):
            assert MODELS.get(backbone.__name__) is backbone
        assert 'resnet50_8xb32_in1k' in mmpretrain.list_models()

    @pytest.mark.parametrize(
        ('name', 'parameters'),
        [('sknet26_in1k', 16_746_408), ('sknet50_in1k', 27_479_784), ('sknet101_in1k', 48_736_040)],
    )
    def test_parameters(self, name, parameters):
        with torch.device('meta'):
            model = mmpretrain.get_model(name)
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert sum(p.numel() for p in model.backbone.parameters()) == parameters - 2048 * 1000 - 1000
        assert model._metainfo.metadata.parameters == parameters

    @pytest.mark.parametrize('norm_cfg', [None, dict(type='SyncBN', requires_grad=True)], ids=['BN', 'SyncBN'])
    def test_from_another_scope(self, case, norm_cfg):
        """As mmdetection and mmsegmentation build it; neither needs to be there."""
        kind = case.cfg['type']
        cfg = {**case.cfg, 'type': f'mmpretrain.{kind}', 'out_indices': case.every, 'norm_cfg': norm_cfg}
        with DefaultScope.overwrite_default_scope('mmdet'):
            model = ROOT_MODELS.build(cfg)
        assert type(model) is MODELS.get(kind)
        with torch.no_grad():
            assert [y.shape[1] for y in model.eval()(make_input(size=case.size))] == case.channels

    @pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
    def test_from_a_downstream_registry(self, scope):
        registry = pytest.importorskip(f'{scope}.registry', exc_type=ImportError)
        for case in CASES.values():
            kind = case.cfg['type']
            assert type(registry.MODELS.build({**case.cfg, 'type': f'mmpretrain.{kind}'})) is MODELS.get(kind)

    def test_custom_imports(self, tmp_path):
        """In a process of its own, where nothing but the config's line imports this package."""
        config = tmp_path / 'detector.py'
        config.write_text(
            "custom_imports = dict(imports=['sk_plugins.mmpretrain_models'], allow_failed_imports=False)\n"
            "default_scope = 'mmdet'\n"
            "backbone = dict(type='mmpretrain.SKNet', depth=50, frozen_stages=1, norm_eval=True)\n"
        )
        script = (
            'import sys\n'
            'from mmengine.config import Config\n'
            'from mmengine.registry import MODELS, DefaultScope\n'
            "assert 'sk_plugins' not in sys.modules\n"
            'config = Config.fromfile(sys.argv[1])\n'
            "DefaultScope.get_instance('detector', scope_name=config.default_scope)\n"
            'print(sum(p.numel() for p in MODELS.build(config.backbone).parameters()))\n'
        )
        path = os.pathsep.join([str(Path(sk_plugins.__file__).parents[1]), os.environ.get('PYTHONPATH', '')])
        done = subprocess.run(
            [sys.executable, '-c', script, str(config)],
            env={**os.environ, 'PYTHONPATH': path},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[-1] == '25430784'


# PAPER.md's figures, with the classifier.
PARAMETERS = {
    'sknet26': 16_746_408,
    'sknet50': 27_479_784,
    'sknet101': 48_736_040,
    'skresnext101_32x4d': 48_736_040,
    'shufflenetv2_x0_5': 1_366_792,
    'shufflenetv2_x1_0': 2_278_604,
    'shufflenetv2_x1_5': 3_503_624,
    'shufflenetv2_x2_0': 7_393_996,
    'skshufflenetv2_x0_5': 1_366_792 + 75_304,
    'skshufflenetv2_x1_0': 2_278_604 + 180_806,
    'resnext29_16x32d': 25_229_220,
}


def count(model):
    return sum(p.numel() for p in model.parameters())


class TestZoo:
    """The same network at both doors: every row at its full size, without memory."""

    @pytest.mark.parametrize('spec', zoo.MODELS.values(), ids=zoo.MODELS.keys())
    def test_names_and_shapes(self, spec):
        kind, args = spec.openmmlab
        with torch.device('meta'):
            backbone, model = MODELS.build(dict(type=kind, **args)), timm.create_model(spec.name)
        given = {k: v.shape for k, v in backbone.state_dict().items()}
        wanted = {k: v.shape for k, v in model.state_dict().items() if not k.startswith('fc.')}
        assert list(given.items()) == list(wanted.items())
        timm_names = model.state_dict()
        mm_names = to_mmpretrain(timm_names)
        assert list(mm_names) == [*(f'backbone.{k}' for k in wanted), 'head.fc.weight', 'head.fc.bias']
        assert is_timm_format(timm_names)
        assert not is_timm_format(mm_names)
        assert list(to_timm(mm_names)) == list(timm_names)
        assert count(backbone) == count(model) - count(model.fc)
        assert model.num_classes == model.fc.out_features == spec.num_classes
        if spec.name in PARAMETERS:
            assert count(model) == PARAMETERS[spec.name]

    @pytest.mark.parametrize(
        ('cfg', 'parameters'),
        [
            (dict(type='SKResNeXt', depth=50), 27_479_784),
            (dict(type='SKResNeXt', depth=26), 16_746_408),
            (dict(type='SKResNeXt', depth=50, unit='plain'), 25_028_904),
            (dict(type='SKNet', depth=50, unit='plain'), 25_028_904),
            (dict(type='SKNet', depth=50, unit='se'), 27_559_896),
            (dict(type='SKNet', depth=50, sk_kwargs=dict(select='sum')), 26_458_664),
            (dict(type='SKNet', depth=50, sk_kwargs=dict(kernel_sizes=(3, 5, 7))), 29_249_512),
        ],
        ids=str,
    )
    def test_parameters(self, cfg, parameters):
        with torch.device('meta'):
            assert count(MODELS.build(cfg)) == parameters - 2048 * 1000 - 1000

    @pytest.mark.parametrize(('branch', 'millions'), [((5, 1, 64), 28.03), ((7, 1, 128), 27.99)], ids=str)
    def test_parameters_of_table_6(self, branch, millions):
        cfg = dict(type='SKNet', depth=50, sk_kwargs=dict(branches=[(3, 1, 32), branch]))
        with torch.device('meta'):
            assert round((count(MODELS.build(cfg)) + 2048 * 1000 + 1000) / 1e6, 2) == millions

    def test_resnext_101_is_sknet_101(self):
        with torch.device('meta'):
            one, other = MODELS.build(dict(type='SKResNeXt', depth=101)), MODELS.build(dict(type='SKNet', depth=101))
        shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (one, other)]
        assert shapes[0] == shapes[1]

    def test_skresnet_without_splitting(self):
        """Every branch of SK-ResNet-18 sees all channels: counted by hand."""

        def unit(inputs, channels, share):
            d = max(channels // 8, 16)
            branches = 2 * (9 * (inputs // share) * channels + 2 * channels)
            attention = channels * d + 2 * d + 2 * channels * d
            shortcut = inputs * channels + 2 * channels if inputs != channels else 0
            return branches + attention + 9 * channels * channels + 2 * channels + shortcut

        units = [(64, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512)]
        stem = 3 * 64 * 49 + 2 * 64
        for split_input, share in ((True, 2), (False, 1)):
            with torch.device('meta'):
                model = SKResNet(18, split_input=split_input)
            assert count(model) == stem + sum(unit(*widths, share) for widths in units)
        assert count(model) == 11_958_056 - 513_000 + 4_718_592


# The layer of each unit, stage by stage, counted by hand; the stem is layer 0, and the head comes last.
RESNET_50 = [[1] * 3, [2, 2, 3, 3], [4, 4, 4, 5, 5, 5], [6] * 3]
RESNET_101 = [[1] * 3, [2, 2, 3, 3], [4 + i // 3 for i in range(23)], [12] * 3]
SHUFFLENET = [[1] * 4, [2] * 4 + [3] * 4, [4] * 4, [5] * 3]  # the fifth convolution has three modules
LAYERS = {
    'SKNet-26': (dict(type='SKNet', depth=26), [[1, 1], [2, 2], [3, 3], [4, 4]]),
    'SKNet-29': (dict(type='SKNet', depth=29), [[1, 1, 1], [2, 2, 3], [4, 4, 4]]),
    'SKNet-50': (dict(type='SKNet', depth=50), RESNET_50),
    'SKNet-101': (dict(type='SKNet', depth=101), RESNET_101),
    'SKResNeXt-26': (dict(type='SKResNeXt', depth=26), [[1, 1], [2, 2], [3, 3], [4, 4]]),
    'SKResNeXt-50': (dict(type='SKResNeXt', depth=50), RESNET_50),
    'SKResNeXt-101': (dict(type='SKResNeXt', depth=101, groups=64), RESNET_101),
    'SKResNeXt-152': (
        dict(type='SKResNeXt', depth=152),
        [[1] * 3, [2] * 4 + [3] * 4, [4 + i // 4 for i in range(36)], [13] * 3],
    ),
    'SKResNet-18': (dict(type='SKResNet', depth=18), [[1, 1], [2, 2], [3, 3], [4, 4]]),
    'SKResNet-34': (dict(type='SKResNet', depth=34), RESNET_50),
    'SKResNet-50': (dict(type='SKResNet', depth=50), RESNET_50),
    'SKResNet-50d': (dict(type='SKResNet', depth='50d'), RESNET_50),
    **{
        f'SKShuffleNetV2-{unit}-{factor}': (dict(type='SKShuffleNetV2', widen_factor=factor, unit=unit), SHUFFLENET)
        for unit, factor in (('sk', 0.5), ('sk', 1.0), ('se', 1.5), ('plain', 2.0))
    },
}


class TestLayerDepth:
    """Learning rates by depth, which mmpretrain's optimizer-wrapper constructor asks the backbone for."""

    @pytest.mark.parametrize(('cfg', 'layers'), LAYERS.values(), ids=LAYERS.keys())
    def test_learning_rates(self, cfg, layers):
        with torch.device('meta'):
            model = MODELS.build(dict(type='ImageClassifier', backbone=cfg, head=dict(type='ClsHead')))
            model.head = nn.Linear(8, 10)
        constructor = dict(
            type='LearningRateDecayOptimWrapperConstructor',
            optim_wrapper_cfg=dict(optimizer=dict(type='SGD', lr=0.1, weight_decay=1e-4)),
            paramwise_cfg=dict(layer_decay_rate=0.5),
        )
        groups = OPTIM_WRAPPER_CONSTRUCTORS.build(constructor)(model).optimizer.param_groups
        last = layers[-1][-1]
        expected = {}
        for name, _ in model.named_parameters():
            owner, stage, unit, *_ = [*name.split('.'), '']
            stages = model.backbone.stages
            expected[name] = last + 1 if owner == 'head' else 0
            if stage in stages:
                expected[name] = layers[stages.index(stage)][int(unit)]
        assert {group['param_name']: group['layer_id'] for group in groups} == expected
        assert set(expected.values()) == set(range(last + 2))
        for group in groups:
            assert group['lr'] == pytest.approx(0.1 * 0.5 ** (last + 1 - group['layer_id']))

    @pytest.mark.parametrize(
        ('cfg', 'depth'),
        [
            (dict(type='SKNet', depth=50), 50),
            (dict(type='SKNet', depth=101), 101),
            (dict(type='SKResNeXt', depth=152), 152),
            (dict(type='SKResNet', depth=34), 34),
        ],
        ids=str,
    )
    def test_is_mmpretrains(self, cfg, depth):
        with torch.device('meta'):
            ours = MODELS.build(cfg)
        theirs = MODELS.build(dict(type='ResNet', depth=depth))
        names = [f'backbone.{name}' for name, _ in ours.named_parameters()]
        for name in (*names, 'neck.0.weight', 'head.fc.bias'):
            assert ours.get_layer_depth(name, 'backbone.') == theirs.get_layer_depth(name, 'backbone.'), name
        assert ours.stage_blocks == theirs.stage_blocks
        assert ours.num_stages == theirs.num_stages
        assert ours.feat_dim == theirs.feat_dim

    def test_of_a_classifier(self):
        with torch.device('meta'):
            model = MODELS.build(dict(type='ImageClassifier', backbone=dict(type='SKNet', depth=50)))
        assert model.get_layer_depth('backbone.layer2.0.conv1.conv.weight') == (2, 8)
        assert model.get_layer_depth('head.fc.weight') == (7, 8)
        assert model.backbone.get_layer_depth('layer2.2.conv1.conv.weight') == (3, 8)
        assert model.backbone.get_layer_depth('model.body.bn1.weight', 'model.body.') == (0, 8)

    def test_attributes_of_mmpretrains_shufflenet(self):
        with torch.device('meta'):
            ours, theirs = (MODELS.build(dict(type=kind)) for kind in ('SKShuffleNetV2', 'ShuffleNetV2'))
        assert ours.stage_blocks == theirs.stage_blocks
        assert ours.with_cp is theirs.with_cp is False
        ours.set_grad_checkpointing()
        assert ours.with_cp


class TestEveryBackbone:
    """What mmpretrain's own backbone tests ask of each of its classes."""

    def test_is_timms(self, any_case):
        """Bit for bit; but timm's own SK-ResNets sum in another order."""
        case = any_case
        backbone, model = make_backbone(1, case, out_indices=case.every), make_timm(case=case)
        in_timm = zoo.MODELS[case.timm_name].in_timm
        dtype, length = (torch.float64, model) if in_timm else (torch.float32, None)
        last_alone = MODELS.build(case.cfg).eval()
        for door in (backbone, last_alone):
            door.load_state_dict(model.state_dict(), strict=True)
            assert same_state(door, model)
            door.to(dtype)
        model.to(dtype)
        x = make_input(size=case.size).to(dtype)
        with torch.no_grad():
            outputs = backbone(x)
            last, features = model.forward_intermediates(x)
            assert_equal([outputs[-1]], [last], length)
            inner = outputs[:3] if case.parts is SHUFFLE_PARTS else outputs
            assert_equal(inner, features[-len(inner) :], length)
            assert_equal(last_alone(x), [model.forward_features(x)], length)
        assert [y.shape[1] for y in outputs] == case.channels
        assert [case.size // y.shape[2] for y in outputs] == case.strides
        assert all(y.shape[2] == y.shape[3] for y in outputs)
        assert all(y.std() > 1e-3 for y in outputs)

    def test_out_indices(self, case):
        x = make_input(size=case.size)
        with torch.no_grad():
            expected = make_backbone(0, case, out_indices=case.every)(x)
            for out_indices in ((0,), [0, 2], (2, 1), case.every[-1:], (case.every[-1], 0)):
                model = make_backbone(0, case, out_indices=out_indices)
                ran = []
                for i, (first, *_) in enumerate(case.parts[1:]):
                    model.get_submodule(first[:-1]).register_forward_hook(lambda *_, i=i, ran=ran: ran.append(i))
                outputs = model(x)
                assert isinstance(outputs, tuple)
                assert_equal(outputs, [expected[i] for i in sorted(out_indices)])
                assert ran == list(range(max(out_indices) + 1))

    def test_of_an_input_that_no_stride_divides(self, case):
        with torch.no_grad():
            outputs = make_backbone(0, case, out_indices=case.every)(torch.zeros(1, 3, 65, 70))
        assert [tuple(y.shape[2:]) for y in outputs] == [(-(-65 // s), -(-70 // s)) for s in case.strides]

    def test_in_channels(self, case):
        model = make_backbone(0, case, in_channels=1)
        assert model(make_input(channels=1, size=case.size))[0].shape[:2] == (2, case.channels[-1])

    @pytest.mark.parametrize('output_stride', [16, 8])
    @pytest.mark.parametrize('name', ['SKNet', 'SKResNeXt', 'SKResNet-18', 'SKShuffleNetV2'])
    def test_output_stride(self, name, output_stride):
        case = CASES[name]
        dilated = make_backbone(0, case, out_indices=case.every, output_stride=output_stride)
        model = make_timm(case=case, output_stride=output_stride)
        dilated.load_state_dict(make_timm(1, case).state_dict(), strict=True)
        model.load_state_dict(make_timm(1, case).state_dict(), strict=True)
        x = make_input()
        with torch.no_grad():
            outputs = dilated(x)
            assert_close(outputs[-1], model.forward_features(x), length=model)
        assert [64 // y.shape[2] for y in outputs] == [min(s, output_stride) for s in case.strides]

    @pytest.mark.parametrize('name', ['SKNet', 'SKNet-29', 'SKResNeXt', 'SKResNet-18'])
    def test_drop_path_rate(self, name):
        model = make_backbone(0, CASES[name], drop_path_rate=0.3)
        units = [unit for i in range(1, 5) for unit in getattr(model, f'layer{i}')]
        assert len(units) == {'SKNet-29': 3, 'SKResNeXt': 4}.get(name, 8)
        rates = [unit.drop_path.drop_prob if unit.drop_path else 0.0 for unit in units]
        assert rates == pytest.approx(np.linspace(0, 0.3, len(units)).tolist())

    def test_channels_last(self, case):
        model = make_backbone(0, case, out_indices=case.every, channels_last=True)
        x = make_input(size=case.size)
        with torch.no_grad():
            outputs = model(x.contiguous(memory_format=torch.channels_last))
            assert_equal(outputs, make_backbone(0, case, out_indices=case.every)(x), length=model)
        assert all(y.is_contiguous(memory_format=torch.channels_last) for y in outputs)
        convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convs)

    @pytest.mark.parametrize(
        ('norm_cfg', 'kind', 'eps'),
        [
            (dict(type='BN', eps=1e-3), nn.BatchNorm2d, 1e-3),
            (dict(type='SyncBN', requires_grad=True), nn.SyncBatchNorm, 1e-5),
            (dict(type='GN', num_groups=4), nn.GroupNorm, 1e-5),
        ],
        ids=['BN', 'SyncBN', 'GN'],
    )
    def test_norm_cfg(self, case, norm_cfg, kind, eps):
        given = copy.deepcopy(norm_cfg)
        plain = sum(isinstance(m, _BatchNorm) for m in make_backbone(0, case).modules())
        model = make_backbone(0, case, norm_cfg=norm_cfg)
        assert norm_cfg == given
        norms = [m for m in model.modules() if isinstance(m, (_BatchNorm, nn.GroupNorm))]
        assert len(norms) == plain > 15
        assert all(isinstance(m, kind) and m.eps == eps for m in norms)
        model.train()(make_input(size=case.size))[0].sum().backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_init_weights_without_init_cfg(self, case):
        """OpenMMLab's call leaves the paper's initialisation, made in the constructor, as it is."""
        model = MODELS.build(case.cfg)
        before = copy.deepcopy(model.state_dict())
        model.init_weights()
        assert model.is_init
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        select = [v for k, v in model.named_parameters() if k.endswith('fc_select.weight')]
        assert torch.cat([v.flatten() for v in select]).std().item() == pytest.approx(0.01, rel=0.05)

    @pytest.mark.parametrize(
        ('name', 'kwargs', 'match'),
        [
            ('SKResNeXt', dict(depth=29), 'depth=29 is unknown: choose one of 26, 50, 101, 152'),
            ('SKResNet-18', dict(depth=101), "depth=101 is unknown: choose one of 18, 34, 50, '50d'"),
            ('SKResNet-18', dict(depth=['50d']), r"depth=\['50d'\] is unknown"),
            ('SKResNet-18', dict(depth={18}), r'depth=\{18\} is unknown'),
            ('SKShuffleNetV2', dict(widen_factor=3.0), 'widen_factor=3.0 is unknown: choose one of 0.5, 1.0, 1.5, 2.0'),
            ('SKShuffleNetV2', dict(widen_factor=None), 'widen_factor=None is unknown'),
            ('SKShuffleNetV2', dict(widen_factor=True), 'widen_factor=True is unknown'),
            ('SKNet', dict(depth=26, num_classes=10), "num_classes=10 is no argument of a backbone: it is the head's"),
            ('SKNet', dict(depth=26, in_chans=1), 'in_chans=1 is no argument of a backbone: it is in_channels'),
            ('SKResNet-18', dict(split_input='no'), "split_input='no' must be True or False"),
            ('SKResNet-18', dict(sk_kwargs=dict(split_input=False)), 'split_input is an argument of its own'),
            ('SKResNeXt', dict(depth=50, cardinality=16), 'cardinality=16 is called groups here'),
            ('SKNet', dict(unit='cbam'), "unit='cbam' is unknown: choose one of 'sk', 'plain', 'se'"),
            ('SKNet-29', dict(unit='cbam'), "unit='cbam' is unknown"),
            ('SKResNeXt', dict(unit='cbam'), "unit='cbam' is unknown"),
            ('SKResNet-18', dict(unit='cbam'), "unit='cbam' is unknown"),
            ('SKShuffleNetV2', dict(unit='cbam'), "unit='cbam' is unknown: choose one of 'sk', 'plain', 'se'"),
            ('SKNet', dict(sk_kwargs=dict(groups=7)), r'groups=7 must divide the input channels of a branch \(32\)'),
            ('SKNet-29', dict(sk_kwargs=dict(groups=7)), 'groups=7 must divide'),
            ('SKResNeXt', dict(sk_kwargs=dict(groups=7)), 'groups=7 must divide'),
            ('SKResNet-18', dict(sk_kwargs=dict(groups=7)), 'groups=7 must divide'),
            ('SKShuffleNetV2', dict(sk_kwargs=dict(groups=7)), r'groups=7 must divide .*\(8\)'),
            ('SKResNet-18', dict(sk_kwargs=dict(kernel_sizes=(1, 3, 5))), 'split_input=True needs in_channels .* 3 br'),
            ('SKNet-29', dict(unit='se', sk_kwargs=dict(groups=8)), "sk_kwargs={'groups': 8} are for unit='sk'"),
            ('SKShuffleNetV2', dict(unit='se', sk_kwargs=dict(groups=8)), "are for unit='sk', and this is unit='se'"),
            ('SKResNeXt', dict(groups=0), 'groups=0 must be an integer of at least 1'),
            ('SKResNeXt', dict(groups='32'), "groups='32' must be an integer of at least 1"),
            ('SKResNeXt', dict(width_per_group=2.5), 'width_per_group=2.5 must be an integer of at least 1'),
            ('SKNet-29', dict(out_indices=(3,)), r'out_indices=\(3,\) must be a sequence of stages from 0 to 2'),
            ('SKNet-29', dict(frozen_stages=4), r'frozen_stages=4 must be from -1 \(none\) to 3'),
            ('SKShuffleNetV2', dict(out_indices=(4,)), r'out_indices=\(4,\) must be a sequence of stages from 0 to 3'),
            ('SKShuffleNetV2', dict(out_indices=[3, 0, 3]), r'out_indices=\[3, 0, 3\] must name no stage twice'),
            ('SKShuffleNetV2', dict(frozen_stages=5), r'frozen_stages=5 must be from -1 \(none\) to 4'),
            ('SKShuffleNetV2', dict(channels=(15, 32, 64)), r'channels=\(15, 32, 64\) must be three even integers'),
            ('SKShuffleNetV2', dict(output_stride=4), 'output_stride=4 must be 8, 16 or 32'),
            ('SKResNet-18', dict(out_indices=2.5), 'out_indices=2.5 must be'),
            ('SKResNet-18', dict(out_indices=(1.0, True)), r'out_indices=\(1\.0, True\) must be'),
            ('SKNet', dict(frozen_stages=True), 'frozen_stages=True must be'),
            ('SKNet', dict(norm_eval='yes'), "norm_eval='yes' must be True or False"),
            ('SKNet', dict(layers=4), 'layers=4 must be three or four integers'),
            ('SKResNet-18', dict(sk_kwargs=3), 'sk_kwargs=3 must be a dict'),
            ('SKResNet-18', dict(out_indices=(0, '1')), r"out_indices=\(0, '1'\) must be"),
            ('SKResNet-18', dict(cardinality=32), 'cardinality=32 must be 1'),
        ],
        ids=str,
    )
    def test_bad_argument(self, name, kwargs, match):
        args = {**CASES[name].cfg, **kwargs}
        with torch.device('meta'), pytest.raises(ValueError, match=match):
            MODELS.build(args)

    @pytest.mark.parametrize(
        ('kwargs', 'named'),
        [
            (dict(frozen_stage=1), 'frozen_stage=1'),
            (dict(num_stages=4, style='pytorch'), "num_stages=4, style='pytorch'"),
            (dict(dcn=dict(type='DCNv2')), "dcn={'type': 'DCNv2'}"),
            (dict(pretrained='torchvision://resnet50'), "pretrained='torchvision://resnet50'"),
            (dict(kwargs=1), 'kwargs=1'),
        ],
        ids=str,
    )
    def test_unknown_argument(self, case, kwargs, named):
        said = f'{case.cfg["type"]} has no argument {named}: if a _base_ config left it in the backbone, put _delete_'
        with pytest.raises(TypeError, match=re.escape(said)) as caught:
            MODELS.build({**case.cfg, **kwargs})
        assert ('init_cfg' in str(caught.value)) == ('pretrained' in kwargs)

    def test_norms_are_mmpretrains_to_check(self):
        with torch.device('meta'), pytest.raises(KeyError, match='BatchNorn'):
            SKNet(26, norm_cfg=dict(type='BatchNorn'), **NARROW)

    def test_missing_argument(self):
        for kind in ('SKNet', 'SKResNeXt', 'SKResNet'):
            with pytest.raises(TypeError, match='depth'):
                MODELS.build(dict(type=kind))


class TestNetwork:
    @pytest.mark.parametrize(
        'kwargs',
        [
            dict(output_stride=32),
            dict(output_stride=16),
            dict(output_stride=8),
            dict(small_stem=True),
            dict(block_args=dict(sk_kwargs=dict(kernel_sizes=(3, 5, 7), select='shared'))),
        ],
        ids=str,
    )
    def test_is_timms(self, kwargs):
        backbone = make_backbone(out_indices=(0, 1, 2, 3), **kwargs)
        features = make_timm(features_only=True, out_indices=(1, 2, 3, 4), **kwargs)
        assert list(backbone.state_dict()) == list(features.state_dict())
        features.load_state_dict(backbone.state_dict(), strict=True)
        x = make_input(size=64)
        with torch.no_grad():
            outputs = backbone(x)
            assert_equal(outputs, features(x), length=features)
        first, least = (1, 32) if 'small_stem' in kwargs else (4, kwargs.get('output_stride', 32))
        assert [y.shape[1] for y in outputs] == CHANNELS
        assert [64 // y.shape[2] for y in outputs] == [min(first * 2**i, least) for i in range(4)]

    def test_is_timms_sknet50(self, sknet50):
        backbone = SKNet(50).eval()
        backbone.load_state_dict(sknet50.state_dict(), strict=True)
        with torch.no_grad():
            (output,) = backbone(make_input())
            assert_close(output, sknet50.forward_features(make_input()), length=sknet50)

    def test_norm_cfg_sync_bn_is_the_same_network(self):
        plain, sync = make_backbone(), make_backbone(seed=1, norm_cfg=dict(type='SyncBN'))
        sync.load_state_dict(plain.state_dict(), strict=True)
        with torch.no_grad():
            assert_equal(sync(make_input()), plain(make_input()), length=plain)

    def test_norm_cfg_without_gradients(self):
        model = make_backbone(norm_cfg=dict(type='BN', requires_grad=False))
        trained = {name.split('.')[-2] for name, p in model.named_parameters() if p.requires_grad}
        assert not any('bn' in name for name in trained)
        assert 'fc_select' in trained

    def test_zero_init_last(self):
        model = SKNet(26, zero_init_last=True, **NARROW)
        assert not model.layer1[0].conv3.bn.weight.any()

    @pytest.mark.parametrize(
        ('kwargs', 'match'),
        [
            (dict(depth=51), 'depth=51 is unknown: choose one of 26, 29, 50, 101'),
            (dict(depth='50'), "depth='50' is unknown"),
            (dict(out_indices=3), 'out_indices=3 must be a sequence of stages from 0 to 3'),
            (dict(out_indices=()), r'out_indices=\(\) must be'),
            (dict(out_indices=(0, 4)), r'out_indices=\(0, 4\) must be'),
            (dict(out_indices=(-1,)), r'out_indices=\(-1,\) must be'),
            (dict(out_indices=(1, 1)), r'out_indices=\(1, 1\) must name no stage twice'),
            (dict(frozen_stages=5), r'frozen_stages=5 must be from -1 \(none\) to 4'),
            (dict(frozen_stages=-2), 'frozen_stages=-2 must be'),
            (dict(channels=(16, 32)), r'channels=\(16, 32\) must be 4 integers of at least 1'),
        ],
        ids=str,
    )
    def test_bad_argument(self, kwargs, match):
        args = {'depth': 26, **NARROW, **kwargs}
        with pytest.raises(ValueError, match=match):
            SKNet(**args)
        with pytest.raises(ValueError, match=match):
            MODELS.build(dict(type='SKNet', **args))


def train_step(model, case):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    loss = sum(output.square().mean() for output in model(make_input(size=case.size)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def frozen_names(model, case, frozen_stages):
    prefixes = tuple(prefix for part in case.parts[: frozen_stages + 1] for prefix in part)
    return {name for name in model.state_dict() if name.startswith(prefixes)} if prefixes else set()


# Tensors in the state dict of the stem and the first so many stages, counted by hand: a norm has five, so that an SK
# bottleneck has 31, an SK basic unit 25, a shortcut 6, and ShuffleNetV2's two kinds of unit 30 and 31.
FROZEN = {
    'SKNet': (6, 68, 136, 204, 272),
    'SKNet-29': (6, 37, 74, 111),
    'SKResNeXt': (6, 37, 74, 111, 148),
    'SKResNet-18': (6, 62, 118, 174, 230),
    'SKShuffleNetV2': (6, 67, 128, 189, 195),
}


class TestTraining:
    @pytest.mark.parametrize(
        ('name', 'frozen_stages', 'tensors'),
        [(name, i, tensors) for name, counts in FROZEN.items() for i, tensors in enumerate((0, *counts), start=-1)],
    )
    def test_frozen_stages(self, name, frozen_stages, tensors):
        case = CASES[name]
        model = make_backbone(0, case, out_indices=case.every, frozen_stages=frozen_stages)
        frozen = frozen_names(model, case, frozen_stages)
        assert len(frozen) == tensors
        before = copy.deepcopy(model.state_dict())
        for mode in (True, False, True):
            model.train(mode)
            assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
                name for name, _ in model.named_parameters() if name in frozen
            }
            for name, module in model.named_modules():
                if isinstance(module, _BatchNorm):
                    assert module.training == (mode and f'{name}.weight' not in frozen), name
        if frozen_stages == len(case.channels):
            assert not model(make_input(size=case.size))[-1].requires_grad
            unchanged = {k for k, v in model.state_dict().items() if torch.equal(v, before[k])}
            assert unchanged == set(before)
        else:
            train_step(model, case)
            unchanged = {k for k, v in model.state_dict().items() if torch.equal(v, before[k])}
            assert unchanged == frozen

    def test_stages_after_the_last_output(self, case, tmp_path):
        """They would get no gradient, for which DistributedDataParallel would wait in its second step."""
        model = make_backbone(0, case, out_indices=(0,)).train()
        unused = tuple(prefix for part in case.parts[2:] for prefix in part)
        assert {name for name, p in model.named_parameters() if not p.requires_grad} == {
            name for name, _ in model.named_parameters() if name.startswith(unused)
        }
        before = copy.deepcopy(model.state_dict())
        dist.init_process_group('gloo', init_method=(tmp_path / 'store').as_uri(), rank=0, world_size=1)
        try:
            parallel = nn.parallel.DistributedDataParallel(model)
            for _ in range(2):
                train_step(parallel, case)
        finally:
            dist.destroy_process_group()
        unchanged = {k for k, v in model.state_dict().items() if torch.equal(v, before[k])}
        assert unchanged == {name for name in before if name.startswith(unused)}

    def test_frozen_in_a_classifier(self):
        classifier = get_classifier(frozen_stages=2)
        classifier.train()
        assert classifier.training
        assert not classifier.backbone.layer2[0].conv1.bn.training
        assert classifier.backbone.layer3[0].conv1.bn.training

    @pytest.mark.parametrize('frozen_stages', [-1, 1])
    def test_norm_eval(self, case, frozen_stages):
        model = make_backbone(0, case, out_indices=case.every, frozen_stages=frozen_stages, norm_eval=True)
        before = copy.deepcopy(model.state_dict())
        buffers = {name for name, _ in model.named_buffers()}
        model.train()
        assert model.training
        assert model.get_submodule(case.parts[3][0] + '0').training
        assert not any(m.training for m in model.modules() if isinstance(m, _BatchNorm))
        train_step(model, case)
        unchanged = {k for k, v in model.state_dict().items() if torch.equal(v, before[k])}
        assert unchanged == buffers | frozen_names(model, case, frozen_stages)

    def test_norm_eval_leaves_drop_path_on(self):
        model = make_backbone(norm_eval=True, drop_path_rate=0.1).train()
        assert model.layer4[1].drop_path.training
        assert not model.layer4[1].conv1.bn.training

    def test_norm_eval_of_sync_bn(self):
        model = make_backbone(norm_eval=True, norm_cfg=dict(type='SyncBN')).train()
        assert not any(m.training for m in model.modules() if isinstance(m, nn.SyncBatchNorm))

    @pytest.mark.parametrize('frozen_stages', [-1, 1])
    def test_with_cp(self, case, frozen_stages):
        """The same outputs and gradients, from units that run twice; also behind a stage that has none."""
        drop_path = {} if case.parts is SHUFFLE_PARTS else dict(drop_path_rate=0.2)
        results, gradients, runs = [], [], []
        for with_cp in (False, True):
            model = make_backbone(
                0, case, out_indices=case.every, frozen_stages=frozen_stages, with_cp=with_cp, **drop_path
            ).train()
            ran = []
            for part in case.parts[1:4]:
                model.get_submodule(part[0] + '0').register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
            torch.manual_seed(2)
            outputs = model(make_input(size=case.size))
            sum(output.square().mean() for output in outputs).backward()
            results.append([output.detach() for output in outputs])
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
            runs.append(len(ran))
        assert runs == [3, 6 if frozen_stages == -1 else 5]
        assert_equal(*results)
        assert gradients[0].keys() == gradients[1].keys()
        assert all(gradient is not None for gradient in gradients[1].values())
        # What runs twice adds its gradients up in another order.
        largest = max(gradient.abs().max().item() for gradient in gradients[0].values())
        assert_close(gradients[1], gradients[0], length=model, scale=largest)

    def test_with_cp_in_eval(self, case):
        x = make_input(size=case.size)
        with torch.no_grad():
            assert_equal(make_backbone(0, case, with_cp=True)(x), make_backbone(0, case)(x))

    @pytest.mark.parametrize(
        ('name', 'lr', 'channels_last'),
        [
            ('SKNet', 0.01, False),
            ('SKNet', 0.01, True),
            ('SKResNet-18', 0.01, False),
            ('SKShuffleNetV2', 0.1, False),
        ],
    )
    def test_loss_of_a_classifier_falls(self, name, lr, channels_last):
        torch.manual_seed(0)
        classifier = make_classifier(CASES[name], channels_last=channels_last)
        classifier.init_weights()
        optimizer = torch.optim.SGD(classifier.train().parameters(), lr=lr)
        samples = [mmpretrain.structures.DataSample().set_gt_label(i) for i in range(4)]
        losses = []
        for _ in range(8):
            loss = classifier(make_input(4), samples, mode='loss')['loss']
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(np.log(10), rel=0.1)
        assert losses[-1] < 0.7 * losses[0]

    def test_sync_batchnorm(self, case):
        """In training as in eval, there and back; timm's own units lose their ReLUs here."""

        def outputs(model, mode):
            with torch.no_grad():
                return copy.deepcopy(model).train(mode)(make_input(size=case.size).double())

        def count(model, kind):
            return sum(type(m) is kind for m in model.modules())

        # In float64, since batch statistics of small maps amplify rounding.
        model = make_backbone(0, case, out_indices=case.every, frozen_stages=1).double()
        first = case.parts[1][0][:-1]
        keys = list(model.state_dict())
        expected = {mode: outputs(model, mode) for mode in (False, True)}
        norms = count(model, nn.BatchNorm2d)
        assert norms == sum(name.endswith('running_mean') for name in keys) > 15

        for convert in (nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm):
            converted = convert(copy.deepcopy(model))
            assert count(converted, nn.SyncBatchNorm) == norms
            assert count(converted, nn.BatchNorm2d) == 0
            assert count(converted, nn.ReLU) == count(model, nn.ReLU)
            assert list(converted.state_dict()) == keys
            assert not any(m.training for m in converted.train().get_submodule(first).modules())
            assert not any(p.requires_grad for p in converted.get_submodule(first).parameters())

            reverted = revert_sync_batchnorm(copy.deepcopy(converted))
            assert count(reverted, nn.SyncBatchNorm) == 0
            assert list(reverted.state_dict()) == keys
            for mode, gain in ((False, 1), (True, 1e4)):
                assert_equal(outputs(converted, mode), expected[mode], length=model, gain=gain)
                assert_equal(outputs(reverted, mode), expected[mode], length=model, gain=gain)


def save_as(kind, model, path):
    """One of the files that people have, and the ``init_cfg`` that reads it."""
    if kind == 'timm.pth':
        torch.save(model.state_dict(), path / 'tiny.pth')
    elif kind == 'timm-training.pth':
        torch.save(dict(epoch=3, arch='sknet26', state_dict=model.state_dict()), path / 'tiny.pth')
    elif kind == 'ddp.pth':
        torch.save({f'module.{k}': v for k, v in model.state_dict().items()}, path / 'tiny.pth')
    elif kind == 'timm.safetensors':
        save_file(model.state_dict(), path / 'tiny.safetensors')
    elif kind == 'mmengine.pth':
        save_mmengine_checkpoint(model.state_dict(), path / 'tiny.pth')
    elif kind == 'mmengine.safetensors':
        save_file(to_mmpretrain(model.state_dict()), path / 'tiny.safetensors')
    file = next(path.glob('tiny.*'))
    return dict(type='Pretrained', checkpoint=str(file))


TIMM_FILES = ['timm.pth', 'timm-training.pth', 'ddp.pth', 'timm.safetensors']
FILES = [*TIMM_FILES, 'mmengine.pth', 'mmengine.safetensors']


def initialise(init_cfg, **kwargs):
    model = SKNet(26, init_cfg=init_cfg, **{**NARROW, **kwargs})
    model.init_weights()
    return model


class TestInitCfg:
    @pytest.mark.parametrize('prefix', [{}, dict(prefix='backbone.')], ids=str)
    @pytest.mark.parametrize('kind', [*FILES, 'hf-hub'])
    def test_with_a_prefix_and_without(self, hub, tmp_path, tiny, kind, prefix, warned):
        """So that another checkpoint can take a config's place, whichever has the classifier's names."""
        hub.add(REPO, weights(tiny))
        hf_hub = dict(type='Pretrained', checkpoint=f'hf-hub:{REPO}')
        init_cfg = {**(hf_hub if kind == 'hf-hub' else save_as(kind, tiny, tmp_path)), **prefix}
        given = dict(init_cfg)
        assert same_state(initialise(init_cfg), tiny)
        assert init_cfg == given
        assert warned() == []

    def test_of_a_detector_in_training(self, tmp_path, tiny, warned):
        """Of a checkpoint's other parts, none is looked at."""
        state_dict = {f'backbone.{k}': v for k, v in tiny.state_dict().items() if not k.startswith('fc.')}
        state_dict |= {'neck.conv1.weight': torch.ones(1), 'bbox_head.fc.weight': torch.ones(1)}
        optimizer = torch.optim.SGD(tiny.parameters(), lr=0.1).state_dict()
        torch.save(dict(meta=dict(epoch=1), state_dict=state_dict, optimizer=optimizer), tmp_path / 'epoch_1.pth')
        init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'epoch_1.pth'))
        assert same_state(initialise(init_cfg), tiny)
        assert warned() == []

    def test_after_another_initialiser(self, tmp_path, tiny):
        """Each checkpoint of a list is named in its own error."""
        constant = dict(type='Constant', layer='Conv2d', val=0.0)
        fitting = save_as('timm.pth', tiny, tmp_path)
        assert same_state(initialise([constant, fitting]), tiny)
        torch.save(make_timm(in_chans=1).state_dict(), tmp_path / 'grey.pth')
        grey = dict(type='Pretrained', checkpoint=str(tmp_path / 'grey.pth'))
        with pytest.raises(
            CheckpointError, match=r'/grey\.pth: its weights do not fit .*conv1.weight is \(64, 1, 7, 7'
        ):
            initialise([fitting, constant, grey])

    @pytest.mark.parametrize('as_list', [False, True])
    def test_hf_hub(self, hub, tiny, as_list, warned):
        hub.add(REPO, weights(tiny))
        init_cfg = dict(type='Pretrained', checkpoint=f'hf-hub:{REPO}')
        assert same_state(initialise([init_cfg] if as_list else init_cfg, frozen_stages=1), tiny)
        assert warned() == []

    def test_hf_hub_revision(self, hub, tiny, warned):
        old, branch = make_timm(seed=1), make_timm(seed=2)
        commit = hub.add(REPO, weights(old), 'v1')
        hub.add(REPO, weights(branch), 'refs/pr/1')
        hub.add(REPO, weights(tiny))
        for revision, model in (('', tiny), ('@v1', old), (f'@{commit}', old), ('@refs/pr/1', branch)):
            assert same_state(initialise(dict(type='Pretrained', checkpoint=f'hf-hub:{REPO}{revision}')), model)
        assert warned() == []

    def test_hf_hub_without_a_classifier(self, hub, warned):
        headless = make_timm(num_classes=0)
        hub.add(REPO, weights(headless))
        assert same_state(initialise(dict(type='Pretrained', checkpoint=f'hf-hub:{REPO}')), headless)
        assert warned() == []

    def test_published(self, hub, sknet50, published, warned):
        """The line of the README, in a detector."""
        hub.add(PUBLISHED, published)
        cfg = dict(
            type='mmpretrain.SKNet',
            depth=50,
            out_indices=(0, 1, 2, 3),
            init_cfg=dict(type='Pretrained', checkpoint=f'hf-hub:{PUBLISHED}'),
        )
        model = ROOT_MODELS.build(cfg)
        model.init_weights()
        assert same_state(model, sknet50)
        assert warned() == []

    @pytest.mark.parametrize('checkpoint', ['timm.pth', 'hf-hub'])
    def test_of_a_classifiers_backbone(self, hub, tmp_path, tiny, checkpoint, warned):
        hub.add(REPO, weights(tiny))
        hf_hub = dict(type='Pretrained', checkpoint=f'hf-hub:{REPO}')
        init_cfg = hf_hub if checkpoint == 'hf-hub' else save_as(checkpoint, tiny, tmp_path)
        classifier = get_classifier(init_cfg=init_cfg)
        classifier.init_weights()
        assert same_state(classifier.backbone, tiny)
        assert not torch.equal(classifier.head.fc.weight, tiny.fc.weight)
        assert warned() == []

    @pytest.mark.parametrize('checkpoint', ['timm.pth', 'hf-hub'])
    def test_of_a_classifier(self, hub, tmp_path, tiny, checkpoint, warned):
        hub.add(REPO, weights(tiny))
        file = save_as('timm.pth', tiny, tmp_path)['checkpoint']
        classifier = MODELS.build(
            dict(
                type='ImageClassifier',
                backbone=dict(type='SKNet', depth=26, **NARROW),
                neck=dict(type='GlobalAveragePooling'),
                head=dict(type='LinearClsHead', num_classes=10, in_channels=512),
                pretrained=f'hf-hub:{REPO}' if checkpoint == 'hf-hub' else file,
            )
        )
        classifier.init_weights()
        assert same_state(classifier.backbone, tiny)
        assert torch.equal(classifier.head.fc.weight, tiny.fc.weight)
        assert warned() == []

    @pytest.mark.parametrize('prefix', [{}, dict(prefix='backbone.')], ids=str)
    @pytest.mark.parametrize('kind', ['timm.pth', 'mmengine.safetensors'])
    def test_local_of_another_depth(self, tmp_path, kind, prefix):
        """A warning would be lost, and frozen stages would stay random."""
        init_cfg = {**save_as(kind, make_timm(layers=(1, 1, 1, 3)), tmp_path), **prefix}
        with pytest.raises(CheckpointError) as caught:
            initialise(init_cfg, frozen_stages=1)
        path = re.escape(init_cfg['checkpoint'])
        missing = r'layer1\.1\.conv1\.conv\.weight is missing; .*; .* and \d+ more'
        assert re.fullmatch(f'{path}: its weights do not fit this SKNet of depth 26: {missing}', str(caught.value))

    def test_local_without_weights(self, tmp_path):
        torch.save(dict(model={'conv1.weight': torch.ones(1)}, epoch=1), tmp_path / 'x.pth')
        with pytest.raises(CheckpointError, match=r'x\.pth: its weights do not fit .* bn1\.weight is missing; '):
            initialise(dict(type='Pretrained', checkpoint=str(tmp_path / 'x.pth')))

    def test_load_from_with_another_head_warns_as_everywhere(self, tmp_path, warned):
        """A head is mmengine's matter. And so it is seen that ``warned`` sees."""
        file = save_as('timm.pth', make_timm(num_classes=7), tmp_path)['checkpoint']
        load_checkpoint(get_classifier(), file, map_location='cpu', logger='current')
        (message,) = warned()
        assert 'size mismatch for head.fc.weight' in message
        assert 'backbone.' not in message

    @pytest.mark.parametrize('repo', ['', 'tiny', 'me/tiny@', 'me/tiny/x'])
    def test_hf_hub_needs_owner_and_name(self, repo):
        with pytest.raises(ValueError, match='must be OWNER/NAME or OWNER/NAME@REVISION') as error:
            initialise(dict(type='Pretrained', checkpoint=f'hf-hub:{repo}'))
        assert repr(repo) in str(error.value)


class TestStateDicts:
    """torch's and mmengine's loading, strict, of timm's names and of mmpretrain's."""

    def test_of_a_backbone(self, tiny):
        state_dict = tiny.state_dict()
        model = make_backbone(seed=1)
        model.load_state_dict(state_dict, strict=True)
        assert same_state(model, tiny)
        assert 'fc.weight' in state_dict

    @pytest.mark.parametrize('to_names', [dict, to_mmpretrain], ids=['timm', 'mmpretrain'])
    def test_of_a_classifier(self, tiny, to_names):
        state_dict = to_names(tiny.state_dict())
        names = list(state_dict)
        classifier = get_classifier()
        classifier.load_state_dict(state_dict, strict=True)
        assert list(state_dict) == names
        assert same_state(classifier.backbone, tiny)
        assert list(classifier.state_dict()) == list(to_mmpretrain(tiny.state_dict()))

    @pytest.mark.parametrize('checkpoint', [*TIMM_FILES, 'mmengine.pth', 'hf-hub'])
    def test_load_checkpoint(self, hub, tmp_path, tiny, checkpoint, warned):
        """As the Runner's ``load_from`` does."""
        hub.add(REPO, weights(tiny))
        name = f'hf-hub:{REPO}' if checkpoint == 'hf-hub' else save_as(checkpoint, tiny, tmp_path)['checkpoint']
        classifier = get_classifier()
        load_checkpoint(classifier, name, map_location='cpu', strict=True)
        with torch.no_grad():
            assert_close(classifier(make_input()), tiny(make_input()), length=tiny)
        assert warned() == []

    def test_missing_and_unexpected_are_still_reported(self, tiny):
        state_dict = tiny.state_dict()
        state_dict['extra.weight'] = state_dict.pop('conv1.weight')
        with pytest.raises(RuntimeError, match=r'(?s)Missing.*conv1.weight.*Unexpected.*extra.weight'):
            make_backbone().load_state_dict(state_dict, strict=True)


def settle(model, size=64):
    """Statistics of BatchNorm that fit the weights, or the logits of a deep random network hardly heed its input."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(make_input(8, size=size))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def assert_same_logits(classifier, model, size=64, dtype=torch.float32):
    """A classifier of mmpretrain's and a model of timm's or torchvision's."""
    x = make_input(size=size).to(dtype)
    with torch.no_grad():
        expected = model.to(dtype)(x)
        assert_close(classifier.to(dtype).eval()(x), expected, length=model)
    assert (expected[0] - expected[1]).abs().max() > 1e-2  # the images do tell in the logits


class TestWeightsOfEveryBackbone:
    @pytest.mark.parametrize('kind', ['timm.pth', 'mmengine.safetensors', 'hf-hub'])
    def test_init_cfg(self, hub, tmp_path, case, kind, warned):
        model = make_timm(case=case)
        hub.add(REPO, weights(model))
        hf_hub = dict(type='Pretrained', checkpoint=f'hf-hub:{REPO}')
        init_cfg = hf_hub if kind == 'hf-hub' else save_as(kind, model, tmp_path)
        backbone = MODELS.build({**case.cfg, 'init_cfg': init_cfg})
        backbone.init_weights()
        assert same_state(backbone, model)
        assert warned() == []

    @pytest.mark.parametrize('kind', ['timm.safetensors', 'mmengine.pth'])
    def test_of_a_classifier(self, tmp_path, any_case, kind, warned):
        model = settle(make_timm(case=any_case), any_case.size)
        classifier = make_classifier(any_case)
        checkpoint = save_as(kind, model, tmp_path)['checkpoint']
        load_checkpoint(classifier, checkpoint, map_location='cpu', strict=True)
        assert_same_logits(classifier, model, any_case.size, torch.float64)  # few channels amplify rounding
        assert warned() == []

    @pytest.mark.parametrize(
        ('name', 'saved', 'cause'),
        [
            (
                'SKNet-29',
                'SKNet-29-plain',
                'this SKNet of depth 29: layer1.0.conv1.conv.weight is missing; .* and [0-9]+ more',
            ),
            ('SKResNeXt', 'SKNet-29', 'this SKResNeXt of depth 26: layer4.0.conv1.conv.weight is missing; .* more'),
            ('SKResNet-18', 'SKNet', 'this SKResNet of depth 18: layer1.0.conv1.paths.0.conv.weight is missing'),
            (
                'SKShuffleNetV2',
                'SKShuffleNetV2-plain',
                "this SKShuffleNetV2 of widen factor 0.5 and unit 'sk': "
                'stage2.1.branch2.3.paths.0.conv.weight is missing; .* and [0-9]+ more',
            ),
            (
                'SKShuffleNetV2-plain',
                'SKShuffleNetV2-se',
                "this SKShuffleNetV2 of widen factor 0.5 and unit 'plain': "
                'stage2.0.branch2.8.fc1.weight is not part of it; .* and [0-9]+ more',
            ),
        ],
    )
    def test_of_another_network(self, hub, name, saved, cause):
        hub.add(REPO, weights(make_timm(case=ALL_CASES[saved])))
        case = ALL_CASES[name]
        backbone = MODELS.build({**case.cfg, 'init_cfg': dict(type='Pretrained', checkpoint=f'hf-hub:{REPO}')})
        with pytest.raises(HubError, match=f'^{REPO}: its weights do not fit {cause}'):
            backbone.init_weights()


@pytest.fixture
def shufflenet_at_pytorch(tmp_path, monkeypatch):
    """ShuffleNetV2 1x where torch keeps what it has downloaded: its name at the given address, and its weights."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    (tmp_path / 'hub' / 'checkpoints').mkdir(parents=True)
    file = zoo.MODELS['shufflenetv2_x1_0'].weights[0].url.rpartition('/')[2]
    published = randomise(torchvision.models.shufflenet_v2_x1_0()).state_dict()
    torch.save(published, tmp_path / 'hub' / 'checkpoints' / file)
    return lambda address: (address + ('shufflenetv2_x1.0' if 'torchvision' in address else file), published)


class TestPublished:
    """Weights of others, at their full size."""

    @pytest.mark.parametrize('depth', [18, 34])
    def test_skresnet(self, hub, depth, warned):
        model = randomise(timm.create_model(f'skresnet{depth}'))
        repo = f'timm/skresnet{depth}.ra_in1k'
        hub.add(repo, weights(model))
        classifier = mmpretrain.get_model(f'skresnet{depth}_in1k', pretrained=True)
        assert type(classifier.backbone) is SKResNet
        assert same_state(classifier.backbone, model)
        assert_same_logits(classifier, model, size=96)

        strict = MODELS.build(dict(type='SKResNet', depth=depth))
        strict.load_state_dict(model.state_dict(), strict=True)
        assert same_state(strict, model)
        assert [w.hf_hub_id for w in zoo.MODELS[f'skresnet{depth}'].weights] == [repo]
        assert warned() == []

    def test_skresnet_without_splitting_refuses_them(self, hub):
        model = timm.create_model('skresnet18')
        repo = 'timm/skresnet18.ra_in1k'
        hub.add(repo, weights(model))
        backbone = SKResNet(18, split_input=False, init_cfg=dict(type='Pretrained', checkpoint=f'hf-hub:{repo}'))
        with pytest.raises(HubError) as caught:
            backbone.init_weights()
        assert str(caught.value) == (
            f'{repo}: its weights do not fit this SKResNet of depth 18: layer1.0.conv1.paths.0.conv.weight is '
            '(64, 32, 3, 3), not (64, 64, 3, 3); layer1.0.conv1.paths.1.conv.weight is (64, 32, 3, 3), not '
            '(64, 64, 3, 3); layer1.1.conv1.paths.0.conv.weight is (64, 32, 3, 3), not (64, 64, 3, 3) and 13 more'
        )
        with pytest.raises(RuntimeError, match=r'size mismatch for layer1\.0\.conv1\.paths\.0\.conv\.weight'):
            backbone.load_state_dict(model.state_dict(), strict=True)

    @pytest.mark.parametrize('factor', [0.5, 1.0])
    def test_torchvisions_shufflenet(self, tmp_path, factor, warned):
        name = f'x{str(factor).replace(".", "_")}'
        model = settle(randomise(getattr(torchvision.models, f'shufflenet_v2_{name}')()))
        torch.save(model.state_dict(), tmp_path / 'torchvision.pth')
        case = Case(dict(type='SKShuffleNetV2', widen_factor=factor, unit='plain'), '', {}, [1024], [], SHUFFLE_PARTS)
        classifier = make_classifier(case, 1000)
        load_checkpoint(classifier, str(tmp_path / 'torchvision.pth'), map_location='cpu', strict=True)
        assert same_state(classifier.backbone, model)
        assert_same_logits(classifier, model)

        overlay = dict(file=str(tmp_path / 'torchvision.pth'))
        at_timms = timm.create_model(f'shufflenetv2_{name}', pretrained=True, pretrained_cfg_overlay=overlay)
        assert_same_logits(at_timms, model)
        backbone = MODELS.build({**case.cfg, 'init_cfg': dict(type='Pretrained', checkpoint=overlay['file'])})
        backbone.init_weights()
        assert same_state(backbone, model)
        assert warned() == []

    @pytest.mark.parametrize(
        ('cfg', 'counts'),
        [(dict(unit='sk', frozen_stages=0), (258, 505)), (dict(unit='se', frozen_stages=-1), (336, 400))],
        ids=['sk', 'se'],
    )
    @pytest.mark.parametrize('address', ['https://download.pytorch.org/models/', 'torchvision://'])
    def test_torchvisions_shufflenet_in_other_units(self, shufflenet_at_pytorch, address, cfg, counts):
        checkpoint, published = shufflenet_at_pytorch(address)
        init_cfg = dict(type='Pretrained', checkpoint=checkpoint)
        backbone = SKShuffleNetV2(1.0, init_cfg=init_cfg, **cfg)
        backbone.init_weights()
        state_dict = backbone.state_dict()
        loaded = {k for k, v in state_dict.items() if k in published and torch.equal(v, published[k])}
        assert (len(loaded), len(state_dict)) == counts
        assert {k for k in state_dict if not re.match(r'stage\d\.\d+\.branch2\.[348]\.', k)} <= loaded

    @pytest.mark.parametrize(
        ('cfg', 'cause'),
        [
            (dict(unit='sk', frozen_stages=1), 'stage2.1.branch2.3.paths.0.conv.weight is missing; .* and 45 more'),
            (dict(unit='se', frozen_stages=1), 'stage2.0.branch2.8.fc1.weight is missing; .* and 13 more'),
            (
                dict(unit='sk', widen_factor=0.5),
                r'stage2.0.branch1.2.weight is \(58, 24, 1, 1\), not \(24, .* and 198 more',
            ),
            (dict(unit='sk', layers=(4, 8, 5)), 'stage4.4.branch2.0.weight is missing; .*'),
        ],
        ids=['frozen-sk', 'frozen-se', 'width', 'depth'],
    )
    def test_torchvisions_shufflenet_does_not_fit(self, shufflenet_at_pytorch, cfg, cause):
        checkpoint, _ = shufflenet_at_pytorch('https://download.pytorch.org/models/')
        backbone = SKShuffleNetV2(**cfg, init_cfg=dict(type='Pretrained', checkpoint=checkpoint))
        with pytest.raises(
            CheckpointError, match=f'^{checkpoint}: its weights do not fit this SKShuffle.*: .*{cause}$'
        ):
            backbone.init_weights()

    def test_torchvisions_shufflenet_of_another_width(self):
        model = torchvision.models.shufflenet_v2_x0_5()
        with pytest.raises(RuntimeError, match=r'size mismatch for backbone\.stage2\.0\.branch1\.2\.weight'):
            mmpretrain.get_model('shufflenetv2_x1_0_in1k').load_state_dict(model.state_dict(), strict=True)


class TestGetModel:
    def test_pretrained(self, hub, published, warned, recwarn):
        hub.add(PUBLISHED, published)
        model = mmpretrain.get_model('sknet50_in1k', pretrained=True)
        assert warned() == []
        assert not [str(w.message) for w in recwarn if 'checkpoint' in str(w.message)]
        expected = timm.create_model('sknet50', pretrained=True).eval()
        assert not model.training
        x = make_input(2, size=224)
        with torch.no_grad():
            logits = model(x)
            assert_close(logits, expected(x), length=model)
        assert logits.shape == (2, 1000)
        assert logits.std() > 1e-3
        assert len(list(hub.cache.glob('models--*/blobs/*'))) == 1

    def test_pretrained_with_other_classes(self, hub, sknet50, published, warned):
        hub.add(PUBLISHED, published)
        model = mmpretrain.get_model('sknet50_in1k', pretrained=True, head=dict(num_classes=10, topk=(1, 5)))
        assert same_state(model.backbone, sknet50)
        assert model.head.fc.weight.shape == (10, 2048)
        said = '\n'.join(warned())
        assert 'size mismatch for head.fc.weight' in said
        assert 'backbone' not in said
        assert 'missing' not in said
        assert 'unexpected' not in said

    @pytest.mark.parametrize('checkpoint', [*TIMM_FILES, 'mmengine.pth', 'hf-hub'])
    def test_pretrained_names_a_checkpoint(self, hub, tmp_path, tiny, checkpoint, warned):
        hub.add(REPO, weights(tiny))
        name = f'hf-hub:{REPO}' if checkpoint == 'hf-hub' else save_as(checkpoint, tiny, tmp_path)['checkpoint']
        model = get_classifier(pretrained=name)
        with torch.no_grad():
            assert_close(model(make_input()), tiny(make_input()), length=model)
        assert warned() == []

    def test_without_published_weights(self):
        with pytest.warns(UserWarning, match='Unable to find pre-defined checkpoint'):
            mmpretrain.get_model('sknet26_in1k', pretrained=True)

    def test_unknown(self):
        with pytest.raises(ValueError, match='Failed to find model "sknet51_in1k"'):
            mmpretrain.get_model('sknet51_in1k')

    def test_features_of_every_stage(self):
        model = get_classifier(out_indices=(0, 1, 2, 3))
        with torch.no_grad():
            assert [y.shape for y in model.extract_feat(make_input(1))] == [(1, c) for c in CHANNELS]


@pytest.fixture(scope='module')
def photo():
    """Of no side that the resize would keep, and smooth, as photographs are."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((400, 300), Image.Resampling.BICUBIC)


class TestInferencer:
    def test_is_timms(self, hub, tmp_path, sknet50, published, photo):
        """From the file to the scores: the preprocessing is the published weights' own."""
        hub.add(PUBLISHED, published)
        photo.save(tmp_path / 'photo.png')
        inferencer = mmpretrain.ImageClassificationInferencer('sknet50_in1k', pretrained=True, device='cpu')
        (result,) = inferencer(str(tmp_path / 'photo.png'))

        data_config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg('sknet50').to_dict())
        transform = timm.data.create_transform(**data_config)
        with torch.no_grad():
            scores = sknet50(transform(photo)[None]).softmax(1)[0]
        assert scores.max() > 1.5 * scores.mean()  # or any two classifiers would agree
        np.testing.assert_allclose(result['pred_scores'], scores.numpy(), rtol=0, atol=1e-5)
        assert result['pred_label'] == scores.argmax().item()
        assert result['pred_class'] == mmpretrain.datasets.ImageNet.METAINFO['classes'][result['pred_label']]

    def test_array_is_the_file(self, tmp_path, photo, tiny):
        photo.save(tmp_path / 'photo.png')
        model = get_classifier()
        model.load_state_dict(tiny.state_dict())
        inferencer = mmpretrain.ImageClassificationInferencer(model, device='cpu', classes=[f'c{i}' for i in range(10)])
        bgr = np.ascontiguousarray(np.asarray(photo)[..., ::-1])
        results = inferencer([str(tmp_path / 'photo.png'), bgr], batch_size=2)
        assert len(results) == 2
        np.testing.assert_array_equal(results[0]['pred_scores'], results[1]['pred_scores'])
        for result in results:
            assert result['pred_class'] == f'c{result["pred_label"]}'
            assert result['pred_score'] == result['pred_scores'].max()

    def test_inference_model(self, photo, tiny):
        model = get_classifier()
        model.load_state_dict(tiny.state_dict())
        result = mmpretrain.inference_model(model, np.asarray(photo))
        assert result['pred_scores'].shape == (10,)
        assert result['pred_class'] in mmpretrain.datasets.ImageNet.METAINFO['classes'][:10]


def load_by_init_cfg(repo=REPO, **kwargs):
    return initialise(dict(type='Pretrained', checkpoint=f'hf-hub:{repo}'), **kwargs)


def load_by_get_model(repo=REPO, **kwargs):
    return get_classifier(f'hf-hub:{repo}', **kwargs).backbone


@pytest.fixture(params=[load_by_init_cfg, load_by_get_model], ids=['init_cfg', 'get_model'])
def load(request):
    return request.param


def fails(load, repo, cause, **kwargs):
    with pytest.raises(HubError, match=cause) as error:
        load(repo, **kwargs)
    message = str(error.value)
    assert message.startswith(f'{repo}: ')
    assert '\n' not in message
    assert len(message) < 600


class TestFaults:
    """What the errors of tests/weights/test_hub.py become on their way through mmengine."""

    @pytest.mark.parametrize(
        ('fault', 'cause'),
        [
            ('missing', 'repository not found, or private .*HTTP 404: Repository not found'),
            ('unauthorized', 'repository not found, or private .*HTTP 401: Invalid username or password'),
            ('garbage', 'model.safetensors is not a safetensors file .*removed from the cache'),
        ],
    )
    def test_fault(self, hub, tiny, load, fault, cause):
        hub.add(REPO, weights(tiny))
        hub.faults[REPO] = FAULTS[fault]
        fails(load, REPO, cause)
        assert not list(hub.cache.glob('models--*/snapshots/*/*'))
        hub.faults.clear()
        assert same_state(load(), tiny)

    def test_truncated(self, hub, tiny):
        hub.add(REPO, weights(tiny))
        hub.faults[REPO] = FAULTS['truncated']
        fails(load_by_get_model, REPO, 'the download failed: ')
        assert not list(hub.cache.glob('models--*/snapshots/*/*'))
        hub.faults.clear()
        assert same_state(load_by_get_model(), tiny)

    def test_refused(self, hub, tiny, load):
        hub.add(REPO, weights(tiny))
        hub.stop()
        fails(load, REPO, 'not in the local cache and the Hub did not give it .*[Cc]onnection refused')
        hub.start()
        assert same_state(load(), tiny)

    def test_unknown_revision(self, hub, tiny, load):
        hub.add(REPO, weights(tiny))
        fails(load, f'{REPO}@v2', 'the repository has no such revision')
        hub.add(REPO, weights(tiny), 'v2')
        assert same_state(load(f'{REPO}@v2'), tiny)

    @pytest.mark.parametrize(
        ('saved', 'cause'),
        [
            (dict(layers=(1, 2, 2, 2)), r'layer1.1.conv1.conv.weight is missing; .* and \d+ more'),
            (dict(layers=(2, 2, 2, 3)), 'layer4.2.conv1.conv.weight is not part of it'),
            (
                dict(channels=(16, 32, 64, 96)),
                r'layer4.0.conv1.conv.weight is \(192, 256, 1, 1\), not \(256, 256, 1, 1',
            ),
            (dict(in_chans=1), r'conv1.weight is \(64, 1, 7, 7\), not \(64, 3, 7, 7\)$'),
        ],
        ids=['missing', 'unexpected', 'narrower', 'grey'],
    )
    def test_wrong_shapes(self, hub, tiny, load, saved, cause):
        hub.add(REPO, weights(make_timm(**saved)))
        fails(load, REPO, f'its weights do not fit this SKNet of depth 26: .*{cause}')
        hub.add(REPO, weights(tiny))
        assert same_state(load(), tiny)

    def test_of_a_named_model(self, hub, published, sknet50):
        hub.faults[PUBLISHED] = FAULTS['missing']
        fails(lambda _: mmpretrain.get_model('sknet50_in1k', pretrained=True), PUBLISHED, 'HTTP 404')
        hub.faults.clear()
        hub.add(PUBLISHED, published)
        assert same_state(mmpretrain.get_model('sknet50_in1k', pretrained=True).backbone, sknet50)


def test_frozen_stem_has_its_pooling_convolution():
    backbone = make_backbone(replace_stem_pool=True, frozen_stages=0).train()
    assert not any(module.training for module in backbone.maxpool.modules())
    assert not any(parameter.requires_grad for parameter in backbone.maxpool.parameters())
    assert backbone.layer1[0].conv1.conv.weight.requires_grad


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_no_module_has_a_number_of_classes(case):
    """mmpretrain's and mmdet's hooks compare it, in every module that has one, with the data set's."""
    assert not any(hasattr(module, 'num_classes') for module in make_backbone(case=case).modules())
