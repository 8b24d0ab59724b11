"""The kernels compile for an H100, with wide loads and no spilled registers, and a network needs few variants of them.

None of it needs a GPU: Triton's compiler takes the arguments of the launches that a real network makes.
"""

import contextlib
import re
import subprocess
from pathlib import Path

import pytest
import torch

from sk_plugins.ops import gpu, stubbed_launches

triton = pytest.importorskip('triton')
pytestmark = pytest.mark.skipif(gpu.INTERPRETS, reason='needs the compiler of triton')

HALVES = [torch.bfloat16, torch.float16]


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

    A variant is what Triton compiles: a kernel, the constants, dtypes and divisible arguments of a launch.
    """
    from triton.runtime import driver

    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    monkeypatch.setenv('TRITON_DEFAULT_FP_FUSION', '1')  # or Triton 3.9 warns that its default will change
    # Triton's own set_active cannot be undone on a machine without a GPU.
    monkeypatch.setattr(driver, '_active' if hasattr(driver, '_active') else 'active', H100())

    @contextlib.contextmanager
    def collect():
        found = {}
        with stubbed_launches(), monkeypatch.context() as patch:

            def launch(kernel, grid, *args, **meta):
                def say(key, **_):
                    found.setdefault((kernel.fn.__name__, key), (kernel, grid, args, meta))
                    return True  # not compiled

                with triton.knobs.runtime.scope():
                    triton.knobs.runtime.jit_cache_hook = say
                    kernel.warmup(*args, grid=grid, **meta)

            patch.setattr(gpu.kernels, 'launch', launch)
            yield found

    return collect


def run(model, x, training):
    model.train(training)
    with torch.set_grad_enabled(training):
        output = model(x)
    if training:
        output.sum().backward()


def images(batch=2, size=224):
    return torch.zeros(batch, 3, size, size).contiguous(memory_format=torch.channels_last)


def autocast(dtype):
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast('cpu', dtype)


def assert_no_spills(kernel, folder):
    tool = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'  # of Triton's wheels
    if tool.exists():
        (folder / 'kernel.cubin').write_bytes(kernel.asm['cubin'])
        command = [tool, '-res-usage', folder / 'kernel.cubin']
        usage = subprocess.run(command, capture_output=True, text=True, check=True)
        assert re.search(r'STACK:0 .*LOCAL:0 ', usage.stdout + usage.stderr), usage.stdout


def compile_all(found, folder):
    """Every variant's kernel, by the kernel's name."""
    compiled = []
    for (name, _), (kernel, grid, args, meta) in found.items():
        kernel = kernel.warmup(*args, grid=grid, **meta)
        assert kernel.asm['cubin'][:4] == b'\x7fELF'
        assert_no_spills(kernel, folder)
        compiled.append((name, kernel))
    return compiled
