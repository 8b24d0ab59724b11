"""A network's answers to canvases."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Data, prepare
from .rows import NEW_SCALES, SCALES


def logits_of(model: nn.Module, canvases: Tensor) -> Tensor:
    """(N, 10) on the model's device, from canvases (N, 1, 64, 64) uint8."""
    device = next(model.parameters()).device
    batch_size = 500 if device.type == 'cpu' else 5000
    with torch.inference_mode():
        return torch.cat([model(prepare(batch.to(device))) for batch in canvases.split(batch_size)])


def top1_of(model: nn.Module, canvases: Tensor, labels: Tensor) -> float:
    """In per cent."""
    return 100 * _right(logits_of(model, canvases), labels).double().mean().item()


def measure(model: nn.Module, data: Data) -> tuple[dict, Tensor]:
    """The figures of a network in evaluation mode, and at how many of SCALES it is right about each image, (N,).

    ``top1`` and ``loss`` are means over SCALES, ``scales`` has each scale's top-1, in per cent.
    """
    scales, losses, right = {}, [], 0
    for scale in sorted(SCALES + NEW_SCALES):
        images, labels, _ = data.test(scale)
        logits = logits_of(model, images)
        found = _right(logits, labels)
        scales[f'{scale:g}'] = 100 * found.double().mean().item()
        if scale in SCALES:
            right = right + found.int()
            losses.append(F.cross_entropy(logits.float(), labels).item())
    top1 = sum(scales[f'{scale:g}'] for scale in SCALES) / len(SCALES)
    return {'top1': top1, 'loss': sum(losses) / len(losses), 'scales': scales}, right.cpu()


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.argmax(1) == labels.to(logits.device)
