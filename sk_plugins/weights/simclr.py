"""SimCLRv2's weights under our names: lightly-ai's PyTorch files, and Google's TensorFlow checkpoints.

lightly-ai's are at https://huggingface.co/lightly-ai, ``{'resnet': ..., 'head': ...}`` in one pickle each; Google's are
at https://github.com/google-research/simclr. Both hold the two branches of an SK convolution as one 3x3 of twice the
channels, and its BatchNorm, the first half of which is branch 0.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .fit import COUNTER
from .tensorflow import SLOT

__all__ = [
    'count_projection',
    'from_lightly',
    'from_tensorflow',
    'is_lightly',
    'is_tensorflow',
    'network_arguments',
    'to_lightly',
    'to_own',
]

PROJECTION = 'projection.'

# Our modules and lightly-ai's. 'conv2.paths' are both branches in one.
_LIGHTLY = {
    'conv1.0': 'net.0.0',
    'conv1.1': 'net.0.1.0',
    'conv1.3': 'net.0.2',
    'conv1.4': 'net.0.3.0',
    'conv1.6': 'net.0.4',
    'bn1': 'net.0.5.0',
    'fc': 'fc',
}
_LIGHTLY_UNIT = {
    'downsample.1': 'projection.shortcut.2',
    'downsample.2': 'projection.bn.0',
    'conv1.conv': 'net.0',
    'conv1.bn': 'net.1.0',
    'conv2.paths.conv': 'net.2.main_conv.0',
    'conv2.paths.bn': 'net.2.main_conv.1.0',
    'conv2.attn.fc_reduce': 'net.2.mixing_conv.0',
    'conv2.attn.bn': 'net.2.mixing_conv.1.0',
    'conv2.attn.fc_select': 'net.2.mixing_conv.2',
    'conv3.conv': 'net.3',
    'conv3.bn': 'net.4.0',
}
_LIGHTLY_HEAD = 'head.layers.'
_OURS, _OURS_IN_UNIT = ({theirs: ours for ours, theirs in table.items()} for table in (_LIGHTLY, _LIGHTLY_UNIT))


def is_lightly(names: Iterable[str]) -> bool:
    """Whether the names are lightly-ai's."""
    return 'net.1.blocks.0.net.2.main_conv.0.weight' in names


def to_own(state_dict: Mapping[str, Tensor], projection: int = 0) -> dict[str, Tensor]:
    """A state dict under our names if it is lightly-ai's, else as it is.

    Args:
        state_dict: the tensors.
        projection: how many layers of the contrastive head the network has, as in :func:`from_lightly`.
    """
    return from_lightly(state_dict, projection) if is_lightly(state_dict) else dict(state_dict)


def from_lightly(state_dict: Mapping[str, Tensor], projection: int | None = None) -> dict[str, Tensor]:
    """From lightly-ai's names, with ``head.`` before those of the contrastive head, to ours.

    Args:
        state_dict: what :func:`~sk_plugins.weights.load_checkpoint` reads of their file. Tensors stay where they are:
            a branch's are views of both.
        projection: how many layers of the contrastive head the network has before its classifier. Where there are
            some, the file's classifier is left out: it was trained on the features before them. None keeps all.

    Raises:
        ValueError: a name that is not one of theirs.
    """
    renamed = {}
    for name, tensor in state_dict.items():
        if name.startswith(_LIGHTLY_HEAD):
            renamed[PROJECTION + name.removeprefix(_LIGHTLY_HEAD)] = tensor
            continue
        module, _, leaf = name.rpartition('.')
        in_unit = re.fullmatch(r'net\.([1-4])\.blocks\.(\d+)\.(.+)', module)
        ours = _OURS_IN_UNIT.get(in_unit[3]) if in_unit else _OURS.get(module)
        if ours is None:
            raise ValueError(f"{name} is not part of lightly-ai's SimCLRv2")
        renamed[f'layer{in_unit[1]}.{in_unit[2]}.{ours}.{leaf}' if in_unit else f'{ours}.{leaf}'] = tensor
    if projection:
        renamed.pop('fc.weight', None)
        renamed.pop('fc.bias', None)
    return _keep(_split(renamed), projection)


def to_lightly(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From our names to lightly-ai's, with ``head.`` before those of the contrastive head."""
    renamed = {}
    for name, tensor in _join(state_dict).items():
        module, _, leaf = name.rpartition('.')
        if name.startswith(PROJECTION):
            renamed[_LIGHTLY_HEAD + name.removeprefix(PROJECTION)] = tensor
        elif match := re.fullmatch(r'layer(\d)\.(\d+)\.(.+)', module):
            stage, unit, part = match.groups()
            renamed[f'net.{stage}.blocks.{unit}.{_LIGHTLY_UNIT[part]}.{leaf}'] = tensor
        else:
            renamed[f'{_LIGHTLY[module]}.{leaf}'] = tensor
    return renamed


def _split(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Branch 0 and branch 1 from one convolution and norm of twice the channels."""
    split = {}
    for name, tensor in tensors.items():
        before, paths, leaf = name.partition('conv2.paths.')
        if not paths:
            split[name] = tensor
            continue
        halves = (tensor, tensor.clone()) if name.endswith(COUNTER) else torch.chunk(tensor, 2)
        for m, half in enumerate(halves):
            split[f'{before}{paths}{m}.{leaf}'] = half
    return split


def _join(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    joined = {}
    for name, tensor in tensors.items():
        before, paths, leaf = name.partition('conv2.paths.')
        m, _, leaf = leaf.partition('.')
        if not paths:
            joined[name] = tensor
        elif m == '0':
            other = tensors[f'{before}{paths}1.{leaf}']
            joined[f'{before}{paths}{leaf}'] = tensor if name.endswith(COUNTER) else torch.cat([tensor, other])
    return joined


def _keep(tensors: Mapping[str, Tensor], projection: int | None) -> dict[str, Tensor]:
    """Without the layers of the contrastive head from this one on; each is a linear layer, a norm and a ReLU."""
    if projection is None:
        return dict(tensors)
    wanted = tuple(f'{PROJECTION}{i}.' for i in range(3 * projection))
    return {k: v for k, v in tensors.items() if not k.startswith(PROJECTION) or k.startswith(wanted)}


def is_tensorflow(names: Iterable[str]) -> bool:
    """Whether the names are those of Google's TensorFlow 1 checkpoints."""
    return 'base_model/conv2d/kernel' in names


def from_tensorflow(variables: Mapping[str, Tensor], projection: int | None = None) -> dict[str, Tensor]:
    """From the variables of a TensorFlow 1 checkpoint to our names.

    ``base_model``'s layers are numbered in the order ``resnet.py`` creates them: the stem's; then in every unit the
    shortcut's, the first 1x1, the SK 3x3, the attention's two (the second without a norm) and the last 1x1. Kernels
    are HWIO there, and linear layers (in, out).

    Args:
        variables: by name, such as :func:`~sk_plugins.weights.tensorflow.read` reads them.
        projection: how many layers of the contrastive head the classifier stands on; None keeps all.

    Raises:
        ValueError: variables that are missing, or in another order.
    """
    kernels, norms = _numbered(variables, 'conv2d'), _numbered(variables, 'batch_normalization')
    names = iter(norms)
    renamed: dict[str, Tensor] = {}
    for name, module, norm in _creation_order(kernels, variables):
        renamed[f'{module}.weight'] = variables[f'{name}/kernel'].permute(3, 2, 0, 1).contiguous()
        if norm is not None:
            renamed.update(_norm(variables, next(names, 'base_model/batch_normalization'), norm))
    if left := list(names):
        raise ValueError(f'{left[0]} follows no convolution')
    layers = sorted(
        {match[1] for name in variables if (match := re.match(r'head_contrastive/nl_(\d+)/', name))}, key=int
    )
    for i in map(int, layers):
        scope = f'head_contrastive/nl_{i}'
        renamed[f'{PROJECTION}{3 * i}.weight'] = variables[f'{scope}/dense/kernel'].t().contiguous()
        renamed.update(_norm(variables, f'{scope}/batch_normalization', f'{PROJECTION}{3 * i + 1}'))
    classifier = 'head_supervised/linear_layer/dense'
    if f'{classifier}/kernel' in variables:
        renamed['fc.weight'] = variables[f'{classifier}/kernel'].t().contiguous()
        renamed['fc.bias'] = variables[f'{classifier}/bias']
    return _keep(_split(renamed), projection)


def count_projection(names: Iterable[str]) -> int | None:
    """How many layers of the contrastive head the classifier of a TensorFlow checkpoint stands on; None if unknown.

    A checkpoint holds the whole contrastive head, whether or not its classifier stands on it (``projection_head``). The
    optimizer has variables of what it trained alone. Where that is the contrastive head, the network is a pretrained
    one, and where it is only the classifier, that was trained on the features: 0. A fine-tuned network's names don't
    tell.
    """
    trained = {name.partition('/')[0] for name in names if name.endswith(SLOT)}
    has_head = any(name.startswith('head_contrastive/') for name in names)
    return 0 if not has_head or 'head_contrastive' in trained or trained == {'head_supervised'} else None


def _numbered(variables: Mapping[str, Tensor], kind: str) -> list[str]:
    """The layers of one kind in ``base_model``, in the order of their numbers."""
    pattern = re.compile(rf'(base_model/{kind}(?:_(\d+))?)/(?:kernel|gamma)')
    found = {int(match[2] or 0): match[1] for name in variables if (match := pattern.fullmatch(name))}
    if missing := set(range(max(found, default=-1) + 1)) - found.keys():
        raise ValueError(f'base_model/{kind}_{min(missing)} is missing')
    return [found[number] for number in sorted(found)]


def _creation_order(kernels: Sequence[str], variables: Mapping[str, Tensor]) -> Iterable[tuple[str, str, str | None]]:
    """(their layer, our convolution, our norm after it) of every convolution."""
    ours = [('conv1.0', 'conv1.1'), ('conv1.3', 'conv1.4'), ('conv1.6', 'bn1')]
    sides = [variables[f'{name}/kernel'].shape[0] for name in kernels]
    stage = unit = 0
    while len(ours) < len(kernels):
        # The SK 3x3 is the unit's second convolution, or after a shortcut its third.
        first = sides[len(ours) : len(ours) + 3] == [1, 1, 3]
        stage, unit = (stage + 1, 0) if first else (stage, unit + 1)
        parts = [('downsample.1', 'downsample.2')] if first else []
        parts += [('conv1.conv', 'conv1.bn'), ('conv2.paths.conv', 'conv2.paths.bn')]
        parts += [('conv2.attn.fc_reduce', 'conv2.attn.bn'), ('conv2.attn.fc_select', None), ('conv3.conv', 'conv3.bn')]
        wanted = [3 if 'paths' in conv else 1 for conv, _ in parts]
        if sides[len(ours) : len(ours) + len(parts)] != wanted:
            raise ValueError(
                f'{kernels[len(ours)]} begins no unit with an SK convolution: kernels of {wanted} should follow'
            )
        at = f'layer{stage}.{unit}.'
        ours += [(at + conv, norm and at + norm) for conv, norm in parts]
    return ((name, *modules) for name, modules in zip(kernels, ours))


def _norm(variables: Mapping[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    """A BatchNorm's tensors; the contrastive head's last has no shift."""
    leaves = dict(weight='gamma', bias='beta', running_mean='moving_mean', running_var='moving_variance')
    tensors = {
        f'{ours}.{leaf}': variables[f'{theirs}/{name}']
        for leaf, name in leaves.items()
        if f'{theirs}/{name}' in variables
    }
    if lacking := {f'{ours}.{leaf}' for leaf in leaves if leaf != 'bias'} - tensors.keys():
        raise ValueError(f'{theirs} of {min(lacking)} is missing')
    tensors.setdefault(f'{ours}.bias', torch.zeros_like(tensors[f'{ours}.weight']))
    return {**tensors, f'{ours}.{COUNTER}': torch.tensor(0)}


def network_arguments(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a :class:`~sk_plugins.networks.SKResNetSimCLR` of these weights, under our names, is built with.

    Raises:
        ValueError: tensors that are missing.
    """
    units = [
        match.groups() for name in state_dict if (match := re.match(r'layer(\d)\.(\d+)\.conv3\.conv\.weight', name))
    ]
    try:
        layers = tuple(1 + max(int(unit) for at, unit in units if at == stage) for stage in '1234')
        channels = [state_dict[f'layer{stage}.0.conv1.conv.weight'].shape[0] for stage in '1234']
        stem, first = state_dict['conv1.6.weight'].shape[0], state_dict['conv1.0.weight']
    except (KeyError, ValueError) as error:
        raise ValueError(f'not the weights of a whole network: {error}') from error
    width = max(stem // 64, 1)
    args: dict[str, Any] = dict(layers=layers, width_factor=width)
    if stem != 64 * width:
        args['stem_width'] = stem // 2
    if channels != [planes * width for planes in (64, 128, 256, 512)]:
        args['channels'] = tuple(channels)
    if projection := sum(name.startswith(PROJECTION) and tensor.ndim == 2 for name, tensor in state_dict.items()):
        args['projection'] = projection
    if first.shape[1] != 3:
        args['in_chans'] = first.shape[1]
    args['num_classes'] = len(state_dict['fc.weight']) if 'fc.weight' in state_dict else 0
    return args
