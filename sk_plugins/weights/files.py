"""Weight files: read so that nothing in them is run, and written whole or not at all."""

import contextlib
import io
import os
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.models import clean_state_dict
from torch import Tensor

from .._files import write_atomically
from . import caffe, mindspore, tensorflow

__all__ = [
    'CheckpointError',
    'HubError',
    'Inert',
    'find_fault',
    'load_checkpoint',
    'pick_state_dict',
    'read_pickle',
    'require_weights',
    'save_state_dict',
    'torch_save',
]


class CheckpointError(ValueError):
    """A checkpoint file that cannot be read or used; the message names the file and the cause."""


class HubError(RuntimeError):
    """Weights of a Hub repository could not be had or used; the message names the repository and the cause."""


class Inert:
    """Stands in for whatever a pickle names besides tensors and containers: takes any state, runs no code of its.

    What stands for ``module.Name`` is of a class of that name.
    """

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs) -> None:
        pass

    def __setstate__(self, state) -> None:
        pass


def load_checkpoint(path: str | os.PathLike, use_ema: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the weights and the ``meta`` of a checkpoint of mmengine's, timm's or a plain state dict.

    Pickles are read with ``weights_only=True``; what else they hold (mmengine's logs, optimizer state) stays
    unread, and nothing in them is run.

    Args:
        path: a ``.safetensors`` file, a ``torch.save`` file, a ``.caffemodel``, MindSpore's ``.ckpt``, or a TensorFlow
            checkpoint (``model.ckpt-250228``, without the endings of its files, or its folder).
        use_ema: the averaged weights where the checkpoint has some, else the ones last trained.

    Returns:
        The state dict under its own names, and the checkpoint's ``meta`` ({} where it has none).

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it cannot be read (``.caffemodel`` and ``.ckpt`` need the extra ``caffe``, TensorFlow's the
            extra ``tf``), or holds no state dict of tensors.
    """
    path = Path(path)
    if tensorflow.is_checkpoint(path):
        try:
            return tensorflow.read(path), {}
        except (ValueError, ImportError) as error:
            raise CheckpointError(str(error)) from error
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such checkpoint file')
    if path.suffix == '.safetensors':
        try:
            return safetensors.torch.load_file(path), {}
        except safetensors.SafetensorError as error:
            raise CheckpointError(f'{path}: not a safetensors file: {error}') from error
    readers = {'.caffemodel': caffe.read}
    if path.suffix == '.ckpt' and mindspore.is_mindspore(path):
        readers['.ckpt'] = mindspore.read
    if path.suffix in readers:
        try:
            return readers[path.suffix](path), {}
        except (ValueError, ImportError) as error:
            raise CheckpointError(str(error)) from error
    checkpoint = read_pickle(path)
    state_dict = pick_state_dict(checkpoint, use_ema, f'{path}: ')
    meta = checkpoint.get('meta')
    return clean_state_dict(state_dict), dict(meta) if isinstance(meta, Mapping) else {}


def read_pickle(
    path: str | os.PathLike, map_location: Any = 'cpu', allowed: Sequence[Any | tuple[Any, str]] = ()
) -> Any:
    """What a file of ``torch.save`` holds, read with ``weights_only=True``: nothing in it is run.

    Args:
        path: the file.
        map_location: as in ``torch.load``.
        allowed: classes and functions besides torch's own that are what they are, as in
            ``torch.serialization.safe_globals``; whatever else the file names becomes an :class:`Inert` object.

    Raises:
        CheckpointError: it cannot be read; the message names the file and the cause.
    """
    with torch.serialization.safe_globals(list(allowed)):
        try:
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except ValueError:  # torch's format before 1.6, whose names it cannot list
            safe = torch.serialization.get_safe_globals()
            known = {one[1] if isinstance(one, tuple) else f'{one.__module__}.{one.__name__}' for one in safe}
            unknown = sorted(_names_before_1_6(path) - known)
        except Exception as error:  # damaged pickles raise nearly anything: KeyError, UnicodeDecodeError, struct.error
            reason = str(error).partition('. ')[0] or type(error).__name__
            raise CheckpointError(f'{path}: not a file of torch.save, or a damaged one: {reason}') from error
        if damaged := _find_damage(path):
            raise CheckpointError(f'{path}: damaged: the checksum of {damaged} in it is wrong')
        try:
            with torch.serialization.safe_globals([(type(name, (Inert,), {}), name) for name in unknown]):
                return torch.load(path, map_location=map_location, weights_only=True)
        except Exception as error:
            # Without torch's advice to load it in the unsafe way, or to allow what it asks for.
            if asked := re.search(r'GLOBAL ([\w.]+)', str(error)):
                raise CheckpointError(f'{path}: refused: it asks for {asked[1]}, which could run code') from error
            said, _, detail = str(error).strip().partition('WeightsUnpickler error:')
            reason = (detail or said.partition('. ')[0]).strip().partition('\n')[0]
            if len(reason) < 6 or reason.startswith('Unsupported operand'):  # the number of a byte, or nothing
                reason = f'not a file of torch.save, or a damaged one ({type(error).__name__})'
            raise CheckpointError(f'{path}: cannot be read as weights: {reason}') from error


def _names_before_1_6(path: str | os.PathLike) -> set[str]:
    """What a file of torch's format before 1.6 names, torch's own included, none where it is no such file."""
    names: set[str] = set()
    with open(path, 'rb') as file, contextlib.suppress(Exception):  # damaged pickles raise nearly anything
        for _ in range(4):  # a magic number, the format's, the system's sizes, and what was saved
            for code, name, _ in pickletools.genops(file):
                if code.name == 'GLOBAL':
                    module, _, name = name.partition(' ')
                    # Pickles of this protocol have Python 2's names.
                    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
                    names.add(f'{module}.{name}')
    return names


def _find_damage(path: str | os.PathLike) -> str | None:
    """The first part of a file of ``torch.save`` with another checksum than it was written with.

    ``torch.load`` does not look. A part without a checksum, as torch can be told to write, has a zero there; its
    format before 1.6 has none at all.
    """
    name = 'the list of its parts'
    try:
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as file:
            for part in file.infolist():
                name = part.filename
                with file.open(part) as content:
                    while part.CRC and content.read(2**20):
                        pass
    except Exception:  # not only BadZipFile: what a damaged header asks for may not be there
        return name
    return None


def pick_state_dict(checkpoint: Any, use_ema: bool = True, where: str = '') -> Mapping[str, Tensor]:
    """The state dict in what a checkpoint file holds.

    Args:
        checkpoint: a checkpoint of mmengine's or timm's, or a plain state dict.
        use_ema: the averaged weights where the checkpoint has some, else the ones last trained.
        where: what the checkpoint comes from, for the message: ``'x.pth: '``.

    Raises:
        CheckpointError: it holds no state dict of tensors.
    """
    found = _find_state_dict(checkpoint, use_ema) if isinstance(checkpoint, Mapping) else None
    is_one = isinstance(found, Mapping) and len(found) > 0
    if not is_one or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()):
        raise CheckpointError(
            f'{where}holds no state dict of tensors (expected a checkpoint of mmengine or timm, or a plain state dict)'
        )
    return found


def _find_state_dict(checkpoint: Mapping[str, Any], use_ema: bool) -> Any:
    if isinstance(checkpoint.get('resnet'), Mapping):  # lightly-ai's SimCLRv2, and its contrastive head
        head = checkpoint.get('head')
        head = head if isinstance(head, Mapping) else {}
        return {**checkpoint['resnet'], **{f'head.{name}': tensor for name, tensor in head.items()}}
    state_dict = checkpoint.get('state_dict', checkpoint.get('model', checkpoint))
    if use_ema and isinstance(checkpoint.get('state_dict_ema'), Mapping):  # timm's
        return checkpoint['state_dict_ema']
    averaged = checkpoint.get('ema_state_dict')
    if not use_ema and isinstance(averaged, Mapping) and isinstance(state_dict, Mapping):
        # mmengine's EMAHook saves the averaged weights as 'state_dict' and the trained ones here.
        return {**state_dict, **{k.removeprefix('module.'): v for k, v in averaged.items() if k.startswith('module.')}}
    return state_dict


def find_fault(tensor: Tensor, wanted: Tensor | None = None) -> str | None:
    """What keeps a tensor from being a network's weight, or the one it is ``wanted`` for, besides its shape."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        return 'sparse, quantised or nested'
    if tensor.is_meta:
        return 'without data'
    floating = True if wanted is None else wanted.is_floating_point()
    return None if tensor.is_floating_point() == floating and not tensor.is_complex() else f'of {tensor.dtype}'


def require_weights(state_dict: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where a tensor is sparse, quantised, nested or without data."""
    for name, tensor in state_dict.items():
        if fault := find_fault(tensor, tensor):
            raise CheckpointError(f'{name} is {fault}')


def save_state_dict(state_dict: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Write a plain state dict, as safetensors or, by any other ending, with ``torch.save``.

    Raises:
        FileExistsError: ``path`` is a folder.
        CheckpointError: a tensor is sparse, quantised or without data.
        OSError: it cannot be written, as on a full disk; what was there before is there still.
    """
    path = Path(path)
    require_weights(state_dict)
    tensors = {k: v.contiguous() for k, v in state_dict.items()}
    if path.suffix != '.safetensors':
        torch_save(tensors, path)
        return
    with write_atomically(path) as partial:
        safetensors.torch.save_file(tensors, partial, metadata={'format': 'pt'})


def torch_save(content: Any, path: str | os.PathLike) -> None:
    """``torch.save`` to a file that is whole or not there. Errors as in :func:`~sk_plugins._files.write_atomically`."""
    with write_atomically(path) as partial, io.BytesIO() as file:
        torch.save(content, file)  # in memory: of a full disk torch says no more than that a position is unexpected
        partial.write_bytes(file.getvalue())
