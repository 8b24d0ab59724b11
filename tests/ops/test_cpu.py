"""The CPU's engine against the plain modules: outputs equal bit for bit, gradients to rounding, statistics alike."""

import copy

import pytest
import timm
import torch
from helpers.layer_pairs import SETTINGS, assert_same, make_input, make_pair, step, through
from helpers.randomised import randomise
from helpers.tolerances import bounds, tolerance
from torch import nn

from sk_plugins.ops import ways

# A unit's sums have some thousand terms, and a norm of few values magnifies an error.
CLOSE = bounds(torch.float64, length=10_000, gain=10)
each_setting = pytest.mark.parametrize('kwargs', SETTINGS.values(), ids=SETTINGS.keys())


def freeze(layer):
    for module in layer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def assert_recomputes(layer):
    assert 'NormReluSelect' in through(copy.deepcopy(layer), make_input().to(next(layer.parameters()).dtype))


def plain_copy(model):
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if hasattr(module, 'backend'):
            module.backend = 'plain'
    return plain


@each_setting
@pytest.mark.parametrize('frozen', [False, True], ids=['batch', 'running'])
def test_equals_the_plain_modules(kwargs, frozen):
    layer, plain = make_pair(**kwargs)
    if frozen:
        freeze(layer)
        freeze(plain)
    got, expected = step(layer, make_input()), step(plain, make_input())
    assert (layer._way, plain._way) == ('recompute', 'plain')
    assert torch.equal(got[0], expected[0])
    for name, buffer in got[2].items():
        assert torch.equal(buffer, expected[2][name]), name
    assert_same(got, expected, **CLOSE)


@each_setting
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bits_of_other_precisions(kwargs, dtype):
    layer, plain = make_pair(dtype, **kwargs)
    x = make_input(dtype=dtype)
    got, expected = step(layer, x), step(plain, x)
    assert layer._way == 'recompute'
    assert got[0].dtype == dtype
    assert torch.equal(got[0], expected[0])
    assert {grad.dtype for grad in got[1].values()} == {dtype}
    for name, buffer in got[2].items():
        assert torch.equal(buffer, expected[2][name]), name


@pytest.mark.parametrize('shape', [(2, 8, 1, 1), (5, 8, 1, 9), (2, 8, 13, 6), (7, 8, 2, 2)], ids=str)
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['NCHW', 'NHWC'])
def test_sizes_and_memory_formats(shape, memory_format):
    layer, plain = (layer.to(memory_format=memory_format) for layer in make_pair())
    x = make_input(shape).to(memory_format=memory_format)
    before = x.clone()
    got, expected = step(layer, x), step(plain, x)
    assert torch.equal(got[0], expected[0])
    assert got[0].stride() == expected[0].stride()
    assert_same(got, expected, **CLOSE)
    assert torch.equal(x, before)


def test_maps_that_are_not_dense():
    layer, plain = make_pair()
    x = make_input((3, 8, 10, 14))[..., ::2, ::2].transpose(2, 3)
    got, expected = step(layer, x), step(plain, x)
    assert torch.equal(got[0], expected[0])
    assert_same(got, expected, **CLOSE)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_low_precision_are_as_good_as_the_plain_modules(dtype):
    """Against float64's, in units of the dtype's epsilon times the root of a gradient's number of terms."""
    layer, plain = make_pair()
    x = make_input((4, 8, 9, 9), dtype)
    _, exact, _ = step(copy.deepcopy(plain), x.double())
    floor = torch.finfo(dtype).eps * (4 * 9 * 9) ** 0.5
    errors = []
    for module in (layer, plain):
        grads = step(module.to(dtype), x)[1]
        errors.append([(grads[name].double() - exact[name]).norm() / exact[name].norm() for name in exact])
    for name, got, reference in zip(exact, *errors):
        assert got < 1.5 * reference + floor, name


def test_autocast():
    """Maps of bfloat16, parameters of float32: the same bits, and gradients no further from float64's."""
    x = make_input((4, 8, 9, 9))
    grad = make_input(x.shape, torch.bfloat16, seed=2)
    plain = make_pair()[1]
    plain(x).backward(grad.double())
    exact = {name: parameter.grad for name, parameter in plain.named_parameters()}
    outputs, errors = [], []
    for module in make_pair(torch.float32):
        with torch.autocast('cpu', torch.bfloat16):
            outputs.append(module(x.float()))
        outputs[-1].backward(grad)
        assert {parameter.grad.dtype for parameter in module.parameters()} == {torch.float32}
        errors.append([(p.grad - exact[name]).norm() / exact[name].norm() for name, p in module.named_parameters()])
    assert outputs[0].dtype == torch.bfloat16
    assert torch.equal(*outputs)
    floor = torch.finfo(torch.bfloat16).eps * (4 * 9 * 9) ** 0.5
    for name, got, reference in zip(exact, *errors):
        assert got < 1.5 * reference + floor, name


@pytest.mark.parametrize('frozen', ['attn', 'paths.0.conv', 'paths.0.bn', 'paths.1', 'attn.fc_select'])
def test_frozen_parts(frozen):
    layers = make_pair()
    for layer in layers:
        layer.get_submodule(frozen).requires_grad_(False)
    results = []
    for layer in layers:
        x = make_input().requires_grad_()
        layer(x).backward(make_input(seed=2))
        results.append({'x': x.grad, **{name: parameter.grad for name, parameter in layer.named_parameters()}})
    assert layers[0]._way == 'recompute'
    for name, grad in results[0].items():
        expected = results[1][name]
        assert (grad is None) == (expected is None) == name.startswith(frozen), name
        if grad is not None:
            torch.testing.assert_close(grad, expected, msg=name, **CLOSE)


@pytest.mark.parametrize('momentum', [0.0, 0.3, 1.0])
def test_running_statistics(momentum):
    layers = make_pair()
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum
        for seed in (1, 2, 3):
            layer(make_input(seed=seed))
    assert layers[0]._way == 'recompute'
    for (name, got), expected in zip(layers[0].named_buffers(), layers[1].buffers()):
        assert torch.equal(got, expected), name
        assert not name.endswith('num_batches_tracked') or got == 3
    outputs = [layer.eval()(make_input()) for layer in layers]
    assert torch.equal(*outputs)


def test_batch_of_one():
    """A message that says what to do, on either way; nothing counted; and none where norms are frozen."""
    layers = make_pair()
    for layer in layers:
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(ValueError, match='batch of 1'):
            layer(make_input((1, 8, 5, 5)))
        if layer is layers[0]:
            assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
        freeze(layer)
    layers[1].load_state_dict(layers[0].state_dict())  # module after module, the branches' norms have counted already
    x = make_input((1, 8, 5, 5))
    assert_same(step(layers[0], x), step(layers[1], x), **CLOSE)
    traced = torch.fx.symbolic_trace(make_pair()[0])
    with pytest.raises(ValueError, match=r'more than 1 value per channel'):
        traced(make_input((1, 8, 5, 5)))


def test_what_batch_norm_refuses_is_refused():
    for layer in make_pair(select='sum'):
        with pytest.raises(ValueError, match='more than 1 value per channel'):
            layer(make_input((1, 8, 1, 1)))


@pytest.mark.parametrize('training', [False, True])
def test_empty_batches(training):
    layer, plain = make_pair()
    layer.train(training), plain.train(training)
    results = []
    for module in (layer, plain):
        try:
            results.append(tuple(module(make_input((0, 8, 5, 5))).shape))
        except (ValueError, RuntimeError) as error:
            results.append(str(error))
    assert results[0] == results[1]
    assert training or results[0] == (0, 8, 5, 5)


NETWORKS = {
    'sknet26': dict(layers=(1, 1, 1, 1), channels=(8, 16, 16, 16), cardinality=4, base_width=16),
    'skshufflenetv2_x0_5': dict(layers=(2, 2, 2)),
}


def make_network(name):
    torch.manual_seed(0)
    return randomise(timm.create_model(name, num_classes=5, **NETWORKS[name])).double().train()


@pytest.mark.parametrize('name', NETWORKS)
def test_networks(name):
    """Outputs of a training step bit for bit, features of intermediate layers as they were, gradients to rounding."""
    model = make_network(name)
    plain = plain_copy(model)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    outputs, features = [], []
    for network in (model, plain):
        output = network(x)
        output.square().sum().backward()
        outputs.append(output)
        maps = network.forward_intermediates(x, intermediates_only=True)
        copies = [feature.clone() for feature in maps]
        network(x)
        assert all(map(torch.equal, maps, copies))
        features.append(maps)
    assert set(ways(model)) == {'recompute'}
    assert set(ways(plain)) == {'plain'}
    assert torch.equal(*outputs)
    assert all(map(torch.equal, *features))
    largest = max(parameter.grad.abs().max() for parameter in plain.parameters())
    for (key, got), expected in zip(model.named_parameters(), plain.parameters()):
        # Some gradients are zero but for rounding, of the size of the largest ones; every norm on the way magnifies it.
        allowed = tolerance(torch.float64, length=10_000, gain=1e6)
        torch.testing.assert_close(got.grad, expected.grad, rtol=allowed, atol=allowed / 1e4 * largest, msg=key)


def test_twenty_steps_of_an_optimiser():
    model = make_network('sknet26')
    plain = plain_copy(model)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64, generator=generator)
    target = torch.randint(5, (4,), generator=generator)
    losses = []
    for network in (model, plain):
        optimiser = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        losses.append([])
        for _ in range(20):
            loss = nn.functional.cross_entropy(network(x), target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses[-1].append(loss.item())
    assert losses[0][0] == losses[1][0]
    assert losses[0][-1] < losses[0][0]
    # Every step starts from what rounding has made of the weights.
    assert losses[0] == pytest.approx(losses[1], rel=tolerance(torch.float64, length=10_000, gain=1e7))
