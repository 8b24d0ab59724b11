"""``sk-plugins TOOL ...``, or ``python -m sk_plugins TOOL ...``, runs one of the project's tools."""

import ast
import importlib
import runpy
import sys
from pathlib import Path

from ._resources import ROOT, how_to_install
from ._text import nearest


def main() -> None:
    tools = {path.stem: path for path in sorted((ROOT / 'tools').glob('[a-z]*.py'))}
    usage = f'usage: python -m sk_plugins {{{",".join(tools)}}} ... (each has a --help)'
    if sys.argv[1:] in (['-h'], ['--help']):
        print(usage, '', *(f'  {name:20} {_title(path)}' for name, path in tools.items()), sep='\n')
        return
    if len(sys.argv) < 2:
        raise SystemExit(usage)
    if sys.argv[1] not in tools:
        raise SystemExit(f'{usage}\nsk-plugins: error: there is no tool {sys.argv[1]!r}{nearest(sys.argv[1], tools)}')
    path = tools[sys.argv[1]]
    sys.argv = [str(path), *sys.argv[2:]]
    sys.path.insert(0, str(path.parent))
    package = sys.modules[__package__]
    try:
        if not hasattr(package, 'SKResNet'):
            importlib.reload(package)
        runpy.run_path(str(path), run_name='__main__')
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error}: the tools need the extra mm: {how_to_install("mm")}') from error


def _title(path: Path) -> str:
    """The first sentence of what a tool says of itself."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))) or ''
    return text.partition('\n')[0]


if __name__ == '__main__':
    main()
