import contextlib
import functools
import gc
import importlib.util
import os
import random
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.file_reports import pytest_configure as pytest_configure
from helpers.hub_server import HubServer
from helpers.snippets import Interpreter

# Before any test imports a Hub client, which reads these once: nothing here may reach the network, so that outside
# the `hub` fixture the Hub is a port that nothing listens on.
os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')
os.environ.setdefault('HF_HUB_DISABLE_XET', '1')
os.environ.setdefault('HF_HUB_DISABLE_PROGRESS_BARS', '1')
os.environ['HF_HUB_DISABLE_IMPLICIT_TOKEN'] = '1'
os.environ['HF_ENDPOINT'] = 'http://127.0.0.1:9'
os.environ['NO_PROXY'] = os.environ['no_proxy'] = '127.0.0.1'

# The index of mmpretrain's models takes three seconds to read in Python, in every process of the tests.
with contextlib.suppress(ImportError):
    import yaml

    yaml.SafeLoader = getattr(yaml, 'CSafeLoader', yaml.SafeLoader)


def _seed(seed):
    random.seed(seed)
    np.random.seed(seed)  # from which mmengine draws the seed of a run that is given none
    # torch.manual_seed notes, with a stack trace, that devices which are not there are to be seeded as well.
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(seed)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Every test draws the same numbers, alone and in any order; and so do the fixtures of wider scopes."""
    _seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call():
    _seed(1)


def pytest_collection_finish():
    """Garbage collections pass over what imports have left."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # or nanobind calls it a leak


@pytest.fixture(scope='module', autouse=True)
def _no_scope_is_left():
    """A Runner of mmseg's leaves its scope the current one, in which the next file's registries would look."""
    yield
    module = sys.modules.get('mmengine.registry.default_scope')
    if module is not None:
        module.DefaultScope._instance_dict.clear()


@pytest.fixture(scope='module', autouse=True)
def _threads_are_as_before():
    """A tool that is given ``--threads`` leaves that many to its process, in which the next file would run."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='session', autouse=True)
def yapf_format():
    """yapf's FormatCode, which no config goes through meanwhile: it is half of the time that a short run takes."""
    if importlib.util.find_spec('yapf') is None:
        yield None
        return
    from yapf.yapflib import yapf_api

    format_code = yapf_api.FormatCode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yapf_api, 'FormatCode', lambda text, **settings: (text, False))
        yield format_code


@pytest.fixture(scope='session', autouse=True)
def _nothing_is_filled_on_meta():
    """Meta tensors hold no numbers. To fill one takes torch longer than a small one: Python works out its shape."""

    def unless_meta(fill):
        @functools.wraps(fill)
        def init(tensor, *args, **kwargs):
            return tensor if tensor.is_meta else fill(tensor, *args, **kwargs)

        return init

    with pytest.MonkeyPatch.context() as patch:
        for name in ('zeros_', 'ones_', 'constant_', 'uniform_', 'normal_', 'kaiming_uniform_', 'kaiming_normal_'):
            patch.setattr(torch.nn.init, name, unless_meta(getattr(torch.nn.init, name)))
        yield


@pytest.fixture(scope='session', autouse=True)
def _data_sets_collect_no_garbage():
    """mmengine asks for a collection with every data set, which takes a quarter of a second among so many modules."""
    if importlib.util.find_spec('mmengine') is None:
        yield
        return
    from mmengine.dataset import base_dataset

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_dataset, 'gc', SimpleNamespace(collect=lambda: 0))
        yield


@pytest.fixture(scope='session')
def run_python():
    """``run_python('-c', code)`` or ``run_python(script, ...)``: as ``python``, which finds this package.

    In a process that has torch, timm and OpenMMLab imported, and nothing of this project. What a Hub client reads from
    the environment when it is imported is this process's, so that what is about that takes ``subprocess``.
    """
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get('PYTHONPATH'))))
    modules = 'torch,torchvision,timm,mmpretrain,mmengine,mmseg'
    interpreter = Interpreter(modules, {**os.environ, 'PYTHONPATH': path})
    yield interpreter
    interpreter.close()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running HubServer, with the client (and that of subprocesses) pointed at it and at the cache ``hub.cache``."""
    from huggingface_hub import constants, file_download

    server = HubServer().start()
    home = tmp_path / 'hf'
    server.cache = home / 'hub'
    monkeypatch.setenv('HF_ENDPOINT', server.url)
    monkeypatch.setenv('HF_HOME', str(home))
    for name in ('HF_HUB_CACHE', 'HUGGINGFACE_HUB_CACHE', 'HF_HUB_OFFLINE'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, 'ENDPOINT', server.url)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(server.cache))
    template = server.url + '/{repo_id}/resolve/{revision}/{filename}'
    for module in (constants, file_download):  # clients before 1.0 read the latter's
        monkeypatch.setattr(module, 'HUGGINGFACE_CO_URL_TEMPLATE', template, raising=False)
    # Or the client tries a HEAD request six times over 23 s where the Hub is down.
    for name in ('_DEFAULT_RETRY_ON_EXCEPTIONS', '_DEFAULT_RETRY_ON_STATUS_CODES'):
        monkeypatch.setattr(file_download, name, (), raising=False)
    # And between the parts of a download that breaks off it waits a second, five times.
    without_sleep = SimpleNamespace(**{**vars(time), 'sleep': lambda seconds: None})
    monkeypatch.setattr(file_download, 'time', without_sleep)
    yield server
    server.stop()
    shutil.rmtree(home, ignore_errors=True)  # pytest keeps tmp_path of three runs


@pytest.fixture(scope='session')
def imagenet(tmp_path_factory):
    """ImageNet's layout with two classes of real images: crops of two photographs, in many sizes, one of them grey.

    ``root``, its ``classes``, the ``options`` for a config that trains on it quickly, and those for a ``narrow`` SKNet.
    """
    datasets = pytest.importorskip('sklearn.datasets')
    from PIL import Image

    root = tmp_path_factory.mktemp('imagenet')
    sizes = {'train': [(90, 140), (150, 100), (120, 120), (70, 200)], 'val': [(130, 90), (100, 100), (80, 150)]}
    photographs = {'n01': datasets.load_sample_image('china.jpg'), 'n02': datasets.load_sample_image('flower.jpg')}
    for name, photograph in photographs.items():
        for split, shapes in sizes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i, (height, width) in enumerate(shapes):
                top, left = 60 * i + (30 if split == 'val' else 0), 90 * i
                image = Image.fromarray(photograph[top : top + height, left : left + width])
                assert image.size == (width, height)
                image.convert('L' if i == 2 else 'RGB').save(folder / f'{name}_{i}.JPEG')
    options = [f'{split}_dataloader.{option}' for split in ('train', 'val', 'test') for option in _loader_options(root)]
    narrow = ['layers=1,1,1,1', 'channels=16,32,64,128', 'cardinality=8', 'base_width=16']
    narrow = ['model.head.in_channels=512', *(f'model.backbone.{option}' for option in narrow)]
    return SimpleNamespace(root=root, classes=('n01', 'n02'), options=options, narrow=narrow)


def _loader_options(root):
    return [
        f'dataset.data_root={root}',
        'dataset.metainfo.classes=n01,n02',
        'batch_size=4',
        'num_workers=0',
        'persistent_workers=False',
        'pin_memory=False',
    ]
