"""A warm start against a cold one: the same small SK network, from a trained plain network's weights and from none."""

import functools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _benchmark.machine import describe_machine
from _tables import markdown_table
from torch import Tensor, nn

from sk_plugins.networks import SKResNet
from sk_plugins.weights import from_resnet

from .claims import Claim
from .data import Data
from .deciding import decide
from .measuring import logits_of
from .networks import BASE, SIZES
from .reporting import mean_and_sd
from .reporting_claims import difference, p_value
from .rows import Row, Settings, append_row, check_same_settings, read_rows
from .together import Alone
from .training import fit

# The epochs before those that are compared: added to a seed, they draw garments of their own.
PRETRAINING = (1000, 2000)
CURVE_IMAGES = 400
CURVE_POINTS = 5
STARTS = {
    'warm': "SK, true kernels, from the plain network's weights",
    'warm_dilated': "SK, dilated kernels, from the plain network's weights",
    'cold': 'SK, true kernels, from random weights',
    'plain': 'the plain network, trained on',
    'cold_longer': 'SK, true kernels, from random weights, with the epochs before',
}
CLAIMS = (
    Claim('', 'a warm start beats a cold one', 'warm', 'cold'),
    Claim('', 'true kernels beat dilated ones', 'warm', 'warm_dilated'),
    Claim('', 'selecting beats training the plain network on', 'warm', 'plain'),
    Claim('', 'a warm start beats a cold one that had as many images in all', 'warm', 'cold_longer'),
)
NETWORK = {**BASE, **SIZES['narrow']}
COLORS = dict(warm='tab:orange', warm_dilated='tab:red', cold='tab:blue', plain='tab:grey', cold_longer='tab:cyan')


class Runs:
    """Trainings from every start; a seed's plain network is trained once."""

    def __init__(self, data: Data, device: str) -> None:
        self.data, self.device = data, device
        self.pretrained = functools.lru_cache(maxsize=1)(self._pretrain)

    def _pretrain(self, seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        model = self._place(SKResNet(**NETWORK, unit='plain'))
        fit(Alone(model), self._batches(seed, PRETRAINING), self._steps(PRETRAINING), self.data.settings)
        return model.state_dict()

    def _batches(self, seed: int, numbers: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        return (batch for number in numbers for batch in self.data.batches([seed + number], 0))

    def _steps(self, numbers: Sequence[int]) -> int:
        return self.data.settings.train_images // self.data.settings.batch_size * len(numbers)

    def _place(self, model: SKResNet) -> SKResNet:
        return model.to(self.device, memory_format=torch.channels_last)

    def start(self, name: str, seed: int) -> SKResNet:
        """The network ``name`` of STARTS before its training."""
        weights = None if name.startswith('cold') else self.pretrained(seed)
        torch.manual_seed(seed)
        if weights is None:
            return self._place(SKResNet(**NETWORK, sk_kwargs=dict(dilated=False)))
        if name == 'plain':
            model = SKResNet(**NETWORK, unit='plain')
            model.load_state_dict(weights)
            return self._place(model)
        return self._place(from_resnet(weights, sk_kwargs=dict(dilated=name == 'warm_dilated')))

    def run(self, name: str, seed: int) -> Row:
        """Train a network of STARTS, and test it: before, on the way, and after."""
        started = time.perf_counter()
        model, settings = self.start(name, seed), self.data.settings
        images, labels, _ = self.data.test()
        numbers = (*PRETRAINING, 0) if name == 'cold_longer' else (0,)
        steps = self._steps(numbers)
        marks = {round(steps * i / CURVE_POINTS) for i in range(1, CURVE_POINTS)}
        curve = [(0, self._top1(model, images[:CURVE_IMAGES], labels)[0])]
        moved = self._moved(model, seed, images[:CURVE_IMAGES]) if name.startswith('warm') else None

        def watch(step: int) -> None:
            if step in marks:
                top1, _ = self._top1(model, images[:CURVE_IMAGES], labels)
                curve.append((step * settings.batch_size, top1))
                model.train()

        fit(Alone(model), self._batches(seed, numbers), steps, settings, watch)
        top1, loss = self._top1(model, images, labels)
        curve.append((steps * settings.batch_size, self._top1(model, images[:CURVE_IMAGES], labels)[0]))
        machine = describe_machine('cuda' if self.device.startswith('cuda') else self.device)
        row = {
            'network': name,
            'seed': seed,
            'top1': top1,
            'loss': loss,
            'curve': curve,
            'moved': moved,
            'parameters': sum(parameter.numel() for parameter in model.parameters()),
            'seconds': round(time.perf_counter() - started, 1),
            'device': self.device.partition(':')[0],
            'hardware': machine['gpu'] or machine['cpu'],
            'threads': torch.get_num_threads(),
            'torch': torch.__version__,
            'settings': asdict(settings),
        }
        return json.loads(json.dumps(row))

    def _moved(self, model: nn.Module, seed: int, images: Tensor) -> float:
        """How far the logits are from the plain network's, as a share of their standard deviation."""
        expected = logits_of(self.start('plain', seed).eval(), images)
        return ((logits_of(model.eval(), images) - expected).std() / expected.std()).item()

    def _top1(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
        logits, labels = logits_of(model.eval(), images), labels[: len(images)]
        return 100 * (logits.argmax(1) == labels).float().mean().item(), F.cross_entropy(logits, labels).item()


def run_missing(seeds: Sequence[int], out: Path, data_root: Path, settings: Settings, device: str) -> None:
    """Train what OUT/runs.jsonl lacks of all starts with these seeds."""
    path = out / 'runs.jsonl'
    rows = read_rows(path)
    check_same_settings(path, rows, settings, {'garments'})
    done = {(row['network'], row['seed']) for row in rows}
    todo = [(name, seed) for seed in seeds for name in STARTS if (name, seed) not in done]
    print(f'{len(done)} runs are done', flush=True)
    runs = Runs(Data(data_root, settings, device), device) if todo else None
    for number, (name, seed) in enumerate(todo, start=1):
        row = runs.run(name, seed)
        append_row(path, row)
        print(f'{number} of {len(todo)}: {name}, seed {seed}: top-1 {row["top1"]:.2f} %', flush=True)


def report(out: Path) -> list[Path]:
    """Write OUT/table.md and OUT/accuracy.png from the rows."""
    rows = read_rows(out / 'runs.jsonl')
    written = [out / 'table.md', out / 'accuracy.png']
    written[0].write_text(markdown(rows), encoding='utf-8')
    draw(rows, written[1])
    return written


def markdown(rows: Sequence[Row]) -> str:
    """The tables: every start, and every claim."""
    if not rows:
        raise ValueError('there are no runs yet, so there is no table')
    settings, seeds = rows[0]['settings'], sorted({row['seed'] for row in rows})
    options = dict(train_images=settings['train_images'], test_images=settings['test_images'])
    command = ' '.join(f'--{name.replace("_", "-")} {value}' for name, value in options.items())
    machines = sorted({f'{row["hardware"]} ({row["device"]}, threads: {row["threads"]})' for row in rows})
    before = len(PRETRAINING)
    how = (
        'Written by `tools/compare_warm_start.py` from `runs.jsonl`:\n\n'
        '```bash\npython tools/prepare_fashion_mnist.py\n'
        f'python tools/compare_warm_start.py --seeds {" ".join(map(str, seeds))} {command} '
        f'--threads {rows[0]["threads"]}\n```\n\n'
        f'The plain network is trained on {before} x {settings["train_images"]:,} garments at scales of '
        f'{settings["scale"][0]} to {settings["scale"][1]}. Then every network is trained on '
        f'{settings["train_images"]:,} others, the same for all of a seed, with AdamW, batch '
        f'{settings["batch_size"]} and a learning rate that rises to {settings["learning_rate"]} and falls; '
        f'`cold_longer` on all of them. Top-1 in per cent on {settings["test_images"]:,} garments of the test set, '
        'mean and standard deviation over the seeds. Before that training, on '
        f"{CURVE_IMAGES} of them: top-1, and how far the logits are from the plain network's, in per cent of their "
        'standard deviation. Differences are paired by seed, in points, with the 95 % interval and p of the two-sided '
        'paired t-test (`scipy.stats.ttest_rel`), not corrected for the number of tests. '
        f'{len(rows)} runs, {sum(row["seconds"] for row in rows) / 60:.0f} minutes, on {"; ".join(machines)}, torch '
        f'{", ".join(sorted({row["torch"] for row in rows}))}.'
    )
    columns = ['start', '', 'parameters', 'seeds', 'logits moved, %', 'top-1 at the start', 'top-1']
    lines = [columns, ['---', '---', *['---:'] * 5]]
    for name in STARTS:
        own = [row for row in rows if row['network'] == name]
        if not own:
            continue
        first = mean_and_sd([row['curve'][0][1] for row in own])
        moved = [100 * row['moved'] for row in own if row['moved'] is not None]
        cells = [f'{own[0]["parameters"]:,}', str(len(own)), mean_and_sd(moved) if moved else '']
        lines.append([f'`{name}`', STARTS[name], *cells, first, mean_and_sd([row['top1'] for row in own])])
    claims = [['claim', 'starts', 'seeds', 'difference', 'p'], ['---', '---', '---:', '---:', '---:']]
    for answer in decide(CLAIMS, rows, corrected=False):
        claim = answer.claim
        claims.append([claim.text, claim.pair, str(len(answer.differences)), difference(answer), p_value(answer.p)])
    title = '# A warm start against a cold one, on scaled Fashion-MNIST'
    return '\n\n'.join([title, how, markdown_table(lines), '## Claims', markdown_table(claims)]) + '\n'


def draw(rows: Sequence[Row], path: Path) -> None:
    """Top-1 on the way: a thin line for each seed, a thick one for their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout='constrained')
    axes = figure.subplots()
    for name in STARTS:
        curves = np.array([row['curve'] for row in rows if row['network'] == name])
        if len(curves) == 0:
            continue
        images = curves[0, :, 0]
        axes.plot(images, curves[:, :, 1].T, color=COLORS[name], alpha=0.3, linewidth=1)
        axes.plot(images, curves[:, :, 1].mean(0), color=COLORS[name], linewidth=2, label=name)
    axes.set_xlabel('images since the start')
    axes.set_ylabel(f'top-1 on {CURVE_IMAGES} garments of the test set, %')
    axes.legend(frameon=False)
    axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=110)
