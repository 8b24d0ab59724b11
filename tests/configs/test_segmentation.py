"""The segmentation configs with mmsegmentation itself: built at full width, trained and tested at a small one."""

import copy
import functools
import math
import re

import pytest

pytest.importorskip('mmpretrain')
pytest.importorskip('mmseg')

import mmseg
import timm
import torch
from helpers.kinds import quick
from helpers.randomised import randomise
from helpers.small_segmentation import CROP, as_words, make_ade20k, make_cityscapes, narrow_options, small_options
from helpers.tolerances import assert_close
from mmengine.config import Config
from mmengine.model import convert_sync_batchnorm
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from safetensors.torch import save
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import sk_plugins
from sk_plugins import zoo
from sk_plugins._resources import ROOT
from sk_plugins.weights import HubError

FOLDER = ROOT / 'configs' / 'segmentation'
MMSEG = mmseg.__path__[0]
LIGHT = 'deeplabv3plus_skshufflenetv2-x1.0-d16_4xb4-160k_cityscapes-512x1024'
ADE20K, CITYSCAPES = '4xb4-80k_ade20k-512x512', '4xb2-80k_cityscapes-512x1024'
# Of mmsegmentation's file that has the same head, and what it calls the same data: (name, output stride, parameters).
HEADS = {
    'fcn_sknet50-d8': ('fcn_r50-d8', 8, (51_502_124, 51_401_254)),
    'pspnet_sknet50-d8': ('pspnet_r50-d8', 8, (50_979_884, 50_879_014)),
    'deeplabv3plus_sknet50-d8': ('deeplabv3plus_r50-d8', 8, (45_594_268, 45_493_398)),
    'deeplabv3plus_sknet50-d16': ('deeplabv3plus_r50-d8', 16, (45_594_268, 45_493_398)),
    'upernet_sknet50': ('upernet_r50', 32, (68_419_628, 68_318_758)),
}
STRIDES = {8: [4, 8, 8, 8], 16: [4, 8, 16, 16], 32: [4, 8, 16, 32]}
NAMES = [f'{head}_{data}' for head in HEADS for data in (ADE20K, CITYSCAPES)] + [LIGHT]
FCN = f'fcn_sknet50-d8_{CITYSCAPES}'
WEIGHTS = 'timm/skresnext50_32x4d.ra_in1k'
each_config = pytest.mark.parametrize('name', NAMES)
# Each head, and both data sets: what else there is are these once more.
ONE_EACH = [f'{head}_{ADE20K}' for head in HEADS] + [FCN, LIGHT]
# Of every way to dilate one, and both data sets.
TRAINED = [FCN, f'upernet_sknet50_{ADE20K}', LIGHT]


@functools.cache
def _read(name):
    return Config.fromfile(FOLDER / f'{name}.py')


def read(name):
    """The config, to change at will."""
    return copy.deepcopy(_read(name))


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    return {
        'ade20k': make_ade20k(tmp_path_factory.mktemp('ade20k')),
        'cityscapes': make_cityscapes(tmp_path_factory.mktemp('cityscapes')),
    }


def build(name=FCN, seed=0, **backbone):
    """The narrow model with random statistics."""
    cfg = read(name)
    cfg.merge_from_dict(narrow_options(cfg))
    cfg.model.backbone.update(backbone)
    torch.manual_seed(seed)
    return randomise(MODELS.build(cfg.model))


def batch(model, size=CROP, images=2, ignored=False):
    """Noise with labels, as the data preprocessor hands it on."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 256, (images, 3, *size), generator=generator, dtype=torch.uint8)
    samples = []
    for _ in range(images):
        label = torch.randint(0, 19, (1, *size), generator=generator)
        sample = SegDataSample(gt_sem_seg=PixelData(data=torch.full_like(label, 255) if ignored else label))
        sample.set_metainfo(dict(ori_shape=size, img_shape=size))
        samples.append(sample)
    model.data_preprocessor.size = size
    return model.data_preprocessor(dict(inputs=list(inputs), data_samples=samples), training=True)


def total(losses):
    return sum(value for key, value in losses.items() if 'loss' in key)


def norms(module):
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]


# The files


def test_all_are_there():
    """Those of tools/prepare_scenes.py's scenes have their own tests."""
    assert sorted(NAMES) == sorted(path.stem for path in FOLDER.glob('*.py') if 'scenes' not in path.stem)


@pytest.mark.parametrize('head', HEADS)
@pytest.mark.parametrize('data', [ADE20K, CITYSCAPES])
def test_differs_from_mmsegs_in_the_backbone_only(head, data):
    """And in how the norms are synchronised, which mmsegmentation writes into its backbone."""
    mmsegs_head, stride, _ = HEADS[head]
    own = read(f'{head}_{data}')
    path = f'{MMSEG}/.mim/configs/{mmsegs_head.split("_")[0]}/{mmsegs_head}_{data}.py'
    mmsegs = Config.fromfile(path)
    backbone = own.model.pop('backbone')
    init_cfg = backbone.pop('init_cfg')
    assert init_cfg == dict(type='Pretrained', checkpoint=f'hf-hub:{WEIGHTS}')
    dilated = {} if stride == 32 else dict(output_stride=stride)
    assert backbone == dict(type='mmpretrain.SKNet', depth=50, out_indices=(0, 1, 2, 3), **dilated)
    assert own.model.pop('pretrained') is None
    del mmsegs.model['backbone'], mmsegs.model['pretrained']
    if stride == 16:  # as mmsegmentation's -d16 files have it
        assert own.model.decode_head.pop('dilations') == (1, 6, 12, 18)
        assert mmsegs.model.decode_head.pop('dilations') == (1, 12, 24, 36)
    assert own.pop('custom_imports') == dict(imports=['sk_plugins.mmpretrain_models'], allow_failed_imports=False)
    assert own.pop('sync_bn') == 'torch'
    assert own.pop('auto_scale_lr') == dict(base_batch_size=4 * own.train_dataloader.batch_size)
    # A list's place in a file, of no use to any code.
    for key in ('crop_size', 'data_preprocessor'):
        mmsegs.pop(key), own.pop(key)
    assert own.to_dict() == mmsegs.to_dict()


@each_config
def test_preprocessing_is_the_weights(name):
    cfg = read(name)
    weights = zoo.MODELS['sknet50' if 'sknet' in name else 'shufflenetv2_x1_0'].weights[0]
    preprocessor = cfg.model.data_preprocessor
    assert preprocessor.mean == pytest.approx([255 * value for value in weights.mean])
    assert preprocessor.std == pytest.approx([255 * value for value in weights.std])
    assert preprocessor.bgr_to_rgb
    assert cfg.model.backbone.init_cfg.checkpoint == (
        f'hf-hub:{weights.hf_hub_id}' if weights.hf_hub_id else weights.url
    )
    assert [int(n) for n in re.findall(r'(\d+)x(\d+)$', name)[0]] == list(preprocessor.size)


def test_mmsegs_own_tool_takes_them(run_python, folders, tmp_path):
    """As a user of mmsegmentation runs it: our file's path, and nothing of ours imported before it is read."""
    words = as_words(small_options(read(FCN), folders['cityscapes']))
    command = [f'{MMSEG}/.mim/tools/train.py', FOLDER / f'{FCN}.py', '--work-dir', tmp_path]
    done = run_python(*command, '--cfg-options', *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r'Iter\(val\) \[2/2\] +aAcc: [\d.]+  mIoU: ', done.stderr + done.stdout)
    assert (tmp_path / 'iter_1.pth').is_file()


# At full width


@each_config
def test_parameters(name):
    with torch.device('meta'):
        model = MODELS.build(read(name).model)
    classes = 150 if 'ade20k' in name else 19
    assert len(model.decode_head.conv_seg.weight) == model.num_classes == classes
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if name == LIGHT:
        assert parameters == 3_044_144
        return
    _, _, counts = HEADS[name.partition('_4x')[0]]
    assert parameters == counts[0 if classes == 150 else 1]
    assert sum(parameter.numel() for parameter in model.backbone.parameters()) == 27_479_784 - 2_049_000  # classifier


@pytest.mark.parametrize('name', quick(ONE_EACH, TRAINED))
def test_full_width(name):
    """On the meta device: strides, a map of every class, and a gradient for every parameter."""
    cfg = read(name)
    height, width = cfg.model.data_preprocessor.size
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
        images = torch.empty(2, 3, height, width)
        features = model.backbone(images)
        heads = [model.decode_head(features), model.auxiliary_head(features)]
        sum(logits.sum() for logits in heads).backward()
    # DistributedDataParallel stops at parameters without.
    without = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    classes = 150 if 'ade20k' in name else 19
    assert [logits.shape[:2] for logits in heads] == [(2, classes)] * 2
    strides = [(height // feature.shape[2], width // feature.shape[3]) for feature in features]
    if name == LIGHT:
        assert [feature.shape[1] for feature in features] == [116, 232, 1024]
        assert strides == [(8, 8), (16, 16), (16, 16)]
        return
    _, stride, _ = HEADS[name.partition('_4x')[0]]
    assert [feature.shape[1] for feature in features] == [256, 512, 1024, 2048]
    assert strides == [(s, s) for s in STRIDES[stride]]
    assert {type(norm) for norm in norms(convert_sync_batchnorm(model, cfg.sync_bn))} == {nn.SyncBatchNorm}


@pytest.fixture(scope='module')
def sknet50():
    """timm's network, whose random weights stand for the published ones."""
    torch.manual_seed(0)
    return randomise(timm.create_model('skresnext50_32x4d'))


@pytest.fixture(scope='module')
def published(sknet50):
    return {'model.safetensors': save(sknet50.state_dict())}


@pytest.mark.parametrize(
    ('head', 'size'),
    [('fcn_sknet50-d8', (64, 64)), ('deeplabv3plus_sknet50-d16', (65, 97)), ('upernet_sknet50', (45, 64))],
)
def test_features_are_timms(head, size, sknet50, published, hub):
    """With the weights from the Hub that the config names."""
    hub.add(WEIGHTS, published)
    _, stride, _ = HEADS[head]
    backbone = MODELS.build(read(f'{head}_{ADE20K}').model.backbone)
    backbone.init_weights()
    with torch.device('meta'):
        reference = timm.create_model(
            'skresnext50_32x4d', features_only=True, out_indices=(1, 2, 3, 4), output_stride=stride
        )
    weights = {key: value for key, value in sknet50.state_dict().items() if not key.startswith('fc.')}
    reference.load_state_dict(weights, assign=True)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        pairs = list(zip(backbone.eval()(images), reference.eval()(images)))
    assert len(pairs) == 4
    for (ours, timms), s in zip(pairs, STRIDES[stride]):
        assert ours.shape[2:] == tuple(math.ceil(side / s) for side in size)
        assert ours.std() > 1e-2
        assert_close(ours, timms, length=backbone)


def test_weights_of_another_depth(published, hub):
    hub.add(WEIGHTS, published)
    cfg = read(FCN)
    cfg.model.backbone.depth = 26
    backbone = MODELS.build(cfg.model.backbone)
    with pytest.raises(HubError, match=rf'{WEIGHTS}: its weights do not fit this SKNet of depth 26: layer1\.2\.conv1'):
        backbone.init_weights()


def test_light_backbone_starts_from_torchvisions(tmp_path, monkeypatch):
    """As far as the two networks are one: half of the tensors, and the first stage's first unit whole."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    (tmp_path / 'hub' / 'checkpoints').mkdir(parents=True)
    cfg = read(LIGHT).model.backbone
    weights = randomise(timm.create_model('shufflenetv2_x1_0')).state_dict()
    torch.save(weights, tmp_path / 'hub' / 'checkpoints' / cfg.init_cfg.checkpoint.rpartition('/')[2])
    backbone = MODELS.build(cfg)
    backbone.init_weights()
    state_dict = backbone.state_dict()
    loaded = {key for key, value in state_dict.items() if key in weights and torch.equal(value, weights[key])}
    assert (len(loaded), len(state_dict)) == (258, 505)
    assert {key for key in state_dict if key.startswith(('conv1.', 'stage2.0.', 'conv5.'))} <= loaded


# At a small width


@pytest.mark.parametrize('name', quick(NAMES, TRAINED))
def test_trains_and_tests(name, folders, tmp_path):
    """An iteration and a validation by the Runner, on pictures whose sides no stride divides."""
    cfg = read(name)
    cfg.merge_from_dict(small_options(cfg, folders['ade20k' if 'ade20k' in name else 'cityscapes']))
    cfg.default_hooks.checkpoint.update(interval=-1, save_last=False)
    cfg.work_dir, cfg.experiment_name, cfg.randomness = str(tmp_path), f'segmentation_{name}', dict(seed=0)
    runner = Runner.from_cfg(cfg)
    assert type(runner.model.backbone).__module__ == 'sk_plugins.mmpretrain_models'
    before = {key: value.clone() for key, value in runner.model.backbone.state_dict().items()}
    runner.train()
    classes = 150 if 'ade20k' in name else 19
    decode, auxiliary = (runner.message_hub.get_scalar(f'train/{head}.loss_ce').current() for head in ('decode', 'aux'))
    # Nothing is learnt, and mmsegmentation's mean is over ignored pixels, too.
    assert 0.5 * math.log(classes) < decode < 1.05 * math.log(classes)
    assert auxiliary == pytest.approx(0.4 * decode, rel=0.1)
    assert 0 <= runner.message_hub.get_scalar('val/mIoU').current() <= 100
    after = runner.model.backbone.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert [key for key in before if key.endswith(('weight', 'var')) and torch.equal(before[key], after[key])] == []
    # The Runner has written the whole config into the work dir, from where it can be run again.
    assert Config.fromfile(tmp_path / f'{name}.py').to_dict() == cfg.to_dict()


@pytest.mark.parametrize('name', [FCN, LIGHT])
def test_frozen_stages(name):
    """No gradient, and the norms' statistics as they were, in training mode; the stages after them learn."""
    model = build(name, frozen_stages=1).train()
    stage = model.backbone.stages[0]
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    total(model(**batch(model), mode='loss')).backward()
    frozen = tuple(f'{module}.' for module in (*model.backbone.stem, stage))
    assert all((p.grad is None) == key.startswith(frozen) for key, p in model.backbone.named_parameters())
    statistics = {key: value for key, value in model.backbone.state_dict().items() if 'running' in key}
    kept = {key for key, value in statistics.items() if torch.equal(before[key], value)}
    assert kept == {key for key in statistics if key.startswith(frozen)}


@pytest.mark.parametrize('name', ONE_EACH)
def test_predicts_at_any_size(name):
    model = build(name)
    size = (37, 51)
    samples = batch(model, size, images=1)
    with torch.inference_mode():
        (sample,) = model(**samples, mode='predict')
    assert sample.pred_sem_seg.data.shape == (1, *size)
    assert sample.seg_logits.data.shape == (model.num_classes, *size)
    assert torch.equal(sample.seg_logits.data.argmax(0, keepdim=True), sample.pred_sem_seg.data)
    assert sample.seg_logits.data.std() > 1e-4


def test_one_image_in_training():
    """The attention's norm has one value per channel then: it must be in eval mode, as ``norm_eval`` has it."""
    model = build().train()
    with pytest.raises(ValueError, match=r'got a batch of 1.*norm_eval=True in OpenMMLab'):
        model(**batch(model, images=1), mode='loss')
    model = build(norm_eval=True).train()
    loss = total(model(**batch(model, images=1), mode='loss'))
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize('head', ['pspnet_sknet50-d8', 'deeplabv3plus_sknet50-d8', 'upernet_sknet50'])
def test_one_image_in_training_and_a_head_that_pools(head):
    """The same in the head, as with every backbone of mmsegmentation: ``norm_eval`` does not reach it."""
    model = build(f'{head}_{ADE20K}', norm_eval=True).train()
    with pytest.raises(ValueError, match='Expected more than 1 value per channel when training'):
        model(**batch(model, images=1), mode='loss')
    for norm in norms(model):
        norm.eval()
    assert total(model(**batch(model, images=1), mode='loss')).isfinite()


@pytest.mark.parametrize('name', [FCN, LIGHT])
def test_nothing_labelled(name):
    model = build(name).train()
    loss = total(model(**batch(model, ignored=True), mode='loss'))
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad.abs().max() == 0 for parameter in model.parameters())


@pytest.mark.parametrize(
    ('name', 'out_indices', 'said'),
    [
        (FCN, (0, 4), 'must be a sequence of stages from 0 to 3'),
        (FCN, (-1,), 'must be a sequence of stages from 0 to 3'),
        (LIGHT, 3, 'must be a sequence of stages from 0 to 3'),
    ],
)
def test_wrong_out_indices(name, out_indices, said):
    with pytest.raises(ValueError, match=re.escape(f'out_indices={out_indices!r} {said}')):
        build(name, out_indices=out_indices)


@pytest.mark.parametrize('output_stride', [4, 64])
def test_wrong_output_stride(output_stride):
    with pytest.raises(ValueError, match=f'output_stride={output_stride} must be 8, 16 or 32'):
        build(output_stride=output_stride)


@pytest.mark.parametrize('name', [f'{head}_{ADE20K}' for head in HEADS] + [LIGHT])
def test_fuse(name):
    """Every norm of the segmenter is folded, the heads' included, and its logits stay."""
    model = build(name)
    fused = sk_plugins.fold_batch_norm(model)
    assert norms(model)
    assert norms(fused) == []
    data = batch(model)
    with torch.inference_mode():
        expected, logits = (net(data['inputs'], mode='tensor') for net in (model, fused))
    assert expected.std() > 1e-4
    assert_close(logits, expected, length=model, scale=max(1.0, expected.abs().max().item()))
