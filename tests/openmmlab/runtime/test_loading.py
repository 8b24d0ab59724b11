"""What mmengine's own functions read once the runtime is imported; tests/tools/test_errors.py has the tools' errors."""

import pytest

pytest.importorskip('mmpretrain')

import torch
from mmengine.runner import load_checkpoint
from mmpretrain.registry import MODELS
from safetensors.torch import save_file

import sk_plugins.mmpretrain_models
import sk_plugins.openmmlab.runtime  # noqa: F401 - switches it on
from sk_plugins.weights import CheckpointError

NARROW = dict(depth=26, channels=(16, 32, 64, 128), cardinality=8, base_width=16)


def backbone(checkpoint=None, **kwargs):
    init_cfg = checkpoint and dict(type='Pretrained', checkpoint=str(checkpoint))
    model = MODELS.build(dict(type='SKNet', init_cfg=init_cfg, **{**NARROW, **kwargs}))
    model.init_weights()
    return model


def test_a_checkpoint_of_the_whole_model_must_fit_the_backbone(tmp_path):
    """Where mmengine would only warn."""
    torch.save(backbone(layers=(1, 1, 1, 1)).state_dict(), tmp_path / 'tiny.pth')
    head = dict(type='LinearClsHead', num_classes=10, in_channels=512)
    classifier = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(type='SKNet', **NARROW),
            neck=dict(type='GlobalAveragePooling'),
            head=head,
        )
    )
    said = (
        r'tiny\.pth: its weights do not fit this SKNet of depth 26: backbone\.layer1\.1\.conv1\.conv\.weight is missing'
    )
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(classifier, str(tmp_path / 'tiny.pth'), map_location='cpu', logger='current')


def test_safetensors(tmp_path):
    path = tmp_path / 'tiny.safetensors'
    with pytest.raises(FileNotFoundError, match=r'tiny\.safetensors: no such checkpoint file'):
        backbone(path)
    path.write_bytes(b'\xff' * 100)
    with pytest.raises(ValueError, match=r'tiny\.safetensors: not a safetensors file'):
        backbone(path)
    weights = {name: tensor + 1 for name, tensor in backbone().state_dict().items()}
    save_file(weights, path)
    loaded = backbone(path).state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in loaded)


def test_a_damaged_history(tmp_path):
    """Of a checkpoint's logs, whatever they hold, nothing gets into mmengine's class."""
    from mmengine.logging import HistoryBuffer
    from mmengine.runner import CheckpointLoader

    before = dict(HistoryBuffer()._statistics_methods)
    logs = HistoryBuffer([1.0, 3.0], [1, 1])
    logs._statistics_methods = {'mean': HistoryBuffer.max}  # what its class would take over
    content = dict(meta={}, state_dict=backbone().state_dict(), message_hub=dict(log_scalars={'train/loss': logs}))
    torch.save(content, tmp_path / 'x.pth')
    read = CheckpointLoader.load_checkpoint(str(tmp_path / 'x.pth'))['message_hub']['log_scalars']['train/loss']
    assert (read.mean(), read.max(), read.current()) == (2.0, 3.0, 3.0)
    assert HistoryBuffer._statistics_methods == before
    logs._log_history = None
    torch.save(content, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'x\.pth: holds a damaged history of logs: '):
        CheckpointLoader.load_checkpoint(str(tmp_path / 'x.pth'))
