from .resnet import SKBasicBlock, SKBottleneck, SKResNet
from .shufflenet import ShuffleUnit, SKShuffleNetV2
from .simclr import SKResNetSimCLR

__all__ = ['SKBasicBlock', 'SKBottleneck', 'SKResNet', 'SKResNetSimCLR', 'SKShuffleNetV2', 'ShuffleUnit']
