"""Training with the fast paths is training with the reference: the same losses on real images, step by step.

In float64: in float32, BatchNorms over the few values of small maps amplify rounding until, within 20 steps, two
orders of the same sum are two different runs.
"""

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.tolerances import assert_close
from sklearn.datasets import load_digits

from sk_plugins.layers import SelectiveKernel, selective_kernel
from sk_plugins.ops import fuse_reference, select_reference

NARROW = dict(layers=(1, 1, 1, 1), channels=(16, 32, 64, 128), cardinality=8, base_width=16)
NARROW |= dict(num_classes=10, in_chans=1, zero_init_last=True)
STEPS = 20
# By how much a step of training makes a difference of the weights larger, at most.
GROWTH = 2.5


@pytest.fixture(scope='module')
def batches():
    digits = load_digits()
    images = F.interpolate(torch.tensor(digits.images[:, None] / 16 - 0.3, dtype=torch.float64), scale_factor=4)
    return [(images[16 * i : 16 * (i + 1)], torch.tensor(digits.target[16 * i : 16 * (i + 1)])) for i in range(STEPS)]


def make_network(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **NARROW, **kwargs).train().double()


def losses(network, batches):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    curve = []
    for images, labels in batches:
        loss = F.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return torch.tensor(curve)


def as_the_reference(network, monkeypatch):
    """The paper's equations as written, module after module."""
    monkeypatch.setattr(selective_kernel, 'fuse', fuse_reference)
    monkeypatch.setattr(selective_kernel, 'select', select_reference)
    for module in network.modules():
        if isinstance(module, SelectiveKernel):
            module.backend = 'plain'
    return network


@pytest.mark.parametrize('backend', ['auto', pytest.param('triton', marks=pytest.mark.slow)])
def test_losses_equal_the_references(backend, batches, monkeypatch):
    network = make_network('sknet26', sk_kwargs=dict(backend=backend))
    got = losses(network, batches)
    expected = losses(as_the_reference(make_network('sknet26'), monkeypatch), batches)
    assert_close(got, expected, length=network, gain=GROWTH**STEPS)
    # It has learnt something, so that there is something to agree on.
    assert got[-5:].mean() < 0.7 * got[:5].mean()


@pytest.mark.slow
def test_losses_equal_timms(batches):
    network = make_network('sknet26', sk_kwargs=dict(min_dim=8))
    # timm rounds d = C / 16 to multiples of 32; with 8 as the floor, to multiples of 8, it is ours.
    sk_kwargs = dict(rd_ratio=1 / 16, rd_divisor=8, split_input=False)
    reference = timm.create_model('skresnext50_32x4d', block_args=dict(sk_kwargs=sk_kwargs), **NARROW)
    reference.load_state_dict(network.state_dict(), strict=True)
    got, expected = losses(network, batches), losses(reference.double().train(), batches)
    assert_close(got, expected, length=network, gain=GROWTH**STEPS)
