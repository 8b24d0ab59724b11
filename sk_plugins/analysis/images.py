"""Images from a folder, each at every scale: the object in its middle enlarged as in the paper's Fig. 3 and 4."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

__all__ = ['Batch', 'ImageStream', 'enlarge']

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.gif', '.ppm', '.pgm', '.tif', '.tiff', '.webp')
_MODES = {1: 'L', 3: 'RGB'}


def enlarge(
    image: Image.Image, scale: float, size: int, crop_pct: float = 0.875, interpolation: str = 'bicubic'
) -> Image.Image:
    """What a network sees in a test, (size, size), with the middle of the image ``scale`` times as large.

    At scale 1 that is the usual resize and centre crop: the central square of ``crop_pct`` of the short side. At scale
    s the square has 1 / s of that side. Either is one interpolation, from the image itself.
    """
    side = min(image.size) * crop_pct / scale
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Image.Resampling[interpolation.upper()], (left, top, left + side, top + side))


class Batch(NamedTuple):
    """Images as :class:`ImageStream` gives them.

    Attributes:
        images: (S, B, channels, size, size), S scales of B images.
        labels: index of each image's class, -1 where it has none.
        indices: number of each image in the folder.
        broken: (path, reason) of every file that was skipped.
    """

    images: Tensor
    labels: list[int]
    indices: list[int]
    broken: list[tuple[str, str]]


class ImageStream(IterableDataset):
    """The images under a folder, normalised, at every scale; a file that cannot be read is named and skipped.

    Subfolders, where there are some, are classes, with all images below them. Only names are listed ahead, a folder's
    at a time, so that the memory does not grow with the number of images.

    Args:
        folder: of .jpg, .png, .webp and other common images.
        scales: how many times the middle of an image is enlarged, each at least 1.
        size: side of the network's input in pixels.
        crop_pct: share of the short side that the square at scale 1 takes.
        interpolation: 'bicubic', 'bilinear', ...
        mean: of each channel, for images from 0 to 1; its length, 1 or 3, says if images are grey or RGB.
        std: of each channel.
        limit: read this many images at most, spread evenly over the folder.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        scales: Sequence[float] = (1.0, 1.5, 2.0),
        size: int = 224,
        crop_pct: float = 0.875,
        interpolation: str = 'bicubic',
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        limit: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f'{self.folder}: no such folder')
        if not scales or not all(1 <= scale < float('inf') for scale in scales) or len(set(scales)) < len(scales):
            raise ValueError(f'scales={tuple(scales)} must be different numbers of at least 1, such as (1.0, 1.5, 2.0)')
        if not isinstance(size, int) or size < 1:
            raise ValueError(f'size={size!r} must be an integer of at least 1')
        if not 0 < crop_pct <= 1:
            raise ValueError(f'crop_pct={crop_pct!r} must be above 0 and at most 1')
        if interpolation.upper() not in Image.Resampling.__members__:
            known = ', '.join(repr(name.lower()) for name in Image.Resampling.__members__)
            raise ValueError(f'interpolation={interpolation!r} is unknown: choose one of {known}')
        if len(mean) not in _MODES or len(std) != len(mean):
            raise ValueError(f'mean={tuple(mean)} and std={tuple(std)} must be one value each, or three (RGB)')
        if limit is not None and limit < 1:
            raise ValueError(f'limit={limit!r} must be at least 1')
        self.scales = tuple(scales)
        self.size, self.crop_pct, self.interpolation = size, crop_pct, interpolation
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
        self.classes = tuple(
            sorted(entry.name for entry in os.scandir(self.folder) if entry.is_dir() and not entry.name.startswith('.'))
        )
        self.total = sum(1 for _ in self._paths())
        if not self.total:
            raise FileNotFoundError(f'{self.folder}: no images there (looked for {", ".join(SUFFIXES)})')
        self._count = self.total if limit is None else min(limit, self.total)

    def __len__(self) -> int:
        return self._count

    def _paths(self) -> Iterator[tuple[str, int]]:
        """Every image with its class's index: those at the top first, then class by class."""
        for name in sorted(entry.name for entry in os.scandir(self.folder) if entry.is_file()):
            if name.lower().endswith(SUFFIXES):
                yield str(self.folder / name), -1
        for label, name in enumerate(self.classes):
            for top, folders, names in os.walk(self.folder / name):
                folders.sort()
                yield from ((os.path.join(top, n), label) for n in sorted(names) if n.lower().endswith(SUFFIXES))

    def __iter__(self) -> Iterator[tuple[int, str, int, Tensor | str]]:
        """Number, path, class and (S, channels, size, size) of every image; a reason in place of a broken one."""
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        chosen = 0
        for i, (path, label) in enumerate(self._paths()):
            # The first of each of `limit` equal runs.
            if chosen < self._count and i >= chosen * self.total // self._count:
                if chosen % workers == number:
                    yield chosen, path, label, self._read(path)
                chosen += 1

    def _read(self, path: str) -> Tensor | str:
        try:
            with Image.open(path) as file:
                image = file.convert(_MODES[len(self.mean)])
        except Exception as error:  # decoders fail in many ways
            return f'{type(error).__name__}: {error}'
        arrays = [
            np.atleast_3d(np.asarray(enlarge(image, scale, self.size, self.crop_pct, self.interpolation)))
            for scale in self.scales
        ]
        images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float().div_(255)
        return images.sub_(self.mean).div_(self.std)

    def batches(self, batch_size: int = 16, workers: int = 0) -> Iterator[Batch]:
        """All of them, ``batch_size`` files in each :class:`~sk_plugins.analysis.images.Batch`, read by ``workers``
        further processes.
        """
        if batch_size < 1 or workers < 0:
            raise ValueError(f'batch_size={batch_size!r} must be at least 1, and workers={workers!r} at least 0')
        return iter(DataLoader(self, batch_size, collate_fn=self._collate, num_workers=workers))

    def _collate(self, samples: list[tuple[int, str, int, Tensor | str]]) -> Batch:
        good = [sample for sample in samples if isinstance(sample[3], Tensor)]
        channels = len(self.mean)
        images = torch.empty(len(self.scales), 0, channels, self.size, self.size)
        if good:
            images = torch.stack([image for *_, image in good], dim=1)
        broken = [(path, reason) for _, path, _, reason in samples if isinstance(reason, str)]
        return Batch(images, [label for _, _, label, _ in good], [i for i, *_ in good], broken)
