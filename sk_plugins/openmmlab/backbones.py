"""The networks as backbones of OpenMMLab: the arguments, the frozen stages and the weights that it expects."""

import inspect
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from mmpretrain.models import ResNet
from mmpretrain.models.backbones.base_backbone import BaseBackbone
from mmpretrain.models.utils import build_norm_layer
from timm.models import clean_state_dict
from torch import Tensor

from .. import networks, zoo
from .._arguments import check_flags, is_integer
from .._text import nearest
from ..layers import SelectiveKernel
from ..networks.resnet import count_stages
from ..ops.private import BATCH_NORMS
from ..weights.files import CheckpointError, HubError, pick_state_dict
from ..weights.fit import require_fit
from ..weights.names import BACKBONE
from ..weights.simclr import to_own
from ._internals import TimmNames

__all__ = ['Backbone', 'ResNetBackbone', 'ShuffleNetBackbone', 'SimCLRBackbone']

# torchvision's weights go into SE and SK units but for what stands in the depthwise convolution's place.
TORCHVISION = ('https://download.pytorch.org/', 'torchvision://')
# What mmpretrain's, mmdetection's and mmsegmentation's ResNets take.
_RESNETS = inspect.signature(ResNet).parameters.keys() | {
    'contract_dilation',
    'dcn',
    'multi_grid',
    'plugins',
    'pretrained',
    'stage_with_dcn',
    'zero_init_residual',
}
_SK_ARGUMENTS = inspect.signature(SelectiveKernel).parameters.keys()
_OF_THE_UNIT = re.compile(r'stage\d\.\d+\.branch2\.[348]\.')


class Backbone(TimmNames):
    """What OpenMMLab expects of a backbone, around a network of timm's kind.

    A registered class inherits from it, its network and ``BaseBackbone``, in this order, and names the network and
    its modules: timm's ``__init__`` reaches ``BaseModule.__init__`` through ``super()``.
    """

    network: type[torch.nn.Module]
    stem: tuple[str, ...]
    stages: tuple[str, ...]
    _sources: Sequence[str] = ()  # the checkpoints that init_cfg names, while they load

    def __init__(
        self,
        arguments: dict[str, Any],
        num_stages: int,
        out_indices: Sequence[int] | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        in_channels: int = 3,
        norm_cfg: dict[str, Any] | None = None,
        channels_last: bool = False,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
    ) -> None:
        """``arguments`` are the network's own, and it has so many stages; the rest is OpenMMLab's."""
        out_indices = (num_stages - 1,) if out_indices is None else out_indices
        self._require_known(arguments)
        is_sequence = isinstance(out_indices, Sequence) and len(out_indices) > 0
        if not is_sequence or not all(is_integer(i, 0, num_stages - 1) for i in out_indices):
            raise ValueError(f'out_indices={out_indices!r} must be a sequence of stages from 0 to {num_stages - 1}')
        if len(set(out_indices)) < len(out_indices):
            raise ValueError(f'out_indices={out_indices!r} must name no stage twice')
        if not is_integer(frozen_stages, -1, num_stages):
            raise ValueError(f'frozen_stages={frozen_stages!r} must be from -1 (none) to {num_stages}')
        check_flags(norm_eval=norm_eval, with_cp=with_cp, channels_last=channels_last)
        for name in ('num_classes', 'in_chans'):
            if name in arguments:
                ours = 'in_channels' if name == 'in_chans' else "the head's"
                raise ValueError(f'{name}={arguments[name]!r} is no argument of a backbone: it is {ours}')
        if norm_cfg is not None:
            arguments['norm_layer'] = lambda channels, **_: build_norm_layer(norm_cfg, channels)
        super().__init__(**arguments, num_classes=0, in_chans=in_channels)
        del self.num_classes  # OpenMMLab's hooks compare it, in whatever module has it, with the data set's
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.norm_cfg = norm_cfg
        self.init_cfg = init_cfg
        self.set_grad_checkpointing(with_cp)
        if channels_last:
            self.to(memory_format=torch.channels_last)
        self._freeze()

    def _require_known(self, arguments: dict[str, Any]) -> None:
        """Name arguments that the network would refuse one at a time, in timm's name."""
        known = {name for cls in self.network.__mro__ for name in inspect.signature(cls.__init__).parameters}
        known -= {'self', 'args', 'kwargs'}
        unknown = {k: v for k, v in arguments.items() if k not in known}
        if not unknown:
            return
        said = f'{type(self).__name__} has no argument {", ".join(f"{k}={v!r}" for k, v in unknown.items())}'
        own = {name for cls in (Backbone, type(self)) for name in inspect.signature(cls).parameters}
        taken = sorted((known | own) - {'arguments', 'in_chans', 'kwargs', 'num_classes', 'num_stages'})
        units = {name: f'sk_kwargs.{name}' for name in _SK_ARGUMENTS if 'sk_kwargs' in taken and name not in taken}
        inherited = [name for name in unknown if name in _RESNETS]
        for name in unknown:
            if name not in inherited:
                said += nearest(name, [*taken, *units], 'it' if len(unknown) == 1 else name, units)
        if inherited:
            it = 'it' if len(inherited) == len(unknown) else ', '.join(inherited)
            said += f': if a _base_ config left {it} in the backbone, put _delete_=True beside type'
            said += ' (weights are named in init_cfg)' if 'pretrained' in unknown else ''
        raise TypeError(said)

    def init_weights(self, *args, **kwargs) -> None:
        """The network's call, from its constructor, initialises; OpenMMLab's, later, applies ``init_cfg``.

        A checkpoint there may be timm's or a whole classifier's, detector's or segmenter's, from which the backbone
        takes its part, with ``prefix='backbone.'`` or without; that part must fit.

        Raises:
            sk_plugins.weights.CheckpointError, sk_plugins.weights.HubError: it does not; the message names the
                checkpoint, and what is missing, of another shape, or not part of this network.
        """
        if not hasattr(self, 'out_indices'):
            super().init_weights(*args, **kwargs)
            return
        if self.init_cfg:
            cfgs = [self.init_cfg] if isinstance(self.init_cfg, dict) else self.init_cfg
            # mmengine's prefix would refuse timm's names.
            self.init_cfg = [
                {k: v for k, v in cfg.items() if k != 'prefix' or v not in ('backbone', 'backbone.')} for cfg in cfgs
            ]
            self._sources = [str(cfg['checkpoint']) for cfg in cfgs if 'checkpoint' in cfg]
        try:
            BaseBackbone.init_weights(self)
        finally:
            self._sources = ()

    def train(self, mode: bool = True) -> 'Backbone':
        super().train(mode)
        self._freeze()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, BATCH_NORMS):
                    module.eval()
        return self

    @property
    def with_cp(self) -> bool:
        """Whether gradient checkpointing is on."""
        return self.grad_checkpointing

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Which layer a parameter is in, for learning rates by depth, as mmpretrain's ResNet says it.

        The stem is layer 0. The first and the fourth stage are a layer each, and so are every 2 units of the second
        and every 3 of the third, or every 4 of both where the second has 8 units or more. What is not under
        ``prefix``, such as a head, comes after them.

        Args:
            param_name: the parameter's name in the model.
            prefix: the backbone's in the model, such as ``'backbone.'``.

        Returns:
            The layer, and the number of layers, the head's included.
        """
        units = [len(getattr(self, name)) for name in self.stages]
        per_layer = (units[0], 2, 3, units[3]) if units[1] < 8 else (units[0], 4, 4, units[3])
        layers = [math.ceil(n / step) if n else 0 for n, step in zip(units, per_layer)]
        head = 1 + sum(layers)
        if not param_name.startswith(prefix):
            return head, head + 1
        stage, _, rest = param_name.removeprefix(prefix).partition('.')
        if stage not in self.stages:
            return 0, head + 1
        i = self.stages.index(stage)
        unit = int(rest.partition('.')[0])
        return 1 + sum(layers[:i]) + unit // per_layer[i], head + 1

    def _freeze(self) -> None:
        names = (*self.stem, *self.stages[: self.frozen_stages]) if self.frozen_stages >= 0 else ()
        # Nor do the stages after the last output learn: DistributedDataParallel would wait for their gradients.
        for name in (*names, *self.stages[max(self.out_indices) + 1 :]):
            module = getattr(self, name)
            module.eval()
            module.requires_grad_(False)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, local_metadata, *args) -> None:
        if self._sources:
            source, *self._sources = self._sources
            weights = dict(state_dict)
            if not any(
                isinstance(v, Tensor) for v in weights.values()
            ):  # lightly-ai's, of which mmengine knows nothing
                weights = clean_state_dict(pick_state_dict(weights, where=f'{source}: '))
            weights = to_own(weights)
            backbone = {k.removeprefix(BACKBONE): v for k, v in weights.items() if k.startswith(BACKBONE)}
            named = backbone or {k: v for k, v in weights.items() if not k.startswith(('fc.', 'head.'))}
            state_dict.clear()
            state_dict.update({k: v for k, v in named.items() if isinstance(v, Tensor)})
        else:
            source = local_metadata.get('source')
        # A timm checkpoint carries the classifier, which a backbone has no use for.
        for name in ('fc.weight', 'fc.bias'):
            state_dict.pop(prefix + name, None)
        if source:
            self._require_fit(state_dict, prefix, source)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _require_fit(self, state_dict: dict[str, Tensor], prefix: str, source: str) -> None:
        """Raise where mmengine would only warn and leave layers at random: weights that were named don't fit."""
        wanted = {prefix + name: tensor for name, tensor in self.state_dict().items()}
        given = {
            name: tensor
            for name, tensor in state_dict.items()
            if name in wanted or (name.startswith(prefix) and name.endswith('weight'))
        }
        if source.startswith(TORCHVISION):
            lacking = [k for k in wanted.keys() - given.keys() if self._may_lack(k.removeprefix(prefix))]
            left = [k for k in given.keys() - wanted.keys() if self._may_leave(k.removeprefix(prefix))]
            wanted = {name: tensor for name, tensor in wanted.items() if name not in lacking}
            given = {name: tensor for name, tensor in given.items() if name not in left}
        error = HubError if source.startswith('hf-hub:') else CheckpointError
        require_fit(given, wanted, source.removeprefix('hf-hub:'), f'this {self._title()}', error)

    def _may_lack(self, name: str) -> bool:
        """Whether torchvision's weights may go without this tensor of the network's: it learns."""
        return False

    def _may_leave(self, name: str) -> bool:
        """Whether torchvision's weights may have this tensor, for which the network has no place."""
        return False

    def _title(self) -> str:
        raise NotImplementedError


def _split(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """OpenMMLab's arguments and the network's."""
    names = inspect.signature(Backbone).parameters.keys() - {'arguments', 'num_stages'}
    return {k: v for k, v in kwargs.items() if k in names}, {k: v for k, v in kwargs.items() if k not in names}


class ResNetBackbone(Backbone, networks.SKResNet, BaseBackbone):
    """The ResNets' backbone: ``spec`` is the network; ``kwargs`` override its arguments, or are OpenMMLab's."""

    network = networks.SKResNet
    stem = ('conv1', 'bn1', 'maxpool')
    stages = ('layer1', 'layer2', 'layer3', 'layer4')

    def __init__(self, spec: zoo.ModelSpec, depth: int | str, **kwargs) -> None:
        own, kwargs = _split(kwargs)
        if kwargs.get('unit', 'sk') != 'sk':  # what the row says of SK convolutions does not concern other units
            spec = replace(spec, args={k: v for k, v in spec.args.items() if k != 'sk_kwargs'})
        arguments = spec.arguments(**kwargs)
        output_stride = arguments.get('output_stride', 32)
        if output_stride not in (8, 16, 32):  # timm asserts it without a word
            raise ValueError(f'output_stride={output_stride!r} must be 8, 16 or 32')
        super().__init__(arguments, count_stages(arguments['layers']), **own)
        self.depth = depth
        self.num_stages = len(arguments['layers'])
        self.stage_blocks = tuple(arguments['layers'])
        self.feat_dim = self.num_features

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        # timm counts the stem as the first of its feature maps.
        indices = [i + 1 for i in self.out_indices]
        return tuple(self.forward_intermediates(x, indices=indices, stop_early=True, intermediates_only=True))

    def _title(self) -> str:
        return f'{type(self).__name__} of depth {self.depth}'


class SimCLRBackbone(ResNetBackbone, networks.SKResNetSimCLR):
    """SimCLRv2's backbone: its ResNet without the contrastive head."""

    network = networks.SKResNetSimCLR

    def __init__(self, spec: zoo.ModelSpec, depth: int, **kwargs) -> None:
        if 'projection' in kwargs:
            raise ValueError(f"projection={kwargs['projection']!r} is no argument of a backbone: it is the head's")
        super().__init__(spec, depth, **kwargs)


class ShuffleNetBackbone(Backbone, networks.SKShuffleNetV2, BaseBackbone):
    """ShuffleNetV2's backbone, whose stages are those of mmpretrain's ``ShuffleNetV2``."""

    network = networks.SKShuffleNetV2
    stem = ('conv1',)
    stages = ('stage2', 'stage3', 'stage4', 'conv5')

    def __init__(self, spec: zoo.ModelSpec, widen_factor: float, unit: str, **kwargs) -> None:
        own, kwargs = _split(kwargs)
        super().__init__(spec.arguments(**kwargs, unit=unit), len(self.stages), **own)
        self.widen_factor = widen_factor
        self.unit = unit
        self.stage_blocks = [len(getattr(self, name)) for name in self.stages[:3]]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        # timm's feature maps begin with the stem and its pooling, and leave out the last convolution.
        indices = [i + 2 for i in self.out_indices if i < 3]
        if 3 not in self.out_indices:
            return tuple(self.forward_intermediates(x, indices=indices, stop_early=True, intermediates_only=True))
        last, features = self.forward_intermediates(x, indices=indices or [0])
        return (*features[: len(indices)], last)

    def _may_lack(self, name: str) -> bool:
        return self._may_leave(name) and not name.startswith(self.stages[: max(self.frozen_stages, 0)])

    def _may_leave(self, name: str) -> bool:
        return self.unit != 'plain' and _OF_THE_UNIT.match(name) is not None

    def _title(self) -> str:
        return f'{type(self).__name__} of widen factor {self.widen_factor} and unit {self.unit!r}'
