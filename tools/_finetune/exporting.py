"""A run's best model as a folder for the Hub, with a card that says what it is and how good."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from mmengine.config import Config

from sk_plugins._files import write_atomically
from sk_plugins._resources import how_to_install
from sk_plugins.weights import load_checkpoint, save_hub_folder, timm_arguments

from .training import find_best

__all__ = ['RUN', 'export', 'read_run', 'refresh', 'write_run']

RUN = 'finetune.json'


def write_run(work_dir: Path, **facts: Any) -> None:
    """What the card says of a run, beside its config."""
    with write_atomically(work_dir / RUN) as partial:
        partial.write_text(json.dumps(facts, indent=1) + '\n', encoding='utf-8')


def read_run(work_dir: Path) -> dict[str, Any]:
    """
    Raises:
        FileNotFoundError: no run of ``finetune`` was there.
    """
    if not (work_dir / RUN).is_file() or not (work_dir / 'config.py').is_file():
        raise FileNotFoundError(f'{work_dir}: is no work dir of a finetune run: it has no {RUN} and config.py')
    return json.loads((work_dir / RUN).read_text(encoding='utf-8'))


def export(work_dir: Path, out: Path, license_: str | None = None, name: str | None = None) -> Path:
    """Write the folder ``out``: ``config.json``, ``model.safetensors``, the card and its pictures.

    Args:
        work_dir: of a run of ``finetune``.
        out: must not exist yet, or be empty.
        license_: of the weights; that of the weights that the run started from where None.
        name: the card's title; that of ``out`` where None, or of the data where that is ``hub``.

    Raises:
        FileNotFoundError: there is no such run, or no epoch of it is over.
        FileExistsError: ``out`` holds files.
        CheckpointError: the checkpoint is not whole.
    """
    run = read_run(work_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f'{out}: exists and is not empty; name a new folder')
    state_dict, _ = load_checkpoint(find_best(work_dir))
    architecture, model_args, data_config = timm_arguments(Config.fromfile(work_dir / 'config.py'))
    with write_atomically(out, folder=True) as partial:
        save_hub_folder(
            state_dict,
            partial,
            architecture,
            model_args,
            data_config,
            label_names=run['classes'],
            problem_type='multi_label_classification' if run['multi_label'] else None,
        )
        pictures = []
        for picture in ('confusion_matrix.png', 'mistakes.png'):
            if (work_dir / 'report' / picture).is_file():
                shutil.copy(work_dir / 'report' / picture, partial / picture)
                pictures.append(picture)
        title = name or (name_of(work_dir) if out.name == 'hub' else out.name)
        card = _card(architecture, title, run, data_config, pictures, license_ or run.get('license'))
        (partial / 'README.md').write_text(str(card), encoding='utf-8')
    return out


def refresh(work_dir: Path) -> Path:
    """The run's own folder for the Hub, ``hub`` in its work dir, written anew where its best model is newer."""
    out = work_dir / 'hub'
    weights = out / 'model.safetensors'
    if not weights.is_file() or weights.stat().st_mtime < find_best(work_dir).stat().st_mtime:
        fresh, old = work_dir / '.hub.new', work_dir / '.hub.old'  # what was there stays until the new one is whole
        for folder in (fresh, old):
            shutil.rmtree(folder, ignore_errors=True)
        try:
            export(work_dir, fresh, name=name_of(work_dir))
            if out.exists():
                out.rename(old)
            fresh.rename(out)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
            if not out.exists() and old.exists():
                old.rename(out)
            shutil.rmtree(old, ignore_errors=True)
    return out


def name_of(work_dir: Path) -> str:
    """What a model of this run is called where its folder does not say: after its data."""
    return re.sub(r'[^\w.-]+', '-', Path(read_run(work_dir)['data']).stem).strip('-.') or 'model'


def _card(
    architecture: str, name: str, run: dict[str, Any], data_config: dict, pictures: list[str], license_: str | None
) -> ModelCard:
    metrics = run.get('metrics') or {}
    score = 'mAP' if run['multi_label'] else 'top1'
    results = None
    if score in metrics:
        results = [
            EvalResult(
                task_type='image-classification',
                dataset_type='imagefolder',
                dataset_name=run['data'],
                dataset_split='validation',
                metric_type='mean_average_precision' if run['multi_label'] else 'accuracy',
                metric_value=metrics[score] / 100,
            )
        ]
    data = ModelCardData(
        library_name='timm',
        license=license_,
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'transformers', 'sk-plugins', 'selective-kernel'],
        base_model=run['source'].removeprefix('hf-hub:') if str(run.get('source')).startswith('hf-hub:') else None,
        model_name=name if results else None,
        eval_results=results,
    )
    title = {'mAP': 'mAP', 'top1': 'top-1', 'top5': 'top-5', 'f1_macro': 'F1, mean of the classes'}
    rows = '\n'.join(f'| {title[key]} | {metrics[key]:.2f} % |' for key in title if key in metrics)
    size = data_config['input_size'][-1]
    text = f"""# {name}

[{architecture}](https://arxiv.org/abs/1903.06586), a Selective Kernel network, trained on {run['data']}:
{run['train_images']} images to train on, {run['val_images']} held out, {len(run['classes'])} classes
({', '.join(run['classes'][:20])}{', ...' if len(run['classes']) > 20 else ''}). Input: {size} x {size} pixels.

| on the {run['val_images']} held-out images | |
| --- | ---: |
{rows}

It started from {run.get('source') or 'random weights'} and was trained by

```bash
{run['command']}
```

## Use

With timm (both packages: `{how_to_install()}`):

```python
import sk_plugins  # registers the model
import timm
from PIL import Image

model = timm.create_model('hf-hub:OWNER/{name}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(Image.open('picture.jpg').convert('RGB'))[None])
print(model.pretrained_cfg['label_names'][logits.argmax()])
```

With transformers:

```python
import sk_plugins  # registers the model
from transformers import pipeline

print(pipeline('image-classification', 'OWNER/{name}')('picture.jpg'))
```
"""
    text += ''.join(f'\n![{Path(picture).stem.replace("_", " ")}]({picture})\n' for picture in pictures)
    return ModelCard(f'---\n{data.to_yaml()}\n---\n\n{text}')
