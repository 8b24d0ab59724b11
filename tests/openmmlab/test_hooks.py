"""The project's hooks in mmengine's runner."""

import importlib.util
import json
from types import SimpleNamespace

import pytest

pytest.importorskip('mmpretrain')

import mmengine.model
import numpy as np
import torch
from helpers.tolerances import assert_close
from mmengine.config import Config
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmpretrain.models import ClsDataPreprocessor
from mmpretrain.structures import DataSample
from mmpretrain.visualization import UniversalVisualizer
from PIL import Image

import sk_plugins.mmpretrain_models  # noqa: F401 - registers the hook
from sk_plugins._resources import find_config
from sk_plugins.analysis import attention_scalars, recording
from sk_plugins.openmmlab.hooks import PictureHook, SKAttentionHook

OPTIONS = {
    'train_cfg.max_epochs': 1,
    'train_dataloader.batch_size': 8,
    'train_dataloader.dataset.indices': 32,
    'val_dataloader.dataset.indices': 8,
    'model.backbone.norm_cfg.type': 'BN',
    'model.backbone.channels': (16, 16, 16, 16),
    'model.head.in_channels': 64,
    'default_hooks.checkpoint': None,
}


def runner(work_dir, name, backends=('LocalVisBackend',), **hook):
    config = Config.fromfile(find_config('sknet_digits'))
    config.merge_from_dict(OPTIONS)
    config.work_dir = str(work_dir)
    config.experiment_name = name
    config.custom_hooks = [dict(type='SKAttentionHook', **hook)]
    backends = [dict(type=backend) for backend in backends]
    config.visualizer = dict(type='UniversalVisualizer', name=name, vis_backends=backends)
    config.randomness = dict(seed=0)
    return Runner.from_cfg(config)


class Witness(SKAttentionHook):
    """Keeps what a record of its own around the same iterations gives."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = {}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if self._recording is not None:
            self._recording.__exit__()
            self.seen[runner.iter + 1] = attention_scalars(self._recording)
            self._recording = None


def scalars(work_dir):
    (path,) = work_dir.rglob('vis_data/scalars.json')
    rows = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
    return {row['step']: row for row in rows if any(key.startswith('attention/') for key in row)}


def test_writes_to_the_visualizer(tmp_path):
    tensorboard = importlib.util.find_spec('tensorboard') is not None
    backends = ('LocalVisBackend', *(['TensorboardVisBackend'] if tensorboard else []))
    run = runner(tmp_path, 'attention', backends, interval=2)
    witness = Witness(interval=2, units=['SK_2_1', 'SK_5_2'])
    run.register_hook(witness)
    run.train()
    written = scalars(tmp_path)
    assert list(written) == [2, 4]
    names = [f'SK_{stage}_{i}' for stage in range(2, 6) for i in (1, 2)]
    own = {key: value for key, value in written[2].items() if key != 'step'}
    assert list(own) == [f'attention/{name}/{what}' for name in names for what in ('3x3', '5x5', 'entropy')]
    for step, row in written.items():
        assert len(witness.seen[step]) == 2 * 3
        for key, value in witness.seen[step].items():
            assert row[key] == value
        for name in names:
            whole = row[f'attention/{name}/3x3'] + row[f'attention/{name}/5x5']
            assert_close(whole, 1.0, length=2, dtype=torch.float32)
            assert 0 < row[f'attention/{name}/entropy'] <= 0.6932
    assert not recording._watchers  # nothing is recorded any more
    if tensorboard:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (path,) = tmp_path.rglob('events.out.tfevents*')
        events = EventAccumulator(str(path)).Reload()
        assert set(own) <= set(events.Tags()['scalars'])
        for event in events.Scalars('attention/SK_2_1/entropy'):
            # As TensorBoard keeps it.
            assert_close(event.value, written[event.step]['attention/SK_2_1/entropy'], dtype=torch.float32)


def test_arguments(tmp_path):
    assert HOOKS.get('mmpretrain.SKAttentionHook') is SKAttentionHook
    with pytest.raises(ValueError, match='interval=0 must be an integer of at least 1'):
        SKAttentionHook(interval=0)
    with pytest.raises(ValueError, match="units has 'SK_9_1', a unit that does not exist: choose from SK_2_1"):
        runner(tmp_path, 'wrong', units=['SK_9_1']).train()


def test_pictures_keep_their_folders(tmp_path):
    hook = PictureHook(str(tmp_path))
    paths = ['/data/cat/1.jpg', '/data/dog/1.jpg', '/data/dog/1.png', '/elsewhere/1.jpg', None]
    names = [str(hook._name(path, '/data')) for path in paths]
    assert names == ['cat/1.png', 'dog/1.png', 'dog/1.png.png', '1.png', '000000.png']


@pytest.mark.parametrize(
    ('preprocessor', 'settings', 'first'),
    [
        (ClsDataPreprocessor(to_rgb=True), {}, 'blue'),
        (ClsDataPreprocessor(to_rgb=False), {}, 'red'),
        (mmengine.model.ImgDataPreprocessor(bgr_to_rgb=True), dict(bgr_to_rgb=True), 'blue'),
        (mmengine.model.ImgDataPreprocessor(rgb_to_bgr=True), dict(rgb_to_bgr=True), 'red'),
    ],
    ids=['to_rgb', 'rgb', 'bgr_to_rgb', 'rgb_to_bgr'],
)
def test_pictures_keep_their_colours(tmp_path, preprocessor, settings, first):
    """The input's first channel is blue where the preprocessor turns it, and red where it doesn't."""
    run = SimpleNamespace(
        cfg=Config(dict(data_preprocessor=settings)),
        model=SimpleNamespace(module=SimpleNamespace(data_preprocessor=preprocessor)),
        test_dataloader=SimpleNamespace(dataset=None),
        visualizer=UniversalVisualizer(),
    )
    image = torch.tensor([200, 100, 50], dtype=torch.uint8).view(3, 1, 1).expand(3, 64, 64)
    sample = DataSample().set_pred_label(0).set_gt_label(0)
    PictureHook(str(tmp_path)).after_test_iter(run, 0, dict(inputs=[image]), [sample])
    pixel = np.asarray(Image.open(tmp_path / '000000.png').convert('RGB'))[-1, -1].tolist()
    assert pixel == dict(blue=[50, 100, 200], red=[200, 100, 50])[first]
