"""The page on coming from trl: nothing of either side is left out, and its scripts do the same."""

import ast
import dataclasses
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import SYLLABLES, gpt2, gpt2_classifier, syllables
from tolerances import FP32

pytest.importorskip("trl", exc_type=ImportError)
import datasets
import record_trl_fields
import transformers
from compare.fields import SAMPLED, STAGES, TRAINER, Field
from compare.names import METRICS, OURS_ALONE
from trl_tables import PAGE, RECORDED

from rlhf_min import Codec, Policy, RewardModel, config, dpo, grpo, ppo, reward, rloo, sft
from rlhf_min.harness.cli import RunOptions
from rlhf_min.harness.run.log import _timed
from rlhf_min.policy import Critic

TEXT = PAGE.read_text(encoding="utf-8")
ROWS = 12  # at eight a batch: two steps in an epoch, of which the last is smaller
TOLD = STAGES | SAMPLED
each_stage = pytest.mark.parametrize("stage", TOLD)


@pytest.fixture
def alone() -> Iterator[None]:
    """A trainer inherits nothing from the one before, and leaves no generator reseeded."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for shared in (AcceleratorState, GradientState, PartialState):
        shared._reset_state()
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


@pytest.fixture(params=["recorded", "installed"])
def theirs(request: pytest.FixtureRequest) -> Any:
    """The fields of trl's configs: as recorded, and of the trl that is here."""
    return RECORDED["fields"] if request.param == "recorded" else record_trl_fields.fields()


def told(rows: Iterable[Field], side: str) -> set[str]:
    names = [name for row in rows for name in getattr(row, side).split()]
    if side == "trl":
        assert sorted(names) == sorted(set(names))  # each is told once
    return set(names)


@each_stage
def test_every_option_of_trl_is_told(stage: str, theirs: Any) -> None:
    own = theirs[TOLD[stage].config].keys() - theirs["TrainingArguments"].keys()
    assert own <= told(TOLD[stage].fields, "trl")
    recorded = RECORDED["fields"]
    known = recorded[TOLD[stage].config].keys() - recorded["TrainingArguments"].keys()
    assert told(TOLD[stage].fields, "trl") == known


def test_every_option_of_the_trainer_is_told(theirs: Any) -> None:
    here, there = transformers.__version__, RECORDED["versions"]["transformers"]
    if theirs is not RECORDED["fields"] and here != there:
        pytest.skip(f"transformers is {here}, and was recorded as {there}")
    assert told(TRAINER, "trl") == theirs["TrainingArguments"].keys()


@each_stage
def test_every_option_of_ours_is_told(stage: str) -> None:
    own = getattr(config, TOLD[stage].config)
    rows = [*TOLD[stage].fields, *TRAINER]
    assert {field.name for field in dataclasses.fields(own)} <= told(rows, "ours")
    everywhere = [row for other in TOLD.values() for row in other.fields] + TRAINER
    known = {field.name for field in dataclasses.fields(RunOptions)}
    assert known <= told(everywhere, "ours")


# Metrics


def untold(logged: Iterable[str], known: set[str], of_evaluation: str) -> list[str]:
    return [x for x in logged if not {x, x.removeprefix(of_evaluation)} & known]


@pytest.mark.usefixtures("alone")
@each_stage
def test_every_metric_of_trl_is_told(stage: str, tmp_path: Path) -> None:
    trainer = TOLD[stage].trainer
    known = {metric.trl for metric in METRICS[stage, trainer]}
    for logged in (RECORDED["metrics"][trainer], record_trl_fields.logged(stage, tmp_path)):
        assert "loss" in logged
        assert untold(logged, known, "eval_") == []
    assert known <= {*RECORDED["metrics"][trainer], "aux_loss"}  # that is of other models


OF = {"batch_size": 1, "epochs": 1, "eval_every": 1}
TEXTS = [{"prompt": "ba", "response": "be", "chosen": "be", "rejected": "bi bo"}]
Steps = Iterator[dict[str, float]]


def a_policy(critic: Critic = "none") -> tuple[Policy, Codec]:
    policy = Policy(gpt2(vocabulary=3 + len(SYLLABLES)), syllables(), critic=critic)
    return policy, Codec(policy.tokenizer, 8, 8)


def of_sft() -> Steps:
    policy, codec = a_policy()
    rows = codec.encode_demonstrations(TEXTS)[0]
    state = sft.new_state(policy, rows, options := config.SFTConfig(**OF))
    return sft.train(policy, options, state, heldout=rows)


def of_reward() -> Steps:
    model = RewardModel(gpt2_classifier(), syllables())
    rows = reward.prepare_pairs(model, TEXTS)[0]
    state = reward.new_state(model, rows, options := config.RewardConfig(**OF))
    return reward.train(model, options, state, heldout=rows)


def of_dpo() -> Steps:
    policy, codec = a_policy()
    rows, ref_policy = codec.encode_preferences(TEXTS)[0], policy.reference()
    state = dpo.new_state(policy, ref_policy, rows, options := config.DPOConfig(**OF))
    return dpo.train(policy, ref_policy, options, state, heldout=rows)


def of_ppo() -> Steps:
    policy, codec = a_policy("shared")
    rows, ref_policy = codec.encode_prompts(TEXTS * 2)[0], policy.reference()
    sizes = {"batch_size": 2, "minibatch_size": 2, "max_new_tokens": 4}
    options = config.PPOConfig(**OF | sizes, steps=1)
    state = ppo.new_state(policy, rows, options)
    return ppo.train(
        policy,
        ref_policy,
        lambda _, responses: [len(x) for x in responses],
        options,
        state,
        eval_prompts=rows,
    )


def of_groups(algorithm: Any, options: Any) -> Steps:
    policy, codec = a_policy()
    rows, ref_policy = codec.encode_prompts(TEXTS * 2)[0], policy.reference()
    sizes = {"batch_size": 4, "minibatch_size": 4, "max_new_tokens": 4, "group_size": 2}
    told = options(**OF | sizes, steps=1)
    state = algorithm.new_state(policy, rows, told)
    reward = lambda _, responses: [len(x) for x in responses]  # noqa: E731
    return algorithm.train(policy, ref_policy, reward, told, state, eval_prompts=rows)


OUR_STEPS = {
    "sft": of_sft,
    "reward": of_reward,
    "dpo": of_dpo,
    "ppo": of_ppo,
    "grpo": lambda: of_groups(grpo, config.GRPOConfig),
    "rloo": lambda: of_groups(rloo, config.RLOOConfig),
}


@pytest.mark.parametrize("stage", OURS_ALONE)
def test_every_metric_of_ours_is_told(stage: str) -> None:
    told = {metric.ours for key in METRICS if key[0] == stage for metric in METRICS[key]}
    known = (told | OURS_ALONE[stage].keys()) - {""}
    (step,) = OUR_STEPS[stage]()
    (written,) = _timed([step.copy()], StubOptimizer())
    logged = step.keys() | written.keys()
    assert untold(logged, known, "eval/") == []
    assert known == {name for name in known if {name, f"eval/{name}"} & logged}


class StubOptimizer:
    """Of an optimizer all that is logged beside the metrics."""

    skipped = 0


# Causes


def causes() -> set[str]:
    """What the comparison of a run may name as a cause, but for options."""
    found = set()
    for file in ("causes.py", "ppo_causes.py", "group_causes.py", "tokens.py"):
        for node in ast.walk(ast.parse((PAGE.parent / file).read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]):
                    if ast.unparse(function) in ("Cause", "Cause[Setup]"):
                        found.add(name)
                case (
                    ast.Return(value=ast.Tuple(elts=[ast.Constant(value=str(name)), *_]))
                    | ast.Return(
                        value=ast.List(elts=[ast.Tuple(elts=[ast.Constant(value=str(name)), *_])])
                    )
                ):
                    found.add(name)
    return found


def test_every_cause_that_is_named_is_told() -> None:
    rows = re.findall(r"^\| ([A-Z][\w', -]+) \|", TEXT, re.MULTILINE)
    told_of = {name.lower() for row in rows for name in row.split(", ")}
    names = {name.lower() for name in causes()}
    assert len(names) > 15
    assert [name for name in names if name not in told_of and f"`{name}`" not in TEXT] == []


# Scripts


def blocks(stage: str) -> list[str]:
    """The Python of both sides."""
    title = STAGES[stage].title
    heading = f"### {title[0].upper()}{title[1:]}, the same script"
    part = TEXT.partition(f"{heading}\n")[2].partition("\n### ")[0]
    return re.findall(r"^```python\n(.*?)^```", part, re.DOTALL | re.MULTILINE)


# What ours prints in each step, as trl logs it
SHOWN = {
    "sft": ("loss",),
    "reward": ("loss", "accuracy"),
    "dpo": ("loss", "rewards/margins"),
}


def text(rng: random.Random) -> str:
    return " ".join(rng.choices(SYLLABLES, k=rng.randint(1, 6)))


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the scripts read: models without dropout, and rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    vocabulary = 3 + len(SYLLABLES)
    models = {"my-model": gpt2(vocabulary=vocabulary), "my-classifier": gpt2_classifier()}
    for name, model in models.items():
        model.float().save_pretrained(name)
        syllables().save_pretrained(name)
    rng = random.Random(3)
    pairs = [
        {"prompt": text(rng) + "\n", "chosen": "bu " + text(rng), "rejected": "ka " + text(rng)}
        for _ in range(ROWS)
    ]
    demonstrations = [{"prompt": x["prompt"], "completion": x["chosen"]} for x in pairs]
    for name, rows in (("pairs", pairs), ("demonstrations", demonstrations)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.usefixtures("alone", "files")
@pytest.mark.parametrize("stage", STAGES)
def test_both_scripts_have_the_same_losses(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, ours = blocks(stage)
    names: dict[str, Any] = {}
    higher = ("1e-6", "1e-3")  # DPO's rate, or its losses would all be the first
    exec(compile(theirs.replace(*higher), "trl", "exec"), names)
    entries = [entry for entry in names["trainer"].state.log_history if "loss" in entry]
    logged = [entry[name] for entry in entries for name in SHOWN[stage]]
    capsys.readouterr()
    exec(compile(ours.replace(*higher), "ours", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    printed = [float(figure) for line in lines for figure in line.split()]
    assert len(lines) == len(entries) == 4
    assert printed == pytest.approx(logged, abs=FP32)
    losses = printed[:: len(SHOWN[stage])]
    assert max(losses) - min(losses) > 100 * FP32
