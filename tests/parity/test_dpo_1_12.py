"""DPO against the ``DPOTrainer`` of trl 1.12.0: loss, gradient, metrics, and whole runs."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from small import SYLLABLES, gpt2, syllables
from tolerances import FP64
from trainer_harness import (
    DPO_METRICS,
    OURS,
    RATE,
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
    metric_gap,
    near,
    options,
    preference_rows,
    steps,
    their_batch,
    weights,
)

from rlhf_min import dpo
from rlhf_min.data import PreferenceExample
from rlhf_min.encoding.codec import Codec
from rlhf_min.optim import State
from rlhf_min.policy import Policy

trl = import_trl()
from datasets import Dataset  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of trl to transformers

CONFIG = dpo.DPOConfig(
    **OURS,
    schedule="cosine",
    max_grad_norm=3.0,  # shorter than some of the gradients and longer than others
    beta=0.3,
    max_tokens=50,  # other micro-batches than trl's 2 pairs
)
# Ours and trl's.
# trl's alone: entropy, mean_token_accuracy, logits/*, num_tokens.
PER_STEP = DPO_METRICS | {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
}

EQUAL = "micro-batches of equal size"

cached = pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])


# Copied by both sides, which switch the dropout off.
LM = gpt2(1, vocabulary=3 + len(SYLLABLES), dropout=0.1)
REF_LM = near(LM, seed=2)


class Ours:
    """Policy, reference, pairs and state of a run of ours."""

    def __init__(self, rows: list[Row], *, cached: bool, **own: Any) -> None:
        tokenizer = syllables()
        self.config = dpo.DPOConfig(**(vars(CONFIG) | {"cache_reference": cached} | own))
        self.policy = Policy(copy.deepcopy(LM), tokenizer)
        self.ref_policy = Policy(REF_LM, tokenizer).reference()
        self.pairs, _ = Codec(tokenizer, 16, 16).encode_preferences(rows)
        self.state: State = dpo.new_state(self.policy, self.ref_policy, self.pairs, self.config)

    def train(self) -> Any:
        return dpo.train(self.policy, self.ref_policy, self.config, self.state)

    def batch_loss(self, pairs: list[PreferenceExample]) -> Any:
        return dpo.batch_loss(self.policy, self.ref_policy, pairs, self.config)


def their_trainer(rows: list[Row], folder: Path, *, cached: bool, **own: Any) -> Any:
    """trl's trainer of the same models on the same texts, with the settings of `CONFIG`."""
    settings = {
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 3.0,
        "beta": 0.3,
        "loss_type": ["sigmoid"],
        "precompute_ref_log_probs": cached,
    }
    return trl.DPOTrainer(
        model=copy.deepcopy(LM),
        ref_model=copy.deepcopy(REF_LM),
        args=trl.DPOConfig(**options(folder, **(THEIRS | settings | own))),
        processing_class=syllables(),
        train_dataset=Dataset.from_list(rows),
    )


def same_ids(ours: list[PreferenceExample], theirs: Any) -> bool:
    """trl encodes the joined text, we encode prompt and response apart: here the same ids."""
    return all(
        getattr(pair, name).tolist() == row[name]
        for pair, row in zip(ours, theirs, strict=True)
        for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    )


@pytest.mark.eq("dpo")
@pytest.mark.parity(
    *("dpo.batch_loss", "DPOTrainer.compute_loss", VERSION), cases=4, of="batches", dtype=SHIMMED
)
@cached
def test_loss_gradient_and_metrics_of_batches(cached: bool, tmp_path: Path, parity: Parity) -> None:
    rows = preference_rows(12, seed=3)
    ours = Ours(rows, cached=cached)
    ours.policy.train()
    batches = [[0], [1, 2], [3, 4, 5, 6], list(range(12))]
    with float64():
        trainer = their_trainer(rows, tmp_path, cached=cached)
        theirs = [their_batch(trainer, batch) for batch in batches]
    assert same_ids(ours.pairs, trainer.train_dataset)
    assert all((x.ref_logprobs is not None) == cached for x in ours.state.cursor.examples)
    for batch, (loss, metrics, gradient) in zip(batches, theirs, strict=True):
        found = ours.batch_loss([ours.state.cursor.examples[i] for i in batch])
        means = {name: float(x.detach().double().mean()) for name, x in found._asdict().items()}
        assert 0.05 < found.loss < 3  # far from both saturations
        parity(abs(found.loss.item() - loss))
        parity(metric_gap(means, metrics, DPO_METRICS))
        parity(largest_gap(gradients(ours.policy.lm, found.loss), gradient))


@pytest.mark.eq("dpo")
@pytest.mark.parity(
    *("dpo.train", "DPOTrainer.train", VERSION),
    **{"cases": 1, "of": "runs", "dtype": SHIMMED, "convention": EQUAL},
)
@cached
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_whole_run(cached: bool, schedule: Any, tmp_path: Path, parity: Parity) -> None:
    # 10 pairs, 2 in a micro-batch, 2 micro-batches in a step: the epoch's last step has one only.
    # The responses are of unequal length, which makes no difference: DPO's mean is over pairs.
    rows = preference_rows(10, seed=4)
    ours = Ours(rows, cached=cached, schedule=schedule)
    start = weights(ours.policy.lm)
    metrics = list(ours.train())
    with float64():
        trainer = their_trainer(rows, tmp_path, cached=cached, lr_scheduler_type=schedule)
        trainer.train()
    norm = CONFIG.max_grad_norm
    compare_runs(ours.policy.lm, start, metrics, trainer, PER_STEP, parity, max_norm=norm)
    rates = [m["learning_rate"] for m in metrics]  # which have risen and fallen
    assert rates[0] == 0
    assert rates[2] == RATE > rates[3] > rates[5]


@pytest.mark.eq("dpo")
def test_a_short_last_micro_batch_weighs_more_in_trl(tmp_path: Path) -> None:
    # 11 pairs: the last step has micro-batches of 2 and of 1. trl takes the mean of their means,
    # so that the single pair counts half of the step; ours takes the mean over the three.
    rows = preference_rows(11, seed=5)
    ours = Ours(rows, cached=True, epochs=1)
    with float64():
        trainer = their_trainer(rows, tmp_path, cached=True, num_train_epochs=1, warmup_steps=1)
        trainer.train()
    logs = steps(trainer.state.log_history)
    run = ours.train()
    for theirs_now in logs[:2]:
        assert metric_gap(next(run), theirs_now, PER_STEP) <= FP64
    order = torch.randperm(11, generator=torch.Generator().manual_seed(SEED)).tolist()
    pairs = [ours.state.cursor.examples[i] for i in order[8:]]
    with torch.no_grad():
        two, one = (float(ours.batch_loss(part).loss) for part in (pairs[:2], pairs[2:]))
    assert abs(two - one) > 0.01
    assert abs(logs[2]["loss"] - (two + one) / 2) <= FP64
    assert abs(next(run)["loss"] - (2 * two + one) / 3) <= FP64
