"""Count every model of the zoo, and set the paper's figures beside it: Markdown for docs/models.md, or JSON.

python tools/model_table.py                     # print the table
python tools/model_table.py --write             # put it into docs/models.md, and ten models into README.md
python tools/model_table.py --json models.json  # the same figures for programs
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from _tables import insert_table, markdown_table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sk_plugins import zoo

BEGIN, END = '<!-- model table: tools/model_table.py -->', '<!-- end of model table -->'
HEAD = [
    'model',
    'parameters',
    'paper (difference)',
    'GFLOPs',
    'paper (difference)',
    'activations',
    'input',
    'output strides',
    "paper's top-1 error",
    'weights, top-1',
]

# What README shows: of every family one, and what has weights.
TEN = (
    'sknet26',
    'sknet50',
    'sknet101',
    'skresnet18',
    'skresnet34',
    'skresnet50',
    'shufflenetv2_x1_0',
    'seshufflenetv2_x1_0',
    'skshufflenetv2_x1_0',
    'sknet29_16x32d',
)
SHORT_HEAD = ['model', 'parameters', 'GFLOPs', "paper's top-1 error", 'weights, top-1']


@dataclass(frozen=True)
class Row:
    """What is counted of a model, for one image of its input size, and what the paper prints.

    ``gflops`` are multiply-adds / 1e9 by torch's own counter; ``activations`` are the elements of all outputs of
    convolutions and linear layers; ``output_strides`` belong to the feature maps; differences are relative to the
    paper's figures.
    """

    name: str
    parameters: int
    gflops: float
    activations: int
    input_size: tuple[int, int, int]
    output_strides: tuple[int, ...]
    paper_parameters_m: float | None
    paper_gflops: float | None
    parameters_difference: float | None
    gflops_difference: float | None
    paper_errors: dict[str, float]
    weights: dict[str, float]


def count(spec: zoo.ModelSpec, size: int | None = None) -> Row:
    """The row of a model; ``size`` is the side of the image where it is not the model's own."""
    channels, side, _ = spec.input_size
    side = size or side
    # On the meta device counting costs neither memory nor time.
    model = spec.build(device='meta').eval()
    activations = []
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(lambda _module, _inputs, output: activations.append(output.numel()))
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.empty(1, channels, side, side, device='meta'))
    parameters = sum(p.numel() for p in model.parameters())
    gflops = counter.get_total_flops() / 2e9  # the counter has two operations for every multiply-add
    paper = spec.paper or zoo.PaperFigures(None)
    return Row(
        spec.name,
        parameters=parameters,
        gflops=gflops,
        activations=sum(activations),
        input_size=(channels, side, side),
        output_strides=tuple(feature['reduction'] for feature in model.feature_info),
        paper_parameters_m=paper.parameters_m,
        paper_gflops=paper.gflops,
        parameters_difference=_difference(parameters / 1e6, paper.parameters_m),
        gflops_difference=_difference(gflops, paper.gflops),
        paper_errors=dict(paper.errors),
        weights={weights.hf_hub_id or weights.url: weights.top1 for weights in spec.weights},
    )


def rows() -> list[Row]:
    """The rows of all models, in the zoo's order."""
    return [count(spec) for spec in zoo.MODELS.values()]


def markdown(table: list[Row]) -> str:
    """The table as Markdown."""
    lines = [HEAD, ['---'] * len(HEAD)]
    for row in table:
        gflops = _significant(row.gflops)
        lines.append(
            [
                f'`{row.name}`' + (' (timm)' if zoo.MODELS[row.name].in_timm else ''),
                f'{row.parameters:,}',
                _beside(row.paper_parameters_m, row.parameters_difference, 'M'),
                gflops,
                _beside(row.paper_gflops, row.gflops_difference),
                f'{row.activations / 1e6:.2f}M',
                str(row.input_size[-1]),
                ' '.join(map(str, row.output_strides)),
                _errors(row),
                _weights(row),
            ]
        )
    return markdown_table(lines)


def short_markdown(table: list[Row]) -> str:
    """README's columns of its models, as Markdown."""
    lines = [SHORT_HEAD, ['---', '---:', '---:', '---', '---']]
    for row in table:
        if row.name in TEN:
            lines.append(
                [
                    f'`{row.name}`' + (' (timm)' if zoo.MODELS[row.name].in_timm else ''),
                    f'{row.parameters / 1e6:.1f}M',
                    _significant(row.gflops),
                    _errors(row),
                    _weights(row),
                ]
            )
    return markdown_table(lines)


def _errors(row: Row) -> str:
    return ', '.join(f'{error:.2f} ({test})' for test, error in row.paper_errors.items())


def _weights(row: Row) -> str:
    return ', '.join(f'{_link(where)} {top1:.2f}' for where, top1 in row.weights.items()) or 'none yet'


def _significant(value: float) -> str:
    return f'{value:.2f}' if value >= 1 else f'{value:.4f}'


def _difference(counted: float, paper: float | None) -> float | None:
    return None if paper is None else counted / paper - 1


def _beside(paper: float | None, difference: float | None, unit: str = '') -> str:
    return '' if paper is None else f'{paper:g}{unit} ({100 * difference:+.1f} %)'


def _link(where: str) -> str:
    return f'[torchvision]({where})' if '://' in where else f'[{where}](https://huggingface.co/{where})'


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--write', action='store_true', help='renew the tables in docs/models.md and README.md')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the rows there')
    args = parser.parse_args(argv)
    counted = rows()
    table = markdown(counted)
    if args.write:
        root = Path(__file__).resolve().parent.parent
        for page, text in (('docs/models.md', table), ('README.md', short_markdown(counted))):
            path = root / page
            path.write_text(insert_table(path.read_text(encoding='utf-8'), text, BEGIN, END), encoding='utf-8')
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in counted], indent=1) + '\n', encoding='utf-8')
    print(table)


if __name__ == '__main__':
    main()
