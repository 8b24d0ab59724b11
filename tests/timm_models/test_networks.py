"""timm's tests of forward and backward passes and of heads, and what the builder's arguments do."""

import copy
import re

import pytest
import timm
import torch
from helpers.narrow_models import (
    NARROW,
    assert_same_gradients,
    assert_same_state,
    each_kind,
    each_narrow_model,
    each_slow_kind,
    feature_shapes,
    is_shuffle,
    is_small,
    make_input,
    make_model,
    narrow,
)
from helpers.tolerances import assert_close
from timm.optim import param_groups_layer_decay
from torch import nn


@each_kind
def test_forward_and_backward(name):
    """At full width: logits, then a gradient for every parameter."""
    size = 16 if is_small(name) else 64
    classes = 100 if is_small(name) else 1000
    model = timm.create_model(name).eval()
    x = make_input(size=size)
    with torch.no_grad():
        output = model(x)
    assert output.shape == (2, classes)
    assert torch.isfinite(output).all()
    assert (output[0] != output[1]).any()

    model.reset_classifier(42)
    output = model.train()(x)
    output.mean().backward()
    assert output.shape == (2, 42)
    assert torch.isfinite(output).all()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name


@each_narrow_model
def test_every_parameter_matters(name):
    """In float64, where a gradient that is no more than rounding would show as one."""
    model = make_model(name, train=True).double()
    model(make_input(4).double()).square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        # In ShuffleNetV2 a convolution and a norm follow the depthwise one's norm, and take its shift out again.
        shifted = re.search(r'\.branch(1\.1|2\.4)\.bias$', parameter_name)
        assert (parameter.grad.abs().max() > 1e-9) == (not shifted), parameter_name


@pytest.mark.parametrize('name', ['sknet26', 'skshufflenetv2_x1_0'])
@torch.no_grad()
def test_forward_at_full_size(name):
    output = timm.create_model(name).eval()(make_input(1, size=224))
    assert output.shape == (1, 1000)
    assert not output.isnan().any()


@each_kind
@torch.no_grad()
def test_reset_classifier(name):
    model = make_model(name)
    x = make_input()
    pooled = model.forward_features(x).mean((2, 3))
    assert_close(model.forward_head(model.forward_features(x), pre_logits=True), pooled, length=model)
    assert_close(model(x), nn.functional.linear(pooled, model.fc.weight, model.fc.bias), length=model)
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model.get_classifier() is model.fc
    assert model.get_classifier(name_only=True) == 'fc'
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert_close(model(x), pooled, length=model)
    model.reset_classifier(3, 'max')
    highest = model.forward_features(x).amax((2, 3))
    assert torch.equal(model.forward_head(model.forward_features(x), pre_logits=True), highest)
    assert model(x).shape == (2, 3)
    model.reset_classifier(3, 'catavgmax')
    assert model.fc.in_features == model.head_hidden_size == 2 * model.num_features
    assert model(x).shape == (2, 3)


@pytest.mark.parametrize(('global_pool', 'times'), [('avg', 1), ('max', 1), ('avgmax', 1), ('catavgmax', 2)])
@each_slow_kind
@torch.no_grad()
def test_global_pool(name, global_pool, times):
    model = make_model(name, global_pool=global_pool)
    x = make_input()
    features = model.forward_features(x)
    pools = dict(avg=features.mean((2, 3)), max=features.amax((2, 3)))
    pools['avgmax'] = (pools['avg'] + pools['max']) / 2
    pools['catavgmax'] = torch.cat((pools['avg'], pools['max']), 1)
    assert_close(model.forward_head(features, pre_logits=True), pools[global_pool], length=model)
    assert model.fc.in_features == times * feature_shapes(name, narrow=True)[2]
    assert model(x).shape == (2, 10)


@each_kind
@torch.no_grad()
def test_children_stand_in_the_order_they_are_called_in(name):
    """So that a slice of them is a network, as of every ResNet."""
    model, x = make_model(name), make_input(size=32)
    expected = model.forward_features(x)
    for num_classes in (10, 0, 5):
        model.reset_classifier(num_classes)
        children = dict(model.named_children())
        assert list(children)[-2:] == ['global_pool', 'fc']
        assert torch.equal(nn.Sequential(*list(children.values())[:-2])(x), expected)
        assert torch.equal(nn.Sequential(*children.values())(x), model(x))


@each_slow_kind
def test_grad_checkpointing(name):
    model = make_model(name, train=True).double()
    checkpointed = copy.deepcopy(model)
    checkpointed.set_grad_checkpointing()
    assert checkpointed.grad_checkpointing
    x = make_input(4).double()
    outputs = [module(x) for module in (model, checkpointed)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)
    for output in outputs:
        output.square().mean().backward()
    assert_same_gradients(checkpointed, model)
    for module in (model, checkpointed):
        module.zero_grad()
        output, _ = module.forward_intermediates(x)
        output.square().mean().backward()
    assert_same_gradients(checkpointed, model, headless=True)
    checkpointed.set_grad_checkpointing(False)
    assert not checkpointed.grad_checkpointing


@each_kind
def test_grad_checkpointing_runs_the_units_twice(name):
    model = make_model(name, train=True)
    counts = []
    unit = (model.stage2 if is_shuffle(name) else model.layer1)[-1]
    unit.register_forward_pre_hook(lambda *_: counts.append(1))
    model.set_grad_checkpointing()
    model(make_input().requires_grad_()).sum().backward()
    assert len(counts) == 2


@each_kind
@torch.no_grad()
def test_channels_last(name):
    model = make_model(name).double()
    x = make_input().double()
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    assert_close(model(x.contiguous(memory_format=torch.channels_last)), expected, length=model)


@pytest.mark.parametrize(
    ('output_stride', 'reductions', 'dilations'),
    [
        (32, [2, 4, 8, 16, 32], {'layer3': [1, 1], 'layer4': [1, 1]}),
        (16, [2, 4, 8, 16, 16], {'layer3': [1, 1], 'layer4': [1, 2]}),
        (8, [2, 4, 8, 8, 8], {'layer3': [1, 2], 'layer4': [2, 4]}),
    ],
)
@torch.no_grad()
def test_output_stride(output_stride, reductions, dilations):
    model = make_model(output_stride=output_stride)
    for stage, expected in dilations.items():
        found = [[path.conv.dilation[0] for path in unit.conv2.paths] for unit in model.get_submodule(stage)]
        assert found == [[dilation, 2 * dilation] for dilation in expected], stage
    features = make_model(output_stride=output_stride, features_only=True)
    assert features.feature_info.reduction() == reductions
    assert [feature.shape[-1] for feature in features(make_input())] == [64 // reduction for reduction in reductions]
    assert model(make_input()).shape == (2, 10)
    assert_same_state(model, make_model())


@pytest.mark.parametrize('in_chans', [1, 4])
@each_slow_kind
@torch.no_grad()
def test_in_chans(name, in_chans):
    model = make_model(name, in_chans=in_chans)
    conv = model.get_submodule(model.default_cfg['first_conv'])
    assert conv.weight.shape[1] == in_chans
    assert model(make_input(channels=in_chans)).shape == (2, 10)


@each_kind
def test_drop_rate(name):
    model = make_model(name, drop_rate=0.5, train=True)
    x = make_input()
    assert model.drop_rate == 0.5
    features = model.forward_features(x).detach() + 10
    kept = features.mean((2, 3))
    dropped = model.forward_head(features, pre_logits=True)
    assert 0.3 < (dropped == 0).float().mean() < 0.7
    assert_close(dropped[dropped != 0], 2 * kept[dropped != 0], length=model)
    model.eval()
    assert_close(model.forward_head(features, pre_logits=True), kept, length=model)


def test_drop_path_rate():
    model = make_model(drop_path_rate=0.35, train=True)
    units = [*model.layer1, *model.layer2, *model.layer3, *model.layer4]
    rates = [getattr(unit.drop_path, 'drop_prob', 0.0) for unit in units]
    assert rates == pytest.approx([0.05 * index for index in range(8)])
    x = make_input(16, size=32)
    assert not torch.equal(model(x), model(x))
    model.eval()
    plain = make_model()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)


@each_kind
def test_layer_decay(name):
    model = make_model(name)
    groups = param_groups_layer_decay(model, weight_decay=1e-4, layer_decay=0.5)
    units = sum(narrow(name).get('layers', (2, 2, 2, 2)))
    count = 1 + units + 1
    scales = sorted({group['lr_scale'] for group in groups})
    assert scales == pytest.approx([0.5**k for k in range(count - 1, -1, -1)])
    scale_of = {id(parameter): group['lr_scale'] for group in groups for parameter in group['params']}
    assert scale_of[id(model.fc.weight)] == 1
    assert scale_of[id(model.get_submodule(model.default_cfg['first_conv']).weight)] == 0.5 ** (count - 1)
    # No decay for norms and biases.
    undecayed = {id(parameter) for group in groups if not group['weight_decay'] for parameter in group['params']}
    assert undecayed == {id(parameter) for parameter in model.parameters() if parameter.ndim < 2}


@each_kind
@torch.no_grad()
def test_act_layer(name):
    model = make_model(name, act_layer='gelu')
    excitations = [module.act for module in model.modules() if hasattr(module, 'gate')]
    relus = [module for module in model.modules() if isinstance(module, nn.ReLU) and module not in excitations]
    assert not relus
    x = make_input()
    assert not torch.allclose(model(x), make_model(name)(x), atol=1e-4)
    assert_same_state(model, make_model(name))


@each_kind
def test_norm_layer(name):
    kwargs = narrow(name)
    if is_shuffle(name):
        kwargs.update(channels=(64, 128, 256), stem_channels=32)  # timm's GroupNorm has 32 groups
    if 'simclr' in name:
        kwargs.update(channels=(32, 64, 64, 64), stem_width=32, zero_init_last=False)
    model = timm.create_model(name, **kwargs, norm_layer='groupnorm').train()
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    output = model(make_input(1))
    output.square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), parameter_name
        assert parameter.grad.any(), parameter_name


def test_zero_init_last():
    for zero in (False, True):
        model = timm.create_model('sknet26', **NARROW, zero_init_last=zero)
        scales = [parameter for name, parameter in model.named_parameters() if name.endswith('conv3.bn.weight')]
        assert len(scales) == 8
        assert all((scale == (0 if zero else 1)).all() for scale in scales)


@each_kind
def test_device_and_dtype(name):
    for device, dtype in (('meta', torch.bfloat16), ('cpu', torch.float64), (torch.device('cpu'), torch.bfloat16)):
        model = timm.create_model(name, **narrow(name), device=device, dtype=dtype).eval()
        for key, tensor in model.state_dict().items():
            assert tensor.device == torch.device(device), key
            assert tensor.dtype == (torch.int64 if key.endswith('num_batches_tracked') else dtype), key
        assert model(make_input().to(device, dtype)).dtype == dtype
        model.reset_classifier(3)
        assert model.fc.weight.dtype == dtype
