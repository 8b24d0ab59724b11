"""torch's private names, and what runs in a release that lacks one of them."""

import functools
import subprocess
import sys

import pytest
import torch
from torch import nn

from sk_plugins.ops import private

NAMES = ['torch.nn.modules.module._global_forward_hooks', 'torch._C._are_functorch_transforms_active']
NAMES += ['torch._C._len_torch_dispatch_stack']


@pytest.mark.slow
def test_where_torch_does_not_tell_what_is_at_work_the_plain_modules_run():
    """In a process of its own, and gone for us alone: torch itself needs some of these names to run at all."""
    code = f"""
import importlib, operator
import torch
import sk_plugins
from sk_plugins.ops import private
layer = sk_plugins.SelectiveKernel(8, groups=2).train()
ways = []
for name in {NAMES!r}:
    path, _, last = name.removeprefix('torch.').rpartition('.')
    owner = operator.attrgetter(path)(torch)
    kept = getattr(owner, last)
    delattr(owner, last)
    try:
        importlib.reload(private)
    finally:
        setattr(owner, last, kept)
    layer(torch.randn(2, 8, 4, 4)).sum().backward()
    ways.append((private.is_ordinary(), layer._way))
importlib.reload(private)
layer(torch.randn(2, 8, 4, 4)).sum().backward()
print(ways, private.is_ordinary(), layer._way)
"""
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
    assert result.stdout == f'{[(False, "plain")] * len(NAMES)} True recompute\n', result.stderr


def test_counts_without_foreach(monkeypatch):
    counts = [torch.tensor(1), torch.tensor(5)]
    private.add_one(counts)
    monkeypatch.setattr(private, '_foreach_add_', None)
    private.add_one(counts)
    assert counts == [3, 7]


def test_softmax_gradient_without_the_operator(monkeypatch):
    softmax, grad = torch.randn(3, 4).softmax(1), torch.randn(3, 4)
    expected = private.softmax_backward(grad, softmax, 1)
    monkeypatch.setattr(private, '_softmax_backward', None)
    torch.testing.assert_close(private.softmax_backward(grad, softmax, 1), expected)


def test_in_backward(monkeypatch):
    asked = []
    x = torch.ones(2, requires_grad=True)
    for lacks in (False, True):
        if lacks:
            monkeypatch.setattr(private, 'graph_task', lambda: -1)
        y = x * 2
        y.register_hook(lambda grad: asked.append(private.in_backward()))
        y.sum().backward()
    assert asked == [True, False]
    assert not private.in_backward()


def test_patches_are_told_from_torchs_own():
    for kind in (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Identity, nn.Softmax, nn.Sequential, nn.ModuleList):
        assert private.is_torchs_own(kind.forward, kind.__module__)
    original = nn.Conv2d.forward
    patched = functools.wraps(original)(lambda self, x: original(self, x))
    assert patched.__module__ == original.__module__
    assert not private.is_torchs_own(patched, nn.Conv2d.__module__)
    assert not private.is_torchs_own(functools.partial(original), nn.Conv2d.__module__)


def test_batch_norms_are_told_by_their_base():
    norms = [nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2)]
    assert all(isinstance(norm, private.BATCH_NORMS) for norm in norms)
    others = [nn.InstanceNorm2d(2), nn.GroupNorm(1, 2), nn.LayerNorm(2)]
    assert not any(isinstance(norm, private.BATCH_NORMS) for norm in others)


@pytest.mark.parametrize('lacks', [False, True])
def test_compiled_modules(lacks, monkeypatch):
    layer = nn.Linear(2, 2)
    assert not private.is_compiled(layer)
    layer.compile(backend='eager')
    assert private.is_compiled(layer)
    if lacks:
        del layer._compiled_call_impl
        monkeypatch.delattr(nn.Module, '_compiled_call_impl')
        assert not private.is_compiled(layer)
