"""tools/export_onnx.py: what onnxruntime computes of every kind of network, and what the tool refuses."""

import sys

import pytest

pytest.importorskip('onnx')
pytest.importorskip('onnxscript')
pytest.importorskip('onnxruntime')

import onnxruntime
import timm
import torch
from _networks import _from_config, build
from helpers.randomised import randomise
from helpers.tolerances import assert_close
from safetensors.torch import save
from timm.models import save_for_hf

from sk_plugins import fold_batch_norm, zoo
from sk_plugins.weights import CheckpointError, HubError, save_state_dict, to_mmpretrain

RESNET = dict(channels=(16, 32, 64), layers=(1, 1, 1), num_classes=10)
SHUFFLE = dict(channels=(16, 32, 64), layers=(1, 2, 1), head_channels=32, num_classes=10)
FAMILIES = {
    'sknet50': dict(RESNET, cardinality=4, base_width=16),
    'skresnet18': dict(RESNET),
    'skresnet50d': dict(RESNET),
    'skshufflenetv2_x1_0': dict(SHUFFLE),
    'seshufflenetv2_x1_0': dict(SHUFFLE),
    'sknet29_16x32d': dict(RESNET, cardinality=4, base_width=16),
}
# As they are, timm_models/test_graphs.py has them.
QUICK = [('skshufflenetv2_x1_0', True)]
EVERY = [
    pytest.param(name, folded, marks=[] if (name, folded) in QUICK else pytest.mark.slow)
    for name in FAMILIES
    for folded in (False, True)
]


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('export_onnx')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A Hub folder of a small SKNet, as timm reads it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('hub') / 'sknet'
    model = randomise(timm.create_model('sknet50', **FAMILIES['sknet50']))
    save_for_hf(model, folder, safe_serialization=True, model_args=dict(FAMILIES['sknet50']))
    return folder


def session(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])


@pytest.mark.parametrize(('name', 'folded'), EVERY)
@torch.no_grad()
def test_every_kind_of_network(tool, tmp_path, name, folded):
    model = randomise(zoo.MODELS[name].build(**FAMILIES[name]))
    tool.export(fold_batch_norm(model) if folded else model, tmp_path / 'model.onnx', (3, 64, 64))
    assert [path.name for path in tmp_path.iterdir()] == ['model.onnx']
    run = session(tmp_path / 'model.onnx')
    assert run.get_inputs()[0].shape == ['batch', 3, 'height', 'width']
    for shape in ((1, 3, 64, 64), (3, 3, 97, 65), (2, 3, 33, 128)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        (logits,) = run.run(['logits'], {'image': x.numpy()})
        expected = model(x)
        assert expected.std() > 0.01
        assert_close(torch.from_numpy(logits), expected, length=model)


def test_main(tool, folder, tmp_path, capsys):
    out = tmp_path / 'new' / 'sknet.onnx'
    words = [f'local-dir:{folder}', str(out), '--size', '64', '--check', '--no-dynamic', '--opset', '18']
    tool.main(words)
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    run = session(out)
    assert run.get_inputs()[0].shape == [1, 3, 64, 64]
    metadata = run.get_modelmeta().custom_metadata_map
    assert metadata['model'] == f'local-dir:{folder}'
    assert metadata['input_size'] == '[3, 64, 64]'
    assert metadata['mean'] == '[0.485, 0.456, 0.406]'
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert_close(torch.from_numpy(run.run(None, {'image': x.numpy()})[0]), model(x), length=model)


@pytest.mark.parametrize('prefixed', [False, True])
@torch.no_grad()
def test_checkpoint(tmp_path, prefixed):
    model = randomise(timm.create_model('skshufflenetv2_x0_5', num_classes=7))
    path = tmp_path / 'trained.safetensors'
    save_state_dict(to_mmpretrain(model.state_dict()) if prefixed else model.state_dict(), path)
    built, preprocessing = build('skshufflenetv2_x0_5', str(path))
    assert preprocessing['input_size'] == (3, 224, 224)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(built(x), model(x))
    with pytest.raises(CheckpointError, match=r'trained\.safetensors: its weights do not fit shufflenetv2_x0_5'):
        build('shufflenetv2_x0_5', str(path))


def test_checkpoint_of_the_hub(hub):
    model = randomise(timm.create_model('skshufflenetv2_x0_5', num_classes=7))
    hub.add('me/tiny', {'model.safetensors': save(model.state_dict())})
    built, _ = build('skshufflenetv2_x0_5', 'hf-hub:me/tiny')
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in built.state_dict().items())


def test_repository_that_is_not_there(tool, hub, tmp_path):
    with pytest.raises(HubError, match='me/nothing: '):
        tool.main(['hf-hub:me/nothing', str(tmp_path / 'a.onnx')])


@pytest.mark.slow
@torch.no_grad()
def test_opset_that_torch_cannot_write(tool, tmp_path):
    model = randomise(zoo.MODELS['skshufflenetv2_x1_0'].build(**SHUFFLE))
    with pytest.raises(ValueError, match='--opset 99: '):
        tool.export(fold_batch_norm(model), tmp_path / 'model.onnx', (3, 64, 64), opset=99)
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_config(tmp_path):
    pytest.importorskip('mmengine')
    architecture, args, _ = _from_config('sknet_digits')
    model = randomise(timm.create_model(architecture, **args))
    save_state_dict(to_mmpretrain(model.state_dict()), tmp_path / 'epoch.pth')
    built, preprocessing = build('sknet_digits', str(tmp_path / 'epoch.pth'))
    x = torch.randn(2, *preprocessing['input_size'])
    assert built(x).shape == (2, 10)
    assert torch.equal(built(x), model(x))


def test_without_openmmlab(monkeypatch):
    monkeypatch.setitem(sys.modules, 'mmengine.config', None)
    assert build('skshufflenetv2_x0_5')[1]['input_size'] == (3, 224, 224)
    with pytest.raises(ValueError, match=r"takes mmengine: pip install '\.\[mm\]'"):
        build('sknet_digits')


def test_random_weights_are_said(capsys):
    build('skshufflenetv2_x0_5')
    assert 'skshufflenetv2_x0_5: random weights' in capsys.readouterr().err


@torch.no_grad()
def test_check_refuses_other_outputs_and_leaves_nothing(tool, tmp_path):
    model = randomise(zoo.MODELS['skshufflenetv2_x1_0'].build(**SHUFFLE))
    other = randomise(zoo.MODELS['skshufflenetv2_x1_0'].build(**SHUFFLE), seed=1)
    out = tmp_path / 'model.onnx'
    out.write_bytes(b'older')
    with pytest.raises(ValueError, match=r"--check: for images of \(1, 3, 64, 64\) onnxruntime's logits differ"):
        tool.export(fold_batch_norm(model), out, (3, 64, 64), dynamic=False, reference=other)
    assert out.read_bytes() == b'older'
    assert [path.name for path in tmp_path.iterdir()] == ['model.onnx']


def test_check_shapes(tool):
    shapes = list(tool._shapes((3, 64, 64), True))
    assert shapes == [(1, 3, 64, 64), (3, 3, 97, 33)]
    assert list(tool._shapes((3, 32, 32), True))[1] == (3, 3, 65, 32)


@pytest.mark.parametrize(
    ('words', 'said'),
    [
        (['sknet51', 'a.onnx'], "model 'sknet51' is neither a name of timm nor a config"),
        (['sknet26', 'a.onnx', '--checkpoint', 'nothing.pth'], 'nothing.pth: no such checkpoint file'),
        (['sknet26', 'a.onnx', '--pretrained'], 'sknet26 has no published weights'),
        (['sknet_digits', 'a.onnx', '--pretrained'], 'is not a model of timm; give a config its --checkpoint'),
    ],
)
def test_refusals(tool, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError, RuntimeError), match=said):
        tool.main(words)
    assert list(tmp_path.iterdir()) == []


def test_missing_packages(tool, tmp_path, monkeypatch):
    find_spec = tool.importlib.util.find_spec
    hidden = lambda name: None if name == 'onnxruntime' else find_spec(name)  # noqa: E731
    monkeypatch.setattr(tool.importlib.util, 'find_spec', hidden)
    with pytest.raises(ValueError, match=r"onnxruntime not installed: pip install '\.\[onnx\]'"):
        tool.main(['sknet26', str(tmp_path / 'a.onnx'), '--check'])


@pytest.mark.parametrize(
    ('words', 'said'),
    [
        (['sknet26', 'a.pth'], 'a.pth must end in .onnx'),
        (['sknet26', 'a.onnx', '--size', '0'], '--size: 0 must be at least 1'),
        (['sknet26', 'a.onnx', '--pretrained', '--checkpoint', 'b'], 'not allowed with'),
    ],
)
def test_bad_arguments(tool, capsys, words, said):
    with pytest.raises(SystemExit):
        tool.parse_args(words)
    assert said in capsys.readouterr().err


def test_one_line_on_stderr(python_tool, tmp_path):
    done = python_tool('export_onnx', 'sknet51', tmp_path / 'a.onnx', status=1)
    first, hint = done.stderr.splitlines()
    assert first == "export_onnx.py: error: model 'sknet51' is neither a name of timm nor a config"
    assert 'SK_PLUGINS_TRACEBACK' in hint
