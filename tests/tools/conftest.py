"""What the tests of the tools share: the tools as modules and as commands, short runs, and a small ImageNet folder."""

import functools
import importlib.util
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sk_plugins
from sk_plugins._resources import ROOT

TOOLS = ROOT / 'tools'
sys.path.append(str(TOOLS))  # for their packages, such as _benchmark; last, since Python has a `test` of its own

# A few small steps, and statistics that keep up with them: scores that differ from image to image.
SHORT_DIGITS = (
    'optim_wrapper.optimizer.lr=0.02',
    'model.backbone.norm_cfg.type=BN',
    'model.backbone.norm_cfg.momentum=0.5',
    'train_dataloader.batch_size=16',
    'train_dataloader.dataset.indices=48',
    'val_dataloader.dataset.indices=20',
    'test_dataloader.dataset.indices=20',
    'default_hooks.logger.interval=1',
)


@pytest.fixture(scope='session')
def load_tool():
    """``load_tool(name)``: tools/NAME.py as a module, by its path: the standard library has a `test` too."""

    @functools.cache
    def load(name):
        spec = importlib.util.spec_from_file_location(f'sk_plugins_tool_{name}', TOOLS / f'{name}.py')
        module = importlib.util.module_from_spec(spec)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(TOOLS)
            spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope='session')
def command():
    """``command(words, ...)``: a subprocess in which sk_plugins can be imported, and one thread; its output is text."""

    def run(*words, status=0, **kwargs):
        env = {k: v for k, v in os.environ.items() if k not in ('LOCAL_RANK', 'SK_PLUGINS_TRACEBACK')}
        env['OMP_NUM_THREADS'] = '1'
        env.update(kwargs.pop('env', {}))
        env['PATH'] = f'{Path(sys.executable).parent}{os.pathsep}{env.get("PATH", "")}'
        env['PYTHONPATH'] = f'{Path(sk_plugins.__file__).parents[1]}{os.pathsep}{env.get("PYTHONPATH", "")}'
        done = subprocess.run([str(word) for word in words], env=env, capture_output=True, text=True, **kwargs)
        assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    return run


@pytest.fixture(scope='session')
def python_tool(run_python):
    """``python_tool(name, ...)``: tools/NAME.py as a command."""

    def run(name, *words, status=0, cwd=None):
        env = {k: v for k, v in os.environ.items() if k not in ('LOCAL_RANK', 'SK_PLUGINS_TRACEBACK')}
        done = run_python(TOOLS / f'{name}.py', *words, cwd=cwd, env=env)
        assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    return run


@pytest.fixture(scope='session')
def free_port():
    """``free_port()``: a port for torchrun."""

    def find():
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            return str(probe.getsockname()[1])

    return find


@pytest.fixture(scope='session')
def train(load_tool):
    """``train(config, work_dir, *options, arguments=())``: tools/train.py in this process."""
    number = iter(range(1000))

    def run(config, work_dir, *options, arguments=()):
        # mmengine keeps logs and figures by experiment, which it names by the second.
        options = [*options, f'experiment_name=tools_{next(number)}']
        # So is the folder of a run's logs: one that goes on in the second in which the other began would share it.
        while (Path(work_dir) / time.strftime('%Y%m%d_%H%M%S')).exists():
            time.sleep(0.05)
        load_tool('train').main([config, '--work-dir', str(work_dir), *arguments, '--cfg-options', *options])
        return Path(work_dir)

    return run


@pytest.fixture(scope='session')
def digits_run(train, tmp_path_factory):
    """The work dir of two epochs, three iterations each, of sknet_digits. Not to be written into."""
    return train('sknet_digits', tmp_path_factory.mktemp('digits'), *SHORT_DIGITS, 'train_cfg.max_epochs=2')


@pytest.fixture(scope='session')
def short_digits():
    return SHORT_DIGITS


@pytest.fixture(scope='session')
def imagenet_run(train, imagenet, tmp_path_factory):
    """The work dir of an epoch, two iterations, of a narrow sknet26_in1k on the small ImageNet folder."""
    options = [*imagenet.options, *imagenet.narrow, 'train_cfg.max_epochs=1', 'default_hooks.logger.interval=1']
    options += ['train_dataloader.dataset.pipeline.1.scale=64']
    options += ['val_dataloader.dataset.pipeline.1.scale=73', 'val_dataloader.dataset.pipeline.2.crop_size=64']
    return train('configs/sknet26_in1k.py', tmp_path_factory.mktemp('sknet26_in1k'), *options)
