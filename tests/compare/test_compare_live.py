"""Whole comparisons with trl 1.12.0 on tiny models: what the first two lines say of a fault that
was put into trl's side, and how far both are apart once our side follows it."""

import contextlib
import io
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pytest
import torch
from compare import live
from compare.command import parse_options
from compare.job import Job, Record
from compare.ours.stages import Setup
from compare.theirs.__main__ import run as run_theirs
from compare.theirs.float64 import isolated
from compare.theirs.script import run as run_script
from small import SYLLABLES, bert, bert_syllables, gpt2, gpt2_classifier, syllables
from tolerances import FP32, FP64, LEGACY_STEP

from rlhf_min.config import DPOConfig

pytest.importorskip("trl", reason="needs trl", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore")  # of trl to transformers

Rows = list[dict[str, Any]]

RATE = "1e-3"
WEIGHTS = LEGACY_STEP  # Adam divides a zero gradient's rounding by 1e-8 here too
CHAT = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"  # says nothing of EOS


def pairs(n: int = 10) -> list[dict[str, str]]:
    """Random texts of unequal lengths. Prompts end in the space that trl joins them by."""
    rng = random.Random(5)
    return [
        {
            "prompt": _text(rng, 5) + " ",
            "chosen": "bu " + _text(rng, 6),
            "rejected": "ka " + _text(rng, 6),
        }
        for _ in range(n)
    ]


def _text(rng: random.Random, longest: int) -> str:
    return " ".join(rng.choices(SYLLABLES, k=rng.randint(1, longest)))


def demonstrations(n: int = 10) -> list[dict[str, str]]:
    return [{"prompt": row["prompt"], "response": row["chosen"]} for row in pairs(n)]


class Left(BaseException):
    """In the place of the end of trl's process, in the middle of a script."""


def leave() -> NoReturn:
    raise Left


@pytest.fixture
def _in_process(monkeypatch):
    """trl's side without a process of its own, which takes seconds to start."""

    def run(job: Job, folder: Path, _python: str) -> Record:
        with isolated(), contextlib.redirect_stdout(io.StringIO()):
            if job.script is None:
                run_theirs(job, folder)
            else:
                with contextlib.suppress(Left):
                    run_script(job, folder, leave)
        return Record.load(folder)

    monkeypatch.setattr(live.start, "run", run)
    monkeypatch.setattr(
        live.start, "probe", lambda _: {"trl": "1.12.0", "transformers": "5", "torch": "2"}
    )


class Beside:
    """Compares, and remembers what was printed and what trl's side was."""

    def __init__(self, folder: Path, capsys) -> None:
        self.folder, self.capsys = folder, capsys

    def model(self, kind: str, *, dropout: float = 0.0, chat: bool = False) -> str:
        model, tokenizer = {
            "gpt2": lambda: (gpt2(1, vocabulary=28, dropout=dropout), syllables()),
            "classifier": lambda: (gpt2_classifier(1), syllables()),
            "bert": lambda: (bert(1, dropout=dropout), bert_syllables()),
        }[kind]()
        if kind == "classifier":
            tokenizer.model_input_names = ["input_ids", "attention_mask"]
        if chat:
            tokenizer.chat_template = CHAT
        folder = self.folder / "model"
        model.float().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    def rows(self, name: str, rows) -> str:
        file = self.folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(file)

    def __call__(self, stage: str, model: str, rows, *more: str, float64: bool = True) -> str:
        arguments = ["--stage", stage, "--model", model, "--data", self.rows("rows", rows)]
        arguments += ["--steps", "3", "--learning_rate", RATE, "--float64"][: 5 if float64 else 4]
        return self.compared([*arguments, *more])

    def script(self, text: str, *more: str) -> str:
        """Of a script of the user's."""
        file = self.folder / "script.py"
        file.write_text(text, encoding="utf-8")
        return self.compared(["--trl_script", str(file), "--steps", "3", *more])

    def compared(self, arguments: list[str]) -> str:
        out = self.folder / "out"
        options = parse_options("", [*arguments, "--out", str(out)])
        work = self.folder / "work"
        work.mkdir(exist_ok=True)
        self.explained = live.compare(options, work)
        self.found = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
        return self.capsys.readouterr().out

    @property
    def loss_gap(self) -> float:
        steps = zip(self.found["followed"], self.found["trl"]["steps"], strict=True)
        return max(abs(ours["loss"] - theirs["loss"]) for ours, theirs in steps)

    @property
    def causes(self) -> list[str]:
        return [followed["name"] for followed in self.found["explanation"]["followed"]]


@pytest.fixture
def beside(tmp_path, capsys, _in_process):
    return Beside(tmp_path, capsys)


def head(text: str) -> str:
    """What nobody overlooks: the first two lines."""
    return "\n".join(text.splitlines()[:2])


def test_runs_that_are_the_same_agree(beside):
    said = beside("dpo", beside.model("gpt2"), pairs(), "--beta", "0.3", "--batch_size", "4")
    assert head(said).startswith("They agree: ")
    assert beside.explained
    assert beside.loss_gap <= FP64
    assert beside.found["weights"]["size"] <= WEIGHTS


def swapped(rows):
    return [
        {**r, "chosen": r["rejected"], "rejected": r["chosen"]} if i == 3 else r
        for i, r in enumerate(rows)
    ]


def templated(rows):
    return [{**row, "prompt": "gi " + row["prompt"]} for row in rows]


def conversations(rows):
    def turn(role, text):
        return [{"role": role, "content": text.strip()}]

    return [
        {
            "prompt": turn("user", row["prompt"]),
            "chosen": turn("assistant", row["chosen"]),
            "rejected": turn("assistant", row["rejected"]),
        }
        for row in rows
    ]


class Fault(NamedTuple):
    """Something that is wrong on trl's side.

    `model` is a kind of `Beside.model`, `options` are of the command, `other_rows` makes trl's rows
    of ours, and `says` stands in the first two lines.
    """

    says: str
    options: tuple[str, ...] = ()
    stage: str = "dpo"
    model: dict[str, Any] = {"kind": "gpt2"}  # noqa: RUF012  # never changed
    other_rows: Callable[[Rows], Rows] | None = None
    rows: Callable[[Rows], Rows] = list


FAULTS = {
    "wrong beta": Fault("beta is 0.3 in trl and 0.1 here", ("--beta", "0.1", "--trl", "beta=0.3")),
    "beta, not told here": Fault("beta is 0.3 in trl and 0.1 here", ("--trl", "beta=0.3")),
    "swapped pair": Fault("row 4: chosen and rejected are swapped", other_rows=swapped),
    "other pad": Fault(
        "trl pads with id 1, and here it is 0",
        ("--trl", "pad_token=<eos>"),
        stage="reward",
        model={"kind": "classifier"},
    ),
    "dropout on": Fault(
        "dropout is 0.1 in trl",
        ("--trl", "disable_dropout=False"),
        model={"kind": "gpt2", "dropout": 0.1},
    ),
    "truncation": Fault("trl cuts the text to", ("--trl", "max_length=8")),
    "other seed": Fault("seed is 2 in trl and 1 here", ("--seed", "1", "--trl", "seed=2")),
    "label smoothing": Fault("ignores label_smoothing", ("--label_smoothing", "0.2")),
    "left-out EOS": Fault(
        "ends without EOS in trl, here with it",
        model={"kind": "gpt2", "chat": True},
        rows=conversations,
    ),
    "other template": Fault("the prompt reads 'gi", other_rows=templated),
    "accumulation": Fault(
        "a step of trl has 8 rows (4 in a micro-batch, 2 accumulated), here 4",
        ("--trl", "gradient_accumulation_steps=2"),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_trls_side_is_named_by_the_first_two_lines(name, beside):
    fault = FAULTS[name]
    more = ["--batch_size", "4", *fault.options]
    if fault.other_rows is not None:
        more += ["--trl_data", beside.rows("other", fault.other_rows(pairs()))]
    said = beside(fault.stage, beside.model(**fault.model), fault.rows(pairs()), *more)
    assert head(said).startswith("They differ from step ")
    assert fault.says in head(said)
    assert "nothing else differs" in head(said)
    assert beside.loss_gap <= FP64
    assert beside.found["weights"]["size"] <= WEIGHTS
    [first, *_] = beside.found["explanation"]["followed"]
    before = abs(first["before"]["ours"] - first["before"]["theirs"])
    assert before > 1e-4  # it was worth naming


def test_two_faults_are_both_named(beside):
    more = [
        "--beta",
        "0.1",
        "--trl_data",
        beside.rows("other", swapped(pairs())),
        "--trl",
        "beta=0.3",
    ]
    said = beside("dpo", beside.model("gpt2"), pairs(), "--batch_size", "4", *more)
    assert set(beside.causes) == {"beta", "swapped pair"}
    assert beside.explained
    assert beside.loss_gap <= FP64
    assert "beta is 0.3 in trl" in head(said)
    assert "are swapped" in head(said)


def test_an_option_that_nothing_here_follows_is_told(beside):
    said = beside(
        "dpo", beside.model("gpt2"), pairs(), "--batch_size", "4", "--trl", "loss_type=nca_pair"
    )
    assert "loss_type is ['nca_pair'] in trl, which is not here" in head(said)
    assert not beside.explained


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (["loss_type=hinge"], "the loss is hinge in trl and sigmoid here"),
        (["loss_type=robust", "label_smoothing=0.2"], "the loss is robust in trl and sigmoid here"),
    ],
)
def test_another_loss_of_pairs_is_followed(beside, loss, told):
    said = beside("dpo", beside.model("gpt2"), pairs(), "--batch_size", "4", "--trl", *loss)
    assert told in head(said)
    assert beside.explained


@pytest.mark.parametrize("stage", ["dpo", "reward"])
def test_micro_batches_of_unequal_size_weigh_alike_in_trl(stage, beside):
    model = beside.model("gpt2" if stage == "dpo" else "classifier")
    more = ["--trl", "per_device_train_batch_size=2", "gradient_accumulation_steps=2"]
    beside(stage, model, pairs(11), "--batch_size", "4", *more)
    assert "mean of micro-batch means" in beside.causes
    assert beside.explained
    assert beside.found["weights"]["size"] <= WEIGHTS


def test_a_bert_is_not_told_its_segments_by_trl(beside):
    said = beside("reward", beside.model("bert", dropout=0.1), pairs(), "--batch_size", "4")
    assert set(beside.causes) == {"segments", "dropout"}
    assert "trl's rows: ids of prompt and response as two segments, as trl needs an EOS.\n" in said
    assert "trl does not tell BERT which tokens are the response's" in head(said)
    assert beside.explained
    assert beside.found["weights"]["size"] <= WEIGHTS


def test_sft_on_the_prompt_too(beside):
    more = ["--batch_size", "4", "--trl", "completion_only_loss=False"]
    said = beside("sft", beside.model("gpt2"), demonstrations(), *more)
    assert "trl trains on the prompt too" in head(said)
    assert set(beside.causes) == {"prompt trained on", "first token counted"}
    assert beside.loss_gap <= FP64


def test_sft_with_dropout_on_both_sides_is_compared_without(beside):
    said = beside("sft", beside.model("gpt2", dropout=0.1), demonstrations(), "--batch_size", "4")
    assert beside.causes == ["dropout"]
    assert "so that its numbers are random" in head(said)
    assert beside.loss_gap <= FP64


def test_half_precision_is_left_by_trl(beside):
    arguments = ("--batch_size", "4", "--trl", "bf16=True")
    said = beside("dpo", beside.model("gpt2"), pairs(), *arguments, float64=False)
    assert "trl computes in bf16, here in fp32" in head(said)
    assert beside.causes == ["half precision"]
    assert beside.explained


def test_half_precision_is_not_blamed_for_what_else_differs(beside):
    arguments = ("--batch_size", "4", "--seed", "1", "--trl", "bf16=True", "seed=2")
    said = beside("sft", beside.model("gpt2"), demonstrations(), *arguments, float64=False)
    assert beside.causes == ["seed", "half precision"]
    assert "here): seed is 2 in trl and 1 here; trl computes in bf16" in head(said)
    _, half = beside.found["explanation"]["followed"]
    assert abs(half["before"]["ours"] - half["before"]["theirs"]) < 0.05
    assert beside.explained


def test_a_row_that_trl_drops_changes_the_order(beside):
    rows = pairs()
    rows[2] = {**rows[2], "prompt": "ba " * 12}
    said = beside(*("dpo", beside.model("gpt2"), rows, "--batch_size", "4", "--max_length", "12"))
    assert "trl leaves out row 3 (the prompt alone has max_length=12 tokens or more)" in said
    assert beside.explained


def test_rows_that_fill_the_positions_are_compared_though_each_side_cuts_them_elsewhere(beside):
    # trl keeps 50 tokens of the prompt and 14 of the response, ours 32 of each: trl's prompt with
    # our response, which is what is left when one cause is not followed, has no room.
    rows = pairs()
    rows[3] = {"prompt": "ba " * 50, "chosen": "bi " * 40, "rejected": "bo " * 40}
    said = beside("dpo", beside.model("gpt2"), rows, "--batch_size", "4", "--max_length", "64")
    assert {"cut", "cut prompt"} <= set(beside.causes)
    assert beside.explained, said
    assert beside.loss_gap <= FP64


def test_in_float32_the_losses_agree_to_1e_5(beside):
    beside("dpo", beside.model("gpt2"), pairs(), "--batch_size", "4", float64=False)
    assert beside.explained
    assert 0 < beside.loss_gap <= FP32


SCRIPT = """
import sys
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

folder = {folder!r}
model = AutoModelForCausalLM.from_pretrained(folder + "/model")
rows = load_dataset("json", data_files=folder + "/rows.jsonl", split="train").shuffle(seed=3)
args = DPOConfig(
    output_dir=folder + "/trl", use_cpu=True, bf16=False, learning_rate=1e-3, report_to="none",
    per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=50, {options}
)
trainer = DPOTrainer(
    model=model, {more}
    args=args, processing_class=AutoTokenizer.from_pretrained(folder + "/model"), train_dataset=rows
)
trainer.train()
raise SystemExit("what stands behind train() must not happen")
"""


def scripted(
    beside, options: str = "", more: str = "", rows: Rows | None = None, change: Any = ("", "")
) -> str:
    beside.model("gpt2")
    beside.rows("rows", pairs() if rows is None else rows)
    text = SCRIPT.format(folder=str(beside.folder), options=options, more=more)
    return beside.script(text.replace(*change), "--float64")


def test_a_script_is_compared_on_its_own_rows_and_options(beside):
    said = scripted(beside, "beta=0.3")
    assert head(said).startswith("They agree: ")
    assert beside.found["weights"]["size"] <= WEIGHTS
    assert beside.found["trl"]["options"]["beta"] == 0.3


def test_a_scripts_label_smoothing_is_ignored_by_its_loss(beside):
    said = scripted(beside, "label_smoothing=0.2")
    assert "trl's loss 'sigmoid' ignores label_smoothing, here it is heeded: 0.2" in head(said)
    assert beside.explained


def test_a_scripts_reference_may_be_another_model(beside):
    gpt2(2, vocabulary=28).float().save_pretrained(beside.folder / "other")
    other = 'ref_model=AutoModelForCausalLM.from_pretrained(folder + "/other"),'
    said = scripted(beside, more=other)
    assert "the reference is another model in trl" in head(said)
    assert beside.explained
    assert abs(beside.found["trl"]["steps"][0]["margin"]) > 1e-3


def test_a_script_whose_rows_stream_is_compared_on_trls_ids(beside):
    stream = ("train_dataset=rows", "train_dataset=rows.to_iterable_dataset()")
    said = scripted(beside, "max_steps=6", rows=pairs(12), change=stream)
    assert head(said).startswith("They agree: ")
    said = scripted(beside, "max_steps=6", change=stream)  # of 10 rows 2 are left over
    assert "in step 3 trl adds micro-batches up with the weights 1, 0.5, 0.5" in head(said)


def test_the_option_that_makes_another_order_is_named(beside):
    said = scripted(beside, "data_seed=7")
    assert "step 1 of trl has rows" in head(said)
    assert "(data_seed=7)" in head(said)
    assert beside.causes == ["order"]
    assert beside.explained


def test_a_scripts_repeated_row_is_left_out_here(beside):
    rows = pairs()
    said = scripted(beside, rows=[*rows, rows[4]])
    assert "left out here (duplicate of an earlier row)" in head(said)
    assert beside.explained


def test_a_pair_whose_prompt_is_cut_for_one_response_alone_is_told(beside):
    said = scripted(beside, "truncation_mode='keep_end', max_length=6")
    assert "trl cuts all of a prompt, or more for one of the responses" in said
    assert not beside.explained


# What a script brings of its own: where trl's side is changed, and what is said of it.
TORCH = ("import sys", "import torch")
FROZEN = ("rows = load", "model.transformer.wte.weight.requires_grad = False\nrows = load")
MINE = """
class Mine(DPOTrainer):
    def compute_loss(self, *args, **more):
        return 2 * super().compute_loss(*args, **more)

trainer = Mine("""
ADAMW = "optimizers=(torch.optim.AdamW(model.parameters(), 2e-3, (.8, .9), weight_decay=0.0), None)"
SGD = "optimizers=(torch.optim.SGD(model.parameters(), 1e-2), None)"
OWN = {
    "frozen": (FROZEN, "", "does not train transformer.wte.weight", {"frozen weights"}),
    "subclass": (("trainer = DPOTrainer(", MINE), "", "with Mine, a DPOTrainer", None),
    "betas": (TORCH, ADAMW, "AdamW's betas are (0.8, 0.9) in trl", {"betas"}),
    "optimizer": (TORCH, SGD, "the script brings SGD, here it is AdamW", None),
    "schedule": (
        (
            "bf16=False,",
            "bf16=False, lr_scheduler_type='cosine', lr_scheduler_kwargs={'num_cycles': 2},",
        ),
        *("", "lr_scheduler_kwargs is {'num_cycles': 2} in trl", None),
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_what_a_script_brings_of_its_own_is_told(name, beside):
    """And followed, where causes are named."""
    change, more, says, causes = OWN[name]
    said = scripted(beside, more=f"{more}," if more else "", change=change)
    assert says in head(said)
    assert beside.explained == (causes is not None)
    assert set(beside.causes) == (causes or set())
    assert causes is None or beside.found["weights"]["size"] <= WEIGHTS


SFT_SCRIPT = """
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

args = SFTConfig(
    {folder!r} + "/trl", use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=4,
    learning_rate=1e-3,
)
rows = load_dataset("json", data_files={folder!r} + "/rows.jsonl", split="train")
SFTTrainer({folder!r} + "/model", args, train_dataset=rows).train()
"""


def test_a_script_whose_columns_are_not_ours_is_compared_on_trls_ids(beside):
    beside.model("gpt2")
    beside.rows("rows", [{"text": row["prompt"] + row["chosen"]} for row in pairs()])
    said = beside.script(SFT_SCRIPT.format(folder=str(beside.folder)), "--float64")
    assert "texts are not compared: the dataset: SFT needs the columns prompt, response" in said
    assert beside.causes == ["first token counted"]
    assert beside.explained
    assert beside.found["weights"]["size"] <= WEIGHTS


REWARD_SCRIPT = """
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

RewardTrainer(
    AutoModelForSequenceClassification.from_pretrained({folder!r} + "/model", num_labels=1),
    RewardConfig({folder!r} + "/trl", use_cpu=True, report_to="none", learning_rate=1e-2),
    train_dataset=load_dataset("json", data_files={folder!r} + "/rows.jsonl", split="train"),
    processing_class=AutoTokenizer.from_pretrained({folder!r} + "/model"),
).train()
"""


def test_a_new_head_is_the_same_when_the_script_runs_once_more(beside, monkeypatch):
    beside.model("gpt2")
    beside.rows("rows", pairs())
    run, seeds = live.start.run, iter(range(1, 9))

    def unseeded(*arguments):
        torch.manual_seed(next(seeds))  # each process has other random numbers
        return run(*arguments)

    monkeypatch.setattr(live.start, "run", unseeded)
    beside.script(REWARD_SCRIPT.format(folder=str(beside.folder)))
    assert beside.causes == ["half precision"]  # for which it has run twice
    assert beside.explained


def test_packed_rows_are_not_taken_for_those_of_the_file(beside):
    beside.model("gpt2")
    beside.rows("rows", [{"prompt": r["prompt"], "completion": r["chosen"]} for r in pairs()])
    options = "learning_rate=1e-3, max_steps=3, packing=True, max_length=16,"
    text = SFT_SCRIPT.replace("learning_rate=1e-3,", options).format(folder=str(beside.folder))
    said = beside.script(text, "--float64")
    assert "packing is True in trl" in head(said)
    assert "texts are not compared: when trl trains, its rows are numbered in the order" in said
    assert beside.causes == []
    assert beside.explained


LEARNED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + ' ' }}{% endgeneration %}{% else %}{{ m['content'] + ' ' }}{% endif %}"
    "{% endfor %}"
)


def test_tokens_left_out_between_two_responses_are_told(beside, monkeypatch):
    monkeypatch.setitem(globals(), "CHAT", LEARNED)
    beside.model("gpt2", chat=True)
    turns = [("user", "ba be"), ("assistant", "bi"), ("user", "bo")]
    told = [{"role": role, "content": text} for role, text in turns]
    rows = [{"messages": [*told, {"role": "assistant", "content": r["chosen"]}]} for r in pairs()]
    beside.rows("rows", rows)
    text = SFT_SCRIPT.replace("learning_rate=1e-3,", "assistant_only_loss=True,")
    said = beside.script(text.format(folder=str(beside.folder)), "--float64")
    assert "assistant_only_loss is True in trl, which is not here; trl leaves tokens out" in said
    assert beside.causes == []  # no difference of tokens is made up


def test_what_only_the_weights_show_is_named(beside):
    more = ("--batch_size", "4", "--steps", "1", "--weight_decay", "0", "--trl", "weight_decay=0.1")
    said = beside("dpo", beside.model("gpt2"), pairs(), *more)
    assert "Only the weights differ, until this is followed: weight_decay is 0.1" in head(said)
    assert beside.explained
    assert beside.found["weights"]["size"] <= WEIGHTS


def test_micro_batches_have_the_sizes_that_they_had_in_trl():
    """Of 0.11 a step may begin with the one row that an epoch has left over."""
    setup = Setup(DPOConfig(), {}, 1, 2, batches=[[3, 1, 2], [4, 5]], micro_sizes=[[1, 2], [2]])
    assert setup.drawn() == [[[3], [1, 2]], [[4, 5]]]
    fewer = replace(setup, batches=[[3], [4, 5, 6]])
    assert fewer.drawn() == [[[3]], [[4, 5, 6]]]


def test_margins_of_trl_0_11_are_told(beside, monkeypatch):
    run = live.start.run

    def older(*arguments):
        record = run(*arguments)
        record.versions["trl"] = "0.11.3"
        return record

    monkeypatch.setattr(live.start, "run", older)
    rows = [{**row, "margin": 0.5} for row in pairs()]
    beside("reward", beside.model("classifier"), rows, "--batch_size", "4")
    [told] = beside.found["explanation"]["cannot"]
    assert "takes the margin of each pair of a micro-batch from all its pairs" in told
