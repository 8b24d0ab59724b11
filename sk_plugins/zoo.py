"""One row per named model: its shape, the paper's figures for it, and where its weights are.

The registries read this table.
"""

from dataclasses import dataclass, field
from typing import Any

__all__ = ['MODELS', 'ModelSpec', 'PaperFigures', 'Weights', 'with_weights']


@dataclass(frozen=True)
class PaperFigures:
    """What the paper prints for a network (Tables 1 and 2), single 224 or 320 crop on ImageNet-1k."""

    parameters_m: float
    gflops: float
    top1_error_224: float
    top1_error_320: float


@dataclass(frozen=True)
class Weights:
    """Published weights: their Hub repository with the preprocessing, figures and licence that belong to them."""

    hf_hub_id: str
    tag: str
    top1: float
    license: str
    recipe: str
    input_size: tuple[int, int, int] = (3, 224, 224)
    crop_pct: float = 0.875
    interpolation: str = 'bicubic'
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    num_classes: int = 1000


@dataclass(frozen=True)
class ModelSpec:
    """A named network: ``depth`` is OpenMMLab's name for it, ``args`` what the network's class takes."""

    name: str
    depth: int
    args: dict[str, Any]
    paper: PaperFigures | None = None
    weights: tuple[Weights, ...] = field(default=())


MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        ModelSpec('sknet26', 26, dict(layers=(2, 2, 2, 2))),
        ModelSpec(
            'sknet50',
            50,
            dict(layers=(3, 4, 6, 3)),
            PaperFigures(27.5, 4.47, 20.79, 19.32),
            (
                Weights(
                    'timm/skresnext50_32x4d.ra_in1k',
                    tag='ra_in1k',
                    top1=80.15,
                    license='apache-2.0',
                    recipe="timm's RandAugment (RA) recipe on ImageNet-1k",
                ),
            ),
        ),
        ModelSpec('sknet101', 101, dict(layers=(3, 4, 23, 3)), PaperFigures(48.9, 8.46, 20.19, 18.40)),
    )
}


def with_weights() -> list[str]:
    """The 'name.tag' of every model that has published weights."""
    return [f'{spec.name}.{weights.tag}' for spec in MODELS.values() for weights in spec.weights]
