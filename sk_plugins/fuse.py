"""BatchNorms folded into the convolutions before them, for inference.

In evaluation a BatchNorm is an affine map per channel, scale * y + shift by its running statistics, which the
convolution before it can take into its weight and bias. Pairs are found in modules whose ``forward`` is known, not by
tracing, so that models that don't trace (detectors) can be folded too.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from timm.layers import Conv2dSame
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ._timm import FEATURE_NETS
from .layers import SelectiveKernel
from .ops import has_hooks
from .ops.private import BATCH_NORMS, children, is_optimized

__all__ = ['fold_batch_norm']

# Exact types: a subclass may standardise its weight, which undoes a scale.
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame)
_NORM_FORWARDS = tuple(norm.forward for norm in BATCH_NORMS)  # subclasses may only check their input
_FROZEN_NORM = 'torchvision.ops.misc.FrozenBatchNorm2d'
_SYNCHRONISED_NORM = 'sk_plugins.openmmlab.runtime.sync_batchnorm.SyncBatchNorm'
# A norm, then a drop and an activation of its own, which stay.
_NORM_ACTS = (
    'timm.layers.norm_act.BatchNormAct2d',
    'timm.layers.norm_act.SyncBatchNormAct',
    'timm.layers.norm_act.FrozenBatchNormAct2d',
)
# By class: the method that calls the modules, and which of them it calls in a row. By name, since most are optional.
_BOTTLENECK = ('forward', (('conv1', 'bn1'), ('conv2', 'bn2'), ('conv3', 'bn3')))
_BASIC_BLOCK = ('forward', (('conv1', 'bn1'), ('conv2', 'bn2')))
_KNOWN: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    'sk_plugins.layers.conv_bn_act.ConvBNAct': ('forward', (('conv', 'bn'),)),
    'sk_plugins.layers.selective_kernel.SelectiveKernelAttention': ('forward', (('fc_reduce', 'bn'),)),
    'timm.layers.conv_bn_act.ConvNormAct': ('forward', (('conv', 'bn'),)),
    'timm.layers.selective_kernel.SelectiveKernelAttn': ('forward', (('fc_reduce', 'bn'),)),
    'timm.layers.squeeze_excite.SEModule': ('forward', (('fc1', 'bn'),)),
    'timm.models.resnet.Bottleneck': _BOTTLENECK,
    'timm.models.resnet.BasicBlock': _BASIC_BLOCK,
    'timm.models.resnet.ResNet': ('forward_features', (('conv1', 'bn1'),)),
    'torchvision.models.resnet.Bottleneck': _BOTTLENECK,
    'torchvision.models.resnet.BasicBlock': _BASIC_BLOCK,
    'torchvision.models.resnet.ResNet': ('_forward_impl', (('conv1', 'bn1'),)),
}
_SEQUENTIAL = 'torch.nn.modules.container.Sequential'
_CONV_MODULE = 'mmcv.cnn.bricks.conv_module.ConvModule'


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy of a model for inference, with every BatchNorm it can fold folded into the convolution before it.

    The copy is a plain module of the same classes with equal
    outputs (to 1e-5 in float32): the convolutions have biases, and ``nn.Identity`` stands where BatchNorms were, so
    that its state dict loads into another fused model alone. It can be copied, pickled, moved, scripted, compiled and
    exported; in training mode it runs without norms, which is not the network that was trained.

    Folded are BatchNorm, SyncBatchNorm and frozen BatchNorm in every network of the zoo, as timm's models, its
    ``features_only`` wrappers and OpenMMLab's backbones; and around those in any model, where a convolution and a
    norm are neighbours in an ``nn.Sequential``, mmcv's ``ConvModule``, a graph of ``torch.fx``, or a ResNet of timm or
    torchvision. Left as they are: other norms, BatchNorm without running statistics, and convolutions and norms that
    have hooks or parametrisations. A norm after the selection (``norm_position='output'``) moves before it, where its
    scale allows the attention to undo it.

    Args:
        model: in evaluation mode; it stays as it is.

    Returns:
        The folded copy; a mere copy where there is nothing to fold.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: the model, or a BatchNorm in it, is in training mode; or it was scripted or compiled.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'model={model!r} must be an nn.Module, not {type(model).__name__}')
    if isinstance(model, torch.jit.ScriptModule) or is_optimized(model):
        raise ValueError(
            f'model is a {type(model).__name__}: fold the model that it was made from, then script or compile the copy'
        )
    if model.training:
        raise ValueError('model is in training mode, and folding takes the running statistics: call model.eval() first')
    for name, module in model.named_modules():
        if module.training and isinstance(module, BATCH_NORMS) and module.running_mean is not None:
            raise ValueError(
                f'model has a BatchNorm in training mode, {name!r}, and folding takes the running statistics: call '
                'model.eval() first'
            )
    with torch.inference_mode(False), torch.no_grad():  # whatever the caller's mode, the copy is no inference tensors
        return _fold_copy(copy.deepcopy(model))


def _fold_copy(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, fx.GraphModule):
            module.eval()  # its copy forgets that
    users = Counter(id(child) for module in model.modules() for child in children(module).values())
    for module in list(model.modules()):
        for chain in _chains(module):
            _fold_chain(_flatten(module, chain, users))
        if isinstance(module, fx.GraphModule):
            _fold_graph(module)
        if _known_as(module, _CONV_MODULE) and isinstance(module.norm, nn.Identity):
            module.efficient_conv_bn_eval_forward = None  # it would ask for the norm's statistics
    for module in model.modules():
        if isinstance(module, SelectiveKernel):
            _fold_output_norm(module)
    return model


def _known_as(module: nn.Module, name: str, method: str = 'forward') -> bool:
    """Whether a module is of the class with this full name, or of a subclass that has left its ``method`` alone."""
    kind = type(module)
    for base in kind.__mro__:
        if f'{base.__module__}.{base.__qualname__}' == name:
            return getattr(kind, method) is getattr(base, method) and method not in vars(module)
    return False


def _chains(module: nn.Module) -> Iterator[Sequence[str]]:
    """Names of a module's children of which each is called on the output of the one before, and nothing else is."""
    for name, (method, pairs) in _KNOWN.items():
        if _known_as(module, name, method):
            yield from pairs
    if _known_as(module, _SEQUENTIAL):
        yield list(children(module))
    elif _known_as(module, _CONV_MODULE):
        order = module.order
        if module.with_norm and order.index('norm') == order.index('conv') + 1:
            yield 'conv', module.norm_name
    elif any(_known_as(module, *net) for net in FEATURE_NETS):
        chain = []
        for name in children(module):
            chain.append(name)
            if name in getattr(module, 'return_layers', ()):  # its output is a feature
                yield chain
                chain = []
        yield chain


def _flatten(parent: nn.Module, names: Sequence[str], users: Counter) -> Iterator[tuple[nn.Module, str]]:
    """(parent, name) of a chain's modules, those in ``nn.Sequential`` each by itself, without identities."""
    for name in names:
        child = children(parent).get(name)
        if child is None or type(child) is nn.Identity:
            continue
        if _known_as(child, _SEQUENTIAL) and users[id(child)] == 1 and not has_hooks(child):
            yield from _flatten(child, list(children(child)), users)
        else:
            yield parent, name


def _fold_chain(places: Iterator[tuple[nn.Module, str]]) -> None:
    before = None
    for place in list(places):
        folded = before is not None and _fold_pair(*before, *place)
        parent, name = place
        if not (folded and type(children(parent)[name]) is nn.Identity):
            before = place


def _fold_pair(conv_parent: nn.Module, conv_name: str, norm_parent: nn.Module, norm_name: str) -> bool:
    """Fold a norm into the convolution before it, if these two are such; True if so."""
    conv, norm = children(conv_parent)[conv_name], children(norm_parent)[norm_name]
    if not (_is_convolution(conv) and _is_norm(norm) and conv.out_channels == norm.running_mean.numel()):
        return False
    # Not in place: another parent may hold the same convolution, and other norms follow it there.
    setattr(conv_parent, conv_name, _folded(conv, norm))
    rest = [layer for layer in (getattr(norm, 'drop', None), getattr(norm, 'act', None)) if layer is not None]
    rest = [layer for layer in rest if type(layer) is not nn.Identity]
    setattr(norm_parent, norm_name, (nn.Sequential(*rest) if rest else nn.Identity()).eval())
    return True


def _folded(conv: nn.Module, norm: nn.Module) -> nn.Module:
    dtype = conv.weight.dtype
    if dtype in (torch.float16, torch.bfloat16):
        # One rounding, of the result.
        conv, norm = copy.deepcopy(conv).float(), copy.deepcopy(norm).float()
    return fuse_conv_bn_eval(conv.eval(), norm.eval()).to(dtype)


def _is_convolution(module: nn.Module) -> bool:
    return type(module) in _CONVS and not has_hooks(module)


def _is_norm(module: nn.Module) -> bool:
    names = (_FROZEN_NORM, *_NORM_ACTS)
    known = _is_plain_norm(module) or any(_known_as(module, name) for name in names)
    return known and module.running_mean is not None and not has_hooks(module)


def _is_plain_norm(module: nn.Module) -> bool:
    return isinstance(module, BATCH_NORMS) and (
        type(module).forward in _NORM_FORWARDS or _known_as(module, _SYNCHRONISED_NORM)
    )


def _fold_graph(module: fx.GraphModule) -> None:
    """Fold where a convolution's only use in every graph is the norm (torchvision's extractor holds two graphs)."""
    graphs = [getattr(module, name) for name in ('train_graph', 'eval_graph') if hasattr(module, name)]
    for conv_name, norm_name in set.intersection(*(_pairs(graph) for graph in graphs or [module.graph])):
        places = []
        for name in (conv_name, norm_name):
            parent, _, child = name.rpartition('.')
            places += [module.get_submodule(parent), child]
        _fold_pair(*places)


def _pairs(graph: fx.Graph) -> set[tuple[str, str]]:
    calls = Counter(node.target for node in graph.nodes if node.op in ('call_module', 'get_attr'))
    return {
        (node.target, user.target)
        for node in graph.nodes
        for user in node.users
        if node.op == user.op == 'call_module' and len(node.users) == calls[node.target] == calls[user.target] == 1
    }


def _fold_output_norm(layer: SelectiveKernel) -> None:
    """Move a norm after the selection into the branches' convolutions.

    A selection's weights sum to 1, so scale * sum_m a_m y_m + shift = sum_m a_m (scale * y_m + shift); for a plain
    sum, one branch takes the shift. The attention then sees s' = scale * s + M * shift in place of s, and its first
    layer undoes that: W s = (W / scale) (s' - M * shift).
    """
    norm, attn = layer.bn, layer.attn
    without_norms = _known_as(layer, 'sk_plugins.layers.selective_kernel.SelectiveKernel') and all(
        _is_convolution(path.conv) and all(type(m) is nn.Identity for m in (path.bn, path.act, path.aa))
        for path in layer.paths
    )
    if norm is None or not without_norms or not (_is_plain_norm(norm) and _is_norm(norm)):
        return
    scale, shift = _affine(norm)
    if attn is not None:
        weight = torch.ones_like(scale) if norm.weight is None else norm.weight.double()
        # In units of the maps' deviation, what the attention's layer would have to cancel: it costs so many digits.
        if not _is_convolution(attn.fc_reduce) or not ((shift / weight).abs() <= 30).all():
            return
        fc = attn.fc_reduce
        reduced = fc.weight.double() / scale.view(1, -1, 1, 1)
        bias = -len(layer.paths) * (reduced.flatten(1) @ shift)
        if fc.bias is not None:
            bias += fc.bias.double()
        _set(fc, reduced, bias)
    for m, path in enumerate(layer.paths):
        conv = path.conv
        bias = torch.zeros_like(scale) if conv.bias is None else conv.bias.double() * scale
        if attn is not None or m == 0:
            bias = bias + shift
        _set(conv, conv.weight.double() * scale.view(-1, 1, 1, 1), bias)
    layer.bn = nn.Identity().eval()


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The scale and the shift of a norm in evaluation, in float64."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def _set(conv: nn.Module, weight: Tensor, bias: Tensor) -> None:
    old = conv.weight
    conv.weight = nn.Parameter(weight.to(old.dtype), old.requires_grad)
    conv.bias = nn.Parameter(bias.to(old.dtype), old.requires_grad)
