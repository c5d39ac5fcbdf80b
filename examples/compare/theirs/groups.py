"""trl's GRPO and RLOO on given responses and scores.

trl is unmodified. What samples hands back the given responses, the reward function the given
scores, and the dataset has the prompts in the order of the rollouts.
"""

import importlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor

from ..job import WEIGHTS, Job, Record, Rollout
from ..names import METRICS, in_our_names
from . import Refused, first_line
from .float64 import isolated
from .ppo import _rows, _weights, load_lm, load_tokenizer
from .recorder import defaults_of, dropouts, peak_bytes, versions, warned
from .trainers import in_precision_of

CLASSES = {"grpo": ("GRPOTrainer", "GRPOConfig"), "rloo": ("RLOOTrainer", "RLOOConfig")}
ACT = "_generate_and_score_completions"  # trl's method
OF_A_ROLLOUT = "reward"  # logged in the first optimizer step on one
FIRST = "learning_rate"  # of a rollout: that of its first step; all else is a mean

Metrics = dict[str, float]


def run(job: Job, folder: Path) -> Record:
    """Train as the job says, and write record and weights, these by the names that `Policy` has.

    Raises:
        Refused: if this trl or this model cannot.
    """
    with warned() as warnings:
        record = _run(job, folder)
    record.warnings = warnings
    record.save(folder)
    return record


def _run(job: Job, folder: Path) -> Record:
    trl: Any = importlib.import_module("trl")
    trainer_class, config_class = (getattr(trl, name) for name in CLASSES[job.stage])
    facts: dict[str, Any] = {}
    lm = load_lm(job, facts)
    tokenizer = load_tokenizer(job.model, lm, facts)
    told = {
        "output_dir": str(folder / "trl"),
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "optim": "adamw_torch",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "num_train_epochs": 1,
        **_batches(job),
    }
    told |= job.options | {"shuffle_dataset": False}
    started = time.perf_counter()
    with in_precision_of(job), isolated():
        try:
            args = config_class(**told)
        except (ValueError, TypeError) as error:
            raise Refused(f"trl's {config_class.__name__}: {first_line(error)}") from error
        _require_whole_steps(args)
        size = args.num_generations
        prompts = [{"prompt": str(i)} for i in range(_groups(job, size))]
        given = Given(job.rollouts, size)
        trainer = trainer_class(
            model=lm,
            reward_funcs=given.scores,
            args=args,
            train_dataset=Dataset.from_list(prompts),
            processing_class=tokenizer,
        )
        _same_tables(trainer, lm)
        batches = given.to(trainer)
        trainer.train()
    record = _record(job, trainer, started)
    record.facts |= facts
    per_rollout = args.steps_per_generation * args.num_iterations
    record.batches = [batches[i : i + per_rollout] for i in range(0, len(batches), per_rollout)]
    record.logged = by_rollout(trainer.state.log_history)
    differ = {x.ours for x in METRICS[job.stage, record.trainer] if x.means}
    record.steps = [
        {
            name: value
            for name, value in in_our_names(job.stage, record.trainer, logged).items()
            if name not in differ
        }
        for logged in record.logged
    ]
    save_file(_weights(lm, "lm."), folder / WEIGHTS)
    return record


def _batches(job: Job) -> dict[str, Any]:
    """Sizes that fit the rollouts, where the job's options do not say them."""
    rows, given = len(job.rollouts[0].scores), job.options
    accumulated = given.get("gradient_accumulation_steps", 1)
    steps = given.get("steps_per_generation", accumulated)
    size = given.get("per_device_train_batch_size", max(1, rows // steps))
    if size * steps != rows:
        raise Refused(
            f"a rollout of trl's has per_device_train_batch_size {size} times steps_per_generation "
            f"{steps} rows, and here {rows}; make them equal"
        )
    return {
        "per_device_train_batch_size": size,
        "steps_per_generation": steps,
        "gradient_accumulation_steps": accumulated,
        "max_completion_length": max(len(ids) for x in job.rollouts for ids in x.response_ids),
    }


def _require_whole_steps(args: Any) -> None:
    """An optimizer step that spans two rollouts has no counterpart here."""
    if args.steps_per_generation % args.gradient_accumulation_steps:
        raise Refused(
            f"gradient_accumulation_steps {args.gradient_accumulation_steps} must divide "
            f"steps_per_generation {args.steps_per_generation}"
        )


def _groups(job: Job, size: int) -> int:
    rows = sum(len(rollout.scores) for rollout in job.rollouts)
    for rollout in job.rollouts:
        ids = rollout.prompt_ids
        if any(ids[i] != ids[i - i % size] for i in range(len(ids))):
            raise Refused(f"num_generations is {size}, and the rollouts have other groups")
    return rows // size


def _same_tables(trainer: Any, lm: Any) -> None:
    """The reference, which trl loads itself, gets the model's tables of positions: in float64 it
    would make others."""
    reference = getattr(trainer, "ref_model", None)
    if reference is not None:
        theirs = dict(reference.named_buffers())
        for name, table in lm.named_buffers():
            theirs[name].copy_(table)


class Given:
    """In the place of sampling and scoring: one rollout after the other."""

    def __init__(self, rollouts: Sequence[Rollout], size: int) -> None:
        self.rollouts, self.size, self.number = rollouts, size, -1

    def scores(self, *_: Any, **__: Any) -> list[float]:
        """A reward function."""
        return self.rollouts[self.number].scores

    def prompts(self, prompts: list[str]) -> Any:
        """In the place of tokenising: the prompts are numbers of groups."""
        self.number += 1
        rollout = self.rollouts[self.number]
        first = sum(len(x.scores) for x in self.rollouts[: self.number])
        expected = [str((first + row) // self.size) for row in range(len(rollout.scores))]
        if prompts != expected:
            raise Refused("trl takes the prompts in another order than it was given")
        return rollout.prompt_ids, None, {}

    def to(self, trainer: Any) -> list[list[int]]:
        """Have a trainer take them; returns the rows of each micro-batch, as it comes to it."""
        batches: list[list[int]] = []
        act, learn = getattr(trainer, ACT), trainer._compute_loss
        is_grpo = type(trainer).__name__ == "GRPOTrainer"

        def responses(*_: Any, **__: Any) -> Any:
            ids = self.rollouts[self.number].response_ids
            return (ids, None) if is_grpo else ids

        def numbered(inputs: Any) -> Any:
            found = act(inputs)
            first = sum(len(x.scores) for x in self.rollouts[: self.number])
            rows = torch.arange(first, first + len(found["advantages"]))
            return found | {"row": rows}  # which trl shuffles with all else

        def noted(model: Any, inputs: Any) -> Tensor:
            batches.append(inputs["row"].tolist())
            return learn(model, inputs)

        trainer._tokenize_prompts = self.prompts
        trainer._generate_single_turn = responses
        setattr(trainer, ACT, numbered)
        trainer._compute_loss = noted
        return batches


def by_rollout(log: Sequence[dict[str, Any]]) -> list[Metrics]:
    """What was logged of each rollout: means over its optimizer steps."""
    rollouts: list[list[dict[str, Any]]] = []
    for entry in (entry for entry in log if "loss" in entry):
        if OF_A_ROLLOUT in entry:
            rollouts.append([])
        rollouts[-1].append(entry)
    return [
        {
            name: steps[0][name] if name == FIRST else fmean(x[name] for x in steps if name in x)
            for name in steps[0]
        }
        for steps in rollouts
    ]


def _record(job: Job, trainer: Any, started: float) -> Record:
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
    group = optimizer.param_groups[0]
    args = trainer.args
    return Record(
        job.stage,
        versions=versions(),
        trainer=CLASSES[job.stage][0],
        options=json.loads(json.dumps(vars(args), default=str)),
        facts={
            "dtype": "float64" if job.float64 else "float32",
            "dropout": max((p for _, _, p in dropouts(trainer.model)), default=0.0),
            "temperature": args.temperature,
            "total_steps": trainer.state.max_steps,
            "accumulated": args.gradient_accumulation_steps,
            "defaults": defaults_of(args, job.options),
            "optimizer": {
                "class": type(optimizer).__name__,
                **{name: group[name] for name in ("betas", "eps") if name in group},
            },
        },
        rows=_rows(job.rollouts),
        seconds=time.perf_counter() - started,
        peak_bytes=peak_bytes(),
    )
