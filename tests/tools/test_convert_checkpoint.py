"""tools/convert_checkpoint.py: its three targets, and what it refuses."""

import json

import pytest

pytest.importorskip('mmpretrain')

import timm
import torch
from helpers.randomised import randomise
from helpers.simclr import Variables, make_lightly
from helpers.third_party_networks import SKConv, SKNet, insight_net, lucid_net
from helpers.tolerances import assert_close
from mmpretrain.registry import MODELS

from sk_plugins._resources import ROOT, find_config
from sk_plugins.weights import CheckpointError, load_checkpoint, save_state_dict, tensorflow, to_mmpretrain, to_timm


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('convert_checkpoint')


@pytest.fixture
def convert(tool, capsys):
    """``convert(*words)``: the tool in this process, which prints what it wrote."""

    def run(*words):
        tool.main([str(word) for word in words])
        assert capsys.readouterr().out == f'{words[1]}\n'

    return run


@pytest.fixture(scope='module')
def checkpoint(digits_run):
    return digits_run / 'epoch_2.pth'


@pytest.fixture(scope='module')
def weights(checkpoint):
    return load_checkpoint(checkpoint)[0]


def assert_same(got, expected):
    assert set(got) == set(expected)
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


@pytest.mark.parametrize(
    ('out', 'words', 'to'),
    [
        ('sknet_hub', ['--config', 'sknet_digits'], 'hub'),
        ('sknet.v2', ['--config', 'sknet_digits', '--to', 'hub'], 'hub'),
        ('sknet.safetensors', [], 'timm'),
        ('sknet.pth', ['--to', 'timm'], 'timm'),
        ('sknet.pth', [], 'mmengine'),
        ('sknet.safetensors', ['--to', 'mmengine'], 'mmengine'),
    ],
)
def test_target(tool, out, words, to):
    assert tool.parse_args(['epoch.pth', out, *words]).to == to


@pytest.mark.parametrize(
    ('words', 'said'),
    [
        (['epoch.pth', 'sknet', '--to', 'timm'], '--to timm writes one file: give sknet an ending'),
        (['epoch.pth', 'sknet', '--to', 'mmengine'], '--to mmengine writes one file: give sknet an ending'),
        (['epoch.pth', 'sknet.pth', '--to', 'onnx'], "argument --to: invalid choice: 'onnx'"),
        (['epoch.pth'], 'the following arguments are required: out'),
    ],
)
def test_bad_arguments(tool, capsys, words, said):
    with pytest.raises(SystemExit) as caught:
        tool.main(words)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_to_hub(convert, checkpoint, weights, tmp_path):
    folder = tmp_path / 'sknet_hub'
    convert(checkpoint, folder, '--config', 'sknet_digits')
    assert sorted(p.name for p in folder.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    config = json.loads((folder / 'config.json').read_text())
    assert (config['architecture'], config['num_classes']) == ('sknet26', 10)
    assert config['label_names'] == list('0123456789')
    assert 'sknet26 trained with the config sknet_digits of sk-plugins.' in (folder / 'README.md').read_text()
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert_same(to_mmpretrain(model.state_dict()), weights)


@pytest.mark.parametrize('name', ['sknet.safetensors', 'sknet.pth'])
def test_to_timm_and_back(convert, checkpoint, weights, tmp_path, name):
    convert(checkpoint, tmp_path / name, '--to', 'timm')
    assert_same(load_checkpoint(tmp_path / name)[0], to_timm(weights))
    convert(tmp_path / name, tmp_path / 'back.pth', '--to', 'mmengine')
    assert_same(load_checkpoint(tmp_path / 'back.pth')[0], weights)


def test_to_mmengine_keeps_meta_and_drops_the_rest(convert, checkpoint, weights, tmp_path):
    convert(checkpoint, tmp_path / 'small.pth')
    small = torch.load(tmp_path / 'small.pth', weights_only=True)
    assert set(small) == {'meta', 'state_dict'}
    assert tuple(small['meta']['dataset_meta']['classes']) == tuple('0123456789')
    assert small['meta']['epoch'] == 2
    assert_same(small['state_dict'], weights)


def test_no_ema(convert, weights, tmp_path):
    """As mmengine's EMAHook saves: the averaged weights in 'state_dict', the trained ones beside them."""
    trained = {f'module.{k}': v + 1 for k, v in weights.items()}
    torch.save(dict(state_dict=weights, ema_state_dict={**trained, 'steps': torch.tensor(6)}), tmp_path / 'ema.pth')
    convert(tmp_path / 'ema.pth', tmp_path / 'averaged.safetensors')
    assert_same(load_checkpoint(tmp_path / 'averaged.safetensors')[0], to_timm(weights))
    convert(tmp_path / 'ema.pth', tmp_path / 'trained.safetensors', '--no-ema')
    expected = {k: v + 1 for k, v in to_timm(weights).items()}
    assert_same(load_checkpoint(tmp_path / 'trained.safetensors')[0], expected)


def test_command(python_tool, checkpoint, weights, tmp_path):
    assert (
        python_tool('convert_checkpoint', checkpoint, 'sknet.safetensors', cwd=tmp_path).stdout == 'sknet.safetensors\n'
    )
    assert_same(load_checkpoint(tmp_path / 'sknet.safetensors')[0], to_timm(weights))


# Other projects' weights.


@pytest.fixture
def convert_third_party(tool, capsys):
    def run(network, tmp_path, *words):
        torch.save({'state_dict': network.state_dict()}, tmp_path / 'theirs.pth')
        tool.main([str(tmp_path / 'theirs.pth'), *map(str, words)])
        *lines, out = capsys.readouterr().out.splitlines()
        assert out == str(words[0])
        return lines

    return run


def sknet26():
    torch.manual_seed(0)
    shape = dict(widths=(16, 32, 64, 128), outputs=(16, 64, 128, 256), dims=(8, 8, 8, 8), layers=(2, 2, 2, 2))
    return randomise(SKNet(**shape))


ARGUMENTS = "channels=(8, 16, 32, 64), cardinality=4, base_width=32, sk_kwargs={'min_dim': 8, 'select_bias': True}"


def test_third_party_to_hub(convert_third_party, tmp_path):
    network = sknet26()
    lines = convert_third_party(network, tmp_path, tmp_path / 'hub')
    assert lines == [
        'recognised as a network of SKConv and SKUnit (as of developer0hye, syt2)',
        'stage 1: outputs padded from 16 to 32 channels',
        f"its network: timm.create_model('sknet26', {ARGUMENTS}, num_classes=7)",
    ]
    config = json.loads((tmp_path / 'hub' / 'config.json').read_text())
    assert (config['architecture'], config['num_classes']) == ('sknet26', 7)
    assert config['model_args']['sk_kwargs'] == {'min_dim': 8, 'select_bias': True}
    assert 'sknet26 with the weights of a network of SKConv' in (tmp_path / 'hub' / 'README.md').read_text()
    model = timm.create_model(f'local-dir:{tmp_path / "hub"}', pretrained=True).eval()
    x = torch.randn(2, 3, 40, 40)
    assert_close(model(x), network(x), length=network)


@pytest.mark.parametrize('name', ['ours.safetensors', 'ours.pth'])
def test_third_party_to_timm(convert_third_party, tmp_path, name):
    network = randomise(insight_net(layers=(2, 2, 2, 2)))
    lines = convert_third_party(network, tmp_path, tmp_path / name, '--to', 'timm')
    assert lines[0] == "recognised as PytorchInsight's sk_resnet"
    prefix, call = lines[1].split('its network: timm.create_model')
    assert prefix == ''
    model = eval(f'timm.create_model{call}', {'timm': timm}).eval()
    model.load_state_dict(load_checkpoint(tmp_path / name)[0], strict=True)
    x = torch.randn(2, 3, 40, 40)
    assert_close(model(x), network(x), length=network)


def test_third_party_to_mmengine(convert_third_party, tmp_path):
    network = sknet26()
    lines = convert_third_party(network, tmp_path, tmp_path / 'ours.pth')
    assert lines[-1] == f"its network: backbone=dict(type='SKNet', depth=26, {ARGUMENTS})"
    head = dict(type='LinearClsHead', num_classes=7, in_channels=256)
    backbone = eval(lines[-1].removeprefix('its network: backbone='))
    model = MODELS.build(
        dict(type='ImageClassifier', backbone=backbone, neck=dict(type='GlobalAveragePooling'), head=head)
    )
    model.load_state_dict(torch.load(tmp_path / 'ours.pth', weights_only=True)['state_dict'], strict=True)
    x = torch.randn(2, 3, 40, 40)
    assert_close(model.eval()(x, mode='tensor'), network(x), length=network)


def test_third_party_without_a_registered_name(convert_third_party, tmp_path):
    """Its state dict can be had; a folder that names a model would lie."""
    network = randomise(lucid_net(expansion=1))
    lines = convert_third_party(network, tmp_path, tmp_path / 'ours.safetensors')
    said = "lucid's SKNet: its units do not widen their output, which no registered model has"
    assert lines[-1] == (f'its network: sk_plugins.weights.load_third_party, for it is no registered model ({said})')
    with pytest.raises(CheckpointError, match=rf'theirs\.pth: {said}; sk_plugins\.weights\.load_third_party builds'):
        convert_third_party(network, tmp_path, tmp_path / 'hub')
    with pytest.raises(CheckpointError, match=r"recognised as lucid's SKNet, which no --config of this project desc"):
        convert_third_party(network, tmp_path, tmp_path / 'hub', '--config', 'sknet_digits')
    assert not (tmp_path / 'hub').exists()


def test_googles_folder_tells_what_a_classifier_stands_on(tool, tmp_path, monkeypatch, capsys):
    """For OpenMMLab there is no such network."""
    _, weights = make_lightly(projection=2)
    monkeypatch.setattr(tensorflow, 'read', lambda path: dict(Variables(weights)))
    for folder, layers in (('finetuned_10pct', 1), ('finetuned_100pct', 0)):
        path = tmp_path / folder / 'model.ckpt-7'
        path.parent.mkdir()
        path.with_name('model.ckpt-7.index').touch()
        out = tmp_path / f'{folder}.safetensors'
        tool.main([str(path), str(out)])
        assert capsys.readouterr().out.startswith("recognised as Google's SimCLRv2\n")
        assert sum(name.endswith('.running_mean') for name in load_checkpoint(out)[0] if 'projection' in name) == layers
        if layers:
            with pytest.raises(CheckpointError, match=r'model\.ckpt-7: .*load_third_party builds it'):
                tool.main([str(path), str(out.with_suffix('.pth'))])
            assert not out.with_suffix('.pth').exists()


# What is refused: one error that names the file, and nothing written.


@pytest.mark.parametrize(
    'words', [['out.safetensors'], ['out.pth'], ['out'], ['out', '--config', 'sknet_digits']], ids=' '.join
)
@pytest.mark.parametrize(
    ('content', 'error', 'said'),
    [
        (None, FileNotFoundError, 'no such checkpoint file'),
        (b'', CheckpointError, r'epoch\.pth: \S'),
        (b'PK\x03\x04 but no more', CheckpointError, r'epoch\.pth: \S'),
        ({'stem.weight': torch.zeros(3)}, CheckpointError, r'epoch\.pth: not recognised: .*Supported are'),
        (
            SKConv(16, 8).state_dict(),
            CheckpointError,
            r'epoch\.pth: recognised as an SKConv layer, which is no network',
        ),
        ({'stage_1.0.conv2.convs.0.0.weight': torch.zeros(3)}, CheckpointError, r'epoch\.pth: .*SKUnit .* is missing$'),
    ],
    ids=['missing', 'empty', 'truncated', 'unknown', 'a layer', 'broken'],
)
def test_refused(tool, tmp_path, content, error, said, words):
    path = tmp_path / 'epoch.pth'
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    out, *words = words
    with pytest.raises(error, match=said):
        tool.main([str(path), str(tmp_path / out), *words])
    assert [p.name for p in tmp_path.iterdir()] == ([] if content is None else ['epoch.pth'])


TOOLS = ROOT / 'tools'


def test_without_mmengine(checkpoint, weights, tmp_path, run_python):
    """timm's side alone takes timm alone."""
    code = (
        'import importlib.util, runpy, sys\n'
        'def find(name, path=None, target=None):\n'
        '    if name.partition(".")[0] in ("mmengine", "mmcv", "mmpretrain"): raise ModuleNotFoundError(name)\n'
        'finder = type("Finder", (), {"find_spec": staticmethod(find)})\n'
        'for name in list(sys.modules):\n'
        '    if name.partition(".")[0] in ("mmengine", "mmcv", "mmpretrain"): del sys.modules[name]\n'
        'sys.meta_path.insert(0, finder)\n'
        f'sys.path.insert(0, {str(TOOLS)!r})\n'
        'sys.argv = ["convert_checkpoint.py", *sys.argv[1:]]\n'
        f'runpy.run_path({str(TOOLS / "convert_checkpoint.py")!r}, run_name="__main__")\n'
    )
    done = run_python('-c', code, checkpoint, tmp_path / 'out.safetensors')
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(tmp_path / 'out.safetensors')[0].keys() == to_timm(weights).keys()
    done = run_python('-c', code, checkpoint, tmp_path / 'hub', '--config', 'sknet_digits')
    assert done.returncode == 1
    assert '--config sknet_digits: to read a config takes mmengine: ' in done.stderr


def test_hub_folder_without_a_config(tool, checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match=r'epoch_2\.pth: a Hub folder needs --config'):
        tool.main([str(checkpoint), str(tmp_path / 'out')])
    assert list(tmp_path.iterdir()) == []


def test_wrong_shapes(tool, weights, tmp_path):
    save_state_dict({**to_timm(weights), 'fc.bias': torch.zeros(7)}, tmp_path / 'epoch.safetensors')
    with pytest.raises(CheckpointError, match=r'epoch\.safetensors: the weights do not fit sknet26 [\s\S]*fc\.bias'):
        tool.main([str(tmp_path / 'epoch.safetensors'), str(tmp_path / 'out'), '--config', 'sknet_digits'])
    assert [p.name for p in tmp_path.iterdir()] == ['epoch.safetensors']


def test_another_config(tool, checkpoint, tmp_path):
    with pytest.raises(
        CheckpointError, match=r'epoch_2\.pth: the weights do not fit sknet26 with .*num_classes.: 1000'
    ):
        tool.main([str(checkpoint), str(tmp_path / 'out'), '--config', str(find_config('sknet26_in1k'))])
    with pytest.raises(FileNotFoundError, match=r"config 'nonsense' is neither a file nor .*sknet_digits"):
        tool.main([str(checkpoint), str(tmp_path / 'out'), '--config', 'nonsense'])
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_not_empty(tool, checkpoint, tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='exists and is not empty'):
        tool.main([str(checkpoint), str(tmp_path), '--config', 'sknet_digits', '--to', 'hub'])
    assert [p.name for p in tmp_path.iterdir()] == ['notes.txt']
