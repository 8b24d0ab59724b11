"""Exported files, run: compared with eager mode, and timed beside it."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from sk_plugins._text import first_lines

from .deployable import Deployable

__all__ = ['TOLERANCE', 'difference', 'times']

TOLERANCE = 1e-4
WARM_UP = 2.0  # seconds, of small networks: what wrote the files leaves threads and caches behind


@torch.no_grad()
def difference(deployable: Deployable, run: Callable, images: Sequence[torch.Tensor] | None = None) -> float:
    """The largest difference of a file's outputs from eager mode's, relative to the largest output.

    Args:
        deployable: the network.
        run: the file.
        images: inputs; random ones of every shape in ``deployable.shapes()`` where None.

    Raises:
        ValueError: the runtime cannot run the file, or its outputs have another shape.
    """
    largest = 0.0
    if images is None:
        images = [deployable.random(*shape) for shape in deployable.shapes()]
    for image in images:
        try:
            expected = deployable.reference(image)
        except Exception as error:  # each network's own kinds
            hint = '; --no-dynamic writes a file of one batch and size' if deployable.dynamic else ''
            raise ValueError(
                f'--check: the network takes no images of {tuple(image.shape)}: {first_lines(error)}{hint}'
            ) from error
        expected = [expected] if isinstance(expected, torch.Tensor) else list(expected)
        try:
            found = run(image)
        except Exception as error:  # each runtime's own kinds
            raise ValueError(
                f'--check: cannot run the file for images of {tuple(image.shape)}: {first_lines(error)}'
            ) from error
        if [tuple(f.shape) for f in found] != [tuple(e.shape) for e in expected]:
            raise ValueError(
                f'--check: for images of {tuple(image.shape)} the file gives {[tuple(f.shape) for f in found]}, and '
                f'the network {[tuple(e.shape) for e in expected]}'
            )
        for f, e in zip(found, expected):
            apart = np.abs(np.asarray(f) - e.numpy()).max().item()
            largest = max(largest, apart / max(e.abs().max().item(), 1e-6)) if apart == apart else float('nan')
            if largest != largest:
                return largest
    return largest


def times(
    deployable: Deployable, runners: Mapping[str, Callable], batches: list[int], repeats: int = 9
) -> dict[str, dict[int, float]]:
    """Median milliseconds of each runner by batch, measured in turn."""
    found: dict[str, dict[int, float]] = {name: {} for name in runners}
    for batch in batches:
        images = deployable.random(batch, *deployable.size)
        taken: dict[str, list[float]] = {name: [] for name in runners}
        start, warm = time.perf_counter(), 0
        while warm < 2 or time.perf_counter() - start < WARM_UP:
            for run in runners.values():
                run(images)
            warm += 1
        for _ in range(repeats):
            for name, run in runners.items():
                begin = time.perf_counter()
                run(images)
                taken[name].append(1000 * (time.perf_counter() - begin))
        for name in runners:
            found[name][batch] = statistics.median(taken[name])
    return found
