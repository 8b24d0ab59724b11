"""What tools/run_ablation.py decides and writes from rows whose statistics are known."""

import re

import numpy as np
import pytest

pytest.importorskip('mmpretrain')

from _ablation.claims import CLAIMS, GROUPS, Claim
from _ablation.deciding import (
    UNDER,
    Answer,
    bound,
    components,
    crossed,
    decide,
    holm_levels,
    interval_of_deviation,
    interval_of_mean,
    power_of,
    seeds_needed,
)
from _ablation.networks import NETWORKS, SELECTED, SUMMED
from _ablation.reporting import markdown, read_notes
from _ablation.reporting_claims import CONTROLS, THERE, claims_table, convergence, met_by, shown
from _ablation.reporting_places import answers_by_place, in_groups, in_places, rising_in_short, trend_in_short
from _ablation.reporting_power import needs, power_in_short
from _ablation.rows import MAIN, PLACES

SETTINGS = dict(
    train_images=9, epochs=1, test_images=9, batch_size=2, learning_rate=0.1, weight_decay=0, scale=[0.6, 2], ema=0.1,
    amp=False,
)  # fmt: skip
ABOUT = dict(data='scaled', size='narrow', order=None, longer=False, seconds=1800.0, device='cpu', hardware='a CPU',
             loss=0.5, threads=1, torch='2', parameters=1000, mflops=2.5, together=[0], compiled=False)  # fmt: skip
SCALES = ('0.5', '0.6', '0.8', '1.1', '1.5', '2', '2.5')


def row(network, seed, top1, **more):
    scales = {scale: top1 + i for i, scale in enumerate(SCALES)}
    return {**ABOUT, 'network': network, 'seed': seed, 'top1': top1, 'scales': scales, 'settings': SETTINGS, **more}


def rows_of(**figures):
    return [row(name, seed, top1) for name, values in figures.items() for seed, top1 in enumerate(values)]


A = Claim('a', 'one beats two', 'one', 'two')
LITTLE = Claim('b', 'one does what two does', 'one', 'two', margin=2.0)


def test_difference_by_hand():
    # Differences 1, 2, 0: mean 1, sd 1, t = sqrt(3) with 2 degrees of freedom, where p = 1 - t / sqrt(2 + t^2).
    rows = rows_of(one=(70.0, 72.0, 74.0), two=(69.0, 70.0, 74.0))
    (answer,) = decide([A], rows, corrected=False)
    assert (answer.differences, answer.mean, answer.deviation) == ({0: 1, 1: 2, 2: 0}, 1, 1)
    assert answer.p == pytest.approx(1 - (3 / 5) ** 0.5)
    half = 4.302653 / 3**0.5
    assert (answer.low, answer.high) == pytest.approx((1 - half, 1 + half), abs=1e-5)
    assert answer.verdict == 'not decided'


def test_pairs_are_of_a_seed():
    rows = [row('one', 1, 72.0), row('one', 7, 99.0), row('two', 1, 71.0), row('two', 8, 50.0)]
    (answer,) = decide([A], rows)
    assert (answer.differences, answer.p, answer.verdict) == ({1: 1.0}, None, 'not decided')
    (answer,) = decide([A], rows[1::2])
    assert (answer.differences, answer.verdict) == ({}, 'not run')
    # There is no spread to estimate where all seeds differ by as much.
    (answer,) = decide([A], rows_of(one=(1.0, 2.0), two=(0.0, 1.0)))
    assert (answer.mean, answer.p, answer.verdict) == (1, None, 'not decided')


def test_figures_within_a_network():
    claim = Claim('g', 'scale', 'one', figure='scales.2.5', minus='scales.0.5')
    assert claim.differences(rows_of(one=(5.0, 6.0))) == {0: 6.0, 1: 6.0}
    assert Claim('g', 'scale', 'one', 'two', figure='scales.0.6').differences(rows_of(one=(5.0,), two=(3.0,))) == {0: 2}
    assert Claim('e', 'rho', 'one', figure='attention.units.SK_2_1.rho').differences(rows_of(one=(5.0,))) == {}


def test_equivalence_is_two_one_sided_tests():
    from scipy.stats import t

    pytest.importorskip('statsmodels')
    rows = rows_of(one=(70.0, 71.2, 70.3, 70.9), two=(70.0, 71.0, 71.0, 70.5))
    values = np.array([0.0, 0.2, -0.7, 0.4])
    (answer,) = decide([LITTLE], rows, corrected=False)
    error = values.std(ddof=1) / 2
    expected = max(t.sf((values.mean() + 2) / error, 3), t.cdf((values.mean() - 2) / error, 3))
    assert answer.p == pytest.approx(expected)
    assert answer.p < 0.05
    # Its interval, of 90 % then, lies within the margin.
    half = t.ppf(0.95, 3) * error
    assert (answer.low, answer.high) == pytest.approx((values.mean() - half, values.mean() + half))
    assert answer.verdict == 'holds'
    shifted = rows_of(one=(80.0, 81.2, 80.3, 80.9), two=(70.0, 71.0, 71.0, 70.5))
    assert decide([LITTLE], shifted, corrected=False)[0].verdict == 'contradicted'
    wide = rows_of(one=(70.0, 75.0, 70.0, 65.0), two=(70.0, 71.0, 71.0, 70.5))
    assert decide([LITTLE], wide, corrected=False)[0].verdict == 'not decided'


def test_holm_by_hand():
    pytest.importorskip('statsmodels')
    # Of three: 0.01 < 0.05 / 3 and 0.02 < 0.05 / 2 are rejected, 0.06 is tested at 0.05 and is not.
    assert holm_levels([0.06, 0.01, 0.02]) == pytest.approx([0.05, 0.05 / 3, 0.025])
    # 0.03 > 0.05 / 2 ends it: what comes after has its level.
    assert holm_levels([0.01, 0.04, 0.03]) == pytest.approx([0.05 / 3, 0.025, 0.025])
    rng = np.random.default_rng(0)
    claims = [Claim('x', str(i), f'n{i}', 'base') for i in range(6)]
    rows = rows_of(base=np.zeros(8), **{f'n{i}': rng.normal(0.5 * i - 1, 1, 8) for i in range(6)})
    alone, together = (decide(claims, rows, corrected=corrected) for corrected in (False, True))
    order = np.argsort([answer.p for answer in alone])
    running = 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1, alone[i].p * (6 - rank)))
        assert together[i].p == pytest.approx(running)
    # A claim is decided where its interval leaves zero out, and only there.
    verdicts = [answer.verdict if answer.p < 0.05 else 'not decided' for answer in together]
    assert verdicts == ['holds' if a.low > 0 else 'contradicted' if a.high < 0 else 'not decided' for a in together]
    assert {'holds', 'not decided'} <= set(verdicts)


def test_a_difference_too_small_to_matter_is_bounded():
    """Not told from zero, and under half a point, by an interval at the level of all claims together."""
    pytest.importorskip('statsmodels')
    from scipy.stats import t

    values = np.array([0.1, -0.2, 0.15, -0.1, 0.05, 0.1, -0.05, 0.0])
    claims = [A, *(Claim('x', str(i), f'n{i}', 'two') for i in range(9))]
    rows = rows_of(one=70 + values, two=[70.0] * 8, **{f'n{i}': 72 + values for i in range(9)})
    answer, *others = decide(claims, rows)
    most = values.mean() + t.ppf(1 - 0.05 / 10 / 2, 7) * values.std(ddof=1) / 8**0.5
    assert answer.most == pytest.approx(most)
    assert most < 0.5
    assert answer.verdict == UNDER == 'not better by 0.5 points'
    assert {other.verdict for other in others} == {'holds'}
    # Three times as far apart, they are under half a point by an interval for one claim, and not by one for ten.
    claims, rows = claims[:1], rows_of(one=70 + 3 * values, two=[70.0] * 8)
    assert decide(claims, rows)[0].verdict == UNDER
    rows += rows_of(**{f'n{i}': 72 + values for i in range(9)})
    assert decide([A, *(Claim('x', str(i), f'n{i}', 'two') for i in range(9))], rows)[0].verdict == 'not decided'
    # A network that is worse by more is contradicted; one that is worse by a little is under half a point too.
    assert decide([A], rows_of(one=69 + values, two=[70.0] * 8))[0].verdict == 'contradicted'
    worse = np.array([-3.0, 0.5, -2.0, 0.2, -2.5, 0.1, -0.5, -0.3])
    (answer,) = decide([A], rows_of(one=70 + worse, two=[70.0] * 8))
    assert answer.low < -2
    assert 0 < answer.high < 0.5
    assert answer.verdict == UNDER


def test_a_contradiction_is_by_the_bounds_of_all_claims():
    """Not by the level at which Holm's procedure came to a stop, which is that of other claims."""
    pytest.importorskip('statsmodels')
    from scipy.stats import t

    rng = np.random.default_rng(0)
    values = np.array([2.2, 2.9, 2.4, 2.1, 3.0, 2.6, 2.3, 2.5])
    sure = {f'n{i}': 75 + rng.normal(0, 0.1, 8) for i in range(9)}
    claims = [LITTLE, *(Claim('x', name, name, 'two') for name in sure)]

    def answer(error):
        rows = rows_of(one=70 + 2.5 + error * (values - 2.5), two=[70.0] * 8, **sure)
        return decide(claims, rows)[0]

    found = answer(1.0)
    errors = values.std(ddof=1) / 8**0.5
    assert found.least == pytest.approx(values.mean() - t.ppf(1 - 0.05 / 10, 7) * errors)
    assert found.least > 2
    assert found.verdict == 'contradicted'
    # Nine are rejected before it, so that its interval is at 0.05, and lies beyond the margin. Its bound does not.
    found = answer(2.2)
    assert found.least < 2 < found.low
    assert found.verdict == 'not decided'
    assert found.p > 0.9
    assert found.apart < 1e-4
    table = claims_table([found])
    told = '`one` is better by 2.50, p < 0.001 (two-sided, not corrected); whether by more than 2 is not decided.'
    assert table.endswith(f'\n\n(b) one does what two does: {told}')
    assert f'{found.least:+.2f} to {found.most:+.2f} |' in table
    # Where it is not told from 0 either, there is nothing to add.
    assert not claims_table([decide([LITTLE], rows_of(one=(70, 75.0, 65), two=(70.0, 71, 72)))[0]]).endswith('.')


def test_correlations_are_tested_on_fishers_scale():
    claim = Claim('e', 'rises', 'one', figure='attention.units.SK_2_1.rho', unit='rho')
    rho = (0.9, 0.95, 0.99, 0.8)
    rows = [row('one', seed, 70.0, attention={'units': {'SK_2_1': {'rho': value}}}) for seed, value in enumerate(rho)]
    (answer,) = decide([claim], rows, corrected=False)
    assert answer.mean == pytest.approx(np.tanh(np.arctanh(rho).mean()))
    assert 0 < answer.low < answer.mean < answer.high < 1
    assert answer.verdict == 'holds'


def test_power():
    pytest.importorskip('statsmodels')
    # The tables' 34 pairs for half a deviation, and by the normal approximation more for a smaller level.
    assert seeds_needed(1.0) == 34
    assert seeds_needed(1.0, tests=30) == pytest.approx((3.144 + 0.842) ** 2 * 4, rel=0.1)
    # Two seeds have a power of 0.73 where the difference is ten deviations, by draws.
    assert [seeds_needed(deviation) for deviation in (0.0, 0.05)] == [2, 3]
    assert seeds_needed(0.5) == 10
    for equivalence in (False, True):
        for tests in (1, 30):
            for deviation in (0.05, 0.12, 0.15, 0.2, 0.35, 1.0, 5.0):
                needed = seeds_needed(deviation, tests=tests, equivalence=equivalence)
                assert 0.8 <= power_of(needed, deviation, tests=tests, equivalence=equivalence) <= 1
                if needed > 2:
                    assert power_of(needed - 1, deviation, tests=tests, equivalence=equivalence) < 0.8
    # What is needed has the power that it is needed for, and what is far from it is sure of it.
    assert power_of(10, 0.02, tests=30) == 1
    assert power_of(9, 0.5) < 0.8 <= power_of(10, 0.5)
    assert [power_of(10, deviation) for deviation in (0.2, 0.02, 0.0)] == pytest.approx([1, 1, 1], abs=1e-3)


def test_power_is_what_draws_give():
    from scipy.stats import t

    rng = np.random.default_rng(0)
    for seeds, deviation, tests in ((10, 0.39, 30), (10, 0.23, 30), (2, 0.1, 1), (5, 0.15, 30)):
        drawn = rng.normal(0, deviation, (40000, seeds))
        error = drawn.std(1, ddof=1) / seeds**0.5
        share = (abs(drawn.mean(1)) + t.isf(0.05 / tests, seeds - 1) * error < 0.5).mean()
        assert power_of(seeds, deviation, tests=tests, equivalence=True) == pytest.approx(share, abs=0.01)
        # Of half a point, and of the bound below half a point where there is nothing.
        half = t.isf(0.025 / tests, seeds - 1) * error
        for share in ((drawn.mean(1) + 0.5 > half).mean(), (drawn.mean(1) + half < 0.5).mean()):
            assert power_of(seeds, deviation, tests=tests) == pytest.approx(share, abs=0.01)
    assert power_of(10, 0.0, equivalence=True) == 1
    assert seeds_needed(0.0, equivalence=True) == 2


def test_intervals_by_hand():
    # The tables' quantiles of chi-squared with 9 degrees of freedom, and of t with 2.
    low, high = interval_of_deviation(1.0, 9)
    assert (low, high) == pytest.approx(((9 / 19.023) ** 0.5, (9 / 2.700) ** 0.5), rel=1e-4)
    assert interval_of_mean([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))


def test_components_by_hand():
    # 10 for each weight and 1 for each order, and nothing else.
    table = 10 * np.arange(4.0)[:, None] + np.arange(3.0)
    right = np.zeros((4, 3, 5))
    right[..., :2] = 100
    found = components(table, right)
    assert (found.weights, found.order, found.rest) == pytest.approx((100 * 5 / 3, 1, 0))
    # Two images of five: 100^2 * (2/5 * 3/5) * 5/4, over five.
    assert found.images == pytest.approx(100**2 * 0.24 * 1.25 / 5)
    # The estimates' mean is what the table was drawn with.
    rng = np.random.default_rng(0)
    drawn = [
        components(
            3 * rng.normal(size=(5, 1)) + 2 * rng.normal(size=(1, 5)) + rng.normal(size=(5, 5)), np.zeros((5, 5, 2))
        )
        for _ in range(500)
    ]
    means = [np.mean([getattr(one, name) for one in drawn]) for name in ('weights', 'order', 'rest')]
    assert means == pytest.approx([9, 4, 1], rel=0.15)


def test_crossed_rows():
    rows = [
        row(SELECTED, seed, 10.0 * seed + order, order=order, right='05') for seed in range(2) for order in range(3)
    ]
    table, right = crossed(rows, SELECTED)
    assert table.tolist() == [[0, 1, 2], [10, 11, 12]]
    assert right.shape == (2, 3, 2)
    assert right[0, 0].tolist() == [0, 100]
    assert crossed([*rows, row(SELECTED, 5, 70.0, order=0)], SELECTED)[0].tolist() == table.tolist()
    assert crossed(rows[:-1], SELECTED) is None
    assert crossed(rows, SUMMED) is None


def test_bound_is_pooled():
    from scipy.stats import t

    # Variances 1 and 4 with 2 and 1 degrees of freedom: (2 * 1 + 4) / 3 = 2.
    rows = rows_of(one=(1.0, 2.0, 3.0), two=(0.0, 8**0.5))
    assert bound(rows) == pytest.approx(t.ppf(0.9985, 3) * 2**0.5 * 2**0.5)
    assert bound(rows[:1]) is None


def test_claims_name_what_there_is():
    assert {claim.key for claim in CLAIMS} == {key for key, _ in GROUPS} == set('abcdefghi')
    assert sorted(id(claim) for claims in GROUPS.values() for claim in claims) == sorted(map(id, CLAIMS))
    for claim in CLAIMS:
        assert {claim.one, claim.other} - {None} <= NETWORKS.keys()
        assert claim.one != claim.other
    assert [claim.margin for claim in CLAIMS if claim.margin] == [0.5, 0.1, 0.5, 0.5]


def known():
    """Ten seeds of claim (a) for M = 2, which holds, one of K3, and a crossed study of the variance."""
    units = {f'SK_{i}_{j}': {'rho': 0.5, 'curve': [0.0] * 7} for i in (2, 3, 4) for j in (1, 2)}
    attention = {'scales': [float(s) for s in SCALES], 'units': units, 'top1': dict(own=70, mean=69.5, shuffled=60)}
    learning = {'steps': [0, 5], **{name: {'entropy': [0.693, 0.5], 'rho': [0.0, 0.5]} for name in units}}
    noise = [0.3, -0.3, 0.1, -0.1, 0.2, -0.2, 0.0, 0.1, -0.1, 0.0]
    rows = [row(SELECTED, i, 71 + x, attention=attention, learning=learning) for i, x in enumerate(noise)]
    rows += rows_of(k3_k5_summed=[70.0] * 10, k3=[69.0])
    rows.append(row(SELECTED, 0, 71.5, longer=True))
    rng = np.random.default_rng(0)
    probes = {'middle': [60, 61, 62], 'end': [70, 70, 70]}
    variance = [
        row(name, seed, 70 + seed + rng.normal(), order=order, right='013', mixed=70.0, last=69.0, steps=probes)
        for name in (SELECTED, SUMMED)
        for seed in range(2)
        for order in range(3)
    ]
    return rows, variance


def test_page():
    pytest.importorskip('statsmodels')
    rows, variance = known()
    text = markdown(rows, variance, '../results')
    lines = text.splitlines()
    (line,) = [line for line in lines if line.startswith('| (a) selection beats the sum, M = 2')]
    cells = [cell.strip() for cell in line.split('|')[2:-1]]
    assert cells[:3] == ['`k3_k5_selected` - `k3_k5_summed`', '+0.97', '10']
    assert cells[3].startswith('+1.00 (+')
    low, high = map(float, cells[4].split(' to '))
    assert 0.7 < low < 1 < high < 1.3
    assert cells[5:] == ['< 0.001', 'holds']
    (line,) = [line for line in lines if line.startswith('| (b) two kernels, selected, beat K3')]
    assert line.endswith('| +1.44 | 1 | +2.30 |  |  | not decided |')
    assert sum(line.endswith('|  |  | not run |') for line in lines) == 15
    assert (
        '- **Holds** (3 of 30): (a) selection beats the sum, M = 2; (g) selection beats the sum, at scale 0.5' in text
    )
    assert 'and a half-width of 0.5 points. There are 10 seeds and 0.17 points: it is met.' in text
    assert "- Of the 1 differences for which the paper has a figure, ImageNet's, the bounds of 0 lie below it" in text
    assert '- Selection against the sum, in 1 sets of kernels: +1.00 to +1.00 points, and at most +1.' in text
    assert '| scaled | narrow | `k3_k5_selected` | 1 | +0.20 | +0.20 |' in text
    aim = 'The aim is that twice the training adds at most 1 point on `scaled`, narrow: it is met by the means, '
    assert text.count(f'{aim}and not shown by the intervals of `k3_k5_selected` +0.20. ') == 2
    assert text.count(f'- {aim}') == 1
    assert text.count('`k3_k5_selected` +0.20. It was tried for 1 of 3 networks there.') == 2
    assert '2 seeds of the weights crossed with 3 of the images' in text
    assert 'has a deviation of 1.00 points, and over the last five, where the learning rate goes to 0, of 0.00' in text
    assert '+1.00 points better than with the last' in text
    assert '70.00 % with each image' in text
    assert '| `k3_k5_selected` | 1,000 | 2.50 | 10 | 71.00 ± 0.18 | 71.0 | 72.0 |' in text
    options = '--train-images 9 --epochs 1 --test-images 9 --batch-size 2 --threads 1 --together 1'
    assert f'--variance 2 3 --sets scaled {options}' in text
    assert text.count('![') == 3
    # Its rest is 5x as uncertain as it is large, of two degrees of freedom.
    assert re.search(r'\| their difference \| (not seen|\d\.\d\d) \| .* \| \d\.\d\d \(\d\.\d\d to \d+\.\d\d\) \|', text)
    assert text.endswith('No row of it is on this page.\n')


def test_what_is_missed_says_so():
    pytest.importorskip('statsmodels')
    rows, variance = known()
    spread = [dict(r, top1=r['top1'] + 9 * (-1) ** r['seed']) if r['network'] == SUMMED else r for r in rows]
    text = markdown(spread, variance, '.')
    assert re.search(r'There are 10 seeds and \d+\.\d\d points: it is missed\.', text)
    few = [r for r in rows if r['seed'] < 9]
    assert re.search(r'There are 9 seeds and 0\.\d\d points: it is missed\.', markdown(few, variance, '.'))
    short = power_in_short(spread)
    assert short.startswith('- The aim is a power of 80 % to show 0.5 points. As the first of all in Holm')
    assert ' Comparisons of top-1 with fewer: 1 of 1, so that it is missed there (1, were each the only one). ' in short
    assert re.search(r"deviations' intervals 1 would have fewer, which would take up to \d+\. At scales never ", short)
    enough = power_in_short(rows)
    assert ' with fewer: 0 of 1, so that it is met (0, were each the only one). At the upper ends ' in enough
    assert ' 0 would have fewer. At scales' in enough
    assert power_in_short([]) is None
    assert [(need.seeds, need.new_scale) for need in needs(rows, [MAIN])] == [('10', False), ('10', True), ('10', True)]


def test_convergence_by_means_and_by_intervals():
    assert met_by({'one': [0.1, 0.2, 0.15], 'two': [0.2, 0.3, 0.1]}) == 'it is met, by the means and by their intervals'
    told = 'it is met by the means, and not shown by the intervals of `two` +0.95 (-9.85 to +11.75)'
    assert met_by({'one': [0.1, 0.2, 0.15], 'two': [0.1, 1.8]}) == told
    assert met_by({'one': [0.1, 0.2, 0.15], 'two': [1.0, 1.1]}) == 'it is missed'
    rows = [row('one', seed, 70.0 + seed, longer=longer) for seed in range(2) for longer in (False, True)]
    assert '| scaled | narrow | `one` | 2 | +0.00 (+0.00 to +0.00) | +0.00, +0.00 |' in convergence(rows, PLACES)[1]
    assert 'is not known' in convergence(rows[::2], PLACES)[-1]
    rows = [row(SUMMED, seed, 70.0, longer=longer) for seed in range(3) for longer in (False, True)]
    rows += [row(SELECTED, seed, 70.5 + seed, longer=longer) for seed in (0, 1, 2) for longer in (False, True)]
    rows[-1]['top1'] += 3  # seed 2, after twice the training
    told = 'twice the training: +2.50 (-4.07 to +9.07) points over 3 seeds, and +1.50 (-0.98 to +3.98) of '
    assert any(told in part for part in convergence(rows, PLACES))


def test_controls_stand_beside_the_claims():
    pytest.importorskip('statsmodels')
    rows, variance = known()
    assert 'test bed' not in markdown(rows, variance, '.')
    rows += rows_of(wider=[70.0, 71.2], k3=[69.0, 71.0])
    text = markdown(rows, variance, '.')
    assert '| more channels | `wider` - `k3` | x 1.00 | x 1.12 | +0.10 | 2 | +0.60 (-4.48 to +5.68) |' in text
    assert 'one 3x3 kernel here: more channels +0.60 (-4.48 to +5.68) (the paper: +0.10). Where they' in text
    # The paper's figures of the controls are differences of the claims'.
    paper = {(claim.one, claim.other): claim.paper for claim in CLAIMS if claim.figure == 'top1'}
    over_k3 = paper[SELECTED, 'k3']
    expected = [over_k3 - paper[SELECTED, name] for name in ('wider', 'deeper', 'se')]
    expected += [over_k3 + paper['k3_k5_k7_selected', SELECTED], paper[SELECTED, 'k5'] - over_k3]
    assert [claim.paper for claim in CONTROLS] == pytest.approx(expected)
    assert {name for claim in CONTROLS for name in (claim.one, claim.other)} == THERE.keys()


def test_the_middle_units_against_the_last():
    pytest.importorskip('statsmodels')
    rows, variance = known()
    for one in rows:
        if 'attention' in one:
            units = {name: dict(unit) for name, unit in one['attention']['units'].items()}
            units['SK_3_1']['rho'] = 0.8 + 0.01 * one['seed']
            one['attention'] = {**one['attention'], 'units': units}
    z = (np.arctanh(0.8 + 0.01 * np.arange(10)) + np.arctanh(0.5)) / 2 - np.arctanh(0.5)
    expected = f"in Fisher's transformation, {z.mean():+.2f} (+"
    assert expected in markdown(rows, variance, '.')


@pytest.mark.parametrize(
    ('value', 'marks', 'text'),
    [
        (0.4956, (0.0, 0.5), '+0.496'),
        (0.4956, (0.0,), '+0.50'),
        (0.5, (0.0, 0.5), '+0.50'),
        (-0.0004, (0.0,), '-0.0004'),
        (-1e-9, (0.0,), '-0.00000'),
        (0.01, (0.0,), '+0.01'),
        (-0.4999, (0.5, -0.5), '-0.4999'),
    ],
)
def test_a_bound_beside_a_mark_has_the_digits_that_tell(value, marks, text):
    assert shown(value, 2, marks) == text


def test_answers_in_groups_and_in_places():
    pytest.importorskip('statsmodels')
    rows, _ = known()
    assert in_places(answers_by_place(rows)) == {}
    rows += [{**one, 'size': 'wide'} for one in rows if not one['longer']]
    found = answers_by_place(rows)
    assert list(found) == [('scaled', 'narrow'), ('scaled', 'wide')]
    beside = in_places(found)
    # Those of K3 have one seed, and those of (e) and (i) all the same.
    assert {claim.key for claim in beside} == {'a', 'g'}
    assert all(list(there) == ['scaled, narrow', 'scaled, wide'] for there in beside.values())
    lines = in_groups(found).splitlines()
    assert lines[0].endswith('| scaled, narrow | scaled, wide |')
    assert [tuple(cell.strip() for cell in line.split('|')[1:3]) for line in lines[2:]] == [
        (f'({key})', text) for key, text in GROUPS
    ]
    (new,) = [line for line in lines if line.startswith('| (g) |')]
    assert [cell.strip() for cell in new.split('|')[3:-1]] == ['2 of 4 holds, 2 of 4 not decided'] * 2


def test_where_attention_rises():
    def answers(*means):
        rising = next(claims for (_, text), claims in GROUPS.items() if 'before the last' in text)
        return [Answer(claim, {0: mean}, 0.01, 0.1, 0.9, 0.1, 0.9) for claim, mean in zip(rising, means)]

    one, other, third = ('scaled', 'narrow'), ('digits', 'narrow'), ('scaled', 'wide')
    assert rising_in_short({}) is None
    assert rising_in_short({one: answers(-0.5, -0.5)}).endswith('with scale in none on `scaled`, narrow.')
    assert rising_in_short({other: answers(0.5)}).endswith('with scale in 1 of 1 on `digits`, narrow.')
    found = {one: answers(-0.5, -0.4), other: answers(0.5, -0.5, 0.4), third: answers(-0.1)}
    expected = 'in 2 of 3 on `digits`, narrow, and in none on `scaled`, narrow and `scaled`, wide.'
    assert rising_in_short(found).endswith(f'is shown to rise with scale {expected}')


def test_notes_stand_in_their_sections(tmp_path):
    pytest.importorskip('statsmodels')
    assert read_notes(tmp_path / 'notes.md') == {}
    (tmp_path / 'notes.md').write_text('# Data\n\nOf the data.\n\n# Limits\n- One more.\n')
    notes = read_notes(tmp_path / 'notes.md')
    for text, wrong in (('# Datas\n\nx\n', '# Datas'), ('x\n\n# Data\n', 'x')):
        (tmp_path / 'wrong.md').write_text(text)
        with pytest.raises(ValueError, match=f"wrong.md: '{wrong}': must be under one of # Data, # Power"):
            read_notes(tmp_path / 'wrong.md')
    assert notes == {'Data': 'Of the data.', 'Limits': '- One more.'}
    text = markdown(*known(), '.', notes=notes)
    assert '\n\nOf the data.\n\n**Networks.**' in text
    assert ' either way.\n- One more.\n\n## The command' in text


def test_page_of_two_data_sets():
    pytest.importorskip('statsmodels')
    rows, variance = known()
    # As on the first set, but for claim (a): its difference is turned round.
    other = [dict(r, data='garments', settings=dict(SETTINGS, epochs=2)) for r in rows if not r['longer']]
    for one in other:
        if one['network'] == SUMMED:
            one.update(top1=72.0)
    text = markdown(rows + other, variance, '.')
    assert '- On `garments`, narrow, 15 claims have rows. Of the 3 ' in text
    assert '| (a) | selection beats the sum | 1 of 2 holds, 1 not run | 1 of 2 contradicted, 1 not run |\n' in text
    assert '| (c) | SK beats widening, deepening and SE at equal cost | not run | not run |\n' in text
    # Nothing is said of those that are not decided on both.
    assert 'Of the 3 that have an answer on `scaled`, narrow, too, 2 have the same; not so (a) selection beats' in text
    assert 'the sum, M = 2 (contradicted).' in text
    assert 'Of the' not in markdown(other, variance, '.')
    assert '(./places.png)' in text
    assert '(./places.png)' not in markdown(rows, variance, '.')
    full = [dict(one, data='garments', settings=dict(SETTINGS, train_images=60000, epochs=16)) for one in variance]
    power = markdown(rows + other, variance + full, '.')
    assert power.count('Where the variance comes from') == 1
    for told in (
        '2 seeds of the weights crossed with 3 of the images on `scaled`, after 1 x 9 images; ',
        '2 seeds of the weights crossed with 3 of the images on `garments`, after 16 x 60,000 images; the test ',
        '| scaled | their difference | ',
        '| garments | their difference | ',
        ' points after these 1 epochs: the root',
        ' points after the whole training: the root',
    ):
        assert power.count(told) == 1, told
    assert '1 x 9 images on `scaled`, 2 x 9 images on `garments`; AdamW' in text
    assert '### On garments, narrow' in text
    assert '(./attention.png)' in text
    assert '### In networks for garments, narrow' in text
    assert '(./attention_garments_narrow.png)' in text
    assert 'Not run: scenes, narrow; digits, narrow; scaled, wide.' in text
    for data, epochs, longer in (('scaled', 1, ''), ('garments', 2, '--longer ')):
        # Each command trains what has rows, and no more: K3 has one seed.
        words = f'--sets {data} --sizes narrow --networks k3_k5_selected k3_k5_summed'
        assert f'{words} k3 --seeds 0 {longer}--train-' in text
        assert f'{words} --seeds 1 2 3 4 5 6 7 8 9 --longer --train-' in text
        assert f'--epochs {epochs} --test-images 9' in text


def test_how_claims_change_with_the_size():
    """By seed: 1 + noise in narrow networks, and 0.2 + noise / 2 in wide ones."""
    pytest.importorskip('statsmodels')
    from scipy import stats

    rows, variance = known()
    assert trend_in_short(rows) is None
    assert '### From narrow to wide' not in markdown(rows, variance, '.')
    wide = []
    for one in rows:
        if not one['longer'] and one['network'] != 'k3':
            top1 = 80.2 + (one['top1'] - 71) / 2 if one['network'] == SELECTED else 80.0
            wide.append({**one, 'size': 'wide', 'top1': top1})
    noise = [0.3, -0.3, 0.1, -0.1, 0.2, -0.2, 0.0, 0.1, -0.1, 0.0]
    changes = [-0.8 - value / 2 for value in noise]
    half = stats.t.ppf(0.975, 9) * stats.sem(changes)
    told = f'-0.80 ({-0.8 - half:+.2f} to {-0.8 + half:+.2f})'
    text = markdown(rows + wide, variance, '.')
    line = f'| (a) selection beats the sum, M = 2 | `k3_k5_selected` - `k3_k5_summed` | 10 | +1.00 | +0.20 | {told} |'
    assert f'{line} < 0.001 |' in text
    short = f'- From narrow to wide on `scaled` the difference of claim (a), M = 2, changes by {told} points. By Holm'
    assert f"{short}'s procedure 1 of 1 claims are shown to change ((a) selection beats the sum, M = 2); by 95 " in text


def test_seeds_that_were_added_after_a_look():
    """p is that of two looks, and the interval lies beyond 0 where that says so, and only there."""
    pytest.importorskip('statsmodels')
    from scipy import stats

    rows, variance = known()
    assert 'after a look' not in markdown(rows, variance, '.')
    values = 70 + np.tile([0.0, 1.0], 6)

    def answer(shift, **kwargs):
        return decide([A], rows_of(one=values + shift, two=[70.0] * 12), **kwargs)[0]

    for shift in np.linspace(-0.3, 0.3, 13):
        once, twice, alone = (answer(shift, **kwargs) for kwargs in (dict(for_looks=False), {}, dict(corrected=False)))
        assert twice.looks == 2
        assert twice.p == pytest.approx(min(2 * once.p, 1))
        assert alone.p == once.p
        assert (twice.p < 0.05) == (twice.low > 0 or twice.high < 0)
        assert twice.low < once.low
        assert (twice.least, twice.most) == (twice.low, twice.high)
    # p of this one is between 0.025 and 0.05.
    shift = np.mean(stats.t.isf([0.0125, 0.025], 11)) * stats.sem(values) - 0.5
    assert answer(shift, for_looks=False).verdict == 'holds'
    assert answer(shift).verdict == 'not decided'
    text = markdown(rows_of(k3_k7_selected=values + shift, k3_k7_summed=[70.0] * 12), variance, '.')
    told = '- 1 of 30 claims have seeds that were added after a look at 10: they are tested at half the level'
    assert f'{told}, for two looks. Without that it would be (h) K3 and K7: selection beats the sum: holds.' in text


def test_one_look_beside_two():
    """Claims with ten and with twelve seeds in one procedure, one of them of equivalence, one for the worse."""
    pytest.importorskip('statsmodels')
    from scipy import stats

    rng = np.random.default_rng(1)
    figures = {
        'one': 69.75 + 0.2 * rng.standard_normal(12),
        'two': np.full(12, 70.0),
        'three': 70.15 + 0.2 * rng.standard_normal(10),
    }
    claims = [A, Claim('b', 'three beats two', 'three', 'two'), Claim('c', 'one does as two', 'one', 'two', margin=0.5)]
    answers = decide(claims, rows_of(**{name: values.tolist() for name, values in figures.items()}))
    worse, better = (figures[name] - 70 for name in ('one', 'three'))
    margins = [
        stats.ttest_1samp(worse, edge, alternative=side).pvalue for edge, side in ((-0.5, 'greater'), (0.5, 'less'))
    ]
    raw = [2 * stats.ttest_1samp(worse, 0).pvalue, stats.ttest_1samp(better, 0).pvalue, 2 * max(margins)]
    order = np.argsort(raw)
    by_hand, last = {}, 0.0
    for rank, i in enumerate(order):
        last = by_hand[i] = max(last, min((3 - rank) * raw[i], 1))
    assert [answer.p for answer in answers] == pytest.approx([by_hand[i] for i in range(3)])
    assert [answer.looks for answer in answers] == [2, 1, 2]
    for answer, level in zip(answers, (0.05 / 3 / 2, 0.05 / 3, 2 * 0.05 / 3 / 2)):
        values = np.array(answer.values)
        half = stats.t.isf(level / 2, len(values) - 1) * stats.sem(values)
        assert (answer.least, answer.most) == pytest.approx((values.mean() - half, values.mean() + half))
        edge = answer.claim.margin or 0
        within = answer.low > -edge and answer.high < edge
        assert (answer.p < 0.05) == (within if edge else answer.low > 0 or answer.high < 0)
        assert answer.least <= answer.low
    assert answers[0].verdict == 'contradicted'


def test_power_is_of_the_seeds_that_there_are():
    pytest.importorskip('statsmodels')
    rows, variance = known()
    more = [dict(r, seed=r['seed'] + 10) for r in rows if r['seed'] < 2 and r['network'] != 'k3' and not r['longer']]
    seeds = ' '.join(map(str, range(1, 12)))
    assert f'--networks k3_k5_selected k3_k5_summed --seeds {seeds} -' in markdown(rows + more, variance, '.')
    for those, count in ((rows, 10), (rows + more, 12)):
        answers = decide(CLAIMS, [r for r in those if not r['longer']])
        answers = [answer for answer in answers if answer.claim.other and answer.low is not None]
        for need, answer in zip(needs(those, [MAIN]), answers, strict=True):
            assert need.seeds == str(count)
            looks = 1 if count == 10 else 2
            assert need.powers[1] == pytest.approx(power_of(count, answer.deviation, tests=looks * len(answers)))
            assert need.needed[1] == seeds_needed(answer.deviation, tests=looks * len(answers))
            assert need.powers[0] == pytest.approx(power_of(count, answer.deviation, tests=looks))


def test_page_of_a_trial():
    """Its rows stand elsewhere, so that the study begins with none."""
    pytest.importorskip('statsmodels')
    text = markdown(*known(), '.', 'elsewhere')
    assert 'These rows are a trial, in `elsewhere`.' in text
    assert '```bash\npython tools/run_ablation.py --variance 3 3\npython tools/run_ablation.py\n```' in text
    assert text.count(' --out elsewhere\n') == 3  # of the seeds with K3, of those without, of the variance
    assert 'a trial' not in markdown(*known(), '.')


def test_page_without_runs():
    pytest.importorskip('statsmodels')
    _, variance = known()
    text = markdown([], variance, '.')
    assert '- **Not run**: 30 of 30.' in text
    assert 'Which answer' not in text
    assert 'Claim (a) for M = 2 has no interval yet' in text
    assert '![' not in text
    assert 'claim (a), M = 2, on `scaled`, in the study of the variance (1 epochs) | 2 x 3 |' in text


def test_answers_say_not_run():
    assert Answer(A, {}).verdict == 'not run'
