from .selective_kernel import fuse, fuse_reference, select, select_reference

__all__ = ['fuse', 'fuse_reference', 'select', 'select_reference']
