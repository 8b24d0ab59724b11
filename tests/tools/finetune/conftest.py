"""Small folders of pictures, a narrow network, and runs of finetune that several tests look at."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Squares of a colour with some noise: a network of any width tells them apart.
COLOURS = {'blue': (40, 60, 200), 'green': (60, 180, 60), 'red': (200, 40, 40)}
NARROW = """model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='SKNet', depth=26, layers=(1, 1, 1, 1), channels=(16, 32, 64, 128), cardinality=8, base_width=16
    ),
)
"""


def draw(path: Path, colour: tuple[int, int, int], seed: int, size: tuple[int, int] = (24, 28)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).normal(0, 25, (*size, 3))
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope='session')
def write_pictures():
    """``write_pictures(folder, counts)``: so many pictures of each colour in a folder of its name."""

    def write(folder: Path, counts: dict[str, int], start: int = 0) -> Path:
        for number, (name, count) in enumerate(counts.items()):
            for i in range(count):
                draw(folder / name / f'{i}.png', COLOURS.get(name, (120, 120, 120)), start + 1000 * number + i)
        return folder

    return write


@pytest.fixture(scope='session')
def narrow(tmp_path_factory):
    """A config with a narrow SKNet-26, whose name is ``--model``."""
    path = tmp_path_factory.mktemp('narrow') / 'narrow.py'
    path.write_text(NARROW)
    return str(path)


@pytest.fixture(scope='session')
def small(narrow):
    """Words for a run of seconds."""
    return ['--model', narrow, '--epochs', '2', '--size', '32', '--batch-size', '8', '--workers', '0']


@pytest.fixture(scope='session')
def finetune(load_tool):
    """tools/finetune.py's main. mmengine names logs by the second; here each run has a name of its own."""
    pytest.importorskip('mmpretrain')
    tool, number = load_tool('finetune'), itertools.count()
    from _finetune import training

    build = training.build

    def named(cfg, *args):
        cfg.experiment_name = f'finetune_{next(number)}'
        return build(cfg, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, 'build', named)
        yield tool.main


@pytest.fixture(scope='session')
def colours(write_pictures, tmp_path_factory):
    """Twelve pictures of each of three colours."""
    return write_pictures(tmp_path_factory.mktemp('data') / 'colours', dict.fromkeys(COLOURS, 12))


@pytest.fixture(scope='session')
def colours_run(finetune, colours, small, tmp_path_factory):
    """The work dir of two epochs on them. Not to be written into, but for ``hub``."""
    work_dir = tmp_path_factory.mktemp('runs') / 'colours'
    words = [str(colours), *small, '--from-scratch', '--work-dir', str(work_dir), '--lr', '0.01']
    finetune(words)
    return work_dir


@pytest.fixture(scope='session')
def labels_run(finetune, small, tmp_path_factory):
    """The work dir of a run with several labels an image: which colours are in its halves."""
    folder = tmp_path_factory.mktemp('data') / 'halves'
    folder.mkdir()
    records = []
    for i in range(24):
        names = [name for k, name in enumerate(COLOURS) if i >> k & 1]
        parts = [COLOURS[name] for name in names] or [(120, 120, 120)]
        picture = np.concatenate([np.full((24, 24 // len(parts), 3), part, np.uint8) for part in parts], axis=1)
        Image.fromarray(picture).save(folder / f'{i}.png')
        records.append(dict(image=f'{i}.png', labels=names))
    (folder / 'list.json').write_text(json.dumps(records))
    work_dir = tmp_path_factory.mktemp('runs') / 'halves'
    finetune([str(folder / 'list.json'), *small, '--from-scratch', '--work-dir', str(work_dir)])
    return work_dir
