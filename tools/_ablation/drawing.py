"""The plots: every network's top-1, and the attention of every unit."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .comparing import by_network
from .networks import NETWORKS, SELECTED
from .rows import Row


def draw_accuracy(rows: Sequence[Row], path: Path) -> None:
    """Top-1 of every network: a dot for each seed, a stroke for the mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 0.35 * len(NETWORKS) + 1), layout='constrained')
    axes = figure.subplots()
    networks = by_network(rows)
    for position, (name, values) in enumerate(networks.items()):
        color = 'tab:orange' if name == SELECTED else 'tab:blue'
        axes.plot(list(values.values()), [position] * len(values), 'o', color=color, alpha=0.6, markersize=5)
        mean = np.mean(list(values.values()))
        axes.plot([mean] * 2, [position - 0.3, position + 0.3], color=color, linewidth=2.5)
    if SELECTED in networks:
        axes.axvline(np.mean(list(networks[SELECTED].values())), color='grey', linewidth=0.8, linestyle=':')
    axes.set_yticks(range(len(networks)), networks)
    axes.invert_yaxis()
    axes.set_xlabel('top-1 on scaled Fashion-MNIST, %')
    axes.spines[['top', 'right']].set_visible(False)
    figure.savefig(path, dpi=110)


def draw_attention(attention: Sequence[Row], strip: np.ndarray, path: Path) -> None:
    """Attention against the scale: ``strip`` (S, 64, 64), one garment at every scale, above a panel for each unit."""
    from matplotlib.figure import Figure

    scales = attention[0]['scales']
    units = list(attention[0]['units'])
    figure = Figure(figsize=(1.1 * len(scales), 6.2), layout='constrained')
    above, below = figure.subfigures(2, 1, height_ratios=[1, 3.4])
    for axes, image, scale in zip(above.subplots(1, len(scales)), strip, scales):
        axes.imshow(image, cmap='gray', vmin=0, vmax=255)
        axes.set_title(f'{scale:g}x', fontsize=9)
        axes.axis('off')
    panels = below.subplots(2, -(-len(units) // 2), sharex=True, sharey=True, squeeze=False)
    # Units go down the columns, so that each column is a stage of two units.
    for axes, unit in zip(panels.T.flat, units):
        curves = np.array([row['units'][unit]['curve'] for row in attention])
        axes.plot(scales, curves.T, color='tab:blue', alpha=0.35, linewidth=1)
        axes.plot(scales, curves.mean(0), color='tab:blue', linewidth=2)
        rho = np.mean([row['units'][unit]['rho'] for row in attention])
        axes.set_title(f'{unit}   mean rho {rho:+.2f}', fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[['top', 'right']].set_visible(False)
    below.supxlabel("the garment's scale", fontsize=9)
    below.supylabel('attention, 5x5 minus 3x3', fontsize=9)
    figure.savefig(path, dpi=110)
