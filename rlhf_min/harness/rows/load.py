"""The user's own rows: read from a file, the Hub or memory, checked, sampled, and split.

Data that cannot be understood are refused with `BadInput`. A row that cannot be used is dropped,
and its number and the reason are kept for the report.
"""

import os
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf_min.encoding.conversation import Place, PlacedRow
from rlhf_min.errors import BadInput, require
from rlhf_min.harness.rows.columns import SAMPLING, Stage, check_columns, find_columns
from rlhf_min.harness.rows.doubts import doubts
from rlhf_min.harness.rows.files import (
    SUFFIXES,
    Row,
    format_of,
    plural,
    printable,
    read_file,
    short,
)
from rlhf_min.harness.rows.formats import Misread, clean_row
from rlhf_min.harness.rows.messages import Unusable

if TYPE_CHECKING:  # they take a second, and a CSV or JSON file needs neither
    import datasets
    import pandas as pd

T = TypeVar("T")


@dataclass(frozen=True)
class LoadedRows:
    """The usable rows of one source, and which rows were dropped and why.

    Args:
        rows: the columns of the stage, see `load_rows`.
        source: the file's name as the user gave it, or what else the rows came from.
        rows_read: usable and dropped rows together; blank lines do not count.
        dropped: reason -> the numbers of the rows dropped for it, counted from 1. A JSONL row has
            the number of its line; the header of a CSV file is not counted. A row of a folder has
            its file's name before the number.
        left_out: usable rows that a sub-sample has left out.
        seed: of the sub-sample.
        columns: our column -> the column that served as it.
        unused: the other columns, which the stage does not see.
        further: the other columns in PPO, where reward functions may name them.
        notes: a line for each thing in the usable rows that may not be meant; those that begin
            with ``warning:`` most likely are not.
    """

    rows: list[Row]
    source: str
    rows_read: int
    dropped: dict[str, list[Place]]
    left_out: int = 0
    seed: int = 0
    columns: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    further: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def report(self) -> str:
        """One line: rows read, kept and dropped, with the first row numbers for each reason.

        >>> LoadedRows([{"prompt": "Hi"}], "a.csv", 3, {"prompt is empty": [2, 3]}).report()
        'a.csv: 3 rows read, 1 kept, 2 dropped: prompt is empty (2: rows 2, 3)'
        """
        count = sum(map(len, self.dropped.values()))
        reasons = f": {_reasons(self.dropped, self.source)}" if count else ""
        read = f"{printable(self.source)}: {plural(self.rows_read, 'row')} read"
        kept = f"{read}, {self.rows_read - count} kept, {count} dropped{reasons}"
        if self.left_out:
            kept += f"; {len(self.rows)} of the kept were drawn (seed {self.seed})"
        return kept

    def details(self) -> str:
        """Which column served as what and which were not used, and the notes, a line each.

        >>> columns = {"prompt": "Question", "chosen": "chosen"}
        >>> LoadedRows([], "a.csv", 1, {}, columns=columns, unused=["id"]).details()
        '  columns: prompt (Question), chosen; not used: id'
        """
        used = ", ".join(
            ours if ours == theirs else f"{ours} ({short(theirs)})"
            for ours, theirs in self.columns.items()
        )
        for title, columns in (("not used", self.unused), ("for reward functions", self.further)):
            used += f"; {title}: {', '.join(map(short, columns))}" if columns else ""
        return "\n".join([f"  columns: {used}", *self.notes])


def load_rows(
    data: "str | Path | datasets.Dataset | pd.DataFrame",
    stage: Stage,
    *,
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    usual_split: str = "train",
    limit: int | None = None,
    seed: int = 0,
) -> LoadedRows:
    """Read rows and keep those that the stage can use.

    They have the columns of the stage, whose texts are exactly those of the file:

    * sft: prompt, response
    * reward: prompt, chosen, rejected, and margin (float) if the file has such a column
    * dpo: prompt, chosen, rejected
    * kto: prompt, response, label (bool); or, if the file has no such columns, those of dpo
    * ppo: prompt, then all columns of the file, unchanged and under their own names: also the one
      that serves as prompt
    * evaluation: prompt, references (list[str]; one text in the file is a list of one)

    Column names are compared without case and outer spaces. "question", "instruction" and "query"
    are understood as prompt; "output", "completion", "answer" and "chosen" as response; every name
    of the response, and "reference", as references. An "input" beside an "instruction" is appended
    to it on a new line. A "system" or "system_prompt" is the first message of the prompt. Every
    cell of a CSV file is text: "007" stays "007" and "NA" stays "NA". A label is true or false, 1
    or 0, as a value or as text in any case.

    Prompts and responses may be lists of chat messages, also as JSON text; such a prompt becomes a
    `Conversation`. A message has role and content, or from and value. Without a prompt column,
    "chosen" and "rejected" may hold the prompt as their common beginning: as messages, as
    transcripts ("\n\nHuman: ...\n\nAssistant: ..."), or as plain texts, which are parted between
    words. "messages" or "conversations" alone serve sft, evaluation and, beside a label, kto (the
    last assistant message is the response), and ppo (up to the last user message); beside chosen
    and rejected they are the prompt.

    Args:
        data: a .csv, .json, .jsonl or .parquet file, which may be compressed (.gz, .bz2, .zst,
            .lz4); a folder of such files; the name ``owner/name`` or ``owner/name:config`` of a
            dataset on the Hub; or a dataset or frame. A .json file holds a list of objects, or such
            a list under the key "data".
        stage: what the rows are for.
        columns: our column -> the column that serves as it; goes before all names above.
        split: of a dataset on the Hub or of a folder.
        usual_split: the split if None is given; of a folder with a single split, that one.
        limit: at most so many usable rows, drawn by the seed; their order stays.
        seed: of that draw.

    Returns:
        The usable rows in their order, and the numbers of the dropped ones by reason.

    Raises:
        BadInput: the data cannot be read, lack a column, or have no usable row.
    """
    try:
        name, numbered, notes = _read(data, split, usual_split)
        loaded = _usable(numbered, stage, name, columns or {})
    except MemoryError as error:
        source = printable(str(data)) if isinstance(data, str | Path) else "the data"
        raise BadInput(
            f"{source}: the rows do not fit into the memory, which holds all of them; give fewer "
            "(--limit draws only after reading)"
        ) from error
    rows = loaded.rows
    if limit is not None and limit < len(rows):
        places = random.Random(seed).sample(range(len(rows)), limit)
        rows = [rows[i] for i in sorted(places)]
    left_out = len(loaded.rows) - len(rows)
    notes = [*notes, *loaded.notes]
    return replace(loaded, rows=rows, left_out=left_out, seed=seed, notes=notes)


def _usable(
    numbered: list[tuple[Place, Row]], stage: Stage, name: str, columns: Mapping[str, str]
) -> LoadedRows:
    """All rows that the stage can use."""
    source = printable(name)
    require(bool(numbered), f"{source}: there are no rows; add at least one")
    found = list(dict.fromkeys(column for _, row in numbered for column in row))
    check_columns(found, columns, numbered[0][1], source)
    used = find_columns(found, stage, source, columns)
    unused = [column for column in found if column not in used.values()]
    further = [c for c in found if c != "prompt"] if stage in SAMPLING else []

    rows: list[Row] = []
    raw: list[Row] = []  # as they were read
    dropped: dict[str, list[Place]] = {}
    seen: set[str] = set()
    for number, row in numbered:
        try:
            clean = {column: row.get(column) for column in further} | clean_row(row, used, stage)
            if repr(clean) in seen:
                raise Unusable("duplicate of an earlier row")
        except Misread as reason:
            raise BadInput(f"{source}: {_unit(name)} {number}: {reason}") from reason
        except Unusable as reason:
            dropped.setdefault(str(reason), []).append(number)
        else:
            seen.add(repr(clean))
            rows.append(PlacedRow(clean, number))
            raw.append(row)
    if not rows:
        raise BadInput(
            f"{source}: no usable row among the {len(numbered)} read: "
            f"{_reasons(dropped, name)}; correct these rows"
        )
    return LoadedRows(
        rows,
        name,
        len(numbered),
        dropped,
        columns=used,
        unused=[] if stage in SAMPLING else unused,
        further=further,
        notes=doubts(rows, raw, used, unused, judged=stage in SAMPLING),
    )


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
        f"{plural(len(rows), 'row')} with {plural(len(sizes), 'different prompt')} cannot be "
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


def _read(
    data: "str | Path | datasets.Dataset | pd.DataFrame", split: str | None, usual_split: str
) -> tuple[str, list[tuple[Place, Row]], list[str]]:
    """What to call the source, its rows with their numbers, and what was not read of it."""
    if isinstance(data, str | Path):
        return _read_named(str(data), split, usual_split)
    require(split is None, f"split {split!r} is for datasets of the Hub; leave it out")
    import datasets
    import pandas as pd

    if isinstance(data, pd.DataFrame):
        require(data.columns.is_unique, "the frame has two columns of the same name; rename one")
        named = [name for name in data.index.names if name is not None]
        return "the frame", _numbered(data.reset_index(level=named).to_dict("records")), []
    require(
        isinstance(data, datasets.Dataset),
        f"{type(data).__name__} is no source of rows; give a file, the name of a dataset, a "
        "datasets.Dataset (one split) or a pandas frame",
    )
    return "the dataset", _numbered(data.to_list()), []


def is_hub_name(data: str) -> bool:
    """``owner/name`` or ``owner/name:config``, unless it is the path of something or ends like a
    file."""
    name, _, _ = data.partition(":")
    like_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.ASCII) is not None
    return like_name and not os.path.exists(name) and format_of(name) not in SUFFIXES


def _read_named(
    data: str, split: str | None, usual_split: str
) -> tuple[str, list[tuple[Place, Row]], list[str]]:
    if is_hub_name(data):
        from rlhf_min.harness.rows.hub import load_hub

        split = split or usual_split
        return f"{data} ({split})", _numbered(load_hub(data, split).to_list()), []
    folder, _, config = (data, "", "") if os.path.exists(data) else data.partition(":")
    if os.path.isdir(folder):
        from rlhf_min.harness.rows.hub import read_folder

        split, rows, others = read_folder(folder, config, split, usual_split)
        left = f"warning: files of {printable(folder)} that are not read: {_listed(others)}"
        return f"{data} ({split})", rows, [left] if others else []
    source = printable(data)
    require(
        "://" not in data,
        f"{source}: an address is not read; give owner/name of a dataset on the Hub, or download "
        "the file and give its path",
    )
    require(
        "/" in data or os.path.exists(data) or format_of(data) != "" or data == "",
        f"{source}: no such file here; a dataset on the Hub is named owner/name, like "
        "stanfordnlp/imdb, or owner/name:config",
    )
    rows = list(read_file(data, source))
    require(split is None, f"{source}: a file has no split {split!r}; leave --split out")
    return data, rows, []


def _numbered(rows: list[dict[Any, Any]]) -> list[tuple[Place, Row]]:
    return [(n, {str(k): _plain(v) for k, v in row.items()}) for n, row in enumerate(rows, 1)]


def _plain(value: Any) -> Any:
    """What a frame holds as Python's own: lists and numbers of NumPy, and no value of pandas."""
    if type(value).__name__ == "NAType":
        return None
    if type(value).__module__ != "numpy":
        return value
    value = value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _reasons(dropped: dict[str, list[Place]], source: str) -> str:
    """Each reason with its count and first row numbers."""
    unit = _unit(source)
    parts = []
    for reason, numbers in dropped.items():
        first = _listed(list(map(str, numbers)))
        parts.append(f"{reason} ({len(numbers)}: {unit}{'s' * (len(numbers) > 1)} {first})")
    return ", ".join(parts)


def _unit(source: str) -> str:
    """What is counted in a source."""
    return "line" if format_of(source) == ".jsonl" else "row"


def _listed(names: list[str]) -> str:
    return ", ".join(map(printable, names[:5])) + ", ..." * (len(names) > 5)
