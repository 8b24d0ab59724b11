"""OpenMMLab's door: the networks as backbones in mmpretrain's ``MODELS``, and their weights.

Import it through ``custom_imports = dict(imports=['sk_plugins.mmpretrain_models'])``. From mmdetection or
mmsegmentation the backbones are ``mmpretrain.SKNet`` and so on. The import also registers the project's datasets and
hooks, its entries in mmpretrain's model index, checkpoints by ``hf-hub:OWNER/NAME[@REVISION]``, and what
:mod:`sk_plugins.openmmlab.runtime` is for; it reads local ``*.safetensors``, too.
"""

import inspect
import pickle
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from mmengine.dist import barrier, get_dist_info
from mmengine.runner import CheckpointLoader
from mmpretrain.apis.model import ModelHub
from mmpretrain.models.backbones.base_backbone import BaseBackbone
from mmpretrain.models.utils import build_norm_layer
from mmpretrain.registry import MODELS
from torch import Tensor
from torch.hub import load_state_dict_from_url
from torch.nn.modules.batchnorm import _BatchNorm

from . import networks, zoo
from ._arguments import check_flags, check_integer, check_sk_kwargs, is_integer
from ._resources import ROOT
from .networks.resnet import count_stages
from .openmmlab import datasets as datasets
from .openmmlab import hooks as hooks
from .openmmlab import runtime as runtime
from .weights import hub
from .weights.files import CheckpointError, HubError, first_lines
from .weights.names import is_timm_format, require_fit, to_mmpretrain

__all__ = ['SKNet', 'SKResNeXt', 'SKResNet', 'SKShuffleNetV2']

# torchvision's weights go into ShuffleNetV2's SE and SK units but for what stands in the depthwise convolution's place.
_TORCHVISION = ('https://download.pytorch.org/', 'torchvision://')
_OF_THE_UNIT = re.compile(r'stage\d\.\d+\.branch2\.[348]\.')


class _Backbone:
    """What OpenMMLab expects of a backbone, around a network of timm's kind.

    A class of the door inherits from it, its network and ``BaseBackbone``, in this order, and names the network and
    its modules: timm's ``__init__`` reaches ``BaseModule.__init__`` through ``super()``.
    """

    network: type[torch.nn.Module]
    stem: tuple[str, ...]
    stages: tuple[str, ...]
    _sources: Sequence[str] = ()  # the checkpoints that init_cfg names, while they load

    def _build(
        self,
        spec_args: dict[str, Any],
        out_indices: Sequence[int],
        frozen_stages: int,
        norm_eval: bool,
        with_cp: bool,
        in_channels: int,
        norm_cfg: dict[str, Any] | None,
        channels_last: bool,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None,
        num_stages: int,
    ) -> None:
        """Check the arguments, run the network's constructor, and set what the other methods need."""
        self._require_known(spec_args)
        is_sequence = isinstance(out_indices, Sequence) and len(out_indices) > 0
        if not is_sequence or not all(is_integer(i, 0, num_stages - 1) for i in out_indices):
            raise ValueError(f'out_indices={out_indices!r} must be a sequence of stages from 0 to {num_stages - 1}')
        if len(set(out_indices)) < len(out_indices):
            raise ValueError(f'out_indices={out_indices!r} must name no stage twice')
        if not is_integer(frozen_stages, -1, num_stages):
            raise ValueError(f'frozen_stages={frozen_stages!r} must be from -1 (none) to {num_stages}')
        check_integer('in_channels', in_channels)
        check_flags(norm_eval=norm_eval, with_cp=with_cp, channels_last=channels_last)
        for name in ('num_classes', 'in_chans'):
            if name in spec_args:
                ours = 'in_channels' if name == 'in_chans' else "the head's"
                raise ValueError(f'{name}={spec_args[name]!r} is no argument of a backbone: it is {ours}')
        if norm_cfg is not None:
            kind = norm_cfg.get('type') if isinstance(norm_cfg, dict) else None
            if not isinstance(kind, str) or MODELS.get(kind) is None:
                raise ValueError(f"norm_cfg={norm_cfg!r} must be a dict with the type of a norm, such as 'BN'")
            spec_args['norm_layer'] = lambda channels, **_: build_norm_layer(norm_cfg, channels)
        super().__init__(**spec_args, num_classes=0, in_chans=in_channels)
        del self.num_classes  # OpenMMLab's hooks compare it, in whatever module has it, with the data set's
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.init_cfg = init_cfg
        self.set_grad_checkpointing(with_cp)
        if channels_last:
            self.to(memory_format=torch.channels_last)
        self._freeze()

    def _require_known(self, spec_args: dict[str, Any]) -> None:
        """Name arguments that the network would refuse one at a time, in timm's name."""
        known = {name for cls in self.network.__mro__ for name in inspect.signature(cls.__init__).parameters}
        unknown = {k: v for k, v in spec_args.items() if k not in known - {'self', 'args', 'kwargs'}}
        if unknown:
            raise TypeError(
                f'{type(self).__name__} has no argument {", ".join(f"{k}={v!r}" for k, v in unknown.items())}: if a '
                '_base_ config left it in the backbone, put _delete_=True beside type'
                f'{" (weights are named in init_cfg)" if "pretrained" in unknown else ""}'
            )

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

    def train(self, mode: bool = True) -> '_Backbone':
        super().train(mode)
        self._freeze()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

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
            backbone = {k.removeprefix('backbone.'): v for k, v in state_dict.items() if k.startswith('backbone.')}
            named = backbone or {k: v for k, v in state_dict.items() if not k.startswith(('fc.', 'head.'))}
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
        if source.startswith(_TORCHVISION):
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

    def _checkpoint_filter(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        # ImageClassifier calls this on every checkpoint it loads: here a timm-format one gets mmpretrain's names.
        if is_timm_format(state_dict):
            renamed = to_mmpretrain(state_dict)
            state_dict.clear()
            state_dict.update(renamed)


class _ResNetBackbone(_Backbone, networks.SKResNet, BaseBackbone):
    """The ResNets' part of the door: ``spec`` is the network, and ``kwargs`` override its arguments."""

    network = networks.SKResNet
    stem = ('conv1', 'bn1', 'maxpool')
    stages = ('layer1', 'layer2', 'layer3', 'layer4')

    def __init__(
        self,
        spec: zoo.ModelSpec,
        depth: int | str,
        out_indices: Sequence[int] | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        drop_path_rate: float = 0.0,
        output_stride: int = 32,
        in_channels: int = 3,
        norm_cfg: dict[str, Any] | None = None,
        channels_last: bool = False,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
        **kwargs,
    ) -> None:
        if kwargs.get('unit', 'sk') != 'sk':  # what the row says of SK convolutions does not concern other units
            spec = replace(spec, args={k: v for k, v in spec.args.items() if k != 'sk_kwargs'})
        args = spec.arguments(**kwargs)
        num_stages = count_stages(args['layers'])
        self._build(
            {**args, 'output_stride': output_stride, 'drop_path_rate': drop_path_rate},
            out_indices=(num_stages - 1,) if out_indices is None else out_indices,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            with_cp=with_cp,
            in_channels=in_channels,
            norm_cfg=norm_cfg,
            channels_last=channels_last,
            init_cfg=init_cfg,
            num_stages=num_stages,
        )
        self.depth = depth

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        # timm counts the stem as the first of its feature maps.
        indices = [i + 1 for i in self.out_indices]
        return tuple(self.forward_intermediates(x, indices=indices, stop_early=True, intermediates_only=True))

    def _title(self) -> str:
        return f'{type(self).__name__} of depth {self.depth}'


def _choose(**argument_and_choices) -> Any:
    """The chosen one of the choices; ``_choose(depth=(depth, choices))``."""
    ((name, (value, choices)),) = argument_and_choices.items()
    if isinstance(value, bool) or not isinstance(value, (int, float, str)) or value not in choices:
        raise ValueError(f'{name}={value!r} is unknown: choose one of {", ".join(map(repr, choices))}')
    return choices[value]


@MODELS.register_module()
class SKNet(_ResNetBackbone):
    """SKNet as an OpenMMLab backbone: (B, in_channels, H, W) to a tuple of stage outputs.

    Stage i of ``out_indices`` gives (B, C_i, H / s_i, W / s_i), C = 256, 512, 1024, 2048 and s = 4, 8, 16, 32 (less
    where ``output_stride`` is less); at depth 29, for 32x32 images, C = 256, 512, 1024 and s = 1, 2, 4. The parameters
    are those of timm's ``sknet*`` under the same names, so timm-format checkpoints load as they are, here and into an
    ``ImageClassifier`` that holds this backbone.

    Args:
        depth: 26, 29, 50 or 101.
        out_indices: stages whose outputs are returned, 0 to 3 (2 at depth 29), none twice; the last where None. The
            outputs come in the network's order, as ResNet's do. Stages after them are neither run nor trained.
        frozen_stages: stages whose parameters and BatchNorm statistics stay as they are: 0 the stem, 1 and on the
            stem and so many stages; -1 none.
        norm_eval: keep every BatchNorm in eval mode in training.
        with_cp: gradient checkpointing, memory for time.
        drop_path_rate: stochastic depth, growing linearly to this rate in the last unit.
        output_stride: 32, 16 or 8; below 32 the last stages dilate instead of striding.
        in_channels: channels of the input.
        norm_cfg: OpenMMLab's config of every norm, such as ``dict(type='SyncBN')``; BatchNorm where None.
        channels_last: keep the convolutions' weights, and with them all feature maps, in channels_last.
        init_cfg: OpenMMLab's; ``dict(type='Pretrained', checkpoint='hf-hub:timm/skresnext50_32x4d.ra_in1k')``
            loads published weights. Other checkpoints may be timm's, or hold the backbone under ``backbone.``; weights
            that do not fit are an error.
        **kwargs: further arguments of :class:`~sk_plugins.networks.SKResNet`: ``sk_kwargs``, ``unit``, ``channels``,
            ``small_stem``, ...

    Raises:
        ValueError: an argument out of its range; the message names it, its value and what is right.
        TypeError: an argument that the network does not have.
    """

    depths: dict[int, zoo.ModelSpec] = {depth: zoo.find('SKNet', depth=depth) for depth in (26, 29, 50, 101)}

    def __init__(self, depth: int, **kwargs) -> None:
        super().__init__(_choose(depth=(depth, self.depths)), depth, **kwargs)


@MODELS.register_module()
class SKResNeXt(_ResNetBackbone):
    """SKNet in ResNeXt's terms: groups and their width are arguments.

    ``SKResNeXt(101)`` is ``SKNet(101)``, and timm's ``skresnext50_32x4d`` is ``SKResNeXt(50)``. Outputs and the other
    arguments are :class:`SKNet`'s.

    Args:
        depth: 26, 50, 101 or 152.
        groups: G, groups of every branch (cardinality).
        width_per_group: channels of a group in the first stage.
        **kwargs: further arguments of :class:`~sk_plugins.networks.SKResNet`: ``sk_kwargs``, ``unit``, ...

    Raises:
        ValueError: an argument out of its range; the message names it, its value and what is right.
        TypeError: an argument that the network does not have.
    """

    def __init__(self, depth: int, groups: int = 32, width_per_group: int = 4, **kwargs) -> None:
        layers = _choose(depth=(depth, zoo.LAYERS))
        for name, ours in (('cardinality', 'groups'), ('base_width', 'width_per_group')):
            if name in kwargs:
                raise ValueError(f'{name}={kwargs[name]!r} is called {ours} here')
        for name, value in (('groups', groups), ('width_per_group', width_per_group)):
            check_integer(name, value)
        args = dict(layers=layers, cardinality=groups, base_width=width_per_group)
        super().__init__(replace(zoo.MODELS['sknet50'], args=args), depth, **kwargs)
        self.groups = groups
        self.width_per_group = width_per_group


@MODELS.register_module()
class SKResNet(_ResNetBackbone):
    """SK-ResNet, timm's design for networks without groups: each branch sees its share of the input channels.

    Stage i of ``out_indices`` gives (B, C_i, H / s_i, W / s_i), C = 64, 128, 256, 512 at depth 18 and 34, else 256,
    512, 1024, 2048. The parameters are those of timm's ``skresnet*``, whose published weights load:
    ``hf-hub:timm/skresnet18.ra_in1k`` and ``hf-hub:timm/skresnet34.ra_in1k``. The other arguments are :class:`SKNet`'s.

    Args:
        depth: 18, 34, 50 or '50d' (three 3x3 convolutions in the stem, average pooling in the shortcuts).
        split_input: give each of the M branches 1/M of the input channels; False gives every branch all of them.
        **kwargs: further arguments of :class:`~sk_plugins.networks.SKResNet`: ``sk_kwargs``, ``channels``, ...

    Raises:
        ValueError: an argument out of its range; the message names it, its value and what is right.
        TypeError: an argument that the network does not have.
    """

    depths: dict[int | str, zoo.ModelSpec] = {depth: zoo.find('SKResNet', depth=depth) for depth in (18, 34, 50, '50d')}

    def __init__(self, depth: int | str, split_input: bool = True, **kwargs) -> None:
        check_flags(split_input=split_input)
        check_sk_kwargs(kwargs.get('sk_kwargs'), kwargs.get('unit', 'sk'))
        if 'split_input' in (kwargs.get('sk_kwargs') or {}):
            raise ValueError(f'sk_kwargs={kwargs["sk_kwargs"]!r}: split_input is an argument of its own here')
        if kwargs.get('unit', 'sk') == 'sk':
            kwargs['sk_kwargs'] = {'split_input': split_input, **(kwargs.get('sk_kwargs') or {})}
        super().__init__(_choose(depth=(depth, self.depths)), depth, **kwargs)


@MODELS.register_module()
class SKShuffleNetV2(_Backbone, networks.SKShuffleNetV2, BaseBackbone):
    """ShuffleNetV2 with plain, SE or SK units: (B, in_channels, H, W) to a tuple of stage outputs.

    Stages 0, 1 and 2 have strides 8, 16 and 32, and stage 3 is the last 1x1 convolution, as in mmpretrain's
    ``ShuffleNetV2``: C = 48, 96, 192, 1024 at 0.5x; 116, 232, 464, 1024 at 1x; 176, 352, 704, 1024 at 1.5x; 244, 488,
    976, 2048 at 2x. The parameters are those of timm's ``shufflenetv2_*``, ``seshufflenetv2_*`` and
    ``skshufflenetv2_*``, named as torchvision's, whose published weights load into ``unit='plain'``.

    Args:
        widen_factor: 0.5, 1.0, 1.5 or 2.0.
        unit: 'sk', 'se' or 'plain'.
        out_indices: stages whose outputs are returned, 0 to 3, none twice. The outputs come in the network's order,
            as ResNet's do. Stages after them are neither run nor trained.
        frozen_stages: stages whose parameters and BatchNorm statistics stay as they are: 0 the stem, 1 to 4 the
            stem and so many stages; -1 none.
        norm_eval: keep every BatchNorm in eval mode in training.
        with_cp: gradient checkpointing, memory for time.
        output_stride: 32, 16 or 8; below 32 the last stages dilate instead of striding.
        in_channels: channels of the input.
        norm_cfg: OpenMMLab's config of every norm, such as ``dict(type='SyncBN')``; BatchNorm where None.
        channels_last: keep the convolutions' weights, and with them all feature maps, in channels_last.
        init_cfg: OpenMMLab's, such as ``dict(type='Pretrained', checkpoint=...)``, as :class:`SKNet`'s. torchvision's
            weights of this width, named by their ``https://download.pytorch.org/`` or ``torchvision://`` address, go
            into 'se' and 'sk' units as far as the networks are one; in stages that are frozen they must be whole.
        **kwargs: further arguments of :class:`~sk_plugins.networks.SKShuffleNetV2`: ``sk_kwargs``, ``channels``, ...

    Raises:
        ValueError: an argument out of its range; the message names it, its value and what is right.
        TypeError: an argument that the network does not have.
    """

    network = networks.SKShuffleNetV2
    stem = ('conv1',)
    stages = ('stage2', 'stage3', 'stage4', 'conv5')

    def __init__(
        self,
        widen_factor: float = 1.0,
        unit: str = 'sk',
        out_indices: Sequence[int] = (3,),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        output_stride: int = 32,
        in_channels: int = 3,
        norm_cfg: dict[str, Any] | None = None,
        channels_last: bool = False,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
        **kwargs,
    ) -> None:
        factors = {
            factor: zoo.find('SKShuffleNetV2', widen_factor=factor, unit='plain') for factor in (0.5, 1.0, 1.5, 2.0)
        }
        spec = _choose(widen_factor=(widen_factor, factors))
        self._build(
            spec.arguments(**kwargs, unit=unit, output_stride=output_stride),
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            with_cp=with_cp,
            in_channels=in_channels,
            norm_cfg=norm_cfg,
            channels_last=channels_last,
            init_cfg=init_cfg,
            num_stages=len(self.stages),
        )
        self.widen_factor = widen_factor
        self.unit = unit

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


@CheckpointLoader.register_scheme(prefixes='hf-hub:')
def load_from_hf_hub(filename: str, map_location: str | None = None) -> dict[str, Any]:
    """``hf-hub:OWNER/NAME[@REVISION]``: a repository's safetensors, as a checkpoint with timm's names.

    Raises:
        sk_plugins.weights.HubError: names the repository and the cause.
    """
    repo = filename.removeprefix('hf-hub:')
    state_dict = OrderedDict(hub.load_state_dict(repo, device=str(map_location or 'cpu')))
    # A state dict's metadata reaches each module as it loads: so the backbone can name the repository in an error.
    state_dict._metadata = OrderedDict({name: {'source': filename} for name in ('', 'backbone')})
    return dict(state_dict=state_dict, meta={})


@CheckpointLoader.register_scheme(prefixes='https://download.pytorch.org/')
def load_from_pytorch(filename: str, map_location: str | None = None) -> dict[str, Any]:
    """torchvision's published weights, where mmengine would run whatever a pickle holds; downloaded once a machine.

    Raises:
        sk_plugins.weights.HubError: the file cannot be had, or is not what its name's hash says.
    """

    def load() -> dict[str, Tensor]:
        return load_state_dict_from_url(
            filename, map_location=map_location or 'cpu', check_hash=True, weights_only=True
        )

    try:
        if get_dist_info()[0] == 0:
            state_dict = load()
        barrier()
        if get_dist_info()[0] != 0:
            state_dict = load()
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise HubError(f'{filename}: cannot be loaded: {first_lines(error)}') from error
    return dict(state_dict=OrderedDict(state_dict), meta={})


ModelHub.register_model_index(ROOT / 'model-index.yml', config_prefix=ROOT)
