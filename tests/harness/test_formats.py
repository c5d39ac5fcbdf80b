"""Texts out of chat messages, transcripts and implicit prompts, each against rows made by hand."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rlhf_min.encoding.conversation import Conversation
from rlhf_min.errors import BadInput
from rlhf_min.harness.rows.columns import Stage, find_columns
from rlhf_min.harness.rows.load import load_rows

SPEAKERS = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}


def talk(*turns: str) -> list[dict[str, str]]:
    """Messages from "u:Hi" and the like."""
    return [{"role": SPEAKERS[turn[0]], "content": turn[2:]} for turn in turns]


def frame(*rows: dict[str, Any]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), dtype=object)


def rows(row: dict[str, Any], stage: Stage) -> list[dict[str, Any]]:
    return load_rows(frame(row), stage).rows


def reason(row: dict[str, Any], stage: Stage) -> str:
    """Why the row is dropped, beside one that is kept."""
    kept = dict.fromkeys(row) | {"n": 1}
    for name in ("prompt", "chosen", "rejected", "messages"):
        if name in row:
            kept[name] = {
                "prompt": "p",
                "chosen": "p c" if "prompt" not in row else "c",
                "rejected": "p r" if "prompt" not in row else "r",
                "messages": talk("u:p", "a:c"),
            }[name]
    loaded = load_rows(frame(kept, row | {"n": 2}), stage)
    assert (len(loaded.rows), loaded.rows_read) == (1, 2)
    ((why, numbers),) = loaded.dropped.items()
    assert numbers == [2]
    assert why.isprintable()
    return why


# Explicit prompts


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "messages"),
    [
        (talk("u:p"), talk("a:c"), talk("a:r"), talk("u:p")),
        (talk("s:Be kind", "u:p"), talk("a:c"), talk("a:r"), talk("s:Be kind", "u:p")),
        ("p", talk("a:c"), talk("a:r"), talk("u:p")),
        # whole conversations beside the prompt that they begin with, or beside its text
        (talk("u:p"), talk("u:p", "a:c"), talk("u:p", "a:r"), talk("u:p")),
        ("p", talk("s:x", "u:p", "a:c"), talk("s:x", "u:p", "a:r"), talk("s:x", "u:p")),
        # what both go on with is prompt as well
        (
            talk("u:p"),
            talk("a:1", "u:2", "a:c"),
            talk("a:1", "u:2", "a:r"),
            talk("u:p", "a:1", "u:2"),
        ),
        # responses may be plain texts, on one side or both
        (talk("u:p", "a:1", "u:2"), "c", "r", talk("u:p", "a:1", "u:2")),
        (talk("u:p"), talk("a:c"), "r", talk("u:p")),
    ],
)
def test_explicit_prompt(prompt, chosen, rejected, messages):
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    for stage in ("dpo", "reward"):
        (found,) = rows(row, stage)
        assert found == {"prompt": Conversation(messages), "chosen": "c", "rejected": "r"}
        assert found["prompt"].messages == tuple(messages)
    (found,) = rows(row, "sft")
    assert found == {"prompt": Conversation(messages), "response": "c"}
    assert found["prompt"].messages == tuple(messages)
    (found,) = rows(row, "evaluation")
    assert found == {"prompt": Conversation(messages), "references": ["c"]}


def test_prompt_and_completion():
    for reply in (talk("a:c"), "c"):
        (found,) = rows({"prompt": talk("s:x", "u:p"), "completion": reply}, "sft")
        assert found == {"prompt": "system: x\n\nuser: p", "response": "c"}
        assert found["prompt"].messages == tuple(talk("s:x", "u:p"))
    (found,) = rows({"prompt": talk("u:p"), "completion": talk("a:1", "u:2", "a:c")}, "sft")
    assert found["prompt"].messages == tuple(talk("u:p", "a:1", "u:2"))
    assert found["response"] == "c"


def test_a_label_beside_messages():
    row = {"prompt": talk("s:x", "u:p"), "completion": talk("a:c"), "label": True}
    (found,) = rows(row, "kto")
    assert found == {"prompt": "system: x\n\nuser: p", "response": "c", "label": True}
    assert found["prompt"].messages == tuple(talk("s:x", "u:p"))
    # Messages alone are the prompt and, last, the response; beside a response they are the prompt.
    for row in (
        {"messages": talk("s:x", "u:p", "a:c"), "label": True},
        {"messages": talk("s:x", "u:p"), "response": "c", "label": True},
    ):
        assert rows(row, "kto") == [found]
    both_hold_one = {"messages": talk("s:x", "u:p", "a:c"), "response": "d", "label": True}
    with pytest.raises(BadInput, match="give --columns messages=messages to leave response out"):
        rows(both_hold_one, "kto")
    assert load_rows(frame(both_hold_one), "kto", columns={"messages": "messages"}).rows == [found]
    with pytest.raises(BadInput, match=r"KTO needs .*; found messages; rename or add"):
        rows({"messages": talk("u:p", "a:c")}, "kto")


def test_pairs_serve_kto_as_they_serve_dpo():
    for row in (
        {"prompt": talk("u:p"), "chosen": talk("a:c"), "rejected": "r"},
        {"chosen": talk("u:p", "a:c"), "rejected": talk("u:p", "a:r")},
        {"messages": talk("u:p"), "chosen": "c", "rejected": "r"},
        both("\n\nHuman: p\n\nAssistant: c", "\n\nHuman: p\n\nAssistant: r"),
    ):
        assert rows(row, "kto") == rows(row, "dpo")
    assert reason(both("c", "c"), "kto") == "chosen equals rejected"


def test_prompt_alone():
    row = {"prompt": talk("u:p", "a:1", "u:2"), "chosen": talk("a:c"), "n": 3}
    (found,) = rows(row, "ppo")
    assert found == {
        "prompt": "user: p\n\nassistant: 1\n\nuser: 2",
        "chosen": talk("a:c"),
        "n": 3,
    }
    assert found["prompt"].messages == tuple(talk("u:p", "a:1", "u:2"))


def test_further_keys_of_a_message_are_left_out():
    (message,) = talk("u:p")
    (found,) = rows({"prompt": [{**message, "name": None, "weight": 1}]}, "ppo")
    assert found["prompt"].messages == (message,)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": talk("u:  ")}, "prompt is empty"),
        ({"chosen": []}, "chosen is empty"),
        ({"chosen": talk("a: \n")}, "chosen is empty"),
        ({"rejected": talk("a:c ")}, "chosen equals rejected"),
        ({"rejected": talk("u:q")}, "chosen and rejected have no common prompt"),
        ({"rejected": talk("u:p")}, "rejected is empty after the common prompt"),
        ({"rejected": talk("a:r", "u:2", "a:3")},
         "rejected is not one assistant message after the common prompt"),
        ({"chosen": talk("a:c", "t:2")},
         "chosen is not one assistant message after the common prompt"),
        ({"chosen": [{"role": "assistant", "content": ["c"]}]},
         "chosen has a message whose role or content is not a string"),
        ({"prompt": [{"role": None, "content": "p"}]},
         "prompt has a message whose role or content is not a string"),
        ({"prompt": [{"content": "p"}]}, "prompt is not a string"),
        ({"prompt": [*talk("u:p"), "p"]}, "prompt is not a string"),
        ({"chosen": [{"from": "gpt"}]}, "chosen is not a string"),
        ({"prompt": talk("u:\ud800")}, "prompt contains invalid Unicode"),
        ({"rejected": talk("a:\ud800")}, "rejected contains invalid Unicode"),
    ],
)  # fmt: skip
def test_explicit_prompt_is_dropped(changes, why):
    row = {"prompt": talk("u:p"), "chosen": talk("a:c"), "rejected": talk("a:r")}
    assert reason(row | changes, "dpo") == why


def test_a_response_ends_with_the_assistant():
    row = {"prompt": talk("u:p"), "chosen": talk("a:c", "u:thanks")}
    assert reason(row, "sft") == "response does not end with an assistant message"


def test_input_goes_with_texts_only():
    row = {"instruction": talk("u:p"), "input": "i", "output": "o"}
    kept = {"instruction": "p", "input": "i", "output": "o"}
    loaded = load_rows(frame(kept, row), "sft")
    assert loaded.rows == [{"prompt": "p\ni", "response": "o"}]
    assert loaded.dropped == {"input cannot be added to a list of messages": [2]}


def test_equal_conversations_are_duplicates():
    row = {"prompt": talk("u:p", "a:1", "u:2"), "response": talk("a:c")}
    loaded = load_rows(frame(row, row), "sft")
    assert loaded.dropped == {"duplicate of an earlier row": [2]}


# messages


def test_messages():
    row = {"messages": talk("s:x", "u:1", "a:2", "u:3", "a:4", "u:5"), "n": 7}
    (found,) = rows(row, "sft")
    assert found["prompt"].messages == tuple(talk("s:x", "u:1", "a:2", "u:3"))
    assert found["response"] == "4"
    (found,) = rows(row, "ppo")
    assert found["prompt"].messages == tuple(row["messages"])
    assert found["n"] == 7
    (found,) = rows({"messages": talk("u:1", "a:2")}, "ppo")
    assert found == {"prompt": "1", "messages": talk("u:1", "a:2")}
    (found,) = rows(row, "evaluation")
    assert found == {
        "prompt": "system: x\n\nuser: 1\n\nassistant: 2\n\nuser: 3",
        "references": ["4"],
    }


def test_a_whole_format_goes_before_messages():
    row = {"prompt": "p", "chosen": "c", "messages": talk("u:1", "a:2")}
    assert rows(row, "sft") == [{"prompt": "p", "response": "c"}]
    del row["chosen"]  # a prompt alone does not do for SFT, but for PPO
    assert rows(row, "sft") == [{"prompt": "1", "response": "2"}]
    assert rows(row, "ppo") == [{"prompt": "p", "messages": row["messages"]}]


@pytest.mark.parametrize(
    ("value", "stage", "why"),
    [
        ("Hi", "sft", "messages is not a list of objects with role and content"),
        ([], "sft", "messages is not a list of objects with role and content"),
        (None, "ppo", "messages is not a list of objects with role and content"),
        (talk("u:1"), "sft", "messages has no assistant message"),
        (talk("s:x", "a:1"), "ppo", "messages has no user message"),
        (talk("a:1"), "sft", "prompt is empty"),
        (talk("u:1", "a: "), "sft", "response is empty"),
        (
            [*talk("u:1"), {"role": "assistant", "content": None}],
            "sft",
            "messages has a message whose role or content is not a string",
        ),
    ],
)
def test_messages_are_dropped(value, stage, why):
    assert reason({"messages": value}, stage) == why


def test_messages_do_for_no_pairs():
    with pytest.raises(
        BadInput, match="DPO needs the columns prompt, chosen, rejected; found mess"
    ):
        rows({"messages": talk("u:1", "a:2")}, "dpo")


def chat(*turns: str) -> list[dict[str, str]]:
    """The messages of `talk`, as ShareGPT has them."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[x["role"]], "value": x["content"]} for x in talk(*turns)]


@pytest.mark.parametrize("name", ["conversations", "conversation", "Messages"])
def test_other_names_of_messages(name):
    row = {name: chat("s:x", "u:1", "a:2", "u:3", "a:4")}
    (found,) = rows(row, "sft")
    assert found["prompt"].messages == tuple(talk("s:x", "u:1", "a:2", "u:3"))
    assert found["response"] == "4"
    (found,) = rows(row, "ppo")
    assert found["prompt"].messages == tuple(talk("s:x", "u:1", "a:2", "u:3"))


def test_other_names_of_roles():
    row = {"messages": [{"role": "Human", "content": "1"}, {"role": "bot", "content": "2"}]}
    assert rows(row, "sft") == [{"prompt": "1", "response": "2"}]
    assert rows(row, "sft")[0]["prompt"].messages == tuple(talk("u:1"))


@pytest.mark.parametrize(
    ("chosen", "rejected"), [(chat("a:c x"), chat("a:c y")), ("c x", "c y"), ("c x", chat("a:c y"))]
)
def test_messages_beside_a_pair_are_its_prompt(chosen, rejected):
    # not what the two answers begin with
    row = {"conversations": chat("u:1", "a:2", "u:3"), **both(chosen, rejected)}
    for stage in ("dpo", "reward"):
        (found,) = rows(row, stage)
        assert (found["chosen"], found["rejected"]) == ("c x", "c y")
        assert found["prompt"].messages == tuple(talk("u:1", "a:2", "u:3"))


@pytest.mark.parametrize("name", ["chosen", "response", "answer"])
def test_messages_beside_a_response_are_its_prompt(name):
    row = {"conversations": chat("u:1", "a:2", "u:3"), name: "c x", "rejected": "c y"}
    (found,) = rows(row, "sft")
    assert found["prompt"].messages == tuple(talk("u:1", "a:2", "u:3"))
    assert found["response"] == "c x"
    (found,) = rows(row, "evaluation")
    assert found["references"] == ["c x"]
    (found,) = rows(row, "ppo")  # which needs no response
    assert found["prompt"].messages == tuple(talk("u:1", "a:2", "u:3"))
    whole = {"messages": talk("u:1", "a:2"), name: "3"}
    with pytest.raises(BadInput) as raised:
        rows(whole, "sft")
    assert str(raised.value) == (
        "the frame: no usable row among the 1 read: messages ends with an assistant message and "
        f"{name} is a response too (give --columns messages=messages to leave {name} out) "
        "(1: row 1); correct these rows"
    )


def test_messages_that_are_named_are_the_whole_conversation():
    named = {"messages": "messages"}
    used = find_columns(["messages", "answer"], "sft", "a.jsonl", named)
    assert used == {"messages": "messages"}


def test_one_message_is_a_list_of_one():
    row = {"prompt": talk("u:p")[0], **both(talk("a:c")[0], chat("a:r")[0])}
    assert rows(row, "dpo") == [{"prompt": "p", "chosen": "c", "rejected": "r"}]


def test_contents_of_parts():
    def part(text: str) -> dict[str, str]:
        return {"type": "text", "text": text}

    row = {"messages": talk("u:", "a:")}
    row["messages"][0]["content"] = [part("What"), part(" is it?")]
    row["messages"][1]["content"] = [part("A thing.")]
    assert rows(row, "sft") == [{"prompt": "What is it?", "response": "A thing."}]
    row["messages"][0]["content"] = [{"type": "image", "image": "a.png"}, part("What is it?")]
    assert reason(row, "sft") == "messages has a message with a part that is no text: image"


@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
def test_a_call_of_a_tool_is_no_text(key):
    row = {"messages": [*talk("u:1"), {**talk("a:")[0], key: [{"name": "f"}]}, *talk("t:2", "a:3")]}
    assert (
        reason(row, "sft") == "messages has a message with a call of a tool, which no stage reads"
    )
    row["messages"][1] |= {key: None, "content": "x"}  # as Parquet fills it
    assert rows(row, "sft")[0]["response"] == "3"


# Messages as text


@pytest.mark.parametrize("write", [json.dumps, lambda x: f" {json.dumps(x, indent=1)}\n"])
def test_messages_as_json_text(write):
    row = {"messages": talk("u:1", "a:Größe 'x'")}
    assert rows({"messages": write(row["messages"])}, "sft") == rows(row, "sft")
    row = {"prompt": talk("s:x", "u:p"), **both(talk("a:c"), talk("a:r"))}
    written = {name: write(value) for name, value in row.items()}
    assert rows(written, "dpo") == rows(row, "dpo")
    assert rows(written, "dpo")[0]["prompt"].messages == tuple(talk("s:x", "u:p"))
    assert rows({**written, "prompt": "p"}, "dpo") == [{"prompt": "p", **both("c", "r")}]
    loaded = load_rows(frame({**written, "prompt": "p"}), "dpo")
    assert loaded.notes == [
        "  chosen is messages, read out of JSON text in 1 of 1 rows",
        "  rejected is messages, read out of JSON text in 1 of 1 rows",
    ]


AS_TEXT = "is a list of messages written as text, and not as JSON; write the file again as JSONL"
WAYS: list[Callable[[list[dict[str, str]]], str]] = [
    str,
    repr,
    lambda messages: str(messages[0]),
    lambda messages: str(tuple(messages)),
    lambda messages: str(np.array(messages, dtype=object)),
    lambda messages: repr(np.array(messages, dtype=object)),
    lambda messages: str([{"name": None, **message} for message in messages]),
    lambda messages: str(messages)[:30] + "...",
    lambda messages: "\n" + str(messages) + " ",
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("speak", [talk, chat])
def test_messages_as_python_text_are_dropped(way, speak):
    row = {"prompt": "p", **both(way(speak("a:c", "u:2")), "r")}
    assert reason(row, "dpo") == f"chosen {AS_TEXT}"
    assert reason({"prompt": way(speak("u:p", "a:2"))}, "ppo") == f"prompt {AS_TEXT}"
    assert reason({"messages": way(speak("u:1", "a:2"))}, "sft") == f"messages {AS_TEXT}"


def test_json_text_of_more_than_messages():
    row = {"prompt": json.dumps({"messages": talk("u:p"), "n": 1})}
    assert reason(row, "ppo") == "prompt is JSON text that holds more than a list of messages"


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        '{"role": "admin"}',
        '{"from": "Paris", "value": 3}',
        "Write {'role': 'user', 'content': 'Hi'} as YAML",
        "{'role': 'user'} is what?",
    ],
)
def test_other_texts_in_brackets_stay_texts(text):
    assert rows({"prompt": text, **both(text + "c", text + "r")}, "dpo")[0]["prompt"] == text


# System


@pytest.mark.parametrize("name", ["system", "System_Prompt"])
@pytest.mark.parametrize("stage", ["sft", "reward", "dpo", "kto", "ppo", "evaluation"])
def test_system_is_the_first_message(name, stage):
    talked = ("s:Be kind", "u:p")
    for row in (
        {"prompt": "p", **both("c", "r")},
        {"instruction": "p", "input": "", **both("c", "r")},
        {"prompt": talk("u:p"), **both(talk("a:c"), talk("a:r"))},
        both(talk("u:p", "a:c"), talk("u:p", "a:r")),
        {"prompt": talk("s:Be kind", "u:p"), **both("c", "r")},  # said already
    ):
        (found,) = rows({name: "Be kind", **row}, stage)
        assert found["prompt"] == "system: Be kind\n\nuser: p"
        assert found["prompt"].messages == tuple(talk(*talked))
    if stage == "ppo":  # where a reward function may ask for it
        assert found[name] == "Be kind"


def test_system_of_a_conversation():
    (found,) = rows({"conversations": chat("u:1", "a:2"), "system": "x"}, "sft")
    assert found["prompt"].messages == tuple(talk("s:x", "u:1"))


@pytest.mark.parametrize("nothing", [None, "", " ", math.nan, pd.NA])
def test_no_system_is_no_message(nothing):
    (found,) = rows({"prompt": "p", "response": "c", "system": nothing}, "sft")
    assert found == {"prompt": "p", "response": "c"}
    assert not isinstance(found["prompt"], Conversation)


def test_system_is_dropped():
    row = {"prompt": "p", "chosen": "c", "system": 3}
    loaded = load_rows(frame({**row, "system": "x"}, row), "sft")
    assert loaded.dropped == {"system is not a string": [2]}
    row = {"prompt": talk("s:y", "u:p"), "chosen": "c", "system": "x"}
    loaded = load_rows(frame(row, {**row, "system": "y"}), "sft")
    assert loaded.dropped == {
        "the system's message is another one than the column system says": [1]
    }


# Implicit prompts


def both(chosen: Any, rejected: Any) -> dict[str, Any]:
    return {"chosen": chosen, "rejected": rejected}


IMPLICIT = [
    # the longest common beginning, in messages
    (talk("u:p", "a:c"), talk("u:p", "a:r"), talk("u:p"), "c", "r"),
    (talk("s:x", "u:p", "a:1", "u:2", "a:c"), talk("s:x", "u:p", "a:1", "u:2", "a:r"),
     talk("s:x", "u:p", "a:1", "u:2"), "c", "r"),
    (talk("u:p ", "a:c"), talk("u:p", "a:r"), talk("u:p "), "c", "r"),
    # in turns of a transcript
    ("\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant: So long.",
     "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant: So",
     talk("u:Hi", "a:Hello.", "u:Bye"), "So long.", "So"),
    # a turn is several paragraphs; a space at its end is no difference
    ("\n\nHuman: One\n\nTwo: three \n\nAssistant: c\n\nd",
     "Human: One\n\nTwo: three\n\nAssistant:c\n\nHuman said: d", talk("u:One\n\nTwo: three"),
     "c\n\nd", "c\n\nHuman said: d"),
    # in words of a text
    ("The sky is blue.", "The sky is green.", None, " blue.", " green."),
    ("The sky is blue", "The sky is black", None, " blue", " black"),
    ("The sky is blue ", "The sky is", None, None, None),
    ("Q: sky?\nblue", "Q: sky?\nblack", "Q: sky?\n", "blue", "black"),
    ("Q: sky?  blue", "Q: sky?  black", "Q: sky? ", " blue", " black"),
    ("Hi there", "Hi thereafter", "Hi", " there", " thereafter"),
]  # fmt: skip


@pytest.mark.parametrize(("chosen", "rejected", "prompt", "first", "second"), IMPLICIT)
def test_implicit_prompt(chosen, rejected, prompt, first, second):
    row = both(chosen, rejected)
    if first is None:
        with pytest.raises(BadInput, match="rejected is empty after the common prompt"):
            rows(row, "dpo")
        return
    is_talk = isinstance(prompt, list)
    text = Conversation(prompt) if is_talk else prompt or "The sky is"
    (found,) = rows(row | {"margin": 0.5}, "reward")
    assert found == {"prompt": text, "chosen": first, "rejected": second, "margin": 0.5}
    assert getattr(found["prompt"], "messages", None) == (tuple(prompt) if is_talk else None)
    assert rows(row, "dpo") == [{"prompt": text, "chosen": first, "rejected": second}]
    assert rows(row, "sft") == [{"prompt": text, "response": first}]
    assert rows(row, "evaluation") == [{"prompt": text, "references": [first]}]
    assert rows(row | {"n": 1}, "ppo") == [row | {"prompt": text, "n": 1}]


@pytest.mark.parametrize(
    ("chosen", "rejected", "why"),
    [
        # identical
        ("a b", "a b", "chosen equals rejected"),
        (talk("u:p", "a:c"), talk("u:p", "a:c"), "chosen equals rejected"),
        ("\n\nHuman: p\n\nAssistant: c", "\n\nHuman: p\n\nAssistant: c", "chosen equals rejected"),
        # one a beginning of the other
        ("a b", "a b c", "chosen is empty after the common prompt"),
        (talk("u:p", "a:c"), talk("u:p"), "rejected is empty after the common prompt"),
        ("\n\nHuman: p\n\nAssistant: c", "\n\nHuman: p\n\nAssistant: c\n\nHuman: 2\n\nAssistant: d",
         "chosen is empty after the common prompt"),
        # another first character, word or turn
        ("a b", "c b", "chosen and rejected have no common prompt"),
        ("about", "above", "chosen and rejected have no common prompt"),
        (" a", " b", "chosen and rejected have no common prompt"),
        (talk("u:p", "a:c"), talk("u:q", "a:c"), "chosen and rejected have no common prompt"),
        ("\n\nHuman: p\n\nAssistant: c", "\n\nHuman: q\n\nAssistant: c",
         "chosen and rejected have no common prompt"),
        # a space at the end
        ("a b", "a b ", "chosen equals rejected"),
        (talk("u:p", "a:c"), talk("u:p", "a:c "), "chosen equals rejected"),
        ("\n\nHuman: p\n\nAssistant: c", "\n\nHuman: p \n\nAssistant: c ",
         "chosen equals rejected"),
        # empty
        ("", "a b", "chosen is empty"),
        ("a b", " ", "rejected is empty"),
        (talk("u:p", "a:c"), [], "rejected is empty"),
        (talk("u:p", "a:c"), talk("u:p", "a:"), "rejected is empty"),
        ("\n\nHuman: p\n\nAssistant:", "\n\nHuman: p\n\nAssistant: r", "chosen is empty"),
        ("\n\nHuman:\n\nAssistant: c", "\n\nHuman: \n\nAssistant: r", "prompt is empty"),
        # apart before the last turn
        ("\n\nHuman: p\n\nAssistant: 1\n\nHuman: 2\n\nAssistant: c", "\n\nHuman: p\n\nAssistant: r",
         "chosen is not one assistant message after the common prompt"),
        (talk("u:p", "a:c"), talk("u:p", "u:r"),
         "rejected is not one assistant message after the common prompt"),
        # of two kinds
        (talk("u:p", "a:c"), "p r", "chosen is not a string"),
        (None, "p r", "chosen is not a string"),
        ("p \ud800", "p r", "chosen contains invalid Unicode"),
    ],
)  # fmt: skip
def test_implicit_prompt_is_dropped(chosen, rejected, why):
    assert reason(both(chosen, rejected), "dpo") == why


def test_a_prompt_in_a_column_is_not_taken_apart():
    prompt, chosen = "\n\nHuman: p\n\nAssistant:", "\n\nHuman: p\n\nAssistant: c"
    row = {"prompt": prompt, "chosen": chosen, "rejected": "r"}
    assert rows(row, "dpo") == [row]
    assert not isinstance(rows(row, "dpo")[0]["prompt"], Conversation)
