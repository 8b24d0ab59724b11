"""As many classes as the data has: a classifier with fewer fails of it in a loss, after a while and without a name."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..._text import several
from .configs import ConfigError
from .distributed import unwrap

__all__ = ['ClassCountHook']

MOST_LOOKED_AT = 50_000  # items, of which each is unpickled


@HOOKS.register_module()
class ClassCountHook(Hook):
    """Compares the classes of an ``ImageClassifier``'s head with the data's, and with the ``topk`` that is measured.

    Raises:
        ConfigError: before the first step, where the head has fewer classes than the data, or ``topk`` is more than
            there are classes.
    """

    priority = 'VERY_HIGH'
    _trains = False

    def before_train(self, runner: Runner) -> None:
        _check_data(runner.model, runner.train_dataloader, 'train')
        if runner.val_loop is not None:
            _check(runner.model, runner.val_loop, 'val')
        self._trains = True

    def before_val(self, runner: Runner) -> None:
        if not self._trains:
            _check(runner.model, runner.val_loop, 'val')

    def before_test(self, runner: Runner) -> None:
        _check(runner.model, runner.test_loop, 'test')


def _check(model: Any, loop: Any, split: str) -> None:
    _check_data(model, loop.dataloader, split)
    classes = _classes(model)
    for metric in getattr(getattr(loop, 'evaluator', None), 'metrics', ()):
        topk = getattr(metric, 'topk', None)
        topk = topk if isinstance(topk, tuple | list) else [topk]
        most = max((k for k in topk if isinstance(k, int)), default=0)
        if classes is not None and most > classes:
            raise ConfigError(
                f'{split}_evaluator.topk={tuple(topk)}: the model has {classes} classes, so top-{most} cannot be '
                'measured; topk=(1,) can'
            )


def _check_data(model: Any, loader: Any, split: str) -> None:
    classes, dataset = _classes(model), getattr(loader, 'dataset', None)
    if classes is None or dataset is None:
        return
    names = (getattr(dataset, 'metainfo', None) or {}).get('classes') or ()
    if len(names) > classes:
        raise ConfigError(
            f'model.head.num_classes={classes}: {split}_dataloader has {len(names)} classes, {several(names)}'
        )
    get_labels = getattr(dataset, 'get_cat_ids', None)
    if get_labels is None or len(dataset) > MOST_LOOKED_AT:
        return
    try:
        greatest = max((int(label) for i in range(len(dataset)) for label in get_labels(i)), default=0)
    except (AttributeError, KeyError, TypeError):  # labels of another kind
        return
    if greatest >= classes:
        raise ConfigError(
            f'model.head.num_classes={classes}: {split}_dataloader has labels up to {greatest}, which takes '
            f'{greatest + 1} classes'
        )


def _classes(model: Any) -> int | None:
    """Of a model of mmpretrain's with one head."""
    number = getattr(getattr(unwrap(model), 'head', None), 'num_classes', None)
    return number if isinstance(number, int) else None
