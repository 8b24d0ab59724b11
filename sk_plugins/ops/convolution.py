"""Convolutions of inference on a CPU: the norm multiplied into the weight, sum and ReLU while a result is at hand.

A convolution, a norm, a sum with the shortcut and a ReLU are four passes over the map. oneDNN, by which torch convolves
on CPUs, applies the last two to its results before it writes them; torch has this as the operators that its compiler
puts in the place of frozen convolutions, and here they are called.
"""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__ = ['convolve', 'convolves_at_once', 'folds']


def folds(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> bool:
    """Whether a BatchNorm is better multiplied into its convolution's weight than into its output.

    So it is in inference on a CPU, where a pass over the map takes longer than one over the weight.
    """
    return (
        not torch.is_grad_enabled()
        and x.device.type == 'cpu'
        and not norm.training
        and norm.running_mean is not None
        and 2 * conv.weight.numel() <= x[:, :1].numel() * conv.out_channels // (conv.stride[0] * conv.stride[1])
    )


def convolves_at_once(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether oneDNN can take the sum and the ReLU after a convolution, and nobody is at work who counts on torch's."""
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and x.device.type == 'cpu'
        and x.dtype == conv.weight.dtype == torch.float32
        and x.numel() > 0
        and conv.padding_mode == 'zeros'
        and not isinstance(conv.padding, str)
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled('cpu')
        and type(x) is Tensor
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0  # FLOP counters, fake tensors
    )


def convolve(conv: nn.Conv2d, norm: nn.Module, x: Tensor, relu: bool = False, shortcut: Tensor | None = None) -> Tensor:
    """norm(conv(x)) by the norm's running statistics, + shortcut, ReLU of it: without passes for them where possible.

    Args:
        conv: of zero padding, as :func:`folds` or :func:`convolves_at_once` allow.
        norm: a BatchNorm with running statistics, or ``nn.Identity``.
        x: (B, C, H, W).
        relu: whether a ReLU is the last.
        shortcut: of the result's shape.
    """
    weight, bias = conv.weight, conv.bias
    if type(norm) is not nn.Identity:
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        mean = norm.running_mean if bias is None else norm.running_mean - bias
        weight, bias = weight * scale[:, None, None, None], norm.bias - mean * scale
    if (relu or shortcut is not None) and convolves_at_once(conv, x):
        shape = (conv.padding, conv.stride, conv.dilation, conv.groups)
        if shortcut is None:
            return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *shape, 'relu', [], '')
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, shortcut, weight, bias, *shape, 'add', 1.0, 'relu' if relu else None, [], ''
        )
    y = conv._conv_forward(x, weight, bias)
    if shortcut is not None:
        y += shortcut
    return torch.relu_(y) if relu else y
