import copy
from collections import Counter

import pytest
import torch
from randomised import randomise
from timm.layers import DropPath
from torch import nn
from torch._dynamo import mark_dynamic
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import sk_plugins
from sk_plugins.layers import ConvBNAct, SelectiveKernel, conv_bn_act
from sk_plugins.networks.resnet import SKBasicBlock, SKBottleneck, Stage
from sk_plugins.ops import convolution, convolve, convolves_at_once, rearrange

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='needs a torch with oneDNN')
CONVOLUTIONS = [
    dict(kernel_size=1),
    dict(kernel_size=1, bias=True),
    dict(kernel_size=3, padding=2, dilation=2, groups=8),
    dict(kernel_size=3, padding=1, stride=2, groups=16, bias=True),
]


def make(norm=True, **kwargs):
    torch.manual_seed(0)
    conv = nn.Conv2d(32, 32, **kwargs)
    return conv, randomise(nn.BatchNorm2d(32)).eval() if norm else nn.Identity()


def make_input(*shape, seed=1):
    return torch.randn(*(shape or (3, 32, 9, 9)), generator=torch.Generator().manual_seed(seed))


def operators(call):
    """How often each operator of torch runs within a call. A dispatch mode would not do: oneDNN stands aside for it."""
    with torch.autograd.profiler.profile() as profile:
        call()
    return {event.key: event.count for event in profile.key_averages()}


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['NCHW', 'NHWC'])
@pytest.mark.parametrize('norm', [True, False], ids=['norm', 'no norm'])
@pytest.mark.parametrize('kwargs', CONVOLUTIONS, ids=str)
@torch.no_grad()
def test_equals_one_after_the_other(kwargs, norm, memory_format):
    conv, norm = make(norm, **kwargs)
    x = make_input().to(memory_format=memory_format)
    y = norm(conv(x))
    shortcut = make_input(*y.shape, seed=2).to(memory_format=memory_format)
    before = shortcut.clone()
    for relu in (False, True):
        for other in (None, shortcut):
            expected = y if other is None else y + other
            expected = expected.relu() if relu else expected
            result = convolve(conv, norm, x, relu, other)
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
            assert result.is_contiguous(memory_format=memory_format)
    assert torch.equal(shortcut, before)


@torch.no_grad()
def test_sum_and_relu_are_the_convolutions():
    conv, norm = make(norm=False, kernel_size=1)
    x = make_input(3, 32, 32, 32).to(memory_format=torch.channels_last)
    passes = {'aten::relu', 'aten::relu_', 'aten::add', 'aten::add_'}
    ran = operators(lambda: convolve(conv, norm, x, relu=True, shortcut=x))
    assert sum(count for name, count in ran.items() if 'mkldnn::_convolution_pointwise' in name) == 1
    assert not passes & ran.keys()


def test_stands_aside():
    conv, _ = make(kernel_size=1)
    x = make_input()
    assert not convolves_at_once(conv, x)  # autograd is on
    with torch.no_grad():
        assert convolves_at_once(conv, x)
        for other in (x.double(), x[:0], x.to('meta'), nn.Parameter(x)):
            assert not convolves_at_once(conv, other)
        assert not convolves_at_once(copy.deepcopy(conv).double(), x.double())
        for kwargs in (dict(padding='same'), dict(padding=1, padding_mode='reflect')):
            assert not convolves_at_once(nn.Conv2d(32, 32, 3, **kwargs), x)
        modes = (FlopCounterMode(display=False), torch.autocast('cpu'), torch.backends.mkldnn.flags(enabled=False))
        for mode in modes:
            with mode:
                assert not convolves_at_once(conv, x), mode
        assert torch.func.vmap(lambda x: x + convolves_at_once(conv, x))(x[None]).equal(x[None])
        with forward_ad.dual_level():
            assert not convolves_at_once(conv, x)
        assert convolves_at_once(conv, x)


def make_unit(kind, **kwargs):
    torch.manual_seed(0)
    if kind is SKBottleneck:
        kwargs = dict(cardinality=4, base_width=64, **kwargs)
    unit = kind(32, 32 // kind.expansion, sk_kwargs=dict(min_dim=8), **kwargs)
    return randomise(unit).eval()


@pytest.mark.parametrize(('groups', 'passes'), [(1, False), (4, False), (8, True), (16, True), (32, False)])
@torch.no_grad()
def test_a_pass_for_the_relu_of_small_groups(groups, passes):
    """Of two to four channels, for which oneDNN's own takes longer."""
    conv, norm = make(kernel_size=3, padding=1, groups=groups)
    x = make_input(3, 32, 32, 32).to(memory_format=torch.channels_last)
    assert ('aten::relu_' in operators(lambda: convolve(conv, norm, x, relu=True))) is passes
    # With a sum there is another pass to save.
    assert 'aten::relu_' not in operators(lambda: convolve(conv, norm, x, relu=True, shortcut=x))


@pytest.fixture
def compiler():
    torch.compiler.reset()
    return CompileCounterWithBackend('aot_eager')


def at_once(compiler):
    """How many convolutions of a compiler's graphs take their ReLU, and how many a sum as well."""
    called = Counter(str(node.target) for graph in compiler.graphs for node in graph.graph.nodes)
    sums = 'sk_plugins.convolve_add_relu_.default'
    return called['mkldnn._convolution_pointwise.default'] + called['mkldnn._convolution_pointwise'], called[sums]


@pytest.mark.parametrize('make_downsample', [lambda: None, lambda: nn.AdaptiveAvgPool2d(1)], ids=['none', 'pooled'])
@pytest.mark.parametrize('compiled', [False, True], ids=['eager', 'compiled'])
@torch.no_grad()
def test_shortcuts_that_broadcast(compiled, make_downsample, compiler):
    unit = make_unit(SKBottleneck)
    unit.downsample = make_downsample()
    call = torch.compile(unit, backend=compiler, fullgraph=True) if compiled else unit
    x = make_input(3, 32, 8, 8).to(memory_format=torch.channels_last)
    with torch.enable_grad():
        expected = unit(x)
    torch.testing.assert_close(call(x), expected, rtol=1e-5, atol=1e-5)
    y = Stage(unit, make_unit(SKBottleneck))(x)
    assert y.shape == x.shape


@pytest.mark.parametrize('kwargs', [dict(stride=2), dict(inplanes=16)], ids=str)
@pytest.mark.parametrize('compiled', [False, True], ids=['eager', 'compiled'])
@torch.no_grad()
def test_shortcuts_of_another_shape_are_errors(compiled, kwargs, compiler):
    kwargs = dict(inplanes=32, planes=8, cardinality=4, sk_kwargs=dict(min_dim=8)) | kwargs
    unit = SKBottleneck(**kwargs).eval()
    call = torch.compile(unit, backend=compiler) if compiled else unit
    with pytest.raises(RuntimeError, match=r'size|broadcast|shape'):
        call(make_input(3, kwargs['inplanes'], 12, 12).to(memory_format=torch.channels_last))


@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
@torch.no_grad()
def test_compiled_maps_of_a_single_channel(backend):
    """Which are in every memory format at once."""
    torch.compiler.reset()
    torch.manual_seed(0)
    layers = [SelectiveKernel(1, 32, groups=1), ConvBNAct(32, 1), ConvBNAct(1, 512), ConvBNAct(512, 512)]
    layers = randomise(nn.Sequential(*layers)).eval()
    for x in (make_input(2, 1, 12, 12), make_input(2, 1, 12, 12).to(memory_format=torch.channels_last)):
        expected = layers(x)
        torch.testing.assert_close(torch.compile(layers, backend=backend)(x), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_compiled_unit_in_forward_mode(compiler):
    unit = make_unit(SKBottleneck)
    x = make_input(3, 32, 8, 8).to(memory_format=torch.channels_last)
    compiled = torch.compile(unit, backend=compiler)
    compiled(x)
    assert at_once(compiler) == (3, 1)
    with forward_ad.dual_level():
        tangents = [forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.clone()))).tangent for f in (unit, compiled)]
    torch.testing.assert_close(*tangents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('folded', [False, True], ids=['as trained', 'folded'])
@pytest.mark.parametrize(('kind', 'convolutions'), [(SKBottleneck, 4), (SKBasicBlock, 3)])
def test_units_leave_no_pass_for_sum_and_relu(kind, convolutions, folded):
    unit = make_unit(kind)
    x = make_input(3, 32, 32, 32).to(memory_format=torch.channels_last)
    expected, before = unit(x).detach(), x.clone()
    unit = sk_plugins.fuse(unit) if folded else unit
    with torch.inference_mode():
        ran = operators(lambda: unit(x))
        torch.testing.assert_close(unit(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)  # the shortcut
    assert sum(count for name, count in ran.items() if 'mkldnn::_convolution_pointwise' in name) == convolutions
    assert ran.get('aten::relu_', 0) <= 1  # the attention's, of one pixel


@pytest.mark.parametrize('kind', [SKBottleneck, SKBasicBlock])
@pytest.mark.parametrize('name', ['act', 'conv3', 'conv3.conv', 'conv1', 'drop_path'])
@torch.no_grad()
def test_modules_that_are_watched_are_called(kind, name):
    unit = make_unit(kind, drop_path=DropPath(0.2))
    name = name.replace('conv3', 'conv2') if kind is SKBasicBlock else name
    expected = unit(make_input(3, 32, 32, 32))
    seen = []
    unit.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    torch.testing.assert_close(unit(make_input(3, 32, 32, 32)), expected, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1


@pytest.mark.parametrize('relu', [False, True])
@pytest.mark.parametrize('kwargs', CONVOLUTIONS, ids=str)
@torch.no_grad()
def test_sum_in_place(kwargs, relu):
    conv, _ = make(norm=False, **kwargs)
    x = make_input().to(memory_format=torch.channels_last)
    shortcut = make_input(*conv(x).shape, seed=2).to(memory_format=torch.channels_last)
    expected = conv(x) + shortcut
    arguments = (x, conv.weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups, relu)
    opcheck(torch.ops.sk_plugins.convolve_add_relu_.default, (shortcut.clone(), *arguments))
    convolution.convolve_add_relu_(shortcut, *arguments)
    torch.testing.assert_close(shortcut, expected.relu() if relu else expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('folded', [False, True], ids=['as trained', 'folded'])
@pytest.mark.parametrize(('kind', 'relus'), [(SKBottleneck, 3), (SKBasicBlock, 2)])
def test_compiled_units_leave_no_pass_for_sum_and_relu(kind, relus, folded, compiler):
    unit = make_unit(kind)
    unit = sk_plugins.fuse(unit) if folded else unit
    compiled = torch.compile(unit, backend=compiler, fullgraph=True)
    for shape in ((3, 32, 24, 40), (2, 32, 17, 24), (17, 32, 8, 8)):
        x = make_input(*shape).to(memory_format=torch.channels_last)
        before = x.clone()
        mark_dynamic(x, (0, 2, 3))
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), unit(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(x, before)  # the shortcut
    assert compiler.frame_count == 1
    assert at_once(compiler) == (relus, 1)


def test_compiled_units_stand_aside(compiler):
    unit = make_unit(SKBottleneck)
    x = make_input(3, 32, 32, 32).to(memory_format=torch.channels_last)
    expected, frames = unit(x).detach(), 0

    def check(call, x, rtol=1e-5):
        nonlocal frames
        result = torch.compile(call, backend=compiler, fullgraph=True)(x)
        torch.testing.assert_close(result.float(), expected, rtol=rtol, atol=rtol)
        frames += 1
        assert (compiler.frame_count, at_once(compiler)) == (frames, (0, 0))

    check(unit, x)  # autograd is on
    with torch.no_grad():
        check(unit, x.contiguous())
        check(copy.deepcopy(unit).double(), x.double())
        check(lambda x: torch.func.vmap(unit.forward)(x[None])[0], x)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            check(unit, x, rtol=0.1)
        with torch.backends.mkldnn.flags(enabled=False):
            check(unit, x)
        torch.compiler.reset()
        result = torch.compile(unit, backend=compiler)(x)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
        assert at_once(compiler) == (3, 1)
        unit.conv3.conv.register_forward_hook(lambda module, inputs, output: None)
        torch.testing.assert_close(torch.compile(unit, backend=compiler)(x), expected, rtol=1e-5, atol=1e-5)
        assert at_once(compiler) == (6, 1)


@torch.no_grad()
def test_compiled_large_weights_are_products(compiler):
    """Whatever the size of the map: to ask for it would make a graph for every range of sizes."""
    conv, norm = nn.Conv2d(256, 512, 1), randomise(nn.BatchNorm2d(512)).eval()
    compiled = torch.compile(lambda x: convolve(conv, norm, x, relu=True), backend=compiler, fullgraph=True)
    for size in (4, 32):
        x = make_input(2, 256, size, size).to(memory_format=torch.channels_last)
        mark_dynamic(x, (0, 2, 3))
        torch.testing.assert_close(compiled(x), norm(conv(x)).relu(), rtol=1e-4, atol=1e-4)
        assert not convolution.folds(conv, norm, make_input(1, 256, 2, 2))
    assert compiler.frame_count == 1
    assert at_once(compiler) == (0, 0)
    assert 'linear' in str(compiler.graphs[0].code)


@pytest.fixture
def whatever_size(monkeypatch):
    """Small weights are rearranged as large ones are."""
    monkeypatch.setattr(convolution, '_LEAST_WEIGHT', 0)


REARRANGED = [
    (dict(kernel_size=1), (3, 32, 9, 9)),
    (dict(kernel_size=1, bias=True), (1, 32, 1, 1)),
    (dict(kernel_size=1, bias=True), (2, 32, 7, 12)),
    (dict(kernel_size=1, stride=2), (2, 32, 7, 12)),
    (dict(kernel_size=1, padding=1), (2, 32, 7, 12)),
    (dict(kernel_size=1, groups=4), (2, 32, 7, 12)),
    (dict(kernel_size=3, padding=2, dilation=2, stride=2, groups=8), (3, 32, 9, 12)),
    (dict(kernel_size=3, padding=4, dilation=4, stride=2, groups=32, bias=True), (2, 32, 8, 8)),
    (dict(kernel_size=3, padding=2, dilation=2, stride=2), (2, 32, 1, 1)),
    (dict(kernel_size=3, padding=2, dilation=2, stride=2, groups=16), (1, 32, 1, 1)),
    (dict(kernel_size=(3, 1), padding=(3, 0), dilation=(3, 3), stride=(3, 6)), (2, 32, 13, 14)),
]


@pytest.mark.usefixtures('whatever_size')
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['NCHW', 'NHWC'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(('kwargs', 'shape'), REARRANGED, ids=str)
def test_rearranged_convolutions(kwargs, shape, dtype, memory_format):
    """Values and gradients are the convolution's, and so is the memory format."""
    torch.manual_seed(0)
    conv = nn.Conv2d(32, 48 if kwargs.get('groups') is None else 64, dtype=dtype, **kwargs)
    conv = conv.to(memory_format=memory_format)
    x = make_input(*shape).to(dtype).to(memory_format=memory_format).requires_grad_()
    results = []
    for call in (conv, lambda x: rearrange(conv, x)):
        y = call(x)
        weight = make_input(*y.shape, seed=2).to(dtype)
        gradients = torch.autograd.grad((y * weight).sum(), (x, *conv.parameters()))
        results.append((y, *gradients))
    close = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=1e-11, atol=1e-11)
    for expected, result in zip(*results):
        torch.testing.assert_close(result, expected, **close)
    for result in results[1][:2]:
        assert result.is_contiguous(memory_format=memory_format)


def convolutions_of(call):
    return {
        name: count
        for name, count in operators(call).items()
        if name in ('aten::convolution', 'mkldnn::_convolution_pointwise')
    }


@pytest.mark.usefixtures('whatever_size')
def test_what_is_rearranged_in_training():
    x = make_input(2, 32, 12, 12).to(memory_format=torch.channels_last).requires_grad_()
    pointwise = nn.Conv2d(32, 32, 1, bias=False)
    assert not convolutions_of(lambda: rearrange(pointwise, x).sum().backward())
    assert convolutions_of(lambda: pointwise(x))
    # The strided and dilated one meets a quarter of the pixels, and is convolved on them.
    sparse = nn.Conv2d(32, 32, 3, stride=2, padding=2, dilation=2, groups=8, bias=False)
    y = rearrange(sparse, x)
    (subsampled, _), *_ = y.grad_fn.next_functions
    assert subsampled.name() == '_SubsampleBackward'
    # One without a common factor, and padding that none divides, stay as they are.
    for kwargs in (dict(stride=2, padding=3, dilation=3), dict(stride=2, padding=1, dilation=2)):
        y = rearrange(nn.Conv2d(32, 32, 3, **kwargs), x)
        assert y.grad_fn.name() == 'ConvolutionBackward0'
        assert y.grad_fn.next_functions[0][0].name() == 'torch::autograd::AccumulateGrad'


@pytest.mark.usefixtures('whatever_size')
def test_second_derivative_of_a_rearranged_convolution():
    conv = nn.Conv2d(2, 2, 3, stride=2, padding=2, dilation=2, dtype=torch.float64)
    x = make_input(1, 2, 5, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rearrange(conv, x), x)
    assert torch.autograd.gradgradcheck(lambda x: rearrange(conv, x).square(), x)


def test_small_weights_are_not_rearranged():
    x = make_input(2, 64, 4, 4).to(memory_format=torch.channels_last)
    least, small = (nn.Conv2d(64, channels, 1, bias=False) for channels in (128, 127))
    assert not convolutions_of(lambda: rearrange(least, x))
    assert convolutions_of(lambda: rearrange(small, x))


@torch.no_grad()
def test_large_weights_are_products_in_inference():
    x = make_input(2, 256, 4, 4).to(memory_format=torch.channels_last)
    large, small = (nn.Conv2d(256, channels, 1, bias=False) for channels in (512, 511))
    for conv in (large, small):
        torch.testing.assert_close(rearrange(conv, x), conv(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(convolve(conv, nn.Identity(), x, relu=True), conv(x).relu(), rtol=1e-5, atol=1e-5)
    assert not convolutions_of(lambda: rearrange(large, x))
    assert convolutions_of(lambda: rearrange(small, x))
    # Where the convolution takes the ReLU as well, it is a product if the weight is larger than both maps.
    assert 'aten::addmm' in operators(lambda: convolve(large, nn.BatchNorm2d(512).eval(), x[:1], relu=True))
    # So is the sum with a shortcut that may be overwritten, and none that is not laid out as the product.
    for bias in (True, False):
        large, norm = nn.Conv2d(256, 512, 1, bias=bias), nn.Identity()
        for size in ((4, 4), (1, 5), (1, 1)):
            x = make_input(1, 256, *size).to(memory_format=torch.channels_last)
            shortcut = make_input(1, 512, *size, seed=2)
            for relu in (True, False):
                expected = large(x) + shortcut
                expected = expected.relu() if relu else expected
                for other, stays in ((shortcut.to(memory_format=torch.channels_last).clone(), True), (shortcut, None)):
                    result = convolve(large, norm, x, relu, other, overwrite=True)
                    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
                    assert not stays or result.data_ptr() == other.data_ptr()
    wide = make_input(2, 256, 32, 32).to(memory_format=torch.channels_last)
    ran = operators(lambda: convolve(large, nn.Identity(), wide, relu=True))
    assert any('mkldnn::_convolution_pointwise' in name for name in ran)


@pytest.mark.usefixtures('whatever_size')
def test_what_is_not_rearranged():
    """Others' views of the convolution: FLOP counters, compilers' graphs, autocast, transforms, low precision."""
    conv = nn.Conv2d(32, 32, 1)
    x = make_input().to(memory_format=torch.channels_last)
    with FlopCounterMode(display=False) as counter:
        rearrange(conv, x)
    assert set(counter.get_flop_counts()['Global']) == {torch.ops.aten.convolution}
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert rearrange(conv, x).dtype == torch.bfloat16
        assert convolutions_of(lambda: rearrange(conv, x))
    assert convolutions_of(lambda: rearrange(copy.deepcopy(conv).bfloat16(), x.bfloat16()))
    batched = torch.func.vmap(lambda x: rearrange(conv, x))(torch.stack([x, 2 * x]))
    torch.testing.assert_close(batched, torch.stack([conv(x), conv(2 * x)]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rearrange(conv, x[0]), conv(x[0]))
    for wrong in (x.double(), x.bfloat16()):
        with pytest.raises(RuntimeError, match='type'):
            rearrange(conv, wrong)
        with torch.no_grad(), pytest.raises(RuntimeError, match='type'):
            convolve(conv, nn.Identity(), wrong, relu=True)
    with pytest.raises(RuntimeError, match=r'to have 32 channels, but got 16 channels'):
        rearrange(conv, x[:, :16].contiguous(memory_format=torch.channels_last))


def make_stage(kind, in_channels=16, units=3):
    torch.manual_seed(0)
    shape = dict(cardinality=4, base_width=16) if kind is SKBottleneck else {}
    layers = []
    for i in range(units):
        channels = in_channels if i == 0 else 32
        down = None
        if channels != 32:
            down = nn.Sequential(nn.Conv2d(channels, 32, 1, bias=False), nn.BatchNorm2d(32))
        layers.append(kind(channels, 32 // kind.expansion, downsample=down, **shape))
    return randomise(Stage(*layers)).eval()


@pytest.fixture
def sums(monkeypatch):
    """Of every sum with a shortcut: whether the result lies where the shortcut did."""
    found = []

    def recording(conv, norm, x, relu=False, shortcut=None, overwrite=False):
        y = convolve(conv, norm, x, relu, shortcut, overwrite)
        if shortcut is not None:
            found.append(y.data_ptr() == shortcut.data_ptr())
        return y

    monkeypatch.setattr(conv_bn_act, 'convolve', recording)
    return found


@pytest.mark.parametrize('folded', [False, True], ids=['as trained', 'folded'])
@pytest.mark.parametrize('in_channels', [16, 32], ids=['downsample', 'no downsample'])
@pytest.mark.parametrize('kind', [SKBottleneck, SKBasicBlock])
def test_units_of_a_stage_overwrite_their_inputs(kind, in_channels, folded, sums):
    stage = make_stage(kind, in_channels)
    x = make_input(2, in_channels, 32, 32).to(memory_format=torch.channels_last)
    before, expected = x.clone(), stage(x).detach()
    stage = sk_plugins.fuse(stage) if folded else stage
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(stage(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)
    assert sums == 2 * [in_channels == 16, True, True]


@torch.no_grad()
def test_units_overwrite_channels_last_maps_only(sums):
    stage = make_stage(SKBottleneck)
    x = make_input(2, 16, 32, 32)
    expected = stage(x.to(memory_format=torch.channels_last))
    sums.clear()
    result = stage(x)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert result.is_contiguous()
    assert sums == [False, False, False]


@pytest.mark.parametrize('name', ['1', '0.act', '0.conv2', '1.conv1', '0.downsample', '0.conv3.bn'])
@torch.no_grad()
def test_no_input_is_overwritten_that_a_hook_may_keep(name, sums):
    stage = make_stage(SKBottleneck)
    x = make_input(2, 16, 32, 32).to(memory_format=torch.channels_last)
    expected, kept, copies = stage(x), [], []
    assert sums == [True, True, True]
    sums.clear()

    def keep(module, inputs, output):
        kept.append(output)
        copies.append(output.clone())

    stage.get_submodule(name).register_forward_hook(keep)
    torch.testing.assert_close(stage(x), expected, rtol=1e-5, atol=1e-5)
    assert sums
    assert not any(sums)
    if name != '0.conv3.bn':  # to which the unit itself adds, in place, as timm's
        assert torch.equal(kept[0], copies[0])


class Keeping(nn.Module):
    """A user's module, which returns what it was given the first time."""

    def __init__(self, module):
        super().__init__()
        self.module, self.kept = module, None

    def forward(self, x):
        if self.kept is None:
            self.kept = self.module(x)
        return self.kept


@pytest.mark.parametrize('name', ['downsample', 'conv1', 'act'])
@torch.no_grad()
def test_what_a_foreign_module_keeps_is_not_overwritten(name, sums):
    stage = make_stage(SKBottleneck)
    x = make_input(2, 16, 32, 32).to(memory_format=torch.channels_last)
    expected = stage(x)
    sums.clear()
    setattr(stage[0], name, Keeping(getattr(stage[0], name)))
    for _ in range(3):
        torch.testing.assert_close(stage(x), expected, rtol=1e-5, atol=1e-5)
    assert not any(sums)


@torch.no_grad()
def test_a_downsample_without_a_convolution_keeps_the_input(sums):
    stage = make_stage(SKBottleneck, in_channels=32)
    stage[0].downsample = nn.Identity()
    x = make_input(2, 32, 32, 32).to(memory_format=torch.channels_last)
    before = x.clone()
    stage(x)
    assert torch.equal(x, before)
    assert sums == [False, True, True]


@torch.no_grad()
def test_a_patched_unit_is_called():
    stage = make_stage(SKBottleneck)
    x = make_input(2, 16, 32, 32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SKBottleneck, 'forward', lambda self, x: x + 1)
        torch.testing.assert_close(stage(x), x + 3)


@pytest.mark.parametrize('folded', [False, True], ids=['as trained', 'folded'])
@pytest.mark.parametrize('kind', [SKBottleneck, SKBasicBlock])
@torch.no_grad()
def test_transforms_of_a_stage_in_inference(kind, folded):
    stage = make_stage(kind)
    stage = sk_plugins.fuse(stage) if folded else stage
    x = make_input(2, 16, 32, 32).to(memory_format=torch.channels_last)
    expected = stage(x)
    close = dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.func.vmap(stage)(torch.stack([x, x]))[1], expected, **close)
    torch.testing.assert_close(torch.func.functionalize(stage)(x), expected, **close)
    torch.testing.assert_close(torch.func.jvp(stage, (x,), (x,))[0], expected, **close)


@torch.no_grad()
def test_features_of_inference_may_be_changed_in_training():
    """As a frozen backbone's are by the head that is trained on them."""
    conv = nn.Conv2d(256, 512, 1)
    x = make_input(1, 256, 3, 3).to(memory_format=torch.channels_last)
    features = [rearrange(conv, x), convolve(conv, nn.Identity(), x, relu=True)]
    with torch.enable_grad():
        for feature in features:
            feature += torch.ones(512, 1, 1, requires_grad=True)
            assert feature.requires_grad


@pytest.mark.usefixtures('whatever_size')
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['NCHW', 'NHWC'])
def test_gradients_have_the_weights_strides(memory_format):
    conv = nn.Conv2d(32, 16, 1).to(memory_format=memory_format)
    rearrange(conv, make_input().to(memory_format=torch.channels_last)).sum().backward()
    assert conv.weight.grad.stride() == conv.weight.stride()


@pytest.mark.usefixtures('whatever_size')
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['NCHW', 'NHWC'])
def test_gradients_of_many_at_once(memory_format):
    """As vectorised Jacobians ask for them."""
    conv = nn.Conv2d(4, 2, 3, stride=2, padding=2, dilation=2, dtype=torch.float64)
    x = make_input(2, 4, 5, 5).double().to(memory_format=memory_format)
    expected, jacobian = (
        torch.autograd.functional.jacobian(f, x, vectorize=True) for f in (conv, lambda x: rearrange(conv, x))
    )
    torch.testing.assert_close(jacobian, expected)


@torch.no_grad()
def test_a_unit_by_itself_and_foreign_units_keep_their_inputs(sums):
    stage = make_stage(SKBottleneck)
    x = make_input(2, 32, 32, 32).to(memory_format=torch.channels_last)
    before = x.clone()
    stage[1](x)
    Stage(nn.Identity(), stage[1], nn.Identity(), stage[2])(x)
    assert torch.equal(x, before)
    assert sums == [False, False, False]
