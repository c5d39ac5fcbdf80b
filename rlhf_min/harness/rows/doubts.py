"""What in rows that can be used is most likely not meant: counted and named, never changed."""

import json
import re
from ast import literal_eval
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_min.harness.rows.files import Row, short
from rlhf_min.harness.rows.messages import is_written_messages, keys_left_out

MOST = 0.9  # of the rows: what happens so often is no accident
FEW = 8  # a shorter prompt is looked for at the beginning of a response only
HEAD = 40  # characters that a template may put before the prompt

# Columns that change what the others mean.
_JUDGES = frozenset(
    "label labels score scores rating ratings rank ranks winner preference preferred better "
    "reward correct is_correct quality".split()
)
_CONTEXT = frozenset(
    "system system_prompt history context input document documents passage tools images".split()
)
_WRITTEN = re.compile(  # in the brackets or quotes of a program
    r"""\[.*\]|\{.*\}|\(.*\)|array\(.*\)|b?'.*'|b?".*\"""", re.DOTALL
)
_MISSING = frozenset({"nan", "NaN", "None", "<NA>", "NaT"})  # as pandas and Python write no value


def doubts(
    rows: Sequence[Row],
    raw: Sequence[Row],
    used: Mapping[str, str],
    unused: Sequence[str],
    *,
    judged: bool,
) -> list[str]:
    """A line for each doubt about the usable rows.

    Args:
        rows: as the stage gets them.
        raw: the same rows as they were read.
        used: our column -> the file's column that served as it.
        unused: the other columns.
        judged: whether reward functions see these, so that labels in them may well be used.
    """
    if judged:  # then a response in the file is not what is learned from
        rows = [{"prompt": row["prompt"]} for row in rows]
    return [
        *_repeated(rows),
        *_odd_texts(rows),
        *_unused(raw, unused, judged=judged),
        *_unnamed_prompt(rows, raw, used, unused),
        *_messages(raw, used),
    ]


def _said(rows: Sequence[Row]) -> dict[str, list[tuple[str, list[str]]]]:
    """By column of responses: the prompt and the texts of each row that has some."""
    found: dict[str, list[tuple[str, list[str]]]] = {}
    for row in rows:
        for name in ("response", "chosen", "rejected", "references"):
            value = row.get(name)
            values = value if isinstance(value, list) else [value]
            if texts := [text for text in values if isinstance(text, str)]:
                found.setdefault(name, []).append((row["prompt"], texts))
    return found


def _repeated(rows: Sequence[Row]) -> Iterator[str]:
    """Responses that hold the prompt, and prompts that hold the response."""
    said = _said(rows)
    for name, found in said.items():
        count = sum(any(begins_with(text, prompt) for text in texts) for prompt, texts in found)
        line = f"{name} begins with the prompt in {count} of {len(rows)} rows"
        if count >= MOST * len(rows):
            yield f"warning: {line}; it would be learned twice; take it out of that column"
        elif count:
            yield f"  {line}"
    for name, found in said.items():
        count = sum(any(_ends_with(prompt, text) for text in texts) for prompt, texts in found)
        if count >= MOST * len(rows):
            yield (
                f"warning: the prompt ends with {name} in {count} of {len(rows)} rows, so it says "
                "what is to be learned; take it out of the prompt"
            )


def begins_with(response: str, prompt: str) -> bool:
    """Whether a response repeats the prompt, or its last message, whatever the white space.

    >>> begins_with("Q: What is  it?\\nA: A thing.", "What is it?")
    True
    >>> begins_with("It is a thing.", "It")
    True
    >>> begins_with("Items", "It")
    False
    """
    said = _words(response[: 2 * len(prompt) + 4 * HEAD])  # the rest of a long one is not looked at
    for text in _askings(prompt):
        asked = _words(text)
        place = said.find(asked, 0, len(asked) + (HEAD if len(asked) >= FEW else 0))
        if asked and place >= 0 and not said[place + len(asked) :][:1].isalnum():
            return True
    return False


def _ends_with(prompt: str, response: str) -> bool:
    if prompt.rstrip()[-2:].casefold() != response.rstrip()[-2:].casefold():
        return False  # nearly all of them
    asked, said = _words(prompt), _words(response)
    return len(asked) > len(said) >= FEW and asked.endswith(said)


def _askings(prompt: str) -> list[str]:
    """The prompt, and the last of its messages if it has several."""
    messages: Sequence[Any] = getattr(prompt, "messages", ())
    return [prompt, messages[-1]["content"]] if len(messages) > 1 else [prompt]


def _words(text: str) -> str:
    return " ".join(text.casefold().split())


def _odd_texts(rows: Sequence[Row]) -> Iterator[str]:
    """Values that a program has written as text."""
    texts = {"prompt": [row["prompt"] for row in rows]}
    for name, found in _said(rows).items():
        texts[name] = [text for _, of_row in found for text in of_row]
    for name, said in texts.items():
        count = sum(map(is_written_value, said))
        if count >= MOST * len(said):
            yield (
                f"warning: {name} is a list, an object or a text in quotes, as a program writes "
                f"them, in {count} of {len(said)} texts; they are learned with all their marks"
            )
    for name, said in texts.items():
        count = sum("\\n" in text and "\n" not in text for text in said)
        if count >= MOST * len(said):
            yield (
                f"warning: {name} spells its line ends as \\n, backslash and letter, in {count} of "
                f"{len(said)} texts; that is what is learned"
            )
    for name, said in texts.items():
        for text, count in Counter(text for text in said if text in _MISSING).items():
            yield (
                f"warning: {name} is the word {text} in {count} of {len(said)} texts; if that "
                "means that there is none, leave these rows out"
            )


def is_written_value(text: str) -> bool:
    """Whether the whole text is a list, an object, bytes or a text as JSON or Python write them.

    >>> all(map(is_written_value, ["['a', 'b']", '{"a": 1}', "b'a'", '"a"', "['a'\\n 'b']"]))
    True
    >>> any(map(is_written_value, ["[a, b]", "b", "(1)", 'a "b"']))
    False
    """
    text = text.strip()
    if not _WRITTEN.fullmatch(text):
        return False
    for read in (json.loads, literal_eval):
        try:
            found: Any = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return isinstance(found, (list, dict, tuple, set, str, bytes))
    return re.match(r"""array\(|[\[{(]\s*['"{]""", text) is not None  # arrays have no commas


def _unused(raw: Sequence[Row], unused: Sequence[str], *, judged: bool) -> Iterator[str]:
    """Unused columns that change what the used ones mean."""
    for column in unused:
        said = [value for row in raw if _says(value := row.get(column))]
        name = column.strip().lower()
        if not said:
            continue
        if name in _JUDGES or all(isinstance(value, bool) for value in said):
            if judged or all(value is True for value in said):
                continue
            common = Counter(short(str(value)) for value in said).most_common(3)
            counts = ", ".join(f"{value} in {count}" for value, count in common)
            yield (
                f"warning: the column {short(column)} is not used, and says {counts} of {len(raw)} "
                "rows; leave out the rows that are not to be learned from"
            )
        elif name in _CONTEXT:
            yield (
                f"warning: the column {short(column)} is not used, and {len(said)} of {len(raw)} "
                "rows have it; what it says must stand in the prompt to be read"
            )


def _says(value: Any) -> bool:
    return isinstance(value, bool) or (value == value and value not in (None, "", [], {}))


def _unnamed_prompt(
    rows: Sequence[Row], raw: Sequence[Row], used: Mapping[str, str], unused: Sequence[str]
) -> Iterator[str]:
    """A prompt taken from plain texts, where a column may hold the real one."""
    is_plain = not any(hasattr(row.get("prompt"), "messages") for row in rows)
    if "prompt" in used or "messages" in used or not is_plain:
        return
    columns = [c for c in unused if any(" " in str(row.get(c) or "").strip() for row in raw)]
    if columns:
        yield (
            "warning: no column is the prompt, so it is what chosen and rejected begin with; if "
            f"one of {', '.join(map(short, columns))} is, give --columns prompt={short(columns[0])}"
        )


def _messages(raw: Sequence[Row], used: Mapping[str, str]) -> Iterator[str]:
    """What was done to messages: read out of text, and read in part."""
    for name, column in used.items():
        count = sum(is_written_messages(row.get(column)) for row in raw)
        if count:
            yield f"  {name} is messages, read out of JSON text in {count} of {len(raw)} rows"
        keys = sorted(set().union(*(keys_left_out(row.get(column)) for row in raw)))
        if keys:
            mark = "warning: " if "weight" in keys else "  "  # which may say: not to be learned
            yield f"{mark}of the messages in {name} is not used: {', '.join(map(short, keys))}"
