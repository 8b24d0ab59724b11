from .resnet import SKBasicBlock, SKBottleneck, SKResNet
from .shufflenet import ShuffleUnit, SKShuffleNetV2

__all__ = ['SKBasicBlock', 'SKBottleneck', 'SKResNet', 'SKShuffleNetV2', 'ShuffleUnit']
