"""BLEU and ROUGE as metrics of the library evaluate."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from .text_metrics import (
    bleu_from_statistics,
    bleu_statistics,
    blind_spots,
    rouge_scores,
    signatures,
)


class _TextMetric(evaluate.Metric):
    """A metric of texts against references that keeps its inputs in memory, not in files."""

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        texts = datasets.Value("string")
        features = {"predictions": texts, "references": datasets.Sequence(texts)}
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            inputs_description="predictions: texts; references: a list of texts for each.",
            features=datasets.Features(features),
        )


class Bleu(_TextMetric):
    """Corpus BLEU-4, 0 to 100, the number sacrebleu gives by default; a ``note`` of what it misses.

    >>> metric = Bleu()
    >>> metric.compute(predictions=["a small red ball"], references=[["a small red ball"]])
    {'bleu': 100.0, 'signature': 'BLEU|tok:13a|smooth:exp|eff:no|case:mixed|refs:1|corpus|rlhf_min'}
    """

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, Any]:
        total = bleu_statistics(predictions, references).sum(axis=0)
        found = {"bleu": float(bleu_from_statistics(total))}
        return found | _about(predictions, references, "bleu", "bleu")


class Rouge(_TextMetric):
    """ROUGE-1, ROUGE-2 and ROUGE-L: F1, 0 to 1, mean over responses, best reference of each.

    A ``note`` says what it misses, if there is something.

    >>> Rouge().compute(predictions=["the cat"], references=[["the cat sat"]])["rouge1"]
    0.8
    """

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, Any]:
        scores = rouge_scores(predictions, references)
        found = {name: float(values.mean()) for name, values in scores.items()}
        return found | _about(predictions, references, "rouge", "rouge1", "rouge2")


def _about(
    predictions: Sequence[str], references: Sequence[Sequence[str]], metric: str, *measures: str
) -> dict[str, str]:
    """The signature, and the note if there is something to note."""
    blind = blind_spots(predictions, references)
    note = ". ".join(blind[name].reason for name in measures if name in blind)
    return {"signature": signatures(references)[metric]} | ({"note": note} if note else {})
