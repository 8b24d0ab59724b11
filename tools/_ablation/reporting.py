"""The table and the plots, from the rows."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from _tables import markdown_table

from .attention import unmeasured
from .comparing import Comparison, by_network, compare
from .data import Data
from .drawing import draw_accuracy, draw_attention
from .networks import CLAIMS, SELECTED
from .rows import OPTIONS, SIZES, Row, Settings, read_rows


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
                mean_and_sd(values.values()),
                *[f'{np.mean(third):.2f}' if third else '' for third in thirds],
                *comparison_cells(found),
            ]
        )
    return markdown_table(lines)


def _claims_table(rows: Sequence[Row]) -> str:
    lines = [['claim', 'networks', 'seeds', 'difference', 'p'], ['---', '---', '---:', '---:', '---:']]
    for claim, (name, other) in CLAIMS.items():
        found = compare(rows, name, other)
        lines.append(
            [claim, f'`{name}` - `{other}`', str(found.n if found else 0), *comparison_cells(found)],
        )
    return markdown_table(lines)


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
    return markdown_table(lines)


def mean_and_sd(values: Sequence[float]) -> str:
    values = list(values)
    return f'{np.mean(values):.2f}' + (f' ± {np.std(values, ddof=1):.2f}' if len(values) > 1 else '')


def comparison_cells(found: Comparison | None) -> list[str]:
    if found is None:
        return ['', '']
    if found.p is None:
        return [f'{found.mean:+.2f}', '']
    return [
        f'{found.mean:+.2f} ({found.low:+.2f} to {found.high:+.2f})',
        '< 0.001' if found.p < 0.001 else f'{found.p:.3f}',
    ]


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
