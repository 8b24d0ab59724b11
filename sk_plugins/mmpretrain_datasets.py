"""Datasets of the project's own configs, in mmpretrain's ``DATASETS``."""

from typing import Any

import numpy as np
from mmpretrain.datasets import BaseDataset
from mmpretrain.registry import DATASETS

__all__ = ['Digits']


@DATASETS.register_module()
class Digits(BaseDataset):
    """scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels in ten classes, part of its package.

    Every fifth image is held out: 1,438 for training and 359 for testing. Nothing is downloaded.

    Args:
        split: 'train' or 'test'.
        pipeline: transforms; they get ``img``, (8, 8) uint8 of 0 to 255, and ``gt_label``.
        **kwargs: further arguments of mmpretrain's ``BaseDataset``.

    Raises:
        ValueError: an unknown ``split``.
    """

    METAINFO = {'classes': tuple('0123456789')}
    HELD_OUT = slice(4, None, 5)

    def __init__(self, split: str, pipeline: list[dict[str, Any]] | tuple = (), **kwargs) -> None:
        if split not in ('train', 'test'):
            raise ValueError(f"split={split!r} is unknown: choose 'train' or 'test'")
        self.split = split
        super().__init__(ann_file='', pipeline=pipeline, test_mode=split == 'test', **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        held_out = np.zeros(len(digits.target), dtype=bool)
        held_out[self.HELD_OUT] = True
        part = held_out if self.split == 'test' else ~held_out
        images = (digits.images[part] * (255 / 16)).round().astype(np.uint8)
        return [dict(img=image, gt_label=int(label)) for image, label in zip(images, digits.target[part])]
