"""Models timed side by side, in turn, and what is counted of each."""

import contextlib
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sk_plugins
from sk_plugins import ops
from sk_plugins.ops import gpu

from . import counting
from .counting import MIB
from .models import Variant
from .settings import MEMORY_FORMATS, Run, Settings

WARM_UP_STEPS = 3
MAX_ITERATIONS = 100
NO_STUBS = 'triton is not installed'

Step = Callable[[], object]
Timer = Callable[[Step, int], float]


@dataclass
class Result:
    """What was measured of a model in a run.

    Args:
        run: the mode, and the batch and size where they are not the benchmark's.
        model: the variant's label.
        samples: seconds per step, one for each repeat; until the device is done.
        host_samples: on a GPU, seconds until a step's Python returns, one for each repeat.
        saved_mib: what autograd keeps of one image, in MiB (training, not compiled).
        peak_mib: what a step of the whole batch allocates at its peak, in MiB, weights, optimizer and batch included
            (GPU only).
        python_calls: calls of Python functions in a forward pass, in training with the loss and the backward pass.
        operator_calls: calls of torch's operators in the same.
        launches: kernels that a step launches (GPU only).
        kernel_seconds: what they take one by one.
        graph_seconds: a step replayed as a CUDA graph (GPU only).
        graph_error: why it cannot be captured.
        first_step_seconds: from the first call until it is done, compilation included.
        ways: how many of the model's SK units took which way in the last forward pass; None for a model without any.
        unavailable: why nothing was measured.
    """

    run: Run
    model: str
    samples: list[float] = field(default_factory=list)
    host_samples: list[float] = field(default_factory=list)
    saved_mib: float | None = None
    peak_mib: float | None = None
    python_calls: int | None = None
    operator_calls: int | None = None
    launches: int | None = None
    kernel_seconds: float | None = None
    graph_seconds: float | None = None
    graph_error: str | None = None
    first_step_seconds: float | None = None
    ways: dict[str, int] | None = None
    unavailable: str | None = None

    @property
    def seconds(self) -> float | None:
        return statistics.median(self.samples) if self.samples else None

    @property
    def host_seconds(self) -> float | None:
        return statistics.median(self.host_samples) if self.host_samples else None


@dataclass
class Task:
    """A model that is ready to run. ``context`` makes the surroundings that its steps need."""

    result: Result
    model: nn.Module
    step: Step
    context: Callable[[], AbstractContextManager] = nullcontext


def ways(model: nn.Module) -> dict[str, int] | None:
    """How many SK units of a model took 'plain', 'recompute', 'triton' or 'operators' in its last forward pass.

    None for a model without SK units.
    """
    return ops.ways(model) or None


# Time


def cpu_timer(step: Step, iterations: int) -> float:
    """Seconds that ``iterations`` steps take. (``torch.utils.benchmark`` would warm up again before each repeat.)"""
    start = time.perf_counter()
    for _ in range(iterations):
        step()
    return time.perf_counter() - start


def cuda_timer(step: Step, iterations: int) -> float:
    """Seconds that ``iterations`` steps take on the GPU, from CUDA events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(iterations):
        step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def host_timer(step: Step, iterations: int) -> float:
    """Seconds until the Python of ``iterations`` steps has returned, each begun with an idle GPU."""
    seconds = 0.0
    for _ in range(iterations):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        seconds += time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds


def interleave(tasks: Sequence[Task], repeats: int, timer: Timer, min_seconds: float = 0.0) -> list[list[float]]:
    """Seconds per step of each of ``tasks``, ``repeats`` of them, taken in turn.

    A first round, left out, says how many iterations of each last ``min_seconds``.
    """

    def seconds(task: Task, count: int) -> float:
        with task.context():
            return timer(task.step, count)

    iterations = []
    for task in tasks:
        once = max(seconds(task, 1), 1e-9)
        iterations.append(min(max(math.ceil(min_seconds / once), 1), MAX_ITERATIONS))
    samples = [[] for _ in tasks]
    for _ in range(repeats):
        for task, count, taken in zip(tasks, iterations, samples):
            taken.append(seconds(task, count) / count)
    return samples


# Steps


def _loss(model: nn.Module, images: Tensor) -> Tensor:
    logits = model(images)
    if isinstance(logits, Tensor) and logits.ndim == 0:  # a loss already: benchmark_detection.py
        return logits
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ValueError(f'its output is not (batch, classes) but {getattr(logits, "shape", type(logits).__name__)}')
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device) % logits.shape[1])


def infer_step(model: nn.Module, images: Tensor, settings: Settings) -> Step:
    """A forward pass in inference mode."""

    def step() -> None:
        with torch.inference_mode(), settings.autocast():
            model(images)

    return step


def train_step(model: nn.Module, images: Tensor, settings: Settings) -> Step:
    """Forward, cross entropy, backward, a step of SGD with momentum (float16: with a gradient scaler)."""
    # A rate at which a few hundred steps on random labels leave the weights about where they were.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9, weight_decay=1e-4)
    scaler = torch.amp.GradScaler(settings.device, enabled=settings.dtype == 'float16')

    def step() -> None:
        with settings.autocast():
            loss = _loss(model, images)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


# Counts


def saved_mib_per_image(model: nn.Module, settings: Settings) -> float:
    """MiB that one more image in a training batch makes autograd keep, loss included.

    The difference of a batch of four and one of two: autocast's copies of the weights, which it keeps too, don't grow
    with the batch.
    """

    def forward(images: Tensor) -> Tensor:
        with settings.autocast():
            return _loss(model, images)

    two, four = (counting.saved_bytes(model, settings.images(count), forward) for count in (2, 4))
    return (four - two) / 2 / MIB


def count_calls(
    model: nn.Module, mode: str, images: Tensor, settings: Settings, count: Callable[[Callable], tuple[int, Any]]
) -> int:
    """Calls in a forward pass; in training also in the loss and the backward pass.

    The optimizer's are left out: they are torch's own, and go by the number of parameters.

    Args:
        model: the model, warm.
        mode: 'infer' or 'train'.
        images: (B, 3, H, W).
        settings: of the run.
        count: :func:`~_benchmark.counting.python_calls` or :func:`~_benchmark.counting.operator_calls`.
    """
    if mode == 'infer':
        with torch.inference_mode(), settings.autocast():
            return count(lambda: model(images))[0]
    model.zero_grad()
    with settings.autocast():
        forward, loss = count(lambda: _loss(model, images))
    backward, _ = count(loss.backward)
    model.zero_grad()
    return forward + backward


def count(task: Task, images: Tensor, settings: Settings) -> None:
    """Fill in what is counted of a task once it has been timed: a failed capture may leave a GPU in disorder."""
    result = task.result
    with task.context():
        result.python_calls, result.operator_calls = (
            count_calls(task.model, result.run.mode, images, settings, calls)
            for calls in (counting.python_calls, counting.operator_calls)
        )
        if settings.device == 'cuda':
            result.launches, result.kernel_seconds = counting.kernels(task.step)
            try:
                result.graph_seconds = counting.graph_seconds(task.step, cuda_timer)
            except counting.CaptureError as error:
                result.graph_error = str(error)


# Runs


def _wake_residual_branches(model: nn.Module) -> None:
    """Norms that start at zero get a weight: a GPU finishes arithmetic on zeros sooner than on other numbers."""
    for module in model.modules():
        weight = getattr(module, 'weight', None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 1 and not weight.any():
            nn.init.constant_(weight, 0.2)


@contextlib.contextmanager
def _named(label: str, run: Run) -> Iterator[None]:
    """Errors of torch and of the model as a ValueError that begins with the model's label."""
    try:
        yield
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        first = str(error).split('\n\n')[0]  # torch's errors go on for pages
        raise ValueError(f'model={label!r} in {run.title}: {first}') from error


@contextlib.contextmanager
def _noted(failures: list[str] | None, label: str, run: Run) -> Iterator[None]:
    """Errors of any kind, as compilers have their own, as a line in ``failures``, where there is such a list."""
    try:
        yield
    except Exception as error:
        if failures is None:
            raise
        named = str(error).startswith('model=')
        first = str(error).split('\n\n')[0]
        failures.append(first if named else f'model={label!r} in {run.title}: {type(error).__name__}: {first}')
        say(failures[-1])


def prepare(variant: Variant, run: Run, settings: Settings, images: Tensor) -> Task:
    """Build a model, run its step until it is warm, and count its memory; the result has no times yet.

    Raises:
        ValueError: the model cannot be built, fused, compiled or run; the message begins with its label.
    """
    cuda, training = settings.device == 'cuda', run.mode == 'train'
    before = torch.cuda.memory_allocated() if cuda else 0
    torch.manual_seed(0)
    plain = variant.build().train(training)
    result = Result(run, variant.label)
    context = ops.stubbed_launches if variant.stub else nullcontext
    with _named(variant.label, run), context():
        _wake_residual_branches(plain)
        if variant.fuse:
            plain = sk_plugins.fold_batch_norm(plain)
        plain.to(settings.device, memory_format=MEMORY_FORMATS[settings.memory_format])
        model = torch.compile(plain) if variant.compile else plain
        step = (train_step if training else infer_step)(model, images, settings)
        start = time.perf_counter()
        step()
        _synchronize(settings)
        result.first_step_seconds = time.perf_counter() - start
        for _ in range(WARM_UP_STEPS - 1):
            step()
        result.ways = ways(plain)
        if training and not variant.compile:
            result.saved_mib = saved_mib_per_image(model, settings)
        if cuda:
            _synchronize(settings)
            torch.cuda.reset_peak_memory_stats()
            step()
            _synchronize(settings)
            # What the models before this one hold lies below `before`, and so do the images.
            result.peak_mib = (torch.cuda.max_memory_allocated() - before + images.nbytes) / MIB
    return Task(result, model, step, context)


def measure(
    variants: Sequence[Variant],
    run: Run,
    settings: Settings,
    timer: Timer | None = None,
    failures: list[str] | None = None,
) -> list[Result]:
    """Time all ``variants`` in one interleaved run, and count what is counted of each.

    Args:
        variants: the models, each with a ``label``, ``fuse``, ``compile``, ``stub`` and ``build()``.
        run: the mode, and what differs from ``settings``.
        settings: the benchmark's.
        timer: in place of the device's own.
        failures: takes the message of each model that fails, where the others are to go on without it.

    Raises:
        ValueError: a model cannot be built or run, and there is no list of failures; the message begins with its label.
    """
    settings = run.settings(settings)
    timer = timer or (cuda_timer if settings.device == 'cuda' else cpu_timer)
    with _environment(settings):
        images = settings.images()
        results, tasks = [], []
        for variant in variants:
            if variant.stub and not gpu.HAS_TRITON:
                results.append(Result(run, variant.label, unavailable=NO_STUBS))
                continue
            start = time.perf_counter()
            task = None
            with _noted(failures, variant.label, run):
                task = prepare(variant, run, settings, images)
            if task is None:
                results.append(Result(run, variant.label, unavailable=failures[-1]))
                _free_memory(settings)
                continue
            tasks.append(task)
            results.append(task.result)
            say(f'{run.title}: {variant.label} is warm after {time.perf_counter() - start:.0f} s')
        start = time.perf_counter()
        for task, samples in zip(tasks, interleave(tasks, settings.repeats, timer, settings.min_seconds)):
            task.result.samples = samples
        if settings.device == 'cuda':
            for task, samples in zip(tasks, interleave(tasks, settings.repeats, host_timer)):
                task.result.host_samples = samples
        say(f'{run.title}: {settings.repeats} repeats took {time.perf_counter() - start:.0f} s')
        for task in tasks:
            with _noted(failures, task.result.model, run), _named(task.result.model, run):
                count(task, images, settings)
    return results


@contextlib.contextmanager
def _environment(settings: Settings) -> Iterator[None]:
    """Threads, cuDNN and the compiler as the run wants them, and as they were afterwards."""
    threads, tuning = torch.get_num_threads(), torch.backends.cudnn.benchmark
    torch.compiler.reset()
    try:
        torch.set_num_threads(settings.threads or threads)
        torch.backends.cudnn.benchmark = True
        if settings.device == 'cuda':
            # Compiled models of an earlier run are in cycles, and would go while this one's memory is counted.
            _free_memory(settings)
            # cuBLAS keeps a workspace per thread from its first use on, which no model owns.
            weight = torch.ones(8, 8, device='cuda', requires_grad=True)
            (weight @ weight).sum().backward()
        # Models of one class share their code, and past the limit torch would run them eagerly without a word.
        limits = dict(recompile_limit=64, accumulated_recompile_limit=1024, fail_on_recompile_limit_hit=True)
        with torch._dynamo.config.patch(suppress_errors=False, **limits):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = tuning
        torch.compiler.reset()


def _free_memory(settings: Settings) -> None:
    gc.collect()
    if settings.device == 'cuda':
        torch.cuda.empty_cache()


def _synchronize(settings: Settings) -> None:
    if settings.device == 'cuda':
        torch.cuda.synchronize()


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
