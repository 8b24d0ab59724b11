"""How kernels start: past Triton's search for the compiled kernel, which takes the host longer than all else of a unit.

This module imports triton, as :mod:`.gpu_kernels` does.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from operator import attrgetter, itemgetter, or_
from typing import Any

import torch
import triton
from torch import Tensor

__all__ = ['Launch', 'compile_launched', 'launch']

# The grid, where among the tensors each of the kernel's pointers is, the kernel's numbers and its constants.
Launch = tuple[tuple[int, ...], Sequence[int], Sequence[float], dict[str, Any]]

_launchers: dict[tuple, tuple] = {}
_MOST_LAUNCHERS = 10_000  # as sizes of images change, so do launches
_address, _dtype = Tensor.data_ptr, attrgetter('dtype')
_collecting = threading.local()  # a thread's launches, while they are collected


def launch(kernel: Any, tensors: Sequence[Tensor], kind: Hashable, describe: Callable[[], Launch]) -> None:
    """The one place from which kernels start.

    At every launch Triton looks at each argument's type, alignment and divisibility to find the compiled kernel. What
    it found is kept here for launches of the same kind, of which nothing but the addresses is asked again.

    Args:
        kernel: what ``triton.jit`` made.
        tensors: those whose addresses it takes, each once.
        kind: whatever ``describe`` depends on; launches of a kernel with equal kinds must be described alike.
        describe: called where there was no such launch yet.
    """
    addresses = list(map(_address, tensors))
    device = tensors[0].get_device()
    if device < 0 or reduce(or_, addresses) % 16:  # not on a GPU; or beside what kernels are compiled for
        _launch_by_triton(kernel, tensors, *describe())
        return
    key = kernel.fn, kind, device, *map(_dtype, tensors)
    launcher = _launchers.get(key)
    if launcher is None:
        launcher = _launchers[key] = _prepare(kernel, tensors, *describe())
    if not launcher:
        _launch_by_triton(kernel, tensors, *describe())
        return
    run, x, y, stream, function, packed, point, rest, _ = launcher
    run(x, y, 1, stream(device), function, packed, None, None, None, *point(addresses), *rest)


def compile_launched(function: Callable[[], object], device: torch.device) -> None:
    """Compile for ``device``, in parallel, what ``function`` launches on CPU tensors, for which nothing is computed.

    Most of a compilation is outside Python.
    """
    _collecting.launched = []
    try:
        function()
    finally:
        launched = _collecting.__dict__.pop('launched')
    kinds = {(kernel.fn, *map(_dtype, tensors), *constants.values()): (kernel, grid, [*tensors, *numbers], constants)
             for kernel, grid, tensors, numbers, constants in launched}  # fmt: skip

    def compile_one(launched: tuple) -> None:
        kernel, grid, arguments, constants = launched
        with torch.cuda.device(device):
            kernel.warmup(*arguments, grid=grid, **constants)

    with ThreadPoolExecutor(8) as executor:
        list(executor.map(compile_one, kinds.values()))


def _launch_by_triton(kernel: Any, tensors: Sequence[Tensor], grid, pointers, numbers, constants) -> None:
    tensors = [tensors[i] for i in pointers]
    launched = getattr(_collecting, 'launched', None)
    if launched is None:
        kernel[grid](*tensors, *numbers, **constants)
    else:
        launched.append((kernel, grid, tensors, numbers, constants))


def _prepare(kernel: Any, tensors: Sequence[Tensor], grid, pointers, numbers, constants) -> tuple:
    """A launcher; empty where Triton is not as it is known, or the GPU of another kind: its own launch is taken."""
    if len(_launchers) >= _MOST_LAUNCHERS:
        _launchers.clear()
    driver = triton.runtime.driver.active
    try:
        if driver.get_current_target().backend != 'cuda':
            return ()
        compiled = kernel.warmup(*[tensors[i] for i in pointers], *numbers, grid=grid, **constants)
        launcher = compiled.run, *grid, *[1] * (2 - len(grid)), driver.get_current_stream
        names = kernel.arg_names[len(pointers) + len(numbers) :]
        rest = (*numbers, *map(constants.__getitem__, names))
        launcher += compiled.function, compiled.packed_metadata, itemgetter(*pointers), rest
    except (AttributeError, KeyError):
        return ()
    return *launcher, compiled  # which is unloaded once nobody has it
