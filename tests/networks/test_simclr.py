"""SimCLRv2's networks: what they compute, beside a restatement of their description, and their arguments."""

import pytest
import torch
import torch.nn.functional as F
from helpers.simclr import ARGS, avg_pool, make_image, make_lightly, make_network, max_pool, restate
from torch import nn

from sk_plugins import fold_batch_norm
from sk_plugins.networks import SKResNetSimCLR
from sk_plugins.networks.simclr import PaddedAvgPool2d, SameMaxPool2d, preprocess
from sk_plugins.ops import stubbed_launches, ways

LAYERS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}

# Without the classifier, as Google's networks have them.
PARAMETERS = {
    (50, 1): 35_215_584,
    (50, 2): 140_306_048,
    (101, 1): 64_662_304,
    (101, 2): 257_132_224,
    (152, 1): 88_940_896,
    (152, 2): 353_398_528,
    (152, 3): 794_704_160,
}
SIZES = [(64, 64), (65, 65), (50, 67), (33, 96)]
each_size = pytest.mark.parametrize('size', SIZES, ids=str)


def assert_equal(output, expected):
    assert output.shape == expected.shape
    assert (output - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize(('depth', 'width'), PARAMETERS)
def test_parameters(depth, width):
    model = SKResNetSimCLR(LAYERS[depth], width, num_classes=0, device='meta')
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[depth, width]
    dims = [stage[0].conv2.attn.bn.num_features for stage in (model.layer1, model.layer2, model.layer3, model.layer4)]
    assert dims == {1: [32, 32, 32, 32], 2: [32, 32, 32, 64], 3: [32, 32, 48, 96]}[width]
    assert not any(m.bias is not None for m in model.modules() if isinstance(m, nn.Conv2d))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-5, 0.1)}


@each_size
@torch.no_grad()
def test_pooling(size):
    x = make_image(*size) - 0.5
    assert torch.equal(SameMaxPool2d()(x), max_pool(x))
    assert_equal(PaddedAvgPool2d(2)(x), avg_pool(x, 2))
    assert_equal(PaddedAvgPool2d(1, 'replicate')(x), avg_pool(x, 1))


@torch.no_grad()
def test_pooling_of_even_and_odd_maps():
    """Counted by hand."""
    even, odd = torch.arange(4.0).view(1, 1, 1, 4), torch.arange(5.0).view(1, 1, 1, 5)
    assert SameMaxPool2d()(even).flatten().tolist() == [2, 3]
    assert SameMaxPool2d()(odd).flatten().tolist() == [1, 3, 4]
    assert SameMaxPool2d()(-odd).flatten().tolist() == [0, -1, -3]
    even, odd = even.expand(1, 1, 2, 4), odd.expand(1, 1, 3, 5)
    assert PaddedAvgPool2d(2)(even).flatten().tolist() == [0.5, 2.5]
    assert PaddedAvgPool2d(2)(odd).tolist() == [[[[0.5, 2.5, 2.0], [0.25, 1.25, 1.0]]]]
    assert PaddedAvgPool2d(1, 'replicate')(even).tolist() == [[[[0.5, 1.5, 2.5, 3.0]] * 2]]


@pytest.mark.parametrize('projection', [0, 1, 2])
@each_size
@torch.no_grad()
def test_equals_its_description(size, projection):
    model, weights = make_lightly(projection=projection)
    x = make_image(*size)
    expected = restate(weights, x, projection=projection)
    assert (expected[0] - expected[1]).abs().max() > 1e-3 * expected.abs().max()
    assert_equal(model(x), expected)
    assert_equal(make_network(projection=projection, sk_kwargs=dict(backend='plain'))(x), expected)
    assert_equal(fold_batch_norm(model)(x), expected)


@torch.no_grad()
def test_torchs_own_pooling_would_not():
    model, weights = make_lightly()
    x = make_image(64, 64)
    model.maxpool = nn.MaxPool2d(3, 2, padding=1)
    expected = restate(weights, x)
    assert (model(x) - expected).abs().max() > 1e-3 * expected.abs().max()


def test_gradients_are_the_plain_modules():
    """In training the engines compute the units, shortcuts with pooling included."""
    x = make_image(65, 64)
    models = [make_network(sk_kwargs=dict(backend=backend)).train() for backend in ('plain', 'recompute')]
    outputs = [model(x) for model in models]
    assert ways(models[0]) == {'plain': 6}
    assert ways(models[1]) == {'recompute': 6}
    assert_equal(outputs[1], outputs[0])
    for output in outputs:
        output.square().mean().backward()
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters()):
        assert (one.grad - other.grad).abs().max() <= 1e-9 * one.grad.abs().max() + 1e-15, name


def test_gpus_engine_takes_every_unit():
    model = make_network().float().train()
    with stubbed_launches():
        model(make_image(65, 64, dtype=torch.float32))
    assert ways(model) == {'triton': 6}


@pytest.mark.parametrize('output_stride', [8, 16])
@torch.no_grad()
def test_output_stride(output_stride):
    """Dilated, stage by stage: the first unit's shortcut has the strided one's values where that has some."""
    strided, dilated = make_network(), make_network(output_stride=output_stride)
    assert [info['reduction'] for info in dilated.feature_info] == [min(r, output_stride) for r in (2, 4, 8, 16, 32)]
    stage = 'layer4' if output_stride == 16 else 'layer3'
    shortcuts = [model.get_submodule(stage)[0].downsample for model in (strided, dilated)]
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(2, shortcuts[0][1].in_channels, 9, 9, generator=generator, dtype=torch.float64)
    assert_equal(shortcuts[1](x)[..., ::2, ::2], shortcuts[0](x))
    assert dilated(make_image(64, 64)).shape == (2, 7)


def test_three_stages():
    model = make_network(layers=(1, 1, 1), channels=(8, 12, 16))
    assert [info['reduction'] for info in model.feature_info] == [2, 4, 8, 16]
    assert SKResNetSimCLR((1, 1, 1), device='meta').num_features == 1024


def test_starts_as_its_shortcuts():
    model = SKResNetSimCLR(**ARGS)
    assert all((unit.conv3.bn.weight == 0).all() for unit in (*model.layer1, *model.layer4))
    assert (SKResNetSimCLR(**ARGS, zero_init_last=False).layer1[0].conv3.bn.weight == 1).all()


def test_plain_units():
    model = SKResNetSimCLR(**ARGS, unit='plain')
    assert model(make_image(64, 64, dtype=torch.float32)).shape == (2, 7)
    assert type(model.layer2[0].downsample[0]) is PaddedAvgPool2d


@torch.no_grad()
def test_projection():
    model = make_network(projection=1)
    x = make_image(64, 64)
    features = model.forward_features(x)
    hidden = model.projection(features.mean((2, 3)))
    assert_equal(model.forward_head(features, pre_logits=True), hidden)
    assert_equal(model(x), F.linear(hidden, model.fc.weight, model.fc.bias))
    assert list(dict(model.named_children()))[-3:] == ['global_pool', 'projection', 'fc']
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert_equal(model(x), hidden)
    model.reset_classifier(0, '')
    assert_equal(model(x), features)
    scripted = torch.jit.script(make_network(projection=1))
    assert_equal(scripted(x), make_network(projection=1)(x))


@pytest.mark.parametrize(
    ('kwargs', 'said'),
    [
        (dict(width_factor=0), 'width_factor=0 must be an integer'),
        (dict(width_factor=1.5), r'width_factor=1\.5 must be an integer'),
        (dict(projection=3), 'projection=3 must be an integer from 0 to 2'),
        (dict(projection=True), 'projection=True must be an integer'),
        (dict(small_stem=True), 'small_stem=True must be False: the stem and the shortcuts pool as'),
        (dict(small_stem=True, stem_type=''), 'small_stem=True must be False'),
        (dict(avg_down=False), 'avg_down=False must be True'),
        (dict(aa_layer=nn.AvgPool2d), r"aa_layer=<class '.*AvgPool2d'> must be None"),
        (dict(replace_stem_pool=True), 'replace_stem_pool=True must be False'),
    ],
    ids=str,
)
def test_arguments_out_of_range(kwargs, said):
    with pytest.raises(ValueError, match=said):
        SKResNetSimCLR(**{**ARGS, **kwargs})


def resize(line, size):
    """TensorFlow 1's bicubic resizing, pixel by pixel: Keys' kernel with A = -0.75, from the pixels' corners."""

    def kernel(x):
        x, a = abs(x), -0.75
        return (a + 2) * x**3 - (a + 3) * x**2 + 1 if x <= 1 else a * (x**3 - 5 * x**2 + 8 * x - 4)

    output = []
    for i in range(size):
        at = i * len(line) / size
        first = int(at)
        offset = round((at - first) * 1024) / 1024
        near = [min(max(first + k, 0), len(line) - 1) for k in (-1, 0, 1, 2)]
        output.append(sum(kernel(offset - k) * line[j] for k, j in zip((-1, 0, 1, 2), near)))
    return torch.stack(output)


@pytest.mark.parametrize(('size', 'side'), [((40, 50), 35), ((31, 24), 21), ((16, 16), 14)], ids=str)
@pytest.mark.parametrize('to', [14, 24, 50])
def test_preprocessing(size, side, to):
    image = make_image(*size)[0]
    top, left = ((length - side + 1) // 2 for length in size)
    crop = image[:, top : top + side, left : left + side].permute(1, 2, 0)
    expected = resize(resize(crop, to).transpose(0, 1), to).permute(2, 1, 0).clip(0, 1)
    output = preprocess(image, to)
    assert output.dtype == torch.float64
    assert output.shape == (3, to, to)
    assert (output - expected).abs().max() < 1e-5  # the offsets are float32, as TensorFlow's
    if to == side:
        assert_equal(output, crop.permute(2, 0, 1))
    of_bytes = preprocess((255 * image).byte(), to)
    assert of_bytes.dtype == torch.float32
    assert (of_bytes - expected).abs().max() < 2 / 255


def test_preprocessing_follows_the_images_device():
    image = make_image(16, 16)[0]
    with torch.device('meta'):
        assert_equal(preprocess(image, 14), preprocess(image.clone(), 14))
    assert preprocess(image.to('meta'), 14).is_meta


@pytest.mark.parametrize(
    ('shape', 'kwargs', 'said'),
    [
        ((3, 5, 5), dict(size=0), 'size=0 must be an integer of at least 1'),
        ((3, 5, 5), dict(crop=0), 'crop=0 must be a number above 0'),
        ((3, 5, 5), dict(crop=2), 'crop=2 must be at most 1'),
        ((3, 5, 6), dict(crop=0.01), r'crop=0\.01 leaves no pixel of an image of 5x6'),
        ((5, 5), {}, r'image of shape \(5, 5\) must be \(C, H, W\)'),
        ((3, 5, 5), {}, r'image has values up to 200: floats must be in \[0, 1\]'),
    ],
    ids=str,
)
def test_preprocessing_of_what_is_no_image(shape, kwargs, said):
    with pytest.raises(ValueError, match=said):
        preprocess(torch.full(shape, 200.0), **kwargs)
