"""Every snippet and command of README.md and docs/ is run as it stands, but for what ``shorten`` says it shortens.

Those of the pages that are read first run by default, the others among the slow tests.
"""

import io
import logging
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from helpers.hub_server import HubServer
from helpers.kinds import quick
from helpers.simclr import as_file
from helpers.snippets import Interpreter
from helpers.third_party_networks import SKNet
from safetensors.torch import save

import sk_plugins
from sk_plugins._resources import find_config
from sk_plugins.weights import load_checkpoint
from sk_plugins.weights.simclr import to_lightly

ROOT = Path(__file__).resolve().parent.parent
# Pages whose commands go on from those of others come after them.
FIRST = ('README.md', 'docs/getting_started.md', 'docs/own_images.md', 'docs/training.md')
OTHERS = (*ROOT.glob('docs/**/*.md'), ROOT / 'CONTRIBUTING.md', ROOT / 'CHANGELOG.md', *ROOT.glob('results/**/*.md'))
PAGES = list(dict.fromkeys([*(ROOT / page for page in FIRST), *sorted(OTHERS)]))
PAGES = {str(page.relative_to(ROOT)): page.read_text(encoding='utf-8') for page in PAGES if '_build' not in page.parts}
SNIPPETS = dict.fromkeys(
    snippet
    for page, text in PAGES.items()
    if not page.startswith('docs/deployment/')  # tests/test_deployment_pages.py
    for snippet in re.findall(r'^```(\w+)\n(.*?)^```$', text, flags=re.DOTALL | re.MULTILINE)
)
PYTHON = [code for language, code in SNIPPETS if language == 'python']
LINES = list(
    dict.fromkeys(
        re.split(r'\s+#\s', line)[0].strip()
        for language, code in SNIPPETS
        if language == 'bash'
        for line in code.splitlines()
        if line.strip()
    )
)
# What is not run here, and what runs it: CI from outside, the suite itself, or what `make det` installs.
ELSEWHERE = {
    'make ': 'Makefile',
    'pip ': '.ci/run',
    'python3 -m venv': 'Makefile',
    '. .venv/bin/activate': 'Makefile',
    'FUZZ_EXAMPLES=': 'tests/helpers/fuzzing.py',
    'python -m pytest': 'tests',
    'python tools/run_ablation.py': 'tests/tools/test_run_ablation.py',
    'python tools/compare_warm_start.py': 'tests/tools/test_compare_warm_start.py',
    '.venv-det/bin/python tools/train.py configs/detection': 'tests/tools/test_frameworks.py',
    '.venv-det/bin/python tools/train.py configs/rotated': 'tests/configs/test_rotated.py',
    '.venv-det/bin/python -m pip': 'docs/own_boxes_and_masks.md',
    'DATA=': 'tests/configs/test_finetune.py',
}
# Hours of training, which `make test-scenes` shortens.
SCENES_PAGE, SCENES_TEST = 'results/scenes/README.md', 'tests/tools/test_scenes_accuracy.py'
BUT_SCENES = '\n'.join(text for page, text in PAGES.items() if page != SCENES_PAGE)
SHELL = [line for line in LINES if not line.startswith(tuple(ELSEWHERE)) and line in BUT_SCENES]
# The Python snippets by what is done with them.
LOADING = [code for code in PYTHON if 'local-dir:' in code]
FLOWERS = [code for code in PYTHON if code.startswith('# sknet50_flowers.py')]
FINE_TUNING = [code for code in PYTHON if code.startswith('# fine_tune.py')]
FIRST_READ = PAGES['README.md'] + PAGES['docs/getting_started.md']
STANDALONE = [code for code in PYTHON if code.startswith(('import', 'from')) and code not in LOADING]
CONFIGS = [code for code in PYTHON if code.startswith('custom_imports')]
HOOKS = [code for code in PYTHON if code.startswith('custom_hooks')]
SMALL = [
    'train_cfg.max_epochs=1',
    'train_dataloader.num_workers=0',
    'train_dataloader.persistent_workers=False',
    'val_dataloader.num_workers=0',
    'val_dataloader.persistent_workers=False',
    'train_dataloader.batch_size=2',
    'train_dataloader.dataset.pipeline.1.scale=64',
    'val_dataloader.dataset.pipeline.1.scale=73',
    'val_dataloader.dataset.pipeline.2.crop_size=64',
    'train_dataloader.dataset.indices=4',
    'val_dataloader.dataset.indices=2',
]
# For a second training of a network: the first one's files are those that later lines take.
NARROW = [
    'model.head.in_channels=512',
    'model.backbone.layers=1,1,1,1',
    'model.backbone.channels=16,32,64,128',
    'model.backbone.cardinality=8',
    'model.backbone.base_width=16',
]
CLASSES = [f'{split}_dataloader.dataset.metainfo.classes=n01,n02' for split in ('train', 'val', 'test')]
FINETUNE = ['--epochs', '1', '--size', '64', '--batch-size', '8', '--workers', '0']
SHORT = ['train_cfg.max_epochs=1', 'train_dataloader.dataset.indices=64', 'val_dataloader.dataset.indices=64']


def run(command, cwd, **env):
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, f'{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}'
    return done.stdout


@pytest.fixture(scope='module')
def environment(tmp_path_factory):
    """Variables that point a process at a loopback Hub with SKNet-50, ResNeXt-50 and a SimCLRv2 network."""
    server = HubServer().start()
    state_dict = timm.create_model('skresnext50_32x4d').state_dict()
    server.add('timm/skresnext50_32x4d.ra_in1k', {'model.safetensors': save(state_dict)})
    state_dict = timm.create_model('resnext50_32x4d').state_dict()
    server.add('timm/resnext50_32x4d.a1h_in1k', {'model.safetensors': save(state_dict)})
    file = io.BytesIO()
    torch.save(as_file(to_lightly(timm.create_model('skresnet50x1_simclr', projection=1).state_dict())), file)
    server.add('lightly-ai/simclrv2-imagenet1k-r50_1x_sk1', {'r50_1x_sk1.pth': file.getvalue()})
    root = Path(sk_plugins.__file__).parents[1]
    path = os.pathsep.join(filter(None, (str(root), os.environ.get('PYTHONPATH'))))
    home = str(tmp_path_factory.mktemp('hf'))
    yield {'HF_ENDPOINT': server.url, 'HF_HOME': home, 'HF_TOKEN': server.token, 'PYTHONPATH': path}
    server.stop()


@pytest.fixture(scope='module')
def run_python(environment):
    """``run_python(code, folder)``: in a process without this project (tests/helpers/snippets.py)."""
    modules = 'torch,torchvision,timm,transformers,segmentation_models_pytorch,mmpretrain,mmengine'
    modules += ',sklearn.metrics,matplotlib.pyplot'  # of every report and picture
    variables = {**os.environ, **environment}
    interpreter = Interpreter(modules, variables)

    def run(code, folder):
        done = interpreter('-c', code, cwd=folder, env=variables)
        assert done.returncode == 0, f'{code}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}'

    yield run
    interpreter.close()


@pytest.fixture
def flowers(tmp_path, imagenet):
    """A folder with data/flowers, which docs/own_images.md trains on, and what its commands find in a clone."""
    for split in ('train', 'val'):
        folder = tmp_path / 'data' / 'flowers' / split
        folder.mkdir(parents=True)
        for name, of_imagenet in zip(('daisy', 'rose'), imagenet.classes):
            (folder / name).symlink_to(imagenet.root / split / of_imagenet)
    for name in ('configs', 'tools'):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def write_third_party(path):
    torch.save(SKNet(widths=(16, 32, 64, 96), outputs=(32, 64, 128, 192), dims=(8, 8, 8, 8)).state_dict(), path)


def shorten(line: str) -> list[str]:
    """A line on a CPU and a tiny data set: one epoch, few images, small crops, two processes of a narrow network."""
    words = [re.sub(r'epoch_\d+', 'epoch_1', '2' if word == '8' else word) for word in shlex.split(line)]
    words = [word.replace('OWNER/', f'{HubServer.OWNER}/') for word in words]
    if words[:2] == ['sk-plugins', 'finetune']:
        return [*words, *FINETUNE]
    tool = next(word for word in words if 'tools/' in word or word in ('sk_plugins', 'sk-plugins'))
    if tool.endswith('analyze_attention.py'):
        return [*words, '--size', '64', '--field-images', '2', '--workers', '0']
    if words[:2] == ['sk-plugins', 'export'] and 'hub' not in words:
        return [*words, '--size', '64']
    if tool.endswith('test.py'):
        options = ['test_dataloader.num_workers=0', 'test_dataloader.persistent_workers=False']
        options += ['test_dataloader.dataset.indices=2'] if 'sknet50_in1k' in line else []
    elif tool.endswith('dist_train.sh'):
        place = words.index('--cfg-options')
        words[place:place] = ['--work-dir', 'work_dirs/distributed']
        options = [*SMALL, *NARROW]
    elif tool.endswith('train.py') and ('flowers' in line or 'sknet50_in1k' in line):
        options = SMALL
    elif 'train' in words or tool.endswith('train.py'):
        options = SHORT
    else:
        return words
    if 'sknet50_in1k' in line:
        options = [*CLASSES, *options]
    if '--cfg-options' not in words:
        words.append('--cfg-options')
    return words + options


RUN = """
import runpy, sys

sys.argv = {words!r}
if sys.argv[0] == 'sk_plugins':
    runpy.run_module('sk_plugins', run_name='__main__')
else:
    sys.path.insert(0, 'tools')
    runpy.run_path(sys.argv[0], run_name='__main__')
"""


def test_all_are_of_a_known_kind():
    assert len(PAGES) > 25
    kinds = [STANDALONE, CONFIGS, HOOKS, FLOWERS, FINE_TUNING, LOADING]
    assert sorted(code for kind in kinds for code in kind) == sorted(PYTHON)
    assert [len(kind) for kind in kinds] == [19, 5, 1, 1, 1, 2]
    assert len(SHELL) == 19


@pytest.mark.parametrize(('start', 'where'), ELSEWHERE.items())
def test_lines_that_run_elsewhere(start, where):
    lines = [line for line in LINES if line.startswith(start)]
    assert lines
    assert (ROOT / where).exists()
    targets = re.search(r'^\.PHONY: (.*)$', (ROOT / 'Makefile').read_text(), flags=re.MULTILINE)[1].split()
    for line in lines:
        if start == 'make ':
            assert line.split()[1] in targets
        if start == 'python -m pytest':
            assert all((ROOT / path).exists() for path in line.split()[3:]), line


def test_shell_lines_name_what_is_there():
    named = re.findall(r'(?<!\S)(?:configs|tools)/\S+', '\n'.join(LINES))
    assert 'configs/detection/retinanet_sknet50_fpn_1x_coco.py' in named
    assert [path for path in named if not (ROOT / path).is_file()] == []


def test_scenes_commands():
    """Which take hours: the configs that they name are those that `make test-scenes` trains for a while."""
    page, test = PAGES[SCENES_PAGE], (ROOT / SCENES_TEST).read_text(encoding='utf-8')
    names = re.findall(r'^C=(\S+)$|train\.py (sknet\S+)$', page, flags=re.MULTILINE)
    names = [name for pair in names for name in pair if name]
    assert len(names) == 4
    for name in names:
        assert find_config(name).is_file()
        assert name in test


@pytest.mark.parametrize('code', quick(STANDALONE, [code for code in STANDALONE if code in FIRST_READ]))
def test_python_snippet_runs(code, run_python, tmp_path):
    for name in ('mmpretrain', 'segmentation_models_pytorch', 'transformers', 'tensorboard'):
        if name in code:
            pytest.importorskip(name)
    if "load_third_party('sknet.pth')" in code:
        write_third_party(tmp_path / 'sknet.pth')
    run_python(code, tmp_path)


@pytest.mark.parametrize('code', CONFIGS)
def test_config_snippet_builds(code, run_python, tmp_path):
    pytest.importorskip('mmpretrain')
    (tmp_path / 'snippet.py').write_text(code)
    run_python(BUILD if 'model' in code.split() else FIND_RUNNER, tmp_path)


BUILD = """
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope, MODELS

model = Config.fromfile('snippet.py').model
model.backbone.pop('_delete_', None)
frozen = 'frozen_stages' in model.backbone
with DefaultScope.overwrite_default_scope('mmpretrain' if 'type' in model else 'mmdet'):
    model = MODELS.build(model if 'type' in model else model.backbone)
model.init_weights()
model.train()
backbone = getattr(model, 'backbone', model)
assert backbone.conv1.weight.requires_grad is not frozen
assert backbone.layer4[0].conv1.bn.training is not frozen
channels = [feature.shape[1] for feature in backbone(torch.randn(2, 3, 64, 64))]
assert channels in ([256, 512, 1024, 2048], [2048]), channels
"""
FIND_RUNNER = """
from mmengine.config import Config
from mmengine.registry import RUNNERS

from sk_plugins.openmmlab.runtime.runner import SurvivingRunner

assert RUNNERS.get(Config.fromfile('snippet.py').runner_type) is SurvivingRunner
"""


@pytest.mark.parametrize('code', HOOKS)
def test_hook_snippet_builds(code):
    pytest.importorskip('mmpretrain')
    from mmengine.registry import HOOKS as REGISTRY

    import sk_plugins.mmpretrain_models
    from sk_plugins.openmmlab.hooks import SKAttentionHook

    assert sk_plugins.mmpretrain_models
    values = {}
    exec(code, values)
    (hook,) = map(REGISTRY.build, values['custom_hooks'])
    assert isinstance(hook, SKAttentionHook)
    assert hook.interval == 100


@pytest.mark.parametrize('code', FINE_TUNING)
def test_fine_tuning_snippet(code, run_python, flowers):
    for written, shorter in (('range(10)', 'range(1)'), ('**config', "**{**config, 'input_size': (3, 64, 64)}")):
        assert written in code
        code = code.replace(written, shorter)
    run_python(code, flowers)
    weights = torch.load(flowers / 'flowers.pth', weights_only=True)
    assert weights['fc.weight'].shape == (2, 2048)
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize('of', ["README's", pytest.param('all', marks=pytest.mark.slow)])
def test_shell_lines_run_in_their_order(of, flowers, imagenet, environment, run_python):
    pytest.importorskip('mmpretrain')
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    (flowers / 'data' / 'imagenet').symlink_to(imagenet.root)
    (flowers / 'sknet50_flowers.py').write_text(FLOWERS[0])
    write_third_party(flowers / 'sknet.pth')
    lines = SHELL if of == 'all' else [line for line in SHELL if line in PAGES['README.md']]
    if not Path('/usr/share/datasets/fashion-mnist').is_dir():
        lines = [line for line in lines if 'fashion_mnist' not in line]
    for line in lines:
        words = shorten(line)
        if words[0] == 'sk-plugins':
            run_python(RUN.format(words=['sk_plugins', *words[1:]]), flowers)
        elif words[0] == 'python':
            run_python(RUN.format(words=words[2:] if words[1] == '-m' else words[1:]), flowers)
        else:
            run(words, flowers, **environment, PATH=path)
        for code in LOADING:
            if re.search(r'local-dir:(\w+)', code)[1] in words:
                run_python(code, flowers)
        if 'by_hand_hub' in words or 'flowers_hub' in words:
            hub, run_dir = ('by_hand_hub', 'sknet50_flowers') if 'by_hand_hub' in words else ('flowers_hub', 'flowers')
            model = timm.create_model(f'local-dir:{flowers / hub}', pretrained=True)
            state_dict, _ = load_checkpoint(flowers / 'work_dirs' / run_dir / 'epoch_1.pth')
            assert torch.equal(model.state_dict()['conv1.weight'], state_dict['backbone.conv1.weight'])
            assert model.pretrained_cfg['label_names'] == ['daisy', 'rose']
    assert (flowers / 'work_dirs' / 'flowers' / 'epoch_1.pth').is_file()
    if of != 'all':
        return
    for name in ('sknet50_flowers', 'sknet50_in1k', 'sknet_digits'):
        assert (flowers / 'work_dirs' / name / 'epoch_1.pth').is_file()
    assert (flowers / 'work_dirs' / 'distributed' / 'epoch_1.pth').is_file()
    (log,) = (flowers / 'work_dirs' / 'distributed').glob('*/*.log')  # the first process's alone
    assert 'GPU number: 2' in log.read_text()
    assert len(list((flowers / 'attention').glob('*.csv'))) > 0


def test_the_wheel_has_this_version():
    (wheel,) = re.findall(r'^pip install dist/(\S+)$', PAGES['docs/getting_started.md'], flags=re.MULTILINE)
    assert wheel == f'sk_plugins-{sk_plugins.__version__}-py3-none-any.whl'


def test_readme_is_short():
    assert len(PAGES['README.md'].splitlines()) <= 150


@pytest.mark.parametrize('page', PAGES)
def test_no_figure_is_left_out(page):
    assert not re.search(r'\| (TODO|TBD|XX+|\?+) \|', PAGES[page])


def anchors(page):
    """What a link can name on a page: its headings, as GitHub and MyST turn them into anchors, and its labels."""
    text = re.sub(r'^```\w+\n.*?^```$', '', page, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r'^#+ (.+)$', text, flags=re.MULTILINE)
    slugs = {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}
    return slugs | set(re.findall(r'^\((\S+)\)=$', text, flags=re.MULTILINE))


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    links = re.findall(r'\]\((?!https?://)([^)\s]+)\)', PAGES[page])
    for link in links:
        target, _, anchor = link.partition('#')
        path = (folder / target).resolve() if target else ROOT / page
        assert path.exists(), link
        if anchor:
            assert anchor in anchors(path.read_text(encoding='utf-8')), link


@pytest.mark.parametrize('page', PAGES)
def test_a_git_host_shows_no_directive_in_place_of_text(page):
    assert '{include}' not in PAGES[page]


@pytest.fixture(scope='module')
def conf():
    """docs/conf.py, which sets filters of warnings and levels of logs for Sphinx alone."""
    level = logging.getLogger('mmengine').level
    with warnings.catch_warnings():
        yield SimpleNamespace(**runpy.run_path(str(ROOT / 'docs' / 'conf.py')))
    logging.getLogger('mmengine').setLevel(level)


def test_the_site_has_files_in_place_of_links(conf):
    source = ['[A](../CHANGELOG.md)\n\nSee [B](../CONTRIBUTING.md#add-a-network).\n\n[C](../results/README.md)\n']
    conf.include_files(None, 'page', source)
    assert re.findall(r'^```\{include\} (\S+)\n:heading-offset: (\d)$', source[0], flags=re.MULTILINE) == [
        ('../CHANGELOG.md', '0'),
        ('../results/README.md', '2'),
    ]
    assert 'See [B](contributing.md#add-a-network).' in source[0]


def test_every_file_that_is_a_page_is_linked_from_it(conf):
    for file, page in conf.PAGES.items():
        assert PAGES[f'docs/{page}'].splitlines()[0].endswith(f']({file})')
