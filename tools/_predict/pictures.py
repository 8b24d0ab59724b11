"""Pictures by files, folders, patterns and addresses, read and preprocessed in batches."""

import glob
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sk_plugins._text import nearest_path
from sk_plugins.analysis.images import SUFFIXES

__all__ = ['Batch', 'Pictures', 'find', 'open_picture', 'output_names']

MOST_BYTES = 200 * 2**20


def find(words: Sequence[str]) -> list[str]:
    """The pictures that words name: a file, all below a folder, those of a pattern (``*.jpg``), or an address.

    Raises:
        FileNotFoundError: a word names nothing.
    """
    found: list[str] = []
    for word in words:
        path = Path(word)
        if re.match(r'https?://', word):
            found.append(word)
        elif path.is_dir():
            walk = os.walk(path, followlinks=True)
            below = sorted(
                Path(top, name) for top, _, names in walk for name in names if name.lower().endswith(SUFFIXES)
            )
            if not below:
                raise FileNotFoundError(f'{word}: no pictures in this folder (looked for {", ".join(SUFFIXES)})')
            found += map(str, below)
        elif path.is_file():
            found.append(word)
        else:
            matches = sorted(match for match in glob.glob(word, recursive=True) if os.path.isfile(match))
            if not matches:
                if glob.has_magic(word):
                    raise FileNotFoundError(f'{word}: no file matches')
                raise FileNotFoundError(f'{word}: no such file or folder{nearest_path(path)}')
            found += matches
    return list(dict.fromkeys(found))


def output_names(pictures: Sequence[str]) -> list[Path]:
    """Where each picture's drawing goes, from the output folder: the folders in which they differ stay."""
    paths = [PurePosixPath(urlsplit(p).path) if '://' in p else PurePosixPath(Path(p).absolute()) for p in pictures]
    local = [path.parent for path, picture in zip(paths, pictures) if '://' not in picture]
    top = os.path.commonpath(local) if local else '/'
    names = [PurePosixPath(path.name if '://' in p else os.path.relpath(path, top)) for p, path in zip(pictures, paths)]
    stems = Counter(name.with_suffix('') for name in names)
    # Two files that differ in their endings alone keep them.
    drawn = [name.with_suffix('.png') if stems[name.with_suffix('')] == 1 else f'{name}.png' for name in names]
    taken: Counter[str] = Counter()
    unique = []
    for name in map(str, drawn):
        taken[name] += 1
        unique.append(Path(name) if taken[name] == 1 else Path(name).with_stem(f'{Path(name).stem}_{taken[name]}'))
    return unique


def open_picture(picture: str) -> Image.Image:
    """RGB of 8 bits, turned as its EXIF says.

    Raises:
        OSError, ValueError: it cannot be had or read, or its pixels have 32 bits.
    """
    if '://' in picture:
        with urlopen(Request(picture, headers={'User-Agent': 'sk-plugins'}), timeout=20) as answer:
            content = answer.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f'more than {MOST_BYTES // 2**20} MB')
        file: io.BytesIO | str = io.BytesIO(content)
    else:
        file = picture
    with Image.open(file) as image:
        kind = image.format
        return _to_8_bits(ImageOps.exif_transpose(image), kind).convert('RGB')


def _to_8_bits(image: Image.Image, kind: str | None) -> Image.Image:
    """Pixels of 16 bits divided by 256, as training reads them; Pillow would cut them off at 255."""
    if image.mode.startswith('I;16') or (image.mode == 'I' and kind in ('PNG', 'PPM')):
        return Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.mode in ('I', 'F'):
        raise ValueError(f'pixels of 32 bits (Pillow: {image.mode}), whose range is not known')
    return image


class Batch(NamedTuple):
    """``images`` (B, 3, size, size) of the pictures numbered ``indices``, and (number, reason) of those not read."""

    images: Tensor
    indices: list[int]
    broken: list[tuple[int, str]]


@dataclass
class Pictures(Dataset):
    """Pictures as a network takes them; one that cannot be read is its reason."""

    pictures: Sequence[str]
    transform: Callable[[Image.Image], Tensor]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> tuple[int, Tensor | str]:
        try:
            return i, self.transform(open_picture(self.pictures[i]))
        except Exception as error:  # decoders fail in many ways
            return i, ' '.join(str(error).split()) or type(error).__name__

    def batches(self, size: int, workers: int) -> Iterator[Batch]:
        return iter(DataLoader(self, size, num_workers=workers, collate_fn=_collate))


def _collate(samples: list[tuple[int, Tensor | str]]) -> Batch:
    good = [(i, image) for i, image in samples if isinstance(image, Tensor)]
    images = torch.stack([image for _, image in good]) if good else torch.empty(0)
    return Batch(images, [i for i, _ in good], [(i, said) for i, said in samples if isinstance(said, str)])
