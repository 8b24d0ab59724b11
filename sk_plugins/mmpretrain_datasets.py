"""Datasets of the project's own configs, in mmpretrain's ``DATASETS``."""

from typing import Any

import numpy as np
from mmpretrain.datasets import BaseDataset
from mmpretrain.registry import DATASETS

__all__ = ['Digits']


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
