"""Data sets whole on a device: objects and backgrounds, and canvases made of them batch by batch.

All chance is drawn on the CPU, so that it is the same on every device.
"""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from mmpretrain.datasets import FashionMNIST
from torch import Tensor

from sk_plugins.openmmlab.datasets import Digits, paste, shade, sum_noises

from .rows import NEW_SCALES, SCALES, Settings

DATA = {
    'scaled': 'Fashion-MNIST on black, in the middle, so that nothing of an object varies but its size',
    'garments': 'Fashion-MNIST on textures',
    'scenes': 'garments on photographs, of which those of the test set are others',
    'digits': "scikit-learn's digits on textures",
}
SIZE = 64
BACKGROUNDS = 1024
MEAN, DEVIATION = 91, 48  # of the canvases of `garments`, for all


class Data:
    """The data set ``name`` of DATA on a device.

    Raises:
        FileNotFoundError: no folder at ``root``.
        ValueError: fewer objects there than the settings ask for.
        ModuleNotFoundError: scikit-image, whose photographs ``scenes`` takes, is not installed.
    """

    def __init__(self, root: Path, settings: Settings, device: str = 'cpu', name: str = 'garments') -> None:
        self.settings, self.device, self.name = settings.on(name), device, name
        if name != 'digits' and not root.is_dir():
            raise FileNotFoundError(f'--data {root}: no such folder; tools/prepare_fashion_mnist.py fills it')
        self.objects, self.labels, self.backgrounds = {}, {}, {}
        for split in ('train', 'test'):
            if name == 'digits':
                dataset = Digits(split, serialize_data=False)
            else:
                dataset = FashionMNIST(str(root), split, test_mode=split == 'test', serialize_data=False)
            wanted = getattr(self.settings, f'{split}_images')
            # There are few digits, each of which comes several times.
            if name != 'digits' and len(dataset) < wanted:
                raise ValueError(f'--{split}-images {wanted}: {root} has {len(dataset)}, which must be enough')
            images, labels = zip(*((info['img'], int(info['gt_label'])) for info in dataset.data_list))
            self.objects[split] = torch.from_numpy(np.stack(images))[:, None].to(device)
            self.labels[split] = torch.tensor(labels, device=device)
            make = {'scaled': _black, 'scenes': _photographs}.get(name, _textures)
            self.backgrounds[split] = make(split).to(device)
        self.test = functools.lru_cache(maxsize=len(SCALES) + len(NEW_SCALES) + 1)(self._test)

    def batches(self, seeds: Sequence[int], epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """An epoch of S seeds: images (S, B, 1, 64, 64), as the networks take them, and labels (S, B).

        A seed's images are the same whichever seeds are beside it.
        """
        orders, chances = (torch.stack(parts).to(self.device) for parts in zip(*(self._order(s, epoch) for s in seeds)))
        size = self.settings.batch_size
        for start in range(0, self.settings.train_images - size + 1, size):
            batch = slice(start, start + size)
            chosen, drawn = orders[:, batch].flatten(), chances[:, batch].flatten(0, 1)
            canvases, labels, _ = self._draw('train', chosen, drawn, self.settings.scale)
            yield prepare(canvases).unflatten(0, (len(seeds), -1)), labels.unflatten(0, (len(seeds), -1))

    def _order(self, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        count, every = self.settings.train_images, len(self.objects['train'])
        chosen = torch.randperm(every, generator=_generator(seed)).repeat(-(-count // every))[:count]
        generator = _generator(seed, epoch)
        return chosen[torch.randperm(count, generator=generator)], torch.rand(count, 6, generator=generator)

    def _test(self, scale: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The test set: canvases (N, 1, 64, 64) uint8, labels and scales (N,).

        All objects are at ``scale``, each where it is at every scale; where None, each at a scale of its own.
        """
        count = self.settings.test_images
        chances = torch.rand(count, 6, generator=_generator(2**20)).to(self.device)
        chosen = torch.arange(count, device=self.device) % len(self.objects['test'])
        scales = self.settings.scale if scale is None else (scale, scale)
        parts = [self._draw('test', chosen[i : i + 1000], chances[i : i + 1000], scales) for i in range(0, count, 1000)]
        canvases, labels, scales = (torch.cat(part) for part in zip(*parts))
        return canvases.byte(), labels, scales.cpu()

    def _draw(self, split: str, chosen: Tensor, chances: Tensor, scale: tuple[float, float]) -> tuple[Tensor, ...]:
        sides = 28 * (scale[0] + (scale[1] - scale[0]) * chances[:, :1])
        places = torch.full_like(chances[:, 1:3], 0.5) if self.name == 'scaled' else chances[:, 1:3]
        corners = (SIZE - sides) * places
        backgrounds = self.backgrounds[split]
        background = backgrounds[(chances[:, 3] * len(backgrounds)).long()]
        if self.name in ('garments', 'digits'):
            brightness, contrast = chances[:, 4:, None, None, None].unbind(1)
            background = shade(background, brightness, contrast)
        canvases = paste(self.objects[split][chosen], corners, sides, background)
        return canvases.round(), self.labels[split][chosen], sides[:, 0] / 28


def prepare(canvases: Tensor) -> Tensor:
    """(B, 1, 64, 64) of 0 to 255 to what the networks take."""
    images = canvases.float().sub(MEAN).div(DEVIATION)
    return images.contiguous(memory_format=torch.channels_last)


def _generator(*numbers: int) -> torch.Generator:
    """One for the numbers, where a zero at their end counts for nothing."""
    (seed,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(seed) >> 1)


def _black(split: str) -> Tensor:
    """(1, 1, 64, 64): there is but one."""
    return torch.zeros(1, 1, SIZE, SIZE)


def _textures(split: str) -> Tensor:
    """(BACKGROUNDS, 1, 64, 64): sums of noise, which brightness and contrast are still to be given."""
    generator = _generator(2**21, split == 'test')
    noises = [torch.randn(BACKGROUNDS, 1, side, side, generator=generator) for side in (4, 8, 16, 32)]
    return sum_noises(noises)


def _photographs(split: str) -> Tensor:
    """(BACKGROUNDS, 1, 64, 64) of 0 to 255: grey squares of the photographs that tools/prepare_scenes.py takes."""
    from _scenes import PHOTOGRAPHS, crop, load_photographs

    photographs = list(load_photographs(PHOTOGRAPHS['train' if split == 'train' else 'val']).values())
    generator = np.random.default_rng((2**21, split == 'test'))
    squares = [crop(photographs[i % len(photographs)], SIZE, generator).mean(-1) for i in range(BACKGROUNDS)]
    return torch.from_numpy(np.stack(squares)).float()[:, None]
