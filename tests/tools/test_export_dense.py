"""Detectors and segmentors as files: what their heads give, in a runtime as in eager mode."""

import functools

import numpy as np
import pytest
import torch
from helpers.randomised import randomise
from helpers.tolerances import assert_close
from PIL import Image

from sk_plugins._resources import ROOT

CONFIGS = ROOT / 'configs'
NARROW = 'channels=(16, 32, 64, 128), cardinality=8, base_width=16, layers=(1, 1, 1, 1)'
SEGMENTOR = f"""
_base_ = '{CONFIGS}/segmentation/fcn_sknet50-d8_4xb4-80k_ade20k-512x512.py'
model = dict(
    backbone=dict({NARROW}),
    decode_head=dict(in_channels=512, channels=16, num_classes=5),
    auxiliary_head=None,
)
"""
DETECTOR = f"""
_base_ = '{CONFIGS}/detection/retinanet_skresnet18_fpn_1x_coco.py'
model = dict(
    backbone=dict(channels=(16, 32, 64, 128), layers=(1, 1, 1, 1)),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=16),
    bbox_head=dict(num_classes=3, in_channels=16, feat_channels=16, stacked_convs=1),
)
"""
DEPLOY = """
onnx_config = dict(
    type='onnx', export_params=True, keep_initializers_as_inputs=False, opset_version=17, save_file='end2end.onnx',
    input_names=['input'], output_names=['dets', 'labels'], input_shape=None, optimize=False,
    dynamic_axes=dict(
        input={0: 'batch', 2: 'height', 3: 'width'}, dets={0: 'batch', 1: 'n'}, labels={0: 'batch', 1: 'n'}
    ),
)
codebase_config = dict(
    type='mmdet', task='ObjectDetection', model_type='end2end',
    post_processing=dict(
        score_threshold=0.02, confidence_threshold=0.005, iou_threshold=0.5, max_output_boxes_per_class=200,
        pre_top_k=5000, keep_top_k=100, background_label_id=-1,
    ),
)
backend_config = dict(type='onnxruntime')
"""
TWO_STAGE = f"""
_base_ = '{CONFIGS}/detection/faster-rcnn_sknet50_fpn_1x_coco.py'
model = dict(backbone=dict({NARROW}), neck=dict(in_channels=[64, 128, 256, 512]))
"""


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('export')


def build(tmp_path, text, classes):
    """A config of a narrow network, a checkpoint of it with class names, and the network."""
    from _export.dense import build_dense

    (tmp_path / 'narrow.py').write_text(text)
    heads, _ = build_dense(str(tmp_path / 'narrow.py'), None)
    model = randomise(heads.model)
    meta = dict(dataset_meta=dict(classes=classes))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), tmp_path / 'narrow.pth')
    return heads


def export(tool, tmp_path, *words):
    tool.main([str(tmp_path / 'narrow.py'), 'torchscript', str(tmp_path / 'a.ts'), '--checkpoint',
               str(tmp_path / 'narrow.pth'), '--size', '64', *words])  # fmt: skip
    extra = {'metadata.json': ''}
    return torch.jit.load(tmp_path / 'a.ts', _extra_files=extra), extra['metadata.json'].decode()


@torch.no_grad()
def test_segmentor(tool, tmp_path, capsys):
    pytest.importorskip('mmseg')
    heads = build(tmp_path, SEGMENTOR, list('abcde'))
    script, metadata = export(tool, tmp_path, '--preprocess', '--check')
    assert '(1x64x64, 1x97x33, 3x64x64, 3x97x33)' in capsys.readouterr().out
    assert '"labels": "[\\"a\\", \\"b\\", \\"c\\", \\"d\\", \\"e\\"]"' in metadata
    images = torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8)
    (logits,) = script(images)
    assert logits.shape == (2, 5, 8, 12)
    # mmseg's own preprocessing, of BGR as its images are.
    own = heads.model.data_preprocessor(dict(inputs=[image.permute(2, 0, 1).flip(0) for image in images]))
    assert_close(logits, heads.model(own['inputs'], mode='tensor'), length=heads.model)


@torch.no_grad()
def test_detector(tool, tmp_path):
    """The heads' maps, from which mmdet's own head makes the boxes that the detector predicts."""
    pytest.importorskip('mmdet')
    from mmdet.structures import DetDataSample

    heads = build(tmp_path, DETECTOR, ['a', 'b', 'c'])
    script, _ = export(tool, tmp_path, '--check')
    assert heads.outputs == [f'{kind}_{level}' for kind in ('cls_score', 'bbox_pred') for level in range(5)]
    images = torch.randn(1, 3, 64, 96)
    maps = script(images)
    meta = dict(img_shape=(64, 96), batch_input_shape=(64, 96), pad_shape=(64, 96), scale_factor=(1, 1))
    detector = heads.model
    (boxes,) = detector.bbox_head.predict_by_feat(list(maps[:5]), list(maps[5:]), batch_img_metas=[meta], rescale=False)
    (expected,) = detector.predict(images, [DetDataSample(metainfo=meta)], rescale=False)
    assert len(boxes) > 10
    np.testing.assert_array_equal(boxes.labels, expected.pred_instances.labels)
    torch.testing.assert_close(boxes.bboxes, expected.pred_instances.bboxes, rtol=1e-4, atol=1e-2)


def test_two_stages_are_refused(tmp_path, tool):
    pytest.importorskip('mmdet')
    (tmp_path / 'narrow.py').write_text(TWO_STAGE)
    with pytest.raises(ValueError, match=r'narrow\.py: a FasterRCNN chooses its boxes between two networks') as caught:
        tool.main([str(tmp_path / 'narrow.py'), 'torchscript', str(tmp_path / 'a.ts')])
    assert '\n' not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ['narrow.py']


@pytest.mark.slow
@torch.no_grad()
def test_boxes_of_mmdeploy(tmp_path, monkeypatch):
    """MMDeploy's file, at a size that is not the example's, has the detector's own boxes."""
    apis = pytest.importorskip('mmdeploy.apis')
    onnxruntime = pytest.importorskip('onnxruntime')
    from _export.dense import build_dense
    from mmdet.structures import DetDataSample
    from mmengine.config import Config

    torch.manual_seed(0)
    (tmp_path / 'narrow.py').write_text(DETECTOR + 'model.update(test_cfg=dict(score_thr=0.02))\n')
    heads, _ = build_dense(str(tmp_path / 'narrow.py'), None)
    detector = heads.model.eval()
    for key, tensor in detector.state_dict().items():
        if key.endswith('fc_select.weight'):
            tensor.normal_(0, 0.3)
    image = torch.randn(1, 3, 160, 128)
    # Scores of all kinds, and boxes that differ from their anchors.
    head = detector.bbox_head
    for conv, maps, spread in zip((head.retina_cls, head.retina_reg), detector(image), (1.5, 0.3)):
        conv.weight.mul_(spread / torch.cat([m.flatten() for m in maps]).std())
    torch.save(dict(state_dict=detector.state_dict(), meta={}), tmp_path / 'narrow.pth')
    Config.fromfile(tmp_path / 'narrow.py').dump(tmp_path / 'whole.py')
    (tmp_path / 'deploy.py').write_text(DEPLOY)
    Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save(tmp_path / 'a.png')
    monkeypatch.setattr(torch.onnx, 'export', functools.partial(torch.onnx.export, dynamo=False))
    names = (str(tmp_path / name) for name in ('deploy.py', 'whole.py', 'narrow.pth'))
    apis.torch2onnx(str(tmp_path / 'a.png'), str(tmp_path), 'a.onnx', *names, device='cpu')
    session = onnxruntime.InferenceSession(tmp_path / 'a.onnx', providers=['CPUExecutionProvider'])
    boxes, labels = map(torch.from_numpy, session.run(None, {'input': image.numpy()}))
    shape = dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'), (160, 128))
    sample = DetDataSample(metainfo=dict(shape, scale_factor=(1.0, 1.0)))
    own = detector.predict(image, [sample], rescale=False)[0].pred_instances
    assert len(own) == 100
    assert own.scores.std() > 0.01
    assert torch.equal(labels[0], own.labels)
    assert_close(boxes[0, :, 4], own.scores, length=detector)
    assert_close(boxes[0, :, :4], own.bboxes, length=detector)
