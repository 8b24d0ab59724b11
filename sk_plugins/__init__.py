"""Selective Kernel Networks for timm and OpenMMLab. Importing this package registers its models in timm."""

import sys
from pathlib import Path

__version__ = '0.1.0'

__all__ = ['SKResNet', 'SelectiveKernel', '__version__', 'fold_batch_norm', 'from_resnet', 'selectify', 'simplify']

# The command that lists the tools needs no models, which take seconds to import: __main__ has them imported for the
# tool that it runs. While `python -m` looks for a module, '-m' stands in the place of its file.
_FIRST = Path(sys.argv[0]).stem if sys.argv else ''
_AFTER_M = [word for before, word in zip(sys.orig_argv, sys.orig_argv[1:]) if before == '-m']

if not (_FIRST == 'sk-plugins' or (_FIRST == '-m' and _AFTER_M[:1] == ['sk_plugins'])):
    from . import timm_models as timm_models
    from .fuse import fold_batch_norm
    from .layers import SelectiveKernel
    from .lean import simplify
    from .networks import SKResNet
    from .surgery import selectify
    from .weights import from_resnet
