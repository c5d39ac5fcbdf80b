"""The reward model against the ``RewardTrainer`` of trl 1.12.0: loss, gradient, whole runs."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small import bert, bert_syllables, gpt2_classifier, syllables
from tolerances import FP64
from torch import Tensor
from trainer_harness import (
    OURS,
    SEED,
    SHIMMED,
    THEIRS,
    VERSION,
    Parity,
    Row,
    compare_runs,
    float64,
    gradients,
    import_trl,
    largest_gap,
    options,
    preference_rows,
    steps,
    their_batch,
    weights,
)

from rlhf_min import reward
from rlhf_min.reward_model import RewardModel

trl = import_trl()
from datasets import Dataset  # noqa: E402
from trl.trainer.reward_trainer import DataCollatorForPreference  # noqa: E402

CENTER_COEF = 0.05
CONFIG = reward.RewardConfig(
    **OURS,
    schedule="linear",
    center_coef=CENTER_COEF,
    max_tokens=80,  # other micro-batches than trl's 2 pairs
)
# Ours and trl's. Ours alone: ties. trl's alone: min_, mean_, max_reward, num_tokens.
PER_STEP = {
    "loss": "loss",
    "accuracy": "accuracy",
    "margin": "margin",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
}
SEGMENTS = "BERT's segments, which trl leaves out"
EQUAL = "micro-batches of equal size"
BERT, GPT2 = bert(1), gpt2_classifier(1)


def reward_model(kind: str) -> RewardModel:
    """Of BERT, which reads prompt and response as two segments, or of GPT-2, which reads one."""
    if kind == "bert":
        return RewardModel(copy.deepcopy(BERT), bert_syllables())
    tokenizer = syllables()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]  # as GPT-2's own: no segments
    return RewardModel(copy.deepcopy(GPT2), tokenizer)


class Segments(DataCollatorForPreference):
    """trl's collator and BERT's segments, of which trl has no notion: after the first [SEP], 1."""

    def torch_call(self, examples: list[Row]) -> dict[str, Tensor]:
        batch = super().torch_call(examples)
        ends = (batch["input_ids"] == bert_syllables().sep_token_id).int()
        behind = (ends.cumsum(1) - ends).clamp(max=1)
        return {**batch, "token_type_ids": behind * batch["attention_mask"]}


def their_trainer(kind: str, ours: RewardModel, rows: list[Row], folder: Path, **own: Any) -> Any:
    """trl's trainer with the settings of `CONFIG`.

    It encodes the texts for GPT-2 by itself; for BERT, whose pairs it cannot encode, it is given
    the ids that our model reads.
    """
    settings = {
        "lr_scheduler_type": "linear",
        "center_rewards_coefficient": CENTER_COEF,
    }
    if kind == "bert":
        data = [
            {f"{side}_ids": our_ids(ours, row, side) for side in ("chosen", "rejected")}
            | ({"margin": row["margin"]} if "margin" in row else {})
            for row in rows
        ]
        collator: Any = Segments(pad_token_id=ours.tokenizer.pad_token_id)
    else:
        data, collator = rows, None
    return trl.RewardTrainer(
        model=copy.deepcopy(BERT if kind == "bert" else GPT2),
        args=trl.RewardConfig(**options(folder, **(THEIRS | settings | own))),
        processing_class=copy.deepcopy(ours.tokenizer),
        train_dataset=Dataset.from_list(data),
        data_collator=collator,
    )


def our_ids(model: RewardModel, row: Row, side: str) -> list[int]:
    return model.encode([row["prompt"]], [row[side]]).input_ids[0].tolist()


def same_inputs(model: RewardModel, rows: list[Row], trainer: Any) -> bool:
    """What both models are given for a whole batch, names, padding and segments included."""
    theirs = trainer.data_collator(list(trainer.train_dataset))
    prompts = [row["prompt"] for row in rows] * 2
    ours = model.encode(prompts, [row[side] for side in ("chosen", "rejected") for row in rows])
    return ours.keys() == theirs.keys() - {"margin"} and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


def with_margins(rows: list[Row]) -> list[Row]:
    """Margins that float32, in which trl keeps them, holds without rounding."""
    return [{**row, "margin": i % 4 / 4} for i, row in enumerate(rows)]


@pytest.mark.eq("reward")
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            kind,
            marks=pytest.mark.parity(
                *("reward.batch_loss", "RewardTrainer.compute_loss", VERSION),
                **{"cases": 4, "of": "batches", "dtype": SHIMMED, "convention": convention},
            ),
        )
        for kind, convention in [("bert", SEGMENTS), ("gpt2", "")]
    ],
)
@pytest.mark.parametrize("center_coef", [0.0, CENTER_COEF])
@pytest.mark.parametrize("margins", [False, True], ids=["no margins", "margins"])
def test_loss_gradient_and_metrics_of_batches(
    kind: str, center_coef: float, margins: bool, tmp_path: Path, parity: Parity
) -> None:
    rows = preference_rows(12, seed=3)
    rows = with_margins(rows) if margins else rows
    batches = [[1], [1, 2], [3, 4, 5, 6], list(range(12))]
    ours = reward_model(kind)
    examples, _ = reward.prepare_pairs(ours, rows)
    with float64():
        centre = {"center_rewards_coefficient": center_coef or None}
        trainer = their_trainer(kind, ours, rows, tmp_path, **centre)
        theirs = [their_batch(trainer, batch) for batch in batches]
    assert same_inputs(ours, rows, trainer)
    for batch, (loss, metrics, gradient) in zip(batches, theirs, strict=True):
        found = reward.batch_loss(ours, [examples[i] for i in batch], center_coef=center_coef)
        parity(abs(found.loss.item() - loss))
        parity(abs(found.accuracy.item() - metrics["accuracy"]))
        parity(abs(found.margin.item() - metrics["margin"]))
        parity(largest_gap(gradients(ours.model, found.loss), gradient))


@pytest.mark.eq("reward")
@pytest.mark.parametrize(
    ("kind", "max_norm"),
    [
        pytest.param(
            *(kind, max_norm),
            marks=pytest.mark.parity(
                *("reward.train", "RewardTrainer.train", VERSION),
                **{"cases": 1, "of": "runs", "dtype": SHIMMED, "convention": convention},
            ),
        )
        for kind, max_norm, convention in [
            ("bert", 0.9, f"{SEGMENTS}; {EQUAL}"),
            ("gpt2", 3.0, EQUAL),
        ]
    ],
)
def test_whole_run(kind: str, max_norm: float, tmp_path: Path, parity: Parity) -> None:
    # 10 pairs, 2 in a micro-batch, 2 micro-batches in a step: the epoch's last step has one only.
    # The responses are of unequal length, which makes no difference: the mean is over pairs.
    rows = with_margins(preference_rows(10, seed=4))
    ours = reward_model(kind)
    start = weights(ours.model)
    examples, _ = reward.prepare_pairs(ours, rows)
    config = replace(CONFIG, max_grad_norm=max_norm)
    metrics = list(reward.train(ours, config, reward.new_state(ours, examples, config)))
    with float64():
        trainer = their_trainer(kind, ours, rows, tmp_path, max_grad_norm=max_norm)
        trainer.train()
    compare_runs(ours.model, start, metrics, trainer, PER_STEP, parity, max_norm=max_norm)


@pytest.mark.eq("reward")
def test_a_short_last_micro_batch_weighs_more_in_trl(tmp_path: Path) -> None:
    # 3 pairs in micro-batches of 2 and of 1: the single pair counts half of trl's step.
    rows = preference_rows(3, seed=5)
    ours = reward_model("gpt2")
    examples, _ = reward.prepare_pairs(ours, rows)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(SEED)).tolist()
    first, second = [examples[i] for i in order[:2]], [examples[i] for i in order[2:]]
    with torch.no_grad():
        two = reward.batch_loss(ours, first, center_coef=CENTER_COEF).loss.item()
        one = reward.batch_loss(ours, second, center_coef=CENTER_COEF).loss.item()
    assert abs(two - one) > 0.01
    with float64():
        trainer = their_trainer("gpt2", ours, rows, tmp_path, num_train_epochs=1)
        trainer.train()
    state = reward.new_state(ours, examples, CONFIG)
    our_loss = next(reward.train(ours, CONFIG, state))["loss"]
    assert abs(steps(trainer.state.log_history)[0]["loss"] - (two + one) / 2) <= FP64
    assert abs(our_loss - (2 * two + one) / 3) <= FP64
