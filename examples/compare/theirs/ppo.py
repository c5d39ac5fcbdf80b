"""trl's PPO on given responses and scores: `train` of its PPOTrainer of 1.12, `step` of 0.11's.

trl is unmodified. For `train`, what samples hands back the given responses, the reward model the
given scores, and the dataloader the given prompts; `step` is called with all three.
"""

import copy
import importlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from ..job import WEIGHTS, Ids, Job, Record, Rollout
from ..names import in_our_names
from . import Refused, first_line
from .float64 import isolated
from .recorder import defaults_of, dropouts, peak_bytes, versions, warned
from .trainers import (
    BEFORE_5,
    from_folder,
    in_precision_of,
    read_config,
    read_tokenizer,
)

EXTRA_TEMPERATURE = 1e-7  # `train` adds it to the one that it is told
Metrics = dict[str, float]


@dataclass
class Models:
    """What `train` starts from; `reward` scores the rows in their order."""

    policy: Any
    ref_policy: Any
    reward: nn.Module
    value: Any


@dataclass
class Trained:
    """A run: its trainer, what it has logged, and the orders of the rows that it has drawn, for
    each rollout one for each epoch."""

    trainer: Any
    logged: list[Metrics] = field(default_factory=list)
    orders: list[list[list[int]]] = field(default_factory=list)


def run(job: Job, folder: Path) -> Record:
    """Train as the job says, and write record and weights, these by the names that `Policy` has.

    Raises:
        Refused: if this trl or this model cannot.
    """
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    with warned() as warnings:
        record = _run_train(job, folder) if has_train() else _run_step(job, folder)
    record.warnings = warnings + record.warnings
    record.save(folder)
    return record


def has_train() -> bool:
    """Whether this trl has the experimental ``PPOTrainer``."""
    try:
        importlib.import_module("trl.experimental.ppo.ppo_trainer")
    except ImportError:
        return False
    return True


# PPOTrainer.train


def _run_train(job: Job, folder: Path) -> Record:
    facts: dict[str, Any] = {}
    lm, ref_lm = (load_lm(job, facts) for _ in range(2))
    tokenizer = load_tokenizer(job.model, lm, facts)
    value = _value_model(lm, job)
    models = Models(lm, ref_lm, GivenScores([s for x in job.rollouts for s in x.scores]), value)
    told = {
        "output_dir": str(folder / "trl"),
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        **_batches_of_train(job),
    }
    started = time.perf_counter()
    with in_precision_of(job):
        trained = train(models, tokenizer, job.rollouts, told | job.options)
    args = trained.trainer.args
    record = _record("PPOTrainer", job, trained, started)
    record.facts |= facts
    record.facts["temperature"] = args.temperature + EXTRA_TEMPERATURE
    record.facts["total_steps"] = args.num_total_batches
    record.facts["accumulated"] = args.gradient_accumulation_steps
    micro = min(args.per_device_train_batch_size, args.local_mini_batch_size)
    record.batches = _batches(job, trained.orders, args.local_mini_batch_size, micro)
    weights = _weights(lm, "lm.") | _weights(
        getattr(value, value.base_model_prefix), "critic_trunk."
    )
    head = value.score.weight.detach()
    weights |= {"value_head.weight": head, "value_head.bias": torch.zeros_like(head[:, 0])}
    save_file(weights, folder / WEIGHTS)
    return record


def _batches_of_train(job: Job) -> dict[str, Any]:
    """Batch sizes that fit the rollouts, where the job's options do not say them."""
    rows = len(job.rollouts[0].scores)
    accumulated = job.options.get("gradient_accumulation_steps", 1)
    size = job.options.get("per_device_train_batch_size", max(1, rows // accumulated))
    if size * accumulated != rows:
        raise Refused(
            f"a batch of trl's has per_device_train_batch_size {size} times "
            f"gradient_accumulation_steps {accumulated} rows, and a rollout {rows}; make them equal"
        )
    longest = max(len(ids) for x in job.rollouts for ids in x.response_ids)
    return {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulated,
        "total_episodes": len(job.rollouts) * rows,
        "num_sample_generations": 0,
        "response_length": longest,
    }


def train(
    models: Models, tokenizer: Any, rollouts: Sequence[Rollout], options: dict[str, Any]
) -> Trained:
    """``PPOTrainer.train()`` on given responses. `policy` and `value` are trained in place.

    Args:
        options: of its config; its batch is a rollout.
    """
    trl: Any = importlib.import_module("trl.experimental.ppo")
    ppo_trainer: Any = importlib.import_module("trl.experimental.ppo.ppo_trainer")
    batches = [_padded(rollout, tokenizer) for rollout in rollouts]
    rows = iter(batches)

    def given(lm: Any, _prompts: Tensor, _size: int, pad_id: int, generation: Any) -> Any:
        """In the place of sampling: the next batch, and the logits that it might come from."""
        prompts, ids = next(rows)
        logits = ppo_trainer.forward(lm, ids, pad_id).logits[:, prompts.shape[1] - 1 : -1]
        return ids, logits / generation.temperature

    dataset = [{"input_ids": ids.tolist()} for prompts, _ in batches for ids in prompts]
    arguments = _config(trl.PPOConfig, options)
    sampling = patch.object(ppo_trainer, "batch_generation", given)
    with isolated(), sampling, permutations() as orders:
        trainer = trl.PPOTrainer(
            args=arguments,
            processing_class=tokenizer,
            model=models.policy,
            ref_model=models.ref_policy,
            reward_model=models.reward,
            value_model=models.value,
            train_dataset=dataset,
            eval_dataset=dataset,
        )
        trainer.dataloader = [{"input_ids": prompts} for prompts, _ in batches]
        np.random.seed(arguments.seed)  # it draws its minibatches from numpy's global state
        trainer.train()
    logged = [x for x in trainer.state.log_history if "objective/kl" in x]
    epochs = arguments.num_ppo_epochs
    by_rollout = [orders[i : i + epochs] for i in range(0, len(orders), epochs)]
    return Trained(trainer, logged, by_rollout)


def _padded(rollout: Rollout, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Prompts, padded on the left, ``(B, P)``; whole rows, padded on the right too, ``(B, L)``."""
    pad_id = tokenizer.pad_token_id
    width = max(map(len, rollout.prompt_ids))
    length = max(map(len, rollout.response_ids))
    prompts = torch.tensor([[pad_id] * (width - len(ids)) + ids for ids in rollout.prompt_ids])
    responses = torch.tensor([ids + [pad_id] * (length - len(ids)) for ids in rollout.response_ids])
    return prompts, torch.cat([prompts, responses], 1)


class GivenScores(nn.Module):
    """A reward model of the shape that `train` asks for: the next rows have the next scores."""

    base_model_prefix = "backbone"

    def __init__(self, scores: Sequence[float]) -> None:
        super().__init__()
        self.scores, self.rows = scores, 0
        self.score = nn.Identity()

    def backbone(self, input_ids: Tensor, **_: Any) -> Any:
        """In the place of hidden states: the score of each row at each of its positions."""
        first, self.rows = self.rows, self.rows + len(input_ids)
        scores = torch.tensor(self.scores[first : self.rows], dtype=torch.get_default_dtype())
        scores = scores.to(input_ids.device)
        return SimpleNamespace(hidden_states=[scores[:, None, None].expand(*input_ids.shape, 1)])


def _value_model(lm: Any, job: Job) -> Any:
    """A classifier with the policy's trunk, below the head that the job gives."""
    config = copy.deepcopy(lm.config)
    config.num_labels = 1
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    if not hasattr(model, "score"):
        raise Refused(
            f"{job.model}: {type(model).__name__} has no .score, which trl's PPO reads the values "
            "from; give a model like GPT-2 or Llama"
        )
    model = _as_told(model, job)
    getattr(model, model.base_model_prefix).load_state_dict(lm.base_model.state_dict())
    with torch.no_grad():
        model.score.weight.copy_(torch.tensor([job.value_head]))
    return model


# PPOTrainer.step


def _run_step(job: Job, folder: Path) -> Record:
    trl: Any = importlib.import_module("trl")
    if not hasattr(getattr(trl, "PPOTrainer", None), "step"):
        raise Refused(f"trl {versions()['trl']} has no PPO: 1.12.0 is the last with it, or 0.11.3")
    facts: dict[str, Any] = {}
    lm = load_lm(job, facts)
    tokenizer = load_tokenizer(job.model, lm, facts)
    policy = trl.AutoModelForCausalLMWithValueHead.from_pretrained(lm)
    with torch.no_grad():
        policy.v_head.summary.weight.copy_(torch.tensor([job.value_head]))
        policy.v_head.summary.bias.zero_()
    _as_told(policy.v_head, job)
    rows = len(job.rollouts[0].scores)
    accumulated = job.options.get("gradient_accumulation_steps", 1)
    told = {"batch_size": rows, "mini_batch_size": max(1, rows // accumulated)} | job.options
    if told["batch_size"] != rows:
        raise Refused(f"trl's batch_size is {told['batch_size']}, and a rollout has {rows} rows")
    started = time.perf_counter()
    with in_precision_of(job):
        trained = step(policy, tokenizer, job.rollouts, told)
    config = trained.trainer.config
    record = _record("PPOTrainer.step", job, trained, started)
    record.facts |= facts
    record.facts["temperature"] = 1.0
    record.facts["total_steps"] = len(job.rollouts)
    record.facts["accumulated"] = config.gradient_accumulation_steps
    record.batches = _batches(
        job, trained.orders, config.backward_batch_size, config.mini_batch_size
    )
    weights = _weights(policy.pretrained_model, "lm.")
    save_file(weights | _weights(policy.v_head.summary, "value_head."), folder / WEIGHTS)
    return record


def step(
    policy: Any,
    tokenizer: Any,
    rollouts: Sequence[Rollout],
    options: dict[str, Any],
    ref_policy: Any = None,
) -> Trained:
    """A call of ``PPOTrainer.step`` for each rollout. The policy is trained in place.

    Args:
        ref_policy: None for a copy of the policy, which trl makes.
    """
    trl: Any = importlib.import_module("trl")
    with isolated():
        trainer = trl.PPOTrainer(_config(trl.PPOConfig, options), policy, ref_policy, tokenizer)
        trained = Trained(trainer)
        for rollout in rollouts:
            with permutations() as orders:
                stats = trainer.step(
                    [torch.tensor(ids) for ids in rollout.prompt_ids],
                    [torch.tensor(ids) for ids in rollout.response_ids],
                    [torch.tensor(score) for score in rollout.scores],
                )
            trained.orders.append(orders)
            trained.logged.append({k: float(v) for k, v in stats.items() if np.ndim(v) == 0})
    return trained


# Both


def load_tokenizer(folder: str, lm: Any, facts: dict[str, Any]) -> Any:
    """The model's tokenizer. A pad token that is missing, or that the model has no embedding for,
    becomes EOS."""
    tokenizer = read_tokenizer(folder, facts)
    known = len(lm.get_output_embeddings().weight)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= known:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_lm(job: Job, facts: dict[str, Any]) -> Any:
    """The language model of the job."""
    how = {"torch_dtype" if BEFORE_5 else "dtype": torch.float32}
    auto: Any = transformers.AutoModelForCausalLM
    lm = from_folder(auto, job.model, config=read_config(job.model, facts), **how)
    return _as_told(lm, job)


def _as_told(model: Any, job: Job) -> Any:
    """In the precision of the job, and with dropout as it says."""
    for module, name, _ in [] if job.dropout else list(dropouts(model)):
        setattr(module, name, 0.0)
    return model.double() if job.float64 else model


def _config(config_class: Any, options: dict[str, Any]) -> Any:
    try:
        return config_class(**options)
    except (ValueError, TypeError) as error:
        raise Refused(f"trl's PPOConfig: {first_line(error)}") from error


def _record(trainer: str, job: Job, trained: Trained, started: float) -> Record:
    """All that both trainers tell alike."""
    own = trained.trainer
    optimizer = getattr(own.optimizer, "optimizer", own.optimizer)  # accelerate wraps it
    group = optimizer.param_groups[0]
    tokenizer = getattr(own, "processing_class", None) or own.tokenizer
    given = own.args if hasattr(own, "args") else own.config
    # trl sets modules of dropout to 0, and no numbers that other modules have; `step` computes in
    # eval mode.
    dropout = max((p for _, _, p in dropouts(own.model)), default=0.0)
    return Record(
        "ppo",
        versions=versions(),
        trainer=trainer,
        # As they come back from a file: an enum is its value there.
        options=json.loads(json.dumps(vars(given), default=str)),
        facts={
            "dtype": "float64" if job.float64 else "float32",
            "dropout": dropout if trainer == "PPOTrainer" else 0.0,
            "pad_id": tokenizer.pad_token_id,
            "eos_id": tokenizer.eos_token_id,
            "padding_side": tokenizer.padding_side,
            "defaults": defaults_of(given, job.options),
            "optimizer": {
                "class": type(optimizer).__name__,
                **{name: group[name] for name in ("betas", "eps") if name in group},
            },
        },
        rows=_rows(job.rollouts),
        steps=[in_our_names("ppo", trainer, x) for x in trained.logged],
        logged=trained.logged,
        seconds=time.perf_counter() - started,
        peak_bytes=peak_bytes(),
    )


def _rows(rollouts: Sequence[Rollout]) -> dict[int, Ids]:
    pairs = [pair for x in rollouts for pair in zip(x.prompt_ids, x.response_ids, strict=True)]
    return {n: {"prompt_ids": p, "response_ids": r} for n, (p, r) in enumerate(pairs)}


def _batches(
    job: Job, orders: Sequence[Sequence[Sequence[int]]], minibatch: int, micro: int
) -> list[list[list[int]]]:
    """The micro-batches of each rollout: slices of minibatches, which are slices of the orders."""
    batches, first = [], 0
    for rollout, epochs in zip(job.rollouts, orders, strict=True):
        rows = len(rollout.scores)
        numbers = [[first + row for row in order] for order in epochs]
        parts = [order[i : i + minibatch] for order in numbers for i in range(0, rows, minibatch)]
        batches.append([x[i : i + micro] for x in parts for i in range(0, len(x), micro)])
        first += rows
    return batches


def _weights(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: p.detach().contiguous() for name, p in model.named_parameters()}


@contextmanager
def permutations() -> Iterator[list[list[int]]]:
    """The orders of the rows that trl draws from numpy's global state, one for each epoch."""
    drawn: list[list[int]] = []
    draw = np.random.permutation

    def drawing(n: int) -> Any:
        order = draw(n)
        drawn.append(order.tolist())
        return order

    with patch.object(np.random, "permutation", drawing):
        yield drawn
