"""The stem of a ResNet by an engine: the plain modules' numbers, less memory, and hooks and replaced methods run."""

import copy

import pytest
import torch
from helpers.gate_cases import CLOSE, WATCHES
from helpers.plain_engine import put_in_place
from helpers.randomised import randomise
from timm.layers import BlurPool2d
from timm.models.resnet import ResNet
from torch import nn

from sk_plugins.networks import SKResNet
from sk_plugins.ops import Fusable, ways

STEM = ['conv1', 'bn1', 'act1', 'maxpool']


def make_pair(dtype=torch.float64, **kwargs):
    """A network whose stem goes by an engine in training, and the same whose stem goes module after module."""
    torch.manual_seed(0)
    narrow = dict(channels=(4, 4, 4), cardinality=2, base_width=32, num_classes=3, sk_kwargs=dict(min_dim=4))
    network = randomise(SKResNet((1, 1, 1), **{**narrow, **kwargs})).to(dtype).train()
    plain = copy.deepcopy(network)
    plain.backend = 'plain'
    return network, plain


def make_input(dtype=torch.float64, memory_format=torch.channels_last):
    x = torch.randn(3, 3, 18, 19, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return x.contiguous(memory_format=memory_format)


def step(network, x):
    network.zero_grad()
    x = x.clone().requires_grad_()
    output = network(x)
    output.square().sum().backward()
    return [output.detach(), x.grad, *(p.grad for p in network.parameters() if p.grad is not None), *network.buffers()]


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('frozen', [False, True], ids=['batch', 'frozen'])
def test_outputs_gradients_and_statistics_are_the_plain_modules(memory_format, frozen):
    """On a CPU, where both go through the same arithmetic of torch, bit for bit."""
    network, plain = make_pair(torch.float32)
    for module in (network, plain):
        module.bn1.train(not frozen)
    x = make_input(torch.float32, memory_format)
    assert all(map(torch.equal, step(network, x), step(plain, x)))
    assert (network._way, plain._way) == ('recompute', 'plain')
    assert ways(network) == ways(plain) == {'recompute': 3}  # SK convolutions are counted, the stem is not


@pytest.mark.parametrize('engine', ['recompute', 'triton'])
def test_second_and_batched_gradients(engine, monkeypatch):
    if engine == 'triton':
        put_in_place(monkeypatch)
    results = []
    pair = make_pair()
    for network in pair:
        y = network(make_input()).mean(0)
        leaves = [network.conv1.weight, network.bn1.weight, network.bn1.bias]
        batched = torch.autograd.grad(y, leaves, torch.eye(3, dtype=y.dtype), is_grads_batched=True, retain_graph=True)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)
        results.append([*batched, *(grad.detach() for grad in first), *second])
    assert pair[0]._way == engine
    torch.testing.assert_close(*results, **CLOSE)


@pytest.mark.parametrize('kwargs', [dict(small_stem=True), dict(stem_type='deep'), dict(aa_layer=BlurPool2d)], ids=str)
def test_other_stems(kwargs, monkeypatch):
    put_in_place(monkeypatch)
    network, plain = make_pair(**kwargs)
    torch.testing.assert_close(step(network, make_input()), step(plain, make_input()), **CLOSE)
    assert network._way == 'plain'


def test_the_normalised_map_is_not_kept():
    kept = []
    for network in make_pair():
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = network(make_input())
        kept.append(sum(sizes.values()))
        del output
    assert (kept[1] - kept[0]) / (3 * 64 * 9 * 10 * 8) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize('training', [True, False], ids=['training', 'inference'])
def test_who_watches_or_replaces_a_part_is_honoured(training, monkeypatch):
    put_in_place(monkeypatch)
    network, _ = make_pair()
    network.train(training)
    x = make_input()

    def run():
        with torch.set_grad_enabled(training):
            return network(x)

    run()
    for name in ['', *STEM]:
        for what, watch in WATCHES.items():
            assert network._way == 'triton'
            part = network.get_submodule(name)
            with watch(part) as seen:
                run()
                assert any(kept is part for kept in seen), (what, name)
                assert network._way == 'plain'
            run()
    with monkeypatch.context() as patch:
        patch.setattr(network, 'maxpool', nn.AvgPool2d(3, 2, 1))
        run()
        assert network._way == 'plain'


@pytest.mark.parametrize('owner', ['instance', 'class', "timm's class"])
@pytest.mark.parametrize('name', ['forward_features', 'forward_head'])
def test_methods_of_others(owner, name, monkeypatch):
    put_in_place(monkeypatch)
    network, _ = make_pair()
    network(make_input())
    assert network._way == 'triton'
    original = getattr(ResNet, name)
    called = []

    def method(self, *args, **kwargs):
        called.append(name)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        if owner == 'instance':
            patch.setattr(network, name, lambda x: method(network, x))
        else:
            patch.setattr(SKResNet if owner == 'class' else ResNet, name, method, raising=False)
        network(make_input())
        make_pair()[0](make_input())
        assert called == [name] * (1 if owner == 'instance' else 2)
    network(make_input())
    assert network._way == 'triton'


def test_checkpointing():
    network, plain = make_pair()
    for module in (network, plain):
        module(make_input())
        module.set_grad_checkpointing()
    torch.testing.assert_close(step(network, make_input()), step(plain, make_input()), **CLOSE)
    assert network._way == 'recompute'


def test_backend_is_that_of_the_units():
    for backend, way in (('auto', 'recompute'), ('recompute', 'recompute'), ('plain', 'plain')):
        network, _ = make_pair(sk_kwargs=dict(backend=backend))
        network(make_input())
        assert (network.backend, network._way) == (backend, way)
    plain, _ = make_pair(unit='plain', sk_kwargs=None)
    plain(make_input())
    assert plain._way == 'plain'
    assert not any(isinstance(module, Fusable) for module in list(plain.modules())[1:])
