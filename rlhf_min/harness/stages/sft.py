"""SFT as the commands run it."""

from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor

from rlhf_min import sft
from rlhf_min.data import SFTExample
from rlhf_min.encoding.codec import Codec
from rlhf_min.harness import preflight
from rlhf_min.harness.inputs import Inputs, print_report
from rlhf_min.harness.preflight import Check
from rlhf_min.harness.report.curves import Curve, Range, number
from rlhf_min.harness.report.findings import Finding
from rlhf_min.harness.rows.encoding_report import describe, describe_heldout
from rlhf_min.harness.run.checkpoint import Snapshot
from rlhf_min.harness.run.log import MetricsLog
from rlhf_min.harness.run.reading import Run
from rlhf_min.harness.run.saved_models import save_policy
from rlhf_min.harness.stages.run_stage import run_stage
from rlhf_min.optim import State
from rlhf_min.policy import Policy
from rlhf_min.speed.sharding import shard

STAGE = "sft"
TITLE, ROWS = "SFT", "demonstrations"
CONFIG = sft.SFTConfig
MEASURED = {"loss": "lower", "perplexity": "lower"}
MONITORS = False
WRITES = ()


# What its preflight checks


def checks(policy: Policy, config: sft.SFTConfig, state: State) -> Iterator[Check]:
    """What SFT relies on; a state of `sft.new_state` is left as it is."""
    rows = [(x.prompt_ids, x.response_ids) for x in state.cursor.examples]
    yield preflight.no_empty_row(rows)
    yield preflight.eos_supervised(rows, policy)
    yield from preflight.half_precision(config.precision, policy.device)
    longest = max(map(preflight.row_length, rows))
    tokens = preflight.largest_batch(longest, config.batch_size, config.max_tokens)
    yield from preflight.policy_memory(policy, [], state.optimizer, rows[0], tokens=tokens)
    short = preflight.shortest(rows)
    tolerance = preflight.tolerance(policy.lm.dtype, config.precision)
    yield preflight.head_equals_model(policy, short[0], tolerance)
    yield preflight.row_alone_equals_batch(policy, short[-1], tolerance)


# How it is run


def run(
    policy: Policy, codec: Codec, inputs: Inputs, config: sft.SFTConfig, log: MetricsLog
) -> None:
    """Fine-tune the policy on the demonstrations, and save it in the run's folder."""
    examples, cut = codec.encode_demonstrations(inputs.demonstrations)
    heldout, heldout_cut = codec.encode_demonstrations(inputs.heldout_demonstrations)
    encoding = describe(cut, codec) + describe_heldout(heldout_cut, len(heldout))
    report = print_report(f"SFT on {len(examples)} demonstrations; {encoding}")
    state = sft.new_state(shard(policy), examples, config)
    snapshot = Snapshot(
        STAGE,
        policy,
        state,
        partial(save_policy, policy),
        models={"policy": policy},
        texts=[row["prompt"] for row in inputs.demonstrations],
        examples=examples,
        heldout=heldout,
        total=sft.total(state.cursor, config),
        alone=partial(alone, policy),
    )
    run_stage(
        snapshot,
        checks(policy, config, state),
        sft.train(policy, config, state, heldout=heldout),
        inputs,
        log,
        title=TITLE,
        report=report,
        show=("loss", "eval/perplexity"),
    )
    snapshot.save_model(log.folder / STAGE)


def alone(
    policy: Policy, examples: Sequence[SFTExample]
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """The loss of each row, to find the ones at fault where it is not finite."""
    for row, example in enumerate(examples):
        yield row, sft.batch_loss(policy, [example])._asdict()


# What a report shows

TURNED_UP = "the held-out loss turned up"
RISE = 1.05  # times its lowest value: then the held-out loss says that examples are learned
CURVES = (
    Curve(
        STAGE,
        "Loss",
        "nats per token",
        (("eval/loss", "held out"), ("loss", "training")),
        "Both fall together; where the held-out loss turns up, the model learns its examples by "
        "heart.",
        Range(high=1.05, of="starts"),
        "take fewer --epochs or a lower --learning_rate",
        instead=TURNED_UP,
    ),
)


def headline(run: Run) -> str | None:
    """Where the held-out loss began and ended."""
    steps, losses = run.series(STAGE, "eval/loss")
    if not steps:
        return None
    places = list(dict.fromkeys([(steps[0], losses[0]), (steps[-1], losses[-1])]))
    course = ", ".join(f"{number(loss)} at step {step}" for step, loss in places)
    return f"{TITLE}: held-out loss {course}, in nats per token."


def findings(run: Run) -> Iterator[Finding]:
    """Whether the held-out loss fell, and stayed low."""
    steps, losses = run.series(STAGE, "eval/loss")
    if len(steps) < 2:
        return
    lowest = min(losses)
    best = steps[losses.index(lowest)]
    if losses[-1] > RISE * lowest:
        yield Finding(
            STAGE,
            TURNED_UP,
            f"after step {best}",
            f"{number(lowest)} there, {number(losses[-1])} at step {steps[-1]}: examples are "
            "learned by heart",
            "take fewer --epochs or a lower --learning_rate; --keep_best eval/loss keeps the best "
            "model",
        )
    elif losses[-1] >= losses[0]:
        yield Finding(
            STAGE,
            "the held-out loss did not fall",
            f"from step {steps[0]} to step {steps[-1]}",
            f"{number(losses[0])} to {number(losses[-1])}",
            "take more --epochs or another --learning_rate",
        )
