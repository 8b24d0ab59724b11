"""Every snippet of the README is run as it stands, but for what the function below says it shortens."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers.foreign_networks import SKNet
from helpers.hub_server import HubServer
from safetensors.torch import save

import sk_plugins
from sk_plugins.weights import load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')
SNIPPETS = re.findall(r'^```(\w+)\n(.*?)^```$', README, flags=re.DOTALL | re.MULTILINE)
PYTHON = [code for language, code in SNIPPETS if language == 'python']
SHELL = [
    line.split('  #')[0].strip()
    for language, code in SNIPPETS
    if language == 'bash'
    for line in code.splitlines()
    if line.strip()
]
# They install, or run this test: CI runs them from outside. Or they want what `make det` installs, where
# tests/tools/test_frameworks.py trains the same config.
ELSEWHERE = ('make train', 'make test', 'pip install', '.venv-det/bin/python')
CLASSES = [f'{split}_dataloader.dataset.metainfo.classes=n01,n02' for split in ('train', 'val', 'test')]
SHORT_IMAGENET = [
    *CLASSES,
    'train_cfg.max_epochs=1',
    'train_dataloader.num_workers=0',
    'train_dataloader.persistent_workers=False',
    'val_dataloader.num_workers=0',
    'val_dataloader.persistent_workers=False',
    'train_dataloader.batch_size=2',
    'train_dataloader.dataset.pipeline.1.scale=64',
    'val_dataloader.dataset.pipeline.1.scale=73',
    'val_dataloader.dataset.pipeline.2.crop_size=64',
]
SHORT = ['train_cfg.max_epochs=1', 'train_dataloader.dataset.indices=64', 'val_dataloader.dataset.indices=64']


def run(command, cwd, **env):
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, f'{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}'
    return done.stdout


@pytest.fixture(scope='module')
def environment(tmp_path_factory):
    """Variables that point a process at a loopback Hub with SKNet-50's repository."""
    server = HubServer().start()
    state_dict = timm.create_model('skresnext50_32x4d').state_dict()
    server.add('timm/skresnext50_32x4d.ra_in1k', {'model.safetensors': save(state_dict)})
    root = Path(sk_plugins.__file__).parents[1]
    path = os.pathsep.join(filter(None, (str(root), os.environ.get('PYTHONPATH'))))
    yield {'HF_ENDPOINT': server.url, 'HF_HOME': str(tmp_path_factory.mktemp('hf')), 'PYTHONPATH': path}
    server.stop()


@pytest.fixture(scope='module')
def run_python(environment):
    """``run_python(code, folder)``: in a process without this project (tests/helpers/snippets.py)."""
    modules = 'torch,torchvision,timm,transformers,segmentation_models_pytorch,mmpretrain,mmengine'
    command = [sys.executable, str(Path(__file__).with_name('helpers') / 'snippets.py'), modules]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
    with subprocess.Popen(command, **pipes) as server:
        imported = json.loads(server.stdout.readline())
        assert 'torch' in imported
        assert 'sk_plugins' not in imported

        def run(code, folder):
            server.stdin.write(json.dumps(dict(code=code, folder=str(folder))) + '\n')
            server.stdin.flush()
            done = json.loads(server.stdout.readline())
            assert done['status'] == 0, f'{code}\n{done["output"][-6000:]}'

        yield run
        server.stdin.close()


def shorten(line: str) -> list[str]:
    """The README's line on a CPU and a tiny data set: one epoch, few images, small crops, two processes."""
    words = ['2' if word == '8' else word.replace('epoch_100', 'epoch_1') for word in shlex.split(line)]
    if words[0] == 'python':
        words[0] = sys.executable
    tool = next(word for word in words if 'tools/' in word or word == 'sk_plugins')
    if 'sknet50_in1k' in line and tool.endswith(('train.py', 'dist_train.sh')):
        options = SHORT_IMAGENET
    elif tool.endswith('test.py'):
        options = [*CLASSES, 'test_dataloader.num_workers=0', 'test_dataloader.persistent_workers=False']
    elif 'train' in line:
        options = SHORT
    else:
        return words
    if '--cfg-options' not in words:
        words.append('--cfg-options')
    return words + options


def test_python_snippets_are_all_of_a_known_kind():
    assert len(PYTHON) == 15
    assert len(SHELL) == 13
    assert sum(line.startswith(ELSEWHERE) for line in SHELL) == 5


def test_shell_lines_name_what_is_there():
    named = re.findall(r'(?<!\S)(?:configs|tools)/\S+', '\n'.join(SHELL))
    assert 'configs/detection/retinanet_sknet50_fpn_1x_coco.py' in named
    assert [path for path in named if not (ROOT / path).is_file()] == []


STANDALONE = [code for code in PYTHON if code.startswith(('import', 'from')) and 'local-dir' not in code]


@pytest.mark.parametrize('code', STANDALONE)
def test_python_snippet_runs(code, run_python, tmp_path):
    for name in ('mmpretrain', 'segmentation_models_pytorch', 'transformers'):
        if name in code:
            pytest.importorskip(name)
    if "load_foreign('sknet.pth')" in code:
        network = SKNet(widths=(16, 32, 64, 96), outputs=(32, 64, 128, 192), dims=(8, 8, 8, 8))
        torch.save(network.state_dict(), tmp_path / 'sknet.pth')
    run_python(code, tmp_path)


@pytest.mark.parametrize('code', [code for code in PYTHON if code.startswith('custom_imports')])
def test_config_snippet_builds(code, run_python, tmp_path):
    pytest.importorskip('mmpretrain')
    (tmp_path / 'snippet.py').write_text(code)
    run_python(BUILD, tmp_path)


BUILD = """
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope, MODELS

model = Config.fromfile('snippet.py').model
model.backbone.pop('_delete_', None)
with DefaultScope.overwrite_default_scope('mmpretrain' if 'type' in model else 'mmdet'):
    model = MODELS.build(model if 'type' in model else model.backbone)
model.init_weights()
model.train()
backbone = getattr(model, 'backbone', model)
assert not backbone.conv1.weight.requires_grad and not backbone.layer4[0].conv1.bn.training
channels = [feature.shape[1] for feature in backbone(torch.randn(1, 3, 64, 64))]
assert channels in ([256, 512, 1024, 2048], [2048]), channels
"""


def test_shell_lines_run_in_their_order(tmp_path, imagenet, environment, run_python):
    pytest.importorskip('mmpretrain')
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'imagenet').symlink_to(imagenet.root)
    for name in ('configs', 'tools'):
        (tmp_path / name).symlink_to(ROOT / name)
    lines = [line for line in SHELL if not line.startswith(ELSEWHERE)]
    if not Path('/usr/share/datasets/fashion-mnist').is_dir():
        lines = [line for line in lines if 'fashion_mnist' not in line]
    (loading,) = [code for code in PYTHON if 'local-dir' in code]
    for line in lines:
        run(shorten(line), tmp_path, **environment, PATH=path)
        if 'convert_checkpoint' in line:
            run_python(loading, tmp_path)
            model = timm.create_model(f'local-dir:{tmp_path / "sknet50_hub"}', pretrained=True)
            state_dict, _ = load_checkpoint(tmp_path / 'work_dirs' / 'sknet50_in1k' / 'epoch_1.pth')
            assert torch.equal(model.state_dict()['conv1.weight'], state_dict['backbone.conv1.weight'])
    assert (tmp_path / 'work_dirs' / 'sknet_digits' / 'epoch_1.pth').is_file()


def test_no_figure_is_left_out():
    assert not re.search(r'\| [A-Z]{4,} \|', README)


def test_links_lead_somewhere():
    for target in re.findall(r'\]\((?!https?://)([^)#]+)\)', README):
        assert (ROOT / target).exists(), target
