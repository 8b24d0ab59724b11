"""One run at a time in a work dir."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

__all__ = ['LOCK', 'lock']

LOCK = 'finetune.lock'


@contextlib.contextmanager
def lock(work_dir: Path) -> Iterator[None]:
    """Within it, no other process may start a run in ``work_dir``; a folder that is empty in the end is removed.

    The lock is a file with the process's number and its machine. One whose process is dead is taken over.

    Raises:
        FileExistsError: another process has it; the message names it and the file.
        OSError: the file cannot be written.
    """
    made = [path for path in (work_dir, *work_dir.parents) if not path.exists()]
    path, own = work_dir / LOCK, f'{os.getpid()} {socket.gethostname()}'
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                with path.open('x', encoding='utf-8') as file:
                    file.write(own)
                break
            except FileExistsError:
                number, _, machine = _read(path).partition(' ')
                if _is_dead(number, machine):
                    path.unlink(missing_ok=True)
                    continue
                raise FileExistsError(
                    f'{work_dir}: a run is at work there, process {number or "unknown"} on {machine or "this machine"} '
                    f'({path}): wait for it, or name another --work-dir; if there is no such process, remove that file'
                ) from None
        yield
    finally:
        if _read(path) == own:
            path.unlink(missing_ok=True)
        for folder in made:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8').strip()
    except OSError:
        return ''


def _is_dead(number: str, machine: str) -> bool:
    """Whether a process of this machine is gone; of another machine's nothing is known."""
    if machine != socket.gethostname() or not number.isdigit():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return int(number) == os.getpid()
