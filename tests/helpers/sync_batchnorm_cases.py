"""Norms and layers in training, on a whole batch or on one process's share of it.

``python sync_batchnorm_cases.py FOLDER WORLD_SIZE`` forks so many processes. Each runs its share of all ``CASES`` with
synchronised norms, in a gloo group that meets in FOLDER, and saves the tensors there.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing import start_processes
from torch.utils.checkpoint import checkpoint

from sk_plugins.layers import SelectiveKernel
from sk_plugins.openmmlab.runtime.sync_batchnorm import SyncBatchNorm, synchronise

DEFAULTS = dict(shape=(7, 6, 4, 5), shares=(5, 2), mean=0.0, dtype='float64', training=True, layer=False, kwargs={})
CASES = {
    'even': dict(shape=(6, 4, 3, 5), shares=(3, 3)),
    'uneven': {},
    'nothing in one': dict(shares=(7, 0)),
    'one image each': dict(shape=(2, 8, 1, 1), shares=(1, 1)),
    'no pixels': dict(shape=(7, 6)),
    'channels last': dict(layout=torch.channels_last),
    'not affine': dict(kwargs=dict(affine=False)),
    'plain average': dict(kwargs=dict(momentum=None)),
    'no running statistics': dict(kwargs=dict(track_running_stats=False)),
    'evaluation': dict(training=False),
    'evaluation without running statistics': dict(training=False, kwargs=dict(track_running_stats=False)),
    'float32': dict(dtype='float32'),
    'bfloat16': dict(dtype='bfloat16'),
    'large mean': dict(shape=(7, 6, 16, 16), dtype='float32', mean=1e3),
    'one value': dict(shape=(1, 6, 1, 1), shares=(1, 0)),
    'layer': dict(layer=True, shape=(7, 16, 6, 6)),
    'layer, one image each': dict(layer=True, shape=(2, 16, 6, 6), shares=(1, 1)),
    'layer, recomputed': dict(layer=True, shape=(7, 16, 6, 6), checkpointed=True),
    'layer, three branches': dict(layer=True, shape=(7, 16, 6, 6), kwargs=dict(kernel_sizes=(3, 5, 7))),
}


def settings(name: str) -> dict:
    return {**DEFAULTS, **CASES[name]}


def make(name: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A module with plain norms, and for each of two steps the whole batch and the gradient of what comes out."""
    case = settings(name)
    generator = torch.Generator().manual_seed(0)
    dtype, (_, channels, *pixels) = getattr(torch, case['dtype']), case['shape']
    if case['layer']:
        module = SelectiveKernel(channels, groups=2, **case['kwargs'])
    else:
        module = (nn.BatchNorm2d if pixels else nn.BatchNorm1d)(channels, **case['kwargs'])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1))
    steps = []
    for _ in range(2):
        x, grad = (torch.randn(case['shape'], generator=generator, dtype=torch.float64) for _ in range(2))
        # Every image has a mean of its own, and so has every process.
        x += case['mean'] + torch.arange(len(x)).view(-1, *[1] * (x.dim() - 1))
        steps.append((x.to(dtype), grad.to(dtype)))
    return module.to(torch.promote_types(dtype, torch.float32)).train(case['training']), steps


def run(name: str, module: nn.Module, steps: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Outputs, gradients and buffers after the steps."""
    results = {}
    for i, (x, grad) in enumerate(steps):
        x = x.clone().requires_grad_()
        y = checkpoint(module, x, use_reentrant=False) if settings(name).get('checkpointed') else module(x)
        y.backward(grad)
        results.update({f'output {i}': y.detach(), f'gradient of input {i}': x.grad})
    results.update({f'gradient of {key}': parameter.grad for key, parameter in module.named_parameters()})
    return results | {key: buffer.clone() for key, buffer in module.named_buffers()}


def run_share(name: str, rank: int) -> dict[str, Tensor]:
    """The same with synchronised norms, on this process's images."""
    module, steps = make(name)
    module = synchronise(nn.SyncBatchNorm.convert_sync_batchnorm(module))
    kinds = {type(m) for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert kinds == {SyncBatchNorm}
    shares = settings(name)['shares']
    share = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
    layout = settings(name).get('layout', torch.contiguous_format)
    return run(name, module, [(x[share].contiguous(memory_format=layout), grad[share]) for x, grad in steps])


def main(rank: int, folder: str, world_size: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f'{folder}/store', world_size)
    dist.init_process_group('gloo', store=store, rank=rank, world_size=world_size)
    results = {}
    for name in CASES:
        try:
            results[name] = run_share(name, rank)
        except ValueError as error:
            results[name] = str(error)
    torch.save(results, Path(folder) / f'{rank}.pt')
    dist.destroy_process_group()


if __name__ == '__main__':
    processes = int(sys.argv[2])
    start_processes(main, (sys.argv[1], processes), processes, start_method='fork')
