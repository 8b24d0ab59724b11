import copy
from functools import partial

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from helpers.tolerances import assert_close
from torch import nn
from torch.fx.experimental.optimization import fuse as fold_batch_norms
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.ops.misc import FrozenBatchNorm2d

from sk_plugins.layers import SelectiveKernel, SelectiveKernelAttention
from sk_plugins.networks import SKResNet

GROUP_NORM = partial(nn.GroupNorm, 8)
VARIANTS = {
    'plain': dict(),
    'one branch': dict(kernel_sizes=(3,)),
    'three branches': dict(kernel_sizes=(3, 5, 7)),
    'with 1x1': dict(kernel_sizes=(1, 3)),
    'true kernels': dict(dilated=False),
    'strided': dict(stride=2, out_channels=128),
    'dilated': dict(dilation=2),
    'shared': dict(select='shared'),
    'sum': dict(select='sum'),
    'split': dict(split_input=True, groups=8),
    'in full': dict(branches=[(3, 1, 32), (5, 1, 64), (1, 1, 2)]),
    'anti-aliased': dict(stride=2, aa_layer=timm.layers.BlurPool2d),
    'drop block': dict(drop_layer=timm.layers.DropBlock2d),
    'group norm': dict(norm_layer=GROUP_NORM),
    'select bias': dict(select_bias=True),
    'linear z': dict(reduce_norm=False, reduce_act=False, select_bias=True),
    'norm at the output': dict(norm_position='output', select='shared', conv_bias=True),
}
each_variant = pytest.mark.parametrize('kwargs', VARIANTS.values(), ids=VARIANTS.keys())


def make_layer(in_channels=64, train=False, **kwargs):
    """A layer whose norms are no identity and whose attention is not all but uniform, as it is right after init."""
    torch.manual_seed(0)
    layer = SelectiveKernel(in_channels, **kwargs)
    for module in layer.modules():
        if getattr(module, 'running_mean', None) is not None:
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    if layer.attn is not None:
        nn.init.normal_(layer.attn.fc_select.weight, std=0.5)
    return layer.train(train)


def make_input(batch=2, channels=64, size=9):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def make_branches(layer, x):
    inputs = x.chunk(len(layer.paths), 1) if layer.split_input else [x] * len(layer.paths)
    return [path(piece) for path, piece in zip(layer.paths, inputs)]


@pytest.mark.parametrize('size', [1, 7, 8])
@each_variant
def test_output_shape(kwargs, size):
    if 'aa_layer' in kwargs and size == 1:
        pytest.skip('a blur reflects its border, and a 1x1 map has none')
    layer = make_layer(**kwargs)
    stride = kwargs.get('stride', 1)
    output = layer(make_input(size=size))
    assert output.shape == (2, kwargs.get('out_channels', 64), -(-size // stride), -(-size // stride))


@each_variant
def test_every_parameter_gets_a_gradient(kwargs):
    layer = make_layer(train=True, **kwargs)
    layer(make_input(4)).square().mean().backward()
    for name, parameter in layer.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        # With a single branch the softmax is 1 whatever the logits.
        if not (len(layer.paths) == 1 and name.startswith('attn')):
            assert parameter.grad.any(), name


@pytest.mark.parametrize(
    ('channels', 'reduction', 'min_dim', 'dim'),
    [
        (128, 16, 32, 32),
        (512, 16, 32, 32),
        (1024, 16, 32, 64),
        # L is a floor: a rounding up to a multiple of it would give 64.
        (768, 16, 32, 48),
        (64, 4, 8, 16),
        (64, 16, 1, 4),
    ],
)
def test_attention_width(channels, reduction, min_dim, dim):
    layer = SelectiveKernel(channels, reduction=reduction, min_dim=min_dim)
    assert layer.attn.fc_reduce.weight.shape == (dim, channels, 1, 1)
    assert layer.attn.fc_select.weight.shape == (2 * channels, dim, 1, 1)
    assert layer.attn.fc_reduce.bias is None
    assert layer.attn.fc_select.bias is None


def test_attention_width_follows_the_output():
    assert SelectiveKernel(64, 1024).attn.fc_reduce.weight.shape == (64, 1024, 1, 1)


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize('dilated', [True, False])
@pytest.mark.parametrize(
    'kwargs', [{}, dict(stride=2), dict(dilation=2), dict(out_channels=128), dict(split_input=True)], ids=str
)
def test_equals_timm(kwargs, dilated, train):
    layer = make_layer(dilated=dilated, train=train, **kwargs)
    reference = timm.layers.SelectiveKernel(
        64, groups=32, rd_ratio=1 / 16, rd_divisor=32, keep_3x3=dilated, **{'split_input': False, **kwargs}
    ).train(train)
    assert list(layer.state_dict()) == list(reference.state_dict())
    reference.load_state_dict(layer.state_dict(), strict=True)
    x = make_input(4)
    if train:
        # In float32 the variance of four pooled values amplifies the rounding of the order in which they were summed.
        layer, reference, x = layer.double(), reference.double(), x.double()
    # So it does in float64, from far below.
    gain = 1e3 if train else 1
    assert_close(layer(x), reference(x), length=layer, gain=gain)
    for (name, buffer), expected in zip(layer.named_buffers(), reference.buffers()):
        assert_close(buffer, expected, length=layer, gain=gain, msg=name)


@pytest.mark.parametrize(
    ('kwargs', 'convolutions'),
    [
        (dict(kernel_sizes=(3, 5, 7)), [(3, 1, 32), (3, 2, 32), (3, 3, 32)]),
        (dict(kernel_sizes=[1, 3, 11]), [(1, 1, 32), (3, 1, 32), (3, 5, 32)]),
        (dict(kernel_sizes=(1, 3, 5, 7), dilated=False), [(1, 1, 32), (3, 1, 32), (5, 1, 32), (7, 1, 32)]),
        (dict(dilation=2), [(3, 2, 32), (3, 4, 32)]),
        (dict(dilation=4, kernel_sizes=(1, 3, 7)), [(1, 4, 32), (3, 4, 32), (3, 12, 32)]),
        (dict(dilation=2, dilated=False), [(3, 2, 32), (5, 2, 32)]),
        (dict(branches=[(3, 1, 32), (3, 3, 32)]), [(3, 1, 32), (3, 3, 32)]),
        (dict(branches=((3, 1, 32), [5, 1, 64], (7, 2, 16)), dilation=2), [(3, 2, 32), (5, 2, 64), (7, 4, 16)]),
        (dict(branches=[(5, 1, 1)], kernel_sizes=(3, 7), groups=4), [(5, 1, 1)]),
    ],
    ids=str,
)
def test_convolutions(kwargs, convolutions):
    layer = SelectiveKernel(64, **kwargs)
    assert [(p.conv.kernel_size, p.conv.dilation, p.conv.groups) for p in layer.paths] == [
        ((k, k), (d, d), g) for k, d, g in convolutions
    ]
    for path, (kernel_size, _, groups) in zip(layer.paths, convolutions):
        assert path.conv.weight.shape == (64, 64 // groups, kernel_size, kernel_size)
        assert path.conv.bias is None


def test_split_input_gives_each_branch_its_share():
    layer = make_layer(split_input=True, groups=8)
    assert [path.conv.in_channels for path in layer.paths] == [32, 32]
    x = make_input()
    changed = x.clone()
    changed[:, 32:] += 1
    before, after = make_branches(layer, x), make_branches(layer, changed)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])
    branches = [layer.paths[0](x[:, :32]), layer.paths[1](x[:, 32:])]
    expected = (torch.stack(branches, 1) * layer.attn(branches)).sum(1)
    assert_close(layer(x), expected, length=layer)


@pytest.mark.parametrize('kernel_sizes', [(3,), (3, 5), (3, 5, 7)])
@pytest.mark.parametrize('shared', [False, True])
def test_attention_sums_to_one(kernel_sizes, shared):
    layer = make_layer(kernel_sizes=kernel_sizes, select='shared' if shared else 'channel')
    attention = layer.attn(make_branches(layer, make_input(3)))
    assert attention.shape == (3, len(kernel_sizes), 1 if shared else 64, 1, 1)
    assert_close(attention.sum(1), torch.ones(3, 1 if shared else 64, 1, 1), length=layer)
    if len(kernel_sizes) > 1:
        assert attention.std() > 0.05, 'an attention that depends on nothing'


def test_select_shared_has_one_weight_per_branch():
    layer = make_layer(select='shared')
    assert layer.attn.fc_select.weight.shape == (2, 32, 1, 1)
    x = make_input()
    branches = make_branches(layer, x)
    first, second = layer.attn(branches).unbind(1)
    assert_close(layer(x), first * branches[0] + second * branches[1], length=layer)


def test_select_sum_has_no_attention():
    layer = make_layer(select='sum', kernel_sizes=(3, 5, 7))
    assert layer.attn is None
    assert not [key for key in layer.state_dict() if 'attn' in key]
    x = make_input()
    assert_close(layer(x), sum(make_branches(layer, x)), length=layer)
    # Nor does it share the attention's BatchNorm's trouble with a batch of one.
    assert layer.train()(make_input(1)).shape == (1, 64, 9, 9)


def paper(x, weights, strides, dilations, groups):
    """Eq. 1 to 6 for evaluation, from the weights alone, with indices where the paper has them."""

    def batch_norm(x, name):
        shape = [1, -1] + [1] * (x.ndim - 2)
        mean, var, scale, shift = (
            weights[f'{name}.{part}'].view(shape) for part in ('running_mean', 'running_var', 'weight', 'bias')
        )
        return (x - mean) / torch.sqrt(var + 1e-5) * scale + shift

    u = []
    for m, dilation in enumerate(dilations):
        kernel = weights[f'paths.{m}.conv.weight']
        conv = F.conv2d(x, kernel, None, strides, dilation * (kernel.shape[-1] // 2), dilation, groups)
        u.append(F.relu(batch_norm(conv, f'paths.{m}.bn')))
    total = sum(u)  # Eq. 1
    s = total.flatten(2).sum(2) / (total.shape[2] * total.shape[3])  # Eq. 2
    z = F.relu(batch_norm(s @ weights['attn.fc_reduce.weight'].flatten(1).T, 'attn.bn'))  # Eq. 3
    channels = u[0].shape[1]
    matrices = weights['attn.fc_select.weight'].flatten(1).split(channels)  # A, B, ...: (C, d) each
    exponentials = [torch.exp(z @ matrix.T) for matrix in matrices]
    attention = [e / sum(exponentials) for e in exponentials]  # Eq. 5
    return sum(a[:, :, None, None] * branch for a, branch in zip(attention, u))  # Eq. 6


@pytest.mark.parametrize('kernel_sizes', [(3, 5), (5, 7), (3, 5, 7)])
@pytest.mark.parametrize('stride', [1, 2])
def test_equals_the_papers_equations(kernel_sizes, stride):
    layer = make_layer(kernel_sizes=kernel_sizes, stride=stride).double()
    x = make_input().double()
    expected = paper(x, layer.state_dict(), stride, [(k - 1) // 2 for k in kernel_sizes], groups=32)
    assert_close(layer(x), expected, length=layer)


@pytest.mark.parametrize(
    ('second', 'parameters'),
    [
        ((3, 3, 32), 27_479_784),
        ((3, 2, 32), 27_479_784),
        ((3, 1, 32), 27_479_784),
        ((5, 1, 64), 28.03e6),
        ((7, 1, 128), 27.99e6),
    ],
)
def test_branches_of_table_6(second, parameters):
    branches = [(3, 1, 32), second]
    network = SKResNet((3, 4, 6, 3), block_args=dict(sk_kwargs=dict(branches=branches)), device='meta')
    count = sum(p.numel() for p in network.parameters())
    # The paper prints 28.1M for the last two.
    assert count == parameters if isinstance(parameters, int) else abs(count - parameters) < 5e3
    for module in network.modules():
        if isinstance(module, SelectiveKernel):
            assert [(p.conv.kernel_size[0], p.conv.dilation[0], p.conv.groups) for p in module.paths] == branches


@pytest.mark.parametrize(
    ('sk_kwargs', 'parameters', 'attention'),
    [(dict(select='sum'), 26_458_664, False), (dict(kernel_sizes=(3, 5, 7)), 29_249_512, True)],
    ids=str,
)
def test_networks_of_table_7(sk_kwargs, parameters, attention):
    network = SKResNet((3, 4, 6, 3), block_args=dict(sk_kwargs=sk_kwargs), device='meta')
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert any('attn' in key for key in network.state_dict()) == attention


def test_batch_of_one_in_training_is_refused():
    layer = make_layer(train=True)
    with pytest.raises(ValueError, match='batch of 1'):
        layer(make_input(1))
    with pytest.raises(ValueError, match='batch of 1'):
        layer.attn([make_input(1, size=1)] * 2)
    assert layer(make_input(2)).shape == (2, 64, 9, 9)


def test_batch_of_one_where_nothing_needs_a_batch():
    x = make_input(1)
    assert make_layer().eval()(x).shape == x.shape
    assert make_layer(train=True, norm_layer=GROUP_NORM)(x).shape == x.shape

    frozen = make_layer(train=True)
    for module in frozen.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    expected = copy.deepcopy(frozen).eval()(x)
    torch.testing.assert_close(frozen(x), expected, rtol=0, atol=0)

    frozen = timm.layers.freeze_batch_norm_2d(make_layer(train=True))
    assert_close(frozen(x), expected, length=frozen)


def test_group_norm_of_the_attention_sees_the_input():
    # One group a channel, as an 8-group norm of 8 channels on a 1x1 map has, would norm every z to the same value.
    layer = make_layer(norm_layer=GROUP_NORM, min_dim=8)
    z_norm = layer.attn.bn
    assert (z_norm.num_groups, z_norm.num_channels) == (1, 8)
    attention = layer.attn(make_branches(layer, make_input(2)))
    assert (attention[0] - attention[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ('kwargs', 'match'),
    [
        (dict(in_channels=0), 'in_channels=0 '),
        (dict(in_channels=64.0), 'in_channels=64.0 '),
        (dict(out_channels=-64), 'out_channels=-64 '),
        (dict(stride=0), 'stride=0 '),
        (dict(dilation=0), 'dilation=0 '),
        (dict(groups=0), 'groups=0 '),
        (dict(reduction=0), 'reduction=0 '),
        (dict(reduction=0.5), 'reduction=0.5 '),
        (dict(min_dim=0), 'min_dim=0 '),
        (dict(stride=True), 'stride=True '),
        (dict(stride=2**63), f'stride={2**63} must be an integer of at most 1048576'),
        (dict(in_channels=10**30), 'in_channels=1.* at most'),
        (dict(kernel_sizes=(3, 1025)), '1025.* 1023 at most'),
        (dict(dilated='no'), "dilated='no' must be True or False"),
        (dict(split_input=1), 'split_input=1 must be True or False'),
        (dict(conv_bias=None), 'conv_bias=None must be True or False'),
        (dict(act_layer='relu'), "act_layer='relu' must be a class"),
        (dict(norm_layer=None), 'norm_layer=None must be a class'),
        (dict(dtype=torch.int32), 'dtype=torch.int32 must be one of torch.float16'),
        (dict(backend=['plain']), r"backend=\['plain'\] is unknown"),
        (dict(select='best'), "select='best' .*'channel', 'shared', 'sum'"),
        (dict(select=None), 'select=None '),
        (dict(norm_position='input'), "norm_position='input' .*'branch', 'output', 'none'"),
        (dict(norm_position=None), 'norm_position=None '),
        (dict(kernel_sizes=()), r'kernel_sizes=\(\) .*at least one branch'),
        (dict(branches=[]), r'branches=\[\] .*at least one branch'),
        (dict(kernel_sizes=3), 'kernel_sizes=3 .*sequence'),
        (dict(kernel_sizes='35'), "kernel_sizes='35' must be a sequence"),
        (dict(kernel_sizes=(3, 4)), 'kernel_sizes .*4.* odd'),
        (dict(kernel_sizes=(3, 4), dilated=False), 'kernel_sizes .*4.* odd'),
        (dict(kernel_sizes=(3, 0)), 'kernel_sizes .*0.* positive'),
        (dict(kernel_sizes=(-3, 3)), 'kernel_sizes .*-3.* positive'),
        (dict(kernel_sizes=(3, 5.0)), r'kernel_sizes .*5\.0'),
        (dict(branches=[(3, 1, 32), (6, 1, 32)]), 'branches .*6.* odd'),
        (dict(branches=[(3, 1, 32), (5, 1)]), r'branches=.*\(5, 1\).*kernel_size, dilation, groups'),
        (dict(branches=[3, 5]), r'branches=\[3, 5\].*kernel_size, dilation, groups'),
        (dict(branches=[(3, 0, 32)]), 'dilation=0 '),
        (dict(branches=[(3, 1, -2)]), 'groups=-2 '),
        (dict(branches=[(3, 1, 32), (5, 1, 48)]), r'groups=48 .*\(64\).*out_channels \(64\)'),
        (dict(in_channels=48), r'groups=32 .*\(48\)'),
        (dict(out_channels=100), r'groups=32 .*out_channels \(100\)'),
        (dict(groups=64, split_input=True), r'groups=64 .*\(32\)'),
        (dict(kernel_sizes=(3, 5, 7), split_input=True), 'split_input=True .*3 branches.*in_channels=64'),
    ],
    ids=str,
)
def test_value_errors(kwargs, match):
    with pytest.raises(ValueError, match=match):
        SelectiveKernel(**{'in_channels': 64, **kwargs})


@each_variant
def test_torch_script(kwargs):
    layer = make_layer(**kwargs)
    scripted = torch.jit.script(layer)
    for x in (make_input(), make_input(1, size=5)):
        assert_close(scripted(x), layer(x), length=layer)


@each_variant
def test_torch_trace(kwargs):
    layer = make_layer(**kwargs)
    traced = torch.jit.trace(layer, make_input())
    for x in (make_input(), make_input(1, size=5)):
        assert_close(traced(x), layer(x), length=layer)


@each_variant
def test_torch_compile_without_a_graph_break(kwargs):
    # Training is what has something to break: the check of the batch. A random layer has nothing to compare there.
    train = 'drop_layer' not in kwargs
    torch.compiler.reset()
    layer = make_layer(train=train, **kwargs).double()
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend='aot_eager')
    x, y = make_input().double().requires_grad_(), make_input().double().requires_grad_()
    output, expected = compiled(x), layer(y)
    # The variance of two pooled values amplifies the rounding of the order in which they were summed.
    assert_close(output, expected, length=layer, gain=1e3)
    output.square().mean().backward()
    expected.square().mean().backward()
    assert_close(x.grad, y.grad, length=layer, gain=1e3)


def test_compiled_training_still_refuses_a_batch_of_one():
    torch.compiler.reset()
    compiled = torch.compile(make_layer(train=True), backend='aot_eager')
    compiled(make_input(3))
    # Dynamo wraps what it raises while tracing, and keeps the message.
    with pytest.raises(Exception, match='batch of 1'):
        compiled(make_input(1))


@each_variant
def test_torch_export(kwargs):
    layer = make_layer(**kwargs)
    dims = {0: torch.export.Dim('batch', min=1)}
    exported = torch.export.export(layer, (make_input(),), dynamic_shapes=(dims,)).module()
    for x in (make_input(), make_input(5)):
        assert_close(exported(x), layer(x), length=layer)


@each_variant
def test_fx_trace(kwargs):
    layer = make_layer(**kwargs)
    traced = torch.fx.symbolic_trace(layer)
    for x in (make_input(), make_input(1, size=5)):
        assert_close(traced(x), layer(x), length=layer)


def test_fx_trace_in_training_serves_evaluation():
    # Quantisation-aware training traces in training mode and evaluates later what it traced.
    layer = make_layer(train=True)
    traced = torch.fx.symbolic_trace(layer)
    with pytest.raises(ValueError, match=r'batch|more than 1 value'):
        traced(make_input(1))
    layer.eval()
    traced.eval()
    assert_close(traced(make_input(1)), layer(make_input(1)), length=layer)


class RecordShapes(TorchDispatchMode):
    """Notes the shape of every tensor that an operator returns, in forward and backward."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.shapes += [(str(func), tuple(t.shape)) for t in tree_leaves(output) if isinstance(t, torch.Tensor)]
        return output


def largest_tensors(layer, x):
    """Numbers of elements of the largest 5-D tensor, and of the largest of all, in one training step."""
    with RecordShapes() as record:
        layer(x).square().mean().backward()
    assert any('convolution_backward' in name for name, _ in record.shapes), 'the backward pass was not seen'
    sizes = [torch.Size(shape) for _, shape in record.shapes]
    return max((s.numel() for s in sizes if len(s) == 5), default=0), max(s.numel() for s in sizes)


@pytest.mark.parametrize('num_branches', [2, 3])
@pytest.mark.parametrize('select', ['channel', 'shared'])
def test_no_tensor_holds_all_branches(num_branches, select):
    layer = make_layer(train=True, select=select, kernel_sizes=(3, 5, 7)[:num_branches])
    x = make_input(2, size=16).requires_grad_()
    largest_5d, largest = largest_tensors(layer, x)
    assert 0 < largest_5d <= 2 * num_branches * 64
    assert largest == x.numel(), 'branches side by side in fewer than five dimensions'


def test_a_tensor_of_all_branches_would_be_seen():
    layer = timm.layers.SelectiveKernel(64, groups=32, split_input=False)
    largest_5d, _ = largest_tensors(layer, make_input(2, size=16))
    assert largest_5d == 2 * 2 * 64 * 16 * 16


def count(layer, kind):
    return sum(isinstance(module, kind) for module in layer.modules())


@pytest.mark.parametrize(
    ('convert', 'kind'),
    [
        (nn.SyncBatchNorm.convert_sync_batchnorm, nn.SyncBatchNorm),
        (timm.layers.convert_sync_batchnorm, nn.SyncBatchNorm),
        (timm.layers.freeze_batch_norm_2d, FrozenBatchNorm2d),
    ],
)
@pytest.mark.parametrize('kwargs', [{}, dict(select='sum'), dict(kernel_sizes=(3, 5, 7), split_input=False)], ids=str)
def test_converters_leave_outputs_unchanged(convert, kind, kwargs):
    layer = make_layer(**kwargs)
    norms = count(layer, nn.BatchNorm2d)
    x = make_input()
    expected = layer(x)
    converted = convert(copy.deepcopy(layer)).eval()
    assert count(converted, kind) == norms == len(layer.paths) + (layer.attn is not None)
    assert count(converted, nn.BatchNorm2d) == 0
    assert_close(converted(x), expected, length=layer)


def test_folding_batch_norms_leaves_outputs_unchanged():
    layer = make_layer()
    folded = fold_batch_norms(layer)
    assert count(folded, nn.BatchNorm2d) == 0
    assert_close(folded(make_input()), layer(make_input()), length=layer)


def test_activation_is_a_module_of_its_own():
    layer = SelectiveKernel(64, act_layer=timm.layers.get_act_layer('gelu'))
    assert count(layer, nn.ReLU) == 0
    assert [type(path.act) for path in layer.paths] == [timm.layers.get_act_layer('gelu')] * 2
    assert type(layer.paths[0].bn) is nn.BatchNorm2d


def test_autocast():
    layer = make_layer(train=True)
    with torch.autocast('cpu', torch.bfloat16):
        output = layer(make_input(4))
    assert output.dtype == torch.bfloat16
    expected = make_layer(train=True)(make_input(4))
    assert (output - expected).norm() < 0.02 * expected.norm()
    output.float().square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters())


def test_channels_last():
    layer = make_layer(train=True).double()
    x = make_input().double()
    expected = copy.deepcopy(layer)(x)
    output = layer.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert_close(output, expected, length=layer)


@pytest.mark.parametrize('kwargs', [{}, dict(norm_layer=GROUP_NORM)], ids=['batch norm', 'group norm'])
def test_device_and_dtype(kwargs):
    layer = SelectiveKernel(64, device='meta', dtype=torch.float64, **kwargs)
    for name, tensor in layer.state_dict().items():
        assert tensor.device.type == 'meta', name
        assert tensor.dtype == (torch.int64 if name.endswith('num_batches_tracked') else torch.float64), name


def test_init_weights_of_the_attention():
    attention = SelectiveKernelAttention(512, num_branches=2, dim=32)
    attention.init_weights()
    for layer in (attention.fc_reduce, attention.fc_select):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert layer.weight.mean().item() == pytest.approx(0, abs=5e-4)


def test_split_input_refuses_other_channels():
    with pytest.raises(RuntimeError, match='channels'):
        SelectiveKernel(64, split_input=True)(torch.randn(2, 128, 8, 8))


# What other projects do differently (PAPER.md, last section), each by its own equations.


def restate(x, weights, kernels, groups, conv_bias, norms, norm_position, shared, reduce_norm, reduce_act, select_bias):
    """The design that the arguments name, for evaluation, from the weights alone."""

    def batch_norm(x, name):
        mean, var, scale, shift = (
            weights[f'{name}.{part}'].view(1, -1, 1, 1) for part in ('running_mean', 'running_var', 'weight', 'bias')
        )
        return (x - mean) / torch.sqrt(var + 1e-5) * scale + shift

    maps = []
    for m, kernel in enumerate(kernels):
        bias = weights[f'paths.{m}.conv.bias'] if conv_bias else None
        u = F.conv2d(x, weights[f'paths.{m}.conv.weight'], bias, padding=kernel // 2, groups=groups)
        maps.append(F.relu(batch_norm(u, f'paths.{m}.bn')) if norms and norm_position == 'branch' else u)
    s = sum(u.mean((2, 3), keepdim=True) for u in maps)
    z = F.conv2d(s, weights['attn.fc_reduce.weight'], weights.get('attn.fc_reduce.bias'))
    z = batch_norm(z, 'attn.bn') if reduce_norm else z
    z = F.relu(z) if reduce_act else z
    rows = 1 if shared else maps[0].shape[1]
    logits = []
    for m in range(len(kernels)):
        part = slice(m * rows, (m + 1) * rows)
        bias = weights['attn.fc_select.bias'][part] if select_bias else None
        logits.append(F.conv2d(z, weights['attn.fc_select.weight'][part], bias).exp())
    v = sum(logit / sum(logits) * u for logit, u in zip(logits, maps))
    return F.relu(batch_norm(v, 'bn')) if norms and norm_position == 'output' else v


DESIGNS = {
    'select bias': dict(select_bias=True),
    'z without a norm': dict(reduce_norm=False),
    'z without an activation': dict(reduce_act=False),
    'pppLang': dict(conv_bias=True, reduce_norm=False, reduce_act=False, select_bias=True),
    'lucid': dict(norm_position='output', shared=True),
    'norm at the output, one softmax per channel': dict(norm_position='output', conv_bias=True),
    'Keras': dict(norms=False, conv_bias=True, reduce_norm=False, reduce_act=False, select_bias=True),
}


@pytest.mark.parametrize('kernels', [(3, 5), (1, 3, 5)])
@pytest.mark.parametrize('design', DESIGNS.values(), ids=DESIGNS.keys())
def test_designs_of_other_projects(design, kernels):
    plain = dict(
        conv_bias=False, norms=True, norm_position='branch', shared=False, reduce_norm=True, reduce_act=True,
        select_bias=False,
    )  # fmt: skip
    design = {**plain, **design}
    arguments = {k: v for k, v in design.items() if k not in ('norms', 'shared')}
    if not design['norms']:  # bare convolutions, with nothing after the selection either
        arguments.update(norm_layer=nn.Identity, act_layer=nn.Identity)
    select = 'shared' if design['shared'] else 'channel'
    layer = make_layer(16, kernel_sizes=kernels, dilated=False, groups=4, min_dim=8, select=select, **arguments)
    for name, parameter in layer.named_parameters():
        if name in ('attn.fc_reduce.bias', 'attn.fc_select.bias') or name.endswith('conv.bias'):
            nn.init.normal_(parameter)
    layer.double()
    weights = layer.state_dict()
    x = make_input(channels=16).double()
    output = layer(x)
    assert_close(output, restate(x, weights, kernels, 4, **design), length=layer)
    for name in ('reduce_act', 'conv_bias', 'select_bias'):
        if design[name] != plain[name]:
            without = restate(x, weights, kernels, 4, **{**design, name: plain[name]})
            assert (output - without).abs().max() > 1e-3, name


def test_init_weights_zeroes_the_biases_of_the_attention():
    attention = SelectiveKernelAttention(64, num_branches=2, dim=16, select_bias=True, reduce_norm=False)
    attention.init_weights()
    assert attention.fc_reduce.bias.shape == (16,)
    assert attention.fc_select.bias.shape == (128,)
    assert not attention.fc_reduce.bias.any()
    assert not attention.fc_select.bias.any()


def test_without_a_norm_in_z_a_batch_of_one_trains():
    layer = SelectiveKernel(64, reduce_norm=False).train()
    layer(make_input(1)).square().mean().backward()
    assert layer.attn.fc_reduce.weight.grad.any()
