"""The page and its figures, from the rows that there are."""

import functools
import json
import operator
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from _tables import markdown_table

from sk_plugins._files import write_atomically

from .claims import CLAIMS, MARGIN, OVER_K3
from .data import DATA
from .deciding import ALPHA, UNDER, WANTED_SEEDS, Answer, bound, decide
from .drawing import draw_attention, draw_forest, draw_learning, draw_places
from .networks import NETWORKS, SELECTED, SIZES, SUMMED, build
from .reporting_attention import attending, attention, figure_name, learning
from .reporting_claims import (
    apart,
    claims_table,
    controls,
    convergence,
    convergence_in_short,
    is_apart,
    selection_after_longer,
    sensitivity,
    with_interval,
)
from .reporting_places import (
    Place,
    answers_by_place,
    elsewhere,
    in_groups,
    in_places,
    in_short,
    named,
    places,
    rising_in_short,
    trend,
    trend_in_short,
)
from .reporting_power import power, power_in_short
from .rows import MAIN, NEW_SCALES, OPTIONS, PLACES, SCALES, Row, Settings, longer_seeds, read_rows, rows_of

OUT = 'results/ablation'  # the tool's default
WANTED_HALF_WIDTH = 0.5
NOTES = ('Data', 'Power', 'Limits', 'Cost')  # where the page has room for what rows do not tell


def report(out: Path, page: Path) -> list[Path]:
    """Write ``page`` and OUT/*.png from OUT/runs.jsonl and OUT/variance.jsonl; a figure without rows goes.

    OUT/notes.md, where there is one, has what rows do not tell: see :func:`read_notes`.

    Raises:
        ValueError: there are no rows.
        ModuleNotFoundError: statsmodels is not installed.
    """
    rows, variance = read_rows(out / 'runs.jsonl'), read_rows(out / 'variance.jsonl')
    if not rows and not variance:
        raise ValueError(f'{out}: there are no runs yet, so there is no page')
    notes = read_notes(out / 'notes.md')
    text = markdown(rows, variance, os.path.relpath(out, page.parent), out.as_posix(), notes)
    answers = decide(CLAIMS, rows_of(rows, *MAIN))
    written = [page]
    beside = in_places(answers_by_place(rows))
    figures = [
        ('forest.png', functools.partial(draw_forest, answers), any(a.differences for a in answers)),
        ('places.png', functools.partial(draw_places, beside), beside),
    ]
    found = attending(rows)
    for place in PLACES:
        there = found.get(place, [])
        for kind, draw in (('attention', draw_attention), ('learning', draw_learning)):
            figures.append((figure_name(kind, *place), functools.partial(draw, there), there))
    for name, draw, has in figures:
        if has:
            with write_atomically(out / name) as partial:
                draw(partial)
            written.append(out / name)
        else:
            (out / name).unlink(missing_ok=True)
    with write_atomically(page) as partial:
        partial.write_text(text, encoding='utf-8')
    return written


def read_notes(path: Path) -> dict[str, str]:
    """Texts by their headings, of NOTES; none where there is no file.

    Raises:
        ValueError: another heading, or text before the first.
    """
    if not path.exists():
        return {}
    before, *parts = re.split(r'^# (.+)$', path.read_text(encoding='utf-8'), flags=re.MULTILINE)
    notes = {heading: text.strip() for heading, text in zip(parts[::2], parts[1::2])}
    wrong = [f'# {heading}' for heading in notes if heading not in NOTES] + before.strip().splitlines()
    if wrong:
        raise ValueError(f'{path}: {wrong[0]!r}: must be under one of {", ".join(f"# {name}" for name in NOTES)}')
    return notes


def markdown(
    rows: Sequence[Row],
    variance: Sequence[Row],
    folder: str,
    out: str = OUT,
    notes: Mapping[str, str] | None = None,
) -> str:
    """The page.

    Args:
        rows: of the runs.
        variance: rows of the study of the variance.
        folder: where its figures are, seen from it.
        out: where its rows are, as --out says.
        notes: as :func:`read_notes` has them.
    """
    notes = notes or {}
    main = rows_of(rows, *MAIN)
    answers = decide(CLAIMS, main)
    everywhere = answers_by_place(rows)
    parts = [
        "# The paper's claims, measured",
        f'Written by `tools/run_ablation.py` from the rows in `{out}`, not by hand, but for what is called a note. A '
        "claim without rows says so. The networks are small and the images are not ImageNet's: what holds here holds "
        'for such networks.',
        '## In short',
        *_summary(answers, rows, everywhere),
        '## Method',
        *_method([*rows, *variance], notes.get('Data', '')),
        '## Power',
        *power(rows, variance),
        notes.get('Power', ''),
        '## The claims',
        claims_table(answers),
    ]
    if any(answer.differences for answer in answers):
        parts += [
            f'![All claims: mean, seeds and corrected interval]({folder}/forest.png)',
            '*A square is the mean, a tick a seed, a line the corrected interval, a grey bar the margin of a claim of '
            f'equivalence, and the dashed line {MARGIN:g} points. Green claims hold, red ones are contradicted, for '
            f'blue ones the network is {UNDER}, grey ones are not decided.*',
        ]
    parts += sensitivity(main)
    parts += elsewhere(everywhere, folder)
    parts += trend(rows)
    parts += ['### Convergence', *convergence(rows, PLACES)]
    parts += ['## Attention against scale', *attention(rows, folder)]
    parts += ['## How the selection learns', *learning(rows, folder)]
    parts += ['## The networks', *_networks(rows)]
    parts += ['## Limits', '\n'.join([_limits(answers, rows), notes.get('Limits', '')]).strip()]
    parts += ['## The command and its cost', *_cost(rows, variance, out), notes.get('Cost', '')]
    parts += [
        '## The study before this one',
        '[Its page](first_study.md) and [its table](ablation_results.md) stay as what they are: three seeds, networks '
        'after one epoch, one random scale for each test image, no correction. It decided three of ten comparisons. No '
        'row of it is on this page.',
    ]
    return '\n\n'.join(part for part in parts if part) + '\n'


def _summary(answers: Sequence[Answer], rows: Sequence[Row], everywhere: dict[Place, list[Answer]]) -> list[str]:
    parts = []
    if everywhere:
        parts = ['Which answer the claims have, by data set and size of the networks:', in_groups(everywhere)]
    parts.append(f'On `{MAIN[0]}`, {MAIN[1]}, the one data set and size on which every network is trained:')
    lines = []
    sums = [a for a in answers if a.claim.text.endswith('selection beats the sum') and a.most is not None]
    sums += [a for a in answers if a.claim.key == 'a' and a.most is not None]
    if sums:
        low, high = (choose(a.mean for a in sums) for choose in (min, max))
        lines.append(
            f'- Selection against the sum, in {len(sums)} sets of kernels: {low:+.2f} to {high:+.2f} points, and at '
            f'most {max(a.most for a in sums):+.2f}.'
        )
    kinds = {
        'holds': [a for a in answers if a.verdict == 'holds' and a.claim.margin is None],
        'holds, within its margin': [a for a in answers if a.verdict == 'holds' and a.claim.margin is not None],
        'contradicted': [a for a in answers if a.verdict == 'contradicted'],
    }
    for kind, found in kinds.items():
        if found:
            lines.append(f'- **{kind.capitalize()}** ({len(found)} of {len(answers)}): {"; ".join(map(named, found))}.')
    counts = Counter(answer.verdict for answer in answers)
    for kind in (UNDER, 'not decided', 'not run'):
        if counts[kind]:
            alone = [f'{named(a)}: {apart(a)}' for a in answers if a.verdict == kind and is_apart(a)]
            told = f'; apart from 0 is {"; ".join(alone)}' if alone else ''
            lines.append(f'- **{kind.capitalize()}**: {counts[kind]} of {len(answers)}{told}.')
    third = [a for a in answers if a.claim.text == 'a third kernel adds little' and a.verdict == 'holds']
    if third and not any(a.verdict == 'holds' for a in answers if a.claim.group == OVER_K3):
        lines.append(
            '- That a third kernel adds little says less where a second is not shown to add anything to one 3x3 either.'
        )
    lines.append(_looks(answers, rows))
    if answers[0].verdict == UNDER and {a.verdict for a in answers if a.claim.key == 'i'} == {'holds'}:
        lines.append(
            "- (i), a claim of this study and not the paper's, is of dependence, not of gain: networks that were "
            'trained with attention need it. Those trained without it, with the sum, are worse by at most '
            f'{answers[0].most:.2f} points (a).'
        )
    bounded = [a for a in answers if None not in (a.claim.paper, a.most)]
    if bounded:
        below = [a for a in bounded if a.most < a.claim.paper]
        above = [a for a in bounded if a.least > a.claim.paper]
        lines.append(
            f"- Of the {len(bounded)} differences for which the paper has a figure, ImageNet's, the bounds of "
            f'{len(below)} lie below it, those of {len(above)} above it'
            + (f' ({"; ".join(map(named, above))})' if above else '')
            + f', and those of {len(bounded) - len(below) - len(above)} contain it.'
        )
    told = [
        f'{claim.text} {with_interval(values)} (the paper: {claim.paper:+.2f})'
        for claim, values in controls(rows_of(rows, *MAIN))
        if claim.other == 'k3'
    ]
    if told:
        lines.append(
            f'- What other additions bring the network of one 3x3 kernel here: {"; ".join(told)}. Where they bring '
            'less than there, a claim may fail for that reason.'
        )
    selection = answers[0]
    if selection.low is None:
        lines.append('- Claim (a) for M = 2 has no interval yet, which takes two seeds.')
    else:
        half = (selection.high - selection.low) / 2
        few = len(selection.differences) < WANTED_SEEDS
        met = 'is met' if half <= WANTED_HALF_WIDTH and not few else 'is missed'
        lines.append(
            f'- The aim for claim (a), M = 2, is {WANTED_SEEDS} seeds and a half-width of {WANTED_HALF_WIDTH} points. '
            f'There are {len(selection.differences)} seeds and {half:.2f} points: it {met}.'
        )
    aim = convergence_in_short(rows)
    lines += [f'- {text}' for text in (aim, selection_after_longer(rows)) if text]
    lines.append(power_in_short(rows))
    parts.append('\n'.join(line for line in lines if line is not None))
    others = [in_short(place, there, answers) for place, there in everywhere.items() if place != MAIN]
    others += [line for line in (rising_in_short(everywhere), trend_in_short(rows)) if line]
    return [*parts, *(['Elsewhere:', '\n'.join(others)] if others else [])]


def _looks(answers: Sequence[Answer], rows: Sequence[Row]) -> str | None:
    """Which claims were tested twice, and what that does to their answers."""
    twice = [answer for answer in answers if answer.looks > 1]
    if not twice:
        return None
    once = {answer.claim: answer for answer in decide(CLAIMS, rows_of(rows, *MAIN), for_looks=False)}
    other = [f'{named(a)}: {once[a.claim].verdict}' for a in answers if once[a.claim].verdict != a.verdict]
    text = (
        f'- {len(twice)} of {len(answers)} claims have seeds that were added after a look at {WANTED_SEEDS}: they are '
        'tested at half the level, for two looks.'
    )
    return text + (f' Without that it would be {"; ".join(other)}.' if other else ' No answer hangs on that.')


def _method(rows: Sequence[Row], note: str) -> list[str]:
    settings = Settings.of(rows[0])
    by_data = {row['data']: Settings.of(row) for row in rows if row['order'] is None} or {rows[0]['data']: settings}
    lengths = ', '.join(f'{one.epochs} x {one.train_images:,} images on `{name}`' for name, one in by_data.items())
    scales = ', '.join(f'{scale:g}' for scale in SCALES)
    new = ' and '.join(f'{scale:g}' for scale in NEW_SCALES)
    channels = ' or '.join(f'{", ".join(map(str, size["channels"]))} ({name})' for name, size in SIZES.items())
    unit = build(SELECTED).layer1[0].conv2
    return [
        '**Data.** '
        + '; '.join(f'`{name}`: {text}' for name, text in DATA.items())
        + f'. An object has a random size, {settings.scale[0]:g} to {settings.scale[1]:g} times 28 pixels, drawn anew '
        'in every epoch, on a canvas of 64 x 64 grey pixels. Except on `scaled` it lies at a random place, elsewhere '
        'in every epoch. Kuzushiji and EMNIST are not here: we found no package that ships them.',
        note,
        f'**Networks.** An SKResNet of three stages with two units each, SK_2_1 to SK_4_2, with {channels} channels in '
        f'their SK convolutions and 4 times as many outside, cardinality 2, and {unit.attn.fc_reduce.out_channels} '
        'channels between the two layers of the attention. K5 and K7 are 3x3 kernels with a '
        'dilation of 2 and 3, as in the paper, so that one kernel has as many parameters as another, and two or three '
        'have more than one. `wider` and `deeper` have one plain 3x3 convolution in a unit and more channels or more '
        'units, `se` has squeeze-and-excitation besides: they have as many parameters and multiply-adds as '
        f'`{SELECTED}`, each to 2 %, and to 5 % for `deeper`. The true 5x5 and 7x7 of claim (f) have 4 and 8 groups '
        f'where the others have 2, and still some 7 % more of both than `{SELECTED}`.',
        f'**Training.** {lengths}; AdamW, batch {settings.batch_size}, a '
        f'learning rate that rises to {settings.learning_rate} over a tenth of the steps and falls along a cosine to 0'
        + (', mixed precision' if settings.amp else '')
        + '. What is tested is an exponential moving average of the weights, which looks back on '
        f'{100 * settings.ema:g} % of the steps.',
        '**Pairs.** All networks of a seed see the same images at the same places in the same order. Tensors that two '
        'networks share begin with the same values.',
        f'**Test.** {settings.test_images:,} objects of the test set (of the digits some 360, several times, as some '
        '1,440 are in training), each at '
        f'the scales {scales}; top-1 is the mean over these, unless it is said to be at random scales: then every '
        f"object is at one of its own. The scales {new} were never trained on, and are claim (g)'s. At 2.5 an object "
        'is 6 pixels larger than the canvas, which cuts it.',
        '**Statistics.** Differences are paired by seed, in points of top-1. A claim that one network is better is '
        'tested by the two-sided paired t-test, and a claim that says "little", "as well" or "does not" by two '
        f'one-sided tests (TOST) against a margin: {MARGIN:g} points, and 0.1 for a correlation, '
        "which is tested by Fisher's transformation. All claims of a data set and "
        f"size that have two seeds share a level of {ALPHA:g} by Holm's procedure. An interval is at the level at "
        'which the procedure tested its claim, so that it lies beyond 0 (or within the margin) where p is below '
        f'{ALPHA:g}, and only there; intervals decide one by one, and do not all hold together at '
        f"{100 * (1 - ALPHA):g} %. Two answers come from bounds instead, intervals at Bonferroni's level, {ALPHA:g} by "
        'the number of claims, which share as much again: a wrong answer somewhere has a chance of up to '
        f'{2 * ALPHA:g} on one data set in one size, and on all {len(PLACES)} of them of up to '
        f'{2 * ALPHA * len(PLACES):g}. A claim with more than {WANTED_SEEDS} seeds was looked at with {WANTED_SEEDS} '
        "and again with all: its p is doubled before Holm's procedure, and its intervals and bounds are at half the "
        'level. A claim of equivalence is contradicted where its '
        'bounds lie beyond the margin. A claim that one network is better, and is not decided by its test, is '
        f'"{UNDER}" where the upper bound is below {MARGIN:g}. This answer was added when ten '
        'seeds of claim (a), M = 2, on `garments` had been seen, and none on `scaled`; its margin is the one that '
        "claims of equivalence had before. For correlations there is no such answer. Tests are statsmodels' and "
        "scipy's.",
    ]


def mean_and_sd(values: Sequence[float]) -> str:
    return f'{np.mean(values):.2f}' + (f' ± {np.std(values, ddof=1):.2f}' if len(values) > 1 else '')


def _networks(rows: Sequence[Row]) -> list[str]:
    parts = []
    for data, size in places(rows):
        there = rows_of(rows, data, size)
        if not there:
            continue
        scales = list(there[0]['scales'])
        lines = [
            ['network', 'parameters', 'million multiply-adds', 'seeds', 'top-1', *[f'at {scale}' for scale in scales]],
            ['---', *['---:'] * (4 + len(scales))],
        ]
        for name in NETWORKS:
            own = [row for row in there if row['network'] == name]
            if own:
                at = [f'{np.mean([row["scales"][scale] for row in own]):.1f}' for scale in scales]
                cells = [f'{own[0]["parameters"]:,}', f'{own[0]["mflops"]:.2f}', str(len(own))]
                lines.append([f'`{name}`', *cells, mean_and_sd([row['top1'] for row in own]), *at])
        parts += [f'### The networks on {data}, {size}', markdown_table(lines)]
    return ['Mean and standard deviation over the seeds.', *parts] if parts else ['Not run.']


def _limits(answers: Sequence[Answer], rows: Sequence[Row]) -> str:
    counts = [len(answer.differences) for answer in answers]
    of_size = {row['size']: row['parameters'] for row in rows if row['network'] == SELECTED}
    sizes = ' or '.join(f'{of_size[size]:,} ({size})' for size in SIZES if size in of_size)
    told = f'Networks of {sizes} parameters (`{SELECTED}`)' if sizes else 'Small networks'
    lines = [
        f"- {told} on grey images of 64 x 64. The paper's have some 27 million, and ImageNet.",
        f'- The claims have {" to ".join(map(str, sorted({min(counts), max(counts)})))} seeds on `{MAIN[0]}`, '
        f'{MAIN[1]}; {WANTED_SEEDS} are the aim.',
        f'- Most claims share the runs of `{SELECTED}`, so that their answers err together.',
    ]
    if {'scaled', 'garments'} <= {row['data'] for row in rows}:
        lines.append(
            '- On `scaled` networks see few objects often, on `garments` many objects too seldom to converge: an '
            'answer that both give is less likely to hang on which of the two it is. Both have the same test objects, '
            'networks and learning rate.'
        )
    if 'scaled' in {row['data'] for row in rows}:
        lines.append(
            '- On black a larger object makes the whole canvas brighter, so that pooled maps tell its scale at once: '
            'claims (e), (g) and (i) on `scaled` may owe something to that.'
        )
    if rows:
        full, settings = Settings().on(rows[0]['data']), Settings.of(rows[0])
        seen, whole = settings.epochs * settings.train_images, full.epochs * full.train_images
        if seen < whole:
            lines.append(
                f'- Training is {100 * seen / whole:.1f} % of what the full study is to have ({whole:,} images).'
            )
        if settings.test_images < full.test_images:
            lines.append(f'- The test has {settings.test_images:,} of {full.test_images:,} objects.')
    lines.append(
        '- Intervals are over seeds, for these test images. Other images would add to them: the last column of the '
        'table of variances has how much. On `digits`, of some 360 objects, it would be more, and is not measured.'
    )
    nameless, changed = (
        sum(test(row.get('commit', '')) for row in rows) for test in (operator.not_, lambda name: 'dirty' in name)
    )
    if nameless or changed:
        lines.append(
            f'- Of {len(rows)} rows {nameless} are from before a row named its commit, timm and the instructions of '
            f'its CPU, and name none of them; {changed} name a commit to which changes had been made. `--verify` says '
            'whether one comes out the same today.'
        )
    lines.append('- Where a claim is not decided, its interval says how large an effect may still be, either way.')
    return '\n'.join(lines)


def _cost(rows: Sequence[Row], variance: Sequence[Row], out: str) -> list[str]:
    parts, first = [], ["pip install '.[study]'", 'python tools/prepare_fashion_mnist.py']
    if out != OUT:
        parts.append(
            f'These rows are a trial, in `{out}`. The full study is two commands, which write `{OUT}` and this page:'
            '\n\n```bash\npython tools/run_ablation.py --variance 3 3\npython tools/run_ablation.py\n```'
        )
    for name, those, option in (('The runs', rows, '--seeds'), ('The study of the variance', variance, '--variance')):
        if not those:
            continue
        machines = sorted({f'{row["hardware"]} ({row["device"]}, threads: {row["threads"]})' for row in those})
        seconds = sum(row['seconds'] for row in those)
        elsewhere = f' --out {out}' if out != OUT else ''
        commands = [
            f'python tools/run_ablation.py {_options(own, option)}{elsewhere}'
            for place in places(those)
            for own in _commands([row for row in those if (row['data'], row['size']) == place], option)
        ]
        parts += [
            f'{name}: {len(those)} rows, {seconds / 3600:.1f} hours of one process in all, on {"; ".join(machines)}, '
            f'torch {", ".join(sorted({row["torch"] for row in those}))}.',
            '\n'.join(['```bash', *first, *commands, '```']),
        ]
        first = []
    if not any(row['device'] == 'cuda' for row in (*rows, *variance)):
        parts.append('None of it ran on a GPU: how long the study takes on one is not measured.')
    allowed = {place: bound([row for row in rows if (row['data'], row['size']) == place]) for place in places(rows)}
    told = [f'{far:.2f} points away on {data}, {size}' for (data, size), far in allowed.items() if far is not None]
    parts.append(
        'After a kill, the same command goes on with what is missing. `--verify NAME SEED` trains a run '
        f'again, on `{MAIN[0]}`, {MAIN[1]}, unless --sets and --sizes name others, and with --longer the one that was '
        'trained twice as long. On the same hardware, with as many threads and the same torch and timm, it must give '
        'a row that names the instructions of its CPU to the last digit. For older rows, and on another '
        "machine, the first batch's loss must be the row's to 0.1 %, and top-1 may be "
        + (' and '.join(told) or 'within the spread of the seeds')
        + ': training makes a difference in the last digit as large as another draw, and two draws of these networks '
        "differ by less in 99.7 % of cases, by Student's t and the deviation from seed to seed. That is more than most "
        'networks differ by: it tells of a broken training, and the first loss tells of other weights, images or '
        'arithmetic. Where every network has but one seed, the first loss alone is compared.'
    )
    return parts


def _commands(rows: Sequence[Row], option: str) -> list[list[Row]]:
    """The rows of one data set and size by the command that makes them: of seeds that have the same networks."""
    if option == '--variance':
        return [rows]
    networks: dict[int, set[str]] = {}
    for row in rows:
        networks.setdefault(row['seed'], set()).add(row['network'])
    groups: dict[frozenset[str], list[Row]] = {}
    for row in rows:
        groups.setdefault(frozenset(networks[row['seed']]), []).append(row)
    return list(groups.values())


def _options(rows: Sequence[Row], option: str) -> str:
    """Of the command that makes them."""
    data, settings = rows[0]['data'], rows[0]['settings']
    defaults = json.loads(json.dumps(asdict(Settings().on(data))))
    words = {name: settings[name] for name in OPTIONS if settings[name] != defaults[name]}
    words['threads'] = rows[0]['threads']
    words['together'] = max(len(row['together']) for row in rows)
    given = ' '.join(f'--{name.replace("_", "-")} {value}' for name, value in words.items())
    given += ' --amp' * settings['amp'] + ' --compile' * rows[0]['compiled']
    seeds = sorted({row['seed'] for row in rows if not row['longer']})
    if option == '--variance':
        return f'--variance {len(seeds)} {len({row["order"] for row in rows})} --sets {data} {given}'
    networks = [name for name in NETWORKS if any(row['network'] == name for row in rows)]
    chosen = '' if len(networks) == len(NETWORKS) else f'--networks {" ".join(networks)} '
    place = data, rows[0]['size']
    longer = sorted({row['seed'] for row in rows if row['longer']})
    if longer != longer_seeds(seeds, *place) and {SELECTED, SUMMED} & set(networks):
        given = ' '.join(['--longer', *map(str, longer), given])
    return f'--sets {data} --sizes {place[1]} {chosen}--seeds {" ".join(map(str, seeds))} {given}'
