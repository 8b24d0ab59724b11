from .resnet import SKBottleneck, SKResNet

__all__ = ['SKBottleneck', 'SKResNet']
