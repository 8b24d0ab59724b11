"""What would go wrong in a run, found before its first step: files, room on the disk, memory for a batch."""

import gc
import hashlib
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.structures import DataSample
from tqdm import tqdm

from sk_plugins._text import counted, first_lines, several
from sk_plugins.openmmlab.runtime.images import LoadSoundImage, UnreadableImageError

from .data import ImageSet, Item

__all__ = ['Facts', 'TooLargeError', 'check_disk', 'check_images', 'find_leaks', 'try_step']

MOST_UNREADABLE = 0.1  # of all images
LONG_STEP = 3  # seconds, of which there is no second one for the sake of a better estimate


@dataclass(frozen=True)
class Facts:
    """What was seen of the images.

    Attributes:
        side: median of the short sides, in pixels.
        grey: whether none has colours.
        mean, std: of the pixels of the training images, 0 to 255, for R, G and B.
        twins: pairs of images of the same pixels, the first of them and another.
    """

    side: int
    grey: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    twins: tuple[tuple[Item, Item], ...] = ()


@dataclass(frozen=True)
class _Seen:
    item: Item
    fault: str | None = None
    side: int = 0
    grey: bool = True
    digest: bytes = b''
    mean: np.ndarray | None = None
    square: np.ndarray | None = None


def check_images(images: ImageSet, progress: bool = True) -> tuple[ImageSet, Facts]:
    """Read every image as training does. Those that cannot be read are left out and noted.

    Raises:
        ValueError: more than a tenth of the images cannot be read, or what is left of a class is nothing.
    """
    load = LoadSoundImage()

    def look(item: Item) -> _Seen:
        path = images.root / item.path
        try:
            image = load.transform(dict(img_path=str(path)))['img']
        except UnreadableImageError as error:
            return _Seen(item, str(error).removeprefix(f'{path}: '))
        small = cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float64)
        return _Seen(
            item,
            side=min(image.shape[:2]),
            grey=bool((image[..., 0] == image[..., 1]).all() and (image[..., 1] == image[..., 2]).all()),
            digest=hashlib.sha1(np.ascontiguousarray(image)).digest() + bytes(str(image.shape), 'ascii'),
            mean=small.mean((0, 1)),
            square=np.square(small).mean((0, 1)),
        )

    every = [*images.train, *images.val]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        looks = pool.map(look, every)
        seen = list(tqdm(looks, 'checking', len(every), unit='image', leave=False, disable=not progress))
    broken = [one for one in seen if one.fault]
    notes = list(images.notes)
    if broken:
        said = several((f'{one.item.path} ({one.fault})' for one in broken), between='; ')
        if len(broken) > MOST_UNREADABLE * len(every):
            raise ValueError(f'{images.source}: {len(broken)} of {len(every)} images cannot be read: {said}')
        notes.append(f'left out, since unreadable: {counted(len(broken), "image")}: {said}')
        gone = {one.item for one in broken}
        images = replace(
            images,
            train=tuple(item for item in images.train if item not in gone),
            val=tuple(item for item in images.val if item not in gone),
        )
        for kind in ('train', 'val') if images.val else ('train',):
            left = images.counts(getattr(images, kind))
            for name in images.classes:
                if not left[name] and any(name in item.labels for item in gone):
                    raise ValueError(f'{images.source}: the class {name!r} has no image in {kind} that can be read')
    good = [one for one in seen if not one.fault]
    twins = _find_twins(good)
    different = [f'{one.path} and {other.path}' for one, other in twins if one.labels != other.labels]
    if different:
        notes.append(f'twice there with different labels: {counted(len(different), "image")}: {several(different)}')
    training = set(images.train)
    of_train = [one for one in good if one.item in training]
    mean = np.mean([one.mean for one in of_train], axis=0)
    std = np.sqrt(np.maximum(np.mean([one.square for one in of_train], axis=0) - mean**2, 1))
    facts = Facts(
        side=int(median(one.side for one in good)),
        grey=all(one.grey for one in good),
        mean=tuple(round(float(value), 2) for value in mean[::-1]),  # OpenCV has B, G, R
        std=tuple(round(float(value), 2) for value in std[::-1]),
        twins=twins,
    )
    return replace(images, notes=tuple(notes)), facts


def _find_twins(seen: Sequence[_Seen]) -> tuple[tuple[Item, Item], ...]:
    first: dict[bytes, Item] = {}
    pairs = ((first.setdefault(one.digest, one.item), one.item) for one in seen)
    return tuple((one, other) for one, other in pairs if one is not other)


def find_leaks(images: ImageSet, facts: Facts) -> list[str]:
    """A note on images that are in training and in validation, in a split of one's own or of this tool."""
    held_out = set(images.val)
    leaks = [f'{a.path} and {b.path}' for a, b in facts.twins if (a in held_out) != (b in held_out)]
    if not leaks:
        return []
    return [
        f'in training and in validation, which flatters the score: {counted(len(leaks), "image")}: {several(leaks)}'
    ]


def check_disk(folder: Path, parameters: int, copies: int) -> None:
    """Raise unless there is room for the checkpoints: the last, the best, and the one that is being written.

    Args:
        folder: where they go; it need not exist yet.
        parameters: the network's.
        copies: tensors of that size in a checkpoint, those of the optimizer included.

    Raises:
        OSError: there is not.
    """
    needed = 3 * 4 * copies * parameters + 50 * 2**20
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OSError(f'{folder}: {free / 2**20:.0f} MB are free, and the checkpoints take {needed / 2**20:.0f} MB')
    if not os.access(there, os.W_OK):
        raise OSError(f'{folder}: {there} cannot be written to')


class TooLargeError(MemoryError):
    """A batch does not fit into the memory."""


def try_step(cfg: Any, batch: int, size: int, device: str, amp: bool) -> float:
    """The seconds of a training step on made-up images, of a model that is thrown away.

    Raises:
        TooLargeError: the step needs more memory than there is.
    """
    settings = cfg.model.to_dict()
    settings['backbone'].pop('init_cfg', None)
    settings['data_preprocessor'] = {'type': 'ClsDataPreprocessor', **cfg.data_preprocessor.to_dict()}
    classes = cfg.data_preprocessor.num_classes
    state = torch.get_rng_state()
    try:
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            model = MODELS.build(settings).to(device).train()
        samples = [DataSample().set_gt_label(i % classes) for i in range(batch)]
        inputs = [torch.zeros(3, size, size, dtype=torch.uint8) for _ in range(batch)]
        for _ in range(2):  # the first one takes longer
            start = time.perf_counter()
            with torch.autocast(torch.device(device).type, enabled=amp):
                data = model.data_preprocessor(dict(inputs=inputs, data_samples=samples), training=True)
                losses = model(**data, mode='loss')
            losses['loss'].backward()
            if device != 'cpu':
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            if seconds > LONG_STEP:
                break
        return seconds
    except (RuntimeError, MemoryError) as error:
        said = str(error).lower()
        if (
            isinstance(error, MemoryError | torch.OutOfMemoryError)
            or 'out of memory' in said
            or "can't allocate" in said
        ):
            raise TooLargeError(first_lines(error)) from error
        raise
    finally:
        torch.set_rng_state(state)
        model = losses = data = None
        gc.collect()
        if device != 'cpu':
            torch.cuda.empty_cache()
