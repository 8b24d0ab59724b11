"""What timm's registry says of the networks: names, configs, arguments that it refuses, and what an import costs."""

import inspect
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers.narrow_models import (
    KINDS,
    NAMES,
    SHUFFLE_CHANNELS,
    each_kind,
    each_model,
    feature_shapes,
    is_shuffle,
    is_small,
    make_input,
    narrow,
)
from helpers.tolerances import assert_close
from timm.models import group_parameters
from torch import nn

import sk_plugins

SIMCLR = {f'skresnet{shape}_simclr' for shape in ('50x1', '50x2', '101x1', '101x2', '152x1', '152x2', '152x3')}


def test_registry_knows_ours():
    shuffles = [f'{unit}shufflenetv2_x{factor}' for unit in ('', 'se', 'sk') for factor in SHUFFLE_CHANNELS]
    assert set(NAMES) == {
        'sknet26', 'sknet50', 'sknet101',
        'skresnext101_32x4d', 'skresnext101_32x8d', 'skresnext101_64x4d',
        *SIMCLR, 'resnext29_16x32d', 'seresnext29_16x32d', 'sknet29_16x32d', *shuffles,
    }  # fmt: skip
    assert set(KINDS) < set(NAMES)
    assert timm.list_pretrained(['sknet*', '*shufflenet*', 'skresnext101*', '*29_16x32d*']) == [
        *(f'shufflenetv2_x{factor}.tv_in1k' for factor in SHUFFLE_CHANNELS), 'sknet50.ra_in1k'
    ]  # fmt: skip
    assert timm.list_models('sknet*', pretrained=True) == ['sknet50.ra_in1k']
    assert all(timm.is_model(name) for name in (*NAMES, 'sknet50.ra_in1k', 'shufflenetv2_x1_0.tv_in1k'))
    assert not timm.is_model('sknet51')
    assert {name for name in NAMES if timm.is_model_pretrained(name)} == {'sknet50', *SIMCLR, *shuffles[:4]}
    assert set(timm.list_pretrained('*_simclr')) == {f'{name}.goog_in1k' for name in SIMCLR}
    assert timm.is_model_pretrained('sknet50.ra_in1k')


@pytest.mark.parametrize('name', ['sknet50', 'sknet50.ra_in1k'])
def test_pretrained_cfg_of_sknet50(name):
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.architecture == 'sknet50'
    assert cfg.tag == 'ra_in1k'
    assert cfg.hf_hub_id == 'timm/skresnext50_32x4d.ra_in1k'
    assert cfg.license == 'apache-2.0'
    assert cfg.crop_pct == 0.875
    assert cfg.interpolation == 'bicubic'
    assert cfg.mean == (0.485, 0.456, 0.406)
    assert cfg.std == (0.229, 0.224, 0.225)
    assert any('80.15' in note for note in cfg.notes)
    assert cfg.paper_ids == 'arXiv:1903.06586'


def test_preprocessing_is_what_timm_trained_with():
    ours, timms = timm.get_pretrained_cfg('sknet50').to_dict(), timm.get_pretrained_cfg('skresnext50_32x4d').to_dict()
    said_by_us = {'url', 'hf_hub_filename', 'architecture', 'description', 'notes'}
    said_by_us |= {'origin_url', 'paper_name', 'paper_ids'}
    assert {k: v for k, v in ours.items() if k not in said_by_us} == {
        k: v for k, v in timms.items() if k not in said_by_us
    }


@pytest.mark.parametrize('name', ['skresnet18', 'skresnet34', 'skresnet50', 'skresnet50d', 'skresnext50_32x4d'])
def test_timms_own_names_stay_timms(name):
    assert timm.model_entrypoint(name).__module__.startswith('timm.')
    assert name not in NAMES


@pytest.mark.parametrize('name', [name for name in NAMES if not timm.is_model_pretrained(name)])
def test_pretrained_without_weights(name):
    with pytest.raises(RuntimeError, match=rf'{name} .*pretrained=True.*sknet50\.ra_in1k.*shufflenetv2_x2_0\.tv_in1k'):
        timm.create_model(name, pretrained=True, **narrow(name))


def test_unknown_tag_is_refused():
    with pytest.raises(RuntimeError, match='nonsense'):
        timm.create_model('sknet50.nonsense')


@each_kind
def test_unknown_argument_is_refused(name):
    with pytest.raises(TypeError, match='widen'):
        timm.create_model(name, widen=2)


@each_model
def test_entrypoint(name):
    entrypoint = timm.model_entrypoint(name)
    assert entrypoint.__name__ == name
    assert entrypoint.__doc__.endswith('.')
    network = inspect.signature(entrypoint).return_annotation
    assert type(entrypoint(device='meta')) is network


@each_model
def test_default_cfg(name):
    # On the meta device shapes cost nothing, so that the input can have its full size.
    model = timm.create_model(name, device='meta').eval()
    state_dict = model.state_dict()
    cfg = model.default_cfg
    x = torch.empty(2, *cfg['input_size'], device='meta')
    width = feature_shapes(name)[2]
    classes, pool_size = (100, (8, 8)) if is_small(name) else (1000, (7, 7))
    assert cfg['num_classes'] == classes
    assert cfg['pool_size'] == pool_size
    assert cfg['input_size'] == ((3, 32, 32) if is_small(name) else (3, 224, 224))

    features = model.forward_features(x)
    assert model.num_features == width
    assert features.shape == (2, width, *pool_size)
    assert model.forward_head(features).shape == (2, classes)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)

    model.reset_classifier(0)
    assert model.forward_head(features).shape == (2, width)
    model.reset_classifier(0, '')
    assert model.forward_head(features).shape == (2, width, *pool_size)

    assert cfg['classifier'] + '.weight' in state_dict
    assert cfg['first_conv'] + '.weight' in state_dict
    assert not [key for key in model.state_dict() if key.startswith(cfg['classifier'])]
    assert isinstance(model.get_submodule(cfg['first_conv']), nn.Conv2d)


@each_kind
def test_group_matcher(name):
    model = timm.create_model(name, device='meta')
    stem, stages, first = ('conv1', 'stage', 2) if is_shuffle(name) else ('(conv1|bn1)', 'layer', 1)
    depths = [len(child) for child_name, child in model.named_children() if child_name.startswith(stages)]
    depths = [depth for depth in depths if depth]
    names = [parameter_name for parameter_name, _ in model.named_parameters()]
    for coarse in (True, False):
        groups = group_parameters(model, model.group_matcher(coarse=coarse))
        assert sorted(parameter_name for group in groups.values() for parameter_name in group) == sorted(names)
        assert len(groups) == 1 + (len(depths) if coarse else sum(depths)) + 1
        ordered = [groups[index] for index in sorted(groups)]
        assert all(re.match(stem + r'\.', parameter_name) for parameter_name in ordered[0])
        assert ordered[-1] == ['fc.weight', 'fc.bias']
        expected = [f'{stages}{first + i}' for i in range(len(depths))]
        if not coarse:
            expected = [f'{stages}{first + i}.{unit}' for i, depth in enumerate(depths) for unit in range(depth)]
        if is_shuffle(name):
            # The convolution after the last stage goes with it, as timm groups what ends a network.
            assert ordered[-2][-3:] == ['conv5.0.weight', 'conv5.1.weight', 'conv5.1.bias']
            del ordered[-2][-3:]
        for prefix, group in zip(expected, ordered[1:]):
            assert all(parameter_name.startswith(prefix + '.') for parameter_name in group)


TORCHVISIONS = {
    'shufflenetv2_x0_5': ('shufflenet_v2_x0_5', 60.552, 256),
    'shufflenetv2_x1_0': ('shufflenet_v2_x1_0', 69.362, 256),
    'shufflenetv2_x1_5': ('shufflenet_v2_x1_5', 72.996, 232),
    'shufflenetv2_x2_0': ('shufflenet_v2_x2_0', 76.230, 232),
}


@pytest.mark.parametrize('name', TORCHVISIONS)
def test_cfg_is_torchvisions(name):
    models = pytest.importorskip('torchvision').models
    theirs, top1, resize = TORCHVISIONS[name]
    weights = models.get_model_weights(theirs).IMAGENET1K_V1
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.tag == 'tv_in1k'
    assert cfg.url == weights.url
    assert not cfg.hf_hub_id
    assert cfg.license == 'bsd-3-clause'
    assert cfg.origin_url == 'https://github.com/pytorch/vision'
    assert cfg.num_classes == len(weights.meta['categories']) == 1000
    assert weights.meta['_metrics']['ImageNet-1K']['acc@1'] == top1
    assert cfg.notes == (f'ImageNet-1k top-1 {top1:.2f} % at 224',)
    assert cfg.description
    transforms = weights.transforms()
    assert transforms.resize_size == [resize]
    assert math.floor(224 / cfg.crop_pct) == resize
    assert transforms.interpolation.value == cfg.interpolation == 'bilinear'
    assert list(cfg.mean) == transforms.mean
    assert list(cfg.std) == transforms.std
    assert cfg.crop_mode == 'center'


@pytest.mark.parametrize('name', ['shufflenetv2_x1_0', 'shufflenetv2_x2_0'])
def test_preprocessing_equals_torchvisions(name):
    models = pytest.importorskip('torchvision').models
    from PIL import Image

    image = torch.randint(0, 256, (37, 53, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(image.numpy()).resize((420, 310), Image.BICUBIC)
    config = timm.data.resolve_model_data_config(timm.create_model(name, device='meta'))
    transform = timm.data.create_transform(**config)
    expected = models.get_model_weights(TORCHVISIONS[name][0]).IMAGENET1K_V1.transforms()(image)
    assert expected.shape == (3, 224, 224)
    assert_close(transform(image), expected, length=4)


IMPORT = """
import sys, time
start = time.process_time()  # what other processes take of the machine does not count
import timm
timms = time.process_time()
import sk_plugins
print((time.process_time() - timms) / (timms - start))
print(*sorted({name.split('.')[0] for name in sys.modules}))
"""


@each_kind
def test_headless(name):
    x = make_input(size=32).to('meta')
    features = timm.create_model(name, **narrow(name), device='meta').eval().forward_features(x)
    for global_pool, shape in (({}, features.shape[:2]), (dict(global_pool=''), features.shape)):
        model = timm.create_model(name, **narrow(name) | dict(num_classes=0), **global_pool, device='meta').eval()
        assert model(x).shape == shape


def test_import():
    """Importing the package loads nothing of OpenMMLab and adds next to nothing to ``import timm``."""
    paths = [str(Path(sk_plugins.__file__).parents[1]), os.environ.get('PYTHONPATH')]
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, paths))}
    run = subprocess.run([sys.executable, '-c', IMPORT], env=environment, capture_output=True, text=True, check=True)
    ratio, modules = run.stdout.splitlines()
    assert 'sk_plugins' in modules.split()
    assert not {'mmengine', 'mmcv', 'mmpretrain', 'mmdet', 'mmseg'} & set(modules.split())
    assert float(ratio) < 0.09
