"""_benchmark.counting: calls, kernels and saved bytes counted by hand, and captures that fail."""

import contextlib
import gc
import sys
from types import SimpleNamespace

import pytest
import torch
from _benchmark import counting
from _benchmark.measuring import count_calls, saved_mib_per_image
from _benchmark.models import Variant
from _benchmark.sets import SETS
from _benchmark.settings import Settings
from torch import nn
from torch.autograd import DeviceType

# Calls


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x + x

    @staticmethod
    def backward(ctx, grad):
        return grad + grad


def test_python_calls():
    def inner():
        return max(1, 2)  # a function of C

    def work():
        inner()
        return [inner() for _ in range(3)]  # a list comprehension is a call of its own before Python 3.12

    comprehension = sys.version_info < (3, 12)
    assert counting.python_calls(work) == (4 + comprehension, [2, 2, 2])
    assert counting.python_calls(lambda: None) == (0, None)
    assert gc.isenabled()
    assert sys.getprofile() is None


def test_python_calls_are_counted_in_the_backward_pass_too():
    y = Doubled.apply(torch.ones(2, requires_grad=True)).sum()
    plain = torch.ones(2, requires_grad=True).sum()
    with_function, without = (counting.python_calls(loss.backward)[0] for loss in (y, plain))
    assert with_function > without


def test_an_error_ends_the_profile():
    def work():
        raise ValueError('no')

    with pytest.raises(ValueError, match='no'):
        counting.python_calls(work)
    assert sys.getprofile() is None
    assert gc.isenabled()


def test_operator_calls():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    # Convolution, batch norm and its counter, ReLU: each calls operators itself.
    number, output = counting.operator_calls(lambda: model(x))
    assert number == 4
    assert output.shape == (2, 4, 6, 6)
    assert counting.operator_calls(lambda: Doubled.apply(x))[0] == 1
    assert counting.operator_calls(lambda: x.detach())[0] == 1


def test_operators_of_autograds_nodes_count():
    x = torch.ones(3, requires_grad=True)
    y, grad = x.exp(), torch.ones(3)
    # exp's node multiplies, and what a leaf is given is detached.
    number, _ = counting.operator_calls(lambda: y.backward(grad))
    assert number == 2


def test_calls_of_resnext50():
    """The exact figures of timm's network: 53 convolutions and norms, 49 ReLUs, 16 sums, 2 poolings, 2 for the head."""
    settings = Settings(batch_size=2, size=32)
    images = settings.images()
    model = Variant.parse('resnext50_32x4d').build()
    model.eval()
    assert count_calls(model, 'infer', images, settings, counting.operator_calls) == 2 * 53 + 49 + 16 + 2 + 2
    again = {count_calls(model, 'infer', images, settings, counting.python_calls) for _ in range(2)}
    assert len(again) == 1
    assert 1000 < again.pop() < 2000
    model.train()
    training = {count_calls(model, 'train', images, settings, counting.python_calls) for _ in range(2)}
    assert len(training) == 1
    assert all(parameter.grad is None for parameter in model.parameters())


# CUDA, without a GPU


def event(name, parent=None, device=DeviceType.CUDA, microseconds=0.0, annotation=False):
    return SimpleNamespace(
        name=name, cpu_parent=parent, device_type=device, device_time=microseconds, is_user_annotation=annotation
    )


def test_count_kernels():
    events = [
        event('aten::conv2d', device=DeviceType.CPU, microseconds=9),
        event('cudaLaunchKernel', device=DeviceType.CPU),
        event('void cudnn::kernel<float>', microseconds=30),
        event('_pool_kernel', microseconds=12),
        event('_pool_kernel', microseconds=8),
        event('Memcpy HtoD (Pinned -> Device)', microseconds=100),
        event('Memset (Device)', microseconds=100),
        event('Optimizer.step#SGD.step', microseconds=100, annotation=True),
    ]
    assert counting.count_kernels(events) == (3, pytest.approx(50e-6))


@pytest.fixture
def cuda(monkeypatch):
    """The parts of torch.cuda for a capture: ``log`` says what was called, ``error`` and ``ending`` are raised."""
    cuda = SimpleNamespace(log=[], error=None, ending=None)

    class Stream(str):
        def wait_stream(self, other):
            cuda.log.append(f'{self} waits for {other}')

    @contextlib.contextmanager
    def graph(of):
        cuda.log.append('begin')
        try:
            yield
            if cuda.error is not None:
                raise cuda.error
        finally:
            if cuda.ending is not None:
                raise cuda.ending
        cuda.log.append('end')

    def replay():
        cuda.log.append('replay')

    for name, value in {
        'CUDAGraph': lambda: SimpleNamespace(replay=replay),
        'Stream': lambda: Stream('side'),
        'current_stream': lambda: Stream('main'),
        'set_stream': lambda stream: cuda.log.append(f'back on {stream}'),
        'stream': lambda stream: contextlib.nullcontext(),
        'synchronize': lambda: cuda.log.append('synchronize'),
        'graph': graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return cuda


def test_graph_seconds(cuda):
    def timer(work, iterations):
        for _ in range(iterations):
            work()
        return 0.5 * iterations

    assert counting.graph_seconds(lambda: cuda.log.append('step'), timer) == 0.5
    # A step on the side stream, as CUDA wants it, then the capture, then replays, the first of them not timed.
    assert cuda.log == [
        'side waits for main',
        'step',
        'main waits for side',
        'begin',
        'step',
        'end',
        *['replay'] * (1 + counting.REPLAYS),
    ]


def test_a_capture_that_fails_says_why(cuda):
    cuda.error = RuntimeError('CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors might')
    cuda.ending = RuntimeError('CUDA error: operation failed due to a previous error during capture')
    with pytest.raises(counting.CaptureError, match=r'^CUDA error: operation not permitted when stream is capturing$'):
        counting.graph_seconds(lambda: None, None)
    assert cuda.log[-2:] == ['back on main', 'synchronize']


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu_counts():
    x = torch.ones(8, device='cuda')
    number, seconds = counting.kernels(lambda: x.add_(1).mul_(2))
    assert number == 2
    assert 0 < seconds < 1e-3

    def timer(work, iterations):
        for _ in range(iterations):
            work()
        return 1.0

    assert counting.graph_seconds(lambda: x.add_(1), timer) == 1 / counting.REPLAYS
    with pytest.raises(counting.CaptureError):
        counting.graph_seconds(lambda: x.sum().item(), timer)
    assert x.add(1).sum().isfinite()  # the stream is in order again


# Bytes


class Shared(nn.Module):
    """What autograd keeps, by hand: the input, the ReLU's output once for its two readers, and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4, bias=False), nn.Linear(4, 5, bias=False)
        self.register_buffer('scale', torch.full((4,), 2.0))

    def forward(self, x):
        hidden = self.first(x.flatten(1)).relu() * self.scale.sqrt().detach()
        torch.exp(hidden)  # keeps its output, but its graph is gone before the forward pass ends
        return self.second(hidden)


def test_saved_bytes_of_a_small_network():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5))
    images = torch.randn(2, 3, 8, 8)
    # The images, the convolution's output for the norm, the ReLU's output, which is also the linear layer's input,
    # and the norm's mean and inverse deviation.
    expected = 4 * (2 * 3 * 64 + 2 * 4 * 64 + 2 * 4 * 64 + 4 + 4)
    assert counting.saved_bytes(model, images) == expected
    # As views of a larger batch the images keep all of its storage.
    assert counting.saved_bytes(model, torch.randn(6, 3, 8, 8)[2:4]) == expected + 4 * 4 * 3 * 64


def test_saved_bytes_are_those_at_the_end_of_the_forward_pass():
    # The images, the ReLU's output, the scale's root, and the product, which the last layer reads.
    assert counting.saved_bytes(Shared(), torch.randn(3, 6, 1, 1)) == 4 * (3 * 6 + 3 * 4 + 4 + 3 * 4)


def test_saved_bytes_per_image():
    settings = Settings(size=8, memory_format='contiguous')
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    # The image, five log-probabilities, and the label, an int64.
    assert saved_mib_per_image(model, settings) * 2**20 == 4 * 192 + 4 * 5 + 8
    # bfloat16's copies of the image and of the weights are kept; only the former grows with the batch.
    settings = Settings(size=8, memory_format='contiguous', dtype='bfloat16')
    assert saved_mib_per_image(model, settings) * 2**20 == 2 * 192 + 4 * 5 + 8


def test_sknet50_keeps_as_little_as_the_set_asks_for():
    # This figure needs no quiet machine, and the ratios hardly depend on the size.
    (figure,) = [figure for figure in SETS['standard'].figures if figure.quantity == 'saved_mib']
    saved = {
        model: saved_mib_per_image(Variant.parse(model).build().train(), Settings(size=64)) for model in figure.models()
    }
    for model, goal in figure.against:
        assert saved['sknet50'] / saved[model] <= goal
    assert saved['skresnext50_32x4d'] / saved['resnext50_32x4d'] == pytest.approx(1.5, abs=0.01)
