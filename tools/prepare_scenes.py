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

import argparse
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _common import run
from mmpretrain.datasets import FashionMNIST
from numpy.random import Generator
from PIL import Image
from scipy.ndimage import binary_fill_holes

from sk_plugins._files import write_atomically
from sk_plugins._resources import how_to_install

# By their names in skimage.data, or in sklearn.datasets where they end in .jpg: those that need no download. The held
# out ones are free of conditions (public domain, CC0), so that pictures of predictions can be shown.
PHOTOGRAPHS = {
    'train': (
        'astronaut',
        'brick',
        'camera',
        'china.jpg',
        'coins',
        'flower.jpg',
        'grass',
        'hubble_deep_field',
        'immunohistochemistry',
        'moon',
        'stereo_motorcycle',
    ),
    'val': ('chelsea', 'coffee', 'gravel', 'rocket'),
}
# Coarser than Fashion-MNIST's classes, in whose order the second is: at this size a shirt passes for a pullover.
KINDS = ('top', 'trousers', 'dress', 'shoe', 'bag')
KIND_OF_CLASS = ('top', 'trousers', 'top', 'dress', 'top', 'shoe', 'top', 'shoe', 'bag', 'shoe')
PACKAGES = {'skimage': 'scikit-image', 'sklearn': 'scikit-learn', 'pycocotools': 'pycocotools'}
SIZES = (64, 300)  # 300 is the shortest side of the photographs
MAX_GARMENTS = 4
DARKEST = 16  # of a garment's 0..255: below is noise around it
GARMENT_SIZES = (0.3, 0.6)  # of the scene's side
CLOSE_UP = 64  # pixels
MARGIN = 1.25  # of a close-up's side to the garment's longer one
MAX_HIDDEN = 0.25  # of a garment's pixels, by those pasted after it
TRIES = 20


@dataclass
class Garment:
    """One that lies in a scene: its class 0 to 9, its number in Fashion-MNIST, and what is seen of it, (H, W)."""

    label: int
    index: int
    mask: np.ndarray
    area: int


def load_photographs(names: Sequence[str]) -> dict[str, np.ndarray]:
    """The photographs, (H, W, 3) uint8 RGB each, grey ones with three equal channels."""
    import skimage.data
    from sklearn.datasets import load_sample_image

    photographs = {}
    for name in names:
        load = partial(load_sample_image, name) if name.endswith('.jpg') else getattr(skimage.data, name)
        image = load()
        image = image[0] if isinstance(image, tuple) else image  # of the stereo pair the left
        photographs[name] = np.asarray(Image.fromarray(image).convert('RGB'))
    return photographs


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


def crop(photograph: np.ndarray, size: int, rng: Generator) -> np.ndarray:
    """A random square of a photograph, perhaps mirrored, in the scene's size: (size, size, 3)."""
    height, width, _ = photograph.shape
    side = int(rng.integers(size, min(height, width), endpoint=True))
    top, left = int(rng.integers(height - side, endpoint=True)), int(rng.integers(width - side, endpoint=True))
    square = photograph[top : top + side, left : left + side][:, :: rng.choice([-1, 1])]
    return np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.BOX))


def cut_out(image: np.ndarray, side: int, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """A garment, (28, 28) uint8, tinted and scaled: its light on black, (side, side, 3), and its opacity in 0..1."""
    silhouette = binary_fill_holes(image >= DARKEST).astype(np.uint8)
    grey, opacity = (
        np.asarray(Image.fromarray(plane).resize((side, side), Image.Resampling.BILINEAR), dtype=np.float64)
        for plane in (image * silhouette, 255 * silhouette)
    )
    mirror = rng.choice([-1, 1])
    return grey[:, ::mirror, None] * rng.uniform(0.5, 1.0, 3), opacity[:, ::mirror] / 255


def compose(
    photograph: np.ndarray, images: np.ndarray, labels: np.ndarray, size: int, rng: Generator
) -> tuple[np.ndarray, list[Garment]]:
    """A scene, (size, size, 3) uint8, and the garments in it, one to ``MAX_GARMENTS``, the topmost last."""
    scene = crop(photograph, size, rng).astype(np.float64)
    garments = []
    for _ in range(rng.integers(1, MAX_GARMENTS, endpoint=True)):
        index = int(rng.integers(len(images)))
        side = round(size * np.exp(rng.uniform(*np.log(GARMENT_SIZES))))
        light, opacity = cut_out(images[index], side, rng)
        for _ in range(TRIES):
            top, left = rng.integers(size - side, size=2, endpoint=True)
            place = (slice(top, top + side), slice(left, left + side))
            mask = np.zeros((size, size), dtype=bool)
            mask[place] = opacity >= 0.5
            if all((g.mask & ~mask).sum() >= (1 - MAX_HIDDEN) * g.area for g in garments):
                break
        else:
            continue
        for garment in garments:
            garment.mask &= ~mask
        garments.append(Garment(int(labels[index]), index, mask, int(mask.sum())))
        scene[place] = scene[place] * (1 - opacity[..., None]) + light
    return scene.round().clip(0, 255).astype(np.uint8), garments


def annotate(garment: Garment, image_id: int, annotation_id: int) -> dict[str, Any]:
    """COCO's annotation of a garment."""
    from pycocotools import mask as coco_mask

    rle = coco_mask.encode(np.asfortranarray(garment.mask, dtype=np.uint8))
    return dict(
        id=annotation_id,
        image_id=image_id,
        category_id=garment.label + 1,
        garment=garment.index,
        bbox=coco_mask.toBbox(rle).tolist(),
        area=int(coco_mask.area(rle)),
        segmentation=dict(size=rle['size'], counts=rle['counts'].decode('ascii')),
        iscrowd=0,
    )


def close_up(scene: Image.Image, box: Sequence[float]) -> Image.Image:
    """A square around COCO's ``box`` in it, ``CLOSE_UP`` pixels wide, black outside of the scene."""
    left, top, width, height = box
    x, y, half = left + width / 2, top + height / 2, MARGIN * max(width, height) / 2
    square = scene.crop((round(x - half), round(y - half), round(x + half), round(y + half)))
    return square.resize((CLOSE_UP, CLOSE_UP), Image.Resampling.BILINEAR)


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
