"""Runs that are stopped or killed, and the comparison of their ends: for tests/openmmlab/runtime."""

import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from sk_plugins._resources import ROOT

TOOLS = ROOT / 'tools'
IMPORTED = ['sk_plugins.mmpretrain_models', 'sklearn.datasets', 'sklearn.model_selection']
IMPORTED += [f'mmpretrain.{part}' for part in ('datasets', 'engine', 'evaluation', 'models', 'visualization')]


def end_of(work_dir):
    """All that the last checkpoint of a run holds, but for times and folders."""
    path = Path(Path(work_dir, 'last_checkpoint').read_text())
    assert path.parent == Path(work_dir)
    checkpoint = torch.load(path, weights_only=False)
    hub = checkpoint['message_hub']
    best = {k: v for k, v in hub['runtime_info'].items() if k.startswith('best_score')}
    best['name'] = Path(hub['runtime_info'].get('best_ckpt', '')).name
    return {
        **{k: checkpoint[k] for k in ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers')},
        'scalars': {k: v.data for k, v in hub['log_scalars'].items() if 'time' not in k},
        'best': best,
        'meta': {k: checkpoint['meta'][k] for k in ('epoch', 'iter', 'seed')},
        'resuming': {k: v for k, v in checkpoint['resuming'].items() if k not in ('folder', 'outdated')},
    }


def files_of(work_dir):
    """The names in a work dir but for logs and configs."""
    return sorted(p.name for p in Path(work_dir).iterdir() if p.is_file() and p.suffix != '.py')


def assert_equal(a, b, name='run'):
    """Bit for bit."""
    assert type(a) is type(b), name
    if isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a:
            assert_equal(a[key], b[key], f'{name}.{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), name
        for number, pair in enumerate(zip(a, b)):
            assert_equal(*pair, f'{name}.{number}')
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), name
    elif isinstance(a, np.ndarray):
        assert np.array_equal(a, b), name
    else:
        assert a == b, name


@HOOKS.register_module()
class PhaseHook(Hook):
    """Says in the file ``phase`` beside the work dir what a run is about."""

    priority = 'LOWEST'

    def before_run(self, runner):
        self.file = os.open(Path(runner.work_dir).parent / 'phase', os.O_WRONLY | os.O_CREAT)

    def say(self, phase):
        os.pwrite(self.file, f'{phase:<12}'.encode(), 0)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.say('step')

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.say('data')

    def before_val(self, runner):
        self.say('validation')

    def after_val(self, runner):
        self.say('data')

    def before_save_checkpoint(self, runner, checkpoint):
        self.say('saving')


def _train(words, log):
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ['train.py', *words]
    with contextlib.suppress(ValueError):
        sys.path.remove(str(TOOLS))
    sys.path.insert(0, str(TOOLS))
    importlib.import_module('_common').run(importlib.import_module('train').main)


class Training:
    """tools/train.py at work, a process group of its own.

    Args:
        words: its arguments.
        folder: that of the work dir; ``log`` and ``phase`` are written there.
        command: as a command; else as a fork of a process that has imported what it needs, which saves seconds.
    """

    def __init__(self, words, folder, command):
        self.folder = Path(folder)
        (self.folder / 'phase').write_text(f'{"start":<12}')
        words, log = [str(word) for word in words], self.folder / 'log'
        if command:
            paths = [str(ROOT), str(Path(__file__).parents[1]), os.environ.get('PYTHONPATH', '')]
            with open(log, 'ab') as file:
                self._process = subprocess.Popen(
                    [sys.executable, TOOLS / 'train.py', *words],
                    env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join(paths)},
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                )
        else:
            context = get_context('forkserver')
            context.set_forkserver_preload([__name__, *IMPORTED])
            self._process = context.Process(target=_train, args=(words, log))
            self._process.start()
        self._wait = self._process.wait if command else self._process.join

    @property
    def phase(self):
        return (self.folder / 'phase').read_text().strip()

    def status(self):
        """None while it runs."""
        return self._process.poll() if isinstance(self._process, subprocess.Popen) else self._process.exitcode

    def wait(self):
        self._wait()
        return self.status()

    def kill(self):
        """SIGKILL to all of its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        return self.wait()

    def wait_for(self, condition):
        """Until it holds, or the process is at its end."""
        while self.status() is None and not condition():
            time.sleep(0.0005)
