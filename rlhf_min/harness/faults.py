"""What a run says and leaves when its numbers go wrong."""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rlhf_min import ppo
from rlhf_min.errors import BadInput, NonFinite
from rlhf_min.harness.resume import Snapshot
from rlhf_min.models import Policy

RATIO_LIMIT = 10.0  # a policy so far from the one that sampled learns little from its samples
LAST_GOOD = "last_good"  # the folder of the models that were saved at a fault
LAST_METRICS = 20  # steps before the fault whose metrics are saved beside the batch
SAMPLES = 3  # shown where the KL is too large

Decode = Callable[[Tensor], str]


@contextmanager
def saved(
    folder: Path, metrics: Sequence[Mapping[str, Any]], snapshot: Snapshot | None
) -> Iterator[None]:
    """Inside, a `NonFinite` leaves its batch and the model in the run's folder and says where.

    Args:
        folder: of the run.
        metrics: a row for each step so far; it may still grow.
        snapshot: of the stage that runs, if there is one.
    """
    try:
        yield
    except NonFinite as error:
        policy = snapshot.module if snapshot and isinstance(snapshot.module, Policy) else None
        try:
            file = save_nonfinite(error, folder, metrics, policy.decode if policy else None)
            told = f"the batch is in {file}"
            if snapshot is not None:
                snapshot.save_model(folder / LAST_GOOD / snapshot.stage)
                told += f", the model in {folder / LAST_GOOD / snapshot.stage}"
        except (OSError, SafetensorError, BadInput) as reason:  # the fault is what matters
            told = f"not all could be saved: {' '.join(str(reason).split())}"
        error.args = (f"{error}; {told}",)
        raise


def save_nonfinite(
    error: NonFinite,
    folder: Path,
    metrics: Sequence[Mapping[str, Any]] = (),
    decode: Decode | None = None,
) -> Path:
    """Write what the step was computed from: tensors in safetensors, all else in JSON beside it.

    Args:
        error: with the batch.
        folder: where ``nonfinite-step-N.json`` and ``.safetensors`` appear.
        metrics: a row for each step so far; the last ones are written.
        decode: makes texts of ids.

    Returns:
        The JSON file. It says under which name each tensor is in the other.
    """
    tensors: dict[str, Tensor] = {}
    record = {
        "step": error.step,
        "tensor": error.tensor,
        "rows": error.rows,
        "batch": _split(error.batch, "batch", tensors, decode),
        "metrics": _split(list(metrics[-LAST_METRICS:]), "metrics", tensors, decode),
    }
    file = folder / f"nonfinite-step-{error.step}.json"
    new = file.with_name(f".{file.name}-{os.getpid()}")
    save_file(tensors, new)
    os.replace(new, file.with_suffix(".safetensors"))
    new.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(new, file)
    return file


def _split(value: Any, name: str, tensors: dict[str, Tensor], decode: Decode | None) -> Any:
    """The value as JSON, with its tensors moved to `tensors` under their paths."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone().contiguous()
        is_text = decode is not None and value.ndim == 1 and name.endswith("ids")
        return {"tensor": name, "text": decode(value)} if is_text and decode else {"tensor": name}
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        items = {str(key): item for key, item in value.items()}
        return {key: _split(item, f"{name}.{key}", tensors, decode) for key, item in items.items()}
    if isinstance(value, (list, tuple)):
        return [_split(item, f"{name}.{i}", tensors, decode) for i, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    # JSON has no NaN and no infinity, and a user's column may hold anything.
    return value if isinstance(value, float) and math.isfinite(value) else str(value)


def ratio_spikes(metrics: Iterable[Mapping[str, Any]]) -> str | None:
    """A line about PPO's steps in which a ratio exceeded `RATIO_LIMIT`, or None.

    >>> ratio_spikes([{"step": 1, "ratio_max": 3.0}])
    >>> ratio_spikes([{"step": 1, "ratio_max": 3.0}, {"step": 2, "ratio_max": 55.0}])
    'ratio above 10 in 1 of 2 steps, the largest 55 in step 2; a lower --learning_rate, fewer \
--epochs or --stop_kl keep it near 1'
    """
    ratios = [(row["ratio_max"], row["step"]) for row in metrics if "ratio_max" in row]
    spikes = [(ratio, step) for ratio, step in ratios if ratio > RATIO_LIMIT]
    if not spikes:
        return None
    ratio, step = max(spikes)
    return (
        f"ratio above {RATIO_LIMIT:g} in {len(spikes)} of {len(ratios)} steps, the largest "
        f"{ratio:.3g} in step {step}; a lower --learning_rate, fewer --epochs or --stop_kl keep it "
        "near 1"
    )


def too_far(state: ppo.State, max_kl: float | None) -> tuple[str, list[dict[str, Any]]] | None:
    """Why the KL has ended a run of PPO: what to print, and the responses that show it.

    Returns:
        The text, and `SAMPLES` rows with ``prompt``, ``response``, ``kl`` in nats and ``score``;
        None if it has not ended the run.
    """
    if not state.too_far or state.last is None:
        return None
    rollout = state.last.rollout
    k1 = torch.where(rollout.mask, rollout.logprobs - rollout.ref_logprobs, 0).sum(1)  # (B,)
    samples = [
        {
            "prompt": rollout.prompts[row],
            "response": rollout.responses[row],
            "kl": float(k1[row]),
            "score": float(rollout.scores[row]),
        }
        for row in k1.argsort(descending=True)[:SAMPLES].tolist()
    ]
    lines = [
        f"ended after step {state.step}: the KL to the reference is {float(k1.mean()):.3f} nats "
        f"per response, above --max_kl {max_kl}; its largest:"
    ]
    for x in samples:
        lines.append(
            f"  KL {x['kl']:.2f}, score {x['score']:.3f}: {x['prompt']!r} -> {x['response']!r}"
        )
    return "\n".join(lines), samples


def out_of_memory(error: MemoryError | RuntimeError) -> str | None:
    """A line with the options that help, if that is what the error is about."""
    told = " ".join(str(error).split())
    if not (
        isinstance(error, (MemoryError, torch.OutOfMemoryError))
        or "DefaultCPUAllocator" in told
        or "can't allocate memory" in told
    ):
        return None
    return (
        f"out of memory ({told[:100] or 'no more is told'}); lower --max_tokens, give "
        "--gradient_checkpointing, or make --batch_size or --minibatch_size smaller"
    )
