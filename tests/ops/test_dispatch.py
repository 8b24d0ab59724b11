"""Every way from the convolutions to the selected map gives the plain one's numbers, and 'auto' picks the right one."""

import logging
from types import MethodType, SimpleNamespace

import pytest
import torch
from layer_pairs import SETTINGS, assert_same, make_input, make_pair, step, through
from norm_calls import count_norms
from torch import nn
from torch._subclasses import FakeTensorMode

from sk_plugins.layers import SelectiveKernelAttention
from sk_plugins.ops import BACKENDS, custom_ops, dispatch

each_setting = pytest.mark.parametrize('kwargs', SETTINGS.values(), ids=SETTINGS.keys())


@each_setting
@pytest.mark.parametrize('norm_eval', [False, True], ids=['batch', 'running'])
@pytest.mark.parametrize('backend', BACKENDS)
def test_backends_agree(backend, kwargs, norm_eval):
    layer, plain = make_pair(**kwargs)
    layer.backend = backend
    for module in (*layer.modules(), *plain.modules()):
        if norm_eval and isinstance(module, nn.BatchNorm2d):
            module.eval()
    assert_same(step(layer, make_input()), step(plain, make_input()), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('backend', BACKENDS)
@torch.no_grad()
def test_backends_agree_without_gradients(backend):
    layer, plain = make_pair()
    layer.backend = backend
    for module in (layer.eval(), plain.eval()):
        module.eval()
    torch.testing.assert_close(layer(make_input()), plain(make_input()), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ('backend', 'expected'), [('auto', 'NormReluPool'), ('recompute', 'NormReluPool'), ('triton', 'pool_branches')]
)
def test_which_way_is_taken(backend, expected):
    layer, plain = make_pair()
    layer.backend = backend
    names = through(layer, make_input().requires_grad_())
    assert expected in names
    assert ('NormReluPool' in names) + ('pool_branches' in names) == 1
    assert expected not in through(plain, make_input().requires_grad_())


@pytest.mark.parametrize('momentum', [0.3, None])
def test_running_statistics_through_the_custom_ops(momentum):
    layers = make_pair()
    layers[0].backend = 'triton'
    for layer in layers:
        for path in layer.paths:
            path.bn.momentum = momentum
        for seed in (1, 2, 3):
            layer(make_input(seed=seed))
    assert_same(step(layers[0], make_input()), step(layers[1], make_input()), rtol=1e-9, atol=1e-11)


def test_autocast():
    """Half-precision maps, float32 parameters: no further from float64 than the plain way."""
    x = make_input((4, 8, 9, 9))
    gradient = make_input(x.shape, torch.bfloat16, seed=2)
    plain = make_pair()[1]
    plain(x).backward(gradient.double())
    exact = {name: parameter.grad for name, parameter in plain.named_parameters()}
    errors = {}
    for backend in ('plain', 'recompute', 'triton'):
        module = make_pair(torch.float32)[0]
        module.backend = backend
        with torch.autocast('cpu', torch.bfloat16):
            output = module(x.float())
        assert output.dtype == torch.bfloat16
        output.backward(gradient)
        for name, parameter in module.named_parameters():
            assert parameter.grad.dtype == torch.float32
            errors[backend, name] = ((parameter.grad - exact[name]).norm() / exact[name].norm()).item()
    for backend in ('recompute', 'triton'):
        for name in exact:
            assert errors[backend, name] < 1.6 * errors['plain', name] + 0.05, (backend, name)


def test_compiles_with_the_custom_ops():
    layer, plain = make_pair()
    layer.backend = 'triton'
    compiled = torch.compile(layer, fullgraph=True, backend='aot_eager')
    x = make_input().requires_grad_()
    (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    (expected,) = torch.autograd.grad(plain(x).square().sum(), x)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('dtype', custom_ops.DTYPES)
def test_the_check_before_first_use_passes(dtype):
    assert dispatch._passes_check.__wrapped__(torch.device('cpu'), dtype)


def test_the_check_is_free_of_the_callers_modes():
    """The first unit on a GPU may run in inference, in a checkpoint, or under a default device."""
    packed = []
    with (
        torch.inference_mode(),
        torch.device('meta'),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: packed.append(tensor) or tensor, lambda tensor: tensor),
        FakeTensorMode(),
    ):
        assert dispatch._passes_check.__wrapped__(torch.device('cpu'), torch.float32)
    assert not packed


def test_a_kernel_that_failed_in_the_check_is_not_used(monkeypatch):
    monkeypatch.setattr(custom_ops, '_failure', 'a Triton kernel failed')
    assert not dispatch._passes_check.__wrapped__(torch.device('cpu'), torch.float32)


def test_what_the_kernels_cannot_serve_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(custom_ops, '_logged', set())
    branches = [SimpleNamespace(is_cuda=True, dtype=torch.float64, shape=(2, 8, 7, 5), device=torch.device('cuda'))] * 2
    with caplog.at_level(logging.WARNING, 'sk_plugins'):
        assert not custom_ops.serves(branches)
        assert not custom_ops.serves(branches)
    assert len(caplog.records) == 1
    assert 'plain torch, which is slower' in caplog.text


def test_kernels_that_are_wrong_are_not_used(monkeypatch, caplog):
    right, calls = custom_ops.select, []

    def wrong(*args):
        calls.append(args)
        return right(*args) * (1 if len(calls) == 1 else 1.01)

    monkeypatch.setattr(custom_ops, 'select', wrong)
    with caplog.at_level(logging.WARNING, 'sk_plugins'):
        assert not dispatch._passes_check.__wrapped__(torch.device('cpu'), torch.float32)
    assert len(caplog.records) == 1
    assert 'differ from plain torch by 2.0e-02 on cpu' in caplog.text
    assert len(calls) == 2


def test_watched_attention_is_called():
    """A hook on the attention, as for recording it, sees every call."""
    layer, _ = make_pair()
    seen = []
    layer.attn.register_forward_hook(lambda module, inputs, output: seen.append(output))
    layer(make_input().requires_grad_())
    assert len(seen) == 1
    torch.testing.assert_close(seen[0].sum(1), torch.ones(3, 8, 1, 1, dtype=torch.float64))


@pytest.mark.parametrize('kwargs', [*SETTINGS.values(), dict(conv_bias=True)], ids=[*SETTINGS.keys(), 'conv bias'])
@torch.no_grad()
def test_inference_folds_norms_on_the_fly(kwargs):
    """Where maps are larger than weights: no pass for BatchNorm, and no module is changed."""
    layer, plain = (layer.eval() for layer in make_pair(**kwargs))
    x = make_input((3, 8, 32, 32))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    expected = plain(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-11)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(x, make_input((3, 8, 32, 32)))
    assert count_norms(layer, x) == (0 if layer.attn is None else 1)  # the attention's own
    with torch.enable_grad():
        assert count_norms(plain, x) == len(plain.paths) + (0 if layer.attn is None else 1)


@torch.no_grad()
def test_inference_folds_only_where_it_pays():
    layer, plain = (layer.eval() for layer in make_pair())
    small = make_input((1, 8, 3, 3))
    torch.testing.assert_close(layer(small), plain(small), rtol=1e-9, atol=1e-11)
    assert count_norms(layer, small) == 3


@pytest.mark.parametrize('grad', [True, False])
def test_a_norm_whose_forward_was_replaced_is_called(grad):
    layer, plain = (layer.eval() for layer in make_pair())
    calls = []
    norm = layer.paths[0].bn
    norm.forward = lambda y: calls.append(y) or nn.BatchNorm2d.forward(norm, y)
    x = make_input((3, 8, 32, 32))
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-9, atol=1e-11)
    assert len(calls) == 1


@torch.no_grad()
@pytest.mark.parametrize('grad', [True, False], ids=['grad', 'no_grad'])
@pytest.mark.parametrize('kind', ['patched', 'subclass'])
def test_attention_of_ones_own_is_called(kind, grad):
    def first(self, branches):
        weights = branches[0].new_zeros(branches[0].shape[0], len(branches), branches[0].shape[1], 1, 1)
        weights[:, 0] = 1
        return weights

    layer, _ = make_pair()
    x = make_input()
    if kind == 'patched':
        layer.attn.forward = MethodType(first, layer.attn)
    else:
        layer.attn.__class__ = type('First', (SelectiveKernelAttention,), {'forward': first})
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(layer.eval()(x), layer.paths[0](x), rtol=1e-9, atol=1e-11)


def test_watched_convolutions_see_their_own_output():
    layer, _ = make_pair()
    layer.eval()
    seen = []
    layer.paths[0].conv.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    x = make_input((3, 8, 32, 32))
    layer(x)
    torch.testing.assert_close(seen[0], layer.paths[0].conv._conv_forward(x, layer.paths[0].conv.weight, None))


@each_setting
@torch.no_grad()
def test_compiled_inference(kwargs):
    """Folded as in eager mode, one graph, whatever the batch."""
    torch.compiler.reset()
    layer, plain = (layer.eval() for layer in make_pair(**kwargs))
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes])
        return graph

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for batch in (3, 5, 2):
        x = make_input((batch, 8, 32, 32))
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-9, atol=1e-11)
    # One for the first size, one for all.
    assert len(graphs) == 2
    norms = 0 if layer.attn is None else 1
    assert [graph.count(nn.functional.batch_norm) for graph in graphs] == [norms, norms]


def test_attention_projects_by_matrix_product_unless_watched():
    layer, _ = make_pair()
    s = make_input((3, 8, 1, 1)).requires_grad_()
    attention = layer.attn.attend(s)
    assert 'Convolution' not in through(layer.attn.attend, s)
    seen = []
    for conv in (layer.attn.fc_reduce, layer.attn.fc_select):
        conv.register_forward_hook(lambda module, inputs, output: seen.append(module))
    watched = layer.attn.attend(s)
    assert seen == [layer.attn.fc_reduce, layer.attn.fc_select]
    torch.testing.assert_close(attention, watched, rtol=1e-12, atol=1e-14)
