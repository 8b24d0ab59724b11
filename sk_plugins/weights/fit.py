"""Whether weights are a network's, and errors that say what keeps them from it."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .._text import first_lines, several
from .files import CheckpointError, HubError, find_fault

__all__ = ['COUNTER', 'find_misfits', 'load_strictly', 'require_fit']

COUNTER = 'num_batches_tracked'


def find_misfits(given: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """What keeps tensors from being those of a network with these shapes, a phrase for each; none where they fit.

    BatchNorm's counters of batches may be missing.
    """
    pairs = {name: (tuple(given[name].shape), tuple(shape)) for name, shape in shapes.items() if name in given}
    return [
        *(f'{name} is missing' for name in shapes if name not in given and not name.endswith(COUNTER)),
        *(f'{name} is {there}, not {here}' for name, (there, here) in pairs.items() if there != here),
        *(f'{name} is not part of it' for name in given if name not in shapes),
    ]


def require_fit(
    given: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    where: Any,
    network: str,
    error: type[Exception] = CheckpointError,
) -> None:
    """Raise unless tensors are those of a network, whole and of its shapes. Counters of batches are not looked at.

    Args:
        given: the tensors.
        wanted: the network's.
        where: what the tensors come from, for the message, where that is known.
        network: whose they should be, for the message.
        error: what to raise.
    """
    given, wanted = ({k: v for k, v in one.items() if not k.endswith(COUNTER)} for one in (given, wanted))
    misfits = find_misfits(given, {name: tuple(tensor.shape) for name, tensor in wanted.items()})
    faults = {name: find_fault(given[name], wanted[name]) for name in wanted if name in given}
    misfits += [f'{name} is {fault}' for name, fault in faults.items() if fault]
    if misfits:
        raise error(f'{_whose(where)} weights do not fit {network}: {several(misfits, "; ")}')


def load_strictly(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    where: Any,
    network: str = 'the model',
    hint: str = '',
    load: Callable[..., Any] = nn.Module.load_state_dict,
) -> None:
    """Load a state dict into a model as a whole.

    Args:
        model: changed in place.
        state_dict: under the names that ``model`` takes, by hooks of its own too.
        where: what the weights come from, for the message, where that is known.
        network: whose they should be, for the message.
        hint: what the message ends with.
        load: torch's, or another framework's, way of loading.

    Raises:
        CheckpointError: they do not fit; the message names the first few tensors.
    """
    try:
        load(model, state_dict, strict=True)
    except HubError:  # of a backbone of this project
        raise
    except RuntimeError as error:
        reason = str(error).partition(':\n')[2] if str(error).startswith('Error(s) in loading') else str(error)
        reason = reason.removeprefix('The model and loaded state dict do not match exactly\n').strip()
        message = f'{_whose(where)} weights do not fit {network}: {first_lines(Exception(reason))}{hint}'
        raise CheckpointError(message) from error


def _whose(where: Any) -> str:
    return f'{where}: its' if where else 'the'
