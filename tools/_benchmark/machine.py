"""What figures depend on besides the settings: hardware, versions, the date, and how memory is freed."""

import contextlib
import ctypes
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import Any

import timm
import torch

import sk_plugins

_keeps_freed_memory = False


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, as torch's allocator does on GPUs; other C libraries are left as they are.

    Otherwise glibc hands the top of the heap back to the system, and every step gets it back page by page. That took
    up to a quarter of a training step. It is not the same for all models: the heap keeps its top where a model's
    parameters lie above another's maps.
    """
    global _keeps_freed_memory
    trim_threshold, mmap_max = -1, -4  # glibc's malloc.h
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None) if sys.platform == 'linux' else None
    _keeps_freed_memory = mallopt is not None and bool(mallopt(trim_threshold, -1) and mallopt(mmap_max, 0))


def describe_machine(device: str) -> dict[str, Any]:
    """The machine and its versions, ready for JSON; ``device`` is 'cpu' or 'cuda'."""
    machine = {
        'date': datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
        'cpu': _cpu_model(),
        'cpu_capability': torch.backends.cpu.get_cpu_capability(),
        'cores': os.cpu_count(),
        'threads': torch.get_num_threads(),
        'keeps_freed_memory': _keeps_freed_memory,
        'load_average': round(os.getloadavg()[0], 2) if hasattr(os, 'getloadavg') else None,
        'gpu': None,
        'system': f'{platform.system()} {platform.machine()}',
        'python': platform.python_version(),
        'sk_plugins': sk_plugins.__version__,
        'torch': torch.__version__,
        'timm': timm.__version__,
        'torchvision': None,
    }
    if importlib.util.find_spec('torchvision') is not None:
        machine['torchvision'] = importlib.metadata.version('torchvision')
    if device == 'cuda':
        properties = torch.cuda.get_device_properties(0)
        machine['gpu'] = f'{properties.name}, {properties.total_memory / 2**30:.0f} GiB'
        machine['cuda'], machine['cudnn'] = torch.version.cuda, torch.backends.cudnn.version()
    return machine


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()
