"""Imports of OpenMMLab's packages without what they print of others that they do without."""

import contextlib
import io
import warnings
from collections.abc import Iterator

__all__ = ['quiet_imports']


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Within it, nothing that is printed on stdout, and no warning, is seen; errors are."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield
