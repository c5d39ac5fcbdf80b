"""A run's folder, read back: whatever of it is there, be the run finished, under way or killed."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_min.errors import BadInput, require
from rlhf_min.harness.run.layout import (
    METRICS,
    NOTES,
    RESULTS,
    REWARD_MODEL,
    RUN,
    SAMPLES,
    TOKENS,
    stage_modules,
)

Record = dict[str, Any]

# What is missing where a file is.
_CONTENTS = {
    RUN: "configuration and versions",
    METRICS: "curves and times",
    RESULTS: "results table",
    SAMPLES: "samples",
    TOKENS: "token view",
    REWARD_MODEL: "calibration and margins of the reward model",
    NOTES: "model sizes and rows, and what was said of them",
}


@dataclass(frozen=True)
class Run:
    """What a run has written. `left_out` has a sentence for each part that is not there."""

    folder: Path
    record: Record
    rows: list[Record]
    results: Record
    samples: list[Record]
    tokens: list[Record]
    reward_model: Record
    notes: Record
    left_out: list[str]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def stages(self) -> list[str]:
        """The stages that have made a step, in their order."""
        return list(dict.fromkeys(row["stage"] for row in self.rows))

    @property
    def models(self) -> list[str]:
        """The models in the results; the first is the baseline of the others."""
        return [k for k, v in self.results.items() if isinstance(v, dict) and "signatures" in v]

    def config(self, stage: str) -> Record:
        """A stage's options; none if the run has not noted any."""
        module = stage_modules().get(stage)
        return self.record.get("config", {}).get(module.CONFIG.__name__, {}) if module else {}

    def noted(self, stage: str, name: str) -> Any:
        """What the run noted of a stage under this name; None if it did not."""
        facts = self.notes.get(stage)
        return facts.get(name) if isinstance(facts, dict) else None

    def series(self, stage: str, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric of one stage, where it was measured and finite."""
        rows = [row for row in self.rows if row["stage"] == stage and row.get(name) is not None]
        return [row["step"] for row in rows], [row[name] for row in rows]

    def unfinished(self) -> list[str]:
        """Of each stage that has not reached its end, how far it came."""
        lines = []
        for stage in self.stages:
            unit = "step" if "steps" in self.config(stage) else "epoch"
            wanted, (_, done) = self.config(stage).get(f"{unit}s"), self.series(stage, unit)
            if wanted and done and done[-1] < wanted and not self.too_far(stage):
                lines.append(f"{stage} is at {unit} {done[-1]:g} of {wanted}")
        return lines

    def too_far(self, stage: str) -> tuple[int, float] | None:
        """The step at which a stage was ended by its ``max_kl``, and the KL that it had there."""
        limit, (steps, kl) = self.config(stage).get("max_kl"), self.series(stage, "k1")
        if not isinstance(limit, (int, float)) or not kl or kl[-1] <= limit:
            return None
        return steps[-1], kl[-1]


def read_run(folder: Path) -> Run:
    """Everything in a run's folder that can be read.

    Raises:
        BadInput: if it is no run's folder.
    """
    require(
        any((folder / name).is_file() for name in (RUN, METRICS, RESULTS)),
        f"{folder} holds no {RUN}, {METRICS} or {RESULTS}, so it is not a run; give its folder",
    )
    left_out: list[str] = []
    contents = {name: list(_records(folder / name, left_out)) for name in _CONTENTS}
    # A run that was continued may have repeated some steps: the last word counts.
    rows = list({(row["stage"], row["step"]): row for row in contents[METRICS]}.values())
    tokens = list({(x["stage"], x["step"], x["row"]): x for x in contents[TOKENS]}.values())
    modules = [stage_modules()[x] for x in {row["stage"] for row in rows} & stage_modules().keys()]
    of_stages = {name for module in modules for name in (NOTES, *module.WRITES)}
    for name, holds in _CONTENTS.items():
        if not contents[name] and name in {RUN, METRICS, RESULTS, *of_stages}:
            left_out.append(f"No {holds}: there is no {name}.")
    record, results, reward_model, notes = (
        next(iter(contents[name]), {}) for name in (RUN, RESULTS, REWARD_MODEL, NOTES)
    )
    return Run(
        folder, record, rows, results, contents[SAMPLES], tokens, reward_model, notes, left_out
    )


def _records(file: Path, left_out: list[str]) -> Iterator[Record]:
    """The JSON objects in a file, one or one for each line; a line that was cut is left out."""
    if not file.is_file():
        return
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise BadInput(f"{file}: cannot be read: {error.strerror}") from error
    for number, line in enumerate(text.split("\n") if file.suffix == ".jsonl" else [text], 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            left_out.append(f"{file.name}, line {number}: cut or damaged, passed over.")
            continue
        yield record
