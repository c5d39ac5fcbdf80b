"""Record what unmodified trl 1.16.0 computes in GRPO and RLOO, for the tests beside this file.

    PYTHON tests/parity/record_grpo_1_16.py            # writes tests/parity/recorded/
    PYTHON tests/parity/record_grpo_1_16.py --check    # compares with what is there

PYTHON is one that has trl 1.16.0, see `recorder_1_16`.

In the runs trl samples, scores and learns by itself, and what it does is noted. In the single cases
`given` takes the place of its forward passes, so that each number that goes in is known.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from recorder_1_16 import (
    FIRST_WORD,
    GPT2,
    LLAMA,
    PAD,
    PLAIN,
    SEED,
    WORDS,
    Facts,
    Fixture,
    main,
    random_lm,
    tokenizer,
)

# isort: split
# From here on what needs the environment and the path that are set there.
import numpy as np
import torch
from compare.theirs.float64 import float64, isolated
from datasets import Dataset
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

Trainer = GRPOTrainer | RLOOTrainer

LONGEST = 6  # tokens of a response

# A run's own keys, beside trl's options: which model, and whether its prompts are of one length.
# trl pads prompts on the left and tells a model no positions, so that GPT-2 scores a shorter prompt
# at other ones than it was sampled at.
MODEL, PROMPTS = "model", "prompts"

# Of each run, what differs from `DEFAULT`. The options stand in pairs, each beside several others.
DEFAULT: Facts = {
    MODEL: "gpt2",
    PROMPTS: "equal",
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "max_completion_length": LONGEST,
    "temperature": 0.7,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "adam_epsilon": 1e-5,  # a smaller one makes weights of rounding where gradients are zero
    "num_train_epochs": 1,
}
GRPO_DEFAULT = DEFAULT | {
    "beta": 0.0,
    "use_bias_correction_kl": False,  # trl's own default is True, see "corrected KL"
    "loss_type": "grpo",
    "importance_sampling_level": "token",
    "scale_rewards": "group",
    "epsilon": 0.1,
    "max_grad_norm": 0.25,
}
# Four micro-batches of 4 in a pass over 16 responses: two optimizer steps.
TWO_STEPS = {"per_device_train_batch_size": 4, "steps_per_generation": 4}
ONE_MICRO_BATCH = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1,
                   "steps_per_generation": 1}  # fmt: skip
GRPO_RUNS: dict[str, Facts] = {
    "grpo": {"beta": 0.2},
    "grpo, sequence": {
        "importance_sampling_level": "sequence",
        "scale_rewards": "batch",
        "epsilon": 0.03,
        "epsilon_high": 0.06,
    },
    "grpo, two steps, cut masked": TWO_STEPS | {
        "beta": 0.1,
        "scale_rewards": "none",
        "mask_truncated_completions": True,
    },
    "dr_grpo": TWO_STEPS | {"loss_type": "dr_grpo", "scale_rewards": "none", "epsilon_high": 0.2},
    "dr_grpo, sequence": {
        "loss_type": "dr_grpo",
        "importance_sampling_level": "sequence",
        "beta": 0.1,
        "epsilon": 0.03,
    },
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.2, "mask_truncated_completions": True},
    "dapo, KL": {"loss_type": "dapo", "scale_rewards": "batch", "beta": 0.1},
    "bnpo": ONE_MICRO_BATCH | {
        "loss_type": "bnpo",
        "scale_rewards": "none",
        "beta": 0.1,
    },
    "unequal prompts, Llama": {MODEL: "llama", PROMPTS: "unequal", "beta": 0.1},
    # Where trl has other conventions.
    "unequal prompts": {PROMPTS: "unequal"},
    "corrected KL": {"beta": 0.2, "use_bias_correction_kl": True},
    "dapo, two steps": TWO_STEPS | {"loss_type": "dapo"},
    "bnpo, two micro-batches": {"loss_type": "bnpo"},
}  # fmt: skip
RLOO_DEFAULT = DEFAULT | {
    "beta": 0.1,
    "epsilon": 0.2,
    "normalize_advantages": False,
    "max_grad_norm": 2.0,
}
RLOO_RUNS: dict[str, Facts] = {
    "rloo": {},
    "rloo, two steps": TWO_STEPS | {"beta": 0.0, "epsilon": 0.1, "epsilon_high": 0.3},
    "rloo, unequal prompts, Llama": {MODEL: "llama", PROMPTS: "unequal"},
    "rloo, clipped rewards": {"reward_clip_range": [-0.5, 0.5], "beta": 0.3},
    # Where trl has another option.
    "normalised": {"normalize_advantages": True},
}


# What both trainers are given


def prompts(lengths: str) -> list[str]:
    """12 of three words, or of two to five; three of them begin with "red"."""
    rng = np.random.default_rng(SEED)
    more = [2] * 12 if lengths == "equal" else rng.integers(1, 5, 12).tolist()
    return [
        " ".join(["red" if i % 4 == 0 else "blue", *rng.choice(WORDS, n)])
        for i, n in enumerate(more)
    ]


def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Something of every token, and the same for all responses to a prompt that is red."""
    return [
        0.5 if prompt.startswith("red") else sum((id_ - 5) / 8 for id_ in ids)
        for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]


@contextmanager
def trainer_of(kind: type[Trainer], told: Facts) -> Iterator[tuple[Trainer, nn.Module]]:
    """A trainer, and its reference: trl reads it from the folder that the model has come from."""
    config = {GRPOTrainer: GRPOConfig, RLOOTrainer: RLOOConfig}[kind]
    model, ref_model = (random_lm(seed, kind=told[MODEL]) for seed in (1, 2))
    with tempfile.TemporaryDirectory() as folder, isolated(), float64():
        ref_model.save_pretrained(folder)
        model.config._name_or_path = folder
        arguments = config(
            output_dir=folder,
            # A last word that is the pad counts as an end in trl.
            generation_kwargs={"suppress_tokens": [PAD]},
            **PLAIN,
            **{key: value for key, value in told.items() if key not in (MODEL, PROMPTS)},
        )
        dataset = Dataset.from_list([{"prompt": prompt} for prompt in prompts(told[PROMPTS])])
        trainer = kind(model, reward, arguments, dataset, processing_class=tokenizer())
        yield trainer, ref_model


# Whole runs


def runs(kind: type[Trainer], default: Facts, of: dict[str, Facts]) -> Fixture:
    """Three rollouts of each run: tokens, scores and advantages, the loss of each micro-batch and
    what was logged after each step, and the weights at the end."""
    fixture = Fixture(gpt2=GPT2, llama=LLAMA, words=WORDS, runs={})
    for name, own in of.items():
        told = default | own
        with trainer_of(kind, told) as (trainer, ref_model):
            fixture.add_weights(f"{told[MODEL]}/policy", trainer.model)
            fixture.add_weights(f"{told[MODEL]}/ref_policy", ref_model)
            rollouts, losses = noted(trainer, fixture, name)
            trainer.train()
            fixture.add_weights(f"{name}.trained", trainer.model)
            steps = [
                {k: v for k, v in entry.items() if k not in ("step_time", "epoch", "step")}
                for entry in trainer.state.log_history
                if "loss" in entry
            ]
        fixture.facts["runs"][name] = {
            "config": told,
            "rollouts": len(rollouts),
            "losses": losses,
            "steps": steps,
        }
    return fixture


def noted(trainer: Trainer, fixture: Fixture, run: str) -> tuple[list[Facts], list[Facts]]:
    """Have a trainer note its rollouts, and of each micro-batch which rows it has and its loss."""
    rollouts: list[Facts] = []
    losses: list[Facts] = []
    act, compute_loss = trainer._generate_and_score_completions, trainer._compute_loss

    def acting(inputs: Any) -> Any:
        found = act(inputs)
        name = f"{run}/{len(rollouts)}"
        prompts = zip(found["prompt_ids"], found["prompt_mask"].bool(), strict=True)
        fixture.add_rows(f"{name}.prompts", [ids[kept] for ids, kept in prompts])
        # PAD is never sampled, so it is padding.
        fixture.add_rows(f"{name}.responses", [ids[ids != PAD] for ids in found["completion_ids"]])
        scores = list(trainer._logs["rewards"]["reward"])[-len(found["advantages"]) :]
        fixture.tensors[f"{name}.scores"] = torch.tensor(scores)
        fixture.tensors[f"{name}.advantages"] = found["advantages"].clone()
        for key in ("old_per_token_logps", "old_logps", "ref_per_token_logps"):
            if found.get(key) is not None:
                fixture.tensors[f"{name}.{key}"] = found[key].clone()
        rollouts.append(found)
        return found | {"row": torch.arange(len(scores))}  # is shuffled with the rest

    def learning(model: Any, inputs: Any) -> Tensor:
        loss = compute_loss(model, inputs)
        losses.append({"rows": inputs["row"].tolist(), "loss": loss.item()})
        return loss

    trainer._generate_and_score_completions = acting
    trainer._compute_loss = learning
    return rollouts, losses


# Single cases


GRPO_LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo"]
LEVELS = ["token", "sequence"]
SCALES = ["group", "batch", "none"]
CASES = 120


def functions() -> Fixture:
    """Losses and advantages of random cases, whose padding holds random numbers too."""
    fixture = Fixture(losses=GRPO_LOSSES, levels=LEVELS, scales=SCALES)
    rng = np.random.default_rng(SEED)
    with trainer_of(GRPOTrainer, GRPO_DEFAULT | ONE_MICRO_BATCH) as (trainer, _):
        cases = [grpo_loss_case(rng, trainer, i) for i in range(CASES)]
        fixture.add_cases("grpo_loss", cases)
        cases = [grpo_advantages_case(rng, trainer) for _ in range(CASES)]
        fixture.add_cases("grpo_advantages", cases)
    with trainer_of(RLOOTrainer, RLOO_DEFAULT | ONE_MICRO_BATCH) as (trainer, _):
        fixture.add_cases("rloo_loss", [rloo_loss_case(rng, trainer) for _ in range(CASES)])
        cases = [rloo_advantages_case(rng, trainer) for _ in range(CASES)]
        fixture.add_cases("rloo_advantages", cases)
    return fixture


def given(logprobs: Tensor) -> Callable[..., Any]:
    """In the place of a forward pass: these log-probabilities, and entropies that are not used."""
    return lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None)


def normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape))


def random_mask(rng: np.random.Generator) -> Tensor:
    """Rows of unequal lengths. Shape ``(B, T)``."""
    rows, width = rng.integers(1, 6), rng.integers(1, 7)
    lengths = torch.from_numpy(rng.integers(1, width + 1, rows))
    return torch.arange(int(width)) < lengths[:, None]


def micro_batch(mask: Tensor, **more: Any) -> Facts:
    """What a loss is computed from; the ids only say how wide it is."""
    ids, prompt = torch.full(mask.shape, FIRST_WORD), torch.full((len(mask), 1), FIRST_WORD)
    return {
        **{"prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt)},
        **{"completion_ids": ids, "completion_mask": mask.long(), **more},
    }


def grpo_loss_case(rng: np.random.Generator, trainer: Any, i: int) -> Facts:
    """With the gradient by the log-probabilities. Every fourth case has a row that is masked."""
    mask = random_mask(rng)
    if i % 4 == 0 and len(mask) > 1:
        mask[0] = False
    kind, level = int(rng.integers(len(GRPO_LOSSES))), int(rng.integers(2))
    clip, clip_high, kl_coef = rng.uniform(0.05, 0.4, 3)
    kl_coef = kl_coef if rng.random() < 0.7 else 0.0
    trainer.loss_type, trainer.importance_sampling_level = GRPO_LOSSES[kind], LEVELS[level]
    trainer.epsilon_low, trainer.epsilon_high, trainer.beta = clip, clip_high, kl_coef
    trainer.max_completion_length = longest = int(rng.integers(mask.shape[1], 10))
    trainer.current_gradient_accumulation_steps = 1
    logprobs, ref_logprobs = (-normal(rng, *mask.shape).exp() for _ in range(2))
    new_logprobs = (logprobs + 0.4 * normal(rng, *mask.shape)).requires_grad_()
    advantages = normal(rng, len(mask))
    trainer._get_per_token_logps_and_entropies = given(new_logprobs)
    inputs = micro_batch(
        mask,
        advantages=advantages,
        old_per_token_logps=logprobs,
        ref_per_token_logps=ref_logprobs,
        num_items_in_batch=mask.sum(),
    )
    loss = trainer._compute_loss(trainer.model.train(), inputs)
    loss.backward()
    return {
        **{"mask": mask, "kind": kind, "level": level, "longest": longest},
        **{"clip": clip, "clip_high": clip_high, "kl_coef": kl_coef},
        **{"new_logprobs": new_logprobs, "logprobs": logprobs, "ref_logprobs": ref_logprobs},
        **{"advantages": advantages, "loss": loss, "gradient": new_logprobs.grad},
    }


def rloo_loss_case(rng: np.random.Generator, trainer: Any) -> Facts:
    """With the gradient by the log-probabilities."""
    mask, (clip, clip_high) = random_mask(rng), rng.uniform(0.05, 0.4, 2)
    trainer.epsilon_low, trainer.epsilon_high = clip, clip_high
    logprobs, advantages = -normal(rng, *mask.shape).exp(), normal(rng, len(mask))
    new_logprobs = (logprobs + 0.2 * normal(rng, *mask.shape)).requires_grad_()
    trainer._get_per_token_logps_and_entropies = given(new_logprobs)
    inputs = micro_batch(mask, advantages=advantages, old_logps=(logprobs * mask).sum(1))
    loss = trainer._compute_loss(trainer.model.train(), inputs)
    loss.backward()
    return {
        **{"mask": mask, "clip": clip, "clip_high": clip_high, "advantages": advantages},
        **{"new_logprobs": new_logprobs, "logprobs": logprobs},
        **{"loss": loss, "gradient": new_logprobs.grad},
    }


def random_scores(rng: np.random.Generator) -> tuple[Tensor, int]:
    """Of groups of a random size, the first of which has equal scores in every other case."""
    groups, size = int(rng.integers(1, 5)), int(rng.integers(2, 6))
    scores = 3 * normal(rng, groups, size) + 1
    if rng.random() < 0.5:
        scores[0] = 0.5
    return scores.flatten(), size


def judged(trainer: Any, scores: Tensor, size: int, **returned: Any) -> Tensor:
    """The advantages of given scores, by whatever stands between sampling and learning."""
    n = len(scores)
    texts = [{"prompt": "red"}] * n
    ids = [[FIRST_WORD, FIRST_WORD]] * n
    trainer.num_generations = size
    trainer._calculate_rewards = lambda *_: scores[:, None].clone()
    trainer._generate = lambda _: (ids, ids, *returned["more"])
    trainer.model.train()
    return trainer._generate_and_score_completions(texts)["advantages"]


def grpo_advantages_case(rng: np.random.Generator, trainer: Any) -> Facts:
    scores, size = random_scores(rng)
    scale = int(rng.integers(len(SCALES)))
    trainer.scale_rewards, trainer.beta = SCALES[scale], 0.0
    texts = ["red red"] * len(scores)
    advantages = judged(trainer, scores, size, more=(None, texts, None, {}, None, None))
    return {"scores": scores, "group_size": size, "scale": scale, "advantages": advantages}


def rloo_advantages_case(rng: np.random.Generator, trainer: Any) -> Facts:
    """With the KL of two tokens in the scores in some cases."""
    scores, size = random_scores(rng)
    trainer.beta = float(rng.random() < 0.5) * rng.random()
    logprobs, ref_logprobs = (-normal(rng, len(scores), 2).exp() for _ in range(2))

    def passed(model: Any, *_: Any, **__: Any) -> Any:
        found = logprobs if model is trainer.model else ref_logprobs
        return found, None, None

    trainer._get_per_token_logps_and_entropies = passed
    texts = ["red red"] * len(scores)
    advantages = judged(trainer, scores, size, more=(texts,))
    return {
        **{"scores": scores, "group_size": size, "kl_coef": trainer.beta},
        **{"logprobs": logprobs, "ref_logprobs": ref_logprobs, "advantages": advantages},
    }


def record() -> dict[str, Fixture]:
    """All that is recorded here."""
    return {
        "grpo_functions": functions(),
        "grpo": runs(GRPOTrainer, GRPO_DEFAULT, GRPO_RUNS),
        "rloo": runs(RLOOTrainer, RLOO_DEFAULT, RLOO_RUNS),
    }


if __name__ == "__main__":
    sys.exit(main(__doc__, record))
