"""The page and its figures, from the rows that there are."""

import functools
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from _tables import markdown_table

from sk_plugins._files import write_atomically

from .attention import CURVE_IMAGES, IMAGES
from .claims import CLAIMS, MARGIN, UNITS
from .data import DATA, NEW_SCALES, SCALES
from .deciding import ALPHA, POWER, UNDER, Answer, bound, components, crossed, decide, power_of, seeds_needed
from .drawing import draw_attention, draw_forest, draw_learning
from .networks import NETWORKS, SELECTED, SUMMED
from .rows import OPTIONS, Row, Settings, read_rows
from .running import MAIN, PLACES

OUT = 'results/ablation'  # the tool's default
WANTED_SEEDS = 10
WHY_SCALED = (
    '**Why `scaled`.** (A note by hand.) The study began with `garments`, where twice the training still adds 1.4 and '
    '2.0 points. `scaled` was added when ten seeds of both networks of claim (a) on `garments` had been seen. Claims '
    'are about the size of an object, and here nothing else varies. Its form was searched for with single runs of '
    '`k3_k5_summed` (a seed that is not in the study): without textures, on smaller canvases, in the middle, with '
    'other batches, rates and optimizers, looking for a short training that twice as much adds less than a point to. '
    'None was short enough while all 60,000 objects were seen: 6 epochs of them gained 1.3 and 1.6 points by 6 more '
    '(both networks, one seed). So the number of objects was lowered, to 12,000 (20 epochs; 1.1 points by 20 more) '
    'and to 6,000 (40 epochs; 0.7 by 40 more), where networks end at some 87 % in place of 88. A seed chooses its '
    'own 6,000. A run has a quarter of the steps of one on `garments`.'
)
WANTED_HALF_WIDTH = 0.5


def report(out: Path, page: Path) -> list[Path]:
    """Write ``page`` and OUT/*.png from OUT/runs.jsonl and OUT/variance.jsonl; a figure without rows goes.

    Raises:
        ValueError: there are no rows.
        ModuleNotFoundError: statsmodels is not installed.
    """
    rows, variance = read_rows(out / 'runs.jsonl'), read_rows(out / 'variance.jsonl')
    if not rows and not variance:
        raise ValueError(f'{out}: there are no runs yet, so there is no page')
    text = markdown(rows, variance, os.path.relpath(out, page.parent), out.as_posix())
    main = _of(rows, *MAIN)
    attending = [row for row in main if row['network'] == SELECTED]
    answers = decide(CLAIMS, main)
    written = [page]
    figures = [
        ('forest.png', lambda path: draw_forest(answers, path), any(a.differences for a in answers)),
        ('learning.png', lambda path: draw_learning(attending, path), attending),
    ]
    for place in PLACES:
        there = [row for row in _of(rows, *place) if row['network'] == SELECTED]
        figures.append((_attention_figure(*place), functools.partial(draw_attention, there), there))
    for name, draw, has in figures:
        if has:
            draw(out / name)
            written.append(out / name)
        else:
            (out / name).unlink(missing_ok=True)
    with write_atomically(page) as partial:
        partial.write_text(text, encoding='utf-8')
    return written


def markdown(rows: Sequence[Row], variance: Sequence[Row], folder: str, out: str = OUT) -> str:
    """The page; ``folder`` is where its figures are, seen from it, and ``out`` where its rows are, as --out says."""
    main = _of(rows, *MAIN)
    answers = decide(CLAIMS, main)
    parts = [
        "# The paper's claims, decided",
        f'Written by `tools/run_ablation.py` from the rows in `{out}`, not by hand. A claim without rows '
        "says so. The networks are small and the images are not ImageNet's: what holds here holds for such networks.",
        '## In short',
        _summary(answers, rows),
        '## Method',
        *_method([*rows, *variance]),
        '## Power',
        *_power(rows, variance),
        '## The claims',
        _claims(answers),
    ]
    if any(answer.differences for answer in answers):
        parts += [
            f'![All claims: mean, seeds and corrected interval]({folder}/forest.png)',
            '*A square is the mean, a tick a seed, a line the corrected interval, a grey bar the margin of a claim of '
            f'equivalence. Green claims hold, red ones are contradicted, for blue ones the network is {UNDER}, grey '
            'ones are not decided.*',
        ]
    parts += _elsewhere(rows)
    parts += ['## Attention against scale', *_attention(rows, folder)]
    parts += ['## How the selection learns', *_learning(main, folder)]
    parts += ['## The networks', _networks(main)]
    parts += ['## Limits', _limits(answers, rows)]
    parts += ['## The command and its cost', *_cost(rows, variance, out)]
    parts += [
        '## The study before this one',
        '[Its page](first_study.md) and [its table](ablation_results.md) stay as what they are: three seeds, networks '
        'after one epoch, one random scale for each test image, no correction. It decided three of ten comparisons. No '
        'row of it is on this page.',
    ]
    return '\n\n'.join(part for part in parts if part) + '\n'


def _places(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Those of PLACES that have rows."""
    return [place for place in PLACES if place in {(row['data'], row['size']) for row in rows}]


def _of(rows: Sequence[Row], data: str, size: str, longer: bool = False) -> list[Row]:
    found = [row for row in rows if (row['data'], row['size'], row['longer']) == (data, size, longer)]
    return sorted(found, key=lambda row: row['seed'])


def _summary(answers: Sequence[Answer], rows: Sequence[Row]) -> str:
    lines = [f'On `{MAIN[0]}`, {MAIN[1]}, the data set and size that all networks are for:', '']
    for verdict in ('holds', 'contradicted', UNDER, 'not decided', 'not run'):
        found = [f'({a.claim.key}) {a.claim.text}' for a in answers if a.verdict == verdict]
        if found:
            lines.append(f'- **{verdict.capitalize()}** ({len(found)} of {len(answers)}): {"; ".join(found)}.')
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
    for data, size in _places(rows):
        found = [answer for answer in decide(CLAIMS, _of(rows, data, size)) if answer.differences]
        if (data, size) != MAIN and found:
            counts = Counter(answer.verdict for answer in found)
            told = ', '.join(f'{verdict}: {count}' for verdict, count in counts.items())
            both = [(a, b) for a in answers for b in found if a.claim is b.claim and a.decided and b.decided]
            differ = [f'({a.claim.key}) {a.claim.text}' for a, b in both if a.verdict != b.verdict]
            agreement = (
                f' Of the {len(both)} that have an answer on `{MAIN[0]}` too, {len(both) - len(differ)} have the same'
                + (f'; not so {"; ".join(differ)}.' if differ else '.')
            )
            lines.append(
                f'- On `{data}`, {size}, {len(found)} claims have rows ({told}).' + (agreement if both else '')
            )
    return '\n'.join(lines)


def _method(rows: Sequence[Row]) -> list[str]:
    settings = Settings.of(rows[0])
    by_data = {row['data']: Settings.of(row) for row in rows if row['order'] is None} or {rows[0]['data']: settings}
    lengths = ', '.join(f'{one.epochs} x {one.train_images:,} images on `{name}`' for name, one in by_data.items())
    scales = ', '.join(f'{scale:g}' for scale in SCALES)
    new = ' and '.join(f'{scale:g}' for scale in NEW_SCALES)
    return [
        '**Data.** '
        + '; '.join(f'`{name}`: {text}' for name, text in DATA.items())
        + f'. An object has a random size, {settings.scale[0]:g} to {settings.scale[1]:g} times 28 pixels, drawn anew '
        'in every epoch, on a canvas of 64 x 64 grey pixels. Except on `scaled` it lies at a random place, elsewhere '
        'in every epoch. Kuzushiji and EMNIST are not here: we found no package that ships them.',
        WHY_SCALED,
        '**Networks.** An SKResNet of three stages with two units each, SK_2_1 to SK_4_2, in two sizes. `wider`, '
        '`deeper` and `se` have as many parameters and as many multiply-adds as `k3_k5_selected`, each to 2 %, and to '
        '5 % for `deeper`.',
        f'**Training.** {lengths}; AdamW, batch {settings.batch_size}, a '
        f'learning rate that rises to {settings.learning_rate} over a tenth of the steps and falls along a cosine to 0'
        + (', mixed precision' if settings.amp else '')
        + '. What is tested is an exponential moving average of the weights, which looks back on '
        f'{100 * settings.ema:g} % of the steps.',
        '**Pairs.** All networks of a seed see the same images at the same places in the same order. Tensors that two '
        'networks share begin with the same values.',
        f'**Test.** {settings.test_images:,} objects of the test set (of the digits some 360, several times), each at '
        f'the scales {scales}; top-1 is the mean over these, unless it is said to be at random scales: then every '
        f"object is at one of its own. The scales {new} were never trained on, and are claim (g)'s. At 2.5 an object "
        'is larger than the canvas, and loses 3 pixels on each side.',
        f'**Statistics.** Differences are paired by seed, in points of top-1. A claim that one network is better is '
        'tested by the two-sided paired t-test, and a claim that says "little", "as well" or "does not" by two '
        f'one-sided tests (TOST) against a margin: {MARGIN:g} points, and 0.1 for a correlation, '
        "which is tested by Fisher's transformation. All claims of a data set and "
        f"size that have two seeds share a level of {ALPHA:g} by Holm's procedure. An interval is at the level at "
        'which the procedure tested its claim, so that it lies beyond 0 (or within the margin) where p is below '
        f'{ALPHA:g}, and only there; intervals decide one by one, and do not all hold together at '
        f'{100 * (1 - ALPHA):g} %. A claim of equivalence is contradicted where its interval lies beyond the margin; '
        'its p is that of TOST. A claim that one network is better that is not decided so is '
        f'"{UNDER}" where the difference is below {MARGIN:g} by an interval at Bonferroni\'s level, {ALPHA:g} by the '
        'number of claims: these bounds share a level of their own. This answer was added when ten seeds of claim (a), '
        'M = 2, on `garments` had been seen, and none on `scaled`; its margin is the one that claims of equivalence '
        "had before. Tests and power are statsmodels' and scipy's.",
    ]


def _power(rows: Sequence[Row], variance: Sequence[Row]) -> list[str]:
    crossings = {}
    for data in DATA:
        found = [crossed([row for row in variance if row['data'] == data], name) for name in (SELECTED, SUMMED)]
        if None not in found:
            crossings[data] = found
    parts, known = [], []
    for data, found in crossings.items():
        told, deviation = _variance([row for row in variance if row['data'] == data], *found)
        parts += told
        known.append((f'claim (a), M = 2, on `{data}`, in the study of the variance', found[0][0].size, deviation))
    if not crossings:
        parts.append('The study of the variance (`--variance`) has not been run.')
    for data, size in _places(rows):
        for answer in decide(CLAIMS, _of(rows, data, size)):
            if answer.low is not None and answer.claim.figure == 'top1':
                name = f'{answer.claim.pair} ({answer.claim.key}), {data}, {size}'
                known.append((name, len(answer.differences), answer.deviation))
    if not known:
        return parts
    tests = len(CLAIMS)
    lines = [
        [
            'differences of', 'seeds', 'deviation', 'seeds needed, one claim', f'seeds needed, {tests} claims',
            f'power of {WANTED_SEEDS}, one claim', f'power of {WANTED_SEEDS}, {tests} claims',
        ],
        ['---', *['---:'] * 6],
    ]  # fmt: skip
    for name, count, value in known:
        needed = [str(seeds_needed(value, tests=number)) for number in (1, tests)]
        powers = [f'{power_of(WANTED_SEEDS, value, tests=number):.2f}' for number in (1, tests)]
        lines.append([name, str(count), f'{value:.2f}', *needed, *powers])
    return [
        *parts,
        f"How many seeds show a difference of {MARGIN:g} points with a power of {100 * POWER:.0f} % (statsmodels' "
        f"`TTestPower`, level {ALPHA:g}), for a claim alone and for the first of all {tests} in Holm's procedure, and "
        f'the power of {WANTED_SEEDS}:',
        markdown_table(lines),
        f'(A note by hand.) {WANTED_SEEDS} seeds were chosen before the first run. The study of the variance on '
        '`garments` came after those of claim (a), not before.',
    ]


def _variance(rows: Sequence[Row], selected: tuple, summed: tuple) -> tuple[list[str], float]:
    """What the crossed runs of one data set say, and the deviation of claim (a)'s difference."""
    settings = Settings.of(rows[0])
    (one, one_right), (other, other_right) = selected, summed
    weights, orders = one.shape
    cases = {
        f'`{SELECTED}`': (one, one_right),
        f'`{SUMMED}`': (other, other_right),
        'their difference': (one - other, one_right - other_right),
    }
    lines = [['deviation, points', 'weights', 'images', 'rest', 'test images'], ['---', *['---:'] * 4]]
    for name, case in cases.items():
        lines.append([name, *[f'{value:.2f}' for value in components(*case).deviations.values()]])
    difference = components(*cases['their difference'])
    deviation = max(difference.weights + difference.order + difference.rest, 0.0) ** 0.5
    noise = {name: np.mean([np.std(row['steps'][name], ddof=1) for row in rows]) for name in ('middle', 'end')}
    averaged = np.mean([row['mixed'] - row['last'] for row in rows])
    return [
        f'Where the variance comes from: {weights} seeds of the weights crossed with {orders} of the images (which, in '
        f'what order, of what size and where), for both networks of claim (a) on `{rows[0]["data"]}`, after '
        f'{settings.epochs} x {settings.train_images:,} images and on {settings.test_images:,} at five scales. The '
        'table has standard deviations from an analysis of variance with two random factors; with '
        f'{weights - 1}, {orders - 1} and {(weights - 1) * (orders - 1)} degrees of freedom they are rough, and 0 '
        'stands for an estimate below 0. The rest is what weights and images do together. Another sample of test '
        'images would move all runs by what the last column says.',
        markdown_table(lines),
        f'Over five steps in the middle of the training, top-1 at random scales has a deviation of '
        f'{noise["middle"]:.2f} points, and over the last five, where the learning rate goes to 0, of '
        f'{noise["end"]:.2f}. With the average of the weights it is {averaged:+.2f} points better than with the last.',
        'In a pair, weights and images are the same for both networks, and their difference varies by what the last '
        f'line says: {deviation:.2f} points in all from seed to seed (estimates below 0 taken as they are).',
    ], float(deviation)


def _claims(answers: Sequence[Answer]) -> str:
    lines = [
        ['claim', 'networks', 'the paper', 'seeds', 'difference', 'corrected p', ''],
        ['---', '---', *['---:'] * 4, '---'],
    ]
    for answer in answers:
        claim = answer.claim
        margin = '' if claim.margin is None else f', within ± {claim.margin:g}'
        lines.append(
            [
                f'({claim.key}) {claim.text}{margin}',
                claim.pair,
                '' if claim.paper is None else f'{claim.paper:+.2f}',
                str(len(answer.differences)),
                difference(answer),
                p_value(answer),
                answer.verdict,
            ]
        )
    return markdown_table(lines)


def difference(answer: Answer) -> str:
    """The mean with its interval, as far as there are any."""
    if not answer.differences:
        return ''
    digits = 2 if answer.claim.unit == 'points' else 3
    interval = '' if answer.low is None else f' ({answer.low:+.{digits}f} to {answer.high:+.{digits}f})'
    return f'{answer.mean:+.{digits}f}{interval}'


def p_value(answer: Answer) -> str:
    return '' if answer.p is None else '< 0.001' if answer.p < 0.001 else f'{answer.p:.3f}'


def mean_and_sd(values: Sequence[float]) -> str:
    return f'{np.mean(values):.2f}' + (f' ± {np.std(values, ddof=1):.2f}' if len(values) > 1 else '')


def _elsewhere(rows: Sequence[Row]) -> list[str]:
    """The claims on other data and in the other size, and what twice the training adds."""
    parts, missing = [], []
    for data, size in PLACES:
        if (data, size) == MAIN:
            continue
        answers = [answer for answer in decide(CLAIMS, _of(rows, data, size)) if answer.differences]
        if answers:
            parts += [f'### On {data}, {size}', _claims(answers)]
        else:
            missing.append(f'{data}, {size}')
    if missing:
        parts.append(f'Not run: {"; ".join(missing)}.')
    return [*parts, '### Convergence', *_convergence(rows)]


def _convergence(rows: Sequence[Row]) -> list[str]:
    lines, far = [], None
    for data, size in PLACES:
        usual = {(row['network'], row['seed']): row for row in _of(rows, data, size)}
        pairs: dict[str, list[tuple[Row, Row]]] = {}
        for row in _of(rows, data, size, longer=True):
            if (row['network'], row['seed']) in usual:
                pairs.setdefault(row['network'], []).append((usual[row['network'], row['seed']], row))
        for name, found in pairs.items():
            gains = [longer['top1'] - once['top1'] for once, longer in found]
            losses = [f'{np.mean([pair[i]["loss"] for pair in found]):.3f}' for i in (0, 1)]
            each = ', '.join(f'{gain:+.2f}' for gain in gains)
            lines.append([data, size, f'`{name}`', str(len(gains)), f'{np.mean(gains):+.2f}', each, *losses])
            if (data, size) == MAIN:
                far = max(far or 0, np.mean(gains))
    parts = []
    if lines:
        head = ['data', 'size', 'network', 'seeds', 'points', 'by seed', 'test loss', 'after twice as much']
        rule = ['---', '---', '---', '---:', '---:', '---', '---:', '---:']
        parts += [
            'What twice the training adds to top-1, of the same seeds, and the loss on the test set in nats: where it '
            'does not fall, more training brings no better probabilities.',
            markdown_table([head, rule, *lines]),
        ]
    if far is None:
        parts.append(
            f'Not run on `{MAIN[0]}`, {MAIN[1]}: whether its networks are within 1 point of where they go with twice '
            'the training is not known.'
        )
    else:
        parts.append(
            f'The aim is at most 1 point on `{MAIN[0]}`, {MAIN[1]}: it is ' + ('met.' if far <= 1 else 'missed.')
        )
    return parts


def _attention_figure(data: str, size: str) -> str:
    return 'attention.png' if (data, size) == MAIN else f'attention_{data}_{size}.png'


def _attention(rows: Sequence[Row], folder: str) -> list[str]:
    parts = []
    for data, size in PLACES:
        there = [row for row in _of(rows, data, size) if row['network'] == SELECTED]
        if there:
            figure = f'{folder}/{_attention_figure(data, size)}'
            parts += [
                f'### In networks for {data}, {size}',
                _rho_table(there),
                f'![Attention for the 5x5 against scale, unit by unit, on {data}, {size}]({figure})',
            ]
    if not parts:
        return ['Not run.']
    count = min(row['settings']['test_images'] for row in rows)
    return [
        f'`{SELECTED}`, unit by unit: the mean over channels of the 5x5 minus the 3x3 attention, and its Spearman '
        f"correlation with the object's scale over {min(IMAGES, count):,} test images, each at a scale of its own. The "
        f'rise is that of the mean attention from scale {SCALES[0]:g} to {SCALES[-1]:g}: a correlation says nothing of '
        "size. The mean is of Fisher's transformation, as claim (e) has it, which gives intervals over seeds. In the "
        f'figures are {min(CURVE_IMAGES, count)} objects at each scale; a thin line is a seed, a band the 95 % '
        'interval of their mean, seeds taken as the sample.',
        *parts,
    ]


def _rho_table(rows: Sequence[Row]) -> str:
    lines = [['unit', *[f'seed {row["seed"]}' for row in rows], 'mean', 'rise'], ['---', *['---:'] * (len(rows) + 2)]]
    scales = rows[0]['attention']['scales']
    first, last = scales.index(SCALES[0]), scales.index(SCALES[-1])
    for unit in UNITS:
        units = [row['attention']['units'][unit] for row in rows]
        rho = [one['rho'] for one in units]
        rise = [one['curve'][last] - one['curve'][first] for one in units]
        mean = np.tanh(np.mean(np.arctanh(rho)))
        lines.append([unit, *[f'{value:+.2f}' for value in rho], f'{mean:+.2f}', f'{np.mean(rise):+.3f}'])
    return markdown_table(lines)


def _learning(main: Sequence[Row], folder: str) -> list[str]:
    rows = [row for row in main if row['network'] == SELECTED]
    if not rows:
        return ['Not run.']
    lines = [['unit', 'entropy, start', 'end', 'rho, start', 'end'], ['---', *['---:'] * 4]]
    for unit in UNITS:
        values = [
            np.mean([[r['learning'][unit][key][i] for i in (0, -1)] for r in rows], 0) for key in ('entropy', 'rho')
        ]
        lines.append([unit, *[f'{value:.3f}' for value in values[0]], *[f'{value:+.2f}' for value in values[1]]])
    top1 = {how: np.mean([row['attention']['top1'][how] for row in rows]) for how in ('own', 'mean', 'shuffled')}
    return [
        'Entropy of the softmax over the branches, in nats (0 where one takes all, 0.693 where both are alike), and '
        f'correlation with scale, over {CURVE_IMAGES} test images and with the last weights, not their average; means '
        f'over {len(rows)} seeds:',
        markdown_table(lines),
        f'![Entropy and correlation along the training]({folder}/learning.png)',
        'Is it the choice for every image that helps, or the second branch? In the trained networks every unit takes '
        'the mean of its attention over the test images, or the attention of another image, in all units at once. '
        'Top-1 at random scales is '
        f"{top1['own']:.2f} % with each image's own attention, {top1['mean']:.2f} with the mean and "
        f"{top1['shuffled']:.2f} with another image's; claim (i) has the intervals. These networks learnt with their "
        "own: one that learns with a fixed attention is claim (a)'s sum.",
    ]


def _networks(main: Sequence[Row]) -> str:
    if not main:
        return 'Not run.'
    scales = list(main[0]['scales'])
    lines = [
        ['network', 'parameters', 'million multiply-adds', 'seeds', 'top-1', *[f'at {scale}' for scale in scales]],
        ['---', *['---:'] * (4 + len(scales))],
    ]
    for name in NETWORKS:
        own = [row for row in main if row['network'] == name]
        if own:
            at = [f'{np.mean([row["scales"][scale] for row in own]):.1f}' for scale in scales]
            cells = [f'{own[0]["parameters"]:,}', f'{own[0]["mflops"]:.2f}', str(len(own))]
            lines.append([f'`{name}`', *cells, mean_and_sd([row['top1'] for row in own]), *at])
    return 'Mean and standard deviation over the seeds.\n\n' + markdown_table(lines)


def _limits(answers: Sequence[Answer], rows: Sequence[Row]) -> str:
    counts = [len(answer.differences) for answer in answers]
    lines = [
        "- Networks of some 70,000 parameters on grey images of 64 x 64. The paper's have 27 million, and ImageNet.",
        f'- The claims have {min(counts)} to {max(counts)} seeds; {WANTED_SEEDS} are the aim.',
    ]
    if {'scaled', 'garments'} <= {row['data'] for row in rows}:
        lines.append(
            '- On `scaled` networks see few objects often, on `garments` many objects too seldom to get where they go: '
            'an answer that both give does not hang on which of the two it is. Both have the same test objects, '
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
        '- Seeds that are added after a look at this page make its level too favourable. Their number was chosen '
        f'before the first run: {WANTED_SEEDS}.'
    )
    lines.append('- Where a claim is not decided, its interval says how large an effect may still be, either way.')
    return '\n'.join(lines)


def _cost(rows: Sequence[Row], variance: Sequence[Row], out: str) -> list[str]:
    parts = []
    if out != OUT:
        parts.append(
            f'These rows are a trial, in `{out}`. The full study is two commands, which write `{OUT}` and this page:'
            '\n\n```bash\npython tools/run_ablation.py --variance 5 5\npython tools/run_ablation.py\n```'
        )
    for name, those, option in (('The runs', rows, '--seeds'), ('The study of the variance', variance, '--variance')):
        if not those:
            continue
        machines = sorted({f'{row["hardware"]} ({row["device"]}, threads: {row["threads"]})' for row in those})
        seconds = sum(row['seconds'] for row in those)
        elsewhere = f' --out {out}' if out != OUT else ''
        commands = [
            f'python tools/run_ablation.py {_options(own, option)}{elsewhere}'
            for own in ([row for row in those if (row['data'], row['size']) == place] for place in _places(those))
        ]
        parts += [
            f'{name}: {len(those)} rows, {seconds / 3600:.1f} hours of one process in all, on {"; ".join(machines)}, '
            f'torch {", ".join(sorted({row["torch"] for row in those}))}.',
            '\n'.join(['```bash', 'python tools/prepare_fashion_mnist.py', *commands, '```']),
        ]
    allowed = {place: bound([row for row in rows if (row['data'], row['size']) == place]) for place in _places(rows)}
    told = [f'{far:.2f} points away on {data}, {size}' for (data, size), far in allowed.items() if far is not None]
    parts.append(
        'After a kill, the same command goes on with what is missing. `--verify NAME SEED` trains a run '
        f'again, on `{MAIN[0]}`, {MAIN[1]}, unless --sets and --sizes name others. On the same '
        'hardware, with as many threads and the same torch, it must give the row to the last digit. On another '
        "machine the first batch's loss must be the row's to 0.1 %, and top-1 may be "
        + (' and '.join(told) or 'within the spread of the seeds')
        + ': training makes a difference in the last digit as large as another draw, and two draws of these networks '
        "differ by less in 99.7 % of cases, by Student's t and the deviation from seed to seed. Where every network "
        'has but one seed, the first loss alone is compared.'
    )
    return parts


def _options(rows: Sequence[Row], option: str) -> str:
    """Of the command that makes rows of one data set and size."""
    data, settings = rows[0]['data'], rows[0]['settings']
    defaults = json.loads(json.dumps(asdict(Settings().on(data))))
    words = {name: settings[name] for name in OPTIONS if settings[name] != defaults[name]}
    words['threads'] = rows[0]['threads']
    words['together'] = max(len(row['together']) for row in rows)
    given = ' '.join(f'--{name.replace("_", "-")} {value}' for name, value in words.items())
    given += ' --amp' * settings['amp'] + ' --compile' * rows[0]['compiled']
    seeds = sorted({row['seed'] for row in rows})
    if option == '--variance':
        return f'--variance {len(seeds)} {len({row["order"] for row in rows})} --sets {data} {given}'
    networks = [name for name in NETWORKS if any(row['network'] == name for row in rows)]
    chosen = '' if len(networks) == len(NETWORKS) else f'--networks {" ".join(networks)} '
    return f'--sets {data} --sizes {rows[0]["size"]} {chosen}--seeds {" ".join(map(str, seeds))} {given}'
