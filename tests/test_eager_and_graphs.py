"""Eager mode and every graph of a network compute the same: outputs equal bit for bit, as those of timm's models."""

import pytest
import timm
import torch
from helpers.kinds import quick
from helpers.narrow_models import BRANCHES_OF_CODE, LARGE
from helpers.randomised import randomise
from timm.models import FeatureGraphNet, get_notrace_functions, get_notrace_modules

extraction = pytest.importorskip('torchvision.models.feature_extraction')

NAMES = [name for name in timm.list_models(module='timm_models') if name not in LARGE]
# Three stages of stride 1, 2 and 2 make 224x224 pixels as much work as 1568x1568 are elsewhere.
SMALL = [name for name in NAMES if '29_16x32d' in name]
# One of each kind of network, narrow: others of it differ in width and depth.
NARROW = {
    'sknet26': dict(layers=(1, 2, 1, 1), channels=(16, 32, 64, 128), cardinality=8, base_width=16),
    'sknet29_16x32d': dict(layers=(1, 2, 1), channels=(16, 32, 64), cardinality=4),
    'seresnext29_16x32d': dict(layers=(1, 2, 1), channels=(16, 32, 64), cardinality=4),
    'skresnet50x1_simclr': dict(layers=(1, 2, 1, 1), channels=(16, 32, 64, 128), stem_width=8),
    'shufflenetv2_x0_5': dict(layers=(2, 2, 2)),
    'seshufflenetv2_x0_5': dict(layers=(2, 2, 2)),
    'skshufflenetv2_x0_5': dict(layers=(2, 2, 2)),
}


def make_model(name, **kwargs):
    """As training could leave it: a BatchNorm that did nothing would hide in which order things are multiplied."""
    torch.manual_seed(0)
    with torch.device('meta'):
        model = timm.create_model(name, **kwargs)
    model.to_empty(device='cpu')
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        torch.nn.init.normal_(parameter, std=fan_in**-0.5)
    return randomise(model).eval()


def make_input(batch=1, size=128):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def extract(model, x):
    """By torchvision's extractor, made as timm's own tests make it."""
    tracer_kwargs = dict(
        leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions(), param_shapes_constant=True
    )
    return extraction.create_feature_extractor(model, ['fc'], tracer_kwargs=tracer_kwargs).eval()(x)['fc']


GRAPHS = {
    'create_feature_extractor': extract,
    'symbolic_trace': lambda model, x: torch.fx.symbolic_trace(model)(x),
    'jit.trace': lambda model, x: torch.jit.trace(model, x, check_trace=False)(x),
}


@torch.inference_mode()
def assert_equal_graphs(model, x, graphs=tuple(GRAPHS)):
    expected = model(x)
    assert expected.isfinite().all()
    assert expected.std() > 1e-3
    outputs = {name: GRAPHS[name](model, x) for name in graphs}
    assert {
        name: float((y - expected).abs().max()) for name, y in outputs.items() if not torch.equal(y, expected)
    } == {}


@pytest.mark.parametrize('name', quick(NAMES, ['seresnext29_16x32d', 'skshufflenetv2_x0_5']))
def test_at_timms_size(name):
    graphs = ('create_feature_extractor', 'jit.trace')
    deep = '101' in name or '152' in name  # the tracers alone take half a minute
    kwargs = dict(layers=(1, 2, 2, 1)) if deep else {}
    assert_equal_graphs(make_model(name, **kwargs), make_input(size=32 if name in SMALL else 128), graphs)


@pytest.mark.parametrize('name', quick(NAMES, ['sknet26']))
def test_at_224(name):
    assert_equal_graphs(make_model(name), make_input(size=224), ('symbolic_trace', 'jit.trace'))


@pytest.mark.parametrize(
    ('name', 'batch', 'size', 'memory_format'),
    [
        *(
            pytest.param(name, 3, 65, torch.channels_last, marks=[pytest.mark.slow] * (name not in BRANCHES_OF_CODE))
            for name in NARROW
        ),
        *((name, 4, 64, torch.contiguous_format) for name in ('sknet26', 'skshufflenetv2_x0_5')),
        ('sknet26', 1, 96, torch.channels_last),
    ],
    ids=str,
)
def test_of_any_batch_and_memory_format(name, batch, size, memory_format):
    model = make_model(name, **NARROW[name]).to(memory_format=memory_format)
    x = make_input(batch, size).to(memory_format=memory_format)
    assert_equal_graphs(model, x)
    with torch.inference_mode():
        features = model.forward_intermediates(x, intermediates_only=True)
        outputs = FeatureGraphNet(model, out_indices=tuple(range(len(features)))).eval()(x)
    assert len(outputs) == len(features)
    assert [torch.equal(output, feature) for output, feature in zip(outputs, features)] == [True] * len(features)
