"""Train small networks that differ in one thing only, and compare them: the paper's claims on Fashion-MNIST.

python tools/prepare_fashion_mnist.py
python tools/run_ablation.py                          # what is missing of the runs, then the table and the plots
python tools/run_ablation.py --devices cuda:0 cuda:1  # a process for each device
python tools/run_ablation.py --report                 # the table and the plots from the runs that are there
python tools/run_ablation.py --verify k3 0            # train one again, as its row says, and compare

The garments lie at random sizes and places on textured canvases (ScaledFashionMNIST). Every run appends a row to
OUT/runs.jsonl as it ends; after a kill, the same command goes on with what is missing. All networks of a seed see the
same images in the same order, so that the comparisons are paired by seed. The weights of the network whose attention is
measured stay in WORK_DIR.
"""

from pathlib import Path

import torch
from _ablation.attention import measure_missing
from _ablation.networks import NETWORKS
from _ablation.reporting import report
from _ablation.rows import OPTIONS, Settings
from _ablation.running import run_missing, verify
from _ablation.training import check_device, set_up
from _arguments import Parser
from _common import run


def main(argv: list[str] | None = None) -> None:
    defaults = Settings()
    cuda = torch.cuda.is_available()
    parser = Parser(description=__doc__)
    parser.add_argument('--out', type=Path, default=Path('results/ablation'), help='default: results/ablation')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/ablation'), help='default: work_dirs/ablation')
    parser.add_argument('--data', type=Path, default=Path('data/fashion_mnist'), help='default: data/fashion_mnist')
    parser.add_argument('--networks', nargs='+', choices=NETWORKS, default=list(NETWORKS), metavar='NAME',
                        help=f'of {", ".join(NETWORKS)} (default: all)')  # fmt: skip
    parser.add_argument('--seeds', nargs='+', type=int, default=list(range(5 if cuda else 3)), metavar='SEED',
                        help='default: 0 to 4 with a GPU, 0 to 2 without')  # fmt: skip
    parser.add_argument('--devices', nargs='+', metavar='DEVICE',
                        help='a process for each: cpu, cuda:0, ... (default: cuda where there is one)')  # fmt: skip
    parser.add_argument('--threads', type=int, help="of each process on the CPU (default: torch's choice)")
    for name in OPTIONS:
        value = getattr(defaults, name)
        parser.add_argument(f'--{name.replace("_", "-")}', type=int, default=value, help=f'default: {value}')
    parser.add_argument('--report', action='store_true', help='train nothing: the table and the plots alone')
    parser.add_argument(
        '--verify',
        nargs=2,
        metavar=('NAME', 'SEED'),
        help='train this run again, on its device and with its threads unless given, and compare',
    )
    args = parser.parse_args(argv)
    if min(args.seeds) < 0:
        parser.error(f'argument --seeds: {min(args.seeds)} must be at least 0')
    if args.threads is not None and args.threads < 1:
        parser.error(f'argument --threads: {args.threads} must be at least 1')
    devices = args.devices or ['cuda' if cuda else 'cpu']
    for device in devices:
        check_device(device)
    if args.verify:
        verify(*args.verify, args.out, args.data, args.devices and args.devices[0], args.threads)
        return
    set_up(args.threads)
    if not args.report:
        settings = Settings(args.train_images, args.epochs, args.test_images, args.batch_size)
        settings.check()
        pairs = [(name, seed) for seed in args.seeds for name in args.networks]
        run_missing(pairs, args.out, args.work_dir, args.data, settings, devices)
        measure_missing(args.out, args.work_dir, args.data, settings)
    for path in report(args.out, args.data):
        print(path)


if __name__ == '__main__':
    run(main)
