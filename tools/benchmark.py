"""Time models side by side, and show what of it is the host's: ours, timm's or torchvision's.

python tools/benchmark.py sknet50 skresnext50_32x4d resnext50_32x4d --baseline resnext50_32x4d --mode both
python tools/benchmark.py sknet50 sknet50:fuse sknet50:compile 'sknet50[sk_kwargs.reduction=32]' torchvision:resnet50
python tools/benchmark.py --set standard   # the README's figures on a CPU (`make bench`)
python tools/benchmark.py --set host       # what Python costs, the GPU path's too, on a CPU (`make bench-host`)
python tools/benchmark.py --set gpu        # those on a GPU (`make bench-gpu`)
python tools/benchmark.py --report results/benchmark_cpu.json --picture results/sknet50_cpu.png  # drawn again

A model is a timm name or torchvision:NAME, with arguments in brackets where wanted, then :fuse
(sk_plugins.fold_batch_norm), :compile (torch.compile) or :stub (the GPU path on a CPU, whose launches compute nothing).
Every repeat times each model once, in turn (A B C A B C ...), so that what slows the machine down for a while slows all
of them. A ratio is the median over the repeats of the ratio within a repeat. The spread is the interquartile range in
per cent of the median.
The weights and the images are random. Memory that is freed stays with the process.

Python calls and operator calls are exact counts. On a CPU, eager models are also timed at 2 x 32 x 32 on one thread,
where a step is mostly the host's work. On a GPU, the report has the time until a step's Python returns, the number of
kernels, and the time of the step replayed as a CUDA graph.
"""

import argparse
from pathlib import Path

from _arguments import Parser
from _benchmark.choosing import check_outputs, check_report, choose
from _benchmark.drawing import draw, draw_networks
from _benchmark.machine import describe_machine, keep_freed_memory
from _benchmark.measuring import measure, say
from _benchmark.readme import renew_table
from _benchmark.reporting import Report, make_report, markdown, read_report, write_report
from _benchmark.sets import SETS
from _benchmark.settings import DTYPES, MEMORY_FORMATS, MODES
from _errors import run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument('models', nargs='*', metavar='MODEL', help='e.g. sknet50, sknet50:fuse, torchvision:resnet50')
    parser.add_argument('--set', choices=SETS, help='the models, modes and settings of a table of figures')
    parser.add_argument('--baseline', help='the model whose figures are 1 (default: the first)')
    parser.add_argument('--mode', choices=[*MODES, 'both'], help='forward pass, training step or both (default: infer)')
    parser.add_argument('--device', choices=['cpu', 'cuda'], help='default: cpu')
    parser.add_argument('--dtype', choices=DTYPES, help='default: float32; with others, autocast')
    parser.add_argument('--memory-format', choices=MEMORY_FORMATS, help='default: channels_last')
    parser.add_argument('--batch-size', type=int, metavar='N', help='default: 8')
    parser.add_argument('--size', type=int, metavar='PIXELS', help='side of the images (default: 224)')
    parser.add_argument('--repeats', type=int, metavar='N', help='default: 15')
    parser.add_argument('--threads', type=int, metavar='N', help="CPU threads (default: torch's)")
    parser.add_argument('--compile', action='store_true', help='torch.compile every model')
    parser.add_argument('--fuse', action='store_true', help='fold_batch_norm for every model (inference only)')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write everything measured there')
    parser.add_argument('--markdown', type=Path, metavar='FILE', help='write the tables there')
    parser.add_argument('--plot', type=Path, metavar='FILE', help='draw the ratios there (PNG, SVG or PDF)')
    parser.add_argument('--picture', type=Path, metavar='FILE', help="draw the networks' times and memory there")
    parser.add_argument(
        '--readme', type=Path, metavar='FILE', help='renew its table of speed from the files beside --json'
    )
    parser.add_argument('--report', type=Path, metavar='FILE', help='measure nothing: take what --json wrote there')
    parser.add_argument('--blank', action='store_true', help="measure nothing: a set's table that says so")
    return parser.parse_args(argv)


def benchmark(args: argparse.Namespace, failures: list[str]) -> Report:
    """Measure what the arguments ask for.

    Of a set, models that fail are left out, and ``failures`` takes why.

    Raises:
        ValueError: an unknown model, a device that isn't there, arguments that don't go together.
    """
    if args.report is not None:
        check_report(args)
        check_outputs(args)
        return read_report(args.report)
    plan = choose(args)
    check_outputs(args)
    if args.blank:
        return make_report(plan.title, plan.settings, [], plan.baseline.label, None, plan.chosen)
    plan.build_models()
    machine = describe_machine(plan.settings.device)
    machine['threads'] = plan.settings.threads or machine['threads']
    if machine['load_average'] and machine['load_average'] > 0.5:
        say(f'the machine is busy (load average {machine["load_average"]}): the spread will tell')
    results = []
    for one, variants in plan.runs.items():
        results += measure(variants, one, plan.settings, failures=failures if args.set else None)
        report = make_report(plan.title, plan.settings, results, plan.baseline.label, machine, plan.chosen)
        if args.json is not None:  # what is measured is not lost where the rest fails
            write_report(report, args.json)
    return report


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    failures: list[str] = []
    report = benchmark(args, failures)
    text = markdown(report)
    if args.json is not None:
        write_report(report, args.json)
    if args.markdown is not None:
        args.markdown.write_text(text, encoding='utf-8')
    if args.plot is not None:
        draw(report, args.plot)
    if args.picture is not None:
        draw_networks(report, args.picture)
    if args.readme is not None:
        renew_table(args.readme, (args.json or args.report).parent)
    print(text, end='')
    if failures:
        raise ValueError(f'not measured, as the report says: {"; ".join(failures)}')


if __name__ == '__main__':
    keep_freed_memory()
    run(main, OSError, ValueError)
