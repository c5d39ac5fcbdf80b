"""Record what unmodified trl 1.16.0 computes of DPO's family, for the tests beside this file.

    PYTHON tests/parity/record_preference_1_16.py            # writes tests/parity/recorded/
    PYTHON tests/parity/record_preference_1_16.py --check    # compares with what is there

PYTHON is one that has trl 1.16.0, see `recorder_1_16`. The family is `DPOTrainer` with its losses,
and `CPOTrainer` and `ORPOTrainer`, which trl calls experimental.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from recorder_1_16 import GPT2, PLAIN, SEED, WORDS, Facts, Fixture, main, random_lm, tokenizer

# isort: split
# From here on what needs the environment and the path that are set there.
import numpy as np
import torch
from compare.theirs.float64 import float64, isolated
from datasets import Dataset
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

TRAINERS = {
    "dpo": (DPOTrainer, DPOConfig),
    "cpo": (CPOTrainer, CPOConfig),
    "orpo": (ORPOTrainer, ORPOConfig),
}
PAIRS = 12
BATCHES = [[0], [1, 2, 3], list(range(PAIRS))]

# A run's own keys, beside trl's options: which trainer, and which rows.
TRAINER, ROWS = "trainer", "rows"

DEFAULT: Facts = {
    ROWS: "ragged",
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 3e-5,  # low, since Adam divides the rounding of zero gradients by 1e-8
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "max_length": 16,
}
DPO = {TRAINER: "dpo", "beta": 0.3}
RUNS: dict[str, Facts] = {
    "sigmoid": DPO | {"loss_type": ["sigmoid"]},
    "sigmoid, smoothing": DPO | {"loss_type": ["sigmoid"], "label_smoothing": 0.2},
    "sigmoid_norm": DPO | {"loss_type": ["sigmoid_norm"], "beta": 2.0},
    "ipo": DPO | {"loss_type": ["ipo"]},
    "hinge": DPO | {"loss_type": ["hinge"]},
    "robust": DPO | {"loss_type": ["robust"], "label_smoothing": 0.2},
    "apo_zero": DPO | {"loss_type": ["apo_zero"]},
    "apo_down": DPO | {"loss_type": ["apo_down"]},
    "sigmoid and sft": DPO
    | {ROWS: "even", "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    "sigmoid and sft, ragged": DPO | {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    "cpo": {TRAINER: "cpo", ROWS: "even", "beta": 0.2, "cpo_alpha": 1.0},
    "cpo without sft": {TRAINER: "cpo", "beta": 0.2, "cpo_alpha": 0.0},
    "simpo": {
        TRAINER: "cpo",
        "loss_type": "simpo",
        "beta": 2.0,
        "simpo_gamma": 0.5,
        "cpo_alpha": 0.0,
    },
    "orpo": {TRAINER: "orpo", ROWS: "even", "beta": 0.2},
    "orpo, ragged": {TRAINER: "orpo", "beta": 0.2},
}


def texts(rows: str) -> list[Facts]:
    """Pairs of random texts, ragged; or with a prompt of one word and chosen responses of three,
    so that no convention of trl on what a mean is of makes a difference."""
    rng = np.random.default_rng(SEED)

    def text(longest: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(1, longest)))

    found = []
    for _ in range(PAIRS):
        even = " ".join(rng.choice(WORDS, 3))
        prompt, chosen, rejected = text(5), text(6), text(6)
        if rows == "even":
            prompt, chosen = prompt.split()[0], even
        found.append(
            {"prompt": f"{prompt} ", "chosen": f"red {chosen}", "rejected": f"blue {rejected}"}
        )
    return found


@contextmanager
def trainer_of(told: Facts) -> Iterator[Any]:
    kind, config = TRAINERS[told[TRAINER]]
    # Outside of float64, within which other random numbers are drawn.
    model, ref_model = random_lm(1), random_lm(2)
    with tempfile.TemporaryDirectory() as folder, isolated(), float64():
        options = {key: value for key, value in told.items() if key not in (TRAINER, ROWS)}
        references = {"ref_model": ref_model} if told[TRAINER] == "dpo" else {}
        yield kind(
            model=model,
            args=config(output_dir=folder, **PLAIN, **options),
            processing_class=tokenizer(),
            train_dataset=Dataset.from_list(texts(told[ROWS])),
            **references,
        )


def ids(trainer: Any) -> dict[str, list[torch.Tensor]]:
    """Prompts and responses as trl has encoded them."""
    rows = list(trainer.train_dataset)
    if "chosen_ids" in rows[0]:
        names = {"prompts": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids"}
        return {ours: [torch.tensor(row[name]) for row in rows] for ours, name in names.items()}
    found: dict[str, list[torch.Tensor]] = {"prompts": [], "chosen": [], "rejected": []}
    for row in rows:
        for side in ("chosen", "rejected"):
            whole, labels = (
                torch.tensor(row[f"{side}_{name}"]) for name in ("input_ids", "labels")
            )
            found[side].append(whole[labels != -100])
        found["prompts"].append(whole[labels == -100])
    return found


def runs() -> Fixture:
    """Of each run the loss and gradient of batches, and a whole ``train()``."""
    fixture = Fixture(gpt2=GPT2, seed=SEED, batches=BATCHES, runs={})
    fixture.add_weights("policy", random_lm(1))
    fixture.add_weights("ref_policy", random_lm(2))
    for name, own in RUNS.items():
        told = DEFAULT | own
        with trainer_of(told) as trainer:
            for part, rows in ids(trainer).items():
                fixture.add_rows(f"{told[TRAINER]}/{told[ROWS]}/{part}", rows)
            losses = []
            for i, batch in enumerate(BATCHES):
                trainer.model.train()
                inputs = trainer.data_collator([trainer.train_dataset[row] for row in batch])
                loss = trainer.compute_loss(trainer.model, inputs)
                losses.append(loss.item())
                if i == 1:
                    fixture.add_gradient(f"{name}/gradient", trainer.model, loss)
        with trainer_of(told) as trainer:
            trainer.train()
            fixture.add_weights(f"{name}/trained", trainer.model)
            steps = [
                {k: v for k, v in entry.items() if k not in ("step", "epoch")}
                for entry in trainer.state.log_history
                if "loss" in entry
            ]
        fixture.facts["runs"][name] = {"config": told, "losses": losses, "steps": steps}
    return fixture


CASES = 100


def functions() -> Fixture:
    """The losses of random log-probabilities, where trl has a function of them."""
    fixture = Fixture()
    rng = np.random.default_rng(SEED)
    for name in ("cpo without sft", "simpo", "orpo"):
        cases = []
        with trainer_of(DEFAULT | RUNS[name]) as trainer:
            of = trainer.odds_ratio_loss if name == "orpo" else trainer.cpo_loss
            for _ in range(CASES):
                # From all but certain to very improbable.
                chosen, rejected = torch.tensor(-(10 ** rng.uniform(-3, 1.3, (2, 5))))
                losses, chosen_rewards, rejected_rewards, *_ = of(chosen, rejected)
                cases.append(
                    {
                        "chosen": chosen,
                        "rejected": rejected,
                        "losses": -losses if name == "orpo" else losses,  # trl subtracts them
                        "chosen_rewards": chosen_rewards,
                        "rejected_rewards": rejected_rewards,
                    }
                )
        fixture.add_cases(name, cases)
    return fixture


if __name__ == "__main__":
    sys.exit(
        main(
            str(__doc__),
            lambda: {"preference": runs(), "preference_functions": functions()},
        )
    )
