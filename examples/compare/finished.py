"""A finished run of trl's, or of another codebase, beside a finished run of ours.

Works on files alone: neither trl nor a model is loaded.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from compare.beside import Beside, Pair, as_json, told
from compare.logged import Logged, Series, read
from compare.names import METRICS, Metric
from rlhf_min.errors import BadInput, require
from rlhf_min.harness.run.atomic import write_file
from rlhf_min.harness.run.layout import METRICS as METRICS_FILE
from rlhf_min.harness.run.reading import Run, read_run

PICTURE, DATA = "beside_trl.png", "beside_trl.json"

Key = tuple[str, str]  # of `METRICS`
STAGES = {"sft": "sft", "reward": "reward_model", "dpo": "dpo", "ppo": "ppo"}  # in a run of ours
AXES = {"ppo": "rollouts"}  # the others: optimizer steps
COMPARED = [key for key in METRICS if key[0] in STAGES]
# What transformers logs as it is at the step; all else is a mean since the last time.
AT_THE_STEP = {"grad_norm", "learning_rate"}
SFT = "mean_token_accuracy"  # DPO has it too, but beside its rewards
# Metrics by which a run is known whose algorithm is not compared here.
FOREIGN = {
    "KTO": {"kl", "rewards/chosen"},
    "ORPO": {"log_odds_ratio"},
    "GRPO or RLOO": {"frac_reward_zero_std"},
}
NOTHING = 1e-5  # a margin that is rounding
NOT_HERE = "no counterpart here"


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
    from compare import picture  # matplotlib takes a second: what can be refused is refused before

    try:
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / DATA, json.dumps(as_json(beside), allow_nan=False) + "\n")
        picture.write(out / PICTURE, beside)
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be written: {error.strerror}") from error
    print(f"\n{out / PICTURE}, {out / DATA}")


def lay_beside(logged: Logged, run: Run, stage: str | None) -> Beside:
    """All that both have, on one axis, and what only one of them has.

    Raises:
        BadInput: if it is not clear what kind of run the logged one is, or if ours has none such.
    """
    stage, trainer = which(logged, stage)
    ours, table = _ours(run, STAGES[stage]), METRICS[stage, trainer]
    if not _is_trl(logged, table):
        trainer = ""
    axis = AXES.get(stage, "optimizer steps")
    beside = Beside(str(logged.file), str(run.folder), stage, trainer, axis)
    beside.notes += logged.notes
    beside.notes += [f"ours: {line}" for line in run.left_out if line.startswith(METRICS_FILE)]
    _match(beside, logged, ours, table)
    require(
        bool(beside.pairs),
        f"{logged.file}: none of its metrics is one that {run.folder} has logged of {stage}: "
        f"{_some(logged.series)}",
    )
    beside.notes += [*_signs_of_nothing(beside), *_on_the_axis(beside, logged), *_older(beside)]
    return beside


# Which is which


def which(logged: Logged, stage: str | None) -> Key:
    """The stage and trl's class that logged this, by the names that only they have."""
    names = {name.removeprefix("eval/") for name in [*logged.series, *logged.others]}
    foreign = [algorithm for algorithm, signs in FOREIGN.items() if signs <= names]
    require(
        not foreign or stage is not None,
        f"{logged.file}: is a run of {''.join(foreign[:1])}, which is not compared; give one of "
        f"{', '.join(STAGES)}",
    )
    known = {key: names & _names(key) for key in COMPARED}
    require(
        any(known.values()),
        f"{logged.file}: has no metric that trl or we have, but {_some(names)}; give lines with "
        "step, name, value, and trl's or our names",
    )
    own = {
        key: known[key] - set().union(*(_names(k) for k in COMPARED if k != key)) for key in known
    }
    signs = {key: found for key, found in own.items() if found}
    if not signs and SFT in names:
        signs = {key: {SFT} for key in COMPARED if key[0] == "sft"}
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
    keys = [key for key in COMPARED if key[0] == stage]
    return max(keys, key=lambda key: (len(own[key]), len(known[key])))


def _is_trl(logged: Logged, table: Sequence[Metric]) -> bool:
    """Whether it was trl: lines of another codebase may use nothing but our names."""
    trl = {metric.trl for metric in table if metric.trl != metric.ours}
    return logged.form != "long" or any(name.removeprefix("eval/") in trl for name in logged.series)


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
                    require(
                        value is None or isinstance(value, (int, float)),
                        f"{run.folder / METRICS_FILE}: {name} of step {row['step']} is {value!r}, "
                        "not a number; put the file back as the run wrote it",
                    )
                    series.setdefault(name, {})[row["step"]] = math.nan if value is None else value
    return series


# What is compared


def _match(
    beside: Beside, logged: Logged, ours: Mapping[str, Series], table: Sequence[Metric]
) -> None:
    """Each metric of the one with that of the other."""
    by_trl = {metric.trl: metric for metric in table}
    our_names = {metric.ours for metric in table} | {x.removeprefix("eval/") for x in ours}
    for name in [*logged.series, *(x for x in logged.others if x not in logged.series)]:
        base = name.removeprefix("eval/")
        prefix = name[: len(name) - len(base)]
        metric = by_trl.get(base) or (Metric(base, base) if base in our_names else None)
        called = logged.names[name]
        if metric is None:
            beside.alone[called] = "neither trl's name nor ours"
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
    _list_ours(beside, ours, table)


def _list_ours(beside: Beside, ours: Mapping[str, Series], table: Sequence[Metric]) -> None:
    """What ours alone has logged, and what trl calls it."""
    trl = {metric.ours: metric.trl for metric in table if metric.ours}
    found = {pair.name for pair in beside.pairs}
    for name in (x for x in ours if x not in found):
        base = name.removeprefix("eval/")
        called = f"{'eval_' * (base != name)}{trl.get(base, '')}"
        why = "trl has none" if beside.trainer else "not logged there"
        if base in trl and beside.trainer:
            why = f"trl's {called} was not logged"
        group, inside, _ = base.partition("/")
        beside.alone[f"{group}/... (ours)" if inside else f"{name} (ours)"] = why


def _place(order: list[str], name: str) -> tuple[bool, int]:
    """As in the table of the metrics, those of held-out rows after all others."""
    base = name.removeprefix("eval/")
    return base != name, order.index(base) if base in order else len(order)


def _pair(
    prefix: str, called: str, metric: Metric, ours: Series, logged: Series, averaged: bool
) -> Pair:
    """One metric; ours is averaged over the same steps where theirs is."""
    theirs = {step: metric.factor * value for step, value in sorted(logged.items())}
    mine = _averaged(ours, list(theirs)) if averaged else ours
    both = {step: (mine[step], theirs[step]) for step in theirs if step in mine}
    common = {step: two for step, two in both.items() if all(map(math.isfinite, two))}
    name, what = prefix + metric.ours, metric.what.replace("`", "")
    left_out = len(both) - len(common)
    return Pair(name, called, what, metric.means, mine or ours, theirs, common, left_out)


def _averaged(ours: Series, ends: list[int]) -> Series:
    """Means over the steps up to each of these, and then on at the same distance."""
    every = ends[-1] - (ends[-2] if len(ends) > 1 else 0)
    means: Series = {}
    before = 0
    for end in [*ends, *range(ends[-1] + every, max(ours) + 1, every)]:
        if all(step in ours for step in range(before + 1, end + 1)):
            means[end] = fmean(ours[step] for step in range(before + 1, end + 1))
        before = end
    rest = {step: value for step, value in ours.items() if step > max(means, default=0)}
    if means and rest and max(rest) not in ends:
        means[max(rest)] = fmean(rest.values())
    return means


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
                where = f"at {len(bad)} of {len(series)} steps, first at step {min(bad)}"
                yield f"{pair.name}: {who} is not finite {where}"


def _signs_of_nothing(beside: Beside) -> Iterator[str]:
    """At the first step of DPO the policy is the reference: an accuracy there counts rounding."""
    pairs = {pair.name: pair for pair in beside.pairs}
    if beside.stage == "dpo" and {"margin", "accuracy"} <= pairs.keys():
        accuracies = pairs["accuracy"].common
        margins = pairs["margin"].common.get(1, (math.inf,))
        if 1 in accuracies and max(map(abs, margins)) < NOTHING:
            del accuracies[1]
            yield (
                "accuracy: step 1 is left out, since the policy is the reference there, and the "
                "signs of its margins are rounding"
            )


def _older(beside: Beside) -> Iterator[str]:
    """What older transformers log in another way, by what it looks like."""
    for pair in beside.pairs:
        if pair.name == "loss" and len(pair.theirs) > 1:
            if all(round(value, 4) == value for value in pair.theirs.values()):
                yield "loss: theirs has four decimals, as older transformers log it"
        elif pair.name == "learning_rate":
            ahead = {step: pair.ours[step + 1] for step in pair.common if step + 1 in pair.ours}
            same = all(math.isclose(ahead[s], pair.theirs[s], rel_tol=1e-6) for s in ahead)
            if len(ahead) > 1 and same and any(pair.gaps.values()):
                yield (
                    "learning_rate: theirs is that of the next step, as older transformers log it; "
                    "each step is trained with the same rate"
                )
