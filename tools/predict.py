"""What a model says of pictures: a table, a file of it, and drawings.

python tools/predict.py work_dirs/flowers photos/
python tools/predict.py sknet50 cat.jpg 'more/*.png' https://example.org/dog.jpg --out said.csv
python tools/predict.py OWNER/NAME photos/ --draw drawn --attention --cam

MODEL is a name of timm's (its published weights), a Hub repository, a folder for the Hub, the work dir of a run of
finetune, a checkpoint that lies beside its config, or a config with --checkpoint. Files that cannot be read are named
and skipped.
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import torch
from _arguments import Parser
from _errors import run
from tqdm import tqdm

from sk_plugins._files import write_atomically
from sk_plugins._text import first_lines
from sk_plugins.weights import CheckpointError, HubError


def parse_args(argv: list[str] | None = None) -> Any:
    parser = Parser(description=__doc__)
    parser.add_argument('model', metavar='MODEL', help="timm's name, OWNER/NAME, a folder, a checkpoint, or a config")
    parser.add_argument('images', nargs='+', metavar='IMAGES', help='files, folders, patterns, addresses')
    parser.add_argument('--checkpoint', metavar='FILE', help='weights for a name or a config')
    parser.add_argument('--out', type=Path, metavar='FILE', help='the --topk labels and scores: .csv or .json')
    parser.add_argument('--draw', type=Path, metavar='FOLDER', help='the pictures with their labels (.png)')
    parser.add_argument('--attention', action='store_true', help='in --draw, which kernel each SK unit chose')
    parser.add_argument('--cam', action='store_true', help='in --draw, the class-activation map')
    parser.add_argument('--topk', type=int, default=3, metavar='K', help='labels of a picture, the surest (default: 3)')
    parser.add_argument('--batch-size', type=int, default=16, metavar='N', help='default: 16')
    parser.add_argument('--workers', type=int, default=0, metavar='N', help='processes that read pictures (default: 0)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args(argv)
    for name, least in (('topk', 1), ('batch_size', 1), ('workers', 0)):
        if getattr(args, name) < least:
            parser.error(f'argument --{name.replace("_", "-")}: {getattr(args, name)} must be at least {least}')
    if args.out is not None and args.out.suffix not in ('.csv', '.json'):
        parser.error(f'argument --out: {args.out} must end in .csv or .json')
    if (args.attention or args.cam) and args.draw is None:
        args.draw = Path('predictions')
    return args


def write(path: Path, said: list[dict[str, Any]], topk: int) -> None:
    """A row for each picture: its labels with their scores, or why it could not be read."""
    with write_atomically(path) as partial:
        if path.suffix == '.json':
            partial.write_text(json.dumps(said, indent=1) + '\n', encoding='utf-8')
            return
        header = ['image', *(f'{name}_{k}' for k in range(1, topk + 1) for name in ('label', 'score')), 'error']
        with partial.open('w', newline='', encoding='utf-8') as file:
            rows = csv.writer(file)
            rows.writerow(header)
            for one in said:
                cells = [cell for label in one.get('labels', []) for cell in (label['label'], label['score'])]
                rows.writerow([one['image'], *cells, *[''] * (2 * topk - len(cells)), one.get('error', '')])


def show(said: list[dict[str, Any]]) -> None:
    width = max(len(one['image']) for one in said)
    for one in said:
        labels = [f'{label["label"]} {label["score"]:.1%}' for label in one.get('labels', [])]
        text = f'not read: {one["error"]}' if 'error' in one else '   '.join(labels)
        mark = '' if 'said' not in one else f'{"; ".join(one["said"]) or "none"}:  '
        print(f'{one["image"]:{width}}  {mark}{text}')


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    args = parse_args(argv)
    import timm
    from _predict import models, pictures

    files = pictures.find(args.images)
    model = models.load(args.model, args.checkpoint)
    topk = min(args.topk, len(model.classes))
    try:
        network = model.network.to(args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f'--device {args.device}: {first_lines(error)}') from error
    keys = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct')
    settings = {key: model.preprocessing[key] for key in keys}
    if settings['input_size'][0] == 1:
        raise ValueError(f'{args.model}: takes grey images of its own data set: tools/classify_digits.py shows how')
    transform = timm.data.create_transform(**settings)
    draws = maps = None
    if args.draw is not None:
        from _predict import drawing

        draws, names = drawing, pictures.output_names(files)
        maps = drawing.Maps(network) if args.cam else None
    said: list[dict[str, Any]] = [{} for _ in files]
    bar = tqdm(total=len(files), unit='image', disable=not sys.stderr.isatty() or len(files) == 1, leave=False)
    for batch in pictures.Pictures(files, transform).batches(args.batch_size, args.workers):
        for i, reason in batch.broken:
            said[i] = dict(image=files[i], error=reason.removeprefix(f'{files[i]}: '))
        if batch.indices:
            images = batch.images.to(args.device)
            scores, attention = predict(model, images, args.attention)
            best = scores.topk(topk)
            cams = None if maps is None else maps(images, best.indices[:, 0].tolist())
            for row, i in enumerate(batch.indices):
                top = zip(best.indices[row].tolist(), best.values[row].tolist())
                labels = [dict(label=model.classes[k], score=round(score, 4)) for k, score in top]
                said[i] = dict(image=files[i], labels=labels)
                if model.multi_label:
                    above = scores[row].ge(0.5).nonzero().flatten().tolist()
                    said[i]['said'] = [model.classes[k] for k in sorted(above, key=lambda k: -scores[row][k])]
                if draws is not None:
                    draws.draw(
                        args.draw / names[i],
                        pictures.open_picture(files[i]),
                        '\n'.join(f'{label["label"]} {label["score"]:.1%}' for label in labels),
                        attention and {unit: (kernels, values[row]) for unit, (kernels, values) in attention.items()},
                        None if cams is None else as_seen(images[row], settings),
                        None if cams is None else cams[row],
                    )
        bar.update(len(batch.indices) + len(batch.broken))
    bar.close()
    show(said)
    broken = sum('error' in one for one in said)
    if args.out is not None:
        write(args.out, said, topk)
        print(f'written: {args.out}')
    if args.draw is not None:
        print(f'drawn: {args.draw}')
    if broken:
        print(f'{broken} of {len(files)} pictures were not read', file=sys.stderr)
    if broken == len(files):
        raise SystemExit(1)
    return said


def predict(model: Any, images: torch.Tensor, with_attention: bool) -> tuple[torch.Tensor, dict | None]:
    """Scores (B, C), and by SK unit its kernels' names and shares."""
    from sk_plugins.analysis import record

    with torch.inference_mode():
        if not with_attention:
            return model.scores(model.network(images)).cpu(), None
        from _predict.drawing import unit_shares

        with record(model.network) as attention:
            scores = model.scores(model.network(images)).cpu()
        return scores, unit_shares(model.network, attention)


def as_seen(image: torch.Tensor, settings: dict[str, Any]) -> Any:
    """(3, H, W), normalised, as (H, W, 3) of 0 to 1."""
    mean, std = (torch.tensor(settings[name]).view(-1, 1, 1) for name in ('mean', 'std'))
    return (image.cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


if __name__ == '__main__':
    run(main, CheckpointError, HubError, ImportError, OSError, ValueError)
