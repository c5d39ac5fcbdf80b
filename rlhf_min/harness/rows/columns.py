"""Which column of the user's rows serves as which of ours."""

from collections.abc import Mapping, Sequence
from typing import Literal

from rlhf_min.errors import BadInput, require
from rlhf_min.harness.rows.files import Row, short

Stage = Literal["sft", "reward", "ppo", "grpo", "rloo", "dpo", "kto", "evaluation"]
SAMPLING: tuple[Stage, ...] = ("ppo", "grpo", "rloo")  # from prompts, with all their columns

_PROMPT = ("prompt", "question", "instruction", "query")
_ANSWER = ("response", "output", "completion", "answer")
_RESPONSE = (*_ANSWER, "chosen")
_PAIR = {"prompt": _PROMPT, "chosen": ("chosen",), "rejected": ("rejected",)}

# stage -> our column -> the names of the file's column that are understood as it
_NEEDED: dict[Stage, dict[str, tuple[str, ...]]] = {
    "sft": {"prompt": _PROMPT, "response": _RESPONSE},
    "reward": _PAIR,
    **{stage: {"prompt": _PROMPT} for stage in SAMPLING},
    "dpo": _PAIR,
    "kto": {"prompt": _PROMPT, "response": _ANSWER, "label": ("label",)},  # or _PAIR
    "evaluation": {"prompt": _PROMPT, "references": ("references", "reference", *_RESPONSE)},
}
_TITLE = {"reward": "reward training", "evaluation": "evaluation"}  # the others are in capitals
MESSAGES = ("messages", "conversations", "conversation")
_SYSTEM = ("system", "system_prompt")
_OURS = (
    *("prompt", "response", "chosen", "rejected", "references", "messages", "margin"),
    *("label", "input", "system"),
)


def parse_columns(text: str) -> dict[str, str]:
    """Our column -> the user's column.

    Raises:
        BadInput: a part is not ``ours=theirs``, or names one of ours twice.

    >>> parse_columns("prompt=question,chosen=good")
    {'prompt': 'question', 'chosen': 'good'}
    """
    named: dict[str, str] = {}
    for part in text.split(","):
        ours, _, theirs = (side.strip() for side in part.partition("="))
        require(
            bool(ours and theirs),
            f"--columns {short(text)}: {short(part)} does not say which column serves as which; "
            "write it like prompt=question,chosen=good,rejected=bad",
        )
        require(
            ours not in named,
            f"--columns {short(text)}: {short(ours)} stands twice; name it once",
        )
        named[ours] = theirs
    return named


def check_columns(
    columns: Sequence[str], named: Mapping[str, str], first_row: Row, source: str
) -> None:
    """Refuse a mapping from a name that no stage knows, or to a column that is not there."""
    for ours, theirs in named.items():
        require(
            ours in _OURS,
            f"--columns: no stage has a column {short(ours)}; left of = stands one of "
            f"{', '.join(_OURS)}",
        )
        found = [f"{short(c)}: {short(str(first_row.get(c)))}" for c in columns[:8]]
        require(
            theirs in columns,
            f"{source}: --columns says {ours}={short(theirs)}, but there is no such column; "
            f"give one of {_listed(columns)}; the first row is {{{', '.join(found)}}}",
        )


def find_columns(
    columns: Sequence[str], stage: Stage, source: str, named: Mapping[str, str]
) -> dict[str, str]:
    """Our column -> the file's column that serves as it.

    Without all columns of the stage there may still be ``messages``, or ``chosen`` and
    ``rejected`` with the prompt in both. Messages beside a response or a pair are its prompt,
    unless the user named them. Rows without response and label serve KTO as pairs.

    Raises:
        BadInput: if columns are missing, or several could be the same one.
    """

    def find(*names: str) -> str | None:
        """The column that the user named so, else the one column with one of these names."""
        for name in names:
            if name in named:
                return named[name]
        free = [column for column in columns if column not in named.values()]
        found = [column for column in free if plain_name(column) in names]
        if len(found) > 1:
            raise BadInput(
                f'{source}: the columns "{short(found[0])}" and "{short(found[1])}" could both be '
                f'the "{names[0]}"; remove or rename one of them'
            )
        return found[0] if found else None

    needed = _NEEDED[stage]
    served = {name: find(*names) for name, names in needed.items()}
    if None in served.values():
        messages, chosen, rejected = find(*MESSAGES), find("chosen"), find("rejected")
        if stage == "kto" and chosen is not None and rejected is not None:
            needed = _PAIR
            served = {name: find(*names) for name, names in needed.items()}
        label = {"label": served.pop("label")} if "label" in served else {}
        alone = "messages" in named or served["prompt"] is not None or not any(served.values())
        if messages is not None and alone and needed is not _PAIR:
            served = {"messages": messages}
        elif served["prompt"] is None and messages is not None:
            served["prompt"] = messages
        elif served["prompt"] is None and chosen is not None and rejected is not None:
            served = {"chosen": chosen, "rejected": rejected}
        served |= label
    missing = [name for name, column in served.items() if column is None]
    if missing:
        raise BadInput(f"{source}: {_what_is_missing(missing, stage, columns)}")
    served["system"] = find(*_SYSTEM)
    if plain_name(served.get("prompt") or "") == "instruction":
        served["input"] = find("input")
    if stage == "reward":
        served["margin"] = find("margin")
    return {name: column for name, column in served.items() if column is not None}


def _what_is_missing(missing: Sequence[str], stage: Stage, columns: Sequence[str]) -> str:
    needed = _NEEDED[stage]
    remedies = []
    for name in missing:
        others = ", ".join(other for other in needed[name] if other != name)
        remedies.append(f'"{name}" (or {others})' if others else f'"{name}"')
    message = (
        f"{_TITLE.get(stage, stage.upper())} needs the column{'s' * (len(needed) > 1)} "
        f"{', '.join(needed)}; found {_listed(columns)}; rename or add {' and '.join(remedies)}, "
        f"or give --columns {','.join(f'{name}=NAME' for name in missing)}"
    )
    if {"chosen", "rejected"} <= set(missing):
        message += (
            "; of several answers to a prompt make pairs: a row for each two, the better one as "
            "chosen, the worse one as rejected"
        )
    if stage == "kto":
        message += "; pairs do as well: prompt, chosen, rejected"
    return message


def plain_name(column: str) -> str:
    """The name as it is compared: without case and outer spaces."""
    return column.strip().lower()


def _listed(columns: Sequence[str]) -> str:
    names = [short(column) for column in columns[:8]] + ["..."] * (len(columns) > 8)
    return ", ".join(names) or "none"
