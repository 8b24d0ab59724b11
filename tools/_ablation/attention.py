"""Claim (e): attention against the garment's scale."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from scipy import stats
from torch import Tensor, nn

from sk_plugins.analysis import record

from .data import Data
from .networks import SELECTED, build
from .rows import Row, Settings, append_row, check_same_settings, read_rows
from .training import logits_of
from .weights import check_weights, weights_path

ATTENTION_SCALES = tuple(round(scale, 2) for scale in np.linspace(0.6, 2.0, 8).tolist())
ATTENTION_IMAGES = 2000
CURVE_IMAGES = 500


def measure_attention(seed: int, data: Data, work_dir: Path) -> Row:
    """How the attention of a trained SELECTED network goes with the garment's scale, unit by unit.

    A unit's figure for an image is the mean over channels of its 5x5 minus its 3x3 attention. ``rho`` is Spearman's
    correlation of that with the scale over the test images, each at its own random scale, and ``low`` and ``high``
    its 95 % bootstrap interval (percentiles, images resampled); ``untrained`` is rho of the same network with the
    weights it began with, and ``curve`` the mean over the same garments at each of ``scales``.
    """
    torch.manual_seed(seed)
    model = build(SELECTED).to(memory_format=torch.channels_last).eval()
    images, _, scales = (part[:ATTENTION_IMAGES] for part in data.test())
    untrained = differences(model, images)
    model.load_state_dict(load_file(weights_path(work_dir, seed)))
    units = {}
    for name, difference in differences(model, images).items():
        before = float(stats.spearmanr(scales, untrained[name]).statistic)
        units[name] = {**correlate(scales, difference), 'untrained': before, 'curve': []}
    for scale in ATTENTION_SCALES:
        for name, difference in differences(model, data.test_at(scale, CURVE_IMAGES)).items():
            units[name]['curve'].append(float(difference.mean()))
    return {
        'network': SELECTED,
        'seed': seed,
        'images': len(images),
        'scales': list(ATTENTION_SCALES),
        'units': units,
        'settings': json.loads(json.dumps(asdict(data.settings))),
    }


def differences(model: nn.Module, images: Tensor) -> dict[str, np.ndarray]:
    """(N,) for every unit: the mean over channels of the largest kernel's minus the smallest's attention."""
    with record(model) as attention:
        logits_of(model, images, 'cpu')
    return {name: unit.difference(attention[name]).numpy() for name, unit in attention.units.items()}


def correlate(scales: np.ndarray, values: np.ndarray) -> dict[str, float]:
    """Spearman's rank correlation and its 95 % interval, from 999 bootstrap samples of the pairs."""

    def rho(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        return stats.pearsonr(stats.rankdata(x, axis=axis), stats.rankdata(y, axis=axis), axis=axis).statistic

    interval = stats.bootstrap(
        (scales, values),
        rho,
        paired=True,
        vectorized=True,
        n_resamples=999,
        batch=100,
        method='percentile',
        rng=np.random.default_rng(0),
    ).confidence_interval
    return {'rho': float(rho(scales, values)), 'low': float(interval.low), 'high': float(interval.high)}


def measure_missing(out: Path, work_dir: Path, data_root: Path, settings: Settings) -> None:
    """Measure the attention of the trained networks that OUT/attention.jsonl lacks.

    Raises:
        ValueError: WORK_DIR lacks the weights of some, or has another run's.
    """
    path = out / 'attention.jsonl'
    rows = read_rows(path)
    check_same_settings(path, rows, settings)
    trained = {row['seed']: row for row in read_rows(out / 'runs.jsonl') if row['network'] == SELECTED}
    todo = unmeasured(trained.values(), rows)
    lost = [seed for seed in todo if not weights_path(work_dir, seed).is_file()]
    if lost:
        raise ValueError(
            f'attention of {SELECTED}, seeds {" ".join(map(str, lost))}: there is no '
            f'{weights_path(work_dir, lost[0])}: choose the --work-dir of these runs, or take their lines out of '
            f'{out / "runs.jsonl"}, so that they are trained again'
        )
    for seed in todo:
        check_weights(weights_path(work_dir, seed), trained[seed])
    data = Data(data_root, settings) if todo else None
    for seed in todo:
        append_row(path, measure_attention(seed, data, work_dir))
        print(f'attention of {SELECTED}, seed {seed}: measured', flush=True)


def unmeasured(rows: Iterable[Row], attention: Sequence[Row]) -> list[int]:
    """The seeds of SELECTED that ``attention`` lacks."""
    done = {row['seed'] for row in attention}
    return sorted({row['seed'] for row in rows if row['network'] == SELECTED} - done)
