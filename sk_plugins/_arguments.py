"""Checks of the project's own arguments, with errors that name the argument, its value and what is right."""

import functools
import inspect
from collections.abc import Mapping, Sequence
from numbers import Real
from types import FunctionType
from typing import Any

import torch
from torch import nn

from ._text import nearest

__all__ = [
    'MOST_CHANNELS',
    'MOST_UNITS',
    'UNITS',
    'check_choice',
    'check_dtype',
    'check_flags',
    'check_integer',
    'check_integers',
    'check_layers',
    'check_positive',
    'check_sk_kwargs',
    'is_integer',
    'is_module_class',
]

MOST_CHANNELS = 2**20  # twice as many, and the weights of one convolution could be more than torch can count
MOST_UNITS = 1000  # of a stage
UNITS = ('sk', 'plain', 'se')
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


def check_positive(name: str, value: Any) -> None:
    """A number above zero, whole or not."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not 0 < value <= MOST_CHANNELS:
        large = is_number and value > MOST_CHANNELS
        raise ValueError(f'{name}={value!r} must be a number {f"of at most {MOST_CHANNELS}" if large else "above 0"}')


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


def check_dtype(dtype: Any) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f'dtype={dtype!r} must be one of {", ".join(map(str, DTYPES))}')


def check_layers(**layers: Any) -> None:
    for name, layer in layers.items():
        if not (is_module_class(layer) or isinstance(layer, _FACTORIES)):
            raise ValueError(f'{name}={layer!r} must be a class of layers')


def is_module_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def check_sk_kwargs(sk_kwargs: Any, unit: str, layer: type[nn.Module] | None = None) -> None:
    """Arguments of the SK convolutions, that only SK units have, and not those that the network itself gives them.

    With the class of these convolutions, the names must be among its arguments.
    """
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
    known = sk_kwargs if layer is None else inspect.signature(layer).parameters
    for name in sk_kwargs:
        if name not in known:
            raise TypeError(f'sk_kwargs={sk_kwargs!r}: {layer.__name__} has no argument {name}{nearest(name, known)}')
