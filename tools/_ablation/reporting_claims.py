"""The claims' part of the page: tables of answers, what the test bed can show, and what twice the training adds."""

from collections.abc import Sequence

import numpy as np
from _tables import markdown_table

from .claims import Claim
from .deciding import ALPHA, Answer, interval_of_mean
from .networks import SELECTED
from .rows import MAIN, Row, rows_of

WANTED_GAIN = 1.0  # points that twice the training may add
# What is known to matter elsewhere, capacity and the size of a dilated kernel: they say what a difference in these
# networks may come to.
CONTROLS = (
    Claim('', '`wider`, half as many parameters again', 'wider', 'k3'),
    Claim('', '`deeper`, half as many parameters again', 'deeper', 'k3'),
    Claim('', '`se`, half as many parameters again', 'se', 'k3'),
    Claim('', 'three selected kernels, nearly twice the parameters', 'k3_k5_k7_selected', 'k3'),
    Claim('', 'neighbouring pixels in place of every other one', 'k3', 'k5'),
)


def claims_table(answers: Sequence[Answer]) -> str:
    """All claims, with what they may come to, and a line for each that TOST leaves open and that is apart from 0."""
    lines = [
        ['claim', 'networks', 'the paper', 'seeds', 'difference', 'at most', 'corrected p', ''],
        ['---', '---', *['---:'] * 5, '---'],
    ]
    for answer in answers:
        claim = answer.claim
        margin = '' if claim.margin is None else f', within ± {claim.margin:g}'
        bounded = answer.most is not None and claim.margin is None and claim.unit == 'points'
        lines.append(
            [
                f'({claim.key}) {claim.text}{margin}',
                claim.pair,
                '' if claim.paper is None else f'{claim.paper:+.2f}',
                str(len(answer.differences)),
                difference(answer),
                f'{answer.most:+.2f}' if bounded else '',
                p_value(answer.p),
                answer.verdict,
            ]
        )
    notes = [
        f'({answer.claim.key}) {answer.claim.text}: whether within ± {answer.claim.margin:g} is not decided, but not '
        f'because there is nothing to see. That it is 0 has p {p_equals(answer.apart)} by the two-sided t-test, which '
        'is not corrected.'
        for answer in answers
        if is_apart(answer)
    ]
    return '\n\n'.join([markdown_table(lines), *notes])


def is_apart(answer: Answer) -> bool:
    """Whether a claim of equivalence is not decided though the difference is not 0."""
    undecided = answer.claim.margin is not None and not answer.decided
    return undecided and answer.apart is not None and answer.apart < ALPHA


def difference(answer: Answer) -> str:
    """The mean with its interval, as far as there are any."""
    if not answer.differences:
        return ''
    digits = 2 if answer.claim.unit == 'points' else 3
    interval = '' if answer.low is None else f' ({answer.low:+.{digits}f} to {answer.high:+.{digits}f})'
    return f'{answer.mean:+.{digits}f}{interval}'


def p_value(p: float | None) -> str:
    return '' if p is None else '< 0.001' if p < 0.001 else f'{p:.3f}'


def p_equals(p: float) -> str:
    """After the letter p."""
    text = p_value(p)
    return text if text.startswith('<') else f'= {text}'


def with_interval(values: Sequence[float], digits: int = 2) -> str:
    """The mean of a sample, and its 95 % interval where there are two."""
    low, high = interval_of_mean(values) if len(values) > 1 else (None, None)
    interval = '' if low is None else f' ({low:+.{digits}f} to {high:+.{digits}f})'
    return f'{np.mean(values):+.{digits}f}{interval}'


def controls(rows: Sequence[Row]) -> list[tuple[Claim, list[float]]]:
    """Those of CONTROLS that rows of one data set and size have two seeds of, with their differences."""
    found = [(claim, list(claim.differences(rows).values())) for claim in CONTROLS]
    return [(claim, values) for claim, values in found if len(values) > 1]


def sensitivity(rows: Sequence[Row]) -> list[str]:
    """What a difference may come to on the main data set."""
    known = controls(rows)
    if not known:
        return []
    lines = [['what', 'networks', 'seeds', 'difference'], ['---', '---', '---:', '---:']]
    lines += [[claim.text, claim.pair, str(len(values)), with_interval(values)] for claim, values in known]
    return [
        '### What the test bed can show',
        'Differences that are none of the claims, with intervals of 95 %, one by one and without correction. Where the '
        'first lines are near 0, capacity is worth little on these data, and selection may be worth little for no '
        'other reason. The last line says what a kernel that does not fit costs here. Most claims share the runs of '
        f'`{SELECTED}`, so that their answers err together: they are not as many independent findings.',
        markdown_table(lines),
    ]


def convergence(rows: Sequence[Row], places: Sequence[tuple[str, str]]) -> list[str]:
    """What twice the training adds."""
    lines, main = [], {}
    for data, size in places:
        usual = {(row['network'], row['seed']): row for row in rows_of(rows, data, size)}
        pairs: dict[str, list[tuple[Row, Row]]] = {}
        for row in rows_of(rows, data, size, longer=True):
            if (row['network'], row['seed']) in usual:
                pairs.setdefault(row['network'], []).append((usual[row['network'], row['seed']], row))
        for name, found in pairs.items():
            gains = [longer['top1'] - once['top1'] for once, longer in found]
            losses = [f'{np.mean([pair[i]["loss"] for pair in found]):.3f}' for i in (0, 1)]
            each = ', '.join(f'{gain:+.2f}' for gain in gains)
            lines.append([data, size, f'`{name}`', str(len(gains)), with_interval(gains), each, *losses])
            if (data, size) == MAIN:
                main[name] = gains
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
    if not main:
        parts.append(
            f'Not run on {where}: whether twice the training adds at most {WANTED_GAIN:g} point there is not known.'
        )
        return parts
    parts.append(f'The aim is at most {WANTED_GAIN:g} point on {where}: {met_by(main)}.')
    others = len({row['network'] for row in rows_of(rows, *MAIN)} - main.keys())
    if others:
        parts.append(f'The other {others} networks were not trained for longer.')
    return parts


def met_by(gains: dict[str, list[float]]) -> str:
    """Whether the aim is met, by the means and by their intervals, by network."""
    if max(np.mean(values) for values in gains.values()) > WANTED_GAIN:
        return 'it is missed'
    sure = [name for name, values in gains.items() if len(values) > 1 and interval_of_mean(values)[1] <= WANTED_GAIN]
    if len(sure) == len(gains):
        return 'it is met, by the means and by their intervals'
    return f'it is met by the means, and by the intervals of {len(sure)} of {len(gains)} networks'
