"""Weights of other projects: equal outputs in our networks, and what is refused."""

import re

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from helpers import foreign_networks
from helpers.foreign_networks import LucidKernel, SKConv, SKNet, insight_net, lucid_net
from helpers.tolerances import assert_close
from torch import nn

import sk_plugins  # noqa: F401 - registers the models
from sk_plugins.layers import SelectiveKernel
from sk_plugins.networks import SKResNet
from sk_plugins.weights import CheckpointError, convert, load_foreign, recognise_foreign

NARROW = dict(widths=(16, 32, 64, 96), outputs=(32, 64, 128, 192), dims=(8, 8, 8, 8))
TRUE = dict(kernels=(3, 5), dilations=(1, 1))
CHANNELS = dict(channels=(8, 16, 32, 48), cardinality=4, base_width=32, num_classes=7)


def randomise(model, dtype=torch.float64):
    """Statistics, biases and attention that are far from what they are after initialisation."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator) * 0.3
            if name.endswith('running_var'):
                tensor.copy_(noise.abs() + 0.5)
            elif tensor.ndim < 2:
                # Only a norm's scale is a vector named weight.
                tensor.copy_(noise + name.endswith('weight'))
            elif re.search(r'\.fcs\.|conv_fc2|attention\.4', name):
                tensor.copy_(noise * 5)
    return model.eval().to(dtype)


def make_input(channels=3, size=40, dtype=torch.float64):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


# The networks: {name: (how to make it, the arguments it is recognised by, what its notes say)}.
SK_KWARGS = dict(min_dim=8, select_bias=True)
NETWORKS = {
    'developer0hye': (
        lambda: SKNet(**NARROW),
        dict(layers=(2, 1, 1, 1), **CHANNELS, sk_kwargs=SK_KWARGS),
        [],
    ),
    'developer0hye with a narrow first stage': (
        lambda: SKNet(**{**NARROW, 'outputs': (16, 64, 128, 192)}),
        dict(layers=(2, 1, 1, 1), **CHANNELS, sk_kwargs=SK_KWARGS),
        ['stage 1: outputs padded from 16 to 32 channels'],
    ),
    'syt2': (
        lambda: SKNet(**NARROW, sk='conv2', layers=(1, 1, 2, 1)),
        dict(layers=(1, 1, 2, 1), **CHANNELS, sk_kwargs=SK_KWARGS),
        [],
    ),
    'd off Eq. 4': (
        lambda: SKNet(**{**NARROW, 'dims': (8, 4, 8, 8)}),
        dict(layers=(2, 1, 1, 1), **CHANNELS, sk_kwargs=SK_KWARGS),
        ['stage 2: z padded from 4 to 8 channels'],
    ),
    'tutorial: bare convolutions with biases, true kernels, linear layers': (
        lambda: SKNet(
            **NARROW, **TRUE, bare=True, bias=True, conv_bias=True, nested=True, named=True, reduce='linear',
            select='linear',
        ),
        dict(
            layers=(2, 1, 1, 1),
            **CHANNELS,
            sk_kwargs=dict(**SK_KWARGS, dilated=False, reduce_norm=False, reduce_act=False),
        ),
        ['25 biases of convolutions are folded into the BatchNorms after them'],
    ),
    'tutorial: a ReLU after the linear layer, three branches': (
        lambda: SKNet(**NARROW, kernels=(1, 3, 5), dilations=(1, 1, 1), reduce='relu'),
        dict(
            layers=(2, 1, 1, 1),
            **CHANNELS,
            sk_kwargs=dict(**SK_KWARGS, kernel_sizes=(1, 3, 5), dilated=False, reduce_norm=False),
        ),
        [],
    ),
    'three dilated branches, grey images': (
        lambda: SKNet(**NARROW, kernels=(3, 3, 3), dilations=(1, 2, 3), in_chans=1),
        dict(
            layers=(2, 1, 1, 1), **CHANNELS, in_chans=1, sk_kwargs=dict(**SK_KWARGS, kernel_sizes=(3, 5, 7))
        ),
        [],
    ),
    'PytorchInsight': (
        insight_net,
        dict(
            layers=(1, 2, 1, 1),
            channels=(32, 64, 64, 96),
            cardinality=1,
            base_width=64,
            num_classes=7,
            sk_kwargs=dict(branches=((3, 1, 1), (3, 1, 32)), min_dim=1),
        ),
        [],
    ),
    'lucid sk_resnet_50': (
        lucid_net,
        dict(
            layers=(1, 2, 1, 1),
            channels=(16, 32, 48, 64),
            cardinality=1,
            base_width=64,
            num_classes=7,
            sk_kwargs=dict(dilated=False, min_dim=1, select='shared', norm_position='output'),
        ),
        [],
    ),
    'lucid sk_resnet_18': (
        lambda: lucid_net(expansion=1, stem='stem.0'),
        dict(
            layers=(1, 2, 1, 1),
            block=convert.SKUnexpandedBottleneck,
            channels=(16, 32, 48, 64),
            cardinality=1,
            base_width=64,
            num_classes=7,
            sk_kwargs=dict(dilated=False, min_dim=1, select='shared', norm_position='output'),
        ),
        [],
    ),
    'lucid sk_resnext_50_32x4d': (
        lambda: lucid_net(widths=(16, 32, 64, 96), planes=(8, 16, 32, 48), groups=4),
        dict(
            layers=(1, 2, 1, 1),
            **CHANNELS,
            sk_kwargs=dict(dilated=False, min_dim=1, select='shared', norm_position='output'),
        ),
        [],
    ),
}  # fmt: skip


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS.keys())
def case(request):
    torch.manual_seed(0)
    make, arguments, notes = request.param
    return randomise(make()), arguments, notes


def test_networks(case):
    network, arguments, notes = case
    found = recognise_foreign(network.state_dict())
    assert found.arguments == arguments
    assert list(found.notes) == notes
    model = found.build()
    assert type(model) is SKResNet
    assert not model.training
    x = make_input(arguments.get('in_chans', 3))
    expected = network(x)
    assert expected.std() > 0.05
    assert_close(model(x), expected, length=model)


def test_single_precision(case):
    network, arguments, _ = case
    network.float()
    model = load_foreign(network.state_dict())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    x = make_input(arguments.get('in_chans', 3), dtype=torch.float32)
    assert_close(model(x), network(x), length=model)


def test_padding_is_zeros_and_the_identity():
    torch.manual_seed(0)
    network = randomise(SKNet(**{**NARROW, 'outputs': (16, 64, 128, 192), 'dims': (8, 4, 8, 8)}))
    model = load_foreign(network.state_dict())
    unit, reader = model.layer1[0], model.layer2[0]
    assert not unit.conv3.conv.weight[16:].any()
    assert not unit.downsample[0].weight[16:].any()
    assert not reader.conv1.conv.weight[:, 16:].any()
    assert not reader.downsample[0].weight[:, 16:].any()
    attention = reader.conv2.attn
    assert not attention.fc_reduce.weight[4:].any()
    assert not attention.fc_select.weight[:, 4:].any()
    for norm, size in ((unit.conv3.bn, 16), (unit.downsample[1], 16), (attention.bn, 4)):
        filled = [tensor[size:].unique().tolist() for name, tensor in norm.state_dict().items() if tensor.ndim]
        assert filled == [[1], [0], [0], [1]], 'weight, bias, running_mean, running_var'


def test_groups_that_do_not_divide_the_base_width():
    """A base width is one for all stages; 64 channels for 64 planes are not 24 groups of as many."""
    torch.manual_seed(0)
    shape = dict(widths=(24, 48, 72, 96), outputs=(96, 192, 288, 384), dims=(8, 8, 8, 8))
    network = randomise(SKNet(**shape, groups=24))
    found = recognise_foreign(network.state_dict())
    assert (found.arguments['cardinality'], found.arguments['base_width']) == (1, 64)
    assert found.arguments['sk_kwargs']['groups'] == 24
    assert_close(found.build()(make_input()), network(make_input()), length=network)


# A conversion that errs in one thing is far from equal: these tests would see it.


def swap(state_dict, first, second):
    names = [name for name in state_dict if re.search(first, name)]
    assert names
    for name in names:
        other = re.sub(first, second, name)
        state_dict[name], state_dict[other] = state_dict[other], state_dict[name]


def roll(state_dict, end):
    for name in [name for name in state_dict if name.endswith(end)]:
        state_dict[name] = state_dict[name].roll(len(state_dict[name]) // 2, 0)


@pytest.mark.parametrize(
    ('make', 'err', 'options'),
    [
        (lambda: SKNet(**NARROW), lambda w: swap(w, r'fcs\.0', 'fcs.1'), {}),
        (lambda: SKNet(**NARROW), lambda w: swap(w, r'convs\.0\.1\.running_mean', 'convs.1.1.running_mean'), {}),
        (lambda: SKNet(**NARROW), lambda w: None, dict(dilations=(1, 1))),
        (lambda: SKNet(**NARROW), lambda w: None, dict(reduce_act=False)),
        (lambda: SKNet(**NARROW, **TRUE, reduce='linear'), lambda w: None, dict(reduce_act=True)),
        (insight_net, lambda w: roll(w, 'conv_fc2.weight'), {}),
        (lucid_net, lambda w: roll(w, 'attention.4.weight'), {}),
        (lucid_net, lambda w: None, dict(dilations=(2, 1))),
    ],
)
def test_an_error_would_show(make, err, options):
    torch.manual_seed(0)
    network = randomise(make())
    weights = network.state_dict()
    err(weights)
    x = make_input()
    assert (load_foreign(weights, **options)(x) - network(x)).abs().max() > 1e-3


def test_full_size_sknet50():
    """syt2's SKNet-50: the arguments are the registered model's, and what it has more are the selections' biases."""
    torch.manual_seed(0)
    shape = dict(widths=(128, 256, 512, 1024), outputs=(256, 512, 1024, 2048), dims=(32, 32, 32, 64))
    network = SKNet(**shape, layers=(3, 4, 6, 3), classes=1000, groups=32, sk='conv2')
    network = randomise(network, torch.float32)
    found = recognise_foreign(network.state_dict())
    assert found.arguments == dict(layers=(3, 4, 6, 3), sk_kwargs=dict(select_bias=True), num_classes=1000)
    assert found.timm_model() == ('sknet50', dict(sk_kwargs=dict(select_bias=True), num_classes=1000))
    assert found.openmmlab_backbone() == dict(type='SKNet', depth=50, sk_kwargs=dict(select_bias=True))
    model = found.build()
    assert sum(p.numel() for p in model.parameters()) == 27_479_784 + 2 * (3 * 128 + 4 * 256 + 6 * 512 + 3 * 1024)
    x = make_input(size=32, dtype=torch.float32)
    expected = network(x)
    assert_close(model(x), expected, length=model)


@pytest.mark.parametrize(
    ('make', 'arguments', 'name'),
    [
        (
            lambda: SKNet(
                (128, 256, 512, 1024), (128, 512, 1024, 2048), (32, 32, 32, 64), layers=(3, 4, 23, 3), groups=32,
                classes=1000,
            ),
            dict(layers=(3, 4, 23, 3), sk_kwargs=dict(select_bias=True)),
            'sknet101',
        ),
        (
            lambda: insight_net((64, 128, 256, 512), layers=(3, 4, 6, 3), classes=1000),
            dict(
                layers=(3, 4, 6, 3),
                cardinality=1,
                base_width=64,
                sk_kwargs=dict(branches=((3, 1, 1), (3, 1, 32)), min_dim=1),
            ),
            'sknet50',
        ),
        (
            lambda: insight_net((64, 128, 256, 512), layers=(3, 8, 36, 3), classes=1000),
            dict(
                layers=(3, 8, 36, 3),
                cardinality=1,
                base_width=64,
                sk_kwargs=dict(branches=((3, 1, 1), (3, 1, 32)), min_dim=1),
            ),
            None,
        ),
        (
            lambda: lucid_net(
                (128, 256, 512, 1024), planes=(64, 128, 256, 512), groups=32, layers=(3, 4, 6, 3), classes=1000
            ),
            dict(
                layers=(3, 4, 6, 3),
                sk_kwargs=dict(dilated=False, min_dim=1, select='shared', norm_position='output'),
            ),
            'sknet50',
        ),
        (
            lambda: lucid_net((64, 128, 256, 512), layers=(2, 2, 2, 2), expansion=1, classes=1000),
            dict(
                layers=(2, 2, 2, 2),
                block=convert.SKUnexpandedBottleneck,
                cardinality=1,
                base_width=64,
                sk_kwargs=dict(dilated=False, min_dim=1, select='shared', norm_position='output'),
            ),
            None,
        ),
    ],
    ids=['developer0hye SKNet101', 'sk_resnet50', 'sk_resnet152', 'sk_resnext_50_32x4d', 'sk_resnet_18'],
)  # fmt: skip
def test_published_sizes(make, arguments, name):
    with torch.device('meta'):
        found = convert.recognise(make().state_dict())
    assert found.arguments == dict(**arguments, num_classes=1000)
    if name is None:
        with pytest.raises(ValueError, match='no registered model has'):
            found.timm_model()
        return
    got, model_args = found.timm_model()
    assert got == name
    model = timm.create_model(name, **model_args, device='meta')
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in found.state_dict.items()}


# A layer on its own.

LAYERS = {
    'conv': (dict(), dict(groups=4, min_dim=8, select_bias=True)),
    'pppLang': (
        dict(**TRUE, conv_bias=True, reduce='linear', select='linear'),
        dict(groups=4, min_dim=8, select_bias=True, dilated=False, reduce_norm=False, reduce_act=False),
    ),
    'SKAttention': (
        dict(
            kernels=(1, 3, 5, 7), dilations=(1, 1, 1, 1), groups=1, named=True, conv_bias=True, reduce='linear',
            select='linear',
        ),
        dict(
            groups=1, min_dim=8, kernel_sizes=(1, 3, 5, 7), dilated=False, select_bias=True, reduce_norm=False,
            reduce_act=False,
        ),
    ),
    '32 groups': (dict(groups=16), dict(groups=16, min_dim=8, select_bias=True)),
}  # fmt: skip


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize(('kwargs', 'arguments'), LAYERS.values(), ids=LAYERS.keys())
def test_layers(kwargs, arguments, stride):
    torch.manual_seed(0)
    layer = randomise(SKConv(16, 8, stride=stride, **kwargs))
    found = recognise_foreign(layer.state_dict(), stride=stride)
    assert found.arguments == dict(in_channels=16, **arguments, **({'stride': 2} if stride == 2 else {}))
    model = found.build()
    assert type(model) is SelectiveKernel
    x = make_input(16, size=9)
    assert_close(model(x), layer(x), length=layer)


@pytest.mark.parametrize(('stride', 'groups'), [(1, 1), (2, 4)])
def test_lucids_layer(stride, groups):
    layer = randomise(LucidKernel(64, stride, groups))
    found = recognise_foreign(layer.state_dict(), stride=stride)
    assert found.origin == "lucid's SelectiveKernel layer"
    model = found.build()
    assert isinstance(model, SelectiveKernel)
    x = make_input(64, size=9)
    assert_close(model(x), layer(x), length=model)


@pytest.mark.parametrize(('reduce', 'reduce_act'), [('relu', False), ('linear', True), ('norm', False)])
def test_reduce_act_is_taken_as_told(reduce, reduce_act):
    torch.manual_seed(0)
    layer = randomise(SKConv(16, 8, **TRUE, reduce=reduce))
    x = make_input(16, size=9)
    told = load_foreign(layer.state_dict(), reduce_act=reduce_act)
    assert (told(x) - layer(x)).abs().max() > 1e-3
    if reduce == 'linear':
        layer.fc.register_forward_hook(lambda module, args, output: output.relu())
    else:
        layer.fc[-1] = nn.Identity()
    assert_close(told(x), layer(x), length=layer)


@pytest.mark.parametrize('dilations', [(1, 1), (1, 3)])
def test_dilations_are_taken_as_told(dilations):
    torch.manual_seed(0)
    layer = randomise(SKConv(16, 8, kernels=(3, 3), dilations=dilations))
    x = make_input(16, size=9)
    told = load_foreign(layer.state_dict(), dilations=dilations)
    assert_close(told(x), layer(x), length=layer)


def test_layer_with_other_input_channels():
    """No lineage has such a layer; its weights are ours, under theirs names."""
    torch.manual_seed(0)
    layer = randomise(SelectiveKernel(8, 16, groups=4, select_bias=True))
    weights = {}
    for name, tensor in layer.state_dict().items():
        name = re.sub(r'paths\.(\d)\.', r'convs.\1.', name)
        name = name.replace('attn.fc_reduce', 'fc.0').replace('attn.bn', 'fc.1')
        for m, part in enumerate(tensor.chunk(2)) if 'fc_select' in name else [(0, tensor)]:
            weights[name.replace('attn.fc_select', f'fcs.{m}')] = part
    x = make_input(8, size=9)
    assert_close(load_foreign(weights, in_channels=8)(x), layer(x), length=layer)
    with pytest.raises(CheckpointError, match='branch 0 has groups of 2 input channels, which do not divide in_chan'):
        load_foreign(weights, in_channels=9)


class PppLangUnit(nn.Module):
    """Its ``feas``: no ReLU after the first 1x1, and a BatchNorm after the SK convolution."""

    def __init__(self):
        super().__init__()
        layer = SKConv(16, 8, **TRUE, conv_bias=True, reduce='linear', select='linear')
        self.feas = nn.Sequential(
            nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), layer, nn.BatchNorm2d(16), nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32)
        )


def test_layers_of_a_network_that_does_not_fit():
    torch.manual_seed(0)
    network = randomise(nn.ModuleDict({'stage_1': nn.Sequential(PppLangUnit(), nn.ReLU(), PppLangUnit())}))
    weights = network.state_dict()
    with pytest.raises(CheckpointError, match=r"pppLang.*no ReLU after the first 1x1.*prefix='stage_1\.0\.feas\.2'"):
        load_foreign(weights)
    x = make_input(16, size=9)
    for unit in (0, 2):
        layer = load_foreign(weights, prefix=f'stage_1.{unit}.feas.2')
        assert_close(layer(x), network['stage_1'][unit].feas[2](x), length=layer)


# Where weights come from.


@pytest.mark.parametrize('wrap', [dict, lambda w: {'state_dict': w}, lambda w: {'model': w, 'epoch': 3}])
@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_containers(tmp_path, wrap, prefix):
    network = randomise(SKNet(**NARROW))
    weights = wrap({prefix + name: tensor for name, tensor in network.state_dict().items()})
    torch.save(weights, tmp_path / 'sknet.pth')
    expected = network(make_input())
    for source in (weights, tmp_path / 'sknet.pth', str(tmp_path / 'sknet.pth')):
        assert_close(load_foreign(source)(make_input()), expected, length=network)


def test_safetensors(tmp_path):
    network = randomise(insight_net())
    safetensors.torch.save_file(network.state_dict(), tmp_path / 'sk_resnet50.safetensors')
    model = load_foreign(tmp_path / 'sk_resnet50.safetensors')
    assert_close(model(make_input()), network(make_input()), length=model)


def test_source_is_left_alone():
    network = randomise(SKNet(**NARROW, **TRUE, conv_bias=True, reduce='linear'))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = recognise_foreign(network.state_dict())
    model, second = found.build(), found.build()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    assert_close(second(make_input()), network(make_input()), length=model)
    assert [name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])] == []


def test_what_profilers_and_old_torch_leave():
    """thop's counters are no weights, and BatchNorms of old checkpoints don't count their batches."""
    network = randomise(SKNet(**NARROW))
    weights = {k: v for k, v in network.state_dict().items() if not k.endswith('num_batches_tracked')}
    weights |= {'total_ops': torch.zeros(1), 'stage_1.0.conv1.0.total_params': torch.zeros(1)}
    model = load_foreign(weights)
    assert_close(model(make_input()), network(make_input()), length=model)


def test_headless_network():
    network = randomise(SKNet(**NARROW))
    weights = {k: v for k, v in network.state_dict().items() if not k.startswith('classifier')}
    model = load_foreign(weights)
    assert model.num_classes == 0
    network.classifier = nn.Identity()
    assert_close(model(make_input()), network(make_input()), length=model)


def test_trains_after_loading():
    model = load_foreign(randomise(SKNet(**{**NARROW, 'outputs': (16, 64, 128, 192)})).state_dict()).train()
    model(make_input()).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# What is refused.


def tensors(*names):
    return {name: torch.zeros(1) for name in names}


def meta_state_dict(make):
    with torch.device('meta'):
        return make().state_dict()


@pytest.mark.parametrize(
    ('make', 'said'),
    [
        (lambda: {}, 'holds no state dict of tensors'),
        (lambda: {'state_dict': 3}, 'holds no state dict of tensors'),
        (
            lambda: meta_state_dict(lambda: timm.create_model('sknet26')),
            r'looks like this project.s own, or timm.s: load_checkpoint.*Supported are PyTorch',
        ),
        (
            lambda: {f'backbone.{k}': v for k, v in tensors('layer1.0.conv2.paths.0.conv.weight').items()},
            'looks like an mmpretrain checkpoint of this project',
        ),
        (
            lambda: meta_state_dict(lambda: timm.create_model('skresnet18')),
            r'looks like this project.s own, or timm.s: load_checkpoint',
        ),
        (lambda: meta_state_dict(torchvision.models.resnet18), 'a ResNet of torchvision.s or timm.s, without SK'),
        (lambda: meta_state_dict(torchvision.models.resnet50), 'a ResNet of torchvision.s or timm.s, without SK'),
        (
            lambda: meta_state_dict(lambda: nn.ModuleDict({'neck': nn.Sequential(SKConv(16, 8), SKConv(16, 8))})),
            r"a network with SKConv layers, which load one by one with prefix= \('neck\.0', 'neck\.1'\)",
        ),
        (
            lambda: tensors('stem.weight', 'a.weight', 'b.weight', 'c.weight'),
            r'looks like nothing known: 4 tensors \(stem\.weight, a\.weight, b\.weight and 1 more\)\. Supported are',
        ),
    ],
)  # fmt: skip
def test_unrecognised(make, said):
    with pytest.raises(CheckpointError, match=said):
        load_foreign(make())


def drop(*names):
    return lambda weights: [weights.pop(name) for name in names]


def resize(name, *shape):
    return lambda weights: weights.update({name: torch.zeros(*shape)})


@pytest.mark.parametrize(
    ('make', 'spoil', 'said'),
    [
        (
            lambda: SKNet(**NARROW),
            drop('stage_2.0.conv3.1.running_var', 'stage_4.0.conv2_sk.fcs.1.bias', 'stage_1.1.conv1.0.weight'),
            r'but stage_4\.0\.conv2_sk\.fcs\.1\.bias is missing; what is layer1\.1\.conv1\.conv\.weight here is missing'
            r'; stage_2\.0\.conv3\.1\.running_var is missing and 1 more$',
        ),
        (
            lambda: SKNet(**NARROW),
            drop(*(f'stage_3.0.conv2_sk.convs.0.1.{p}' for p in ('weight', 'bias', 'running_mean', 'running_var'))),
            r'but stage_3\.0\.conv2_sk\.convs\.0\.1\.weight is missing; .* and 1 more$',
        ),
        (lambda: SKNet(**NARROW), drop('classifier.weight'), r'but what is fc\.weight here is missing$'),
        (
            lambda: nn.ModuleDict({'stage_1': nn.Sequential(nn.ModuleDict({'conv2': SKConv(16, 8)}))}),
            lambda weights: [weights.pop(name) for name in list(weights) if not name.endswith('convs.0.0.weight')],
            r'but what is layer1\.\*\.conv1\.conv\.weight here is missing$',
        ),
        (
            lambda: SKNet(**NARROW),
            lambda weights: [weights.pop(name) for name in list(weights) if name.startswith('stage_2')],
            r'developer0hye, syt2\), but nothing of its stage 2 is',
        ),
        (
            lambda: SKNet(**NARROW),
            resize('stage_1.0.se.weight', 3),
            r'developer0hye, syt2\), but stage_1\.0\.se\.weight is not part of it$',
        ),
        (
            lambda: SKNet(**NARROW),
            resize('stage_2.0.conv1.0.weight', 32, 33, 1, 1),
            r'but stage_2\.0\.conv1\.0\.weight is \(32, 33, 1, 1\), not \(32, 32, 1, 1\)$',
        ),
        (
            lambda: SKNet(**NARROW),
            resize('stage_1.1.conv2_sk.convs.1.0.weight', 16, 4, 5, 5),
            r'stage_1\.1\.conv2_sk\.convs\.1\.0\.weight is \(16, 4, 5, 5\), not \(16, 4, 3, 3\)',
        ),
        (
            lambda: SKNet(**{**NARROW, 'widths': (24, 64, 128, 192)}),
            lambda weights: None,
            r'widths \[24, 64, 128, 192\] with outputs \[32, 64, 128, 192\] are no multiples of common planes',
        ),
        (
            insight_net,
            drop('layer2.1.conv2g.weight', 'layer2.1.bn2g.weight'),
            r'PytorchInsight.s sk_resnet, but what .* is missing; layer2\.1\.bn2g\.weight is missing$',
        ),
        (
            lambda: lucid_net(stem='stem.0'),
            resize('stem.3.weight', 32, 32, 3, 3),
            r'lucid.s SKNet, but stem\.3\.weight is not part of it$',
        ),
        (
            lambda: SKConv(16, 8),
            resize('convs.1.0.weight', 16, 4, 3),
            r'recognised as an SKConv layer, but .*convs\.1\.0\.weight has the shape \(16, 4, 3\)',
        ),
        (lambda: SKConv(16, 8), resize('fcs.1.weight', 3), r'but fcs\.0\.weight is .*fcs\.1\.weight is \(3,\)$'),
        (lambda: SKConv(16, 8), resize('fcs.1.weight', 16, 7, 1, 1), r'but fcs\.0\.weight is \(16, 8'),
        (lambda: SKConv(16, 8), lambda w: w.update({'fcs.0.weight': torch.zeros(())}), r'fcs\.0\.weight is \(\)'),
        (lambda: SKConv(16, 8), resize('convs.0.0.weight', 16, 0, 3, 3), r'convs\.0\.0\.weight is \(16, 0, 3, 3\)'),
        (lambda: SKConv(16, 8), drop('fc.0.weight'), r'but what is attn\.fc_reduce\.weight here is missing$'),
        (lambda: SKConv(16, 8, kernels=(3, 4)), lambda weights: None, r'kernel size 4: kernel sizes must be odd'),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(make, spoil, said, tmp_path):
    weights = make().state_dict()
    spoil(weights)
    torch.save(weights, tmp_path / 'spoilt.pth')
    with pytest.raises(CheckpointError, match=rf'spoilt\.pth: .*{said}'):
        load_foreign(tmp_path / 'spoilt.pth')


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        (dict(stride=2), 'stride=2 is for a layer on its own, and this is a network of SKConv'),
        (dict(in_channels=64), 'in_channels=64 is for a layer on its own'),
        (dict(dilations=(1, 2, 3)), r'dilations=\(1, 2, 3\) must be 2 integers of at least 1, one for each branch'),
        (dict(dilations=(1, 0)), r'dilations=\(1, 0\) must be 2 integers of at least 1'),
        (dict(prefix='stage_9'), r"prefix='stage_9': no tensor lies below it; the first are basic_conv\.0\.weight"),
    ],
)
def test_bad_options(options, said):
    weights = SKNet(**NARROW).state_dict()
    with pytest.raises(CheckpointError, match=said):
        load_foreign(weights, **options)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'none\.pth: no such checkpoint file'):
        load_foreign(tmp_path / 'none.pth')


def test_layer_has_no_name_in_a_registry():
    with pytest.raises(ValueError, match='a layer on its own has no name in a registry'):
        recognise_foreign(foreign_networks.SKConv(16, 8).state_dict()).timm_model()


@pytest.mark.parametrize(
    ('spoil', 'said'),
    [
        (lambda t: t.long(), r'of torch\.int64'),
        (lambda t: t.cfloat(), r'of torch\.complex64'),
        (lambda t: t.to_sparse(), 'sparse, quantised or nested'),
        (lambda t: t.to('meta'), 'without data'),
    ],
    ids=['integers', 'complex', 'sparse', 'meta'],
)
def test_tensors_that_are_no_weights(spoil, said):
    state_dict = dict(SKConv(8, 4, groups=2).state_dict())
    state_dict['convs.1.0.weight'] = spoil(state_dict['convs.1.0.weight'])
    with pytest.raises(ValueError, match=rf'recognised as an SKConv layer, but convs\.1\.0\.weight is {said}'):
        load_foreign(state_dict)
