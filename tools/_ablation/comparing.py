"""Networks compared, paired by seed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from .networks import NETWORKS
from .rows import Row


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


def by_network(
    rows: Sequence[Row], key: str = 'top1', networks: Iterable[str] = NETWORKS
) -> dict[str, dict[int, float]]:
    """``key`` of each network by seed, in the order of ``networks``, where rows have it."""
    found = {
        name: {row['seed']: row[key] for row in rows if row['network'] == name and key in row} for name in networks
    }
    return {name: dict(sorted(values.items())) for name, values in found.items() if values}


def compare(rows: Sequence[Row], name: str, other: str) -> Comparison | None:
    """``name`` against ``other``; None where no seed has both."""
    top1 = by_network(rows, networks=(name, other))
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
