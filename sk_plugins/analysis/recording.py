"""A model's SK units under the paper's names, and a record of their attention.

The record keeps the logits on their way into the softmax, in eager mode and compiled. For as long as it runs, the
softmax has a ``forward`` of its own, which torch.compile notices, as it does not notice hooks. A recorded unit runs
module after module. On a CPU its outputs and gradients stay the same bit for bit, on a GPU to rounding.
"""

import itertools
import math
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MethodType

import timm.layers
import torch
from torch import Tensor, nn

from ..layers import SelectiveKernel
from ..ops import private

__all__ = ['Recording', 'SKUnit', 'record', 'sk_units']

_STAGE = re.compile(r'(?:^|\.)(layer|stage)(\d+)\.(\d+)(?=\.|$)')


@dataclass(frozen=True)
class SKUnit:
    """An SK convolution in a model.

    Attributes:
        name: the paper's, SK_2_3 for the third unit of stage 2, the first after the stem; see :func:`sk_units`.
        path: its name as a module.
        stage: the paper's number of the stage, None where the path tells none.
        kernels: size of each of the M branches' kernels, 5 for a 3x3 with dilation 2, without the network's dilation.
        channels: C.
        layer: the module itself.
    """

    name: str
    path: str
    stage: int | None
    kernels: tuple[int, ...]
    channels: int
    layer: nn.Module = field(repr=False, compare=False)

    @property
    def attends(self) -> bool:
        """Whether there is an attention: ``select='sum'`` has none."""
        return self.layer.attn is not None

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for each branch: '3x3', '5x5'; '3x3 (1)', '3x3 (2)' where sizes are the same."""
        numbers = {k: itertools.count(1) for k in self.kernels}
        alike = Counter(self.kernels)
        return tuple(f'{k}x{k} ({next(numbers[k])})' if alike[k] > 1 else f'{k}x{k}' for k in self.kernels)

    @property
    def smallest(self) -> int:
        """Index of the branch with the smallest kernel, the first such."""
        return min(range(len(self.kernels)), key=lambda m: (self.kernels[m], m))

    @property
    def largest(self) -> int:
        """Index of the branch with the largest kernel, the last such."""
        return max(range(len(self.kernels)), key=lambda m: (self.kernels[m], m))

    def difference(self, attention: Tensor) -> Tensor:
        """(..., M, C) to (...): the largest kernel's attention less the smallest's, mean over channels (Fig. 3)."""
        return (attention[..., self.largest, :] - attention[..., self.smallest, :]).mean(-1)


def sk_units(model: nn.Module) -> dict[str, SKUnit]:
    """The SK units of a model by name, in its own order: those of this project, and timm's ``SelectiveKernel``.

    ``layerN.I`` of a ResNet is unit I + 1 of the paper's stage N + 1, which counts the stem, and ``stageN.I`` of a
    ShuffleNet that of stage N: SK_2_1 is the first unit of a ResNet, SK_2_2 that of a ShuffleNet, whose units that
    down-sample have no SK convolution. Where two units would share a name (two networks in a model), what comes before
    the stage in their paths goes before it; where there is no stage, the name is the path.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: there is no SK unit in it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'model={model!r} must be an nn.Module, not {type(model).__name__}')
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, (SelectiveKernel, timm.layers.SelectiveKernel)):
            path = '.'.join(part for part in path.split('.') if part != '_orig_mod')
            found[path] = (module, _STAGE.search(path))
    if not found:
        raise ValueError(
            f'model is a {type(model).__name__} without SK units: it must hold a SelectiveKernel of sk_plugins or timm '
            '(a scripted, traced or exported model does no longer)'
        )
    names = {path: _name(match) or path or 'SK' for path, (_, match) in found.items()}
    for longer in (
        lambda path, match: path[: match.start()] + '.' + _name(match) if match else path,
        lambda path, _: path,
    ):
        taken = Counter(names.values())
        names = {path: longer(path, found[path][1]) if taken[name] > 1 else name for path, name in names.items()}
    return {
        names[path]: SKUnit(
            names[path], path, match and _stage(match), _kernels(module), module.paths[0].conv.out_channels, module
        )
        for path, (module, match) in found.items()
    }


def _stage(match: re.Match) -> int:
    return int(match[2]) + (match[1] == 'layer')


def _name(match: re.Match | None) -> str | None:
    return match and f'SK_{_stage(match)}_{int(match[3]) + 1}'


def _kernels(layer: nn.Module) -> tuple[int, ...]:
    """Each branch's kernel, as its dilation spreads it and the network's own does not."""
    convs = [path.conv for path in layer.paths]
    dilations = [conv.dilation[0] for conv in convs]
    # timm's layer does not say what the network's dilation is; its smallest kernel is 3x3.
    network = getattr(layer, 'dilation', None) or math.gcd(*dilations)
    return tuple((conv.kernel_size[0] - 1) * d // network + 1 for conv, d in zip(convs, dilations))


class Recording(Mapping[str, Tensor]):
    """What :func:`record` gives: from units' names to their attention, (N, M, C), all forwards along the batch.

    Attributes:
        units: the :class:`SKUnit` of every name.
    """

    def __init__(self, units: dict[str, SKUnit]) -> None:
        self.units = units
        self._forwards: dict[str, list[Tensor]] = {name: [] for name in units}
        self._watched: list[tuple[nn.Module, Callable[[Tensor], None]]] = []

    def __enter__(self) -> 'Recording':
        if self._watched:
            raise RuntimeError('this recording has begun: each `with` needs a record(model) of its own')
        for unit in self.units.values():
            layer, watcher = last_layer(unit), self._watcher(unit)
            _watch(layer, watcher)
            self._watched.append((layer, watcher))
        return self

    def __exit__(self, *_) -> None:
        for layer, watcher in self._watched:
            _unwatch(layer, watcher)
        self._watched.clear()

    def _watcher(self, unit: SKUnit) -> Callable[[Tensor], None]:
        def receive(logits: Tensor) -> None:
            with torch.no_grad():
                # As the unit does, and float32 where it is in less.
                wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
                attention = wide.flatten(1).unflatten(1, (len(unit.kernels), -1)).softmax(1)
                self._forwards[unit.name].append(attention.expand(-1, -1, unit.channels))

        return receive

    def forwards(self, name: str) -> list[Tensor]:
        """A unit's attention in every forward since the last :meth:`clear`, (B, M, C) each."""
        if name not in self._forwards:
            raise KeyError(f'{name!r} is not recorded, only {", ".join(self._forwards)}')
        return list(self._forwards[name])

    def __getitem__(self, name: str) -> Tensor:
        forwards, unit = self.forwards(name), self.units[name]
        return torch.cat(forwards) if forwards else torch.empty(0, len(unit.kernels), unit.channels)

    def __iter__(self) -> Iterator[str]:
        return iter(self.units)

    def __len__(self) -> int:
        return len(self.units)

    def clear(self) -> None:
        """Forget the attention so far: so a loop records in constant memory."""
        for forwards in self._forwards.values():
            forwards.clear()


def record(model: nn.Module, units: Sequence[str] | None = None) -> Recording:
    """Within it, every forward of ``model`` leaves the attention of its SK units behind.

    ::

        with record(model) as attention:
            model(images)
        attention['SK_2_3']  # (B, M, C), sums to 1 over M

    The attention is detached, on the model's device, and float32 where the model computes in less. With
    ``select='shared'`` it is the same for all C channels; units that sum their branches (``select='sum'``) have none
    and are left out. A forward that gradient checkpointing repeats counts once. What torch.compile made of the model,
    before or after, is compiled again for the first recording, and for none after it.

    Args:
        model: anything that holds SK units (:func:`sk_units`): a network of timm or OpenMMLab, a detector, wrapped
            for distributed training, compiled, or fused by :func:`sk_plugins.fold_batch_norm`.
        units: names of the units to record; all where None.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: it has no SK unit, none with an attention, or none of a name in ``units``.
    """
    every = sk_units(model)
    attending = {name: unit for name, unit in every.items() if unit.attends}
    if not attending:
        raise ValueError(
            f"model is a {type(model).__name__} without attention: its SK units sum their branches (select='sum')"
        )
    if units is None:
        return Recording(attending)
    if isinstance(units, str):
        raise ValueError(f'units={units!r} must be a sequence of names: ({units!r},)')
    for name in units:
        if name not in attending:
            why = "sums its branches (select='sum')" if name in every else 'does not exist'
            raise ValueError(f'units has {name!r}, a unit that {why}: choose from {", ".join(attending)}')
    return Recording({name: attending[name] for name in attending if name in units})


_numbers: 'weakref.WeakKeyDictionary[nn.Module, int]' = weakref.WeakKeyDictionary()
_count = itertools.count()
_watchers: dict[int, list[Callable[[Tensor], None]]] = {}
_replaced: dict[int, Callable[[Tensor], Tensor] | None] = {}


def last_layer(unit: SKUnit) -> nn.Module:
    """The last module of a unit's attention: the softmax; timm's has none, so that its logits' convolution is."""
    return getattr(unit.layer.attn, 'softmax', unit.layer.attn.fc_select)


def _watch(layer: nn.Module, watcher: Callable[[Tensor], None]) -> None:
    """Give ``watcher`` the logits that go into a softmax, or that a convolution gives."""
    number = _numbers.setdefault(layer, next(_count))  # the same in every recording, or compilers compile again
    if number not in _watchers:
        own = vars(layer).get('forward')

        def forward(self: nn.Module, x: Tensor) -> Tensor:
            if isinstance(self, nn.Softmax):
                x = _observe(x, number)
            y = type(self).forward(self, x) if own is None else own(x)
            return y if isinstance(self, nn.Softmax) else _observe(y, number)

        layer.forward = MethodType(forward, layer)
        _replaced[number] = own
    _watchers.setdefault(number, []).append(watcher)


def _unwatch(layer: nn.Module, watcher: Callable[[Tensor], None]) -> None:
    number = _numbers[layer]
    _watchers[number].remove(watcher)
    if not _watchers[number]:
        del _watchers[number], layer.forward
        own = _replaced.pop(number)
        if own is not None:
            layer.forward = own


def _observe(logits: Tensor, number: int) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.ops.sk_plugins.observe(logits, number)
    _tell(logits, number)
    return logits


def _tell(logits: Tensor, number: int) -> None:
    # In a backward pass, it is a checkpointed forward's repetition.
    if not private.in_backward():
        for watcher in _watchers.get(number, ()):
            watcher(logits)


# The graph of a compiled model asks for this operator's output, so that no compiler leaves it out, and the unit's
# arithmetic stays as it is around it: the logits are a matrix product's output, in memory anyway.
@torch.library.custom_op('sk_plugins::observe', mutates_args=())
def _observe_compiled(logits: Tensor, number: int) -> Tensor:
    _tell(logits, number)
    return logits.clone()


@_observe_compiled.register_fake
def _(logits: Tensor, number: int) -> Tensor:
    return torch.empty_like(logits)


_observe_compiled.register_autograd(lambda ctx, grad: (grad, None))
