"""Weights from the Hugging Face Hub, with errors that name the repository and the cause."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
from huggingface_hub import errors as hf_errors
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from safetensors import SafetensorError
from torch import Tensor

__all__ = ['WEIGHTS_NAME', 'HubError', 'explain_errors', 'load_state_dict', 'split_revision']

WEIGHTS_NAME = 'model.safetensors'


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
def explain_errors(repo: str, cache_dir: str | os.PathLike | None = None) -> Iterator[None]:
    """Within it, whatever goes wrong between the Hub and the network becomes one :class:`HubError`.

    A cached weight file that turns out not to be safetensors is removed, so that the next try downloads it anew.

    Args:
        repo: 'owner/name' or 'owner/name@revision', for the message.
        cache_dir: the cache in use where it is not the client's default.
    """
    try:
        yield
    except SafetensorError as error:
        _forget(repo, cache_dir)
        raise HubError(
            f'{repo}: {WEIGHTS_NAME} is not a safetensors file ({error}); it was removed from the cache'
        ) from error
    except hf_errors.RevisionNotFoundError as error:
        raise HubError(f'{repo}: the repository has no such revision') from error
    except hf_errors.GatedRepoError as error:
        raise HubError(f'{repo}: access to this repository must be asked for on its page, then log in') from error
    except hf_errors.RepositoryNotFoundError as error:
        raise HubError(
            f'{repo}: repository not found, or private and you are not logged in (`hf auth login`){_status(error)}'
        ) from error
    except hf_errors.LocalEntryNotFoundError as error:
        raise HubError(
            f'{repo}: {WEIGHTS_NAME} is not in the local cache and the Hub cannot be reached '
            f'({_root_cause(error)}); check the connection, HF_ENDPOINT and HF_HUB_OFFLINE'
        ) from error
    except hf_errors.EntryNotFoundError as error:
        raise HubError(f'{repo}: the repository has no {WEIGHTS_NAME}{_status(error)}') from error
    except hf_errors.HfHubHTTPError as error:
        raise HubError(f'{repo}: the Hub refused the request{_status(error)}: {_root_cause(error)}') from error
    except hf_errors.HFValidationError as error:
        raise HubError(f'{repo}: not a valid repository name: {error}') from error
    except OSError as error:
        raise HubError(f'{repo}: the download failed: {_root_cause(error)}') from error
    except HubError:
        raise
    except RuntimeError as error:
        raise HubError(f'{repo}: its weights cannot be loaded into this model: {_shorten(error)}') from error


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


def _forget(repo: str, cache_dir: str | os.PathLike | None) -> None:
    """Remove a repository's weight file, and the blob that it points to, from the cache."""
    repo_id, revision = split_revision(repo)
    cached = try_to_load_from_cache(repo_id, WEIGHTS_NAME, cache_dir=cache_dir, revision=revision)
    if isinstance(cached, str):
        blob = Path(cached).resolve()
        Path(cached).unlink(missing_ok=True)
        blob.unlink(missing_ok=True)


def _status(error: hf_errors.HfHubHTTPError) -> str:
    response = getattr(error, 'response', None)
    return '' if response is None else f' (HTTP {response.status_code})'


def _shorten(error: RuntimeError, lines: int = 4) -> str:
    """The head of a message that torch writes one line a tensor."""
    head, *rest = [line.strip() for line in str(error).splitlines()]
    more = f' ... and {len(rest) - lines} more' if len(rest) > lines else ''
    return ' '.join([head, *rest[:lines]]) + more


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f'{type(error).__name__}: {error}'
