"""Supervised fine-tuning of a causal language model on demonstrations.

Without options: a small new GPT-2 on the embedded world. The model lands in <out>/sft.
"""

from rlhf_min.config import SFTConfig
from rlhf_min.harness.cli import RunOptions, command, parse
from rlhf_min.harness.inputs import load_inputs
from rlhf_min.harness.run.folder import check_out, start_log

UNUSED = ("reward_model", "reward_device")


@command
def main() -> None:
    options, config = parse(__doc__, RunOptions, SFTConfig, without=UNUSED)
    out = check_out(options, "sft")
    inputs = load_inputs(options, "sft", seed=config.seed)
    # Only now, since torch takes seconds to import: what can be refused is refused at once.
    from rlhf_min.harness.models import make_codec, start_policy
    from rlhf_min.harness.report import finish
    from rlhf_min.harness.stages import sft

    policy = start_policy(options, inputs.texts, critic="none", seed=config.seed)
    codec = make_codec(policy, options)

    log = start_log(out, options, config)
    sft.run(policy, codec, inputs, config, log)

    shown = finish.show(out)
    print(f"{', '.join(['model', *shown])} and metrics.jsonl are in {out}")


if __name__ == "__main__":
    main()
