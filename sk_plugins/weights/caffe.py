"""Reading ``.caffemodel`` files without Caffe, for the authors' published SKNet-50 and SKNet-101.

A ``.caffemodel`` is a protocol buffer. The few fields that hold weights are declared here at run time and parsed by
the ``protobuf`` package (the extra ``caffe``); the rest of the file is skipped. The published files
(https://github.com/implus/SKNet) could not be had while this was written: the layers' names, the order of their blobs
and the arithmetic are those of the published ``.prototxt`` files and of the layers' source, and the tests write files
to them.
"""

import math
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._protobuf import message_class, read_message

__all__ = ['read']

# Message -> field -> its number and its type, of caffe.proto (BVLC/caffe, src/caffe/proto/caffe.proto). The values are
# packed floats there, which on the wire are the bytes of the array.
_SCHEMA = {
    'BlobShape': {'dim': (1, 'int64 packed')},
    'BlobProto': {
        'num': (1, 'int32'),
        'channels': (2, 'int32'),
        'height': (3, 'int32'),
        'width': (4, 'int32'),
        'data': (5, 'bytes'),
        'shape': (7, 'BlobShape'),
        'double_data': (8, 'bytes'),
    },
    'LayerParameter': {'name': (1, 'string'), 'type': (2, 'string'), 'blobs': (7, 'BlobProto repeated')},
    'NetParameter': {'name': (1, 'string'), 'layer': (100, 'LayerParameter repeated')},
}
_LEGACY_AXES = ('num', 'channels', 'height', 'width')


@cache
def _net_parameter() -> type:
    """The class of the message ``NetParameter``, as far as ``_SCHEMA`` declares it."""
    return message_class('caffe', _SCHEMA, 'NetParameter')


def read(path: str | os.PathLike) -> dict[str, Tensor]:
    """The weights of a ``.caffemodel``: blob i of a layer as ``'LAYER.i'``, in float32 and in Caffe's shape.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: ``protobuf`` is not installed.
        ValueError: the file is damaged, no ``.caffemodel``, or one without weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such checkpoint file')
    net = read_message(path, _net_parameter, 'a .caffemodel')
    weights = {
        f'{layer.name}.{i}': _tensor(path, layer, blob) for layer in net.layer for i, blob in enumerate(layer.blobs)
    }
    if not weights:
        raise ValueError(f'{path}: holds no layer with weights (expected a .caffemodel in the format of Caffe 1.0)')
    return weights


def _tensor(path: Path, layer: Any, blob: Any) -> Tensor:
    shape = tuple(blob.shape.dim) if blob.HasField('shape') else tuple(getattr(blob, axis) for axis in _LEGACY_AXES)
    data, dtype = (blob.data, torch.float32) if blob.data else (blob.double_data, torch.float64)
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f'{path}: layer {layer.name!r} has a blob of {len(data)} bytes for {dtype} of shape {shape}')
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape).float()
