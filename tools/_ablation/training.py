"""One run: a network trained with one seed, and tested."""

import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
import torch
import torch.nn.functional as F
from _benchmark.machine import describe_machine
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from sk_plugins.networks import SKResNet

from .data import Data, prepare
from .networks import build, cost
from .rows import SIZES, Row, Settings


def logits_of(model: nn.Module, images: Tensor, device: str, batch_size: int = 500) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(prepare(batch, device)).cpu() for batch in images.split(batch_size)])


def fit(
    model: nn.Module,
    epochs: Sequence[Callable[[], tuple[Tensor, Tensor]]],
    settings: Settings,
    device: str,
    watch: Callable[[int], None] | None = None,
) -> None:
    """Train a model on epochs of images and labels in their order, each drawn when it begins.

    ``watch`` is called with the number of steps that are done, after each.
    """
    # AdamW, since the attention starts near zero (N(0, 0.01)), where SGD's steps in a short training are small.
    optimizer = create_optimizer_v2(model, opt='adamw', lr=settings.learning_rate, weight_decay=settings.weight_decay)
    per_epoch = settings.train_images // settings.batch_size
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        settings.learning_rate,
        total_steps=len(epochs) * per_epoch,
        pct_start=0.2,
        cycle_momentum=False,
    )
    model.train()
    for epoch, draw in enumerate(epochs):
        images, labels = draw()
        for step in range(per_epoch):
            batch = slice(step * settings.batch_size, (step + 1) * settings.batch_size)
            loss = F.cross_entropy(model(prepare(images[batch], device)), labels[batch].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            if watch is not None:
                watch(epoch * per_epoch + step + 1)


def train(name: str, seed: int, device: str, data: Data) -> tuple[SKResNet, Row]:
    """Train a network, and test it: the model in eval mode, and its row of the results."""
    settings, start = data.settings, time.perf_counter()
    torch.manual_seed(seed)
    model = build(name).to(device, memory_format=torch.channels_last)
    fit(model, [functools.partial(data.train, seed, epoch) for epoch in range(settings.epochs)], settings, device)
    images, labels, scales = data.test()
    logits = logits_of(model.eval(), images, device)
    right = (logits.argmax(1) == labels).numpy()
    edges = np.linspace(*settings.scale, len(SIZES) + 1)[1:-1]
    thirds = np.digitize(scales, edges)
    machine = describe_machine('cuda' if device.startswith('cuda') else device)
    parameters, mflops = cost(name)
    row = {
        'network': name,
        'seed': seed,
        'top1': 100 * right.mean().item(),
        **{f'top1_{size}': 100 * right[thirds == i].mean().item() for i, size in enumerate(SIZES) if i in thirds},
        'loss': F.cross_entropy(logits, labels).item(),
        'parameters': parameters,
        'mflops': mflops,
        'seconds': round(time.perf_counter() - start, 1),
        'device': device.partition(':')[0],
        'hardware': machine['gpu'] or machine['cpu'],
        'threads': torch.get_num_threads(),
        'torch': torch.__version__,
        'settings': asdict(settings),
    }
    return model, json.loads(json.dumps(row))


def set_up(threads: int | None) -> None:
    """Threads where given, and the same arithmetic in every run of a device."""
    if threads:
        torch.set_num_threads(threads)
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(True, warn_only=True)


def check_device(device: str) -> None:
    """Raises ValueError for a device that is no cpu or cuda device of this machine."""
    kind, _, number = device.partition(':')
    if kind not in ('cpu', 'cuda') or not (number or '0').isdigit():
        raise ValueError(f'--devices {device}: must be cpu, cuda or cuda:NUMBER')
    if kind == 'cuda' and int(number or 0) >= torch.cuda.device_count():
        raise ValueError(f'--devices {device}: torch finds {torch.cuda.device_count()} CUDA devices here')
