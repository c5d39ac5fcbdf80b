"""Rows from the bytes of a CSV, JSON, JSONL or Parquet file, each with its number.

A file that cannot be understood is refused with `BadInput`, never read in part.
"""

import codecs
import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from rlhf_min.errors import BadInput, require

Row = dict[str, Any]

SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")

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


def read_file(path: str | Path, source: str) -> list[tuple[int, Row]]:
    """The rows of the file with their numbers, counted from 1; for a JSONL file those of its lines.

    Args:
        path: the file; its ending says the format.
        source: what messages call it.

    Raises:
        BadInput: the file cannot be read as its format, or has no rows.
    """
    rows = _read(path, source)
    require(bool(rows), f"{source}: the file has no rows; add at least one")
    return rows


def _read(path: str | Path, source: str) -> list[tuple[int, Row]]:
    suffix = Path(path).suffix.lower()
    endings = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
    require(not os.path.isdir(path), f"{source}: this is a folder; give a {endings} file in it")
    require(suffix in SUFFIXES, f"{source}: the format is unknown; give a {endings} file")
    is_pipe = os.path.exists(path) and not os.path.isfile(path)  # reading could wait for ever
    require(not is_pipe, f"{source}: this is a pipe or a device; give a {endings} file")
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
            f"{source}: row {number} has {plural(len(cells), 'field')}, but the header has "
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
            f"{source}: not a readable Parquet file ({shown(str(error))}); write it again"
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
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        place = f"{error.msg} at {line}column {error.colno}"
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
        raise BadInput(f"{where} has the {kind} {shown(key)} twice; remove or rename one of them")


def plural(count: int, noun: str) -> str:
    """The count with its noun, in the plural where there are none or several."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def shown(text: str) -> str:
    """A text from the file, short and on one line."""
    return printable(text if len(text) <= 40 else text[:37] + "...")


def printable(text: str) -> str:
    """The text itself, or quoted if it would not stay on one line."""
    return text if text and text.isprintable() else repr(text)
