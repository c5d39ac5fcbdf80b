"""SFT as the commands run it."""

from collections.abc import Iterator
from functools import partial

from rlhf_min import sft
from rlhf_min.encoding.codec import Codec
from rlhf_min.harness import preflight
from rlhf_min.harness.inputs import Inputs
from rlhf_min.harness.preflight import Check
from rlhf_min.harness.rows.encoding_report import encoded, encoded_heldout
from rlhf_min.harness.run.checkpoint import Snapshot
from rlhf_min.harness.run.log import MetricsLog
from rlhf_min.harness.run.saved_models import save_policy
from rlhf_min.harness.stages.run_stage import note_start, tell
from rlhf_min.optim import State
from rlhf_min.policy import Policy

STAGE = "sft"
CONFIG = sft.SFTConfig
MEASURED = {"loss": "lower", "perplexity": "lower"}
MONITORS = False
WRITES = ()


def check(policy: Policy, config: sft.SFTConfig, state: State) -> None:
    """Measure what SFT relies on; a state of `sft.new_state` is left as it is.

    Raises:
        BadInput: at the first check that fails.
    """
    tolerance = preflight.TOLERANCE[preflight.precision_of(policy.lm.dtype, config.precision)]
    rows = [(x.prompt_ids, x.response_ids) for x in state.cursor.examples]

    def checks() -> Iterator[Check]:
        yield preflight.no_empty_row(rows)
        yield preflight.eos_supervised(rows, policy)
        yield from preflight.half_precision(config.precision, policy.device)
        longest = max(map(preflight.row_length, rows))
        tokens = max(longest, min(config.max_tokens, config.batch_size * longest))
        yield from preflight.policy_memory(policy, [], state.optimizer, rows[0], tokens=tokens)
        short = preflight.shortest(rows)
        yield preflight.head_equals_model(policy, short[0], tolerance)
        yield preflight.row_alone_equals_batch(policy, short[-1], tolerance)

    preflight.run("SFT", checks(), state.optimizer, policy)


def run(
    policy: Policy,
    codec: Codec,
    inputs: Inputs,
    config: sft.SFTConfig,
    log: MetricsLog,
) -> None:
    """Fine-tune the policy on the demonstrations, and save it in the run's folder."""
    examples, cut = codec.encode_demonstrations(inputs.demonstrations)
    heldout, heldout_cut = codec.encode_demonstrations(inputs.heldout_demonstrations)
    encoding = encoded(cut, codec) + encoded_heldout(heldout_cut, len(heldout))
    told = tell(f"SFT on {len(examples)} demonstrations; {encoding}")
    state = sft.new_state(policy, examples, config)
    total = sft.total(state.cursor, config)
    snapshot = Snapshot(
        STAGE,
        policy,
        state,
        partial(save_policy, policy),
        models={"policy": policy},
        texts=[row["prompt"] for row in inputs.demonstrations],
        examples=examples,
        heldout=heldout,
        total=total,
    )
    if log.preflight and not log.has_checkpoint(STAGE):
        check(policy, config, state)
    log.resume(snapshot)
    note_start(log, snapshot, inputs, told, held_out=len(heldout))
    steps = sft.train(policy, config, state, heldout=heldout)
    log.follow(STAGE, steps, total=total, show=("loss", "eval/perplexity"), snapshot=snapshot)
    save_policy(policy, log.folder / STAGE)
