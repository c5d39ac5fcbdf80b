"""A run's report: one page that holds all it shows, made from nothing but the run's folder.

Here is what it says, by section; how it is marked up and looks stands in ``templates``.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from rlhf_min.estimates import Estimate, proportion_estimate
from rlhf_min.harness.report import figures, texts
from rlhf_min.harness.report.curves import Curve, modules_of, number, title
from rlhf_min.harness.report.findings import summary
from rlhf_min.harness.report.results import MEASURES, SHARES, note_lines
from rlhf_min.harness.run.atomic import write_file
from rlhf_min.harness.run.reading import Record, Run, read_run

REPORT = "report.html"


def write_report(folder: Path) -> Path:
    """Write a run's ``report.html`` from what its folder holds, and return its path.

    Raises:
        BadInput: if the folder holds no run.
        OSError: if it cannot be written; what was there before is left as it was.
    """
    file = folder / REPORT
    write_file(file, page([read_run(folder)]))
    return file


def page(runs: Sequence[Run]) -> str:
    """The report of one run, or of several laid over each other."""
    left_out = [f"{_prefix(run, runs)}{line}" for run in runs for line in run.left_out]
    if len(runs) > 1:
        left_out.append("Samples, tokens and reward models are in the runs' own reports.")
    alone = runs[0] if len(runs) == 1 else None
    records = [row for run in runs for row in run.rows]
    records += [run.results[model] for run in runs for model in run.models]
    sections = {
        "palette": figures.PALETTE,
        "inks": figures.INKS,
        "alone": alone,
        "began": _began(alone.record) if alone else "",
        "trained": _trained(alone) if alone else [],
        "summaries": [(run.name, *summary(run)) for run in runs],
        "measured": {name for record in records for name in record},
        "results": _results(runs),
        "stages": list(_stages(runs)),
        "pairs": alone.results.get("reward_model") if alone else None,
        "margins": _margins(alone.reward_model) if alone else None,
        "samples": list(texts.samples(alone)) if alone else [],
        "tokens": list(texts.tokens(alone)) if alone else [],
        "data": _data(alone) if alone else [],
        "costs": _costs(runs),
        "names": [run.name for run in runs],
        "different": _different(runs),
        "left_out": left_out,
    }
    return figures.printable(_environment().get_template("page.html").render(sections))


@cache
def _environment() -> Environment:
    """The templates, in which every text is escaped."""
    environment = Environment(
        loader=PackageLoader("rlhf_min.harness.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"unbroken": unbroken, "as_text": as_text}
    return environment


def unbroken(text: str) -> Markup:
    """A text in which no option of the command line is broken at its hyphens.

    >>> print(unbroken("a < b: --out x"))
    a &lt; b: <span class="option">--out</span> x
    """
    return Markup(re.sub(r"(--\w{1,40})", r'<span class="option">\1</span>', str(escape(text))))


def _drawn(draw: Callable[..., Markup], *arguments: object) -> Markup:
    """A figure; without a working matplotlib, the reason why there is none."""
    try:
        with figures.style():
            return draw(*arguments)
    except ImportError as error:
        return Markup("<p>No figure: {}</p>").format(error)


def _prefix(run: Run, runs: Sequence[Run]) -> str:
    """Whose something is, where there are several runs."""
    return f"{run.name}: " if len(runs) > 1 else ""


# What matters first


def _began(record: Record) -> str:
    """When a run began, as it is read: "5 May 2026, 14:30 UTC"; nothing if that was not noted."""
    started = record.get("started")
    if not isinstance(started, str) or not isinstance(record.get("command"), str):
        return ""
    try:
        then = datetime.fromisoformat(started).astimezone(timezone.utc)
    except ValueError:
        return started
    return f"{then.day} {then:%B %Y, %H:%M} UTC"


def _trained(run: Run) -> list[tuple[ModuleType, Record]]:
    """The stages that noted their model and their rows."""
    facts = [(module, run.notes.get(module.STAGE)) for module in modules_of(run)]
    return [(m, x) for m, x in facts if isinstance(x, dict) and {"rows", "parameters"} <= set(x)]


def _results(runs: Sequence[Run]) -> Record | None:
    """All measures of all models with their intervals."""
    columns = [(run, model) for run in runs for model in run.models]
    if not columns:
        return None
    # Of several runs each has a colour; of one run, each model.
    inks = [i if len(runs) > 1 else j for i, run in enumerate(runs) for j in range(len(run.models))]
    results = [run.results[model] for run, model in columns]
    names = [f"{_prefix(run, runs)}{model}" for run, model in columns]
    lines = [
        {
            "name": name.strip(),
            "part": name.startswith(" "),
            "cells": [x.get(key) for x in results],
            "digits": 1 if key in ("bleu", "response_length") else 3,
            "figure": _intervals(key, name.strip(), inks, results),
        }
        for key, name in (MEASURES | SHARES).items()
        if any(x.get(key) is not None for x in results)
    ]
    return {
        "heads": list(zip(inks, names, strict=True)),
        "lines": lines,
        "prompts": " or ".join(sorted({str(x["score"]["n"]) for x in results})),
        "baseline": columns[0][1],
        "signatures": " ".join(results[0]["signatures"].values()),
        "notes": note_lines(
            {name: x.get("notes", {}) for name, x in zip(names, results, strict=True)}
        ),
    }


def _intervals(key: str, name: str, inks: Sequence[int], results: Sequence[Record]) -> Markup:
    """The estimates of a measure as a figure, in the colours of their models, if there are any."""
    cells = [(ink, x.get(key)) for ink, x in zip(inks, results, strict=True)]
    estimates = [(ink, x["mean"], *x["ci95"]) for ink, x in cells if isinstance(x, dict)]
    if not estimates:
        return Markup()
    means = "; ".join(number(mean) for _, mean, _, _ in estimates)
    return _drawn(figures.intervals, f"interval-{key}", f"{name}: intervals", means, estimates)


# Curves


def _stages(runs: Sequence[Run]) -> Iterator[Record]:
    """The figures of each stage, those first that sample responses."""
    modules = {module.STAGE: module for run in runs for module in modules_of(run)}
    sampling = {row["stage"] for run in runs for row in [*run.tokens, *run.samples]}
    for stage in sorted(modules, key=lambda stage: stage not in sampling):
        curves = [_curve(curve, runs) for curve in modules[stage].CURVES]
        yield {
            "title": title(stage),
            "samples": stage in sampling,
            "curves": [curve for curve in curves if curve is not None],
        }


def _curve(curve: Curve, runs: Sequence[Run]) -> Record | None:
    """One figure, with what was and what is healthy; None if no run has measured it."""
    statuses = [(i, run, curve.status(run)) for i, run in enumerate(runs)]
    measured = [(i, run, status) for i, run, status in statuses if status is not None]
    if not measured:
        return None
    description = " ".join(
        f"{_prefix(run, runs)}{status.course} {status.sentence}" for _, run, status in measured
    )
    return {
        "title": curve.title,
        "figure": _drawn(figures.curve, curve, runs, description),
        "statuses": [(i, _prefix(run, runs), status) for i, run, status in measured],
        "healthy": curve.healthy,
    }


# The reward model


def _margins(scores: Mapping[str, list[float]]) -> Record | None:
    """Whether the reward model is as sure of held-out pairs as it should be."""
    if not scores:
        return None
    margins = [c - r for c, r in zip(scores["chosen"], scores["rejected"], strict=True)]
    bins = calibration(margins)
    error = sum(share.n * abs(share.mean - sure) for sure, share in bins) / len(margins)
    points = "; ".join(f"{sure:.2f}: {share.mean:.2f} of {share.n}" for sure, share in bins)
    wrong = (
        f"{sum(margin <= 0 for margin in margins)} of {len(margins)} pairs are ranked wrong, with "
        f"a margin of 0 or less; the median margin is {number(median(margins))}."
    )
    return {
        "calibration": _drawn(
            figures.calibration, "calibration", "Reward model: calibration", points, bins
        ),
        "points": points,
        "error": f"{error:.3f}",
        "histogram": _drawn(figures.histogram, "margins", "Reward model: margins", wrong, margins),
        "wrong": wrong,
    }


def calibration(margins: Sequence[float]) -> list[tuple[float, Estimate]]:
    """How sure a reward model was of its rankings, and how often it was right.

    Args:
        margins: score of the chosen response less that of the rejected one.

    Returns:
        For each tenth from 0.5 to 1 that has pairs, the mean of sigmoid(|margin|), which is the
        model's own probability of being right, and the share of these pairs that it ranks right.

    >>> [(sure, share)] = calibration([2.0, 2.0, 2.0, -2.0])
    >>> round(sure, 3), share.mean
    (0.881, 0.75)
    """
    bins: dict[int, list[tuple[float, bool]]] = {}
    for margin in margins:
        sure = 1 / (1 + math.exp(-min(abs(margin), 700)))
        bins.setdefault(min(int(10 * sure), 9), []).append((sure, margin > 0))
    return [
        (
            sum(sure for sure, _ in pairs) / len(pairs),
            proportion_estimate(sum(right for _, right in pairs), len(pairs)),
        )
        for _, pairs in sorted(bins.items())
    ]


# What it took


def _data(run: Run) -> list[str]:
    """What was said of the rows when they were read and encoded."""
    return [line.strip() for stage in run.notes for line in run.noted(stage, "report") or []]


def _costs(runs: Sequence[Run]) -> Record:
    """Steps, seconds and memory of each stage."""
    lines = [
        {"": f"{_prefix(run, runs)}{stage}"} | _cost(run, stage)
        for run in runs
        for stage in run.stages
    ]
    heads = list(dict.fromkeys(head for line in lines for head in line))
    return {"heads": heads, "lines": [[line.get(head, "") for head in heads] for line in lines]}


def _cost(run: Run, stage: str) -> dict[str, str]:
    rows = [row for row in run.rows if row["stage"] == stage]
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if name.startswith(("time/", "memory/")) and value is not None:
                columns.setdefault(name, []).append(value)
    speeds = columns.pop("time/tokens_per_second", [])
    parts = {name[5:]: sum(column) for name, column in columns.items() if name[:5] == "time/"}
    cost = {"steps": str(len(rows)), "seconds of training": f"{sum(parts.values()):.1f}"}
    if len(parts) > 1:
        cost["of which"] = ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())
    if speeds:
        cost["tokens a second, median"] = f"{median(speeds):.0f}"
    memory = {name: max(column) for name, column in columns.items() if name[:5] != "time/"}
    return cost | {name.partition("/")[2]: f"{most:.2f}" for name, most in memory.items()}


def _different(runs: Sequence[Run]) -> list[list[str]]:
    """The options and versions in which runs differ, a line for each."""
    records = [_flat(run.record) for run in runs]
    names = dict.fromkeys(name for record in records for name in record)
    lines = [
        [name.removeprefix("config."), *[as_text(record.get(name, "")) for record in records]]
        for name in names
    ]
    return [line for line in lines if len({*line[1:]}) > 1]


def _flat(record: Mapping[str, Any], before: str = "") -> Record:
    """Nested options under names with dots."""
    flat: Record = {}
    for key, value in record.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{before}{key}.") if nested else {before + key: value}
    return flat


def as_text(value: Any) -> str:
    """A text as it is, and everything else as JSON.

    >>> as_text("fixed"), as_text(None)
    ('fixed', 'null')
    """
    return value if isinstance(value, str) else json.dumps(value)
