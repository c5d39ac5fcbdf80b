"""Numbers with their uncertainty: means, BLEU, shares and win rates, best-of-n and pass@k.

Every interval is a 95 % interval over questions.
"""

from math import comb, log, sqrt
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .errors import BadInput, require
from .text_metrics import bleu_from_statistics

RESAMPLES = 2000
Z95 = NormalDist().inv_cdf(0.975)  # 1.96


class Estimate(NamedTuple):
    """A mean over n questions and the ends of its 95 % interval.

    >>> print(Estimate(0.612, 0.58, 0.644, 900))
    0.612 [0.580, 0.644]
    """

    mean: float
    lo: float
    hi: float
    n: int

    def as_json(self) -> dict[str, Any]:
        """The estimate as JSON values: mean, ci95 and n."""
        return {"mean": self.mean, "ci95": [self.lo, self.hi], "n": self.n}

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.lo:.3f}, {self.hi:.3f}]"


def mean_estimate(values: ArrayLike, *, seed: int) -> Estimate:  # values (N,)
    """The mean of one value per question, with a bootstrap percentile interval.

    The same seed and N resample the same questions, here and in `bleu_estimate` and `win_rate`.
    The estimate for the difference of two models is therefore that of their row-wise difference.

    Raises:
        BadInput: no values, or one that is not finite.

    Source: Efron and Tibshirani 1993, chapter 13; `RESAMPLES` resamples.
    """
    column = _finite(values, "values")
    means = _resampled_sums(column[:, None], seed)[:, 0] / len(column)
    return Estimate(float(column.mean()), *_middle95(means), len(column))


def bleu_estimate(statistics: np.ndarray, *, seed: int) -> Estimate:  # statistics (N, 10)
    """Corpus BLEU of all questions, with a bootstrap percentile interval over questions.

    Args:
        statistics: what `bleu_statistics` returned, one row per question.

    Raises:
        BadInput: not N rows of ten, or no row.

    Source: Koehn 2004, "Statistical significance tests for machine translation evaluation".
    """
    require(
        statistics.ndim == 2 and statistics.shape[1] == 10 and len(statistics) > 0,
        f"BLEU statistics must be N > 0 rows of ten, but their shape is {statistics.shape}",
    )
    scores = bleu_from_statistics(_resampled_sums(statistics, seed))
    mean = float(bleu_from_statistics(statistics.sum(axis=0)))
    return Estimate(mean, *_middle95(scores), len(statistics))


def proportion_estimate(successes: int, n: int) -> Estimate:
    r"""The share of n questions that succeeded, with Wilson's score interval.  [eq:wilson]

    With p = successes / n and z = 1.96:

        (p + z^2 / 2n  -+  z * sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)     (1)

    Raises:
        BadInput: n below 1, or successes outside 0..n.

    Source: Wilson 1927.

    >>> print(proportion_estimate(5, 10))
    0.500 [0.237, 0.763]
    """
    require(0 <= successes <= n and n > 0, f"{successes} of {n} is no share: need 0..n of n > 0")
    p, z = successes / n, Z95
    centre = p + z**2 / (2 * n)
    half = z * sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    lo, hi = (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)  # (1)
    # Exactly 0 and 1 at the ends, where rounding would put the share outside its interval.
    return Estimate(p, lo if successes > 0 else 0.0, hi if successes < n else 1.0, n)


def win_rate(
    scores: ArrayLike,  # (N,)
    baseline_scores: ArrayLike,  # (N,)
    *,
    seed: int,
) -> tuple[Estimate, float]:
    """How often a response scores above the baseline's to the same prompt; a tie is half a win.

    Returns:
        The win rate, with a bootstrap interval as in `mean_estimate`, and the share of ties.

    Raises:
        BadInput: no scores, unequal lengths, or a score that is not finite.

    >>> estimate, ties = win_rate([2.0, 1.0, 0.0, 5.0], [1.0, 1.0, 1.0, 1.0], seed=0)
    >>> estimate.mean, ties
    (0.625, 0.25)
    """
    ours, theirs = _finite(scores, "scores"), _finite(baseline_scores, "baseline_scores")
    require(
        len(ours) == len(theirs),
        f"{len(ours)} scores but {len(theirs)} baseline_scores: give both for the same prompts",
    )
    ties = ours == theirs
    return mean_estimate((ours > theirs) + ties / 2, seed=seed), float(ties.mean())


def _finite(values: ArrayLike, name: str) -> np.ndarray:  # (N,)
    """The values as a float column; `BadInput` if there are none or one is not finite."""
    column = np.asarray(values, dtype=np.float64)
    require(column.ndim == 1 and column.size > 0, f"{name}: expected N > 0 numbers in one list")
    bad = np.flatnonzero(~np.isfinite(column))
    if bad.size > 0:
        raise BadInput(
            f"{name}, row {bad[0]}: {column[bad[0]]} is not finite ({bad.size} of {len(column)} "
            "rows are not): score these rows again, or leave them out for every model"
        )
    return column


def _resampled_sums(columns: np.ndarray, seed: int) -> np.ndarray:  # (N, K) -> (RESAMPLES, K)
    """Column sums over N rows drawn with replacement; which rows depends on seed and N alone."""
    rng = np.random.Generator(np.random.PCG64(seed))
    n = len(columns)
    return np.stack(
        [np.bincount(rng.integers(n, size=n), minlength=n) @ columns for _ in range(RESAMPLES)]
    )


def _middle95(samples: np.ndarray) -> tuple[float, float]:
    """The 2.5th and the 97.5th percentile."""
    lo, hi = np.percentile(samples, [2.5, 97.5])
    return float(lo), float(hi)


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


def pass_at_k(correct: np.ndarray, k: int) -> np.ndarray:  # (P, N) -> (P,)
    r"""How likely at least one of k responses is correct, estimated from N.       [eq:pass_at_k]

    With c of the N responses correct, k of them that are drawn without replacement are all wrong
    with a probability of C(N - c, k) / C(N, k), so that

        pass@k = 1 - C(N - c, k) / C(N, k)                                         (1)

    is the mean over all choices of k, and unbiased. That of the share, 1 - (1 - c / N)^k, is too
    low.

    Args:
        correct: whether each response is. Shape ``(P, N)``, N responses to each of P prompts.
        k: from 1 to N.

    Raises:
        BadInput: if k is not in 1..N.

    Source: Chen et al. 2021, arXiv:2107.03374, eq. 1.

    >>> pass_at_k(np.array([[True, False, False, False]]), 2)
    array([0.5])
    """
    size = correct.shape[1]
    require(1 <= k <= size, f"pass@{k} cannot be estimated from {size} responses: need k in 1..N")
    return np.array(
        [1 - comb(size - int(c), k) / comb(size, k) for c in correct.sum(axis=1)]
    )  # (1)
