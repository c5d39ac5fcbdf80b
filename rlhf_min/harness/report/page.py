"""A run's report: one page that holds all it shows, made from nothing but the run's folder."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from rlhf_min.estimates import Estimate, proportion_estimate
from rlhf_min.harness.report import figures, texts
from rlhf_min.harness.report.figures import INKS, Line, Mark
from rlhf_min.harness.report.findings import TITLES, first_lines
from rlhf_min.harness.report.health import CURVES, Curve, judge, number
from rlhf_min.harness.report.markup import Html, join, table, tag
from rlhf_min.harness.report.results import ROWS, SHARES, note_lines
from rlhf_min.harness.run.files import write_file
from rlhf_min.harness.run.reading import Record, Run, read_run

REPORT = "report.html"
STAGES = {stage: TITLES[stage] for stage in ("sft", "reward_model", "ppo", "dpo")}
ROWS_OF = {
    "sft": "demonstrations",
    "reward_model": "pairs",
    "ppo": "prompts",
    "dpo": "pairs",
}
# Metrics, and what the words for them mean.
MEANINGS = (
    (
        {"score"},
        "Score: what the reward that is trained on gives a whole response, be it a reward model or "
        "a function; of a reward model made in the same run, 0 is the mean and 1 the deviation on "
        "samples of the SFT model.",
    ),
    (
        {"gold_reward"},
        "Gold reward: the true reward, which the embedded world knows and no model sees: 3 for a "
        "correct answer, 1 if it is polite, 1 if it is brief.",
    ),
    (
        {"kl", "k1", "loss"},
        "Nat: the unit of KL, entropy and loss; a text that is e = 2.718 times as likely differs "
        "by one.",
    ),
)

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fdfcf8; --text: #23262a; --muted: #5d636b; --rule: #ddd9cf; --alarm: #a8123c;
  --plus: 0 98 168; --minus: 214 108 20;
  --c0: #0b62a4; --c1: #b6520a; --c2: #0a7558; --c3: #6c2378; --c4: #444500; --c5: #1f2b46;
  --serif: Charter, "Bitstream Charter", "Sitka Text", Cambria, Georgia, serif;
  --sans: system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #16181b; --text: #e6e3dc; --muted: #a3a8ae; --rule: #373b40; --alarm: #ff92a8;
    --plus: 70 150 230; --minus: 225 130 50;
    --c0: #74b5f0; --c1: #ed9e5d; --c2: #54c49a; --c3: #9583ed; --c4: #f0e68c; --c5: #f7bcd6;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 2.5rem 1.25rem 5rem; background: var(--paper);
  color: var(--text); font: 1.05rem/1.55 var(--serif); overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; font-weight: 600; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.35rem; font-weight: 600; margin: 3.2rem 0 .6rem; }
h3 { font-size: 1.05rem; font-weight: 600; margin: 0 0 .3rem; }
p, li { max-width: 42rem; margin: .5rem 0; }
ul { padding-left: 1.2rem; }
.option { white-space: nowrap; }
.findings li { border-left: 3px solid var(--alarm); padding-left: .7rem; list-style: none; }
.findings { padding-left: 0; }
.quiet { color: var(--muted); font-size: .95rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font: .88rem/1.35 var(--sans);
  font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: .32rem .55rem; text-align: left; vertical-align: middle;
  border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { font-weight: 600; } tbody th { font-weight: 400; }
th:first-child { padding-left: 0; } th.part { padding-left: 1rem; }
.interval { color: var(--muted); font-size: .9em; padding-left: .35rem; }
.named { color: var(--ink); }
.curve { border-top: 1px solid var(--rule); padding: 1.1rem 0; }
.curve p { margin: .3rem 0; }
.left { color: var(--alarm); font-weight: 600; }
summary { cursor: pointer; color: var(--muted); }
code { font: .88em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
@media (min-width: 46rem) {
  .curve { display: grid; grid-template: auto 1fr / minmax(0, 30rem) minmax(0, 1fr);
    gap: 0 1.6rem; }
  .curve svg { grid-row: 1 / span 2; grid-column: 1; }
}
@media (max-width: 30rem) { body { padding-top: 1.5rem; } svg { font-size: 14px; } }
"""


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
    names = ", ".join(run.name for run in runs)
    alone = runs[0] if len(runs) == 1 else None
    body = [tag("h1", names), *(_origin(alone) if alone else []), *_summary(runs)]
    body += [*_results(runs), *_curves(runs, "ppo")]
    body += [*texts.samples(alone), *texts.tokens(alone), *_pairs(alone)] if alone else []
    for stage in ("reward_model", "dpo", "sft"):
        body += _curves(runs, stage)
    body += [*(_data(alone) if alone else []), *_costs(runs), *_configuration(runs)]
    body += _left_out(runs)
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{names} - report"),
        tag("style", Html(figures.STYLE + texts.STYLE + STYLE)),
    ]
    whole = tag("html", tag("head", *head), "\n", tag("body", *body), "\n", lang="en")
    return f"<!doctype html>\n{whole}\n"


def _prefix(run: Run, runs: Sequence[Run]) -> str:
    """Whose something is, where there are several runs."""
    return f"{run.name}: " if len(runs) > 1 else ""


# What matters first


def _summary(runs: Sequence[Run]) -> Iterator[Html]:
    """What the terminal said in the end: where the models stand, and what to look at."""
    for run in runs:
        told, found = first_lines(run)
        for sentences in told if len(runs) == 1 else [" ".join(told)]:
            yield tag("p", _prefix(run, runs), sentences)
        if found:
            lines = [tag("li", *_whole_options(str(finding))) for finding in found]
            yield tag("ul", *lines, class_="findings")
    yield from _words_used(runs)


def _origin(run: Run) -> Iterator[Html]:
    """When and how a run began, and the models and rows of its stages."""
    started, command = run.record.get("started"), run.record.get("command")
    if isinstance(started, str) and isinstance(command, str):
        yield tag("p", f"{_date(started)}: ", tag("code", *_whole_options(command)), class_="quiet")
    told = []
    for stage, title in STAGES.items():
        rows, size = run.noted(stage, "rows"), run.noted(stage, "parameters")
        if rows is not None and size is not None:
            told.append(
                f"{title}: {run.noted(stage, 'model')}, {size:,} parameters, on {rows:,} "
                f"{ROWS_OF[stage]}, {run.noted(stage, 'held_out'):,} held out."
            )
    if told:
        yield _quiet(" ".join(told))


def _date(started: str) -> str:
    """A date as it is read: "5 May 2026, 14:30 UTC"."""
    try:
        then = datetime.fromisoformat(started).astimezone(timezone.utc)
    except ValueError:
        return started
    return f"{then.day} {then:%B %Y, %H:%M} UTC"


def _whole_options(text: str) -> list[object]:
    """A text in which no option of the command line is broken at its hyphens."""
    return [
        tag("span", part, class_="option") if part.startswith("--") else part
        for part in re.split(r"(--\w{1,40})", text)
    ]


def _words_used(runs: Sequence[Run]) -> Iterator[Html]:
    """What the first lines speak of."""
    measured = {name for run in runs for row in run.rows for name in row}
    measured |= {key for run in runs for model in run.models for key in run.results[model]}
    told = [meaning for names, meaning in MEANINGS if measured & names]
    if told:
        yield _quiet(" ".join(told))


def _results(runs: Sequence[Run]) -> Iterator[Html]:
    """All measures of all models with their intervals, as numbers and as lines."""
    columns = [(run, model) for run in runs for model in run.models]
    if not columns:
        return
    yield tag("h2", "Results")
    # Of several runs each has a colour; of one run, each model.
    inks = [i if len(runs) > 1 else j for i, run in enumerate(runs) for j in range(len(run.models))]
    heads = [
        tag("th", _prefix(run, runs), model.upper(), scope="col", class_=f"named c{ink % INKS}")
        for ink, (run, model) in zip(inks, columns, strict=True)
    ]
    lines = []
    for key, title in (ROWS | SHARES).items():
        cells = [run.results[model].get(key) for run, model in columns]
        if any(cell is not None for cell in cells):
            digits = 1 if key in ("bleu", "response_length") else 3
            part = "part" if title.startswith(" ") else None
            name = tag("th", title.strip(), scope="row", class_=part)
            numbers = [_estimate(cell, digits) for cell in cells]
            lines.append(
                [name, *numbers, _intervals(key, title.strip(), zip(inks, cells, strict=True))]
            )
    yield table(["", *heads, ""], lines)
    found = [run.results[model] for run, model in columns]
    prompts = " or ".join(sorted({str(results["score"]["n"]) for results in found}))
    yield _quiet(
        f"{prompts} test prompts at temperature 1, the same random numbers for all; in brackets "
        f"95% bootstrap intervals; wins are over {columns[0][1].upper()}, a tie is half a win."
    )
    yield tag("p", tag("code", " ".join(found[0]["signatures"].values())), class_="quiet")
    named = {f"{_prefix(run, runs)}{model}": run.results[model] for run, model in columns}
    for line in note_lines({name: results.get("notes", {}) for name, results in named.items()}):
        yield _quiet(line)


def _estimate(found: Any, digits: int = 3) -> Html:
    """A share as it is; an estimate with its interval."""
    if found is None:
        return Html()
    if not isinstance(found, dict):
        return join(f"{found:.{digits}f}")
    low, high = found["ci95"]
    interval = tag("span", f"[{low:.{digits}f}, {high:.{digits}f}]", class_="interval")
    return join(f"{found['mean']:.{digits}f} ", interval)


def _intervals(key: str, title: str, cells: Iterable[tuple[int, Any]]) -> Html | None:
    """The estimates of a line as a figure, in their colours, if they are estimates."""
    estimates = [
        (ink, cell["mean"], *cell["ci95"]) for ink, cell in cells if isinstance(cell, dict)
    ]
    if not estimates:
        return None
    told = "; ".join(number(mean) for _, mean, _, _ in estimates)
    return figures.interval_figure(f"interval-{key}", f"{title}: intervals", told, estimates)


# Curves


def _curves(runs: Sequence[Run], stage: str) -> Iterator[Html]:
    """A stage's figures, each with what was and what is healthy."""
    shown = [_curve(curve, runs) for curve in CURVES if curve.stage == stage]
    if any(shown):
        yield tag("h2", f"{STAGES[stage]}, step by step")
        yield from (curve for curve in shown if curve is not None)


def _curve(curve: Curve, runs: Sequence[Run]) -> Html | None:
    """One figure; None if no run has measured it."""
    lines, marks, told, sentences = [], [], [], []
    for i, run in enumerate(runs):
        verdict = judge(curve, run)
        if verdict is None:
            continue
        if len(runs) > 1:
            lines.append(Line(run.name, i, *curve.judged(run)))
        else:
            measured = (run.series(curve.stage, metric) for metric, _ in curve.lines)
            for j, (steps, values) in enumerate(measured):
                if steps:
                    lines.append(Line(curve.lines[j][1], j % 2, steps, values, dashed=j > 1))
        if verdict.left is not None:
            marks.append(Mark(*verdict.left, f"step {verdict.left[0]}"))
        name = tag("b", _prefix(run, runs), class_=f"named c{i % INKS}")
        finding = tag("span", verdict.finding, class_="left" if verdict.left else None)
        bounds = tag("span", f" Range: {verdict.bounds}.", class_="quiet")
        told.append(tag("p", name, f"{verdict.course} ", finding, bounds))
        sentences.append(f"{_prefix(run, runs)}{verdict.course} {verdict.finding}")
    if not lines:
        return None
    figure = figures.line_figure(
        curve.key,
        f"{STAGES[curve.stage]}: {curve.name}",
        " ".join(sentences),
        lines,
        y_label=curve.unit,
        limits=curve.limits(runs[0]) if len(runs) == 1 else None,
        marks=marks,
    )
    return _beside(figure, curve.title, *told, _quiet(f"Healthy: {curve.healthy}"))


def _beside(figure: Html, title: str, *told: Html) -> Html:
    """A figure and what there is to say of it."""
    return tag("div", tag("h3", title), figure, tag("div", *told), class_="curve")


def _quiet(text: str) -> Html:
    return tag("p", text, class_="quiet")


# The reward model


def _pairs(run: Run) -> Iterator[Html]:
    """What the reward model knows: beside length rules, and whether it is as sure as it should."""
    estimates, scores = run.results.get("reward_model", {}), run.reward_model
    if estimates or scores:
        yield tag("h2", "Reward model on held-out pairs")
    if estimates:
        shares = {name: f"{100 * estimate['mean']:.1f}%" for name, estimate in estimates.items()}
        yield table(
            ["", f"of {estimates['accuracy']['n']} pairs"],
            [[name.replace("_", " "), _estimate(found)] for name, found in estimates.items()],
        )
        yield tag(
            "p",
            f'It ranks {shares["accuracy"]} of the pairs right; "the longer one wins" would rank '
            f'{shares["longer_wins"]} right, "the shorter one wins" {shares["shorter_wins"]}.',
        )
    if not scores:
        return
    margins = [c - r for c, r in zip(scores["chosen"], scores["rejected"], strict=True)]
    bins = calibration(margins)
    error = sum(share.n * abs(share.mean - said) for said, share in bins) / len(margins)
    points = "; ".join(f"{said:.2f}: {share.mean:.2f} of {share.n}" for said, share in bins)
    yield _beside(
        figures.calibration_figure("calibration", "Reward model: calibration", points, bins),
        "Calibration",
        tag(
            "p",
            "How sure the reward model is of a ranking, sigmoid of the margin, and how often such "
            f"rankings are right. Predicted and observed: {points}. On average the two are "
            f"{error:.3f} apart.",
        ),
        _quiet(
            "Healthy: dots on the dashed line; below it the model is surer than it should be. The "
            "margins are those before the scores were normalised."
        ),
    )
    wrong = sum(margin <= 0 for margin in margins)
    told = (
        f"{wrong} of {len(margins)} pairs are ranked wrong, with a margin of 0 or less; the median "
        f"margin is {number(median(margins))}."
    )
    yield _beside(
        figures.histogram("margins", "Reward model: margins", told, margins),
        "Margins",
        tag("p", told),
        _quiet(
            "Healthy: most of the hill lies right of 0; a long tail at the left is pairs whose "
            "label the model takes for wrong."
        ),
    )


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


def _data(run: Run) -> Iterator[Html]:
    """What was said of the rows when they were read and encoded."""
    told = [line for stage in ("data", *STAGES) for line in run.noted(stage, "report") or []]
    if told:
        yield tag("h2", "Data")
        yield tag("ul", *[tag("li", line.strip()) for line in told])


def _costs(runs: Sequence[Run]) -> Iterator[Html]:
    """Steps, seconds and memory of each stage."""
    lines = [
        {"": f"{_prefix(run, runs)}{stage}"} | _cost(run, stage)
        for run in runs
        for stage in run.stages
    ]
    heads = list(dict.fromkeys(head for line in lines for head in line))
    if lines:
        yield tag("h2", "Time and memory")
        yield table(heads, [[line.get(head, "") for head in heads] for line in lines])


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


def _configuration(runs: Sequence[Run]) -> Iterator[Html]:
    """The options and versions of a run; of several, those that differ."""
    records = [_flat(run.record) for run in runs]
    names = list(dict.fromkeys(name for record in records for name in record))
    if not names:
        return
    yield tag("h2", "Configuration")
    if len(runs) > 1:
        lines = [
            [name.removeprefix("config."), *[_value(record.get(name, "")) for record in records]]
            for name in names
        ]
        yield tag("p", "What differs:")
        yield table(["", *[run.name for run in runs]], [x for x in lines if len({*x[1:]}) > 1])
        return
    groups: dict[str, list[list[str]]] = {}
    for name in names:
        path, _, option = name.rpartition(".")
        groups.setdefault(path, []).append([option, _value(records[0][name])])
    for path, lines in groups.items():
        if path.startswith("config."):
            yield tag("details", tag("summary", path[7:]), table([], lines))
    yield table([], [line for path in groups if path[:7] != "config." for line in groups[path]])


def _flat(record: Mapping[str, Any], before: str = "") -> Record:
    """Nested options under names with dots."""
    flat: Record = {}
    for key, value in record.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{before}{key}.") if nested else {before + key: value}
    return flat


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _left_out(runs: Sequence[Run]) -> Iterable[Html]:
    """What a reader might look for in vain, and why."""
    told = [f"{_prefix(run, runs)}{line}" for run in runs for line in run.left_out]
    if len(runs) > 1:
        told.append("Samples, tokens and reward models are in the runs' own reports.")
    return [tag("h2", "Left out"), tag("ul", *[tag("li", x) for x in told])] if told else []
