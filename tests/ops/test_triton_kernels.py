"""The operators of ``custom_ops`` and their Triton kernels.

``TestNumbers`` compares them with the equations in float64 torch. Here it runs on plain torch, or on a GPU where there
is one; ``test_numbers_in_tritons_interpreter`` runs it again in a process where the kernels themselves run on the CPU.
"""

import logging
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from sk_plugins.ops import custom_ops

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
FORMATS = [torch.contiguous_format, torch.channels_last]
OPS = torch.ops.sk_plugins
BRANCHES = [1, 2, 3, 4]
# Of the largest element, or of 1 where that is less: what was measured is below a third of these.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


class Case:
    """M maps, their BatchNorms' parameters and statistics and an attention layer, all leaves, with a gradient of V."""

    def __init__(self, num_branches, shape, dtype, memory_format=FORMATS[0], shared=False, training=True):
        generator = torch.Generator().manual_seed(num_branches)
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def draw(*size):
            return torch.randn(size, generator=generator, dtype=torch.float64).to(DEVICE)

        channels = shape[1]
        self.ys = [
            (draw(*shape) * (m + 1) + m).to(dtype).contiguous(memory_format=memory_format) for m in range(num_branches)
        ]
        self.weight = (1 + 0.3 * draw(num_branches, channels)).to(wide)
        self.bias = (0.5 * draw(num_branches, channels)).to(wide)
        self.matrix = (draw(num_branches * (1 if shared else channels), channels) / channels).to(wide)
        self.statistics = None
        if not training:
            self.statistics = (
                draw(num_branches, channels).to(wide),
                (0.5 + draw(num_branches, channels).abs()).to(wide),
            )
        self.grad = draw(*shape).to(dtype).contiguous(memory_format=memory_format)
        for leaf in self.leaves():
            leaf.requires_grad_()

    def leaves(self):
        return [*self.ys, self.weight, self.bias, self.matrix]

    def exact(self):
        """The same values in float64."""
        case = object.__new__(Case)
        *case.ys, case.weight, case.bias, case.matrix = [t.detach().double().requires_grad_() for t in self.leaves()]
        case.statistics = self.statistics and [t.double() for t in self.statistics]
        case.grad = self.grad.double()
        return case

    def forward(self):
        """V and s by the operators."""
        pooled = custom_ops.pool(self.ys, self.weight, self.bias, *(self.statistics or ()))
        attention = attend(pooled.s, self.matrix, len(self.ys))
        return custom_ops.select(self.ys, self.weight, self.bias, pooled, attention), pooled.s

    def reference(self):
        """V and s by the equations."""
        maps = []
        for m, y in enumerate(self.ys):
            if self.statistics is None:
                var, mean = y.var((0, 2, 3), correction=0), y.mean((0, 2, 3))
            else:
                mean, var = (statistic[m] for statistic in self.statistics)
            mean, var, weight, bias = (t[:, None, None] for t in (mean, var, self.weight[m], self.bias[m]))
            maps.append(F.relu((y - mean) / torch.sqrt(var + 1e-5) * weight + bias))
        s = sum(maps).mean((2, 3))
        attention = attend(s, self.matrix, len(maps))
        return sum(u * attention[:, m, :, None, None] for m, u in enumerate(maps)), s


def attend(s, matrix, num_branches):
    return F.linear(s, matrix).unflatten(1, (num_branches, -1)).softmax(1)


def assert_equal_to(actual, expected, tolerance):
    scale = max(expected.abs().max().item(), 1.0) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double() / scale, expected / scale, rtol=0, atol=tolerance)


def check(case):
    """V, s and every gradient against float64, V's and the gradients' dtype and V's format against the maps'."""
    tolerance = TOLERANCE[case.ys[0].dtype]
    output, s = case.forward()
    grads = torch.autograd.grad(output, case.leaves(), case.grad)
    exact = case.exact()
    expected, expected_s = exact.reference()
    assert output.dtype == case.ys[0].dtype
    assert output.shape == case.ys[0].shape
    assert_equal_to(output, expected, tolerance)
    assert s.dtype == case.weight.dtype
    assert_equal_to(s, expected_s, TOLERANCE[s.dtype])
    for leaf, grad, expected_grad in zip(
        case.leaves(), grads, torch.autograd.grad(expected, exact.leaves(), exact.grad)
    ):
        assert grad.dtype == leaf.dtype
        assert_equal_to(grad, expected_grad, tolerance)
    return output, grads


@pytest.fixture
def passes(monkeypatch):
    """How often each of the passes ran in Triton."""
    count = Counter()
    if custom_ops.available([torch.empty(1, 1, 1, 1, device=DEVICE)]):
        from sk_plugins.ops import triton_kernels

        def counted(name, function):
            def run(*args):
                count[name] += 1
                return function(*args)

            return run

        for name in ('batch_statistics', 'moments', 'select', 'input_grads'):
            monkeypatch.setattr(triton_kernels, name, counted(name, getattr(triton_kernels, name)))
    return count


class TestNumbers:
    @pytest.fixture(autouse=True)
    def _in_triton_where_it_runs(self, passes, request):
        yield
        runs = custom_ops.available([torch.empty(1, 1, 1, 1, device=DEVICE)])
        assert custom_ops._failure is None
        if runs and 'float64' not in request.node.name and 'empty' not in request.node.name:
            assert passes['moments'] == 2 * passes['select'] > 0
            assert passes['input_grads'] == passes['select']

    @pytest.mark.parametrize('training', [True, False])
    @pytest.mark.parametrize('memory_format', FORMATS)
    @pytest.mark.parametrize('num_branches', BRANCHES)
    def test_float64(self, num_branches, memory_format, training):
        for shared in (False, True):
            check(Case(num_branches, (3, 5, 4, 3), torch.float64, memory_format, shared, training))

    @pytest.mark.parametrize('training', [True, False])
    @pytest.mark.parametrize('memory_format', FORMATS)
    @pytest.mark.parametrize('num_branches', BRANCHES)
    def test_float32(self, num_branches, memory_format, training):
        shared = (num_branches % 2 == 0) == training  # each number of branches is met with both
        output, grads = check(Case(num_branches, (2, 5, 3, 3), torch.float32, memory_format, shared, training))
        for tensor in (output, *grads[:num_branches]):
            assert tensor.is_contiguous(memory_format=memory_format)

    @pytest.mark.parametrize('memory_format', FORMATS)
    @pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype, memory_format):
        check(Case(2, (2, 5, 3, 3), dtype, memory_format))

    @pytest.mark.parametrize('programs', [1, 1024])
    @pytest.mark.parametrize('memory_format', FORMATS)
    def test_maps_of_several_tiles(self, memory_format, programs, monkeypatch):
        # One program: it loops over the tiles of an image. Many: each writes partial sums.
        if custom_ops._INTERPRET:
            from sk_plugins.ops import triton_kernels

            monkeypatch.setattr(triton_kernels, '_PROGRAMS', programs)
            monkeypatch.setattr(triton_kernels, '_CHANNELS_LAST_BLOCK_C', 16)
            monkeypatch.setattr(triton_kernels, '_CONTIGUOUS_BLOCK_HW', 8)
            monkeypatch.setattr(triton_kernels, '_REDUCTION_TILE', 64)
            monkeypatch.setattr(triton_kernels, '_ELEMENTWISE_TILE', 128)
        check(Case(2, (2, 19, 7, 2), torch.float32, memory_format))

    @pytest.mark.parametrize(
        ('shape', 'training'),
        [((1, 3, 1, 1), False), ((3, 6, 1, 1), True), ((1, 4, 9, 3), True), ((2, 1, 3, 4), True), ((5, 7, 2, 1), True)],
    )
    def test_odd_shapes(self, shape, training):
        check(Case(2, shape, torch.float32, FORMATS[shape[0] % 2], training=training))

    @pytest.mark.parametrize('memory_format', FORMATS)
    def test_empty_batch(self, memory_format):
        for training in (True, False):
            case = Case(2, (0, 4, 5, 5), torch.float32, memory_format, training=training)
            output, s = case.forward()
            grads = torch.autograd.grad(output, case.leaves(), case.grad)
            assert output.shape == (0, 4, 5, 5)
            assert s.shape == (0, 4)
            for leaf, grad in zip(case.leaves(), grads):
                assert torch.equal(grad, torch.zeros_like(leaf))

    def test_strided_input(self):
        case = Case(2, (2, 6, 4, 6), torch.float32, torch.channels_last)
        wide = case.ys
        case.ys = [wide[0].detach()[:, ::2, :, 1:].requires_grad_(), wide[1].detach()[:, 1::2, :, :-1].requires_grad_()]
        case.weight, case.bias = (t.detach()[:, ::2].requires_grad_() for t in (case.weight, case.bias))
        case.matrix = case.matrix.detach()[::2, ::2].requires_grad_()
        case.grad = case.grad.transpose(2, 3)[:, :3, :5].contiguous().transpose(2, 3)
        output, _ = check(case)
        assert output.is_contiguous(memory_format=torch.channels_last)

    def test_statistics(self):
        # A mean far above the deviation, where a sum of squares would have lost the variance to rounding.
        case = Case(2, (3, 5, 6, 5), torch.float32, torch.channels_last)
        case.ys = [(y.detach() + 3000).requires_grad_() for y in case.ys]
        pooled = custom_ops.pool(case.ys, case.weight, case.bias)
        V = custom_ops.select(case.ys, case.weight, case.bias, pooled, attend(pooled.s, case.matrix, 2))  # noqa: N806
        V.sum().backward()  # so that this class's check of the passes holds here too
        exact = [y.detach().double() for y in case.ys]
        var = torch.stack([y.var((0, 2, 3), correction=0) for y in exact])
        # A mean in float32 is off by up to 1e-4 of these deviations; the sum of squares would be by tens of percent.
        torch.testing.assert_close(pooled.var.double(), var, rtol=1e-4, atol=0)
        torch.testing.assert_close(pooled.invstd.double(), (var + 1e-5).rsqrt(), rtol=1e-4, atol=0)
        mean = torch.stack([y.mean((0, 2, 3)) for y in exact])
        torch.testing.assert_close(pooled.mean.double(), mean, rtol=2e-7, atol=0)

    def test_pooled_sums_do_not_overflow(self):
        # The sum over the map is 1.5 million, float16 ends at 65504.
        case = Case(2, (1, 2, 5, 5), torch.float16, training=False)
        case.ys = [torch.full_like(y.detach(), 30000).requires_grad_() for y in case.ys]
        case.statistics = torch.zeros(2, 2, device=DEVICE), torch.ones(2, 2, device=DEVICE)
        case.weight, case.bias = (torch.full_like(t.detach(), v) for t, v in ((case.weight, 1), (case.bias, 0)))
        pooled = custom_ops.pool(case.ys, case.weight, case.bias, *case.statistics)
        attention = torch.full((1, 2, 2), 0.5, device=DEVICE)
        output = custom_ops.select(case.ys, case.weight, case.bias, pooled, attention)
        output.backward(case.grad)
        torch.testing.assert_close(pooled.s, torch.full_like(pooled.s, 60000), rtol=1e-5, atol=0)
        assert torch.equal(output, torch.full_like(output, 30000))

    def test_repeats_are_equal_to_the_bit(self):
        outcomes = []
        for _ in range(2):
            case = Case(2, (2, 5, 6, 5), torch.float32)
            output, _ = case.forward()
            outcomes.append([output, *torch.autograd.grad(output, case.leaves(), case.grad)])
        for first, second in zip(*outcomes):
            assert torch.equal(first, second)


@pytest.mark.skipif(not custom_ops._HAS_TRITON, reason='triton is not installed')
def test_numbers_in_tritons_interpreter():
    environment = {**os.environ, 'TRITON_INTERPRET': '1', 'CUDA_VISIBLE_DEVICES': ''}
    for name in [name for name in environment if name.startswith('PYTEST_')]:
        del environment[name]
    command = [
        sys.executable,
        '-m',
        'pytest',
        '-p',
        'no:cacheprovider',
        '-k',
        'not float64',
        f'{__file__}::TestNumbers',
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    summary = re.search(r'(\d+) passed, 16 deselected', result.stdout)
    assert summary, result.stdout[-2000:]
    assert int(summary[1]) == 35


class Compiler:
    """Compiles a kernel for an H100 in place of launching it, from the very arguments of the launch."""

    def __init__(self, kernel, compiled):
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid):
        def compile_kernel(*args, **options):
            self.compiled.append(self.kernel.warmup(*args, grid=grid, **options))

        return compile_kernel


class H100:
    """As much of Triton's driver as compiling takes, so that it needs no GPU."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget('cuda', 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def assert_no_spills(kernel, folder):
    import triton

    tool = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'  # of Triton's wheels
    if tool.exists():
        (folder / 'kernel.cubin').write_bytes(kernel.asm['cubin'])
        command = [tool, '-res-usage', folder / 'kernel.cubin']
        usage = subprocess.run(command, capture_output=True, text=True, check=True)
        assert re.search(r'STACK:0 .*LOCAL:0 ', usage.stdout + usage.stderr)


@pytest.mark.skipif(not custom_ops._HAS_TRITON or custom_ops._INTERPRET, reason='needs the compiler of triton')
@pytest.mark.parametrize(
    ('shape', 'dtype', 'memory_format', 'vector_loads'),
    [
        ((2, 128, 14, 14), torch.bfloat16, torch.channels_last, True),
        # Sizes and strides of one become constants, which the interpreter never sees.
        ((1, 1, 1, 1), torch.float32, torch.channels_last, False),
        ((3, 5, 7, 7), torch.float16, torch.contiguous_format, False),
    ],
)
def test_compiles_for_a_gpu(shape, dtype, memory_format, vector_loads, monkeypatch, tmp_path):
    from triton.runtime import driver

    from sk_plugins.ops import triton_kernels as kernels

    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    monkeypatch.setenv('TRITON_DEFAULT_FP_FUSION', '1')  # or Triton 3.9 warns that its default will change
    compiled = []
    for name in ('statistics', 'merge_statistics', 'moments', 'select', 'input_grads'):
        monkeypatch.setattr(kernels, f'_{name}_kernel', Compiler(getattr(kernels, f'_{name}_kernel'), compiled))
    batch, channels, _, _ = shape
    ys = [torch.zeros(shape, dtype=dtype).contiguous(memory_format=memory_format) for _ in range(2)]
    rows = [torch.zeros(2, channels) for _ in range(4)]
    attention, level, means = torch.zeros(batch, 2, channels), torch.zeros(batch, channels), torch.zeros(2, 2, channels)
    # Triton's own set_active cannot be undone on a machine without a GPU.
    monkeypatch.setattr(driver, '_active' if hasattr(driver, '_active') else 'active', H100())
    kernels.batch_statistics(ys, 1e-5)
    kernels.moments(ys, *rows, ys[0])
    kernels.select(ys, *rows, attention)
    kernels.input_grads(ys, *rows, ys[0], attention, level, means)
    assert len(compiled) == 5
    for kernel in compiled:
        assert kernel.asm['cubin'][:4] == b'\x7fELF'
        assert_no_spills(kernel, tmp_path)
    if vector_loads:  # 16 bytes at a time, which is what the memory's bandwidth takes
        for kernel in (compiled[0], *compiled[2:]):
            assert 'ld.global.v4.b32' in kernel.asm['ptx']
            assert not re.search(r'ld\.global\.b16', kernel.asm['ptx'])
        for kernel in compiled[3:]:
            assert 'st.global.v4.b32' in kernel.asm['ptx']


@pytest.fixture(scope='module')
def tensors():
    return Case(2, (3, 5, 4, 3), torch.float32, torch.channels_last)


def test_opcheck(tensors):
    ys, weight, bias = tensors.ys, tensors.weight, tensors.bias
    maps = [y.detach() for y in ys]
    mean, invstd = torch.zeros(2, 5, device=DEVICE), torch.ones(2, 5, device=DEVICE)
    rows = weight.detach(), bias.detach(), mean, invstd
    s, *carried = OPS.pool_branches(maps, *rows, True)
    carried = [tensor.requires_grad_() for tensor in carried]
    attention = torch.rand(3, 2, 5, device=DEVICE, requires_grad=True)
    opcheck(OPS.batch_statistics.default, (maps, 1e-5))
    opcheck(OPS.pool_branches.default, (ys, weight, bias, mean, invstd, True))
    opcheck(OPS.select_branches.default, (ys, weight, bias, mean, invstd, attention, *carried))
    opcheck(OPS.select_moments.default, (maps, *rows, tensors.grad))
    opcheck(OPS.input_grads.default, (maps, *rows, tensors.grad, attention.detach(), s, None))


def test_compile():
    def function(ys, weight, bias, matrix):
        assert custom_ops.available(ys) == (DEVICE == 'cuda')
        pooled = custom_ops.pool(ys, weight, bias)
        return custom_ops.select(ys, weight, bias, pooled, attend(pooled.s, matrix, 2)), pooled.var

    compiled = torch.compile(function, fullgraph=True, backend='aot_eager', dynamic=True)
    for batch in (3, 4):
        case = Case(2, (batch, 5, 4, 3), torch.float32, torch.channels_last)
        outcomes = []
        for run in (compiled, function):
            output, var = run(case.ys, case.weight, case.bias, case.matrix)
            assert output.is_contiguous(memory_format=torch.channels_last)
            outcomes.append([output, var, *torch.autograd.grad(output, case.leaves(), case.grad)])
        torch.testing.assert_close(*outcomes, rtol=1e-6, atol=1e-6)


class Selection(torch.nn.Module):
    def __init__(self, case):
        super().__init__()
        for name in ('weight', 'bias', 'matrix'):
            self.register_buffer(name, getattr(case, name).detach())
        self.mean, self.var = case.statistics

    def forward(self, first, second):
        pooled = custom_ops.pool([first, second], self.weight, self.bias, self.mean, self.var)
        attention = attend(pooled.s, self.matrix, 2)
        return custom_ops.select([first, second], self.weight, self.bias, pooled, attention)


def test_export():
    case = Case(2, (2, 5, 4, 3), torch.float32, training=False)
    model = Selection(case)
    sizes = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(model, tuple(y.detach() for y in case.ys), dynamic_shapes=(sizes, sizes))
    operators = [str(node.target) for node in program.graph.nodes if 'sk_plugins' in str(node.target)]
    assert operators == ['sk_plugins.pool_branches.default', 'sk_plugins.select_branches.default']
    for shape in ((2, 5, 4, 3), (6, 5, 7, 9)):
        inputs = [torch.randn(shape, device=DEVICE) for _ in range(2)]
        torch.testing.assert_close(program.module()(*inputs), model(*inputs), rtol=0, atol=0)


@pytest.mark.parametrize('training', [True, False])
def test_backward_keeps_the_maps_and_nothing_else_of_their_size(training):
    case = Case(2, (4, 8, 16, 16), torch.float32, training=training)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, _ = case.forward()
    maps = sum(y.untyped_storage().nbytes() for y in case.ys)
    assert maps == 2 * 4 * 8 * 256 * 4
    assert maps < sum(kept.values()) < 1.1 * maps
    assert all(y.untyped_storage().data_ptr() in kept for y in case.ys)
    assert output.untyped_storage().data_ptr() not in kept


def test_gradients_of_parts():
    case = Case(2, (3, 5, 4, 3), torch.float64)
    exact = case.exact()
    _, s = case.forward()
    _, expected = exact.reference()
    weight = torch.linspace(-1, 1, 15, dtype=torch.float64, device=DEVICE).view(3, 5)
    leaves, exact_leaves = case.leaves()[:-1], exact.leaves()[:-1]
    # Pooling alone.
    grads = torch.autograd.grad(s, leaves, weight)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, exact_leaves, weight), rtol=1e-12, atol=1e-12)
    # Selection by an attention that nothing flows back through.
    attention = torch.rand(3, 2, 5, dtype=torch.float64, device=DEVICE).softmax(1)
    pooled = custom_ops.pool(case.ys, case.weight, case.bias)
    output = custom_ops.select(case.ys, case.weight, case.bias, pooled, attention)
    maps = [F.relu(F.batch_norm(y, None, None, w, b, True)) for y, w, b in zip(exact.ys, exact.weight, exact.bias)]
    expected = sum(u * attention[:, m, :, None, None] for m, u in enumerate(maps))
    grads = torch.autograd.grad(output, leaves, case.grad)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, exact_leaves, case.grad), rtol=1e-12, atol=1e-12)


def test_only_what_is_wanted_is_computed(tensors, monkeypatch):
    case = Case(2, (3, 5, 4, 3), torch.float64)
    output, _ = case.forward()
    expected = torch.autograd.grad(output, [case.weight, case.bias], case.grad)
    ran = []
    run = custom_ops._run
    monkeypatch.setattr(custom_ops, '_run', lambda name, *args: ran.append(name) or run(name, *args))
    case.ys = [y.detach() for y in case.ys]
    output, _ = case.forward()
    assert ran == ['batch_statistics', 'moments', 'select']
    grads = torch.autograd.grad(output, [case.weight, case.bias], case.grad)
    assert ran[3:] == ['moments']  # frozen convolutions: no gradient of a map is written
    torch.testing.assert_close(grads, expected, rtol=1e-12, atol=1e-12)


def test_second_derivatives_are_refused():
    case = Case(2, (3, 5, 4, 3), torch.float64)
    output, _ = case.forward()
    (grad,) = torch.autograd.grad(output, case.ys[:1], case.grad, create_graph=True)
    with pytest.raises(RuntimeError, match='no autograd formula was registered'):
        grad.sum().backward()


def test_why_not(monkeypatch):
    maps = [torch.empty(2, 4, 3, 3, device='meta')]
    if DEVICE == 'cpu' and not custom_ops._INTERPRET and custom_ops._HAS_TRITON:
        assert 'GPU' in custom_ops.why_not(maps)
        assert not custom_ops.available(maps)
    monkeypatch.setattr(custom_ops, '_INTERPRET', True)
    monkeypatch.setattr(custom_ops, '_HAS_TRITON', True)
    assert custom_ops.available(maps * 4)
    assert '5 branches' in custom_ops.why_not(maps * 5)
    assert 'torch.float64' in custom_ops.why_not([maps[0].double()])
    assert '2**31' in custom_ops.why_not([torch.empty(1, 2**11, 2**10, 2**10, device='meta')])
    monkeypatch.setattr(custom_ops, '_HAS_TRITON', False)
    assert 'not installed' in custom_ops.why_not(maps)


@pytest.mark.skipif(not custom_ops._HAS_TRITON or custom_ops._INTERPRET, reason='needs triton and its compiler')
def test_a_kernel_that_fails_gives_way_to_torch_and_says_so_once(monkeypatch, caplog):
    case = Case(2, (3, 5, 4, 3), torch.float32)
    case.ys = [y.detach().cpu().requires_grad_() for y in case.ys]
    for name in ('weight', 'bias', 'matrix', 'grad'):
        setattr(case, name, getattr(case, name).detach().cpu().requires_grad_(name != 'grad'))
    expected, _ = case.forward()
    # Take the CPU's tensors for a GPU's: compiled kernels cannot run on them.
    monkeypatch.setattr(custom_ops, '_INTERPRET', True)
    monkeypatch.setattr(custom_ops, '_failure', None)
    monkeypatch.setattr(custom_ops, '_logged', set())
    assert custom_ops.available(case.ys)
    with caplog.at_level(logging.WARNING, logger='sk_plugins'):
        for _ in range(2):
            output, _ = case.forward()
            output.backward(case.grad)
    assert torch.equal(output, expected)
    (record,) = caplog.records
    assert 'a Triton kernel failed (batch_statistics: ' in record.getMessage()
    assert custom_ops.why_not(case.ys) in record.getMessage()


def test_errors():
    maps = [torch.zeros(2, 4, 3, 3)] * 2
    rows = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r'branches=\[\] must hold at least one'):
        custom_ops.pool([], rows, rows)
    with pytest.raises(ValueError, match=r'one shape and dtype, got \(2, 4, 3, 3\) .*, \(2, 4, 3, 2\)'):
        custom_ops.pool([maps[0], torch.zeros(2, 4, 3, 2)], rows, rows)
    with pytest.raises(ValueError, match=r'one shape and dtype, got .* torch.float64'):
        custom_ops.pool([maps[0], maps[0].double()], rows, rows)
    with pytest.raises(ValueError, match='on one device, got cpu, meta'):
        custom_ops.pool([maps[0], maps[0].to('meta')], rows, rows)
    with pytest.raises(ValueError, match=r'bias of shape \(4,\) must be \(M, C\) = \(2, 4\)'):
        custom_ops.pool(maps, rows, rows[0])
    with pytest.raises(ValueError, match='mean and var go together'):
        custom_ops.pool(maps, rows, rows, mean=rows)
    with pytest.raises(ValueError, match=r'shape \(1, 4, 1, 1\) have a single value per channel'):
        custom_ops.pool([torch.zeros(1, 4, 1, 1)] * 2, rows, rows)
    pooled = custom_ops.pool(maps, rows, rows)
    with pytest.raises(ValueError, match=r'attention of shape \(2, 2, 3\) must be .* \(2, 2, 4\) or \(2, 2, 1\)'):
        custom_ops.select(maps, rows, rows, pooled, torch.zeros(2, 2, 3))


def test_importing_the_operators_does_not_import_triton():
    # timm imports triton where it is installed: a stand-in that cannot be imported shows that nothing here does.
    program = (
        'import sys; sys.modules["triton"] = None\n'
        'import importlib.util; importlib.util.find_spec = lambda name, package=None: None\n'
        'import types, pathlib, torch\n'
        'path = pathlib.Path(sys.argv[1])\n'
        'module = types.ModuleType("custom_ops"); sys.modules["custom_ops"] = module\n'
        'exec(compile(path.read_text(), str(path), "exec"), module.__dict__)\n'
        'ys = [torch.randn(2, 4, 3, 3)] * 2; ones = torch.ones(2, 4)\n'
        'pooled = module.pool(ys, ones, ones)\n'
        'print(module.why_not(ys), tuple(pooled.s.shape))\n'
    )
    result = subprocess.run(
        [sys.executable, '-c', program, custom_ops.__file__], capture_output=True, text=True, timeout=120
    )
    assert result.stdout.strip() == 'triton is not installed (2, 4)', result.stderr[-2000:]
