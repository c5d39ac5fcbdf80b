"""Why two runs differ: all known causes are followed, and then each in turn is not."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

from compare.conventions import Cause, Setup

Steps = Sequence[Mapping[str, float]]
Run = Callable[[Setup], Iterator[dict[str, float]]]

# How far two right runs may be apart, by metric: "" is all others. Differences are taken relative
# to numbers above 1; a learning rate's and a norm's always.
TOLERANCES = {
    "float64": {"": 1e-9, "grad_norm": 1e-8},
    "float32": {"": 1e-4, "loss": 1e-5, "grad_norm": 1e-2, "learning_rate": 1e-6},
}
RELATIVE = ("grad_norm", "learning_rate")
NOISY = ("accuracy",)  # which a margin of rounding alone turns; shown, and not searched by
WIDER = 2.0  # where a gap stays anyway, a cause matters if without it a gap is so much wider


@dataclass(frozen=True)
class Gap:
    """The first step at which two runs are further apart than rounding, and where they are it."""

    step: int  # from 1 on
    metric: str
    ours: float
    theirs: float

    @property
    def size(self) -> float:
        """As it is printed: the absolute difference."""
        return _size(self.ours, self.theirs)


@dataclass
class Followed(Generic[Setup]):
    """A cause that matters.

    Args:
        cause: the cause.
        before: the gap if our side follows trl in all else and not in this.
        after: the same difference once it is followed too.
    """

    cause: Cause[Setup]
    before: Gap
    after: float


@dataclass
class Explanation(Generic[Setup]):
    """What was found.

    Args:
        base: our metrics by our own conventions, up to the first step that differs.
        best: our metrics when all is followed that was found to matter.
        first: where the two differ at first, or None if they agree.
        followed: the causes that matter; first those that are seen first, in a loss, and most.
        without_effect: what differs and changes no metric.
        in_weights: what does so and changes the weights, where no metric differs.
        cannot: what differs and cannot be followed.
        left: the gap that stays, or None.
    """

    base: list[dict[str, float]]
    best: list[dict[str, float]]
    first: Gap | None
    followed: list[Followed[Setup]] = field(default_factory=list)
    without_effect: list[Cause[Setup]] = field(default_factory=list)
    in_weights: list[Cause[Setup]] = field(default_factory=list)
    cannot: list[Cause[Setup]] = field(default_factory=list)
    left: Gap | None = None


def up_to_gap(
    ours: Iterable[dict[str, float]], theirs: Steps, tolerances: Mapping[str, float]
) -> list[dict[str, float]]:
    """Our metrics up to the first step with a gap; behind it the two are other runs."""
    taken: list[dict[str, float]] = []
    for mine in ours:
        taken.append(mine)
        if first_gap(taken[-1:], theirs[len(taken) - 1 :], tolerances) is not None:
            break
    return taken


def first_gap(
    ours: Iterable[Mapping[str, float]],
    theirs: Steps,
    tolerances: Mapping[str, float],
    stays: Steps = (),
) -> Gap | None:
    """The first step in which a metric of both is off, by a loss if one is off too.

    It takes no further step of `ours` than it needs.

    Args:
        stays: our metrics with gaps that stay anyway. Of these counts what is `WIDER` times as far.
    """

    def allowed(step: int, name: str) -> float:
        anyway = 0.0
        if step <= len(stays) and name in stays[step - 1]:
            other = theirs[step - 1]
            anyway = _excess(name, stays[step - 1][name], other[name], tolerances)
        return WIDER * anyway if anyway > 1 else 1.0

    for number, (mine, other) in enumerate(zip(ours, theirs, strict=False), 1):
        off = {
            name: excess
            for name in mine
            if name in other
            and name not in NOISY
            and (excess := _excess(name, mine[name], other[name], tolerances))
            > allowed(number, name)
        }
        if off:
            name = max(off, key=lambda name: (name.endswith("loss"), off[name]))
            return Gap(number, name, mine[name], other[name])
    return None


def explain(
    run: Run[Setup],
    setup: Setup,
    causes: Sequence[Cause[Setup]],
    theirs: Steps,
    tolerances: Mapping[str, float],
    *,
    base: list[dict[str, float]],
    finished: Callable[[], None] = lambda: None,
) -> Explanation[Setup]:
    """Find which causes explain the difference between our run and trl's metrics.

    Args:
        run: metrics of our run with a setup, step by step; it may be stopped early.
        setup: ours, by our own conventions.
        causes: what is known to differ; each is tried by following it.
        theirs: trl's metrics, step by step, under our names.
        base: what `run(setup)` gave, at least up to the first gap.
        finished: called after the run that follows every cause, when its weights are there.
    """
    first = first_gap(base, theirs, tolerances)
    able = [cause for cause in causes if cause.follow is not None]
    cannot = [cause for cause in causes if cause.follow is None]
    if first is None or not able:
        if first is not None:
            base = list(run(setup))
            finished()
        return Explanation(base, base, first, without_effect=able, cannot=cannot, left=first)
    best = list(run(following(setup, able)))
    finished()
    left = first_gap(best, theirs, tolerances)
    found = Explanation(base, best, first, cannot=cannot, left=left)
    needed = list(able)
    seen = theirs if left is None else theirs[: left.step]  # behind it the two are other runs
    gaps: dict[str, Gap] = {}
    for cause in able:
        others = [other for other in needed if other is not cause]
        without = run(following(setup, others)) if others else base
        gap = first_gap(without, seen, tolerances, best)
        if gap is not None:
            gaps[cause.name] = gap
        else:
            needed = others
    found.followed = [
        Followed(cause, at, _size(best[at.step - 1][at.metric], at.theirs))
        for cause in needed
        if (at := gaps.get(cause.name)) is not None
    ]
    sort(found.followed, first, tolerances)
    found.without_effect = [cause for cause in able if cause.name not in gaps]
    return found


def following(setup: Setup, causes: Iterable[Cause[Setup]]) -> Setup:
    """The setup with all of these causes followed."""
    for cause in causes:
        assert cause.follow is not None
        setup = cause.follow(setup)
    return setup


def sort(followed: list[Followed[Any]], first: Gap, tolerances: Mapping[str, float]) -> None:
    """First the causes that are seen first, in the metric of the first gap, in a loss, and most."""

    def place(gap: Gap) -> tuple[int, bool, bool, float]:
        elsewhere, no_loss = gap.metric != first.metric, not gap.metric.endswith("loss")
        return gap.step, elsewhere, no_loss, -_excess_of(gap, tolerances)

    followed.sort(key=lambda f: place(f.before))


def largest(ours: Steps, theirs: Steps, metric: str) -> float:
    """The largest difference of a metric in any step, 0 where there is none."""
    sizes = [
        _size(mine[metric], other[metric])
        for mine, other in zip(ours, theirs, strict=False)
        if metric in mine and metric in other
    ]
    return max(sizes, default=0.0)


def _size(ours: float, theirs: float) -> float:
    if math.isnan(ours) and math.isnan(theirs):
        return 0.0
    size = abs(ours - theirs)
    return math.inf if math.isnan(size) else size


def _excess(name: str, ours: float, theirs: float, tolerances: Mapping[str, float]) -> float:
    """How many times the tolerance two numbers are apart."""
    scale = max(abs(ours), abs(theirs))
    if name not in RELATIVE:
        scale = max(1.0, scale)
    size = _size(ours, theirs)
    return size / (tolerances.get(name, tolerances[""]) * scale) if size else 0.0


def _excess_of(gap: Gap, tolerances: Mapping[str, float]) -> float:
    return _excess(gap.metric, gap.ours, gap.theirs, tolerances)


def as_json(explanation: Explanation[Any]) -> dict[str, Any]:
    """For a file: names, sentences and gaps."""
    first, left = explanation.first, explanation.left
    return {
        "first": None if first is None else vars(first),
        "followed": [
            {"name": f.cause.name, "says": f.cause.says, "before": vars(f.before), "after": f.after}
            for f in explanation.followed
        ],
        "without_effect": [cause.says for cause in explanation.without_effect],
        "in_weights": [cause.says for cause in explanation.in_weights],
        "cannot": [cause.says for cause in explanation.cannot],
        "left": None if left is None else vars(left),
    }
