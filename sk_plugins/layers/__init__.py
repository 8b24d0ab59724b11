from .conv_bn_act import ConvBNAct
from .selective_kernel import SELECT_MODES, SelectiveKernel, SelectiveKernelAttention

__all__ = ['SELECT_MODES', 'ConvBNAct', 'SelectiveKernel', 'SelectiveKernelAttention']
