"""What messages are made of: long texts and lists, shortened, and the names nearest to a wrong one."""

import difflib
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ['counted', 'first_lines', 'nearest', 'several']


def counted(number: int, noun: str) -> str:
    """'1 image', '2 images', '0 processes'."""
    return f'{number} {noun}{"" if number == 1 else "es" if noun.endswith("s") else "s"}'


def first_lines(error: Exception, lines: int = 2, width: int = 200) -> str:
    """The head of a message to which torch gives a line for each tensor, or a line with the names of them all."""
    said = re.sub(r'\x1b\[[0-9;]*m', '', str(error)).splitlines() or [type(error).__name__]  # without colours
    head, *rest = [textwrap.shorten(line, width, placeholder=' ...') for line in said]
    more = f' ... and {len(rest) - lines} more' if len(rest) > lines else ''
    return ' '.join([head, *rest[:lines]]) + more


def nearest(name: str, names: Iterable[str], it: str = 'it', places: Mapping[str, str] | None = None) -> str:
    """'; near it is depth', say, or nothing where no name is near; ``places`` says how a name is written in full."""
    near = [(places or {}).get(one, one) for one in difflib.get_close_matches(name, names, n=3, cutoff=0.6)]
    return f'; near {it} {"is" if len(near) == 1 else "are"} {", ".join(near)}' if near else ''


def nearest_path(path: Path) -> str:
    """What :func:`nearest` says, of the files and folders beside a path where none is."""
    beside = {other.name: str(other) for other in path.parent.glob('*')}
    return nearest(path.name, beside, places=beside)


def several(words: Iterable[str], between: str = ', ', most: int = 3) -> str:
    """The first few, and how many more there are."""
    words = list(words)
    more = f' and {len(words) - most} more' if len(words) > most else ''
    return between.join(words[:most]) + more
