"""Holocron's and MindCV's networks, and MindSpore's files."""

import struct

import pytest
import torch
from helpers.holocron_and_mindcv import HolocronKernel, MindCVNet, holocron_net
from helpers.protocol_buffers import field
from helpers.third_party_weights import make_input, randomise
from helpers.tolerances import assert_close
from torch import nn

from sk_plugins.weights import CheckpointError, load_checkpoint, load_third_party, recognise_third_party

CHANNELS = dict(channels=(16, 32, 48, 64), cardinality=1, base_width=64)
LAYERS = dict(layers=(1, 2, 1, 1))
HOLOCRON = dict(**LAYERS, **CHANNELS, sk_kwargs=dict(select_bias=True), num_classes=7)
SPLIT = dict(split_input=True, min_dim=8)
NETWORKS = {
    'Holocron': (holocron_net, HOLOCRON),
    'Holocron with groups': (
        lambda: holocron_net(groups=4),
        {**HOLOCRON, 'cardinality': 4, 'base_width': 16},
    ),
    'MindCV basic': (MindCVNet, dict(**LAYERS, block='basic', **CHANNELS, sk_kwargs=SPLIT, num_classes=7)),
    'MindCV bottleneck': (
        lambda: MindCVNet(basic=False),
        dict(**LAYERS, **CHANNELS, sk_kwargs=SPLIT, num_classes=7),
    ),
    'MindCV dense': (
        lambda: MindCVNet(basic=False, split=False),
        dict(**LAYERS, **CHANNELS, sk_kwargs=dict(min_dim=8), num_classes=7),
    ),
}


def weights_of(network):
    return network.mindspore_state_dict() if isinstance(network, MindCVNet) else network.state_dict()


def make(name):
    torch.manual_seed(0)
    network = randomise(NETWORKS[name][0]())
    with torch.no_grad():  # or the attention is nearly even
        for module in network.modules():
            if isinstance(module, HolocronKernel):
                module.sa[4].weight.mul_(5)
            if hasattr(module, 'fc_select'):
                module.fc_select.weight.mul_(5)
    return network


@pytest.mark.parametrize('size', [40, 45])
@pytest.mark.parametrize('name', NETWORKS)
def test_networks(name, size):
    """Stems of 20 and 23 pixels, which 'same' pads in different ways."""
    network = make(name)
    found = recognise_third_party(weights_of(network))
    assert found.arguments == NETWORKS[name][1]
    x = make_input(size=size)
    expected = network(x)
    assert expected.std() > 0.05
    assert_close(found.build()(x), expected, length=network)


@pytest.mark.parametrize('name', NETWORKS)
def test_they_can_be_trained(name):
    network = make(name)
    model = load_third_party(weights_of(network)).train()
    network.train()
    x = make_input(size=64)
    model(x).square().sum().backward()
    network(x).square().sum().backward()
    assert_close(model.conv1.weight.grad, next(network.parameters()).grad, length=network, gain=100)


def test_what_is_theirs_alone_would_show():
    """The sigmoid, the pooling, and the ReLU that is not there."""
    holocron, mindcv = make('Holocron'), make('MindCV dense')
    x = make_input(size=40)
    for network, changes in ((holocron, ['sigmoid']), (mindcv, ['pool', 'relu'])):
        expected = network(x)
        for change in changes:
            model = load_third_party(weights_of(network))
            if change == 'sigmoid':
                for attention in (unit.conv2.attn for stage in (model.layer1, model.layer2) for unit in stage):
                    attention.softmax = nn.Softmax(dim=1)
            elif change == 'pool':
                model.maxpool = nn.MaxPool2d(3, 2, 1)
            else:
                model.layer1[0].conv1.act = nn.ReLU()
            assert (model(x) - expected).abs().max() > 1e-3, change


@pytest.mark.parametrize(
    ('make_network', 'arguments', 'parameters'),
    [
        # Holocron's own count for its ten classes.
        (
            lambda: holocron_net((64, 128, 256, 512), (3, 4, 6, 3), 10),
            dict(layers=(3, 4, 6, 3), cardinality=1, base_width=64, sk_kwargs=dict(select_bias=True), num_classes=10),
            35_224_394,
        ),
        # timm's skresnet18 has as many.
        (
            lambda: MindCVNet((64, 128, 256, 512), (2, 2, 2, 2), (16, 16, 32, 64), classes=1000),
            dict(
                layers=(2, 2, 2, 2),
                block='basic',
                cardinality=1,
                base_width=64,
                sk_kwargs=dict(split_input=True, reduction=8, min_dim=16),
                num_classes=1000,
            ),
            11_958_056,
        ),
        # What is called skresnext50_32x4d there, and has no groups.
        (
            lambda: MindCVNet((64, 128, 256, 512), (3, 4, 6, 3), (32,) * 4, basic=False, split=False, classes=1000),
            dict(layers=(3, 4, 6, 3), cardinality=1, base_width=64, sk_kwargs={}, num_classes=1000),
            37_245_352,
        ),
    ],
    ids=['Holocron sknet50', 'MindCV skresnet18', 'MindCV skresnext50_32x4d'],
)
def test_published_sizes(make_network, arguments, parameters):
    with torch.device('meta'):
        network = make_network()
        found = recognise_third_party(weights_of(network))
    assert found.arguments == arguments
    assert sum(p.numel() for p in network.parameters()) == parameters
    if isinstance(network, MindCVNet):
        millions = sum(tensor.numel() for tensor in weights_of(network).values()) / 1e6
        assert (
            round(millions, 2) == {11_958_056: 11.97, 37_245_352: 37.31}[parameters]
        )  # of its pages, with the norms' statistics
    with pytest.raises(ValueError, match='which no registered model has'):
        found.timm_model()


def test_a_layer_of_holocrons():
    torch.manual_seed(0)
    layer = randomise(HolocronKernel(32, stride=2, groups=4))
    model = load_third_party(layer.state_dict(), stride=2)
    x = make_input(32, size=9)
    assert_close(model(x), layer(x), length=layer)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda w: w.pop('layer2.1.conv1.attn.bn.gamma'), r'layer2\.1\.conv1\.attn\.bn\.weight is missing'),
        (lambda w: w.update({'moments.conv1.weight': torch.ones(1)}), r'moments\.conv1\.weight is not part of it'),
        (
            lambda w: w.update({'layer1.0.conv2.0.weight': torch.ones(16, 8, 3, 3)}),
            r'layer1\.0\.conv2\.0\.weight is \(16, 8, 3, 3\), not \(16, 16, 3, 3\)',
        ),
    ],
)
def test_errors(change, message):
    weights = make('MindCV basic').mindspore_state_dict()
    change(weights)
    with pytest.raises(CheckpointError, match=f"recognised as MindCV's SK network, but {message}"):
        load_third_party(weights)


def value(name, tensor, content=None, kind='Float32'):
    if content is None:
        content = struct.pack(f'<{tensor.numel()}f', *tensor.flatten().tolist())
    dims = b''.join(field(1, size) for size in tensor.shape)
    return field(1, field(1, name) + field(2, dims + field(2, kind) + field(3, content)))


def test_mindspore_files(tmp_path):
    pytest.importorskip('google.protobuf')
    network = make('MindCV basic').float()
    weights = network.mindspore_state_dict()
    path = tmp_path / 'skresnet18-9d8b1afc.ckpt'
    path.write_bytes(b''.join(value(name, tensor) for name, tensor in weights.items()))
    assert load_checkpoint(path)[0].keys() == weights.keys()
    x = make_input(dtype=torch.float32)
    assert_close(load_third_party(path)(x), network(x), length=network)


def test_mindspore_tensors_in_parts(tmp_path):
    pytest.importorskip('google.protobuf')
    tensor, half = torch.arange(6.0).reshape(2, 3), torch.ones(4, dtype=torch.float16)
    content = struct.pack('<6f', *range(6))
    path = tmp_path / 'parts.ckpt'
    parts = value('a', tensor, content[:10]) + value('b', half, struct.pack('<4e', *[1] * 4), 'Float16')
    path.write_bytes(parts + value('a', tensor, content[10:]))
    state_dict, _ = load_checkpoint(path)
    assert torch.equal(state_dict['a'], tensor)
    assert torch.equal(state_dict['b'], half)


def test_what_mindspore_saves_beside_the_weights(tmp_path):
    """Scalars, which have a dimension of 0 there, flags, and strings, which nothing needs."""
    pytest.importorskip('google.protobuf')
    network = make('MindCV basic').float()
    parts = [value(name, tensor) for name, tensor in network.mindspore_state_dict().items()]
    parts.append(value('learning_rate', torch.empty(0), struct.pack('<f', 0.5)))
    parts.append(value('flags', torch.ones(2), b'\1\0', 'Bool'))
    path = tmp_path / 'x.ckpt'
    path.write_bytes(b''.join([*parts, value('name', torch.ones(5), b'skres', 'String')]))
    state_dict, _ = load_checkpoint(path)
    assert state_dict['learning_rate'].shape == ()
    assert state_dict['learning_rate'] == 0.5
    assert state_dict['flags'].tolist() == [True, False]
    assert 'name' not in state_dict


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'\x0a\xff', 'not a checkpoint of MindSpore, or a damaged one'),
        (field(1, field(1, 'a')), 'holds no tensors'),
        (value('a', torch.ones(2), b'123'), r'a has 3 bytes for torch\.float32 of shape \(2,\)'),
        (value('a', torch.ones(2), b'12', 'String'), "a is of type 'String'; these are read: Float16"),
    ],
)
def test_mindspore_files_that_are_refused(tmp_path, content, message):
    pytest.importorskip('google.protobuf')
    path = tmp_path / 'x.ckpt'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf'x\.ckpt: {message}'):
        load_checkpoint(path)


def test_a_ckpt_of_torch_is_torchs(tmp_path):
    torch.save({'state_dict': {'a': torch.ones(2)}}, tmp_path / 'x.ckpt')
    assert torch.equal(load_checkpoint(tmp_path / 'x.ckpt')[0]['a'], torch.ones(2))
