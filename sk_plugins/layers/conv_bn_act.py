"""A convolution, its norm and its activation as plain modules, under timm's names."""

from collections.abc import Callable
from types import ModuleType

from timm.layers import create_aa
from torch import Tensor, nn

from .._arguments import check_choice
from ..ops import BACKENDS, Fusable, has_parts, norm_act, register

__all__ = ['ConvBNAct']


@register
class ConvBNAct(Fusable):
    """Conv -> BatchNorm -> activation: (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride).

    It holds the parameters of timm's ``ConvNormAct`` under the same names. Unlike there, the activation is
    a module of its own: timm's lives inside a BatchNorm subclass, and every tool that swaps BatchNorms
    (SyncBatchNorm conversion, folding, quantisation) then loses it in silence.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: odd side of the kernel; the padding keeps the size.
        stride: of the convolution, or of ``aa_layer`` where there is one.
        dilation: of the convolution.
        groups: of the convolution.
        bias: of the convolution.
        apply_norm: whether a norm follows the convolution.
        apply_act: whether an activation follows.
        act_layer: activation class.
        norm_layer: norm class, called with the number of channels.
        aa_layer: anti-aliasing layer that strides in the convolution's place.
        drop_layer: DropBlock factory, applied between norm and activation.
        backend: 'plain' for module after module; 'auto' for an engine of :mod:`sk_plugins.ops` where one may.
        device: of the parameters.
        dtype: of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        apply_norm: bool = True,
        apply_act: bool = True,
        act_layer: type[nn.Module] = nn.ReLU,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        aa_layer: Callable[..., nn.Module] | None = None,
        drop_layer: Callable[..., nn.Module] | None = None,
        backend: str = 'auto',
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_choice('backend', backend, BACKENDS)
        self.backend = backend
        dd = {'device': device, 'dtype': dtype}
        use_aa = aa_layer is not None and stride > 1
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=1 if use_aa else stride,
            padding=dilation * (kernel_size - 1) // 2,
            dilation=dilation,
            groups=groups,
            bias=bias,
            **dd,
        )
        self.bn = norm_layer(out_channels, **dd) if apply_norm else nn.Identity()
        self.drop = nn.Identity() if drop_layer is None else drop_layer()
        self.act = act_layer(inplace=True) if apply_act else nn.Identity()
        self.aa = create_aa(aa_layer, out_channels, stride=stride, enable=use_aa, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.bn(x)
        x = self.drop(x)
        x = self.act(x)
        return self.aa(x)

    def parts(self, folded: bool) -> tuple[nn.Conv2d, nn.BatchNorm2d | None, bool] | None:
        norm = nn.Identity if folded else nn.BatchNorm2d
        kinds = dict(drop=nn.Identity, act=(nn.ReLU, nn.Identity), aa=nn.Identity)
        if not has_parts(self, conv=nn.Conv2d, bn=norm, **kinds) or (folded and self.conv.bias is None):
            return None
        return self.conv, None if folded else self.bn, type(self.act) is nn.ReLU

    def fuse_forward(
        self, engine: ModuleType, x: Tensor, parts: tuple[nn.Conv2d, nn.BatchNorm2d | None, bool]
    ) -> Tensor:
        conv, norm, relu = parts
        return norm_act(engine, ((x, conv, norm),), relu)
