"""What is wrong in a config, in one line that says where: mmengine says it from within whatever it was building."""

import contextlib
import difflib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from types import FrameType, TracebackType
from typing import Any

from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.registry import OPTIMIZERS, Registry, build_from_cfg
from mmengine.runner import Runner

from ..checkpoints import CheckpointError
from ..hub import HubError, shorten

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
# Sections in which mmengine looks for these alone, and passes over what is beside them.
_KEYS = {
    'auto_scale_lr': {'base_batch_size', 'enable'},
    'env_cfg': {'cudnn_benchmark', 'dist_cfg', 'mp_cfg', 'resource_limit'},
}
_BUILDER, _RUNNER = inspect.getfile(build_from_cfg), inspect.getfile(Runner)
_UNKNOWN = re.compile(r'(\S+) is not in the .+ registry')
_UNEXPECTED = re.compile(r"(?:unexpected keyword argument '|has no argument )(\w+)")


class ConfigError(ValueError):
    """A config that cannot be built; the message names the place in it and the cause."""


def check_sections(cfg: Config, options: Iterable[str] = ()) -> None:
    """Raise where a section's name is misspelt, for mmengine passes over what it does not know.

    Args:
        cfg: a config as its file has it; a name at its top that is far from every section's is a variable of its own.
        options: what is to be set in it from outside (``model.backbone.depth``): in a section, or what the file has.

    Raises:
        ConfigError: names what is misspelt, and what was meant.
    """
    for name in cfg:
        for near in difflib.get_close_matches(name, _SECTIONS, n=1, cutoff=0.85):
            part_of_it = name.startswith(f'{near}_') or name.endswith(f'_{near}')
            if name not in _SECTIONS | _COMMON_NAMES and not part_of_it:
                raise ConfigError(f'{cfg.filename}: {name} is no section of a config; near it is {near}')
    for option in options:
        name = option.partition('.')[0]
        if name not in _SECTIONS and name not in cfg:
            raise ConfigError(f'{option}: the config has no {name}{_near(name, _SECTIONS | set(cfg))}')


def check_keys(cfg: Config) -> None:
    """Raise where a section has a key that mmengine would not look at.

    Raises:
        ConfigError: names the key, and those that there are.
    """
    for section, known in _KEYS.items():
        for key in cfg.get(section) or {}:
            if key not in known:
                raise ConfigError(f'{section}.{key}: there are only {", ".join(sorted(known))}')


def check_hooks(runner: Runner) -> None:
    """Raise where CheckpointHook was given what it would fail of in saving, after an epoch.

    Raises:
        ConfigError: names the argument.
    """
    known = set(inspect.signature(runner.save_checkpoint).parameters)
    for hook in runner.hooks:
        for name in set(hook.args) - known if isinstance(hook, CheckpointHook) else ():
            near = _near(name, _arguments(type(hook)))
            raise ConfigError(f'default_hooks.checkpoint.{name}: {type(hook).__name__} has no such argument{near}')


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
        frame = _innermost(error.__traceback__)
        if frame is None and not constructing:
            raise
        raise ConfigError(_explain(cfg, error, frame)) from error


def _innermost(traceback: TracebackType | None) -> FrameType | None:
    """Where mmengine was building the part that failed; a registry's build says more than the runner's."""
    found = None
    while traceback is not None:
        code = traceback.tb_frame.f_code
        by_registry = code.co_filename == _BUILDER and 'registry' in traceback.tb_frame.f_locals
        if by_registry or (code.co_filename == _RUNNER and code.co_name.lstrip('_').startswith('build_')):
            found = traceback.tb_frame
        traceback = traceback.tb_next
    return found


def _explain(cfg: Config, error: Exception, frame: FrameType | None) -> str:
    variables = {} if frame is None else frame.f_locals
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
        where = (beside or places or [None])[0]
        near = _near(unexpected[1], _arguments(cls)) if beside else ''
        return f'{where}: {_say(error)}{near}' if where else _say(error)
    where = next((place for place, value in _items(cfg) if _same(value, part)), None)
    if where is None and frame is not None and registry is None:
        where = frame.f_code.co_name.lstrip('_').removeprefix('build_')
    return f'{where}: {_say(error)}' if where else _say(error)


def _no_such(cfg: Config, kind: str, registry: Registry) -> str:
    places = [place for place, value in _items(cfg) if place.endswith('type') and value == kind]
    where = f'{" and ".join(places[:2])}={kind!r}' if places else repr(kind)
    return f'{where}: mmengine knows no {registry.name} of this name{_near(kind, _names(registry))}'


def _say(error: Exception) -> str:
    plain = Exception(*error.args) if isinstance(error, KeyError) else error  # a KeyError's str is a repr
    said = shorten(plain, width=400)
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


def _near(name: str, names: set[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    return f'; near it {"is" if len(near) == 1 else "are"} {", ".join(near)}' if near else ''
