"""Checkpoints between timm and OpenMMLab: reading either's files, renaming, and writing Hub folders.

Both worlds hold the same parameters under the same names; mmpretrain puts ``backbone.`` before the network's and
``head.`` before the classifier's (``head.fc.weight`` against timm's ``fc.weight``).
"""

import contextlib
import io
import os
import pickletools
import re
import shutil
import tempfile
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import safetensors.torch
import timm
import torch
from huggingface_hub import ModelCardData
from timm.models import clean_state_dict, save_for_hf
from torch import Tensor, nn
from torch.hub import download_url_to_file

from .. import zoo
from .._arguments import find_fault
from . import caffe, convert
from .hub import load_state_dict, shorten

__all__ = [
    'CheckpointError',
    'Inert',
    'PartialLoad',
    'is_own',
    'is_timm_format',
    'load_checkpoint',
    'load_foreign',
    'load_partial',
    'read_pickle',
    'recognise_foreign',
    'save_hub_folder',
    'save_mmengine_checkpoint',
    'save_state_dict',
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
_BACKBONE = 'backbone.'
_HEAD = 'head.fc.'


class CheckpointError(ValueError):
    """A checkpoint file that cannot be read or used; the message names the file and the cause."""


class Inert:
    """Stands in for whatever a pickle names besides tensors and containers: takes any state, runs no code of its.

    What stands for ``module.Name`` is of a class of that name.
    """

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
        path: a ``.safetensors`` file, a ``torch.save`` file, or a ``.caffemodel``.
        use_ema: the averaged weights where the checkpoint has some, else the ones last trained.

    Returns:
        The state dict under its own names, and the checkpoint's ``meta`` ({} where it has none).

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it cannot be read (a ``.caffemodel`` needs the extra ``caffe``), or holds no state dict of
            tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such checkpoint file')
    if path.suffix == '.safetensors':
        try:
            return safetensors.torch.load_file(path), {}
        except safetensors.SafetensorError as error:
            raise CheckpointError(f'{path}: not a safetensors file: {error}') from error
    if path.suffix == '.caffemodel':
        try:
            return caffe.read(path), {}
        except (ValueError, ImportError) as error:
            raise CheckpointError(str(error)) from error
    checkpoint = read_pickle(path)
    state_dict = pick_state_dict(checkpoint, use_ema) if isinstance(checkpoint, Mapping) else None
    if not is_state_dict(state_dict):
        raise CheckpointError(
            f'{path}: holds no state dict of tensors (expected a checkpoint of mmengine or timm, or a bare state dict)'
        )
    meta = checkpoint.get('meta')
    return clean_state_dict(state_dict), dict(meta) if isinstance(meta, Mapping) else {}


def load_foreign(source: str | os.PathLike | Mapping[str, Any], **options) -> nn.Module:
    """Build a network of ours from the weights of another project's, with equal outputs.

    What is supported :data:`sk_plugins.weights.convert.SUPPORTED` says; what a file was recognised as and what was done to its
    tensors, :func:`recognise_foreign`.

    Args:
        source: a file as for :func:`load_checkpoint`, a ``.caffemodel``, or a state dict, bare or under
            ``'state_dict'`` or ``'model'``.
        **options: those of :func:`sk_plugins.weights.convert.recognise`: ``prefix``, and what weights can't tell (``stride``
            and ``in_channels`` of a layer on its own, ``reduce_act``, ``dilations``).

    Returns:
        An :class:`~sk_plugins.networks.SKResNet`, or for an SK layer on its own a
        :class:`~sk_plugins.layers.SelectiveKernel`, in eval mode and in the dtype of the weights.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: a file that cannot be read, or weights that are not supported or not whole; the message names
            the file, the tensors, and what is supported.
    """
    return recognise_foreign(source, **options).build()


def recognise_foreign(
    source: str | os.PathLike | Mapping[str, Any], use_ema: bool = True, **options
) -> convert.Foreign:
    """What :func:`load_foreign` builds its network from. Arguments and errors as there, ``use_ema`` as in
    :func:`load_checkpoint`.
    """
    if isinstance(source, Mapping):
        state_dict = pick_state_dict(source, use_ema)
        if not is_state_dict(state_dict):
            raise CheckpointError("holds no state dict of tensors (expected one, bare or under 'state_dict', 'model')")
        where, state_dict = '', clean_state_dict(state_dict)
    else:
        where = f'{source}: '
        state_dict, _ = load_checkpoint(source, use_ema)
    try:
        return convert.recognise(state_dict, **options)
    except ValueError as error:
        raise CheckpointError(f'{where}{error}') from error


def is_timm_format(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether the names are timm's: the network's own, with no ``backbone.`` before them."""
    return any(name in state_dict for name in _OWN)


def is_own(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether the names are timm's or mmpretrain's of a network of this project, or of a plain ResNet."""
    return any(name in state_dict or _BACKBONE + name in state_dict for name in _OWN)


def to_timm(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From mmpretrain's names to timm's; what is neither backbone nor linear head (a detector's neck) is left out.

    Raises:
        CheckpointError: no backbone of this project under either world's names.
    """
    if is_timm_format(state_dict):
        return dict(state_dict)
    if not is_own(state_dict):
        raise CheckpointError(
            f'no {_OWN[0]!r} and no {_OWN[-1]!r}, with {_BACKBONE!r} before them or without, among its '
            f'{len(state_dict)} names ({", ".join(list(state_dict)[:3])}, ...): expected the names of timm or of '
            'mmpretrain'
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
    'SKShuffleNetV2': dict(widen_factor=1.0, unit='sk'),
}


@dataclass(frozen=True)
class PartialLoad:
    """Which tensors of a network were loaded, by name; ``str()`` of it is a report in a few lines."""

    loaded: tuple[str, ...]
    initialised: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.initialised)
        return '\n'.join(
            [
                f'loaded {len(self.loaded)} of {total} tensors',
                f'left as initialised: {_some(self.initialised)}',
                f'not used: {_some(self.unused)}',
            ]
        )


def load_partial(model: nn.Module, source: str | os.PathLike | Mapping[str, Tensor]) -> PartialLoad:
    """Load what fits by name and shape, such as torchvision's ShuffleNetV2 weights into SE and SK units.

    Args:
        model: a network of timm's door, changed in place.
        source: a state dict under either world's names, a checkpoint file, an ``https://`` address of one (read with
            ``weights_only=True``) or ``hf-hub:OWNER/NAME[@REVISION]``.

    Returns:
        What was loaded, what was left as it was, and what was not used. Counters of batches are not mentioned.

    Raises:
        FileNotFoundError, CheckpointError, HubError: the source cannot be had or read, or nothing in it fits.
    """
    if isinstance(source, Mapping):
        state_dict = pick_state_dict(source, use_ema=True)
        if not is_state_dict(state_dict):
            raise CheckpointError("holds no state dict of tensors (expected one, bare or under 'state_dict', 'model')")
        state_dict = clean_state_dict(state_dict)
    elif str(source).startswith('hf-hub:'):
        state_dict = load_state_dict(str(source).removeprefix('hf-hub:'))
    elif str(source).startswith(('https://', 'http://')):
        state_dict = _download(str(source))
    else:
        state_dict, _ = load_checkpoint(source)
    if any(name.startswith(_BACKBONE) for name in state_dict):
        state_dict = to_timm(state_dict)
    wanted = model.state_dict()
    fitting = {k: v for k, v in state_dict.items() if k in wanted and v.shape == wanted[k].shape}
    where = 'state dict' if isinstance(source, Mapping) else source
    if not fitting:
        raise CheckpointError(f'{where}: none of its {len(state_dict)} tensors fits {type(model).__name__}')
    for name, tensor in fitting.items():  # or what comes before it would be loaded already
        if fault := find_fault(tensor, wanted[name]):
            raise CheckpointError(f'{where}: {name} is {fault}')
    model.load_state_dict(fitting, strict=False)

    def named(names) -> tuple[str, ...]:
        return tuple(name for name in names if not name.endswith('num_batches_tracked'))

    return PartialLoad(
        loaded=named(fitting),
        initialised=named(k for k in wanted if k not in fitting),
        unused=named(k for k in state_dict if k not in fitting),
    )


def _download(url: str) -> dict[str, Tensor]:
    # Past torch's cache, which keeps half a file of a broken connection and tells files apart by their last name alone.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, Path(urlsplit(url).path).name or 'weights')
        try:
            download_url_to_file(url, str(path), progress=False)
            return load_checkpoint(path)[0]
        except (OSError, HTTPException) as error:
            raise CheckpointError(f'{url}: cannot be loaded: {shorten(error)}') from error
        except CheckpointError as error:
            raise CheckpointError(f'{url}: cannot be loaded: {str(error).removeprefix(f"{path}: ")}') from error


def _some(names: Sequence[str], most: int = 6) -> str:
    if not names:
        return 'none'
    more = f', ... and {len(names) - most} more' if len(names) > most else ''
    return f'{len(names)} tensors ({", ".join(sorted(names)[:most])}{more})'


def save_state_dict(state_dict: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Write a bare state dict, as safetensors or, by any other ending, with ``torch.save``.

    Raises:
        FileExistsError: ``path`` is a folder.
        CheckpointError: a tensor is sparse, quantised or without data.
        OSError: it cannot be written, as on a full disk; what was there before is there still.
    """
    path = Path(path)
    _require_data(state_dict)
    tensors = {k: v.contiguous() for k, v in state_dict.items()}
    with _whole_file(path) as temporary:
        if path.suffix == '.safetensors':
            safetensors.torch.save_file(tensors, temporary, metadata={'format': 'pt'})
        else:
            _torch_save(tensors, temporary)


def _require_data(state_dict: Mapping[str, Tensor]) -> None:
    for name, tensor in state_dict.items():
        if fault := find_fault(tensor, tensor):
            raise CheckpointError(f'{name} is {fault}')


def save_mmengine_checkpoint(
    state_dict: Mapping[str, Tensor], path: str | os.PathLike, meta: Mapping[str, Any] | None = None
) -> None:
    """Write weights of either world as a checkpoint for mmengine: ``load_from``, ``tools/test.py``, ``get_model``.

    Raises:
        FileExistsError: ``path`` is a folder.
        OSError: it cannot be written, as on a full disk; what was there before is there still.
        CheckpointError: no backbone of this project under either world's names.
    """
    _require_data(state_dict)
    with _whole_file(Path(path)) as temporary:
        _torch_save(dict(meta=dict(meta or {}), state_dict=to_mmpretrain(state_dict)), temporary)


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
        OSError: it cannot be written; there is no ``folder`` then.
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


def read_pickle(
    path: str | os.PathLike, map_location: Any = 'cpu', allowed: Sequence[Any | tuple[Any, str]] = ()
) -> Any:
    """What a file of ``torch.save`` holds, read with ``weights_only=True``: nothing in it is run.

    Args:
        path: the file.
        map_location: as in ``torch.load``.
        allowed: classes and functions besides torch's own that are what they are, as in
            ``torch.serialization.safe_globals``; whatever else the file names becomes an :class:`Inert` object.

    Raises:
        CheckpointError: it cannot be read; the message names the file and the cause.
    """
    with torch.serialization.safe_globals(list(allowed)):
        try:
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except ValueError:  # torch's format before 1.6, whose names it cannot list
            safe = torch.serialization.get_safe_globals()
            known = {one[1] if isinstance(one, tuple) else f'{one.__module__}.{one.__name__}' for one in safe}
            unknown = sorted(_names_before_1_6(path) - known)
        except Exception as error:  # damaged pickles raise nearly anything: KeyError, UnicodeDecodeError, struct.error
            reason = str(error).partition('. ')[0] or type(error).__name__
            raise CheckpointError(f'{path}: not a file of torch.save, or a damaged one: {reason}') from error
        if damaged := _find_damage(path):
            raise CheckpointError(f'{path}: damaged: the checksum of {damaged} in it is wrong')
        try:
            with torch.serialization.safe_globals([(type(name, (Inert,), {}), name) for name in unknown]):
                return torch.load(path, map_location=map_location, weights_only=True)
        except Exception as error:
            # Without torch's advice to load it in the unsafe way, or to allow what it asks for.
            if asked := re.search(r'GLOBAL ([\w.]+)', str(error)):
                raise CheckpointError(f'{path}: refused: it asks for {asked[1]}, which could run code') from error
            said, _, detail = str(error).strip().partition('WeightsUnpickler error:')
            reason = (detail or said.partition('. ')[0]).strip().partition('\n')[0]
            if len(reason) < 6:  # the number of a byte, or nothing
                reason = f'not a file of torch.save, or a damaged one ({type(error).__name__})'
            raise CheckpointError(f'{path}: cannot be read as weights: {reason}') from error


def _names_before_1_6(path: str | os.PathLike) -> set[str]:
    """What a file of torch's format before 1.6 names, torch's own included, none where it is no such file."""
    names: set[str] = set()
    with open(path, 'rb') as file, contextlib.suppress(Exception):  # damaged pickles raise nearly anything
        for _ in range(4):  # a magic number, the format's, the system's sizes, and what was saved
            for code, name, _ in pickletools.genops(file):
                if code.name == 'GLOBAL':
                    module, _, name = name.partition(' ')
                    # Pickles of this protocol have Python 2's names.
                    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
                    names.add(f'{module}.{name}')
    return names


def _find_damage(path: str | os.PathLike) -> str | None:
    """The first part of a file of ``torch.save`` with another checksum than it was written with.

    ``torch.load`` does not look. A part without a checksum, as torch can be told to write, has a zero there; its
    format before 1.6 has none at all.
    """
    name = 'the list of its parts'
    try:
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as file:
            for part in file.infolist():
                name = part.filename
                with file.open(part) as content:
                    while part.CRC and content.read(2**20):
                        pass
    except Exception:  # not only BadZipFile: what a damaged header asks for may not be there
        return name
    return None


def is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def pick_state_dict(checkpoint: Mapping[str, Any], use_ema: bool) -> Mapping[str, Tensor] | None:
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


def _torch_save(content: Any, path: Path) -> None:
    with io.BytesIO() as file:  # of a full disk torch says no more than that a position is unexpected
        torch.save(content, file)
        path.write_bytes(file.getvalue())


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
        try:
            yield parent / path.name
        except (OSError, safetensors.SafetensorError) as error:
            reason = getattr(error, 'strerror', None) or shorten(error)
            raise OSError(f'{path}: cannot be written: {reason}') from error
        # safetensors lets nobody else read what it writes.
        umask = os.umask(0)
        os.umask(umask)
        for written in (parent / path.name, *(parent / path.name).rglob('*')):
            if written.is_file():
                written.chmod(0o666 & ~umask)
        if path.is_dir():
            path.rmdir()
        os.replace(parent / path.name, path)
    finally:
        shutil.rmtree(parent, ignore_errors=True)
