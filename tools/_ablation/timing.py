"""How fast networks train here: one by one, several seeds at once, compiled, and in several processes."""

import functools
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.multiprocessing as mp

from .networks import SELECTED, initialise
from .rows import Settings
from .together import Alone, Together
from .training import fit, set_up

SECONDS = 3.0  # of every measurement, after two steps


def images_a_second(
    device: str, settings: Settings, together: int, size: str, compiled: bool = False, seconds: float = SECONDS
) -> tuple[float, float]:
    """Images a second of all networks, in training SELECTED on noise; and the seconds that the first two steps took."""
    models = [
        initialise(SELECTED, size, seed).to(device, memory_format=torch.channels_last) for seed in range(together)
    ]
    model = Alone(models[0]) if together == 1 else Together(models)
    images = torch.randn(together, settings.batch_size, 1, 64, 64, device=device)
    labels = torch.randint(10, images.shape[:2], device=device)
    marks = []

    def batches():
        while len(marks) < 4 or marks[-1] - marks[2] < seconds:
            if device.startswith('cuda'):
                torch.cuda.synchronize()
            marks.append(time.perf_counter())
            yield images, labels

    fit(model, batches(), 10**6, settings, compiled=compiled)
    return (len(marks) - 3) * labels.numel() / (marks[-1] - marks[2]), marks[2] - marks[0]


def time_ways(
    devices: Sequence[str],
    settings: Settings,
    together: int,
    size: str,
    compiled: bool = False,
    seconds: float = SECONDS,
) -> list[tuple[str, float]]:
    """What :func:`images_a_second` finds, way by way, printed as it does."""
    ways = [('one by one', 1, False), (f'{together} at once', together, False)]
    ways += [('one by one, compiled', 1, True), (f'{together} at once, compiled', together, True)] * compiled
    found = []
    for name, number, compiles in ways:
        rate, first = images_a_second(devices[0], settings, number, size, compiles, seconds)
        found.append((name, rate))
        print(f'{name}: {rate:,.0f} images a second, after {first:.1f} s for two steps', flush=True)
    if len(devices) > 1:
        threads = (torch.get_num_threads(),)
        with ProcessPoolExecutor(len(devices), mp.get_context('spawn'), set_up, threads) as pool:
            work = functools.partial(images_a_second, settings=settings, together=1, size=size, seconds=seconds)
            rate = sum(rate for rate, _ in pool.map(work, devices))
        found.append((f'{len(devices)} processes', rate))
        print(f'{len(devices)} processes, one by one: {rate:,.0f} images a second in all', flush=True)
    return found
