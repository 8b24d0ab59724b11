"""One row per named model: its shape, its names in both registries, the paper's figures, where its weights are.

The registries read this table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .networks import SKResNet, SKResNetSimCLR, SKShuffleNetV2

__all__ = [
    'LAYERS',
    'MODELS',
    'ModelSpec',
    'PaperFigures',
    'Weights',
    'find',
    'find_simclr',
    'simclr',
    'skresnext',
    'weight_file',
    'with_weights',
]


@dataclass(frozen=True)
class PaperFigures:
    """What the paper prints for a network: ``errors`` are top-1 in per cent by test set.

    '224' and '320' are single crops on ImageNet-1k (Tables 2 and 4); 'CIFAR-10' and 'CIFAR-100' Table 5's.
    """

    parameters_m: float | None
    gflops: float | None = None
    errors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Weights:
    """Published weights: a Hub repository or an address, with what belongs to them.

    ``file`` is the repository's file, where it has no ``model.safetensors``: a pickle, read with ``weights_only=True``.
    """

    tag: str
    top1: float
    license: str
    recipe: str
    origin_url: str
    hf_hub_id: str | None = None
    file: str | None = None
    url: str | None = None
    input_size: tuple[int, int, int] = (3, 224, 224)
    crop_pct: float = 0.875
    interpolation: str = 'bicubic'
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    num_classes: int = 1000


@dataclass(frozen=True)
class ModelSpec:
    """A named network.

    ``name`` is timm's name for it, and ``openmmlab`` the type and the arguments of the same network as a backbone.
    Where ``in_timm``, timm itself has the name and the network, and keeps both.
    """

    name: str
    network: type[nn.Module]
    args: dict[str, Any]
    openmmlab: tuple[str, dict[str, Any]]
    paper: PaperFigures | None = None
    weights: tuple[Weights, ...] = ()
    input_size: tuple[int, int, int] = (3, 224, 224)
    num_classes: int = 1000
    in_timm: bool = False

    def arguments(self, **overrides) -> dict[str, Any]:
        """The network's arguments; those in ``overrides`` go first, and ``sk_kwargs`` are merged."""
        args = {**self.args, **overrides}
        if self.args.get('sk_kwargs') and isinstance(overrides.get('sk_kwargs'), Mapping):
            args['sk_kwargs'] = {**self.args['sk_kwargs'], **overrides['sk_kwargs']}
        return args

    def build(self, **overrides) -> nn.Module:
        """The network with random weights."""
        return self.network(**self.arguments(**{'num_classes': self.num_classes, **overrides}))


# Units per stage of a bottleneck network with so many layers.
LAYERS = {26: (2, 2, 2, 2), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def _sknets() -> list[ModelSpec]:
    timms = Weights(
        'ra_in1k',
        top1=80.15,
        license='apache-2.0',
        recipe="timm's RandAugment (RA) recipe on ImageNet-1k",
        origin_url='https://github.com/huggingface/pytorch-image-models',
        hf_hub_id='timm/skresnext50_32x4d.ra_in1k',
    )
    papers = {
        50: PaperFigures(27.5, 4.47, {'224': 20.79, '320': 19.32}),
        101: PaperFigures(48.9, 8.46, {'224': 20.19, '320': 18.40}),
    }
    return [
        ModelSpec(
            f'sknet{depth}',
            SKResNet,
            dict(layers=LAYERS[depth]),
            ('SKNet', dict(depth=depth)),
            papers.get(depth),
            (timms,) if depth == 50 else (),
        )
        for depth in (26, 50, 101)
    ]


def skresnext(depth: int, groups: int, width_per_group: float) -> ModelSpec:
    """The row of an SK-ResNeXt, of ``MODELS`` or not."""
    is_papers = (depth, groups, width_per_group) == (101, 32, 4)
    return ModelSpec(
        f'skresnext{depth}_{groups}x{width_per_group}d',
        SKResNet,
        dict(layers=LAYERS[depth], cardinality=groups, base_width=width_per_group),
        ('SKResNeXt', dict(depth=depth, groups=groups, width_per_group=width_per_group)),
        PaperFigures(48.9, 8.46, {'224': 20.19, '320': 18.40}) if is_papers else None,
    )


def _skresnexts() -> list[ModelSpec]:
    return [skresnext(101, groups, width) for groups, width in ((32, 4), (32, 8), (64, 4))]


def _skresnets() -> list[ModelSpec]:
    """timm's design: groups 1, and each branch gets its share of the input channels."""
    basic = dict(block='basic', cardinality=1, base_width=64, sk_kwargs=dict(split_input=True, reduction=8, min_dim=16))
    bottleneck = dict(cardinality=1, base_width=64, sk_kwargs=dict(split_input=True, reduction=16, min_dim=8))
    deep_stem = dict(stem_width=32, stem_type='deep', avg_down=True)
    shapes = {
        18: dict(layers=(2, 2, 2, 2), **basic),
        34: dict(layers=(3, 4, 6, 3), **basic),
        50: dict(layers=LAYERS[50], **bottleneck),
        '50d': dict(layers=LAYERS[50], **bottleneck, **deep_stem),
    }
    top1 = {18: 73.02, 34: 76.96}
    return [
        ModelSpec(
            f'skresnet{depth}',
            SKResNet,
            args,
            ('SKResNet', dict(depth=depth)),
            weights=(
                Weights(
                    'ra_in1k',
                    top1=top1[depth],
                    license='apache-2.0',
                    recipe="timm's RandAugment (RA) recipe on ImageNet-1k",
                    origin_url='https://github.com/huggingface/pytorch-image-models',
                    hf_hub_id=f'timm/skresnet{depth}.ra_in1k',
                ),
            )
            if depth in top1
            else (),
            in_timm=True,
        )
        for depth, args in shapes.items()
    ]


def simclr(depth: int, width_factor: int) -> ModelSpec:
    """The row of a SimCLRv2 network, of ``MODELS`` or not."""
    top1 = _SIMCLR_TOP1.get((depth, width_factor))
    file = f'r{depth}_{width_factor}x_sk1'
    return ModelSpec(
        f'skresnet{depth}x{width_factor}_simclr',
        SKResNetSimCLR,
        dict(layers=LAYERS[depth], width_factor=width_factor),
        ('SKResNetSimCLR', dict(depth=depth, width_factor=width_factor)),
        weights=(
            Weights(
                'goog_in1k',
                top1=top1,
                license='apache-2.0',
                recipe='SimCLRv2 on ImageNet-1k without labels, then a linear classifier on the frozen network',
                origin_url='https://github.com/google-research/simclr',
                hf_hub_id=f'lightly-ai/simclrv2-imagenet1k-{file}',
                file=f'{file}.pth',
                mean=(0.0, 0.0, 0.0),
                std=(1.0, 1.0, 1.0),
            ),
        )
        if top1
        else (),
    )


# Of the linear classifier (arXiv:2006.10029, Table 1), by depth and width factor.
_SIMCLR_TOP1 = {
    (50, 1): 74.6,
    (50, 2): 77.7,
    (101, 1): 76.3,
    (101, 2): 79.0,
    (152, 1): 77.2,
    (152, 2): 79.4,
    (152, 3): 79.8,
}


def _simclrs() -> list[ModelSpec]:
    return [simclr(*shape) for shape in _SIMCLR_TOP1]


def _shufflenets() -> list[ModelSpec]:
    shapes = {
        0.5: dict(channels=(48, 96, 192)),
        1.0: dict(channels=(116, 232, 464)),
        1.5: dict(channels=(176, 352, 704)),
        2.0: dict(channels=(244, 488, 976), head_channels=2048),
    }
    papers = {  # Table 4
        (0.5, 'plain'): PaperFigures(1.40, 0.04039, {'224': 38.41}),
        (0.5, 'se'): PaperFigures(1.56, 0.04085, {'224': 36.34}),
        (0.5, 'sk'): PaperFigures(1.48, 0.04258, {'224': 35.35}),
        (1.0, 'plain'): PaperFigures(2.45, 0.14035, {'224': 30.57}),
        (1.0, 'se'): PaperFigures(2.66, 0.14173, {'224': 29.47}),
        (1.0, 'sk'): PaperFigures(2.63, 0.14566, {'224': 28.36}),
    }
    ported = 'ported from https://github.com/ericsun99/Shufflenet-v2-Pytorch'
    new_recipe = "torchvision's new training recipe (https://github.com/pytorch/vision/pull/5906)"
    files = {  # torchvision.models.ShuffleNet_V2_X*_Weights.IMAGENET1K_V1: file, top-1, recipe, resize
        0.5: ('shufflenetv2_x0.5-f707e7126e.pth', 60.552, ported, 256),
        1.0: ('shufflenetv2_x1-5666bf0f80.pth', 69.362, ported, 256),
        1.5: ('shufflenetv2_x1_5-3c479a10.pth', 72.996, new_recipe, 232),
        2.0: ('shufflenetv2_x2_0-8be3c8ee.pth', 76.230, new_recipe, 232),
    }
    specs = []
    for unit, prefix in (('plain', ''), ('se', 'se'), ('sk', 'sk')):
        for factor, args in shapes.items():
            file, top1, recipe, resize = files[factor]
            torchvisions = Weights(
                'tv_in1k',
                top1=top1,
                license='bsd-3-clause',
                recipe=recipe,
                origin_url='https://github.com/pytorch/vision',
                url=f'https://download.pytorch.org/models/{file}',
                crop_pct=224 / resize,
                interpolation='bilinear',
            )
            specs.append(
                ModelSpec(
                    f'{prefix}shufflenetv2_x{str(factor).replace(".", "_")}',
                    SKShuffleNetV2,
                    dict(**args, unit=unit),
                    ('SKShuffleNetV2', dict(widen_factor=factor, unit=unit)),
                    papers.get((factor, unit)),
                    (torchvisions,) if unit == 'plain' else (),
                )
            )
    return specs


def _cifar_networks() -> list[ModelSpec]:
    # The paper's text known here does not give SKNet-29's kernels: {1x1, 3x3} has 27.9M parameters, {3x3, 5x5} 36.2M,
    # and the paper prints 27.7M.
    shape = dict(layers=(3, 3, 3), cardinality=16, base_width=32, small_stem=True)
    rows = (
        ('resnext29_16x32d', 'plain', {}, PaperFigures(25.2)),
        ('seresnext29_16x32d', 'se', {}, None),
        (
            'sknet29_16x32d',
            'sk',
            dict(sk_kwargs=dict(kernel_sizes=(1, 3), reduction=32)),
            PaperFigures(27.7, errors={'CIFAR-10': 3.47, 'CIFAR-100': 17.33}),
        ),
    )
    return [
        ModelSpec(
            name,
            SKResNet,
            {**shape, 'unit': unit, **args},
            ('SKNet', dict(depth=29) if unit == 'sk' else dict(depth=29, unit=unit)),
            paper,
            input_size=(3, 32, 32),
            num_classes=100,
        )
        for name, unit, args, paper in rows
    ]


MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (*_sknets(), *_skresnexts(), *_skresnets(), *_simclrs(), *_shufflenets(), *_cifar_networks())
}


def find(openmmlab_type: str, **args) -> ModelSpec | None:
    """The row of a backbone by OpenMMLab's names: ``find('SKNet', depth=50)``; None where no row has it."""
    return next((spec for spec in MODELS.values() if spec.openmmlab == (openmmlab_type, args)), None)


def find_simclr(layers: Sequence[int], width_factor: int) -> ModelSpec | None:
    """The row of a SimCLRv2 network by its units per stage; None where no row has it."""
    wanted = dict(layers=tuple(layers), width_factor=width_factor)
    return next((spec for spec in MODELS.values() if spec.network is SKResNetSimCLR and spec.args == wanted), None)


def weight_file(hf_hub_id: str) -> str | None:
    """The file of weights in a Hub repository that some row names; None for ``model.safetensors``."""
    files = {weights.hf_hub_id: weights.file for spec in MODELS.values() for weights in spec.weights}
    return files.get(hf_hub_id)


def with_weights() -> list[str]:
    """The 'name.tag' of every registered model that has published weights."""
    return [f'{spec.name}.{weights.tag}' for spec in MODELS.values() if not spec.in_timm for weights in spec.weights]
