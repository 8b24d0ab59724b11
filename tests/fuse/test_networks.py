"""fold_batch_norm of whole networks, of ours and of others."""

import copy
import importlib
import pickle

import pytest
import timm
import torch
from helpers.folded_networks import (
    KINDS,
    NARROW,
    assert_equal,
    each_family,
    each_state,
    make_input,
    make_model,
    narrow,
    norms,
)
from helpers.kinds import one_of_each
from helpers.randomised import randomise
from helpers.tolerances import assert_close
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import sk_plugins
from sk_plugins import SelectiveKernel, fold_batch_norm, zoo


@pytest.mark.parametrize('name', one_of_each(zoo.MODELS))
def test_no_norm_is_left_in_the_zoo(name):
    spec = zoo.MODELS[name]
    model = spec.build(**narrow(spec), device='meta').eval()
    folded = fold_batch_norm(model)
    assert type(folded) is type(model)
    assert norms(folded) == []
    # Every norm's four vectors become one bias.
    saved = sum(3 * module.num_features for module in model.modules() if isinstance(module, _BatchNorm))
    count = sum(tensor.numel() for name, tensor in model.state_dict().items() if 'num_batches' not in name)
    assert count - sum(tensor.numel() for tensor in folded.state_dict().values()) == saved


@pytest.mark.parametrize('name', KINDS)
@torch.no_grad()
def test_equals_the_network(name):
    model = make_model(name, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    x = make_input(dtype=torch.float64)
    assert_equal(fold_batch_norm(model), model, x)
    assert_equal(fold_batch_norm(copy.deepcopy(model).float()), model.float(), x.float())
    assert norms(model)
    for key, tensor in model.double().state_dict().items():
        assert_close(tensor, before[key], dtype=torch.float32, msg=key)


@torch.no_grad()
def test_full_width():
    model = randomise(zoo.MODELS['sknet50'].build(layers=(1, 1, 1, 1)))
    assert_equal(fold_batch_norm(model), model, make_input())


@torch.no_grad()
def test_the_model_stays_as_it_is():
    model = make_model()
    before = copy.deepcopy(model)
    folded = fold_batch_norm(model)
    for parameter in folded.parameters():
        parameter.zero_()
    assert repr(model) == repr(before)
    after = model.state_dict()
    for key, tensor in before.state_dict().items():
        assert torch.equal(after[key], tensor), key


@each_family
@torch.no_grad()
def test_the_copy_is_a_plain_module(name):
    x = make_input(dtype=torch.float64)
    model = make_model(name, dtype=torch.float64)
    folded = fold_batch_norm(model)
    for other in (pickle.loads(pickle.dumps(folded)), copy.deepcopy(folded), fold_batch_norm(folded)):
        assert torch.equal(other(x), folded(x))
    loaded = fold_batch_norm(make_model(name, dtype=torch.float64))
    for parameter in loaded.parameters():
        parameter.mul_(0.5)
    loaded.load_state_dict(folded.state_dict(), strict=True)
    assert torch.equal(loaded(x), folded(x))
    assert not any(module.training for module in folded.modules())
    assert folded.to('meta')(x.to('meta')).shape == (2, 10)
    assert_equal(fold_batch_norm(model).to(memory_format=torch.channels_last), model, x)


def test_training_mode_runs_without_norms():
    folded = make_model(folded=True).train()
    for parameter in folded.parameters():
        parameter.requires_grad_()
    # A batch of one, which the attention's BatchNorm would refuse.
    folded(make_input(1)).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in folded.parameters())


@each_family
@torch.no_grad()
def test_memory_format_stays(name):
    model = make_model(name).to(memory_format=torch.channels_last)
    folded = fold_batch_norm(model)
    weights = [p for p in folded.parameters() if p.ndim == 4]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    x = make_input().to(memory_format=torch.channels_last)
    assert_equal(folded, model, x)
    assert folded.forward_features(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_weights_are_rounded_once(dtype):
    model = make_model().to(dtype)
    exact, folded = fold_batch_norm(copy.deepcopy(model).float()), fold_batch_norm(model)
    for (name, value), expected in zip(folded.state_dict().items(), exact.state_dict().values()):
        assert value.dtype is dtype
        assert torch.equal(value, expected.to(dtype)), name


@pytest.mark.parametrize(
    ('feature_cls', 'out_indices'),
    [*((cls, (2, 4)) for cls in ('list', 'dict', 'hook', 'fx', 'getter')), ('list', (0, 1, 2, 3, 4))],
    ids=str,
)
@torch.no_grad()
def test_features(feature_cls, out_indices):
    model = timm.create_model(
        'sknet50', **NARROW, features_only=True, out_indices=out_indices, feature_cls=feature_cls
    )  # fmt: skip
    model = randomise(model).double()
    folded = fold_batch_norm(model)
    assert type(folded).__name__ == type(model).__name__
    assert norms(folded) == []
    x = make_input(dtype=torch.float64)
    outputs, expected = folded(x), model(x)
    assert len(outputs) == len(out_indices)
    assert_close(outputs, expected, length=model)


@pytest.mark.parametrize('name', ['skresnext50_32x4d', 'resnext50_32x4d', 'resnet18', 'seresnet50'])
@torch.no_grad()
def test_timms_own_networks(name):
    model = timm.create_model(name, layers=(1, 2, 1, 1), channels=(32, 64, 128, 256), num_classes=10)
    model = randomise(model).double()
    folded = fold_batch_norm(model)
    assert norms(folded) == []
    # timm's BatchNorm has the ReLU inside it, which must stay.
    assert_equal(folded, model, make_input(dtype=torch.float64))


@pytest.mark.parametrize('name', ['resnext50_32x4d', 'resnet18', 'shufflenet_v2_x0_5'])
@torch.no_grad()
def test_torchvisions_networks(name):
    torchvision = pytest.importorskip('torchvision')
    model = randomise(torchvision.models.get_model(name, num_classes=10)).double()
    folded = fold_batch_norm(model)
    assert norms(folded) == []
    assert_equal(folded, model, make_input(dtype=torch.float64))


@pytest.mark.parametrize('kind', ['sync', 'sync on CPUs', 'frozen', 'timm frozen'])
@torch.no_grad()
def test_other_kinds_of_batch_norm(kind):
    pytest.importorskip('torchvision')
    model = make_model(dtype=torch.float64)
    timms = timm.create_model('skresnext50_32x4d', layers=(1, 2, 1, 1), channels=(32, 64, 128, 256), num_classes=10)
    timms = randomise(timms).double()
    if kind == 'sync':
        swapped = [nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)).eval()]
        swapped.append(timm.layers.convert_sync_batchnorm(copy.deepcopy(timms)).eval())
    elif kind == 'sync on CPUs':
        sync_batchnorm = pytest.importorskip('sk_plugins.openmmlab.runtime.sync_batchnorm', exc_type=ImportError)
        swapped = [sync_batchnorm.synchronise(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))).eval()]
    else:
        swapped = [timm.utils.model.freeze_batch_norm_2d(copy.deepcopy(m)) for m in (model, timms)]
    x = make_input(dtype=torch.float64)
    for other, reference in zip(swapped, (model, timms)):
        assert len(norms(other)) == len(norms(reference))
        folded = fold_batch_norm(other)
        assert norms(folded) == []
        assert_equal(folded, reference, x)


@pytest.mark.parametrize(
    'backbone',
    [
        dict(type='SKNet', depth=50, channels=(16, 32, 64, 128), cardinality=4, base_width=16),
        dict(type='SKNet', depth=50, channels=(16, 32, 64, 128), norm_cfg=dict(type='SyncBN'), frozen_stages=1),
        dict(type='SKResNet', depth=18, channels=(16, 32, 64, 128), norm_eval=True),
        dict(type='SKShuffleNetV2', widen_factor=0.5),
    ],
    ids=lambda backbone: backbone['type'],
)
@torch.no_grad()
def test_mmpretrain(backbone):
    pytest.importorskip('mmpretrain')
    from mmpretrain.registry import MODELS

    importlib.import_module('sk_plugins.mmpretrain_models')

    channels = {'SKResNet': 128, 'SKShuffleNetV2': 1024}.get(backbone['type'], 512)
    classifier = dict(
        type='ImageClassifier',
        backbone=backbone,
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=10, in_channels=channels),
    )
    model = randomise(MODELS.build(classifier)).double()
    folded = fold_batch_norm(model)
    assert norms(folded) == []
    assert_equal(folded, model, make_input(dtype=torch.float64))
    assert pickle.loads(pickle.dumps(folded))
    folded.train().eval()
    assert_equal(folded, model, make_input(dtype=torch.float64))


@torch.no_grad()
def test_mmdet():
    pytest.importorskip('mmdet')
    from mmdet.registry import MODELS

    importlib.import_module('sk_plugins.mmpretrain_models')

    backbone = dict(type='mmpretrain.SKNet', depth=50, channels=(16, 32, 64, 128), out_indices=(1, 2, 3))
    neck = dict(type='FPN', in_channels=[128, 256, 512], out_channels=16, num_outs=3, norm_cfg=dict(type='BN'))
    model = nn.Sequential(MODELS.build(backbone), MODELS.build(neck))
    model = randomise(model).double()
    folded = fold_batch_norm(model)
    assert norms(folded) == []
    x = make_input(dtype=torch.float64)
    assert_close(folded(x), model(x), length=model)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@each_state
@torch.no_grad()
def test_large_activations_do_not_overflow(dtype, folded):
    # The branches' outputs are near 1e4, and 112 * 112 of them sum to 1e8, which float16 does not hold.
    layer = randomise(SelectiveKernel(16, groups=4))
    for path in layer.paths:
        path.bn.bias.fill_(1e4)
    layer = fold_batch_norm(layer) if folded else layer
    x = make_input(size=112, channels=16)
    expected = layer(x)
    assert 9e3 < expected.mean() < 1.1e4
    for module, image in ((layer, x), (copy.deepcopy(layer).to(dtype), x.to(dtype))):
        with torch.autocast('cpu', dtype=dtype):
            output = module(image)
        assert output.isfinite().all()
        # Sums are kept in float32: the dtype rounds the convolution, the norm, the ReLU and the selected map.
        assert_close(output.float(), expected, length=4, dtype=dtype)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', ['sknet50', 'skshufflenetv2_x1_0'])
def test_autocast_training(name, dtype):
    model = make_model(name).train()
    with torch.autocast('cpu', dtype=dtype):
        loss = model(make_input(4, size=32)).float().square().mean()
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_paths():
    """``sk_plugins.fuse`` is the file; the function has one name."""
    assert sk_plugins.fuse is importlib.import_module('sk_plugins.fuse')
    assert sk_plugins.fuse.fold_batch_norm is sk_plugins.fold_batch_norm
