"""SimCLRv2's ResNets with selective kernels (Chen et al., NeurIPS 2020, arXiv:2006.10029).

The network is that of https://github.com/google-research/simclr (``resnet.py`` with ``sk_ratio=0.0625``, Apache-2.0):
ResNet-D's stem and shortcuts, SK convolutions of two dense 3x3 branches, and TensorFlow's pooling.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._arguments import check_integer, check_positive, is_integer
from ..ops import register
from .resnet import SKResNet, count_stages

__all__ = ['PaddedAvgPool2d', 'SKResNetSimCLR', 'SameMaxPool2d', 'preprocess']

_POOLING = dict(avg_down=True, small_stem=False, aa_layer=None, replace_stem_pool=False)
PROJECTION_LAYERS = 2  # those of the contrastive head that end in a ReLU


class SameMaxPool2d(nn.Module):
    """3x3 / 2 max pooling with TensorFlow's padding 'SAME': (B, C, H, W) to (B, C, ceil(H / 2), ceil(W / 2)).

    An even side is padded by 1 at its end alone, an odd one by 1 at both: ``tf.layers.max_pooling2d(x, 3, 2, 'SAME')``
    of ``resnet_v1_generator``. torch's ``padding=1`` pads even sides at both ends too, and so shifts every window.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (x.shape[-1] % 2, 1, x.shape[-2] % 2, 1), value=float('-inf'))
        return F.max_pool2d(x, 3, 2)


@register
class PaddedAvgPool2d(nn.Module):
    """2x2 average pooling of maps padded by 1 at the bottom and the right, of ``bottleneck_block``'s shortcuts.

    (B, C, H, W) to (B, C, ceil(H / stride), ceil(W / stride)).

    Args:
        stride: of the pooling.
        mode: 'constant' pads with zeros, which count: ``fixed_padding`` and ``average_pooling2d(x, 2, 2, 'VALID')``.
            'replicate' repeats the edge, so that the mean is over what is there alone:
            ``average_pooling2d(x, 2, 1, 'SAME')``.
    """

    def __init__(self, stride: int, mode: str = 'constant') -> None:
        super().__init__()
        self.stride = stride
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 0, 1), mode=self.mode)
        return F.avg_pool2d(x, 2, self.stride)

    def extra_repr(self) -> str:
        return f'stride={self.stride}, mode={self.mode!r}'


class SKResNetSimCLR(SKResNet):
    """SimCLRv2's ResNet with selective kernels: (B, in_chans, H, W) in [0, 1] to (B, num_classes) logits.

    With w the width factor:

    ======== =====================================================================================
    stem     3x3 / 2 to 32 w, 3x3 to 32 w, 3x3 to 64 w, each with BN and ReLU; :class:`SameMaxPool2d`
    stage i  units of f = 64 w, 128 w, 256 w, 512 w; stride 1, 2, 2, 2 in the first
    unit     1x1 to f; SK of two dense 3x3, d = max(f / 16, 32); 1x1 to 4 f; the sum; ReLU
    shortcut of a stage's first unit: :class:`PaddedAvgPool2d`, 1x1 to 4 f, BN; stage 1 pools too, with stride 1
    head     mean over the map, ``projection`` layers, linear
    ======== =====================================================================================

    Args:
        layers: units in each of the four stages: (3, 4, 6, 3), (3, 4, 23, 3) or (3, 8, 36, 3).
        width_factor: w; 1, 2 or 3.
        projection: how many layers of the contrastive head (linear, BN, ReLU) stand before the classifier: 0, or for
            fine-tuning as the paper has it 1; 2 at most. ``ft_proj_selector`` in Google's code.
        channels: f of each stage, where they are others.
        sk_kwargs: as in :class:`SKResNet`.
        zero_init_last: start every unit as its shortcut.
        **kwargs: further arguments of :class:`SKResNet` and timm's ``ResNet``, but for those that would replace the
            pooling: ``avg_down``, ``small_stem``, ``aa_layer`` and ``replace_stem_pool``.

    Raises:
        ValueError: an argument out of its range; the message names it, its value and what is right.
    """

    def __init__(
        self,
        layers: Sequence[int],
        width_factor: int = 1,
        projection: int = 0,
        channels: Sequence[int] | None = None,
        sk_kwargs: dict[str, Any] | None = None,
        zero_init_last: bool = True,
        **kwargs,
    ) -> None:
        check_integer('width_factor', width_factor)
        if not is_integer(projection, 0, PROJECTION_LAYERS):
            raise ValueError(f'projection={projection!r} must be an integer from 0 to {PROJECTION_LAYERS}')
        for name, own in _POOLING.items():
            if kwargs.get(name, own) != own:
                raise ValueError(
                    f"{name}={kwargs[name]!r} must be {own}: the stem and the shortcuts pool as SimCLRv2's"
                )
        if kwargs.get('unit', 'sk') == 'sk':
            sk_kwargs = {'kernel_sizes': (3, 3), **(sk_kwargs or {})}
        if channels is None:
            channels = [planes * width_factor for planes in (64, 128, 256, 512)][: count_stages(layers)]
        shape = dict(cardinality=1, base_width=64, stem_type='deep', stem_width=32 * width_factor, avg_down=True)
        super().__init__(
            layers,
            channels=channels,
            sk_kwargs=sk_kwargs,
            zero_init_last=zero_init_last,
            **{**shape, **kwargs},
        )
        self.maxpool = SameMaxPool2d()
        reductions = [info['reduction'] for info in self.feature_info]
        for i, stage in enumerate((self.layer1, self.layer2, self.layer3, self.layer4)):
            shortcut = stage[0].downsample if len(stage) else None
            if shortcut is not None:  # stage 1's pools too
                pool = PaddedAvgPool2d(reductions[i + 1] // reductions[i]) if i else PaddedAvgPool2d(1, 'replicate')
                shortcut[0] = pool
        self.projection_layers = projection
        self.projection = None
        if projection:
            dd = {'device': self.bn1.weight.device, 'dtype': self.bn1.weight.dtype}
            fc = self.fc
            del self.fc
            self.projection = nn.Sequential(*_projection(projection, self.head_hidden_size, dd))
            self.fc = fc  # children stand in the order they are called in

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """As timm's: (B, 2048 w, H', W') to (B, num_classes), or what the classifier sees; maps where nothing pools."""
        x = self.global_pool(x)
        if self.projection is not None and x.ndim == 2:
            x = self.projection(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)


def _projection(layers: int, width: int, dd: dict[str, Any]) -> list[nn.Module]:
    """So many layers of the contrastive head."""
    modules: list[nn.Module] = []
    for _ in range(layers):
        linear = nn.Linear(width, width, bias=False, **dd)
        nn.init.normal_(linear.weight, std=0.01)
        modules += [linear, nn.BatchNorm1d(width, **dd), nn.ReLU(inplace=True)]
    return modules


def preprocess(image: Tensor, size: int = 224, crop: float = 0.875) -> Tensor:
    """Google's evaluation crop of an image, as ``preprocess_for_eval`` of their ``data_util.py``.

    The central square of ``crop`` times the short side, by TensorFlow 1's ``resize_bicubic`` to ``size``, clipped to
    [0, 1]. Bicubic resizing of others (PIL's, torch's) places the pixels half a pixel further, and PIL's smooths.

    Args:
        image: (C, H, W), bytes or in [0, 1].
        size: of the result.
        crop: share of the short side that is kept, at most 1.

    Returns:
        (C, size, size), in float32 or the image's floating dtype, on its device.

    Raises:
        ValueError: an argument out of its range, or an image of another shape, without pixels in the crop, or with
            floats above 1.
    """
    check_integer('size', size)
    check_positive('crop', crop)
    if crop > 1:
        raise ValueError(f'crop={crop!r} must be at most 1')
    if image.ndim < 3:
        raise ValueError(f'image of shape {tuple(image.shape)} must be (C, H, W)')
    if not image.is_floating_point():
        image = image.float() / 255
    height, width = image.shape[-2:]
    side = round(crop * min(height, width))
    if side < 1:
        raise ValueError(f'{crop=} leaves no pixel of an image of {height}x{width}')
    if not image.is_meta and (largest := image.max()) > 1 + 1e-3:
        raise ValueError(f'image has values up to {largest:g}: floats must be in [0, 1], and bytes an integer dtype')
    top, left = (height - side + 1) // 2, (width - side + 1) // 2
    image = image[..., top : top + side, left : left + side]
    weights = _bicubic(side, size).to(image.device, image.dtype)
    return (weights @ image @ weights.T).clip(0, 1)


def _bicubic(before: int, after: int) -> Tensor:
    """TensorFlow 1's bicubic resizing of a line as a matrix, (after, before): A = -0.75, offsets in 1024ths."""
    cpu = torch.device('cpu')  # whatever the default is
    at = torch.arange(after, dtype=torch.float32, device=cpu) * (before / after)
    first = at.floor()
    x = ((at - first) * 1024).round()[:, None] / 1024 - torch.arange(
        -1.0, 3.0, dtype=torch.float32, device=cpu
    )  # to the four pixels around
    x, a = x.abs(), -0.75
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    taps = torch.where(x <= 1, near, far)
    pixels = (first.long()[:, None] + torch.arange(-1, 3, device=cpu)).clip(0, before - 1)
    return torch.zeros(after, before, dtype=torch.float32, device=cpu).scatter_add_(1, pixels, taps)
