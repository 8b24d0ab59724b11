"""tools/export.py: what it refuses, a line each, and that nothing is written then."""

import importlib

import pytest
import timm
from _export import TARGET_NAMES
from _export.targets import TARGETS

from sk_plugins.weights import save_state_dict


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('export')


NET = 'skshufflenetv2_x0_5'
FCN = 'fcn_sknet50-d8_4xb4-80k_ade20k-512x512'
# What goes wrong before anything is written.
WRONG = [
    (['sknet51', 'torchscript', 'a.ts'], "model 'sknet51' is neither a name of timm nor a config"),
    ([NET, 'torchscript', 'a.ts', '--checkpoint', 'nothing.pth'], r'nothing\.pth: no such checkpoint file'),
    ([NET, 'torchscript', 'a.ts', '--pretrained'], f'{NET} has no published weights'),
    (['sknet_digits', 'torchscript', 'a.ts', '--pretrained'], 'is not a model of timm; give a config its --checkpoint'),
    ([NET, 'torchscript', 'a.onnx'], r'a\.onnx must end in \.ts for the target torchscript'),
    ([NET, 'aoti', 'a.pt2', '--dynamic'], '--dynamic: a file for aoti leaves the batch open, not the size'),
    ([NET, 'ncnn', 'a', '--dynamic'], '--dynamic: a file for ncnn is of one batch and size'),
    ([NET, 'ncnn', 'a', '--batch', '2'], '--batch 2: ncnn takes one image at a time'),
    ([NET, 'ncnn', 'a', '--preprocess'], '--preprocess: ncnn has no uint8 input; its Mat::from_pixels'),
    ([NET, 'coreml', 'a.mlpackage', '--preprocess'], '--preprocess: coreml has no uint8 tensors'),
    ([NET, 'coreml', 'a.mlpackage', '--benchmark'], '--benchmark: Core ML cannot be run on this machine'),
    ([NET, 'tensorrt', 'a.engine', '--check', '--benchmark'], '--benchmark: TensorRT cannot be run on this machine'),
    ([NET, 'onnx', 'a.onnx', '--int8', 'nowhere'], 'nowhere: no such folder of images'),
    ([NET, 'onnx', 'a.onnx', '--int8', 'empty'], 'empty: has no images'),
    ([NET, 'onnx', 'a.onnx', '--int8', 'broken'], r'broken/a\.png: is no image that can be read'),
    ([NET, 'torchscript', 'a.ts', '--accuracy', 'empty'], 'empty: has no images'),
    (['retinanet', 'torchscript', 'a.ts'], 'retinanet has no classifier: --features exports the feature maps of the'),
    (
        [NET, 'torchscript', 'a.ts', '--accuracy', 'broken'],
        'broken: has no folders, of which there is to be one',
    ),
    (
        [NET, 'torchscript', 'a.ts', '--accuracy', '.'],
        r'\.: has 3 folders, and the network 1000 classes',
    ),
    ([NET, 'ncnn', 'seven.pth'], r'seven\.pth: is a file, and ncnn writes a folder'),
    ([NET, 'torchscript', 'seven.pth/a.ts'], r'seven\.pth/a\.ts: seven\.pth is no folder'),
    (['grey', 'onnx', 'a.onnx', '--int8', 'broken'], '--int8: reads RGB images, and grey has 1 input channels'),
    (['grey', 'torchscript', 'a.ts', '--preprocess'], '--preprocess: takes RGB images, and grey has 1 input channels'),
    (['seven.pth', 'torchscript', 'a.ts'], r'seven\.pth: its weights do not fit'),
    ([FCN, 'torchscript', 'a.ts', '--checkpoint', 'nothing.pth'], r'nothing\.pth: no such checkpoint file'),
    (['good', 'hub'], r'good: is no work dir of a finetune run: it has no finetune\.json and config\.py'),
]


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp('place')
    for name in ('empty', 'broken', 'good'):
        (folder / name).mkdir()
    (folder / 'broken' / 'a.png').write_text('none')
    save_state_dict(timm.create_model(NET, num_classes=7).state_dict(), folder / 'seven.pth')
    return folder


@pytest.mark.parametrize(('words', 'said'), WRONG, ids=lambda value: value[1] if isinstance(value, list) else '')
def test_wrong_uses(tool, place, monkeypatch, words, said):
    from _export import deployable

    monkeypatch.chdir(place)
    if words[0] in ('retinanet', 'grey', 'seven.pth'):
        kwargs = {'retinanet': dict(num_classes=0), 'grey': dict(in_chans=1)}.get(words[0])
        if kwargs is None:
            words = ['shufflenetv2_x0_5', *words[1:], '--checkpoint', 'seven.pth']
        else:
            net = timm.create_model(NET, **kwargs).eval()
            data = dict(input_size=(net.in_chans, 64, 64), mean=(0.5,), std=(0.2,))
            monkeypatch.setattr(deployable, 'build', lambda *args: (net, data))
    if words[1] == 'hub':
        pytest.importorskip('mmengine')
    if words[0] == FCN:
        pytest.importorskip('mmseg')
    if words[1] != 'hub':
        monkeypatch.setattr(TARGETS[words[1]].__class__, 'require', lambda self: None)
    before = sorted(place.rglob('*'))
    with pytest.raises((ValueError, OSError, RuntimeError), match=said) as caught:
        tool.main(words)
    assert '\n' not in str(caught.value).strip()
    assert sorted(place.rglob('*')) == before


def test_check_refuses_other_outputs_and_leaves_nothing(tool, tmp_path, monkeypatch):
    from _export import running

    monkeypatch.setattr(running, 'difference', lambda *args: 0.02)
    out = tmp_path / 'model.ts'
    out.write_bytes(b'older')
    with pytest.raises(ValueError, match=r"--check: the file's outputs differ from eager mode's by 0\.02 > 0\.0001"):
        tool.main([NET, 'torchscript', str(out), '--size', '64', '--check'])
    assert out.read_bytes() == b'older'
    assert [path.name for path in tmp_path.iterdir()] == ['model.ts']


@pytest.mark.parametrize('target', TARGET_NAMES)
def test_missing_packages(tool, target, tmp_path, monkeypatch):
    """The library of a target is asked for only where the target is, and its extra is named."""
    find_spec = importlib.util.find_spec
    hidden = set(TARGETS[target].packages)
    if not hidden:
        pytest.skip('torch alone')
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name in hidden else find_spec(name))
    words = [NET, target, str(tmp_path / f'a{TARGETS[target].suffix}')]
    with pytest.raises(ValueError, match=rf"^{', '.join(TARGETS[target].packages)} not installed: .*pip install '\.\["):
        tool.main(words)


def test_missing_quantiser(tool, place, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'torchao' else find_spec(name))
    monkeypatch.setattr(TARGETS['aoti'].__class__, 'require', lambda self: None)
    with pytest.raises(ValueError, match=r"^torchao not installed: pip install '\.\[int8\]' in a clone of sk-plugins$"):
        tool.main([NET, 'aoti', str(tmp_path / 'a.pt2'), '--int8', str(place / 'broken')])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('words', 'said'),
    [
        ([NET, 'onxx', 'a.onnx'], "there is no target 'onxx'; near it is onnx"),
        ([NET, 'onnx'], 'the following arguments are required: OUT'),
        ([NET, 'onnx', 'a.onnx', '--size', '0'], '--size: 0 must be at least 1'),
        ([NET, 'onnx', 'a.onnx', '--pretrained', '--checkpoint', 'b'], 'not allowed with'),
        (
            [NET, 'openvino', 'a.xml', '--opset', '18'],
            'argument --opset: for onnx and tensorrt, not openvino',
        ),
        (
            [NET, 'ncnn', 'a', '--int8', 'b'],
            'argument --int8: for onnx, openvino, aoti, executorch and litert, not ncnn',
        ),
        (
            [NET, 'onnx', 'a.onnx', '--int8-float', 'both'],
            'argument --int8-float: needs --int8 FOLDER',
        ),
        ([NET, 'onnx', 'a.onnx', '--int8-images', '5'], 'argument --int8-images: needs --int8 FOLDER'),
        ([NET, 'onnx', 'a.onnx', '--json', 'nowhere/a.json'], 'argument --json: nowhere is no folder'),
        (
            [NET, 'onnx', 'a.onnx', '--batch', '2', '--dynamic'],
            'argument --batch: not with --dynamic',
        ),
        (
            [NET, 'onnx', 'a.onnx', '--features', '--accuracy', 'b'],
            'argument --features: not with --accuracy',
        ),
        ([NET, 'onnx', 'a.onnx', '--license', 'mit'], 'argument --license: for the target hub'),
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
