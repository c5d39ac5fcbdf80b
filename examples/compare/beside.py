"""What is told of two finished runs side by side: as text, and as JSON."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from compare.logged import Series, canonical


@dataclass(frozen=True)
class Pair:
    """A metric that both runs have logged.

    Args:
        name: ours.
        trl: as the other run's file has it.
        what: the number is.
        means: the two definitions, where they differ.
        ours, theirs: all that was logged, theirs times the factor of `Metric`.
        common: the steps that are compared; ours there, and theirs.
        left_out: how many common steps are left out, since a value is not finite.
    """

    name: str
    trl: str
    what: str
    means: tuple[str, str] | None
    ours: Series
    theirs: Series
    common: dict[int, tuple[float, float]]
    left_out: int = 0

    @property
    def title(self) -> str:
        """Ours, and theirs if it is called otherwise."""
        return self.name if canonical(self.trl) == self.name else f"{self.name} = {self.trl}"

    @property
    def gaps(self) -> dict[int, float]:
        """Ours less theirs at each common step."""
        return {step: ours - theirs for step, (ours, theirs) in self.common.items()}

    @property
    def worst(self) -> int | None:
        """The step of the largest gap; None if no step is common."""
        gaps = self.gaps
        return max(gaps, key=lambda step: abs(gaps[step]), default=None)


@dataclass
class Beside:
    """Both runs side by side.

    Args:
        stage: which both are.
        trainer: trl's class that logged theirs; "" where it was another codebase.
        axis: what the steps count.
        pairs: the metrics that are compared.
        alone: what is not compared, and why.
        notes: on how it was read and brought onto one axis.
    """

    trl_run: str
    run: str
    stage: str
    trainer: str
    axis: str
    pairs: list[Pair] = field(default_factory=list)
    alone: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def theirs(self) -> str:
        """Their file, and what wrote it."""
        return f"{self.trl_run} ({self.trainer})" if self.trainer else self.trl_run


def told(beside: Beside) -> Iterator[str]:
    """Lines: what was read, the table, what differs by definition, what is left alone."""
    yield f"theirs: {beside.theirs}"
    yield f"ours: {beside.run} ({beside.stage})"
    yield f"axis: {beside.axis}"
    yield from (f"  - {note}" for note in beside.notes)
    yield ""
    yield from _table(beside)
    defined = {pair.trl: pair for pair in beside.pairs if pair.means}
    if defined:
        yield "\n* not the same number by definition:"
    for name, pair in defined.items():
        theirs, ours = pair.means or ("", "")
        yield f"  {pair.name} / {name}: theirs is {theirs}; ours is {ours}"
    if beside.alone:
        yield "\nnot compared:"
    why: dict[str, list[str]] = {}
    for name, reason in beside.alone.items():
        why.setdefault(reason, []).append(name)
    yield from (f"  {', '.join(names)}: {reason}" for reason, names in why.items())


HEAD = (
    *("metric", "ours: last", "theirs", "ours: mean", "theirs"),
    *("largest gap", "at step", "mean gap", "common steps"),
)


def _table(beside: Beside) -> Iterator[str]:
    rows = [HEAD, *(_row(pair) for pair in beside.pairs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *cells in rows:
        cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *cells])


def _row(pair: Pair) -> tuple[str, ...]:
    name = pair.title + "*" * bool(pair.means)
    columns = zip(_last_mean(pair.ours), _last_mean(pair.theirs), strict=True)
    numbers = [f"{value:.5g}" for column in columns for value in column]
    gaps, worst = pair.gaps, pair.worst
    if worst is None:
        return (name, *numbers, "-", "-", "-", "0")
    mean = fmean(map(abs, gaps.values()))
    found = [f"{abs(gaps[worst]):.1e}", str(worst), f"{mean:.1e}", str(len(gaps))]
    if not gaps[worst]:
        found[:3] = "0", "-", "0"
    return (name, *numbers, *found)


def _last_mean(series: Series) -> tuple[float, float]:
    """The last value, and the mean of those that are finite."""
    finite = [value for value in series.values() if math.isfinite(value)]
    return series[max(series)], fmean(finite) if finite else math.nan


def as_json(beside: Beside) -> dict[str, Any]:
    """All of it, for other programs; null is what is not finite."""
    kept = ("trl_run", "run", "stage", "trainer", "axis", "notes")
    return {
        **{name: getattr(beside, name) for name in kept},
        "metrics": [_metric(pair) for pair in beside.pairs],
        "not_compared": beside.alone,
    }


def _metric(pair: Pair) -> dict[str, Any]:
    gaps, worst = pair.gaps, pair.worst
    return {
        "name": pair.name,
        "theirs_is_called": pair.trl,
        "what": pair.what,
        "definitions": pair.means and dict(zip(("theirs", "ours"), pair.means, strict=True)),
        **{
            who: {
                "last": _or_null(_last_mean(series)[0]),
                "mean": _or_null(_last_mean(series)[1]),
                "steps": list(series),
                "values": [_or_null(value) for value in series.values()],
            }
            for who, series in (("ours", pair.ours), ("theirs", pair.theirs))
        },
        "largest_gap": None if worst is None else abs(gaps[worst]),
        "at_step": worst,
        "mean_gap": fmean(map(abs, gaps.values())) if gaps else None,
        "mean_of_ours_less_theirs": fmean(gaps.values()) if gaps else None,
        "common_steps": list(gaps),
        "common_steps_not_finite": pair.left_out,
    }


def _or_null(value: float) -> float | None:
    return value if math.isfinite(value) else None
