"""Checkpoints as mmengine loads them: nothing that a file holds is run, and weights that do not fit are an error.

The loaders take the place of those that mmengine's ``CheckpointLoader`` has under the same schemes, which read a pickle
with all that it says where torch would not: for ``load_from``, ``init_cfg`` and resuming, from files and addresses.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import barrier, get_dist_info
from mmengine.fileio import get_file_backend
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import CheckpointLoader, Runner, load_state_dict
from mmengine.runner.checkpoint import (
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)

from ..._text import several
from ...weights.files import CheckpointError, Inert, load_checkpoint, pick_state_dict, read_pickle
from ...weights.fit import load_strictly
from ...weights.hub import download_url
from ...weights.names import is_timm_format, to_mmpretrain
from .._internals import History, get_start

__all__ = ['CheckpointFitHook']

# What mmengine's own checkpoints hold besides tensors: the history of the logs, in numpy's arrays and numbers. numpy
# gave its module another name at 2.0, and a file may be of either side.
_reconstruct, _scalar = (np.array(0).__reduce__()[0], np.float64(0).__reduce__()[0])
_MMENGINES = (
    (History, History.NAME),
    (np.ndarray, 'numpy.ndarray'),
    (np.dtype, 'numpy.dtype'),
    *((type(np.dtype(code)), f'numpy.dtypes.{type(np.dtype(code)).__name__}') for code in '?bhilqBHILQefdFDSU'),
    *((_reconstruct, f'numpy.{core}.multiarray._reconstruct') for core in ('core', '_core')),
    *((_scalar, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')),
)


def read_checkpoint(path: Path, map_location: Any = None, source: str | None = None) -> dict[str, Any]:
    """A checkpoint as mmengine's runner takes it, training state and all; nothing in the file is run.

    Args:
        path: a file of mmengine's, timm's, a plain state dict, or one of safetensors.
        map_location: as in ``torch.load``.
        source: how the file is called in errors of the network that its weights go into; ``path`` where None.

    Returns:
        A dict with at least ``state_dict`` and ``meta``.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it cannot be read, or holds no state dict of tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such checkpoint file')
    if path.suffix in ('.safetensors', '.caffemodel'):
        state_dict, checkpoint = load_checkpoint(path)[0], {}
    else:
        checkpoint = read_pickle(path, map_location, _MMENGINES)
        state_dict = pick_state_dict(checkpoint, where=f'{path}: ')
        checkpoint = {} if checkpoint is state_dict else dict(checkpoint)
        if isinstance(checkpoint.get('message_hub'), Mapping):
            checkpoint['message_hub'] = _with_histories(checkpoint['message_hub'], path)
    meta = checkpoint.get('meta')
    checkpoint['meta'] = dict(meta) if isinstance(meta, Mapping) else {}
    checkpoint['meta'].pop('config', None)  # a config of mmcv's days, which mmengine would run in resuming
    metadata = OrderedDict(getattr(state_dict, '_metadata', {}))
    for name in ('', 'backbone'):  # by which a backbone of this project can name the file in an error
        metadata[name] = {**metadata.get(name, {}), 'source': str(path) if source is None else source}
    checkpoint['state_dict'] = OrderedDict(state_dict)
    checkpoint['state_dict']._metadata = metadata
    return checkpoint


def _with_histories(hub: Mapping[str, Any], path: Path) -> dict[str, Any]:
    try:
        logs = {k: v.build() if isinstance(v, History) else v for k, v in hub.get('log_scalars', {}).items()}
    except (AttributeError, LookupError, TypeError, AssertionError) as error:
        raise CheckpointError(f'{path}: holds a damaged history of logs: {error!r}') from error
    return {**hub, 'log_scalars': OrderedDict(logs)}


def load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    """A file. Errors as in :func:`read_checkpoint`."""
    return read_checkpoint(Path(filename).expanduser(), map_location, filename)


def load_from_http(filename: str, map_location: Any = None) -> dict[str, Any]:
    """A file at an address, downloaded once a machine.

    Raises:
        CheckpointError: it cannot be had or read, or is not what its name's hash says; it is not kept then.
    """

    def read(path: Path) -> dict[str, Any]:
        return read_checkpoint(path, map_location, filename)

    first = get_dist_info()[0] == 0
    checkpoint = download_url(filename, read) if first else None
    barrier()
    return checkpoint if first else download_url(filename, read)


def _named(models: Callable[[], Mapping[str, str]], part: str = '') -> Callable[..., dict[str, Any]]:
    """Loads by a name in one of mmengine's tables; of the tensors those whose names begin with ``part``, without it."""

    def load(filename: str, map_location: Any = None) -> dict[str, Any]:
        scheme, _, name = filename.partition('://')
        addresses = models()
        name = get_deprecated_model_names().get(name, name) if models is get_external_models else name
        if name not in addresses:
            raise CheckpointError(f'{filename}: mmengine knows no {scheme} weights of this name')
        checkpoint = CheckpointLoader.load_checkpoint(addresses[name], map_location)
        weights = checkpoint['state_dict']
        if part:
            weights = OrderedDict({k.removeprefix(part): v for k, v in weights.items() if k.startswith(part)})
        return {**checkpoint, 'state_dict': weights}

    return load


def load_from_s3(filename: str, map_location: Any = None) -> dict[str, Any]:
    """A file of an object store, through mmengine's backend. Errors as in :func:`read_checkpoint`."""
    backend = get_file_backend(filename, backend_args=dict(backend='petrel'))
    with backend.get_local_path(filename) as path:
        return read_checkpoint(Path(path), map_location, filename)


def load_from_pavi(filename: str, map_location: Any = None) -> dict[str, Any]:
    raise CheckpointError(f'{filename}: pavi:// is not supported: download the file and name it')


for _prefixes, _loader in {
    ('',): load_from_local,
    ('http://', 'https://'): load_from_http,
    ('modelzoo://', 'torchvision://'): _named(get_torchvision_models),
    ('open-mmlab://', 'openmmlab://'): _named(get_external_models),
    ('mmcls://',): _named(get_mmcls_models, 'backbone.'),
    (r'(\S+\:)?s3://', r'(\S+\:)?petrel://'): load_from_s3,
    ('pavi://',): load_from_pavi,
}.items():
    CheckpointLoader.register_scheme(prefixes=list(_prefixes), loader=_loader, force=True)


@HOOKS.register_module()
class CheckpointFitHook(Hook):
    """Whatever the runner loads or resumes must fit the model as a whole, where mmengine would warn and go on.

    Args:
        leave_out: beginnings of names of tensors that are not taken from ``load_from`` and stay as initialised, such
            as ``('head.',)`` for weights with another number of classes. In resuming, nothing is left out.

    Raises:
        CheckpointError: before training, weights that do not fit; a ``leave_out`` that names nothing; in resuming, a
            checkpoint without training state, or with objects of classes that are not read from a pickle.
    """

    priority = 'VERY_HIGH'  # before EMAHook, which loads them too

    def __init__(self, leave_out: Sequence[str] = ()) -> None:
        self.leave_out = (leave_out,) if isinstance(leave_out, str) else tuple(leave_out)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        state_dict = checkpoint.get('state_dict', checkpoint)
        metadata = getattr(state_dict, '_metadata', OrderedDict())
        source = metadata.get('', {}).get('source', 'the checkpoint')
        resume, _ = get_start(runner)
        if resume:
            _require_training_state(checkpoint, source)
        elif self.leave_out:
            state_dict = self._without(state_dict, runner.model.state_dict(), source)
            state_dict._metadata = metadata
            checkpoint['state_dict'] = state_dict
        # As the runner will once more, and with as little of a reason: it strips this prefix.
        weights = OrderedDict({re.sub(r'^module\.', '', name): tensor for name, tensor in state_dict.items()})
        weights._metadata = metadata
        hint = '' if resume else '; leave_out (of tools/train.py, --leave-out) names what is to stay new'
        load_strictly(runner.model, weights, source, hint=hint, load=load_state_dict)
        if not resume:
            new = [name for name in runner.model.state_dict() if self.leave_out and name.startswith(self.leave_out)]
            loaded = f'{len(runner.model.state_dict()) - len(new)} of {len(runner.model.state_dict())} tensors'
            left = f'; left as initialised: {several(new)}' if new else ''
            runner.logger.info(f'{source}: loaded {loaded}{left}')

    def _without(
        self, state_dict: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], source: str
    ) -> OrderedDict[str, torch.Tensor]:
        """The state dict with the model's own tensors in place of those that are left out."""
        own = {name.removeprefix('module.'): tensor for name, tensor in own.items()}
        if is_timm_format(state_dict) and not is_timm_format(own):
            state_dict = to_mmpretrain(state_dict)
        for beginning in self.leave_out:
            if not any(name.startswith(beginning) for name in (*own, *state_dict)):
                parts = dict.fromkeys(name.partition('.')[0] + '.' for name in (*own, *state_dict))
                raise CheckpointError(
                    f'leave_out={beginning!r}: no tensor of {source} or of the model begins with it; they begin with '
                    f'{", ".join(parts)}'
                )
        kept = {name: tensor for name, tensor in state_dict.items() if not name.startswith(self.leave_out)}
        kept.update({name: tensor for name, tensor in own.items() if name.startswith(self.leave_out)})
        return OrderedDict(kept)


def _require_training_state(checkpoint: Mapping[str, Any], source: str) -> None:
    if 'message_hub' not in checkpoint or not {'epoch', 'iter'} <= (checkpoint.get('meta') or {}).keys():
        raise CheckpointError(f'{source}: holds weights but no training state; start from it with load_from')
    for name, kind in _inert({k: v for k, v in checkpoint.items() if k != 'state_dict'}):
        raise CheckpointError(
            f'{source}: {name} is of class {kind}, which is not read from a pickle unless '
            'torch.serialization.add_safe_globals names it (in a module of custom_imports)'
        )


def _inert(value: Any, name: str = '') -> Iterator[tuple[str, str]]:
    """Name and class of everything in a checkpoint that was not read."""
    if isinstance(value, Inert):
        yield name, type(value).__name__
    elif isinstance(value, (Mapping, list, tuple)):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _inert(item, f'{name}.{key}'.removeprefix('.'))
