"""The tables of the page on coming from trl: options and metrics of both sides, stage by stage.

What stands for what is told in ``examples/compare``; the defaults are read here, ours from the
configs, trl's from what `record_trl_fields.py` has recorded.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import find_helpers  # noqa: F401
from compare import names
from compare.fields import SAMPLED, STAGES, TRAINER, Field
from test_house import ROOT

from rlhf_min import config
from rlhf_min.harness.cli import RunOptions

PAGE = ROOT / "examples/compare/coming_from_trl.md"
RECORDED = json.loads((ROOT / "examples/compare/trl_fields.json").read_text(encoding="utf-8"))
TRL = f"trl {RECORDED['versions']['trl']}"

TOLD = STAGES | SAMPLED
Defaults = dict[str, str]  # of a stage: option -> what stands in its brackets


def our_defaults(stage: str) -> Defaults:
    """Options of the stage's config and of all commands."""
    found = {}
    for source in (RunOptions(), getattr(config, TOLD[stage].config)()):
        for field in dataclasses.fields(source):
            found[field.name] = shown(getattr(source, field.name))
            if field.metadata.get("pretrained"):
                found[field.name] += f", pretrained {shown(field.metadata['pretrained'][0])}"
    return found


def their_defaults(stage: str) -> Defaults:
    """Fields of trl's config, those of the Trainer among them."""
    recorded = RECORDED["fields"]
    values = recorded["TrainingArguments"] | recorded[TOLD[stage].config]
    return {name: shown(value) for name, value in values.items()}


def shown(value: Any) -> str:
    """A value as one would write it: 1e-4, not 0.0001.

    >>> shown(0.0015), shown(1e-06), shown(0.3), shown(["sigmoid"]), shown(None)
    ('1.5e-3', '1e-6', '0.3', 'sigmoid', 'None')
    """
    if isinstance(value, list):
        return ", ".join(map(shown, value)) or "none"
    if isinstance(value, float) and 0 < value < 0.01:
        mantissa, _, power = f"{value:e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:g}" if isinstance(value, float) else str(value) or "none"


def named(options: str, defaults: Mapping[str, Defaults]) -> str:
    """Options with their defaults; with that of each stage where they are not the same."""
    parts = []
    for name in options.split():
        told = {stage: of[name] for stage, of in defaults.items() if name in of}
        values = set(told.values())
        if len(values) > 1:
            values = {"; ".join(f"{TOLD[stage].title} {value}" for stage, value in told.items())}
        parts.append(f"`{name}` ({values.pop()})")
    return ", ".join(parts)


def options(stages: list[str], rows: list[Field], here: str, there: str) -> str:
    """A table of options: ours, trl's, and in what they differ."""
    ours = {stage: our_defaults(stage) for stage in stages}
    theirs = {stage: their_defaults(stage) for stage in stages}
    cells = [
        (named(row.ours, ours) or "none", named(row.trl, theirs) or "none", row.note)
        for row in rows
    ]
    return table((here, there, ""), cells)


def stage_options(stage: str) -> str:
    """What the config of a stage adds to what all have."""
    told = TOLD[stage]
    return options([stage], told.fields, f"`{told.config}` here", f"`{told.config}` of {TRL}")


def trainer_options() -> str:
    """What all of trl's configs have from the Trainer."""
    version = RECORDED["versions"]["transformers"]
    return options(list(STAGES), TRAINER, "here", f"`TrainingArguments` of transformers {version}")


def metrics(stage: str) -> str:
    """Every metric of trl's trainer, what it is here, and those of ours that trl has not."""
    rows = []
    for metric in names.METRICS[stage, TOLD[stage].trainer]:
        what = metric.what
        if metric.means is not None:
            what += f" (trl: {metric.means[0]}; here: {metric.means[1]})"
        rows.append((f"`{metric.ours}`" if metric.ours else "none", f"`{metric.trl}`", what))
    rows += [(f"`{ours}`", "none", what) for ours, what in names.OURS_ALONE[stage].items()]
    return table(("here", f"`{TOLD[stage].trainer}`", "what it is"), merged(rows))


def metrics_of_ppo() -> str:
    """The metrics of both of trl's old PPO trainers, beside each other."""
    trainers = ("PPOTrainer.step", "PPOTrainer")
    here: dict[str, str] = {}  # ours, or what it is -> the first cell
    cells: dict[str, dict[str, list[str]]] = {}
    whats: dict[str, str] = {}
    for trainer in trainers:
        for metric in names.METRICS["ppo", trainer]:
            key = metric.ours or metric.what
            here[key] = f"`{metric.ours}`" if metric.ours else "none"
            cell = f"`{metric.trl}`" + (f": {metric.means[0]}" if metric.means else "")
            cells.setdefault(key, {}).setdefault(trainer, []).append(cell)
            whats[key] = whats.get(key) or metric.what
    rows = [
        [here[key], *(", ".join(of.get(trainer, ["none"])) for trainer in trainers), whats[key]]
        for key, of in cells.items()
    ]
    alone = [[f"`{ours}`", "none", "none", what] for ours, what in names.OURS_ALONE["ppo"].items()]
    head = ("here", "trl 0.11.3 `step`", "trl 1.12.0 `train`", "what it is")
    return table(head, rows + alone)


def merged(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Rows that say the same of several names as one."""
    by_what: dict[tuple[str, str], list[str]] = {}
    for ours, trl, what in rows:
        by_what.setdefault((ours, what), []).append(trl)
    return [(ours, ", ".join(trl), what) for (ours, what), trl in by_what.items()]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


# The sections of the page, and what makes each
MADE = {
    "options-trainer": trainer_options,
    "metrics-ppo": metrics_of_ppo,
    **{f"options-{stage}": lambda stage=stage: stage_options(stage) for stage in TOLD},
    **{f"metrics-{stage}": lambda stage=stage: metrics(stage) for stage in TOLD},
}
