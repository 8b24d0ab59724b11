"""The claims, each a difference between figures of two networks or of one, and the size that decides it."""

from collections.abc import Sequence
from dataclasses import dataclass

from .networks import SELECTED, SUMMED
from .rows import NEW_SCALES, Row, find

UNITS = ('SK_2_1', 'SK_2_2', 'SK_3_1', 'SK_3_2', 'SK_4_1', 'SK_4_2')


@dataclass(frozen=True)
class Claim:
    """``figure`` of ``one``, less ``figure`` of ``other`` or its own ``minus``, is above 0, or within ``margin`` of it.

    Attributes:
        key: its letter.
        text: in words.
        group: what it says together with others, where that is more than ``text``.
        one, other: networks, paired by seed; ``other`` is None where the claim is about one network.
        margin: the claim is of equivalence, and holds where the difference lies within plus or minus this.
        figure, minus: what is compared, as :func:`~.rows.find` takes it.
        unit: of the figure.
        paper: the paper's difference on ImageNet (Tables 1, 3, 6 and 7), where it gives one.
    """

    key: str
    text: str
    one: str
    other: str | None = None
    margin: float | None = None
    figure: str = 'top1'
    minus: str | None = None
    unit: str = 'points'
    paper: float | None = None
    group: str = ''

    @property
    def pair(self) -> str:
        if self.other is not None:
            return f'`{self.one}` - `{self.other}`'
        return f'`{self.one}`'

    def differences(self, rows: Sequence[Row]) -> dict[int, float]:
        """By seed, where the rows, which are of one data set and size, have what it takes."""
        values = _by_seed(rows, self.one, self.figure)
        if self.other is None and self.minus is None:
            return values
        others = _by_seed(rows, self.other or self.one, self.minus or self.figure)
        return {seed: values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())}


def _by_seed(rows: Sequence[Row], network: str, figure: str) -> dict[int, float]:
    found = {row['seed']: find(row, figure) for row in rows if row['network'] == network}
    return {seed: value for seed, value in sorted(found.items()) if value is not None}


MARGIN = 0.5  # points: what a claim that says "little" may come to
_THREE, _THREE_SUMMED = 'k3_k5_k7_selected', 'k3_k5_k7_summed'
_SUM = 'selection beats the sum'
OVER_K3 = 'two kernels, selected or summed, beat K3'
_OVER_LARGE = 'two kernels beat K5 or K7 alone'
_CHANNELS = "a softmax per channel beats a shared one (not the paper's)"
_COST = 'SK beats widening, deepening and SE at equal cost'
RISING = 'the attention for the 5x5 rises with scale, in units before the last'
_SECOND = 'a dilated 3x3 is a better second kernel than a plain one or a true 7x7'
_NEW = "at scales never trained on, selection beats the sum and K3 (not the paper's)"
_OTHER_PAIRS = 'selection beats the sum in the pairs with K7'
_OWN = "networks depend on attention of its own for every image (not the paper's)"
CLAIMS = (
    Claim('a', 'selection beats the sum, M = 2', SELECTED, SUMMED, paper=0.97, group=_SUM),
    Claim('a', 'selection beats the sum, M = 3', _THREE, _THREE_SUMMED, paper=0.33, group=_SUM),
    Claim('b', 'two kernels, selected, beat K3', SELECTED, 'k3', paper=1.44, group=OVER_K3),
    Claim('b', 'two kernels, selected, beat K5', SELECTED, 'k5', paper=4.35, group=_OVER_LARGE),
    Claim('b', 'two kernels, selected, beat K7', SELECTED, 'k7', paper=4.72, group=_OVER_LARGE),
    Claim('b', 'two kernels, summed, beat K3', SUMMED, 'k3', paper=0.47, group=OVER_K3),
    Claim('b', 'a third kernel adds little', _THREE, SELECTED, MARGIN, paper=0.03),
    Claim('c', 'SK beats widening at equal cost', SELECTED, 'wider', paper=1.34, group=_COST),
    Claim('c', 'SK beats deepening at equal cost', SELECTED, 'deeper', paper=1.25, group=_COST),
    Claim('c', 'SK beats SE at equal cost', SELECTED, 'se', paper=0.33, group=_COST),
    Claim('d', 'a softmax per channel beats a shared one', SELECTED, 'k3_k5_shared', group=_CHANNELS),
    *(
        Claim(
            'e',
            f'the attention for the 5x5 rises with scale in {unit}',
            SELECTED,
            figure=f'attention.units.{unit}.rho',
            unit='rho',
            group=RISING,
        )
        for unit in UNITS[:-1]
    ),
    Claim(
        'e',
        f'the attention for the 5x5 does not go with scale in {UNITS[-1]}, the last unit',
        SELECTED,
        margin=0.1,
        figure=f'attention.units.{UNITS[-1]}.rho',
        unit='rho',
    ),
    Claim('f', 'a true 5x5 does what a dilated 3x3 does', 'k3_true5_selected', SELECTED, MARGIN, paper=-0.01),
    Claim('f', 'a dilated 3x3 beats a second plain one', SELECTED, 'k3_k3_selected', paper=0.12, group=_SECOND),
    Claim('f', 'a dilated 3x3 beats a true 7x7', SELECTED, 'k3_true7_selected', paper=0.39, group=_SECOND),
    *(
        Claim(
            'g',
            f'{text}, at scale {scale:g}, never trained on',
            SELECTED,
            other,
            figure=f'scales.{scale:g}',
            group=_NEW,
        )
        for scale in NEW_SCALES
        for text, other in (('selection beats the sum', SUMMED), ('two kernels, selected, beat K3', 'k3'))
    ),
    Claim('h', 'K3 and K7: selection beats the sum', 'k3_k7_selected', 'k3_k7_summed', paper=0.85, group=_OTHER_PAIRS),
    Claim('h', 'K5 and K7: selection beats the sum', 'k5_k7_selected', 'k5_k7_summed', paper=0.55, group=_OTHER_PAIRS),
    Claim('h', 'K3 and K5 do as well as K3 and K7', SELECTED, 'k3_k7_selected', MARGIN, paper=0.18),
    Claim('h', 'K3 and K7 beat K5 and K7', 'k3_k7_selected', 'k5_k7_selected', paper=2.12),
    Claim(
        'i',
        'attention of its own for every image beats its mean',
        SELECTED,
        figure='attention.top1.own',
        minus='attention.top1.mean',
        group=_OWN,
    ),
    Claim(
        'i',
        "attention of its own for every image beats another image's",
        SELECTED,
        figure='attention.top1.own',
        minus='attention.top1.shuffled',
        group=_OWN,
    ),
)
GROUPS: dict[tuple[str, str], list[Claim]] = {}  # by letter, and what its claims say together
for _claim in CLAIMS:
    GROUPS.setdefault((_claim.key, _claim.group or _claim.text), []).append(_claim)
