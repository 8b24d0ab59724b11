"""Write a network as ONNX: (batch, channels, height, width) images in, (batch, classes) logits out.

python tools/export_onnx.py sknet50 sknet50.onnx --checkpoint hf-hub:timm/skresnext50_32x4d.ra_in1k --check
python tools/export_onnx.py hf-hub:OWNER/NAME sknet50.onnx --opset 18
python tools/export_onnx.py sknet50_in1k sknet50.onnx --checkpoint work_dirs/sknet50_in1k/epoch_100.pth

The model is a name of timm's (ours are among them), local-dir:FOLDER, hf-hub:OWNER/NAME, or the config of a
classifier, from which come the network, its classes and its preprocessing. What the images were preprocessed with in
training goes into the file's metadata.
"""

import argparse
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _arguments import Parser
from _errors import run
from _networks import build
from torch import nn

from sk_plugins import fold_batch_norm
from sk_plugins._files import write_atomically
from sk_plugins._resources import how_to_install
from sk_plugins.weights import HubError

TOLERANCE = 1e-4


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    flag = argparse.BooleanOptionalAction
    parser.add_argument('model', help='a name of timm, local-dir:FOLDER, hf-hub:OWNER/NAME, or a config')
    parser.add_argument('out', type=Path, help='the .onnx file to write')
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument('--checkpoint', metavar='FILE|hf-hub:OWNER/NAME', help='of mmengine, timm or a state dict')
    weights.add_argument('--pretrained', action='store_true', help="timm's published weights of the model")
    parser.add_argument('--size', type=int, help="side of the image (default: the model's)")
    parser.add_argument('--fuse', action=flag, default=True, help='fold BatchNorms (default: yes)')
    parser.add_argument(
        '--dynamic', action=flag, default=True, help='any batch and image size (default), or one image of --size'
    )
    parser.add_argument('--opset', type=int, help="ONNX's operator set (default: torch's current)")
    parser.add_argument('--check', action='store_true', help=f'compare with onnxruntime, to {TOLERANCE:g}')
    args = parser.parse_args(argv)
    if args.out.suffix != '.onnx':
        parser.error(f'argument out: {args.out} must end in .onnx')
    if args.size is not None and args.size < 1:
        parser.error(f'argument --size: {args.size} must be at least 1')
    return args


def require(*packages: str) -> None:
    """Raise ValueError, which says what to install, unless these can be imported."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f'{", ".join(missing)} not installed: {how_to_install("onnx")}')


def export(
    model: nn.Module,
    out: Path,
    input_size: tuple[int, int, int] = (3, 224, 224),
    dynamic: bool = True,
    opset: int | None = None,
    metadata: dict[str, Any] | None = None,
    reference: nn.Module | None = None,
) -> None:
    """Write ``model`` as ONNX with the input 'image' and the output 'logits', all of it or nothing.

    Args:
        model: in evaluation mode.
        out: the file.
        input_size: (channels, height, width) of an image.
        dynamic: leave batch, height and width open; else they are 1 and ``input_size``.
        opset: ONNX's operator set; torch's current where None.
        metadata: written into the file, by name, as JSON where it is no text.
        reference: what onnxruntime's outputs must equal to 1e-4 (of the largest logit, where that is above 1); not
            compared where None.

    Raises:
        ValueError: they are not equal, torch cannot write this ``opset``, or packages are missing.
        IsADirectoryError: ``out`` is a folder.
    """
    require('onnx', 'onnxscript', *(['onnxruntime'] if reference is not None else []))
    if out.is_dir():
        raise IsADirectoryError(f'{out} is a folder; name a file')
    channels, *size = input_size
    # A batch of one would be taken for a constant, and so would a last map of 1x1, which strides of 32 leave of 32.
    traced = (2, channels, *(max(side, 64) for side in size)) if dynamic else (1, *input_size)
    image = torch.zeros(traced, device=next(model.parameters()).device)
    shapes = ({0: 'batch', 2: 'height', 3: 'width'},) if dynamic else None
    program = torch.onnx.export(
        model,
        (image,),
        input_names=['image'],
        output_names=['logits'],
        opset_version=opset,
        dynamic_shapes=shapes,
        dynamo=True,
        verbose=False,
    )
    written = program.model.opset_imports['']
    if opset is not None and written != opset:
        raise ValueError(f'--opset {opset}: torch cannot write it for this model, which takes {written}')
    program.model.metadata_props.update(
        {name: value if isinstance(value, str) else json.dumps(value) for name, value in (metadata or {}).items()}
    )
    with write_atomically(out) as partial:
        program.save(partial)
        if reference is not None:
            check(reference, partial, _shapes(input_size, dynamic))


def _shapes(input_size: tuple[int, int, int], dynamic: bool) -> Iterator[tuple[int, int, int, int]]:
    channels, height, width = input_size
    yield 1, channels, height, width
    if dynamic:
        yield 3, channels, height + 33, max(width - 31, 32)


@torch.no_grad()
def check(model: nn.Module, path: Path, shapes: Iterator[tuple[int, int, int, int]]) -> None:
    """Raise ValueError unless onnxruntime's outputs are the model's for random images of these shapes."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    generator = torch.Generator().manual_seed(0)
    for shape in shapes:
        image = torch.randn(shape, generator=generator)
        expected = model(image)
        try:
            (logits,) = session.run(['logits'], {'image': image.numpy()})
        except Exception as error:  # onnxruntime's own kinds, which share no public base
            raise ValueError(f'--check: onnxruntime cannot run the file for images of {shape}: {error}') from error
        difference = (torch.from_numpy(logits) - expected).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
            raise ValueError(
                f"--check: for images of {shape} onnxruntime's logits differ from the model's by {difference:.2g}, and "
                f'only {TOLERANCE:g} is allowed'
            )


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    require('onnx', 'onnxscript', *(['onnxruntime'] if args.check else []))
    model, preprocessing = build(args.model, args.checkpoint, args.pretrained)
    channels, *size = preprocessing['input_size']
    input_size = (channels, *((args.size, args.size) if args.size else size))
    names = ('mean', 'std', 'interpolation', 'crop_pct')
    export(
        fold_batch_norm(model) if args.fuse else model,
        args.out,
        input_size,
        dynamic=args.dynamic,
        opset=args.opset,
        metadata={
            'model': args.model,
            'input_size': input_size,
            **{name: preprocessing[name] for name in names if name in preprocessing},
        },
        reference=model if args.check else None,
    )
    print(args.out)


if __name__ == '__main__':
    run(main, HubError, OSError, ValueError)
