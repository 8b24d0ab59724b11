"""Make data/scenes, for detection and segmentation: Fashion-MNIST's garments pasted into photographs.

python tools/prepare_fashion_mnist.py  # or leave data/fashion_mnist to mmpretrain, which downloads it
pip install '.[scenes]'
python tools/prepare_scenes.py

Garments of random sizes lie at random places, tinted, over random crops of photographs that scikit-image and
scikit-learn ship. Validation has the garments of Fashion-MNIST's test set, and other photographs. Into the folder go
images/{train,val}/*.jpg, annotations/instances_{train,val}.json (COCO: boxes, RLE masks) and masks/{train,val}/*.png
(0 the background, 1 to 10 the garment's class) and kinds/{train,val}/*.png (0, and 1 to 5 for top, trousers, dress,
shoe and bag), the same for the same arguments. An annotation says which garment of Fashion-MNIST it is, an image which
photograph. For a classifier there are garments/{train,val}/*.jpg, each garment as it lies in its scene, with their
classes, 0 to 9, in annotations/garments_{train,val}.txt.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
from _arguments import Parser
from _common import run
from _quiet import quiet_imports
from _scenes import PHOTOGRAPHS, SIZES, annotate, close_up, compose, load_photographs
from PIL import Image

from sk_plugins._files import write_atomically
from sk_plugins._resources import how_to_install

with quiet_imports():
    from mmpretrain.datasets import FashionMNIST

# Coarser than Fashion-MNIST's classes, in whose order the second is: at this size a shirt passes for a pullover.
KINDS = ('top', 'trousers', 'dress', 'shoe', 'bag')
KIND_OF_CLASS = ('top', 'trousers', 'top', 'dress', 'top', 'shoe', 'top', 'shoe', 'bag', 'shoe')
PACKAGES = {'skimage': 'scikit-image', 'sklearn': 'scikit-learn', 'pycocotools': 'pycocotools'}


def load_garments(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Fashion-MNIST's images, (N, 28, 28) uint8, and labels, (N,), of its training or ('val') test set.

    Raises:
        OSError: it is not there, nor can it be downloaded.
        ValueError: a file is not Fashion-MNIST's.
    """
    test = split == 'val'
    try:
        data = FashionMNIST(data_root=str(root), split='test' if test else 'train', test_mode=test)
    except OSError as error:
        raise OSError(
            f'--garments {root}: is not there and cannot be downloaded ({error}): see tools/prepare_fashion_mnist.py'
        ) from error
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f'--garments {root}: is not Fashion-MNIST: {error}') from error
    samples = [data.get_data_info(i) for i in range(len(data))]
    return np.stack([s['img'] for s in samples]), np.array([s['gt_label'] for s in samples], dtype=np.int64)


def write_split(folder: Path, split: str, count: int, garments: Path, size: int, seed: int) -> None:
    """``count`` scenes of a split into ``folder``; the first of them are the same whatever the count."""
    images, labels = load_garments(garments, split)
    photographs = load_photographs(PHOTOGRAPHS[split])
    coco = dict(
        images=[],
        annotations=[],
        categories=[dict(id=i + 1, name=name) for i, name in enumerate(FashionMNIST.METAINFO['classes'])],
    )
    kinds = np.array([0, *(KINDS.index(kind) + 1 for kind in KIND_OF_CLASS)], dtype=np.uint8)
    listed = []
    for part in ('images', 'masks', 'kinds', 'garments'):
        (folder / part / split).mkdir(parents=True)
    for i in range(count):
        rng = np.random.default_rng([seed, list(PHOTOGRAPHS).index(split), i])
        name = str(rng.choice(list(photographs)))
        scene, pasted = compose(photographs[name], images, labels, size, rng)
        classes = np.zeros((size, size), dtype=np.uint8)
        for garment in pasted:
            classes[garment.mask] = garment.label + 1
        stem = f'{i:06d}'
        picture = Image.fromarray(scene)
        picture.save(folder / 'images' / split / f'{stem}.jpg', quality=95)
        Image.fromarray(classes).save(folder / 'masks' / split / f'{stem}.png')
        Image.fromarray(kinds[classes]).save(folder / 'kinds' / split / f'{stem}.png')
        coco['images'].append(dict(id=i + 1, file_name=f'{stem}.jpg', width=size, height=size, photograph=name))
        for garment in pasted:
            annotation = annotate(garment, i + 1, len(coco['annotations']) + 1)
            coco['annotations'].append(annotation)
            name = f'{annotation["id"]:06d}.jpg'
            close_up(picture, annotation['bbox']).save(folder / 'garments' / split / name, quality=95)
            listed.append(f'{name} {garment.label}\n')
    path = folder / 'annotations' / f'instances_{split}.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(coco))
    (path.parent / f'garments_{split}.txt').write_text(''.join(listed))


def prepare(out: Path, garments: Path, train: int, val: int, size: int, seed: int) -> None:
    """Write the scenes to ``out``, all of them or nothing.

    Raises:
        FileExistsError: ``out`` is there already.
        ModuleNotFoundError: a package of the extra ``scenes`` is not installed.
        ValueError: an argument out of its range.
    """
    for name, value, low, high in (
        ('train', train, 1, 1_000_000),
        ('val', val, 1, 1_000_000),
        ('size', size, *SIZES),
        ('seed', seed, 0, 2**32 - 1),
    ):
        if not low <= value <= high:
            raise ValueError(f'--{name} {value}: must be from {low} to {high}')
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(f'scenes need {", ".join(missing)}: {how_to_install("scenes")}')
    if out.exists():
        raise FileExistsError(f'--out {out}: is there already; remove it, or name another folder')
    with write_atomically(out, folder=True) as folder:
        for split, count in (('train', train), ('val', val)):
            write_split(folder, split, count, garments, size, seed)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument('--out', type=Path, default=Path('data/scenes'), help='folder to make (default: data/scenes)')
    parser.add_argument(
        '--garments',
        type=Path,
        default=Path('data/fashion_mnist'),
        help="Fashion-MNIST's folder, downloaded where it is missing (default: data/fashion_mnist)",
    )
    parser.add_argument('--train', type=int, default=12000, help='scenes to train on (default: 12000)')
    parser.add_argument('--val', type=int, default=300, help='held-out scenes (default: 300)')
    parser.add_argument('--size', type=int, default=128, help='side of a scene in pixels, 64 to 300 (default: 128)')
    parser.add_argument('--seed', type=int, default=0, help='default: 0')
    args = parser.parse_args(argv)
    prepare(args.out, args.garments, args.train, args.val, args.size, args.seed)
    print(args.out)


if __name__ == '__main__':
    run(main)
