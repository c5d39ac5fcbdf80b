"""Drives the trainers of trl 1.12.0, unmodified, in float64 and without a network.

What is supplied here: texts or ids, the options that both sides share, and float64. The order of
the rows needs nothing: both sides draw it from the seed plus the epoch.
"""

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from compare.theirs.float64 import float64 as all_in_float64
from compare.theirs.float64 import isolated
from small import SYLLABLES, weights
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

torch.set_num_threads(1)  # models so small only wait for a second thread

VERSION = "1.12.0"
SHIMMED = "float64, shimmed"  # see `float64`
# As the installed transformers calls it; the older name goes in version 6.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
SEED = 7  # of the order of the rows, on both sides
# Where a gradient is 0 but for rounding, as that of a key's bias, Adam divides rounding by 1e-8:
# only a low rate keeps two right runs within FP64 of each other.
RATE = 3e-5
# What the runs of SFT, reward training and DPO have in common, in our words and in trl's.
OURS: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 4,
    "learning_rate": RATE,
    "warmup_share": 1 / 3,  # 2 of 6 steps
    "weight_decay": 0.1,
    "seed": SEED,
}
THEIRS = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": RATE,
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "seed": SEED,
}
# Metrics of DPO. Ours alone: the changes of both log-probabilities, 1 / beta times the rewards.
DPO_METRICS = {
    "chosen_rewards": "rewards/chosen",
    "rejected_rewards": "rewards/rejected",
    "margin": "rewards/margins",
    "accuracy": "rewards/accuracies",
    "chosen_logprobs": "logps/chosen",
    "rejected_logprobs": "logps/rejected",
}

Row = dict[str, Any]
Parity = Callable[..., None]  # the fixture in conftest.py


def import_trl() -> Any:
    """trl, or the whole module is skipped."""
    trl = pytest.importorskip("trl", reason=f"needs trl=={VERSION}", exc_type=ImportError)
    if trl.__version__ != VERSION:
        pytest.skip(f"needs trl=={VERSION}, found {trl.__version__}", allow_module_level=True)
    return trl


@contextmanager
def float64() -> Iterator[None]:
    """trl, and what it stands on, in float64, and `isolated`."""
    with isolated(), all_in_float64():
        yield


def options(folder: Path, **own: Any) -> dict[str, Any]:
    """What each trainer of trl is told: plain AdamW, every step logged, nothing saved."""
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        CHECKPOINTING: False,
        "optim": "adamw_torch",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": SEED,
        **own,
    }


def preference_rows(n: int, *, seed: int) -> list[Row]:
    """Random texts of unequal lengths. Prompts end in the space that trl joins them by."""
    rng = random.Random(seed)
    return [
        {
            "prompt": _text(rng, 5) + " ",
            "chosen": "bu " + _text(rng, 6),  # so that the two always differ
            "rejected": "ka " + _text(rng, 6),
        }
        for _ in range(n)
    ]


def demonstration_rows(n: int, *, seed: int) -> list[Row]:
    """Random texts of unequal lengths, as ours; trl calls the response "completion"."""
    rng = random.Random(seed)
    return [{"prompt": _text(rng, 5) + " ", "response": _text(rng, 6)} for _ in range(n)]


def _text(rng: random.Random, longest: int) -> str:
    return " ".join(rng.choices(SYLLABLES, k=rng.randint(1, longest)))


def near(model: PreTrainedModel, *, seed: int) -> PreTrainedModel:
    """A model of the same kind, close enough that no sigmoid of their difference saturates."""
    rng = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=rng, dtype=p.dtype))
    return other


def steps(logs: Iterable[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """Of trl's log, the entries of optimizer steps."""
    return [entry for entry in logs if "loss" in entry]


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Of each parameter that the loss depends on; the parameters' own gradients stay empty."""
    module.zero_grad()
    loss.backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def compare_runs(
    module: nn.Module,
    start: Mapping[str, Tensor],
    metrics: Sequence[Mapping[str, float]],
    trainer: Any,
    names: Mapping[str, str],
    parity: Parity,
    *,
    max_norm: float,
) -> None:
    """Each step's metrics, and the weights after the last. The clip is felt, and not always."""
    logs = steps(trainer.state.log_history)
    assert len(metrics) == len(logs) == 6
    norms = [m["grad_norm"] for m in metrics]
    assert min(norms) < max_norm < max(norms)
    for ours_now, theirs_now in zip(metrics, logs, strict=True):
        parity(metric_gap(ours_now, theirs_now, names))
    parity(largest_gap(weights(module), weights(trainer.model)))
    assert largest_gap(weights(module), start) > RATE


class TheirBatch(NamedTuple):
    """What a trainer of trl makes of one batch."""

    loss: float
    metrics: dict[str, float]
    gradient: dict[str, Tensor]


def their_batch(trainer: Any, rows: Sequence[int], **also: Any) -> TheirBatch:
    """These rows of its data through its collator and `compute_loss`."""
    trainer.model.train()
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in rows])
    loss = trainer.compute_loss(trainer.model, inputs, **also)
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return TheirBatch(loss.item(), metrics, gradients(trainer.model, loss))


def largest_gap(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest absolute difference of any entry; both must have the same names."""
    assert ours.keys() == theirs.keys()
    return largest(gap(ours[name], theirs[name]) for name in ours)


def metric_gap(
    ours: Mapping[str, float], theirs: Mapping[str, float], names: Mapping[str, str]
) -> float:
    """The largest absolute difference of any metric; `names` leads from ours to trl's."""
    return largest(abs(ours[name] - theirs[their_name]) for name, their_name in names.items())


def gap(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference of two tensors, which must be of one shape and dtype."""
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    return float((ours - theirs).abs().max())


def largest(gaps: Iterable[float]) -> float:
    """Infinity if one is NaN, which `max` would overlook."""
    return max(math.inf if math.isnan(g) else g for g in gaps)
