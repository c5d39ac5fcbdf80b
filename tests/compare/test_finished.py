"""A finished run of trl's beside one of ours: recorded runs, which ours repeat, and hand values."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import record_trl_runs as recorded
import torch
from compare import finished, picture
from compare.beside import Beside, Pair, as_json, told
from compare.command import parse_options
from compare.logged import read
from compare.names import METRICS, Metric
from record_trl_runs import BATCH, BETA, EPOCHS, HELDOUT, PAIRS, RATE, RECORDED, SEED
from small import lengths
from tolerances import FP32, FP64
from transformers import GPT2ForSequenceClassification

from rlhf_min import dpo, ppo, reward, sft
from rlhf_min.data import PromptExample
from rlhf_min.encoding.codec import Codec
from rlhf_min.errors import BadInput
from rlhf_min.harness.report.figures import MOST_POINTS, style
from rlhf_min.harness.run.reading import read_run
from rlhf_min.policy import Policy
from rlhf_min.reward_model import RewardModel

SAME: dict[str, Any] = {
    "epochs": EPOCHS,
    "batch_size": BATCH,
    "learning_rate": RATE,
    "schedule": "linear",
    "warmup_share": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "seed": SEED,
    "eval_every": 3,
}
CODEC = Codec(recorded.tokenizer(), 32, 32)


def run_folder(folder: Path, stage: str, metrics: Iterable[Mapping[str, float]]) -> Path:
    """A run of ours, as far as it is read."""
    folder.mkdir(exist_ok=True)
    rows = [{"stage": stage, "step": i, **m} for i, m in enumerate(metrics, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def our_sft() -> Iterable[dict[str, float]]:
    rows = [
        [{"prompt": x["prompt"], "response": x["chosen"]} for x in side]
        for side in (PAIRS, HELDOUT)
    ]
    train, heldout = (CODEC.encode_demonstrations(side)[0] for side in rows)
    policy = Policy(recorded.model(), recorded.tokenizer())
    config = sft.SFTConfig(**SAME)
    return sft.train(policy, config, sft.new_state(policy, train, config), heldout=heldout)


def our_dpo() -> Iterable[dict[str, float]]:
    train, heldout = (CODEC.encode_preferences(side)[0] for side in (PAIRS, HELDOUT))
    policy, ref = (Policy(recorded.model(), recorded.tokenizer()) for _ in range(2))
    config = dpo.DPOConfig(**SAME, beta=BETA)
    state = dpo.new_state(policy, ref.reference(), train, config)
    return dpo.train(policy, ref, config, state, heldout=heldout)


def our_reward() -> Iterable[dict[str, float]]:
    made = RewardModel(recorded.model(GPT2ForSequenceClassification), recorded.tokenizer())
    train, heldout = (reward.prepare_pairs(made, side)[0] for side in (PAIRS, HELDOUT))
    config = reward.RewardConfig(**SAME, center_coef=0.0)
    return reward.train(made, config, reward.new_state(made, train, config), heldout=heldout)


OURS = {"sft": our_sft, "reward": our_reward, "dpo": our_dpo}


@pytest.mark.parametrize("kind", ["sft_1_16", "reward_1_16", "dpo_1_16", "dpo_1_12", "dpo_0_11"])
def test_a_recorded_run_and_the_same_run_of_ours(kind: str, tmp_path: Path) -> None:
    stage = kind.partition("_")[0]
    ours = run_folder(tmp_path / "ours", finished.STAGES[stage], OURS[stage]())
    found = as_json(beside(str(RECORDED / kind), ours))
    assert found["stage"] == stage
    metrics = {metric["name"]: metric for metric in found["metrics"]}
    held = {"eval/loss"} if stage == "sft" else {"eval/loss", "eval/accuracy", "eval/margin"}
    assert {"loss", "grad_norm", "learning_rate"} | held <= metrics.keys()
    for name, metric in metrics.items():
        n = 2 if name.startswith("eval/") else 3 if stage == "sft" else 6
        # While the policy is the reference, the signs of the margins are rounding.
        n -= stage == "dpo" and name == "accuracy"
        assert len(metric["common_steps"]) == n
        if name == "learning_rate" and kind == "dpo_0_11":
            assert metric["largest_gap"] == pytest.approx(RATE / 6)  # it logs the next step's
        elif name == "loss" and kind == "dpo_0_11":
            assert FP32 < metric["largest_gap"] < 0.5e-4 + FP32  # it logs four digits
        else:
            assert metric["largest_gap"] < FP32, name
    older = [note for note in found["notes"] if "older" in note or "four decimals" in note]
    assert len(older) == 2 * (kind == "dpo_0_11")


def our_ppo() -> Iterable[dict[str, float]]:
    tokenizer = recorded.tokenizer()
    policy = Policy(recorded.model(), tokenizer, critic="shared")
    ref = Policy(recorded.model(shift=1), tokenizer).reference()
    prompts = [
        PromptExample(x["prompt"], torch.tensor(tokenizer(x["prompt"])["input_ids"])) for x in PAIRS
    ]
    config = ppo.PPOConfig(
        steps=6,
        batch_size=BATCH,
        minibatch_size=BATCH,
        max_new_tokens=6,
        learning_rate=RATE,
        schedule="linear",
        warmup_share=0.0,
    )
    state = ppo.new_state(policy, prompts, config)
    return ppo.train(policy, ref, lengths, config, state)


PPO_NAMES = {
    "ppo_1_12": {
        "kl": "objective/kl",
        "score": "objective/scores",
        "reward": "objective/rlhf_reward",
        "policy_loss": "loss/policy_avg",
        "value_loss": "loss/value_avg",
        "learning_rate": "lr",
    },
    "ppo_0_11": {
        "kl": "objective/kl",
        "kl_coef": "objective/kl_coef",
        "score": "env/reward_mean",
        "policy_loss": "ppo/loss/policy",
        "value_loss": "ppo/loss/value",
        "response_length": "tokens/responses_len_mean",
    },
}


@pytest.mark.parametrize(
    ("file", "trainer"),
    [
        ("ppo_1_12/trainer_state.json", "PPOTrainer"),
        ("ppo_0_11/stats.csv", "PPOTrainer.step"),
        ("ppo_0_11/stats.jsonl", "PPOTrainer.step"),
    ],
)
def test_a_recorded_run_of_ppo_beside_one_of_ours(file: str, trainer: str, tmp_path: Path) -> None:
    """Both sample by themselves: only what is imposed is the same."""
    ours = run_folder(tmp_path / "ours", "ppo", our_ppo())
    found = beside(str(RECORDED / file), ours)
    assert (found.stage, found.trainer, found.axis) == ("ppo", trainer, "rollouts")
    by_trl = {pair.trl: pair for pair in found.pairs}
    lines = (RECORDED / "ppo_0_11/stats.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    if trainer == "PPOTrainer":
        rows = json.loads((RECORDED / file).read_text())["log_history"]
    for name, trl in PPO_NAMES[file.partition("/")[0]].items():
        assert by_trl[trl].name == name
        assert by_trl[trl].theirs == {row["step"]: row[trl] for row in rows}
        assert by_trl[trl].common.keys() == {row["step"] for row in rows}
    if trainer == "PPOTrainer":
        assert by_trl["lr"].gaps == pytest.approx(dict.fromkeys(range(1, 7), 0.0), abs=FP64)
        assert by_trl["objective/scores"].means is not None
    else:
        assert set(by_trl["tokens/responses_len_mean"].theirs.values()) == {3.5}
    assert "objective/entropy" in found.alone
    assert not [why for why in found.alone.values() if "neither" in why]


# By hand


def table(file: Path, *rows: Mapping[str, Any] | str) -> str:
    """A JSONL of these lines."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("".join(line + "\n" for line in lines))
    return str(file)


def beside(theirs: str, ours: Path, stage: str | None = None) -> Any:
    return finished.lay_beside(read(Path(theirs)), read_run(ours), stage)


def pairs(found: Any) -> dict[str, Any]:
    return {pair.name: pair for pair in found.pairs}


def test_names_windows_and_gaps_by_hand(tmp_path: Path) -> None:
    """trl logs every second step the mean of two; the rate and the norm as they are."""
    ours = run_folder(
        tmp_path / "ours",
        "dpo",
        [
            {"loss": 1.0, "margin": 5.0, "grad_norm": 7.0, "ties": 0.0},
            {"loss": 2.0, "margin": 6.0, "grad_norm": 8.0, "eval/loss": 0.5},
            {"loss": 4.0, "margin": 7.0, "grad_norm": 9.0},
            {"loss": 8.0, "margin": 8.0, "grad_norm": 5.0, "eval/loss": 0.25},
            {"loss": 16.0, "margin": 9.0, "grad_norm": 5.0},
        ],
    )
    theirs = table(
        tmp_path / "log.jsonl",
        {"train/loss": 1.75, "train/rewards/margins": 5.5, "train/global_step": 2},
        {"train/grad_norm": 8.5, "train/global_step": 2, "train/entropy": 3.0},
        {"eval/loss": 0.75, "eval/rewards/accuracies": 1.0, "train/global_step": 4},
        {"train/loss": 7.0, "train/rewards/margins": 7.5, "train/global_step": 4},
        {"train/loss": 1.0, "train/global_step": 6},
    )
    found = beside(theirs, ours)
    assert (found.stage, found.axis) == ("dpo", "optimizer steps")
    both = pairs(found)
    assert [*both] == ["loss", "margin", "grad_norm", "eval/loss"]
    assert both["loss"].common == {2: (1.5, 1.75), 4: (6.0, 7.0)}  # step 6 is beyond ours
    assert both["loss"].gaps == {2: -0.25, 4: -1.0}
    assert both["margin"].common == {2: (5.5, 5.5), 4: (7.5, 7.5)}
    assert both["grad_norm"].common == {2: (8.0, 8.5)}
    assert both["eval/loss"].common == {4: (0.25, 0.75)}
    assert both["margin"].trl == "train/rewards/margins"
    assert found.alone == {
        "train/entropy": "no counterpart here",
        "eval/rewards/accuracies": "our run has not logged eval/accuracy",
        "ties (ours)": "trl has none",
    }
    notes = " ".join(found.notes)
    assert 'taken off the names: "train/", of 4' in notes
    assert "ours ends at step 5, theirs at 6: compared up to step 5" in notes
    assert "every 2 steps" in notes
    metric = next(m for m in as_json(found)["metrics"] if m["name"] == "loss")
    assert metric["largest_gap"] == 1.0
    assert metric["at_step"] == 4
    assert metric["mean_gap"] == 0.625
    assert metric["mean_of_ours_less_theirs"] == -0.625
    assert metric["ours"]["steps"] == [2, 4, 5]  # the last one by itself
    assert (metric["ours"]["last"], metric["ours"]["mean"]) == (16.0, 23.5 / 3)
    assert (metric["theirs"]["last"], metric["theirs"]["mean"]) == (1.0, 3.25)
    row = next(line for line in told(found) if line.startswith("loss"))
    assert row.split() == "loss 16 1 7.8333 3.25 1.0e+00 4 6.2e-01 2".split()


def test_lines_of_another_codebase(tmp_path: Path) -> None:
    """Ours or trl's names; a value is of its step alone; steps from 0 on are ours from 1 on."""
    metrics = [{"loss": loss, "chosen_rewards": 0.5} for loss in (1.0, 2.0, 4.0, 8.0)]
    ours = run_folder(tmp_path / "ours", "dpo", metrics)
    theirs = table(
        tmp_path / "log.jsonl",
        {"step": 0, "name": "loss", "value": 1.5},
        {"step": 2, "name": "loss", "value": 1.25, "time": 3},
        {"step": 2, "name": "chosen_rewards", "value": 0.25},
        {"step": 1, "name": "rewards/accuracies", "value": 1},
        {"step": 1, "name": "tokens_per_second", "value": 1},
        {"step": 3, "name": "loss", "value": None},
        {"step": 0, "name": "chosen_rewards", "value": 7},
        {"step": 0, "name": "chosen_rewards", "value": 0.75},
    )
    found = beside(theirs, ours)
    assert pairs(found)["loss"].common == {1: (1.0, 1.5), 3: (4.0, 1.25)}
    assert math.isnan(pairs(found)["loss"].theirs[4])
    assert pairs(found)["chosen_rewards"].common == {1: (0.5, 0.75), 3: (0.5, 0.25)}
    assert found.alone["tokens_per_second"] == "neither trl's name nor ours"
    notes = " ".join(found.notes)
    assert "begin at 0" in notes
    assert "passed over: the fields time" in notes
    assert "1 values were logged again for the same step: the last counts" in notes


def test_a_factor_and_a_missing_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """trl's times the factor is ours; ours of step 2 was lost, so the mean up to 2 is too."""
    table_of_sft = [Metric("loss", "loss", factor=2.0), Metric("mean_token_accuracy")]
    monkeypatch.setitem(METRICS, ("sft", "SFTTrainer"), table_of_sft)
    ours = run_folder(tmp_path / "ours", "sft", [{"loss": float(i)} for i in range(1, 7)])
    file = ours / "metrics.jsonl"
    file.write_text("".join(line for line in file.open() if '"step": 3' not in line))
    rows = [{"step": 2, "loss": 1.0}, {"step": 4, "loss": 2.0}, {"step": 6, "loss": 3.0}]
    found = beside(table(tmp_path / "log.jsonl", *rows), ours, "sft")
    assert pairs(found)["loss"].common == {2: (1.5, 2.0), 6: (5.5, 6.0)}


def test_ppo_is_compared_at_its_rollouts(tmp_path: Path) -> None:
    """Its trainers log what is so at a rollout, and no mean since the last time."""
    ours = run_folder(tmp_path / "ours", "ppo", [{"kl": 1.0}, {"kl": 2.0}])
    rows = [{"step": 2, "objective/kl": 4.0, "loss/policy_avg": None, "lr": None}]
    found = beside(table(tmp_path / "log.jsonl", *rows), ours, "ppo")
    assert pairs(found)["kl"].common == {2: (2.0, 4.0)}
    assert [*found.alone] == []


def test_an_accuracy_of_real_margins_is_compared_at_step_1_too(tmp_path: Path) -> None:
    ours = run_folder(tmp_path / "ours", "dpo", [{"margin": 0.5, "accuracy": 1.0}])
    for margin, n in ((0.5, 1), (0.0, 1)):
        row = {"step": 1, "rewards/margins": margin, "rewards/accuracies": 0.0}
        found = beside(table(tmp_path / "log.jsonl", row), ours)
        assert len(pairs(found)["accuracy"].common) == n


def test_what_is_not_finite_is_a_gap_and_told(tmp_path: Path) -> None:
    ours = run_folder(tmp_path / "ours", "sft", [{"loss": 1.0}, {"loss": None}, {"loss": 3.0}])
    theirs = tmp_path / "log.csv"
    theirs.write_text("step,loss,mean_token_accuracy\n1,NaN,0\n2,2,0\n3,inf,0\n")
    found = beside(str(theirs), ours)
    (pair,) = found.pairs
    assert pair.common == {}
    assert pair.left_out == 3
    notes = " ".join(found.notes)
    assert "loss: theirs is not finite at 2 of 3 steps, first at step 1" in notes
    assert "loss: ours is not finite at 1 of 3 steps, first at step 2" in notes
    text = json.dumps(as_json(found), allow_nan=False)
    assert json.loads(text)["metrics"][0]["theirs"]["values"] == [None, 2.0, None]


def test_tables_of_trackers(tmp_path: Path) -> None:
    """A chart of Weights & Biases, and a table that says no step."""
    ours = run_folder(tmp_path / "ours", "sft", [{"loss": 1.0}, {"loss": 2.0}])
    chart = tmp_path / "chart.csv"
    name = "my - run - train/loss"
    chart.write_text(f'"Step","{name}","{name}__MIN","{name}__MAX"\n0,1.5,1,1\n1,2.5,1,1\n2,,,\n')
    found = beside(str(chart), ours, "sft")
    assert pairs(found)["loss"].common == {1: (1.0, 1.5), 2: (2.0, 2.5)}
    notes = " ".join(found.notes)
    assert "2 columns __MIN and __MAX" in notes
    assert "the steps are Step: a tracker's own count" in notes
    assert '"my - run - "' in notes
    assert found.alone == {}

    history = tmp_path / "history.csv"
    history.write_text("_step,_runtime,train/loss,train/global_step\n5,9,1.5,1\n6,9,2.5,2\n")
    found = beside(str(history), ours, "sft")
    assert pairs(found)["loss"].common == {1: (1.0, 1.5), 2: (2.0, 2.5)}
    assert found.alone == {}
    assert any("_runtime" in note for note in found.notes)

    unnumbered = table(tmp_path / "log.jsonl", {"loss": 1.5}, {"loss": 2.25})
    found = beside(unnumbered, ours, "sft")
    assert pairs(found)["loss"].gaps == {1: -0.5, 2: -0.25}
    assert any("the rows are counted from 1" in note for note in found.notes)


def test_no_common_step_is_drawn_and_not_compared(tmp_path: Path) -> None:
    ours = run_folder(tmp_path / "ours", "sft", [{"loss": 1.0}])
    theirs = table(tmp_path / "log.jsonl", {"step": 5, "name": "loss", "value": 1.0})
    finished.compare(theirs, str(ours), "sft", tmp_path)
    found = json.loads((tmp_path / finished.DATA).read_text())
    assert found["metrics"][0]["largest_gap"] is None
    assert any("no step is common" in note for note in found["notes"])
    assert (tmp_path / finished.PICTURE).stat().st_size > 1000


def test_the_picture_has_a_panel_for_each_metric() -> None:
    """Of long runs too, with gaps, with nothing finite, and with one point."""
    steps = range(1, 1001)
    wave = {step: math.nan if step % 100 == 3 else math.sin(step / 50) for step in steps}
    flat = dict.fromkeys(steps, 1.0)
    found = Beside("theirs $x_1$", "ours", "dpo", "DPOTrainer", "optimizer steps")
    for name, ours, theirs in [
        ("long", wave, flat),
        ("one_point", {1: 2.0}, {1: 2.5}),
        ("nothing", {1: math.nan}, {5: math.inf}),
    ]:
        means = ("theirs is told", "ours is told")
        found.pairs.append(Pair(name, name, "what it is", means, ours, theirs, {}))
    with style():
        figure = picture.draw(found)
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert [text[0] for text in texts] == ["long", "one_point", "nothing"]
    assert all("theirs: theirs is told" in text and "ours: ours is told" in text for text in texts)
    assert "ours is not finite at 10 of 1000 steps (×)" in texts[0]
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == MOST_POINTS]
    assert len(lines) == 2
    theirs, ours = (np.asarray(line.get_ydata()) for line in lines)
    assert (theirs == 1).all()
    assert ours[0] == pytest.approx(fmean(x for x in list(wave.values())[:12] if x == x))
    dots = [line for line in figure.axes[1].lines if line.get_marker() == "o"]
    assert [list(line.get_ydata()) for line in dots] == [[2.5], [2.0]]
    crosses = [line for line in figure.axes[2].lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[5], [1]]


def test_the_newest_checkpoint_is_read() -> None:
    logged = read(RECORDED / "dpo_1_12")
    assert logged.file.parent.name == "checkpoint-6"
    assert "left alone: checkpoint-3/trainer_state.json" in logged.notes[0]
    assert read(RECORDED / "sft_1_16").file.parent == RECORDED / "sft_1_16"


BAD: dict[str, tuple[str, str]] = {
    "empty.jsonl": ("", "is empty"),
    "empty.csv": ("", "is empty"),
    "no_rows.csv": ("step,loss\n", "is empty"),
    "broken.jsonl": (
        '{"step": 1, "loss": 1}\n{"step": 2, "loss"\n',
        "line 2: broken JSON at column",
    ),
    "list.jsonl": ("[1]\n", "line 1: must be an object, is list"),
    "state.json": ('{"log_history": [\n', "broken JSON at line 2"),
    "no_history.json": ("{}", "has no log_history"),
    "no_log.json": ('{"log_history": []}', "its log_history is empty"),
    "text.json": ('{"log_history": [1]}', "log_history[0]: must be an object, is int"),
    "no_step.json": (
        '{"log_history": [{"loss": 1}]}',
        "log_history[0]: step must be a whole number from 0 on, is missing",
    ),
    "half.jsonl": ('{"step": 1.5, "loss": 1}\n', "line 1: step must be a whole number"),
    "word.jsonl": (
        '{"step": 1, "loss": 1, "mean_token_accuracy": 1}\n{"step": 2, "loss": "high"}\n',
        "line 2: loss is 'high', not a number",
    ),
    "other.jsonl": ('{"step": 1, "foo": 1}\n', "has no metric that trl or we have, but foo"),
    "words.jsonl": ('{"step": 1, "foo": "x"}\n', "holds no number"),
    "unclear.jsonl": ('{"step": 1, "loss": 1}\n', "could be a run of several kinds; it has loss"),
    "grpo.jsonl": ('{"step": 1, "loss": 1, "frac_reward_zero_std": 1}\n', "is a run of GRPO"),
    "kto.jsonl": ('{"step": 1, "kl": 1, "rewards/chosen": 1}\n', "is a run of KTO, which is not"),
    "dpo.jsonl": (
        '{"step": 1, "rewards/margins": 1}\n',
        "has no step of dpo; the stages it has: sft",
    ),
    "both.jsonl": (
        '{"step": 1, "min_reward": 1, "rewards/margins": 1}\n',
        "has metrics of several: reward (min_reward); dpo (rewards/margins)",
    ),
    "twice.jsonl": ('{"step": 1, "loss": 1, "train/loss": 1}\n', "has both loss and train/loss"),
    "twice.csv": ("step,loss,loss\n1,1,1\n", "has the column loss twice"),
    "ragged.csv": ("step,loss\n1,1\n2\n", "line 3: has 1 cells, and the first line has 2"),
    "quote.csv": ('step,loss\n1,"1\n', "is no CSV"),
    "board.csv": ("Wall time,Step,Value\n1,1,1\n", "does not name its metric"),
    "runs.csv": ("Step,a - loss,b - loss\n1,1,1\n", "holds 2 runs (a, b)"),
    "no_name.jsonl": ('{"step": 1, "name": "a", "value": 1}\n{"step": 2}\n', "line 2: has no name"),
    "log.txt": ("loss 1", "must be a trainer_state.json or end in .csv or .jsonl"),
    "only_ours.jsonl": (
        '{"step": 1, "mean_token_accuracy": 1}\n',
        "none of its metrics is one that",
    ),
    "latin.csv": ("step,lo\udce4\n", "is not UTF-8"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_one_line(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content.encode(errors="surrogateescape"))
    ours = run_folder(tmp_path / "ours", "sft", [{"loss": 1.0}])
    with pytest.raises(BadInput) as caught:
        finished.compare(str(tmp_path / name), str(ours), None, tmp_path / "out")
    assert message in str(caught.value)
    if name != "dpo.jsonl":
        assert str(caught.value).startswith(str(tmp_path / name))
    assert not (tmp_path / "out").exists()


def test_errors_of_what_is_asked_for(tmp_path: Path) -> None:
    ours = run_folder(tmp_path / "ours", "sft", [{"loss": 1.0}])
    for theirs, run, stage, message in [
        (tmp_path / "no", ours, None, "no such file or folder"),
        (tmp_path, ours, None, "has no trainer_state.json, nor has a checkpoint-* in it"),
        (ours, ours, None, "it is a run of ours, so give it as --run"),
        (RECORDED / "sft_1_16", tmp_path, None, "so it is not a run; give its folder"),
        (RECORDED / "sft_1_16", ours, "xyz", "--stage xyz is not known; there are sft"),
        (RECORDED / "dpo_1_16", ours, "sft", "--stage sft, but by its metrics it is dpo (logits/"),
    ]:
        with pytest.raises(BadInput, match=re.escape(message)):
            finished.compare(str(theirs), str(run), stage, tmp_path / "out")


def test_an_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    ours = run_folder(tmp_path / "ours", "sft", [{"loss": 1.0}])
    file = table(tmp_path / "log.jsonl", {"step": 1, "loss": 1.0})
    with pytest.raises(BadInput, match=r"--out .*log\.jsonl: cannot be written: File exists"):
        finished.compare(file, str(ours), "sft", Path(file))


def test_the_command() -> None:
    options = parse_options("", ["--trl_run", "a", "--run", "b", "--stage", "dpo", "--out", "c"])
    assert (options.trl_run, options.run, options.stage, options.out) == ("a", "b", "dpo", "c")
    for arguments, message in [
        (["--trl_run", "a"], "--trl_run needs a run of ours beside it"),
        (["--run", "a"], "--run is the run beside a --trl_run"),
        (["--trl_run", "a", "--run", "b", "--model", "c"], "leave --model out"),
        (["--trl_run", "a", "--run", "b", "--stage", "dpo", "--beta", "1"], "leave --beta out"),
    ]:
        with pytest.raises(BadInput, match=message):
            parse_options("", arguments)


README = Path(finished.__file__).with_name("README.md").read_text(encoding="utf-8")
VERL = [  # the run of ours that the README's is compared with
    {"policy_loss": -0.0118, "update_k1": 0.0012, "kl": 0.0, "value_loss": 0.7512, "score": 0.4},
    {"policy_loss": -0.0306, "update_k1": 0.0029, "kl": 0.23, "value_loss": 0.4987, "score": 0.55},
    {"policy_loss": -0.0243, "update_k1": 0.0021, "kl": 0.61, "value_loss": 0.3301, "score": 0.7},
    {"policy_loss": -0.0151, "update_k1": 0.0018, "kl": 0.83, "value_loss": 0.2417, "score": 0.8},
]


def test_the_readme_brings_another_codebase_into_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    *_, log, output = [text for kind, text in blocks if kind == "text"]
    (code,) = [text for kind, text in blocks if kind == "python" and "verl.log" in text]
    assert len(code.splitlines()) <= 35
    monkeypatch.chdir(tmp_path)
    Path("verl.log").write_text(log)
    exec(compile(code, "README.md", "exec"), {})
    rows = [{**row, "response_length": 20.0 + 2 * i, "k1": 0.0} for i, row in enumerate(VERL)]
    Path("runs").mkdir()
    run_folder(Path("runs/ppo"), "ppo", rows)
    finished.compare("verl.jsonl", "runs/ppo", None, Path())
    assert capsys.readouterr().out == output
