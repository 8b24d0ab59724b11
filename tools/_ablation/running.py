"""All runs: what is missing of them, on one device or on several, and one of them again."""

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
import torch.multiprocessing as mp

from .data import Data
from .networks import SELECTED
from .rows import Row, Settings, append_row, check_same_settings, read_rows
from .training import check_device, set_up, train
from .weights import save_weights, weights_path


def run_missing(
    pairs: Sequence[tuple[str, int]], out: Path, work_dir: Path, data_root: Path, settings: Settings, devices: list[str]
) -> None:
    """Train the (network, seed) pairs that OUT/runs.jsonl lacks, a process for each device where there are several."""
    path = out / 'runs.jsonl'
    rows = read_rows(path)
    check_same_settings(path, rows, settings)
    done = {(row['network'], row['seed']) for row in rows}
    todo = [pair for pair in pairs if pair not in done]
    print(f'{len(pairs) - len(todo)} of {len(pairs)} runs are done', flush=True)
    for number, row in enumerate(_run_all(todo, work_dir, data_root, settings, devices), start=1):
        append_row(path, row)
        print(
            f'{number} of {len(todo)}: {row["network"]}, seed {row["seed"]}: top-1 {row["top1"]:.2f} % '
            f'({row["seconds"]:.0f} s on {row["device"]})',
            flush=True,
        )


def _run_all(
    todo: Sequence[tuple[str, int]], work_dir: Path, data_root: Path, settings: Settings, devices: list[str]
) -> Iterator[Row]:
    if not todo:
        return
    if len(devices) == 1:
        data = Data(data_root, settings)
        for name, seed in todo:
            yield _run_one(name, seed, devices[0], data, work_dir)
        return
    context = mp.get_context('spawn')
    queue = context.Queue()
    for device in devices:
        queue.put(device)
    start = (queue, data_root, settings, work_dir, torch.get_num_threads())
    with ProcessPoolExecutor(len(devices), context, _start_worker, start) as pool:
        for future in as_completed([pool.submit(_work, name, seed) for name, seed in todo]):
            yield future.result()


def _start_worker(queue, data_root: Path, settings: Settings, work_dir: Path, threads: int) -> None:
    global _work_here
    set_up(threads)
    _work_here = functools.partial(_run_one, device=queue.get(), data=Data(data_root, settings), work_dir=work_dir)


def _work(name: str, seed: int) -> Row:
    return _work_here(name, seed)


def _run_one(name: str, seed: int, device: str, data: Data, work_dir: Path) -> Row:
    model, row = train(name, seed, device, data)
    if name == SELECTED:
        save_weights(model, weights_path(work_dir, seed), row)
    return row


def verify(name: str, seed: str, out: Path, data_root: Path, device: str | None, threads: int | None) -> None:
    """Train a run again, on its row's device and with its row's threads where None are given.

    Raises:
        ValueError: its figures differ from its row's, or there is no such row.
    """
    found = [row for row in read_rows(out / 'runs.jsonl') if (row['network'], str(row['seed'])) == (name, seed)]
    if not found:
        raise ValueError(f'--verify {name} {seed}: {out / "runs.jsonl"} has no such run')
    settings, device = Settings.of(found[0]), device or found[0]['device']
    check_device(device)
    set_up(threads or found[0]['threads'])
    _, row = train(name, int(seed), device, Data(data_root, settings))
    figures = [key for key in row if key.startswith('top1') or key == 'loss']
    print(', '.join(f'{key} {found[0][key]!r} then, {row[key]!r} now' for key in figures))
    differ = [key for key in figures if row[key] != found[0][key]]
    if differ:
        raise ValueError(
            f'--verify {name} {seed}: {", ".join(differ)} differ; the row was made on {found[0]["hardware"]} with '
            f'{found[0]["threads"]} threads and torch {found[0]["torch"]}, this on {row["hardware"]} with '
            f'{row["threads"]} and torch {row["torch"]}'
        )
