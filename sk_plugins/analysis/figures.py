"""Figures of an :class:`~sk_plugins.analysis.AttentionStudy` after the paper's Fig. 3 and 4, and its numbers as CSV."""

import contextlib
import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle

from .._files import write_atomically
from .study import AttentionStudy, typical_units

__all__ = ['draw_channels', 'draw_classes', 'draw_depth', 'draw_field', 'write']

_STYLE = {
    'font.size': 9,
    'axes.titlesize': 9,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'axes.axisbelow': True,
    'grid.color': '0.9',
    'lines.linewidth': 1.4,
    'legend.frameon': False,
    'svg.fonttype': 'none',
    'svg.hashsalt': 'sk_plugins',  # the same file from the same numbers
}
_MAX_NAMES = 30  # more classes than that are numbered
_FIGURES = ('attention_channels', 'attention_classes', 'attention_depth', 'receptive_field')
_TABLES = ('channels', 'classes', 'receptive_field', 'units')
_FILES = {f'{f}.{kind}' for f in _FIGURES for kind in ('png', 'svg')} | {f'{t}.csv' for t in _TABLES}


def _colours(number: int) -> np.ndarray:
    """From dark to light, so that the order of the scales shows in grey too."""
    return matplotlib.colormaps['viridis'](np.linspace(0.05, 0.8, max(number, 2)))


def _times(scale: float) -> str:
    return f'{scale:.1f}x' if round(scale, 1) == scale else f'{scale:g}x'


def _legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    # The title is the first of the entries, so that one line holds it all.
    handles, labels = [Line2D([], [], linestyle='none'), *handles], ['object scale', *labels]
    figure.legend(handles, labels, loc='outside upper center', ncols=min(len(labels), 7), handlelength=1.5)


def _check(study: AttentionStudy, units: Sequence[str] | None) -> list[str]:
    names = typical_units(study.units) if units is None else list(units)
    for name in names:
        if name not in study.units:
            raise ValueError(f'units has {name!r}, which does not exist: choose from {", ".join(study.units)}')
    return names


def draw_channels(study: AttentionStudy, units: Sequence[str] | None = None, groups: int = 32) -> Figure:
    """Attention of each kernel but the smallest by channel, runs of neighbours averaged: a panel per unit (Fig. 3).

    Args:
        study: the numbers.
        units: the units; :func:`~sk_plugins.analysis.study.typical_units` where None.
        groups: runs of channels.
    """
    names = _check(study, units)
    orders = [sorted(range(len(study.units[n].kernels)), key=lambda m: study.units[n].kernels[m])[1:] for n in names]
    rows = max(len(order) for order in orders)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.1 * len(names), 0.4 + 2.3 * rows), layout='constrained')
        axes = figure.subplots(rows, len(names), squeeze=False, sharey=True)
        for column, (name, order) in enumerate(zip(names, orders)):
            for row, axis in enumerate(axes[:, column]):
                if row >= len(order):
                    axis.set_axis_off()
                    continue
                unit, branch = study.units[name], order[row]
                means = torch.stack(
                    [
                        run.mean(1)
                        for run in study.channels[name][:, branch].tensor_split(min(groups, unit.channels), 1)
                    ],
                    1,
                )
                for scale, values, colour in zip(study.scales, means, _colours(len(study.scales))):
                    axis.plot(range(1, len(values) + 1), values.tolist(), color=colour, label=_times(scale))
                axis.axhline(1 / len(unit.kernels), color='0.5', linewidth=0.8, linestyle=':')
                axis.set_title(name)
                axis.set_ylabel(f'attention of {unit.labels[branch]}')
                if row == len(order) - 1:
                    per_group = unit.channels / means.shape[1]
                    axis.set_xlabel(f'channel group ({per_group:g} channels each)' if per_group > 1 else 'channel')
        _legend(figure, axes[0, 0])
    return figure


def draw_depth(study: AttentionStudy) -> Figure:
    """Mean attention difference of every unit against depth, a line per scale (Fig. 3)."""
    names = [name for name, unit in study.units.items() if len(unit.kernels) > 1]
    labels = sorted({study.label(name) for name in names})
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(max(4.2, 1.4 + 0.34 * len(names)), 3.1), layout='constrained')
        axis = figure.subplots()
        for s, (scale, colour) in enumerate(zip(study.scales, _colours(len(study.scales)))):
            values = [float(study.differences[name][s]) for name in names]
            axis.plot(range(len(names)), values, marker='o', markersize=3, color=colour, label=_times(scale))
        axis.axhline(0, color='0.5', linewidth=0.8, linestyle=':')
        stages = [study.units[name].stage for name in names]
        for i in range(1, len(names)):
            if stages[i] != stages[i - 1]:
                axis.axvline(i - 0.5, color='0.8', linewidth=0.8)
        axis.grid(axis='x', visible=False)
        axis.set_xticks(
            range(len(names)), names, rotation=45 if len(names) < 25 else 90, ha='right', rotation_mode='anchor'
        )
        axis.set_xlabel('SK unit, by depth')
        axis.set_ylabel(
            'mean attention difference\n' + (labels[0] if len(labels) == 1 else 'largest - smallest kernel')
        )
        _legend(figure, axis)
    return figure


def draw_classes(
    study: AttentionStudy, units: Sequence[str] | None = None, scales: Sequence[float] | None = None
) -> Figure:
    """Mean attention difference of each class, a panel per unit and a line per scale (Fig. 4).

    Args:
        study: the numbers, of images with classes.
        units: the units; :func:`~sk_plugins.analysis.study.typical_units` where None.
        scales: of the study's; 1 and 1.5 as in the paper where None and it has them, else the first and the last.

    Raises:
        ValueError: the images have no classes, or unknown units or scales.
    """
    if not study.class_images.any():
        raise ValueError('the images have no classes: there is no figure by class')
    names = _check(study, units)
    if scales is None:
        paper = (1.0, 1.5)
        ends = dict.fromkeys((study.scales[0], study.scales[-1]))
        scales = paper if set(paper) <= set(study.scales) else tuple(ends)
    for scale in scales:
        if scale not in study.scales:
            raise ValueError(f'scales has {scale!r}: choose from {", ".join(map(str, study.scales))}')
    present = study.class_images.nonzero().flatten().tolist()
    named = len(present) <= _MAX_NAMES
    with matplotlib.rc_context(_STYLE):
        width = min(max(4.2, 1.4 + 0.3 * len(present)), 9.0)
        figure = Figure(figsize=(width, 0.9 + 1.7 * len(names)), layout='constrained')
        axes = figure.subplots(len(names), 1, squeeze=False, sharex=True)[:, 0]
        for name, axis in zip(names, axes):
            for scale, colour in zip(scales, _colours(len(scales))):
                values = study.class_differences[name][study.scales.index(scale)][present].tolist()
                style = dict(marker='o', markersize=5, linestyle='none') if named else dict(linewidth=0.8)
                axis.plot(range(len(present)), values, color=colour, label=_times(scale), **style)
            axis.axhline(0, color='0.5', linewidth=0.8, linestyle=':')
            axis.set_title(name)
            axis.set_ylabel(study.label(name))
        if named:
            classes = [study.classes[i] for i in present]
            # The names are folders': a $ in one is no formula.
            style = dict(rotation=45, ha='right', rotation_mode='anchor', parse_math=False)
            axes[-1].set_xticks(range(len(present)), classes, **style)
        else:
            axes[-1].set_xlabel('class')
        figure.supylabel('mean attention difference', fontsize=9)
        _legend(figure, axes[0])
    return figure


def draw_field(study: AttentionStudy) -> Figure:
    """A unit's effective receptive field at every scale, with the disc that holds half of the gradient.

    Raises:
        ValueError: the study has none.
    """
    field = study.field
    if field is None:
        raise ValueError('the study has no effective receptive field: give study() a field_unit')
    # The part of the image that holds nearly all of it, the same at all scales.
    half = max(8.0, 1.1 * max(field.radius(0.98)))
    height, width = field.maps.shape[1:]
    row, column = field.centre
    edges = (-0.5 - column, width - 0.5 - column, height - 0.5 - row, -0.5 - row)
    columns = min(len(study.scales), 6)
    rows = -(-len(study.scales) // columns)
    norm = PowerNorm(0.5, vmin=0, vmax=float(field.maps.max()) or 1.0)
    with matplotlib.rc_context({**_STYLE, 'axes.grid': False, 'axes.spines.top': True, 'axes.spines.right': True}):
        figure = Figure(figsize=(2.0 * columns + 1.2, 2.3 * rows + 0.4), layout='constrained')
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        shown = None
        for axis in axes.flat[len(study.scales) :]:
            axis.set_axis_off()
        for axis, scale, values, radius in zip(axes.flat, study.scales, field.maps, field.radius()):
            shown = axis.imshow(values.numpy(), norm=norm, cmap='magma', interpolation='nearest', extent=edges)
            axis.add_patch(Circle((0, 0), radius, fill=False, edgecolor='white', linewidth=0.8))
            axis.set_xlim(max(-half, edges[0]), min(half, edges[1]))
            axis.set_ylim(min(half, edges[2]), max(-half, edges[3]))
            axis.set_title(f'{_times(scale)}: half within {radius:.1f} px')
        axes[-1, 0].set_xlabel('pixels from the centre')
        bar = figure.colorbar(shown, ax=axes, pad=0.01, aspect=25, label='share of the gradient')
        bar.set_ticks([0, norm.vmax / 4, norm.vmax], labels=['0', f'{norm.vmax / 4:.1e}', f'{norm.vmax:.1e}'])
        bar.minorticks_off()
        figure.suptitle(f'effective receptive field of {field.unit}', fontsize=9)
    return figure


def _unit_rows(study: AttentionStudy) -> Iterator[Sequence[Any]]:
    yield 'depth', 'unit', 'module', 'scale', 'kernel', 'attention', 'difference', 'deviation', 'images'
    for depth, (name, unit) in enumerate(study.units.items(), 1):
        shares = study.branches(name)
        for s, scale in enumerate(study.scales):
            difference, deviation = float(study.differences[name][s]), float(study.deviations[name][s])
            for label, share in zip(unit.labels, shares[s].tolist()):
                yield depth, name, unit.path, scale, label, share, difference, deviation, study.images


def _channel_rows(study: AttentionStudy) -> Iterator[Sequence[Any]]:
    yield 'unit', 'scale', 'kernel', 'channel', 'attention'
    for name, unit in study.units.items():
        for scale, branches in zip(study.scales, study.channels[name].tolist()):
            for label, values in zip(unit.labels, branches):
                yield from ((name, scale, label, channel, value) for channel, value in enumerate(values))


def _class_rows(study: AttentionStudy) -> Iterator[Sequence[Any]]:
    yield 'unit', 'scale', 'class', 'difference', 'images'
    for name in study.units:
        for scale, values in zip(study.scales, study.class_differences[name].tolist()):
            for label, value, images in zip(study.classes, values, study.class_images.tolist()):
                if images:
                    yield name, scale, label, value, images


def _field_rows(study: AttentionStudy) -> Iterator[Sequence[Any]]:
    field = study.field
    yield 'unit', 'scale', 'radius', 'share_within', 'images'
    rings = field.distances().flatten()
    for scale, images, values in zip(study.scales, field.images, field.maps.flatten(1)):
        within = torch.bincount(rings.ceil().long(), weights=values).cumsum(0)
        yield from ((field.unit, scale, radius, share, images) for radius, share in enumerate(within.tolist()))


def write(
    study: AttentionStudy, folder: str | os.PathLike, units: Sequence[str] | None = None, groups: int = 32
) -> list[Path]:
    """Draw a study into a folder as PNG and SVG, with its numbers as CSV: all of the files, or none.

    ``units.csv`` and ``attention_depth``, ``channels.csv`` and ``attention_channels``, where there are classes
    ``classes.csv`` and ``attention_classes``, where there is a receptive field ``receptive_field`` as all three. Those
    of them that the folder has from another study, and this one has not, are removed.

    Args:
        study: the numbers.
        folder: is made where there is none.
        units: the units in the figures by channel and by class; typical ones where None.
        groups: runs of channels in the figure by channel.

    Returns:
        The files' paths.

    Raises:
        ValueError: an unknown unit.
    """
    figures = {
        'attention_channels': draw_channels(study, units, groups),
        'attention_depth': draw_depth(study),
    }
    tables = {'units': _unit_rows(study), 'channels': _channel_rows(study)}
    if study.class_images.any():
        figures['attention_classes'] = draw_classes(study, units)
        tables['classes'] = _class_rows(study)
    if study.field is not None:
        figures['receptive_field'] = draw_field(study)
        tables['receptive_field'] = _field_rows(study)
    folder = Path(folder)
    names = [f'{name}.{kind}' for name in figures for kind in ('png', 'svg')] + [f'{name}.csv' for name in tables]
    with contextlib.ExitStack() as stack:
        partial = {name: stack.enter_context(write_atomically(folder / name)) for name in names}
        for name, figure in figures.items():
            with matplotlib.rc_context(_STYLE):
                figure.savefig(partial[f'{name}.png'], dpi=150)
                figure.savefig(partial[f'{name}.svg'], metadata={'Date': None})
        for name, rows in tables.items():
            _write_csv(partial[f'{name}.csv'], rows)
    for name in _FILES - set(names):
        (folder / name).unlink(missing_ok=True)
    return [folder / name for name in sorted(names)]


def _write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerows([f'{v:.7g}' if isinstance(v, float) else v for v in row] for row in rows)
