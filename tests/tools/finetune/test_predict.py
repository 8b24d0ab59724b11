"""tools/predict.py: which models and pictures it takes, and what it says, writes and draws of them."""

import csv
import json
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('mmpretrain')

import timm
import torch
from _predict import drawing, models, pictures
from helpers.randomised import randomise
from PIL import Image
from safetensors.torch import save

from sk_plugins.openmmlab.runtime.images import LoadSoundImage


@pytest.fixture(scope='module')
def predict(load_tool):
    return load_tool('predict').main


@pytest.fixture(scope='module')
def hub_folder(load_tool, colours_run, tmp_path_factory):
    """The run's model as a folder for the Hub."""
    return load_tool('export').main([str(colours_run), 'hub', str(tmp_path_factory.mktemp('hub') / 'colours_hub')])


@pytest.fixture
def photos(tmp_path, colours):
    """Pictures of the same names in two folders, and two files that are none."""
    for name in ('red', 'blue'):
        (tmp_path / 'photos' / name).mkdir(parents=True)
        for i in range(2):
            shutil.copy(colours / name / f'{i}.png', tmp_path / 'photos' / name)
    (tmp_path / 'photos' / 'broken.jpg').write_bytes(b'no picture')
    (tmp_path / 'photos' / 'notes.txt').write_text('x')
    return tmp_path / 'photos'


def test_models_of_every_kind_say_the_same(predict, colours_run, hub_folder, hub, colours, capsys):
    (best,) = colours_run.glob('best_*.pth')
    hub.add('me/colours', {path.name: path.read_bytes() for path in hub_folder.iterdir()})
    picture = str(colours / 'red' / '0.png')
    first = predict([str(colours_run), picture])
    assert {label['label'] for label in first[0]['labels']} == {'blue', 'green', 'red'}
    assert sum(label['score'] for label in first[0]['labels']) == pytest.approx(1, abs=1e-3)
    for name in (str(best), str(hub_folder), f'local-dir:{hub_folder}', 'me/colours', 'hf-hub:me/colours'):
        assert predict([name, picture]) == first, name
    assert predict([str(colours_run / 'config.py'), picture, '--checkpoint', str(best)]) == first
    assert capsys.readouterr().out.count(f'{picture}  ') == 7


def test_scores_are_timms(predict, hub_folder, photos):
    model = timm.create_model(f'local-dir:{hub_folder}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    files = sorted((photos / 'red').iterdir())
    said = predict([str(hub_folder), *map(str, files), '--batch-size', '1'])
    for one, path in zip(said, files):
        with torch.inference_mode():
            scores = model(transform(Image.open(path).convert('RGB'))[None]).softmax(1)[0]
        names = model.pretrained_cfg['label_names']
        assert {label['label']: label['score'] for label in one['labels']} == pytest.approx(
            dict(zip(names, scores.tolist())), abs=2e-4
        )


def test_imagenet_names(predict, hub, photos):
    hub.add(
        'timm/skresnet18.ra_in1k', {'model.safetensors': save(randomise(timm.create_model('skresnet18')).state_dict())}
    )
    (one,) = predict(['skresnet18', str(photos / 'red' / '0.png'), '--topk', '2'])
    model = models.load('skresnet18')
    assert len(model.classes) == 1000
    assert model.classes[0].startswith('tench')
    assert all(label['label'] in model.classes for label in one['labels'])


def test_tables(predict, colours_run, photos, tmp_path, capsys):
    said = predict([str(colours_run), str(photos), '--out', str(tmp_path / 'said.csv'), '--topk', '2'])
    captured = capsys.readouterr()
    assert f'{photos / "broken.jpg"}' in captured.out
    assert 'not read: cannot identify image file' in captured.out
    assert captured.err.strip().endswith('1 of 5 pictures were not read')
    with (tmp_path / 'said.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['image'] for row in rows] == [one['image'] for one in said]
    assert [row['label_1'] for row in rows] == [one['labels'][0]['label'] if 'labels' in one else '' for one in said]
    assert sum(bool(row['error']) for row in rows) == 1
    predict([str(colours_run), str(photos), '--out', str(tmp_path / 'said.json'), '--topk', '2'])
    assert json.loads((tmp_path / 'said.json').read_text()) == said
    with pytest.raises(SystemExit) as caught:
        predict([str(colours_run), str(photos / 'broken.jpg')])
    assert caught.value.code == 1


def test_several_labels(predict, labels_run, load_tool, tmp_path, photos):
    (one,) = predict([str(labels_run), str(photos / 'red' / '0.png')])
    scores = {label['label']: label['score'] for label in one['labels']}
    assert set(one['said']) == {name for name, score in scores.items() if score >= 0.5}
    folder = load_tool('export').main([str(labels_run), 'hub', str(tmp_path / 'hub')])
    assert json.loads((folder / 'config.json').read_text())['problem_type'] == 'multi_label_classification'
    assert predict([str(folder), str(photos / 'red' / '0.png')]) == [one]


def test_drawings(predict, colours_run, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    predict([str(colours_run), 'photos', '--attention'])
    drawn = {str(path.relative_to(tmp_path / 'predictions')) for path in (tmp_path / 'predictions').rglob('*.*')}
    assert drawn == {f'{name}/{i}.png' for name in ('red', 'blue') for i in range(2)}
    wide = Image.open(tmp_path / 'predictions' / 'red' / '0.png').size
    predict([str(colours_run), 'photos/red/0.png', '--draw', 'plain'])
    plain = Image.open(tmp_path / 'plain' / '0.png').size
    assert wide[0] > 1.8 * plain[0]


def test_attention_adds_up_to_one(colours_run, colours):
    from sk_plugins.analysis import record

    network = models.load(str(colours_run)).network
    with record(network) as attention, torch.inference_mode():
        network(torch.randn(2, 3, 64, 64))
    shares = drawing.unit_shares(network, attention)
    assert list(shares) == ['SK_2_1', 'SK_3_1', 'SK_4_1', 'SK_5_1']
    for kernels, values in shares.values():
        assert kernels == ('3x3', '5x5')
        assert values.shape == (2, 2)
        assert values.sum(1) == pytest.approx(1, abs=1e-5)


def test_class_activation_maps(predict, colours_run, photos, tmp_path):
    pytest.importorskip('pytorch_grad_cam')
    network = models.load(str(colours_run)).network
    images = torch.randn(2, 3, 64, 64)
    before = network(images)
    maps = drawing.Maps(network)(images, [0, 2])
    assert maps.shape == (2, 64, 64)
    assert 0 <= maps.min() <= maps.max() <= 1
    assert torch.equal(network(images), before)
    predict([str(colours_run), str(photos / 'red'), '--cam', '--attention', '--draw', str(tmp_path / 'drawn')])
    assert Image.open(tmp_path / 'drawn' / '0.png').size[0] > 1000


def test_without_the_library_for_maps(predict, colours_run, photos, monkeypatch):
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if 'cam' in name else find_spec(name))
    with pytest.raises(ValueError, match=r'^--cam: grad-cam, which draws it, is not installed: pip install .*\[cam\]'):
        predict([str(colours_run), str(photos / 'red'), '--cam'])


def test_names_of_drawings():
    names = pictures.output_names(['/a/x/1.jpg', '/a/y/1.jpg', '/a/y/2.jpg', '/a/y/2.png', 'https://h.org/z/1.jpg'])
    assert list(map(str, names)) == ['x/1.png', 'y/1.png', 'y/2.jpg.png', 'y/2.png.png', '1.png']
    assert len(set(pictures.output_names(['https://h.org/a/1.jpg', 'https://h.org/b/1.jpg']))) == 2


@pytest.mark.parametrize('ending', ['png', 'tif', 'pgm'])
def test_16_bits_are_read_as_in_training(tmp_path, ending):
    values = (np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)
    path = tmp_path / f'deep.{ending}'
    if ending == 'pgm':
        path.write_bytes(b'P5 64 64 65535\n' + values.astype('>u2').tobytes())
    else:
        Image.fromarray(values).save(path)
    own = np.asarray(pictures.open_picture(str(path)))
    assert own[0, 0].tolist() == [0, 0, 0]
    assert own[32, 32].tolist() == [130, 130, 130]
    assert np.array_equal(own, LoadSoundImage().transform(dict(img_path=str(path)))['img'])


def test_32_bits_are_refused(tmp_path):
    Image.fromarray(np.ones((8, 8), np.int32)).save(tmp_path / 'deep.tif')
    with pytest.raises(ValueError, match=r'^pixels of 32 bits \(Pillow: I\), whose range is not known'):
        pictures.open_picture(str(tmp_path / 'deep.tif'))


def test_patterns_and_addresses(photos, tmp_path):
    assert [Path(p).name for p in pictures.find([str(photos / '*' / '0.png')])] == ['0.png', '0.png']
    assert len(pictures.find([str(photos), str(photos / 'red' / '0.png')])) == 5
    handler = type('Quiet', (SimpleHTTPRequestHandler,), dict(log_message=lambda *_: None))
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(handler, directory=str(photos)))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        address = f'http://127.0.0.1:{server.server_port}/red/0.png'
        assert pictures.find([address]) == [address]
        there = np.asarray(pictures.open_picture(address))
        assert np.array_equal(there, np.asarray(Image.open(photos / 'red' / '0.png').convert('RGB')))
        (batch,) = pictures.Pictures([address + 'x'], lambda image: image).batches(4, 0)
        assert batch.broken == [(0, 'HTTP Error 404: File not found')]
    finally:
        server.shutdown()
        server.server_close()
