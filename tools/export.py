"""Write a folder for the Hub from a run of finetune: weights as safetensors, config, label names, card, pictures.

python tools/export.py work_dirs/flowers flowers_hub

timm loads it by local-dir:FOLDER; tools/push.py uploads it. Other checkpoints: tools/convert_checkpoint.py.
"""

from pathlib import Path

from _arguments import Parser
from _quiet import quiet_imports


def main(argv: list[str] | None = None) -> Path:
    parser = Parser(description=__doc__)
    parser.add_argument('work_dir', type=Path, metavar='WORK_DIR', help='of a run of finetune')
    parser.add_argument('out', type=Path, metavar='OUT', nargs='?', help='a new folder (default: WORK_DIR/hub)')
    parser.add_argument('--license', help='of the weights (default: that of the weights that the run started from)')
    args = parser.parse_args(argv)
    with quiet_imports():
        from _finetune.exporting import export

    out = export(args.work_dir, args.out or args.work_dir / 'hub', args.license)
    print(f"{out}: timm.create_model('local-dir:{out}', pretrained=True) loads it")
    return out


if __name__ == '__main__':
    with quiet_imports():
        from _common import run

    run(main)
