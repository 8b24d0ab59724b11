"""Where the configs, the tools and the model index lie, and how what is missing is installed."""

import difflib
import importlib.util
from pathlib import Path

__all__ = ['ROOT', 'find_config', 'how_to_install']

_PACKAGE = Path(__file__).resolve().parent
# The wheel keeps them where OpenMMLab's packages do; a checkout has them at its top.
ROOT = _PACKAGE / '.mim' if (_PACKAGE / '.mim').is_dir() else _PACKAGE.parent


def how_to_install(extra: str = '') -> str:
    """The command for error messages and model cards. The package is not on PyPI: a clone of it is what there is."""
    return f"pip install '.{f'[{extra}]' if extra else ''}' in a clone of sk-plugins"


def find_config(name: str) -> Path:
    """A config file by its path, or one of the project's own by its path under ``configs/`` or its name.

    Another OpenMMLab package's is ``PACKAGE::PATH``, as in a config's ``_base_``.

    Raises:
        FileNotFoundError: there is no such file; the message names the project's own configs that come near.
    """
    if Path(name).is_file():
        return Path(name)
    package, _, path = name.partition('::')
    spec = importlib.util.find_spec(package) if path and package.isidentifier() else None
    if spec is not None and spec.origin is not None:
        configs = Path(spec.origin).parent / '.mim' / 'configs'
        if not (configs / path).is_file():
            raise FileNotFoundError(f'config {name!r}: there is no {path} in {configs}')
        return configs / path
    configs = ROOT / 'configs'
    relative = name.removeprefix('configs/').removesuffix('.py') + '.py'
    if (configs / relative).is_file():
        return configs / relative
    own = {path.stem: path for path in sorted(configs.rglob('*.py')) if '_base_' not in path.parts}
    if name in own:
        return own[name]
    near = difflib.get_close_matches(Path(relative).stem, own, n=5, cutoff=0.5)
    near = near or [stem for stem in own if stem.startswith('sknet')]
    raise FileNotFoundError(
        f'config {name!r} is neither a file nor one of the {len(own)} shipped in {configs}; near it are '
        f'{", ".join(near)}'
    )
