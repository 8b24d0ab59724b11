"""SK units on timm's ResNet: SKNet (Li et al., CVPR 2019, arXiv:1903.06586, Table 1), SK-ResNeXt and SK-ResNet.

The network is ``timm.models.resnet.ResNet``; features, output stride, drop path, checkpointing and the classifier
come from there. This file adds the units, the paper's initialisation and a stem and stages for small images.
"""

import math
from collections.abc import Callable, Sequence
from types import MethodType, ModuleType
from typing import Any

import torch
from timm.layers import DropPath, create_attn
from timm.models import checkpoint_seq
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from .._arguments import (
    MOST_CHANNELS,
    MOST_UNITS,
    UNITS,
    check_choice,
    check_flags,
    check_integer,
    check_integers,
    check_positive,
    check_sk_kwargs,
    is_module_class,
)
from .._timm import feature_take_indices
from ..layers import ConvBNAct, SelectiveKernel, SelectiveKernelAttention
from ..ops import Fusable, norm_act, norm_act_pool, register

__all__ = ['SKBasicBlock', 'SKBottleneck', 'SKResNet']


class _SKUnit(Fusable):
    """What the units share: their arguments, the residual end, and how an engine computes that end.

    A block adds its convolutions in ``_add_convolutions``, and names the SK convolution and the last one.
    """

    methods = ('forward', '_end')
    expansion: int
    sk_name: str
    last_name: str

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        cardinality: int = 1,
        base_width: float = 64,
        reduce_first: int = 1,
        dilation: int = 1,
        first_dilation: int | None = None,
        sk_kwargs: dict[str, Any] | None = None,
        act_layer: type[nn.Module] = nn.ReLU,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        attn_layer: Callable[..., nn.Module] | str | None = None,
        aa_layer: Callable[..., nn.Module] | None = None,
        drop_block: Callable[..., nn.Module] | None = None,
        drop_path: nn.Module | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        layers = dict(act_layer=act_layer, norm_layer=norm_layer, **dd)
        sk = dict(
            stride=stride,
            dilation=first_dilation or dilation,
            aa_layer=aa_layer,
            drop_layer=drop_block,
            **(sk_kwargs or {}),
            **layers,
        )
        self.backend = _unit_backend(sk_kwargs)
        layers['backend'] = self.backend
        self._add_convolutions(inplanes, planes, cardinality, base_width, reduce_first, dilation, sk, layers)
        self.se = create_attn(attn_layer, planes * self.expansion, **dd)
        self.act = act_layer(inplace=True)
        self.downsample = downsample
        self.drop_path = drop_path

    def _add_convolutions(
        self,
        inplanes: int,
        planes: int,
        cardinality: int,
        base_width: float,
        reduce_first: int,
        dilation: int,
        sk: dict[str, Any],
        layers: dict[str, Any],
    ) -> None:
        """Add the convolutions; ``sk`` are arguments of the SK convolution, ``layers`` of the others."""
        raise NotImplementedError

    def _end(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """The residual sum of the last convolution's output and the unit's input, and its ReLU."""
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        return self.act(x)

    def zero_init_last(self) -> None:
        """Zero the last norm's scale, so that the unit starts as its shortcut."""
        norm = getattr(self, self.last_name).bn
        if getattr(norm, 'weight', None) is not None:
            nn.init.zeros_(norm.weight)

    def parts(self, folded: bool) -> tuple | None:
        """The SK convolution and its parts, the last convolution and norm, and the modules of the shortcut."""
        sk, last = getattr(self, self.sk_name), getattr(self, self.last_name)
        of_sk = sk.parts(folded) if type(sk) is SelectiveKernel and sk.backend in ('auto', 'triton') else None
        of_last = last.parts(folded) if type(last) is ConvBNAct else None
        keeps_all = self.drop_path is None or not self.drop_path.training
        plain = self.se is None and type(self.act) is nn.ReLU and keeps_all
        if of_sk is None or of_last is None or of_last[2] or last.backend == 'plain' or not plain:
            return None
        if self.downsample is not None and type(self.downsample) is not nn.Sequential:
            return None
        if self.downsample is None:
            return sk, of_sk, *of_last[:2], None
        layers = list(self.downsample)
        if [type(layer) for layer in layers[-2:]] != [nn.Conv2d, nn.Identity if folded else nn.BatchNorm2d]:
            return None
        *pooling, conv, norm = layers
        if folded and conv.bias is None:
            return None
        return sk, of_sk, *of_last[:2], (pooling, conv, None if folded else norm)


@register
class SKBottleneck(_SKUnit):
    """SK unit: 1x1 -> SK convolution -> 1x1, residual, ReLU after the sum.

    (B, inplanes, H, W) to (B, 4 * planes, H / stride, W / stride). The arguments are those of timm's ``Bottleneck``,
    and ``sk_kwargs`` goes to :class:`SelectiveKernel` (``kernel_sizes``, ``reduction``, ``select``, ...).
    """

    expansion = 4
    sk_name, last_name = 'conv2', 'conv3'

    def _add_convolutions(self, inplanes, planes, cardinality, base_width, reduce_first, dilation, sk, layers) -> None:
        width = _width(planes, base_width, cardinality)
        if width < 1:
            raise ValueError(
                f'base_width={base_width} leaves the unit of {planes} planes no channels: it must be at least '
                f'{64 / planes:g}'
            )
        first_planes = width // reduce_first
        self.conv1 = ConvBNAct(inplanes, first_planes, kernel_size=1, **layers)
        self.conv2 = SelectiveKernel(first_planes, width, **{'groups': cardinality, **sk})
        self.conv3 = ConvBNAct(width, planes * self.expansion, kernel_size=1, apply_act=False, **layers)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.conv1(x)
        x = self.conv2(x)
        x = self.conv3(x)
        return self._end(x, shortcut)

    def parts(self, folded: bool) -> tuple | None:
        first = self.conv1.parts(folded) if type(self.conv1) is ConvBNAct else None
        rest = super().parts(folded)
        if first is None or not first[2] or self.conv1.backend == 'plain' or rest is None:
            return None
        return self.conv1, first, *rest

    def fuse_forward(self, engine: ModuleType, x: Tensor, parts: tuple) -> Tensor:
        conv1, first, sk, of_sk, *end = parts
        y = conv1.fuse_forward(engine, x, first)
        y = sk.fuse_forward(engine, y, of_sk)
        return _fuse_end(engine, y, x, *end)


@register
class SKBasicBlock(_SKUnit):
    """SK convolution -> 3x3, residual, ReLU after the sum: the unit of timm's ``skresnet18`` and ``skresnet34``.

    (B, inplanes, H, W) to (B, planes, H / stride, W / stride). Arguments as in :class:`SKBottleneck`, but that there
    are neither groups nor widths: ``cardinality`` is 1 and ``base_width`` 64.
    """

    expansion = 1
    sk_name, last_name = 'conv1', 'conv2'

    def _add_convolutions(self, inplanes, planes, cardinality, base_width, reduce_first, dilation, sk, layers) -> None:
        first_planes = planes // reduce_first
        self.conv1 = SelectiveKernel(inplanes, first_planes, **{'groups': 1, **sk})
        self.conv2 = ConvBNAct(first_planes, planes * self.expansion, 3, dilation=dilation, apply_act=False, **layers)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.conv1(x)
        x = self.conv2(x)
        return self._end(x, shortcut)

    def fuse_forward(self, engine: ModuleType, x: Tensor, parts: tuple) -> Tensor:
        sk, of_sk, *end = parts
        y = sk.fuse_forward(engine, x, of_sk)
        return _fuse_end(engine, y, x, *end)


register(DropPath)


def _unit_backend(sk_kwargs: dict[str, Any] | None) -> str:
    """The backend of a unit's other convolutions: the SK convolution's, or 'plain' where that is 'recompute'."""
    backend = (sk_kwargs or {}).get('backend', 'auto')
    return 'plain' if backend == 'recompute' else backend


def _fuse_end(
    engine: ModuleType, y: Tensor, x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, shortcut: tuple | None
) -> Tensor:
    """ReLU(norm(conv(y)) + shortcut(x)), with the shortcut's norm, which is its last, in the same passes."""
    if shortcut is None:
        return norm_act(engine, ((y, conv, norm),), shortcut=x)
    pooling, last, last_norm = shortcut
    for layer in pooling:
        x = layer(x)
    return norm_act(engine, ((y, conv, norm), (x, last, last_norm)))


_forward_features = ResNet.forward_features
_BLOCKS = {
    ('bottleneck', 'sk'): SKBottleneck,
    ('bottleneck', 'plain'): Bottleneck,
    ('bottleneck', 'se'): Bottleneck,
    ('basic', 'sk'): SKBasicBlock,
    ('basic', 'plain'): BasicBlock,
    ('basic', 'se'): BasicBlock,
}


@register
class SKResNet(Fusable, ResNet):
    """timm's ResNet built from SK units; SKNet where the defaults stand.

    (B, in_chans, H, W) to (B, num_classes) logits, or features (B, 4 * channels[3], H / 32, W / 32) where
    ``num_classes=0`` and ``global_pool=''``.

    Args:
        layers: units in each of the four stages, or of three.
        block: 'bottleneck' (1x1, SK, 1x1), 'basic' (SK, 3x3), or a block class of one's own.
        unit: 'sk', or what it is compared with: 'plain' (a 3x3 in the SK convolution's place: ResNeXt) or 'se'
            (that and squeeze-and-excitation: SENet), both timm's blocks.
        channels: planes of each stage: a bottleneck's SK convolution has ``planes * base_width / 64 * cardinality``
            channels and its output ``4 * planes``; a basic unit has ``planes`` throughout.
        cardinality: G, groups of every branch.
        base_width: width of one group, in 64ths of the planes.
        sk_kwargs: arguments of every :class:`~sk_plugins.layers.SelectiveKernel`: ``kernel_sizes``, ``branches``,
            ``reduction``, ``min_dim``, ``select``, ``split_input``, ...
        output_stride: 32, 16 or 8; below 32 the last stages dilate instead of striding.
        small_stem: for images of some 32 pixels, one 3x3 convolution of stride 1 and no pooling in place of 7x7 / 2
            and pool / 2 (the stem of CIFAR networks): every stride is a quarter of what it says elsewhere.
        zero_init_last: start every unit as its shortcut.
        **kwargs: further arguments of timm's ``ResNet``: ``num_classes``, ``in_chans``, ``global_pool``,
            ``act_layer``, ``norm_layer``, ``drop_rate``, ``drop_path_rate``, ``block_args``, ...

    Raises:
        ValueError: an argument out of its range; the message names it, its value and what is right. What timm's
            ``ResNet`` says of its own arguments is timm's.
    """

    fuses_on_cpu = True
    methods = ('forward', 'forward_features')

    def __init__(
        self,
        layers: Sequence[int],
        block: str | type[nn.Module] = 'bottleneck',
        unit: str = 'sk',
        channels: Sequence[int] | None = None,
        cardinality: int = 32,
        base_width: float = 4,
        output_stride: int = 32,
        small_stem: bool = False,
        zero_init_last: bool = False,
        sk_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ) -> None:
        num_stages = count_stages(layers)
        channels = (64, 128, 256, 512)[:num_stages] if channels is None else channels
        check_integers(
            'channels', channels, (num_stages,), f'{num_stages} integers of at least 1, one for each stage of {layers=}'
        )
        check_choice('unit', unit, UNITS)
        check_sk_kwargs(sk_kwargs, unit, SelectiveKernel)
        if not isinstance(block, str) and not is_module_class(block):
            raise ValueError(f"block={block!r} must be 'bottleneck', 'basic' or a class of units")
        if isinstance(block, str):
            if (block, unit) not in _BLOCKS:
                raise ValueError(f"block={block!r} is unknown: choose 'bottleneck' or 'basic'")
            if block == 'basic' and (cardinality, base_width) != (1, 64):
                raise ValueError(
                    f"block='basic' has no groups: cardinality={cardinality!r} must be 1 and "
                    f'base_width={base_width!r} must be 64'
                )
            block = _BLOCKS[block, unit]
        check_integer('cardinality', cardinality)
        bottleneck = issubclass(block, (SKBottleneck, Bottleneck))
        check_positive('base_width', base_width)
        check_flags(small_stem=small_stem)
        if bottleneck:
            _check_widths(channels, base_width, cardinality)
        block_args = {**(kwargs.pop('block_args', None) or {})}
        if sk_kwargs:
            block_args['sk_kwargs'] = {**block_args.get('sk_kwargs', {}), **sk_kwargs}
        if unit == 'se':
            block_args.setdefault('attn_layer', 'se')
        super().__init__(
            block,
            layers,
            block_args=block_args,
            channels=channels,
            cardinality=cardinality,
            base_width=base_width,
            output_stride=output_stride,
            zero_init_last=zero_init_last,
            **kwargs,
        )
        if num_stages == 3:
            pool, fc = self.global_pool, self.fc
            del self.global_pool, self.fc
            self.layer4 = nn.Sequential()  # timm's ResNet calls four stages
            self.global_pool, self.fc = pool, fc  # children stand in the order they are called in
        if small_stem:
            stem = self.conv1
            if not isinstance(stem, nn.Conv2d):
                raise ValueError("small_stem=True replaces a single convolution: stem_type must be ''")
            dd = {'device': stem.weight.device, 'dtype': stem.weight.dtype}
            self.conv1 = nn.Conv2d(stem.in_channels, stem.out_channels, 3, padding=1, bias=False, **dd)
            nn.init.kaiming_normal_(self.conv1.weight, mode='fan_out', nonlinearity='relu')
            self.maxpool = nn.Identity()
            for feature in self.feature_info:
                feature['reduction'] = max(feature['reduction'] // 4, 1)

        self.backend = (block_args.get('sk_kwargs') or {}).get('backend', 'auto') if unit == 'sk' else 'plain'

    # An engine may compute the stem. Each unit asks the gate itself.

    def fused_modules(self) -> list[nn.Module]:
        return [self, self.conv1, self.bn1, self.act1, self.maxpool]

    def parts(self, folded: bool) -> tuple[nn.Conv2d, nn.BatchNorm2d | None, nn.MaxPool2d] | None:
        conv, norm, pool = self.conv1, self.bn1, self.maxpool
        kinds = [nn.Conv2d, nn.Identity if folded else nn.BatchNorm2d, nn.ReLU]
        if [type(conv), type(norm), type(self.act1)] != kinds or (folded and conv.bias is None):
            return None
        if type(pool) is not nn.MaxPool2d or self.forward_features != MethodType(_forward_features, self):
            return None
        return conv, None if folded else norm, pool

    def fuse_forward(self, engine: ModuleType, x: Tensor, parts: tuple) -> Tensor:
        x = norm_act_pool(engine, x, *parts)
        stages = [self.layer1, self.layer2, self.layer3, self.layer4]
        if self.grad_checkpointing:
            x = checkpoint_seq(stages, x, flatten=True)
        else:
            for stage in stages:
                x = stage(x)
        return self.forward_head(x)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = False) -> None:
        """He initialisation, and N(0, 0.01) for the attention layers and the classifier, as the authors train."""
        super().init_weights(zero_init_last)
        for module in self.modules():
            if isinstance(module, SelectiveKernelAttention):
                module.init_weights()
        init_classifier(self.fc)

    # timm counts five feature maps, whatever the number of stages.

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, **kwargs
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """As timm's: features at ``indices`` of the stem (0) and the stages (1 and on), each (B, C_i, H_i, W_i)."""
        indices, _ = feature_take_indices(len(self.feature_info), indices)
        return super().forward_intermediates(x, indices, **kwargs)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As timm's: drop what the features at ``indices`` don't need."""
        indices, last = feature_take_indices(len(self.feature_info), indices)
        if last == len(self.feature_info) - 1:
            if prune_head:
                self.reset_classifier(0, '')
            return indices
        return super().prune_intermediate_layers(indices, prune_norm, prune_head)


def init_classifier(fc: nn.Module) -> None:
    """N(0, 0.01), as the authors train; nothing where there is no classifier."""
    if isinstance(fc, nn.Linear):
        nn.init.normal_(fc.weight, std=0.01)
        nn.init.zeros_(fc.bias)


def count_stages(layers: Sequence[int]) -> int:
    """How many stages ``layers`` describes: 3 or 4."""
    what = f'three or four integers of at least 1 and at most {MOST_UNITS}, one for each stage'
    check_integers('layers', layers, (3, 4), what, most=MOST_UNITS)
    return len(layers)


def _width(planes: int, base_width: float, cardinality: int) -> int:
    """Channels of a bottleneck's SK convolution, as timm counts them."""
    return math.floor(planes * (base_width / 64)) * cardinality


def _check_widths(channels: Sequence[int], base_width: float, cardinality: int) -> None:
    if _width(min(channels), base_width, 1) < 1:
        raise ValueError(f'{base_width=} must be a number of at least {64 / min(channels):g}')
    for planes in channels:
        width = _width(planes, base_width, cardinality)
        if width > MOST_CHANNELS:
            raise ValueError(
                f'{cardinality=} and {base_width=} give the unit of {planes} planes {width} channels: at most '
                f'{MOST_CHANNELS}'
            )
