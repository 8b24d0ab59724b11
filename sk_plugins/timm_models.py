"""Every model of the zoo as a registered timm model."""

import pickle
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import Tensor, nn

from . import zoo
from ._text import first_lines
from .networks import SKResNet, SKResNetSimCLR, SKShuffleNetV2
from .networks.resnet import count_stages, init_classifier
from .weights import hub, simclr
from .weights.files import CheckpointError, load_checkpoint
from .weights.fit import require_fit

__all__: list[str] = []


def _create(variant: str, pretrained: bool = False, **kwargs) -> nn.Module:
    spec = zoo.MODELS[variant]
    args = {'pretrained_filter_fn': _require_fit, **spec.arguments(**kwargs)}
    if issubclass(spec.network, SKResNet):
        args['feature_cfg'] = dict(out_indices=tuple(range(count_stages(args['layers']) + 1)))
    if not pretrained:
        return build_model_with_cfg(spec.network, variant, False, **args)
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    if not (cfg.has_weights or cfg.state_dict):
        raise RuntimeError(
            f'{variant} has no published weights (pretrained=True); these models have: {", ".join(zoo.with_weights())}'
        )
    if cfg.hf_hub_id is None or cfg.file or cfg.state_dict:
        where = cfg.file or cfg.url or 'state_dict'
        try:
            if cfg.state_dict or (cfg.file and Path(cfg.file).is_dir()):  # a Hub folder is timm's to read
                return build_model_with_cfg(spec.network, variant, True, **args)
            # Any checkpoint's, and only tensors of it that are whole; of a damaged download timm would keep the file.
            if cfg.file:
                state_dict, _ = load_checkpoint(cfg.file)
            else:
                state_dict, _ = hub.download_url(cfg.url, load_checkpoint, kwargs.get('cache_dir'))
            return _build_with(state_dict, spec.network, variant, args)
        except (RuntimeError, CheckpointError, SafetensorError, pickle.UnpicklingError, EOFError, OSError) as error:
            raise RuntimeError(
                f'{variant}: the weights of {where} cannot be loaded: {first_lines(error, width=400)}'
            ) from error
    filename = cfg.hf_hub_filename or hub.WEIGHTS_NAME
    with hub.explain_errors(cfg.hf_hub_id, kwargs.get('cache_dir'), filename):
        if spec.network is not SKResNetSimCLR or filename.endswith('.safetensors'):
            return build_model_with_cfg(spec.network, variant, True, **args)
        state_dict = hub.read_file(cfg.hf_hub_id, filename, cache_dir=kwargs.get('cache_dir'))
        return _build_with(state_dict, spec.network, variant, args)


def _build_with(
    state_dict: dict[str, Tensor], network: type[nn.Module], variant: str, args: dict[str, Any]
) -> nn.Module:
    """timm's builder with these weights."""
    # timm copies what is in a cfg, so that the weights come in by the filter.
    overlay = {**(args.get('pretrained_cfg_overlay') or {}), 'source': '', 'state_dict': {'': torch.empty(0)}}
    args = {**args, 'pretrained_cfg_overlay': overlay}
    args['pretrained_filter_fn'] = lambda _, model: _require_fit(state_dict, model)
    if network is SKResNetSimCLR and not args.keys() & {'device', 'dtype'} and torch.empty(0).device.type == 'cpu':
        network = partial(_build_empty, network)  # of up to 3.2 GB
    model = build_model_with_cfg(network, variant, True, **args)
    model.pretrained_cfg.pop('state_dict')
    return model


def _build_empty(network: type[nn.Module], **kwargs) -> nn.Module:
    """A network on the device ``meta`` that takes for its own the tensors of the first state dict it loads."""
    model = network(**kwargs, device='meta')
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}

    def load_state_dict(state_dict: dict[str, Tensor], strict: bool = True) -> Any:
        del model.load_state_dict
        own = {name: tensor.to(dtypes.get(name)) for name, tensor in state_dict.items()}
        loaded = model.load_state_dict(own, strict, assign=True)
        if any(parameter.is_meta for parameter in model.fc.parameters()):  # of other classes than the weights'
            init_classifier(model.fc.to_empty(device='cpu'))
        return loaded

    model.load_state_dict = load_state_dict
    return model


def _require_fit(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm loads loosely where the classifier is replaced, and would leave layers that don't match at random."""
    if simclr.is_lightly(state_dict):
        state_dict = _from_lightly(state_dict, model)
    wanted, given = (
        {name: tensor for name, tensor in tensors.items() if not name.startswith('fc.')}
        for tensors in (model.state_dict(), state_dict)
    )
    first = f'{model.pretrained_cfg.get("first_conv")}.weight'  # which timm adapts to in_chans
    if {first} <= given.keys() & wanted.keys():
        wanted[first] = wanted[first].new_empty(given[first].shape)
    require_fit(given, wanted, None, 'this network')
    return state_dict


def _from_lightly(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Under our names, with a new classifier where layers of the contrastive head stand before it."""
    state_dict = simclr.from_lightly(state_dict, getattr(model, 'projection_layers', 0))
    if 'fc.weight' not in state_dict and isinstance(model.fc, nn.Linear):
        fc = nn.Linear(model.fc.in_features, model.fc.out_features)
        init_classifier(fc)
        state_dict |= {f'fc.{name}': tensor for name, tensor in fc.state_dict().items()}
    return state_dict


def _cfg(spec: zoo.ModelSpec, weights: zoo.Weights | None = None) -> dict[str, Any]:
    small = spec.input_size[-1] == 32
    cfg = dict(
        num_classes=spec.num_classes,
        input_size=spec.input_size,
        pool_size=(8, 8) if small else (7, 7),
        crop_pct=1.0 if small else 0.875,
        interpolation='bicubic',
        first_conv='conv1' if spec.network is SKResNet else 'conv1.0',
        classifier='fc',
        license='apache-2.0',
        paper_name='Selective Kernel Networks',
        paper_ids='arXiv:1903.06586',
        origin_url='https://github.com/implus/SKNet',
    )
    if spec.network is SKResNetSimCLR:
        cfg.update(
            paper_name='Big Self-Supervised Models are Strong Semi-Supervised Learners', paper_ids='arXiv:2006.10029'
        )
    if small:
        cfg.update(mean=_CIFAR100_MEAN, std=_CIFAR100_STD)
    if weights is not None:
        cfg.update(
            hf_hub_id=weights.hf_hub_id,
            # Or timm would go on to a pickle.
            hf_hub_filename=(weights.file or hub.WEIGHTS_NAME) if weights.hf_hub_id else None,
            url=weights.url or '',
            num_classes=weights.num_classes,
            input_size=weights.input_size,
            crop_pct=weights.crop_pct,
            interpolation=weights.interpolation,
            mean=weights.mean,
            std=weights.std,
            license=weights.license,
            origin_url=weights.origin_url,
            description=weights.recipe,
            notes=(f'ImageNet-1k top-1 {weights.top1:.2f} % at {weights.input_size[-1]}',),
        )
    return cfg


_CIFAR100_MEAN = (0.5071, 0.4865, 0.4409)
_CIFAR100_STD = (0.2673, 0.2564, 0.2762)

default_cfgs = generate_default_cfgs(
    {
        f'{spec.name}.{weights.tag if weights else "untrained"}': _cfg(spec, weights)
        for spec in zoo.MODELS.values()
        if not spec.in_timm
        for weights in spec.weights or (None,)
    }
)


@register_model
def sknet26(pretrained: bool = False, **kwargs) -> SKResNet:
    """SKNet-26, SK[2, 32, 16]: 2, 2, 2, 2 units."""
    return _create('sknet26', pretrained, **kwargs)


@register_model
def sknet50(pretrained: bool = False, **kwargs) -> SKResNet:
    """SKNet-50, SK[2, 32, 16]: 3, 4, 6, 3 units (Table 1); the network of timm's ``skresnext50_32x4d``."""
    return _create('sknet50', pretrained, **kwargs)


@register_model
def sknet101(pretrained: bool = False, **kwargs) -> SKResNet:
    """SKNet-101, SK[2, 32, 16]: 3, 4, 23, 3 units, with Eq. 4's floor on d in every stage."""
    return _create('sknet101', pretrained, **kwargs)


@register_model
def skresnext101_32x4d(pretrained: bool = False, **kwargs) -> SKResNet:
    """SK-ResNeXt-101 32x4d: SKNet-101 under its ResNeXt name."""
    return _create('skresnext101_32x4d', pretrained, **kwargs)


@register_model
def skresnext101_32x8d(pretrained: bool = False, **kwargs) -> SKResNet:
    """SK-ResNeXt-101 32x8d: twice as wide."""
    return _create('skresnext101_32x8d', pretrained, **kwargs)


@register_model
def skresnext101_64x4d(pretrained: bool = False, **kwargs) -> SKResNet:
    """SK-ResNeXt-101 64x4d: twice as many groups."""
    return _create('skresnext101_64x4d', pretrained, **kwargs)


@register_model
def skresnet50x1_simclr(pretrained: bool = False, **kwargs) -> SKResNetSimCLR:
    """SimCLRv2's SK-ResNet-50."""
    return _create('skresnet50x1_simclr', pretrained, **kwargs)


@register_model
def skresnet50x2_simclr(pretrained: bool = False, **kwargs) -> SKResNetSimCLR:
    """SimCLRv2's SK-ResNet-50, 2 times as wide."""
    return _create('skresnet50x2_simclr', pretrained, **kwargs)


@register_model
def skresnet101x1_simclr(pretrained: bool = False, **kwargs) -> SKResNetSimCLR:
    """SimCLRv2's SK-ResNet-101."""
    return _create('skresnet101x1_simclr', pretrained, **kwargs)


@register_model
def skresnet101x2_simclr(pretrained: bool = False, **kwargs) -> SKResNetSimCLR:
    """SimCLRv2's SK-ResNet-101, 2 times as wide."""
    return _create('skresnet101x2_simclr', pretrained, **kwargs)


@register_model
def skresnet152x1_simclr(pretrained: bool = False, **kwargs) -> SKResNetSimCLR:
    """SimCLRv2's SK-ResNet-152."""
    return _create('skresnet152x1_simclr', pretrained, **kwargs)


@register_model
def skresnet152x2_simclr(pretrained: bool = False, **kwargs) -> SKResNetSimCLR:
    """SimCLRv2's SK-ResNet-152, 2 times as wide."""
    return _create('skresnet152x2_simclr', pretrained, **kwargs)


@register_model
def skresnet152x3_simclr(pretrained: bool = False, **kwargs) -> SKResNetSimCLR:
    """SimCLRv2's SK-ResNet-152, 3 times as wide."""
    return _create('skresnet152x3_simclr', pretrained, **kwargs)


@register_model
def shufflenetv2_x0_5(pretrained: bool = False, **kwargs) -> SKShuffleNetV2:
    """ShuffleNetV2 0.5x, torchvision's network."""
    return _create('shufflenetv2_x0_5', pretrained, **kwargs)


@register_model
def shufflenetv2_x1_0(pretrained: bool = False, **kwargs) -> SKShuffleNetV2:
    """ShuffleNetV2 1.0x, torchvision's network."""
    return _create('shufflenetv2_x1_0', pretrained, **kwargs)


@register_model
def shufflenetv2_x1_5(pretrained: bool = False, **kwargs) -> SKShuffleNetV2:
    """ShuffleNetV2 1.5x, torchvision's network."""
    return _create('shufflenetv2_x1_5', pretrained, **kwargs)


@register_model
def shufflenetv2_x2_0(pretrained: bool = False, **kwargs) -> SKShuffleNetV2:
    """ShuffleNetV2 2.0x, torchvision's network."""
    return _create('shufflenetv2_x2_0', pretrained, **kwargs)


@register_model
def seshufflenetv2_x0_5(pretrained: bool = False, **kwargs) -> SKShuffleNetV2:
    """ShuffleNetV2 0.5x with squeeze-and-excitation in every unit."""
    return _create('seshufflenetv2_x0_5', pretrained, **kwargs)


@register_model
def seshufflenetv2_x1_0(pretrained: bool = False, **kwargs) -> SKShuffleNetV2:
    """ShuffleNetV2 1.0x with squeeze-and-excitation in every unit."""
    return _create('seshufflenetv2_x1_0', pretrained, **kwargs)


@register_model
def seshufflenetv2_x1_5(pretrained: bool = False, **kwargs) -> SKShuffleNetV2:
    """ShuffleNetV2 1.5x with squeeze-and-excitation in every unit."""
    return _create('seshufflenetv2_x1_5', pretrained, **kwargs)


@register_model
def seshufflenetv2_x2_0(pretrained: bool = False, **kwargs) -> SKShuffleNetV2:
    """ShuffleNetV2 2.0x with squeeze-and-excitation in every unit."""
    return _create('seshufflenetv2_x2_0', pretrained, **kwargs)


@register_model
def skshufflenetv2_x0_5(pretrained: bool = False, **kwargs) -> SKShuffleNetV2:
    """ShuffleNetV2 0.5x with SK convolutions in its stride-1 units (Table 4)."""
    return _create('skshufflenetv2_x0_5', pretrained, **kwargs)


@register_model
def skshufflenetv2_x1_0(pretrained: bool = False, **kwargs) -> SKShuffleNetV2:
    """ShuffleNetV2 1.0x with SK convolutions in its stride-1 units (Table 4)."""
    return _create('skshufflenetv2_x1_0', pretrained, **kwargs)


@register_model
def skshufflenetv2_x1_5(pretrained: bool = False, **kwargs) -> SKShuffleNetV2:
    """ShuffleNetV2 1.5x with SK convolutions in its stride-1 units (Table 4)."""
    return _create('skshufflenetv2_x1_5', pretrained, **kwargs)


@register_model
def skshufflenetv2_x2_0(pretrained: bool = False, **kwargs) -> SKShuffleNetV2:
    """ShuffleNetV2 2.0x with SK convolutions in its stride-1 units (Table 4)."""
    return _create('skshufflenetv2_x2_0', pretrained, **kwargs)


@register_model
def resnext29_16x32d(pretrained: bool = False, **kwargs) -> SKResNet:
    """ResNeXt-29 16x32d for 32x32 images."""
    return _create('resnext29_16x32d', pretrained, **kwargs)


@register_model
def seresnext29_16x32d(pretrained: bool = False, **kwargs) -> SKResNet:
    """SE-ResNeXt-29 16x32d for 32x32 images."""
    return _create('seresnext29_16x32d', pretrained, **kwargs)


@register_model
def sknet29_16x32d(pretrained: bool = False, **kwargs) -> SKResNet:
    """SKNet-29 16x32d, SK[2, 16, 32] with kernels {1x1, 3x3}, for 32x32 images (Table 5)."""
    return _create('sknet29_16x32d', pretrained, **kwargs)
