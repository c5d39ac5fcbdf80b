"""Checkpoints of a stage that is under way: all that the rest of its run depends on.

A checkpoint is a folder with the weights and the state's tensors in safetensors and the rest in
JSON. It gets its name only when it is complete, and older ones are deleted only after that.
"""

import json
import math
import mmap
import random
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf_min import distributed
from rlhf_min.errors import BadInput, require
from rlhf_min.harness.run.atomic import publish, saving
from rlhf_min.harness.run.identity import (
    difference,
    fingerprint,
    identity,
    in_threads,
    trained_tensors,
)
from rlhf_min.harness.run.layout import STEP, remove
from rlhf_min.harness.run.saved_models import unsound
from rlhf_min.harness.run.signals import Stopped
from rlhf_min.policy import Policy
from rlhf_min.reward_model import RewardModel
from rlhf_min.speed.sharding import full, is_split, part_of

FORMAT = 4
RECORD, WEIGHTS = "checkpoint.json", "weights.safetensors"
STATES = ("state-1.safetensors", "state-2.safetensors")  # as large as the weights, with AdamW

# What values of the wrong kind, size or shape raise wherever they are used.
_DAMAGED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RecursionError,
    RuntimeError,  # of torch
    SafetensorError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint is taken of, and put back into.

    Args:
        stage: its name.
        module: the model that is trained.
        state: of the algorithm, with `state_dict` and `restore`.
        save_model: writes the model as a finished folder.
        models: all that the stage depends on by name; a run is continued with the same only.
        texts: that the model is tried on before it is kept; a few are taken.
        examples: what it is trained on; a run is continued on the same only.
        total: steps of the stage.
        heldout: what it is measured on, if that is known; a run may be continued with others, but
            what was measured before cannot be compared then.
        sources: a number for the file of each reward function; a warning says if it is another one.
        alone: the tensors that the loss of each row of a batch is made of, with the row's number;
            only computed when a loss is not finite, to say which rows are at fault.
    """

    stage: str
    module: nn.Module
    state: Any
    save_model: Callable[[Path], None]
    models: Mapping[str, Policy | RewardModel]
    texts: Sequence[str]
    examples: Sequence[Any]
    total: int
    heldout: Sequence[Any] | None = None
    sources: Mapping[str, int] = field(default_factory=dict)
    alone: Callable[[Any], Iterable[tuple[int, Mapping[str, Tensor]]]] = lambda _: ()

    @cached_property
    def data(self) -> str:
        """A digest of all that the examples hold, in their order."""
        return fingerprint(self.examples)

    @cached_property
    def measured_on(self) -> str:
        """The same of the held-out rows."""
        return fingerprint(self.heldout or ())

    @cached_property
    def identities(self) -> dict[str, Any]:
        """What each model is. Computed once: of a frozen model nothing changes, and of the one
        that is trained only the weights, which are left out."""
        return {
            name: identity(model, trained=model is self.module)
            for name, model in self.models.items()
        }


class Checkpoint:
    """A complete checkpoint on the disk.

    Raises:
        BadInput: if files are missing, cut, changed, or not what `write` writes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            require(
                self.record["format"] == FORMAT,
                f"{folder}: written by another version, in format {self.record['format']}; go on "
                "with that version, or start a new run",
            )
            require(
                self.record.pop("crc32") == crc32_of(self.record),
                f"{folder / RECORD}: changed since it was written",
            )
            for name in (WEIGHTS, *STATES):
                same = _identity(folder / name) == self.record["files"][name]
                require(same, f"{folder / name}: cut or changed since it was written")
            self.step, self.total = int(self.record["step"]), int(self.record["total"])
            self.finished = bool(self.record["finished"])
            self.sizes = {str(k): int(v) for k, v in self.record["sizes"].items()}
            require(
                0 <= self.step <= self.total and all(size >= 0 for size in self.sizes.values()),
                f"{folder / RECORD}: step {self.step} of {self.total} with lines up to "
                f"{self.sizes} cannot be",
            )
        except BadInput:
            raise
        except _DAMAGED as error:
            raise BadInput(f"{folder}: not a complete checkpoint ({_reason(error)})") from error

    def restore(self, snapshot: Snapshot) -> None:
        """Put weights, state and random states back, if all models are the same.

        Raises:
            BadInput: if this is a checkpoint of another model, of other data, or damaged.
        """
        require(
            self.record.get("data") == snapshot.data,
            f"{self.folder}: the {snapshot.stage} run had other data; give the same --data and "
            "models, or start a new run",
        )
        try:
            for name, now in snapshot.identities.items():
                what = difference(self.record["models"][name], now)
                require(
                    what is None,
                    f"{self.folder}: {name} is not what this was saved with: {what}; give the same "
                    "models, or start a new run",
                )
            self._warn_of_changes(snapshot)
            _load_weights(snapshot.module, self.folder / WEIGHTS)
            files = [load_file(self.folder / name) for name in STATES]
            tensors = {name: x for file in files for name, x in file.items()}
            # Copies: what `load_file` returns would hold the files, long after they are deleted. Of
            # a tensor that is split, each process copies its part only, where it belongs.
            split = is_split(snapshot.module)
            tensors = {k: x if split and x.ndim else x.clone() for k, x in tensors.items()}
            snapshot.state.restore(_joined(self.record["state"], tensors))
            fault = unsound(snapshot.module, snapshot.texts)
            require(fault is None, f"{self.folder}: {fault} is not finite; start a new run")
            _set_random_states(_joined(self.record["random"], tensors))
        except BadInput:
            raise
        except _DAMAGED as error:
            raise BadInput(f"{self.folder}: cannot be restored ({_reason(error)})") from error

    def _warn_of_changes(self, snapshot: Snapshot) -> None:
        """What a run may be continued with, but not to the bits of the one that was stopped."""
        if self.record.get("heldout", snapshot.measured_on) != snapshot.measured_on:
            print(
                f"{snapshot.stage}: the held-out rows are others than until step {self.step}, "
                "so what eval/ says before and after it cannot be compared"
            )
        for name, source in snapshot.sources.items():
            if self.record.get("sources", {}).get(name, source) != source:
                print(
                    f"{snapshot.stage}: the file of {name} was changed since step {self.step}, so "
                    "its rewards may be others from there on"
                )


class Writer:
    """Writes the checkpoints of one stage, one after the other.

    The steps wait only until the system has all bytes. That these are on the disk, read back, and
    under their name, and that older ones go, comes in a thread beside the next steps.
    """

    def __init__(self, folder: Path, snapshot: Snapshot, *, keep_last: int) -> None:
        self._folder, self._snapshot, self._keep_last = folder, snapshot, keep_last
        self._pool = ThreadPoolExecutor(1)
        self._underway: Future[None] | None = None

    def write(self, *, finished: bool, sizes: Mapping[str, int]) -> None:
        """Begin a checkpoint of the present step, when the one before is complete; as `begin`."""
        self.wait()
        new = self._folder / f"step-{self._snapshot.state.step:06d}"
        complete = begin(new, self._snapshot, finished=finished, sizes=sizes)

        def then() -> None:
            complete()
            keep(self._folder, new, self._keep_last)

        try:
            self._underway = self._pool.submit(then)
        except RuntimeError:  # the system gives no further thread
            self._pool = ThreadPoolExecutor(1)  # the other one still holds `then`
            then()

    def check(self) -> None:
        """Raise what the thread raised, if it is done."""
        if self._underway is not None and self._underway.done():
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint under way is complete.

        Raises:
            BadInput: if it could not be written; the one before is still there.
        """
        underway, self._underway = self._underway, None
        if underway is not None:
            underway.result()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            self.wait()
        except BadInput as failed:
            if error is None or isinstance(error, Stopped):  # which would say that it is saved
                raise
            print(f"warning: {failed}", file=sys.stderr)  # what ends the stage matters more
        finally:
            self._pool.shutdown()


def begin(
    folder: Path, snapshot: Snapshot, *, finished: bool, sizes: Mapping[str, int]
) -> Callable[[], None]:
    """Give the system all that a checkpoint holds; then training may go on. Of several processes
    the first writes.

    Args:
        finished: the stage is over.
        sizes: bytes of the run's growing files at this step; what follows belongs to later ones.

    Returns:
        What is left to do: read the tensors back, add the record, and give the folder its name.

    Raises:
        BadInput: if it cannot be written, now or then; what was there before is left as it was.
    """
    tensors: dict[str, Tensor] = {}
    record: dict[str, Any] = {
        "format": FORMAT,
        "stage": snapshot.stage,
        "step": snapshot.state.step,
        "total": snapshot.total,
        "finished": finished,
        "sizes": dict(sizes),
        "data": snapshot.data,
        "heldout": snapshot.measured_on,
        "sources": dict(snapshot.sources),
        "models": snapshot.identities,
        "state": _split(snapshot.state.state_dict(), tensors, "state"),
        "random": _split(_random_states(), tensors, "random"),
    }
    changed = trained_tensors(snapshot.module)
    weights = {name: _to_write(x) for name, x in changed.items()}
    parts = {WEIGHTS: weights, **_shared_out(tensors)}
    if not distributed.is_main():
        return lambda: None
    with saving(folder) as new:
        # They wait for the system's memory more than for us.
        in_threads(save_file, parts.values(), [new / name for name in parts])

    def complete() -> None:
        with saving(folder, begun=True) as new:
            record["files"] = {name: _identity(new / name) for name in (WEIGHTS, *STATES)}
            record["crc32"] = crc32_of(record)
            (new / RECORD).write_text(json.dumps(record, allow_nan=False) + "\n", encoding="utf-8")
            publish(new, folder)

    return complete


def latest(folder: Path) -> Checkpoint | None:
    """The newest sound checkpoint in a folder; each that is not is passed over with a line.

    Raises:
        BadInput: if there are checkpoints and none is sound: to start anew is for the user to say.
    """
    paths = checkpoints(folder)
    for path in reversed(paths):
        try:
            return Checkpoint(path)
        except BadInput as error:
            print(f"passed over: {error}")
    require(
        not paths,
        f"{folder}: none of its checkpoints can be used; put one back, or start a new run",
    )
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, sound or not, by their steps."""
    paths = [x for x in folder.glob("step-*") if re.fullmatch(STEP, x.name) and x.is_dir()]
    return sorted(paths, key=lambda path: int(path.name[5:]))


def keep(folder: Path, newest: Path, n: int) -> None:
    """Delete all checkpoints but the newest and the n - 1 before it, and those that hold files of
    the user's."""
    if not distributed.is_main():
        return
    paths = checkpoints(folder)
    place = paths.index(newest)
    for path in [*paths[: max(0, place + 1 - n)], *paths[place + 1 :]]:
        try:
            remove(path)
        except OSError as error:  # one checkpoint more than asked for does no harm
            print(f"warning: {path} could not be removed: {error.strerror}", file=sys.stderr)


# Tensors and JSON


def _split(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """The value as JSON, with its tensors moved to `tensors` under their paths."""
    if isinstance(value, Tensor):
        tensors[name] = _to_write(value)
        return {"$tensor": name}
    if isinstance(value, dict):
        items = {key: _split(item, tensors, f"{name}.{key}") for key, item in value.items()}
        plain = all(isinstance(key, str) and not key.startswith("$") for key in items)
        return items if plain else {"$items": [[key, item] for key, item in items.items()]}
    if isinstance(value, (list, tuple)):
        parts = [_split(item, tensors, f"{name}.{i}") for i, item in enumerate(value)]
        return {"$tuple": parts} if isinstance(value, tuple) else parts
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}, which a checkpoint cannot hold")


def _to_write(tensor: Tensor) -> Tensor:
    """The whole tensor, on the process that writes it. Of one that is split each has a part."""
    kept = tensor.detach()
    if isinstance(tensor, DTensor):
        kept = full(kept).cpu()  # beside the model there may be no room for it
    return kept.contiguous() if distributed.is_main() else kept.new_empty(0)


def _joined(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `_split`."""
    if isinstance(value, list):
        return [_joined(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"$tensor": name}:
            return tensors[name]
        case {"$items": items}:
            return {key: _joined(item, tensors) for key, item in items}
        case {"$tuple": parts}:
            return tuple(_joined(parts, tensors))
        case {"$float": text}:
            return float(text)
    return {key: _joined(item, tensors) for key, item in value.items()}


def _shared_out(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of the state, about the same number of bytes for each of its files."""
    names = sorted(tensors, key=lambda name: tensors[name].nbytes)
    return {
        file: {name: tensors[name] for name in names[i :: len(STATES)]}
        for i, file in enumerate(STATES)
    }


@torch.no_grad()
def _load_weights(module: nn.Module, file: Path) -> None:
    named = trained_tensors(module)
    with safe_open(file, framework="pt") as saved:
        names = set(saved.keys())
        require(
            names == set(named),
            f"{file}: weights of another model; {len(names ^ set(named))} names differ, "
            f"such as {min(names ^ set(named), default='')}",
        )
        for name, tensor in named.items():
            was = saved.get_tensor(name)
            require(
                was.shape == tensor.shape and was.dtype == tensor.dtype,
                f"{file}: {name} is {tuple(was.shape)} {was.dtype}, the model's is "
                f"{tuple(tensor.shape)} {tensor.dtype}",
            )
            tensor.copy_(part_of(was, tensor))


def _identity(file: Path) -> list[int]:
    """Bytes and CRC-32 of a file, as it is read back."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size == 0:
            return [0, 0]
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return [size, zlib.crc32(content)]


def crc32_of(record: Mapping[str, Any]) -> int:
    """Of a record as JSON; it reads back as it was written, to the last digit."""
    return zlib.crc32(json.dumps(record).encode())


def _random_states() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_states(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(states["torch"])
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
