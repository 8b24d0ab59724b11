"""Time models side by side, and count what they keep for the backward pass: ours, timm's or torchvision's.

python tools/benchmark.py sknet50 skresnext50_32x4d resnext50_32x4d --baseline resnext50_32x4d --mode both
python tools/benchmark.py sknet50 sknet50:fuse sknet50:compile 'sknet50[sk_kwargs.reduction=32]' torchvision:resnet50
python tools/benchmark.py --set standard   # the README's figures on a CPU (`make bench`)
python tools/benchmark.py --set gpu        # those on a GPU (`make bench-gpu`)

A model is a timm name or torchvision:NAME, with arguments in brackets where wanted, then :fuse (sk_plugins.fuse) and
:compile (torch.compile). Every repeat times each model once, in turn (A B C A B C ...), so that what slows the machine
down for a while slows all of them; a ratio is the median over the repeats of the ratio within a repeat. The spread is
the interquartile range in per cent of the median. The weights and the images are random. Memory that is freed
stays with the process (:func:`keep_freed_memory`).
"""

import argparse
import ast
import contextlib
import ctypes
import datetime
import difflib
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sk_plugins

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
MEMORY_FORMATS = {'channels_last': torch.channels_last, 'contiguous': torch.contiguous_format}
MODES = {'infer': 'inference', 'train': 'training step'}
QUANTITIES = {'seconds': 'time', 'saved_mib': 'bytes saved for backward', 'peak_mib': 'peak memory'}
NOT_MEASURED = 'not measured yet'
MIB = 2**20
WARM_UP_STEPS = 3
MAX_ITERATIONS = 100

Step = Callable[[], object]
Timer = Callable[[Step, int], float]


@dataclass(frozen=True)
class Variant:
    """A model and what is done to it. ``label`` is the text it is written as on the command line."""

    name: str
    source: str = 'timm'
    arguments: str = ''
    fuse: bool = False
    compile: bool = False

    @property
    def label(self) -> str:
        source = '' if self.source == 'timm' else f'{self.source}:'
        arguments = f'[{self.arguments}]' if self.arguments else ''
        return f'{source}{self.name}{arguments}{":fuse" * self.fuse}{":compile" * self.compile}'

    @classmethod
    def parse(cls, text: str, fuse: bool = False, compile: bool = False) -> 'Variant':
        """The variant that ``text`` names; ``fuse`` and ``compile`` do so to every model.

        Raises:
            ValueError: not of the form NAME[key=value,...]:fuse:compile.
        """
        match = re.fullmatch(r'(torchvision:)?([\w.-]+)(?:\[(.+)\])?((?::[a-z]+)*)', text)
        if match is None:
            raise ValueError(
                f'model={text!r} is not of the form [torchvision:]NAME[key=value,...][:fuse][:compile], '
                "e.g. sknet50:fuse or 'sknet50[sk_kwargs.reduction=32]:compile'"
            )
        source, name, arguments, modifiers = match.groups()
        modifiers = modifiers.split(':')[1:]
        for modifier in modifiers:
            if modifier not in ('fuse', 'compile'):
                raise ValueError(f"model={text!r} has ':{modifier}': there are :fuse and :compile")
        parse_arguments(arguments or '')
        return cls(
            name,
            'torchvision' if source else 'timm',
            arguments or '',
            fuse=fuse or 'fuse' in modifiers,
            compile=compile or 'compile' in modifiers,
        )

    def build(self) -> nn.Module:
        """The model with random weights, neither fused nor compiled yet.

        Raises:
            ValueError: there is no such model, or it doesn't take the arguments.
        """
        if self.source == 'torchvision':
            try:
                from torchvision import models
            except ImportError as error:
                raise ValueError(f'model={self.label!r} needs torchvision, which is not installed') from error
            names, create = models.list_models(), models.get_model
        else:
            names, create = timm.list_models(), timm.create_model
        if self.name.split('.')[0] not in names:
            close = difflib.get_close_matches(self.name, names, n=3)
            hint = f': did you mean {", ".join(close)}?' if close else ''
            raise ValueError(f'model={self.label!r} is unknown to {self.source}{hint}')
        try:
            return create(self.name, **parse_arguments(self.arguments))
        except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f'model={self.label!r} cannot be built: {error}') from error


def parse_arguments(text: str) -> dict[str, Any]:
    """'num_classes=10,sk_kwargs.reduction=32' as {'num_classes': 10, 'sk_kwargs': {'reduction': 32}}.

    Values are JSON (8, 0.5, false, [3,5]) or Python (False, None, (3,5)), and text where they are neither.

    Raises:
        ValueError: something that is not key=value, or a key that is both a value and a prefix.
    """
    arguments = {}
    for item in re.split(r',(?=[\w.]+=)', text) if text else []:
        key, equals, value = item.partition('=')
        if not equals or not re.fullmatch(r'\w+(\.\w+)*', key):
            raise ValueError(f'model argument {item!r} is not of the form key=value')
        *outer, last = key.split('.')
        inner = arguments
        for name in outer:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise ValueError(f'model argument {item!r}: {name} already has a value of its own')
        inner[last] = _parse_value(value)
    return arguments


def _parse_value(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError):
            return parse(text)
    return text


@dataclass(frozen=True)
class Settings:
    """What all models of a run share. ``dtype`` other than float32 is that of autocast.

    ``min_seconds`` is how long a model runs per repeat at least: as many iterations as that takes.
    """

    device: str = 'cpu'
    dtype: str = 'float32'
    memory_format: str = 'channels_last'
    batch_size: int = 8
    size: int = 224
    repeats: int = 15
    threads: int | None = None
    min_seconds: float = 0.5

    def check(self) -> None:
        """Raises ValueError for what cannot be run, here or anywhere."""
        for name in ('batch_size', 'size', 'repeats', 'threads'):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f'--{name.replace("_", "-")} {value}: must be at least 1')
        if self.device == 'cuda' and not torch.cuda.is_available():
            raise ValueError('--device cuda: torch finds no CUDA device here (torch.cuda.is_available() is False)')

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, DTYPES[self.dtype], enabled=self.dtype != 'float32')

    def images(self, count: int | None = None) -> Tensor:
        """A batch, (count, 3, size, size) of N(0, 1); ``batch_size`` images where ``count`` is None."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(count or self.batch_size, 3, self.size, self.size, generator=generator)
        return images.to(self.device, memory_format=MEMORY_FORMATS[self.memory_format])


@dataclass
class Result:
    """What was measured of a model in one mode.

    ``samples`` are seconds per step, one for each repeat. ``saved_mib`` is what autograd keeps of one image, in MiB
    (training, not compiled), and ``peak_mib`` what a step of the whole batch allocates at its peak, weights, optimizer
    and batch included (GPU only).
    """

    mode: str
    model: str
    samples: list[float] = field(default_factory=list)
    saved_mib: float | None = None
    peak_mib: float | None = None

    @property
    def seconds(self) -> float:
        return statistics.median(self.samples)


@dataclass
class Ratio:
    """A ratio of two models: its median over the repeats and the quartiles; for memory there is one value."""

    median: float
    low: float | None = None
    high: float | None = None

    @property
    def spread(self) -> float | None:
        """Interquartile range in per cent of the median."""
        return None if self.low is None else 100 * (self.high - self.low) / self.median


def summarise(samples: Sequence[float]) -> Ratio:
    """Median and quartiles; one sample has no quartiles."""
    if len(samples) == 1:
        return Ratio(samples[0])
    low, median, high = statistics.quantiles(samples, n=4, method='inclusive')
    return Ratio(median, low, high)


def ratio(result: Result | None, against: Result | None, quantity: str = 'seconds') -> Ratio | None:
    """``result`` by ``against``, None where either was not measured. Times are divided within each repeat."""
    if result is None or against is None:
        return None
    if quantity == 'seconds':
        return summarise([a / b for a, b in zip(result.samples, against.samples)])
    a, b = getattr(result, quantity), getattr(against, quantity)
    return None if a is None or b is None else Ratio(a / b)


# Timing


def cpu_timer(step: Step, iterations: int) -> float:
    """Seconds that ``iterations`` steps take."""
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


def interleave(steps: Sequence[Step], repeats: int, timer: Timer, min_seconds: float = 0.0) -> list[list[float]]:
    """Seconds per step of each of ``steps``, ``repeats`` of them, taken in turn.

    A first round, left out, says how many iterations of each last ``min_seconds``.
    """
    iterations = []
    for step in steps:
        seconds = max(timer(step, 1), 1e-9)
        iterations.append(min(max(math.ceil(min_seconds / seconds), 1), MAX_ITERATIONS))
    samples = [[] for _ in steps]
    for _ in range(repeats):
        for step, count, taken in zip(steps, iterations, samples):
            taken.append(timer(step, count) / count)
    return samples


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


def saved_mib_per_image(model: nn.Module, settings: Settings) -> float:
    """MiB that one more image in a training batch makes autograd keep, loss included.

    The difference of a batch of four and one of two: autocast's copies of the weights, which it keeps too, don't grow
    with the batch.
    """

    def forward(images: Tensor) -> Tensor:
        with settings.autocast():
            return _loss(model, images)

    two, four = (saved_bytes(model, settings.images(count), forward) for count in (2, 4))
    return (four - two) / 2 / MIB


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


def _wake_residual_branches(model: nn.Module) -> None:
    """Norms that start at zero get a weight: a GPU finishes arithmetic on zeros sooner than on other numbers."""
    for module in model.modules():
        weight = getattr(module, 'weight', None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 1 and not weight.any():
            nn.init.constant_(weight, 0.2)


def prepare(variant: Variant, mode: str, settings: Settings, images: Tensor) -> tuple[Result, Step]:
    """Build a model, count its memory, and run its step until it is warm; the result has no times yet.

    Raises:
        ValueError: the model cannot be built, fused, compiled or run; the message begins with its label.
    """
    cuda = settings.device == 'cuda'
    before = torch.cuda.memory_allocated() if cuda else 0
    torch.manual_seed(0)
    model = variant.build().train(mode == 'train')
    result = Result(mode, variant.label)
    try:
        _wake_residual_branches(model)
        if variant.fuse:
            model = sk_plugins.fuse(model)
        model.to(settings.device, memory_format=MEMORY_FORMATS[settings.memory_format])
        if mode == 'train' and not variant.compile:
            result.saved_mib = saved_mib_per_image(model, settings)
        if variant.compile:
            model = torch.compile(model)
        step = (train_step if mode == 'train' else infer_step)(model, images, settings)
        for _ in range(WARM_UP_STEPS):
            step()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            step()
            torch.cuda.synchronize()
            # What the models before this one hold lies below `before`, and so do the images.
            result.peak_mib = (torch.cuda.max_memory_allocated() - before + images.nbytes) / MIB
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f'model={variant.label!r} in {MODES[mode]}: {error}') from error
    return result, step


def measure(variants: Sequence[Variant], mode: str, settings: Settings, timer: Timer | None = None) -> list[Result]:
    """Time all ``variants`` in one interleaved run of ``mode``, 'infer' or 'train'."""
    timer = timer or (cuda_timer if settings.device == 'cuda' else cpu_timer)
    with _environment(settings):
        images = settings.images()
        results, steps = [], []
        for variant in variants:
            start = time.perf_counter()
            result, step = prepare(variant, mode, settings, images)
            results.append(result)
            steps.append(step)
            _say(f'{MODES[mode]}: {variant.label} is warm after {time.perf_counter() - start:.0f} s')
        start = time.perf_counter()
        for result, samples in zip(results, interleave(steps, settings.repeats, timer, settings.min_seconds)):
            result.samples = samples
        _say(f'{MODES[mode]}: {settings.repeats} repeats took {time.perf_counter() - start:.0f} s')
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
            gc.collect()
            torch.cuda.empty_cache()
            # cuBLAS keeps a workspace per thread from its first use on; it is nobody's.
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


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# What is measured


@dataclass(frozen=True)
class Figure:
    """A row of a set's table: a quantity of ``model`` by that of another for each of the set's columns.

    ``against`` has (model, goal) per column, the goal None where there is none, or None for an empty cell.
    """

    label: str
    mode: str
    quantity: str
    model: str
    against: tuple[tuple[str, float | None] | None, ...]

    def models(self) -> list[str]:
        return [self.model, *(cell[0] for cell in self.against if cell is not None)]


@dataclass(frozen=True)
class Set:
    """Figures that belong together, the settings they are measured in, and the baseline of the tables of times."""

    title: str
    settings: Settings
    baseline: str
    columns: tuple[str, ...]
    figures: tuple[Figure, ...]

    def runs(self) -> dict[str, list[Variant]]:
        """The models of each mode, in the order the figures first name them."""
        runs: dict[str, dict[Variant, None]] = {}
        for figure in self.figures:
            for model in figure.models():
                runs.setdefault(figure.mode, {})[Variant.parse(model)] = None
        return {mode: list(variants) for mode, variants in runs.items()}


_COLUMNS = ('timm `skresnext50_32x4d` = 1', 'ResNeXt-50 32x4d = 1')


def _figure(label: str, mode: str, quantity: str, timms: float | None, resnexts: float | None, how: str = '') -> Figure:
    """SKNet-50 against timm's and ResNeXt-50, all of them built ``how``; the last two numbers are goals."""
    against = ((f'skresnext50_32x4d{how}', timms), (f'resnext50_32x4d{how}', resnexts))
    return Figure(label, mode, quantity, f'sknet50{how}', against)


SETS = {
    'standard': Set(
        'SKNet-50 on a CPU',
        Settings(threads=2),
        'resnext50_32x4d',
        _COLUMNS,
        (
            _figure('eager inference, unfused', 'infer', 'seconds', 0.66, 1.20),
            Figure(
                'eager inference, `fuse` on both',
                'infer',
                'seconds',
                'sknet50:fuse',
                (None, ('resnext50_32x4d:fuse', 1.15)),
            ),
            _figure('compiled inference', 'infer', 'seconds', 0.95, 1.10, ':compile'),
            _figure('training step, eager', 'train', 'seconds', 0.80, 1.20),
            _figure('bytes saved for backward', 'train', 'saved_mib', 0.76, 1.13),
        ),
    ),
    'gpu': Set(
        'SKNet-50 on a GPU',
        Settings(device='cuda', dtype='bfloat16', batch_size=128),
        'resnext50_32x4d',
        _COLUMNS,
        (
            _figure('training step, eager', 'train', 'seconds', 0.65, None),
            _figure('training step, compiled', 'train', 'seconds', 0.95, None, ':compile'),
            _figure('inference, eager', 'infer', 'seconds', 0.55, None),
            _figure('inference, compiled', 'infer', 'seconds', None, None, ':compile'),
            _figure('peak memory of a training step, eager', 'train', 'peak_mib', 0.75, None),
            _figure('peak memory of a training step, compiled', 'train', 'peak_mib', None, None, ':compile'),
        ),
    ),
}


def describe_machine(device: str) -> dict[str, Any]:
    """What the figures depend on besides the settings: hardware, versions, the date."""
    machine = {
        'date': datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        'cpu': _cpu_model(),
        'cpu_capability': torch.backends.cpu.get_cpu_capability(),
        'cores': os.cpu_count(),
        'threads': torch.get_num_threads(),
        'keeps_freed_memory': _keeps_freed_memory,
        'load_average': round(os.getloadavg()[0], 2) if hasattr(os, 'getloadavg') else None,
        'gpu': None,
        'system': f'{platform.system()} {platform.machine()}',
        'python': platform.python_version(),
        'sk_plugins': sk_plugins.__version__,
        'torch': torch.__version__,
        'timm': timm.__version__,
        'torchvision': None,
    }
    if importlib.util.find_spec('torchvision') is not None:
        machine['torchvision'] = importlib.metadata.version('torchvision')
    if device == 'cuda':
        properties = torch.cuda.get_device_properties(0)
        machine['gpu'] = f'{properties.name}, {properties.total_memory / 2**30:.0f} GiB'
        machine['cuda'], machine['cudnn'] = torch.version.cuda, torch.backends.cudnn.version()
    return machine


_keeps_freed_memory = False


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, as torch's allocator does on GPUs; other C libraries are left as they are.

    Otherwise it hands the top of the heap back to the system and gets it anew, page by page, in every step. That was up
    to a quarter of a training step, and not for all alike: it spares a model above whose maps another's parameters lie.
    """
    global _keeps_freed_memory
    trim_threshold, mmap_max = -1, -4  # glibc's malloc.h
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
    _keeps_freed_memory = mallopt is not None and bool(mallopt(trim_threshold, -1) and mallopt(mmap_max, 0))


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()


# Reports: plain data, which is what the JSON file holds and what the tables and the plot are made of


def make_report(
    title: str,
    settings: Settings,
    results: Sequence[Result],
    baseline: str,
    machine: dict[str, Any] | None,
    chosen: Set | None = None,
) -> dict[str, Any]:
    """All that was measured, ready for JSON. ``results`` may lack some of a set's models, or all of them."""
    by_name = {(result.mode, result.model): result for result in results}

    def compare(mode: str, quantity: str, model: str, against: str) -> dict[str, Any] | None:
        found = ratio(by_name.get((mode, model)), by_name.get((mode, against)), quantity)
        return None if found is None else {**asdict(found), 'spread_percent': found.spread}

    rows = []
    for result in results:
        times = summarise(result.samples)
        rows.append(
            {
                **asdict(result),
                'seconds': result.seconds,
                'spread_percent': times.spread,
                'images_per_second': settings.batch_size / result.seconds,
                'ratios': {q: compare(result.mode, q, result.model, baseline) for q in QUANTITIES},
            }
        )
    figures = []
    for figure in chosen.figures if chosen else ():
        cells = []
        for cell in figure.against:
            if cell is None:
                cells.append(None)
                continue
            against, goal = cell
            found = compare(figure.mode, figure.quantity, figure.model, against)
            met = None if found is None or goal is None else found['median'] <= goal
            cells.append({'against': against, 'goal': goal, 'ratio': found, 'met': met})
        figures.append({**asdict(figure), 'against': cells})
    return {
        'title': title,
        'machine': machine,
        'settings': asdict(settings),
        'baseline': baseline,
        'results': rows,
        'columns': list(chosen.columns) if chosen else [],
        'figures': figures,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as Markdown: the set's figures, how they were measured, and the tables of all models."""
    parts = [f'# {report["title"]}']
    if report['figures']:
        parts.append(figures_table(report))
    parts.append(_how(report))
    for mode, name in MODES.items():
        rows = [row for row in report['results'] if row['mode'] == mode]
        if rows:
            parts += [f'## {name.capitalize()}', _models_table(rows, report['baseline'])]
    return '\n\n'.join(parts) + '\n'


def figures_table(report: dict[str, Any]) -> str:
    """A set's figures, one row each; what was not measured says so."""
    lines = [['', *report['columns']], ['---'] * (1 + len(report['columns']))]
    lines += [[figure['label'], *map(_cell, figure['against'])] for figure in report['figures']]
    return _table(lines)


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ''
    goal = '' if cell['goal'] is None else f'goal {cell["goal"]:.2f}'
    if cell['ratio'] is None:
        return f'{NOT_MEASURED} ({goal})' if goal else NOT_MEASURED
    notes = [_spread(cell['ratio'])] if cell['ratio']['spread_percent'] is not None else []
    if goal:
        notes.append(f'{goal}: {"met" if cell["met"] else "missed"}')
    return f'**{cell["ratio"]["median"]:.3f}**' + (f' ({", ".join(notes)})' if notes else '')


def _spread(ratio: dict[str, Any]) -> str:
    return f'spread {ratio["spread_percent"]:.1f} %'


def _models_table(rows: list[dict[str, Any]], baseline: str) -> str:
    """One row per model; columns that no model has a figure for are left out."""
    columns = {
        'model': [f'`{row["model"]}`' for row in rows],
        'ms per step': [f'{1000 * row["seconds"]:.1f}' for row in rows],
        'spread': ['' if row['spread_percent'] is None else f'{row["spread_percent"]:.1f} %' for row in rows],
        'images/s': [f'{row["images_per_second"]:.1f}' for row in rows],
        f'time, `{baseline}` = 1': [_ratio_cell(row, 'seconds', baseline) for row in rows],
    }
    for quantity, name, unit in (('saved_mib', 'saved', 'MiB per image'), ('peak_mib', 'peak', 'MiB')):
        if any(row[quantity] is not None for row in rows):
            columns[f'{name}, {unit}'] = ['' if row[quantity] is None else f'{row[quantity]:.1f}' for row in rows]
            columns[f'{name}, `{baseline}` = 1'] = [_ratio_cell(row, quantity, baseline) for row in rows]
    columns = {head: cells for head, cells in columns.items() if any(cells)}
    return _table([list(columns), ['---', *['---:'] * (len(columns) - 1)], *zip(*columns.values())])


def _ratio_cell(row: dict[str, Any], quantity: str, baseline: str) -> str:
    ratio = row['ratios'][quantity]
    if ratio is None:
        return ''
    if row['model'] == baseline:
        return '1'
    return f'{ratio["median"]:.3f}' + ('' if ratio['spread_percent'] is None else f' ({_spread(ratio)})')


def _table(lines: Sequence[Sequence[str]]) -> str:
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)


def _how(report: dict[str, Any]) -> str:
    settings, machine = report['settings'], report['machine']
    precision = settings['dtype'] if settings['dtype'] == 'float32' else f'{settings["dtype"]} autocast'
    text = (
        f'Batch {settings["batch_size"]}, {settings["size"]} x {settings["size"]}, {precision}, '
        f'{settings["memory_format"]}; medians of {settings["repeats"]} interleaved repeats, ratios taken within each '
        'repeat; spread: interquartile range by median; bytes saved: tensors that autograd keeps of one image, by '
        'storage, parameters and buffers left out.'
    )
    if machine is None:
        return text + ' Measured on no machine so far.'
    versions = [f'{name} {machine[name]}' for name in ('torch', 'timm', 'torchvision') if machine[name]]
    where = [machine['gpu']] if machine['gpu'] else []
    where.append(f'{machine["cpu"]} ({machine["cpu_capability"]}), {machine["cores"]} cores')
    where.append(f'{machine["threads"]} thread{"s" * (machine["threads"] != 1)}')
    if machine.get('keeps_freed_memory'):
        where.append('freed memory kept')
    where += [f'Python {machine["python"]}', *versions, machine['date'][:10]]
    return f'{text} Measured on: {", ".join(where)}.'


@dataclass(frozen=True)
class Bar:
    """A bar of the plot."""

    label: str
    ratio: Ratio
    goal: float | None = None


def bars(report: dict[str, Any]) -> dict[str, list[Bar]]:
    """The plot's bars by panel: a set's columns, or the quantities of a list of models. What has no figure has none."""
    panels: dict[str, list[Bar]] = {}

    def add(panel: str, label: str, found: dict[str, Any] | None, goal: float | None = None) -> None:
        if found is not None:
            bar = Bar(label, Ratio(found['median'], found['low'], found['high']), goal)
            panels.setdefault(panel, []).append(bar)

    for figure in report['figures']:
        for column, cell in zip(report['columns'], figure['against']):
            if cell is not None:
                add(column.replace('`', ''), figure['label'].replace('`', ''), cell['ratio'], cell['goal'])
    if not report['figures']:
        for row in report['results']:
            for quantity, name in QUANTITIES.items():
                panel = f'{MODES[row["mode"]]}: {name}\n{report["baseline"]} = 1'
                add(panel, row['model'], row['ratios'][quantity])
    return panels


def draw(report: dict[str, Any], path: Path) -> None:
    """The ratios as bars with their quartiles, goals as strokes, into a PNG, SVG or PDF file."""
    from matplotlib.figure import Figure as Canvas

    panels = bars(report)
    label = dict(facecolor='white', edgecolor='none', pad=1)
    height = 1.2 + 0.42 * max((len(panel) for panel in panels.values()), default=1)
    canvas = Canvas(figsize=(6.5 * max(len(panels), 1), height), layout='constrained')
    for axes, (title, panel) in zip(canvas.subplots(1, max(len(panels), 1), squeeze=False)[0], panels.items()):
        for position, bar in enumerate(panel):
            found = bar.ratio
            axes.barh(position, found.median, height=0.6, color='tab:blue' if found.median <= 1 else 'tab:orange')
            end = found.median
            if found.low is not None:
                error = [[found.median - found.low], [found.high - found.median]]
                axes.errorbar(found.median, position, xerr=error, color='black', capsize=3)
                end = found.high
            if bar.goal is not None:
                axes.plot([bar.goal] * 2, [position - 0.38, position + 0.38], color='tab:green', linewidth=3)
                end = max(end, bar.goal)
            axes.annotate(
                f'{found.median:.2f}',
                (end, position),
                xytext=(5, 0),
                textcoords='offset points',
                va='center',
                bbox=label,
            )
        axes.axvline(1, color='black', linewidth=0.8)
        axes.set_yticks(range(len(panel)), [bar.label for bar in panel])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlim(left=0)
        axes.set_title(title, fontsize='medium')
        axes.set_xlabel('ratio, less is better' + ('; green: the goal' if any(b.goal for b in panel) else ''))
        axes.spines[['top', 'right']].set_visible(False)
    canvas.suptitle(report['title'])
    canvas.savefig(path, dpi=120)


# The command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('models', nargs='*', metavar='MODEL', help='e.g. sknet50, sknet50:fuse, torchvision:resnet50')
    parser.add_argument('--set', choices=SETS, help='the models, modes and settings of a table of figures')
    parser.add_argument('--baseline', help='the model whose figures are 1 (default: the first)')
    parser.add_argument('--mode', choices=[*MODES, 'both'], help='forward pass, training step or both (default: infer)')
    parser.add_argument('--device', choices=['cpu', 'cuda'], help='default: cpu')
    parser.add_argument('--dtype', choices=DTYPES, help='default: float32; with others, autocast')
    parser.add_argument('--memory-format', choices=MEMORY_FORMATS, help='default: channels_last')
    parser.add_argument('--batch-size', type=int, metavar='N', help='default: 8')
    parser.add_argument('--size', type=int, metavar='PIXELS', help='side of the images (default: 224)')
    parser.add_argument('--repeats', type=int, metavar='N', help='default: 15')
    parser.add_argument('--threads', type=int, metavar='N', help="CPU threads (default: torch's)")
    parser.add_argument('--compile', action='store_true', help='torch.compile every model')
    parser.add_argument('--fuse', action='store_true', help='sk_plugins.fuse every model (inference only)')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write everything measured there')
    parser.add_argument('--markdown', type=Path, metavar='FILE', help='write the tables there')
    parser.add_argument('--plot', type=Path, metavar='FILE', help='draw the ratios there (PNG, SVG or PDF)')
    parser.add_argument('--blank', action='store_true', help="measure nothing: a set's table that says so")
    return parser


def _settings(args: argparse.Namespace, default: Settings) -> Settings:
    given = {f.name: getattr(args, f.name) for f in fields(Settings) if getattr(args, f.name, None) is not None}
    settings = replace(default, **given)
    if not args.blank:
        settings.check()
    return settings


def _variants(args: argparse.Namespace) -> tuple[list[Variant], Variant]:
    """The models of the command line and their baseline, checked."""
    variants = [Variant.parse(text, args.fuse, args.compile) for text in args.models]
    for i, variant in enumerate(variants):
        if variant in variants[:i]:
            raise ValueError(f'model={variant.label!r} is given twice')
        if variant.fuse and args.mode not in (None, 'infer'):
            raise ValueError(f'model={variant.label!r}: fuse is for inference, got --mode {args.mode}')
    if args.baseline is None:
        return variants, variants[0]
    baseline = Variant.parse(args.baseline, args.fuse, args.compile)
    if baseline not in variants:
        models = ', '.join(variant.label for variant in variants)
        raise ValueError(f'--baseline {args.baseline} is not one of the models: {models}')
    return variants, baseline


def _check_outputs(args: argparse.Namespace) -> None:
    """Before minutes of measuring, that its outcome can be written."""
    for path in (args.json, args.markdown, args.plot):
        if path is not None:
            if path.is_dir():
                raise ValueError(f'{path} is a folder: a file is needed')
            path.parent.mkdir(parents=True, exist_ok=True)
    if args.plot is not None:
        if args.plot.suffix.lower() not in ('.png', '.svg', '.pdf'):
            raise ValueError(f'--plot {args.plot}: the name must end in .png, .svg or .pdf')
        if importlib.util.find_spec('matplotlib') is None:
            raise ValueError("--plot needs matplotlib, which is not installed (it comes with the extra 'mm')")


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what the arguments ask for, and return the report.

    Raises:
        ValueError: an unknown model, a device that isn't there, arguments that don't go together.
    """
    chosen = SETS.get(args.set)
    if chosen is not None:
        for option in ('models', 'baseline', 'mode', 'fuse', 'compile'):
            if getattr(args, option):
                name = 'models' if option == 'models' else f'--{option}'
                raise ValueError(f'--set {args.set} brings its own models and modes: leave {name} out')
        title, baseline, runs = chosen.title, Variant.parse(chosen.baseline), chosen.runs()
    else:
        if not args.models:
            raise ValueError('name the models to compare, or a --set of them')
        if args.blank:
            raise ValueError('--blank is for a --set')
        variants, baseline = _variants(args)
        modes = MODES if args.mode == 'both' else [args.mode or 'infer']
        title, runs = 'Benchmark', dict.fromkeys(modes, variants)
    settings = _settings(args, chosen.settings if chosen else Settings())
    if 'train' in runs and settings.batch_size < 2 and not args.blank:
        raise ValueError('--batch-size 1: a training step needs two images or more, for the BatchNorms')
    _check_outputs(args)
    if args.blank:
        return make_report(title, settings, [], baseline.label, None, chosen)
    # A model that can't be built is to be found now, not after minutes.
    for variant in dict.fromkeys(replace(v, fuse=False, compile=False) for run in runs.values() for v in run):
        variant.build()
    machine = describe_machine(settings.device)
    machine['threads'] = settings.threads or machine['threads']
    if machine['load_average'] and machine['load_average'] > 0.5:
        _say(f'the machine is busy (load average {machine["load_average"]}): the spread will tell')
    results = [result for mode, variants in runs.items() for result in measure(variants, mode, settings)]
    return make_report(title, settings, results, baseline.label, machine, chosen)


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    report = benchmark(args)
    text = markdown(report)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + '\n', encoding='utf-8')
    if args.markdown is not None:
        args.markdown.write_text(text, encoding='utf-8')
    if args.plot is not None:
        draw(report, args.plot)
    print(text, end='')


def run(main: Callable[[], None] = main) -> None:
    """The command: what the user can put right is one line on stderr and exit status 1."""
    keep_freed_memory()
    try:
        main()
    except (OSError, ValueError) as error:
        if os.environ.get('SK_PLUGINS_TRACEBACK'):
            raise
        lines = str(error).split('\n\n')[0]  # torch's errors go on for pages
        print(f'{Path(sys.argv[0]).name}: error: {" ".join(lines.split())}', file=sys.stderr)
        print('(set SK_PLUGINS_TRACEBACK=1 for the traceback)', file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == '__main__':
    run()
