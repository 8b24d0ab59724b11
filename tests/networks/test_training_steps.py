"""A training step of every kind of network by every backend, and what torch.compile makes of a network and a layer.

The version tests run them with every torch that pyproject.toml claims.
"""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.kinds import one_of_each
from helpers.tolerances import assert_close, sum_length
from torch import nn

from sk_plugins.layers import SelectiveKernel
from sk_plugins.ops import BACKENDS

RESNET = dict(channels=(16, 32, 64, 128), cardinality=8, base_width=16, layers=(1, 2, 1, 1))
SMALL = dict(channels=(16, 32, 64), cardinality=4, base_width=32, layers=(1, 2, 1))
SHUFFLE = dict(channels=(12, 24, 48), layers=(2, 2, 2), head_channels=64)
NETWORKS = {
    'sknet26': RESNET,
    'sknet50': RESNET,
    'skresnext101_32x8d': RESNET,
    'sknet29_16x32d': SMALL,
    'resnext29_16x32d': SMALL,
    'seresnext29_16x32d': SMALL,
    'skshufflenetv2_x0_5': SHUFFLE,
    'seshufflenetv2_x0_5': SHUFFLE,
    'shufflenetv2_x0_5': SHUFFLE,
}
# A name of every kind comes back from a step; those of SK units by every way through them.
STEPS = [
    pytest.param(name, backend, marks=() if name in one_of_each(NETWORKS) else pytest.mark.slow)
    for name in NETWORKS
    for backend in (BACKENDS if name.startswith('sk') else (None,))
]


def make_network(name, backend=None, **kwargs):
    torch.manual_seed(0)
    sk_kwargs = {} if backend is None else dict(sk_kwargs=dict(backend=backend))
    return timm.create_model(name, **{**NETWORKS[name], **kwargs}, **sk_kwargs, num_classes=10).train()


def make_batch(dtype=torch.float32):
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    return images, torch.tensor([0, 3, 5, 9])


def step(network, dtype=torch.float32):
    """Losses before and after a step of SGD on one batch."""
    images, labels = make_batch(dtype)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02)
    before = F.cross_entropy(network(images), labels)
    before.backward()
    optimizer.step()
    with torch.no_grad():
        return before.item(), F.cross_entropy(network(images), labels).item()


@pytest.mark.parametrize(('name', 'backend'), STEPS, ids=lambda value: str(value))
def test_step(name, backend):
    network = make_network(name, backend)
    before, after = step(network)
    assert after < before < 10
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name


@pytest.mark.parametrize(('name', 'backend'), [s for s in STEPS if s.values[1] not in (None, 'plain')], ids=str)
def test_step_is_the_plain_ones(name, backend):
    """In float64, where nothing but a mistake makes the weights differ after a step."""
    network, plain = (make_network(name, way).double() for way in (backend, 'plain'))
    losses = [step(model, torch.float64) for model in (network, plain)]
    # BatchNorms over the few values of small maps make the rounding larger.
    assert_close(losses[0], losses[1], length=plain, gain=1e3)
    found, length = network.state_dict(), sum_length(plain)
    for key, tensor in plain.state_dict().items():
        assert_close(found[key], tensor, length=length, gain=1e3, scale=1.0, msg=key)


@pytest.mark.slow
def test_torch_compile_in_inference():
    """By inductor, as ``torch.compile(model)`` does it."""
    torch.compiler.reset()
    network = make_network('sknet26', channels=(8, 8, 8), layers=(1, 1, 1)).eval()
    compiled = torch.compile(network, fullgraph=True)
    images, _ = make_batch()
    with torch.inference_mode():
        assert_close(compiled(images), network(images), length=network, gain=10)


@pytest.mark.parametrize(
    'make',
    [
        # Inductor takes minutes for what a network's backward pass adds to its units'.
        lambda: make_network('sknet26', channels=(8, 8, 8), layers=(1, 1, 1)),
        lambda: nn.Sequential(SelectiveKernel(3, 8, groups=1, min_dim=8), nn.Flatten(), nn.Linear(8 * 32 * 32, 10)),
    ],
    ids=['network', 'layer'],
)
@pytest.mark.slow
def test_torch_compile_in_training(make):
    """By inductor: the loss and the gradients of a step."""
    torch.compiler.reset()
    torch.manual_seed(0)
    network = make().train()
    compiled = torch.compile(copy.deepcopy(network), fullgraph=True)
    images, labels = make_batch()
    losses = []
    for model in (compiled, network):
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        losses.append(loss.item())
    assert_close(losses[0], losses[1], length=network, dtype=torch.float32, gain=10)
    wanted = dict(network.named_parameters())
    largest = max(parameter.grad.abs().max().item() for parameter in wanted.values())
    for name, parameter in compiled._orig_mod.named_parameters():
        # Batch statistics of a few values make the rounding larger.
        assert_close(parameter.grad, wanted[name].grad, length=network, gain=1e3, scale=largest, msg=name)
