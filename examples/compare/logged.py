"""What a run has logged, read from the files in which trl, its trackers and others leave it.

Read are a ``trainer_state.json`` (or the folder it is in), a table with a column for each metric,
and a table of ``step``, ``name``, ``value``; tables are CSV, or JSONL with an object in each line.
"""

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_min.errors import BadInput, require

STATE = "trainer_state.json"
Series = dict[int, float]  # a value for each step

# The columns that may say the step, best first. The last two are a tracker's own count.
STEPS = ("train/global_step", "global_step", "step", "Step", "_step")
# Bookkeeping of transformers and of trackers: of the whole run, or of the machine.
SUMMARY = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}
SUMMARY |= {"total_flos", "runtime", "samples_per_second", "steps_per_second", "global_step"}
LONG = {"step", "name", "value"}

Line = tuple[str, dict[str, Any]]  # where it stands, and its fields


@dataclass
class Logged:
    """What was logged.

    Args:
        file: that was read.
        form: ``state``, ``wide`` or ``long``: the three that are read.
        series: of each metric; those of held-out rows begin with ``eval/``.
        names: metric -> how it is called in the file.
        others: what is no number, with where it stands first.
        notes: what was chosen, taken off, passed over.
    """

    file: Path
    form: str
    series: dict[str, Series] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, where: str, step: int, name: str, value: Any) -> bool:
        """Take a value; whether it takes the place of another one of this step."""
        plain = canonical(name)
        known = self.names.setdefault(plain, name)
        require(known == name, f"{where}: has both {known} and {name}; leave one of them out")
        number = _number(value)
        if number is None:
            self.others.setdefault(plain, f"{where}: {name} is {str(value)[:40]!r}, not a number")
            return False
        series = self.series.setdefault(plain, {})
        before = series.get(step, number)
        series[step] = number
        return before != number and not (math.isnan(before) and math.isnan(number))


def _number(value: Any) -> float | None:
    """A number, or a text of one; null is one that is not finite, since JSON has no NaN."""
    if value is None:
        return math.nan
    try:
        number = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if number is None or not abs(number) > 1e300 else math.inf  # so that sums exist


def canonical(name: str) -> str:
    """A metric's name without what trackers put before it.

    >>> canonical("train/loss"), canonical("eval_rewards/chosen"), canonical("objective/kl")
    ('loss', 'eval/rewards/chosen', 'objective/kl')
    """
    name = name.removeprefix("train/")
    return "eval/" + name[len("eval_") :] if name.startswith("eval_") else name


def read(path: Path) -> Logged:
    """All that a file has of a run, or the newest such file in a folder.

    Raises:
        BadInput: if there is none, or if it cannot be read.
    """
    require(path.exists(), f"{path}: no such file or folder")
    if path.is_dir():
        return _newest(path)
    if path.suffix == ".json":
        return _read_state(path)
    require(
        path.suffix in (".csv", ".jsonl"),
        f"{path}: must be a {STATE} or end in .csv or .jsonl",
    )
    logged = _read_table(path)
    require(bool(logged.series), f"{path}: holds no number")
    return logged


# trainer_state.json


def _newest(folder: Path) -> Logged:
    """That of the folder or of one of its checkpoints which goes furthest."""
    own = folder / STATE
    found = [own] * own.is_file() + sorted(folder.glob(f"checkpoint-*/{STATE}"))
    ours = (folder / "metrics.jsonl").is_file()
    to_do = "it is a run of ours, so give it as --run" if ours else "give a .csv or .jsonl"
    require(bool(found), f"{folder}: has no {STATE}, nor has a checkpoint-* in it; {to_do}")
    states = [_read_state(file) for file in found]
    newest = max(states, key=lambda state: max(_steps(state)))  # of equals the folder's own
    others = [str(file.relative_to(folder)) for file in found if file != newest.file]
    if others:
        newest.notes.insert(
            0,
            f"read is {newest.file.relative_to(folder)}, which goes furthest, up to step "
            f"{max(_steps(newest))}; left alone: {', '.join(others)}",
        )
    return newest


def _steps(logged: Logged) -> set[int]:
    return {step for series in logged.series.values() for step in series}


def _read_state(file: Path) -> Logged:
    try:
        state = json.loads(_text(file))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{file}: {_broken(error)}") from error
    history: Any = state.get("log_history") if isinstance(state, dict) else None
    require(isinstance(history, list), f"{file}: has no log_history, so it is no {STATE} of trl's")
    require(bool(history), f"{file}: its log_history is empty: the run ended before it logged")
    entries = [(f"{file}, log_history[{i}]", entry) for i, entry in enumerate(history)]
    for where, entry in entries:
        require(isinstance(entry, dict), f"{where}: must be an object, is {type(entry).__name__}")
    logged = Logged(file, "state")
    _add_wide(logged, entries, "step")
    require(bool(logged.series), f"{file}: its log_history holds no number")
    return logged


# Tables


def _read_table(file: Path) -> Logged:
    lines = list(_csv(file) if file.suffix == ".csv" else _jsonl(file))
    require(bool(lines), f"{file}: is empty")
    columns = {name for _, fields in lines for name in fields}
    if {"name", "value"} <= columns:
        logged = Logged(file, "long")
        _add_long(logged, lines)
        return logged
    logged = Logged(file, "wide")
    step = next((name for name in STEPS if name in columns), None)
    require(
        columns != {"Wall time", "Step", "Value"},
        f"{file}: a table of TensorBoard's that does not name its metric; give columns step, name, "
        "value",
    )
    _add_wide(logged, _of_one_run(logged, lines), step)
    return logged


def _csv(file: Path) -> Iterator[Line]:
    """Cells that are empty are left out: they were not logged in this row."""
    try:
        rows = csv.reader(io.StringIO(_text(file), newline=""), strict=True)
        header = next(rows, [])
        twice = [name for name in header if header.count(name) > 1]
        require(not twice, f"{file}, line 1: has the column {''.join(twice[:1])} twice")
        for row in rows:
            where = f"{file}, line {rows.line_num}"
            require(
                len(row) in (0, len(header)),
                f"{where}: has {len(row)} cells, and the first line has {len(header)}",
            )
            if row:
                cells = zip(header, row, strict=True)
                yield where, {name: cell for name, cell in cells if cell.strip()}
    except csv.Error as error:
        raise BadInput(f"{file}: is no CSV: {error}") from error


def _jsonl(file: Path) -> Iterator[Line]:
    for number, line in enumerate(_text(file).split("\n"), 1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{where}: {_broken(error)}") from error
        require(isinstance(fields, dict), f"{where}: must be an object, is {type(fields).__name__}")
        yield where, fields


def _of_one_run(logged: Logged, lines: list[Line]) -> list[Line]:
    """Without what Weights & Biases puts around the names in the table of a chart."""
    columns = {name for _, fields in lines for name in fields}
    edges = {name for name in columns if re.search("__(MIN|MAX)$", name)}
    runs = {name.rpartition(" - ")[0] for name in columns - edges if " - " in name}
    require(
        len(runs) < 2,
        f"{logged.file}: holds {len(runs)} runs ({', '.join(sorted(runs))}); give the table of one",
    )
    if edges:
        logged.notes.append(f"passed over: {len(edges)} columns __MIN and __MAX of a tracker")
    if runs:
        logged.notes.append(f'taken off the names: "{next(iter(runs))} - "')
    return [
        (where, {k.rpartition(" - ")[2]: v for k, v in fields.items() if k not in edges})
        for where, fields in lines
    ]


def _add_wide(logged: Logged, lines: Iterable[Line], step_column: str | None) -> None:
    """A column for each metric; `step_column` None: lines are steps."""
    skipped: set[str] = set()
    repeated = 0
    for i, (where, fields) in enumerate(lines, 1):
        step = i if step_column is None else _step(where, fields.get(step_column), step_column)
        for name, value in fields.items():
            plain = canonical(name)
            if name in STEPS:
                continue
            if plain.removeprefix("eval/") in SUMMARY or name.startswith("_"):
                skipped.add(name)
            elif value is not None:
                repeated += logged.add(where, step, name, value)
    if step_column is None:
        logged.notes.append("no column says the step, so the rows are counted from 1")
    elif step_column in ("Step", "_step"):
        logged.notes.append(
            f"the steps are {step_column}: a tracker's own count of what it was sent, which is the "
            "optimizer's only if it was sent something once a step"
        )
    if skipped:
        logged.notes.append(f"passed over, of the whole run: {', '.join(sorted(skipped))}")
    _tidy(logged, repeated)


def _add_long(logged: Logged, lines: Iterable[Line]) -> None:
    """A line for each value."""
    extra: set[str] = set()
    repeated = 0
    for where, fields in lines:
        missing = sorted(LONG - {"value"} - fields.keys())
        require(not missing, f"{where}: has no {' and no '.join(missing)}")
        require(isinstance(fields["name"], str), f"{where}: name must be a text")
        extra |= fields.keys() - LONG
        step = _step(where, fields["step"], "step")
        repeated += logged.add(where, step, fields["name"], fields.get("value"))
    if extra:
        logged.notes.append(f"passed over: the fields {', '.join(sorted(extra))}")
    _tidy(logged, repeated)


def _tidy(logged: Logged, repeated: int) -> None:
    """Say what was taken off and replaced; the first step is 1."""
    prefixed = sum(name.startswith("train/") for name in logged.names.values())
    if prefixed:
        logged.notes.append(f'taken off the names: "train/", of {prefixed}')
    if repeated:
        logged.notes.append(
            f"{repeated} values were logged again for the same step: the last counts"
        )
    trained = [s for name, s in logged.series.items() if not name.startswith("eval/")]
    if any(0 in series for series in trained):
        logged.notes.append("its steps begin at 0 and ours at 1, so 1 was added to all of its own")
        logged.series = {
            name: {step + 1: value for step, value in series.items()}
            for name, series in logged.series.items()
        }


def _step(where: str, value: Any, column: str) -> int:
    try:
        step = float(value)
        require(step == int(step) and step >= 0, "")
    except (TypeError, ValueError, OverflowError) as error:  # BadInput is a ValueError
        shown = "missing" if value is None else repr(value)
        raise BadInput(f"{where}: {column} must be a whole number from 0 on, is {shown}") from error
    return int(step)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{file}: is not UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise BadInput(f"{file}: cannot be read: {error.strerror}") from error


def _broken(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        place = f"line {error.lineno}, " if error.lineno > 1 else ""
        return f"broken JSON at {place}column {error.colno}: {error.msg}"
    return f"broken JSON: {error}"
