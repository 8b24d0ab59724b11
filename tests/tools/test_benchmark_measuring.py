"""_benchmark.measuring: a clock of our own, steps as they should be, and the host's part."""

import contextlib
import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from _benchmark import counting, measuring
from _benchmark.measuring import Result, Task
from _benchmark.models import Variant
from _benchmark.settings import Run, Settings
from helpers.tolerances import tolerance
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

TINY = 'sknet26[layers=[1,1,1,1],cardinality=4,base_width=8,num_classes=10]'
TINY_PLAIN = 'resnet18[layers=[1,1,1,1],channels=[8,8,16,16],num_classes=10]'
SMALL = Settings(batch_size=2, size=32, repeats=3, threads=1)


@pytest.fixture
def clock(monkeypatch):
    """A CPU timer that runs a step once and then says what ``clock.seconds`` has next, by default 0.25 s a step."""
    clock = SimpleNamespace(seconds=[])

    def timer(step, iterations):
        step()
        return clock.seconds.pop(0) if clock.seconds else 0.25 * iterations

    monkeypatch.setattr(measuring, 'cpu_timer', timer)
    return clock


# Time


def test_repeats_are_interleaved():
    calls = []

    def timer(step, iterations):
        calls.append((step, iterations))
        return {'A': 0.125, 'B': 2.0, 'C': 1e-6}[step] * iterations

    tasks = [Task(Result(Run('infer'), name), None, name) for name in 'ABC']
    samples = measuring.interleave(tasks, 3, timer, min_seconds=0.5)
    # One round to see how long each takes, then A B C A B C A B C, each for half a second but no more than 100 times.
    assert calls == [('A', 1), ('B', 1), ('C', 1)] + 3 * [('A', 4), ('B', 1), ('C', 100)]
    assert samples == [[0.125] * 3, [2.0] * 3, [pytest.approx(1e-6)] * 3]


def test_cpu_timer_runs_all_iterations(monkeypatch):
    now = iter([10.0, 17.5])
    monkeypatch.setattr(measuring.time, 'perf_counter', lambda: next(now))
    ran = []
    assert measuring.cpu_timer(lambda: ran.append(1), 5) == 7.5
    assert len(ran) == 5


def test_host_timer_leaves_the_gpus_time_out(monkeypatch):
    """The clock is stopped before the GPU is waited for, and started when it is idle."""
    clock = SimpleNamespace(now=0.0, queued=0.0)

    def synchronize():
        clock.now += clock.queued
        clock.queued = 0.0

    def step():
        clock.now += 2.0  # of Python
        clock.queued += 5.0  # of kernels

    monkeypatch.setattr(torch.cuda, 'synchronize', synchronize)
    monkeypatch.setattr(measuring.time, 'perf_counter', lambda: clock.now)
    assert measuring.host_timer(step, 3) == 6.0
    assert clock.now == 21.0


def test_infer_step():
    seen = []
    model = nn.Linear(3, 2)
    model.register_forward_hook(lambda module, inputs, output: seen.append(output))
    measuring.infer_step(model, torch.ones(1, 3), Settings())()
    measuring.infer_step(model, torch.ones(1, 3), Settings(dtype='bfloat16'))()
    assert [output.dtype for output in seen] == [torch.float32, torch.bfloat16]
    assert all(output.is_inference() for output in seen)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_train_step_is_a_step_of_sgd(dtype):
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    reference = copy.deepcopy(model)
    images = torch.randn(4, 6)
    before = model.weight.detach().clone()
    step = measuring.train_step(model, images, Settings(dtype=dtype))
    optimizer = torch.optim.SGD(reference.parameters(), lr=1e-5, momentum=0.9, weight_decay=1e-4)
    for _ in range(2):
        step()
        nn.functional.cross_entropy(reference(images), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = (model.weight - before).abs().max()
    assert moved > 0
    # Sums of six products and four images round in the low precision, and so does what is added to the weight.
    explained = (
        tolerance(getattr(torch, dtype), length=10) * moved + tolerance(torch.float32) * model.weight.abs().max()
    )
    assert (model.weight - reference.weight).abs().max() <= explained
    assert model.weight.grad is None


def test_residual_branches_are_woken():
    model = Variant.parse(TINY).build()
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    asleep = [norm for norm in norms if not norm.weight.any()]
    measuring._wake_residual_branches(model)
    assert all(norm.weight.eq(0.2 if norm in asleep else 1).all() for norm in norms)
    plain = Variant.parse(TINY_PLAIN).build()  # timm's start at zero
    assert not plain.layer1[0].bn2.weight.any()
    measuring._wake_residual_branches(plain)
    assert plain.layer1[0].bn2.weight.eq(0.2).all()


def test_measure(clock, monkeypatch):
    built = []
    monkeypatch.setattr(measuring, 'infer_step', lambda model, *_: built.append(model) or (lambda: None))
    monkeypatch.setattr(measuring, 'count', lambda *_: None)
    clock.seconds = [0.1, 0.2, 0.5, *[1.0, 2.0, 4.0] * 3]
    labels = [TINY, f'{TINY}:fuse', f'{TINY}:compile']
    results = measuring.measure([Variant.parse(label) for label in labels], Run('infer'), SMALL)
    assert [result.model for result in results] == labels
    # 5, 3 and 1 iterations last half a second.
    assert [result.seconds for result in results] == pytest.approx([1 / 5, 2 / 3, 4])
    assert all(result.saved_mib is None and result.peak_mib is None for result in results)
    plain, fused, compiled = built
    assert any(isinstance(module, _BatchNorm) for module in plain.modules())
    assert not any(isinstance(module, _BatchNorm) for module in fused.modules())
    assert isinstance(compiled, torch._dynamo.eval_frame.OptimizedModule)
    for model in built:
        assert not model.training
        assert model.conv1.weight.is_contiguous(memory_format=torch.channels_last)


# The host's part


@pytest.fixture
def stubs(monkeypatch):
    """In the place of sk_plugins.ops.stubbed_launches: whether we are ``within``, and how often it was ``entered``."""
    stubs = SimpleNamespace(within=False, entered=0)

    @contextlib.contextmanager
    def stubbed_launches():
        assert not stubs.within
        stubs.within, stubs.entered = True, stubs.entered + 1
        yield
        stubs.within = False

    monkeypatch.setattr(measuring.ops, 'stubbed_launches', stubbed_launches)
    monkeypatch.setattr(measuring.gpu, 'HAS_TRITON', True)
    return stubs


def test_steps_with_stubbed_launches_and_no_others_run_within(stubs, monkeypatch):
    seen = []
    monkeypatch.setattr(measuring, 'infer_step', lambda *_: lambda: seen.append(stubs.within))
    monkeypatch.setattr(measuring, 'count_calls', lambda *_: 7 if stubs.within else 5)
    settings = Settings(batch_size=2, size=32, repeats=3, threads=1, min_seconds=0)
    variants = [Variant.parse(TINY), Variant.parse(f'{TINY}:stub')]
    ours, stubbed = measuring.measure(variants, Run('infer'), settings)
    # Three steps to get warm each, then one in turn that is left out, and three that are timed.
    assert seen == [False] * 3 + [True] * 3 + [False, True] * 4
    assert (ours.python_calls, ours.operator_calls) == (5, 5)
    assert (stubbed.python_calls, stubbed.operator_calls) == (7, 7)
    assert stubbed.model == f'{TINY}:stub'
    assert stubs.entered == 1 + 4 + 1  # getting warm, timing, counting


def test_no_stubbed_launches(monkeypatch):
    monkeypatch.setattr(measuring.gpu, 'HAS_TRITON', False)
    [result] = measuring.measure([Variant.parse(f'{TINY}:stub')], Run('infer'), SMALL)
    assert result == Result(Run('infer'), f'{TINY}:stub', unavailable='triton is not installed')
    assert result.seconds is None


def test_ways():
    ours, theirs = (Variant.parse(text).build() for text in (TINY, TINY_PLAIN))
    ours(torch.zeros(2, 3, 32, 32))
    assert measuring.ways(ours) == {'recompute': 4}
    assert measuring.ways(theirs) is None


@pytest.mark.parametrize('mode', ['infer', 'train'])
def test_counts_of_a_model(mode, clock):
    variant, settings = Variant.parse(TINY_PLAIN), replace(SMALL, repeats=1)
    [once], [again], [large] = (
        measuring.measure([variant], Run(mode, size=size), settings) for size in (None, None, 64)
    )
    assert once.python_calls == again.python_calls == large.python_calls > 50
    assert once.operator_calls == again.operator_calls > 30
    assert once.launches is once.graph_seconds is once.host_seconds is None
    assert once.first_step_seconds > 0


def test_a_loss_is_a_model_too(clock):
    """benchmark_detection.py measures modules that return their loss."""

    class Loss(nn.Sequential):
        def forward(self, images):
            return super().forward(images).mean()

    variant = SimpleNamespace(
        label='loss', fuse=False, compile=False, stub=False, build=lambda: Loss(nn.Conv2d(3, 1, 1))
    )
    [result] = measuring.measure([variant], Run('train'), replace(SMALL, repeats=1))
    assert result.samples == [0.25]
    assert result.operator_calls > 3


@pytest.mark.parametrize('fails', [False, True])
def test_counts_on_a_gpu(monkeypatch, fails):
    def graph_seconds(step, timer):
        assert timer is measuring.cuda_timer
        if fails:
            raise counting.CaptureError('operation not permitted')
        return 0.25

    monkeypatch.setattr(counting, 'kernels', lambda step: (17, 0.5))
    monkeypatch.setattr(counting, 'graph_seconds', graph_seconds)
    monkeypatch.setattr(measuring, 'count_calls', lambda *_: 3)
    result = Result(Run('infer'), 'model')
    measuring.count(Task(result, None, None), None, Settings(device='cuda'))
    assert (result.launches, result.kernel_seconds) == (17, 0.5)
    assert (result.graph_seconds, result.graph_error) == ((None, 'operation not permitted') if fails else (0.25, None))


def test_environment_is_put_back(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)
    threads = torch.get_num_threads()
    limit = torch._dynamo.config.recompile_limit
    with measuring._environment(Settings(threads=threads + 1)):
        assert torch.get_num_threads() == threads + 1
        assert torch.backends.cudnn.benchmark
        # Past the limit torch would time the eager model in the compiled one's place.
        assert torch._dynamo.config.recompile_limit == 64
        assert torch._dynamo.config.fail_on_recompile_limit_hit
    assert torch.get_num_threads() == threads
    assert not torch.backends.cudnn.benchmark
    assert torch._dynamo.config.recompile_limit == limit


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_gpu():
    settings = Settings(device='cuda', dtype='bfloat16', batch_size=8, size=64, repeats=2, min_seconds=0)
    once, again = measuring.measure([Variant.parse(TINY), Variant.parse(TINY_PLAIN)], Run('train'), settings)
    [alone] = measuring.measure([Variant.parse(TINY_PLAIN)], Run('train'), settings)
    assert once.seconds > 0
    # What the first model holds isn't counted as the second's.
    assert again.peak_mib == pytest.approx(alone.peak_mib, rel=0.05)
    assert once.peak_mib > again.peak_mib > again.saved_mib * 8
    assert once.launches > again.launches > 50
    assert 0 < again.graph_seconds < 0.1
    assert 0 < again.host_seconds < 1
