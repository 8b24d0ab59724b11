"""Test a checkpoint on a config's test set.

python tools/test.py configs/sknet50_in1k.py work_dirs/sknet50_in1k/epoch_100.pth --crop 320
python tools/test.py sknet50_in1k hf-hub:timm/skresnext50_32x4d.ra_in1k --out metrics.json
python tools/test.py upernet_sknet50_4xb4-80k_ade20k-512x512 iter_80000.pth --tta --show-dir pictures
"""

import argparse
import re
from pathlib import Path

import mmengine
from _arguments import Parser
from _common import add_common_arguments, load_config, run
from _testing import RESIZE_FOR_CROP, set_crop, set_out, set_show_dir, set_tta
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.evaluator import DumpResults
from mmengine.runner import CheckpointLoader, Runner, load_state_dict

from sk_plugins.openmmlab.runtime.configs import explain_config
from sk_plugins.openmmlab.runtime.runner import build_runner
from sk_plugins.weights import load_checkpoint
from sk_plugins.weights.fit import load_strictly


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_common_arguments(parser)
    parser.add_argument(
        'checkpoint', help='a checkpoint of mmengine, a timm-format file, or hf-hub:OWNER/NAME[@REVISION]'
    )
    parser.add_argument(
        '--crop', type=int, choices=list(RESIZE_FOR_CROP), help='centre crop, from a short side of 256 or 352'
    )
    parser.add_argument(
        '--out',
        type=Path,
        help='metrics to FILE.json, or predictions: to FILE.pkl, those of mmseg to a FOLDER of label maps (.png)',
    )
    parser.add_argument('--show-dir', type=Path, help='folder for the test images with the predictions drawn on them')
    parser.add_argument(
        '--tta', action='store_true', help="merge the predictions of each image's copies: the config's, or its mirror"
    )
    return parser.parse_args(argv)


def merge_args(cfg: Config, args: argparse.Namespace) -> Config:
    """The arguments that only testing has, merged into the config.

    Raises:
        ValueError: an argument that does not go with the config.
    """
    cfg.load_from, cfg.resume = None, False
    if args.amp:
        if cfg.get('default_scope') in ('mmdet', 'mmrotate') and get_device() == 'cpu':
            raise ValueError("--amp: mmdetection's detectors run in mixed precision on GPUs and the like, not on CPUs")
        cfg.test_cfg.fp16 = True
    if args.crop is not None:
        set_crop(cfg.test_dataloader.dataset.pipeline, args.crop)
    if args.out is not None:
        set_out(cfg, args.out)
    if args.show_dir is not None:
        set_show_dir(cfg, args.show_dir, args.tta)
    if args.tta:
        set_tta(cfg)
    return cfg


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
    load_strictly(runner.model, state_dict, checkpoint, load=load_state_dict)


def dump_metric(cfg: Config) -> type[DumpResults]:
    """What writes predictions: mmdet's own has masks run-length encoded."""
    if cfg.get('default_scope') in ('mmdet', 'mmrotate'):
        from mmdet.evaluation import DumpDetResults

        return DumpDetResults
    return DumpResults


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = parse_args(argv)
    runner = build_runner(merge_args(load_config(args), args))
    load_weights(runner, args.checkpoint)
    if args.out is not None and args.out.suffix == '.pkl':
        runner.test_evaluator.metrics.append(dump_metric(runner.cfg)(out_file_path=str(args.out)))
    with explain_config(runner.cfg):
        metrics = runner.test()
    if args.out is not None and args.out.suffix == '.json' and runner.rank == 0:
        mmengine.dump(metrics, args.out)
    return metrics


if __name__ == '__main__':
    run(main)
