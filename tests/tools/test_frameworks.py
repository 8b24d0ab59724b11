"""tools/train.py and tools/test.py beyond classification: what the configs of mmseg and mmdet ask of them."""

import json
import pickle
import re
import sys

import numpy as np
import pytest

pytest.importorskip('mmpretrain')

import torch
from helpers.small_segmentation import SIZES, as_words, make_cityscapes, small_options
from mmengine.config import Config
from PIL import Image

from sk_plugins._resources import find_config
from sk_plugins.weights import CheckpointError, load_checkpoint

FCN = 'fcn_sknet50-d8_4xb2-80k_cityscapes-512x1024'
VALIDATION = [f'ulm_{i:06d}_000019' for i in range(len(SIZES['val']))]


@pytest.fixture(scope='module')
def cityscapes(tmp_path_factory):
    pytest.importorskip('mmseg')
    return make_cityscapes(tmp_path_factory.mktemp('cityscapes'))


@pytest.fixture(scope='module')
def options(cityscapes):
    """``options(iterations)``: for a small FCN. mmengine keeps a visualizer by its name, and with it a folder."""
    number = iter(range(100))

    def make(iterations=2):
        small = small_options(Config.fromfile(find_config(FCN)), cityscapes, iterations)
        return [*as_words(small), 'randomness.seed=0', f'visualizer.name=frameworks_{next(number)}']

    return make


@pytest.fixture(scope='module')
def segmentation_run(train, options, tmp_path_factory):
    """The work dir of two iterations and a validation. Not to be written into."""
    return train(FCN, tmp_path_factory.mktemp('fcn'), *options())


@pytest.fixture
def evaluate(load_tool, options, tmp_path):
    """``evaluate(checkpoint, *words)``: the metrics of tools/test.py on the validation pictures."""
    number = iter(range(100))

    def run(checkpoint, *words):
        name = f'experiment_name={tmp_path.name}_{next(number)}'
        words = [FCN, str(checkpoint), '--work-dir', str(tmp_path / 'work'), *map(str, words)]
        return load_tool('test').main([*words, '--cfg-options', *options(), name])

    return run


@pytest.fixture
def merge(load_tool):
    """``merge(config, *words)``: a config of the dict, as the runner of tools/test.py gets it."""
    tool = load_tool('test')

    def run(config, *words):
        return tool.merge_args(Config(config), tool.parse_args(['config.py', 'x.pth', *words]))

    return run


# Segmentation


def test_segmentation_trains(segmentation_run):
    state_dict, meta = load_checkpoint(segmentation_run / 'iter_2.pth')
    assert (meta['iter'], len(meta['dataset_meta']['classes'])) == (2, 19)
    assert all(tensor.isfinite().all() for tensor in state_dict.values())


def test_segmentation_resumes(train, options, segmentation_run, tmp_path):
    (tmp_path / 'iter_2.pth').write_bytes((segmentation_run / 'iter_2.pth').read_bytes())
    train(FCN, tmp_path, *options(iterations=3), arguments=['--resume', str(tmp_path / 'iter_2.pth')])
    before, after = (load_checkpoint(tmp_path / f'iter_{i}.pth') for i in (2, 3))
    assert after[1]['iter'] == 3
    name = 'backbone.layer1.0.conv2.paths.0.bn.num_batches_tracked'
    assert (before[0][name], after[0][name]) == (2, 3)


def test_segmentation_metrics(evaluate, segmentation_run, tmp_path):
    """Those of the validation in training."""
    scalars = next(segmentation_run.glob('*/vis_data/scalars.json')).read_text().splitlines()
    validation = json.loads(scalars[-1])
    metrics = evaluate(segmentation_run / 'iter_2.pth', '--out', tmp_path / 'metrics.json')
    assert metrics == {name: validation[name] for name in ('aAcc', 'mIoU', 'mAcc')}
    assert json.loads((tmp_path / 'metrics.json').read_text()) == metrics


@pytest.mark.parametrize('words', [[], ['--tta']], ids=' '.join)
def test_segmentation_label_maps_and_pictures(evaluate, segmentation_run, cityscapes, tmp_path, words):
    seen = []

    def look(module, args):
        if type(module).__name__ == 'SKNet':
            seen.append(tuple(args[0].shape[2:]))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        words = [*words, '--out', tmp_path / 'maps', '--show-dir', tmp_path / 'pictures']
        metrics = evaluate(segmentation_run / 'iter_2.pth', *words)
    finally:
        handle.remove()
    assert len(seen) == (2 * 6 * 2 if '--tta' in words else 2)  # mmsegmentation's six scales, and mirrored
    right = labelled = 0
    for name, (height, width) in zip(VALIDATION, SIZES['val']):
        labels = np.array(Image.open(cityscapes / f'gtFine/val/ulm/{name}_gtFine_labelTrainIds.png'))
        predicted = np.array(Image.open(tmp_path / 'maps' / f'{name}_leftImg8bit.png'))
        assert predicted.shape == (height, width)
        right += (predicted == labels)[labels != 255].sum()
        labelled += (labels != 255).sum()
    assert metrics['aAcc'] == pytest.approx(100 * right / labelled, abs=0.01)
    drawn = sorted(path.name for path in (tmp_path / 'pictures').rglob('*.png'))
    assert drawn == [f'test_{name}_leftImg8bit.png_{i + 1}.png' for i, name in enumerate(VALIDATION)]


def test_segmentation_amp(evaluate, segmentation_run):
    assert 0 <= evaluate(segmentation_run / 'iter_2.pth', '--amp')['aAcc'] <= 100


def test_weights_of_another_segmenter(evaluate, segmentation_run, tmp_path):
    state_dict, _ = load_checkpoint(segmentation_run / 'iter_2.pth')
    renamed = {key.replace('decode_head.convs', 'decode_head.bottleneck'): value for key, value in state_dict.items()}
    torch.save(renamed, tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match=r'other\.pth: [\s\S]*decode_head\.bottleneck'):
        evaluate(tmp_path / 'other.pth')


def test_auto_scale_lr(load_tool):
    pytest.importorskip('mmseg')
    tool = load_tool('train')
    args = tool.parse_args([FCN, '--auto-scale-lr'])
    assert tool.merge_args(tool.load_config(args), args).auto_scale_lr == dict(base_batch_size=8, enable=True)


@pytest.mark.slow
def test_two_processes(command, options, tmp_path, free_port):
    """On CPUs, with the config's own SyncBatchNorm."""
    words = ['--work-dir', tmp_path, '--cfg-options', *options()]
    command('bash', find_config(FCN).parents[2] / 'tools/dist_train.sh', FCN, 2, *words, env={'PORT': free_port()})
    state_dict, meta = load_checkpoint(tmp_path / 'iter_2.pth')
    assert meta['iter'] == 2
    assert all(tensor.isfinite().all() for tensor in state_dict.values())


# Detection

RETINANET = 'retinanet_sknet50_fpn_1x_coco'


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    """Two pictures with a box each, for training and for validation."""
    classes = pytest.importorskip('mmdet.datasets').CocoDataset.METAINFO['classes']
    root = tmp_path_factory.mktemp('coco')
    (root / 'annotations').mkdir()
    for split in ('train2017', 'val2017'):
        (root / split).mkdir()
        names = [f'{i:012d}.jpg' for i in range(2)]
        for i, name in enumerate(names):
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (90, 120, 3), np.uint8)).save(root / split / name)
        box = dict(category_id=1, bbox=[30, 20, 50, 40], area=2000, iscrowd=0)
        content = dict(
            images=[dict(id=i, file_name=name, height=90, width=120) for i, name in enumerate(names)],
            annotations=[dict(box, id=i + 1, image_id=i) for i in range(2)],
            categories=[dict(id=i + 1, name=name) for i, name in enumerate(classes)],
        )
        (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))
    return root


@pytest.fixture(scope='module')
def small_detector(coco):
    """Options for a small RetinaNet, which finds whatever has a score."""
    options = {
        'model.backbone.init_cfg': None,
        'model.backbone.channels': (16, 32, 64, 128),
        'model.backbone.cardinality': 8,
        'model.backbone.base_width': 16,
        'model.neck.in_channels': [64, 128, 256, 512],
        'model.neck.out_channels': 16,
        'model.bbox_head.in_channels': 16,
        'model.bbox_head.feat_channels': 16,
        'model.test_cfg.score_thr': 0.0,
        'model.test_cfg.max_per_img': 10,
        'train_cfg.max_epochs': 1,
    }
    for split, resize in (('train', 2), ('val', 1), ('test', 1)):
        loader = f'{split}_dataloader'
        options.update({f'{loader}.num_workers': 0, f'{loader}.persistent_workers': False})
        options.update(
            {f'{loader}.dataset.data_root': f'{coco}/', f'{loader}.dataset.pipeline.{resize}.scale': (200, 120)}
        )
        if split != 'train':
            options[f'{split}_evaluator.ann_file'] = f'{coco}/annotations/instances_val2017.json'
    return [*as_words(options), 'randomness.seed=0']


@pytest.fixture(scope='module')
def detection_run(train, small_detector, tmp_path_factory):
    return train(RETINANET, tmp_path_factory.mktemp('retinanet'), *small_detector, 'visualizer.name=detection_run')


@pytest.mark.parametrize('words', [[], ['--tta']], ids=' '.join)
def test_detection(load_tool, detection_run, small_detector, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    name = f'detection_{len(words)}'
    words = [RETINANET, str(detection_run / 'epoch_1.pth'), *words, '--out', 'boxes.pkl', '--show-dir', 'pictures']
    options = [f'experiment_name={name}', f'visualizer.name={name}']
    metrics = load_tool('test').main([*words, '--cfg-options', *small_detector, *options])
    assert 0 <= metrics['coco/bbox_mAP'] <= 1
    predictions = pickle.loads((tmp_path / 'boxes.pkl').read_bytes())
    assert [sample['img_id'] for sample in predictions] == [0, 1]
    assert all(0 < len(sample['pred_instances']['bboxes']) <= 100 for sample in predictions)
    drawn = sorted(path.name for path in (tmp_path / 'pictures').iterdir())
    assert drawn == ['000000000000.jpg', '000000000001.jpg']


@pytest.mark.skipif(not torch.cuda.is_available(), reason="mmengine's AmpOptimWrapper needs a GPU")
def test_detection_amp(train, small_detector, tmp_path):
    seen = set()

    def look(module, args, output):
        if isinstance(module, torch.nn.Conv2d):
            seen.add(output.dtype)

    handle = torch.nn.modules.module.register_module_forward_hook(look)
    try:
        options = [*small_detector, 'visualizer.name=detection_amp']
        train('retinanet_sknet50_fpn_amp-1x_coco', tmp_path, *options, arguments=['--no-validate'])
    finally:
        handle.remove()
    assert seen == {torch.float16}
    state_dict, meta = load_checkpoint(tmp_path / 'epoch_1.pth')
    assert (meta['epoch'], meta['iter']) == (1, 1)
    assert all(tensor.isfinite().all() for tensor in state_dict.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason='what is said where there is no GPU')
@pytest.mark.parametrize('model', ['retinanet', 'faster-rcnn', 'mask-rcnn'])
def test_detection_amp_on_a_cpu(load_tool, tmp_path, model):
    pytest.importorskip('mmdet')
    name = f'{model}_sknet50_fpn_amp-1x_coco'
    with pytest.raises(ValueError, match=f"^{name}: optim_wrapper.type='AmpOptimWrapper': mmengine trains with mixed"):
        load_tool('train').main([name, '--work-dir', str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


# What goes with which framework


@pytest.mark.parametrize(
    ('scope', 'out', 'said'),
    [
        ('mmpretrain', 'maps', 'must end in .json (metrics) or .pkl (predictions)'),
        ('mmdet', 'boxes.txt', 'must end in .json (metrics) or .pkl (predictions)'),
        ('mmseg', 'maps.pkl', 'must end in .json (metrics) or be a folder (label maps)'),
    ],
)
def test_bad_out(merge, scope, out, said):
    with pytest.raises(ValueError, match=re.escape(f'--out {out} {said}')):
        merge(dict(default_scope=scope, test_evaluator=dict()), '--out', out)


def test_label_maps_of_several_metrics(merge):
    evaluators = [dict(type='IoUMetric'), dict(type='CityscapesMetric')]
    cfg = merge(dict(default_scope='mmseg', test_evaluator=evaluators), '--out', 'maps')
    assert cfg.test_evaluator == [dict(metric, output_dir='maps', keep_results=True) for metric in evaluators]


@pytest.mark.parametrize(
    ('scope', 'expected'),
    [
        ('mmpretrain', dict(type='Hook')),
        ('mmdet', dict(type='Hook', draw=True)),
        ('mmseg', dict(type='Hook', draw=True)),
    ],
)
def test_show_dir(merge, tmp_path, monkeypatch, scope, expected):
    monkeypatch.chdir(tmp_path)
    config = dict(default_scope=scope, default_hooks=dict(visualization=dict(type='Hook')), visualizer=dict())
    cfg = merge(config, '--show-dir', 'pictures')
    where = str(tmp_path / 'pictures')
    if scope == 'mmseg':
        assert cfg.visualizer == dict(save_dir=where)
    elif scope == 'mmdet':
        expected = {**expected, 'test_out_dir': where}
    else:  # whose own hook would leave one picture of those with one name
        assert cfg.custom_hooks == [dict(type='PictureHook', out_dir=where)]
    assert cfg.default_hooks.visualization == expected
    with pytest.raises(ValueError, match=r'--show-dir pictures: the config has no default_hooks\.visualization'):
        merge(dict(default_scope=scope, default_hooks=dict()), '--show-dir', 'pictures')


def test_show_dir_of_augmented_classification(merge):
    config = dict(default_scope='mmpretrain', default_hooks=dict(visualization=dict(type='Hook')))
    with pytest.raises(ValueError, match='--show-dir pictures: with --tta, mmpretrain does not draw'):
        merge(config, '--show-dir', 'pictures', '--tta')


def detector(**model):
    pipeline = [dict(type='LoadImageFromFile'), dict(type='PackDetInputs', meta_keys=('img_id',))]
    dataset = dict(type='CocoDataset', pipeline=pipeline)
    return dict(default_scope='mmdet', model=dict(type='Detector', **model), test_dataloader=dict(dataset=dataset))


def test_tta_of_a_detector(merge):
    """What mmdetection's own tool sets where the config says nothing."""
    cfg = merge(detector(), '--tta')
    assert (cfg.model.type, cfg.model.module) == ('DetTTAModel', dict(type='Detector'))
    assert cfg.model.tta_cfg == dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
    load, augment = cfg.test_dataloader.dataset.pipeline
    flips, (pack,) = augment.transforms
    assert (load.type, [flip.prob for flip in flips]) == ('LoadImageFromFile', [1, 0])
    assert pack.type == 'PackDetInputs'
    assert {'flip', 'flip_direction', 'scale_factor', 'img_shape'} <= set(pack.meta_keys)


@pytest.mark.parametrize('model', [dict(mask_head=dict()), dict(roi_head=dict(mask_head=dict()))])
def test_tta_of_masks(merge, model):
    with pytest.raises(ValueError, match='--tta: mmdet merges boxes only, and the model predicts masks'):
        merge(detector(**model), '--tta')


@pytest.mark.parametrize('missing', ['tta_model', 'tta_pipeline'])
def test_tta_that_a_segmentation_config_does_not_say(merge, missing):
    config = dict(default_scope='mmseg', model=dict(), tta_model=dict(type='SegTTAModel'), tta_pipeline=[])
    del config[missing]
    with pytest.raises(ValueError, match=f'--tta: the config says no {missing}, and there is no default for mmseg'):
        merge(config, '--tta')


@pytest.mark.parametrize('tool', ['train', 'test'])
@pytest.mark.parametrize(
    ('missing', 'config', 'said'),
    [
        ('mmseg', FCN, "needs mmseg, which is not installed: pip install '.[seg]'"),
        ('mmseg', 'flat', "needs mmseg, which is not installed: pip install '.[seg]'"),
        ('mmdet', 'retinanet_sknet50_fpn_1x_coco', 'needs mmdet, which is not installed: make det'),
        ('mmdet', 'flat', 'needs mmdet, which is not installed: make det'),
    ],
)
def test_framework_that_is_not_installed(load_tool, monkeypatch, tmp_path, tool, missing, config, said):
    """In one line, whether the config's base is missing or, in one that a work dir has, its scope."""
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr('mmengine.config.config.is_installed', lambda package: package != missing)
    if config == 'flat':
        config = str(tmp_path / 'flat.py')
        (tmp_path / 'flat.py').write_text(f'default_scope = {missing!r}\n')
    words = [config, 'x.pth'] if tool == 'test' else [config]
    with pytest.raises(ModuleNotFoundError, match=re.escape(said)) as caught:
        load_tool(tool).main(words)
    assert len(str(caught.value).splitlines()) == 1


def test_import_errors_are_one_line(load_tool, monkeypatch, capsys):
    tool = load_tool('train')
    monkeypatch.delenv('SK_PLUGINS_TRACEBACK', raising=False)
    monkeypatch.setitem(sys.modules, 'mmseg', None)
    monkeypatch.setattr(sys, 'argv', ['train.py', FCN])
    with pytest.raises(SystemExit):
        tool.run(tool.main)
    error, _ = capsys.readouterr().err.strip().splitlines()
    assert error.startswith('train.py: error: ')
    assert error.endswith("pip install '.[seg]' in a clone of sk-plugins")
