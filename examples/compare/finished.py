"""A finished run of trl's, or of another codebase, beside a finished run of ours.

Works on files alone: neither trl nor a model is loaded.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from compare.logged import Logged, Series, read
from compare.names import METRICS, Metric
from rlhf_min.errors import BadInput, require
from rlhf_min.harness.run.atomic import write_file
from rlhf_min.harness.run.reading import Run, read_run

PICTURE, DATA = "beside_trl.png", "beside_trl.json"

Key = tuple[str, str]  # of `METRICS`
STAGES = {"sft": "sft", "reward": "reward_model", "dpo": "dpo", "ppo": "ppo"}  # in a run of ours
AXES = {"ppo": "rollouts"}  # the others: optimizer steps
# What transformers logs as it is at the step; all else is a mean since the last time.
AT_THE_STEP = {"grad_norm", "learning_rate"}
SFT = "mean_token_accuracy"  # SFT has it from trl 0.20 on; DPO too, but beside its rewards
# A metric that only these have, which are not here.
FOREIGN = {
    "log_odds_ratio": "ORPO",
    "nca_loss": "CPO",
    "frac_reward_zero_std": "GRPO or RLOO",
    "objective/rlhf_reward_std": "RLOO",
}
NOT_HERE = "no counterpart here"


@dataclass(frozen=True)
class Pair:
    """A metric that both runs have logged.

    Args:
        name: ours.
        trl: as the other run's file has it.
        means: the two definitions, where they differ.
        ours, theirs: all that was logged, theirs times the factor of `Metric`.
        common: the steps that are compared; ours there, and theirs.
        left_out: how many common steps are left out, since a value is not finite.
    """

    name: str
    trl: str
    means: tuple[str, str] | None
    ours: Series
    theirs: Series
    common: dict[int, tuple[float, float]]
    left_out: int = 0

    @property
    def gaps(self) -> dict[int, float]:
        """Ours less theirs at each common step."""
        return {step: ours - theirs for step, (ours, theirs) in self.common.items()}


@dataclass
class Beside:
    """Both runs side by side.

    Args:
        stage, trainer: which they are.
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


def compare(trl_run: str, run: str, stage: str | None, out: Path) -> None:
    """Print how far apart the two are, and leave a picture and the numbers in the folder `out`.

    Args:
        trl_run: a folder with a ``trainer_state.json``, or a file that `compare.logged` reads.
        run: folder of a run of ours.
        stage: sft, reward, dpo or ppo; None: found out from the metrics' names.

    Raises:
        BadInput: what cannot be read, or not be compared.
    """
    require(
        stage is None or stage in STAGES,
        f"--stage {stage} is not known; there are {', '.join(STAGES)}",
    )
    beside = lay_beside(read(Path(trl_run)), read_run(Path(run)), stage)
    for line in told(beside):
        print(line)
    write_file(_folder(out) / DATA, json.dumps(as_json(beside), allow_nan=False) + "\n")
    from compare import picture  # matplotlib takes a second: what can be refused is refused before

    picture.write(out / PICTURE, beside)
    print(f"\n{out / PICTURE}, {out / DATA}")


def _folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be made: {error.strerror}") from error
    return out


def lay_beside(logged: Logged, run: Run, stage: str | None) -> Beside:
    """All that both have, on one axis, and what only one of them has.

    Raises:
        BadInput: if it is not clear what kind of run the logged one is, or if ours has none such.
    """
    stage, trainer = which(logged, stage)
    ours = _ours(run, STAGES[stage])
    beside = Beside(
        str(logged.file), str(run.folder), stage, trainer, AXES.get(stage, "optimizer steps")
    )
    beside.notes += logged.notes
    _match(beside, logged, ours)
    require(
        bool(beside.pairs),
        f"{logged.file}: none of its metrics is one that {run.folder} has logged of {stage}: "
        f"{_some(logged.series)}",
    )
    beside.notes += _on_the_axis(beside, logged)
    return beside


# Which is which


def which(logged: Logged, stage: str | None) -> Key:
    """The stage and trl's class that logged this, by the names that only they have."""
    names = {name.removeprefix("eval/") for name in [*logged.series, *logged.others]}
    foreign = next((FOREIGN[name] for name in FOREIGN if name in names), None)
    require(
        foreign is None or stage is not None,
        f"{logged.file}: is a run of {foreign}, which is not here; give one of {', '.join(STAGES)}",
    )
    known = {key: names & _names(key) for key in METRICS}
    require(
        any(known.values()),
        f"{logged.file}: has no metric that trl or we have, but {_some(names)}; give lines with "
        "step, name, value, and trl's or our names",
    )
    own = {
        key: known[key] - set().union(*(_names(k) for k in METRICS if k != key)) for key in known
    }
    signs = {key: found for key, found in own.items() if found}
    if not signs and SFT in names:
        signs = {key: {SFT} for key in METRICS if key[0] == "sft"}
    stages = sorted({key[0] for key in signs})
    by = "; ".join(f"{key[0]} ({_some(found)})" for key, found in signs.items())
    if stage is None:
        what = f"has metrics of several: {by}" if stages else "could be a run of several kinds"
        require(
            len(stages) == 1,
            f"{logged.file}: {what}; it has {_some(names)}; give --stage {'|'.join(STAGES)}",
        )
        (stage,) = stages
    require(
        not stages or stage in stages,
        f"{logged.file}: --stage {stage}, but by its metrics it is {by}",
    )
    keys = [key for key in METRICS if key[0] == stage]
    return max(keys, key=lambda key: (len(own[key]), len(known[key])))


def _names(key: Key) -> set[str]:
    """Trl's and ours."""
    return {name for metric in METRICS[key] for name in (metric.trl, metric.ours) if name}


def _some(names: Sequence[str] | set[str] | Mapping[str, Any]) -> str:
    some = sorted(names)
    return ", ".join(some[:6]) + (f" and {len(some) - 6} more" if len(some) > 6 else "")


def _ours(run: Run, stage: str) -> dict[str, Series]:
    """What our run has logged of a stage; what was not finite is NaN."""
    has = ", ".join(run.stages) or "none"
    require(stage in run.stages, f"{run.folder}: has no step of {stage}; the stages it has: {has}")
    series: dict[str, Series] = {}
    for row in run.rows:
        if row["stage"] == stage:
            for name, value in row.items():
                if name not in ("stage", "step"):
                    number = math.nan if value is None else float(value)
                    series.setdefault(name, {})[row["step"]] = number
    return series


# What is compared


def _match(beside: Beside, logged: Logged, ours: Mapping[str, Series]) -> None:
    """Each metric of the one with that of the other."""
    table = METRICS[beside.stage, beside.trainer]
    by_trl = {metric.trl: metric for metric in table}
    our_names = {metric.ours for metric in table} | {x.removeprefix("eval/") for x in ours}
    for name in [*logged.series, *(x for x in logged.others if x not in logged.series)]:
        base = name.removeprefix("eval/")
        prefix = name[: len(name) - len(base)]
        metric = by_trl.get(base) or (Metric(base, base) if base in our_names else None)
        called = logged.names[name]
        if metric is None:
            beside.alone[called] = "not in the table of trl's metrics"
        elif not metric.ours:
            beside.alone[called] = NOT_HERE
        elif name in logged.others:
            raise BadInput(logged.others[name])
        elif prefix + metric.ours not in ours:
            beside.alone[called] = f"our run has not logged {prefix + metric.ours}"
        else:
            averaged = logged.form != "long" and beside.stage in ("sft", "reward", "dpo")
            averaged = averaged and not prefix and metric.trl not in AT_THE_STEP
            mine = ours[prefix + metric.ours]
            beside.pairs.append(_pair(prefix, called, metric, mine, logged.series[name], averaged))
    order = [metric.ours for metric in table]
    beside.pairs.sort(key=lambda pair: _place(order, pair.name))
    theirs = {metric.ours: metric.trl for metric in table if metric.ours}
    found = {pair.name for pair in beside.pairs}
    for name in (x for x in ours if x not in found and "/" not in x.removeprefix("eval/")):
        base = name.removeprefix("eval/")
        prefix = "eval_" * (base != name)
        there = f"trl's {prefix}{theirs[base]} was not logged" if base in theirs else "trl has none"
        beside.alone[f"{name} (ours)"] = there


def _place(order: list[str], name: str) -> tuple[bool, int]:
    """As in the table of the metrics, those of held-out rows after all others."""
    base = name.removeprefix("eval/")
    return base != name, order.index(base) if base in order else len(order)


def _pair(
    prefix: str, called: str, metric: Metric, ours: Series, logged: Series, averaged: bool
) -> Pair:
    """One metric; ours is averaged over the same steps where theirs is."""
    theirs = {step: metric.factor * value for step, value in sorted(logged.items())}
    common: dict[int, tuple[float, float]] = {}
    left_out, last = 0, 0
    for step, value in theirs.items():
        since = range(last + 1, step + 1) if averaged else [step]
        last = step
        if all(x in ours for x in since):
            mine = fmean(ours[x] for x in since)
            if math.isfinite(mine) and math.isfinite(value):
                common[step] = mine, value
            else:
                left_out += 1
    return Pair(prefix + metric.ours, called, metric.means, ours, theirs, common, left_out)


def _on_the_axis(beside: Beside, logged: Logged) -> Iterator[str]:
    """How two runs of different length or interval are compared, and what is not finite."""
    train = [pair for pair in beside.pairs if not pair.name.startswith("eval/")]
    if train:
        ours, theirs = max(train[0].ours), max(max(pair.theirs) for pair in train)
        if ours != theirs:
            until = min(ours, theirs)
            yield f"ours ends at step {ours}, theirs at {theirs}: compared up to step {until}"
        every = [b - a for pair in train for a, b in pairwise(pair.theirs)]
        if logged.form != "long" and beside.stage != "ppo" and max(every, default=1) > 1:
            yield (
                f"theirs is logged every {max(set(every), key=every.count)} steps, as the mean "
                "since the last time: ours is averaged over the same steps (learning_rate and "
                "grad_norm: as they are at the step)"
            )
    for pair in beside.pairs:
        if not pair.common and not pair.left_out:
            yield f"{pair.name}: no step is common, so it is drawn and not compared"
        for who, series in (("ours", pair.ours), ("theirs", pair.theirs)):
            bad = [step for step, value in series.items() if not math.isfinite(value)]
            if bad:
                yield f"{pair.name}: {who} is not finite at {len(bad)} steps, first at {min(bad)}"


# What is told


def told(beside: Beside) -> Iterator[str]:
    """Lines: what was read, the table, what differs by definition, what is left alone."""
    yield f"theirs: {beside.trl_run} ({beside.trainer})"
    yield f"ours: {beside.run} ({STAGES[beside.stage]})"
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
    same = pair.trl.removeprefix("train/") == pair.name
    name = (pair.name if same else f"{pair.name} = {pair.trl}") + "*" * bool(pair.means)
    columns = zip(_last_mean(pair.ours), _last_mean(pair.theirs), strict=True)
    numbers = [f"{value:.5g}" for column in columns for value in column]
    gaps = pair.gaps
    if not gaps:
        return (name, *numbers, "-", "-", "-", "0")
    worst = max(gaps, key=lambda step: abs(gaps[step]))
    mean = fmean(map(abs, gaps.values()))
    found = f"{abs(gaps[worst]):.1e}", str(worst), f"{mean:.1e}", str(len(gaps))
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
    gaps = pair.gaps
    worst = max(gaps, key=lambda step: abs(gaps[step]), default=None)
    return {
        "name": pair.name,
        "theirs_is_called": pair.trl,
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
