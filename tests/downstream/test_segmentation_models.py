"""segmentation-models-pytorch with the networks of this project as its ``tu-`` encoders."""

import copy

import pytest
import timm
import torch
from helpers.kinds import quick
from helpers.randomised import randomise
from helpers.tolerances import assert_close

import sk_plugins  # noqa: F401

smp = pytest.importorskip('segmentation_models_pytorch')

SKNET = dict(layers=(1, 1, 1, 1), channels=(16, 32, 64, 128), cardinality=8, base_width=16)
SHUFFLENET = dict(layers=(2, 2, 2), channels=(12, 24, 48), head_channels=64)
# Channels at strides 2, 4, 8, 16, 32, and what makes the network narrow.
NETWORKS = {
    'sknet26': ([64, 64, 128, 256, 512], SKNET),
    'skresnext101_64x4d': ([64, 64, 128, 256, 512], dict(SKNET, cardinality=16, base_width=8)),
    'skshufflenetv2_x0_5': ([24, 24, 12, 24, 48], SHUFFLENET),
}
each_network = pytest.mark.parametrize('name', quick(NETWORKS, ['sknet26', 'skshufflenetv2_x0_5']))
each_kind = pytest.mark.parametrize('name', ['sknet26', 'skshufflenetv2_x0_5'])


def segmenter(name='sknet26', architecture='Unet', **kwargs):
    torch.manual_seed(0)
    return getattr(smp, architecture)(
        f'tu-{name}', **{'encoder_weights': None, 'classes': 3, **NETWORKS[name][1], **kwargs}
    )


def images(batch=2, size=64):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def assert_features(features, expected, length):
    assert len(features) == len(expected)
    for feature, wanted in zip(features, expected):
        assert_close(feature, wanted, length=length)


@torch.no_grad()
def test_published_weights(published, skresnext50):
    """Those that ``encoder_weights=True`` loads, under timm's own network for comparison."""
    model = smp.Unet('tu-sknet50', encoder_weights=True, decoder_channels=(32, 16, 16, 16, 16), classes=3).eval()
    assert [request.path for request in published.requests if request.method == 'GET'] == [
        '/timm/skresnext50_32x4d.ra_in1k/resolve/main/model.safetensors'
    ]
    assert model.encoder.out_channels == [3, 64, 256, 512, 1024, 2048]
    x = images()
    features = model.encoder(x)
    assert [x.shape[-1] // feature.shape[-1] for feature in features] == [1, 2, 4, 8, 16, 32]
    assert_features(features[1:], skresnext50.forward_intermediates(x, intermediates_only=True), skresnext50)
    assert model(x).shape == (2, 3, 64, 64)


@torch.no_grad()
def test_default_is_the_published_weights_and_a_warning(published, skresnext50):
    """Every architecture's default is 'imagenet', which smp takes for True."""
    with pytest.warns(UserWarning, match='encoder_weights'):
        encoder = smp.encoders.get_encoder('tu-sknet50', in_channels=1, weights='imagenet')
    wanted = skresnext50.conv1.weight.sum(1, keepdim=True)
    assert_close(encoder.model.conv1.weight, wanted, length=3)


def test_weights_that_are_not_published():
    with pytest.raises(RuntimeError, match=r'sknet101 has no published weights .*sknet50\.ra_in1k'):
        smp.Unet('tu-sknet101', encoder_weights=True)


def test_preprocessing():
    params = smp.encoders.get_preprocessing_params('tu-sknet50')
    assert params['mean'] == [0.485, 0.456, 0.406]
    assert params['std'] == [0.229, 0.224, 0.225]
    assert params['input_range'] == [0, 1]


@pytest.mark.parametrize('output_stride', [8, 16, 32])
@each_network
@torch.no_grad()
def test_encoder_is_timms_features(name, output_stride):
    channels, narrow = NETWORKS[name]
    dilated = {} if output_stride == 32 else dict(output_stride=output_stride)
    expected = randomise(timm.create_model(name, features_only=True, **dilated, **narrow))
    model = segmenter(name, architecture='FPN' if output_stride == 32 else 'DeepLabV3Plus', **{
        f'encoder_{key}': value for key, value in dilated.items()
    }).eval()  # fmt: skip
    model.encoder.model.load_state_dict(expected.state_dict())
    assert model.encoder.output_stride == output_stride
    assert model.encoder.out_channels == [3, *channels]
    x = images(size=96)
    features = model.encoder(x)
    strides = [min(stride, output_stride) for stride in (1, 2, 4, 8, 16, 32)]
    assert [tuple(feature.shape) for feature in features] == [
        (2, c, 96 // stride, 96 // stride) for c, stride in zip((3, *channels), strides)
    ]
    assert_features(features[1:], expected(x), expected)
    assert model(x).shape == (2, 3, 96, 96)


@pytest.mark.parametrize(
    'architecture',
    quick(
        ['UnetPlusPlus', 'MAnet', 'Linknet', 'PSPNet', 'PAN', 'DeepLabV3', 'UPerNet', 'Segformer'],
        ['PAN', 'DeepLabV3', 'UPerNet'],
    ),
)
def test_every_other_architecture(architecture):
    size = 128 if architecture == 'PAN' else 64  # PAN halves the last features three times
    model = segmenter(architecture=architecture)
    output = model(images(size=size))
    assert output.shape == (2, 3, size, size)
    output.square().mean().backward()
    for name, parameter in model.encoder.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize(
    ('name', 'architecture'),
    [
        ('sknet26', 'Unet'),
        pytest.param('sknet26', 'DeepLabV3Plus', marks=pytest.mark.slow),
        pytest.param('skshufflenetv2_x0_5', 'Unet', marks=pytest.mark.slow),
    ],
)
def test_training(name, architecture):
    """Bright squares are to be found: the loss falls to under two thirds, and every encoder weight moves."""
    model = segmenter(name, architecture, classes=1).train()
    before = copy.deepcopy(model.encoder.state_dict())
    mask = torch.zeros(4, 1, 64, 64)
    for i in range(4):
        mask[i, :, 8 * i : 8 * i + 32, 32 - 8 * i : 64 - 8 * i] = 1
    x = images(batch=4) * 0.3 + mask
    loss_function = smp.losses.SoftBCEWithLogitsLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = loss_function(model(x), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 2 / 3, losses
    after = model.encoder.state_dict()
    assert [key for key, tensor in before.items() if torch.equal(after[key], tensor)] == []


@each_kind
def test_frozen_encoder(name):
    model = segmenter(name)
    with pytest.raises(ValueError, match='batch of 1'):
        model.train()(images(batch=1))
    model.freeze_encoder()
    before = copy.deepcopy(model.encoder.state_dict())
    model.train()
    model(images(batch=1)).mean().backward()
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.encoder.state_dict().items())
    model.unfreeze_encoder()
    model.train()
    model(images()).mean().backward()
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())
    assert not torch.equal(next(iter(model.encoder.buffers())), next(iter(before.values())))


@each_kind
@torch.no_grad()
def test_saved_and_loaded(name, tmp_path):
    model = randomise(segmenter(name, 'DeepLabV3Plus', encoder_output_stride=8))
    model.save_pretrained(tmp_path)
    again = smp.from_pretrained(tmp_path).eval()
    x = images()
    assert torch.equal(again(x), model(x))


@torch.no_grad()
def test_torchscript():
    model = randomise(segmenter())
    x = images()
    assert_close(torch.jit.script(model)(x), model(x), length=model)


def test_networks_for_small_images_are_refused():
    """Their features have strides 1, 1, 2 and 4, which smp knows no decoder for."""
    with pytest.raises(ValueError, match='Unsupported model downsampling pattern'):
        smp.Unet('tu-sknet29_16x32d', encoder_weights=None)
