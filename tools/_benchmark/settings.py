"""What the models of a run share: device, precision, batch and size."""

import contextlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
MEMORY_FORMATS = {'channels_last': torch.channels_last, 'contiguous': torch.contiguous_format}
MODES = {'infer': 'inference', 'train': 'training step'}


@dataclass(frozen=True)
class Settings:
    """What all models of a benchmark share. ``dtype`` other than float32 is that of autocast.

    ``min_seconds`` is how long a model runs per repeat at least: as many iterations as that takes.
    """

    device: str = 'cpu'
    dtype: str = 'float32'
    memory_format: str = 'channels_last'
    batch_size: int = 8
    size: int = 224
    repeats: int = 15
    threads: int | None = None
    min_seconds: float = 0.5

    def check(self, runs: bool = True) -> None:
        """Raises ValueError for what cannot be run, anywhere or, where it ``runs``, here."""
        for name in ('batch_size', 'size', 'repeats', 'threads'):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f'--{name.replace("_", "-")} {value}: must be at least 1')
        if runs and self.device == 'cuda' and not torch.cuda.is_available():
            raise ValueError('--device cuda: torch finds no CUDA device here (torch.cuda.is_available() is False)')

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device, DTYPES[self.dtype], enabled=self.dtype != 'float32')

    def images(self, count: int | None = None) -> Tensor:
        """A batch, (count, 3, size, size) of N(0, 1); ``batch_size`` images where ``count`` is None."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(count or self.batch_size, 3, self.size, self.size, generator=generator)
        return images.to(self.device, memory_format=MEMORY_FORMATS[self.memory_format])


@dataclass(frozen=True)
class Run:
    """Models timed in turn in one ``mode``, 'infer' or 'train'. What is None is as in the benchmark's settings."""

    mode: str
    batch_size: int | None = None
    size: int | None = None
    threads: int | None = None

    def settings(self, settings: Settings) -> Settings:
        own = {name: getattr(self, name) for name in ('batch_size', 'size', 'threads')}
        return replace(settings, **{name: value for name, value in own.items() if value is not None})

    @property
    def title(self) -> str:
        """'training step, batch 2, 32 x 32, 1 thread'."""
        parts = [MODES[self.mode]]
        if self.batch_size is not None:
            parts.append(f'batch {self.batch_size}')
        if self.size is not None:
            parts.append(f'{self.size} x {self.size}')
        if self.threads is not None:
            parts.append(f'{self.threads} thread{"s" * (self.threads != 1)}')
        return ', '.join(parts)


# Images so small that on a CPU a step's time is mostly Python's and the operators' own.
HOST = dict(batch_size=2, size=32, threads=1)
