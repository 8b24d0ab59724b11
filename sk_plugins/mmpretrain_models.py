"""The networks as backbones in mmpretrain's ``MODELS``, and their weights.

Import it through ``custom_imports = dict(imports=['sk_plugins.mmpretrain_models'])``. From mmdetection or
mmsegmentation the backbones are ``mmpretrain.SKNet`` and so on. The import also registers the project's datasets,
hooks, crop and initialiser, its entries in mmpretrain's model index, and checkpoints by
``hf-hub:OWNER/NAME[@REVISION]``. All else of OpenMMLab stays as it is: loaders that run nothing, and training that
survives, are :mod:`sk_plugins.openmmlab.runtime`.
"""

from collections import OrderedDict
from typing import Any

from mmengine.runner import CheckpointLoader
from mmpretrain.apis.model import ModelHub
from mmpretrain.registry import MODELS

from . import zoo
from ._arguments import check_flags, check_integer, check_positive, check_sk_kwargs
from ._resources import ROOT
from .openmmlab import datasets as datasets
from .openmmlab import hooks as hooks
from .openmmlab import initializers as initializers
from .openmmlab.backbones import ResNetBackbone, ShuffleNetBackbone, SimCLRBackbone
from .weights import hub

__all__ = ['SKNet', 'SKResNeXt', 'SKResNet', 'SKResNetSimCLR', 'SKShuffleNetV2']


def _choose(**argument_and_choices) -> Any:
    """The chosen one of the choices; ``_choose(depth=(depth, choices))``."""
    ((name, (value, choices)),) = argument_and_choices.items()
    if isinstance(value, bool) or not isinstance(value, (int, float, str)) or value not in choices:
        raise ValueError(f'{name}={value!r} is unknown: choose one of {", ".join(map(repr, choices))}')
    return choices[value]


@MODELS.register_module()
class SKNet(ResNetBackbone):
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
class SKResNeXt(ResNetBackbone):
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

    def __init__(self, depth: int, groups: int = 32, width_per_group: float = 4, **kwargs) -> None:
        _choose(depth=(depth, zoo.LAYERS))
        for name, ours in (('cardinality', 'groups'), ('base_width', 'width_per_group')):
            if name in kwargs:
                raise ValueError(f'{name}={kwargs[name]!r} is called {ours} here')
        check_integer('groups', groups)
        check_positive('width_per_group', width_per_group)
        super().__init__(zoo.skresnext(depth, groups, width_per_group), depth, **kwargs)
        self.groups = groups
        self.width_per_group = width_per_group


@MODELS.register_module()
class SKResNet(ResNetBackbone):
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
class SKResNetSimCLR(SimCLRBackbone):
    """SimCLRv2's ResNet with selective kernels, for images in [0, 1]: a mean of 0, and a std of 255 for bytes.

    Stage i of ``out_indices`` gives (B, C_i, H / s_i, W / s_i), C = 256 w, 512 w, 1024 w, 2048 w and s = 4, 8, 16, 32,
    with w the width factor. The parameters are those of timm's ``skresnet*_simclr``, whose published weights load:
    ``hf-hub:lightly-ai/simclrv2-imagenet1k-r50_1x_sk1`` and its siblings. The other arguments are :class:`SKNet`'s.

    Args:
        depth: 26, 50, 101 or 152.
        width_factor: w, 1 and on.
        **kwargs: further arguments of :class:`~sk_plugins.networks.SKResNetSimCLR`: ``sk_kwargs``, ``channels``, ...

    Raises:
        ValueError: an argument out of its range; the message names it, its value and what is right.
        TypeError: an argument that the network does not have.
    """

    def __init__(self, depth: int, width_factor: int = 1, **kwargs) -> None:
        _choose(depth=(depth, zoo.LAYERS))
        check_integer('width_factor', width_factor)
        super().__init__(zoo.simclr(depth, width_factor), depth, **kwargs)
        self.width_factor = width_factor


@MODELS.register_module()
class SKShuffleNetV2(ShuffleNetBackbone):
    """ShuffleNetV2 with plain, SE or SK units: (B, in_channels, H, W) to a tuple of stage outputs.

    Stages 0, 1 and 2 have strides 8, 16 and 32, and stage 3 is the last 1x1 convolution, as in mmpretrain's
    ``ShuffleNetV2``: C = 48, 96, 192, 1024 at 0.5x; 116, 232, 464, 1024 at 1x; 176, 352, 704, 1024 at 1.5x; 244, 488,
    976, 2048 at 2x. The parameters are those of timm's ``shufflenetv2_*``, ``seshufflenetv2_*`` and
    ``skshufflenetv2_*``, named as torchvision's, whose published weights load into ``unit='plain'``.

    Args:
        widen_factor: 0.5, 1.0, 1.5 or 2.0.
        unit: 'sk', 'se' or 'plain'.
        out_indices: stages whose outputs are returned, 0 to 3, none twice; the last where None. The outputs come in the
            network's order, as ResNet's do. Stages after them are neither run nor trained.
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

    factors: dict[float, zoo.ModelSpec] = {
        factor: zoo.find('SKShuffleNetV2', widen_factor=factor, unit='plain') for factor in (0.5, 1.0, 1.5, 2.0)
    }

    def __init__(self, widen_factor: float = 1.0, unit: str = 'sk', **kwargs) -> None:
        super().__init__(_choose(widen_factor=(widen_factor, self.factors)), widen_factor, unit, **kwargs)


@CheckpointLoader.register_scheme(prefixes='hf-hub:')
def load_from_hf_hub(filename: str, map_location: str | None = None) -> dict[str, Any]:
    """``hf-hub:OWNER/NAME[@REVISION]``: a repository's safetensors, as a checkpoint with timm's names.

    Of a repository that the zoo names with a pickle, that is read, weights-only.

    Raises:
        sk_plugins.weights.HubError: names the repository and the cause.
    """
    repo = filename.removeprefix('hf-hub:')
    state_dict = OrderedDict(hub.load_state_dict(repo, device=str(map_location or 'cpu')))
    # A state dict's metadata reaches each module as it loads: so the backbone can name the repository in an error.
    state_dict._metadata = OrderedDict({name: {'source': filename} for name in ('', 'backbone')})
    return dict(state_dict=state_dict, meta={})


ModelHub.register_model_index(ROOT / 'model-index.yml', config_prefix=ROOT)
