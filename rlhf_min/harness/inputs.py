"""What a run works on: rows of the embedded world or of the user's file."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_min.encoding.conversation import PlacedRow
from rlhf_min.errors import require
from rlhf_min.harness.cli import OF_OWN_ROWS, RunOptions
from rlhf_min.harness.rows.columns import SAMPLING, Stage, parse_columns
from rlhf_min.harness.rows.files import plural, printable
from rlhf_min.harness.rows.load import LoadedRows, load_rows, split_rows

if TYPE_CHECKING:  # they import torch
    from rlhf_min.loading.reward_function import RewardFunction
    from rlhf_min.world import World
    from rlhf_min.world.questions import Question

Row = dict[str, Any]
HELDOUT_SHARE = 0.1  # of the user's prompts, unless they say another one
HELDOUT_ROWS = 1000  # at most; looked at during training


@dataclass
class Inputs:
    """Rows for the stages of a run; what a stage does not need may be empty.

    `unpaired` rows have a label; `prompts` and `test` hold one row for each prompt; `test` rows
    have ``references``, and those of the world the ``kind`` of the question and its ``answer``, as
    a reward may ask for. `monitors` are rewards to report beside the learned one: the gold reward
    of the world and its parts. `report` is what was said of the user's file, a line each.
    """

    demonstrations: list[Row] = field(default_factory=list)
    heldout_demonstrations: list[Row] = field(default_factory=list)
    pairs: list[Row] = field(default_factory=list)
    heldout_pairs: list[Row] = field(default_factory=list)
    unpaired: list[Row] = field(default_factory=list)
    heldout_unpaired: list[Row] = field(default_factory=list)
    prompts: list[Row] = field(default_factory=list)
    eval_prompts: list[Row] = field(default_factory=list)
    test: list[Row] = field(default_factory=list)
    monitors: "dict[str, RewardFunction]" = field(default_factory=dict)
    report: list[str] = field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        """Every training text once, in the order of the rows: what tokenizers are made from."""
        texts = dict.fromkeys(
            text
            for rows in (self.demonstrations, self.pairs, self.unpaired, self.prompts)
            for row in rows
            for column in ("prompt", "response", "chosen", "rejected")
            if isinstance(text := row.get(column), str)  # else further columns of PPO
        )
        return list(texts)


def load_inputs(options: RunOptions, stage: Stage | None, *, seed: int) -> Inputs:
    """The rows for one stage, or for all of them if `stage` is None.

    Raises:
        BadInput: if the file does not have what the stage needs.
    """
    if options.data is None:
        for name in OF_OWN_ROWS:
            require(getattr(options, name) is None, f"--{name} is for your own rows; give --data")
        from rlhf_min.world import make_world

        return world_inputs(make_world(seed))
    columns = parse_columns(options.columns) if options.columns is not None else None
    loaded = load_rows(
        options.data,
        stage or "reward",
        columns=columns,
        split=options.split,
        limit=options.limit,
        seed=seed,
    )
    report = print_report(loaded.report(), loaded.details())
    if stage == "evaluation":
        require(
            options.heldout_data is None,
            "--data is evaluated on as a whole; leave --heldout_data out",
        )
        return Inputs(test=loaded.rows, report=report)
    if options.heldout_data is None:
        share = HELDOUT_SHARE if options.heldout_share is None else options.heldout_share
        train, heldout = split_rows(
            loaded.rows, heldout_share=share, seed=seed, group=lambda row: row["prompt"]
        )
        told = f"split by prompt, seed {seed}"
    else:
        own = load_rows(
            options.heldout_data,
            stage or "reward",
            columns=columns,
            split=options.heldout_split,
            usual_split="test",
        )
        report += print_report(own.report(), own.details())
        report += _check_heldout(loaded, own)
        train, heldout, told = loaded.rows, own.rows, printable(own.source)
    if stage == "kto":
        if "chosen" in train[0] or "chosen" in heldout[0]:
            report += print_report(
                "  each pair is two rows: chosen, label true; rejected, label false"
            )
        train, heldout = _unpaired(train), _unpaired(heldout)
    report += print_report(
        f"{plural(len(train), 'row')} to train on, {len(heldout)} held out ({told})"
    )
    inputs = _inputs(train, heldout, stage)
    inputs.report = report
    require(
        stage != "kto" or options.model is not None or len(inputs.demonstrations) > 0,
        "no row is labelled true, so a new model has no response to be fine-tuned on; give --model",
    )
    return inputs


def _inputs(train: list[Row], heldout: list[Row], stage: Stage | None) -> Inputs:
    """The rows where the stage, and the ones that are trained before it, look for them."""
    inputs = Inputs(prompts=_distinct(train), eval_prompts=_distinct(heldout))
    if stage in SAMPLING:  # two rows of one prompt differ in other columns, which rewards may read
        inputs.prompts, inputs.eval_prompts = train, heldout
    elif stage == "sft":
        inputs.demonstrations, inputs.heldout_demonstrations = train, heldout
    elif stage == "kto":
        inputs.unpaired, inputs.heldout_unpaired = train, heldout
        inputs.demonstrations = _desirable(train)
        inputs.heldout_demonstrations = _desirable(heldout)
    else:
        inputs.pairs, inputs.heldout_pairs = train, heldout
        inputs.demonstrations = _chosen_as_response(train)
        inputs.heldout_demonstrations = _chosen_as_response(heldout)
        inputs.test = _with_references(heldout)
    return inputs


def print_report(*texts: str) -> list[str]:
    """Print texts, and return their lines for the run's notes."""
    print(*texts, sep="\n")
    return [line for text in texts for line in text.splitlines()]


def _check_heldout(loaded: LoadedRows, own: LoadedRows) -> list[str]:
    """Count the prompts that stand in both files; the lines that say so, if there are some.

    Raises:
        BadInput: if a column that reward functions may name stands in the first one only.
    """
    lacks = [column for column in loaded.further if column not in own.further]
    require(
        not lacks,
        f"{printable(own.source)}: there is no column {', '.join(map(printable, lacks))}, which "
        f"{printable(loaded.source)} has and reward functions may name; add it there",
    )
    trained_on = {row["prompt"].strip() for row in loaded.rows}
    prompts = {row["prompt"].strip() for row in own.rows}
    both = len(prompts & trained_on)
    if not both:
        return []
    return print_report(
        f"warning: {both} of {plural(len(prompts), 'held-out prompt')} are trained on too, so "
        "what is measured on them says little of new ones; take them out of one of the files"
    )


def world_inputs(world: "World") -> Inputs:
    """All rows of a world, with its gold reward and the parts of it as monitors."""
    monitors: dict[str, RewardFunction] = {
        "gold_reward": lambda p, r: [gold.total for gold in world.gold(p, r)],
        "correct": lambda p, r: [gold.correct for gold in world.gold(p, r)],
        "polite": lambda p, r: [gold.polite for gold in world.gold(p, r)],
        "brief": lambda p, r: [gold.brief for gold in world.gold(p, r)],
    }

    def row(question: "Question") -> Row:
        return {"prompt": question.text, "kind": question.kind, "answer": question.answer}

    return Inputs(
        demonstrations=world.demonstrations,
        heldout_demonstrations=world.heldout_demonstrations[:HELDOUT_ROWS],
        pairs=world.pairs,
        heldout_pairs=world.heldout_pairs,
        unpaired=_unpaired(world.pairs),
        heldout_unpaired=_unpaired(world.heldout_pairs),
        prompts=[row(question) for question in world.train],
        eval_prompts=[row(question) for question in world.validation],
        test=[row(question) | {"references": [question.reference]} for question in world.test],
        monitors=monitors,
    )


def model_folders(models: str, run: str) -> dict[str, str]:
    """Names and folders of models such as ``"sft,ppo"``, looked for in the run's folder first.

    Raises:
        BadInput: if none is named, or one twice.
    """
    names = [name.strip() for name in models.split(",") if name.strip()]
    require(len(names) > 0, "--models names no model; give for example --models sft,ppo")
    require(len(set(names)) == len(names), f"--models {models} names a model twice")
    folders = {}
    for name in names:
        inside = Path(run) / name
        require(
            inside.is_dir() or Path(name).is_dir() or "/" in name,
            f"no model {name!r} in {run}; run examples/quickstart.py first, or give a folder",
        )
        folders[name] = str(inside) if inside.is_dir() else name
    return folders


def reward_model_folder(named: str | None, run: str) -> str | None:
    """The reward model that is named, else that of the run; None if there is neither."""
    inside = Path(run) / "reward_model"
    return named or (str(inside) if inside.is_dir() else None)


def _distinct(rows: Sequence[Row]) -> list[Row]:
    """The first row of each prompt."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row["prompt"], row)
    return list(first.values())


def _chosen_as_response(rows: Sequence[Row]) -> list[Row]:
    return [_in_place(row, prompt=row["prompt"], response=row["chosen"]) for row in rows]


def _unpaired(rows: Sequence[Row]) -> list[Row]:
    """Rows with a label: of each pair two, the chosen response's and the rejected one's."""
    found: list[Row] = []
    for row in rows:
        if "label" in row:
            found.append(row)
        else:
            for name, label in (("chosen", True), ("rejected", False)):
                columns = {"prompt": row["prompt"], "response": row[name], "label": label}
                found.append(_in_place(row, **columns))
    return found


def _desirable(rows: Sequence[Row]) -> list[Row]:
    return [
        _in_place(row, prompt=row["prompt"], response=row["response"])
        for row in rows
        if row["label"]
    ]


def _with_references(rows: Sequence[Row]) -> list[Row]:
    """One row for each prompt, with every chosen response to it as a reference."""
    found: dict[str, Row] = {}
    for row in rows:
        first = _in_place(row, prompt=row["prompt"], references=[])
        found.setdefault(row["prompt"], first)["references"].append(row["chosen"])
    return list(found.values())


def _in_place(row: Row, **columns: Any) -> Row:
    """Other columns at the place of the same row."""
    return PlacedRow(columns, row.place) if isinstance(row, PlacedRow) else columns
