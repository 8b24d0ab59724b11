"""The report's figures, by hand."""

import csv

import numpy as np
import pytest
import torch

pytest.importorskip('mmpretrain')

from _finetune import reporting
from mmpretrain.evaluation import AveragePrecision
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


def test_map(predictions, tmp_path):
    """``a``: 1 and 2/3. ``b``: 1/2. ``c`` has no positive and counts as 0, as in mmpretrain's AveragePrecision."""
    scores = [[0.9, 0.2, 0.1], [0.6, 0.1, 0.4], [0.5, 0.7, 0.6]]
    found = predictions(scores, [[1, 1, 0], [0, 0, 0], [1, 0, 0]], multi_label=True)
    metrics = reporting.write(found, tmp_path / 'report')
    assert metrics['mAP'] == pytest.approx(100 * ((1 + 2 / 3) / 2 + 1 / 2) / 3, abs=0.01)
    metric = AveragePrecision()
    metric.process(
        {}, [dict(pred_score=torch.tensor(s), gt_score=torch.tensor(t)) for s, t in zip(found.scores, found.truth)]
    )
    assert metrics['mAP'] == pytest.approx(metric.evaluate(3)['multi-label/mAP'], abs=0.01)


def test_map_without_any_positive(predictions, tmp_path):
    found = predictions([[0.9, 0.2, 0.1], [0.6, 0.1, 0.4]], [[0, 0, 0], [0, 0, 0]], multi_label=True)
    assert reporting.write(found, tmp_path / 'report')['mAP'] == 0


def test_names_with_dollars(predictions, tmp_path):
    r"""They are drawn as they are: ``$x^{$`` is no formula, and ``a\$b`` keeps its backslash."""
    names = ('$x^{$', r'a\$b', '5 $')
    found = predictions([[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1]], np.eye(3, dtype=int), classes=names)
    reporting.write(found, tmp_path / 'report')
    assert [row[0] for row in rows_of(tmp_path / 'report' / 'classes.csv')[1:]] == list(names)
    axis = reporting._draw_matrix(np.eye(3), names, 'predicted').axes[0]
    table = reporting._draw_table(['class', 'f1'], [[name, 0.5] for name in names]).axes[0].tables[0]
    for texts in (axis.get_xticklabels(), axis.get_yticklabels(), [table[i, 0].get_text() for i in (1, 2, 3)]):
        assert [text._preprocess_math(text.get_text()) for text in texts] == [(name, False) for name in names]
