"""The SK convolution: Split, Fuse and Select in one module (Li et al., CVPR 2019, arXiv:1903.06586, Sec. 3.1)."""

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from .._arguments import check_choice, check_dtype, check_flags, check_integer, check_layers, is_integer
from ..ops import BACKENDS, Fusable, fuse, has_parts, norm_relu_select, register, select
from .conv_bn_act import ConvBNAct

__all__ = ['SelectiveKernel', 'SelectiveKernelAttention']

SELECT_MODES = ('channel', 'shared', 'sum')
NORM_POSITIONS = ('branch', 'output', 'none')
LARGEST_KERNEL = 1023


_BATCH_OF_ONE = (
    'SelectiveKernel in training mode got a batch of 1, where the BatchNorm of its attention (Eq. 3) has one '
    'value per channel and no variance: use a batch of 2 or more, SyncBatchNorm over several processes, '
    "norm_layer='groupnorm1', or keep BatchNorm in eval mode (norm_eval=True in OpenMMLab)"
)


@register
class SelectiveKernelAttention(nn.Module):
    """Fuse: from M branch outputs, each (B, C, H, W), to their attention, (B, M, C, 1, 1), which sums to 1 over M.

    s is the global average of the branches' sum (Eq. 1, 2), z = ReLU(BN(W s)) has d channels (Eq. 3), and a softmax
    over the M branches turns A_m z into weights (Eq. 5).

    Args:
        channels: C, channels of every branch.
        num_branches: M.
        dim: d, channels of z.
        shared: one softmax for all channels, attention (B, M, 1, 1, 1), in place of one per channel.
        select_bias: a bias in A_m, logits A_m z + b_m.
        reduce_norm: norm after W; False puts a bias in its place.
        reduce_act: activation after the norm.
        act_layer: activation class of z.
        norm_layer: norm class of z, called with ``dim``.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: in training, for a batch of one under BatchNorm: a (1, d, 1, 1) map has no variance.
    """

    def __init__(
        self,
        channels: int,
        num_branches: int,
        dim: int,
        shared: bool = False,
        select_bias: bool = False,
        reduce_norm: bool = True,
        reduce_act: bool = True,
        act_layer: type[nn.Module] = nn.ReLU,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_branches = num_branches
        self.fc_reduce = nn.Conv2d(channels, dim, kernel_size=1, bias=not reduce_norm, **dd)
        self.bn = norm_layer(dim, **dd) if reduce_norm else nn.Identity()
        if isinstance(self.bn, nn.GroupNorm):
            # On a 1x1 map a group holds dim / num_groups values, often a single one, which norms to zero.
            self.bn = nn.GroupNorm(1, dim, eps=self.bn.eps, affine=self.bn.affine, **dd)
        self.act = act_layer(inplace=True) if reduce_act else nn.Identity()
        out_channels = num_branches * (1 if shared else channels)
        self.fc_select = nn.Conv2d(dim, out_channels, kernel_size=1, bias=select_bias, **dd)
        self.softmax = nn.Softmax(dim=1)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """N(0, 0.01) for both layers, as the authors train them; biases, where there are some, zero."""
        for layer in (self.fc_reduce, self.fc_select):
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def __call__(self, branches: list[Tensor]) -> Tensor:
        try:
            return super().__call__(branches)
        except ValueError as error:
            if 'more than 1 value per channel' in str(error):
                raise ValueError(_BATCH_OF_ONE) from error
            raise

    def forward(self, branches: list[Tensor]) -> Tensor:
        s = fuse(branches)
        z = self.act(self.bn(self.fc_reduce(s)))
        logits = self.fc_select(z)
        return self.softmax(logits.unflatten(1, (self.num_branches, -1)))


@register
class SelectiveKernel(Fusable):
    """Selective Kernel convolution SK[M, G, r]: (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride).

    **Split**: M branches of different kernels, each conv -> BN -> ReLU, give U_m. **Fuse**: their sum, pooled, goes
    through a bottleneck of d = max(C / r, L) channels (Eq. 1 to 4). **Select**: a softmax over the branches, one per
    channel, weighs them (Eq. 5, 6). Parameter names are those of timm's ``SelectiveKernel``.

    Args:
        in_channels: C', channels of the input.
        out_channels: C, channels of every branch and of the output; ``in_channels`` where None.
        kernel_sizes: odd kernel size of each of the M branches.
        stride: of every branch.
        dilation: the network's own dilation (output stride 8 or 16); it multiplies each branch's.
        groups: G, groups of every branch.
        reduction: r in d = max(C / r, L) (Eq. 4).
        min_dim: L in d = max(C / r, L), a floor on d.
        dilated: kernel k as a 3x3 with dilation (k - 1) / 2, as the authors do (a 1x1 stays 1x1); False for the
            true kernel.
        select: 'channel' (Eq. 5), 'shared' (one softmax for all channels) or 'sum' (U of Eq. 1 is the output, there
            is no attention and there are no attention weights).
        split_input: give each branch its 1/M of the input channels instead of all of them.
        branches: (kernel_size, dilation, groups) of each branch in full, in place of ``kernel_sizes``, ``dilated``
            and ``groups``, where branches differ in more than size (Table 6).
        select_bias: a bias in the attention's last layer, as in most PyTorch implementations.
        reduce_norm: BatchNorm in z (Eq. 3); False puts a bias in its place.
        reduce_act: ReLU in z (Eq. 3).
        conv_bias: a bias in the branches' convolutions.
        norm_position: 'branch' (norm and activation in every branch, the paper's), 'output' (branches are
            convolutions alone; norm and activation follow the selection) or 'none' (convolutions alone).
        backend: how the output is computed, with the same results: 'auto', the fastest that may be; 'plain', module
            after module; 'recompute', keeping M maps a unit for the backward pass in place of 2 M; 'triton', the
            kernels wherever they are right, in compiled graphs too. See :mod:`sk_plugins.ops`.
        act_layer: activation class.
        norm_layer: norm class, called with the number of channels.
        aa_layer: anti-aliasing layer that strides in the convolutions' place.
        drop_layer: DropBlock factory, applied in every branch between norm and activation.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: fewer than one branch, an even or non-positive kernel, groups that do not divide the channels,
            ``split_input`` with channels that M does not divide, an unknown ``select``, a size that is no integer or
            out of range, a flag that is no bool. In training, for a batch of one under BatchNorm.
    """

    fuses_on_cpu = has_operator = True
    methods = ('forward', 'split')

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        kernel_sizes: Sequence[int] = (3, 5),
        stride: int = 1,
        dilation: int = 1,
        groups: int = 32,
        reduction: int = 16,
        min_dim: int = 32,
        dilated: bool = True,
        select: str = 'channel',
        split_input: bool = False,
        branches: Sequence[tuple[int, int, int]] | None = None,
        select_bias: bool = False,
        reduce_norm: bool = True,
        reduce_act: bool = True,
        conv_bias: bool = False,
        norm_position: str = 'branch',
        backend: str = 'auto',
        act_layer: type[nn.Module] = nn.ReLU,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        aa_layer: Callable[..., nn.Module] | None = None,
        drop_layer: Callable[..., nn.Module] | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        sizes = dict(
            in_channels=in_channels, out_channels=out_channels, stride=stride, dilation=dilation, groups=groups,
            reduction=reduction, min_dim=min_dim,
        )  # fmt: skip
        for name, value in sizes.items():
            check_integer(name, value)
        check_flags(
            dilated=dilated, split_input=split_input, select_bias=select_bias, reduce_norm=reduce_norm,
            reduce_act=reduce_act, conv_bias=conv_bias,
        )  # fmt: skip
        check_choice('select', select, SELECT_MODES)
        check_choice('norm_position', norm_position, NORM_POSITIONS)
        check_choice('backend', backend, BACKENDS)
        check_layers(act_layer=act_layer, norm_layer=norm_layer)
        check_dtype(dtype)
        branches = _resolve_branches(kernel_sizes, groups, dilated, branches)
        num_branches = len(branches)
        branch_channels = in_channels
        if split_input:
            if in_channels % num_branches:
                raise ValueError(
                    f'split_input=True needs in_channels that the {num_branches} branches divide, got '
                    f'in_channels={in_channels}'
                )
            branch_channels = in_channels // num_branches
        for _, _, branch_groups in branches:
            if branch_channels % branch_groups or out_channels % branch_groups:
                raise ValueError(
                    f'groups={branch_groups} must divide the input channels of a branch ({branch_channels}) and '
                    f'out_channels ({out_channels})'
                )

        self.in_channels = in_channels
        self.out_channels = out_channels
        self.split_input = split_input
        self.select = select
        self.dilation = dilation
        self.backend = backend
        layers = dict(act_layer=act_layer, norm_layer=norm_layer, device=device, dtype=dtype)
        self.paths = nn.ModuleList(
            ConvBNAct(
                branch_channels,
                out_channels,
                kernel_size,
                stride=stride,
                dilation=branch_dilation * dilation,
                groups=branch_groups,
                bias=conv_bias,
                apply_norm=norm_position == 'branch',
                apply_act=norm_position == 'branch',
                aa_layer=aa_layer,
                drop_layer=drop_layer,
                backend='plain' if backend == 'recompute' else backend,
                **layers,
            )
            for kernel_size, branch_dilation, branch_groups in branches
        )
        self.attn = None
        if select != 'sum':
            dim = max(out_channels // reduction, min_dim)
            self.attn = SelectiveKernelAttention(
                out_channels,
                num_branches,
                dim,
                shared=select == 'shared',
                select_bias=select_bias,
                reduce_norm=reduce_norm,
                reduce_act=reduce_act,
                **layers,
            )
        self.bn = self.act = None
        if norm_position == 'output':
            self.bn = norm_layer(out_channels, device=device, dtype=dtype)
            self.act = act_layer(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        inputs = self.split(x)
        branches = []
        for i, path in enumerate(self.paths):
            branches.append(path(inputs[i]))
        if self.attn is None:
            x = branches[0]
            for branch in branches[1:]:
                x = x + branch
        else:
            x = select(branches, self.attn(branches))
        if self.bn is not None:
            x = self.act(self.bn(x))
        return x

    @property
    def num_branches(self) -> int:
        """M."""
        return len(self.paths)

    def split(self, x: Tensor) -> list[Tensor]:
        """Every branch's input, (B, C', H, W) or (B, C' / M, H, W)."""
        if self.split_input:
            chunks = torch.chunk(x, len(self.paths), dim=1)
            return [chunks[i] for i in range(len(self.paths))]
        return [x] * len(self.paths)

    def parts(self, folded: bool) -> tuple | None:
        paths = [path.parts(folded) if type(path) is ConvBNAct else None for path in self.paths]
        plain = all(path is not None and path[2] for path in paths) and self.bn is None
        if not plain:
            return None
        convs, norms, _ = zip(*paths)
        if self.attn is None:
            return convs, list(norms), None
        norm = nn.Identity if folded else nn.BatchNorm2d
        kinds = dict(fc_reduce=nn.Conv2d, bn=norm, act=nn.ReLU, fc_select=nn.Conv2d, softmax=nn.Softmax)
        if not has_parts(self.attn, **kinds) or (self.attn.fc_reduce.bias is not None) != folded:
            return None
        if self.attn.softmax.dim != 1:
            return None
        return convs, list(norms), (self.attn.fc_reduce, None if folded else self.attn.bn, self.attn.fc_select)

    def fuse_forward(self, engine: ModuleType, x: Tensor, parts: tuple) -> Tensor:
        convs, norms, attention = parts
        if attention is not None and x.shape[0] == 1 and norms[0] is not None and norms[0].training:
            raise ValueError(_BATCH_OF_ONE)
        inputs = self.split(x) if self.split_input else [x] * len(convs)
        return norm_relu_select(engine, inputs, convs, norms, attention)

    def extra_repr(self) -> str:
        return f'select={self.select!r}, split_input={self.split_input}'


def _resolve_branches(
    kernel_sizes: Sequence[int],
    groups: int,
    dilated: bool,
    branches: Sequence[tuple[int, int, int]] | None,
) -> list[tuple[int, int, int]]:
    """(kernel_size, dilation, groups) of every branch, checked."""
    if branches is None:
        if not isinstance(kernel_sizes, Sequence) or isinstance(kernel_sizes, str | bytes):
            raise ValueError(f'kernel_sizes={kernel_sizes!r} must be a sequence, one odd size per branch: (3, 5)')
        sizes, name = kernel_sizes, 'kernel_sizes'
    else:
        if not isinstance(branches, Sequence) or not all(isinstance(b, Sequence) and len(b) == 3 for b in branches):
            raise ValueError(f'branches={branches!r} must be a sequence of (kernel_size, dilation, groups)')
        sizes, name = [kernel_size for kernel_size, _, _ in branches], 'branches'
    if len(sizes) < 1:
        raise ValueError(f'{name}={sizes!r} must name at least one branch')
    for size in sizes:
        if not is_integer(size, 1, LARGEST_KERNEL) or size % 2 == 0:
            raise ValueError(
                f'{name} has the kernel size {size!r}: kernel sizes must be odd and positive, {LARGEST_KERNEL} at most'
            )
    if branches is None:
        shrink = [dilated and k > 3 for k in kernel_sizes]
        return [(3, (k - 1) // 2, groups) if s else (k, 1, groups) for k, s in zip(kernel_sizes, shrink)]
    for _, dilation, branch_groups in branches:
        check_integer('dilation', dilation)
        check_integer('groups', branch_groups)
    return [(kernel_size, dilation, branch_groups) for kernel_size, dilation, branch_groups in branches]
