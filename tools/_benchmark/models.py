"""Models by the text that names them on the command line."""

import ast
import contextlib
import difflib
import json
import re
from dataclasses import dataclass
from typing import Any

import timm
from torch import nn

MODIFIERS = ('fuse', 'compile', 'stub')


@dataclass(frozen=True)
class Variant:
    """A model and what is done to it. ``label`` is the text it is written as on the command line."""

    name: str
    source: str = 'timm'
    arguments: str = ''
    fuse: bool = False
    compile: bool = False
    stub: bool = False

    @property
    def label(self) -> str:
        source = '' if self.source == 'timm' else f'{self.source}:'
        arguments = f'[{self.arguments}]' if self.arguments else ''
        modifiers = ''.join(f':{modifier}' for modifier in MODIFIERS if getattr(self, modifier))
        return f'{source}{self.name}{arguments}{modifiers}'

    @classmethod
    def parse(cls, text: str, fuse: bool = False, compile: bool = False) -> 'Variant':
        """The variant that ``text`` names; ``fuse`` and ``compile`` do so to every model.

        Raises:
            ValueError: not of the form NAME[key=value,...]:fuse:compile:stub.
        """
        match = re.fullmatch(r'(torchvision:)?([\w.-]+)(?:\[(.+)\])?((?::[a-z]+)*)', text)
        if match is None:
            raise ValueError(
                f'model={text!r} is not of the form [torchvision:]NAME[key=value,...][:fuse][:compile][:stub], '
                "e.g. sknet50:fuse or 'sknet50[sk_kwargs.reduction=32]:compile'"
            )
        source, name, arguments, modifiers = match.groups()
        modifiers = modifiers.split(':')[1:]
        for modifier in modifiers:
            if modifier not in MODIFIERS:
                raise ValueError(f"model={text!r} has ':{modifier}': there are :fuse, :compile and :stub")
        if 'stub' in modifiers and (compile or 'compile' in modifiers):
            raise ValueError(f'model={text!r}: :stub is for eager models, and does not go with :compile')
        parse_arguments(arguments or '')
        return cls(
            name,
            'torchvision' if source else 'timm',
            arguments or '',
            fuse=fuse or 'fuse' in modifiers,
            compile=compile or 'compile' in modifiers,
            stub='stub' in modifiers,
        )

    def build(self) -> nn.Module:
        """The model with random weights, neither fused nor compiled yet.

        Raises:
            ValueError: there is no such model, or it doesn't take the arguments.
        """
        if self.source == 'torchvision':
            try:
                from torchvision import models
            except ImportError as error:
                raise ValueError(f'model={self.label!r} needs torchvision, which is not installed') from error
            names, create = models.list_models(), models.get_model
        else:
            names, create = timm.list_models(), timm.create_model
        if self.name.split('.')[0] not in names:
            close = difflib.get_close_matches(self.name, names, n=3)
            hint = f': did you mean {", ".join(close)}?' if close else ''
            raise ValueError(f'model={self.label!r} is unknown to {self.source}{hint}')
        try:
            return create(self.name, **parse_arguments(self.arguments))
        except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f'model={self.label!r} cannot be built: {error}') from error


def parse_arguments(text: str) -> dict[str, Any]:
    """'num_classes=10,sk_kwargs.reduction=32' as {'num_classes': 10, 'sk_kwargs': {'reduction': 32}}.

    Values are JSON (8, 0.5, false, [3,5]) or Python (False, None, (3,5)), and text where they are neither.

    Raises:
        ValueError: something that is not key=value, or a key that is both a value and a prefix.
    """
    arguments = {}
    for item in re.split(r',(?=[\w.]+=)', text) if text else []:
        key, equals, value = item.partition('=')
        if not equals or not re.fullmatch(r'\w+(\.\w+)*', key):
            raise ValueError(f'model argument {item!r} is not of the form key=value')
        *outer, last = key.split('.')
        inner = arguments
        for name in outer:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise ValueError(f'model argument {item!r}: {name} already has a value of its own')
        inner[last] = _parse_value(value)
    return arguments


def _parse_value(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError):
            return parse(text)
    return text
