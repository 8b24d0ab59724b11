"""The layer as a graph: scripted, traced, of torch.fx, exported and compiled."""

import copy

import pytest
import torch
from helpers.selective_kernels import (
    each_compiled_way,
    each_variant,
    each_way,
    make_input,
    make_layer,
)
from helpers.tolerances import assert_close


@each_way
def test_torch_script(kwargs):
    layer = make_layer(**kwargs)
    scripted = torch.jit.script(layer)
    for x in (make_input(), make_input(1, size=5)):
        assert_close(scripted(x), layer(x), length=layer)


@each_way
def test_torch_trace(kwargs):
    layer = make_layer(**kwargs)
    traced = torch.jit.trace(layer, make_input())
    for x in (make_input(), make_input(1, size=5)):
        assert_close(traced(x), layer(x), length=layer)


@each_compiled_way
def test_torch_compile_without_a_graph_break(kwargs):
    # Training is what has something to break: the check of the batch. A random layer has nothing to compare there.
    train = 'drop_layer' not in kwargs
    torch.compiler.reset()
    layer = make_layer(train=train, **kwargs).double()
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend='aot_eager')
    x, y = make_input().double().requires_grad_(), make_input().double().requires_grad_()
    output, expected = compiled(x), layer(y)
    # The variance of two pooled values amplifies the rounding of the order in which they were summed.
    assert_close(output, expected, length=layer, gain=1e3)
    output.square().mean().backward()
    expected.square().mean().backward()
    assert_close(x.grad, y.grad, length=layer, gain=1e3)


@pytest.mark.slow
def test_compiled_training_still_refuses_a_batch_of_one():
    torch.compiler.reset()
    compiled = torch.compile(make_layer(train=True), backend='aot_eager')
    compiled(make_input(3))
    # Dynamo wraps what it raises while tracing, and keeps the message; in torch 2.7 that of torch's batch_norm.
    with pytest.raises(Exception, match=r'batch of 1|more than 1 value per channel'):
        compiled(make_input(1))


@each_compiled_way
def test_torch_export(kwargs):
    layer = make_layer(**kwargs)
    dims = {0: torch.export.Dim('batch', min=1)}
    exported = torch.export.export(layer, (make_input(),), dynamic_shapes=(dims,)).module()
    for x in (make_input(), make_input(5)):
        assert_close(exported(x), layer(x), length=layer)


@each_variant
def test_fx_trace(kwargs):
    layer = make_layer(**kwargs)
    traced = torch.fx.symbolic_trace(layer)
    for x in (make_input(), make_input(1, size=5)):
        assert_close(traced(x), layer(x), length=layer)


def test_fx_trace_in_training_serves_evaluation():
    # Quantisation-aware training traces in training mode and evaluates later what it traced.
    layer = make_layer(train=True)
    traced = torch.fx.symbolic_trace(layer)
    with pytest.raises(ValueError, match=r'batch|more than 1 value'):
        traced(make_input(1))
    layer.eval()
    traced.eval()
    assert_close(traced(make_input(1)), layer(make_input(1)), length=layer)
