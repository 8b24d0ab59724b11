"""Gradients are right for whoever asks: parts of the graph, in any order, repeatedly, batched, twice differentiated."""

import copy

import pytest
import torch
from helpers.fuzzing import fuzz
from helpers.gate_cases import CLOSE
from helpers.layer_pairs import SETTINGS, make_input, make_pair, through
from helpers.plain_engine import put_in_place
from helpers.tolerances import bounds
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

pipelining = pytest.importorskip('torch.distributed.pipelining._backward', exc_type=ImportError)


@pytest.fixture(params=['recompute', 'triton'])
def pair(request, monkeypatch):
    """Makes a layer that an engine computes, and the same layer as plain modules."""
    if request.param == 'triton':
        put_in_place(monkeypatch)

    def make(**kwargs):
        layer, plain = make_pair(**kwargs)
        assert 'NormReluSelect' in through(copy.deepcopy(layer), make_input())
        assert 'NormReluSelect' not in through(copy.deepcopy(plain), make_input())
        return layer, plain

    return make


@pytest.mark.parametrize('last', [False, True], ids=['in a stage', 'the last of a stage'])
def test_zero_bubble_pipelines(pair, last):
    """They split a backward pass in two: first the input's gradient, later the parameters'."""
    if last and torch.__version__ < '2.15':
        pytest.skip('torch 2.7 and 2.11 free the node of any autograd.Function that is the last of a stage')
    for kwargs in SETTINGS.values():
        layer, _ = pair(**kwargs)
        if not last:
            layer = nn.Sequential(layer, nn.Conv2d(layer.out_channels, 4, 1, dtype=torch.float64))
        x = make_input().requires_grad_()
        loss = layer(x).square().mean()
        expected = torch.autograd.grad(loss, [x, *layer.parameters()], retain_graph=True)
        grads, groups = pipelining.stage_backward_input([loss], None, [x], iter(layer.parameters()))
        pipelining.stage_backward_weight(iter(layer.parameters()), groups)
        torch.testing.assert_close(grads[0], expected[0], **CLOSE)
        for parameter, grad in zip(layer.parameters(), expected[1:]):
            torch.testing.assert_close(parameter.grad, grad, **CLOSE)


def test_one_gradient_then_another_of_the_same_graph(pair):
    found = []
    for layer in pair():
        keep = []
        handle = layer.attn.bn.register_forward_hook(lambda module, inputs, output, keep=keep: keep.append(output))
        y = layer(make_input())
        torch.autograd.grad(y.square().mean(), layer.attn.fc_select.weight, retain_graph=True)
        found.append(torch.autograd.grad(keep[0].square().mean(), layer.paths[0].bn.weight))
        handle.remove()
        y = layer(make_input()).square().mean()
        for parameter in (layer.attn.fc_select.weight, layer.paths[0].bn.weight, layer.paths[1].conv.weight):
            found[-1] += torch.autograd.grad(y, parameter, retain_graph=True)
    torch.testing.assert_close(*found, **CLOSE)


def test_a_differentiable_gradient_of_a_norm_that_two_branches_share(pair):
    found = []
    for layer in pair():
        layer.paths[1].bn.weight = layer.paths[0].bn.weight
        y = layer(make_input()).square().sum()
        found += torch.autograd.grad(y, layer.paths[0].bn.weight, create_graph=True)
    torch.testing.assert_close(*found, **CLOSE)


@pytest.mark.parametrize('kwargs', SETTINGS.values(), ids=SETTINGS.keys())
def test_batched_gradients(kwargs, pair):
    layer, _ = pair(**kwargs)
    y = layer(make_input()).mean((0, 2, 3))
    parameters = [layer.paths[0].conv.weight, layer.paths[-1].bn.bias]
    single = [torch.autograd.grad(y[i], parameters, retain_graph=True) for i in range(2)]
    batched = torch.autograd.grad(y[:2], parameters, torch.eye(2, dtype=y.dtype), is_grads_batched=True)
    for got, *expected in zip(batched, *single):
        torch.testing.assert_close(got, torch.stack(expected), **CLOSE)


class Tagged(torch.Tensor):
    pass


def test_tensor_subclasses(pair):
    outputs = []
    for layer in pair():
        outputs.append(layer(make_input()))
        tagged = layer(make_input().as_subclass(Tagged))
        assert type(tagged) is Tagged
        torch.testing.assert_close(tagged.as_subclass(torch.Tensor), outputs[-1], **CLOSE)
        # A gradient that is one goes through an ordinary layer.
        y = layer(make_input())
        grads = []
        for grad in (torch.ones_like(y), torch.ones_like(y).as_subclass(Tagged)):
            (found,) = torch.autograd.grad(y, layer.paths[0].bn.weight, grad, retain_graph=True)
            grads.append(found.as_subclass(torch.Tensor))
        torch.testing.assert_close(*grads, **CLOSE)
    torch.testing.assert_close(*outputs, **CLOSE)


@st.composite
def questions(draw):
    """What is asked of one graph, in turn: of which outputs, for which leaves, batched or not."""
    one = st.tuples(
        st.lists(st.integers(0, 12), min_size=1, max_size=4, unique=True),
        st.sampled_from(['single', 'single', 'batched', 'twice']),
        st.integers(0, 3),
    )
    return draw(st.lists(one, min_size=1, max_size=4))


SMALL = st.fixed_dictionaries(
    dict(
        kernel_sizes=st.sampled_from([(3,), (1, 3), (3, 5), (1, 3, 5)]),
        select=st.sampled_from(['channel', 'shared', 'sum']),
        stride=st.integers(1, 2),
        select_bias=st.booleans(),
    )
)


@pytest.mark.parametrize('engine', ['recompute', 'triton'])
@fuzz(quick=25, share=0.5)
@given(SMALL, questions(), st.booleans(), st.booleans())
def test_any_part_order_and_repetition(engine, kwargs, asked, frozen, channels_last):
    answers = []
    with pytest.MonkeyPatch.context() as patch:
        if engine == 'triton':
            put_in_place(patch)
        for layer in make_pair(channels=4, **kwargs):
            if frozen:
                layer.eval()
            x = make_input((2, 4, 3, 4))
            x = x.to(memory_format=torch.channels_last) if channels_last else x
            leaves = [x.requires_grad_(), *layer.parameters()]
            y = layer(x)
            assert layer._way == ('plain' if layer.backend == 'plain' else engine)
            means = y.square().mean((0, 2, 3))
            found = []
            for chosen, kind, output in asked:
                inputs = [leaves[i % len(leaves)] for i in dict.fromkeys(i % len(leaves) for i in chosen)]
                if kind == 'batched':
                    grads = torch.eye(4, dtype=y.dtype)[: output + 1]
                    ask = dict(outputs=means, grad_outputs=grads, is_grads_batched=True)
                else:
                    ask = dict(outputs=means[output], create_graph=kind == 'twice')
                grads = torch.autograd.grad(**ask, inputs=inputs, retain_graph=True, allow_unused=True)
                found += [grad.detach() for grad in grads if grad is not None]
                differentiable = [grad for grad in grads if grad is not None and grad.requires_grad]
                if kind == 'twice' and differentiable:
                    total = sum(grad.square().sum() for grad in differentiable)
                    second = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
                    found += [torch.zeros_like(leaf) if s is None else s for leaf, s in zip(leaves, second)]
            answers.append(found)
    torch.testing.assert_close(*answers, **bounds(torch.float64, length=10_000, gain=1e3))


@pytest.mark.parametrize('kwargs', [{}, dict(select='sum'), dict(kernel_sizes=(1, 3, 5), select='shared')], ids=str)
def test_first_and_second_derivatives_by_differences(kwargs, pair):
    layer, _ = make_pair(channels=2, **kwargs)
    for path in layer.paths:
        nn.init.constant_(path.bn.bias, 6.0)  # away from the kink of the ReLU
    if layer.attn is not None:
        nn.init.constant_(layer.attn.bn.bias, 6.0)
    x = make_input((2, 2, 2, 3)).requires_grad_()
    assert torch.autograd.gradcheck(layer, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, x, fast_mode=True)


@pytest.mark.parametrize('reentrant', [False, True])
def test_checkpointing(reentrant, pair):
    results = []
    for layer in pair():
        x = make_input().requires_grad_()
        checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
        results.append([x.grad, *(parameter.grad for parameter in layer.parameters())])
    torch.testing.assert_close(*results, **CLOSE)


def test_saved_tensors_go_through_hooks(pair):
    """Packed as others pack them, to disk or in less precision; nothing is kept beside them."""
    results = []
    for layer in pair():
        packed = []
        hooks = (lambda t: packed.append(t) or (t.clone(),), lambda kept: kept[0])  # noqa: B023
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            y = layer(make_input()).square().sum()
        assert packed
        results.append(torch.autograd.grad(y, list(layer.parameters())))
    torch.testing.assert_close(*results, **CLOSE)


def test_accumulation_and_several_forwards_before_a_backward(pair):
    results = []
    for layer in pair():
        for seed in (1, 2, 3):
            layer(make_input(seed=seed)).square().sum().backward()
        losses = [layer(make_input(seed=seed)).square().sum() for seed in (4, 5)]
        for loss in losses[::-1]:
            loss.backward()
        layer(layer(make_input())).square().sum().backward()  # twice in one graph
        results.append([*(parameter.grad for parameter in layer.parameters()), *layer.buffers()])
    torch.testing.assert_close(*results, **CLOSE)


def test_backward_after_a_parameter_was_changed_is_refused(pair):
    """As autograd refuses it of the plain modules."""
    for layer in pair():
        y = layer(make_input()).square().sum()
        with torch.no_grad():
            layer.paths[0].bn.weight.mul_(2)
        with pytest.raises(RuntimeError, match='modified by an inplace operation'):
            y.backward()


def test_a_graph_is_gone_after_its_backward(pair):
    for layer in pair():
        y = layer(make_input()).square().sum()
        y.backward()
        with pytest.raises(RuntimeError, match='second time'):
            y.backward()


def test_compiled_units_run_in_inference():
    timm = pytest.importorskip('timm')
    torch.compiler.reset()
    narrow = dict(layers=(2, 1, 1, 1), channels=(8, 8, 8, 8), cardinality=2, base_width=16)
    model, ran = timm.create_model('sknet26', **narrow).eval(), []
    for unit in model.layer1:
        unit.compile(backend=lambda graph, _: lambda *args: (ran.append(1), graph(*args))[1])
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    assert len(ran) == 2
    torch.compiler.reset()


@pytest.mark.slow
def test_compiled_autograd():
    """A compiled backward of an eager forward."""
    from torch._dynamo import compiled_autograd

    torch.compiler.reset()
    results = []
    for layer in make_pair():
        y = layer(make_input()).square().sum()
        with compiled_autograd._enable(torch.compile(backend='eager')):
            y.backward()
        results.append([parameter.grad for parameter in layer.parameters()])
    torch.testing.assert_close(*results, **CLOSE)
    torch.compiler.reset()


def test_what_is_kept():
    """Of a unit's M branches the convolutions' outputs, where plain modules keep the ReLUs' as well."""
    x = make_input((2, 8, 32, 32)).requires_grad_()
    for kernel_sizes in ((3, 5), (3, 5, 7)):
        kept = []
        for layer in make_pair(kernel_sizes=kernel_sizes):
            parameters = {tensor.untyped_storage().data_ptr() for tensor in layer.parameters()}
            storages = {}

            def pack(tensor, storages=storages, parameters=parameters):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in parameters:
                    storages[storage.data_ptr()] = storage.nbytes(), tensor
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                layer(x)
            kept.append(sum(nbytes for nbytes, _ in storages.values()) / (x.numel() * x.element_size()))
        # The input, and one or two maps a branch; the attention's tensors are small.
        assert kept[0] == pytest.approx(1 + len(kernel_sizes), abs=0.1)
        assert kept[1] == pytest.approx(1 + 2 * len(kernel_sizes), abs=0.1 + (len(kernel_sizes) > 2))
