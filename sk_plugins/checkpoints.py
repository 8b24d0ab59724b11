"""Checkpoints between timm and OpenMMLab: reading either's files, renaming, and writing Hub folders.

Both worlds hold the same parameters under the same names; mmpretrain puts ``backbone.`` before the network's and
``head.`` before the classifier's (``head.fc.weight`` against timm's ``fc.weight``).
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from huggingface_hub import ModelCardData
from timm.models import clean_state_dict, save_for_hf
from torch import Tensor

from . import zoo
from .hub import shorten

__all__ = [
    'CheckpointError',
    'is_timm_format',
    'load_checkpoint',
    'save_hub_folder',
    'save_mmengine_checkpoint',
    'save_state_dict',
    'timm_arguments',
    'to_mmpretrain',
    'to_timm',
]

# Every network of the project has it, and no plain ResNet.
_OWN = 'layer1.0.conv2.paths.0.conv.weight'
_BACKBONE = 'backbone.'
_HEAD = 'head.fc.'


class CheckpointError(ValueError):
    """A checkpoint file that cannot be read or used; the message names the file and the cause."""


class _Inert:
    """Stands in for whatever a pickle names besides tensors and containers: takes any state, runs no code of its."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs) -> None:
        pass

    def __setstate__(self, state) -> None:
        pass


def load_checkpoint(path: str | os.PathLike, use_ema: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the weights and the ``meta`` of a checkpoint of mmengine's, timm's or a bare state dict.

    Pickles are read with ``weights_only=True``; what else they hold (mmengine's logs, optimizer state) stays
    unread, and nothing in them is run.

    Args:
        path: a ``.safetensors`` file, or a ``torch.save`` file.
        use_ema: the averaged weights where the checkpoint has some, else the ones last trained.

    Returns:
        The state dict under its own names, and the checkpoint's ``meta`` ({} where it has none).

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it cannot be read, or holds no state dict of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such checkpoint file')
    if path.suffix == '.safetensors':
        try:
            return safetensors.torch.load_file(path), {}
        except safetensors.SafetensorError as error:
            raise CheckpointError(f'{path}: not a safetensors file: {error}') from error
    checkpoint = _load_pickle(path)
    state_dict = _pick_state_dict(checkpoint, use_ema) if isinstance(checkpoint, Mapping) else None
    if not _is_state_dict(state_dict):
        raise CheckpointError(
            f'{path}: holds no state dict of tensors (expected a checkpoint of mmengine or timm, or a bare state dict)'
        )
    meta = checkpoint.get('meta')
    return clean_state_dict(state_dict), dict(meta) if isinstance(meta, Mapping) else {}


def is_timm_format(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether the names are timm's: the network's own, with no ``backbone.`` before them."""
    return _OWN in state_dict


def to_timm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From mmpretrain's names to timm's; what is neither backbone nor linear head (a detector's neck) is left out.

    Raises:
        CheckpointError: no backbone of this project under either world's names.
    """
    if is_timm_format(state_dict):
        return dict(state_dict)
    if _BACKBONE + _OWN not in state_dict:
        raise CheckpointError(
            f'no {_OWN!r} and no {_BACKBONE + _OWN!r} among its {len(state_dict)} names '
            f'({", ".join(list(state_dict)[:3])}, ...): expected the names of timm or of mmpretrain'
        )
    renamed = {k.removeprefix(_BACKBONE): v for k, v in state_dict.items() if k.startswith(_BACKBONE)}
    renamed.update({f'fc.{k.removeprefix(_HEAD)}': v for k, v in state_dict.items() if k.startswith(_HEAD)})
    return renamed


def to_mmpretrain(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From timm's names to those of mmpretrain's ``ImageClassifier`` with a ``LinearClsHead``.

    Raises:
        CheckpointError: no backbone of this project under either world's names.
    """
    timm_names = to_timm(state_dict)
    return {(f'head.{k}' if k.startswith('fc.') else _BACKBONE + k): v for k, v in timm_names.items()}


def timm_arguments(config: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """What an mmpretrain config says, in timm's terms.

    Args:
        config: an mmengine ``Config`` of an ``ImageClassifier`` or detector whose backbone is ``SKNet``.

    Returns:
        The registered model name, the arguments for ``timm.create_model``, and the preprocessing (``input_size``,
        ``mean``, ``std``, ``interpolation``, ``crop_pct``) as far as the config gives it.

    Raises:
        ValueError: the config's model has no backbone of this project.
    """
    model = config['model']
    backbone = {**model['backbone']}
    depth = backbone.pop('depth', None)
    names = {spec.depth: spec.name for spec in zoo.MODELS.values()}
    kind = str(backbone.pop('type', None)).removeprefix('mmpretrain.')
    if kind != 'SKNet' or depth not in names:
        raise ValueError(f'model.backbone of type {kind!r} and depth {depth!r} is not a network of this project')
    norm_cfg = dict(backbone.pop('norm_cfg', None) or {})
    if norm_cfg.pop('type', 'BN') not in ('BN', 'SyncBN') or norm_cfg.keys() - {'requires_grad', 'momentum'}:
        raise ValueError(
            f'model.backbone.norm_cfg={dict(model["backbone"]["norm_cfg"])} is not plain BatchNorm, for which alone '
            f'there are timm arguments; convert to a state dict instead'
        )
    for own in ('out_indices', 'frozen_stages', 'norm_eval', 'with_cp', 'channels_last', 'init_cfg'):
        backbone.pop(own, None)
    args = {'in_chans': backbone.pop('in_channels', 3), **_plain(backbone)}
    args['num_classes'] = (model.get('head') or {}).get('num_classes', 0)
    return names[depth], args, _preprocessing(config, args['in_chans'])


def save_state_dict(state_dict: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Write a bare state dict, as safetensors or, by any other ending, with ``torch.save``.

    Raises:
        FileExistsError: ``path`` is a folder.
    """
    path = Path(path)
    tensors = {k: v.contiguous() for k, v in state_dict.items()}
    with _whole_file(path) as temporary:
        if path.suffix == '.safetensors':
            safetensors.torch.save_file(tensors, temporary, metadata={'format': 'pt'})
        else:
            torch.save(tensors, temporary)


def save_mmengine_checkpoint(
    state_dict: Mapping[str, Tensor], path: str | os.PathLike, meta: Mapping[str, Any] | None = None
) -> None:
    """Write weights of either world as a checkpoint for mmengine: ``load_from``, ``tools/test.py``, ``get_model``.

    Raises:
        FileExistsError: ``path`` is a folder.
        CheckpointError: no backbone of this project under either world's names.
    """
    with _whole_file(Path(path)) as temporary:
        torch.save(dict(meta=dict(meta or {}), state_dict=to_mmpretrain(state_dict)), temporary)


def save_hub_folder(
    state_dict: Mapping[str, Tensor],
    folder: str | os.PathLike,
    architecture: str,
    model_args: Mapping[str, Any] | None = None,
    data_config: Mapping[str, Any] | None = None,
    label_names: list[str] | None = None,
    description: str | None = None,
) -> None:
    """Write a folder for the Hub: ``config.json``, ``model.safetensors`` and a model card.

    ``timm.create_model('local-dir:FOLDER', pretrained=True)`` loads it, as does ``hf-hub:`` once it is uploaded
    (``hf upload OWNER/NAME FOLDER``).

    Args:
        state_dict: weights under either world's names.
        folder: must not exist yet, or be empty.
        architecture: registered timm model name.
        model_args: arguments of ``timm.create_model`` that make the network these weights belong to.
        data_config: preprocessing: ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``.
        label_names: the classes, in the classifier's order.
        description: a line for the model card.

    Raises:
        FileExistsError: ``folder`` holds files already.
        CheckpointError: the weights do not fit the network.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f'{folder}: exists and is not empty; name a new folder')
    model = timm.create_model(architecture, **(model_args or {}))
    try:
        model.load_state_dict(to_timm(state_dict), strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f'the weights do not fit {architecture} with {dict(model_args or {})}: {shorten(error)}'
        ) from error
    # What the registered cfg says of the published weights is not said of these.
    own = dict(tag=None, notes=None, license=None, origin_url=None, pool_size=None, description=description)
    model.pretrained_cfg = {**model.pretrained_cfg, **(data_config or {}), **own}
    with _whole(folder) as temporary:
        save_for_hf(
            model,
            temporary,
            model_config=dict(label_names=label_names) if label_names else None,
            model_args=dict(model_args or {}),
            safe_serialization=True,
        )
        (temporary / 'README.md').write_text(_model_card(architecture, folder.name, description), encoding='utf-8')


def _load_pickle(path: Path) -> Any:
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except ValueError:  # torch's format before 1.6, whose names it cannot list: only plain state dicts load
        unknown = []
    except Exception as error:  # damaged pickles raise nearly anything: KeyError, UnicodeDecodeError, struct.error, ...
        raise CheckpointError(f'{path}: not a file of torch.save, or a damaged one: {error}') from error
    try:
        with torch.serialization.safe_globals([(_Inert, name) for name in unknown]):
            return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f'{path}: cannot be read as weights: {reason}') from error


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _pick_state_dict(checkpoint: Mapping[str, Any], use_ema: bool) -> Mapping[str, Tensor] | None:
    state_dict = checkpoint.get('state_dict', checkpoint.get('model', checkpoint))
    if use_ema and isinstance(checkpoint.get('state_dict_ema'), Mapping):  # timm's
        return checkpoint['state_dict_ema']
    averaged = checkpoint.get('ema_state_dict')
    if not use_ema and isinstance(averaged, Mapping) and isinstance(state_dict, Mapping):
        # mmengine's EMAHook saves the averaged weights as 'state_dict' and the trained ones here.
        return {**state_dict, **{k.removeprefix('module.'): v for k, v in averaged.items() if k.startswith('module.')}}
    return state_dict


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


def _model_card(architecture: str, name: str, description: str | None) -> str:
    data = ModelCardData(
        library_name='timm', pipeline_tag='image-classification', tags=['image-classification', 'timm', 'sk-plugins']
    )
    description = description or f'A Selective Kernel network ({architecture}).'
    return (
        f'---\n{data.to_yaml()}\n---\n\n# {name}\n\n{description}\n\n'
        f'```python\nimport sk_plugins  # pip install sk-plugins\nimport timm\n\n'
        f"model = timm.create_model('hf-hub:OWNER/{name}', pretrained=True)\n```\n\n"
        f'Architecture: [Selective Kernel Networks](https://arxiv.org/abs/1903.06586).\n'
    )


def _whole_file(path: Path) -> contextlib.AbstractContextManager[Path]:
    if path.is_dir():
        raise FileExistsError(f'{path}: is a folder; name a file')
    return _whole(path)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write a file or fill a folder under; it becomes ``path`` only if all goes well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parent = Path(tempfile.mkdtemp(prefix=f'.{path.name}.', dir=path.parent))
    try:
        yield parent / path.name
        if path.is_dir():
            path.rmdir()
        os.replace(parent / path.name, path)
    finally:
        shutil.rmtree(parent, ignore_errors=True)
