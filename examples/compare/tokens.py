"""Where the two sides read a row differently, and what kind of difference that is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from compare.job import Ids

TEXT = 48  # characters of a text that are shown
NAMED = 4  # rows that are named


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    eos_token_id: int | None
    bos_token_id: int | None
    all_special_ids: Sequence[int]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        ...


@dataclass
class Difference:
    """Rows that differ in one way.

    Args:
        kind: short name of the way.
        says: of the first row, what each side reads.
        columns: number of a row -> the columns in which it differs so.
    """

    kind: str
    says: str
    columns: dict[int, tuple[str, ...]] = field(default_factory=dict)


def differences(
    ours: Mapping[int, Ids],
    theirs: Mapping[int, Ids],
    tokenizer: Decoder,
    *,
    max_length: int | None = None,
) -> list[Difference]:
    """Of all rows that both sides have, the kinds of difference, the most frequent first.

    Args:
        ours, theirs: ids by number of the row and name of the column.
        max_length: at which trl cuts, if it does.
    """
    found: dict[str, Difference] = {}
    for row in sorted(ours.keys() & theirs.keys()):
        for kind, says, columns in _kinds(ours[row], theirs[row], tokenizer, max_length):
            difference = found.setdefault(kind, Difference(kind, says))
            difference.columns[row] = difference.columns.get(row, ()) + columns
    return sorted(found.values(), key=lambda difference: -len(difference.columns))


def rows_named(rows: Sequence[int], places: Mapping[int, object]) -> str:
    """The first rows by their places in the user's file, and how many there are beside them.

    >>> rows_named([0, 1, 4, 5, 6], {n: n + 1 for n in range(9)})
    'rows 1, 2, 5, 6 and 1 more'
    """
    first = ", ".join(str(places.get(row, row + 1)) for row in rows[:NAMED])
    more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
    return f"row{'s' * (len(rows) > 1)} {first}{more}"


Kind = tuple[str, str, tuple[str, ...]]


def _kinds(ours: Ids, theirs: Ids, tokenizer: Decoder, max_length: int | None) -> list[Kind]:
    theirs = {name: theirs[name] for name in ours}
    columns = [name for name in theirs if ours[name] != theirs[name]]
    if not columns:
        return []
    eos = tokenizer.eos_token_id
    if "chosen_ids" in theirs and (
        _without(theirs["chosen_ids"], eos) == _without(ours["rejected_ids"], eos)
        and _without(theirs["rejected_ids"], eos) == _without(ours["chosen_ids"], eos)
    ):
        return [("swapped pair", "chosen and rejected are swapped", tuple(columns))]
    prompt = "prompt_ids" in theirs
    if "response_ids" in theirs and not theirs["prompt_ids"]:
        return [
            (
                "prompt trained on",
                "trl trains on the prompt too, here on the response alone",
                tuple(columns),
            )
        ]
    if prompt and _joined(ours, theirs, tokenizer):
        if _special(theirs, tokenizer) > _special(ours, tokenizer):
            says = "trl reads the special tokens that a text spells, here they are read as text"
            return [("special tokens in a text", says, tuple(columns))]
        says = "trl makes ids of prompt and response as one text, here each has its own"
        return [("joined text", says, tuple(columns))]
    if (
        prompt
        and "prompt_ids" not in columns
        and all(_begins_elsewhere(ours[name], theirs[name]) for name in columns)
    ):
        says = (
            "trl makes ids of prompt and response as one text, and parts them where the prompt "
            f"alone would end; {_texts(ours[columns[0]], theirs[columns[0]], tokenizer)}"
        )
        return [("joined text", says, tuple(columns))]
    found: list[Kind] = []
    for name in columns:
        before = len(theirs["prompt_ids"]) if prompt and name != "prompt_ids" else 0
        room = None if max_length is None else max_length - before
        if name == "prompt_ids":
            longest = max(len(ids) for column, ids in ours.items() if column != name)
            too_long = room is not None and len(theirs[name]) + longest >= room
            kind, says = _of_prompt(ours[name], theirs[name], tokenizer, too_long)
        else:
            kind, says = _of_response(ours[name], theirs[name], tokenizer, room)
        found.append((kind, says, (name,)))
    return found


def _of_prompt(
    ours: list[int], theirs: list[int], tokenizer: Decoder, too_long: bool
) -> tuple[str, str]:
    bos = tokenizer.bos_token_id
    if theirs == [bos, *ours]:
        return "BOS", "trl begins the prompt with BOS, here it does not"
    if ours == [bos, *theirs]:
        return "BOS", "the prompt begins with BOS here, in trl it does not"
    rest = min(len(ours), len(theirs)) - 1  # a cut prompt keeps its BOS
    if too_long and ours[len(ours) - rest :] == theirs[len(theirs) - rest :]:
        return "cut prompt", f"the prompt keeps {len(theirs)} tokens in trl and {len(ours)} here"
    return "template", "the prompt " + _texts(ours, theirs, tokenizer)


def _of_response(
    ours: list[int], theirs: list[int], tokenizer: Decoder, room: int | None
) -> tuple[str, str]:
    eos = tokenizer.eos_token_id
    if [*theirs, eos] == ours and len(theirs) != room:
        return "EOS", "the response ends without EOS in trl, here with it"
    spelled = tokenizer.decode(_without(ours, eos))
    if theirs[-1:] == [eos] and spelled == tokenizer.decode(theirs):
        says = "the text spells EOS, which trl reads, and here it is text with an EOS behind it"
        return "special tokens in a text", says
    if ours[: len(theirs)] == theirs or _without(ours, eos) == theirs[: len(ours) - 1]:
        shorter = len(theirs) < len(ours) or len(theirs) == room
        if shorter:
            gone = "" if theirs[-1:] == [eos] else ", and EOS is gone with the end"
            return (
                "cut",
                f"trl cuts the text to {len(theirs)} tokens{gone}; here it has {len(ours)}",
            )
    if theirs[: len(ours)] == ours:
        tail = tokenizer.decode(theirs[len(ours) :])
        return "tail", f"behind EOS trl trains on {tail!r} too, here EOS is the end"
    if [*ours, eos] == theirs:
        return "EOS", "the response ends with EOS in trl, here without it"
    return "text", "the text " + _texts(ours, theirs, tokenizer)


def _joined(ours: Ids, theirs: Ids, tokenizer: Decoder) -> bool:
    """Whether all texts are the same and only parted into other tokens."""

    def texts(ids: Ids) -> list[str]:
        prompt, *responses = ids.values()
        return [tokenizer.decode([*prompt, *response]) for response in responses]

    return texts(ours) == texts(theirs)


def _special(ids: Ids, tokenizer: Decoder) -> int:
    """How many special tokens there are."""
    known = set(tokenizer.all_special_ids)
    return sum(token in known for row in ids.values() for token in row)


def _begins_elsewhere(ours: list[int], theirs: list[int]) -> bool:
    """Whether the first token or two are others, and all that follows is the same."""
    return ours[0] != theirs[0] and any(
        len(rest := ours[i:]) > 1 and rest == theirs[k:] for i in range(3) for k in range(3)
    )


def _texts(ours: list[int], theirs: list[int], tokenizer: Decoder) -> str:
    same = 0
    for a, b in zip(ours, theirs, strict=False):
        if a != b:
            break
        same += 1
    start = max(0, same - 2)
    mine, other = (tokenizer.decode(ids[start:])[:TEXT] for ids in (ours, theirs))
    return f"reads {other!r} in trl and {mine!r} here, from token {start} on"


def _without(ids: list[int], eos: int | None) -> list[int]:
    return ids[:-1] if ids[-1:] == [eos] else ids
