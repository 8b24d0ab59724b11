"""A picture with what is said of it, and beside it what each SK unit chose and where the network looked."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from sk_plugins._files import write_atomically
from sk_plugins._resources import how_to_install
from sk_plugins.analysis import sk_units

__all__ = ['Maps', 'draw', 'unit_shares']


class Maps:
    """Class-activation maps of the last feature map, by Grad-CAM (Selvaraju et al., 2017): the library grad-cam's.

    Args:
        network: a model of timm's.

    Raises:
        ValueError: the library is not installed.
    """

    def __init__(self, network: nn.Module) -> None:
        if importlib.util.find_spec('pytorch_grad_cam') is None:
            raise ValueError(f'--cam: grad-cam, which draws it, is not installed: {how_to_install("cam")}')
        from pytorch_grad_cam import GradCAM

        layer = network.get_submodule(network.feature_info[-1]['module'])
        self._cam = GradCAM(model=network, target_layers=[layer])

    def __call__(self, images: Tensor, classes: Sequence[int]) -> np.ndarray:
        """Images (B, 3, H, W) and a class for each to (B, H, W) of 0 to 1."""
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        with torch.enable_grad():
            return self._cam(input_tensor=images, targets=[ClassifierOutputTarget(i) for i in classes])


def unit_shares(network: nn.Module, attention: Mapping[str, Tensor]) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """By unit its kernels' names and, (B, M), the mean of each one's attention over the channels."""
    units = sk_units(network)
    return {name: (units[name].labels, values.mean(-1).cpu().numpy()) for name, values in attention.items()}


def draw(
    path: Path,
    picture: Image.Image,
    title: str,
    attention: Mapping[str, tuple[tuple[str, ...], np.ndarray]] | None = None,
    seen: np.ndarray | None = None,
    cam: np.ndarray | None = None,
) -> None:
    """Write a PNG.

    Args:
        path: of the file.
        picture: as it is.
        title: what is said of it.
        attention: by unit, its kernels' names and their (M,) shares, which add up to 1.
        seen: (H, W, 3) of 0 to 1, what the network saw of the picture.
        cam: (H, W), the class-activation map of it.
    """
    panels = 1 + (attention is not None) + (cam is not None)
    figure = Figure(figsize=(3.6 * panels, 4))
    axes = figure.subplots(1, panels, squeeze=False)[0]
    axes[0].imshow(picture)
    axes[0].set_title(title, fontsize=8, parse_math=False)
    axes[0].axis('off')
    if cam is not None and seen is not None:
        axes[1].imshow(seen)
        axes[1].imshow(cam, cmap='jet', alpha=0.45, vmin=0, vmax=1)
        axes[1].set_title('class-activation map', fontsize=8)
        axes[1].axis('off')
    if attention is not None:
        _draw_attention(axes[-1], attention)
    figure.tight_layout()
    with write_atomically(path) as partial:
        figure.savefig(partial, dpi=110, bbox_inches='tight', format='png')


def _draw_attention(axis: Axes, attention: Mapping[str, tuple[tuple[str, ...], Any]]) -> None:
    kernels = list(dict.fromkeys(label for labels, _ in attention.values() for label in labels))
    colours = colormaps['viridis'](np.linspace(0.1, 0.85, max(2, len(kernels))))
    rows = range(len(attention))
    left = np.zeros(len(attention))
    for kernel, colour in zip(kernels, colours):
        shares = np.array([dict(zip(labels, values)).get(kernel, 0.0) for labels, values in attention.values()])
        axis.barh(rows, shares, left=left, color=colour, label=kernel)
        left += shares
    axis.set_yticks(rows, list(attention), fontsize=6)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.axvline(0.5, color='white', linewidth=0.7)
    axis.set_title('attention, mean over channels', fontsize=8)
    axis.legend(fontsize=6, loc='lower right')
