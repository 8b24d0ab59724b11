"""The core tests with every release of torch, timm and Python that pyproject.toml claims the ends of.

    python .ci/versions.py                 # all rows of the table below, one environment at a time: an hour
    python .ci/versions.py 2.7.0 2.11.0    # the rows of these releases of torch
    python .ci/versions.py --write         # and the results into CONTRIBUTING.md, where other rows stay

An environment takes 5 to 7 GB of disk and is removed before the next one is made. Interpreters are looked for as
``pythonX.Y`` on PATH, among pyenv's, and in the variable PYTHONS (paths, with spaces between them). The last column
counts the environment's installation and the tests; the exit status is 0 if every row passed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tables import ROOT, Counts, rows_of, run_tests, table, write


class Row(NamedTuple):
    """An environment: ``torchvision`` and ``timm`` are exact releases, or '' for the newest that fits.

    ``numpy`` limits what the tests take: the interpreter of Triton 3.6 fails with NumPy 2.4 (``TypeError: only
    0-dimensional arrays can be converted to Python scalars``).
    """

    python: str
    torch: str
    torchvision: str
    timm: str
    why: str
    numpy: str = ''


MATRIX = (
    Row('3.10', '2.7.0', '0.22.0', '1.0.31', 'the oldest of all'),
    Row('3.11', '2.11.0', '0.26.0', '', 'checks arguments of batch_norm more strictly', '<2.4'),
    Row('3.12', '2.12.1', '0.27.1', '', 'what detection pins'),
    Row('3.13', '', '', '', 'the newest of all'),
)
# What needs neither OpenMMLab nor the Hub: the arithmetic, the layer, the networks, timm's door, folding.
TESTS = (
    'tests/ops',
    'tests/layers',
    'tests/networks',
    'tests/timm_models',
    'tests/fuse',
    'tests/test_eager_and_graphs.py',
)
NEEDED = ('pytest', 'pytest-timeout', 'pytest-xdist', 'scikit-learn', 'onnx', 'onnxruntime', 'onnxscript', 'hypothesis')
NAMES = ('torch', 'timm')
VERSIONS = """
import platform
from importlib.metadata import version
print(platform.python_version(), version('torch'), version('timm'))
"""


def candidates(version: str) -> Iterator[str]:
    yield from os.environ.get('PYTHONS', '').split()
    if found := shutil.which(f'python{version}'):
        yield found
    yield sys.executable
    if pyenv := shutil.which('pyenv'):
        root = subprocess.run([pyenv, 'root'], capture_output=True, text=True).stdout.strip()
        yield from map(str, sorted(Path(root).glob(f'versions/{version}.*/bin/python')))


def find_python(version: str) -> str | None:
    """An interpreter of ``version`` ('3.12') that runs: pyenv's shims are there and don't."""
    for python in candidates(version):
        ask = [python, '-c', 'import sys; print("%d.%d" % sys.version_info[:2])']
        try:
            if subprocess.run(ask, capture_output=True, text=True).stdout.strip() == version:
                return python
        except OSError:
            continue
    return None


def run_row(row: Row, python: str | None, arguments: list[str]) -> tuple[tuple[str, str, str], Counts]:
    """Versions of Python, torch and timm, and the tests' counts, in an environment that is gone afterwards."""
    found = (row.python, row.torch, row.timm)
    if python is None:
        return found, Counts(problem=f'no python{row.python} found')
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix='sk-versions-') as folder:
        inside = Path(folder) / 'bin' / 'python'
        wanted = [
            f'{name}=={pin}' if pin else name
            for name, pin in zip((*NAMES, 'torchvision'), (row.torch, row.timm, row.torchvision))
        ]
        install = [inside, '-m', 'pip', 'install', '--quiet', '--no-cache-dir', *wanted, f'numpy{row.numpy}']
        install += [*NEEDED, '--editable', ROOT]
        for command in ([python, '-m', 'venv', folder], install):
            if subprocess.run(list(map(str, command))).returncode:
                return found, Counts(problem='cannot be installed', seconds=time.perf_counter() - start)
        found = tuple(subprocess.run([inside, '-c', VERSIONS], capture_output=True, text=True).stdout.split())
        counts = run_tests(inside, arguments, {'OMP_NUM_THREADS': '1'})
    counts.seconds = time.perf_counter() - start
    return found, counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('torch', nargs='*', help="releases whose rows to run ('newest' for the last); default: all")
    parser.add_argument('--write', action='store_true', help='write the table into CONTRIBUTING.md')
    parser.add_argument(
        '--any-python', action='store_true', help='where a Python is missing, take the one that runs this'
    )
    parser.add_argument('--jobs', default='auto', help='processes of pytest (default: one a core)')
    args = parser.parse_args()
    rows = [row for row in MATRIX if not args.torch or (row.torch or 'newest') in args.torch]
    if unknown := set(args.torch) - {row.torch or 'newest' for row in rows}:
        parser.error(
            f'no row has torch {", ".join(sorted(unknown))}; there are {", ".join(r.torch or "newest" for r in MATRIX)}'
        )
    arguments = ['-n', args.jobs, '--maxprocesses', '8', '--dist', 'loadfile', *TESTS]
    lines, ok = [], True
    for row in rows:
        print(
            f'== Python {row.python}, torch {row.torch or "newest"}, timm {row.timm or "newest"}: {row.why}', flush=True
        )
        python = find_python(row.python) or (sys.executable if args.any_python else None)
        found, counts = run_row(row, python, arguments)
        ok = ok and counts.ok
        lines.append((*found, *counts.cells(), row.why))
    head = ('Python', 'torch', 'timm', 'passed', 'failed', 'skipped', 'time', 'why')
    print(f'\n{table(head, lines)}')
    if args.write:
        order = [row.why for row in MATRIX]
        renewed = {line[-1]: line for line in [*rows_of('versions'), *lines] if line[-1] in order}
        write('versions', table(head, sorted(renewed.values(), key=lambda line: order.index(line[-1]))))
    return 0 if ok else 1


if __name__ == '__main__':
    sys.exit(main())
