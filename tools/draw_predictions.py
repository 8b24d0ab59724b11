"""Draw what a detector or segmentor says of the first images of its config's test set, beside the truth.

python tools/draw_predictions.py CONFIG CHECKPOINT predictions.png --count 12

One picture of all: detections with class and score, the true boxes dashed; of a segmentation the image, the truth and
the prediction, one below the other. `tools/test.py --show-dir` writes one file an image.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from _arguments import Parser
from _common import add_common_arguments, load_config, run
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from mmengine.config import Config
from mmengine.structures import BaseDataElement
from PIL import Image

from sk_plugins.openmmlab.runtime.runner import build_runner
from sk_plugins.weights import load_checkpoint
from sk_plugins.weights.fit import load_strictly

CELL = 2.2  # inches
KINDS = ('pred_instances', 'pred_sem_seg')


def predict(cfg: Config, checkpoint: str, count: int) -> tuple[list[dict[str, Any]], list[BaseDataElement], dict]:
    """Of the first ``count`` test images what is known and what is predicted, and the classes with their palette.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        CheckpointError: weights that are not this network's.
        ValueError: the config is neither a detector's nor a segmentor's.
    """
    state_dict, _ = load_checkpoint(checkpoint)
    cfg.load_from = None
    runner = build_runner(cfg)
    load_strictly(runner.model, state_dict, checkpoint)
    runner.model.eval()
    loader = runner.build_dataloader(cfg.test_dataloader)
    samples = []
    with torch.inference_mode():
        for batch in loader:
            samples += runner.model.test_step(batch)
            if len(samples) >= count:
                break
    samples = samples[:count]
    if not all(any(kind in sample for kind in KINDS) for sample in samples):
        raise ValueError(f'{cfg.filename}: predicts none of {", ".join(KINDS)}, so there is nothing to draw')
    dataset = loader.dataset
    meta = dict(dataset.metainfo)
    if not meta.get('palette'):
        colors = plt.get_cmap('hsv')(np.linspace(0, 1, len(meta['classes']), endpoint=False))
        meta['palette'] = (255 * colors[:, :3]).round().astype(int).tolist()
    return [dataset.get_data_info(i) for i in range(len(samples))], samples, meta


def draw_boxes(axis: Axes, info: dict[str, Any], sample: BaseDataElement, meta: dict, threshold: float) -> None:
    """The detections of at least ``threshold``, the surest on top; the true boxes dashed. Colours are the classes'."""
    palette = np.array(meta['palette']) / 255
    for instance in info.get('instances', ()):
        _box(axis, instance['bbox'], edgecolor=palette[instance['bbox_label']], linestyle='--', linewidth=1.2)
    found = sample.pred_instances
    for score, box, label in sorted(zip(found.scores.tolist(), found.bboxes.tolist(), found.labels.tolist())):
        if score < threshold:
            continue
        color = palette[label]
        _box(axis, box, edgecolor=color, linewidth=1.2)
        text = f'{meta["classes"][label]} {score:.0%}'
        axis.text(box[0], box[1], text, fontsize=5, color='white', va='bottom', clip_on=True, bbox=_label(color))


def _box(axis: Axes, box: Sequence[float], **kwargs) -> None:
    left, top, right, bottom = box
    axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, **kwargs))


def _label(color: np.ndarray) -> dict[str, Any]:
    return dict(facecolor=color, edgecolor='none', pad=0.5)


def draw(
    infos: list[dict], samples: list[BaseDataElement], meta: dict, columns: int = 6, threshold: float = 0.3
) -> Figure:
    """A grid of the images, in a row for a detector; for a segmentor also the truth, if there is one, and the maps."""
    boxes = 'pred_instances' in samples[0]
    maps = [] if boxes else [name for name in ('gt_sem_seg', 'pred_sem_seg') if name in samples[0]]
    high = 1 + len(maps)
    columns = min(columns, len(samples))
    rows = -(-len(samples) // columns) * high
    figure, axes = plt.subplots(rows, columns, figsize=(CELL * columns, CELL * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis('off')
    palette = np.array(meta['palette'], dtype=np.uint8)
    drawn: set[int] = set()
    for i, (info, sample) in enumerate(zip(infos, samples)):
        cells = axes[i // columns * high :, i % columns]
        cells[0].imshow(Image.open(info['img_path']).convert('RGB'))
        if boxes:
            draw_boxes(cells[0], info, sample, meta, threshold)
            continue
        for cell, name in zip(cells[1:], maps):
            classes = sample.get(name).data.squeeze(0).cpu().numpy()
            drawn |= set(np.unique(classes).tolist())
            # Ignored pixels, 255, are white.
            cell.imshow(np.vstack([palette, [[255] * 3]])[np.minimum(classes, len(palette))].astype(np.uint8))
    figure.tight_layout(pad=0.2)
    if not boxes:
        named = enumerate(zip(meta['classes'], palette))
        handles = [Patch(color=color / 255, label=name) for k, (name, color) in named if k in drawn]
        figure.legend(handles=handles, ncols=6, fontsize=6, loc='upper center', bbox_to_anchor=(0.5, 0))
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add_common_arguments(parser)
    parser.add_argument('checkpoint', help='a checkpoint of mmengine')
    parser.add_argument('picture', type=Path, help='.png, .pdf, .svg, ...')
    parser.add_argument('--count', type=int, default=12, help='images to draw, the first of them (default: 12)')
    parser.add_argument('--threshold', type=float, default=0.3, help='least score of a box to draw (default: 0.3)')
    args = parser.parse_args(argv)
    if args.amp or args.launcher != 'none':
        parser.error(
            '--amp and --launcher are for training and testing: predictions are drawn by one process in float32'
        )
    if args.count < 1:
        parser.error(f'argument --count: {args.count} must be at least 1')
    if not 0 <= args.threshold <= 1:
        parser.error(f'argument --threshold: {args.threshold} must be from 0 to 1')
    kinds = FigureCanvasBase.get_supported_filetypes()
    if args.picture.suffix.lower().removeprefix('.') not in kinds:
        parser.error(f'argument picture: {args.picture} must end in one of {", ".join(f".{kind}" for kind in kinds)}')
    if not args.picture.parent.is_dir():
        parser.error(f'argument picture: {args.picture.parent} is no folder')
    figure = draw(*predict(load_config(args), args.checkpoint, args.count), threshold=args.threshold)
    figure.savefig(args.picture, dpi=100, bbox_inches='tight')
    print(f'drawn: {args.picture}')


if __name__ == '__main__':
    run(main)
