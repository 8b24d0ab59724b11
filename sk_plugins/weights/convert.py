"""SK networks of other projects: whose a state dict is, the network's shape, and its weights under our names.

Names and shapes of the tensors tell nearly everything: units per stage, widths, groups, M, d, kernels, classes. What
they can't tell (strides, the dilation of a 3x3, where there is an activation) is what the project they come from does.
Two identities make other designs fit ours with equal outputs: a convolution's bias before a BatchNorm is a shift of the
norm's running mean, and channels of zeros change nothing that is computed from them.
"""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from timm.layers import create_pool2d
from timm.models import clean_state_dict
from torch import Tensor, nn

from .. import zoo
from .._text import several
from ..layers import SelectiveKernel, SelectiveKernelAttention
from ..networks import SKBottleneck, SKResNet, SKResNetSimCLR
from . import simclr
from .files import CheckpointError, find_fault, load_checkpoint, pick_state_dict
from .fit import COUNTER, find_misfits, require_fit
from .names import BACKBONE, is_own

__all__ = [
    'SKUnexpandedBottleneck',
    'ThirdPartyWeights',
    'is_third_party',
    'load_third_party',
    'recognise',
    'recognise_third_party',
]

SUPPORTED = (
    'PyTorch networks of SKConv and SKUnit (developer0hye/SKNet-PyTorch, syt2/SKNet and what is built on them) and '
    "their SKConv layers one by one, PytorchInsight's sk_resnet50/101/152, lucid's sk_resnet_18/34/50, "
    "sk_resnext_50_32x4d and its SelectiveKernel layer, Holocron's sknet50/101/152 and its SKConv2d layer, MindCV's "
    "skresnet18/34/50 and skresnext50_32x4d (.ckpt), the authors' Caffe models (.caffemodel), and SimCLRv2 as "
    "lightly-ai's PyTorch files and Google's TensorFlow 1 checkpoints"
)


class SKUnexpandedBottleneck(SKBottleneck):
    """SK unit whose output is as wide as ``planes``: (B, inplanes, H, W) to (B, planes, H / stride, W / stride)."""

    expansion = 1


@dataclass(frozen=True)
class ThirdPartyWeights:
    """A state dict of another project, in our terms.

    Attributes:
        origin: whose it is.
        network: :class:`~sk_plugins.networks.SKResNet`, or :class:`~sk_plugins.layers.SelectiveKernel`
            for a layer alone.
        arguments: what ``network`` is built with.
        state_dict: its weights, copies under our names and in the dtype they came in.
        notes: what was folded or padded, and what the state dict could not tell.
        ceil_pool: whether the stem pools as Caffe does, 3x3 / 2 without padding and rounding the size up.
        same_pool: whether it pools as TensorFlow's and MindSpore's 'same' does: on even sizes the padding is at the
            bottom and the right alone.
        sigmoid: whether the attention's logits go through a sigmoid before the softmax.
        linear_first: whether no activation follows a bottleneck's first convolution.
    """

    origin: str
    network: type[nn.Module]
    arguments: dict[str, Any]
    state_dict: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    ceil_pool: bool = False
    same_pool: bool = False
    sigmoid: bool = False
    linear_first: bool = False

    def build(self) -> nn.Module:
        """The network with its weights, in eval mode: the outputs are those of the network they come from."""
        model = self.network(**self.arguments, device='meta')
        if self.ceil_pool:
            model.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)
        if self.same_pool:
            model.maxpool = create_pool2d('max', 3, 2, padding='same')
        for module in model.modules():
            if self.sigmoid and isinstance(module, SelectiveKernelAttention):
                module.softmax = nn.Sequential(nn.Sigmoid(), module.softmax)
            if self.linear_first and isinstance(module, SKBottleneck):
                module.conv1.act = nn.Identity()
        # Assigned, for their dtype; copies, for the next network that is built.
        model.load_state_dict({k: v.clone() for k, v in self.state_dict.items()}, strict=True, assign=True)
        return model.eval()

    def timm_model(self) -> tuple[str, dict[str, Any]]:
        """The registered timm name and the arguments of ``timm.create_model`` that make this network.

        Raises:
            ValueError: there are none; the message says why.
        """
        spec, args = self._named()
        return spec.name, args

    def openmmlab_backbone(self) -> dict[str, Any]:
        """The config of this network as a backbone of OpenMMLab.

        Raises:
            ValueError: there is none; the message says why.
        """
        spec, args = self._named()
        if args.get('projection'):
            raise ValueError(
                f'{self.origin}: its classifier stands on the contrastive head, which no backbone of OpenMMLab has; '
                f"timm's {spec.name} has it with projection={args['projection']}"
            )
        kind, named = spec.openmmlab
        if 'in_chans' in args:
            args['in_channels'] = args.pop('in_chans')
        return {'type': kind, **named, **{k: v for k, v in args.items() if k != 'num_classes'}}

    def _named(self) -> tuple[zoo.ModelSpec, dict[str, Any]]:
        """The zoo's SKNet with as many units, and the arguments that make it this network."""
        if self.network is SKResNetSimCLR:
            args = {**self.arguments}
            spec = zoo.find_simclr(args.pop('layers'), args.pop('width_factor'))
            if spec is None:
                raise ValueError(f'{self.origin}: no registered model is of this depth and width')
            return spec, args
        if self.network is not SKResNet:
            raise ValueError(f'{self.origin}: a layer on its own has no name in a registry')
        if self.ceil_pool or self.same_pool:
            whose = 'Caffe' if self.ceil_pool else 'MindSpore'
            raise ValueError(f"{self.origin}: the stem's pooling is {whose}'s, which no registered model has")
        if self.sigmoid:
            raise ValueError(f'{self.origin}: its attention has a sigmoid, which no registered model has')
        if 'block' in self.arguments:
            raise ValueError(f'{self.origin}: its units do not widen their output, which no registered model has')
        args = {k: v for k, v in self.arguments.items() if k != 'layers'}
        for spec in zoo.MODELS.values():
            if spec.openmmlab[0] == 'SKNet' and tuple(spec.args['layers']) == self.arguments['layers']:
                return spec, args
        raise ValueError(f'{self.origin}: no registered model has {self.arguments["layers"]} units in its stages')


def load_third_party(source: str | os.PathLike | Mapping[str, Any], **options) -> nn.Module:
    """Build a network of ours from the weights of another project's, with equal outputs.

    :data:`~sk_plugins.weights.convert.SUPPORTED` says what is supported. :func:`recognise_third_party` says what a file
    was recognised as, and what was done to its tensors.

    Args:
        source: a file as for :func:`~sk_plugins.weights.load_checkpoint`, or a state dict, as it is or under
            ``'state_dict'`` or ``'model'``.
        **options: those of :func:`~sk_plugins.weights.convert.recognise`: ``prefix``, and what weights can't tell
            (``stride`` and ``in_channels`` of a layer on its own, ``reduce_act``, ``dilations``).

    Returns:
        An :class:`~sk_plugins.networks.SKResNet`, or for an SK layer on its own a
        :class:`~sk_plugins.layers.SelectiveKernel`, in eval mode and in the dtype of the weights.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: a file that cannot be read, or weights that are not supported or not whole; the message names
            the file, the tensors, and what is supported.
    """
    return recognise_third_party(source, **options).build()


def recognise_third_party(
    source: str | os.PathLike | Mapping[str, Any], use_ema: bool = True, **options
) -> ThirdPartyWeights:
    """What :func:`load_third_party` builds its network from. Arguments and errors as there, ``use_ema`` as in
    :func:`load_checkpoint`.
    """
    if isinstance(source, Mapping):
        where, state_dict = '', clean_state_dict(pick_state_dict(source, use_ema))
    else:
        where = f'{source}: '
        state_dict, _ = load_checkpoint(source, use_ema)
        options = {**told_by_path(source, state_dict), **options}
    try:
        return recognise(state_dict, **options)
    except ValueError as error:
        raise CheckpointError(f'{where}{error}') from error


def told_by_path(path: str | os.PathLike, state_dict: Mapping[str, Tensor]) -> dict[str, int]:
    """Arguments of :func:`recognise` that names of Google's folders tell, and the weights in them do not."""
    few_labels = re.search(r'finetuned_10?pct', str(path)) and simclr.is_tensorflow(state_dict)
    return dict(projection=1) if few_labels else {}


def recognise(
    state_dict: Mapping[str, Tensor],
    prefix: str = '',
    stride: int = 1,
    in_channels: int | None = None,
    reduce_act: bool | None = None,
    dilations: Sequence[int] | None = None,
    projection: int | None = None,
) -> ThirdPartyWeights:
    """Say whose SK network or SK layer a state dict is, and put it in our terms.

    Args:
        state_dict: tensors under the names of their own project.
        prefix: look only at the tensors below this module, such as ``'stage_1.0.feas.2'``: for the SK layers of a
            network that is not supported as a whole.
        stride: of a layer on its own, which its weights can't tell.
        in_channels: input channels of a layer on its own; as many as it puts out where None, as in all of them.
        reduce_act: whether a ReLU follows the reduction to d channels; where None, there is one unless the reduction
            is a single layer named ``fc``, as in the projects that have it so.
        dilations: of the branches; where None, those of the project: true kernels where the kernels differ, else
            1, 2, ... in the SKConv lineage.
        projection: of SimCLRv2, how many layers of the contrastive head stand before the classifier; where None, 1
            for a file below ``finetuned_1pct`` or ``finetuned_10pct``, as Google's folders are called, else 0: a
            network is fine-tuned from the contrastive head's first layer where labels are few (arXiv:2006.10029).

    Raises:
        ValueError: a layout that is not known here, or tensors that are missing, unknown or of another shape than the
            rest calls for; the message names them, what the state dict looks like, and what is supported.
    """
    tensors = {k: v for k, v in state_dict.items() if not k.endswith(_COUNTERS)}
    if prefix:
        below = prefix.removesuffix('.') + '.'
        tensors = {k.removeprefix(below): v for k, v in tensors.items() if k.startswith(below)}
        if not tensors:
            raise ValueError(f'prefix={prefix!r}: no tensor lies below it; the first are {several(state_dict)}')
    if simclr.is_lightly(tensors) or simclr.is_tensorflow(tensors):
        return _convert_simclr(tensors, projection)
    lineage = _find_lineage(tensors)
    if lineage is None:
        raise ValueError(f'not recognised: it looks like {_describe(tensors)}. Supported are {SUPPORTED}')
    if lineage.refusal is not None:
        raise ValueError(f'{lineage.origin}: {lineage.refusal}')
    if not lineage.layer and (stride != 1 or in_channels is not None):
        given = f'stride={stride!r}' if stride != 1 else f'in_channels={in_channels!r}'
        raise ValueError(f'{given} is for a layer on its own, and this is {lineage.origin}')
    try:
        return _convert(lineage, tensors, stride, in_channels, reduce_act, dilations)
    except (IndexError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(
            f'recognised as {lineage.origin}, but with tensors whose shapes do not go together: {error}'
        ) from error


def _convert(
    lineage: '_Lineage',
    tensors: Mapping[str, Tensor],
    stride: int,
    in_channels: int | None,
    reduce_act: bool | None,
    dilations: Sequence[int] | None,
) -> ThirdPartyWeights:
    weights = _Weights(lineage.origin, tensors, lineage.rename)
    sk_kwargs = dict(lineage.sk_kwargs)
    if reduce_act is None:
        reduce_act = not any(re.match(r'(.*\.)?fc\.weight', n) for n in weights.theirs_of('attn.fc_reduce.weight'))
    if not reduce_act:
        sk_kwargs['reduce_act'] = False
    if lineage.layer:
        network, args, sizes = SelectiveKernel, *_layer_arguments(weights, lineage, in_channels, dilations)
        args |= sk_kwargs | ({'stride': stride} if stride != 1 else {})
    else:
        find = _timms_arguments if lineage.timms_design else _network_arguments
        network, args, sizes = SKResNet, *find(weights, lineage, sk_kwargs, dilations)
    try:
        model = network(**args, device='meta')
    except ValueError as error:
        raise ValueError(f'{lineage.origin}: its tensors call for a network that there is not: {error}') from error
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    state_dict = weights.fit(shapes, sizes)
    return ThirdPartyWeights(
        lineage.origin, network, args, state_dict, (*weights.notes, *lineage.notes), lineage.ceil_pool,
        lineage.same_pool, lineage.sigmoid, lineage.linear_first,
    )  # fmt: skip


def _convert_simclr(tensors: Mapping[str, Tensor], projection: int | None) -> ThirdPartyWeights:
    """SimCLRv2's network with its classifier, on as many layers of the contrastive head as that sees."""
    notes = ['the input is RGB in [0, 1], neither shifted nor scaled']
    if simclr.is_lightly(tensors):
        origin = "lightly-ai's SimCLRv2"
        state_dict = simclr.from_lightly(tensors, projection or 0)
        if projection:
            notes.append('the classifier, which was trained on the features, is left out')
    else:
        origin = "Google's SimCLRv2"
        found = simclr.count_projection(tensors)
        if projection is None and found is None:
            notes.append('what its classifier stands on is not told: taken as on the features (projection=0)')
        projection = (found or 0) if projection is None else projection
        variables = {k: v for k, v in tensors.items() if not v.is_meta}
        state_dict = simclr.from_tensorflow(variables, projection)
    if projection:
        notes.append(f'the classifier stands on {projection} of the contrastive head')
    try:
        arguments = simclr.network_arguments(state_dict)
        wanted = SKResNetSimCLR(**arguments, device='meta').state_dict()
    except ValueError as error:
        raise ValueError(f'{origin}: {error}') from error
    for name in wanted:
        if name.endswith(COUNTER):
            state_dict.setdefault(name, torch.tensor(0))
    require_fit(state_dict, wanted, origin, 'the network of their shapes', ValueError)
    return ThirdPartyWeights(origin, SKResNetSimCLR, arguments, state_dict, tuple(notes))


def is_third_party(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of another project's SK network or SK layer that is known here."""
    if simclr.is_lightly(state_dict) or simclr.is_tensorflow(state_dict):
        return True
    return _find_lineage(state_dict) is not None


# What the profiler thop leaves in state dicts.
_COUNTERS = ('total_ops', 'total_params')
# Tensors of a BatchNorm, under our names.
_NORM = r'(?:^|\.)(?:bn\d?|downsample\.1)\.(weight|bias|running_mean|running_var)$'


# Whose names mean what. A rule is the start of their name and what stands in its place in ours.


def _by_rules(rules: Mapping[str, str]) -> Callable[[str], str | None]:
    def rename(name: str) -> str | None:
        for theirs, ours in rules.items():
            if match := re.match(theirs, name):
                return match.expand(ours) + name[match.end() :]
        return None

    return rename


def _in_units(units: str, rules: Mapping[str, str]) -> dict[str, str]:
    return {units + theirs: r'layer\g<stage>.\g<unit>.' + ours for theirs, ours in rules.items()}


_LEAF = '(?=weight$|bias$)'

_SKCONV_LAYER = {
    r'convs\.(?P<m>\d+)\.(?:0|conv)\.': r'paths.\g<m>.conv.',
    r'convs\.(?P<m>\d+)\.(?:1|bn)\.': r'paths.\g<m>.bn.',
    rf'fc\.(?:0\.)?{_LEAF}': 'attn.fc_reduce.',
    r'fc\.1\.': 'attn.bn.',
    rf'fcs\.(?P<m>\d+)\.(?:0\.)?{_LEAF}': r'attn.fc_select.\g<m>.',
}

_SKCONV = {
    rf'basic_conv\.0\.{_LEAF}|conv1\.{_LEAF}': 'conv1.',
    r'basic_conv\.1\.|bn1\.': 'bn1.',
    rf'(?:classifier|fc)\.(?:0\.)?{_LEAF}': 'fc.',
    **_in_units(
        r'stage_(?P<stage>\d+)\.(?P<unit>\d+)\.',
        {
            rf'conv(?P<c>[13])\.(?:0\.)?{_LEAF}': r'conv\g<c>.conv.',
            r'(?:conv(?P<c>[13])\.1|bn(?P<b>[13]))\.': r'conv\g<c>\g<b>.bn.',
            r'shortcut\.(?P<c>[01])\.': r'downsample.\g<c>.',
            **{rf'conv2(?:_sk)?\.{theirs}': f'conv2.{ours}' for theirs, ours in _SKCONV_LAYER.items()},
        },
    ),
}

_PYTORCH_INSIGHT = {
    r'(?=(?:conv1|bn1|fc)\.)': '',
    **_in_units(
        r'layer(?P<stage>\d+)\.(?P<unit>\d+)\.',
        {
            r'conv(?P<c>[13])\.': r'conv\g<c>.conv.',
            r'bn(?P<c>[13])\.': r'conv\g<c>.bn.',
            r'conv2\.': 'conv2.paths.0.conv.',
            r'bn2\.': 'conv2.paths.0.bn.',
            r'conv2g\.': 'conv2.paths.1.conv.',
            r'bn2g\.': 'conv2.paths.1.bn.',
            r'conv_fc1\.': 'conv2.attn.fc_reduce.',
            r'bn_fc1\.': 'conv2.attn.bn.',
            r'conv_fc2\.': 'conv2.attn.fc_select.',
            r'(?=downsample\.)': '',
        },
    ),
}

_LUCID_LAYER = {
    r'branches\.(?P<m>\d+)\.': r'paths.\g<m>.conv.',
    r'attention\.1\.': 'attn.fc_reduce.',
    r'attention\.2\.': 'attn.bn.',
    r'attention\.4\.': 'attn.fc_select.',
}

_LUCID = {
    r'stem\.(?:conv|0)\.': 'conv1.',
    r'stem\.(?:bn|1)\.': 'bn1.',
    r'(?=fc\.)': '',
    **_in_units(
        r'layer(?P<stage>\d+)\.(?P<unit>\d+)\.',
        {
            r'(?=conv1\.(?:conv|bn)\.)': '',
            **{rf'sk_module\.{theirs}': f'conv2.{ours}' for theirs, ours in _LUCID_LAYER.items()},
            r'bn2\.': 'conv2.bn.',
            r'conv3\.0\.': 'conv3.conv.',
            r'conv3\.1\.': 'conv3.bn.',
            r'(?=downsample\.)': '',
        },
    ),
}

# A Caffe layer's parameters are numbered blobs: of its own BatchNorm, run by cuDNN, these.
_CAFFE_NORM = ('weight', 'bias', 'running_mean', 'running_var')
_CAFFE = {
    r'conv1/7x7_s2': 'conv1',
    r'classifier': 'fc',
    **_in_units(
        r'layer(?P<stage>\d+)\.(?P<unit>\d+)/',
        {
            r'1x1_reduce': 'conv1.conv',
            r'3x3g\d+$': 'conv2.paths.0.conv',
            r'3x3g\d+d2$': 'conv2.paths.1.conv',
            r'B_fc1': 'conv2.attn.fc_reduce',
            r'B_fc2': 'conv2.attn.fc_select',
            r'1x1_increase': 'conv3.conv',
            r'1x1_proj': 'downsample.0',
        },
    ),
}

_HOLOCRON_LAYER = {
    r'path_convs\.(?P<m>\d+)\.0\.': r'paths.\g<m>.conv.',
    r'path_convs\.(?P<m>\d+)\.1\.': r'paths.\g<m>.bn.',
    r'sa\.1\.': 'attn.fc_reduce.',
    r'sa\.2\.': 'attn.bn.',
    r'sa\.4\.': 'attn.fc_select.',
}

_HOLOCRON = {
    r'features\.0\.': 'conv1.',
    r'features\.1\.': 'bn1.',
    r'head\.': 'fc.',
    **_in_units(
        r'layer(?P<stage>\d+)\.(?P<unit>\d+)\.',
        {
            r'conv\.0\.': 'conv1.conv.',
            r'conv\.1\.': 'conv1.bn.',
            **{rf'conv\.3\.{theirs}': f'conv2.{ours}' for theirs, ours in _HOLOCRON_LAYER.items()},
            r'conv\.4\.': 'conv3.conv.',
            r'conv\.5\.': 'conv3.bn.',
            r'(?=downsample\.)': '',
        },
    ),
}


def _from_holocron(name: str) -> str | None:
    # The stem is a convolution, a norm, an activation and a pooling.
    return _by_rules(_HOLOCRON)(re.sub(r'^features\.([4-9])\.(?=\d+\.)', lambda m: f'layer{int(m[1]) - 3}.', name))


_MINDCV = {
    r'(?=(?:conv1|bn1)\.(?:weight|bias|running_\w+)$)': '',
    r'classifier\.': 'fc.',
    **_in_units(
        r'layer(?P<stage>\d+)\.(?P<unit>\d+)\.',
        {
            r'(?P<conv>conv[12])\.paths\.(?P<m>\d+)\.features\.0\.': r'\g<conv>.paths.\g<m>.conv.',
            r'(?P<conv>conv[12])\.paths\.(?P<m>\d+)\.features\.1\.': r'\g<conv>.paths.\g<m>.bn.',
            r'(?=conv[12]\.attn\.)': '',
            r'(?P<conv>conv[123])\.0\.': r'\g<conv>.conv.',
            r'(?P<conv>conv[123])\.1\.': r'\g<conv>.bn.',
            r'down_sample\.': 'downsample.',
        },
    ),
}
_MINDSPORES = {'gamma': 'weight', 'beta': 'bias', 'moving_mean': 'running_mean', 'moving_variance': 'running_var'}


def _from_mindcv(name: str) -> str | None:
    module, _, leaf = name.rpartition('.')
    return _by_rules(_MINDCV)(f'{module}.{_MINDSPORES.get(leaf, leaf)}')


_NORM_OF = {'conv1': 'bn1', 'downsample.0': 'downsample.1', 'attn.fc_reduce': 'attn.bn', '.conv': '.bn'}


def _norm_of(convolution: str) -> str:
    """Our name of the BatchNorm after a convolution."""
    end = next(end for end in _NORM_OF if convolution == end or convolution.endswith('.' + end.removeprefix('.')))
    return convolution.removesuffix(end) + _NORM_OF[end]


def _from_caffe(name: str) -> str | None:
    layer, _, blob = name.rpartition('.')
    # conv2_1 to conv5_3: their first stage is the stem.
    layer = re.sub(r'^conv([2-9])_(\d+)', lambda m: f'layer{int(m[1]) - 1}.{int(m[2]) - 1}', layer)
    convolution = _by_rules(_CAFFE)(layer.removesuffix('/bn'))
    parts = _CAFFE_NORM if layer.endswith('/bn') else ('weight', 'bias')
    if convolution is None or int(blob) >= len(parts):
        return None
    return f'{_norm_of(convolution) if layer.endswith("/bn") else convolution}.{parts[int(blob)]}'


@dataclass(frozen=True)
class _Lineage:
    origin: str
    mark: str  # start of a name that no other lineage has
    rename: Callable[[str], str | None] = str
    layer: bool = False
    sk_kwargs: tuple[tuple[str, Any], ...] = ()
    dilated: bool = False  # branches of one kernel size are dilated 1, 2, ...
    ceil_pool: bool = False
    same_pool: bool = False
    sigmoid: bool = False
    linear_first: bool = False
    timms_design: bool = False  # of units and attention, in which each branch may see its share of the input
    notes: tuple[str, ...] = ()
    refusal: str | None = None


_LINEAGES = (
    _Lineage(
        "pppLang/SKNet's network of SKUnit",
        r'stage_\d+\.\d+\.feas\.\d+\.convs\.',
        refusal=(
            'its units have no ReLU after the first 1x1 and a BatchNorm after the SK convolution, so they are no units '
            "of ours, and its weights don't tell its strides; its SKConv layers load one by one, with "
            "prefix='stage_1.0.feas.2' and so on"
        ),
    ),
    _Lineage('an SKConv layer', r'convs\.0\.(0|conv)\.weight$', _by_rules(_SKCONV_LAYER), layer=True, dilated=True),
    _Lineage(
        'a network of SKConv and SKUnit (as of developer0hye, syt2)',
        r'stage_\d+\.\d+\.conv2(_sk)?\.convs\.0\.',
        _by_rules(_SKCONV),
        dilated=True,
    ),
    _Lineage("PytorchInsight's sk_resnet", r'layer\d+\.\d+\.(conv2g|conv_fc1)\.', _by_rules(_PYTORCH_INSIGHT)),
    _Lineage(
        "lucid's SelectiveKernel layer",
        r'branches\.0\.weight$',
        _by_rules(_LUCID_LAYER),
        layer=True,
        sk_kwargs=(('select', 'shared'), ('norm_position', 'none')),
        notes=('BatchNorm and ReLU follow it in its unit, and are not part of it',),
    ),
    _Lineage(
        "lucid's SKNet",
        r'layer\d+\.\d+\.sk_module\.branches\.',
        _by_rules(_LUCID),
        sk_kwargs=(('select', 'shared'), ('norm_position', 'output')),
    ),
    _Lineage(
        "Holocron's SKConv2d layer",
        r'path_convs\.0\.0\.weight$',
        _by_rules(_HOLOCRON_LAYER),
        layer=True,
        dilated=True,
        sigmoid=True,
    ),
    _Lineage(
        "Holocron's SKNet",
        r'features\.\d+\.\d+\.conv\.3\.path_convs\.',
        _from_holocron,
        dilated=True,
        sigmoid=True,
        notes=('a sigmoid goes before the softmax over the branches',),
    ),
    _Lineage(
        "MindCV's SK network",
        r'layer\d+\.\d+\.conv[12]\.paths\.0\.features\.',
        _from_mindcv,
        dilated=True,
        same_pool=True,
        linear_first=True,
        timms_design=True,
        notes=(
            "the stem pools as MindSpore's 'same' does, which pads even sizes at the bottom and the right alone",
            'no activation follows the first convolution of a bottleneck',
        ),
    ),
    _Lineage(
        "the authors' Caffe SKNet",
        r'conv\d_\d+/3x3g\d+d2\.',
        _from_caffe,
        dilated=True,
        ceil_pool=True,
        notes=(
            'the stem pools as Caffe does, 3x3 / 2 without padding and rounding up',
            'the input is as Caffe reads it: blue, green, red, each 0 to 255 less its mean, not divided by a deviation',
        ),
    ),
)


def _find_lineage(names: Iterable[str]) -> _Lineage | None:
    names = list(names)
    return next((known for known in _LINEAGES if any(re.match(known.mark, name) for name in names)), None)


class _Weights:
    """The tensors of a lineage under our names, biases folded; ``notes`` tells what was done to them."""

    def __init__(self, origin: str, tensors: Mapping[str, Tensor], rename: Callable[[str], str | None]) -> None:
        self.origin = origin
        self.notes: list[str] = []
        self.tensors: dict[str, Tensor] = {}
        self.theirs: dict[str, str] = {}
        self.misfits: list[str] = []
        for theirs, tensor in tensors.items():
            ours = rename(theirs)
            if ours is None or ours in self.tensors:
                self.misfits.append(f'{theirs} is not part of it')
            else:
                self.tensors[ours] = _same_axes(ours, tensor.detach())
                self.theirs[ours] = theirs
        self._refuse_faults()
        self._join_selections()
        self._fold_biases()

    def _refuse_faults(self) -> None:
        weights = {self.theirs[name]: t for name, t in self.tensors.items() if not name.endswith(COUNTER)}
        self._fail([f'{name} is {tuple(tensor.shape)}' for name, tensor in weights.items() if tensor.numel() == 0])
        if not all(tensor.is_meta for tensor in weights.values()):  # else it is a question of shapes alone
            self._fail([f'{name} is {fault}' for name, tensor in weights.items() if (fault := find_fault(tensor))])

    def theirs_of(self, end: str) -> list[str]:
        """Their names of all tensors whose name of ours ends so."""
        return [theirs for ours, theirs in self.theirs.items() if ours.endswith(end)]

    def ending(self, pattern: str) -> list[str]:
        """Our names that match in full."""
        return [name for name in self.tensors if re.fullmatch(pattern, name)]

    def size(self, pattern: str, axis: int) -> int:
        """The size along an axis of the first tensor whose name of ours matches; units of a stage agree on it."""
        names = self.ending(pattern)
        if not names:
            self._fail(['what is ' + pattern.replace('\\d+', '*').replace('\\', '') + ' here is missing'])
        shape = self.tensors[names[0]].shape
        if len(shape) <= axis:
            self._fail([f'{self.theirs[names[0]]} has the shape {tuple(shape)}'])
        return shape[axis]

    def fit(
        self, shapes: Mapping[str, tuple[int, ...]], sizes: Callable[[str, tuple[int, ...]], tuple[int, ...]]
    ) -> dict[str, Tensor]:
        """The state dict of a network with these shapes, padded to them from the ``sizes`` that the tensors must have.

        Raises:
            ValueError: tensors that are missing, unknown or of other sizes.
        """
        for name in shapes:
            if name.endswith(COUNTER):
                self.tensors.setdefault(name, torch.tensor(0))
        theirs = {name: self.theirs.get(name) or self._guess(name) for name in (*shapes, *self.tensors)}
        misfits = find_misfits(
            {theirs[name]: tensor for name, tensor in self.tensors.items()},
            {theirs[name]: sizes(name, shape) for name, shape in shapes.items()},
        )
        self._fail([*self.misfits, *misfits])
        return {name: _pad(name, self.tensors[name], shape) for name, shape in shapes.items()}

    def _fail(self, misfits: Sequence[str]) -> None:
        if misfits:
            raise ValueError(f'recognised as {self.origin}, but {several(misfits, "; ")}')

    def _guess(self, ours: str) -> str:
        """Their name of a tensor that is missing, from those beside it."""
        module, _, leaf = ours.rpartition('.')
        for name, theirs in self.theirs.items():
            if name.rpartition('.')[0] == module:
                return f'{theirs.rpartition(".")[0]}.{leaf}'
        return f'what is {ours} here'

    def _join_selections(self) -> None:
        """One fc_select of M * C rows from M layers of C rows."""
        for first in self.ending(r'.*attn\.fc_select\.\d+\.weight'):
            layer = first.rpartition('attn.')[0]
            if f'{layer}attn.fc_select.weight' in self.tensors:
                continue
            count = len(self.ending(re.escape(layer) + r'paths\.\d+\.conv\.weight'))
            for leaf in ('weight', 'bias'):
                parts = [f'{layer}attn.fc_select.{m}.{leaf}' for m in range(count)]
                given = [part for part in parts if part in self.tensors]
                if not given:
                    continue
                here = self.theirs[given[0]]
                missing = [m for m, part in enumerate(parts) if part not in self.tensors]
                self.misfits += [re.sub(r'fcs\.\d+', f'fcs.{m}', here) + ' is missing' for m in missing]
                shapes = {self.theirs[part]: tuple(self.tensors[part].shape) for part in given}
                if len({shape[1:] for shape in shapes.values()}) > 1 or not all(shapes.values()):
                    self._fail([f'{theirs} is {shape}' for theirs, shape in shapes.items()])
                joined = f'{layer}attn.fc_select.{leaf}'
                self.tensors[joined] = torch.cat([self.tensors.pop(part) for part in given])
                self.theirs[joined] = here

    def _fold_biases(self) -> None:
        """BN(x + b) with the running mean m is BN(x) with m - b."""
        folded = 0
        for name in self.ending(r'.*\.bias'):
            convolution = name.removesuffix('.bias')
            if not convolution.endswith(('conv', 'conv1', 'downsample.0', 'attn.fc_reduce')):
                continue
            mean = f'{_norm_of(convolution)}.running_mean'
            if mean in self.tensors and self.tensors[mean].shape == self.tensors[name].shape:
                self.tensors[mean] = self.tensors[mean] - self.tensors.pop(name)
                folded += 1
        if folded:
            self.notes.append(f'{folded} biases of convolutions are folded into the BatchNorms after them')


def _network_arguments(
    weights: _Weights, lineage: _Lineage, sk_kwargs: dict[str, Any], dilations: Sequence[int] | None
) -> tuple[dict[str, Any], Callable[[str, tuple[int, ...]], tuple[int, ...]]]:
    """The arguments of SKResNet, and what each tensor's sizes must be before it is padded to that network's."""
    layers = _units_per_stage(weights)
    stages = range(1, len(layers) + 1)
    args: dict[str, Any] = dict(layers=layers)

    widths = [weights.size(rf'layer{s}\.\d+\.conv1\.conv\.weight', 0) for s in stages]
    outputs = [weights.size(rf'layer{s}\.\d+\.conv3\.conv\.weight', 0) for s in stages]
    block = SKBottleneck
    if widths == outputs:
        args['block'] = block = SKUnexpandedBottleneck
    ratio = min(Fraction(width, -(-out // block.expansion)) for width, out in zip(widths, outputs))
    planes = [width / ratio for width in widths]
    if any(p.denominator > 1 for p in planes) or (64 * ratio).denominator > 1:
        raise ValueError(f'{lineage.origin}: widths {widths} with outputs {outputs} are no multiples of common planes')
    channels, base_width = tuple(int(p) for p in planes), int(64 * ratio)
    for stage, out, p in zip(stages, outputs, channels):
        if out != p * block.expansion:
            weights.notes.append(f'stage {stage}: outputs padded from {out} to {p * block.expansion} channels')
    if channels != (64, 128, 256, 512)[: len(channels)]:
        args['channels'] = channels

    branches = _branches(weights, lineage, r'layer\d+\.\d+\.conv2\.', widths[0], r'layer1\.\d+\.conv2\.', dilations)
    groups = branches[0][2]
    if any(g != groups for _, _, g in branches) or base_width % groups:
        cardinality, sk_arguments = 1, _branch_arguments(branches, 1)
    else:
        cardinality, sk_arguments = groups, _branch_arguments(branches, groups)
    if (cardinality, base_width) != (32, 128):
        args |= dict(cardinality=cardinality, base_width=base_width // cardinality)

    dims, reduction, min_dim = _attention_widths(weights, layers, widths)
    sk_arguments |= _reduction_arguments(reduction, min_dim) | _attention_arguments(weights) | sk_kwargs
    if sk_arguments:
        args['sk_kwargs'] = sk_arguments
    if (in_chans := weights.size(r'conv1\.weight', 1)) != 3:
        args['in_chans'] = in_chans
    args['num_classes'] = weights.size(r'fc\.weight', 0) if weights.ending(r'fc\..*') else 0

    def sizes(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        sized = list(shape)
        match = re.match(r'layer(\d+)\.(\d+)\.(.*)', name)
        if name == 'fc.weight':
            sized[1] = outputs[-1]
        elif match and shape:
            stage, unit, part = int(match[1]), int(match[2]), match[3]
            if part.startswith(('conv3.', 'downsample.')):
                sized[0] = outputs[stage - 1]
            if part in ('conv1.conv.weight', 'downsample.0.weight') and (stage, unit) != (1, 0):
                sized[1] = outputs[stage - 1] if unit else outputs[stage - 2]
            if part.startswith(('conv2.attn.fc_reduce.', 'conv2.attn.bn.')):
                sized[0] = dims[stage, unit]
            if part == 'conv2.attn.fc_select.weight':
                sized[1] = dims[stage, unit]
        return tuple(sized)

    return args, sizes


def _timms_arguments(
    weights: _Weights, lineage: _Lineage, sk_kwargs: dict[str, Any], dilations: Sequence[int] | None
) -> tuple[dict[str, Any], Callable[[str, tuple[int, ...]], tuple[int, ...]]]:
    """As :func:`_network_arguments` for networks of timm's design without groups, which are never padded."""
    layers = _units_per_stage(weights)
    stages = range(1, len(layers) + 1)
    basic = not weights.ending(r'.*\.conv3\.conv\.weight')
    sk = 'conv1' if basic else 'conv2'
    args: dict[str, Any] = dict(layers=layers, **({'block': 'basic'} if basic else {}), cardinality=1, base_width=64)
    widths = [weights.size(rf'layer{s}\.\d+\.{sk}\.paths\.0\.conv\.weight', 0) for s in stages]
    if tuple(widths) != (64, 128, 256, 512)[: len(widths)]:
        args['channels'] = tuple(widths)
    # A unit's second and later SK convolutions have as many channels as the first puts out.
    inputs = weights.size(r'conv1\.weight', 0) if basic else widths[0]
    first = rf'layer1\.0\.{sk}\.'
    branches = _branches(weights, lineage, first, inputs, first, dilations)
    split = len(branches) > 1 and all(groups == len(branches) for _, _, groups in branches)
    if split:
        branches = [(kernel, dilation, 1) for kernel, dilation, _ in branches]
    dims = [weights.size(rf'layer{s}\.\d+\.{sk}\.attn\.fc_reduce\.weight', 0) for s in stages]
    sk_arguments = ({'split_input': True} if split else {}) | _branch_arguments(branches, 1)
    args['sk_kwargs'] = (
        sk_arguments | _reduction_arguments(*_reduction(widths, dims)) | _attention_arguments(weights) | sk_kwargs
    )
    if (in_chans := weights.size(r'conv1\.weight', 1)) != 3:
        args['in_chans'] = in_chans
    args['num_classes'] = weights.size(r'fc\.weight', 0) if weights.ending(r'fc\..*') else 0
    return args, lambda name, shape: shape


def _units_per_stage(weights: _Weights) -> tuple[int, ...]:
    units = [re.match(r'layer(\d+)\.(\d+)\.', name) for name in weights.tensors]
    places = {(int(match[1]), int(match[2])) for match in units if match}
    stages = range(1, max((stage for stage, _ in places), default=1) + 1)
    layers = tuple(max((unit + 1 for at, unit in places if at == stage), default=0) for stage in stages)
    if 0 in layers:
        raise ValueError(f'recognised as {weights.origin}, but nothing of its stage {layers.index(0) + 1} is')
    return layers


def _attention_widths(
    weights: _Weights, layers: Sequence[int], widths: Sequence[int]
) -> tuple[dict[tuple[int, int], int], int, int]:
    """d of every (stage, unit), and the reduction and the floor on d that leave room for it."""
    dims = {}
    for stage, count in enumerate(layers, 1):
        for unit in range(count):
            here, anywhere = (rf'layer{stage}\.{u}\.conv2\.attn\.fc_reduce\.weight' for u in (unit, r'\d+'))
            dims[stage, unit] = weights.size(here if weights.ending(here) else anywhere, 0)
    found = [{d for (at, _), d in dims.items() if at == stage} for stage in range(1, len(layers) + 1)]
    reduction, min_dim = _reduction(widths, [max(here) for here in found])
    for stage, (width, here) in enumerate(zip(widths, found), 1):
        target = max(width // reduction, min_dim)
        if here != {target}:
            weights.notes.append(f'stage {stage}: z padded from {min(here)} to {target} channels')
    return dims, reduction, min_dim


def _layer_arguments(
    weights: _Weights, lineage: _Lineage, in_channels: int | None, dilations: Sequence[int] | None
) -> tuple[dict[str, Any], Callable[[str, tuple[int, ...]], tuple[int, ...]]]:
    """The arguments of SelectiveKernel; nothing of a layer on its own is padded."""
    channels = weights.size(r'paths\.\d+\.conv\.weight', 0)
    in_channels = channels if in_channels is None else in_channels
    branches = _branches(weights, lineage, '', in_channels, '', dilations)
    args = dict(in_channels=in_channels) | ({} if in_channels == channels else {'out_channels': channels})
    dim = weights.size(r'attn\.fc_reduce\.weight', 0)
    args |= _branch_arguments(branches, 32) | _reduction_arguments(*_reduction([channels], [dim]))
    return args | _attention_arguments(weights), lambda name, shape: shape


def _branches(
    weights: _Weights, lineage: _Lineage, units: str, in_channels: int, first: str, dilations: Sequence[int] | None
) -> list[tuple[int, int, int]]:
    """(kernel_size, dilation, groups) of every branch; the other units are held to it by their shapes."""
    found = {int(re.search(r'paths\.(\d+)', n)[1]) for n in weights.ending(units + r'paths\.\d+\.conv\.weight')}
    found = range(max(found, default=-1) + 1)
    kernels = [weights.size(rf'{first}paths\.{m}\.conv\.weight', 3) for m in found]
    inputs = [weights.size(rf'{first}paths\.{m}\.conv\.weight', 1) for m in found]
    for m, per_group in enumerate(inputs):
        if in_channels % per_group:
            raise ValueError(
                f'{lineage.origin}: branch {m} has groups of {per_group} input channels, which do not divide '
                f'in_channels={in_channels}'
            )
    if dilations is None:
        dilated = lineage.dilated and len(set(kernels)) == 1
        dilations = [1 + m if dilated else 1 for m in found]
    if len(dilations) != len(kernels) or not all(isinstance(d, int) and d >= 1 for d in dilations):
        raise ValueError(f'dilations={dilations!r} must be {len(kernels)} integers of at least 1, one for each branch')
    return [(kernel, dilation, in_channels // size) for kernel, dilation, size in zip(kernels, dilations, inputs)]


def _branch_arguments(branches: Sequence[tuple[int, int, int]], groups: int) -> dict[str, Any]:
    """Branches in the fewest arguments; ``groups`` are those that hold where no argument says so."""
    kernels, dilations, all_groups = zip(*branches)
    if len(set(all_groups)) > 1 or (max(kernels) > 3 and set(dilations) != {1}):
        return dict(branches=tuple(branches))
    sizes = tuple((k - 1) * d + 1 for k, d in zip(kernels, dilations))
    args: dict[str, Any] = {} if sizes == (3, 5) else {'kernel_sizes': sizes}
    if max(kernels) > 3:
        args['dilated'] = False
    if all_groups[0] != groups:
        args['groups'] = all_groups[0]
    return args


def _reduction(widths: Sequence[int], dims: Sequence[int]) -> tuple[int, int]:
    """r and L of Eq. 4 that give every stage its d, or where none do, the least that is enough for every stage."""
    candidates = [(r, floor) for r in range(1, max(16, *widths) + 1) for floor in {1, 32, *dims}]

    def cost(candidate: tuple[int, int]) -> tuple[bool, int, int, bool]:
        reduction, floor = candidate
        given = [max(width // reduction, floor) for width in widths]
        return any(g < d for g, d in zip(given, dims)), sum(given), abs(reduction - 16), floor != 32

    return min(candidates, key=cost)


def _reduction_arguments(reduction: int, min_dim: int) -> dict[str, int]:
    given = dict(reduction=reduction, min_dim=min_dim)
    return {k: v for k, v in given.items() if v != {'reduction': 16, 'min_dim': 32}[k]}


def _attention_arguments(weights: _Weights) -> dict[str, bool]:
    args = {}
    if weights.ending(r'.*attn\.fc_select\.bias'):
        args['select_bias'] = True
    if not weights.ending(r'.*attn\.bn\..*'):
        args['reduce_norm'] = False
        for name in weights.ending(r'.*attn\.fc_reduce\.weight'):
            bias = name.replace('weight', 'bias')
            if bias not in weights.tensors:
                weights.tensors[bias] = weights.tensors[name].new_zeros(len(weights.tensors[name]))
                weights.theirs[bias] = weights.theirs[name].replace('weight', 'bias')
    return args


def _same_axes(name: str, tensor: Tensor) -> Tensor:
    """A linear layer's weight as a 1x1 convolution's or the other way round, and Caffe's vectors without their axes."""
    if re.search(r'attn\.fc_(reduce|select)(\.\d+)?\.weight$', name):
        return tensor[:, :, None, None] if tensor.ndim == 2 else tensor
    if name == 'fc.weight' and tensor.ndim == 4:
        return tensor[0, 0] if tensor.shape[:2] == (1, 1) else tensor.flatten(1)
    vector = name.endswith('.bias') or re.search(_NORM, name)
    return tensor.flatten() if vector and tensor.ndim > 1 and tensor.numel() == max(tensor.shape) else tensor


def _pad(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A copy with zeros where ``shape`` is larger: norms of such channels are the identity, and map 0 to 0."""
    norm = re.search(_NORM, name)
    padded = tensor.new_full(shape, 1 if norm and norm[1] in ('weight', 'running_var') else 0)
    padded[tuple(slice(size) for size in tensor.shape)] = tensor
    return padded


def _describe(tensors: Mapping[str, Tensor]) -> str:
    """What a state dict that is not supported looks like."""
    if is_own(tensors) and 'layer1.0.conv1.weight' not in tensors:
        theirs = (
            "an mmpretrain checkpoint of this project's" if BACKBONE in next(iter(tensors)) else "this project's own"
        )
        return f"{theirs}, or timm's: load_checkpoint and load_partial read those"
    found = [re.fullmatch(r'(.*)\.convs\.0\.(?:0|conv)\.weight', name) for name in tensors]
    layers = [match[1] for match in found if match and any(name.startswith(f'{match[1]}.fcs.') for name in tensors)]
    if layers:
        return f'a network with SKConv layers, which load one by one with prefix= ({several(map(repr, layers))})'
    if {'conv1.weight', 'layer1.0.conv1.weight', 'layer1.0.bn1.weight'} <= set(tensors):
        return "a ResNet of torchvision's or timm's, without SK convolutions"
    return f'nothing known: {len(tensors)} tensors ({several(tensors)})'
