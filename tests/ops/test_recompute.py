"""The training path that recomputes against the plain one, through the layer that chooses between them."""

import copy

import pytest
import torch
from layer_pairs import SETTINGS, assert_same, make_input, make_pair, step, through
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

each_setting = pytest.mark.parametrize('kwargs', SETTINGS.values(), ids=SETTINGS.keys())


def recomputes(layer, x):
    """Whether the layer took the path under test."""
    return 'NormReluPool' in through(layer, x)


@each_setting
@pytest.mark.parametrize('norm_eval', [False, True], ids=['batch', 'running'])
def test_equals_the_plain_path(kwargs, norm_eval):
    layers = make_pair(**kwargs)
    for layer in layers:
        for module in layer.modules():
            if norm_eval and isinstance(module, nn.BatchNorm2d):
                module.eval()
    x = make_input()
    assert recomputes(copy.deepcopy(layers[0]), x.clone().requires_grad_())
    assert not recomputes(copy.deepcopy(layers[1]), x.clone().requires_grad_())
    assert_same(step(layers[0], x), step(layers[1], x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('shape', [(2, 8, 1, 1), (5, 8, 1, 9), (2, 8, 13, 6), (7, 8, 2, 2)], ids=str)
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_shapes_and_memory_formats(shape, memory_format):
    layer, plain = (layer.to(memory_format=memory_format) for layer in make_pair())
    x = make_input(shape).to(memory_format=memory_format)
    assert_same(step(layer, x), step(plain, x), rtol=1e-9, atol=1e-11)


def test_non_contiguous_input():
    layer, plain = make_pair()
    x = make_input((3, 8, 10, 14))[..., ::2, ::2].transpose(2, 3)
    assert_same(step(layer, x), step(plain, x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ('dtype', 'tolerance'), [(torch.float32, 2e-5), (torch.bfloat16, 0.3), (torch.float16, 0.03)], ids=str
)
def test_precision_is_the_types_own(dtype, tolerance):
    """Gradients in low precision err no more against float64's than the plain path's do."""
    layer, plain = make_pair()
    x = make_input((4, 8, 9, 9), dtype)
    _, exact, _ = step(copy.deepcopy(plain), x.double())
    errors = []
    for module in (layer, plain):
        output, grads, _ = step(module.to(dtype), x)
        assert output.dtype == dtype
        assert {grad.dtype for grad in grads.values()} == {dtype}
        errors.append([(grads[name].double() - exact[name]).norm() / exact[name].norm() for name in exact])
    for name, got, reference in zip(exact, *errors):
        assert got < 1.5 * reference + tolerance / 10, name
        assert got < tolerance, name


def test_batch_of_one_where_norms_are_frozen():
    layers = make_pair()
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    x = make_input((1, 8, 5, 5))
    assert_same(step(layers[0], x), step(layers[1], x), rtol=1e-9, atol=1e-11)


def test_what_batch_norm_refuses_is_refused():
    layer, _ = make_pair(select='sum')
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        layer(make_input((1, 8, 1, 1)))


def test_empty_batch_in_eval():
    layer, _ = make_pair()
    assert layer.eval()(make_input((0, 8, 5, 5))).shape == (0, 8, 5, 5)


@pytest.mark.parametrize('reentrant', [False, True])
def test_under_checkpointing(reentrant):
    layer, plain = make_pair()

    def run(layer, x):
        x = x.clone().requires_grad_()
        checkpoint(layer, x, use_reentrant=reentrant).backward(make_input(seed=2))
        return x.grad, [parameter.grad for parameter in layer.parameters()]

    for got, expected in zip(run(layer, make_input()), run(plain, make_input())):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_backward_twice_and_in_part():
    layer, plain = make_pair()
    results = []
    for module in (layer, plain):
        x = make_input().requires_grad_()
        output = module(x).square().sum()
        (attention,) = torch.autograd.grad(output, module.attn.fc_select.weight, retain_graph=True)
        first = torch.autograd.grad(output, [x, *module.parameters()], retain_graph=True)
        second = torch.autograd.grad(output, [x, *module.parameters()])
        results.append([attention, *first, *second])
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def test_gradients_accumulate():
    layer, plain = make_pair()
    for module in (layer, plain):
        for seed in (1, 2, 3):
            module(make_input(seed=seed)).square().sum().backward()
    for (name, got), expected in zip(layer.named_parameters(), plain.parameters()):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-9, atol=1e-11, msg=name)


def test_layer_used_twice_in_one_graph():
    layer, plain = make_pair()
    for module in (layer, plain):
        module(module(make_input())).square().sum().backward()
    for (name, got), expected in zip(layer.named_parameters(), plain.parameters()):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize(
    'frozen', ['attn', 'paths.0.conv', 'paths.0.bn', 'paths'], ids=['attention', 'conv', 'norm', 'branches']
)
def test_frozen_parts(frozen):
    layers = make_pair()
    for layer in layers:
        layer.get_submodule(frozen).requires_grad_(False)
    got, expected = step(layers[0], make_input()), step(layers[1], make_input())
    frozen_names = {name for name, grad in expected[1].items() if grad is None}
    assert frozen_names == {name for name, grad in got[1].items() if grad is None}
    for result in (got, expected):
        for name in frozen_names:
            del result[1][name]
    assert_same(got, expected, rtol=1e-9, atol=1e-11)


def test_branches_whose_inputs_need_no_gradient():
    """The first layer of a network that is frozen but for its norms: nothing to keep, the plain path."""
    layer, plain = make_pair()
    for module in (layer, plain):
        for path in module.paths:
            path.conv.requires_grad_(False)
        module(make_input()).square().sum().backward()
    assert not recomputes(layer, make_input())
    for (name, got), expected in zip(layer.named_parameters(), plain.parameters()):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize(('momentum', 'tracks'), [(0.3, True), (None, True), (0.1, False)])
def test_running_statistics(momentum, tracks):
    layers = make_pair()
    for layer in layers:
        for path in layer.paths:
            path.bn.momentum = momentum
            if not tracks:
                path.bn.track_running_stats = False
                path.bn.running_mean = path.bn.running_var = path.bn.num_batches_tracked = None
        for seed in (1, 2, 3):
            layer(make_input(seed=seed))
    assert_same(step(layers[0], make_input()), step(layers[1], make_input()), rtol=1e-9, atol=1e-11)
    for layer in layers:
        layer.eval()
    torch.testing.assert_close(layers[0](make_input()), layers[1](make_input()), rtol=1e-9, atol=1e-11)


def hook_the_act(layer):
    layer.paths[0].act.register_forward_hook(lambda module, inputs, output: None)


def sync_batch_norm(layer):
    layer.paths[0].bn = nn.SyncBatchNorm(8).double().eval()


def group_norm(layer):
    layer.paths[1].bn = nn.GroupNorm(2, 8).double()


def leaky(layer):
    layer.paths[1].act = nn.LeakyReLU()


@pytest.mark.parametrize('change', [hook_the_act, sync_batch_norm, group_norm, leaky])
def test_the_plain_path_where_branches_are_not_plain(change):
    layer, _ = make_pair()
    change(layer)
    assert not recomputes(layer, make_input().requires_grad_())


def test_the_plain_path_without_gradients():
    layer, _ = make_pair()
    x = make_input()
    with torch.no_grad():
        assert layer(x).grad_fn is None
    assert not recomputes(layer.requires_grad_(False), x.requires_grad_()) or layer(x).requires_grad


def test_what_is_kept():
    """Of a unit's M branches the convolutions' outputs are kept, where the plain path keeps the ReLUs' as well."""
    x = make_input((2, 8, 32, 32)).requires_grad_()
    size = x.numel() * x.element_size()
    kept = []
    for layer in make_pair():
        parameters = {tensor.untyped_storage().data_ptr() for tensor in layer.parameters()}
        storages = {}

        def pack(tensor, storages=storages, parameters=parameters):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = storage.nbytes(), tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x)
        kept.append(sum(nbytes for nbytes, _ in storages.values()) / size)
    # The input, and one or two maps for each of two branches; the attention's tensors are small.
    assert kept[0] == pytest.approx(3, abs=0.1)
    assert kept[1] == pytest.approx(5, abs=0.1)


def test_second_derivatives_are_refused():
    layer, plain = make_pair()
    for module in (layer, plain):
        x = make_input().requires_grad_()
        output = module(x).square().sum()
        if module is layer:
            with pytest.raises(RuntimeError, match=r"create_graph=True .*backend='plain'"):
                torch.autograd.grad(output, x, create_graph=True)
        else:
            (grad,) = torch.autograd.grad(output, x, create_graph=True)
            grad.sum().backward()


@pytest.mark.parametrize('backend', ['auto', 'recompute', 'triton'])
def test_functional_transforms_and_forward_mode_take_the_plain_way(backend):
    layer, plain = (module.eval() for module in make_pair())
    layer.backend = backend
    x = make_input((2, 8, 5, 5))
    parameters = dict(plain.named_parameters())
    results = []
    for module in (layer, plain):

        def loss(parameters, x, module=module):
            return torch.func.functional_call(module, parameters, (x[None],)).square().sum()

        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(module(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
        results.append([*per_sample.values(), tangent])
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
