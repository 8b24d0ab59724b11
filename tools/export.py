"""Write a network for a runtime, or a folder for the Hub.

sk-plugins export sknet50 onnx sknet50.onnx --pretrained --check --benchmark
sk-plugins export work_dirs/flowers openvino flowers.xml --int8 data/flowers/train --accuracy data/flowers/val
sk-plugins export sknet50_in1k torchscript sknet50.ts --checkpoint work_dirs/sknet50_in1k/epoch_100.pth
sk-plugins export work_dirs/flowers hub flowers_hub

MODEL is a name of timm's (ours are among them), local-dir:FOLDER, hf-hub:OWNER/NAME, the work dir of a run of
finetune, or the config of a classifier, from which come the network, its classes and its preprocessing. What images
were preprocessed with, and the classes' names, go into the file or beside it.
TARGET hub takes the work dir of a run of finetune: weights as safetensors, config, label names, card, pictures. timm
loads it by local-dir:FOLDER; tools/push.py uploads it. Other checkpoints: tools/convert_checkpoint.py.
docs/deployment.md says what each target was tried with.
"""

import argparse
import contextlib
import functools
import itertools
import json
import logging
import os
import shlex
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from _arguments import Parser
from _errors import run
from _export import FIXED_IN_INT8, INT8, TARGET_NAMES
from _quiet import quiet_imports

from sk_plugins._text import first_lines, nearest
from sk_plugins.weights import CheckpointError, HubError

HUB = 'hub'
BATCHES = (1, 8)
FOLDERS = ('coreml', 'ncnn')
OPSETS = ('onnx', 'tensorrt')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    flag = argparse.BooleanOptionalAction
    parser.add_argument('model', metavar='MODEL', help='a name of timm, local-dir:, hf-hub:, a work dir, or a config')
    parser.add_argument('target', metavar='TARGET', help=', '.join((HUB, *TARGET_NAMES)))
    parser.add_argument('out', type=Path, metavar='OUT', nargs='?', help='the file (for hub, ncnn, coreml: folder)')
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument('--checkpoint', metavar='FILE|hf-hub:OWNER/NAME', help='of mmengine, timm or a state dict')
    weights.add_argument('--pretrained', action='store_true', help="timm's published weights of the model")
    parser.add_argument('--license', help='hub: of the weights (default: that of those the run started from)')
    parser.add_argument('--size', type=int, help="side of the image (default: the model's)")
    parser.add_argument('--batch', type=int, help='images in a batch of a static file (default: 1)')
    parser.add_argument(
        '--dynamic', action=flag, help='leave batch and image size open (default: what of them the target can)'
    )
    parser.add_argument('--features', action='store_true', help="feature maps, as timm's features_only, not logits")
    parser.add_argument('--preprocess', action='store_true', help='take (batch, height, width, 3) uint8 RGB')
    parser.add_argument('--opset', type=int, help="onnx: ONNX's operator set (default: torch's current)")
    parser.add_argument(
        '--int8', type=Path, metavar='FOLDER', help=f'8 bits, calibrated by these images ({", ".join(INT8)})'
    )
    parser.add_argument('--int8-images', type=int, default=128, help='how many of them (default: 128)')
    parser.add_argument(
        '--int8-float', choices=['nothing', 'attention', 'select', 'both'], help='what of SK units stays in float'
    )
    parser.add_argument('--check', action='store_true', help='run the file in its runtime, compare with eager mode')
    parser.add_argument('--benchmark', action='store_true', help=f'time it beside eager mode, batches {BATCHES}')
    parser.add_argument('--accuracy', type=Path, metavar='FOLDER', help='top-1 on FOLDER/CLASS/*, beside eager mode')
    parser.add_argument('--threads', type=int, default=min(2, os.cpu_count() or 1), help='of --benchmark')
    parser.add_argument('--json', type=Path, help='append what was found to this file, a line')
    args = parser.parse_args(argv)
    if args.target not in (HUB, *TARGET_NAMES):
        parser.error(f'there is no target {args.target!r}{nearest(args.target, dict.fromkeys((HUB, *TARGET_NAMES)))}')
    if args.target == HUB:
        given = [word for word in vars(args) if _is_given(parser, args, word)]
        if given:
            parser.error(f'argument --{given[0].replace("_", "-")}: not for the target hub')
        return args
    if args.out is None:
        parser.error('the following arguments are required: OUT')
    if args.license is not None:
        parser.error('argument --license: for the target hub')
    for name in ('size', 'batch', 'int8_images', 'threads'):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f'argument --{name.replace("_", "-")}: {value} must be at least 1')
    if args.opset is not None and args.target not in OPSETS:
        parser.error(f'argument --opset: for {_listed(OPSETS)}, not {args.target}')
    if args.int8 is not None and args.target not in INT8:
        parser.error(f'argument --int8: for {_listed(INT8)}, not {args.target}')
    for name in ('int8_float', 'int8_images'):
        if args.int8 is None and _is_given(parser, args, name):
            parser.error(f'argument --{name.replace("_", "-")}: needs --int8 FOLDER')
    if args.json is not None and not args.json.resolve().parent.is_dir():
        parser.error(f'argument --json: {args.json.parent} is no folder')
    if args.batch is not None and args.dynamic:
        parser.error('argument --batch: not with --dynamic, which leaves the batch open')
    if args.features and (args.int8 or args.accuracy):
        parser.error(f'argument --features: not with --{"int8" if args.int8 else "accuracy"}')
    return args


def _listed(words: Iterable[str]) -> str:
    *others, last = words
    return f'{", ".join(others)} and {last}'


def _is_given(parser: argparse.ArgumentParser, args: argparse.Namespace, name: str) -> bool:
    return name not in ('model', 'target', 'out', 'license') and getattr(args, name) != parser.get_default(name)


def _check_target(args: argparse.Namespace) -> frozenset[str]:
    """What stays open in the file.

    Raises:
        ValueError: an option that the target cannot, or packages that are missing.
    """
    from _export.targets import TARGETS

    target = TARGETS[args.target]
    if args.out.suffix != target.suffix and target.suffix:
        raise ValueError(f'{args.out} must end in {target.suffix} for the target {args.target}')
    if args.out.is_file() and args.target in FOLDERS:
        raise FileExistsError(f'{args.out}: is a file, and {args.target} writes a folder')
    if args.out.parent.exists() and not args.out.parent.is_dir():
        raise NotADirectoryError(f'{args.out}: {args.out.parent} is no folder')
    if args.dynamic and target.dynamic != {'batch', 'size'}:
        can = 'leaves the batch open, not the size' if target.dynamic else 'is of one batch and size'
        raise ValueError(f'--dynamic: a file for {args.target} {can}')
    if args.preprocess and target.uint8:
        raise ValueError(f'--preprocess: {target.uint8}')
    if args.target == 'ncnn' and (args.batch or 1) > 1:
        raise ValueError(f'--batch {args.batch}: ncnn takes one image at a time')
    asked = [name for name in ('check', 'benchmark', 'accuracy') if getattr(args, name)]
    # A file that is only read, or for which another is run, tells neither its time nor its accuracy.
    refused = [name for name in asked if name != 'check'] if target.inspect or target.runs else []
    if refused:
        raise ValueError(
            f'--{refused[0]}: {target.title} cannot be run on this machine; without it the file is written'
        )
    target.require()
    if args.int8 or asked:
        from _export.targets import require

        packages = list(INT8[args.target]) if args.int8 else []
        if args.target in ('onnx', 'tensorrt'):
            packages.append('onnxruntime')
        require(*packages, extra=target.extra or 'int8', environment=target.environment)
    if args.dynamic is False or args.batch is not None:
        return frozenset()
    return target.dynamic - (FIXED_IN_INT8.get(args.target, frozenset()) if args.int8 else frozenset())


@contextlib.contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A name to write under; what is written, and what lies beside it then, comes to ``out`` only if all goes well."""
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f'{out}: is a folder with files; name a new one')
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{out.name}.', suffix='.part', dir=out.parent) as folder:
        yield Path(folder, out.name)
        umask = os.umask(0)
        os.umask(umask)
        for written in Path(folder).iterdir():
            place = out.parent / written.name
            if place.is_dir():
                shutil.rmtree(place)
            if written.is_file():
                written.chmod(0o666 & ~umask)
            os.replace(written, place)


def main(argv: list[str] | None = None) -> Path:
    args = parse_args(argv)
    if args.target == HUB:
        with quiet_imports():
            from _finetune.exporting import export

        out = export(Path(args.model), args.out or Path(args.model) / 'hub', args.license)
        print(f"{out}: timm.create_model('local-dir:{out}', pretrained=True) loads it")
        return out
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning, UserWarning):  # the exporters' own, of their insides
            warnings.simplefilter('ignore', category)
        logging.getLogger('torch.onnx').setLevel(logging.ERROR)
        _export(args)
    return args.out


def _export(args: argparse.Namespace) -> None:
    dynamic = _check_target(args)
    from _export import int8
    from _export.dense import Heads
    from _export.deployable import build_named, prepare
    from _export.running import TOLERANCE, difference, times
    from _export.targets import TARGETS, can_build_engines, trtexec

    target = TARGETS[args.target]
    images = int8.find_images(args.int8) if args.int8 else []
    net, preprocessing = build_named(args.model, args.checkpoint, args.pretrained, args.features)
    if args.accuracy and isinstance(net, Heads):
        raise ValueError(f'--accuracy: for classifiers, and {args.model} is a {type(net.model).__name__}')
    deployable = prepare(net, preprocessing, args.model, args.size, args.batch, dynamic, args.preprocess, args.features)
    channels = preprocessing['input_size'][0]
    if (args.int8 or args.accuracy) and channels != 3:
        raise ValueError(
            f'--{"int8" if args.int8 else "accuracy"}: reads RGB images, and {args.model} has {channels} input channels'
        )
    labels = json.loads(deployable.metadata.get('labels', 'null'))
    examples = []
    if args.accuracy:
        classes = _eager(deployable)(deployable.random(1, *deployable.size)).shape[1]
        examples = int8.labelled(args.accuracy, labels, classes)
    found: dict[str, object] = {'model': args.model, 'target': args.target, 'dynamic': sorted(dynamic)}
    options: dict[str, Any] = {'opset': args.opset} if args.target in OPSETS else {}
    write = functools.partial(target.write, **options)
    if args.int8:
        step = max(1, len(images) // args.int8_images)
        number = 1 if 'batch' in dynamic else len(deployable.image)
        read = int8.read_images(images[::step][: args.int8_images], deployable)
        chosen = [image.expand(number, *image.shape[1:]).contiguous() for image in read]
        found['int8'] = args.int8_float or 'nothing'
        keep = int8.KEEP[found['int8']]
        write = functools.partial(int8.QUANTISERS[args.target], images=chosen, keep=keep, **options)
    with _whole(args.out) as partial:
        try:
            write(deployable, partial)
        except (ValueError, OSError):
            raise
        except Exception as error:  # each exporter's own kinds
            hint = '; --no-dynamic writes a file of one batch and size' if dynamic else ''
            raise ValueError(f'{target.title} cannot take {args.model}: {first_lines(error)}{hint}') from error
        if args.check and target.load is None:
            print(f'{target.inspect(deployable, partial)}: converted, and not run on this machine')
        elif args.check:
            # A quantised file is for images like those that it was calibrated by, not for noise.
            apart = difference(deployable, target.run(partial, args.threads), chosen[:16] if args.int8 else None)
            found['difference'] = apart
            of = ', '.join('x'.join(map(str, shape)) for shape in deployable.shapes())
            of = 'calibration images' if args.int8 else of
            runs = f', {target.runs}' if target.runs else ''
            print(f'largest difference from eager mode: {apart:.2g} of the largest output ({of}{runs})')
            if not args.int8 and not apart <= TOLERANCE:
                raise ValueError(f"--check: the file's outputs differ from eager mode's by {apart:.2g} > {TOLERANCE:g}")
        if args.accuracy:
            found['accuracy'] = _accuracy(deployable, target.run(partial, args.threads), examples)
        if args.benchmark:
            torch.set_num_threads(args.threads)
            runners = {'file': target.run(partial, args.threads), 'eager': _eager(deployable)}
            batches = list(BATCHES) if 'batch' in dynamic else [len(deployable.image)]
            found['milliseconds'] = times(deployable, runners, batches)
            for name, by_batch in found['milliseconds'].items():
                print(f'{name}: ' + ', '.join(f'batch {batch}: {ms:.1f} ms' for batch, ms in by_batch.items()))
    if args.target == 'tensorrt' and not can_build_engines():
        onnx = args.out.with_suffix('.onnx')
        print(f'{onnx}; no GPU with trtexec here: on a machine that has them')
        print(shlex.join(trtexec(deployable, onnx, args.out)))
    else:
        print(args.out)
    if args.json:
        with args.json.open('a', encoding='utf-8') as file:
            file.write(json.dumps(found) + '\n')


def _eager(deployable):
    def run(images: torch.Tensor):
        with torch.no_grad():
            return deployable.reference(images)

    return run


def _accuracy(deployable, run, examples: list[tuple[Path, int]]) -> dict[str, float]:
    """Percent of the images whose largest logit is their class's, in the file and in eager mode."""
    from _export.int8 import read_images

    right = {'file': 0, 'eager': 0}
    number = BATCHES[-1] if 'batch' in deployable.dynamic else len(deployable.image)
    images = read_images([path for path, _ in examples], deployable)
    for start in range(0, len(examples), number):
        labels = torch.tensor([label for _, label in examples[start : start + number]])
        batch = torch.cat([*itertools.islice(images, number)])
        if 'batch' not in deployable.dynamic:  # the last one may lack some
            batch = torch.cat([batch, batch[-1:].expand(number - len(batch), *batch.shape[1:])])
        for name, logits in (('file', run(batch)[0]), ('eager', _eager(deployable)(batch))):
            right[name] += int((torch.as_tensor(logits)[: len(labels)].argmax(1) == labels).sum())
    found = {name: 100 * count / len(examples) for name, count in right.items()}
    print(f'top-1 on {len(examples)} images: {found["file"]:.2f} %, in eager mode {found["eager"]:.2f} %')
    return found


if __name__ == '__main__':
    run(main, CheckpointError, HubError, ImportError, OSError, ValueError)
