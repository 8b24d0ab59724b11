"""The networks' arguments, drawn, through timm's door, mmpretrain's and neither: a network that is right, or an error
that says what is wrong."""

import math

import pytest
import timm
import torch
from helpers.fuzzing import ANYTHING, assert_named, count_parameters, fuzz, tally
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.modules.batchnorm import _BatchNorm

import sk_plugins  # noqa: F401 - registers the models
from sk_plugins.networks import SKResNet, SKShuffleNetV2

MODELS = pytest.importorskip('mmpretrain.registry').MODELS
pytest.importorskip('sk_plugins.mmpretrain_models')


def several(values, sizes):
    return sizes.flatmap(lambda size: st.lists(values, min_size=size, max_size=size).map(tuple))


@st.composite
def sk_kwargs(draw, groups):
    """Of a network whose SK convolutions have an even number of channels where ``groups`` is even."""
    kwargs = draw(
        st.fixed_dictionaries(
            {},
            optional=dict(
                kernel_sizes=st.lists(st.sampled_from([1, 3, 5, 7]), min_size=1, max_size=3),
                reduction=st.integers(1, 32),
                min_dim=st.integers(1, 8),
                dilated=st.booleans(),
                select=st.sampled_from(['channel', 'shared', 'sum']),
                select_bias=st.booleans(),
                conv_bias=st.booleans(),
                norm_position=st.sampled_from(['branch', 'output']),
                backend=st.sampled_from(['plain', 'recompute']),
            ),
        )
    )
    if groups % 2 == 0 and draw(st.booleans()):
        kwargs.update(split_input=True, groups=1, kernel_sizes=draw(st.sampled_from([(3, 5), (1, 3)])))
    return kwargs


@st.composite
def resnets(draw):
    """Arguments of an SKResNet that can be built, no wider than tests have time for."""
    stages = draw(st.integers(3, 4))
    basic = draw(st.booleans())
    args = dict(
        layers=draw(several(st.integers(1, 2), st.just(stages))),
        channels=draw(several(st.sampled_from([4, 8, 12, 16]), st.just(stages))),
        block='basic' if basic else 'bottleneck',
        cardinality=1 if basic else draw(st.sampled_from([1, 2, 4])),
        base_width=64 if basic else draw(st.sampled_from([16, 32, 64])),
        unit=draw(st.sampled_from(['sk', 'sk', 'plain', 'se'])),
        output_stride=draw(st.sampled_from([8, 16, 32])),
        small_stem=draw(st.booleans()),
        zero_init_last=draw(st.booleans()),
        in_chans=draw(st.integers(1, 4)),
        num_classes=draw(st.integers(0, 5)),
        avg_down=draw(st.booleans()),
        down_kernel_size=draw(st.sampled_from([1, 3])),
        drop_rate=draw(st.floats(0, 1)),
        drop_path_rate=draw(st.floats(0, 1)),
        drop_block_rate=draw(st.sampled_from([0.0, 0.2])),
        global_pool=draw(st.sampled_from(['avg', 'max', 'avgmax', 'fast'])).replace('fast', 'fastavg'),
    )
    if not args['small_stem'] and draw(st.booleans()):
        args.update(stem_type='deep', stem_width=draw(st.integers(1, 9)))
    if args['unit'] == 'sk':
        args['sk_kwargs'] = draw(sk_kwargs(4 if basic else args['cardinality']))
    return args


@st.composite
def shufflenets(draw):
    unit = draw(st.sampled_from(['sk', 'sk', 'plain', 'se']))
    args = dict(
        channels=draw(several(st.sampled_from([4, 8, 12]), st.just(3))),
        layers=draw(several(st.integers(1, 3), st.just(3))),
        stem_channels=draw(st.integers(1, 9)),
        head_channels=draw(st.integers(1, 9)),
        unit=unit,
        num_classes=draw(st.integers(0, 5)),
        in_chans=draw(st.integers(1, 4)),
        output_stride=draw(st.sampled_from([8, 16, 32])),
        global_pool=draw(st.sampled_from(['avg', 'max', 'avgmax'])),
        drop_rate=draw(st.floats(0, 1)),
    )
    if unit == 'sk':
        args['sk_kwargs'] = draw(sk_kwargs(2))
    return args


SIDES = st.integers(1, 40)


def strides_and_dilations(number, output_stride, first):
    """Stride and dilation of every stage, where so much of the stride is gone before the first."""
    so_far, dilation, found = 4, 1, []
    for stage in range(number):
        stride = 1 if stage == 0 and first else 2
        if so_far >= output_stride:
            dilation, stride = dilation * stride, 1
        so_far *= stride
        found.append((stride, dilation))
    return found


def count_resnet(args):
    """Parameters of an SKResNet by Table 1, convolution by convolution."""
    in_chans, sk = args.get('in_chans', 3), args.get('sk_kwargs') or {}
    if args.get('stem_type'):
        width = args['stem_width']
        inplanes = 2 * width
        total = 9 * (in_chans * width + width * width + width * inplanes) + 4 * width
    else:
        inplanes = 64
        total = in_chans * inplanes * (9 if args.get('small_stem') else 49)
    total += 2 * inplanes
    basic = args.get('block', 'bottleneck') == 'basic'
    cardinality, base_width = args.get('cardinality', 32), args.get('base_width', 4)
    steps = strides_and_dilations(len(args['layers']), args.get('output_stride', 32), first=True)
    for units, planes, (stride, dilation) in zip(args['layers'], args['channels'], steps):
        out = planes * (1 if basic else 4)
        for unit in range(units):
            if unit == 0 and (stride != 1 or inplanes != out):
                plain = args.get('avg_down') or (stride, dilation) == (1, 1)
                total += inplanes * out * (1 if plain else args.get('down_kernel_size', 1) ** 2) + 2 * out
            width = planes if basic else int(planes * base_width / 64) * cardinality
            middle_in = inplanes if basic else width
            groups = 1 if basic else cardinality
            if args.get('unit', 'sk') == 'sk':
                total += count_parameters({'in_channels': middle_in, 'out_channels': width, 'groups': groups, **sk})
            else:
                total += 9 * middle_in * width // groups + 2 * width
            total += 9 * width * out + 2 * out if basic else inplanes * width + 2 * width + width * out + 2 * out
            if args.get('unit') == 'se':
                hidden = max(8, int(out / 16 + 4) // 8 * 8)
                total += 2 * out * hidden + hidden + out
            inplanes = out
    return total + classifier(inplanes, args)


def count_shufflenet(args):
    width, sk = args['stem_channels'], args.get('sk_kwargs') or {}
    total = 9 * args['in_chans'] * width + 2 * width
    for units, out in zip(args['layers'], args['channels']):
        half = out // 2
        pointwise = half * half + 2 * half
        for unit in range(units):
            if unit == 0:
                total += 11 * width + 2 * (width * half + 2 * half) + 11 * half + pointwise
            elif args['unit'] == 'sk':
                total += 2 * pointwise + count_parameters({'in_channels': half, 'groups': half, **sk})
            else:
                total += 2 * pointwise + 11 * half
            if args['unit'] == 'se':
                total += 2 * half * 32 + 32 + half
        width = out
    head = args['head_channels']
    return total + width * head + 2 * head + classifier(head, args)


def classifier(features, args):
    classes = args.get('num_classes', 0)
    return (features + 1) * classes


def maps_of_resnet(args, side):
    """Side and channels of the stem's map and every stage's."""
    small = args.get('small_stem')
    stem = side if small else math.ceil(side / 2)
    shapes = [(2 * args['stem_width'] if args.get('stem_type') else 64, stem)]
    side = stem if small else math.ceil(stem / 2)
    expansion = 1 if args.get('block') == 'basic' else 4
    steps = strides_and_dilations(len(args['layers']), args.get('output_stride', 32), first=True)
    for planes, (stride, _) in zip(args['channels'], steps):
        side = math.ceil(side / stride)
        shapes.append((planes * expansion, side))
    return shapes


def maps_of_shufflenet(args, side):
    side = math.ceil(side / 2)
    shapes = [(args['stem_channels'], side)]
    side = math.ceil(side / 2)
    shapes.append((args['stem_channels'], side))
    for out, (stride, _) in zip(args['channels'], strides_and_dilations(3, args['output_stride'], first=False)):
        side = math.ceil(side / stride)
        shapes.append((out, side))
    return [*shapes, (args['head_channels'], side)]


def shapes(maps, outputs):
    assert [(m.shape[1], m.shape[2], m.shape[3]) for m in outputs] == [(c, side, side) for c, side in maps]


def assert_learns(network, outputs):
    """Every parameter that may learn has a finite gradient, and no other has one."""
    sum(output.float().square().mean() for output in outputs).backward()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f'{name} has no gradient'
            assert torch.isfinite(parameter.grad).all(), f'{name} has a gradient that is not finite'
        else:
            assert parameter.grad is None, f'{name} is frozen and has a gradient'
    assert all(torch.isfinite(b).all() for b in network.buffers())


def number(network):
    return sum(parameter.numel() for parameter in network.parameters())


@fuzz(quick=12)
@given(st.one_of(resnets(), shufflenets()), SIDES)
def test_networks(args, side):
    resnet = 'stem_channels' not in args
    network = (SKResNet if resnet else SKShuffleNetV2)(**args)
    assert number(network) == (count_resnet if resnet else count_shufflenet)(args)
    maps = (maps_of_resnet if resnet else maps_of_shufflenet)(args, side)
    x = torch.randn(2, args['in_chans'], side, side)
    logits = network(x)
    assert logits.shape == (2, args['num_classes'] or maps[-1][0])
    assert_learns(network, [logits])
    network.eval()
    with torch.no_grad():
        features = network.forward_intermediates(x, intermediates_only=True)
        shapes(maps[: len(features)], features)
        assert len(features) == (len(maps) if resnet else len(maps) - 1)
        assert torch.isfinite(network(x[:1])).all()
    tally('networks: built')


@fuzz(quick=8, share=0.5)
@given(st.one_of(resnets(), shufflenets()), SIDES, st.data())
def test_timms_door(args, side, data):
    resnet = 'stem_channels' not in args
    maps = (maps_of_resnet if resnet else maps_of_shufflenet)(args, side)[: None if resnet else -1]
    indices = st.lists(
        st.integers(-len(maps), len(maps) - 1), min_size=1, max_size=3, unique_by=lambda i: i % len(maps)
    )
    out_indices = data.draw(st.one_of(st.integers(1, len(maps)), indices), label='out_indices')
    args.pop('global_pool')
    name = 'sknet26' if resnet else 'skshufflenetv2_x1_0'
    network = timm.create_model(name, features_only=True, out_indices=out_indices, **args)
    chosen = range(-out_indices, 0) if isinstance(out_indices, int) else out_indices
    chosen = sorted({i % len(maps) for i in chosen})
    x = torch.randn(2, args['in_chans'], side, side)
    outputs = network(x)
    shapes([maps[i] for i in chosen], outputs)  # in the network's order, whatever that of out_indices
    assert_learns(network, outputs)
    tally("networks: built through timm's door")


@fuzz(quick=10, share=0.5)
@given(st.one_of(resnets(), shufflenets()), SIDES, st.data())
def test_mmpretrains_door(args, side, data):
    resnet = 'stem_channels' not in args
    for name in ('num_classes', 'global_pool', 'drop_rate'):
        args.pop(name)
    maps = (maps_of_resnet if resnet else maps_of_shufflenet)(args, side)[1 if resnet else 2 :]
    given_ = dict(
        out_indices=data.draw(
            st.lists(st.integers(0, len(maps) - 1), min_size=1, max_size=4, unique=True), label='out_indices'
        ),
        frozen_stages=data.draw(st.integers(-1, len(maps)), label='frozen_stages'),
        norm_eval=data.draw(st.booleans(), label='norm_eval'),
        with_cp=data.draw(st.booleans(), label='with_cp'),
        channels_last=data.draw(st.booleans(), label='channels_last'),
        norm_cfg=data.draw(st.sampled_from([None, dict(type='BN'), dict(type='GN', num_groups=1)]), label='norm_cfg'),
    )
    if not resnet:
        cfg = dict(type='SKShuffleNetV2', widen_factor=0.5)
    elif args['block'] == 'basic':
        cfg = dict(type='SKResNet', depth=18)
        split = 'split_input' in args.get('sk_kwargs', {})
        cfg['split_input'] = split
        if args['unit'] == 'sk':
            # The row's own arguments of the SK convolution hold where none are given.
            args['sk_kwargs'] = {'reduction': 8, 'min_dim': 16, **args['sk_kwargs']}
            args['sk_kwargs'].pop('split_input', None)
    else:
        cfg = dict(type='SKNet', depth=26)
    count = (count_resnet if resnet else count_shufflenet)(
        {**args, 'sk_kwargs': {**args.get('sk_kwargs', {}), 'split_input': cfg.get('split_input', False)}}
        if cfg.get('split_input')
        else args
    )
    in_channels = args.pop('in_chans')
    network = MODELS.build({**cfg, **args, **given_, 'in_channels': in_channels})
    assert number(network) == count
    network.train()
    x = torch.randn(2, in_channels, side, side)
    outputs = network(x)
    shapes([maps[i] for i in sorted(given_['out_indices'])], outputs)
    stages = network.stages
    frozen = {*network.stem, *stages[: given_['frozen_stages']]} if given_['frozen_stages'] >= 0 else set()
    frozen |= set(stages[max(given_['out_indices']) + 1 :])
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad == (name.split('.')[0] not in frozen), name
    if any(parameter.requires_grad for parameter in network.parameters()):
        assert_learns(network, [y for y in outputs if y.requires_grad])
    for name, module in network.named_modules():
        if isinstance(module, _BatchNorm):
            assert module.training == (not given_['norm_eval'] and name.split('.')[0] not in frozen), name
    tally("networks: built through mmpretrain's door")


def inner(args):
    return args['sk_kwargs'] if isinstance(args.get('sk_kwargs'), dict) else {}


def assert_unknown(error, args):
    """A TypeError is for a name that there is not; only the dict that is drawn holds such."""
    assert 'unexpected keyword argument' in str(error)
    assert inner(args)


# timm's and torch's own arguments are theirs to check.
OF_RESNETS = ('layers', 'channels', 'block', 'unit', 'cardinality', 'base_width', 'small_stem', 'sk_kwargs')
OF_SHUFFLENETS = ('channels', 'layers', 'stem_channels', 'head_channels', 'unit', 'output_stride', 'sk_kwargs')


@fuzz(quick=40, share=4)
@given(st.one_of(resnets(), shufflenets()), st.data())
def test_wrong_arguments(args, data):
    resnet = 'stem_channels' not in args
    known = sorted(OF_RESNETS if resnet else OF_SHUFFLENETS)
    for name in data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=2, unique=True), label='names'):
        args[name] = data.draw(ANYTHING, label=name)
    try:
        network = (SKResNet if resnet else SKShuffleNetV2)(**args, device='meta')
    except TypeError as error:
        assert_unknown(error, args)
        tally('networks: TypeError for an unknown name')
        return
    except ValueError as error:
        assert_named(error, {**args, **inner(args)})
        tally('networks: ValueError')
        return
    tally('networks: built, arguments drawn from anything')
    if args['channels'] is None:
        args['channels'] = (64, 128, 256, 512)
    network.eval()
    logits = network(torch.empty(2, args['in_chans'], 17, 17, device='meta'))
    assert logits.shape[0] == 2
    assert number(network) == (count_resnet if resnet else count_shufflenet)(args)


DOORS = {
    'SKNet': dict(depth=26, layers=(1, 1, 1, 1), channels=(4, 4, 4, 4), cardinality=2, base_width=32),
    'SKResNeXt': dict(depth=26, layers=(1, 1, 1), channels=(4, 4, 4), groups=2, width_per_group=32),
    'SKResNet': dict(depth=18, layers=(1, 1, 1, 1), channels=(4, 4, 4, 4), split_input=True),
    'SKShuffleNetV2': dict(widen_factor=0.5, layers=(1, 1, 1), channels=(4, 4, 4), unit='sk'),
}
OF_DOORS = ('out_indices', 'frozen_stages', 'norm_eval', 'with_cp', 'channels_last', 'sk_kwargs')


@fuzz(quick=25, share=2)
@given(st.sampled_from(sorted(DOORS)), st.data())
def test_wrong_arguments_at_mmpretrains_door(kind, data):
    args = dict(DOORS[kind])
    known = sorted({*args, *OF_DOORS})
    for name in data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=2, unique=True), label='names'):
        args[name] = data.draw(ANYTHING, label=name)
    try:
        network = MODELS.build(dict(type=kind, **args))
    except (ValueError, TypeError) as error:
        if isinstance(error, TypeError):
            assert_unknown(error, args)
        else:
            timms = {'groups': 'cardinality', 'width_per_group': 'base_width'}
            assert_named(error, {**inner(args), **args, **{timms[k]: args[k] for k in timms.keys() & args.keys()}})
        tally(f"networks: {type(error).__name__} at mmpretrain's door")
        return
    tally("networks: built, arguments drawn from anything at mmpretrain's door")
    outputs = network.eval()(torch.randn(1, 3, 9, 9))
    wanted = args.get('out_indices')
    assert len(outputs) == (1 if wanted is None else len(wanted))
