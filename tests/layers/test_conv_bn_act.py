"""ConvBNAct: what it computes, however it computes it."""

import copy

import pytest
import torch
from helpers.plain_engine import put_in_place
from helpers.randomised import randomise
from helpers.tolerances import assert_close
from timm.layers import BlurPool2d, DropBlock2d
from torch import nn

from sk_plugins.layers import ConvBNAct

VARIANTS = [
    dict(),
    dict(kernel_size=3, stride=2, groups=4),
    dict(bias=True),
    dict(apply_act=False),
    dict(apply_norm=False),
    dict(act_layer=nn.SiLU),
    dict(kernel_size=3, stride=2, aa_layer=BlurPool2d),
    dict(drop_layer=DropBlock2d),
]
FUSED = VARIANTS[:4]
each_variant = pytest.mark.parametrize('kwargs', VARIANTS, ids=str)
each_mode = pytest.mark.parametrize('training', [False, True], ids=['inference', 'training'])


def make(**kwargs):
    torch.manual_seed(0)
    return randomise(ConvBNAct(8, 12, **kwargs).double()).eval()


def make_input(size=9, batch=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 8, size, size, generator=generator, dtype=torch.float64)


@each_variant
def test_is_its_modules_in_a_row(kwargs):
    layer, x = make(**kwargs), make_input()
    expected = layer.aa(layer.act(layer.drop(layer.bn(layer.conv(x)))))
    assert torch.equal(layer(x), expected)
    stride = kwargs.get('stride', 1)
    assert layer(x).shape == (3, 12, -(-9 // stride), -(-9 // stride))
    with torch.no_grad():
        assert torch.equal(layer(x), expected)


@each_mode
@each_variant
def test_an_engine_computes_the_same(kwargs, training, monkeypatch):
    """A convolution with BatchNorm and ReLU or nothing; others are for the modules."""
    layer = make(**kwargs).train(training)
    layer.drop.eval()
    plain = copy.deepcopy(layer)
    plain.backend = 'plain'
    put_in_place(monkeypatch)
    results = []
    for module in (layer, plain):
        x = make_input().requires_grad_()
        output = module(x)
        output.backward(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output))
        with torch.no_grad():
            again = module.eval()(x)
        results.append([output, again, x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    assert layer._way == ('triton' if kwargs in FUSED else 'plain')
    assert plain._way == 'plain'
    largest = max(tensor.abs().max().item() for tensor in results[1])
    # Batch statistics of small maps make the rounding larger.
    assert_close(*results, length=plain, gain=1e3, scale=largest)


def test_parameters_have_timms_names():
    names = ['conv.weight', 'bn.weight', 'bn.bias', 'bn.running_mean', 'bn.running_var', 'bn.num_batches_tracked']
    assert list(make().state_dict()) == names
    assert [name for name, _ in make().named_children()] == ['conv', 'bn', 'drop', 'act', 'aa']


def test_a_norm_of_float32_after_a_convolution_of_bfloat16():
    layer = make(kernel_size=3).bfloat16()
    layer.bn.float()
    x = make_input().bfloat16()
    expected = torch.relu(layer.bn(layer.conv(x)))
    assert expected.dtype == torch.bfloat16
    assert torch.equal(layer(x), expected)


def test_exporters_see_convolution_norm_and_activation():
    exported = torch.export.export(make(), (make_input(),))
    called = [str(node.target) for node in exported.graph.nodes if node.op == 'call_function']
    assert [name.split('.')[1] for name in called] == ['conv2d', 'batch_norm', 'relu_']
