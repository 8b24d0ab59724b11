"""ShuffleNetV2 (Ma et al., ECCV 2018, arXiv:1807.11164) with plain, SE or SK units (Li et al., CVPR 2019, Table 4).

Parameter names are those of ``torchvision.models.ShuffleNetV2``, so its published weights load. The methods around
the network (features, checkpointing, the classifier) are what timm expects of its models.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import SqueezeExcite, create_classifier, get_act_layer, get_norm_layer
from timm.models import checkpoint_seq
from torch import Tensor, nn

from .._arguments import MOST_UNITS, UNITS, check_choice, check_integer, check_integers, check_sk_kwargs
from .._timm import feature_take_indices
from ..layers import SelectiveKernel, SelectiveKernelAttention

__all__ = ['SKShuffleNetV2', 'ShuffleUnit']

_STAGES = ('stage2', 'stage3', 'stage4')


class ShuffleUnit(nn.Module):
    """ShuffleNetV2's unit: (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride).

    Half of the channels pass through, or in a down-sampling unit a depthwise branch; the others go through 1x1 ->
    depthwise 3x3 -> 1x1; the halves are then interleaved.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, an even number; ``in_channels`` where the unit does not down-sample.
        down: a down-sampling unit, whose two branches both see all channels.
        stride: of a down-sampling unit: 2, or 1 where dilation takes its place.
        dilation: of the depthwise convolutions.
        unit: 'plain'; 'se', squeeze-and-excitation at the branch's end with max(channels / 16, 32) hidden channels;
            or 'sk', in units that don't down-sample a depthwise SK convolution in place of the 3x3 and its norm.
        sk_kwargs: arguments of the SK convolution: ``kernel_sizes``, ``reduction``, ``select``, ...
        act_layer: activation class.
        norm_layer: norm class, called with the number of channels.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        down: bool = False,
        stride: int = 1,
        dilation: int = 1,
        unit: str = 'plain',
        sk_kwargs: dict[str, Any] | None = None,
        act_layer: type[nn.Module] = nn.ReLU,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        half = out_channels // 2

        def pointwise(channels: int) -> list[nn.Module]:
            return [nn.Conv2d(channels, half, 1, bias=False, **dd), norm_layer(half, **dd), act_layer(inplace=True)]

        def depthwise(channels: int) -> list[nn.Module]:
            kwargs = dict(stride=stride, padding=dilation, dilation=dilation, groups=channels, bias=False)
            return [nn.Conv2d(channels, channels, 3, **kwargs, **dd), norm_layer(channels, **dd)]

        middle = depthwise(half)
        if unit == 'sk' and not down:
            layers = dict(act_layer=act_layer, norm_layer=norm_layer, **dd)
            sk = SelectiveKernel(half, dilation=dilation, **{'groups': half, **(sk_kwargs or {})}, **layers)
            middle = [sk, nn.Identity()]  # the SK convolution has its norms; what follows keeps torchvision's names
        self.down = down
        self.branch1 = nn.Sequential(*depthwise(in_channels), *pointwise(in_channels)) if down else nn.Sequential()
        self.branch2 = nn.Sequential(*pointwise(in_channels if down else half), *middle, *pointwise(half))
        if unit == 'se':
            self.branch2.append(SqueezeExcite(half, rd_channels=max(half // 16, 32), act_layer=act_layer, **dd))

    def forward(self, x: Tensor) -> Tensor:
        if self.down:
            x1, x2 = self.branch1(x), self.branch2(x)
        else:
            x1, x2 = x.chunk(2, dim=1)
            x2 = self.branch2(x2)
        return _interleave(x1, x2)


@torch.fx.wrap  # a symbolic tracer knows no strides
def _interleave(x1: Tensor, x2: Tensor) -> Tensor:
    """Channels of two maps in turn, (B, C, H, W) each to (B, 2 * C, H, W), in the second's memory format.

    ``torch.channel_shuffle`` is unknown to some exporters, and takes a second copy, slow in channels_last.
    """
    if x2.stride(1) == 1:
        x1, x2 = x1.permute(0, 2, 3, 1), x2.permute(0, 2, 3, 1)
        return torch.stack((x1, x2), dim=4).flatten(3).permute(0, 3, 1, 2)
    return torch.stack((x1, x2), dim=2).flatten(1, 2)


class SKShuffleNetV2(nn.Module):
    """ShuffleNetV2: (B, in_chans, H, W) to (B, num_classes) logits.

    Its features are (B, head_channels, H / 32, W / 32); the intermediate ones have strides 2, 4, 8, 16 and 32.

    Args:
        channels: output channels of the three stages, even numbers.
        layers: units in each of the three stages, the first of which down-samples.
        stem_channels: channels of the first convolution.
        head_channels: channels of the last 1x1 convolution.
        unit: 'plain', 'se' or 'sk'; see :class:`ShuffleUnit`.
        sk_kwargs: arguments of every SK convolution: ``kernel_sizes``, ``reduction``, ``select``, ...
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the input.
        output_stride: 32, 16 or 8; below 32 the last stages dilate instead of striding.
        global_pool: timm's: 'avg', 'max', 'avgmax', 'catavgmax' or '' (none).
        drop_rate: dropout before the classifier.
        act_layer: activation class, or timm's name of one.
        norm_layer: norm class, or timm's name of one.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: an argument out of its range; the message names it, its value and what is right. timm and torch say
            what is wrong with layers, pooling and the classifier.
    """

    def __init__(
        self,
        channels: Sequence[int] = (116, 232, 464),
        layers: Sequence[int] = (4, 8, 4),
        stem_channels: int = 24,
        head_channels: int = 1024,
        unit: str = 'sk',
        sk_kwargs: dict[str, Any] | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        output_stride: int = 32,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        act_layer: str | type[nn.Module] = nn.ReLU,
        norm_layer: str | Callable[..., nn.Module] = nn.BatchNorm2d,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_integers('channels', channels, (3,), 'three even integers, one for each stage', step=2)
        what = f'three integers of at least 1 and at most {MOST_UNITS}, one for each stage'
        check_integers('layers', layers, (3,), what, most=MOST_UNITS)
        for name, value in (('stem_channels', stem_channels), ('head_channels', head_channels)):
            check_integer(name, value)
        check_choice('unit', unit, UNITS)
        check_sk_kwargs(sk_kwargs, unit, SelectiveKernel)
        if type(output_stride) is not int or output_stride not in (8, 16, 32):
            raise ValueError(f'output_stride={output_stride!r} must be 8, 16 or 32')
        dd = {'device': device, 'dtype': dtype}
        act_layer, norm_layer = get_act_layer(act_layer), get_norm_layer(norm_layer)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        def conv_norm_act(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> nn.Sequential:
            conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False, **dd)
            return nn.Sequential(conv, norm_layer(out_channels, **dd), act_layer(inplace=True))

        self.conv1 = conv_norm_act(in_chans, stem_channels, kernel_size=3, stride=2)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.feature_info = [
            dict(num_chs=stem_channels, reduction=2, module='conv1'),
            dict(num_chs=stem_channels, reduction=4, module='maxpool'),
        ]
        width, net_stride, dilation = stem_channels, 4, 1
        unit_args = dict(unit=unit, sk_kwargs=sk_kwargs, act_layer=act_layer, norm_layer=norm_layer, **dd)
        for name, out_channels, depth in zip(_STAGES, channels, layers):
            stride, first_dilation = 2, dilation
            if net_stride >= output_stride:
                stride, dilation = 1, dilation * 2
            net_stride *= stride
            units = [ShuffleUnit(width, out_channels, True, stride, first_dilation, **unit_args)]
            for _ in range(depth - 1):
                units.append(ShuffleUnit(out_channels, out_channels, dilation=dilation, **unit_args))
            self.add_module(name, nn.Sequential(*units))
            self.feature_info.append(dict(num_chs=out_channels, reduction=net_stride, module=name))
            width = out_channels
        self.conv5 = conv_norm_act(width, head_channels, kernel_size=1, stride=1)
        self.num_features = head_channels
        self.global_pool, self.fc = create_classifier(head_channels, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = head_channels * self.global_pool.feat_mult()
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """He initialisation, and N(0, 0.01) for the attention layers and the classifier, as the authors train."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # torch's fan_out leaves the groups out of account, which for depthwise layers are all of it.
                fan_out = module.weight[:, 0].numel() // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        for module in self.modules():
            if isinstance(module, SelectiveKernelAttention):
                module.init_weights()
        if isinstance(self.fc, nn.Linear):
            nn.init.normal_(self.fc.weight, std=0.01)
            nn.init.zeros_(self.fc.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups, for layer-wise learning rates."""
        blocks = r'^stage(\d+)' if coarse else r'^stage(\d+)\.(\d+)'
        return dict(stem=r'^conv1', blocks=[(blocks, None), (r'^conv5', (99999,))])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every unit's activations in the backward pass: memory for time."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        """The classifier, or its name."""
        return 'fc' if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier of ``num_classes`` (0 for none), and another pooling where ``global_pool`` is given."""
        reference = self.conv5[0].weight if len(self.conv5) else next(self.parameters())
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=pool_type, device=reference.device, dtype=reference.dtype
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features on the way, each (B, C_i, H / s_i, W / s_i) with s = 2, 4, 8, 16, 32 where nothing dilates.

        Args:
            x: (B, in_chans, H, W).
            indices: the last so many where an int, all where None, else those named, 0 to 4.
            norm: without effect, all features are normed.
            stop_early: leave out what follows the last of them.
            output_fmt: 'NCHW'.
            intermediates_only: return the list alone.

        Returns:
            What ``forward_features`` returns, and the list; or the list alone.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt={output_fmt!r} must be 'NCHW'")
        take, last = feature_take_indices(len(self.feature_info), indices)
        intermediates = []
        names = [feature['module'] for feature in self.feature_info]
        for i, name in enumerate(names[: last + 1] if stop_early else names):
            stage = getattr(self, name)
            if self.grad_checkpointing and not torch.jit.is_scripting() and name in _STAGES:
                x = checkpoint_seq(stage, x)
            else:
                x = stage(x)
            if i in take:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        return self.conv5(x), intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the features at ``indices`` don't need, the last 1x1 convolution included; return them."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        for feature in self.feature_info[last + 1 :]:
            setattr(self, feature['module'], nn.Sequential())
        if prune_head or last < len(self.feature_info) - 1:
            self.conv5 = nn.Sequential()
            self.num_features = self.feature_info[last]['num_chs']
            self.reset_classifier(0, '')
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) to (B, head_channels, H / 32, W / 32)."""
        x = self.conv1(x)
        x = self.maxpool(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq([self.stage2, self.stage3, self.stage4], x, flatten=True)
        else:
            x = self.stage2(x)
            x = self.stage3(x)
            x = self.stage4(x)
        return self.conv5(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits; to what the classifier takes where ``pre_logits``."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
