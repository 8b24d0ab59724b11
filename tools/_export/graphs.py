"""ONNX: the graph that torch writes, without what asks for shapes, of convolutions that its runtime has kernels for."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sk_plugins.lean import LeanSelectiveKernel

from .deployable import Deployable

__all__ = ['merge_groups', 'pad_depthwise', 'write']


def merge_groups(model: nn.Module, width: int) -> nn.Module:
    """A copy whose grouped convolutions have at least ``width`` channels a group, and the same outputs.

    Neighbouring groups are put together, with zeros where there was no weight: more multiplications, and less time
    where a runtime has fast kernels for wide groups only. Convolutions of one channel a group stay.
    """
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, conv in list(parent.named_children()):
            if type(conv) is nn.Conv2d and 1 < conv.in_channels // conv.groups < width:
                wanted = -(-width // (conv.in_channels // conv.groups))
                together = next(m for m in range(min(wanted, conv.groups), conv.groups + 1) if conv.groups % m == 0)
                setattr(parent, name, _merged(conv, together))
    return model


@torch.no_grad()
def _merged(conv: nn.Conv2d, together: int) -> nn.Conv2d:
    """The convolution with so many groups in one."""
    merged = copy.copy(conv)
    merged._parameters = dict(conv._parameters)
    merged.groups = conv.groups // together
    blocks = conv.weight.unflatten(0, (merged.groups, together, -1))  # (groups, together, out, in, height, width)
    weight = blocks.new_zeros(*blocks.shape[:3], together, *blocks.shape[3:])
    for i in range(together):
        weight[:, i, :, i] = blocks[:, i]
    merged.weight = nn.Parameter(weight.flatten(3, 4).flatten(0, 2), requires_grad=False)
    return merged


def pad_depthwise(model: nn.Module, multiple: int) -> nn.Module:
    """A copy whose depthwise convolutions between two 1x1 have a multiple of so many channels, and the same outputs.

    The channels that are added are zero. Looks into the branches of ShuffleNetV2's units, with SK convolutions or plain
    ones, as :func:`sk_plugins.simplify` leaves them.
    """
    model = copy.deepcopy(model)
    for branch in model.modules():
        if isinstance(branch, nn.Sequential):
            layers = [layer for layer in branch if type(layer) not in (nn.Identity, nn.ReLU)]
            for before, middle, after in zip(layers, layers[1:], layers[2:]):
                if all(type(conv) is nn.Conv2d and conv.groups == 1 for conv in (before, after)):
                    _pad(before, middle, after, -before.out_channels % multiple)
    return model


@torch.no_grad()
def _pad(before: nn.Conv2d, middle: nn.Module, after: nn.Conv2d, number: int) -> None:
    """Add so many channels between two convolutions."""
    channels = before.out_channels
    convs = [middle]
    if type(middle) is LeanSelectiveKernel and not len(middle.after):
        convs = [path.conv for path in middle.paths]
    if not (number and all(type(conv) is nn.Conv2d and conv.groups == conv.out_channels == channels for conv in convs)):
        return
    _add_outputs(before, number)
    _add_inputs(after, number)
    for conv in convs:
        _add_outputs(conv, number)
        conv.in_channels = conv.groups = conv.out_channels
    if middle not in convs and middle.attends:
        _add_inputs(middle.reduce[0], number)
        if not middle.shared:
            _add_outputs(middle.select, number, parts=middle.select.out_channels // channels)


def _add_outputs(conv: nn.Conv2d, number: int, parts: int = 1) -> None:
    """Zeros at the end of each of the parts that the output channels are in."""
    for name in ('weight', 'bias'):
        values = getattr(conv, name)
        if values is not None:
            blocks = values.unflatten(0, (parts, -1))
            zeros = blocks.new_zeros(parts, number, *blocks.shape[2:])
            setattr(conv, name, nn.Parameter(torch.cat([blocks, zeros], 1).flatten(0, 1), requires_grad=False))
    conv.out_channels += parts * number


def _add_inputs(conv: nn.Conv2d, number: int) -> None:
    zeros = conv.weight.new_zeros(conv.out_channels, number, *conv.kernel_size)
    conv.weight = nn.Parameter(torch.cat([conv.weight, zeros], 1), requires_grad=False)
    conv.in_channels += number


def write(deployable: Deployable, path: Path, opset: int | None = None) -> None:
    """Write an ONNX file with the input 'image'.

    Raises:
        ValueError: torch cannot write this ``opset``.
    """
    shapes: dict[int, str] = {}
    first = 1 if deployable.uint8 else 2
    if 'batch' in deployable.dynamic:
        shapes[0] = 'batch'
    if 'size' in deployable.dynamic:
        shapes.update({first: 'height', first + 1: 'width'})
    program = torch.onnx.export(
        deployable.model,
        (deployable.image,),
        input_names=['image'],
        output_names=deployable.outputs,
        opset_version=opset,
        dynamic_shapes=(shapes,) if shapes else None,
        dynamo=True,
        verbose=False,
    )
    written = program.model.opset_imports['']
    if opset is not None and written != opset:
        raise ValueError(f'--opset {opset}: torch cannot write it for this model, which takes {written}')
    _simplify(program.model)
    program.model.metadata_props.update(deployable.metadata)
    program.save(path)


def _simplify(model: Any) -> None:
    """Averages over whole maps by their own operator, which ONNX Runtime keeps in blocks, and reshapes by constants."""
    import onnx_ir as ir

    graph = model.graph
    for node in list(graph):
        if node.op_type == 'ReduceMean' and _averages_maps(node):
            pooled = ir.node('GlobalAveragePool', [node.inputs[0]], name=node.name)
            _replace(ir, graph, node, pooled)
        elif node.op_type == 'Reshape' and node.inputs[1].producer() is not None:
            target = _constant_shape(node)
            if target is not None:
                value = ir.Value(name=f'{node.outputs[0].name}_shape', const_value=ir.tensor(target))
                value.const_value.name = value.name
                graph.register_initializer(value)
                node.replace_input_with(1, value)
                node.attributes.pop('allowzero', None)  # which torch sets
    # What only told of shapes.
    for node in reversed(list(graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def _averages_maps(node: Any) -> bool:
    axes = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] is not None else None
    keepdims = node.attributes.get('keepdims')
    rank = node.inputs[0].shape
    return (
        axes is not None
        and sorted(axes.numpy().tolist()) in ([2, 3], [-2, -1])
        and (keepdims is None or keepdims.as_int() == 1)
        and rank is not None
        and len(rank) == 4
    )


def _constant_shape(node: Any) -> list[int] | None:
    """A Reshape's target without asking for shapes: 0 for a side that stays, -1 for one alone that is not known."""
    before, after = node.inputs[0].shape, node.outputs[0].shape
    if before is None or after is None:
        return None
    target = []
    for i, side in enumerate(after):
        if isinstance(side, int):
            target.append(side)
        else:
            target.append(0 if i < len(before) and str(before[i]) == str(side) else -1)
    return target if target.count(-1) <= 1 else None


def _replace(ir: Any, graph: Any, old: Any, new: Any) -> None:
    new.outputs[0].shape, new.outputs[0].type = old.outputs[0].shape, old.outputs[0].type
    new.outputs[0].name = old.outputs[0].name
    graph.insert_before(old, new)
    ir.convenience.replace_all_uses_with(old.outputs[0], new.outputs[0])
    graph.remove(old, safe=True)
