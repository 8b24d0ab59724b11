"""Weights through timm's builder: files, downloads and saved folders."""

import hashlib
import re

import pytest
import safetensors.torch
import timm
import torch
from helpers.hub_server import FAULTS
from helpers.narrow_models import (
    KINDS,
    NARROW,
    assert_same_state,
    each_kind,
    make_input,
    make_model,
    make_model_as_loaded,
    narrow,
)
from helpers.randomised import randomise
from helpers.tolerances import assert_close
from timm.models import save_for_hf


@each_kind
@torch.no_grad()
def test_pretrained_weights_for_other_inputs_and_classes(name):
    state_dict = make_model(name).state_dict()
    first_conv = timm.get_pretrained_cfg(name).first_conv + '.weight'
    cfg = dict(state_dict=dict(state_dict), num_classes=10)
    model = make_model_as_loaded(name, cfg, in_chans=1)
    assert_close(model.state_dict()[first_conv], state_dict[first_conv].sum(1, keepdim=True), length=model)
    cfg = dict(state_dict=dict(state_dict), num_classes=10)
    model = make_model_as_loaded(name, cfg, num_classes=5)
    assert model.fc.weight.shape == (5, state_dict['fc.weight'].shape[1])
    loaded = model.state_dict()
    for key, tensor in state_dict.items():
        assert key.startswith('fc.') or torch.equal(loaded[key], tensor), key


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
@pytest.mark.parametrize('name', ['sknet26', 'sknet50'])
def test_checkpoint_path(tmp_path, suffix, name):
    kwargs = dict(NARROW, layers=(1, 1, 1, 1))
    trained = make_model(name, **kwargs)
    path = tmp_path / f'trained.{suffix}'
    if suffix == 'pth':
        torch.save(trained.state_dict(), path)
    else:
        safetensors.torch.save_file(trained.state_dict(), path)
    assert_same_state(timm.create_model(name, **kwargs, checkpoint_path=path), trained)
    # timm's training script wraps the state dict.
    if suffix == 'pth':
        torch.save(dict(state_dict=trained.state_dict(), epoch=3), path)
        assert_same_state(timm.create_model(name, **kwargs, checkpoint_path=str(path)), trained)


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
@pytest.mark.parametrize('name', ['sknet26', 'sknet50', 'sknet50.ra_in1k'])
def test_pretrained_cfg_overlay(tmp_path, suffix, name):
    kwargs = dict(NARROW, layers=(1, 1, 1, 1))
    trained = make_model(name, **kwargs)
    path = tmp_path / f'trained.{suffix}'
    if suffix == 'pth':
        torch.save(trained.state_dict(), path)
    else:
        safetensors.torch.save_file(trained.state_dict(), path)
    overlay = dict(file=str(path), num_classes=10, mean=(0.5, 0.5, 0.5))
    model = timm.create_model(name, **kwargs, pretrained=True, pretrained_cfg_overlay=overlay)
    assert_same_state(model, trained)
    assert model.pretrained_cfg['mean'] == (0.5, 0.5, 0.5)
    assert timm.data.resolve_model_data_config(model)['mean'] == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ('kwargs', 'tensor'),
    [(dict(layers=(2, 2, 1, 2)), r'layer3\.1\.'), (dict(base_width=8), r'layer1\.0\.conv1\.conv\.weight')],
    ids=['names', 'shapes'],
)
@pytest.mark.parametrize('num_classes', [10, 3])
def test_weights_that_do_not_fit(tmp_path, kwargs, tensor, num_classes):
    path = tmp_path / 'trained.pth'
    torch.save(make_model(**kwargs).state_dict(), path)
    overlay = dict(file=str(path), num_classes=10)
    with pytest.raises(RuntimeError, match=tensor):
        timm.create_model(
            'sknet26', **dict(NARROW, num_classes=num_classes), pretrained=True, pretrained_cfg_overlay=overlay
        )


@pytest.mark.parametrize('what', ['a list', 'integers', 'a flipped bit'])
def test_files_that_are_damaged(tmp_path, what):
    path = tmp_path / 'trained.pth'
    state_dict = make_model().state_dict()
    if what == 'integers':
        state_dict['bn1.weight'] = state_dict['bn1.weight'].long()
    torch.save([state_dict] if what == 'a list' else state_dict, path)
    if what == 'a flipped bit':
        data = bytearray(path.read_bytes())
        data[data.index(state_dict['conv1.weight'].numpy().tobytes()) + 40] ^= 4
        path.write_bytes(data)
    said = {'a list': 'no state dict', 'integers': r'bn1\.weight is of torch\.int64', 'a flipped bit': 'checksum'}
    with pytest.raises(RuntimeError, match=rf'sknet26: the weights of .*trained\.pth cannot be loaded: .*{said[what]}'):
        timm.create_model('sknet26', **NARROW, pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))


def test_a_file_does_not_stay_in_memory(tmp_path):
    path = tmp_path / 'trained.pth'
    torch.save(make_model().state_dict(), path)
    overlay = dict(file=str(path), num_classes=10)
    model = timm.create_model('sknet26', **NARROW, pretrained=True, pretrained_cfg_overlay=overlay)
    assert model.pretrained_cfg['file'] == str(path)
    assert 'state_dict' not in model.pretrained_cfg


TORCHVISION = 'shufflenet_v2_x0_5'


@pytest.fixture
def published(hub, tmp_path, monkeypatch):
    """A server with a file of torchvision's shape whose name holds its hash, as theirs do, and an empty cache."""
    models = pytest.importorskip('torchvision').models
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'torch'))
    reference = randomise(models.get_model(TORCHVISION, weights=None))
    torch.save(reference.state_dict(), tmp_path / 'weights.pth')
    data = (tmp_path / 'weights.pth').read_bytes()
    file = f'shufflenet-{hashlib.sha256(data).hexdigest()[:10]}.pth'
    hub.add('pytorch/models', {file: data, 'shufflenet.pth': data, 'text-0123456789.pth': b'not a model'})
    hub.reference = reference
    hub.address = f'{hub.url}/pytorch/models/resolve/main/{file}'
    hub.checkpoints = tmp_path / 'torch' / 'checkpoints'
    return hub


def load_published(url, name='shufflenetv2_x0_5', **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(url=url), **kwargs)


@torch.no_grad()
def test_published_weights_of_shufflenet(published):
    x = make_input()
    model = load_published(published.address).eval()
    assert_same_state(model, published.reference)
    assert_close(model(x), published.reference(x), length=model)
    requests = len(published.requests)
    gray = load_published(published.address, num_classes=7, in_chans=1)
    assert len(published.requests) == requests, 'the cached file was there'
    assert gray.fc.weight.shape == (7, 1024)
    assert gray.conv1[0].weight.shape == (24, 1, 3, 3)
    features = load_published(published.address, features_only=True).eval()
    assert_close(features(x)[-1], model.forward_intermediates(x, intermediates_only=True)[-1], length=model)
    tagged = load_published(published.address, 'shufflenetv2_x0_5.tv_in1k')
    assert_same_state(tagged, published.reference)


@pytest.mark.parametrize('fault', ['truncated', 'short', 'garbage'])
def test_damaged_download_of_shufflenet(published, fault):
    published.faults['*'] = FAULTS[fault]
    with pytest.raises(RuntimeError, match=rf'shufflenetv2_x0_5: .*{re.escape(published.address)}.*(hash|read)'):
        load_published(published.address)
    assert list(published.checkpoints.iterdir()) == [], 'the damaged file stayed in the cache'
    published.faults.clear()
    assert_same_state(load_published(published.address), published.reference)


@pytest.mark.parametrize('fault', ['down', 'missing', 'unauthorized'])
def test_server_that_refuses(published, fault):
    published.faults['*'] = FAULTS[fault]
    with pytest.raises(RuntimeError, match=rf'shufflenetv2_x0_5: .*{re.escape(published.address)}.*HTTP Error'):
        load_published(published.address)
    assert list(published.checkpoints.iterdir()) == []


def test_unreachable_address(published):
    published.stop()
    with pytest.raises(RuntimeError, match=rf'shufflenetv2_x0_5: .*{re.escape(published.address)}.*refused'):
        load_published(published.address)


def test_published_file_is_none(published):
    address = published.address.rpartition('/')[0] + '/text-0123456789.pth'
    with pytest.raises(RuntimeError, match=rf'shufflenetv2_x0_5: .*{re.escape(address)}.*hash'):
        load_published(address)


@pytest.mark.parametrize('num_classes', [1000, 7])
@pytest.mark.parametrize(
    ('name', 'said'), [('shufflenetv2_x1_0', r'is \(.*, not \('), ('skshufflenetv2_x0_5', 'missing')]
)
def test_weights_of_another_shufflenet(published, name, said, num_classes):
    with pytest.raises(RuntimeError, match=rf'{name}: .*{re.escape(published.address)}.*({said})'):
        load_published(published.address, name, num_classes=num_classes)


@pytest.mark.parametrize('content', [b'', b'not a model', 'half'], ids=['empty', 'text', 'truncated'])
@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_damaged_file_of_shufflenet(tmp_path, content, suffix):
    path = tmp_path / f'weights.{suffix}'
    state_dict = make_model('shufflenetv2_x0_5').state_dict()
    torch.save(state_dict, path) if suffix == 'pth' else safetensors.torch.save_file(state_dict, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content == 'half' else content)
    with pytest.raises(RuntimeError, match=rf'shufflenetv2_x0_5: .*{re.escape(str(path))} cannot be loaded'):
        make_model_as_loaded('shufflenetv2_x0_5', dict(file=str(path), num_classes=10))


CUSTOM = {
    'as it is': dict(num_classes=10, channels=(16, 32, 64, 128), cardinality=8, base_width=16),
    'another shape': dict(
        layers=(1, 2, 1, 1), channels=(8, 16, 32, 64), cardinality=4, base_width=32, small_stem=True, in_chans=1,
        num_classes=10,
    ),
    'another unit': dict(
        **NARROW, layers=(1, 1, 1, 1), block_args=dict(sk_kwargs=dict(kernel_sizes=(3, 5, 7), select='shared')),
    ),
    'headless': dict(NARROW, num_classes=0, global_pool='max'),
}  # fmt: skip

SAVED = {name: (name, narrow(name)) for name in KINDS[1:]}

SAVED |= {kind: ('sknet26', kwargs) for kind, kwargs in CUSTOM.items()}

SAVED |= {
    'sk_kwargs of sknet29': ('sknet29_16x32d', dict(narrow('sknet29_16x32d'), sk_kwargs=dict(kernel_sizes=(3, 5)))),
    'sk_kwargs of skshufflenetv2': (
        'skshufflenetv2_x1_0',
        dict(narrow('skshufflenetv2_x1_0'), in_chans=1, sk_kwargs=dict(kernel_sizes=(3, 5, 7), select='shared')),
    ),
}


@pytest.mark.parametrize(
    ('network', 'safe'), [*((network, True) for network in SAVED), ('as it is', False), ('as it is', 'both')]
)
@torch.no_grad()
def test_save_for_hf_round_trip(tmp_path, network, safe):
    name, kwargs = SAVED[network]
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval()
    for parameter in model.parameters():
        parameter.add_(0.01 * torch.randn_like(parameter))
    save_for_hf(model, tmp_path / 'saved', safe_serialization=safe)
    files = {path.name for path in (tmp_path / 'saved').iterdir()}
    assert files == {'config.json'} | {
        True: {'model.safetensors'}, False: {'pytorch_model.bin'}, 'both': {'model.safetensors', 'pytorch_model.bin'}
    }[safe]  # fmt: skip

    loaded = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True).eval()
    assert_same_state(loaded, model)
    assert loaded.num_classes == kwargs['num_classes']
    x = make_input(channels=kwargs.get('in_chans', 3))
    assert torch.equal(loaded(x), model(x))
    assert timm.data.resolve_model_data_config(loaded)['input_size'][0] == kwargs.get('in_chans', 3)


def test_save_for_hf_after_reset_classifier(tmp_path):
    model = make_model()
    model.reset_classifier(4)
    save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert loaded.num_classes == 4
    assert_same_state(loaded, model)


def test_saved_folder_with_other_arguments(tmp_path):
    model = make_model()
    save_for_hf(model, tmp_path, safe_serialization=True)
    features = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, features_only=True, out_indices=(2, 4))
    assert features.feature_info.channels() == [128, 512]
    assert torch.equal(features.state_dict()['conv1.weight'], model.conv1.weight)
    classes = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=3)
    assert classes.fc.weight.shape == (3, 512)
    assert torch.equal(classes.layer4[1].conv3.conv.weight, model.layer4[1].conv3.conv.weight)
