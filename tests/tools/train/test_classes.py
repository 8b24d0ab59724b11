"""Fewer classes than the data has, and a top-k above them: one line before the first step."""

import pytest

pytest.importorskip('mmpretrain')

from sk_plugins.openmmlab.runtime.configs import ConfigError

NARROW = ('model.backbone.layers=1,1,1,1', 'train_dataloader.dataset.indices=32', 'train_cfg.max_epochs=1')


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (
            ['model.head.num_classes=7'],
            r'^model\.head\.num_classes=7: train_dataloader has 10 classes, 0, 1, 2 and 7 more$',
        ),
        (
            ['model.head.num_classes=7', *(f'{s}_dataloader.dataset.metainfo.classes=a,b' for s in ('train', 'val'))],
            r'^model\.head\.num_classes=7: train_dataloader has labels up to 9, which takes 10 classes$',
        ),
        (
            ['val_evaluator.topk=1,11'],
            r'^val_evaluator\.topk=\(1, 11\): the model has 10 classes, so top-11 cannot be measured; topk=\(1,\) can$',
        ),
    ],
    ids=['classes', 'labels', 'topk'],
)
def test_refused(train, tmp_path, options, said):
    with pytest.raises(ConfigError, match=said):
        train('sknet_digits', tmp_path, *NARROW, *options)
    assert not list(tmp_path.glob('*.pth'))
