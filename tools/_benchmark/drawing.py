"""A report as bars: its ratios, or the networks' times and memory beside each other."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .reporting import QUANTITIES, Ratio, Report, rows_by_run
from .sets import RESNEXT, TIMMS
from .settings import Settings

DRAWN = ('seconds', 'saved_mib', 'peak_mib')
# The networks of README's picture, and their colours.
NETWORKS = {
    'sknet50': ('SKNet-50, this project', 'tab:blue'),
    TIMMS: (f'SKNet-50, timm ({TIMMS})', '0.45'),
    RESNEXT: ('ResNeXt-50 32x4d', '0.75'),
}


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


def network_bars(report: Report) -> dict[str, dict[str, dict[str, float]]]:
    """What README's picture shows, ``{panel: {group: {network: value}}}``, of what was measured with the own settings.

    Milliseconds of inference and of a training step, eager and compiled, and MiB of memory: what autograd keeps of an
    image, or on a GPU the peak of a training step.
    """
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for run, rows in rows_by_run(report).items():
        if run.settings(Settings(**report['settings'])) != Settings(**report['settings']):
            continue
        for row in rows:
            network, _, how = row['model'].partition(':')
            if network not in NETWORKS or how not in ('', 'compile') or row['seconds'] is None:
                continue
            title = {'infer': 'Inference', 'train': 'Training step'}[run.mode]
            group = 'compiled' if how else 'eager'
            panels.setdefault(f'{title}, ms', {}).setdefault(group, {})[network] = 1e3 * row['seconds']
            for key, name in (
                ('peak_mib', 'Peak memory of training, MiB'),
                ('saved_mib', 'Kept for backward, MiB/image'),
            ):
                if row[key] is not None:
                    panels.setdefault(name, {}).setdefault(group, {})[network] = row[key]
                    break
    return panels


def draw_networks(report: Report, path: Path) -> None:
    """README's picture: SKNet-50 here, SKNet-50 in timm and ResNeXt-50, time and memory side by side."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    panels = network_bars(report)
    if not panels:
        raise ValueError(f'--picture {path}: nothing was measured of the networks {", ".join(NETWORKS)} that it shows')
    widths = [1 + len(groups) for groups in panels.values()]
    canvas = Figure(figsize=(9, 3.3), layout='constrained')
    canvas.get_layout_engine().set(w_pad=0.12)
    for axes, (title, groups) in zip(
        canvas.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0], panels.items()
    ):
        for position, values in enumerate(groups.values()):
            for i, (network, (_, color)) in enumerate(NETWORKS.items()):
                if network in values:
                    bar = axes.bar(position + 0.28 * (i - 1), values[network], width=0.26, color=color)
                    axes.bar_label(bar, fmt='%.0f', padding=2, fontsize='small')
        axes.set_xticks(range(len(groups)), groups)
        axes.set_xlim(-0.6, len(groups) - 0.4)
        axes.margins(y=0.1)
        axes.set_title(title, fontsize='medium')
        axes.set_yticks([])
        axes.spines[['top', 'right', 'left']].set_visible(False)
    handles = [Patch(color=color, label=label) for label, color in NETWORKS.values()]
    canvas.legend(handles=handles, loc='outside lower center', ncols=3, frameon=False)
    machine, settings = report['machine'], report['settings']
    device = machine['gpu'] or f'{machine["cpu"]} ({machine["cpu_capability"]}), {machine["threads"]} threads'
    how = f'batch {settings["batch_size"]}, {settings["size"]} x {settings["size"]}, {settings["dtype"]}'
    canvas.suptitle(
        f'Less is better. {device}; {how}; torch {machine["torch"]}; {machine["date"][:10]}', fontsize='small'
    )
    canvas.savefig(path, dpi=120)
