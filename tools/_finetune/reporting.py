"""How good a model is on the images that were held out, class by class, and where it errs most."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from _predict.pictures import open_picture
from matplotlib.figure import Figure
from mmengine.runner import Runner
from mmpretrain.evaluation import AveragePrecision
from sklearn.metrics import (
    ConfusionMatrixDisplay,
    confusion_matrix,
    multilabel_confusion_matrix,
    precision_recall_fscore_support,
)

from sk_plugins._files import write_atomically
from sk_plugins.weights import load_checkpoint
from sk_plugins.weights.fit import load_strictly

__all__ = ['Predictions', 'predict', 'write']

THRESHOLD = 0.5  # above it, a label of a multi-label set counts as predicted
MOST_NAMED = 40  # classes whose names stand at a confusion matrix


@dataclass(frozen=True)
class Predictions:
    """Of N images and C classes: ``paths``, ``scores`` (N, C) of 0 to 1, and ``truth`` (N, C), 0 or 1."""

    classes: tuple[str, ...]
    paths: tuple[str, ...]
    scores: np.ndarray
    truth: np.ndarray
    multi_label: bool

    @property
    def predicted(self) -> np.ndarray:
        """(N, C), 0 or 1: the label with the highest score, or in a multi-label set those above 0.5."""
        if self.multi_label:
            return (self.scores >= THRESHOLD).astype(int)
        return np.eye(len(self.classes), dtype=int)[self.scores.argmax(1)]

    def mistakes(self) -> list[int]:
        """The images with a wrong label, the one that was surest first."""
        wrong = np.flatnonzero((self.predicted != self.truth).any(1))
        return sorted(wrong.tolist(), key=lambda i: -self.sureness(i))

    def sureness(self, i: int) -> float:
        """Of a mistake: the score of the predicted label.

        In a multi-label set the highest score of a label that is not the image's, or the lack of one that is.
        """
        if not self.multi_label:
            return float(self.scores[i].max())
        return float(np.where(self.truth[i], 1 - self.scores[i], self.scores[i]).max())


def predict(runner: Runner, checkpoint: Path, multi_label: bool) -> Predictions:
    """What the model of a checkpoint says of the validation set.

    Raises:
        CheckpointError: the checkpoint is not this network's.
    """
    state_dict, _ = load_checkpoint(checkpoint)
    load_strictly(runner.model, state_dict, checkpoint)
    runner.model.eval()
    loader = runner.val_dataloader
    paths, scores, truth = [], [], []
    classes = tuple(loader.dataset.metainfo['classes'])
    with torch.inference_mode():
        for batch in loader:
            for sample in runner.model.val_step(batch):
                paths.append(sample.img_path)
                scores.append(sample.pred_score.cpu().numpy())
                row = np.zeros(len(classes), dtype=int)
                row[sample.gt_label.cpu().numpy().astype(int)] = 1
                truth.append(row)
    return Predictions(classes, tuple(paths), np.stack(scores), np.stack(truth), multi_label)


def write(found: Predictions, folder: Path) -> dict[str, Any]:
    """Tables (CSV), pictures (PNG) and ``metrics.json`` of the predictions; returns what the last holds.

    Raises:
        OSError: they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, metrics = _rows(found)
    header = ['class', 'images', 'predicted', 'right', 'precision', 'recall', 'f1']
    _write_csv(folder / 'classes.csv', header, rows)
    _save(_draw_table(header, rows), folder / 'classes.png')
    if found.multi_label:
        parts = multilabel_confusion_matrix(found.truth, found.predicted)
        header = ['class', 'true positives', 'false positives', 'false negatives', 'true negatives']
        matrix = [[n, int(m[1, 1]), int(m[0, 1]), int(m[1, 0]), int(m[0, 0])] for n, m in zip(found.classes, parts)]
        _write_csv(folder / 'confusion_matrix.csv', header, matrix)
        _save(_draw_together(found), folder / 'confusion_matrix.png')
    else:
        labels = range(len(found.classes))
        counts = confusion_matrix(found.truth.argmax(1), found.predicted.argmax(1), labels=labels)
        _write_csv(
            folder / 'confusion_matrix.csv',
            ['true \\ predicted', *found.classes],
            [[name, *row] for name, row in zip(found.classes, counts.tolist())],
        )
        _save(_draw_matrix(counts, found.classes, 'predicted'), folder / 'confusion_matrix.png')
    wrong = found.mistakes()
    _write_csv(
        folder / 'mistakes.csv',
        ['image', 'true', 'predicted', 'score'],
        [[found.paths[i], *_words(found, i), f'{found.sureness(i):.4f}'] for i in wrong],
    )
    if wrong:
        _save(_draw_mistakes(found, wrong[:16]), folder / 'mistakes.png')
    else:
        (folder / 'mistakes.png').unlink(missing_ok=True)
    metrics['mistakes'] = len(wrong)
    with write_atomically(folder / 'metrics.json') as partial:
        partial.write_text(json.dumps(metrics, indent=1) + '\n', encoding='utf-8')
    return metrics


def _rows(found: Predictions) -> tuple[list[list[Any]], dict[str, Any]]:
    truth, predicted = found.truth, found.predicted
    precision, recall, f1, support = precision_recall_fscore_support(truth, predicted, average=None, zero_division=0)
    right = (truth & predicted).sum(0)
    rows = [
        [name, int(n), int(s), int(r), round(float(p), 4), round(float(c), 4), round(float(f), 4)]
        for name, n, s, r, p, c, f in zip(found.classes, support, predicted.sum(0), right, precision, recall, f1)
    ]
    metrics: dict[str, Any] = dict(images=len(truth), f1_macro=round(100 * float(np.mean(f1)), 2))
    if found.multi_label:
        # As in training: a label without positives counts as 0.
        metrics['mAP'] = round(float(AveragePrecision.calculate(found.scores, truth)), 2)
    else:
        order = np.argsort(-found.scores, axis=1)
        for k in (1, 5):
            if k == 1 or len(found.classes) > k:
                hits = (order[:, :k] == truth.argmax(1)[:, None]).any(1)
                metrics[f'top{k}'] = round(100 * float(hits.mean()), 2)
    return rows, metrics


def _words(found: Predictions, i: int) -> tuple[str, str]:
    """The true labels and those that were predicted."""
    true, predicted = (
        ';'.join(name for name, here in zip(found.classes, row) if here) or 'none'
        for row in (found.truth[i], found.predicted[i])
    )
    return true, predicted


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with write_atomically(path) as partial, partial.open('w', newline='', encoding='utf-8') as file:
        csv.writer(file).writerows([header, *rows])


def _save(figure: Figure, path: Path) -> None:
    with write_atomically(path) as partial:
        figure.savefig(partial, dpi=120, bbox_inches='tight', format='png')


def _draw_matrix(counts: np.ndarray, classes: Sequence[str], predicted: str) -> Figure:
    """Rows by their share, with the counts where there is room for them."""
    number = len(classes)
    side = min(16.0, 2.5 + 0.42 * number)
    figure = Figure(figsize=(side, side))
    axis = figure.subplots()
    named = number <= MOST_NAMED
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    display = ConfusionMatrixDisplay(shares, display_labels=list(map(_plain, classes)) if named else None)
    display.plot(ax=axis, cmap='Blues', include_values=False, colorbar=False, xticks_rotation='vertical')
    if named:
        for (i, j), count in np.ndenumerate(counts):
            if count:
                color = 'white' if shares[i, j] > 0.5 else 'black'
                axis.text(j, i, str(count), ha='center', va='center', color=color, fontsize=7)
    else:
        axis.set_xticks([])
        axis.set_yticks([])
    axis.set_xlabel(predicted)
    axis.set_ylabel('true')
    return figure


def _draw_together(found: Predictions) -> Figure:
    """Of a multi-label set: how often each label is predicted of the images that have another."""
    counts = found.truth.T @ found.predicted
    return _draw_matrix(counts, found.classes, 'predicted of images that have it')


def _draw_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Figure:
    """The hundred classes with the lowest F1 at most."""
    chosen = sorted(rows, key=lambda row: row[-1])[:100]
    cells = [[f'{cell:.2f}' if isinstance(cell, float) else _plain(str(cell)) for cell in row] for row in chosen]
    figure = Figure(figsize=(5.5, 0.5 + 0.25 * len(cells)))
    axis = figure.subplots()
    axis.axis('off')
    table = axis.table(cells, colLabels=header, loc='center', cellLoc='right')
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    table.auto_set_column_width(range(len(header)))
    for i, row in enumerate(chosen, start=1):
        table[i, len(header) - 1].set_facecolor(mpl.colormaps['RdYlGn'](0.15 + 0.7 * row[-1]))
    return figure


def _draw_mistakes(found: Predictions, chosen: Sequence[int]) -> Figure:
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(2.6 * columns, 3.1 * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis('off')
    for axis, i in zip(axes.flat, chosen):
        path = Path(found.paths[i])
        axis.imshow(open_picture(str(path)))
        true, predicted = _words(found, i)
        name = Path(*path.parts[-2:]).as_posix()
        text = f'{_cut(name)}\ntrue: {_cut(true)}\npredicted: {_cut(predicted)} ({found.sureness(i):.0%})'
        axis.set_title(text, fontsize=7, parse_math=False)
    figure.tight_layout()
    return figure


def _cut(text: str, most: int = 34) -> str:
    return text if len(text) <= most else f'...{text[3 - most :]}'


def _plain(text: str) -> str:
    """For matplotlib, to which dollars are marks of formulas."""
    return text.replace('$', r'\$')
