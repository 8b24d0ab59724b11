"""Which kernel a network's SK units pick, over a folder of images whose middle is enlarged: the paper's Fig. 3 and 4.

python tools/analyze_attention.py hf-hub:timm/skresnext50_32x4d.ra_in1k IMAGES --out attention
python tools/analyze_attention.py sknet50 IMAGES --checkpoint sknet50.safetensors --scales 1 1.5 2 --units SK_2_3 SK_5_3
python tools/analyze_attention.py sknet50_in1k IMAGES --checkpoint work_dirs/sknet50_in1k/epoch_100.pth

The model is a name of timm's (ours are among them; its published weights, without --checkpoint), local-dir:FOLDER,
hf-hub:OWNER/NAME, or a config of a classifier, detector or segmentor. IMAGES holds images, or a folder of them for
each class. Figures (PNG, SVG) and their numbers (CSV) go into --out.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import timm
import torch
from _arguments import Parser
from _errors import run
from _networks import build
from tqdm import tqdm

from sk_plugins._resources import how_to_install
from sk_plugins._text import first_lines
from sk_plugins.analysis import ImageStream, record, study
from sk_plugins.analysis.study import typical_units
from sk_plugins.weights import HubError


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument('model', help='a name of timm, local-dir:FOLDER, hf-hub:OWNER/NAME, or a config')
    parser.add_argument('images', type=Path, metavar='IMAGES', help='folder of images, or of folders, one for a class')
    parser.add_argument('--checkpoint', metavar='FILE|hf-hub:OWNER/NAME', help='of mmengine, timm or a state dict')
    parser.add_argument('--out', type=Path, default=Path('attention'), help='folder for the files (default: attention)')
    parser.add_argument(
        '--scales', type=float, nargs='+', default=[1.0, 1.25, 1.5, 1.75, 2.0], metavar='S',
        help='how many times the middle of an image is enlarged (default: 1.0 to 2.0)',
    )  # fmt: skip
    parser.add_argument(
        '--units', nargs='+', metavar='UNIT', help='in the figures by channel and by class (default: three, by depth)'
    )
    parser.add_argument('--channel-groups', type=int, default=32, metavar='N', help='points by channel (default: 32)')
    parser.add_argument('--field-unit', metavar='UNIT', help='whose receptive field is drawn (default: a middle one)')
    parser.add_argument('--field-images', type=int, default=64, metavar='N', help='for it, 0 for none (default: 64)')
    parser.add_argument('--limit', type=int, metavar='N', help='take N images, spread over the folder (default: all)')
    parser.add_argument('--size', type=int, help="side of the network's input (default: the model's)")
    parser.add_argument('--crop-pct', type=float, help="central share of the image at scale 1 (default: the model's)")
    parser.add_argument('--batch-size', type=int, default=16, metavar='N', help='default: 16')
    parser.add_argument('--workers', type=int, default=2, metavar='N', help='processes that read images (default: 2)')
    parser.add_argument(
        '--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='default: a GPU or cpu'
    )
    args = parser.parse_args(argv)
    for name, least in (
        ('channel_groups', 1),
        ('field_images', 0),
        ('limit', 1),
        ('size', 1),
        ('batch_size', 1),
        ('workers', 0),
    ):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f'argument --{name.replace("_", "-")}: {value} must be at least {least}')
    return args


def main(argv: list[str] | None = None) -> list[Path]:
    args = parse_args(argv)
    if importlib.util.find_spec('matplotlib') is None:
        raise ValueError('matplotlib, which draws the figures, is not installed: ' + how_to_install('analysis'))
    from sk_plugins.analysis.figures import write

    ImageStream(args.images, args.scales, limit=args.limit)  # before the Hub is asked for weights
    if args.model.startswith('local-dir:') and not (Path(args.model.partition(':')[2]) / 'config.json').is_file():
        raise FileNotFoundError(f'{args.model}: no folder with a config.json')
    published = args.checkpoint is None and not args.model.startswith(('local-dir:', 'hf-hub:', 'hf_hub:'))
    if published and not timm.is_model(timm.models.split_model_name_tag(args.model)[0]):
        raise ValueError(f'{args.model} is no name of timm, and a config needs its --checkpoint')
    model, preprocessing = build(args.model, args.checkpoint, pretrained=published)
    units, chosen = record(model).units, record(model, args.units).units
    typical = typical_units(chosen)
    field_unit = args.field_unit or typical[len(typical) // 2]
    if field_unit not in units:
        raise ValueError(f'--field-unit {field_unit} does not exist: choose from {", ".join(units)}')
    images = ImageStream(
        args.images,
        args.scales,
        size=args.size or preprocessing['input_size'][-1],
        crop_pct=preprocessing['crop_pct'] if args.crop_pct is None else args.crop_pct,
        interpolation=preprocessing['interpolation'],
        mean=preprocessing['mean'],
        std=preprocessing['std'],
        limit=args.limit,
    )
    try:
        model = model.to(args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'--device {args.device}: {first_lines(error)}') from error
    args.out.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(images), unit='image', desc=args.model) as bar:

        def batches():
            for batch in images.batches(args.batch_size, args.workers):
                for path, reason in batch.broken:
                    bar.write(f'skipped {path}: {reason}', file=sys.stderr)
                yield batch
                bar.update(len(batch.labels) + len(batch.broken))

        result = study(
            model,
            batches(),
            images.scales,
            images.classes,
            field_unit if args.field_images else None,
            field_every=-(-len(images) // max(args.field_images, 1)),
        )
    files = write(result, args.out, args.units, args.channel_groups)
    print(f'{result.images} images, {result.broken} skipped; mean attention difference by scale:')
    width = max(map(len, result.units))
    print(' ' * width, *(f'{f"{scale:g}x":>7}' for scale in result.scales))
    for name, values in result.differences.items():
        print(f'{name:{width}}', *(f'{value:+7.3f}' for value in values.tolist()), f' {result.label(name)}')
    for path in files:
        print(path)
    return files


if __name__ == '__main__':
    run(main, HubError, OSError, ValueError)
