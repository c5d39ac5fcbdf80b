"""Record what unmodified trl 0.11.3 computes, for the tests beside this file to replay.

    python tests/parity/record_trl_0_11.py            # writes tests/parity/recorded/
    python tests/parity/record_trl_0_11.py --check    # compares with what is there

trl 0.11.3 is the last release with the legacy ``PPOTrainer.step`` and cannot live beside a current
transformers. Python 3.11 to 3.13 will do: one without the packages of requirements-trl-0.11.txt
makes a venv that has them and runs this file there.

Every model is a tiny random GPT-2 in float64. Tensors are recorded as safetensors, all else as JSON
in the same file's header; together they say what trl was given and what came out. trl is driven
through its own classes and functions; what is put in the place of something is all in `in_float64`,
`permutations`, `train_ppo_v2` (given prompts and responses, and the log) and `dpo_run` (the
loss of each micro-batch, which trl logs in four digits only).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.metadata
import io
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import venv
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

HERE = Path(__file__).parent
RECORDED = HERE / "recorded"
REQUIREMENTS = HERE / "requirements-trl-0.11.txt"
BOUND = 1e-9  # between two recordings: another processor's rounding, amplified by Adam


def pinned() -> dict[str, str]:
    """The packages that must be there in one version."""
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package).partition("+")[0]  # 2.13.0+cpu is 2.13.0
    except importlib.metadata.PackageNotFoundError:
        return None


def run_in_venv(folder: Path, arguments: Sequence[str]) -> int:
    """This file again, by a Python with the right packages; what is there already is kept."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(folder, with_pip=True)
    install = [str(python), "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, f"torch=={pinned()['torch']}"], check=True)
    subprocess.run([*install, "-r", str(REQUIREMENTS)], check=True)
    return subprocess.run([str(python), __file__, "--here", *arguments]).returncode


HAS_PACKAGES = all(installed(name) == version for name, version in pinned().items())
if HAS_PACKAGES:
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    import numpy as np
    import torch
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from datasets import Dataset
    from safetensors import safe_open
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from torch import Tensor, nn
    from torch.nn.functional import pad
    from transformers import (
        GPT2Config,
        GPT2ForSequenceClassification,
        GPT2LMHeadModel,
        PreTrainedModel,
        PreTrainedTokenizerFast,
    )
    from trl import (
        AutoModelForCausalLMWithValueHead,
        DPOConfig,
        DPOTrainer,
        PPOConfig,
        PPOTrainer,
        PPOv2Config,
        PPOv2Trainer,
        RewardConfig,
        RewardTrainer,
        core,
    )
    from trl.trainer import ppo_trainer, ppov2_trainer
    from trl.trainer.utils import AdaptiveKLController, OnPolicyConfig, RunningMoments, forward

Facts = dict[str, Any]

SEED = 7
END, PAD, FIRST_WORD, VOCABULARY = 0, 1, 2, 32
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
GPT2 = NO_DROPOUT | {
    "vocab_size": VOCABULARY,
    "n_positions": 24,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": END,
    "eos_token_id": END,
    "pad_token_id": PAD,
    "num_labels": 1,  # of those that classify
}


@dataclasses.dataclass
class Fixture:
    """What goes into one file: tensors by name, and everything else as JSON values."""

    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    facts: Facts = dataclasses.field(default_factory=dict)

    def add_rows(self, name: str, rows: Sequence[Tensor]) -> None:
        """Tensors of unequal shapes as one, with their shapes."""
        self.tensors[name] = torch.cat([row.flatten() for row in rows])
        shapes = [list(row.shape) for row in rows]
        self.tensors[f"{name}.shapes"] = torch.tensor(shapes, dtype=torch.int32)

    def add_cases(self, name: str, cases: Sequence[dict[str, Any]]) -> None:
        """Arguments and results of one function, each by its name."""
        for key in cases[0]:
            rows = [torch.as_tensor(case[key]).detach() for case in cases]
            self.add_rows(f"{name}.{key}", rows)

    def add_weights(self, name: str, model: nn.Module) -> None:
        """The parameters, of which tied ones have one name only."""
        for parameter, value in model.named_parameters():
            self.tensors[f"{name}.{parameter}"] = value.detach().clone()

    def add_gradient(self, name: str, model: nn.Module, loss: Tensor) -> None:
        model.zero_grad()
        loss.backward()
        for parameter, value in model.named_parameters():
            if value.grad is not None:
                self.tensors[f"{name}.{parameter}"] = value.grad.clone()


# What is done to trl, and the little that all fixtures share


def in_float64() -> None:
    """Keep trl in float64 for the rest of this process.

    It leaves float64 in three ways: by ``x.float()``, by new tensors of the default dtype, and
    ``PPOTrainer`` by ``torch.float32``, which its module is shown as ``torch.float64``.
    """

    class Torch:
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, "float64" if name in ("float", "float32") else name)

    torch.Tensor.float = torch.Tensor.double
    torch.set_default_dtype(torch.float64)
    ppo_trainer.torch = Torch()


@contextmanager
def permutations() -> Iterator[list[list[int]]]:
    """The orders of the rows that trl draws from numpy's global state, one for each epoch."""
    drawn: list[list[int]] = []
    draw = np.random.permutation

    def drawing(n: int) -> np.ndarray:
        order = draw(n)
        drawn.append(order.tolist())
        return order

    with patch.object(np.random, "permutation", drawing):
        yield drawn


def forget_trainers() -> None:
    """Otherwise a new trainer goes on with the gradient accumulation of the one before."""
    for shared in (AcceleratorState, GradientState, PartialState):
        shared._reset_state()


def random_model(kind: type[PreTrainedModel], seed: int, **config: Any) -> PreTrainedModel:
    """With weights large enough that distributions are far from uniform, biases included."""
    torch.manual_seed(seed)
    model = kind._from_config(GPT2Config(**GPT2 | config), attn_implementation="eager").double()
    return moved(model.eval(), by=0.3)


def moved(model: nn.Module, *, by: float) -> nn.Module:
    """The model itself, with noise of this deviation added."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    """One word for each id."""
    words = ["<end>", "<pad>", *(f"w{i}" for i in range(FIRST_WORD, VOCABULARY))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<pad>")


def random_ids(
    rng: np.random.Generator, lengths: Sequence[int], *, vocabulary: int = VOCABULARY
) -> list[Tensor]:
    """Rows of random words."""
    return [torch.from_numpy(rng.integers(FIRST_WORD, vocabulary, n)) for n in lengths]


def end(rows: list[Tensor], which: Sequence[bool]) -> list[Tensor]:
    """EOS in the last cell of some rows."""
    for row, ended in zip(rows, which, strict=True):
        if ended:
            row[-1] = END
    return rows


def normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape))


# Single functions

CASES = 100
KL_PENALTIES = ["kl", "abs", "mse"]


def functions() -> Fixture:
    """trl's functions on random ragged cases, whose padding holds random numbers too."""
    forget_trainers()
    lm = random_model(GPT2LMHeadModel, 1)
    policy = AutoModelForCausalLMWithValueHead.from_pretrained(lm)
    trainer = PPOTrainer(PPOConfig(), policy, None, tokenizer())
    rng = np.random.default_rng(SEED)
    fixture = Fixture(facts={"kl_penalties": KL_PENALTIES})
    for name, of in {
        "masked": lambda: masked_case(rng),
        "logits": lambda: logits_case(rng, trainer),
        "rewards": lambda: rewards_case(rng, trainer),
        "advantages": lambda: advantages_case(rng, trainer),
        "loss": lambda: loss_case(rng, trainer),
        "adaptive_kl": lambda: adaptive_kl_case(rng),
        "moments": lambda: moments_case(rng, trainer),
    }.items():
        fixture.add_cases(name, [of() for _ in range(CASES)])
    return fixture


def random_mask(rng: np.random.Generator) -> Tensor:
    """Rows of unequal lengths, at least two real tokens in all. Shape ``(B, T)``."""
    while True:
        rows, width = rng.integers(1, 6), rng.integers(1, 9)
        lengths = torch.from_numpy(rng.integers(1, width + 1, rows))
        mask = torch.arange(width) < lengths[:, None]
        if mask.sum() >= 2:
            return mask


def masked_case(rng: np.random.Generator) -> Facts:
    mask, spread = random_mask(rng), 10 * rng.random()
    x = spread * normal(rng, *mask.shape) + spread
    return {
        **{"x": x, "mask": mask},
        "masked_mean": core.masked_mean(x, mask),
        "masked_var": core.masked_var(x, mask),
        "masked_whiten": core.masked_whiten(x, mask),
        "masked_scale": core.masked_whiten(x, mask, shift_mean=False),
    }


def logits_case(rng: np.random.Generator, trainer: PPOTrainer) -> Facts:
    shape = rng.integers([1, 1, 2], [4, 6, 17])  # (B, T, V)
    logits, ref_logits = 5 * normal(rng, *shape), 5 * normal(rng, *shape)
    tokens = torch.from_numpy(rng.integers(shape[2], size=shape[:2]))
    trainer.config.kl_penalty = "full"
    full = [core.logprobs_from_logits(x, None, gather=False) for x in (logits, ref_logits)]
    return {
        **{"logits": logits, "ref_logits": ref_logits, "tokens": tokens},
        "logprobs_from_logits": core.logprobs_from_logits(logits, tokens),
        "entropy_from_logits": core.entropy_from_logits(logits),
        "full": trainer._kl_penalty(*full),
    }


def rewards_case(rng: np.random.Generator, trainer: PPOTrainer) -> Facts:
    mask, kind, kl_coef = random_mask(rng), int(rng.integers(3)), rng.random()
    logprobs, ref_logprobs = -normal(rng, *mask.shape).exp(), -normal(rng, *mask.shape).exp()
    scores = 3 * normal(rng, len(mask))
    trainer.kl_ctl.value, trainer.config.kl_penalty = kl_coef, KL_PENALTIES[kind]
    rewards, _, kl = trainer.compute_rewards(scores, logprobs, ref_logprobs, mask.long())
    return {
        **{"mask": mask, "kind": kind, "kl_coef": kl_coef, "scores": scores},
        **{"logprobs": logprobs, "ref_logprobs": ref_logprobs},
        **{"kl": kl, "rewards": rewards},
    }


def advantages_case(rng: np.random.Generator, trainer: PPOTrainer) -> Facts:
    mask, (gamma, lam) = random_mask(rng), rng.random(2)
    values, rewards = normal(rng, *mask.shape), normal(rng, *mask.shape)
    trainer.config.gamma, trainer.config.lam = gamma, lam
    _, advantages, returns = trainer.compute_advantages(values, rewards, mask.long())
    return {
        **{"mask": mask, "values": values, "rewards": rewards, "gamma": gamma, "lam": lam},
        **{"advantages": advantages, "returns": returns},
    }


def loss_case(rng: np.random.Generator, trainer: PPOTrainer) -> Facts:
    """With the gradient by the two tensors that carry one."""
    mask, (clip, value_clip, value_coef) = random_mask(rng), rng.uniform(0.1, 0.6, 3)
    config = trainer.config
    config.cliprange, config.cliprange_value, config.vf_coef = clip, value_clip, value_coef
    logits = 3 * normal(rng, *mask.shape, 4)
    logprobs, values, advantages, returns = (normal(rng, *mask.shape) for _ in range(4))
    new_logprobs = (logprobs + 0.4 * normal(rng, *mask.shape)).requires_grad_()
    new_values = (values + 0.5 * normal(rng, *mask.shape)).requires_grad_()
    policy_loss, value_loss, stats = trainer.loss(
        *(logprobs, values, logits, new_values, new_logprobs, mask.long(), advantages, returns)
    )
    (policy_loss + value_loss).backward()
    return {
        **{"mask": mask, "clip": clip, "value_clip": value_clip, "value_coef": value_coef},
        **{"logits": logits, "logprobs": logprobs, "values": values},
        **{"advantages": advantages, "returns": returns},
        **{"new_logprobs": new_logprobs, "new_values": new_values},
        **{"logprobs_gradient": new_logprobs.grad, "values_gradient": new_values.grad},
        **{name: value for name, value in stats.items() if value.ndim == 0},
    }


def adaptive_kl_case(rng: np.random.Generator) -> Facts:
    """A coefficient through ten updates."""
    coef, target, horizon = rng.uniform([0.01, 1, 50], [1, 10, 1000])
    controller, coefs = AdaptiveKLController(coef, target, horizon), []
    kl, n = target * rng.uniform(0.5, 1.5, 10), rng.integers(1, 50, 10)
    for kl_now, n_now in zip(kl.tolist(), n.tolist(), strict=True):
        controller.update(kl_now, n_now)
        coefs.append(float(controller.value))
    return {"coef": coef, "target": target, "horizon": horizon, "kl": kl, "n": n, "coefs": coefs}


def moments_case(rng: np.random.Generator, trainer: PPOTrainer) -> Facts:
    """Running moments of four batches of unequal sizes."""
    moments, sizes = RunningMoments(trainer.accelerator), rng.integers(2, 9, 4)
    scores, means, stds = 3 * normal(rng, sizes.sum()) + 2, [], []
    for batch in scores.split(sizes.tolist()):
        moments.update(batch)
        means.append(moments.mean)
        stds.append(moments.std)
    return {"sizes": sizes, "scores": scores, "means": means, "stds": stds}


# PPOTrainer.step

CALLS, BATCH = 3, 8
PPO_DEFAULT = {
    "batch_size": BATCH,
    "mini_batch_size": 4,
    "ppo_epochs": 3,
    "learning_rate": 5e-3,
    "adap_kl_ctrl": False,
}
ACCUMULATION = {"mini_batch_size": 2, "gradient_accumulation_steps": 2}
# Of each run: the kind of rows, and what differs from `PPO_DEFAULT`.
PPO_RUNS: dict[str, tuple[str, Facts]] = {
    "kl": ("ragged", {}),
    "abs": ("ragged", {"kl_penalty": "abs"}),
    "mse": ("ragged", {"kl_penalty": "mse"}),
    "full": ("ragged", {"kl_penalty": "full"}),
    "discounted": ("ragged", {"gamma": 0.97, "lam": 0.9}),
    "adaptive KL": (
        "ragged",
        {"kl_penalty": "abs", "adap_kl_ctrl": True, "target": 1.9, "horizon": 20.0},
    ),
    "score clip": ("ragged", {"score_clip": 1.5}),
    "early stop": (
        "ragged",
        {"mini_batch_size": BATCH, "ppo_epochs": 6, "early_stopping": True, "target_kl": 0.02},
    ),
    "gradient clip": ("ragged", {"max_grad_norm": 0.5}),
    # Behind a row shorter than the longest, whitened rewards are not 0 and reach it through GAE.
    "whitened rewards": ("equal totals", {"whiten_rewards": True}),
    # trl takes the mean of the micro-batches' means: that of all tokens, if rows are of one length.
    "accumulation": ("equal responses", ACCUMULATION),
    "ragged accumulation": ("ragged", ACCUMULATION),
}
PPO_ROWS = {  # lengths of prompts and responses
    "ragged": ([2, 5, 3, 4, 5, 2, 3, 4], [7, 1, 7, 3, 5, 6, 2, 4]),
    "equal totals": ([7, 2, 5, 3, 4, 6, 2, 5], [2, 7, 4, 6, 5, 3, 7, 4]),
    "equal responses": ([2, 5, 3, 4, 5, 2, 3, 4], [5] * BATCH),
}


def ppo_step() -> Fixture:
    """Three calls of ``PPOTrainer.step`` for each of `PPO_RUNS`: statistics and final weights."""
    fixture = Fixture(facts={"model": GPT2 | DROPOUT, "runs": {}})
    lm = random_model(GPT2LMHeadModel, 1, **DROPOUT)  # dropout, which never acts in `step`
    policy = moved(AutoModelForCausalLMWithValueHead.from_pretrained(lm), by=0.2)
    ref_policy = moved(copy.deepcopy(policy), by=0.1)
    fixture.add_weights("policy", policy)
    fixture.add_weights("ref_policy", ref_policy)

    rng, batches = np.random.default_rng(SEED), {}
    for kind, (prompt_lengths, response_lengths) in PPO_ROWS.items():
        batches[kind] = [
            (
                random_ids(rng, prompt_lengths),
                end(random_ids(rng, response_lengths), rng.random(BATCH) < 0.5),
                2 * normal(rng, BATCH),
            )
            for _ in range(CALLS)
        ]
        for call, (prompt_ids, response_ids, scores) in enumerate(batches[kind]):
            fixture.add_rows(f"{kind}.{call}.prompts", prompt_ids)
            fixture.add_rows(f"{kind}.{call}.responses", response_ids)
            fixture.tensors[f"{kind}.{call}.scores"] = scores

    for name, (kind, own) in PPO_RUNS.items():
        forget_trainers()
        config, trained = PPOConfig(**PPO_DEFAULT | own), copy.deepcopy(policy)
        trainer = PPOTrainer(config, trained, copy.deepcopy(ref_policy), tokenizer())
        run = {"rows": kind, "config": vars(config), "calls": []}
        for prompt_ids, response_ids, scores in batches[kind]:
            with permutations() as orders:
                stats = trainer.step(prompt_ids, response_ids, list(scores))
            one_number = {
                name: value
                for name, value in stats.items()
                if isinstance(value, float) and not name.startswith("time/")
            }
            run["calls"].append(
                {"orders": orders, "stats": one_number, "next_kl_coef": float(trainer.kl_ctl.value)}
            )
        fixture.add_weights(name, trained)
        fixture.facts["runs"][name] = run
        fixture.facts["all_stats"] = sorted(stats)
    return fixture


# PPOv2Trainer.train

WIDTHS = (5, 6)  # of prompts, padded on the left, and of responses
PPO_V2_DEFAULT = {
    "total_episodes": 3 * 32,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_mini_batches": 4,
    "num_ppo_epochs": 2,
    "local_rollout_forward_batch_size": 32,
    "num_sample_generations": 0,
    "response_length": WIDTHS[1],
    "stop_token": "eos",
    "temperature": 0.7,
    "learning_rate": 5e-3,
    "weight_decay": 0.1,
    "adam_epsilon": 1e-5,
    "gamma": 0.97,
}
PPO_V2_RUNS: dict[str, Facts] = {
    "plain": {},
    "whitened rewards, EOS penalty": {"whiten_rewards": True, "missing_eos_penalty": 1.5},
}


def ppo_v2() -> Fixture:
    """Three updates of ``PPOv2Trainer.train``, two epochs of four minibatches each, on given
    responses: its metrics, and the final weights of policy and value model."""
    fixture = Fixture(facts={"model": GPT2 | DROPOUT, "widths": WIDTHS, "runs": {}})
    start = {
        "policy": random_model(GPT2LMHeadModel, 1, **DROPOUT),  # trl switches the dropout off
        "ref_policy": random_model(GPT2LMHeadModel, 2, **DROPOUT),
        "reward_model": random_model(GPT2ForSequenceClassification, 3, **DROPOUT),
        "value_model": random_model(GPT2ForSequenceClassification, 4, **DROPOUT),
    }
    for name, model in start.items():
        fixture.add_weights(name, model)

    rng = np.random.default_rng(SEED)
    updates = [random_update(rng) for _ in range(3)]
    for update, (prompt_ids, response_ids) in enumerate(updates):
        fixture.add_rows(f"{update}.prompts", prompt_ids)
        fixture.add_rows(f"{update}.responses", response_ids)

    for name, own in PPO_V2_RUNS.items():
        trained, told = copy.deepcopy(start), PPO_V2_DEFAULT | own
        orders, logged = train_ppo_v2(trained, updates, told)
        fixture.add_weights(f"{name}.policy", trained["policy"])
        fixture.add_weights(f"{name}.value_model", trained["value_model"])
        fixture.facts["all_metrics"] = sorted(logged[0])
        for metrics in logged:
            del metrics["eps"]  # episodes per second
        fixture.facts["runs"][name] = {"config": told, "orders": orders, "metrics": logged}
    return fixture


def random_update(rng: np.random.Generator) -> tuple[list[Tensor], list[Tensor]]:
    """Prompts and responses of unequal lengths. What has no EOS is cut, so it is of full width."""
    prompt_ids = random_ids(rng, rng.integers(2, WIDTHS[0] + 1, 32))
    response_ids = random_ids(rng, [WIDTHS[1], 1, *rng.integers(1, WIDTHS[1] + 1, 30)])
    cut = [len(ids) == WIDTHS[1] and rng.random() < 0.7 for ids in response_ids]
    return prompt_ids, end(response_ids, [not x for x in cut])


def train_ppo_v2(
    trained: dict[str, PreTrainedModel],
    updates: Sequence[tuple[list[Tensor], list[Tensor]]],
    told: Facts,
) -> tuple[list[list[int]], list[dict[str, float]]]:
    """One run, which changes the models; the orders that it drew and what it logged."""
    prompts, rows = [], []
    for prompt_ids, response_ids in updates:
        left = [pad(ids, (WIDTHS[0] - len(ids), 0), value=PAD) for ids in prompt_ids]
        right = [pad(ids, (0, WIDTHS[1] - len(ids)), value=PAD) for ids in response_ids]
        prompts.append(torch.stack(left))
        rows.append(torch.cat([torch.stack(left), torch.stack(right)], 1))
    given = iter(rows)

    def in_place_of_sampling(lm: Any, _prompts: Tensor, _size: int, pad_id: int, _: Any) -> Any:
        """The given rows, and the logits that they might have been sampled from."""
        ids = next(given)
        logits = forward(lm, ids, pad_id).logits[:, WIDTHS[0] - 1 : -1]
        return ids, logits / (told["temperature"] + 1e-7)

    logged: list[dict[str, float]] = []
    dataset = [{"input_ids": ids.tolist()} for ids in torch.cat(prompts)]
    with (
        trainer_arguments() as arguments,
        permutations() as orders,
        patch.object(ppov2_trainer, "batch_generation", in_place_of_sampling),
    ):
        trainer = PPOv2Trainer(
            config=PPOv2Config(**arguments | told),
            tokenizer=tokenizer(),
            **trained,
            train_dataset=dataset,
            eval_dataset=dataset,
        )
        trainer.dataloader = [{"input_ids": ids} for ids in prompts]
        trainer.log = logged.append
        np.random.seed(SEED)
        trainer.train()
    return orders, logged


@contextmanager
def trainer_arguments() -> Iterator[Facts]:
    """What each trainer on top of ``transformers.Trainer`` is told; its folder is for nothing."""
    forget_trainers()
    with tempfile.TemporaryDirectory() as folder:
        yield {
            "output_dir": folder,
            "use_cpu": True,
            "optim": "adamw_torch",
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "seed": SEED,
        }


# DPOTrainer

DPO_PAIRS = 12
BATCHES = [[0], [1, 2], [3, 4, 5, 6], list(range(DPO_PAIRS))]
DPO_RUN = {
    "beta": 0.3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "learning_rate": 3e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "max_grad_norm": 1.25,
}


def dpo() -> Fixture:
    """``DPOTrainer``: loss, metrics and gradient of batches, and a whole ``train()``."""
    fixture = Fixture(facts={"model": GPT2 | DROPOUT, "batches": BATCHES, "seed": SEED})
    lm = random_model(GPT2LMHeadModel, 1, **DROPOUT)  # trl switches the dropout off
    ref_lm = moved(copy.deepcopy(lm), by=0.1)
    fixture.add_weights("policy", lm)
    fixture.add_weights("ref_policy", ref_lm)
    rng = np.random.default_rng(SEED)
    texts = [
        {
            "prompt": spelled(rng, 5) + " ",  # trl joins prompt and response as they are
            "chosen": spelled(rng, 6),
            "rejected": spelled(rng, 6),
        }
        for _ in range(DPO_PAIRS)
    ]

    def trainer_for(arguments: Facts, label_smoothing: float) -> DPOTrainer:
        forget_trainers()
        lengths = {"max_length": 24, "max_prompt_length": 12}  # nothing is cut
        return DPOTrainer(
            model=copy.deepcopy(lm),
            ref_model=copy.deepcopy(ref_lm),
            args=DPOConfig(**arguments | DPO_RUN | lengths, label_smoothing=label_smoothing),
            tokenizer=tokenizer(),
            train_dataset=Dataset.from_list(texts),
        )

    fixture.facts["metrics"] = {}
    with trainer_arguments() as arguments:
        for label_smoothing in (0.0, 0.1):
            trainer = trainer_for(arguments, label_smoothing)
            found = dpo_batches(fixture, str(label_smoothing), trainer)
            fixture.facts["metrics"][str(label_smoothing)] = found
        add_pairs(fixture, trainer)
        trainer = trainer_for(arguments, label_smoothing=0.0)
        fixture.facts["run"] = dpo_run(trainer)
    fixture.add_weights("trained", trainer.model)
    return fixture


def dpo_batches(fixture: Fixture, name: str, trainer: DPOTrainer) -> list[dict[str, float]]:
    """Of each batch all metrics; the gradients go straight into the fixture."""
    found = []
    for batch, rows in enumerate(BATCHES):
        inputs = trainer.data_collator([trainer.train_dataset[i] for i in rows])
        loss, metrics = trainer.get_batch_loss_metrics(trainer.model, inputs)
        found.append({"loss": float(loss), **{k: float(v) for k, v in metrics.items()}})
        fixture.add_gradient(f"{name}/{batch}", trainer.model, loss)
    return found


def add_pairs(fixture: Fixture, trainer: DPOTrainer) -> None:
    """The ids of prompts and responses, as trl has encoded them."""
    pairs = list(trainer.train_dataset)
    prompts = [torch.tensor(pair["prompt_input_ids"]) for pair in pairs]
    fixture.add_rows("prompts", prompts)
    for side in ("chosen", "rejected"):
        rows = [torch.tensor(pair[f"{side}_input_ids"]) for pair in pairs]
        fixture.add_rows(side, [x[len(p) :] for p, x in zip(prompts, rows, strict=True)])


def dpo_run(trainer: DPOTrainer) -> Facts:
    """A whole ``train()``: what it logs after each step, and the loss of each micro-batch."""
    losses: list[float] = []
    compute_loss = trainer.compute_loss

    def noting_loss(*args: Any, **kwargs: Any) -> Tensor:
        loss = compute_loss(*args, **kwargs)
        losses.append(float(loss))
        return loss

    trainer.compute_loss = noting_loss
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"config": DPO_RUN, "micro_batch_losses": losses, "steps": steps}


def spelled(rng: np.random.Generator, longest: int) -> str:
    """A random text of at most so many words."""
    return " ".join(f"w{i}" for i in rng.integers(FIRST_WORD, VOCABULARY, rng.integers(1, longest)))


# RewardTrainer

REWARD_PAIRS, REWARD_VOCABULARY = 6, 10
REWARD_BATCHES = {
    "no margin": [[0], [1, 2], list(range(REWARD_PAIRS))],
    "margin": [[0], [1]],
    "margins": [[2, 3, 4, 5]],  # trl takes every margin off every pair
}
CENTER_COEF = 0.05


def reward() -> Fixture:
    """``RewardTrainer.compute_loss`` and its gradient, with and without margins and centring."""
    fixture = Fixture(facts={"model": GPT2, "batches": REWARD_BATCHES, "losses": {}})
    model = random_model(GPT2ForSequenceClassification, 1)
    fixture.add_weights("model", model)

    rng = np.random.default_rng(SEED)
    ids = {
        name: random_ids(rng, rng.integers(1, 6, REWARD_PAIRS), vocabulary=REWARD_VOCABULARY)
        for name in ("prompts", "chosen", "rejected")
    }
    margins = (rng.integers(1, 9, REWARD_PAIRS) / 4).tolist()  # exact in float32 too
    for name, rows in ids.items():
        fixture.add_rows(name, rows)
    fixture.facts["margins"] = margins

    pairs = []
    for i in range(REWARD_PAIRS):
        pair = {"margin": margins[i]}
        for side in ("chosen", "rejected"):
            row = [*ids["prompts"][i].tolist(), *ids[side][i].tolist(), END]
            pair[f"input_ids_{side}"], pair[f"attention_mask_{side}"] = row, [1] * len(row)
        pairs.append(pair)

    for center_coef in (None, CENTER_COEF):
        with trainer_arguments() as arguments:
            trainer = RewardTrainer(
                model=copy.deepcopy(model),
                args=RewardConfig(
                    **arguments, max_length=24, center_rewards_coefficient=center_coef
                ),
                tokenizer=tokenizer(),
                train_dataset=Dataset.from_list(pairs),
            )
        for kind, batches in REWARD_BATCHES.items():
            for batch, rows in enumerate(batches):
                examples = [dict(trainer.train_dataset[i]) for i in rows]
                if kind == "no margin":
                    for example in examples:
                        del example["margin"]
                loss = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
                name = f"{kind}/{center_coef or 0}/{batch}"
                fixture.facts["losses"][name] = float(loss)
                fixture.add_gradient(name, trainer.model, loss)
    return fixture


# Names


def names(fixtures: dict[str, Fixture]) -> Facts:
    """The options that trl's PPO configs declare, with their defaults, and what it reports."""
    return {
        **{config.__name__: own_fields(config) for config in (PPOConfig, PPOv2Config)},
        OnPolicyConfig.__name__: own_fields(OnPolicyConfig),  # PPOv2Config's own parent
        "PPOTrainer.step": fixtures["ppo_step"].facts["all_stats"],
        "PPOv2Trainer.train": fixtures["ppo_v2"].facts["all_metrics"],
    }


def own_fields(config: type) -> Facts:
    """Declared by the class itself."""
    return {
        field.name: {} if field.default is dataclasses.MISSING else field.default
        for field in dataclasses.fields(config)
        if field.name in vars(config).get("__annotations__", {})
    }


# Writing and checking


def record(folder: Path) -> None:
    """Write all fixtures."""
    versions = {name: installed(name) for name in pinned()} | {"python": platform.python_version()}
    with redirect_stdout(io.StringIO()):  # trl and transformers print as they go
        fixtures = {
            function.__name__: function() for function in (functions, ppo_step, ppo_v2, dpo, reward)
        }
    folder.mkdir(exist_ok=True)
    for name, fixture in fixtures.items():
        facts = json.dumps(fixture.facts | {"versions": versions}, allow_nan=False)
        save_file(fixture.tensors, folder / f"{name}.safetensors", metadata={"facts": facts})
    text = json.dumps(names(fixtures) | {"versions": versions}, indent=2, allow_nan=False)
    (folder / "names.json").write_text(text + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """All that a file holds, by name: tensors, numbers, texts."""
    if path.suffix == ".json":
        return leaves(json.loads(path.read_text(encoding="utf-8")))
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors | leaves(json.loads(file.metadata()["facts"]))


def leaves(value: Any, name: str = "facts") -> dict[str, Any]:
    """Nested JSON values, by their path."""
    if not isinstance(value, (dict, list)):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    parts = [leaves(part, f"{name}/{key}") for key, part in items if key != "versions"]
    return {name: len(value)} | {key: leaf for part in parts for key, leaf in part.items()}


def difference(one: Any, other: Any) -> float:
    """The largest difference of two values; infinite if they differ in more than numbers."""
    if isinstance(one, Tensor):
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return math.inf
        return float((one.double() - other.double()).abs().max()) if one.numel() else 0.0
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other)
    return 0.0 if one == other else math.inf


def check() -> bool:
    """Record again and compare with what is there."""
    fine = True
    with tempfile.TemporaryDirectory() as folder:
        record(Path(folder))
        for path in sorted(Path(folder).iterdir()):
            new, old = read(path), read(RECORDED / path.name)
            gaps = [math.inf]
            if new.keys() == old.keys():
                gaps = [difference(new[name], old[name]) for name in new]
            print(f"{path.name}: {max(gaps):.0e}")
            fine = fine and all(gap <= BOUND for gap in gaps)  # NaN is not
    return fine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="Compare with what is recorded.")
    parser.add_argument("--venv", type=Path, help="Where the venv is or will be, to keep it.")
    parser.add_argument("--here", action="store_true", help="With this Python or not at all.")
    options = parser.parse_args()
    if HAS_PACKAGES:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        in_float64()
        if options.check:
            return 0 if check() else 1
        record(RECORDED)
        return 0
    if options.here:
        parser.error(f"this Python has not the packages of {REQUIREMENTS.name}")
    arguments = ["--check"] if options.check else []
    if options.venv:
        return run_in_venv(options.venv, arguments)
    with tempfile.TemporaryDirectory() as folder:
        return run_in_venv(Path(folder), arguments)


if __name__ == "__main__":
    sys.exit(main())
