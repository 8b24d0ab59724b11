"""The module that is exported: preprocessing by option, the lean network, logits or feature maps."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _networks import build
from timm.models import is_model, split_model_name_tag
from torch import Tensor, nn

from sk_plugins.lean import simplify

from .dense import Heads, build_dense

__all__ = ['Deployable', 'Features', 'Normalised', 'build_named', 'prepare']


class Normalised(nn.Module):
    """A network behind its preprocessing: (B, H, W, 3) uint8 RGB images of its size to what it returns.

    Args:
        net: takes (B, 3, H, W).
        mean: of a channel, of values from 0 to 1.
        std: likewise.
    """

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.net = net
        std = torch.tensor(std).view(1, -1, 1, 1)
        self.register_buffer('scale', 1 / (255 * std))
        self.register_buffer('shift', -torch.tensor(mean).view(1, -1, 1, 1) / std)

    def forward(self, image: Tensor) -> Tensor:
        # No folding into the first convolution: its padding is zero after the shift.
        image = image.permute(0, 3, 1, 2).contiguous()
        return self.net(image.float() * self.scale + self.shift)


class Features(nn.Module):
    """A network's feature maps, those of timm's ``features_only``."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.net.forward_intermediates(image, intermediates_only=True))


@dataclass
class Deployable:
    """What a target writes.

    Attributes:
        model: to be exported: lean, in evaluation mode.
        reference: the network as it is in eager mode, for the same inputs.
        image: an example of the input; its batch is 2 where the batch is to be dynamic.
        dynamic: of 'batch' and 'size', what stays open.
        outputs: names of the outputs.
        metadata: what goes into the file, or beside it: texts.
        size: height and width of the network's images; the example's may be larger.
        preprocessing: timm's data config.
        uint8: whether the input is (B, H, W, 3) uint8.
    """

    model: nn.Module
    reference: nn.Module
    image: Tensor
    dynamic: frozenset[str]
    outputs: list[str]
    metadata: dict[str, str]
    size: tuple[int, int]
    preprocessing: dict[str, Any] = field(default_factory=dict)
    uint8: bool = False

    def random(self, batch: int, height: int, width: int, seed: int = 0) -> Tensor:
        """Random images."""
        generator = torch.Generator().manual_seed(seed)
        if self.uint8:
            return torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8, generator=generator)
        return torch.randn(batch, self.image.shape[1], height, width, generator=generator)

    def shapes(self) -> list[tuple[int, int, int]]:
        """(batch, height, width) of what ``--check`` runs: two batches and two sizes where they are open."""
        height, width = self.size
        batches = [1, 3] if 'batch' in self.dynamic else [len(self.image)]
        sizes = [(height, width)]
        if 'size' in self.dynamic:
            sizes.append((height + 33, max(width - 31, 32)))
        return [(batch, *size) for batch in batches for size in sizes]


def prepare(
    net: nn.Module,
    preprocessing: dict[str, Any],
    name: str = '',
    size: int | None = None,
    batch: int | None = None,
    dynamic: frozenset[str] = frozenset(),
    preprocess: bool = False,
    features: bool = False,
) -> Deployable:
    """A network in evaluation mode, ready for a target.

    Args:
        net: the network.
        preprocessing: timm's data config.
        name: of the network, for metadata and errors.
        size: side of the image; the data config's where None.
        batch: of the example; 2 where None and the batch is to stay open, else 1.
        dynamic: of 'batch' and 'size', what stays open.
        preprocess: take (B, H, W, 3) uint8 RGB.
        features: give feature maps.

    Raises:
        ValueError: an option that does not fit the network.
    """
    channels, *sides = preprocessing['input_size']
    height, width = (size, size) if size else sides
    if preprocess and channels != 3:
        raise ValueError(f'--preprocess: takes RGB images, and {name} has {channels} input channels')
    if not features and getattr(net, 'num_classes', 1) == 0:
        raise ValueError(f'{name} has no classifier: --features exports the feature maps of the backbone')
    if features and not hasattr(net, 'forward_intermediates'):
        raise ValueError(f'--features: {name} has no forward_intermediates')
    names = ('mean', 'std', 'interpolation', 'crop_pct')
    metadata: dict[str, Any] = {
        'model': name,
        'input_size': (channels, height, width),
        **{key: preprocessing[key] for key in names if key in preprocessing},
        'input': 'uint8 RGB, NHWC' if preprocess else 'float32, normalised, NCHW',
    }
    labels = (getattr(net, 'pretrained_cfg', None) or {}).get('label_names') or preprocessing.get('label_names')
    if labels and not features:
        metadata['labels'] = list(labels)

    whole = isinstance(net, Heads)
    outputs = net.outputs if whole else ['logits']
    lean = simplify(net, features=features or whole)
    if features:
        net, lean = Features(net), Features(lean)
    if preprocess:
        net, lean = (Normalised(n, preprocessing['mean'], preprocessing['std']) for n in (net, lean))
    # A batch of one would be taken for a constant, and so would a last map of 1x1, which strides of 32 leave of 32.
    traced = [max(side, 64) if 'size' in dynamic else side for side in (height, width)]
    number = max(batch or 2, 2) if 'batch' in dynamic else batch or 1
    shape = (number, *traced, 3) if preprocess else (number, channels, *traced)
    image = torch.zeros(shape, dtype=torch.uint8 if preprocess else torch.float32)
    if features:
        with torch.no_grad():
            outputs = [f'feature_{i}' for i in range(len(lean(image[:1])))]
    return Deployable(
        lean.eval(),
        net.eval(),
        image,
        dynamic,
        outputs,
        {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()},
        (height, width),
        {**preprocessing, 'input_size': (channels, height, width)},
        preprocess,
    )


def build_named(
    name: str, checkpoint: str | None, pretrained: bool, features: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """:func:`_networks.build`, which takes the work dir of a finetune run too, and a detector's or segmentor's config.

    Args:
        features: whether the feature maps of a backbone are wanted, which is all that is built then.
    """
    if (Path(name) / 'finetune.json').is_file():
        from _finetune.exporting import refresh

        if checkpoint or pretrained:
            raise ValueError(f'{name}: a run of finetune has its own weights, its best epoch')
        name = f'local-dir:{refresh(Path(name))}'
    dense = None if features or pretrained or is_model(split_model_name_tag(name)[0]) else build_dense(name, checkpoint)
    return build(name, checkpoint, pretrained) if dense is None else dense
