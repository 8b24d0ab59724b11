"""Features of any stage, by each of timm's ways to them."""

import itertools

import pytest
import timm
import torch
from helpers.narrow_models import (
    KINDS,
    each_kind,
    each_model,
    feature_shapes,
    is_shuffle,
    is_small,
    make_input,
    make_model,
    narrow,
)
from helpers.tolerances import assert_close
from timm.models import FeatureListNet


@each_model
def test_features_only(name):
    model = timm.create_model(name, features_only=True, device='meta').eval()
    channels, reductions, _ = feature_shapes(name)
    assert isinstance(model, FeatureListNet)
    assert model.feature_info.channels() == channels
    assert model.feature_info.reduction() == reductions
    features = model(torch.empty(2, 3, 96, 96, device='meta'))
    assert [tuple(feature.shape) for feature in features] == [
        (2, c, 96 // reduction, 96 // reduction) for c, reduction in zip(channels, reductions)
    ]
    assert not [key for key in model.state_dict() if key.startswith(('fc', 'conv5'))]


INDICES = [(0,), (3,), (1, 3), (0, 1, 2, 3), (-1,), (-2, -1)]


@pytest.mark.parametrize(
    ('name', 'feature_cls', 'out_indices'),
    [
        *itertools.product(['sknet26', 'skshufflenetv2_x0_5'], [None, 'dict', 'hook', 'fx', 'getter'], [(1, 3)]),
        *itertools.product(['sknet26', 'skshufflenetv2_x0_5'], [None], INDICES),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product(KINDS, [None, 'dict', 'hook', 'fx', 'getter'], [(1, 3)])
            if case[0] not in ('sknet26', 'skshufflenetv2_x0_5')
        ),
    ],
    ids=str,
)
@torch.no_grad()
def test_features_of_any_stage(name, feature_cls, out_indices):
    kwargs = {} if feature_cls is None else dict(feature_cls=feature_cls)
    whole = make_model(name)
    # timm takes the classifier out of the state dict, and would keep it where it is given the model's own.
    model = timm.create_model(
        name, **narrow(name), features_only=True, out_indices=out_indices, **kwargs,
        pretrained=True, pretrained_cfg_overlay=dict(state_dict=whole.state_dict(), num_classes=10),
    ).eval()  # fmt: skip
    channels, reductions, _ = feature_shapes(name, narrow=True)
    indices = [index % len(channels) for index in out_indices]
    assert model.feature_info.channels() == [channels[index] for index in indices]
    assert model.feature_info.reduction() == [reductions[index] for index in indices]
    x = make_input()
    features = model(x)
    features = list(features.values()) if isinstance(features, dict) else features
    expected = whole.forward_intermediates(x, indices=indices, intermediates_only=True)
    assert len(features) == len(indices)
    for feature, wanted in zip(features, expected):
        assert_close(feature, wanted, length=model)


@pytest.mark.parametrize('out_indices', [(0, 9), (-9,)], ids=str)
@each_kind
def test_features_that_are_not_there(name, out_indices):
    with pytest.raises((AssertionError, IndexError, ValueError)):
        timm.create_model(name, features_only=True, out_indices=out_indices, device='meta')


# torchvision warns where training and evaluation trace to different nodes, so that one name cannot serve both.
@pytest.mark.filterwarnings('error:NOTE:UserWarning')
@each_kind
def test_features_fx(name):
    model = timm.create_model(name, **narrow(name), features_only=True, feature_cls='fx', device='meta').eval()
    features = model(torch.empty(2, 3, 64, 64, device='meta'))
    assert [feature.shape[1] for feature in features] == feature_shapes(name, narrow=True)[0]


@each_kind
def test_forward_intermediates(name):
    model = timm.create_model(name, **narrow(name), device='meta').eval()
    x = torch.empty(2, 3, 96, 96, device='meta')
    channels, reductions, width = feature_shapes(name, narrow=True)
    output, intermediates = model.forward_intermediates(x)
    assert output.shape == (2, width, 96 // reductions[-1], 96 // reductions[-1])
    assert [tuple(i.shape) for i in intermediates] == [(2, c, 96 // r, 96 // r) for c, r in zip(channels, reductions)]
    assert [info['num_chs'] for info in model.feature_info] == channels
    assert [info['reduction'] for info in model.feature_info] == reductions


@each_kind
@torch.no_grad()
def test_values_of_forward_intermediates(name):
    model = make_model(name)
    x = make_input()
    output, intermediates = model.forward_intermediates(x)
    assert torch.equal(output, model.forward_features(x))
    last = len(feature_shapes(name)[0]) - 1
    assert len(intermediates) == last + 1
    # ShuffleNet's features end before the convolution that widens them for the classifier.
    assert torch.equal(output, model.conv5(intermediates[-1]) if is_shuffle(name) else intermediates[-1])
    for indices, kept in ((2, [last - 1, last]), ([0, 2], [0, 2]), ([-1], [last]), (None, [*range(last + 1)])):
        for stop_early in (False, True):
            some = model.forward_intermediates(x, indices=indices, intermediates_only=True, stop_early=stop_early)
            assert len(some) == len(kept)
            assert all(torch.equal(feature, intermediates[index]) for feature, index in zip(some, kept))
    again, some = model.forward_intermediates(x, indices=[1], norm=True, output_fmt='NCHW')
    assert torch.equal(again, output)
    assert torch.equal(some[0], intermediates[1])
    with pytest.raises((AssertionError, ValueError)):
        model.forward_intermediates(x, output_fmt='NLC')
    with pytest.raises((AssertionError, IndexError, ValueError)):
        model.forward_intermediates(x, indices=[last + 1])


@each_kind
@torch.no_grad()
def test_stopping_early_runs_no_later_stage(name):
    model = make_model(name)
    ran = []
    for child_name, child in model.named_children():
        child.register_forward_hook(lambda *_, child_name=child_name: ran.append(child_name))
    model.forward_intermediates(make_input(), indices=[2], stop_early=True, intermediates_only=True)
    late = {'stage3', 'stage4', 'conv5', 'fc'} if is_shuffle(name) else {'layer3', 'fc'}
    assert ran
    assert not late & set(ran)


@each_kind
@torch.no_grad()
def test_prune_intermediate_layers(name):
    model = make_model(name)
    x = make_input()
    expected = model.forward_intermediates(x, indices=[1, 2], intermediates_only=True)
    assert list(model.prune_intermediate_layers([1, 2])) == [1, 2]
    late = ('stage3', 'stage4', 'conv5', 'fc') if is_shuffle(name) else ('layer3', 'layer4', 'fc')
    assert not [key for key in model.state_dict() if key.startswith(late)]
    kept = model.forward_intermediates(x, indices=[1, 2], intermediates_only=True)
    assert all(torch.equal(feature, wanted) for feature, wanted in zip(kept, expected))


@each_kind
@torch.no_grad()
def test_prune_the_head_alone(name):
    x = make_input()
    for prune_head in (True, False):
        model = make_model(name)
        expected = model.forward_intermediates(x, indices=1, intermediates_only=True)
        logits = model(x)
        last = len(model.feature_info) - 1
        assert list(model.prune_intermediate_layers(1, prune_head=prune_head)) == [last]
        assert torch.equal(model.forward_intermediates(x, indices=1, intermediates_only=True)[0], expected[0])
        if prune_head:
            assert torch.equal(model(x), expected[0]), 'nothing but the features is left'
        else:
            assert torch.equal(model(x), logits)


@pytest.mark.parametrize('output_stride', [8, 16, 32])
@each_kind
def test_features_at_output_stride(name, output_stride):
    kwargs = dict(narrow(name), output_stride=output_stride, device='meta')
    channels, reductions, width = feature_shapes(name, narrow=True)
    # A network with a small stem says what strides a full-size stem would give.
    least = output_stride // 4 if is_small(name) else output_stride
    reductions = [min(reduction, least) for reduction in reductions]
    x = torch.empty(2, 3, 96, 96, device='meta')
    model = timm.create_model(name, features_only=True, **kwargs).eval()
    assert model.feature_info.reduction() == reductions
    shapes = [(2, c, 96 // reduction, 96 // reduction) for c, reduction in zip(channels, reductions)]
    assert [tuple(feature.shape) for feature in model(x)] == shapes
    assert timm.create_model(name, **kwargs).eval().forward_features(x).shape == (2, width, *shapes[-1][2:])


@pytest.mark.parametrize('out_indices', [0, 6, (0, 5), (-6,), (), (1.0,), True, 'last', None, 3, (2, 0), (-1,)])
def test_out_indices_are_timms_to_check(out_indices):
    def outcome(name):
        try:
            model = timm.create_model(name, layers=(1, 1, 1, 1), features_only=True, out_indices=out_indices)
        except Exception as error:
            return type(error), str(error)
        return model.feature_info.channels(), model.feature_info.reduction()

    with torch.device('meta'):
        assert outcome('sknet50') == outcome('skresnext50_32x4d')
