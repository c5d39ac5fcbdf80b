"""Losses that learn from preferences without a reward model. Each takes log-probabilities of whole
responses, one number for each, and returns the loss first, then its count.

All are computed in at least float32, whatever they are given; what follows the count is worth
logging and carries no gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, sigmoid

from .logprobs import at_least_float32
from .losses import require_pairs


class DPOLoss(NamedTuple):
    """Mean loss of the pairs and their number; the implicit rewards beta * log(pi/ref) of both
    responses, each ``(B,)``."""

    loss: Tensor
    count: Tensor  # type: ignore[assignment]  # tuple.count is of no use here
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class KTOLoss(NamedTuple):
    """Mean loss of the rows and their number; the implicit rewards beta * log(pi/ref), ``(B,)``."""

    loss: Tensor
    count: Tensor  # type: ignore[assignment]  # tuple.count is of no use here
    rewards: Tensor


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


def kto_loss(
    logprobs: Tensor,  # (B,)
    ref_logprobs: Tensor,  # (B,)
    labels: Tensor,  # (B,)
    kl: Tensor,  # ()
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> KTOLoss:
    r"""Kahneman-Tversky optimization: single responses, each desirable or not.            [eq:kto]

    With z the reference point, which carries no gradient:

        r = beta * log pi(y|x)/ref(y|x)                                            (1)
        L = weight_D * (1 - sigmoid(r - beta * z))    if y is desirable            (2)
        L = weight_U * (1 - sigmoid(beta * z - r))    if it is undesirable         (3)

    averaged over rows, whatever their weights.

    Args:
        logprobs: log pi(y|x), *summed* over response tokens. Shape ``(B,)``.
        ref_logprobs: log ref(y|x). Shape ``(B,)``.
        labels: True where the response is desirable. Shape ``(B,)``.
        kl: z in nats, at least 0; of `kto_kl`, or 0 for the loss that is called APO-zero.
        beta: as in DPO, above 0; larger keeps the policy nearer the reference.
        desirable_weight: weight_D, at least 0.
        undesirable_weight: weight_U, at least 0.

    Returns:
        `KTOLoss`.

    Raises:
        ValueError: if the shapes differ, there is no row, labels are not boolean, or a number is
            out of range.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7, whose weights are lambda_D and
    lambda_U; trl ``KTOTrainer``. With z = 0: the unpaired form of D'Oosterlinck et al. 2024,
    arXiv:2408.06266, eq. 7; trl ``loss_type="apo_zero_unpaired"``.

    Example: r is 1 for both, and z = 0: the desirable one is good already, the other one is not.
        >>> pi, ref, z = torch.tensor([-2.0, -2.0]), torch.tensor([-4.0, -4.0]), torch.tensor(0.0)
        >>> weights = {"desirable_weight": 1.0, "undesirable_weight": 1.0}
        >>> kto_loss(pi[:1], ref[:1], torch.tensor([True]), z, beta=0.5, **weights).loss
        tensor(0.2689)
        >>> kto_loss(pi[1:], ref[1:], torch.tensor([False]), z, beta=0.5, **weights).loss
        tensor(0.7311)
    """
    require_pairs(logprobs, ref_logprobs, labels)
    if labels.dtype != torch.bool or kl.shape != ():
        raise ValueError(f"labels are {labels.dtype}, not bool, or kl has shape {tuple(kl.shape)}")
    if not beta > 0 or not desirable_weight >= 0 or not undesirable_weight >= 0:
        raise ValueError(
            f"beta must be above 0 and weights at least 0, not {beta}, {desirable_weight}, "
            f"{undesirable_weight}"
        )
    rewards = beta * (at_least_float32(logprobs) - ref_logprobs)  # (1)
    margin = rewards - beta * kl.detach()
    # 1 - sigmoid(x) is sigmoid(-x), which keeps its digits where x is large.
    desirable = desirable_weight * sigmoid(-margin)  # (2)
    undesirable = undesirable_weight * sigmoid(margin)  # (3)
    loss = torch.where(labels, desirable, undesirable)
    return KTOLoss(loss.mean(), torch.tensor(len(loss), device=loss.device), rewards.detach())


def kto_kl(mismatched_logprobs: Tensor, ref_mismatched_logprobs: Tensor) -> Tensor:  # (B,) each
    r"""KTO's reference point: how far the policy is from the reference on any response. [eq:kto_kl]

    With y' a response to another prompt than x:

        z = max(0, mean of log pi(y'|x)/ref(y'|x))                                 (1)

    In expectation over y' of the policy the mean is KL(pi || ref). These y' are of the data, so it
    may well be below 0, which no KL is; hence the maximum, and a bias.

    Args:
        mismatched_logprobs: log pi(y'|x), *summed* over response tokens. Shape ``(B,)``.
        ref_mismatched_logprobs: log ref(y'|x). Shape ``(B,)``.

    Returns:
        z in nats, without gradient. Shape ``()``.

    Raises:
        ValueError: if the shapes differ or there is no row.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1; trl ``KTOTrainer``.

    Example:
        >>> kto_kl(torch.tensor([-1.0, -5.0]), torch.tensor([-4.0, -4.0]))
        tensor(1.)
    """
    require_pairs(mismatched_logprobs, ref_mismatched_logprobs)
    ratios = at_least_float32(mismatched_logprobs.detach()) - ref_mismatched_logprobs.detach()
    return ratios.mean().clamp(min=0)  # (1)
