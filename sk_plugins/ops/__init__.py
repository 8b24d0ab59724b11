from .recompute import norm_relu_pool, select_recomputed
from .selective_kernel import fuse, fuse_reference, select, select_reference

__all__ = ['fuse', 'fuse_reference', 'norm_relu_pool', 'select', 'select_recomputed', 'select_reference']
