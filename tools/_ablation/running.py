"""All runs: what is missing of them, on one device or on several, and one of them again."""

import contextlib
import functools
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.multiprocessing as mp
from _lock import lock

from .data import Data
from .deciding import bound
from .networks import CORE, NETWORKS, SELECTED, SUMMED
from .rows import MAIN, PLACES, Row, Run, Settings, append_row, check_same_settings, longer_seeds, read_rows
from .training import check_device, set_up, train

_PAIRS = [list(NETWORKS)[:2], list(NETWORKS)[2:4], *([name] for name in list(NETWORKS)[4:])]
FIRST_LOSS = 1e-3  # relative: how far rounding may carry the first batch's loss on another machine


def plan(
    networks: Sequence[str],
    data: Sequence[str],
    sizes: Sequence[str],
    seeds: Sequence[int],
    together: int = 1,
    longer: Sequence[int] | None = None,
) -> list[Run]:
    """The runs of the study, in the order of what they are worth, so that it may be stopped at any time.

    All ``networks`` where both data and size are MAIN, those of CORE elsewhere, and claim (a)'s for twice as long, with
    the seeds ``longer``, where None with those of :func:`longer_seeds`. The seeds that are trained together come after
    one another, and so do both networks of a pair of claim (a).
    """
    runs = []
    for one, size in PLACES:
        if one not in data or size not in sizes:
            continue
        main = (one, size) == MAIN
        names = [name for name in NETWORKS if name in networks and (main or name in CORE)]
        for pair in ([name for name in names if name in pair] for pair in _PAIRS):
            for i in range(0, len(seeds), together):
                runs += [Run(name, seed, one, size) for name in pair for seed in seeds[i : i + together]]
        selection = [name for name in (SELECTED, SUMMED) if name in names]
        again = longer_seeds(seeds, one, size) if longer is None else longer
        runs += [Run(name, seed, one, size, longer=True) for name in selection for seed in again]
    return runs


def plan_variance(weights: int, orders: int, data: str = MAIN[0]) -> list[Run]:
    """Every seed of the weights with every one of the images' order, for both networks of claim (a)."""
    pairs = [(seed, order) for seed in range(weights) for order in range(orders)]
    return [Run(name, seed, data, MAIN[1], order=order) for seed, order in pairs for name in (SELECTED, SUMMED)]


def run_missing(
    runs: Sequence[Run],
    path: Path,
    data_root: Path,
    settings: Settings,
    devices: Sequence[str],
    together: int = 1,
    minutes: float | None = None,
    **kwargs,
) -> None:
    """Train the runs that the file of rows lacks, a process for each device where there are several.

    Args:
        runs: in the order in which they are begun.
        path: of the file; a row is appended as a run ends.
        data_root: Fashion-MNIST's folder.
        settings: of all runs.
        devices: of them; one may be named twice.
        together: how many seeds of a network are trained at once.
        minutes: after which none is begun.
        **kwargs: of :func:`~.training.train`.

    Raises:
        FileExistsError: another process adds to the file.
        Exception: what a run failed with, once those that were under way have their rows.
    """
    with lock(path.with_suffix('.lock'), '--out'):
        rows = read_rows(path)
        check_same_settings(path, rows, settings, {run.data for run in runs})
        done = {Run.of(row) for row in rows}
        todo = [run for run in runs if run not in done]
        print(f'{len(runs) - len(todo)} of {len(runs)} runs are done', flush=True)
        end = time.time() + 60 * minutes if minutes is not None else None
        number = 0
        groups = _run_all(_groups(todo, together), data_root, settings, devices, end, kwargs)
        with contextlib.closing(groups):
            for row in itertools.chain.from_iterable(groups):
                append_row(path, row)
                number += 1
                print(
                    f'{number} of {len(todo)}: {Run.of(row)}: top-1 {row["top1"]:.2f} % '
                    f'({row["seconds"]:.0f} s on {row["device"]})',
                    flush=True,
                )


def _groups(runs: Sequence[Run], together: int) -> list[list[Run]]:
    """Neighbours of one network, so many at once."""
    groups = []
    for _, alike in itertools.groupby(runs, lambda run: (run.network, run.data, run.size, run.longer)):
        alike = list(alike)
        groups += [alike[i : i + together] for i in range(0, len(alike), together)]
    return groups


def _run_all(
    groups: Sequence[list[Run]],
    data_root: Path,
    settings: Settings,
    devices: Sequence[str],
    end: float | None,
    kwargs: dict,
) -> Iterator[list[Row]]:
    """The rows of every group as it ends; a process for each device where there are several."""
    if len(devices) == 1:
        work = _worker(devices[0], data_root, settings, end, kwargs)
        yield from map(work, groups)
        return
    context = mp.get_context('spawn')
    alive, here = context.Pipe(duplex=False)  # closed when this process ends, however it does
    threads = torch.get_num_threads()
    pools = [
        ProcessPoolExecutor(1, context, _start_worker, (alive, threads, device, data_root, settings, end, kwargs))
        for device in devices
    ]
    waiting, busy, failure = iter(groups), {}, None

    def begin(pool: ProcessPoolExecutor) -> None:
        # No more than a process can take at once: what a pool has queued cannot be called back.
        for group in itertools.islice(waiting, 1):
            busy[pool.submit(_work, group)] = pool

    try:
        for pool in pools:
            begin(pool)
        while busy:
            for future in wait(busy, return_when=FIRST_COMPLETED).done:
                pool, error = busy.pop(future), future.exception()
                if error is None:
                    yield future.result()
                failure = failure or error
                if failure is None:
                    begin(pool)
    except BaseException:  # such as Ctrl-C: what is under way is not waited for
        here.close()
        raise
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)
        here.close()
    if isinstance(failure, BrokenProcessPool):
        raise ChildProcessError(
            f'a process of --devices {" ".join(devices)} ended without a word, as where memory runs out: name fewer of '
            'them, or a smaller --together; the same command goes on with what is missing'
        ) from failure
    if failure is not None:
        raise failure


def _worker(
    device: str, data_root: Path, settings: Settings, end: float | None, kwargs: dict
) -> Callable[[list[Run]], list[Row]]:
    load = functools.lru_cache(maxsize=1)(lambda name: Data(data_root, settings, device, name))
    if end is None:
        return lambda runs: train(runs, device, load(runs[0].data), **kwargs)
    return lambda runs: train(runs, device, load(runs[0].data), **kwargs) if time.time() < end else []


def _start_worker(alive: Connection, threads: int, *args) -> None:
    global _work_here
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command ends its processes
    threading.Thread(target=_end_with_command, args=(alive,), daemon=True).start()
    set_up(threads)
    _work_here = _worker(*args)


def _end_with_command(alive: Connection) -> None:
    """A killed command's processes would go on with what it had begun, beside those of the next."""
    with contextlib.suppress(EOFError, OSError):
        alive.recv()
    os._exit(1)


def _work(runs: list[Run]) -> list[Row]:
    return _work_here(runs)


def verify(run: Run, path: Path, data_root: Path, device: str | None, threads: int | None) -> None:
    """Train a run again, on its row's device and with its row's threads where None are given, and beside its seeds.

    On the same hardware, with as many threads and the same torch, all figures must be the row's. Elsewhere, and where
    the row does not say which instructions of a CPU made it, the loss of the first batch must be, to FIRST_LOSS, and
    top-1 within :func:`~.deciding.bound`.

    Raises:
        ValueError: they are not, or there is no such row.
    """
    rows = read_rows(path)
    found = next((row for row in rows if Run.of(row) == run), None)
    if found is None:
        there = sorted({f'--sets {row["data"]} --sizes {row["size"]}' for row in rows if row['order'] is None})
        raise ValueError(f'--verify: {path} has no run {run}; there are runs of {", of ".join(there) or "nothing"}')
    device = device or found['device']
    check_device(device)
    set_up(threads or found['threads'])
    runs = [Run.of({**found, 'seed': seed}) for seed in found['together']]
    data = Data(data_root, Settings.of(found), device, run.data)
    again = next(row for row in train(runs, device, data, found['compiled']) if row['seed'] == run.seed)
    figures = ('top1', 'loss', 'mixed', 'last', 'first')
    print(', '.join(f'{key} {found[key]!r} then, {again[key]!r} now' for key in figures))
    # Older rows do not tell all of it. A CPU's name stands for many generations, which differ in their instructions.
    known = device != 'cpu' or 'cpu_capability' in found
    about = [key for key in ('hardware', 'cpu_capability', 'device', 'threads', 'torch', 'timm') if key in found]
    made, now = (', '.join(f'{key} {row[key]}' for key in about) for row in (found, again))
    differ = [key for key in figures if again[key] != found[key]]
    if made == now and not differ:
        print('the same to the last digit')
        return
    if made == now and known:
        raise ValueError(f'--verify {run.network} {run.seed}: {", ".join(differ)} differ, all on {now}')
    allowed = bound([row for row in rows if (row['data'], row['size']) == (run.data, run.size)])
    where = f'the row was made on {made}, this on {now}' if known else f'the row, of {made}, does not name instructions'
    if abs(again['first'] - found['first']) > FIRST_LOSS * found['first']:
        raise ValueError(f'--verify {run.network} {run.seed}: the first loss differs by more than rounding; {where}')
    if allowed is not None and abs(again['top1'] - found['top1']) > allowed:
        raise ValueError(
            f'--verify {run.network} {run.seed}: top1 differs by more than {allowed:.2f}, as far as seeds go; {where}'
        )
    told = (
        'the first loss agrees; no bound on top-1, which takes two seeds'
        if allowed is None
        else f'within {allowed:.2f} points'
    )
    print(f'{told}; {where}')
