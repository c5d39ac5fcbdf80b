"""Best-of-n: of n responses, the one that scores best. What is it worth, and how far is it?"""

from math import comb, log

import numpy as np


def best_of_n_mean(scores: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:  # -> (P,)
    r"""What the best-scored of n responses is worth, estimated from N.       [eq:best_of_n_mean]

    With the responses numbered by rising score, i is the best of n of them that are drawn without
    replacement with a probability of C(i - 1, n - 1) / C(N, n), so that

        E[value of the best] = sum_i  value_i * C(i - 1, n - 1) / C(N, n)          (1)

    is the mean over all choices of n, and unbiased.

    Args:
        scores: by which the best is chosen. Shape ``(P, N)``, N responses to each of P prompts.
        values: what is averaged. Shape ``(P, N)``.
        n: from 1 to N.

    Source: Hilton and Gao 2022, "Measuring Goodhart's law".

    >>> best_of_n_mean(np.array([[3.0, 1.0, 2.0]]), np.array([[30.0, 10.0, 20.0]]), 3)
    array([30.])
    """
    size = scores.shape[1]
    weights = [comb(i - 1, n - 1) / comb(size, n) for i in range(1, size + 1)]
    by_score = np.take_along_axis(values, scores.argsort(axis=1, kind="stable"), axis=1)
    return by_score @ np.array(weights)  # (1)


def best_of_n_kl(scores: np.ndarray, n: int) -> np.ndarray:  # (P, N) -> (P,)
    r"""How far best-of-n is from the model that it chooses from, in nats.      [eq:best_of_n_kl]

    If a share p of the responses has a score, and a share q a lower one, the best of n has it with

        b  = (q + p)^n - q^n                                                       (1)
        KL = sum over the scores of  b (log b - log p)                             (2)

    which is exact where p and q are, ties being broken at random: those that share a score are as
    likely among each other as before.

    Args:
        scores: of N responses to each of P prompts, equal ones for equal texts. Shape ``(P, N)``.
        n: well below N, or p and q are too coarse.

    Source: Beirami et al. 2024, arXiv:2401.01879, where the exact KL is derived.

    >>> best_of_n_kl(np.array([[1.0, 2.0]]), 1)
    array([0.])
    """
    found = []
    for row in scores:
        counts = np.unique(row, return_counts=True)[1]
        p, q = counts / len(row), (counts.cumsum() - counts) / len(row)
        b = (q + p) ** n - q**n  # (1)
        seen = b > 0  # too small for a float otherwise
        found.append(b[seen] @ (np.log(b[seen]) - np.log(p[seen])))  # (2)
    return np.array(found)


def best_of_n_bound(n: int) -> float:
    r"""The KL of best-of-n, in nats, at most.                                [eq:best_of_n_bound]

        KL <= log n - (n - 1) / n                                                  (1)

    It is reached in the limit where no two of the n responses ever share a score.

    Source: Beirami et al. 2024, arXiv:2401.01879; Gao et al. 2022 take it for the KL itself.

    >>> best_of_n_bound(1)
    0.0
    """
    return log(n) - (n - 1) / n  # (1)
