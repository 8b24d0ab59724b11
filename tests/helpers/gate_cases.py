"""What a gate is tried with: a unit, and what watches or replaces a part of it and undoes that."""

from contextlib import contextmanager
from types import MethodType

import pytest
import torch
from timm.layers import DropPath
from torch import nn
from torch.nn.modules import module as torch_module

from helpers.randomised import randomise
from helpers.tolerances import bounds
from sk_plugins import SelectiveKernel
from sk_plugins.networks import SKBottleneck

# Engine and mode: the CPU's serves training alone, and SK convolutions alone.
CASES = [('recompute', True), ('triton', True), ('triton', False)]
# A unit's sums have some thousand terms, and norms of few values, some of them twice differentiated, magnify an error.
CLOSE = bounds(torch.float64, length=10_000, gain=100)
each_case = pytest.mark.parametrize(('engine', 'training'), CASES, ids=['recompute', 'triton', 'triton, inference'])


def make_unit(kind=SKBottleneck, training=True):
    """A unit of float64 with a shortcut of its own."""
    torch.manual_seed(0)
    shape = dict(cardinality=2, base_width=64) if kind is SKBottleneck else {}
    down = nn.Sequential(nn.Conv2d(8, 4 * kind.expansion, 1, bias=False), nn.BatchNorm2d(4 * kind.expansion))
    unit = kind(8, 4, downsample=down, sk_kwargs=dict(min_dim=4), drop_path=DropPath(0.0), **shape)
    unit = randomise(unit).double().train(training)
    unit.drop_path.eval()
    for module in unit.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # torch's backward hooks refuse what works in place
    return unit


def make_input(batch=3, seed=1):
    return torch.randn(batch, 8, 6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(engine, training):
    """What the engine computes in one go: a unit, or an SK convolution."""
    unit = make_unit(training=training)
    return unit if engine == 'triton' else unit.conv2


def child(module, name):
    """A module of a unit by its name there, or of its SK convolution."""
    if isinstance(module, SelectiveKernel):
        return module.get_submodule(name.removeprefix('conv2').removeprefix('.')) if name.startswith('conv2') else None
    return module.get_submodule(name)


def run(module, training, x=None):
    """Output and gradients of a step, or the output of inference; buffers are what they were after it."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.zero_grad()
    x = make_input() if x is None else x
    try:
        if not training:
            with torch.no_grad():
                return [module(x)]
        x = x.clone().requires_grad_()
        output = module(x)
        output.backward(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output))
        return [output.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]
    finally:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])


def assert_equal(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, **CLOSE)


# Each watches or replaces a thing and yields what the others' code appends to; on leaving, all is as it was.


@contextmanager
def hook(module, register):
    seen = []
    handle = getattr(module, register)(lambda *args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def global_hook(module, register):
    seen = []
    handle = getattr(torch_module, register)(lambda *args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def replaced(kind, name):
    seen, original = [], getattr(kind, name)

    def method(self, *args, **kwargs):
        seen.append(self)
        return original(self, *args, **kwargs)

    setattr(kind, name, method)
    try:
        yield seen
    finally:
        setattr(kind, name, original)


@contextmanager
def replaced_forward_of_a_class(module):
    seen, kind = [], type(module)
    own, original = 'forward' in vars(kind), kind.forward

    def forward(self, *args):
        seen.append(self)
        return original(self, *args)

    kind.forward = forward
    try:
        yield seen
    finally:
        if own:
            kind.forward = original
        else:
            del kind.forward


@contextmanager
def replaced_forward(module):
    seen, original = [], module.forward

    def forward(self, *args):
        seen.append(self)
        return original(*args)

    module.forward = MethodType(forward, module)
    try:
        yield seen
    finally:
        del module.forward


@contextmanager
def compiled(module):
    seen = []
    torch.compiler.reset()
    module.compile(backend=lambda graph, _: lambda *args: (seen.append(graph), graph(*args))[1])
    try:
        yield seen
    finally:
        del module._compiled_call_impl
        torch.compiler.reset()


@contextmanager
def subclassed(module):
    """As tools do that change a module's class in place."""
    seen, kind = [], type(module)

    def forward(self, *args):
        seen.append(self)
        return kind.forward(self, *args)

    module.__class__ = type(kind.__name__, (kind,), {'forward': forward})
    try:
        yield seen
    finally:
        module.__class__ = kind


WATCHES = {
    'forward hook': lambda module: hook(module, 'register_forward_hook'),
    'forward pre-hook': lambda module: hook(module, 'register_forward_pre_hook'),
    'replaced forward': replaced_forward,
    'replaced forward of the class': replaced_forward_of_a_class,
    'subclassed': subclassed,
}
BACKWARD_WATCHES = {
    'backward hook': lambda module: hook(module, 'register_full_backward_hook'),
    'backward pre-hook': lambda module: hook(module, 'register_full_backward_pre_hook'),
}
GLOBAL_WATCHES = {
    'global forward hook': lambda module: global_hook(module, 'register_module_forward_hook'),
    'global forward pre-hook': lambda module: global_hook(module, 'register_module_forward_pre_hook'),
    'replaced call': lambda module: replaced(nn.Module, '__call__'),
    'replaced inner call': lambda module: replaced(nn.Module, '_call_impl'),
    "a convolution's replaced inner call": lambda module: replaced(nn.Conv2d, '_conv_forward'),
}
GLOBAL_BACKWARD_WATCHES = {
    'global backward hook': lambda module: global_hook(module, 'register_module_full_backward_hook'),
    'global backward pre-hook': lambda module: global_hook(module, 'register_module_full_backward_pre_hook'),
}
PLACES = ['', 'conv2', 'conv2.paths.1', 'conv2.paths.0.conv', 'conv2.paths.0.bn', 'conv2.paths.1.act', 'conv2.attn']
PLACES += ['conv2.attn.fc_reduce', 'conv2.attn.bn', 'conv2.attn.softmax', 'conv2.paths.0.drop']
PLACES_OF_UNITS = ['conv1', 'conv1.bn', 'conv3.conv', 'conv3.act', 'act', 'downsample', 'downsample.1', 'drop_path']
