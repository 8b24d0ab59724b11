"""Runs of one network, trained alone or together, and tested."""

import json
import math
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from _benchmark.machine import describe_machine
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .attention import measure_attention, measure_learning
from .data import Data
from .measuring import measure, top1_of
from .networks import SELECTED, cost, initialise
from .rows import Row, Run, Settings
from .together import Alone, Together

WARM_UP = 0.1  # the share of the steps over which the learning rate rises
LEARNING_MARKS = (0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # of the steps, where the attention is looked at
PROBES = 5  # single steps in the middle of a training, and at its end
LONGER = 2


def _commit() -> str | None:
    """That of these files, ending in -dirty where they differ from it; None where there is no git."""
    command = ['git', '-C', str(Path(__file__).parent), 'describe', '--always', '--abbrev=40', '--exclude=*', '--dirty']
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


COMMIT = _commit()  # as they are read, not as they are when a run has ended


def rate(step: int, steps: int) -> float:
    """The learning rate's share of its height: a straight rise, and half a cosine that is 0 when all is done."""
    return min((step + 1) / max(WARM_UP * steps, 1), (1 + math.cos(math.pi * step / steps)) / 2)


def fit(
    model: Alone | Together,
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    settings: Settings,
    watch: Callable[[int], None] | None = None,
    compiled: bool = False,
) -> Alone | Together:
    """Train on images (S, B, ...) and labels (S, B), and return the moving average of the weights of the second half.

    Where ``settings.ema`` is 0, the model itself is returned. ``watch`` is called with the number of steps that are
    done, before the first and after each.
    """
    # AdamW, since the attention starts near zero (N(0, 0.01)), where SGD's steps in a short training are small.
    parameters = list(model.parameters())
    kept = [parameter for parameter in parameters if parameter.ndim - model.stacked <= 1]
    decayed = [parameter for parameter in parameters if parameter.ndim - model.stacked > 1]
    groups = [dict(params=kept, weight_decay=0.0), dict(params=decayed, weight_decay=settings.weight_decay)]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    average = None
    if settings.ema:
        decay = 1 - 1 / max(settings.ema * steps, 1)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    call = torch.compile(model) if compiled else model
    device = parameters[0].device.type
    model.train()
    if watch is not None:
        watch(0)
    for step, (images, labels) in enumerate(batches, start=1):
        with torch.autocast(device, torch.bfloat16) if settings.amp else nullcontext():
            logits = call(images).float()
        # A sum over the networks, so that each has the gradients of its own loss.
        loss = len(labels) * F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if average is not None and step > steps // 2:
            average.update_parameters(model)
        if watch is not None:
            watch(step)
    return model if average is None else average.module


def train(runs: Sequence[Run], device: str, data: Data, compiled: bool = False, probe: bool = False) -> list[Row]:
    """Train and test one network with several seeds, at once where there are several: a row of the results for each.

    ``probe`` adds what the study of the variance needs: ``steps``, the top-1 of the weights after single steps, and
    ``right``, for every test image at how many of the scales it is told.
    """
    start = time.perf_counter()
    run, settings = runs[0], data.settings
    epochs = settings.epochs * (LONGER if run.longer else 1)
    steps = epochs * (settings.train_images // settings.batch_size)
    models = [initialise(run.network, run.size, one.seed).to(device, memory_format=torch.channels_last) for one in runs]
    seeds = [one.images for one in runs]
    first = [_first_loss(model, *batch) for model, batch in zip(models, zip(*next(data.batches(seeds, 0))))]
    model = Alone(models[0]) if len(models) == 1 else Together(models)
    watch = _Watch(model, data, steps, run.network == SELECTED, probe)
    batches = (batch for epoch in range(epochs) for batch in data.batches(seeds, epoch))
    average = fit(model, batches, steps, settings, watch if watch.marks else None, compiled)
    rows = []
    images, labels, _ = data.test()
    for i, (raw, ours) in enumerate(zip(model.unstack(), average.unstack())):
        figures, right = measure(ours.eval(), data)
        row = {
            'network': run.network,
            'seed': runs[i].seed,
            'data': run.data,
            'size': run.size,
            'order': runs[i].order,
            'longer': run.longer,
            **figures,
            'mixed': top1_of(ours, images, labels),  # each image at a scale of its own
            'last': top1_of(raw.eval(), images, labels),  # the same, of the last weights, not their average
            'first': first[i],
            **watch.figures(i),
            **({'right': ''.join(map(str, right.tolist()))} if probe else {}),
        }
        if run.network == SELECTED:
            row['attention'] = measure_attention(ours, data)
        rows.append(row)
    seconds = round((time.perf_counter() - start) / len(runs), 1)
    about = _about(run, device, [one.seed for one in runs], compiled, settings)
    return [json.loads(json.dumps({**row, 'seconds': seconds, **about})) for row in rows]


def _first_loss(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """That of the first batch before any step, which tells of other weights, images or arithmetic."""
    with torch.no_grad():
        return F.cross_entropy(model.eval()(images), labels).item()


def _about(run: Run, device: str, together: list[int], compiled: bool, settings: Settings) -> Row:
    machine = describe_machine('cuda' if device.startswith('cuda') else device)
    parameters, mflops = cost(run.network, run.size)
    return {
        'parameters': parameters,
        'mflops': mflops,
        'device': device.partition(':')[0],
        'hardware': machine['gpu'] or machine['cpu'],
        **{name: machine[name] for name in ('cpu_capability', 'threads', 'torch', 'timm', 'python', 'sk_plugins')},
        'commit': COMMIT,
        'together': together,
        'compiled': compiled,
        'settings': asdict(settings),
    }


class _Watch:
    """What is looked at while networks train: their attention at some steps, and their top-1 after single ones."""

    def __init__(self, model: Alone | Together, data: Data, steps: int, attention: bool, probe: bool) -> None:
        self.model, self.data = model, data
        self.learning_marks = {round(share * steps) for share in LEARNING_MARKS} if attention else set()
        ends = {'middle': steps // 2, 'end': steps} if probe else {}
        self.probes = {end - i: name for name, end in ends.items() for i in range(min(PROBES, steps // 2))}
        self.marks = self.learning_marks | self.probes.keys()
        self.learnt: list[tuple[int, list]] = []
        self.probed: dict[str, list[list[float]]] = {name: [] for name in ends}

    def __call__(self, step: int) -> None:
        if step not in self.marks:
            return
        models = [model.eval() for model in self.model.unstack()]
        if step in self.learning_marks:
            self.learnt.append((step, [measure_learning(model, self.data) for model in models]))
        if step in self.probes:
            images, labels, _ = self.data.test()
            self.probed[self.probes[step]].append([top1_of(model, images, labels) for model in models])
        self.model.train()

    def figures(self, i: int) -> Row:
        """Those of network ``i``."""
        found = {}
        if self.learnt:
            found['learning'] = {
                'steps': [step for step, _ in self.learnt],
                **{
                    name: {key: [of[i][name][key] for _, of in self.learnt] for key in ('entropy', 'rho')}
                    for name in self.learnt[0][1][i]
                },
            }
        if self.probed:
            found['steps'] = {name: [values[i] for values in probes] for name, probes in self.probed.items()}
        return found


def set_up(threads: int | None) -> None:
    """Threads where given, and the same arithmetic in every run of a device."""
    if threads:
        torch.set_num_threads(threads)
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Nothing is read that was not written, and filling it costs a CPU 5 % of its time.
    torch.utils.deterministic.fill_uninitialized_memory = False


def check_device(device: str) -> None:
    """Raises ValueError for a device that is no cpu or cuda device of this machine."""
    kind, _, number = device.partition(':')
    if kind not in ('cpu', 'cuda') or not (number or '0').isdigit():
        raise ValueError(f'--devices {device}: must be cpu, cuda or cuda:NUMBER')
    if kind == 'cuda' and int(number or 0) >= torch.cuda.device_count():
        raise ValueError(f'--devices {device}: torch finds {torch.cuda.device_count()} CUDA devices here')
