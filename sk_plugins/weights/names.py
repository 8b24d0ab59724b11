"""The names of weights: timm's and OpenMMLab's.

Both worlds hold the same parameters under the same names; mmpretrain puts ``backbone.`` before the network's and
``head.`` before the classifier's (``head.fc.weight`` against timm's ``fc.weight``).
"""

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .. import zoo
from .files import CheckpointError, require_weights, torch_save

__all__ = [
    'BACKBONE',
    'is_own',
    'is_timm_format',
    'save_mmengine_checkpoint',
    'timm_arguments',
    'to_mmpretrain',
    'to_timm',
]

# One of them is in every network of the project: SK bottlenecks, plain units, SK basic units, ShuffleNetV2's units.
_OWN = (
    'layer1.0.conv2.paths.0.conv.weight',
    'layer1.0.conv2.weight',
    'layer1.0.conv1.paths.0.conv.weight',
    'stage2.0.branch1.0.weight',
)
BACKBONE = 'backbone.'
_HEAD = 'head.fc.'


def is_timm_format(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether the names are timm's: the network's own, with no ``backbone.`` before them."""
    return any(name in state_dict for name in _OWN)


def is_own(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether the names are timm's or mmpretrain's of a network of this project, or of a plain ResNet."""
    return any(name in state_dict or BACKBONE + name in state_dict for name in _OWN)


def to_timm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From mmpretrain's names to timm's; what is neither backbone nor linear head (a detector's neck) is left out.

    Raises:
        CheckpointError: no backbone of this project under either world's names.
    """
    if is_timm_format(state_dict):
        return dict(state_dict)
    if not is_own(state_dict):
        raise CheckpointError(
            f'no {_OWN[0]!r} and no {_OWN[-1]!r}, with {BACKBONE!r} before them or without, among its '
            f'{len(state_dict)} names ({", ".join(list(state_dict)[:3])}, ...): expected the names of timm or of '
            'mmpretrain'
        )
    renamed = {k.removeprefix(BACKBONE): v for k, v in state_dict.items() if k.startswith(BACKBONE)}
    renamed.update({f'fc.{k.removeprefix(_HEAD)}': v for k, v in state_dict.items() if k.startswith(_HEAD)})
    return renamed


def to_mmpretrain(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From timm's names to those of mmpretrain's ``ImageClassifier`` with a ``LinearClsHead``.

    Raises:
        CheckpointError: no backbone of this project under either world's names.
    """
    timm_names = to_timm(state_dict)
    return {(f'head.{k}' if k.startswith('fc.') else BACKBONE + k): v for k, v in timm_names.items()}


def timm_arguments(config: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """What an mmpretrain config says, in timm's terms.

    Args:
        config: an mmengine ``Config`` of an ``ImageClassifier`` or detector whose backbone is one of this project's.

    Returns:
        The registered model name, the arguments for ``timm.create_model``, and the preprocessing (``input_size``,
        ``mean``, ``std``, ``interpolation``, ``crop_pct``) as far as the config gives it.

    Raises:
        ValueError: the config's model has no backbone of this project.
    """
    model = config['model']
    backbone = {**model['backbone']}
    kind = str(backbone.pop('type', None)).removeprefix('mmpretrain.')
    name, args = _timm_name(kind, backbone)
    norm_cfg = dict(args.pop('norm_cfg', None) or {})
    if norm_cfg.pop('type', 'BN') not in ('BN', 'SyncBN') or norm_cfg.keys() - {'requires_grad', 'momentum'}:
        raise ValueError(
            f'model.backbone.norm_cfg={dict(model["backbone"]["norm_cfg"])} is not plain BatchNorm, for which alone '
            f'there are timm arguments; convert to a state dict instead'
        )
    for own in ('out_indices', 'frozen_stages', 'norm_eval', 'with_cp', 'channels_last', 'init_cfg'):
        args.pop(own, None)
    args = {'in_chans': args.pop('in_channels', 3), **_plain(args)}
    if zoo.MODELS[name].in_timm and (
        args.pop('split_input', True) is not True or args.keys() & {'sk_kwargs', 'small_stem', 'unit', 'block'}
    ):
        raise ValueError(f'model.backbone={dict(model["backbone"])} is not what timm calls {name}')
    args['num_classes'] = (model.get('head') or {}).get('num_classes', 0)
    return name, args, _preprocessing(config, args['in_chans'])


def _timm_name(kind: str, backbone: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The registered name nearest to a backbone of the project's, and the arguments that are left to give it."""
    rows = {}
    for spec in zoo.MODELS.values():
        openmmlab_type, args = spec.openmmlab
        given = {**_DEFAULTS.get(kind, {}), **backbone}
        if openmmlab_type == kind and all(given.get(k) == v for k, v in args.items()):
            rows[spec.name] = {k: v for k, v in backbone.items() if k not in args}
    if rows:
        return min(rows.items(), key=lambda row: len(row[1]))
    if kind == 'SKResNeXt' and backbone.get('depth') in zoo.LAYERS:
        names = {'groups': 'cardinality', 'width_per_group': 'base_width'}
        args = {names.get(k, k): v for k, v in backbone.items() if k != 'depth'}
        return 'sknet50', {'layers': zoo.LAYERS[backbone['depth']], **args}
    raise ValueError(f'model.backbone={dict(backbone)} of type {kind!r} is not a network of this project')


_DEFAULTS = {
    'SKResNeXt': dict(groups=32, width_per_group=4),
    'SKResNetSimCLR': dict(width_factor=1),
    'SKShuffleNetV2': dict(widen_factor=1.0, unit='sk'),
}


def _preprocessing(config: Mapping[str, Any], in_chans: int) -> dict[str, Any]:
    data = config['model'].get('data_preprocessor') or config.get('data_preprocessor') or {}
    settings: dict[str, Any] = {}
    for name in ('mean', 'std'):
        if data.get(name):
            values = [value / 255 for value in data[name]]
            settings[name] = tuple(values * in_chans if len(values) == 1 else values)
    transforms = {t['type']: t for t in (config.get('test_dataloader') or {}).get('dataset', {}).get('pipeline', ())}
    resize = transforms.get('ResizeEdge') or transforms.get('Resize') or {}
    crop = transforms.get('CenterCrop', {}).get('crop_size', resize.get('scale'))
    if isinstance(crop, int):
        settings['input_size'] = (in_chans, crop, crop)
        settings['crop_pct'] = crop / resize['scale'] if isinstance(resize.get('scale'), int) else 1.0
    if own := transforms.get('SimCLRCrop'):
        size = own.get('size', 224)
        resize = {'interpolation': 'bicubic'}
        settings.update(input_size=(in_chans, size, size), crop_pct=own.get('crop', 0.875))
    if 'interpolation' in resize:
        settings['interpolation'] = resize['interpolation']
    return settings


def _plain(value: Any) -> Any:
    """mmengine's ConfigDict and the like as what JSON can hold."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def save_mmengine_checkpoint(
    state_dict: Mapping[str, Tensor], path: str | os.PathLike, meta: Mapping[str, Any] | None = None
) -> None:
    """Write weights of either world as a checkpoint for mmengine: ``load_from``, ``tools/test.py``, ``get_model``.

    Raises:
        FileExistsError: ``path`` is a folder.
        OSError: it cannot be written, as on a full disk; what was there before is there still.
        CheckpointError: no backbone of this project under either world's names.
    """
    require_weights(state_dict)
    torch_save(dict(meta=dict(meta or {}), state_dict=to_mmpretrain(state_dict)), path)
