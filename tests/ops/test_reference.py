import pytest
import torch
from helpers.tolerances import bounds
from torch.autograd import gradcheck

from sk_plugins.ops import fuse, fuse_reference, select, select_reference

# (B, C, H, W): even and odd sizes, 1x1 maps, one channel, batches of one and none.
SHAPES = [(2, 8, 6, 6), (3, 6, 7, 5), (2, 5, 1, 1), (1, 4, 9, 3), (2, 1, 3, 4), (0, 4, 5, 5)]
# Means over at most 36 positions, of sums of at most four.
CLOSE = bounds(torch.float64, length=144, gain=10)
FORMATS = [torch.contiguous_format, torch.channels_last]


def make_inputs(num_branches, shape, shared=False, dtype=torch.float64, memory_format=torch.contiguous_format):
    """M branch outputs and the logits of their attention, all leaves."""
    generator = torch.Generator().manual_seed(num_branches)
    batch, channels, _, _ = shape
    branches = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype=dtype, memory_format=memory_format)
        for _ in range(num_branches)
    ]
    logits = torch.randn((batch, num_branches, 1 if shared else channels, 1, 1), generator=generator).to(dtype)
    return [branch.requires_grad_() for branch in branches], logits.requires_grad_()


def values_and_grads(function, branches, logits=None):
    """Output of fuse or select and its gradients, the attention's taken through the softmax that makes it sum to 1."""
    leaves = [*branches] if logits is None else [*branches, logits]
    output = function(branches) if logits is None else function(branches, logits.softmax(1))
    weight = torch.empty_like(output)
    weight.copy_(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape))
    return output, torch.autograd.grad(output, leaves, weight)


@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('num_branches', [1, 2, 3, 4])
def test_fuse_equals_reference(num_branches, shape, memory_format):
    branches, _ = make_inputs(num_branches, shape, memory_format=memory_format)
    output, grads = values_and_grads(fuse, branches)
    expected, expected_grads = values_and_grads(fuse_reference, branches)
    assert output.shape == (*shape[:2], 1, 1)
    torch.testing.assert_close(output, expected, **CLOSE)
    torch.testing.assert_close(grads, expected_grads, **CLOSE)


@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('shared', [False, True])
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('num_branches', [1, 2, 3, 4])
def test_select_equals_reference(num_branches, shape, shared, memory_format):
    branches, logits = make_inputs(num_branches, shape, shared, memory_format=memory_format)
    output, grads = values_and_grads(select, branches, logits)
    expected, expected_grads = values_and_grads(select_reference, branches, logits)
    assert output.shape == shape
    torch.testing.assert_close(output, expected, **CLOSE)
    torch.testing.assert_close(grads, expected_grads, **CLOSE)


@pytest.mark.parametrize('num_branches', [1, 2, 3])
def test_select_keeps_channels_last(num_branches):
    branches, logits = make_inputs(num_branches, (2, 8, 6, 6), memory_format=torch.channels_last)
    output, grads = values_and_grads(select, branches, logits)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert not output.is_contiguous()
    assert all(grad.is_contiguous(memory_format=torch.channels_last) for grad in grads[:-1])


@pytest.mark.parametrize('function', [fuse, fuse_reference])
@pytest.mark.parametrize('num_branches', [1, 2, 3])
def test_fuse_gradcheck(function, num_branches):
    branches, _ = make_inputs(num_branches, (2, 3, 3, 2))
    assert gradcheck(lambda *maps: function(list(maps)), branches)


@pytest.mark.parametrize('function', [select, select_reference])
@pytest.mark.parametrize('shared', [False, True])
@pytest.mark.parametrize('num_branches', [1, 2, 3])
def test_select_gradcheck(function, num_branches, shared):
    branches, logits = make_inputs(num_branches, (2, 3, 3, 2), shared)
    assert gradcheck(lambda logits, *maps: function(list(maps), logits.softmax(1)), [logits, *branches])


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3), (torch.float32, 1e-5)])
@pytest.mark.parametrize('num_branches', [1, 2, 3, 4])
def test_low_precision(num_branches, dtype, tolerance):
    branches, logits = make_inputs(num_branches, (2, 8, 7, 5), dtype=dtype)
    exact_branches = [branch.detach().double().requires_grad_() for branch in branches]
    exact_logits = logits.detach().double().requires_grad_()
    for function, reference, inputs, exact_inputs in (
        (fuse, fuse_reference, (branches,), (exact_branches,)),
        (select, select_reference, (branches, logits), (exact_branches, exact_logits)),
    ):
        output, grads = values_and_grads(function, *inputs)
        expected, expected_grads = values_and_grads(reference, *exact_inputs)
        assert output.dtype == dtype
        torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
        for grad, expected_grad in zip(grads, expected_grads):
            assert grad.dtype == dtype
            # A gradient of the logits is a sum over the map, and its rounding error is one too.
            scale = max(expected_grad.abs().max().item(), 1.0)
            torch.testing.assert_close(grad.double() / scale, expected_grad / scale, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('num_branches', [1, 2, 3])
def test_select_keeps_the_branches_dtype(num_branches):
    # Autocast gives branches in half precision beside an attention that its softmax made in float32.
    branches, logits = make_inputs(num_branches, (2, 8, 5, 5), dtype=torch.bfloat16)
    assert select(branches, logits.float().softmax(1)).dtype == torch.bfloat16


@pytest.mark.parametrize('num_branches', [2, 3])
def test_select_of_one_hot_attention_is_that_branch(num_branches):
    branches, _ = make_inputs(num_branches, (2, 8, 5, 5))
    for m, branch in enumerate(branches):
        attention = torch.zeros(2, num_branches, 8, 1, 1, dtype=torch.float64)
        attention[:, m] = 1
        torch.testing.assert_close(select(branches, attention), branch, rtol=0, atol=1e-15)


def test_inputs_are_left_as_they_were():
    branches, logits = make_inputs(3, (2, 8, 5, 5))
    attention = logits.softmax(1).detach()
    before = [tensor.detach().clone() for tensor in (*branches, attention)]
    fuse(branches)
    select(branches, attention)
    for tensor, copy in zip((*branches, attention), before):
        assert torch.equal(tensor, copy)
