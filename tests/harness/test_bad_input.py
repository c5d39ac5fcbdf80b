"""One table of bad input: how it is made, which command gets it, and the one line it says.

`python tests/harness/test_bad_input.py` runs every case and prints the table as Markdown.
"""

import contextlib
import io
import json
import logging
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets  # noqa: F401 (its logger keeps the stderr of when it was imported)
import huggingface_hub
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import bert, bert_syllables, small_policy, small_reward_model
from test_cli import EXAMPLES, example, our_line, pairs, write_rows
from transformers import BartConfig, BartForConditionalGeneration

from rlhf_min.harness.run.checkpoint import crc32_of
from rlhf_min.harness.run.saved_models import save_policy, save_reward_model

Make = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One bad input.

    Args:
        given: what is bad, in words.
        command: its command line, in a folder with pairs.jsonl and the models sft, ppo and bert.
        says: the message, with … for any text between.
        make: makes the bad input in that folder.
        code: the exit code; 0 for what is odd and accepted, of which `says` is a line printed.
    """

    given: str
    command: str
    says: str
    make: Make = lambda: None
    code: int = 2


# How bad input is made


def file(name: str, content: str | bytes = "") -> Make:
    data = content if isinstance(content, bytes) else content.encode("utf-8")

    def make() -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(data)

    return make


def rows(*given: Any) -> Make:
    return lambda: write_rows(Path("a.jsonl"), given)


def parquet(prompts: Sequence[Any], *, size: int | None = None) -> Make:
    """A file with these prompts, cut to a size."""

    def make() -> None:
        pd.DataFrame({"prompt": prompts, "response": "x"}).to_parquet("a.parquet")
        cut("a.parquet", size)()

    return make


def folder(name: str, *names: str) -> Make:
    return lambda: [Path(name).mkdir(), *((Path(name) / inside).touch() for inside in names)]


def huge(name: str) -> Make:
    """A file of 8 TB that takes no room on the disk."""
    return both(file(name), lambda: os.truncate(name, 2**43))


def link(name: str, target: str) -> Make:
    return lambda: Path(name).symlink_to(target)


def closed(path: str) -> Make:
    """No permission at all; root, who needs none, is spared the case."""

    def make() -> None:
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            pytest.skip("root may read and write everything")
        Path(path).chmod(0)

    return make


def edited(name: str, **changes: Any) -> Make:
    """A JSON file of a model with other values."""

    def make() -> None:
        content = json.loads(Path(name).read_text(encoding="utf-8")) | changes
        Path(name).write_text(json.dumps(content), encoding="utf-8")

    return make


def without(*names: str) -> Make:
    return lambda: [Path(name).unlink() for name in names]


def cut(name: str, size: int | None = -100) -> Make:
    return lambda: Path(name).write_bytes(Path(name).read_bytes()[:size])


def weights(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Make:
    """A safetensors file whose tensors were changed."""

    def make() -> None:
        tensors = load_file(name)
        change(tensors)
        save_file(tensors, name, metadata={"format": "pt"})

    return make


def one_number(value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    """The last number of one of the tensors is another."""
    return lambda tensors: tensors[max(tensors)].view(-1)[-1].fill_(value)


def saved(name: str, make_model: Make, make_tokenizer: Make) -> Make:
    return lambda: [x().save_pretrained(name) for x in (make_model, make_tokenizer)]


class Touches:
    """Unpickled, it would make a file."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("touched"),)


def pickled(content: Any) -> Make:
    return both(without(WEIGHTS), lambda: torch.save(content, "sft/pytorch_model.bin"))


def own_code(name: str, kind: str, **changes: Any) -> Make:
    """A model or tokenizer whose class is in a file beside it."""
    code = file("sft/own.py", "open('touched', 'w').close()\nclass Own: pass\n")
    return both(code, edited(name, auto_map={kind: "own.Own"}, **changes))


def templates(*names: str) -> Make:
    found = [{"name": name, "template": "{{ messages }}"} for name in names]
    return edited("sft/tokenizer_config.json", chat_template=found)


def reward(code: str) -> Make:
    return file("own.py", f"def f(prompts, responses): {code}\n")


def both(*makes: Make) -> Make:
    return lambda: [make() for make in makes]


# The table

ROOM = " --data pairs.jsonl --max_length 16 --max_response_tokens 8"
SFT = f"train_sft{ROOM} --model sft"
SCORER = f"train_reward_model{ROOM} --reward_model"
PPO = f"train_ppo{ROOM} --max_new_tokens 8 --model sft"
BRIEF = " --epochs 1 --batch_size 64 --skip_preflight"
KTO = f"train_kto{ROOM} --model sft{BRIEF}"
WEIGHTS, CONFIG, TOKENIZER = "sft/model.safetensors", "sft/config.json", "sft/tokenizer.json"
TOKENIZER_CONFIG, HEAD = "sft/tokenizer_config.json", "ppo/value_head.safetensors"

A = {"prompt": "a", "response": "b"}
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
WITHOUT_SPACES = {"type": "Replace", "pattern": {"Regex": "\u200b"}, "content": ""}
DEEP = "[" * 100_000 + "]" * 100_000
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
CALL = [TALK[0], {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}, TALK[1]]
PICTURE = [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}, TALK[1]]
AS_TEXT = "is a list of messages written as text, and not as JSON; write the file again as JSONL"
CONFIG_OF = "- config_name: {0}\n  data_files: {0}/*.jsonl\n".format
ODD = ["\u200b\ufeff", "\u0301\u0308", "\u202eabc", "\x1b[2J\x07", "a\0b"]


def data(given: str, name: str, content: str | bytes | Make, says: str, by: str = "sft") -> Case:
    """A file that a stage is to read."""
    make = content if callable(content) else file(name, content)
    return Case(given, f"train_{by} --data {name}", says, make)


FILES = "give a .csv, .json, .jsonl or .parquet file"
DATA = [
    data("a folder", "a.csv", folder("a.csv"), f"a.csv: this is a folder; {FILES} in it"),
    data("no such file", "a.csv", folder("b.csv"), "a.csv: No such file or directory; give …"),
    data("an unknown ending", "a.xlsx", "x", f"a.xlsx: the format is unknown; {FILES}"),
    data("no name", "''", file("a.csv"), f"'': the format is unknown; {FILES}"),
    data("a name with a line end", "'a\nb.csv'", file("b.csv"), r"'a\nb.csv': No such file …"),
    data("a link to itself", "a.csv", link("a.csv", "a.csv"), "a.csv: Too many levels of …"),
    data("no permission", "a.csv", both(file("a.csv"), closed("a.csv")), "a.csv: Permission …"),
    data("a pipe", "a.csv", lambda: os.mkfifo("a.csv"), "a.csv: this is a pipe or a device; …"),
    data("no byte", "a.csv", "", "a.csv: the file is empty; add at least one row"),
    data("blank lines", "a.jsonl", "\ufeff\n \n", "a.jsonl: the file is empty; add at least …"),
    data("a header alone", "a.csv", "prompt,response\n", "a.csv: the file has no rows; add …"),
    data("an empty list", "a.json", "[]", "a.json: the file has no rows; add at least one"),
    data("UTF-16", "a.csv", "prompt\na\n".encode("utf-16"), "a.csv: …like UTF-16; save …"),
    data("UTF-16, no BOM", "a.csv", "a\nb\n".encode("utf-16-le"), "a.csv: line 1 has a NUL byte…"),
    data("Latin-1", "a.csv", "prompt\na\n\nö\n".encode("latin-1"), "a.csv: line 4 is not UTF-8…"),
    data("a NUL", "a.csv", "prompt,response\na\0,b\n", "a.csv: line 2 has a NUL byte; save …"),
    data("half a gzip file", "a.jsonl.gz", b"\x1f\x8b\x08\0\0", "a.jsonl.gz: damaged gzip (…); …"),
    data("a spreadsheet", "a.csv", b"PK\x03\x04\xff",
         "a.csv: …a spreadsheet; unpack it, or save …"),
    data("8 TB", "a.jsonl", huge("a.jsonl"), "a.jsonl: its 8192.0 GB are read as a whole, and …"),
    data("semicolons", "a.csv", "prompt;response\na;b\n", "a.csv: semicolons, not commas, part …"),
    data("tabs", "a.csv", "prompt\tresponse\na\tb\n", "a.csv: tabs, not commas, part the …"),
    data("a line for Excel", "a.csv", "sep=,\nprompt,response\na,b\n", "a.csv: the first line …"),
    data("quotes with backslashes", "a.csv", 'prompt\n"a \\"b\\""\n', 'a.csv: …; write it as ""'),
    data("100,000 lists in each other", "a.json", DEEP, "a.json: nested too deeply; flatten …"),
    data("… in a row", "a.jsonl", f'{{"a": {DEEP}}}', "a.jsonl: line 1: nested too deeply; …"),
    data("5000 digits", "a.jsonl", f"[{'1' * 5000}]", "a.jsonl: line 1: a number has too many …"),
    data("broken JSON", "a.jsonl", '{}\n{"prompt": ', "a.jsonl: line 2: broken JSON (…); write …"),
    data("JSONL called .json", "a.json", "{}\n{}\n", "a.json: broken JSON (…name it .jsonl"),
    data("a JSON text", "a.json", '"prompt"', "a.json: this is not a list of objects; …"),
    data("rows that are lists", "a.jsonl", '["a"]', "a.jsonl: line 1 is not an object; …"),
    data("a key twice", "a.jsonl", '{"a": 1, "a": 2}', "a.jsonl: line 1 has the key a twice; …"),
    data("a column twice", "a.csv", "a,a\nb,c\n", "a.csv: the header has the column a twice; …"),
    data("two columns for one", "a.csv", "prompt,query\na,b\n",
         'a.csv: the columns "prompt" and "query" could both be the "prompt"; remove or rename …'),
    data("a row without end", "a.csv", "a,b\nc\n", "a.csv: row 1 has 1 field, but the header …"),
    data("a quote without end", "a.csv", 'a,b\n"c,d\n', "a.csv: row 1 is not valid CSV (…); …"),
    data("no response", "a.csv", "prompt\na\n", "a.csv: SFT needs the columns prompt, response; …"),
    Case("no pairs for all stages", "quickstart --data a.csv",
         "a.csv: reward training needs the columns prompt, chosen, rejected; found prompt, …",
         file("a.csv", "prompt,response\na,b\n")),
    data("no pairs", "a.csv", "prompt\na\n", "a.csv: DPO needs the columns …; found prompt; …",
         "dpo"),
    data("an escape sequence", "a.csv", "\x1b[2J\na\n", r"a.csv: …; found '\x1b[2J'; rename …"),
    data("numbers, null, lists, objects", "a.jsonl",
         rows(*({**A, "prompt": x} for x in (1, 0.5, None, True, ["a"], {"a": 1}))),
         "a.jsonl: no usable row among the 6 read: prompt is not a string (6: lines 1, …"),
    data("NaN and Infinity", "a.jsonl", '{"prompt": NaN, "response": Infinity}',
         "a.jsonl: no usable row among the 1 read: prompt is not a string (1: line 1); correct …"),
    data("half a surrogate pair", "a.jsonl", rows({**A, "prompt": "\ud83d"}), "…invalid Unicode …"),
    data("white space", "a.jsonl", rows({**A, "prompt": "\u00a0\u2003"}), "…prompt is empty (1: …"),
    data("messages without text", "a.jsonl",
         rows({"messages": [{"role": "user", "content": None}]}),
         "a.jsonl: …: messages has a message whose role or content is not a string (1: line 1); …"),
    data("equal pairs", "a.jsonl", rows({**PAIR, "rejected": " b\n"}), "…chosen equals …", "dpo"),
    data("a margin of 1e999", "a.jsonl", rows({**PAIR, "margin": float("inf")}),
         "a.jsonl: …: margin is not a finite number (1: line 1); correct these rows",
         "reward_model"),
    data("one row, 50 times", "a.jsonl", rows(*[A] * 50), "1 row with 1 different prompt cannot …"),
    data("half a Parquet file", "a.parquet", parquet(["a"], size=-100),
         "a.parquet: not a readable …"),
    data("a text called .parquet", "a.parquet", "a,b\nc,d\n",
         "a.parquet: not a readable Parquet …"),
    data("bytes for texts", "a.parquet", parquet([b"a", b"\xff"]), "…prompt is not a string (2: …"),
    data("dates for texts", "a.parquet", parquet([pd.Timestamp(0)]),
         "…prompt is not a string (1: …"),
    Case("no such dataset", "train_sft --data no-one/pairs", "no-one/pairs: no such file here, …"),
    Case("no owner", "train_sft --data imdb", "imdb: no such file here; …is named owner/name, …"),
    Case("an address", "train_sft --data https://a/b.csv", "https://a/b.csv: an address is not …"),
    Case(
        "a folder of several configurations",
        "train_sft --data a",
        "a: it has several configurations; give one of one, two, like a:one",
        both(
            file(
                "a/README.md", "---\nconfigs:\n" + "".join(map(CONFIG_OF, ("one", "two"))) + "---"
            ),
            file("a/one/x.jsonl", "{}"),
        ),
    ),
    Case("no such split of a folder", "train_sft --data a --split dev",
         "a: there is no split 'dev'; give one of train as …", file("a/x.jsonl", "{}")),
    data("messages as Python text", "a.jsonl", rows({"messages": str(TALK)}), f"…{AS_TEXT} (1: …"),
    data("a list's repr", "a.jsonl", rows({**PAIR, "chosen": str(TALK)}), f"…{AS_TEXT} …", "dpo"),
    data("a tool's call", "a.jsonl", rows({"messages": CALL}), "…has a message with a call of a …"),
    data("a picture", "a.jsonl", rows({"messages": PICTURE}), "…part that is no text: image (1: …"),
    data("a system of 3", "a.jsonl", rows({**A, "system": 3}), "…: system is not a string (1: …"),
    data("a margin of 1e300", "a.jsonl", rows({**PAIR, "margin": 1e300}),
         "…: margin is beyond 1.7e+07, too large to train on (1: line 1); correct …",
         "reward_model"),
    data("three answers with scores", "a.jsonl",
         rows({"prompt": "a", "responses": ["b", "c", "d"], "scores": [3, 2, 1]}),
         "a.jsonl: DPO needs …; of several answers to a prompt make pairs: a row for each two, …",
         "dpo"),
    data("a label of yes", "a.jsonl", rows({**A, "label": True}, {**A, "label": "yes"}),
         "a.jsonl: line 2: label is 'yes', which is neither true nor false (nor 1 or 0); make …",
         "kto"),
    data("ratings as labels", "a.csv", "prompt,response,label\na,b,1\na,c,2\n",
         "a.csv: row 2: label is '2', which is neither true nor false (nor 1 or 0); make it one …",
         "kto"),
    data("a label of null", "a.jsonl", rows({**A, "label": None}),
         "a.jsonl: no usable row among the 1 read: label is empty (1: line 1); correct these rows",
         "kto"),
    data("no label", "a.jsonl", rows(A),
         "a.jsonl: KTO needs the columns prompt, response, label; …; pairs do as well: …", "kto"),
    data("nothing labelled true", "a.jsonl",
         rows({**A, "label": False}, {**A, "prompt": "c", "label": False}),
         "no row is labelled true, so a new model has no response to be fine-tuned on; give …",
         "kto"),
    Case("nothing labelled false", f"{KTO} --data a.jsonl",
         "…warning: 18 responses are labelled true and 0 false, so KTO only raises what it is …",
         rows(*({**x, "response": x["chosen"], "label": 1} for x in pairs(20))), 0),
    Case("a row that is left over", f"{KTO} --batch_size 21",
         "22 rows in batches of 21 leave a batch of one, and KTO's KL takes the response of …"),
    Case("one row held out", f"{KTO} --data a.jsonl",
         "KTO's KL takes the response of another row, and one row is held out; hold out two …",
         rows(*({**A, "prompt": x, "label": x == "a"} for x in "abc"))),
    Case("rows one by one", "train_kto --batch_size 1", "KTOConfig: batch_size is 1; it must be …"),
    Case("a prompt in each answer", f"{SFT}{BRIEF} --data a.jsonl",
         "warning: response begins with the prompt in 8 of 8 rows; it would be learned twice; …",
         rows(*({**x, "chosen": f"{x['prompt']} {x['chosen']}"} for x in pairs(8))), 0),
    Case("answers marked bad", f"{SFT}{BRIEF} --data a.jsonl",
         "warning: the column label is not used, and says False in 8 of 8 rows; leave out the …",
         rows(*({**x, "label": False} for x in pairs(8))), 0),
    Case("held-out rows that are trained on", f"{SFT}{BRIEF} --heldout_data pairs.jsonl",
         "warning: 12 of 12 held-out prompts are trained on too, so what is measured on them …",
         code=0),
    Case("held-out rows without data", "train_sft --heldout_data pairs.jsonl",
         "--heldout_data is for your own rows; give --data"),
    Case("a share beside held-out rows", f"{SFT} --heldout_data pairs.jsonl --heldout_share 0.2",
         "--heldout_data takes the place of --heldout_share; leave one of them out"),
    Case("no held-out rows", f"{SFT} --heldout_data a.csv", "a.csv: No such file or directory; …"),
    Case("no prompts", f"{PPO} --reward_model bert --data a.csv", "a.csv: PPO needs …",
         file("a.csv", "a\nb\n")),
    Case(
        "a prompt that no token is made of",
        f"{SFT}{BRIEF} --data a.jsonl",
        "no row is left: the tokenizer makes no token of the prompt (7: rows 1, 2, …); change …",
        both(
            rows(*({**PAIR, "prompt": "\u200b" * n, "chosen": f"x{n}"} for n in range(1, 9))),
            edited(TOKENIZER, normalizer=WITHOUT_SPACES),
        ),
    ),
    Case("no references", "evaluate_models --models sft --data a.csv", "a.csv: evaluation needs …",
         file("a.csv", "prompt\na\n")),
    Case("rows twice", f"{SFT}{BRIEF} --data a.jsonl",
         "a.jsonl: 16 rows read, 8 kept, 8 dropped: duplicate of an earlier row (8: lines 9, …)",
         rows(*pairs(8), *pairs(8)), 0),
    Case("rows of 1 MB", f"{SFT}{BRIEF} --data a.jsonl",
         "SFT on 8 demonstrations; 1 of 8 prompts cut (65528 tokens lost); 1 of 8 responses …",
         rows(*pairs(8), {"prompt": "red " * 2**18, "chosen": "blue " * 2**18, "rejected": "one"}),
         0),
    Case("invisible, combining, right-to-left and control characters",
         f"{SFT}{BRIEF} --data a.jsonl", "a.jsonl: 5 rows read, 5 kept, 0 dropped",
         rows(*({"prompt": x, "response": x} for x in ODD)), 0),
]  # fmt: skip

OPTIONS = [
    Case("an unknown option", "train_sft --epoch_number 1", "unknown option --epoch_number; …"),
    Case("an option of training", "chat --save_every 1", "unknown option --save_every; …"),
    Case("one model of several", "chat --model sft",
         "unknown option --model; give the models to talk to with --models …"),
    Case("an option where there is none", "pencil --foo", "unknown option --foo; …"),
    Case("-1e-3", "train_sft --learning_rate -1e-3",
         "SFTConfig: learning_rate is -0.001; it must …"),
    Case("a folder that is not UTF-8", "train_sft --out 'b\udcff'", r"--out b\udcff: this name …"),
    Case("no value", "train_sft --epochs", "argument --epochs: expected one argument; …"),
    Case("a word too many", "train_sft pairs.jsonl", "unknown option pairs.jsonl; …"),
    Case("a word for a count", "train_sft --epochs many",
         "argument --epochs: invalid int value: …"),
    Case("10^11 threads", "train_sft --threads 99999999999",
         "RunOptions: threads is 99999999999; it must be …"),
    Case("10^12 prompts", "train_ppo --batch_size 999999999999",
         "PPOConfig: batch_size is 999999999999; it must be at least 2 and at most 1048576"),
    Case("a fraction", "train_sft --epochs 1.5", "argument --epochs: invalid int value: '1.5'; …"),
    Case("none", "train_sft --epochs 0", "SFTConfig: epochs is 0; it must be above 0 and finite"),
    Case("a negative count", "train_sft --batch_size -1", "SFTConfig: batch_size is -1; it must …"),
    Case("NaN", "train_sft --learning_rate nan", "SFTConfig: learning_rate is nan; it must be …"),
    Case("infinity", "train_dpo --beta inf", "DPOConfig: beta is inf; it must be above 0 and …"),
    Case("1e999", "train_sft --learning_rate 1e999", "SFTConfig: learning_rate is inf; it must …"),
    Case("a seed of 2^64", f"train_sft --seed {2**64}",
         "SFTConfig: seed is …; it must be at least 0 and …"),
    Case("10^12 tokens", "train_sft --max_length 1000000000000",
         "RunOptions: max_length is …; it must be above 0 and at …"),
    Case("a share above 1", "train_sft --heldout_share 1.5",
         "RunOptions: heldout_share is 1.5; it must be above 0 and below 1"),
    Case("temperature 0", "train_ppo --temperature 0", "PPOConfig: temperature is 0.0; it must …"),
    Case("an unknown choice", "train_sft --precision int8",
         "argument --precision: invalid choice…"),
    Case("no room", "train_sft --max_length 8 --max_response_tokens 8", "…leaves no room for a …"),
    Case("a minibatch above the batch", "train_ppo --batch_size 8 --minibatch_size 16",
         "…16 exceeds …"),
    Case("groups that do not fill the batch", "train_grpo --batch_size 128 --group_size 7",
         "GRPOConfig: batch_size 128 is no multiple of group_size 7; every prompt gets a whole …"),
    Case("a group of one", "train_rloo --group_size 1",
         "RLOOConfig: group_size is 1; it must be at least 2 and finite"),
    Case("a typo in a choice", "train_grpo --loss_mean tokens",
         "argument --loss_mean…: invalid choice: 'tokens' …"),
    Case("a critic without a place", "train_grpo --critic shared", "unknown option --critic; …"),
    Case("an option of GRPO's", "train_rloo --mask_cut", "unknown option --mask_cut; …"),
    Case("room for EOS alone", f"train_dpo{ROOM} --model sft --max_response_tokens 1",
         "no pair is left to train on: all are equal as tokens or equal after the cut; …"),
    Case("responses without room", f"{PPO} --reward_model bert --max_new_tokens 9",
         "max_new_tokens 9 exceeds max_response_tokens 8; …"),
    Case("two rewards", f"{PPO} --reward_model bert --reward bert", "give --reward_model or …"),
    Case("prompts and no model", "train_ppo --data pairs.jsonl",
         "your own prompts need trained models: …"),
    Case("--limit alone", "train_sft --limit 3", "--limit is for your own rows; give --data"),
    Case("a split of a file", f"{SFT} --split test", "pairs.jsonl: a file has no split 'test'; …"),
    Case("no place for the prompt", f"{SFT} --template Hi", "template 'Hi' must hold {prompt} …"),
    Case("two places", f"{SFT} --template '{{prompt}} {{prompt}}'", "template …exactly once"),
    Case("no Unicode", f"{SFT} --template '\udcff{{prompt}}'",
         r"template '\udcff…' holds half of a …"),
    Case("no chat template", f"{SFT} --template chat", "template is chat, but the tokenizer has …"),
    Case("half a column mapping", f"{SFT} --columns prompt", "--columns prompt: prompt does not …"),
    Case("no such column", f"{SFT} --columns prompt=q", "pairs.jsonl: --columns says prompt=q, …"),
    Case("no such device", f"{SFT} --device cuda:99", "--device cuda:99 cannot be used here; …"),
    Case("adapters of no model", "train_sft --lora_rank 2",
         "--lora_rank trains adapters of a model that there is; give one with --model"),
    Case("options of adapters alone", f"{SFT} --lora_alpha 2",
         "--lora_alpha, --lora_targets and --lora_merge are of adapters; give --lora_rank too"),
    Case("adapters and a second trunk",
         f"{PPO} --reward_model bert --lora_rank 2 --critic separate",
         "--critic separate is a second trunk, all of it trained, …; give --critic shared"),
    Case("adapters of no such layer", f"{SFT} --lora_rank 2 --lora_targets q_proj",
         "--lora_targets q_proj: sft has no linear layer of that name below its head; there are …"),
    Case("no such tracker", "train_sft --report_to paper", "--report_to paper is not known; …"),
    Case("no model named", "evaluate_models --models ,", "--models names no model; give for …"),
    Case("a model twice", "evaluate_models --models sft,sft",
         "--models sft,sft names a model twice"),
    Case(
        "a best of what no stage measures",
        f"{SFT} --keep_best eval/nope",
        "--keep_best eval/nope is measured by no stage of this run; give one of eval/loss, "
        "eval/perplexity",
    ),
    Case(
        "a best of what another stage would measure",
        f"{PPO} --reward_model bert --keep_best eval/loss",
        "--keep_best eval/loss is measured by no stage of this run; give one of eval/distinct_2, …",
    ),
]  # fmt: skip

BART = BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=30)


def model(given: str, make: Make, says: str, name: str = "sft", code: int = 2) -> Case:
    """A policy that cannot be used."""
    return Case(given, f"train_sft{ROOM}{BRIEF} --model {name}", says, make, code)


BAD = "no model could be loaded from there: "
DAMAGED = f"sft: {BAD}its weights are damaged (…); copy or save them again"
LORA = '{"peft_type": "LORA", "base_model_name_or_path": "b"}'
MODELS = [
    model("no such folder", lambda: None, f"./a: {BAD}no such folder here, …", "./a"),
    model("no such name", lambda: None, f"no-one/a: {BAD}no such folder here, …", "no-one/a"),
    model("no name", lambda: None, "--model is empty; give a folder or a name", "''"),
    model("a name with a line end", lambda: None, rf"a\nb: {BAD}no such folder …", "'a\nb'"),
    model("a file", lambda: None, f"pairs.jsonl: {BAD}this is a file; give …", "pairs.jsonl"),
    model("an empty folder", folder("a"), f"a: {BAD}the folder is empty", "a"),
    model("an adapter",
         file("a/adapter_config.json", LORA),
         f"a: {BAD}there is an adapter_config.json, but no adapter_model.safetensors", "a"),
    model("an adapter without its base",
         both(file("a/adapter_config.json", LORA), file("a/adapter_model.safetensors")),
         f"a: the base of this adapter is b, says adapter_config.json there; b: {BAD}no such …",
         "a"),
    model("an adapter of another kind", file("a/adapter_config.json", '{"peft_type": "IA3"}'),
         f"a: {BAD}this is an adapter of IA3, and only LoRA's are read; merge it into its base …",
         "a"),
    model("an adapter beside a model", file("sft/adapter_config.json", "{}"),
         f"sft: {BAD}there are both a model and an adapter; take the one that is not meant away"),
    model("quantised weights",
         edited(CONFIG, quantization_config={"quant_method": "gptq", "bits": 4}),
         "sft: its weights are quantised (gptq), and cannot be trained or compared so; give …"),
    model(
        "the folder above checkpoints",
        file("a/checkpoint-500/config.json", '{"model_type": "gpt2"}'),
        f"a: {BAD}the folder has no config.json, but there are models in it; give a/checkpoint-500",
        "a",
    ),
    model("an ONNX model", folder("a", "model.onnx"), f"a: {BAD}there is an ONNX model, …", "a"),
    model("a config alone", folder("a", "config.json"), f"a: {BAD}…", "a"),
    model("a pointer of Git LFS",
         file("sft/model.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
         f"sft: {BAD}model.safetensors is a pointer of Git LFS and not the weights; …"),
    model("an empty config.json", file(CONFIG), f"sft: {BAD}It looks like …not a valid JSON file."),
    model("a broken config.json", file(CONFIG, "{"), f"sft: {BAD}It looks like the config …"),
    model("a config.json in UTF-16", file(CONFIG, "{}".encode("utf-16")), f"sft: {BAD}It looks …"),
    model("a config.json of a list", file(CONFIG, "[]"), f"sft: {BAD}Unrecognized model in sft. …"),
    model("an unknown model", edited(CONFIG, model_type="gpt7"), f"sft: {BAD}The checkpoint …"),
    model("a word for a count", edited(CONFIG, n_layer="two"), f"sft: {BAD}Validation error …"),
    model("no attention head", edited(CONFIG, n_head=0), f"sft: {BAD}ZeroDivisionError: …"),
    model("a config.json of 5", file(CONFIG, "5"), f"sft: {BAD}…"),
    model("a nested config.json", file(CONFIG, DEEP), f"sft: {BAD}…"),
    model("a billion labels", edited(CONFIG, num_labels=10**9),
         f"sft: {BAD}config.json says 1000000000 labels; at most 100000 are named"),
    model("a negative width", edited(CONFIG, n_embd=-16), f"sft: {BAD}…negative dimension -16…"),
    model("no positions", edited(CONFIG, n_positions=None), f"sft: {BAD}Validation error …"),
    model("a billion layers", edited(CONFIG, n_layer=10**9),
         f"sft: {BAD}config.json says …layers…"),
    model(
        "the config of another",
        edited(CONFIG, vocab_size=5),
        "sft: transformer.wte.weight is (10, 16), but config.json says (5, 16); give the config …",
    ),
    model("a template of 7", edited(CONFIG, prompt_template=7), "template 7 must hold {prompt} …"),
    model("too few positions", lambda: None, "…has 16 positions; --max_length 17 …",
         "sft --max_length 17"),
    model("an encoder", lambda: None, "bert: BertForSequenceClassification is an encoder …",
         "bert"),
    model("an encoder-decoder",
         saved("a", lambda: BartForConditionalGeneration(BART), bert_syllables),
         "a: BartForConditionalGeneration is an encoder-decoder and cannot be the policy; give …",
         "a"),
    model("no weights", without(WEIGHTS),
         f"sft: {BAD}there is a config.json, but no model.safetensors; …"),
    model("weights of no bytes", file(WEIGHTS), DAMAGED),
    model("truncated weights", cut(WEIGHTS), DAMAGED),
    model("weights cut in their header", cut(WEIGHTS, 100), DAMAGED),
    model("a header of 2^63 bytes", file(WEIGHTS, struct.pack("<Q", 2**63)), DAMAGED),
    model("a pointer to weights", file(WEIGHTS, "version https://git-lfs.github.com/\n"),
         f"sft: {BAD}model.safetensors is a pointer of Git LFS and not the weights; …"),
    model("a weight that is missing",
         weights(WEIGHTS, lambda tensors: tensors.pop("transformer.ln_f.weight")),
         "sft: weights are missing (transformer.ln_f.weight), so what it computes would be …"),
    model(
        "a weight of another shape",
        weights(WEIGHTS, lambda tensors: tensors.update({"transformer.wpe.weight": torch.ones(3)})),
        "sft: transformer.wpe.weight is (3,), but config.json says (16, 16); give the config …",
    ),
    model("a NaN", weights(WEIGHTS, one_number(float("nan"))), "sft: … holds NaN or infinite …"),
    model("finite weights whose logits are not",
         weights(WEIGHTS, lambda tensors: tensors["transformer.ln_f.weight"].fill_(3e38)),
         "sft: its weights are finite and its logits are not; give weights from before they …"),
    model("code in a pickle", pickled({"a": Touches()}), f"sft: {BAD}its pickled weights hold …"),
    model("a pickle of no bytes", both(without(WEIGHTS), file("sft/pytorch_model.bin")), DAMAGED),
    model("a truncated pickle", both(pickled({"a": torch.zeros(99)}), cut("sft/pytorch_model.bin")),
         f"sft: {BAD}PytorchStreamReader failed …"),
    model(
        "shards that are not there",
        both(
            without(WEIGHTS),
            file(f"{WEIGHTS}.index.json", '{"metadata": {}, "weight_map": {"a": "../../b"}}'),
        ),
        f"sft: {BAD}model.safetensors.index.json names ../../b, and no such file is …",
    ),
    model("a model with code", own_code(CONFIG, "AutoConfig", model_type="own"),
         f"sft: {BAD}it brings code of its own, which is not run; give a model that …"),
    model("a known model with code", own_code(CONFIG, "AutoModelForCausalLM"), "model, …", code=0),
    model("a tokenizer with code",
         own_code(TOKENIZER_CONFIG, "AutoTokenizer", tokenizer_class="Own"), "model, …", code=0),
    model("attention from the Hub", edited(CONFIG, attn_implementation="no-one/kernel"),
         f"sft: {BAD}its attention no-one/kernel is code, which is not run"),
    model("no tokenizer", without(TOKENIZER, TOKENIZER_CONFIG), "sft: there is no tokenizer …"),
    model("a tokenizer of no bytes", file(TOKENIZER), f"sft: {BAD}one of its JSON files is …"),
    model("a truncated tokenizer", cut(TOKENIZER), f"sft: {BAD}one of its JSON files is damaged …"),
    model("a tokenizer of nothing", file(TOKENIZER, "{}"), f"sft: {BAD}KeyError: 'added_tokens'"),
    model("no tokenizer model", edited(TOKENIZER, model={}),
         f"sft: {BAD}its tokenizer is damaged …"),
    model("a broken tokenizer_config.json", file(TOKENIZER_CONFIG, "{"), f"sft: {BAD}one of its …"),
    model("no EOS", edited(TOKENIZER_CONFIG, eos_token=None), "sft: the tokenizer has no EOS …"),
    model(
        "more words than embeddings",
        edited(TOKENIZER_CONFIG, eos_token="<bye>"),
        "sft: the tokenizer has ids up to 10, but the model only 10 embeddings; save the model's …",
    ),
    model("a template outside", templates("../../a"), "sft: the chat template '../../a' is no …"),
    model("… at the root", templates("/tmp/a"), "sft: the chat template '/tmp/a' is no text, or …"),
    model("a chat template without the content",
         edited(TOKENIZER_CONFIG, chat_template="{% for m in messages %}{{ m.role }}{% endfor %}"),
         "the tokenizer's chat template leaves out what the user says: of 'Which …' it makes …"),
    Case("texts of another template", f"{SFT}{BRIEF} --data a.jsonl",
         "  warning: 7 of 7 prompts spell marks of another chat template (<|im_start|>; rows 1, …",
         rows(*({**PAIR, "prompt": f"<|im_start|>{n}"} for n in range(8))), code=0),
    Case("as_is without EOS", f"{SFT}{BRIEF} --data a.jsonl --template as_is",
         "none of the 7 responses ends with EOS, so the policy …; end them with the tokenizer's …",
         rows(*({**PAIR, "prompt": f"{n}"} for n in range(8)))),
    model("a chat template of 7", edited(TOKENIZER_CONFIG, chat_template=7), "sft: the chat …"),
    model("a broken chat template", edited(TOKENIZER_CONFIG, chat_template="{% for %}"),
         "no row is left: the tokenizer's chat template does not take the prompt (…); …"),
    model("settings that cannot be saved", edited(TOKENIZER_CONFIG, more="\ud800"),
         f"sft: {BAD}'utf-8' codec can't encode …"),
    model("settings that contradict each other",
         edited("sft/generation_config.json", num_return_sequences=3),
         f"sft: {BAD}Greedy methods …"),
    model("no GGUF file", lambda: None, f"a.gguf: {BAD}no such file", "a.gguf"),
    model("a GGUF file of no bytes", file("a.gguf"), f"a.gguf: {BAD}…", "a.gguf"),
    Case("a policy as reward model", f"{PPO} --reward_model sft",
         "sft: weights are missing (score…"),
    Case(
        "two labels",
        f"{SCORER} a",
        "a: BertForSequenceClassification has 2 labels (LABEL_0, LABEL_1) and a reward model "
        "exactly one score; for the log-probability of one of them give --reward a@LABEL_1",
        saved("a", lambda: bert(labels=2), bert_syllables),
    ),
    Case("an infinite weight", f"{SCORER} bert",
         "bert: … holds NaN or infinite numbers; give weights from before they went wrong",
         weights("bert/model.safetensors", one_number(float("inf")))),
    Case("a truncated value head", f"{PPO} --model ppo --reward_model bert",
         "ppo: the value head cannot be read: its weights are damaged (…); copy or save them again",
         cut(HEAD, 50)),
    Case("a value head of another shape", f"{PPO} --model ppo --reward_model bert",
         "the value head does not fit critic='shared' of this model: ['value_head.weight'] …",
         weights(HEAD, lambda tensors: tensors.update({"value_head.weight": torch.zeros(1, 3)}))),
    Case("a value head of NaN", f"{PPO} --model ppo --reward_model bert",
         "ppo: value_head.weight holds NaN or infinite numbers; give weights from before they …",
         weights(HEAD, one_number(float("nan")))),
]  # fmt: skip

OWN = f"{PPO} --reward own.py:f"
REWARDS = [
    Case("no such file", f"{PPO} --reward a.py:f", "--reward a.py: no such file; …"),
    Case("no such module", f"{PPO} --reward nowhere:f", "--reward nowhere: cannot be imported …"),
    Case("no such function", f"{PPO} --reward own.py:g", "…no function 'g'; …", reward("pass")),
    Case("no function", OWN, "…has no function 'f'; …", file("own.py", "f = 3\n")),
    Case("no Python", OWN, "--reward own.py: cannot be imported …", file("own.py", "def f(:\n")),
    Case("an error", OWN, "--reward own.py: cannot be imported …", file("own.py", "1 / 0\n")),
    Case("one argument", OWN, "…must take prompts and …", file("own.py", "def f(text): pass\n")),
    Case("a score too few", OWN, "…returned 2 scores for 3 …", reward("return [0] * 2")),
    Case("a number", OWN, "…must return one number per response…", reward("return 0.5")),
    Case("None", OWN, "…must return one number per response…", reward("pass")),
    Case("texts", OWN, "…must return one number per …", reward("return ['a' for _ in prompts]")),
    Case("NaN", OWN, "…gave nan for the prompt …",
         reward("return [float('nan') for _ in prompts]")),
    Case("a dict", OWN, "…as a list; it returned a dict",
         reward("return {p: 1.0 for p in prompts}")),
    Case("1e39", OWN, "…gave 1e+39 for …; scale it …", reward("return [1e39 for _ in prompts]")),
    Case("exit 0", OWN, "reward own.py:f raised SystemExit: 0 (…", reward("raise SystemExit(0)")),
    Case("exit 0 when imported", OWN,
         "--reward own.py: cannot be imported (it ends the process: SystemExit: 0 (…)); give …",
         file("own.py", "raise SystemExit(0)\n")),
    Case("a weight of x", f"{PPO} --reward 'x*bert'", "--reward x*bert: 'x' is not a weight; …"),
    Case("a weight of inf", f"{PPO} --reward 'inf*bert'", "--reward inf*bert: the weight must …"),
    Case("a weight alone", f"{PPO} --reward '2*'", "--reward '2*' names nothing; …"),
    Case("a label that there is not", f"{PPO} --reward 'a@POSITIVE'",
         "a: it has no label 'POSITIVE'; its labels are LABEL_0, LABEL_1",
         saved("a", lambda: bert(labels=2), bert_syllables)),
    Case("a label of a reward model", f"{PPO} --reward bert@LABEL_0",
         "bert: it gives a score and no probabilities of labels; leave @LABEL_0 out"),
    Case("a label of a policy", f"{PPO} --reward sft@LABEL_0",
         "sft: weights are missing (score…"),
    Case("one twice", f"{PPO} --reward bert bert",
         "--reward names bert twice; add up the weights…"),
]  # fmt: skip

OUT = [
    Case("a file", f"{SFT} --out mine", "--out mine exists; …", file("mine")),
    Case("a file with --overwrite", f"{SFT} --out mine --overwrite",
         "--out mine holds no run.json, …", file("mine")),
    Case("a place in a file", f"{SFT} --out mine/a", "--out mine/a: …", file("mine")),
    Case("what is no run", f"{SFT} --out mine", "--out mine exists; …", folder("mine", "diary")),
    Case("… with --overwrite", f"{SFT} --out mine --overwrite",
         "--out mine holds no run.json, so it is not a run and is not overwritten",
         folder("mine", "diary")),
    Case("a run", f"{SFT} --out mine", "--out mine exists; …", folder("mine", "run.json")),
    Case("a run with the data", f"{SFT} --out mine --overwrite --data mine/a.jsonl",
         "--out mine would be emptied, and mine/a.jsonl lies in it; give another folder",
         folder("mine", "run.json", "a.jsonl")),
    Case("a run with the reward", f"{PPO} --reward 0.5*mine/a.py:f --out mine --overwrite",
         "--out mine would be emptied, and mine/a.py lies in it; give another folder",
         folder("mine", "run.json", "a.py")),
    Case("a run with the classifier", f"{PPO} --reward 0.5*mine/a@B --out mine --overwrite",
         "--out mine would be emptied, and mine/a lies in it; give another folder",
         both(folder("mine", "run.json"), folder("mine/a"))),
    Case("a run with the held-out data",
         f"{SFT} --out mine --overwrite --heldout_data mine/a.jsonl",
         "--out mine would be emptied, and mine/a.jsonl lies in it; give another folder",
         folder("mine", "run.json", "a.jsonl")),
    Case("a link to a run", f"{SFT} --out a --overwrite",
         "--out a is a link to a run; give its own folder",
         both(folder("mine", "run.json"), link("a", "mine"))),
    Case("a link to nothing", f"{SFT} --out a", "--out a: …", link("a", "b/c")),
    Case("a link to itself", f"{SFT} --out a", "--out a: …", link("a", "a")),
    Case("no permission", f"{SFT} --out a/b", "--out a/b: …", both(folder("a"), closed("a"))),
    Case("a device", f"{SFT} --out /dev/null/a", "--out /dev/null/a: …"),
    Case("a name of 300 letters", f"{SFT} --out {'a' * 300}", "--out aaa…: File name too long; …"),
    Case("no name", f"{SFT} --out ''", "--out is empty; give a folder"),
    Case("a name with a line end", f"{SFT} --out 'a\nb'", r"--out a\nb exists; …",
         folder("a\nb", "c")),
    Case("the working folder", f"{SFT} --out . --overwrite", "--out . would be emptied, and …"),
]  # fmt: skip

RESUME = "train_sft --resume mine"
RESTORED = "mine/checkpoints/sft/step-000003: "


def run_json(**configs: dict[str, Any]) -> Make:
    """The record of a run that was made with these options."""
    return file("mine/run.json", json.dumps({"config": configs}))


def trained() -> None:
    """A run of three steps, in the folder mine."""
    options = "--data pairs.jsonl --model sft --out mine --epochs 1 --batch_size 4 --threads 1"
    options += " --max_length 16 --max_response_tokens 8 --skip_preflight"
    with patch.object(sys, "argv", ["train_sft.py", *options.split()]):
        example("train_sft").main()


def changed(name: str, change: Callable[[Any], Any]) -> Make:
    """A run of which one JSON file says something else."""

    def make() -> None:
        trained()
        path = next(Path("mine").glob(name))
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content), encoding="utf-8")

    return make


def other_vocabulary(record: dict[str, Any]) -> None:
    record["models"]["policy"]["tokenizer"] = "another"
    del record["crc32"]
    record["crc32"] = crc32_of(record)


CHECKPOINTS = [  # what lies in the folder of a run that is resumed
    Case("no folder", RESUME, "--resume mine holds no run.json, so it is not a run"),
    Case("no run", RESUME, "--resume mine holds no run.json, …", folder("mine", "diary")),
    Case("a record that is cut", RESUME, "mine/run.json cannot be read; …", file("mine/run.json")),
    Case("a record of no options", RESUME, "mine/run.json cannot be read: config holds no options",
         file("mine/run.json", '{"config": {"RunOptions": 1}}')),
    Case("a run of another command", RESUME,
         "--resume mine was started by another command: it has no SFTConfig but RunOptions, …",
         run_json(RunOptions={}, DPOConfig={})),
    Case("an option of the wrong type", RESUME,
         "mine/run.json: SFTConfig.batch_size cannot be 'four'",
         run_json(RunOptions={}, SFTConfig={"batch_size": "four"})),
    Case("an option out of its range", RESUME,
         "SFTConfig: batch_size is -4; it must be above 0 and finite",
         run_json(RunOptions={}, SFTConfig={"batch_size": -4})),
    Case("a link out of the run", RESUME,
         "--resume mine: mine/best is a link, and no run writes any; remove it",
         both(run_json(RunOptions={}, SFTConfig={}), link("mine/best", ".."))),
    Case("--out too", f"{RESUME} --out other", "--resume goes on in its own folder; …", trained),
    Case(
        "another option",
        f"{RESUME} --batch_size 2",
        "--resume mine: another configuration than it was started with: SFTConfig.batch_size 4 -> "
        "2; leave these out, or give --allow_config_change",
        trained,
    ),
    Case("other data", RESUME, f"{RESTORED}the sft run had other data; …",
         both(trained, lambda: write_rows(Path("pairs.jsonl"), pairs(13)[1:]))),
    Case("no data", RESUME, "pairs.jsonl: No such file or directory; …",
         both(trained, lambda: Path("pairs.jsonl").unlink())),
    Case("metrics that are cut", RESUME,
         "mine/metrics.jsonl is shorter than when mine/checkpoints/sft/step-000003 was saved; …",
         both(trained, cut("mine/metrics.jsonl"))),
    Case("another tokenizer", RESUME,
         f"{RESTORED}policy is not what this was saved with: its tokenizer or chat template is …",
         changed("checkpoints/*/*/checkpoint.json", other_vocabulary)),
]  # fmt: skip

TABLE = {
    "Data": DATA,
    "Options": OPTIONS,
    "Models": MODELS,
    "Rewards": REWARDS,
    "The run's folder": OUT,
    "Checkpoints": CHECKPOINTS,
}
# These are run as a command of its own too.
SUBPROCESSES = {"UTF-16", "a model with code"}


# Running the commands


def save_models(folder: Path) -> None:
    """A policy, another with a value head, and a reward model."""
    save_policy(small_policy(dtype=torch.float32), folder / "sft")
    save_policy(small_policy(critic="shared", dtype=torch.float32), folder / "ppo")
    save_reward_model(small_reward_model(dtype=torch.float32), folder / "bert")


@dataclass(frozen=True)
class Outcome:
    """What a command did: exit code, both outputs, and the paths that came, went or changed."""

    code: int
    out: str
    err: str
    changed: list[str]


def listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Kind, size and time of everything below a folder."""
    found = {path.relative_to(folder).as_posix(): path.lstat() for path in folder.rglob("*")}
    return {name: (x.st_mode, x.st_size, x.st_mtime_ns) for name, x in found.items()}


@contextlib.contextmanager
def prepared(case: Case, base: Path, models: Path) -> Iterator[None]:
    """Inside, the working folder is one deep in `base`, with the models and the bad input in it."""
    work, before = base / "deep" / "work", Path.cwd()
    shutil.copytree(models, work)
    os.chdir(work)
    try:
        write_rows(Path("pairs.jsonl"), pairs(12))
        silent = io.StringIO()  # a run that is made to go wrong afterwards tells of itself
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            case.make()
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def all_of_stderr() -> Iterator[list[str]]:
    """A list that has, in the end, what anyone wrote there: also loggers and other languages.

    Warnings stand first.
    """
    loggers = [logging.root, *map(logging.getLogger, logging.root.manager.loggerDict)]
    handlers = [h for x in loggers for h in x.handlers if type(h) is logging.StreamHandler]
    kept, said = os.dup(2), list[str]()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="backslashreplace") as file:
        os.dup2(file.fileno(), 2)
        streams = [handler.setStream(file) for handler in handlers]
        try:
            with contextlib.redirect_stderr(file), warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                for silent in (DeprecationWarning, ResourceWarning):  # as Python has it
                    warnings.simplefilter("ignore", silent)
                yield said
            file.seek(0)
            said += [*(f"{w.category.__name__}: {w.message}\n" for w in warned), file.read()]
        finally:
            for handler, stream in zip(handlers, streams, strict=True):
                handler.setStream(stream or sys.stderr)
            os.dup2(kept, 2)
            os.close(kept)


def outcome(case: Case, base: Path, models: Path) -> Outcome:
    """Run the command of a case in this process. Whoever asks a question is told yes."""
    name, *arguments = shlex.split(case.command)
    threads = torch.get_num_threads()
    with (
        prepared(case, base, models),
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryFile("w+") as stdin,
        tempfile.TemporaryFile("w+", encoding="utf-8") as out,
    ):
        stdin.write("y\n" * 99)
        stdin.seek(0)
        patch.setattr(sys, "argv", [f"{name}.py", *arguments])
        patch.setattr(sys, "stdin", stdin)
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setenv("COLUMNS", "10000")
        before, code = listing(base), 0
        with all_of_stderr() as err, contextlib.redirect_stdout(out):
            try:
                example(name).main()
            except SystemExit as end:
                code = end.code
        after = listing(base)
        torch.set_num_threads(threads)
        changed = [x for x in sorted(before | after) if before.get(x) != after.get(x)]
        out.seek(0)
        return Outcome(code, out.read(), "".join(err), changed)


# The tests

CASES = [
    pytest.param(case, id=f"{area}: {case.given}")
    for area, cases in TABLE.items()
    for case in cases
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = tmp_path_factory.mktemp("bad") / "models"
    save_models(made)
    return made


def fits(says: str, text: str) -> bool:
    """Whether the text is this one, with any text for each … in it."""
    return re.fullmatch(".*".join(map(re.escape, says.split("…"))), text) is not None


@pytest.mark.parametrize("case", CASES)
def test_it_is_said_in_one_line_and_leaves_nothing(case, tmp_path, models):
    found = outcome(case, tmp_path, models)
    assert found.code == case.code
    if case.code:
        assert found.changed == []
        message = our_line(found.err)
        assert message.isprintable()
        assert fits(case.says, message), message
    else:
        assert any(fits(case.says, line) for line in found.out.splitlines()), found.out
        outside = [x for x in found.changed if not f"{x}/".startswith("deep/work/runs/")]
        assert outside in ([], ["deep/work"])  # whose time is another, since runs is new in it


def test_the_scripts_themselves_say_it(tmp_path, models):
    started = []
    for i, case in enumerate(case for cases in TABLE.values() for case in cases):
        if case.given in SUBPROCESSES:
            base = tmp_path / str(i)
            with prepared(case, base, models):
                name, *arguments = shlex.split(case.command)
                process = subprocess.Popen(
                    [sys.executable, EXAMPLES / f"{name}.py", *arguments],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    encoding="utf-8",
                    env=os.environ | {"HF_HUB_OFFLINE": "1"},
                )
            started.append((case, base, listing(base), process))
    assert len(started) == len(SUBPROCESSES)
    for case, base, before, process in started:
        out, err = process.communicate("y\n" * 99, timeout=120)
        assert process.returncode == 2
        assert fits(case.says, our_line(err)), err
        assert listing(base) == before, out


def test_the_table_is_large_and_names_each_case_once():
    for cases in TABLE.values():
        assert len({case.given for case in cases}) == len(cases)
    assert len(CASES) >= 60


def markdown(given: str, message: str) -> str:
    return f"| {given} | `{message.replace('|', chr(92) + '|')}` |"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "models"
        save_models(models)
        for area, cases in TABLE.items():
            print(f"\n## {area}\n\n| input | message |\n|---|---|")
            for i, case in enumerate(cases):
                try:
                    found = outcome(case, Path(folder) / area / str(i), models)
                except pytest.skip.Exception as reason:
                    print(f"| {case.given} | not tried: {reason} |")
                    continue
                lines = [f"error: {our_line(found.err)}"] if case.code else found.out.splitlines()
                shown = next(line for line in lines if case.code or fits(case.says, line))
                shown = re.sub(rf"{re.escape(folder)}/\S*/", "", shown)  # of this run alone
                print(markdown(case.given, shown.strip()))


if __name__ == "__main__":
    main()
