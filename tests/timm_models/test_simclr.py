"""SimCLRv2's published weights by name, from a Hub of the tests' own."""

import io
import subprocess
import sys

import pytest
import timm
import torch
from helpers.hub_server import FAULTS
from helpers.narrow_models import assert_same_state, make_input, narrow
from helpers.randomised import randomise
from helpers.simclr import as_file
from helpers.tolerances import assert_close
from timm.models import save_for_hf

from sk_plugins import zoo
from sk_plugins.networks import SKResNetSimCLR
from sk_plugins.weights import HubError, load_partial
from sk_plugins.weights.simclr import to_lightly

SPECS = [spec for spec in zoo.MODELS.values() if spec.network is SKResNetSimCLR]
NAME = 'skresnet50x1_simclr'
NARROW = {**narrow(NAME), 'num_classes': 1000}


def publish(hub, spec, **kwargs):
    """A narrow network whose weights stand in for the trained ones; the file has a contrastive head of two layers."""
    torch.manual_seed(0)
    model = randomise(spec.build(**{**NARROW, **kwargs}, projection=2))
    file = io.BytesIO()
    torch.save(as_file(to_lightly(model.state_dict())), file)
    (weights,) = spec.weights
    hub.add(weights.hf_hub_id, {weights.file: file.getvalue()})
    return model


@pytest.fixture
def published(hub):
    hub.model = publish(hub, zoo.MODELS[NAME])
    return hub


def without(model, *prefixes):
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefixes)}


def load(name=NAME, **kwargs):
    return timm.create_model(name, pretrained=True, **{**NARROW, **kwargs}).eval()


@pytest.mark.parametrize('spec', SPECS, ids=lambda spec: spec.name)
def test_every_name(hub, spec):
    trained = publish(hub, spec)
    shape = spec.name.removeprefix('skresnet').removesuffix('_simclr').split('x')
    assert spec.weights[0].hf_hub_id == 'lightly-ai/simclrv2-imagenet1k-r{}_{}x_sk1'.format(*shape)
    for name in (spec.name, f'{spec.name}.goog_in1k'):
        model = load(name)
        assert_same_state(model, without(trained, 'projection.'))
        assert all(p.requires_grad and p.is_leaf and type(p) is torch.nn.Parameter for p in model.parameters())
    assert 'state_dict' not in model.pretrained_cfg
    with pytest.raises(HubError, match=rf'{spec.weights[0].hf_hub_id}: the weights do not fit this network'):
        load(spec.name, layers=(2, 2, 1, 1))


@pytest.mark.parametrize('name', [NAME, f'{NAME}.goog_in1k'])
def test_preprocessing(name):
    cfg = timm.get_pretrained_cfg(name)
    assert (cfg.mean, cfg.std) == ((0, 0, 0), (1, 1, 1))
    assert (cfg.interpolation, cfg.crop_pct, cfg.input_size) == ('bicubic', 0.875, (3, 224, 224))
    assert cfg.license == 'apache-2.0'
    assert cfg.paper_ids == 'arXiv:2006.10029'
    assert any('74.60' in note for note in cfg.notes)


@torch.no_grad()
def test_arguments(published):
    trained, x = published.model, make_input()
    few = load(num_classes=7)
    assert few.fc.weight.shape == (7, 512)
    assert 0.005 < few.fc.weight.std() < 0.02
    assert not few.fc.bias.any()
    features = load(num_classes=0)(x)
    assert_close(features, trained.forward_features(x).mean((2, 3)), length=trained)
    gray = load(in_chans=1)
    assert_close(gray.conv1[0].weight, trained.conv1[0].weight.sum(1, keepdim=True), length=3)
    maps = load(features_only=True)
    assert maps.feature_info.reduction() == [2, 4, 8, 16, 32]
    for feature, expected in zip(maps(x), trained.forward_intermediates(x, intermediates_only=True), strict=True):
        assert_close(feature, expected, length=trained)
    half = load(dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in without(half, 'none').values()} == {torch.bfloat16, torch.int64}
    assert_same_state(load(device='cpu'), without(trained, 'projection.'))


@pytest.mark.parametrize('num_classes', [1000, 7])
@torch.no_grad()
def test_projection(published, num_classes):
    """The file's classifier was trained on the features: another one starts."""
    model = load(projection=1, num_classes=num_classes)
    trained = published.model
    assert without(model, 'fc.').keys() == without(trained, 'fc.', 'projection.3', 'projection.4').keys()
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in without(model, 'fc.').items())
    assert model.fc.weight.shape == (num_classes, 512)
    assert not torch.equal(model.fc.weight[:7], trained.fc.weight[:7])
    assert model(make_input()).isfinite().all()


def test_trains_and_is_saved(published, tmp_path):
    """Branches of one convolution share memory, which concerns nobody."""
    model = load(num_classes=7).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(make_input()).square().mean().backward()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer.step()
    branches = [f'layer1.0.conv2.paths.{m}.conv.weight' for m in (0, 1)]
    for name in branches:
        expected = before[name] - 0.1 * model.get_parameter(name).grad
        assert_close(model.get_parameter(name).detach(), expected, length=1)
    save_for_hf(model, tmp_path / 'hub', safe_serialization='both')
    assert_same_state(timm.create_model(f'local-dir:{tmp_path / "hub"}', pretrained=True), model)
    torch.save(model.state_dict(), tmp_path / 'model.pth')
    assert_same_state(
        load(num_classes=7, pretrained_cfg_overlay=dict(file=str(tmp_path / 'model.pth'), num_classes=7)), model
    )


def test_local_file(published, tmp_path):
    path = tmp_path / 'r50_1x_sk1.pth'
    torch.save(as_file(to_lightly(published.model.state_dict())), path)
    published.stop()
    overlay = dict(file=str(path))
    assert_same_state(load(pretrained_cfg_overlay=overlay), without(published.model, 'projection.'))
    assert load(pretrained_cfg_overlay=overlay, projection=1).projection_layers == 1
    model = SKResNetSimCLR(**NARROW)
    assert load_partial(model, path).initialised == ()
    assert_same_state(model, without(published.model, 'projection.'))


@pytest.mark.parametrize('source', ['file', 'hub'])
def test_load_partial_with_a_projection(published, tmp_path, source):
    """The contrastive head's layer comes with the rest, and the classifier, of the features before it, does not."""
    path = tmp_path / 'r50_1x_sk1.pth'
    torch.save(as_file(to_lightly(published.model.state_dict())), path)
    model = SKResNetSimCLR(**NARROW, projection=1)
    before = model.fc.weight.clone()
    report = load_partial(model, path if source == 'file' else f'hf-hub:{zoo.MODELS[NAME].weights[0].hf_hub_id}')
    assert report.initialised == ('fc.weight', 'fc.bias')
    assert torch.equal(model.fc.weight, before)
    assert torch.equal(model.projection[0].weight, published.model.projection[0].weight)


@pytest.mark.filterwarnings('ignore:.*which is a no-op:UserWarning')
def test_other_devices_by_default(published):
    with torch.device('meta'):
        assert load().fc.weight.is_meta
    assert load().fc.weight.device.type == 'cpu'


@pytest.mark.parametrize('fault', ['truncated', 'short', 'garbage', 'flipped', 'down', 'missing'])
def test_faults(published, fault):
    repo = zoo.MODELS[NAME].weights[0].hf_hub_id
    published.faults[repo] = FAULTS[fault]
    with pytest.raises(HubError, match=f'^{repo}: ') as caught:
        load()
    assert '\n' not in str(caught.value)
    assert str(published.cache) not in str(caught.value)
    published.faults.clear()
    assert_same_state(load(), without(published.model, 'projection.'))


def test_a_pickle_that_names_code_runs_nothing(published):
    repo, file = zoo.MODELS[NAME].weights[0].hf_hub_id, zoo.MODELS[NAME].weights[0].file
    content = as_file(to_lightly(published.model.state_dict()))
    buffer = io.BytesIO()
    torch.save({**content, 'resnet': print}, buffer)
    published.add(repo, {file: buffer.getvalue()})
    with pytest.raises(HubError, match=rf'{repo}: {file}: .*; it was removed from the cache'):
        load()


MEMORY = """
import sys
import timm
import sk_plugins

def read(field):
    with open('/proc/self/status') as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))

with open('/proc/self/clear_refs', 'w') as peak:  # from here on
    peak.write('5')
before = read('VmRSS')
name, path = sys.argv[1:]
model = timm.create_model(
    name, pretrained=True, pretrained_cfg_overlay=dict(file=path), layers=(1, 1, 1, 1), width_factor=2
)
print((read('VmHWM') - before) * 1024 / sum(tensor.nbytes for tensor in model.state_dict().values()))
"""


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='the peak is read as Linux tells it')
@pytest.mark.slow
def test_weights_are_in_memory_once(tmp_path):
    """The peak of loading 240 MB, in a process of its own."""
    path = tmp_path / 'weights.pth'
    torch.save(as_file(to_lightly(SKResNetSimCLR((1, 1, 1, 1), 2).state_dict())), path)
    result = subprocess.run(
        [sys.executable, '-c', MEMORY, NAME, str(path)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert 0.8 < float(result.stdout) < 1.3
