from .dispatch import BACKENDS, norm_relu_select
from .selective_kernel import fuse, fuse_reference, select, select_reference

__all__ = ['BACKENDS', 'fuse', 'fuse_reference', 'norm_relu_select', 'select', 'select_reference']
