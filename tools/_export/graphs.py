"""ONNX: the graph that torch writes, without what asks for shapes."""

from pathlib import Path
from typing import Any

import torch

from .deployable import Deployable

__all__ = ['write']


def write(deployable: Deployable, path: Path, opset: int | None = None) -> None:
    """Write an ONNX file with the input 'image'.

    Raises:
        ValueError: torch cannot write this ``opset``.
    """
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset is not None and opset > newest:
        raise ValueError(f'--opset {opset}: onnx {onnx.__version__} has operator sets up to {newest}')
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
