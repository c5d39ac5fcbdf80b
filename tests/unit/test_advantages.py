import statistics

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

from rlhf_min.advantages import gae, grpo_advantages, rloo_advantages

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


# Groups


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


@st.composite
def groups(draw):
    """Rewards and the size of their groups."""
    group_size, n = draw(st.integers(2, 5)), draw(st.integers(1, 3))
    scores = st.floats(-100, 100, allow_subnormal=False)
    return draw(st.lists(scores, min_size=n * group_size, max_size=n * group_size)), group_size


@pytest.mark.eq("rloo_advantages")
def test_rloo_advantages_closed():
    # 1 beside (2 + 6) / 2 = 4; 2 beside 3.5; 6 beside 1.5. In the second group 0, 0, 9: the others
    # have 4.5, 4.5 and 0.
    found = rloo_advantages(f64(1, 2, 6, 0, 0, 9), group_size=3)
    assert_close(found, f64(-3, -1.5, 4.5, -4.5, -4.5, 9), FP64)


@pytest.mark.eq("rloo_advantages")
@given(groups())
def test_rloo_advantages_definition(drawn):
    rewards, size = drawn
    expected = []
    for i, reward in enumerate(rewards):
        first = i - i % size
        others = [rewards[j] for j in range(first, first + size) if j != i]
        expected.append(reward - statistics.fmean(others))
    assert_close(rloo_advantages(f64(*rewards), group_size=size), f64(*expected), FP64 * 100)


@pytest.mark.eq("grpo_advantages")
def test_grpo_advantages_closed():
    # Means 3 and 3; deviations of 1, 2, 6: sqrt((4 + 1 + 9) / 2) = sqrt 7, of 0, 0, 9: sqrt 27.
    # All six: mean 3, squares 4 + 1 + 9 + 9 + 9 + 36 = 68, over 5.
    rewards, centred = f64(1, 2, 6, 0, 0, 9), f64(-2, -1, 3, -3, -3, 6)
    of_group = f64(7, 7, 7, 27, 27, 27).sqrt() + 1e-4
    for scale, deviation in [("none", 1), ("group", of_group), ("batch", 13.6**0.5 + 1e-4)]:
        found = grpo_advantages(rewards, group_size=3, scale=scale)
        assert_close(found, centred / deviation, FP64)


@pytest.mark.eq("grpo_advantages")
@given(groups())
def test_grpo_advantages_are_rloos_but_for_a_factor(drawn):
    rewards, size = f64(*drawn[0]), drawn[1]
    found = grpo_advantages(rewards, group_size=size, scale="none")
    expected = rloo_advantages(rewards, group_size=size) * (size - 1) / size
    assert_close(found, expected, FP64 * 100)


@pytest.mark.parametrize("reward", [0.1, -1e7, 1e-30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_of_equal_rewards_says_nothing(reward, dtype):
    rewards = torch.tensor([reward] * 3 + [1.0, 2.0, 4.0], dtype=dtype)
    found = [rloo_advantages(rewards, group_size=3)]
    found += [
        grpo_advantages(rewards, group_size=3, scale=scale) for scale in ("group", "batch", "none")
    ]
    for advantages in found:
        assert advantages[:3].tolist() == [0, 0, 0]
        assert advantages[3] < 0 < advantages[5]
        assert advantages.dtype == dtype


def test_group_advantages_carry_no_gradient():
    rewards = f64(1, 2).requires_grad_()
    assert not rloo_advantages(rewards, group_size=2).requires_grad
    assert not grpo_advantages(rewards, group_size=2, scale="batch").requires_grad


@pytest.mark.parametrize(
    ("rewards", "group_size"),
    [(f64(1, 2, 3), 2), (f64(1, 2), 1), (f64(), 2), (f64(1, 2)[None], 2)],
)
def test_group_advantages_errors(rewards, group_size):
    with pytest.raises(ValueError, match="do not fill groups"):
        rloo_advantages(rewards, group_size=group_size)
    with pytest.raises(ValueError, match="do not fill groups"):
        grpo_advantages(rewards, group_size=group_size, scale="none")


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="scale must be"):
        grpo_advantages(f64(1, 2), group_size=2, scale="std")
