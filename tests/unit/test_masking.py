import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    RAGGED,
    assert_close,
    assert_padding_never_matters,
    assert_rows_are_a_set,
    numbers,
    outputs_and_gradients,
    ragged_batches,
    spread,
    tensors,
)
from tolerances import EXACT, FP32, FP64

from rlhf_min.masking import masked_mean, masked_scale, masked_var, masked_whiten, response_mask

ALL = (masked_mean, masked_var, masked_whiten, masked_scale)


def real(x, mask):
    """The real tokens as a plain list of Python numbers."""
    return [v for row, keep in zip(x.tolist(), mask.tolist(), strict=True)
            for v, m in zip(row, keep, strict=True) if m]  # fmt: skip


# response_mask


def test_response_mask_closed():
    mask = response_mask(torch.tensor([3, 1, 0]), 4)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [
        [True, True, True, False],
        [True, False, False, False],
        [False, False, False, False],
    ]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_response_mask_definition(lengths):
    mask = response_mask(torch.tensor(lengths), 6)
    assert mask.shape == (len(lengths), 6)
    for row, length in zip(mask.tolist(), lengths, strict=True):
        assert row == [True] * length + [False] * (6 - length)


# masked_mean


@pytest.mark.eq("masked_mean")
def test_masked_mean_closed():
    # (1 + 2 + 6 + 3) / 4 = 3: over tokens, not the mean of the rows' means (3 + 3) / 2 ...
    x = torch.tensor([[1.0, 2.0, 6.0], [3.0, 99.0, 99.0]])
    assert_close(masked_mean(x, RAGGED), 3.0, EXACT)
    # ... which is told apart here: (1 + 2 + 6 + 7) / 4 = 4, mean of means (3 + 7) / 2 = 5
    x[1, 0] = 7.0
    assert_close(masked_mean(x, RAGGED), 4.0, EXACT)


@pytest.mark.eq("masked_mean")
def test_masked_mean_closed_nan_in_the_padding():
    # 0 times NaN would be NaN
    x = torch.tensor([[1.0, 2.0, 6.0], [3.0, math.nan, math.inf]])
    assert_close(masked_mean(x, RAGGED), 3.0, EXACT)


@pytest.mark.eq("masked_mean")
@given(ragged_batches(1))
def test_masked_mean_definition(batch):
    x, mask = batch
    assert_close(masked_mean(x, mask), statistics.fmean(real(x, mask)), FP64)


@given(ragged_batches(1))
def test_masked_mean_gradient(batch):
    # each real token weighs 1/n, each pad nothing
    x, mask = batch
    _, (gradient,) = outputs_and_gradients(lambda x: masked_mean(x, mask), x)
    n = len(real(x, mask))
    assert_close(gradient, [[m / n for m in row] for row in mask.tolist()], FP64)


# masked_var


@pytest.mark.eq("masked_var")
def test_masked_var_closed():
    # mean 3; ((-2)^2 + (-1)^2 + 3^2 + 0^2) / (4 - 1) = 14/3
    x = torch.tensor([[1.0, 2.0, 6.0], [3.0, 99.0, 99.0]], dtype=torch.float64)
    assert_close(masked_var(x, RAGGED), 14 / 3, FP64)


@pytest.mark.eq("masked_var")
@given(ragged_batches(1, real_tokens=2))
def test_masked_var_definition(batch):
    # half the mean squared difference of all pairs: no mean, no deviation
    x, mask = batch
    values = real(x, mask)
    pairs = [(a - b) ** 2 / 2 for i, a in enumerate(values) for b in values[:i]]
    assert_close(masked_var(x, mask), statistics.fmean(pairs), FP64)


@given(ragged_batches(1, real_tokens=2), numbers())
def test_masked_var_property_shift(batch, shift):
    x, mask = batch
    assert_close(masked_var(x + shift, mask), masked_var(x, mask), FP64)


# masked_whiten, masked_scale


@pytest.mark.eq("whiten")
@pytest.mark.eq("scale")
def test_masked_whiten_and_scale_closed():
    # mean 4, deviations -3, 3, 0, variance (9 + 9 + 0) / (3 - 1) = 9, root 3
    x = torch.tensor([[1.0, 7.0], [4.0, 99.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    scale = 3 / math.sqrt(9 + 1e-8)
    assert_close(masked_whiten(x, mask), [[-scale, scale], [0.0, 0.0]], FP64)
    assert_close(masked_scale(x, mask), [[4 - scale, 4 + scale], [4.0, 0.0]], FP64)


@pytest.mark.eq("whiten")
def test_masked_whiten_closed_epsilon_is_inside_the_root():
    # 0 and 1e-4: mean 5e-5, variance 5e-9;
    # 5e-5 / sqrt(5e-9 + 1e-8) = 5e-5 / sqrt(1.5e-8) = 1 / sqrt(6)
    x = torch.tensor([[0.0, 1e-4]], dtype=torch.float64)
    whitened = masked_whiten(x, torch.ones(1, 2, dtype=torch.bool))
    assert_close(whitened, [[-1 / math.sqrt(6), 1 / math.sqrt(6)]], FP64)


@pytest.mark.eq("whiten")
@pytest.mark.eq("scale")
@given(ragged_batches(1, real_tokens=2))
def test_masked_whiten_and_scale_definition(batch):
    x, mask = spread(batch[0]), batch[1]
    values = real(x, mask)
    mean, root = statistics.fmean(values), math.sqrt(statistics.variance(values) + 1e-8)
    for function, kept in ((masked_whiten, 0.0), (masked_scale, mean)):
        expected = [
            [(v - mean) / root + kept if m else 0.0 for v, m in zip(row, keep, strict=True)]
            for row, keep in zip(x.tolist(), mask.tolist(), strict=True)
        ]
        assert_close(function(x, mask), expected, FP64)


def test_masked_whiten_property_constant():
    # equal values have variance 0: whitened they are 0, not NaN
    x = torch.full((2, 3), 5.0)
    assert_close(masked_whiten(x, RAGGED), torch.zeros(2, 3), EXACT)


@given(tensors(3, 4))
def test_masked_whiten_property_moments(x):
    mask = torch.tensor([[True] * 4, [True] * 2 + [False] * 2, [True] * 3 + [False]])
    whitened = real(masked_whiten(spread(x), mask), mask)
    assert abs(statistics.fmean(whitened)) < FP64
    assert statistics.variance(whitened) == pytest.approx(1, rel=FP32)  # 1e-8 / variance short of 1


# all four


@pytest.mark.parametrize("function", ALL)
@given(ragged_batches(1, real_tokens=2))
def test_masking_property_padding(function, batch):
    x, mask = batch
    assert_padding_never_matters(function, spread(x), mask=mask)


@pytest.mark.parametrize("function", ALL)
@given(ragged_batches(1, rows=5, real_tokens=2), st.permutations(range(5)))
def test_masking_property_permutation(function, batch, order):
    x, mask = batch
    assert_rows_are_a_set(function, spread(x), mask, order=torch.tensor(order))


@pytest.mark.parametrize("function", ALL)
def test_masking_gradient(function):
    x = torch.tensor([[1.0, 2.0, 6.0], [3.5, 9.0, 9.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: function(x, RAGGED), (x,))


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masking_gradient_dtype(function, dtype):
    x = torch.tensor([[1.0, 2.0, 6.0], [3.5, 9.0, 9.0]], dtype=dtype, requires_grad=True)
    result = function(x, RAGGED)
    result.sum().backward()
    assert result.dtype == x.grad.dtype == dtype


@pytest.mark.parametrize("function", ALL)
@pytest.mark.parametrize("width", [1, 4])  # 1 would broadcast, 4 would not
def test_masking_errors_shapes(function, width):
    with pytest.raises(ValueError, match=rf"\(2, {width}\).*mask \(2, 3\)"):
        function(torch.zeros(2, width), RAGGED)


@pytest.mark.parametrize(
    ("function", "real_tokens", "needed"),
    [(masked_mean, 0, 1), (masked_var, 0, 2), (masked_var, 1, 2), (masked_whiten, 1, 2),
     (masked_scale, 1, 2)],
)  # fmt: skip
def test_masking_errors_too_few(function, real_tokens, needed):
    mask = torch.arange(6).reshape(2, 3) < real_tokens
    message = rf"{real_tokens} real token\(s\).*at least {needed}"
    with pytest.raises(ValueError, match=message):
        function(torch.ones(2, 3), mask)
