"""Eight bits, by each runtime's own quantiser, from images like those that it will see."""

import copy
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform
from torch import Tensor

from sk_plugins.lean import LeanSelectiveKernel

from .deployable import Deployable
from .pt2e import quantise_aoti, quantise_executorch
from .targets import TARGETS, beside, convert_openvino, import_, require, write_litert, write_onnx

__all__ = ['KEEP', 'QUANTISERS', 'find_images', 'labelled', 'read_images']

GROUP_WIDTH_8 = 32  # onnxruntime's convolutions of 8 bits multiply a matrix for every group
SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.webp')
# What of SK units stays in float, by --int8-float: docs/deployment.md has what was measured.
KEEP = {
    'nothing': frozenset(),
    'attention': frozenset({'attention'}),
    'select': frozenset({'select'}),
    'both': frozenset({'attention', 'select'}),
}


def find_images(folder: Path) -> list[Path]:
    """The image files in a folder and those below it.

    Raises:
        FileNotFoundError: there are none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f'{folder}: no such folder of images')
    found = sorted(path for path in folder.rglob('*') if path.suffix.lower() in SUFFIXES)
    if not found:
        raise FileNotFoundError(f'{folder}: has no images ({", ".join(SUFFIXES)})')
    return found


def labelled(folder: Path, labels: list[str] | None, classes: int) -> list[tuple[Path, int]]:
    """The images of FOLDER/CLASS/*, each with its class's number among so many: the network's where it names them.

    Raises:
        ValueError: folders that are no classes of the network.
    """
    find_images(folder)
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if not names:
        raise ValueError(f'{folder}: has no folders, of which there is to be one for each class')
    if not labels and len(names) != classes:
        raise ValueError(
            f'{folder}: has {len(names)} folders, and the network {classes} classes, which it does not name'
        )
    order = labels or names
    unknown = [name for name in names if name not in order]
    if unknown:
        raise ValueError(f'{folder}: its folders {names[:5]} are not among the classes of the network, {order[:5]}')
    return [(path, order.index(name)) for name in names for path in find_images(folder / name)]


def read_images(paths: list[Path], deployable: Deployable) -> Iterator[Tensor]:
    """Images as the network takes them, (1, ...).

    Raises:
        ValueError: a file that is no image.
    """
    preprocessing = deployable.preprocessing
    settings = {key: value for key, value in preprocessing.items() if key != 'label_names'}
    transform = create_transform(**settings, is_training=False)
    mean, std = (torch.tensor(preprocessing[key]).view(3, 1, 1) for key in ('mean', 'std'))
    for path in paths:
        try:
            with Image.open(path) as image:
                tensor = transform(image.convert('RGB'))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f'{path}: is no image that can be read: {error}') from error
        if deployable.uint8:
            tensor = ((tensor * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
        yield tensor[None]


def quantise_onnx(
    deployable: Deployable, path: Path, images: list[Tensor], keep: frozenset[str], opset: int | None = None
) -> None:
    """QDQ by onnxruntime: activations and weights of 8 bits, weights by channel."""
    require('onnxruntime', extra='onnx')
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.images, None)
            return None if image is None else {'image': image.numpy()}

    with tempfile.TemporaryDirectory() as folder:
        plain, ready = Path(folder, 'float.onnx'), Path(folder, 'ready.onnx')
        write_onnx(_in_products(deployable), plain, opset, width=GROUP_WIDTH_8)
        quant_pre_process(plain, ready, skip_symbolic_shape=True)
        quantize_static(
            ready,
            path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            nodes_to_exclude=_of_parts(ready, keep),
            extra_options={'ActivationSymmetric': False, 'DedicatedQDQPair': False},
        )


def _in_products(deployable: Deployable) -> Deployable:
    """With branches that are blended by what onnxruntime has in 8 bits."""
    model = copy.deepcopy(deployable.model)
    for module in model.modules():
        if isinstance(module, LeanSelectiveKernel):
            module.products = True
    return dataclasses.replace(deployable, model=model)


def _of_parts(path: Path, keep: frozenset[str]) -> list[str]:
    """Names of the nodes that stay in float: of the attention (on pooled values), of the selection, of both."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    makers = {output: node for node in graph.node for output in node.output}
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    parts: dict[str, list[str]] = {'attention': [], 'select': []}
    for node in graph.node:
        if node.op_type == 'GlobalAveragePool' and any(user.op_type == 'Conv' for user in users[node.output[0]]):
            parts['attention'].append(node.name)
            waiting = list(users[node.output[0]])
            while waiting:
                user = waiting.pop()
                if user.op_type in ('Conv', 'Relu', 'Sigmoid', 'Softmax', 'Split', 'Concat', 'Sub'):
                    parts['attention'].append(user.name)
                    waiting += [after for output in user.output for after in users.get(output, [])]
                elif user.op_type == 'Mul':
                    parts['select'].append(user.name)
                    around = [makers.get(name) for name in user.input] + users.get(user.output[0], [])
                    parts['select'] += [n.name for n in around if n is not None and n.op_type in ('Add', 'Sub')]
            total = makers.get(node.input[0])
            if total is not None and total.op_type == 'Add':
                parts['select'].append(total.name)
    return sorted({name for part in keep for name in parts[part]})


def quantise_openvino(deployable: Deployable, path: Path, images: list[Tensor], keep: frozenset[str]) -> None:
    """NNCF's post-training quantisation."""
    require('openvino', 'nncf', extra='openvino')
    import nncf
    import openvino

    types = {'attention': ['Sigmoid', 'ReduceMean'], 'select': ['Subtract', 'Multiply']}
    ignored = [kind for part in keep for kind in types[part]]
    model = nncf.quantize(
        convert_openvino(deployable),
        nncf.Dataset(images, lambda image: image.numpy()),
        subset_size=len(images),
        preset=nncf.QuantizationPreset.MIXED,
        ignored_scope=nncf.IgnoredScope(types=ignored, validate=False) if ignored else None,
    )
    openvino.save_model(model, path, compress_to_fp16=False)


def quantise_litert(deployable: Deployable, path: Path, images: list[Tensor], keep: frozenset[str]) -> None:
    """By ai-edge-quantizer, from the float file; the file takes and gives floats."""
    require('ai_edge_quantizer', extra='litert', environment=TARGETS['litert'].environment)
    from ai_edge_quantizer import quantizer, recipe
    from ai_edge_quantizer.algorithm_manager import AlgorithmName
    from ai_edge_quantizer.qtyping import TFLOperationName

    types = {'attention': ['MEAN', 'SUM', 'AVERAGE_POOL_2D', 'LOGISTIC', 'SOFTMAX'], 'select': ['SUB', 'MUL']}
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, 'float.tflite')
        write_litert(deployable, plain)
        quantiser = quantizer.Quantizer(str(plain))
        quantiser.load_quantization_recipe(recipe.static_wi8_ai8())
        for name in ('INPUT', 'OUTPUT', *(name for part in keep for name in types[part])):
            quantiser.update_quantization_recipe('.*', TFLOperationName[name], algorithm_key=AlgorithmName.NO_QUANTIZE)
        reader = import_('ai_edge_litert.interpreter').Interpreter(str(plain))
        (signature, names), *_ = reader.get_signature_list().items()
        data = [{names['inputs'][0]: image.numpy()} for image in images]
        quantiser.quantize(quantiser.calibrate({signature: data}, num_threads=2)).export_model(path)
    beside(path, deployable.metadata)


QUANTISERS = {
    'onnx': quantise_onnx,
    'openvino': quantise_openvino,
    'aoti': quantise_aoti,
    'executorch': quantise_executorch,
    'litert': quantise_litert,
}
