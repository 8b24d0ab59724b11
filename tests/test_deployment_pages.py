"""docs/deployment/*.md: each page from its first command to its last line, where its runtime is installed."""

import os
import re
import shlex
import subprocess
import sys
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
    'server': ['bentoml', 'onnxruntime'],
    'tensorrt': ['onnxruntime', 'onnxscript'],
    'torch': [],
}
TINY = ['--model', 'skshufflenetv2_x0_5', '--from-scratch', '--epochs', '1', '--size', '64', '--workers', '0']
ELSEWHERE = ('pip ', 'python3 -m venv', 'bentoml serve', 'ab ', 'curl ')


def start(words, folder):
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True)
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
