import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    INF,
    NAN,
    RAGGED,
    assert_close,
    assert_micro_batches_add_up,
    assert_nothing_but_the_loss_carries_gradient,
    assert_padding_never_matters,
    assert_rows_are_a_set,
    outputs_and_gradients,
    ragged_batches,
    tensors,
)
from tolerances import EXACT, FP64

from rlhf_min.logprobs import token_logprobs
from rlhf_min.losses import pairwise_reward_loss, ppo_policy_loss, ppo_value_loss, sft_loss

LN2, LN3 = math.log(2), math.log(3)
ONE = torch.ones(1, 1, dtype=torch.float64)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def policy_loss(new_logprobs, logprobs, advantages, mask):
    return ppo_policy_loss(new_logprobs, logprobs, advantages, mask, clip=0.2)


def value_loss(new_values, values, returns, mask):
    return ppo_value_loss(new_values, values, returns, mask, clip=0.5)


def reward_loss(chosen_scores, rejected_scores, margin):
    return pairwise_reward_loss(chosen_scores, rejected_scores, margin=margin, center_coef=0.1)


def real_cells(*batch):
    """One tuple of Python numbers for each real token; the mask comes last."""
    *inputs, mask = batch
    return list(zip(*(x[mask].tolist() for x in inputs), strict=True))


# What holds for every loss

# How many tensors it takes, of tokens beside the mask.
OF_TOKENS = pytest.mark.parametrize(
    ("loss", "count"), [(sft_loss, 1), (policy_loss, 3), (value_loss, 3)]
)


@OF_TOKENS
@given(st.data())
def test_token_losses_property_padding(loss, count, data):
    *inputs, mask = data.draw(ragged_batches(count))
    assert_padding_never_matters(loss, *inputs, mask=mask)


@OF_TOKENS
@given(st.data(), st.permutations(range(4)))
def test_token_losses_property_permutation(loss, count, data, order):
    batch = data.draw(ragged_batches(count, rows=4))
    assert_rows_are_a_set(loss, *batch, order=torch.tensor(order))


@given(tensors(4), tensors(4), tensors(4), st.permutations(range(4)))
def test_reward_loss_property_permutation(chosen, rejected, margin, order):
    assert_rows_are_a_set(reward_loss, chosen, rejected, margin, order=torch.tensor(order))


@OF_TOKENS
@given(st.data())
def test_token_losses_property_micro_batches(loss, count, data):
    assert_micro_batches_add_up(loss, *data.draw(ragged_batches(count, rows=8)))


@given(tensors(8), tensors(8), tensors(8))
def test_reward_loss_property_micro_batches(chosen, rejected, margin):
    assert_micro_batches_add_up(reward_loss, chosen, rejected, margin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_dtype(dtype):
    token = torch.ones(1, 1, dtype=dtype)
    pair, batch = token[0], (token, token, token, token.bool())
    for result in (policy_loss(*batch), value_loss(*batch), reward_loss(pair, pair, pair)):
        assert {y.dtype for y in result if y.is_floating_point()} == {dtype}


# sft_loss


@pytest.mark.eq("sft")
def test_sft_loss_closed():
    # probabilities 1/2, 1/4, 1/8 and 1/2: (1 + 2 + 3 + 1) ln 2 / 4; the mean of means would be 3/2
    logprobs = -LN2 * f64([1.0, 2.0, 3.0], [1.0, -99.0, -99.0])
    loss, count = sft_loss(logprobs, RAGGED)
    assert_close(loss, 7 * LN2 / 4, FP64)
    assert count == 4
    assert count.dtype == torch.int64


@pytest.mark.eq("sft")
@given(tensors(3, 4, 5), ragged_batches(1, rows=3), st.data())
def test_sft_loss_definition(logits, batch, data):
    mask = batch[-1][:, :4]
    logits = logits[:, : mask.shape[1]]
    tokens = torch.tensor(
        data.draw(st.lists(st.integers(0, 4), min_size=mask.numel(), max_size=mask.numel()))
    ).reshape(mask.shape)

    def ours(logits):
        return sft_loss(token_logprobs(logits, tokens), mask).loss

    def torchs(logits):
        labels = torch.where(mask, tokens, -100)
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100
        )

    (loss,), (gradient,) = outputs_and_gradients(ours, logits)
    (expected,), (expected_gradient,) = outputs_and_gradients(torchs, logits)
    assert_close(loss, expected, FP64)
    assert_close(gradient, expected_gradient, FP64)


def test_sft_loss_gradient():
    # likelier is better, each real token alike
    logprobs = -f64([1.0, 2.0, 3.0], [1.0, 9.0, 9.0]).requires_grad_()
    result = sft_loss(logprobs, RAGGED)
    assert_nothing_but_the_loss_carries_gradient(result)
    (gradient,) = torch.autograd.grad(result.loss, logprobs)
    assert_close(gradient, [[-0.25, -0.25, -0.25], [-0.25, 0.0, 0.0]], EXACT)
    assert torch.autograd.gradcheck(lambda x: sft_loss(x, RAGGED).loss, (logprobs,))


def test_sft_loss_errors():
    with pytest.raises(ValueError, match="0 real token"):
        sft_loss(torch.zeros(2, 3), torch.zeros(2, 3).bool())
    with pytest.raises(ValueError, match=r"\(2, 1\)"):
        sft_loss(torch.zeros(2, 1), RAGGED)


# pairwise_reward_loss


@pytest.mark.eq("reward")
def test_pairwise_reward_loss_closed():
    # differences ln 3, 0, -ln 3: sigmoid 3/4, 1/2, 1/4; losses ln(4/3), ln 2, ln 4;
    # their sum ln(32/3) = 5 ln 2 - ln 3
    chosen, rejected = f64(LN3 + 1, 5, 0), f64(1, 5, LN3)
    result = pairwise_reward_loss(chosen, rejected, margin=None, center_coef=0.0)
    assert_close(result.loss, (5 * LN2 - LN3) / 3, FP64)
    assert result.count == 3
    assert_close(result.accuracy, 1 / 3, EXACT)  # a tie is not right
    assert_close(result.ties, 1 / 3, EXACT)
    assert_close(result.margin, 0.0, FP64)


@pytest.mark.eq("reward")
def test_pairwise_reward_loss_closed_margin():
    # difference ln 3 less the margin ln 3 is 0; difference 0 less the margin -ln 3 is ln 3
    result = pairwise_reward_loss(f64(LN3, 2), f64(0, 2), margin=f64(LN3, -LN3), center_coef=0.0)
    assert_close(result.loss, (LN2 + 2 * LN2 - LN3) / 2, FP64)
    # what is logged compares the scores themselves
    assert_close(result.accuracy, 0.5, EXACT)
    assert_close(result.ties, 0.5, EXACT)
    assert_close(result.margin, LN3 / 2, FP64)


@pytest.mark.eq("reward")
def test_pairwise_reward_loss_closed_centre():
    # ln 2 each, plus 0.01 (1 + 1)^2 and 0.01 (-2 - 2)^2: mean of 0.04 and 0.16
    scores = f64(1, -2)
    result = pairwise_reward_loss(scores, scores, margin=None, center_coef=0.01)
    assert_close(result.loss, LN2 + 0.1, FP64)


@pytest.mark.eq("reward")
@given(tensors(3), st.booleans())
def test_pairwise_reward_loss_closed_equality(scores, with_margin):
    margin = torch.zeros(3, dtype=torch.float64) if with_margin else None
    result = pairwise_reward_loss(scores, scores, margin=margin, center_coef=0.0)
    assert_close(result.loss, LN2, FP64)


@pytest.mark.eq("reward")
@given(tensors(4), tensors(4), tensors(4), st.floats(0, 1))
def test_pairwise_reward_loss_definition(chosen, rejected, margin, center_coef):
    triples = list(zip(chosen.tolist(), rejected.tolist(), margin.tolist(), strict=True))
    losses = [math.log(1 + math.exp(r + m - c)) + center_coef * (c + r) ** 2 for c, r, m in triples]
    result = pairwise_reward_loss(chosen, rejected, margin=margin, center_coef=center_coef)
    assert_close(result.loss, sum(losses) / 4, FP64)
    assert_close(result.accuracy, sum(c > r for c, r, _ in triples) / 4, EXACT)
    assert_close(result.ties, sum(c == r for c, r, _ in triples) / 4, EXACT)
    assert_close(result.margin, sum(c - r for c, r, _ in triples) / 4, FP64)


def test_pairwise_reward_loss_property_extreme():
    # -log sigmoid(-1000) is 1000; log(1 + exp(1000)) would be infinite
    zero = torch.zeros(1)
    for difference, loss in ((1000.0, 0.0), (-1000.0, 1000.0)):
        result = pairwise_reward_loss(zero + difference, zero, margin=None, center_coef=0.0)
        assert_close(result.loss, loss, EXACT)


def test_pairwise_reward_loss_gradient():
    chosen, rejected = f64(0.5, -1.0).requires_grad_(), f64(0.0, 0.3).requires_grad_()
    result = pairwise_reward_loss(chosen, rejected, margin=f64(0.1, 0.2), center_coef=0.0)
    assert_nothing_but_the_loss_carries_gradient(result)
    up, down = torch.autograd.grad(result.loss, (chosen, rejected))
    assert bool((up < 0).all())  # a higher chosen score lowers the loss
    assert_close(down, -up, EXACT)  # only the difference counts
    assert torch.autograd.gradcheck(
        lambda c, r: reward_loss(c, r, f64(0.1, 0.2)).loss, (chosen, rejected)
    )
    # at equality, -sigmoid(0) / n
    _, gradients = outputs_and_gradients(
        lambda c, r: pairwise_reward_loss(c, r, margin=None, center_coef=0.0).loss,
        f64(1, 2), f64(1, 2),
    )  # fmt: skip
    assert_close(gradients[0], [-0.25, -0.25], FP64)
    # the centring alone pulls both towards 0
    _, gradients = outputs_and_gradients(
        lambda c, r: pairwise_reward_loss(c, r, margin=None, center_coef=0.5).loss,
        f64(3), f64(3),
    )  # fmt: skip
    assert_close(sum(gradients), [2 * 0.5 * 2 * 6], FP64)


@pytest.mark.parametrize("margin", [None, torch.zeros(2)])
def test_pairwise_reward_loss_errors_shapes(margin):
    with pytest.raises(ValueError, match=r"\(2,\) and \(1,\)"):
        pairwise_reward_loss(torch.zeros(2), torch.zeros(1), margin=margin, center_coef=0.0)
    with pytest.raises(ValueError, match=r"\(2,\) and \(2, 1\)"):
        pairwise_reward_loss(
            torch.zeros(2), torch.zeros(2), margin=torch.zeros(2, 1), center_coef=0.0
        )


# ppo_policy_loss


@pytest.mark.eq("ppo_policy")
@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope", "clipped"),
    [
        (1, 1.5, -1.2, 0.0, 1.0),  # better than 1 + clip: earns no more than at 1.2
        (1, 1.1, -1.1, -1.1, 0.0),  # inside: -A ratio, and that is its slope in log ratio
        (1, 0.5, -0.5, -0.5, 0.0),  # a deterioration is felt in full
        (-1, 1.5, 1.5, 1.5, 0.0),  # so is this one
        (-1, 1.1, 1.1, 1.1, 0.0),
        (-1, 0.5, 0.8, 0.0, 1.0),  # better than 1 - clip: earns no more than at 0.8
    ],
)
def test_ppo_policy_loss_closed_cases(advantage, ratio, loss, slope, clipped):
    new = (ratio * ONE).log().requires_grad_()
    result = policy_loss(new, 0 * ONE, advantage * ONE, ONE.bool())
    (gradient,) = torch.autograd.grad(result.loss, new)
    assert_close(result.loss, loss, FP64)
    assert_close(gradient, [[slope]], FP64)
    assert_close(result.clip_fraction, clipped, EXACT)


@pytest.mark.eq("ppo_policy")
def test_ppo_policy_loss_closed():
    # ratios 2, 1, 1/2 | 1, advantages 1, 3, -2 | 5:
    # losses -1.2 (clipped), -3, 2 * 0.8 = 1.6 (clipped) | -5; mean -7.6 / 4 = -1.9
    logprobs = f64([-1.0, -2.0, -3.0], [-1.0, 99.0, 99.0])
    new = logprobs + LN2 * f64([1, 0, -1], [0, 99, 99])
    result = policy_loss(new, logprobs, f64([1, 3, -2], [5, 99, 99]), RAGGED)
    assert_close(result.loss, -1.9, FP64)
    assert result.count == 4
    assert_close(result.clip_fraction, 0.5, EXACT)


@pytest.mark.eq("ppo_policy")
def test_ppo_policy_loss_closed_statistics():
    # log ratios 2 ln 2, -ln 2, 0 | -ln 2, so ratios 4, 1/2, 1 | 1/2
    # k1 = -log ratio: mean (-2 + 1 + 0 + 1) ln 2 / 4 = 0
    # k3 = ratio - 1 - log ratio: 3 - 2 ln 2, twice -1/2 + ln 2, 0; mean 2/4
    # ratio: mean 6/4, largest 4
    new = LN2 * f64([2, -1, 0], [-1, 99, 99])
    result = policy_loss(new, 0 * new, 0 * new, RAGGED)
    assert_close(result.k1, 0.0, FP64)
    assert_close(result.k3, 0.5, FP64)
    assert_close(result.ratio, 1.5, FP64)
    assert_close(result.ratio_max, 4.0, FP64)


@pytest.mark.eq("ppo_policy")
def test_ppo_policy_loss_closed_largest_ratio():
    # of the real tokens: padding, whatever fills it, has no ratio
    new = LN2 * f64([-1, -2, -1], [-1, 99, 99])
    assert_close(policy_loss(new, 0 * new, 0 * new, RAGGED).ratio_max, 0.5, FP64)


@pytest.mark.eq("ppo_policy")
@given(ragged_batches(3), st.floats(0.01, 0.9))
def test_ppo_policy_loss_definition(batch, clip):
    # maximise min(ratio A, clipped ratio A), the cases of the clip spelt out
    new, old, advantages, mask = batch
    losses, ratios, clipped = [], [], 0
    for new_logprob, logprob, advantage in real_cells(new, old, advantages, mask):
        ratio = math.exp(new_logprob) / math.exp(logprob)
        if ratio > 1 + clip:
            near = 1 + clip
        elif ratio < 1 - clip:
            near = 1 - clip
        else:
            near = ratio
        losses.append(-min(ratio * advantage, near * advantage))
        clipped += near * advantage < ratio * advantage
        ratios.append(ratio)
    n = len(losses)
    result = ppo_policy_loss(new, old, advantages, mask, clip=clip)
    assert_close(result.loss, sum(losses) / n, FP64)
    assert result.count == n
    assert_close(result.clip_fraction, clipped / n, FP64)
    assert_close(result.k1, sum(-math.log(r) for r in ratios) / n, FP64)
    assert_close(result.k3, sum(r - 1 - math.log(r) for r in ratios) / n, FP64)
    assert_close(result.ratio, sum(ratios) / n, FP64)
    assert_close(result.ratio_max, max(ratios), FP64)


@pytest.mark.eq("ppo_policy")
def test_ppo_policy_loss_definition_kl():
    # four tokens 0, 0, 1, 2 are the distribution 1/2, 1/4, 1/4 itself: their mean k1 and k3 are
    # its KL to the new policy 1/8, 1/8, 3/4 = 1/2 ln 4 + 1/4 ln 2 - 1/4 ln 3
    old, new = f64([0.5, 0.25, 0.25]).log(), f64([0.125, 0.125, 0.75]).log()
    tokens = torch.tensor([0, 0, 1, 2])
    result = policy_loss(
        new[:, tokens], old[:, tokens], 0 * old[:, tokens], ONE.bool().expand(1, 4)
    )
    assert_close(result.k1, 1.25 * LN2 - 0.25 * LN3, FP64)
    assert_close(result.k3, 1.25 * LN2 - 0.25 * LN3, FP64)


@pytest.mark.eq("ppo_policy")
@given(tensors(3, 4, 5), ragged_batches(1, rows=3), st.data())
def test_ppo_policy_loss_definition_reinforce(logits, batch, data):
    # at ratio 1: -A grad log pi / n, where d log pi(y) / d z_v = [v = y] - pi(v)
    advantages, mask = batch[0][:, :4], batch[1][:, :4]
    logits = logits[:, : mask.shape[1]]
    tokens = torch.tensor(
        data.draw(st.lists(st.integers(0, 4), min_size=mask.numel(), max_size=mask.numel()))
    ).reshape(mask.shape)

    def loss(logits):
        new_logprobs = token_logprobs(logits, tokens)
        return policy_loss(new_logprobs, new_logprobs.detach(), advantages, mask).loss

    _, (gradient,) = outputs_and_gradients(loss, logits)
    slope = torch.eye(5, dtype=torch.float64)[tokens] - logits.softmax(-1)
    expected = -(advantages * mask)[..., None] * slope / mask.sum()
    assert_close(gradient, expected, FP64)


@given(ragged_batches(3))
def test_ppo_policy_loss_property_pessimistic(batch):
    # the clip never promises more than the ratio does, and a wide one promises the same
    new, old, advantages, mask = batch
    plain = -sum(math.exp(n - o) * a for n, o, a in real_cells(*batch)) / int(mask.sum())
    assert policy_loss(*batch).loss.item() >= plain - FP64 * abs(plain)
    wide = ppo_policy_loss(new, old, advantages, mask, clip=1e6)
    assert_close(wide.loss, plain, FP64)
    assert wide.clip_fraction == 0


def test_ppo_policy_loss_gradient():
    new = f64([0.1, -0.1, 0.5], [-0.5, 0.0, 0.0]).requires_grad_()
    old = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    advantages = f64([1, -2, 1], [2, 9, 9]).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, old, advantages, RAGGED).loss, (new,))
    result = policy_loss(new, old, advantages, RAGGED)
    assert_nothing_but_the_loss_carries_gradient(result)
    result.loss.backward()
    assert old.grad is None
    assert advantages.grad is None
    # a good token is made likelier, a bad one less likely, a clipped one is left alone
    assert new.grad.sign().tolist() == [[-1, 1, 0], [-1, 0, 0]]


@pytest.mark.parametrize("wrong", range(4))
@pytest.mark.parametrize("loss", [policy_loss, value_loss])
def test_ppo_errors_shapes(loss, wrong):
    inputs = [torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), RAGGED]
    inputs[wrong] = inputs[wrong][:, :1]  # would broadcast
    with pytest.raises(ValueError, match=r"\(2, 1\)"):
        loss(*inputs)


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
def test_ppo_errors_no_real_token(loss):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="0 real token"):
        loss(x, x, x, x.bool())


@pytest.mark.parametrize(("loss", "expected"), [(policy_loss, -2.0), (value_loss, 2.0)])
@pytest.mark.parametrize("poisoned", range(3))
def test_ppo_gradient_nan_in_the_padding(loss, expected, poisoned):
    # policy: ratio 1 and advantage 2; value: (0 - 2)^2 / 2. Both have the slope -2
    inputs = [f64([0.0, 0.0]), f64([0.0, 0.0]), f64([2.0, 0.0])]
    inputs[poisoned][0, 1] = NAN
    inputs[0].requires_grad_()
    found = loss(*inputs, torch.tensor([[True, False]])).loss
    (gradient,) = torch.autograd.grad(found, inputs[0])
    assert_close(found, expected, EXACT)
    assert_close(gradient, [[-2.0, 0.0]], EXACT)


# ppo_value_loss


@pytest.mark.eq("ppo_value")
@pytest.mark.parametrize(
    ("new_value", "target", "loss", "slope", "clipped"),
    [
        # V = 0, clip = 0.2; the loss is half a square, its slope V_new - R where it is felt
        (1.0, 2.0, 1.62, 0.0, 1.0),  # too far towards R: (0.2 - 2)^2 / 2, no slope
        (1.0, -1.0, 2.0, 2.0, 0.0),  # too far away from R: felt in full
        (1.0, 0.5, 0.125, 0.5, 0.0),  # past R, and farther from it than 0.2 is: in full
        (0.7, 0.5, 0.045, 0.0, 1.0),  # past R, but nearer than 0.2: (0.2 - 0.5)^2 / 2
        (0.1, 2.0, 1.805, -1.9, 0.0),  # inside, towards
        (0.1, -1.0, 0.605, 1.1, 0.0),  # inside, away
        (-1.0, -2.0, 1.62, 0.0, 1.0),  # and the same downwards
        (-1.0, 1.0, 2.0, -2.0, 0.0),
    ],
)
@pytest.mark.parametrize("shift", [0.0, 3.0])  # only differences count
def test_ppo_value_loss_closed_cases(new_value, target, loss, slope, clipped, shift):
    new = ((new_value + shift) * ONE).requires_grad_()
    result = ppo_value_loss(new, shift * ONE, (target + shift) * ONE, ONE.bool(), clip=0.2)
    (gradient,) = torch.autograd.grad(result.loss, new)
    assert_close(result.loss, loss, FP64)
    assert_close(gradient, [[slope]], FP64)
    assert_close(result.clip_fraction, clipped, EXACT)


@pytest.mark.eq("ppo_value")
def test_ppo_value_loss_closed():
    # clip 0.5. V 1, 2, 0 | 4; V_new 2, 2.25, -1 | 4; R 3, 2, 1 | 2
    # row 0: max((2-3)^2, (1.5-3)^2) = 2.25 (clipped); 0.25^2 = 0.0625;
    #        max((-1-1)^2, (-0.5-1)^2) = 4; row 1: 4.  Half the mean: 10.3125 / 8
    new = f64([2, 2.25, -1], [4, 99, 99])
    result = value_loss(new, f64([1, 2, 0], [4, 99, 0]), f64([3, 2, 1], [2, 0, 0]), RAGGED)
    assert_close(result.loss, 10.3125 / 8, FP64)
    assert result.count == 4
    assert_close(result.clip_fraction, 0.25, EXACT)


@pytest.mark.eq("ppo_value")
@given(ragged_batches(3), st.floats(0.01, 2))
def test_ppo_value_loss_definition(batch, clip):
    new, old, returns, mask = batch
    losses, clipped = [], 0
    for new_value, value, target in real_cells(*batch):
        if new_value > value + clip:
            near = value + clip
        elif new_value < value - clip:
            near = value - clip
        else:
            near = new_value
        losses.append(max(abs(new_value - target), abs(near - target)) ** 2 / 2)
        clipped += (near - target) ** 2 > (new_value - target) ** 2  # of tiny ones both are 0
    result = ppo_value_loss(new, old, returns, mask, clip=clip)
    assert_close(result.loss, sum(losses) / len(losses), FP64)
    assert result.count == len(losses)
    assert_close(result.clip_fraction, clipped / len(losses), FP64)


@pytest.mark.parametrize("clip", [20.0, INF])
def test_ppo_value_loss_property_inside(clip):
    # no value moved as far as the clip: none is clipped, not even by rounding
    rng = torch.Generator().manual_seed(0)
    new, old, returns = torch.randn(3, 10, 100, generator=rng)
    mask = torch.ones(10, 100, dtype=torch.bool)
    assert ppo_value_loss(new, old, returns, mask, clip=clip).clip_fraction == 0


@given(ragged_batches(3))
def test_ppo_value_loss_property_no_limit(batch):
    # without a limit: half the mean squared error
    new, old, returns, mask = batch
    result = ppo_value_loss(new, old, returns, mask, clip=INF)
    assert_close(result.loss, torch.nn.functional.mse_loss(new[mask], returns[mask]) / 2, FP64)


def test_ppo_value_loss_gradient():
    new = f64([0.3, -0.3, 2.0], [1.0, 0.0, 0.0]).requires_grad_()
    old = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    returns = f64([1, -2, 3], [0, 9, 9]).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: value_loss(x, old, returns, RAGGED).loss, (new,))
    result = value_loss(new, old, returns, RAGGED)
    assert_nothing_but_the_loss_carries_gradient(result)
    result.loss.backward()
    assert old.grad is None
    assert returns.grad is None
    # (V_new - R) / n, except where the clip already holds it
    assert_close(new.grad, [[-0.7 / 4, 1.7 / 4, 0.0], [0.25, 0.0, 0.0]], FP64)


@pytest.mark.parametrize("shape", [(0,), (2, 3), ()])
def test_pairwise_reward_loss_errors_pairs(shape):
    x = torch.zeros(shape)
    with pytest.raises(ValueError, match="one pair or more"):
        pairwise_reward_loss(x, x, margin=None, center_coef=0.1)
