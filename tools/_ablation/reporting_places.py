"""The claims in all data sets and sizes: in groups, place by place, and from narrow to wide."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from _tables import markdown_table
from scipy import stats

from .claims import CLAIMS, GROUPS, MARGIN, RISING, Claim
from .deciding import ALPHA, UNDER, Answer, decide, from_tested, holm, interval_of_mean, to_tested
from .drawing import FAR
from .networks import SIZES
from .reporting_claims import apart, claims_table, is_apart, p_value, with_interval
from .rows import MAIN, PLACES, Row, rows_of

Place = tuple[str, str]  # data set and size


def places(rows: Sequence[Row]) -> list[Place]:
    """Those of PLACES that have rows."""
    return [place for place in PLACES if place in {(row['data'], row['size']) for row in rows}]


def answers_by_place(rows: Sequence[Row]) -> dict[Place, list[Answer]]:
    """Of the claims that have rows there; Holm's procedure is that of the place."""
    found = {
        place: [answer for answer in decide(CLAIMS, rows_of(rows, *place)) if answer.differences]
        for place in places(rows)
    }
    return {place: answers for place, answers in found.items() if answers}


def named(answer: Answer) -> str:
    return f'({answer.claim.key}) {answer.claim.text}'


def in_places(found: dict[Place, list[Answer]]) -> dict[Claim, dict[str, Answer]]:
    """By claim, what there is to draw: the answers that have an interval which reaches no further than FAR.

    Those of claims that have one in two places.
    """
    beside: dict[Claim, dict[str, Answer]] = {}
    for (data, size), answers in found.items():
        for answer in answers:
            if answer.low is not None and max(abs(answer.low), abs(answer.high)) <= FAR:
                beside.setdefault(answer.claim, {})[f'{data}, {size}'] = answer
    return {claim: there for claim, there in beside.items() if len(there) > 1}


def in_groups(found: dict[Place, list[Answer]]) -> str:
    """A row for each of GROUPS: how many of its claims have which answer, place by place."""
    lines = [['claims', '', *[f'{data}, {size}' for data, size in found]], ['---', '---', *['---'] * len(found)]]
    for (key, text), claims in GROUPS.items():
        cells = []
        for answers in found.values():
            counts = Counter(answer.verdict for answer in answers if answer.claim in claims)
            of = f' of {len(claims)}' if len(claims) > 1 else ''
            told = [
                f'{counts[verdict]}{of} {verdict}' if of else verdict
                for verdict in ('holds', 'contradicted', UNDER, 'not decided')
                if counts[verdict]
            ]
            missing = len(claims) - counts.total()
            if told and missing:
                told.append(f'{missing} not run')
            cells.append(', '.join(told) or 'not run')
        lines.append([f'({key})', text, *cells])
    return markdown_table(lines)


def rising_in_short(found: dict[Place, list[Answer]]) -> str | None:
    """Where attention is shown to rise with scale, in units before the last."""
    units = {place: [a for a in answers if a.claim.group == RISING] for place, answers in found.items()}
    counts = {place: (sum(a.verdict == 'holds' for a in those), len(those)) for place, those in units.items() if those}
    some = [f'{n} of {total} on `{data}`, {size}' for (data, size), (n, total) in counts.items() if n]
    none = [f'`{data}`, {size}' for (data, size), (n, _) in counts.items() if not n]
    if not counts:
        return None
    told = [f'in {one}' for one in some] + [f'in none on {" and ".join(none)}'] * bool(none)
    text = ', and '.join(part for part in (', '.join(told[:-1]), told[-1]) if part)
    return f'- (e): of the units before the last, attention for the 5x5 is shown to rise with scale {text}.'


def in_short(place: Place, there: Sequence[Answer], main: Sequence[Answer]) -> str:
    """What another data set or size says otherwise than the main one."""
    data, size = place
    text = f'- On `{data}`, {size}, {len(there)} claims have rows.'
    pairs = [(a, b) for a in main for b in there if a.claim is b.claim]
    both = [(a, b) for a, b in pairs if a.decided and b.decided]
    if both:
        differ = [f'{named(b)} ({b.verdict})' for a, b in both if a.verdict != b.verdict]
        text += f' Of the {len(both)} that have an answer on `{MAIN[0]}`, {MAIN[1]}, too, {len(both) - len(differ)} '
        text += f'have the same; not so {"; ".join(differ)}.' if differ else 'have the same.'
    for where, found in (
        ('here and not there', [b for a, b in pairs if b.decided and not a.decided]),
        ('there and not here', [a for a, b in pairs if a.decided and not b.decided]),
    ):
        told = [f'{named(answer)}: {answer.verdict}' for answer in found if answer.claim.group != RISING]
        text += f' Answered {where}: {"; ".join(told)}.' if told else ''
    alone = [f'{named(answer)}: {apart(answer)}' for answer in there if is_apart(answer)]
    return text + (f' Not decided, and apart from 0: {"; ".join(alone)}.' if alone else '')


def elsewhere(found: dict[Place, list[Answer]], folder: str) -> list[str]:
    """The claims on other data and in the other size."""
    others = {place: answers for place, answers in found.items() if place != MAIN}
    parts = []
    if in_places(found):
        parts += [
            '### In all data sets',
            f'![The claims that have rows in several places, beside each other]({folder}/places.png)',
            '*A square is the mean, a line the interval, corrected for the claims of its data set and size; dashed '
            f'lines are at {MARGIN:g} points. Claims that have rows in one place are not here, and no interval that '
            f'reaches further than {FAR:g} points.*',
        ]
    for (data, size), answers in others.items():
        parts += [f'### On {data}, {size}', claims_table(answers)]
    missing = [f'{data}, {size}' for data, size in PLACES if (data, size) != MAIN and (data, size) not in others]
    if missing:
        parts.append(f'Not run: {"; ".join(missing)}.')
    return parts


@dataclass(frozen=True)
class Change:
    """How a claim's difference changes with the size of the networks.

    Attributes:
        claim: it.
        narrow, wide: the means.
        changes: by seed; of correlations in Fisher's transformation.
        p: Holm's, for all these claims, of the two-sided paired t-test.
    """

    claim: Claim
    narrow: float
    wide: float
    changes: list[float]
    p: float

    @property
    def alone(self) -> bool:
        """Whether its 95 % interval, without correction, leaves out 0."""
        low, high = interval_of_mean(self.changes)
        return low > 0 or high < 0


def changes(rows: Sequence[Row]) -> list[Change]:
    """Of the claims that have two seeds in both sizes, on the main data set."""
    sizes = [rows_of(rows, MAIN[0], size) for size in SIZES]
    found = []
    for claim in CLAIMS:
        of_size = [claim.differences(those) for those in sizes]
        seeds = sorted(of_size[0].keys() & of_size[1].keys())
        narrow, wide = (to_tested(claim, [values[seed] for seed in seeds]) for values in of_size)
        if len(seeds) > 1 and np.ptp(wide - narrow) > 0:
            means = (float(from_tested(claim, values.mean())) for values in (narrow, wide))
            p = float(stats.ttest_1samp(wide - narrow, 0).pvalue)
            found.append(Change(claim, *means, (wide - narrow).tolist(), p))
    corrected = holm([change.p for change in found]) if found else []
    return [replace(change, p=p) for change, p in zip(found, corrected)]


def trend(rows: Sequence[Row]) -> list[str]:
    """What becomes of the claims in larger networks."""
    known = changes(rows)
    if not known:
        return []
    sizes = list(SIZES)
    lines = [['claim', 'networks', 'seeds', *sizes, 'change', 'corrected p'], ['---', '---', *['---:'] * 5]]
    for change in known:
        claim, digits = change.claim, 2 if change.claim.unit == 'points' else 3
        means = [f'{mean:+.{digits}f}' for mean in (change.narrow, change.wide)]
        cells = [str(len(change.changes)), *means, with_interval(change.changes, digits), p_value(change.p)]
        lines.append([f'({claim.key}) {claim.text}', claim.pair, *cells])
    return [
        f'### From {sizes[0]} to {sizes[1]}',
        f'On `{MAIN[0]}`, where networks of a seed see the same images in both sizes: how the differences change, over '
        'the seeds that both sizes have, with intervals of 95 %, one by one and without correction, and p by '
        "Holm's procedure for these claims. Of correlations, changes are in Fisher's transformation.",
        markdown_table(lines),
    ]


def trend_in_short(rows: Sequence[Row]) -> str | None:
    """How claim (a)'s difference changes with the size of the networks, and which claims' do."""
    known = changes(rows)
    selection = [change for change in known if change.claim is CLAIMS[0]]
    if not selection:
        return None
    sure = [f'({change.claim.key}) {change.claim.text}' for change in known if change.p < ALPHA]
    alone = [change for change in known if change.alone]
    return (
        f'- From {" to ".join(SIZES)} on `{MAIN[0]}` the difference of claim (a), M = 2, changes by '
        f"{with_interval(selection[0].changes)} points. By Holm's procedure {len(sure)} of {len(known)} claims are "
        'shown to change'
        + (f' ({"; ".join(sure)})' if sure else '')
        + f'; by 95 % intervals without correction it would be {len(alone)}.'
    )
