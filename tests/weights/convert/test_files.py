"""Where weights of other projects come from, and what is refused."""

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from helpers.third_party_networks import SKConv, SKNet, insight_net, lucid_net
from helpers.third_party_weights import NARROW, TRUE, make_input, randomise
from helpers.tolerances import assert_close
from torch import nn

import sk_plugins  # noqa: F401 - registers the models
from sk_plugins.weights import CheckpointError, load_third_party, recognise_third_party


@pytest.mark.parametrize(
    ('wrap', 'prefix'),
    [(dict, ''), (lambda w: {'state_dict': w}, 'module.'), (lambda w: {'model': w, 'epoch': 3}, '')],
    ids=['weights alone', 'of several processes', 'with an epoch'],
)
def test_containers(tmp_path, wrap, prefix):
    network = randomise(SKNet(**NARROW))
    weights = wrap({prefix + name: tensor for name, tensor in network.state_dict().items()})
    torch.save(weights, tmp_path / 'sknet.pth')
    expected = network(make_input())
    for source in (weights, tmp_path / 'sknet.pth', str(tmp_path / 'sknet.pth')):
        assert_close(load_third_party(source)(make_input()), expected, length=network)


def test_safetensors(tmp_path):
    network = randomise(insight_net())
    safetensors.torch.save_file(network.state_dict(), tmp_path / 'sk_resnet50.safetensors')
    model = load_third_party(tmp_path / 'sk_resnet50.safetensors')
    assert_close(model(make_input()), network(make_input()), length=model)


def test_source_is_left_alone():
    network = randomise(SKNet(**NARROW, **TRUE, conv_bias=True, reduce='linear'))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    found = recognise_third_party(network.state_dict())
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
    model = load_third_party(weights)
    assert_close(model(make_input()), network(make_input()), length=model)


def test_headless_network():
    network = randomise(SKNet(**NARROW))
    weights = {k: v for k, v in network.state_dict().items() if not k.startswith('classifier')}
    model = load_third_party(weights)
    assert model.num_classes == 0
    network.classifier = nn.Identity()
    assert_close(model(make_input()), network(make_input()), length=model)


def test_trains_after_loading():
    model = load_third_party(randomise(SKNet(**{**NARROW, 'outputs': (16, 64, 128, 192)})).state_dict()).train()
    model(make_input()).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


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
        load_third_party(make())


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
        load_third_party(tmp_path / 'spoilt.pth')


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
        load_third_party(weights, **options)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'none\.pth: no such checkpoint file'):
        load_third_party(tmp_path / 'none.pth')


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
        load_third_party(state_dict)
