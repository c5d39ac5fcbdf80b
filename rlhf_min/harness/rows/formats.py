"""The formats of rows: which columns serve a stage, and what they hold: texts or chat messages.

A pair may have its prompt in a column, or leave it implicit, as what chosen and rejected begin
with. A row that cannot be used is `Unusable`, and the reason is the message.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal

from rlhf_min.encoding.conversation import Conversation
from rlhf_min.errors import BadInput, require
from rlhf_min.harness.rows.files import Row, shown

Stage = Literal["sft", "reward", "ppo", "dpo", "evaluation"]
Message = dict[str, str]

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
_NAMES = (
    *("prompt", "response", "chosen", "rejected", "references", "messages", "margin"),
    *("input", "system"),
)
_MESSAGES = ("messages", "conversations", "conversation")
_SYSTEM = ("system", "system_prompt")
_TURN = re.compile(r"\n\n(Human|Assistant):")  # of the transcripts of Anthropic's HH
# Other names of the roles, of those transcripts and of ShareGPT.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
_OF_MESSAGES = frozenset({"role", "content", "from", "value"})
_SPOKEN = re.compile(  # a message written down, in JSON or as Python shows it
    r"""['"](?:role|from)['"]\s*:\s*['"](?:system|developer|user|human|assistant|gpt|tool)['"]""",
    re.IGNORECASE,
)
_LARGEST_MARGIN = 2.0**24  # beyond it float32 has no place for a difference of 1 in the scores


class Unusable(ValueError):
    """A row that the stage cannot use. The message is the reason, the same for all such rows."""


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
            f"--columns {shown(text)}: {shown(part)} does not say which column serves as which; "
            "write it like prompt=question,chosen=good,rejected=bad",
        )
        require(
            ours not in named, f"--columns {shown(text)}: {shown(ours)} stands twice; name it once"
        )
        named[ours] = theirs
    return named


def check_columns(
    columns: Sequence[str], named: Mapping[str, str], first_row: Row, source: str
) -> None:
    """Refuse a mapping from a name that no stage knows, or to a column that is not there."""
    for ours, theirs in named.items():
        require(
            ours in _NAMES,
            f"--columns: no stage has a column {shown(ours)}; left of = stands one of "
            f"{', '.join(_NAMES)}",
        )
        if theirs not in columns:
            found = [f"{shown(c)}: {shown(str(first_row.get(c)))}" for c in columns[:8]]
            raise BadInput(
                f"{source}: --columns says {ours}={shown(theirs)}, but there is no such column; "
                f"give one of {_listed(columns)}; the first row is {{{', '.join(found)}}}"
            )


def find_columns(
    columns: Sequence[str], stage: Stage, source: str, named: Mapping[str, str]
) -> dict[str, str]:
    """Our column -> the file's column that serves as it.

    Without all columns of the stage there may still be ``messages``, or ``chosen`` and
    ``rejected`` with the prompt in both.

    Raises:
        BadInput: if columns are missing, or several could be the same one.
    """

    def find(*names: str) -> str | None:
        return _find_column(columns, names, source, named)

    needed = _NEEDED[stage]
    served = {name: find(*names) for name, names in needed.items()}
    if None in served.values():
        served = _without_prompt(
            served,
            stage,
            find(*_MESSAGES),
            find("chosen"),
            find("rejected"),
            alone="messages" in named,
        )
    missing = [name for name, column in served.items() if column is None]
    if missing:
        remedies = " and ".join(_remedy(name, needed[name]) for name in missing)
        several = "; of several answers to a prompt make pairs: a row for each two, the better one "
        several += "as chosen, the worse one as rejected"
        raise BadInput(
            f"{source}: {_TITLE[stage]} needs the column{'s' * (len(needed) > 1)} "
            f"{', '.join(needed)}; found {_listed(columns)}; rename or add {remedies}, "
            f"or give --columns {','.join(f'{name}=NAME' for name in missing)}"
            + several
            * ({"chosen", "rejected"} <= set(missing))
        )
    served["system"] = find(*_SYSTEM)
    prompt = served.get("prompt")
    if prompt is not None and _plain_name(prompt) == "instruction":
        served["input"] = find("input")
    if stage == "reward":
        served["margin"] = find("margin")
    return {name: column for name, column in served.items() if column is not None}


def _without_prompt(
    served: dict[str, str | None],
    stage: Stage,
    messages: str | None,
    chosen: str | None,
    rejected: str | None,
    *,
    alone: bool,
) -> dict[str, str | None]:
    """The columns of another format, if the file has them.

    Messages beside a response or a pair are its prompt, unless the user named them (`alone`).
    """
    beside = served["prompt"] is None and any(served.values())
    if messages is not None and stage not in ("reward", "dpo") and (alone or not beside):
        return {"messages": messages}
    if messages is not None and served["prompt"] is None:
        return served | {"prompt": messages}
    if served["prompt"] is None and chosen is not None and rejected is not None:
        return {"chosen": chosen, "rejected": rejected}
    return served


def _find_column(
    columns: Sequence[str], names: tuple[str, ...], source: str, named: Mapping[str, str]
) -> str | None:
    """The column that the user named so, else the one column with one of these names, or None."""
    for name in names:
        if name in named:
            return named[name]
    taken = named.values()
    found = [column for column in columns if _plain_name(column) in names and column not in taken]
    if len(found) > 1:
        raise BadInput(
            f'{source}: the columns "{shown(found[0])}" and "{shown(found[1])}" could both be '
            f'the "{names[0]}"; remove or rename one of them'
        )
    return found[0] if found else None


def clean_row(row: Row, used: Mapping[str, str], stage: Stage) -> Row:
    """The row under the stage's column names, its texts exactly those of the file.

    Raises:
        Unusable: if it has not all that the stage needs.
    """
    values = {name: _read_text(row.get(column), name) for name, column in used.items()}
    system = values.pop("system", None)
    if "messages" in values:
        clean = _from_messages(values["messages"], stage)
    elif "prompt" in values:
        clean = values | _from_columns(values)
        if stage in ("sft", "evaluation") and _plain_name(used["prompt"]) in _MESSAGES:
            _require_open(clean["prompt"], used)
    else:
        clean = _from_pair(values.pop("chosen"), values.pop("rejected")) | values
    for name, value in clean.items():
        if problem := _problem(name, value):
            raise Unusable(problem)
    if "rejected" in clean and clean["chosen"].strip() == clean["rejected"].strip():
        raise Unusable("chosen equals rejected")
    if "margin" in clean:
        clean["margin"] = _number(clean["margin"])
    if "input" in clean and not _is_blank(further := clean.pop("input")):
        if isinstance(clean["prompt"], Conversation):
            raise Unusable("input cannot be added to a list of messages")
        clean["prompt"] += f"\n{further}"
    if not _is_blank(system):
        clean["prompt"] = _with_system(clean["prompt"], system)
    return _for_stage(clean, stage)


def _require_open(prompt: Any, used: Mapping[str, str]) -> None:
    """A conversation that has its response already is no prompt of another one."""
    messages = getattr(prompt, "messages", ())
    if messages and messages[-1]["role"] == "assistant":
        (other,) = used.keys() & {"response", "references"}
        ours, theirs = shown(used["prompt"]), shown(used[other])
        raise Unusable(
            f"{ours} ends with an assistant message and {theirs} is a response too (give --columns "
            f"messages={ours} to leave {theirs} out)"
        )


def _with_system(prompt: str, system: Any) -> Conversation:
    """The prompt with a message of the system before it."""
    if problem := _text_problem("system", system):
        raise Unusable(problem)
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
    if stage == "ppo":
        clean = {"prompt": clean["prompt"]}
    if stage == "evaluation" and isinstance(clean["references"], str):
        clean["references"] = [clean["references"]]
    return clean


def _target(stage: Stage) -> str:
    return "references" if stage == "evaluation" else "response"


# Chat messages


def is_written_messages(value: Any) -> bool:
    """Whether a text is all of it messages, written as JSON or as Python shows them.

    >>> is_written_messages("[{'role': 'user', 'content': 'Hi'}]")
    True
    >>> is_written_messages("What does {'role': 'user'} mean?")
    False
    """
    if not isinstance(value, str):
        return False
    text = value.strip()
    begins = text.startswith(("[", "{", "(", "array(")) and text.endswith(("]", "}", ")", "..."))
    return begins and _SPOKEN.search(text) is not None


def _read_text(value: Any, name: str) -> Any:
    """The value itself, or the messages that it holds as JSON text."""
    if not is_written_messages(value):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        found = None
    if found is None:
        raise Unusable(
            f"{name} is a list of messages written as text, and not as JSON; write the file again "
            "as JSONL"
        )
    if _messages(found, name) is None:
        raise Unusable(f"{name} is JSON text that holds more than a list of messages")
    return found


def _messages(value: Any, name: str) -> list[Message] | None:
    """The messages in a cell, with their role and content alone; None if it holds none.

    A single message is a list of one.
    """
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages:
        return None
    if not all(isinstance(message, dict) for message in messages):
        return None
    kept = []
    for message in messages:
        if {"role", "content"} <= set(message):
            role, content = message["role"], message["content"]
        elif {"from", "value"} <= set(message):
            role, content = message["from"], message["value"]
        else:
            return None
        if message.get("tool_calls") or message.get("function_call"):
            raise Unusable(f"{name} has a message with a call of a tool, which no stage reads")
        content = _text_of_parts(content, name)
        if not isinstance(role, str) or not isinstance(content, str):
            raise Unusable(f"{name} has a message whose role or content is not a string")
        kept.append({"role": _ROLES.get(role.lower(), role), "content": content})
    return kept


def _text_of_parts(content: Any, name: str) -> Any:
    """The text of a content that is a list of parts, one after the other."""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return content
    for part in content:
        kind = part.get("type")
        if kind != "text" or not isinstance(part.get("text"), str):
            raise Unusable(f"{name} has a message with a part that is no text: {shown(str(kind))}")
    return "".join(part["text"] for part in content)


def left_out_of_messages(value: Any) -> set[str]:
    """The keys of a cell's messages that no stage reads, where they say something."""
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list):
        return set()
    return {
        str(key)
        for message in messages
        if isinstance(message, dict) and not _OF_MESSAGES.isdisjoint(message)
        for key, item in message.items()
        if key not in _OF_MESSAGES and not _is_blank(item)
    }


def _turns(text: Any) -> list[Message] | None:
    """The turns of a transcript "\\n\\nHuman: ...\\n\\nAssistant: ..."; None if it is none."""
    if not isinstance(text, str) or not text.lstrip().startswith("Human:"):
        return None
    _, *parts = _TURN.split("\n\n" + text.lstrip())
    speakers, texts = parts[::2], parts[1::2]
    if "Assistant" not in speakers:
        return None
    return [
        {"role": _ROLES.get(speaker.lower(), speaker.lower()), "content": turn.strip()}
        for speaker, turn in zip(speakers, texts, strict=True)
    ]


def _from_messages(value: Any, stage: Stage) -> Row:
    """A whole conversation: up to the last user message, or to the response that is last."""
    messages = _messages(value, "messages")
    if messages is None:
        raise Unusable("messages is not a list of objects with role and content")
    role = "user" if stage == "ppo" else "assistant"
    places = [i for i, message in enumerate(messages) if message["role"] == role]
    if not places:
        raise Unusable(f"messages has no {role} message")
    last = places[-1]
    if stage == "ppo":
        return {"prompt": Conversation(messages[: last + 1])}
    return {"prompt": Conversation(messages[:last]), _target(stage): messages[last]["content"]}


def _from_columns(values: Row) -> Row:
    """What the lists of messages beside a prompt say; nothing if there are none.

    Messages that begin with the assistant's go on from the prompt; others are the whole
    conversation, and the prompt is what they say it is.
    """
    found: Row = {}
    before = _messages(values["prompt"], "prompt")
    if before is not None:
        found["prompt"] = Conversation(before)
    elif isinstance(values["prompt"], str):
        before = [{"role": "user", "content": values["prompt"]}]
    whole: dict[str, list[Message]] = {}
    for name in ("response", "references", "chosen", "rejected"):
        messages = _messages(values.get(name), name)
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
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if _is_empty(value):
            raise Unusable(f"{name} is empty")
    for read in (lambda value: _messages(value, "chosen or rejected"), _turns):
        sides = read(chosen), read(rejected)
        if sides[0] is not None and sides[1] is not None:
            return _common_prompt(sides[0], sides[1])
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if problem := _text_problem(name, value):
            raise Unusable(problem)
    return _common_text(chosen, rejected)


def _common_prompt(chosen: list[Message], rejected: list[Message]) -> Row:
    """The messages that both begin with, and the one response that each goes on with."""
    pairs = zip(chosen, rejected, strict=False)
    equal = [_same(one, other) for one, other in pairs]
    shared = (*equal, False).index(False)
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


def _same(one: Message, other: Message) -> bool:
    return one["role"] == other["role"] and one["content"].strip() == other["content"].strip()


def _common_text(chosen: str, rejected: str) -> Row:
    """The words that both begin with, and what each goes on with; a space goes with the latter."""
    if chosen.strip() == rejected.strip():
        raise Unusable("chosen equals rejected")
    equal = [one == other for one, other in zip(chosen, rejected, strict=False)]
    end = (*equal, False).index(False)
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


def _inside_word(text: str, place: int) -> bool:
    return 0 < place < len(text) and not (text[place - 1].isspace() or text[place].isspace())


# Values


def _problem(name: str, value: Any) -> str | None:
    """Why the value cannot be used in our column of this name (None if it can)."""
    if name == "margin":
        number = _number(value)
        if number is not None and abs(number) > _LARGEST_MARGIN:
            return f"margin is beyond {_LARGEST_MARGIN:.2g}, too large to train on"
        return "margin is not a finite number" if number is None else None
    if name == "input" and _is_blank(value):
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


def _is_blank(value: Any) -> bool:
    """Whether the cell says nothing: no value, NaN, or nothing but white space."""
    if isinstance(value, (list, dict)):
        return not value
    return value is None or value != value or _is_empty(value)


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


def _plain_name(column: str) -> str:
    return column.strip().lower()


def _listed(columns: Sequence[str]) -> str:
    names = [shown(column) for column in columns[:8]] + ["..."] * (len(columns) > 8)
    return ", ".join(names) or "none"


def _remedy(name: str, understood: tuple[str, ...]) -> str:
    others = ", ".join(other for other in understood if other != name)
    return f'"{name}" (or {others})' if others else f'"{name}"'
