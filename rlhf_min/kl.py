"""KL to the reference: estimates for each token, the coefficient, and the shaped reward."""

from typing import Literal

import torch
from torch import Tensor

from .logprobs import at_least_float32
from .masking import require_right_padded

KLKind = Literal["k1", "abs", "k2", "k3"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, *, kind: KLKind) -> Tensor:
    r"""One-sample estimates of KL(policy || reference) at each token.                      [eq:kl]

    With d = log pi(y) - log ref(y), for a token y that was sampled from pi:

        k1 = d                        unbiased, may be negative for a single token  (1)
        abs = |d|                                                                  (2)
        k2 = d^2 / 2                  biased, low variance                         (3)
        k3 = exp(-d) - 1 + d          unbiased, never negative                     (4)

    In the rewards, which are held fixed, only k1 gives the gradient of E[score] - kl_coef * KL. An
    estimate k there contributes E[k grad log pi], and the gradient of E[k] is that plus E[grad k].
    For k1 the second part, E[grad log pi], is 0; for the others it is not.

    Args:
        logprobs: log pi(y). Shape ``(B, T)``.
        ref_logprobs: log ref(y). Shape ``(B, T)``.
        kind: which of the four.

    Returns:
        Shape ``(B, T)``, in at least float32; padding must be masked by the caller.

    Source: Schulman 2020, "Approximating KL divergence"; trl 0.11.3 ``kl_penalty`` "kl", "abs"
    and "mse" are (1) to (3), trl 1.12.0 ``kl_estimator`` "k1" and "k3" are (1) and (4).

    Example:
        >>> logprobs = torch.tensor([[-1.0, -1.5, -2.0, -1.0]])
        >>> ref_logprobs = torch.tensor([[-2.0, -0.5, -3.0, -2.0]])
        >>> kl_estimate(logprobs, ref_logprobs, kind="k1")
        tensor([[ 1., -1.,  1.,  1.]])
        >>> kl_estimate(logprobs, ref_logprobs, kind="k2")
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    d = at_least_float32(logprobs) - ref_logprobs
    if kind == "k1":
        return d  # (1)
    if kind == "abs":
        return d.abs()  # (2)
    if kind == "k2":
        return d.square() / 2  # (3)
    if kind == "k3":
        return torch.expm1(-d) + d  # (4)
    raise ValueError(f"kind must be k1, abs, k2 or k3, not {kind!r}")


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    r"""KL(policy || reference) at each position, summed over the vocabulary.         [eq:exact_kl]

        KL = sum_v p_v (log p_v - log r_v)                                         (1)

    Args:
        logits: the policy's. Shape ``(..., V)``. A logit of minus infinity has probability 0.
        ref_logits: the reference's. Shape ``(..., V)``.

    Returns:
        Shape ``(...)``, in at least float32; infinite where the reference rules out what the
        policy may say.

    Source: Kullback and Leibler 1951; trl 0.11.3 ``kl_penalty="full"``.

    Example:
        >>> exact_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
        tensor([0.])
    """
    logp = at_least_float32(logits).log_softmax(-1)
    logr = at_least_float32(ref_logits).log_softmax(-1)
    p = logp.exp()
    return (p * torch.where(p > 0, logp - logr, 0)).sum(-1)  # (1), where 0 * inf is 0


class FixedKL:
    """A coefficient that stays what it is. Same as trl 0.11.3 ``FixedKLController``."""

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, mean_kl: float, n: int) -> None:
        """Nothing to do: the coefficient is fixed."""


class AdaptiveKL:
    r"""A coefficient that steers the KL towards a target.                         [eq:adaptive_kl]

        e     = clip(mean_kl / target - 1, -0.2, 0.2)                              (1)
        coef <- coef * (1 + e * n / horizon)                                       (2)

    Args:
        coef: the coefficient at the start.
        target: the aim, in nats per response.
        horizon: responses over which the coefficient may change by about 20%.

    Raises:
        ValueError: if target or horizon is not positive.

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2; trl 0.11.3
    ``AdaptiveKLController``.

    Example: a KL of twice the target raises the coefficient by the limit of 20%.
        >>> control = AdaptiveKL(0.1, target=6.0, horizon=100)
        >>> control.update(12.0, n=100)
        >>> round(control.coef, 6)
        0.12
    """

    def __init__(self, coef: float, *, target: float, horizon: float) -> None:
        if not target > 0 or not horizon > 0:
            raise ValueError(f"target and horizon must be positive, not {target} and {horizon}")
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, mean_kl: float, n: int) -> None:
        """Steer by the KL that the coefficient in use led to.

        Args:
            mean_kl: mean over responses of the summed token KL, in nats.
            n: number of responses it was measured on.
        """
        error = min(max(mean_kl / self.target - 1, -0.2), 0.2)  # (1)
        self.coef *= 1 + error * n / self.horizon  # (2)


def shape_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    r"""The reward of each token: minus the KL penalty, plus the score at the last real one.
                                                                                [eq:shape_rewards]
        r_t = -kl_coef * kl_t + [t is the last real token] * score                 (1)

    Args:
        scores: what the reward model says of each response. Shape ``(B,)``.
        kl: estimate at each token. Shape ``(B, T)``.
        mask: True at real response tokens, EOS included; each row has at least one.
            Shape ``(B, T)``.
        kl_coef: weight of the penalty, in score per nat.

    Returns:
        Shape ``(B, T)``, in at least float32, zero at padding.

    Raises:
        ValueError: if the shapes do not fit, a mask row is not right-padded or has no real token.

    Source: Ziegler et al. 2019, eq. 2; trl 0.11.3 ``PPOTrainer.compute_rewards``. (trl 1.12.0
    puts the score one cell after EOS.)

    Example: four real tokens and one pad, whose 9 must not matter.
        >>> scores, kl = torch.tensor([1.0]), torch.tensor([[1.0, -1.0, 1.0, 1.0, 9.0]])
        >>> mask = torch.tensor([[True, True, True, True, False]])
        >>> shape_rewards(scores, kl, mask, kl_coef=0.1)
        tensor([[-0.1000,  0.1000, -0.1000,  0.9000,  0.0000]])
    """
    if kl.shape != mask.shape or scores.shape != mask.shape[:1]:
        shapes = [tuple(x.shape) for x in (scores, kl, mask)]
        raise ValueError(f"scores, kl and mask do not fit each other: {shapes}")
    require_right_padded(mask)
    rewards = torch.where(mask, -kl_coef * at_least_float32(kl), 0)  # (B, T)
    last = mask.sum(1) - 1  # (B,)
    if bool((last < 0).any()):
        raise ValueError("a row has no real token to carry its score")
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))  # (1)
