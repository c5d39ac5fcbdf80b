"""Implicit prompts against trl 1.12.0, where both mean the same.

They part where trl, which compares characters, cuts a word in two, keeps the last common character
out of the prompt of a pair that has nothing else to tell apart, or takes part of a transcript's
turn into the prompt: there the response would not be what somebody wrote.
"""

import random

import pandas as pd
import pytest
from trl.data_utils import extract_prompt

from rlhf_min.encoding.conversation import Conversation
from rlhf_min.errors import BadInput
from rlhf_min.harness.rows.load import load_rows

CASES = 1000
ROLES = ("system", "user", "assistant")


def read(chosen: object, rejected: object) -> dict:
    frame = pd.DataFrame([{"chosen": chosen, "rejected": rejected}], dtype=object)
    return load_rows(frame, "dpo").rows[0]


def words(rng: random.Random, alphabet: str) -> str:
    n = rng.randint(1, 5)
    return " ".join("".join(rng.choices(alphabet, k=rng.randint(1, 4))) for _ in range(n))


def test_messages() -> None:
    rng = random.Random(0)
    for _ in range(CASES):
        shared = [
            {"role": rng.choice(ROLES), "content": words(rng, "abc")}
            for _ in range(rng.randint(1, 5))
        ]
        pair = {
            "chosen": [*shared, {"role": "assistant", "content": words(rng, "abc")}],
            "rejected": [*shared, {"role": "assistant", "content": words(rng, "def")}],
        }
        expected, found = extract_prompt(pair), read(**pair)
        assert list(found["prompt"].messages) == expected["prompt"]
        for name in pair:
            assert [{"role": "assistant", "content": found[name]}] == expected[name]


@pytest.mark.parametrize("gap", [" ", "\n", "\n\n", ":\n", "  "])
def test_texts(gap: str) -> None:
    # the responses begin with another character each, as no common word is cut in two then
    rng = random.Random(1)
    for _ in range(CASES):
        shared = words(rng, "abc,") + gap
        pair = {"chosen": shared + words(rng, "abc"), "rejected": shared + words(rng, "def")}
        assert read(**pair) == extract_prompt(pair)


def test_transcripts() -> None:
    rng = random.Random(2)
    for _ in range(CASES):
        turns = [
            (speaker, words(rng, "abc"))
            for _ in range(rng.randint(1, 3))
            for speaker in ("Human", "Assistant")
        ]
        shared = "".join(f"\n\n{speaker}: {text}" for speaker, text in turns[:-1])
        shared += "\n\nAssistant: "
        pair = {"chosen": shared + words(rng, "abc"), "rejected": shared + words(rng, "def")}
        expected, found = extract_prompt(pair), read(**pair)
        assert expected["prompt"] + " " == shared
        assert isinstance(found["prompt"], Conversation)
        theirs = found["prompt"].messages
        told = {"user": "Human", "assistant": "Assistant"}
        written = "".join(f"\n\n{told[turn['role']]}: {turn['content']}" for turn in theirs)
        assert written + "\n\nAssistant:" == expected["prompt"]
        for name in pair:
            assert f" {found[name]}" == expected[name]


@pytest.mark.parametrize(
    ("chosen", "rejected", "theirs", "ours"),
    [
        ("a blue", "a black", ("a bl", "ue", "ack"), ("a", " blue", " black")),
        ("a b", "a b", ("a ", "b", "b"), "chosen equals rejected"),
        ("a b", "a b c", ("a ", "b", "b c"), "chosen is empty after the common prompt"),
        ("ab", "cd", ("", "ab", "cd"), "chosen and rejected have no common prompt"),
    ],
)
def test_where_they_part(chosen, rejected, theirs, ours) -> None:
    pair = {"chosen": chosen, "rejected": rejected}
    assert tuple(extract_prompt(pair).values()) == theirs
    if isinstance(ours, str):
        with pytest.raises(BadInput, match=ours):
            read(chosen, rejected)
    else:
        assert tuple(read(chosen, rejected).values()) == ours
