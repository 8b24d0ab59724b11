"""Recording: the attention is what the layers compute, by the paper's names, and recording it changes no output bit."""

import copy

import pytest
import timm
import torch
from helpers.randomised import randomise
from helpers.tolerances import assert_close
from timm.layers import SelectiveKernel as TimmSelectiveKernel
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from sk_plugins import SelectiveKernel, SKResNet, fold_batch_norm
from sk_plugins.analysis import record, recording, sk_units
from sk_plugins.networks import SKShuffleNetV2

SMALL = dict(layers=(1, 2, 1), channels=(16, 16, 16), cardinality=4, base_width=16, num_classes=10)
SHUFFLE = dict(channels=(16, 32, 64), layers=(2, 2, 1), head_channels=32, num_classes=10)
NETWORKS = {
    'two kernels': lambda: SKResNet(**SMALL),
    'three kernels': lambda: SKResNet(**SMALL, sk_kwargs=dict(kernel_sizes=(3, 5, 7))),
    'shared': lambda: SKResNet(**SMALL, sk_kwargs=dict(select='shared', select_bias=True)),
    'basic, input split': lambda: SKResNet(
        (1, 1, 1), block='basic', channels=(16, 32, 32), cardinality=1, base_width=64, sk_kwargs=dict(split_input=True)
    ),
    'true kernels, norm after': lambda: SKResNet(
        **SMALL, sk_kwargs=dict(dilated=False, norm_position='output', reduce_norm=False)
    ),
    'shufflenet': lambda: SKShuffleNetV2(**SHUFFLE),
    "timm's own": lambda: timm.create_model('skresnet18', channels=(16, 16, 16, 16), layers=(1, 1, 1, 1)),
}
COMPILED = {
    'two kernels': lambda: SKResNet(**SMALL | dict(layers=(1, 1, 1))),
    "timm's own": NETWORKS["timm's own"],
}
X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=NETWORKS)
def model(request):
    torch.manual_seed(0)
    return randomise(NETWORKS[request.param]())


def in_float64(model, x):
    """Every unit's attention by Eq. 1 to 5, in float64, from what its branches' last modules give."""
    model = copy.deepcopy(model).double()
    expected = {}

    def attend(unit):
        outputs = {}

        def keep(m):
            return lambda module, inputs, output: outputs.__setitem__(m, output)

        for m, path in enumerate(unit.layer.paths):
            path.register_forward_hook(keep(m))

        def solve(layer, inputs, output):
            attn, branches = layer.attn, [outputs[m] for m in range(len(unit.kernels))]
            s = torch.stack(branches).sum(0).mean((2, 3))
            z = s @ attn.fc_reduce.weight.flatten(1).T
            if attn.fc_reduce.bias is not None:
                z = z + attn.fc_reduce.bias
            if isinstance(attn.bn, nn.BatchNorm2d):
                mean, var = attn.bn.running_mean, attn.bn.running_var
                z = (z - mean) / (var + attn.bn.eps).sqrt() * attn.bn.weight + attn.bn.bias
            logits = z.relu() @ attn.fc_select.weight.flatten(1).T
            if attn.fc_select.bias is not None:
                logits = logits + attn.fc_select.bias
            a = logits.view(len(x), len(unit.kernels), -1).exp()
            expected[unit.name] = (a / a.sum(1, keepdim=True)).expand(-1, -1, unit.channels)

        unit.layer.register_forward_hook(solve)

    for unit in sk_units(model).values():
        attend(unit)
    with torch.no_grad():
        model(x.double())
    return expected


@pytest.mark.parametrize('folded', [False, True])
def test_equals_a_direct_computation_and_changes_nothing(model, folded):
    model = fold_batch_norm(model) if folded else model
    expected = in_float64(model, X)
    assert any(a.std() > 0.02 for a in expected.values())
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            before = model(X)
            with record(model) as attention:
                during = model(X)
            after = model(X)
        assert torch.equal(before, during)
        assert torch.equal(before, after)
        assert list(attention) == list(expected)
        for name, values in expected.items():
            assert attention[name].dtype == torch.float32
            assert not attention[name].requires_grad
            assert (attention[name].sum(1) - 1).abs().max() < 1e-6
            assert_close(attention[name].double(), values, length=model, dtype=torch.float32)


@pytest.mark.parametrize('backend', ['auto', 'plain', 'recompute', 'triton'])
@pytest.mark.parametrize('checkpointed', [False, True])
def test_a_training_step_is_the_same(backend, checkpointed):
    torch.manual_seed(0)
    models = [randomise(SKResNet(**SMALL, sk_kwargs=dict(backend=backend))).double().train()]
    models.append(copy.deepcopy(models[0]))
    losses = []
    for i, model in enumerate(models):
        model.set_grad_checkpointing(checkpointed)
        recording = record(model)
        if i == 1:
            recording.__enter__()
        losses.append(model(X.double()).square().sum())
        losses[-1].backward()
        recording.__exit__()
    assert torch.equal(*losses)
    largest = max(p.grad.abs().max() for p in models[0].parameters())
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters()):
        # Recorded units go the plain way, whose gradients another engine gives but for rounding, which batch statistics
        # of small maps make larger.
        assert_close(p.grad, q.grad, length=models[0], gain=1e3, scale=largest.item(), msg=name)
    for (name, p), q in zip(models[0].state_dict().items(), models[1].state_dict().values()):
        # What a checkpoint repeats, it counts twice in BatchNorm's statistics, recorded or not.
        assert torch.equal(p, q), name
    assert all(len(recording.forwards(name)) == 1 for name in recording)
    assert sum(recording[name].std() > 0 for name in recording) == 4


@pytest.mark.parametrize(
    ('network', 'training', 'backend'),
    [
        ('two kernels', True, 'aot_eager'),
        ('two kernels', False, 'eager'),
        ("timm's own", False, 'eager'),
    ],
)
@pytest.mark.slow
def test_compiled_before_and_recorded_again(network, training, backend):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = randomise(COMPILED[network]()).train(training)
    state = copy.deepcopy(model.state_dict())
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def forward(run):
        model.load_state_dict(state)
        with torch.set_grad_enabled(training):
            output = run(X)
        if training:
            output.sum().backward()  # in which nothing is recorded
        return output

    before = forward(compiled)
    assert counter.frame_count == 1
    for _ in range(3):
        with record(compiled) as attention:
            during = forward(compiled)
            forward(compiled)
        assert torch.equal(before, during)
        assert torch.equal(before, forward(compiled))
        assert counter.frame_count == 2  # without the record and with it, and no more
    with record(model) as eager:
        forward(model)
    for name in attention:
        assert len(attention.forwards(name)) == 2
        assert_close(attention.forwards(name)[1], eager[name], length=model)


@pytest.mark.slow
@pytest.mark.parametrize('training', [False, True])
def test_compiled_by_inductor(training):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = randomise(SKResNet(**SMALL)).train(training)
    state = copy.deepcopy(model.state_dict())
    compiled = torch.compile(model)
    outputs, gradients = [], []
    recording = record(compiled)
    for recorded in (False, True, False):
        model.load_state_dict(state)
        model.zero_grad()
        if recorded:
            recording.__enter__()
        with torch.set_grad_enabled(training):
            outputs.append(compiled(X))
        if training:
            outputs[-1].square().sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        recording.__exit__()
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    if training:
        assert_close(gradients[1], gradients[0], length=model, gain=100)
    model.load_state_dict(state)
    with record(model) as eager, torch.no_grad():
        model(X)
    for name in recording:
        assert len(recording.forwards(name)) == 1
        assert_close(recording[name], eager[name], length=model)
        assert (recording[name].sum(1) - 1).abs().max() < 1e-6


def test_low_precision_is_recorded_in_float32():
    model = randomise(SKResNet(**SMALL)).bfloat16()
    with torch.no_grad(), record(model) as attention:
        model(X.bfloat16())
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16), record(model.float()) as autocast:
        model(X)
    for recorded in (attention, autocast):
        for values in recorded.values():
            assert values.dtype == torch.float32
            assert (values.sum(1) - 1).abs().max() < 1e-6


def test_forwards_add_up_until_they_are_cleared():
    model = randomise(SKResNet(**SMALL))
    with torch.inference_mode(), record(model, ['SK_3_2']) as attention:
        assert attention['SK_3_2'].shape == (0, 2, 16)
        model(X)
        model(X[:1])
        assert [tuple(a.shape) for a in attention.forwards('SK_3_2')] == [(3, 2, 16), (1, 2, 16)]
        assert_close(attention['SK_3_2'][3], attention['SK_3_2'][0], length=model)
        attention.clear()
        assert attention['SK_3_2'].shape == (0, 2, 16)
        model(X)
    model(X)
    assert list(attention) == ['SK_3_2']
    assert attention['SK_3_2'].shape == (3, 2, 16)
    with pytest.raises(KeyError, match=r"'SK_2_1' is not recorded, only SK_3_2"):
        attention['SK_2_1']


def test_nothing_stays_behind():
    model = randomise(SKResNet(**SMALL))
    layers = [recording.last_layer(unit) for unit in sk_units(model).values()]
    before = [dict(vars(layer)) for layer in layers]
    outer, inner = record(model), record(model, ['SK_2_1'])
    with torch.no_grad():
        with outer:
            model(X)
            with inner:
                model(X)
            with pytest.raises(RuntimeError), inner:
                model(X[:, :2])
            model(X)
        model(X)
    assert [len(outer.forwards(name)) for name in outer] == [3, 3, 3, 3]
    assert len(inner.forwards('SK_2_1')) == 1
    assert [dict(vars(layer)) for layer in layers] == before
    with outer, pytest.raises(RuntimeError, match='this recording has begun'):
        outer.__enter__()
    assert [dict(vars(layer)) for layer in layers] == before

    # A forward that another library put there is called, and put back.
    calls = []

    def own(x, plain=layers[0].forward):
        calls.append(x.shape)
        return plain(x)

    layers[0].forward = own
    with torch.no_grad(), record(model) as attention:
        model(X)
    assert layers[0].forward is own
    assert len(calls) == len(attention.forwards('SK_2_1')) == 1
    assert not recording._watchers
    assert not recording._replaced


def test_names_are_the_papers():
    with torch.device('meta'):
        sknet50 = sk_units(timm.create_model('sknet50'))
        assert list(sknet50) == [
            f'SK_{stage}_{i}' for stage, units in ((2, 3), (3, 4), (4, 6), (5, 3)) for i in range(1, units + 1)
        ]
        assert sknet50['SK_2_3'].path == 'layer1.2.conv2'
        assert sknet50['SK_5_3'].channels == 1024
        assert sknet50['SK_5_3'].labels == ('3x3', '5x5')
        # A unit that down-samples is one, without an SK convolution.
        shuffle = timm.create_model('skshufflenetv2_x1_0')
        assert list(sk_units(shuffle)) == [
            f'SK_{stage}_{i}' for stage, units in ((2, 4), (3, 8), (4, 4)) for i in range(2, units + 1)
        ]
        assert sk_units(shuffle)['SK_2_2'].path == 'stage2.1.branch2.3'
        for name in ('skresnet18', 'skresnext50_32x4d'):  # timm's own
            units = sk_units(timm.create_model(name))
            assert units['SK_2_1'].kernels == (3, 5)
            assert isinstance(units['SK_2_1'].layer, TimmSelectiveKernel)
        features = timm.create_model('sknet26', features_only=True)
        assert list(sk_units(nn.ModuleDict({'backbone': features}))) == [
            f'SK_{stage}_{i}' for stage in range(2, 6) for i in (1, 2)
        ]
        small = SKResNet(**SMALL)
        two = nn.ModuleDict({'teacher': small, 'student': SKResNet(**SMALL)})
        assert list(sk_units(two))[3:5] == ['teacher.SK_4_1', 'student.SK_2_1']
        assert list(sk_units(torch.compile(small))) == ['SK_2_1', 'SK_3_1', 'SK_3_2', 'SK_4_1']
        alone = SelectiveKernel(64)
        assert list(sk_units(alone)) == ['SK']
        assert list(sk_units(nn.Sequential(alone, nn.ReLU()))) == ['0']
        twice = nn.ModuleDict({'layer1': nn.ModuleList([nn.ModuleList([alone, SelectiveKernel(64)])])})
        assert list(sk_units(twice)) == ['layer1.0.0', 'layer1.0.1']


@pytest.mark.parametrize(
    ('arguments', 'kernels', 'labels'),
    [
        (dict(kernel_sizes=(3, 5, 7)), (3, 5, 7), ('3x3', '5x5', '7x7')),
        (dict(kernel_sizes=(5,)), (5,), ('5x5',)),
        (dict(kernel_sizes=(1, 3)), (1, 3), ('1x1', '3x3')),
        (dict(kernel_sizes=(5, 3), dilated=False), (5, 3), ('5x5', '3x3')),
        (dict(kernel_sizes=(5, 9), dilation=2), (5, 9), ('5x5', '9x9')),
        (dict(branches=[(3, 1, 32), (3, 3, 32), (7, 1, 64)]), (3, 7, 7), ('3x3', '7x7 (1)', '7x7 (2)')),
    ],
)
def test_kernels(arguments, kernels, labels):
    (unit,) = sk_units(SelectiveKernel(64, device='meta', **arguments)).values()
    assert unit.kernels == kernels
    assert unit.labels == labels


@pytest.mark.parametrize('name', ['sknet50', 'skresnext50_32x4d'])
def test_kernels_where_the_network_dilates(name):
    with torch.device('meta'):
        units = sk_units(timm.create_model(name, output_stride=8))
    assert {unit.kernels for unit in units.values()} == {(3, 5)}


def test_difference_of_the_largest_and_the_smallest_kernel():
    (unit,) = sk_units(SelectiveKernel(64, kernel_sizes=(5, 7, 3), device='meta')).values()
    attention = torch.tensor([[[0.2, 0.4], [0.5, 0.5], [0.3, 0.1]], [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]])
    torch.testing.assert_close(unit.difference(attention), torch.tensor([0.3, -1.0]))
    (alike,) = sk_units(SelectiveKernel(64, branches=[(3, 1, 32), (3, 1, 32)], device='meta')).values()
    assert (alike.smallest, alike.largest) == (0, 1)


def test_models_that_cannot_be_recorded():
    small = SKResNet(**SMALL)
    with pytest.raises(TypeError, match=r'model=3 must be an nn\.Module, not int'):
        record(3)
    for other in (nn.Linear(2, 2), torch.jit.script(SKResNet(**SMALL, sk_kwargs=dict(select='sum')))):
        with pytest.raises(ValueError, match=rf'model is a {type(other).__name__} without SK units'):
            record(other)
    with pytest.raises(ValueError, match=r"model is a SKResNet without attention.*select='sum'"):
        record(SKResNet(**SMALL, sk_kwargs=dict(select='sum')))
    message = r"units has 'SK_9_9', a unit that does not exist: choose from SK_2_1, SK_3_1, SK_3_2, SK_4_1"
    with pytest.raises(ValueError, match=message):
        record(small, ['SK_2_1', 'SK_9_9'])
    with pytest.raises(ValueError, match=r"units='SK_2_1' must be a sequence of names: \('SK_2_1',\)"):
        record(small, 'SK_2_1')
    mixed = nn.Sequential(SelectiveKernel(64, select='sum'), SelectiveKernel(64))
    assert list(record(mixed)) == ['1']
    with pytest.raises(ValueError, match=r"units has '0', a unit that sums its branches"):
        record(mixed, ['0'])
