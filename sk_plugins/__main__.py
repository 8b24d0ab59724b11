"""``python -m sk_plugins TOOL ...`` runs one of the project's tools, from a checkout or from the installed wheel."""

import runpy
import sys

from ._resources import ROOT, how_to_install


def main() -> None:
    tools = {path.stem: path for path in sorted((ROOT / 'tools').glob('[a-z]*.py'))}
    usage = f'usage: python -m sk_plugins {{{",".join(tools)}}} ... (each has a --help)'
    if sys.argv[1:] in (['-h'], ['--help']):
        print(usage)
        return
    if len(sys.argv) < 2 or sys.argv[1] not in tools:
        raise SystemExit(usage)
    path = tools[sys.argv[1]]
    sys.argv = [str(path), *sys.argv[2:]]
    sys.path.insert(0, str(path.parent))
    try:
        runpy.run_path(str(path), run_name='__main__')
    except ModuleNotFoundError as error:
        raise SystemExit(f'{error}: the tools need the extra mm: {how_to_install("mm")}') from error


if __name__ == '__main__':
    main()
