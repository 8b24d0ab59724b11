"""Networks that the command line names: timm's, a folder's, the Hub's, or a config's, with their weights."""

import contextlib
import sys
from typing import Any

import timm
from _quiet import quiet_imports
from torch import Tensor, nn

from sk_plugins._resources import find_config, how_to_install
from sk_plugins._text import first_lines
from sk_plugins.weights import HubError, load_checkpoint, timm_arguments, to_timm
from sk_plugins.weights.fit import load_strictly
from sk_plugins.weights.hub import explain_errors, load_state_dict


def build(name: str, checkpoint: str | None = None, pretrained: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """The model with its weights, in evaluation mode, and its preprocessing (``input_size``, ``mean``, ``std``, ...).

    Args:
        name: timm's name, ``local-dir:FOLDER``, ``hf-hub:OWNER/NAME``, or a config.
        checkpoint: a file or ``hf-hub:OWNER/NAME[@REVISION]``; where it has another number of classes than the name,
            so has the model.
        pretrained: load timm's published weights.

    Raises:
        ValueError: an unknown name, no published weights, or weights that don't fit.
        OSError: a file that isn't there.
        HubError: ``hf-hub:`` weights that cannot be had.
    """
    args: dict[str, Any] = {}
    preprocessing: dict[str, Any] = {}
    from_folder = name.startswith(('local-dir:', 'hf-hub:', 'hf_hub:'))
    if not from_folder and not timm.is_model(timm.models.split_model_name_tag(name)[0]):
        if pretrained:
            raise ValueError(f'--pretrained: {name} is not a model of timm; give a config its --checkpoint')
        name, args, preprocessing = _from_config(name)
    state_dict = None if checkpoint is None else _load(checkpoint)
    if state_dict is not None and 'fc.weight' in state_dict:
        args.setdefault('num_classes', len(state_dict['fc.weight']))
    repo = name.partition(':')[2] if name.startswith(('hf-hub:', 'hf_hub:')) else None
    try:
        with contextlib.nullcontext() if repo is None else explain_errors(repo):
            model = timm.create_model(
                name, pretrained=pretrained or (from_folder and checkpoint is None), exportable=True, **args
            )
    except HubError:
        raise
    except RuntimeError as error:
        raise ValueError(f'{name}: {first_lines(error)}') from error
    if state_dict is not None:
        load_strictly(model, state_dict, checkpoint, name)
    elif not pretrained and not from_folder:
        print(f'{name}: random weights, for want of --checkpoint or --pretrained', file=sys.stderr)
    return model.eval(), {**timm.data.resolve_model_data_config(model), **preprocessing}


def _from_config(name: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    try:
        path = find_config(name)
    except FileNotFoundError as error:
        raise ValueError(f'model {name!r} is neither a name of timm nor a config') from error
    try:
        with quiet_imports():
            from mmengine.config import Config

            import sk_plugins.mmpretrain_models  # noqa: F401 - the project's configs import it
    except ModuleNotFoundError as error:
        raise ValueError(f'{path}: to read a config takes mmengine: {how_to_install("mm")}') from error
    return timm_arguments(Config.fromfile(path))


def _load(checkpoint: str) -> dict[str, Tensor]:
    if checkpoint.startswith('hf-hub:'):
        state_dict = load_state_dict(checkpoint.removeprefix('hf-hub:'))
    else:
        state_dict, _ = load_checkpoint(checkpoint)
    return to_timm(state_dict) if any(name.startswith('backbone.') for name in state_dict) else state_dict
