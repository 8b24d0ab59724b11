"""Detectors and segmentors, as far as they are one network: from images to what their heads give."""

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from _quiet import quiet_imports
from torch import Tensor, nn

from sk_plugins._resources import find_config, how_to_install
from sk_plugins.weights import load_checkpoint
from sk_plugins.weights.fit import load_strictly
from sk_plugins.weights.hub import load_state_dict

__all__ = ['Heads', 'build_dense']

# What mmdet's one-stage heads give, each a map a level.
_KINDS = ('cls_score', 'bbox_pred', 'score_factor')


class Heads(nn.Module):
    """A detector or a segmentor without its post-processing: normalised (B, 3, H, W) to its heads' maps.

    Args:
        model: mmdet's one-stage detector, or mmseg's ``EncoderDecoder``.

    Attributes:
        outputs: the maps' names: ``cls_score_0`` (of the finest level), ..., or ``logits``, (B, classes, h, w).
    """

    def __init__(self, model: nn.Module, outputs: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.outputs = list(outputs)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(_flat(self.model(image, mode='tensor')))


def build_dense(name: str, checkpoint: str | None) -> tuple[nn.Module, dict[str, Any]] | None:
    """The detector or segmentor of a config, in evaluation mode, and its preprocessing; None where it is no such.

    Args:
        name: a config.
        checkpoint: its weights, a file or ``hf-hub:OWNER/NAME``; random where None.

    Raises:
        ImportError: mmdetection or mmsegmentation is missing.
        ValueError: the model is not one network.
        CheckpointError, HubError, OSError: weights that are not there, or do not fit.
    """
    try:
        path = find_config(name)
    except FileNotFoundError:
        return None
    try:
        with quiet_imports():
            from _common import FRAMEWORKS, read_config
            from mmengine.registry import DefaultScope
    except ModuleNotFoundError as error:
        raise ValueError(f'{path}: to read a config takes mmengine: {how_to_install("mm")}') from error
    with quiet_imports():
        cfg = read_config(path)
        scope = cfg.get('default_scope')
        if scope not in FRAMEWORKS:
            return None
    state_dict, meta = (None, {}) if checkpoint is None else _load(checkpoint)
    with quiet_imports(), DefaultScope.overwrite_default_scope(scope):
        registry = importlib.import_module(f'{scope}.registry')
        model = registry.MODELS.build(_without_weights(cfg.model)).eval()
    if hasattr(model, 'roi_head') or not (hasattr(model, 'bbox_head') or hasattr(model, 'decode_head')):
        raise ValueError(
            f'{name}: a {type(model).__name__} chooses its boxes between two networks, and is no one graph: only '
            'one-stage detectors and segmentors are exported whole, --features exports any backbone'
        )
    if state_dict is None:
        print(f'{name}: random weights, for want of --checkpoint', file=sys.stderr)
    else:
        load_strictly(model, state_dict, checkpoint, name)
    heads = Heads(model, []).eval()
    with torch.no_grad():
        maps = model(torch.zeros(1, 3, 64, 64), mode='tensor')
    heads.outputs = ['logits'] if isinstance(maps, Tensor) else list(_names(maps))
    return heads, _preprocessing(cfg, model, (meta.get('dataset_meta') or {}).get('classes'))


def _load(checkpoint: str) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    if checkpoint.startswith('hf-hub:'):
        return load_state_dict(checkpoint.removeprefix('hf-hub:')), {}
    return load_checkpoint(checkpoint)


def _names(maps: Sequence[Sequence[Tensor]]) -> Iterator[str]:
    for i, levels in enumerate(maps):
        for level in range(len(levels)):
            yield f'{_KINDS[i] if i < len(_KINDS) else f"output_{i}"}_{level}'


def _flat(maps: Any) -> Iterator[Tensor]:
    if isinstance(maps, Tensor):
        yield maps
        return
    for part in maps:
        yield from _flat(part)


def _without_weights(cfg: Any) -> Any:
    """The model's config without the weights that it would start from."""
    if isinstance(cfg, Mapping):
        for key, value in cfg.items():
            if key in ('init_cfg', 'pretrained'):
                cfg[key] = None
            else:
                _without_weights(value)
    elif isinstance(cfg, (list, tuple)):
        for value in cfg:
            _without_weights(value)
    return cfg


def _preprocessing(cfg: Any, model: nn.Module, classes: Sequence[str] | None) -> dict[str, Any]:
    """In timm's terms: the size that the model is tested with, to the next 32, and what normalises RGB."""
    data = cfg.model.get('data_preprocessor') or {}
    pipeline = (cfg.get('test_dataloader') or {}).get('dataset', {}).get('pipeline', ())
    scales = [t['scale'] for t in pipeline if t['type'].endswith('Resize') and 'scale' in t]
    width, height = scales[0] if scales else (512, 512)
    if not data.get('bgr_to_rgb', False) and data.get('mean'):
        raise ValueError(f'{cfg.filename}: takes BGR images, which a file cannot tell: set bgr_to_rgb')
    settings = {
        'input_size': (3, *(-(-side // 32) * 32 for side in (height, width))),
        'interpolation': 'bilinear',
        'crop_pct': 1.0,
        'mean': tuple(value / 255 for value in data.get('mean') or (0.0, 0.0, 0.0)),
        'std': tuple(value / 255 for value in data.get('std') or (255.0, 255.0, 255.0)),
    }
    return settings | ({'label_names': list(classes)} if classes else {})
