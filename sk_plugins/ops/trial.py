"""A trial of the GPU's engine on a device that it meets for the first time: it must be right there, and faster.

On a card where they were never run, kernels may be slower than torch's own, or wrong. So before they are used they are
timed against plain torch, the host included, on a small map and on a large one, and compared with it. Each kind of
work has a trial of its own when it is first met: training, training with frozen norms, inference, and inference with
folded norms. The verdict is
kept on disk, for the device, the dtype, the memory format, torch's and Triton's versions and the engine's sources.

``SK_PLUGINS_ENGINE`` set to ``plain`` or ``triton`` replaces the verdict.
"""

import functools
import hashlib
import importlib.metadata
import importlib.resources
import json
import logging
import math
import os
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._files import write_atomically
from . import gpu, private
from .functions import BranchSpec, NormAct, NormReluSelect, NormSpec
from .reference import Attention, Branches, batch_norm, norm_relu_select

__all__ = ['accepts', 'cache_file', 'forget', 'is_refused']

logger = logging.getLogger('sk_plugins')

_verdicts: dict[tuple, dict[str, Any]] = {}
_one_at_a_time = threading.Lock()  # or trials would measure each other

VARIABLE, ENGINES = 'SK_PLUGINS_ENGINE', ('plain', 'triton')
# (B, C, H, W): a unit's map in the last stage for a batch of four small images, and in the first for a batch of 64.
SMALL, LARGE = (4, 128, 16, 16), (64, 128, 56, 56)
# What is compared with the CPU: tiles that are full and others that are not. The divisors of its channels and positions
# are those of common maps, so that it takes the same kernels.
CHECKED = (3, 48, 20, 20)
_BETWEEN = math.sqrt(math.prod(SMALL) * math.prod(LARGE))  # elements from which on a map is a large one
SIZES = {'small': SMALL, 'large': LARGE}
# By kind of work, what the norms take, and whether there are gradients.
KINDS = {
    'training': ('batch', True),
    'frozen norms': ('running', True),
    'inference': ('running', False),
    'folded inference': ('folded', False),
}
REPEATS = 7
# Relative, of a map's or a gradient's norm. Where plain torch in the dtype is off by more, as with TF32, twice that.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def accepts(x: Tensor, norm: str, wanted: bool = False) -> bool:
    """Whether the kernels are to compute a unit whose input is ``x``.

    Args:
        x: (B, C, H, W), on a GPU, or on a CPU where Triton's interpreter stands in for one.
        norm: what the unit's BatchNorms take: statistics of the 'batch', the 'running' ones, or none where they are
            'folded' into the convolutions, for inference.
        wanted: whether they are asked for by name (``backend='triton'``): then they need be right, not faster.

    Raises:
        ValueError: ``SK_PLUGINS_ENGINE`` is set to what is no engine.
    """
    device = x.device.type
    lowered = x.dtype is not torch.float64 and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if lowered else x.dtype
    if not x.is_cuda:  # the interpreter, which is slow by nature
        return _engine_of_environment() != 'plain' and gpu.why_not(x) is None
    if x.get_device() != torch.cuda.current_device():
        _say_once(f'tensors on {x.device}, which is not the current device: torch.cuda.set_device makes it so')
        return False
    if norm == 'batch':  # without gradients too, whose kernels are among those of a training step
        kind = 'training'
    elif norm == 'running':
        kind = 'frozen norms' if torch.is_grad_enabled() else 'inference'
    else:
        kind = 'folded inference'
    subject = x.device, dtype, kind, x.stride(1) == 1
    verdict = _verdicts.get(subject)
    if verdict is None:
        # A trial synchronises, which ends a capture, and differentiates, for which a backward pass would wait.
        if torch.cuda.is_current_stream_capturing() or private.in_backward():
            return False
        with _one_at_a_time:
            verdict = _verdicts.get(subject)
            if verdict is None:
                verdict = _verdicts[subject] = _verdict(*subject)
    if verdict['wrong'] is not None:
        return False
    return wanted or verdict['ratios']['small' if x.numel() < _BETWEEN else 'large'] < 1


def is_refused(device: torch.device) -> bool:
    """Whether the environment, or a trial that was made on a device, says that the kernels are not to be used.

    It makes no trial: a compiler asks, whose graph is to run on the device later.
    """
    if _engine_of_environment() == 'plain':
        return True
    known = [verdict for (where, dtype, *_), verdict in _verdicts.items() if where == device and dtype in TOLERANCES]
    if device.type == 'cuda':
        begin, end = f'{torch.cuda.get_device_name(device)}, ', f', {_versions()}'
        known += [verdict for key, verdict in _read().items() if key.startswith(begin) and key.endswith(end)]
    return any(verdict['wrong'] is not None for verdict in known)


def _engine_of_environment() -> str | None:
    engine = os.environ.get(VARIABLE)
    if engine not in (None, '', *ENGINES):
        choices = ' or '.join(map(repr, ENGINES))
        raise ValueError(f'{VARIABLE}={engine!r} in the environment must be {choices}, or unset')
    return engine


def cache_file() -> Path:
    """Where verdicts are kept: ``$SK_PLUGINS_CACHE``, else ``sk-plugins`` in the user's cache folder."""
    folder = os.environ.get('SK_PLUGINS_CACHE')
    if not folder:
        folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'sk-plugins'
    return Path(folder) / 'engines.json'


def forget() -> None:
    """Drop the verdicts of this process and those on disk: the next unit is a new trial."""
    _verdicts.clear()
    cache_file().unlink(missing_ok=True)


def _verdict(device: torch.device, dtype: torch.dtype, kind: str, channels_last: bool) -> dict[str, Any]:
    said = _engine_of_environment()  # asked once: at every call it would cost five calls more
    reason = f'{VARIABLE}=plain' if said == 'plain' else gpu.why_not(torch.empty(0, dtype=dtype))
    if reason is not None:
        if said != 'plain':
            _say_once(reason)
        return {'wrong': reason, 'ratios': {}}
    verdict = _measured(device, dtype, kind, torch.channels_last if channels_last else torch.contiguous_format)
    return {**verdict, 'ratios': dict.fromkeys(SIZES, 0.0)} if said == 'triton' else verdict


def _measured(
    device: torch.device, dtype: torch.dtype, kind: str, memory_format: torch.memory_format
) -> dict[str, Any]:
    """The verdict from disk, or a trial's."""
    key = _key(device, dtype, kind, memory_format)
    kept = _read()
    if key in kept:
        return kept[key]
    start = time.perf_counter()
    # In a thread of its own, where none of the caller's modes hold: inference, autocast, hooks on saved tensors.
    with ThreadPoolExecutor(1) as executor:
        try:
            verdict = executor.submit(_try, device, dtype, kind, memory_format).result()
        except Exception as error:  # compilers fail in many ways, and plain torch serves all the same
            # Not kept on disk: a missing compiler or a full memory is of the moment.
            reason = f'a kernel failed ({type(error).__name__}: {error})'
            logger.warning('The Triton kernels are not used on %s: %s', key, reason)
            return {'wrong': reason, 'ratios': {}}
    seconds = time.perf_counter() - start
    if verdict['wrong'] is None:
        ratios = ', '.join(f'{size} {value:.2f}' for size, value in verdict['ratios'].items())
        logger.info('Triton kernels on %s; time by that of plain torch: %s (%.1f s)', key, ratios, seconds)
    else:
        logger.warning('The Triton kernels are not used on %s: %s', key, verdict['wrong'])
    _write(key, verdict)
    return verdict


def _key(device: torch.device, dtype: torch.dtype, kind: str, memory_format: torch.memory_format) -> str:
    names = [str(name).removeprefix('torch.') for name in (dtype, memory_format)]
    return ', '.join([torch.cuda.get_device_name(device), *names, kind, _versions()])


def _versions() -> str:
    return ', '.join([*(f'{name} {_version(name)}' for name in ('torch', 'triton')), f'engine {_fingerprint()}'])


@functools.cache
def _fingerprint() -> str:
    """Of this folder's sources: a package's version stays the same from one commit to the next."""
    digest = hashlib.sha256()
    for file in sorted(importlib.resources.files(__package__).iterdir(), key=lambda file: file.name):
        if file.name.endswith('.py'):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return 'unknown'


def _read() -> dict[str, Any]:
    """The verdicts on disk, those that can be read."""
    try:
        kept = json.loads(cache_file().read_text())
    except (OSError, ValueError, RuntimeError):  # the last where there is no home
        return {}
    return {key: verdict for key, verdict in kept.items() if _is_verdict(verdict)} if isinstance(kept, dict) else {}


def _is_verdict(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get('ratios'), dict):
        return False
    wrong, ratios = value.get('wrong'), value['ratios']
    return isinstance(wrong, str) or ('wrong' in value and all(type(ratios.get(size)) is float for size in SIZES))


def _write(key: str, verdict: dict[str, Any]) -> None:
    """Whole or not at all: other processes read and write the same file."""
    try:
        with write_atomically(cache_file()) as partial:
            partial.write_text(json.dumps({**_read(), key: verdict}, indent=1))
    except (OSError, RuntimeError) as error:  # the last where there is no home
        logger.warning('The verdict on the Triton kernels cannot be kept: %s', error)


def _say_once(reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        logger.warning('sk_plugins runs plain torch, which is slower: %s', reason)


_said: set[str] = set()


class _Work:
    """One unit's worth of an engine's work, and the same in plain torch, on the same tensors.

    There are norms of two branches (0 and 1), of the layers around them (2) and of the attention (3).
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        device: torch.device,
        dtype: torch.dtype,
        memory_format: torch.memory_format = torch.channels_last,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
            return (torch.randn(size, generator=generator, dtype=torch.float32) * scale + shift).to(device)

        channels, dim = shape[1], max(shape[1] // 16, 32)
        maps = [draw(*shape).to(dtype).to(memory_format=memory_format) for _ in range(3)]
        self.maps = [y.requires_grad_() for y in maps]
        sizes = *[channels] * 3, dim
        self.scales = [draw(n, scale=0.2, shift=1.0).requires_grad_() for n in sizes]
        self.shifts = [draw(n, scale=0.2).requires_grad_() for n in sizes]
        self.reduce = draw(dim, channels, 1, 1, scale=channels**-0.5).requires_grad_()
        self.select = draw(2 * channels, dim, 1, 1, scale=dim**-0.5).requires_grad_()
        self.leaves = [*self.maps, *self.scales, *self.shifts, self.reduce, self.select]
        self.running = [(draw(n, scale=0.1), draw(n, scale=0.1, shift=1.0)) for n in sizes]
        self.batches = [torch.zeros((), dtype=torch.int64, device=device) for _ in sizes]
        self.grad = draw(*shape).to(dtype).to(memory_format=memory_format)

    def statistics(self) -> list[Tensor]:
        """What a training step updates."""
        return [*chain(*self.running), *self.batches]

    def _tensors(self, norm: str, i: int) -> list[Tensor | None]:
        """Scale, shift, and running mean and variance of a norm, where ``norm`` has them."""
        scale = None if norm == 'folded' else self.scales[i]
        return [scale, self.shifts[i], *(self.running[i] if norm == 'running' else (None, None))]

    def _updated(self, norm: str, *numbers: int) -> tuple[list, list]:
        batch = norm == 'batch'
        return ([self.running[i] for i in numbers], [self.batches[i] for i in numbers]) if batch else ([], [])

    def _branches(self, norm: str, second: Tensor) -> Branches:
        columns = list(zip(self._tensors(norm, 0), self._tensors(norm, 1)))
        if norm == 'batch':
            columns[2:] = [], []
        scale, shift, *statistics = self._tensors(norm, 3)
        attention = Attention(self.reduce, scale, shift, self.select, None, *statistics)
        return Branches([self.maps[0], second], *map(list, columns), attention)

    def engine(self, norm: str) -> Tensor:
        """A norm and its ReLU, of which a branch is made, V, and the end of a unit, by the kernels."""
        branches = self._branches(norm, self._norm_act(norm, [(self.maps[1], 2)]))
        spec = BranchSpec(gpu, 2, True, norm == 'batch', 0.1, 1e-5, *self._updated(norm, 0, 1, 3))
        if torch.is_grad_enabled():
            v = NormReluSelect.apply(spec, *spec.flatten(branches))
        else:
            v = gpu.forward(spec, branches)[0]
        return self._norm_act(norm, [(self.maps[2], 2)], shortcut=v)

    def plain(self, norm: str, relu: bool = True) -> Tensor:
        """The same in plain torch, or without the last ReLU."""
        numbers = iter((0, 1, 3))
        branches = self._branches(norm, self._plain_norm(norm, 2, self.maps[1]).relu_())
        v = norm_relu_select(branches, 1e-5, lambda y, *_: self._plain_norm(norm, next(numbers), y))
        y = self._plain_norm(norm, 2, self.maps[2])
        y += v
        return y.relu_() if relu else y

    def engine_of_two(self, norm: str) -> Tensor:
        """The end of a unit whose shortcut has a norm too, by the kernels."""
        return self._norm_act(norm, [(self.maps[0], 0), (self.maps[1], 1)])

    def plain_of_two(self, norm: str, relu: bool = True) -> Tensor:
        """The same in plain torch, or without the ReLU."""
        y = self._plain_norm(norm, 0, self.maps[0]) + self._plain_norm(norm, 1, self.maps[1])
        return y.relu_() if relu else y

    def engine_of_one(self, norm: str) -> Tensor:
        """A norm without a ReLU, as in a stem, by the kernels."""
        return self._norm_act(norm, [(self.maps[0], 0)], relu=False)

    def plain_of_one(self, norm: str) -> Tensor:
        """The same in plain torch."""
        return self._plain_norm(norm, 0, self.maps[0])

    def _norm_act(
        self, norm: str, layers: list[tuple[Tensor, int]], relu: bool = True, shortcut: Tensor | None = None
    ) -> Tensor:
        updated = self._updated(norm, *(i for _, i in layers))
        spec = NormSpec(gpu, relu, norm == 'batch', 0.1, 1e-5, *updated)
        tensors = [shortcut, *chain.from_iterable((y, *self._tensors(norm, i)) for y, i in layers)]
        return NormAct.apply(spec, *tensors) if torch.is_grad_enabled() else gpu.norm_act(spec, *tensors)[0]

    def _plain_norm(self, norm: str, i: int, y: Tensor) -> Tensor:
        if norm != 'batch':
            return batch_norm(y, *self._tensors(norm, i), 1e-5)
        self.batches[i].add_(1)
        return F.batch_norm(y, *self.running[i], self.scales[i], self.shifts[i], True, 0.1, 1e-5)

    def run(self, function: Callable[[str], Tensor], norm: str) -> list[Tensor]:
        """The output of one of these, and the gradients of what leads to it where they are wanted."""
        output = function(norm)
        wanted = torch.is_grad_enabled()
        found = torch.autograd.grad(output, self.leaves, self.grad, allow_unused=True) if wanted else ()
        return [output.detach(), *(grad for grad in found if grad is not None)]


def _try(device: torch.device, dtype: torch.dtype, kind: str, memory_format: torch.memory_format) -> dict[str, Any]:
    """The verdict: why the kernels are not to be used, or their time by that of plain torch, by size."""
    norm, gradients = KINDS[kind]
    with torch.cuda.device(device), torch.set_grad_enabled(gradients):  # a new thread's is the first
        gpu.load()
        _compile(device, dtype, norm, memory_format)
        error = _error(device, dtype, norm, memory_format)
        if not error <= TOLERANCES[dtype]:  # not so a NaN
            return {'wrong': f'they differ from plain torch by {error:.1e}', 'ratios': {}}
        ratios = {size: _ratio_of(shape, device, dtype, norm, memory_format) for size, shape in SIZES.items()}
        return {'wrong': None, 'ratios': ratios}


def _compile(device: torch.device, dtype: torch.dtype, norm: str, memory_format: torch.memory_format) -> None:
    """Compile the kernels in parallel, those that the work takes on a CPU, where it launches none."""

    def work() -> None:
        work = _Work(CHECKED, torch.device('cpu'), dtype, memory_format)
        for function in (work.engine, work.engine_of_two, work.engine_of_one):
            work.run(function, norm)

    gpu.kernels.compile_launched(work, device)


def _error(device: torch.device, dtype: torch.dtype, norm: str, memory_format: torch.memory_format) -> float:
    """The largest relative difference from plain torch in float32 on the CPU, of outputs, gradients and statistics.

    A difference of no more than twice that of plain torch in ``dtype`` on the device counts as none.
    """
    ours, theirs = (_Work(CHECKED, device, dtype, memory_format) for _ in range(2))
    right = _Work(CHECKED, torch.device('cpu'), torch.float32, memory_format)
    with torch.no_grad():
        for low, full in zip([*ours.maps, ours.grad], [*right.maps, right.grad]):
            full.copy_(low)  # with what the low precision leaves
        _spare_kinks(norm, dtype, ours, theirs, right)
    found = []
    for engine, plain in (('engine', 'plain'), ('engine_of_two', 'plain_of_two'), ('engine_of_one', 'plain_of_one')):
        ways = (ours, engine), (theirs, plain), (right, plain)
        found += zip(*[work.run(getattr(work, name), norm) for work, name in ways])
    found += zip(ours.statistics(), theirs.statistics(), right.statistics())
    errors = []
    for tensor, other, expected in found:
        error, allowed = (
            float((t.float().cpu() - expected).norm() / expected.float().norm().clamp(min=1e-12))
            for t in (tensor, other)
        )
        errors.append(0.0 if error <= 2 * allowed else error)
    return max(errors, key=lambda error: float('inf') if error != error else error)


def _spare_kinks(norm: str, dtype: torch.dtype, *works: _Work) -> None:
    """Zero the gradient of outputs so near to zero that rounding in ``dtype`` opens or closes their ReLUs."""
    exact = _Work(CHECKED, torch.device('cpu'), torch.float32)  # whose statistics may change
    for y, full in zip(exact.maps, works[-1].maps):
        y.copy_(full)
    sums = [exact.plain(norm, relu=False), exact.plain_of_two(norm, relu=False)]
    near = torch.stack([total.abs() < 8 * torch.finfo(dtype).eps for total in sums]).any(0)
    for work in works:
        work.grad.masked_fill_(near.to(work.grad.device), 0)


def _ratio_of(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, norm: str, memory_format: torch.memory_format
) -> float:
    """The ratio on maps of a shape, of a smaller batch where the memory has no room for them beside the model's."""
    batch, *rest = shape
    while True:
        try:
            return _ratio(norm, _Work((batch, *rest), device, dtype, memory_format), device)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        # After the handler, whose traceback holds the maps.
        torch.cuda.empty_cache()
        batch //= 2


def _ratio(norm: str, work: _Work, device: torch.device) -> float:
    """Median of the engine's time by plain torch's, in turns, the host included."""

    def seconds(function: Callable[[str], Tensor]) -> float:
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        work.run(function, norm)
        work.run(function, norm)
        torch.cuda.synchronize(device)
        return time.perf_counter() - start

    seconds(work.engine), seconds(work.plain)
    return statistics.median(seconds(work.engine) / seconds(work.plain) for _ in range(REPEATS))
