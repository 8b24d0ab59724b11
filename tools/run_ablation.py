"""Train small networks that differ in one thing only, and decide the paper's claims: the page docs/reproduction.md.

python tools/prepare_fashion_mnist.py
pip install '.[study]'
python tools/run_ablation.py --variance 3 3           # where the variance comes from, and how many seeds it takes
python tools/run_ablation.py                          # what is missing of the runs, then the page and its figures
python tools/run_ablation.py --devices cpu cpu --threads 1  # a process for each: two on the CPU, or cuda:0 cuda:1
python tools/run_ablation.py --time                   # how fast: one by one, many seeds at once, in several processes
python tools/run_ablation.py --report                 # the page from the rows that are there
python tools/run_ablation.py --verify k3 0            # train one again, as its row says, and compare

Objects of random sizes lie on canvases: garments on black, on textures and on photographs, and digits. Every run
appends a row to OUT/runs.jsonl as it ends; after a kill, the same command goes on with what is missing. Runs come in
the order of what they are worth, so that a study that is stopped (--minutes) has decided the first claims.
"""

from pathlib import Path

import torch
from _ablation.data import DATA
from _ablation.networks import NETWORKS, SIZES
from _ablation.reporting import OUT, report
from _ablation.rows import LENGTHS, OPTIONS, Run, Settings
from _ablation.running import plan, plan_variance, run_missing, verify
from _ablation.timing import time_ways
from _ablation.training import check_device, set_up
from _arguments import Parser
from _common import run


def main(argv: list[str] | None = None) -> None:
    defaults = Settings()
    cuda = torch.cuda.is_available()
    parser = Parser(description=__doc__)
    parser.add_argument('--out', type=Path, default=Path(OUT), help=f'default: {OUT}')
    parser.add_argument('--page', type=Path, default=Path('docs/reproduction.md'), help='default: docs/reproduction.md')
    parser.add_argument('--data', type=Path, default=Path('data/fashion_mnist'), help='default: data/fashion_mnist')
    parser.add_argument('--sets', nargs='+', choices=DATA, default=list(DATA), metavar='NAME',
                        help=f'of {", ".join(DATA)} (default: all)')  # fmt: skip
    parser.add_argument('--sizes', nargs='+', choices=SIZES, default=list(SIZES), metavar='SIZE',
                        help=f'of {", ".join(SIZES)} (default: both)')  # fmt: skip
    parser.add_argument('--networks', nargs='+', choices=NETWORKS, default=list(NETWORKS), metavar='NAME',
                        help=f'of {", ".join(NETWORKS)} (default: all)')  # fmt: skip
    parser.add_argument('--seeds', nargs='+', type=int, default=list(range(10)), metavar='SEED',
                        help='default: 0 to 9')  # fmt: skip
    parser.add_argument('--devices', nargs='+', metavar='DEVICE',
                        help='a process for each: cpu, cuda:0, ... (default: cuda where there is one)')  # fmt: skip
    parser.add_argument('--threads', type=int, help="of each process on the CPU (default: torch's choice)")
    parser.add_argument('--together', type=int,
                        help='seeds of a network to train at once (default: 10 on a GPU, 1 on a CPU)')  # fmt: skip
    own = {name: dict(zip(LENGTHS, column)) for name, column in zip(OPTIONS, zip(*LENGTHS.values()))}
    for name in OPTIONS:
        value = getattr(defaults, name)
        told = value or ', '.join(f'{count} for {data}' for data, count in own[name].items())
        parser.add_argument(f'--{name.replace("_", "-")}', type=int, default=value, help=f'default: {told}')
    parser.add_argument('--amp', action='store_true', help='bfloat16 where autocast takes it')
    parser.add_argument('--compile', action='store_true', help='torch.compile: half a minute for every network')
    parser.add_argument('--minutes', type=float, help='after which no run is begun')
    parser.add_argument('--variance', nargs=2, type=int, metavar=('WEIGHTS', 'ORDERS'),
                        help="so many seeds of the weights with so many of the images, for claim (a)'s two networks, "
                        'narrow, on the first of --sets')  # fmt: skip
    parser.add_argument('--time', action='store_true', help='train nothing to its end: how fast it would go')
    parser.add_argument('--report', action='store_true', help='train nothing: the page and its figures alone')
    parser.add_argument('--longer', nargs='*', type=int, metavar='SEED',
                        help="with which claim (a)'s networks are trained twice as long too, or none (default: the "
                             'first three of --seeds on scaled, narrow, and the first elsewhere); with --verify: the '
                             'run that was')  # fmt: skip
    parser.add_argument(
        '--verify',
        nargs=2,
        metavar=('NAME', 'SEED'),
        help='train this run of the first of --sets and --sizes again, on its device and with its threads unless '
        'others are given, and compare',
    )
    args = parser.parse_args(argv)
    for name in ('seeds', 'longer'):
        seeds = getattr(args, name)
        if seeds and min(seeds) < 0:
            parser.error(f'argument --{name}: {min(seeds)} must be at least 0')
        if seeds:  # one that is named twice is one run
            setattr(args, name, list(dict.fromkeys(seeds)))
    for name in ('threads', 'together'):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f'argument --{name}: {value} must be at least 1')
    if args.minutes is not None and not args.minutes >= 0:
        parser.error(f'argument --minutes: {args.minutes:g} must be at least 0')
    if args.verify and not args.verify[1].isdecimal():
        parser.error(f'argument --verify: SEED {args.verify[1]!r} must be a whole number')
    if args.variance and min(args.variance) < 2:
        parser.error(f'argument --variance: {min(args.variance)} must be at least 2')
    devices = args.devices or ['cuda' if cuda else 'cpu']
    for device in devices:
        check_device(device)
    rows = args.out / ('variance.jsonl' if args.variance else 'runs.jsonl')
    if args.verify:
        name, seed = args.verify
        again = Run(name, int(seed), args.sets[0], args.sizes[0], longer=args.longer is not None)
        verify(again, rows, args.data, args.devices and args.devices[0], args.threads)
        return
    set_up(args.threads)
    together = args.together or (10 if devices[0].startswith('cuda') else 1)
    settings = Settings(args.train_images, args.epochs, args.test_images, args.batch_size, amp=args.amp)
    for name in args.sets:
        settings.on(name).check()
    if args.time:
        time_ways(devices, settings, max(together, 2), args.sizes[0], args.compile)
        return
    if not args.report:
        runs = (
            plan_variance(*args.variance, args.sets[0])
            if args.variance
            else plan(args.networks, args.sets, args.sizes, args.seeds, together, args.longer)
        )
        run_missing(
            runs, rows, args.data, settings, devices, together, args.minutes,
            compiled=args.compile, probe=bool(args.variance),
        )  # fmt: skip
    for path in report(args.out, args.page):
        print(path)


if __name__ == '__main__':
    run(main)
