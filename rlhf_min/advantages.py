"""How much better than expected: a token beside the values, or a response beside its group."""

from typing import Literal

import torch
from torch import Tensor

from .logprobs import at_least_float32
from .masking import require_right_padded


def gae(
    rewards: Tensor,  # (B, T)
    values: Tensor,  # (B, T)
    mask: Tensor,  # (B, T) bool
    *,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    r"""Generalized advantage estimation over response tokens.                             [eq:gae]

    A row is one response; it ends at its last real token, be that EOS or where it was cut, and V
    and A are 0 beyond that:

        delta_t = r_t + gamma * V_{t+1} - V_t                                      (1)
        A_t     = delta_t + gamma * lam * A_{t+1}                                  (2)
        R_t     = A_t + V_t                                                        (3)

    ``lam = 0`` keeps the one-step error, of low variance but biased by V; ``lam = 1`` gives the
    discounted sum of rewards minus V, unbiased but of high variance.

    Args:
        rewards: shaped rewards (`shape_rewards`). Shape ``(B, T)``.
        values: the value head's V_t, read before token t was sampled. Shape ``(B, T)``.
        mask: True at real response tokens; rows are right-padded. Shape ``(B, T)``.
        gamma: discount in [0, 1]; 1 is usual for responses.
        lam: GAE's lambda in [0, 1].

    Returns:
        ``(advantages, returns)``, each ``(B, T)``, in at least float32, zero at padding, without
        gradient and not whitened: whitening is a line of its own where the rollout is judged.

    Raises:
        ValueError: if the shapes differ or a mask row is not right-padded.

    Source: Schulman et al. 2016, arXiv:1506.02438, eq. 16; (2) is its sum, as a recursion; (3) is
    the TD(lambda) return of OpenAI baselines, where the paper fits V to the discounted rewards;
    trl 0.11.3 ``PPOTrainer.compute_advantages`` before its whitening.

    Example: four real tokens and one pad, whose 9s must not matter.
        >>> r = torch.tensor([[-0.1, 0.1, -0.1, 0.9, 9.0]])
        >>> v = torch.tensor([[0.5, 0.4, 0.4, 0.5, 9.0]])
        >>> m = torch.tensor([[True, True, True, True, False]])
        >>> gae(r, v, m, gamma=1.0, lam=0.5)[0]
        tensor([[-0.1000,  0.2000,  0.2000,  0.4000,  0.0000]])
        >>> gae(r, v, m, gamma=1.0, lam=1.0)[0]  # the rewards still to come, minus V
        tensor([[0.3000, 0.5000, 0.4000, 0.4000, 0.0000]])
    """
    if not rewards.shape == values.shape == mask.shape:
        shapes = [tuple(x.shape) for x in (rewards, values, mask)]
        raise ValueError(f"rewards, values and mask differ in shape: {shapes}")
    require_right_padded(mask)
    rewards = torch.where(mask, at_least_float32(rewards.detach()), 0)
    values = torch.where(mask, at_least_float32(values.detach()), 0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]  # (1)
        next_advantage = delta + gamma * lam * next_advantage  # (2); still 0 in the padding
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values  # (3)


def rloo_advantages(
    rewards: Tensor,  # (B,)
    *,
    group_size: int,
) -> Tensor:
    r"""Leave one out: each response beside the others of its group.          [eq:rloo_advantages]

    With R_1 ... R_G the rewards of the G responses to one prompt:

        b_i = sum_{j != i} R_j / (G - 1)                                           (1)
        A_i = R_i - b_i                                                            (2)

    b_i does not know response i, so that it changes the gradient's variance and not its mean.

    Args:
        rewards: of whole responses, those of a group one after the other. Shape ``(B,)``.
        group_size: G, at least 2.

    Returns:
        Shape ``(B,)``, in at least float32, without gradient; exactly 0 where all rewards of a
        group are equal.

    Raises:
        ValueError: if the rewards do not fill whole groups of two or more.

    Source: Ahmadian et al. 2024, arXiv:2402.14740, eq. 8, after Kool et al. 2019; trl
    ``RLOOTrainer``.

    Example: a group of three, beside whose first response the others have a mean of 1.
        >>> rloo_advantages(torch.tensor([4.0, 0.0, 2.0, 7.0, 7.0, 7.0]), group_size=3)
        tensor([ 3., -3.,  0.,  0.,  0.,  0.])
    """
    groups = _from_the_first(rewards, group_size)  # (B/G, G)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)  # (1)
    return (groups - others).flatten()  # (2)


def grpo_advantages(
    rewards: Tensor,  # (B,)
    *,
    group_size: int,
    scale: Literal["group", "batch", "none"],
) -> Tensor:
    r"""Each response beside the mean of its group.                             [eq:grpo_advantages]

    With R_1 ... R_G the rewards of the G responses to one prompt, and their mean m:

        A_i = (R_i - m) / s                                                        (1)
        s   = deviation of the group + 1e-4                    scale="group"       (2)
              deviation of all rewards of the batch + 1e-4     scale="batch"       (3)
              1                                                scale="none"        (4)

    The mean holds R_i itself, which makes A_i smaller than RLOO's by the factor (G - 1) / G, for
    all alike. (2) does more: it weighs a prompt by how much its responses agree, so that the
    expected gradient is no longer that of the mean reward. (4) leaves it out.

    Args:
        rewards: of whole responses, those of a group one after the other. Shape ``(B,)``.
        group_size: G, at least 2.
        scale: which s; deviations are those with n - 1.

    Returns:
        Shape ``(B,)``, in at least float32, without gradient; exactly 0 where all rewards of a
        group are equal.

    Raises:
        ValueError: if the rewards do not fill whole groups of two or more.

    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1.2, for (2); Liu et al. 2025,
    arXiv:2503.20783, section 3.2, for (4); (3) is trl's; trl ``GRPOTrainer`` with
    ``scale_rewards``, which has the 1e-4 and the n - 1.

    Example: the deviation of 4, 0 and 2 is 2; the second group says nothing.
        >>> rewards = torch.tensor([4.0, 0.0, 2.0, 7.0, 7.0, 7.0])
        >>> grpo_advantages(rewards, group_size=3, scale="none")
        tensor([ 2., -2.,  0.,  0.,  0.,  0.])
        >>> grpo_advantages(rewards, group_size=3, scale="group")
        tensor([ 1.0000, -1.0000,  0.0000,  0.0000,  0.0000,  0.0000])
    """
    groups = _from_the_first(rewards, group_size)  # (B/G, G)
    centred = groups - groups.mean(1, keepdim=True)  # (1)
    if scale == "group":
        centred = centred / (groups.std(1, keepdim=True) + 1e-4)  # (2)
    elif scale == "batch":
        centred = centred / (at_least_float32(rewards.detach()).std() + 1e-4)  # (3)
    elif scale != "none":
        raise ValueError(f"scale must be group, batch or none, not {scale!r}")
    return centred.flatten()  # (4)


def _from_the_first(rewards: Tensor, group_size: int) -> Tensor:
    """The groups as rows, ``(B/G, G)``, counted from each one's first reward: so their mean is
    exactly 0 where all are equal, where that of three times 0.1 is not 0.1."""
    if rewards.dim() != 1 or group_size < 2 or not len(rewards) or len(rewards) % group_size:
        raise ValueError(
            f"rewards of shape {tuple(rewards.shape)} do not fill groups of {group_size}; each "
            "group has two or more"
        )
    groups = at_least_float32(rewards.detach()).view(-1, group_size)
    return groups - groups[:, :1]
