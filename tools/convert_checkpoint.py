"""Turn a checkpoint of one world into one of the other.

python tools/convert_checkpoint.py work_dirs/sknet50_in1k/epoch_100.pth sknet50_hub --config sknet50_in1k
python tools/convert_checkpoint.py work_dirs/sknet50_in1k/epoch_100.pth sknet50.safetensors
python tools/convert_checkpoint.py sknet50_hub/model.safetensors sknet50_mmpretrain.pth --to mmengine

--to is hub (a folder for timm and the Hub: config.json, model.safetensors, model card), timm (a state dict, as
safetensors or by another ending with torch.save) or mmengine (a checkpoint); where it is not given, it is hub with
--config, else the ending of OUT says which: none, .safetensors, or another.
"""

import argparse
from pathlib import Path

from _common import run
from mmengine.config import Config

from sk_plugins import checkpoints
from sk_plugins._resources import find_config


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', type=Path, help='of mmengine, timm or a bare state dict; .safetensors or .pth')
    parser.add_argument('out', type=Path)
    parser.add_argument('--to', choices=['hub', 'timm', 'mmengine'])
    parser.add_argument('--config', help='for hub: the config that the checkpoint was trained with')
    parser.add_argument('--no-ema', action='store_true', help='the trained weights, not their running average')
    args = parser.parse_args(argv)
    if args.to is None:
        named = {'': 'hub', '.safetensors': 'timm'}.get(args.out.suffix, 'mmengine')
        args.to = 'hub' if args.config is not None else named
    if args.config is not None and args.to != 'hub':
        parser.error(f'--config is for a Hub folder, not for --to {args.to}')
    if args.to == 'hub' and args.config is None:
        parser.error('a Hub folder needs --config, the config that the checkpoint was trained with')
    if args.to != 'hub' and not args.out.suffix:
        parser.error(f'--to {args.to} writes one file: give {args.out} an ending')
    return args


def convert(checkpoint: Path, out: Path, to: str, config: str | None = None, use_ema: bool = True) -> None:
    """Convert ``checkpoint`` to ``out``; ``to`` is 'hub', 'timm' or 'mmengine'. Errors as in ``checkpoints``."""
    state_dict, meta = checkpoints.load_checkpoint(checkpoint, use_ema=use_ema)
    classes = (meta.get('dataset_meta') or {}).get('classes')
    try:
        if to == 'timm':
            checkpoints.save_state_dict(checkpoints.to_timm(state_dict), out)
        elif to == 'mmengine':
            checkpoints.save_mmengine_checkpoint(state_dict, out, meta)
        else:
            architecture, model_args, data_config = checkpoints.timm_arguments(Config.fromfile(find_config(config)))
            checkpoints.save_hub_folder(
                state_dict,
                out,
                architecture,
                model_args,
                data_config,
                label_names=list(classes) if classes else None,
                description=f'{architecture} trained with the config {Path(config).stem} of sk-plugins.',
            )
    except checkpoints.CheckpointError as error:
        raise checkpoints.CheckpointError(f'{checkpoint}: {error}') from error


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    convert(args.checkpoint, args.out, args.to, args.config, use_ema=not args.no_ema)
    print(args.out)


if __name__ == '__main__':
    run(main)
