"""selectify on networks of three libraries: equal outputs at the start, and what it says it did."""

import copy
import functools

import pytest
import timm
import torch
import torchvision
from helpers.randomised import randomise
from helpers.tolerances import assert_close
from torch import nn

from sk_plugins import fold_batch_norm, selectify
from sk_plugins.layers import SelectiveKernel
from sk_plugins.surgery import grow_kernel


def _timms(name, **kwargs):
    return functools.partial(timm.create_model, name, **kwargs)


def _mmpretrains(kind, **kwargs):
    def make():
        registry = pytest.importorskip('mmpretrain').registry
        return registry.MODELS.build(dict(type=f'mmpretrain.{kind}', **kwargs))

    return make


# How a network is made, how many convolutions change, and the parameters that this adds.
NETWORKS = {
    'timm resnet50': (_timms('resnet50'), 16, 31_800_320),
    'timm resnext50_32x4d': (_timms('resnext50_32x4d'), 16, 4_950_720),
    'timm efficientnet_b0': (_timms('efficientnet_b0'), 8, 461_808),
    'timm mobilenetv3_small_100': (_timms('mobilenetv3_small_100'), 4, 24_288),
    'timm regnety_002': (_timms('regnety_002'), 14, 972_512),
    'torchvision resnet18': (torchvision.models.resnet18, 16, 30_884_864),
    'torchvision resnext50_32x4d': (torchvision.models.resnext50_32x4d, 16, 4_950_720),
    'torchvision mobilenet_v2': (torchvision.models.mobilenet_v2, 18, 1_132_928),
    'torchvision shufflenet_v2_x1_0': (torchvision.models.shufflenet_v2_x1_0, 20, 303_044),
    'torchvision densenet121': (torchvision.models.densenet121, 58, 6_121_088),
    'mmpretrain ResNeXt': (_mmpretrains('ResNeXt', depth=50, groups=32, width_per_group=4), 16, 4_950_720),
    'mmpretrain ShuffleNetV2': (_mmpretrains('ShuffleNetV2', out_indices=(0, 1, 2)), 20, 303_044),
    'mmpretrain MobileNetV2': (_mmpretrains('MobileNetV2', out_indices=(2, 7)), 18, 1_132_928),
    'mmpretrain RepVGG': (_mmpretrains('RepVGG', arch='A0', out_indices=(0, 3)), 22, 20_128_240),
}
each_network = pytest.mark.parametrize(('make', 'changes', 'added'), NETWORKS.values(), ids=NETWORKS.keys())


class Parts(nn.Sequential):
    """Convolutions of all kinds, with norms and activations beside them."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Conv2d(3, 16, 3, 2, 1)
        self.norm = nn.BatchNorm2d(16)
        self.act = nn.ReLU(inplace=True)
        self.grouped = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=4, bias=False)
        self.depthwise = nn.Conv2d(16, 16, 3, padding='same', groups=16)
        self.unpadded = nn.Conv2d(16, 8, 3, padding='valid')
        self.uneven = nn.Conv2d(8, 8, 3, padding=(3, 2), stride=(1, 2))
        self.pointwise = nn.Conv2d(8, 8, 1)


@pytest.fixture
def parts():
    torch.manual_seed(0)
    return randomise(Parts())


def images(batch=2, size=64, dtype=torch.float32):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def outputs(model, x):
    given = model(x)
    return list(given) if isinstance(given, (tuple, list)) else [given]


def shake(model):
    """Attention that is far from even, as no selection among equal maps minds."""
    for layer in model.modules():
        if isinstance(layer, SelectiveKernel):
            nn.init.normal_(layer.attn.fc_select.weight)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@each_network
def test_outputs_are_equal(make, changes, added):
    torch.manual_seed(0)
    model = make()
    randomise(model)
    before, x = count(model), images()
    with torch.inference_mode():
        expected = outputs(model, x)
        report = selectify(model)
        shake(model)
        actual = outputs(model, x)
    assert expected[-1].std() > 1e-2
    for one, other in zip(actual, expected, strict=True):
        # On the machine of the first measurement the difference was zero.
        assert (one - other).abs().max() <= 1e-6 * other.abs().max()
    assert len(report.changed) == changes
    assert report.parameters == added == count(model) - before


# One of every shape by default: others of these are ResNets, ResNeXts and deep ones too.
LONG = (
    'timm resnet50',
    'torchvision resnext50_32x4d',
    'torchvision densenet121',
    'mmpretrain ResNeXt',
    'mmpretrain RepVGG',
)


@pytest.mark.parametrize(
    'make',
    [pytest.param(make, id=name, marks=[pytest.mark.slow] * (name in LONG)) for name, (make, *_) in NETWORKS.items()],
)
def test_training_steps(make):
    """The zeros around the 3x3 get gradients, and from the second step on the attention does."""
    torch.manual_seed(0)
    model = make()
    randomise(model)  # timm's residual branches begin at zero, which holds back their gradients for a step
    layers = [model.get_submodule(name) for name in selectify(model).changed]
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        sum(output.square().mean() for output in outputs(model, images())).backward()
        if step == 0:
            assert not any(layer.attn.fc_select.weight.grad.abs().max() > 1e-6 for layer in layers)
        optimizer.step()
    # On maps of two pixels, where the last ones are, no zero is ever multiplied with a pixel.
    rings = [layer.paths[1].conv.weight.clone() for layer in layers]
    for ring in rings:
        ring.data[:, :, 1:-1, 1:-1] = 0
    assert sum(bool(ring.any()) for ring in rings) > len(layers) / 2
    assert sum(bool(layer.attn.fc_select.weight.grad.any()) for layer in layers) > len(layers) / 2
    assert all(layer.paths[0].conv.weight.grad.any() for layer in layers)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize('kernel_sizes', [(3, 5), (5, 3), (3, 3), (3, 5, 7), [7, 3]], ids=str)
@pytest.mark.parametrize('select', ['channel', 'shared'])
def test_kinds_of_convolutions(parts, kernel_sizes, select):
    parts.double()
    x = images(size=17, dtype=torch.float64)
    expected = parts(x)
    report = selectify(parts, kernel_sizes, select=select)
    shake(parts)
    assert list(report.changed) == ['dense', 'grouped', 'depthwise', 'unpadded', 'uneven']
    assert report.kept == {'pointwise': '1x1'}
    assert_close(parts(x), expected, length=parts)
    for name in report.changed:
        layer = parts.get_submodule(name)
        assert [path.conv.kernel_size for path in layer.paths] == [(size, size) for size in kernel_sizes]
        assert layer.select == select


def find_same(library):
    if library == 'timm':
        return timm.layers.Conv2dSame
    return pytest.importorskip('mmcv.cnn.bricks.conv2d_adaptive_padding').Conv2dAdaptivePadding


@pytest.mark.parametrize('library', ['timm', 'mmcv'])
@torch.no_grad()
def test_convolutions_that_pad_as_tensorflow(library):
    """The padding follows from the kernel's size, the stride and the map's size: by 0 and 1 before a 3x3."""
    torch.manual_seed(0)
    kind = find_same(library)
    model = nn.Sequential(
        kind(3, 8, 3, stride=2), kind(8, 8, 3, stride=(1, 2), groups=8), kind(8, 6, 3, stride=3, dilation=2)
    )
    model.append(kind(6, 6, 3, stride=4)).double()
    for size in ((37, 64), (48, 33), (7, 5)):
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        selected = copy.deepcopy(model)
        report = selectify(selected, (3, 5, 7))
        shake(selected)
        assert list(report.changed) == ['0', '1', '2']
        assert report.kept == {'3': "pads as TensorFlow's 'SAME', with stride=(4, 4)"}
        assert type(selected[0].paths[2].conv) is kind
        assert_close(selected.eval()(x), model(x), length=selected)


def test_an_error_would_show(parts):
    x = images(size=17)
    expected = parts(x)
    selectify(parts)
    with torch.no_grad():
        parts.depthwise.paths[1].conv.weight[0, 0, 0, 0] = 1
    assert (parts(x) - expected).abs().max() > 1e-2


def test_a_layer_keeps_what_it_was(parts):
    parts.to(torch.bfloat16).to(memory_format=torch.channels_last)
    parts.dense.requires_grad_(False)
    parts.grouped.train()
    selectify(parts, reduction=4, min_dim=8)
    layer = parts.dense
    for path in layer.paths:
        assert path.conv.weight.dtype == path.conv.bias.dtype == torch.bfloat16
        assert path.conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert not path.conv.weight.requires_grad
        assert not path.conv.bias.requires_grad
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert all(parameter.requires_grad for parameter in parts.grouped.attn.parameters())
    assert layer.attn.fc_reduce.out_channels == 8
    assert not layer.training
    assert parts.grouped.training
    assert parts.grouped.paths[0].conv.training


def test_folding_after(parts):
    x = images(size=17)
    expected = parts(x)
    selectify(parts)
    shake(parts)
    folded = fold_batch_norm(parts)
    assert_close(folded(x), expected, length=parts)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.dense.attn.modules())


def test_where(parts):
    original = copy.deepcopy(parts)
    report = selectify(parts, where=['d*', 'unpadded'])
    assert list(report.changed) == ['dense', 'depthwise', 'unpadded']
    assert report.kept == dict.fromkeys(['grouped', 'uneven', 'pointwise'], 'not named by where')
    report = selectify(original, where=lambda name, conv: conv.groups > 1)
    assert list(report.changed) == ['grouped', 'depthwise']


def test_part_after_part(parts):
    x = images(size=17)
    expected = parts(x)
    selectify(parts, where='dense')
    report = selectify(parts)
    assert list(report.changed) == ['grouped', 'depthwise', 'unpadded', 'uneven']
    assert report.kept['dense.paths.0.conv'] == 'a part of an SK convolution already'
    assert_close(parts(x), expected, length=parts)
    with pytest.raises(
        ValueError, match=r'no 3x3 convolution to change.* 20 a part of an SK convolution already, 1 1x1'
    ):
        selectify(parts)


def test_a_convolution_with_two_names():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.ModuleDict(dict(first=conv, second=conv))
    before = count(model)
    report = selectify(model)
    assert list(report.changed) == ['first', 'second']
    assert model['first'] is model['second']
    assert report.parameters == count(model) - before


def test_convolutions_that_share_a_weight():
    """They would learn apart."""
    model = nn.ModuleDict({name: nn.Conv2d(4, 4, 3, padding=1) for name in ('first', 'second', 'third')})
    model['second'].weight = model['first'].weight
    before = count(model)
    report = selectify(model)
    assert report.kept == dict.fromkeys(['first', 'second'], 'shares a parameter with another module')
    assert list(report.changed) == ['third']
    assert report.parameters == count(model) - before


def test_batches_of_one(parts):
    alone = copy.deepcopy(parts)
    selectify(parts)
    with pytest.raises(ValueError, match='got a batch of 1'):
        parts.train()(images(1))
    selectify(alone, norm_layer=timm.layers.GroupNorm1)
    assert alone.train()(images(1)).shape[0] == 1


def test_what_stays_and_why(parts):
    parts.dense.register_forward_hook(lambda module, args, output: None)
    nn.utils.parametrizations.weight_norm(parts.grouped)
    parts.depthwise = nn.Conv2d(16, 16, 3, padding=1, padding_mode='reflect')
    parts.unpadded = timm.layers.ScaledStdConv2d(16, 8, 3)
    report = selectify(parts)
    assert report.kept == {
        'dense': 'has hooks or a forward of its own',
        'grouped': 'a ParametrizedConv2d, no plain convolution',
        'depthwise': "pads with padding_mode='reflect'",
        'unpadded': 'a ScaledStdConv2d, no plain convolution',
        'pointwise': '1x1',
    }
    assert str(report).splitlines() == [
        '1 convolutions are SK convolutions now: uneven',
        '2,440 parameters were added',
        '1 stayed as they were, has hooks or a forward of its own: dense',
        '1 stayed as they were, a ParametrizedConv2d, no plain convolution: grouped',
        "1 stayed as they were, pads with padding_mode='reflect': depthwise",
        '1 stayed as they were, a ScaledStdConv2d, no plain convolution: unpadded',
        '1 stayed as they were, 1x1: pointwise',
    ]


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        (
            dict(where='layer9.*'),
            ValueError,
            r"where='layer9\.\*' names none of the 6 convolutions of this Parts \(dense",
        ),
        (dict(where=['dense', 'x']), ValueError, "where='x' names none"),
        (dict(where=5), ValueError, r"where=5 must be a pattern of names, such as 'layer\[34\]\.\*', a function of"),
        (dict(where=[]), ValueError, r'where=\[\] must be a pattern of names'),
        (dict(where=[None]), ValueError, r'where=\[None\] must be a pattern of names'),
        (dict(where=b'dense'), ValueError, "where=b'dense' must be a pattern of names"),
        (dict(where='pointwise'), ValueError, 'this Parts has no 3x3 convolution to change; .*: 1 1x1$'),
        (dict(kernel_sizes=(5, 7)), ValueError, r'kernel_sizes=\(5, 7\) must be two or more odd sizes, 3 among them'),
        (dict(kernel_sizes=(1, 3)), ValueError, 'none below it'),
        (dict(kernel_sizes=(3,)), ValueError, 'two or more'),
        (dict(kernel_sizes=(3, 4)), ValueError, 'odd'),
        (dict(kernel_sizes='35'), ValueError, 'two or more'),
        (dict(select='sum'), ValueError, "select='sum' is unknown: choose one of 'channel', 'shared'"),
        (dict(reductoin=8), TypeError, 'selectify has no argument reductoin=8; near it are reduction'),
        (dict(dilated=True), TypeError, 'selectify has no argument dilated=True'),
        (dict(reduction=0), ValueError, 'reduction=0 must be an integer of at least 1'),
    ],
    ids=str,
)
def test_errors_leave_the_model_alone(parts, arguments, error, message):
    modules = list(parts.modules())
    with pytest.raises(error, match=message):
        selectify(parts, **arguments)
    assert list(parts.modules()) == modules


def inside_ddp(model):
    """As far as it can be without processes."""
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = model
    return wrapped


def test_models_that_cannot_be_changed(parts):
    with pytest.raises(TypeError, match=r'must be an nn\.Module, not str'):
        selectify('resnet50')
    with pytest.raises(ValueError, match='model is a convolution itself'):
        selectify(nn.Conv2d(3, 3, 3))
    with pytest.raises(ValueError, match='that was scripted or compiled'):
        selectify(torch.compile(parts))
    with pytest.raises(ValueError, match='model is a Sequential with a DistributedDataParallel'):
        selectify(nn.Sequential(inside_ddp(parts)))
    with pytest.raises(
        ValueError, match='ConvNeXt has no 3x3 convolution to change; of its convolutions: 16 1x1, 8 7x7'
    ):
        selectify(timm.create_model('convnext_atto', depths=(1, 1, 1, 5), device='meta'))


@pytest.mark.parametrize('size', [3, 5, 7, 9])
@pytest.mark.parametrize('groups', [1, 4])
def test_grown_kernels_are_equal(size, groups):
    torch.manual_seed(0)
    x, weight = torch.randn(1, 8, 11, 11), torch.randn(8, 8 // groups, 3, 3)
    grown = grow_kernel(weight, size)
    assert grown.count_nonzero() == weight.numel()
    expected = nn.functional.conv2d(x, weight, padding=1, groups=groups)
    assert_close(nn.functional.conv2d(x, grown, padding=size // 2, groups=groups), expected, length=9 * 8)


@pytest.mark.parametrize(('size', 'spread'), [(5, 1), (3, 2), (1, 1)])
def test_grown_kernels_keep_their_precision(size, spread):
    torch.manual_seed(0)
    weight = torch.randn(8, 8, 3, 3)
    with torch.autocast('cpu', torch.bfloat16):
        grown = grow_kernel(weight, size, spread)
    assert grown.dtype == torch.float32
    assert grown.is_contiguous()
    assert_close(grown.double(), grow_kernel(weight.double(), size, spread), length=9, dtype=torch.float32)
    assert grow_kernel(weight.half(), size, spread).dtype == torch.float16


@pytest.mark.parametrize('spread', [2, 3])
def test_dilated_kernels_are_equal_on_planes(spread):
    """What interpolation keeps: a map that rises by one from pixel to pixel, and its bilinear products."""
    torch.manual_seed(0)
    weight = torch.randn(4, 1, 3, 3, dtype=torch.float64)
    dilated = grow_kernel(weight, 3, spread)
    y, x = torch.meshgrid(*[torch.arange(15, dtype=torch.float64)] * 2, indexing='ij')
    for plane in (torch.ones_like(x), x, y, x + 2 * y):
        expected = nn.functional.conv2d(plane[None, None], weight)[
            ..., spread - 1 : 14 - spread, spread - 1 : 14 - spread
        ]
        actual = nn.functional.conv2d(plane[None, None], dilated, dilation=spread)
        assert_close(actual, expected, length=9, scale=100)
    assert not torch.allclose(dilated, weight)


def test_a_kernel_of_one_pixel_is_the_sum():
    weight = torch.randn(4, 2, 3, 3)
    assert_close(grow_kernel(weight, 1), weight.sum((2, 3), keepdim=True), length=9)
