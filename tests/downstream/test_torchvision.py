"""torchvision's detectors over an FPN on timm's ``features_only``."""

import copy

import pytest
import timm
import torch
from helpers.kinds import quick
from helpers.randomised import randomise
from torch import nn

from sk_plugins import zoo

pytest.importorskip('torchvision')
from helpers.tolerances import assert_close
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

SKNET = dict(layers=(1, 1, 1, 1), channels=(16, 32, 64, 128), cardinality=8, base_width=16)
NETWORKS = {
    'sknet26': SKNET,
    'skresnext101_64x4d': dict(SKNET, cardinality=16, base_width=8),
    'skshufflenetv2_x0_5': dict(layers=(2, 2, 2), channels=(12, 24, 48)),
}
each_network = pytest.mark.parametrize('name', quick(NETWORKS, ['sknet26', 'skshufflenetv2_x0_5']))
each_kind = pytest.mark.parametrize('name', ['sknet26', 'skshufflenetv2_x0_5'])


def features_only(name, **kwargs):
    return timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4), **NETWORKS[name], **kwargs)


def with_fpn(features, extra_blocks=None):
    info = features.feature_info
    layers = {name: str(i) for i, name in enumerate(info.module_name())}
    return BackboneWithFPN(features, layers, info.channels(), 32, extra_blocks or LastLevelMaxPool())


def detector(features, kind=FasterRCNN):
    size = dict(min_size=96, max_size=128)
    if kind is RetinaNet:
        sizes = tuple((8 * 2**i,) for i in range(6))
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 6)
        return RetinaNet(with_fpn(features, LastLevelP6P7(32, 32)), 4, anchor_generator=anchors, **size)
    anchors = AnchorGenerator(tuple((8 * 2**i,) for i in range(5)), ((0.5, 1.0, 2.0),) * 5)
    few = dict(rpn_post_nms_top_n_train=64, box_batch_size_per_image=32, box_detections_per_img=7)
    return kind(with_fpn(features), 4, rpn_anchor_generator=anchors, **few, **size)


def pictures():
    """Two with a bright square each, of different sizes and none a multiple of 32, and their targets."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, *size, generator=generator) * 0.3 for size in ((90, 110), (120, 97))]
    boxes = [(10, 20, 50, 60), (40, 30, 80, 90)]
    targets = []
    for image, (left, top, right, bottom) in zip(images, boxes):
        image[:, top:bottom, left:right] += 0.7
        mask = torch.zeros(1, *image.shape[1:], dtype=torch.uint8)
        mask[:, top:bottom, left:right] = 1
        boxes = torch.tensor([[left, top, right, bottom]], dtype=torch.float32)
        targets.append(dict(boxes=boxes, labels=torch.tensor([2]), masks=mask))
    return images, targets


def empty(target):
    return {key: tensor[:0] for key, tensor in target.items()}


@pytest.mark.parametrize('output_stride', [8, 16, 32])
@each_network
@torch.no_grad()
def test_body_is_timms_features(name, output_stride):
    features = randomise(features_only(name, output_stride=output_stride))
    backbone = with_fpn(copy.deepcopy(features)).eval()
    x = torch.rand(2, 3, 96, 96)
    body, pyramid = backbone.body(x), backbone(x)
    strides = [min(stride, output_stride) for stride in (4, 8, 16, 32)]
    assert list(body) == ['0', '1', '2', '3']
    for feature, wanted, stride in zip(body.values(), features(x), strides):
        assert feature.shape[-2:] == (96 // stride, 96 // stride)
        assert_close(feature, wanted, length=features)
    assert {key: tuple(level.shape) for key, level in pyramid.items() if key != 'pool'} == {
        str(i): (2, 32, 96 // stride, 96 // stride) for i, stride in enumerate(strides)
    }


@pytest.mark.parametrize('name', quick(['skresnet18', 'skresnet50d'], ['skresnet18']))
@torch.no_grad()
def test_sk_resnet(name):
    """timm has these names; the network of this project, with the same weights, gives the same features."""
    timms = randomise(timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4)))
    ours = zoo.MODELS[name].build(num_classes=0)
    ours.load_state_dict(timms.state_dict())
    layers = {f'layer{i}': str(i) for i in (1, 2, 3, 4)}
    backbone = BackboneWithFPN(ours, layers, timms.feature_info.channels(), 32).eval()
    x = torch.rand(2, 3, 64, 64)
    for feature, wanted in zip(backbone.body(x).values(), timms(x), strict=True):
        assert_close(feature, wanted, length=timms)


@pytest.mark.parametrize(
    ('name', 'kind'),
    [
        ('sknet26', FasterRCNN),
        ('skshufflenetv2_x0_5', FasterRCNN),
        pytest.param('sknet26', MaskRCNN, marks=pytest.mark.slow),
        pytest.param('sknet26', RetinaNet, marks=pytest.mark.slow),
    ],
)
def test_losses_and_predictions(name, kind):
    torch.manual_seed(0)
    model = detector(features_only(name), kind).train()
    images, targets = pictures()
    sum(model(images, targets).values()).backward()
    for parameter_name, parameter in model.backbone.named_parameters():
        assert torch.isfinite(parameter.grad).all(), parameter_name
        assert (parameter.grad != 0).any(), parameter_name
    for some in ([targets[0], empty(targets[1])], [empty(target) for target in targets]):
        losses = model(images, some)
        assert all(torch.isfinite(loss) for loss in losses.values()), losses
        model.zero_grad()
        sum(losses.values()).backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in model.backbone.parameters())
    model.eval()
    with torch.no_grad():
        for image, found in zip(images, model(images), strict=True):
            assert set(found) == {'boxes', 'labels', 'scores'} | ({'masks'} if kind is MaskRCNN else set())
            assert found['boxes'].shape == (len(found['scores']), 4)
            assert (found['boxes'] >= 0).all()
            assert (found['boxes'][:, 2:] <= torch.tensor([image.shape[2], image.shape[1]]) + 1e-3).all()
            assert len(found['scores']) == 7 or kind is RetinaNet  # whose classifier starts at one per cent


@pytest.mark.parametrize('name', quick(['sknet26', 'skshufflenetv2_x0_5'], ['sknet26']))
def test_training(name):
    """The losses of two pictures fall to under half, and every weight of the backbone moves."""
    torch.manual_seed(0)
    model = detector(features_only(name)).train()
    before = copy.deepcopy(model.backbone.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(10):
        loss = sum(model(*pictures()).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2, losses
    after = model.backbone.state_dict()
    assert [key for key, tensor in before.items() if torch.equal(after[key], tensor)] == []


@pytest.mark.parametrize(
    ('name', 'stem'), [('sknet26', ['conv1', 'bn1', 'layer1']), ('skshufflenetv2_x0_5', ['conv1', 'stage2'])]
)
def test_frozen_stages(name, stem):
    """``timm.utils.freeze``: parameters and statistics, through ``train()``, with the features as they were."""
    features = randomise(features_only(name))
    x = torch.rand(2, 3, 64, 64)
    expected = features(x)
    timm.utils.freeze(features, stem)
    for feature, wanted in zip(features(x), expected, strict=True):
        assert_close(feature, wanted, length=features)
    model = detector(features).train()
    before = copy.deepcopy(model.backbone.body.state_dict())
    sum(model(*pictures()).values()).backward()
    frozen = tuple(f'{module}.' for module in stem)
    for key, parameter in model.backbone.body.named_parameters():
        assert (parameter.grad is None) == key.startswith(frozen), key
    same = {key for key, tensor in model.backbone.body.state_dict().items() if torch.equal(tensor, before[key])}
    parameters = {key for key, _ in model.backbone.body.named_parameters()}
    assert same - parameters == {key for key in before if key.startswith(frozen)} - parameters
    assert same - parameters


@each_kind
def test_a_picture_at_a_time(name):
    """The attention's BatchNorm needs two in training, but where it is frozen."""
    images, targets = pictures()
    with pytest.raises(ValueError, match='batch of 1'):
        detector(features_only(name)).train()(images[:1], targets[:1])
    features = timm.layers.freeze_batch_norm_2d(features_only(name))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in features.modules())
    assert any(isinstance(module, FrozenBatchNorm2d) for module in features.modules())
    model = detector(features).train()
    sum(model(images[:1], targets[:1]).values()).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.backbone.parameters())
