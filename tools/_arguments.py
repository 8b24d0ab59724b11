"""Command lines whose errors name what was meant."""

import argparse
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
            message += self.hints.get(unknown[1]) or nearest(unknown[1], dict.fromkeys([*options, *self.hints]))
            meant = next((name for name in self.hints if message.endswith(f'near it is {name}')), None)
            message += f' ({self.hints[meant].lstrip(":; ")})' if meant else ''
        self.print_usage(sys.stderr)
        self.exit(2, f'{self.prog}: error: {message}\n')
