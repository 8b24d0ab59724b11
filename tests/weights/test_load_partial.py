"""``load_partial``: what fits, and a report of it."""

import os

import pytest

pytest.importorskip('mmpretrain')

import timm
import torch
import torchvision
from helpers.hub_server import FAULTS
from helpers.randomised import randomise
from helpers.tolerances import assert_close
from helpers.weight_files import RunsCode, differ, saved
from mmpretrain.registry import MODELS
from safetensors.torch import save

import sk_plugins.mmpretrain_models  # noqa: F401 - registers the backbones
from sk_plugins.weights import (
    CheckpointError,
    HubError,
    load_partial,
    save_mmengine_checkpoint,
    save_state_dict,
    to_mmpretrain,
)


@pytest.fixture(scope='module')
def torchvisions():
    """torchvision's ShuffleNetV2, whose names ours are, as training could leave it."""
    torch.manual_seed(0)
    return randomise(torchvision.models.shufflenet_v2_x0_5())


def names_of(state_dict):
    return {name for name in state_dict if not name.endswith('num_batches_tracked')}


@pytest.mark.parametrize(
    ('unit', 'counts'), [('plain', (282, 0, 0)), ('se', (282, 64, 0)), ('sk', (217, 208, 65))], ids=str
)
@pytest.mark.parametrize('factor', ['x0_5', 'x1_0'])
def test_load_partial_of_torchvisions(torchvisions, factor, unit, counts):
    tv = torchvisions if factor == 'x0_5' else torchvision.models.shufflenet_v2_x1_0()
    model = timm.create_model(f'{"" if unit == "plain" else unit}shufflenetv2_{factor}')
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = load_partial(model, tv.state_dict())
    assert (len(report.loaded), len(report.initialised), len(report.unused)) == counts
    after, given = model.state_dict(), tv.state_dict()
    assert {*report.loaded, *report.initialised} == names_of(after)
    assert {*report.loaded, *report.unused} == names_of(given)
    assert all(torch.equal(after[name], given[name]) for name in report.loaded)
    assert all(torch.equal(after[name], before[name]) for name in report.initialised)
    assert not any(torch.equal(given[name], before[name]) for name in report.loaded if name.endswith('conv1.0.weight'))
    # Every tensor of the SK convolutions and of squeeze-and-excitation, and nothing else.
    assert all('.branch2.3.' in name or '.branch2.8.' in name for name in report.initialised)
    assert all(name.split('.')[3] in ('3', '4') for name in report.unused)


def test_report_of_load_partial(torchvisions):
    report = load_partial(timm.create_model('skshufflenetv2_x0_5'), torchvisions.state_dict())
    assert str(report).splitlines() == [
        'loaded 217 of 425 tensors',
        'left as initialised: 208 tensors (stage2.1.branch2.3.attn.bn.bias, stage2.1.branch2.3.attn.bn.running_mean, '
        'stage2.1.branch2.3.attn.bn.running_var, stage2.1.branch2.3.attn.bn.weight, '
        'stage2.1.branch2.3.attn.fc_reduce.weight, stage2.1.branch2.3.attn.fc_select.weight and 202 more)',
        'not used: 65 tensors (stage2.1.branch2.3.weight, stage2.1.branch2.4.bias, stage2.1.branch2.4.running_mean, '
        'stage2.1.branch2.4.running_var, stage2.1.branch2.4.weight, stage2.2.branch2.3.weight and 59 more)',
    ]
    report = load_partial(timm.create_model('shufflenetv2_x0_5'), torchvisions.state_dict())
    assert str(report) == 'loaded 282 of 282 tensors\nleft as initialised: none\nnot used: none'


def test_load_partial_leaves_another_classifier(torchvisions):
    model = timm.create_model('shufflenetv2_x0_5', num_classes=10)
    before = model.fc.weight.clone()
    report = load_partial(model, torchvisions.state_dict())
    assert report.initialised == report.unused == ('fc.weight', 'fc.bias')
    assert torch.equal(model.fc.weight, before)
    assert str(report).splitlines()[1] == 'left as initialised: 2 tensors (fc.bias, fc.weight)'


SOURCES = ['dict', 'mmpretrain dict', 'file', 'path', 'mmengine file', 'safetensors', 'hf-hub', 'http']


@pytest.mark.parametrize('kind', SOURCES)
def test_sources_of_load_partial(hub, tmp_path, torchvisions, kind):
    weights = torchvisions.state_dict()
    source = {
        'dict': weights,
        'mmpretrain dict': to_mmpretrain(weights),
        'file': str(tmp_path / 'tv.pth'),
        'path': tmp_path / 'tv.pth',
        'mmengine file': tmp_path / 'mm.pth',
        'safetensors': tmp_path / 'tv.safetensors',
        'hf-hub': 'hf-hub:me/tv',
        'http': f'{hub.url}/me/tv/resolve/main/tv.pth',
    }[kind]
    save_state_dict(weights, tmp_path / 'tv.pth')
    save_state_dict(weights, tmp_path / 'tv.safetensors')
    save_mmengine_checkpoint(weights, tmp_path / 'mm.pth')
    files = {'tv.pth': 'tv.pth', 'model.safetensors': 'tv.safetensors'}
    hub.add('me/tv', {name: (tmp_path / file).read_bytes() for name, file in files.items()})
    model = timm.create_model('shufflenetv2_x0_5')
    report = load_partial(model, source)
    assert (len(report.loaded), report.initialised, report.unused) == (282, (), ())
    assert not differ(weights, model.state_dict())


def test_load_partial_into_a_backbone_of_openmmlab(torchvisions):
    backbone = MODELS.build(dict(type='SKShuffleNetV2', widen_factor=0.5, unit='se'))
    report = load_partial(backbone, torchvisions.state_dict())
    assert (len(report.loaded), len(report.initialised), report.unused) == (280, 64, ('fc.weight', 'fc.bias'))


@pytest.mark.parametrize(
    ('source', 'error', 'said'),
    [
        ({}, CheckpointError, 'holds no state dict of tensors'),
        ({'conv1.0.weight': torch.zeros(1)}, CheckpointError, 'state dict: none of its 1 tensors fits SKShuffleNetV2'),
        ('FOLDER/vgg.pth', CheckpointError, r'vgg\.pth: none of its \d+ tensors fits SKShuffleNetV2'),
        ('FOLDER/gone.pth', FileNotFoundError, r'gone\.pth: no such checkpoint file'),
        ('FOLDER/text.pth', CheckpointError, r'text\.pth: cannot be read as weights'),
        ('FOLDER/text.safetensors', CheckpointError, r'text\.safetensors: not a safetensors file'),
        ('hf-hub:me/gone', HubError, 'me/gone: repository not found'),
        ('hf-hub:gone', ValueError, "'gone' must be OWNER/NAME"),
        ('HUB/me/x/resolve/main/gone.pth', CheckpointError, r'^http://127.*gone\.pth: cannot be downloaded: .*404'),
        ('HUB/me/x/resolve/main/text.pth', CheckpointError, r'^http://127.*text\.pth: cannot be read as weights: '),
        ('http://127.0.0.1:9/x.pth', CheckpointError, r'x\.pth: cannot be downloaded: .*refused'),
    ],
    ids=str,
)
def test_load_partial_of_what_cannot_be_loaded(hub, tmp_path, source, error, said):
    (tmp_path / 'text.pth').write_text('no weights')
    (tmp_path / 'text.safetensors').write_text('no weights')
    torch.save({'features.0.weight': torch.zeros(8, 3, 3, 3)}, tmp_path / 'vgg.pth')
    hub.add('me/x', {'text.pth': b'no weights'})
    if isinstance(source, str):
        source = source.replace('FOLDER', str(tmp_path)).replace('HUB', hub.url)
    model = timm.create_model('shufflenetv2_x0_5')
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(error, match=said):
        load_partial(model, source)
    assert not differ(before, model.state_dict())


def test_load_partial_after_a_broken_download(hub, tmp_path, monkeypatch, torchvisions):
    """What came of the first try is not what the second finds."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(torch.hub, '_hub_dir', None)
    hub.add('me/x', {'tv.pth': saved(torchvisions.state_dict())})
    source = f'{hub.url}/me/x/resolve/main/tv.pth'
    model = timm.create_model('shufflenetv2_x0_5')
    hub.faults['me/x'] = FAULTS['truncated']
    with pytest.raises(CheckpointError, match=r'tv\.pth: not a file of torch\.save, or a damaged one: '):
        load_partial(model, source)
    assert [path for path in tmp_path.rglob('*.pth') if path.is_file()] == []
    hub.faults.clear()
    assert len(load_partial(model, source).loaded) == 282


def test_load_partial_runs_nothing(hub, tmp_path):
    hub.add('me/x', {'evil.pth': saved(RunsCode(os.mkdir, str(tmp_path / 'marker')))})
    with pytest.raises(CheckpointError, match=r'evil\.pth: '):
        load_partial(timm.create_model('shufflenetv2_x0_5'), f'{hub.url}/me/x/resolve/main/evil.pth')
    assert not (tmp_path / 'marker').exists()


@pytest.mark.parametrize('wrap', [lambda sd: {'state_dict': sd}, lambda sd: {f'module.{k}': v for k, v in sd.items()}])
def test_load_partial_takes_what_training_scripts_save(wrap):
    network = timm.create_model('skshufflenetv2_x0_5')
    given = {'conv1.0.weight': torch.ones_like(network.conv1[0].weight)}
    report = load_partial(network, wrap(given))
    assert report.loaded == ('conv1.0.weight',)
    assert (network.conv1[0].weight == 1).all()


@pytest.mark.parametrize(
    ('spoil', 'said'),
    [
        (lambda t: t.long(), r'of torch\.int64'),
        (lambda t: t > 0, r'of torch\.bool'),
        (lambda t: t.cfloat(), r'of torch\.complex64'),
        (lambda t: t.to_sparse(), 'sparse, quantised or nested'),
        (lambda t: t.to('meta'), 'without data'),
    ],
    ids=['integers', 'booleans', 'complex', 'sparse', 'meta'],
)
def test_a_partial_load_that_fails_changes_nothing(spoil, said):
    shape = dict(layers=(1, 1, 1), channels=(4, 4, 4), cardinality=2, base_width=32)
    model, other = (timm.create_model('sknet26', **shape) for _ in range(2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weights = {**other.state_dict(), 'fc.bias': spoil(other.fc.bias.detach())}
    with pytest.raises(CheckpointError, match=rf'fc\.bias is {said}'):
        load_partial(model, weights)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not torch.equal(other.conv1.weight, model.conv1.weight)


@pytest.mark.parametrize('classifier', [True, False])
def test_copies_of_timms_encoders(hub, classifier):
    """segmentation-models-pytorch's, with timm's names; whether they have the classifier is not known here."""
    narrow = dict(layers=(1, 1, 1, 1), cardinality=8, base_width=16)
    torch.manual_seed(0)
    encoder = randomise(timm.create_model('skresnext50_32x4d', **narrow))
    weights = {name: w for name, w in encoder.state_dict().items() if classifier or not name.startswith('fc.')}
    repo = 'smp-hub/timm-skresnext50_32x4d.imagenet'
    hub.add(repo, {'model.safetensors': save(weights)})
    model = timm.create_model('sknet50', **narrow).eval()
    report = load_partial(model, f'hf-hub:{repo}')
    assert report.initialised == (() if classifier else ('fc.weight', 'fc.bias'))
    assert report.unused == ()
    init_cfg = dict(type='Pretrained', checkpoint=f'hf-hub:{repo}')
    backbone = MODELS.build(dict(type='SKNet', depth=50, init_cfg=init_cfg, **narrow))
    backbone.init_weights()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = encoder.forward_features(x)
        assert_close(model.forward_features(x), expected, length=encoder)
        assert_close(backbone.eval()(x)[0], expected, length=encoder)
