"""Losses that learn from preferences without a reward model. Each takes log-probabilities of whole
responses, one number for each, and returns the loss first, then its count.

Whether a log-probability is the sum over the tokens of a response or their mean is decided before:
a loss takes the numbers that it is given, and its docstring says which its paper gives it. The
losses of the first part compare with a reference, those of the second have none.

All are computed in at least float32, whatever they are given; what follows the count is worth
logging and carries no gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu, sigmoid

from .logprobs import at_least_float32
from .losses import require_pairs


class PreferenceLoss(NamedTuple):
    """Mean loss of the pairs and their number; the implicit rewards of both responses, each
    ``(B,)``: beta * log(pi/ref), or without a reference beta * log pi."""

    loss: Tensor
    count: Tensor  # type: ignore[assignment]  # tuple.count is of no use here
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class KTOLoss(NamedTuple):
    """Mean loss of the rows and their number; the implicit rewards beta * log(pi/ref), ``(B,)``."""

    loss: Tensor
    count: Tensor  # type: ignore[assignment]  # tuple.count is of no use here
    rewards: Tensor


def implicit_rewards(
    chosen_logprobs: Tensor,  # (B,)
    rejected_logprobs: Tensor,  # (B,)
    ref_chosen_logprobs: Tensor,  # (B,)
    ref_rejected_logprobs: Tensor,  # (B,)
    *,
    beta: float,
) -> tuple[Tensor, Tensor]:
    r"""What the policy believes of both responses, as a reward.              [eq:implicit_rewards]

        r(x, y) = beta * log pi(y|x)/ref(y|x)                                      (1)

    It is the reward whose optimal policy, with a KL of weight beta, is pi; but for a term of x
    alone, which is gone in differences.

    Args:
        chosen_logprobs: log pi(y|x) of the chosen response. Shape ``(B,)``.
        rejected_logprobs: of the rejected one. Shape ``(B,)``.
        ref_chosen_logprobs: log ref(y|x). Shape ``(B,)``.
        ref_rejected_logprobs: of the rejected one. Shape ``(B,)``.
        beta: above 0.

    Returns:
        The rewards of the chosen and of the rejected responses. Shape ``(B,)`` each.

    Raises:
        ValueError: if the shapes differ, there is no pair, or beta is not above 0.

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 5; trl ``rewards/chosen`` and
    ``rewards/rejected``.

    Example:
        >>> pi, ref = torch.tensor([-2.0]), torch.tensor([-3.0])
        >>> implicit_rewards(pi, pi, ref, pi, beta=0.5)
        (tensor([0.5000]), tensor([0.]))
    """
    require_pairs(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    _require(beta > 0, f"beta must be above 0, not {beta}")
    chosen_rewards = beta * (at_least_float32(chosen_logprobs) - ref_chosen_logprobs)  # (1)
    rejected_rewards = beta * (at_least_float32(rejected_logprobs) - ref_rejected_logprobs)
    return chosen_rewards, rejected_rewards


def sft_term(chosen_logprobs: Tensor, chosen_lengths: Tensor) -> Tensor:  # (B,) each
    r"""What keeps the chosen response probable beside a loss of differences.         [eq:sft_term]

        L = -log pi(y_w|x) / |y_w|                                                 (1)

    Each pair counts alike, however long its response is, as in the losses that it stands beside.

    Args:
        chosen_logprobs: log pi(y_w|x), *summed* over response tokens. Shape ``(B,)``.
        chosen_lengths: tokens of the chosen response, EOS included. Shape ``(B,)``.

    Returns:
        Nats per token of each chosen response. Shape ``(B,)``.

    Raises:
        ValueError: if the shapes differ or there is no pair.

    Source: Pang et al. 2024, arXiv:2404.19733, eq. 1; ORPO's L_SFT, where CPO's paper sums over the
    tokens; trl ``loss_type=["sigmoid", "sft"]`` takes the mean over all tokens of a micro-batch.

    Example: four tokens of probability 1/e each.
        >>> sft_term(torch.tensor([-4.0]), torch.tensor([4]))
        tensor([1.])
    """
    require_pairs(chosen_logprobs, chosen_lengths)
    return -at_least_float32(chosen_logprobs) / chosen_lengths  # (1)


# With a reference


def dpo_loss(
    chosen_logprobs: Tensor,  # (B,)
    rejected_logprobs: Tensor,  # (B,)
    ref_chosen_logprobs: Tensor,  # (B,)
    ref_rejected_logprobs: Tensor,  # (B,)
    *,
    beta: float,
    label_smoothing: float,
) -> PreferenceLoss:
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
        `PreferenceLoss`.

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
    _require_smoothing(label_smoothing)
    chosen_rewards, rejected_rewards = implicit_rewards(
        chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta=beta
    )
    h = chosen_rewards - rejected_rewards  # (1)
    loss = -(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)  # (2)
    return _over_pairs(loss, chosen_rewards, rejected_rewards)


def ipo_loss(
    chosen_logprobs: Tensor,  # (B,)
    rejected_logprobs: Tensor,  # (B,)
    ref_chosen_logprobs: Tensor,  # (B,)
    ref_rejected_logprobs: Tensor,  # (B,)
    *,
    beta: float,
) -> PreferenceLoss:
    r"""Identity preference optimization: a margin to reach and not to exceed.             [eq:ipo]

        h = log pi(y_w|x)/ref(y_w|x) - log pi(y_l|x)/ref(y_l|x)                    (1)
        L = (h - 1/(2 * beta))^2                                                   (2)

    averaged over pairs. Where all labels agree, DPO's margin grows without end; here it has an aim.

    Args:
        chosen_logprobs: this and the next three are those of `dpo_loss`, *summed* in the paper.
            (trl takes means per token, as, it says, the authors did.) Shape ``(B,)``.
        rejected_logprobs: shape ``(B,)``.
        ref_chosen_logprobs: shape ``(B,)``.
        ref_rejected_logprobs: shape ``(B,)``.
        beta: the paper's tau, above 0; larger aims at a smaller margin.

    Returns:
        `PreferenceLoss`.

    Raises:
        ValueError: if the shapes differ, there is no pair, or beta is not above 0.

    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17; trl ``loss_type="ipo"``.

    Example: a policy that equals the reference lacks all of 1/(2 * 0.5) = 1.
        >>> x, y = torch.tensor([-2.0]), torch.tensor([-3.0])
        >>> ipo_loss(x, y, x, y, beta=0.5).loss
        tensor(1.)
    """
    chosen_rewards, rejected_rewards = implicit_rewards(
        chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta=beta
    )
    h = (chosen_rewards - rejected_rewards) / beta  # (1)
    loss = (h - 1 / (2 * beta)).square()  # (2)
    return _over_pairs(loss, chosen_rewards, rejected_rewards)


def hinge_loss(
    chosen_logprobs: Tensor,  # (B,)
    rejected_logprobs: Tensor,  # (B,)
    ref_chosen_logprobs: Tensor,  # (B,)
    ref_rejected_logprobs: Tensor,  # (B,)
    *,
    beta: float,
) -> PreferenceLoss:
    r"""DPO with the loss of a support vector machine.                                   [eq:hinge]

        h = beta * [log pi(y_w|x)/ref(y_w|x) - log pi(y_l|x)/ref(y_l|x)]           (1)
        L = max(0, 1 - h)                                                          (2)

    averaged over pairs. A pair with a margin of 1 or more teaches nothing any more.

    Args:
        chosen_logprobs: this and the next three are those of `dpo_loss`, *summed*. Shape ``(B,)``.
        rejected_logprobs: shape ``(B,)``.
        ref_chosen_logprobs: shape ``(B,)``.
        ref_rejected_logprobs: shape ``(B,)``.
        beta: above 0; larger keeps the policy nearer the reference.

    Returns:
        `PreferenceLoss`.

    Raises:
        ValueError: if the shapes differ, there is no pair, or beta is not above 0.

    Source: Zhao et al. 2023, arXiv:2305.10425 (SLiC-HF), whose loss has no reference; with one,
    Liu et al. 2023, arXiv:2309.06657 (RSO); trl ``loss_type="hinge"``.

    Example: a policy that equals the reference has h = 0.
        >>> x, y = torch.tensor([-2.0]), torch.tensor([-3.0])
        >>> hinge_loss(x, y, x, y, beta=0.1).loss
        tensor(1.)
    """
    chosen_rewards, rejected_rewards = implicit_rewards(
        chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta=beta
    )
    h = chosen_rewards - rejected_rewards  # (1)
    loss = relu(1 - h)  # (2)
    return _over_pairs(loss, chosen_rewards, rejected_rewards)


def robust_loss(
    chosen_logprobs: Tensor,  # (B,)
    rejected_logprobs: Tensor,  # (B,)
    ref_chosen_logprobs: Tensor,  # (B,)
    ref_rejected_logprobs: Tensor,  # (B,)
    *,
    beta: float,
    label_smoothing: float,
) -> PreferenceLoss:
    r"""DPO that is right on average where a share of the labels is flipped.            [eq:robust]

        h = beta * [log pi(y_w|x)/ref(y_w|x) - log pi(y_l|x)/ref(y_l|x)]           (1)
        L = [-(1 - eps) * log sigmoid(h) + eps * log sigmoid(-h)] / (1 - 2 * eps)  (2)

    averaged over pairs. Over labels that are flipped with probability eps the expectation of (2) is
    DPO's loss of the true ones. The label smoothing of `dpo_loss` adds the second term where this
    takes it off: it expects less of the margin, this one undoes what flipped labels teach.

    Args:
        chosen_logprobs: this and the next three are those of `dpo_loss`, *summed*. Shape ``(B,)``.
        rejected_logprobs: shape ``(B,)``.
        ref_chosen_logprobs: shape ``(B,)``.
        ref_rejected_logprobs: shape ``(B,)``.
        beta: above 0; larger keeps the policy nearer the reference.
        label_smoothing: eps, in [0, 1/2); with 0 it is DPO.

    Returns:
        `PreferenceLoss`. The loss may be below 0.

    Raises:
        ValueError: if the shapes differ, there is no pair, or beta or label_smoothing is out of
            range.

    Source: Chowdhury et al. 2024, arXiv:2403.00409 (rDPO); trl ``loss_type="robust"``.

    Example: a policy that equals the reference has the loss log 2, whatever eps is.
        >>> x, y = torch.tensor([-2.0]), torch.tensor([-3.0])
        >>> robust_loss(x, y, x, y, beta=0.1, label_smoothing=0.2).loss
        tensor(0.6931)
    """
    _require_smoothing(label_smoothing)
    chosen_rewards, rejected_rewards = implicit_rewards(
        chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta=beta
    )
    h = chosen_rewards - rejected_rewards  # (1)
    true, flipped = (1 - label_smoothing) * logsigmoid(h), label_smoothing * logsigmoid(-h)
    loss = (flipped - true) / (1 - 2 * label_smoothing)  # (2)
    return _over_pairs(loss, chosen_rewards, rejected_rewards)


def apo_zero_loss(
    chosen_logprobs: Tensor,  # (B,)
    rejected_logprobs: Tensor,  # (B,)
    ref_chosen_logprobs: Tensor,  # (B,)
    ref_rejected_logprobs: Tensor,  # (B,)
    *,
    beta: float,
) -> PreferenceLoss:
    r"""Anchored preference optimization, for chosen responses better than the policy. [eq:apo_zero]

        r_w, r_l = beta * log pi(y_w|x)/ref(y_w|x), beta * log pi(y_l|x)/ref(y_l|x)  (1)
        L = 1 - sigmoid(r_w) + sigmoid(r_l)                                        (2)

    averaged over pairs. DPO sees a difference only, which also grows where both responses sink;
    here the chosen one has to rise and the rejected one to sink, each by itself.

    Args:
        chosen_logprobs: this and the next three are those of `dpo_loss`, *summed*. Shape ``(B,)``.
        rejected_logprobs: shape ``(B,)``.
        ref_chosen_logprobs: shape ``(B,)``.
        ref_rejected_logprobs: shape ``(B,)``.
        beta: above 0.

    Returns:
        `PreferenceLoss`.

    Raises:
        ValueError: if the shapes differ, there is no pair, or beta is not above 0.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7, without the 1 that keeps (2) above
    0; trl ``loss_type="apo_zero"``.

    Example: a policy that equals the reference.
        >>> x, y = torch.tensor([-2.0]), torch.tensor([-3.0])
        >>> apo_zero_loss(x, y, x, y, beta=0.1).loss
        tensor(1.)
    """
    chosen_rewards, rejected_rewards = implicit_rewards(  # (1)
        chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta=beta
    )
    # 1 - sigmoid(r) is sigmoid(-r), which keeps its digits where r is large.
    loss = sigmoid(-chosen_rewards) + sigmoid(rejected_rewards)  # (2)
    return _over_pairs(loss, chosen_rewards, rejected_rewards)


def apo_down_loss(
    chosen_logprobs: Tensor,  # (B,)
    rejected_logprobs: Tensor,  # (B,)
    ref_chosen_logprobs: Tensor,  # (B,)
    ref_rejected_logprobs: Tensor,  # (B,)
    *,
    beta: float,
) -> PreferenceLoss:
    r"""Anchored preference optimization, for chosen responses worse than the policy. [eq:apo_down]

        r_w, r_l = beta * log pi(y_w|x)/ref(y_w|x), beta * log pi(y_l|x)/ref(y_l|x)  (1)
        L = sigmoid(r_w) + 1 - sigmoid(r_w - r_l)                                  (2)

    averaged over pairs. Both responses sink, and the rejected one further.

    Args:
        chosen_logprobs: this and the next three are those of `dpo_loss`, *summed*. Shape ``(B,)``.
        rejected_logprobs: shape ``(B,)``.
        ref_chosen_logprobs: shape ``(B,)``.
        ref_rejected_logprobs: shape ``(B,)``.
        beta: above 0.

    Returns:
        `PreferenceLoss`.

    Raises:
        ValueError: if the shapes differ, there is no pair, or beta is not above 0.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8, without the 1 that keeps (2) above
    0; trl ``loss_type="apo_down"``.

    Example: a policy that equals the reference.
        >>> x, y = torch.tensor([-2.0]), torch.tensor([-3.0])
        >>> apo_down_loss(x, y, x, y, beta=0.1).loss
        tensor(1.)
    """
    chosen_rewards, rejected_rewards = implicit_rewards(  # (1)
        chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta=beta
    )
    loss = sigmoid(chosen_rewards) + sigmoid(rejected_rewards - chosen_rewards)  # (2)
    return _over_pairs(loss, chosen_rewards, rejected_rewards)


# Without a reference


def simpo_loss(
    chosen_logprobs: Tensor,  # (B,)
    rejected_logprobs: Tensor,  # (B,)
    *,
    beta: float,
    gamma: float,
) -> PreferenceLoss:
    r"""Simple preference optimization: by what the policy would rather write.           [eq:simpo]

        h = beta * log pi(y_w|x)/|y_w| - beta * log pi(y_l|x)/|y_l| - gamma        (1)
        L = -log sigmoid(h)                                                        (2)

    averaged over pairs. A mean per token is what decides between responses of other lengths when
    the policy writes; and a long response gains nothing by its length alone.

    Args:
        chosen_logprobs: log pi(y_w|x)/|y_w|, the *mean* over response tokens. Shape ``(B,)``.
        rejected_logprobs: log pi(y_l|x)/|y_l|. Shape ``(B,)``.
        beta: above 0; of the order of 2, since means per token differ by little.
        gamma: margin of the implicit rewards that a pair has to reach, at least 0.

    Returns:
        `PreferenceLoss`.

    Raises:
        ValueError: if the shapes differ, there is no pair, or beta or gamma is out of range.

    Source: Meng et al. 2024, arXiv:2405.14734, eq. 6; trl ``CPOTrainer`` with
    ``loss_type="simpo"``.

    Example: the two differ by 2 * (2 - 1.5) = 1, which is the margin: log 2.
        >>> simpo_loss(torch.tensor([-1.5]), torch.tensor([-2.0]), beta=2.0, gamma=1.0).loss
        tensor(0.6931)
    """
    _require(gamma >= 0, f"gamma must be at least 0, not {gamma}")
    chosen_rewards, rejected_rewards = _scaled(chosen_logprobs, rejected_logprobs, beta)
    h = chosen_rewards - rejected_rewards - gamma  # (1)
    return _over_pairs(-logsigmoid(h), chosen_rewards, rejected_rewards)  # (2)


def orpo_loss(
    chosen_logprobs: Tensor,  # (B,)
    rejected_logprobs: Tensor,  # (B,)
    *,
    beta: float,
) -> PreferenceLoss:
    r"""What odds ratio preference optimization adds to SFT.                              [eq:orpo]

    With P(y|x) the geometric mean of the tokens' probabilities:

        log odds(y|x) = log P(y|x) - log(1 - P(y|x))                               (1)
        L = -beta * log sigmoid(log odds(y_w|x) - log odds(y_l|x))                 (2)

    averaged over pairs. The whole of ORPO is this and `sft_term` with weight 1. A response that the
    policy is all but certain of has odds without end; P is kept below 1 by a rounding.

    Args:
        chosen_logprobs: log P(y_w|x), the *mean* over response tokens. Shape ``(B,)``.
        rejected_logprobs: log P(y_l|x). Shape ``(B,)``.
        beta: the paper's lambda, above 0.

    Returns:
        `PreferenceLoss`. Its rewards are beta * log P.

    Raises:
        ValueError: if the shapes differ, there is no pair, or beta is not above 0.

    Source: Hong et al. 2024, arXiv:2403.07691, eq. 4, 6 and 7; trl ``ORPOTrainer``.

    Example: probabilities 1/2 and 1/4 have the odds 1 and 1/3; log(1 + 1/3).
        >>> orpo_loss(torch.tensor([0.5]).log(), torch.tensor([0.25]).log(), beta=1.0).loss
        tensor(0.2877)
    """
    rewards = _scaled(chosen_logprobs, rejected_logprobs, beta)
    chosen_odds, rejected_odds = (_log_odds(x) for x in (chosen_logprobs, rejected_logprobs))  # (1)
    return _over_pairs(-beta * logsigmoid(chosen_odds - rejected_odds), *rewards)  # (2)


def cpo_loss(
    chosen_logprobs: Tensor,  # (B,)
    rejected_logprobs: Tensor,  # (B,)
    *,
    beta: float,
) -> PreferenceLoss:
    r"""What contrastive preference optimization adds to SFT: DPO without a reference.     [eq:cpo]

        h = beta * [log pi(y_w|x) - log pi(y_l|x)]                                 (1)
        L = -log sigmoid(h)                                                        (2)

    averaged over pairs. It is DPO where the reference finds both responses equally probable. The
    whole of CPO is this and `sft_term` with weight 1.

    Args:
        chosen_logprobs: log pi(y_w|x), *summed* over response tokens. Shape ``(B,)``.
        rejected_logprobs: log pi(y_l|x). Shape ``(B,)``.
        beta: above 0.

    Returns:
        `PreferenceLoss`.

    Raises:
        ValueError: if the shapes differ, there is no pair, or beta is not above 0.

    Source: Xu et al. 2024, arXiv:2401.08417, eq. 3; trl ``CPOTrainer`` with
    ``loss_type="sigmoid"``.

    Example: h = 0.5 * (3 - 1) = 1, as for DPO with a reference that is the same for both.
        >>> cpo_loss(torch.tensor([-1.0]), torch.tensor([-3.0]), beta=0.5).loss
        tensor(0.3133)
    """
    chosen_rewards, rejected_rewards = _scaled(chosen_logprobs, rejected_logprobs, beta)
    h = chosen_rewards - rejected_rewards  # (1)
    return _over_pairs(-logsigmoid(h), chosen_rewards, rejected_rewards)  # (2)


# Of single responses


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


# What they share


def _scaled(
    chosen_logprobs: Tensor, rejected_logprobs: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    # The implicit rewards where there is no reference. (B,) each
    zero = torch.zeros_like(chosen_logprobs)
    return implicit_rewards(chosen_logprobs, rejected_logprobs, zero, zero, beta=beta)


def _log_odds(logprobs: Tensor) -> Tensor:
    logprobs = at_least_float32(logprobs)
    logprobs = logprobs.clamp(max=-torch.finfo(logprobs.dtype).eps)
    return logprobs - torch.log(-torch.expm1(logprobs))


def _over_pairs(loss: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor) -> PreferenceLoss:
    return PreferenceLoss(
        loss.mean(),
        torch.tensor(len(loss), device=loss.device),
        chosen_rewards.detach(),
        rejected_rewards.detach(),
    )


def _require_smoothing(label_smoothing: float) -> None:
    _require(
        0 <= label_smoothing < 0.5, f"label_smoothing must be in [0, 0.5), not {label_smoothing}"
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
