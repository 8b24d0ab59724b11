"""Eight bits by torchao's PT2E."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sk_plugins.lean import LeanSelectiveKernel

from .deployable import Deployable
from .targets import exported, import_, write_aoti, write_executorch

__all__ = ['quantise_aoti', 'quantise_executorch']


def quantise_aoti(deployable: Deployable, path: Path, images: Sequence[Tensor], keep: frozenset[str]) -> None:
    """With the quantiser for Inductor on x86."""
    module = import_('torchao.quantization.pt2e.quantizer.x86_inductor_quantizer')
    # Sums of products of 8 bits overflow 16, which is all that a CPU without VNNI has: 7 bits of activations.
    narrow = not torch.cpu.get_capabilities().get('avx512_vnni')
    quantiser = module.X86InductorQuantizer()
    quantiser.set_global(module.get_default_x86_inductor_quantization_config(reduce_range=narrow))
    # Inductor freezes weights, and finds convolutions of 8 bits, only where no gradients are recorded.
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        write_aoti(_quantised(deployable, quantiser, images, keep), path)


def quantise_executorch(deployable: Deployable, path: Path, images: Sequence[Tensor], keep: frozenset[str]) -> None:
    """With the quantiser for XNNPACK."""
    module = import_('executorch.backends.xnnpack.quantizer.xnnpack_quantizer')
    quantiser = module.XNNPACKQuantizer()
    quantiser.set_global(module.get_symmetric_quantization_config(is_per_channel=True))
    write_executorch(_quantised(deployable, quantiser, images, keep), path)


def _quantised(deployable: Deployable, quantiser: Any, images: Sequence[Tensor], keep: frozenset[str]) -> Deployable:
    """The network between pairs that quantise and dequantise, ready to be written."""
    pt2e = import_('torchao.quantization.pt2e.quantize_pt2e')
    model = exported(deployable).module(check_guards=False)
    _leave(quantiser, dict(deployable.model.named_modules()), keep)
    model = pt2e.prepare_pt2e(model, quantiser)
    with torch.no_grad():
        for image in images:
            model(image)
    return dataclasses.replace(deployable, model=pt2e.convert_pt2e(model))


def _leave(quantiser: Any, modules: dict[str, nn.Module], keep: frozenset[str]) -> None:
    """Let a quantiser pass over parts of the SK units: their attention (on pooled values), their selection."""
    key = import_('torchao.quantization.pt2e.quantizer.quantizer').Q_ANNOTATION_KEY
    annotate = quantiser.annotate

    def annotate_others(model: torch.fx.GraphModule) -> torch.fx.GraphModule:
        model = annotate(model)
        for node in model.graph.nodes:
            if _part(node, modules) in keep:
                node.meta.pop(key, None)
        return model

    if keep:
        quantiser.annotate = annotate_others


def _part(node: torch.fx.Node, modules: dict[str, nn.Module]) -> str:
    """'attention', 'select' or '' of a node, by the module in whose forward it is."""
    path = next(reversed((node.meta.get('nn_module_stack') or {'': ('', None)}).values()))[0]
    owners = path.split('.')
    for end in range(len(owners), 0, -1):
        if isinstance(modules.get('.'.join(owners[:end])), LeanSelectiveKernel):
            inside = owners[end:]
            return 'select' if not inside else 'attention' if inside[0] in ('reduce', 'select') else ''
    return ''
