"""Every config of the project, those of later networks included: it parses, builds, and trains a step."""

import numpy as np
import pytest

pytest.importorskip('mmpretrain')

import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.runner import Runner
from PIL import Image

from sk_plugins._resources import ROOT

CONFIGS = {
    str(path.relative_to(ROOT / 'configs')): path
    for path in sorted((ROOT / 'configs').rglob('*.py'))
    if '_base_' not in path.parts
}
each_config = pytest.mark.parametrize('path', CONFIGS.values(), ids=CONFIGS.keys())


def jpeg(folder, index):
    """Noise that is no square, and grey where ``index`` is odd, as some of ImageNet is."""
    pixels = np.random.default_rng(index).integers(0, 256, (150, 180 + 40 * index, 3), np.uint8)
    path = folder / f'{index}.JPEG'
    Image.fromarray(pixels).convert('L' if index % 2 else 'RGB').save(path)
    return dict(img_path=str(path), gt_label=index)


def grey(side):
    def sample(folder, index):
        return dict(img=np.random.default_rng(index).integers(0, 256, (side, side), np.uint8), gt_label=index)

    return sample


# What a data set of this type hands to its pipeline.
SAMPLES = {'Digits': grey(8), 'FashionMNIST': grey(28), 'ImageNet': jpeg}


def test_all_are_found():
    assert CONFIGS.keys() >= {f'sknet{depth}_in1k.py' for depth in (26, 50, 101)}
    assert CONFIGS.keys() >= {'sknet_digits.py', 'sknet_fashion_mnist.py'}


@each_config
def test_carries_its_imports(path):
    cfg = Config.fromfile(path)
    assert 'sk_plugins.mmpretrain_models' in cfg.custom_imports['imports']
    assert cfg.custom_imports['allow_failed_imports'] is False
    assert cfg.default_scope


@each_config
def test_survives_being_written(path, tmp_path):
    """mmengine writes the whole config into the work dir, from where it can be run again."""
    cfg = Config.fromfile(path)
    cfg.dump(tmp_path / 'config.py')
    assert Config.fromfile(tmp_path / 'config.py').to_dict() == cfg.to_dict()


@each_config
def test_trains_a_step(path, tmp_path):
    cfg = Config.fromfile(path)
    cfg.work_dir, cfg.experiment_name = str(tmp_path), f'configs_{path.stem}'
    runner = Runner.from_cfg(cfg)
    assert type(runner.model.backbone).__module__ == 'sk_plugins.mmpretrain_models'

    dataset = cfg.train_dataloader.dataset
    assert dataset.type in SAMPLES, f'say in SAMPLES what {dataset.type} hands to its pipeline'
    pipeline = Compose(dataset.pipeline)
    samples = [pipeline(SAMPLES[dataset.type](tmp_path, index)) for index in range(2)]
    assert samples[0]['inputs'].dtype == torch.uint8
    for sample in samples:
        assert sample['inputs'].shape[0] == cfg.model.backbone.get('in_channels', 3)
        # A corner tells as much as the whole, sooner.
        sample['inputs'] = sample['inputs'][..., :64, :64]

    optim_wrapper = runner.build_optim_wrapper(cfg.optim_wrapper)
    runner.model.train()
    first = next(runner.model.backbone.parameters())
    before = first.detach().clone()
    loss = runner.model.train_step(pseudo_collate(samples), optim_wrapper)['loss'].item()
    assert loss == pytest.approx(np.log(cfg.model.head.num_classes), rel=0.2)
    assert not torch.equal(first, before)
    assert all(parameter.isfinite().all() for parameter in runner.model.parameters())


@each_config
def test_tests_a_sample(path, tmp_path):
    cfg = Config.fromfile(path)
    dataset = cfg.test_dataloader.dataset
    assert dataset.type in SAMPLES
    samples = [Compose(dataset.pipeline)(SAMPLES[dataset.type](tmp_path, index)) for index in range(2)]
    # They must stack, whatever the images' sizes.
    assert samples[0]['inputs'].shape == samples[1]['inputs'].shape
    assert [int(sample['data_samples'].gt_label) for sample in samples] == [0, 1]
