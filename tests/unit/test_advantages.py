import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    assert_close,
    assert_padding_never_matters,
    assert_rows_are_a_set,
    ragged_batches,
    tensors,
)
from tolerances import EXACT, FP64

from rlhf_min.advantages import gae

unit = st.floats(0, 1, allow_subnormal=False)


def double_sum(rewards, values, gamma, lam):
    """The definition for one row without padding: A_t = sum_l (gamma lam)^l delta_{t+l}."""
    n = len(rewards)
    after = [*values[1:], 0.0]
    delta = [rewards[t] + gamma * after[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** l * delta[t + l] for l in range(n - t)) for t in range(n)]  # noqa: E741


def rows(batch):
    """The rows of a batch without their padding, as lists."""
    *tensors, mask = batch
    for b, keep in enumerate(mask.tolist()):
        yield [x[b, : sum(keep)].tolist() for x in tensors]


@pytest.mark.eq("gae")
def test_gae_closed():
    # gamma = 1/2, lam = 1/5, so gamma lam = 1/10.
    # Row 0: delta_2 = 2 - 4 = -2; delta_1 = 0 + 4/2 - 2 = 0; delta_0 = 1 + 2/2 - 1 = 1
    #        A_2 = -2; A_1 = 0 - 0.2 = -0.2; A_0 = 1 - 0.02 = 0.98; R = A + V = 1.98, 1.8, 2
    # Row 1: one token, A = 3 - 1 = 2, R = 3; the 99s are padding.
    rewards = torch.tensor([[1.0, 0.0, 2.0], [3.0, 99.0, 99.0]], dtype=torch.float64)
    values = torch.tensor([[1.0, 2.0, 4.0], [1.0, 99.0, 99.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.2)
    assert_close(advantages, [[0.98, -0.2, -2.0], [2.0, 0.0, 0.0]], FP64)
    assert_close(returns, [[1.98, 1.8, 2.0], [3.0, 0.0, 0.0]], FP64)


@pytest.mark.eq("gae")
def test_gae_closed_value_after_the_end():
    # the last real token is t = 1; the 100 behind it is no value to bootstrap from:
    # A_1 = 1 + 0 - 0 = 1, A_0 = 0 + 0 - 0 + 0.95 * 1
    rewards = torch.tensor([[0.0, 1.0, 0.0]])
    values = torch.tensor([[0.0, 0.0, 100.0]])
    mask = torch.tensor([[True, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    assert_close(advantages, [[0.95, 1.00, 0.0]], EXACT)
    assert_close(returns, [[0.95, 1.00, 0.0]], EXACT)


def test_gae_closed_empty_row():
    nothing = torch.zeros(1, 2)
    for result in gae(nothing + 9, nothing + 9, nothing.bool(), gamma=1.0, lam=0.95):
        assert_close(result, nothing, EXACT)


@pytest.mark.eq("gae")
@given(ragged_batches(2), unit, unit)
def test_gae_definition(batch, gamma, lam):
    advantages, returns = gae(*batch, gamma=gamma, lam=lam)
    assert advantages.shape == returns.shape == batch[0].shape
    for b, (rewards, values) in enumerate(rows(batch)):
        padding = [0.0] * (batch[0].shape[1] - len(rewards))
        expected = double_sum(rewards, values, gamma, lam)
        assert_close(advantages[b], expected + padding, FP64)
        of_row = [a + v for a, v in zip(expected, values, strict=True)]
        assert_close(returns[b], of_row + padding, FP64)


@pytest.mark.eq("gae")
@given(ragged_batches(2), unit)
def test_gae_definition_ends_of_lambda(batch, gamma):
    # lam = 1: discounted rewards to come, minus V; lam = 0: the returns look one step ahead
    _, at_one = gae(*batch, gamma=gamma, lam=1.0)
    _, at_zero = gae(*batch, gamma=gamma, lam=0.0)
    for b, (rewards, values) in enumerate(rows(batch)):
        n = len(rewards)
        to_come = [sum(gamma ** (s - t) * rewards[s] for s in range(t, n)) for t in range(n)]
        assert_close(at_one[b, :n], to_come, FP64)
        next_value = [*values[1:], 0.0]
        one_step = [r + gamma * v for r, v in zip(rewards, next_value, strict=True)]
        assert_close(at_zero[b, :n], one_step, FP64)


@given(ragged_batches(2))
def test_gae_property_padding(batch):
    *inputs, mask = batch
    assert_padding_never_matters(lambda *x: gae(*x, gamma=0.9, lam=0.8), *inputs, mask=mask)


@given(ragged_batches(2, rows=4), st.permutations(range(4)))
def test_gae_property_permutation(batch, order):
    assert_rows_are_a_set(lambda *x: gae(*x, gamma=0.9, lam=0.8), *batch, order=torch.tensor(order))


@given(ragged_batches(2), tensors(1), unit, unit)
def test_gae_property_linear(batch, factor, gamma, lam):
    rewards, values, mask = batch
    once = gae(rewards, values, mask, gamma=gamma, lam=lam)
    scaled = gae(factor * rewards, factor * values, mask, gamma=gamma, lam=lam)
    for plain, result in zip(once, scaled, strict=True):
        assert_close(result, factor * plain, FP64)


def test_gae_property_inputs_stay():
    rewards, values = torch.tensor([[1.0, 9.0]]), torch.tensor([[2.0, 9.0]])
    gae(rewards, values, torch.tensor([[True, False]]), gamma=0.9, lam=0.8)
    assert (rewards.tolist(), values.tolist()) == ([[1.0, 9.0]], [[2.0, 9.0]])


def test_gae_gradient_stops():
    rewards, values = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    for result in gae(rewards, values, torch.ones(2, 3).bool(), gamma=0.9, lam=0.8):
        assert not result.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gae_dtype(dtype):
    x = torch.ones(1, 2, dtype=dtype)
    for result in gae(x, x, x.bool(), gamma=0.9, lam=0.8):
        assert result.dtype == dtype


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_gae_errors_shapes(wrong):
    inputs = [torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3).bool()]
    inputs[wrong] = inputs[wrong][:, :1]  # would broadcast
    with pytest.raises(ValueError, match=r"differ in shape: .*\(2, 1\)"):
        gae(*inputs, gamma=1.0, lam=1.0)


@pytest.mark.parametrize("row", [[False, True, True], [True, False, True]])
def test_gae_errors_padding_on_the_left(row):
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="right-padded"):
        gae(x, x, torch.tensor([[True, True, True], row]), gamma=1.0, lam=1.0)
