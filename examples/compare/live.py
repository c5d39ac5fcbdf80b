"""Both runs, one after the other, and what they say of each other."""

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.utils import logging as transformers_logging

from compare import options as words
from compare import show
from compare.causes import Sides, causes
from compare.command import CONFIGS, Options, given_to_trl
from compare.explain import TOLERANCES, Explanation, Followed, as_json, explain, first_gap
from compare.job import START, WEIGHTS, Job, Record
from compare.ours.encode import Encoded, encode, encode_pairs
from compare.ours.stages import Setup, Side
from compare.rows import OurRows, from_script, read
from compare.theirs import start
from rlhf_min.errors import BadInput, require
from rlhf_min.reward_model import RewardModel


@dataclass
class Result:
    """A whole comparison."""

    record: Record
    explanation: Explanation[Setup]
    weights: "Weights"
    base_weights: "Weights"


@dataclass(frozen=True)
class Weights:
    """How far the weights are apart after the last step, and where most."""

    size: float
    name: str


def compare(options: Options, folder: Path) -> bool:
    """Run both sides, print the comparison, and say whether nothing stays unexplained.

    Args:
        options: of the command line.
        folder: for what the sides tell each other; weights are large.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    python = options.trl_python or sys.executable
    job, rows = _job(options, folder)
    note(f"trl's side: {show.python(start.probe(python))}")
    record = start.run(job, folder, python)
    if options.trl_script is not None:
        require(
            options.stage in (None, record.stage),
            f"--stage {options.stage}, but the script trains {record.stage}",
        )
        rows = from_script(record)
    note(f"ours: {record.stage}, {len(record.steps)} steps")
    result = _ours(options, job, rows, record, folder, lambda job: start.run(job, folder, python))
    print(show.page(result.record, result.explanation, result.weights, options))
    if options.out is not None:
        _write(Path(options.out), result)
    return result.explanation.left is None


def _job(options: Options, folder: Path) -> tuple[Job, OurRows]:
    common: dict[str, Any] = {"steps": options.steps, "float64": options.float64}
    if options.trl_script is not None:
        script = str(Path(options.trl_script).resolve())
        arguments = shlex.split(options.script_args)
        job = Job("dpo", "", rows=[], script=script, script_arguments=arguments, **common)
        return job, OurRows([], {}, "")
    stage: Any = options.stage
    rows = read(options)
    print(*rows.report, sep="\n", file=sys.stderr)
    model = _with_head(options, folder) if stage == "reward" else str(options.model)
    given = given_to_trl(options, stage)
    return Job(stage, model, rows=rows.for_trl, options=given, **common), rows


def _with_head(options: Options, folder: Path) -> str:
    """The classifier's folder: a copy with a new head, if it has none that is trained."""
    torch.manual_seed(0)
    model = RewardModel.from_pretrained(str(options.model), new_head=True)
    if not model.new_weights:
        return str(options.model)
    note(f"{options.model} has no trained head: both sides start from the same new one")
    target = folder / "with_head"
    model.model.save_pretrained(target)
    model.tokenizer.save_pretrained(target)
    return str(target)


def _ours(
    options: Options,
    job: Job,
    rows: OurRows,
    record: Record,
    folder: Path,
    again: Callable[[Job], Record],
) -> Result:
    start_folder = folder / START if job.script is not None else Path(job.model)
    side = Side.load(record.stage, start_folder, float64=record.facts["dtype"] == "float64")
    encoded = _encoded(options, side, rows, record)
    setup = _setup(options, record, encoded, rows)
    tolerances = TOLERANCES["float64" if record.facts["dtype"] == "float64" else "float32"]
    base = list(side.run(setup))
    base_weights = weights_gap(side.module, folder / WEIGHTS)
    first = first_gap(base, record.steps, tolerances)
    found = causes(Sides(record, side, setup, encoded.left_out, rows.places))

    # What neither side can do like the other, both leave.
    left = [cause for cause in found if cause.undo]
    base_of_rest, steps = base, record.steps
    if left and first is not None:
        note("trl's side once more, " + ", ".join(f"without {cause.name}" for cause in left))
        record = again(replace(job, **{k: v for cause in left for k, v in cause.undo}))
        for cause in left:
            assert cause.follow is not None
            setup = cause.follow(setup)
        base_of_rest, steps = list(side.run(setup)), record.steps
        base_weights = weights_gap(side.module, folder / WEIGHTS)
    weights = [base_weights]
    explanation = explain(
        side.run,
        setup,
        [cause for cause in found if not cause.undo],
        steps,
        tolerances,
        base=base_of_rest,
        finished=lambda: weights.append(weights_gap(side.module, folder / WEIGHTS)),
    )
    if left and first is not None:
        mine, other = base_of_rest[first.step - 1], steps[first.step - 1]
        after = abs(mine[first.metric] - other[first.metric])
        explanation.followed[:0] = [Followed(cause, first, after) for cause in left]
        explanation.first, explanation.base = first, base
    return Result(record, explanation, weights[-1], base_weights)


def _encoded(options: Options, side: Side, rows: OurRows, record: Record) -> Encoded:
    if isinstance(side.model, RewardModel):
        encoded = encode_pairs(rows.rows, side.model)
    else:
        longest = options.max_length or record.options.get("max_length") or side.model.positions
        encoded = encode(
            record.stage,
            rows.rows,
            side.tokenizer,
            template=rows.template,
            max_length=int(min(longest, side.model.positions, 2**20)),
        )
    numbered = list(rows.places)
    return Encoded(
        {numbered[i]: ids for i, ids in encoded.rows.items()},
        {numbered[i]: why for i, why in encoded.left_out.items()} | rows.left_out,
    )


def _setup(options: Options, record: Record, encoded: Encoded, rows: OurRows) -> Setup:
    total = record.facts["total_steps"]
    theirs = words.in_our_words(record.stage, record.options, total_steps=total)
    config = CONFIGS[record.stage](**options.ours)
    for name, value in theirs.items():
        if name not in options.ours:
            try:
                config = replace(config, **{name: value})
            except BadInput:
                continue  # it stays among the causes, as one that cannot be followed
    margins = {
        n: row["margin"] for n, row in zip(rows.places, rows.rows, strict=True) if row.get("margin")
    }
    untouched: dict[int, Any] = {} if not rows.of else {n: {} for n in range(rows.of)}
    return Setup(
        config,
        rows={**untouched, **encoded.rows},
        total_steps=total,
        steps=len(record.steps),
        margins=margins,
    )


@torch.no_grad()
def weights_gap(module: nn.Module, file: Path) -> Weights:
    """The largest difference of any weight; trl's are read one tensor at a time."""
    largest = Weights(0.0, "")
    with safe_open(file, "pt") as theirs:
        names = set(theirs.keys())
        for name, p in module.named_parameters():
            require(name in names, f"trl's model has no weight {name}: it is another model")
            size = float((p - theirs.get_tensor(name).to(p)).abs().max())
            if not size <= largest.size:
                largest = Weights(size, name)
    return largest


def _write(out: Path, result: Result) -> None:
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "trl": asdict(result.record),
        "explanation": as_json(result.explanation),
        "base": result.explanation.base,
        "followed": result.explanation.best,
        "weights": asdict(result.weights),
    }
    (out / "comparison.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    print(f"written: {out / 'comparison.json'}")


def note(text: str) -> None:
    """What is going on, for those who wait."""
    print(text, file=sys.stderr, flush=True)
