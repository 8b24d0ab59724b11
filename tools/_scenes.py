"""Scenes: garments of Fashion-MNIST pasted into photographs, and what COCO says of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image
from scipy.ndimage import binary_fill_holes

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
