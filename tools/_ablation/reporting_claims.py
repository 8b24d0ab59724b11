"""The main claims' part of the page: their table, what the test bed can show, and what twice the training adds."""

from collections.abc import Sequence

import numpy as np
from _tables import markdown_table

from .claims import CLAIMS, MARGIN, Claim
from .deciding import ALPHA, Answer, interval_of_mean
from .networks import SELECTED
from .rows import MAIN, PLACES, Row, rows_of

WANTED_GAIN = 1.0  # points that twice the training may add
# What brings something on ImageNet, by the paper's figures: they say what a difference in these networks may come to.
CONTROLS = (
    Claim('', 'more channels', 'wider', 'k3', paper=0.10),
    Claim('', 'more units', 'deeper', 'k3', paper=0.19),
    Claim('', 'squeeze-and-excitation', 'se', 'k3', paper=1.11),
    Claim('', 'three selected kernels', 'k3_k5_k7_selected', 'k3', paper=1.47),
    Claim('', 'neighbouring pixels in place of every other one', 'k3', 'k5', paper=2.91),
)
# Million parameters: the paper's (Tables 1 and 3), and of the three kernels' as built here for ImageNet.
THERE = {'k3': 25.0, 'k5': 25.0, 'wider': 28.1, 'deeper': 27.3, 'se': 27.7, 'k3_k5_k7_selected': 29.2}


def claims_table(answers: Sequence[Answer]) -> str:
    """All claims, with what they may come to, and a line for each that TOST leaves open and that is apart from 0."""
    lines = [
        ['claim', 'networks', 'the paper', 'seeds', 'difference', 'bounds', 'corrected p', ''],
        ['---', '---', *['---:'] * 5, '---'],
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
                '' if answer.most is None else _range(answer, answer.least, answer.most),
                p_value(answer.p),
                answer.verdict,
            ]
        )
    notes = [
        f'({answer.claim.key}) {answer.claim.text}: {apart(answer)}; whether by more than {answer.claim.margin:g} is '
        'not decided.'
        for answer in answers
        if is_apart(answer)
    ]
    return '\n\n'.join([markdown_table(lines), *notes])


def is_apart(answer: Answer) -> bool:
    """Whether a claim of equivalence is not decided though the difference is not 0."""
    undecided = answer.claim.margin is not None and not answer.decided
    return undecided and answer.apart is not None and answer.apart < ALPHA


def apart(answer: Answer) -> str:
    """How far from 0 the difference is, and in which direction."""
    claim = answer.claim
    if claim.other is None:
        found = f'it is {answer.mean:+.3f}'
    else:
        found = f'`{claim.one if answer.mean > 0 else claim.other}` is better by {abs(answer.mean):.2f}'
    return f'{found}, p {p_equals(answer.apart)} (two-sided, not corrected)'


def difference(answer: Answer) -> str:
    """The mean with its interval, as far as there are any."""
    if not answer.differences:
        return ''
    mean = shown(answer.mean, _digits(answer))
    return mean if answer.low is None else f'{mean} ({_range(answer, answer.low, answer.high)})'


def _range(answer: Answer, low: float, high: float) -> str:
    margin = answer.claim.margin or (MARGIN if answer.claim.unit == 'points' else 0.0)
    return ' to '.join(shown(value, _digits(answer), (0.0, margin, -margin)) for value in (low, high))


def shown(value: float, digits: int, marks: Sequence[float] = (0.0,)) -> str:
    """With so many digits, or up to three more where it would seem to lie on one of the ``marks`` and does not."""
    for more in range(digits, digits + 3):
        if all(value == mark or abs(round(value, more) - mark) > 1e-9 for mark in marks):
            return f'{value:+.{more}f}'
    return f'{value:+.{digits + 3}f}'


def _digits(answer: Answer) -> int:
    return 2 if answer.claim.unit == 'points' else 3


def p_value(p: float | None) -> str:
    return '' if p is None else '< 0.001' if p < 0.001 else f'{p:.3f}'


def p_equals(p: float) -> str:
    """After the letter p."""
    text = p_value(p)
    return text if text.startswith('<') else f'= {text}'


def with_interval(values: Sequence[float], digits: int = 2) -> str:
    """The mean of a sample, and its 95 % interval where there are two."""
    low, high = interval_of_mean(values) if len(values) > 1 else (None, None)
    interval = '' if low is None else f' ({shown(low, digits)} to {shown(high, digits)})'
    return f'{shown(float(np.mean(values)), digits)}{interval}'


def controls(rows: Sequence[Row]) -> list[tuple[Claim, list[float]]]:
    """Those of CONTROLS that rows of one data set and size have two seeds of, with their differences."""
    found = [(claim, list(claim.differences(rows).values())) for claim in CONTROLS]
    return [(claim, values) for claim, values in found if len(values) > 1]


def sensitivity(rows: Sequence[Row]) -> list[str]:
    """What a difference may come to on the main data set."""
    known = controls(rows)
    if not known:
        return []
    parameters = {row['network']: row['parameters'] for row in rows}
    lines = [
        ['what', 'networks', 'parameters', "the paper's", 'points there', 'seeds', 'points here'],
        ['---', '---', *['---:'] * 5],
    ]
    for claim, values in known:
        ratio = parameters[claim.one] / parameters[claim.other]
        there = THERE[claim.one] / THERE[claim.other]
        cells = [f'x {ratio:.2f}', f'x {there:.2f}', f'{claim.paper:+.2f}', str(len(values)), with_interval(values)]
        lines.append([claim.text, claim.pair, *cells])
    return [
        '### What the test bed can show',
        'Differences that are none of the claims, with intervals of 95 %, one by one and without correction, beside '
        "what the paper's figures make of them. What brings something there and little here says how much of a claim's "
        'failure may be these data. Most claims share the runs of '
        f'`{SELECTED}`, so that their answers err together: they are not as many independent findings.',
        markdown_table(lines),
    ]


def longer_pairs(rows: Sequence[Row], data: str, size: str) -> dict[str, list[tuple[Row, Row]]]:
    """By network, the rows of every seed that was trained for as long as usual and for twice as long."""
    usual = {(row['network'], row['seed']): row for row in rows_of(rows, data, size)}
    pairs: dict[str, list[tuple[Row, Row]]] = {}
    for row in rows_of(rows, data, size, longer=True):
        if (row['network'], row['seed']) in usual:
            pairs.setdefault(row['network'], []).append((usual[row['network'], row['seed']], row))
    return pairs


def convergence(rows: Sequence[Row], places: Sequence[tuple[str, str]]) -> list[str]:
    """What twice the training adds."""
    lines = []
    for data, size in places:
        for name, found in longer_pairs(rows, data, size).items():
            gains = [longer['top1'] - once['top1'] for once, longer in found]
            losses = [f'{np.mean([pair[i]["loss"] for pair in found]):.3f}' for i in (0, 1)]
            each = ', '.join(f'{gain:+.2f}' for gain in gains)
            lines.append([data, size, f'`{name}`', str(len(gains)), with_interval(gains), each, *losses])
    parts = []
    if lines:
        head = ['data', 'size', 'network', 'seeds', 'points', 'by seed', 'test loss', 'after twice as much']
        rule = ['---', '---', '---', '---:', '---:', '---', '---:', '---:']
        parts += [
            'What twice the training adds to top-1, of the same seeds, with intervals of 95 %, and the loss on the '
            'test set in nats: where it does not fall, more training brings no better probabilities.',
            markdown_table([head, rule, *lines]),
        ]
    where = f'`{MAIN[0]}`, {MAIN[1]}'
    aim = convergence_in_short(rows)
    if aim is None:
        parts.append(
            f'Not run on {where}: whether twice the training adds at most {WANTED_GAIN:g} point there is not known.'
        )
        return parts
    parts.append(aim)
    selection = selection_after_longer(rows)
    if selection:
        parts.append(selection)
    return parts


def selection_after_longer(rows: Sequence[Row]) -> str | None:
    """What becomes of claim (a) with twice the training, on the main data set; None with fewer than two seeds."""
    usual, longer = (CLAIMS[0].differences(rows_of(rows, *MAIN, longer=longer)) for longer in (False, True))
    seeds = sorted(usual.keys() & longer.keys())
    if len(seeds) < 2:
        return None
    before, after = (with_interval([differences[seed] for seed in seeds]) for differences in (usual, longer))
    return (
        f'Claim (a), M = 2, after twice the training: {after} points over {len(seeds)} seeds, and {before} of the same '
        'seeds after the usual one (95 %, not corrected).'
    )


def convergence_in_short(rows: Sequence[Row]) -> str | None:
    """Whether twice the training adds as little as it is to, on the main data set; None where it was not tried."""
    pairs = longer_pairs(rows, *MAIN)
    if not pairs:
        return None
    gains = {name: [longer['top1'] - once['top1'] for once, longer in found] for name, found in pairs.items()}
    where = f'`{MAIN[0]}`, {MAIN[1]}'
    networks = len({row['network'] for row in rows_of(rows, *MAIN)})
    text = (
        f'The aim is that twice the training adds at most {WANTED_GAIN:g} point on {where}: {met_by(gains)}. It was '
        f'tried for {len(gains)} of {networks} networks there.'
    )
    missed = []
    for place in PLACES:
        for name, found in longer_pairs(rows, *place).items():
            gain = np.mean([longer['top1'] - once['top1'] for once, longer in found])
            if place != MAIN and gain > WANTED_GAIN:
                seeds = f'{len(found)} seed{"s" * (len(found) > 1)}'
                missed.append(f'`{name}` on {", ".join(place)} ({gain:+.2f}, {seeds})')
    return text + (f' Elsewhere it is missed by {"; ".join(missed)}.' if missed else '')


def met_by(gains: dict[str, list[float]]) -> str:
    """Whether the aim is met, by the means and by their intervals, by network."""
    if max(np.mean(values) for values in gains.values()) > WANTED_GAIN:
        return 'it is missed'
    sure = [name for name, values in gains.items() if len(values) > 1 and interval_of_mean(values)[1] <= WANTED_GAIN]
    if len(sure) == len(gains):
        return 'it is met, by the means and by their intervals'
    unsure = [f'`{name}` {with_interval(values)}' for name, values in gains.items() if name not in sure]
    return f'it is met by the means, and not shown by the intervals of {", ".join(unsure)}'
