"""Rows from the bytes of a CSV, JSON, JSONL or Parquet file, each with its number.

A file may be compressed: what its first bytes say counts, and not its name. A file that cannot be
understood is refused with `BadInput`, never read in part.
"""

import codecs
import csv
import io
import json
import math
import os
import re
from pathlib import Path
from typing import Any

from rlhf_min.errors import BadInput, require

Row = dict[str, Any]

SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")
GB = 1024**3
FORMATS = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
_COMPRESSION = {
    "gzip": rb"\x1f\x8b",
    "bz2": rb"BZh[1-9]1AY&SY",
    "zstd": rb"\x28\xb5\x2f\xfd",
    "lz4": rb"\x04\x22\x4d\x18",
}
_LOOKS_LIKE = {  # the first bytes of what is not UTF-8
    b"\xff\xfe": "looks like UTF-16; save the file as UTF-8",
    b"\xfe\xff": "looks like UTF-16; save the file as UTF-8",
    b"PAR1": "looks like Parquet; name the file .parquet",
    b"PK\x03\x04": "looks like a ZIP archive or a spreadsheet; unpack it, or save it as CSV",
    b"\xfd7zXZ": "looks like an xz archive; unpack it",
}
_MARKS = {";": "semicolons", "\t": "tabs", "|": "bars"}  # other than commas, in a CSV header
_DAMAGED = (  # beside pyarrow's own, what pandas and pyarrow raise on damaged bytes
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(OSError, RuntimeError, TypeError, ValueError),
)


def read_file(path: str | Path, source: str) -> list[tuple[int, Row]]:
    """The rows of the file with their numbers, counted from 1; for a JSONL file those of its lines.

    Args:
        path: the file; its ending says the format.
        source: what messages call it.

    Raises:
        BadInput: the file cannot be read as its format, or has no rows.
    """
    suffix = format_of(path)
    data = _decompress(_bytes(path, suffix, source), source)
    require(
        bool(data.removeprefix(codecs.BOM_UTF8).strip()),
        f"{source}: the file is empty; add at least one row",
    )
    if suffix == ".parquet":
        rows = _read_parquet(data, source)
    else:
        readers = {".csv": _read_csv, ".json": _read_json, ".jsonl": _read_jsonl}
        rows = readers[suffix](_decode(data, source), source)
    require(bool(rows), f"{source}: the file has no rows; add at least one")
    return rows


def format_of(path: str | Path) -> str:
    """The ending that says the format: the last one, or the one before that of a compression.

    >>> format_of("pairs.JSONL.gz")
    '.jsonl'
    """
    endings = [suffix.lower() for suffix in Path(path).suffixes[-2:]]
    return next((suffix for suffix in reversed(endings) if suffix not in COMPRESSED), "")


def _bytes(path: str | Path, suffix: str, source: str) -> bytes:
    require(not os.path.isdir(path), f"{source}: this is a folder; give a {FORMATS} file in it")
    require(suffix in SUFFIXES, f"{source}: the format is unknown; give a {FORMATS} file")
    is_pipe = os.path.exists(path) and not os.path.isfile(path)  # reading could wait for ever
    require(not is_pipe, f"{source}: this is a pipe or a device; give a {FORMATS} file")
    if os.path.isfile(path):
        check_room(os.path.getsize(path), source)
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        reason = getattr(error, "strerror", None) or "not a possible path"
        raise BadInput(f"{source}: {reason}; give the path of a file that you can read") from error


def check_room(size: int, source: str) -> None:
    """Refuse what cannot fit: the bytes and the rows made of them are in memory together.

    Raises:
        BadInput: if twice the size is more than the memory that is free.
    """
    room = free_memory()
    require(
        2 * size <= room,
        f"{source}: its {size / GB:.1f} GB are read as a whole, and {room / GB:.1f} GB of memory "
        "are free; give a smaller file (--limit draws only after reading)",
    )


def free_memory() -> float:
    """Bytes of memory that are free for this process; infinite where nothing tells."""
    if Path("/proc/meminfo").is_file():
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return 1024 * float(dict(line.split(":") for line in lines)["MemAvailable"].split()[0])
    try:  # all there is, free or not
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return math.inf


def _decompress(data: bytes, source: str) -> bytes:
    kind = next((kind for kind, start in _COMPRESSION.items() if re.match(start, data)), None)
    if kind is None:
        return data
    import pyarrow as pa

    try:
        return bytes(pa.input_stream(pa.BufferReader(data), compression=kind).read())
    except (OSError, pa.ArrowInvalid) as error:
        raise BadInput(
            f"{source}: damaged {kind} ({short(str(error))}); compress the file again"
        ) from error


def _decode(data: bytes, source: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        like = next((what for start, what in _LOOKS_LIKE.items() if data.startswith(start)), None)
        cure = f" but {like}" if like else "; save the file as UTF-8"
        raise BadInput(f"{source}: line {line} is not UTF-8{cure}") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise BadInput(f"{source}: line {line} has a NUL byte; save the file as UTF-8 text")
    return text


def _read_csv(text: str, source: str) -> list[tuple[int, Row]]:
    # Not pandas: it fills short rows with empty cells instead of naming them.
    _check_marks(text, source)
    table: list[list[str]] = []
    limit = csv.field_size_limit(len(text))  # by default a cell of 131072 characters is refused
    try:
        for cells in csv.reader(io.StringIO(text, newline=""), strict=True):
            if cells:
                table.append(cells)
    except csv.Error as error:
        where = f"row {len(table)}" if table else "the header"
        cure = 'put cells that hold quotes or line ends in quotes and write " as "" there'
        raise BadInput(
            f"{source}: {where} is not valid CSV ({error}); {_quotes(text, cure)}"
        ) from error
    finally:
        csv.field_size_limit(limit)
    header = table[0] if table else []
    _check_keys(header, f"{source}: the header", "column")
    for number, cells in enumerate(table[1:], start=1):
        require(
            len(cells) == len(header),
            f"{source}: row {number} has {plural(len(cells), 'field')}, but the header has "
            f"{len(header)}; {_quotes(text, 'put cells that hold commas in quotes')}",
        )
    return [(n, dict(zip(header, cells, strict=True))) for n, cells in enumerate(table[1:], 1)]


def _check_marks(text: str, source: str) -> None:
    """Refuse a header that other marks than commas part: cells would be torn or taken together."""
    found = re.match(r"\s*([^\r\n]*)", text)
    header = found[1] if found else ""
    require(
        not header.lower().startswith("sep="),
        f"{source}: the first line {short(header)} is no header; remove it, and save with commas",
    )
    bare = re.sub(r'"[^"]*"', "", header)  # what stands between the names
    for mark, name in _MARKS.items():
        require(
            bare.count(mark) <= bare.count(","),
            f"{source}: {name}, not commas, part the header {short(header)}; save with commas",
        )


def _quotes(text: str, cure: str) -> str:
    """What to do about cells that are torn; quotes with a backslash are a cause of their own."""
    backslash = r'a quote in a cell is written as \" here; write it as ""'
    return backslash if '\\"' in text else cure


def _read_parquet(data: bytes, source: str) -> list[tuple[int, Row]]:
    import pandas as pd
    import pyarrow as pa

    try:
        # The pyarrow types keep integers, lists and nulls what they are.
        frame = pd.read_parquet(io.BytesIO(data), engine="pyarrow", dtype_backend="pyarrow")
        named = [name for name in frame.index.names if name is not None]
        rows = frame.reset_index(level=named).to_dict("records")  # a named index is a column too
    except MemoryError:  # one of pyarrow's own too
        raise
    except (pa.ArrowException, *_DAMAGED) as error:
        raise BadInput(
            f"{source}: not a readable Parquet file ({short(str(error))}); write it again"
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
        raise BadInput(f"{where} has the {kind} {short(key)} twice; remove or rename one of them")


def plural(count: int, noun: str) -> str:
    """The count with its noun, in the plural where there are none or several."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def short(text: str) -> str:
    """A text from the file, short and on one line."""
    return printable(text if len(text) <= 40 else text[:37] + "...")


def printable(text: str) -> str:
    """The text itself, or quoted if it would not stay on one line."""
    return text if text and text.isprintable() else repr(text)
