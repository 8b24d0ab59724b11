"""The GPU's engine gives the numbers of the equations: each pass, each node of autograd's graph, and whole units.

They run where there is a GPU. Elsewhere ``test_numbers_in_tritons_interpreter`` runs this file again in a process
where Triton's interpreter, which is chosen when triton is imported, runs the kernels on the CPU.
"""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.engines import DEVICE, RUNS, draw, runs, sizes_kept, slow, slowly

from sk_plugins.ops import functions, gpu, trial
from sk_plugins.ops.functions import BranchSpec, NormAct, NormReluSelect, NormSpec
from sk_plugins.ops.reference import fuse, norm_relu_select

FORMATS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}
HALVES = [torch.bfloat16, torch.float16]
EPS, MOMENTUM = 1e-5, 0.3
each_format = pytest.mark.parametrize('memory_format', FORMATS.values(), ids=FORMATS.keys())
each_statistics = pytest.mark.parametrize('batch', [True, False], ids=['batch', 'running'])


def assert_near(actual, expected, terms):
    """One rounding to ``actual``'s dtype, after sums of ``terms`` float32 numbers no larger than the largest result."""
    assert actual.shape == expected.shape
    size = max(expected.abs().max().item(), 1.0)
    atol = max(terms, 16) * torch.finfo(torch.float32).eps * size
    eps = torch.finfo(actual.dtype).eps if actual.dtype != torch.float32 else 0.0
    tiny = torch.finfo(actual.dtype).tiny if actual.dtype == torch.float16 else 0.0
    torch.testing.assert_close(actual.double().cpu(), expected.double().cpu(), rtol=eps, atol=atol + tiny)


def to_double(tensors):
    return [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def draw_norm(channels, dtype, seed, batch):
    """Scale and shift, then the running mean and variance that are taken, or None and None."""
    affine = [draw(channels, seed=seed, dtype=dtype, scale=0.3, shift=1.0), draw(channels, seed=seed + 1, dtype=dtype)]
    if batch:
        return [*affine, None, None]
    return [*affine, draw(channels, seed=seed + 2, dtype=dtype), draw(channels, seed=seed + 3).abs().add(0.5).to(dtype)]


def draw_running(sizes, dtype=torch.float32):
    return [(draw(n, seed=50 + i, dtype=dtype), draw(n, seed=60 + i).abs().to(dtype)) for i, n in enumerate(sizes)]


def batch_norm_updates(running, maps):
    """What ``F.batch_norm`` makes of running statistics, in float64."""
    updated = [(mean.double(), var.double()) for mean, var in running]
    for (mean, var), y in zip(updated, maps):
        F.batch_norm(y.detach().double(), mean, var, None, None, True, MOMENTUM, EPS)
    return updated


class Case:
    """M maps with their norms and an attention, all of them leaves, and a gradient of V."""

    def __init__(
        self, num, shape, dtype=torch.float32, memory_format=torch.channels_last, select='channel', bias=False,
        batch=True, parameters=None, dim=6,
    ):  # fmt: skip
        parameters = torch.float32 if parameters is None else parameters
        channels = shape[1]
        ys = [draw(*shape, seed=m, dtype=dtype, scale=m + 1, shift=m) for m in range(num)]
        self.ys = [y.contiguous(memory_format=memory_format) for y in ys]
        norms = [draw_norm(channels, parameters, 10 + 4 * m, batch) for m in range(num)]
        self.norms = list(zip(*norms))
        self.attention = None
        if select != 'sum':
            outputs = num * (channels if select == 'channel' else 1)
            weight, shift, mean, var = draw_norm(dim, parameters, 40, batch)
            reduce = draw(dim, channels, 1, 1, seed=44, dtype=parameters, scale=channels**-0.5)
            matrix = draw(outputs, dim, 1, 1, seed=45, dtype=parameters, scale=0.5)
            select_bias = draw(outputs, seed=46, dtype=parameters, scale=0.5) if bias else None
            self.attention = [reduce, weight, shift, matrix, select_bias, mean, var]
        self.grad = draw(*shape, seed=47, dtype=dtype).contiguous(memory_format=memory_format)
        self.batch, self.num, self.dim = batch, num, dim
        running = draw_running([channels] * num + [dim] * (select != 'sum'), parameters) if batch else []
        batches = [torch.tensor(7 + m, device=DEVICE) for m in range(len(running))]
        self.spec = BranchSpec(gpu, num, self.attention is not None, batch, MOMENTUM, EPS, running, batches)
        for leaf in self.leaves():
            leaf.requires_grad_()

    def tensors(self):
        weights, biases, means, variances = self.norms
        statistics = [] if self.batch else [*means, *variances]
        return [*self.ys, *weights, *biases, *statistics, *(self.attention or ())]

    def leaves(self):
        attention = [] if self.attention is None else [t for t in self.attention[:5] if t is not None]
        return [*self.ys, *self.norms[0], *self.norms[1], *attention]

    @torch.no_grad()
    def condition(self):
        """By how much the attention's BatchNorm, over a few images, magnifies the rounding of what it is given."""
        if self.attention is None or not self.batch:
            return 1
        norms = [(w.double(), b.double()) for w, b in zip(*self.norms[:2])]
        us = [F.relu(F.batch_norm(y.double(), None, None, *n, True, 0.0, EPS)) for y, n in zip(self.ys, norms)]
        r = F.conv2d(fuse(us), self.attention[0].double()).flatten(1)
        return max(1.0, (r.abs() / (r.var(0, correction=0) + EPS).sqrt()).max().item())

    def check(self):
        """V, every gradient and the running statistics, by the engine, against float64."""
        terms = self.ys[0].numel() // self.ys[0].shape[1] * self.condition()
        updated = batch_norm_updates(self.spec.running[: self.num], self.ys)
        before = [tuple(t.clone() for t in pair) for pair in self.spec.running]
        seen = [batches.item() for batches in self.spec.batches]
        v = NormReluSelect.apply(self.spec, *self.tensors())
        leaves = [leaf for leaf in self.leaves() if leaf.requires_grad]
        grads = torch.autograd.grad(v, leaves, self.grad)
        exact = to_double(self.tensors())
        expected = norm_relu_select(self.spec.unflatten(exact), EPS)
        wanted = [t for t in exact if t is not None and t.requires_grad]
        assert len(wanted) == len(leaves)
        assert v.dtype == self.ys[0].dtype
        assert_near(v, expected, terms)
        for leaf, grad, expected_grad in zip(leaves, grads, torch.autograd.grad(expected, wanted, self.grad.double())):
            assert grad.dtype == leaf.dtype
            assert_near(grad, expected_grad, terms)
        for found, want in zip(itertools.chain(*self.spec.running), itertools.chain(*updated)):
            assert_near(found, want, terms)
        assert all(not torch.equal(a, b) for a, b in zip(itertools.chain(*self.spec.running), itertools.chain(*before)))
        counted = [batches.item() for batches in self.spec.batches]
        assert counted == [batches + 1 for batches in seen]
        return v, grads


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that small maps are of many, with edges in both directions."""
    for name, value in dict(
        _CHANNELS_LAST_BLOCK_C=4, _CONTIGUOUS_BLOCK_HW=8, _REDUCTION_TILE=32, _ELEMENTWISE_TILE=64
    ).items():
        monkeypatch.setattr(gpu.kernels, name, value)
    monkeypatch.setattr(gpu.kernels, '_layouts', {})


@runs
class TestBranches:
    @pytest.mark.parametrize(
        ('num', 'name', 'batch'),
        [
            (1, 'contiguous', True),
            slowly(2, 'contiguous', False),
            (2, 'channels_last', True),
            (3, 'channels_last', False),
            slowly(4, 'contiguous', True),
        ],
    )
    def test_every_number_of_branches(self, num, name, batch):
        memory_format = FORMATS[name]
        v, grads = Case(num, (3, 5, 4, 3), memory_format=memory_format, batch=batch).check()
        for tensor in (v, *grads[:num]):
            assert tensor.is_contiguous(memory_format=memory_format)

    @pytest.mark.parametrize(
        ('select', 'bias', 'batch'),
        [
            ('channel', True, True),
            slowly('channel', True, False),
            slowly('shared', False, True),
            ('shared', True, False),
            ('sum', False, True),
            slowly('sum', False, False),
        ],
    )
    def test_every_attention(self, select, bias, batch):
        Case(2 if batch else 3, (3, 5, 3, 4), select=select, bias=bias, batch=batch).check()

    @slow
    def test_maps_of_half_precision(self):
        Case(2, (3, 5, 4, 3), torch.bfloat16).check()
        Case(2, (3, 5, 4, 3), torch.float16, torch.contiguous_format, batch=False).check()

    @pytest.mark.parametrize('dtype', [HALVES[0], slowly(HALVES[1])])
    def test_parameters_of_half_precision(self, dtype):
        Case(2, (3, 6, 4, 3), dtype, batch=dtype == torch.float16, parameters=dtype, bias=True).check()

    @pytest.mark.parametrize(
        ('name', 'programs'), [slowly('contiguous', 20), ('channels_last', 1)], ids=['contiguous', 'channels_last']
    )
    def test_maps_of_several_tiles_and_splits(self, name, programs, small_tiles, monkeypatch):
        monkeypatch.setattr(gpu.kernels, '_PROGRAMS', programs)
        case = Case(2, (2, 6, 7, 6), memory_format=FORMATS[name])
        case.check()
        splits = {layout.splits for (*_, reduces), layout in gpu.kernels._layouts.items() if reduces}
        assert (splits == {1}) == (programs == 1)

    @pytest.mark.parametrize('shape', [*map(slowly, [(3, 6, 1, 1), (1, 4, 9, 3), (2, 1, 3, 4)]), (3, 17, 1, 5)])
    def test_odd_shapes(self, shape):
        memory_format = FORMATS['contiguous' if shape[2] == 1 else 'channels_last']
        Case(2, shape, memory_format=memory_format, batch=shape[0] > 1).check()

    @slow
    def test_sixty_four_bit_offsets(self, monkeypatch):
        """Images of 2**31 elements need them; here they are taken for a small one."""
        monkeypatch.setattr(gpu.kernels, '_WIDE', 1)
        monkeypatch.setattr(gpu.kernels, '_layouts', {})
        for memory_format in FORMATS.values():
            Case(2, (3, 5, 4, 3), memory_format=memory_format).check()
        assert all(layout.blocks['WIDE'] for layout in gpu.kernels._layouts.values())

    def test_maps_and_gradients_that_are_not_dense(self):
        case = Case(2, (2, 3, 4, 5))
        wide = draw(2, 6, 4, 6, seed=3).contiguous(memory_format=torch.channels_last)
        case.ys = [wide[:, ::2, :, 1:].detach().requires_grad_(), wide[:, 1::2, :, :-1].detach().requires_grad_()]
        for grad in (case.grad.contiguous(), draw(1, 1, 1, 1, seed=4).expand(2, 3, 4, 5), wide[:, :3, :, :5]):
            case.grad = grad
            case.check()
        case.ys[0] = case.ys[0].detach().contiguous().requires_grad_()  # one of each format
        case.check()

    @slow
    def test_two_runs_are_equal_to_the_bit(self):
        outcomes = []
        for _ in range(2):
            v, grads = Case(2, (2, 5, 6, 5)).check()
            outcomes.append([v, *grads])
        assert all(map(torch.equal, *outcomes))

    def test_only_what_is_wanted_is_computed(self, monkeypatch):
        case = Case(2, (3, 5, 4, 3))
        monkeypatch.setattr(gpu.kernels, 'input_grads', lambda *args: pytest.fail('no map needs a gradient'))
        case.ys = [y.detach() for y in case.ys]
        case.check()

    def test_a_value_for_each_channel_is_refused(self):
        case = Case(2, (1, 5, 1, 1), batch=True)
        with pytest.raises(ValueError, match=r'more than 1 value per channel when training, got .*\(1, 5, 1, 1\)'):
            NormReluSelect.apply(case.spec, *case.tensors())

    @each_statistics
    def test_norms_of_another_length_are_refused(self, batch):
        """A kernel would read beyond the end of a shorter tensor, and write running statistics there."""
        for kind, m in itertools.product(range(4), (0, 1, 2)):
            case = Case(2, (2, 5, 4, 3), batch=batch)
            running = case.spec.running
            if batch and kind >= 2:
                running[m] = tuple(
                    torch.ones(3, device=DEVICE) if k == kind - 2 else t for k, t in enumerate(running[m])
                )
            elif m == 2:
                case.attention[[1, 2, 5, 6][kind]] = torch.ones(3, device=DEVICE)
            else:
                case.norms[kind] = [
                    torch.ones(3, device=DEVICE) if i == m else t for i, t in enumerate(case.norms[kind])
                ]
            with pytest.raises(RuntimeError, match='BatchNorm of another number of channels than its maps'):
                NormReluSelect.apply(case.spec, *case.tensors())
        case = Case(2, (2, 5, 4, 3), batch=batch)
        case.attention[3] = draw(6, 6, 1, 1)
        with pytest.raises(RuntimeError, match='an attention of 3 channels for maps of 5'):
            NormReluSelect.apply(case.spec, *case.tensors())

    def test_norms_on_another_device_are_refused(self, monkeypatch):
        """A kernel would take an address of that device for one of its own."""
        for place in ('running', 'batches', 'weights', 'attention'):
            case = Case(2, (2, 5, 4, 3))
            elsewhere = {
                'running': case.spec.running[1][0],
                'batches': case.spec.batches[2],
                'weights': case.norms[0][1],
                'attention': case.attention[1],
            }[place]
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, 'get_device', lambda t, other=elsewhere: -1 if t is not other else 7)
                with pytest.raises(RuntimeError, match=r'BatchNorm with tensors on .* must be on one device'):
                    NormReluSelect.apply(case.spec, *case.tensors())

    def test_branches_of_different_shapes_are_refused(self):
        case = Case(2, (2, 5, 4, 3), batch=False)
        case.ys[1] = draw(2, 5, 4, 4)
        with pytest.raises(RuntimeError, match=r'\(2, 5, 4, 4\).*\(2, 5, 4, 3\)'):
            NormReluSelect.apply(case.spec, *case.tensors())


class EndCase:
    """One norm or two, a shortcut or none, and a gradient of what they make."""

    def __init__(self, num, shape, relu=True, shortcut=True, batch=True, dtype=torch.float32, **kwargs):
        memory_format = kwargs.get('memory_format', torch.channels_last)
        parameters = kwargs.get('parameters', torch.float32)
        self.tensors = [None]
        if shortcut:
            other = draw(*shape, seed=70, dtype=kwargs.get('shortcut_dtype', dtype))
            self.tensors = [other.contiguous(memory_format=kwargs.get('shortcut_format', memory_format))]
        for m in range(num):
            y = draw(*shape, seed=71 + m, dtype=dtype, scale=m + 1, shift=m).contiguous(memory_format=memory_format)
            self.tensors += [y, *draw_norm(shape[1], parameters, 80 + 4 * m, batch)]
        for i, tensor in enumerate(self.tensors):
            if tensor is not None and (i == 0 or i % 5 in (1, 2, 3)):
                tensor.requires_grad_()
        running = draw_running([shape[1]] * num, parameters) if batch else []
        batches = [torch.tensor(7 + m, device=DEVICE) for m in range(len(running))]
        self.spec = NormSpec(gpu, relu, batch, MOMENTUM, EPS, running, batches)
        self.grad = draw(*shape, seed=90, dtype=dtype).contiguous(memory_format=memory_format)

    def check(self):
        ys = self.tensors[1::5]
        terms = ys[0].numel() // ys[0].shape[1]
        updated = batch_norm_updates(self.spec.running, ys)
        seen = [batches.item() for batches in self.spec.batches]
        out = NormAct.apply(self.spec, *self.tensors)
        leaves = [t for t in self.tensors if t is not None and t.requires_grad]
        grads = torch.autograd.grad(out, leaves, self.grad)
        exact = to_double(self.tensors)
        expected = functions._norm_act(self.spec, *exact)
        wanted = [t for t in exact if t is not None and t.requires_grad]
        assert out.dtype == ys[0].dtype
        assert_near(out, expected, terms)
        for leaf, grad, expected_grad in zip(leaves, grads, torch.autograd.grad(expected, wanted, self.grad.double())):
            assert grad.dtype == leaf.dtype
            assert_near(grad, expected_grad, terms)
        for found, want in zip(itertools.chain(*self.spec.running), itertools.chain(*updated)):
            assert_near(found, want, terms)
        assert [batches.item() for batches in self.spec.batches] == [batches + 1 for batches in seen]


@runs
class TestNormAct:
    @pytest.mark.parametrize(
        ('num', 'batch'),
        [slowly(1, True), (1, False), (2, True), slowly(2, False)],
        ids=['1-batch', '1-running', '2-batch', '2-running'],
    )
    def test_every_end(self, num, batch):
        for relu, shortcut in itertools.product((True, False), repeat=2):
            memory_format = FORMATS['contiguous' if relu == shortcut else 'channels_last']
            EndCase(num, (3, 5, 4, 3), relu, shortcut, batch, memory_format=memory_format).check()

    @pytest.mark.parametrize('dtype', [HALVES[0], slowly(HALVES[1])])
    def test_half_precision(self, dtype):
        for num, parameters in zip((1, 2), (torch.float32, dtype)):
            EndCase(num, (3, 5, 4, 3), batch=num == 1, dtype=dtype, parameters=parameters).check()

    @slow
    def test_a_shortcut_of_another_dtype_or_format(self):
        for dtype in HALVES:
            EndCase(1, (3, 5, 4, 3), dtype=dtype, shortcut_dtype=torch.float32).check()
        EndCase(1, (3, 5, 4, 3), shortcut_format=torch.contiguous_format).check()
        EndCase(1, (3, 5, 4, 3), memory_format=torch.contiguous_format, shortcut_format=torch.channels_last).check()

    @pytest.mark.parametrize('shape', [slowly((3, 6, 1, 1)), slowly((2, 1, 3, 4)), (2, 17, 1, 5)])
    def test_odd_shapes(self, shape):
        for num, memory_format in zip((1, 2), FORMATS.values()):
            EndCase(num, shape, shortcut=num == 1, memory_format=memory_format).check()

    @pytest.mark.parametrize(
        ('name', 'programs'), [('contiguous', 1), slowly('channels_last', 1024)], ids=['contiguous', 'channels_last']
    )
    def test_several_tiles_and_splits(self, name, programs, small_tiles, monkeypatch):
        monkeypatch.setattr(gpu.kernels, '_PROGRAMS', programs)
        for num in (1, 2):
            EndCase(num, (2, 6, 5, 4), shortcut=num == 1, memory_format=FORMATS[name]).check()

    @each_statistics
    def test_norms_of_another_length_are_refused(self, batch):
        for kind, m in itertools.product(range(4), (0, 1)):
            case = EndCase(2, (2, 5, 4, 3), batch=batch)
            if batch and kind >= 2:
                running = case.spec.running
                running[m] = tuple(
                    torch.ones(3, device=DEVICE) if k == kind - 2 else t for k, t in enumerate(running[m])
                )
            else:
                case.tensors[5 * m + 2 + kind] = torch.ones(3, device=DEVICE)
            with pytest.raises(RuntimeError, match='BatchNorm of another number of channels than its maps'):
                NormAct.apply(case.spec, *case.tensors)

    def test_only_what_is_wanted_is_computed(self, monkeypatch):
        monkeypatch.setattr(gpu.kernels, 'norm_act_grads', lambda *args: pytest.fail('no map needs a gradient'))
        case = EndCase(2, (3, 5, 4, 3), shortcut=False)
        for i in (1, 6):
            case.tensors[i] = case.tensors[i].detach()
        case.check()

    @slow
    def test_gradients_that_are_not_dense(self):
        case = EndCase(1, (2, 3, 4, 5))
        for grad in (case.grad.contiguous(), draw(1, seed=4).expand(2, 3, 4, 5), draw(2, 6, 4, 6)[:, ::2, :, 1:]):
            case.grad = grad
            case.check()

    @slow
    def test_where_the_relu_was_open_is_kept_as_the_output_or_not_at_all(self):
        for num, shortcut, kept in ((1, False, 1), (1, True, 3), (2, False, 3)):
            case = EndCase(num, (4, 8, 16, 16), shortcut=shortcut)
            maps = [
                n for n in sizes_kept(lambda case=case: NormAct.apply(case.spec, *case.tensors)) if n >= 4 * 8 * 256
            ]
            assert maps == [4 * 8 * 16 * 16 * 4] * kept


@runs
class TestKernels:
    def test_statistics_of_a_mean_far_above_the_deviation(self):
        """A sum of squares would have lost the variance to rounding."""
        ys = [draw(3, 5, 6, 5, seed=m, shift=3000.0).contiguous(memory_format=torch.channels_last) for m in range(2)]
        mean, invstd = gpu.kernels.statistics(ys, EPS, MOMENTUM, ())
        for m, y in enumerate(ys):
            exact = y.double()
            eps = torch.finfo(torch.float32).eps
            torch.testing.assert_close(mean[m].double(), exact.mean((0, 2, 3)), rtol=4 * eps, atol=0)
            # Images' means, rounded at 3000, are off by 1.2e-4 where they differ by less than a deviation.
            expected = (exact.var((0, 2, 3), correction=0) + EPS).rsqrt()
            torch.testing.assert_close(invstd[m].double(), expected, rtol=1.2e-4, atol=0)

    def test_sums_of_float16_do_not_overflow(self):
        """The sum over the map is 750,000 where float16 ends at 65,504."""
        ys = [torch.full((1, 2, 5, 5), 30000.0, dtype=torch.float16, device=DEVICE)] * 2
        zeros, ones = torch.zeros(2, device=DEVICE), torch.ones(2, device=DEVICE)
        norms = [ones] * 2 + [zeros] * 2 + [zeros] * 2 + [ones] * 2, 0.0, 'running'
        moments, s = gpu.kernels.moments(ys, norms)
        assert torch.equal(s, torch.full((1, 2), 60000.0, device=DEVICE))
        assert torch.equal(moments[0], torch.full((1, 2, 2), 25.0, device=DEVICE))
        attention = torch.full((1, 2, 2), 0.5, device=DEVICE)
        assert torch.equal(gpu.kernels.select(ys, norms, attention), ys[0])

    @slow
    def test_more_partial_statistics_than_a_block(self):
        y = draw(130, 1, 1, 2, shift=1.0)
        running = torch.zeros(1, device=DEVICE), torch.ones(1, device=DEVICE)
        mean, invstd = gpu.kernels.statistics([y], 0.0, MOMENTUM, [running])
        exact = y.double()
        assert_near(mean[0], exact.mean((0, 2, 3)), 260)
        assert_near(invstd[0], exact.var((0, 2, 3), correction=0).rsqrt(), 260)
        assert_near(running[0], MOMENTUM * exact.mean((0, 2, 3)), 260)
        assert_near(running[1], 1 - MOMENTUM + MOMENTUM * exact.var((0, 2, 3)), 260)

    @pytest.mark.parametrize('channels', [70, slowly(1), None])
    def test_moments_of_more_images_and_channels_than_a_block(self, channels):
        given, pooled, level = draw(2, 40, 3, 70, seed=1), draw(2, 40, 3, 70, seed=2), draw(40, 70, seed=3)
        if channels is None:
            assert_near(gpu.kernels.weigh_moments(given, None, None, None), given.double().sum(1), 40)
            return
        attention = draw(40, 3, channels, seed=4)
        expected = (attention.double() * given + level.double()[:, None] * pooled).sum(1)
        assert_near(gpu.kernels.weigh_moments(given, attention, level, pooled), expected, 80)

    @pytest.mark.parametrize('rows', [2, 5, 130])
    @each_statistics
    def test_norm_and_relu_of_rows(self, rows, batch):
        r, grad = draw(rows, 20, seed=1), draw(rows, 20, seed=2)
        weight, bias, mean, var = draw_norm(20, torch.float32, 3, False)
        running = mean.clone(), var.clone()
        z, found, invstd = gpu.kernels.norm_relu_rows(r, weight, bias, running, batch, MOMENTUM, EPS)
        grads = gpu.kernels.norm_relu_rows_grads(grad, z, r, weight, found, invstd, batch)
        leaves = to_double(t.detach().requires_grad_() for t in (r, weight, bias))
        exact = mean.double(), var.double()
        expected = F.relu(F.batch_norm(leaves[0], *exact, *leaves[1:], batch, MOMENTUM, EPS))
        # Statistics of few rows magnify the rounding of what goes in and of what comes back.
        spread = (r.var(0, correction=0) + EPS).rsqrt()
        terms = rows * ((r.abs() * spread).max() * spread.max()).clamp(min=1).item() if batch else rows
        assert_near(z, expected, terms)
        for ours, theirs in zip(grads, torch.autograd.grad(expected, leaves, grad.double())):
            assert_near(ours, theirs, terms)
        for ours, theirs in zip(running, exact):
            assert_near(ours, theirs, rows)


@runs
@pytest.mark.parametrize('dtype', [torch.float32, *map(slowly, HALVES)], ids=str)
@pytest.mark.parametrize('kind', ['frozen norms', *map(slowly, ('training', 'inference', 'folded inference'))])
def test_a_trial_finds_them_right(kind, dtype):
    norm, gradients = trial.KINDS[kind]
    with torch.set_grad_enabled(gradients):
        error = trial._error(torch.device(DEVICE), dtype, norm, torch.channels_last)
    assert error <= trial.TOLERANCES[dtype]


@runs
def test_a_trial_finds_running_statistics_that_are_wrong(monkeypatch):
    """Which neither the outputs nor the gradients of a training step tell."""
    launched = gpu.kernels.norm_relu_rows

    def wrong(r, weight, bias, running, *args):
        found = launched(r, weight, bias, running, *args)
        running[1].mul_(1.1)
        return found

    monkeypatch.setattr(gpu.kernels, 'norm_relu_rows', wrong)
    error = trial._error(torch.device(DEVICE), torch.float32, 'batch', torch.channels_last)
    assert error == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(('chosen', 'number'), [('not slow', 48), pytest.param('slow', 49, marks=pytest.mark.slow)])
def test_numbers_in_tritons_interpreter(chosen, number):
    """By default each kernel once, in float32 and bfloat16, a unit of either kind, and an odd shape."""
    if RUNS or not gpu.HAS_TRITON:
        pytest.skip('they run here' if RUNS else 'triton is not installed')
    environment = {**os.environ, 'TRITON_INTERPRET': '1', 'CUDA_VISIBLE_DEVICES': ''}
    for name in [name for name in environment if name.startswith('PYTEST_')]:
        del environment[name]
    command = [sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', '-m', chosen]
    command += [str(Path(__file__).with_name(name)) for name in ('test_gpu.py', 'test_gpu_units.py')]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=590)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert int(re.findall(r'(\d+) passed', result.stdout)[-1]) >= number  # the others are those of one file
