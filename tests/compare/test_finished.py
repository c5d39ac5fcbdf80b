"""A finished run of trl's beside one of ours: recorded runs, which ours repeat, and hand values."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import record_trl_runs as recorded
from compare import finished
from record_trl_runs import BATCH, BETA, EPOCHS, HELDOUT, PAIRS, RATE, RECORDED, SEED
from tolerances import FP32
from transformers import GPT2ForSequenceClassification

from rlhf_min import dpo, reward, sft
from rlhf_min.encoding.codec import Codec
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
def test_a_recorded_run_and_the_same_run_of_ours(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = kind.partition("_")[0]
    ours = run_folder(tmp_path / "ours", finished.STAGES[stage], OURS[stage]())
    finished.compare(str(RECORDED / kind), str(ours), None, tmp_path / "out")
    assert "loss" in capsys.readouterr().out

    found = json.loads((tmp_path / "out" / finished.DATA).read_text())
    assert found["stage"] == stage
    metrics = {metric["name"]: metric for metric in found["metrics"]}
    held = {"eval/loss"} if stage == "sft" else {"eval/loss", "eval/accuracy", "eval/margin"}
    assert {"loss", "grad_norm", "learning_rate"} | held <= metrics.keys()
    for name, metric in metrics.items():
        n = 2 if name.startswith("eval/") else 3 if stage == "sft" else 6
        assert len(metric["common_steps"]) == n
        if name == "learning_rate" and kind == "dpo_0_11":
            assert metric["largest_gap"] == pytest.approx(RATE / 6)  # it logs the next step's
        elif name == "loss" and kind == "dpo_0_11":
            assert FP32 < metric["largest_gap"] < 0.5e-4 + FP32  # it logs four digits
        elif name == "accuracy" and stage == "dpo":
            # While the policy is the reference, the signs of the margins are rounding.
            assert metric["at_step"] == 1
            assert metric["ours"]["values"][1:] == metric["theirs"]["values"][1:]
        else:
            assert metric["largest_gap"] < FP32, name
