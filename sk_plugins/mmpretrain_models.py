"""OpenMMLab's door: the networks as backbones in mmpretrain's ``MODELS``, and their weights.

Import it through ``custom_imports = dict(imports=['sk_plugins.mmpretrain_models'])``. From mmdetection or
mmsegmentation the backbones are ``mmpretrain.SKNet`` and so on. The import also registers the project's datasets,
its entries in mmpretrain's model index, and two kinds of checkpoint: ``hf-hub:OWNER/NAME[@REVISION]`` and local
``*.safetensors``.
"""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.runner import CheckpointLoader
from mmpretrain.apis.model import ModelHub
from mmpretrain.models.backbones.base_backbone import BaseBackbone
from mmpretrain.models.utils import build_norm_layer
from mmpretrain.registry import MODELS
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from . import hub, zoo
from . import mmpretrain_datasets as mmpretrain_datasets
from ._resources import ROOT
from .checkpoints import is_timm_format, load_checkpoint, to_mmpretrain
from .networks import SKResNet

__all__ = ['SKNet']

_NUM_STAGES = 4


@MODELS.register_module()
class SKNet(SKResNet, BaseBackbone):
    """SKNet as an OpenMMLab backbone: (B, in_channels, H, W) to a tuple of stage outputs.

    Stage i of ``out_indices`` gives (B, C_i, H / s_i, W / s_i), C = 256, 512, 1024, 2048 and s = 4, 8, 16, 32 (less
    where ``output_stride`` is less). The parameters are those of timm's ``sknet*`` under the same names, so
    timm-format checkpoints load as they are, here and into an ``ImageClassifier`` that holds this backbone.

    Args:
        depth: 26, 50 or 101.
        out_indices: stages whose outputs are returned, 0 to 3.
        frozen_stages: stages whose parameters and BatchNorm statistics stay as they are: 0 the stem, 1 to 4 the
            stem and so many stages; -1 none.
        norm_eval: keep every BatchNorm in eval mode in training.
        with_cp: gradient checkpointing, memory for time.
        drop_path_rate: stochastic depth, growing linearly to this rate in the last unit.
        output_stride: 32, 16 or 8; below 32 the last stages dilate instead of striding.
        in_channels: channels of the input.
        norm_cfg: OpenMMLab's config of every norm, such as ``dict(type='SyncBN')``; BatchNorm where None.
        channels_last: keep the convolutions' weights, and with them all feature maps, in channels_last.
        init_cfg: OpenMMLab's; ``dict(type='Pretrained', checkpoint='hf-hub:timm/skresnext50_32x4d.ra_in1k')``
            loads published weights.
        **kwargs: further arguments of :class:`~sk_plugins.networks.SKResNet`: ``channels``, ``small_stem``,
            ``block_args``, ...

    Raises:
        ValueError: an argument out of its range; the message names it, its value and what is right.
    """

    depths: dict[int, zoo.ModelSpec] = {spec.depth: spec for spec in zoo.MODELS.values()}

    def __init__(
        self,
        depth: int,
        out_indices: Sequence[int] = (3,),
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
        if depth not in self.depths:
            raise ValueError(f'depth={depth!r} is unknown: choose one of {", ".join(map(str, self.depths))}')
        if isinstance(out_indices, int) or not out_indices or not set(out_indices) <= set(range(_NUM_STAGES)):
            raise ValueError(f'out_indices={out_indices!r} must be a sequence of stages from 0 to {_NUM_STAGES - 1}')
        if not isinstance(frozen_stages, int) or not -1 <= frozen_stages <= _NUM_STAGES:
            raise ValueError(f'frozen_stages={frozen_stages!r} must be from -1 (none) to {_NUM_STAGES}')
        if not isinstance(in_channels, int) or in_channels < 1:
            raise ValueError(f'in_channels={in_channels!r} must be an integer of at least 1')
        if norm_cfg is not None:
            kwargs['norm_layer'] = lambda channels, **_: build_norm_layer(norm_cfg, channels)
        super().__init__(
            **{**self.depths[depth].args, **kwargs},
            num_classes=0,
            in_chans=in_channels,
            output_stride=output_stride,
            drop_path_rate=drop_path_rate,
        )
        self.depth = depth
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.init_cfg = init_cfg
        self.set_grad_checkpointing(with_cp)
        if channels_last:
            self.to(memory_format=torch.channels_last)
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        # timm counts the stem as the first of its feature maps.
        indices = [i + 1 for i in self.out_indices]
        return tuple(self.forward_intermediates(x, indices=indices, stop_early=True, intermediates_only=True))

    def init_weights(self, zero_init_last: bool | None = None) -> None:
        """timm's call, from the constructor, initialises; OpenMMLab's, without argument, applies ``init_cfg``."""
        if zero_init_last is None:
            BaseBackbone.init_weights(self)
        else:
            SKResNet.init_weights(self, zero_init_last)

    def train(self, mode: bool = True) -> 'SKNet':
        super().train(mode)
        self._freeze()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _freeze(self) -> None:
        frozen = [self.conv1, self.bn1, self.maxpool] if self.frozen_stages >= 0 else []
        frozen += [getattr(self, f'layer{stage}') for stage in range(1, self.frozen_stages + 1)]
        for module in frozen:
            module.eval()
            module.requires_grad_(False)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, local_metadata, *args) -> None:
        # A timm checkpoint carries the classifier, which a backbone has no use for.
        for name in ('fc.weight', 'fc.bias'):
            state_dict.pop(prefix + name, None)
        if 'source' in local_metadata:
            self._require_fit(state_dict, prefix, local_metadata['source'])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _require_fit(self, state_dict: dict[str, Tensor], prefix: str, source: str) -> None:
        """Raise where mmengine would only warn and leave layers at random: weights that were named don't fit."""
        wanted = {prefix + k: tuple(v.shape) for k, v in self.state_dict().items() if 'num_batches_tracked' not in k}
        given = {k: tuple(v.shape) for k, v in state_dict.items()}
        wrong = [f'{k} is missing' for k in wanted if k not in given]
        wrong += [f'{k} is {given[k]}, not {wanted[k]}' for k in wanted if k in given and given[k] != wanted[k]]
        wrong += [
            f'{k} is not part of it' for k in given if k.startswith(prefix) and k.endswith('weight') and k not in wanted
        ]
        if wrong:
            more = f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''
            raise hub.HubError(
                f'{source}: its weights do not fit this {type(self).__name__} of depth {self.depth}: '
                f'{"; ".join(wrong[:3])}{more}'
            )

    def _checkpoint_filter(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        # ImageClassifier calls this on every checkpoint it loads: here a timm-format one gets mmpretrain's names.
        if is_timm_format(state_dict):
            renamed = to_mmpretrain(state_dict)
            state_dict.clear()
            state_dict.update(renamed)


@CheckpointLoader.register_scheme(prefixes='hf-hub:')
def load_from_hf_hub(filename: str, map_location: str | None = None) -> dict[str, Any]:
    """``hf-hub:OWNER/NAME[@REVISION]``: a repository's safetensors, as a checkpoint with timm's names.

    Raises:
        sk_plugins.hub.HubError: names the repository and the cause.
    """
    repo = filename.removeprefix('hf-hub:')
    state_dict = OrderedDict(hub.load_state_dict(repo, device=str(map_location or 'cpu')))
    # A state dict's metadata reaches each module as it loads: so the backbone can name the repository in an error.
    state_dict._metadata = OrderedDict({name: {'source': repo} for name in ('', 'backbone')})
    return dict(state_dict=state_dict, meta={})


@CheckpointLoader.register_scheme(prefixes=r'(?!\S+://).*\.safetensors$')
def load_from_safetensors(filename: str, map_location: str | None = None) -> dict[str, Any]:
    """A local safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        sk_plugins.checkpoints.CheckpointError: the file is not safetensors.
    """
    state_dict, _ = load_checkpoint(Path(filename).expanduser())
    return dict(state_dict=OrderedDict(state_dict), meta={})


ModelHub.register_model_index(ROOT / 'model-index.yml', config_prefix=ROOT)
