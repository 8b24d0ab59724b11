"""A warm start: SK networks from the weights of the ResNet, ResNeXt or SE-ResNeXt of their shape.

The 3x3 convolution of a unit, with its norm, goes into every branch of its SK convolution. With true kernels the larger
ones are the 3x3 with zeros around, every branch gives the same map, and a selection among equal maps is that map: the
network starts with the outputs that the ResNet had. With dilated kernels, as the authors have them, the outputs move.
"""

import functools
import os
import re
from collections.abc import Mapping
from typing import Any

import timm
from timm.layers import SEModule
from timm.models import clean_state_dict
from torch import Tensor, nn

from .._text import several
from ..layers import SelectiveKernel
from ..networks import SKBasicBlock, SKBottleneck, SKResNet
from ..surgery import grow_kernel
from .files import CheckpointError, find_fault, load_checkpoint, pick_state_dict
from .fit import COUNTER, load_strictly, require_fit
from .hub import PartialLoad, download_url, load_state_dict
from .names import BACKBONE

__all__ = ['from_resnet', 'read_resnet', 'warm_start']

Source = str | os.PathLike | Mapping[str, Any] | nn.Module

# mmpretrain's names of what timm's ResNet has too.
_MMPRETRAINS = {
    r'head\.fc\.': 'fc.',
    r'stem\.0\.conv\.': 'conv1.0.',
    r'stem\.0\.bn\.': 'conv1.1.',
    r'stem\.1\.conv\.': 'conv1.3.',
    r'stem\.1\.bn\.': 'conv1.4.',
    r'stem\.2\.conv\.': 'conv1.6.',
    r'stem\.2\.bn\.': 'bn1.',
    r'(layer\d+\.\d+)\.se_layer\.conv([12])\.conv\.': r'\1.se.fc\2.',
}


def from_resnet(source: Source, **kwargs) -> SKResNet:
    """Build the SK network of a ResNet's shape, with its weights and, at the start, its outputs.

    The outputs are equal where the branches have true kernels, which they have here unless ``sk_kwargs`` says
    otherwise (``dict(dilated=True)`` for the authors' dilated ones). See :func:`warm_start`.

    Args:
        source: a ResNet, ResNeXt or SE-ResNeXt: timm's name of one with published weights, a model, a state dict, a
            checkpoint file, an ``https://`` address or ``hf-hub:OWNER/NAME``, with the names of timm, torchvision or
            mmpretrain.
        **kwargs: further arguments of :class:`~sk_plugins.networks.SKResNet`, beside those that the weights tell
            (``layers``, ``block``, ``channels``, ``cardinality``, ``base_width``, the stem's, ``num_classes``,
            ``in_chans``): ``sk_kwargs``, ``drop_path_rate``, ... Another ``num_classes`` leaves the classifier as
            initialised.

    Raises:
        FileNotFoundError, CheckpointError, HubError: the source cannot be had or read, or is no such network's; the
            message names the tensors.
        ValueError: arguments that are out of range, or a name that timm does not know.
    """
    weights, where = read_resnet(source)
    arguments = _arguments(weights, where)
    sk_kwargs = {'dilated': False, **(kwargs.pop('sk_kwargs', None) or {})}
    model = SKResNet(**{**arguments, **kwargs, 'sk_kwargs': sk_kwargs})
    _load(model, weights, where, source)
    return model


def warm_start(model: SKResNet, source: Source) -> PartialLoad:
    """Give an SK network, timm's or OpenMMLab's, the weights of the ResNet of its shape.

    ::

        model = timm.create_model('sknet101', sk_kwargs=dict(dilated=False))
        print(warm_start(model, 'resnext101_32x4d.gluon_in1k'))

    Every branch gets the 3x3 convolution and its norm. The kernel of a larger true kernel is the 3x3 with zeros around,
    and the outputs are the ResNet's. A dilated kernel shares the taps beside its centre out to those it has
    (:func:`~sk_plugins.surgery.grow_kernel`), and the outputs move. The attention stays as initialised.

    Args:
        model: changed in place.
        source: as for :func:`from_resnet`.

    Returns:
        What was loaded; what was left as initialised: the attention, and the classifier where the network has one of
        another size; and what was not used.

    Raises:
        FileNotFoundError, CheckpointError, HubError: the source cannot be had or read, or does not fit the network.
        TypeError: ``model`` is no :class:`~sk_plugins.networks.SKResNet`.
        ValueError: a unit whose branches see parts of the input (``split_input``) or have no selection (``select`` is
            'sum'), which no 3x3 can be made equal to.
    """
    if not isinstance(model, SKResNet):
        raise TypeError(f'model must be an SKResNet, not {type(model).__name__}; selectify() is for other networks')
    weights, where = read_resnet(source)
    return _load(model, weights, where, source)


def read_resnet(source: Source) -> tuple[dict[str, Tensor], str]:
    """The weights under timm's names, and what they come from, for messages."""
    where = 'the state dict'
    if isinstance(source, nn.Module):
        state_dict, where = source.state_dict(), f'the {type(source).__name__}'
    elif isinstance(source, Mapping):
        state_dict = clean_state_dict(pick_state_dict(source))
    else:
        where = str(source)
        if where.startswith('hf-hub:'):
            state_dict = load_state_dict(where.removeprefix('hf-hub:'))
        elif where.startswith(('https://', 'http://')):
            state_dict = download_url(where, load_checkpoint)[0]
        elif '/' not in where and timm.is_model(where.partition('.')[0]) and not os.path.exists(source):
            state_dict = timm.create_model(where, pretrained=True).state_dict()
        else:
            state_dict = load_checkpoint(source)[0]
    for name, tensor in state_dict.items():
        if fault := find_fault(tensor, tensor):
            raise CheckpointError(f'{where}: {name} is {fault}')
    whole = any(name.startswith(BACKBONE) for name in state_dict)  # a classifier or detector of OpenMMLab's
    renamed = {
        _timms_name(name): tensor.detach()
        for name, tensor in state_dict.items()
        if not whole or name.startswith((BACKBONE, 'head.fc.'))
    }
    if any(re.fullmatch(_POOLED, name) for name in renamed):
        # mmpretrain has no pooling in a shortcut that does not stride, and timm an identity in its place.
        stages = {name[:8] for name in renamed if '.0.downsample.0.' in name}
        renamed = {_after_pooling(name) if name[:8] in stages else name: tensor for name, tensor in renamed.items()}
    return renamed, where


_POOLED = r'layer\d+\.0\.downsample\.2\.weight'


def _after_pooling(name: str) -> str:
    return re.sub(r'\.downsample\.([01])\.', lambda match: f'.downsample.{int(match[1]) + 1}.', name)


def _timms_name(name: str) -> str:
    name = name.removeprefix(BACKBONE)
    for theirs, timms in _MMPRETRAINS.items():
        if match := re.match(theirs, name):
            return match.expand(timms) + name[match.end() :]
    return name


def _arguments(weights: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    """The arguments of SKResNet that the weights of a ResNet tell."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in weights or weights[name].ndim < 2:
            raise CheckpointError(f"{where}: no ResNet's weights: {name} is missing; the first are {several(weights)}")
        return tuple(weights[name].shape)

    places = {(int(m[1]), int(m[2])) for name in weights if (m := re.match(r'layer(\d+)\.(\d+)\.', name))}
    stages = range(1, max((stage for stage, _ in places), default=1) + 1)
    widths = [shape(f'layer{stage}.0.conv2.weight') for stage in stages]
    args: dict[str, Any] = dict(layers=tuple(sum(at == stage for at, _ in places) for stage in stages))
    if 'layer1.0.conv3.weight' in weights:
        outputs = [shape(f'layer{stage}.0.conv3.weight')[0] for stage in stages]
        channels = tuple(out // SKBottleneck.expansion for out in outputs)
        groups = widths[0][0] // widths[0][1]
        args |= dict(cardinality=groups, base_width=64 * widths[0][0] / groups / channels[0])
    else:
        channels = tuple(width[0] for width in widths)
        args |= dict(block='basic', cardinality=1, base_width=64)
    args['channels'] = channels
    if 'conv1.0.weight' in weights:
        first, second, stem = (shape(f'conv1.{i}.weight') for i in (0, 3, 6))
        tiered = first[0] != second[0]
        args |= dict(stem_type='deep_tiered' if tiered else 'deep', stem_width=stem[1] if tiered else first[0])
    else:
        first = shape('conv1.weight')
        args['small_stem'] = first[2] == 3
    args['in_chans'] = first[1]
    # Average pooling, which has no weights, is the first module of such a shortcut.
    args['avg_down'] = any(re.fullmatch(_POOLED, name) for name in weights)
    if 'layer1.0.se.fc1.weight' in weights:
        reduced = {shape(name)[1]: shape(name)[0] for name in weights if name.endswith('.se.fc1.weight')}
        args['block_args'] = dict(attn_layer=functools.partial(_excitation, reduced))
    args['num_classes'] = shape('fc.weight')[0] if 'fc.weight' in weights else 0
    return args


def _excitation(reduced: Mapping[int, int], channels: int, **kwargs) -> SEModule:
    return SEModule(channels, rd_channels=reduced.get(channels), **kwargs)


_HEAD = ('fc.weight', 'fc.bias')


def _load(model: SKResNet, weights: Mapping[str, Tensor], where: str, source: Source) -> PartialLoad:
    own = model.state_dict()
    given = {}
    for name, tensor in weights.items():
        for ours in _our_names(name, model):
            given[ours] = _branch(model, ours, tensor) if '.paths.' in ours and tensor.ndim == 4 else tensor
    unused = []
    if any(name in given and (name not in own or given[name].shape != own[name].shape) for name in _HEAD):
        unused = [name for name in _HEAD if given.pop(name, None) is not None]
    left = [name for name in own if '.attn.' in name or (name in _HEAD and name not in given)]
    wanted = {name: tensor for name, tensor in own.items() if name not in left}
    require_fit(given, wanted, where, "the ResNet of this network's shape")
    if isinstance(source, nn.Module):
        _require_same(model, source, where)
    load_strictly(model, {**own, **given}, where, 'this network')

    def named(names) -> tuple[str, ...]:
        return tuple(name for name in names if not name.endswith(COUNTER))

    return PartialLoad(named(given), named(left), named(unused))


def _our_names(name: str, model: SKResNet) -> list[str]:
    """The tensors of an SK network that one of a ResNet goes into: of the 3x3, and of its norm, one in every branch."""
    match = re.fullmatch(r'(layer\d+)\.(\d+)\.(conv|bn)([123])\.(\w+)', name)
    stage = getattr(model, match[1], ()) if match else ()
    if not match or int(match[2]) >= len(stage):
        return [name]
    unit, kind, number, leaf = f'{match[1]}.{match[2]}', *match.groups()[2:]
    block = stage[int(match[2])]
    if not isinstance(block, (SKBottleneck, SKBasicBlock)):
        raise ValueError(f'{unit} is a {type(block).__name__}: a warm start is for SK units')
    if f'conv{number}' != block.sk_name:
        return [f'{unit}.conv{number}.{kind}.{leaf}']
    layer: SelectiveKernel = getattr(block, block.sk_name)
    if layer.split_input or layer.attn is None:
        said, ours = ('split_input=True', 'split_input=False') if layer.split_input else ("select='sum'", 'a selection')
        raise ValueError(
            f'{unit}.{block.sk_name} has {said}, to which no 3x3 convolution is equal: build the network with {ours}'
        )
    if kind == 'bn' and layer.bn is not None:  # after the selection
        return [f'{unit}.{block.sk_name}.bn.{leaf}']
    return [f'{unit}.{block.sk_name}.paths.{m}.{kind}.{leaf}' for m in range(len(layer.paths))]


def _branch(model: SKResNet, name: str, weight: Tensor) -> Tensor:
    """The kernel of a branch from that of the 3x3."""
    if weight.shape[2:] != (3, 3):
        return weight  # a misfit
    sk, _, path = name.removesuffix('.conv.weight').rpartition('.paths.')
    layer = model.get_submodule(sk)
    conv = layer.paths[int(path)].conv
    return grow_kernel(weight, conv.kernel_size[0], conv.dilation[0] // layer.dilation)


# What weights can't tell, and a model can.
_GEOMETRY = {nn.Conv2d: ('stride', 'padding', 'dilation', 'groups', 'padding_mode'), nn.BatchNorm2d: ('eps',)}
_LAYERS = {'Conv2d', 'BatchNorm2d', 'SyncBatchNorm', 'FrozenBatchNorm2d', 'ReLU', 'Sigmoid', 'Identity', 'MaxPool2d'}
_LAYERS |= {'AdaptiveAvgPool2d', 'AvgPool2d', 'AvgPool2dSame', 'DropPath', 'Dropout', 'StochasticDepth', 'Sequential'}


def _require_same(model: SKResNet, source: nn.Module, where: str) -> None:
    """Raise where a ResNet computes otherwise than a network of ours with its weights would."""
    for theirs, module in source.named_modules():
        name = _timms_name(theirs + '.').removesuffix('.')
        if not name.startswith(('conv1', 'bn1', 'layer', 'maxpool')):
            continue
        kind = type(module).__name__
        if not list(module.children()) and kind not in _LAYERS:
            raise CheckpointError(f'{where}: {theirs} is a {kind}, which a plain ResNet does not have')
        for base, attributes in _GEOMETRY.items():
            if not isinstance(module, base):
                continue
            places = [place.removesuffix('.weight') for place in _our_names(f'{name}.weight', model)]
            ours = min(map(model.get_submodule, places), key=lambda layer: getattr(layer, 'kernel_size', ()))
            for attribute in attributes:
                given, wanted = getattr(module, attribute), getattr(ours, attribute, None)
                if given != wanted and isinstance(ours, base):
                    raise CheckpointError(
                        f'{where}: {theirs} has {attribute}={given}, and this network has {wanted} there'
                    )
