"""SimCLRv2's network restated from its description, and its weights as lightly-ai and TensorFlow name them."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from helpers.randomised import randomise
from sk_plugins.networks import SKResNetSimCLR
from sk_plugins.weights.simclr import to_lightly

LAYERS = (2, 1, 2, 1)

CHANNELS = (8, 12, 16, 20)

ARGS = dict(layers=LAYERS, channels=CHANNELS, stem_width=6, num_classes=7)


def make_network(**kwargs):
    torch.manual_seed(0)
    model = randomise(SKResNetSimCLR(**{**ARGS, **kwargs}))
    for module in model.modules():
        if isinstance(module, nn.Linear):  # or logits would hardly differ
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model.double()


def make_lightly(**kwargs):
    """A network, and its weights as lightly-ai's files hold them."""
    model = make_network(**kwargs)
    return model, to_lightly(model.state_dict())


def as_file(weights):
    """``{'resnet': ..., 'head': ...}``, in float32."""
    parts = {'resnet': {}, 'head': {}}
    for name, tensor in weights.items():
        part, name = ('head', name.removeprefix('head.')) if name.startswith('head.') else ('resnet', name)
        parts[part][name] = tensor.float() if tensor.is_floating_point() else tensor
    return parts


def make_image(*size, dtype=torch.float64):
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def windows(x, side, stride, before, reduce):
    """``reduce`` of every window, as far as it lies on the map; the first begins ``before`` it."""
    rows, columns = (
        [slice(max(stride * i - pad, 0), stride * i - pad + side) for i in range(-(-size // stride))]
        for size, pad in zip(x.shape[-2:], before)
    )
    return torch.stack([torch.stack([reduce(x[..., row, column]) for column in columns], -1) for row in rows], -2)


def max_pool(x):
    """3x3 / 2 with TensorFlow's 'SAME'."""
    pads = [max((-(-size // 2) - 1) * 2 + 3 - size, 0) // 2 for size in x.shape[-2:]]
    return windows(x, 3, 2, pads, lambda window: window.amax((-2, -1)))


def avg_pool(x, stride):
    """2x2: with stride 2 of maps with a row and a column of zeros at the end; with stride 1 of what is there."""
    if stride == 1:
        return windows(x, 2, 1, (0, 0), lambda window: window.mean((-2, -1)))
    return windows(x, 2, 2, (0, 0), lambda window: window.sum((-2, -1)) / 4)


def restate(weights, x, layers=LAYERS, projection=0):
    """Logits."""

    def conv(x, name, stride=1):
        weight = weights[f'{name}.weight']
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def bn(x, name):
        scale, shift, mean, variance = (
            weights[f'{name}.{leaf}'].view(1, -1, *[1] * (x.ndim - 2))
            for leaf in ('weight', 'bias', 'running_mean', 'running_var')
        )
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    def sk(x, name, stride):
        u = bn(conv(x, f'{name}.main_conv.0', stride), f'{name}.main_conv.1.0').relu()
        u0, u1 = u.chunk(2, 1)
        s = (u0 + u1).mean((2, 3), keepdim=True)
        z = bn(conv(s, f'{name}.mixing_conv.0'), f'{name}.mixing_conv.1.0').relu()
        a = conv(z, f'{name}.mixing_conv.2').unflatten(1, (2, -1)).softmax(1)
        return a[:, 0] * u0 + a[:, 1] * u1

    for i, stride in enumerate((2, 1, 1)):
        x = bn(conv(x, f'net.0.{2 * i}', stride), f'net.0.{2 * i + 1}.0').relu()
    x = max_pool(x)
    for stage, units in enumerate(layers, 1):
        for unit in range(units):
            name = f'net.{stage}.blocks.{unit}'
            stride = 2 if stage > 1 and unit == 0 else 1
            shortcut = x
            if unit == 0:
                shortcut = conv(avg_pool(x, stride), f'{name}.projection.shortcut.2')
                shortcut = bn(shortcut, f'{name}.projection.bn.0')
            x = bn(conv(x, f'{name}.net.0'), f'{name}.net.1.0').relu()
            x = sk(x, f'{name}.net.2', stride)
            x = (bn(conv(x, f'{name}.net.3'), f'{name}.net.4.0') + shortcut).relu()
    x = x.mean((2, 3))
    for i in range(projection):
        x = bn(x @ weights[f'head.layers.{3 * i}.weight'].T, f'head.layers.{3 * i + 1}').relu()
    return x @ weights['fc.weight'].T + weights['fc.bias']


class Variables(dict):
    """A TensorFlow 1 checkpoint of the weights in ``lightly``, its layers numbered as they are created."""

    def __init__(self, lightly, layers=LAYERS, trained=None):
        self.lightly = lightly
        self.numbers = {kind: itertools.count() for kind in ('conv2d', 'batch_normalization')}
        for i in range(3):
            self.conv(f'net.0.{2 * i}', f'net.0.{2 * i + 1}.0')
        for stage, units in enumerate(layers, 1):
            for unit in range(units):
                name = f'net.{stage}.blocks.{unit}'
                if unit == 0:
                    self.conv(f'{name}.projection.shortcut.2', f'{name}.projection.bn.0')
                self.conv(f'{name}.net.0', f'{name}.net.1.0')
                self.conv(f'{name}.net.2.main_conv.0', f'{name}.net.2.main_conv.1.0')
                self.conv(f'{name}.net.2.mixing_conv.0', f'{name}.net.2.mixing_conv.1.0')
                self.conv(f'{name}.net.2.mixing_conv.2')
                self.conv(f'{name}.net.3', f'{name}.net.4.0')
        for i in range(sum(name.startswith('head.') and t.ndim == 2 for name, t in lightly.items())):
            self[f'head_contrastive/nl_{i}/dense/kernel'] = lightly[f'head.layers.{3 * i}.weight'].T
            self.norm(f'head.layers.{3 * i + 1}', f'head_contrastive/nl_{i}/batch_normalization')
        self['head_supervised/linear_layer/dense/kernel'] = lightly['fc.weight'].T
        self['head_supervised/linear_layer/dense/bias'] = lightly['fc.bias']
        self['global_step'] = torch.tensor(250228)
        for name in [name for name in self if trained and name.startswith(trained)]:
            self[f'{name}/Momentum'] = torch.ones_like(self[name])

    def number(self, kind):
        number = next(self.numbers[kind])
        return f'base_model/{kind}_{number}' if number else f'base_model/{kind}'

    def conv(self, theirs, norm=None):
        self[self.number('conv2d') + '/kernel'] = self.lightly[f'{theirs}.weight'].permute(2, 3, 1, 0)
        if norm is not None:
            self.norm(norm, self.number('batch_normalization'))

    def norm(self, theirs, name):
        leaves = dict(gamma='weight', beta='bias', moving_mean='running_mean', moving_variance='running_var')
        self.update({f'{name}/{leaf}': self.lightly[f'{theirs}.{ours}'] for leaf, ours in leaves.items()})


class Reader:
    """What ``tf.train.load_checkpoint`` gives, of variables in memory."""

    def __init__(self, variables):
        self.variables = variables

    def get_variable_to_shape_map(self):
        return {name: list(tensor.shape) for name, tensor in self.variables.items()}

    def get_tensor(self, name):
        return self.variables[name].numpy()
