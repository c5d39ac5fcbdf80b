"""The findings on a run: what came of it, and what to look at. The page and the terminal show them.

They are made from the run's folder alone, so that an old run, or one that was killed, has them too.
What is particular to a stage stands in its file in ``rlhf_min/harness/stages``.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rlhf_min.harness.report.curves import Curve, Status, modules_of, number, title
from rlhf_min.harness.report.results import MEASURES
from rlhf_min.harness.run.atomic import write_file
from rlhf_min.harness.run.reading import Run, read_run

FINDINGS = "findings.json"
BY_HEART = 0.1  # so much more of the pairs it was trained on are ranked right than of others

_DROPPED = re.compile(r": (\d+) rows? read, .*?(\d+) dropped: (.*)")  # as the loader reports it

Estimated = Mapping[str, Any]  # an estimate as JSON: mean, ci95 and n


@dataclass(frozen=True)
class Finding:
    """Something to look at.

    Args:
        stage: where it was found: ``data``, the name of a stage, or ``test``.
        what: has happened.
        where: in which steps, or on which rows.
        figure: that shows it.
        to_do: next.

    >>> print(Finding("ppo", "ratios above 10", "in 1 of 9 steps (4)", "up to 25", "look at it"))
    PPO: ratios above 10 in 1 of 9 steps (4): up to 25; look at it
    """

    stage: str
    what: str
    where: str = ""
    figure: str = ""
    to_do: str = ""

    def __str__(self) -> str:
        text = f"{title(self.stage)}: {self.what}"
        text += f" {self.where}" if self.where else ""
        text += f": {self.figure}" if self.figure else ""
        return text + (f"; {self.to_do}" if self.to_do else "")


def summary(run: Run) -> tuple[list[str], list[Finding]]:
    """Sentences on what a run reached, the last of which says whether all is well; its findings."""
    found, statuses = findings(run), curve_statuses(run)
    left = sum(status.left is not None for _, status in statuses)
    stayed = {1: "the one curve stayed in its range", 2: "both curves stayed in their range"}
    curves = stayed.get(len(statuses), f"all {len(statuses)} curves stayed in their range")
    if left:
        curves = f"{left} of {len(statuses)} curves left their range"
    sentences = [_standing(run, model) for model in run.models[1:]]
    headlines = [module.headline(run) for module in modules_of(run) if hasattr(module, "headline")]
    sentences += [headline for headline in headlines if headline]
    if found:
        things = f"{len(found)} thing{'s' * (len(found) > 1)} to look at"
        sentences.append(f"{things}; {curves}." if left else f"{things}.")
    elif statuses:
        sentences.append(f"Nothing stands out: {curves}.")
    return sentences, found


def print_summary(folder: Path) -> None:
    """Print a run's summary, and write it as ``findings.json``.

    Raises:
        BadInput: if the folder holds no run.
        OSError: if the file cannot be written.
    """
    run = read_run(folder)
    sentences, found = summary(run)
    print("", *sentences, *(f"  - {finding}" for finding in found), sep="\n")
    write_findings(run)


def write_findings(run: Run) -> None:
    """Write a run's summary into its folder, as data."""
    sentences, found = summary(run)
    content = {"told": sentences, "findings": [asdict(finding) for finding in found]}
    write_file(run.folder / FINDINGS, json.dumps(content, indent=1) + "\n")


def findings(run: Run) -> list[Finding]:
    """All that there is to look at, by stage, the most telling first."""
    found = list(_data(run))
    for stage in run.stages:
        found += _skipped(run, stage)
    for module in modules_of(run):
        found += module.findings(run) if hasattr(module, "findings") else []
    whats = {finding.what for finding in found}
    for curve, status in curve_statuses(run):
        if status.left is None or curve.instead in whats:
            continue
        step, value = status.left
        until = "the end" if status.back is None else f"step {status.back}"
        found.append(
            Finding(
                curve.stage,
                f"the curve of {curve.name} left its range",
                f"from step {step} to {until}",
                f"{number(value)} at first, where {status.range} is healthy",
                curve.cure,
            )
        )
    found += _test(run)
    for line in run.unfinished():
        stage, _, how_far = line.partition(" is ")
        found.append(
            Finding(stage, "is unfinished", "", how_far, f"go on with --resume {run.folder}")
        )
    stages = [module.STAGE for module in modules_of(run)]
    order = [*dict.fromkeys(["data", *stages, *run.stages, *run.notes, "test"])]
    return sorted(found, key=lambda finding: order.index(finding.stage))


def curve_statuses(run: Run) -> list[tuple[Curve, Status]]:
    """Each curve that was measured, with whether it stayed in its range."""
    curves = [curve for module in modules_of(run) for curve in module.CURVES]
    return [(curve, status) for curve in curves if (status := curve.status(run)) is not None]


# Of every run


def _data(run: Run) -> Iterator[Finding]:
    """The warnings of all that was said while the data were read and encoded."""
    for stage in run.notes:
        for line in run.noted(stage, "report") or []:
            _, warns, warning = line.partition("warning: ")
            dropped = _DROPPED.search(line) if stage == "data" else None
            if warns:
                what, _, to_do = warning.partition("; ")
                yield Finding(stage, what, to_do=to_do)
            elif dropped is not None and dropped[2] != "0":
                verb = "was" if dropped[2] == "1" else "were"
                what = f"{dropped[2]} of {dropped[1]} rows {verb} dropped"
                yield Finding("data", what, "", dropped[3], "correct them, or do without")


def _skipped(run: Run, stage: str) -> Iterator[Finding]:
    """Updates that were left out, since numbers overflowed in half precision."""
    steps, counts = run.series(stage, "skipped")
    if counts and counts[-1] > 0:
        first = next(step for step, n in zip(steps, counts, strict=True) if n > 0)
        yield Finding(
            stage,
            f"{counts[-1]:g} update{'s were' if counts[-1] > 1 else ' was'} skipped",
            f"from step {first} on",
            "gradients overflowed in fp16",
            "a few are usual; if there are more, use --precision bf16 or a lower --learning_rate",
        )


def _test(run: Run) -> Iterator[Finding]:
    """Models that ended up below their baseline, or above it by the score alone."""
    for model in run.models[1:]:
        words = {key: _beside(run, model, key) for key in ("score", "gold_reward")}
        below = f"{model} is below {run.models[0]}"
        for key, word in words.items():
            if word == "below":
                yield Finding(
                    "test",
                    f"{below} by the {MEASURES[key]}",
                    "on the test prompts",
                    _two(run, model, key),
                    "look at the samples; train with a lower --learning_rate or nearer to the "
                    "reference (--kl_coef, --beta)",
                )
        if {*words.values()} - {None} == {"against"}:
            yield Finding(
                "test",
                f"{model} is not shown to differ from {run.models[0]}",
                "on the test prompts",
                "; ".join(_two(run, model, key) for key, word in words.items() if word),
                "train longer or with a higher --learning_rate, or compare on more --test_prompts",
            )
        if words["score"] == "above" and words["gold_reward"] in ("below", "against"):
            yield Finding(
                "test",
                f"{model}'s score rose, the gold reward is not shown to have risen",
                "on the test prompts",
                _two(run, model, "gold_reward"),
                "the reward model may be exploited: raise --kl_coef (of DPO: --beta), or train on "
                "more pairs",
            )


# For the stages


def by_heart(trained_on: float, held_out: Estimated) -> bool:
    """Whether a model ranks so many more of the pairs that it was trained on right."""
    return bool(trained_on - held_out["mean"] >= BY_HEART)


def last_fifth(values: Sequence[float]) -> float | None:
    """The mean at the end of a curve."""
    return fmean(values[-max(1, len(values) // 5) :]) if values else None


def interval(estimate: Estimated) -> str:
    """A mean with its interval.

    >>> interval({"mean": 0.5, "ci95": [0.25, 0.75]})
    '0.500 [0.250, 0.750]'
    """
    low, high = estimate["ci95"]
    return f"{estimate['mean']:.3f} [{low:.3f}, {high:.3f}]"


# Words


def _standing(run: Run, model: str) -> str:
    """Where a model stands beside the baseline, in words that the intervals allow."""
    parts = []
    for measure in ("score", "gold_reward"):
        if (word := _beside(run, model, measure)) is not None:
            overlap = " with overlapping intervals" if word == "against" else ""
            ours, theirs = (run.results[name][measure] for name in (model, run.models[0]))
            parts.append(
                f"{MEASURES[measure]} {number(ours['mean'])}, {word} {run.models[0]}'s "
                f"{number(theirs['mean'])}{overlap}"
            )
    if "kl" in run.results[model]:
        parts.append(f"{number(run.results[model]['kl']['mean'])} nats from the reference")
    return f"{model}: {'; '.join(parts)}."


def _beside(run: Run, model: str, measure: str) -> str | None:
    """Whether a model's interval lies above the baseline's, below it, or against it."""
    ours, theirs = (run.results[name].get(measure) for name in (model, run.models[0]))
    if ours is None or theirs is None:
        return None
    (low, high), (their_low, their_high) = ours["ci95"], theirs["ci95"]
    return "above" if low > their_high else "below" if high < their_low else "against"


def _two(run: Run, model: str, measure: str) -> str:
    ours, theirs = (run.results[name][measure] for name in (model, run.models[0]))
    return f"{MEASURES[measure]} {interval(ours)}, {run.models[0]}'s {interval(theirs)}"
