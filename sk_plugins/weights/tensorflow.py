"""Reading checkpoints of TensorFlow 1, for Google's SimCLRv2 networks, with TensorFlow's own reader.

A checkpoint is ``model.ckpt-250228.index`` with ``.data-*`` beside it, or a folder whose file ``checkpoint`` names the
newest. TensorFlow (the extra ``tf``) is imported when one is read.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._resources import how_to_install

__all__ = ['SLOT', 'is_checkpoint', 'read']

SLOT = '/Momentum'  # how the names of the optimizer's variables end


def is_checkpoint(path: str | os.PathLike) -> bool:
    """Whether there is a TensorFlow checkpoint of this name: a prefix such as ``model.ckpt-250228``, or a folder."""
    path = Path(path)
    return Path(f'{path}.index').is_file() or (path / 'checkpoint').is_file()


def read(path: str | os.PathLike, load: Callable[[str], Any] | None = None) -> dict[str, Tensor]:
    """The variables of a checkpoint by name, in TensorFlow's shapes.

    Args:
        path: a prefix such as ``model.ckpt-250228``, or a folder.
        load: opens it, in place of ``tf.train.load_checkpoint``.

    Returns:
        The tensors; the optimizer's, whose names end in ``/Momentum``, are without data, on the device ``meta``.

    Raises:
        ImportError: TensorFlow is not installed.
        ValueError: it cannot be read.
    """
    if load is None:
        try:
            import tensorflow
        except ImportError as error:
            message = f'{path}: a TensorFlow checkpoint is read with tensorflow: {how_to_install("tf")}'
            raise ImportError(message) from error
        load = tensorflow.train.load_checkpoint
    try:
        reader = load(os.fspath(path))
        return {
            name: torch.empty(shape, device='meta') if name.endswith(SLOT) else torch.as_tensor(reader.get_tensor(name))
            for name, shape in reader.get_variable_to_shape_map().items()
        }
    except Exception as error:  # TensorFlow's are of its own kinds
        raise ValueError(f'{path}: cannot be read as a TensorFlow checkpoint: {error}') from error
