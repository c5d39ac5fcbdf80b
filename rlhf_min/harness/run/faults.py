"""What a run says and leaves when its numbers go wrong."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from rlhf_min.errors import BadInput, Diverged, NonFinite
from rlhf_min.harness.run import lifeline
from rlhf_min.harness.run.atomic import write_file
from rlhf_min.harness.run.checkpoint import Snapshot, checkpoints
from rlhf_min.harness.run.layout import BEST, CHECKPOINTS, LAST_GOOD
from rlhf_min.harness.run.saved_models import unsound
from rlhf_min.optim import dropout_rng
from rlhf_min.policy import Policy

LAST_METRICS = 20  # steps before the fault whose metrics are saved beside the batch

Decode = Callable[[Tensor], str]


def require_sound(snapshot: Snapshot, metrics: Mapping[str, Any]) -> None:
    """Raise `Diverged` unless the model may be published, or replace one that was kept.

    Every step looks at its loss and gradient before it changes the weights; this one is after it.

    Args:
        snapshot: of the stage.
        metrics: of the step; what begins with ``eval/`` was measured with these weights.
    """
    measured = (k for k, x in metrics.items() if k.startswith("eval/") and not math.isfinite(x))
    if fault := unsound(snapshot.module, snapshot.texts) or next(measured, None):
        raise _broken(snapshot, fault, metrics)


class _Broken(Diverged):
    """It names the weight, and says what was kept."""


def _broken(snapshot: Snapshot, fault: str, metrics: Mapping[str, Any]) -> _Broken:
    names = {"learning rate": "learning_rate", "gradient norm": "grad_norm"}
    size = ", ".join(f"{k} {metrics[name]:.3g}" for k, name in names.items() if name in metrics)
    return _Broken(
        f"{snapshot.stage}, step {snapshot.state.step} of {snapshot.total}: {fault} is not finite "
        f"after the update{f' ({size})' if size else ''}; this model is not kept"
    )


def require_finite(stage: str, measured: Mapping[str, float]) -> None:
    """Raise `Diverged` if what was measured of a trained model is not finite."""
    for name, value in measured.items():
        if not math.isfinite(value):
            raise Diverged(
                f"{stage}: {name} of the trained model is not finite, so it is not published; its "
                "checkpoints are as they are; train with a lower learning rate, or in fp32"
            )


@contextmanager
def explained(
    folder: Path, metrics: Sequence[Mapping[str, Any]], snapshot: Snapshot
) -> Iterator[None]:
    """Inside, a `NonFinite` leaves its batch and the model in the run's folder and says where.
    Where the weights are at fault it becomes `Diverged`, which says what was kept before.

    Args:
        folder: of the run.
        metrics: a row for each step so far; it may still grow.
        snapshot: of the stage that runs.
    """
    try:
        yield
    except NonFinite as raised:
        lifeline.take_the_word()
        error = _with_rows(raised, snapshot)
        fault = unsound(snapshot.module, snapshot.texts)
        last_good = folder / LAST_GOOD / snapshot.stage
        try:
            decode = snapshot.module.decode if isinstance(snapshot.module, Policy) else None
            saved = f"the batch is in {save_nonfinite(error, folder, metrics, decode)}"
            if fault is None:
                snapshot.save_model(last_good)
                saved += f", the model in {last_good}"
        except (OSError, SafetensorError, BadInput) as reason:  # the fault is what matters
            saved = f"not all could be saved: {' '.join(str(reason).split())}"
        if fault is None:
            error.args = (f"{error}; {saved}",)
            raise error from raised
        fault = f"{fault}, and so {error.tensor} of step {snapshot.state.step + 1},"
        broken = _broken(snapshot, fault, metrics[-1] if metrics else {})
        raise _with_earlier(broken, folder, snapshot, saved) from raised
    except Diverged as error:
        lifeline.take_the_word()
        fault = None if isinstance(error, _Broken) else unsound(snapshot.module, snapshot.texts)
        if fault is not None:
            raise _with_earlier(_broken(snapshot, fault, {}), folder, snapshot) from error
        _with_earlier(error, folder, snapshot)
        raise


def _with_rows(error: NonFinite, snapshot: Snapshot) -> NonFinite:
    """The same error, with the rows of its batch that are at fault, if single ones are."""
    device = next(snapshot.module.parameters()).device
    with (
        torch.no_grad(),
        snapshot.state.optimizer.autocast(),
        dropout_rng(0, error.step, device),
    ):
        name, rows = first_nonfinite(snapshot.alone(error.batch)) or (error.tensor, [])
    return NonFinite(error.step, name, error.batch, rows)


def first_nonfinite(
    rows: Iterable[tuple[int, Mapping[str, Tensor]]],
) -> tuple[str, list[int]] | None:
    """The first name under which a row has a number that is not finite, and all such rows.

    Args:
        rows: the number of each row, and what belongs to it, in tensors of any shape.

    Example:
        >>> good, bad = torch.zeros(3), torch.tensor([0.0, torch.nan])
        >>> first_nonfinite([(0, {"values": good}), (1, {"values": bad}), (2, {"values": bad})])
        ('values', [1, 2])
    """
    at_fault: dict[str, set[int]] = {}
    for row, tensors in rows:
        for name, x in tensors.items():
            if not bool(torch.isfinite(x).all()):
                at_fault.setdefault(name, set()).add(row)
    return next(((name, sorted(numbers)) for name, numbers in at_fault.items()), None)


def _with_earlier(error: Diverged, folder: Path, snapshot: Snapshot, *details: str) -> Diverged:
    """The error, which also says what was kept of the stage before, and what to do."""
    saved = checkpoints(folder / CHECKPOINTS / snapshot.stage)[-1:]
    best = [path for path in [folder / BEST / snapshot.stage] if path.is_dir()]
    kept = " and ".join(map(str, saved + best))
    before = f"what was good before is in {kept}" if kept else "nothing was kept before it"
    cure = (
        f"go on from there with a lower learning rate (--resume {folder} --allow_config_change)"
        if saved
        else "start anew with a lower learning rate, and with --save_every"
    )
    error.args = ("; ".join([str(error), *details, before, cure]),)
    return error


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
    write_file(file.with_suffix(".safetensors"), safetensors.torch.save(tensors))
    write_file(file, json.dumps(record, indent=1) + "\n")
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
