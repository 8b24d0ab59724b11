"""Compilers and exporters take the networks, as they are and folded."""

import copy

import pytest
import torch
from helpers.folded_networks import (
    BATCH_STATISTICS,
    FAMILIES,
    make_input,
    make_model,
)
from helpers.tolerances import assert_close
from torch._dynamo.testing import CompileCounterWithBackend


def make_inputs(dtype=torch.float32):
    return [make_input(batch, size, dtype) for batch, size in ((2, 64), (3, 64), (5, 64))]


# As they are, timm_models/test_graphs.py has those that are ours alone.
STATES = [*((name, True) for name in FAMILIES), ('skresnet18', False), ('skresnet50d', False)]
SCRIPTED = [('sknet50', True), ('skresnet50d', False), ('skshufflenetv2_x1_0', True)]


@pytest.mark.parametrize(
    ('name', 'folded'),
    [state if state in SCRIPTED else pytest.param(*state, marks=pytest.mark.slow) for state in STATES],
)
@torch.no_grad()
def test_torchscript(name, folded):
    model = make_model(name, folded, torch.float64)
    scripted = torch.jit.script(model)
    for x in (make_input(dtype=torch.float64), make_input(1, 97, torch.float64)):
        assert_close(scripted(x), model(x), length=model)


@pytest.mark.parametrize(
    ('name', 'folded'),
    [
        ('sknet50', True),
        *(
            pytest.param(*state, marks=pytest.mark.slow)
            for state in (('skresnet50d', True), ('skresnet50d', False), ('skshufflenetv2_x1_0', True))
        ),
    ],
)
@torch.no_grad()
def test_torch_export(name, folded):
    model = make_model(name, folded, torch.float64)
    dynamic = ({0: torch.export.Dim('batch', min=1, max=64)},)
    program = torch.export.export(model, (make_input(dtype=torch.float64),), dynamic_shapes=dynamic).module()
    for x in (*make_inputs(torch.float64), make_input(1, dtype=torch.float64)):
        assert_close(program(x), model(x), length=model)


QUICK = [('sknet50', 'folded')]

COMPILED = [
    pytest.param(name, mode, marks=[] if (name, mode) in QUICK else pytest.mark.slow)
    for name in FAMILIES
    for mode in ('train', 'eval', 'folded')
]


@pytest.mark.parametrize(('name', 'mode'), COMPILED)
def test_compile(name, mode):
    """One graph for every batch, and equal outputs and gradients."""
    torch.compiler.reset()
    shape = dict(channels=(16, 32, 64), layers=(1, 1, 1) if 'shuffle' not in name else (1, 2, 1))
    model = make_model(name, mode == 'folded', torch.float64, **shape).train(mode == 'train')
    for parameter in model.parameters():
        parameter.requires_grad_()
    other = copy.deepcopy(model)
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(other, fullgraph=True, backend=counter)
    for batch in (2, 3, 5):
        x = make_input(batch, 32, torch.float64)
        torch._dynamo.mark_dynamic(x, 0)
        outputs, expected = compiled(x), model(x)
        assert_close(outputs, expected, length=model, gain=BATCH_STATISTICS if mode == 'train' else 1)
        outputs.square().mean().backward()
        expected.square().mean().backward()
    assert counter.frame_count == 1
    largest = max(parameter.grad.abs().max().item() for parameter in model.parameters())
    for (name, parameter), expected in zip(other.named_parameters(), model.parameters()):
        assert_close(parameter.grad, expected.grad, length=model, gain=BATCH_STATISTICS, scale=largest, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['NCHW', 'NHWC'])
@pytest.mark.parametrize('mode', ['train', 'eval', 'folded'])
def test_inductor(mode, memory_format):
    torch.compiler.reset()
    model = make_model('sknet50', mode == 'folded', channels=(16, 32, 64), layers=(1, 1, 1)).train(mode == 'train')
    model = model.to(memory_format=memory_format)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=True)
    with torch.set_grad_enabled(mode == 'train'):
        for x in make_inputs():
            x = x.to(memory_format=memory_format)
            assert_close(compiled(x), model(x), length=model, gain=100 if mode == 'train' else 1)
