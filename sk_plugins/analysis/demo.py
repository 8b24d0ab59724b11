"""A page that shows what a classifier says of a picture, and which kernel each of its SK units chose; it needs gradio.

``tools/demo.py`` serves it, and writes the ``app.py`` of a Hub Space, which calls :func:`make_page`.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from .._resources import how_to_install
from .images import enlarge
from .recording import record, sk_units

__all__ = ['Explained', 'explain', 'make_page', 'name_classes']

COLOURS = ('#3b528b', '#21918c', '#5ec962', '#fde725')  # viridis


@dataclass(frozen=True)
class Explained:
    """What :func:`explain` finds.

    Attributes:
        scores: of each class, 0 to 1.
        seen: what the network saw of the picture, a square.
        shares: by SK unit its kernels' names and the mean of each one's attention over the channels; they add up to 1.
    """

    scores: dict[str, float]
    seen: Image.Image
    shares: dict[str, tuple[tuple[str, ...], list[float]]]


def name_classes(network: nn.Module) -> tuple[str, ...]:
    """The names of a network's classes, from its config or ImageNet; their numbers where there are none."""
    names = network.pretrained_cfg.get('label_names')
    if names:
        return tuple(names)
    subset = infer_imagenet_subset(network)
    if subset is None:
        return tuple(map(str, range(network.num_classes)))
    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(i) for i in range(network.num_classes))


@torch.inference_mode()
def explain(
    network: nn.Module,
    picture: Image.Image,
    scale: float = 1.0,
    classes: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    multi_label: bool = False,
) -> Explained:
    """What a network says of a picture whose middle is enlarged, and the attention of its SK units.

    Args:
        network: a classifier of timm's with SK units, in evaluation mode.
        picture: of any size and mode.
        scale: how many times its middle is enlarged, at least 1.
        classes: their names; :func:`name_classes` where None.
        preprocessing: timm's; the network's own where None.
        multi_label: whether a picture has any number of labels.

    Raises:
        ValueError: the network has no SK units that select, or ``scale`` is below 1.
    """
    if not scale >= 1:
        raise ValueError(f'scale={scale!r} must be at least 1')
    settings = preprocessing or timm.data.resolve_model_data_config(network)
    channels, size = settings['input_size'][0], settings['input_size'][-1]
    mode = 'L' if channels == 1 else 'RGB'
    seen = enlarge(picture.convert(mode), scale, size, settings['crop_pct'], settings['interpolation'])
    pixels = torch.frombuffer(bytearray(seen.tobytes()), dtype=torch.uint8).view(size, size, channels)
    mean, std = (torch.tensor(settings[name]).view(-1, 1, 1) for name in ('mean', 'std'))
    device = next(network.parameters()).device
    with record(network) as attention:
        logits = network(((pixels.permute(2, 0, 1) / 255 - mean) / std)[None].to(device)).float().cpu()
    scores = (logits.sigmoid() if multi_label else logits.softmax(1))[0]
    units = sk_units(network)
    shares = {name: (units[name].labels, values[0].mean(-1).tolist()) for name, values in attention.items()}
    return Explained(dict(zip(classes or name_classes(network), scores.tolist())), seen, shares)


def draw_shares(found: Explained, at_one: Explained | None = None) -> str:
    """A table in HTML: each unit's bar, the largest kernel's share, and how far it moved from that of ``at_one``."""
    kernels = list(dict.fromkeys(label for labels, _ in found.shares.values() for label in labels))
    colours = dict(zip(kernels, COLOURS))
    legend = ' '.join(f'<span style="color:{colours.get(name)}">&#9632;</span> {html.escape(name)}' for name in kernels)
    rows = []
    for unit, (labels, values) in found.shares.items():
        bars = ''.join(
            f'<div style="width:{100 * value:.1f}%;background:{colours.get(label)}"></div>'
            for label, value in zip(labels, values)
        )
        moved = '' if at_one is None else f'{100 * (values[-1] - at_one.shares[unit][1][-1]):+.1f}'
        rows.append(
            f'<tr data-unit="{html.escape(unit)}"><td>{html.escape(unit)}</td>'
            f'<td style="width:50%"><div style="display:flex;height:12px">{bars}</div></td>'
            f'<td class="share">{100 * values[-1]:.1f}&nbsp;%</td><td class="moved">{moved}</td></tr>'
        )
    head = f'<tr><th>unit</th><th>{legend}</th><th>{html.escape(kernels[-1])}</th><th>moved</th></tr>'
    return f'<table class="attention" style="width:100%">{head}{"".join(rows)}</table>'


def make_page(
    network: nn.Module,
    title: str = '',
    classes: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
    multi_label: bool = False,
) -> Any:
    """A ``gradio.Blocks``: drop a picture, see its classes and the attention of every unit, and enlarge its middle.

    Args:
        network: a classifier of timm's with SK units.
        title: what stands above it.
        classes, preprocessing, multi_label: as in :func:`explain`.

    Raises:
        ModuleNotFoundError: gradio is not installed.
        ValueError: the network has no SK units.
    """
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'the demo page takes gradio: {how_to_install("demo")}', name='gradio') from error
    record(network)  # raises where there is nothing to show
    network = network.eval()
    classes = classes or name_classes(network)

    def show(picture: Image.Image | None, scale: float) -> tuple[Any, Any, str]:
        if picture is None:
            return None, None, ''
        found, at_one = (
            explain(network, picture, value, classes, preprocessing, multi_label) for value in (scale, 1.0)
        )
        return found.scores, found.seen, draw_shares(found, at_one)

    with gradio.Blocks(title=title or 'Selective kernels', analytics_enabled=False) as page:
        gradio.Markdown(f'# {title or "Selective kernels"}\nWhich kernel each unit chooses, as the object grows.')
        with gradio.Row():
            with gradio.Column():
                picture = gradio.Image(type='pil', label='picture', height=240, elem_id='picture')
                scale = gradio.Slider(1, 2, 1, step=0.05, label='the middle, enlarged', elem_id='scale')
                seen = gradio.Image(
                    type='pil', label='what the network sees', height=240, interactive=False, elem_id='seen'
                )
            with gradio.Column():
                label = gradio.Label(num_top_classes=5, label='classes', elem_id='classes')
                attention = gradio.HTML(elem_id='attention')
        outputs = [label, seen, attention]
        picture.change(show, [picture, scale], outputs, show_progress='hidden')
        scale.change(show, [picture, scale], outputs, show_progress='hidden')
    return page
