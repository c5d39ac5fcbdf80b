"""The user's files: what is read, what is dropped and counted, what is refused and how."""

import bz2
import csv
import gzip
import io
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, get_args

import datasets
import huggingface_hub
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rlhf_min.errors import BadInput
from rlhf_min.harness.rows.columns import Stage, parse_columns
from rlhf_min.harness.rows.load import LoadedRows, load_rows, split_rows
from rlhf_min.loading import sources

STAGES: tuple[Stage, ...] = get_args(Stage)
PAIRS = [
    {"prompt": "Who?", "chosen": "Ann, of course", "rejected": 'He said "Bob"'},
    {"prompt": "Where?\nSay.", "chosen": " 007", "rejected": "NA"},
    {"prompt": "Größe\u2028?", "chosen": "null", "rejected": "None\r\n"},
]


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pd.DataFrame(rows).to_parquet(buffer)
    return buffer.getvalue()


def csv_text(rows: list[dict[str, Any]]) -> str:
    def quoted(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(",".join(map(quoted, line)) + "\n" for line in lines)


WRITERS: dict[str, Callable[[list[dict[str, Any]]], str | bytes]] = {
    "a.csv": csv_text,
    "a.CSV": csv_text,
    "a.json": json.dumps,
    "b.json": lambda rows: json.dumps({"version": 1, "data": rows}),
    "a.jsonl": lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
    "a.parquet": parquet,
}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str | bytes], str]:
    """Writes a file into a fresh working folder, so that messages hold its bare name."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, content: str | bytes) -> str:
        data = content if isinstance(content, bytes) else content.encode("utf-8")
        Path(name).write_bytes(data)
        return name

    return write


def jsonl(*rows: dict[str, Any]) -> str:
    return "\n".join(map(json.dumps, rows))


def refusal(path: str | Path, stage: Stage) -> str:
    with pytest.raises(BadInput) as caught:
        load_rows(path, stage)
    message = str(caught.value)
    assert message.isprintable()  # so it is one line
    return message


# What is read


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_formats_read_the_same_rows(write, name, bom):
    content = WRITERS[name](PAIRS)
    if isinstance(content, str):
        content = bom + content.encode("utf-8")
    loaded = load_rows(write(name, content), "dpo")
    assert loaded == LoadedRows(PAIRS, name, 3, {}, columns={c: c for c in PAIRS[0]})
    assert loaded.report() == f"{name}: 3 rows read, 3 kept, 0 dropped"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_csv_line_ends_and_blank_lines(write, end):
    path = write("a.csv", end.join(["prompt,response", "a,b", "", "c,d", ""]))
    assert load_rows(path, "sft").rows == [
        {"prompt": "a", "response": "b"},
        {"prompt": "c", "response": "d"},
    ]


def test_csv_long_cell(write):
    long = "x" * 200_000
    limit = csv.field_size_limit()
    assert load_rows(write("a.csv", f"prompt\n{long}\n"), "ppo").rows == [{"prompt": long}]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("prompt", ["prompt", "question", "instruction", "query", " Prompt "])
@pytest.mark.parametrize("response", ["response", "output", "completion", "answer", "CHOSEN"])
def test_sft_names(write, prompt, response):
    path = write("a.jsonl", jsonl({prompt: "a", response: "b", "more": 1}))
    assert load_rows(path, "sft").rows == [{"prompt": "a", "response": "b"}]


@pytest.mark.parametrize("name", WRITERS)
def test_ppo_keeps_further_columns(write, name):
    rows = [{"Query": "a", "Level": "1", "chosen": "x"}, {"Query": "a", "Level": "2", "chosen": ""}]
    assert load_rows(write(name, WRITERS[name](rows)), "ppo").rows == [
        {"prompt": "a", "Query": "a", "Level": "1", "chosen": "x"},
        {"prompt": "a", "Query": "a", "Level": "2", "chosen": ""},
    ]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet"])
def test_ppo_keeps_values_what_they_are(write, name):
    rows = [{"prompt": "a", "n": 3, "tags": ["x", "y"]}, {"prompt": "b", "n": None, "tags": []}]
    content = WRITERS[name](rows)
    if name == "a.parquet":
        buffer = io.BytesIO()
        pd.DataFrame(rows).astype({"n": "Int64"}).to_parquet(buffer)
        content = buffer.getvalue()
    loaded = load_rows(write(name, content), "ppo").rows
    assert loaded == rows
    assert type(loaded[0]["n"]) is int
    assert type(loaded[0]["tags"]) is list


def test_ppo_rows_share_their_columns(write):
    path = write("a.jsonl", jsonl({"prompt": "a", "x": 1}, {"prompt": "b", "y": 2}))
    assert load_rows(path, "ppo").rows == [
        {"prompt": "a", "x": 1, "y": None},
        {"prompt": "b", "x": None, "y": 2},
    ]


def test_parquet_named_index_is_a_column(write):
    buffer = io.BytesIO()
    pd.DataFrame([{"prompt": "a", "response": "b"}]).set_index("prompt").to_parquet(buffer)
    rows = load_rows(write("a.parquet", buffer.getvalue()), "sft").rows
    assert rows == [{"prompt": "a", "response": "b"}]


def test_parquet_numbered_columns(write):
    path = write("a.parquet", parquet([{0: "a", 1: "b"}]))
    assert "; found 0, 1; " in refusal(path, "ppo")


@pytest.mark.parametrize("margin", ["0.5", 0.5, "5e-1"])
def test_reward_margin_is_a_float(write, margin):
    path = write("a.jsonl", jsonl({**PAIRS[0], "Margin": margin}))
    assert load_rows(path, "reward").rows == [{**PAIRS[0], "margin": 0.5}]
    assert load_rows(path, "dpo").rows == [PAIRS[0]]


def test_decimals_and_numbers_of_numpy_are_numbers(write):
    margins = [Decimal("0.50"), np.float32(0.5), np.int64(2), Decimal("1e-3")]
    rows = [{**PAIRS[0], "prompt": str(i), "margin": m} for i, m in enumerate(margins)]
    loaded = load_rows(pd.DataFrame(rows, dtype=object), "reward")
    assert [row["margin"] for row in loaded.rows] == [0.5, 0.5, 2.0, 0.001]
    assert {type(row["margin"]) for row in loaded.rows} == {float}
    path = write("a.parquet", parquet([row for row in rows if isinstance(row["margin"], Decimal)]))
    assert [row["margin"] for row in load_rows(path, "reward").rows] == [0.5, 0.001]


@pytest.mark.parametrize("column", ["reference", "references", "response", "chosen", "output"])
@pytest.mark.parametrize(
    ("value", "references"), [("b", ["b"]), (["b"], ["b"]), (["b", "c"], ["b", "c"])]
)
def test_evaluation_references(write, column, value, references):
    expected = [{"prompt": "a", "references": references}]
    rows = [{"prompt": "a", column: value}]
    assert load_rows(write("a.jsonl", jsonl(*rows)), "evaluation").rows == expected
    assert load_rows(write("a.parquet", parquet(rows)), "evaluation").rows == expected


def test_alpaca_input(write):
    inputs = ["i", "", None, " ", "i"]
    rows = [{"instruction": str(n), "input": i, "output": "o"} for n, i in enumerate(inputs)]
    rows[4]["instruction"] = "  "
    loaded = load_rows(write("a.jsonl", jsonl(*rows, {"instruction": "5", "output": "o"})), "sft")
    assert [row["prompt"] for row in loaded.rows] == ["0\ni", "1", "2", "3", "5"]
    assert loaded.dropped == {"prompt is empty": [5]}


def test_input_beside_a_prompt_is_a_column_like_any_other(write):
    path = write("a.jsonl", jsonl({"prompt": "a", "input": "b"}))
    assert load_rows(path, "ppo").rows == [{"prompt": "a", "input": "b"}]


# What is dropped

GOOD = {"prompt": "p", "chosen": "c", "rejected": "r", "margin": 1, "references": "ref"}


@pytest.mark.parametrize(
    ("stage", "changed", "reason"),
    [
        ("dpo", {"prompt": ""}, "prompt is empty"),
        ("dpo", {"prompt": " \n\u00a0"}, "prompt is empty"),
        ("ppo", {"prompt": None}, "prompt is not a string"),
        ("sft", {"chosen": ""}, "response is empty"),
        ("dpo", {"chosen": 7}, "chosen is not a string"),
        ("dpo", {"chosen": None}, "chosen is not a string"),
        ("dpo", {"chosen": math.nan}, "chosen is not a string"),
        ("dpo", {"chosen": ["c"]}, "chosen is not a string"),
        ("dpo", {"chosen": []}, "chosen is empty"),
        ("dpo", {"rejected": {"a": 1}}, "rejected is not a string"),
        ("reward", {"rejected": "\t"}, "rejected is empty"),
        ("dpo", {"rejected": " c\n"}, "chosen equals rejected"),
        ("dpo", {"chosen": "\ud800"}, "chosen contains invalid Unicode"),
        ("dpo", {}, "duplicate of an earlier row"),
        ("ppo", {}, "duplicate of an earlier row"),
        ("reward", {"margin": math.inf}, "margin is not a finite number"),
        ("reward", {"margin": "much"}, "margin is not a finite number"),
        ("reward", {"margin": True}, "margin is not a finite number"),
        ("reward", {"margin": None}, "margin is not a finite number"),
        ("reward", {"margin": 10**400}, "margin is not a finite number"),
        ("reward", {"margin": 1e300}, "margin is beyond 1.7e+07, too large to train on"),
        ("reward", {"margin": -2e7}, "margin is beyond 1.7e+07, too large to train on"),
        ("reward", {"margin": "-1e39"}, "margin is beyond 1.7e+07, too large to train on"),
        ("kto", {"label": None}, "label is empty"),
        ("kto", {"label": " "}, "label is empty"),
        ("kto", {"label": math.nan}, "label is empty"),
        ("kto", {"response": ""}, "response is empty"),
        ("evaluation", {"references": []}, "references is empty"),
        ("evaluation", {"references": ["x", ""]}, "references is empty"),
        ("evaluation", {"references": ["x", 1]}, "references is not a string"),
        ("evaluation", {"references": 1}, "references is not a string"),
        ("evaluation", {"references": "\udfff"}, "references contains invalid Unicode"),
    ],
)
def test_row_is_dropped_by_reason(write, stage, changed, reason):
    good = dict(GOOD)
    if stage == "evaluation":
        del good["chosen"]
    if stage == "kto":
        good |= {"response": "c", "label": True}
    text = f"{jsonl(good)}\n\n{jsonl({**good, **changed})}\n"
    loaded = load_rows(write("a.jsonl", text), stage)
    assert (len(loaded.rows), loaded.rows_read) == (1, 2)
    assert loaded.dropped == {reason: [3]}  # line 2 is blank
    assert loaded.report() == f"a.jsonl: 2 rows read, 1 kept, 1 dropped: {reason} (1: line 3)"


LABELS = [True, False, 1, 0, 1.0, 0.0, "true", "False", " TRUE ", "1", "0", "1.0", "0.0"]


def test_labels_are_true_or_false_as_values_and_as_texts(write):
    rows = [{"prompt": f"p{i}", "completion": "c", "label": x} for i, x in enumerate(LABELS)]
    loaded = load_rows(write("a.jsonl", jsonl(*rows)), "kto")
    expected = [x in (True, 1, 1.0, "true", " TRUE ", "1", "1.0") for x in LABELS]
    assert [row["label"] for row in loaded.rows] == expected
    assert {type(row["label"]) for row in loaded.rows} == {bool}
    assert loaded.columns == {"prompt": "prompt", "response": "completion", "label": "label"}
    # A CSV file has texts; a frame with a gap in the column has floats.
    assert load_rows(write("a.csv", "prompt,output,label\na,b,TRUE\na,c,0\n"), "kto").rows == [
        {"prompt": "a", "response": "b", "label": True},
        {"prompt": "a", "response": "c", "label": False},
    ]
    gap = pd.DataFrame({"prompt": ["a", "b", "c"], "answer": "x", "label": [True, None, False]})
    for frame in (gap, gap.assign(label=gap.label.astype("float64"))):
        loaded = load_rows(frame, "kto")
        assert [row["label"] for row in loaded.rows] == [True, False]
        assert loaded.dropped == {"label is empty": [2]}


@pytest.mark.parametrize("label", ["yes", 2, -1, 0.5, "good", [True], {"a": 1}, "2"])
def test_another_label_refuses_the_file_and_names_row_and_value(write, label):
    rows = [{"prompt": "p", "response": "c", "label": x} for x in (True, label)]
    for name, row in (("a.jsonl", "line 2"), ("a.json", "row 2")):
        content = jsonl(*rows) if name == "a.jsonl" else json.dumps(rows)
        assert refusal(write(name, content), "kto") == (
            f"{name}: {row}: label is {label!r}, which is neither true nor false (nor 1 or 0); "
            "make it one of them, or name another column by --columns label=NAME"
        )


def test_kto_reads_labelled_rows_before_pairs_and_says_what_it_needs(write):
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    labelled = {"prompt": "p", "response": "x", "label": 1}
    expected = [{"prompt": "p", "response": "x", "label": True}]
    assert load_rows(write("a.jsonl", jsonl(labelled | pair)), "kto").rows == expected
    for other in ({}, {"label": "A"}, {"response": "x"}):  # without both of them it is a pair
        loaded = load_rows(write("a.jsonl", jsonl(pair | other)), "kto")
        assert loaded.rows == [pair]
    named = load_rows(write("a.jsonl", jsonl({"prompt": "p", "text": "x", "thumb": False})), "kto",
                      columns={"response": "text", "label": "thumb"})  # fmt: skip
    assert named.rows == [{"prompt": "p", "response": "x", "label": False}]
    assert refusal(write("a.jsonl", jsonl({"prompt": "p", "response": "x"})), "kto") == (
        "a.jsonl: KTO needs the columns prompt, response, label; found prompt, response; rename or "
        'add "label", or give --columns label=NAME; pairs do as well: prompt, chosen, rejected'
    )


def test_instruction_input_is_checked(write):
    rows = [{"instruction": str(n), "input": i} for n, i in enumerate(["i", 3, "\ud800"])]
    assert load_rows(write("a.json", json.dumps(rows)), "ppo").dropped == {
        "input is not a string": [2],
        "input contains invalid Unicode": [3],
    }


def test_rows_with_another_further_column_are_no_duplicates(write):
    path = write("a.csv", "prompt,level\na,1\na,2\na,1\n")
    assert load_rows(path, "ppo").dropped == {"duplicate of an earlier row": [3]}
    assert load_rows(write("b.csv", "prompt,response\na,b\na,c\n"), "sft").dropped == {}


def test_report_shows_first_rows_of_each_reason(write):
    lines = ["prompt,response", *["a,b"] * 7, '"",b', "c,"]
    assert load_rows(write("a.csv", "\n".join(lines)), "sft").report() == (
        "a.csv: 9 rows read, 1 kept, 8 dropped: duplicate of an earlier row "
        "(6: rows 2, 3, 4, 5, 6, ...), prompt is empty (1: row 8), response is empty (1: row 9)"
    )


def test_report_counts_add_up_to_rows_read(write):
    rng = random.Random(0)
    values = ["", "a", "b", None, 1]
    rows = [{name: rng.choice(values) for name in PAIRS[0]} for _ in range(200)]
    loaded = load_rows(write("a.json", json.dumps(rows)), "dpo")
    numbers = [n for dropped in loaded.dropped.values() for n in dropped]
    kept = sorted(set(range(1, 201)) - set(numbers))
    assert len(numbers) == len(set(numbers)) == loaded.rows_read - len(loaded.rows)
    assert [rows[n - 1] for n in kept] == loaded.rows


# What is refused

DEEP = "[" * 100_000 + "]" * 100_000
OK = '{"prompt": "a"}'
ONE_LIST = "a .json file holds one list of objects; with one object on each line, name it .jsonl"
SEVERAL = (
    "; of several answers to a prompt make pairs: a row for each two, the better one as chosen, "
    "the worse one as rejected"
)
FILES = "give a .csv, .json, .jsonl or .parquet file"

# Name, content, stage, and what is said.
# fmt: off
REFUSED: list[tuple[str, str | bytes, Stage, str]] = [
    ("pairs.csv", "question,answer\na,b", "dpo",
     "pairs.csv: DPO needs the columns prompt, chosen, rejected; found question, answer; "
     'rename or add "chosen" and "rejected", or give --columns chosen=NAME,rejected=NAME'
     f"{SEVERAL}"),
    ("a.csv", "text\nb", "ppo",
     "a.csv: PPO needs the column prompt; found text; "
     'rename or add "prompt" (or question, instruction, query), or give --columns prompt=NAME'),
    ("a.jsonl", '{"input\\n": 1, "": 2}', "sft",
     "a.jsonl: SFT needs the columns prompt, response; found 'input\\n', ''; "
     'rename or add "prompt" (or question, instruction, query) and '
     '"response" (or output, completion, answer, chosen), '
     "or give --columns prompt=NAME,response=NAME"),
    ("a.jsonl", '{"prompt": "a"}', "evaluation",
     "a.jsonl: evaluation needs the columns prompt, references; found prompt; rename or add "
     '"references" (or reference, response, output, completion, answer, chosen), '
     "or give --columns references=NAME"),
    ("a.json", "[{}]", "reward",
     "a.json: reward training needs the columns prompt, chosen, rejected; found none; rename "
     'or add "prompt" (or question, instruction, query) and "chosen" and "rejected", '
     f"or give --columns prompt=NAME,chosen=NAME,rejected=NAME{SEVERAL}"),
    ("a.csv", "x" * 60 + "," + ",".join("bcdefghijk") + "\n" + ",".join("abcdefghijk"), "ppo",
     f"a.csv: PPO needs the column prompt; found {'x' * 37}..., b, c, d, e, f, g, h, ...; "
     'rename or add "prompt" (or question, instruction, query), or give --columns prompt=NAME'),
    ("a.jsonl", '{"Prompt": "a"}\n{"query": "b"}', "ppo",
     'a.jsonl: the columns "Prompt" and "query" could both be the "prompt"; '
     "remove or rename one of them"),
    ("a.csv", "prompt,answer,chosen\na,b,c", "sft",
     'a.csv: the columns "answer" and "chosen" could both be the "response"; '
     "remove or rename one of them"),
    ("a.csv", "prompt,reference,response\na,b,c", "evaluation",
     'a.csv: the columns "reference" and "response" could both be the "references"; '
     "remove or rename one of them"),
    ("a.csv", "prompt,response\na,b\n\nc,d\ne\n", "sft",
     "a.csv: row 3 has 1 field, but the header has 2; put cells that hold commas in quotes"),
    ("a.csv", 'prompt,response\n"a\nb",c\nd,e,f\n', "sft",
     "a.csv: row 2 has 3 fields, but the header has 2; put cells that hold commas in quotes"),
    ("a.csv", "prompt;chosen;rejected\na;b, c;d\n", "dpo",
     "a.csv: semicolons, not commas, part the header prompt;chosen;rejected; save with commas"),
    ("a.csv", '"prompt"\t"text, of it"\n"a"\t"b"\n', "ppo",
     'a.csv: tabs, not commas, part the header \'"prompt"\\t"text, of it"\'; save with commas'),
    ("a.csv", "prompt|response\na|b\n", "sft",
     "a.csv: bars, not commas, part the header prompt|response; save with commas"),
    ("a.csv", "sep=;\nprompt;response\na;b\n", "sft",
     "a.csv: the first line sep=; is no header; remove it, and save with commas"),
    ("a.csv", 'prompt,response\na,b\n"a","say \\"no\\", then"\n', "sft",
     "a.csv: row 2 is not valid CSV (',' expected after '\"'); a quote in a cell is written as "
     '\\" here; write it as ""'),
    ("a.csv", 'prompt,response\n"a","5\\", wide"\n', "sft",
     "a.csv: row 1 has 3 fields, but the header has 2; a quote in a cell is written as "
     '\\" here; write it as ""'),
    ("a.csv", parquet([{"prompt": "a"}]), "ppo",
     "a.csv: line 2 is not UTF-8 but looks like Parquet; name the file .parquet"),
    ("a.csv", "prompt\na\n".encode("utf-16"), "ppo",
     "a.csv: line 1 is not UTF-8 but looks like UTF-16; save the file as UTF-8"),
    ("a.csv", 'prompt\na\n"b\nc\n', "ppo",
     "a.csv: row 2 is not valid CSV (unexpected end of data); "
     'put cells that hold quotes or line ends in quotes and write " as "" there'),
    ("a.csv", '"prompt\na\n', "ppo",
     "a.csv: the header is not valid CSV (unexpected end of data); "
     'put cells that hold quotes or line ends in quotes and write " as "" there'),
    ("a.csv", "prompt,prompt\na,b", "ppo",
     "a.csv: the header has the column prompt twice; remove or rename one of them"),
    ("a.csv", "prompt,response\n", "sft", "a.csv: the file has no rows; add at least one"),
    ("a.json", "[]", "sft", "a.json: the file has no rows; add at least one"),
    ("a.parquet", parquet([]), "sft", "a.parquet: the file has no rows; add at least one"),
    ("a.jsonl", " \n\n", "sft", "a.jsonl: the file is empty; add at least one row"),
    ("a.parquet", b"", "sft", "a.parquet: the file is empty; add at least one row"),
    ("a.csv", b"\xef\xbb\xbf\n", "sft", "a.csv: the file is empty; add at least one row"),
    ("a.jsonl", OK + '\n\n{"prompt": \n', "ppo",
     "a.jsonl: line 3: broken JSON (Expecting value at column 12); "
     "write one JSON object on each line"),
    ("a.jsonl", OK + '\n["a"]', "ppo", "a.jsonl: line 2 is not an object; write it as {...}"),
    ("a.json", '[{"prompt": "a"},\n {"prompt": b}]', "ppo",
     f"a.json: broken JSON (Expecting value at line 2, column 13); {ONE_LIST}"),
    ("a.json", OK + "\n" + OK, "ppo",
     f"a.json: broken JSON (Extra data at line 2, column 1); {ONE_LIST}"),
    ("a.json", "3", "ppo", f"a.json: this is not a list of objects; {ONE_LIST}"),
    ("a.json", OK, "ppo", f"a.json: this is not a list of objects; {ONE_LIST}"),
    ("a.json", '{"data": {}}', "ppo", f"a.json: this is not a list of objects; {ONE_LIST}"),
    ("a.json", '{"data": [], "data": []}', "ppo",
     "a.json: the outer object has the key data twice; remove or rename one of them"),
    ("a.json", f"[{OK}, 3]", "ppo", "a.json: row 2 is not an object; write it as {...}"),
    ("a.json", f'[{OK}, {{"prompt": "a", "prompt": "b"}}]', "ppo",
     "a.json: row 2 has the key prompt twice; remove or rename one of them"),
    ("a.jsonl", OK + '\n{"prompt": "a", "more": [{"k\\n": 1, "k\\n": 2}]}', "ppo",
     "a.jsonl: line 2 has the key 'k\\n' twice; remove or rename one of them"),
    ("a.jsonl", OK + '\n{"prompt": "b", "more": ' + DEEP + "}", "ppo",
     "a.jsonl: line 2: nested too deeply; flatten the columns"),
    ("a.json", DEEP, "ppo", "a.json: nested too deeply; flatten the columns"),
    ("a.jsonl", '{"prompt": ' + "1" * 5000 + "}", "ppo",
     "a.jsonl: line 1: a number has too many digits; write it as a string"),
    ("a.csv", b"prompt\na\n\xff\n", "ppo", "a.csv: line 3 is not UTF-8; save the file as UTF-8"),
    ("a.jsonl", OK + "\n\0", "ppo", "a.jsonl: line 2 has a NUL byte; save the file as UTF-8 text"),
    ("a.csv", "prompt\n\na\0b\n", "ppo",
     "a.csv: line 3 has a NUL byte; save the file as UTF-8 text"),
    ("a.txt", "prompt\na", "ppo", f"a.txt: the format is unknown; {FILES}"),
    ("rows", "prompt\na", "ppo", f"rows: the format is unknown; {FILES}"),
    ("a.csv", 'prompt,response\n,a\n" ",b\nc,\n', "sft",
     "a.csv: no usable row among the 3 read: prompt is empty (2: rows 1, 2), "
     "response is empty (1: row 3); correct these rows"),
]
# fmt: on


@pytest.mark.parametrize(("name", "content", "stage", "message"), REFUSED)
def test_file_is_refused(write, name, content, stage, message):
    assert refusal(write(name, content), stage) == message


def test_nesting_of_any_depth_is_read_or_refused(write):
    limit = sys.getrecursionlimit()
    outcomes = []
    for depth in range(1, 2 * limit, limit // 20):
        path = write("a.jsonl", '{"prompt": "a", "more": ' + "[" * depth + "]" * depth + "}")
        try:
            outcomes.append(len(load_rows(path, "ppo").rows))
        except BadInput as error:
            outcomes.append(str(error))
    assert set(outcomes) == {1, "a.jsonl: line 1: nested too deeply; flatten the columns"}
    assert outcomes[0] == 1
    assert outcomes[-1] != 1


def test_parquet_that_is_none_is_refused(write):
    message = refusal(write("a.parquet", b"PAR1 nothing\nPAR1"), "ppo")
    assert message.startswith("a.parquet: not a readable Parquet file (")
    assert message.endswith("; write it again")


def test_paths_are_refused(write, tmp_path, monkeypatch):
    Path("folder.csv").mkdir()
    assert refusal("folder.csv", "ppo") == f"folder.csv: this is a folder; {FILES} in it"
    assert refusal(".", "ppo") == f".: this is a folder; {FILES} in it"
    remedy = "give the path of a file that you can read"
    assert refusal("none.csv", "ppo") == f"none.csv: No such file or directory; {remedy}"
    full = tmp_path / "none.csv"
    assert refusal(full, "ppo") == f"{full}: No such file or directory; {remedy}"
    assert refusal("a\n\0.csv", "ppo") == f"'a\\n\\x00.csv': not a possible path; {remedy}"
    assert refusal("\ud800.csv", "ppo").startswith("'\\ud800.csv': ")
    assert refusal("https://some.where/a.csv", "ppo") == (
        "https://some.where/a.csv: an address is not read; give owner/name of a dataset on the "
        "Hub, or download the file and give its path"
    )
    assert "File name too long" in refusal("a" * 5000 + ".csv", "ppo")

    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    assert refusal(write("a.csv", "prompt\na"), "ppo") == f"a.csv: Permission denied; {remedy}"


def test_source_with_a_line_end_stays_one_line(write):
    loaded = load_rows(write("a\nb.jsonl", '{"prompt": "a"}\n{"prompt": ""}'), "ppo")
    assert loaded.source == "a\nb.jsonl"
    assert loaded.report() == (
        r"'a\nb.jsonl': 2 rows read, 1 kept, 1 dropped: prompt is empty (1: line 2)"
    )
    refused = refusal(write("a\nb.jsonl", '{"prompt": ""}'), "ppo")
    assert refused.endswith("prompt is empty (1: line 1); correct these rows")


# Compressed files and folders of files

PACKED = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "zst": lambda data: pa.compress(data, "zstd", asbytes=True),
    "lz4": lambda data: pa.compress(data, "lz4", asbytes=True),
}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl", "a.parquet"])
def test_compressed_files_are_read(write, name, packed):
    content = WRITERS[name](PAIRS)
    data = PACKED[packed](content if isinstance(content, bytes) else content.encode())
    for path in (f"{name}.{packed}", name):  # whatever the name says
        assert load_rows(write(path, data), "dpo").rows == PAIRS
    plain = content if isinstance(content, bytes) else content.encode()
    assert load_rows(write(f"{name}.{packed}", plain), "dpo").rows == PAIRS


def test_a_compressed_file_is_named_and_counted_as_any(write):
    data = gzip.compress(b'{"prompt": "a"}\n\n{"prompt": ""}\n')
    assert load_rows(write("a.jsonl.gz", data), "ppo").report() == (
        "a.jsonl.gz: 2 rows read, 1 kept, 1 dropped: prompt is empty (1: line 3)"
    )
    assert "no rows" in refusal(write("a.csv.gz", gzip.compress(b"prompt\n")), "ppo")
    assert "is empty" in refusal(write("a.csv.gz", gzip.compress(b"")), "ppo")


@pytest.mark.parametrize("packed", ["gz", "bz2", "zst"])
def test_half_a_compressed_file_is_refused(write, packed):
    data = PACKED[packed](WRITERS["a.jsonl"](PAIRS * 20).encode())
    message = refusal(write(f"a.jsonl.{packed}", data[:-9]), "dpo")
    assert message.startswith(f"a.jsonl.{packed}: damaged ")
    assert message.endswith("; compress the file again")


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """Writes files of rows into the folder "d"."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def write(**files: str | bytes) -> str:
        for name, content in files.items():
            path = Path("d", *name.replace("__", ".").split("_"))
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return "d"

    return write


def prompts(loaded: LoadedRows) -> list[str]:
    return [row["prompt"] for row in loaded.rows]


def test_a_folder_of_shards(shards):
    folder = shards(b__jsonl=jsonl({"prompt": "3"}), a__jsonl='{"prompt": "1"}\n\n{"prompt": "2"}')
    assert prompts(load_rows(folder, "ppo")) == ["1", "2", "3"]
    folder = shards(a__jsonl='{"prompt": "1"}\n\n{"prompt": ""}', b__jsonl='{"prompt": ""}')
    loaded = load_rows(folder, "ppo")
    assert loaded.report() == (
        "d (train): 3 rows read, 1 kept, 2 dropped: prompt is empty (2: rows a.jsonl:3, b.jsonl:1)"
    )
    # texts are those of the files: nothing is made a number, a date or a missing value
    csv_rows = "prompt,level\n007,NA\n2020-01-01,1.0\n"
    Path("d/a.jsonl").unlink()
    Path("d/b.jsonl").unlink()
    shards(a__csv__gz=gzip.compress(csv_rows.encode()), b__csv=csv_rows.replace("007", "008"))
    assert load_rows(folder, "ppo").rows[::2] == [
        {"prompt": "007", "level": "NA"},
        {"prompt": "008", "level": "NA"},
    ]


def test_the_splits_of_a_folder(shards):
    rows = {split: parquet([{"prompt": split}]) for split in ("train", "test")}
    folder = shards(
        **{f"data_{split}-00000-of-00001__parquet": data for split, data in rows.items()}
    )
    assert prompts(load_rows(folder, "ppo")) == ["train"]
    assert prompts(load_rows(folder, "ppo", split="test")) == ["test"]
    assert prompts(load_rows(folder, "ppo", usual_split="test")) == ["test"]
    with pytest.raises(BadInput, match=r"d: there is no split 'dev'; give one of train, test as"):
        load_rows(folder, "ppo", split="dev")


def test_files_that_belong_to_no_split_are_named(shards):
    folder = shards(train__jsonl=jsonl({"prompt": "a"}), more__jsonl=jsonl({"prompt": "b"}))
    loaded = load_rows(folder, "ppo")
    assert prompts(loaded) == ["a"]
    assert loaded.notes == ["warning: files of d that are not read: more.jsonl"]
    shards(more__csv="prompt\nb\n")
    assert load_rows(folder, "ppo").notes == [
        "warning: files of d that are not read: more.csv, more.jsonl"
    ]


CONFIGS = """---
configs:
- config_name: main
  data_files: main/*.jsonl
- config_name: other
  data_files: other/*.jsonl
---
"""


def test_the_configurations_of_a_folder(shards):
    rows = {f"{name}_a__jsonl": jsonl({"prompt": name}) for name in ("main", "other")}
    folder = shards(README__md=CONFIGS, **rows)
    assert prompts(load_rows("d:other", "ppo")) == ["other"]
    assert refusal(folder, "ppo") == (
        "d: it has several configurations; give one of main, other, like d:main"
    )
    assert refusal("d:one", "ppo") == (
        "d: there is no configuration one; give one of main, other, like d:main"
    )


def test_a_bad_file_of_a_folder_is_named(shards):
    folder = shards(a__csv="prompt\na\n", b__csv="prompt;x\nb;c\n")
    assert refusal(folder, "ppo").startswith(f"{Path('d', 'b.csv')}: semicolons, not commas, part")


def test_a_saved_dataset(tmp_path):
    rows = datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": ""}])
    rows.save_to_disk(tmp_path / "one")
    loaded = load_rows(tmp_path / "one", "ppo")
    assert (prompts(loaded), loaded.dropped) == (["a"], {"prompt is empty": [2]})
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "two")
    assert load_rows(tmp_path / "two", "ppo", split="test").rows_read == 1
    (tmp_path / "one" / "state.json").write_text("{", encoding="utf-8")
    assert "this saved dataset cannot be read" in refusal(tmp_path / "one", "ppo")


# What does not fit into the memory


def test_a_file_larger_than_the_memory_is_refused_unread(write):
    path = write("a.jsonl", "")
    os.truncate(path, 2**43)  # sparse: it takes no room on the disk
    message = refusal(path, "ppo")
    assert message.startswith("a.jsonl: its 8192.0 GB are read as a whole, and ")
    assert message.endswith(
        " of memory are free; give a smaller file (--limit draws only after reading)"
    )


@pytest.mark.parametrize("error", [MemoryError(), pa.ArrowMemoryError("malloc of size 9 failed")])
def test_rows_that_outgrow_the_memory_are_told_as_such(write, monkeypatch, error):
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    says = "the rows do not fit into the memory, which holds all of them; give fewer"
    monkeypatch.setattr(pd, "read_parquet", fail)
    assert says in refusal(write("a.parquet", parquet(PAIRS)), "dpo")
    monkeypatch.setattr(json, "loads", fail)
    assert says in refusal(write("a.jsonl", jsonl(*PAIRS)), "dpo")


# Whatever the file contains

NAMES = ["prompt", "Question", "instruction", "input", "response", "chosen", "rejected", "margin"]
NAMES += ["messages"]
TEXTS = st.one_of(st.text(st.characters(), max_size=3), st.sampled_from(["a", " a", "\ud800", ""]))
LEAVES = st.one_of(TEXTS, TEXTS, st.none(), st.booleans(), st.integers(), st.floats())
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", 1]), "content": TEXTS | st.none()}
)
MESSAGES = st.lists(MESSAGE, max_size=4)
TRANSCRIPTS = st.lists(st.sampled_from(["Human:", "Assistant:", "a", " ", ""]), max_size=6).map(
    "\n\n".join
)
TALK = MESSAGES | TRANSCRIPTS
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=2)
)
OBJECTS = st.dictionaries(st.sampled_from(NAMES) | TEXTS, LEAVES | VALUES, max_size=6)
CELLS = st.sampled_from(["a", "b", "c", "d", " a", "b\n", " ", "\ud800x", None, math.nan, ["a"]])
MARGINS = st.sampled_from([1, "0.5", 2, "1e999", math.inf, None, 10**400])
PAIR = dict.fromkeys(["instruction", "chosen", "rejected"], CELLS)
TABLES = st.one_of(
    st.lists(OBJECTS, max_size=4),
    st.lists(st.fixed_dictionaries({"chosen": TALK, "rejected": TALK}), min_size=5, max_size=8),
    st.lists(
        st.fixed_dictionaries({}, optional=dict.fromkeys(NAMES[:1] + NAMES[4:], TALK)),
        min_size=5,
        max_size=8,
    ),
    st.lists(st.fixed_dictionaries(PAIR, optional={"more": VALUES}), min_size=5, max_size=8),
    st.lists(st.fixed_dictionaries({**PAIR, "Margin ": MARGINS}), min_size=5, max_size=8),
    st.lists(st.fixed_dictionaries({**PAIR, "input": CELLS}), min_size=5, max_size=8),
)
ANYTHING = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


SURROGATES = set(map(chr, range(0xD800, 0xE000)))


def usable(text: Any) -> bool:
    return isinstance(text, str) and text.strip() != "" and not set(text) & SURROGATES


def assert_contract(path: str) -> None:
    """For each stage: one line of BadInput, or rows that the stage can use."""
    for stage in STAGES:
        try:
            loaded = load_rows(path, stage)
        except BadInput as error:
            loaded, said = None, str(error)
        else:
            said = loaded.report()
        assert said.isprintable()
        if loaded is None:
            continue
        assert 0 < len(loaded.rows) == loaded.rows_read - sum(map(len, loaded.dropped.values()))
        for row in loaded.rows:
            assert usable(row["prompt"])
            for message in getattr(row["prompt"], "messages", ()):
                assert {*map(type, message.values())} == {str}
            if stage == "sft":
                assert usable(row["response"])
            if stage == "kto" and "label" in row:
                assert usable(row["response"])
                assert type(row["label"]) is bool
            if stage in ("reward", "dpo") or (stage == "kto" and "label" not in row):
                assert usable(row["chosen"])
                assert usable(row["rejected"])
                assert row["chosen"].strip() != row["rejected"].strip()
            if stage == "reward" and "margin" in row:
                assert type(row["margin"]) is float
                assert math.isfinite(row["margin"])
            if stage == "evaluation":
                assert row["references"]
                assert all(map(usable, row["references"]))


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
def test_any_bytes(write, suffix):
    @ANYTHING
    @example(b"prompt\x85,chosen,rejected\r\x1c,\r")
    @example(b'"')
    @given(st.binary(max_size=60) | st.text(alphabet='promt,"\r\n[]{}:a1 ', max_size=60))
    def check(content: str | bytes) -> None:
        assert_contract(write("any" + suffix, content))

    check()


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_any_json(write, suffix):
    @ANYTHING
    @given(TABLES, VALUES)
    def check(table: list[dict[str, Any]], value: Any) -> None:
        lines = [json.dumps(row) for row in table]
        assert_contract(
            write("any" + suffix, "\n".join(lines) if suffix == ".jsonl" else json.dumps(table))
        )
        assert_contract(write("any" + suffix, json.dumps(value)))

    check()


def test_any_csv(write):
    @ANYTHING
    @given(st.lists(st.lists(st.sampled_from(NAMES) | TEXTS, max_size=4), max_size=4))
    def check(table: list[list[str]]) -> None:
        text = "\n".join(",".join(cells) for cells in [["prompt", "chosen", "rejected"], *table])
        assert_contract(write("any.csv", text.encode("utf-8", "ignore")))

    check()


def test_any_damaged_parquet(write):
    whole = bytearray(parquet([{**row, "margin": 1} for row in PAIRS]))

    @ANYTHING
    @given(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4))
    def check(changes: list[tuple[int, int]]) -> None:
        damaged = bytearray(whole)
        for place, byte in changes:
            damaged[place] = byte
        assert_contract(write("any.parquet", bytes(damaged)))

    check()


# Columns named by the user

QUESTIONS = jsonl(
    {"id": 1, "q": "a", "good": "b", "bad": "c", "prompt": "x"},
    {"id": 2, "q": "d", "good": "e", "bad": "f", "prompt": "y"},
)


def test_named_columns_go_before_all_names(write):
    path = write("a.jsonl", QUESTIONS)
    named = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    assert load_rows(path, "dpo", columns=named).rows == [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "d", "chosen": "e", "rejected": "f"},
    ]
    # the same mapping serves the other stages: SFT reads the chosen as its response
    assert load_rows(path, "sft", columns=named).rows[0] == {"prompt": "a", "response": "b"}
    assert load_rows(path, "evaluation", columns=named).rows[1] == {
        "prompt": "d",
        "references": ["e"],
    }
    assert load_rows(path, "ppo", columns=named).rows[0] == {
        "id": 1,
        "prompt": "a",
        "q": "a",  # a reward function may know it by either name
        "good": "b",
        "bad": "c",
    }


def test_a_named_column_settles_which_of_two_is_meant(write):
    path = write("a.csv", "prompt,answer,chosen\na,b,c\n")
    assert load_rows(path, "sft", columns={"response": "answer"}).rows == [
        {"prompt": "a", "response": "b"}
    ]


def test_a_named_column_is_nothing_else(write):
    path = write("a.csv", "answer,output\na,b\n")
    assert load_rows(path, "sft", columns={"prompt": "answer"}).rows == [
        {"prompt": "a", "response": "b"}
    ]


def test_named_columns_are_checked(write):
    path = write("a.jsonl", QUESTIONS)
    with pytest.raises(BadInput) as caught:
        load_rows(path, "dpo", columns={"prompt": "question"})
    assert str(caught.value) == (
        "a.jsonl: --columns says prompt=question, but there is no such column; give one of "
        "id, q, good, bad, prompt; the first row is {id: 1, q: a, good: b, bad: c, prompt: x}"
    )
    with pytest.raises(BadInput) as caught:
        load_rows(path, "dpo", columns={"query": "q"})
    assert str(caught.value) == (
        "--columns: no stage has a column query; left of = stands one of prompt, response, "
        "chosen, rejected, references, messages, margin, label, input, system"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "'' does not say which column serves as which"),
        ("prompt", "prompt does not say which"),
        ("prompt=", "prompt= does not say which"),
        ("prompt=a,,chosen=b", "'' does not say which"),
        ("prompt=a,prompt=b", "prompt stands twice"),
    ],
)
def test_column_mapping_that_cannot_be_read(text, says):
    with pytest.raises(BadInput, match=says) as caught:
        parse_columns(text)
    assert str(caught.value).isprintable()


# Other sources


def test_frame_and_dataset_give_the_rows_of_the_file(write):
    talk = [{"role": "user", "content": "a"}]
    reply = [{"role": "assistant", "content": "b"}]
    rows = [
        {"prompt": talk, "chosen": reply, "rejected": [{**reply[0], "content": "c"}], "n": 3},
        {"prompt": [*talk, *reply, *talk], "chosen": reply, "rejected": [], "n": 4},
    ]
    path = write("a.parquet", parquet(rows))
    for stage in ("dpo", "ppo", "sft"):
        read = load_rows(path, stage)
        dataset = load_rows(datasets.Dataset.from_list(rows), stage)
        frame = load_rows(pd.DataFrame(rows), stage)
        arrays = load_rows(pd.read_parquet(path), stage)  # whose lists are arrays
        assert dataset.rows == frame.rows == arrays.rows == read.rows
        assert dataset.dropped == frame.dropped == arrays.dropped == read.dropped
        assert (dataset.source, frame.source) == ("the dataset", "the frame")
        for other in (dataset, frame, arrays):
            for ours, theirs in zip(other.rows, read.rows, strict=True):
                assert ours["prompt"].messages == theirs["prompt"].messages
    assert load_rows(datasets.Dataset.from_list(rows), "dpo").dropped == {"rejected is empty": [2]}
    arrays = load_rows(pd.DataFrame({"prompt": ["a"], "n": [3], "ids": [np.array([1])]}), "ppo")
    assert arrays.rows == [{"prompt": "a", "n": 3, "ids": [1]}]
    assert type(arrays.rows[0]["n"]) is type(arrays.rows[0]["ids"][0]) is int


def test_a_frame_keeps_what_it_lacks_apart_from_text():
    frame = pd.DataFrame({"prompt": ["a", None, "c"], "response": ["x", "y", math.nan]})
    loaded = load_rows(frame, "sft")
    assert loaded.rows == [{"prompt": "a", "response": "x"}]
    assert loaded.dropped == {"prompt is not a string": [2], "response is not a string": [3]}
    assert load_rows(frame[:1].set_index("prompt"), "sft").rows == loaded.rows


@pytest.mark.parametrize("name", ["imdb", "gsm8k:main"])
def test_a_name_without_an_owner(write, name):  # noqa: ARG001
    assert refusal(name, "ppo") == (
        f"{name}: no such file here; a dataset on the Hub is named owner/name, like "
        "stanfordnlp/imdb, or owner/name:config"
    )


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (pd.DataFrame([["a", "b"]], columns=["prompt", "prompt"]), "two columns of the same name"),
        (pd.DataFrame({"prompt": []}), "the frame: there are no rows"),
        (datasets.DatasetDict(), "DatasetDict is no source of rows"),
        ([{"prompt": "a"}], "list is no source of rows"),
        (None, "NoneType is no source of rows"),
    ],
)
def test_other_sources_are_refused(data, says):
    with pytest.raises(BadInput, match=says) as caught:
        load_rows(data, "ppo")
    assert str(caught.value).isprintable()


def test_a_split_is_only_for_the_hub(write):
    for data in (write("a.csv", "prompt\na\n"), pd.DataFrame({"prompt": ["a"]})):
        with pytest.raises(BadInput, match="split 'test'"):
            load_rows(data, "ppo", split="test")


def test_hub_name(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []

    def load_dataset(*name: str, split: str) -> datasets.Dataset:
        asked.append((*name, split))
        return datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": ""}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_rows("some-one/her.pairs_2", "ppo")
    assert loaded.rows == [{"prompt": "a"}]
    assert loaded.report() == (
        "some-one/her.pairs_2 (train): 2 rows read, 1 kept, 1 dropped: prompt is empty (1: row 2)"
    )
    assert load_rows("a/b", "ppo", split="test[:5]").source == "a/b (test[:5])"
    assert load_rows("a/b:en-US", "ppo").source == "a/b:en-US (train)"
    assert load_rows("a/b", "ppo", usual_split="test").source == "a/b (test)"
    assert asked == [
        ("some-one/her.pairs_2", "train"),
        ("a/b", "test[:5]"),
        ("a/b", "en-US", "train"),
        ("a/b", "test"),
    ]
    # whatever is there, or is called like a file, is a file
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "rows.v2").write_text("", encoding="utf-8")
    for path, says in (
        ("here/rows.v2", "the format is unknown"),
        ("here/pairs.csv", "No such file"),
        ("./pairs", "the format is unknown"),
        ("a/b/c", "the format is unknown"),
    ):
        assert says in refusal(path, "ppo")
    assert len(asked) == 4


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach it\n(offline)"),
        datasets.exceptions.DatasetNotFoundError("doesn't exist"),
        datasets.exceptions.DatasetGenerationError("damaged " * 100),
        ValueError("Unknown split"),
        RuntimeError("scripts are no longer supported"),
    ],
)
def test_hub_says_no(monkeypatch, error):
    def load_dataset(name: str, *, split: str) -> datasets.Dataset:  # noqa: ARG001
        raise error

    monkeypatch.setattr(sources, "hub_answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = refusal("some/pairs", "ppo")
    assert message.startswith(
        "some/pairs: no such file here, and the Hub does not give the split 'train' of such a "
        f"dataset ({' '.join(str(error).split())[:100]}"
    )
    assert message.endswith("; look at the name and --split, go online, or give a file")
    assert len(message) < 400


@pytest.mark.parametrize(
    ("names", "data", "says"),
    [
        (["main", "socratic"], "a/b", "a/b: it has several configurations; give one of main, soc"),
        (["main", "socratic"], "a/b:x", "a/b: there is no configuration x; give one of main, soc"),
        ([f"c{i}" for i in range(99)], "a/b", ", c38, c39 and 59 more, like a/b:c0"),
    ],
)
def test_hub_configurations_are_named(monkeypatch, names, data, says):
    def load_dataset(*name: str, split: str) -> datasets.Dataset:  # noqa: ARG001
        raise ValueError(f"Config name is missing. Available: {names}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda _: names)
    message = refusal(data, "ppo")
    assert says in message
    assert message.endswith(f", like a/b:{names[0]}")


@pytest.fixture
def unasked(monkeypatch):
    """As if the Hub had not been asked before."""
    for place in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(place, "HF_HUB_OFFLINE", False)
    sources._hub_answers.cache_clear()
    yield monkeypatch
    sources._hub_answers.cache_clear()


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://nowhere.invalid"])
def test_a_hub_out_of_reach_is_asked_once(unasked, endpoint):
    unasked.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    started = time.perf_counter()
    assert f"the Hub ({endpoint}) cannot be asked: no answer" in refusal("no-one/nothing", "ppo")
    assert time.perf_counter() - started < 3
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE


def test_a_hub_that_never_answers_is_given_up(unasked):
    asked = []

    class Hub:
        def head(self, *_: Any, **__: Any) -> None:
            asked.append(1)
            time.sleep(0.5)
            raise OSError

    unasked.setattr(sources, "HUB_SECONDS", 0.05)
    unasked.setattr(sources, "get_session", Hub)
    started = time.perf_counter()
    assert "no answer within 0.05 s" in refusal("no-one/nothing", "ppo")
    assert asked
    assert time.perf_counter() - started < 1


def test_hub_offline(monkeypatch):
    # as the libraries themselves say it
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert "(Couldn't reach 'no-one/nothing' on the Hub" in refusal("no-one/nothing", "ppo")


# Sub-samples


def test_limit_draws_of_the_usable_rows(write):
    lines = ["prompt,level", *(f"{'' if n % 5 == 0 else n},{n}" for n in range(50))]
    path = write("a.csv", "\n".join(lines))
    whole = load_rows(path, "ppo")
    drawn = [load_rows(path, "ppo", limit=10, seed=seed) for seed in range(20)]
    assert drawn[3] == load_rows(path, "ppo", limit=10, seed=3)
    for loaded in drawn:
        places = [whole.rows.index(row) for row in loaded.rows]
        assert len(places) == 10
        assert places == sorted(set(places))  # the order of the file, no row twice
        assert loaded.left_out == len(whole.rows) - 10
        assert loaded.dropped == whole.dropped
    assert len({tuple(row["level"] for row in loaded.rows) for loaded in drawn}) == 20
    assert whole.report() + "; 10 of the kept were drawn (seed 3)" == drawn[3].report()


def test_limit_above_the_rows_changes_nothing(write):
    path = write("a.csv", "prompt\na\nb\n")
    for limit in (None, 2, 3):
        loaded = load_rows(path, "ppo", limit=limit)
        assert loaded.rows == [{"prompt": "a"}, {"prompt": "b"}]
        assert loaded.report() == "a.csv: 2 rows read, 2 kept, 0 dropped"


# Splitting


@ANYTHING
@given(
    st.lists(st.sampled_from("abcdef"), min_size=2, max_size=40).filter(lambda g: len(set(g)) > 1),
    st.floats(0.01, 0.99),
    st.integers(0, 5),
)
def test_split_keeps_groups_together(groups, share, seed):
    rows = list(enumerate(groups))
    train, heldout = split_rows(rows, heldout_share=share, seed=seed, group=lambda row: row[1])
    assert train
    assert heldout
    assert sorted(train + heldout) == rows
    assert train == sorted(train)  # the order of the file
    assert heldout == sorted(heldout)
    held = {name for _, name in heldout}
    assert not held & {name for _, name in train}
    largest = max(groups.count(name) for name in held)
    target = max(1, round(share * len(rows)))
    assert len(heldout) < target + largest
    assert len(heldout) >= target or len(held) == len(set(groups)) - 1
    again = split_rows(rows, heldout_share=share, seed=seed, group=lambda row: row[1])
    assert again == (train, heldout)


@pytest.mark.parametrize(
    ("share", "sizes"),
    [(0.1, (90, 10)), (0.25, (75, 25)), (0.156, (84, 16)), (0.001, (99, 1)), (0.999, (1, 99))],
)
def test_split_sizes_of_single_rows(share, sizes):
    train, heldout = split_rows(list(range(100)), heldout_share=share, seed=3, group=str)
    assert (len(train), len(heldout)) == sizes


def test_split_depends_on_the_seed_alone():
    random.seed(1)
    state = random.getstate()
    splits = [split_rows(list(range(50)), heldout_share=0.2, seed=s, group=str) for s in range(5)]
    assert len({tuple(heldout) for _, heldout in splits}) == 5
    assert random.getstate() == state


def test_split_holds_out_each_row_equally_often():
    counts = [0] * 10
    for seed in range(1000):
        for row in split_rows(list(range(10)), heldout_share=0.3, seed=seed, group=str)[1]:
            counts[row] += 1
    # 1000 draws with p = 0.3: standard deviation 14.5
    assert sum(counts) == 3000
    assert all(abs(count - 300) < 5 * 14.5 for count in counts)


@pytest.mark.parametrize(
    ("rows", "counted"),
    [
        ([], "0 rows with 0 different prompts"),
        (["a"], "1 row with 1 different prompt"),
        (["a", "a"], "2 rows with 1 different prompt"),
    ],
)
def test_split_needs_two_groups(rows, counted):
    with pytest.raises(BadInput) as caught:
        split_rows(rows, heldout_share=0.5, seed=0, group=str)
    assert str(caught.value) == (
        f"{counted} cannot be split into training and held-out rows; "
        "give rows with at least two different prompts"
    )


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 2.0, math.nan])
def test_split_share_is_checked(share):
    with pytest.raises(BadInput) as caught:
        split_rows(["a", "b"], heldout_share=share, seed=0, group=str)
    assert str(caught.value) == (
        f"the held-out share must lie between 0 and 1, not {share}; 0.1 is usual"
    )
