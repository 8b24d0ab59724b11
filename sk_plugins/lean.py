"""Networks in the form that runtimes take best: fewer operations, none about shapes, the same outputs.

Eager mode blends two branches by ``torch.lerp``, one pass over the maps; no runtime has that, and exporters write up to
eight operations for it. In return they fold constants, which eager mode would compute at every call.
"""

from collections.abc import Iterable

import torch
from timm.layers import SelectiveKernel as TimmSelectiveKernel
from timm.layers import SqueezeExcite
from torch import Tensor, nn

from .fuse import fold_batch_norm
from .layers import SelectiveKernel
from .networks.shufflenet import ShuffleUnit, SKShuffleNetV2
from .ops import has_hooks

__all__ = ['simplify']

_STAGES = ('stage2', 'stage3', 'stage4')


def simplify(model: nn.Module, features: bool = False) -> nn.Module:
    """A copy of a model for export, with its BatchNorms folded and the fewest operations in SK and shuffle units.

    - The softmax of two is one sigmoid of a difference, which is in the weights: sigmoid((A_0 - A_1) z).
    - Two branches are blended as u_1 + a (u_0 - u_1), more of them as products and sums; one alone needs no attention.
    - A ShuffleNetV2 shuffles nothing: its convolutions write their channels in the order in which later units take
      them. Its features are then in another order, so that it shuffles where they are asked for.

    Outputs are equal to 1e-5 in float32. The copy's modules and parameters have other names, and it is for inference.
    Modules that have hooks stay as they are. Takes timm's SK networks too.

    Args:
        model: in evaluation mode; it stays as it is.
        features: whether its feature maps are wanted, not the logits alone.

    Returns:
        The copy.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: the model is in training mode, was scripted or compiled.
    """
    model = fold_batch_norm(model)
    with torch.inference_mode(False), torch.no_grad():
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child) in (SelectiveKernel, TimmSelectiveKernel) and not _any_hooks(child):
                    setattr(parent, name, LeanSelectiveKernel(child).eval())
                elif type(child) is ShuffleUnit and features and not has_hooks(child):
                    child.__class__ = LeanShuffleUnit
        for module in list(model.modules()):
            if type(module) is SKShuffleNetV2 and not features and not _any_hooks(module):
                _unshuffle(module)
    return model.requires_grad_(False)


def _any_hooks(module: nn.Module) -> bool:
    return any(map(has_hooks, module.modules()))


class LeanSelectiveKernel(nn.Module):
    """An SK convolution for inference: (B, C', H, W) to (B, C, H / stride, W / stride).

    Args:
        sk: the SK convolution, of this project or of timm, whose modules and weights it takes.

    Attributes:
        products: whether two branches are blended as a u_0 + (1 - a) u_1: an operation more, and none of a kind that
            runtimes lack in 8 bits, as ONNX Runtime does the difference of two maps.
    """

    def __init__(self, sk: nn.Module) -> None:
        super().__init__()
        self.products = False
        self.paths = sk.paths
        self.split_input = sk.split_input
        self.num_branches = len(sk.paths)
        self.channels = sk.paths[0].conv.in_channels  # a number: tracers would compute with a shape's
        attn = sk.attn if self.num_branches > 1 else None  # the softmax of one is 1
        self.after = nn.Sequential()
        if getattr(sk, 'bn', None) is not None:  # norm_position='output'
            self.after = nn.Sequential(sk.bn, sk.act)
        self.attends = attn is not None
        if attn is None:
            return
        self.reduce = nn.Sequential(attn.fc_reduce, attn.bn, attn.act)
        self.select = attn.fc_select
        self.shared = attn.fc_select.out_channels == self.num_branches
        if self.num_branches == 2:
            self.select = _difference(attn.fc_select)

    def forward(self, x: Tensor) -> Tensor:
        inputs = [x] * self.num_branches
        if self.split_input:
            # Not split: ExecuTorch's XNNPACK takes a split's outputs for tensors of one batch size.
            inputs = [x[:, m * self.channels : (m + 1) * self.channels] for m in range(self.num_branches)]
        branches = []
        for i, path in enumerate(self.paths):
            branches.append(path(inputs[i]))
        total = branches[0]
        for branch in branches[1:]:
            total = total + branch
        if not self.attends:
            return self.after(total)
        logits = self.select(self.reduce(total.mean((2, 3), keepdim=True)))
        if self.num_branches == 2:
            weight = torch.sigmoid(logits)
            if self.products:
                return self.after(weight * branches[0] + (1 - weight) * branches[1])
            return self.after(branches[1] + weight * (branches[0] - branches[1]))
        if not self.shared:  # (B, M * C, 1, 1) to (B, C, M, 1), without asking for a shape
            logits = torch.cat(logits.split([logits.shape[1] // self.num_branches] * self.num_branches, 1), 2)
        dim = 1 if self.shared else 2
        weights = logits.softmax(dim).split([1] * self.num_branches, dim)
        blended = branches[0] * weights[0]
        for m, branch in enumerate(branches[1:], 1):
            blended = blended + branch * weights[m]
        return self.after(blended)


def _difference(fc_select: nn.Conv2d) -> nn.Conv2d:
    """The convolution to the difference of two branches' logits."""
    out_channels = fc_select.out_channels // 2
    bias = fc_select.bias
    conv = nn.Conv2d(fc_select.in_channels, out_channels, 1, bias=bias is not None)
    conv = conv.to(fc_select.weight)
    conv.weight.copy_(fc_select.weight[:out_channels] - fc_select.weight[out_channels:])
    if bias is not None:
        conv.bias.copy_(bias[:out_channels] - bias[out_channels:])
    return conv


class LeanShuffleUnit(ShuffleUnit):
    """ShuffleNetV2's unit that interleaves along the rows, which are in a place that a reshape can leave open."""

    def forward(self, x: Tensor) -> Tensor:
        if self.down:
            x1, x2 = self.branch1(x), self.branch2(x)
        else:
            half = self.branch2[0].in_channels
            x1, x2 = x[:, :half], x[:, half:]
            x2 = self.branch2(x2)
        both = torch.cat((x1, x2), dim=2)
        return both.reshape(both.shape[0], 2 * both.shape[1], -1, both.shape[3])


class LeanStage(nn.Module):
    """A stage of ShuffleNetV2 without its shuffles: (B, C', H, W) to (B, 2 h, H / stride, W / stride), in an own order.

    Every source of channels (the two branches of the unit that down-samples, then one branch a unit) writes h of them,
    in groups by the unit that takes them: it splits them into these, and a unit concatenates its own.

    Args:
        units: the stage's units.

    Attributes:
        order: where in the shuffled stage's output each channel of this one's stands.
    """

    def __init__(self, units: Iterable[ShuffleUnit]) -> None:
        super().__init__()
        first, *others = units
        self.branches = nn.ModuleList([first.branch1, first.branch2, *(unit.branch2 for unit in others)])
        half = _last_conv(first.branch2).out_channels
        end = len(self.branches)
        # Channels as (source, number), in the shuffled order, and by whom each is taken.
        out = [(source, i) for i in range(half) for source in (0, 1)]
        taken: list[list[tuple[int, int]]] = []
        for source in range(2, end):
            passed, given = out[:half], out[half:]
            taken.append(given)
            out = [channel for i in range(half) for channel in (passed[i], (source, i))]
        taken.append(out)
        user = {channel: unit for unit, channels in enumerate(taken, 2) for channel in channels}
        orders = [sorted(range(half), key=lambda i, s=source: (user[s, i], i)) for source in range(end)]
        self.sizes: list[list[int]] = []
        self.users: list[list[int]] = []
        for source, order in enumerate(orders):
            units_ = [user[source, i] for i in order]
            self.users.append(sorted(set(units_)))
            self.sizes.append([units_.count(unit) for unit in self.users[-1]])
        places = {channel: i for i, channel in enumerate(out)}
        for source, branch in enumerate(self.branches):
            _permute_output(branch, orders[source])
        for unit, channels in enumerate(taken[:-1], 2):
            position = {channel: i for i, channel in enumerate(channels)}
            _permute_input(self.branches[unit], [position[c] for c in _written(orders, user, unit)])
        self.order = [places[c] for c in _written(orders, user, end)]

    def forward(self, x: Tensor) -> Tensor:
        waiting: list[list[Tensor]] = [[] for _ in range(len(self.branches) + 1)]
        for i, branch in enumerate(self.branches):
            y = branch(x if i < 2 else _concatenate(waiting[i]))
            parts = [y] if len(self.sizes[i]) == 1 else y.split(self.sizes[i], dim=1)
            for j, unit in enumerate(self.users[i]):
                waiting[unit].append(parts[j])
        return _concatenate(waiting[-1])


def _concatenate(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _written(orders: list[list[int]], user: dict[tuple[int, int], int], unit: int) -> list[tuple[int, int]]:
    """The channels that a unit takes, in the order in which it concatenates them."""
    return [(source, i) for source, order in enumerate(orders) for i in order if user[source, i] == unit]


def _unshuffle(net: SKShuffleNetV2) -> None:
    """Put a :class:`LeanStage` in the place of every stage, where what is in its units can be put in another order."""
    stages = [getattr(net, name) for name in _STAGES]
    if not (len(net.conv5) and all(map(_can_unshuffle, stages)) and type(net.conv5[0]) is nn.Conv2d):
        return
    order = None
    for name, stage in zip(_STAGES, stages):
        if order is not None:
            _permute_input(stage[0].branch1, order)
            _permute_input(stage[0].branch2, order)
        stage = LeanStage(stage).eval()
        setattr(net, name, stage)
        order = stage.order
    _permute_input(net.conv5, order)
    net.forward_intermediates = _refuse


def _refuse(*args, **kwargs) -> None:
    raise RuntimeError('the features of a simplified ShuffleNetV2 are in another order: simplify(model, features=True)')


def _can_unshuffle(stage: nn.Module) -> bool:
    if not (type(stage) is nn.Sequential and len(stage) and all(type(unit) is ShuffleUnit for unit in stage)):
        return False
    if not (stage[0].down and not any(unit.down for unit in stage[1:])):
        return False
    for branch in (stage[0].branch1, *(unit.branch2 for unit in stage)):
        # Norms have to be folded: what is between the convolutions treats all channels alike.
        kinds = (nn.Conv2d, nn.Identity, nn.ReLU, LeanSelectiveKernel, SqueezeExcite)
        if not all(type(module) in kinds for module in branch) or not isinstance(branch[0], nn.Conv2d):
            return False
    return True


def _last_conv(branch: nn.Sequential) -> nn.Conv2d:
    return next(module for module in reversed(branch) if type(module) is nn.Conv2d)


def _permute_output(branch: nn.Sequential, order: list[int]) -> None:
    """Let channel k of a branch's output be what channel ``order[k]`` was."""
    _reorder_rows(_last_conv(branch), order)
    if type(branch[-1]) is SqueezeExcite:
        se = branch[-1]
        se.fc1.weight.copy_(se.fc1.weight[:, order])
        _reorder_rows(se.fc2, order)


def _permute_input(branch: nn.Sequential, order: list[int]) -> None:
    """Fit a branch to an input whose channel k is what channel ``order[k]`` was."""
    first, *rest = branch
    if first.groups == 1:
        first.weight.copy_(first.weight[:, order])
        return
    _reorder_rows(first, order)  # depthwise, and the 1x1 convolution after it takes the new order
    conv = next(module for module in rest if type(module) is nn.Conv2d)
    conv.weight.copy_(conv.weight[:, order])


def _reorder_rows(conv: nn.Conv2d, order: list[int]) -> None:
    conv.weight.copy_(conv.weight[order])
    if conv.bias is not None:
        conv.bias.copy_(conv.bias[order])
