"""Two SelectiveKernel layers of the same weights, one of which goes the plain way, for tests that compare the two."""

import copy

import torch

from sk_plugins import SelectiveKernel

SETTINGS = {
    'one': dict(kernel_sizes=(3,)),
    'two': dict(),
    'three': dict(kernel_sizes=(3, 5, 7)),
    'four': dict(kernel_sizes=(1, 3, 5, 7)),
    'shared': dict(select='shared'),
    'shared of three': dict(kernel_sizes=(3, 5, 7), select='shared'),
    'summed': dict(select='sum'),
    'split': dict(split_input=True),
    'strided': dict(stride=2),
}


def make_pair(dtype=torch.float64, channels=8, **kwargs):
    """Two layers of the same weights, the first of which recomputes."""
    torch.manual_seed(0)
    layer = SelectiveKernel(channels, **{'groups': 2, **kwargs})
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if name.endswith('fc_select.weight'):
                tensor.normal_(std=0.5)
            elif name.endswith(('bn.weight', 'running_var')):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith(('bn.bias', 'running_mean')):
                tensor.normal_(std=0.3)
    layer = layer.to(dtype)
    plain = copy.deepcopy(layer)
    plain.backend = 'plain'
    return layer.train(), plain.train()


def make_input(shape=(3, 8, 7, 5), dtype=torch.float64, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def step(layer, x, backward=True):
    """Output and all gradients for a fixed gradient of the output, and the layer's buffers after it."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    output = layer(x)
    gradient = make_input(output.shape, output.dtype, seed=2).contiguous(memory_format=torch.contiguous_format)
    output.backward(gradient)
    grads = {'x': x.grad, **{name: parameter.grad for name, parameter in layer.named_parameters()}}
    return output.detach(), grads, dict(layer.named_buffers())


def assert_same(got, expected, **tolerance):
    output, grads, buffers = got
    torch.testing.assert_close(output, expected[0], **tolerance)
    assert grads.keys() == expected[1].keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[1][name], msg=lambda said, name=name: f'{name}: {said}', **tolerance)
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, expected[2][name], **tolerance)


def through(layer, x):
    """The autograd functions on the way of an output."""
    output = layer(x)  # older releases of torch free a Python node with its output
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    return ' '.join(node.name() for node in seen)
