"""fold_batch_norm of layers and pairs: which norms are folded, which stay, and what is refused."""

from functools import partial

import pytest
import timm
import torch
from helpers.folded_networks import assert_equal, make_input, make_model, norms
from helpers.randomised import randomise
from helpers.tolerances import assert_close
from timm.models._features import FeatureListNet
from torch import nn

from sk_plugins import SelectiveKernel, fold_batch_norm


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
