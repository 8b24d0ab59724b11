"""A trial of the GPU's engine on a device that it meets for the first time: it must be right there, and faster.

On a card where they were never run, kernels may be slower than torch's own, or wrong. So before they are used they are
timed against plain torch, the host included, on a small map and on a large one, and compared with it. Each kind of
work has a trial of its own when it is first met: training, inference, and inference with folded norms. The verdict is
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
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._files import write_atomically
from . import gpu, private
from .functions import BranchSpec, NormAct, NormReluSelect, NormSpec
from .reference import Attention, Branches, batch_norm, norm_relu_select

__all__ = ['accepts', 'cache_file', 'forget']

logger = logging.getLogger('sk_plugins')

_verdicts: dict[tuple, dict[str, Any]] = {}

VARIABLE, ENGINES = 'SK_PLUGINS_ENGINE', ('plain', 'triton')
# (B, C, H, W): a unit's map in the last stage for a batch of four small images, and in the first for a batch of 64.
SMALL, LARGE = (4, 128, 16, 16), (64, 128, 56, 56)
# What is compared with the CPU: tiles that are full and others that are not. The divisors of its channels and positions
# are those of common maps, so that it takes the same kernels.
CHECKED = (3, 48, 20, 20)
_BETWEEN = math.sqrt(math.prod(SMALL) * math.prod(LARGE))  # elements from which on a map is a large one
SIZES = {'small': SMALL, 'large': LARGE}
NORMS = {'training': 'batch', 'inference': 'running', 'folded inference': 'folded'}  # by kind of work
REPEATS = 7
# Relative, of a map's or a gradient's norm. Where plain torch in the dtype is off by more, as with TF32, twice that.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def accepts(x: Tensor, wanted: bool = False, folded: bool = False) -> bool:
    """Whether the kernels are to compute a unit whose input is ``x``.

    Args:
        x: (B, C, H, W), on a GPU, or on a CPU where Triton's interpreter stands in for one.
        wanted: whether they are asked for by name (``backend='triton'``): then they need be right, not faster.
        folded: whether the unit's BatchNorms are folded into its convolutions, for inference.

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
    kind = 'folded inference' if folded else 'training' if torch.is_grad_enabled() else 'inference'
    subject = x.device, dtype, kind, x.stride(1) == 1
    verdict = _verdicts.get(subject)
    if verdict is None:
        # A trial synchronises, which ends a capture, and differentiates, for which a backward pass would wait.
        if torch.cuda.is_current_stream_capturing() or private.in_backward():
            return False
        verdict = _verdicts[subject] = _verdict(*subject)
    if verdict['wrong'] is not None:
        return False
    return wanted or verdict['ratios']['small' if x.numel() < _BETWEEN else 'large'] < 1


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
    versions = [f'{name} {_version(name)}' for name in ('torch', 'triton')]
    return ', '.join([torch.cuda.get_device_name(device), *names, kind, *versions, f'engine {_fingerprint()}'])


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
    """One unit's worth of an engine's work, and the same in plain torch, on the same tensors."""

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
        self.scales = [draw(channels, scale=0.2, shift=1.0).requires_grad_() for _ in range(3)]
        self.shifts = [draw(channels, scale=0.2).requires_grad_() for _ in range(3)]
        self.attention = [
            draw(dim, channels, 1, 1, scale=channels**-0.5), draw(dim, scale=0.2, shift=1.0),
            draw(dim, scale=0.2), draw(2 * channels, dim, 1, 1, scale=dim**-0.5),
        ]  # fmt: skip
        for tensor in self.attention:
            tensor.requires_grad_()
        self.leaves = [*self.maps, *self.scales, *self.shifts, *self.attention]
        sizes = *[channels] * 3, dim
        self.running = [(draw(n, scale=0.0), draw(n, scale=0.0, shift=1.0)) for n in sizes]
        self.batches = [torch.zeros((), dtype=torch.int64, device=device) for _ in sizes]
        self.grad = draw(*shape).to(dtype).to(memory_format=memory_format)

    def branches(self, norm: str, second: Tensor) -> Branches:
        """What leads to V, with norms by the 'batch', by 'running' statistics, or 'folded'."""
        none = [None, None]
        used = dict(batch=[], running=self.running[:2], folded=[(None, None)] * 2)[norm]
        scales = none if norm == 'folded' else self.scales[:2]
        reduce, scale, shift, select = self.attention
        running = self.running[3] if norm == 'running' else none
        attention = Attention(reduce, None if norm == 'folded' else scale, shift, select, None, *running)
        return Branches(
            [self.maps[0], second], scales, self.shifts[:2], [m for m, _ in used], [v for _, v in used], attention
        )

    def norm(self, norm: str) -> list[Tensor | None]:
        """Scale, shift and statistics of the norms beside those of the branches."""
        scale = None if norm == 'folded' else self.scales[2]
        return [scale, self.shifts[2], *(self.running[2] if norm == 'running' else (None, None))]

    def engine(self, norm: str) -> Tensor:
        """A norm and its ReLU, of which a branch is made, V, and the end of a unit, by the kernels."""
        batch = norm == 'batch'
        updated, last_updated = ([], []), ([], [])
        if batch:
            updated = [[*of[:2], of[3]] for of in (self.running, self.batches)]
            last_updated = self.running[2:3], self.batches[2:3]
        spec = BranchSpec(gpu, 2, True, batch, 0.1, 1e-5, *updated)
        end = NormSpec(gpu, True, batch, 0.1, 1e-5, *last_updated)
        first, last = [None, self.maps[1], *self.norm(norm)], [self.maps[2], *self.norm(norm)]
        if torch.is_grad_enabled():
            branches = self.branches(norm, NormAct.apply(end, *first))
            return NormAct.apply(end, NormReluSelect.apply(spec, *spec.flatten(branches)), *last)
        branches = self.branches(norm, gpu.norm_act(end, *first)[0])
        return gpu.norm_act(end, gpu.forward(spec, branches)[0], *last)[0]

    def plain(self, norm: str) -> Tensor:
        """The same in plain torch."""
        scale, shift, *statistics = self.norm(norm)

        def after(y: Tensor) -> Tensor:
            if norm == 'batch':
                return nn.functional.batch_norm(y, *self.running[2], scale, shift, True, 0.1, 1e-5)
            return batch_norm(y, scale, shift, *statistics, 1e-5)

        v = norm_relu_select(self.branches(norm, after(self.maps[1]).relu_()), 1e-5)
        y = after(self.maps[2])
        y += v
        return y.relu_()

    def engine_of_two(self) -> Tensor:
        """The end of a unit whose shortcut has a norm too, by the kernels."""
        end = NormSpec(gpu, True, True, 0.1, 1e-5, self.running[:2], self.batches[:2])
        norms = zip(self.maps, self.scales[:2], self.shifts)
        return NormAct.apply(end, None, *[t for norm in norms for t in (*norm, None, None)])

    def plain_of_two(self) -> Tensor:
        """The same in plain torch."""
        norms = zip(self.maps, self.running, self.scales[:2], self.shifts)
        first, second = (nn.functional.batch_norm(y, *r, w, b, True, 0.1, 1e-5) for y, r, w, b in norms)
        return (first + second).relu_()

    def run(self, function: Callable[[str], Tensor], norm: str) -> list[Tensor]:
        """The output, and in training the gradients, of :meth:`engine` or :meth:`plain`."""
        output = function(norm)
        gradients = torch.autograd.grad(output, self.leaves, self.grad) if output.requires_grad else ()
        return [output.detach(), *gradients]

    def gradients_of_two(self, output: Tensor) -> list[Tensor]:
        leaves = [*self.maps[:2], *self.scales[:2], *self.shifts[:2]]
        return [output.detach(), *torch.autograd.grad(output, leaves, self.grad)]


def _try(device: torch.device, dtype: torch.dtype, kind: str, memory_format: torch.memory_format) -> dict[str, Any]:
    """The verdict: why the kernels are not to be used, or their time by that of plain torch, by size."""
    norm = NORMS[kind]
    with torch.cuda.device(device), torch.set_grad_enabled(kind == 'training'):  # a new thread's is the first
        gpu.load()
        _compile(device, dtype, norm, memory_format)
        error = _error(device, dtype, norm, memory_format)
        if not error <= TOLERANCES[dtype]:  # not so a NaN
            return {'wrong': f'they differ from plain torch by {error:.1e}', 'ratios': {}}
        works = {size: _Work(shape, device, dtype, memory_format) for size, shape in SIZES.items()}
        return {'wrong': None, 'ratios': {size: _ratio(norm, work, device) for size, work in works.items()}}


def _compile(device: torch.device, dtype: torch.dtype, norm: str, memory_format: torch.memory_format) -> None:
    """Compile the kernels in parallel, those that the work takes on a CPU, where it launches none."""

    def work() -> None:
        work = _Work(CHECKED, torch.device('cpu'), dtype, memory_format)
        work.run(work.engine, norm)
        if norm == 'batch':
            work.gradients_of_two(work.engine_of_two())

    gpu.kernels.compile_launched(work, device)


def _error(device: torch.device, dtype: torch.dtype, norm: str, memory_format: torch.memory_format) -> float:
    """The largest relative difference from plain torch in float32 on the CPU, in training of all gradients.

    A difference of no more than twice that of plain torch in ``dtype`` on the device counts as none.
    """
    errors = []
    work = _Work(CHECKED, device, dtype, memory_format)
    expected = _Work(CHECKED, torch.device('cpu'), torch.float32, memory_format)
    with torch.no_grad():
        for ours, theirs in zip([*work.maps, work.grad], [*expected.maps, expected.grad]):
            theirs.copy_(ours)  # with what the low precision leaves
    ways = [(work, work.engine), (work, work.plain), (expected, expected.plain)]
    found = list(zip(*[w.run(function, norm) for w, function in ways]))
    if norm == 'batch':
        ways = [(work, work.engine_of_two), (work, work.plain_of_two), (expected, expected.plain_of_two)]
        found += zip(*[w.gradients_of_two(function()) for w, function in ways])
    for ours, theirs, right in found:
        error, allowed = (
            float((t.float().cpu() - right).norm() / right.norm().clamp(min=1e-12)) for t in (ours, theirs)
        )
        errors.append(0.0 if error <= 2 * allowed else error)
    return max(errors, key=lambda error: float('inf') if error != error else error)


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
