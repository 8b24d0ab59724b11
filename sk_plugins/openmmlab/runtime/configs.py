"""What is wrong in a config, in one line that says where: mmengine says it from within whatever it was building."""

import contextlib
import difflib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.registry import OPTIMIZERS, Registry
from mmengine.runner import Runner
from torch.distributed import init_process_group
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from ..._text import first_lines, nearest
from ...weights.files import CheckpointError, HubError
from .._internals import find_built

__all__ = ['ConfigError', 'check_hooks', 'check_keys', 'check_sections', 'explain_config', 'explain_parsing']

# What mmengine and its tools read at the top of a config besides the runner's arguments.
_SECTIONS = (set(inspect.signature(Runner.__init__).parameters) - {'self', 'cfg'}) | {
    'activation_checkpointing',
    'compile',
    'custom_imports',
    'efficient_conv_bn_eval',
    'find_unused_parameters',
    'model_wrapper_cfg',
    'runner_type',
    'strategy',
    'sync_bn',
    'tta_model',
    'tta_pipeline',
    'unreadable_images',
}
_COMMON_NAMES = {'models', 'test_pipeline'}  # near to model and tta_pipeline
# Where mmengine looks for these alone, and passes over what is beside them, or fails of it only when it trains.
_KEYS = {
    'auto_scale_lr': {'base_batch_size', 'enable'},
    'compile': set(inspect.signature(torch.compile).parameters) - {'model'},
    'env_cfg': {'cudnn_benchmark', 'dist_cfg', 'mp_cfg', 'resource_limit'},
    'env_cfg.dist_cfg': {'init_backend', 'port', *inspect.signature(init_process_group).parameters} - {'_ranks'},
}
_PARAMWISE = {  # of DefaultOptimWrapperConstructor
    'bias_decay_mult',
    'bias_lr_mult',
    'bypass_duplicate',
    'custom_keys',
    'dcn_offset_lr_mult',
    'dwconv_decay_mult',
    'flat_decay_mult',
    'norm_decay_mult',
}
_CLIP = {'norm': clip_grad_norm_, 'value': clip_grad_value_}
# The runner's methods that build nothing, and the section that they read.
_READERS = {'set_randomness': 'randomness', 'setup_env': 'env_cfg', 'build_logger': 'log_level'}
_UNKNOWN = re.compile(r'(\S+) is not in the .+ registry')
_UNEXPECTED = re.compile(r"(?:unexpected keyword argument '|has no argument )(\w+)")


class ConfigError(ValueError):
    """A config that cannot be built; the message names the place in it and the cause."""


def check_sections(cfg: Config, options: Iterable[str] = ()) -> None:
    """Raise where a section's name is misspelt, for mmengine passes over what it does not know.

    A file may have variables of its own: one named nearly as a section is refused where there is no such section, or
    where it is of the section's type. A name that begins with ``_`` is never refused.

    Args:
        cfg: a config as its file has it.
        options: what is to be set in it from outside (``model.backbone.depth``): in a section, or what the file has.

    Raises:
        ConfigError: names what is misspelt, and what was meant.
    """
    for name, value in cfg.items():
        for near in difflib.get_close_matches(name, _SECTIONS, n=1, cutoff=0.85):
            part_of_it = name.startswith(f'{near}_') or name.endswith(f'_{near}')
            if name in _SECTIONS | _COMMON_NAMES or name.startswith('_') or part_of_it:
                continue
            if near not in cfg or isinstance(value, type(cfg[near])):
                raise ConfigError(
                    f'{cfg.filename}: {name} is no section of a config; near it is {near} (_{name} would be a variable '
                    "of the file's own)"
                )
    for option in options:
        name = option.partition('.')[0]
        if name not in _SECTIONS and name not in cfg:
            raise ConfigError(f'{option}: the config has no {name}{nearest(name, _SECTIONS | set(cfg))}')


def check_keys(cfg: Config) -> None:
    """Raise for keys that mmengine ignores, or that fail in the first step.

    Raises:
        ConfigError: names the key, and those that there are.
    """
    keys = dict(_KEYS)
    wrapper = _part(cfg, 'optim_wrapper')
    if wrapper.get('constructor') in (None, 'DefaultOptimWrapperConstructor'):
        keys['optim_wrapper.paramwise_cfg'] = _PARAMWISE
    clip = _CLIP.get(_part(cfg, 'optim_wrapper.clip_grad').get('type', 'norm'))
    if clip and wrapper.get('type', 'OptimWrapper') in ('OptimWrapper', 'AmpOptimWrapper'):
        keys['optim_wrapper.clip_grad'] = {'type', *inspect.signature(clip).parameters} - {'parameters'}
    if 'runner_type' in cfg:  # FlexibleRunner's strategies
        keys['compile'] = keys['compile'] | {'target'}
    for section, known in keys.items():
        for key in _part(cfg, section):
            if key not in known and not key.startswith('_'):  # mmpretrain's twins have _delete for _delete_
                raise ConfigError(f'{section}.{key}: there are only {", ".join(sorted(known))}')
    if not isinstance(cfg.get('compile'), (bool, Mapping, type(None))):
        raise ConfigError(f'compile={cfg.compile!r} is neither True, False nor a dict of arguments of torch.compile')


def check_hooks(runner: Runner) -> None:
    """Raise where CheckpointHook was given what it would fail of in saving, after an epoch.

    Raises:
        ConfigError: names the argument.
    """
    known = set(inspect.signature(runner.save_checkpoint).parameters)
    for hook in runner.hooks:
        for name in set(hook.args) - known if isinstance(hook, CheckpointHook) else ():
            near = nearest(name, _arguments(type(hook)))
            raise ConfigError(f'default_hooks.checkpoint.{name}: {type(hook).__name__} has no such argument{near}')


def _part(cfg: Config, place: str) -> Mapping[str, Any]:
    """What is there, if it is a dict; else an empty one."""
    value: Any = cfg
    for name in place.split('.'):
        value = value.get(name)
        if not isinstance(value, Mapping):
            return {}
    return value


@contextlib.contextmanager
def explain_parsing(path: Any) -> Iterator[None]:
    """Within it, what goes wrong in running a config file becomes a :class:`ConfigError` that names the file."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        raise ConfigError(f'{path}: {_say(error)}') from error


@contextlib.contextmanager
def explain_config(cfg: Config, constructing: bool = False) -> Iterator[None]:
    """Within it, what goes wrong in building a part of ``cfg`` becomes a :class:`ConfigError` that names the place.

    Args:
        cfg: the config that is built.
        constructing: everything in here is building; else only what comes from a registry's ``build``.
    """
    try:
        yield
    except (CheckpointError, HubError, ImportError, ConfigError):
        raise
    except Exception as error:
        built = find_built(error.__traceback__, _READERS)
        if built is None and not constructing:
            raise
        raise ConfigError(_explain(cfg, error, *(built or (None, {})))) from error


def _explain(cfg: Config, error: Exception, builder: str | None, variables: Mapping[str, Any]) -> str:
    part, cls, registry = variables.get('cfg'), variables.get('obj_cls'), variables.get('registry')
    unknown = _UNKNOWN.match(str(error.args[0])) if isinstance(error, KeyError) and error.args else None
    optimizer = ((cfg.get('optim_wrapper') or {}).get('optimizer') or {}).get('type')
    if unknown:
        return _no_such(cfg, unknown[1], registry)
    if isinstance(error, TypeError) and isinstance(optimizer, str) and OPTIMIZERS.get(optimizer) is None:
        return _no_such(cfg, optimizer, OPTIMIZERS)  # of which mmengine says that None is not callable
    if registry is not None and 'type' not in part and 'type' not in (variables.get('default_args') or {}):
        error = ConfigError(f'{dict(part)} has no type, which says what it is')
    unexpected = _UNEXPECTED.search(str(error)) if isinstance(error, TypeError) else None
    if unexpected:
        places = [place for place, _ in _items(cfg) if place.rpartition('.')[2] == unexpected[1]]
        beside = [place for place in places if _same(_at(cfg, place.rpartition('.')[0]), part)]
        read = [place for place in places if place.partition('.')[0] in _SECTIONS]  # others are the file's own
        where = (beside or read or places or [None])[0]
        near = nearest(unexpected[1], _arguments(cls)) if beside and 'near it' not in str(error) else ''
        return f'{where}: {_say(error)}{near}' if where else _say(error)
    where = next((place for place, value in _items(cfg) if _same(value, part)), None)
    if where is None and builder is not None and registry is None:
        where = _READERS.get(builder) or _loader(cfg, variables.get('dataloader')) or builder.removeprefix('build_')
    said = _say(error)
    if where and where.endswith('dataset') and isinstance(error, OSError):
        said += _say_layout(_at(cfg, where))
    return f'{where}: {said}' if where else said


def _say_layout(dataset: Any) -> str:
    """What a data set reads, and the tool that prepares it, where there is one."""
    if not isinstance(dataset, Mapping) or 'type' not in dataset:
        return ''
    kind, root = str(dataset['type']).rpartition('.')[2], Path(str(dataset.get('data_root') or ''))
    prefix = dataset.get('data_prefix') or {}
    prefix = {'img_path': prefix} if isinstance(prefix, str) else prefix
    expected = [root / str(path) for path in (dataset.get('ann_file'), *prefix.values()) if path]
    if kind in ('ImageNet', 'CustomDataset') and not dataset.get('ann_file'):
        folder = next(iter(expected), root / str(dataset.get('split') or ''))
        said = f'{folder}/CLASS/*.jpg, a folder for each class (`sk-plugins finetune FOLDER` takes it as it is)'
    elif kind in ('FashionMNIST', 'ScaledFashionMNIST'):
        said = f'{root}/train-images-idx3-ubyte.gz and three more, which `sk-plugins prepare_fashion_mnist` writes'
    elif kind in ('CIFAR10', 'CIFAR100', 'MNIST'):
        said = f'in {root} the files that mmpretrain downloads'
    elif expected:
        said = ' and '.join(map(str, expected))
    else:
        return ''
    if 'scenes' in root.parts:
        said += ', which `sk-plugins prepare_scenes` writes'
    return f'; expected: {said}'


def _loader(cfg: Config, part: Any) -> str | None:
    """The data loader that was being built, whose data set may have been replaced."""
    if not isinstance(part, Mapping):
        return None
    settings = {key: value for key, value in part.items() if key != 'dataset'}
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        if {key: value for key, value in _part(cfg, name).items() if key != 'dataset'} == settings:
            return name
    return None


def _no_such(cfg: Config, kind: str, registry: Registry) -> str:
    places = [place for place, value in _items(cfg) if place.endswith('type') and value == kind]
    where = f'{" and ".join(places[:2])}={kind!r}' if places else repr(kind)
    return f'{where}: mmengine knows no {registry.name} of this name{nearest(kind, _names(registry))}'


def _say(error: Exception) -> str:
    plain = Exception(*error.args) if isinstance(error, KeyError) else error  # a KeyError's str is a repr
    said = first_lines(plain, width=400)
    return said if isinstance(error, (OSError, ValueError)) and said else f'{type(error).__name__}: {said}'


def _same(value: Any, part: Any) -> bool:
    """Whether a dict of the config is the one that was being built, to which builders add what is missing."""
    if not isinstance(value, Mapping) or not isinstance(part, Mapping) or not value:
        return False
    if 'type' in value and len(value) == 1:
        return value == part
    return all(key in part and part[key] == item for key, item in value.items())


def _items(value: Any, place: str = '') -> Iterator[tuple[str, Any]]:
    """Every place in the config and what is there."""
    if isinstance(value, (Mapping, Config)):
        parts = value.items()
    elif isinstance(value, (list, tuple)):
        parts = enumerate(value)
    else:
        return
    for key, item in parts:
        inner = f'{place}.{key}'.removeprefix('.')
        yield inner, item
        yield from _items(item, inner)


def _at(cfg: Config, place: str) -> Any:
    return next((value for where, value in _items(cfg) if where == place), cfg)


def _names(registry: Registry) -> set[str]:
    """The names of a registry, of those below it, and of those that it asks."""
    names: set[str] = set()
    while registry is not None:
        names |= set(registry.module_dict)
        registry = registry.parent
    return names


def _arguments(cls: Any) -> set[str]:
    classes = cls.__mro__ if inspect.isclass(cls) else [cls]
    names: set[str] = set()
    for one in classes:
        with contextlib.suppress(TypeError, ValueError):
            names |= set(inspect.signature(one.__init__ if inspect.isclass(one) else one).parameters)
    return names - {'self', 'args', 'kwargs'}
