"""Holocron's and MindCV's SK networks, restated for the tests of their weights, MindCV's in torch.

Parameter names are theirs; everything else is as plain as can be.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from helpers.third_party_networks import attend

# What MindSpore calls the tensors of a BatchNorm.
MINDSPORES = {'weight': 'gamma', 'bias': 'beta', 'running_mean': 'moving_mean', 'running_var': 'moving_variance'}


def conv(inputs, outputs, kernel=1, stride=1, groups=1, dilation=1, bias=False):
    return nn.Conv2d(inputs, outputs, kernel, stride, dilation * (kernel // 2), dilation, groups, bias)


class HolocronKernel(nn.Module):
    def __init__(self, width, stride=1, groups=1):
        super().__init__()
        self.path_convs = nn.ModuleList(
            nn.Sequential(conv(width, width, 3, stride, groups, m + 1), nn.BatchNorm2d(width), nn.ReLU())
            for m in range(2)
        )
        dim = max(width // 16, 32)
        self.sa = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), conv(width, dim), nn.BatchNorm2d(dim), nn.ReLU(), conv(dim, 2 * width, bias=True)
        )

    def forward(self, x):
        branches = torch.stack([path(x) for path in self.path_convs], 1)
        logits = self.sa(branches.sum(1)).sigmoid()
        return attend(branches, logits.flatten(1).unflatten(1, (2, -1)))


class HolocronUnit(nn.Module):
    def __init__(self, inputs, planes, stride, groups):
        super().__init__()
        self.conv = nn.Sequential(
            conv(inputs, planes),
            nn.BatchNorm2d(planes),
            nn.ReLU(),
            HolocronKernel(planes, stride, groups),
            conv(planes, 4 * planes),
            nn.BatchNorm2d(4 * planes),
        )
        self.downsample = None
        if stride > 1 or inputs != 4 * planes:
            self.downsample = nn.Sequential(conv(inputs, 4 * planes, stride=stride), nn.BatchNorm2d(4 * planes))

    def forward(self, x):
        return F.relu(self.conv(x) + (x if self.downsample is None else self.downsample(x)))


def holocron_net(planes=(16, 32, 48, 64), layers=(1, 2, 1, 1), classes=7, groups=1):
    """``features`` (a stem and four stages) and ``head``."""
    stages, inputs = [], 64
    for i, (width, count) in enumerate(zip(planes, layers)):
        units = [
            HolocronUnit(inputs if j == 0 else 4 * width, width, 2 if i and not j else 1, groups) for j in range(count)
        ]
        stages.append(nn.Sequential(*units))
        inputs = 4 * width
    stem = [conv(3, 64, 7, 2), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    parts = OrderedDict(features=nn.Sequential(*stem, *stages), pool=pool, head=nn.Linear(inputs, classes))
    return nn.Sequential(parts)


class _ConvNormAct(nn.Module):
    def __init__(self, inputs, width, stride, dilation):
        super().__init__()
        self.features = nn.Sequential(conv(inputs, width, 3, stride, 1, dilation), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, x):
        return self.features(x)


class MindCVKernel(nn.Module):
    def __init__(self, inputs, width, stride, dim, split):
        super().__init__()
        self.split = split
        self.paths = nn.ModuleList(_ConvNormAct(inputs // (1 + split), width, stride, m + 1) for m in range(2))
        self.attn = nn.Module()
        self.attn.fc_reduce, self.attn.bn = conv(width, dim), nn.BatchNorm2d(dim)
        self.attn.fc_select = conv(dim, 2 * width)

    def forward(self, x):
        inputs = x.chunk(2, 1) if self.split else (x, x)
        branches = torch.stack([path(part) for path, part in zip(self.paths, inputs)], 1)
        z = F.relu(self.attn.bn(self.attn.fc_reduce(branches.sum(1).mean((2, 3), keepdim=True))))
        return attend(branches, self.attn.fc_select(z).flatten(1).unflatten(1, (2, -1)))


class MindCVUnit(nn.Module):
    def __init__(self, inputs, planes, stride, dim, split, basic):
        super().__init__()
        outputs = planes if basic else 4 * planes
        if basic:
            self.conv1 = MindCVKernel(inputs, planes, stride, dim, split)
            self.conv2 = nn.Sequential(conv(planes, planes, 3), nn.BatchNorm2d(planes))
        else:  # there is no ReLU after the first convolution
            self.conv1 = nn.Sequential(conv(inputs, planes), nn.BatchNorm2d(planes))
            self.conv2 = MindCVKernel(planes, planes, stride, dim, split)
            self.conv3 = nn.Sequential(conv(planes, outputs), nn.BatchNorm2d(outputs))
        self.down_sample = None
        if stride > 1 or inputs != outputs:
            self.down_sample = nn.Sequential(conv(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = x
        for name in ('conv1', 'conv2', 'conv3'):
            y = getattr(self, name)(y) if hasattr(self, name) else y
        return F.relu(y + (x if self.down_sample is None else self.down_sample(x)))


class MindCVNet(nn.Module):
    """``layer1`` to ``layer4``, ``classifier``, and a pooling that pads even sizes at the bottom and the right."""

    def __init__(
        self, planes=(16, 32, 48, 64), layers=(1, 2, 1, 1), dims=(8, 8, 8, 8), basic=True, split=True, classes=7
    ):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 64, 7, 2), nn.BatchNorm2d(64)
        inputs = 64
        for i, (width, count, dim) in enumerate(zip(planes, layers, dims)):
            units = []
            for j in range(count):
                units.append(MindCVUnit(inputs, width, 2 if i and not j else 1, dim, split, basic))
                inputs = width if basic else 4 * width
            self.add_module(f'layer{i + 1}', nn.Sequential(*units))
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        (top, bottom), (left, right) = ((0, 1) if size % 2 == 0 else (1, 1) for size in x.shape[2:])
        x = F.max_pool2d(F.pad(x, (left, right, top, bottom), value=float('-inf')), 3, 2)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return self.classifier(x.mean((2, 3)))

    def mindspore_state_dict(self):
        """Under MindSpore's names, in which BatchNorms do not count their batches."""
        norms = {name for name, module in self.named_modules() if isinstance(module, nn.BatchNorm2d)}
        named = {}
        for name, tensor in self.state_dict().items():
            module, _, leaf = name.rpartition('.')
            if leaf != 'num_batches_tracked':
                named[f'{module}.{MINDSPORES[leaf] if module in norms else leaf}'] = tensor
        return named
