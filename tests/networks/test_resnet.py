import math

import pytest
import timm
import torch
from timm.layers import BlurPool2d
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sk_plugins.layers import ConvBNAct, SelectiveKernel
from sk_plugins.networks import SKBottleneck, SKResNet

SKNET26, SKNET50, SKNET101 = (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 23, 3)
NARROW = dict(layers=(1, 2, 1, 1), channels=(16, 32, 64, 128), cardinality=8, base_width=16, num_classes=10)


def count_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def randomise_batch_norms(network):
    """Give the norms statistics and scales that training could have left, close enough to 1 for 50 layers."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1, generator=generator)
            module.running_var.uniform_(0.8, 1.2, generator=generator)
            nn.init.uniform_(module.weight, 0.8, 1.2, generator=generator)
            nn.init.normal_(module.bias, std=0.1, generator=generator)


@pytest.fixture(scope='module')
def twins():
    """SKNet-50 and timm's own, with the same weights."""
    torch.manual_seed(0)
    reference = timm.create_model('skresnext50_32x4d').eval()
    randomise_batch_norms(reference)
    for block in reference.modules():
        # An attention of std 0.01 is all but uniform, and would hide a swap of the branches.
        if hasattr(block, 'fc_select'):
            nn.init.normal_(block.fc_select.weight, std=0.3)
    network = SKResNet(SKNET50).eval()
    network.load_state_dict(reference.state_dict(), strict=True)
    return network, reference


@pytest.mark.parametrize(
    ('layers', 'parameters', 'gflops'),
    [(SKNET26, 16_746_408, 2.59), (SKNET50, 27_479_784, 4.46), (SKNET101, 48_736_040, 8.45)],
)
def test_figures(layers, parameters, gflops):
    network = SKResNet(layers, device='meta').eval()
    assert count_parameters(network) == parameters
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(1, 3, 224, 224, device='meta'))
    assert counter.get_total_flops() / 2e9 == pytest.approx(gflops, rel=0.01)


def test_attention_widths_of_the_stages():
    # Eq. 4's floor holds everywhere: 128, 256 and 512 channels all get d = 32, 1024 get 64.
    network = SKResNet(SKNET101, device='meta')
    for stage, (channels, dim) in zip(
        (network.layer1, network.layer2, network.layer3, network.layer4), ((128, 32), (256, 32), (512, 32), (1024, 64))
    ):
        for unit in stage:
            assert unit.conv2.attn.fc_reduce.weight.shape[:2] == (dim, channels)


def test_state_dict_is_timms(twins):
    network, reference = twins
    assert list(network.state_dict()) == list(reference.state_dict())
    assert [name for name, _ in network.named_parameters()] == [name for name, _ in reference.named_parameters()]
    for key, tensor in network.state_dict().items():
        assert tensor.shape == reference.state_dict()[key].shape, key


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_outputs_equal_timms(twins, memory_format):
    network, reference = twins
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(2)).to(memory_format=memory_format)
    output, expected = network(x), reference(x)
    assert expected.std() > 0.01, 'logits too small for an absolute difference to mean much'
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    for feature, expected in zip(network.forward_intermediates(x)[1], reference.forward_intermediates(x)[1]):
        # Features are not of the logits' size.
        assert (feature - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize('output_stride', [8, 16])
@torch.no_grad()
def test_dilated_outputs_equal_timms(twins, output_stride):
    _, reference = twins
    state_dict = reference.state_dict()
    network = SKResNet(SKNET50, output_stride=output_stride).eval()
    network.load_state_dict(state_dict)
    reference = timm.create_model('skresnext50_32x4d', output_stride=output_stride).eval()
    reference.load_state_dict(state_dict)
    x = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(3))
    assert network.forward_features(x).shape[-1] == 96 // output_stride
    torch.testing.assert_close(network(x), reference(x), rtol=0, atol=1e-5)


def test_gradients_equal_timms(twins):
    # In float64: in float32 the batch statistics amplify rounding so far that timm against itself, in another memory
    # format, differs by 5 %.
    network, reference = SKResNet(SKNET50), timm.create_model('skresnext50_32x4d')
    for model in (network, reference):
        model.load_state_dict(twins[1].state_dict())
        model.double().train()
        generator = torch.Generator().manual_seed(4)
        x = torch.randn(4, 3, 64, 64, generator=generator, dtype=torch.float64)
        nn.functional.cross_entropy(model(x), torch.tensor([0, 100, 500, 999])).backward()
    expected = dict(reference.named_parameters())
    for name, parameter in network.named_parameters():
        difference = (parameter.grad - expected[name].grad).norm()
        assert expected[name].grad.norm() > 0, name
        assert difference < 1e-4 * expected[name].grad.norm(), name
    for (name, buffer), expected_buffer in zip(network.named_buffers(), reference.buffers()):
        torch.testing.assert_close(buffer, expected_buffer, rtol=1e-4, atol=1e-6, msg=name)


def test_initialisation():
    torch.manual_seed(0)
    network = SKResNet(SKNET26)
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            out_channels, _, *kernel = module.weight.shape
            attention = '.attn.' in name
            std = 0.01 if attention else math.sqrt(2 / (out_channels * math.prod(kernel)))
            # Four standard errors of an estimate of std from that many values, and a little.
            tolerance = max(4 / math.sqrt(2 * module.weight.numel()), 0.02)
            assert module.weight.std().item() == pytest.approx(std, rel=tolerance), name
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
    assert network.fc.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert (network.fc.bias == 0).all()


def test_init_weights_again():
    network = SKResNet(**NARROW)
    for parameter in network.parameters():
        nn.init.constant_(parameter, 7)
    network.init_weights(zero_init_last=True)
    assert network.fc.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert all((m.conv3.bn.weight == 0).all() for m in network.modules() if isinstance(m, SKBottleneck))


def test_zero_init_last():
    torch.manual_seed(0)
    network = SKResNet(**NARROW, zero_init_last=True)
    units = [module for module in network.modules() if isinstance(module, SKBottleneck)]
    assert len(units) == 5
    assert all((unit.conv3.bn.weight == 0).all() for unit in units)
    plain = network.layer2[1].eval()
    assert plain.downsample is None
    x = torch.rand(2, 128, 6, 6)
    assert torch.equal(plain(x.clone()), x), 'a unit that is zero does not start as its shortcut'
    assert not any((unit.conv3.bn.weight == 0).any() for unit in SKResNet(**NARROW).modules() if hasattr(unit, 'conv3'))


@pytest.mark.parametrize(
    ('output_stride', 'reductions'), [(32, [1, 1, 2, 4, 8]), (16, [1, 1, 2, 4, 4]), (8, [1, 1, 2, 2, 2])]
)
@torch.no_grad()
def test_small_stem(output_stride, reductions):
    network = SKResNet(**NARROW, small_stem=True, in_chans=1, output_stride=output_stride).eval()
    assert network.conv1.weight.shape == (64, 1, 3, 3)
    assert network.conv1.stride == (1, 1)
    assert isinstance(network.maxpool, nn.Identity)
    assert [info['reduction'] for info in network.feature_info] == reductions
    features = network.forward_intermediates(torch.randn(2, 1, 32, 32))[1]
    assert [feature.shape[-1] for feature in features] == [32 // reduction for reduction in reductions]
    assert [feature.shape[1] for feature in features] == [info['num_chs'] for info in network.feature_info]
    assert network(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_small_stem_keeps_device_dtype_and_initialisation():
    conv = SKResNet(**NARROW, small_stem=True, dtype=torch.float64).conv1
    assert conv.weight.dtype == torch.float64
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.1)
    assert SKResNet(**NARROW, small_stem=True, device='meta').conv1.weight.is_meta


@pytest.mark.parametrize(
    ('output_stride', 'reductions'), [(32, [2, 4, 8, 16, 32]), (16, [2, 4, 8, 16, 16]), (8, [2, 4, 8, 8, 8])]
)
@torch.no_grad()
def test_feature_info(output_stride, reductions):
    network = SKResNet(**NARROW, output_stride=output_stride).eval()
    assert [info['reduction'] for info in network.feature_info] == reductions
    features = network.forward_intermediates(torch.randn(1, 3, 64, 64))[1]
    assert [feature.shape[-1] for feature in features] == [64 // reduction for reduction in reductions]
    assert [feature.shape[1] for feature in features] == [64, 64, 128, 256, 512]


def test_sk_kwargs_reach_every_unit():
    sk_kwargs = dict(kernel_sizes=(3, 7), select='shared', reduction=4, min_dim=8, groups=4)
    network = SKResNet(**NARROW, block_args=dict(sk_kwargs=sk_kwargs))
    layers = [module for module in network.modules() if isinstance(module, SelectiveKernel)]
    assert len(layers) == 5
    for layer in layers:
        assert [path.conv.dilation for path in layer.paths] == [(1, 1), (3, 3)]
        assert [path.conv.groups for path in layer.paths] == [4, 4]
        assert layer.attn.fc_select.out_channels == 2
        assert layer.attn.fc_reduce.out_channels == max(layer.out_channels // 4, 8)


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(stem_type='deep', stem_width=32, avg_down=True),
        dict(replace_stem_pool=True),
        dict(aa_layer=BlurPool2d),
        dict(drop_block_rate=0.1),
        dict(block_reduce_first=2),
        dict(down_kernel_size=3),
        dict(block_args=dict(attn_layer='se')),
        dict(global_pool='catavgmax'),
    ],
    ids=str,
)
def test_options_of_timms_resnet(kwargs):
    network = SKResNet(**NARROW, **kwargs)
    output = network(torch.randn(2, 3, 64, 64))
    assert output.shape == (2, 10)
    output.square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in network.parameters())


@pytest.mark.parametrize(
    ('kwargs', 'match'),
    [
        (dict(layers=(3, 4, 6)), r'layers=\(3, 4, 6\) .*four'),
        (dict(layers=(3, 0, 6, 3)), r'layers=\(3, 0, 6, 3\) .*at least 1'),
        (dict(layers=(3, 4, 6.0, 3)), r'layers=\(3, 4, 6\.0, 3\) '),
        (dict(channels=(16, 32)), r'channels=\(16, 32\) .*four'),
        (dict(channels=(16, 32, 64, -128)), r'channels=\(16, 32, 64, -128\) '),
        (dict(output_stride=4), 'output_stride=4 .*8, 16 or 32'),
        (dict(output_stride=64), 'output_stride=64 .*8, 16 or 32'),
        (dict(in_chans=0), 'in_chans=0 .*at least 1'),
        (dict(in_chans=3.0), r'in_chans=3\.0 '),
        (dict(num_classes=-1), 'num_classes=-1 .*at least 0'),
        (dict(num_classes='10'), "num_classes='10' "),
        (dict(drop_rate=1.5), r'drop_rate=1\.5 '),
        (dict(drop_rate=-0.1), r'drop_rate=-0\.1 '),
        (dict(drop_path_rate=1.5), r'drop_path_rate=1\.5 '),
        (dict(drop_block_rate=-1), 'drop_block_rate=-1 '),
        (dict(base_width=0), r'base_width=0 .*at least 4'),
        (dict(base_width=3), r'base_width=3 .*at least 4'),
        (dict(cardinality=0), 'cardinality=0 '),
        (dict(cardinality=-8), 'cardinality=-8 '),
        (dict(small_stem=True, stem_type='deep'), r'small_stem=True .*stem_type'),
        (dict(block_args=dict(sk_kwargs=dict(select='best'))), "select='best' "),
        (dict(block_args=dict(sk_kwargs=dict(groups=5))), 'groups=5 '),
    ],
    ids=str,
)
def test_value_errors(kwargs, match):
    with pytest.raises(ValueError, match=match):
        SKResNet(**{**NARROW, **kwargs})


def test_modules_are_plain():
    # What swaps or folds BatchNorms matches exact classes; a subclass with an activation inside would lose it.
    network = SKResNet(**NARROW)
    allowed = {nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Identity, nn.MaxPool2d, nn.Linear}
    kinds = {type(module) for module in network.modules() if not list(module.children())}
    assert kinds - allowed <= {nn.AdaptiveAvgPool2d, nn.Flatten, type(network.global_pool)}
    assert any(isinstance(module, ConvBNAct) for module in network.modules())


@pytest.mark.parametrize(
    'convert',
    [
        nn.SyncBatchNorm.convert_sync_batchnorm,
        timm.layers.convert_sync_batchnorm,
        timm.layers.freeze_batch_norm_2d,
    ],
)
@torch.no_grad()
def test_converters_leave_outputs_unchanged(convert):
    torch.manual_seed(0)
    network = SKResNet(**NARROW).eval()
    randomise_batch_norms(network)
    x = torch.randn(2, 3, 64, 64)
    expected = network(x)
    converted = convert(network).eval()
    assert not any(type(module) is nn.BatchNorm2d for module in converted.modules())
    torch.testing.assert_close(converted(x), expected, rtol=0, atol=1e-5)
