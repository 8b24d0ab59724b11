"""Where the configs, the tools and the model index lie: in the checkout, or in the wheel's ``.mim`` folder."""

from pathlib import Path

__all__ = ['ROOT', 'find_config']

_PACKAGE = Path(__file__).resolve().parent
# The wheel keeps them where OpenMMLab's packages do; a checkout has them at its top.
ROOT = _PACKAGE / '.mim' if (_PACKAGE / '.mim').is_dir() else _PACKAGE.parent


def find_config(name: str) -> Path:
    """A config file by its path, or one of the project's own by its path or name under ``configs/``.

    Raises:
        FileNotFoundError: there is no such file; the message lists the project's own configs.
    """
    if Path(name).is_file():
        return Path(name)
    configs = ROOT / 'configs'
    relative = name.removeprefix('configs/').removesuffix('.py') + '.py'
    if (configs / relative).is_file():
        return configs / relative
    own = sorted(str(p.relative_to(configs)) for p in configs.rglob('*.py') if '_base_' not in p.parts)
    raise FileNotFoundError(f'config {name!r} is neither a file nor one of the configs shipped here: {", ".join(own)}')
