import math

import pytest
import timm
import torch
from helpers.randomised import randomise
from helpers.tolerances import assert_close
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.utils.flop_counter import FlopCounterMode

from sk_plugins.layers import SelectiveKernel
from sk_plugins.networks import SKShuffleNetV2
from sk_plugins.networks.shufflenet import ShuffleUnit, _interleave

STAGES = ('stage2', 'stage3', 'stage4')
WIDTHS = {
    '0_5': dict(channels=(48, 96, 192)),
    '1_0': dict(channels=(116, 232, 464)),
    '1_5': dict(channels=(176, 352, 704)),
    '2_0': dict(channels=(244, 488, 976), head_channels=2048),
}
PLAIN_PARAMETERS = {'0_5': 1_366_792, '1_0': 2_278_604, '1_5': 3_503_624, '2_0': 7_393_996}
# By how much batch statistics of small maps amplify rounding.
BATCH_STATISTICS = 1e4
NARROW = dict(channels=(16, 32, 64), layers=(2, 3, 2), head_channels=64, num_classes=10)
UNITS = ('plain', 'se', 'sk')
each_unit = pytest.mark.parametrize('unit', UNITS)
each_width = pytest.mark.parametrize('width', WIDTHS)


def count_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def make_input(batch=2, channels=3, size=64):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def units_of(network):
    return [unit for name in STAGES for unit in network.get_submodule(name)]


# Against torchvision


def torchvisions(width, **kwargs):
    models = pytest.importorskip('torchvision').models
    return getattr(models, f'shufflenet_v2_x{width}')(weights=None, **kwargs)


@each_width
@torch.no_grad()
def test_plain_network_is_torchvisions(width):
    reference = randomise(torchvisions(width))
    network = SKShuffleNetV2(**WIDTHS[width], unit='plain').eval()
    assert list(network.state_dict()) == list(reference.state_dict())
    assert [name for name, _ in network.named_parameters()] == [name for name, _ in reference.named_parameters()]
    network.load_state_dict(reference.state_dict(), strict=True)
    for x in (make_input(), make_input(1, size=97), make_input().to(memory_format=torch.channels_last)):
        output, expected = network(x), reference(x)
        assert expected.std() > 0.01, 'logits too small for an absolute difference to mean much'
        assert_close(output, expected, length=network)


def test_gradients_equal_torchvisions():
    reference = randomise(torchvisions('0_5'), seed=3).double().train()
    network = SKShuffleNetV2(**WIDTHS['0_5'], unit='plain').double().train()
    network.load_state_dict(reference.state_dict())
    for model in (network, reference):
        nn.functional.cross_entropy(model(make_input(4).double()), torch.tensor([0, 100, 500, 999])).backward()
    expected = dict(reference.named_parameters())
    largest = max(parameter.grad.abs().max().item() for parameter in expected.values())
    for name, parameter in network.named_parameters():
        assert expected[name].grad.norm() > 0, name
        assert_close(
            parameter.grad, expected[name].grad, length=network, gain=BATCH_STATISTICS, scale=largest, msg=name
        )
    for (name, buffer), wanted in zip(network.named_buffers(), reference.buffers()):
        assert_close(buffer, wanted, length=network, gain=BATCH_STATISTICS, msg=name)


@torch.no_grad()
def test_features_equal_torchvisions():
    reference = randomise(torchvisions('1_0'))
    network = SKShuffleNetV2(**WIDTHS['1_0'], unit='plain').eval()
    network.load_state_dict(reference.state_dict())
    x = make_input()
    output, features = network.forward_intermediates(x)
    for name, feature in zip(('conv1', 'maxpool', *STAGES), features):
        x = getattr(reference, name)(x)
        assert_close(feature, x, length=network, msg=name)
    assert_close(output, reference.conv5(x), length=network)


@torch.no_grad()
def test_channels_interleave_as_torchvisions():
    shuffle = pytest.importorskip('torchvision.models.shufflenetv2').channel_shuffle
    unit = ShuffleUnit(12, 12, unit='plain').eval()
    unit.branch2 = nn.Sequential()
    x = torch.arange(2 * 12 * 3 * 3.0).view(2, 12, 3, 3)
    assert torch.equal(unit(x), shuffle(x, 2))
    assert unit(x)[0, :, 0, 0].tolist() == [9.0 * channel for channel in (0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11)]


# Units


@each_unit
@pytest.mark.parametrize(
    ('down', 'stride', 'dilation', 'size'), [(True, 2, 1, 5), (True, 1, 1, 9), (True, 1, 2, 9), (False, 1, 2, 9)]
)
def test_shapes_of_the_unit(unit, down, stride, dilation, size):
    layer = ShuffleUnit(16, 24 if down else 16, down, stride, dilation, unit)
    assert layer(torch.randn(2, 16, 9, 9)).shape == (2, 24 if down else 16, size, size)


@each_unit
@torch.no_grad()
def test_half_of_the_channels_pass_through(unit):
    layer = ShuffleUnit(16, 16, unit=unit).eval()
    x = make_input(channels=16, size=8)
    assert torch.equal(layer(x)[:, ::2], x[:, :8])


def norm(x, state, name):
    """BatchNorm in eval mode, as written."""
    mean, var, weight, bias = (
        state[f'{name}.{key}'].view(-1, 1, 1) for key in ('running_mean', 'running_var', 'weight', 'bias')
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def pointwise(x, state, conv, bn):
    return norm(nn.functional.conv2d(x, state[f'{conv}.weight']), state, bn).relu()


def depthwise(x, weight, stride=1, dilation=1):
    kwargs = dict(stride=stride, padding=dilation, dilation=dilation, groups=x.shape[1])
    return nn.functional.conv2d(x, weight, **kwargs)


def squeeze_excite(x, state, name):
    gate = x.mean((2, 3), keepdim=True)
    gate = nn.functional.conv2d(gate, state[f'{name}.fc1.weight'], state[f'{name}.fc1.bias']).relu()
    gate = nn.functional.conv2d(gate, state[f'{name}.fc2.weight'], state[f'{name}.fc2.bias'])
    return x * gate.sigmoid()


def interleave(x1, x2):
    return torch.stack((x1, x2), dim=2).flatten(1, 2)


@pytest.mark.parametrize('unit', ['plain', 'se'])
@torch.no_grad()
def test_down_sampling_unit_as_written(unit):
    layer = randomise(ShuffleUnit(12, 80, down=True, stride=2, unit=unit))
    state = layer.state_dict()
    x = make_input(3, 12, size=9)
    left = norm(depthwise(x, state['branch1.0.weight'], stride=2), state, 'branch1.1')
    left = pointwise(left, state, 'branch1.2', 'branch1.3')
    right = pointwise(x, state, 'branch2.0', 'branch2.1')
    right = norm(depthwise(right, state['branch2.3.weight'], stride=2), state, 'branch2.4')
    right = pointwise(right, state, 'branch2.5', 'branch2.6')
    if unit == 'se':
        assert state['branch2.8.fc1.weight'].shape == (32, 40, 1, 1), 'max(40 / 16, 32) hidden channels'
        right = squeeze_excite(right, state, 'branch2.8')
    assert_close(layer(x), interleave(left, right), length=layer)


@torch.no_grad()
def test_se_unit_as_written():
    layer = randomise(ShuffleUnit(80, 80, unit='se'))
    state = layer.state_dict()
    x = make_input(3, 80, size=9)
    right = pointwise(x[:, 40:], state, 'branch2.0', 'branch2.1')
    right = norm(depthwise(right, state['branch2.3.weight']), state, 'branch2.4')
    right = squeeze_excite(pointwise(right, state, 'branch2.5', 'branch2.6'), state, 'branch2.8')
    assert_close(layer(x), interleave(x[:, :40], right), length=layer)


def test_hidden_channels_of_se():
    assert ShuffleUnit(1088, 1088, unit='se', device='meta').branch2[8].fc1.out_channels == 34
    assert ShuffleUnit(976, 976, unit='se', device='meta').branch2[8].fc1.out_channels == 32


@torch.no_grad()
def test_sk_unit_as_written():
    """Depthwise 3x3 and 5x5 (dilated), Eq. 1 to 6, in the place of the depthwise 3x3 and its norm."""
    torch.manual_seed(0)
    layer = randomise(ShuffleUnit(80, 80, unit='sk'))
    state = layer.state_dict()
    state['branch2.3.attn.fc_select.weight'].mul_(3)
    x = make_input(3, 80, size=9)
    right = pointwise(x[:, 40:], state, 'branch2.0', 'branch2.1')
    branches = []
    for m in (0, 1):
        path = f'branch2.3.paths.{m}'
        branches.append(
            norm(depthwise(right, state[f'{path}.conv.weight'], dilation=m + 1), state, f'{path}.bn').relu()
        )
    s = (branches[0] + branches[1]).mean((2, 3), keepdim=True)
    z = pointwise(s, state, 'branch2.3.attn.fc_reduce', 'branch2.3.attn.bn')
    assert z.shape[1] == 32
    logits = nn.functional.conv2d(z, state['branch2.3.attn.fc_select.weight']).view(3, 2, 40, 1, 1)
    attention = logits.softmax(dim=1)
    assert attention.std() > 0.05, 'an attention that is all but uniform would hide a swap of the branches'
    right = attention[:, 0] * branches[0] + attention[:, 1] * branches[1]
    right = pointwise(right, state, 'branch2.5', 'branch2.6')
    assert_close(layer(x), interleave(x[:, :40], right), length=layer)


# The network


@each_width
def test_what_sk_adds(width):
    plain, sk = (SKShuffleNetV2(**WIDTHS[width], unit=unit, device='meta') for unit in ('plain', 'sk'))
    assert count_parameters(plain) == PLAIN_PARAMETERS[width]
    added = count_parameters(sk) - count_parameters(plain)
    if width in ('0_5', '1_0'):
        assert added == {'0_5': 75_304, '1_0': 180_806}[width]
    # A second 3x3 and norm per channel, two d-by-C layers more than one, and the norm of d = 32 values.
    halves = [channels // 2 for channels, depth in zip(WIDTHS[width]['channels'], (3, 7, 3)) for _ in range(depth)]
    assert added == sum(9 * half + 2 * half + 32 * half + 2 * 32 + 2 * 32 * half for half in halves)


@pytest.mark.parametrize(('width', 'mflops'), [('0_5', 40.5), ('1_0', 144.9)])
def test_multiply_adds(width, mflops):
    network = SKShuffleNetV2(**WIDTHS[width], unit='plain', device='meta').eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(1, 3, 224, 224, device='meta'))
    assert counter.get_total_flops() / 2e6 == pytest.approx(mflops, rel=0.01)


@each_width
def test_where_sk_and_se_stand(width):
    network = SKShuffleNetV2(**WIDTHS[width], unit='sk', device='meta')
    for name, depth in zip(STAGES, (4, 8, 4)):
        first, *others = network.get_submodule(name)
        assert first.down
        assert not any(isinstance(module, SelectiveKernel) for module in first.modules())
        assert len(others) == depth - 1
        for unit in others:
            assert not unit.down
            (layer,) = (module for module in unit.modules() if isinstance(module, SelectiveKernel))
            assert layer is unit.branch2[3]
            assert isinstance(unit.branch2[4], nn.Identity)
            assert layer.attn.fc_reduce.out_channels == 32
            half = layer.in_channels
            convs = [path.conv for path in layer.paths]
            assert [(c.kernel_size, c.dilation, c.stride, c.groups) for c in convs] == [
                ((3, 3), (1, 1), (1, 1), half),
                ((3, 3), (2, 2), (1, 1), half),
            ]
    se = SKShuffleNetV2(**WIDTHS[width], unit='se', device='meta')
    assert all(type(unit.branch2[8]) is timm.layers.SqueezeExcite for unit in units_of(se))


@pytest.mark.parametrize('unit', ['se', 'sk'])
def test_plain_weights_fit_but_for_the_units_own(unit):
    """What torchvision's weights give an SE or SK network: everything but what makes its units."""
    plain, other = (SKShuffleNetV2(**WIDTHS['0_5'], unit=name, device='meta') for name in ('plain', unit))
    plain, other = ({k: v.shape for k, v in network.state_dict().items()} for network in (plain, other))
    shared = {name for name in plain if plain[name] == other.get(name)}
    if unit == 'se':
        assert shared == set(plain)
        assert all('.branch2.8.' in name for name in set(other) - shared)
    else:
        replaced = set(plain) - shared
        assert len(replaced) == 13 * 6
        assert all('.branch2.3.' in name or '.branch2.4.' in name for name in replaced)
        assert all('.branch2.3.' in name for name in set(other) - shared)


@each_unit
@pytest.mark.parametrize(
    ('output_stride', 'reductions', 'dilations'),
    [
        (32, [2, 4, 8, 16, 32], [(1, 1), (1, 1), (1, 1)]),
        (16, [2, 4, 8, 16, 16], [(1, 1), (1, 1), (1, 2)]),
        (8, [2, 4, 8, 8, 8], [(1, 1), (1, 2), (2, 4)]),
    ],
)
@torch.no_grad()
def test_output_stride(unit, output_stride, reductions, dilations):
    network = randomise(SKShuffleNetV2(**NARROW, unit=unit, output_stride=output_stride))
    assert [info['reduction'] for info in network.feature_info] == reductions
    output, features = network.forward_intermediates(make_input())
    assert [tuple(feature.shape) for feature in features] == [
        (2, channels, 64 // reduction, 64 // reduction) for channels, reduction in zip((24, 24, 16, 32, 64), reductions)
    ]
    assert output.shape == (2, 64, 64 // output_stride, 64 // output_stride)
    for name, (first, rest) in zip(STAGES, dilations):
        found = []
        for layer in network.get_submodule(name):
            sk = layer.branch2[3]
            convs = [path.conv for path in sk.paths] if isinstance(sk, SelectiveKernel) else [sk]
            found.append([conv.dilation[0] for conv in convs])
        depth = len(network.get_submodule(name))
        assert found == [[first]] + [[rest, 2 * rest] if unit == 'sk' else [rest]] * (depth - 1)
    whole = SKShuffleNetV2(**NARROW, unit=unit)
    assert list(whole.state_dict()) == list(network.state_dict())


@torch.no_grad()
def test_dilation_sees_what_stride_does():
    """At output stride 16, every second pixel of the last stage is what striding gives."""
    strided = randomise(SKShuffleNetV2(**NARROW, unit='plain'))
    dilated = SKShuffleNetV2(**NARROW, unit='plain', output_stride=16).eval()
    dilated.load_state_dict(strided.state_dict())
    x = make_input(size=96)
    assert_close(dilated.forward_features(x)[:, :, ::2, ::2], strided.forward_features(x), length=strided)


def test_sk_kwargs_reach_every_unit():
    sk_kwargs = dict(kernel_sizes=(3, 5, 7), select='shared', min_dim=8)
    network = SKShuffleNetV2(**NARROW, sk_kwargs=sk_kwargs, device='meta')
    layers = [module for module in network.modules() if isinstance(module, SelectiveKernel)]
    assert len(layers) == 4
    for layer in layers:
        assert [path.conv.dilation[0] for path in layer.paths] == [1, 2, 3]
        assert layer.attn.fc_select.out_channels == 3
        assert layer.attn.fc_reduce.out_channels == 8


@each_unit
def test_initialisation(unit):
    torch.manual_seed(0)
    network = SKShuffleNetV2(**WIDTHS['0_5'], unit=unit)
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            out_channels, _, *kernel = module.weight.shape
            fan_out = out_channels * math.prod(kernel) / module.groups
            std = 0.01 if '.attn.' in name else math.sqrt(2 / fan_out)
            # Four standard errors of an estimate of std from that many values, and a little.
            tolerance = max(4 / math.sqrt(2 * module.weight.numel()), 0.02)
            assert module.weight.std().item() == pytest.approx(std, rel=tolerance), name
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
    assert network.fc.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert (network.fc.bias == 0).all()
    for parameter in network.parameters():
        nn.init.constant_(parameter, 7)
    network.init_weights()
    assert network.conv5[0].weight.std().item() == pytest.approx(math.sqrt(2 / 1024), rel=0.02)
    assert network.fc.weight.std().item() == pytest.approx(0.01, rel=0.01)


@each_unit
def test_modules_are_plain(unit):
    # What swaps or folds BatchNorms matches exact classes; a subclass with an activation inside would lose it.
    network = SKShuffleNetV2(**NARROW, unit=unit)
    allowed = {nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Softmax, nn.Identity, nn.MaxPool2d, nn.Linear, nn.Sequential}
    allowed |= {nn.AdaptiveAvgPool2d, nn.Flatten, type(network.global_pool)}
    allowed.add(timm.layers.activations.Sigmoid)
    kinds = {type(module) for module in network.modules() if not list(module.children())}
    assert kinds - allowed <= {type(network.global_pool.flatten)}


@pytest.mark.parametrize(
    'convert',
    [
        nn.SyncBatchNorm.convert_sync_batchnorm,
        timm.layers.convert_sync_batchnorm,
        timm.layers.freeze_batch_norm_2d,
    ],
)
@each_unit
@torch.no_grad()
def test_converters_leave_outputs_unchanged(convert, unit):
    network = randomise(SKShuffleNetV2(**NARROW, unit=unit))
    x = make_input()
    expected = network(x)
    assert expected.std() > 0.01
    converted = convert(network).eval()
    assert not any(type(module) is nn.BatchNorm2d for module in converted.modules())
    assert_close(converted(x), expected, length=network)


@each_unit
@torch.no_grad()
def test_fusing_batch_norms_leaves_outputs_unchanged(unit):
    network = randomise(SKShuffleNetV2(**NARROW, unit=unit))
    fused = fuse(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for name, module in fused.named_modules() if 'attn' not in name)
    x = make_input()
    assert_close(fused(x), network(x), length=network)


@each_unit
@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
def test_channels_last(unit, training):
    network = randomise(SKShuffleNetV2(**NARROW, unit=unit)).double().train(training)
    x = make_input().double()
    expected = network(x)
    last = x.contiguous(memory_format=torch.channels_last)
    network.to(memory_format=torch.channels_last)
    for feature in network.forward_intermediates(last, intermediates_only=True):
        assert feature.is_contiguous(memory_format=torch.channels_last)
    assert_close(network(last), expected, length=network)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('shape', [(2, 12, 5, 7), (1, 2, 3, 3), (3, 8, 1, 1), (0, 4, 2, 2)], ids=str)
def test_interleaving_keeps_values_and_memory_format(shape, memory_format):
    x = torch.randn(shape).contiguous(memory_format=memory_format)
    x1, x2 = (half.contiguous(memory_format=memory_format).requires_grad_() for half in x.chunk(2, dim=1))
    output = _interleave(x1, x2)
    assert torch.equal(output, torch.channel_shuffle(x, 2))
    assert output.is_contiguous(memory_format=memory_format)
    weight = torch.randn(shape)
    gradients = torch.autograd.grad(output, (x1, x2), weight)
    assert torch.equal(gradients[0], weight[:, 0::2])
    assert torch.equal(gradients[1], weight[:, 1::2])


def test_batch_of_one_in_training():
    x = make_input(1)
    assert SKShuffleNetV2(**NARROW, unit='se').train()(x).shape == (1, 10)
    with pytest.raises(ValueError, match='batch of 1'):
        SKShuffleNetV2(**NARROW, unit='sk').train()(x)


@pytest.mark.parametrize(
    ('kwargs', 'match'),
    [
        (dict(channels=(16, 32)), r'channels=\(16, 32\) must be three even integers'),
        (dict(channels=(16, 32, 63)), r'channels=\(16, 32, 63\) must be three even integers'),
        (dict(channels=(16, 32, 0)), r'channels=\(16, 32, 0\) '),
        (dict(channels=(16, 32, 64.0)), r'channels=\(16, 32, 64\.0\) '),
        (dict(layers=(4, 8)), r'layers=\(4, 8\) must be three integers of at least 1'),
        (dict(layers=(4, 0, 4)), r'layers=\(4, 0, 4\) '),
        (dict(stem_channels=0), 'stem_channels=0 must be an integer of at least 1'),
        (dict(stem_channels=24.0), r'stem_channels=24\.0 '),
        (dict(head_channels=-1), 'head_channels=-1 must be an integer of at least 1'),
        (dict(unit='SE'), "unit='SE' is unknown.*'sk', 'plain', 'se'"),
        (dict(unit='plain', sk_kwargs=dict(reduction=8)), r"sk_kwargs=\{'reduction': 8\} .*unit='plain'"),
        (dict(unit='se', sk_kwargs=dict(reduction=8)), r"sk_kwargs=\{'reduction': 8\} .*unit='se'"),
        (dict(output_stride=4), 'output_stride=4 must be 8, 16 or 32'),
        (dict(output_stride=64), 'output_stride=64 must be 8, 16 or 32'),
        (dict(channels=116), 'channels=116 must be three even integers'),
        (dict(layers=4), 'layers=4 must be three integers'),
        (dict(sk_kwargs=dict(groups=3)), 'groups=3 must divide'),
        (dict(layers=(1, 1, 10**9)), 'layers=.* at most 1000'),
        (dict(head_channels=2**40), 'head_channels=1099511627776 .*at most 1048576'),
        (dict(sk_kwargs=dict(dtype=torch.half)), 'sk_kwargs=.* has dtype, which the network itself sets'),
        (dict(sk_kwargs=dict(select='best')), "select='best' "),
        (dict(sk_kwargs=dict(kernel_sizes=())), r'kernel_sizes=.*at least one'),
    ],
    ids=str,
)
def test_value_errors(kwargs, match):
    with pytest.raises(ValueError, match=match):
        SKShuffleNetV2(**{**NARROW, **kwargs})
