"""Command lines whose errors name what was meant."""

import argparse
import difflib
import re
import sys
from collections.abc import Mapping
from typing import NoReturn

from sk_plugins._text import nearest


class Parser(argparse.ArgumentParser):
    """argparse's, whose error of an option that there is not names the nearest one.

    Args:
        hints: what to say of options that users look for and that are called otherwise here.
        **kwargs: argparse's; the description keeps its lines.
    """

    def __init__(self, *args, hints: Mapping[str, str] | None = None, **kwargs) -> None:
        kwargs.setdefault('formatter_class', argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)
        self.hints = dict(hints or {})

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r'unrecognized arguments: .*?(--[\w-]+)', message)
        if unknown:
            options = re.findall(r'--[\w-]+', self.format_usage())
            names = dict.fromkeys([*options, *self.hints])
            best = difflib.get_close_matches(unknown[1], names, n=1)
            # What is called otherwise here is said where it is the nearest, not beside an option.
            near = nearest(unknown[1], options if best and best[0] in options else names)
            message += self.hints.get(unknown[1]) or near
            meant = next((name for name in self.hints if message.endswith(f'near it is {name}')), None)
            message += f' ({self.hints[meant].lstrip(":; ")})' if meant else ''
        self.print_usage(sys.stderr)
        self.exit(2, f'{self.prog}: error: {message}\n')
