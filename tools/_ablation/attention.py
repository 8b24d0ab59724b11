"""What the attention of a trained network does: with scale, along the training, and in place of another."""

import contextlib
from collections.abc import Iterator

import numpy as np
from scipy import stats
from torch import Tensor, nn

from sk_plugins.analysis import record, sk_units
from sk_plugins.analysis.training import attention_scalars

from .data import Data
from .measuring import logits_of, top1_of
from .rows import NEW_SCALES, SCALES

IMAGES = 2000
CURVE_IMAGES = 500
CURVE_SCALES = tuple(sorted(SCALES + NEW_SCALES))
INTERVENTIONS = ('own', 'mean', 'shuffled')


def measure_attention(model: nn.Module, data: Data) -> dict:
    """How a trained network's attention goes with the object's scale, and what its answers owe to it.

    A unit's figure for an image is the mean over channels of its largest less its smallest kernel's attention. ``rho``
    is Spearman's correlation of that with the scale over the test images, each at a scale of its own, ``curve`` its
    mean over the same objects at each of CURVE_SCALES. ``top1`` is that of the test images at scales of their own, with
    every image's ``own`` attention, with the ``mean`` of all, and with that of another image (``shuffled``).
    """
    images, labels, scales = data.test()
    units = {
        name: {'rho': _rho(scales[:IMAGES], values), 'curve': []}
        for name, values in differences(model, images[:IMAGES]).items()
    }
    for scale in CURVE_SCALES:
        for name, values in differences(model, data.test(scale)[0][:CURVE_IMAGES]).items():
            units[name]['curve'].append(float(values.mean()))
    top1 = {}
    for how in INTERVENTIONS:
        with replaced_attention(model, how, images):
            top1[how] = top1_of(model, images, labels)
    return {'scales': list(CURVE_SCALES), 'units': units, 'top1': top1}


def measure_learning(model: nn.Module, data: Data) -> dict[str, dict[str, float]]:
    """``entropy`` in nats and ``rho`` of every unit, over fewer test images: for the way there."""
    images, _, scales = (part[:CURVE_IMAGES] for part in data.test())
    with record(model) as attention:
        logits_of(model, images)
    scalars = attention_scalars(attention, prefix='')
    return {
        name: {
            'entropy': scalars[f'{name}/entropy'],
            'rho': _rho(scales, unit.difference(attention[name]).cpu().numpy()),
        }
        for name, unit in attention.units.items()
    }


def differences(model: nn.Module, images: Tensor) -> dict[str, np.ndarray]:
    """(N,) for every unit: the mean over channels of the largest kernel's less the smallest's attention."""
    with record(model) as attention:
        logits_of(model, images)
    return {name: unit.difference(attention[name]).cpu().numpy() for name, unit in attention.units.items()}


def _rho(scales: Tensor, values: np.ndarray) -> float:
    if np.ptp(values) == 0:
        return 0.0
    return float(stats.spearmanr(scales.numpy(), values).statistic)


@contextlib.contextmanager
def replaced_attention(model: nn.Module, how: str, images: Tensor) -> Iterator[None]:
    """Within it, every unit takes another attention than the one it computes.

    Args:
        model: with SK units that select.
        how: 'own' leaves it; 'mean' is its mean over ``images``, by channel; 'shuffled' is that of the image before
            this one in the batch.
        images: (N, 1, 64, 64) uint8.
    """
    units = {name: unit for name, unit in sk_units(model).items() if unit.attends}
    handles = []
    if how == 'mean':
        with record(model) as attention:
            logits_of(model, images)
        means = {name: attention[name].mean(0)[:, :, None, None] for name in units}
        for name, unit in units.items():
            handles.append(unit.layer.attn.register_forward_hook(_give(means[name])))
    elif how == 'shuffled':
        for unit in units.values():
            handles.append(unit.layer.attn.register_forward_hook(lambda module, inputs, output: output.roll(1, 0)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _give(mean: Tensor):
    return lambda module, inputs, output: mean.expand(len(output), -1, -1, -1, -1).to(output.dtype)
