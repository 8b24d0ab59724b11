"""Reading MindSpore's ``.ckpt`` files without MindSpore, for MindCV's SK networks.

A ``.ckpt`` is a protocol buffer of named tensors. The published files could not be had while this was written: the
fields are those of MindSpore's ``checkpoint.proto``, and the tests write files to it.
"""

import math
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ._protobuf import message_class, read_message

__all__ = ['is_mindspore', 'read']

# mindspore/ccsrc/utils/checkpoint.proto.
_SCHEMA = {
    'TensorProto': {'dims': (1, 'int64 repeated'), 'tensor_type': (2, 'string'), 'tensor_content': (3, 'bytes')},
    'Value': {'tag': (1, 'string'), 'tensor': (2, 'TensorProto')},
    'Checkpoint': {'value': (1, 'Value repeated')},
}
_DTYPES = {
    'Float16': torch.float16,
    'Float32': torch.float32,
    'Float64': torch.float64,
    'BFloat16': torch.bfloat16,
    'Bool': torch.bool,
    'UInt8': torch.uint8,
    'Int8': torch.int8,
    'Int16': torch.int16,
    'Int32': torch.int32,
    'Int64': torch.int64,
}


@cache
def _checkpoint() -> type:
    return message_class('mindspore', _SCHEMA, 'Checkpoint')


def is_mindspore(path: str | os.PathLike) -> bool:
    """Whether a ``.ckpt`` begins as MindSpore's do; those of PyTorch are zip files or pickles."""
    with open(path, 'rb') as file:
        return file.read(1) == b'\x0a'


def read(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a MindSpore checkpoint under their own names.

    What a training saved beside them, such as strings, is left out: values of types that torch does not have.

    Raises:
        ImportError: ``protobuf`` is not installed.
        ValueError: the file is damaged, no checkpoint of MindSpore's, or has no tensors of a type that is read.
    """
    path = Path(path)
    checkpoint = read_message(path, _checkpoint, 'a checkpoint of MindSpore')
    parts: dict[str, list] = {}
    for value in checkpoint.value:  # a large tensor comes in several parts
        parts.setdefault(value.tag, []).append(value.tensor)
    if not any(tensors[0].tensor_content for tensors in parts.values()):
        raise ValueError(f'{path}: holds no tensors (expected a checkpoint of MindSpore)')
    read = {name: tensors for name, tensors in parts.items() if tensors[0].tensor_type in _DTYPES}
    if not read:
        name, kind = next((name, tensors[0].tensor_type) for name, tensors in parts.items())
        raise ValueError(f'{path}: {name} is of type {kind!r}; these are read: {", ".join(_DTYPES)}')
    return {name: _tensor(path, name, tensors) for name, tensors in read.items()}


def _tensor(path: Path, name: str, tensors: list) -> Tensor:
    kind, shape = tensors[0].tensor_type, tuple(tensors[0].dims)
    content = bytearray(b''.join(tensor.tensor_content for tensor in tensors))
    dtype = _DTYPES[kind]
    if shape == (0,) and content:  # a scalar
        shape = ()
    if len(content) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f'{path}: {name} has {len(content)} bytes for {dtype} of shape {shape}')
    return torch.frombuffer(content, dtype=dtype).reshape(shape)
