"""The page's part on power: where the variance comes from, and how many seeds half a point takes."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from _tables import markdown_table

from .claims import CLAIMS, MARGIN
from .data import DATA
from .deciding import (
    ALPHA,
    POWER,
    WANTED_SEEDS,
    components,
    crossed,
    decide,
    interval_of_deviation,
    power_of,
    seeds_needed,
)
from .networks import SELECTED, SUMMED
from .rows import LENGTHS, MAIN, PLACES, Row, Settings, rows_of


class Need(NamedTuple):
    """What a difference of MARGIN takes: for one claim, and for the first of all that are tested there.

    Attributes:
        name: of the difference.
        seeds: how many there are, in words.
        deviation: of the differences from seed to seed, with its interval where it is known.
        needed: seeds.
        powers: of the seeds that there are; of WANTED_SEEDS in the study of the variance.
        few: whether there are fewer seeds than needed.
        most: seeds needed as the first of all at the upper end of the deviation's interval.
        new_scale: whether it is of images at a scale never trained on.
    """

    name: str
    seeds: str
    deviation: str
    needed: tuple[int, int]
    powers: tuple[float, float]
    few: tuple[bool, bool] = (False, False)
    most: int = 0
    new_scale: bool = False


def needs(rows: Sequence[Row], places: Sequence[tuple[str, str]] = PLACES) -> list[Need]:
    """Of all claims about top-1 of two networks that have two seeds."""
    found = []
    for place in places:
        tested = [answer for answer in decide(CLAIMS, rows_of(rows, *place)) if answer.low is not None]
        for answer in tested:
            claim, seeds = answer.claim, len(answer.differences)
            if claim.other is None:
                continue
            scale = claim.figure.partition('scales.')[2]
            name = f'{claim.pair} ({claim.key}){f" at {scale}" if scale else ""}, {", ".join(place)}'
            equivalence = claim.margin is not None
            if equivalence:
                name += ', equivalence'
            low, high = interval_of_deviation(answer.deviation, seeds - 1)
            tests = answer.looks, answer.looks * len(tested)
            needed, powers = _needed(answer.deviation, tests, equivalence, seeds)
            found.append(
                Need(
                    name,
                    str(seeds),
                    f'{answer.deviation:.2f} ({low:.2f} to {high:.2f})',
                    needed,
                    powers,
                    tuple(seeds < number for number in needed),
                    seeds_needed(high, tests=tests[1], equivalence=equivalence),
                    bool(scale),
                )
            )
    return found


def _needed(
    deviation: float, tests: tuple[int, int], equivalence: bool = False, seeds: int = WANTED_SEEDS
) -> tuple[tuple, tuple]:
    needed = tuple(seeds_needed(deviation, tests=number, equivalence=equivalence) for number in tests)
    return needed, tuple(power_of(seeds, deviation, tests=number, equivalence=equivalence) for number in tests)


def power_in_short(rows: Sequence[Row]) -> str | None:
    """Whether there are as many seeds as half a point takes, on the main data set."""
    found = needs(rows, [MAIN])
    if not found:
        return None
    inside = [need for need in found if not need.new_scale]
    outside = [need for need in found if need.new_scale]
    few = [sum(need.few[i] for need in inside) for i in (0, 1)]
    most = max((need.needed[1] for need in inside), default=0)
    beyond = [need for need in inside if need.most > int(need.seeds)]
    text = (
        f"- The aim is a power of {100 * POWER:.0f} % to show {MARGIN:g} points. As the first of all in Holm's "
        f'procedure that takes up to {most} seeds, by the deviations as they are estimated. Comparisons of top-1 with '
        f'fewer: {few[1]} of {len(inside)}, so that it is {"missed there" if few[1] else "met"} ({few[0]}, were each '
        f"the only one). At the upper ends of the deviations' intervals {len(beyond)} would have fewer"
        + (f', which would take up to {max(need.most for need in beyond)}' if beyond else '')
        + '.'
    )
    if outside:
        least, most = (choose(need.needed[0] for need in outside) for choose in (min, max))
        text += f' At scales never trained on half a point takes {least} to {most}: this design cannot decide it there.'
    return text


def power(rows: Sequence[Row], variance: Sequence[Row]) -> list[str]:
    """The section."""
    studies = [_Variance(data, _on(variance, data)) for data in DATA if _is_crossed(_on(variance, data))]
    parts = _variance(studies) or ['The study of the variance (`--variance`) has not been run.']
    known = [
        Need(
            f'claim (a), M = 2, on `{study.data}`, in the study of the variance ({study.settings.epochs} epochs)',
            ' x '.join(map(str, study.shape)),
            f'{study.deviation:.2f}',
            *_needed(study.deviation, (1, len(CLAIMS))),
        )
        for study in studies
    ]
    parts += _pairing(rows)
    known += needs(rows)
    if not known:
        return parts
    head = ['differences of', 'seeds', 'deviation']
    head += [f'{what}, {claims}' for what in ('seeds needed', 'power') for claims in ('alone', 'all')]
    lines = [head, ['---', *['---:'] * 6]]
    for need in known:
        lines.append([need.name, need.seeds, need.deviation, *map(str, need.needed), *map(_power, need.powers)])
    return [
        *parts,
        f'How many seeds show a difference of {MARGIN:g} points with a power of {100 * POWER:.0f} %, in a study that '
        f'is planned with so many, by the paired t-test at a level of {ALPHA:g}, for a claim alone and for the first '
        "of all that are tested on the same data, by Holm's procedure (at half the level where there were two looks), "
        f'and the power of the seeds that there are ({WANTED_SEEDS} in the study of the variance, as many as were to '
        'be). For a claim of equivalence it is the power of TOST where the true difference is 0, and for the others '
        'the last column is also the chance that a difference that is truly 0 is called "not better by '
        f'{MARGIN:g} points". The deviations, with intervals of 95 %, are those of the differences that are tested, so '
        'that the table says what the study could see, not what it was planned with.',
        markdown_table(lines),
    ]


def _power(value: float) -> str:
    """With a digit more where it would seem to be POWER and is less."""
    return f'{value:.3f}' if POWER - 0.005 <= value < POWER else f'{value:.2f}'


def _on(rows: Sequence[Row], data: str) -> list[Row]:
    return [row for row in rows if row['data'] == data]


def _pairing(rows: Sequence[Row]) -> list[str]:
    """What pairing by seed takes out, for claim (a) on the main data set."""
    values = [{row['seed']: row['top1'] for row in rows_of(rows, *MAIN) if row['network'] == name}
              for name in (SELECTED, SUMMED)]  # fmt: skip
    seeds = sorted(values[0].keys() & values[1].keys())
    one, other = ([of[seed] for seed in seeds] for of in values)
    if len(seeds) < 3 or min(np.ptp(one), np.ptp(other)) == 0:
        return []
    paired, alone = np.std(np.subtract(one, other), ddof=1), np.hypot(np.std(one, ddof=1), np.std(other, ddof=1))
    return [
        f'What pairs are worth: on `{MAIN[0]}`, {MAIN[1]}, the top-1 of the networks of claim (a), M = 2, has a '
        f'correlation of {np.corrcoef(one, other)[0, 1]:.2f} over {len(seeds)} seeds, and their difference a deviation '
        f'of {paired:.2f} points, where seeds of their own would give {alone:.2f}.'
    ]


def _is_crossed(rows: Sequence[Row]) -> bool:
    return all(crossed(rows, name) is not None for name in (SELECTED, SUMMED))


class _Variance:
    """The study of the variance on one data set.

    Attributes:
        settings: of its runs.
        shape: seeds of the weights and of the images.
        cases: by name, what :func:`~.deciding.components` takes.
        deviation: of claim (a)'s difference, from seed to seed.
        whole: whether its trainings are as long as the study's own.
    """

    def __init__(self, data: str, rows: Sequence[Row]) -> None:
        (one, one_right), (other, other_right) = (crossed(rows, name) for name in (SELECTED, SUMMED))
        self.data, self.rows, self.settings, self.shape = data, rows, Settings.of(rows[0]), one.shape
        self.cases = {
            f'`{SELECTED}`': (one, one_right),
            f'`{SUMMED}`': (other, other_right),
            'their difference': (one - other, one_right - other_right),
        }
        difference = components(*self.cases['their difference'])
        self.deviation = float(max(difference.weights + difference.order + difference.rest, 0.0) ** 0.5)
        seen = (self.settings.train_images, self.settings.epochs)
        self.whole = seen == LENGTHS[data]

    @property
    def freedom(self) -> tuple[int, int, int]:
        weights, orders = (count - 1 for count in self.shape)
        return weights, orders, weights * orders

    @property
    def told(self) -> str:
        weights, orders = self.shape
        return (
            f'{weights} seeds of the weights crossed with {orders} of the images on `{self.data}`, after '
            f'{self.settings.epochs} x {self.settings.train_images:,} images'
        )

    @property
    def noise(self) -> str:
        """What single steps and the average of the weights do to top-1."""
        found = {name: np.mean([np.std(row['steps'][name], ddof=1) for row in self.rows]) for name in ('middle', 'end')}
        averaged = np.mean([row['mixed'] - row['last'] for row in self.rows])
        return (
            f'On `{self.data}`, over five steps in the middle of the training, top-1 at random scales has a deviation '
            f'of {found["middle"]:.2f} points, and over the last five, where the learning rate goes to 0, of '
            f'{found["end"]:.2f}. With the average of the weights it is {averaged:+.2f} points better than with the '
            f'last. From seed to seed the difference of the two networks varies by {self.deviation:.2f} points after '
            + ('the whole training' if self.whole else f'these {self.settings.epochs} epochs')
            + ': the root of the sum of the three variances, those below 0 taken as they are.'
        )

    def table(self) -> list[list[str]]:
        lines = []
        for name, case in self.cases.items():
            found = components(*case)
            cells = {
                key: f'{value:.2f}' if getattr(found, key) > 0 else 'not seen'
                for key, value in found.deviations.items()
            }
            if found.rest > 0:
                cells['rest'] += ' ({:.2f} to {:.2f})'.format(*interval_of_deviation(found.rest**0.5, self.freedom[2]))
            lines.append([self.data, name, *cells.values()])
        return lines


def _variance(studies: Sequence[_Variance]) -> list[str]:
    if not studies:
        return []
    head = ['data', 'deviation, points', 'weights', 'images', 'rest', 'test images']
    lines = [head, ['---', '---', *['---:'] * 4]]
    freedom = dict.fromkeys('{}, {} and {}'.format(*study.freedom) for study in studies)
    return [
        'Where the variance comes from: seeds of the weights crossed with seeds of the images (which, in what order, '
        f'of what size and where), for both networks of claim (a). There are {"; ".join(s.told for s in studies)}; the '
        f'test is of {studies[0].settings.test_images:,} at five scales. The table has standard deviations from an '
        'analysis of variance with two random factors; "not seen" stands for an estimate of 0 or below. With '
        f'{" or ".join(freedom)} degrees of freedom it cannot tell weights and images apart where they are of the size '
        'of the rest, which is what both do together: the interval is of 95 %. Another sample of test images would '
        'move all runs by what the last column says.',
        markdown_table([*lines, *(line for study in studies for line in study.table())]),
        *(study.noise for study in studies),
    ]
