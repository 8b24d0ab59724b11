"""The configs of configs/scenes on a few scenes: each trains two steps, and its checkpoint measures the same again."""

import importlib.util
import json

import numpy as np
import pytest
import torch

pytest.importorskip('mmpretrain')
pytest.importorskip('skimage')
pytest.importorskip('pycocotools')

from helpers.digit_garments import write_garments
from mmengine.config import Config
from mmengine.runner import Runner

from sk_plugins._resources import ROOT

pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::UserWarning')
FOLDER = ROOT / 'configs' / 'scenes'
CLASSIFIERS = ('sknet20_fashion_mnist', 'sknet20_scenes')
DETECTOR = 'retinanet_sknet20_fpn_8e_scenes-128x128'
SEGMENTOR = 'deeplabv3plus_sknet20-d16_2e_scenes-128x128'
METRICS = {
    **dict.fromkeys(CLASSIFIERS, ('mmpretrain', 'accuracy/top1')),
    DETECTOR: ('mmdet', 'coco/bbox_mAP_50'),
    SEGMENTOR: ('mmseg', 'mIoU'),
}
STARTS = {'sknet20_scenes': CLASSIFIERS[0], DETECTOR: CLASSIFIERS[0], SEGMENTOR: CLASSIFIERS[1]}


def each(*names):
    missing = {name: importlib.util.find_spec(METRICS[name][0]) is None for name in names}
    marks = {name: pytest.mark.skipif(missing[name], reason=f'needs {METRICS[name][0]}') for name in names}
    return pytest.mark.parametrize('name', [pytest.param(name, marks=marks[name], id=name) for name in names])


def test_all_are_there():
    assert {path.stem for path in FOLDER.glob('*.py')} == METRICS.keys()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with data/fashion_mnist, of digits, and data/scenes: eight to train on, four to validate on."""
    folder = tmp_path_factory.mktemp('scenes')
    (folder / 'data/fashion_mnist').mkdir(parents=True)
    garments = write_garments(folder / 'data/fashion_mnist', range(10), range(10), count=16)
    path = ROOT / 'tools' / 'prepare_scenes.py'
    spec = importlib.util.spec_from_file_location('prepare_scenes', path)
    tool = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        spec.loader.exec_module(tool)
    tool.prepare(folder / 'data/scenes', garments, train=8, val=4, size=128, seed=0)
    return folder


def read(name, work_dir):
    """The config for two steps in this process."""
    cfg = Config.fromfile(FOLDER / f'{name}.py')
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(batch_size=4, num_workers=0, persistent_workers=False)
        loader.dataset.indices = 8 if name in CLASSIFIERS else None
    cfg.train_cfg.update(max_epochs=1, val_interval=1)
    cfg.default_hooks.logger.interval = cfg.default_hooks.checkpoint.interval = 1
    cfg.default_hooks.checkpoint.save_best = None
    cfg.load_from = cfg.model.backbone.init_cfg = None
    if name == DETECTOR:
        cfg.model.test_cfg.score_thr = 0.0  # untrained, it is sure of nothing
    cfg.work_dir, cfg.experiment_name = str(work_dir), f'{name}_{work_dir.name}'
    return cfg


@each(*METRICS)
def test_trains_two_steps(name, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    cfg = read(name, tmp_path / 'train')
    runner = Runner.from_cfg(cfg)
    runner.train()
    (scalars,) = (tmp_path / 'train').glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in scalars.read_text().splitlines()]
    losses = [line['loss'] for line in lines if 'loss' in line]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    (validated,) = [line[METRICS[name][1]] for line in lines if METRICS[name][1] in line]

    moments = runner.optim_wrapper.optimizer.state
    for key, parameter in runner.model.backbone.named_parameters():
        moment = moments[parameter].get('exp_avg', moments[parameter].get('momentum_buffer'))
        assert moment.abs().max() > 0, key
    assert all(torch.isfinite(parameter).all() for parameter in runner.model.parameters())

    cfg = read(name, tmp_path / 'test')
    cfg.load_from = str(tmp_path / 'train' / 'epoch_1.pth')
    assert Runner.from_cfg(cfg).test()[METRICS[name][1]] == pytest.approx(validated, abs=0.01)


@each(*STARTS)
def test_starts_from_the_classifier(name, folder, tmp_path, monkeypatch):
    """With every tensor of its backbone, at the place where tools/train.py leaves it."""
    monkeypatch.chdir(tmp_path)
    classifier = STARTS[name]
    cfg = read(classifier, tmp_path / 'classifier')
    expected = Runner.from_cfg(cfg).model.backbone.state_dict()
    cfg = Config.fromfile(FOLDER / f'{classifier}.py')
    path = tmp_path / 'work_dirs' / classifier / f'epoch_{cfg.train_cfg.max_epochs}.pth'
    path.parent.mkdir(parents=True)
    torch.save(dict(state_dict={f'backbone.{key}': value for key, value in expected.items()}, meta={}), path)

    whole = Config.fromfile(FOLDER / f'{name}.py')
    cfg = read(name, tmp_path / 'start')
    cfg.load_from, cfg.model.backbone.init_cfg = whole.load_from, whole.model.backbone.get('init_cfg')
    runner = Runner.from_cfg(cfg)
    runner.model.init_weights()
    runner.load_or_resume()
    started = runner.model.backbone.state_dict()
    assert started.keys() == expected.keys()
    assert all(torch.equal(started[key], expected[key]) for key in expected)


@each(DETECTOR, SEGMENTOR)
def test_classes_are_the_scenes(name, folder):
    """The names in the order of the labels, a colour for each, and as many outputs."""
    cfg = Config.fromfile(FOLDER / f'{name}.py')
    coco = json.loads((folder / 'data/scenes/annotations/instances_val.json').read_text())
    names = [category['name'] for category in coco['categories']]
    names = names if name == DETECTOR else ['background', 'top', 'trousers', 'dress', 'shoe', 'bag']
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        meta = loader.dataset.metainfo
        assert list(meta.classes) == names
        assert len({tuple(color) for color in meta.palette}) == len(meta.classes)
    heads = [cfg.model[key] for key in ('bbox_head', 'decode_head') if key in cfg.model]
    assert [head.num_classes for head in heads] == [len(meta.classes)]
