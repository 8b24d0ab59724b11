"""A page on which a model says what it sees in a picture, and which kernel each of its units chose.

python tools/demo.py work_dirs/flowers
python tools/demo.py sknet50 --port 7861
python tools/demo.py OWNER/NAME --space flowers_space

MODEL is what tools/predict.py takes. With --space, a folder is written that is a Space of the Hub: app.py, the packages
it needs, and this package beside it. `hf upload OWNER/SPACE FOLDER --repo-type space` brings it there.
"""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

from _arguments import Parser
from _errors import run
from _quiet import quiet_imports

from sk_plugins._files import write_atomically
from sk_plugins._resources import how_to_install
from sk_plugins.weights import CheckpointError, HubError

APP = '''"""{title}: what the model sees in a picture, and which kernel each of its units chose."""

import timm

import sk_plugins  # registers the models
from sk_plugins.analysis.demo import make_page

network = timm.create_model({name!r}, pretrained=True).eval()
page = make_page(network, {title!r}, multi_label={multi_label})

if __name__ == '__main__':
    page.launch()
'''
CARD = """---
title: {title}
sdk: gradio
app_file: app.py
models: [{repo}]
---

What [{repo}](https://huggingface.co/{repo}) sees in a picture, and which kernel each of its units chose.
"""
PACKAGES = ('gradio', 'huggingface-hub', 'safetensors', 'timm', 'torch', 'tqdm')


def write_space(folder: Path, name: str, title: str, multi_label: bool) -> None:
    """Write a Space for a model of the Hub, or one of timm's names.

    Raises:
        FileExistsError: ``folder`` holds files.
    """
    import sk_plugins

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f'{folder}: exists and is not empty; name a new folder')
    with write_atomically(folder, folder=True) as partial:
        partial.mkdir()
        source = Path(sk_plugins.__file__).parent
        skipped = shutil.ignore_patterns('__pycache__', '.mim', '*.pyc')
        shutil.copytree(source, partial / 'sk_plugins', ignore=skipped)
        (partial / 'app.py').write_text(APP.format(name=name, title=title, multi_label=multi_label), encoding='utf-8')
        (partial / 'requirements.txt').write_text('\n'.join(PACKAGES) + '\n', encoding='utf-8')
        repo = name.partition(':')[2] or f'timm/{name}'
        (partial / 'README.md').write_text(CARD.format(title=title, repo=repo), encoding='utf-8')


def main(argv: list[str] | None = None) -> Any:
    parser = Parser(description=__doc__)
    parser.add_argument(
        'model', metavar='MODEL', nargs='?', default='sknet50', help='as in tools/predict.py (default: sknet50)'
    )
    parser.add_argument('--checkpoint', metavar='FILE', help='weights for a name or a config')
    parser.add_argument('--host', default='127.0.0.1', help='address it listens on (default: 127.0.0.1)')
    parser.add_argument('--port', type=int, default=7860, help='default: 7860')
    parser.add_argument('--space', type=Path, metavar='FOLDER', help='write a Space of the Hub and serve nothing')
    args = parser.parse_args(argv)
    if args.space is None and importlib.util.find_spec('gradio') is None:
        raise ModuleNotFoundError(f'the demo page takes gradio: {how_to_install("demo")}', name='gradio')
    with quiet_imports():
        from _predict import models

        from sk_plugins.analysis.demo import make_page

    model = models.load(args.model, args.checkpoint)
    path = Path(args.model).resolve()
    title = path.parent.name if path.name == 'hub' and path.is_dir() else Path(args.model).name  # that of a run
    if args.space is not None:
        name = args.model if args.model.startswith(('hf-hub:', 'hf_hub:')) else f'hf-hub:{args.model}'
        name = args.model if '/' not in args.model else name
        if Path(args.model).exists() or args.checkpoint is not None:
            raise ValueError(f'--space: {args.model} is not on the Hub: tools/push.py brings it there first')
        write_space(args.space, name, title, model.multi_label)
        print(f'{args.space}: `hf upload OWNER/SPACE {args.space} --repo-type space` brings it to the Hub')
        return None
    page = make_page(model.network, title, model.classes, model.preprocessing, model.multi_label)
    try:
        page.launch(server_name=args.host, server_port=args.port, prevent_thread_lock=argv is not None, quiet=True)
    except OSError as error:
        raise OSError(f'--port {args.port}: {error}') from error
    return page


if __name__ == '__main__':
    run(main, CheckpointError, HubError, ImportError, OSError, ValueError)
