"""What train.py and test.py share: their common arguments, the config, and the process group."""

import argparse
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import _errors
import torch.distributed as dist
from mmengine.config import Config, DictAction
from mmengine.utils import import_modules_from_strings

from sk_plugins._resources import find_config, how_to_install
from sk_plugins.openmmlab.runtime.configs import (
    ConfigError,
    check_sections,
    explain_parsing,
)
from sk_plugins.openmmlab.runtime.distributed import is_lost_peer, wait_for_agent
from sk_plugins.weights import CheckpointError, HubError

# What a config of another scope than mmpretrain's needs, and what installs it.
FRAMEWORKS = {
    'mmdet': "make det, or the extra det beside mmcv's compiled ops",
    'mmrotate': '`pip install onedl-mmrotate faster-coco-eval` beside make det',
    'mmseg': how_to_install('seg'),
}


class OverrideAction(DictAction):
    """mmengine's, but that a word it cannot read is named in the error."""

    def __call__(self, parser, namespace, values, option_string=None):
        for word in values:
            key, equals, _ = word.partition('=')
            if not (key and equals):
                raise argparse.ArgumentError(self, f'{word!r} must be KEY=VALUE')
            try:
                super().__call__(parser, namespace, [word], option_string)
            except AssertionError as error:
                raise argparse.ArgumentError(self, f'{word!r}: {error}') from error


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('config', help="a config file, PACKAGE::PATH, or one of the project's own (sknet50_in1k)")
    parser.add_argument('--work-dir', help='folder for logs and checkpoints (default: work_dirs/CONFIG)')
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=OverrideAction,
        metavar='KEY=VALUE',
        help='settings of the config to override, e.g. train_dataloader.batch_size=64 sync_bn=torch',
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    # torch.distributed.launch passes it; torchrun sets the variable instead.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def load_config(args: argparse.Namespace) -> Config:
    """The config with the common arguments merged in."""
    os.environ.setdefault('LOCAL_RANK', str(getattr(args, 'local_rank', 0)))
    path = find_config(args.config)
    cfg = read_config(path, args.cfg_options)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / path.stem)
    return cfg


def read_config(path: Path, options: dict | None = None) -> Config:
    """A config file with options merged in, and its custom imports and the package of its scope at hand.

    Raises:
        ImportError: a module of ``custom_imports``, which the options may set, cannot be imported.
        ModuleNotFoundError: mmdet or mmseg, which the file needs, is not installed; the message says how to.
        ConfigError: a file that cannot be run, or a section or an option that is misspelt.
    """
    if path.suffix not in ('.py', '.json', '.yml', '.yaml'):
        raise ConfigError(f'{path}: is no config, which ends in .py, .json, .yml or .yaml')
    try:
        with explain_parsing(path):
            cfg = Config.fromfile(path, import_custom_modules=False)
        merge_options(cfg, options or {})
        if cfg.get('custom_imports'):
            try:
                import_modules_from_strings(**cfg.custom_imports)
            except ImportError as error:
                raise ImportError(f'custom_imports: {error}: {error.__context__}') from error
        if cfg.get('default_scope') in FRAMEWORKS:
            importlib.import_module(cfg.default_scope)
    except ModuleNotFoundError as error:
        missing = [name for name in FRAMEWORKS if name in str(error) and importlib.util.find_spec(name) is None]
        if not missing:
            raise
        message = f'{path} needs {missing[0]}, which is not installed: {FRAMEWORKS[missing[0]]}'
        raise ModuleNotFoundError(message, name=missing[0]) from error
    return cfg


def merge_options(cfg: Config, options: Mapping[str, Any]) -> None:
    """Set them; those of validation in the test's loader and evaluator too, where these are the same in the config.

    Raises:
        ConfigError: a section or an option that is misspelt, or what cannot be set.
    """
    check_sections(cfg, options)
    follows = {}
    for part in ('dataloader', 'evaluator'):
        if cfg.get(f'val_{part}') is not None and cfg.get(f'test_{part}') == cfg[f'val_{part}']:
            own = {key: value for key, value in options.items() if re.match(rf'val_{part}\b', key)}
            follows.update({key.replace('val', 'test', 1): value for key, value in own.items()})
    with explain_parsing('--cfg-options'):
        cfg.merge_from_dict({**follows, **options})


def fail_once(error: BaseException) -> NoReturn:
    """Fail, but leave to the first process what all have to say, for as long as it takes to end the others."""
    if int(os.environ.get('RANK', 0)) > 0 and not os.environ.get('SK_PLUGINS_TRACEBACK'):
        wait_for_agent(5)
    _errors.fail(error)


def run(main: Callable[[], object]) -> None:
    """Call a tool's main; what the user can put right is one line on stderr and exit status 1."""
    try:
        _errors.run(main, CheckpointError, HubError, ImportError, OSError, ValueError, fail=fail_once)
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        # Which process was lost torchrun knows, and ends this one; not so where it was lost on another node.
        wait_for_agent(20)
        message = ' '.join(str(error).split())
        rank = os.environ.get('RANK', 0)
        print(f'{Path(sys.argv[0]).name}: error: process {rank} cannot reach the others: {message}', file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
