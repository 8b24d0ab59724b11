"""The error model of tests/helpers/tolerances.py, held against rounding itself."""

import numpy as np
import pytest
import torch
from torch import nn

from helpers.tolerances import assert_close, sum_length, tolerance


def make(length, dtype):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2000, length, dtype=torch.float64, generator=generator).to(dtype)


@pytest.mark.parametrize('length', [1, 30, 1000])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_sums_in_another_order_are_close(dtype, length):
    terms = make(length, dtype)
    forwards, backwards = torch.zeros(2000, dtype=dtype), torch.zeros(2000, dtype=dtype)
    for i in range(length):
        forwards += terms[:, i]
        backwards += terms[:, length - 1 - i]
    assert_close(forwards, backwards, length=length)
    assert length == 1 or not torch.equal(forwards, backwards)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_a_mistake_is_seen(dtype):
    terms = make(1000, dtype)
    exact = terms.sum(1)
    # A single term left out of a thousand, and a product with 1 + 1e-4 in single precision.
    with pytest.raises(AssertionError, match='the sum: '):
        assert_close(terms[:, 1:].sum(1), exact, length=1000, msg='the sum')
    with pytest.raises(AssertionError):
        assert_close(exact * (1 + 1e-4), exact, length=1000)


def test_what_is_compared():
    a = torch.ones(3)
    assert_close({'a': [a, a]}, {'a': [a, a]})
    assert_close(torch.zeros(0), torch.zeros(0))
    for other in ({'b': [a, a]}, {'a': [a]}, {'a': [a, a + 1]}, {'a': [a, a[:2]]}):
        with pytest.raises(AssertionError):
            assert_close(other, {'a': [a, a]})
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([1, 2]), torch.tensor([1, 3]))
    assert_close(a + 1e-6, a, scale=100.0)
    assert_close(a * (1 + 1e-3), a, dtype=torch.bfloat16)
    assert tolerance(torch.float32, 4, gain=2) == pytest.approx(4 * 2 * 2 * 2**-23)


def test_numbers_and_arrays():
    """In float64, unless a coarser dtype is named."""
    assert_close({'a': 0.1 + 0.2, 'b': [3, 4.0]}, {'a': 0.3, 'b': [3.0, 4]})
    assert_close(np.float32([0.1, 1]), np.array([0.1, 1]), dtype=torch.float32)
    for value in (0.3 + 1e-12, 1):
        with pytest.raises(AssertionError):
            assert_close(value, 0.3)
    with pytest.raises(AssertionError):
        assert_close(np.float32([0.1, 1]), np.array([0.1, 1]))


def test_sums_of_a_module():
    network = nn.Sequential(nn.Conv2d(8, 12, 3, groups=4), nn.BatchNorm2d(12), nn.ReLU(), nn.Linear(12, 5))
    assert sum_length(network, pixels=49) == 2 * 9 + 4 + 12 + 49
    assert sum_length(nn.ReLU()) == 1
