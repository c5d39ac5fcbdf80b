"""The user's own rows: read from CSV, JSON, JSONL or Parquet, checked, and split.

A file that cannot be understood is refused with `BadInput`. A row that cannot be used is dropped,
and its number and the reason are kept for the report.
"""

import codecs
import csv
import io
import json
import math
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import pandas as pd
import pyarrow as pa

from rlhf_min.errors import BadInput, require

Stage = Literal["sft", "reward", "ppo", "dpo", "evaluation"]
Row = dict[str, Any]
T = TypeVar("T")

SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")

_PROMPT = ("prompt", "question", "instruction", "query")
_RESPONSE = ("response", "output", "completion", "answer", "chosen")
_PAIR = {"prompt": _PROMPT, "chosen": ("chosen",), "rejected": ("rejected",)}

# stage -> our column -> the names of the file's column that are understood as it
_NEEDED: dict[Stage, dict[str, tuple[str, ...]]] = {
    "sft": {"prompt": _PROMPT, "response": _RESPONSE},
    "reward": _PAIR,
    "ppo": {"prompt": _PROMPT},
    "dpo": _PAIR,
    "evaluation": {"prompt": _PROMPT, "references": ("references", "reference", *_RESPONSE)},
}
_TITLE: dict[Stage, str] = {
    "sft": "SFT",
    "reward": "reward training",
    "ppo": "PPO",
    "dpo": "DPO",
    "evaluation": "evaluation",
}

# What pandas and pyarrow raise on damaged bytes or damaged pandas metadata.
_PARQUET_ERRORS = (
    pa.ArrowException,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class LoadedRows:
    """The usable rows of one file, and which rows were dropped and why.

    Args:
        rows: the columns of the stage, see `load_rows`.
        source: the file's name as the user gave it.
        rows_read: usable and dropped rows together; blank lines do not count.
        dropped: reason -> the numbers of the rows dropped for it, counted from 1. A JSONL row has
            the number of its line; the header of a CSV file is not counted.
    """

    rows: list[Row]
    source: str
    rows_read: int
    dropped: dict[str, list[int]]

    def report(self) -> str:
        """One line: rows read, kept and dropped, with the first row numbers for each reason.

        >>> LoadedRows([{"prompt": "Hi"}], "a.csv", 3, {"prompt is empty": [2, 3]}).report()
        'a.csv: 3 rows read, 1 kept, 2 dropped: prompt is empty (2: rows 2, 3)'
        """
        count = self.rows_read - len(self.rows)
        reasons = f": {_reasons(self.dropped, self.source)}" if count else ""
        read = f"{_printable(self.source)}: {_plural(self.rows_read, 'row')} read"
        return f"{read}, {len(self.rows)} kept, {count} dropped{reasons}"


def load_rows(path: str | Path, stage: Stage) -> LoadedRows:
    """Read a .csv, .json, .jsonl or .parquet file and keep the rows that the stage can use.

    The rows have the columns of the stage, whose texts are exactly those of the file:

    * sft: prompt, response
    * reward: prompt, chosen, rejected, and margin (float) if the file has such a column
    * dpo: prompt, chosen, rejected
    * ppo: prompt, then all further columns of the file, unchanged and under their own names
    * evaluation: prompt, references (list[str]; one text in the file is a list of one)

    Column names are compared without case and outer spaces. "question", "instruction" and "query"
    are understood as prompt; "output", "completion", "answer" and "chosen" as response; every name
    of the response, and "reference", as references. An "input" beside an "instruction" is appended
    to it on a new line. Every cell of a CSV file is text: "007" stays "007" and "NA" stays "NA".

    Args:
        path: the file; its ending says the format. A .json file holds a list of objects, or such
            a list under the key "data".
        stage: what the rows are for.

    Returns:
        The usable rows in the order of the file, and the numbers of the dropped ones by reason.

    Raises:
        BadInput: the file cannot be read as its format, lacks a column, or has no usable row.
    """
    source = _printable(str(path))
    numbered = _read(path, source)
    require(bool(numbered), f"{source}: the file has no rows; add at least one")
    columns = list(dict.fromkeys(column for _, row in numbered for column in row))
    used = _find_columns(columns, stage, source)
    further = [c for c in columns if c not in used.values()] if stage == "ppo" else []

    rows: list[Row] = []
    dropped: dict[str, list[int]] = {}
    seen: set[str] = set()
    for number, row in numbered:
        clean, problem = _clean_row(row, used)
        clean |= {column: row.get(column) for column in further}
        if not problem and repr(clean) in seen:
            problem = "duplicate of an earlier row"
        if problem:
            dropped.setdefault(problem, []).append(number)
        else:
            seen.add(repr(clean))
            rows.append(clean)
    if not rows:
        raise BadInput(
            f"{source}: no usable row among the {len(numbered)} read: "
            f"{_reasons(dropped, str(path))}; correct these rows"
        )
    return LoadedRows(rows, str(path), len(numbered), dropped)


def split_rows(
    rows: list[T], *, heldout_share: float, seed: int, group: Callable[[T], str]
) -> tuple[list[T], list[T]]:
    """Split rows into training and held-out rows; the rows of one group stay together.

    Whole groups, in an order drawn from the seed, go to the held-out side until it has its share
    of the rows (at least one row), but never the last group. Both sides keep the order of `rows`.

    Args:
        rows: what to split.
        heldout_share: the share of the rows to hold out, between 0 and 1.
        seed: the same seed and rows give the same split.
        group: the name of a row's group, for example its prompt.

    Returns:
        The training rows and the held-out rows, neither of them empty.

    Raises:
        BadInput: the share is not between 0 and 1, or there are fewer than two groups.

    >>> split_rows(["a1", "b1", "a2"], heldout_share=0.3, seed=1, group=lambda row: row[0])
    (['a1', 'a2'], ['b1'])
    """
    require(
        0.0 < heldout_share < 1.0,
        f"the held-out share must lie between 0 and 1, not {heldout_share}; 0.1 is usual",
    )
    names = [group(row) for row in rows]
    sizes = Counter(names)
    require(
        len(sizes) > 1,
        f"{_plural(len(rows), 'row')} with {_plural(len(sizes), 'different prompt')} cannot be "
        "split into training and held-out rows; give rows with at least two different prompts",
    )
    order = list(sizes)
    random.Random(seed).shuffle(order)
    missing = max(1, round(heldout_share * len(rows)))
    heldout: set[str] = set()
    for name in order[:-1]:
        if missing <= 0:
            break
        heldout.add(name)
        missing -= sizes[name]
    train = [row for row, name in zip(rows, names, strict=True) if name not in heldout]
    return train, [row for row, name in zip(rows, names, strict=True) if name in heldout]


def _find_columns(columns: list[str], stage: Stage, source: str) -> dict[str, str]:
    """Our column -> the file's column that serves as it."""
    needed = _NEEDED[stage]
    served = {name: _find_column(columns, names, source) for name, names in needed.items()}
    missing = [_remedy(name, needed[name]) for name, column in served.items() if column is None]
    if missing:
        found = [_shown(column) for column in columns[:8]] + ["..."] * (len(columns) > 8)
        raise BadInput(
            f"{source}: {_TITLE[stage]} needs the column{'s' * (len(needed) > 1)} "
            f"{', '.join(needed)}; found {', '.join(found) or 'none'}; "
            f"rename or add {' and '.join(missing)}"
        )
    prompt = served["prompt"]
    if prompt is not None and _plain_name(prompt) == "instruction":
        served["input"] = _find_column(columns, ("input",), source)
    if stage == "reward":
        served["margin"] = _find_column(columns, ("margin",), source)
    return {name: column for name, column in served.items() if column is not None}


def _find_column(columns: list[str], names: tuple[str, ...], source: str) -> str | None:
    """The one column with one of these names, or None."""
    found = [column for column in columns if _plain_name(column) in names]
    if len(found) > 1:
        raise BadInput(
            f'{source}: the columns "{_shown(found[0])}" and "{_shown(found[1])}" could both be '
            f'the "{names[0]}"; remove or rename one of them'
        )
    return found[0] if found else None


def _clean_row(row: Row, used: dict[str, str]) -> tuple[Row, str | None]:
    """The row under our column names, and why it cannot be used (None if it can)."""
    clean: Row = {name: row.get(column) for name, column in used.items()}
    for name, value in clean.items():
        if problem := _problem(name, value):
            return clean, problem
    if "rejected" in used and clean["chosen"].strip() == clean["rejected"].strip():
        return clean, "chosen equals rejected"
    if "margin" in used:
        clean["margin"] = _number(clean["margin"])
    if "references" in used and isinstance(clean["references"], str):
        clean["references"] = [clean["references"]]
    if "input" in used and not _is_blank(further := clean.pop("input")):
        clean["prompt"] += f"\n{further}"
    return clean, None


def _problem(name: str, value: Any) -> str | None:
    """Why the value cannot be used in our column of this name (None if it can)."""
    if name == "margin":
        return "margin is not a finite number" if _number(value) is None else None
    if name == "input" and _is_blank(value):
        return None
    if name == "references" and isinstance(value, list):
        if not value:
            return "references is empty"
        return next(filter(None, (_text_problem(name, text) for text in value)), None)
    return _text_problem(name, value)


def _text_problem(name: str, value: Any) -> str | None:
    """Why the value is not a text that can be trained on (None if it is)."""
    if not isinstance(value, str):
        return f"{name} is not a string"
    if not value.strip():
        return f"{name} is empty"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, as a JSON escape can spell it
        return f"{name} contains invalid Unicode"
    return None


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _number(value: Any) -> float | None:
    """The finite number that a number or a text spells, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _read(path: str | Path, source: str) -> list[tuple[int, Row]]:
    """The rows of the file with their numbers."""
    suffix = Path(path).suffix.lower()
    endings = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
    require(not os.path.isdir(path), f"{source}: this is a folder; give a {endings} file in it")
    require(suffix in SUFFIXES, f"{source}: the format is unknown; give a {endings} file")
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        reason = getattr(error, "strerror", None) or "not a possible path"
        raise BadInput(f"{source}: {reason}; give the path of a file that you can read") from error
    require(
        bool(data.removeprefix(codecs.BOM_UTF8).strip()),
        f"{source}: the file is empty; add at least one row",
    )
    if suffix == ".parquet":
        return _read_parquet(data, source)
    text = _decode(data, source)
    if suffix == ".csv":
        return _read_csv(text, source)
    return _read_json(text, source) if suffix == ".json" else _read_jsonl(text, source)


def _decode(data: bytes, source: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{source}: line {line} is not UTF-8; save the file as UTF-8") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise BadInput(f"{source}: line {line} has a NUL byte; save the file as UTF-8 text")
    return text


def _read_csv(text: str, source: str) -> list[tuple[int, Row]]:
    # Not pandas: it fills short rows with empty cells instead of naming them.
    table: list[list[str]] = []
    limit = csv.field_size_limit(len(text))  # by default a cell of 131072 characters is refused
    try:
        for cells in csv.reader(io.StringIO(text, newline=""), strict=True):
            if cells:
                table.append(cells)
    except csv.Error as error:
        where = f"row {len(table)}" if table else "the header"
        raise BadInput(
            f"{source}: {where} is not valid CSV ({error}); "
            'put cells that hold quotes or line ends in quotes and write " as "" there'
        ) from error
    finally:
        csv.field_size_limit(limit)
    header = table[0] if table else []
    _check_keys(header, f"{source}: the header", "column")
    for number, cells in enumerate(table[1:], start=1):
        require(
            len(cells) == len(header),
            f"{source}: row {number} has {_plural(len(cells), 'field')}, but the header has "
            f"{len(header)}; put cells that hold commas in quotes",
        )
    return [(n, dict(zip(header, cells, strict=True))) for n, cells in enumerate(table[1:], 1)]


def _read_parquet(data: bytes, source: str) -> list[tuple[int, Row]]:
    try:
        # The pyarrow types keep integers, lists and nulls what they are.
        frame = pd.read_parquet(io.BytesIO(data), engine="pyarrow", dtype_backend="pyarrow")
        named = [name for name in frame.index.names if name is not None]
        rows = frame.reset_index(level=named).to_dict("records")  # a named index is a column too
    except _PARQUET_ERRORS as error:
        raise BadInput(
            f"{source}: not a readable Parquet file ({_shown(str(error))}); write it again"
        ) from error
    return [(n, {str(name): value for name, value in row.items()}) for n, row in enumerate(rows, 1)]


def _read_json(text: str, source: str) -> list[tuple[int, Row]]:
    remedy = "a .json file holds one list of objects; with one object on each line, name it .jsonl"
    document = _parse(text, source, remedy)
    if isinstance(document, _Pairs):
        _check_keys([key for key, _ in document], f"{source}: the outer object", "key")
        document = dict(document).get("data")
    require(type(document) is list, f"{source}: this is not a list of objects; {remedy}")
    return [(n, _object(row, f"{source}: row {n}")) for n, row in enumerate(document, start=1)]


def _read_jsonl(text: str, source: str) -> list[tuple[int, Row]]:
    rows = []
    # Only "\n" ends a line: a JSON text may contain the other line ends that splitlines() knows.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{source}: line {number}"
            value = _parse(line, where, "write one JSON object on each line")
            rows.append((number, _object(value, where)))
    return rows


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as its (key, value) pairs, in which a key may still stand twice."""


def _parse(text: str, where: str, remedy: str) -> Any:
    """The JSON value with its objects as `_Pairs`."""
    try:
        return json.loads(text, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        place = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise BadInput(f"{where}: broken JSON ({place}); {remedy}") from error
    except ValueError as error:
        raise BadInput(f"{where}: a number has too many digits; write it as a string") from error
    except RecursionError as error:
        raise BadInput(f"{where}: nested too deeply; flatten the columns") from error


def _object(value: Any, where: str) -> Row:
    """The row that the parsed value is; `where` names it in messages."""
    require(isinstance(value, _Pairs), f"{where} is not an object; write it as {{...}}")
    try:
        row = _plain(value, where)
    except RecursionError as error:
        raise BadInput(f"{where}: nested too deeply; flatten the columns") from error
    assert isinstance(row, dict)
    return row


def _plain(value: Any, where: str) -> Any:
    """The value with its `_Pairs` as dicts."""
    if isinstance(value, _Pairs):
        _check_keys([key for key, _ in value], where, "key")
        return {key: _plain(item, where) for key, item in value}
    if isinstance(value, list):
        return [_plain(item, where) for item in value]
    return value


def _check_keys(keys: list[str], where: str, kind: str) -> None:
    """Refuse a key that stands twice: one of its values would be lost."""
    if len(set(keys)) < len(keys):
        key = next(key for key in keys if keys.count(key) > 1)
        raise BadInput(f"{where} has the {kind} {_shown(key)} twice; remove or rename one of them")


def _plain_name(column: str) -> str:
    return column.strip().lower()


def _remedy(name: str, understood: tuple[str, ...]) -> str:
    others = ", ".join(other for other in understood if other != name)
    return f'"{name}" (or {others})' if others else f'"{name}"'


def _reasons(dropped: dict[str, list[int]], source: str) -> str:
    """Each reason with its count and first row numbers."""
    unit = "line" if source.lower().endswith(".jsonl") else "row"
    parts = []
    for reason, numbers in dropped.items():
        first = ", ".join(map(str, numbers[:5])) + ", ..." * (len(numbers) > 5)
        parts.append(f"{reason} ({len(numbers)}: {unit}{'s' * (len(numbers) > 1)} {first})")
    return ", ".join(parts)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _shown(text: str) -> str:
    """A text from the file, short and on one line."""
    return _printable(text if len(text) <= 40 else text[:37] + "...")


def _printable(text: str) -> str:
    return text if text and text.isprintable() else repr(text)
