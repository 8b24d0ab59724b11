"""tools/export.py: what runtimes compute of every kind of network, and what the tool refuses."""

import collections
import importlib
import json
import sys

import numpy as np
import pytest
import timm
import torch
from _export import TARGET_NAMES
from _export.deployable import prepare
from _export.targets import TARGETS, trtexec
from _networks import _from_config, build
from helpers.kinds import quick
from helpers.randomised import randomise
from helpers.tolerances import assert_close
from PIL import Image
from safetensors.torch import save
from timm.models import save_for_hf

from sk_plugins import zoo
from sk_plugins.weights import CheckpointError, HubError, save_state_dict, to_mmpretrain

RESNET = dict(channels=(16, 32, 64), layers=(1, 1, 1), num_classes=10)
SHUFFLE = dict(channels=(16, 32, 64), layers=(1, 3, 1), head_channels=32, num_classes=10)
FAMILIES = {
    'sknet50': dict(RESNET, cardinality=4, base_width=16),
    'skresnet18': dict(RESNET),
    'skresnet50d': dict(RESNET),
    'skshufflenetv2_x1_0': dict(SHUFFLE),
    'seshufflenetv2_x1_0': dict(SHUFFLE),
    'sknet29_16x32d': dict(RESNET, cardinality=4, base_width=16),
}
BOTH = frozenset({'batch', 'size'})
PREPROCESSING = dict(input_size=(3, 64, 64), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
NORMALISE = dict(interpolation='bicubic', crop_pct=1.0)
# These ask for a shape, or choose by a comparison.
NOT_LEAN = {'Less', 'Where', 'Shape', 'Gather', 'Unsqueeze', 'Expand', 'Range'}


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('export')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A Hub folder of a small SKNet, as timm reads it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('hub') / 'sknet'
    model = randomise(timm.create_model('sknet50', **FAMILIES['sknet50']))
    save_for_hf(model, folder, safe_serialization=True, model_args=dict(FAMILIES['sknet50']))
    return folder


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """Pictures of ten classes, one of each."""
    folder = tmp_path_factory.mktemp('pictures')
    for label in range(10):
        pixels = np.random.default_rng(label).integers(0, 256, (64, 72, 3), dtype=np.uint8)
        (folder / str(label)).mkdir()
        Image.fromarray(pixels).save(folder / str(label) / 'a.png')
    return folder


def small(name, **kwargs):
    torch.manual_seed(0)
    return randomise(zoo.MODELS[name].build(**{**FAMILIES[name], **kwargs}))


def nodes(path):
    onnx = pytest.importorskip('onnx')
    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


def exported(net, path, target='onnx', dynamic=BOTH, **kwargs):
    """The file's outputs for an image of the example's size, with what eager mode gives; and for others."""
    TARGETS[target].require()
    deployable = prepare(net, {**PREPROCESSING, **NORMALISE}, dynamic=dynamic & TARGETS[target].dynamic, **kwargs)
    TARGETS[target].write(deployable, path)
    run = TARGETS[target].run(path, 1)
    pairs = []
    for shape in deployable.shapes():
        images = deployable.random(*shape)
        expected = deployable.reference(images)
        pairs.append((run(images), [expected] if isinstance(expected, torch.Tensor) else expected))
    return deployable, pairs


def assert_equal(net, pairs):
    for found, expected in pairs:
        assert len(found) == len(expected)
        for f, e in zip(found, expected):
            assert e.std() > 0.001
            assert_close(torch.from_numpy(f), e, length=net)


@pytest.mark.parametrize('name', quick(FAMILIES, ['skshufflenetv2_x1_0']))
@torch.no_grad()
def test_every_kind_of_network_as_onnx(tmp_path, name):
    pytest.importorskip('onnxruntime')
    net = small(name)
    _, pairs = exported(net, tmp_path / 'model.onnx')
    assert [path.name for path in tmp_path.iterdir()] == ['model.onnx']
    assert len(pairs) == 4
    assert_equal(net, pairs)
    assert not NOT_LEAN & nodes(tmp_path / 'model.onnx').keys()


@pytest.mark.parametrize('m', quick([1, 2, 3, 4], [2]))
@torch.no_grad()
def test_nodes(tmp_path, m):
    """What SK units add to ResNeXt's graph: none for one branch, eleven for two, eight more for every other."""
    net = small('sknet50', sk_kwargs=dict(kernel_sizes=(3, 5, 7, 9)[:m]))
    exported(net, tmp_path / 'a.onnx')
    units, shortcuts, ends = 3, 2, 6  # of ResNeXt a unit has 7
    counts = nodes(tmp_path / 'a.onnx')
    assert counts.total() == 7 * units + shortcuts + ends + units * {1: 0, 2: 11, 3: 19, 4: 24}[m]
    assert not NOT_LEAN & counts.keys()


@pytest.mark.slow
def test_nodes_of_sknet50(tmp_path):
    deployable = prepare(timm.create_model('sknet50').eval(), {**PREPROCESSING, **NORMALISE}, dynamic=BOTH)
    TARGETS['onnx'].write(deployable, tmp_path / 'a.onnx')
    assert nodes(tmp_path / 'a.onnx').total() == 298


@pytest.mark.parametrize('preprocess', quick([False, True], [True]))
@torch.no_grad()
def test_features_and_preprocessing(tmp_path, preprocess):
    pytest.importorskip('onnxruntime')
    net = small('skshufflenetv2_x1_0')
    deployable, pairs = exported(net, tmp_path / 'model.onnx', features=True, preprocess=preprocess)
    assert deployable.outputs == [f'feature_{i}' for i in range(5)]
    assert_equal(net, pairs)
    assert not NOT_LEAN & nodes(tmp_path / 'model.onnx').keys()


@pytest.mark.parametrize(
    'target', quick([name for name in TARGET_NAMES if TARGETS[name].load and name != 'onnx'], ['torchscript'])
)
@torch.no_grad()
def test_targets(tmp_path, target):
    """Those whose libraries are here; docs/deployment.md has what each was tried with."""
    for package in TARGETS[target].packages:
        pytest.importorskip(package)
    net = small('skshufflenetv2_x1_0')
    deployable, pairs = exported(net, tmp_path / f'model{TARGETS[target].suffix}', target)
    assert len(pairs) == len(deployable.shapes())
    for (found,), (expected,) in pairs:
        apart = np.abs(found - expected.numpy()).max() / expected.abs().max()
        assert apart < 1e-4


def test_main(tool, folder, tmp_path, capsys):
    onnxruntime = pytest.importorskip('onnxruntime')
    out = tmp_path / 'new' / 'sknet.onnx'
    words = [f'local-dir:{folder}', 'onnx', str(out), '--size', '64', '--check', '--no-dynamic', '--batch', '2']
    log = tmp_path / 'found.jsonl'
    tool.main([*words, '--opset', '18', '--json', str(log)])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith('largest difference from eager mode: ')
    assert said[-1] == str(out)
    assert json.loads(log.read_text())['difference'] < 1e-5
    session = onnxruntime.InferenceSession(out, providers=['CPUExecutionProvider'])
    assert session.get_inputs()[0].shape == [2, 3, 64, 64]
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata['model'] == f'local-dir:{folder}'
    assert metadata['input_size'] == '[3, 64, 64]'
    assert metadata['mean'] == '[0.485, 0.456, 0.406]'
    assert metadata['input'] == 'float32, normalised, NCHW'
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_close(torch.from_numpy(session.run(None, {'image': x.numpy()})[0]), model(x), length=model)


def test_eight_bits(tool, folder, pictures, tmp_path, capsys):
    pytest.importorskip('onnxruntime')
    out = tmp_path / 'int8.onnx'
    words = [f'local-dir:{folder}', 'onnx', str(out), '--size', '64', '--int8', str(pictures), '--int8-images', '4']
    tool.main([*words, '--check', '--accuracy', str(pictures)])
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith('top-1 on 10 images: ')
    assert 1e-4 < float(said[0].split()[5]) < 0.5
    counts = nodes(out)
    assert counts['QuantizeLinear'] > 10


def test_torchscript_keeps_metadata(tool, folder, tmp_path):
    out = tmp_path / 'a.ts'
    tool.main([f'local-dir:{folder}', 'torchscript', str(out), '--size', '64', '--preprocess', '--check'])
    extra = {'metadata.json': ''}
    module = torch.jit.load(out, _extra_files=extra)
    assert json.loads(extra['metadata.json'])['input'] == 'uint8 RGB, NHWC'
    assert module(torch.zeros(1, 64, 80, 3, dtype=torch.uint8)).shape == (1, 10)


def test_tensorrt_without_a_gpu(tool, folder, tmp_path, capsys, monkeypatch):
    from _export import targets

    pytest.importorskip('onnxscript')
    monkeypatch.setattr(targets, 'write_onnx', lambda deployable, path: path.write_text('graph'))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    tool.main([f'local-dir:{folder}', 'tensorrt', str(tmp_path / 'a.engine'), '--size', '64'])
    said = capsys.readouterr().out.splitlines()
    assert [path.name for path in tmp_path.iterdir()] == ['a.onnx']
    assert said[-1] == (
        f'trtexec --onnx={tmp_path}/a.onnx --saveEngine={tmp_path}/a.engine --minShapes=image:1x3x64x64 '
        '--optShapes=image:8x3x64x64 --maxShapes=image:64x3x128x128'
    )


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
        tool.main(['hf-hub:me/nothing', 'torchscript', str(tmp_path / 'a.ts')])


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


def test_check_refuses_other_outputs_and_leaves_nothing(tool, folder, tmp_path, monkeypatch):
    from _export import running

    monkeypatch.setattr(running, 'difference', lambda *args: 0.02)
    out = tmp_path / 'model.ts'
    out.write_bytes(b'older')
    with pytest.raises(ValueError, match=r"--check: the file's outputs differ from eager mode's by 0\.02 > 0\.0001"):
        tool.main([f'local-dir:{folder}', 'torchscript', str(out), '--size', '64', '--check'])
    assert out.read_bytes() == b'older'
    assert [path.name for path in tmp_path.iterdir()] == ['model.ts']


def test_difference_tells(tmp_path):
    from _export.running import difference

    deployable = prepare(small('sknet50'), {**PREPROCESSING, **NORMALISE})
    with torch.no_grad():
        assert difference(deployable, lambda x: [deployable.reference(x).numpy() * 1.01]) == pytest.approx(
            0.01, rel=1e-3
        )
        assert np.isnan(difference(deployable, lambda x: [deployable.reference(x).numpy() * np.nan]))
    with pytest.raises(ValueError, match=r'--check: for images of \(1, 3, 64, 64\) the file gives \[\(2,\)\]'):
        difference(deployable, lambda x: [np.zeros(2)])
    with pytest.raises(ValueError, match=r'--check: cannot run the file for images of \(1, 3, 64, 64\): too small'):
        difference(deployable, lambda x: (_ for _ in ()).throw(RuntimeError('too small')))


def test_shapes():
    net = small('sknet50')
    data = {**PREPROCESSING, **NORMALISE}
    assert prepare(net, data, dynamic=BOTH).shapes() == [(1, 64, 64), (1, 97, 33), (3, 64, 64), (3, 97, 33)]
    assert prepare(net, data, size=32, batch=4).shapes() == [(4, 32, 32)]
    line = trtexec(prepare(net, data, preprocess=True, dynamic=frozenset({'batch'})), 'a.onnx', 'a.engine')
    assert line[-1] == '--maxShapes=image:64x64x64x3'


# What goes wrong before anything is written.
WRONG = [
    (['sknet51', 'torchscript', 'a.ts'], "model 'sknet51' is neither a name of timm nor a config"),
    (['sknet26', 'torchscript', 'a.ts', '--checkpoint', 'nothing.pth'], r'nothing\.pth: no such checkpoint file'),
    (['sknet26', 'torchscript', 'a.ts', '--pretrained'], 'sknet26 has no published weights'),
    (['sknet_digits', 'torchscript', 'a.ts', '--pretrained'], 'is not a model of timm; give a config its --checkpoint'),
    (['sknet26', 'torchscript', 'a.onnx'], r'a\.onnx must end in \.ts for the target torchscript'),
    (['sknet26', 'aoti', 'a.pt2', '--dynamic'], '--dynamic: a file for aoti leaves the batch open, not the size'),
    (['sknet26', 'ncnn', 'a', '--dynamic'], '--dynamic: a file for ncnn is of one batch and size'),
    (['sknet26', 'coreml', 'a.mlpackage', '--check'], '--check: Core ML cannot be run on this machine'),
    (['sknet26', 'onnx', 'a.onnx', '--int8', 'nowhere'], 'nowhere: no such folder of images'),
    (['sknet26', 'onnx', 'a.onnx', '--int8', 'empty'], 'empty: has no images'),
    (['sknet26', 'onnx', 'a.onnx', '--int8', 'broken'], r'broken/a\.png: is no image that can be read'),
    (['skshufflenetv2_x0_5', 'torchscript', 'a.ts', '--accuracy', 'empty'], 'empty: has no images'),
    (['retinanet', 'torchscript', 'a.ts'], 'retinanet has no classifier: --features exports the feature maps of the'),
    (['grey', 'torchscript', 'a.ts', '--preprocess'], '--preprocess: takes RGB images, and grey has 1 input channels'),
    (['seven.pth', 'torchscript', 'a.ts'], r'seven\.pth: its weights do not fit'),
    (['good', 'hub'], r'good: is no work dir of a finetune run: it has no finetune\.json and config\.py'),
]  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name in ('empty', 'broken', 'good'):
        (tmp_path / name).mkdir()
    (tmp_path / 'broken' / 'a.png').write_text('none')
    state_dict = timm.create_model('skshufflenetv2_x0_5', num_classes=7).state_dict()
    save_state_dict(state_dict, tmp_path / 'seven.pth')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(('words', 'said'), WRONG, ids=lambda value: value[1] if isinstance(value, list) else '')
def test_wrong_uses(tool, place, monkeypatch, words, said):
    from _export import deployable

    if words[0] in ('retinanet', 'grey', 'seven.pth'):
        kwargs = {'retinanet': dict(num_classes=0), 'grey': dict(in_chans=1)}.get(words[0])
        if kwargs is None:
            words = ['shufflenetv2_x0_5', *words[1:], '--checkpoint', 'seven.pth']
        else:
            net = timm.create_model('skshufflenetv2_x0_5', **kwargs).eval()
            data = {**PREPROCESSING, 'input_size': (net.in_chans, 64, 64)}
            monkeypatch.setattr(deployable, 'build', lambda *args: (net, data))
    if words[1] == 'hub':
        pytest.importorskip('mmengine')
    if words[1] != 'hub':
        monkeypatch.setattr(TARGETS[words[1]].__class__, 'require', lambda self: None)
    before = sorted(place.rglob('*'))
    with pytest.raises((ValueError, OSError, RuntimeError), match=said) as caught:
        tool.main(words)
    assert '\n' not in str(caught.value).strip()
    assert sorted(place.rglob('*')) == before


@pytest.mark.parametrize('target', TARGET_NAMES)
def test_missing_packages(tool, target, tmp_path, monkeypatch):
    """The library of a target is asked for only where the target is, and its extra is named."""
    find_spec = importlib.util.find_spec
    hidden = set(TARGETS[target].packages)
    if not hidden:
        pytest.skip('torch alone')
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name in hidden else find_spec(name))
    words = ['sknet26', target, str(tmp_path / f'a{TARGETS[target].suffix}')]
    with pytest.raises(ValueError, match=rf"^{', '.join(TARGETS[target].packages)} not installed: .*pip install '\.\["):
        tool.main(words)


@pytest.mark.parametrize(
    ('words', 'said'),
    [
        (['sknet26', 'onxx', 'a.onnx'], "there is no target 'onxx'; near it is onnx"),
        (['sknet26', 'onnx'], 'the following arguments are required: OUT'),
        (['sknet26', 'onnx', 'a.onnx', '--size', '0'], '--size: 0 must be at least 1'),
        (['sknet26', 'onnx', 'a.onnx', '--pretrained', '--checkpoint', 'b'], 'not allowed with'),
        (['sknet26', 'openvino', 'a.xml', '--opset', '18'], 'argument --opset: for onnx and tensorrt, not openvino'),
        (['sknet26', 'ncnn', 'a', '--int8', 'b'], 'argument --int8: for onnx and openvino, not ncnn'),
        (['sknet26', 'onnx', 'a.onnx', '--int8-float', 'both'], 'argument --int8-float: needs --int8 FOLDER'),
        (['sknet26', 'onnx', 'a.onnx', '--batch', '2', '--dynamic'], 'argument --batch: not with --dynamic'),
        (['sknet26', 'onnx', 'a.onnx', '--features', '--accuracy', 'b'], 'argument --features: not with --accuracy'),
        (['sknet26', 'onnx', 'a.onnx', '--license', 'mit'], 'argument --license: for the target hub'),
        (['work_dirs/a', 'hub', 'b', '--check'], 'argument --check: not for the target hub'),
    ],
)
def test_bad_arguments(tool, capsys, words, said):
    with pytest.raises(SystemExit):
        tool.parse_args(words)
    assert said in capsys.readouterr().err


def test_one_line_on_stderr(python_tool, tmp_path):
    done = python_tool('export', 'sknet51', 'torchscript', tmp_path / 'a.ts', status=1)
    first, hint = done.stderr.splitlines()
    assert first == "export.py: error: model 'sknet51' is neither a name of timm nor a config"
    assert 'SK_PLUGINS_TRACEBACK' in hint
