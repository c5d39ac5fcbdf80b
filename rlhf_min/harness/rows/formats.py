"""A row as its stage needs it: out of texts, chat messages or transcripts.

A pair may have its prompt in a column, or leave it implicit, as what chosen and rejected begin
with. A row that cannot be used is `Unusable`, and the reason is the message.
"""

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from rlhf_min.encoding.conversation import Conversation
from rlhf_min.harness.rows.columns import MESSAGES, SAMPLING, Stage, plain_name
from rlhf_min.harness.rows.files import Row, short
from rlhf_min.harness.rows.messages import (
    Message,
    Unusable,
    is_blank,
    messages_in,
    read_written,
    turns_of,
)

_LARGEST_MARGIN = 2.0**24  # beyond it float32 has no place for a difference of 1 in the scores
_SINGLE = {"response", "references"}  # where a row has one response, none chosen or rejected
# A CSV file holds nothing but text, and a column with gaps in it nothing but floats.
_LABELS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


class Misread(Unusable):
    """A cell that shows its column to be another one than it is taken for: no row can be used."""


def clean_row(row: Row, used: Mapping[str, str], stage: Stage) -> Row:
    """The row under the stage's column names, its texts exactly those of the file.

    Raises:
        Unusable: if it has not all that the stage needs.
    """
    values = {name: read_written(row.get(column), name) for name, column in used.items()}
    system = values.pop("system", None)
    if "messages" in values:
        clean = _from_messages(values.pop("messages"), stage) | values
    elif "prompt" in values:
        clean = values | _from_columns(values)
        if used.keys() & _SINGLE and plain_name(used["prompt"]) in MESSAGES:
            _require_open(clean["prompt"], used)
    else:
        clean = _from_pair(values.pop("chosen"), values.pop("rejected")) | values
    for name, value in clean.items():
        _require(_problem(name, value))
    if "rejected" in clean and clean["chosen"].strip() == clean["rejected"].strip():
        raise Unusable("chosen equals rejected")
    if "margin" in clean:
        clean["margin"] = _number(clean["margin"])
    if "label" in clean:
        clean["label"] = _label(clean["label"])
    if "input" in clean and not is_blank(further := clean.pop("input")):
        if isinstance(clean["prompt"], Conversation):
            raise Unusable("input cannot be added to a list of messages")
        clean["prompt"] += f"\n{further}"
    if not is_blank(system):
        clean["prompt"] = _with_system(clean["prompt"], system)
    return _for_stage(clean, stage)


def _require_open(prompt: Any, used: Mapping[str, str]) -> None:
    """A conversation that has its response already is no prompt of another one."""
    messages = getattr(prompt, "messages", ())
    if messages and messages[-1]["role"] == "assistant":
        (other,) = used.keys() & _SINGLE
        ours, theirs = short(used["prompt"]), short(used[other])
        raise Unusable(
            f"{ours} ends with an assistant message and {theirs} is a response too (give --columns "
            f"messages={ours} to leave {theirs} out)"
        )


def _with_system(prompt: str, system: Any) -> Conversation:
    """The prompt with a message of the system before it."""
    _require(_text_problem("system", system))
    before = {"role": "system", "content": system}
    messages = getattr(prompt, "messages", ({"role": "user", "content": prompt},))
    if messages[0]["role"] != "system":
        return Conversation([before, *messages])
    if messages[0] != before:
        raise Unusable("the system's message is another one than the column system says")
    return Conversation(messages)


def _for_stage(clean: Row, stage: Stage) -> Row:
    """A pair whose prompt was implicit serves the other stages by its chosen response."""
    if stage in ("sft", "evaluation") and "chosen" in clean:
        clean = {"prompt": clean["prompt"], _target(stage): clean["chosen"]}
    if stage in SAMPLING:
        clean = {"prompt": clean["prompt"]}
    if stage == "evaluation" and isinstance(clean["references"], str):
        clean["references"] = [clean["references"]]
    return clean


def _target(stage: Stage) -> str:
    return "references" if stage == "evaluation" else "response"


# Explicit prompts


def _from_messages(value: Any, stage: Stage) -> Row:
    """A whole conversation: up to the last user message, or to the response that is last."""
    messages = messages_in(value, "messages")
    if messages is None:
        raise Unusable("messages is not a list of objects with role and content")
    role = "user" if stage in SAMPLING else "assistant"
    places = [i for i, message in enumerate(messages) if message["role"] == role]
    if not places:
        raise Unusable(f"messages has no {role} message")
    last = places[-1]
    if stage in SAMPLING:
        return {"prompt": Conversation(messages[: last + 1])}
    return {"prompt": Conversation(messages[:last]), _target(stage): messages[last]["content"]}


def _from_columns(values: Row) -> Row:
    """What the lists of messages beside a prompt say; nothing if there are none.

    Messages that begin with the assistant's go on from the prompt; others are the whole
    conversation, and the prompt is what they say it is.
    """
    found: Row = {}
    before = messages_in(values["prompt"], "prompt")
    if before is not None:
        found["prompt"] = Conversation(before)
    elif isinstance(values["prompt"], str):
        before = [{"role": "user", "content": values["prompt"]}]
    whole: dict[str, list[Message]] = {}
    for name in ("response", "references", "chosen", "rejected"):
        messages = messages_in(values.get(name), name)
        if messages is not None:
            if messages[0]["role"] == "assistant":
                if before is None:
                    raise Unusable(str(_text_problem("prompt", values["prompt"])))
                messages = before + messages
            whole[name] = messages
    if whole.keys() == {"chosen", "rejected"}:
        return found | _common_prompt(whole["chosen"], whole["rejected"])
    for name, messages in whole.items():
        if messages[-1]["role"] != "assistant":
            raise Unusable(f"{name} does not end with an assistant message")
        found |= {"prompt": Conversation(messages[:-1]), name: messages[-1]["content"]}
    return found


# Implicit prompts


def _from_pair(chosen: Any, rejected: Any) -> Row:
    """Prompt and responses of a pair whose two sides hold the prompt as well."""
    pair = {"chosen": chosen, "rejected": rejected}
    for name, value in pair.items():
        if _is_empty(value):
            raise Unusable(f"{name} is empty")
    for read in (lambda value: messages_in(value, "chosen or rejected"), turns_of):
        sides = read(chosen), read(rejected)
        if sides[0] is not None and sides[1] is not None:
            return _common_prompt(sides[0], sides[1])
    for name, value in pair.items():
        _require(_text_problem(name, value))
    return _common_text(chosen, rejected)


def _common_prompt(chosen: list[Message], rejected: list[Message]) -> Row:
    """The messages that both begin with, and the one response that each goes on with."""
    shared = _equal_at_start([_said(x) for x in chosen], [_said(x) for x in rejected])
    rests = {"chosen": chosen[shared:], "rejected": rejected[shared:]}
    if not any(rests.values()):
        raise Unusable("chosen equals rejected")
    if not shared:
        raise Unusable("chosen and rejected have no common prompt")
    for name, rest in rests.items():
        if not rest:
            raise Unusable(f"{name} is empty after the common prompt")
        if [message["role"] for message in rest] != ["assistant"]:
            raise Unusable(f"{name} is not one assistant message after the common prompt")
    responses = {name: rest[0]["content"] for name, rest in rests.items()}
    return {"prompt": Conversation(chosen[:shared]), **responses}


def _said(message: Message) -> tuple[str, str]:
    return message["role"], message["content"].strip()


def _common_text(chosen: str, rejected: str) -> Row:
    """The words that both begin with, and what each goes on with; a space goes with the latter."""
    if chosen.strip() == rejected.strip():
        raise Unusable("chosen equals rejected")
    end = _equal_at_start(chosen, rejected)
    while _inside_word(chosen, end) or _inside_word(rejected, end):
        end -= 1
    if chosen[end - 1 : end] == " ":
        end -= 1
    if not chosen[:end].strip():
        raise Unusable("chosen and rejected have no common prompt")
    found = {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}
    for name, text in found.items():
        if not text.strip():
            raise Unusable(f"{name} is empty after the common prompt")
    return found


def _equal_at_start(one: Any, other: Any) -> int:
    """How many items two sequences have in common before they differ."""
    equal = [x == y for x, y in zip(one, other, strict=False)]
    return (*equal, False).index(False)


def _inside_word(text: str, place: int) -> bool:
    return 0 < place < len(text) and not (text[place - 1].isspace() or text[place].isspace())


# Values


def _require(problem: str | None) -> None:
    if problem is not None:
        raise Unusable(problem)


def _problem(name: str, value: Any) -> str | None:
    """Why the value cannot be used in our column of this name (None if it can)."""
    if name == "margin":
        number = _number(value)
        if number is not None and abs(number) > _LARGEST_MARGIN:
            return f"margin is beyond {_LARGEST_MARGIN:.2g}, too large to train on"
        return "margin is not a finite number" if number is None else None
    if name == "label":
        return "label is empty" if is_blank(value) else None
    if name == "input" and is_blank(value):
        return None
    if name == "references" and isinstance(value, list):
        if not value:
            return "references is empty"
        return next(filter(None, (_text_problem(name, text) for text in value)), None)
    return _text_problem(name, value)


def _text_problem(name: str, value: Any) -> str | None:
    """Why the value is not a text that can be trained on (None if it is)."""
    if _is_empty(value):
        return f"{name} is empty"
    if not isinstance(value, str):
        return f"{name} is not a string"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, as a JSON escape can spell it
        return f"{name} contains invalid Unicode"
    return None


def _is_empty(value: Any) -> bool:
    return value == [] or (isinstance(value, str) and not value.strip())


def _number(value: Any) -> float | None:
    """The finite number that a number or a text spells, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _label(value: Any) -> bool:
    """What true and false, 1 and 0 say, as values or as texts."""
    found = None if isinstance(value, (list, dict)) else _LABELS.get(str(value).strip().lower())
    if found is None:
        raise Misread(
            f"label is {short(repr(value))}, which is neither true nor false (nor 1 or 0); make it "
            "one of them, or name another column by --columns label=NAME"
        )
    return found
