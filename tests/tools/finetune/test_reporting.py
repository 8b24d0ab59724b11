"""The report's figures, by hand."""

import csv

import numpy as np
import pytest

pytest.importorskip('mmpretrain')

from _finetune import reporting
from PIL import Image


def rows_of(path):
    with path.open(newline='', encoding='utf-8') as file:
        return list(csv.reader(file))


@pytest.fixture
def predictions(tmp_path):
    """``predictions(scores, truth)``: of pictures that are there."""

    def make(scores, truth, multi_label=False, classes=('a', 'b', 'c')):
        paths = [str(tmp_path / f'{i}.png') for i in range(len(scores))]
        for path in paths:
            Image.new('RGB', (8, 8)).save(path)
        scores, truth = np.array(scores, dtype=np.float32), np.array(truth)
        return reporting.Predictions(classes, tuple(paths), scores, truth, multi_label)

    return make


def test_a_mistakes_score_is_that_of_the_predicted_label(predictions, tmp_path):
    scores = [[0.05, 0.5, 0.45], [0.3, 0.7, 0.0], [0.6, 0.3, 0.1]]
    found = predictions(scores, [[1, 0, 0], [1, 0, 0], [1, 0, 0]])
    reporting.write(found, tmp_path / 'report')
    _, *rows = rows_of(tmp_path / 'report' / 'mistakes.csv')
    assert [row[1:] for row in rows] == [['a', 'b', '0.7000'], ['a', 'b', '0.5000']]
    assert [row[0] for row in rows] == [found.paths[1], found.paths[0]]


def test_a_mistakes_score_in_a_multi_label_set(predictions, tmp_path):
    """The second picture lacks a label that it has, by 0.9."""
    found = predictions([[0.8, 0.6, 0.1], [0.1, 0.2, 0.3]], [[1, 0, 0], [1, 0, 0]], multi_label=True)
    reporting.write(found, tmp_path / 'report')
    _, *rows = rows_of(tmp_path / 'report' / 'mistakes.csv')
    assert [row[1:] for row in rows] == [['a', 'none', '0.9000'], ['a', 'a;b', '0.6000']]
