"""Damaged and odd input by the thousand: whatever is read, nothing but BadInput may come out.

    python tests/tools/fuzz.py --examples 10000 --seed 0

Prints for each reader how many inputs it took and how many it refused. An input that gets anything
else out of a reader is shrunk to its smallest form and shown, and the exit code is not 0.
"""

import argparse
import contextlib
import copy
import csv
import io
import json
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from logging import CRITICAL
from pathlib import Path
from typing import Any, get_args

import find_helpers  # noqa: F401
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from small import bert, bert_syllables, gpt2, syllables
from transformers.utils import logging as transformers_logging

from rlhf_min import sft
from rlhf_min.data import SFTExample
from rlhf_min.encoding.codec import Codec
from rlhf_min.encoding.conversation import Conversation
from rlhf_min.encoding.cuts import CutReport
from rlhf_min.encoding.template import CHAT
from rlhf_min.errors import BadInput
from rlhf_min.harness.rows.columns import SAMPLING, Stage, parse_columns
from rlhf_min.harness.rows.load import load_rows
from rlhf_min.harness.run import checkpoint
from rlhf_min.harness.run.checkpoint import Snapshot
from rlhf_min.harness.run.folder import recorded, run_seed
from rlhf_min.harness.run.saved_models import save_policy, save_reward_model
from rlhf_min.policy import Policy
from rlhf_min.reward_model import RewardModel
from rlhf_min.sft import SFTConfig

# A reader takes the drawn value in an empty folder, the working one, and raises BadInput or not.
Reader = Callable[[Any], None]


@dataclass(frozen=True)
class Target:
    """What is fuzzed: where inputs come from, what reads them, and its share of all examples."""

    inputs: SearchStrategy[Any]
    read: Reader
    share: float


# What inputs are made of

SUFFIXES = st.sampled_from([".csv", ".json", ".jsonl", ".parquet"])
NAMES = st.sampled_from(
    "prompt question response chosen rejected messages input margin label".split()
)
ODD_TEXTS = st.sampled_from(
    "\0 \ud800 \udfff \u200b \u0301 \u202e \x1b[2J \ufeff <eos> <pad> {prompt} {{x}} ../../x".split(
        " "
    )
) | st.sampled_from(["", " ", "\u2028", "\n\nHuman: a\n\nAssistant: b", "ba be"])
TEXTS = ODD_TEXTS | st.text(st.characters(), max_size=8) | st.lists(ODD_TEXTS).map("".join)
# None is between what is too small for anything and what is too large: that would only take long.
NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 7, 2**63, 10**30, 0.5, -0.0, 1e308])
NUMBERS |= st.sampled_from([float("nan"), float("inf")])
LEAVES = st.one_of(TEXTS, NUMBERS, st.none(), st.booleans())
VALUES = st.recursive(
    LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXTS | NAMES, x, max_size=3)
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "", None]), "content": VALUES}
    ),
    max_size=3,
)
CELLS = TEXTS | VALUES | MESSAGES
ROWS = st.lists(
    st.fixed_dictionaries({"prompt": CELLS, "chosen": CELLS}, optional={"rejected": CELLS})
    | st.fixed_dictionaries({"messages": MESSAGES}, optional={"margin": VALUES})
    | st.dictionaries(NAMES | TEXTS, CELLS, max_size=5),
    max_size=4,
)


@st.composite
def damaged(draw: DrawFn, whole: bytes) -> bytes:
    """The bytes with some of them replaced, taken out, put in or cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        stop = start + draw(st.integers(0, 8))
        data[start:stop] = draw(st.binary(max_size=8))
    return bytes(data[: draw(st.none() | st.integers(0, len(data)))])


@st.composite
def changed(draw: DrawFn, document: Any) -> Any:
    """The JSON document with a value somewhere in it replaced or removed."""
    place = document = copy.deepcopy(document)
    while place:
        key = draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
            place = place[key]
        elif draw(st.integers(0, 3)):
            place[key] = draw(VALUES)
            break
        else:
            del place[key]
            break
    return document


CLEAN = TEXTS.map(lambda text: text.encode("utf-8", "ignore").decode("utf-8"))
TALK = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": CLEAN}),
    max_size=3,
)
# Of each column of a Parquet file one type.
OTHERS = st.sampled_from([st.floats(), st.integers(0, 9), st.binary(), st.booleans(), st.none()])
COLUMN = (
    st.sampled_from([CLEAN, CLEAN | st.none(), TALK, st.lists(CLEAN, max_size=2)]) | OTHERS
).flatmap(lambda values: st.lists(values, min_size=2, max_size=2))


@st.composite
def tables(draw: DrawFn, suffix: str) -> bytes:
    """Rows as a sound file of this ending would hold them."""
    if suffix == ".parquet":
        buffer = io.BytesIO()
        pq.write_table(pa.table(draw(st.dictionaries(NAMES, COLUMN, min_size=1))), buffer)
        return buffer.getvalue()
    if suffix == ".csv":
        text = io.StringIO()
        table = draw(st.lists(st.lists(NAMES | TEXTS, min_size=2, max_size=2), min_size=1))
        csv.writer(text).writerows([["prompt", draw(NAMES)], *table])
        return text.getvalue().encode("utf-8", "surrogatepass")
    rows = draw(ROWS)
    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8")
    return json.dumps({"data": rows} if draw(st.booleans()) else rows).encode("utf-8")


@st.composite
def data_files(draw: DrawFn) -> tuple[str, bytes]:
    """A known ending, and bytes: any, those of rows, or those damaged."""
    suffix, kind = draw(SUFFIXES), draw(st.integers(0, 5))
    if kind == 0:
        return suffix, draw(st.binary(max_size=80) | CLEAN.map(str.encode))
    whole = draw(tables(suffix))
    return suffix, draw(damaged(whole)) if kind == 1 else whole


def one_line(message: str) -> None:
    """Whatever names and texts are in it."""
    assert message.isprintable()


def read_data(given: tuple[str, bytes]) -> None:
    """All stages read the file; the rows that they keep are counted, and are texts."""
    suffix, data = given
    path = f"a{suffix}"
    Path(path).write_bytes(data)
    refused = 0
    for stage in get_args(Stage):
        try:
            loaded = load_rows(path, stage)
        except BadInput as error:
            one_line(str(error))
            refused += 1
            continue
        assert len(loaded.rows) + sum(map(len, loaded.dropped.values())) == loaded.rows_read > 0
        one_line(loaded.report())
        codec = tiny_codec("{prompt}\n")
        for row in loaded.rows:
            codec.encode_prompt(row["prompt"], CutReport())
            if stage not in SAMPLING:  # whose further columns may be anything
                for name in {"response", "chosen", "rejected"} & row.keys():
                    codec.encode_response(row[name], CutReport())
    if refused == len(get_args(Stage)):
        raise BadInput("no stage can use it")


# Texts

CHAT_TEMPLATES = st.sampled_from(
    [
        "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[7].content }}",
        "{{ 1 / 0 }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ raise_exception('no') }}",
        "{% for %}",
        "{{ messages|tojson }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ]
)
CONVERSATIONS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "x"]), "content": TEXTS}),
    min_size=1,
    max_size=3,
).map(Conversation)


def tiny_codec(template: str, *, chat_template: str | None = None) -> Codec:
    """With five tokens of room on either side."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template
    return Codec(tokenizer, 5, 5, template)


@cache
def tiny_tokenizer() -> Any:
    return syllables()


def read_text(given: tuple[str, str, str, str]) -> None:
    """A prompt and a response become ids, within their room."""
    prompt, response, template, chat_template = given
    codec = tiny_codec(template, chat_template=chat_template)
    report = CutReport()
    assert 1 <= len(codec.encode_prompt(prompt, report)) <= 5
    assert 1 <= len(codec.encode_response(response, report)) <= 5
    assert report.prompts == report.responses == 1


def read_columns(given: str) -> None:
    """What --columns says."""
    assert all(parse_columns(given).items())


# Folders


@cache
def kept() -> tempfile.TemporaryDirectory[str]:
    """Where sound folders lie until Python ends."""
    return tempfile.TemporaryDirectory()


@cache
def saved_policy() -> Path:
    """A sound folder, made once."""
    folder = Path(kept().name) / "policy"
    save_policy(Policy(gpt2(), syllables(), critic="shared"), folder)
    (folder / "model.pt").unlink()  # which is not read again
    return folder


@cache
def saved_reward_model() -> Path:
    """The same of a classifier."""
    folder = Path(kept().name) / "reward_model"
    save_reward_model(RewardModel(bert(), bert_syllables()), folder)
    (folder / "model.pt").unlink()
    return folder


@st.composite
def in_place(draw: DrawFn, folder: Callable[[], Path]) -> tuple[str, bytes | None]:
    """One file of a sound folder, and what stands in it instead, or None for nothing."""
    name = draw(st.sampled_from(sorted(path.name for path in folder().iterdir())))
    whole = (folder() / name).read_bytes()
    if name.endswith(".json") and draw(st.integers(0, 3)):
        return name, json.dumps(draw(changed(json.loads(whole)))).encode("utf-8")
    return name, draw(damaged(whole) | st.binary(max_size=40) | st.none())


def in_folder(sound: Callable[[], Path], read: Callable[[str], None]) -> Reader:
    """A reader of a sound folder in which one file is another."""

    def read_changed(given: tuple[str, bytes | None]) -> None:
        name, data = given
        folder = Path(shutil.copytree(sound(), "folder"))
        (folder / name).unlink()
        if data is not None:
            (folder / name).write_bytes(data)
        read("folder")

    return read_changed


def read_policy(folder: str) -> None:
    """What is loaded computes, and can be saved."""
    policy = Policy.from_pretrained(folder, critic="shared", new_head=True)
    codec = Codec(policy.tokenizer, 5, 5)
    codec.encode_prompt("ba be", CutReport())
    save_policy(policy, Path("again"))


def read_reward_model(folder: str) -> None:
    """What is loaded scores, and can be saved."""
    reward_model = RewardModel.from_pretrained(folder)
    reward_model.score(["ba be"], ["bi"])
    save_reward_model(reward_model, Path("again"))


@cache
def stage() -> Snapshot:
    """Of SFT after its first step."""
    policy, config = Policy(gpt2(), syllables()), SFTConfig(epochs=2, batch_size=2)
    examples = [SFTExample(torch.tensor([3, 4]), torch.tensor([5 + i, 1])) for i in range(4)]
    state = sft.new_state(policy, examples, config)
    next(sft.train(policy, config, state))
    return Snapshot(
        "sft",
        policy,
        state,
        partial(save_policy, policy),
        models={"policy": policy},
        texts=["ba be", "bi"],
        examples=examples,
        total=4,
    )


@cache
def saved_stage() -> Path:
    """Its checkpoint."""
    folder = Path(kept().name) / "step-000001"
    checkpoint.begin(folder, stage(), finished=False, sizes={"metrics.jsonl": 9})()
    return folder


def read_checkpoint(given: tuple[str, bytes | None, bool]) -> None:
    """One file is another, whose size and sum the record may have."""
    name, data, recorded = given
    folder = Path(shutil.copytree(saved_stage(), "step-000001"))
    (folder / name).unlink()
    if data is not None:
        (folder / name).write_bytes(data)
    if recorded and data is not None:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads((folder / checkpoint.RECORD).read_text(encoding="utf-8"))
            if name != checkpoint.RECORD:
                record["files"][name] = [len(data), zlib.crc32(data)]
            if isinstance(record, dict):
                record.pop("crc32", None)
                record["crc32"] = checkpoint.crc32_of(record)
            (folder / checkpoint.RECORD).write_text(json.dumps(record), encoding="utf-8")
    checkpoint.Checkpoint(folder).restore(stage())


def read_run(given: bytes) -> None:
    """What a run was started with, and its seed."""
    Path("run.json").write_bytes(given)
    run_seed(Path())
    recorded(SFTConfig, {"epochs"}, Path())


RUN = {"config": {"SFTConfig": asdict(SFTConfig())}, "versions": {}, "threads": 1}

# Each takes a few lines: where inputs come from, what reads them, its share of the examples.
TARGETS = {
    "data files": Target(data_files(), read_data, 0.54),
    "texts": Target(
        st.tuples(
            TEXTS | CONVERSATIONS,
            TEXTS,
            st.sampled_from([*["{prompt}\n", "{prompt}"] * 3, *[CHAT] * 3, "\ud800{prompt}", "x"]),
            CHAT_TEMPLATES,
        ),
        read_text,
        0.2,
    ),
    "columns": Target(
        st.lists(st.tuples(NAMES, NAMES | TEXTS).map("=".join), max_size=2).map(",".join) | TEXTS,
        read_columns,
        0.04,
    ),
    "policies": Target(in_place(saved_policy), in_folder(saved_policy, read_policy), 0.06),
    "reward models": Target(
        in_place(saved_reward_model), in_folder(saved_reward_model, read_reward_model), 0.06
    ),
    "checkpoints": Target(
        st.tuples(in_place(saved_stage), st.booleans()).map(lambda x: (*x[0], x[1])),
        read_checkpoint,
        0.06,
    ),
    "run.json": Target(
        changed(RUN).map(lambda x: json.dumps(x).encode()) | damaged(json.dumps(RUN).encode()),
        read_run,
        0.04,
    ),
}


def fuzz(target: Target, examples: int, *, number: int | None = None) -> Counter[str]:
    """How many of so many inputs were accepted and how many refused.

    Args:
        number: the seed; None for the same inputs each time.
    """
    counts: Counter[str] = Counter()

    @settings(
        max_examples=examples,
        derandomize=number is None,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs)
    def check(value: Any) -> None:
        before = Path.cwd()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                target.read(value)
                counts["accepted"] += 1
            except BadInput as error:
                one_line(str(error))
                counts["refused"] += 1
            finally:
                os.chdir(before)

    (check if number is None else seed(number)(check))()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=10_000, help="Of all targets together.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=TARGETS, help="Only this one.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.set_verbosity(CRITICAL)
    transformers_logging.disable_progress_bar()
    print(f"{'reader':<16}{'inputs':>8}{'accepted':>10}{'refused':>9}{'seconds':>9}")
    for name, target in TARGETS.items():
        if options.target not in (None, name):
            continue
        started = time.perf_counter()
        examples = round(options.examples * (1 if options.target else target.share))
        counts = fuzz(target, examples, number=options.seed)
        print(
            f"{name:<16}{counts.total():>8}{counts['accepted']:>10}{counts['refused']:>9}"
            f"{time.perf_counter() - started:>9.1f}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
