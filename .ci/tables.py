"""What versions.py and machines.py share: a run of pytest with its counts, and tables in CONTRIBUTING.md.

Only the standard library: this runs before any environment is there.
"""

import os
import re
import subprocess
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLES = ROOT / 'CONTRIBUTING.md'


@dataclass
class Counts:
    """Tests of one run. ``failed`` includes errors; ``problem`` is said where there are no counts."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    problem: str = ''

    @property
    def ok(self) -> bool:
        return not self.problem and not self.failed and self.passed > 0

    def cells(self) -> tuple[str, str, str, str]:
        time = f'{self.seconds / 60:.1f} min'
        return (
            (self.problem, '', '', time)
            if self.problem
            else (*map(str, (self.passed, self.failed, self.skipped)), time)
        )


def run_tests(python: str | Path, arguments: Sequence[str], environment: Mapping[str, str | None]) -> Counts:
    """Runs pytest in the project's folder and counts; its output goes where this script's goes.

    Args:
        python: the interpreter.
        arguments: files and options for pytest.
        environment: variables to set, or to unset where the value is None.
    """
    variables = {**os.environ, 'PYTHONPATH': str(ROOT), **environment}
    variables = {name: value for name, value in variables.items() if value is not None}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / 'report.xml'
        command = [str(python), '-m', 'pytest', '-p', 'no:cacheprovider', f'--junit-xml={report}', *arguments]
        status = subprocess.run(command, cwd=ROOT, env=variables).returncode
        seconds = time.perf_counter() - start
        try:
            suites = ElementTree.parse(report).getroot().iter('testsuite')
        except (OSError, ElementTree.ParseError):
            return Counts(problem=f'pytest ended with {status}', seconds=seconds)
        totals = dict.fromkeys(('tests', 'failures', 'errors', 'skipped'), 0)
        for suite in suites:
            for name in totals:
                totals[name] += int(suite.get(name, 0))
    failed = totals['failures'] + totals['errors']
    if status and not failed:
        return Counts(problem=f'pytest ended with {status}', seconds=seconds)
    return Counts(totals['tests'] - failed - totals['skipped'], failed, totals['skipped'], seconds)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns stand under each other in a terminal too."""
    rows = [list(head), *map(list, rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ['| ' + ' | '.join(cell.ljust(width) for cell, width in zip(row, widths)) + ' |' for row in rows]
    lines.insert(1, '| ' + ' | '.join('-' * width for width in widths) + ' |')
    return '\n'.join(lines)


def _pattern(name: str, page: str) -> str:
    pattern = rf'(<!-- {name}: [^>]*-->\n)(.*?)(<!-- end of {name} -->)'
    if not re.search(pattern, page, flags=re.DOTALL):
        raise SystemExit(f'{TABLES.name} has no markers "<!-- {name}: ... -->" and "<!-- end of {name} -->"')
    return pattern


def rows_of(name: str) -> list[tuple[str, ...]]:
    """The rows that CONTRIBUTING.md has between the markers of ``name``, without the head."""
    page = TABLES.read_text(encoding='utf-8')
    lines = re.search(_pattern(name, page), page, flags=re.DOTALL)[2].splitlines()[2:]
    return [tuple(cell.strip() for cell in line.strip('|').split('|')) for line in lines]


def write(name: str, text: str) -> None:
    """Puts ``text`` into CONTRIBUTING.md between the markers of ``name``."""
    page = TABLES.read_text(encoding='utf-8')
    page = re.sub(_pattern(name, page), lambda found: f'{found[1]}{text}\n{found[3]}', page, flags=re.DOTALL)
    TABLES.write_text(page, encoding='utf-8')
