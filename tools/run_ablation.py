"""Train small networks that differ in one thing only, and compare them: the paper's claims on Fashion-MNIST.

python tools/prepare_fashion_mnist.py
python tools/run_ablation.py                          # what is missing of the runs, then the table and the plots
python tools/run_ablation.py --devices cuda:0 cuda:1  # a process for each device
python tools/run_ablation.py --report                 # the table and the plots from the runs that are there
python tools/run_ablation.py --verify k3 0            # train one again, as its row says, and compare

The garments lie at random sizes and places on textured canvases (ScaledFashionMNIST). Every run appends a row to
OUT/runs.jsonl as it ends; after a kill, the same command goes on with what is missing. All networks of a seed see the
same images in the same order, so that the comparisons are paired by seed. The weights of the network whose attention is
measured stay in WORK_DIR.
"""

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from _common import run as run_tool
from benchmark import describe_machine
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy import stats
from timm.layers import SEModule
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sk_plugins.analysis import record
from sk_plugins.networks import SKResNet
from sk_plugins.openmmlab.datasets import ScaledFashionMNIST

# Three stages of two units at strides 4, 8 and 16: SK_2_1 to SK_4_2.
BASE = dict(
    layers=(2, 2, 2),
    channels=(8, 16, 32),
    cardinality=2,
    base_width=32,
    stem_type='deep',
    stem_width=4,
    in_chans=1,
    num_classes=10,
)
NETWORKS = {
    'k3': dict(sk_kwargs=dict(kernel_sizes=(3,), select='sum')),
    'k5': dict(sk_kwargs=dict(kernel_sizes=(5,), select='sum')),
    'k7': dict(sk_kwargs=dict(kernel_sizes=(7,), select='sum')),
    'k3_k5_summed': dict(sk_kwargs=dict(kernel_sizes=(3, 5), select='sum')),
    'k3_k5_selected': dict(sk_kwargs=dict(kernel_sizes=(3, 5))),
    'k3_k5_k7_summed': dict(sk_kwargs=dict(kernel_sizes=(3, 5, 7), select='sum')),
    'k3_k5_k7_selected': dict(sk_kwargs=dict(kernel_sizes=(3, 5, 7))),
    'k3_k5_shared': dict(sk_kwargs=dict(kernel_sizes=(3, 5), select='shared')),
    # As many parameters as k3_k5_selected, to 1 %.
    'se': dict(unit='se', block_args=dict(attn_layer=functools.partial(SEModule, rd_ratio=0.27, rd_divisor=1))),
    # As many multiply-adds, to 1 %.
    'k3_wider': dict(unit='plain', channels=(9, 19, 38)),
}
SELECTED = 'k3_k5_selected'
CLAIMS = {
    '(a) selection beats the sum, M = 2': (SELECTED, 'k3_k5_summed'),
    '(a) selection beats the sum, M = 3': ('k3_k5_k7_selected', 'k3_k5_k7_summed'),
    '(b) two kernels beat K3': (SELECTED, 'k3'),
    '(b) two kernels beat K5': (SELECTED, 'k5'),
    '(b) two kernels beat K7': (SELECTED, 'k7'),
    '(b) two kernels, summed, beat K3': ('k3_k5_summed', 'k3'),
    '(b) a third kernel adds little': ('k3_k5_k7_selected', SELECTED),
    '(c) SK beats widening at equal cost': (SELECTED, 'k3_wider'),
    '(c) SK beats SE at equal size': (SELECTED, 'se'),
    '(d) a softmax per channel beats a shared one': (SELECTED, 'k3_k5_shared'),
}
SIZES = ('small', 'medium', 'large')
OPTIONS = ('train_images', 'epochs', 'test_images', 'batch_size')

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What all runs of a results file share.

    ``epochs`` times ``train_images`` garments, each placed anew every epoch; the test set is the first
    ``test_images`` of its garments, placed once for all.
    """

    train_images: int = 24000
    epochs: int = 1
    test_images: int = 10000
    batch_size: int = 32
    learning_rate: float = 0.004
    weight_decay: float = 0.02
    scale: tuple[float, float] = (0.6, 2.0)

    @classmethod
    def of(cls, row: Row) -> 'Settings':
        """Those that a row of the results was made with."""
        return cls(**{**row['settings'], 'scale': tuple(row['settings']['scale'])})

    def check(self) -> None:
        """Raises ValueError for what cannot be run."""
        for name in ('train_images', 'epochs', 'test_images'):
            if getattr(self, name) < 1:
                raise ValueError(f'--{name.replace("_", "-")} {getattr(self, name)}: must be at least 1')
        if not 2 <= self.batch_size <= self.train_images:
            raise ValueError(f'--batch-size {self.batch_size}: must be from 2 to --train-images {self.train_images}')


def build(name: str) -> SKResNet:
    """The network ``name`` of NETWORKS: (B, 1, 64, 64) to (B, 10)."""
    return SKResNet(**{**BASE, **NETWORKS[name]})


def cost(name: str) -> tuple[int, float]:
    """Parameters, and millions of multiply-adds for one image."""
    with torch.device('meta'), FlopCounterMode(display=False) as counter, torch.no_grad():
        model = build(name).eval()
        model(torch.empty(1, 1, 64, 64))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() / 2e6


class Data:
    """Canvases, kept in memory from run to run."""

    def __init__(self, root: Path, settings: Settings) -> None:
        if not root.is_dir():
            raise FileNotFoundError(f'--data {root}: no such folder; tools/prepare_fashion_mnist.py fills it')
        self.settings = settings
        self.sets = {split: ScaledFashionMNIST(str(root), split, settings.scale) for split in ('train', 'test')}
        for split, dataset in self.sets.items():
            if len(dataset) < getattr(settings, f'{split}_images'):
                wanted = getattr(settings, f'{split}_images')
                raise ValueError(f'--{split}-images {wanted}: {root} has {len(dataset)}, which must be enough')
        self.train = functools.lru_cache(maxsize=4)(self._train)
        self.test = functools.lru_cache(maxsize=1)(self._test)

    def _train(self, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """An epoch of ``seed`` in the order it is trained in: canvases (N, 1, 64, 64) uint8 and labels (N,)."""
        every = len(self.sets['train'])
        chosen = np.random.default_rng(seed).permutation(every)[: self.settings.train_images]
        order = np.random.default_rng((seed, epoch)).permutation(chosen)
        images, labels, _ = self.sets['train'].batch(order, draw=seed * self.settings.epochs + epoch)
        return torch.from_numpy(images)[:, None], torch.from_numpy(labels)

    def _test(self) -> tuple[Tensor, Tensor, np.ndarray]:
        """Canvases, labels and the garments' scales (N,)."""
        images, labels, boxes = self.sets['test'].batch(range(self.settings.test_images))
        return torch.from_numpy(images)[:, None], torch.from_numpy(labels), scales_of(boxes)

    def test_at(self, scale: float, count: int) -> Tensor:
        """The first ``count`` canvases of the test set with their garments at ``scale``."""
        count = min(count, self.settings.test_images)
        return torch.from_numpy(self.sets['test'].batch(range(count), (scale, scale))[0])[:, None]


def scales_of(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) / 28


def prepare(images: Tensor, device: str) -> Tensor:
    """(B, 1, 64, 64) uint8 to what the networks take."""
    images = images.to(device).float().sub_(91).div_(48)  # the training images' mean and standard deviation
    return images.contiguous(memory_format=torch.channels_last)


def logits_of(model: nn.Module, images: Tensor, device: str, batch_size: int = 500) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(prepare(batch, device)).cpu() for batch in images.split(batch_size)])


def train(name: str, seed: int, device: str, data: Data) -> tuple[SKResNet, Row]:
    """Train a network, and test it: the model in eval mode, and its row of the results."""
    settings, start = data.settings, time.perf_counter()
    torch.manual_seed(seed)
    model = build(name).to(device, memory_format=torch.channels_last)
    # AdamW, since the attention starts near zero (N(0, 0.01)), where SGD's steps in a short training are small.
    optimizer = create_optimizer_v2(model, opt='adamw', lr=settings.learning_rate, weight_decay=settings.weight_decay)
    per_epoch = settings.train_images // settings.batch_size
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        settings.learning_rate,
        total_steps=settings.epochs * per_epoch,
        pct_start=0.2,
        cycle_momentum=False,
    )
    model.train()
    for epoch in range(settings.epochs):
        images, labels = data.train(seed, epoch)
        for step in range(per_epoch):
            batch = slice(step * settings.batch_size, (step + 1) * settings.batch_size)
            loss = F.cross_entropy(model(prepare(images[batch], device)), labels[batch].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    images, labels, scales = data.test()
    logits = logits_of(model.eval(), images, device)
    right = (logits.argmax(1) == labels).numpy()
    edges = np.linspace(*settings.scale, len(SIZES) + 1)[1:-1]
    thirds = np.digitize(scales, edges)
    machine = describe_machine('cuda' if device.startswith('cuda') else device)
    parameters, mflops = cost(name)
    row = {
        'network': name,
        'seed': seed,
        'top1': 100 * right.mean().item(),
        **{f'top1_{size}': 100 * right[thirds == i].mean().item() for i, size in enumerate(SIZES) if i in thirds},
        'loss': F.cross_entropy(logits, labels).item(),
        'parameters': parameters,
        'mflops': mflops,
        'seconds': round(time.perf_counter() - start, 1),
        'device': device.partition(':')[0],
        'hardware': machine['gpu'] or machine['cpu'],
        'threads': torch.get_num_threads(),
        'torch': torch.__version__,
        'settings': asdict(settings),
    }
    return model, json.loads(json.dumps(row))


# The results file


def read_rows(path: Path) -> list[Row]:
    """The whole lines of a JSON-lines file, none where there is no file; the beginning of one that a kill cut is not.

    Raises:
        ValueError: a line that is no JSON object.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(keepends=True), start=1):
        if not line.endswith('\n'):
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f'{path}, line {number}: not JSON: {error}') from error
        if not isinstance(row, dict) or not {'network', 'seed', 'settings'} <= row.keys():
            raise ValueError(f"{path}, line {number}: not a run's row, which has a network, a seed and settings")
        rows.append(row)
    return rows


def append_row(path: Path, row: Row) -> None:
    """Append a line in one write, after cutting off the beginning of one that a kill left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'ab+') as file:
        file.seek(0)
        end = file.read().rfind(b'\n') + 1
        file.truncate(end)
        file.write(json.dumps(row).encode() + b'\n')
        file.flush()
        os.fsync(file.fileno())


def check_same_settings(path: Path, rows: Sequence[Row], settings: Settings) -> None:
    """Raises ValueError where rows were made with other settings: they can't stand in one table."""
    ours = json.loads(json.dumps(asdict(settings)))
    for row in rows:
        for name, value in row['settings'].items():
            if value != ours[name]:
                raise ValueError(
                    f'{path} has runs of {name}={value!r}, and this is {name}={ours[name]!r}: choose another --out'
                )


# Running


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
        path = weights_path(work_dir, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix('.part')
        weights = {key: value.contiguous().cpu() for key, value in model.state_dict().items()}
        save_file(weights, part, metadata={'run': json.dumps(row)})
        os.replace(part, path)
    return row


def weights_path(work_dir: Path, seed: int) -> Path:
    return work_dir / f'{SELECTED}_seed{seed}.safetensors'


def check_weights(path: Path, row: Row) -> None:
    """Raises ValueError where a file's weights are not those of the run of ``row``, which its metadata holds."""
    with safe_open(path, 'pt') as file:
        held = json.loads((file.metadata() or {}).get('run', '{}'))
    differ = [key for key in row if held.get(key) != row[key]]
    if differ:
        raise ValueError(
            f'{path} is not of the run of {row["network"]}, seed {row["seed"]}, in runs.jsonl ({", ".join(differ)} '
            'differ): choose the --work-dir of that run'
        )


def set_up(threads: int | None) -> None:
    """Threads where given, and the same arithmetic in every run of a device."""
    if threads:
        torch.set_num_threads(threads)
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(True, warn_only=True)


# Claim (e): attention against the garment's scale

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


# The table and the plots


@dataclass(frozen=True)
class Comparison:
    """Top-1 of one network minus another's over the ``n`` seeds that both have, in points.

    ``p`` is that of the two-sided paired t-test (``scipy.stats.ttest_rel``), ``low`` to ``high`` its 95 % interval;
    None for fewer than two seeds.
    """

    n: int
    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


def by_network(rows: Sequence[Row], key: str = 'top1') -> dict[str, dict[int, float]]:
    """``key`` of each network by seed, in NETWORKS' order, where rows have it."""
    found = {
        name: {row['seed']: row[key] for row in rows if row['network'] == name and key in row} for name in NETWORKS
    }
    return {name: dict(sorted(values.items())) for name, values in found.items() if values}


def compare(rows: Sequence[Row], name: str, other: str) -> Comparison | None:
    """``name`` against ``other``; None where no seed has both."""
    top1 = by_network(rows)
    ours, others = top1.get(name, {}), top1.get(other, {})
    seeds = sorted(ours.keys() & others.keys())
    if not seeds:
        return None
    a, b = ([values[seed] for seed in seeds] for values in (ours, others))
    mean = float(np.mean(np.subtract(a, b)))
    if len(seeds) == 1:
        return Comparison(1, mean)
    test = stats.ttest_rel(a, b)
    interval = test.confidence_interval()
    return Comparison(len(seeds), mean, float(interval.low), float(interval.high), float(test.pvalue))


def markdown(rows: Sequence[Row], attention: Sequence[Row]) -> str:
    """The tables: every network, every claim, and the attention of every unit."""
    if not rows:
        raise ValueError('there are no runs yet, so there is no table')
    parts = [
        '# Networks that differ in one thing only, on scaled Fashion-MNIST',
        _how(rows),
        _networks_table(rows),
        '## Claims',
        _claims_table(rows),
    ]
    if attention:
        parts += [
            '## Attention for the 5x5 kernel against the scale',
            f'`{SELECTED}`: the mean over channels of the 5x5 minus the 3x3 attention, and its Spearman correlation '
            f"with the garment's scale over {attention[0]['images']:,} test images at random scales, with the 95 % "
            'bootstrap interval (999 resamples of the images); in brackets the same correlation before training, and '
            f'how far the mean rises from scale {attention[0]["scales"][0]:g} to {attention[0]["scales"][-1]:g}.',
            _attention_table(attention),
        ]
    return '\n\n'.join(parts) + '\n'


def _how(rows: Sequence[Row]) -> str:
    settings = rows[0]['settings']
    (first, last), defaults = settings['scale'], json.loads(json.dumps(asdict(Settings())))
    options = {name: settings[name] for name in OPTIONS if settings[name] != defaults[name]}
    options['seeds'] = ' '.join(str(seed) for seed in sorted({row['seed'] for row in rows}))
    options['threads'] = rows[0]['threads']
    command = ' '.join(f'--{name.replace("_", "-")} {value}' for name, value in options.items())
    machines = sorted({f'{row["hardware"]} ({row["device"]}, threads: {row["threads"]})' for row in rows})
    return (
        'Written by `tools/run_ablation.py` from `runs.jsonl` and `attention.jsonl`:\n\n'
        f'```bash\npython tools/prepare_fashion_mnist.py\npython tools/run_ablation.py {command}\n```\n\n'
        f'Each run: {settings["epochs"]} x {settings["train_images"]:,} garments at scales of {first} to {last}, '
        f'AdamW, batch {settings["batch_size"]}, learning rate {settings["learning_rate"]}; tested on '
        f'{settings["test_images"]:,}. Top-1 in per cent, mean and standard deviation over the seeds; small, medium '
        'and large are the thirds of the scales. Differences are paired by seed, in points, with the 95 % interval '
        'and p of the two-sided paired t-test (`scipy.stats.ttest_rel`), not corrected for the number of tests. '
        f'{len(rows)} runs, {sum(row["seconds"] for row in rows) / 3600:.1f} hours, on {"; ".join(machines)}, torch '
        f'{", ".join(sorted({row["torch"] for row in rows}))}.'
    )


def _networks_table(rows: Sequence[Row]) -> str:
    lines = [
        ['network', 'parameters', 'MFLOPs', 'seeds', 'top-1', *SIZES, f'difference from `{SELECTED}`', 'p'],
        ['---', *['---:'] * (4 + len(SIZES)), '---:', '---:'],
    ]
    for name, values in by_network(rows).items():
        row = next(row for row in rows if row['network'] == name)
        thirds = [list(by_network(rows, f'top1_{size}').get(name, {}).values()) for size in SIZES]
        found = None if name == SELECTED else compare(rows, name, SELECTED)
        lines.append(
            [
                f'`{name}`',
                f'{row["parameters"]:,}',
                f'{row["mflops"]:.2f}',
                str(len(values)),
                _mean_and_sd(values.values()),
                *[f'{np.mean(third):.2f}' if third else '' for third in thirds],
                *_comparison_cells(found),
            ]
        )
    return _table(lines)


def _claims_table(rows: Sequence[Row]) -> str:
    lines = [['claim', 'networks', 'seeds', 'difference', 'p'], ['---', '---', '---:', '---:', '---:']]
    for claim, (name, other) in CLAIMS.items():
        found = compare(rows, name, other)
        lines.append(
            [claim, f'`{name}` - `{other}`', str(found.n if found else 0), *_comparison_cells(found)],
        )
    return _table(lines)


def _attention_table(attention: Sequence[Row]) -> str:
    attention = sorted(attention, key=lambda row: row['seed'])
    lines = [['unit', *[f'seed {row["seed"]}' for row in attention]], ['---', *['---:'] * len(attention)]]
    for unit in attention[0]['units']:
        cells = [row['units'][unit] for row in attention]
        lines.append(
            [
                unit,
                *[
                    f'{cell["rho"]:+.2f}, {cell["low"]:+.2f} to {cell["high"]:+.2f} '
                    f'({cell["untrained"]:+.2f}; {cell["curve"][-1] - cell["curve"][0]:+.3f})'
                    for cell in cells
                ],
            ]
        )
    return _table(lines)


def _mean_and_sd(values: Sequence[float]) -> str:
    values = list(values)
    return f'{np.mean(values):.2f}' + (f' ± {np.std(values, ddof=1):.2f}' if len(values) > 1 else '')


def _comparison_cells(found: Comparison | None) -> list[str]:
    if found is None:
        return ['', '']
    if found.p is None:
        return [f'{found.mean:+.2f}', '']
    return [
        f'{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f})',
        '< 0.001' if found.p < 0.001 else f'{found.p:.3f}',
    ]


def _table(lines: Sequence[Sequence[str]]) -> str:
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)


def draw_accuracy(rows: Sequence[Row], path: Path) -> None:
    """Top-1 of every network: a dot for each seed, a stroke for the mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 0.35 * len(NETWORKS) + 1), layout='constrained')
    axes = figure.subplots()
    networks = by_network(rows)
    for position, (name, values) in enumerate(networks.items()):
        color = 'tab:orange' if name == SELECTED else 'tab:blue'
        axes.plot(list(values.values()), [position] * len(values), 'o', color=color, alpha=0.6, markersize=5)
        mean = np.mean(list(values.values()))
        axes.plot([mean] * 2, [position - 0.3, position + 0.3], color=color, linewidth=2.5)
    if SELECTED in networks:
        axes.axvline(np.mean(list(networks[SELECTED].values())), color='grey', linewidth=0.8, linestyle=':')
    axes.set_yticks(range(len(networks)), networks)
    axes.invert_yaxis()
    axes.set_xlabel('top-1 on scaled Fashion-MNIST, %')
    axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=110)


def draw_attention(attention: Sequence[Row], strip: np.ndarray, path: Path) -> None:
    """Attention against the scale: ``strip`` (S, 64, 64), one garment at every scale, above a panel for each unit."""
    from matplotlib.figure import Figure

    scales = attention[0]['scales']
    units = list(attention[0]['units'])
    figure = Figure(figsize=(1.1 * len(scales), 6.2), layout='constrained')
    above, below = figure.subfigures(2, 1, height_ratios=[1, 3.4])
    for axes, image, scale in zip(above.subplots(1, len(scales)), strip, scales):
        axes.imshow(image, cmap='gray', vmin=0, vmax=255)
        axes.set_title(f'{scale:g}x', fontsize=9)
        axes.axis('off')
    panels = below.subplots(2, -(-len(units) // 2), sharex=True, sharey=True, squeeze=False)
    # Units go down the columns, so that each column is a stage of two units.
    for axes, unit in zip(panels.T.flat, units):
        curves = np.array([row['units'][unit]['curve'] for row in attention])
        axes.plot(scales, curves.T, color='tab:blue', alpha=0.35, linewidth=1)
        axes.plot(scales, curves.mean(0), color='tab:blue', linewidth=2)
        rho = np.mean([row['units'][unit]['rho'] for row in attention])
        axes.set_title(f'{unit}   mean rho {rho:+.2f}', fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[['top', 'right']].set_visible(False)
    below.supxlabel("the garment's scale", fontsize=9)
    below.supylabel('attention, 5x5 minus 3x3', fontsize=9)
    figure.savefig(path, dpi=110)


def report(out: Path, data_root: Path) -> list[Path]:
    """Write OUT/table.md, accuracy.png and, where the attention was measured, attention.png, from the rows.

    Where it was not, an attention.png that is there goes.
    """
    rows, attention = read_rows(out / 'runs.jsonl'), read_rows(out / 'attention.jsonl')
    written = [out / 'table.md', out / 'accuracy.png']
    text = markdown(rows, attention)
    written[0].write_text(text, encoding='utf-8')
    draw_accuracy(rows, written[1])
    if attention:
        data = Data(data_root, Settings.of(attention[0]))
        strip = np.concatenate([data.test_at(scale, 1)[:, 0].numpy() for scale in attention[0]['scales']])
        written.append(out / 'attention.png')
        draw_attention(attention, strip, written[-1])
    else:
        (out / 'attention.png').unlink(missing_ok=True)
    missing = unmeasured(rows, attention)
    if missing:
        print(f'attention of {SELECTED}, seeds {" ".join(map(str, missing))}: not measured yet', file=sys.stderr)
    return written


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


def check_device(device: str) -> None:
    """Raises ValueError for a device that is no cpu or cuda device of this machine."""
    kind, _, number = device.partition(':')
    if kind not in ('cpu', 'cuda') or not (number or '0').isdigit():
        raise ValueError(f'--devices {device}: must be cpu, cuda or cuda:NUMBER')
    if kind == 'cuda' and int(number or 0) >= torch.cuda.device_count():
        raise ValueError(f'--devices {device}: torch finds {torch.cuda.device_count()} CUDA devices here')


def main(argv: list[str] | None = None) -> None:
    defaults = Settings()
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('results/ablation'), help='default: results/ablation')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/ablation'), help='default: work_dirs/ablation')
    parser.add_argument('--data', type=Path, default=Path('data/fashion_mnist'), help='default: data/fashion_mnist')
    parser.add_argument('--networks', nargs='+', choices=NETWORKS, default=list(NETWORKS), metavar='NAME',
                        help=f'of {", ".join(NETWORKS)} (default: all)')  # fmt: skip
    parser.add_argument('--seeds', nargs='+', type=int, default=list(range(5 if cuda else 3)), metavar='SEED',
                        help='default: 0 to 4 with a GPU, 0 to 2 without')  # fmt: skip
    parser.add_argument('--devices', nargs='+', metavar='DEVICE',
                        help='a process for each: cpu, cuda:0, ... (default: cuda where there is one)')  # fmt: skip
    parser.add_argument('--threads', type=int, help="of each process on the CPU (default: torch's choice)")
    for name in OPTIONS:
        value = getattr(defaults, name)
        parser.add_argument(f'--{name.replace("_", "-")}', type=int, default=value, help=f'default: {value}')
    parser.add_argument('--report', action='store_true', help='train nothing: the table and the plots alone')
    parser.add_argument(
        '--verify',
        nargs=2,
        metavar=('NAME', 'SEED'),
        help='train this run again, on its device and with its threads unless given, and compare',
    )
    args = parser.parse_args(argv)
    if min(args.seeds) < 0:
        parser.error(f'argument --seeds: {min(args.seeds)} must be at least 0')
    if args.threads is not None and args.threads < 1:
        parser.error(f'argument --threads: {args.threads} must be at least 1')
    devices = args.devices or ['cuda' if cuda else 'cpu']
    for device in devices:
        check_device(device)
    if args.verify:
        verify(*args.verify, args.out, args.data, args.devices and args.devices[0], args.threads)
        return
    set_up(args.threads)
    if not args.report:
        settings = Settings(args.train_images, args.epochs, args.test_images, args.batch_size)
        settings.check()
        pairs = [(name, seed) for seed in args.seeds for name in args.networks]
        run_missing(pairs, args.out, args.work_dir, args.data, settings, devices)
        measure_missing(args.out, args.work_dir, args.data, settings)
    for path in report(args.out, args.data):
        print(path)


if __name__ == '__main__':
    run_tool(main)
