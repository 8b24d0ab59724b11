"""ADE20K's and Cityscapes' folders with a few small pictures, and our configs made small enough for them."""

import numpy as np
from PIL import Image

CROP = (48, 72)  # no multiples of 32
SIZES = {'train': [(50, 80), (61, 75), (49, 73), (90, 100)], 'val': [(53, 71), (60, 90)]}
IGNORED = 255


def scene(height, width, classes, seed):
    """A picture and its labels, some of them ignored: three boxes of class 1 to 3 on class 0, each in its colour."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((height, width), np.uint8)
    for label in rng.permutation(np.arange(1, 4)):
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        labels[top : top + height // 2, left : left + width // 2] = label
    colours = np.array([[40, 90, 60], [200, 40, 40], [40, 40, 210], [230, 220, 60]])
    picture = np.clip(colours[labels] + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)
    labels[:2] = IGNORED
    assert labels[labels != IGNORED].max() < classes
    return Image.fromarray(picture), labels


def make_ade20k(root):
    """ADE20K's layout, in whose files 0 is what is not labelled."""
    for split, folder in (('train', 'training'), ('val', 'validation')):
        for kind in ('images', 'annotations'):
            (root / kind / folder).mkdir(parents=True)
        for i, (height, width) in enumerate(SIZES[split]):
            picture, labels = scene(height, width, 150, seed=i)
            picture.save(root / 'images' / folder / f'ADE_{split}_{i:08d}.jpg')
            Image.fromarray(labels + np.uint8(1)).save(root / 'annotations' / folder / f'ADE_{split}_{i:08d}.png')
    return root


def make_cityscapes(root):
    """Cityscapes' layout."""
    for split, sizes in SIZES.items():
        for kind in ('leftImg8bit', 'gtFine'):
            (root / kind / split / 'ulm').mkdir(parents=True)
        for i, (height, width) in enumerate(sizes):
            picture, labels = scene(height, width, 19, seed=i)
            name = f'ulm_{i:06d}_000019'
            picture.save(root / 'leftImg8bit' / split / 'ulm' / f'{name}_leftImg8bit.png')
            Image.fromarray(labels).save(root / 'gtFine' / split / 'ulm' / f'{name}_gtFine_labelTrainIds.png')
    return root


def narrow_options(cfg):
    """Few channels for a config's model, no weights and no dropout; the units, the strides and the heads stay."""
    if cfg.model.backbone.type.endswith('SKNet'):
        backbone = dict(channels=(8, 16, 32, 64), cardinality=4, base_width=16)
        channels = {256: 32, 512: 64, 1024: 128, 2048: 256}
    else:
        backbone = dict(channels=(16, 32, 48), stem_channels=8, head_channels=64)
        channels = {116: 16, 232: 32, 1024: 64}
    options = {f'model.backbone.{key}': value for key, value in {**backbone, 'init_cfg': None}.items()}
    for name in ('decode_head', 'auxiliary_head'):
        head = cfg.model[name]
        wide = head.in_channels
        few = dict(in_channels=tuple(channels[c] for c in wide) if isinstance(wide, list) else channels[wide])
        few.update(channels=16, dropout_ratio=0)
        if 'c1_in_channels' in head:
            few.update(c1_in_channels=channels[head.c1_in_channels], c1_channels=8)
        options.update({f'model.{name}.{key}': value for key, value in few.items()})
    return options


def small_options(cfg, folder, iterations=1):
    """Options that fit a config to the pictures of ``folder``: narrow, small crops, no workers, few iterations."""
    options = {**narrow_options(cfg), 'model.data_preprocessor.size': CROP}
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        options.update({f'{name}.num_workers': 0, f'{name}.persistent_workers': False})
        options[f'{name}.dataset.data_root'] = str(folder)
        for i, transform in enumerate(cfg[name].dataset.pipeline):
            if 'scale' in transform:
                options[f'{name}.dataset.pipeline.{i}.scale'] = (100, 60)
            if 'crop_size' in transform:
                options[f'{name}.dataset.pipeline.{i}.crop_size'] = CROP
    options.update({'train_cfg.max_iters': iterations, 'train_cfg.val_interval': iterations})
    options.update({'default_hooks.logger.interval': 1, 'default_hooks.checkpoint.interval': iterations})
    return options


def as_words(options):
    """The options as the arguments of ``--cfg-options``."""
    return [f'{key}={value}'.replace(' ', '') for key, value in options.items()]
