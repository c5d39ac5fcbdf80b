import math
import re
from pathlib import Path

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

from rlhf_min import preference_losses
from rlhf_min.preference_losses import (
    apo_down_loss,
    apo_zero_loss,
    cpo_loss,
    dpo_loss,
    hinge_loss,
    implicit_rewards,
    ipo_loss,
    orpo_loss,
    robust_loss,
    sft_term,
    simpo_loss,
)

LN2, LN3 = math.log(2), math.log(3)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def preference_loss(*logprobs):
    return dpo_loss(*logprobs, beta=0.3, label_smoothing=0.1)


# What holds for every loss

# Each with numbers for its options, and how many tensors it takes.
LOSSES = {
    "dpo": (preference_loss, 4),
    "ipo": (lambda *x: ipo_loss(*x, beta=0.3), 4),
    "hinge": (lambda *x: hinge_loss(*x, beta=0.3), 4),
    "robust": (lambda *x: robust_loss(*x, beta=0.3, label_smoothing=0.1), 4),
    "apo_zero": (lambda *x: apo_zero_loss(*x, beta=0.3), 4),
    "apo_down": (lambda *x: apo_down_loss(*x, beta=0.3), 4),
    "simpo": (lambda *x: simpo_loss(*x, beta=2.0, gamma=0.5), 2),
    "orpo": (lambda *x: orpo_loss(*(y - 4 for y in x), beta=0.3), 2),  # below 0 they are
    "cpo": (lambda *x: cpo_loss(*x, beta=0.3), 2),
}
OF_PAIRS = pytest.mark.parametrize(("loss", "count"), LOSSES.values(), ids=LOSSES)


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


@OF_PAIRS
def test_pair_losses_errors_shapes(loss, count):
    for wrong in range(count):
        inputs = [torch.zeros(2)] * count
        inputs[wrong] = torch.zeros(1)
        with pytest.raises(ValueError, match=r"shapes differ"):
            loss(*inputs)


@pytest.mark.parametrize("beta", [0.0, -0.1, NAN])
def test_pair_losses_errors_beta(beta):
    x = torch.zeros(1)
    smoothed = {"beta": beta, "label_smoothing": 0.0}
    for loss, count, options in (
        *((loss, 4, smoothed) for loss in (dpo_loss, robust_loss)),
        *((loss, 4, {"beta": beta}) for loss in (ipo_loss, hinge_loss)),
        *((loss, 4, {"beta": beta}) for loss in (apo_zero_loss, apo_down_loss)),
        *((loss, 2, {"beta": beta}) for loss in (orpo_loss, cpo_loss)),
        (simpo_loss, 2, {"beta": beta, "gamma": 0.0}),
    ):
        with pytest.raises(ValueError, match=f"beta must be above 0, not {beta}"):
            loss(*[x] * count, **options)


@pytest.mark.parametrize("label_smoothing", [-0.01, 0.5, 1.0, NAN])
@pytest.mark.parametrize("loss", [dpo_loss, robust_loss])
def test_pair_losses_errors_label_smoothing(loss, label_smoothing):
    x = torch.zeros(1)
    with pytest.raises(ValueError, match=rf"in \[0, 0.5\), not {label_smoothing}"):
        loss(x, x, x, x, beta=0.1, label_smoothing=label_smoothing)


@OF_PAIRS
def test_pair_losses_gradient(loss, count):
    # Two pairs, away from the kink of the hinge; nothing that is logged carries gradient.
    rows = ((-3.0, -4.0), (-5.0, -3.0), (-3.5, -4.0), (-4.0, -4.0))[:count]
    inputs = [f64(*row).requires_grad_() for row in rows]
    assert torch.autograd.gradcheck(lambda *x: loss(*x).loss, inputs)
    assert_nothing_but_the_loss_carries_gradient(loss(*inputs))


# What one pair's loss does to the two log-probabilities while policy and reference are the same, or
# for a response beside itself: by hand.
AT_THE_START = {
    "dpo": (LN2, -0.3 * 0.8 / 2, 0.3 * 0.8 / 2),  # eps = 0.1: (1 - 2 * eps) of a half
    "ipo": (1 / 0.36, -1 / 0.3, 1 / 0.3),  # 1/(4 beta^2), 2 * (0 - 1/(2 beta))
    "hinge": (1.0, -0.3, 0.3),
    "robust": (LN2, -0.3 / 1.6, 0.3 / 1.6),  # a half, divided by 1 - 2 * eps
    "apo_zero": (1.0, -0.3 / 4, 0.3 / 4),
    "apo_down": (1.0, 0.0, 0.3 / 4),  # it pulls the chosen one down as much as up
    "simpo": (math.log(1 + math.exp(0.5)), *(2 / (1 + math.exp(-0.5)) * x for x in (-1, 1))),
    # Of log odds the derivative is 1/(1 - P): it is large where the policy is sure already.
    "orpo": (0.3 * LN2, *(0.15 / (1 - math.exp(-5)) * x for x in (-1, 1))),
    "cpo": (LN2, -0.15, 0.15),
}


@pytest.mark.parametrize("name", AT_THE_START)
def test_pair_losses_closed_at_the_start(name):
    loss, count = LOSSES[name]
    inputs = [f64(-1).requires_grad_() for _ in range(count)]
    result = loss(*inputs)
    expected, up, down = AT_THE_START[name]
    assert_close(result.loss, expected, FP64)
    found = torch.autograd.grad(result.loss, inputs[:2])
    assert_close(torch.cat(found), [up, down], FP64)


@OF_PAIRS
def test_pair_losses_property_extreme(loss, count):
    """Log-probabilities of whole responses lie far apart: no overflow, there or on the way back."""
    for far in (-1e4, -1e-30):
        inputs = [torch.tensor([x]).requires_grad_() for x in (-1.0, far, -2.0, -2.0)[:count]]
        for pair in (inputs, [inputs[1], inputs[0], *inputs[2:]]):
            found = loss(*pair).loss
            assert found.isfinite()
            for gradient in torch.autograd.grad(found, inputs):
                assert gradient.isfinite()


# implicit_rewards


@pytest.mark.eq("implicit_rewards")
def test_implicit_rewards_closed():
    # pi/ref is 9 for the chosen one and 1/3 for the rejected one
    chosen, rejected = f64(math.log(0.9)), f64(math.log(0.1))
    ref_chosen, ref_rejected = f64(math.log(0.1)), f64(math.log(0.3))
    found = implicit_rewards(chosen, rejected, ref_chosen, ref_rejected, beta=0.5)
    assert_close(torch.cat(found), [LN3, -LN3 / 2], FP64)


# sft_term


@pytest.mark.eq("sft_term")
def test_sft_term_closed():
    # two tokens of probability 1/2, four of 1/4: 1 and 2 bits per token
    found = sft_term(f64(-2 * LN2, -8 * LN2), f64(2, 4))
    assert_close(found, [LN2, 2 * LN2], FP64)
    assert sft_term(torch.zeros(1).bfloat16(), torch.ones(1)).dtype == torch.float32


@pytest.mark.eq("sft_term")
@given(ragged_batches(1))
def test_sft_term_definition(batch):
    logprobs, mask = batch
    rows = [x[m].tolist() for x, m in zip(logprobs, mask, strict=True)]
    found = sft_term((logprobs * mask).sum(1), mask.sum(1))
    assert_close(found, [-math.fsum(row) / len(row) for row in rows], FP64)


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


# ipo_loss


@pytest.mark.eq("ipo")
def test_ipo_loss_closed():
    # tau = 1/4: the margin's aim is 2. Row 0 has 2 ln 3 of it, row 1 is exactly there.
    chosen, rejected = f64(-1.0, -3.0), f64(-2.0, -7.0)
    ref_chosen, ref_rejected = f64(-1 - 2 * LN3, -4.0), f64(-2.0, -6.0)
    result = ipo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.25)
    assert_close(result.loss, (2 * LN3 - 2) ** 2 / 2, FP64)
    assert result.count == 2
    assert_close(result.chosen_rewards, [LN3 / 2, 0.25], FP64)
    assert_close(result.rejected_rewards, [0.0, -0.25], FP64)


@pytest.mark.eq("ipo")
@given(tensors(4), tensors(4), tensors(4), tensors(4), st.floats(0.05, 2))
def test_ipo_loss_definition(w, l, ref_w, ref_l, tau):  # noqa: E741
    """Of the paper's odds, in probabilities."""
    losses = []
    for pi_w, pi_l, r_w, r_l in zip(*(x.exp().tolist() for x in (w, l, ref_w, ref_l)), strict=True):
        losses.append((math.log(pi_w * r_l / (pi_l * r_w)) - 1 / tau / 2) ** 2)
    assert_close(ipo_loss(w, l, ref_w, ref_l, beta=tau).loss, sum(losses) / 4, FP64)


# hinge_loss


@pytest.mark.eq("hinge")
def test_hinge_loss_closed():
    # beta = 1/2; margins 1/2, 1, 3 and -1: losses 1/2, 0, 0 and 2
    zero = f64(0, 0, 0, 0)
    result = hinge_loss(f64(1, 2, 6, -1), zero, zero, f64(0, 0, 0, -1), beta=0.5)
    assert_close(result.loss, 2.5 / 4, FP64)
    assert_close(result.chosen_rewards, [0.5, 1.0, 3.0, -0.5], FP64)
    assert_close(result.rejected_rewards, [0.0, 0.0, 0.0, 0.5], FP64)


@pytest.mark.eq("hinge")
def test_hinge_loss_gradient_ends_at_the_margin():
    chosen, zero = f64(1.9, 2.1).requires_grad_(), f64(0, 0)
    hinge_loss(chosen, zero, zero, zero, beta=0.5).loss.backward()
    assert_close(chosen.grad, [-0.25, 0.0], FP64)


# robust_loss


@pytest.mark.eq("robust")
def test_robust_loss_closed():
    # h = ln 3, sigmoid 3/4: (-3/4 ln 3/4 + 1/4 ln 1/4) / (1/2), and with eps = 0 it is DPO
    zero = f64(0)
    result = robust_loss(f64(2 * LN3), zero, zero, zero, beta=0.5, label_smoothing=0.25)
    assert_close(result.loss, 1.5 * math.log(4 / 3) - 0.5 * math.log(4), FP64)
    batch = f64(-1, -2), f64(-3, -1), f64(-2, -2), f64(-1, -4)
    plain = robust_loss(*batch, beta=0.5, label_smoothing=0.0)
    assert_close(plain.loss, dpo_loss(*batch, beta=0.5, label_smoothing=0.0).loss, FP64)


@pytest.mark.eq("robust")
@given(tensors(1), tensors(1), tensors(1), tensors(1), st.floats(0, 0.45))
def test_robust_loss_definition_undoes_flipped_labels(w, l, ref_w, ref_l, eps):  # noqa: E741
    """Its mean over labels that are flipped with probability eps is DPO's loss of the true ones."""
    as_given = robust_loss(w, l, ref_w, ref_l, beta=0.7, label_smoothing=eps).loss
    flipped = robust_loss(l, w, ref_l, ref_w, beta=0.7, label_smoothing=eps).loss
    h = 0.7 * float(w - ref_w - l + ref_l)
    # 1 / (1 - 2 * eps) enlarges the rounding by 10
    assert_close((1 - eps) * as_given + eps * flipped, math.log(1 + math.exp(-h)), 10 * FP64)


# apo_zero_loss, apo_down_loss


@pytest.mark.eq("apo_zero")
def test_apo_zero_loss_closed():
    # rewards ln 3 and ln 3, sigmoid 3/4: 1/4 + 3/4; then 0 and ln 3: 1/2 + 3/4
    zero = f64(0, 0)
    result = apo_zero_loss(f64(2 * LN3, 0), f64(2 * LN3, 2 * LN3), zero, zero, beta=0.5)
    assert_close(result.loss, (1 + 1.25) / 2, FP64)
    assert_close(result.chosen_rewards, [LN3, 0.0], FP64)
    assert_close(result.rejected_rewards, [LN3, LN3], FP64)


@pytest.mark.eq("apo_down")
def test_apo_down_loss_closed():
    # rewards ln 3 and -ln 3: sigmoid 3/4, of their difference 9/10: 3/4 + 1/10; ln 3 twice:
    # 3/4 + 1/2
    zero = f64(0, 0)
    result = apo_down_loss(f64(2 * LN3, 2 * LN3), f64(-2 * LN3, 2 * LN3), zero, zero, beta=0.5)
    assert_close(result.loss, (0.85 + 1.25) / 2, FP64)


@pytest.mark.eq("apo_zero")
@pytest.mark.eq("apo_down")
def test_apo_losses_move_each_response_for_itself():
    """Zero lifts the chosen and sinks the rejected one wherever they are; down sinks the chosen one
    too, once the two are apart."""
    zero = f64(0)
    for far in (-2.0, 0.0, 2.0):
        pair = [f64(far).requires_grad_(), f64(far - 4).requires_grad_()]
        up, down = torch.autograd.grad(apo_zero_loss(*pair, zero, zero, beta=0.5).loss, pair)
        assert up < 0 < down
    pair = [f64(0).requires_grad_(), f64(-4).requires_grad_()]
    both = torch.autograd.grad(apo_down_loss(*pair, zero, zero, beta=0.5).loss, pair)
    assert min(both) > 0


# simpo_loss


@pytest.mark.eq("simpo")
def test_simpo_loss_closed():
    # beta = 2: rewards differ by 2 ln 3, less a margin of ln 3 is ln 3: sigmoid 3/4. Then by the
    # margin: 1/2
    result = simpo_loss(f64(-1, -2), f64(-1 - LN3, -2 - LN3 / 2), beta=2.0, gamma=LN3)
    assert_close(result.loss, (math.log(4 / 3) + LN2) / 2, FP64)
    assert result.count == 2
    assert_close(result.chosen_rewards, [-2.0, -4.0], FP64)
    assert_close(result.rejected_rewards, [-2 - 2 * LN3, -4 - LN3], FP64)


@pytest.mark.parametrize("gamma", [-0.1, NAN])
def test_simpo_loss_errors_gamma(gamma):
    x = torch.zeros(1)
    with pytest.raises(ValueError, match=f"gamma must be at least 0, not {gamma}"):
        simpo_loss(x, x, beta=1.0, gamma=gamma)


# orpo_loss


@pytest.mark.eq("orpo")
def test_orpo_loss_closed():
    # P = 3/4 and 1/2: odds 3 and 1, sigmoid(ln 3) = 3/4; then 1/2 and 1/2: 1/2
    chosen, rejected = f64(math.log(3 / 4), -LN2), f64(-LN2, -LN2)
    result = orpo_loss(chosen, rejected, beta=0.1)
    assert_close(result.loss, 0.1 * (math.log(4 / 3) + LN2) / 2, FP64)
    assert result.count == 2
    assert_close(result.chosen_rewards, [0.1 * math.log(3 / 4), -0.1 * LN2], FP64)
    assert_close(result.rejected_rewards, [-0.1 * LN2, -0.1 * LN2], FP64)


@pytest.mark.eq("orpo")
@given(tensors(4, low=-6, high=-0.01), tensors(4, low=-6, high=-0.01))
def test_orpo_loss_definition(w, l):  # noqa: E741
    """The sigmoid of a log is a share: odds_w / (odds_w + odds_l)."""
    losses = []
    for p, q in zip(w.exp().tolist(), l.exp().tolist(), strict=True):
        odds, other = p / (1 - p), q / (1 - q)
        losses.append(-0.2 * math.log(odds / (odds + other)))
    assert_close(orpo_loss(w, l, beta=0.2).loss, sum(losses) / 4, FP64)


def test_orpo_loss_of_a_certain_response():
    """Odds without end would make the gradient NaN."""
    pair = [torch.zeros(1).requires_grad_(), torch.tensor([-1.0]).requires_grad_()]
    for chosen, rejected in (pair, pair[::-1]):
        loss = orpo_loss(chosen, rejected, beta=1.0).loss
        assert loss.isfinite()
        assert all(gradient.isfinite() for gradient in torch.autograd.grad(loss, pair))


# cpo_loss


@pytest.mark.eq("cpo")
def test_cpo_loss_closed():
    # beta = 1/2: h = ln 3, sigmoid 3/4; then 0, 1/2
    result = cpo_loss(f64(-1, -5), f64(-1 - 2 * LN3, -5), beta=0.5)
    assert_close(result.loss, (math.log(4 / 3) + LN2) / 2, FP64)
    assert result.count == 2
    assert_close(result.chosen_rewards, [-0.5, -2.5], FP64)
    assert_close(result.rejected_rewards, [-0.5 - LN3, -2.5], FP64)


@pytest.mark.eq("cpo")
@given(tensors(4), tensors(4), tensors(4))
def test_cpo_loss_definition(chosen, rejected, ref):
    """DPO with a reference that finds both responses equally probable."""
    expected = dpo_loss(chosen, rejected, ref, ref, beta=0.3, label_smoothing=0.0)
    assert_close(cpo_loss(chosen, rejected, beta=0.3).loss, expected.loss, FP64)


# One more, as the README for developers adds it


def test_the_loss_that_the_readme_adds():
    # beta = 1/2: margins 1/2 and 2, so (1/2)^2 and 0
    readme = (Path(__file__).parents[2] / "rlhf_min/README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```py\n(def squared_hinge_loss.*?)```", readme, re.DOTALL)
    names = dict(vars(preference_losses))
    exec(compile(code, "README.md", "exec"), names)
    zero = f64(0, 0)
    found = names["squared_hinge_loss"](f64(1, 4), zero, zero, zero, beta=0.5)
    assert_close(found.loss, 0.125, FP64)
    assert_close(found.chosen_rewards, [0.5, 2.0], FP64)
