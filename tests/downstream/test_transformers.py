"""transformers' DETRs on timm's names, those of this project among them."""

import copy

import pytest
import timm
import torch
from helpers.randomised import randomise
from helpers.tolerances import assert_close
from safetensors.torch import save

import sk_plugins  # noqa: F401

transformers = pytest.importorskip('transformers')

SMALL = dict(
    d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=2,
    decoder_attention_heads=2, num_queries=10, num_labels=3,
)  # fmt: skip


def detr(backbone, kind='Detr', **kwargs):
    torch.manual_seed(0)
    config = {'backbone': backbone, 'use_timm_backbone': True, **SMALL, **kwargs}
    if kind == 'DabDetr':
        config['hidden_size'] = config.pop('d_model')
    config = getattr(transformers, f'{kind}Config')(**config)
    return getattr(transformers, f'{kind}ForObjectDetection')(config)


def encoder(model):
    """timm's features, of any of these detectors."""
    (features,) = (module for module in model.modules() if isinstance(module, timm.models.FeatureListNet))
    return features


def pictures(batch=2):
    """A bright square each, and its label."""
    x = torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 0.3
    labels = []
    for i in range(batch):
        x[i, :, 8 : 40 + 8 * i, 16:40] += 2
        height = (32 + 8 * i) / 64
        box = torch.tensor([[28 / 64, 8 / 64 + height / 2, 24 / 64, height]])
        labels.append(dict(class_labels=torch.tensor([1]), boxes=box))
    return x, labels


EMPTY = dict(class_labels=torch.zeros(0, dtype=torch.long), boxes=torch.zeros(0, 4))


@torch.no_grad()
def test_published_weights(published, skresnext50):
    """The README's way: DetrConfig never loads a backbone's weights, timm's features do."""
    model = detr('sknet50', use_pretrained_backbone=True).eval()
    assert published.requests == []
    features = encoder(model)
    assert model.model.backbone.model is features
    assert features.feature_info.reduction() == [4, 8, 16, 32]
    assert features.feature_info.channels() == [256, 512, 1024, 2048]
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in features.modules())
    pretrained = timm.create_model('sknet50', features_only=True, out_indices=(1, 2, 3, 4), pretrained=True)
    features.load_state_dict(pretrained.state_dict())
    x, _ = pictures()
    wanted = skresnext50.forward_intermediates(x, indices=4, intermediates_only=True)
    for feature, expected, stride in zip(features(x), wanted, (4, 8, 16, 32), strict=True):
        assert feature.shape[-2:] == (64 // stride, 64 // stride)
        assert_close(feature, expected, length=features)
    output = model(pixel_values=x)
    assert output.logits.shape == (2, 10, 4)
    assert output.pred_boxes.shape == (2, 10, 4)


@pytest.mark.parametrize('name', ['sknet26', 'skshufflenetv2_x0_5'])
@torch.no_grad()
def test_dilation(name):
    features = encoder(detr(name, dilation=True)).eval()
    wanted = timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4), output_stride=16)
    features.load_state_dict(randomise(wanted).state_dict())
    x, _ = pictures()
    for feature, expected, stride in zip(features(x), wanted(x), (4, 8, 16, 16), strict=True):
        assert feature.shape[-2:] == (64 // stride, 64 // stride)
        assert_close(feature, expected, length=features)


@pytest.mark.parametrize('name', ['sknet26', 'skshufflenetv2_x1_0'])
@torch.no_grad()
def test_saved_and_loaded(name, tmp_path):
    model = detr(name).eval()
    randomise(encoder(model))
    model.save_pretrained(tmp_path)
    again = transformers.DetrForObjectDetection.from_pretrained(tmp_path).eval()
    x, _ = pictures()
    assert torch.equal(again(pixel_values=x).logits, model(pixel_values=x).logits)


def test_training():
    """The loss of two pictures falls by a third, and every weight of the backbone moves."""
    model = detr('skshufflenetv2_x0_5').train()
    features = encoder(model)
    before = copy.deepcopy(features.state_dict())
    x, labels = pictures()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = model(pixel_values=x, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 2 / 3, losses
    parameters = dict(features.named_parameters())
    assert [key for key, tensor in parameters.items() if torch.equal(tensor, before[key])] == []
    after = features.state_dict()
    frozen = before.keys() - parameters.keys()
    assert [key for key in frozen if not torch.equal(after[key], before[key])] == [], "DETR's norms are frozen"


def test_empty_labels_and_a_batch_of_one():
    model = detr('skshufflenetv2_x0_5').train()
    x, labels = pictures()
    for some in ([labels[0], EMPTY], [EMPTY, EMPTY], [labels[0]]):
        model.zero_grad()
        loss = model(pixel_values=x[: len(some)], labels=some).loss
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(parameter.grad).all() for parameter in encoder(model).parameters())


def test_frozen_backbone():
    """transformers freezes nothing by itself; all of it, or timm's choice of stages."""
    model = detr('sknet26').train()
    features = encoder(model)
    assert all(parameter.requires_grad for parameter in features.parameters())
    timm.utils.freeze(features, ['conv1', 'layer1'])
    x, labels = pictures()
    model(pixel_values=x, labels=labels).loss.backward()
    for name, parameter in features.named_parameters():
        assert (parameter.grad is None) == name.startswith(('conv1.', 'layer1.')), name
    model.zero_grad()
    model.model.freeze_backbone()
    model(pixel_values=x, labels=labels).loss.backward()
    assert all(parameter.grad is None for parameter in features.parameters())
    assert model.class_labels_classifier.weight.grad is not None


@pytest.mark.parametrize('kind', ['ConditionalDetr', 'DabDetr', 'DeformableDetr', 'TableTransformer'])
def test_other_detrs(kind):
    model = detr('skshufflenetv2_x0_5', kind).train()
    features = encoder(model)
    x, labels = pictures()
    output = model(pixel_values=x, labels=labels)
    assert output.logits.shape == (2, 10, 4 if kind == 'TableTransformer' else 3)
    assert torch.isfinite(output.loss)
    output.loss.backward()
    for name, parameter in features.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name


@pytest.mark.slow
@pytest.mark.parametrize('name', ['sknet50', 'skresnet18'])
@torch.no_grad()
def test_timm_backbone_resets_statistics(published, name):
    """transformers 5.20 to 5.23 forget what BatchNorms have counted, of timm's own networks too; the weights arrive."""
    if name == 'skresnet18':
        state_dict = randomise(timm.create_model(name)).state_dict()
        published.add('timm/skresnet18.ra_in1k', {'model.safetensors': save(state_dict)})
    wanted = timm.create_model(name, pretrained=True, features_only=True)
    backbone = transformers.TimmBackbone.from_pretrained(name, out_indices=[1, 2, 3, 4])
    given = backbone._backbone.state_dict()
    differ = {key for key, tensor in wanted.state_dict().items() if not torch.equal(given[key], tensor)}
    assert differ == {key for key in given if key.endswith(('running_mean', 'running_var'))}
    backbone._backbone.load_state_dict(wanted.state_dict())
    x, _ = pictures()
    for feature, expected in zip(backbone.eval()(x).feature_maps, wanted.eval()(x)[1:], strict=True):
        assert_close(feature, expected, length=wanted)
