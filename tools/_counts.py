"""What a model of the zoo has: parameters, multiply-adds, activations and strides, beside the paper's figures."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sk_plugins import zoo


@dataclass(frozen=True)
class Row:
    """What is counted of a model, for one image of its input size, and what the paper prints.

    ``gflops`` are multiply-adds / 1e9 by torch's own counter; ``activations`` are the elements of all outputs of
    convolutions and linear layers; ``output_strides`` belong to the feature maps; differences are relative to the
    paper's figures.
    """

    name: str
    parameters: int
    gflops: float
    activations: int
    input_size: tuple[int, int, int]
    output_strides: tuple[int, ...]
    paper_parameters_m: float | None
    paper_gflops: float | None
    parameters_difference: float | None
    gflops_difference: float | None
    paper_errors: dict[str, float]
    weights: dict[str, float]


def count(spec: zoo.ModelSpec, size: int | None = None) -> Row:
    """The row of a model; ``size`` is the side of the image where it is not the model's own."""
    channels, side, _ = spec.input_size
    side = size or side
    # On the meta device counting costs neither memory nor time.
    model = spec.build(device='meta').eval()
    activations = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda _module, _inputs, output: activations.append(output.numel()))
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.empty(1, channels, side, side, device='meta'))
    parameters = sum(p.numel() for p in model.parameters())
    gflops = counter.get_total_flops() / 2e9  # the counter has two operations for every multiply-add
    paper = spec.paper or zoo.PaperFigures(None)
    return Row(
        spec.name,
        parameters=parameters,
        gflops=gflops,
        activations=sum(activations),
        input_size=(channels, side, side),
        output_strides=tuple(feature['reduction'] for feature in model.feature_info),
        paper_parameters_m=paper.parameters_m,
        paper_gflops=paper.gflops,
        parameters_difference=_difference(parameters / 1e6, paper.parameters_m),
        gflops_difference=_difference(gflops, paper.gflops),
        paper_errors=dict(paper.errors),
        weights={weights.hf_hub_id or weights.url: weights.top1 for weights in spec.weights},
    )


def rows() -> list[Row]:
    """The rows of all models, in the zoo's order."""
    return [count(spec) for spec in zoo.MODELS.values()]


def _difference(counted: float, paper: float | None) -> float | None:
    return None if paper is None else counted / paper - 1
