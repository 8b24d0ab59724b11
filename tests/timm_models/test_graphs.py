"""Networks as graphs: scripted, traced, of torch.fx, exported and compiled."""

import copy

import pytest
import timm
import torch
from helpers.kinds import quick
from helpers.narrow_models import (
    BRANCHES_OF_CODE,
    NARROW,
    assert_same_gradients,
    each_kind,
    each_slow_kind,
    make_input,
    make_model,
    shallow,
)
from helpers.tolerances import assert_close

each_branch_of_code = pytest.mark.parametrize('name', quick(BRANCHES_OF_CODE, ['sknet26', 'skshufflenetv2_x0_5']))


@each_slow_kind
@torch.no_grad()
def test_torchscript(name):
    model = make_model(name, scriptable=True)
    scripted = torch.jit.script(model)
    for x in (make_input(), make_input(1, size=97)):
        assert_close(scripted(x), model(x), length=model)


@each_branch_of_code
@torch.no_grad()
def test_trace(name):
    model = make_model(name)
    traced = torch.jit.trace(model, make_input())
    for x in (make_input(), make_input(1, size=97)):
        assert_close(traced(x), model(x), length=model)


@pytest.mark.slow
def test_torchscript_at_full_depth():
    model = timm.create_model('sknet50', **NARROW, scriptable=True).eval()
    with torch.no_grad():
        assert_close(torch.jit.script(model)(make_input()), model(make_input()), length=model)


@each_kind
def test_fx_graph_of_the_whole_model(name):
    model = make_model(name, train=True).double()
    graph = torch.fx.symbolic_trace(copy.deepcopy(model))
    x = make_input(4, size=32).double()
    for module in (model, graph):
        module(x).square().mean().backward()
    assert_same_gradients(graph, model)


@pytest.mark.parametrize('name', quick(BRANCHES_OF_CODE, ['sknet26']))
@torch.no_grad()
def test_fx_graph_can_be_scripted(name):
    model = make_model(name).double()
    x = make_input(4, size=32).double()
    scripted = torch.jit.script(torch.fx.symbolic_trace(model))
    assert_close(scripted(x), model(x), length=model)


@pytest.mark.parametrize('name', quick(BRANCHES_OF_CODE, ['skshufflenetv2_x0_5']))
@torch.no_grad()
def test_exportable(name):
    model = make_model(name, exportable=True, layers=shallow(name))
    dims = {0: torch.export.Dim('batch', min=1)}
    exported = torch.export.export(model, (make_input(),), dynamic_shapes=(dims,)).module()
    for x in (make_input(), make_input(5)):
        assert_close(exported(x), model(x), length=model)


@pytest.mark.parametrize(
    ('exporter', 'name'),
    [
        ('dynamo', 'sknet26'),
        pytest.param('dynamo', 'skshufflenetv2_x0_5', marks=pytest.mark.slow),
        ('TorchScript', 'shufflenetv2_x0_5'),
        *(
            pytest.param('TorchScript', name, marks=pytest.mark.slow)
            for name in BRANCHES_OF_CODE
            if name != 'shufflenetv2_x0_5'
        ),
    ],
)
@pytest.mark.filterwarnings('ignore:.*legacy TorchScript-based ONNX export:DeprecationWarning')
@pytest.mark.filterwarnings('ignore:The feature will be removed:DeprecationWarning:torch')
@pytest.mark.filterwarnings('ignore:Constant folding - Only steps=1:UserWarning')
@torch.no_grad()
def test_onnx(tmp_path, exporter, name):
    onnx = pytest.importorskip('onnx')
    runtime = pytest.importorskip('onnxruntime')
    model = make_model(name, exportable=exporter == 'dynamo', layers=shallow(name))
    kwargs = dict(dynamo=False, dynamic_axes={'image': {0: 'batch'}})
    if exporter == 'dynamo':
        pytest.importorskip('onnxscript')
        kwargs = dict(dynamo=True, dynamic_shapes=({0: torch.export.Dim('batch', min=1)},))
    path = tmp_path / f'{name}.onnx'
    torch.onnx.export(model, (make_input(),), path, input_names=['image'], output_names=['logits'], **kwargs)
    onnx.checker.check_model(path)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    for x in (make_input(), make_input(1)):
        (output,) = session.run(['logits'], {'image': x.numpy()})
        assert_close(torch.from_numpy(output), model(x), length=model)


@pytest.mark.parametrize('name', ['sknet29_16x32d', 'seresnext29_16x32d', 'skshufflenetv2_x0_5'])
@pytest.mark.slow
def test_compile_without_a_graph_break(name):
    torch.compiler.reset()
    model = make_model(name, layers=shallow(name)).double()
    # One kind of SK network goes through autograd's tracing too, which takes several times as long.
    backend = 'aot_eager' if name == 'sknet29_16x32d' else 'eager'
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    x = make_input(4, size=32).double()
    with torch.no_grad():
        assert_close(compiled(x), model(x), length=model)
    for module in (model, compiled):
        module.train()
        module(x).square().mean().backward()
    assert_same_gradients(compiled._orig_mod, model)
