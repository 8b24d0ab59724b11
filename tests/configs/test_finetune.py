"""The configs of configs/finetune on a few pictures of one's own: classes, rates, and a step of training each."""

import importlib.util
import json

import numpy as np
import pytest
import torch

pytest.importorskip('mmpretrain')

from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from PIL import Image

from sk_plugins._resources import ROOT
from sk_plugins.openmmlab.runtime.configs import explain_parsing
from sk_plugins.openmmlab.runtime.resuming import make_resumable
from sk_plugins.openmmlab.runtime.runner import build_runner

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::UserWarning')
FOLDER = ROOT / 'configs' / 'finetune'
BOXES, MASKS = 'retinanet_sknet50_own-boxes', 'mask-rcnn_sknet50_own-masks'
LABELS = 'deeplabv3plus_sknet50_own-label-maps'
PACKAGES = {BOXES: 'mmdet', MASKS: 'mmdet', LABELS: 'mmseg'}
METRICS = {BOXES: 'coco/bbox_mAP', MASKS: 'coco/segm_mAP', LABELS: 'mIoU'}
RATES = {BOXES: 0.01 / 4, MASKS: 0.02 / 4, LABELS: 0.01 / 4}  # of 16 images in the recipes, and of 4 here
CLASSES = ('left', 'right', 'both')  # not in the alphabet's order
NARROW = dict(channels=(8, 16, 32, 64), cardinality=4, base_width=16, layers=(1, 1, 1, 1))


def read_own(name):
    with explain_parsing(f'{name}.py'):
        return Config.fromfile(FOLDER / f'{name}.py')


def each(*names):
    missing = {name: importlib.util.find_spec(PACKAGES[name]) is None for name in names}
    marks = {name: pytest.mark.skipif(missing[name], reason=f'needs {PACKAGES[name]}') for name in names}
    return pytest.mark.parametrize('name', [pytest.param(name, marks=marks[name], id=name) for name in names])


def test_all_are_there():
    assert {path.stem for path in FOLDER.glob('*.py')} == PACKAGES.keys()


@pytest.fixture(scope='module')
def own(tmp_path_factory):
    """Both layouts of the docs, with four pictures to train on and two to measure by."""
    root = tmp_path_factory.mktemp('own')
    (root / 'annotations').mkdir()
    rng = np.random.default_rng(0)
    for split, count in (('train', 4), ('val', 2)):
        images, annotations = [], []
        for kind in ('images', 'labels'):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 60, (64, 96, 3), dtype=np.uint8)
            labels = np.zeros((64, 96), np.uint8)
            images.append(dict(id=i, file_name=f'{split}/{i}.jpg', height=64, width=96))
            for number, (x, y, w, h) in enumerate(((8, 10, 30, 40), (50, 5, 30, 50))):
                pixels[y : y + h, x : x + w, number] = 220
                labels[y : y + h, x : x + w] = number + 1
                corners = [x, y, x + w, y, x + w, y + h, x, y + h]
                shape = dict(bbox=[x, y, w, h], area=w * h, iscrowd=0, segmentation=[corners])
                annotations.append(dict(id=len(annotations) + 1, image_id=i, category_id=7 - number, **shape))
            Image.fromarray(pixels).save(root / 'images' / split / f'{i}.jpg')
            Image.fromarray(labels).save(root / 'labels' / split / f'{i}.png')
        categories = [dict(id=7 - number, name=name) for number, name in enumerate(CLASSES)]
        content = dict(images=images, annotations=annotations, categories=categories)
        (root / 'annotations' / f'{split}.json').write_text(json.dumps(content))
    (root / 'classes.txt').write_text('background\nleft\nright\n')
    return root


@pytest.fixture
def read(own, monkeypatch):
    """``read(name)``: the config as it is for these pictures."""
    monkeypatch.setenv('DATA', str(own))
    return read_own


@each(*PACKAGES)
def test_classes_and_rates(name, read, own):
    cfg = read(name)
    classes = ('background', 'left', 'right') if name == LABELS else CLASSES
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert tuple(dataset.metainfo.classes) == classes
        assert dataset.data_root == f'{own}/'
    heads = {
        BOXES: lambda model: [model.bbox_head],
        MASKS: lambda model: [model.roi_head.bbox_head, model.roi_head.mask_head],
        LABELS: lambda model: [model.decode_head, model.auxiliary_head],
    }
    assert {head.num_classes for head in heads[name](cfg.model)} == {3}
    assert cfg.optim_wrapper.optimizer.lr == RATES[name]
    assert cfg.auto_scale_lr.base_batch_size == cfg.train_dataloader.batch_size == 4
    assert cfg.model.backbone.init_cfg.checkpoint == 'hf-hub:timm/skresnext50_32x4d.ra_in1k'
    assert cfg.default_hooks.checkpoint.save_best == METRICS[name]
    assert len(cfg.pretty_text) < 20_000  # the annotations are not in it


@each(*PACKAGES)
def test_without_the_data(name, monkeypatch):
    """The error names the file that is looked for."""
    monkeypatch.setenv('DATA', 'nowhere')
    wanted = 'nowhere/classes.txt' if name == LABELS else 'nowhere/annotations/train.json'
    with pytest.raises(ValueError, match=rf"{name}\.py: .*No such file or directory: '{wanted}'"):
        read_own(name)


def shorten(cfg, name, work_dir):
    """Two epochs or four iterations of a narrow backbone on small pictures."""
    cfg.model.backbone.update(**NARROW, init_cfg=None)
    channels = {256: 32, 512: 64, 1024: 128, 2048: 256}
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False, batch_size=2)
        for transform in loader.dataset.pipeline:
            if 'scale' in transform:
                transform.scale = (96, 64)
            if 'crop_size' in transform:
                transform.crop_size = (64, 64)
    if name == LABELS:
        cfg.model.data_preprocessor.size = (64, 64)
        for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
            head.update(in_channels=channels[head.in_channels], channels=16)
        cfg.model.decode_head.update(c1_in_channels=32, c1_channels=8)
        cfg.train_cfg.update(max_iters=4, val_interval=2)
        cfg.default_hooks.checkpoint.interval = 2
        cfg.param_scheduler = []
    else:
        cfg.model.neck.in_channels = list(channels.values())
        cfg.model.test_cfg.get('rcnn', cfg.model.test_cfg).score_thr = 0.0
        if name == MASKS:
            cfg.model.train_cfg.rpn_proposal.max_per_img = cfg.model.test_cfg.rpn.max_per_img = 50
        cfg.train_cfg.max_epochs = 2
    cfg.work_dir, cfg.experiment_name = str(work_dir), f'finetune_config_{name}'
    if cfg.get('visualizer'):
        cfg.visualizer.name = cfg.experiment_name
    return cfg


@each(*PACKAGES)
def test_trains(name, read, tmp_path):
    """As tools/train.py has it: losses and scores are numbers, and the best checkpoint has a head for three classes."""
    cfg = shorten(read(name), name, tmp_path)
    classes = tuple(cfg.train_dataloader.dataset.metainfo.classes)
    with DefaultScope.overwrite_default_scope(PACKAGES[name]):
        runner: Runner = build_runner(make_resumable(cfg))
        runner.train()
    lines = [json.loads(line) for line in next(tmp_path.glob('*/vis_data/scalars.json')).read_text().splitlines()]
    scores = [line[METRICS[name]] for line in lines if METRICS[name] in line]
    assert len(scores) == 2
    assert all(np.isfinite(score) for score in scores)
    (best,) = tmp_path.glob('best_*.pth')
    saved = torch.load(best, weights_only=False)
    head = {BOXES: 'bbox_head.retina_cls', MASKS: 'roi_head.bbox_head.fc_cls', LABELS: 'decode_head.conv_seg'}[name]
    outputs = {BOXES: 3 * 9, MASKS: 4, LABELS: 3}[name]  # classes and anchors; classes and background
    assert len(saved['state_dict'][f'{head}.weight']) == outputs
    assert saved['meta']['dataset_meta']['classes'] == classes
