"""Watches a trainer of trl's from outside, whichever version it is, and records its run.

Three places are watched: the collator (which rows a micro-batch is made of), the training step
(what the model reads, and the loss) and the events of transformers' Trainer (where a step ends).
"""

import json
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from ..job import WEIGHTS, Ids, Job, Record
from ..names import in_our_names
from . import Refused

# The column of the dataset, and the entry of a batch, that tells the number of a row.
NUMBER = "number_of_row"
COMING = "in the order of their coming"
IGNORED = -100  # a label that is not trained on


def attach(trainer: Any, job: Job, folder: Path, *, given: int | None = None) -> "Recorder":
    """Watch a trainer that is about to train, and stop it after `job.steps` steps.

    Args:
        trainer: of SFT, reward or DPO; it is left as it is but for the watching.
        job: its stage, steps and rows are looked at, and whether dropout is on.
        folder: what `Recorder.save` writes to.
        given: rows that the trainer was given, before it dropped some. Those of the job if None.
    """
    if trainer.args.n_gpu > 1:
        n = trainer.args.n_gpu
        raise Refused(f"trl would share each batch between {n} GPUs; set CUDA_VISIBLE_DEVICES=0")
    recorder = Recorder(trainer, job, folder)
    carried = _number_rows(trainer)
    if not job.dropout:
        _switch_off_dropout(trainer)
    if job.float32 or job.float64:
        _switch_off_autocast(trainer)
        for model in models(trainer) if not job.float64 else []:
            model.float()
    recorder.look(len(job.rows) if given is None else given, carried=carried)
    trainer.data_collator = _NumberingCollator(trainer.data_collator)
    recorder.watch_steps()
    trainer.add_callback(_Events(recorder))  # the last one: it has the last word on what follows
    return recorder


class Recorder:
    """What has been seen of a run so far, as a `Record`."""

    def __init__(self, trainer: Any, job: Job, folder: Path) -> None:
        self.trainer, self.job, self.folder = trainer, job, folder
        of_trl = next(c for c in type(trainer).__mro__ if c.__module__.startswith("trl."))
        self.record = Record(
            stage=job.stage,
            versions=versions(),
            trainer=of_trl.__name__,
            options=json.loads(json.dumps(trainer.args.to_dict(), default=str)),
        )
        if type(trainer) is not of_trl:
            self.record.facts["subclass"] = type(trainer).__name__
        self._step: list[list[int]] = []  # the micro-batches of the step that is going on
        self._shares: list[float] = []  # what each of them adds to the loss of its step
        self._losses: list[float] = []  # what `compute_loss` gave
        self._training = False
        self._rate = 0.0  # with which the step is taken
        self._started = 0.0

    def look(self, given: int, *, carried: bool) -> None:
        """What can be seen before the first step.

        Args:
            given: rows that the trainer was given.
            carried: whether the rows have the numbers that they were given with.
        """
        trainer, facts = self.trainer, self.record.facts
        model = trainer.accelerator.unwrap_model(trainer.model)
        floats = next(p for p in model.parameters() if p.is_floating_point())
        tokenizer = tokenizer_of(trainer)
        facts |= {
            "dtype": str(floats.dtype).removeprefix("torch."),
            "mixed_precision": trainer.accelerator.mixed_precision,
            "device": str(floats.device),
            "parameters": sum(p.numel() for p in model.parameters()),
            "dropout": max((float(p) for _, _, p in dropouts(model)), default=0.0),
            "pad_id": getattr(trainer.data_collator, "pad_token_id", tokenizer.pad_token_id),
            "eos_id": tokenizer.eos_token_id,
            "model_pad_id": model.config.pad_token_id,
            "own_loss": getattr(trainer, "compute_loss_func", None) is not None,
            "frozen": [n for n, p in model.named_parameters() if not p.requires_grad],
            "own_optimizer": trainer.optimizer is not None,  # of the script; trl's comes later
            "own_schedule": trainer.lr_scheduler is not None,
            "attention": getattr(model.config, "_attn_implementation", None),
            "dataset_rows": given,
            "micro_losses": [],
            "micro_shares": [],
        }
        if self.job.stage == "dpo":
            facts |= _reference(trainer, model)
        dataset = trainer.train_dataset
        if not isinstance(dataset, datasets.Dataset):
            facts["numbers"] = COMING  # a stream
        elif carried or (len(dataset) == given and not getattr(trainer.args, "packing", False)):
            kept = set(dataset[NUMBER])
            reason = _reason_to_leave_out(self.job.stage, self.record.options)
            self.record.left_out = {i: reason for i in range(given) if i not in kept}
            if not kept:
                raise Refused(f"trl leaves out all of {given} rows: {reason}")
        else:
            facts["numbers"] = "anew, since trl makes one of several"

    def watch_steps(self) -> None:
        """Look at each micro-batch as it is trained on, and at its loss."""
        step, loss = self.trainer.training_step, self.trainer.compute_loss

        def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self._see(inputs)
            self._training = True
            share = step(model, inputs, *args, **kwargs)
            self._training = False
            self._shares.append(float(share))
            return share

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            found = loss(*args, **kwargs)
            if self._training:  # not in evaluation
                self._losses.append(float(found[0] if isinstance(found, tuple) else found))
            return found

        self.trainer.training_step, self.trainer.compute_loss = training_step, compute_loss

    def _see(self, inputs: Any) -> None:
        """The rows of a micro-batch, whose numbers are taken out of it."""
        numbers = inputs.pop(NUMBER).tolist() if NUMBER in inputs else []
        rows = _ROWS[self.job.stage](inputs, self.record.facts)
        if len(numbers) != len(rows):  # a stream, or several texts packed into one row
            self.record.facts["numbers"] = COMING
            first = len(self.record.rows)
            numbers = list(range(first, first + len(rows)))
        self.record.rows |= zip(numbers, rows, strict=True)
        self._step.append(numbers)
        self.record.facts["token_type_ids"] = "token_type_ids" in inputs

    def begin(self, state: Any, optimizer: Any) -> None:
        """The schedule and the optimizer are there now."""
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has it
        group = optimizer.param_groups[0]
        self.record.facts |= {
            "total_steps": state.max_steps,
            "optimizer": {
                "class": type(optimizer).__name__,
                **{name: group[name] for name in ("betas", "eps") if name in group},
                "weight_decay": [x.get("weight_decay", 0.0) for x in optimizer.param_groups],
            },
        }
        if self.record.facts["own_optimizer"]:
            decay = max(self.record.facts["optimizer"]["weight_decay"])
            rate = group.get("initial_lr", group["lr"])
            self.record.options |= {"learning_rate": rate, "weight_decay": decay}
        self._optimizer = optimizer
        self._started = time.monotonic()

    def before_step(self) -> None:
        """The gradient is there, and the schedule has not gone on yet."""
        self._rate = self._optimizer.param_groups[0]["lr"]

    def end_step(self) -> bool:
        """An optimizer step is over; whether it was the last to record."""
        self.record.batches.append(self._step)
        self.record.facts["micro_losses"].append(self._losses)
        self.record.facts["micro_shares"].append(self._shares)
        self._step, self._losses = [], []
        self.record.seconds = time.monotonic() - self._started
        return len(self.record.batches) >= self.job.steps

    def log(self, logged: dict[str, Any]) -> None:
        """What trl tells of a step; older ones round the loss and tell the next step's rate."""
        plain = {name: _number(value) for name, value in logged.items()}
        self.record.logged.append(plain)
        numbers = {name: v for name, v in plain.items() if isinstance(v, (int, float))}
        numbers |= {"loss": sum(self._shares), "learning_rate": self._rate}
        self._shares = []
        ours = in_our_names(self.job.stage, self.record.trainer, numbers)
        self.record.steps.append(ours)

    def save(self) -> Record:
        """Write the record, and the weights as they are now; a shared one once."""
        self.record.peak_bytes = peak_bytes()
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        weights = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters()}
        save_file(weights, str(self.folder / WEIGHTS))
        self.record.save(self.folder)
        return self.record


class _Events(TrainerCallback):
    """Each step is logged, none is followed by an evaluation or a checkpoint; then it stops."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_train_begin(self, args, state, control, **more):  # noqa: ARG002
        self.recorder.begin(state, more["optimizer"])

    def on_pre_optimizer_step(self, args, state, control, **more):  # noqa: ARG002
        self.recorder.before_step()

    def on_step_end(self, args, state, control, **more):  # noqa: ARG002
        last = self.recorder.end_step()
        control.should_log = True
        control.should_evaluate = control.should_save = False
        control.should_training_stop |= last  # its max_steps stays: the schedule counts to it

    def on_epoch_end(self, args, state, control, **more):  # noqa: ARG002
        control.should_evaluate = control.should_save = False

    def on_log(self, args, state, control, logs=None, **more):  # noqa: ARG002
        if "loss" in logs:  # the last entry sums the run up
            self.recorder.log(logs)


class _NumberingCollator:
    """A collator beside which the numbers of the rows go through."""

    def __init__(self, collator: Callable[..., Any]) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        numbers = [int(row[NUMBER]) for row in examples if NUMBER in row]
        bare = [{k: v for k, v in row.items() if k != NUMBER} for row in examples]
        batch = self.collator(bare)
        if numbers:
            batch[NUMBER] = torch.tensor(numbers)
        return batch


def _number_rows(trainer: Any) -> bool:
    """A column with the number of each row, which is kept for the collator.

    Returns:
        Whether it was there already, from before trl dropped some rows.
    """
    dataset = trainer.train_dataset
    table = isinstance(dataset, datasets.Dataset)
    carried = table and NUMBER in dataset.column_names
    if table and not carried:
        trainer.train_dataset = dataset.add_column(NUMBER, list(range(len(dataset))))
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns = [*trainer._signature_columns, NUMBER]
    return carried


def _reference(trainer: Any, model: nn.Module) -> dict[str, Any]:
    """What the policy is compared with, and whether that is the policy as it starts."""
    reference = trainer.ref_model
    if reference is None:  # of trl's ways without one: logged before, or a switched-off adapter
        return {"ref_model": "none", "ref_is_start": True}
    theirs = dict(reference.named_parameters())
    same = all(n in theirs and torch.equal(p, theirs[n]) for n, p in model.named_parameters())
    return {"ref_model": "a copy of the start" if same else "another model", "ref_is_start": same}


def defaults_of(config: Any, names: Iterable[str]) -> dict[str, Any]:
    """What these options of a config would be if they had not been given, as JSON has it."""
    found = {f.name: f.default for f in fields(config) if f.default is not MISSING}
    return dict(json.loads(json.dumps({n: found.get(n) for n in names}, default=str)))


def dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str, float]]:
    """Every probability of dropout: of modules for it, and numbers that a module has of its own."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            yield module, "p", module.p
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                yield module, name, value


def models(trainer: Any) -> list[nn.Module]:
    """The one that is trained, and DPO's reference where there is one."""
    both = (trainer.model, getattr(trainer, "ref_model", None))
    return [model for model in both if model is not None]


def _switch_off_dropout(trainer: Any) -> None:
    for model in models(trainer):
        for module, name, _ in list(dropouts(model)):
            setattr(module, name, 0.0)


def _switch_off_autocast(trainer: Any) -> None:
    """accelerate's, by which a reference is wrapped already, and that of older Trainers."""
    accelerator = trainer.accelerator
    accelerator.state._mixed_precision = "no"
    accelerator.native_amp, accelerator.scaler = False, None
    trainer.use_cpu_amp = False
    for model in models(trainer):
        forward = vars(model).pop("_original_forward", None)
        if forward is not None:
            model.forward = forward


def tokenizer_of(trainer: Any) -> Any:
    """Of any version; a processor of images has its tokenizer inside."""
    found = getattr(trainer, "processing_class", None) or trainer.tokenizer
    return getattr(found, "tokenizer", found)


def _reason_to_leave_out(stage: str, options: dict[str, Any]) -> str:
    longest = f"max_length={options.get('max_length')}"
    return {
        "sft": f"{longest} leaves no token of it to train on",
        "reward": f"a side has more than {longest} tokens",
        "dpo": f"the prompt alone has {longest} tokens or more",
    }[stage]


# What the model reads, of one micro-batch


def _ids(rows: Tensor, mask: Tensor) -> list[list[int]]:
    return [ids[cells].tolist() for ids, cells in zip(rows, mask.bool(), strict=True)]


def _sft_rows(inputs: Any, facts: dict[str, Any]) -> list[Ids]:
    """Up to the first label it is the prompt; what is labelled from there on is the response."""
    ids, labelled = inputs["input_ids"], inputs["labels"] != IGNORED
    mask = inputs.get("attention_mask")
    if mask is None and "position_ids" in inputs:  # all texts in one row, each from position 0
        facts["packed"] = True
        ends = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()[1:]
        texts = list(zip(ids[0].tensor_split(ends), labelled[0].tensor_split(ends), strict=True))
    else:
        read = torch.ones_like(ids).bool() if mask is None else mask.bool()
        texts = [(i[m], said[m]) for i, m, said in zip(ids, read, labelled, strict=True)]
    rows = []
    for text, said in texts:
        start = int(said.int().argmax()) if said.any() else len(text)
        if not said[start:].all():
            facts["holes"] = "some tokens after the first label have none"
        response = text[start:][said[start:]]
        rows.append({"prompt_ids": text[:start].tolist(), "response_ids": response.tolist()})
    return rows


def _reward_rows(inputs: Any, _facts: dict[str, Any]) -> list[Ids]:
    if "input_ids_chosen" in inputs:  # 0.11: each side padded for itself
        chosen, rejected = (
            _ids(inputs[f"input_ids_{side}"], inputs[f"attention_mask_{side}"])
            for side in ("chosen", "rejected")
        )
    else:
        both = _ids(inputs["input_ids"], inputs["attention_mask"])
        chosen, rejected = both[: len(both) // 2], both[len(both) // 2 :]
    return [{"chosen_ids": c, "rejected_ids": r} for c, r in zip(chosen, rejected, strict=True)]


def _dpo_rows(inputs: Any, _facts: dict[str, Any]) -> list[Ids]:
    """With a cut from the left the prompt of the rejected one can be another: then it is there."""
    if "chosen_input_ids" in inputs:  # 0.11: each side padded for itself
        sides = [
            (inputs[f"{s}_input_ids"], inputs[f"{s}_attention_mask"], inputs[f"{s}_labels"])
            for s in ("chosen", "rejected")
        ]
        sides = [(ids, mask, labels != IGNORED) for ids, mask, labels in sides]
    else:
        parts = (inputs[n].chunk(2) for n in ("input_ids", "attention_mask", "completion_mask"))
        sides = list(zip(*parts, strict=True))
    prompts, other_prompts = (_ids(ids, mask * ~said.bool()) for ids, mask, said in sides)
    chosen, rejected = (_ids(ids, said) for ids, _, said in sides)
    rows = []
    for p, other, c, r in zip(prompts, other_prompts, chosen, rejected, strict=True):
        rows.append({"prompt_ids": p, "chosen_ids": c, "rejected_ids": r})
        if other != p:
            rows[-1]["rejected_prompt_ids"] = other
    return rows


_ROWS: dict[str, Callable[[Any, dict[str, Any]], list[Ids]]] = {
    "sft": _sft_rows,
    "reward": _reward_rows,
    "dpo": _dpo_rows,
}


# What surrounds it


def versions() -> dict[str, str]:
    """Of Python and of what trl stands on; what is not there is left out."""
    found = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", "trl"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@contextmanager
def warned() -> Iterator[list[str]]:
    """The warnings of trl and transformers while it lasts, each once; they are shown as before."""
    seen: list[str] = []
    show = warnings.showwarning

    def add(message: str) -> None:
        line = " ".join(re.sub("\x1b\\[[0-9;]*m", "", message).split())  # without colours
        if line not in seen:
            seen.append(line)

    def showwarning(message: Any, category: Any, filename: str, *rest: Any, **more: Any) -> None:
        if {"trl", "transformers"} & set(Path(filename).parts):
            add(str(message))
        show(message, category, filename, *rest, **more)

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            add(record.getMessage())

    handler = Handler(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("trl", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    warnings.showwarning = showwarning
    try:
        yield seen
    finally:
        warnings.showwarning = show
        for logger in loggers:
            logger.removeHandler(handler)


def _number(value: Any) -> Any:
    """A tensor of one number as that number; what JSON has stays."""
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)


def peak_bytes() -> int:
    """Of the process; on a GPU of its memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
