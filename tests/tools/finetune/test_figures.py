"""Four sets of real images, from files to the Hub and back by the commands of docs/own_images.md.

Each set goes through finetune, predict on pictures that it has not seen, export and push, and what comes back from the
Hub, by timm and by transformers, gives the same logits. `pytest -m slow -rP` of this file prints the rows.
"""

import csv
import gzip
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('mmpretrain')

import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

GARMENTS = ('t-shirt', 'trouser', 'pullover', 'dress', 'coat', 'sandal', 'shirt', 'sneaker', 'bag', 'ankle boot')
# The networks, small ones since they start from nothing, and the least score, of 100, on pictures not seen.
SETS = {
    'digits': ('sknet_digits', 95),
    'three': ('sknet_fashion_mnist', 75),
    'garments': ('skshufflenetv2_x0_5', 80),
    'scenes': ('skshufflenetv2_x0_5', 30),
}


def write_png(array, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture(scope='module')
def fashion_mnist(load_tool):
    """``fashion_mnist(split)``: images (N, 28, 28) and labels (N,) of 'train' or 't10k'."""
    debian = load_tool('prepare_fashion_mnist').DEBIAN
    if not debian.is_dir():
        pytest.skip(f'no Fashion-MNIST in {debian}: install the package dataset-fashion-mnist')

    def read(split):
        images, labels = (
            np.frombuffer(gzip.decompress((debian / f'{split}-{kind}-ubyte.gz').read_bytes())[start:], np.uint8)
            for kind, start in (('images-idx3', 16), ('labels-idx1', 8))
        )
        return images.reshape(-1, 28, 28), labels

    return read


def write_digits(folder, seen, request):
    """scikit-learn's digits, of which every fifth is not seen."""
    digits = load_digits()
    for i, (image, label) in enumerate(zip(digits.images, digits.target)):
        if (i % 5 > 0) == seen:
            write_png((image * (255 / 16)).round().astype(np.uint8), folder / str(label) / f'{i}.png')
    return folder


def write_garments(folder, seen, request, classes=10, count=1000):
    """So many of each of the first classes; what is not seen are Fashion-MNIST's test images."""
    images, labels = request.getfixturevalue('fashion_mnist')('train' if seen else 't10k')
    for number, name in enumerate(GARMENTS[:classes]):
        for i in np.flatnonzero(labels == number)[: count if seen else 1000]:
            write_png(images[i], folder / name / f'{i}.png')
    return folder


def write_three(folder, seen, request):
    return write_garments(folder, seen, request, 3, 20)


def write_scenes(folder, seen, request, count=4500):
    """Photographs with up to four garments on each, and a list of the kinds in each; 500 that are not seen."""
    pytest.importorskip('skimage')
    scenes = request.getfixturevalue('load_tool')('prepare_scenes')
    images, labels = request.getfixturevalue('fashion_mnist')('train' if seen else 't10k')
    photographs = list(scenes.load_photographs(scenes.PHOTOGRAPHS['train' if seen else 'val']).values())
    folder.mkdir()
    rows = []
    for i in range(count if seen else 500):
        rng = np.random.default_rng([i, seen])
        photograph = photographs[rng.integers(len(photographs))]
        scene, garments = scenes.compose(photograph, images, labels, 128, rng)
        Image.fromarray(scene).save(folder / f'{i}.jpg', quality=95)
        rows.append((f'{i}.jpg', ';'.join(sorted({GARMENTS[garment.label] for garment in garments}))))
    with (folder / 'labels.csv').open('w', newline='') as file:
        csv.writer(file).writerows([('image', 'labels'), *rows])
    return folder / 'labels.csv'


def score(said, classes, unseen):
    """Top-1, or of several labels the mean of their average precisions, of what predict says; of 100."""
    if unseen.is_dir():
        return 100 * np.mean([one['labels'][0]['label'] == Path(one['image']).parent.name for one in said])
    with unseen.open(newline='') as file:
        rows = {str(unseen.parent / row['image']): row['labels'].split(';') for row in csv.DictReader(file)}
    truth = np.array([[name in rows[one['image']] for name in classes] for one in said])
    scores = [{label['label']: label['score'] for label in one['labels']} for one in said]
    return 100 * average_precision_score(truth, [[of[name] for name in classes] for of in scores])


@pytest.mark.parametrize('name', SETS)
def test_from_files_to_the_hub(name, hub, request, command, tmp_path):
    transformers = pytest.importorskip('transformers')
    model, least = SETS[name]
    write = globals()[f'write_{name}']
    folder, unseen = (write(tmp_path / part, part == name, request) for part in (name, 'unseen'))
    env = {'HF_TOKEN': hub.token, 'OMP_NUM_THREADS': str(os.cpu_count())}

    def run(*words):
        return command(sys.executable, '-m', 'sk_plugins', *words, cwd=tmp_path, env=env).stdout

    start = time.perf_counter()
    said = run('finetune', folder, '--model', model, '--from-scratch')
    minutes = (time.perf_counter() - start) / 60
    print(said)
    work_dir = Path('work_dirs', folder.stem)
    pictures = unseen if unseen.is_dir() else unseen.parent
    run('predict', work_dir, pictures, '--out', 'said.json', '--topk', '10')
    run('export', work_dir, 'hub', 'exported')
    run('push', work_dir, f'me/{name}')
    said = json.loads((tmp_path / 'said.json').read_text())
    metrics = json.loads((tmp_path / work_dir / 'report' / 'metrics.json').read_text())
    with torch.inference_mode():
        local = timm.create_model(f'local-dir:{tmp_path / "exported"}', pretrained=True).eval()
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(local))
        pixels = torch.stack([transform(Image.open(one['image']).convert('RGB')) for one in said[:8]])
        logits = local(pixels)
        assert torch.equal(timm.create_model(f'hf-hub:me/{name}', pretrained=True).eval()(pixels), logits)
        wrapped = transformers.AutoModelForImageClassification.from_pretrained(f'me/{name}').eval()
        # transformers leaves weights where they lie in the file, and convolutions round by how memory is aligned.
        for tensor in (*wrapped.parameters(), *wrapped.buffers()):
            tensor.data = tensor.data.clone()
        assert torch.equal(wrapped(pixels).logits, logits)
    classes = local.pretrained_cfg['label_names']
    probabilities = logits.sigmoid() if 'mAP' in metrics else logits.softmax(1)
    for one, row in zip(said, probabilities):
        assert {label['label']: label['score'] for label in one['labels']} == pytest.approx(
            dict(zip(classes, row.tolist())), abs=2e-4
        )
    found = score(said, classes, unseen)
    held_out = metrics.get('mAP', metrics.get('top1'))
    print(f'{name}: {held_out:.1f} % held out, {found:.1f} % of {len(said)} unseen, {minutes:.1f} min')
    assert found >= least
