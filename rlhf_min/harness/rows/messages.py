"""Chat messages in a cell: as a list of objects, as JSON text, or as a transcript."""

import json
import re
from typing import Any

from rlhf_min.harness.rows.files import short

Message = dict[str, str]

_TURN = re.compile(r"\n\n(Human|Assistant):")  # of the transcripts of Anthropic's HH
# Other names of the roles, of those transcripts and of ShareGPT.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
_KEYS = (("role", "content"), ("from", "value"))  # of a message, of ShareGPT's
_READ = frozenset({"role", "content", "from", "value"})
_SPOKEN = re.compile(  # a message written down, in JSON or as Python shows it
    r"""['"](?:role|from)['"]\s*:\s*['"](?:system|developer|user|human|assistant|gpt|tool)['"]""",
    re.IGNORECASE,
)


class Unusable(ValueError):
    """A row that the stage cannot use. The message is the reason, the same for all such rows."""


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


def read_written(value: Any, name: str) -> Any:
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
    if messages_in(found, name) is None:
        raise Unusable(f"{name} is JSON text that holds more than a list of messages")
    return found


def messages_in(value: Any, name: str) -> list[Message] | None:
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
        keys = [pair for pair in _KEYS if set(pair) <= set(message)]
        if not keys:
            return None
        role, content = (message[key] for key in keys[0])
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
            raise Unusable(f"{name} has a message with a part that is no text: {short(str(kind))}")
    return "".join(part["text"] for part in content)


def keys_left_out(value: Any) -> set[str]:
    """The keys of a cell's messages that no stage reads, where they say something."""
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list):
        return set()
    return {
        str(key)
        for message in messages
        if isinstance(message, dict) and not _READ.isdisjoint(message)
        for key, item in message.items()
        if key not in _READ and not is_blank(item)
    }


def turns_of(text: Any) -> list[Message] | None:
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


def is_blank(value: Any) -> bool:
    """Whether a cell says nothing: no value, NaN, nothing in it, or nothing but white space."""
    if isinstance(value, (list, dict)):
        return not value
    return value is None or value != value or (isinstance(value, str) and not value.strip())
