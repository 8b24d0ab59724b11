"""What importing OpenMMLab's door, and the runtime, changes in mmengine, mmcv and mmpretrain: only registries."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('mmpretrain')

import sk_plugins

# All that these processes have of OpenMMLab is loaded before the first look.
SCRIPT = """
import importlib, json, sys, types, warnings
warnings.simplefilter('ignore')
import mmcv, mmcv.transforms, mmengine, mmengine.fileio, mmengine.hooks, mmengine.model, mmengine.runner
import mmpretrain, mmpretrain.apis, mmpretrain.datasets, mmpretrain.engine, mmpretrain.evaluation, mmpretrain.models
import mmpretrain.visualization, torch.serialization, torch.utils.data
from mmengine.registry import Registry

PACKAGES = ('mmengine', 'mmcv', 'mmpretrain')

def ours(name):
    return name.split('.')[0] in PACKAGES

def look():
    'Every module variable, class attribute and registry of OpenMMLab by name, containers as copies of theirs.'
    seen = {'torch: safe globals': list(torch.serialization.get_safe_globals())}
    for kind in (torch.utils.data.DataLoader, torch.utils.data.Dataset, torch.utils.data.Sampler):
        seen.update({f'torch: {kind.__name__}.{k}': v for k, v in vars(kind).items()})
    for name, module in list(sys.modules.items()):
        if not ours(name) or module is None:
            continue
        for key, value in list(vars(module).items()):
            if key.startswith('__') or isinstance(value, types.ModuleType):
                continue
            seen[f'{name}.{key}'] = value
            if isinstance(value, Registry):
                seen[f'{value.scope}.{value.name}'] = value.module_dict
            if isinstance(value, type) and ours(value.__module__):
                for attribute, content in vars(value).items():
                    seen[f'{value.__module__}.{value.__name__}.{attribute}'] = content
    return {k: (v, type(v)(v) if type(v) in (dict, list, set) or type(v).__name__ == 'OrderedDict' else None)
            for k, v in seen.items() if not k.endswith(('.__doc__', '._abc_impl'))}

def compare(before, after):
    'What containers have got, by their names, and the names of what is another object than before, or gone.'
    added, changed = {}, sorted(before.keys() ^ after.keys())
    for name in before.keys() & after.keys():
        (value, old), (now, new) = before[name], after[name]
        if new is None:
            if value is not now:
                changed.append(name)
        elif isinstance(new, dict):
            if list(old) != [key for key in new if key in old] or any(old[key] is not new[key] for key in old):
                changed.append(name)
        elif any(item not in new for item in old):
            changed.append(name)
        if new is not None and (more := sorted(str(item) for item in new if item not in old)):
            added[name] = more
    return added, sorted(changed)

before = look()
for name in sys.argv[1:]:
    importlib.import_module(name)
    after = look()
    print('RESULT', json.dumps(compare(before, after)))
    before = after
mmengine.hooks.EMAHook.before_run = lambda self, runner: None
mmengine.hooks.EMAHook.another = 1
mmengine.registry.HOOKS.module_dict['EMAHook'] = None
print('RESULT', json.dumps(compare(before, look())))
"""
REGISTERED = {
    'mmpretrain.transform': ['SimCLRCrop'],
    'mmpretrain.model': ['SKNet', 'SKResNeXt', 'SKResNet', 'SKResNetSimCLR', 'SKShuffleNetV2'],
    'mmpretrain.dataset': ['Digits', 'ScaledFashionMNIST'],
    'mmengine.hook': ['PictureHook', 'SKAttentionHook'],
    'mmengine.weight initializer': ['WarmStart'],
}
INDEX = 'mmpretrain.apis.model.ModelHub._models_dict'
BACKENDS = [f'mmengine.fileio.{name}.backends' for name in ('backends', 'backends.registry_utils', 'io')]
SCHEMES = 'mmengine.runner.checkpoint.CheckpointLoader._schemes'


@pytest.fixture(scope='module')
def changes():
    """What the package, the door, the runtime, and assignments to a class and a table, one after the other, change."""
    env = {**os.environ, 'PYTHONPATH': str(Path(sk_plugins.__file__).parents[1])}
    words = [sys.executable, '-c', SCRIPT, 'sk_plugins', 'sk_plugins.mmpretrain_models', 'sk_plugins.openmmlab.runtime']
    done = subprocess.run(words, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.removeprefix('RESULT ') for line in done.stdout.splitlines() if line.startswith('RESULT ')]
    return dict(zip(['package', 'door', 'runtime', 'assignments'], map(json.loads, lines), strict=True))


def test_the_package(changes):
    assert changes['package'] == [{}, []]


def test_the_door(changes):
    added, changed = changes['door']
    assert changed == []
    assert {'sknet50_in1k', 'sknet_digits'} <= set(added.pop(INDEX))
    assert added == {**REGISTERED, SCHEMES: ['hf-hub:']}


def test_the_runtime(changes):
    """The loaders of the schemes alone are others."""
    added, changed = changes['runtime']
    assert changed == [SCHEMES]
    assert added == {
        'mmengine.dataset': ['SkipUnreadable'],
        'mmengine.hook': [
            'CheckpointFitHook',
            'ClassCountHook',
            'InvalidLossHook',
            'ResumableCheckpointHook',
            'TotalBatchHook',
        ],
        'mmengine.model_wrapper': ['CPUDistributedDataParallel'],
        'mmengine.runner': ['SurvivingRunner'],
        'mmengine.transform': ['LoadSoundImage'],
        **{name: ['whole'] for name in BACKENDS},
    }


def test_a_change_would_be_seen(changes):
    assert changes['assignments'] == [
        {},
        ['mmengine.hook', 'mmengine.hooks.ema_hook.EMAHook.another', 'mmengine.hooks.ema_hook.EMAHook.before_run'],
    ]


def test_private_names_stand_in_one_file():
    """What begins with an underscore of anything but the object itself; torch's ``_metadata`` of a state dict apart."""
    package = Path(sk_plugins.__file__).parent
    found = {}
    for path in [package / 'mmpretrain_models.py', *sorted((package / 'openmmlab').rglob('*.py'))]:
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            imported = isinstance(node, ast.ImportFrom) and (node.module or '').startswith(('mmengine', 'mmpretrain'))
            names = [alias.name for alias in node.names] if imported else []
            if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == 'self'):
                names = [node.attr]
            private = {name for name in names if name.startswith('_') and not name.startswith('__')} - {'_metadata'}
            if private:
                found.setdefault(path.name, set()).update(private)
    assert found == {
        '_internals.py': {'_load_from', '_resume', '_save_best_checkpoint', '_save_checkpoint_with_step'},
        'backbones.py': {'_load_from_state_dict'},  # super()'s, of nn.Module
    }
