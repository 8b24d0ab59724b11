"""A warm start: SK networks from the weights of the ResNet, ResNeXt or SE-ResNeXt of their shape.

The 3x3 convolution of a unit, with its norm, goes into every branch of its SK convolution. With true kernels the larger
ones are the 3x3 with zeros around, every branch gives the same map, and a selection among equal maps is that map: the
network starts with the outputs that the ResNet had. With dilated kernels, as the authors have them, the outputs move.
"""

import functools
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import timm
from timm.layers import SEModule
from timm.models import clean_state_dict
from torch import Tensor, nn

from .._text import nearest, several
from ..layers import SelectiveKernel
from ..networks import SKBasicBlock, SKBottleneck, SKResNet, SKResNetSimCLR
from ..surgery import grow_kernel
from .files import CheckpointError, find_fault, load_checkpoint, pick_state_dict
from .fit import COUNTER, load_strictly, require_fit
from .hub import PartialLoad, download_url, explain_errors, load_state_dict
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

    The outputs are equal where the branches have true kernels of 3x3 or more, which they have here unless ``sk_kwargs``
    says otherwise: ``dict(dilated=True)`` for the authors' dilated ones, or ``kernel_sizes`` with a 1. See
    :func:`warm_start`.

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
            message names the tensors. A word that is neither a file nor a name of timm's is a file that is not there.
        TypeError: ``source`` is of none of these kinds.
        ValueError: arguments that are out of range, or a name of timm's without weights.
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
    and the outputs are the ResNet's. A dilated kernel shares the taps beside its centre out to those it has, a 1x1 has
    their sum (:func:`~sk_plugins.surgery.grow_kernel`), and the outputs move. The attention stays as initialised.

    Args:
        model: changed in place.
        source: as for :func:`from_resnet`.

    Returns:
        What was loaded; what was left as initialised: the attention, and the classifier where the network has one of
        another size; and what was not used.

    Raises:
        FileNotFoundError, CheckpointError, HubError: the source cannot be had or read, or does not fit the network.
        TypeError: ``model`` is no :class:`~sk_plugins.networks.SKResNet`, or a
            :class:`~sk_plugins.networks.SKResNetSimCLR`, whose pooling no ResNet has.
        ValueError: a name of timm's without weights; a unit whose branches see parts of the input (``split_input``) or
            have no selection (``select`` is 'sum'), which no 3x3 can be made equal to.
    """
    if not isinstance(model, SKResNet):
        raise TypeError(f'model must be an SKResNet, not {type(model).__name__}; selectify() is for other networks')
    if isinstance(model, SKResNetSimCLR):
        raise TypeError(
            f'model is a {type(model).__name__}, which pads and pools as TensorFlow and so equals no ResNet: its '
            "weights are SimCLRv2's (pretrained=True, load_third_party)"
        )
    weights, where = read_resnet(source)
    return _load(model, weights, where, source)


def read_resnet(source: Source) -> tuple[dict[str, Tensor], str]:
    """The weights under timm's names, and what they come from, for messages."""
    where = 'the state dict'
    if not isinstance(source, (str, os.PathLike, Mapping, nn.Module)):
        raise TypeError(
            f'source={source!r} must be a name of timm, a file, an address, a state dict or a model, not '
            f'{type(source).__name__}'
        )
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
            state_dict = _timms_weights(where)
        elif '/' not in where and not os.path.splitext(where)[1] and not os.path.exists(source):
            near = nearest(where, timm.list_models(), 'the name')
            raise FileNotFoundError(f'{where}: no such checkpoint file, nor a network of timm{near}')
        else:
            state_dict = load_checkpoint(source)[0]
    if branch := next((name for name in state_dict if '.paths.' in name), None):
        raise CheckpointError(f"{where}: an SK network's own weights, no ResNet's ({branch}): load_partial loads them")
    for name, tensor in state_dict.items():
        if fault := find_fault(tensor, tensor):
            raise CheckpointError(f'{where}: {name} is {fault}')
    return {name: state_dict[theirs].detach() for theirs, name in _rename(state_dict).items()}, where


def _timms_weights(name: str) -> dict[str, Tensor]:
    arch = name.partition('.')[0]
    try:
        cfg = timm.get_pretrained_cfg(name)
    except RuntimeError:  # an unknown tag
        cfg = None
    if cfg is None or not cfg.has_weights:
        known = several(timm.list_pretrained(f'{arch}.*'), most=6) or 'none'
        raise ValueError(f'source={name!r} names no weights of timm; those of {arch}: {known}')
    with explain_errors(cfg.hf_hub_id or name):
        return timm.create_model(name, pretrained=True).state_dict()


def _rename(names: Iterable[str]) -> dict[str, str]:
    """timm's names of a ResNet's tensors, by those they have; without what belongs to no ResNet."""
    names = list(names)
    whole = any(name.startswith(BACKBONE) for name in names)  # a classifier or detector of OpenMMLab's
    renamed = {name: _timms_name(name) for name in names if not whole or name.startswith((BACKBONE, 'head.fc.'))}
    if any(re.fullmatch(_POOLED, name) for name in renamed.values()):
        # mmpretrain has no pooling in a shortcut that does not stride, and timm an identity in its place.
        stages = {name[:8] for name in renamed.values() if '.0.downsample.0.' in name}
        renamed = {theirs: _after_pooling(name) if name[:8] in stages else name for theirs, name in renamed.items()}
    return renamed


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
        args |= dict(cardinality=groups, base_width=_base_width([width[0] // groups for width in widths], channels))
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


def _base_width(widths: Sequence[int], channels: Sequence[int]) -> float:
    """What gives groups of these widths to units of so many planes, as timm multiplies and rounds down."""
    base = max(64 * width / planes for width, planes in zip(widths, channels))
    while any(math.floor(planes * (base / 64)) < width for width, planes in zip(widths, channels)):
        base = math.nextafter(base, math.inf)
    return base


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
        if _HEAD[0] in given or (hasattr(source, 'global_pool') and not unused):
            _require_same_pooling(model, source, where)
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
_CONV = ('stride', 'padding', 'dilation', 'groups', 'padding_mode')
_POOLS = {
    nn.MaxPool2d: ('kernel_size', 'stride', 'padding', 'dilation', 'ceil_mode'),
    nn.AvgPool2d: ('kernel_size', 'stride', 'padding', 'ceil_mode', 'count_include_pad', 'divisor_override'),
}
_LAYERS = {'Conv2d', 'BatchNorm2d', 'SyncBatchNorm', 'FrozenBatchNorm2d', 'ReLU', 'Sigmoid', 'Identity', 'MaxPool2d'}
_LAYERS |= {'AdaptiveAvgPool2d', 'AvgPool2d', 'AvgPool2dSame', 'DropPath', 'Dropout', 'StochasticDepth', 'Sequential'}
_BODY = ('conv1', 'bn1', 'act1', 'relu', 'stem', 'layer', 'maxpool')


def _require_same(model: SKResNet, source: nn.Module, where: str) -> None:
    """Raise where a ResNet computes otherwise than a network of ours with its weights would."""
    own, renamed = dict(model.named_modules()), _rename(source.state_dict())
    named = {theirs: _timms_name(theirs + '.').removesuffix('.') for theirs, _ in source.named_modules()}
    body = [(theirs, name, source.get_submodule(theirs)) for theirs, name in named.items() if name.startswith(_BODY)]
    for theirs, _, module in body:
        if not list(module.children()) and type(module).__name__ not in _LAYERS:
            raise CheckpointError(f'{where}: {theirs} is a {type(module).__name__}, which a plain ResNet does not have')
    for theirs, name, module in body:
        if f'{theirs}.weight' in renamed:
            place = _our_names(renamed[f'{theirs}.weight'], model)[0].removesuffix('.weight')
            ours = own[place]
            attributes = _CONV if isinstance(module, nn.Conv2d) else ('eps',)
        else:
            place, ours = name, own.get(name)
            base = next((base for base in _POOLS if isinstance(module, base) or isinstance(ours, base)), None)
            if base is not None and type(ours) is not type(module):
                kinds = [type(layer).__name__ for layer in (module, ours)]
                raise CheckpointError(f'{where}: {theirs} is a {kinds[0]}, and this network has a {kinds[1]} there')
            attributes = _POOLS.get(base, ())
        wanted = {attribute: getattr(ours, attribute, None) for attribute in attributes}
        sk, _, branch = place.partition('.paths.')
        if branch and 'dilation' in wanted:  # of the 3x3 that the branches are made of
            wanted |= dict.fromkeys(('padding', 'dilation'), own[sk].dilation)
        for attribute, right in wanted.items():
            given = getattr(module, attribute, None)
            if _pair(given) != _pair(right):
                raise CheckpointError(
                    f'{where}: {theirs} has {attribute}={given}, and this network has {_pair(right)} there'
                )


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


def _require_same_pooling(model: SKResNet, source: nn.Module, where: str) -> None:
    theirs, ours = _pooling(source), _pooling(model)
    if theirs and theirs != ours:
        raise CheckpointError(
            f"{where}: a global pooling of {theirs!r} makes its features, and of {ours!r} this network's: "
            f'global_pool={theirs!r} makes them equal'
        )


def _pooling(network: nn.Module) -> str:
    """timm's name of the pooling before the classifier, or its class; nothing where no module does it."""
    layers = (getattr(network, name, None) for name in ('global_pool', 'avgpool', 'neck'))
    pool = next((layer for layer in layers if layer is not None), None)
    if pool is None:
        return ''
    kind = getattr(pool, 'pool_type', type(pool).__name__)
    means = ('fast', 'AdaptiveAvgPool2d', 'GlobalAveragePooling')
    return 'avg' if kind in means else kind.removeprefix('fast')
