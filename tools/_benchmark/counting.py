"""Exact counts: Python calls, operator calls, kernels, bytes kept for the backward pass; and CUDA graphs of a step."""

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

MIB = 2**20
REPLAYS = 10


class CaptureError(RuntimeError):
    """A step cannot be captured as a CUDA graph."""


def python_calls(work: Callable[[], Any]) -> tuple[int, Any]:
    """Calls of Python functions while ``work`` runs, its own left out, and what it returns.

    Calls of C functions are not counted. With a GPU, autograd runs the backward pass in a thread of its own, whose
    calls are counted from Python 3.12 on.
    """
    set_profile = sys.setprofile
    if torch.cuda.is_initialized():
        set_profile = getattr(threading, 'setprofile_all_threads', set_profile)
    count = 0

    def profiler(frame, event, argument) -> None:
        nonlocal count
        count += event == 'call'

    gc.collect()
    collects = gc.isenabled()
    gc.disable()  # finalizers are not work's
    set_profile(profiler)
    try:
        output = work()
    finally:
        taken = count  # before set_profile, which may be a Python function, is called again
        set_profile(None)
        if collects:
            gc.enable()
    return taken - isinstance(work, FunctionType), output


def operator_calls(work: Callable[[], Any]) -> tuple[int, Any]:
    """Calls of torch's operators by Python or autograd while ``work`` runs, and what it returns.

    What an operator calls itself is left out.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        output = work()
    return count_operators(profiler.events()), output


def count_operators(events: Iterable[FunctionEvent]) -> int:
    """The operators among a profiler's events that no other operator called."""
    return sum(_is_operator(event) and not _is_within_operator(event) for event in events)


def _is_operator(event: FunctionEvent) -> bool:
    # autograd's nodes have names such as torch::autograd::AccumulateGrad.
    return '::' in event.name and not event.name.startswith(('autograd::', 'torch::autograd::'))


def _is_within_operator(event: FunctionEvent) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if _is_operator(parent):
            return True
        parent = parent.cpu_parent
    return False


def kernels(step: Callable[[], object]) -> tuple[int, float]:
    """The CUDA kernels that a step launches, and the seconds that they take one by one."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return count_kernels(profiler.events())


def count_kernels(events: Iterable[FunctionEvent]) -> tuple[int, float]:
    """Number and seconds of the kernels among a profiler's events. Copies, fills and annotations are none."""
    found = [
        event
        for event in events
        if event.device_type == DeviceType.CUDA
        and not getattr(event, 'is_user_annotation', False)
        and not event.name.startswith(('Memcpy', 'Memset'))
    ]
    return len(found), sum(event.device_time for event in found) / 1e6


def graph_seconds(step: Callable[[], object], timer: Callable[[Callable[[], object], int], float]) -> float:
    """Seconds of a step replayed as a CUDA graph: what the GPU alone needs.

    Raises:
        CaptureError: the step cannot be captured; the message is the reason.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        side = torch.cuda.Stream()
        side.wait_stream(stream)
        with torch.cuda.stream(side):
            step()
        stream.wait_stream(side)
        with torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        torch.cuda.set_stream(stream)  # which a capture that fails does not put back
        torch.cuda.synchronize()
        raise CaptureError(first_cause(error)) from error
    timer(graph.replay, 1)
    return timer(graph.replay, REPLAYS) / REPLAYS


def first_cause(error: BaseException) -> str:
    """The first line of the error that others followed: the end of a capture that failed fails too."""
    while error.__context__ is not None:
        error = error.__context__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class _Saved:
    """A tensor that the autograd graph keeps, alive as long as the graph keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


def saved_bytes(model: nn.Module, images: Tensor, forward: Callable[[Tensor], Tensor] | None = None) -> int:
    """Bytes that autograd keeps for the backward pass once the forward pass is done.

    Each storage is counted once and in full, however many tensors lie in it. The storages of the parameters and the
    buffers are left out, that of the images is not. ``forward`` goes in the model's place where given. What a custom
    autograd function keeps in another way than ``save_for_backward`` is not seen.
    """
    kept = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        kept.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        output = (forward or model)(images)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages = {saved.tensor.untyped_storage().data_ptr(): saved.tensor.untyped_storage().nbytes() for saved in kept}
    del output  # and with it the graph, which had to live until here
    return sum(size for pointer, size in storages.items() if pointer not in own)
