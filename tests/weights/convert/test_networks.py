"""Networks of other projects: equal outputs in ours, and that an error would show."""

import re

import pytest
import timm
import torch
from helpers.third_party_networks import SKNet, insight_net, lucid_net
from helpers.third_party_weights import CHANNELS, NARROW, TRUE, make_input, randomise
from helpers.tolerances import assert_close

import sk_plugins  # noqa: F401 - registers the models
from sk_plugins.networks import SKResNet
from sk_plugins.weights import convert, load_third_party, recognise_third_party

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
    found = recognise_third_party(network.state_dict())
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
    model = load_third_party(network.state_dict())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    x = make_input(arguments.get('in_chans', 3), dtype=torch.float32)
    assert_close(model(x), network(x), length=model)


def test_padding_is_zeros_and_the_identity():
    torch.manual_seed(0)
    network = randomise(SKNet(**{**NARROW, 'outputs': (16, 64, 128, 192), 'dims': (8, 4, 8, 8)}))
    model = load_third_party(network.state_dict())
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
    found = recognise_third_party(network.state_dict())
    assert (found.arguments['cardinality'], found.arguments['base_width']) == (1, 64)
    assert found.arguments['sk_kwargs']['groups'] == 24
    assert_close(found.build()(make_input()), network(make_input()), length=network)


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
    assert (load_third_party(weights, **options)(x) - network(x)).abs().max() > 1e-3


def test_full_size_sknet50():
    """syt2's SKNet-50: the arguments are the registered model's, and what it has more are the selections' biases."""
    torch.manual_seed(0)
    shape = dict(widths=(128, 256, 512, 1024), outputs=(256, 512, 1024, 2048), dims=(32, 32, 32, 64))
    network = SKNet(**shape, layers=(3, 4, 6, 3), classes=1000, groups=32, sk='conv2')
    network = randomise(network, torch.float32)
    found = recognise_third_party(network.state_dict())
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
