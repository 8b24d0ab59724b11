"""Turn a checkpoint of one world into one of the other.

python tools/convert_checkpoint.py work_dirs/sknet50_in1k/epoch_100.pth sknet50_hub --config sknet50_in1k
python tools/convert_checkpoint.py work_dirs/sknet50_in1k/epoch_100.pth sknet50.safetensors
python tools/convert_checkpoint.py sknet50_hub/model.safetensors sknet50_mmpretrain.pth --to mmengine
python tools/convert_checkpoint.py someone_elses_sknet50.pth sknet50.safetensors

--to is hub (a folder for timm and the Hub: config.json, model.safetensors, model card), timm (a state dict, as
safetensors or by another ending with torch.save) or mmengine (a checkpoint); where it is not given, it is hub with
--config, else the ending of OUT says which: none, .safetensors, or another.

CHECKPOINT may also be another project's (sk_plugins.weights.convert says whose): it is recognised, put under our
names, and what it was recognised as is printed with the network that it belongs to.
"""

import argparse
from pathlib import Path
from typing import Any

from _arguments import Parser
from _errors import run

from sk_plugins._resources import find_config, how_to_install
from sk_plugins.networks import SKResNet
from sk_plugins.weights import (
    CheckpointError,
    HubError,
    load_checkpoint,
    recognise_third_party,
    save_hub_folder,
    save_mmengine_checkpoint,
    save_state_dict,
    timm_arguments,
    to_timm,
)
from sk_plugins.weights.convert import ThirdPartyWeights, is_third_party, told_by_path
from sk_plugins.weights.names import is_own


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument('checkpoint', type=Path, help='of mmengine, timm, a plain state dict, or another project')
    parser.add_argument('out', type=Path)
    parser.add_argument('--to', choices=['hub', 'timm', 'mmengine'])
    parser.add_argument(
        '--config', help="for hub: the config it was trained with (another project's checkpoint has none)"
    )
    parser.add_argument('--no-ema', action='store_true', help='the trained weights, not their running average')
    args = parser.parse_args(argv)
    if args.to is None:
        named = {'': 'hub', '.safetensors': 'timm'}.get(args.out.suffix, 'mmengine')
        args.to = 'hub' if args.config is not None else named
    if args.config is not None and args.to != 'hub':
        parser.error(f'--config is for a Hub folder, not for --to {args.to}')
    if args.to != 'hub' and not args.out.suffix:
        parser.error(f'--to {args.to} writes one file: give {args.out} an ending')
    return args


def read_config(name: str) -> Any:
    """mmengine's ``Config`` of a file, or of one of the project's own by its name."""
    try:
        from mmengine.config import Config
    except ModuleNotFoundError as error:
        raise ValueError(f'--config {name}: to read a config takes mmengine: {how_to_install("mm")}') from error
    return Config.fromfile(find_config(name))


def convert(checkpoint: Path, out: Path, to: str, config: str | None = None, use_ema: bool = True) -> None:
    """Convert ``checkpoint`` to ``out``; ``to`` is 'hub', 'timm' or 'mmengine'. Errors as in ``checkpoints``."""
    state_dict, meta = load_checkpoint(checkpoint, use_ema=use_ema)
    classes = (meta.get('dataset_meta') or {}).get('classes')
    try:
        if is_third_party(state_dict) or not is_own(state_dict):
            found = recognise_third_party(state_dict, **told_by_path(checkpoint, state_dict))
            convert_third_party(found, out, to, config)
            return
        if to == 'hub' and config is None:
            raise CheckpointError('a Hub folder needs --config, the config that it was trained with')
        if to == 'timm':
            save_state_dict(to_timm(state_dict), out)
        elif to == 'mmengine':
            save_mmengine_checkpoint(state_dict, out, meta)
        else:
            architecture, model_args, data_config = timm_arguments(read_config(config))
            save_hub_folder(
                state_dict,
                out,
                architecture,
                model_args,
                data_config,
                label_names=list(classes) if classes else None,
                description=f'{architecture} trained with the config {Path(config).stem} of sk-plugins.',
            )
    except CheckpointError as error:
        raise CheckpointError(f'{checkpoint}: {error}') from error


def convert_third_party(found: ThirdPartyWeights, out: Path, to: str, config: str | None = None) -> None:
    """Write another project's network to ``out``, and print what it is. Errors as in ``checkpoints``."""
    if not issubclass(found.network, SKResNet):
        raise CheckpointError(
            f'recognised as {found.origin}, which is no network: sk_plugins.weights.load_third_party builds it'
        )
    if config is not None:
        raise CheckpointError(f'recognised as {found.origin}, which no --config of this project describes')
    try:
        architecture, model_args = found.timm_model()
        words = ''.join(f', {name}={value!r}' for name, value in model_args.items())
        network = f'timm.create_model({architecture!r}{words})'
        if to == 'mmengine':
            words = ', '.join(f'{name}={value!r}' for name, value in found.openmmlab_backbone().items())
            network = f'backbone=dict({words})'
    except ValueError as error:
        # A head of OpenMMLab's would take the classifier, and give it other features than it was trained on.
        if to == 'hub' or (to == 'mmengine' and found.arguments.get('projection')):
            raise CheckpointError(f'{error}; sk_plugins.weights.load_third_party builds it') from error
        network = f'sk_plugins.weights.load_third_party, for it is no registered model ({error})'
    if to == 'timm':
        save_state_dict(found.state_dict, out)
    elif to == 'mmengine':
        save_mmengine_checkpoint(found.state_dict, out)
    else:
        description = f'{architecture} with the weights of {found.origin}.'
        save_hub_folder(found.state_dict, out, architecture, model_args, description=description)
    print('\n'.join([f'recognised as {found.origin}', *found.notes, f'its network: {network}']))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    convert(args.checkpoint, args.out, args.to, args.config, use_ema=not args.no_ema)
    print(args.out)


if __name__ == '__main__':
    run(main, CheckpointError, HubError, ImportError, OSError, ValueError)
