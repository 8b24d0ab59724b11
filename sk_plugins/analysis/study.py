"""Attention over a folder of images at several scales, in constant memory: the numbers behind Fig. 3 and 4."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .images import Batch
from .recording import SKUnit, last_layer, record, sk_units

__all__ = ['AttentionStudy', 'ReceptiveField', 'receptive_field', 'study', 'typical_units']


@dataclass
class ReceptiveField:
    """Where in the image the middle of a unit's output looks, at each of S scales.

    Attributes:
        unit: the unit's name.
        centre: row and column of the pixel that the position is at.
        maps: (S, H, W) float64, each pixel's share of the gradient (:func:`~sk_plugins.analysis.receptive_field`), mean
            over images.
        images: how many at each scale, those left out where the position is dead.
    """

    unit: str
    centre: tuple[float, float]
    maps: Tensor
    images: list[int]

    def distances(self) -> Tensor:
        """(H, W), each pixel's distance from the centre."""
        rows, columns = (torch.arange(n, dtype=torch.float64) - c for n, c in zip(self.maps.shape[1:], self.centre))
        return torch.hypot(rows[:, None], columns)

    def radius(self, share: float = 0.5) -> list[float]:
        """For each scale, the radius in pixels of the disc around the centre that holds this share of the gradient."""
        distances, order = self.distances().flatten().sort()
        held = self.maps.flatten(1)[:, order].cumsum(1)
        places = torch.searchsorted(held, share * held[:, -1:]).clamp_(max=held.shape[1] - 1)
        return distances[places[:, 0]].tolist()


@dataclass
class AttentionStudy:
    """Means over images; S scales, M branches, C channels, K classes. All tensors are float64.

    Attributes:
        units: the units, in the network's order.
        scales: how many times the middle of each image was enlarged.
        classes: names of the classes; none where the images have none.
        channels: for every unit, each branch's mean attention by channel, (S, M, C).
        differences: for every unit, the largest kernel's attention less the smallest's, mean over channels, (S,).
        deviations: for every unit, standard deviation of that difference over images (biased), (S,).
        class_differences: for every unit, that difference by class, (S, K); NaN for a class without images.
        class_images: images of each class, (K,).
        images: how many images were read.
        broken: how many files were not.
        field: a unit's effective receptive field, where asked for.
    """

    units: dict[str, SKUnit]
    scales: tuple[float, ...]
    classes: tuple[str, ...]
    channels: dict[str, Tensor]
    differences: dict[str, Tensor]
    deviations: dict[str, Tensor]
    class_differences: dict[str, Tensor]
    class_images: Tensor
    images: int
    broken: int
    field: ReceptiveField | None = None

    def branches(self, name: str) -> Tensor:
        """(S, M): each branch's share of a unit's attention."""
        return self.channels[name].mean(2)

    def label(self, name: str) -> str:
        """What the difference is between: '5x5 - 3x3'."""
        unit = self.units[name]
        return f'{unit.labels[unit.largest]} - {unit.labels[unit.smallest]}'


@dataclass
class _Sums:
    channels: Tensor
    classes: Tensor
    difference: Tensor
    square: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.square = torch.zeros_like(self.difference)

    def add(self, scale: int, attention: Tensor, difference: Tensor, labels: Tensor) -> None:
        self.channels[scale] += attention.sum(0)
        self.difference[scale] += difference.sum()
        self.square[scale] += difference.square().sum()
        known = labels >= 0
        self.classes[scale].index_add_(0, labels[known], difference[known])


def typical_units(units: dict[str, SKUnit]) -> list[str]:
    """The last unit of the first, the second and the last stage: the paper's SK_2_3, SK_3_4 and SK_5_3 in SKNet-50."""
    attending = {name: unit for name, unit in units.items() if unit.attends}
    last = {unit.stage: name for name, unit in attending.items()}
    if None in last or len(last) < 3:
        names = list(attending)
        chosen = [names[0], names[len(names) // 2], names[-1]]
    else:
        stages = list(last.values())
        chosen = [stages[0], stages[1], stages[-1]]
    return list(dict.fromkeys(chosen))


def study(
    model: nn.Module,
    batches: Iterable[Batch],
    scales: Sequence[float],
    classes: Sequence[str] = (),
    field_unit: str | None = None,
    field_every: int = 1,
) -> AttentionStudy:
    """Run a model over images at all scales and keep means alone.

    Args:
        model: in evaluation mode, on the device that it is to run on.
        batches: from :meth:`~sk_plugins.analysis.ImageStream.batches`.
        scales: theirs.
        classes: theirs.
        field_unit: the unit whose effective receptive field is asked for; none where None.
        field_every: take every so many-th image for it: a gradient costs what two forwards do.

    Raises:
        ValueError: the model is in training mode, has no SK unit with an attention or none of more than one branch, no
            unit of this name; or no image could be read.
    """
    if model.training:
        raise ValueError('model is in training mode, where a batch changes it: call model.eval() first')
    recording = record(model)
    units = recording.units
    if all(len(unit.kernels) == 1 for unit in units.values()):
        raise ValueError(f'model is a {type(model).__name__} whose SK units have one branch each: nothing is selected')
    if field_unit is not None and field_unit not in units:
        raise ValueError(f'field_unit={field_unit!r} does not exist: choose from {", ".join(units)}')
    reference = next(model.parameters())
    number, wide = len(scales), {'dtype': torch.float64, 'device': reference.device}
    sums = {
        name: _Sums(
            torch.zeros(number, len(unit.kernels), unit.channels, **wide),
            torch.zeros(number, len(classes), **wide),
            torch.zeros(number, **wide),
        )
        for name, unit in units.items()
    }
    counts = torch.zeros(len(classes), **wide)
    images = broken = 0
    gradients: ReceptiveField | None = None
    for batch in batches:
        broken += len(batch.broken)
        if not batch.labels:
            continue
        images += len(batch.labels)
        labels = torch.tensor(batch.labels, device=reference.device)
        counts += torch.bincount(labels[labels >= 0], minlength=len(classes))
        chosen = [i for i, index in enumerate(batch.indices) if index % field_every == 0]
        for s, scaled in enumerate(batch.images.to(reference.device, reference.dtype)):
            with torch.no_grad(), recording:
                model(scaled)
            for name, unit in units.items():
                attention = recording[name].double()
                sums[name].add(s, attention, unit.difference(attention), labels)
            recording.clear()
            if field_unit is not None and chosen:
                gradient, centre = receptive_field(model, field_unit, scaled[chosen])
                if gradients is None:
                    maps = torch.zeros(number, *gradient.shape[1:], dtype=torch.float64)
                    gradients = ReceptiveField(field_unit, centre, maps, [0] * number)
                gradients.maps[s] += gradient.sum(0).cpu()
                gradients.images[s] += int((gradient.sum((1, 2)) > 0).sum())
    if not images:
        raise ValueError(f'none of the {broken} images could be read')
    if gradients is not None:
        gradients.maps /= torch.tensor(gradients.images).clamp(min=1)[:, None, None]
    means = {name: (total.difference / images).cpu() for name, total in sums.items()}
    return AttentionStudy(
        units=units,
        scales=tuple(scales),
        classes=tuple(classes),
        channels={name: (total.channels / images).cpu() for name, total in sums.items()},
        differences=means,
        deviations={
            name: (total.square.cpu() / images - means[name].square()).clamp_(min=0).sqrt()
            for name, total in sums.items()
        },
        class_differences={name: (total.classes / counts).cpu() for name, total in sums.items()},
        class_images=counts.long().cpu(),
        images=images,
        broken=broken,
        field=gradients,
    )


class _Reached(Exception):  # noqa: N818 - the way out of a forward, no error
    pass


def receptive_field(model: nn.Module, unit: str, images: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """Effective receptive field of the middle of a unit's output (Luo et al., NeurIPS 2016), image by image.

    The gradient of the output's central position, summed over channels, with respect to the pixels, in absolute value
    and summed over theirs. The attention is held at what it is, or else it would add a faint gradient from everywhere,
    through its global pooling.

    Args:
        model: in evaluation mode.
        unit: the unit's name; what follows it in the model is not run.
        images: (B, channels, H, W).

    Returns:
        (B, H, W) float64, each image's shares summing to 1, or 0 throughout where the position is dead; and the row and
        the column of the pixel that the position is at.

    Raises:
        ValueError: no such unit, or a forward that does not come by it.
    """
    model = getattr(model, '_orig_mod', model)
    units = sk_units(model)
    if unit not in units:
        raise ValueError(f'unit={unit!r} does not exist: choose from {", ".join(units)}')
    layer = units[unit].layer
    held = [last_layer(u) for u in units.values() if u.attends]
    outputs: list[Tensor] = []

    def leave(_, inputs, output) -> None:
        outputs.append(output)
        raise _Reached

    handles = [module.register_forward_hook(lambda _, inputs, output: output.detach()) for module in held]
    handles.append(layer.register_forward_hook(leave))
    images = images.detach().requires_grad_()
    try:
        with torch.enable_grad():
            model(images)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if not outputs:
        raise ValueError(f'unit={unit!r} was not run: give the model itself, of which no part is compiled')
    height, width = outputs[0].shape[2:]
    row, column = height // 2, width // 2
    (gradient,) = torch.autograd.grad(outputs[0][:, :, row, column].sum(), images)
    shares = gradient.abs().sum(1).double()
    total = shares.sum((1, 2), keepdim=True)
    shares = torch.where(total > 0, shares / total, 0.0)
    return shares, (row * images.shape[2] / height, column * images.shape[3] / width)
