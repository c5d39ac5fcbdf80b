"""The losses but those of DPO's kind. Each is a function of tensors and returns the loss first,
then its count.

All are computed in at least float32, whatever they are given.

`loss` is a mean, over real tokens or over pairs; `count` says over how many. A micro-batch is
backpropagated as ``loss * count / count_of_the_minibatch``, so that splitting a minibatch never
changes its gradient. What follows the count is worth logging and carries no gradient.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .kl import kl_estimate
from .logprobs import at_least_float32
from .masking import masked_mean


class SFTLoss(NamedTuple):
    """Mean negative log-likelihood of the response tokens, in nats, and their number."""

    loss: Tensor
    count: Tensor  # type: ignore[assignment]  # tuple.count is of no use here


class RewardLoss(NamedTuple):
    """Mean loss of the pairs and their number; share ranked right (a tie is wrong), share of
    ties, and mean margin."""

    loss: Tensor
    count: Tensor  # type: ignore[assignment]  # tuple.count is of no use here
    accuracy: Tensor
    ties: Tensor
    margin: Tensor


class PolicyLoss(NamedTuple):
    """Clipped surrogate over real tokens and their number; share of clipped tokens, mean k1 and
    k3 of rollout policy against new policy, mean and largest ratio."""

    loss: Tensor
    count: Tensor  # type: ignore[assignment]  # tuple.count is of no use here
    clip_fraction: Tensor
    k1: Tensor
    k3: Tensor
    ratio: Tensor
    ratio_max: Tensor


class GroupLoss(NamedTuple):
    """Clipped surrogate, a mean over responses or over tokens, and their number. Then for each
    response, ``(B,)``, what adds up to a mean of the same kind: share of clipped tokens, k1 and k3
    of rollout policy against new policy, ratio. Last the largest ratio of all."""

    loss: Tensor
    count: Tensor  # type: ignore[assignment]  # tuple.count is of no use here
    clip_fraction: Tensor
    update_k1: Tensor
    update_k3: Tensor
    ratio: Tensor
    ratio_max: Tensor


class ValueLoss(NamedTuple):
    """Half the clipped squared error over real tokens and their number; share of clipped ones."""

    loss: Tensor
    count: Tensor  # type: ignore[assignment]  # tuple.count is of no use here
    clip_fraction: Tensor


def sft_loss(logprobs: Tensor, mask: Tensor) -> SFTLoss:
    r"""Negative log-likelihood of the response tokens, EOS included.                      [eq:sft]

        L = -(1/n) sum_{b,t} m_bt log pi(y_bt | x_b, y_b<t)                        (1)

    Args:
        logprobs: of the response tokens. Shape ``(B, T)``.
        mask: True at real response tokens. Shape ``(B, T)``.

    Returns:
        `SFTLoss`; n is the count.

    Raises:
        ValueError: if the shapes differ or no token is real.

    Source: Ouyang et al. 2022, arXiv:2203.02155, section 3.5; trl ``SFTTrainer`` with
    ``completion_only_loss=True``.

    Example:
        >>> sft_loss(torch.tensor([[-1.0, -3.0, 9.0]]), torch.tensor([[True, True, False]])).loss
        tensor(2.)
    """
    return SFTLoss(-masked_mean(logprobs, mask), mask.sum())  # (1)


def pairwise_reward_loss(
    chosen_scores: Tensor,  # (B,)
    rejected_scores: Tensor,  # (B,)
    *,
    margin: Tensor | None,  # (B,)
    center_coef: float,
) -> RewardLoss:
    r"""The Bradley-Terry loss of a reward model.                                       [eq:reward]

        L = -log sigmoid(r_chosen - r_rejected - margin)                           (1)
          + center_coef * (r_chosen + r_rejected)^2                                (2)

    averaged over pairs. (2) pulls the scores, of which (1) sees only differences, towards 0.

    Args:
        chosen_scores: r_chosen. Shape ``(B,)``.
        rejected_scores: r_rejected. Shape ``(B,)``.
        margin: how much better the chosen one should be, or None for 0. Shape ``(B,)``.
        center_coef: weight of (2); 0 leaves it out.

    Returns:
        `RewardLoss`.

    Raises:
        ValueError: if the shapes differ or there is no pair.

    Source: Ouyang et al. 2022, eq. 1; margin: Touvron et al. 2023, arXiv:2307.09288, eq. 2;
    centring: Eisenstein et al. 2023, arXiv:2312.09244; trl ``RewardTrainer.compute_loss``.

    Example: equal scores give log 2.
        >>> zero = torch.zeros(1)
        >>> pairwise_reward_loss(zero, zero, margin=None, center_coef=0.0).loss
        tensor(0.6931)
    """
    require_pairs(chosen_scores, rejected_scores, *([] if margin is None else [margin]))
    chosen_scores = at_least_float32(chosen_scores)  # and with it all that follows
    difference = chosen_scores - rejected_scores  # (B,)
    loss = -logsigmoid(difference if margin is None else difference - margin)  # (1)
    if center_coef:
        loss = loss + center_coef * (chosen_scores + rejected_scores).square()  # (2)
    difference = difference.detach()
    return RewardLoss(
        loss.mean(),
        torch.tensor(len(loss), device=loss.device),
        accuracy=(difference > 0).to(loss.dtype).mean(),
        ties=(difference == 0).to(loss.dtype).mean(),
        margin=difference.mean(),
    )


def ppo_policy_loss(
    new_logprobs: Tensor,  # (B, T)
    logprobs: Tensor,  # (B, T)
    advantages: Tensor,  # (B, T)
    mask: Tensor,  # (B, T) bool
    *,
    clip: float,
) -> PolicyLoss:
    r"""PPO's clipped surrogate objective, as a loss.                               [eq:ppo_policy]

        ratio = exp(new_logprobs - logprobs)                                       (1)
        L = mean of max(-A * ratio, -A * clip(ratio, 1 - clip, 1 + clip))          (2)

    The larger of two losses is the pessimistic one: an improvement beyond the clip earns nothing,
    a deterioration is felt in full. Within the clip both are equal, and at ratio 1 the gradient is
    REINFORCE's with the advantage A.

    Args:
        new_logprobs: under the policy in training; carries gradient. Shape ``(B, T)``.
        logprobs: under the policy that sampled. Shape ``(B, T)``.
        advantages: A. Shape ``(B, T)``.
        mask: True at real response tokens. Shape ``(B, T)``.
        clip: half-width of the trusted interval around 1.

    Returns:
        `PolicyLoss`.

    Raises:
        ValueError: if the shapes differ or no token is real.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; trl 0.11.3 ``PPOTrainer.loss``.

    Example: a ratio of e^0.5 = 1.65 is clipped at 1.2 where the advantage is 1.5.
        >>> new, old, one = torch.tensor([[-0.5]]), torch.tensor([[-1.0]]), torch.ones(1, 1)
        >>> ppo_policy_loss(new, old, 1.5 * one, one.bool(), clip=0.2).loss
        tensor(-1.8000)
    """
    _same_shape(new_logprobs, logprobs, advantages, mask)
    log_ratio = torch.where(mask, at_least_float32(new_logprobs) - logprobs.detach(), 0)
    advantages = torch.where(mask, at_least_float32(advantages.detach()), 0)
    ratio = log_ratio.exp()  # (1)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss = masked_mean(torch.maximum(unclipped, clipped), mask)  # (2)
    with torch.no_grad():
        k3 = kl_estimate(-log_ratio, torch.zeros_like(log_ratio), kind="k3")
        return PolicyLoss(
            loss,
            mask.sum(),
            clip_fraction=masked_mean((clipped > unclipped).to(loss.dtype), mask),
            k1=masked_mean(-log_ratio, mask),
            k3=masked_mean(k3, mask),
            ratio=masked_mean(ratio, mask),
            ratio_max=ratio[mask].max(),
        )


def grpo_loss(
    new_logprobs: Tensor,  # (B, T)
    logprobs: Tensor,  # (B, T)
    ref_logprobs: Tensor,  # (B, T)
    advantages: Tensor,  # (B,)
    mask: Tensor,  # (B, T) bool
    *,
    clip: float,
    clip_high: float,
    kl_coef: float,
    ratio_level: Literal["token", "sequence"],
    loss_mean: Literal["sequence", "token", "constant"],
    max_new_tokens: int,
) -> GroupLoss:
    r"""The clipped objective of GRPO, and of what followed it, as a loss.                [eq:grpo]

    With n_i the real tokens of response i:

        ratio_it = exp(new_logprobs - logprobs)               ratio_level="token"  (1)
        ratio_i  = exp(mean over t of the same)            ratio_level="sequence"  (2)
        l_it = max(-A_i * ratio, -A_i * clip(ratio, 1 - clip, 1 + clip_high))      (3)
             + kl_coef * k3_it                                                     (4)
        L = 1/B sum_i 1/n_i sum_t l_it                       loss_mean="sequence"  (5)
            sum_it l_it / sum_i n_i                             loss_mean="token"  (6)
            sum_it l_it / (B * max_new_tokens)               loss_mean="constant"  (7)

    (5) gives each token of a long response less weight than one of a short response, so that a bad
    response costs less if it is long; (6) and (7) weigh all tokens alike. (4) estimates
    KL(policy || reference), see `kl_estimate`; on average its gradient is that of the other one,
    KL(reference || policy), of each next token.

    Args:
        new_logprobs: under the policy in training; carries gradient. Shape ``(B, T)``.
        logprobs: under the policy that sampled. Shape ``(B, T)``.
        ref_logprobs: under the reference; read only if `kl_coef` is not 0. Shape ``(B, T)``.
        advantages: A, one for each response. Shape ``(B,)``.
        mask: True at the tokens that are learned from. A row may have none; it still counts in B.
            Shape ``(B, T)``.
        clip: how far below 1 the ratio is trusted.
        clip_high: how far above 1.
        kl_coef: weight of (4); 0 leaves it out.
        ratio_level, loss_mean: as above.
        max_new_tokens: in (7).

    Returns:
        `GroupLoss`; the count is of responses for (5) and (7), of tokens for (6).

    Raises:
        ValueError: if the shapes differ.

    Source: Shao et al. 2024, arXiv:2402.03300, eq. 3 and 4: (1), (3), (4), (5); Yu et al. 2025
    (DAPO), arXiv:2503.14476, eq. 8: (6) and `clip_high`; Liu et al. 2025 (Dr. GRPO),
    arXiv:2503.20783, section 3.2: (7); Zheng et al. 2025 (GSPO), arXiv:2507.18071, eq. 7: (2); trl
    ``GRPOTrainer`` with ``loss_type`` "grpo", "dapo" and "dr_grpo".

    Example: two responses of one and of three tokens, on policy; the long one was bad.
        >>> logprobs, mask = torch.zeros(2, 3), torch.tensor([[True, False, False], [True] * 3])
        >>> options = {"clip": 0.2, "clip_high": 0.2, "kl_coef": 0.0, "ratio_level": "token"}
        >>> inputs = logprobs, logprobs, logprobs, torch.tensor([1.0, -1.0]), mask
        >>> grpo_loss(*inputs, **options, loss_mean="sequence", max_new_tokens=4).loss
        tensor(0.)
        >>> grpo_loss(*inputs, **options, loss_mean="token", max_new_tokens=4).loss  # (3 - 1) / 4
        tensor(0.5000)
        >>> grpo_loss(*inputs, **options, loss_mean="constant", max_new_tokens=4).loss
        tensor(0.2500)
    """
    _same_shape(new_logprobs, logprobs, ref_logprobs, mask)
    _same_shape(mask[:, 0], advantages)
    log_ratio = torch.where(mask, at_least_float32(new_logprobs) - logprobs.detach(), 0)
    lengths = mask.sum(1)  # (B,)
    ratio = log_ratio.exp()  # (1)
    if ratio_level == "sequence":
        ratio = (log_ratio.sum(1) / lengths.clamp(min=1)).exp()[:, None].expand_as(mask)  # (2)
    per_token, clipped = _clipped_surrogate(ratio, advantages[:, None], clip, clip_high)  # (3)
    if kl_coef:
        new, ref = (torch.where(mask, x, 0) for x in (new_logprobs, ref_logprobs.detach()))
        per_token = per_token + kl_coef * kl_estimate(new, ref, kind="k3")  # (4)
    sums, count = torch.where(mask, per_token, 0).sum(1), lengths.new_tensor(len(mask))  # (B,)
    if loss_mean == "sequence":
        loss = (sums / lengths.clamp(min=1)).mean()  # (5)
    elif loss_mean == "token":
        loss, count = sums.sum() / lengths.sum().clamp(min=1), lengths.sum()  # (6)
    else:
        loss = sums.mean() / max_new_tokens  # (7)
    return _group_loss(loss, count, log_ratio, ratio, clipped, mask, per_token=loss_mean == "token")


def rloo_loss(
    new_logprobs: Tensor,  # (B, T)
    logprobs: Tensor,  # (B, T)
    advantages: Tensor,  # (B,)
    mask: Tensor,  # (B, T) bool
    *,
    clip: float,
    clip_high: float,
) -> GroupLoss:
    r"""REINFORCE over whole responses, with PPO's clipping for later passes.             [eq:rloo]

    A response is one action, whose log-probability is the sum over its tokens:

        ratio_i = exp(sum over t of new_logprobs - logprobs)                       (1)
        L = 1/B sum_i max(-A_i * ratio_i, -A_i * clip(ratio_i, 1 - clip, 1 + clip_high))  (2)

    At ratio 1 the gradient is that of -A_i * log pi(y_i|x), REINFORCE's.

    Args:
        new_logprobs: under the policy in training; carries gradient. Shape ``(B, T)``.
        logprobs: under the policy that sampled. Shape ``(B, T)``.
        advantages: A, one for each response. Shape ``(B,)``.
        mask: True at real response tokens. Shape ``(B, T)``.
        clip: how far below 1 the ratio is trusted.
        clip_high: how far above 1.

    Returns:
        `GroupLoss`; the count is of responses.

    Raises:
        ValueError: if the shapes differ.

    Source: Ahmadian et al. 2024, arXiv:2402.14740, eq. 7; the clipping is trl's ``RLOOTrainer``'s.

    Example: two tokens, each e^0.2 times as likely as before: e^0.4 = 1.49 is clipped at 1.2.
        >>> new, old, mask = torch.full((1, 2), -0.8), -torch.ones(1, 2), torch.ones(1, 2).bool()
        >>> rloo_loss(new, old, torch.tensor([2.0]), mask, clip=0.2, clip_high=0.2).loss
        tensor(-2.4000)
    """
    _same_shape(new_logprobs, logprobs, mask)
    _same_shape(mask[:, 0], advantages)
    log_ratio = torch.where(mask, at_least_float32(new_logprobs) - logprobs.detach(), 0)
    ratio = log_ratio.sum(1).exp()  # (1)
    per_response, clipped = _clipped_surrogate(ratio, advantages, clip, clip_high)  # (B,)
    loss, count = per_response.mean(), torch.tensor(len(mask), device=mask.device)  # (2)
    ratio, clipped = (x[:, None].expand_as(mask) for x in (ratio, clipped))
    return _group_loss(loss, count, log_ratio, ratio, clipped, mask, per_token=False)


def _clipped_surrogate(
    ratio: Tensor, advantages: Tensor, clip: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """The pessimistic loss of each ratio, and where the clip holds its gradient back."""
    advantages = at_least_float32(advantages.detach())
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip_high)
    return torch.maximum(unclipped, clipped), clipped > unclipped


@torch.no_grad()
def _group_loss(
    loss: Tensor,
    count: Tensor,
    log_ratio: Tensor,
    ratio: Tensor,
    clipped: Tensor,
    mask: Tensor,
    *,
    per_token: bool,
) -> GroupLoss:
    """The loss beside what is ``(B, T)``, summed up so that it is a mean over the count too."""
    parts = 1 if per_token else mask.sum(1).clamp(min=1)

    def of_each(x: Tensor) -> Tensor:  # (B, T) -> (B,)
        return torch.where(mask, x, 0).sum(1) / parts

    k3 = kl_estimate(-log_ratio, torch.zeros_like(log_ratio), kind="k3")
    return GroupLoss(
        loss,
        count,
        clip_fraction=of_each(clipped.to(k3.dtype)),
        update_k1=of_each(-log_ratio),
        update_k3=of_each(k3),
        ratio=of_each(ratio),
        ratio_max=torch.where(mask, ratio, 0).max(),
    )


def ppo_value_loss(
    new_values: Tensor,  # (B, T)
    values: Tensor,  # (B, T)
    returns: Tensor,  # (B, T)
    mask: Tensor,  # (B, T) bool
    *,
    clip: float,
) -> ValueLoss:
    r"""The value head's clipped squared error.                                      [eq:ppo_value]

        V_near = clip(V_new, V - clip, V + clip)                                   (1)
        L = mean of 1/2 max((V_new - R)^2, (V_near - R)^2)                         (2)

    Args:
        new_values: V_new; carries gradient. Shape ``(B, T)``.
        values: V at rollout time. Shape ``(B, T)``.
        returns: R. Shape ``(B, T)``.
        mask: True at real response tokens. Shape ``(B, T)``.
        clip: distance from V beyond which a value that moves towards R earns nothing more; infinity
            for no limit.

    Returns:
        `ValueLoss`, the factor 1/2 included.

    Raises:
        ValueError: if the shapes differ or no token is real.

    Source: Ziegler et al. 2019's code, after OpenAI baselines ``ppo2``; trl 0.11.3
    ``PPOTrainer.loss``.

    Example: V moved from 0.5 to 0.8, further than 0.2, towards 0.9: (0.7 - 0.9)^2 / 2.
        >>> new, old, returns = torch.tensor([[0.8]]), torch.tensor([[0.5]]), torch.tensor([[0.9]])
        >>> ppo_value_loss(new, old, returns, torch.tensor([[True]]), clip=0.2).loss
        tensor(0.0200)
    """
    _same_shape(new_values, values, returns, mask)
    new_values = torch.where(mask, at_least_float32(new_values), 0)
    values = torch.where(mask, at_least_float32(values.detach()), 0)
    returns = torch.where(mask, at_least_float32(returns.detach()), 0)
    near_values = new_values.clamp(values - clip, values + clip)  # (1)
    error = (new_values - returns).square()
    near_error = (near_values - returns).square()
    loss = masked_mean(torch.maximum(error, near_error), mask) / 2  # (2)
    clip_fraction = masked_mean((near_error > error).to(loss.dtype), mask)
    return ValueLoss(loss, mask.sum(), clip_fraction)


def require_pairs(first: Tensor, *others: Tensor) -> None:
    """Raise `ValueError` unless each tensor has one number for each pair, ``(B,)``."""
    _same_shape(first, *others)
    if first.dim() != 1 or len(first) == 0:
        raise ValueError(f"one number for each of one pair or more, not shape {tuple(first.shape)}")


def _same_shape(first: Tensor, *others: Tensor) -> None:
    for other in others:
        if other.shape != first.shape:
            raise ValueError(f"shapes differ: {tuple(first.shape)} and {tuple(other.shape)}")
