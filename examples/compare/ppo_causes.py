"""What is known to differ between a PPO run of trl's and ours, and how ours follows it."""

from collections.abc import Callable, Collection
from dataclasses import fields, replace
from typing import Any, get_args

from compare import options
from compare.conventions import Cause
from compare.explain import following
from compare.job import Record
from compare.ours.ppo import Setup
from rlhf_min.config import PPOConfig, Schedule

STEP = "PPOTrainer.step"
SCHEDULES = get_args(Schedule)


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
    alone = [name for name in alone if "batch" not in name and "accumulation" not in name]
    told = options.without(record.options, record.facts.get("defaults", {}), alone)
    config = _in_our_words(record, told) | given
    if config["schedule"] not in SCHEDULES:  # it stays among the causes
        del config["schedule"]
    return Setup(
        PPOConfig(**config),
        rollouts,
        batches=record.batches,
        accumulated=record.facts["accumulated"],
    )


def _theirs(record: Record) -> dict[str, Any]:
    return _in_our_words(record, record.options)


def _in_our_words(record: Record, told: dict[str, Any]) -> dict[str, Any]:
    return options.in_our_words("ppo", told, total_steps=record.facts["total_steps"])


def causes(setup: Setup, record: Record) -> list[Cause[Setup]]:
    """All that differs, options first."""
    found = [_option(name, value, setup) for name, value in _theirs(record).items()]
    told = [cause for cause in found if cause is not None]
    # Its conventions are those of its options, as of whitened rewards.
    setup = following(setup, [cause for cause in told if cause.follow is not None])
    of_trainer = _of_step if record.trainer == STEP else _of_train
    conventions = [*of_trainer(setup, record), *_of_both(setup, record)]
    return [
        *told,
        *(replace(cause, row=cause.name[:1].upper() + cause.name[1:]) for cause in conventions),
    ]


def _option(name: str, value: Any, setup: Setup) -> Cause[Setup] | None:
    here = getattr(setup.config, name)
    if value == here or name not in {f.name for f in fields(setup.config)}:
        return None
    says = f"{name} is {value} in trl and {here} here"
    known = name != "schedule" or value in SCHEDULES
    return Cause(name, says, _with(**{name: value}) if known else None)


def _with(**options: Any) -> Callable[[Setup], Setup]:
    """Follow by options of our config."""
    return lambda setup: replace(setup, config=replace(setup.config, **options))


def _by(**conventions: Any) -> Callable[[Setup], Setup]:
    """Follow by what is no option of ours."""
    return lambda setup: replace(setup, **conventions)


def _of_both(setup: Setup, record: Record) -> list[Cause[Setup]]:
    optimizer, accumulated = record.facts["optimizer"], record.facts["accumulated"]
    eps = optimizer.get("eps", setup.config.adam_eps)
    betas = tuple(optimizer.get("betas", setup.betas))
    found: list[Cause[Setup]] = []
    if optimizer["class"] not in ("Adam", "AdamW"):  # which are the same without decay
        says = f"trl's optimizer is {optimizer['class']}, here it is AdamW"
        found.append(Cause("optimizer", says))
    if betas != setup.betas:
        says = f"AdamW's betas are {betas} in trl and {setup.betas} here"
        found.append(Cause("betas", says, _by(betas=betas)))
    if eps != setup.config.adam_eps:
        says = f"Adam's epsilon is {eps} in trl and {setup.config.adam_eps} here"
        found.append(Cause("Adam's epsilon", says, _with(adam_eps=eps)))
    if accumulated > 1:
        found.append(
            Cause(
                "mean of micro-batch means",
                f"trl gives each of the {accumulated} micro-batches of a step the same weight, "
                "here each token has the same",
                _by(micro_batch_means=True),
            )
        )
    filled = 1.0
    if record.trainer != STEP:
        slots = record.options["num_mini_batches"] * accumulated
        micros = len(record.batches[0]) / record.options["num_ppo_epochs"]
        filled = micros / slots
        says = "trl averages ratio and entropy over padding too, and scores after the EOS penalty"
        if filled < 1:
            says += f", and divides its averages by {1 / filled:g} times as many micro-batches"
    else:
        says = (
            "trl's scores are the clipped ones, its values and returns are means of the "
            "minibatches' means, and its explained variance is of the values while they learn"
        )
    found.append(
        Cause(
            "definitions of metrics",
            f"{says}; no weight depends on it",
            _by(metrics_of=record.trainer, filled=filled),
        )
    )
    return found


def _of_train(setup: Setup, record: Record) -> list[Cause[Setup]]:
    """Of ``PPOTrainer.train``, 1.12."""
    found = _cells(setup, record)
    config, temperature = setup.config, record.facts["temperature"]
    if record.facts["dropout"]:
        says = (
            f"dropout of {record.facts['dropout']} is on in trl, which sets only modules of "
            "dropout to 0, so that its numbers are random; here it is off"
        )
        undo = (("dropout", False),)
        found.append(Cause("dropout", says, lambda setup: setup, undo=undo))
    found.append(
        Cause(
            "value head without bias",
            "trl's value model, a classifier, has no bias in its last layer, here the value head "
            "has one that learns",
            _by(head_bias=False),
        )
    )
    if config.max_grad_norm is not None:
        found.append(
            Cause(
                "no gradient clipping",
                f"trl never clips, whatever max_grad_norm says, here it is {config.max_grad_norm}",
                _with(max_grad_norm=None),
            )
        )
    if config.schedule != "constant" or config.warmup_share:
        found.append(
            Cause(
                "schedule by rollout",
                "trl's learning rate changes between rollouts, here after each optimizer step",
                _by(schedule_by_rollout=True),
            )
        )

    def tempered(setup: Setup) -> Setup:
        extra = temperature - record.options["temperature"]
        return _with(temperature=setup.config.temperature + extra)(setup)

    says = f"trl adds {temperature - record.options['temperature']:.0e} to the temperature"
    found.append(Cause("temperature plus 1e-7", f"{says}, here nothing", tempered))
    return found


def _cells(setup: Setup, record: Record) -> list[Cause[Setup]]:
    """What trl's padding by ids does: where a row ends, and what of a prompt is hidden."""
    pad_id, eos_id = record.facts["pad_id"], record.facts["eos_id"]
    responses = [ids for rollout in setup.rollouts for ids in rollout.response_ids]
    prompts = [ids for rollout in setup.rollouts for ids in rollout.prompt_ids]
    follow = _by(pad_id=pad_id)
    found: list[Cause[Setup]] = []
    hit = sum(pad_id in ids for ids in responses)
    if hit and pad_id == eos_id:
        says = (
            f"trl takes EOS for padding: in {hit} of {len(responses)} responses it is left out of "
            "the policy's loss and of the KL, here it is a token"
        )
        found.append(Cause("EOS taken for padding", says, follow))
    elif any(len({*map(len, x.response_ids)}) > 1 for x in setup.rollouts):
        says = (
            "trl puts the score, and one more value, one cell behind the response where there is "
            "room, here the score is at its last token"
        )
        found.append(Cause("score cell", says, follow))
    hidden = sum(pad_id in ids for ids in prompts)
    if hidden:
        of = f"{hidden} of {len(prompts)} prompts"
        says = f"trl hides id {pad_id}, its padding, in {of}, here it is read"
        found.append(Cause("padding inside prompts", says, _by(pad_in_prompts=pad_id)))
    return found


def _of_step(setup: Setup, record: Record) -> list[Cause[Setup]]:
    """Of ``PPOTrainer.step``, 0.11."""
    trl, config = record.options, setup.config
    found: list[Cause[Setup]] = []
    if record.facts.get("padding_side") == "left":
        says = (
            "trl pads on the left, as the tokenizer says, and counts the padding in positions, "
            "here a row begins at 0"
        )
        found.append(Cause("left padding shifts positions", says))
    if config.temperature != record.facts["temperature"]:
        found.append(
            Cause(
                "temperature left out of scoring",
                f"trl scores at temperature 1 what was sampled at {config.temperature}, here both "
                "are at the same",
                _with(temperature=1.0),
            )
        )
    if config.max_grad_norm is not None:
        found.append(
            Cause(
                "only the first step is clipped",
                "trl uses up its list of parameters in the first step, so that no later gradient "
                "is clipped, here each is",
                _by(only_first_clipped=True),
            )
        )
    if config.whiten_rewards:
        found.append(
            Cause(
                "whitened rewards leak from padding",
                "trl's whitened rewards are not 0 in the padding behind a row, and reach its "
                "tokens from there, here they are 0",
                _by(leaking_rewards=True),
            )
        )
    if config.stop_kl is not None:
        found.append(
            Cause(
                "early stop by last minibatch",
                "trl stops by the KL of an epoch's last minibatch, here by the mean of the epoch",
                _by(stop_by_last=True),
            )
        )
    if record.facts["accumulated"] == 1:
        says = (
            f"trl takes no gradient from a minibatch whose mean ratio is above "
            f"{trl['ratio_threshold']}, here it counts like any other"
        )
        follow = _by(ratio_threshold=trl["ratio_threshold"])
        found.append(Cause("large ratios count nothing", says, follow))
    return found
