"""Files and folders that are written whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from ._text import first_lines

__all__ = ['write_atomically']


@contextlib.contextmanager
def write_atomically(path: str | os.PathLike, folder: bool = False) -> Iterator[Path]:
    """A name to write a file, or fill a folder, under; it becomes ``path`` only if all goes well.

    Others see what was at ``path`` before or what is written, also where the process or the machine stops in between:
    that leaves a ``.NAME.*.part`` folder beside it. Folders on the way to ``path`` are made.

    Args:
        path: of the file or folder; a link stays, and what it points to is written.
        folder: whether a folder is written. One that is there already must be empty.

    Raises:
        FileExistsError: ``path`` is a folder, and a file was to be written.
        OSError: it cannot be written, as on a full disk; the message names ``path``.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir() and not folder:
        raise FileExistsError(f'{path}: is a folder; name a file')
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        parent = Path(tempfile.mkdtemp(prefix=f'.{target.name}.', suffix='.part', dir=target.parent))
        try:
            partial = parent / target.name
            yield partial
            # safetensors writes files that only their owner can read.
            umask = os.umask(0)
            os.umask(umask)
            for written in (partial, *partial.rglob('*')):
                if written.is_file():
                    written.chmod(0o666 & ~umask)
                    _synchronise(written)
            if target.is_dir():
                target.rmdir()
            os.replace(partial, target)
        finally:
            shutil.rmtree(parent, ignore_errors=True)
        with contextlib.suppress(OSError):  # not every file system, or platform, has folders to be synchronised
            _synchronise(target.parent)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and not _is_about(error, target):
            raise
        reason = getattr(error, 'strerror', None) or first_lines(error)
        failed = OSError(f'{path}: cannot be written: {reason}')
        failed.errno = getattr(error, 'errno', None)
        raise failed from error


def _is_about(error: OSError, target: Path) -> bool:
    """Whether an error is the system's, in writing to ``target``, and not one of reading what is to be written."""
    if error.errno is None or error.filename is None:
        return error.errno is not None
    named = Path(error.filename)
    return named in (target, *target.parents) or str(named).startswith(str(target.with_name(f'.{target.name}.')))


def _synchronise(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
