"""Convolutions on a CPU, by the way that takes the least time there.

In inference: a convolution, a norm, a sum with the shortcut and a ReLU are four passes over the map. The norm can be
multiplied into the weight, and oneDNN, by which torch convolves on CPUs, applies sum and ReLU to its results before it
writes them; torch has this as the operators that its compiler puts in the place of frozen convolutions, and here they
are called, in eager mode and in the graphs that a compiler is given.

In training: oneDNN reorders the weight of every convolution three times a step, and has no kernel of its own for the
gradients of one that strides and dilates; :func:`rearrange` gives it less of either to do.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__ = ['as_matrix', 'convolve', 'convolve_add_relu_', 'convolves_at_once', 'folds', 'rearrange']

# In elements. Below the first nothing is rearranged: there is little to gain, and small networks' runs of before are
# repeated to the last digit. From the second on, the order of a weight takes longer to change than a convolution gains.
_LEAST_WEIGHT = 2**13
_LARGE_WEIGHT = 2**17


def folds(conv: nn.Conv2d, norm: nn.BatchNorm2d, x: Tensor) -> bool:
    """Whether a BatchNorm is better multiplied into its convolution's weight than into its output.

    So it is in inference on a CPU, where a pass over the map takes longer than one over the weight.
    """
    if torch.is_grad_enabled() or x.device.type != 'cpu' or norm.training or norm.running_mean is None:
        return False
    if not conv.weight.dtype == norm.weight.dtype == norm.running_var.dtype:
        return False  # a norm of float32 after convolutions of low precision
    if torch.compiler.is_compiling():
        # To ask for a map's size would make a graph of its own for every range of batches and images.
        return conv.weight.numel() < _LARGE_WEIGHT
    return 2 * conv.weight.numel() <= x[:, :1].numel() * conv.out_channels // (conv.stride[0] * conv.stride[1])


def convolves_at_once(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether oneDNN can take the sum and the ReLU after a convolution, and nobody is at work who counts on torch's."""
    return not torch.is_grad_enabled() and x.dtype == torch.float32 and _is_plain(conv, x)


def _is_plain(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether a convolution is one of ordinary tensors on a CPU, which nobody but autograd or a compiler looks at."""
    return (
        x.device.type == 'cpu'
        and x.dtype == conv.weight.dtype
        and conv.padding_mode == 'zeros'
        and not isinstance(conv.padding, str)
        and not torch.is_autocast_enabled('cpu')
        and type(x) is Tensor
        and type(conv.weight) in (Tensor, nn.Parameter)
        and forward_ad._current_level < 0
        and _onednn_serves()
        and (_is_channels_last(x) if torch.compiler.is_compiling() else _is_real(x))
    )


@torch.compiler.assume_constant_result
def _onednn_serves() -> bool:
    """Whether torch has and uses oneDNN, for ordinary tensors: a compiler asks once, when it makes a graph."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not torch._C._are_functorch_transforms_active()
    )


def _is_channels_last(x: Tensor) -> bool:
    """Whether a map is laid out as oneDNN's results are; a graph of other maps would reorder them to and fro."""
    # A single channel is in every format, and oneDNN takes it for a contiguous one.
    return x.ndim == 4 and x.shape[1] > 1 and x.is_contiguous(memory_format=torch.channels_last)


def _is_real(x: Tensor) -> bool:
    """Whether there are numbers in a map to compute with, and no dispatch mode (FLOP counter, fake tensors) on top."""
    return x.numel() > 0 and torch._C._len_torch_dispatch_stack() == 0


def rearrange(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(x): as the matrix product that it is, or on the pixels that it meets, where that takes less time on a CPU.

    - A 1x1 convolution of a channels-last map is a product of two matrices. Its weight is used as it lies, which tells
      where the weight is large, and in training, where its gradient need not be reordered either.
    - Where stride and dilation have a common factor g (the first unit of a stage, kernel 5 as a dilated 3x3), only
      every g-th pixel is met: the same convolution, of stride and dilation smaller by g, of a g-th of rows and columns.

    Args:
        conv: a convolution that nobody watches, whose weight may be used without calling it.
        x: (B, C, H, W).
    """
    training = torch.is_grad_enabled()
    # A compiler has a backward pass in hand itself.
    plain = _is_plain(conv, x) and not (training and torch.compiler.is_compiling())
    full = x.dtype in (torch.float32, torch.float64)
    if not (plain and full and x.ndim == 4 and conv.weight.numel() >= _LEAST_WEIGHT):
        return conv(x)
    if _is_product(conv, x) and (training or conv.weight.numel() >= _LARGE_WEIGHT):
        return _product(x, conv.weight, conv.bias)
    step = math.gcd(*conv.stride, *conv.dilation)
    if training and step > 1 and all(padding % step == 0 for padding in conv.padding):
        stride, padding, dilation = ([n // step for n in sizes] for sizes in (conv.stride, conv.padding, conv.dilation))
        return F.conv2d(_Subsample.apply(x, step), conv.weight, conv.bias, stride, padding, dilation, conv.groups)
    return conv(x)


def _is_product(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether a convolution is a product of matrices as they lie in memory."""
    return (
        _is_channels_last(x)
        and x.shape[1] == conv.in_channels
        and conv.kernel_size == (1, 1)
        and conv.stride == (1, 1)
        and conv.padding == (0, 0)
        and conv.groups == 1
    )


def _outweighs(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether a convolution's weight is larger than its maps, input and output together."""
    if torch.compiler.is_compiling():  # as in folds
        return conv.weight.numel() >= _LARGE_WEIGHT
    return conv.weight.numel() > x.numel() // x.shape[1] * (conv.in_channels + conv.out_channels)


def _has_small_groups(conv: nn.Conv2d) -> bool:
    """Whether oneDNN computes so few channels at a time that a ReLU of its own takes longer than a pass of torch's."""
    return 1 < conv.out_channels // conv.groups <= 4


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = F.linear(x.permute(0, 2, 3, 1), as_matrix(weight), bias).permute(0, 3, 1, 2)
    # What torch takes for a view made without autograd may not be changed in place with it.
    return y if torch.is_grad_enabled() or torch.compiler.is_compiling() else y.data


def _add_product_(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """y += conv(x) and its ReLU, for a convolution that is a product, of a channels-last y."""
    rows = y.permute(0, 2, 3, 1).view(-1, y.shape[1])  # not flatten, which may copy
    rows.addmm_(x.permute(0, 2, 3, 1).flatten(0, 2), as_matrix(weight).t())
    if bias is not None:
        rows += bias
    if relu:
        rows.relu_()
    return y


def as_matrix(weight: Tensor) -> Tensor:
    """The weight of a 1x1 convolution, (out, in, 1, 1), as (out, in): its gradient gets the weight's own strides."""
    channels_last = weight.stride(3) == weight.shape[1]
    return weight.permute(0, 2, 3, 1).flatten(1) if channels_last else weight.flatten(1)


class _Subsample(torch.autograd.Function):
    """Every ``step``-th row and column, (B, C, H, W) to (B, C, ceil(H / step), ceil(W / step)), in x's memory format.

    As slicing, whose own gradient forgets the memory format.
    """

    @staticmethod
    def forward(ctx, x, step):
        ctx.channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        ctx.shape, ctx.step = x.shape, step
        memory_format = torch.channels_last if ctx.channels_last else torch.contiguous_format
        # Not contiguous(), which leaves a single pixel the strides of a slice, of which slow_conv2d makes an error.
        return x[:, :, ::step, ::step].clone(memory_format=memory_format)

    @staticmethod
    def backward(ctx, grad):
        batch, channels, height, width = ctx.shape
        if ctx.channels_last:
            grad_x = grad.new_zeros(batch, height, width, channels).permute(0, 3, 1, 2)
        else:
            grad_x = grad.new_zeros(ctx.shape)
        grad_x[:, :, :: ctx.step, :: ctx.step] = grad
        return grad_x, None


def convolve(
    conv: nn.Conv2d,
    norm: nn.Module,
    x: Tensor,
    relu: bool = False,
    shortcut: Tensor | None = None,
    overwrite: bool = False,
) -> Tensor:
    """norm(conv(x)) by the norm's running statistics, + shortcut, ReLU of it: without passes for them where possible.

    Args:
        conv: of zero padding, as :func:`folds` or :func:`convolves_at_once` allow.
        norm: a BatchNorm with running statistics, or ``nn.Identity``.
        x: (B, C, H, W).
        relu: whether a ReLU is the last.
        shortcut: of the convolution's shape, or one that broadcasts to it.
        overwrite: whether the result may take the shortcut's memory, which is faster than new memory is to get.
    """
    weight, bias = conv.weight, conv.bias
    if type(norm) is not nn.Identity:
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        mean = norm.running_mean if bias is None else norm.running_mean - bias
        weight, bias = weight * scale[:, None, None, None], norm.bias - mean * scale
    ends_at_once = relu if shortcut is None else _is_of_its_shape(shortcut, conv, x)
    if ends_at_once and convolves_at_once(conv, x):
        if _is_product(conv, x) and _outweighs(conv, x):
            if overwrite and _is_channels_last(shortcut):
                return _add_product_(shortcut, x, weight, bias, relu)
            y = _product(x, weight, bias)
        elif shortcut is None and _has_small_groups(conv):
            y = conv._conv_forward(x, weight, bias)
        else:
            return _convolve_at_once(conv, weight, bias, x, relu, shortcut, overwrite)
    else:
        y = conv._conv_forward(x, weight, bias)
    if shortcut is not None:
        y += shortcut
    return torch.relu_(y) if relu else y


def _is_of_its_shape(shortcut: Tensor, conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether a shortcut is of the convolution's shape and type: oneDNN does not look."""
    if shortcut.dtype != x.dtype or shortcut.ndim != 4 or x.ndim != 4:
        return False
    geometry = zip(x.shape[2:], conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    size = [(n + 2 * pad - dilation * (k - 1) - 1) // stride + 1 for n, k, stride, pad, dilation in geometry]
    return tuple(shortcut.shape) == (x.shape[0], conv.out_channels, *size)


def _convolve_at_once(
    conv: nn.Conv2d,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    relu: bool,
    shortcut: Tensor | None,
    overwrite: bool,
) -> Tensor:
    operators = torch.ops.mkldnn
    shape = (conv.padding, conv.stride, conv.dilation, conv.groups)
    if shortcut is None:
        return operators._convolution_pointwise(x, weight, bias, *shape, 'relu', [], '')
    if torch.compiler.is_compiling():
        # The compiler leaves the copy out where nobody else needs the shortcut.
        y = shortcut.clone(memory_format=torch.channels_last)
        convolve_add_relu_(y, x, weight, bias, *shape, relu)
        return y
    ending = ('add', 1.0, 'relu' if relu else None, [], '')
    if overwrite and _is_channels_last(x) and _is_channels_last(shortcut):
        return operators._convolution_pointwise_.binary(shortcut, x, weight, bias, *shape, *ending)
    return operators._convolution_pointwise.binary(x, shortcut, weight, bias, *shape, *ending)


@torch.library.custom_op(
    'sk_plugins::convolve_add_relu_',
    mutates_args=('y',),
    device_types='cpu',
    schema='(Tensor(a!) y, Tensor x, Tensor weight, Tensor? bias, '
    'SymInt[] padding, SymInt[] stride, SymInt[] dilation, SymInt groups, bool relu) -> ()',
)
def convolve_add_relu_(y, x, weight, bias, padding, stride, dilation, groups, relu):
    """y += conv(x) and, where asked for, its ReLU, in one pass; y and x of float32 and channels last.

    oneDNN's operator has no fake implementation, and so cannot be traced itself.
    """
    torch.ops.mkldnn._convolution_pointwise_.binary(
        y, x, weight, bias, padding, stride, dilation, groups, 'add', 1.0, 'relu' if relu else None, [], ''
    )


@convolve_add_relu_.register_fake
def _(y, x, weight, bias, padding, stride, dilation, groups, relu):
    pass
