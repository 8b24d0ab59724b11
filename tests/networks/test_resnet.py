import math

import pytest
import timm
import torch
from helpers.randomised import randomise
from helpers.tolerances import assert_close
from timm.layers import BlurPool2d
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sk_plugins.layers import ConvBNAct, SelectiveKernel
from sk_plugins.networks import SKBasicBlock, SKBottleneck, SKResNet

SKNET26, SKNET50, SKNET101 = (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 23, 3)
NARROW = dict(layers=(1, 2, 1, 1), channels=(16, 32, 64, 128), cardinality=8, base_width=16, num_classes=10)
BASIC = dict(NARROW, block='basic', cardinality=1, base_width=64)
THREE = dict(layers=(1, 2, 1), channels=(16, 32, 64), cardinality=8, base_width=16, num_classes=10)
KINDS = {
    'sk': NARROW,
    'plain': dict(NARROW, unit='plain'),
    'se': dict(NARROW, unit='se'),
    'basic-sk': BASIC,
    'basic-sk-split': dict(BASIC, sk_kwargs=dict(split_input=True)),
    'basic-plain': dict(BASIC, unit='plain'),
    'basic-se': dict(BASIC, unit='se'),
    'three': dict(THREE, small_stem=True),
    'three-se': dict(THREE, unit='se'),
}
each_kind = pytest.mark.parametrize('kwargs', KINDS.values(), ids=KINDS.keys())


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


def count_gflops(network, size=224):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.empty(1, 3, size, size, device='meta'))
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize(
    ('layers', 'parameters', 'gflops'),
    [(SKNET26, 16_746_408, 2.59), (SKNET50, 27_479_784, 4.46), (SKNET101, 48_736_040, 8.45)],
)
def test_figures(layers, parameters, gflops):
    network = SKResNet(layers, device='meta')
    assert count_parameters(network) == parameters
    assert count_gflops(network) == pytest.approx(gflops, rel=0.01)


def test_figures_of_resnext_and_senet():
    network = SKResNet(SKNET50, unit='plain', device='meta')
    assert count_parameters(network) == 25_028_904
    assert count_gflops(network) == pytest.approx(4.23, rel=0.01)
    assert count_parameters(SKResNet(SKNET50, unit='se', device='meta')) == 27_559_896


TABLE_6 = {  # of the second branch, whose first is 3x3 with 32 groups: parameters to the printed digits
    'K3 D3 G32': ((3, 3, 32), '27.48'),
    'K3 D2 G32': ((3, 2, 32), '27.48'),
    'K3 D1 G32': ((3, 1, 32), '27.48'),
    'K5 D1 G64': ((5, 1, 64), '28.03'),
    'K7 D1 G128': ((7, 1, 128), '27.99'),
}


@pytest.mark.parametrize(('branch', 'millions'), TABLE_6.values(), ids=TABLE_6.keys())
def test_parameters_of_table_6(branch, millions):
    network = SKResNet(SKNET50, sk_kwargs=dict(branches=[(3, 1, 32), branch]), device='meta')
    assert f'{count_parameters(network) / 1e6:.2f}' == millions
    for layer in network.modules():
        if isinstance(layer, SelectiveKernel):
            convs = [path.conv for path in layer.paths]
            assert [(c.kernel_size[0], c.dilation[0], c.groups) for c in convs] == [(3, 1, 32), branch]


@pytest.mark.parametrize('kernel_sizes', [(3, 5), (3, 7), (5, 7), (3, 5, 7)], ids=str)
def test_figures_of_table_7(kernel_sizes):
    parameters = {
        select: count_parameters(
            SKResNet(SKNET50, sk_kwargs=dict(kernel_sizes=kernel_sizes, select=select), device='meta')
        )
        for select in ('sum', 'channel')
    }
    # 5x5 and 7x7 are dilated 3x3s, so that only the number of branches counts.
    if len(kernel_sizes) == 2:
        assert parameters == {'sum': 26_458_664, 'channel': 27_479_784}
    else:
        # The third branch adds what the second adds to ResNeXt-50.
        assert parameters == {'sum': 26_458_664 + (26_458_664 - 25_028_904), 'channel': 29_249_512}
        network = SKResNet(SKNET50, sk_kwargs=dict(kernel_sizes=kernel_sizes), device='meta')
        assert count_gflops(network) == pytest.approx(4.69, rel=0.01)


@pytest.mark.parametrize('kernel_size', [3, 5, 7])
def test_one_kernel_of_table_7_is_resnext(kernel_size):
    network = SKResNet(SKNET50, sk_kwargs=dict(kernel_sizes=(kernel_size,), select='sum'), device='meta')
    assert count_parameters(network) == 25_028_904


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
    shapes = {key: tensor.shape for key, tensor in reference.state_dict().items()}
    for key, tensor in network.state_dict().items():
        assert tensor.shape == shapes[key], key


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_outputs_equal_timms(twins, memory_format):
    network, reference = twins
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(2)).to(memory_format=memory_format)
    output, expected = network(x), reference(x)
    assert expected.std() > 0.01, 'logits too small for an absolute difference to mean much'
    assert_close(output, expected, length=network)
    for feature, expected in zip(network.forward_intermediates(x)[1], reference.forward_intermediates(x)[1]):
        assert_close(feature, expected, length=network)


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
    assert_close(network(x), reference(x), length=network)


@pytest.mark.slow
def test_gradients_equal_timms(twins):
    # In float64: the batch statistics amplify rounding so far that in float32 timm against itself, in another memory
    # format, differs by 5 %, a million times the epsilon.
    network, reference = SKResNet(SKNET50), timm.create_model('skresnext50_32x4d')
    for model in (network, reference):
        model.load_state_dict(twins[1].state_dict())
        model.double().train()
        generator = torch.Generator().manual_seed(4)
        x = torch.randn(4, 3, 64, 64, generator=generator, dtype=torch.float64)
        nn.functional.cross_entropy(model(x), torch.tensor([0, 100, 500, 999])).backward()
    expected = dict(reference.named_parameters())
    for name, parameter in network.named_parameters():
        assert expected[name].grad.norm() > 0, name
        assert_close(parameter.grad, expected[name].grad, length=network, gain=1e6, msg=name)
    for (name, buffer), expected_buffer in zip(network.named_buffers(), reference.buffers()):
        assert_close(buffer, expected_buffer, length=network, gain=1e6, msg=name)


@pytest.mark.parametrize(
    ('kwargs', 'name'),
    [
        (dict(layers=SKNET50, unit='plain'), 'resnext50_32x4d'),
        (dict(layers=SKNET50, unit='se'), 'seresnext50_32x4d'),
        (dict(layers=(2, 2, 2, 2), unit='plain', block='basic', cardinality=1, base_width=64), 'resnet18'),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
@torch.no_grad()
def test_what_sk_is_compared_with_is_timms(kwargs, name):
    network = randomise(SKResNet(**kwargs))
    reference = timm.create_model(name, device='meta').to_empty(device='cpu').eval()
    reference.load_state_dict(network.state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    output = network(x)
    assert output.std() > 0.01
    assert_close(output, reference(x), length=network)


def test_se_stands_in_every_unit():
    network = SKResNet(**NARROW, unit='se')
    units = [unit for stage in (network.layer1, network.layer2, network.layer3, network.layer4) for unit in stage]
    assert len(units) == 5
    for unit in units:
        channels = unit.conv3.out_channels
        assert unit.se.fc1.weight.shape[:2] == (max(channels // 16, 8), channels)


@pytest.mark.parametrize('split_input', [True, False])
@torch.no_grad()
def test_basic_block_as_written(split_input):
    """The unit against its definition: SK convolution of groups 1, 3x3, the shortcut, ReLU."""
    sk_kwargs = dict(split_input=split_input, reduction=8, min_dim=16)
    downsample = nn.Sequential(nn.Conv2d(8, 12, 1, stride=2, bias=False), nn.BatchNorm2d(12))
    unit = randomise(SKBasicBlock(8, 12, stride=2, downsample=downsample, sk_kwargs=sk_kwargs))
    state = unit.state_dict()
    x = torch.randn(3, 8, 9, 9, generator=torch.Generator().manual_seed(6))

    def norm(y, name):
        mean, var, weight, bias = (
            state[f'{name}.{key}'].view(-1, 1, 1) for key in ('running_mean', 'running_var', 'weight', 'bias')
        )
        return (y - mean) / (var + 1e-5).sqrt() * weight + bias

    inputs = (x[:, :4], x[:, 4:]) if split_input else (x, x)
    branches = []
    for m, branch_input in enumerate(inputs):
        weight = state[f'conv1.paths.{m}.conv.weight']
        assert weight.shape == (12, 4 if split_input else 8, 3, 3)
        y = nn.functional.conv2d(branch_input, weight, stride=2, padding=m + 1, dilation=m + 1)
        branches.append(norm(y, f'conv1.paths.{m}.bn').relu())
    s = (branches[0] + branches[1]).mean((2, 3), keepdim=True)
    z = norm(nn.functional.conv2d(s, state['conv1.attn.fc_reduce.weight']), 'conv1.attn.bn').relu()
    assert z.shape[1] == 16
    attention = nn.functional.conv2d(z, state['conv1.attn.fc_select.weight']).view(3, 2, 12, 1, 1).softmax(1)
    y = attention[:, 0] * branches[0] + attention[:, 1] * branches[1]
    y = norm(nn.functional.conv2d(y, state['conv2.conv.weight'], padding=1), 'conv2.bn')
    shortcut = norm(nn.functional.conv2d(x, state['downsample.0.weight'], stride=2), 'downsample.1')
    assert_close(unit(x), (y + shortcut).relu(), length=unit)


def test_a_block_class_of_ones_own():
    class Own(SKBottleneck):
        pass

    network = SKResNet(**NARROW, block=Own)
    assert all(type(unit) is Own for unit in network.layer2)
    assert list(network.state_dict()) == list(SKResNet(**NARROW).state_dict())


@pytest.mark.parametrize('small_stem', [True, False])
@torch.no_grad()
def test_three_stages(small_stem):
    network = randomise(SKResNet(**THREE, small_stem=small_stem))
    reductions = [1, 1, 2, 4] if small_stem else [2, 4, 8, 16]
    assert [info['reduction'] for info in network.feature_info] == reductions
    assert [info['num_chs'] for info in network.feature_info] == [64, 64, 128, 256]
    assert len(network.layer4) == 0
    assert not [key for key in network.state_dict() if key.startswith('layer4')]
    assert network.num_features == network.fc.in_features == 256
    x = torch.randn(2, 3, 32, 32)
    output, features = network.forward_intermediates(x)
    assert torch.equal(output, features[-1])
    assert [tuple(f.shape) for f in features] == [
        (2, channels, 32 // reduction, 32 // reduction) for channels, reduction in zip((64, 64, 128, 256), reductions)
    ]
    for indices, kept in (([0, 2], [0, 2]), ([-1], [3]), (2, [2, 3])):
        some = network.forward_intermediates(x, indices=indices, intermediates_only=True, stop_early=True)
        assert len(some) == len(kept)
        assert all(torch.equal(feature, features[index]) for feature, index in zip(some, kept))
    with pytest.raises(AssertionError, match='4'):
        network.forward_intermediates(x, indices=[4])
    assert list(network.prune_intermediate_layers([1, -1])) == [1, 3]
    assert torch.equal(network.forward_intermediates(x, indices=[3], intermediates_only=True)[0], features[3])
    assert list(network.prune_intermediate_layers([1, 2])) == [1, 2]
    assert not [key for key in network.state_dict() if key.startswith(('layer3', 'fc'))]
    assert torch.equal(network.forward_intermediates(x, indices=[2], intermediates_only=True)[0], features[2])


@pytest.mark.parametrize('output_stride', [8, 16])
def test_output_stride_of_three_stages(output_stride):
    network = SKResNet(**THREE, output_stride=output_stride, device='meta')
    reductions = {8: [2, 4, 8, 8], 16: [2, 4, 8, 16]}[output_stride]
    assert [info['reduction'] for info in network.feature_info] == reductions
    features = network.forward_intermediates(torch.empty(2, 3, 64, 64, device='meta'))[1]
    assert [feature.shape[-1] for feature in features] == [64 // reduction for reduction in reductions]


def test_sk_kwargs_and_block_args():
    network = SKResNet(
        **NARROW, sk_kwargs=dict(reduction=4), block_args=dict(attn_layer='se', sk_kwargs=dict(reduction=8, min_dim=8))
    )
    given = dict(reduction=4)
    SKResNet(**NARROW, sk_kwargs=given, device='meta')
    assert given == dict(reduction=4), 'the argument changed'
    for unit in network.layer4:
        assert unit.conv2.attn.fc_reduce.out_channels == 64, 'sk_kwargs go first'
        assert unit.se is not None
    assert network.layer1[0].conv2.attn.fc_reduce.out_channels == 8


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


@pytest.mark.parametrize(
    ('kwargs', 'last'),
    [(BASIC, 'conv2.bn'), (dict(BASIC, unit='plain'), 'bn2'), (dict(NARROW, unit='se'), 'bn3')],
    ids=['basic', 'basic-plain', 'se'],
)
def test_zero_init_last_of_other_units(kwargs, last):
    for zero in (True, False):
        network = SKResNet(**kwargs, zero_init_last=zero)
        for unit in (*network.layer1, *network.layer2, *network.layer3, *network.layer4):
            assert (unit.get_submodule(last).weight == (0 if zero else 1)).all()


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


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode], ids=['no_grad', 'inference_mode'])
@pytest.mark.parametrize('output_stride', [32, 8])
@each_kind
def test_features_outlive_the_units_that_overwrite(kwargs, output_stride, mode):
    """In inference units write into each other's memory (Stage), but what a stage gives away stays as it is."""
    kwargs = dict(kwargs, layers=[3] * len(kwargs['layers']), output_stride=output_stride)
    network = randomise(SKResNet(**kwargs)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    before, expected = x.clone(), network.forward_intermediates(x, intermediates_only=True)
    with mode():
        features = network.forward_intermediates(x, intermediates_only=True)
    assert torch.equal(x, before)
    assert_close(features, expected, length=network)


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
        (dict(layers=(3, 4)), r'layers=\(3, 4\) .*three or four'),
        (dict(layers=(3, 4, 6, 3, 2)), r'layers=\(3, 4, 6, 3, 2\) .*three or four'),
        (dict(layers=(3, 4, 6)), r'channels=\(16, 32, 64, 128\) .*3 integers.*layers=\(3, 4, 6\)'),
        (dict(layers=(3, 0, 6, 3)), r'layers=\(3, 0, 6, 3\) .*at least 1'),
        (dict(layers=(3, 4, 6.0, 3)), r'layers=\(3, 4, 6\.0, 3\) '),
        (dict(layers=4), 'layers=4 must be three or four integers'),
        (dict(channels=64), 'channels=64 must be 4 integers'),
        (dict(channels=(16, 32)), r'channels=\(16, 32\) .*4 integers.*layers=\(1, 2, 1, 1\)'),
        (dict(channels=(16, 32, 64, -128)), r'channels=\(16, 32, 64, -128\) '),
        (dict(layers=(1, 10**9, 1, 1)), 'layers=.* at most 1000'),
        (dict(layers=(1, True, 1, 1)), r'layers=\(1, True, 1, 1\) '),
        (dict(cardinality=2**20), 'cardinality=1048576 and base_width=16 give .* 4194304 channels'),
        (dict(block=3), 'block=3 must be'),
        (dict(unit=['sk']), r"unit=\['sk'\] is unknown"),
        (dict(sk_kwargs='sum'), "sk_kwargs='sum' must be a dict"),
        (dict(sk_kwargs={1: 2}), r'sk_kwargs=\{1: 2\} must be a dict'),
        (dict(sk_kwargs=dict(stride=2)), r"sk_kwargs=\{'stride': 2\} has stride, which the network itself sets"),
        (dict(small_stem='no'), "small_stem='no' must be True or False"),
        (dict(base_width=0), 'base_width=0 must be a number above 0'),
        (dict(base_width='4'), "base_width='4' must be a number above 0"),
        (dict(base_width=float('nan')), 'base_width=nan must be a number above 0'),
        (dict(base_width=10**400), 'base_width=10* must be a number of at most 1048576'),
        (dict(base_width=3), 'base_width=3 must be a number of at least 4'),
        (dict(cardinality=0), 'cardinality=0 '),
        (dict(cardinality=-8), 'cardinality=-8 '),
        (dict(small_stem=True, stem_type='deep'), r'small_stem=True .*stem_type'),
        (dict(block_args=dict(sk_kwargs=dict(select='best'))), "select='best' "),
        (dict(block_args=dict(sk_kwargs=dict(groups=5))), 'groups=5 '),
        (dict(sk_kwargs=dict(groups=5)), 'groups=5 '),
        (dict(sk_kwargs=dict(kernel_sizes=(3, 4))), r'\b4\b.*odd|odd.*\b4\b'),
        (dict(unit='SK'), "unit='SK' .*'sk', 'plain', 'se'"),
        (dict(unit='plain', sk_kwargs=dict(reduction=8)), r"sk_kwargs=\{'reduction': 8\} .*unit='plain'"),
        (dict(unit='se', sk_kwargs=dict(select='sum')), r"sk_kwargs=\{'select': 'sum'\} .*unit='se'"),
        (dict(block='bottle'), "block='bottle' .*'bottleneck' or 'basic'"),
        (dict(block='basic'), r"block='basic' .*cardinality=8 must be 1 .*base_width=16 must be 64"),
        (
            dict(block='basic', cardinality=1, base_width=64, sk_kwargs=dict(split_input=True, kernel_sizes=(3, 5, 7))),
            'split_input=True .*3 branches.*in_channels=64',
        ),
    ],
    ids=str,
)
def test_value_errors(kwargs, match):
    with pytest.raises(ValueError, match=match):
        SKResNet(**{**NARROW, **kwargs})


@each_kind
@torch.no_grad()
def test_modules_are_plain(kwargs):
    # What swaps or folds BatchNorms matches exact classes; a subclass with an activation inside would lose it.
    network = SKResNet(**kwargs)
    allowed = {nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Softmax, nn.Identity, nn.MaxPool2d, nn.Linear, nn.Sequential}
    allowed.add(timm.layers.activations.Sigmoid)
    kinds = {type(module) for module in network.modules() if not list(module.children())}
    assert kinds - allowed <= {nn.AdaptiveAvgPool2d, nn.Flatten, type(network.global_pool)}
    assert any(isinstance(module, ConvBNAct) for module in network.modules()) == (kwargs.get('unit', 'sk') == 'sk')


@pytest.mark.parametrize(
    'convert',
    [
        nn.SyncBatchNorm.convert_sync_batchnorm,
        timm.layers.convert_sync_batchnorm,
        timm.layers.freeze_batch_norm_2d,
    ],
)
@each_kind
@torch.no_grad()
def test_converters_leave_outputs_unchanged(convert, kwargs):
    network = randomise(SKResNet(**kwargs))
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(7))
    expected = network(x)
    assert expected.std() > 0.01
    converted = convert(network).eval()
    assert not any(type(module) is nn.BatchNorm2d for module in converted.modules())
    assert_close(converted(x), expected, length=network)
