"""Figures that belong together, with their goals: ``--set standard``, ``--set host`` and ``--set gpu``."""

from dataclasses import dataclass

from .models import Variant
from .settings import HOST, Run, Settings


@dataclass(frozen=True)
class Figure:
    """A row of a set's table: a quantity of ``model`` by that of another for each of the set's columns.

    ``quantity`` is one of ``reporting.QUANTITIES``. ``against`` has (model, goal) per column, the goal None where there
    is none, or None for an empty cell. Batch, size and threads are the set's where they are None.
    """

    label: str
    mode: str
    quantity: str
    model: str
    against: tuple[tuple[str, float | None] | None, ...]
    batch_size: int | None = None
    size: int | None = None
    threads: int | None = None

    @property
    def run(self) -> Run:
        return Run(self.mode, self.batch_size, self.size, self.threads)

    def models(self) -> list[str]:
        return [self.model, *(cell[0] for cell in self.against if cell is not None)]


@dataclass(frozen=True)
class Set:
    """Figures that belong together, the settings they are measured in, and the baseline of the tables of times."""

    title: str
    settings: Settings
    baseline: str
    columns: tuple[str, ...]
    figures: tuple[Figure, ...]

    def runs(self) -> dict[Run, list[Variant]]:
        """The models of each run, in the order the figures first name them."""
        runs: dict[Run, dict[Variant, None]] = {}
        for figure in self.figures:
            for model in figure.models():
                runs.setdefault(figure.run, {})[Variant.parse(model)] = None
        return {run: list(variants) for run, variants in runs.items()}


TIMMS, RESNEXT = 'skresnext50_32x4d', 'resnext50_32x4d'
COLUMNS = (f'timm `{TIMMS}` = 1', 'ResNeXt-50 32x4d = 1')
PLAIN, TRITON = ('sknet50[sk_kwargs.backend=plain]', 'sknet50[sk_kwargs.backend=triton]')


def _figure(
    label: str,
    mode: str,
    quantity: str,
    goals: tuple[float | None, float | None] = (None, None),
    how: str = '',
    model: str = 'sknet50',
    **run: int,
) -> Figure:
    """SKNet-50 against timm's and ResNeXt-50, all of them built ``how``, with a goal for each."""
    against = tuple((f'{name}{how}', goal) for name, goal in zip((TIMMS, RESNEXT), goals))
    return Figure(label, mode, quantity, f'{model}{how}', against, **run)


def _host_figures(model: str, path: str, goals: tuple[float | None, float | None]) -> list[Figure]:
    """What the host does for ``model``; the goals are those of the Python calls."""
    return [
        _figure(
            f'{name}, {step}, {path}',
            mode,
            quantity,
            goals if quantity == 'python_calls' else (None, None),
            model=model,
        )
        for quantity, name in (
            ('python_calls', 'Python calls'),
            ('operator_calls', 'operator calls'),
            ('seconds', 'time'),
        )
        for mode, step in (('infer', 'inference'), ('train', 'training step'))
    ]


_CALLS = (1.0, 1.3)

SETS = {
    'standard': Set(
        'SKNet-50 on a CPU',
        Settings(threads=2),
        RESNEXT,
        COLUMNS,
        (
            _figure('eager inference, unfused', 'infer', 'seconds', (0.66, 1.20)),
            Figure(
                'eager inference, `fuse` on both',
                'infer',
                'seconds',
                'sknet50:fuse',
                (None, (f'{RESNEXT}:fuse', 1.15)),
            ),
            _figure('compiled inference', 'infer', 'seconds', (0.95, 1.10), ':compile'),
            _figure('training step, eager', 'train', 'seconds', (0.80, 1.20)),
            _figure('bytes saved for backward', 'train', 'saved_mib', (0.76, 1.13)),
            _figure('Python calls, inference', 'infer', 'python_calls', **HOST),
            _figure('Python calls, training step', 'train', 'python_calls', **HOST),
            _figure('inference, 2 x 32 x 32, 1 thread', 'infer', 'seconds', **HOST),
            _figure('training step, 2 x 32 x 32, 1 thread', 'train', 'seconds', **HOST),
        ),
    ),
    'host': Set(
        "SKNet-50's cost on the host",
        Settings(**HOST),
        RESNEXT,
        COLUMNS,
        (
            *_host_figures('sknet50:stub', 'GPU path', _CALLS),
            *_host_figures('sknet50', 'CPU path', (None, None)),
            *_host_figures(PLAIN, "`backend='plain'`", (None, None)),
        ),
    ),
    'gpu': Set(
        'SKNet-50 on a GPU',
        Settings(device='cuda', dtype='bfloat16', batch_size=128),
        RESNEXT,
        COLUMNS,
        (
            _figure('training step, eager', 'train', 'seconds', (0.45, 1.05)),
            _figure("training step, eager, `backend='plain'`", 'train', 'seconds', model=PLAIN),
            _figure('training step, compiled', 'train', 'seconds', (0.75, 1.30), ':compile'),
            _figure("training step, compiled, `backend='plain'`", 'train', 'seconds', how=':compile', model=PLAIN),
            _figure("training step, compiled, `backend='triton'`", 'train', 'seconds', how=':compile', model=TRITON),
            _figure('inference, eager', 'infer', 'seconds', (0.40, 1.25)),
            _figure("inference, eager, `backend='plain'`", 'infer', 'seconds', model=PLAIN),
            Figure(
                'inference, eager, `fuse` on both',
                'infer',
                'seconds',
                'sknet50:fuse',
                (None, (f'{RESNEXT}:fuse', None)),
            ),
            _figure('inference, compiled', 'infer', 'seconds', (0.85, 1.25), ':compile'),
            _figure("inference, compiled, `backend='plain'`", 'infer', 'seconds', how=':compile', model=PLAIN),
            _figure("inference, compiled, `backend='triton'`", 'infer', 'seconds', how=':compile', model=TRITON),
            _figure('inference, batch 1, eager', 'infer', 'seconds', (0.80, 1.50), batch_size=1),
            _figure("inference, batch 1, eager, `backend='plain'`", 'infer', 'seconds', model=PLAIN, batch_size=1),
            _figure('inference, batch 8, eager', 'infer', 'seconds', batch_size=8),
            _figure("inference, batch 8, eager, `backend='plain'`", 'infer', 'seconds', model=PLAIN, batch_size=8),
            _figure('peak memory of a training step, eager', 'train', 'peak_mib', (0.72, 1.08)),
            _figure('peak memory of a training step, compiled', 'train', 'peak_mib', how=':compile'),
            _figure(
                'host time of a training step, eager, 4 x 64 x 64',
                'train',
                'host_seconds',
                (0.60, 1.20),
                batch_size=4,
                size=64,
            ),
            _figure('host time of inference, eager, 4 x 64 x 64', 'infer', 'host_seconds', batch_size=4, size=64),
            _figure('training step as a CUDA graph', 'train', 'graph_seconds'),
            _figure('inference as a CUDA graph', 'infer', 'graph_seconds'),
            _figure('kernel launches of a training step, eager', 'train', 'launches'),
            _figure('kernel launches of inference, eager', 'infer', 'launches'),
        ),
    ),
}
