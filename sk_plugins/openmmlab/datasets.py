"""The project's own datasets and a crop, in mmpretrain's ``DATASETS`` and ``TRANSFORMS``."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmcv.transforms import BaseTransform
from mmpretrain.datasets import BaseDataset, FashionMNIST
from mmpretrain.registry import DATASETS, TRANSFORMS
from torch import Tensor

from .._arguments import check_integer, check_positive
from ..networks.simclr import preprocess

__all__ = ['Digits', 'ScaledFashionMNIST', 'SimCLRCrop']


@DATASETS.register_module()
class Digits(BaseDataset):
    """scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels in ten classes, part of its package.

    The split is fixed: 1,437 for training and 360 held out, as many of each class. Nothing is downloaded.

    Args:
        split: 'train' or 'test'.
        pipeline: transforms; they get ``img``, (8, 8) uint8 of 0 to 255, and ``gt_label``.
        **kwargs: further arguments of mmpretrain's ``BaseDataset``.

    Raises:
        ValueError: an unknown ``split``.
    """

    METAINFO = {'classes': tuple('0123456789')}
    NUM_TEST = 360

    def __init__(self, split: str, pipeline: list[dict[str, Any]] | tuple = (), **kwargs) -> None:
        if split not in ('train', 'test'):
            raise ValueError(f"split={split!r} is unknown: choose 'train' or 'test'")
        self.split = split
        super().__init__(ann_file='', pipeline=pipeline, test_mode=split == 'test', **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        # Only this dataset needs scikit-learn, and it is slow to import.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images = (digits.images * (255 / 16)).round().astype(np.uint8)
        parts = train_test_split(
            np.arange(len(images)), test_size=self.NUM_TEST, stratify=digits.target, random_state=0
        )
        chosen = np.sort(parts[self.split == 'test'])
        return [dict(img=images[i], gt_label=int(digits.target[i])) for i in chosen]


@DATASETS.register_module()
class ScaledFashionMNIST(FashionMNIST):
    """Fashion-MNIST's garments at a random size and place on a textured canvas of 64x64 pixels, made on the fly.

    A garment has sides of 28 times its scale, which is uniform within ``scale``, lies wholly on the canvas, and hides
    the texture where it is not black. Scale, place and texture follow from ``seed``, the split and the garment's number
    alone, and of them only the scale, and with it the room for the place, depends on ``scale``: two sets that differ
    in ``scale`` show the same garments at corresponding places on the same textures.

    Args:
        data_root: folder of Fashion-MNIST's files, filled from the net where they are missing, or by
            ``tools/prepare_fashion_mnist.py``.
        split: 'train' (60,000 garments) or 'test' (10,000).
        scale: least and greatest scale of a garment; at 1 it has its 28x28 pixels, at 64 / 28 it fills the canvas.
        seed: of the scales, places and textures.
        **kwargs: further arguments of mmpretrain's ``FashionMNIST``: ``pipeline``, ``indices``, ... Transforms get
            ``img``, (64, 64) uint8, ``gt_label``, ``object_scale`` and ``object_box``: left, top, right and bottom in
            pixels.

    Raises:
        ValueError: an unknown ``split``, a ``scale`` that is no such range, or a ``seed`` below 0.
    """

    SIZE = 64
    MIN_SCALE = 0.25

    def __init__(
        self,
        data_root: str,
        split: str = 'train',
        scale: Sequence[float] = (0.6, 2.0),
        seed: int = 0,
        **kwargs,
    ) -> None:
        if split not in ('train', 'test'):
            raise ValueError(f"split={split!r} is unknown: choose 'train' or 'test'")
        self.scale = _scale_range(scale, self.MIN_SCALE, self.SIZE / 28)
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise ValueError(f'seed={seed!r} must be an integer of at least 0')
        self.seed = seed
        kwargs.setdefault('test_mode', split == 'test')
        super().__init__(data_root=data_root, split=split, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        return [{**info, 'garment': number} for number, info in enumerate(super().load_data_list())]

    def get_data_info(self, idx: int) -> dict[str, Any]:
        info = super().get_data_info(idx)
        canvases, boxes = self._place([info], self.scale, 0)
        box = boxes[0].tolist()
        return {**info, 'img': canvases[0], 'object_scale': (box[2] - box[0]) / 28, 'object_box': box}

    def batch(
        self, indices: Sequence[int], scale: Sequence[float] | None = None, draw: int = 0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A batch of images, without the pipeline: canvases (N, 64, 64) uint8, labels (N,), boxes (N, 4).

        ``scale`` replaces the data set's own. Every ``draw`` places all garments elsewhere; 0 is the one
        that the set's items show.

        Raises:
            ValueError: no indices, or a ``scale`` that is no such range.
        """
        if len(indices) == 0:
            raise ValueError('indices is empty: it must name at least one garment')
        scale = self.scale if scale is None else _scale_range(scale, self.MIN_SCALE, self.SIZE / 28)
        infos = [super(ScaledFashionMNIST, self).get_data_info(int(i)) for i in indices]
        # A few hundred at a time stay in the cache, and need no memory to speak of.
        parts = [self._place(infos[i : i + 256], scale, draw) for i in range(0, len(infos), 256)]
        canvases, boxes = (np.concatenate(arrays) for arrays in zip(*parts))
        return canvases, np.array([int(info['gt_label']) for info in infos]), boxes

    def _place(self, infos: list[dict[str, Any]], scale: tuple[float, float], draw: int) -> tuple[np.ndarray, ...]:
        size, split = self.SIZE, int(self.split == 'test')
        chances = np.empty((len(infos), 5), np.float32)
        noises = [np.empty((len(infos), side, side), np.float32) for side in (4, 8, 16, 32)]
        for i, info in enumerate(infos):
            # A generator for each image: what it draws doesn't depend on which others are asked for.
            generator = np.random.default_rng((self.seed, draw, split, info['garment']))
            chances[i] = generator.random(5)
            for noise in noises:
                noise[i] = generator.standard_normal(noise.shape[1:], np.float32)
        sides = 28 * (scale[0] + (scale[1] - scale[0]) * chances[:, :1])
        corners = (size - sides) * chances[:, 1:3]
        garments = torch.from_numpy(np.stack([info['img'] for info in infos]))[:, None]
        brightness, contrast = torch.from_numpy(chances[:, 3:, None, None]).unbind(1)
        texture = sum_noises([torch.from_numpy(n)[:, None] for n in noises])
        background = shade(texture, brightness[:, None], contrast[:, None])
        canvases = paste(garments, torch.from_numpy(corners), torch.from_numpy(sides), background)
        boxes = np.concatenate([corners, corners + sides], axis=1)
        return canvases[:, 0].round().byte().numpy(), boxes


@TRANSFORMS.register_module()
class SimCLRCrop(BaseTransform):
    """Google's evaluation crop for SimCLR's networks, :func:`~sk_plugins.networks.simclr.preprocess`.

    ``img``, (H, W, C) uint8, becomes (size, size, C) float32 of 0 to 255, not rounded; ``img_shape`` follows.

    Args:
        size: side of the result.
        crop: share of the short side that is kept.

    Raises:
        ValueError: a size or a share out of range; an image of another shape, or too small for the share.
    """

    def __init__(self, size: int = 224, crop: float = 0.875) -> None:
        check_integer('size', size)
        check_positive('crop', crop)
        if crop > 1:
            raise ValueError(f'crop={crop!r} must be at most 1')
        self.size = size
        self.crop = crop

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        if results['img'].ndim != 3:
            raise ValueError(f'img of shape {results["img"].shape} must be (H, W, C)')
        image = torch.from_numpy(np.ascontiguousarray(results['img'].transpose(2, 0, 1)))
        image = 255 * preprocess(image, self.size, self.crop)
        results['img'] = image.permute(1, 2, 0).contiguous().numpy()
        results['img_shape'] = results['img'].shape[:2]
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(size={self.size}, crop={self.crop})'


def sum_noises(noises: Sequence[Tensor]) -> Tensor:
    """The texture of normal ``noises`` (N, 1, s, s): their sum (N, 1, S, S), where S is twice the last one's s."""
    size = 2 * noises[-1].shape[-1]
    return sum(F.interpolate(noise, size, mode='bilinear') for noise in noises)


def shade(texture: Tensor, brightness: Tensor, contrast: Tensor) -> Tensor:
    """A background for :func:`paste` of :func:`sum_noises`; brightness and contrast are 0 to 1, (N, 1, 1, 1)."""
    return 40 + 80 * brightness + (10 + 15 * contrast) * texture


def paste(objects: Tensor, corners: Tensor, sides: Tensor, background: Tensor) -> Tensor:
    """Canvases (N, 1, S, S) of 0 to 255: objects (N, 1, H, W) on backgrounds, which they hide where they are not black.

    An object is resized to a square of ``sides`` (N, 1) pixels whose upper left corner is at ``corners`` (N, 2), left
    and top; what lies outside of the canvas is cut off. All tensors are on one device.
    """
    size = background.shape[-1]
    # The canvas, -1 to 1 each way, in coordinates of the object: its centre and its half side.
    half = size / sides
    centre = (size - 2 * corners - sides) / sides
    theta = torch.cat([torch.diag_embed(half.expand(-1, 2)), centre[:, :, None]], dim=2)
    grid = F.affine_grid(theta, [len(objects), 1, size, size], align_corners=False)
    light = F.grid_sample(objects.float(), grid, mode='bilinear', padding_mode='zeros', align_corners=False)
    cover = (light / 32).clamp(max=1)
    return cover * light + (1 - cover) * background.clamp(0, 255)


def _scale_range(scale: Sequence[float], least: float, greatest: float) -> tuple[float, float]:
    numbers = isinstance(scale, Sequence) and len(scale) == 2 and all(type(s) in (int, float) for s in scale)
    if not numbers or not least <= scale[0] <= scale[1] <= greatest:
        raise ValueError(
            f'scale={scale!r} must be two numbers, least and greatest, from {least} to {greatest:.4g} in rising order'
        )
    return float(scale[0]), float(scale[1])
