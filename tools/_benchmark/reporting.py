"""Reports: plain data, which is what the JSON file holds and what the tables and the plot are made of."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from _tables import markdown_table

from sk_plugins._files import write_atomically

from .measuring import Result
from .sets import Set
from .settings import MODES, Run, Settings

QUANTITIES = {
    'seconds': 'time',
    'saved_mib': 'bytes saved for backward',
    'peak_mib': 'peak memory',
    'python_calls': 'Python calls',
    'operator_calls': 'operator calls',
    'host_seconds': "host's time",
    'launches': 'kernel launches',
    'kernel_seconds': 'time of the kernels',
    'graph_seconds': 'time as a CUDA graph',
}
SAMPLES = {'seconds': 'samples', 'host_seconds': 'host_samples'}
NOT_MEASURED = 'not measured yet'
NOT_AVAILABLE = 'not available'
KEYS = ('title', 'machine', 'settings', 'baseline', 'results', 'columns', 'figures')  # of a report

Report = dict[str, Any]
Row = dict[str, Any]


def read_report(path: Path, keys: Sequence[str] = KEYS) -> Report:
    """What :func:`write_report` wrote.

    Args:
        path: of the file.
        keys: what is needed of it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no report.
    """
    try:
        report = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path}: not JSON, and so no report of --json: {error}') from error
    missing = [key for key in keys if not isinstance(report, dict) or key not in report]
    if missing:
        raise ValueError(f'{path}: no report of --json, which has {", ".join(keys)}; it lacks {", ".join(missing)}')
    return report


def write_report(report: Report, path: Path) -> None:
    """As JSON, whole or not at all."""
    with write_atomically(path) as partial:
        partial.write_text(json.dumps(report, indent=1) + '\n', encoding='utf-8')


@dataclass
class Ratio:
    """A ratio of two models: its median over the repeats and the quartiles; what is counted has one value."""

    median: float
    low: float | None = None
    high: float | None = None

    @property
    def spread(self) -> float | None:
        """Interquartile range in per cent of the median."""
        return None if self.low is None else 100 * (self.high - self.low) / self.median


def summarise(samples: Sequence[float]) -> Ratio:
    """Median and quartiles; one sample has no quartiles."""
    if len(samples) == 1:
        return Ratio(samples[0])
    low, median, high = statistics.quantiles(samples, n=4, method='inclusive')
    return Ratio(median, low, high)


def ratio(result: Result | None, against: Result | None, quantity: str = 'seconds') -> Ratio | None:
    """``result`` by ``against``, None where either was not measured. Times are divided within each repeat."""
    if result is None or against is None:
        return None
    if quantity in SAMPLES:
        samples = [a / b for a, b in zip(getattr(result, SAMPLES[quantity]), getattr(against, SAMPLES[quantity]))]
        return summarise(samples) if samples else None
    a, b = getattr(result, quantity), getattr(against, quantity)
    return None if a is None or b is None else Ratio(a / b)


def make_report(
    title: str,
    settings: Settings,
    results: Sequence[Result],
    baseline: str,
    machine: dict[str, Any] | None,
    chosen: Set | None = None,
) -> Report:
    """All that was measured, ready for JSON. ``results`` may lack some of a set's models, or all of them."""
    by_name = {(result.run, result.model): result for result in results}

    def compare(run: Run, quantity: str, model: str, against: str) -> dict[str, Any] | None:
        found = ratio(by_name.get((run, model)), by_name.get((run, against)), quantity)
        return None if found is None else {**asdict(found), 'spread_percent': found.spread}

    def why_not(run: Run, quantity: str, *models: str) -> str | None:
        found = [by_name[run, model] for model in models if (run, model) in by_name]
        reasons = [result.unavailable for result in found]
        if quantity == 'graph_seconds':
            reasons += [result.graph_error for result in found]
        return next(filter(None, reasons), None)

    rows = []
    for result in results:
        measured = asdict(result)
        row = {**measured.pop('run'), **measured, 'seconds': result.seconds, 'host_seconds': result.host_seconds}
        row['spread_percent'] = summarise(result.samples).spread if result.samples else None
        batch_size = result.run.settings(settings).batch_size
        row['images_per_second'] = batch_size / result.seconds if result.samples else None
        row['ratios'] = {quantity: compare(result.run, quantity, result.model, baseline) for quantity in QUANTITIES}
        rows.append(row)
    figures = []
    for figure in chosen.figures if chosen else ():
        cells = []
        for cell in figure.against:
            if cell is None:
                cells.append(None)
                continue
            against, goal = cell
            found = compare(figure.run, figure.quantity, figure.model, against)
            met = None if found is None or goal is None else found['median'] <= goal
            unavailable = why_not(figure.run, figure.quantity, figure.model, against)
            cells.append({'against': against, 'goal': goal, 'ratio': found, 'met': met, 'unavailable': unavailable})
        figures.append({**asdict(figure), 'against': cells})
    return {
        'title': title,
        'machine': machine,
        'settings': asdict(settings),
        'baseline': baseline,
        'results': rows,
        'columns': list(chosen.columns) if chosen else [],
        'figures': figures,
    }


def markdown(report: Report) -> str:
    """The report as Markdown: the set's figures, how they were measured, and the tables of all models."""
    parts = [f'# {report["title"]}']
    if report['figures']:
        parts.append(figures_table(report))
    parts.append(_how(report))
    for run, rows in rows_by_run(report).items():
        parts += [f'## {run.title[0].upper()}{run.title[1:]}', *_models_tables(rows, report['baseline'])]
    return '\n\n'.join(parts) + '\n'


def rows_by_run(report: Report) -> dict[Run, list[Row]]:
    """The rows of each run: inference first, and first with the benchmark's own settings."""
    runs: dict[Run, list[Row]] = {}
    for row in report['results']:
        run = Run(row['mode'], row.get('batch_size'), row.get('size'), row.get('threads'))
        runs.setdefault(run, []).append(row)
    return dict(sorted(runs.items(), key=lambda item: (list(MODES).index(item[0].mode), item[0] != Run(item[0].mode))))


def figures_table(report: Report) -> str:
    """A set's figures, one row each; what was not measured says so."""
    lines = [['', *report['columns']], ['---'] * (1 + len(report['columns']))]
    lines += [[figure['label'], *map(_cell, figure['against'])] for figure in report['figures']]
    return markdown_table(lines)


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ''
    goal = '' if cell['goal'] is None else f'goal {cell["goal"]:.2f}'
    if cell['ratio'] is None:
        missing = NOT_AVAILABLE if cell.get('unavailable') else NOT_MEASURED
        return f'{missing} ({goal})' if goal else missing
    notes = [_spread(cell['ratio'])] if cell['ratio']['spread_percent'] is not None else []
    if goal:
        notes.append(f'{goal}: {"met" if cell["met"] else "missed"}')
    return f'**{cell["ratio"]["median"]:.3f}**' + (f' ({", ".join(notes)})' if notes else '')


def _spread(ratio: dict[str, Any]) -> str:
    return f'spread {ratio["spread_percent"]:.1f} %'


def _models_tables(rows: list[Row], baseline: str) -> list[str]:
    """A table of times and memory, one of the host's part, and why what is missing is."""
    times = {
        'ms per step': _column(rows, 'seconds', '{:.1f}', 1000),
        'spread': _column(rows, 'spread_percent', '{:.1f} %'),
        'images/s': _column(rows, 'images_per_second', '{:.1f}'),
        f'time, `{baseline}` = 1': _ratios(rows, 'seconds', baseline),
    }
    for quantity, name, unit in (('saved_mib', 'saved', 'MiB per image'), ('peak_mib', 'peak', 'MiB')):
        times[f'{name}, {unit}'] = _column(rows, quantity, '{:.1f}')
        times[f'{name}, `{baseline}` = 1'] = _ratios(rows, quantity, baseline)
    host = {'way': [_ways(row.get('ways')) for row in rows]}
    host['first step, s'] = _column(rows, 'first_step_seconds', '{:.2f}')
    for quantity, name, form, factor in (
        ('python_calls', 'Python calls', '{:,}', 1),
        ('operator_calls', 'operator calls', '{:,}', 1),
        ('host_seconds', 'host, ms', '{:.2f}', 1000),
        ('launches', 'kernel launches', '{:,}', 1),
        ('kernel_seconds', 'kernels, ms', '{:.2f}', 1000),
        ('graph_seconds', 'CUDA graph, ms', '{:.2f}', 1000),
    ):
        ratios = (row['ratios'].get(quantity) for row in rows)
        host[name] = [
            f'{value} ({ratio["median"]:.2f})' if ratio else value
            for value, ratio in zip(_column(rows, quantity, form, factor), ratios)
        ]
    graphs = host['CUDA graph, ms']
    host['CUDA graph, ms'] = [cell or 'not possible' * bool(row.get('graph_error')) for cell, row in zip(graphs, rows)]
    notes = _reasons(rows, 'unavailable', 'Not available') + _reasons(rows, 'graph_error', 'CUDA graph not possible')
    table = _models_table(rows, host)
    caption = f"The host's part, in brackets `{baseline}` = 1:" if table else ''
    return [part for part in (_models_table(rows, times), caption, table, '\n'.join(notes)) if part]


def _reasons(rows: list[Row], key: str, name: str) -> list[str]:
    """'- Not available (why): `model`, `model`.' for every reason that rows have."""
    models: dict[str, list[str]] = {}
    for row in rows:
        if row.get(key):
            models.setdefault(row[key], []).append(f'`{row["model"]}`')
    return [f'- {name} ({reason}): {", ".join(labels)}.' for reason, labels in models.items()]


def _models_table(rows: list[Row], columns: dict[str, list[str]]) -> str:
    """One row per model; columns that no model has a figure for are left out, and a table without any is empty."""
    columns = {head: cells for head, cells in columns.items() if any(cells)}
    if not columns:
        return ''
    heads, names = ['model', *columns], [f'`{row["model"]}`' for row in rows]
    return markdown_table([heads, ['---', *['---:'] * len(columns)], *zip(names, *columns.values())])


def _column(rows: list[Row], quantity: str, form: str, factor: float = 1) -> list[str]:
    values = (row.get(quantity) for row in rows)
    return ['' if value is None else form.format(factor * value) for value in values]


def _ratios(rows: list[Row], quantity: str, baseline: str) -> list[str]:
    def cell(row: Row) -> str:
        ratio = row['ratios'].get(quantity)
        if ratio is None:
            return ''
        if row['model'] == baseline:
            return '1'
        return f'{ratio["median"]:.3f}' + ('' if ratio['spread_percent'] is None else f' ({_spread(ratio)})')

    return [cell(row) for row in rows]


def _ways(ways: dict[str, int] | None) -> str:
    return ', '.join(f'{way} {units}' for way, units in (ways or {}).items())


def _how(report: Report) -> str:
    settings, machine = report['settings'], report['machine']
    precision = settings['dtype'] if settings['dtype'] == 'float32' else f'{settings["dtype"]} autocast'
    text = (
        f'Batch {settings["batch_size"]}, {settings["size"]} x {settings["size"]}, {precision}, '
        f'{settings["memory_format"]}; medians of {settings["repeats"]} interleaved repeats, ratios taken within each '
        'repeat; spread: interquartile range by median; bytes saved: tensors that autograd keeps of one image, by '
        'storage, parameters and buffers left out'
    )

    def has(quantity: str) -> bool:
        return any(row.get(quantity) is not None for row in report['results'])

    if has('python_calls'):
        text += (
            '; Python calls and operator calls: of a forward pass, in training with the loss and the backward pass, '
            "without the optimizer's and without those that operators make themselves"
        )
    if has('ways'):
        text += '; way: how many SK units took which'
    if has('host_seconds'):
        text += "; host: until the step's Python returns, begun with an idle GPU"
    text += '.'
    if machine is None:
        return text + ' Measured on no machine so far.'
    versions = [f'{name} {machine[name]}' for name in ('torch', 'timm', 'torchvision') if machine[name]]
    where = [machine['gpu']] if machine['gpu'] else []
    where.append(f'{machine["cpu"]} ({machine["cpu_capability"]}), {machine["cores"]} cores')
    where.append(f'{machine["threads"]} thread{"s" * (machine["threads"] != 1)}')
    if machine.get('keeps_freed_memory'):
        where.append('freed memory kept')
    where += [f'Python {machine["python"]}', *versions, machine['date'][:10]]
    return f'{text} Measured on: {", ".join(where)}.'
