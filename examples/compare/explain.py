"""Why two runs differ: known causes are followed one at a time until the gap is closed."""

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
SMALLER = 0.5  # a cause that cannot close a gap must at least halve it


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
    """A cause that matters, and the gap before our side followed trl in it and after."""

    cause: Cause[Setup]
    before: Gap
    after: float


@dataclass
class Explanation(Generic[Setup]):
    """What was found.

    Args:
        base: our metrics as they are by our own conventions.
        best: our metrics when all is followed that was found to matter.
        first: where the two differ at first, or None if they agree.
        followed: the causes that matter, in the order in which they close the gap.
        without_effect: what differs and changes no number.
        cannot: what differs and cannot be followed.
        left: the gap that stays, or None.
    """

    base: list[dict[str, float]]
    best: list[dict[str, float]]
    first: Gap | None
    followed: list[Followed[Setup]] = field(default_factory=list)
    without_effect: list[Cause[Setup]] = field(default_factory=list)
    cannot: list[Cause[Setup]] = field(default_factory=list)
    left: Gap | None = None


def first_gap(
    ours: Iterable[Mapping[str, float]], theirs: Steps, tolerances: Mapping[str, float]
) -> Gap | None:
    """The first step in which a metric of both is off, by the loss if that is off too.

    It takes no further step of `ours` than it needs.
    """
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=False), 1):
        off = {
            name: excess
            for name in mine
            if name in other
            and name not in NOISY
            and (excess := _excess(name, mine[name], other[name], tolerances)) > 1
        }
        if off:
            name = "loss" if "loss" in off else max(off, key=lambda name: off[name])
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
        base: what `run(setup)` gave.
        finished: called after the run that follows every cause, when its weights are there.
    """
    first = first_gap(base, theirs, tolerances)
    able = [cause for cause in causes if cause.follow is not None]
    cannot = [cause for cause in causes if cause.follow is None]
    if not able:
        return Explanation(base, base, first, cannot=cannot, left=first)
    best = list(run(following(setup, able)))
    finished()
    left = first_gap(best, theirs, tolerances)
    found = Explanation(base, best, first, cannot=cannot, left=left)
    search = _Search(run, setup, theirs, tolerances)
    if first is not None:
        needed = search.needed(able) if left is None else able
        found.followed = search.in_order(needed, first, closes=left is None)
    names = {followed.cause.name for followed in found.followed}
    found.without_effect = [cause for cause in able if cause.name not in names]
    return found


@dataclass
class _Search(Generic[Setup]):
    run: Run[Setup]
    setup: Setup
    theirs: Steps
    tolerances: Mapping[str, float]

    def gap(self, causes: Sequence[Cause[Setup]]) -> Gap | None:
        """The first gap when these are followed; no further step is taken."""
        return first_gap(self.run(following(self.setup, causes)), self.theirs, self.tolerances)

    def needed(self, causes: Sequence[Cause[Setup]]) -> list[Cause[Setup]]:
        """Of causes that together close the gap those without which it opens again."""
        needed = list(causes)
        for cause in causes:
            others = [other for other in needed if other is not cause]
            if len(needed) > 1 and self.gap(others) is None:
                needed = others
        return needed

    def in_order(
        self, causes: Sequence[Cause[Setup]], first: Gap, *, closes: bool
    ) -> list[Followed[Setup]]:
        """Follow that cause next which leaves the smallest gap where the runs first differ.

        If none makes it much smaller, as where rows and their texts differ, the first one is next.
        """
        followed: list[Followed[Setup]] = []
        left, gap = list(causes), first
        while left:
            on = [f.cause for f in followed]
            sizes = [self.size_at(gap, [*on, cause]) for cause in left]
            after = min(sizes)
            best = left[sizes.index(after)]
            if after > SMALLER * gap.size:  # none of them helps much
                if not closes:
                    break
                best, after = left[0], sizes[0]
            followed.append(Followed(best, gap, after))
            left.remove(best)
            if not left:
                break
            rest = self.gap([*on, best])
            if rest is None:
                break
            gap = rest
        return followed

    def size_at(self, gap: Gap, causes: Sequence[Cause[Setup]]) -> float:
        """How large that gap is when these are followed."""
        for number, metrics in enumerate(self.run(following(self.setup, causes)), 1):
            if number == gap.step:
                return _size(metrics[gap.metric], gap.theirs)
        return math.inf


def following(setup: Setup, causes: Iterable[Cause[Setup]]) -> Setup:
    """The setup with all of these causes followed."""
    for cause in causes:
        assert cause.follow is not None
        setup = cause.follow(setup)
    return setup


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
        "cannot": [cause.says for cause in explanation.cannot],
        "left": None if left is None else vars(left),
    }
