"""The analysis of networks whose weights are set by hand, so that the answer is known."""

import csv
import io
import math
import weakref
from dataclasses import replace

import pytest
import timm
import torch
from helpers.randomised import randomise
from PIL import Image
from torch import nn

from sk_plugins import SelectiveKernel, SKResNet, fold_batch_norm
from sk_plugins.analysis import ImageStream, enlarge, receptive_field, sk_units, study
from sk_plugins.analysis.images import Batch
from sk_plugins.analysis.study import ReceptiveField, typical_units

pytest.importorskip('matplotlib')

from helpers.tolerances import assert_close

from sk_plugins.analysis.figures import draw_channels, draw_classes, draw_depth, draw_field, write

SCALES = (1.0, 1.5, 2.0)
SEVENTH_DIGIT = 1e-6  # of figures of about one: the tables have seven digits
PLAIN = dict(crop_pct=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def identity(kernel_sizes=(3, 5), slope=0.0, bias=None, ones=False, select='channel'):
    """One SK unit on three channels whose branches give back the (positive) image, or sum ``ones`` over their taps.

    The logit of branch m is slope * m * (mean brightness of the image) + bias[m].
    """
    layer = SelectiveKernel(
        3,
        kernel_sizes=kernel_sizes,
        groups=3,
        min_dim=1,
        reduction=3,
        select_bias=True,
        reduce_norm=False,
        select=select,
    )
    number, repeats = len(kernel_sizes), 1 if select == 'shared' else 3
    with torch.no_grad():
        for path in layer.paths:
            path.conv.weight.zero_()[:, :, 1, 1] = math.sqrt(1 + path.bn.eps)  # which BatchNorm divides by
            if ones:
                path.conv.weight.fill_(1.0)
        attn = layer.attn
        attn.fc_reduce.weight.fill_(1 / (3 * number))  # s is the branches' sum
        attn.fc_reduce.bias.zero_()
        attn.fc_select.weight.copy_(slope * torch.arange(float(number)).repeat_interleave(repeats).view(-1, 1, 1, 1))
        attn.fc_select.bias.copy_(torch.tensor([0.0] * number if bias is None else bias).repeat_interleave(repeats))
    return nn.Sequential(layer).eval()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Two classes, dark with a bright middle and bright with a dark one, a file that is none, and one above them."""
    folder = tmp_path_factory.mktemp('images')
    for name, outer, inner in (('sun', 0, 255), ('moon', 255, 0)):
        for i in range(3):
            (folder / name / 'more').mkdir(parents=True, exist_ok=True)
            image = Image.new('RGB', (64, 48), (outer,) * 3)
            image.paste((inner,) * 3, (32 - 6 - 2 * i, 24 - 6 - 2 * i, 32 + 6 + 2 * i, 24 + 6 + 2 * i))
            image.save(folder / name / ('more' if i == 2 else '.') / f'{i}.png')
    (folder / 'sun' / '9.jpg').write_bytes(b'no image')
    (folder / 'sun' / 'notes.txt').write_text('no image either')
    Image.new('L', (64, 64), 128).save(folder / 'grey.png')
    return folder


def run(model, folder, **kwargs):
    images = ImageStream(folder, SCALES, size=32, **PLAIN)
    return study(model, images.batches(batch_size=3), images.scales, images.classes, **kwargs)


@pytest.mark.parametrize('folded', [False, True])
def test_a_network_that_always_picks_5x5(folder, folded):
    model = SKResNet(
        (1, 2, 1), channels=(16, 16, 16), cardinality=4, base_width=16, num_classes=3, sk_kwargs=dict(select_bias=True)
    )
    for unit in sk_units(randomise(model)).values():
        with torch.no_grad():
            unit.layer.attn.fc_select.weight.zero_()
            unit.layer.attn.fc_select.bias.copy_(torch.tensor([-20.0, 20.0]).repeat_interleave(unit.channels))
    result = run(fold_batch_norm(model) if folded else model, folder)
    assert list(result.differences) == ['SK_2_1', 'SK_3_1', 'SK_3_2', 'SK_4_1']
    assert result.images == 7
    assert result.broken == 1
    for name in result.units:
        assert result.label(name) == '5x5 - 3x3'
        assert result.channels[name].shape == (3, 2, 16)
        assert_close(result.branches(name), torch.tensor([[0.0, 1.0]] * 3).double(), length=4)
        assert_close(result.differences[name], torch.ones(3).double(), length=4)
        assert_close(result.deviations[name], torch.zeros_like(result.deviations[name]), length=4, scale=1.0)
        assert_close(result.class_differences[name], torch.ones(3, 2).double(), length=4)


@pytest.mark.parametrize('select', ['channel', 'shared'])
def test_a_network_whose_logit_grows_with_brightness(folder, select):
    result = run(identity(slope=6.0, select=select), folder)
    assert result.classes == ('moon', 'sun')
    assert result.class_images.tolist() == [3, 3]
    expected = torch.empty(len(SCALES), 7, dtype=torch.float64)
    files = [folder / 'grey.png']
    files += [folder / name / file for name in ('moon', 'sun') for file in ('0.png', '1.png', 'more/2.png')]
    for s, scale in enumerate(SCALES):
        for i, file in enumerate(files):
            side = 48 / scale
            square = (32 - side / 2, 24 - side / 2, 32 + side / 2, 24 + side / 2)
            seen = Image.open(file).convert('L').resize((32, 32), Image.Resampling.BICUBIC, square)
            brightness = torch.tensor(list(seen.tobytes())).double().mean() / 255
            expected[s, i] = (6.0 * brightness / 2).tanh()  # sigmoid(x) - sigmoid(-x)
    values = result.differences['0']
    assert_close(values, expected.mean(1), dtype=torch.float32, length=1024, scale=1.0)
    assert_close(result.deviations['0'], expected.std(1, correction=0), dtype=torch.float32, length=1024, scale=1.0)
    by_class = torch.stack([expected[:, 1:4].mean(1), expected[:, 4:].mean(1)], 1)
    assert_close(result.class_differences['0'], by_class, dtype=torch.float32, length=1024, scale=1.0)
    # A bright object that grows makes the picture brighter, a dark one darker.
    assert (by_class[:, 1].diff() > 0.05).all()
    assert (by_class[:, 0].diff() < -0.01).all()


def test_three_branches(folder):
    result = run(identity((3, 7, 5), bias=[0.0, math.log(2), math.log(5)]), folder)
    assert_close(result.branches('0')[0], torch.tensor([1, 2, 5]).double() / 8, dtype=torch.float32, length=9)
    assert_close(result.differences['0'], torch.full((3,), 1 / 8).double(), dtype=torch.float32, length=9)
    assert result.label('0') == '7x7 - 3x3'
    figure = draw_channels(result, groups=2)
    assert [axis.get_ylabel() for axis in figure.axes] == ['attention of 5x5', 'attention of 7x7']
    for axis, share in zip(figure.axes, (5 / 8, 2 / 8)):
        lines = axis.get_lines()[: len(SCALES)]
        assert [line.get_label() for line in lines] == ['1.0x', '1.5x', '2.0x']
        assert all(abs(y - share) < 1e-6 for line in lines for y in line.get_ydata())
        assert [len(line.get_ydata()) for line in lines] == [2, 2, 2]


def test_receptive_field_of_known_kernels():
    image = torch.full((1, 3, 15, 15), 0.5)
    small, large = torch.zeros(15, 15), torch.zeros(15, 15)
    small[6:9, 6:9] = 1 / 9
    large[5:10:2, 5:10:2] = 1 / 9  # a 3x3 with dilation 2
    for bias, expected, reach in (([40.0, -40.0], small, 1.0), ([-40.0, 40.0], large, 2.0)):
        shares, centre = receptive_field(identity(bias=bias, ones=True), '0', image)
        assert centre == (7.0, 7.0)
        assert_close(shares[0], expected.double(), dtype=torch.float32, length=9)
        field = ReceptiveField('0', centre, shares, [1])
        assert field.radius(0.999) == pytest.approx([reach * math.sqrt(2)])
        assert field.radius(0.5) == pytest.approx([reach])
    # Between them: each kernel's taps by its attention; the middle is both kernels'.
    shares, _ = receptive_field(identity(bias=[math.log(3), 0.0], ones=True), '0', image)
    assert_close(shares[0], (0.75 * small + 0.25 * large).double(), dtype=torch.float32, length=9)


def test_receptive_field_in_a_network():
    torch.manual_seed(0)
    settings = dict(layers=(1, 2, 1), channels=(16, 16, 16), cardinality=4, base_width=16)
    model = randomise(SKResNet(**settings))
    images = torch.randn(3, 3, 64, 64)
    shares, centre = receptive_field(model, 'SK_3_2', images)
    assert shares.shape == (3, 64, 64)
    assert centre == (32.0, 32.0)
    assert_close(shares.sum((1, 2)), torch.ones(3).double(), dtype=torch.float32, length=64 * 64)
    # Image by image, and by any way through the units.
    assert_close(receptive_field(model, 'SK_3_2', images[1:2])[0], shares[1:2], dtype=torch.float32, length=model)
    plain = SKResNet(**settings, sk_kwargs=dict(backend='plain')).eval()
    plain.load_state_dict(model.state_dict())
    assert_close(receptive_field(plain, 'SK_3_2', images)[0], shares, dtype=torch.float32, length=model)
    assert_close(
        receptive_field(fold_batch_norm(model), 'SK_3_2', images)[0], shares, dtype=torch.float32, length=model
    )
    # The same as by hand, with the attention of the units up to there as constants.
    held = [(u.layer.attn, u.layer.attn.forward) for u in sk_units(plain).values()]
    for attn, forward in held:
        attn.forward = lambda branches, forward=forward: forward(branches).detach()
    x = images.clone().requires_grad_()
    outputs = []
    plain.layer2[1].conv2.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    plain(x)
    outputs[0][:, :, 4, 4].sum().backward()
    by_hand = x.grad.abs().sum(1).double()
    assert_close(by_hand / by_hand.sum((1, 2), keepdim=True), shares, dtype=torch.float32, length=model)
    # Nothing stays behind: the attention is differentiated again.
    assert not any(module._forward_hooks for module in model.modules())
    # A dead position has no field.
    with torch.no_grad():
        for path in model.layer2[1].conv2.paths:
            path.bn.bias.fill_(-1e6)
    assert receptive_field(model, 'SK_3_2', images)[0].abs().sum() == 0


def test_study_takes_the_fields_mean(folder):
    model = identity(slope=60.0, bias=[0.0, -12.0], ones=True)
    result = run(model, folder, field_unit='0', field_every=2)
    assert result.field.maps.shape == (3, 32, 32)
    images = ImageStream(folder, SCALES, size=32, **PLAIN)
    expected, counts = torch.zeros(3, 32, 32).double(), [0, 0, 0]
    for batch in images.batches(batch_size=1):
        if batch.indices and batch.indices[0] % 2 == 0:
            for s in range(3):
                share = receptive_field(model, '0', batch.images[s])[0][0]
                expected[s] += share
                counts[s] += bool(share.any())
    assert counts == result.field.images == [2, 2, 2]  # the grey one and a sun: a moon's middle is dead
    assert_close(result.field.maps, expected / 2, dtype=torch.float32, length=model)


def test_files_hold_the_numbers(folder, tmp_path):
    model = identity(slope=6.0)
    result = run(model, folder, field_unit='0')
    files = write(result, tmp_path / 'new' / 'out', groups=2)
    figures = ['attention_channels', 'attention_classes', 'attention_depth', 'receptive_field']
    tables = ['channels', 'classes', 'receptive_field', 'units']
    names = sorted([f'{f}.{kind}' for f in figures for kind in ('png', 'svg')] + [f'{t}.csv' for t in tables])
    assert [path.name for path in files] == names
    assert sorted(path.name for path in (tmp_path / 'new' / 'out').iterdir()) == names

    def table(name):
        with (tmp_path / 'new' / 'out' / f'{name}.csv').open(encoding='utf-8') as file:
            return list(csv.DictReader(file))

    units = table('units')
    assert [(row['scale'], row['kernel']) for row in units[:3]] == [('1', '3x3'), ('1', '5x5'), ('1.5', '3x3')]
    differences = [float(row['difference']) for row in units[::2]]
    assert differences == pytest.approx(result.differences['0'].tolist(), abs=SEVENTH_DIGIT)
    assert float(units[0]['attention']) + float(units[1]['attention']) == pytest.approx(1, abs=SEVENTH_DIGIT)
    assert units[0]['images'] == '7'
    assert units[0]['module'] == '0'
    assert len(table('channels')) == 3 * 2 * 3
    classes = table('classes')
    assert [(row['scale'], row['class'], row['images']) for row in classes[:3]] == [
        ('1', 'moon', '3'),
        ('1', 'sun', '3'),
        ('1.5', 'moon', '3'),
    ]
    expected = result.class_differences['0'][0, 1].item()
    assert float(classes[1]['difference']) == pytest.approx(expected, abs=SEVENTH_DIGIT)
    field = [row for row in table('receptive_field') if row['scale'] == '2']
    assert float(field[0]['share_within']) == pytest.approx(result.field.maps[2, 16, 16].item(), abs=SEVENTH_DIGIT)
    assert float(field[-1]['share_within']) == pytest.approx(1, abs=SEVENTH_DIGIT)

    with Image.open(tmp_path / 'new' / 'out' / 'attention_depth.png') as picture:
        assert picture.width >= 600
        assert len(set(picture.convert('L').tobytes())) > 20
    figure = draw_depth(result)
    assert [line.get_ydata()[0] for line in figure.axes[0].get_lines()[:3]] == result.differences['0'].tolist()
    figure = draw_classes(result)
    drawn = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].get_lines()[:2]}
    assert drawn == {
        '1.0x': result.class_differences['0'][0].tolist(),
        '1.5x': result.class_differences['0'][1].tolist(),
    }
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ['moon', 'sun']
    panels = draw_field(result).axes[:3]
    assert [panel.get_title()[:4] for panel in panels] == ['1.0x', '1.5x', '2.0x']

    # The same numbers give the same bytes.
    again = write(result, tmp_path / 'again', groups=2)
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(files, again))

    # What another study does not have goes, and what is no study's stays.
    (tmp_path / 'again' / 'notes.csv').write_text('mine')
    result = replace(result, class_images=torch.zeros(2, dtype=torch.long), field=None)
    kept = write(result, tmp_path / 'again', groups=2)
    assert sorted((tmp_path / 'again').iterdir()) == sorted([*kept, tmp_path / 'again' / 'notes.csv'])
    assert [path.name for path in kept if path.suffix == '.csv'] == ['channels.csv', 'units.csv']


def test_classes_named_like_formulas(folder):
    figure = draw_classes(replace(run(identity(), folder), classes=('a$_{$', '$5 and $6')))
    figure.savefig(io.BytesIO())
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ['a$_{$', '$5 and $6']


def test_images_without_classes_have_no_figure_by_class(folder, tmp_path):
    result = run(identity(), folder / 'sun' / 'more')
    assert result.images == 1
    assert not any('classes' in path.name or 'field' in path.name for path in write(result, tmp_path))
    with pytest.raises(ValueError, match='the images have no classes'):
        draw_classes(result)
    with pytest.raises(ValueError, match='no effective receptive field'):
        draw_field(result)
    with pytest.raises(ValueError, match="units has 'SK_1_1', which does not exist: choose from 0"):
        write(result, tmp_path / 'none', units=['SK_1_1'])
    assert not (tmp_path / 'none').exists()


def test_memory_does_not_grow():
    """Of many batches, one is held at a time, and no attention but the one in hand."""
    alive = []

    def batches():
        for i in range(20):
            images = torch.rand(len(SCALES), 2, 3, 8, 8)
            alive.append(weakref.ref(images))
            batch = Batch(images, [-1, -1], [2 * i, 2 * i + 1], [])
            del images
            yield batch
            del batch
            held.append(sum(ref() is not None for ref in alive))

    held = []
    result = study(identity(slope=1.0), batches(), SCALES, field_unit='0', field_every=4)
    assert result.images == 40
    assert result.field.images == [10, 10, 10]
    assert max(held) <= 1


def test_typical_units_are_the_papers():
    with torch.device('meta'):
        assert typical_units(sk_units(timm.create_model('sknet50'))) == ['SK_2_3', 'SK_3_4', 'SK_5_3']
        assert typical_units(sk_units(timm.create_model('skshufflenetv2_x1_0'))) == ['SK_2_4', 'SK_3_8', 'SK_4_4']
        assert typical_units(sk_units(nn.Sequential(*(SelectiveKernel(32) for _ in range(5))))) == ['0', '2', '4']
        assert typical_units(sk_units(SelectiveKernel(32))) == ['SK']


def test_studies_that_cannot_be(folder, tmp_path):
    with pytest.raises(ValueError, match='model is in training mode'):
        run(identity().train(), folder)
    with pytest.raises(ValueError, match='whose SK units have one branch each: nothing is selected'):
        run(identity((3,)), folder)
    with pytest.raises(ValueError, match="field_unit='SK_9_9' does not exist: choose from 0"):
        run(identity(), folder, field_unit='SK_9_9')
    with pytest.raises(ValueError, match="unit='SK_9_9' does not exist: choose from 0"):
        receptive_field(identity(), 'SK_9_9', torch.rand(1, 3, 8, 8))
    (tmp_path / 'a.png').write_bytes(b'')
    with pytest.raises(ValueError, match='none of the 1 images could be read'):
        run(identity(), tmp_path)


def test_enlarge_is_a_centre_crop_and_a_resize_back():
    image = Image.radial_gradient('L').resize((96, 64)).convert('RGB')
    # The usual test transform: the short side to 40, its middle 36.
    usual = image.resize((60, 40), Image.Resampling.BICUBIC).crop((12, 2, 48, 38))
    same = enlarge(image, 1.0, 36, 0.9)
    assert same.size == (36, 36)
    assert max(abs(a - b) for a, b in zip(same.tobytes(), usual.tobytes())) <= 1
    double = enlarge(image, 2.0, 32, 1.0)
    assert double.tobytes() == image.crop((32, 16, 64, 48)).tobytes()
    dot = Image.new('L', (64, 64))
    dot.paste(255, (28, 28, 36, 36))
    areas = [sum(enlarge(dot, scale, 64, 1.0).tobytes()) / 255 for scale in (1.0, 1.5, 2.0)]
    assert areas == pytest.approx([64, 64 * 1.5**2, 64 * 4], rel=0.03)


def test_images_of_a_folder(folder):
    images = ImageStream(folder, SCALES, size=8, **PLAIN)
    assert images.classes == ('moon', 'sun')
    assert len(images) == 8
    batches = list(images.batches(batch_size=4))
    assert [batch.labels for batch in batches] == [[-1, 0, 0, 0], [1, 1, 1]]
    assert [batch.indices for batch in batches] == [[0, 1, 2, 3], [4, 5, 7]]
    assert batches[0].broken == []
    ((path, reason),) = batches[1].broken
    assert path == str(folder / 'sun' / '9.jpg')
    assert 'cannot identify image file' in reason
    assert batches[0].images.shape == (3, 4, 3, 8, 8)
    torch.testing.assert_close(batches[0].images[:, 0], torch.full((3, 3, 8, 8), 128 / 255))
    grey = ImageStream(folder, (1.0,), size=8, mean=(0.25,), std=(0.5,))
    assert next(grey.batches(1)).images[0, 0].flatten()[0] == pytest.approx((128 / 255 - 0.25) / 0.5)
    few = ImageStream(folder, SCALES, size=8, limit=3)
    assert len(few) == 3
    assert [(b.labels, b.indices) for b in few.batches(8)] == [([-1, 0, 1], [0, 1, 2])]
    # Further processes read the same images.
    parallel = list(images.batches(batch_size=2, workers=2))
    assert sorted(i for batch in parallel for i in batch.indices) == [0, 1, 2, 3, 4, 5, 7]
    assert sum(len(batch.broken) for batch in parallel) == 1
    whole = torch.cat([batch.images for batch in batches], 1)
    order = [0, 1, 2, 3, 4, 5, 7]
    for batch in parallel:
        for i, index in enumerate(batch.indices):
            assert torch.equal(batch.images[:, i], whole[:, order.index(index)])


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(scales=()), r'scales=\(\) must be different numbers of at least 1'),
        (dict(scales=(1.0, 0.5)), r'scales=\(1\.0, 0\.5\) must be different numbers of at least 1'),
        (dict(scales=(1.0, 1.0)), r'scales=\(1\.0, 1\.0\) must be different'),
        (dict(size=0), 'size=0 must be an integer of at least 1'),
        (dict(crop_pct=1.5), r'crop_pct=1\.5 must be above 0 and at most 1'),
        (dict(interpolation='cubic'), "interpolation='cubic' is unknown: choose one of 'nearest'"),
        (dict(mean=(0.5, 0.5)), r'mean=\(0\.5, 0\.5\) and std=.* must be one value each, or three'),
        (dict(limit=0), 'limit=0 must be at least 1'),
    ],
)
def test_bad_arguments(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageStream(folder, **arguments)


def test_folders_without_images(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere: no such folder'):
        ImageStream(tmp_path / 'nowhere')
    (tmp_path / 'notes.txt').write_text('')
    with pytest.raises(FileNotFoundError, match=r'no images there \(looked for \.jpg'):
        ImageStream(tmp_path)
