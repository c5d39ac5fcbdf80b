"""DPO of a policy on preference pairs, without a reward model.

Without --model a small new GPT-2 is first fine-tuned on the demonstrations (with --data: on the
chosen responses). The model lands in <out>/dpo.
"""

from rlhf_min.config import DPOConfig, SFTConfig
from rlhf_min.harness.cli import RunOptions, command, parse
from rlhf_min.harness.inputs import load_inputs
from rlhf_min.harness.run.folder import check_out, start_log

UNUSED = ("reward_model",)


@command
def main() -> None:
    options, config = parse(__doc__, RunOptions, DPOConfig, without=UNUSED)
    out = check_out(options, "dpo")
    inputs = load_inputs(options, "dpo", seed=config.seed)
    # Only now, since torch takes seconds to import: what can be refused is refused at once.
    from rlhf_min.harness.models import make_codec, start_policy
    from rlhf_min.harness.report import finish
    from rlhf_min.harness.stages import dpo, sft

    policy = start_policy(options, inputs.texts, critic="none", seed=config.seed)
    codec = make_codec(policy, options)

    log = start_log(out, options, config)
    if options.model is None:
        sft.run(policy, codec, inputs, SFTConfig(seed=config.seed), log)
    dpo.run(policy, codec, inputs, config, log, ref_device=options.torch_device("reward_device"))

    shown = finish.show(out)
    print(f"{', '.join(['model', *shown])} and metrics.jsonl are in {out}")


if __name__ == "__main__":
    main()
