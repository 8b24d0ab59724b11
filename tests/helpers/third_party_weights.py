"""Narrow networks of other projects, as training could leave them."""

import re

import torch

import sk_plugins  # noqa: F401 - registers the models

NARROW = dict(widths=(16, 32, 64, 96), outputs=(32, 64, 128, 192), dims=(8, 8, 8, 8))

TRUE = dict(kernels=(3, 5), dilations=(1, 1))

CHANNELS = dict(channels=(8, 16, 32, 48), cardinality=4, base_width=32, num_classes=7)


def randomise(model, dtype=torch.float64):
    """Statistics, biases and attention that are far from what they are after initialisation."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator) * 0.3
            if name.endswith('running_var'):
                tensor.copy_(noise.abs() + 0.5)
            elif tensor.ndim < 2:
                # Only a norm's scale is a vector named weight.
                tensor.copy_(noise + name.endswith('weight'))
            elif re.search(r'\.fcs\.|conv_fc2|attention\.4', name):
                tensor.copy_(noise * 5)
    return model.eval().to(dtype)


def make_input(channels=3, size=40, dtype=torch.float64):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)
