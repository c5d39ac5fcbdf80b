import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    NAN,
    assert_close,
    assert_micro_batches_add_up,
    assert_nothing_but_the_loss_carries_gradient,
    assert_rows_are_a_set,
    outputs_and_gradients,
    ragged_batches,
    rising,
    tensors,
)
from tolerances import EXACT, FP64

from rlhf_min.preference_losses import dpo_loss

LN2, LN3 = math.log(2), math.log(3)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def preference_loss(*logprobs):
    return dpo_loss(*logprobs, beta=0.3, label_smoothing=0.1)


# What holds for every loss

OF_PAIRS = pytest.mark.parametrize(("loss", "count"), [(preference_loss, 4)])


@OF_PAIRS
@given(st.data(), st.permutations(range(4)))
def test_pair_losses_property_permutation(loss, count, data, order):
    pairs = [data.draw(tensors(4)) for _ in range(count)]
    assert_rows_are_a_set(loss, *pairs, order=torch.tensor(order))


@OF_PAIRS
@given(st.data())
def test_pair_losses_property_micro_batches(loss, count, data):
    # sums over responses of unequal lengths, pairs weigh alike
    batches = [data.draw(ragged_batches(1, rows=8)) for _ in range(count)]
    assert_micro_batches_add_up(loss, *((x * mask).sum(1) for x, mask in batches))


@OF_PAIRS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pair_losses_dtype(loss, count, dtype):
    result = loss(*[torch.ones(1, dtype=dtype)] * count)
    assert {y.dtype for y in result if y.is_floating_point()} == {dtype}


@OF_PAIRS
@pytest.mark.parametrize("shape", [(0,), (2, 3), ()])
def test_pairs_are_one_number_each_and_at_least_one(loss, count, shape):
    with pytest.raises(ValueError, match="one pair or more"):
        loss(*[torch.zeros(shape)] * count)


# dpo_loss


@pytest.mark.eq("dpo")
def test_dpo_loss_closed():
    # beta = 1/2. Row 0: pi/ref is 9 for chosen and 1 for rejected: h = ln 9 / 2 = ln 3, sigmoid 3/4
    #             Row 1: 1/3 and 3: h = -ln 9 / 2 = -ln 3, sigmoid 1/4
    chosen, rejected = f64(-1.0, -5.0), f64(-2.0, -7.0)
    ref_chosen, ref_rejected = f64(-1 - 2 * LN3, -5 + LN3), f64(-2.0, -7 - LN3)
    batch = chosen, rejected, ref_chosen, ref_rejected
    result = dpo_loss(*batch, beta=0.5, label_smoothing=0.0)
    assert_close(result.loss, (math.log(4 / 3) + math.log(4)) / 2, FP64)
    assert result.count == 2
    assert_close(result.chosen_rewards, [LN3, -LN3 / 2], FP64)
    assert_close(result.rejected_rewards, [0.0, LN3 / 2], FP64)
    # a tenth of the labels flipped: 0.9 ln(4/3) + 0.1 ln 4 in row 0 alone
    first = [x[:1] for x in batch]
    result = dpo_loss(*first, beta=0.5, label_smoothing=0.1)
    assert_close(result.loss, 0.9 * math.log(4 / 3) + 0.1 * math.log(4), FP64)


@pytest.mark.eq("dpo")
@given(tensors(3), tensors(3), st.floats(0.01, 2), st.floats(0, 0.49))
def test_dpo_loss_closed_equality(chosen, rejected, beta, label_smoothing):
    result = dpo_loss(
        chosen, rejected, chosen, rejected, beta=beta, label_smoothing=label_smoothing
    )
    assert_close(result.loss, LN2, FP64)


@pytest.mark.eq("dpo")
@given(tensors(4), tensors(4), tensors(4), tensors(4), st.floats(0.01, 2), st.floats(0, 0.49))
def test_dpo_loss_definition(w, l, ref_w, ref_l, beta, eps):  # noqa: E741
    losses, rewards = [], []
    for pi_w, pi_l, r_w, r_l in zip(*(x.exp().tolist() for x in (w, l, ref_w, ref_l)), strict=True):
        h = beta * math.log(pi_w * r_l / (r_w * pi_l))
        losses.append((1 - eps) * math.log(1 + math.exp(-h)) + eps * math.log(1 + math.exp(h)))
        rewards.append((beta * math.log(pi_w / r_w), beta * math.log(pi_l / r_l)))
    result = dpo_loss(w, l, ref_w, ref_l, beta=beta, label_smoothing=eps)
    assert_close(result.loss, sum(losses) / 4, FP64)
    assert_close(result.chosen_rewards, [r for r, _ in rewards], FP64)
    assert_close(result.rejected_rewards, [r for _, r in rewards], FP64)


def test_dpo_loss_property_extreme():
    # summed log-probabilities lie far apart early in training: no overflow on either side
    zero = torch.zeros(1)
    for h, loss in ((1000.0, 0.0), (-1000.0, 1000.0)):
        result = dpo_loss(zero + h, zero, zero, zero, beta=1.0, label_smoothing=0.0)
        assert_close(result.loss, loss, EXACT)


def test_dpo_loss_gradient():
    inputs = [f64(*row).requires_grad_() for row in ((-3, -4), (-5, -3), (-3.5, -4), (-4, -4))]
    assert torch.autograd.gradcheck(lambda *x: preference_loss(*x).loss, inputs)
    result = dpo_loss(*inputs, beta=0.5, label_smoothing=0.0)
    assert_nothing_but_the_loss_carries_gradient(result)
    up, down, *_ = torch.autograd.grad(result.loss, inputs)
    assert bool((up < 0).all())
    assert_close(down, -up, FP64)
    # at the reference: -beta / 2 for each of n pairs
    _, gradients = outputs_and_gradients(
        lambda w: (
            dpo_loss(w, f64(0, 0), f64(-1, -2), f64(0, 0), beta=0.5, label_smoothing=0.0).loss
        ),
        f64(-1, -2),
    )
    assert_close(gradients[0], [-0.125, -0.125], FP64)


def test_dpo_loss_property_smoothing():
    # with flipped labels in mind there is a best h, where sigmoid(h) = 1 - eps: ln 9 at eps = 0.1
    def loss(h):
        zero = f64(0)
        return dpo_loss(f64(h), zero, zero, zero, beta=1.0, label_smoothing=0.1).loss.item()

    best = math.log(9)
    assert rising([loss(best), loss(best + 0.5), loss(best + 1)])
    assert rising([loss(best), loss(best - 0.5), loss(best - 1)])


@pytest.mark.parametrize("wrong", range(4))
def test_dpo_loss_errors_shapes(wrong):
    inputs = [torch.zeros(2)] * 4
    inputs[wrong] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"shapes differ"):
        dpo_loss(*inputs, beta=0.1, label_smoothing=0.0)


@pytest.mark.parametrize(
    ("beta", "label_smoothing"),
    [(0.0, 0.0), (-0.1, 0.0), (NAN, 0.0), (0.1, -0.01), (0.1, 0.5), (0.1, 1.0), (0.1, NAN)],
)
def test_dpo_loss_errors_range(beta, label_smoothing):
    x = torch.zeros(1)
    with pytest.raises(ValueError, match=f"not {beta}, {label_smoothing}"):
        dpo_loss(x, x, x, x, beta=beta, label_smoothing=label_smoothing)
