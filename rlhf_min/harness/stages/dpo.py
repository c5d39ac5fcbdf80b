"""DPO as the commands run it."""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from rlhf_min import dpo
from rlhf_min.config import ReferenceFree
from rlhf_min.data import PreferenceExample
from rlhf_min.encoding.codec import Codec
from rlhf_min.errors import require
from rlhf_min.estimates import proportion_estimate
from rlhf_min.harness import preflight
from rlhf_min.harness.cli import RunOptions
from rlhf_min.harness.inputs import HELDOUT_ROWS, Inputs, print_report
from rlhf_min.harness.preflight import Check
from rlhf_min.harness.report.curves import Curve, Range
from rlhf_min.harness.report.findings import Estimated, Finding, by_heart, interval
from rlhf_min.harness.rows.encoding_report import describe, describe_heldout
from rlhf_min.harness.run import faults
from rlhf_min.harness.run.checkpoint import Snapshot
from rlhf_min.harness.run.log import MetricsLog, note
from rlhf_min.harness.run.reading import Record, Run
from rlhf_min.harness.run.saved_models import save_policy
from rlhf_min.harness.stages.run_stage import policy_and_reference, run_stage
from rlhf_min.optim import State
from rlhf_min.policy import Policy
from rlhf_min.speed.sharding import shard

STAGE = "dpo"
TITLE, ROWS = "DPO", "pairs"
CONFIG = dpo.DPOConfig
MEASURED = {
    "loss": "lower",
    "accuracy": "higher",
    "margin": "higher",
    "chosen_rewards": "higher",
    "rejected_rewards": "lower",
    "chosen_logprobs": "higher",
    "rejected_logprobs": "lower",
    "chosen_logprobs_change": "higher",
    "rejected_logprobs_change": "lower",
    "sft_loss": "lower",
}
MONITORS = False
WRITES = ()
# How far the first loss may differ from what it is known to be; it holds the log-probabilities of
# whole responses.
LOSS_TOLERANCE = {"float64": 1e-9, "fp32": 1e-3, "bf16": 0.1, "fp16": 0.02}
PAIR_TOKENS = 64  # of one side of a pair; of longer ones a single one is looked at


def trained_before(options: RunOptions) -> list[str]:
    """The policy, unless it is given."""
    return ["sft"] if options.model is None else []


# What its preflight checks


def checks(
    policy: Policy, ref_policy: Policy | None, config: dpo.DPOConfig, state: State
) -> Iterator[Check]:
    """What DPO relies on, with the reference cached, live or none."""
    pairs: Sequence[PreferenceExample] = state.cursor.examples
    rows = [(x.prompt_ids, ids) for x in pairs for ids in (x.chosen_ids, x.rejected_ids)]
    yield preflight.no_empty_row(rows, rows_per_example=2)
    yield pairs_differ(pairs)
    yield preflight.eos_supervised(rows, policy)
    yield from preflight.half_precision(config.precision, policy.device)
    longest = 2 * max(map(preflight.row_length, rows))  # a pair passes together
    tokens = preflight.largest_batch(longest, config.batch_size, config.max_tokens)
    frozen, short = [] if ref_policy is None else [ref_policy], preflight.shortest(rows)
    yield from preflight.policy_memory(policy, frozen, state.optimizer, rows[0], tokens=tokens)
    yield preflight.passes_agree(policy, short)
    tolerance = preflight.tolerance(policy.lm.dtype, config.precision)
    yield preflight.head_equals_model(policy, short[0], tolerance)
    yield preflight.row_alone_equals_batch(policy, short[-1], tolerance)
    yield first_loss(policy, ref_policy, pairs, config)


def pairs_differ(pairs: Sequence[PreferenceExample]) -> Check:
    """Chosen and rejected are different ids."""
    equal = [i for i, x in enumerate(pairs) if torch.equal(x.chosen_ids, x.rejected_ids)]
    return Check(
        "pairs with chosen equal to rejected",
        len(equal),
        0,
        f"pair {equal[0] if equal else 0} (the first is 0) cannot teach a preference",
        "raise --max_response_tokens if they differ further on, else drop such pairs",
    )


def first_loss(
    policy: Policy,
    ref_policy: Policy | None,
    pairs: Sequence[PreferenceExample],
    config: dpo.DPOConfig,
) -> Check:
    """The loss is what it has to be while policy and reference are the same; without a reference,
    what it has to be of a response beside itself."""
    # Whole pairs, since a cached reference knows whole responses only; one if they are long.
    few = heapq.nsmallest(2, pairs, key=_length)
    few = few if _length(few[-1]) <= PAIR_TOKENS else few[:1]
    if config.reference_free:
        few = [replace(x, rejected_ids=x.chosen_ids) for x in few]
    policy.train()
    with torch.no_grad():  # what SFT adds to it is known of no model
        loss = float(dpo.batch_loss(policy, ref_policy, few, replace(config, sft_coef=0.0)).loss)
    expected = dpo.first_loss(config)
    tolerance = preflight.tolerance(policy.lm.dtype, config.precision, table=LOSS_TOLERANCE)
    # A steep loss, as IPO's with a small beta, makes more of the same rounding.
    nats = preflight.tolerance(policy.lm.dtype, config.precision)
    tolerance = max(tolerance, abs(dpo.first_loss(config, off=nats) - expected))
    cause, cure = "policy and reference differ before training", "start both from the same weights"
    if config.reference_free:
        cause = "one response has two probabilities in one batch"
        cure = "turn off what makes the model's forward random, or give another model"
    return Check(
        f"first loss of {config.loss}",
        abs(loss - expected),
        tolerance,
        cause,
        cure,
        words=f"{loss:.6f}, within {tolerance:.2g} of {expected:.6f}",
    )


def _length(pair: PreferenceExample) -> int:
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


# How it is run


def run(
    start: Policy,
    codec: Codec,
    inputs: Inputs,
    config: dpo.DPOConfig,
    log: MetricsLog,
    *,
    ref_device: torch.device | None = None,
) -> Policy:
    """Train a copy of the policy on the preference pairs; the start stays as its reference.

    A loss without a reference trains the policy itself, since a second model would be for nothing.
    The trained model is saved in the run's folder when its measures are finite.
    """
    examples, cut = codec.encode_preferences(inputs.pairs)
    heldout, heldout_cut = codec.encode_preferences(inputs.heldout_pairs[:HELDOUT_ROWS])
    encoding = describe(cut, codec) + describe_heldout(heldout_cut, len(heldout))
    report = print_report(f"DPO on {len(examples)} pairs; {encoding}")
    require(
        len(examples) > 0,
        "no pair is left to train on: all are equal as tokens or equal after the cut; raise "
        "--max_response_tokens, and --max_length with it, or give other pairs",
    )
    policy, ref_policy = shard(start), None
    if not config.reference_free:
        policy, ref_policy = policy_and_reference(start, "none", ref_device)
    state = dpo.new_state(policy, ref_policy, examples, config)
    if config.reference_free and config.cache_reference:  # now, while it is what it starts as
        with state.optimizer.autocast():
            heldout = dpo.cache_reference(policy, heldout, max_tokens=config.max_tokens)
    snapshot = Snapshot(
        STAGE,
        policy,
        state,
        partial(save_policy, policy),
        models={"policy": policy} | ({} if ref_policy is None else {"ref_policy": ref_policy}),
        texts=[pair["prompt"] for pair in inputs.pairs],
        examples=examples,
        heldout=heldout,
        total=dpo.total(state.cursor, config),
        alone=partial(alone, policy, ref_policy, config),
    )
    run_stage(
        snapshot,
        checks(policy, ref_policy, config, state),
        dpo.train(policy, ref_policy, config, state, heldout=heldout),
        inputs,
        log,
        title=TITLE,
        report=report,
        show=("loss", "eval/accuracy"),
    )
    accuracy = {}
    for name, pairs in [("trained on", state.cursor.examples), ("held out", heldout)]:
        if some := pairs[:HELDOUT_ROWS]:
            with state.optimizer.autocast():
                measured = dpo.evaluate(policy, ref_policy, some, config)
            faults.require_finite(STAGE, measured)
            right = round(measured["eval/accuracy"] * len(some))
            accuracy[name] = proportion_estimate(right, len(some)).as_json()
    snapshot.save_model(log.folder / STAGE)
    note(log.folder, STAGE, accuracy=accuracy)
    return policy


def alone(
    policy: Policy,
    ref_policy: Policy | None,
    config: dpo.DPOConfig,
    pairs: Sequence[PreferenceExample],
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """What the loss of each pair is made of, to find the ones at fault where it is not finite."""
    for row, pair in enumerate(pairs):
        loss = dpo.batch_loss(policy, ref_policy, [pair], config)
        found = loss._asdict().items()
        yield row, {name: x for name, x in found if name != "loss" and x is not None}


# What a report shows


def _rewards_range(options: Record) -> Range:
    # Without a reference they begin at beta * log pi, and no longer at 0.
    free = options.get("loss") in get_args(ReferenceFree)
    return Range(low=2, of="starts") if free else Range(low=-2)


CURVES = (
    Curve(
        STAGE,
        "Pairs ranked right",
        "share",
        (("eval/accuracy", "held out"), ("accuracy", "training")),
        "It climbs from a half and levels off below 1.",
        Range(low=0.5),
        "look whether chosen and rejected are the right way round, or lower --learning_rate",
    ),
    Curve(
        STAGE,
        "Implicit rewards",
        "nats times beta",
        (
            ("chosen_rewards", "chosen"),
            ("rejected_rewards", "rejected"),
            ("eval/chosen_rewards", "held out"),
            ("eval/rejected_rewards", "held out"),
        ),
        "The rejected one sinks and the chosen one stays near where it began; where both sink far, "
        "probability goes to responses that are in no pair.",
        _rewards_range,
        "lower --learning_rate or, of a loss with a reference, raise --beta",
    ),
)


def headline(run: Run) -> str | None:
    """How many pairs it ranks right."""
    pairs = run.noted(STAGE, "accuracy")
    loss = run.config(STAGE).get("loss", "sigmoid")
    title = TITLE if loss == "sigmoid" else f"{TITLE} with loss {loss}"
    return pairs and f"{title}: {accuracies_in_words(pairs)}."


def findings(run: Run) -> Iterator[Finding]:
    """Whether it knows more than its own pairs, and than a guess."""
    pairs = run.noted(STAGE, "accuracy")
    if not pairs or "held out" not in pairs:
        return
    trained, held_out = pairs["trained on"], pairs["held out"]
    overlap = trained["ci95"][0] <= held_out["ci95"][1]
    if not overlap and by_heart(trained["mean"], held_out):
        yield Finding(
            STAGE,
            "learns its pairs by heart",
            figure=accuracies_in_words(pairs),
            to_do="take fewer --epochs, a lower --learning_rate, more pairs or, of a loss with a "
            "reference, a larger --beta",
        )
    if held_out["ci95"][0] <= 0.5:
        yield Finding(
            STAGE,
            "is not shown to know more than a guess",
            f"on {held_out['n']} held-out pairs",
            accuracies_in_words(pairs),
            "take more pairs, and hold more of them out",
        )


def accuracies_in_words(pairs: Mapping[str, Estimated]) -> str:
    """How often it prefers the chosen response, on both halves of the pairs."""
    parts = [f"{interval(found)} of {found['n']} pairs {name}" for name, found in pairs.items()]
    return f"prefers the chosen response in {' and '.join(parts)}"
