"""The rows of a comparison: as our side reads them, and in the columns that trl has."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from compare.command import Options
from compare.job import Record, Row
from rlhf_min.encoding.conversation import Conversation, PlacedRow
from rlhf_min.encoding.template import CHAT
from rlhf_min.errors import BadInput, require
from rlhf_min.harness.rows.load import LoadedRows, load_rows

ALONE = "{prompt}"  # a template that adds nothing
OF_STAGE = {"sft": ("response",), "reward": ("chosen", "rejected"), "dpo": ("chosen", "rejected")}


@dataclass
class OurRows:
    """Rows by number.

    Args:
        rows: as `load_rows` gives them.
        places: number of each row -> what it is called in the user's file.
        template: what the policy reads of a prompt.
        for_trl: the same rows in trl's columns.
        left_out: rows that cannot be used here, and why.
        of: how many rows the dataset has of which these are a few; 0: these are all.
        report: what is to be said of the file.
    """

    rows: list[Row]
    places: dict[int, Any]
    template: str
    for_trl: list[Row] = field(default_factory=list)
    left_out: dict[int, str] = field(default_factory=dict)
    of: int = 0
    report: list[str] = field(default_factory=list)


def read(options: Options) -> OurRows:
    """The user's file, and trl's if it is another one.

    Raises:
        BadInput: if it cannot be read, or the two are not the same rows.
    """
    loaded = _load(options, str(options.data))
    template = template_of(options, loaded.rows)
    theirs = loaded.rows
    report = [loaded.report(), loaded.details()]
    if options.trl_data is not None:
        other = _load(options, options.trl_data)
        require(
            len(other.rows) == len(loaded.rows),
            f"{options.trl_data} has {len(other.rows)} usable rows and {options.data} "
            f"{len(loaded.rows)}: give the same rows in the same order",
        )
        theirs = other.rows
        report += [other.report(), other.details()]
    stage = str(options.stage)
    return OurRows(
        loaded.rows,
        {n: row.place if isinstance(row, PlacedRow) else n for n, row in enumerate(loaded.rows)},
        template,
        for_trl=[_for_trl(stage, row, template) for row in theirs],
        report=report,
    )


def from_script(record: Record) -> OurRows:
    """The rows of a script's dataset that it trained on, as our side reads them, if it can."""
    import datasets

    total = record.facts["dataset_rows"]
    if not record.raw_rows:  # then our side takes trl's ids, and texts cannot be compared
        return OurRows([], {}, ALONE, of=total)
    numbers = sorted(record.raw_rows)
    raw = [record.raw_rows[n] for n in numbers]
    stage: Any = record.stage
    try:
        loaded = load_rows(datasets.Dataset.from_list(raw), stage)
    except BadInput as error:  # such as columns that a `formatting_func` or `text` is made for
        found = "; ".join(str(error).split("; ")[:2])  # without what a user of ours would do
        record.facts["raw_rows"] = found
        return OurRows([], {}, ALONE, of=total)
    kept = {numbers[int(row.place) - 1]: row for row in loaded.rows if isinstance(row, PlacedRow)}
    left_out = {
        numbers[int(place) - 1]: why for why, places in loaded.dropped.items() for place in places
    }
    chat = any(isinstance(row["prompt"], Conversation) for row in loaded.rows)
    return OurRows(
        list(kept.values()),
        {n: n + 1 for n in kept},
        CHAT if chat else ALONE,
        left_out=left_out,
        of=total,
    )


def _load(options: Options, data: str) -> LoadedRows:
    stage: Any = options.stage
    return load_rows(data, stage, columns=options.parsed_columns, limit=options.limit)


def template_of(options: Options, rows: Sequence[Row]) -> str:
    """The one that is told, or what the prompts ask for."""
    if options.template is not None:
        return options.template.replace("\\n", "\n")
    return CHAT if any(isinstance(row["prompt"], Conversation) for row in rows) else ALONE


def _for_trl(stage: str, row: Row, template: str) -> Row:
    """A prompt as a template of text makes it, or as messages for a chat template."""
    prompt = row["prompt"]
    chat = template == CHAT or isinstance(prompt, Conversation)
    found: Row = {}
    if chat:
        user = [{"role": "user", "content": str(prompt)}]
        found["prompt"] = [dict(m) for m in getattr(prompt, "messages", user)]
    else:
        require(
            "{prompt}" in template, f"--template {template} is not for trl; give a text or chat"
        )
        found["prompt"] = template.replace("{prompt}", prompt)
    for name in OF_STAGE[stage]:
        text = row[name]
        theirs = "completion" if name == "response" else name
        found[theirs] = [{"role": "assistant", "content": text}] if chat else text
    if row.get("margin") is not None:
        found["margin"] = row["margin"]
    return found
