"""Train a config on mmengine's Runner.

python tools/train.py configs/sknet50_in1k.py --amp
python tools/train.py sknet_digits --work-dir work_dirs/digits --resume
"""

import argparse
from pathlib import Path

from _arguments import Parser
from _common import add_common_arguments, load_config, run
from mmengine.config import Config
from mmengine.device import get_device

from sk_plugins.openmmlab.runtime.configs import explain_config
from sk_plugins.openmmlab.runtime.losses import watch_losses
from sk_plugins.openmmlab.runtime.resuming import make_resumable
from sk_plugins.openmmlab.runtime.runner import build_runner
from sk_plugins.weights import CheckpointError, load_checkpoint

# What the options are called that users of other projects look for.
HINTS = {
    '--epochs': ': the config has them, --cfg-options train_cfg.max_epochs=N',
    '--batch-size': ': the config has it, --cfg-options train_dataloader.batch_size=N',
    '--lr': ': the config has it, --cfg-options optim_wrapper.optimizer.lr=X',
    '--device': ': a GPU is used where there is one; CUDA_VISIBLE_DEVICES chooses it, and nothing in it none',
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, hints=HINTS)
    add_common_arguments(parser)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='PATH',
        help='go on from a checkpoint; without PATH, from the last whole one in the work dir, if there is one yet',
    )
    parser.add_argument(
        '--load-from', metavar='PATH', help='start from these weights: a file, an address, or hf-hub:OWNER/NAME'
    )
    parser.add_argument(
        '--leave-out',
        nargs='+',
        default=[],
        metavar='NAME',
        help='tensors not to take from them, by the beginning of their names: head. for another number of classes',
    )
    parser.add_argument('--no-validate', action='store_true', help='do not evaluate during training')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate by this run's total batch over the recipe's (auto_scale_lr.base_batch_size)",
    )
    parser.add_argument('--compile', action='store_true', help='torch.compile the training step')
    return parser.parse_args(argv)


def merge_args(cfg: Config, args: argparse.Namespace) -> Config:
    """The arguments that only training has, merged into the config."""
    if args.amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
        # Nothing is measured, so there is no best checkpoint to keep.
        hook = (cfg.get('default_hooks') or {}).get('checkpoint')
        if isinstance(hook, dict):
            hook.pop('save_best', None)
    if args.load_from is not None:
        cfg.load_from = args.load_from
    if args.leave_out and not cfg.get('load_from'):
        raise ValueError(f'--leave-out {" ".join(args.leave_out)} goes with --load-from, which is not given')
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    if args.auto_scale_lr:
        if not cfg.get('auto_scale_lr', {}).get('base_batch_size'):
            raise ValueError(f'--auto-scale-lr: {args.config} does not say auto_scale_lr.base_batch_size')
        cfg.auto_scale_lr.enable = True
    if args.compile and not cfg.get('compile'):
        cfg.compile = True
    return cfg


def require_training_checkpoint(path: str) -> None:
    """Raise unless ``path`` is a whole checkpoint of an mmengine run: weights alone cannot be gone on from."""
    if Path(path).is_dir():
        raise ValueError(f'--resume {path}: is a folder; to go on from its last checkpoint: --work-dir {path} --resume')
    if not Path(path).is_file():
        raise FileNotFoundError(f'--resume {path}: there is no such file')
    _, meta = load_checkpoint(path)
    if 'iter' not in meta:
        raise CheckpointError(f'--resume {path}: holds weights but no training state; start from it with load_from')


def require_amp_device(cfg: Config, args: argparse.Namespace) -> None:
    """Raise where the config, or ``--amp``, asks for mixed precision and there is only a CPU."""
    wrapper = (cfg.get('optim_wrapper') or {}).get('type', 'OptimWrapper')
    if get_device() == 'cpu' and getattr(wrapper, '__name__', wrapper).endswith('AmpOptimWrapper'):
        said = '--amp' if args.amp else f"{args.config}: optim_wrapper.type='AmpOptimWrapper'"
        raise ValueError(f'{said}: mmengine trains with mixed precision on GPUs and the like, not on CPUs')


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.resume not in (None, 'auto'):
        if args.load_from is not None or args.leave_out:
            raise ValueError(f'--resume {args.resume} takes all of it: --load-from and --leave-out do not go with it')
        require_training_checkpoint(args.resume)
    cfg = load_config(args)
    start_from = args.load_from or cfg.get('load_from')
    cfg = make_resumable(merge_args(cfg, args), start_from if args.resume == 'auto' else None)
    require_amp_device(cfg, args)
    watch_losses(cfg)
    runner = build_runner(cfg, args.leave_out)
    with explain_config(runner.cfg):
        runner.train()


if __name__ == '__main__':
    run(main)
