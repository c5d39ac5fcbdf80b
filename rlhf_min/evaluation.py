"""How good are the responses? BLEU, ROUGE, win rate and diversity, each with its uncertainty.

Everything here works on texts and numbers; nothing is downloaded. A BLEU or ROUGE value means
little without its settings, so both metrics return them as a `signature`. Every interval is a 95 %
interval over questions.
"""

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from math import comb, log, sqrt
from statistics import NormalDist
from typing import Any, NamedTuple

import datasets
import evaluate
import numpy as np
import torch
from nltk.translate.bleu_score import closest_ref_length, modified_precision
from numpy.typing import ArrayLike
from rouge_score.rouge_scorer import RougeScorer

from .data import PromptExample
from .errors import BadInput, require
from .policy import Policy
from .rollout import RewardFunction, Rollout, call_reward, collect

ORDERS = (1, 2, 3, 4)
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
RESAMPLES = 2000
PROMPTS_AT_ONCE = 256
Z95 = NormalDist().inv_cdf(0.975)  # 1.96

# Texts -----------------------------------------------------------------------------------------

# The "13a" rules of the WMT script mteval-v13a, in order. The last three consume the neighbouring
# character, as the script does: "5...5" is therefore "5 . . .5".
_SEPARATED = re.escape("".join(sorted(set(string.punctuation) - set("',-."))))
_RULES_13A = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        ("<skipped>", ""),
        ("-\n", ""),
        ("\n", " "),
        ("&quot;", '"'),
        ("&amp;", "&"),
        ("&lt;", "<"),
        ("&gt;", ">"),
        (f"([{_SEPARATED}])", r" \1 "),
        ("([^0-9])([.,])", r"\1 \2 "),  # a period or comma, unless a digit stands before it
        ("([.,])([^0-9])", r" \1 \2"),  # ... or after it: 1,000.50 stays whole
        ("([0-9])-", r"\1 - "),
    )
]


def tokenize_13a(text: str) -> list[str]:
    """Words and punctuation marks of a text, by the rules of mteval-v13a (WMT; sacrebleu's "13a").

    >>> tokenize_13a("It's 1,000.50, isn't it?")
    ["It's", '1,000.50', ',', "isn't", 'it', '?']
    """
    text = f" {text.rstrip()} "
    for pattern, replacement in _RULES_13A:
        text = pattern.sub(replacement, text)
    return text.split()


def bleu_statistics(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> np.ndarray:  # (N, 10)
    """What BLEU needs to know of each response; sums of rows are the statistics of a corpus.

    Args:
        predictions: N responses.
        references: for each response its reference texts, one or more.

    Returns:
        (N, 10) integers: for n = 1..4 the n-grams that also occur in a reference (each counted at
        most as often as in the reference that has most of it), for n = 1..4 the n-grams, the length
        in tokens, and the length of the reference that is closest in length (the shorter if tied).

    Raises:
        BadInput: nothing to score, unequal lengths, or a row that is not text with references.

    >>> bleu_statistics(["the the cat"], [["the cat", "a cat"]])
    array([[2, 1, 0, 0, 3, 2, 1, 0, 3, 2]])
    """
    _check_texts(predictions, references)
    rows = []
    for prediction, row_references in zip(predictions, references, strict=True):
        tokens = tokenize_13a(prediction)
        ref_tokens = [tokenize_13a(reference) for reference in row_references]
        matches = [modified_precision(ref_tokens, tokens, n).numerator for n in ORDERS]
        # Not the denominators of nltk: they count one n-gram where there is none.
        totals = [max(len(tokens) - n + 1, 0) for n in ORDERS]
        rows.append([*matches, *totals, len(tokens), closest_ref_length(ref_tokens, len(tokens))])
    return np.array(rows)


def bleu_from_statistics(total: np.ndarray) -> np.ndarray:  # (..., 10) -> (...)
    r"""Corpus BLEU-4 from summed statistics, 0 to 100.                     [eq:bleu]

    With m_n of l_n n-grams matched, length c, and summed closest reference length r:

        p_n  = m_n / l_n,   or  2^-k / l_n  for the k-th n with m_n = 0           (1)
        BP   = exp(min(0, 1 - r / c))                                             (2)
        BLEU = 100 * BP * (p_1 * p_2 * p_3 * p_4)^(1/4)                           (3)

    and 0 where no word matches or no response has four tokens (then l_4 = 0).

    Args:
        total: sums of rows of `bleu_statistics`, one corpus per row.

    Returns:
        One score per corpus; for a single row of ten, one number.

    Source: Papineni et al. 2002, section 2.3; the smoothing is method 3 of Chen and Cherry 2014
    ("exp" in sacrebleu, whose numbers these are).

    >>> print(bleu_from_statistics(np.array([4, 3, 2, 1, 4, 3, 2, 1, 4, 4])))
    100.0
    """
    total = np.asarray(total, dtype=np.float64)
    matches, totals = total[..., :4], total[..., 4:8]  # (..., 4) each
    length, ref_length = total[..., 8], total[..., 9]
    missed = matches == 0
    smoothed = np.where(missed, 0.5 ** missed.cumsum(axis=-1), matches)
    precisions = smoothed / np.maximum(totals, 1)  # (1)
    brevity = np.exp(np.minimum(0, 1 - ref_length / np.maximum(length, 1)))  # (2)
    scores = 100 * brevity * precisions.prod(axis=-1) ** 0.25  # (3)
    return np.where((matches[..., 0] > 0) & (totals[..., 3] > 0), scores, 0.0)[()]


def rouge_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, np.ndarray]:  # (N,) each
    """ROUGE-1, ROUGE-2 and ROUGE-L of each response: F1, 0 to 1, of the best reference each.

    Words are lower-cased runs of a-z and 0-9, not stemmed: any other letter separates words.

    Raises:
        BadInput: as `bleu_statistics`.

    Source: Lin 2004; computed by the package rouge_score.

    >>> rouge_scores(["the cat"], [["the cat sat"]])["rouge1"]  # precision 1, recall 2/3
    array([0.8])
    """
    _check_texts(predictions, references)
    scorer = RougeScorer(ROUGE_TYPES)
    rows = [scorer.score_multi(r, p) for p, r in zip(predictions, references, strict=True)]
    return {name: np.array([float(row[name].fmeasure) for row in rows]) for name in ROUGE_TYPES}


class Blind(NamedTuple):
    """What a measure of texts does not see. `wholly`: it sees nothing, and 0 would be no number."""

    reason: str
    wholly: bool


def blind_spots(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, Blind]:
    """Where BLEU and ROUGE are 0 by their definition, whatever the response says; by measure.

    BLEU multiplies the precisions of runs of one to four words, and three words have no run of
    four; ROUGE-2 needs two. Words of ROUGE are made of a-z and 0-9: a text in another script has
    none, and an accented letter parts a word in two. ``rouge1`` stands for ROUGE-L too.

    Raises:
        BadInput: as `bleu_statistics`.

    >>> blind_spots(["Paris"], [["Paris"]])["bleu"].reason
    'BLEU needs 4 words: 1 of 1 references and 1 of 1 responses have fewer; not measured'
    """
    _check_texts(predictions, references)
    n = len(predictions)
    found = {}
    for name, (title, tokenize, least) in _NEEDS.items():
        short = [len(tokenize(text)) < least for text in predictions]
        ref_short = [all(len(tokenize(text)) < least for text in row) for row in references]
        # Of BLEU, which counts all rows together, only the responses' own runs can be missing.
        wholly = all(short) if name == "bleu" else all(map(max, short, ref_short))
        reasons = []
        if wholly or any(ref_short):
            reasons.append(
                f"{sum(ref_short)} of {n} references and {sum(short)} of {n} responses have "
                f"{'fewer' if least > 1 else 'none'}"
            )
        parted = sum(any(map(_other_letters, row)) for row in references)
        if name == "rouge1" and parted:
            reasons.append(f"{parted} of {n} references have other letters, which part words")
        if reasons:
            end = "; not measured" if wholly else ""
            if any(ref_short) and not wholly:
                end = "match no run of 4" if name == "bleu" else "count as 0"
                end = f"; such rows {end}"
            reason = f"{title}: {', '.join(reasons)}{end}"
            found[name] = Blind(reason, wholly)
    return found


def _rouge_words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def _other_letters(text: str) -> bool:
    return any(c.isalnum() and not c.isascii() for c in text)


# What each measure needs of a text: its title, its words, and how many of them.
_NEEDS: dict[str, tuple[str, Callable[[str], list[str]], int]] = {
    "bleu": ("BLEU needs 4 words", tokenize_13a, 4),
    "rouge2": ("ROUGE-2 needs 2 words of a-z and 0-9", _rouge_words, 2),
    "rouge1": ("ROUGE-1 and ROUGE-L need words of a-z and 0-9", _rouge_words, 1),
}


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams per n-gram over all texts together; 0.0 if there is no n-gram.

    Raises:
        BadInput: no texts, or n below 1.

    Source: after Li et al. 2016, arXiv:1510.03055, who divide by the tokens, not the n-grams.

    >>> distinct_n(["red red", "red blue"], 1)
    0.5
    """
    ngrams = [ngram for text in _token_ngrams(texts, n) for ngram in text]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def repeated_ngrams(texts: Sequence[str], n: int) -> float:
    """Share of a text's n-grams that occurred earlier in the same text, averaged over texts.

    A text without an n-gram counts as 0.

    Raises:
        BadInput: no texts, or n below 1.

    >>> repeated_ngrams(["red red red red", "red blue"], 1)  # 3/4 and 0
    0.375
    """
    shares = [1 - len(set(text)) / len(text) if text else 0.0 for text in _token_ngrams(texts, n)]
    return sum(shares) / len(shares)


def _token_ngrams(texts: Sequence[str], n: int) -> list[list[tuple[str, ...]]]:
    """The n-grams of each text, in order."""
    require(len(texts) > 0, "no texts to count n-grams in: give at least one")
    require(n >= 1, f"n-grams need n of at least 1, but n = {n}")
    tokens = [tokenize_13a(text) for text in texts]
    return [[tuple(row[i : i + n]) for i in range(len(row) - n + 1)] for row in tokens]


def _check_texts(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Every prediction is a text and has a list of at least one reference text."""
    require(len(predictions) > 0, "no predictions to score: give at least one")
    require(
        len(predictions) == len(references),
        f"{len(predictions)} predictions but {len(references)} rows of references: "
        "give one list of references for each prediction",
    )
    for row, (prediction, texts) in enumerate(zip(predictions, references, strict=True)):
        if not isinstance(prediction, str):
            raise BadInput(f"predictions, row {row}: {prediction!r} is not a text: give a string")
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
            raise BadInput(f"references, row {row}: {texts!r} is not a list of texts: give [text]")


# Metrics ---------------------------------------------------------------------------------------


class _TextMetric(evaluate.Metric):
    """A metric of texts against references that keeps its inputs in memory, not in files."""

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        texts = datasets.Value("string")
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            inputs_description="predictions: texts; references: a list of texts for each.",
            features=datasets.Features(
                {"predictions": texts, "references": datasets.Sequence(texts)}
            ),
        )


class Bleu(_TextMetric):
    """Corpus BLEU-4, 0 to 100, the number sacrebleu gives by default; a ``note`` of what it misses.

    >>> metric = Bleu()
    >>> metric.compute(predictions=["a small red ball"], references=[["a small red ball"]])
    {'bleu': 100.0, 'signature': 'BLEU|tok:13a|smooth:exp|eff:no|case:mixed|refs:1|corpus|rlhf_min'}
    """

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, Any]:
        total = bleu_statistics(predictions, references).sum(axis=0)
        settings = f"tok:13a|smooth:exp|eff:no|case:mixed|refs:{_reference_count(references)}"
        return {
            "bleu": float(bleu_from_statistics(total)),
            "signature": f"BLEU|{settings}|corpus|rlhf_min",
            **_noted(predictions, references, "bleu"),
        }


class Rouge(_TextMetric):
    """ROUGE-1, ROUGE-2 and ROUGE-L: F1, 0 to 1, mean over responses, best reference of each.

    A ``note`` says what it misses, if there is something.

    >>> Rouge().compute(predictions=["the cat"], references=[["the cat sat"]])["rouge1"]
    0.8
    """

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, Any]:
        scores = rouge_scores(predictions, references)
        settings = f"stem:no|case:lower|tok:a-z0-9|F1|refs:{_reference_count(references)}"
        return {
            **{name: float(values.mean()) for name, values in scores.items()},
            "signature": f"ROUGE|rouge_score {version('rouge_score')}|{settings}",
            **_noted(predictions, references, "rouge1", "rouge2"),
        }


def _noted(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *names: str
) -> dict[str, str]:
    blind = blind_spots(predictions, references)
    reasons = [blind[name].reason for name in names if name in blind]
    return {"note": ". ".join(reasons)} if reasons else {}


def _reference_count(references: list[list[str]]) -> str:
    """How many references each prediction has: "2", or "var" if not all have the same number."""
    counts = {len(texts) for texts in references}
    return str(counts.pop()) if len(counts) == 1 else "var"


# Uncertainty -----------------------------------------------------------------------------------


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


# Models ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """One model's responses to the test prompts, and what they are worth.

    `estimates` holds ``score``, one entry for each monitor, ``win_rate`` and
    ``<monitor>_win_rate`` against the baseline, ``kl`` (nats per response to the reference),
    ``bleu``, ``rouge1``, ``rouge2``, ``rougeL``, ``response_length`` (tokens, EOS included) and
    ``eos_rate``. `shares` holds the share of ties of each win rate, ``distinct_1``, ``distinct_2``
    and ``repeated_4``. `signatures` says how BLEU and ROUGE were computed. What could not be
    measured is not there, and `notes` says why, by measure.
    """

    responses: list[str]
    scores: list[float]
    estimates: dict[str, Estimate]
    shares: dict[str, float]
    signatures: dict[str, str]
    notes: dict[str, str] = field(default_factory=dict)


def evaluate_policies(
    policies: Mapping[str, Policy],
    ref_policy: Policy,
    reward: RewardFunction,
    prompts: Sequence[PromptExample],
    references: Sequence[Sequence[str]],
    *,
    baseline: str,
    monitors: Mapping[str, RewardFunction],
    max_new_tokens: int,
    max_tokens: int,
    seed: int,
) -> dict[str, Evaluation]:
    """Sample every model on the same prompts with the same random numbers, and compare them.

    Args:
        policies: by name.
        ref_policy: what the KL is measured to.
        reward: gives the scores.
        prompts: test prompts; sampled at temperature 1.
        references: one or more reference responses for each prompt; empty for none at all.
        baseline: name of the policy that the others must beat.
        monitors: further rewards by name, such as a known true reward.
        max_new_tokens: longest response.
        max_tokens: padded tokens in one forward pass; a matter of memory only.
        seed: of the samples and of the bootstrap.

    Raises:
        BadInput: no prompts, other than one row of references for each, a baseline that is not
            among the policies, a policy with another vocabulary or no room for a prompt and the
            longest response, or what `bleu_statistics` refuses.
    """
    require(baseline in policies, f"the baseline {baseline!r} is none of {list(policies)}")
    require(len(prompts) > 0, "there is no prompt to evaluate on; give at least one")
    if references:
        _check_texts([prompt.text for prompt in prompts], references)
    for policy in (*policies.values(), ref_policy):
        policy.require_room(([prompt.ids] for prompt in prompts), new_tokens=max_new_tokens)
    samples = {}
    for name, policy in policies.items():
        require(
            policy.tokenizer.get_vocab() == ref_policy.tokenizer.get_vocab(),
            f"model {name!r} has another vocabulary than the reference, so their KL means nothing; "
            "compare models that were trained from the same one",
        )
        rng = torch.Generator().manual_seed(seed)
        samples[name] = [
            collect(
                policy,
                ref_policy,
                reward,
                prompts[start : start + PROMPTS_AT_ONCE],
                max_new_tokens=max_new_tokens,
                temperature=1.0,
                kl="k1",
                max_tokens=max_tokens,
                rng=rng,
            )
            for start in range(0, len(prompts), PROMPTS_AT_ONCE)
        ]
    measured = {name: _measure(rollouts, monitors) for name, rollouts in samples.items()}
    return {
        name: _compare(columns, measured[baseline], references, list(monitors), samples[name], seed)
        for name, columns in measured.items()
    }


def _measure(
    rollouts: Sequence[Rollout], monitors: Mapping[str, RewardFunction]
) -> dict[str, np.ndarray]:
    """One column of N numbers for each quantity that a single response has."""
    columns: dict[str, list[np.ndarray]] = {}
    for rollout in rollouts:
        found = {
            "score": rollout.scores,
            "kl": rollout.kl.sum(1),
            "response_length": rollout.lengths,
            "eos_rate": rollout.ended,
        }
        for name, monitor in monitors.items():
            found[name] = call_reward(monitor, rollout.prompts, rollout.responses, rollout.columns)
        for name, column in found.items():
            columns.setdefault(name, []).append(column.cpu().double().numpy())
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def _compare(
    columns: dict[str, np.ndarray],
    baseline: dict[str, np.ndarray],
    references: Sequence[Sequence[str]],
    monitors: Sequence[str],
    rollouts: Sequence[Rollout],
    seed: int,
) -> Evaluation:
    responses = [text for rollout in rollouts for text in rollout.responses]
    estimates = {name: mean_estimate(column, seed=seed) for name, column in columns.items()}
    shares: dict[str, float] = {}
    for name in ("score", *monitors):
        prefix = "" if name == "score" else f"{name}_"
        estimates[f"{prefix}win_rate"], shares[f"{prefix}ties"] = win_rate(
            columns[name], baseline[name], seed=seed
        )
    signatures, notes = {}, {}
    if references:
        estimates["bleu"] = bleu_estimate(bleu_statistics(responses, references), seed=seed)
        for name, column in rouge_scores(responses, references).items():
            estimates[name] = mean_estimate(column, seed=seed)
        signatures = {
            name: metric.compute(predictions=responses, references=references)["signature"]
            for name, metric in (("bleu", Bleu()), ("rouge", Rouge()))
        }
        for name, blind in blind_spots(responses, references).items():
            notes[name] = blind.reason
            for measure in (name, *(["rougeL"] if name == "rouge1" else [])):
                if blind.wholly:
                    del estimates[measure]
    for name, n in (("distinct_1", 1), ("distinct_2", 2), ("repeated_4", 4)):
        if any(_token_ngrams(responses, n)):
            count = repeated_ngrams if name == "repeated_4" else distinct_n
            shares[name] = count(responses, n)
        else:
            notes[name] = (
                f"{name.replace('_', '-')}: no response has a run of {n} words; not measured"
            )
    return Evaluation(responses, columns["score"].tolist(), estimates, shares, signatures, notes)


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


# Best-of-n


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
