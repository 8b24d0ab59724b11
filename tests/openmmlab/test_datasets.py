import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip('mmpretrain')
pytest.importorskip('sklearn')

from helpers.small_fashion_mnist import FILES, GARMENTS, write_fashion_mnist
from mmpretrain.registry import DATASETS, TRANSFORMS
from sklearn.datasets import load_digits

from sk_plugins.networks.simclr import preprocess
from sk_plugins.openmmlab.datasets import Digits, ScaledFashionMNIST, SimCLRCrop

# One of mmpretrain's for every file of Fashion-MNIST that it reads.
pytestmark = pytest.mark.filterwarnings('ignore::DeprecationWarning:mmpretrain')

FIRST_LABELS = [1, 4, 8, 6, 5, 9, 9, 1, 3, 2, 2, 2]
PIXEL_SUM = 1790819


def images_and_labels(dataset):
    items = [dataset.get_data_info(i) for i in range(len(dataset))]
    return np.stack([item['img'] for item in items]), np.array([item['gt_label'] for item in items])


@pytest.fixture(scope='module')
def train():
    return images_and_labels(Digits('train'))


@pytest.fixture(scope='module')
def test():
    return images_and_labels(Digits('test'))


def test_registered():
    dataset = DATASETS.build(dict(type='Digits', split='test', pipeline=[]))
    assert type(dataset) is Digits
    assert dataset.CLASSES == ('0', '1', '2', '3', '4', '5', '6', '7', '8', '9')
    assert dataset.test_mode
    assert not Digits('train').test_mode


@pytest.mark.parametrize(('split', 'size'), [('train', 1437), ('test', 360)])
def test_images(split, size, request):
    images, labels = request.getfixturevalue(split)
    assert images.shape == (size, 8, 8)
    assert images.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 255)
    assert labels.shape == (size,)
    assert set(labels) == set(range(10))
    counts = np.bincount(labels)
    assert counts.max() - counts.min() <= 0.06 * size / 10 + 1  # the classes are nearly of one size


def test_item():
    item = Digits('train')[0]
    assert type(item['gt_label']) is int
    assert item['img'].flags.c_contiguous


def test_splits_are_the_whole_set(train, test):
    digits = load_digits()
    # 8 bits hold the 17 grey levels.
    whole = sorted((image.tobytes(), label) for image, label in zip(np.uint8(digits.images), digits.target))
    images = np.concatenate([train[0], test[0]])
    labels = np.concatenate([train[1], test[1]])
    assert sorted((image.tobytes(), label) for image, label in zip(np.uint8(images / 255 * 16 + 0.5), labels)) == whole


def test_split_is_the_one_that_the_figures_were_measured_on(test):
    assert test[1][:12].tolist() == FIRST_LABELS
    assert int(test[0].astype(int).sum()) == PIXEL_SUM


def test_splits_share_no_image(train, test):
    seen = {image.tobytes() for image in train[0]}
    assert not [i for i, image in enumerate(test[0]) if image.tobytes() in seen]


@pytest.mark.parametrize('split', ['train', 'test'])
def test_deterministic(split, request):
    images, labels = request.getfixturevalue(split)
    again = images_and_labels(Digits(split))
    np.testing.assert_array_equal(again[0], images)
    np.testing.assert_array_equal(again[1], labels)


def test_pipeline():
    from mmpretrain.structures import DataSample

    pipeline = [dict(type='Resize', scale=16), dict(type='PackInputs')]
    item = Digits('test', pipeline=pipeline)[0]
    assert item['inputs'].shape == (1, 16, 16)
    assert isinstance(item['data_samples'], DataSample)
    assert item['data_samples'].gt_label.item() == FIRST_LABELS[0]


@pytest.mark.parametrize('split', ['val', '', None, 0])
def test_unknown_split(split):
    with pytest.raises(ValueError, match=f"split={split!r} is unknown: choose 'train' or 'test'"):
        Digits(split)


# Fashion-MNIST at random scales and places

REAL = Path('/usr/share/datasets/fashion-mnist')


@pytest.fixture(scope='module')
def squares(tmp_path_factory):
    """Garments that fill their 28x28 pixels with white, which no texture reaches."""
    return write_fashion_mnist(
        tmp_path_factory.mktemp('fashion') / 'squares', lambda split, i: np.full((28, 28), 255, np.uint8)
    )


@pytest.fixture(scope='module')
def noise(tmp_path_factory):
    def draw(split, i):
        return np.random.default_rng((split == 'test', i)).integers(0, 256, (28, 28), np.uint8)

    return write_fashion_mnist(tmp_path_factory.mktemp('fashion') / 'noise', draw)


@pytest.mark.parametrize('split', GARMENTS)
def test_scaled_items(split, squares):
    dataset = DATASETS.build(dict(type='ScaledFashionMNIST', data_root=squares, split=split))
    assert type(dataset) is ScaledFashionMNIST
    assert len(dataset) == GARMENTS[split]
    assert len(dataset.CLASSES) == 10
    assert dataset.test_mode == (split == 'test')
    for i in range(len(dataset)):
        item = dataset[i]
        assert (item['img'].shape, item['img'].dtype) == ((64, 64), np.uint8)
        assert int(item['gt_label']) == i % 10
        assert 0.6 <= item['object_scale'] <= 2.0


@pytest.mark.parametrize('scale', [(0.25, 0.25), (0.6, 2.0), (1.5, 1.5), (64 / 28, 64 / 28)])
def test_scale_is_what_it_says(scale, squares):
    canvases, _, boxes = ScaledFashionMNIST(squares, 'train', scale=scale).batch(range(48))
    sides = boxes[:, 2:] - boxes[:, :2]
    np.testing.assert_allclose(sides[:, 0], sides[:, 1], rtol=1e-5)
    scales = sides[:, 0] / 28
    assert scale[0] - 1e-5 <= scales.min() <= scales.max() <= scale[1] + 1e-5
    if scale[0] < scale[1]:
        assert (scales.min(), scales.max()) == pytest.approx(scale, abs=0.1)
        assert np.median(scales) == pytest.approx(np.mean(scale), abs=0.25)
    for canvas, (left, top, right, bottom) in zip(canvases, boxes):
        # A pixel is white if the square covers its centre by half a source pixel: its edge is soft.
        white = np.argwhere(canvas >= 250)
        first, last = white.min(0), white.max(0) + 1
        np.testing.assert_allclose((*first[::-1], *last[::-1]), (left, top, right, bottom), atol=1.6)
        assert len(white) == np.prod(last - first)


def test_scale_one_on_whole_pixels_is_the_garment_itself(noise):
    dataset = ScaledFashionMNIST(noise, 'train', scale=(64 / 28, 64 / 28))
    garment = super(ScaledFashionMNIST, dataset).get_data_info(3)['img']
    # At the greatest scale the place is the whole canvas; every 16th pixel of it is a 7th of the garment.
    canvas, _, (box,) = dataset.batch([3])
    assert box.tolist() == pytest.approx([0, 0, 64, 64], abs=1e-4)
    centres = (np.arange(64) + 0.5) * 28 / 64 - 0.5
    low = np.clip(np.floor(centres).astype(int), 0, 26)
    share = centres - low
    inside = slice(2, -2)  # further out the canvas shows what lies beyond the garment's edge
    rows = garment[low] * (1 - share)[:, None] + garment[low + 1] * share[:, None]
    expected = rows[:, low] * (1 - share) + rows[:, low + 1] * share
    bright = expected[inside, inside] >= 32  # which hide the texture
    np.testing.assert_allclose(canvas[0][inside, inside][bright], expected[inside, inside][bright], atol=0.51)


def test_scaled_deterministic_from_the_seed(noise):
    images, labels, boxes = ScaledFashionMNIST(noise, 'train', seed=3).batch(range(48))
    again = ScaledFashionMNIST(noise, 'train', seed=3)
    for i in (0, 17, 47):
        item = again[i]
        np.testing.assert_array_equal(item['img'], images[i])
        assert item['object_box'] == boxes[i].tolist()
        assert item['gt_label'] == labels[i]
    backwards = again.batch(range(47, -1, -1))
    np.testing.assert_array_equal(backwards[0][::-1], images)
    for other in (
        ScaledFashionMNIST(noise, 'train', seed=4).batch(range(48)),
        again.batch(range(48), draw=1),
    ):
        assert not np.isclose(other[2], boxes).any()
        np.testing.assert_array_equal(other[1], labels)


def test_scaled_subset_shows_the_same_images(noise):
    whole = ScaledFashionMNIST(noise, 'train')
    some = ScaledFashionMNIST(noise, 'train', indices=[40, 7])
    np.testing.assert_array_equal(some[1]['img'], whole[7]['img'])
    np.testing.assert_array_equal(some.batch([0])[0], whole.batch([40])[0])


def test_another_scale_changes_the_size_alone(squares):
    dataset = ScaledFashionMNIST(squares, 'test')
    small, large = (dataset.batch(range(24), (scale, scale)) for scale in (0.5, 2.0))
    # The same share of the room that the garment leaves, and the same texture where it shows.
    shares = [boxes[:, :2] / (64 - 28 * scale) for (_, _, boxes), scale in ((small, 0.5), (large, 2.0))]
    np.testing.assert_allclose(*shares, atol=1e-5)
    for a, b, box in zip(small[0], large[0], large[2]):
        outside = np.ones((64, 64), bool)
        left, top, right, bottom = np.round(box).astype(int)
        outside[max(top - 2, 0) : bottom + 2, max(left - 2, 0) : right + 2] = False
        assert outside.any()
        np.testing.assert_array_equal(a[outside], b[outside])


def test_texture_lies_behind_all_of_the_garment(tmp_path):
    blank = write_fashion_mnist(tmp_path / 'blank', lambda split, i: np.zeros((28, 28), np.uint8))
    textures = {split: ScaledFashionMNIST(blank, split).batch(range(24))[0] for split in GARMENTS}
    for canvases in textures.values():
        assert 40 < canvases.mean() < 120
        assert canvases.std(axis=(1, 2)).min() > 8
    # Each image's own: neither another's of its split, nor that of the other split with its number.
    flat = np.concatenate([canvases.reshape(24, -1) for canvases in textures.values()]).astype(float)
    assert np.abs(np.corrcoef(flat) - np.eye(48)).max() < 0.75


def test_splits_show_garments_of_their_own_files(noise):
    for split, count in GARMENTS.items():
        dataset = ScaledFashionMNIST(noise, split)
        shown = [super(ScaledFashionMNIST, dataset).get_data_info(i)['img'] for i in range(count)]
        raw = (Path(noise) / f'{FILES[split]}-images-idx3-ubyte').read_bytes()[16:]
        assert np.stack(shown).tobytes() == raw


@pytest.mark.skipif(not REAL.is_dir(), reason=f'no {REAL}')
def test_real_splits_share_no_garment():
    garments = []
    for name in FILES.values():
        data = gzip.decompress((REAL / f'{name}-images-idx3-ubyte.gz').read_bytes())[16:]
        garments.append({data[i : i + 784] for i in range(0, len(data), 784)})
    assert [len(images) for images in garments] == [60000, 10000]
    assert not garments[0] & garments[1]


@pytest.mark.parametrize(
    'scale', [(2.0, 0.6), (0.2, 1.0), (1.0, 2.3), (1.0,), (0.6, 1.0, 2.0), 1.0, '12', (True, 2.0), (float('nan'), 1.0)]
)
def test_scale_is_checked(scale, squares):
    dataset = ScaledFashionMNIST(squares)
    for use in (lambda: ScaledFashionMNIST(squares, scale=scale), lambda: dataset.batch([0], scale)):
        with pytest.raises(ValueError, match=r'must be two numbers, least and greatest, from 0\.25 to 2\.286') as error:
            use()
        assert str(error.value).startswith(f'scale={scale!r} ')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(split='val'), "split='val' is unknown: choose 'train' or 'test'"),
        (dict(seed=-1), 'seed=-1 must be an integer of at least 0'),
        (dict(seed=0.5), 'seed=0.5 must be an integer of at least 0'),
    ],
)
def test_scaled_arguments_are_checked(arguments, message, squares):
    with pytest.raises(ValueError, match=message):
        ScaledFashionMNIST(squares, **arguments)


def test_scaled_batch_of_nothing(squares):
    with pytest.raises(ValueError, match='indices is empty'):
        ScaledFashionMNIST(squares).batch([])


def test_simclr_crop():
    crop = TRANSFORMS.build(dict(type='SimCLRCrop', size=32))
    image = np.random.default_rng(0).integers(0, 256, (60, 50, 3), np.uint8)
    results = crop.transform(dict(img=image, img_shape=(60, 50)))
    assert results['img'].dtype == np.float32
    assert results['img'].shape == (32, 32, 3)
    assert results['img_shape'] == (32, 32)
    expected = 255 * preprocess(torch.from_numpy(image).permute(2, 0, 1), 32)
    np.testing.assert_array_equal(results['img'], expected.permute(1, 2, 0))
    assert repr(crop) == 'SimCLRCrop(size=32, crop=0.875)'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(size=0), 'size=0 must be an integer'),
        (dict(crop=0), 'crop=0 must be a number above 0'),
        (dict(crop=1.5), r'crop=1\.5 must be at most 1'),
    ],
    ids=str,
)
def test_simclr_crops_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        SimCLRCrop(**arguments)


def test_simclr_crop_of_what_is_no_image():
    with pytest.raises(ValueError, match=r'img of shape \(50, 60\) must be \(H, W, C\)'):
        SimCLRCrop().transform(dict(img=np.zeros((50, 60), np.uint8)))
    with pytest.raises(ValueError, match=r'crop=0\.001 leaves no pixel of an image of 50x60'):
        SimCLRCrop(crop=0.001).transform(dict(img=np.zeros((50, 60, 3), np.uint8)))
