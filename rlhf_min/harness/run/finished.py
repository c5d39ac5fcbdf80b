"""Finished models as folders that plain ``from_pretrained`` of ``transformers`` loads."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from rlhf_min.errors import BadInput, require
from rlhf_min.harness.run.finite import nonfinite_weight
from rlhf_min.harness.run.ownership import OLD, discard
from rlhf_min.loading.models import quiet
from rlhf_min.policy import VALUE_FILE, Policy
from rlhf_min.reward_model import RewardModel


class NotWritten(BadInput):
    """The disk does not take what a run has made."""


def save_policy(policy: Policy, folder: Path) -> None:
    """Write config, ``model.safetensors``, tokenizer, ``model.pt``, and the value head if any.

    Raises:
        BadInput: for weights that are not finite, and for what the disk refuses. What was in the
            folder stays.
    """
    _require_finite(policy, folder)
    with complete_folder(folder) as new:
        _save_model(policy.lm, new)
        policy.tokenizer.save_pretrained(new)
        if policy.value_head is not None:
            tensors = {k: v.contiguous().cpu() for k, v in policy.critic_tensors().items()}
            save_file(tensors, new / VALUE_FILE)


def save_reward_model(reward_model: RewardModel, folder: Path) -> None:
    """Write config, ``model.safetensors``, tokenizer and ``model.pt``; raises as `save_policy`."""
    _require_finite(reward_model, folder)
    with complete_folder(folder) as new:
        _save_model(reward_model.model, new)
        reward_model.tokenizer.save_pretrained(new)


def load_state(model: nn.Module, file: Path) -> None:
    """Load a ``model.pt`` into a model of the same shape. Reads tensors only, never code."""
    model.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))


def _require_finite(model: nn.Module, folder: Path) -> None:
    name = nonfinite_weight(model)
    require(
        name is None,
        f"{folder}: not saved, since {name} is infinite or NaN; train with a lower learning rate",
    )


@quiet()
def _save_model(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    torch.save({k: v.cpu() for k, v in model.state_dict().items()}, folder / "model.pt")


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """A folder that appears under its name only when everything in it is on the disk."""
    with saving(folder) as new:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        yield new
        publish(new, folder)


@contextmanager
def saving(folder: Path) -> Iterator[Path]:
    """Where the folder is until it is complete. An error inside removes that.

    Raises:
        NotWritten: for what the disk refuses.
    """
    require(not folder.is_file(), f"{folder}: could not be saved: there is a file of this name")
    new = folder.with_name(f".{folder.name}-{os.getpid()}")
    sound = False
    try:
        yield new
        sound = True
    # A full disk is an OSError for us, a SafetensorError or a RuntimeError for the libraries.
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise NotWritten(f"{folder}: could not be saved: {reason}") from error
    finally:
        if not sound:
            shutil.rmtree(new, ignore_errors=True)


def write_file(file: Path, content: str | bytes) -> None:
    """Write a file that is whole or, if the disk refuses it, as it was before.

    Names of files that are not UTF-8 may stand in a text; they are written with escapes.
    """
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    new = file.with_name(f".{file.name}")
    try:
        new.write_bytes(content)
        flush(new)
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)


def publish(new: Path, folder: Path) -> None:
    """Flush everything in a folder to the disk, and give it its name in the place of another.

    Files of the user's that lay in the other move on into it.
    """
    old = new.with_name(f"{new.name}{OLD}")
    for path in [*new.rglob("*"), new]:
        if path.is_file():
            path.chmod(0o644)  # safetensors makes its files readable for their owner only
        flush(path)
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(new, folder)
    except OSError:
        if old.exists():
            os.rename(old, folder)
        raise
    flush(folder.parent)
    if old.exists():
        discard(old, folder)


def flush(path: Path) -> None:
    """Until the file, or the folder's list of names, is on the disk (where folders have that)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
