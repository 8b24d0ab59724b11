"""The detection configs with mmdetection itself: trained an iteration at full width, the rest at a small one."""

import copy
import functools
import json
import re
from importlib import import_module
from types import SimpleNamespace

import pytest

pytest.importorskip('mmdet')

import mmdet
import numpy as np
import timm
import torch
from helpers.randomised import randomise
from helpers.tolerances import assert_close
from mmdet.apis import inference_detector
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from mmpretrain.registry import MODELS as MMPRETRAIN_MODELS
from PIL import Image
from safetensors.torch import save
from sklearn.datasets import load_sample_image
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import sk_plugins
from sk_plugins import zoo
from sk_plugins._resources import ROOT
from sk_plugins.weights import HubError

FOLDER = ROOT / 'configs' / 'detection'
# Those of tools/prepare_scenes.py's scenes have their own tests.
NAMES = sorted(path.stem for path in FOLDER.glob('*.py') if 'scenes' not in path.stem)
RETINANET, FASTER, MASK, CASCADE, LIGHT = (
    'retinanet_sknet50_fpn_1x_coco',
    'faster-rcnn_sknet50_fpn_1x_coco',
    'mask-rcnn_sknet50_fpn_1x_coco',
    'cascade-rcnn_sknet101_fpn_1x_coco',
    'rtmdet-tiny_skshufflenetv2-x1.0_8xb32-300e_coco',
)
PLAIN_PRE = LIGHT.replace('x1.0', 'x1.0-plain-pre')
SMALL_SIDES = {(1333, 800): (96, 64), (640, 640): (96, 96), (1280, 1280): (192, 192)}
WEIGHTS = 'timm/skresnext50_32x4d.ra_in1k'
NARROW = dict(channels=(16, 32, 64, 128), cardinality=8, base_width=16, layers=(1, 1, 1, 1))
NARROW_CHANNELS = [64, 128, 256, 512]
STRIDES = {8: [4, 8, 8, 8], 16: [4, 8, 16, 16], 32: [4, 8, 16, 32]}
each_config = pytest.mark.parametrize('name', NAMES)


@functools.cache
def _read(name):
    return Config.fromfile(FOLDER / f'{name}.py')


def read(name):
    """The config, to change at will."""
    return copy.deepcopy(_read(name))


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    """COCO's layout with crops of two photographs, one of them with no object; ``root`` and the images' paths."""
    root = tmp_path_factory.mktemp('coco')
    photographs = [load_sample_image(f'{name}.jpg') for name in ('china', 'flower')]
    sizes = {'train': [(64, 96), (70, 90)], 'val': [(90, 61), (80, 100)]}
    paths = {}
    for split, shapes in sizes.items():
        (root / f'{split}2017').mkdir()
        images, annotations = [], []
        for i, (height, width) in enumerate(shapes):
            name = f'{split}_{i}.jpg'
            Image.fromarray(photographs[i][100 : 100 + height, 200 : 200 + width]).save(root / f'{split}2017' / name)
            images.append(dict(id=i, file_name=name, height=height, width=width))
            boxes = [(8, 10, 30, 40), (40, 5, 18, 50)] if split == 'train' or i == 0 else []
            for x, y, w, h in boxes:
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=i,
                        category_id=1 + len(annotations),
                        bbox=[x, y, w, h],
                        area=w * h,
                        iscrowd=0,
                        segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]],
                    )
                )
        categories = [
            dict(id=i + 1, name=name) for i, name in enumerate(mmdet.datasets.CocoDataset.METAINFO['classes'])
        ]
        (root / 'annotations').mkdir(exist_ok=True)
        content = dict(images=images, annotations=annotations, categories=categories)
        (root / 'annotations' / f'instances_{split}2017.json').write_text(json.dumps(content))
        paths[split] = [root / f'{split}2017' / image['file_name'] for image in images]
    return SimpleNamespace(root=root, **paths)


def shorten(cfg, coco):
    """One iteration on the small folder, with fewer proposals; the model stays as it is, but for its weights."""
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
        loader.dataset.data_root = f'{coco.root}/'
        for transform in loader.dataset.pipeline:
            sides = {key: value for key, value in transform.items() if isinstance(value, tuple)}
            transform.update({key: SMALL_SIDES.get(value, value) for key, value in sides.items()})
    for split in ('val', 'test'):
        cfg[f'{split}_evaluator'].ann_file = str(coco.root / 'annotations' / 'instances_val2017.json')
    cfg.train_cfg.update(max_epochs=1, val_interval=1)
    cfg.default_hooks.checkpoint = None
    cfg.model.backbone.init_cfg = None
    for_cpu(cfg.model)
    return cfg


def for_cpu(model):
    """Fewer proposals, and BatchNorm in SyncBatchNorm's place, which is for GPUs."""
    if 'rpn_head' in model:
        model.train_cfg.rpn_proposal.max_per_img = model.test_cfg.rpn.max_per_img = 50
        stages = model.train_cfg.rcnn
        for stage in stages if isinstance(stages, list) else [stages]:
            stage.sampler.num = 16
    for module in (model.neck, model.get('bbox_head', {})):
        if 'norm_cfg' in module:
            module.norm_cfg.type = 'BN'


def give_boxes_a_size(rtmdet):
    """After the Runner has initialised it: an untrained RTMDet may find no box at all that is wider than nothing."""
    init_weights = rtmdet.init_weights

    def init():
        init_weights()
        for layer in rtmdet.bbox_head.rtm_reg:
            nn.init.constant_(layer.bias, 2)

    rtmdet.init_weights = init


def norms(module):
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]


# The files


def mmdets(name):
    """mmdetection's config of the same name but for the backbone."""
    detector, _, rest = name.partition('_')
    backbone = rest.partition('_')[0]
    own = {'sknet50': '_r50', 'sknet101': '_r50', 'skresnet18': '_r18', 'skresnet50x1-simclr': '_r50'}.get(backbone, '')
    folder = {'retinanet': 'retinanet', 'rtmdet-tiny': 'rtmdet', 'faster-rcnn': 'faster_rcnn', 'mask-rcnn': 'mask_rcnn'}
    path = f'{mmdet.__path__[0]}/.mim/configs/{folder.get(detector, "cascade_rcnn")}'
    theirs = f'{detector}{own}_{rest.partition("_")[2]}.py'
    return Config.fromfile(f'{path}/{theirs.replace("rtmdet-tiny", "rtmdet_tiny")}')


def test_all_are_there():
    expected = {
        f'{detector}_sknet50_fpn_{schedule}_coco'
        for detector in ('retinanet', 'faster-rcnn', 'mask-rcnn')
        for schedule in ('1x', '2x', 'amp-1x')
    }
    expected |= {CASCADE, CASCADE.replace('rcnn', 'mask-rcnn', 1), LIGHT, PLAIN_PRE}
    expected |= {f'retinanet_{network}_fpn_1x_coco' for network in ('skresnet18', 'skresnet50x1-simclr')}
    assert set(NAMES) == expected


def plain(value):
    """Without the scopes that mmengine notes on what one config takes from another."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key != '_scope_'}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


@each_config
def test_differs_from_mmdets_in_the_backbone_only(name):
    """And in the channels that its feature maps have, and the preprocessing of its weights."""
    own, theirs = (plain(cfg.to_dict()) for cfg in (read(name), mmdets(name)))
    assert own.pop('custom_imports') == dict(imports=['sk_plugins.mmpretrain_models'], allow_failed_imports=False)
    for cfg in (own, theirs):
        del cfg['model']['backbone']
        for key in ('tta_model', 'tta_pipeline', 'img_scales', 'checkpoint'):
            cfg.pop(key, None)
    if 'rtmdet' in name:
        assert own['model']['neck'].pop('in_channels') == [116, 232, 464]
        assert theirs['model']['neck'].pop('in_channels') == [96, 192, 384]
        for cfg, in_rgb in ((own, True), (theirs, False)):
            preprocessor = cfg['model']['data_preprocessor']
            assert preprocessor.pop('bgr_to_rgb') == in_rgb
            assert preprocessor.pop('mean') == [123.675, 116.28, 103.53][:: 1 if in_rgb else -1]
            assert preprocessor.pop('std') == [58.395, 57.12, 57.375][:: 1 if in_rgb else -1]
    if 'simclr' in name:
        for cfg, mean, std in (
            (own, [0.0] * 3, [255.0] * 3),
            (theirs, [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
        ):
            preprocessor = cfg['model']['data_preprocessor']
            assert (preprocessor.pop('mean'), preprocessor.pop('std')) == (mean, std)
    assert own == theirs


NETWORKS = {
    'sknet50': ('SKNet', dict(depth=50), {}),
    'sknet101': ('SKNet', dict(depth=101), {}),
    'skresnet18': ('SKResNet', dict(depth=18), {}),
    'skresnet50x1-simclr': ('SKResNetSimCLR', dict(depth=50, width_factor=1), {}),
    'skshufflenetv2-x1.0': ('SKShuffleNetV2', dict(widen_factor=1.0), dict(unit='sk')),
    'skshufflenetv2-x1.0-plain-pre': ('SKShuffleNetV2', dict(widen_factor=1.0), dict(unit='plain')),
}


@each_config
def test_backbone_and_its_weights(name):
    cfg = read(name)
    backbone = cfg.model.backbone
    type_, shape, unit = NETWORKS[name.split('_')[1]]
    assert backbone.type == f'mmpretrain.{type_}'
    assert {key: backbone[key] for key in shape} == shape
    assert (backbone.frozen_stages, backbone.norm_eval) == ((0, False) if name == PLAIN_PRE else (1, True))
    spec = zoo.find(type_, **shape, **unit)
    weights = zoo.Weights
    init_cfg = dict(type='Pretrained')
    if spec.weights:
        (weights,) = spec.weights
        init_cfg['checkpoint'] = f'hf-hub:{weights.hf_hub_id}' if weights.hf_hub_id else weights.url
    else:  # what training this project's classifier leaves
        classifier = Config.fromfile(ROOT / 'configs' / f'{spec.name}_in1k.py')
        assert {key: classifier.model.backbone[key] for key in ('type', *shape)} == {'type': type_, **shape}
        init_cfg['checkpoint'] = f'work_dirs/{spec.name}_in1k/epoch_{classifier.train_cfg.max_epochs}.pth'
    assert backbone.init_cfg == init_cfg
    preprocessor = cfg.model.data_preprocessor
    assert preprocessor.bgr_to_rgb
    np.testing.assert_allclose(preprocessor.mean, 255 * np.array(weights.mean), atol=1e-9)
    np.testing.assert_allclose(preprocessor.std, 255 * np.array(weights.std), atol=1e-9)


# The backbone


@pytest.fixture(scope='module')
def published():
    """timm's network with random weights: itself, and its file on the Hub."""
    model = randomise(timm.create_model('skresnext50_32x4d', num_classes=1))
    return model.state_dict()


def features_only(name, state_dict, **kwargs):
    model = timm.create_model(name, features_only=True, **kwargs)
    model.load_state_dict({key: value for key, value in state_dict.items() if not key.startswith('fc.')})
    return model.eval()


@pytest.mark.parametrize('output_stride', STRIDES)
def test_backbone_is_timms(output_stride, published, hub):
    """With the weights of the Hub, as the config names them."""
    hub.add(WEIGHTS, {'model.safetensors': save(published)})
    backbone = MODELS.build({**read(RETINANET).model.backbone, 'output_stride': output_stride})
    backbone.init_weights()
    timms = features_only('skresnext50_32x4d', published, out_indices=(1, 2, 3, 4), output_stride=output_stride)
    x = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, expected = backbone.eval()(x), timms(x)
    assert [96 // feature.shape[2] for feature in ours] == STRIDES[output_stride]
    assert [128 // feature.shape[3] for feature in ours] == STRIDES[output_stride]
    assert [feature.shape[1] for feature in ours] == [256, 512, 1024, 2048]
    for own, timms in zip(ours, expected):
        assert timms.std() > 0.1
        assert_close(own, timms, length=backbone)


@pytest.mark.parametrize(
    ('name', 'timms', 'out_indices'),
    [('retinanet_skresnet18_fpn_1x_coco', 'skresnet18', (1, 2, 3, 4)), (LIGHT, 'skshufflenetv2_x1_0', (2, 3, 4))],
)
def test_other_backbones_are_timms(name, timms, out_indices):
    cfg = read(name).model.backbone
    cfg.update(init_cfg=None, out_indices=tuple(range(len(out_indices))))
    backbone = randomise(MODELS.build(cfg))
    state_dict = {key: value for key, value in backbone.state_dict().items() if not key.startswith('conv5.')}
    model = timm.create_model(timms, features_only=True, out_indices=out_indices).eval()
    model.load_state_dict(state_dict, strict=False)
    x = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for own, expected in zip(backbone(x), model(x), strict=True):
            assert expected.std() > 0.1
            assert_close(own, expected, length=backbone)


@pytest.mark.parametrize('name', [CASCADE, LIGHT])
def test_weights_of_a_classifier(name, tmp_path, monkeypatch):
    """The file that the config names is one that tools/train.py leaves; where it lacks, nothing is trained."""
    monkeypatch.chdir(tmp_path)
    cfg = read(name).model.backbone
    if name == CASCADE:
        cfg.update(NARROW)
    detectors = MODELS.build(cfg)
    # The runtime's loaders say so, which are there once any test has imported it.
    import_module('sk_plugins.openmmlab.runtime')
    with pytest.raises(FileNotFoundError, match=f'{cfg.init_cfg.checkpoint}: no such checkpoint file'):
        detectors.init_weights()
    trained = randomise(MMPRETRAIN_MODELS.build({**cfg, 'init_cfg': None})).state_dict()
    path = tmp_path / cfg.init_cfg.checkpoint
    path.parent.mkdir(parents=True)
    classifiers = {f'backbone.{key}': value for key, value in trained.items()} | {'head.fc.bias': torch.zeros(3)}
    torch.save(dict(state_dict=classifiers, meta={}), path)
    torch.save(trained, tmp_path / 'timm.pth')
    for checkpoint in (cfg.init_cfg.checkpoint, 'timm.pth'):  # as --cfg-options model.backbone.init_cfg.checkpoint=...
        cfg.init_cfg.checkpoint = checkpoint
        detectors = MODELS.build(cfg)
        detectors.init_weights()
        assert all(torch.equal(value, trained[key]) for key, value in detectors.state_dict().items())


def test_weights_of_another_depth(published, hub):
    hub.add(WEIGHTS, {'model.safetensors': save(published)})
    cfg = read(RETINANET).model.backbone
    cfg.depth = 26
    backbone = MODELS.build(cfg)
    with pytest.raises(HubError, match=rf'{WEIGHTS}: its weights do not fit this SKNet of depth 26: layer1.2.conv1'):
        backbone.init_weights()


# At full width


def autocast_features(detector):
    """Mixed precision as far as it goes on a CPU, where mmcv's NMS takes float32 alone."""
    extract = detector.extract_feat

    def autocast(inputs):
        with torch.autocast('cpu', torch.bfloat16):
            features = extract(inputs)
        assert {feature.dtype for feature in features} == {torch.bfloat16}
        return tuple(feature.float() for feature in features)

    detector.extract_feat = autocast


@each_config
def test_trains_and_predicts(name, coco, tmp_path):
    """An iteration and a validation by the Runner; the frozen part stays as it was, and the rest learns."""
    cfg = shorten(read(name), coco)
    amp = cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert amp == ('_amp-' in name)
    if amp:  # which mmengine has on GPUs only
        cfg.optim_wrapper.type = 'OptimWrapper'
    cfg.param_scheduler = []  # no warm-up, or the first step would be lost in rounding
    cfg.model.test_cfg.get('rcnn', cfg.model.test_cfg).update(score_thr=0.0, max_per_img=20)
    cfg.work_dir, cfg.experiment_name = str(tmp_path), f'detection_{name}'
    cfg.visualizer.name = cfg.experiment_name  # mmdet's name is one for all, and so is then the first one's folder
    runner = Runner.from_cfg(cfg)
    model = randomise(runner.model)
    if name in (LIGHT, PLAIN_PRE):
        give_boxes_a_size(model)
    backbone = model.backbone
    assert type(backbone).__module__ == 'sk_plugins.mmpretrain_models'
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    gradients = {}
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p, key=key: gradients.update({key: p.grad.clone()}))

    if amp:
        autocast_features(model)
    runner.train()

    stages = backbone.stages[: backbone.frozen_stages]
    unused = ('conv5',) if 'shufflenetv2' in name else ()
    frozen = tuple(f'{module}.' for module in (*backbone.stem, *stages, *unused))
    learning = {
        key for key, _ in model.named_parameters() if not key.startswith(tuple(f'backbone.{f}' for f in frozen))
    }
    assert gradients.keys() == learning
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert all(gradients[key].any() for key in learning if key.startswith('backbone.'))
    after = backbone.state_dict()
    kept = {key for key in before if torch.equal(before[key], after[key])}
    statistics = {
        key for key in before if key.rpartition('.')[2] in ('running_mean', 'running_var', 'num_batches_tracked')
    }
    assert kept == {key for key in before if key.startswith(frozen)} | (statistics if backbone.norm_eval else set())
    assert all(value.isfinite().all() for value in after.values())
    # The Runner has written the whole config into the work dir, from where it can be run again.
    assert Config.fromfile(tmp_path / f'{name}.py').model == cfg.model

    training, validation = (
        json.loads(line) for line in next(tmp_path.glob('*/vis_data/scalars.json')).read_text().splitlines()
    )
    assert all(np.isfinite(value) for value in training.values())
    metrics = ['bbox'] + ['segm'] * ('mask' in name)
    assert all(0 <= validation[f'coco/{metric}_mAP'] <= 1 for metric in metrics)
    model.cfg = cfg
    with Image.open(coco.val[0]) as image:
        width, height = image.size
    if 'rtmdet' in name:  # it pads to a square, and detects there too; its sides are rounded to a pixel
        width = height = max(width, height) + 1
    found = inference_detector(model.eval(), str(coco.val[0])).pred_instances
    assert len(found) == 20
    boxes = found.bboxes
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([width, height, width, height]) + 1e-3).all()
    assert (boxes[:, 2:] >= boxes[:, :2]).all()
    assert set(found.labels.tolist()) <= set(range(80))
    if 'mask' in name:
        assert found.masks.shape == (len(found), height, width)


# At a small width


def build(name=RETINANET, seed=0, **backbone):
    """The config's detector with a narrow backbone and random statistics, which predicts whatever the scores are."""
    cfg = read(name).model
    if name != LIGHT:
        cfg.backbone.update(NARROW)
        cfg.neck.in_channels = NARROW_CHANNELS
    cfg.backbone.update(init_cfg=None, **backbone)
    for_cpu(cfg)
    cfg.test_cfg.get('rcnn', cfg.test_cfg).score_thr = 0.0
    torch.manual_seed(seed)
    return randomise(MODELS.build(cfg))


def batch(name, size=(64, 96), images=2, boxes=3):
    """Noise with objects, as the data preprocessor hands it to this config's detector."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(images):
        meta = dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size, scale_factor=(1.0, 1.0))
        corners = torch.rand(boxes, 2, generator=generator) * 20
        sides = torch.rand(boxes, 2, generator=generator) * 20 + 10
        gt = InstanceData(
            bboxes=torch.cat([corners, corners + sides], dim=1),
            labels=torch.randint(80, (boxes,), generator=generator),
        )
        if 'mask' in name:
            gt.masks = BitmapMasks(np.ones((boxes, *size), np.uint8), *size)
        samples.append(DetDataSample(metainfo=meta, gt_instances=gt))
    return torch.randn(images, 3, *size, generator=generator), samples


def train(detector, inputs, samples):
    """The loss, a number, after its backward pass."""
    torch.manual_seed(0)  # samplers draw
    loss, _ = detector.train().parse_losses(detector(inputs, samples, mode='loss'))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in detector.parameters() if p.grad is not None)
    return loss.item()


each_detector = pytest.mark.parametrize('name', [RETINANET, FASTER, MASK, CASCADE, LIGHT])


@pytest.mark.parametrize('name', [RETINANET, FASTER, MASK, CASCADE])
def test_any_size(name):
    """Sides that no stride divides, without the preprocessor's padding; RTMDet's neck needs multiples of 32."""
    detector, (inputs, samples) = build(name), batch(name, size=(75, 101))
    assert np.isfinite(train(detector, inputs, samples))
    with torch.inference_mode():
        found = detector.eval()(inputs, samples, mode='predict')
    assert [len(sample.pred_instances) > 20 for sample in found] == [True, True]
    boxes = torch.cat([sample.pred_instances.bboxes for sample in found])
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([101, 75, 101, 75])).all()


@each_detector
def test_one_image_in_training(name):
    """The attention's norm has one value per channel then: in eval mode, as the config has it, that is no matter."""
    assert np.isfinite(train(build(name), *batch(name, images=1)))
    with pytest.raises(ValueError, match=r'SelectiveKernel in training mode got a batch of 1, .*norm_eval=True'):
        train(build(name, norm_eval=False), *batch(name, images=1))


@each_detector
def test_no_objects(name):
    detector = build(name)
    learning = {key for key, p in detector.backbone.named_parameters() if p.requires_grad}
    inputs, samples = batch(name)
    assert np.isfinite(train(detector, inputs, [samples[0], batch(name, boxes=0)[1][1]]))
    assert all(detector.backbone.get_parameter(key).grad.any() for key in learning)
    detector.zero_grad()
    inputs, samples = batch(name, boxes=0)
    assert np.isfinite(train(detector, inputs, samples))
    assert all(detector.backbone.get_parameter(key).grad.any() for key in learning)


@pytest.mark.parametrize(
    ('name', 'out_indices'), [(RETINANET, (0, 1, 2, 4)), (FASTER, (-1, 0, 1, 2)), (MASK, 3), (LIGHT, ())]
)
def test_wrong_out_indices(name, out_indices):
    said = re.escape(f'out_indices={out_indices!r} must be a sequence of stages from 0 to 3')
    with pytest.raises(ValueError, match=said):
        build(name, out_indices=out_indices)


def test_without_delete():
    """mmdetection's ResNet says more than our backbones take."""
    base = Config.fromfile(f'{mmdet.__path__[0]}/.mim/configs/_base_/models/retinanet_r50_fpn.py').model.backbone
    said = (
        "SKNet has no argument num_stages=4, style='pytorch': if a _base_ config left it in the backbone, put "
        '_delete_=True beside type'
    )
    with pytest.raises(TypeError, match=re.escape(said)):
        MODELS.build({**base, 'type': 'mmpretrain.SKNet'})


@each_detector
def test_fuse(name):
    """Every norm of the detector is folded, but for RTMDet's where levels share a convolution; detections stay."""
    detector = build(name)
    fused = sk_plugins.fold_batch_norm(detector)
    assert norms(detector)
    assert norms(fused) == ([] if name != LIGHT else norms(fused.bbox_head))
    inputs, samples = batch(name)
    with torch.inference_mode():
        expected, found = (
            [sample.pred_instances for sample in model(inputs, copy.deepcopy(samples), mode='predict')]
            for model in (detector, fused)
        )
    for theirs, own in zip(expected, found):
        assert len(own) == len(theirs) > 20
        assert torch.equal(own.labels, theirs.labels)
        assert_close(own.scores, theirs.scores, length=detector)
        assert_close(own.bboxes, theirs.bboxes, length=detector)
        if 'mask' in name:
            assert torch.equal(own.masks, theirs.masks)
