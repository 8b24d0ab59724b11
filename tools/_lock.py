"""One run at a time in a folder."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import SoftFileLock, Timeout

__all__ = ['lock']


@contextlib.contextmanager
def lock(file: Path, option: str) -> Iterator[None]:
    """Within it, no other process may hold ``file``. Folders that it made are removed if they are empty in the end.

    The file names the process and its machine. One whose process is dead is taken over.

    Args:
        file: the lock.
        option: of the command line, that names the folder.

    Raises:
        FileExistsError: another process has it; the message names it and the file.
        OSError: the file cannot be written.
    """
    made = [path for path in file.parents if not path.exists()]
    own = SoftFileLock(file, timeout=0)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            own.acquire()
        except Timeout:
            holder = ''
            with contextlib.suppress(OSError):  # it is gone by now
                holder = ' on '.join(file.read_text(encoding='utf-8').splitlines()[:2])
            raise FileExistsError(
                f'{file.parent}: a run is at work there, process {holder or "unknown"} ({file}): wait for it, '
                f'or name another {option}; if there is no such process, remove that file'
            ) from None
        yield
    finally:
        own.release()
        for folder in made:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
