"""KTO as the commands run it."""

import heapq
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from rlhf_min import kto
from rlhf_min.data import UnpairedExample
from rlhf_min.encoding.codec import Codec
from rlhf_min.estimates import proportion_estimate
from rlhf_min.harness import preflight
from rlhf_min.harness.cli import RunOptions
from rlhf_min.harness.inputs import HELDOUT_ROWS, Inputs, print_report
from rlhf_min.harness.preflight import Check
from rlhf_min.harness.report.curves import Curve, Range
from rlhf_min.harness.report.findings import Estimated, Finding, by_heart, interval
from rlhf_min.harness.rows.encoding_report import describe, describe_heldout
from rlhf_min.harness.rows.files import plural
from rlhf_min.harness.run import faults
from rlhf_min.harness.run.checkpoint import Snapshot
from rlhf_min.harness.run.log import MetricsLog, note
from rlhf_min.harness.run.reading import Run
from rlhf_min.harness.run.saved_models import save_policy
from rlhf_min.harness.stages.run_stage import policy_and_reference, run_stage
from rlhf_min.optim import State
from rlhf_min.policy import Policy

STAGE = "kto"
TITLE, ROWS = "KTO", "labelled responses"
CONFIG = kto.KTOConfig
MEASURED = {
    "loss": "lower",
    "accuracy": "higher",
    "margin": "higher",
    "desirable_rewards": "higher",
    "undesirable_rewards": "lower",
    "desirable_logprobs": "higher",
    "undesirable_logprobs": "lower",
    "kl": "lower",
}
MONITORS = False
WRITES = ()
# How far the first loss may differ from what it is known to be; it holds the log-probabilities of
# whole responses.
LOSS_TOLERANCE = {"float64": 1e-9, "fp32": 1e-3, "bf16": 0.1, "fp16": 0.02}
ROW_TOKENS = 128  # of longer rows the preflight takes two
WIDEST_RATIO = 4 / 3  # of the weights of both labels, as the authors recommend it


def trained_before(options: RunOptions) -> list[str]:
    """The policy, unless it is given."""
    return ["sft"] if options.model is None else []


# What its preflight checks


def checks(
    policy: Policy, ref_policy: Policy, config: kto.KTOConfig, state: State
) -> Iterator[Check]:
    """What KTO relies on, with the reference cached or live."""
    examples: Sequence[UnpairedExample] = state.cursor.examples
    rows = [(x.prompt_ids, x.response_ids) for x in examples]
    yield preflight.no_empty_row(rows)
    yield preflight.eos_supervised(rows, policy)
    if config.loss == "kto":
        yield prompts_differ(examples)
    yield from preflight.half_precision(config.precision, policy.device)
    longest = max(map(preflight.row_length, rows))
    tokens = preflight.largest_batch(longest, config.batch_size, config.max_tokens)
    frozen, short = [ref_policy], preflight.shortest(rows)
    yield from preflight.policy_memory(policy, frozen, state.optimizer, rows[0], tokens=tokens)
    yield preflight.passes_agree(policy, short)
    tolerance = preflight.tolerance(policy.lm.dtype, config.precision)
    yield preflight.head_equals_model(policy, short[0], tolerance)
    yield preflight.row_alone_equals_batch(policy, short[-1], tolerance)
    yield first_loss(policy, ref_policy, examples, config)


def prompts_differ(examples: Sequence[UnpairedExample]) -> Check:
    """No prompt has more than half of the rows, or a response often meets its own in the KL."""
    prompts = Counter(tuple(x.prompt_ids.tolist()) for x in examples)
    share = max(prompts.values()) / len(examples)
    return Check(
        "rows of the most frequent prompt",
        share,
        0.5,
        "KTO's KL takes responses to other prompts, and there are few",
        "give rows with more prompts, or --loss apo_zero_unpaired, which needs no KL",
        words=f"{share:.1%} of {len(examples)}, at most 50%",
        warning=True,
    )


def first_loss(
    policy: Policy,
    ref_policy: Policy,
    examples: Sequence[UnpairedExample],
    config: kto.KTOConfig,
) -> Check:
    """The loss of each row is what it has to be while policy and reference are the same.

    Of rows together it could be so by chance: what both labels have in common cancels.
    """
    # Whole rows, since a cached reference knows whole responses only; few if they are long.
    few = heapq.nsmallest(preflight.ROWS, examples, key=_length)
    few = few if _length(few[-1]) <= ROW_TOKENS else few[:2]
    policy.train()
    with torch.no_grad():
        kl = kto.reference_point(policy, ref_policy, few, config)
        losses = [kto.batch_loss(policy, ref_policy, [x], kl, config).loss for x in few]
    expected = [kto.first_loss([x], config) for x in few]
    gaps = [abs(float(loss) - known) for loss, known in zip(losses, expected, strict=True)]
    worst = max(range(len(few)), key=lambda row: (math.isnan(gaps[row]), gaps[row]))
    tolerance = preflight.tolerance(policy.lm.dtype, config.precision, table=LOSS_TOLERANCE)
    return Check(
        f"first loss of {config.loss}",
        gaps[worst],
        tolerance,
        "policy and reference differ before training",
        "start both from the same weights",
        words=f"{float(losses[worst]):.6f}, within {tolerance:.2g} of {expected[worst]:.6f}",
    )


def _length(example: UnpairedExample) -> int:
    return len(example.prompt_ids) + len(example.response_ids)


# How it is run


def run(
    start: Policy,
    codec: Codec,
    inputs: Inputs,
    config: kto.KTOConfig,
    log: MetricsLog,
    *,
    ref_device: torch.device | None = None,
) -> Policy:
    """Train a copy of the policy on the labelled responses; the start stays as its reference.

    The trained model is saved in the run's folder when its measures are finite.
    """
    examples, cut = codec.encode_unpaired(inputs.unpaired)
    heldout, heldout_cut = codec.encode_unpaired(inputs.heldout_unpaired[:HELDOUT_ROWS])
    encoding = describe(cut, codec) + describe_heldout(heldout_cut, len(heldout))
    told = [f"KTO on {len(examples)} labelled responses; {encoding}", *balance(examples, config)]
    report = print_report(*told)
    kto.check_heldout(heldout, config)  # before the run has a folder
    policy, ref_policy = policy_and_reference(start, "none", ref_device)
    state = kto.new_state(policy, ref_policy, examples, config)
    snapshot = Snapshot(
        STAGE,
        policy,
        state,
        partial(save_policy, policy),
        models={"policy": policy, "ref_policy": ref_policy},
        texts=[row["prompt"] for row in inputs.unpaired],
        examples=examples,
        heldout=heldout,
        total=kto.total(state.cursor, config),
        alone=partial(alone, policy, ref_policy, config),
    )
    run_stage(
        snapshot,
        checks(policy, ref_policy, config, state),
        kto.train(policy, ref_policy, config, state, heldout=heldout),
        inputs,
        log,
        title=TITLE,
        report=report,
        show=("loss", "eval/accuracy"),
    )
    accuracy = {}
    for name, rows in [("trained on", state.cursor.examples), ("held out", heldout)]:
        if some := rows[:HELDOUT_ROWS]:
            with state.optimizer.autocast():
                measured = kto.evaluate(policy, ref_policy, some, config)
            faults.require_finite(STAGE, measured)
            right = round(measured["eval/accuracy"] * len(some))
            share = sum(x.label for x in some) / len(some)
            accuracy[name] = proportion_estimate(right, len(some)).as_json()
            accuracy[name]["one_label"] = max(share, 1 - share)
    snapshot.save_model(log.folder / STAGE)
    note(log.folder, STAGE, accuracy=accuracy)
    return policy


def balance(examples: Sequence[UnpairedExample], config: kto.KTOConfig) -> Iterator[str]:
    """How many rows have each label and what they weigh, with a warning where that may not be
    meant; and how many say both of the same response."""
    n = len(examples)
    desirable = sum(x.label for x in examples)
    undesirable = n - desirable
    are = "is" if desirable == 1 else "are"
    counts = f"{plural(desirable, 'response')} {are} labelled true and {undesirable} false"
    if n == 0 or 0 in (desirable, undesirable):
        does = "raises what it is shown, like SFT" if desirable else "lowers what it is shown"
        yield f"  warning: {counts}, so KTO only {does}; give responses of both kinds"
        return
    ratio = kto.weight_ratio(examples, config)
    if 1 <= round(ratio, 2) <= round(WIDEST_RATIO, 2):
        yield f"  {counts}; the true ones weigh {ratio:.2f} times as much together"
    else:
        low = config.undesirable_weight * undesirable / desirable
        high = config.desirable_weight * desirable / undesirable
        yield (
            f"  warning: {counts}, so the true ones weigh {ratio:.3g} times as much together, "
            f"beside the recommended 1 to 1.33; give --desirable_weight {low:.3g} to "
            f"{low * WIDEST_RATIO:.3g}, or --undesirable_weight {high / WIDEST_RATIO:.3g} to "
            f"{high:.3g}"
        )
    labels: dict[tuple[tuple[int, ...], ...], set[bool]] = {}
    for x in examples:
        row = tuple(x.prompt_ids.tolist()), tuple(x.response_ids.tolist())
        labels.setdefault(row, set()).add(x.label)
    if both := sum(len(found) == 2 for found in labels.values()):
        yield f"  labelled true in one row and false in another: {plural(both, 'response')}"


def alone(
    policy: Policy,
    ref_policy: Policy,
    config: kto.KTOConfig,
    examples: Sequence[UnpairedExample],
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """What the loss of each row is made of, to find the ones at fault where it is not finite; then
    what the KL is made of."""
    none = torch.zeros((), dtype=torch.float32, device=policy.device)
    for row, example in enumerate(examples):
        loss = kto.batch_loss(policy, ref_policy, [example], none, config)
        yield row, {name: x for name, x in loss._asdict().items() if name != "loss"}
    if config.loss == "kto" and len(examples) > 1:
        for row, pair in enumerate(kto.mismatched(examples)):
            found = {"mismatched_logprobs": policy, "ref_mismatched_logprobs": ref_policy}
            yield row, {name: kto.response_logprobs(x, [pair]) for name, x in found.items()}


# What a report shows

CURVES = (
    Curve(
        STAGE,
        "Implicit rewards",
        "nats times beta",
        (
            ("desirable_rewards", "desirable"),
            ("undesirable_rewards", "undesirable"),
            ("eval/desirable_rewards", "held out"),
            ("eval/undesirable_rewards", "held out"),
        ),
        "The undesirable one sinks and the desirable one rises or stays near 0; where both sink "
        "far, probability goes to responses that are in no row.",
        Range(low=-2),
        "raise --beta or lower --learning_rate",
    ),
    Curve(
        STAGE,
        "Reference point",
        "nats",
        (("eval/kl", "held out"), ("kl", "training")),
        "The KL as estimated from responses to other prompts, cut off at 0: where those are "
        "improbable, as in the embedded world, nearly every step has 0; a response is good or "
        "bad beside it, so where it is large, all rows are on one side.",
        Range(high=20),
        "raise --beta or lower --learning_rate",
    ),
)


def headline(run: Run) -> str | None:
    """How many responses are on their side of the reference point, and how often that is not 0."""
    rows, (_, kls) = run.noted(STAGE, "accuracy"), run.series(STAGE, "kl")
    if not rows:
        return None
    above = sum(kl > 0 for kl in kls)
    point = f"The reference point was above 0 in {above} of {len(kls)} steps."
    return f"{TITLE}: {accuracies_in_words(rows)}. {point}"


def findings(run: Run) -> Iterator[Finding]:
    """Whether it knows more than its own rows, and than one label for all."""
    rows = run.noted(STAGE, "accuracy")
    if not rows or "held out" not in rows:
        return
    trained, held_out = rows["trained on"], rows["held out"]
    overlap = trained["ci95"][0] <= held_out["ci95"][1]
    if not overlap and by_heart(trained["mean"], held_out):
        yield Finding(
            STAGE,
            "learns its responses by heart",
            figure=accuracies_in_words(rows),
            to_do="take fewer --epochs, a lower --learning_rate, a larger --beta, or more rows",
        )
    if held_out["ci95"][0] <= held_out["one_label"]:
        yield Finding(
            STAGE,
            "is not shown to know more than that one label is frequent",
            f"({held_out['one_label']:.0%} of {held_out['n']} held-out rows)",
            accuracies_in_words(rows),
            "take more rows, and hold more of them out",
        )


def accuracies_in_words(rows: Mapping[str, Estimated]) -> str:
    """How often a response is on the side of its label, on both halves of the rows."""
    parts = [f"{interval(found)} of {found['n']} responses {name}" for name, found in rows.items()]
    return f"tells desirable from undesirable in {' and '.join(parts)}"
