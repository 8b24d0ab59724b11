"""torch's private names, each with what stands in for it in a release that lacks it.

No public function tells whether a transform of ``torch.func``, a dispatch mode or a hook of every module is active.
Where torch no longer has a name that tells, :func:`is_ordinary` is False, and the plain modules run: slower, and right.
:mod:`.gate` and :mod:`.fused` read a module's ``_parameters`` and ``_buffers`` at every call. A function here, or
``nn.Module.__getattr__``, would cost the host a Python call each time.
"""

import os
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

__all__ = [
    'BATCH_NORMS',
    'HOOKS',
    'REPLACEMENTS',
    'BatchNorm',
    'add_one',
    'children',
    'graph_task',
    'in_backward',
    'is_compiled',
    'is_optimized',
    'is_ordinary',
    'is_torchs_own',
    'softmax_backward',
]

try:
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
except ImportError:
    BatchNorm = nn.BatchNorm2d
# What isinstance tells of every BatchNorm, and of no InstanceNorm.
BATCH_NORMS = (BatchNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def is_torchs_own(method: Callable, module: str) -> bool:
    """Whether a method is from the file of torch's ``module``, or from nn.Module's: no patch by somebody else."""
    code = getattr(method, '__code__', None)  # functools.wraps gives a patch the names of what it stands for
    names = [os.path.basename(sys.modules[name].__file__ or '') for name in (module, _module.__name__)]
    return code is not None and os.path.basename(code.co_filename) in names


# What runs when a module is called, and what a convolution calls in turn, as torch has them.
_CALLS = ((nn.Module, '__call__'), (nn.Module, '_call_impl'), (nn.Conv2d, '_conv_forward'))
_calls = [getattr(cls, name, None) for cls, name in _CALLS]
_calls_are_torchs = all(call is None or is_torchs_own(call, cls.__module__) for call, (cls, _) in zip(_calls, _CALLS))
# In a module's __dict__: its hooks, and what is there only where somebody, or module.compile(), put it there.
HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')
COMPILED = '_compiled_call_impl'
REPLACEMENTS = ('forward', COMPILED, '_conv_forward')
_GLOBAL_HOOKS = (
    '_global_forward_hooks',
    '_global_forward_pre_hooks',
    '_global_backward_hooks',
    '_global_backward_pre_hooks',
)


def _answers():
    """What tells of dispatch modes, function modes, transforms and forward mode, and the hooks of every module."""
    from torch import _C
    from torch.autograd import forward_ad

    counts = _C._len_torch_dispatch_stack, _C._len_torch_function_stack, _C._are_functorch_transforms_active
    forward_ad._current_level  # noqa: B018 - raises where it is not there
    for name in HOOKS:
        getattr(nn.Identity(), name)
    return *counts, _C._is_tracing, forward_ad, [getattr(_module, name) for name in _GLOBAL_HOOKS]


try:
    _dispatch_modes, _function_modes, _transforms, _is_tracing, _forward_ad, _global_hooks = _answers()
except (ImportError, AttributeError):
    _dispatch_modes = None


def is_ordinary() -> bool:
    """Whether torch runs what it is given and nothing else: no tracer, mode, transform, dual level or global hook."""
    return not (
        _dispatch_modes is None
        or not _calls_are_torchs
        or _dispatch_modes()
        or (_function_modes() and not _is_default_device())
        or _transforms()
        or _forward_ad._current_level >= 0
        or any(_global_hooks)
        or _is_tracing()
        or nn.Module.__call__ is not _calls[0]
        or getattr(nn.Module, '_call_impl', None) is not _calls[1]
        or getattr(nn.Conv2d, '_conv_forward', None) is not _calls[2]
    )


def _is_default_device() -> bool:
    """Whether the active function modes only choose a device for new tensors, as ``torch.set_default_device`` does."""
    try:
        from torch.overrides import _get_current_function_mode_stack
        from torch.utils._device import DeviceContext
    except ImportError:
        return False
    return all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called; False where torch does not tell."""
    return getattr(module, COMPILED, None) is not None


def is_optimized(module: nn.Module) -> bool:
    """Whether a module is what ``torch.compile`` returned for another."""
    return '_orig_mod' in children(module)


def children(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's children by name. ``named_children`` leaves out those that are None or have two names."""
    return module._modules


def add_one(counts: Sequence[Tensor]) -> None:
    """Add one to every tensor, in one launch where torch has it."""
    if not counts:
        return
    if _foreach_add_ is not None:
        _foreach_add_(counts, 1)
    else:
        for count in counts:
            count.add_(1)


_foreach_add_ = getattr(torch, '_foreach_add_', None)


def in_backward() -> bool:
    """Whether autograd's backward pass calls; False where torch does not tell, which counts a repetition as a call."""
    return graph_task() != -1


# The number of the backward pass that calls, or -1.
graph_task = getattr(torch._C, '_current_graph_task_id', lambda: -1)


def softmax_backward(grad: Tensor, softmax: Tensor, dim: int) -> Tensor:
    """The gradient of a softmax's input, in one launch where torch has it."""
    if _softmax_backward is not None:
        return _softmax_backward(grad, softmax, dim, softmax.dtype)
    return softmax * (grad - (softmax * grad).sum(dim, keepdim=True))


_softmax_backward = getattr(torch, '_softmax_backward_data', None)
