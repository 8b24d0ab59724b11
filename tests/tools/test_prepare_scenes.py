"""tools/prepare_scenes.py: boxes, masks and labels fit together, what is held out is, and nothing is half written."""

import json
from pathlib import Path

import _scenes
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_dilation

pytest.importorskip('mmpretrain')
pytest.importorskip('skimage')
pytest.importorskip('sklearn')
pytest.importorskip('pycocotools')

from helpers.digit_garments import write_garments
from mmpretrain.datasets import FashionMNIST
from pycocotools.coco import COCO

pytestmark = pytest.mark.filterwarnings(
    'ignore::DeprecationWarning:mmpretrain', 'ignore:The given NumPy array is not writable:UserWarning'
)
SIZE, COUNTS = 96, {'train': 12, 'val': 6}


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('prepare_scenes')


@pytest.fixture(scope='module')
def garments(tmp_path_factory):
    """Of the classes 0 to 4 to train on, 5 to 9 to test."""
    return write_garments(tmp_path_factory.mktemp('garments'), range(5), range(5, 10))


@pytest.fixture(scope='module')
def make(tool, garments):
    """``make(out, **kwargs)``: a small set of scenes."""

    def prepare(out, **kwargs):
        tool.prepare(out, **{'garments': garments, **COUNTS, 'size': SIZE, 'seed': 0, **kwargs})
        return out

    return prepare


@pytest.fixture(scope='module')
def scenes(make, tmp_path_factory):
    """Not to be written into."""
    return make(tmp_path_factory.mktemp('data') / 'scenes')


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_layout(scenes):
    names = set()
    for split, count in COUNTS.items():
        coco = json.loads((scenes / f'annotations/instances_{split}.json').read_text())
        names |= {f'annotations/instances_{split}.json', f'annotations/garments_{split}.txt'}
        names |= {f'garments/{split}/{i + 1:06d}.jpg' for i in range(len(coco['annotations']))}
        names |= {f'images/{split}/{i:06d}.jpg' for i in range(count)}
        names |= {f'{labels}/{split}/{i:06d}.png' for i in range(count) for labels in ('masks', 'kinds')}
    assert set(contents(scenes)) == names
    assert [path.name for path in scenes.parent.iterdir()] == ['scenes']


@pytest.mark.parametrize('split', COUNTS)
def test_boxes_masks_and_labels_fit(tool, garments, scenes, split, capsys):
    coco = COCO(scenes / 'annotations' / f'instances_{split}.json')
    assert coco.getImgIds() == list(range(1, COUNTS[split] + 1))
    assert coco.getAnnIds() == list(range(1, len(coco.anns) + 1))
    assert [c['name'] for c in coco.loadCats(range(1, 11))] == list(FashionMNIST.METAINFO['classes'])
    _, labels = tool.load_garments(garments, split)
    for image in coco.imgs.values():
        assert Image.open(scenes / 'images' / split / image['file_name']).size == (SIZE, SIZE)
        assert (image['width'], image['height']) == (SIZE, SIZE)
        classes = np.asarray(Image.open(scenes / 'masks' / split / image['file_name'].replace('jpg', 'png')))
        covered = np.zeros((SIZE, SIZE), dtype=int)
        annotations = coco.imgToAnns[image['id']]
        assert 1 <= len(annotations) <= _scenes.MAX_GARMENTS
        for annotation in annotations:
            mask = coco.annToMask(annotation).astype(bool)
            covered += mask
            assert annotation['category_id'] == labels[annotation['garment']] + 1
            assert set(classes[mask]) == {annotation['category_id']}
            ys, xs = np.nonzero(mask)
            assert annotation['bbox'] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
            assert annotation['area'] == len(xs) > 0
            assert annotation['iscrowd'] == 0
        assert covered.max() == 1
        assert np.array_equal(classes > 0, covered > 0)
        kinds = np.asarray(Image.open(scenes / 'kinds' / split / image['file_name'].replace('jpg', 'png')))
        assert np.array_equal(kinds, np.array([0, 1, 2, 1, 3, 1, 4, 1, 4, 5, 4])[classes])


def test_close_ups(scenes):
    """Of every garment, what its scene shows there."""
    for split in COUNTS:
        coco = COCO(scenes / 'annotations' / f'instances_{split}.json')
        lines = (scenes / f'annotations/garments_{split}.txt').read_text().splitlines()
        assert lines == [f'{a["id"]:06d}.jpg {a["category_id"] - 1}' for a in coco.anns.values()]
        for annotation in coco.anns.values():
            picture = Image.open(scenes / 'garments' / split / f'{annotation["id"]:06d}.jpg')
            assert picture.size == (_scenes.CLOSE_UP, _scenes.CLOSE_UP)
            scene = Image.open(scenes / 'images' / split / coco.imgs[annotation['image_id']]['file_name'])
            left, top, width, height = (int(v) for v in annotation['bbox'])
            box = scene.crop((left, top, left + width, top + height))
            half = _scenes.CLOSE_UP / _scenes.MARGIN / 2 / max(width, height)
            x, y = half * width, half * height
            middle = picture.crop(tuple(round(32 + v) for v in (-x, -y, x, y))).resize(box.size)
            difference = np.asarray(middle, dtype=float) - np.asarray(box, dtype=float)
            assert np.abs(difference).mean() < 16


def test_close_up():
    picture = Image.fromarray(np.full((100, 100, 3), 200, dtype=np.uint8))
    values = np.asarray(_scenes.close_up(picture, [0, 40, 40, 20]))  # a side of 50, five pixels of them outside
    assert (values[:, 8:] == 200).all()
    assert (values[:, :4] == 0).all()


def test_held_out(scenes):
    coco = {split: json.loads((scenes / f'annotations/instances_{split}.json').read_text()) for split in COUNTS}
    assert not set(_scenes.PHOTOGRAPHS['train']) & set(_scenes.PHOTOGRAPHS['val'])
    for split in COUNTS:
        used = {image['photograph'] for image in coco[split]['images']}
        assert len(used) > 1
        assert used <= set(_scenes.PHOTOGRAPHS[split])
    # The garments' test set, as the fixture has it, is of other classes.
    assert {a['category_id'] for a in coco['train']['annotations']} <= {1, 2, 3, 4, 5}
    assert {a['category_id'] for a in coco['val']['annotations']} <= {6, 7, 8, 9, 10}


def test_same_arguments_same_files(make, scenes, tmp_path):
    expected = contents(scenes)
    assert contents(make(tmp_path / 'again')) == expected
    few = contents(make(tmp_path / 'few', train=3, val=2))
    assert {k: v for k, v in few.items() if 'annotations' not in k}.items() <= expected.items()
    other = contents(make(tmp_path / 'other', seed=1))
    assert not any(other[name] == expected[name] for name in expected if 'images' in name)


def test_photographs_are_shipped():
    photographs = _scenes.load_photographs([name for names in _scenes.PHOTOGRAPHS.values() for name in names])
    assert min(side for image in photographs.values() for side in image.shape[:2]) == _scenes.SIZES[1]
    for image in photographs.values():
        assert (image.dtype, image.ndim, image.shape[2]) == (np.uint8, 3, 3)


def test_crop():
    photograph = _scenes.load_photographs(['astronaut'])['astronaut']
    whole = {_scenes.crop(photograph, 512, np.random.default_rng(seed)).tobytes() for seed in range(8)}
    assert whole == {photograph.tobytes(), photograph[:, ::-1].tobytes()}
    small = _scenes.crop(photograph[:96, :128], 96, np.random.default_rng(0))
    assert any(
        np.array_equal(small[:, ::step], photograph[:96, left : left + 96]) for left in range(33) for step in (1, -1)
    )


def test_cut_out_has_no_holes_and_no_noise():
    image = np.zeros((28, 28), dtype=np.uint8)
    image[4:24, 8:20] = 200
    image[10:14, 12:16] = 0  # black print on a shirt
    image[0, 0] = _scenes.DARKEST - 1
    light, opacity = _scenes.cut_out(image, 56, np.random.default_rng(0))
    assert light.shape == (56, 56, 3)
    assert (opacity >= 0.5).sum() == 4 * 20 * 12
    assert opacity[24, 28] == 1
    assert light[24, 28].max() == 0
    assert light[opacity == 0].max() == 0
    assert (light <= 200 * opacity[..., None] + 1e-9).all()
    tint = light[16, 28] / 200
    assert ((tint >= 0.5) & (tint <= 1)).all()


def test_compose(tool, garments):
    """Garments are inside, seen for three quarters at least, and what they don't cover is the photograph."""
    images, labels = tool.load_garments(garments, 'train')
    photograph = np.full((SIZE, SIZE, 3), (10, 20, 30), dtype=np.uint8)
    counts = []
    for seed in range(60):
        scene, pasted = _scenes.compose(photograph, images, labels, SIZE, np.random.default_rng(seed))
        counts.append(len(pasted))
        for garment in pasted:
            assert garment.label == labels[garment.index]
            assert garment.mask.sum() >= (1 - _scenes.MAX_HIDDEN) * garment.area
        masks = np.stack([garment.mask for garment in pasted])
        assert masks.sum(0).max() == 1
        far = ~binary_dilation(masks.any(0), iterations=3)
        assert (scene[far] == (10, 20, 30)).all()
        # What is brightest of a garment is brighter than the photograph was.
        assert all(scene[mask].max() > 40 for mask in masks)
    assert set(counts) == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ('argument', 'said'),
    [
        (dict(size=63), r'--size 63: must be from 64 to 300'),
        (dict(size=301), r'--size 301: must be from 64 to 300'),
        (dict(train=0), r'--train 0: must be from 1 to 1000000'),
        (dict(val=-1), r'--val -1: must be from 1 to 1000000'),
        (dict(seed=-1), r'--seed -1: must be from 0 to 4294967295'),
    ],
)
def test_wrong_arguments(make, tmp_path, argument, said):
    with pytest.raises(ValueError, match=said):
        make(tmp_path / 'data' / 'scenes', **argument)
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over(make, tmp_path):
    (tmp_path / 'scenes').mkdir()
    with pytest.raises(FileExistsError, match=r'--out .*scenes: is there already; remove it, or name another folder'):
        make(tmp_path / 'scenes')
    assert not list((tmp_path / 'scenes').iterdir())


def test_nothing_half_written(make, tmp_path, monkeypatch):
    written, save = [], Image.Image.save

    def stop_in_val(image, path, **kwargs):
        if 'val' in path.parts:
            raise OSError('No space left on device')
        save(image, path, **kwargs)
        written.append(path)

    monkeypatch.setattr(Image.Image, 'save', stop_in_val)
    with pytest.raises(OSError, match='No space left'):
        make(tmp_path / 'scenes')
    assert sum('garments' not in path.parts for path in written) == 3 * COUNTS['train']
    assert not list(tmp_path.iterdir())


def test_missing_garments(make, tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError('no network')

    monkeypatch.setattr('mmpretrain.datasets.mnist.download_and_extract_archive', unreachable)
    with pytest.raises(OSError, match=r'--garments .*nowhere: is not there and cannot be downloaded \(no network\)'):
        make(tmp_path / 'scenes', garments=tmp_path / 'nowhere')
    assert not list(tmp_path.iterdir())


def test_other_garments(make, garments, tmp_path):
    folder = tmp_path / 'damaged'
    folder.mkdir()
    for path in garments.iterdir():
        (folder / path.name).write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r'--garments .*damaged: is not Fashion-MNIST: '):
        make(tmp_path / 'scenes', garments=folder)
    assert [path.name for path in tmp_path.iterdir()] == ['damaged']


def test_missing_package(tool, make, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, 'PACKAGES', {'numpy': 'numpy', 'no_such_module': 'pycocotools'})
    with pytest.raises(ModuleNotFoundError, match=r"scenes need pycocotools: pip install '\.\[scenes\]'"):
        make(tmp_path / 'scenes')
    assert not list(tmp_path.iterdir())


def test_command(tool, garments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tool.main(['--garments', str(garments), '--train', '2', '--val', '1', '--seed', '3'])
    assert capsys.readouterr().out.splitlines()[-1] == 'data/scenes'
    assert Image.open(Path('data/scenes/images/train/000001.jpg')).size == (128, 128)
    calls = []
    monkeypatch.setattr(tool, 'prepare', lambda *args: calls.append(args))
    tool.main([])
    assert calls == [(Path('data/scenes'), Path('data/fashion_mnist'), 12000, 300, 128, 0)]
