"""What mmpretrain's own backbone tests ask of each of its classes and, against timm, what only ours can show."""

import copy
import re

import numpy as np
import pytest

pytest.importorskip('mmpretrain')

import torch
from helpers.backbone_cases import CASES, CHANNELS, NARROW, SHUFFLE_PARTS, make_input, make_timm
from helpers.backbones import assert_equal, make_backbone, same_state
from helpers.tolerances import assert_close
from mmpretrain.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sk_plugins import zoo
from sk_plugins.mmpretrain_models import SKNet


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
            ('SKResNeXt', dict(width_per_group=-2.5), 'width_per_group=-2.5 must be a number above 0'),
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
            (dict(num_stages=4, style='pytorch'), "num_stages=4, style='pytorch'"),
            (dict(dcn=dict(type='DCNv2')), "dcn={'type': 'DCNv2'}"),
            (dict(pretrained='torchvision://resnet50'), "pretrained='torchvision://resnet50'"),
        ],
        ids=str,
    )
    def test_unknown_argument(self, case, kwargs, named):
        said = f'{case.cfg["type"]} has no argument {named}: if a _base_ config left it in the backbone, put _delete_'
        with pytest.raises(TypeError, match=re.escape(said)) as caught:
            MODELS.build({**case.cfg, **kwargs})
        assert ('init_cfg' in str(caught.value)) == ('pretrained' in kwargs)

    @pytest.mark.parametrize(
        ('kwargs', 'said'),
        [
            (dict(frozen_stage=1), 'frozen_stage=1; near it is frozen_stages'),
            (dict(norm_evl=True, bogus=1), 'norm_evl=True, bogus=1; near norm_evl are norm_eval, '),
            (dict(kwargs=1), 'kwargs=1'),
        ],
        ids=str,
    )
    def test_misspelt_argument(self, case, kwargs, said):
        with pytest.raises(TypeError) as caught:
            MODELS.build({**case.cfg, **kwargs})
        assert f'{case.cfg["type"]} has no argument {said}' in str(caught.value)
        assert '_delete_' not in str(caught.value)

    def test_misspelt_and_inherited_arguments(self):
        with pytest.raises(TypeError) as caught:
            SKNet(26, dept=3, style='pytorch')
        said = "SKNet has no argument dept=3, style='pytorch'; near dept is depth: if a _base_ config left style in the"
        assert said in str(caught.value)

    def test_argument_of_the_sk_convolution(self):
        with pytest.raises(TypeError, match=r'kernel_size=3; near it are sk_kwargs\.kernel_sizes, down_kernel_size'):
            SKNet(26, kernel_size=3)
        said = r"sk_kwargs=\{'kernel_size': 3\}: SelectiveKernel has no argument kernel_size; near it is kernel_sizes"
        with pytest.raises(TypeError, match=said):
            SKNet(26, sk_kwargs=dict(kernel_size=3))

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
