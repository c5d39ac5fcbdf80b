"""What a comparison of two live runs has found."""

from dataclasses import dataclass
from typing import Any

from compare.explain import Explanation
from compare.job import Record

WEIGHTS_APART = 1e-8  # in float64; Adam brings the rounding of gradients that are 0 up to 1e-9


@dataclass(frozen=True)
class Weights:
    """How far the weights are apart after the last step, and where most."""

    size: float
    name: str


@dataclass
class Result:
    """A whole comparison: trl's record, what was found, and the weights when all is followed."""

    record: Record
    explanation: Explanation[Any]
    weights: Weights

    @property
    def explained(self) -> bool:
        """Whether no difference stays. Weights in float32 are not judged: Adam divides rounding."""
        exact = self.record.facts["dtype"] == "float64"
        return self.explanation.left is None and not (exact and self.weights.size > WEIGHTS_APART)
