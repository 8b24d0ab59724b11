"""The configs of configs/rotated with mmrotate itself: what they inherit, and a step of training each."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip('mmpretrain')
pytest.importorskip('mmrotate')

import mmrotate
from mmengine.config import Config
from mmengine.registry import DefaultScope
from PIL import Image

from sk_plugins import zoo
from sk_plugins._resources import ROOT
from sk_plugins.openmmlab.runtime.resuming import make_resumable
from sk_plugins.openmmlab.runtime.runner import build_runner

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::UserWarning')
FOLDER = ROOT / 'configs' / 'rotated'
RETINANET, ORIENTED = 'rotated-retinanet-rbox-le90_sknet50_fpn_1x_dota', 'oriented-rcnn-le90_sknet50_fpn_1x_dota'
THEIRS = {RETINANET: 'rotated_retinanet', ORIENTED: 'oriented_rcnn'}
NARROW = dict(channels=(8, 16, 32, 64), cardinality=4, base_width=16, layers=(1, 1, 1, 1))
each_config = pytest.mark.parametrize('name', THEIRS)


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope('mmrotate'):
        yield


def read(name):
    return Config.fromfile(FOLDER / f'{name}.py')


def test_all_are_there():
    assert {path.stem for path in FOLDER.glob('*.py')} == THEIRS.keys()


def plain(value):
    """Without the scopes that mmengine notes on what one config takes from another."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key != '_scope_'}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


@each_config
def test_differs_from_mmrotates_in_the_backbone_only(name):
    path = f'{mmrotate.__path__[0]}/.mim/configs/{THEIRS[name]}/{name.replace("sknet50", "r50")}.py'
    own, theirs = (plain(cfg.to_dict()) for cfg in (read(name), Config.fromfile(path)))
    assert own.pop('custom_imports') == dict(imports=['sk_plugins.mmpretrain_models'], allow_failed_imports=False)
    backbone = own['model'].pop('backbone')
    del theirs['model']['backbone']
    assert own == theirs
    (weights,) = zoo.find('SKNet', depth=50).weights
    assert backbone['init_cfg'] == dict(type='Pretrained', checkpoint=f'hf-hub:{weights.hf_hub_id}')
    preprocessor = own['model']['data_preprocessor']
    assert preprocessor['bgr_to_rgb']
    np.testing.assert_allclose(preprocessor['mean'], 255 * np.array(weights.mean), atol=1e-9)
    np.testing.assert_allclose(preprocessor['std'], 255 * np.array(weights.std), atol=1e-9)


@pytest.fixture(scope='module')
def dota(tmp_path_factory):
    """DOTA's layout as mmrotate splits it, with four pictures of two turned rectangles."""
    root = tmp_path_factory.mktemp('dota')
    for kind in ('images', 'annfiles'):
        (root / 'trainval' / kind).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (128, 128, 3), dtype=np.uint8)).save(root / f'trainval/images/P{i}.png')
        lines = ['40 20 80 40 60 80 20 60 plane 0', '90 80 120 90 110 120 80 110 ship 0']
        (root / f'trainval/annfiles/P{i}.txt').write_text('\n'.join(lines))
    return root


@each_config
def test_trains_and_predicts(name, dota, tmp_path):
    cfg = read(name)
    cfg.model.backbone.update(**NARROW, init_cfg=None)
    cfg.model.neck.in_channels = [32, 64, 128, 256]
    cfg.model.test_cfg.get('rcnn', cfg.model.test_cfg).update(score_thr=0.0, max_per_img=20)
    if name == ORIENTED:
        cfg.model.train_cfg.rpn_proposal.max_per_img = cfg.model.test_cfg.rpn.max_per_img = 50
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = f'{dota}/'
        for transform in loader.dataset.pipeline:
            if 'scale' in transform:
                transform.scale = (128, 128)
    cfg.train_cfg.update(max_epochs=1, val_interval=1)
    cfg.work_dir, cfg.experiment_name = str(tmp_path), f'rotated_{name}'
    cfg.visualizer.name = cfg.experiment_name
    cfg.default_hooks.logger.interval = 1
    runner = build_runner(make_resumable(cfg))
    frozen = {key: value.clone() for key, value in runner.model.backbone.state_dict().items() if 'layer1' in key}
    learning = runner.model.backbone.layer4[0].conv1.conv.weight.detach().clone()
    runner.train()
    after = runner.model.backbone.state_dict()
    assert frozen
    assert all(torch.equal(after[key], value) for key, value in frozen.items())
    assert not torch.equal(after['layer4.0.conv1.conv.weight'], learning)
    lines = [json.loads(line) for line in next(tmp_path.glob('*/vis_data/scalars.json')).read_text().splitlines()]
    assert [np.isfinite(line['loss']) for line in lines if 'loss' in line] == [True, True]
    assert 0 <= lines[-1]['dota/mAP'] <= 1
    with torch.inference_mode():
        found = runner.model.eval().test_step(next(iter(runner.val_dataloader)))[0].pred_instances
    assert found.bboxes.shape[1] == 5  # a centre, two sides and an angle
    assert set(found.labels.tolist()) <= set(range(15))
