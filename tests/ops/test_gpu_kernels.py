"""The kernels compile for an H100, with wide loads and no spilled registers, and a network needs few variants of them.

None of it needs a GPU: Triton's compiler takes the arguments of the launches that a real network makes.
"""

import contextlib
import gc
import math
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch

from sk_plugins.ops import gpu, stubbed_launches

triton = pytest.importorskip('triton')
gpu_launch = pytest.importorskip('sk_plugins.ops.gpu_launch')
pytestmark = [
    pytest.mark.skipif(gpu.INTERPRETS, reason='needs the compiler of triton'),
    pytest.mark.skipif(not hasattr(triton, 'knobs'), reason='hears of what is compiled through knobs, of triton 3.4'),
]

# Of training and inference: of the ends of a convolution, of a unit and of the stem, and for the rest one or two each.
VARIANTS = {
    '_statistics_kernel': 2,
    '_merge_statistics_kernel': 2,
    '_moments_kernel': 3,
    '_select_kernel': 2,
    '_input_grads_kernel': 1,
    '_weigh_moments_kernel': 1,
    '_norm_act_kernel': 7,
    '_norm_act_moments_kernel': 4,
    '_norm_act_grads_kernel': 4,
    '_norm_relu_rows_kernel': 2,
    '_norm_relu_rows_grads_kernel': 1,
}


class H100:
    """As much of Triton's driver as compiling takes, so that it needs no GPU."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget('cuda', 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def variants(monkeypatch, tmp_path):
    """A context that collects the distinct variants of the kernels that are launched in it, each with a launch of it.

    A variant is what Triton compiles: a kernel, the constants, dtypes and divisible arguments of a launch. Launches of
    one kind must be described alike, since they are not described again on a GPU.
    """
    from triton.runtime import driver

    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    monkeypatch.setenv('TRITON_DEFAULT_FP_FUSION', '1')  # or Triton 3.9 warns that its default will change
    # Triton's own set_active cannot be undone on a machine without a GPU.
    monkeypatch.setattr(driver, '_active' if hasattr(driver, '_active') else 'active', H100())
    gpu.load()
    for kernel in vars(gpu.kernels).values():
        if isinstance(kernel, triton.JITFunction):
            kernel.device_caches.clear()  # what another test compiled

    @contextlib.contextmanager
    def collect():
        found, descriptions = {}, {}
        with stubbed_launches(), monkeypatch.context() as patch:

            def launch(kernel, tensors, kind, describe):
                grid, pointers, numbers, meta = describe()
                description = grid, list(pointers), list(numbers), meta
                assert description == descriptions.setdefault((kernel.fn, kind), description)
                args = *(tensors[i] for i in pointers), *numbers

                def say(key, **_):
                    found.setdefault((kernel.fn.__name__, key), (kernel, grid, args, meta))
                    return True  # not compiled

                with triton.knobs.runtime.scope():
                    triton.knobs.runtime.jit_cache_hook = say
                    kernel.warmup(*args, grid=grid, **meta)

            patch.setattr(gpu.kernels, 'launch', launch)
            yield found

    return collect


class OneNumber(torch.autograd.Function):
    """In place of a convolution: a map that nobody computed, of one's shape, with gradients of zero."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, dilation, groups):
        ctx.save_for_backward(x, weight)
        sizes = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(x.shape[2:], padding, dilation, weight.shape[2:], stride)
        ]
        dtype = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else x.dtype
        out = x.new_empty((x.shape[0], weight.shape[0], *sizes), dtype=dtype)
        return out.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight), None, None, None, None, None


def run(model, x, training):
    model.train(training)
    with torch.set_grad_enabled(training):
        output = model(x)
    if training:
        output.sum().backward()


@pytest.fixture
def step(variants, monkeypatch):
    """The variants that a network's forward in inference takes, and a training step."""
    monkeypatch.setattr(torch, 'conv2d', OneNumber.apply)  # units' convolutions; the stem's is a module's

    def step(name, dtype=torch.bfloat16, modes=(False, True), size=224, memory_format=torch.channels_last):
        model = timm.create_model(name).to(memory_format=memory_format)
        x = torch.zeros(2, 3, size, size).contiguous(memory_format=memory_format)
        autocast = torch.autocast('cpu', dtype, enabled=dtype != torch.float32)
        with variants() as found, autocast:
            for training in modes:
                run(model, x, training)
        return found

    return step


def assert_no_spills(kernel, folder):
    tool = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'  # of Triton's wheels
    if tool.exists():
        (folder / 'kernel.cubin').write_bytes(kernel.asm['cubin'])
        command = [tool, '-res-usage', folder / 'kernel.cubin']
        usage = subprocess.run(command, capture_output=True, text=True, check=True)
        # Triton 3.6, torch 2.11's, gives one of them a frame of 16 bytes.
        assert re.search(r'STACK:(0|16) .*LOCAL:0 ', usage.stdout + usage.stderr), usage.stdout


def compile_all(found, folder, every=True):
    """Every variant compiled, or the first of each kernel: the kernel's name and what became of it."""
    compiled = []
    for (name, _), (kernel, grid, args, meta) in found.items():
        if not every and any(name == other for other, _ in compiled):
            continue
        kernel = kernel.warmup(*args, grid=grid, **meta)
        assert kernel.asm['cubin'][:4] == b'\x7fELF'
        assert_no_spills(kernel, folder)
        compiled.append((name, kernel))
    return compiled


# Kernels that read maps, and of those the ones that write maps.
WRITES = {'_select_kernel', '_input_grads_kernel', '_norm_act_kernel', '_norm_act_grads_kernel'}
READS = WRITES | {'_statistics_kernel', '_moments_kernel', '_norm_act_moments_kernel'}


@pytest.mark.parametrize(
    ('dtype', 'every'),
    [
        (torch.bfloat16, False),
        *(
            pytest.param(dtype, True, marks=pytest.mark.slow)
            for dtype in (torch.bfloat16, torch.float32, torch.float16)
        ),
    ],
)
def test_a_network_compiles_to_few_kernels_with_wide_loads_and_no_spills(dtype, every, step, tmp_path):
    """All that SKNet-50 takes at 224, in training and inference: 29."""
    found = step('sknet50', dtype)
    assert Counter(name for name, _ in found) == VARIANTS
    for name, kernel in compile_all(found, tmp_path, every):
        if name in READS:  # 16 bytes at a time, which is what the memory's bandwidth takes
            assert 'ld.global.v4.b32' in kernel.asm['ptx'], name
            assert not re.search(r'ld\.global\.b16', kernel.asm['ptx']), name
        if name in WRITES:
            assert 'st.global.v4.b32' in kernel.asm['ptx'], name


def test_inference_alone_takes_six_variants(step):
    found = step('sknet50', modes=[False])
    expected = {'_norm_act_kernel': 3, '_moments_kernel': 1, '_norm_relu_rows_kernel': 1, '_select_kernel': 1}
    assert Counter(name for name, _ in found) == expected


@pytest.mark.slow
def test_other_batches_and_sizes_take_no_more_variants(step):
    """The stages' maps differ in channels and size: neither makes a variant, as long as tiles are full."""
    first = step('sknet50')
    assert len(first) == sum(VARIANTS.values())
    assert not step('sknet50', size=288).keys() - first.keys()
    assert not step('sknet101').keys() - first.keys()


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(('num', 'shape'), [(4, (1, 1, 1, 1)), (3, (3, 5, 7, 7)), (2, (1, 64, 2**13, 2**13))])
def test_odd_and_huge_maps_compile(num, shape, memory_format, variants, tmp_path):
    """Sizes and strides of one become constants, which the interpreter never sees; 2**32 elements take 64 bits."""
    wide = math.prod(shape[1:]) >= 2**31
    ys = [torch.empty(shape, dtype=torch.float16, device='meta', memory_format=memory_format) for _ in range(num)]
    row = torch.empty(shape[1])
    norms = [row] * 4 * num, 1e-5, 'running'
    attention = torch.empty(shape[0], num, shape[1])
    with variants() as found:
        gpu.kernels.moments(ys, norms)
        gpu.kernels.moments(ys, norms, ys[0])
        gpu.kernels.select(ys, norms, attention)
        gpu.kernels.norm_act(ys[:1], ([row] * 4, 1e-5, 'running'), ys[0], True)
    assert len(found) == 4
    for name, (_, _, _, meta) in zip(found, found.values()):
        assert meta['WIDE'] == wide, name
    if shape[0] == 1 and memory_format == torch.channels_last:
        compile_all(found, tmp_path)


@pytest.fixture
def started(variants, monkeypatch):
    """What Triton's compiled kernels are started with on a GPU that is not there, and with it CPU tensors."""
    calls = []

    class Launcher:
        def __init__(self, src, metadata):
            pass

        def __call__(self, *args):
            calls.append(args)

    class Utils:
        def get_device_properties(self, device):
            return {'max_shared_mem': 2**17}

        def load_binary(self, name, *_):
            return 'module', name, 32, 0, 1024

        def unload_module(self, module):
            pass

    monkeypatch.setattr(H100, 'launcher_cls', Launcher, raising=False)
    monkeypatch.setattr(H100, 'utils', Utils(), raising=False)
    monkeypatch.setattr(torch.Tensor, 'get_device', lambda self: 0)
    monkeypatch.setattr(gpu_launch, '_launchers', {})
    yield calls
    gpu_launch._launchers.clear()
    for kernel in vars(gpu.kernels).values():
        if isinstance(kernel, triton.JITFunction):
            kernel.device_caches.clear()
    gc.collect()  # compiled kernels, while there is a driver to unload them


def kernel_arguments(call):
    """The grid, the stream, the kernel's name and its arguments, tensors as addresses; without hooks."""
    place, arguments = call[:5], call[9:]
    return *place, *(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments)


def aligned_maps(num, offset=0):
    """(2, 32, 4, 4) each, whose addresses are ``offset`` bytes beyond a multiple of 16."""
    flat = torch.zeros(num, 2 * 32 * 16 + 32)
    skipped = [(-row.data_ptr() % 16 + offset) // 4 for row in flat]
    return [row[at : at + 1024].view(2, 32, 4, 4) for row, at in zip(flat, skipped)]


def launch_of(maps, grid=(2,), eps=1e-5, channels=32):
    """A launch of BN, ReLU and nothing else by running statistics, of ten maps and rows and an output."""
    pointers, numbers = [*range(10), 0, 10], [eps, channels, 16, 32, 1, 1]
    constants = dict(RELU=True, HAS_SHORTCUT=False, NORM='running', M=1, BLOCK_HW=16, BLOCK_C=32, WIDE=False)
    constants['num_warps'] = 8
    kernel, tensors = gpu.kernels._norm_act_kernel, maps[:11]

    def by_triton():
        kernel[grid](*[tensors[i] for i in pointers], *numbers, **constants)

    def ours():
        kind = grid, eps, channels
        gpu_launch.launch(kernel, tensors, kind, lambda: (grid, pointers, numbers, constants))

    return by_triton, ours


def test_launches_of_a_kind_go_past_tritons_search(started, monkeypatch):
    """The compiled kernel is started as Triton itself starts it, with other addresses and another grid too."""
    kernel, maps = gpu.kernels._norm_act_kernel, aligned_maps(26)
    launches = [launch_of(maps), launch_of(maps[12:]), launch_of(maps, grid=(4,)), launch_of(maps, eps=1e-3)]
    launches.append(launch_of(maps, channels=24))
    searched = []
    warmup = type(kernel).warmup
    monkeypatch.setattr(type(kernel), 'warmup', lambda *a, **k: searched.append(1) or warmup(*a, **k))
    for by_triton, ours in [*launches, *launches]:
        by_triton()
        ours()
        expected, found = map(kernel_arguments, started)
        assert found == expected
        started.clear()
    assert len(searched) == len(gpu_launch._launchers) == 4  # by grid and numbers


def test_launches_differ_by_their_tensors_dtypes(started):
    for dtype in (torch.float32, torch.bfloat16):
        maps = [m.to(dtype) for m in aligned_maps(10)]
        by_triton, ours = launch_of([*maps, aligned_maps(1)[0]])
        by_triton()
        ours()
        expected, found = map(kernel_arguments, started)
        assert found == expected
        started.clear()
    assert len(gpu_launch._launchers) == 2


def test_unaligned_maps_are_left_to_triton(started):
    """Kernels are compiled for addresses that 16 divides: a map that is a part of another may begin elsewhere."""
    for offset, kept in ((0, 1), (4, 1)):
        launch_of(aligned_maps(12, offset))[1]()
        assert len(gpu_launch._launchers) == kept
    aligned, unaligned = started
    assert [type(call[9]) for call in started] == [int, torch.Tensor]
    assert aligned[4] == unaligned[4]  # one function's name; two binaries


def test_gpus_of_other_kinds_are_left_to_triton_and_asked_once(started, monkeypatch):
    from triton.backends.compiler import GPUTarget

    asked, counts = [], []

    def get_current_target(self):
        asked.append(1)
        return GPUTarget('hip', 'gfx942', 64)

    launch_of(aligned_maps(12))[0]()
    started.clear()
    monkeypatch.setattr(H100, 'get_current_target', get_current_target)
    for _ in range(3):
        launch_of(aligned_maps(12))[1]()
        counts.append(len(asked))
    assert [type(call[9]) for call in started] == [torch.Tensor] * 3
    assert counts[0] >= 1  # Triton 3.6 asks for itself when it loads a kernel
    assert counts == counts[:1] * 3


def test_the_launchers_kept_are_not_endless(started, monkeypatch):
    monkeypatch.setattr(gpu_launch, '_MOST_LAUNCHERS', 3)
    for size in range(1, 8):
        launch_of(aligned_maps(12), grid=(size,))[1]()
        assert len(gpu_launch._launchers) <= 3
    assert len(started) == 7
