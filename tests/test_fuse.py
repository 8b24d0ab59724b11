"""fold_batch_norm, and that compilers and exporters take the networks, folded or not."""

import copy
import importlib
import pickle
from functools import partial

import pytest
import timm
import torch
from helpers.randomised import randomise
from helpers.tolerances import assert_close
from timm.models._features import FeatureListNet
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.modules.batchnorm import _BatchNorm

import sk_plugins
from sk_plugins import SelectiveKernel, fold_batch_norm, zoo

RESNET = dict(channels=(16, 32, 64, 128), layers=(1, 2, 1, 1), num_classes=10)
NARROW = dict(**RESNET, cardinality=4, base_width=16)
SMALL = dict(channels=(16, 32, 64), layers=(1, 2, 1), cardinality=4, base_width=16, num_classes=10)
SHUFFLE = dict(channels=(16, 32, 64), layers=(1, 2, 1), head_channels=32, num_classes=10)
# By how much batch statistics of small maps amplify rounding.
BATCH_STATISTICS = 1e4
# The kinds of network, each with all that is its own: blocks, stems, shortcuts, units.
FAMILIES = ('sknet50', 'skresnet18', 'skresnet50d', 'seshufflenetv2_x1_0', 'skshufflenetv2_x1_0', 'sknet29_16x32d')
each_family = pytest.mark.parametrize('name', FAMILIES)
each_state = pytest.mark.parametrize('folded', [False, True], ids=['as it is', 'folded'])


def narrow(spec):
    """The arguments for a small network of a row of the zoo, in every other respect like it."""
    if spec.network is sk_plugins.networks.SKShuffleNetV2:
        return SHUFFLE
    if len(spec.args['layers']) == 3:
        return SMALL
    return RESNET if spec.args.get('cardinality') == 1 else NARROW


def make_model(name='sknet50', folded=False, dtype=torch.float32, **kwargs):
    spec = zoo.MODELS[name]
    model = randomise(spec.build(**{**narrow(spec), **kwargs})).to(dtype)
    return fold_batch_norm(model) if folded else model


def make_input(batch=2, size=64, dtype=torch.float32, channels=3):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def norms(model):
    return [k for k, m in model.named_modules() if hasattr(m, 'running_mean') or isinstance(m, nn.GroupNorm)]


def assert_equal(model, reference, x):
    outputs, expected = model(x), reference(x)
    assert expected.std() > 0.01
    assert_close(outputs, expected, length=reference)


# The networks


@pytest.mark.parametrize('name', zoo.MODELS)
def test_no_norm_is_left_in_the_zoo(name):
    model = zoo.MODELS[name].build(device='meta').eval()
    folded = fold_batch_norm(model)
    assert type(folded) is type(model)
    assert norms(folded) == []
    # Every norm's four vectors become one bias.
    saved = sum(3 * module.num_features for module in model.modules() if isinstance(module, _BatchNorm))
    count = sum(tensor.numel() for name, tensor in model.state_dict().items() if 'num_batches' not in name)
    assert count - sum(tensor.numel() for tensor in folded.state_dict().values()) == saved


@pytest.mark.parametrize('name', zoo.MODELS)
@torch.no_grad()
def test_equals_the_network(name):
    model = make_model(name, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    x = make_input(dtype=torch.float64)
    assert_equal(fold_batch_norm(model), model, x)
    assert_equal(fold_batch_norm(copy.deepcopy(model).float()), model.float(), x.float())
    assert norms(model)
    for key, tensor in model.double().state_dict().items():
        assert_close(tensor, before[key], dtype=torch.float32, msg=key)


@torch.no_grad()
def test_full_width():
    model = randomise(zoo.MODELS['sknet50'].build(layers=(1, 1, 1, 1)))
    assert_equal(fold_batch_norm(model), model, make_input())


@torch.no_grad()
def test_the_model_stays_as_it_is():
    model = make_model()
    before = copy.deepcopy(model)
    folded = fold_batch_norm(model)
    for parameter in folded.parameters():
        parameter.zero_()
    assert repr(model) == repr(before)
    for key, tensor in before.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key


@each_family
@torch.no_grad()
def test_the_copy_is_a_plain_module(name):
    x = make_input(dtype=torch.float64)
    model = make_model(name, dtype=torch.float64)
    folded = fold_batch_norm(model)
    for other in (pickle.loads(pickle.dumps(folded)), copy.deepcopy(folded), fold_batch_norm(folded)):
        assert torch.equal(other(x), folded(x))
    loaded = fold_batch_norm(make_model(name, dtype=torch.float64))
    for parameter in loaded.parameters():
        parameter.mul_(0.5)
    loaded.load_state_dict(folded.state_dict(), strict=True)
    assert torch.equal(loaded(x), folded(x))
    assert not any(module.training for module in folded.modules())
    assert folded.to('meta')(x.to('meta')).shape == (2, 10)
    assert_equal(fold_batch_norm(model).to(memory_format=torch.channels_last), model, x)


def test_training_mode_runs_without_norms():
    folded = make_model(folded=True).train()
    for parameter in folded.parameters():
        parameter.requires_grad_()
    # A batch of one, which the attention's BatchNorm would refuse.
    folded(make_input(1)).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in folded.parameters())


@each_family
@torch.no_grad()
def test_memory_format_stays(name):
    model = make_model(name).to(memory_format=torch.channels_last)
    folded = fold_batch_norm(model)
    weights = [p for p in folded.parameters() if p.ndim == 4]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    x = make_input().to(memory_format=torch.channels_last)
    assert_equal(folded, model, x)
    assert folded.forward_features(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_weights_are_rounded_once(dtype):
    model = make_model().to(dtype)
    exact, folded = fold_batch_norm(copy.deepcopy(model).float()), fold_batch_norm(model)
    for (name, value), expected in zip(folded.state_dict().items(), exact.state_dict().values()):
        assert value.dtype is dtype
        assert torch.equal(value, expected.to(dtype)), name


# Around the networks


@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'hook', 'fx', 'getter'])
@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3, 4), (2, 4)], ids=str)
@torch.no_grad()
def test_features(feature_cls, out_indices):
    model = timm.create_model(
        'sknet50', **NARROW, features_only=True, out_indices=out_indices, feature_cls=feature_cls
    )  # fmt: skip
    model = randomise(model).double()
    folded = fold_batch_norm(model)
    assert type(folded).__name__ == type(model).__name__
    assert norms(folded) == []
    x = make_input(dtype=torch.float64)
    outputs, expected = folded(x), model(x)
    assert len(outputs) == len(out_indices)
    assert_close(outputs, expected, length=model)


@torch.no_grad()
def test_a_feature_between_convolution_and_norm_stays():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.feature_info = [dict(num_chs=4, reduction=1, module=name) for name in ('conv', 'bn', 'conv2')]
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    model = randomise(FeatureListNet(Net(), out_indices=(0, 1, 2)))
    assert norms(fold_batch_norm(model)) == ['bn']
    x = make_input()
    assert_close(fold_batch_norm(model)(x), model(x), length=model)
    without = randomise(FeatureListNet(Net(), out_indices=(1, 2)))
    assert norms(fold_batch_norm(without)) == []
    assert_close(fold_batch_norm(without)(x), without(x), length=without)


@pytest.mark.parametrize('name', ['skresnext50_32x4d', 'resnext50_32x4d', 'resnet18', 'seresnet50'])
@torch.no_grad()
def test_timms_own_networks(name):
    model = randomise(timm.create_model(name, channels=(32, 64, 128, 256), num_classes=10)).double()
    folded = fold_batch_norm(model)
    assert norms(folded) == []
    # timm's BatchNorm has the ReLU inside it, which must stay.
    assert_equal(folded, model, make_input(dtype=torch.float64))


@pytest.mark.parametrize('name', ['resnext50_32x4d', 'resnet18', 'shufflenet_v2_x0_5'])
@torch.no_grad()
def test_torchvisions_networks(name):
    torchvision = pytest.importorskip('torchvision')
    model = randomise(torchvision.models.get_model(name, num_classes=10)).double()
    folded = fold_batch_norm(model)
    assert norms(folded) == []
    assert_equal(folded, model, make_input(dtype=torch.float64))


@pytest.mark.parametrize('kind', ['sync', 'sync on CPUs', 'frozen', 'timm frozen'])
@torch.no_grad()
def test_other_kinds_of_batch_norm(kind):
    pytest.importorskip('torchvision')
    model = make_model(dtype=torch.float64)
    timms = randomise(timm.create_model('skresnext50_32x4d', channels=(32, 64, 128, 256), num_classes=10)).double()
    if kind == 'sync':
        swapped = [nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)).eval()]
        swapped.append(timm.layers.convert_sync_batchnorm(copy.deepcopy(timms)).eval())
    elif kind == 'sync on CPUs':
        sync_batchnorm = pytest.importorskip('sk_plugins.openmmlab.runtime.sync_batchnorm', exc_type=ImportError)
        swapped = [sync_batchnorm.synchronise(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))).eval()]
    else:
        swapped = [timm.utils.model.freeze_batch_norm_2d(copy.deepcopy(m)) for m in (model, timms)]
    x = make_input(dtype=torch.float64)
    for other, reference in zip(swapped, (model, timms)):
        assert len(norms(other)) == len(norms(reference))
        folded = fold_batch_norm(other)
        assert norms(folded) == []
        assert_equal(folded, reference, x)


# The layer

LAYERS = {
    'plain': {},
    'three branches': dict(kernel_sizes=(3, 5, 7)),
    'split': dict(split_input=True),
    'shared': dict(select='shared'),
    'sum': dict(select='sum'),
    'biases': dict(conv_bias=True, select_bias=True),
    'no norm in z': dict(reduce_norm=False),
    'anti-aliased': dict(stride=2, aa_layer=timm.layers.BlurPool2d),
    'drop block': dict(drop_layer=timm.layers.DropBlock2d),
    'norm at the output': dict(norm_position='output'),
    'norm at the output, three branches, biases': dict(
        norm_position='output', kernel_sizes=(3, 5, 7), conv_bias=True, reduce_norm=False, select_bias=True
    ),
    'norm at the output, shared': dict(norm_position='output', select='shared'),
    'norm at the output, sum': dict(norm_position='output', select='sum', conv_bias=True),
    'norm at the output, not affine': dict(
        norm_position='output', norm_layer=partial(nn.BatchNorm2d, affine=False)
    ),
}  # fmt: skip


@pytest.mark.parametrize('kwargs', LAYERS.values(), ids=LAYERS.keys())
@torch.no_grad()
def test_layer(kwargs):
    layer = randomise(SelectiveKernel(16, groups=4, **kwargs)).double()
    x = make_input(size=9, channels=16, dtype=torch.float64)
    folded = fold_batch_norm(layer)
    assert norms(folded) == []
    assert_equal(folded, layer, x)
    assert_equal(fold_batch_norm(layer.float()), layer.float(), x.float())


@pytest.mark.parametrize('scale', [0.0, 1e-6])
@torch.no_grad()
def test_norm_at_the_output_that_the_attention_cannot_undo(scale):
    layer = randomise(SelectiveKernel(16, groups=4, norm_position='output'))
    layer.bn.weight[3] = scale
    folded = fold_batch_norm(layer)
    assert norms(folded) == ['bn']
    assert_equal(folded, layer, make_input(size=9, channels=16))
    summed = randomise(SelectiveKernel(16, groups=4, norm_position='output', select='sum'))
    summed.bn.weight[3] = scale
    assert norms(fold_batch_norm(summed)) == []
    assert_equal(fold_batch_norm(summed), summed, make_input(size=9, channels=16))


@torch.no_grad()
def test_norm_at_the_output_behind_what_is_not_linear_stays():
    layer = SelectiveKernel(16, groups=4, norm_position='output', stride=2, aa_layer=timm.layers.BlurPool2d)
    layer = randomise(layer)
    assert norms(fold_batch_norm(layer)) == ['bn']
    assert_equal(fold_batch_norm(layer), layer, make_input(size=9, channels=16))


# What is left alone


@torch.no_grad()
def test_other_norms_stay():
    model = make_model(norm_layer='groupnorm1')
    assert norms(fold_batch_norm(model)) == norms(model) != []
    assert torch.equal(fold_batch_norm(model)(make_input()), model(make_input()))
    without_statistics = make_model(norm_layer=partial(nn.BatchNorm2d, track_running_stats=False))
    assert norms(fold_batch_norm(without_statistics)) == norms(without_statistics) != []
    assert torch.equal(fold_batch_norm(without_statistics)(make_input(4)), without_statistics(make_input(4)))


class _Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class _OtherOrder(nn.Sequential):
    def forward(self, x):
        return self[1](x) + self[0](x)


class _OtherBlock(timm.models.resnet.BasicBlock):
    def forward(self, x):
        return self.bn2(self.conv2(self.conv1(self.bn1(x))))


def _hooked():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[0].register_forward_hook(lambda module, args, output: output.relu())
    return model


def _patched():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[0].forward = torch.relu
    return model


UNSOUND = {
    'standardised weight': lambda: nn.Sequential(_Standardised(3, 3, 3, padding=1), nn.BatchNorm2d(3)),
    'parametrised weight': lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)
    ),
    'hook': _hooked,
    'patched forward': _patched,
    'other order': lambda: _OtherOrder(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),
    'other block': lambda: _OtherBlock(3, 3),
    'norm first': lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)),
    'activation between': lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)),
    'transposed': lambda: nn.Sequential(nn.ConvTranspose2d(3, 3, 1), nn.BatchNorm2d(3)),
    'activation in the norm': lambda: nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3), timm.layers.BatchNormAct2d(3), nn.BatchNorm2d(3)
    ),
}


@pytest.mark.parametrize('make', UNSOUND.values(), ids=UNSOUND.keys())
@torch.no_grad()
def test_unsound_pairs_stay(make):
    model = randomise(make())
    folded = fold_batch_norm(model)
    assert norms(folded) == norms(model)
    x = make_input()
    assert torch.equal(folded(x.clone()), model(x.clone()))


@torch.no_grad()
def test_modules_with_several_users():
    conv, norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
    inner = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 3, 1))
    shared_conv = nn.Sequential(nn.Sequential(conv, nn.BatchNorm2d(3)), nn.Sequential(conv, nn.BatchNorm2d(3)), conv)
    shared_norm = nn.Sequential(nn.Sequential(conv, norm), nn.ReLU(), nn.Conv2d(3, 3, 1), norm)
    nested = nn.Sequential(nn.Sequential(nn.ReLU(), nn.Sequential(conv)), nn.Identity(), nn.BatchNorm2d(3), norm)
    x = make_input(size=9, dtype=torch.float64)
    for model in (shared_conv, shared_norm, nested):
        model = randomise(model).double()
        assert norms(fold_batch_norm(model)) == []
        assert_equal(fold_batch_norm(model), model, x)
    # Another container calls the inner one without a norm.
    model = randomise(nn.Sequential(nn.Sequential(inner, nn.BatchNorm2d(3)), inner)).double()
    assert norms(fold_batch_norm(model)) == ['0.1']
    assert_equal(fold_batch_norm(model), model, x)
    acting = nn.Sequential(nn.Conv2d(3, 3, 1), timm.layers.BatchNormAct2d(3), nn.BatchNorm2d(3))
    model = randomise(acting).double()
    assert norms(fold_batch_norm(model)) == ['2']
    assert_equal(fold_batch_norm(model), model, x)


@torch.no_grad()
def test_graph_in_which_a_convolution_has_two_users():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.bn, self.bn2 = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), *(nn.BatchNorm2d(3),) * 2
            self.c, self.bn3 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            x = self.a(x)
            return self.bn3(self.c(self.bn(x) + x))

    model = torch.fx.symbolic_trace(randomise(Net()))
    assert norms(fold_batch_norm(model)) == ['bn']
    assert_close(fold_batch_norm(model)(make_input()), model(make_input()), length=model)


# OpenMMLab


@pytest.mark.parametrize(
    'backbone',
    [
        dict(type='SKNet', depth=50, channels=(16, 32, 64, 128), cardinality=4, base_width=16),
        dict(type='SKNet', depth=50, channels=(16, 32, 64, 128), norm_cfg=dict(type='SyncBN'), frozen_stages=1),
        dict(type='SKResNet', depth=18, channels=(16, 32, 64, 128), norm_eval=True),
        dict(type='SKShuffleNetV2', widen_factor=0.5),
    ],
    ids=lambda backbone: backbone['type'],
)
@torch.no_grad()
def test_mmpretrain(backbone):
    pytest.importorskip('mmpretrain')
    from mmpretrain.registry import MODELS

    importlib.import_module('sk_plugins.mmpretrain_models')

    channels = {'SKResNet': 128, 'SKShuffleNetV2': 1024}.get(backbone['type'], 512)
    classifier = dict(
        type='ImageClassifier',
        backbone=backbone,
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=10, in_channels=channels),
    )
    model = randomise(MODELS.build(classifier)).double()
    folded = fold_batch_norm(model)
    assert norms(folded) == []
    assert_equal(folded, model, make_input(dtype=torch.float64))
    assert pickle.loads(pickle.dumps(folded))
    folded.train().eval()
    assert_equal(folded, model, make_input(dtype=torch.float64))


@pytest.mark.filterwarnings('ignore:Unnecessary conv bias')  # which is what is folded here
@pytest.mark.parametrize('efficient', [False, True])
@torch.no_grad()
def test_conv_module(efficient):
    cnn = pytest.importorskip('mmcv.cnn')
    bn, build = dict(type='BN'), partial(cnn.ConvModule, 3, 3, 3, padding=1, efficient_conv_bn_eval=efficient)
    folded_ones = nn.Sequential(
        build(norm_cfg=bn),
        build(norm_cfg=bn, act_cfg=None, bias=True),
        build(norm_cfg=bn, order=('act', 'conv', 'norm')),
        cnn.DepthwiseSeparableConvModule(3, 3, 3, padding=1, norm_cfg=bn),
    )
    others = nn.Sequential(
        build(norm_cfg=bn, order=('norm', 'conv', 'act')),
        build(norm_cfg=bn, order=('conv', 'act', 'norm')),
        build(norm_cfg=bn, with_spectral_norm=True),
        build(norm_cfg=dict(type='GN', num_groups=1)),
        build(),
    )
    x = make_input(size=9, dtype=torch.float64)
    for model, left in ((folded_ones, 0), (others, 4)):
        randomise(model).double()
        assert len(norms(fold_batch_norm(model))) == left
        assert_equal(fold_batch_norm(model), model, x)


@torch.no_grad()
def test_mmdet():
    pytest.importorskip('mmdet')
    from mmdet.registry import MODELS

    importlib.import_module('sk_plugins.mmpretrain_models')

    backbone = dict(type='mmpretrain.SKNet', depth=50, channels=(16, 32, 64, 128), out_indices=(1, 2, 3))
    neck = dict(type='FPN', in_channels=[128, 256, 512], out_channels=16, num_outs=3, norm_cfg=dict(type='BN'))
    model = nn.Sequential(MODELS.build(backbone), MODELS.build(neck))
    model = randomise(model).double()
    folded = fold_batch_norm(model)
    assert norms(folded) == []
    x = make_input(dtype=torch.float64)
    assert_close(folded(x), model(x), length=model)


# What is refused


def test_refusals():
    model = make_model()
    with pytest.raises(ValueError, match=r'model is in training mode.*call model\.eval\(\) first'):
        fold_batch_norm(model.train())
    model.eval().layer2[0].conv2.paths[1].bn.train()
    with pytest.raises(ValueError, match=r"BatchNorm in training mode, 'layer2\.0\.conv2\.paths\.1\.bn'"):
        fold_batch_norm(model)
    model.eval()
    with pytest.raises(ValueError, match='model is a RecursiveScriptModule: fold the model that it was made from'):
        fold_batch_norm(torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()))
    with pytest.raises(ValueError, match='model is a OptimizedModule'):
        fold_batch_norm(torch.compile(model))
    with pytest.raises(TypeError, match='must be an nn'):
        fold_batch_norm('sknet50')


# Compilers and exporters


def make_inputs(dtype=torch.float32):
    return [make_input(batch, size, dtype) for batch, size in ((2, 64), (3, 64), (5, 64))]


@each_state
@each_family
@torch.no_grad()
def test_torchscript(name, folded):
    model = make_model(name, folded, torch.float64)
    scripted = torch.jit.script(model)
    for x in (make_input(dtype=torch.float64), make_input(1, 97, torch.float64)):
        assert_close(scripted(x), model(x), length=model)


@each_state
@pytest.mark.parametrize('name', ['sknet50', 'skresnet50d', 'skshufflenetv2_x1_0'])
@torch.no_grad()
def test_torch_export(name, folded):
    model = make_model(name, folded, torch.float64)
    dynamic = ({0: torch.export.Dim('batch', min=1, max=64)},)
    program = torch.export.export(model, (make_input(dtype=torch.float64),), dynamic_shapes=dynamic).module()
    for x in (*make_inputs(torch.float64), make_input(1, dtype=torch.float64)):
        assert_close(program(x), model(x), length=model)


QUICK = [('sknet50', 'train'), ('sknet50', 'folded'), ('skshufflenetv2_x1_0', 'eval')]
COMPILED = [
    pytest.param(name, mode, marks=[] if (name, mode) in QUICK else pytest.mark.slow)
    for name in FAMILIES
    for mode in ('train', 'eval', 'folded')
]


@pytest.mark.parametrize(('name', 'mode'), COMPILED)
def test_compile(name, mode):
    """One graph for every batch, and equal outputs and gradients."""
    torch.compiler.reset()
    shape = dict(channels=(16, 32, 64), layers=(1, 1, 1) if 'shuffle' not in name else (1, 2, 1))
    model = make_model(name, mode == 'folded', torch.float64, **shape).train(mode == 'train')
    for parameter in model.parameters():
        parameter.requires_grad_()
    other = copy.deepcopy(model)
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(other, fullgraph=True, backend=counter)
    for batch in (2, 3, 5):
        x = make_input(batch, 32, torch.float64)
        torch._dynamo.mark_dynamic(x, 0)
        outputs, expected = compiled(x), model(x)
        assert_close(outputs, expected, length=model, gain=BATCH_STATISTICS if mode == 'train' else 1)
        outputs.square().mean().backward()
        expected.square().mean().backward()
    assert counter.frame_count == 1
    largest = max(parameter.grad.abs().max().item() for parameter in model.parameters())
    for (name, parameter), expected in zip(other.named_parameters(), model.parameters()):
        assert_close(parameter.grad, expected.grad, length=model, gain=BATCH_STATISTICS, scale=largest, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['NCHW', 'NHWC'])
@pytest.mark.parametrize('mode', ['train', 'eval', 'folded'])
def test_inductor(mode, memory_format):
    torch.compiler.reset()
    model = make_model('sknet50', mode == 'folded', channels=(16, 32, 64), layers=(1, 1, 1)).train(mode == 'train')
    model = model.to(memory_format=memory_format)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=True)
    with torch.set_grad_enabled(mode == 'train'):
        for x in make_inputs():
            x = x.to(memory_format=memory_format)
            assert_close(compiled(x), model(x), length=model, gain=100 if mode == 'train' else 1)


# Mixed precision


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@each_state
@torch.no_grad()
def test_large_activations_do_not_overflow(dtype, folded):
    # The branches' outputs are near 1e4, and 112 * 112 of them sum to 1e8, which float16 does not hold.
    layer = randomise(SelectiveKernel(16, groups=4))
    for path in layer.paths:
        path.bn.bias.fill_(1e4)
    layer = fold_batch_norm(layer) if folded else layer
    x = make_input(size=112, channels=16)
    expected = layer(x)
    assert 9e3 < expected.mean() < 1.1e4
    for module, image in ((layer, x), (copy.deepcopy(layer).to(dtype), x.to(dtype))):
        with torch.autocast('cpu', dtype=dtype):
            output = module(image)
        assert output.isfinite().all()
        # Sums are kept in float32: the dtype rounds the convolution, the norm, the ReLU and the selected map.
        assert_close(output.float(), expected, length=4, dtype=dtype)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', ['sknet50', 'skshufflenetv2_x1_0'])
def test_autocast_training(name, dtype):
    model = make_model(name).train()
    with torch.autocast('cpu', dtype=dtype):
        loss = model(make_input(4, size=32)).float().square().mean()
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_paths():
    """The function, its former name, and the file of that name."""
    module = importlib.import_module('sk_plugins.fuse')
    assert module.fold_batch_norm is sk_plugins.fold_batch_norm is sk_plugins.fuse
