"""Generalized advantage estimation: how much better than expected each token turned out."""

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
