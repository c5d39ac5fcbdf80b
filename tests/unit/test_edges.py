"""The equations at their edges: half precision, impossible tokens, wrong masks, no pairs."""

import math
import re

import pytest
import torch
from strategies import INF, assert_close, outputs_and_gradients
from tolerances import EXACT, FP32, FP64

from rlhf_min.advantages import gae
from rlhf_min.kl import exact_kl, kl_estimate, shape_rewards
from rlhf_min.losses import (
    dpo_loss,
    pairwise_reward_loss,
    ppo_policy_loss,
    ppo_value_loss,
    sft_loss,
)
from rlhf_min.masking import masked_mean, masked_scale, masked_var, masked_whiten

MASK = torch.tensor([[True] * 64, [True] * 41 + [False] * 23])

# Each takes three tensors (2, 64) of any dtype.
COMPUTED = {
    "masked_mean": lambda a, *_: masked_mean(a, MASK),
    "masked_var": lambda a, *_: masked_var(a, MASK),
    "masked_whiten": lambda a, *_: masked_whiten(a, MASK),
    "masked_scale": lambda a, *_: masked_scale(a, MASK),
    "k1": lambda a, b, _: kl_estimate(a, b, kind="k1"),
    "k3": lambda a, b, _: kl_estimate(a, b, kind="k3"),
    "shape_rewards": lambda a, _, c: shape_rewards(c[:, 0], a, MASK, kl_coef=0.1),
    "gae": lambda a, b, _: gae(a, b, MASK, gamma=0.99, lam=0.95),
    "sft_loss": lambda a, *_: sft_loss(a, MASK),
    "reward": lambda a, b, c: pairwise_reward_loss(a[0], b[0], margin=c[0], center_coef=0.1),
    "policy": lambda a, b, c: ppo_policy_loss(a, b, c, MASK, clip=0.2),
    "value": lambda a, b, c: ppo_value_loss(a, b, c, MASK, clip=0.2),
    "dpo": lambda a, b, c: dpo_loss(a[0], b[0], c[0], c[1], beta=0.3, label_smoothing=0.1),
}


@pytest.mark.parametrize("function", COMPUTED.values(), ids=COMPUTED)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_only_how_the_inputs_are_stored(function, half):
    rng = torch.Generator().manual_seed(0)
    stored = [torch.randn(2, 64, generator=rng).to(half) for _ in range(3)]
    outputs, gradients = outputs_and_gradients(function, *stored)
    expected, expected_gradients = outputs_and_gradients(function, *(x.double() for x in stored))
    for found, exact in zip(outputs, expected, strict=True):
        if found.is_floating_point():
            assert found.dtype == torch.float32
            assert_close(found, exact.float(), FP32)
    for found, exact in zip(gradients, expected_gradients, strict=True):
        assert found.dtype == half
        torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(half).eps, atol=FP32)


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


@pytest.mark.parametrize("shape", [(0,), (2, 3), ()])
def test_pairs_are_one_number_each_and_at_least_one(shape):
    x = torch.zeros(shape)
    with pytest.raises(ValueError, match="one pair or more"):
        dpo_loss(x, x, x, x, beta=0.1, label_smoothing=0.0)
    with pytest.raises(ValueError, match="one pair or more"):
        pairwise_reward_loss(x, x, margin=None, center_coef=0.1)
