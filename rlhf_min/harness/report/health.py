"""What a healthy curve looks like, and where a run's curve stopped looking like it.

The ranges are rules of thumb, wide enough for small models on the embedded world and for pretrained
ones on real text. Leaving one is a reason to look, not yet a proof that something is wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import inf
from statistics import median
from typing import Literal

from rlhf_min.harness.run.reading import Run

IN_A_ROW = 3  # steps outside before a curve has left its range, unless the run ends there


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


@dataclass(frozen=True)
class Curve:
    """A figure of a report: which metrics it draws, and what is healthy.

    `lines` are metrics with their labels. The first that was measured is the one that is judged;
    the figure is left out if there is none. `cure` is what to do where it left its range.
    """

    stage: str
    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    healthy: str
    range: Range
    cure: str

    @property
    def name(self) -> str:
        """The title within a sentence."""
        return self.title if self.title[:2].isupper() else self.title.lower()

    @property
    def key(self) -> str:
        """A name for the figure, unlike all others."""
        return f"{self.stage}-{self.lines[0][0].replace('/', '-')}"

    def judged(self, run: Run) -> tuple[list[int], list[float]]:
        """Steps and values of the line that is judged; empty if none was measured."""
        return run.series(self.stage, self.judged_line(run)[0])

    def judged_line(self, run: Run) -> tuple[str, str]:
        """Metric and label of the line that is judged."""
        measured = (line for line in self.lines if run.series(self.stage, line[0])[0])
        return next(measured, self.lines[0])

    def limits(self, run: Run) -> tuple[float, float]:
        """The lowest and the highest healthy value in this run."""
        config = run.config(self.stage)
        if self.lines[0][0] == "k1" and config.get("kl_control") == "adaptive":
            return Range(-1, 2 * config["kl_target"]).limits([])
        return self.range.limits(self.judged(run)[1])


CURVES = (
    Curve(
        "ppo",
        "Score",
        "",
        (("score", "rollout"), ("eval/score", "eval")),
        "It rises, fast at first, and then flattens; a fall after that is a run that came apart.",
        Range(low=-3, of="steps"),
        "lower --learning_rate or raise --kl_coef; --keep_best eval/score keeps the best model",
    ),
    Curve(
        "ppo",
        "Gold reward",
        "",
        (("gold_reward", "rollout"), ("eval/gold_reward", "eval")),
        "It rises with the score; where it falls while the score goes on rising, the policy "
        "exploits the reward model.",
        Range(low=-3, of="steps"),
        "raise --kl_coef, take fewer --steps, or train the reward model on more pairs",
    ),
    Curve(
        "ppo",
        "KL to the reference",
        "nats per response",
        (("k1", "k1"), ("k3", "k3")),
        "It grows from 0 and levels off, with both estimates together; far above 0 the scores are "
        "of texts that the reward model has never seen, below 0 sampling and scoring disagree.",
        Range(-1, 15),
        "raise --kl_coef or lower --learning_rate",
    ),
    Curve(
        "ppo",
        "Entropy",
        "nats per token",
        (("rollout_entropy", "rollout"),),
        "It sinks slowly as the policy makes up its mind; near 0 all responses are the same, and "
        "nothing more is explored.",
        Range(0.1, 2, of="starts"),
        "raise --kl_coef or take fewer --steps",
    ),
    Curve(
        "ppo",
        "Clipped tokens",
        "share of the update",
        (("clip_fraction", "policy"), ("value_clip_fraction", "value")),
        "A few in a hundred tokens; many mean that an update goes far from the rollout it learns "
        "from.",
        Range(high=0.3),
        "lower --learning_rate or take fewer --epochs",
    ),
    Curve(
        "ppo",
        "Value loss",
        "",
        (("value_loss", "value loss"),),
        "It falls and stays low; rising, it says that the rewards move faster than the values "
        "learn.",
        Range(high=3, of="starts"),
        "lower --learning_rate, or give --normalise_scores",
    ),
    Curve(
        "ppo",
        "Explained variance of the returns",
        "",
        (("explained_variance", "values"),),
        "It climbs from 0 towards 1; clearly below 0 the values are worse than none.",
        Range(low=-0.2),
        "take more --steps or a larger --batch_size",
    ),
    Curve(
        "ppo",
        "Response length",
        "tokens",
        (("response_length", "rollout"), ("eval/response_length", "eval")),
        "It moves only as far as the task asks; running off to the longest or the shortest "
        "response is a cheap trick that the reward pays for.",
        Range(0.5, 2, of="starts"),
        "look at the samples, and let the reward not pay for length",
    ),
    Curve(
        "sft",
        "Loss",
        "nats per token",
        (("eval/loss", "held out"), ("loss", "training")),
        "Both fall together; where the held-out loss turns up, the model learns its examples by "
        "heart.",
        Range(high=1.05, of="starts"),
        "take fewer --epochs or a lower --learning_rate",
    ),
    Curve(
        "reward_model",
        "Pairs ranked right",
        "share",
        (("eval/accuracy", "held out"), ("accuracy", "training")),
        "It climbs from a half and levels off below 1, since people disagree too; training far "
        "above held-out pairs is learning by heart.",
        Range(low=0.5),
        "look whether chosen and rejected are the right way round, or lower --learning_rate",
    ),
    Curve(
        "dpo",
        "Pairs ranked right",
        "share",
        (("eval/accuracy", "held out"), ("accuracy", "training")),
        "It climbs from a half and levels off below 1.",
        Range(low=0.5),
        "look whether chosen and rejected are the right way round, or lower --learning_rate",
    ),
    Curve(
        "dpo",
        "Implicit rewards",
        "nats times beta",
        (
            ("chosen_rewards", "chosen"),
            ("rejected_rewards", "rejected"),
            ("eval/chosen_rewards", "held out"),
            ("eval/rejected_rewards", "held out"),
        ),
        "The rejected one sinks and the chosen one stays near 0; where both sink far, probability "
        "goes to responses that are in no pair.",
        Range(low=-2),
        "raise --beta or lower --learning_rate",
    ),
)


@dataclass(frozen=True)
class Verdict:
    """What there is to say of a run's curve.

    `course` is a sentence on where it went, `finding` one on whether it left its range, `bounds`
    are the range in words, `left` the step and the value with which it left it, if it did, and
    `back` the step at which it was back.
    """

    course: str
    finding: str
    bounds: str
    left: tuple[int, float] | None
    back: int | None = None


def judge(curve: Curve, run: Run) -> Verdict | None:
    """Whether a run's curve kept to its range; None if it was not measured."""
    steps, values = curve.judged(run)
    if not steps:
        return None
    low, high = curve.limits(run)
    bounds = _words(curve, low, high)
    course = f"{number(values[0])} at step {steps[0]}."
    if len(steps) > 1:
        course = f"From {course[:-1]} to {number(values[-1])} at step {steps[-1]}."
    if curve.judged_line(run)[1] == "held out":  # and not the line of training beside it
        course = f"Held out: {course}"
    out = excursion(values, low, high)
    if out is None:
        return Verdict(course, "It stayed in its range.", bounds, None)
    first, back = out
    left, end = (steps[first], values[first]), "did not come back"
    if back is not None:
        end = f"was back at step {steps[back]}"
    finding = f"It left its range at step {left[0]} with {number(left[1])} and {end}."
    return Verdict(course, finding, bounds, left, None if back is None else steps[back])


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


def _words(curve: Curve, low: float, high: float) -> str:
    """The range in words, and where its limits come from."""
    if high == inf:
        words = f"at least {low:.3g}"
    elif low == -inf:
        words = f"at most {high:.3g}"
    else:
        words = f"{low:.3g} to {high:.3g}"
    given = [f"{abs(x):g}" for x in (curve.range.low, curve.range.high) if x is not None]
    if curve.range.of == "starts":
        times = "" if given == ["1"] else f"{' to '.join(given)} times "
        words += f" ({times}where it began)"
    elif curve.range.of == "steps":
        words += f" (where it began less {given[0]} times its usual change in a step)"
    return words
