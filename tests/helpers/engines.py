"""What tests of the engines share: copies of a module that go different ways, their gradients, and what they keep."""

import copy
import functools
import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sk_plugins.ops import Fusable, gpu

RUNS = gpu.HAS_TRITON and (gpu.INTERPRETS or torch.cuda.is_available())
DEVICE = 'cuda' if torch.cuda.is_available() and not gpu.INTERPRETS else 'cpu'
runs = pytest.mark.skipif(not RUNS, reason='needs a GPU; test_gpu runs it again in the interpreter')
SLOWLY = [pytest.mark.slow] if gpu.INTERPRETS else []


def list_builtins_once():
    """At every call Triton's interpreter looks through its language for what to replace: a third of its time.

    Here it finds what it found the first time, and, in what a kernel calls, that all is replaced already.
    """
    from triton.language import core
    from triton.runtime import interpreter

    @functools.cache
    def names(module):
        return [name for name, member in inspect.getmembers(module) if core.is_builtin(member)]

    def getmembers(module):
        replaced = names(module) and not core.is_builtin(getattr(module, names(module)[0]))
        return [] if replaced else [(name, getattr(module, name)) for name in names(module)]

    interpreter.inspect = SimpleNamespace(**{**vars(inspect), 'getmembers': getmembers})


if RUNS:
    gpu.load()
    if gpu.INTERPRETS:
        list_builtins_once()


def slowly(*values):
    """Parameters of a test that takes long in Triton's interpreter, not on a GPU."""
    return pytest.param(*values, marks=SLOWLY)


def slow(test):
    """A test that takes long in Triton's interpreter, not on a GPU."""
    return pytest.mark.slow(test) if gpu.INTERPRETS else test


def draw(*size, seed=0, dtype=torch.float32, scale=1.0, shift=0.0):
    """Normal numbers on the device where the kernels run."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(size, generator=generator, dtype=torch.float64) * scale + shift).to(dtype).to(DEVICE)


def set_backend(module, backend):
    """Let every part of a module go this way."""
    for part in module.modules():
        if isinstance(part, Fusable):
            part.backend = backend
    return module


def copies(module, backend='triton'):
    """A module that goes by an engine, and the same in float64 that goes module after module."""
    return set_backend(module, backend), set_backend(copy.deepcopy(module).double(), 'plain')


def randomise(module, seed=0):
    """Give norms and attention layers numbers that differ from one another, as after training."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor, scale, shift):
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        return (drawn * scale + shift).to(tensor)

    with torch.no_grad():
        for name, part in module.named_modules():
            if isinstance(part, nn.BatchNorm2d):
                part.weight.copy_(draw(part.weight, 0.2, 1.0))
                part.bias.copy_(draw(part.bias, 0.3, 0.0))
                part.running_mean.copy_(draw(part.running_mean, 0.3, 0.0))
                part.running_var.copy_(draw(part.running_var, 0.3, 0.0).abs() + 0.5)
            elif name.endswith('fc_select'):
                part.weight.copy_(draw(part.weight, 0.5, 0.0))
    return module


def every_gradient(module, x, grad, **kwargs):
    """The output, and the gradients of the input and of every parameter that has one, by name."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    output = module(x, **kwargs)
    output.backward(grad.to(output.dtype))
    named = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    return {'output': output.detach(), 'input': x.grad, **named}


def sizes_kept(function):
    """The bytes of every storage that a function's call keeps for the backward pass, smallest first."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    del output
    return sorted(kept.values())
