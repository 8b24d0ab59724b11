"""Weights from addresses and the Hugging Face Hub, folders for the Hub, and errors that name what and why."""

import contextlib
import hashlib
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import safetensors.torch
import timm
import torch
from huggingface_hub import ModelCardData, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub import errors as hf_errors
from safetensors import SafetensorError
from timm.models import clean_state_dict, save_for_hf
from torch import Tensor, nn
from torch.hub import HASH_REGEX, download_url_to_file, get_dir

from .. import zoo
from .._files import write_atomically
from .._resources import how_to_install
from .._text import first_lines, several
from .files import CheckpointError, HubError, find_fault, load_checkpoint, pick_state_dict
from .fit import COUNTER, load_strictly
from .names import BACKBONE, to_timm
from .simclr import to_own

__all__ = [
    'WEIGHTS_NAME',
    'HubError',
    'PartialLoad',
    'download_url',
    'explain_errors',
    'load_partial',
    'load_state_dict',
    'read_file',
    'save_hub_folder',
    'say_cause',
]

_Read = TypeVar('_Read')
WEIGHTS_NAME = 'model.safetensors'
_PICKLE_NAME = 'pytorch_model.bin'  # what timm reads, with weights_only=True, where a repository has no safetensors


def split_revision(repo: str) -> tuple[str, str | None]:
    """'owner/name@revision' as (owner/name, revision), the revision None where there is none.

    Raises:
        ValueError: ``repo`` is not of that form.
    """
    repo_id, at, revision = repo.partition('@')
    if repo_id.count('/') != 1 or not all(repo_id.split('/')) or (at and not revision) or '@' in revision:
        raise ValueError(f'repository {repo!r} must be OWNER/NAME or OWNER/NAME@REVISION')
    return repo_id, revision or None


@contextlib.contextmanager
def explain_errors(
    repo: str, cache_dir: str | os.PathLike | None = None, filename: str = WEIGHTS_NAME
) -> Iterator[None]:
    """Within it, whatever goes wrong between the Hub and the network becomes one :class:`HubError`.

    A cached weight file that cannot be read is removed, so that the next try downloads it again; so is one that was
    downloaded within and is not what the Hub's SHA-256 says.

    Args:
        repo: 'owner/name' or 'owner/name@revision', for the message.
        cache_dir: the cache in use where it is not the client's default.
        filename: the weight file that is asked for.
    """
    try:
        was_cached = _cached(repo, cache_dir, filename) is not None
        yield
        path = None if was_cached else _cached(repo, cache_dir, filename)
        if path is not None and not _is_as_named(path):
            _forget(path)
            raise HubError(f"{repo}: {filename} is not the Hub's: its SHA-256 differs; it was removed from the cache")
    except HubError:
        raise
    except CheckpointError as error:
        raise HubError(f'{repo}: {error}') from error
    except hf_errors.RevisionNotFoundError as error:
        raise HubError(f'{repo}: the repository has no such revision') from error
    except hf_errors.GatedRepoError as error:
        raise HubError(f'{repo}: access to this repository must be asked for on its page, then log in') from error
    except hf_errors.RepositoryNotFoundError as error:
        raise HubError(
            f'{repo}: repository not found, or private and you are not logged in (`hf auth login`): {say_cause(error)}'
        ) from error
    except hf_errors.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise HubError(
                f'{repo}: {filename} is not in the local cache ({cache_dir or constants.HF_HUB_CACHE}) and offline '
                'mode is enabled: load it once without HF_HUB_OFFLINE where there is a connection, copy the cache of a '
                'machine that has it, or name a local file (timm: pretrained_cfg_overlay=dict(file=...), OpenMMLab: '
                'checkpoint=... of init_cfg)'
            ) from error
        raise HubError(
            f'{repo}: {filename} is not in the local cache and the Hub did not give it ({say_cause(error)}); '
            'check the connection, HF_ENDPOINT and HF_HUB_OFFLINE'
        ) from error
    except hf_errors.EntryNotFoundError as error:
        raise HubError(f'{repo}: the repository has no {filename}') from error
    except hf_errors.HFValidationError as error:
        raise HubError(f'{repo}: not a valid repository name: {first_lines(error)}') from error
    # Connections that break during a download reach us as the HTTP library's own errors, which are no OSError.
    except (OSError, hf_errors.HTTPError) as error:
        raise HubError(f'{repo}: the download failed: {say_cause(error)}') from error
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        damaged = _forget_damaged(repo, cache_dir, filename)
        if damaged is None:
            raise HubError(f'{repo}: its weights cannot be loaded into this model: {first_lines(error)}') from error
        kind = 'safetensors file' if damaged.endswith('.safetensors') else 'pickle of tensors'
        raise HubError(
            f'{repo}: {damaged} is not a {kind} ({first_lines(error)}); it was removed from the cache'
        ) from error


def load_state_dict(
    repo: str, device: str = 'cpu', cache_dir: str | os.PathLike | None = None, projection: int = 0
) -> dict[str, Tensor]:
    """The tensors of a repository's ``model.safetensors``, or of the pickle that the zoo names in its place, under our
    names; no other pickle is read.

    Args:
        repo: 'owner/name', or 'owner/name@revision' with a branch, tag or commit.
        device: where the tensors go.
        cache_dir: a cache other than the client's default.
        projection: how many layers of SimCLR's contrastive head the network has.

    Raises:
        ValueError: ``repo`` is not of that form.
        HubError: no such repository, revision or file, no access, no connection, a broken download, or a file that
            is not safetensors, or no pickle of tensors.
    """
    repo_id, _ = split_revision(repo)
    return to_own(read_file(repo, zoo.weight_file(repo_id) or WEIGHTS_NAME, device, cache_dir), projection)


def read_file(
    repo: str, filename: str, device: str = 'cpu', cache_dir: str | os.PathLike | None = None
) -> dict[str, Tensor]:
    """The tensors of a repository's safetensors file, or of a pickle read weights-only, under the names they have.

    Arguments and errors as in :func:`load_state_dict`.
    """
    repo_id, revision = split_revision(repo)
    with explain_errors(repo, cache_dir, filename):
        path = hf_hub_download(repo_id, filename, revision=revision, cache_dir=cache_dir)
        if filename.endswith('.safetensors'):
            return safetensors.torch.load_file(path, device=device)
        try:
            state_dict, _ = load_checkpoint(path)
        except CheckpointError as error:
            _forget(Path(path))
            reason = str(error).removeprefix(f'{path}: ')
            raise CheckpointError(f'{filename}: {reason}; it was removed from the cache') from error
        return {name: tensor.to(device) for name, tensor in state_dict.items()}


def _cached(repo: str, cache_dir: str | os.PathLike | None, filename: str) -> Path | None:
    repo_id, _, revision = repo.partition('@')
    path = try_to_load_from_cache(repo_id, filename, cache_dir=cache_dir, revision=revision or None)
    return Path(path) if isinstance(path, str) else None


def _forget(path: Path) -> None:
    """Remove a file of the cache, and the blob that it points to."""
    blob = path.resolve()
    path.unlink(missing_ok=True)
    blob.unlink(missing_ok=True)


def _forget_damaged(repo: str, cache_dir: str | os.PathLike | None, filename: str) -> str | None:
    """Remove a repository's weight file from the cache if it cannot be read.

    Returns its name, or None where nothing was removed.
    """
    for name in dict.fromkeys((filename, _PICKLE_NAME)):
        path = _cached(repo, cache_dir, name)
        if path is not None and not _is_readable(path):
            _forget(path)
            return name
    return None


def _is_as_named(path: Path) -> bool:
    """Whether a file of the cache has the SHA-256 that its blob is named by; small files' are named otherwise."""
    name = path.resolve().name
    if re.fullmatch(r'[0-9a-f]{64}', name) is None:
        return True
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest() == name


def _is_readable(path: Path) -> bool:
    try:
        if path.suffix == '.safetensors':
            with safetensors.safe_open(path, 'pt'):
                return True
        torch.load(path, map_location='meta', weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError):
        return False
    return True


def say_cause(error: BaseException) -> str:
    """The innermost reason in one line: what the Hub answered, or what the connection failed of."""
    while error.__cause__ is not None and getattr(error, 'response', None) is None:
        error = error.__cause__
    response = getattr(error, 'response', None)
    if response is None:
        first, *_ = str(error).splitlines() or ['']  # the rest is advice
        return f'{type(error).__name__}: {first}'
    said = getattr(error, 'server_message', None)
    return f'HTTP {response.status_code}' + (f': {" ".join(said.split())}' if said else '')


# Addresses


def download_url(url: str, read: Callable[[Path], _Read], cache_dir: str | os.PathLike | None = None) -> _Read:
    """Read a file at an address, which stays in torch's cache; one there that cannot be read is downloaded again.

    Args:
        url: the file's. A hash in its name, as torch's and timm's have it, is compared.
        read: reads the downloaded file; it raises CheckpointError where that is damaged.
        cache_dir: the cache in place of torch's.

    Raises:
        CheckpointError: it cannot be had or read, or is not what its name's hash says; it is not kept then.
    """
    name = Path(urlsplit(url).path).name or 'weights'
    folder = Path(get_dir(), 'checkpoints') if cache_dir is None else Path(cache_dir)
    digits = HASH_REGEX.search(name)
    if digits is None:  # a name such as epoch_100.pth is not one file's alone
        folder /= hashlib.sha256(url.encode()).hexdigest()[:16]
    path = folder / name
    for was_there in [True, False] if path.is_file() else [False]:
        try:
            if not was_there:
                folder.mkdir(parents=True, exist_ok=True)
                download_url_to_file(url, str(path), digits and digits[1], progress=False)
            return read(path)
        except CheckpointError as error:  # half a file, of a connection that broke or a process that was killed
            path.unlink(missing_ok=True)
            if not was_there:
                raise CheckpointError(f'{url}: {str(error).removeprefix(f"{path}: ")}') from error
        except (OSError, HTTPException, RuntimeError) as error:
            raise CheckpointError(f'{url}: cannot be downloaded: {first_lines(error)}') from error
    raise AssertionError('unreachable')


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
                f'left as initialised: {_count(self.initialised)}',
                f'not used: {_count(self.unused)}',
            ]
        )


def load_partial(model: nn.Module, source: str | os.PathLike | Mapping[str, Tensor]) -> PartialLoad:
    """Load what fits by name and shape, such as torchvision's ShuffleNetV2 weights into SE and SK units.

    Args:
        model: a network registered in timm, changed in place.
        source: a state dict under either world's names, a checkpoint file, an ``https://`` address of one (read with
            ``weights_only=True``) or ``hf-hub:OWNER/NAME[@REVISION]``.

    Returns:
        What was loaded, what was left as it was, and what was not used. Counters of batches are not mentioned.

    Raises:
        FileNotFoundError, CheckpointError, HubError: the source cannot be had or read, or nothing in it fits.
    """
    projection = getattr(model, 'projection_layers', 0)
    if isinstance(source, Mapping):
        state_dict = clean_state_dict(pick_state_dict(source))
    elif str(source).startswith('hf-hub:'):
        state_dict = load_state_dict(str(source).removeprefix('hf-hub:'), projection=projection)
    elif str(source).startswith(('https://', 'http://')):
        state_dict = download_url(str(source), load_checkpoint)[0]
    else:
        state_dict, _ = load_checkpoint(source)
    state_dict = to_own(state_dict, projection)
    if any(name.startswith(BACKBONE) for name in state_dict):
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
        return tuple(name for name in names if not name.endswith(COUNTER))

    return PartialLoad(
        loaded=named(fitting),
        initialised=named(k for k in wanted if k not in fitting),
        unused=named(k for k in state_dict if k not in fitting),
    )


def _count(names: Sequence[str]) -> str:
    return f'{len(names)} tensors ({several(sorted(names), most=6)})' if names else 'none'


# Folders for the Hub


def save_hub_folder(
    state_dict: Mapping[str, Tensor],
    folder: str | os.PathLike,
    architecture: str,
    model_args: Mapping[str, Any] | None = None,
    data_config: Mapping[str, Any] | None = None,
    label_names: list[str] | None = None,
    description: str | None = None,
    problem_type: str | None = None,
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
        problem_type: 'multi_label_classification' where an image has any number of classes: transformers' pipelines
            give each a score of its own then.

    Raises:
        FileExistsError: ``folder`` holds files already.
        OSError: it cannot be written; there is no ``folder`` then.
        CheckpointError: the weights do not fit the network.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f'{folder}: exists and is not empty; name a new folder')
    model = timm.create_model(architecture, **(model_args or {}))
    load_strictly(model, to_timm(state_dict), None, f'{architecture} with {dict(model_args or {})}')
    # What the registered cfg says of the published weights is not said of these.
    own = dict(tag=None, notes=None, license=None, origin_url=None, pool_size=None, description=description)
    model.pretrained_cfg = {**model.pretrained_cfg, **(data_config or {}), **own}
    with write_atomically(folder, folder=True) as partial:
        save_for_hf(
            model,
            partial,
            model_config={k: v for k, v in dict(label_names=label_names, problem_type=problem_type).items() if v},
            model_args=dict(model_args or {}),
            safe_serialization=True,
        )
        config = json.loads((partial / 'config.json').read_text(encoding='utf-8'))
        config.get('model_args', {}).pop('num_classes', None)  # transformers would pass it twice: it is beside them
        (partial / 'config.json').write_text(json.dumps(config, indent=2), encoding='utf-8')
        (partial / 'README.md').write_text(_model_card(architecture, folder.name, description), encoding='utf-8')


def _model_card(architecture: str, name: str, description: str | None) -> str:
    data = ModelCardData(
        library_name='timm', pipeline_tag='image-classification', tags=['image-classification', 'timm', 'sk-plugins']
    )
    description = description or f'A Selective Kernel network ({architecture}).'
    return (
        f'---\n{data.to_yaml()}\n---\n\n# {name}\n\n{description}\n\n'
        f'```python\nimport sk_plugins  # {how_to_install()}\nimport timm\n\n'
        f"model = timm.create_model('hf-hub:OWNER/{name}', pretrained=True)\n```\n\n"
        f'Architecture: [Selective Kernel Networks](https://arxiv.org/abs/1903.06586).\n'
    )
