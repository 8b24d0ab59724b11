import functools
import re

import pytest
import timm
import torch
from helpers.kinds import one_of_each, quick
from helpers.randomised import randomise
from helpers.tolerances import assert_close
from torch.utils.flop_counter import FlopCounterMode

from sk_plugins import timm_models, zoo
from sk_plugins.networks import SKResNet, SKResNetSimCLR, SKShuffleNetV2

each_row = pytest.mark.parametrize('spec', zoo.MODELS.values(), ids=zoo.MODELS.keys())
OURS = [spec for spec in zoo.MODELS.values() if not spec.in_timm]
SIMCLRS = [spec for spec in OURS if spec.network is SKResNetSimCLR]
TIMMS = [spec for spec in zoo.MODELS.values() if spec.in_timm]

# Parameters, and multiply-adds in millions at the row's input size (None: counted nowhere but here).
FIGURES = {
    'sknet26': (16_746_408, 2590),
    'sknet50': (27_479_784, 4460),
    'sknet101': (48_736_040, 8450),
    'skresnext101_32x4d': (48_736_040, 8450),
    'shufflenetv2_x0_5': (1_366_792, 40.5),
    'shufflenetv2_x1_0': (2_278_604, 144.9),
    'shufflenetv2_x1_5': (3_503_624, None),
    'shufflenetv2_x2_0': (7_393_996, None),
    'skshufflenetv2_x0_5': (1_366_792 + 75_304, None),
    'skshufflenetv2_x1_0': (2_278_604 + 180_806, None),
    'resnext29_16x32d': (25_229_220, None),
    # Google's without the classifier.
    'skresnet50x1_simclr': (35_215_584 + 1000 * 2049, None),
    'skresnet50x2_simclr': (140_306_048 + 1000 * 4097, None),
    'skresnet101x1_simclr': (64_662_304 + 1000 * 2049, None),
    'skresnet101x2_simclr': (257_132_224 + 1000 * 4097, None),
    'skresnet152x1_simclr': (88_940_896 + 1000 * 2049, None),
    'skresnet152x2_simclr': (353_398_528 + 1000 * 4097, None),
    'skresnet152x3_simclr': (794_704_160 + 1000 * 6145, None),
}


def count(model, size=224):
    """Parameters, and multiply-adds in millions for one image: half of the operations that torch counts."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, 3, size, size, device='meta'))
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() / 2e6


@functools.cache
def count_of(name):
    """Those of a row, at its input size."""
    return count(timm.create_model(name, device='meta'), zoo.MODELS[name].input_size[-1])


def test_zoo_and_timm_name_the_same_models():
    assert set(timm_models.__all__) == {spec.name for spec in OURS}
    assert len(timm_models.__all__) == len(OURS) == 28
    for spec in OURS:
        assert timm.is_model(spec.name)
        assert timm.model_entrypoint(spec.name).__module__ == 'sk_plugins.timm_models'
        assert timm.model_entrypoint(spec.name) is getattr(timm_models, spec.name)


def test_names_that_timm_keeps():
    assert [spec.name for spec in TIMMS] == ['skresnet18', 'skresnet34', 'skresnet50', 'skresnet50d']
    for spec in TIMMS:
        assert timm.model_entrypoint(spec.name).__module__.startswith('timm.')
        assert not hasattr(timm_models, spec.name)


@each_row
def test_row(spec):
    assert zoo.MODELS[spec.name] is spec
    assert zoo.find(spec.openmmlab[0], **spec.openmmlab[1]) is spec, 'two rows have one OpenMMLab name'
    if spec.network is SKResNet:
        # A unit's convolutions stand one after the other; the stem and the classifier make two more layers.
        per_unit = 2 if spec.args.get('block') == 'basic' else 3
        depth = per_unit * sum(spec.args['layers']) + 2
        assert re.search(r'ne(?:t|xt)(\d+)', spec.name)[1] == str(depth)
        if groups := re.search(r'_(\d+)x(\d+)d$', spec.name):
            shape = (spec.args.get('cardinality', 32), spec.args.get('base_width', 4))
            assert shape == tuple(map(int, groups.groups()))
    elif spec.network is SKResNetSimCLR:
        depth, width = map(int, re.fullmatch(r'skresnet(\d+)x(\d)_simclr', spec.name).groups())
        assert 3 * sum(spec.args['layers']) + 2 == depth
        assert spec.args['width_factor'] == width
        assert spec.openmmlab[1] == dict(depth=depth, width_factor=width)
    else:
        assert spec.network is SKShuffleNetV2
        unit, factor = re.fullmatch(r'(|se|sk)shufflenetv2_x(\d_\d)', spec.name).groups()
        assert spec.args['unit'] == (unit or 'plain')
        assert spec.openmmlab[1] == dict(widen_factor=float(factor.replace('_', '.')), unit=unit or 'plain')
    for weights in spec.weights:
        assert (weights.hf_hub_id is None) != (weights.url is None)
        assert weights.hf_hub_id is None or weights.hf_hub_id.count('/') == 1
        assert weights.file is None or weights.hf_hub_id
        assert weights.hf_hub_id is None or zoo.weight_file(weights.hf_hub_id) == weights.file
        assert '.' not in weights.tag
        assert 0 < weights.top1 < 100
        assert weights.license
        assert weights.recipe
        assert weights.origin_url.startswith('https://github.com/')


def test_find():
    assert zoo.find('SKNet', depth=50) is zoo.MODELS['sknet50']
    assert zoo.find('SKNet', depth=29, unit='se') is zoo.MODELS['seresnext29_16x32d']
    assert zoo.find('SKShuffleNetV2', widen_factor=1.5, unit='sk') is zoo.MODELS['skshufflenetv2_x1_5']
    assert zoo.find('SKResNetSimCLR', depth=152, width_factor=3) is zoo.MODELS['skresnet152x3_simclr']
    assert zoo.find_simclr((3, 4, 23, 3), 2) is zoo.MODELS['skresnet101x2_simclr']
    assert zoo.find_simclr((3, 4, 23, 3), 3) is None
    assert zoo.find('SKResNet', depth='50d') is zoo.MODELS['skresnet50d']
    assert zoo.find('SKNet', depth=51) is None
    assert zoo.find('SKNet', depth=50, in_channels=1) is None
    assert zoo.find('ResNet', depth=50) is None


def test_arguments_are_merged():
    spec = zoo.MODELS['sknet29_16x32d']
    own = dict(kernel_sizes=(1, 3), reduction=32)
    assert spec.arguments()['sk_kwargs'] == own
    assert spec.arguments(sk_kwargs=dict(reduction=16))['sk_kwargs'] == dict(kernel_sizes=(1, 3), reduction=16)
    assert spec.arguments(sk_kwargs=None)['sk_kwargs'] is None
    assert spec.arguments(layers=(1, 1, 1))['layers'] == (1, 1, 1)
    assert spec.args['sk_kwargs'] == own, 'the row itself changed'
    assert spec.args['layers'] == (3, 3, 3)
    assert spec.build(device='meta').fc.weight.shape == (100, 1024)
    assert spec.build(device='meta', num_classes=10, in_chans=1).conv1.weight.shape == (64, 1, 3, 3)


@pytest.mark.parametrize('name', one_of_each(spec.name for spec in OURS))
def test_registered_model_is_the_row(name):
    spec = zoo.MODELS[name]
    model = timm.create_model(spec.name, device='meta')
    assert type(model) is spec.network
    expected = spec.build(device='meta')
    assert list(model.state_dict()) == list(expected.state_dict())
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in expected.state_dict().items()}
    assert model.default_cfg['input_size'] == spec.input_size
    assert model.default_cfg['num_classes'] == spec.num_classes == model.num_classes


@pytest.mark.parametrize('spec', TIMMS, ids=lambda spec: spec.name)
@torch.no_grad()
def test_timms_model_is_the_row(spec):
    reference = randomise(timm.create_model(spec.name))
    model = spec.build().eval()
    assert list(model.state_dict()) == list(reference.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in reference.named_parameters()]
    model.load_state_dict(reference.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    output, expected = model(x), reference(x)
    assert expected.std() > 0.01
    assert_close(output, expected, length=reference)
    for feature, wanted in zip(model.forward_intermediates(x)[1], reference.forward_intermediates(x)[1]):
        assert_close(feature, wanted, length=reference)
    assert [info['num_chs'] for info in model.feature_info] == [info['num_chs'] for info in reference.feature_info]
    cfg = reference.default_cfg
    assert [weights.hf_hub_id for weights in spec.weights] == ([cfg['hf_hub_id']] if spec.weights else [])


@pytest.mark.parametrize('name', FIGURES)
def test_parameters(name):
    model = timm.create_model(name, device='meta')
    assert sum(parameter.numel() for parameter in model.parameters()) == FIGURES[name][0]


# tests/tools/test_model_table.py has the others'.
@pytest.mark.parametrize(
    'name', quick([name for name in FIGURES if FIGURES[name][1]], ['sknet50', 'shufflenetv2_x1_0'])
)
def test_figures(name):
    assert count_of(name) == (FIGURES[name][0], pytest.approx(FIGURES[name][1], rel=0.01))


def test_figures_of_sknet29():
    # The paper prints 27.7M and, as far as known here, no kernels.
    assert round(count_of('sknet29_16x32d')[0] / 1e6, 1) == 27.9
    with_5x5 = timm.create_model('sknet29_16x32d', device='meta', sk_kwargs=dict(kernel_sizes=(3, 5)))
    assert round(sum(parameter.numel() for parameter in with_5x5.parameters()) / 1e6, 1) == 36.2


@pytest.mark.parametrize('factor', quick(['0_5', '1_0', '1_5', '2_0'], ['0_5']))
def test_se_and_sk_cost_shufflenet_next_to_no_operations(factor):
    plain, se, sk = (count_of(f'{unit}shufflenetv2_x{factor}')[1] for unit in ('', 'se', 'sk'))
    assert plain < se < 1.005 * plain
    assert se < sk < 1.04 * plain


# The error figures need ImageNet; what can be counted is, and neither of these deviates by more than 1 %.
@pytest.mark.parametrize('name', quick(['sknet50', 'sknet101', 'skresnext101_32x4d'], ['sknet50']))
def test_papers_figures(name):
    paper = zoo.MODELS[name].paper
    parameters, macs = count_of(name)
    assert paper.parameters_m == pytest.approx(parameters / 1e6, rel=0.01)
    assert paper.gflops == pytest.approx(macs / 1e3, rel=0.01)
    assert paper.errors['320'] < paper.errors['224']


def test_which_rows_have_figures_and_weights():
    errors = {spec.name: dict(spec.paper.errors) for spec in zoo.MODELS.values() if spec.paper and spec.paper.errors}
    assert errors == {
        'sknet50': {'224': 20.79, '320': 19.32},
        'sknet101': {'224': 20.19, '320': 18.40},
        'skresnext101_32x4d': {'224': 20.19, '320': 18.40},
        'shufflenetv2_x0_5': {'224': 38.41},
        'seshufflenetv2_x0_5': {'224': 36.34},
        'skshufflenetv2_x0_5': {'224': 35.35},
        'shufflenetv2_x1_0': {'224': 30.57},
        'seshufflenetv2_x1_0': {'224': 29.47},
        'skshufflenetv2_x1_0': {'224': 28.36},
        'sknet29_16x32d': {'CIFAR-10': 3.47, 'CIFAR-100': 17.33},
    }
    # The paper has no SKNet-26.
    assert zoo.MODELS['sknet26'].paper is None
    assert {row.weights[0].top1 for row in SIMCLRS} == {74.6, 77.7, 76.3, 79.0, 77.2, 79.4, 79.8}
    assert set(zoo.with_weights()) - {f'{row.name}.goog_in1k' for row in SIMCLRS} == {
        'sknet50.ra_in1k',
        'shufflenetv2_x0_5.tv_in1k',
        'shufflenetv2_x1_0.tv_in1k',
        'shufflenetv2_x1_5.tv_in1k',
        'shufflenetv2_x2_0.tv_in1k',
    }
    names = ['sknet*', 'skresnext101*', '*shufflenetv2*', '*29_16x*', '*_simclr']
    assert set(zoo.with_weights()) == set(timm.list_pretrained(names))
    assert zoo.MODELS['skresnet101x2_simclr'].weights[0].hf_hub_id == 'lightly-ai/simclrv2-imagenet1k-r101_2x_sk1'
    assert zoo.MODELS['skresnet101x2_simclr'].weights[0].file == 'r101_2x_sk1.pth'
    assert zoo.MODELS['sknet50'].weights[0].hf_hub_id == 'timm/skresnext50_32x4d.ra_in1k'
    assert zoo.MODELS['skresnet18'].weights[0].top1 == 73.02
    assert zoo.MODELS['skresnet34'].weights[0].top1 == 76.96
