"""Measures of texts: BLEU and ROUGE against references, and diversity. Nothing is downloaded.

nltk and rouge_score are imported where they are used: PPO needs only the diversity.
"""

import re
import string
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import NamedTuple

import numpy as np

from .errors import BadInput, require

ORDERS = (1, 2, 3, 4)
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")

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
    from nltk.translate.bleu_score import closest_ref_length, modified_precision

    check_texts(predictions, references)
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
    from rouge_score.rouge_scorer import RougeScorer

    check_texts(predictions, references)
    scorer = RougeScorer(ROUGE_TYPES)
    rows = [scorer.score_multi(r, p) for p, r in zip(predictions, references, strict=True)]
    return {name: np.array([float(row[name].fmeasure) for row in rows]) for name in ROUGE_TYPES}


def signatures(references: Sequence[Sequence[str]]) -> dict[str, str]:
    """How ``bleu`` and ``rouge`` are computed: without it such a number means little."""
    counts = {len(texts) for texts in references}
    refs = f"refs:{counts.pop() if len(counts) == 1 else 'var'}"
    rouge = f"ROUGE|rouge_score {version('rouge_score')}|stem:no|case:lower|tok:a-z0-9|F1|{refs}"
    return {
        "bleu": f"BLEU|tok:13a|smooth:exp|eff:no|case:mixed|{refs}|corpus|rlhf_min",
        "rouge": rouge,
    }


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
    check_texts(predictions, references)
    n = len(predictions)
    found = {}
    for name, (title, words, least) in _NEEDS.items():
        short = [len(words(text)) < least for text in predictions]
        ref_short = [all(len(words(text)) < least for text in row) for row in references]
        # Of BLEU, which counts all rows together, only the responses' own runs can be missing.
        wholly = all(short) if name == "bleu" else all(map(max, short, ref_short))
        reasons, end = [], ""
        if wholly or any(ref_short):
            less = "fewer" if least > 1 else "none"
            refs = f"{sum(ref_short)} of {n} references"
            reasons.append(f"{refs} and {sum(short)} of {n} responses have {less}")
            zero = "match no run of 4" if name == "bleu" else "count as 0"
            end = "; not measured" if wholly else f"; such rows {zero}"
        parted = sum(any(map(_other_letters, row)) for row in references)
        if name == "rouge1" and parted:
            reasons.append(f"{parted} of {n} references have other letters, which part words")
        if reasons:
            found[name] = Blind(f"{title}: {', '.join(reasons)}{end}", wholly)
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
    ngrams = [ngram for text in ngrams_of_each(texts, n) for ngram in text]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def repeated_ngrams(texts: Sequence[str], n: int) -> float:
    """Share of a text's n-grams that occurred earlier in the same text, averaged over texts.

    A text without an n-gram counts as 0.

    Raises:
        BadInput: no texts, or n below 1.

    >>> repeated_ngrams(["red red red red", "red blue"], 1)  # 3/4 and 0
    0.375
    """
    shares = [1 - len(set(text)) / len(text) if text else 0.0 for text in ngrams_of_each(texts, n)]
    return sum(shares) / len(shares)


def ngrams_of_each(texts: Sequence[str], n: int) -> list[list[tuple[str, ...]]]:
    """The n-grams of each text, in order; `BadInput` for no texts, or n below 1."""
    if not texts:
        raise BadInput("no texts to count n-grams in: give at least one")
    if n < 1:
        raise BadInput(f"n-grams need n of at least 1, but n = {n}")
    tokens = [tokenize_13a(text) for text in texts]
    return [[tuple(row[i : i + n]) for i in range(len(row) - n + 1)] for row in tokens]


def check_texts(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Raise `BadInput` unless every prediction is a text with at least one reference text."""
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
