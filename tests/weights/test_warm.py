"""SK networks from a ResNet's weights: whose names are read, what is equal, and what is refused."""

import pytest
import timm
import torch
import torchvision
from helpers.randomised import randomise
from helpers.tolerances import assert_close
from safetensors.torch import save, save_file
from torch import nn

import sk_plugins
from sk_plugins.layers import SelectiveKernel
from sk_plugins.networks import SKResNet, SKResNetSimCLR
from sk_plugins.weights import CheckpointError, HubError, from_resnet, to_mmpretrain, warm_start

LAYERS = (1, 2, 1, 1)
# The same narrow networks at timm's door and at ours.
NARROW = dict(layers=LAYERS, channels=(16, 32, 64, 128), cardinality=8, base_width=16, num_classes=7)
TRUE = dict(sk_kwargs=dict(dilated=False))


def make(name='resnext50_32x4d', **kwargs):
    """timm's, narrow, in float64."""
    torch.manual_seed(0)
    args = dict(layers=LAYERS, channels=(16, 32, 64, 128), num_classes=7) | kwargs
    return randomise(timm.create_model(name, **args)).double()


def images(channels=3, size=64):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def shake(model):
    """Attention that is far from even, as no selection among equal maps minds."""
    for layer in model.modules():
        if isinstance(layer, SelectiveKernel):
            nn.init.normal_(layer.attn.fc_select.weight)
    return model.double().eval()


def assert_equal_outputs(model, source, x=None):
    x = images() if x is None else x
    expected = source(x)
    assert expected.std() > 1e-2
    assert_close(shake(model)(x), expected, length=model)


NETWORKS = {
    'ResNeXt': (make, dict(cardinality=32, base_width=4)),
    'ResNet': (lambda: make('resnet50'), dict(cardinality=1, base_width=64)),
    'wide ResNet': (lambda: make('wide_resnet50_2'), dict(cardinality=1, base_width=128)),
    'basic': (lambda: make('resnet18'), dict(block='basic')),
    'D': (lambda: make('resnet50d'), dict(stem_type='deep', stem_width=32, avg_down=True)),
    'T': (lambda: make('resnet26t'), dict(stem_type='deep_tiered', stem_width=32, avg_down=True)),
    'SE-ResNeXt': (lambda: make('seresnext50_32x4d'), {}),
    'grey images': (lambda: make(in_chans=1), dict(in_chans=1)),
    'no classifier': (lambda: make(num_classes=0), dict(num_classes=0)),
    'small images': (lambda: make_for_small_images(), dict(small_stem=True, layers=(1, 1, 1))),
}


def make_for_small_images():
    torch.manual_seed(0)
    kwargs = dict(layers=(1, 1, 1), channels=(16, 32, 64), cardinality=8, base_width=16)
    return randomise(timm.create_model('resnext29_16x32d', **kwargs)).double()


def arguments_of(model):
    """What the network says that it was built with, as far as it does."""
    unit = model.layer1[0]
    basic = not hasattr(unit, 'conv3')
    return dict(
        layers=tuple(len(stage) for stage in (model.layer1, model.layer2, model.layer3, model.layer4) if len(stage)),
        block='basic' if basic else 'bottleneck',
        cardinality=getattr(unit, unit.sk_name).paths[0].conv.groups,
        in_chans=next(module for module in model.modules() if isinstance(module, nn.Conv2d)).in_channels,
        num_classes=model.num_classes,
    )


@pytest.mark.parametrize(('make_source', 'arguments'), NETWORKS.values(), ids=NETWORKS.keys())
def test_outputs_are_equal(make_source, arguments):
    source = make_source()
    channels = arguments.get('in_chans', 3)
    model = from_resnet(source)
    assert type(model) is SKResNet
    assert model.training
    found = arguments_of(model)
    assert found == {**found, **{name: value for name, value in arguments.items() if name in found}}
    assert all(
        path.conv.dilation == (1, 1) for m in model.modules() if isinstance(m, SelectiveKernel) for path in m.paths
    )
    assert_equal_outputs(model, source, images(channels))


@pytest.mark.parametrize('kernel_sizes', [(3, 5, 7), (5, 3), (3, 3)], ids=str)
@pytest.mark.parametrize('norm_position', ['branch', 'output'])
def test_other_kernels(kernel_sizes, norm_position):
    source = make()
    model = from_resnet(source, sk_kwargs=dict(kernel_sizes=kernel_sizes, norm_position=norm_position))
    assert_equal_outputs(model, source)


@pytest.mark.parametrize('kernel_sizes', [(1, 3), (3, 1), (1, 5)], ids=str)
def test_kernels_of_one_pixel(kernel_sizes):
    """They have the sum of the taps, whether the source is a model or its weights; the rest is as it was."""
    source = make().float()
    for given in (source, source.state_dict()):
        model = from_resnet(given, sk_kwargs=dict(kernel_sizes=kernel_sizes))
        layer, weight = model.layer2[0].conv2, source.layer2[0].conv2.weight
        assert_close(layer.paths[kernel_sizes.index(1)].conv.weight, weight.sum((2, 3), keepdim=True), length=9)


@pytest.mark.parametrize('planes', [22, 21, 49])
@pytest.mark.parametrize('width', [15, 7])
def test_widths_that_no_division_gives(planes, width):
    args = dict(channels=(planes, 2 * planes, 32, 64), cardinality=4)
    source = make(base_width=64 * (width + 0.01) / planes, **args)
    assert source.layer1[0].conv2.weight.shape[:2] == (4 * width, width)
    assert_equal_outputs(from_resnet(source), source)


def test_outputs_of_training_are_equal():
    """The branches' norms see the same batch."""
    source = make()
    model = from_resnet(source).double()
    assert_close(model.train()(images()), source.train()(images()), length=model)
    assert_close(model.layer1[0].conv2.paths[1].bn.running_mean, source.layer1[0].bn2.running_mean, length=9 * 16)


def test_training_tells_the_branches_apart():
    model = from_resnet(make()).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        model(images()).square().mean().backward()
        select = model.layer2[0].conv2.attn.fc_select.weight.grad
        assert bool(select.abs().max() > 1e-12) == (step > 0)
        optimizer.step()
    small, large = (path.conv.weight for path in model.layer2[0].conv2.paths)
    assert large[:, :, 0].any()
    assert small.shape[2:] == (3, 3)


def test_kernels_of_one_size_part_too():
    """By their shares of the attention, which starts from random weights."""
    model = sk_plugins.from_resnet(make('resnet18').state_dict(), sk_kwargs=dict(kernel_sizes=(3, 3))).double()
    one, other = (path.conv.weight for path in model.layer2[0].conv1.paths)
    assert torch.equal(one, other)
    model(images()).square().mean().backward()
    assert 0 < (one.grad - other.grad).abs().max() < 0.1 * one.grad.abs().max()


def torchvisions():
    torch.manual_seed(0)
    return randomise(torchvision.models.resnet18(num_classes=7)).double()


def test_torchvisions():
    source = torchvisions()
    assert_equal_outputs(from_resnet(source), source)
    assert_equal_outputs(from_resnet(source.state_dict()), source)


MMPRETRAINS = {
    'ResNeXt': dict(type='ResNeXt', depth=50, groups=32, width_per_group=4, base_channels=16),
    'ResNet-18': dict(type='ResNet', depth=18, base_channels=16),
    'ResNetV1d': dict(type='ResNetV1d', depth=50, base_channels=16),
    'SEResNeXt': dict(type='SEResNeXt', depth=50, groups=32, width_per_group=4, base_channels=16),
}


@pytest.mark.parametrize('backbone', MMPRETRAINS.values(), ids=MMPRETRAINS.keys())
@pytest.mark.parametrize('as_model', [True, False])
def test_mmpretrains(backbone, as_model):
    registry = pytest.importorskip('mmpretrain').registry
    from mmengine.registry import DefaultScope

    torch.manual_seed(0)
    channels = 128 if backbone['depth'] == 18 else 512
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        source = registry.MODELS.build(
            dict(
                type='ImageClassifier',
                backbone=backbone,
                neck=dict(type='GlobalAveragePooling'),
                head=dict(type='LinearClsHead', num_classes=7, in_channels=channels, topk=(1,)),
            )
        )
    source = randomise(source).double()
    model = from_resnet(source if as_model else {'state_dict': source.state_dict(), 'meta': {}})
    assert_equal_outputs(model, source)


def test_into_a_registered_model():
    source = make(cardinality=8, base_width=16)
    model = timm.create_model('sknet50', **NARROW, **TRUE)
    report = warm_start(model, source.state_dict())
    assert_equal_outputs(model, source)
    assert len(report.loaded) + len(report.initialised) == sum(
        not name.endswith('num_batches_tracked') for name in model.state_dict()
    )
    assert report.initialised
    assert all('.attn.' in name for name in report.initialised)
    assert report.unused == ()


def test_another_classifier():
    source = make()
    model = from_resnet(source, num_classes=3)
    assert model.fc.out_features == 3
    report = warm_start(model, source)
    assert report.unused == ('fc.weight', 'fc.bias')
    assert {'fc.weight', 'fc.bias'} <= set(report.initialised)
    assert_close(shake(model).forward_features(images()), source.forward_features(images()), length=model)


def test_into_a_backbone_of_openmmlabs():
    pytest.importorskip('mmpretrain')
    from mmpretrain.registry import MODELS

    import sk_plugins.mmpretrain_models  # noqa: F401

    source = make(cardinality=8, base_width=16)
    args = {name: value for name, value in NARROW.items() if name != 'num_classes'}
    model = MODELS.build(dict(type='SKNet', depth=50, out_indices=(0, 1, 2, 3), **args, **TRUE))
    assert warm_start(model, source).unused == ('fc.weight', 'fc.bias')
    expected = source.forward_intermediates(images(), indices=[1, 2, 3, 4], intermediates_only=True)
    assert_close(shake(model)(images()), expected, length=model)


class TestSources:
    @pytest.fixture
    def source(self):
        return make()

    def test_files(self, source, tmp_path):
        torch.save({'state_dict': {f'module.{k}': v for k, v in source.state_dict().items()}}, tmp_path / 'x.pth')
        save_file(source.state_dict(), tmp_path / 'x.safetensors')
        for path in (tmp_path / 'x.pth', str(tmp_path / 'x.safetensors')):
            assert_equal_outputs(from_resnet(path), source)
        with pytest.raises(FileNotFoundError, match=r'none\.pth: no such checkpoint file'):
            from_resnet(tmp_path / 'none.pth')

    def test_hub(self, source, hub):
        hub.add('me/resnext', {'model.safetensors': save(source.state_dict())})
        assert_equal_outputs(from_resnet('hf-hub:me/resnext'), source)

    def test_timms_name(self, hub):
        """With the weights that timm names."""
        torch.manual_seed(0)
        source = randomise(timm.create_model('resnet18'))
        hub.add('timm/resnet18.a1_in1k', {'model.safetensors': save(source.state_dict())})
        assert_equal_outputs(from_resnet('resnet18.a1_in1k'), source.double())

    def test_names_that_are_none(self):
        with pytest.raises(FileNotFoundError, match=r'resnxt50_32x4d: no such checkpoint file, .* resnext50_32x4d'):
            from_resnet('resnxt50_32x4d')
        with pytest.raises(
            ValueError, match=r"source='resnet18\.no' names no weights of timm; those of resnet18: .*a1_in1k"
        ):
            from_resnet('resnet18.no')
        with pytest.raises(ValueError, match=r"source='resnext29_16x32d' names no weights .*: none"):
            from_resnet('resnext29_16x32d')

    def test_timms_name_offline(self, hub, monkeypatch):
        monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
        with pytest.raises(HubError, match=r'timm/resnet18\.a1_in1k: model\.safetensors is not in the local cache'):
            from_resnet('resnet18.a1_in1k')


def interpolated(**kwargs):
    return from_resnet(make(), sk_kwargs=dict(dilated=True, **kwargs)).double().eval()


def test_dilated_kernels_move_the_outputs_least_as_they_are_made():
    """Closer than the same kernel dilated, on a smooth image."""
    source = make()
    x = nn.functional.interpolate(images(size=4), size=64, mode='bicubic')
    expected = source.forward_features(x)
    model = interpolated()
    moved = (model.forward_features(x) - expected).std()
    for layer in model.modules():
        if isinstance(layer, SelectiveKernel):
            layer.paths[1].conv.weight.data.copy_(layer.paths[0].conv.weight)
    assert 0 < moved < (model.forward_features(x) - expected).std()


class TestErrors:
    def test_other_shapes(self):
        model = timm.create_model('sknet50', **NARROW, **TRUE)
        with pytest.raises(
            CheckpointError,
            match=r'the state dict: its weights do not fit the ResNet of this network.s shape: '
            r'layer1\.0\.conv2\.paths\.0\.conv\.weight is \(32, 1, 3, 3\), not \(32, 4, 3, 3\)',
        ):
            warm_start(model, make().state_dict())
        with pytest.raises(CheckpointError, match=r'layer2\.2\.conv1\.weight is not part of it'):
            warm_start(model, make(cardinality=8, base_width=16, layers=(1, 3, 1, 1)))
        with pytest.raises(CheckpointError, match=r'layer2\.1\.conv1\.conv\.weight is missing'):
            warm_start(model, make(cardinality=8, base_width=16, layers=(1, 1, 1, 1)))

    @pytest.mark.parametrize(
        ('name', 'message'),
        [
            ('ecaresnet50d', r"do not fit the ResNet of this network's shape: layer1\.0\.se\.conv\.weight is not part"),
            ('skresnet18', r"own weights, no ResNet's \(layer1\.0\.conv1\.paths\.0\.conv\.weight\)"),
            ('mobilenetv3_small_100', r"no ResNet's weights: layer1\.0\.conv2\.weight is missing"),
        ],
    )
    def test_other_networks(self, name, message):
        with pytest.raises(CheckpointError, match=message):
            from_resnet(make(name) if name == 'ecaresnet50d' else timm.create_model(name))

    @pytest.mark.parametrize(
        ('name', 'kwargs', 'message'),
        [
            ('resnetblur50', {}, r'the ResNet: .* is a BlurPool2d, which a plain ResNet does not have'),
            ('resnet50', dict(act_layer='silu'), 'is a SiLU, which a plain ResNet does not have'),
            ('resnet50', dict(global_pool='max'), "a global pooling of 'max' makes its features, .* global_pool='max'"),
            (
                'resnet50',
                dict(output_stride=16),
                r'layer4\.0\.conv2 has stride=\(1, 1\), and this network has \(2, 2\)',
            ),
        ],
    )
    def test_what_weights_do_not_tell(self, name, kwargs, message):
        with pytest.raises(CheckpointError, match=message):
            from_resnet(make(name, **kwargs))

    @pytest.mark.parametrize(
        ('place', 'layer', 'message'),
        [
            ('act1', nn.SiLU(), 'the ResNet: act1 is a SiLU, which a plain ResNet does not have'),
            ('maxpool', nn.MaxPool2d(3, 2, 0, ceil_mode=True), r'maxpool has padding=0, and .* \(1, 1\) there'),
            ('maxpool', nn.Identity(), 'maxpool is a Identity, and this network has a MaxPool2d there'),
            ('layer2.0.downsample.0', nn.AvgPool2d(3, 2, 1), r'downsample\.0 has kernel_size=3, .* \(2, 2\) there'),
            ('layer2.0.downsample.0', nn.AvgPool2d(2, 2), 'downsample.0 has ceil_mode=False, .* True there'),
        ],
        ids=str,
    )
    def test_layers_without_weights(self, place, layer, message):
        source = make('resnet50d')
        source.set_submodule(place, layer)
        with pytest.raises(CheckpointError, match=message):
            from_resnet(source)

    @pytest.mark.parametrize(
        'convert', [nn.SyncBatchNorm.convert_sync_batchnorm, timm.utils.model.freeze_batch_norm_2d]
    )
    def test_norms_of_other_classes(self, convert):
        source = convert(make('resnet50d'))
        assert_equal_outputs(from_resnet(source), make('resnet50d'))
        source.layer3[0].bn2.eps = 0.1
        with pytest.raises(CheckpointError, match=r'layer3\.0\.bn2 has eps=0\.1, and this network has 1e-05 there'):
            from_resnet(source)

    def test_a_pooling_that_is_given(self):
        source = make(global_pool='max')
        assert_equal_outputs(from_resnet(source, global_pool='max'), source)
        assert from_resnet(source, num_classes=3).global_pool.pool_type == 'avg'

    def test_simclrs_pooling(self):
        """Its stem, shortcuts and units have ResNet-50-D's shapes."""
        model = SKResNetSimCLR(LAYERS, channels=(16, 32, 64, 128))
        for source in (make('resnet50d'), make('resnet50d').state_dict()):
            with pytest.raises(TypeError, match='model is a SKResNetSimCLR, which pads and pools as TensorFlow'):
                warm_start(model, source)

    def test_output_stride_can_be_given(self):
        source = make(output_stride=8)
        assert_equal_outputs(from_resnet(source, output_stride=8), source)

    def test_units_without_an_equal(self):
        weights = make('resnet18').state_dict()
        model = timm.create_model('skresnet18')
        for kwargs in (dict(split_input=True), dict(select='sum')):
            with pytest.raises(ValueError, match='to which no 3x3 convolution is equal: build the network with'):
                from_resnet(weights, sk_kwargs=kwargs)
        with pytest.raises(TypeError, match='model must be an SKResNet, not ResNet'):
            warm_start(model, weights)
        with pytest.raises(ValueError, match=r'layer1\.0 is a Bottleneck: a warm start is for SK units'):
            warm_start(SKResNet(**NARROW, unit='plain'), make())

    def test_sources_of_other_kinds(self):
        with pytest.raises(TypeError, match=r'source=5 must be a name of timm, a file, an address, .*, not int'):
            from_resnet(5)

    @pytest.mark.parametrize(
        ('change', 'fault'),
        [(torch.Tensor.long, 'of torch.int64'), (torch.Tensor.to_sparse, 'sparse, quantised or nested')],
    )
    def test_tensors_that_are_no_weights(self, change, fault):
        weights = make().state_dict()
        weights['layer2.0.conv2.weight'] = change(weights['layer2.0.conv2.weight'])
        with pytest.raises(CheckpointError, match=rf'layer2\.0\.conv2\.(paths\.0\.conv\.)?weight is {fault}'):
            from_resnet(weights)

    def test_the_model_is_as_it_was(self):
        model = timm.create_model('sknet50', **NARROW, **TRUE)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        weights = make(cardinality=8, base_width=16).state_dict()
        weights['layer4.0.bn3.weight'] = torch.ones(3)
        with pytest.raises(CheckpointError):
            warm_start(model, weights)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class TestInitCfg:
    """Of OpenMMLab."""

    @pytest.fixture
    def build(self):
        pytest.importorskip('mmpretrain')
        from mmengine.registry import DefaultScope
        from mmpretrain.registry import MODELS

        import sk_plugins.mmpretrain_models  # noqa: F401

        args = {name: value for name, value in NARROW.items() if name != 'num_classes'}

        def build(checkpoint, head=True, num_classes=7, **backbone):
            warm = dict(type='WarmStart', checkpoint=str(checkpoint))
            cfg = dict(
                type='ImageClassifier',
                backbone=dict(type='SKNet', depth=50, init_cfg=warm, **{**args, **TRUE, **backbone}),
                neck=dict(type='GlobalAveragePooling'),
                head=dict(type='LinearClsHead', num_classes=num_classes, in_channels=512, topk=(1,)),
            )
            if head:
                cfg['head']['init_cfg'] = warm
            with DefaultScope.overwrite_default_scope('mmpretrain'):
                model = MODELS.build(cfg)
                model.init_weights()
            return model

        return build

    @pytest.mark.parametrize('names', [dict, to_mmpretrain], ids=['timm', 'mmpretrain'])
    def test_classifier(self, build, tmp_path, names):
        source = make(cardinality=8, base_width=16)
        torch.save(dict(state_dict=names(source.state_dict())), tmp_path / 'x.pth')
        assert_equal_outputs(build(tmp_path / 'x.pth'), source)

    def test_errors_name_the_checkpoint(self, build, tmp_path):
        path = tmp_path / 'x.pth'
        torch.save(make(cardinality=8, base_width=16).state_dict(), path)
        with pytest.raises(CheckpointError, match=r'x\.pth: its classifier has the shapes .*\(7, 512\).* \(3, 512\)'):
            build(path, num_classes=3)
        assert build(path, head=False, num_classes=3).head.fc.out_features == 3
        with pytest.raises(CheckpointError, match=r'x\.pth: its weights do not fit the ResNet of this network'):
            build(path, cardinality=4)
