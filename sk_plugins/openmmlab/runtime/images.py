"""Image files that are broken or out of the ordinary: read soundly, or named, counted and skipped up to a limit."""

import io
import struct
import sys
import warnings
from collections.abc import Mapping, Sequence
from logging import WARNING
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine import fileio
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose
from mmengine.dist import get_rank
from mmengine.logging import print_log
from mmengine.registry import DATASETS, TRANSFORMS
from PIL import Image
from torch.utils.data import Dataset

from ..._arguments import is_integer
from ..._text import several
from .configs import ConfigError

__all__ = ['LoadSoundImage', 'SkipUnreadable', 'UnreadableImageError', 'skip_unreadable']

# How many files an error lists.
MOST_NAMES = 10
# What transforms that load raise of a file's content.
READING = (OSError, ValueError, AssertionError, EOFError, SyntaxError, struct.error, cv2.error)


class UnreadableImageError(ValueError):
    """A file that cannot be read as the image, or the label map, that it should be; the message begins with its name.

    ``index`` is the item's number in its data set where that is known.
    """

    index: int | None = None

    def __init__(self, message: str) -> None:
        # torch rebuilds a worker's error from the text of its traceback, which ends with the message.
        super().__init__(message.rpartition(f'{type(self).__name__}: ')[2].strip())


@TRANSFORMS.register_module()
class LoadSoundImage(LoadImageFromFile):
    """mmcv's ``LoadImageFromFile``, but that what it gives is the whole image, with its channels and its range.

    An empty or truncated file, or one that is no image, is an error with its name, as are pixels of 32 bits, more
    pixels than twice ``PIL.Image.MAX_IMAGE_PIXELS``, and sides too unlike. Pixels of 16 bits become 8 by OpenCV, which
    divides them by 256, where Pillow would cut them off at 255. What OpenCV does not read, Pillow does. As in mmcv,
    images are turned by their EXIF orientation unless ``color_type`` says otherwise, alpha goes (LA in Pillow excepted,
    which is laid on grey), and of an animation the first frame counts.

    Args:
        max_ratio: the most that the longer side may be of the shorter.
        **kwargs: of ``LoadImageFromFile``.

    Raises:
        ValueError: a ``max_ratio`` below 1.
        UnreadableImageError: in ``transform``, unless ``ignore_empty``.
    """

    def __init__(self, *args, max_ratio: float = 1000, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        _check_ratio(max_ratio)
        self.max_ratio = max_ratio

    def transform(self, results: dict) -> dict | None:
        path = results['img_path']
        try:
            content = fileio.get(path, backend_args=self.backend_args)
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # Pillow's, which name no file
                image = self._decode(content)
        except Exception as error:
            if self.ignore_empty:
                return None
            reason = getattr(error, 'strerror', None) or str(error) or type(error).__name__
            raise UnreadableImageError(f'{path}: {" ".join(reason.split())}') from error
        results['img'] = image.astype(np.float32) if self.to_float32 else image
        results['img_shape'] = results['ori_shape'] = image.shape[:2]
        return results

    def _decode(self, content: bytes) -> np.ndarray:
        if not content:
            raise ValueError('the file is empty')
        backends = [self.imdecode_backend]
        if self.imdecode_backend == 'cv2':
            backends.append('pillow')
        header = _header(content)
        if header is not None:
            width, height = header.size
            if max(width, height) > self.max_ratio * min(width, height):
                raise ValueError(f'{width}x{height} pixels: one side is more than {self.max_ratio:g} times the other')
            if header.mode[0] in 'IF' and self.color_type != 'unchanged':
                backends = ['cv2']
            elif header.format in ('JPEG', 'MPO') and not _has_end(content):
                # OpenCV before 5 fills what is missing with grey; Pillow knows whether anything is.
                backends = ['pillow']
        reason = 'no image that can be read'
        for backend in backends:
            try:
                image = mmcv.imfrombytes(content, flag=self.color_type, backend=backend)
            except Image.UnidentifiedImageError:
                continue
            except Exception as error:
                reason = str(error)
                continue
            if image is not None:
                return image
        if header is not None and header.mode in ('I', 'F'):
            reason = f'pixels of 32 bits (Pillow: {header.mode}), whose range is not known'
        raise ValueError(reason)


def _header(content: bytes) -> Image.Image | None:
    """The image without its pixels, or None where Pillow does not know the format."""
    try:
        return Image.open(io.BytesIO(content))
    except Image.DecompressionBombError:
        raise
    except Exception:  # of many kinds, by format
        return None


def _has_end(content: bytes) -> bool:
    """Whether a JPEG's scan comes to its end marker; a thumbnail in a segment before has one of its own."""
    if content.endswith(b'\xff\xd9'):
        return True
    at = 2
    while content[at : at + 1] == b'\xff' and content[at + 1 : at + 2] != b'\xda':
        # A fill byte, or a segment with its length.
        at += 1 if content[at + 1 : at + 2] == b'\xff' else 2 + int.from_bytes(content[at + 2 : at + 4], 'big')
    return content.find(b'\xff\xd9', at) >= 0


class _NamingCompose(Compose):
    """mmengine's ``Compose``, whose errors say which item's files they are about."""

    def __call__(self, data: dict) -> dict | None:
        index = data.get('sample_idx')
        files = ' and '.join(str(value) for key, value in data.items() if key.endswith('_path') and value)
        for transform in self.transforms:
            name = type(transform).__name__
            try:
                data = transform(data)
            except UnreadableImageError as error:
                error.index = index
                raise
            except Exception as error:
                said = f'{files or f"item {index}"}: {name}: {type(error).__name__}: {error}'
                if not (name.startswith('Load') and isinstance(error, READING)):
                    raise RuntimeError(said) from error
                unreadable = UnreadableImageError(' '.join(said.split()))
                unreadable.index = index
                raise unreadable from error
            if data is None:
                return None
        return data


@DATASETS.register_module()
class SkipUnreadable(Dataset):
    """A data set of which files that cannot be read are named, counted and replaced, up to a limit.

    Its ``LoadImageFromFile`` becomes :class:`LoadSoundImage`. In place of an item whose image or label map cannot be
    read comes another, drawn by a generator that is seeded with the item's index: the same in every epoch, process
    and resumed run. Each file is named and counted once, over all workers; of several processes each counts its own.
    An error of another transform is raised with the files' names. All other attributes are those of the data set.

    Args:
        dataset: a data set of mmengine's with a pipeline, or its config.
        limit: how many files may be skipped; one more is an error that lists the first. 0 for validation, where a
            replacement would change the metric.
        max_ratio: of :class:`LoadSoundImage`; None leaves ``LoadImageFromFile`` as it is.

    Raises:
        ValueError: a ``limit`` below 0, or ``max_ratio`` below 1.
        UnreadableImageError: from items.
    """

    def __init__(self, dataset: Any, limit: int = 10, max_ratio: float | None = 1000) -> None:
        _check_arguments(limit, max_ratio)
        self.limit = limit
        self.max_ratio = max_ratio
        self.dataset = DATASETS.build(dataset) if isinstance(dataset, dict) else dataset
        self.pipeline = self.dataset.pipeline
        self._unreadable: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        if name == 'dataset':  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    @property
    def pipeline(self) -> Compose:
        return self.dataset.pipeline

    @pipeline.setter
    def pipeline(self, pipeline: Any) -> None:
        transforms = pipeline if isinstance(pipeline, Sequence) else pipeline.transforms
        self.dataset.pipeline = _NamingCompose([self._sound(transform) for transform in transforms])

    def _sound(self, transform: Any) -> Any:
        own = self.max_ratio is None or type(transform) is not LoadImageFromFile
        if own or transform.file_client_args is not None:
            return transform
        names = ('to_float32', 'color_type', 'imdecode_backend', 'ignore_empty', 'backend_args')
        return LoadSoundImage(**{name: getattr(transform, name) for name in names}, max_ratio=self.max_ratio)

    def full_init(self) -> None:
        """Read the list of items, and share the marks of those that cannot be read with workers that come."""
        self.dataset.full_init()
        self._unreadable = torch.zeros(len(self), dtype=torch.uint8).share_memory_()

    def get_subset(self, indices: int | Sequence[int]) -> 'SkipUnreadable':
        """mmengine's, of which ``KFoldDataset`` makes its folds; the part has marks and a limit of its own."""
        subset = SkipUnreadable(self.dataset.get_subset(indices), self.limit, self.max_ratio)
        subset.full_init()
        return subset

    def get_subset_(self, indices: int | Sequence[int]) -> None:
        self.dataset.get_subset_(indices)
        self.full_init()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if self._unreadable is None:
            self.full_init()
        draws = None
        while True:
            try:
                return self.dataset[index]
            except UnreadableImageError as error:
                self._count(index if error.index is None else error.index, error)
            draws = draws or np.random.default_rng(index % len(self))
            index = int(draws.integers(len(self)))

    def _count(self, index: int, error: UnreadableImageError) -> None:
        """Log the file at its first time, or raise at one too many."""
        if self.limit == 0:
            raise UnreadableImageError(f'{error} (no image of this data set may be skipped)') from error
        known = bool(self._unreadable[index])
        self._unreadable[index] = 1
        count = int(self._unreadable.sum())
        if count > self.limit or count == len(self):
            indices = self._unreadable.nonzero().flatten().tolist()
            names = [str(self.dataset.get_data_info(i).get('img_path')) for i in indices]
            raise UnreadableImageError(
                f'{count} of {len(self)} images cannot be read, and limit={self.limit} may be skipped: '
                f'{several(names, most=MOST_NAMES)}; the last: {error}'
            ) from error
        if not known:
            message = f'{error}: skipped, {count} of at most {self.limit}'
            if get_rank() == 0:
                print_log(message, 'current', WARNING)
            else:  # where mmengine's logger is silent
                print(message, file=sys.stderr, flush=True)


def _check_arguments(limit: Any = 10, max_ratio: Any = 1000) -> None:
    if not is_integer(limit, 0):
        raise ValueError(f'limit={limit!r} must be an integer of at least 0')
    if max_ratio is not None:
        _check_ratio(max_ratio)


def _check_ratio(max_ratio: Any) -> None:
    if not isinstance(max_ratio, int | float) or isinstance(max_ratio, bool) or not max_ratio >= 1:
        raise ValueError(f'max_ratio={max_ratio!r} must be a number of at least 1')


def skip_unreadable(cfg: Config) -> None:
    """Put :class:`SkipUnreadable` around a config's data sets of image files, those inside of others too.

    The config's ``unreadable_images`` has the arguments for training; validation and testing skip nothing. With None
    there training skips nothing either, and mmcv reads the files as it does: one that it cannot read is named.

    Raises:
        ConfigError: ``unreadable_images`` is something else; also where no data set reads files.
    """
    arguments = cfg.get('unreadable_images', {})
    if arguments is None:
        arguments = dict(limit=0, max_ratio=None)
    if not isinstance(arguments, Mapping):
        raise ConfigError(f'unreadable_images={arguments!r} must be a dict with limit and max_ratio, or None')
    for key in arguments:
        if key not in ('limit', 'max_ratio'):
            raise ConfigError(f'unreadable_images.{key}: there are only limit, max_ratio')
    try:
        _check_arguments(**arguments)
    except ValueError as error:
        raise ConfigError(f'unreadable_images.{error}') from None
    for split in ('train', 'val', 'test'):
        loaders = cfg.get(f'{split}_dataloader')
        for loader in loaders if isinstance(loaders, list) else [loaders]:
            if loader and isinstance(loader.get('dataset'), dict):
                skipping = arguments if split == 'train' else {**arguments, 'limit': 0}
                loader['dataset'] = _around(loader['dataset'], skipping)


def _around(dataset: dict, arguments: dict) -> dict:
    if _name(dataset) == SkipUnreadable.__name__:
        return dataset
    if isinstance(dataset.get('dataset'), dict):
        dataset['dataset'] = _around(dataset['dataset'], arguments)
    elif isinstance(dataset.get('datasets'), list | tuple):
        dataset['datasets'] = [_around(inner, arguments) for inner in dataset['datasets']]
    elif any(_name(transform).startswith('LoadImage') for transform in dataset.get('pipeline') or ()):
        return ConfigDict(type=SkipUnreadable.__name__, dataset=dataset, **arguments)
    return dataset


def _name(cfg: Any) -> str:
    """A config's type without its scope; it may be a class."""
    type_ = cfg.get('type', '') if isinstance(cfg, dict) else type(cfg)
    return getattr(type_, '__name__', str(type_)).rpartition('.')[2]
