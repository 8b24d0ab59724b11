"""One run at a time in a work dir."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import SoftFileLock, Timeout

__all__ = ['LOCK', 'lock']

LOCK = 'finetune.lock'


@contextlib.contextmanager
def lock(work_dir: Path) -> Iterator[None]:
    """Within it, no other process may start a run in ``work_dir``; a folder that is empty in the end is removed.

    The lock is a file that names the process and its machine. One whose process is dead is taken over.

    Raises:
        FileExistsError: another process has it; the message names it and the file.
        OSError: the file cannot be written.
    """
    made = [path for path in (work_dir, *work_dir.parents) if not path.exists()]
    own = SoftFileLock(work_dir / LOCK, timeout=0)
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        try:
            own.acquire()
        except Timeout:
            holder = ''
            with contextlib.suppress(OSError):  # it is gone by now
                holder = ' on '.join((work_dir / LOCK).read_text(encoding='utf-8').splitlines()[:2])
            raise FileExistsError(
                f'{work_dir}: a run is at work there, process {holder or "unknown"} ({work_dir / LOCK}): wait for it, '
                'or name another --work-dir; if there is no such process, remove that file'
            ) from None
        yield
    finally:
        own.release()
        for folder in made:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
