import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    INF,
    NAN,
    assert_close,
    assert_padding_never_matters,
    assert_rows_are_a_set,
    outputs_and_gradients,
    ragged_batches,
    rising,
    softmax,
    tensors,
)
from tolerances import EXACT, FP32, FP64

from rlhf_min.kl import AdaptiveKL, FixedKL, exact_kl, kl_estimate, shape_rewards

LN2 = math.log(2)
KINDS = ("k1", "abs", "k2", "k3")


def by_hand(kind, d):
    """The estimate for one log-ratio d, in Python floats."""
    ratio = math.exp(-d)  # ref / pi
    return {"k1": -math.log(ratio), "abs": max(d, -d), "k2": math.log(ratio) ** 2 / 2,
            "k3": ratio - 1 - math.log(ratio)}[kind]  # fmt: skip


# kl_estimate


@pytest.mark.eq("kl")
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # pi = 1/2, ref = 1/4: d = ln 2;  pi = 1/4, ref = 1/2: d = -ln 2;  pi = ref: d = 0
        ("k1", [LN2, -LN2, 0.0]),
        ("abs", [LN2, LN2, 0.0]),
        ("k2", [LN2**2 / 2, LN2**2 / 2, 0.0]),
        ("k3", [1 / 2 - 1 + LN2, 2 - 1 - LN2, 0.0]),
    ],
)
def test_kl_estimate_closed(kind, expected):
    pi = torch.tensor([[0.5, 0.25, 0.5]], dtype=torch.float64).log()
    ref = torch.tensor([[0.25, 0.5, 0.5]], dtype=torch.float64).log()
    assert_close(kl_estimate(pi, ref, kind=kind), [expected], FP64)


@pytest.mark.eq("kl")
@pytest.mark.parametrize("kind", KINDS)
@given(tensors(2, 3), tensors(2, 3))
def test_kl_estimate_definition(kind, logprobs, ref_logprobs):
    expected = [
        [by_hand(kind, p - r) for p, r in zip(ps, rs, strict=True)]
        for ps, rs in zip(logprobs.tolist(), ref_logprobs.tolist(), strict=True)
    ]
    # up to exp(6) = 403 in k3, hence relative to the largest term
    assert_close(kl_estimate(logprobs, ref_logprobs, kind=kind), expected, FP64)


@pytest.mark.eq("kl")
@pytest.mark.eq("exact_kl")
@given(tensors(5), tensors(5))
def test_kl_estimate_definition_expectation(logits, ref_logits):
    # enumerate the vocabulary: under pi, k1 and k3 have the KL as their mean, k2 does not
    pi, ref = logits.softmax(0), ref_logits.softmax(0)
    exact = exact_kl(logits, ref_logits)
    for kind in ("k1", "k3"):
        assert_close((pi * kl_estimate(pi.log(), ref.log(), kind=kind)).sum(), exact, FP64)
    absolute = sum(p * abs(math.log(p / r)) for p, r in zip(pi.tolist(), ref.tolist(), strict=True))
    assert_close((pi * kl_estimate(pi.log(), ref.log(), kind="abs")).sum(), absolute, FP64)


@pytest.mark.eq("kl")
@pytest.mark.parametrize(
    ("kind", "bias", "deviation", "rounded"),
    [
        ("k1", 0.0, 2 / 0.1, 20.0),
        ("k2", 0.1**2 / 4, math.sqrt(2 + 0.1**2), 1.4177),
        ("k3", 0.0, math.sqrt(math.expm1(0.1**2) - 0.1**2) / (0.1**2 / 2), 1.4166),
    ],
)
def test_kl_estimate_definition_gaussian(kind, bias, deviation, rounded):
    # Schulman's example: q = N(0, 1), p = N(mu, 1), KL(q || p) = mu^2 / 2 = 0.005 at mu = 0.1.
    # bias and deviation are relative to it; the integral over q is a Gauss-Hermite sum.
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    x, q = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
    estimate = kl_estimate(-(x**2) / 2, -((x - 0.1) ** 2) / 2, kind=kind)
    mean = (q * estimate).sum()
    assert_close(mean, 0.005 * (1 + bias), FP64)
    relative = (q * (estimate - mean) ** 2).sum().sqrt() / 0.005
    assert_close(relative, deviation, FP64)
    assert round(relative.item(), 4) == rounded


@given(tensors(6), tensors(6))
def test_kl_estimate_property_signs(logprobs, ref_logprobs):
    for kind in ("abs", "k2", "k3"):
        assert bool((kl_estimate(logprobs, ref_logprobs, kind=kind) >= 0).all())
    for kind in KINDS:
        assert_close(kl_estimate(logprobs, logprobs, kind=kind), torch.zeros_like(logprobs), EXACT)
    for kind in ("abs", "k2"):  # alone in being symmetric
        there, back = (kl_estimate(*pair, kind=kind) for pair in
                       [(logprobs, ref_logprobs), (ref_logprobs, logprobs)])  # fmt: skip
        assert_close(there, back, EXACT)


def test_kl_estimate_property_small():
    # near d = 0, exp(-d) - 1 + d would lose to rounding what float32 can hold
    d = torch.tensor([1 / 32])
    expected = math.exp(-1 / 32) - 1 + 1 / 32
    assert_close(kl_estimate(d, 0 * d, kind="k3") / expected, [1.0], FP32)


@pytest.mark.parametrize("kind", KINDS)
def test_kl_estimate_gradient(kind):
    pi = torch.tensor([[-0.5, -2.0]], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([[-1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p, r: kl_estimate(p, r, kind=kind), (pi, ref))
    # with respect to log pi: 1; the sign of d; d; 1 - exp(-d).  d = 1/2 and -1
    expected = {"k1": [1, 1], "abs": [1, -1], "k2": [0.5, -1],
                "k3": [1 - math.exp(-0.5), 1 - math.exp(1)]}[kind]  # fmt: skip
    gradient, against = torch.autograd.grad(kl_estimate(pi, ref, kind=kind).sum(), (pi, ref))
    assert_close(gradient, [[float(x) for x in expected]], FP64)
    assert_close(against, -gradient, FP64)


def test_kl_estimate_errors():
    with pytest.raises(ValueError, match="k1, abs, k2 or k3, not 'full'"):
        kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), kind="full")


# exact_kl


@pytest.mark.eq("exact_kl")
def test_exact_kl_closed():
    # p = (1/2, 1/2), r = (1/4, 3/4): 1/2 ln 2 + 1/2 ln(2/3) = ln 2 - ln 3 / 2; the other way
    # round 1/4 ln(1/2) + 3/4 ln(3/2) = 3/4 ln 3 - ln 2
    even = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    skew = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
    assert_close(exact_kl(even, skew), [LN2 - math.log(3) / 2], FP64)
    assert_close(exact_kl(skew, even), [0.75 * math.log(3) - LN2], FP64)


@pytest.mark.eq("exact_kl")
@given(tensors(2, 3, 5), tensors(2, 3, 5))
def test_exact_kl_definition(logits, ref_logits):
    expected = [
        sum(p * math.log(p / r) for p, r in zip(softmax(zs), softmax(rs), strict=True))
        for zs, rs in zip(
            logits.reshape(6, 5).tolist(), ref_logits.reshape(6, 5).tolist(), strict=True
        )
    ]
    assert_close(exact_kl(logits, ref_logits).flatten(), expected, FP64)


@given(tensors(4, 5), tensors(4, 5), st.permutations(range(4)))
def test_exact_kl_property(logits, ref_logits, order):
    kl = exact_kl(logits, ref_logits)
    assert bool((kl >= -FP64).all())
    assert_close(exact_kl(logits, logits), torch.zeros(4, dtype=torch.float64), EXACT)
    assert_close(exact_kl(logits + 5, ref_logits), kl, FP64)  # a shift of all logits is none
    assert_rows_are_a_set(exact_kl, logits, ref_logits, order=torch.tensor(order))


def test_exact_kl_gradient():
    z = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3).requires_grad_()
    r = torch.tensor([[0.5, 0.0, -1.0], [0.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(exact_kl, (z, r))
    # at policy = reference the KL has its minimum
    _, gradients = outputs_and_gradients(exact_kl, z, z)
    for gradient in gradients:
        assert_close(gradient, torch.zeros_like(z), FP64)


def test_exact_kl_of_impossible_tokens():
    # p = (1/2, 1/2, 0), r = (1/4, 3/4, 0): as without the third; r without it on its side: inf
    half, quarter = [0.0, 0.0, -INF], [0.0, math.log(3), -INF]
    p, r = (torch.tensor([x], dtype=torch.float64) for x in (half, quarter))
    (kl,), gradients = outputs_and_gradients(exact_kl, p, r)
    _, expected_gradients = outputs_and_gradients(exact_kl, p[:, :2], r[:, :2])
    assert_close(kl, [math.log(2) - math.log(3) / 2], FP64)
    for gradient, plain in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient[:, :2], plain, FP64)
        assert gradient[0, 2] == 0
    # r = 1/3 each, where p has no third: ln(3/2)
    even = torch.zeros(1, 3, dtype=torch.float64)
    assert_close(exact_kl(p, even), [math.log(1.5)], FP64)
    assert_close(exact_kl(even, p), [INF], EXACT)


@pytest.mark.parametrize(
    ("given_dtype", "dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2],
)
def test_exact_kl_dtype(given_dtype, dtype):
    # both rows are exact in bfloat16: any error is one of the arithmetic
    logits = torch.tensor([[0.0, 1.0]], dtype=given_dtype)
    ref_logits = torch.tensor([[0.5, 0.0]], dtype=given_dtype)
    (p, q), (r, s) = softmax([0, 1]), softmax([0.5, 0])
    kl = exact_kl(logits, ref_logits)
    assert kl.dtype == dtype
    assert_close(kl, [p * math.log(p / r) + q * math.log(q / s)], FP32)


# FixedKL


def test_fixed_kl_closed():
    control = FixedKL(0.05)
    control.update(1000.0, 1000)
    assert control.coef == 0.05


# AdaptiveKL


@pytest.mark.eq("adaptive_kl")
@pytest.mark.parametrize(
    ("mean_kl", "coef"),
    [
        # 25 of 100 responses, so a quarter of the error; target 6, coefficient 0.1
        (60.0, 0.105),  # error 9, limited to 0.2:     0.1 (1 + 0.05)
        (7.2, 0.105),  # error 0.2, just at the limit
        (6.6, 0.1025),  # error 0.1, in between:       0.1 (1 + 0.025)
        (6.0, 0.1),  # at the target nothing changes
        (5.4, 0.0975),  # error -0.1:                  0.1 (1 - 0.025)
        (4.8, 0.095),  # error -0.2, just at the limit
        (0.0, 0.095),  # error -1, limited to -0.2:    0.1 (1 - 0.05)
        (-3.0, 0.095),  # k1 may be negative
    ],
)
def test_adaptive_kl_closed(mean_kl, coef):
    control = AdaptiveKL(0.1, target=6.0, horizon=100)
    control.update(mean_kl, n=25)
    assert control.coef == pytest.approx(coef, rel=FP64)


@pytest.mark.eq("adaptive_kl")
@given(st.lists(st.tuples(st.floats(-5, 50), st.integers(1, 64)), max_size=8))
def test_adaptive_kl_definition(history):
    # the product of all factors, each error taken by cases
    control = AdaptiveKL(0.2, target=8.0, horizon=500)
    factors = [0.2]
    for mean_kl, n in history:
        control.update(mean_kl, n)
        if mean_kl > 1.2 * 8:
            error = 0.2
        elif mean_kl < 0.8 * 8:
            error = -0.2
        else:
            error = (mean_kl - 8) / 8
        factors.append(1 + error * n / 500)
    assert control.coef == pytest.approx(math.prod(factors), rel=FP64)


def test_adaptive_kl_property_only_update_changes_it():
    control = AdaptiveKL(0.1, target=6.0, horizon=100)
    rewards = [
        shape_rewards(
            torch.ones(1), torch.full((1, 2), 9.0), torch.ones(1, 2).bool(), kl_coef=control.coef
        )
        for _ in range(2)
    ]
    assert_close(rewards[0], rewards[1], EXACT)
    assert (control.coef, control.target, control.horizon) == (0.1, 6.0, 100)
    control.update(12.0, n=10)
    assert control.coef > 0.1
    assert (control.target, control.horizon) == (6.0, 100)


def test_adaptive_kl_property_monotone():
    coefs = []
    for mean_kl in (4.9, 5.5, 6.5, 7.1):
        control = AdaptiveKL(0.1, target=6.0, horizon=100)
        control.update(mean_kl, n=10)
        coefs.append(control.coef)
    assert rising(coefs)


@pytest.mark.parametrize("bad", [0.0, -1.0, NAN])
def test_adaptive_kl_errors(bad):
    with pytest.raises(ValueError, match=f"must be positive, not {bad} and 100"):
        AdaptiveKL(0.1, target=bad, horizon=100)
    with pytest.raises(ValueError, match=f"must be positive, not 6.0 and {bad}"):
        AdaptiveKL(0.1, target=6.0, horizon=bad)


# shape_rewards


@pytest.mark.eq("shape_rewards")
def test_shape_rewards_closed():
    # coefficient 1/2. Row 0: -1/2 * 2, -1/2 * (-4), -1/2 * 6 + 10; row 1, one token: -1/2 * 8 + 20
    kl = torch.tensor([[2.0, -4.0, 6.0, 99.0], [8.0, 99.0, 99.0, 99.0]])
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    rewards = shape_rewards(torch.tensor([10.0, 20.0]), kl, mask, kl_coef=0.5)
    assert_close(rewards, [[-1.0, 2.0, 7.0, 0.0], [16.0, 0.0, 0.0, 0.0]], EXACT)


@pytest.mark.eq("shape_rewards")
@given(ragged_batches(1), st.floats(0, 2), st.data())
def test_shape_rewards_definition(batch, kl_coef, data):
    kl, mask = batch
    scores = data.draw(tensors(len(kl)))
    expected = [[0.0] * kl.shape[1] for _ in range(len(kl))]
    for b, row in enumerate(mask.tolist()):
        length = row.index(False) if False in row else len(row)
        for t in range(length):
            expected[b][t] = -kl_coef * kl[b, t].item()
        expected[b][length - 1] += scores[b].item()
    rewards = shape_rewards(scores, kl, mask, kl_coef=kl_coef)
    assert_close(rewards, expected, FP64)


@given(ragged_batches(1), st.data())
def test_shape_rewards_property_padding(batch, data):
    kl, mask = batch
    scores = data.draw(tensors(len(kl)))
    assert_padding_never_matters(
        lambda kl, mask: shape_rewards(scores, kl, mask, kl_coef=0.3), kl, mask=mask
    )


@pytest.mark.parametrize("kind", KINDS)
@given(ragged_batches(2))
def test_shape_rewards_property_padding_of_estimates(kind, batch):
    # what the estimate makes of poisoned log-probabilities must not reach the rewards
    def rewards(logprobs, ref_logprobs, mask):
        kl = kl_estimate(logprobs.detach(), ref_logprobs.detach(), kind=kind)
        return shape_rewards(torch.ones(len(kl)), kl, mask, kl_coef=0.3)

    assert_padding_never_matters(rewards, *batch[:2], mask=batch[2])


@given(ragged_batches(1, rows=4), tensors(4), st.permutations(range(4)))
def test_shape_rewards_property_permutation(batch, scores, order):
    assert_rows_are_a_set(
        lambda scores, kl, mask: shape_rewards(scores, kl, mask, kl_coef=0.3),
        scores,
        *batch,
        order=torch.tensor(order),
    )


def test_shape_rewards_gradient():
    scores = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    kl = torch.tensor([[1.0, 2.0], [3.0, 9.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    assert torch.autograd.gradcheck(
        lambda s, k: shape_rewards(s, k, mask, kl_coef=0.3), (scores, kl)
    )
    rewards = shape_rewards(scores, kl, mask, kl_coef=0.3)
    of_scores, of_kl = torch.autograd.grad(rewards.sum(), (scores, kl))
    assert_close(of_scores, [1.0, 1.0], EXACT)
    assert_close(of_kl, [[-0.3, -0.3], [-0.3, 0.0]], EXACT)
    assert rewards.dtype == torch.float64


def test_shape_rewards_property_infinite_score_stays_in_its_cell():
    # a broken score must be seen where it belongs, not spread
    rewards = shape_rewards(
        torch.tensor([INF, 1.0]), torch.ones(2, 2), torch.ones(2, 2).bool(), kl_coef=1.0
    )
    assert_close(rewards, [[-1.0, INF], [-1.0, 0.0]], EXACT)


def test_shape_rewards_errors():
    mask = torch.tensor([[True, True], [False, False]])
    with pytest.raises(ValueError, match="no real token to carry its score"):
        shape_rewards(torch.ones(2), torch.ones(2, 2), mask, kl_coef=0.1)


@pytest.mark.parametrize(
    ("scores", "kl", "mask"),
    [((2,), (2, 1), (2, 3)), ((3,), (2, 3), (2, 3)), ((1,), (2, 3), (2, 3)),
     ((2, 1), (2, 3), (2, 3)), ((2,), (2, 3), (2, 1))],
)  # fmt: skip
def test_shape_rewards_errors_shapes(scores, kl, mask):
    shapes = re.escape(f"scores, kl and mask do not fit each other: {[scores, kl, mask]}")
    with pytest.raises(ValueError, match=shapes):
        shape_rewards(torch.ones(scores), torch.ones(kl), torch.ones(mask).bool(), kl_coef=0.1)


@pytest.mark.parametrize("row", [[False, True, True], [True, False, True]])
def test_shape_rewards_errors_padding_on_the_left(row):
    mask = torch.tensor([[True, True, True], row])
    with pytest.raises(ValueError, match="right-padded"):
        shape_rewards(torch.ones(2), torch.ones(2, 3), mask, kl_coef=0.1)
