"""Convolutions in the blocks of channels that a runtime has fast kernels for; their outputs stay the same."""

import copy

import torch
from torch import nn

from sk_plugins.lean import LeanSelectiveKernel

__all__ = ['in_blocks']


def in_blocks(model: nn.Module, width: int, multiple: int) -> nn.Module:
    """A copy of a model as :func:`sk_plugins.simplify` leaves it, with more multiplications, by zeros, in fewer blocks.

    - Grouped convolutions get at least ``width`` channels a group: neighbouring groups are put together, as many as
      their number allows and up to twice those that it takes.
    - Depthwise ones between two 1x1, of ShuffleNetV2's units with SK or without, get channels of zeros up to a multiple
      of ``multiple``.
    """
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        if type(module) is nn.Conv2d and module.groups > 1 and 1 < module.in_channels // module.groups < width:
            _merge(module, _together(module, width))
        elif isinstance(module, nn.Sequential):
            layers = [layer for layer in module if type(layer) not in (nn.Identity, nn.ReLU)]
            for before, middle, after in zip(layers, layers[1:], layers[2:]):
                if all(type(conv) is nn.Conv2d and conv.groups == 1 for conv in (before, after)):
                    _pad(before, middle, after, -before.out_channels % multiple)
    return model


def _together(conv: nn.Conv2d, width: int) -> int:
    """How many groups make one: the fewest that are wide enough, or the most of those that are allowed."""
    wanted = -(-width // (conv.in_channels // conv.groups))
    allowed = [m for m in range(1, min(2 * wanted, conv.groups) + 1) if conv.groups % m == 0]
    return next((m for m in allowed if m >= wanted), allowed[-1])


@torch.no_grad()
def _merge(conv: nn.Conv2d, together: int) -> None:
    conv.groups //= together
    blocks = conv.weight.unflatten(0, (conv.groups, together, -1))  # (groups, together, out, in, height, width)
    weight = blocks.new_zeros(*blocks.shape[:3], together, *blocks.shape[3:])
    for i in range(together):
        weight[:, i, :, i] = blocks[:, i]
    conv.weight = nn.Parameter(weight.flatten(3, 4).flatten(0, 2), requires_grad=False)


@torch.no_grad()
def _pad(before: nn.Conv2d, middle: nn.Module, after: nn.Conv2d, number: int) -> None:
    """Add so many channels between two convolutions."""
    channels = before.out_channels
    convs = [middle]
    if type(middle) is LeanSelectiveKernel and not len(middle.after):
        convs = [path.conv for path in middle.paths]
    if not (number and all(type(conv) is nn.Conv2d and conv.groups == conv.out_channels == channels for conv in convs)):
        return
    _add_outputs(before, number)
    _add_inputs(after, number)
    for conv in convs:
        _add_outputs(conv, number)
        conv.in_channels = conv.groups = conv.out_channels
    if middle not in convs and middle.attends:
        _add_inputs(middle.reduce[0], number)
        if not middle.shared:
            _add_outputs(middle.select, number, parts=middle.select.out_channels // channels)


def _add_outputs(conv: nn.Conv2d, number: int, parts: int = 1) -> None:
    """Zeros at the end of each of the parts that the output channels are in."""
    for name in ('weight', 'bias'):
        values = getattr(conv, name)
        if values is not None:
            blocks = values.unflatten(0, (parts, -1))
            zeros = blocks.new_zeros(parts, number, *blocks.shape[2:])
            setattr(conv, name, nn.Parameter(torch.cat([blocks, zeros], 1).flatten(0, 1), requires_grad=False))
    conv.out_channels += parts * number


def _add_inputs(conv: nn.Conv2d, number: int) -> None:
    zeros = conv.weight.new_zeros(conv.out_channels, number, *conv.kernel_size)
    conv.weight = nn.Parameter(torch.cat([conv.weight, zeros], 1), requires_grad=False)
    conv.in_channels += number
