"""Every classifier's config, those of later networks included: it parses, builds, and trains a step."""

import copy
import functools
import io
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('mmpretrain')

import mmpretrain
import timm
import torch
import torchvision
from helpers.kinds import quick
from helpers.randomised import randomise
from helpers.simclr import as_file
from helpers.tolerances import assert_close
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, DefaultScope
from mmengine.runner import Runner
from mmpretrain.registry import DATASETS, MODELS
from modelindex.load_model_index import load as load_model_index
from PIL import Image
from safetensors.torch import save
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sk_plugins import zoo
from sk_plugins._resources import ROOT
from sk_plugins.weights.simclr import to_lightly

# Each has its own test file.
FRAMEWORKS = {'detection', 'finetune', 'rotated', 'scenes', 'segmentation'}
ALL_CONFIGS = [path for path in sorted((ROOT / 'configs').rglob('*.py')) if '_base_' not in path.parts]
CONFIGS = {str(path.relative_to(ROOT / 'configs')): path for path in ALL_CONFIGS if path.parent.name not in FRAMEWORKS}
PATHS = {path.stem: path for path in CONFIGS.values()}
INDEX = {model.name: model for model in load_model_index(str(ROOT / 'model-index.yml')).models}
each_config = pytest.mark.parametrize('path', CONFIGS.values(), ids=CONFIGS.keys())
# Of one of a kind: test_recipe_is_the_networks_whole_familys shows that the others differ in the backbone alone.
RECIPES = ['sknet50_in1k', 'skshufflenetv2_x1_0_in1k', 'sknet29_16x32d_cifar10', 'sknet29_16x32d_cifar100']
RECIPES += ['sknet_fashion_mnist', 'sknet_digits', 'skresnet50x1_simclr_in1k', 'skresnet50x1_simclr_finetune_in1k']
# 140 million parameters and more are built without memory alone.
AFFORDABLE = [name for name in PATHS if INDEX[name].metadata.parameters < 1.2e8]
# They start from weights of the Hub, and have a test of their own.
WARM = ['sknet101_warm_in1k', 'skresnext101_32x8d_warm_in1k', 'skresnext101_64x4d_warm_in1k']


def jpeg(folder, index):
    """Noise that is no square, and grey where ``index`` is odd, as some of ImageNet is."""
    pixels = np.random.default_rng(index).integers(0, 256, (150, 180 + 40 * index, 3), np.uint8)
    path = folder / f'{index}.JPEG'
    Image.fromarray(pixels).convert('L' if index % 2 else 'RGB').save(path)
    return dict(img_path=str(path), gt_label=index)


def noise(*shape):
    def sample(folder, index):
        return dict(img=np.random.default_rng(index).integers(0, 256, shape, np.uint8), gt_label=index)

    return sample


# What a data set of this type hands to its pipeline.
SAMPLES = {
    'CIFAR10': noise(32, 32, 3),
    'CIFAR100': noise(32, 32, 3),
    'Digits': noise(8, 8),
    'FashionMNIST': noise(28, 28),
    'ImageNet': jpeg,
}
# What a test image of it becomes: (channels, height, width).
INPUTS = {
    'CIFAR10': (3, 32, 32),
    'CIFAR100': (3, 32, 32),
    'Digits': (1, 16, 16),
    'FashionMNIST': (1, 28, 28),
    'ImageNet': (3, 224, 224),
}


@functools.cache
def _read(path):
    return Config.fromfile(path)


def read(path):
    """The config, to change at will."""
    return copy.deepcopy(_read(path))


def two_samples(cfg, loader, folder):
    """Two images through the data set's own pipeline; its files need not be there."""
    settings = cfg[f'{loader}_dataloader'].dataset
    assert settings.type in SAMPLES, f'say in SAMPLES what {settings.type} hands to its pipeline'
    dataset = DATASETS.build({**settings, 'lazy_init': True})
    assert len(dataset.metainfo['classes']) == cfg.model.head.num_classes == cfg.data_preprocessor.num_classes
    return [dataset.pipeline(SAMPLES[settings.type](folder, index)) for index in range(2)]


def test_all_are_found():
    widths = ('x0_5', 'x1_0', 'x1_5', 'x2_0')
    networks = {f'{prefix}shufflenetv2_{width}_in1k' for prefix in ('', 'se', 'sk') for width in widths}
    networks |= {f'sknet{depth}_in1k' for depth in (26, 50, 101)}
    networks |= {f'skresnet{depth}_in1k' for depth in (18, 34, 50, '50d')}
    networks |= {f'skresnext{depth}_32x4d_in1k' for depth in (26, 50, 101, 152)}
    networks |= {'skresnext101_32x8d_in1k', 'skresnext101_64x4d_in1k', 'resnext50_32x4d_in1k', 'seresnext50_32x4d_in1k'}
    networks |= {
        f'{net}29_16x32d_{data}' for net in ('resnext', 'seresnext', 'sknet') for data in ('cifar10', 'cifar100')
    }
    networks |= {'sknet_digits', 'sknet_fashion_mnist', *WARM}
    simclrs = ('50x1', '50x2', '101x1', '101x2', '152x1', '152x2', '152x3')
    networks |= {f'skresnet{shape}_simclr{kind}_in1k' for shape in simclrs for kind in ('', '_finetune')}
    assert {path.stem for path in CONFIGS.values() if path.parent == ROOT / 'configs'} >= networks
    assert len({path.stem for path in ALL_CONFIGS}) == len(ALL_CONFIGS), (
        'a work dir is named after its config, and two have one name'
    )


@pytest.mark.parametrize(
    'folder', sorted({path.parent for path in ALL_CONFIGS} - {path.parent for path in CONFIGS.values()})
)
def test_other_frameworks_configs_are_covered(folder):
    """By the file of their name, which says what is in the folder."""
    tests = Path(__file__).with_name(f'test_{folder.name}.py').read_text()
    assert 'def test_all_are_there' in tests


@each_config
def test_imports_and_batch(path):
    cfg = read(path)
    assert 'sk_plugins.mmpretrain_models' in cfg.custom_imports['imports']
    assert cfg.custom_imports['allow_failed_imports'] is False
    assert cfg.auto_scale_lr.base_batch_size % cfg.train_dataloader.batch_size == 0


START_AT_RANDOM = [name for name in AFFORDABLE if name not in WARM]


@pytest.mark.parametrize(
    'name', quick(START_AT_RANDOM, [name for name in RECIPES if name != 'sknet29_16x32d_cifar100'])
)
@pytest.mark.usefixtures('formatted')
def test_trains_a_step(name, tmp_path):
    cfg = read(PATHS[name])
    cfg.model.backbone.pop('init_cfg', None)  # weights of the Hub
    train_a_step(PATHS[name], cfg, tmp_path)


NARROW = dict(layers=(1, 1, 1, 1), channels=(16, 32, 64, 128))


@pytest.mark.parametrize('name', WARM)
@pytest.mark.usefixtures('formatted')
def test_warm_start(name, hub, tmp_path):
    """The config's own network, narrower, has the outputs of the ResNeXt that it names, and trains a step."""
    cfg = read(PATHS[name])
    address = cfg.model.backbone.init_cfg.checkpoint
    assert cfg.model.head.init_cfg == dict(type='WarmStart', checkpoint=address)
    repo = address.removeprefix('hf-hub:')
    timms, _, tag = repo.removeprefix('timm/').partition('.')
    assert tag in [one.tag for one in timm.models.get_arch_pretrained_cfgs(timms).values() if one.hf_hub_id]
    torch.manual_seed(0)
    resnext = randomise(timm.create_model(timms, **NARROW)).eval()
    hub.add(repo, {'model.safetensors': save(resnext.state_dict())})
    cfg.model.backbone.update(NARROW)
    cfg.model.head.in_channels = 512
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(cfg.model)
        model.init_weights()
    x = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        logits = resnext(x)
        assert logits.std() > 1e-3
        assert_close(model.eval()(x), logits, length=model)
    torch.manual_seed(0)
    train_a_step(PATHS[name], cfg, tmp_path)


def train_a_step(path, cfg, tmp_path):
    cfg.work_dir, cfg.experiment_name = str(tmp_path), f'configs_{path.stem}'
    runner = Runner.from_cfg(cfg)
    # The Runner has written the whole config into the work dir, from where it can be run again.
    assert Config.fromfile(tmp_path / path.name).to_dict() == cfg.to_dict()
    assert type(runner.model.backbone).__module__ == 'sk_plugins.mmpretrain_models'

    samples = two_samples(cfg, 'train', tmp_path)
    assert samples[0]['inputs'].dtype == torch.uint8
    for sample in samples:
        assert sample['inputs'].shape[0] == cfg.model.backbone.get('in_channels', 3)
        # A corner tells as much as the whole, sooner: of small images a smaller one, whose stem halves nothing.
        side = 32 if min(sample['inputs'].shape[1:]) > 32 else 16
        sample['inputs'] = sample['inputs'][..., :side, :side]

    optim_wrapper = runner.build_optim_wrapper(cfg.optim_wrapper)
    runner.model.init_weights()
    runner.model.train()
    # SimCLR's classifier starts at zero, and hands no gradient back.
    first = next((runner.model.head if 'simclr' in path.stem else runner.model.backbone).parameters())
    before = first.detach().clone()
    loss = runner.model.train_step(pseudo_collate(samples), optim_wrapper)['loss'].item()
    assert loss == pytest.approx(np.log(cfg.model.head.num_classes), rel=0.2)
    assert not torch.equal(first, before)
    assert all(parameter.isfinite().all() for parameter in runner.model.parameters())


@pytest.mark.parametrize('name', RECIPES)
def test_tests_a_sample(name, tmp_path):
    cfg = read(PATHS[name])
    for loader in ('val', 'test'):
        samples = two_samples(cfg, loader, tmp_path)
        # They must stack, whatever the images' sizes.
        assert [sample['inputs'].shape for sample in samples] == [INPUTS[cfg.test_dataloader.dataset.type]] * 2
        assert [int(sample['data_samples'].gt_label) for sample in samples] == [0, 1]


# The model index


def test_index_has_every_config_and_no_other():
    assert {name: ROOT / model.config for name, model in INDEX.items()} == PATHS


# Where neither the table of docs/models.md has a figure nor another config of its kind is counted.
COUNTED = ['table6_5x5_d1_g64_in1k', 'sknet26_in1k', 'skshufflenetv2_x1_0_in1k', 'sknet29_16x32d_cifar10']
COUNTED += ['sknet_fashion_mnist', 'sknet_digits']


@pytest.mark.parametrize('name', [name for name in PATHS if name.removesuffix('_in1k') in zoo.MODELS])
def test_index_has_the_tables_figures(name):
    """Which tests/tools/test_model_table.py counts."""
    table = (ROOT / 'docs' / 'models.md').read_text(encoding='utf-8')
    (row,) = re.findall(rf'^\| `{name.removesuffix("_in1k")}` .*$', table, flags=re.MULTILINE)
    _, _, parameters, _, gflops, *_ = (cell.strip() for cell in row.split('|'))
    said = INDEX[name].metadata
    assert said.parameters == int(parameters.replace(',', ''))
    assert said.flops / 1e9 == pytest.approx(float(gflops), rel=0.01)


@pytest.mark.parametrize('name', quick(PATHS, COUNTED))
def test_index_counts(name):
    """Parameters, and multiply-adds of one test image, of the model that the index's name builds."""
    with torch.device('meta'):
        model = mmpretrain.get_model(name).eval()
        image = torch.empty(1, *INPUTS[_read(PATHS[name]).test_dataloader.dataset.type])
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            logits = model(image)
    assert logits.shape == (1, model.head.num_classes)
    said = INDEX[name].metadata
    assert sum(p.numel() for p in model.parameters()) == said.parameters
    assert counter.get_total_flops() / 2 == pytest.approx(said.flops, rel=0.01)


def test_index_names_the_zoos_weights():
    published = {f'{spec.name}_in1k': weights for spec in zoo.MODELS.values() for weights in spec.weights}
    published['skresnext50_32x4d_in1k'] = published['sknet50_in1k']
    assert {name for name, model in INDEX.items() if model.weights} == published.keys()
    for name, weights in published.items():
        assert INDEX[name].weights == (f'hf-hub:{weights.hf_hub_id}' if weights.hf_hub_id else weights.url)
        (result,) = INDEX[name].results
        assert (result.dataset, result.metrics['Top 1 Accuracy']) == ('ImageNet-1k', weights.top1)


# Of a kind with the 50 layers.
DEEP = ('skresnet101x1_simclr_in1k', 'skresnet152x1_simclr_in1k')


def as_published(name, state_dict):
    """The files of the repository."""
    if 'simclr' not in name:
        return {'model.safetensors': save(state_dict)}
    file = io.BytesIO()
    torch.save(as_file(to_lightly(state_dict)), file)
    return {zoo.MODELS[name.removesuffix('_in1k')].weights[0].file: file.getvalue()}


def reference(name):
    """The network as the weights' publisher defines it."""
    if name.startswith('shufflenet'):
        return getattr(torchvision.models, name.replace('shufflenet', 'shufflenet_').removesuffix('_in1k'))()
    return timm.create_model(name.replace('sknet50', 'skresnext50_32x4d').removesuffix('_in1k'))


@pytest.mark.parametrize(
    'name',
    quick(
        [name for name in AFFORDABLE if INDEX[name].weights and name not in DEEP],
        ['sknet50_in1k', 'skresnet18_in1k', 'shufflenetv2_x0_5_in1k', 'skresnet50x1_simclr_in1k'],
    ),
)
def test_pretrained(name, hub, tmp_path, monkeypatch):
    """Random weights of the publisher's own network stand in for the trained ones, at the address the index names."""
    torch.manual_seed(0)
    expected = randomise(reference(name)).eval()
    address = INDEX[name].weights
    if address.startswith('hf-hub:'):
        hub.add(address.removeprefix('hf-hub:'), as_published(name, expected.state_dict()))
    else:
        # torch.hub takes what it has downloaded before.
        monkeypatch.setenv('TORCH_HOME', str(tmp_path))
        (tmp_path / 'hub' / 'checkpoints').mkdir(parents=True)
        torch.save(expected.state_dict(), tmp_path / 'hub' / 'checkpoints' / address.rpartition('/')[2])
    model = mmpretrain.get_model(name, pretrained=True)
    x = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        logits = expected(x)
        assert logits.std() > 1e-3
        assert_close(model(x), logits, length=expected)


# The recipes

LARGE, LIGHT, CIFAR, SMALL = 'sknet50_in1k', 'skshufflenetv2_x1_0_in1k', 'sknet29_16x32d_cifar10', 'sknet_fashion_mnist'


def parent(name):
    """The config from which this one may differ in its network only."""
    if 'simclr' in name:
        return f'skresnet50x1_simclr{"_finetune" if "finetune" in name else ""}_in1k'
    if name in WARM:
        return WARM[0]
    if name.endswith('_in1k'):
        return LIGHT if 'shufflenet' in name else LARGE
    return re.sub('.*(cifar10+)$', r'sknet29_16x32d_\1', name) if 'cifar' in name else SMALL


@pytest.mark.parametrize('name', [name for name in PATHS if name != 'sknet_digits'])
def test_recipe_is_the_networks_whole_familys(name):
    own, familys = read(PATHS[name]), read(PATHS[parent(name)])
    for cfg in (own, familys):
        cfg.model.pop('backbone')
        cfg.model.head.pop('in_channels')
        cfg.model.head.pop('init_cfg', None)
    assert own.to_dict() == familys.to_dict()


def rates(cfg, epoch_length):
    """The learning rate of every iteration of the whole training."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=cfg.optim_wrapper.optimizer.lr)
    settings = dict(cfg.param_scheduler)
    scheduler_type = PARAM_SCHEDULERS.get(settings.pop('type'))
    each_iteration = settings.pop('convert_to_iter_based', False)
    if each_iteration:
        scheduler = scheduler_type.build_iter_from_epoch(optimizer, **settings, epoch_length=epoch_length)
    else:
        scheduler = scheduler_type(optimizer, **settings)
    values = []
    for _ in range(cfg.train_cfg.max_epochs):
        for _ in range(epoch_length):
            values.append(optimizer.param_groups[0]['lr'])
            optimizer.step()
            if each_iteration:
                scheduler.step()
        if not each_iteration:
            scheduler.step()
    return np.array(values)


def test_rate_of_the_large_networks():
    values = rates(read(PATHS[LARGE]), epoch_length=2)
    np.testing.assert_allclose(values, 0.1 * np.repeat([1, 0.1, 0.01, 0.001], [60, 60, 60, 20]), rtol=1e-9)


def test_rate_of_a_warm_start():
    values = rates(read(PATHS[WARM[0]]), epoch_length=2)
    np.testing.assert_allclose(values, 0.01 * (1 + np.cos(np.pi * np.arange(60) / 60)) / 2, rtol=1e-6)


def test_rate_of_the_lightweight_networks():
    values = rates(read(PATHS[LIGHT]), epoch_length=5)
    assert len(values) == 5 * 240
    np.testing.assert_allclose(values, np.linspace(0.5, 0, 5 * 240), rtol=1e-9, atol=1e-12)
    # 300,000 iterations, as the authors of ShuffleNetV2 count.
    assert pytest.approx(300_000, rel=0.001) == 240 * 1_281_167 / 1024


@pytest.mark.parametrize('name', [CIFAR, 'sknet29_16x32d_cifar100'])
def test_rate_on_cifar(name):
    values = rates(read(PATHS[name]), epoch_length=2)
    np.testing.assert_allclose(values, np.repeat([0.1, 0.01, 0.001], [300, 150, 150]), rtol=1e-9)


@pytest.mark.parametrize(
    ('name', 'optimizer', 'decay_of_norms', 'batch'),
    [
        (LARGE, dict(lr=0.1, momentum=0.9, nesterov=False, weight_decay=1e-4), 0, 256),
        (WARM[0], dict(lr=0.01, momentum=0.9, nesterov=False, weight_decay=1e-4), 0, 256),
        (LIGHT, dict(lr=0.5, momentum=0.9, nesterov=False, weight_decay=4e-5), 0, 1024),
        (CIFAR, dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4), 5e-4, 128),
    ],
)
def test_optimizer(name, optimizer, decay_of_norms, batch):
    cfg = read(PATHS[name])
    with DefaultScope.overwrite_default_scope('mmpretrain'), torch.device('meta'):
        model = MODELS.build(cfg.model)
        sgd = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    assert type(sgd) is torch.optim.SGD
    assert {k: sgd.defaults[k] for k in optimizer} == optimizer
    decay = {id(p): group['weight_decay'] for group in sgd.param_groups for p in group['params']}
    assert len(decay) == len(list(model.parameters()))
    # Of one dimension are scales, shifts and biases, and of more the weights.
    assert {decay[id(p)] for p in model.parameters() if p.ndim == 1} == {decay_of_norms}
    assert {decay[id(p)] for p in model.parameters() if p.ndim > 1} == {optimizer['weight_decay']}
    assert cfg.auto_scale_lr.base_batch_size == batch


def test_data():
    large, light = (read(PATHS[name]).train_dataloader for name in (LARGE, LIGHT))
    assert (large.batch_size * 8, light.batch_size * 8) == (256, 1024)
    crops = [next(t for t in loader.dataset.pipeline if t.type == 'RandomResizedCrop') for loader in (large, light)]
    assert [crop.get('crop_ratio_range') for crop in crops] == [None, (0.25, 1.0)]  # mmpretrain's is (0.08, 1)
    for name, classes in ((CIFAR, 10), ('sknet29_16x32d_cifar100', 100)):
        cfg = read(PATHS[name])
        crop, flip, _ = cfg.train_dataloader.dataset.pipeline
        assert (crop.crop_size, crop.padding, flip.prob, flip.direction) == (32, 4, 0.5, 'horizontal')
        assert cfg.train_dataloader.batch_size == 128
        for loader, split in (
            (cfg.train_dataloader, 'train'),
            (cfg.val_dataloader, 'test'),
            (cfg.test_dataloader, 'test'),
        ):
            assert loader.dataset.type == f'CIFAR{classes}'
            assert (loader.dataset.data_root, loader.dataset.split) == (f'data/cifar{classes}', split)
        assert cfg.model.head.num_classes == classes


# The ablations: counts as test_index_counts finds them

COUNTS = {  # parameters, GFLOPs, and by how much the former may differ
    'table3_wider_in1k': (28.02e6, 4.65, 5e3),
    'table3_deeper_in1k': (27.28e6, 4.67, 5e3),
    'table3_36x4d_in1k': (27.55e6, 4.70, 5e3),
    'table6_3x3_d3_g32_in1k': (27_479_784, 4.46, 0),
    'table6_3x3_d2_g32_in1k': (27_479_784, 4.46, 0),
    'table6_3x3_d1_g32_in1k': (27_479_784, 4.46, 0),
    'table6_5x5_d1_g64_in1k': (28.03e6, 4.55, 5e3),
    'table6_7x7_d1_g128_in1k': (27.99e6, 4.55, 5e3),
    'table7_k3_in1k': (25_028_904, 4.23, 0),
    'table7_k5_in1k': (25_028_904, 4.23, 0),
    'table7_k7_in1k': (25_028_904, 4.23, 0),
    'table7_k3_k5_summed_in1k': (26_458_664, 4.46, 0),
    'table7_k3_k7_summed_in1k': (26_458_664, 4.46, 0),
    'table7_k5_k7_summed_in1k': (26_458_664, 4.46, 0),
    'table7_k3_k5_selected_in1k': (27_479_784, 4.46, 0),
    'table7_k3_k7_selected_in1k': (27_479_784, 4.46, 0),
    'table7_k5_k7_selected_in1k': (27_479_784, 4.46, 0),
    'table7_k3_k5_k7_selected_in1k': (29_249_512, 4.69, 0),
}


@pytest.mark.parametrize('name', COUNTS)
def test_ablations_cost(name):
    parameters, gflops, tolerance = COUNTS[name]
    said = INDEX[name].metadata
    assert abs(said.parameters - parameters) <= tolerance
    assert said.flops / 1e9 == pytest.approx(gflops, rel=0.01)


def test_ablations_rows():
    """Every row of Tables 3, 6 and 7 is there, and its config is what its name says."""
    branches = [(3, 3, 32), (3, 2, 32), (3, 1, 32), (5, 1, 64), (7, 1, 128)]
    table3 = ['table3_wider_in1k', 'table3_deeper_in1k', 'table3_36x4d_in1k']
    table6 = {f'table6_{k}x{k}_d{d}_g{g}_in1k': [(3, 1, 32), (k, d, g)] for k, d, g in branches}
    table7 = [f'table7_{kernels}_in1k' for kernels in ('k3', 'k5', 'k7')]
    for kernels in ('k3_k5', 'k3_k7', 'k5_k7', 'k3_k5_k7'):
        table7 += [f'table7_{kernels}_summed_in1k', f'table7_{kernels}_selected_in1k']
    rows = {path.stem for path in (ROOT / 'configs' / 'ablation').glob('*.py')}
    assert rows == {*table3, *table6, *table7}
    for row, expected in table6.items():
        assert read(PATHS[row]).model.backbone.sk_kwargs.branches == expected
    for row in table7:
        sk_kwargs = read(PATHS[row]).model.backbone.sk_kwargs
        assert sk_kwargs.kernel_sizes == tuple(int(k) for k in re.findall(r'_k(\d)', row))
        assert sk_kwargs.get('select', 'channel') == ('channel' if 'selected' in row else 'sum')
    for row in table3:
        assert read(PATHS[row]).model.backbone.unit == 'plain'
