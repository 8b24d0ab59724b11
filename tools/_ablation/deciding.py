"""Which claims hold: paired tests, intervals and power, with Holm's correction for their number."""

import bisect
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from scipy import integrate, stats

from sk_plugins._resources import how_to_install

from .claims import MARGIN, Claim
from .rows import SCALES, Row

ALPHA = 0.05  # for all claims of a data set and a size together
POWER = 0.8
WANTED_SEEDS = 10  # of every claim; where there are more, these were looked at before the others came
UNDER = f'not better by {MARGIN:g} points'


@dataclass(frozen=True)
class Answer:
    """What the rows say of a claim.

    Attributes:
        claim: it.
        differences: by seed.
        p: Holm's, from that of the two-sided paired t-test, or of both one-sided ones (TOST) where the claim has a
            margin, times the number of looks; None for fewer than two seeds that differ.
        low, high: the interval at the level at which Holm's procedure tested this claim: where p is below ALPHA and
            only there, it lies beyond 0, or within the margin.
        least, most: what the difference may come to: an interval at Bonferroni's level, ALPHA by the number of claims
            that are tested and by that of looks, by a two-sided test, or for a claim of equivalence by two one-sided
            ones.
        apart: p of the two-sided paired t-test of 0, not corrected, of a claim of equivalence too.
    """

    claim: Claim
    differences: dict[int, float]
    p: float | None = None
    low: float | None = None
    high: float | None = None
    least: float | None = None
    most: float | None = None
    apart: float | None = None

    @property
    def values(self) -> list[float]:
        return list(self.differences.values())

    @property
    def mean(self) -> float:
        return float(from_tested(self.claim, np.mean(to_tested(self.claim, self.values))))

    @property
    def deviation(self) -> float:
        """Of the differences, from seed to seed."""
        return float(np.std(self.values, ddof=1))

    @property
    def looks(self) -> int:
        """How often it was tested: with WANTED_SEEDS, and again with those that were added."""
        return 2 if len(self.differences) > WANTED_SEEDS else 1

    @property
    def verdict(self) -> str:
        """'holds', 'contradicted', 'not decided' or 'not run', or UNDER: one is not better by so much as MARGIN."""
        margin = self.claim.margin
        if not self.differences:
            return 'not run'
        if self.p is None:
            return 'not decided'
        if self.p < ALPHA:
            return 'holds' if margin is not None or self.mean > 0 else 'contradicted'
        if margin is not None and (self.least > margin or self.most < -margin):
            return 'contradicted'
        if margin is None and self.claim.unit == 'points' and self.most < MARGIN:
            return UNDER
        return 'not decided'

    @property
    def decided(self) -> bool:
        return self.verdict in ('holds', 'contradicted', UNDER)


def decide(
    claims: Sequence[Claim], rows: Sequence[Row], corrected: bool = True, for_looks: bool = True
) -> list[Answer]:
    """An answer to every claim from rows of one data set and one size.

    Args:
        claims: all that share ALPHA.
        rows: whose seeds are paired.
        corrected: for the number of claims, by Holm's procedure.
        for_looks: and for that of looks: p is that many times as large, and the levels of the intervals so much lower.
    """
    found = [Answer(claim, claim.differences(rows)) for claim in claims]
    # Where all seeds give the same, there is nothing to estimate a spread from.
    tested = [answer for answer in found if len(set(answer.values)) > 1]
    if not tested:
        return found
    looks = [answer.looks if corrected and for_looks else 1 for answer in tested]
    raw = [min(_p(answer) * often, 1.0) for answer, often in zip(tested, looks)]
    adjusted, levels, least = raw, [ALPHA] * len(raw), ALPHA
    if corrected:
        least = ALPHA / len(raw)
        adjusted = holm(raw)
        levels = holm_levels(raw)
    done = {
        answer.claim: Answer(
            answer.claim,
            answer.differences,
            float(p),
            *_interval(answer, level / often),
            *_interval(answer, least / often),
            float(stats.ttest_1samp(to_tested(answer.claim, answer.values), 0).pvalue),
        )
        for answer, p, level, often in zip(tested, adjusted, levels, looks)
    }
    return [done.get(answer.claim, answer) for answer in found]


def _p(answer: Answer) -> float:
    values = to_tested(answer.claim, answer.values)
    if answer.claim.margin is None:
        return float(stats.ttest_1samp(values, 0).pvalue)
    margin = float(to_tested(answer.claim, answer.claim.margin))
    test = _statsmodels('stats.weightstats').DescrStatsW(values)
    return float(test.ttost_mean(-margin, margin)[0])


def holm(p: Sequence[float]) -> list[float]:
    """Holm's corrected p values."""
    return _statsmodels('stats.multitest').multipletests(p, ALPHA, method='holm')[1].tolist()


def holm_levels(p: Sequence[float]) -> list[float]:
    """The level at which Holm's procedure tests each: ALPHA / m for the least p, and so on until one is not rejected.

    All after that one have its level.
    """
    levels, level, rejected = [0.0] * len(p), 0.0, True
    for rank, i in enumerate(np.argsort(p, kind='stable')):
        if rejected:
            level = ALPHA / (len(p) - rank)
            rejected = p[i] < level
        levels[i] = level
    return levels


def _interval(answer: Answer, level: float) -> tuple[float, float]:
    # Two one-sided tests at a level are an interval that leaves it out on either side.
    two_sided = level if answer.claim.margin is None else 2 * level
    values = to_tested(answer.claim, answer.values)
    half = stats.t.ppf(1 - two_sided / 2, len(values) - 1) * stats.sem(values)
    low, high = (float(from_tested(answer.claim, values.mean() + sign * half)) for sign in (-1, 1))
    return low, high


def interval_of_mean(values: Sequence[float]) -> tuple[float, float]:
    """Of a sample of two or more: the 95 % interval by Student's t."""
    mean, half = np.mean(values), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(mean - half), float(mean + half)


def to_tested(claim: Claim, values: float | Sequence[float]) -> np.ndarray:
    """What is tested: of correlations Fisher's transformation, whose spread does not depend on their size."""
    return np.arctanh(np.clip(values, -0.999, 0.999)) if claim.unit == 'rho' else np.asarray(values, float)


def from_tested(claim: Claim, value: float) -> float:
    return np.tanh(value) if claim.unit == 'rho' else value


def power_of(
    seeds: int, deviation: float, difference: float = MARGIN, tests: int = 1, equivalence: bool = False
) -> float:
    """The power of so many seeds to show a difference: see :func:`seeds_needed`.

    It is also the chance of the bound UNDER where the true difference is 0.
    """
    if deviation == 0:
        return 1.0
    # A test rejects where the mean is more than t s / sqrt(n) away: from 0, or from the margin on either side. Given s,
    # whose square is chi-squared and which does not depend on the mean, that has a normal's chance. Of the two-sided
    # test the far side, which is nothing here, is left out. statsmodels' power of it is nan for large differences.
    freedom, effect = seeds - 1, difference / deviation * seeds**0.5
    t = stats.t.isf(ALPHA / tests / (1 if equivalence else 2), freedom)

    def given(quantile: np.ndarray) -> np.ndarray:
        chance = stats.norm.cdf(effect - t * (stats.chi2.ppf(quantile, freedom) / freedom) ** 0.5)
        return np.maximum(2 * chance - 1, 0) if equivalence else chance

    middle = stats.chi2.cdf(freedom * (effect / t) ** 2, freedom)  # where it falls, and TOST's ends
    return min(float(sum(integrate.fixed_quad(given, *ends, n=100)[0] for ends in ((0, middle), (middle, 1)))), 1.0)


def seeds_needed(deviation: float, difference: float = MARGIN, tests: int = 1, equivalence: bool = False) -> int:
    """Seeds that show a difference with a power of POWER, where differences have this deviation from seed to seed.

    At the level that Holm's procedure has for the first of so many ``tests``.

    Args:
        deviation: of the differences.
        difference: the true one; where ``equivalence`` is tested the margin, and the true difference is 0.
        tests: how many claims share ALPHA.
        equivalence: by two one-sided tests.
    """

    def enough(seeds: int) -> bool:
        return power_of(seeds, deviation, difference, tests, equivalence) >= POWER

    least, most = 2, 2
    while not enough(most):
        least, most = most, 2 * most
    return bisect.bisect_left(range(least, most), True, key=enough) + least


def interval_of_deviation(deviation: float, freedom: int) -> tuple[float, float]:
    """The 95 % interval of an estimated deviation, by the chi-squared distribution."""
    return tuple(deviation * (freedom / stats.chi2.isf(p, freedom)) ** 0.5 for p in (0.025, 0.975))


@dataclass(frozen=True)
class Components:
    """Variances, in squared points: of the seed of the weights, of that of the images' order, and of the rest.

    ``images`` is what the choice of the test images adds, and is in none of the others: all runs have the same.
    """

    weights: float
    order: float
    rest: float
    images: float

    @property
    def deviations(self) -> dict[str, float]:
        return {name: max(value, 0.0) ** 0.5 for name, value in vars(self).items()}


def components(table: np.ndarray, right: np.ndarray) -> Components:
    """Of the top-1 of crossed runs, (weights, orders), and of what each told, (weights, orders, images) in per cent.

    The analysis of variance of two random factors without repetition; an estimate may be below zero.
    """
    rows, columns = table.shape
    mean, by_row, by_column = table.mean(), table.mean(1), table.mean(0)
    rest = ((table - by_row[:, None] - by_column + mean) ** 2).sum() / ((rows - 1) * (columns - 1))
    weights = by_row.var(ddof=1) - rest / columns
    order = by_column.var(ddof=1) - rest / rows
    images = right.mean((0, 1)).var(ddof=1) / right.shape[-1]
    return Components(float(weights), float(order), float(rest), float(images))


def crossed(rows: Sequence[Row], network: str) -> tuple[np.ndarray, np.ndarray] | None:
    """``table`` and ``right`` of :func:`components` from the rows of a network, of the seeds that have every order.

    None where there are fewer than two.
    """
    found = {(row['seed'], row['order']): row for row in rows if row['network'] == network}
    orders = sorted({order for _, order in found})
    grid = [[found.get((seed, order)) for order in orders] for seed in sorted({seed for seed, _ in found})]
    grid = [line for line in grid if None not in line]
    if min(len(grid), len(orders)) < 2:
        return None
    right = np.array([[[int(digit) for digit in row['right']] for row in line] for line in grid])
    return np.array([[row['top1'] for row in line] for line in grid]), 100 * right / len(SCALES)


def bound(rows: Sequence[Row]) -> float | None:
    """How far top-1 may be from a row's on another machine, in points; None where no network has two seeds.

    Training makes a difference in the last digit as large as another draw, and two draws differ by less in 99.7 % of
    cases: by Student's t, since the deviation over seeds, pooled over networks, is an estimate.
    """
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        groups.setdefault((row['network'], row['data'], row['size'], row['longer']), []).append(row['top1'])
    several = [values for values in groups.values() if len(values) > 1]
    if not several:
        return None
    squares = sum((len(values) - 1) * np.var(values, ddof=1) for values in several)
    freedom = sum(len(values) - 1 for values in several)
    return float(stats.t.ppf(1 - 0.003 / 2, freedom) * (2 * squares / freedom) ** 0.5)


def _statsmodels(name: str) -> ModuleType:
    try:
        return importlib.import_module(f'statsmodels.{name}')
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'the tests of the claims take statsmodels: {how_to_install("study")}', name='statsmodels'
        ) from error
