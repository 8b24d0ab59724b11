from .convolution import convolve, convolves_at_once, folds, rearrange
from .dispatch import BACKENDS, norm_relu_select, project, select_in_inference
from .selective_kernel import fuse, fuse_reference, select, select_reference

__all__ = [
    'BACKENDS',
    'convolve',
    'convolves_at_once',
    'folds',
    'fuse',
    'fuse_reference',
    'norm_relu_select',
    'project',
    'rearrange',
    'select',
    'select_in_inference',
    'select_reference',
]
