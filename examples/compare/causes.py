"""What of SFT, reward training and DPO is known to differ between a run of trl's and ours."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from compare import options, tokens
from compare.conventions import Cause
from compare.job import Ids, Record
from compare.ours.stages import Setup, Side
from rlhf_min.errors import BadInput

ADAMW = ("adamw_torch", "adamw_torch_fused")
# Those that make another order, and the value with which they do not.
ORDERING = {
    "data_seed": None,
    "dataloader_drop_last": False,
    "group_by_length": False,
    "shuffle_dataset": False,
    "train_sampling_strategy": "random",
}
SCHEDULE: dict[str, Any] = {"lr_scheduler_kwargs": (None, {}, "{}")}
# trl's options that change numbers, have no counterpart here, and the value with which they do not.
FOREIGN: dict[str, dict[str, Any]] = {
    "sft": {
        "assistant_only_loss": False,
        **SCHEDULE,
        "label_smoothing_factor": 0.0,
        "loss_type": ("nll", "chunked_nll"),
        "neftune_noise_alpha": None,
        "packing": False,
        "padding_free": False,
    },
    "reward": {"label_smoothing_factor": 0.0, "neftune_noise_alpha": None, **SCHEDULE},
    "dpo": {
        **SCHEDULE,
        "f_divergence_type": ("reverse_kl", "FDivergenceType.REVERSE_KL"),
        "label_smoothing_factor": 0.0,
        "ld_alpha": None,
        "loss_type": (*options.LOSSES, *([loss] for loss in options.LOSSES)),
        "loss_weights": (None, [1.0]),
        "neftune_noise_alpha": None,
        "reference_free": False,
        "rpo_alpha": None,
        "sync_ref_model": False,
        "use_weighting": False,
    },
}


@dataclass(frozen=True)
class Sides:
    """Both sides of a comparison before a cause is followed.

    Args:
        record: trl's.
        side: our model.
        setup: of our run by our own conventions.
        left_out: rows that have no ids here, and why.
        places: number of a row -> what it is called in the user's file.
    """

    record: Record
    side: Side
    setup: Setup
    left_out: Mapping[int, str]
    places: Mapping[int, Any]

    def named(self, rows: Sequence[int]) -> str:
        """Rows by their places in the file."""
        return tokens.rows_named(rows, self.places)


def causes(sides: Sides) -> list[Cause[Setup]]:
    """All that differs, in the order in which readers would look for it."""
    found = [*_options(sides), *_optimizer(sides), *_model(sides), *_rows(sides), *_texts(sides)]
    found = [_checked(cause, sides.setup) for cause in found]
    found += _order(sides, found)
    return [*found, *_micro_batches(sides), *_shares(sides), *_foreign(sides)]


def _options(sides: Sides) -> list[Cause[Setup]]:
    """Options that both sides have, with other values."""
    setup, record = sides.setup, sides.record
    theirs = options.in_our_words(record.stage, record.options, total_steps=setup.total_steps)
    loss = _loss(setup, theirs, record)
    found = [*loss]
    for name, value in theirs.items():
        here = getattr(setup.config, name)
        if name in ("loss", "label_smoothing") and loss:  # which come together
            continue
        if name == "label_smoothing" and options.ignores_label_smoothing(record):
            if here:
                says = "trl's loss 'sigmoid' ignores label_smoothing, here it is heeded: {here}"
                found.append(_option(name, 0.0, says.format(here=here), "label smoothing ignored"))
        elif value != here:
            found.append(_option(name, value, _says(name, value, here, record)))
    return found


def _loss(setup: Setup, theirs: Mapping[str, Any], record: Record) -> list[Cause[Setup]]:
    """Another loss of pairs, with the label smoothing that belongs to it."""
    here = getattr(setup.config, "loss", None)
    if theirs.get("loss", here) == here:
        return []
    wanted = {"loss": theirs["loss"], "label_smoothing": theirs["label_smoothing"]}
    if options.ignores_label_smoothing(record):
        wanted["label_smoothing"] = 0.0

    def follow(setup: Setup) -> Setup:
        return replace(setup, config=replace(setup.config, **wanted))

    return [Cause("loss", f"the loss is {wanted['loss']} in trl and {here} here", follow)]


def _option(name: str, value: Any, says: str, title: str = "") -> Cause[Setup]:
    def follow(setup: Setup) -> Setup:
        return replace(setup, config=replace(setup.config, **{name: value}))

    return Cause(title or name, says, follow)


def _says(name: str, value: Any, here: Any, record: Record) -> str:
    if name == "batch_size":
        accumulated = record.options["gradient_accumulation_steps"]
        size = record.options["per_device_train_batch_size"]
        of = f" ({size} in a micro-batch, {accumulated} accumulated)" if accumulated > 1 else ""
        return f"a step of trl has {value} rows{of}, here {here}: accumulation or batch size"
    return f"{name} is {value} in trl and {here} here"


def _optimizer(sides: Sides) -> list[Cause[Setup]]:
    """Of AdamW what no option of ours says."""
    facts, setup = sides.record.facts, sides.setup
    given = facts["optimizer"]
    betas, eps = tuple(given.get("betas", setup.betas)), given.get("eps", setup.eps)
    found: list[Cause[Setup]] = []
    if eps != setup.eps:
        says = f"AdamW's epsilon is {eps} in trl and {setup.eps} here"
        found.append(Cause("epsilon", says, lambda setup: replace(setup, eps=eps)))
    if betas != setup.betas:
        says = f"AdamW's betas are {betas} in trl and {setup.betas} here"
        found.append(Cause("betas", says, lambda setup: replace(setup, betas=betas)))
    own, optim = facts.get("own_optimizer", False), sides.record.options["optim"]
    if own and given["class"] != "AdamW":
        found.append(Cause("optimizer", f"the script brings {given['class']}, here it is AdamW"))
    elif own and min(given["weight_decay"]) > 0:
        says = "the script's optimizer decays all weights, here biases and normalisations do not"
        found.append(Cause("optimizer", says))
    elif not own and optim not in ADAMW:
        found.append(Cause("optimizer", f"optim is {optim} in trl, here it is AdamW"))
    if facts.get("own_schedule"):
        found.append(Cause("rate", "the script brings a schedule of its own, which is not here"))
    frozen = facts.get("frozen")
    if frozen:
        more = f" and {len(frozen) - 1} more" if len(frozen) > 1 else ""
        says = f"trl's side does not train {frozen[0]}{more}, here all weights are trained"
        found.append(Cause("frozen weights", says, lambda setup: replace(setup, frozen=frozen)))
    return found


def _model(sides: Sides) -> list[Cause[Setup]]:
    """What the two models do differently with the same ids."""
    facts, side = sides.record.facts, sides.side
    stage, found = sides.record.stage, []
    theirs, ours = facts.get("dropout", 0.0), side.dropout if stage != "dpo" else 0.0

    def without(setup: Setup) -> Setup:
        return replace(setup, dropout=False)

    if theirs:
        here = f"{ours} here too, from other random numbers" if ours else "off here"
        says = f"dropout is {theirs} in trl, so that its numbers are random, and {here}"
        found.append(Cause("dropout", says, without, undo=(("dropout", False),)))
    elif ours:
        found.append(Cause("dropout", f"dropout is off in trl and {ours} here", without))
    halves = {facts.get("mixed_precision", "no"), facts["dtype"]} - {"no", "float32", "float64"}
    if halves or sides.setup.config.precision != "fp32":
        precision = " and ".join(sorted(halves)) or facts["dtype"]
        says = f"trl computes in {precision}, here in {sides.setup.config.precision}"
        again = (("float32", True),) if halves else ()
        found.append(Cause("half precision", says, _in_float32, undo=again))
    if not facts.get("ref_is_start", True):
        says = "the reference is another model in trl, here it is the model before its first step"
        found.append(Cause("reference", says, lambda s: replace(s, reference=facts["reference"])))
    if stage == "reward":
        model: Any = side.model
        segments = getattr(model.model.config, "type_vocab_size", 0) > 1
        if segments and not facts.get("token_type_ids", False):
            says = "trl does not tell BERT which tokens are the response's, here it is told"
            found.append(Cause("segments", says, lambda s: replace(s, segments=False)))
        pad_id, here_id = facts.get("pad_id"), model.tokenizer.pad_token_id
        size = sides.record.options["per_device_train_batch_size"]
        if sides.setup.margins and size > 1 and sides.record.versions["trl"].startswith("0."):
            says = "trl 0.11 takes the margin of each pair of a micro-batch from all its pairs"
            found.append(Cause("margin", f"{says}, here from its own"))
        if pad_id != here_id:
            says = f"trl pads with id {pad_id}, and here it is {here_id}"
            found.append(Cause("pad", says, lambda setup: replace(setup, pad_id=pad_id)))
    return found


def _in_float32(setup: Setup) -> Setup:
    return replace(setup, config=replace(setup.config, precision="fp32"))


def _rows(sides: Sides) -> list[Cause[Setup]]:
    """Rows that one side trains on and the other leaves out."""
    record, setup = sides.record, sides.setup
    here = {row: why for row, why in sides.left_out.items() if row not in record.left_out}
    there = {row: why for row, why in record.left_out.items() if row not in sides.left_out}
    if not here and not there:
        return []
    parts = []
    if there:
        parts.append(f"trl leaves out {sides.named(list(there))} ({next(iter(there.values()))})")
    if here:
        parts.append(f"{sides.named(list(here))} left out here ({next(iter(here.values()))})")
    kept = (setup.rows.keys() | sides.left_out.keys()) - record.left_out.keys()
    rows = {row: setup.rows.get(row, record.rows.get(row, {})) for row in kept}
    says = ", and ".join(parts) + ", so that the order is another one too"
    return [Cause("left-out rows", says, lambda setup: replace(setup, rows=_merged(setup, rows)))]


def _merged(setup: Setup, rows: Mapping[int, Ids]) -> dict[int, Ids]:
    """These rows, of which the setup's own may have taken over ids of trl's already."""
    return {row: setup.rows.get(row, ids) for row, ids in rows.items()}


def _texts(sides: Sides) -> list[Cause[Setup]]:
    """Rows that are read differently, by the kind of difference."""
    record, tokenizer = sides.record, sides.side.tokenizer
    found: list[Cause[Setup]] = []
    parted = _parted(record)
    if parted:
        says = f"{sides.named(parted)}: trl cuts all of a prompt, or more for one of the responses"
        found.append(Cause("cut prompt", f"{says}, here a pair has one prompt"))
    whole = {} if "holes" in record.facts else record.rows
    longest = record.options.get("max_length")
    for difference in tokens.differences(sides.setup.rows, whole, tokenizer, max_length=longest):
        says = f"{sides.named(list(difference.columns))}: {difference.says}"
        columns = {row: c for row, c in difference.columns.items() if row not in parted}
        if columns:
            found.append(Cause(difference.kind, says, _taking(record.rows, columns)))
    model = type(sides.side.module).__name__
    from_first = not all(ids.get("prompt_ids", True) for ids in record.rows.values())
    if record.stage == "sft" and from_first and not model.endswith("ForCausalLM"):
        says = f"for a {model} trl divides by the first token of each row too, here not"
        follow = partial(replace, first_counted=True)
        found.append(Cause("first token counted", says, follow))
    return found


def _parted(record: Record) -> list[int]:
    """Pairs of DPO that have no prompt in common once trl has cut them from the left."""
    rows = record.rows.items() if record.stage == "dpo" else ()
    return sorted(n for n, ids in rows if "rejected_prompt_ids" in ids or not ids["prompt_ids"])


def _taking(
    theirs: Mapping[int, Ids], columns: Mapping[int, tuple[str, ...]]
) -> Callable[[Setup], Setup]:
    def follow(setup: Setup) -> Setup:
        rows = dict(setup.rows)
        for row, names in columns.items():
            rows[row] = rows[row] | {name: theirs[row][name] for name in names}
        return replace(setup, rows=rows)

    return follow


def _order(sides: Sides, others: Sequence[Cause[Setup]]) -> list[Cause[Setup]]:
    """The rows of each step, if they are others although all else was followed."""
    theirs = [[row for part in micros for row in part] for micros in sides.record.batches]
    setup = sides.setup
    for cause in others:
        setup = cause.follow(setup) if cause.follow else setup
    ours = [[row for part in micros for row in part] for micros in setup.drawn()]
    if ours == theirs or not {row for rows in theirs for row in rows} <= setup.rows.keys():
        return []
    step = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    says = f"step {step + 1} of trl has {sides.named(theirs[step])}, here {sides.named(ours[step])}"
    given = sides.record.options
    why = [f"{n}={given[n]}" for n, usual in ORDERING.items() if given.get(n, usual) != usual]
    says += f" ({', '.join(why)})" if why else ""
    return [Cause("order", says, lambda setup: replace(setup, batches=theirs))]


def _micro_batches(sides: Sides) -> list[Cause[Setup]]:
    """Micro-batches that weigh alike although they are of unequal size."""
    record = sides.record
    if record.stage == "sft":  # whose tokens are counted over the whole step
        return []
    uneven = [i for i, micros in enumerate(record.batches) if len({*map(len, micros)}) > 1]
    if not uneven:
        return []
    sizes = " and ".join(str(len(part)) for part in record.batches[uneven[0]])
    of_steps = [[len(part) for part in micros] for micros in record.batches]
    says = (
        f"in step {uneven[0] + 1} trl averages the means of micro-batches of {sizes} rows, "
        "here each row weighs alike"
    )
    return [
        Cause("mean of micro-batch means", says, lambda s: replace(s, micro_sizes=of_steps)),
    ]


def _shares(sides: Sides) -> list[Cause[Setup]]:
    """Steps whose micro-batches have weights that do not add up to 1."""
    facts = sides.record.facts
    for i, losses in enumerate(facts["micro_losses"] if sides.record.stage != "sft" else []):
        weights = [
            share / loss if loss else 0.0
            for share, loss in zip(facts["micro_shares"][i], losses, strict=True)
        ]
        if abs(sum(weights) - 1) > 1e-3 and all(losses):
            told = ", ".join(f"{weight:.3g}" for weight in weights)
            says = f"in step {i + 1} trl adds micro-batches up with the weights {told}"
            return [Cause("weights of micro-batches", f"{says}, here each row weighs alike")]
    return []


def _foreign(sides: Sides) -> list[Cause[Setup]]:
    """Options of trl's that nothing here follows."""
    given, found = sides.record.options, []
    for name, usual in FOREIGN[sides.record.stage].items():
        usual = usual if isinstance(usual, tuple) else (usual,)
        if name in given and given[name] not in usual:
            found.append(Cause[Setup](name, f"{name} is {given[name]!r} in trl, which is not here"))
    facts = sides.record.facts
    if "holes" in facts:
        says = "trl leaves tokens out between those that it trains on, here the response is whole"
        found.append(Cause("holes", says))
    if "subclass" in facts:
        says = f"the script trains with {facts['subclass']}, a {sides.record.trainer} of its own"
        found.append(Cause("subclass", f"{says}, of which nothing but trl's part is here"))
    if facts.get("own_loss"):
        found.append(Cause("compute_loss_func", "the script brings a loss, which is not here"))
    if given.get("precompute_ref_log_probs") and facts["dtype"] == "float64":
        says = "trl keeps the reference's log-probabilities in float32"
        found.append(Cause("precompute_ref_log_probs", f"{says}, here they are in float64"))
    return found


def _checked(cause: Cause[Setup], setup: Setup) -> Cause[Setup]:
    """A cause that cannot be followed if our config refuses what trl's says."""
    try:
        if cause.follow is not None:
            cause.follow(setup)
    except BadInput:
        return replace(cause, follow=None, says=f"{cause.says}, where trl's is not known")
    return cause
