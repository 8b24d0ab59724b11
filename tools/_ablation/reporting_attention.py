"""The page's part on attention: against scale, and along the training."""

from collections.abc import Sequence

import numpy as np
from _tables import markdown_table
from scipy import stats

from .attention import CURVE_IMAGES, IMAGES
from .claims import UNITS
from .networks import SELECTED
from .reporting_claims import p_equals, with_interval
from .rows import MAIN, PLACES, SCALES, Row, rows_of


def figure_name(kind: str, data: str, size: str) -> str:
    """Of 'attention' or 'learning' on a data set and in a size."""
    return f'{kind}.png' if (data, size) == MAIN else f'{kind}_{data}_{size}.png'


def attending(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Those of SELECTED, by data set and size."""
    found = {place: [row for row in rows_of(rows, *place) if row['network'] == SELECTED] for place in PLACES}
    return {place: there for place, there in found.items() if there}


def attention(rows: Sequence[Row], folder: str) -> list[str]:
    """The section on attention against scale; ``folder`` has the figures."""
    parts = []
    for (data, size), there in attending(rows).items():
        parts += [
            f'### In networks for {data}, {size}',
            _rho_table(there),
            *_contrast(there),
            f'![Attention for the 5x5 against scale, unit by unit, on {data}, {size}]'
            f'({folder}/{figure_name("attention", data, size)})',
        ]
    if not parts:
        return ['Not run.']
    count = min(row['settings']['test_images'] for row in rows)
    return [
        f'`{SELECTED}`, unit by unit: the mean over channels of the 5x5 minus the 3x3 attention, and its Spearman '
        f"correlation with the object's scale over {min(IMAGES, count):,} test images, each at a scale of its own. The "
        f'rise is that of the mean attention from scale {SCALES[0]:g} to {SCALES[-1]:g}: a correlation says nothing of '
        "size. The means are of Fisher's transformation, as claim (e) has it, which gives intervals over seeds. Where "
        'the mean of the sizes is large and the signs are mixed, a unit goes with scale in every seed, but each in its '
        f'own way. In the figures are {min(CURVE_IMAGES, count)} objects at each scale; a thin line is a seed, a band '
        'the 95 % interval of their mean, seeds taken as the sample.',
        *parts,
    ]


def _rho_table(rows: Sequence[Row]) -> str:
    head = ['unit', *[f'seed {row["seed"]}' for row in rows], 'mean', 'of the sizes', 'positive', 'rise']
    lines = [head, ['---', *['---:'] * (len(head) - 1)]]
    scales = rows[0]['attention']['scales']
    first, last = scales.index(SCALES[0]), scales.index(SCALES[-1])
    for unit in UNITS:
        units = [row['attention']['units'][unit] for row in rows]
        rho = [one['rho'] for one in units]
        rise = [one['curve'][last] - one['curve'][first] for one in units]
        mean = np.tanh(np.mean(np.arctanh(rho)))
        size = np.tanh(np.mean(np.arctanh(np.abs(rho))))
        cells = [f'{mean:+.2f}', f'{size:.2f}', f'{sum(value > 0 for value in rho)}', f'{np.mean(rise):+.3f}']
        lines.append([unit, *[f'{value:+.2f}' for value in rho], *cells])
    return markdown_table(lines)


def _contrast(rows: Sequence[Row]) -> list[str]:
    """What the paper says: the units of a middle stage turn to the larger kernel with scale, the last one does not."""
    if len(rows) < 2:
        return []
    z = np.arctanh([[row['attention']['units'][unit]['rho'] for unit in UNITS] for row in rows])
    values = z[:, 2:4].mean(1) - z[:, -1]
    p = p_equals(float(stats.ttest_1samp(values, 0).pvalue))
    return [
        f'The paper finds that units of the middle stages turn to the larger kernel and the last ones do not: '
        f"{UNITS[2]} and {UNITS[3]}, less {UNITS[-1]}, in Fisher's transformation, {with_interval(values)}, p "
        f'{p} (95 %, not among the claims and not corrected).'
    ]


def learning(rows: Sequence[Row], folder: str) -> list[str]:
    """The section on how the selection learns; ``folder`` has the figures."""
    parts = []
    for (data, size), there in attending(rows).items():
        parts += _learning(there, data, size, folder)
    if not parts:
        return ['Not run.']
    return [
        'Entropy of the softmax over the branches, in nats (0 where one takes all, 0.693 where both are alike), and '
        f'correlation with scale, over {CURVE_IMAGES} test images and with the last weights, not their average; means '
        'over the seeds. At the start the attention of all images is nearly the same, and a rank correlation is of '
        'differences near zero.',
        *parts,
        'Is it the choice for every image that helps, or the second branch? In the trained networks every unit takes '
        'the mean of its attention over the test images, or the attention of another image, in all units at once; '
        'claim (i) has the intervals. These networks learnt with their own attention, and it shows that they depend '
        "on it. One that learns without attention, its branches added with weights of 1, is claim (a)'s sum.",
    ]


def _learning(rows: Sequence[Row], data: str, size: str, folder: str) -> list[str]:
    lines = [['unit', 'entropy, start', 'end', 'rho, start', 'end'], ['---', *['---:'] * 4]]
    for unit in UNITS:
        entropy, rho = (
            np.mean([[row['learning'][unit][key][i] for i in (0, -1)] for row in rows], 0) for key in ('entropy', 'rho')
        )
        lines.append([unit, *[f'{value:.3f}' for value in entropy], *[f'{value:+.2f}' for value in rho]])
    top1 = {how: np.mean([row['attention']['top1'][how] for row in rows]) for how in ('own', 'mean', 'shuffled')}
    return [
        f'### In networks for {data}, {size}, while they learn',
        markdown_table(lines),
        f"Top-1 at random scales is {top1['own']:.2f} % with each image's own attention, {top1['mean']:.2f} with the "
        f"mean and {top1['shuffled']:.2f} with another image's ({len(rows)} seeds).",
        f'![Entropy and correlation along the training, on {data}, {size}]'
        f'({folder}/{figure_name("learning", data, size)})',
    ]
