"""Weights from the Hugging Face Hub, with errors that name the repository and the cause."""

import contextlib
import hashlib
import os
import pickle
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub import errors as hf_errors
from safetensors import SafetensorError
from torch import Tensor

__all__ = ['WEIGHTS_NAME', 'HubError', 'explain_errors', 'load_state_dict', 'shorten', 'split_revision']

WEIGHTS_NAME = 'model.safetensors'
_PICKLE_NAME = 'pytorch_model.bin'  # what timm reads, with weights_only=True, where a repository has no safetensors


class HubError(RuntimeError):
    """Weights of a Hub repository could not be had or used; the message names the repository and the cause."""


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

    A cached weight file that cannot be read is removed, so that the next try downloads it anew; so is one that was
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
    except hf_errors.RevisionNotFoundError as error:
        raise HubError(f'{repo}: the repository has no such revision') from error
    except hf_errors.GatedRepoError as error:
        raise HubError(f'{repo}: access to this repository must be asked for on its page, then log in') from error
    except hf_errors.RepositoryNotFoundError as error:
        raise HubError(
            f'{repo}: repository not found, or private and you are not logged in (`hf auth login`): '
            f'{_root_cause(error)}'
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
            f'{repo}: {filename} is not in the local cache and the Hub did not give it ({_root_cause(error)}); '
            'check the connection, HF_ENDPOINT and HF_HUB_OFFLINE'
        ) from error
    except hf_errors.EntryNotFoundError as error:
        raise HubError(f'{repo}: the repository has no {filename}') from error
    except hf_errors.HFValidationError as error:
        raise HubError(f'{repo}: not a valid repository name: {shorten(error)}') from error
    # Connections that break during a download reach us as the HTTP library's own errors, which are no OSError.
    except (OSError, hf_errors.HTTPError) as error:
        raise HubError(f'{repo}: the download failed: {_root_cause(error)}') from error
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        damaged = _forget_damaged(repo, cache_dir, filename)
        if damaged is None:
            raise HubError(f'{repo}: its weights cannot be loaded into this model: {shorten(error)}') from error
        kind = 'safetensors file' if damaged.endswith('.safetensors') else 'pickle of tensors'
        raise HubError(
            f'{repo}: {damaged} is not a {kind} ({shorten(error)}); it was removed from the cache'
        ) from error


def load_state_dict(repo: str, device: str = 'cpu', cache_dir: str | os.PathLike | None = None) -> dict[str, Tensor]:
    """The tensors of a repository's ``model.safetensors``; a pickle is never read.

    Args:
        repo: 'owner/name', or 'owner/name@revision' with a branch, tag or commit.
        device: where the tensors go.
        cache_dir: a cache other than the client's default.

    Raises:
        ValueError: ``repo`` is not of that form.
        HubError: no such repository, revision or file, no access, no connection, a broken download, or a file that
            is not safetensors.
    """
    repo_id, revision = split_revision(repo)
    with explain_errors(repo, cache_dir):
        path = hf_hub_download(repo_id, WEIGHTS_NAME, revision=revision, cache_dir=cache_dir)
        return safetensors.torch.load_file(path, device=device)


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


def _root_cause(error: BaseException) -> str:
    """The innermost reason in one line: what the Hub answered, or what the connection failed of."""
    while error.__cause__ is not None and getattr(error, 'response', None) is None:
        error = error.__cause__
    response = getattr(error, 'response', None)
    if response is None:
        first, *_ = str(error).splitlines() or ['']  # the rest is advice
        return f'{type(error).__name__}: {first}'
    said = getattr(error, 'server_message', None)
    return f'HTTP {response.status_code}' + (f': {" ".join(said.split())}' if said else '')


def shorten(error: Exception, lines: int = 2, width: int = 200) -> str:
    """The head of a message to which torch gives a line for each tensor, or a line with the names of them all."""
    said = str(error).splitlines() or [type(error).__name__]
    head, *rest = [textwrap.shorten(line, width, placeholder=' ...') for line in said]
    more = f' ... and {len(rest) - lines} more' if len(rest) > lines else ''
    return ' '.join([head, *rest[:lines]]) + more
