"""Test a checkpoint on a config's test set.

python tools/test.py configs/sknet50_in1k.py work_dirs/sknet50_in1k/epoch_100.pth --crop 320
python tools/test.py sknet50_in1k hf-hub:timm/skresnext50_32x4d.ra_in1k --out metrics.json
"""

import argparse
import re
from copy import deepcopy
from pathlib import Path

import mmengine
from _common import add_common_arguments, build_runner, load_config, run
from mmengine.config import Config, ConfigDict
from mmengine.evaluator import DumpResults
from mmengine.runner import CheckpointLoader, Runner, load_state_dict

from sk_plugins.checkpoints import CheckpointError, load_checkpoint
from sk_plugins.hub import HubError, shorten

# Short side before the centre crop: 256 for 224 and 352 for 320, as the paper tests.
RESIZE_FOR_CROP = {224: 256, 320: 352}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Test (and evaluate) a model')
    add_common_arguments(parser)
    parser.add_argument(
        'checkpoint', help='a checkpoint of mmengine, a timm-format file, or hf-hub:OWNER/NAME[@REVISION]'
    )
    parser.add_argument(
        '--crop', type=int, choices=list(RESIZE_FOR_CROP), help='centre crop, from a short side of 256 or 352'
    )
    parser.add_argument('--out', type=Path, help='file for the results: metrics to .json, predictions to .pkl')
    parser.add_argument('--tta', action='store_true', help='average the scores of each image and its mirror image')
    args = parser.parse_args(argv)
    if args.out is not None and args.out.suffix not in ('.json', '.pkl'):
        parser.error(f'argument --out: {args.out} must end in .json (metrics) or .pkl (predictions)')
    return args


def merge_args(cfg: Config, args: argparse.Namespace) -> Config:
    """The arguments that only testing has, merged into the config."""
    cfg.load_from = None
    if args.amp:
        cfg.test_cfg.fp16 = True
    if args.crop is not None:
        set_crop(cfg.test_dataloader.dataset.pipeline, args.crop)
    if args.tta:
        cfg.setdefault('tta_model', ConfigDict(type='mmpretrain.AverageClsScoreTTA'))
        if 'tta_pipeline' not in cfg:
            *transforms, pack = deepcopy(cfg.test_dataloader.dataset.pipeline)
            flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
            cfg.tta_pipeline = [*transforms, dict(type='TestTimeAug', transforms=[flips, [pack]])]
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    return cfg


def set_crop(pipeline: list[dict], crop: int) -> None:
    """Set the short side and the centre crop of a test pipeline, in place.

    Raises:
        ValueError: the pipeline has no ``ResizeEdge`` or no ``CenterCrop``.
    """
    transforms = {transform['type']: transform for transform in pipeline}
    missing = [name for name in ('ResizeEdge', 'CenterCrop') if name not in transforms]
    if missing:
        raise ValueError(f'--crop {crop}: the test pipeline has no {" and no ".join(missing)} to set')
    transforms['ResizeEdge']['scale'] = RESIZE_FOR_CROP[crop]
    transforms['CenterCrop']['crop_size'] = crop


def load_weights(runner: Runner, checkpoint: str) -> None:
    """Load what is to be measured: all of it, where mmengine would load a part and warn, and no code of a pickle.

    Raises:
        FileNotFoundError: ``checkpoint`` is neither a file nor an address.
        CheckpointError: a file that cannot be read, or weights of another network.
        HubError: ``hf-hub:`` weights that cannot be had or don't fit.
    """
    if Path(checkpoint).is_file():
        state_dict, _ = load_checkpoint(checkpoint)
    elif re.match(r'hf-hub:|\w+://', checkpoint):
        loaded = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu')
        state_dict = loaded.get('state_dict', loaded)
    else:
        raise FileNotFoundError(f'{checkpoint}: no such checkpoint file')
    try:
        load_state_dict(runner.model, state_dict, strict=True)
    except HubError:
        raise
    except RuntimeError as error:
        raise CheckpointError(f'{checkpoint}: {shorten(error)}') from error


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = parse_args(argv)
    runner = build_runner(merge_args(load_config(args), args), args.local_rank)
    load_weights(runner, args.checkpoint)
    if args.out is not None and args.out.suffix == '.pkl':
        runner.test_evaluator.metrics.append(DumpResults(out_file_path=str(args.out)))
    metrics = runner.test()
    if args.out is not None and args.out.suffix == '.json' and runner.rank == 0:
        mmengine.dump(metrics, args.out)
    return metrics


if __name__ == '__main__':
    run(main)
