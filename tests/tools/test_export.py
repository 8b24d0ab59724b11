"""tools/export.py: what runtimes compute of every kind of network."""

import collections
import contextlib
import io
import json
import shutil
import sys

import numpy as np
import pytest
import timm
import torch
from _export import INT8, TARGET_NAMES
from _export.blocks import in_blocks
from _export.deployable import prepare
from _export.running import difference
from _export.targets import TARGETS, slice_splits, trtexec
from _export.targets import exported as exported_program
from _networks import _from_config, build
from helpers.kinds import quick
from helpers.randomised import randomise
from helpers.tolerances import assert_close
from PIL import Image
from safetensors.torch import save
from timm.models import save_for_hf

from sk_plugins import simplify, zoo
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


@pytest.fixture(scope='module')
def sknet(tool, folder, tmp_path_factory):
    """The small SKNet by the command, of open batch and size: the file, what was printed, and what was noted."""
    pytest.importorskip('onnxruntime')
    out = tmp_path_factory.mktemp('onnx') / 'new' / 'sknet.onnx'
    log = out.parent.parent / 'found.jsonl'
    said = io.StringIO()
    words = [f'local-dir:{folder}', 'onnx', str(out), '--size', '64', '--opset', '18', '--check', '--json', str(log)]
    with contextlib.redirect_stdout(said):
        tool.main(words)
    return out, said.getvalue().splitlines(), json.loads(log.read_text())


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


def assert_as_lean_as_can_be(path, m):
    """What SK units add to ResNeXt's graph: none for one branch, eleven for two, eight more for every other."""
    units, shortcuts, ends = 3, 2, 6  # of ResNeXt a unit has 7
    counts = nodes(path)
    assert counts.total() == 7 * units + shortcuts + ends + units * {1: 0, 2: 11, 3: 19, 4: 24}[m]
    assert not NOT_LEAN & counts.keys()


def test_nodes(sknet):
    assert_as_lean_as_can_be(sknet[0], 2)


@pytest.mark.slow
@pytest.mark.parametrize('m', [1, 3, 4])
@torch.no_grad()
def test_nodes_of_other_branches(tmp_path, m):
    exported(small('sknet50', sk_kwargs=dict(kernel_sizes=(3, 5, 7, 9)[:m])), tmp_path / 'a.onnx')
    assert_as_lean_as_can_be(tmp_path / 'a.onnx', m)


@pytest.mark.slow
def test_nodes_of_sknet50(tmp_path):
    deployable = prepare(timm.create_model('sknet50').eval(), {**PREPROCESSING, **NORMALISE}, dynamic=BOTH)
    TARGETS['onnx'].write(deployable, tmp_path / 'a.onnx')
    assert nodes(tmp_path / 'a.onnx').total() == 298


@pytest.mark.parametrize(
    ('groups', 'width', 'together'),
    [
        (8, 1, 1),
        (8, 4, 1),
        (8, 16, 4),
        (8, 64, 8),
        (6, 16, 6),
        (12, 6, 2),
        (12, 16, 4),
        (7, 16, 7),
        (19, 16, 1),
        (22, 16, 2),
    ],
)
@torch.no_grad()
def test_groups_in_blocks(groups, width, together):
    """Groups of four channels, put together until they are wide enough, or as far as their number allows."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(4 * groups, 8 * groups, 3, padding=2, dilation=2, groups=groups)
    depthwise = torch.nn.Conv2d(8 * groups, 8 * groups, 3, groups=8 * groups)
    net = torch.nn.Sequential(conv, depthwise).eval()
    merged = in_blocks(net, width, 1)
    assert (conv.groups, merged[0].groups, merged[1].groups) == (groups, groups // together, 8 * groups)
    assert merged[0].weight.count_nonzero() == conv.weight.numel()
    x = torch.randn(2, 4 * groups, 9, 9)
    assert_close(merged(x), net(x), length=net)


@pytest.mark.parametrize(
    'kwargs',
    [{}, dict(kernel_sizes=(3, 5, 7)), dict(select='shared'), dict(select='sum'), 'se'],
    ids=str,
)
@torch.no_grad()
def test_depthwise_in_blocks(kwargs):
    """Branches of 9, 17 and 33 channels, in 16s."""
    shape = dict(SHUFFLE, channels=(18, 34, 66))
    name = 'skshufflenetv2_x1_0' if kwargs != 'se' else 'seshufflenetv2_x1_0'
    torch.manual_seed(0)
    net = randomise(zoo.MODELS[name].build(**shape, **({} if kwargs == 'se' else dict(sk_kwargs=kwargs))))
    lean = simplify(net)
    padded = in_blocks(lean, 1, 16)

    def channels(model):
        convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m.groups == m.out_channels > 1]
        return collections.Counter(conv.out_channels for conv in convs)

    branches = 1 if kwargs == 'se' else len(kwargs.get('kernel_sizes', (3, 5)))
    of_down = [24, 18, 34]  # the first branch begins with its depthwise convolution, of what it is given
    assert channels(lean) == collections.Counter([*of_down, 9, 17, 33] + [17, 17] * branches)
    assert channels(padded) == collections.Counter([*of_down, 16, 32, 48] + [32, 32] * branches)
    x = torch.randn(2, 3, 64, 64)
    assert_close(padded(x), net(x), length=net)


@torch.no_grad()
def test_groups_are_merged_for_onnx_runtime_alone(tmp_path):
    onnx = pytest.importorskip('onnx')
    net = timm.create_model('sknet50', **{**FAMILIES['sknet50'], 'cardinality': 8}).eval()
    deployable = prepare(net, {**PREPROCESSING, **NORMALISE}, dynamic=BOTH)
    found = []
    for target, name in (('onnx', 'a.onnx'), ('tensorrt', 'b.engine')):
        TARGETS[target].write(deployable, tmp_path / name)
        graph = onnx.load((tmp_path / name).with_suffix('.onnx')).graph
        groups = [a.i for node in graph.node if node.op_type == 'Conv' for a in node.attribute if a.name == 'group']
        found.append(sorted({number for number in groups if number > 1}))
    assert found == [[2, 4, 8], [8]]


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


@torch.no_grad()
def test_slices_in_place_of_splits():
    """ExecuTorch takes a split's outputs for tensors of the example's batch."""
    net = small('skshufflenetv2_x1_0')
    deployable = prepare(net, {**PREPROCESSING, **NORMALISE}, dynamic=frozenset({'batch'}))
    program = exported_program(deployable, 64)
    split = torch.ops.aten.split_with_sizes.default
    assert len(program.graph.find_nodes(op='call_function', target=split)) == 3
    slice_splits(program.graph)
    assert not program.graph.find_nodes(op='call_function', target=split)
    images = deployable.random(5, 64, 64)
    assert_close(program.module()(images), net(images), length=net)


def test_main(folder, sknet):
    onnxruntime = pytest.importorskip('onnxruntime')
    out, said, found = sknet
    assert said[0].startswith('largest difference from eager mode: ')
    assert said[0].endswith('(1x64x64, 1x97x33, 3x64x64, 3x97x33)')
    assert said[-1] == str(out)
    assert found['difference'] < 1e-5
    session = onnxruntime.InferenceSession(out, providers=['CPUExecutionProvider'])
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata['model'] == f'local-dir:{folder}'
    assert metadata['input_size'] == '[3, 64, 64]'
    assert metadata['mean'] == '[0.485, 0.456, 0.406]'
    assert metadata['input'] == 'float32, normalised, NCHW'
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_close(torch.from_numpy(session.run(None, {'image': x.numpy()})[0]), model(x), length=model)


@pytest.mark.slow
def test_static_shape(tool, folder, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    out = tmp_path / 'sknet.onnx'
    tool.main([f'local-dir:{folder}', 'onnx', str(out), '--size', '64', '--check', '--no-dynamic', '--batch', '2'])
    session = onnxruntime.InferenceSession(out, providers=['CPUExecutionProvider'])
    assert session.get_inputs()[0].shape == [2, 3, 64, 64]


def test_eight_bits(tool, folder, sknet, pictures, tmp_path, capsys, monkeypatch):
    from _export import int8

    monkeypatch.setattr(int8, 'write_onnx', lambda deployable, path, opset, width: shutil.copy(sknet[0], path))
    out = tmp_path / 'int8.onnx'
    words = [f'local-dir:{folder}', 'onnx', str(out), '--size', '64', '--int8', str(pictures), '--int8-images', '4']
    tool.main([*words, '--check', '--accuracy', str(pictures)])
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith('top-1 on 10 images: ')
    assert 1e-4 < float(said[0].split()[5]) < 0.5
    counts = nodes(out)
    assert counts['QuantizeLinear'] > 10


@pytest.mark.slow
@pytest.mark.parametrize('options', [[], ['--int8-float', 'both']], ids=['', 'float'])
@pytest.mark.parametrize('target', [name for name in INT8 if name != 'onnx'])
def test_eight_bits_of_other_runtimes(tool, folder, pictures, tmp_path, capsys, target, options):
    """Those whose libraries are here."""
    for package in (*TARGETS[target].packages, *INT8[target]):
        pytest.importorskip(package)
    out = tmp_path / f'int8{TARGETS[target].suffix}'
    words = [f'local-dir:{folder}', target, str(out), '--size', '64', '--int8', str(pictures), '--int8-images', '4']
    tool.main([*words, *options, '--check'])
    said = capsys.readouterr().out.splitlines()
    assert 1e-4 < float(said[-2].split()[5]) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize('words', [['tensorrt', 'a.engine'], ['onnx', 'a.onnx', '--int8', 'PICTURES']], ids=str)
def test_opset(tool, folder, pictures, tmp_path, words):
    onnx = pytest.importorskip('onnx')
    target, out, *others = [str(pictures) if word == 'PICTURES' else word for word in words]
    tool.main([f'local-dir:{folder}', target, str(tmp_path / out), '--size', '64', '--opset', '18', *others])
    opsets = {opset.domain: opset.version for opset in onnx.load(tmp_path / 'a.onnx').opset_import}
    assert opsets[''] == 18


@pytest.mark.slow
def test_opset_that_is_not_there(tool, folder, tmp_path):
    onnx = pytest.importorskip('onnx')
    newest = onnx.defs.onnx_opset_version()
    with pytest.raises(ValueError, match=rf'^--opset 99: onnx {onnx.__version__} has operator sets up to {newest}$'):
        tool.main([f'local-dir:{folder}', 'onnx', str(tmp_path / 'a.onnx'), '--opset', '99'])


@pytest.mark.slow
@pytest.mark.parametrize('target', INT8)
def test_eight_bits_of_a_fixed_batch(tool, folder, pictures, tmp_path, capsys, target):
    """Of three images, and ten that are told."""
    for package in (*TARGETS[target].packages, *INT8[target]):
        pytest.importorskip(package)
    out = tmp_path / f'int8{TARGETS[target].suffix}'
    words = ['--int8', str(pictures), '--int8-images', '3', '--batch', '3', '--accuracy', str(pictures)]
    tool.main([f'local-dir:{folder}', target, str(out), '--size', '64', *words])
    assert 'top-1 on 10 images: ' in capsys.readouterr().out


@torch.no_grad()
def test_small_images(tmp_path):
    """The example is larger than the network's images, the file is for theirs."""
    net = small('skresnet18')
    deployable = prepare(net, {**PREPROCESSING, **NORMALISE}, 'net', 32, dynamic=BOTH)
    assert tuple(deployable.image.shape) == (2, 3, 64, 64)
    assert deployable.size == (32, 32)
    assert deployable.shapes() == [(1, 32, 32), (1, 65, 32), (3, 32, 32), (3, 65, 32)]
    TARGETS['torchscript'].write(deployable, tmp_path / 'a.ts')
    assert difference(deployable, TARGETS['torchscript'].run(tmp_path / 'a.ts', 1)) < 1e-4
    assert '--minShapes=image:1x3x32x32' in trtexec(deployable, tmp_path / 'a.onnx', tmp_path / 'a.engine')


def test_check_of_a_network_of_one_size(tool, tmp_path):
    net = ['vit_tiny_patch16_224', 'torchscript', str(tmp_path / 'a.ts'), '--check']
    with pytest.raises(ValueError, match=r'takes no images of \(1, 3, 257, 193\): .*; --no-dynamic'):
        tool.main(net)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    'words', [[], ['--batch', '8'], ['--int8', 'photos'], ['--int8', 'photos', '--batch', '8']], ids=str
)
def test_aoti_leaves_the_batch_open_in_float_alone(tool, tmp_path, monkeypatch, words):
    from _export import targets

    monkeypatch.setattr(targets, 'require', lambda *packages, **kwargs: None)
    args = tool.parse_args(['sknet50', 'aoti', str(tmp_path / 'a.pt2'), *words])
    assert tool._check_target(args) == ({'batch'} if not words else set())


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
    monkeypatch.setattr(targets, 'write_onnx', lambda deployable, path, opset, width: path.write_text('graph'))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    tool.main([f'local-dir:{folder}', 'tensorrt', str(tmp_path / 'a.engine'), '--size', '64'])
    said = capsys.readouterr().out.splitlines()
    assert [path.name for path in tmp_path.iterdir()] == ['a.onnx']
    assert said[-1] == (
        f'trtexec --onnx={tmp_path}/a.onnx --saveEngine={tmp_path}/a.engine --minShapes=image:1x3x64x64 '
        '--optShapes=image:8x3x64x64 --maxShapes=image:64x3x128x128'
    )


@pytest.mark.slow
def test_tensorrts_check_runs_the_onnx_file(tool, folder, tmp_path, capsys):
    for name in ('onnxscript', 'onnxruntime'):
        pytest.importorskip(name)
    words = [f'local-dir:{folder}', 'tensorrt', str(tmp_path / 'a.engine'), '--size', '64', '--check']
    tool.main([*words, '--json', str(tmp_path / 'found.json')])
    assert ', the ONNX file in ONNX Runtime)' in capsys.readouterr().out
    assert json.loads((tmp_path / 'found.json').read_text())['difference'] < 1e-4


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
