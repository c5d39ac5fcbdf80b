"""Runs a user's script as it is, under the recorder, and ends it when its steps are recorded."""

import json
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import datasets
import torch
import transformers
import trl

from ..job import REFERENCE, START, Job, Record, Row
from . import Refused, first_line
from .recorder import NUMBER, Recorder, attach, models, tokenizer_of, warned
from .trainers import BEFORE_5, CLASSES, OLD, TRL, in_precision_of

STAGES = {trainer: stage for stage, (trainer, _) in CLASSES.items()}
# Of what trl's own tokenising adds to a dataset.
MADE = ("input_ids", "attention_mask", "token_type_ids", "labels", "_ids", "_logps")


class _Stop(BaseException):
    """Ends a script from within. It is no `Exception`: scripts catch those."""


def run(job: Job, folder: Path, leave: Callable[[], NoReturn] | None = None) -> None:
    """Run `job.script` until `job.steps` steps of its trainer are recorded.

    Args:
        job: the stage is what the script trains, whatever the job says.
        folder: the record, the weights, and the start model with its tokenizer go there.
        leave: ends the process in the middle of the script, once all is written.
    """
    script = Path(job.script or "")
    if not script.is_file():
        raise Refused(f"{script}: no such file")
    refused: list[Refused] = []
    arguments = [str(script), *job.script_arguments]
    path = [str(script.resolve().parent), *sys.path]
    with ExitStack() as stack:
        stack.enter_context(patch.object(sys, "argv", arguments))
        stack.enter_context(patch.object(sys, "path", path))
        warnings = stack.enter_context(warned())
        stack.enter_context(_watching(job, folder, leave or _leave, refused, warnings))
        transformers.set_seed(0)  # a run of it once more has the same chance, as for a new head
        try:
            runpy.run_path(str(script), run_name="__main__")
        except _Stop:
            raise refused[0] from None
        except SystemExit as end:
            raise Refused(f"{script}: it ended before it trained, with {end.code!r}") from None
        except Exception as error:
            traceback.print_exc()
            raise Refused(f"{_place(script, error)}: {first_line(error)}") from error
    raise Refused(f"{script}: it ended, and no trainer of trl's has trained")


def _leave() -> NoReturn:
    """At once: nothing that the script has in mind for later may happen."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextmanager
def _watching(
    job: Job,
    folder: Path,
    leave: Callable[[], NoReturn],
    refused: list[Refused],
    warnings: list[str],
) -> Iterator[None]:
    """Inside, a trainer that begins is recorded, and its rows are known as it was given them."""
    raw: dict[int, Any] = {}  # trainer -> its dataset before trl tokenised it
    original = transformers.Trainer.train

    def train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            if kwargs.get("resume_from_checkpoint", args[0] if args else None):
                raise Refused(f"{job.script}: it resumes from a checkpoint; let it begin anew")
            begin = partial(original, trainer, *args, **kwargs)
            recorder = _record(trainer, job, folder, raw, begin)
            recorder.record.warnings = [*warnings, *recorder.record.warnings]
            recorder.save()
        except Refused as error:
            refused.append(error)
            raise _Stop from error
        return leave()

    def refuse(trainer: Any, *_args: Any, **_kwargs: Any) -> NoReturn:
        refused.append(_not_compared(job, trainer))
        raise _Stop

    with ExitStack() as stack:
        stack.enter_context(patch.object(transformers.Trainer, "train", train))
        for name in STAGES:
            _keep_raw(stack, getattr(trl, name), raw)
        for other in _trainers_of_their_own():
            stack.enter_context(patch.object(other, "__init__", refuse))
        yield


def _record(
    trainer: Any, job: Job, folder: Path, raw: dict[int, Any], train: Callable[[], Any]
) -> Recorder:
    """One training, from its first step to the last that is recorded."""
    names = [c.__name__ for c in type(trainer).__mro__ if c.__module__.startswith("trl.")]
    stage = STAGES.get(names[0]) if names else None  # trl has subclasses with other losses
    if stage is None:
        raise _not_compared(job, trainer)
    if OLD and stage == "sft":
        raise Refused(f"{job.script}: SFT is compared with trl 1.0 or newer, this is {TRL}")
    if hasattr(trainer.model, "peft_config"):
        raise Refused(f"{job.script}: it trains adapters; only whole models are compared")
    job.stage = stage  # type: ignore[assignment]
    dataset = raw.get(id(trainer), trainer.train_dataset)
    known = isinstance(dataset, datasets.Dataset)
    _drop_reports(trainer)
    recorder = attach(trainer, job, folder, given=len(dataset) if known else 0)
    _keep_models(trainer, recorder.record, folder)
    if job.float64:
        for model in models(trainer):
            model.double()
        recorder.record.facts["dtype"] = "float64"
    with in_precision_of(job):
        train()
    if known:
        recorder.record.raw_rows = _raw_rows(dataset, recorder.record, trainer.args.seed)
    if not recorder.record.raw_rows:
        numbers = recorder.record.facts.get("numbers")
        why = f"its rows are numbered {numbers}" if numbers else "its columns are gone"
        recorder.record.facts["raw_rows"] = f"when trl trains, {why}"
    return recorder


def _keep_models(trainer: Any, record: Record, folder: Path) -> None:
    """What training starts from, as this transformers has read it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    rope = vars(model.config).pop("rope_parameters", None) if BEFORE_5 else None
    if rope:
        record.warnings.append(
            f"transformers {transformers.__version__} does not know the rope_parameters of the "
            f"model's config, {rope}, and computes with rope_theta={model.config.rope_theta}"
        )
    kept = {START: model}
    if not record.facts.get("ref_is_start", True):
        record.facts["reference"] = str(folder / REFERENCE)
        kept[REFERENCE] = trainer.ref_model
    for name, each in kept.items():
        each.save_pretrained(folder / name)
        tokenizer_of(trainer).save_pretrained(folder / name)


def _raw_rows(dataset: Any, record: Record, seed: int) -> dict[int, Row]:
    """The texts of the rows that were trained on, and that would be if none were dropped."""
    if "numbers" in record.facts:  # packed rows have numbers of their own
        return {}
    count = sum(len(micro) for micros in record.batches for micro in micros)
    numbers = record.rows.keys() | _drawn(len(dataset), seed, count)
    rows = {n: _plain(dataset[n]) for n in sorted(numbers)}
    return rows if any(rows.values()) else {}


def _drawn(n: int, seed: int, count: int) -> set[int]:
    """The rows that come first if none of the n is dropped: the other side may train on them."""
    found: list[int] = []
    for epoch in range(-(-count // n)):
        generator = torch.Generator().manual_seed(seed + epoch)
        found += torch.randperm(n, generator=generator).tolist()
    return set(found[:count])


def _keep_raw(stack: ExitStack, trainer_class: Any, raw: dict[int, Any]) -> None:
    """The dataset before it is tokenised; its rows get their numbers before some are dropped."""
    prepare = getattr(trainer_class, "_prepare_dataset", None)
    if prepare is None:  # 0.11's DPO and reward model keep all rows and columns
        return

    def prepared(trainer: Any, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        name = kwargs.get("dataset_name", args[-1] if args else None)
        if name == "train" and isinstance(dataset, datasets.Dataset):
            raw[id(trainer)] = dataset
            dataset = dataset.add_column(NUMBER, list(range(len(dataset))))
        return prepare(trainer, dataset, *args, **kwargs)

    stack.enter_context(patch.object(trainer_class, "_prepare_dataset", prepared))


def _trainers_of_their_own() -> Iterator[Any]:
    """Those of PPO, whose loops do not go through transformers' Trainer."""
    for name in ("PPOTrainer", "PPOv2Trainer"):
        found = getattr(trl, name, None)
        if found is not None:
            yield found
    try:
        from trl.experimental.ppo import PPOTrainer
    except ImportError:
        return
    yield PPOTrainer


def _not_compared(job: Job, trainer: Any) -> Refused:
    name = type(trainer).__name__
    known = ", ".join(STAGES)
    hint = "; for PPO leave the script out and give --stage ppo" if "PPO" in name else ""
    return Refused(f"{job.script}: it trains with {name}; scripts are compared for {known}{hint}")


def _drop_reports(trainer: Any) -> None:
    """No tracker hears of these few steps."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__module__.startswith("transformers.integrations"):
            trainer.remove_callback(callback)


def _plain(row: Row) -> Row:
    """The columns that the user gave, as JSON has them."""
    mine = {k: v for k, v in row.items() if k != NUMBER and not k.endswith(MADE)}
    mine = {k: v for k, v in mine.items() if not k.startswith(MADE)}
    return dict(json.loads(json.dumps(mine, default=str)))


def _place(script: Path, error: Exception) -> str:
    """The last line of the script that the error came through."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == str(script)]
    last = (own or frames)[-1]
    return f"{last.filename}:{last.lineno}"
