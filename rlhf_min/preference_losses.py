"""Losses that learn from preferences without a reward model. Each takes log-probabilities of whole
responses, one number for each, and returns the loss first, then its count.

All are computed in at least float32, whatever they are given; what follows the count is worth
logging and carries no gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .logprobs import at_least_float32
from .losses import require_pairs


class DPOLoss(NamedTuple):
    """Mean loss of the pairs and their number; the implicit rewards beta * log(pi/ref) of both
    responses, each ``(B,)``."""

    loss: Tensor
    count: Tensor  # type: ignore[assignment]  # tuple.count is of no use here
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def dpo_loss(
    chosen_logprobs: Tensor,  # (B,)
    rejected_logprobs: Tensor,  # (B,)
    ref_chosen_logprobs: Tensor,  # (B,)
    ref_rejected_logprobs: Tensor,  # (B,)
    *,
    beta: float,
    label_smoothing: float,
) -> DPOLoss:
    r"""Direct preference optimization.                                                    [eq:dpo]

    With y_w the chosen and y_l the rejected response to the same prompt x:

        h = beta * [log pi(y_w|x)/ref(y_w|x) - log pi(y_l|x)/ref(y_l|x)]           (1)
        L = -(1 - eps) * log sigmoid(h) - eps * log sigmoid(-h)                    (2)

    averaged over pairs. eps = 0 is DPO; 0 < eps < 1/2 assumes that a share eps of the labels is
    flipped.

    Args:
        chosen_logprobs: log pi(y_w|x), *summed* over response tokens. Shape ``(B,)``.
        rejected_logprobs: log pi(y_l|x). Shape ``(B,)``.
        ref_chosen_logprobs: log ref(y_w|x). Shape ``(B,)``.
        ref_rejected_logprobs: log ref(y_l|x). Shape ``(B,)``.
        beta: inverse temperature, above 0; larger keeps the policy nearer the reference.
        label_smoothing: eps, in [0, 1/2).

    Returns:
        `DPOLoss`.

    Raises:
        ValueError: if the shapes differ, there is no pair, or beta or label_smoothing is out of
            range.

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; eps: Mitchell 2023, "A note on DPO with
    noisy preferences & relationship to IPO", eq. 3; trl ``loss_type="sigmoid"`` (newer trl ignores
    its ``label_smoothing`` there).

    Example: a policy that equals the reference has h = 0 and the loss log 2, whatever beta is.
        >>> x, y = torch.tensor([-2.0]), torch.tensor([-3.0])
        >>> dpo_loss(x, y, x, y, beta=0.1, label_smoothing=0.0).loss
        tensor(0.6931)
        >>> ref_x, ref_y = x - 1, y + 1  # h = 0.5 * (1 + 1) = 1
        >>> dpo_loss(x, y, ref_x, ref_y, beta=0.5, label_smoothing=0.0).loss  # log(1 + 1/e)
        tensor(0.3133)
    """
    require_pairs(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    if not beta > 0 or not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"beta must be above 0 and label_smoothing in [0, 0.5), not {beta}, {label_smoothing}"
        )
    chosen_rewards = beta * (at_least_float32(chosen_logprobs) - ref_chosen_logprobs)
    rejected_rewards = beta * (at_least_float32(rejected_logprobs) - ref_rejected_logprobs)
    h = chosen_rewards - rejected_rewards  # (1)
    loss = -(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)  # (2)
    return DPOLoss(
        loss.mean(),
        torch.tensor(len(loss), device=loss.device),
        chosen_rewards.detach(),
        rejected_rewards.detach(),
    )
