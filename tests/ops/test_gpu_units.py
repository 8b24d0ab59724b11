"""Whole units and networks by the GPU's engine: numbers, gradients, steps, memory, and what the host does for them."""

import copy
import itertools

import pytest
import torch
from helpers.engines import (
    DEVICE,
    copies,
    draw,
    every_gradient,
    randomise,
    runs,
    set_backend,
    sizes_kept,
    slow,
    slowly,
)
from torch import nn

from sk_plugins import SelectiveKernel
from sk_plugins.fuse import fold_batch_norm
from sk_plugins.networks.resnet import SKBasicBlock, SKBottleneck, SKResNet
from sk_plugins.ops import ways

SK = dict(kernel_sizes=(3, 5), min_dim=4)
EPS = torch.finfo(torch.float32).eps


def shortcut(inputs, outputs, stride):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def pooled_shortcut(inputs, outputs, stride):
    return nn.Sequential(nn.AvgPool2d(2, stride, ceil_mode=True), *shortcut(inputs, outputs, 1))


UNITS = {
    'bottleneck': lambda: SKBottleneck(32, 8, cardinality=2, base_width=32, sk_kwargs=SK),
    'strided bottleneck': lambda: SKBottleneck(
        12, 8, 2, shortcut(12, 32, 2), cardinality=2, base_width=32, sk_kwargs=SK
    ),
    'pooled bottleneck': lambda: SKBottleneck(
        12, 8, 2, pooled_shortcut(12, 32, 2), sk_kwargs={**SK, 'select': 'shared'}
    ),
    'basic': lambda: SKBasicBlock(8, 8, sk_kwargs={**SK, 'split_input': True}),
    'strided basic': lambda: SKBasicBlock(6, 8, 2, shortcut(6, 8, 2), sk_kwargs=SK),
}


each_unit = pytest.mark.parametrize(
    'name', [name if name in ('strided bottleneck', 'strided basic') else slowly(name) for name in UNITS]
)


def make_unit(name, dtype=torch.float32):
    torch.manual_seed(0)
    unit, plain = copies(randomise(UNITS[name]()).to(DEVICE, memory_format=torch.channels_last))
    unit = unit.to(dtype)
    if dtype != torch.float32:
        plain.load_state_dict(unit.state_dict())
    x = draw(3, unit.conv1.conv.in_channels if 'bottle' in name else unit.conv1.in_channels, 6, 5, dtype=dtype)
    return unit.train(), plain.train(), x.contiguous(memory_format=torch.channels_last)


def assert_near(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        error = (actual[name].double() - want).norm()
        assert error <= tolerance * max(want.norm().item(), 1.0), f'{name}: {error:.2e} beside {want.norm():.2e}'


def check(unit, plain, x, tolerance):
    output_like = plain(x.double())
    plain.load_state_dict({**plain.state_dict(), **{k: v for k, v in unit.state_dict().items() if 'running' in k}})
    grad = draw(*output_like.shape, seed=9)
    found, expected = every_gradient(unit, x, grad), every_gradient(plain, x.double(), grad.double())
    assert_near(found, expected, tolerance)
    buffers = [{n: b for n, b in module.named_buffers() if 'running' in n} for module in (unit, plain)]
    assert_near(*buffers, tolerance)
    assert ways(unit) == {'triton': 1}
    assert ways(plain) == {'plain': 1}


@runs
class TestUnits:
    @each_unit
    def test_units_equal_the_plain_modules(self, name):
        """In training, with frozen norms, and in inference."""
        unit, plain, x = make_unit(name)
        terms = 5 * 6 * 5 * 32
        check(unit, plain, x, terms * EPS)
        if name.startswith('strided'):
            for module in (*unit.modules(), *plain.modules()):
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
            check(unit, plain, x, terms * EPS)
        with torch.no_grad():
            assert_near({'': unit.eval()(x)}, {'': plain.eval()(x.double())}, terms * EPS)

    @each_unit
    def test_folded_units_equal_the_plain_modules_in_inference(self, name):
        unit, plain, x = make_unit(name)
        unit, plain = fold_batch_norm(unit.eval()), fold_batch_norm(plain.eval())
        with torch.no_grad():
            assert_near({'': unit(x)}, {'': plain(x.double())}, 960 * EPS)
        assert (ways(unit), ways(plain)) == ({'triton': 1}, {'plain': 1})
        unit(x)
        assert ways(unit) == {'plain': 1}  # with gradients it is an ordinary module

    @pytest.mark.parametrize('lowered', ['autocast', 'modules'])
    def test_folded_units_of_half_precision(self, lowered):
        unit, plain, x = make_unit('strided bottleneck')
        unit, plain = fold_batch_norm(unit.eval()), fold_batch_norm(plain.eval())
        dtype = torch.bfloat16
        with torch.no_grad(), torch.autocast(DEVICE, dtype, enabled=lowered == 'autocast'):
            output = unit(x) if lowered == 'autocast' else unit.to(dtype)(x.to(dtype))
            assert output.dtype == dtype
        with torch.no_grad():
            assert_near({'': output}, {'': plain(x.double())}, 8 * torch.finfo(dtype).eps)
        assert ways(unit) == {'triton': 1}

    def test_gradients_that_are_differentiable_or_batched(self):
        unit, plain, x = make_unit('bottleneck')
        found = []
        for module in (unit, plain):
            y = module(x.to(next(module.parameters()).dtype)).square().mean((0, 2, 3))
            leaves = [module.conv1.conv.weight, module.conv2.paths[0].bn.weight, module.conv3.bn.bias]
            rows = torch.eye(2, len(y), dtype=y.dtype, device=y.device)
            batched = torch.autograd.grad(y, leaves, rows, is_grads_batched=True, retain_graph=True)
            first = torch.autograd.grad(y[0], leaves, create_graph=True)
            second = torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)
            found.append(dict(enumerate([*batched, *(grad.detach() for grad in first), *second])))
        assert ways(unit) == {'triton': 1}
        assert_near(*found, 4000 * EPS)

    @pytest.mark.parametrize('name', ['bottleneck', slowly('strided bottleneck')])
    def test_a_differentiable_gradient_of_a_unit_with_a_shortcut(self, name):
        """The shortcut is what the last convolution's map is made of: it must not be counted along both ways."""
        found = []
        for module, like in zip(make_unit(name), (torch.float32, torch.float64)):
            x = make_unit(name)[2].to(like).requires_grad_()
            y = module(x)
            found.append(torch.autograd.grad(y.square().sum(), x, create_graph=True)[0].detach())
        assert_near({'': found[0]}, {'': found[1]}, 960 * EPS)

    def test_nan_stays_nan(self):
        """As torch's ReLU has it: a loss that is NaN must be seen."""
        for training in (True, False):
            unit, plain, x = make_unit('bottleneck')
            x[0, 3, 2, 2] = torch.nan
            with torch.set_grad_enabled(training):
                outputs = [m.train(training)(x.to(t)) for m, t in ((unit, torch.float32), (plain, torch.float64))]
            assert outputs[1].isnan().any()
            assert torch.equal(outputs[0].isnan(), outputs[1].isnan())

    def test_gradients_of_one_value_are_tensors_of_their_own_and_lie_as_their_weights(self):
        unit, _, x = make_unit('strided bottleneck')
        grads = torch.autograd.grad(unit(x).square().sum(), list(unit.parameters()))
        assert len({grad.data_ptr() for grad in grads}) == len(grads)
        assert [grad.stride() for grad in grads] == [parameter.stride() for parameter in unit.parameters()]

    @slow
    def test_compiled_layers_run_the_kernels_as_operators(self):
        torch.compiler.reset()
        layer, plain = copies(randomise(SelectiveKernel(8, groups=2, **SK)).to(DEVICE))
        compiled = torch.compile(layer, backend='aot_eager', fullgraph=True)
        x, grad = draw(3, 8, 4, 3), draw(3, 8, 4, 3, seed=1)
        for training in (True, False):
            layer.train(training), plain.train(training)
            found = every_gradient(compiled, x, grad)
            expected = every_gradient(plain, x.double(), grad.double())
            assert_near({name.removeprefix('_orig_mod.'): g for name, g in found.items()}, expected, 960 * EPS)
        layer.train()
        empty = draw(0, 8, 4, 3).requires_grad_()
        compiled(empty).sum().backward()  # changes no statistics
        assert empty.grad.shape == empty.shape
        assert_near(*({n: b for n, b in m.named_buffers() if 'running' in n} for m in (layer, plain)), 960 * EPS)
        torch.compiler.reset()

    @slow
    def test_half_precision_modules_and_autocast(self):
        dtype = torch.bfloat16
        eps = torch.finfo(dtype).eps
        unit, plain, x = make_unit('strided bottleneck', dtype)
        check(unit, plain, x, 64 * eps)
        unit, plain, x = make_unit('bottleneck')
        grad = draw(3, 32, 6, 5, seed=9)
        with torch.autocast(DEVICE, dtype):
            output = unit(x)
        assert output.dtype == dtype
        output.backward(grad.to(dtype))
        expected = every_gradient(plain, x.double(), grad.double())
        found = {'output': output.detach(), **{n: p.grad for n, p in unit.named_parameters()}}
        assert all(p.grad.dtype == torch.float32 for p in unit.parameters())
        del expected['input']
        assert_near(found, expected, 64 * eps)

    @slow
    def test_frozen_weights_and_inputs_without_gradients(self):
        unit, plain, x = make_unit('strided bottleneck')
        for module in (unit, plain):
            for name, parameter in module.named_parameters():
                parameter.requires_grad_('bn' not in name and 'downsample' not in name)
        check(unit, plain, x, 960 * EPS)
        for frozen in (True, False):
            for module in (unit, plain):
                module.requires_grad_(not frozen)
            assert unit(x).requires_grad == (not frozen)

    @slow
    def test_two_forwards_before_one_backward_and_a_graph_kept(self):
        unit, plain, x = make_unit('bottleneck')
        for module in (unit, plain):
            inputs = x.to(next(module.parameters()).dtype)
            loss = module(inputs).square().mean() + module(inputs.flip(0) * 2).square().mean()
            loss.backward(retain_graph=True)
            once = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
            loss.backward()
            for name, parameter in module.named_parameters():
                torch.testing.assert_close(parameter.grad, 2 * once[name], rtol=4 * EPS, atol=EPS, msg=name)
        grads = [{name: parameter.grad for name, parameter in module.named_parameters()} for module in (unit, plain)]
        assert_near(*grads, 960 * EPS)

    @slow
    def test_gradients_share_no_memory_that_they_both_use(self):
        """The two norms of a strided unit's end have the same gradient of their shifts."""
        unit, _, x = make_unit('strided bottleneck')
        unit(x).square().sum().backward()
        places = [(p.grad.data_ptr(), p.grad.data_ptr() + p.grad.numel() * 4) for p in unit.parameters()]
        places.sort()
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))

    def test_a_shortcut_is_broadcast_or_refused_as_by_a_sum(self):
        torch.manual_seed(0)
        unit, plain = copies(randomise(SKBottleneck(1, 8, sk_kwargs=SK)).to(DEVICE))
        check(unit, plain, draw(3, 1, 4, 3), 960 * EPS)
        for backend in ('triton', 'plain'):
            unit = set_backend(SKBottleneck(12, 8, sk_kwargs=SK).to(DEVICE), backend)
            with pytest.raises(RuntimeError, match='size'):
                unit(draw(5, 12, 4, 3))

    def test_a_unit_keeps_each_map_once(self):
        """Input, y and u of conv1, y of M branches, V, y of conv3 and the output: 4 maps of 32 channels, 5 of 8."""
        unit, _, _ = make_unit('bottleneck')
        x = draw(4, 32, 16, 16).contiguous(memory_format=torch.channels_last).requires_grad_()
        width = unit.conv2.out_channels
        kept = [size // (4 * 256 * 4) for size in sizes_kept(lambda: unit(x)) if size >= 4 * 256 * 4 * width]
        assert kept == [width] * 5 + [32] * 3

    @slow
    def test_a_tiny_network(self):
        torch.manual_seed(0)
        widths = dict(channels=(8, 8, 16), cardinality=2, base_width=32, num_classes=3, sk_kwargs=SK)
        network, plain = copies(randomise(SKResNet((1, 1, 1), **widths)).to(DEVICE).train())
        x = draw(3, 3, 24, 24)
        grad = draw(3, 3, seed=1)
        assert_near(every_gradient(network, x, grad), every_gradient(plain, x.double(), grad.double()), 4000 * EPS)
        assert ways(network) == {'triton': 3}
        assert network._way == 'triton'  # the stem's

    @slow
    def test_twenty_optimiser_steps(self):
        """They leave the float64 parameters by less than a thousandth of what they have moved."""
        unit, plain, x = make_unit('strided basic')
        start = copy.deepcopy(plain.state_dict())
        x = x[:3, :, :4, :4].contiguous(memory_format=torch.channels_last)
        target = draw(3, 8, 2, 2, seed=3)
        for module in (unit, plain):
            dtype = next(module.parameters()).dtype
            optimiser = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
            for _ in range(20):
                optimiser.zero_grad()
                (module(x.to(dtype)) - target.to(dtype)).square().mean().backward()
                optimiser.step()
        for name, want in plain.state_dict().items():
            if name.endswith('num_batches_tracked'):
                assert unit.state_dict()[name] == want == 20
                continue
            moved = (want - start[name]).norm()
            assert moved > 0
            assert (unit.state_dict()[name].double() - want).norm() < 1e-3 * moved, name
