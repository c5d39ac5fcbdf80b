"""Both runs, one after the other, and what they say of each other."""

import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.utils import logging as transformers_logging

from compare import group_causes, ppo_causes, show
from compare import options as words
from compare.causes import Sides, causes
from compare.command import CONFIGS, SAMPLED, Options, given_to_trl, of_rollouts
from compare.explain import (
    TOLERANCES,
    Followed,
    as_json,
    explain,
    first_gap,
    following,
    sort,
    up_to_gap,
)
from compare.job import START, WEIGHTS, Ids, Job, Record
from compare.ours import groups, ppo
from compare.ours.encode import Encoded, encode, encode_pairs
from compare.ours.stages import Setup, Side
from compare.result import Result, Weights
from compare.rows import OurRows, from_script, read, template_of
from compare.theirs import start
from compare.theirs.recorder import peak_bytes
from rlhf_min.errors import BadInput, require
from rlhf_min.harness.rewards import FORMS, load_reward
from rlhf_min.harness.rows.load import load_rows
from rlhf_min.reward_model import RewardModel


@dataclass(frozen=True)
class TheirSide:
    """trl's side, as often as it is asked for."""

    job: Job
    folder: Path
    python: str

    def run(self, **changed: Any) -> Record:
        """The job, or one that is changed in some fields."""
        return start.run(replace(self.job, **changed), self.folder, self.python)


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
    found = start.probe(python)
    require(found["trl"] is not None, f"no trl in {python}: {python} -m pip install trl")
    note(f"trl's side: {show.python(found)}")
    sides = _sampled if options.stage in SAMPLED else _trained
    result = sides(options, folder, python, found["trl"])
    print(show.page(result, options))
    if options.out is not None:
        _write(Path(options.out), result)
    return result.explained


def _sampled(options: Options, folder: Path, python: str, trl: str | None) -> Result:
    """Both sides take the same responses, which our side samples from the start."""
    stage: Any = options.stage
    rows = load_rows(str(options.data), stage, columns=options.parsed_columns, limit=options.limit)
    note(rows.report())
    given = of_rollouts(options.ours, stage)
    config = CONFIGS[stage](**given, steps=options.steps)
    require(options.reward is not None, f"{stage} needs a --reward: {FORMS}")
    reward = load_reward([str(options.reward)], RewardModel.from_pretrained)
    template = template_of(options, rows.rows)
    rollouts = ppo.make_rollouts(
        str(options.model), rows.rows, reward, config, steps=options.steps, template=template
    )
    note(rollouts.report)
    trainer = ppo_causes.STEP if (trl or "").startswith("0.") else "PPOTrainer"
    told = words.in_trl_words(stage, given, steps=options.steps, trainer=trainer)
    job = Job(
        stage,
        str(options.model),
        steps=options.steps,
        rows=[],
        options=told | options.trl_options,
        float64=options.float64,
        rollouts=rollouts.rollouts,
        value_head=rollouts.value_head,
    )
    their_side = TheirSide(job, folder, python)
    record = their_side.run()
    note(f"ours: {stage}, {len(record.steps)} steps")
    side: Any
    if stage == "ppo":
        side = ppo.Side.load(job, "shared" if record.trainer == ppo_causes.STEP else "separate")
        setup: Any = ppo_causes.setup_of(
            record, rollouts.rollouts, options.ours, options.trl_options
        )
        found: list[Any] = ppo_causes.causes(setup, record)
    else:
        side = groups.Side.load(job)
        setup = group_causes.setup_of(record, rollouts.rollouts, options.ours, options.trl_options)
        absolute = groups.counts_positions(side.policy)
        found = group_causes.causes(setup, record, absolute=absolute)
    base = up_to_gap(side.run(setup), record.steps, tolerances(record))
    return _explained(side, setup, found, their_side, record, base)


def _trained(options: Options, folder: Path, python: str, _trl: str | None) -> Result:
    """SFT, reward model or DPO."""
    job, rows = _job(options, folder)
    their_side = TheirSide(job, folder, python)
    record = their_side.run()
    if options.trl_script is not None:
        require(
            options.stage in (None, record.stage),
            f"--stage {options.stage}, but the script trains {record.stage}",
        )
        rows = from_script(record)
    note(f"ours: {record.stage}, {len(record.steps)} steps")
    start_folder = folder / START if job.script is not None else Path(job.model)
    cuda = record.facts["device"].startswith("cuda") and torch.cuda.is_available()
    side = Side.load(
        record.stage,
        start_folder,
        float64=record.facts["dtype"] == "float64",
        device="cuda" if cuda else "cpu",
    )
    _require_room(side, record)
    encoded = _encoded(options, side, rows, record)
    setup = _setup(options, record, encoded, rows)
    base = up_to_gap(side.run(setup), record.steps, tolerances(record))
    found = causes(Sides(record, side, setup, encoded.left_out, rows.places))
    return _explained(side, setup, found, their_side, record, base)


def _explained(
    side: Any, setup: Any, found: list[Any], their_side: TheirSide, record: Record, base: list[Any]
) -> Result:
    """What makes the two differ. What neither can do like the other, such as random numbers, both
    leave before that."""
    first = first_gap(base, record.steps, tolerances(record))
    left = [cause for cause in found if cause.undo and first is not None]
    if first is None or not left:
        return _searched(side, setup, found, their_side, record, base)
    note("trl's side once more, " + ", ".join(f"without {cause.name}" for cause in left))
    again = their_side.run(**{name: value for cause in left for name, value in cause.undo})
    again.facts = record.facts | again.facts  # some were found here
    own = first_gap(again.steps, record.steps, tolerances(again))  # what these alone make
    setup = following(setup, left)
    without = up_to_gap(side.run(setup), again.steps, tolerances(again))
    found = [cause for cause in found if not cause.undo]
    result = _searched(side, setup, found, their_side, again, without)
    told = result.explanation
    if own is None:
        told.without_effect += left
    else:
        mine, other = told.best[own.step - 1], again.steps[own.step - 1]
        after = abs(mine[own.metric] - other[own.metric])
        told.followed += [Followed(cause, own, after) for cause in left]
        sort(told.followed, first, tolerances(again))
    told.first, told.base = first, base
    return result


def _searched(
    side: Any, setup: Any, found: list[Any], their_side: TheirSide, record: Record, base: list[Any]
) -> Result:
    """The search, and the weights after its last full run."""
    file = their_side.folder / WEIGHTS
    weights = [weights_gap(side.module, file)]
    explanation = explain(
        side.run,
        setup,
        found,
        record.steps,
        tolerances(record),
        base=base,
        finished=lambda: weights.append(weights_gap(side.module, file)),
    )
    result, silent = Result(record, explanation, weights[-1]), explanation.without_effect
    if explanation.first is None and silent and not result.explained:
        for _ in side.run(following(setup, silent)):
            pass
        explanation.in_weights, explanation.without_effect = silent, []
        result.weights = weights_gap(side.module, file)
    return result


def tolerances(record: Record) -> dict[str, float]:
    """Those of the precision that trl has trained in."""
    return TOLERANCES["float64" if record.facts["dtype"] == "float64" else "float32"]


def _job(options: Options, folder: Path) -> tuple[Job, OurRows]:
    common: dict[str, Any] = {"steps": options.steps, "float64": options.float64}
    if options.trl_script is not None:
        script = str(Path(options.trl_script).resolve())
        arguments = options.script_arguments
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


def _encoded(options: Options, side: Side, rows: OurRows, record: Record) -> Encoded:
    if isinstance(side.model, RewardModel):
        encoded = encode_pairs(rows.rows, side.model)
    else:
        told = _told_to_both(options, record)
        longest = options.max_length or told.get("max_length") or side.model.positions
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


def _require_room(side: Side, record: Record) -> None:
    """trl trains beyond the positions of a model where that raises nothing, and we do not."""
    positions = getattr(side.model, "positions", math.inf)
    for number, ids in record.rows.items():
        prompt = len(ids.get("prompt_ids", []))
        longest = prompt + max(len(x) for name, x in ids.items() if "prompt" not in name)
        require(
            longest <= positions,
            f"trl trains on {longest} tokens of row {number + 1}, beyond the {positions} positions "
            f"of the model; give max_length={positions} on trl's side",
        )


def _told_to_both(options: Options, record: Record) -> dict[str, Any]:
    """trl's options without those that were given to it alone."""
    return words.without(record.options, record.facts.get("defaults", {}), options.trl_options)


def _setup(options: Options, record: Record, encoded: Encoded, rows: OurRows) -> Setup:
    total = record.facts["total_steps"]
    config = CONFIGS[record.stage](**options.ours)
    told = _told_to_both(options, record)
    given = words.in_our_words(record.stage, told, total_steps=total)
    for name, value in given.items():
        if name not in options.ours:
            try:
                config = replace(config, **{name: value})
            except BadInput:
                continue  # it stays among the causes, as one that cannot be followed
    margins = {
        n: row["margin"] for n, row in zip(rows.places, rows.rows, strict=True) if row.get("margin")
    }
    known: dict[int, Ids] = {n: {} for n in range(rows.of) if n not in encoded.left_out}
    setup = Setup(
        config,
        rows={**known, **encoded.rows},
        total_steps=total,
        steps=len(record.steps),
        margins=margins,
    )
    if encoded.rows and all(setup.rows[n] for step in setup.drawn() for part in step for n in part):
        return setup
    # The texts of a script are not all known: then the order is trl's, and where need be the ids.
    theirs = {n: ids for n, ids in record.rows.items() if not setup.rows.get(n)}
    batches = [[n for part in micros for n in part] for micros in record.batches]
    return replace(setup, rows={**setup.rows, **theirs}, batches=batches)


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
        "peak_bytes": peak_bytes(),  # of our process
    }
    (out / "comparison.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    print(f"written: {out / 'comparison.json'}")


def note(text: str) -> None:
    """What is going on, for those who wait."""
    print(text, file=sys.stderr, flush=True)
