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
import importlib.util
import json
from dataclasses import fields, replace
from pathlib import Path

from _benchmark.drawing import draw, draw_networks
from _benchmark.machine import describe_machine, keep_freed_memory
from _benchmark.measuring import measure, say
from _benchmark.models import Variant
from _benchmark.readme import insert, read_reports, speed_table
from _benchmark.reporting import Report, make_report, markdown
from _benchmark.sets import SETS
from _benchmark.settings import DTYPES, HOST, MEMORY_FORMATS, MODES, Run, Settings
from _errors import run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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


def choose_settings(args: argparse.Namespace, default: Settings) -> Settings:
    """The default with what the arguments say.

    Raises:
        ValueError: what cannot be run here.
    """
    given = {f.name: getattr(args, f.name) for f in fields(Settings) if getattr(args, f.name, None) is not None}
    settings = replace(default, **given)
    if not args.blank:
        settings.check()
    return settings


def choose_models(args: argparse.Namespace) -> tuple[list[Variant], Variant]:
    """The models of the command line and their baseline.

    Raises:
        ValueError: a model that is misspelt, given twice, or fused for training; a baseline that is none of them.
    """
    if not args.models:
        raise ValueError('name the models to compare, or a --set of them')
    variants = [Variant.parse(text, args.fuse, args.compile) for text in args.models]
    for i, variant in enumerate(variants):
        if variant in variants[:i]:
            raise ValueError(f'model={variant.label!r} is given twice')
        if variant.fuse and args.mode not in (None, 'infer'):
            raise ValueError(f'model={variant.label!r}: fuse is for inference, got --mode {args.mode}')
    if args.baseline is None:
        return variants, variants[0]
    baseline = Variant.parse(args.baseline, args.fuse, args.compile)
    if baseline not in variants:
        models = ', '.join(variant.label for variant in variants)
        raise ValueError(f'--baseline {args.baseline} is not one of the models: {models}')
    return variants, baseline


def choose_runs(args: argparse.Namespace, variants: list[Variant], settings: Settings) -> dict[Run, list[Variant]]:
    """A run for each mode; on a CPU, another of small images, where the host's part shows."""
    modes = MODES if args.mode == 'both' else [args.mode or 'infer']
    runs = {Run(mode): variants for mode in modes}
    eager = [variant for variant in variants if not variant.compile]
    if settings.device == 'cpu' and settings.size > HOST['size'] and eager:
        runs.update({Run(mode, **HOST): eager for mode in modes})
    return runs


def check_outputs(args: argparse.Namespace) -> None:
    """Before minutes of measuring, that its outcome can be written."""
    for path in filter(None, (args.json, args.markdown, args.plot, args.picture)):
        if path.is_dir():
            raise ValueError(f'{path} is a folder: a file is needed')
        path.parent.mkdir(parents=True, exist_ok=True)
    for option in ('plot', 'picture'):
        path = getattr(args, option)
        if path is None:
            continue
        if path.suffix.lower() not in ('.png', '.svg', '.pdf'):
            raise ValueError(f'--{option} {path}: the name must end in .png, .svg or .pdf')
        if importlib.util.find_spec('matplotlib') is None:
            raise ValueError(f"--{option} needs matplotlib, which is not installed (it comes with the extra 'mm')")
    if args.readme is not None and args.json is None and args.report is None:
        raise ValueError('--readme reads the files beside --json or --report: give one of them')


def benchmark(args: argparse.Namespace) -> Report:
    """Measure what the arguments ask for.

    Raises:
        ValueError: an unknown model, a device that isn't there, arguments that don't go together.
    """
    if args.report is not None:
        check_outputs(args)
        return json.loads(args.report.read_text(encoding='utf-8'))
    chosen = SETS.get(args.set)
    if chosen is not None:
        for option in ('models', 'baseline', 'mode', 'fuse', 'compile'):
            if getattr(args, option):
                name = 'models' if option == 'models' else f'--{option}'
                raise ValueError(f'--set {args.set} brings its own models and modes: leave {name} out')
        settings = choose_settings(args, chosen.settings)
        title, baseline, runs = chosen.title, Variant.parse(chosen.baseline), chosen.runs()
    else:
        if args.blank:
            raise ValueError('--blank is for a --set')
        variants, baseline = choose_models(args)
        settings = choose_settings(args, Settings())
        title, runs = 'Benchmark', choose_runs(args, variants, settings)
    if any(run.mode == 'train' for run in runs) and settings.batch_size < 2 and not args.blank:
        raise ValueError('--batch-size 1: a training step needs two images or more, for the BatchNorms')
    stubs = [variant.label for variants in runs.values() for variant in variants if variant.stub]
    if stubs and settings.device != 'cpu':
        raise ValueError(f'model={stubs[0]!r}: :stub stands for a GPU on a CPU, got --device {settings.device}')
    check_outputs(args)
    if args.blank:
        return make_report(title, settings, [], baseline.label, None, chosen)
    # A model that can't be built is to be found now, not after minutes.
    for variant in dict.fromkeys(replace(v, fuse=False, compile=False, stub=False) for vs in runs.values() for v in vs):
        variant.build()
    machine = describe_machine(settings.device)
    machine['threads'] = settings.threads or machine['threads']
    if machine['load_average'] and machine['load_average'] > 0.5:
        say(f'the machine is busy (load average {machine["load_average"]}): the spread will tell')
    results = [result for one, variants in runs.items() for result in measure(variants, one, settings)]
    return make_report(title, settings, results, baseline.label, machine, chosen)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    report = benchmark(args)
    text = markdown(report)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + '\n', encoding='utf-8')
    if args.markdown is not None:
        args.markdown.write_text(text, encoding='utf-8')
    if args.plot is not None:
        draw(report, args.plot)
    if args.picture is not None:
        draw_networks(report, args.picture)
    if args.readme is not None:
        table = speed_table(*read_reports((args.json or args.report).parent))
        args.readme.write_text(insert(args.readme.read_text(encoding='utf-8'), table), encoding='utf-8')
    print(text, end='')


if __name__ == '__main__':
    keep_freed_memory()
    run(main, OSError, ValueError)
