"""SK networks as other projects build and name them, restated for the tests of their weights.

Parameter names are theirs; everything else is as plain as can be.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn


def attend(branches, logits):
    """Branches (B, M, C, H, W) weighed by a softmax of the logits (B, M, C or 1) over M."""
    weights = logits.exp() / logits.exp().sum(1, keepdim=True)
    return (branches * weights[..., None, None]).sum(1)


class SKConv(nn.Module):
    """``convs.{m}``, ``fc``, ``fcs.{m}``. ``reduce``: 'norm' (conv, BN, ReLU), 'linear' (bare) or 'relu' (with one)."""

    def __init__(
        self, channels, dim, kernels=(3, 3), dilations=(1, 2), groups=4, stride=1, reduce='norm', select='conv',
        named=False, conv_bias=False,
    ):  # fmt: skip
        super().__init__()
        self.reduce = reduce
        names = ('conv', 'bn', 'relu') if named else '012'

        def branch(kernel, dilation):
            padding = dilation * (kernel // 2)
            conv = nn.Conv2d(
                channels, channels, kernel, stride, padding, dilation=dilation, groups=groups, bias=conv_bias
            )
            return nn.Sequential(OrderedDict(zip(names, (conv, nn.BatchNorm2d(channels), nn.ReLU()))))

        self.convs = nn.ModuleList(branch(k, d) for k, d in zip(kernels, dilations))
        if reduce == 'norm':
            self.fc = nn.Sequential(nn.Conv2d(channels, dim, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU())
        elif reduce == 'relu':
            self.fc = nn.Sequential(nn.Linear(channels, dim), nn.ReLU())
        else:
            self.fc = nn.Linear(channels, dim)
        make = nn.Linear if select == 'linear' else lambda d, c: nn.Conv2d(d, c, 1)
        self.fcs = nn.ModuleList(make(dim, channels) for _ in kernels)

    def forward(self, x):
        branches = torch.stack([conv(x) for conv in self.convs], 1)
        s = branches.sum(1).mean((2, 3))
        z = self.fc(s[:, :, None, None] if self.reduce == 'norm' else s).flatten(1)
        logits = [fc(z if isinstance(fc, nn.Linear) else z[:, :, None, None]).flatten(1) for fc in self.fcs]
        return attend(branches, torch.stack(logits, 1))


class SKUnit(nn.Module):
    """``bare``: ``conv1`` and ``bn1`` in place of ``conv1.0`` and ``conv1.1``; ``sk``: name of the SK convolution."""

    def __init__(self, inputs, width, outputs, dim, stride=1, bare=False, sk='conv2_sk', bias=False, **kwargs):
        super().__init__()
        self.sk, self.bare = sk, bare
        for i, (c_in, c_out) in {1: (inputs, width), 3: (width, outputs)}.items():
            conv, norm = nn.Conv2d(c_in, c_out, 1, bias=bias), nn.BatchNorm2d(c_out)
            self.add_module(f'conv{i}', conv if bare else nn.Sequential(conv, norm))
            if bare:
                self.add_module(f'bn{i}', norm)
        self.add_module(sk, SKConv(width, dim, stride=stride, **kwargs))
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=bias)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x):
        first, second = (self.bn1, self.bn3) if self.bare else (nn.Identity(), nn.Identity())
        u = F.relu(first(self.conv1(x)))
        u = second(self.conv3(getattr(self, self.sk)(u)))
        return F.relu(u + self.shortcut(x))


class SKNet(nn.Module):
    """``basic_conv``, ``stage_1`` to ``stage_4``, ``classifier``."""

    def __init__(
        self, widths, outputs, dims, layers=(2, 1, 1, 1), classes=7, in_chans=3, bias=False, nested=False, **kwargs
    ):
        super().__init__()
        self.basic_conv = nn.Sequential(nn.Conv2d(in_chans, 64, 7, 2, 3, bias=bias), nn.BatchNorm2d(64))
        inputs = 64
        for i, (width, out, dim, count) in enumerate(zip(widths, outputs, dims, layers)):
            units = [SKUnit(inputs, width, out, dim, stride=min(i, 1) + 1, bias=bias, **kwargs)]
            units += [SKUnit(out, width, out, dim, bias=bias, **kwargs) for _ in range(count - 1)]
            self.add_module(f'stage_{i + 1}', nn.Sequential(*units))
            inputs = out
        self.classifier = nn.Linear(inputs, classes)
        if nested:
            self.classifier = nn.Sequential(self.classifier)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.basic_conv(x)), 3, 2, 1)
        for stage in (self.stage_1, self.stage_2, self.stage_3, self.stage_4):
            x = stage(x)
        return self.classifier(x.mean((2, 3)))


def conv(c_in, c_out, kernel=1, stride=1, groups=1):
    return nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)


class InsightUnit(nn.Module):
    """PytorchInsight's: a dense 3x3 beside one of ``groups`` groups, d = C / 16."""

    def __init__(self, inputs, width, stride, groups=32):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2g, self.bn2g = conv(width, width, 3, stride, groups), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, 4 * width), nn.BatchNorm2d(4 * width)
        self.conv_fc1, self.bn_fc1 = conv(width, width // 16), nn.BatchNorm2d(width // 16)
        self.conv_fc2 = conv(width // 16, 2 * width)
        self.downsample = None
        if stride > 1 or inputs != 4 * width:
            self.downsample = nn.Sequential(conv(inputs, 4 * width, 1, stride), nn.BatchNorm2d(4 * width))

    def forward(self, x):
        u = F.relu(self.bn1(self.conv1(x)))
        dense, grouped = F.relu(self.bn2(self.conv2(u))), F.relu(self.bn2g(self.conv2g(u)))
        s = dense.mean((2, 3), keepdim=True) + grouped.mean((2, 3), keepdim=True)
        logits = self.conv_fc2(F.relu(self.bn_fc1(self.conv_fc1(s)))).flatten(1)
        logits = logits.reshape(len(x), 2, -1)  # first the dense branch's, then the grouped one's
        u = self.bn3(self.conv3(attend(torch.stack([dense, grouped], 1), logits)))
        return F.relu(u + (x if self.downsample is None else self.downsample(x)))


class ConvBNReLU(nn.Module):
    def __init__(self, c_in, c_out, kernel=1, stride=1):
        super().__init__()
        self.conv, self.bn = conv(c_in, c_out, kernel, stride), nn.BatchNorm2d(c_out)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class LucidKernel(nn.Module):
    """Bare true kernels, d = C // 16, one logit per branch."""

    def __init__(self, width, stride, groups):
        super().__init__()
        self.branches = nn.ModuleList(conv(width, width, k, stride, groups) for k in (3, 5))
        dim = width // 16
        self.attention = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), conv(width, dim), nn.BatchNorm2d(dim), nn.ReLU(), conv(dim, 2)
        )

    def forward(self, x):
        branches = torch.stack([branch(x) for branch in self.branches], 1)
        return attend(branches, self.attention(branches.sum(1)).flatten(1)[:, :, None])


class LucidUnit(nn.Module):
    def __init__(self, inputs, width, stride, expansion=4, groups=1, planes=None):
        super().__init__()
        outputs = (planes or width) * expansion
        self.conv1 = ConvBNReLU(inputs, width)
        self.sk_module = LucidKernel(width, stride, groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Sequential(conv(width, outputs), nn.BatchNorm2d(outputs))
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x):
        u = self.conv3(F.relu(self.bn2(self.sk_module(self.conv1(x)))))
        return F.relu(u + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """The frame of PytorchInsight's and lucid's: ``layer1`` to ``layer4`` of units, ``fc``, and a stem of either."""

    def __init__(self, unit, widths, layers=(1, 2, 1, 1), expansion=4, classes=7, stem='conv1', **kwargs):
        super().__init__()
        planes = kwargs.pop('planes', None)
        if stem == 'conv1':
            self.conv1, self.bn1 = conv(3, 64, 7, 2), nn.BatchNorm2d(64)
        elif stem == 'stem.conv':
            self.stem = ConvBNReLU(3, 64, 7, 2)
        else:
            self.stem = nn.Sequential(conv(3, 64, 7, 2), nn.BatchNorm2d(64), nn.ReLU())
        inputs = 64
        for i, (width, count) in enumerate(zip(widths, layers)):
            extra = {**kwargs, 'planes': planes[i]} if planes else kwargs
            outputs = (planes[i] if planes else width) * expansion
            units = [unit(inputs, width, min(i, 1) + 1, **extra)]
            units += [unit(outputs, width, 1, **extra) for _ in range(count - 1)]
            self.add_module(f'layer{i + 1}', nn.Sequential(*units))
            inputs = outputs
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x):
        x = self.stem(x) if hasattr(self, 'stem') else F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, 2, 1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.fc(x.mean((2, 3)))


def insight_net(widths=(32, 64, 64, 96), **kwargs):
    return ResNet(InsightUnit, widths, **kwargs)


def lucid_net(widths=(16, 32, 48, 64), expansion=4, **kwargs):
    def unit(*args, **units_kwargs):
        return LucidUnit(*args, expansion=expansion, **units_kwargs)

    return ResNet(unit, widths, expansion=expansion, **{'stem': 'stem.conv', **kwargs})
