"""What a healthy curve looks like, and where a run's curve stopped looking like it.

Each stage lists its own curves, as ``CURVES`` in ``rlhf_min/harness/stages``. Their ranges are
rules of thumb, wide enough for small models on the embedded world and for pretrained ones on real
text. Leaving one is a reason to look, not yet a proof that something is wrong.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import inf
from statistics import median
from types import ModuleType
from typing import Literal

from rlhf_min.harness.run.layout import stage_modules
from rlhf_min.harness.run.reading import Record, Run

IN_A_ROW = 3  # steps outside before a curve has left its range, unless the run ends there


def modules_of(run: Run) -> list[ModuleType]:
    """The stages' modules, those first that this run came to first."""
    modules = stage_modules()
    return [modules[stage] for stage in dict.fromkeys([*run.stages, *modules]) if stage in modules]


def title(stage: str) -> str:
    """A stage's name for a heading.

    >>> title("reward_model"), title("data")
    ('Reward model', 'Data')
    """
    module = stage_modules().get(stage)
    return module.TITLE if module else stage.capitalize()


@dataclass(frozen=True)
class Range:
    """The values that a healthy curve keeps to; None is no limit.

    `of` says what the limits are: values as they stand; multiples of the curve's first value; or
    how many usual steps, the median change from one step to the next, lie between it and them.
    """

    low: float | None = None
    high: float | None = None
    of: Literal["values", "starts", "steps"] = "values"

    def limits(self, values: Sequence[float]) -> tuple[float, float]:
        """The lowest and the highest healthy value of this curve.

        >>> Range(low=-3, of="steps").limits([5.0, 6.0, 5.0, 7.0])
        (2.0, inf)
        """
        shift, scale = 0.0, 1.0
        if self.of == "starts":
            scale = values[0]
        elif self.of == "steps":
            changes = [abs(b - a) for a, b in pairwise(values)]
            shift, scale = values[0], median(changes or [0.0])
        low = -inf if self.low is None else shift + scale * self.low
        return low, inf if self.high is None else shift + scale * self.high

    def words(self, low: float, high: float) -> str:
        """These limits in words, and where they come from.

        >>> Range(high=3, of="starts").words(-inf, 1.5)
        'at most 1.5 (3 times where it began)'
        """
        words = f"{low:.3g} to {high:.3g}"
        if high == inf:
            words = f"at least {low:.3g}"
        elif low == -inf:
            words = f"at most {high:.3g}"
        factors = [f"{abs(x):g}" for x in (self.low, self.high) if x is not None]
        if self.of == "starts":
            times = "" if factors == ["1"] else f"{' to '.join(factors)} times "
            words += f" ({times}where it began)"
        elif self.of == "steps":
            words += f" (where it began less {factors[0]} times its usual change in a step)"
        return words


@dataclass(frozen=True)
class Status:
    """Where a run's curve went, and whether it left its range.

    Args:
        course: a sentence on where it went.
        sentence: on whether it left its range.
        range: in words.
        left: the step and the value with which it left it, if it did.
        back: the step at which it was back.
    """

    course: str
    sentence: str
    range: str
    left: tuple[int, float] | None = None
    back: int | None = None


@dataclass(frozen=True)
class Curve:
    """A figure of a report: which metrics it draws, and what is healthy.

    Args:
        stage: whose metrics they are.
        title: of the figure.
        unit: of the values.
        lines: metrics with their labels. The first that was measured is checked against the range;
            the figure is left out if none was.
        healthy: a sentence on how it should look.
        range: that it should keep to, or a function that gives it for the options of the stage.
        cure: what to do where it left its range.
        instead: a finding of the stage that says the same, and better.
    """

    stage: str
    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    healthy: str
    range: Range | Callable[[Record], Range]
    cure: str
    instead: str = ""

    @property
    def name(self) -> str:
        """The title within a sentence."""
        return self.title if self.title[:2].isupper() else self.title.lower()

    @property
    def key(self) -> str:
        """A name for the figure, unlike all others."""
        return f"{self.stage}-{self.lines[0][0].replace('/', '-')}"

    def checked_line(self, run: Run) -> tuple[str, str]:
        """Metric and label of the line that is checked against the range."""
        measured = (line for line in self.lines if run.series(self.stage, line[0])[0])
        return next(measured, self.lines[0])

    def checked(self, run: Run) -> tuple[list[int], list[float]]:
        """Steps and values of that line; empty if none was measured."""
        return run.series(self.stage, self.checked_line(run)[0])

    def range_in(self, run: Run) -> Range:
        """The range that it should keep to in this run."""
        return self.range if isinstance(self.range, Range) else self.range(run.config(self.stage))

    def limits(self, run: Run) -> tuple[float, float]:
        """The lowest and the highest healthy value in this run."""
        return self.range_in(run).limits(self.checked(run)[1])

    def status(self, run: Run) -> Status | None:
        """Whether it kept to its range in this run; None if it was not measured."""
        steps, values = self.checked(run)
        if not steps:
            return None
        low, high = self.limits(run)
        course = f"{number(values[0])} at step {steps[0]}."
        if len(steps) > 1:
            course = f"From {course[:-1]} to {number(values[-1])} at step {steps[-1]}."
        if self.checked_line(run)[1] == "held out":  # and not the line of training beside it
            course = f"Held out: {course}"
        words, outside = self.range_in(run).words(low, high), excursion(values, low, high)
        if outside is None:
            return Status(course, "It stayed in its range.", words)
        first, end = outside
        left, back = (steps[first], values[first]), None if end is None else steps[end]
        ending = "did not come back" if back is None else f"was back at step {back}"
        sentence = f"It left its range at step {left[0]} with {number(left[1])} and {ending}."
        return Status(course, sentence, words, left, back)


def excursion(values: Sequence[float], low: float, high: float) -> tuple[int, int | None] | None:
    """Where values leave a range for at least `IN_A_ROW` places or until they end.

    Returns:
        The first place outside and the first one back inside, None if there is none; or None.

    >>> excursion([1, 9, 1, 9, 9, 9, 1], low=0, high=2)
    (3, 6)
    """
    place = 0
    for outside, stretch in groupby(not low <= value <= high for value in values):
        end = place + len(list(stretch))
        if outside and (end - place >= IN_A_ROW or end == len(values)):
            return place, end if end < len(values) else None
        place = end
    return None


def number(value: float) -> str:
    """Three decimals, or three digits of a large number.

    >>> number(0.12345), number(123456), number(-1e-9)
    ('0.123', '1.23e+05', '0.000')
    """
    return f"{value:.3g}" if abs(value) >= 10_000 else f"{round(value, 3) + 0:.3f}"
