"""timm's door: every model of the zoo as a registered timm model."""

import pickle
from typing import Any

from safetensors import SafetensorError
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import Tensor

from . import hub, zoo
from .networks import SKResNet

__all__: list[str] = []


def _create_skresnet(variant: str, pretrained: bool = False, **kwargs) -> SKResNet:
    args = {'pretrained_filter_fn': _require_same_names, **zoo.MODELS[variant].args, **kwargs}
    if not pretrained:
        return build_model_with_cfg(SKResNet, variant, False, **args)
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    if not (cfg.has_weights or cfg.state_dict):
        raise RuntimeError(
            f'{variant} has no published weights (pretrained=True); these models have: {", ".join(zoo.with_weights())}'
        )
    if cfg.hf_hub_id is None or cfg.file or cfg.state_dict:
        try:
            return build_model_with_cfg(SKResNet, variant, True, **args)
        except (RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
            where = cfg.file or cfg.url or 'state_dict'
            raise RuntimeError(f'{variant}: the weights of {where} cannot be loaded: {hub.shorten(error)}') from error
    with hub.explain_errors(cfg.hf_hub_id, kwargs.get('cache_dir'), cfg.hf_hub_filename or hub.WEIGHTS_NAME):
        return build_model_with_cfg(SKResNet, variant, True, **args)


def _require_same_names(state_dict: dict[str, Tensor], model: SKResNet) -> dict[str, Tensor]:
    """timm loads loosely where the classifier is replaced, and would leave layers that don't match at random."""
    wanted, given = (
        {name for name in names if not name.startswith('fc.') and not name.endswith('num_batches_tracked')}
        for names in (model.state_dict(), state_dict)
    )
    differ = {'missing': wanted - given, 'unexpected': given - wanted}
    if wanted != given:
        raise RuntimeError(
            ', '.join(f'{len(names)} tensors {what} (such as {min(names)})' for what, names in differ.items() if names)
        )
    return state_dict


def _cfg(weights: zoo.Weights | None = None) -> dict[str, Any]:
    cfg = dict(
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=0.875,
        interpolation='bicubic',
        first_conv='conv1',
        classifier='fc',
        license='apache-2.0',
        paper_name='Selective Kernel Networks',
        paper_ids='arXiv:1903.06586',
        origin_url='https://github.com/implus/SKNet',
    )
    if weights is not None:
        cfg.update(
            hf_hub_id=weights.hf_hub_id,
            hf_hub_filename=hub.WEIGHTS_NAME,  # or timm would go on to a pickle
            num_classes=weights.num_classes,
            input_size=weights.input_size,
            crop_pct=weights.crop_pct,
            interpolation=weights.interpolation,
            mean=weights.mean,
            std=weights.std,
            license=weights.license,
            origin_url='https://github.com/huggingface/pytorch-image-models',
            description=weights.recipe,
            notes=(f'ImageNet-1k top-1 {weights.top1:.2f} % at {weights.input_size[-1]}',),
        )
    return cfg


default_cfgs = generate_default_cfgs(
    {
        f'{spec.name}.{weights.tag if weights else "untrained"}': _cfg(weights)
        for spec in zoo.MODELS.values()
        for weights in spec.weights or (None,)
    }
)


@register_model
def sknet26(pretrained: bool = False, **kwargs) -> SKResNet:
    """SKNet-26, SK[2, 32, 16]: 2, 2, 2, 2 units."""
    return _create_skresnet('sknet26', pretrained, **kwargs)


@register_model
def sknet50(pretrained: bool = False, **kwargs) -> SKResNet:
    """SKNet-50, SK[2, 32, 16]: 3, 4, 6, 3 units (Table 1); the network of timm's ``skresnext50_32x4d``."""
    return _create_skresnet('sknet50', pretrained, **kwargs)


@register_model
def sknet101(pretrained: bool = False, **kwargs) -> SKResNet:
    """SKNet-101, SK[2, 32, 16]: 3, 4, 23, 3 units, with Eq. 4's floor on d in every stage."""
    return _create_skresnet('sknet101', pretrained, **kwargs)
