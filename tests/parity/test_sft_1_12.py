"""SFT against the ``SFTTrainer`` of trl 1.12.0: loss on response tokens, gradient, whole runs."""

import copy
from pathlib import Path
from typing import Any

import pytest
from small import SYLLABLES, gpt2, syllables
from tolerances import FP32, FP64
from torch import tensor
from trainer_harness import (
    OURS,
    SHIMMED,
    THEIRS,
    VERSION,
    Parity,
    Row,
    compare_runs,
    demonstration_rows,
    float64,
    gradients,
    import_trl,
    isolated,
    largest_gap,
    options,
    their_batch,
    weights,
)

from rlhf_min import sft
from rlhf_min.data import SFTExample
from rlhf_min.encoding.codec import Codec
from rlhf_min.policy import Policy

trl = import_trl()
from datasets import Dataset  # noqa: E402

MAX_NORM = 3.0  # shorter than some of the gradients and longer than others
CONFIG = sft.SFTConfig(
    **OURS,
    schedule="cosine",
    max_grad_norm=MAX_NORM,
    max_tokens=25,  # other micro-batches than trl's 2 rows
)
# trl's alone: entropy, mean_token_accuracy, num_tokens.
PER_STEP = {"loss": "loss", "grad_norm": "grad_norm", "learning_rate": "learning_rate"}
LM = gpt2(1, vocabulary=3 + len(SYLLABLES))

loss_types = pytest.mark.parametrize("loss_type", ["chunked_nll", "nll"])


def our_side(rows: list[Row]) -> tuple[Policy, list[SFTExample]]:
    tokenizer = syllables()
    examples, _ = Codec(tokenizer, 16, 16).encode_demonstrations(rows)
    return Policy(copy.deepcopy(LM), tokenizer), examples


def their_trainer(rows: list[Row], folder: Path, **own: Any) -> Any:
    """trl's trainer of the same model on the same texts, with the settings of `CONFIG`."""
    settings = {
        "lr_scheduler_type": "cosine",
        "max_grad_norm": MAX_NORM,
        "completion_only_loss": True,
    }
    data = [{"prompt": row["prompt"], "completion": row["response"]} for row in rows]
    return trl.SFTTrainer(
        model=copy.deepcopy(LM),
        args=trl.SFTConfig(**options(folder, **(THEIRS | settings | own))),
        processing_class=syllables(),
        train_dataset=Dataset.from_list(data),
    )


def same_ids(ours: list[SFTExample], theirs: Any) -> bool:
    """The same rows, of which trl labels the response and EOS only."""
    return all(
        row["input_ids"] == x.prompt_ids.tolist() + x.response_ids.tolist()
        and row["labels"] == [-100] * len(x.prompt_ids) + x.response_ids.tolist()
        for x, row in zip(ours, theirs, strict=True)
    )


@pytest.mark.eq("sft")
@pytest.mark.parity(
    *("sft.batch_loss", "SFTTrainer.compute_loss", VERSION), cases=5, of="batches", dtype=SHIMMED
)
@loss_types
def test_loss_and_gradient_of_batches(loss_type: str, tmp_path: Path, parity: Parity) -> None:
    rows = demonstration_rows(12, seed=3)
    policy, examples = our_side(rows)
    batches = [[0], [1, 2], [3, 4, 5, 6], list(range(12))]
    with float64():
        trainer = their_trainer(rows, tmp_path, loss_type=loss_type)
        theirs = [their_batch(trainer, batch) for batch in batches]
        # A micro-batch of rows 1 and 2 in a step of 50 tokens.
        share = their_batch(trainer, [1, 2], num_items_in_batch=tensor(50))
    assert same_ids(examples, trainer.train_dataset)
    for batch, (their_loss, _, gradient) in zip(batches, theirs, strict=True):
        loss, count = sft.batch_loss(policy, [examples[i] for i in batch])
        assert count == sum(len(examples[i].response_ids) for i in batch)
        parity(abs(loss.item() - their_loss))
        parity(largest_gap(gradients(policy.lm, loss), gradient))
    loss, count = sft.batch_loss(policy, examples[1:3])
    parity(abs((loss * count / 50).item() - share.loss))
    parity(largest_gap(gradients(policy.lm, loss * count / 50), share.gradient))


@pytest.mark.eq("sft")
@loss_types
def test_float64_is_all_that_the_harness_changes(loss_type: str, tmp_path: Path) -> None:
    # trl left alone computes the loss of a float64 model in float32.
    rows = demonstration_rows(12, seed=3)
    policy, examples = our_side(rows)
    with isolated():
        trainer = their_trainer(rows, tmp_path, loss_type=loss_type)
        theirs = their_batch(trainer, list(range(12)))
    loss, _ = sft.batch_loss(policy, examples)
    assert FP64 < abs(loss.item() - theirs.loss) <= FP32
    assert FP64 < largest_gap(gradients(policy.lm, loss), theirs.gradient) <= FP32


@pytest.mark.eq("sft")
@pytest.mark.parity("sft.train", "SFTTrainer.train", VERSION, cases=1, of="runs", dtype=SHIMMED)
@loss_types
@pytest.mark.parametrize("n", [10, 11])
def test_whole_run(loss_type: str, n: int, tmp_path: Path, parity: Parity) -> None:
    # 2 rows in a micro-batch, 2 micro-batches in a step; the epoch's last step has one of 2 rows,
    # or one of 2 and one of 1. trl divides each sum by the tokens of the whole step, as we do, so
    # that neither unequal lengths nor a short micro-batch make a difference.
    rows = demonstration_rows(n, seed=4)
    policy, examples = our_side(rows)
    start = weights(policy.lm)
    metrics = list(sft.train(policy, CONFIG, sft.new_state(policy, examples, CONFIG)))
    with float64():
        trainer = their_trainer(rows, tmp_path, loss_type=loss_type)
        trainer.train()
    compare_runs(policy.lm, start, metrics, trainer, PER_STEP, parity, max_norm=MAX_NORM)
