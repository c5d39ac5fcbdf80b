"""Record what unmodified trl 1.16.0 computes in KTO, for the tests beside this file to replay.

    PYTHON tests/parity/record_kto_1_16.py            # writes tests/parity/recorded/
    PYTHON tests/parity/record_kto_1_16.py --check    # compares with what is there

PYTHON is one that has trl 1.16.0, see `recorder_1_16`.

trl takes the rows as they come, since its mismatched pairs are made of neighbours. So a run's rows
are given to it epoch after epoch in the order in which a shuffled run would take them, as one
epoch.
"""

from __future__ import annotations

import copy
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from recorder_1_16 import GPT2, PLAIN, SEED, WORDS, Facts, Fixture, main, random_lm, tokenizer

# isort: split
# From here on what needs the environment and the path that are set there.
import torch
from compare.theirs.float64 import float64, isolated
from datasets import Dataset
from torch import nn
from trl import KTOConfig, KTOTrainer

LABELS = [True, False, True, True, False, True, False, True, True, True, False, False]
BATCHES = [[0, 1, 2, 3], [0, 2, 3, 5], [1, 4, 6, 10], [8, 9, 7], [4, 5], list(range(12))]

DEFAULT: Facts = {
    "per_device_train_batch_size": 4,
    "learning_rate": 3e-5,  # Adam makes weights of the rounding of gradients that are zero
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "max_grad_norm": 0.6,  # shorter than some of the gradients and longer than others
    "beta": 0.3,
    "desirable_weight": 1.3,
    "undesirable_weight": 0.8,
    "loss_type": "kto",
}
# A run's own keys: how many of the rows it has, and how often.
ROWS, EPOCHS = "rows", "epochs"
RUNS: dict[str, Facts] = {
    "kto": {ROWS: 12, EPOCHS: 2},
    "a smaller last batch": {ROWS: 10, EPOCHS: 1, "precompute_ref_log_probs": True, "beta": 0.6},
    "apo_zero_unpaired": {ROWS: 12, EPOCHS: 2, "loss_type": "apo_zero_unpaired"},
    # Where trl has other conventions.
    "two micro-batches": {
        ROWS: 12, EPOCHS: 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    },
    "one row left": {ROWS: 9, EPOCHS: 1},
}  # fmt: skip


def texts() -> list[Facts]:
    """Of unequal lengths, and no prompt twice. Prompts end in the space that trl joins them by."""
    rng = random.Random(SEED)
    rows: list[Facts] = []
    for i, label in enumerate(LABELS):
        prompt = [WORDS[i % 8], *rng.choices(WORDS, k=i // 8 + rng.randint(0, 3))]
        response = rng.choices(WORDS, k=rng.randint(1, 6))
        rows.append({"prompt": " ".join(prompt) + " ", "completion": " ".join(response)})
        rows[-1]["label"] = label
    assert len({row["prompt"] for row in rows}) == len(rows)
    return rows


def shuffled(n: int, epochs: int) -> list[int]:
    """The rows that transformers' ``Trainer`` would take, were they not to stay in their order."""
    return [
        row
        for epoch in range(epochs)
        for row in torch.randperm(n, generator=torch.Generator().manual_seed(SEED + epoch)).tolist()
    ]


def policies() -> tuple[nn.Module, nn.Module]:
    """A policy, and a reference that is close enough for no sigmoid to saturate."""
    policy = random_lm(1)
    ref_policy = copy.deepcopy(policy)
    rng = torch.Generator().manual_seed(19)  # most KLs are above 0
    with torch.no_grad():
        for parameter in ref_policy.parameters():
            noise = torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype)
            parameter.add_(0.1 * noise)
    return policy, ref_policy


@contextmanager
def trainer_of(rows: Sequence[Facts], told: Facts) -> Iterator[Any]:
    """In float64, inside only."""
    policy, ref_policy = policies()
    with tempfile.TemporaryDirectory() as folder, isolated(), float64():
        yield KTOTrainer(
            model=policy,
            ref_model=ref_policy,
            args=KTOConfig(output_dir=folder, num_train_epochs=1, **PLAIN | told),
            processing_class=tokenizer(),
            train_dataset=Dataset.from_list(list(rows)),
        )


def batches(fixture: Fixture) -> list[Facts]:
    """Loss, gradient and metrics of single batches, by both losses."""
    found = []
    for kind in ("kto", "apo_zero_unpaired"):
        for numbers in BATCHES:
            rows = [texts()[i] for i in numbers]
            told = DEFAULT | {"loss_type": kind, "per_device_train_batch_size": len(rows)}
            with trainer_of(rows, told) as trainer:
                trainer.model.train()
                inputs = trainer.data_collator(list(trainer.train_dataset))
                loss = trainer.compute_loss(trainer.model, inputs)
                fixture.add_gradient(f"batch/{len(found)}", trainer.model, loss)
                metrics = {k: v[-1] for k, v in trainer._metrics["train"].items()}
            found.append({"loss_type": kind, "rows": numbers, "loss": loss.item(), **metrics})
    return found


def run(name: str, fixture: Fixture) -> Facts:
    """A whole run: what was told, the log of each step, the weights at its end."""
    told = DEFAULT | RUNS[name]
    order = shuffled(told[ROWS], told[EPOCHS])
    options = {key: value for key, value in told.items() if key not in (ROWS, EPOCHS)}
    with trainer_of([texts()[i] for i in order], options) as trainer:
        trainer.train()
        fixture.add_weights(f"after/{name}", trainer.model)
    return {
        "config": told,
        "order": order,
        "steps": [entry for entry in trainer.state.log_history if "loss" in entry],
    }


def pairs_in_their_order() -> list[list[bool]]:
    """The labels of each batch that trl makes of six pairs."""
    pairs = [{"prompt": f"{WORDS[i]} ", "chosen": "one ball", "rejected": "two"} for i in range(6)]
    with trainer_of(pairs, DEFAULT) as trainer:
        return [batch["label"].tolist() for batch in trainer.get_train_dataloader()]


def record() -> dict[str, Fixture]:
    fixture = Fixture(model=GPT2, seed=SEED, default=DEFAULT)
    for name, model in zip(("policy", "ref_policy"), policies(), strict=True):
        fixture.add_weights(name, model)
    with trainer_of(texts(), DEFAULT) as trainer:
        rows = list(trainer.train_dataset)
    for name in ("prompt_ids", "completion_ids"):
        fixture.add_rows(name, [torch.tensor(row[name], dtype=torch.int32) for row in rows])
    fixture.facts["labels"] = [row["label"] for row in rows]
    fixture.facts["batches"] = batches(fixture)
    fixture.facts["runs"] = {name: run(name, fixture) for name in RUNS}
    fixture.facts["pairs"] = pairs_in_their_order()
    return {"kto": fixture}


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", record))
