"""What the command line asks for: the models, their settings and runs; everything that cannot be is found here."""

import argparse
import importlib.util
from dataclasses import dataclass, fields, replace

from .models import Variant
from .readme import BEGIN, END
from .sets import SETS, Set
from .settings import HOST, MODES, Run, Settings


@dataclass(frozen=True)
class Plan:
    """The models of each run, their common settings and baseline; ``chosen`` are the figures of ``--set``, if any."""

    title: str
    settings: Settings
    baseline: Variant
    runs: dict[Run, list[Variant]]
    chosen: Set | None = None

    def build_models(self) -> None:
        """Build every model once, for one that can't be built is to be found now, not after minutes.

        Raises:
            ValueError: a model is unknown, or does not take its arguments.
        """
        variants = (variant for run in self.runs.values() for variant in run)
        for variant in dict.fromkeys(replace(v, fuse=False, compile=False, stub=False) for v in variants):
            variant.build()


def choose(args: argparse.Namespace) -> Plan:
    """What the arguments of ``tools/benchmark.py`` ask for.

    Raises:
        ValueError: a model that is misspelt, given twice, or fused for training; a baseline that is none of them; a
            device that isn't there; arguments that don't go together.
    """
    chosen = SETS.get(args.set)
    if chosen is not None:
        for option in ('models', 'baseline', 'mode', 'fuse', 'compile'):
            if getattr(args, option):
                name = 'models' if option == 'models' else f'--{option}'
                raise ValueError(f'--set {args.set} brings its own models and modes: leave {name} out')
        settings = choose_settings(args, chosen.settings)
        plan = Plan(chosen.title, settings, Variant.parse(chosen.baseline), chosen.runs(), chosen)
    else:
        if args.blank:
            raise ValueError('--blank is for a --set')
        variants, baseline = choose_models(args)
        settings = choose_settings(args, Settings())
        plan = Plan('Benchmark', settings, baseline, choose_runs(args, variants, settings))
    if any(run.mode == 'train' for run in plan.runs) and settings.batch_size < 2 and not args.blank:
        raise ValueError('--batch-size 1: a training step needs two images or more, for the BatchNorms')
    stubs = [variant.label for variants in plan.runs.values() for variant in variants if variant.stub]
    if stubs and settings.device != 'cpu':
        raise ValueError(f'model={stubs[0]!r}: :stub stands for a GPU on a CPU, got --device {settings.device}')
    return plan


def choose_settings(args: argparse.Namespace, default: Settings) -> Settings:
    """The default with what the arguments say.

    Raises:
        ValueError: what cannot be run here.
    """
    given = {f.name: getattr(args, f.name) for f in fields(Settings) if getattr(args, f.name, None) is not None}
    settings = replace(default, **given)
    settings.check(runs=not args.blank)
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


def check_report(args: argparse.Namespace) -> None:
    """Raises ValueError where ``--report``, which measures nothing, stands beside what is to be measured."""
    names = ('models', 'set', 'baseline', 'mode', 'compile', 'fuse', 'blank', *(f.name for f in fields(Settings)))
    for option in names:
        value = getattr(args, option, None)
        if value is not None and value is not False and value != []:
            name = 'models' if option == 'models' else f'--{option.replace("_", "-")}'
            raise ValueError(f'--report measures nothing, and takes what was measured: leave {name} out')


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
    if args.readme is not None:
        text = args.readme.read_text(encoding='utf-8')
        for mark in (BEGIN, END):
            if text.count(mark) != 1:
                raise ValueError(
                    f'--readme {args.readme}: must have the line {mark!r} once, not {text.count(mark)} times'
                )
