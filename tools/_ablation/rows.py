"""What is run, with which settings, and the files of rows, one for each run, that a kill can cut but not spoil."""

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

OPTIONS = ('train_images', 'epochs', 'test_images', 'batch_size')
# Images of the training and epochs, by data set; for `scaled` such that twice the epochs add less than a point.
LENGTHS = {'scaled': (6000, 40), 'garments': (60000, 16), 'scenes': (6000, 40), 'digits': (6000, 40)}
MAIN = ('scaled', 'narrow')  # data set and size
# Where networks are trained: on every data set in the narrow size, and in the wide one on MAIN's.
PLACES = [*((data, 'narrow') for data in LENGTHS), (MAIN[0], 'wide')]
LONGER_SEEDS = 3  # where both data and size are MAIN; one elsewhere
SCALES = (0.6, 0.8, 1.1, 1.5, 2.0)  # of the test sets: all the trained range
NEW_SCALES = (0.5, 2.5)  # never trained on; at 2.5 an object has 70 pixels, 6 more than the canvas

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A network and what chance it meets: ``seed`` of its weights, ``order`` of its images (the seed's own where None).

    ``longer`` is training for twice the epochs, which shows how far the others are from where they go.
    """

    network: str
    seed: int
    data: str = 'scaled'
    size: str = 'narrow'
    order: int | None = None
    longer: bool = False

    @classmethod
    def of(cls, row: Row) -> 'Run':
        return cls(row['network'], row['seed'], row['data'], row['size'], row['order'], row['longer'])

    @property
    def images(self) -> int:
        """The seed of the images' order."""
        return self.seed if self.order is None else self.order

    def __str__(self) -> str:
        parts = [self.network, self.size, self.data, f'seed {self.seed}']
        parts += [f'order {self.order}'] * (self.order is not None) + ['twice as long'] * self.longer
        return ', '.join(parts)


@dataclass(frozen=True)
class Settings:
    """What all runs of a results file on one data set share.

    ``epochs`` times ``train_images`` objects, which a seed chooses, each drawn anew every epoch; the test sets are of
    the first ``test_images`` objects. Where a data set has fewer, they come several times. What is None of the first
    two is that of LENGTHS: see :meth:`on`.
    """

    train_images: int | None = None
    epochs: int | None = None
    test_images: int = 10000
    batch_size: int = 128
    learning_rate: float = 0.02
    weight_decay: float = 0.02
    scale: tuple[float, float] = (0.6, 2.0)
    ema: float = 0.05  # the share of the steps that the average of the weights looks back on
    amp: bool = False

    @classmethod
    def of(cls, row: Row) -> 'Settings':
        """Those that a row of the results was made with."""
        return cls(**{**row['settings'], 'scale': tuple(row['settings']['scale'])})

    def on(self, data: str) -> 'Settings':
        """These, with the data set's own images and epochs where there are none."""
        images, epochs = LENGTHS[data]
        return replace(
            self,
            train_images=images if self.train_images is None else self.train_images,
            epochs=epochs if self.epochs is None else self.epochs,
        )

    def check(self) -> None:
        """Raises ValueError for what cannot be run; where something is None, see :meth:`on`."""
        for name in ('train_images', 'epochs', 'test_images'):
            if getattr(self, name) < 1:
                raise ValueError(f'--{name.replace("_", "-")} {getattr(self, name)}: must be at least 1')
        if not 2 <= self.batch_size <= self.train_images:
            raise ValueError(f'--batch-size {self.batch_size}: must be from 2 to --train-images {self.train_images}')


def longer_seeds(seeds: Sequence[int], data: str, size: str) -> list[int]:
    """Those of ``seeds`` with which claim (a)'s networks are trained for twice as long, unless others are named."""
    return list(seeds[: LONGER_SEEDS if (data, size) == MAIN else 1])


def find(row: Row, path: str) -> Any:
    """What a row has at 'scales.0.5', say, where keys may hold dots; None where it has nothing there."""
    if path in row:
        return row[path]
    for key, value in row.items():
        if isinstance(value, dict) and path.startswith(f'{key}.'):
            return find(value, path[len(key) + 1 :])
    return None


def rows_of(rows: Sequence[Row], data: str, size: str, longer: bool = False) -> list[Row]:
    """Those of a data set and a size, by seed: those that were trained for as long as usual, or for twice as long."""
    found = [row for row in rows if (row['data'], row['size'], row['longer']) == (data, size, longer)]
    return sorted(found, key=lambda row: row['seed'])


def read_rows(path: Path) -> list[Row]:
    """The whole lines of a JSON-lines file, none where there is no file; the beginning of one that a kill cut is not.

    Raises:
        ValueError: a line that is no JSON object.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(keepends=True), start=1):
        if not line.endswith('\n'):
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f'{path}, line {number}: not JSON: {error}') from error
        if not isinstance(row, dict) or not {'network', 'seed', 'settings'} <= row.keys():
            raise ValueError(f"{path}, line {number}: not a run's row, which has a network, a seed and settings")
        rows.append(row)
    return rows


def append_row(path: Path, row: Row) -> None:
    """Append a line in one write, after cutting off the beginning of one that a kill left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'ab+') as file:
        file.seek(0)
        end = file.read().rfind(b'\n') + 1
        file.truncate(end)
        file.write(json.dumps(row).encode() + b'\n')
        file.flush()
        os.fsync(file.fileno())


def check_same_settings(path: Path, rows: Sequence[Row], settings: Settings, data: Collection[str]) -> None:
    """Raises ValueError where rows of these data sets were made with other settings: they can't stand in one table.

    What a row does not tell of was no setting yet when it was made, by another protocol.
    """
    for row in rows:
        where = row.get('data', 'garments')
        if where not in data:
            continue
        ours = json.loads(json.dumps(asdict(settings.on(where))))
        for name in {**ours, **row['settings']}:
            value, own = row['settings'].get(name), ours.get(name)
            if value != own:
                raise ValueError(
                    f'{path} has runs on {where} of {name}={value!r}, and this is {name}={own!r}: choose another --out'
                )
