"""README's table of speed, made of the reports on a CPU and on a GPU."""

from pathlib import Path

from _tables import insert_table, markdown_table

from .reporting import NOT_MEASURED, Report, make_report, read_report
from .sets import COLUMNS, SETS

BEGIN, END = '<!-- speed: make bench, make bench-gpu -->', '<!-- end of speed -->'
# README's rows: the figure of the set on a CPU and on a GPU.
FIGURES = {
    'inference': ('eager inference, unfused', 'inference, eager'),
    'inference, compiled': ('compiled inference', 'inference, compiled'),
    'training step': ('training step, eager', 'training step, eager'),
    'memory of a training step': ('bytes saved for backward', 'peak memory of a training step, eager'),
}


def read_reports(folder: Path) -> tuple[Report, Report]:
    """The reports of ``make bench`` and ``make bench-gpu`` in a folder; one that is not there has no figures."""
    reports = []
    for name, key in (('cpu', 'standard'), ('gpu', 'gpu')):
        path, chosen = folder / f'benchmark_{name}.json', SETS[key]
        if path.is_file():
            reports.append(read_report(path, keys=('figures',)))
        else:
            reports.append(make_report(chosen.title, chosen.settings, [], chosen.baseline, None, chosen))
    return reports[0], reports[1]


def speed_table(cpu: Report, gpu: Report) -> str:
    """README's rows, with the medians of both reports beside each other."""
    head = ['SKNet-50', *(f'{device}, {column}' for device in ('CPU', 'GPU') for column in COLUMNS)]
    lines = [head, ['---', *['---:'] * (len(head) - 1)]]
    for row, labels in FIGURES.items():
        cells = [cell for report, label in zip((cpu, gpu), labels) for cell in _ratios(report, label)]
        lines.append([row, *cells])
    return markdown_table(lines)


def _ratios(report: Report, label: str) -> list[str]:
    figure = next((figure for figure in report['figures'] if figure['label'] == label), None)
    ratios = [cell and cell['ratio'] for cell in figure['against']] if figure else [None] * len(COLUMNS)
    return [f'{ratio["median"]:.2f}' if ratio else NOT_MEASURED.removesuffix(' yet') for ratio in ratios]


def renew_table(page: Path, folder: Path) -> None:
    """Write README's table of speed into ``page``, made of the reports in a folder."""
    table = speed_table(*read_reports(folder))
    page.write_text(insert_table(page.read_text(encoding='utf-8'), table, BEGIN, END), encoding='utf-8')
