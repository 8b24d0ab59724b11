"""The settings of a run, and the files of rows, one for each run, that a kill can cut but not spoil."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SIZES = ('small', 'medium', 'large')
OPTIONS = ('train_images', 'epochs', 'test_images', 'batch_size')

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What all runs of a results file share.

    ``epochs`` times ``train_images`` garments, each placed elsewhere every epoch; the test set is the first
    ``test_images`` of its garments, placed once for all.
    """

    train_images: int = 24000
    epochs: int = 1
    test_images: int = 10000
    batch_size: int = 32
    learning_rate: float = 0.004
    weight_decay: float = 0.02
    scale: tuple[float, float] = (0.6, 2.0)

    @classmethod
    def of(cls, row: Row) -> 'Settings':
        """Those that a row of the results was made with."""
        return cls(**{**row['settings'], 'scale': tuple(row['settings']['scale'])})

    def check(self) -> None:
        """Raises ValueError for what cannot be run."""
        for name in ('train_images', 'epochs', 'test_images'):
            if getattr(self, name) < 1:
                raise ValueError(f'--{name.replace("_", "-")} {getattr(self, name)}: must be at least 1')
        if not 2 <= self.batch_size <= self.train_images:
            raise ValueError(f'--batch-size {self.batch_size}: must be from 2 to --train-images {self.train_images}')


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


def check_same_settings(path: Path, rows: Sequence[Row], settings: Settings) -> None:
    """Raises ValueError where rows were made with other settings: they can't stand in one table."""
    ours = json.loads(json.dumps(asdict(settings)))
    for row in rows:
        for name, value in row['settings'].items():
            if value != ours[name]:
                raise ValueError(
                    f'{path} has runs of {name}={value!r}, and this is {name}={ours[name]!r}: choose another --out'
                )
