"""The ratios of a report as bars."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .reporting import QUANTITIES, Ratio, Report, rows_by_run

DRAWN = ('seconds', 'saved_mib', 'peak_mib')


@dataclass(frozen=True)
class Bar:
    """A bar of the plot."""

    label: str
    ratio: Ratio
    goal: float | None = None


def bars(report: Report) -> dict[str, list[Bar]]:
    """The plot's bars by panel: a set's columns, or the quantities of a list of models. What has no figure has none."""
    panels: dict[str, list[Bar]] = {}

    def add(panel: str, label: str, found: dict[str, Any] | None, goal: float | None = None) -> None:
        if found is not None:
            bar = Bar(label, Ratio(found['median'], found['low'], found['high']), goal)
            panels.setdefault(panel, []).append(bar)

    for figure in report['figures']:
        for column, cell in zip(report['columns'], figure['against']):
            if cell is not None:
                add(column.replace('`', ''), figure['label'].replace('`', ''), cell['ratio'], cell['goal'])
    if not report['figures']:
        for run, rows in rows_by_run(report).items():
            for row in rows:
                for quantity in DRAWN:
                    panel = f'{run.title}: {QUANTITIES[quantity]}\n{report["baseline"]} = 1'
                    add(panel, row['model'], row['ratios'][quantity])
    return panels


def draw(report: Report, path: Path) -> None:
    """The ratios as bars with their quartiles, goals as strokes, into a PNG, SVG or PDF file."""
    from matplotlib.figure import Figure

    panels = bars(report)
    label = dict(facecolor='white', edgecolor='none', pad=1)
    height = 1.2 + 0.42 * max((len(panel) for panel in panels.values()), default=1)
    canvas = Figure(figsize=(6.5 * max(len(panels), 1), height), layout='constrained')
    for axes, (title, panel) in zip(canvas.subplots(1, max(len(panels), 1), squeeze=False)[0], panels.items()):
        for position, bar in enumerate(panel):
            found = bar.ratio
            axes.barh(position, found.median, height=0.6, color='tab:blue' if found.median <= 1 else 'tab:orange')
            end = found.median
            if found.low is not None:
                error = [[found.median - found.low], [found.high - found.median]]
                axes.errorbar(found.median, position, xerr=error, color='black', capsize=3)
                end = found.high
            if bar.goal is not None:
                axes.plot([bar.goal] * 2, [position - 0.38, position + 0.38], color='tab:green', linewidth=3)
                end = max(end, bar.goal)
            axes.annotate(
                f'{found.median:.2f}',
                (end, position),
                xytext=(5, 0),
                textcoords='offset points',
                va='center',
                bbox=label,
            )
        axes.axvline(1, color='black', linewidth=0.8)
        axes.set_yticks(range(len(panel)), [bar.label for bar in panel])
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlim(left=0)
        axes.set_title(title, fontsize='medium')
        axes.set_xlabel('ratio, less is better' + ('; green: the goal' if any(b.goal for b in panel) else ''))
        axes.spines[['top', 'right']].set_visible(False)
    canvas.suptitle(report['title'])
    canvas.savefig(path, dpi=120)
