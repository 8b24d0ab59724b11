"""CNNs of any library made selective: their 3x3 convolutions become SK convolutions, and the outputs stay equal.

Softmax weights sum to one, so a selection among equal maps is that map, whatever the attention says. A 3x3 kernel with
zeros around it is a larger kernel with equal outputs. Training tells the branches apart: the zeros get gradients of
their own, and once the maps differ, so does the attention.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._arguments import check_choice, is_integer
from ._text import nearest, several
from .layers import SelectiveKernel
from .ops import has_hooks
from .ops.private import is_compiled, is_optimized

__all__ = ['Selectified', 'grow_kernel', 'selectify']

# Convolutions that compute what torch's does; of mmcv's, for empty tensors too.
_CONVS = {'torch.nn.modules.conv.Conv2d', 'mmcv.cnn.bricks.wrappers.Conv2d'}
# Those that pad as TensorFlow's 'SAME', by the size of their kernel.
_SAME_CONVS = {
    'timm.layers.conv2d_same.Conv2dSame',
    'mmcv.cnn.bricks.conv2d_adaptive_padding.Conv2dAdaptivePadding',
}
_SK_KWARGS = ('reduction', 'min_dim', 'select', 'select_bias', 'reduce_norm', 'reduce_act', 'act_layer', 'norm_layer')


@dataclass(frozen=True)
class Selectified:
    """What :func:`selectify` did to a model, by the convolutions' names; ``str()`` of it is a report in a few lines.

    Attributes:
        changed: parameters that were added, for every convolution that is an SK convolution now.
        kept: why, for every convolution that stayed what it was.
    """

    changed: Mapping[str, int]
    kept: Mapping[str, str]

    @property
    def parameters(self) -> int:
        """Parameters that were added to the model."""
        return sum(self.changed.values())

    def __str__(self) -> str:
        lines = [f'{len(self.changed)} convolutions are SK convolutions now: {several(self.changed)}']
        lines.append(f'{self.parameters:,} parameters were added')
        for reason, count in Counter(self.kept.values()).most_common():
            names = [name for name, why in self.kept.items() if why == reason]
            lines.append(f'{count} stayed as they were, {reason}: {several(names)}')
        return '\n'.join(lines)


def selectify(
    model: nn.Module,
    kernel_sizes: Sequence[int] = (3, 5),
    where: str | Iterable[str | Callable[[str, nn.Conv2d], bool]] | Callable[[str, nn.Conv2d], bool] | None = None,
    **sk_kwargs,
) -> Selectified:
    """Turn the 3x3 convolutions of a model into SK convolutions, in place; its outputs stay equal.

    Each convolution, grouped, depthwise or dense, becomes a :class:`~sk_plugins.layers.SelectiveKernel` whose branches
    are convolutions alone: the 3x3 and, for larger kernels, copies with zeros around. The norm and the activation
    that follow stay where they are, after the selection. It works on models of timm, torchvision, mmpretrain and
    others, as long as they call their convolutions as modules. Convolutions are torch's, and those of timm and mmcv
    that pad as TensorFlow's 'SAME'; other subclasses stay as they are.

    ::

        model = timm.create_model('resnet50', pretrained=True)
        print(selectify(model, where='layer[34].*'))

    Load weights, and call mmengine's ``init_weights``, before: convolutions have other names after it. Optimizers are
    made after it, and DistributedDataParallel is put around it after it. An SK convolution has the dtype, device, mode
    and ``requires_grad`` of the old one, its attention ``requires_grad`` of that one's weight. The attention has a
    BatchNorm, which needs a batch of two in training: ``norm_layer=timm.layers.GroupNorm1`` goes without.

    Args:
        model: changed in place.
        kernel_sizes: true kernels of the branches, odd, 3 among them and none below it; two at least.
        where: which convolutions: patterns of names as in :mod:`fnmatch` or functions of the name and the
            convolution, one or several; all where None.
        **sk_kwargs: of :class:`~sk_plugins.layers.SelectiveKernel`: ``reduction``, ``min_dim``, ``select`` ('channel'
            or 'shared'), ``select_bias``, ``reduce_norm``, ``reduce_act``, ``act_layer``, ``norm_layer``.

    Returns:
        What was changed and what was not, and why.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or an argument that there is not.
        ValueError: nothing to change, and why; a ``where`` that names no convolution, or is no pattern; kernel sizes
            without a 3; a model that was scripted or compiled, that is in DistributedDataParallel, or that is itself a
            convolution. The model is as it was then.
    """
    _check(model, kernel_sizes, sk_kwargs)
    convs = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if _is_conv(module)]
    branches = {
        name
        for parent, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, SelectiveKernel)
        for name, _ in layer.named_modules(prefix=parent)
    }
    named = _choose(where, convs, type(model).__name__)
    tied = _find_tied(model)
    kept, chosen = {}, {}
    for name, conv in convs:
        reason = 'not named by where' if name not in named else _find_obstacle(conv)
        if reason is None and not tied.isdisjoint(map(id, conv.parameters())):
            reason = 'shares a parameter with another module'
        if name in branches:
            reason = 'a part of an SK convolution already'
        if reason is None:
            chosen[name] = conv
        else:
            kept[name] = reason
    if not chosen:
        reasons = Counter(reason for name, reason in kept.items() if name in named)
        said = ', '.join(f'{count} {reason}' for reason, count in reasons.most_common()) or 'none at all'
        raise ValueError(f'this {type(model).__name__} has no 3x3 convolution to change; of its convolutions: {said}')

    layers = {conv: _selective(conv, kernel_sizes, sk_kwargs) for conv in dict.fromkeys(chosen.values())}
    changed = {}
    for name, conv in chosen.items():
        parent, _, child = name.rpartition('.')
        setattr(model.get_submodule(parent), child, layers[conv])
        counted = conv in {chosen[other] for other in changed}  # one module under two names
        changed[name] = 0 if counted else _count(layers[conv]) - _count(conv)
    return Selectified(changed, kept)


def grow_kernel(weight: Tensor, size: int, spread: int = 1) -> Tensor:
    """A 3x3 kernel as one of another size and dilation: (C, C', 3, 3) to (C, C', size, size).

    With ``spread`` 1 and a size of 3 or more the outputs are equal: the kernel has zeros around. A larger ``spread`` is
    the dilation over the 3x3's own: a tap beside the centre lies between two taps of the dilated kernel, and is shared
    out to them as in linear interpolation, so that outputs on smooth maps are close. A size of 1 is the sum of the
    taps, equal on constant maps.
    """
    if spread == 1 and size > 1:
        return F.pad(weight, [size // 2 - 1] * 4)
    grown = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for _ in range(2):  # columns, then rows
        grown = _share_out(grown, size, spread).transpose(-2, -1)
    return grown.to(weight.dtype).contiguous()


def _share_out(weight: Tensor, size: int, spread: int) -> Tensor:
    """:func:`grow_kernel` along the last axis, by sums: autocast and TF32 round products of matrices."""
    left, centre, right = weight.unbind(-1)
    if size == 1:
        return (left + centre + right)[..., None]
    centre = centre + (1 - 1 / spread) * (left + right)
    return F.pad(torch.stack([left / spread, centre, right / spread], -1), [size // 2 - 1] * 2)


def _check(model: nn.Module, kernel_sizes: Sequence[int], sk_kwargs: Mapping[str, object]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f'model={model!r} must be an nn.Module, not {type(model).__name__}')
    if isinstance(model, torch.jit.ScriptModule) or is_compiled(model) or is_optimized(model):
        raise ValueError(
            f'model is a {type(model).__name__} that was scripted or compiled: change the model that it was made from, '
            'then script or compile that'
        )
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            f'model is a {type(model).__name__} with a DistributedDataParallel, which would not reduce the gradients '
            'of parameters added now: change the model, then put it in that'
        )
    if _is_conv(model):
        raise ValueError('model is a convolution itself, which nothing holds: give the module that it is in')
    sizes = kernel_sizes if isinstance(kernel_sizes, Sequence) and not isinstance(kernel_sizes, str) else ()
    if len(sizes) < 2 or 3 not in sizes or not all(is_integer(size, 3) and size % 2 for size in sizes):
        raise ValueError(
            f'kernel_sizes={kernel_sizes!r} must be two or more odd sizes, 3 among them and none below it: the 3x3 is '
            'what the outputs come from'
        )
    for name in sk_kwargs:
        if name not in _SK_KWARGS:
            raise TypeError(f'selectify has no argument {name}={sk_kwargs[name]!r}{nearest(name, _SK_KWARGS)}')
    check_choice('select', sk_kwargs.get('select', 'channel'), ('channel', 'shared'))


def _is_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d)


def _choose(where, convs: Sequence[tuple[str, nn.Conv2d]], owner: str) -> set[str]:
    """The names of the convolutions that ``where`` means."""
    if where is None:
        return {name for name, _ in convs}
    one = callable(where) or isinstance(where, str)
    conditions = [where] if one else list(where) if isinstance(where, Iterable) else []
    if not conditions or not all(callable(condition) or isinstance(condition, str) for condition in conditions):
        raise ValueError(
            f"where={where!r} must be a pattern of names, such as 'layer[34].*', a function of the name and the "
            'convolution, or several of them; None for all convolutions'
        )
    found = set()
    for condition in conditions:
        named = {
            name
            for name, conv in convs
            if (condition(name, conv) if callable(condition) else fnmatchcase(name, condition))
        }
        if not named:
            raise ValueError(
                f'where={condition!r} names none of the {len(convs)} convolutions of this {owner} '
                f'({several(name for name, _ in convs)})'
            )
        found |= named
    return found


def _find_tied(model: nn.Module) -> set[int]:
    """The ids of the parameters that several modules hold."""
    held = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    return {parameter for parameter, count in held.items() if count > 1}


def _find_obstacle(conv: nn.Conv2d) -> str | None:
    """Why a convolution cannot become an SK convolution; None where it can."""
    if not (_is_same(conv) or _kind(conv) in _CONVS):
        return f'a {type(conv).__name__}, no plain convolution'
    if conv.kernel_size != (3, 3):
        height, width = conv.kernel_size
        return f'{height}x{width}'
    if has_hooks(conv):
        return 'has hooks or a forward of its own'
    if conv.padding_mode != 'zeros':
        return f'pads with padding_mode={conv.padding_mode!r}'
    if _is_same(conv) and any(stride > 2 * dilation + 1 for stride, dilation in zip(conv.stride, conv.dilation)):
        # What a larger kernel reads would begin elsewhere.
        return f"pads as TensorFlow's 'SAME', with stride={conv.stride}"
    return None


def _kind(conv: nn.Conv2d) -> str:
    return f'{type(conv).__module__}.{type(conv).__qualname__}'


def _is_same(conv: nn.Conv2d) -> bool:
    return _kind(conv) in _SAME_CONVS


def _selective(conv: nn.Conv2d, kernel_sizes: Sequence[int], sk_kwargs: Mapping[str, object]) -> SelectiveKernel:
    """The SK convolution with a convolution's outputs."""
    layer = SelectiveKernel(
        conv.in_channels,
        conv.out_channels,
        kernel_sizes,
        groups=conv.groups,
        dilated=False,
        conv_bias=conv.bias is not None,
        norm_position='none',
        device=conv.weight.device,
        dtype=conv.weight.dtype,
        **sk_kwargs,
    )
    layer.attn.init_weights()
    for path, size in zip(layer.paths, kernel_sizes):
        path.conv = _grown(conv, size)
    layer.attn.requires_grad_(conv.weight.requires_grad)
    return layer.train(conv.training)


def _grown(conv: nn.Conv2d, size: int) -> nn.Conv2d:
    """A convolution with a larger kernel, zero but for the 3x3 in its middle."""
    padding = (0, 0) if conv.padding == 'valid' else conv.padding
    if padding != 'same':
        padding = tuple(pad + dilation * (size - 3) // 2 for pad, dilation in zip(padding, conv.dilation))
    kind = type(conv) if _is_same(conv) else nn.Conv2d
    with torch.device('meta'):
        grown = kind(
            conv.in_channels,
            conv.out_channels,
            size,
            conv.stride,
            padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
        )
    weight = grow_kernel(conv.weight.detach(), size)
    if conv.weight.is_contiguous(memory_format=torch.channels_last):
        weight = weight.contiguous(memory_format=torch.channels_last)
    grown.weight = nn.Parameter(weight, conv.weight.requires_grad)
    if conv.bias is not None:
        grown.bias = nn.Parameter(conv.bias.detach().clone(), conv.bias.requires_grad)
    return grown


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
