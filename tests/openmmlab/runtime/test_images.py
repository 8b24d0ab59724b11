"""Broken and odd image files: what LoadSoundImage gives of them, and what a run over a folder of them does."""

import functools
import io
import logging
import pickle
import re
import struct
import zlib
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('mmpretrain')

import cv2
import mmcv
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from mmengine.dataset import Compose, ConcatDataset, RepeatDataset
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.registry import HOOKS, TRANSFORMS
from mmengine.runner import Runner
from mmpretrain.datasets import CustomDataset, KFoldDataset
from PIL import Image
from torch.utils.data import DataLoader

from sk_plugins._resources import find_config
from sk_plugins.openmmlab.datasets import Digits
from sk_plugins.openmmlab.runtime.configs import ConfigError
from sk_plugins.openmmlab.runtime.images import LoadSoundImage, SkipUnreadable, UnreadableImageError, skip_unreadable

pytestmark = pytest.mark.usefixtures('no_wait_for_workers')
HEIGHT, WIDTH = 48, 64
y, x = np.mgrid[:HEIGHT, :WIDTH]
COLOURS = np.stack([x * 4, y * 5, 255 - 2 * x - 2 * y], axis=-1).clip(0, 255).astype(np.uint8)  # RGB
RGB = Image.fromarray(COLOURS)
GREY = np.asarray(RGB.convert('L'))
ROTATED = np.rot90(COLOURS, -1)


def encode(image, format, **options):
    with io.BytesIO() as file:
        image.save(file, format, **options)
        return file.getvalue()


def with_orientation(format, **options):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    return encode(RGB, format, exif=exif, **options)


def animation(format, **options):
    return encode(RGB, format, save_all=True, append_images=[Image.fromarray(255 - COLOURS)] * 2, duration=9, **options)


def with_alpha(image):
    image = image.copy()
    image.putalpha(Image.fromarray(COLOURS[:, :, 0]))
    return image


def deep_png():
    return cv2.imencode('.png', COLOURS[:, :, ::-1].astype(np.uint16) * 256 + 77)[1].tobytes()


def bomb():
    """A PNG of 100,000x100,000 pixels in 70 bytes."""
    chunks = [(b'IHDR', struct.pack('>IIBBBBB', 100_000, 100_000, 8, 2, 0, 0, 0)), (b'IDAT', b''), (b'IEND', b'')]
    png = b'\x89PNG\r\n\x1a\n'
    for kind, data in chunks:
        png += struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return png


def thumbnail():
    """A JPEG with a whole thumbnail in a segment before its scan."""
    whole, small = encode(RGB, 'JPEG'), encode(RGB.resize((16, 12)), 'JPEG')
    return whole[:2] + b'\xff\xe2' + struct.pack('>H', len(small) + 2) + small + whole[2:]


def half(content):
    return content[: len(content) // 2]


jpeg = functools.partial(encode, RGB, 'JPEG', quality=95, subsampling=0)
palette = RGB.quantize(64)
deep_grey = Image.fromarray(GREY.astype(np.uint16) * 256 + 77)
GREYS = np.stack([GREY] * 3, axis=-1)

# Name, content, the pixels it stands for in RGB, and how far a value may be from them.
SOUND = {
    'rgb.jpg': (jpeg(), COLOURS, 6),
    'progressive.jpg': (jpeg(progressive=True), COLOURS, 6),
    'thumbnail.jpg': (thumbnail(), COLOURS, 40),
    'grey.jpg': (encode(Image.fromarray(GREY), 'JPEG', quality=95), GREYS, 6),
    'cmyk.jpg': (encode(RGB.convert('CMYK'), 'JPEG', quality=95, subsampling=0), COLOURS, 12),
    'rotated.jpg': (with_orientation('JPEG', quality=95, subsampling=0), ROTATED, 6),
    'rotated.png': (with_orientation('PNG'), ROTATED, 0),
    'rgb.png': (encode(RGB, 'PNG'), COLOURS, 0),
    'grey16.png': (encode(deep_grey, 'PNG'), GREYS, 1),
    'grey16.tif': (encode(deep_grey, 'TIFF'), GREYS, 1),
    'rgb16.png': (deep_png(), COLOURS, 1),
    'palette.png': (encode(palette, 'PNG'), np.asarray(palette.convert('RGB')), 0),
    'transparent_palette.png': (
        encode(palette, 'PNG', transparency=bytes(range(0, 256, 4))),
        np.asarray(palette.convert('RGB')),
        0,
    ),
    'rgba.png': (encode(with_alpha(RGB), 'PNG'), COLOURS, 0),
    'la.png': (encode(with_alpha(Image.fromarray(GREY)), 'PNG'), GREYS, 0),
    'bilevel.png': (encode(RGB.convert('1'), 'PNG'), np.asarray(RGB.convert('1').convert('RGB')), 0),
    'animated.gif': (animation('GIF'), COLOURS, 45),  # a palette of 256 colours
    'animated.png': (animation('PNG'), COLOURS, 0),
    'animated.webp': (animation('WEBP', lossless=True), COLOURS, 0),
    'a_png_in_truth.jpg': (encode(RGB, 'PNG'), COLOURS, 0),
    'одноточечный_1x1_像素.png': (encode(RGB.crop((0, 0, 1, 1)), 'PNG'), COLOURS[:1, :1], 0),
    'wide_20000x20.jpg': (encode(Image.new('RGB', (20_000, 20), (10, 200, 90)), 'JPEG'), None, 0),
    'wide_20000x20.png': (encode(Image.new('RGB', (20_000, 20), (10, 200, 90)), 'PNG'), None, 0),
}

# Name, content and the reason that is given.
UNREADABLE = {
    'empty.jpg': (b'', 'the file is empty'),
    'text.jpg': (b'This is a text file.\n' * 20, 'no image that can be read'),
    'truncated.jpg': (half(jpeg()), 'image file is truncated'),
    'header_only.jpg': (jpeg()[:300], 'no image that can be read|truncated|broken'),
    'truncated_progressive.jpg': (jpeg(progressive=True)[:-200], 'image file is truncated'),
    'truncated_with_thumbnail.jpg': (thumbnail()[:-100], 'image file is truncated'),
    'truncated.png': (half(encode(RGB, 'PNG')), 'image file is truncated'),
    'truncated_grey16.png': (half(encode(deep_grey, 'PNG')), 'no image that can be read'),
    'truncated.gif': (half(encode(RGB, 'GIF')), 'image file is truncated'),
    'truncated.webp': (half(encode(RGB, 'WEBP', lossless=True)), 'no image that can be read|could not create decoder'),
    'truncated.tif': (half(encode(RGB, 'TIFF')), 'truncated|no image that can be read'),
    'truncated.bmp': (half(encode(RGB, 'BMP')), 'image file is truncated'),
    'bomb.png': (bomb(), 'exceeds limit of 178956970 pixels, could be decompression bomb'),
    'thread_20001x1.png': (
        encode(Image.new('RGB', (20_001, 1)), 'PNG'),
        '20001x1 pixels: one side is more than 1000 times the other',
    ),
    'float.tif': (encode(Image.fromarray(GREY.astype(np.float32)), 'TIFF'), r'pixels of 32 bits \(Pillow: F\)'),
    'int.tif': (encode(Image.fromarray(GREY.astype(np.int32)), 'TIFF'), r'pixels of 32 bits \(Pillow: I\)'),
    'a_folder.jpg': (None, 'Is a directory'),
}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize('backend', ['cv2', 'pillow'])
@pytest.mark.parametrize('name', SOUND)
def test_sound(name, backend, tmp_path):
    content, colours, tolerance = SOUND[name]
    path = write(tmp_path / name, content)
    results = LoadSoundImage(imdecode_backend=backend)(dict(img_path=str(path)))
    image = results['img']
    assert image.dtype == np.uint8
    if colours is None:
        assert image.shape == (20, 20_000, 3)
        assert abs(image.reshape(-1, 3)[:, ::-1] - np.array([10, 200, 90])).max() <= 2
        return
    assert image.shape == colours.shape
    assert results['img_shape'] == results['ori_shape'] == colours.shape[:2]
    if (name, backend) == ('la.png', 'pillow'):  # on mmcv's grey
        alpha = COLOURS[:, :, :1] / 255
        colours, tolerance = alpha * GREYS + (1 - alpha) * np.array([124, 117, 104]), 1
    assert abs(image[:, :, ::-1].astype(float) - colours).max() <= tolerance


@pytest.mark.parametrize('name', UNREADABLE)
def test_unreadable(name, tmp_path):
    content, reason = UNREADABLE[name]
    path = write(tmp_path / name, content)
    for backend in ('cv2', 'pillow'):
        with pytest.raises(UnreadableImageError) as raised:
            LoadSoundImage(imdecode_backend=backend)(dict(img_path=str(path)))
        said = str(raised.value)
        assert said.startswith(f'{path}: ')
        assert re.search(reason, said, re.IGNORECASE)
        assert '\n' not in said
        assert LoadSoundImage(imdecode_backend=backend, ignore_empty=True)(dict(img_path=str(path))) is None


def test_missing(tmp_path):
    path = str(tmp_path / 'gone.jpg')
    with pytest.raises(UnreadableImageError, match=f'^{re.escape(path)}: No such file or directory$'):
        LoadSoundImage()(dict(img_path=path))


def test_a_jpeg_cut_anywhere(tmp_path):
    """Wherever it is cut, it is refused or, where only bytes after the last pixel are gone, read whole."""
    content = jpeg()
    whole = mmcv.imfrombytes(content)
    refused = 0
    for end in [*range(1, len(content) - 8, 97), *range(len(content) - 8, len(content))]:
        path = write(tmp_path / 'cut.jpg', content[:end])
        try:
            image = LoadSoundImage()(dict(img_path=str(path)))['img']
        except UnreadableImageError:
            refused += 1
        else:
            assert end > len(content) - 8
            assert abs(image.astype(int) - whole).max() <= 1
    assert refused > 20


def test_as_mmcv_loads_it(tmp_path):
    """Ordinary files come out as mmcv's own transform has them, with each of its options."""
    for name in ('rgb.jpg', 'rgb.png', 'rotated.jpg'):
        path = str(write(tmp_path / name, SOUND[name][0]))
        for options in (
            {},
            dict(to_float32=True),
            dict(color_type='grayscale'),
            dict(color_type='unchanged'),
            dict(color_type='color_ignore_orientation'),
            dict(imdecode_backend='pillow'),
        ):
            expected, got = (t(**options)(dict(img_path=path)) for t in (LoadImageFromFile, LoadSoundImage))
            assert expected.keys() == got.keys()
            np.testing.assert_array_equal(got['img'], expected['img'])
            assert got['img'].dtype == expected['img'].dtype
            assert got['ori_shape'] == expected['ori_shape']


# The data set, and runs over it


@TRANSFORMS.register_module(force=True)
class FailOn:
    """A transform with a fault that shows at one image."""

    def __init__(self, name):
        self.name = name

    def __call__(self, results):
        if self.name in results['img_path']:
            raise KeyError('scale')
        return results


LOAD = dict(type='LoadImageFromFile')


@pytest.fixture
def folder(tmp_path):
    """``folder(bad, good)``: a root with two classes, the unreadable files among the others."""

    def make(bad, good=6):
        for i in range(good):
            write(tmp_path / 'data' / f'class_{i % 2}' / f'good_{i}.png', SOUND['rgb.png'][0])
        for name in bad:
            write(tmp_path / 'data' / 'class_0' / f'bad_{name}', UNREADABLE[name][0])
        return str(tmp_path / 'data')

    return make


def dataset(root, *transforms, limit=10, **options):
    own = dict(type='CustomDataset', data_root=root, pipeline=[LOAD, *transforms], _scope_='mmpretrain', **options)
    skipping = SkipUnreadable(own, limit=limit)
    skipping.full_init()
    return skipping


BAD = ['empty.jpg', 'text.jpg', 'truncated.jpg']


@pytest.fixture
def messages():
    """What goes into mmengine's log."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def test_another_image_in_its_place(folder, messages):
    root = folder(BAD)
    skipping = dataset(root)
    assert len(skipping) == 9
    assert skipping.CLASSES == ('class_0', 'class_1')
    assert skipping.get_data_info(0)['img_path'] == f'{root}/class_0/bad_empty.jpg'
    drawn = [skipping[i]['img_path'] for i in range(9)]
    assert drawn[3:] == [skipping.get_data_info(i)['img_path'] for i in range(3, 9)]
    assert all('good' in path for path in drawn)
    np.random.seed(7)
    again = dataset(root)
    assert [again[i]['img_path'] for i in reversed(range(9))] == drawn[::-1]
    lines = [line for line in messages if 'skipped' in line]
    assert len(lines) == 6  # three of each data set: an image that is met again is not counted again
    for i, name in enumerate(BAD):
        assert f'{root}/class_0/bad_{name}: ' in lines[i]
        assert lines[i].endswith(f': skipped, {i + 1} of at most 10')


def test_counts_over_spawned_workers(folder):
    skipping = dataset(folder(BAD), limit=2)
    # What such a worker gets, without the seconds of importing everything in one.
    other = pickle.loads(ForkingPickler.dumps(skipping))
    skipping[0], other[1]
    with pytest.raises(UnreadableImageError, match=r'^3 of 9 images cannot be read, and limit=2 may be skipped'):
        skipping[2]


def test_counts_over_forked_workers(folder):
    root = folder(BAD)
    skipping = dataset(root, limit=2)
    with pytest.raises(UnreadableImageError) as raised:
        list(DataLoader(skipping, num_workers=2, collate_fn=lambda x: x))
    paths = [f'{root}/class_0/bad_{name}' for name in BAD]
    said = str(raised.value)
    assert said.startswith(f'3 of 9 images cannot be read, and limit=2 may be skipped: {", ".join(paths)}; the last: ')
    assert 'Traceback' not in said
    assert int(skipping._unreadable.sum()) == 3


def test_nothing_is_left(folder):
    root = folder(BAD, good=0)
    with pytest.raises(UnreadableImageError, match=r'^3 of 3 images cannot be read, and limit=10 may be skipped'):
        dataset(root)[0]


def test_names_of_the_first_only(folder, tmp_path):
    root = folder([])
    for i in range(14):
        write(tmp_path / 'data' / 'class_1' / f'a_{i:02}.jpg', b'')
    skipping = dataset(root, limit=12)
    with pytest.raises(UnreadableImageError) as raised:
        [skipping[i] for i in range(len(skipping))]
    said = str(raised.value)
    names, last = re.search(r'skipped: (.*) and 3 more; the last: (.*): the file is empty$', said).groups()
    assert len(names.split(', ')) == 10
    assert all(name.startswith(f'{root}/class_1/a_') for name in [*names.split(', '), last])


def test_validation_skips_nothing(folder):
    root = folder(['text.jpg'])
    said = f'{root}/class_0/bad_text.jpg: no image that can be read (no image of this data set may be skipped)'
    for options in (dict(limit=0), dict(limit=0, test_mode=True)):
        loader = DataLoader(dataset(root, **options), num_workers=1, collate_fn=lambda x: x)
        with pytest.raises(UnreadableImageError, match=f'^{re.escape(said)}$'):
            list(loader)


def test_a_fault_of_a_transform_is_no_unreadable_image(folder):
    root = folder([])
    loader = DataLoader(dataset(root, dict(type='FailOn', name='good_3')), num_workers=1, collate_fn=lambda x: x)
    said = f"{root}/class_1/good_3.png: FailOn: KeyError: 'scale'"
    with pytest.raises(RuntimeError, match=re.escape(said)):
        list(loader)


def test_empty_class_folder(folder, tmp_path, messages):
    root = folder([])
    (tmp_path / 'data' / 'class_0b').mkdir()
    skipping = dataset(root)
    assert skipping.CLASSES == ('class_0', 'class_0b', 'class_1')
    assert {skipping.get_data_info(i)['gt_label'] for i in range(6)} == {0, 2}
    assert any('Found no valid file in the folder class_0b' in message for message in messages)


def test_label_maps(tmp_path, messages):
    pytest.importorskip('mmseg.datasets')
    import mmseg.datasets as mmseg_datasets

    labels = encode(Image.fromarray((COLOURS[:, :, 0] > 99).astype(np.uint8)), 'PNG')
    for i in range(4):
        write(tmp_path / 'images' / f'{i}.jpg', jpeg() if i != 1 else jpeg()[:900])
        write(tmp_path / 'labels' / f'{i}.png', labels if i != 2 else half(labels))
    own = mmseg_datasets.BaseSegDataset(
        data_root=str(tmp_path),
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        metainfo=dict(classes=('a', 'b')),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='mmseg.LoadAnnotations')],
    )
    skipping = SkipUnreadable(own, limit=2)
    skipping.full_init()
    assert [skipping[i]['gt_seg_map'].shape for i in range(4)] == [(HEIGHT, WIDTH)] * 4
    said = sorted(message for message in messages if ': skipped, ' in message)
    assert [message.partition(':')[0] for message in said] == [
        f'{tmp_path}/images/1.jpg',
        f'{tmp_path}/images/2.jpg and {tmp_path}/labels/2.png',
    ]
    assert 'LoadAnnotations: OSError: image file is truncated' in said[1]


@HOOKS.register_module(force=True)
class Witness(Hook):
    """Keeps the names and the losses of what is trained."""

    names, losses = [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.names += [Path(sample.img_path).name for sample in data_batch['data_samples']]
        self.losses.append(outputs['loss'].item())
        assert tuple(data_batch['inputs'].shape[1:]) == (3, 32, 32)


def runner(root, work_dir, **options):
    cfg = Config.fromfile(find_config('sknet26_in1k'))
    cfg.merge_from_dict(
        {
            'model.backbone.layers': (1, 1, 1, 1),
            'model.backbone.channels': (16, 16, 16, 16),
            'model.backbone.cardinality': 8,
            'model.backbone.base_width': 16,
            'model.head.in_channels': 64,
            'model.head.num_classes': 3,
            'data_preprocessor.num_classes': 3,
            'val_evaluator.topk': (1,),
            'train_cfg.max_epochs': 1,
            'default_hooks.checkpoint': None,
            'env_cfg.dist_cfg': None,
            'train_dataloader.dataset.pipeline.1.scale': 32,
            'val_dataloader.dataset.pipeline.1.scale': 36,
            'val_dataloader.dataset.pipeline.2.crop_size': 32,
        }
    )
    for split in ('train', 'val'):
        loader = cfg[f'{split}_dataloader']
        loader.update(batch_size=8, num_workers=2, persistent_workers=False, pin_memory=False)
        loader.dataset.update(data_root=str(root), metainfo=dict(classes=('class_0', 'class_1', 'class_2')))
    cfg.merge_from_dict(options)
    cfg.update(work_dir=str(work_dir), experiment_name=work_dir.name, custom_hooks=[dict(type='Witness')])
    skip_unreadable(cfg)
    Witness.names.clear(), Witness.losses.clear()
    return Runner.from_cfg(cfg)


def test_a_run_over_all_of_them(tmp_path):
    unreadable = [name for name, (content, _) in UNREADABLE.items() if content is not None]
    for i, (name, (content, *_)) in enumerate(SOUND.items()):
        write(tmp_path / 'data' / 'train' / f'class_{i % 2}' / name, content)
        write(tmp_path / 'data' / 'val' / f'class_{i % 2}' / name, content)
    for name in unreadable:
        write(tmp_path / 'data' / 'train' / 'class_1' / name, UNREADABLE[name][0])
    for split in ('train', 'val'):
        (tmp_path / 'data' / split / 'class_2').mkdir()

    run = runner(tmp_path / 'data', tmp_path / 'all', **{'unreadable_images.limit': len(unreadable)})
    run.train()
    assert set(Witness.names) == set(SOUND)
    assert len(Witness.names) == len(SOUND) + len(unreadable)
    assert np.isfinite(Witness.losses).all()
    (log,) = (tmp_path / 'all').glob('*/*.log')
    text = log.read_text(encoding='utf-8')
    lines = [line for line in text.splitlines() if ': skipped, ' in line]
    assert sorted(int(re.search(r'skipped, (\d+) of at most', line)[1]) for line in lines)[-1] == len(unreadable)
    for name in unreadable:
        assert sum(f'/class_1/{name}: ' in line for line in lines) == 1
    assert 'Found no valid file in the folder class_2' in text
    assert 'accuracy/top1: ' in text

    # Of two workers with a batch each, both may be one file further at once; a batch in advance would make it more.
    said = rf'^[45] of {len(SOUND) + len(unreadable)} images cannot be read, and limit=3 may be skipped: '
    limited = {'unreadable_images.limit': 3, 'train_dataloader.prefetch_factor': 1}
    with pytest.raises(UnreadableImageError, match=said) as raised:
        runner(tmp_path / 'data', tmp_path / 'limit', **limited).train()
    assert sum(f'/class_1/{name}' in str(raised.value) for name in unreadable) >= 4

    # A validation image that cannot be read is no smaller validation set.
    path = write(tmp_path / 'data' / 'val' / 'class_0' / 'empty.jpg', b'')
    said = f'{path}: the file is empty (no image of this data set may be skipped)'
    with pytest.raises(UnreadableImageError, match=f'^{re.escape(said)}$'):
        runner(tmp_path / 'data', tmp_path / 'val', **{'unreadable_images.limit': len(unreadable)}).val()


def test_switched_pipeline(folder):
    """mmdet's PipelineSwitchHook puts another pipeline in the place of a data set's."""
    skipping = dataset(folder(BAD))
    skipping.pipeline = Compose([LoadImageFromFile(color_type='grayscale')])
    assert isinstance(skipping.dataset.pipeline.transforms[0], LoadSoundImage)
    assert skipping[0]['img'].shape == (HEIGHT, WIDTH)


def test_into_a_config():
    cfg = Config.fromfile(find_config('sknet50_in1k'))
    before = cfg.train_dataloader.dataset
    skip_unreadable(cfg)
    assert cfg.train_dataloader.dataset == dict(type='SkipUnreadable', dataset=before)
    assert cfg.val_dataloader.dataset.limit == cfg.test_dataloader.dataset.limit == 0
    once = cfg.to_dict()
    skip_unreadable(cfg)
    assert cfg.to_dict() == once

    cfg = Config.fromfile(find_config('sknet50_in1k'))
    cfg.unreadable_images = dict(limit=3, max_ratio=50)
    inner = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=2, dataset=inner)
    cfg.val_dataloader.dataset = dict(type='ConcatDataset', datasets=[inner, inner])
    skip_unreadable(cfg)
    assert cfg.train_dataloader.dataset.dataset == dict(type='SkipUnreadable', dataset=inner, limit=3, max_ratio=50)
    assert [d.limit for d in cfg.val_dataloader.dataset.datasets] == [0, 0]

    cfg = Config.fromfile(find_config('sknet_digits'))  # in memory
    before = cfg.to_dict()
    skip_unreadable(cfg)
    assert cfg.to_dict() == before


@pytest.mark.parametrize(
    ('value', 'said'),
    [
        (dict(limt=2), r'\.limt: there are only limit, max_ratio'),
        (dict(limit=-1), r'\.limit=-1 must be an integer of at least 0'),
        (dict(max_ratio='x'), r"\.max_ratio='x' must be a number of at least 1"),
        (2, '=2 must be a dict with limit and max_ratio, or None'),
    ],
)
def test_misspelt_in_a_config(value, said):
    """Also where no data set reads files."""
    cfg = Config.fromfile(find_config('sknet_digits'))
    cfg.unreadable_images = value
    with pytest.raises(ConfigError, match=f'^unreadable_images{said}$'):
        skip_unreadable(cfg)


def test_no_skipping(folder):
    """With None mmcv's transform reads the files, and those that it cannot read are named, by workers too."""
    root = folder(['empty.jpg'])
    own = dict(type='CustomDataset', data_root=root, pipeline=[LOAD], _scope_='mmpretrain')
    cfg = Config(dict(train_dataloader=dict(dataset=own), unreadable_images=None))
    skip_unreadable(cfg)
    naming = SkipUnreadable(**{k: v for k, v in cfg.train_dataloader.dataset.items() if k != 'type'})
    assert type(naming.pipeline.transforms[0]) is LoadImageFromFile
    with pytest.raises(UnreadableImageError) as raised:
        list(DataLoader(naming, num_workers=1, collate_fn=lambda x: x))
    said = str(raised.value)
    assert re.match(rf'{root}/class_0/bad_empty\.jpg: LoadImageFromFile: error: OpenCV.*buf\.empty', said)
    assert said.endswith('(no image of this data set may be skipped)')
    assert '\n' not in said
    assert 'Traceback' not in said


def test_in_other_data_sets(folder):
    root = folder(BAD)
    own = dict(type='CustomDataset', data_root=root, pipeline=[LOAD], _scope_='mmpretrain')
    cfg = Config(dict(train_dataloader=dict(dataset=dict(type='ConcatDataset', datasets=[own, own]))))
    skip_unreadable(cfg)
    concat = ConcatDataset(cfg.train_dataloader.dataset.datasets)
    assert concat.metainfo['classes'] == ('class_0', 'class_1')
    assert all('good' in concat[i]['img_path'] for i in range(18))
    repeat = RepeatDataset(cfg.train_dataloader.dataset.datasets[0], times=2)
    assert all('good' in repeat[i]['img_path'] for i in range(18))


def test_folds(folder):
    """KFoldDataset takes a part of its data set in its place."""
    root = folder(BAD)
    own = dict(type='CustomDataset', data_root=root, pipeline=[LOAD], _scope_='mmpretrain')
    cfg = Config(dict(train_dataloader=dict(dataset=dict(type='KFoldDataset', num_splits=3, fold=1, dataset=own))))
    cfg.unreadable_images = dict(limit=3)
    skip_unreadable(cfg)
    # Of its three parts the first is all bad.
    arguments = {k: v for k, v in cfg.train_dataloader.dataset.items() if k != 'type'}
    fold = KFoldDataset(**arguments)
    assert [Path(fold.get_data_info(i)['img_path']).name[:3] for i in range(6)] == ['bad'] * 3 + ['goo'] * 3
    assert fold.dataset._unreadable.is_shared()
    assert all('good' in fold[i]['img_path'] for i in range(6))
    assert fold.dataset._unreadable.tolist() == [1, 1, 1, 0, 0, 0]
    fold.dataset.limit = 2
    with pytest.raises(UnreadableImageError, match=r'^3 of 6 images cannot be read, and limit=2 may be skipped'):
        fold[2]
    held_out = KFoldDataset(**{**arguments, 'fold': 0, 'test_mode': True})
    with pytest.raises(UnreadableImageError, match=r'^3 of 3 images cannot be read'):
        [held_out[i] for i in range(3)]

    part = dataset(root)
    part.get_subset_([0, 5, 6])
    assert [Path(part[i]['img_path']).name[:4] for i in range(3)] == ['good'] * 3
    assert part._unreadable.tolist() == [1, 0, 0]


def test_arguments(folder):
    own = dict(type='CustomDataset', data_root=folder([]), pipeline=[LOAD], _scope_='mmpretrain')
    with pytest.raises(ValueError, match=r'^limit=-1 must be an integer of at least 0$'):
        SkipUnreadable(own, limit=-1)
    with pytest.raises(ValueError, match=r'^max_ratio=0\.5 must be a number of at least 1$'):
        SkipUnreadable(own, max_ratio=0.5)
    assert isinstance(SkipUnreadable(CustomDataset(data_root=own['data_root'], pipeline=[LOAD])), SkipUnreadable)
    assert not isinstance(Digits(split='test').pipeline, type(SkipUnreadable(own).pipeline))
