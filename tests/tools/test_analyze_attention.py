"""tools/analyze_attention.py: every kind of model in, figures and numbers out, and what it refuses."""

import csv

import pytest

pytest.importorskip('matplotlib')

import numpy as np
import timm
import torch
from helpers.randomised import randomise
from helpers.tolerances import assert_close
from PIL import Image
from safetensors.torch import save
from timm.models import save_for_hf

import sk_plugins  # noqa: F401 - registers the models
from sk_plugins.analysis import record
from sk_plugins.weights import HubError, save_state_dict, to_mmpretrain

SMALL = dict(channels=(16, 32, 64), layers=(1, 2, 1), cardinality=4, base_width=16, num_classes=10)
QUICK = ['--size', '32', '--workers', '0', '--scales', '1', '2', '--field-images', '2']
UNITS = ['SK_2_1', 'SK_3_1', 'SK_3_2', 'SK_4_1']


@pytest.fixture(scope='module')
def tool(load_tool):
    return load_tool('analyze_attention')


def hub_folder(folder, **kwargs):
    torch.manual_seed(0)
    model = randomise(timm.create_model('sknet50', **SMALL, **kwargs))
    save_for_hf(model, folder, safe_serialization=True, model_args=dict(SMALL, **kwargs))
    return f'local-dir:{folder}', model


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """A small SKNet as timm reads it, and the model itself."""
    return hub_folder(tmp_path_factory.mktemp('hub') / 'sknet')


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Two classes of two images each, and a broken one."""
    folder = tmp_path_factory.mktemp('images')
    for name, shade in (('dark', 40), ('light', 220)):
        (folder / name).mkdir()
        for i in range(2):
            image = Image.linear_gradient('L').resize((48 + 8 * i, 40)).point(lambda v, s=shade: (v + s) // 2)
            image.convert('RGB').save(folder / name / f'{i}.jpg')
    (folder / 'light' / 'torn.jpg').write_bytes((folder / 'light' / '0.jpg').read_bytes()[:300])
    return folder


def differences(folder):
    with (folder / 'units.csv').open(encoding='utf-8') as file:
        rows = [row for row in csv.DictReader(file) if row['kernel'] == '3x3']
    return {(row['unit'], float(row['scale'])): float(row['difference']) for row in rows}


def test_model_of_a_folder(tool, small, images, tmp_path, capsys):
    name, model = small
    out = tmp_path / 'a' / 'b'
    files = tool.main([name, str(images), '--out', str(out), *QUICK])
    assert sorted(out.iterdir()) == files
    assert [path.name for path in files if path.suffix == '.png'] == [
        'attention_channels.png',
        'attention_classes.png',
        'attention_depth.png',
        'receptive_field.png',
    ]
    captured = capsys.readouterr()
    assert f'skipped {images / "light" / "torn.jpg"}: OSError: ' in captured.err
    assert '5/5' in captured.err  # the progress bar
    said = captured.out.splitlines()
    assert said[0] == '4 images, 1 skipped; mean attention difference by scale:'
    assert said[1].split() == ['1x', '2x']
    got = differences(out)
    assert [line.split()[0] for line in said[2:6]] == UNITS
    expected = []  # at scale 1
    for path in sorted(images.rglob('[01].jpg')):
        image = Image.open(path)
        side = min(image.size) * 0.875
        square = ((image.width - side) / 2, (image.height - side) / 2)
        square = (*square, square[0] + side, square[1] + side)
        pixels = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC, square)) / 255
        x = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        x = torch.tensor(x).permute(2, 0, 1)[None].float()
        with torch.no_grad(), record(model, ['SK_3_2']) as attention:
            model(x)
        expected.append((attention['SK_3_2'][:, 1] - attention['SK_3_2'][:, 0]).mean().item())
    assert_close(got['SK_3_2', 1.0], sum(expected) / 4, length=model, dtype=torch.float32, scale=1.0)
    assert abs(got['SK_3_2', 1.0]) > 1e-4


@pytest.mark.slow
def test_checkpoint_of_the_hub_and_of_mmpretrain(tool, small, images, tmp_path, hub):
    name, model = small
    tool.main([name, str(images), '--out', str(tmp_path / 'folder'), *QUICK, '--field-images', '0'])
    assert not (tmp_path / 'folder' / 'receptive_field.csv').exists()
    expected = differences(tmp_path / 'folder')
    folder = name.removeprefix('local-dir:')
    with open(f'{folder}/config.json', 'rb') as file:
        hub.add('me/tiny', {'config.json': file.read(), 'model.safetensors': save(model.state_dict())})
    tool.main(['hf-hub:me/tiny', str(images), '--out', str(tmp_path / 'hub'), *QUICK, '--field-images', '0'])
    assert differences(tmp_path / 'hub') == expected

    save_state_dict(to_mmpretrain(model.state_dict()), tmp_path / 'epoch_1.pth')
    config = tmp_path / 'config.py'
    settings = {k: v for k, v in SMALL.items() if k != 'num_classes'}
    config.write_text(
        "model = dict(type='ImageClassifier', "
        f"backbone=dict(type='SKNet', depth=50, **{settings!r}), "
        "neck=dict(type='GlobalAveragePooling'), head=dict(type='LinearClsHead', num_classes=10, in_channels=256), "
        'data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True))\n',
        encoding='utf-8',
    )
    pytest.importorskip('mmengine')
    words = [str(config), str(images), '--checkpoint', str(tmp_path / 'epoch_1.pth'), '--crop-pct', '0.875']
    tool.main([*words, '--out', str(tmp_path / 'mm'), *QUICK])
    assert_close(differences(tmp_path / 'mm'), expected, length=model, dtype=torch.float32, scale=1.0)


def test_field_unit_beside_other_units(tool, small, images, tmp_path):
    tool.main([small[0], str(images), '--out', str(tmp_path), *QUICK, '--units', 'SK_2_1', '--field-unit', 'SK_3_2'])
    with (tmp_path / 'receptive_field.csv').open(encoding='utf-8') as file:
        assert {row['unit'] for row in csv.DictReader(file)} == {'SK_3_2'}


def test_bad_input(tool, small, images, tmp_path, hub):
    name, _ = small
    out = ['--out', str(tmp_path / 'out'), *QUICK]
    (tmp_path / 'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='empty: no images there'):
        tool.main([name, str(tmp_path / 'empty'), *out])
    with pytest.raises(FileNotFoundError, match='nowhere: no such folder'):
        tool.main([name, str(tmp_path / 'nowhere'), *out])
    with pytest.raises(ValueError, match="units has 'SK_9_9', a unit that does not exist: choose from SK_2_1, SK_3_1"):
        tool.main([name, str(images), *out, '--units', 'SK_2_1', 'SK_9_9'])
    with pytest.raises(ValueError, match='--field-unit SK_9_9 does not exist: choose from SK_2_1, SK_3_1'):
        tool.main([name, str(images), *out, '--field-unit', 'SK_9_9'])
    plain, _ = hub_folder(tmp_path / 'plain', unit='plain')
    with pytest.raises(ValueError, match='model is a SKResNet without SK units'):
        tool.main([plain, str(images), *out])
    summed, _ = hub_folder(tmp_path / 'summed', sk_kwargs=dict(select='sum'))
    with pytest.raises(ValueError, match='its SK units sum their branches'):
        tool.main([summed, str(images), *out])
    with pytest.raises(ValueError, match='sknet50_in1k is no name of timm, and a config needs its --checkpoint'):
        tool.main(['sknet50_in1k', str(images), *out])
    with pytest.raises(HubError, match='me/nothing: '):
        tool.main(['hf-hub:me/nothing', str(images), *out])
    with pytest.raises(ValueError, match=r'scales=\(0\.5,\) must be different numbers of at least 1'):
        tool.main([name, str(images), *out, '--scales', '0.5'])
    with pytest.raises(ValueError, match=r'crop_pct=0\.0 must be above 0 and at most 1'):
        tool.main([name, str(images), *out, '--crop-pct', '0'])
    with pytest.raises(ValueError, match='--device nowhere: '):
        tool.main([name, str(images), *out, '--device', 'nowhere'])
    for word in ('--limit', '--batch-size', '--channel-groups', '--size'):
        with pytest.raises(SystemExit):
            tool.main([name, str(images), *out, word, '0'])
    assert not (tmp_path / 'out').exists()


def test_folders_before_the_hub(tool, images, tmp_path, monkeypatch):
    """What is wrong with a folder is said before weights are asked for."""
    monkeypatch.setattr(tool, 'build', lambda *args, **kwargs: pytest.fail('built'))
    for model in ('sknet50', 'hf-hub:me/tiny'):
        with pytest.raises(FileNotFoundError, match=r'nowhere: no such folder$'):
            tool.main([model, str(tmp_path / 'nowhere')])
    with pytest.raises(FileNotFoundError, match=r'^local-dir:nowhere: no folder with a config\.json$'):
        tool.main(['local-dir:nowhere', str(images)])


def test_command(python_tool, small, tmp_path):
    done = python_tool('analyze_attention', small[0], tmp_path, status=1)
    assert done.stderr.startswith(f'analyze_attention.py: error: {tmp_path}: no images there')
    assert 'Traceback' not in done.stderr
