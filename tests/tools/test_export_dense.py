"""Detectors and segmentors as files: what their heads give, in a runtime as in eager mode."""

import numpy as np
import pytest
import torch
from helpers.randomised import randomise
from helpers.tolerances import assert_close

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
