"""Load a network trained by configs/sknet_digits.py through timm, and classify held-out digits with it.

python tools/classify_digits.py work_dirs/sknet_digits/epoch_20.pth

Turns the checkpoint into a Hub folder, loads that with timm.create_model('local-dir:...'), prints each image's label
and the network's answer, and draws them in digits.png beside the checkpoint; wrong answers to others follow.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import timm
import torch
from _arguments import Parser
from _common import run
from convert_checkpoint import convert
from matplotlib.figure import Figure
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor

from sk_plugins.openmmlab.datasets import Digits

MOST_WRONG = 8  # answers that are printed and drawn besides those of the first images


def classify(folder: Path, images: list) -> Tensor:
    """Class probabilities, (number of images, 10), of the network in a Hub folder, with its own preprocessing."""
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    transform = create_transform(**resolve_data_config(model.pretrained_cfg))
    batch = torch.stack([transform(Image.fromarray(image)) for image in images])
    with torch.inference_mode():
        return model(batch).softmax(1)


def draw(images: list, labels: list[int], scores: Tensor, columns: int = 8) -> Figure:
    """The images with label and answer above each, wrong answers in red."""
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.4 * columns, 1.7 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis('off')
    for axis, image, label, score in zip(axes.flat, images, labels, scores):
        answer = int(score.argmax())
        axis.imshow(image, cmap='gray_r')
        color = 'black' if answer == label else 'red'
        axis.set_title(f'{label} → {answer} ({score.max():.0%})', fontsize=9, color=color)
    figure.tight_layout()
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument('checkpoint', type=Path)
    parser.add_argument('--count', type=int, default=16, help='images to print and draw (default: 16)')
    args = parser.parse_args(argv)
    if args.count < 1:
        parser.error(f'argument --count: {args.count} must be at least 1')
    test = Digits('test')
    samples = [test.get_data_info(i) for i in range(len(test))]
    images, labels = [s['img'] for s in samples], [s['gt_label'] for s in samples]
    with tempfile.TemporaryDirectory() as folder:
        convert(args.checkpoint, Path(folder), 'hub', config='sknet_digits')
        scores = classify(Path(folder), images)
    accuracy = (scores.argmax(1) == torch.tensor(labels)).float().mean().item()
    for i in range(min(args.count, len(images))):
        print(f'held-out image {i:3d}: label {labels[i]}, answer {int(scores[i].argmax())} ({scores[i].max():.1%})')
    wrong = [i for i in range(args.count, len(images)) if int(scores[i].argmax()) != labels[i]]
    for i in wrong[:MOST_WRONG]:
        print(f'wrong, image {i:3d}: label {labels[i]}, answer {int(scores[i].argmax())} ({scores[i].max():.1%})')
    print(f'top-1 through timm, {len(images)} held-out images: {accuracy:.2%}')
    picture = args.checkpoint.parent / 'digits.png'
    chosen = [*range(min(args.count, len(images))), *wrong[:MOST_WRONG]]
    draw([images[i] for i in chosen], [labels[i] for i in chosen], scores[chosen]).savefig(picture, dpi=120)
    print(f'drawn: {picture}')


if __name__ == '__main__':
    run(main)
