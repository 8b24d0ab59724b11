"""The figures: forests of the claims, attention against scale, and attention along the training."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import stats

from .claims import MARGIN, UNITS, Claim
from .deciding import UNDER, Answer
from .rows import SCALES, Row

COLORS = {'holds': 'tab:green', 'contradicted': 'tab:red', UNDER: 'tab:blue', 'not decided': 'tab:gray'}
PLACE_COLORS = ('tab:pink', 'tab:orange', 'tab:purple', 'tab:brown', 'tab:cyan')  # none that stands for an answer
UNIT_NAMES = {'points': 'points of top-1', 'rho': "Spearman's rho"}

FAR = 3.0  # points


def draw_forest(answers: Sequence[Answer], path: Path) -> None:
    """A line for each claim with rows: its mean, its interval, its seeds, and the margin where it has one.

    Claims that go further than FAR points have a panel of their own, in which half a point would not be seen.
    """
    panels: dict[tuple[str, bool], list[Answer]] = {('points', False): [], ('points', True): [], ('rho', False): []}
    for answer in answers:
        if answer.differences:
            reach = max(map(abs, (*answer.values, answer.low or 0.0, answer.high or 0.0)))
            panels[answer.claim.unit, answer.claim.unit == 'points' and reach > FAR].append(answer)
    drawn = [panel for panel in panels.values() if panel]
    heights = [len(panel) + 1.5 for panel in drawn]
    figure = Figure(figsize=(8.5, 0.3 * sum(heights) + 0.6), layout='constrained')
    grid = figure.subplots(len(drawn), 1, height_ratios=heights, squeeze=False)
    for axes, panel in zip(grid[:, 0], drawn):
        for position, answer in enumerate(panel):
            color = COLORS[answer.verdict]
            if answer.claim.margin is not None:
                axes.barh(position, 2 * answer.claim.margin, left=-answer.claim.margin, height=0.8, color='0.92')
            axes.plot(answer.values, [position] * len(answer.values), '|', color=color, alpha=0.5, markersize=6)
            if answer.low is not None:
                axes.plot([answer.low, answer.high], [position] * 2, color=color, linewidth=1.8)
            axes.plot(answer.mean, position, 's', color=color, markersize=5)
        axes.axvline(0, color='0.3', linewidth=0.8)
        if any(answer.verdict == UNDER for answer in panel):
            axes.axvline(MARGIN, color='0.3', linewidth=0.8, linestyle='--')
        axes.set_yticks(range(len(panel)), [f'({a.claim.key}) {a.claim.text}' for a in panel], fontsize=8)
        axes.set_ylim(len(panel) - 0.5, -0.5)
        axes.set_xlabel(UNIT_NAMES[panel[0].claim.unit])
        axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=110)


def draw_places(found: Mapping[Claim, Mapping[str, Answer]], path: Path) -> None:
    """A panel for each unit, in it a group for each claim, in it a line for each place: its mean and its interval."""
    names = list(dict.fromkeys(name for there in found.values() for name in there))
    colors = dict(zip(names, PLACE_COLORS))
    panels = [{c: there for c, there in found.items() if c.unit == unit} for unit in ('points', 'rho')]
    panels = [panel for panel in panels if panel]
    heights = [sum(len(there) + 1 for there in panel.values()) + 4 for panel in panels]
    figure = Figure(figsize=(8.5, 0.14 * sum(heights) + 0.4), layout='constrained')
    grid = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)
    for axes, panel in zip(grid[:, 0], panels):
        position, ticks = 0, []
        for there in panel.values():
            ticks.append(position + (len(there) - 1) / 2)
            for name, answer in there.items():
                axes.plot([answer.low, answer.high], [position] * 2, color=colors[name], linewidth=1.6)
                axes.plot(answer.mean, position, 's', color=colors[name], markersize=4)
                position += 1
            position += 1
        unit = next(iter(panel)).unit
        for x, style in ((0, '-'), *([(MARGIN, '--'), (-MARGIN, '--')] if unit == 'points' else [])):
            axes.axvline(x, color='0.3', linewidth=0.8, linestyle=style)
        axes.set_yticks(ticks, [f'({claim.key}) {claim.text}' for claim in panel], fontsize=8)
        axes.set_ylim(position - 0.5, -1)
        axes.set_xlabel(UNIT_NAMES[unit])
        axes.spines[['top', 'right']].set_visible(False)
    handles = [Line2D([], [], marker='s', color=color, label=name, markersize=4) for name, color in colors.items()]
    figure.legend(handles=handles, loc='outside lower right', ncols=len(names), frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def draw_attention(rows: Sequence[Row], path: Path) -> None:
    """A panel for each unit: attention against scale, a thin line for a seed, a band for the mean's 95 % interval."""
    figure = Figure(figsize=(8.8, 4.6), layout='constrained')
    panels = figure.subplots(2, len(UNITS) // 2, sharex=True, sharey=True)
    scales = rows[0]['attention']['scales']
    # Units go down the columns, so that each column is a stage of two units.
    for axes, unit in zip(panels.T.flat, UNITS):
        curves = np.array([row['attention']['units'][unit]['curve'] for row in rows])
        axes.axvspan(SCALES[0], SCALES[-1], color='0.95')
        axes.plot(scales, curves.T, color='tab:blue', alpha=0.3, linewidth=0.8)
        _draw_band(axes, scales, curves, 'tab:blue')
        axes.set_title(unit, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[['top', 'right']].set_visible(False)
    figure.supxlabel("the object's scale; grey where networks were trained", fontsize=9)
    figure.supylabel('attention, 5x5 minus 3x3', fontsize=9)
    figure.savefig(path, dpi=110)


def draw_learning(rows: Sequence[Row], path: Path) -> None:
    """Entropy and correlation with scale of every unit's attention along the training."""
    figure = Figure(figsize=(8.8, 3.4), layout='constrained')
    panels = figure.subplots(1, 2, sharex=True)
    steps = np.array(rows[0]['learning']['steps'])
    for axes, key, label in zip(panels, ('entropy', 'rho'), ('entropy, nats', 'rho of attention and scale')):
        for i, unit in enumerate(UNITS):
            values = np.array([row['learning'][unit][key] for row in rows])
            _draw_band(axes, 100 * steps / steps[-1], values, f'C{i}', label=unit)
        axes.set_xlabel('training, % of the steps')
        axes.set_ylabel(label)
        axes.spines[['top', 'right']].set_visible(False)
    panels[0].axhline(np.log(2), color='0.5', linewidth=0.8, linestyle=':')
    figure.legend(*panels[0].get_legend_handles_labels(), loc='outside right center', frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def _draw_band(axes, x: Sequence[float], values: np.ndarray, color: str, **kwargs) -> None:
    """The mean over seeds (S, N) and its 95 % interval, where there are two seeds."""
    mean = values.mean(0)
    axes.plot(x, mean, color=color, linewidth=1.8, **kwargs)
    if len(values) > 1:
        half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
        axes.fill_between(x, mean - half, mean + half, color=color, alpha=0.2, linewidth=0)
