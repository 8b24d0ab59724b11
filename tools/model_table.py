"""Count every model's parameters and multiply-adds, and set the paper's figures beside them, as Markdown.

python tools/model_table.py           # print the table
python tools/model_table.py --write   # put it into README.md
"""

import argparse
from pathlib import Path

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from sk_plugins import zoo

BEGIN, END = '<!-- model table: tools/model_table.py -->', '<!-- end of model table -->'


def count(name: str, size: int = 224) -> tuple[int, float]:
    """Parameters, and GFLOPs (multiply-adds / 1e9) for one image of ``size`` pixels, by torch's own counter."""
    model = timm.create_model(name).eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, 3, size, size))
    # The counter has two operations for every multiply-add.
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2e9


def markdown() -> str:
    """The model table."""
    lines = [
        '| model | parameters | paper | GFLOPs | paper | paper: top-1 error 224 / 320 | weights on the Hub, top-1 |',
        '|---|---|---|---|---|---|---|',
    ]
    for spec in zoo.MODELS.values():
        parameters, gflops = count(spec.name)
        paper = spec.paper
        printed = (
            (f'{paper.parameters_m}M', str(paper.gflops), f'{paper.top1_error_224:.2f} / {paper.top1_error_320:.2f}')
            if paper
            else ('', '', '')
        )
        weights = ', '.join(f'`{w.hf_hub_id}` {w.top1}' for w in spec.weights) or 'none yet'
        cells = [f'`{spec.name}`', f'{parameters:,}', printed[0], f'{gflops:.2f}', *printed[1:], weights]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def insert(text: str, table: str) -> str:
    """``text`` with its model table replaced."""
    head, rest = text.split(BEGIN)
    return f'{head}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}'


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--write', action='store_true', help="replace README.md's table")
    args = parser.parse_args(argv)
    table = markdown()
    if args.write:
        readme = Path(__file__).resolve().parent.parent / 'README.md'
        readme.write_text(insert(readme.read_text(encoding='utf-8'), table), encoding='utf-8')
    print(table)


if __name__ == '__main__':
    main()
