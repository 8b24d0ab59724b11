"""A convolution, its norm and its activation as plain modules, under timm's names."""

from collections.abc import Callable

import torch
from timm.layers import create_aa
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from ..ops import convolve, convolves_at_once, folds, rearrange

__all__ = ['ConvBNAct']


class ConvBNAct(nn.Module):
    """Conv -> BatchNorm -> activation: (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride).

    It holds the parameters of timm's ``ConvNormAct`` under the same names. Unlike there, the activation is
    a module of its own: timm's lives inside a BatchNorm subclass, and every tool that swaps BatchNorms
    (SyncBatchNorm conversion, folding, quantisation) then loses it in silence. In inference on a CPU, eager or
    compiled, a BatchNorm that nobody watches is multiplied into the weight where that takes less time
    (:func:`sk_plugins.ops.folds`), and a ReLU is applied by the convolution itself (:func:`sk_plugins.ops.convolve`);
    in training there some convolutions are computed as something else (:func:`sk_plugins.ops.rearrange`).

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
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
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
        if torch.jit.is_scripting():  # noqa: SIM108 - TorchScript would compile both sides of an expression
            x = self.act(self.drop(self.bn(self.conv(x))))
        else:
            x = self._convolve(x)
        return self.aa(x)

    @torch.jit.unused
    def _convolve(self, x: Tensor) -> Tensor:
        if not self._may_skip_modules(x):
            return self.act(self.drop(self.bn(call(self.conv, x))))
        if _is_bare_relu(self.act) and _is_bare_identity(self.drop):
            return convolve(self.conv, self.bn, x, relu=True)
        return self.act(self.drop(convolve(self.conv, self.bn, x)))

    def _may_skip_modules(self, x: Tensor) -> bool:
        """Whether the convolution and the norm can be computed, and had better be, without calling them."""
        if looks_for_modules(x) or not is_bare(self.conv):
            return False
        if _is_bare_identity(self.bn):
            return convolves_at_once(self.conv, x)
        # A compiler leaves no pass to the norm either, where it makes one of the sum or the activation.
        pays = not torch.compiler.is_compiling() or convolves_at_once(self.conv, x)
        return pays and is_bare_norm(self.bn) and folds(self.conv, self.bn, x)

    @torch.jit.unused
    def adds_at_once(self, x: Tensor, act: nn.Module) -> bool:
        """Whether :meth:`add_relu` may stand for ``act(self(x) + shortcut)``."""
        return (
            _is_bare_relu(act)
            and all(_is_bare_identity(module) for module in (self.drop, self.act, self.aa))
            and not is_watched(self)
            and self._may_skip_modules(x)
        )

    @torch.jit.unused
    def add_relu(self, x: Tensor, shortcut: Tensor, overwrite: bool = False) -> Tensor:
        """ReLU(self(x) + shortcut), in inference, in the shortcut's memory if that may be overwritten."""
        return convolve(self.conv, self.bn, x, relu=True, shortcut=shortcut, overwrite=overwrite)


def call(conv: nn.Module, x: Tensor) -> Tensor:
    """conv(x), rearranged where nobody looks for the convolution itself and that takes less time."""
    if looks_for_modules(x) or not is_bare(conv):
        return conv(x)
    return rearrange(conv, x)


def shorten(downsample: nn.Module, x: Tensor) -> Tensor:
    """downsample(x), where timm's ends in a convolution and a norm: the norm is multiplied in if that is faster."""
    if type(downsample) is not nn.Sequential or len(downsample) < 2 or is_watched(downsample) or looks_for_modules(x):
        return downsample(x)
    *pooling, conv, norm = downsample
    if not (is_bare(conv) and is_bare_norm(norm) and folds(conv, norm, x)):
        return downsample(x)
    for layer in pooling:
        x = layer(x)
    return convolve(conv, norm, x)


def looks_for_modules(x: Tensor) -> bool:
    """Whether a tracer or an exporter is at work, whose graph shall show the modules called."""
    return isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing() or torch.compiler.is_exporting()


def is_bare(conv: nn.Module) -> bool:
    """A convolution that nobody watches, whose weight may be used without calling it."""
    return type(conv) is nn.Conv2d and not is_watched(conv)


def is_bare_norm(norm: nn.Module) -> bool:
    """An affine BatchNorm that nobody watches, whose tensors may be used without calling it."""
    return type(norm) is nn.BatchNorm2d and norm.affine and not is_watched(norm)


def _is_bare_relu(act: nn.Module) -> bool:
    return type(act) is nn.ReLU and not is_watched(act)


def _is_bare_identity(module: nn.Module) -> bool:
    return type(module) is nn.Identity and not is_watched(module)


def is_watched(module: nn.Module) -> bool:
    """Whether somebody's code runs when this module is called: hooks (all modules' too) or another ``forward``."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or global_hooks._global_forward_hooks
        or global_hooks._global_forward_pre_hooks
        or 'forward' in module.__dict__  # not vars(), which torch 2.7 cannot compile
    )
