"""What is recorded of trl's own trainers is what they did: rows, order, micro-batches, numbers."""

import json
import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compare.job import START, WEIGHTS, Job, Record
from compare.theirs import Refused, __main__, script, start
from compare.theirs.float64 import float64, isolated
from safetensors.torch import load_file
from small import SYLLABLES, bert, bert_syllables, gpt2, gpt2_classifier, shuffled, syllables, text
from tolerances import FP64
from torch import tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

trl = pytest.importorskip("trl", reason="needs trl", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore")  # of trl to transformers

N = 7
EOS = syllables().eos_token_id
# Prompts end in the space that trl joins them by; each row has other lengths than its neighbours.
PROMPTS = [text(range(i, 2 * i + 1)) + " " for i in range(N)]
GOOD = [text([20, *range(i % 4)]) for i in range(N)]
BAD = [text([21, *range(i % 3)]) for i in range(N)]
ROWS: dict[str, list[dict[str, Any]]] = {
    "sft": [{"prompt": p, "completion": c} for p, c in zip(PROMPTS, GOOD, strict=True)],
    "dpo": [
        {"prompt": p, "chosen": c, "rejected": r}
        for p, c, r in zip(PROMPTS, GOOD, BAD, strict=True)
    ],
}
ROWS["reward"] = ROWS["dpo"]
TWO_BY_TWO = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.fixture
def model(tmp_path: Path) -> Callable[[str], str]:
    """Makes the folder of a small model."""

    def make(kind: str, *, dropout: float = 0.0) -> str:
        models: dict[str, Any] = {
            "lm": lambda: gpt2(1, vocabulary=3 + len(SYLLABLES), dropout=dropout),
            "classifier": lambda: gpt2_classifier(1),
            "bert": lambda: bert(1),
        }
        folder = tmp_path / kind
        models[kind]().float().save_pretrained(folder)
        (bert_syllables() if kind == "bert" else syllables()).save_pretrained(folder)
        return str(folder)

    return make


def record(
    stage: Any, model: str, folder: Path, *, steps: int = 2, rows: Any = None, **job: Any
) -> Record:
    """Of a run of trl's, which went through the files as in a process of its own."""
    options = TWO_BY_TWO | job.pop("options", {})
    given = Job(stage, model, steps, rows or ROWS[stage], options, **job)
    folder.mkdir(exist_ok=True)
    with isolated():
        __main__.run(given, folder)
    return Record.load(folder)


def ids_of(words: str) -> list[int]:
    return [3 + SYLLABLES.index(word) for word in words.split()]


@torch.no_grad()
def response_logprob(lm: Any, prompt: list[int], response: list[int]) -> float:
    logits = lm(tensor([prompt + response])).logits[0].log_softmax(-1)
    return sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(response))


def test_sft_reads_prompt_and_response_with_eos_in_the_order_of_its_seed(model, tmp_path):
    folder = model("lm")
    found = record("sft", folder, tmp_path / "out", float64=True)
    order = shuffled(N, 42)
    assert found.batches == [[order[:2], order[2:4]], [order[4:6], order[6:]]]
    assert found.rows == {
        i: {"prompt_ids": ids_of(PROMPTS[i]), "response_ids": [*ids_of(GOOD[i]), EOS]}
        for i in order
    }
    assert (found.trainer, found.left_out) == ("SFTTrainer", {})
    assert found.facts["eos_id"] == EOS
    assert found.facts["dtype"] == "float64"
    lm = AutoModelForCausalLM.from_pretrained(folder).double()
    with float64():
        losses = [
            [sum(-response_logprob(lm, *found.rows[i].values()) for i in micro) for micro in step]
            for step in found.batches[:1]
        ]
    count = sum(len(found.rows[i]["response_ids"]) for i in order[:4])
    for theirs, ours in zip(found.facts["micro_losses"][0], losses[0], strict=True):
        assert abs(theirs - ours / count) < FP64
    assert abs(found.steps[0]["loss"] - sum(losses[0]) / count) < FP64
    assert found.logged[0]["num_tokens"] == sum(
        len(ids) for i in order[:4] for ids in found.rows[i].values()
    )


def test_the_second_epoch_has_an_order_of_its_own(model, tmp_path):
    found = record("dpo", model("lm"), tmp_path / "out", steps=3)
    again = shuffled(N, 43)
    assert found.batches[2] == [again[:2], again[2:4]]


def test_dpo_has_logprobs_of_these_ids_and_a_loss_of_these_micro_batches(model, tmp_path):
    folder = model("lm")
    found = record("dpo", folder, tmp_path / "out", float64=True)
    lm = AutoModelForCausalLM.from_pretrained(folder).double()
    rows = [i for micro in found.batches[0] for i in micro]
    for name in ("chosen", "rejected"):
        with float64():
            logprobs = [
                response_logprob(lm, found.rows[i]["prompt_ids"], found.rows[i][f"{name}_ids"])
                for i in rows
            ]
        assert abs(found.steps[0][f"{name}_logprobs"] - sum(logprobs) / 4) < FP64
    assert found.rows[rows[0]]["rejected_ids"] == [*ids_of(BAD[rows[0]]), EOS]
    assert found.facts["ref_is_start"] is True
    # The last group is of 2 and 1 rows: trl averages their means.
    assert [len(micro) for micro in found.batches[1]] == [2, 1]
    assert abs(found.steps[1]["loss"] - sum(found.facts["micro_losses"][1]) / 2) < FP64
    assert abs(found.steps[0]["loss"] - math.log(2)) < FP64
    assert found.steps[1]["loss"] != found.steps[0]["loss"]


def test_a_reward_model_reads_texts_with_eos(model, tmp_path):
    folder = model("classifier")
    rows = [row | {"margin": 0.1} for row in ROWS["reward"]]
    found = record("reward", folder, tmp_path / "out", rows=rows, float64=True)
    row = found.batches[0][0][0]
    assert found.rows[row]["chosen_ids"] == [*ids_of(PROMPTS[row] + GOOD[row]), EOS]
    scorer = AutoModelForSequenceClassification.from_pretrained(folder).double().eval()

    @torch.no_grad()
    def score(ids: list[int]) -> float:
        return float(scorer(tensor([ids])).logits[0, 0])

    for micro, theirs in zip(found.batches[0], found.facts["micro_losses"][0], strict=True):
        margins = [
            score(found.rows[i]["chosen_ids"]) - score(found.rows[i]["rejected_ids"]) - 0.1
            for i in micro
        ]
        assert abs(theirs + float(logsigmoid(tensor(margins, dtype=torch.float64)).mean())) < FP64


def test_bert_reads_ids_of_two_segments_and_is_not_told_of_them(model, tmp_path):
    found = record("reward", model("bert"), tmp_path / "out")
    row = found.batches[0][0][0]
    assert found.rows[row] == {
        f"{name}_ids": bert_syllables()(PROMPTS[row], side[row])["input_ids"]
        for name, side in (("chosen", GOOD), ("rejected", BAD))
    }
    assert found.facts["token_type_ids"] is False
    assert "two segments" in found.facts["rows"]


def test_it_stops_after_its_steps_while_the_schedule_counts_to_the_end(model, tmp_path):
    options = {"num_train_epochs": 3, "learning_rate": 6e-4}
    found = record("dpo", model("lm"), tmp_path / "out", options=options)
    assert found.facts["total_steps"] == 6  # 2 in each epoch
    rates = [step["learning_rate"] for step in found.steps]
    assert rates == pytest.approx([6e-4, 5e-4], rel=1e-12)
    assert len(found.logged) == len(found.batches) == 2


def test_without_epochs_the_schedule_ends_with_the_steps(model, tmp_path):
    found = record("dpo", model("lm"), tmp_path / "out")
    assert found.facts["total_steps"] == 2
    assert found.options["max_steps"] == 2


def test_a_row_that_trl_drops_is_told_and_the_others_keep_their_numbers(model, tmp_path):
    found = record("dpo", model("lm"), tmp_path / "out", options={"max_length": 6})
    assert set(found.left_out) == {5, 6}  # prompts of 6 and 7 tokens
    assert "max_length=6" in found.left_out[5]
    kept = [[0, 1, 2, 3, 4][i] for i in shuffled(5, 42)]
    assert found.batches[0] == [kept[:2], kept[2:4]]
    assert all(
        len(found.rows[i]["prompt_ids"] + found.rows[i]["chosen_ids"]) <= 6 for i in found.rows
    )


def test_a_prompt_that_is_cut_from_the_left_is_told_of_both_sides(model, tmp_path):
    rows = [{"prompt": "ba be bi ", "chosen": "bo", "rejected": "bo bu da"}] * 4
    options = {"max_length": 5, "truncation_mode": "keep_end"}
    found = record("dpo", model("lm"), tmp_path / "out", rows=rows, options=options)
    assert found.rows[0]["prompt_ids"] == ids_of("ba be bi")
    assert found.rows[0]["rejected_prompt_ids"] == ids_of("bi")


def test_packed_texts_are_numbered_as_they_come(model, tmp_path):
    options = {"packing": True, "max_length": 16}
    found = record("sft", model("lm"), tmp_path / "out", options=options)
    assert found.facts["packed"] is True
    assert found.facts["numbers"] == "in the order of their coming"
    assert found.left_out == {}
    read = [(row["prompt_ids"], row["response_ids"]) for row in found.rows.values()]
    every = [(ids_of(p), [*ids_of(c), EOS]) for p, c in zip(PROMPTS, GOOD, strict=True)]
    assert sorted(read[:N]) == sorted(every)  # 4 rows of trl's make an epoch


def test_the_weights_are_those_after_the_last_step(model, tmp_path):
    folder = model("lm")
    record("dpo", folder, tmp_path / "out", options={"learning_rate": 1e-3})
    weights = load_file(tmp_path / "out" / WEIGHTS)
    lm = AutoModelForCausalLM.from_pretrained(folder)
    before = dict(lm.named_parameters())
    assert weights.keys() == before.keys()  # a shared one once
    assert all(1e-4 < (weights[n] - p).abs().max() < 3e-3 for n, p in before.items())


def test_dropout_is_told_and_can_be_switched_off(model, tmp_path):
    folder = model("lm", dropout=0.1)
    dropping = record("sft", folder, tmp_path / "a")
    assert dropping.facts["dropout"] == 0.1
    without = record("sft", folder, tmp_path / "b", dropout=False)
    assert without.facts["dropout"] == 0.0
    assert record("sft", folder, tmp_path / "c", dropout=False).steps == without.steps
    assert dropping.steps != without.steps


def test_half_precision_is_told_and_can_be_left(model, tmp_path):
    folder, half = model("lm"), {"bf16": True}
    halved = record("dpo", folder, tmp_path / "a", options=half)
    assert halved.facts["mixed_precision"] == "bf16"
    single = record("dpo", folder, tmp_path / "b", options=half, float32=True)
    assert single.facts["mixed_precision"] == "no"
    assert single.steps == record("dpo", folder, tmp_path / "c").steps != halved.steps


def test_errors_are_one_line(model, tmp_path):
    folder = model("lm")
    with pytest.raises(Refused, match="DPOConfig has no option betta; there is beta"):
        record("dpo", folder, tmp_path / "a", options={"betta": 0.1})
    with pytest.raises(Refused, match="row 1 has no chosen"):
        record("dpo", folder, tmp_path / "a", rows=[ROWS["dpo"][0], {"prompt": "ba"}])
    with pytest.raises(Refused, match=r"nothing there: transformers .* cannot load it: "):
        record("dpo", "nothing there", tmp_path / "a")
    with pytest.raises(Refused, match="leaves out all of 7 rows: the prompt alone"):
        record("dpo", folder, tmp_path / "a", options={"max_length": 1})
    long = [{"prompt": "ba " * 99, "completion": "be"}] * 4
    with pytest.raises(Refused, match=r"longer than the 64 tokens .* Then give max_length=64"):
        record("sft", folder, tmp_path / "a", rows=long)


def test_an_error_is_left_as_a_file(model, tmp_path):
    Job("dpo", model("lm"), 1, [], {"betta": 1}).save(tmp_path / "job.json")
    assert __main__.main(str(tmp_path)) == 2
    assert "has no option betta" in (tmp_path / "error.txt").read_text()


# A script of the user's


class Left(BaseException):
    """Where the process would have ended."""


def leave():
    raise Left


def run_script(folder: Path, code: str, *arguments: str, steps: int = 2, **job: Any) -> Record:
    file = folder / "my_script.py"
    file.write_text(textwrap.dedent(code), encoding="utf-8")
    given = Job("dpo", "", steps, [], script=str(file), script_arguments=[*arguments], **job)
    out = folder / "out"
    out.mkdir(exist_ok=True)
    with isolated(), pytest.raises(Left):
        script.run(given, out, leave)
    return Record.load(out)


SCRIPT = """
    import sys
    from pathlib import Path
    from datasets import Dataset
    from small import syllables
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    class Mine(DPOTrainer):
        pass

    model, rows, folder = sys.argv[1:]
    trainer = Mine(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=DPOConfig(
            folder, per_device_train_batch_size=2, logging_steps=100, max_length=6, use_cpu=True,
            bf16=False, report_to="none", save_strategy="steps", save_steps=1, beta=0.3,
        ),
        train_dataset=Dataset.from_json(rows),
        processing_class=syllables(),
    )
    trainer.train()
    Path(folder, "pushed").touch()
"""


def written(folder: Path, rows: list[dict[str, Any]]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_a_script_is_recorded_step_by_step_and_ends_there(model, tmp_path):
    folder, output = model("lm"), tmp_path / "output"
    rows = [row | {"source": i} for i, row in enumerate(reversed(ROWS["dpo"]))]
    found = run_script(tmp_path, SCRIPT, folder, written(tmp_path, rows), str(output))
    assert (found.stage, found.trainer, found.facts["subclass"]) == ("dpo", "DPOTrainer", "Mine")
    assert found.facts["total_steps"] == 9  # 3 epochs of 5 rows by 2
    assert len(found.steps) == len(found.logged) == 2  # although it logs each hundredth
    assert abs(found.steps[0]["loss"] - math.log(2)) < 1e-6
    assert found.options["beta"] == 0.3
    assert set(found.left_out) == {0, 1}
    kept = [2 + i for i in shuffled(5, 42)]
    assert found.batches == [[kept[:2]], [kept[2:4]]]
    assert found.facts["dataset_rows"] == N
    told = {*kept[:4], *shuffled(N, 42)[:4]}  # these too would be, if none were dropped
    assert found.raw_rows == {i: rows[i] for i in told}  # without the EOS that trl adds
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / START)
    before = dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
    assert all(torch.equal(p, before[name]) for name, p in start.named_parameters())
    assert (tmp_path / "out" / START / "tokenizer.json").exists()
    assert not list(output.glob("*"))  # neither a checkpoint nor what comes after training


def test_a_script_in_float64(model, tmp_path):
    arguments = (model("lm"), written(tmp_path, ROWS["dpo"]), str(tmp_path / "output"))
    found = run_script(tmp_path, SCRIPT, *arguments, float64=True)
    assert found.facts["dtype"] == "float64"
    assert abs(found.steps[0]["loss"] - math.log(2)) < FP64


def test_another_reference_is_kept(model, tmp_path):
    code = SCRIPT.replace(
        "args=", "ref_model=AutoModelForCausalLM.from_pretrained(sys.argv[4]), args="
    )
    code = code.replace("sys.argv[1:]", "sys.argv[1:4]")
    other = tmp_path / "other"
    gpt2(2, vocabulary=3 + len(SYLLABLES)).float().save_pretrained(other)
    rows = written(tmp_path, ROWS["dpo"])
    found = run_script(tmp_path, code, model("lm"), rows, str(tmp_path / "output"), str(other))
    assert found.facts["ref_is_start"] is False
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "reference")
    theirs = dict(AutoModelForCausalLM.from_pretrained(other).named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in kept.named_parameters())


CHAT = """
    import sys
    from datasets import Dataset
    from small import syllables
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    model, rows, folder = sys.argv[1:]
    tokenizer = syllables()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content + ' ' }}{% else %}"
        "{% generation %}{{ m.content + ' ' }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=SFTConfig(folder, assistant_only_loss=True, use_cpu=True, bf16=False, max_steps=1),
        train_dataset=Dataset.from_json(rows),
        processing_class=tokenizer,
    ).train()
"""


def test_a_chat_of_several_turns_has_holes_and_a_stage_of_its_own(model, tmp_path):
    turns = [("user", "ba be"), ("assistant", "bi"), ("user", "bo"), ("assistant", "bu da")]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    found = run_script(
        tmp_path, CHAT, model("lm"), written(tmp_path, rows), str(tmp_path / "output"), steps=3
    )
    assert found.stage == "sft"
    assert found.rows == {0: {"prompt_ids": ids_of("ba be"), "response_ids": ids_of("bi bu da")}}
    assert "have none" in found.facts["holes"]
    assert found.raw_rows == {0: rows[0]}
    assert len(found.steps) == 1  # all that it has


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("x = 1", "my_script.py: it ended, and no trainer of trl's has trained"),
        ("x = 1\nraise KeyError('y')", "my_script.py:2: KeyError: 'y'"),
        ("import json\n\njson.loads('?')", "my_script.py:3: JSONDecodeError: Expecting value"),
        ("x = (", "my_script.py:1: SyntaxError"),
        ("import sys\nsys.exit('no data')", "it ended before it trained, with 'no data'"),
        (
            "import transformers, torch\n"
            "from small import gpt2\n"
            "args = transformers.TrainingArguments('out', use_cpu=True, report_to='none')\n"
            "t = transformers.Trainer(gpt2().float(), args, train_dataset=[{}])\n"
            "try:\n    t.train()\nexcept Exception:\n    pass",
            "it trains with Trainer; scripts are compared for SFTTrainer, RewardTrainer",
        ),
        (
            "import transformers\ntransformers.Trainer.train(None, resume_from_checkpoint=True)",
            "it resumes from a checkpoint; let it begin anew",
        ),
        (
            "from trl.experimental.ppo import PPOTrainer\nPPOTrainer(None)",
            "it trains with PPOTrainer; .*; for PPO leave the script out and give --stage ppo",
        ),
    ],
)
def test_a_script_that_is_not_to_be_compared_says_so(code, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "my_script.py"
    file.write_text(code)
    with isolated(), pytest.raises(Refused, match=says):
        script.run(Job("dpo", "", 1, [], script=str(file)), tmp_path, leave)
    with pytest.raises(Refused, match=r"gone.py: no such file"):
        script.run(Job("dpo", "", 1, [], script="gone.py"), tmp_path, leave)


# From our side


def test_a_python_without_trl_or_with_another_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(start.BadInput, match="no-python: no such Python"):
        start.probe(str(tmp_path / "no-python"))
    job = Job("ppo", "", 1, [])
    monkeypatch.setattr(start, "probe", lambda _: {"trl": None})
    with pytest.raises(start.BadInput, match="no trl in py: py -m pip install trl"):
        start.run(job, tmp_path, "py")
    monkeypatch.setattr(start, "probe", lambda _: {"trl": "1.16.0", "trainers": ["DPOTrainer"]})
    with pytest.raises(start.BadInput, match=r"has no ppo .* 0.11.3, or 1.0 to 1.12.0"):
        start.run(job, tmp_path, "py")


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (
            "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
            "ended by SIGKILL, as when mem",
        ),
        ("import os\nprint('no', flush=True)\nos._exit(3)", r"left nothing \(exit code 3\): no"),
        (
            "import pathlib, sys\n"
            "pathlib.Path(sys.argv[1], 'error.txt').write_text('one line of its own')\n"
            "sys.exit(2)",
            "^one line of its own$",
        ),
    ],
)
def test_a_process_that_ends_early_says_how(code, says, tmp_path, monkeypatch):
    package = tmp_path / "examples" / "compare"
    (package / "theirs").mkdir(parents=True)
    for folder in (package, package / "theirs"):
        (folder / "__init__.py").touch()
    (package / "theirs" / "__main__.py").write_text(code)
    found = {"trl": "1.12.0", "trainers": ["DPOTrainer"]}
    monkeypatch.setattr(start, "probe", lambda _: found)
    monkeypatch.setattr(start, "EXAMPLES", tmp_path / "examples")
    with pytest.raises(start.BadInput, match=says):
        start.run(Job("dpo", "", 1, []), tmp_path / "out")


@pytest.mark.parametrize(
    ("version", "lacks", "stages"),
    [
        ("0.11.3", "", {"reward", "dpo", "ppo"}),
        ("0.24.0", "", set()),
        ("1.12.0", "", {"sft", "reward", "dpo", "ppo"}),
        ("1.16.0", "PPOTrainer", {"sft", "reward", "dpo"}),
        ("2.0.0.dev0", "RewardTrainer", {"sft", "dpo", "ppo"}),
    ],
)
def test_what_each_version_has(version, lacks, stages):
    trainers = {"SFTTrainer", "RewardTrainer", "DPOTrainer", "PPOTrainer"} - {lacks}
    found = {"trl": version, "trainers": sorted(trainers)}
    assert {stage for stage in start.STAGES if start.has(stage, found)} == stages


def test_the_probe_tells_versions_without_loading_anything():
    found = start.probe()
    assert found["trl"] == trl.__version__
    assert {"python", "torch", "transformers"} <= found.keys()
    assert {"SFTTrainer", "RewardTrainer", "DPOTrainer", "PPOTrainer"} <= {*found["trainers"]}
