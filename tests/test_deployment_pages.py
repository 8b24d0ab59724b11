"""docs/deployment/*.md: each page from its first command to its last line, where its runtime is installed."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
# By page: what has to be importable.
NEEDS = {
    'coreml': ['coremltools'],
    'executorch': ['executorch', 'torchao'],
    'litert': ['litert_torch', 'ai_edge_quantizer'],
    'ncnn': ['ncnn', 'pnnx'],
    'onnx': ['onnxruntime', 'onnxscript'],
    'openvino': ['openvino', 'nncf'],
    'server': ['litserve', 'onnxruntime', 'onnxscript'],
    'tensorrt': ['onnxruntime', 'onnxscript'],
    'torch': [],
}
TINY = ['--model', 'skshufflenetv2_x0_5', '--from-scratch', '--epochs', '1', '--size', '64', '--workers', '0']
ELSEWHERE = ('pip ', 'python3 -m venv', 'python serve.py', 'curl ')
# A PNG whose first chunk is none: Pillow raises a SyntaxError for the like.
BROKEN = b'\x89PNG\r\n\x1a\n' + b'\0' * 64
# serve.py, that notes how many images come together, and computes for a while.
RECORDING = """
import sys, time
import litserve, serve

class Recording(serve.Classifier):
    def predict(self, images):
        with open('batches.txt', 'a') as file:
            file.write(f'{len(images) if isinstance(images, list) else 1}\\n')
        time.sleep(0.1)
        return super().predict(images)

if __name__ == '__main__':
    api = Recording('flowers.onnx', 1, max_batch_size=int(sys.argv[2]), batch_timeout=0.05)
    litserve.LitServer(api, accelerator='cpu').run(host='127.0.0.1', port=int(sys.argv[1]), generate_client_file=False)
"""


def environment():
    return {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}


def start(words, folder):
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope='module')
def flowers(tmp_path_factory):
    """A run of finetune on a few pictures of two classes, and another picture."""
    folder = tmp_path_factory.mktemp('pages')
    random = np.random.default_rng(0)
    for split, number in (('train', 8), ('val', 2)):
        for label, name in enumerate(('daisy', 'rose')):
            (folder / 'data' / 'flowers' / split / name).mkdir(parents=True)
            for i in range(number):
                pixels = random.integers(100 * label, 100 * label + 150, (80, 96, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / 'data' / 'flowers' / split / name / f'{i}.png')
    Image.fromarray(pixels).save(folder / 'photo.jpg')
    start(['-m', 'sk_plugins', 'finetune', 'data/flowers', *TINY], folder)
    return folder


def test_every_page_is_known():
    assert sorted(path.stem for path in (ROOT / 'docs' / 'deployment').glob('*.md')) == sorted(NEEDS)


@pytest.mark.slow
@pytest.mark.parametrize('name', NEEDS)
def test_page(flowers, name):
    for package in ('mmpretrain', *NEEDS[name]):
        pytest.importorskip(package)
    page = (ROOT / 'docs' / 'deployment' / f'{name}.md').read_text(encoding='utf-8')
    for language, code in re.findall(r'^```(bash|python)\n(.*?)^```$', page, flags=re.DOTALL | re.MULTILINE):
        if language == 'python':
            said = start(['-c', code], flowers)
            assert 'daisy' in said or 'rose' in said
            continue
        for line in code.splitlines():
            if line == 'sk-plugins finetune data/flowers' or line.startswith(ELSEWHERE):
                continue
            tool, *words = shlex.split(line)
            assert tool.endswith('sk-plugins'), line
            said = start(['-m', 'sk_plugins', *words], flowers)
            if '--check' in words:
                assert 'difference from eager mode' in said or 'converted' in said


@pytest.mark.slow
@pytest.mark.parametrize('most', [1, 8])
def test_server(flowers, most):
    """Over HTTP as in the process, many at once; what is no image is refused, and nobody else is."""
    for package in ('mmpretrain', *NEEDS['server']):
        pytest.importorskip(package)
    import onnxruntime
    import requests

    start(['-m', 'sk_plugins', 'export', 'work_dirs/flowers', 'onnx', 'flowers.onnx', '--preprocess'], flowers)
    session = onnxruntime.InferenceSession(flowers / 'flowers.onnx', providers=['CPUExecutionProvider'])
    image = Image.open(flowers / 'photo.jpg').resize((64, 64), Image.Resampling.BICUBIC, box=(8, 0, 88, 80))
    pixels = np.asarray(image)[None]
    (logits,) = session.run(None, {'image': pixels})[0]
    expected = dict(zip(json.loads(session.get_modelmeta().custom_metadata_map['labels']), softmax(logits)))

    (flowers / 'recording.py').write_text(RECORDING)
    (flowers / 'batches.txt').unlink(missing_ok=True)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    env = {**environment(), 'PYTHONPATH': str(ROOT / 'docs' / 'deployment' / 'server')}
    with (flowers / 'server.log').open('w') as log:
        server = subprocess.Popen(
            [sys.executable, 'recording.py', str(port), str(most)],
            cwd=flowers,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f'http://127.0.0.1:{port}'

    def ask(content):
        return requests.post(f'{url}/classify', files={'image': content}, timeout=60)

    try:
        for _ in range(120):
            assert server.poll() is None, (flowers / 'server.log').read_text()
            try:
                if requests.get(f'{url}/health', timeout=5).status_code == 200:
                    break
            except requests.ConnectionError:
                pass
            time.sleep(0.5)
        photo = (flowers / 'photo.jpg').read_bytes()
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(ask, [photo] * 8 + [b'no image', BROKEN] + [photo] * 22))
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # its workers too
        server.wait(30)
    assert [answer.status_code for answer in answers] == [200] * 8 + [400] * 2 + [200] * 22
    assert answers[8].json() == {'detail': 'image: no image that can be read'}
    for answer in answers[:8] + answers[10:]:
        assert answer.json() == pytest.approx(expected, abs=1e-3)
    batches = [int(line) for line in (flowers / 'batches.txt').read_text().split()]
    assert most // 2 <= max(batches) <= most


def softmax(logits):
    exp = np.exp(logits - logits.max())
    return (exp / exp.sum()).tolist()


@pytest.mark.parametrize(('words', 'said'), [
    (['nothing.onnx'], 'serve.py: error: nothing.onnx: '),
    (['floats.onnx'], 'serve.py: error: floats.onnx: it takes no uint8 images: export it with --preprocess'),
    (['one.onnx'], 'serve.py: error: one.onnx: it is of one batch: export it without --no-dynamic and --batch'),
    (['one.onnx', '--batch', '0'], 'serve.py: error: --batch and --threads are at least 1'),
])  # fmt: skip
@pytest.mark.slow
def test_server_refuses(flowers, words, said):
    for package in ('mmpretrain', *NEEDS['server']):
        pytest.importorskip(package)
    for name, *options in (('floats.onnx',), ('one.onnx', '--preprocess', '--no-dynamic')):
        if words[0] == name:
            start(['-m', 'sk_plugins', 'export', 'work_dirs/flowers', 'onnx', name, *options], flowers)
    command = [sys.executable, str(ROOT / 'docs' / 'deployment' / 'server' / 'serve.py'), *words]
    done = subprocess.run(command, cwd=flowers, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(said)


def test_triton_takes_what_is_exported():
    """The model repository's configuration, by Triton's own schema, has the names of the file's ends."""
    model_config = pytest.importorskip('tritonclient.grpc.model_config_pb2')
    from google.protobuf import text_format

    text = (ROOT / 'docs' / 'deployment' / 'server' / 'triton' / 'sknet' / 'config.pbtxt').read_text()
    config = text_format.Parse(text, model_config.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == ('sknet', 'onnxruntime', 32)
    assert [(i.name, list(i.dims)) for i in config.input] == [('image', [3, 224, 224])]
    assert [(o.name, list(o.dims)) for o in config.output] == [('logits', [1000])]
