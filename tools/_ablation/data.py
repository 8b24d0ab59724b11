"""Garments on canvases, kept in memory from run to run."""

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sk_plugins.openmmlab.datasets import ScaledFashionMNIST

from .rows import Settings


class Data:
    """Canvases, kept in memory from run to run."""

    def __init__(self, root: Path, settings: Settings) -> None:
        if not root.is_dir():
            raise FileNotFoundError(f'--data {root}: no such folder; tools/prepare_fashion_mnist.py fills it')
        self.settings = settings
        self.sets = {split: ScaledFashionMNIST(str(root), split, settings.scale) for split in ('train', 'test')}
        for split, dataset in self.sets.items():
            if len(dataset) < getattr(settings, f'{split}_images'):
                wanted = getattr(settings, f'{split}_images')
                raise ValueError(f'--{split}-images {wanted}: {root} has {len(dataset)}, which must be enough')
        self.train = functools.lru_cache(maxsize=4)(self._train)
        self.test = functools.lru_cache(maxsize=1)(self._test)

    def _train(self, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """An epoch of ``seed`` in the order it is trained in: canvases (N, 1, 64, 64) uint8 and labels (N,)."""
        every = len(self.sets['train'])
        chosen = np.random.default_rng(seed).permutation(every)[: self.settings.train_images]
        order = np.random.default_rng((seed, epoch)).permutation(chosen)
        images, labels, _ = self.sets['train'].batch(order, draw=seed * self.settings.epochs + epoch)
        return torch.from_numpy(images)[:, None], torch.from_numpy(labels)

    def _test(self) -> tuple[Tensor, Tensor, np.ndarray]:
        """Canvases, labels and the garments' scales (N,)."""
        images, labels, boxes = self.sets['test'].batch(range(self.settings.test_images))
        return torch.from_numpy(images)[:, None], torch.from_numpy(labels), scales_of(boxes)

    def test_at(self, scale: float, count: int) -> Tensor:
        """The first ``count`` canvases of the test set with their garments at ``scale``."""
        count = min(count, self.settings.test_images)
        return torch.from_numpy(self.sets['test'].batch(range(count), (scale, scale))[0])[:, None]


def scales_of(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) / 28


def prepare(images: Tensor, device: str) -> Tensor:
    """(B, 1, 64, 64) uint8 to what the networks take."""
    images = images.to(device).float().sub_(91).div_(48)  # the training images' mean and standard deviation
    return images.contiguous(memory_format=torch.channels_last)
