"""Selective Kernel Networks for timm and OpenMMLab. Importing this package registers its models in timm."""

import sys
from pathlib import Path

__version__ = '0.1.0'

__all__ = ['SKResNet', 'SelectiveKernel', '__version__', 'fold_batch_norm']

# The command that lists the tools needs no models, which take seconds to import: __main__ has them imported for the
# tool that it runs. While `python -m` looks for a module, '-m' stands in the place of its file.
_FOR_COMMAND = Path(sys.argv[0]).stem == 'sk-plugins' if sys.argv else False
if sys.argv[:1] == ['-m']:
    _FOR_COMMAND = sys.orig_argv[sys.orig_argv.index('-m') + 1 :][:1] == ['sk_plugins']

if not _FOR_COMMAND:
    from . import timm_models as timm_models
    from .fuse import fold_batch_norm
    from .layers import SelectiveKernel
    from .networks import SKResNet
