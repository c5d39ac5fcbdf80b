"""The verdict on a run: what came of it, and what to look at. The page and the terminal show this.

It is made from the run's folder alone, so that an old run, or one that was killed, has one too.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rlhf_min.harness.report.health import CURVES, Verdict, judge, number
from rlhf_min.harness.report.results import ROWS
from rlhf_min.harness.run.files import write_file
from rlhf_min.harness.run.reading import Run, read_run

FINDINGS = "findings.json"
TITLES = {
    "data": "Data",
    "sft": "SFT",
    "reward_model": "Reward model",
    "ppo": "PPO",
    "dpo": "DPO",
    "test": "Test",
}
RATIO_LIMIT = 10.0  # a policy so far from the one that sampled learns little from its samples
SURE = 2.0  # standard errors
BY_HEART = 0.1  # so much more of the pairs it was trained on are ranked right than of others
TURNED_UP = 1.05  # times its lowest value: a held-out loss that says that examples are learned
FEW_ENDED = 0.9  # of the responses: what is cut was not meant to end there
STEPS_NAMED = 5  # of those that something happened in

_DROPPED = re.compile(r": (\d+) rows? read, .*?(\d+) dropped: (.*)")  # as the loader reports it

Estimated = Mapping[str, Any]  # an estimate as JSON: mean, ci95 and n


@dataclass(frozen=True)
class Finding:
    """Something to look at.

    Args:
        stage: where it was found: ``data``, ``sft``, ``reward_model``, ``ppo``, ``dpo``, ``test``.
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
        told = f"{TITLES.get(self.stage, self.stage)}: {self.what}"
        told += f" {self.where}" if self.where else ""
        told += f": {self.figure}" if self.figure else ""
        return told + (f"; {self.to_do}" if self.to_do else "")


# All of it


def first_lines(run: Run) -> tuple[list[str], list[Finding]]:
    """What a run says of itself first: sentences, the last of which is the verdict, and what to
    look at."""
    found, verdicts = findings(run), curve_verdicts(run)
    left = sum(verdict.left is not None for _, verdict in verdicts)
    some = {1: "the one curve stayed in its range", 2: "both curves stayed in their range"}
    curves = some.get(len(verdicts), f"all {len(verdicts)} curves stayed in their range")
    if left:
        curves = f"{left} of {len(verdicts)} curves left their range"
    told = list(headlines(run))
    if found:
        things = f"{len(found)} thing{'s' * (len(found) > 1)} to look at"
        told.append(f"{things}; {curves}." if left else f"{things}.")
    elif verdicts:
        told.append(f"Nothing stands out: {curves}.")
    return told, found


def conclude(folder: Path) -> None:
    """Print a run's first lines, and write them as ``findings.json``.

    Raises:
        BadInput: if the folder holds no run.
        OSError: if the file cannot be written.
    """
    run = read_run(folder)
    told, found = first_lines(run)
    print("", *told, *(f"  - {finding}" for finding in found), sep="\n")
    write_findings(run)


def write_findings(run: Run) -> None:
    """Write a run's first lines into its folder, as data."""
    told, found = first_lines(run)
    content = {"told": told, "findings": [asdict(finding) for finding in found]}
    write_file(run.folder / FINDINGS, json.dumps(content, indent=1) + "\n")


def headlines(run: Run) -> Iterator[str]:
    """A sentence for each model that was trained: where it stands."""
    yield from (_standing(run, model) for model in run.models[1:])
    steps, losses = run.series("sft", "eval/loss")
    if steps:
        yield (f"SFT: held-out loss {_course(steps, losses)}, in nats per token.")
    if found := _estimates(run):
        rule = max(found["longer_wins"]["mean"], found["shorter_wins"]["mean"])
        yield (
            f"Reward model: ranks {_share(found['accuracy'])} of {found['accuracy']['n']} held-out "
            f"pairs right, the better length rule {rule:.3f}."
        )
    if (change := run.noted("ppo", "change")) is not None:
        yield f"PPO: score {_changed(change)}."
    if (pairs := run.noted("dpo", "accuracy")) is not None:
        yield f"DPO: {_both_accuracies(pairs)}."


def findings(run: Run) -> list[Finding]:
    """All that there is to look at, by stage, the most telling first."""
    found = [*_data(run), *_sft(run), *_reward_model(run), *_ppo(run), *_dpo(run), *_test(run)]
    told = {finding.stage for finding in found if finding.what == _TURNED_UP}
    for curve, verdict in curve_verdicts(run):
        if verdict.left is None or (curve.stage in told and curve.title == "Loss"):
            continue
        step, value = verdict.left
        until = "the end" if verdict.back is None else f"step {verdict.back}"
        found.append(
            Finding(
                curve.stage,
                f"the curve of {curve.name} left its range",
                f"from step {step} to {until}",
                f"{number(value)} at first, where {verdict.bounds} is healthy",
                curve.cure,
            )
        )
    found += [Finding(*told) for told in _unfinished(run)]
    return sorted(found, key=lambda finding: list(TITLES).index(finding.stage))


def curve_verdicts(run: Run) -> list[tuple[Any, Verdict]]:
    """Each curve that was measured, with whether it stayed in its range."""
    found = [(curve, judge(curve, run)) for curve in CURVES]
    return [(curve, verdict) for curve, verdict in found if verdict is not None]


# Stage by stage

_TURNED_UP = "the held-out loss turned up"


def _data(run: Run) -> Iterator[Finding]:
    """The warnings of all that was said while the data were read and encoded."""
    for stage in ("data", "sft", "reward_model", "ppo", "dpo"):
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


def _sft(run: Run) -> Iterator[Finding]:
    yield from _skipped(run, "sft")
    steps, losses = run.series("sft", "eval/loss")
    if len(steps) < 2:
        return
    lowest = min(losses)
    best = steps[losses.index(lowest)]
    if losses[-1] > TURNED_UP * lowest:
        yield Finding(
            "sft",
            _TURNED_UP,
            f"after step {best}",
            f"{number(lowest)} there, {number(losses[-1])} at step {steps[-1]}: examples are "
            "learned by heart",
            "take fewer --epochs or a lower --learning_rate; --keep_best eval/loss keeps the best "
            "model",
        )
    elif losses[-1] >= losses[0]:
        yield Finding(
            "sft",
            "the held-out loss did not fall",
            f"from step {steps[0]} to step {steps[-1]}",
            f"{number(losses[0])} to {number(losses[-1])}",
            "take more --epochs or another --learning_rate",
        )


def _reward_model(run: Run) -> Iterator[Finding]:
    yield from _skipped(run, "reward_model")
    if (scale := run.noted("reward_model", "scale")) and "not normalised: " in scale:
        yield Finding("reward_model", scale, to_do="its scores mean what they happen to mean")
    found = _estimates(run)
    if not found:
        return
    accuracy, of_pairs = found["accuracy"], f"on {found['accuracy']['n']} held-out pairs"
    rule = max(found["longer_wins"]["mean"], found["shorter_wins"]["mean"])
    if accuracy["ci95"][0] <= 0.5:
        yield Finding(
            "reward_model",
            "is not shown to know more than a guess",
            of_pairs,
            f"{_share(accuracy)} ranked right",
            "take more pairs or more --epochs, and look at the labels",
        )
    elif accuracy["ci95"][0] <= rule:
        yield Finding(
            "reward_model",
            "is not shown to know more than the lengths",
            of_pairs,
            f"{_share(accuracy)} ranked right, the better length rule {rule:.3f}",
            "take pairs of similar length, or more of them",
        )
    trained = _last_fifth(run.series("reward_model", "accuracy")[1])
    if trained is not None and trained > accuracy["ci95"][1] and _gap(trained, accuracy):
        yield Finding(
            "reward_model",
            "learns its pairs by heart",
            "in the last fifth of its steps",
            f"{trained:.3f} of the pairs it is trained on ranked right, {_share(accuracy)} of "
            "those held out",
            "take fewer --epochs, a lower --learning_rate, or more pairs",
        )


def _ppo(run: Run) -> Iterator[Finding]:
    yield from (Finding("ppo", note) for note in run.noted("ppo", "reward_notes") or [])
    yield from _skipped(run, "ppo")
    if too_far := run.too_far("ppo"):
        yield Finding(
            "ppo",
            "was ended by --max_kl",
            f"after step {too_far[0]}",
            f"the KL of {too_far[1]:.3g} nats per response exceeds {run.config('ppo')['max_kl']}",
            "raise --kl_coef, lower --learning_rate, or allow more",
        )
    yield from _improvement(run.noted("ppo", "change"))
    steps, ratios = run.series("ppo", "ratio_max")
    spikes = [step for step, ratio in zip(steps, ratios, strict=True) if ratio > RATIO_LIMIT]
    if spikes:
        yield Finding(
            "ppo",
            f"ratios above {RATIO_LIMIT:g}",
            f"in {len(spikes)} of {len(steps)} steps ({_named(spikes)})",
            f"up to {max(ratios):.3g} in step {steps[ratios.index(max(ratios))]}",
            "a lower --learning_rate, fewer --epochs or --stop_kl keep them near 1",
        )
    spreads = run.series("ppo", "score_std")[1]
    if spreads and 2 * sum(spread == 0 for spread in spreads) >= len(spreads):
        yield Finding(
            "ppo",
            "all responses of a rollout had the same score",
            f"in {sum(spread == 0 for spread in spreads)} of {len(spreads)} steps",
            to_do="give a reward that tells them apart, or a larger --batch_size",
        )
    ended = _last_fifth(run.series("ppo", "eos_rate")[1])
    if ended is not None and ended < FEW_ENDED:
        yield Finding(
            "ppo",
            "responses were cut",
            "in the last fifth of its steps",
            f"{1 - ended:.0%} of them did not end by themselves",
            "raise --max_new_tokens, or charge it with --eos_penalty",
        )


def _improvement(change: Mapping[str, Any] | None) -> Iterator[Finding]:
    if change is None or change["n"] < 2 or change["mean"] > SURE * change["error"]:
        return
    fell = change["mean"] < -SURE * change["error"]
    yield Finding(
        "ppo",
        "the score fell" if fell else "the score is not shown to have risen",
        figure=_changed(change),
        to_do="lower --learning_rate or raise --kl_coef, and look at the samples"
        if fell
        else "take more --steps, a higher --learning_rate or a lower --kl_coef",
    )


def _dpo(run: Run) -> Iterator[Finding]:
    yield from _skipped(run, "dpo")
    pairs = run.noted("dpo", "accuracy")
    if not pairs or "held out" not in pairs:
        return
    trained, held_out = pairs["trained on"], pairs["held out"]
    overlap = trained["ci95"][0] <= held_out["ci95"][1]
    if not overlap and _gap(trained["mean"], held_out):
        yield Finding(
            "dpo",
            "learns its pairs by heart",
            figure=_both_accuracies(pairs),
            to_do="take fewer --epochs, a lower --learning_rate, a larger --beta, or more pairs",
        )
    if held_out["ci95"][0] <= 0.5:
        yield Finding(
            "dpo",
            "is not shown to know more than a guess",
            f"on {held_out['n']} held-out pairs",
            _both_accuracies(pairs),
            "take more pairs, and hold more of them out",
        )


def _test(run: Run) -> Iterator[Finding]:
    """Models that ended up below their baseline, or above it by the score alone."""
    for model in run.models[1:]:
        words = {key: _beside(run, model, key) for key in ("score", "gold_reward")}
        told = f"{model.upper()} is below {run.models[0].upper()}"
        for key, word in words.items():
            if word == "below":
                yield Finding(
                    "test",
                    f"{told} by the {ROWS[key]}",
                    "on the test prompts",
                    _two(run, model, key),
                    "look at the samples; train with a lower --learning_rate or nearer to the "
                    "reference (--kl_coef, --beta)",
                )
        if {*words.values()} - {None} == {"against"}:
            yield Finding(
                "test",
                f"{model.upper()} is not shown to differ from {run.models[0].upper()}",
                "on the test prompts",
                "; ".join(_two(run, model, key) for key, word in words.items() if word),
                "train longer or with a higher --learning_rate, or compare on more --test_prompts",
            )
        if words["score"] == "above" and words["gold_reward"] in ("below", "against"):
            yield Finding(
                "test",
                f"{model.upper()}'s score rose, the gold reward is not shown to have risen",
                "on the test prompts",
                _two(run, model, "gold_reward"),
                "the reward model may be exploited: raise --kl_coef, or train it on more pairs",
            )


def _unfinished(run: Run) -> Iterator[tuple[str, ...]]:
    for told in run.unfinished():
        stage, _, how_far = told.partition(" is ")
        yield stage, "is unfinished", "", how_far, f"go on with --resume {run.folder}"


def _skipped(run: Run, stage: str) -> Iterator[Finding]:
    steps, skipped = run.series(stage, "skipped")
    if skipped and skipped[-1] > 0:
        first = next(step for step, n in zip(steps, skipped, strict=True) if n > 0)
        yield Finding(
            stage,
            f"{skipped[-1]:g} update{'s were' if skipped[-1] > 1 else ' was'} skipped",
            f"from step {first} on",
            "numbers were not finite",
            "see which with --on_nonfinite stop; a lower --learning_rate may help",
        )


# Words


def _standing(run: Run, model: str) -> str:
    """Where a model stands beside the baseline, in words that the intervals allow."""
    parts = []
    for measure in ("score", "gold_reward"):
        if (word := _beside(run, model, measure)) is not None:
            overlap = " with overlapping intervals" if word == "against" else ""
            ours, theirs = (run.results[name][measure] for name in (model, run.models[0]))
            parts.append(
                f"{ROWS[measure]} {number(ours['mean'])}, {word} {run.models[0].upper()}'s "
                f"{number(theirs['mean'])}{overlap}"
            )
    if "kl" in run.results[model]:
        parts.append(f"{number(run.results[model]['kl']['mean'])} nats from the reference")
    return f"{model.upper()}: {'; '.join(parts)}."


def _beside(run: Run, model: str, measure: str) -> str | None:
    """Whether a model's interval lies above the baseline's, below it, or against it."""
    ours, theirs = (run.results[name].get(measure) for name in (model, run.models[0]))
    if ours is None or theirs is None:
        return None
    (low, high), (their_low, their_high) = ours["ci95"], theirs["ci95"]
    return "above" if low > their_high else "below" if high < their_low else "against"


def _two(run: Run, model: str, measure: str) -> str:
    ours, theirs = (run.results[name][measure] for name in (model, run.models[0]))
    return f"{ROWS[measure]} {_share(ours)}, {run.models[0].upper()}'s {_share(theirs)}"


def _estimates(run: Run) -> Mapping[str, Estimated]:
    """Of the reward model on held-out pairs; none if it was not trained."""
    found = run.noted("reward_model", "estimates") or run.results.get("reward_model") or {}
    return found if {"accuracy", "longer_wins", "shorter_wins"} <= set(found) else {}


def _share(estimate: Estimated) -> str:
    low, high = estimate["ci95"]
    return f"{estimate['mean']:.3f} [{low:.3f}, {high:.3f}]"


def _changed(change: Mapping[str, Any]) -> str:
    errors = ""
    if change["error"] > 0:
        times = change["mean"] / change["error"]
        errors = f", {times:.1f} standard errors of {change['error']:.3f}"
    return (
        f"{change['before']:.3f} before, {change['after']:.3f} after, on {change['n']} fixed "
        f"prompts ({change['mean']:+.3f}{errors})"
    )


def _both_accuracies(pairs: Mapping[str, Estimated]) -> str:
    told = [f"{_share(found)} of {found['n']} pairs {name}" for name, found in pairs.items()]
    return f"prefers the chosen response in {' and '.join(told)}"


def _course(steps: Sequence[int], values: Sequence[float]) -> str:
    if len(steps) == 1:
        return f"{number(values[0])} at step {steps[0]}"
    return f"{number(values[0])} at step {steps[0]}, {number(values[-1])} at step {steps[-1]}"


def _named(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps[:STEPS_NAMED])) + (", ..." if len(steps) > STEPS_NAMED else "")


def _gap(trained: float, held_out: Estimated) -> bool:
    return bool(trained - held_out["mean"] >= BY_HEART)


def _last_fifth(values: Sequence[float]) -> float | None:
    return fmean(values[-max(1, len(values) // 5) :]) if values else None
