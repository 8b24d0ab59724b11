"""Selective Kernel Networks for timm and OpenMMLab. Importing this package registers its models in timm."""

from . import timm_models as timm_models
from .fuse import fold_batch_norm
from .layers import SelectiveKernel
from .networks import SKResNet
from .surgery import selectify

__version__ = '0.1.0'

__all__ = ['SKResNet', 'SelectiveKernel', '__version__', 'fold_batch_norm', 'selectify']
