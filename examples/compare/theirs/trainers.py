"""Builds trl's trainers of SFT, reward model and DPO: what must be said, and trl's defaults."""

import copy
import difflib
import tempfile
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset

from ..job import START, Job
from . import Refused, first_line
from .recorder import NUMBER

CLASSES = {
    "sft": ("SFTTrainer", "SFTConfig"),
    "reward": ("RewardTrainer", "RewardConfig"),
    "dpo": ("DPOTrainer", "DPOConfig"),
}
COLUMNS = {
    "sft": ("prompt", "completion"),
    "reward": ("prompt", "chosen", "rejected"),
    "dpo": ("prompt", "chosen", "rejected"),
}
# The older of its names, and the newer: memory is for time, and nothing else changes.
CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")


def build(job: Job, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The trainer, and what its options do not tell.

    Args:
        job: its options go before all others.
        folder: where the model is kept as it started, if some of its weights are new.
    """
    trainer_class, config_class = (getattr(trl, name) for name in CLASSES[job.stage])
    args = _config(config_class, job)
    transformers.set_seed(args.seed)  # of new weights
    tokenizer = _from_folder(transformers.AutoTokenizer, job.model)
    facts: dict[str, Any] = {}
    model = _model(job, folder, facts)
    dataset = _dataset(job, tokenizer, facts)
    models = {"model": model}
    if job.stage == "dpo":
        models["ref_model"] = copy.deepcopy(model)
        facts["ref_model"] = "a copy of the model, given"
    name = "tokenizer" if version("trl").startswith("0.11.") else "processing_class"
    try:
        trainer = trainer_class(args=args, train_dataset=dataset, **models, **{name: tokenizer})
    except (ValueError, TypeError, KeyError, NotImplementedError, ImportError) as error:
        said = f"trl {version('trl')}: {trainer_class.__name__}: {first_line(error)}"
        raise Refused(said) from error
    return trainer, facts


def _config(config_class: Any, job: Job) -> Any:
    """What both sides must have in common, and all else as the job says or trl has it."""
    known = {field.name for field in fields(config_class)}
    for name in job.options:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=3)
            hint = f"; there is {', '.join(near)}" if near else ""
            raise Refused(
                f"trl {version('trl')}: {config_class.__name__} has no option {name}{hint}"
            )
    options = {
        "output_dir": tempfile.mkdtemp(prefix="trl"),
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "optim": "adamw_torch",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    if "num_train_epochs" not in job.options:  # which max_steps would go before
        options["max_steps"] = job.steps
    if not set(CHECKPOINTING) & job.options.keys():
        options[[name for name in CHECKPOINTING if name in known][-1]] = False
    try:
        return config_class(**(options | job.options))
    except (ValueError, TypeError) as error:
        said = f"trl {version('trl')}: {config_class.__name__}: {first_line(error)}"
        raise Refused(said) from error


def _from_folder(auto: Any, folder: str, **how: Any) -> Any:
    """A model or tokenizer, or what this transformers has against it."""
    try:
        return auto.from_pretrained(folder, **how)
    except Exception as error:  # of every kind: a file, a name, a shape, a version
        said = f"transformers {transformers.__version__} cannot load it: {first_line(error)}"
        raise Refused(f"{folder}: {said}") from error


def _model(job: Job, folder: Path, facts: dict[str, Any]) -> Any:
    """In the class of the stage. A head that the folder lacks is new: then all of it is kept."""
    dtype = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    how: dict[str, Any] = {dtype: torch.float64 if job.float64 else torch.float32}
    auto: Any = transformers.AutoModelForCausalLM
    if job.stage == "reward":
        auto, how["num_labels"] = transformers.AutoModelForSequenceClassification, 1
    model, report = _from_folder(auto, job.model, output_loading_info=True, **how)
    if report["missing_keys"]:
        facts["new_weights"] = sorted(report["missing_keys"])
        model.save_pretrained(folder / START)
    return model


def _dataset(job: Job, tokenizer: Any, facts: dict[str, Any]) -> Dataset:
    """The rows in trl's columns, each with its number."""
    for number, row in enumerate(job.rows):
        for column in COLUMNS[job.stage]:
            if column not in row:
                raise Refused(f"row {number} has no {column}")
    rows = job.rows
    if job.stage == "reward" and tokenizer.eos_token is None:
        facts["rows"] = "ids of prompt and response as two segments: trl needs an EOS for texts"
        rows = [_segments(row, tokenizer) for row in rows]
    return Dataset.from_list([{**row, NUMBER: number} for number, row in enumerate(rows)])


def _segments(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The ids of prompt and response together, as BERT takes them."""
    ids = {
        f"{side}_ids": tokenizer(row["prompt"], row[side])["input_ids"]
        for side in ("chosen", "rejected")
    }
    return ids | {name: row[name] for name in ("margin",) if name in row}
