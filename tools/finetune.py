"""Train a network on your own images: from a folder to a model, a report and the commands that come next.

python tools/finetune.py flowers/
python tools/finetune.py labels.csv --model sknet26 --from-scratch --epochs 50
python tools/finetune.py flowers/ --resume

FOLDER holds a folder of images for each class, in train/ and val/ or without; a fifth is held out then. A list, .csv,
.tsv, .json or .jsonl, names images and labels, several in a row (cat;dog) or a column for each. A folder with
metadata.csv or .jsonl, as the Hub's image folders have it, is read too.

All is checked before the first step. What is chosen is printed, and each choice has an option. The run is a config of
mmengine's in the work dir, which tools/train.py and tools/test.py take.
"""

import argparse
import contextlib
import os
import re
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from _arguments import Parser
from _lock import lock
from _quiet import quiet_imports


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    hints = {
        '--lr-scale': '; near it is --lr',
        '--learning-rate': '; it is called --lr',
        '--img-size': '; it is called --size',
        '--batch': '; it is called --batch-size',
        '--pretrained': ': the published weights are the default; --weights names others',
        '--engine': ': the engine is mmengine; docs/own_images.md has a loop with timm alone',
    }
    parser = Parser(description=__doc__, hints=hints)
    parser.add_argument('folder', type=Path, metavar='FOLDER', help='of images, or a list of images and labels')
    parser.add_argument('--model', default='sknet50', help="a network's name, or a config (default: sknet50)")
    parser.add_argument('--work-dir', type=Path, help='folder for all that is written (default: work_dirs/FOLDER)')
    parser.add_argument('--resume', action='store_true', help='go on with the run in the work dir')
    start = parser.add_argument_group('where it starts')
    start.add_argument('--weights', metavar='SOURCE', help='a file, an address, or hf-hub:OWNER/NAME')
    start.add_argument('--from-scratch', action='store_true', help='start from random weights')
    start.add_argument('--warm-start', action='store_true', help='ShuffleNetV2: start from its plain counterpart')
    start.add_argument('--freeze', type=int, default=-1, metavar='STAGES', help='0 the stem, 1 and on so many stages')
    recipe = parser.add_argument_group('recipe', 'chosen for the images where not given')
    recipe.add_argument('--epochs', type=int)
    recipe.add_argument('--patience', type=int, help='epochs without a better score after which it stops')
    recipe.add_argument('--size', type=int, help='side of the input in pixels')
    recipe.add_argument('--batch-size', type=int)
    recipe.add_argument('--lr', type=float, help='learning rate')
    recipe.add_argument('--weight-decay', type=float)
    recipe.add_argument('--layer-decay', type=float, help="the learning rate's factor from a layer to that below it")
    recipe.add_argument('--flip', action=argparse.BooleanOptionalAction, help='mirror images at random')
    recipe.add_argument('--val-share', type=float, default=0.2, help='held out where there is no val/ (default: 0.2)')
    recipe.add_argument('--seed', type=int, default=0)
    machine = parser.add_argument_group('machine')
    machine.add_argument('--device', help='cpu, cuda or cuda:N (default: a GPU where there is one)')
    machine.add_argument('--amp', action=argparse.BooleanOptionalAction, help='mixed precision (default: on a GPU)')
    machine.add_argument('--workers', type=int, help='processes that read images')
    parser.add_argument('--export', action='store_true', help='write the folder for the Hub, WORK_DIR/hub, at the end')
    parser.add_argument(
        '--cfg-options', nargs='+', metavar='KEY=VALUE', default=[], help="other settings of the run's config"
    )
    args = parser.parse_args(argv)
    check_args(parser, args)
    args.command = shlex.join(['sk-plugins', 'finetune', *(sys.argv[1:] if argv is None else argv)])
    return args


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name, least in dict(epochs=1, patience=1, size=16, batch_size=2, workers=0, seed=0, freeze=-1).items():
        value = getattr(args, name)
        if value is not None and value < least:
            why = ': the attention has a BatchNorm, which needs two images' if name == 'batch_size' else ''
            parser.error(f'argument --{name.replace("_", "-")}: {value} must be at least {least}{why}')
    for name, least, most in (('lr', 0, 10), ('layer_decay', 0, 1), ('val_share', 0, 0.9), ('weight_decay', -1e-9, 1)):
        value = getattr(args, name)
        if value is not None and not least < value <= most:
            parser.error(
                f'argument --{name.replace("_", "-")}: {value} must be above {max(least, 0)} and at most {most}'
            )
    starts = [
        f'--{name.replace("_", "-")}' for name in ('weights', 'from_scratch', 'warm_start') if getattr(args, name)
    ]
    if len(starts) > 1:
        parser.error(f'{" and ".join(starts)} do not go together')
    if args.device is not None and not re.fullmatch(r'cpu|cuda(:\d+)?', args.device):
        parser.error(f'argument --device: {args.device!r} must be cpu, cuda or cuda:N')


def set_device(device: str | None, amp: bool | None) -> str:
    """Where it runs, of what is there; torch and mmengine see no other GPU from then on.

    Raises:
        ValueError: there is no such device, or no mixed precision on it.
    """
    if device == 'cpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''
    elif device is not None and ':' in device:
        number = device.partition(':')[2]
        visible = os.environ.get('CUDA_VISIBLE_DEVICES')  # a scheduler's choice, whose first is cuda:0
        if visible:
            listed = visible.split(',')
            if int(number) >= len(listed):
                raise ValueError(f'--device {device}: CUDA_VISIBLE_DEVICES={visible} leaves {len(listed)}, from cuda:0')
            number = listed[int(number)]
        os.environ['CUDA_VISIBLE_DEVICES'] = number
    import torch

    there = torch.cuda.is_available()
    if device is not None and device != 'cpu' and not there:
        raise ValueError(f'--device {device}: torch {torch.__version__} finds no such GPU')
    found = 'cuda' if there and device != 'cpu' else 'cpu'
    if amp and found == 'cpu':
        raise ValueError('--amp: mmengine trains with mixed precision on GPUs and the like, not on CPUs')
    return found


def read_options(words: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` as the other tools read them."""
    from _common import OverrideAction

    parser = Parser(usage='finetune ... --cfg-options KEY=VALUE ...')
    parser.add_argument('--cfg-options', nargs='+', action=OverrideAction, default={})
    return parser.parse_args(['--cfg-options', *words] if words else []).cfg_options


def default_work_dir(folder: Path) -> Path:
    return Path('work_dirs', folder.resolve().stem if folder.is_file() else folder.resolve().name)


def prepare(args: argparse.Namespace, work_dir: Path, device: str) -> dict[str, Any]:
    """Check all, choose, and write the run's config; returns what the report and the card say of the run."""
    from _common import merge_options
    from _finetune import checking, configs, data, exporting, settings

    from sk_plugins._files import write_atomically

    # What a run that failed at its start leaves behind, a config without a checkpoint, is written over.
    failed = (work_dir / exporting.RUN).is_file() and not any(work_dir.glob('*.pth'))
    if (work_dir / 'config.py').is_file() and not failed:
        raise FileExistsError(
            f'{work_dir}: holds a run already: --resume goes on with it, --work-dir names another folder'
        )
    images = data.read(args.folder)
    network = settings.choose_network(args.model, args.weights, args.from_scratch, args.warm_start, args.freeze)
    images, facts = checking.check_images(images, sys.stderr.isatty())
    split = not images.val
    if split:
        images = data.split(images, args.val_share, args.seed)
    images = replace(images, notes=(*images.notes, *checking.find_leaks(images, facts)))
    checking.check_disk(work_dir, network.parameters, copies=3)
    loaded = settings.load_weights(network)
    network = settings.with_preprocessing(network)
    given = {key: getattr(args, key) for key in settings.Recipe.__dataclass_fields__ if hasattr(args, key)}
    recipe = settings.choose_recipe(images, facts, network, device, {**given, 'batch_size': args.batch_size})
    options = read_options(args.cfg_options)
    while True:
        lists = tuple(work_dir / f'{name}.{"json" if images.multi_label else "txt"}' for name in ('train', 'val'))
        cfg = configs.build_config(images, network, recipe, lists, work_dir, args.seed)
        merge_options(cfg, options)
        try:
            seconds = checking.try_step(cfg, recipe.batch, recipe.size, device, recipe.amp)
            break
        except checking.TooLargeError as error:
            smaller = recipe.batch // 2
            if args.batch_size is not None or smaller < 2:
                raise ValueError(
                    f'a batch of {recipe.batch} images of {recipe.size} x {recipe.size} does not fit into the memory '
                    f'({error}): --batch-size or --size make it smaller'
                ) from error
            print(f'a batch of {recipe.batch} does not fit into the memory: {smaller}', flush=True)
            given['batch_size'] = smaller
            recipe = settings.choose_recipe(images, facts, network, device, given)
    for line in settings.describe(images, facts, network, loaded, recipe, seconds):
        print(line)
    for note in images.notes:
        print(f'note: {note}')
    sys.stdout.flush()
    configs.write_lists(images, work_dir)
    run = dict(
        command=args.command,
        data=args.folder.resolve().name,
        model=args.model,
        source=network.source,
        license=network.license,
        loaded=None if loaded is None else len(loaded.loaded),
        classes=list(images.classes),
        multi_label=images.multi_label,
        train_images=len(images.train),
        val_images=len(images.val),
        split=f'{args.val_share:g} of each class held out, seed {args.seed}' if split else "the folder's or list's own",
        notes=list(images.notes),
        epochs=recipe.epochs,
    )
    exporting.write_run(work_dir, **run)
    with write_atomically(work_dir / 'config.py') as partial:  # the last: with it, there is a run
        cfg.dump(str(partial))
    return run


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_args(argv)
    work_dir = args.work_dir or default_work_dir(args.folder)
    # A run that there is not is the error of --resume, not its folder.
    alone = (
        contextlib.nullcontext()
        if args.resume and not work_dir.is_dir()
        else lock(work_dir / 'finetune.lock', '--work-dir')
    )
    try:
        with alone:
            return run_all(args, work_dir)
    except KeyboardInterrupt:
        if any(work_dir.glob('epoch_*.pth')):
            said = f'the epochs so far are kept: {command(args, work_dir)} --resume goes on'
        else:
            said = 'no epoch is over, so the same command begins again'
        print(f'stopped: {said}', flush=True)
        raise SystemExit(130) from None


def command(args: argparse.Namespace, work_dir: Path) -> str:
    """The words that name this run."""
    where = '' if args.work_dir is None else f' --work-dir {shlex.quote(str(work_dir))}'
    return f'sk-plugins finetune {shlex.quote(str(args.folder))}{where}'


def check_resumed(args: argparse.Namespace, run: dict[str, Any], work_dir: Path) -> None:
    """What goes on is the run as it was begun.

    Raises:
        ValueError: the run is of other data, or an option was given another value than then.
    """
    if args.folder.resolve().name != run['data']:
        raise ValueError(f'{work_dir}: holds a run on {run["data"]}, not on {args.folder}: --work-dir names another')
    begun = parse_args(shlex.split(run['command'])[2:])
    free = ('folder', 'work_dir', 'resume', 'export', 'device', 'command')
    default = parse_args([str(args.folder)])
    for name, value in vars(args).items():
        if name not in free and value not in (getattr(default, name), getattr(begun, name)):
            raise ValueError(
                f'--{name.replace("_", "-")} {value}: --resume goes on with the run as it was begun '
                f'({run["command"]}); --work-dir begins another'
            )


def run_all(args: argparse.Namespace, work_dir: Path) -> dict[str, Any]:
    """Check, train and report; returns the metrics."""
    started = time.perf_counter()
    device = set_device(args.device, args.amp)
    with quiet_imports():
        import sk_plugins.mmpretrain_models  # noqa: F401
    if args.resume:
        from _finetune import exporting

        run = exporting.read_run(work_dir)
        check_resumed(args, run, work_dir)
    else:
        run = prepare(args, work_dir, device)
    from _common import read_config
    from _finetune import configs, exporting, reporting, training
    from _finetune.settings import say_time

    score = 'mAP' if run['multi_label'] else 'top-1'
    cfg = read_config(work_dir / 'config.py')
    cfg.work_dir = str(work_dir)
    runner, hook = training.build(cfg, args.resume, configs.MONITOR[run['multi_label']], score)
    try:
        best = training.train(runner, hook)
        if args.resume and not hook.trained:
            print(f'all {run["epochs"]} epochs are over, or it stopped early: there is nothing to go on with')
    except training.Stopped as stopped:
        print(
            f'stopped after {stopped.epochs} of {run["epochs"]} epochs: {command(args, work_dir)} --resume '
            f'{"goes on" if stopped.epochs else "begins again"}',
            flush=True,
        )
        raise SystemExit(130) from None
    found = reporting.predict(runner, training.find_best(work_dir), run['multi_label'])
    metrics = reporting.write(found, work_dir / 'report')
    exporting.write_run(work_dir, **{**run, 'metrics': metrics, 'best_epoch': best.epoch})
    value = metrics['mAP' if run['multi_label'] else 'top1']
    total = metrics['images']
    print(
        f'best: {score} {value:.1f} % (epoch {best.epoch} of {run["epochs"]}), {total - metrics["mistakes"]} of '
        f'{total} images right, in {say_time(time.perf_counter() - started)}'
    )
    log = work_dir / runner.timestamp
    print(f'report: {work_dir / "report"}: classes, confusion_matrix, mistakes (.csv, .png); log: {log}')
    if args.export:
        print(f'exported: {exporting.refresh(work_dir)}')
    quoted = shlex.quote(str(work_dir))
    print(f'next: sk-plugins predict {quoted} IMAGES')
    print(f'      sk-plugins export {quoted} hub {shlex.quote(Path(run["data"]).stem + "_hub")}')
    print(f'      sk-plugins push {quoted} OWNER/NAME')
    return metrics


if __name__ == '__main__':
    with quiet_imports():
        from _common import run

    run(main)
