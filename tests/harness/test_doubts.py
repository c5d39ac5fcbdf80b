"""What is said of rows that can be used and look wrong all the same; each against rows by hand."""

from typing import Any

import pandas as pd
import pytest

from rlhf_min.harness.rows.columns import Stage
from rlhf_min.harness.rows.load import LoadedRows, load_rows

WORDS = "river lamp bridge ticket garden window planet engine road tower".split()
TWICE = "it would be learned twice; take it out of that column"


def load(stage: Stage, **columns: Any) -> LoadedRows:
    """Ten rows; a column is a list of values, or a text with {} for the row's word."""
    table = {
        name: [value.format(word) for word in WORDS] if isinstance(value, str) else value
        for name, value in columns.items()
    }
    return load_rows(pd.DataFrame(table, dtype=object), stage)


# Prompts that are repeated


@pytest.mark.parametrize(
    "start",
    [
        "What is a {}?",
        "What is  a\n{}? ",
        "WHAT is a {}?\n",
        "User: What is a {}?\nAssistant:",
        "<s>[INST] What is a {}? [/INST]",
        "### Instruction:\nWhat is a {}?\n\n### Response:\n",
    ],
)
def test_a_repeated_prompt(start):
    prompt = "What is a {}?"
    says = f"begins with the prompt in 10 of 10 rows; {TWICE}"
    both = load("dpo", prompt=prompt, chosen=f"{start} A thing.", rejected=f"{start} No idea.")
    assert both.notes == [f"warning: chosen {says}", f"warning: rejected {says}"]
    assert (
        load("reward", prompt=prompt, chosen=f"{start} A.", rejected="No.").notes
        == (both.notes[:1])
    )
    assert load("sft", prompt=prompt, response=f"{start} A.").notes == [f"warning: response {says}"]
    talk = [[{"role": "user", "content": prompt.format(word)}] for word in WORDS]
    assert load("sft", prompt=talk, response=f"{start} A.").notes == [f"warning: response {says}"]
    system = load("sft", system="Be kind.", prompt=prompt, response=f"{start} A.")
    assert system.notes == [f"warning: response {says}"]
    # PPO reads the prompt alone
    assert load("ppo", prompt=prompt, chosen=f"{start} A.").notes == []


@pytest.mark.parametrize(("count", "warns"), [(0, None), (1, False), (8, False), (9, True)])
def test_repetitions_are_counted_and_many_are_a_warning(count, warns):
    responses = [f"What is a {w}? A thing." if i < count else "A." for i, w in enumerate(WORDS)]
    loaded = load("sft", prompt="What is a {}?", response=responses)
    told = f"response begins with the prompt in {count} of 10 rows"
    said = {None: [], False: [f"  {told}"], True: [f"warning: {told}; {TWICE}"]}
    assert loaded.notes == said[warns]
    assert [row["response"] for row in loaded.rows] == responses  # nothing is taken away


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("{}", "{}s are things"),
        ("{}", "A {} is one"),
        ("What is a {}?", "x " * 30 + "What is a {}?"),
    ],
)
def test_what_is_no_repetition(prompt, response):
    assert load("sft", prompt=prompt, response=response).notes == []


def test_a_prompt_that_holds_the_response():
    said = "so it says what is to be learned; take it out of the prompt"
    loaded = load("sft", prompt="Is it a {0}?\nIt is a {0}", response=" it is A  {0}\n")
    assert loaded.notes == [f"warning: the prompt ends with response in 10 of 10 rows, {said}"]
    responses = [f"It is a {word}." for word in WORDS]
    prompts = [f"What?\n{text}\n" for text in responses]
    loaded = load("sft", prompt=prompts, response=responses)
    assert loaded.notes == [f"warning: the prompt ends with response in 10 of 10 rows, {said}"]
    assert load("sft", prompt=["What?", "Why?", *prompts[2:]], response=responses).notes == []


# Values that became text


@pytest.mark.parametrize(
    "written",
    [
        "['a {}', 'b']",
        "{{'text': '{}'}}",
        '{{"text": "{}", "n": null}}',
        "{{'text': array(['a {}'], dtype=object)}}",
        "['a {}'\n 'b']",
        "array(['{}'], dtype=object)",
        "('{}', 1)",
        "b'{}'",
        '"{}"',
        "'{}'",
        ' ["{}"]\n',
    ],
)
def test_values_written_as_text(written):
    says = "is a list, an object or a text in quotes, as a program writes them, in 10 of 10 texts"
    (note,) = load("sft", prompt="{}", response=written).notes
    assert note.startswith(f"warning: response {says}")
    (note,) = load("dpo", prompt=written, chosen="a", rejected="b").notes
    assert note.startswith(f"warning: prompt {says}")
    (note,) = load("evaluation", prompt="{}", reference=written).notes
    assert note.startswith(f"warning: references {says}")
    few = [written.format(word) if i < 8 else word for i, word in enumerate(WORDS)]
    assert load("ppo", prompt=few).notes == []


@pytest.mark.parametrize("text", ["[{}]", "({})", "a '{}'", "'{}' or b", "it's {}"])
def test_texts_that_only_look_so(text):
    assert load("ppo", prompt=text).notes == []


@pytest.mark.parametrize("word", ["nan", "NaN", "None", "<NA>", "NaT"])
def test_missing_values_written_as_text(word):
    responses = [word, *WORDS[1:]]
    assert load("sft", prompt="a {}", response=responses).notes == [
        f"warning: response is the word {word} in 1 of 10 texts; if that means that there is none, "
        "leave these rows out"
    ]


def test_line_ends_written_as_text():
    (note,) = load("sft", prompt="{}", response=r"a {}\nb").notes
    assert note.startswith(
        r"warning: response spells its line ends as \n, backslash and letter, in"
    )
    assert load("sft", prompt="{}", response="a {}\\nb\nc").notes == []


# Columns that are not used


def test_columns_are_named():
    loaded = load("sft", Question="{}", chosen="a {}", rejected="b", source="web")
    assert loaded.details() == (
        "  columns: prompt (Question), response (chosen); not used: rejected, source"
    )
    loaded = load("ppo", prompt="{}", level="1")
    assert loaded.details() == "  columns: prompt; for reward functions: level"


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("label", [False] * 10, "False in 10"),
        ("Label", [True] * 7 + [False] * 3, "True in 7, False in 3"),
        ("label", ["bad"] * 4 + ["good"] * 6, "good in 6, bad in 4"),
        ("score", [1, 2, 2, 3, 3, 3, 4, 4, 4, 4], "4 in 4, 3 in 3, 2 in 2"),
        ("rating", [0.5] * 9 + [None], "0.5 in 9"),
        ("accepted", [True] * 5 + [False] * 5, "True in 5, False in 5"),
    ],
)
def test_judgements_that_are_not_used(name, values, says):
    for stage in ("sft", "dpo", "evaluation"):
        loaded = load(stage, prompt="{}", chosen="a {}", rejected="b", **{name: values})
        assert loaded.notes == [
            f"warning: the column {name} is not used, and says {says} of 10 rows; leave out the "
            "rows that are not to be learned from"
        ]
    assert load("ppo", prompt="{}", **{name: values}).notes == []  # a reward may read it


@pytest.mark.parametrize(
    ("name", "values"),
    [("label", [None] * 10), ("label", [True] * 10), ("is_new", [True] * 10), ("id", [0, 1] * 5)],
)
def test_columns_that_say_nothing_against_a_row(name, values):
    assert load("sft", prompt="{}", response="a {}", **{name: values}).notes == []


@pytest.mark.parametrize("stage", ["sft", "ppo"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("history", [["Hi", "Hello."]]),
        ("context", "A thing."),
        ("input", "x"),
        ("tools", [{"f": 1}]),
    ],
)
def test_what_belongs_to_the_prompt_and_is_not_used(stage, name, value):
    values = [value] * 4 + [None] * 6
    assert load(stage, prompt="{}", response="a {}", **{name: values}).notes == [
        f"warning: the column {name} is not used, and 4 of 10 rows have it; what it says must "
        "stand in the prompt to be read"
    ]
    empty = [[], "", None, *[None] * 7]
    assert load(stage, prompt="{}", response="a {}", **{name: empty}).notes == []


def test_a_column_that_may_be_the_prompt():
    table = {"chosen": "The {} is a thing", "rejected": "The {} is not", "id": list(range(10))}
    assert load("dpo", **table).notes == []
    assert load("dpo", problem="What is it?", **table).notes == [
        "warning: no column is the prompt, so it is what chosen and rejected begin with; if one of "
        "problem is, give --columns prompt=problem"
    ]


# Messages


def test_what_is_not_used_of_messages():
    talk = [
        {"role": "user", "content": "Hi", "name": "Ann"},
        {"role": "assistant", "content": "Ho"},
    ]
    messages = [[{**talk[0], "content": word}, talk[1]] for word in WORDS]
    assert load("sft", messages=messages).notes == [
        "  of the messages in messages is not used: name"
    ]
    messages[3][1] = {**talk[1], "weight": 0}
    assert load("sft", messages=messages).notes == [
        "warning: of the messages in messages is not used: name, weight"
    ]
