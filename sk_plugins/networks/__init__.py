from .resnet import SKBasicBlock, SKBottleneck, SKResNet
from .shufflenet import SKShuffleNetV2

__all__ = ['SKBasicBlock', 'SKBottleneck', 'SKResNet', 'SKShuffleNetV2']
