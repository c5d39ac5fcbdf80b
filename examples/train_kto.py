"""KTO of a policy on single responses, each labelled good or bad, without a reward model.

--data has a prompt, a response and a label in each row, or pairs, which are taken apart. Without
--model a small new GPT-2 is first fine-tuned on the demonstrations (with --data: on the responses
that are labelled true). The model lands in <out>/kto.
"""

from rlhf_min.config import KTOConfig, SFTConfig
from rlhf_min.harness.cli import RunOptions, command, parse
from rlhf_min.harness.inputs import load_inputs
from rlhf_min.harness.run.folder import check_out, start_log

UNUSED = ("reward_model",)


@command
def main() -> None:
    options, config = parse(__doc__, RunOptions, KTOConfig, without=UNUSED)
    out = check_out(options, "kto")
    inputs = load_inputs(options, "kto", seed=config.seed)
    # Only now, since torch takes seconds to import: what can be refused is refused at once.
    from rlhf_min.harness.models import make_codec, start_policy
    from rlhf_min.harness.report import finish
    from rlhf_min.harness.stages import kto, sft

    policy = start_policy(options, inputs.texts, critic="none", seed=config.seed)
    codec = make_codec(policy, options)

    log = start_log(out, options, config)
    if options.model is None:
        sft.run(policy, codec, inputs, SFTConfig(seed=config.seed), log)
    kto.run(policy, codec, inputs, config, log, ref_device=options.torch_device("reward_device"))

    shown = finish.show(out)
    print(f"{', '.join(['model', *shown])} and metrics.jsonl are in {out}")


if __name__ == "__main__":
    main()
