"""Which names of the zoo are one kind of network, so that what goes by the kind is tested once by default."""

from collections.abc import Callable, Hashable, Iterable

import pytest

from sk_plugins import zoo

# What makes a network deeper or wider, and leaves what it is made of. One without groups is of another design.
_SIZES = {'layers', 'channels', 'cardinality', 'base_width', 'head_channels', 'stem_channels', 'width_factor'}


def kind_of(name: str) -> Hashable:
    """Equal for names whose networks differ in depth and width alone."""
    spec = zoo.MODELS[name]
    args = {key: value for key, value in spec.args.items() if key not in _SIZES}
    return spec.network, len(spec.args.get('layers', ())), spec.args.get('cardinality') == 1, repr(sorted(args.items()))


def one_of_each(names: Iterable[str], kind: Callable[[str], Hashable] = kind_of) -> list:
    """Parameters of a test: the first of every kind as it is, the others marked slow."""
    seen = set()
    parameters = []
    for name in names:
        parameters.append(pytest.param(name, marks=pytest.mark.slow) if kind(name) in seen else name)
        seen.add(kind(name))
    return parameters


def quick(names: Iterable, chosen: Iterable) -> list:
    """Parameters of a test: those that are chosen as they are, the others marked slow."""
    chosen = list(chosen)
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.slow) for name in names]
