"""The engines as operators: what ``torch.compile`` and ``torch.export`` see of networks with ``backend='triton'``.

Here they run on plain torch; where there is a GPU, ``test_gpu_units`` runs the kernels behind them.
"""

import copy

import pytest
import timm
import torch
from helpers.engines import randomise, set_backend
from torch import nn
from torch.library import opcheck

from sk_plugins import SelectiveKernel
from sk_plugins.networks.resnet import SKResNet
from sk_plugins.ops import trial

OPS = torch.ops.sk_plugins
SETTINGS = {
    'two': dict(),
    'three': dict(kernel_sizes=(3, 5, 7)),
    'one': dict(kernel_sizes=(3,)),
    'shared': dict(select='shared'),
    'biased': dict(select_bias=True),
    'summed': dict(select='sum'),
    'split': dict(split_input=True),
    'strided': dict(stride=2),
}
# Compiling takes a second each: two branches, more of them, and none to select from, by default.
each_setting = pytest.mark.parametrize(
    'kwargs',
    [
        pytest.param(kwargs, id=name, marks=() if name in ('two', 'three', 'summed') else pytest.mark.slow)
        for name, kwargs in SETTINGS.items()
    ],
)
each_mode = pytest.mark.parametrize('training', [True, False], ids=['training', 'eval'])


@pytest.fixture(autouse=True)
def _no_compiled_code_is_left():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def make_layer(training=True, dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    return randomise(SelectiveKernel(8, groups=2, **kwargs)).to(dtype).train(training)


def make_input(batch=3, size=6, dtype=torch.float64, channels=8):
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, channels, size, size + 1, generator=generator, dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def assert_same(actual, expected, terms=1000):
    """Float64 sums of so many terms in two orders."""
    assert actual.keys() == expected.keys()
    for name in actual:
        size = max(expected[name].abs().max().item(), 1.0)
        tolerance = terms * torch.finfo(torch.float64).eps * size
        torch.testing.assert_close(
            actual[name].double(), expected[name].double(), rtol=0, atol=tolerance, msg=lambda m, n=name: f'{n}: {m}'
        )


def outcomes(layer, run, x):
    """Outputs and gradients of two calls, and the running statistics after them."""
    found = {}
    for step in range(2):
        output = run(x)
        grad = make_input(output.shape[0], output.shape[2]).to(output.dtype)
        grad = grad.repeat(1, -(-output.shape[1] // 8), 1, 1)[:, : output.shape[1], :, : output.shape[3]]
        leaves = [p for p in layer.parameters() if p.requires_grad]
        grads = torch.autograd.grad(output, leaves, grad)
        found[f'output {step}'] = output.detach()
        found |= {f'gradient {step} {i}': g for i, g in enumerate(grads)}
    return found | {name: b.clone() for name, b in layer.named_buffers()}


@pytest.mark.parametrize(
    'select', ['channel', *(pytest.param(select, marks=pytest.mark.slow) for select in ('shared', 'sum'))]
)
@each_mode
def test_opcheck(select, training):
    layer = make_layer(training, torch.float32, select=select, select_bias=select == 'channel')
    convs, norms, attention = layer.parts(False)
    ys = [c(make_input(dtype=torch.float32)).detach().requires_grad_() for c in convs]
    rows = [[n.weight for n in norms], [n.bias for n in norms]]
    rows += [[], []] if training else [[n.running_mean for n in norms], [n.running_var for n in norms]]
    of_attention = [None] * 7
    if attention is not None:
        reduce, norm, matrix = attention
        running = (None, None) if training else (norm.running_mean, norm.running_var)
        of_attention = [reduce.weight, norm.weight, norm.bias, matrix.weight, matrix.bias, *running]
    args = (ys, *rows, *of_attention, training, 1e-5)
    opcheck(OPS.norm_relu_select.default, args)
    v, saved = OPS.norm_relu_select(*args)
    detached = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args)
    opcheck(OPS.norm_relu_select_backward.default, (torch.ones_like(v), [t.detach() for t in saved], *detached))


@each_setting
@each_mode
def test_compiled_layers_equal_the_plain_modules(kwargs, training):
    layer = set_backend(make_layer(training, **kwargs), 'triton')
    plain = set_backend(copy.deepcopy(layer), 'plain')
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    x = make_input()
    assert_same(outcomes(layer, compiled, x), outcomes(plain, plain, x))
    (graph,) = graphs
    assert 'sk_plugins.norm_relu_select' in str(graph.graph)
    assert 'batch_norm' not in str(graph.graph)


@pytest.mark.slow
def test_compiled_through_autograd_with_dynamic_sizes():
    layer = set_backend(make_layer(), 'triton')
    plain = set_backend(copy.deepcopy(layer), 'plain')
    compiled = torch.compile(layer, backend='aot_eager', fullgraph=True, dynamic=True)
    for batch, size in ((3, 6), (4, 9), (5, 7)):
        x = make_input(batch, size)
        assert_same(outcomes(layer, compiled, x), outcomes(plain, plain, x))
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1


def tiny_network(**kwargs):
    torch.manual_seed(0)
    widths = dict(channels=(8, 16, 16), cardinality=2, base_width=32, small_stem=True, num_classes=3)
    return randomise(SKResNet((1, 1, 1), **widths, **kwargs))


@pytest.mark.parametrize('training', [True, pytest.param(False, marks=pytest.mark.slow)], ids=['training', 'eval'])
def test_a_compiled_network_equals_the_plain_one(training):
    network = set_backend(tiny_network().double().train(training), 'triton')
    plain = set_backend(copy.deepcopy(network), 'plain')
    compiled = torch.compile(network, backend='aot_eager', fullgraph=True)
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    found = []
    for model, run in ((network, compiled), (plain, plain)):
        output = run(x)
        grads = torch.autograd.grad(output.square().sum(), list(model.parameters()))
        grads = {str(i): g for i, g in enumerate(grads)}
        found.append({'output': output.detach(), **grads, **{n: b.clone() for n, b in model.named_buffers()}})
    assert_same(*found, terms=10_000)


def test_running_statistics_follow_those_of_batchnorm():
    """Of every branch and of the attention, over three batches of different sizes."""
    layer = set_backend(make_layer(), 'triton')
    plain = set_backend(copy.deepcopy(layer), 'plain')
    compiled = torch.compile(layer, backend='eager', fullgraph=True)
    for batch in (2, 3, 5):
        for run in (compiled, plain):
            run(make_input(batch))
    buffers = [dict(module.named_buffers()) for module in (layer, plain)]
    assert len(buffers[0]) == 9
    assert_same(*buffers)
    assert int(layer.attn.bn.num_batches_tracked) == 3


def test_half_precision_under_autocast():
    layer = set_backend(make_layer(dtype=torch.float32), 'triton')
    plain = set_backend(copy.deepcopy(layer).double(), 'plain')
    compiled = torch.compile(layer, backend='aot_eager', fullgraph=True)
    x = make_input(dtype=torch.bfloat16)
    with torch.autocast('cpu', torch.bfloat16):
        output = compiled(x.float())
    assert output.dtype == torch.bfloat16
    expected = plain(x.double())
    output.float().square().mean().backward()
    expected.square().mean().backward()
    eps = torch.finfo(torch.bfloat16).eps
    assert (output - expected).norm() < 4 * eps * expected.norm()
    for (name, ours), theirs in zip(layer.named_parameters(), plain.parameters()):
        assert ours.grad.dtype == torch.float32, name
        assert (ours.grad - theirs.grad).norm() < 16 * eps * theirs.grad.norm(), name


@each_setting
def test_exported_programs_hold_the_operator_and_equal_the_layer(kwargs):
    layer = set_backend(make_layer(False, **kwargs), 'triton').requires_grad_(False)
    sizes = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(layer, (make_input(),), dynamic_shapes=(sizes,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count('sk_plugins.norm_relu_select.default') == 1
    plain = set_backend(copy.deepcopy(layer), 'plain')
    for batch, size in ((3, 6), (5, 8)):
        x = make_input(batch, size)
        assert_same({'output': program.module()(x)}, {'output': plain(x)})


def test_other_backends_leave_no_operator_in_a_graph():
    for backend in ('auto', 'plain', 'recompute'):
        layer = set_backend(make_layer(False), backend)
        program = torch.export.export(layer, (make_input(),))
        assert not [node for node in program.graph.nodes if 'sk_plugins' in str(node.target)]


def test_a_compiler_heeds_the_environment_and_what_a_trial_found(monkeypatch):
    layer = set_backend(make_layer(False), 'triton')

    def has_operator():
        torch._dynamo.reset()
        program = torch.export.export(layer, (make_input(),))
        return any('sk_plugins' in str(node.target) for node in program.graph.nodes)

    assert has_operator()
    monkeypatch.setenv('SK_PLUGINS_ENGINE', 'plain')
    assert not has_operator()
    monkeypatch.delenv('SK_PLUGINS_ENGINE')
    subject = torch.device('cpu'), torch.float32, 'inference', True
    monkeypatch.setitem(trial._verdicts, subject, {'wrong': 'they differ', 'ratios': {}})
    assert not has_operator()


def test_norms_whose_values_lie_apart():
    """In a graph, whose operators take copies of them."""
    layer = set_backend(make_layer(False), 'triton')
    norm = layer.paths[0].bn
    norm.weight.data = torch.stack([norm.weight.data, torch.full_like(norm.weight, 7)], 1)[:, 0]
    plain = set_backend(copy.deepcopy(layer), 'plain')
    compiled = torch.compile(layer, backend='eager', fullgraph=True)
    assert_same(outcomes(layer, compiled, make_input()), outcomes(plain, plain, make_input()))


def test_no_gradient_of_a_map_is_copied():
    convs, norms, attention = make_layer(dtype=torch.float32).parts(False)
    ys = [conv(make_input(dtype=torch.float32)).detach() for conv in convs]
    reduce, norm, matrix = attention
    of_attention = [t.detach() for t in (reduce.weight, norm.weight, norm.bias, matrix.weight)]
    rows = [[n.weight.detach() for n in norms], [n.bias.detach() for n in norms], [], []]
    tensors = [ys, *rows, *of_attention, None, None, None, True, 1e-5]
    v, saved = OPS.norm_relu_select(*tensors)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        grads = OPS.norm_relu_select_backward(torch.ones_like(v), saved, *tensors)
    assert all(grad.is_contiguous(memory_format=torch.channels_last) for grad in grads[:2])
    copied = [event.input_shapes[0] for event in profile.events() if event.name == 'aten::clone']
    assert list(v.shape) not in copied


@pytest.mark.parametrize('change', ['hook', 'norm', 'activation'])
def test_layers_that_an_engine_does_not_know_are_compiled_as_they_are(change):
    layer = set_backend(make_layer(False), 'triton')
    seen = []
    if change == 'hook':
        layer.paths[0].bn.register_forward_hook(lambda module, args, output: seen.append(1))
    elif change == 'norm':
        layer.paths[0].bn = nn.GroupNorm(2, 8).double()
    else:
        layer.paths[1].act = nn.GELU()
    expected = layer(make_input())
    seen.clear()
    compiled = torch.compile(layer, backend='eager')
    assert_same({'output': compiled(make_input())}, {'output': expected})
    assert len(seen) == (change == 'hook')


def test_an_empty_batch():
    layer = set_backend(make_layer(False), 'triton')
    compiled = torch.compile(layer, backend='aot_eager', fullgraph=True)
    with torch.no_grad():
        assert compiled(make_input()[:0]).shape == (0, 8, 6, 7)


def test_the_named_network_compiles_to_an_operator_a_unit():
    model = set_backend(timm.create_model('sknet26', num_classes=3).eval().requires_grad_(False), 'triton')
    # torch 2.7's export is strict unless told otherwise, and then has the plain modules.
    program = torch.export.export(model, (torch.randn(2, 3, 64, 64),), strict=False)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count('sk_plugins.norm_relu_select.default') == 8
