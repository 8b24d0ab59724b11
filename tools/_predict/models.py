"""A network with its weights, the names of its classes and the preprocessing that it was trained with."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from _networks import build
from _quiet import quiet_imports
from huggingface_hub import hf_hub_download
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from sk_plugins._resources import find_config
from sk_plugins._text import nearest, nearest_path
from sk_plugins.weights import load_checkpoint
from sk_plugins.weights.hub import explain_errors, split_revision

__all__ = ['Model', 'load']

WEIGHTS = ('.pth', '.pt', '.safetensors', '.bin', '.ckpt')


@dataclass(frozen=True)
class Model:
    """A classifier.

    Attributes:
        title: how it was named.
        network: in evaluation mode; (B, 3, size, size) to logits (B, C).
        classes: C names.
        multi_label: whether an image has any number of labels.
        preprocessing: timm's: ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``.
    """

    title: str
    network: nn.Module
    classes: tuple[str, ...]
    multi_label: bool
    preprocessing: dict[str, Any]

    def scores(self, logits: Tensor) -> Tensor:
        """(B, C) of 0 to 1."""
        return logits.float().sigmoid() if self.multi_label else logits.float().softmax(1)


def load(name: str, checkpoint: str | None = None) -> Model:
    """The model of a name of timm's, a Hub repository, a folder, or a checkpoint that lies beside its config.

    Args:
        name: ``sknet50``, ``OWNER/NAME``, ``hf-hub:OWNER/NAME``, a Hub folder, the work dir of a run, a checkpoint, or
            a config.
        checkpoint: its weights, where they are not what the name says.

    Raises:
        ValueError: there is no such model, or one without a classifier; the message says what was looked for.
        FileNotFoundError, CheckpointError, HubError: its weights cannot be had or read.
    """
    path = Path(name)
    if path.is_dir():
        title = name
        name, checkpoint = _of_folder(path, checkpoint)
    elif path.is_file() and path.suffix in WEIGHTS:
        if checkpoint is not None:
            raise ValueError(f'{name}: is a checkpoint itself: --checkpoint goes with a name or a config')
        title, checkpoint = name, name
        name = str(_config_beside(path))
    else:
        title = name
        name = _of_name(name, checkpoint)
    is_repository = name.startswith(('local-dir:', 'hf-hub:', 'hf_hub:'))
    is_timms = timm.is_model(timm.models.split_model_name_tag(name)[0])
    network, preprocessing = build(name, checkpoint, pretrained=checkpoint is None and is_timms and not is_repository)
    classes = getattr(network, 'num_classes', 0)
    if not classes:
        raise ValueError(f'{title}: has no classifier, so it says nothing of pictures')
    names = _class_names(network, checkpoint) or tuple(f'class {i}' for i in range(classes))
    if len(names) != classes:
        raise ValueError(f'{title}: names {len(names)} classes and tells {classes} apart')
    return Model(title, network, names, _is_multi_label(name), preprocessing)


def _of_folder(folder: Path, checkpoint: str | None) -> tuple[str, str | None]:
    if (folder / 'config.json').is_file():
        return f'local-dir:{folder}', checkpoint
    if (folder / 'config.py').is_file():
        with quiet_imports():
            from _finetune.training import find_best

            import sk_plugins.mmpretrain_models  # noqa: F401 - the config imports it

        return str(folder / 'config.py'), checkpoint or str(find_best(folder))
    raise ValueError(f'{folder}: is neither a folder for the Hub (config.json) nor a work dir of finetune (config.py)')


def _config_beside(path: Path) -> Path:
    there = sorted(path.parent.glob('*.py'))
    if (path.parent / 'config.py') in there:
        return path.parent / 'config.py'
    if len(there) != 1:
        raise ValueError(
            f'{path}: {len(there) or "no"} configs lie beside this checkpoint: name its config, and the checkpoint by '
            '--checkpoint'
        )
    return there[0]


def _of_name(name: str, checkpoint: str | None) -> str:
    if name.startswith(('local-dir:', 'hf-hub:', 'hf_hub:')):
        return name
    if timm.is_model(timm.models.split_model_name_tag(name)[0]):
        return name
    try:
        config = find_config(name)
    except FileNotFoundError as error:
        if re.fullmatch(r'[\w.-]+/[\w.-]+(@[^@]+)?', name) and Path(name).suffix not in (*WEIGHTS, '.py'):
            if Path(name).parent.is_dir():  # a folder mistyped, which the Hub would be asked for
                near = nearest_path(Path(name))
                raise FileNotFoundError(f'{name}: no such folder{near}; a repository is hf-hub:{name}') from error
            return f'hf-hub:{name}'
        raise ValueError(
            f'model {name!r} is no name of timm, no Hub repository (OWNER/NAME), no folder, checkpoint or config'
            f'{nearest(name, timm.list_models("*sk*") + timm.list_models("*shufflenet*"))}'
        ) from error
    if config.suffix not in ('.py', '.json', '.yml', '.yaml'):
        raise ValueError(
            f'{name}: is neither a config nor a checkpoint ({", ".join(WEIGHTS)}); MODEL goes before IMAGES'
        )
    if checkpoint is None:
        raise ValueError(f'{name}: a config needs its --checkpoint')
    return name


def _class_names(network: nn.Module, checkpoint: str | None) -> tuple[str, ...]:
    if checkpoint is not None and Path(checkpoint).is_file():
        _, meta = load_checkpoint(checkpoint)
        return tuple((meta.get('dataset_meta') or {}).get('classes') or ())
    names = network.pretrained_cfg.get('label_names')
    if names:
        return tuple(names)
    subset = infer_imagenet_subset(network) if checkpoint is None else None
    if subset is None:
        return ()
    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(i) for i in range(network.num_classes))


def _is_multi_label(name: str) -> bool:
    if name.startswith(('hf-hub:', 'hf_hub:')):
        repo = name.partition(':')[2]
        repo_id, revision = split_revision(repo)
        with explain_errors(repo, filename='config.json'):
            path = Path(hf_hub_download(repo_id, 'config.json', revision=revision))
    elif name.startswith('local-dir:'):
        path = Path(name.removeprefix('local-dir:'), 'config.json')
    elif timm.is_model(timm.models.split_model_name_tag(name)[0]):
        return False
    else:
        from mmengine.config import Config

        head = (Config.fromfile(find_config(name)).get('model') or {}).get('head') or {}
        return str(head.get('type')).rpartition('.')[2].startswith('MultiLabel')
    return json.loads(path.read_text(encoding='utf-8')).get('problem_type') == 'multi_label_classification'
