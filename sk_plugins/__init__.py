"""Selective Kernel Networks for timm and OpenMMLab. Importing this package registers its models in timm."""

from . import timm_models as timm_models
from .folding import fuse
from .layers import SelectiveKernel
from .networks import SKResNet

__version__ = '0.1.0'

__all__ = ['SKResNet', 'SelectiveKernel', '__version__', 'fuse']
