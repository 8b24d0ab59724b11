"""Count every model of the zoo, and set the paper's figures beside it: Markdown for docs/models.md, or JSON.

python tools/model_table.py                     # print the table
python tools/model_table.py --write             # put it into docs/models.md, and ten models into README.md
python tools/model_table.py --json models.json  # the same figures for programs
"""

import json
from dataclasses import asdict
from pathlib import Path

from _arguments import Parser
from _counts import Row, rows
from _tables import insert_table, markdown_table

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


def _beside(paper: float | None, difference: float | None, unit: str = '') -> str:
    return '' if paper is None else f'{paper:g}{unit} ({100 * difference:+.1f} %)'


def _link(where: str) -> str:
    return f'[torchvision]({where})' if '://' in where else f'[{where}](https://huggingface.co/{where})'


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
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
