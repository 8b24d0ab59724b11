from .conv_bn_act import ConvBNAct
from .selective_kernel import SelectiveKernel, SelectiveKernelAttention

__all__ = ['ConvBNAct', 'SelectiveKernel', 'SelectiveKernelAttention']
