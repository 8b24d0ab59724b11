import numpy as np
import pytest

pytest.importorskip('mmpretrain')
pytest.importorskip('sklearn')

from mmpretrain.registry import DATASETS
from sklearn.datasets import load_digits

from sk_plugins.mmpretrain_datasets import Digits

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
