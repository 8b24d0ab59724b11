"""Train a small SK network from a plain network's weights and from none, and compare: is a warm start worth it?

python tools/prepare_fashion_mnist.py
python tools/compare_warm_start.py            # what is missing of the runs, then the table and the plot
python tools/compare_warm_start.py --report   # the table and the plot from the runs that are there

The garments lie at random sizes and places on textured canvases (ScaledFashionMNIST). Every run appends a row to
OUT/runs.jsonl as it ends; after a kill, the same command goes on with what is missing. All networks of a seed see the
same images in the same order, so that the comparisons are paired by seed.
"""

import argparse
from pathlib import Path

from _ablation.rows import Settings
from _ablation.training import check_device, set_up
from _ablation.warm import report, run_missing
from _common import run


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('results/warm_start'), help='default: results/warm_start')
    parser.add_argument('--data', type=Path, default=Path('data/fashion_mnist'), help='default: data/fashion_mnist')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2], metavar='SEED', help='default: 0 1 2')
    parser.add_argument('--device', default='cpu', help='cpu, cuda or cuda:NUMBER (default: cpu)')
    parser.add_argument('--threads', type=int, help="on the CPU (default: torch's choice)")
    parser.add_argument('--train-images', type=int, default=2000, help='of every epoch (default: 2000)')
    parser.add_argument('--test-images', type=int, default=2000, help='default: 2000')
    parser.add_argument('--report', action='store_true', help='train nothing: the table and the plot alone')
    args = parser.parse_args(argv)
    if min(args.seeds) < 0:
        parser.error(f'argument --seeds: {min(args.seeds)} must be at least 0')
    if args.threads is not None and args.threads < 1:
        parser.error(f'argument --threads: {args.threads} must be at least 1')
    check_device(args.device)
    set_up(args.threads)
    if not args.report:
        settings = Settings(args.train_images, 1, args.test_images, batch_size=32, ema=0)
        settings.check()
        run_missing(args.seeds, args.out, args.data, settings, args.device)
    for path in report(args.out):
        print(path)


if __name__ == '__main__':
    run(main)
