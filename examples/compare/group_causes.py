"""What is known to differ between a GRPO or RLOO run of trl's and ours, and how ours follows it."""

from collections.abc import Collection
from dataclasses import fields, replace
from typing import Any, get_args

from compare import options
from compare.conventions import Cause
from compare.explain import following
from compare.job import Record
from compare.ours.groups import Setup
from rlhf_min.config import GroupConfig, GRPOConfig, RLOOConfig, Schedule
from rlhf_min.errors import BadInput

CONFIGS: dict[str, type[GroupConfig]] = {"grpo": GRPOConfig, "rloo": RLOOConfig}
SCHEDULES = get_args(Schedule)
# What trl alone has, with the value that changes nothing.
FOREIGN: dict[str, Any] = {
    "delta": None,
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "off_policy_mask_threshold": None,
    "multi_objective_aggregation": "sum_then_normalize",
    "sync_ref_model": False,
    "cast_lm_head_to_fp32": False,
    "lr_scheduler_kwargs": None,
}


def setup_of(
    record: Record, rollouts: Any, given: dict[str, Any], alone: Collection[str] = ()
) -> Setup:
    """Our run by our own conventions, with trl's options where none of ours were given.

    Args:
        record: trl's.
        rollouts: those of the job.
        given: fields of our config.
        alone: options that were given to trl alone. Its batches are ours in any case.
    """
    sizes = ("batch", "accumulation", "steps_per", "num_generations")
    alone = [name for name in alone if not any(size in name for size in sizes)]
    told = options.without(record.options, record.facts.get("defaults", {}), alone)
    config = _in_our_words(record, told) | given
    if config["schedule"] not in SCHEDULES:  # it stays among the causes
        del config["schedule"]
    return Setup(
        CONFIGS[record.stage](**config),
        rollouts,
        batches=record.batches,
        accumulated=record.facts["accumulated"],
    )


def _in_our_words(record: Record, told: dict[str, Any]) -> dict[str, Any]:
    return options.in_our_words(record.stage, told, total_steps=record.facts["total_steps"])


def causes(setup: Setup, record: Record, *, absolute: bool) -> list[Cause[Setup]]:
    """All that differs, options first.

    Args:
        absolute: whether the model sees a shift of all positions.
    """
    theirs = _in_our_words(record, record.options)
    found = [_option(name, value, setup) for name, value in theirs.items()]
    told = [cause for cause in found if cause is not None]
    setup = following(setup, [cause for cause in told if cause.follow is not None])
    conventions = [*_conventions(setup, record, absolute), *_of_optimizer(setup, record)]
    conventions += _foreign(record)
    return [
        *told,
        *(replace(cause, row=cause.name[:1].upper() + cause.name[1:]) for cause in conventions),
    ]


def _option(name: str, value: Any, setup: Setup) -> Cause[Setup] | None:
    here = getattr(setup.config, name)
    if value == here or name not in {f.name for f in fields(setup.config)}:
        return None
    says = f"{name} is {value} in trl and {here} here"
    try:
        replace(setup.config, **{name: value})
    except BadInput:
        return Cause(name, says)
    return Cause(name, says, _with(**{name: value}))


def _with(**told: Any) -> Any:
    """Follow by options of our config."""
    return lambda setup: replace(setup, config=replace(setup.config, **told))


def _by(**conventions: Any) -> Any:
    """Follow by what is no option of ours."""
    return lambda setup: replace(setup, **conventions)


def _conventions(setup: Setup, record: Record, absolute: bool) -> list[Cause[Setup]]:
    trl, accumulated = record.options, record.facts["accumulated"]
    found: list[Cause[Setup]] = []
    widths = [{*map(len, rollout.prompt_ids)} for rollout in setup.rollouts]
    if absolute and any(len(of_rollout) > 1 for of_rollout in widths):
        says = (
            "trl pads prompts on the left and counts the padding in positions, so that a response "
            "is scored at others than it was sampled at, here a row begins at 0"
        )
        found.append(Cause("left padding shifts positions", says, _by(padded_positions=True)))
    if record.facts["dropout"]:
        says = (
            f"dropout of {record.facts['dropout']} is on in trl, so that its numbers are random, "
            "here it is off"
        )
        undo = (("dropout", False),)
        found.append(Cause("dropout", says, lambda setup: setup, undo=undo))
    config = setup.config
    if isinstance(config, GRPOConfig) and config.kl_coef and trl.get("use_bias_correction_kl"):
        says = "trl multiplies the KL in its loss, k3, by the ratio, here it is k3 alone"
        found.append(Cause("KL times the ratio", says, _by(kl_times_ratio=True)))
    steps = trl["steps_per_generation"] // accumulated
    if trl.get("loss_type") == "dapo" and steps > 1:
        says = (
            f"trl's mean over tokens divides by those of the rollout in {steps} equal parts, here "
            "by those of the minibatch"
        )
        found.append(Cause("tokens of the rollout", says, _by(tokens_of_rollout=True)))
    if trl.get("loss_type") == "bnpo" and accumulated > 1:
        says = (
            f"trl gives each of the {accumulated} micro-batches of a step the same weight, here "
            "each token has the same"
        )
        found.append(Cause("mean of micro-batch means", says, _by(micro_batch_means=True)))
    if trl.get("normalize_advantages"):
        says = "trl whitens the advantages over the rollout, here they are as they are"
        found.append(Cause("advantages whitened", says, _by(whitened=True)))
    return found


def _of_optimizer(setup: Setup, record: Record) -> list[Cause[Setup]]:
    given = record.facts["optimizer"]
    eps = given.get("eps", setup.config.adam_eps)
    betas = tuple(given.get("betas", setup.betas))
    found: list[Cause[Setup]] = []
    if given["class"] != "AdamW":
        found.append(Cause("optimizer", f"trl's optimizer is {given['class']}, here it is AdamW"))
    if eps != setup.config.adam_eps:
        says = f"Adam's epsilon is {eps} in trl and {setup.config.adam_eps} here"
        found.append(Cause("Adam's epsilon", says, _with(adam_eps=eps)))
    if betas != setup.betas:
        says = f"AdamW's betas are {betas} in trl and {setup.betas} here"
        found.append(Cause("betas", says, _by(betas=betas)))
    return found


def _foreign(record: Record) -> list[Cause[Setup]]:
    """Options of trl's that nothing here follows."""
    given = record.options
    found = [
        Cause[Setup](name, f"{name} is {given[name]!r} in trl, which is not here")
        for name, usual in FOREIGN.items()
        if given.get(name, usual) not in (usual, {} if usual is None else usual)
    ]
    loss = given.get("loss_type", "grpo")
    if loss not in options.LOSS_MEANS:
        found.append(Cause("loss_type", f"trl's loss is {loss!r}, which is not here"))
    clip_range = given.get("reward_clip_range")
    if clip_range and clip_range[0] != -clip_range[1]:
        says = f"trl clips scores to {clip_range}, here either way by the same"
        found.append(Cause("reward_clip_range", says))
    return found
