"""timm's and torchvision's ways to features, beyond ``tests/timm_models``: dilated, of inner layers, frozen."""

import pytest
import timm
import torch
from helpers.randomised import randomise
from helpers.tolerances import assert_close
from timm.utils import AttentionExtract
from torch import nn

from sk_plugins import SelectiveKernel

NETWORKS = {
    'sknet26': dict(layers=(1, 1, 1, 2), channels=(16, 32, 64, 128), cardinality=8, base_width=16),
    'skshufflenetv2_x0_5': dict(layers=(2, 2, 2), channels=(12, 24, 48)),
}
each_kind = pytest.mark.parametrize('name', NETWORKS)


def create(name, **kwargs):
    return randomise(timm.create_model(name, **NETWORKS[name], **kwargs))


def images(batch=2):
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'hook', 'fx', 'getter'])
@each_kind
@torch.no_grad()
def test_dilated_features(name, feature_cls):
    whole = create(name, output_stride=8, num_classes=0)
    x = images()
    expected = whole.forward_intermediates(x, indices=4, intermediates_only=True)
    model = timm.create_model(
        name, **NETWORKS[name], output_stride=8, features_only=True, feature_cls=feature_cls,
        out_indices=(1, 2, 3, 4), pretrained=True, pretrained_cfg_overlay=dict(state_dict=whole.state_dict()),
    ).eval()  # fmt: skip
    assert model.feature_info.reduction() == [4, 8, 8, 8]
    features = model(x)
    features = list(features.values()) if isinstance(features, dict) else features
    for feature, wanted, stride in zip(features, expected, (4, 8, 8, 8), strict=True):
        assert feature.shape[-2:] == (64 // stride, 64 // stride)
        assert_close(feature, wanted, length=model)


@each_kind
@torch.no_grad()
def test_attention_of_every_layer(name):
    """(B, M, C, 1, 1), one over the branches; timm's extractor and torchvision's agree."""
    extraction = pytest.importorskip('torchvision.models.feature_extraction')
    model = create(name)
    layers = {key: module for key, module in model.named_modules() if isinstance(module, SelectiveKernel)}
    found = AttentionExtract(model, names=['*.attn'], method='hook')(images())
    assert list(found) == [f'{key}.attn' for key in layers]
    for attention, layer in zip(found.values(), layers.values()):
        assert attention.shape == (2, 2, layer.out_channels, 1, 1)
        assert_close(attention.sum(1), torch.ones(2, layer.out_channels, 1, 1), length=layer)
        assert attention.std() > 1e-3
    traced = extraction.create_feature_extractor(model, list(found))(images())
    for key, attention in found.items():
        assert_close(traced[key], attention, length=model)


@each_kind
def test_freeze_and_unfreeze(name):
    model = create(name, num_classes=10)
    x = images()
    expected = model(x)
    timm.utils.freeze(model)
    assert_close(model(x), expected, length=model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.train()(images(batch=1))  # no BatchNorm is left that would need two
    timm.utils.unfreeze(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == sum(
        isinstance(module, nn.BatchNorm2d) for module in create(name).modules()
    )
    assert_close(model.eval()(x), expected, length=model)
