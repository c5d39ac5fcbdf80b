"""Builds trl's trainers of SFT, reward model and DPO: what must be said, and trl's defaults."""

import copy
import difflib
from contextlib import nullcontext
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset

from ..job import START, Ids, Job, Record, Row
from . import Refused, first_line
from .float64 import float64
from .recorder import NUMBER, attach, defaults_of, warned

CLASSES = {
    "sft": ("SFTTrainer", "SFTConfig"),
    "reward": ("RewardTrainer", "RewardConfig"),
    "dpo": ("DPOTrainer", "DPOConfig"),
}
TEXTS = {
    "sft": ("prompt", "completion"),
    "reward": ("prompt", "chosen", "rejected"),
    "dpo": ("prompt", "chosen", "rejected"),
}
SIDES = ("chosen", "rejected")
# The older of its names, and the newer. It saves memory and changes no number.
CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
TRL = version("trl")
OLD = TRL.startswith("0.11.")  # other names, and other columns
BEFORE_5 = transformers.__version__.startswith("4.")


def run(job: Job, folder: Path) -> Record:
    """Train by the job, and write the record and the weights into the folder."""
    with warned() as warnings:
        args = _config(job, folder)
        facts: dict[str, Any] = {"defaults": defaults_of(args, job.options)}
        tokenizer = read_tokenizer(job.model, facts)
        model = _model(job, folder, args.seed, facts)
        with in_precision_of(job):
            dataset = _dataset(job, tokenizer, args.max_length, facts)
            trainer = _trainer(job, args, model, tokenizer, dataset)
            recorder = attach(trainer, job, folder)
            recorder.record.facts |= facts
            _train(trainer)
        recorder.record.warnings = warnings
    return recorder.save()


def in_precision_of(job: Job) -> Any:
    """The context of a trainer's life: float64 throughout if the job says so."""
    if job.stage in CLASSES:  # trl loads its source when it is asked for
        getattr(trl, CLASSES[job.stage][0])
    return float64() if job.float64 else nullcontext()


def _config(job: Job, folder: Path) -> Any:
    """What both sides must have in common, and all else as the job says or trl has it."""
    config_class = getattr(trl, CLASSES[job.stage][1])
    known = {field.name for field in fields(config_class)}
    for name in job.options:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=3)
            hint = f"; there is {', '.join(near)}" if near else ""
            raise Refused(f"trl {TRL}: {config_class.__name__} has no option {name}{hint}")
    options = {
        "output_dir": str(folder / "trl"),
        "use_cpu": job.float64 or not torch.cuda.is_available(),
        "bf16": False,
        "optim": "adamw_torch",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    if OLD:  # it sets it so itself, with a warning
        options["remove_unused_columns"] = False
    if "num_train_epochs" not in job.options:  # which max_steps would go before
        options["max_steps"] = job.steps
    if not set(CHECKPOINTING) & job.options.keys():
        options[[name for name in CHECKPOINTING if name in known][-1]] = False
    try:
        return config_class(**(options | job.options))
    except (ValueError, TypeError) as error:
        raise Refused(f"trl {TRL}: {config_class.__name__}: {first_line(error)}") from error


def from_folder(auto: Any, folder: str, **how: Any) -> Any:
    """A model, its config or its tokenizer, or what this transformers has against it."""
    try:
        return auto.from_pretrained(folder, **how)
    except Exception as error:  # of every kind: a file, a name, a shape, a version
        said = f"transformers {transformers.__version__} cannot load it: {first_line(error)}"
        raise Refused(f"{folder}: {said}") from error


def read_tokenizer(folder: str, facts: dict[str, Any]) -> Any:
    """transformers 4 does not know the class and the template's file that 5 writes."""
    written = Path(folder, "tokenizer_config.json")
    newer = BEFORE_5 and written.exists() and "TokenizersBackend" in written.read_text("utf-8")
    if not newer:
        return from_folder(transformers.AutoTokenizer, folder)
    facts["tokenizer"] = "written by transformers 5, read as a PreTrainedTokenizerFast"
    tokenizer = from_folder(transformers.PreTrainedTokenizerFast, folder)
    template = Path(folder, "chat_template.jinja")
    if template.exists():
        tokenizer.chat_template = template.read_text("utf-8")
    return tokenizer


def read_config(folder: str, facts: dict[str, Any]) -> Any:
    """transformers 4 would take its default for what 5 calls otherwise, and say nothing."""
    config = from_folder(transformers.AutoConfig, folder)
    rope = getattr(config, "rope_parameters", None)
    if BEFORE_5 and rope:
        if "rope_theta" not in rope:
            raise Refused(f"{folder}: transformers 4 cannot read its rope_parameters")
        config.rope_theta = rope["rope_theta"]
        default = rope.get("rope_type", "default") == "default"
        config.rope_scaling = None if default else rope
        facts["config"] = "rope_parameters of transformers 5 were translated"
    return config


def _model(job: Job, folder: Path, seed: int, facts: dict[str, Any]) -> Any:
    """In the class of the stage. A head that the folder lacks is new: then all of it is kept.

    float64 is made of float32, as on our side: tables of positions are computed on loading.
    """
    config = read_config(job.model, facts)
    auto: Any = transformers.AutoModelForCausalLM
    if job.stage == "reward":
        auto, config.num_labels = transformers.AutoModelForSequenceClassification, 1
    transformers.set_seed(seed)
    dtype = {"torch_dtype" if BEFORE_5 else "dtype": torch.float32}
    model, report = from_folder(auto, job.model, config=config, output_loading_info=True, **dtype)
    if report["missing_keys"]:
        facts["new_weights"] = sorted(report["missing_keys"])
        model.save_pretrained(folder / START)
    return model.double() if job.float64 else model


def _trainer(job: Job, args: Any, model: Any, tokenizer: Any, dataset: Dataset) -> Any:
    trainer_class = getattr(trl, CLASSES[job.stage][0])
    parts = {"tokenizer" if OLD else "processing_class": tokenizer}
    if job.stage == "dpo":  # a copy: trl would look for it where the model came from
        parts["ref_model"] = copy.deepcopy(model)
    elif job.stage == "reward" and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # older ones leave it to the user
    try:
        return trainer_class(model=model, args=args, train_dataset=dataset, **parts)
    except Exception as error:  # of every kind: rows, options, a model
        raise Refused(f"trl {TRL}: {trainer_class.__name__}: {first_line(error)}") from error


def _train(trainer: Any) -> None:
    try:
        trainer.train()
    except (IndexError, RuntimeError) as error:
        if not any(sign in str(error) for sign in ("index out of range", "expanded size")):
            raise
        longest = getattr(trainer.model.config, "max_position_embeddings", None)
        raise Refused(
            f"trl {TRL}: {first_line(error)}; is a row longer than the {longest} tokens that the "
            f"model takes? Then give max_length={longest}"
        ) from error


def _dataset(job: Job, tokenizer: Any, longest: int | None, facts: dict[str, Any]) -> Dataset:
    """The rows in trl's columns, each with its number."""
    for number, row in enumerate(job.rows):
        for column in TEXTS[job.stage]:
            if row.get(column) is None:
                raise Refused(f"row {number} has no {column}")
    rows = job.rows
    if OLD:
        rows = [trl.maybe_apply_chat_template(row, tokenizer) for row in rows]
    if job.stage == "reward" and (OLD or tokenizer.eos_token is None):
        rows = [_with_ids(row, tokenizer, facts) for row in rows]
    numbered = [row | {NUMBER: number} for number, row in enumerate(rows)]
    if OLD and job.stage == "reward" and longest is not None:  # it leaves that to the user
        names = [f"input_ids_{side}" for side in SIDES]
        numbered = [row for row in numbered if max(len(row[name]) for name in names) <= longest]
    try:
        return Dataset.from_list(numbered)
    except Exception as error:  # texts in one row and messages in another
        raise Refused(f"the rows do not make one table: {first_line(error)}") from error


def _with_ids(row: Row, tokenizer: Any, facts: dict[str, Any]) -> Row:
    """The ids that trl will not make: of BERT's two segments, and in 0.11 of all texts."""
    if not isinstance(row["prompt"], str):
        raise Refused("a tokenizer without EOS takes texts, not conversations")
    ids: Ids = {}
    for side in SIDES:
        if tokenizer.eos_token is None:
            facts["rows"] = "ids of prompt and response as two segments, as trl needs an EOS"
            ids[side] = tokenizer(row["prompt"], row[side])["input_ids"]
        else:
            facts["rows"] = "ids of prompt, response and EOS, as newer ones make them"
            ids[side] = tokenizer(row["prompt"] + row[side] + tokenizer.eos_token)["input_ids"]
    if OLD:
        made = {f"input_ids_{side}": ids[side] for side in SIDES}
        made |= {f"attention_mask_{side}": [1] * len(ids[side]) for side in SIDES}
    else:
        made = {f"{side}_ids": ids[side] for side in SIDES}
    return made | {name: row[name] for name in ("margin",) if row.get(name) is not None}
