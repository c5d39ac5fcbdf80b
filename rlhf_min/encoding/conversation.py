"""Rows of the user's own data, as a codec takes them: a prompt may be a conversation."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Place: TypeAlias = int | str  # of a row: its number, or a number in a file


class Conversation(str):
    """A prompt of several chat messages. To most code it is just their text.

    Args:
        messages: each with its ``role`` and its ``content``.

    Example:
        >>> Conversation([{"role": "user", "content": "Hi"}])
        'Hi'
        >>> turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "Bye")]
        >>> print(Conversation([{"role": role, "content": text} for role, text in turns]))
        user: Hi
        <BLANKLINE>
        assistant: Hello.
        <BLANKLINE>
        user: Bye
    """

    messages: tuple[Mapping[str, str], ...]

    def __new__(cls, messages: Sequence[Mapping[str, str]]) -> "Conversation":
        """The text: a transcript, or the content alone of a single message of the user."""
        if [message["role"] for message in messages] == ["user"]:
            text = messages[0]["content"]
        else:
            text = "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
        conversation = super().__new__(cls, text)
        conversation.messages = tuple(dict(message) for message in messages)
        return conversation

    def __getnewargs__(self) -> Any:  # what copies are made from
        return (self.messages,)


class PlacedRow(dict[str, Any]):
    """A row that knows its place in the user's file, so that reports can name it.

    >>> PlacedRow({"prompt": "Hi"}, 3) == {"prompt": "Hi"}
    True
    """

    def __init__(self, columns: Mapping[str, Any], place: Place) -> None:
        super().__init__(columns)
        self.place = place
