"""tools/benchmark_detection.py: what it compares is one detector, and what it writes."""

import copy
import json

import pytest

pytest.importorskip('mmdet')

import torch
from helpers.randomised import randomise
from helpers.tolerances import assert_close

SMALL = ['--size', '64', '--repeats', '2', '--threads', '1']


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('benchmark_detection')


def test_all_compute_one_loss(tool):
    """With the same weights, SKNet-50 is timm's network in the detector; frozen, it is what that is in eval mode."""
    theirs, own, frozen = (variant.build().double() for variant in tool.variants())
    weights = copy.deepcopy(randomise(theirs).state_dict())
    for model in (own, frozen):
        model.load_state_dict({key.replace('.timm_model.', '.'): value for key, value in weights.items()})
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)).double()
    with torch.inference_mode():
        for model, mode in ((frozen, False), (own, True)):
            expected = theirs.train(mode)(images)
            # Batch statistics of small maps make the rounding larger.
            assert_close(model.train()(images), expected, length=theirs, gain=1e4)
    learning = {key for key, p in own.named_parameters() if p.requires_grad}
    assert learning == {key.replace('.timm_model.', '.') for key, p in theirs.named_parameters() if p.requires_grad}
    stem_and_stage = ('conv1.', 'bn1.', 'layer1.')
    assert {key for key, p in frozen.named_parameters() if p.requires_grad} == {
        key for key in learning if not key.startswith(tuple(f'detector.backbone.{name}' for name in stem_and_stage))
    }


def test_boxes_lie_within_their_image(tool):
    for index in range(8):
        sample = tool.annotate(index, 64, 96)
        boxes, labels = sample.gt_instances.bboxes, sample.gt_instances.labels
        assert boxes.shape == (7, 4)
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= torch.tensor([96, 64])).all()
        assert (boxes[:, 2:] - boxes[:, :2] > 0.04 * 64).all()
        assert (labels < 80).all()
    assert not torch.equal(tool.annotate(0, 64, 96).gt_instances.bboxes, tool.annotate(1, 64, 96).gt_instances.bboxes)


def test_writes_ratios(tool, tmp_path, capsys):
    files = ['--json', str(tmp_path / 'new' / 'b.json'), '--markdown', str(tmp_path / 'b.md')]
    tool.main([*SMALL, *files])
    report = json.loads((tmp_path / 'new' / 'b.json').read_text())
    assert (tmp_path / 'b.md').read_text() == capsys.readouterr().out
    assert [row['model'] for row in report['results']] == [variant.label for variant in tool.variants()]
    assert report['baseline'] == tool.BASELINE
    assert all(len(row['samples']) == 2 and row['mode'] == 'train' for row in report['results'])
    theirs, own, frozen = (row['ratios']['saved_mib']['median'] for row in report['results'])
    assert theirs == 1
    # The backbone keeps about three quarters of what timm's does, and the rest of the detector is the same.
    assert 0.7 < own < 0.9
    assert frozen < own


@pytest.mark.parametrize(
    ('words', 'said'),
    [
        (['--batch-size', '1'], '--batch-size 1: a training step needs two images or more'),
        (['--size', '0'], '--size 0: must be at least 1'),
    ],
)
def test_bad_arguments(tool, words, said):
    with pytest.raises(ValueError, match=said):
        tool.main(words)
