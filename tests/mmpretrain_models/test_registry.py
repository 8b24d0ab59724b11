"""mmpretrain's registry: names, scopes, sizes, and learning rates by depth."""

import pytest

pytest.importorskip('mmpretrain')

import mmpretrain
import timm
import torch
from helpers.backbone_cases import (
    CASES,
    make_input,
)
from helpers.backbones import (
    count,
    make_backbone,
)
from helpers.kinds import one_of_each
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import DefaultScope
from mmpretrain.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from sk_plugins import zoo
from sk_plugins.mmpretrain_models import SKNet, SKResNet, SKResNetSimCLR, SKResNeXt, SKShuffleNetV2
from sk_plugins.weights import to_mmpretrain, to_timm
from sk_plugins.weights.names import is_timm_format


class TestRegistry:
    def test_models(self):
        assert {'sknet101_in1k', 'sknet26_in1k', 'sknet50_in1k'} <= set(mmpretrain.list_models('sknet*'))
        assert mmpretrain.list_models('sknet50_in1k', task='Image Classification') == ['sknet50_in1k']
        for backbone in (SKNet, SKResNet, SKResNetSimCLR, SKResNeXt, SKShuffleNetV2):
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

    def test_custom_imports(self, run_python, tmp_path):
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
        done = run_python('-c', script, config)
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
    'skresnet50x1_simclr': 35_215_584 + 1000 * 2049,
    'skresnet50x2_simclr': 140_306_048 + 1000 * 4097,
    'skresnet101x1_simclr': 64_662_304 + 1000 * 2049,
    'skresnet101x2_simclr': 257_132_224 + 1000 * 4097,
    'skresnet152x1_simclr': 88_940_896 + 1000 * 2049,
    'skresnet152x2_simclr': 353_398_528 + 1000 * 4097,
    'skresnet152x3_simclr': 794_704_160 + 1000 * 6145,
}


class TestZoo:
    """The same network at both doors: every row at its full size, without memory."""

    @pytest.mark.parametrize('name', one_of_each(zoo.MODELS))
    def test_names_and_shapes(self, name):
        spec = zoo.MODELS[name]
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
    'SKResNeXt-101': (dict(type='SKResNeXt', depth=101, groups=64), RESNET_101),
    'SKResNeXt-152': (
        dict(type='SKResNeXt', depth=152),
        [[1] * 3, [2] * 4 + [3] * 4, [4 + i // 4 for i in range(36)], [13] * 3],
    ),
    'SKResNet-34': (dict(type='SKResNet', depth=34), RESNET_50),
    'SKResNet-50d': (dict(type='SKResNet', depth='50d'), RESNET_50),
    'SKResNetSimCLR-101': (dict(type='SKResNetSimCLR', depth=101), RESNET_101),
    **{
        f'SKShuffleNetV2-{unit}-{factor}': (dict(type='SKShuffleNetV2', widen_factor=factor, unit=unit), SHUFFLENET)
        for unit, factor in (('sk', 0.5), ('plain', 2.0))
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


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_no_module_has_a_number_of_classes(case):
    """mmpretrain's and mmdet's hooks compare it, in every module that has one, with the data set's."""
    assert not any(hasattr(module, 'num_classes') for module in make_backbone(case=case).modules())
