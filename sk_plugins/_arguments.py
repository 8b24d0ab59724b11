"""Checks of arguments, with errors that name the argument, its value and what is right."""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from timm.layers import get_act_layer, get_norm_layer
from torch import Tensor, nn

__all__ = [
    'MOST_CHANNELS',
    'activation',
    'check_choice',
    'check_dtype',
    'check_flags',
    'check_integer',
    'check_integers',
    'check_layers',
    'check_pool',
    'check_rate',
    'check_sk_kwargs',
    'find_fault',
    'is_integer',
    'norm',
]

MOST_CHANNELS = 2**20  # twice as many, and the weights of one convolution could be more than torch can count
POOLS = tuple(fast + kind for fast in ('', 'fast') for kind in ('avg', 'max', 'avgmax', 'catavgmax'))
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FACTORIES = (FunctionType, functools.partial)


def is_integer(value: Any, least: int, most: int = MOST_CHANNELS) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def check_integer(name: str, value: Any, least: int = 1, most: int = MOST_CHANNELS) -> None:
    if not is_integer(value, least, most):
        large = isinstance(value, int) and value > most
        raise ValueError(
            f'{name}={value!r} must be an integer of {f"at most {most}" if large else f"at least {least}"}'
        )


def check_integers(
    name: str, value: Any, numbers: Sequence[int], what: str, step: int = 1, most: int = MOST_CHANNELS
) -> None:
    """A sequence of so many integers, multiples of ``step``; ``what`` says so in the error."""
    counts = isinstance(value, Sequence) and len(value) in numbers
    if not counts or not all(is_integer(v, 1, most) and v % step == 0 for v in value):
        raise ValueError(f'{name}={value!r} must be {what}')


def check_flags(**flags: Any) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f'{name}={value!r} must be True or False')


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f'{name}={value!r} is unknown: choose one of {", ".join(map(repr, choices))}')


def check_rate(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f'{name}={value!r} must be a number from 0 to 1')


def check_dtype(dtype: Any) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f'dtype={dtype!r} must be one of {", ".join(map(str, DTYPES))}')


def check_layers(**layers: Any) -> None:
    for name, layer in layers.items():
        if not is_layer(layer):
            raise ValueError(f'{name}={layer!r} must be a class of layers')


def is_layer(value: Any) -> bool:
    """A class of modules, or what stands for one."""
    return issubclass(value, nn.Module) if isinstance(value, type) else isinstance(value, _FACTORIES)


def check_sk_kwargs(sk_kwargs: Any, unit: str) -> None:
    """Arguments of the SK convolutions, that only SK units have, and not those that the network itself gives them."""
    if sk_kwargs is None:
        return
    if not isinstance(sk_kwargs, Mapping) or not all(isinstance(name, str) for name in sk_kwargs):
        raise ValueError(f'sk_kwargs={sk_kwargs!r} must be a dict of arguments by name')
    if unit != 'sk' and sk_kwargs:
        raise ValueError(f"sk_kwargs={sk_kwargs!r} are for unit='sk', and this is unit={unit!r}")
    networks_own = (
        'in_channels', 'out_channels', 'stride', 'dilation', 'act_layer', 'norm_layer', 'aa_layer', 'drop_layer',
        'device', 'dtype',
    )  # fmt: skip
    for name in networks_own:
        if name in sk_kwargs:
            raise ValueError(f'sk_kwargs={sk_kwargs!r} has {name}, which the network itself sets')


def check_pool(global_pool: Any, num_classes: int) -> None:
    if global_pool != '' or num_classes > 0:
        check_choice('global_pool', global_pool, (*POOLS, '') if num_classes == 0 else POOLS)


def find_fault(tensor: Tensor, wanted: Tensor | None = None) -> str | None:
    """What keeps a tensor from being a network's weight, or the one it is ``wanted`` for, besides its shape."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        return 'sparse, quantised or nested'
    if tensor.is_meta:
        return 'without data'
    floating = True if wanted is None else wanted.is_floating_point()
    return None if tensor.is_floating_point() == floating and not tensor.is_complex() else f'of {tensor.dtype}'


def activation(act_layer: Any) -> Callable[..., nn.Module]:
    """The class that timm has under a name; other classes as they are."""
    return _layer('act_layer', act_layer, get_act_layer)


def norm(norm_layer: Any) -> Callable[..., nn.Module]:
    """The class that timm has under a name; other classes as they are."""
    return _layer('norm_layer', norm_layer, get_norm_layer)


def _layer(name: str, layer: Any, named: Callable[[Any], Any]) -> Callable[..., nn.Module]:
    try:
        found = named(layer) if isinstance(layer, str) or is_layer(layer) else None
    except KeyError:
        found = None
    if not is_layer(found):
        raise ValueError(f"{name}={layer!r} must be a class of layers, or timm's name of one")
    return found
